"""`dapa-merge` on disk, `mergekit-yaml` and the swap in memory are one transplant, for every architecture."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, SHAPE, UNGATED, call, configuration, save_random
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM

from dapa_merge.checkpoint.open import open_checkpoint, read_bytes
from dapa_merge.errors import DapaError
from dapa_merge.flow import repair
from dapa_merge.measure.live import LiveModel
from dapa_merge.plan.selection import given_selection, make_plan
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.verify.tensors import verify

# Their experts lie one by one in the files that transformers writes, and together in those that mergekit writes.
REGROUPED = (
    "MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "Glm4MoeForCausalLM",
)  # fmt: skip
# mergekit asks for buffers or tied weights that transformers does not save.
NOT_IN_MERGEKIT = ("GPTNeoXForCausalLM", "FalconForCausalLM")
# mergekit has no definition of them, and loses experts that not every layer has.
LOST_BY_MERGEKIT = ("DeepseekV3ForCausalLM", "JambaForCausalLM")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_path_gives_the_same_model(architecture, save_pair, tmp_path, write_recipe):
    assert_paths_agree(save_pair(architecture), architecture, tmp_path, write_recipe, layers='"0,2-3"')


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GraniteForCausalLM", "Gemma3ForCausalLM"])
@pytest.mark.parametrize("source_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_path_takes_the_same_rows(architecture, source_dtype, save_pair, tmp_path, write_recipe):
    layers = '"0.up,2.gate[0:1],2.gate[7:30],2.up[40:48],3.gate[16:32],3.gate[32:40]"'
    assert_paths_agree(save_pair(architecture, source_dtype), architecture, tmp_path, write_recipe, layers=layers)


@pytest.mark.parametrize(
    ("architecture", "layers"),
    [
        ("Phi3ForCausalLM", '"0.up,2.gate[0:1],2.gate[7:30],2.up[40:48],3.gate[16:40]"'),
        # Rows 16 to 31 are the second expert's, the last 24 the shared one's.
        ("Qwen2MoeForCausalLM", '"0.gate[10:40],1.up[60:88],3.gate[63:64]"'),
        ("Llama4ForCausalLM", '"1.gate[40:100],1.up[190:200],2.gate[3:4]"'),
        ("GraniteMoeHybridForCausalLM", '"1.gate[40:100],1.up[190:200],2.gate[3:4]"'),
    ],
)
@pytest.mark.parametrize("source_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_of_fused_projections_and_of_experts_are_the_same_by_every_path(
    architecture, layers, source_dtype, save_pair, tmp_path, write_recipe
):
    assert_paths_agree(save_pair(architecture, source_dtype), architecture, tmp_path, write_recipe, layers=layers)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Phi3ForCausalLM", "MixtralForCausalLM"])
@pytest.mark.parametrize(("strength", "source_dtype"), [(0.3, torch.float32), (1.5, torch.bfloat16)])
def test_every_path_mixes_to_the_same_bits(architecture, strength, source_dtype, save_pair, tmp_path, write_recipe):
    pair = save_pair(architecture, source_dtype)
    assert_paths_agree(pair, architecture, tmp_path, write_recipe, layers='"1,3"', strength=strength)


# Where they lie in one tensor, or in experts; without a gate, mlp is just up and down.
OTHER_MODULES = [
    *itertools.product(("Phi3ForCausalLM", "Glm4MoeForCausalLM", "Llama4ForCausalLM"), ("up", "down", "mlp")),
    ("GPT2LMHeadModel", "up"),
    ("GPT2LMHeadModel", "down"),
    *itertools.product(UNGATED, ("mlp",)),
]


@pytest.mark.parametrize(("architecture", "module"), OTHER_MODULES)
def test_other_modules_can_be_transplanted_also_where_there_is_no_gate(
    architecture, module, save_pair, tmp_path, write_recipe
):
    assert_paths_agree(save_pair(architecture), architecture, tmp_path, write_recipe, layers='"1,3"', modules=module)


# Apart, in rows or in columns of one tensor, with biases or without.
ATTENTION = {
    "LlamaForCausalLM", "Qwen2ForCausalLM", "Lfm2ForCausalLM", "Phi3ForCausalLM", "DbrxForCausalLM", "MptForCausalLM",
    "GPT2LMHeadModel", "GPTBigCodeForCausalLM",
}  # fmt: skip


@pytest.mark.parametrize("modules", ["q,v", "k,o"])
@pytest.mark.parametrize("architecture", [name for name in {**ARCHITECTURES, **UNGATED} if name in ATTENTION])
def test_projections_of_attention_can_be_transplanted_apart(architecture, modules, save_pair, tmp_path, write_recipe):
    assert_paths_agree(save_pair(architecture), architecture, tmp_path, write_recipe, layers='"1,3"', modules=modules)


@pytest.mark.parametrize("architecture", UNGATED)
def test_a_model_without_gates_is_refused_with_what_works_instead(architecture, save_pair, write_recipe):
    target, source = save_pair(architecture)
    result = call("plan", write_recipe(target, source, layers=1))
    assert result.exit_code == 4
    assert f"{architecture} has no gate projection in its MLP" in result.stderr
    assert "write `modules: up` or `modules: down` or `modules: mlp`" in result.stderr


@pytest.mark.parametrize("architecture", LOST_BY_MERGEKIT)
def test_what_mergekit_would_lose_is_refused_before_it_writes(architecture, save_pair, tmp_path):
    target, source = save_pair(architecture)
    with pytest.raises(DapaError, match=r"no definition of .*, and would leave .* out of its result"):
        run_merge(configuration(target, source, layers="0"), str(tmp_path / "out"), MergeOptions(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def save_pair(tmp_path_factory):
    """Makes a random target and source of an architecture, once for all who ask, and nobody changes them."""
    return functools.cache(lambda *which: new_pair(tmp_path_factory.mktemp("pair"), *which))


def new_pair(folder, architecture, source_dtype=torch.bfloat16):
    class_name, changes = {**ARCHITECTURES, **UNGATED}[architecture]
    kind = getattr(transformers, class_name)
    config = kind(**{**SHAPE, **changes} if class_name != "DbrxConfig" else {"vocab_size": 152, **changes})
    return (
        save_random(folder / "target", config, seed=1),
        save_random(folder / "source", config, seed=2, dtype=source_dtype),
    )


def assert_paths_agree(pair, architecture, folder, write_recipe, **parameters):
    """Write one transplant by both entrances and swap it in memory; the bytes and what they compute must agree."""
    target, source = pair
    parsed = load_recipe(write_recipe(target, source, **parameters))
    plan = make_plan(parsed)
    selection = given_selection(parsed, plan)
    assert plan.target.config["architectures"] == [architecture]
    assert len(plan.target.shards) >= 3

    ours, theirs = folder / "ours", folder / "theirs"
    results = [ours]
    repair(parsed, ours, evaluate=False)
    if architecture not in (*NOT_IN_MERGEKIT, *LOST_BY_MERGEKIT):
        results.append(theirs)
        plain = {key: value.strip('"') if isinstance(value, str) else value for key, value in parameters.items()}
        run_merge(configuration(target, source, **plain), str(theirs), MergeOptions(quiet=True))
        assert_same_tensors(ours, theirs, architecture in REGROUPED)
    for out in results:
        verification = verify(out, plan)
        assert verification.differences == ()
        assert str(verification.transplanted) == str(selection)

    input_ids = torch.arange(3, 15)[None]
    live = LiveModel(plan, torch.device("cpu"))
    before = {name: value.clone() for name, value in live.model.state_dict().items()}
    with torch.no_grad():
        target_logits = live.model(input_ids).logits
        with live.transplanted(selection) as candidate:
            live_logits = candidate(input_ids).logits
            swapped = {name: value.clone() for name, value in candidate.state_dict().items()}
        assert_same(live.model.state_dict(), before)
        for out in results:
            model = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
            assert_same(model.state_dict(), swapped)
            assert torch.equal(model(input_ids).logits, live_logits)
    assert not torch.equal(live_logits, target_logits)


def assert_same_tensors(ours, theirs, is_regrouped):
    first, second = open_checkpoint(str(ours)), open_checkpoint(str(theirs))
    if not is_regrouped:
        assert first.tensors.keys() <= second.tensors.keys()
    for name in first.tensors.keys() & second.tensors.keys():
        tensor, other = first.tensors[name], second.tensors[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert read_bytes(first, tensor) == read_bytes(second, other), name


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
