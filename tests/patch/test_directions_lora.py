"""A repair by directions as a LoRA adapter, loaded and merged by peft itself."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from conftest import answer, call, change_tensor
from direction_files import made
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dapa_merge.checkpoint.convert import open_location
from dapa_merge.checkpoint.location import Location
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.checkpoint.region import whole_box
from dapa_merge.plan.directions import FILE_NAME, FactorTable, read_factors

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
MODULES = {"GPT2LMHeadModel": "up,k,o", "Phi3ForCausalLM": "gate,up,v"}
# 8 and 11 bits of a number are stored.
UNITS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-23}


def load(folder: Path, dtype="auto"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def adapted(base: Path, adapter: Path, dtype="auto"):
    """The base with the adapter, without a warning of keys that do not fit."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(load(base, dtype), adapter).eval()


def changes(table: FactorTable, base: Path) -> dict[str, torch.Tensor]:
    """What the directions add to each tensor of the files, before rounding."""
    shapes = open_checkpoint(str(base)).shapes
    found: dict[str, torch.Tensor] = {}
    for place, factors in table.of.items():
        change = found.setdefault(place.tensor, torch.zeros(shapes[place.tensor]))
        box = place.box or whole_box(shapes[place.tensor])
        change[tuple(slice(*rows) for rows in box)] += torch.from_numpy(factors.product())
    return found


CASES = [
    ("LlamaForCausalLM", torch.bfloat16),
    ("LlamaForCausalLM", torch.float16),
    ("LlamaForCausalLM", torch.float32),
    ("Qwen2ForCausalLM", torch.bfloat16),
    # Fused: gate and up of one tensor have one adapter, v has rows of qkv.
    ("Phi3ForCausalLM", torch.bfloat16),
    # Weights that are stored transposed.
    ("GPT2LMHeadModel", torch.bfloat16),
]


@pytest.mark.parametrize(("architecture", "dtype"), CASES)
def test_peft_adds_what_the_directions_add(architecture, dtype, tmp_path, own_cache):
    base, out = made(tmp_path, architecture, MODULES.get(architecture, "gate,down,q,v"), dtype=dtype)
    adapter = tmp_path / "adapter"
    found = answer("patch", "extract", out, "--lora", adapter, "--json")
    table = read_factors(out / FILE_NAME)
    added = changes(table, base)
    assert {f"{module}.weight" for module in found["ranks"]} == set(added)
    assert sum(found["ranks"].values()) == table.num_directions
    assert len(set(found["ranks"].values())) > 1

    input_ids = torch.arange(3, 15)[None]
    exact = load(base, torch.float32)
    target = load(base, torch.float32)
    with torch.no_grad():
        for name, change in added.items():
            exact.get_parameter(name).add_(change)
        logits = exact(input_ids).logits
        error = (adapted(base, adapter, torch.float32)(input_ids).logits - logits).abs().max()
        assert error < 1e-4 * (target(input_ids).logits - logits).abs().max()

    merged, result, old = adapted(base, adapter).merge_and_unload(), load(out), load(base)
    # As `BASE+ADAPTER` of a recipe.
    ours = load(open_location(Location(str(base), adapter=Location(str(adapter)))).folder)
    assert all(torch.equal(value, ours.get_parameter(name)) for name, value in merged.named_parameters())
    num_different = 0
    for name, value in merged.named_parameters():
        ours, before = result.get_parameter(name), old.get_parameter(name)
        if name not in added:
            assert torch.equal(value, before), name
            continue
        # One unit in the last place of the largest of the three numbers: peft rounds twice. The product is exact beside
        # half a precision, but not beside a float32.
        largest = torch.maximum(torch.maximum(before.abs(), added[name].abs()), ours.abs()).double()
        product = 1e-6 * added[name].abs().max() if dtype == torch.float32 else 0
        assert ((value.double() - ours.double()).abs() <= UNITS[dtype] * largest + product).all(), name
        num_different += int((value != ours).sum())
    assert num_different <= 0.3 * sum(change.numel() for change in added.values())


def test_an_adapter_names_its_base_and_no_path(tmp_path):
    _, out = made(tmp_path)
    adapter = tmp_path / "adapter"
    said = call("patch", "extract", out, "--lora", adapter)
    assert said.exit_code == 0, said.stderr
    assert "a LoRA of 4 layers of" in said.stdout
    assert {path.name for path in adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "target"
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert str(tmp_path) not in json.dumps(config)


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Llama4ForCausalLM"])
def test_experts_in_one_parameter_are_refused_in_a_sentence(architecture, tmp_path):
    _, out = made(tmp_path, architecture, "gate,down")
    refused = call("patch", "extract", out, "--lora", tmp_path / "adapter")
    assert refused.exit_code == 2
    named = r"layers\.1\.\S+\.experts\.\S+ of .* is in model\.layers\.1\.\S+\.experts\.\w+, which is not a linear layer"
    assert re.search(named, refused.stderr)
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "adapter").exists()


@pytest.fixture(scope="module")
def repaired(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("repaired"))[1]


def test_a_result_without_directions_has_no_adapter(repaired, tmp_path):
    bare = shutil.copytree(repaired, tmp_path / "bare")
    (bare / "mergekit_config.yml").unlink()
    for folder in (bare, open_checkpoint(str(repaired)).folder.parent / "target"):
        refused = call("patch", "extract", folder, "--lora", tmp_path / "adapter")
        assert refused.exit_code == 2
        assert "was not made by the edit directions" in refused.stderr


def test_a_result_that_is_not_its_directions_has_no_adapter(repaired, tmp_path):
    changed = shutil.copytree(repaired, tmp_path / "changed")
    name = "model.layers.0.mlp.down_proj.weight"
    change_tensor(changed, name, lambda tensor: tensor[0, 0].add_(1))
    refused = call("patch", "extract", changed, "--lora", tmp_path / "adapter")
    assert refused.exit_code == 4
    assert f"{name} of " in refused.stderr
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_is_not_written_over_anything(repaired, tmp_path):
    (tmp_path / "kept").write_text("x")
    for arguments, what in (
        (("--lora", tmp_path), "exists already"),
        ((), "name either PATCH"),
        ((tmp_path / "p", "--lora", tmp_path / "l"), "name either PATCH"),
    ):
        refused = call("patch", "extract", repaired, *arguments)
        assert refused.exit_code == 2
        assert what in refused.stderr
