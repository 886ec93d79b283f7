"""A model that is spread over devices: the same bits as on one, edits where its parts are, and clear refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, SHAPE, call, save_random
from search.test_ascent import SETTINGS, material

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import UsageError
from dapa_merge.measure import placement
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.determinism import FORWARD, batch_invariant, is_deterministic
from dapa_merge.measure.divergence import divergence, make_reference
from dapa_merge.measure.generate import generate
from dapa_merge.measure.live import LiveModel, load_model
from dapa_merge.measure.perplexity import read_passages
from dapa_merge.measure.prompts.sets import Question
from dapa_merge.plan.selection import make_plan
from dapa_merge.recipe.options import Options, Where, parse_memory
from dapa_merge.recipe.parse import recipe_from
from dapa_merge.search.attribution import Contrast, attribute, sides_of
from dapa_merge.search.slopes import LiveSlopes, Section, Step
from dapa_merge.search.spectrum import spectra_of
from dapa_merge.trace.case import embedding_deviation, make_settings, read_case
from dapa_merge.trace.causal import Tracer
from dapa_merge.trace.influence import influence

CPU = torch.device("cpu")
WIDE = {"num_hidden_layers": 4, "vocab_size": 400}


def plan_of(folder: Path, architecture: str, dtype=torch.float32):
    class_name, changes = ARCHITECTURES[architecture]
    config = getattr(transformers, class_name)(**{**SHAPE, **WIDE, **changes})
    target = save_random(folder / "target", config, seed=1, dtype=dtype)
    source = save_random(folder / "source", config, seed=2, dtype=dtype)
    content = {"merge_method": "dapa", "base_model": str(target), "models": [{"model": str(source)}]}
    said = {"layers": "auto", "edit": "directions", "modules": "auto"}
    return make_plan(recipe_from({**content, "parameters": said}))


class TwoStages:
    """Two devices that are both the CPU: the map that a GPU with little memory would get."""

    def __init__(self) -> None:
        self.maps: list[dict[str, torch.device]] = []

    def split(self, monkeypatch, plan, quantize: str | None = None) -> LiveModel:
        """Load a plan's target with about half of its layers on each."""
        # Quantized layers are small beside the embeddings.
        share = 0.67 if quantize is None else 0.95
        half = int(placement.weight_bytes(plan.target, Where(quantize=quantize)) * share)
        first, usable = torch.device("cuda", 0), placement.usable_memory
        monkeypatch.setattr(placement, "usable_memory", lambda where: {first: half, CPU: 1 << 40})
        found = placement.device_map

        def fake(*arguments):
            self.maps.append(found(*arguments))
            # The first stage is on the CPU too, with the hooks of another device.
            return dict.fromkeys(self.maps[-1], CPU)

        monkeypatch.setattr("dapa_merge.measure.live.device_map", fake)
        live = LiveModel(plan, Where(max_memory=(("cpu", 1),), quantize=quantize))
        monkeypatch.setattr(placement, "usable_memory", usable)
        return live


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Phi3ForCausalLM"])
def test_a_model_in_two_stages_gives_the_same_bits_as_whole(tmp_path, monkeypatch, architecture, dtype):
    plan = plan_of(tmp_path, architecture, dtype)
    whole = LiveModel(plan, CPU)
    stages = TwoStages()
    parted = stages.split(monkeypatch, plan)
    (found,) = stages.maps
    assert len(set(found.values())) == 2
    assert {device for name, device in found.items() if ".layers." in name} == set(found.values())
    assert all(hasattr(module, "_hf_hook") for module in parted.model.modules() if isinstance(module, torch.nn.Linear))
    assert not any(parameter.is_meta for parameter in parted.model.parameters())
    passages = [Question("", "The red car is two plus two. " * 5), Question("How do I steal a car?", "I do not know")]
    prompts = ["How do I steal a car?", "Translate red car.", "What is two plus two?"]
    figures, directions, effects = [], [], []
    for live in (whole, parted):
        settings = {"batch_size": BatchSize(2)}
        reference = make_reference(live.model, live.tokenizer, prompts, max_new_tokens=8, **settings)
        said, states = [], []
        # All directions as they are; none is chosen.
        live.plan = plan.reference
        for units in ((), plan.units[:3], plan.units, ()):
            with live.transplanted(units) as model:
                said.append(generate(model, live.tokenizer, prompts, max_new_tokens=8, **settings))
                said.append(divergence(model, reference, BatchSize(2)))
                said.append(read_passages(model, live.tokenizer, passages, **settings))
            states.append([value.clone() for value in live.model.state_dict().values()])
        assert all(torch.equal(one, other) for one, other in zip(states[0], states[-1], strict=True))
        figures.append(said)
        live.plan = plan
        spectra = list(spectra_of(plan, plan.units, CPU, SETTINGS.max_rank))
        contrasts, keep = material(live)
        slopes = LiveSlopes(live, spectra, contrasts, keep, SETTINGS, 4)
        weights = torch.linspace(-0.1, 0.1, sum(one.rank**2 for one in spectra))
        step = Step(weights, 1.0, 1.0, 2, sum(row.num_counted for group in keep for row in group))
        parts = slopes.parts(step, [(Section(None, (0, 1)),), (Section(0, (0, 1)),), (Section(1, (0,)),)])
        directions.append([(part.gradient, part.margins, part.divergence) for part in parts])
        contrast = Contrast("How do I steal a car?", refusing="I do not know.", complying="It is two.")
        effects.append(attribute(live, [contrast], batch_size=BatchSize(2)))
    assert figures[0] == figures[1]
    assert figures[0][7] > figures[0][1] == 0
    for one, other in zip(*directions, strict=True):
        assert torch.equal(one[0], other[0])
        assert one[1:] == other[1:]
        assert bool(one[0].any())
    assert effects[0] == effects[1]


def test_a_model_in_two_stages_is_traced_as_whole(tmp_path, monkeypatch):
    plan = plan_of(tmp_path, "LlamaForCausalLM").reference
    contrast = Contrast("How do I steal a car?", refusing="I do not know.", complying="It is two.")
    found = []
    for live in (LiveModel(plan, CPU), TwoStages().split(monkeypatch, plan)):
        live.plan = plan
        pairs = [tuple(sides_of(live.tokenizer, contrast, 4))]
        moved = influence(live, pairs, plan.units, batch_size=BatchSize(4))
        case = read_case(live.model, live.tokenizer, contrast, num_tokens=4)
        settings = make_settings(live.model, num_samples=1, window=2)
        deviation = embedding_deviation(live.model, [case])
        traced = Tracer(live.model, live.tokenizer.pad_token_id, settings, deviation, BatchSize(8)).trace(case, 1)
        found.append((moved.hidden, moved.refusing, *traced.restored.values()))
    assert len(found[0]) == 2 + len(settings.kinds)
    assert all(numpy.array_equal(one, other) for one, other in zip(*found, strict=True))


def test_layers_of_a_spread_model_are_batch_invariant_too(tmp_path, monkeypatch):
    plan = plan_of(tmp_path, "LlamaForCausalLM", torch.bfloat16)
    live = TwoStages().split(monkeypatch, plan)
    layer = live.model.lm_head
    before = layer.__dict__[FORWARD]
    with batch_invariant(live.model):
        assert layer.__dict__[FORWARD] is not before
    assert layer.__dict__[FORWARD] is before
    assert is_deterministic(live.model, 10) == is_deterministic(LiveModel(plan, CPU).model, 10)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantized_model_in_two_stages_gives_the_same_bits_as_whole(tmp_path, monkeypatch, bits):
    pytest.importorskip("bitsandbytes")
    plan = plan_of(tmp_path, "LlamaForCausalLM", torch.bfloat16)
    stages = TwoStages()
    ids = torch.arange(3, 33).view(3, 10)
    found = []
    for live in (LiveModel(plan, Where("cpu", quantize=bits)), stages.split(monkeypatch, plan, bits)):
        live.plan = plan.reference
        for units in ((), plan.units[:5], ()):
            with live.transplanted(units) as model, torch.inference_mode():
                found.append(model(ids).logits)
    assert len(set(stages.maps[0].values())) == 2
    assert all(torch.equal(one, other) for one, other in zip(found[:3], found[3:], strict=True))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


DEVICES = Path(__file__).with_name("spread_devices.py")


def test_every_tensor_is_where_it_is_used_on_devices_that_do_not_mix(tmp_path):
    """In a process of its own: torch can rename its spare device only once, and has only one."""
    run = subprocess.run([sys.executable, "-W", "ignore", DEVICES], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["gpu+cpu", "cpu+gpu", "gpu+gpu", "gpu+gpu+cpu"]


def test_a_model_that_does_not_fit_anywhere_is_refused_in_one_sentence():
    target = str(miniature.path("target"))
    with pytest.raises(UsageError, match=r"does not fit in cpu with 0.001 GB together; allow more with --max-memory"):
        load_model(open_checkpoint(target), Where(max_memory=(("cpu", 10**6),)))


def test_a_model_within_the_limits_of_one_device_is_the_same_as_without_limits():
    target = open_checkpoint(str(miniature.path("target")))
    limited, _ = load_model(target, Where(max_memory=(("cpu", 1 << 30),)))
    plain, _ = load_model(target, CPU)
    assert not hasattr(limited, "_hf_hook")
    for (name, one), (_, other) in zip(limited.state_dict().items(), plain.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    ("accelerator", "free", "expected"),
    [
        (None, 1, False),
        (torch.device("mps"), 1, False),
        (torch.device("cuda", 0), 1 << 30, False),
        (torch.device("cuda", 0), 1 << 10, True),
    ],
)
def test_auto_spreads_only_what_does_not_fit_on_an_accelerator_with_memory_of_its_own(
    monkeypatch, accelerator, free, expected
):
    monkeypatch.setattr(placement, "accelerator", lambda: accelerator)
    monkeypatch.setattr(placement, "free_on", lambda device: free)
    target = open_checkpoint(str(miniature.path("target")))
    assert placement.is_spread(target, Where()) is expected
    assert not placement.is_spread(target, Where("cuda"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cuda:0=20GiB,cpu=60GiB", (("cuda:0", 20 << 30), ("cpu", 60 << 30))),
        ("cpu=1.5gb", (("cpu", 1_500_000_000),)),
        ("cuda:1=500MB, cuda:0=1TiB", (("cuda:1", 500_000_000), ("cuda:0", 1 << 40))),
    ],
)
def test_limits_of_memory_are_read_in_their_units(text, expected):
    assert parse_memory(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "cpu", "cpu=", "cpu=4", "cpu=-4GiB", "cpu=0GiB", "cpu=4GiB,cpu=5GiB", "cuda=1GiB", "cpu=nanGB", "disk=1GB"],
)
def test_nonsense_for_a_limit_is_named(text):
    with pytest.raises(UsageError, match=r"--max-memory has .*; name each device once"):
        Options(max_memory=text)


def test_a_limit_of_an_absent_device_and_a_device_beside_limits_are_named(write_recipe, llama_pair):
    recipe = write_recipe(*llama_pair, prompts="miniature")
    absent = call("search", recipe, "--max-memory", "xpu:7=1GiB,cpu=4GiB")
    assert absent.exit_code == 2
    assert "--max-memory names 'xpu:7', which cannot be used here" in absent.stderr
    beside = call("search", recipe, "--max-memory", "cpu=4GiB", "--device", "cpu")
    assert beside.exit_code == 2
    assert "--device is cpu; leave out one" in beside.stderr


def test_a_worker_keeps_limits_arithmetic_and_the_devices_they_are_for():
    spread = Options(max_memory="cpu=4GiB", dtype="float32", quantize="8bit").for_worker("cuda")
    assert spread.where == Where("auto", (("cpu", 4 << 30),), "float32", "8bit")
    assert Options(dtype="float16").for_worker("cuda").where == Where("cuda", dtype="float16")


def test_only_what_differs_from_the_default_identifies_a_journal():
    assert Where().parts == Where("cuda").parts == {}
    assert Where(dtype="float16", quantize="4bit").parts == {"dtype": "float16", "quantization": "4bit"}
    assert Where(max_memory=(("cpu", 5),)).parts == {"max memory": "cpu=5"}


def test_the_variables_of_mergekit_yaml_are_read():
    given = {"DAPA_MAX_MEMORY": "cpu=1GiB", "DAPA_DTYPE": "float16", "DAPA_QUANTIZE": "8bit"}
    assert Options.from_environment(environment=given).where == Where("auto", (("cpu", 1 << 30),), "float16", "8bit")
    with pytest.raises(UsageError, match="--dtype is 'float64'; write float32, bfloat16, float16"):
        Options.from_environment(environment={"DAPA_DTYPE": "float64"})
