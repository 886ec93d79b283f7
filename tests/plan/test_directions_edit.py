"""Chosen directions go through everything that computes, checks or describes weights, and are the same everywhere."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
import transformers
from conftest import (
    ARCHITECTURES,
    SHAPE,
    UNGATED,
    answer,
    call,
    change_tensor,
    configuration,
    num_different,
    save_random,
    tiny_llama,
    weights,
)
from direction_files import chosen, saved
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.numpy import save_file
from test_both_paths import assert_paths_agree

from dapa_merge.checkpoint.open import open_checkpoint, read_bytes
from dapa_merge.checkpoint.region import Region
from dapa_merge.plan.directions import FILE_NAME, Factors, FactorTable, read_factors
from dapa_merge.plan.edit import Directions
from dapa_merge.publish.lock import make_lock, write_lock
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.report.report import read_report

TIED = {"LlamaForCausalLM": {"tie_word_embeddings": True}, "Qwen2ForCausalLM": {"num_key_value_heads": 1}}
MODULES = {"MixtralForCausalLM": "gate,down", "Llama4ForCausalLM": "gate,down", "GPT2LMHeadModel": "up,k,o"}


def pair_of(folder: Path, architecture: str, dtype=torch.bfloat16, source_dtype=torch.float32) -> tuple[Path, Path]:
    class_name, changes = {**ARCHITECTURES, **UNGATED}[architecture]
    config = getattr(transformers, class_name)(**{**SHAPE, **changes, **TIED.get(architecture, {})})
    return (
        save_random(folder / "target", config, seed=1, dtype=dtype),
        save_random(folder / "source", config, seed=2, dtype=source_dtype),
    )


CASES = [
    ("LlamaForCausalLM", torch.bfloat16, torch.float32),
    ("LlamaForCausalLM", torch.float16, torch.float16),
    ("LlamaForCausalLM", torch.float32, torch.bfloat16),
    ("Qwen2ForCausalLM", torch.bfloat16, torch.bfloat16),
    ("Phi3ForCausalLM", torch.bfloat16, torch.float32),
    ("Phi3ForCausalLM", torch.float16, torch.bfloat16),
    ("MixtralForCausalLM", torch.bfloat16, torch.float32),
    ("MixtralForCausalLM", torch.float16, torch.float16),
    ("Llama4ForCausalLM", torch.bfloat16, torch.bfloat16),
    ("GPT2LMHeadModel", torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize(("architecture", "dtype", "source_dtype"), CASES)
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_memory_disk_mergekit_and_verify_agree(architecture, dtype, source_dtype, strength, tmp_path, write_recipe):
    if strength != 1 and dtype != torch.bfloat16:
        pytest.skip("one dtype is enough")
    pair = pair_of(tmp_path, architecture, dtype, source_dtype)
    modules = MODULES.get(architecture, "gate,up,q,v")
    file = saved(tmp_path / "file", chosen(*pair, "1,3", modules=modules))
    said = {"layers": '"1,3"', "modules": modules, "edit": "directions", "directions": str(file)}
    assert_paths_agree(pair, architecture, tmp_path, write_recipe, strength=strength, **said)

    recipe = write_recipe(*pair, strength=strength, **said)
    found = answer("verify", tmp_path / "ours", "--json")
    assert found["correct"], found
    assert set(found["num_changed"]) == {"directions"}
    assert answer("verify", tmp_path / "ours", "--recipe", recipe, "--json")["correct"]
    if (tmp_path / "theirs").exists():
        assert not (tmp_path / "theirs" / FILE_NAME).exists()
        assert answer("verify", tmp_path / "theirs", "--recipe", recipe, "--json")["units"] == found["units"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    return (
        save_random(folder / "target", tiny_llama(), seed=1),
        save_random(folder / "source", tiny_llama(), seed=2, dtype=torch.float32),
    )


def write(folder: Path, pair: tuple[Path, Path], file: Path, layers: str = "1,2", **parameters: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yml"
    modules = {} if "." in layers else {"modules": "gate,v"}
    said = {"layers": layers, **modules, "edit": "directions", "directions": str(file), **parameters}
    path.write_text(
        f"merge_method: dapa\nbase_model: {pair[0]}\nmodels: [{{model: {pair[1]}}}]\nparameters: {json.dumps(said)}\n"
    )
    return path


@pytest.fixture(scope="module")
def table(pair) -> FactorTable:
    return chosen(*pair, "1,2", modules="gate,v")


@pytest.fixture(scope="module")
def repaired(pair, table, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("repaired")
    recipe = write(folder, pair, saved(folder, table))
    assert call("run", recipe, folder / "out", "--no-evaluate").exit_code == 0
    return folder / "out"


def test_the_values_are_those_of_float64_arithmetic_rounded_to_the_target(pair, table, repaired):
    target, result = open_checkpoint(str(pair[0])), open_checkpoint(str(repaired))
    for place, factors in table.of.items():
        old, new = (
            torch.frombuffer(bytearray(read_bytes(one, one.tensors[place.tensor])), dtype=torch.bfloat16).double()
            for one in (target, result)
        )
        powers = numpy.exp2(factors.exponents.astype(float))
        change = torch.from_numpy((factors.left * powers).astype(float) @ factors.right.astype(float)).reshape(-1)
        exact = old + change
        # Half a unit of the 8 bits that bfloat16 has, and a little for float32 before it.
        assert ((new - exact).abs() <= exact.abs() * 2**-8 * 1.001).all()
        assert not torch.equal(old, new)


def test_a_result_holds_its_directions_and_replays_itself(repaired, tmp_path):
    manifest = json.loads((repaired / "dapa.json").read_text())
    assert manifest["directions"] == read_factors(repaired / FILE_NAME).digest
    assert FILE_NAME in manifest["files"]
    again = tmp_path / "again"
    assert call("run", repaired / "mergekit_config.yml", again, "--no-evaluate").exit_code == 0
    for name in [*manifest["files"], "dapa.json"]:
        if name not in ("dapa_report.json", "mergekit_config.yml"):
            is_manifest = name == "dapa.json"
            one, other = ((folder / name).read_bytes() for folder in (repaired, again))
            assert one == other or is_manifest, name
    assert json.loads((again / "dapa.json").read_text())["tensors"] == manifest["tensors"]


def test_a_result_keeps_only_the_directions_that_its_layers_use(pair, table, tmp_path):
    file = saved(tmp_path / "file", table)
    recipe = write(tmp_path, pair, file, layers="1.gate")
    out = tmp_path / "out"
    assert call("run", recipe, out, "--no-evaluate").exit_code == 0
    name = "model.layers.1.mlp.gate_proj.weight"
    assert [str(place) for place in read_factors(out / FILE_NAME).of] == [name]
    assert answer("verify", out, "--json")["notes"] == []
    found = answer("verify", out, "--recipe", recipe, "--json")
    assert found["correct"]
    assert found["units"] == ["1.gate"]
    (note,) = found["notes"]
    assert "the recipe does not use what it brings for model.layers.1.self_attn.v_proj.weight, model.layers.2" in note


def verified(out: Path, recipe: Path | None = None) -> str:
    """What `verify` says of a wrong result."""
    result = call("verify", out, *(("--recipe", recipe) if recipe else ()))
    assert result.exit_code == 4, result.output
    return result.output


GATE = "model.layers.1.mlp.gate_proj.weight"


def forged(pair, folder: Path, table: FactorTable) -> Path:
    """A result that was honestly computed from forged factors: its tensors, manifest and file agree."""
    recipe = write(folder, pair, saved(folder, table))
    result = call("run", recipe, folder / "out", "--no-evaluate")
    assert result.exit_code == 0, result.output
    return folder / "out"


def with_factors(table: FactorTable, name: str, factors: Factors) -> FactorTable:
    return FactorTable({place: factors if place.tensor == name else found for place, found in table.of.items()})


def factors_of(table: FactorTable, name: str) -> Factors:
    (found,) = (factors for place, factors in table.of.items() if place.tensor == name)
    return found


def test_tampered_tensors_are_found(repaired, tmp_path):
    wrong = shutil.copytree(repaired, tmp_path / "wrong")
    change_tensor(wrong, GATE, lambda tensor: tensor[3, 0].add_(1))
    assert f"{GATE}[3:4] is neither the target's nor the target's plus directions" in verified(wrong)


def test_tampered_factors_are_found_even_where_tensors_and_manifest_agree_with_them(pair, table, tmp_path):
    factors = factors_of(table, GATE)
    left = factors.left.copy()
    left[:, 1] = left[::-1, 1]
    out = forged(pair, tmp_path, with_factors(table, GATE, replace(factors, left=left)))
    assert f"{GATE}: its factors are not of source - target: the columns are not sums of left ones" in verified(out)


def test_a_change_that_goes_too_far_is_found(pair, table, tmp_path):
    factors = factors_of(table, GATE)
    changed = replace(factors, exponents=(factors.exponents + numpy.int16(3)))
    out = forged(pair, tmp_path, with_factors(table, GATE, changed))
    assert f"{GATE}: it moves 8 times as far as the source along a direction; at most 4 are allowed" in verified(out)


def test_factors_of_another_matrix_of_the_same_size_are_found(pair, table, tmp_path):
    swapped = with_factors(table, GATE, factors_of(table, GATE.replace("1", "2", 1)))
    assert f"{GATE}: its factors are not of source - target: the rows are not right singular" in verified(
        forged(pair, tmp_path, swapped)
    )


def test_a_digest_that_is_not_the_files_is_found(repaired, tmp_path):
    wrong = shutil.copytree(repaired, tmp_path / "wrong")
    content = json.loads((wrong / "dapa.json").read_text())
    content["directions"] = "0" * 64
    (wrong / "dapa.json").write_text(json.dumps(content))
    said = verified(wrong)
    assert f"dapa.json says edit directions, strength 1.0, directions {'0' * 64}, but the recipe says" in said


def test_a_file_that_was_exchanged_is_found(repaired, table, tmp_path):
    wrong = shutil.copytree(repaired, tmp_path / "wrong")
    half = {place: replace(found, exponents=found.exponents - numpy.int16(1)) for place, found in table.of.items()}
    (wrong / FILE_NAME).write_bytes(FactorTable(half).content())
    said = verified(wrong)
    assert f"{FILE_NAME} does not match its digest in dapa.json" in said
    assert f"{GATE}" in said


def test_another_source_is_found(repaired, tmp_path):
    other = save_random(tmp_path / "other", tiny_llama(), seed=3, dtype=torch.float32)
    result = call("verify", repaired, "--source", other)
    assert result.exit_code == 4
    assert f"{GATE}: its factors are not of source - target: the rows are not right singular" in result.output


def test_directions_of_part_of_a_unit_are_not_added_in_silence(pair, table, tmp_path):
    factors = factors_of(table, GATE)
    half = replace(factors, left=factors.left[:24])
    name = f"{GATE}[0:24,0:32]"
    content = {f"{name}.{key}": getattr(half, key) for key in ("left", "right", "exponents")}
    file = tmp_path / FILE_NAME
    save_file(content, file)
    refused = call("run", write(tmp_path, pair, file, layers="1.gate"), tmp_path / "out", "--no-evaluate")
    assert refused.exit_code == 2
    assert "layer 1 of the target has no gate" in refused.stderr


@pytest.mark.parametrize("change", ["name", "size"])
def test_a_file_for_another_model_is_refused(change, pair, table, tmp_path):
    other = save_random(tmp_path / "target", tiny_llama(intermediate_size=40), seed=1)
    source = save_random(tmp_path / "source", tiny_llama(intermediate_size=40), seed=2)
    if change == "name":
        table = FactorTable({place._replace(tensor=f"x.{place.tensor}"): found for place, found in table.of.items()})
    file = saved(tmp_path / "file", table)
    refused = call("plan", write(tmp_path, (other, source), file))
    assert refused.exit_code == 4
    assert str(file) in refused.stderr
    wanted = "which the target does not have" if change == "name" else "48 x 32, but the target's tensor is [40, 32]"
    assert wanted in refused.stderr


def test_a_part_of_a_matrix_is_named_as_such(pair, table):
    target = open_checkpoint(str(pair[0]))
    tensor = target.tensors[GATE]
    models = {"target": target, "source": open_checkpoint(str(pair[1]))}
    part = Region(tensor, ((0, 8), (0, 32)))
    (fault,) = Directions.of(table).faults(
        models, [{"target": part, "source": Region(models["source"].tensors[GATE], part.box)}]
    )
    assert fault.startswith(f"{GATE}[0:8] is not one matrix")


def test_a_lock_does_not_replace_directions_that_a_search_chose(pair, table, tmp_path):
    recipe = write(tmp_path, pair, saved(tmp_path / "file", table))
    units = ("1.gate", "1.v", "2.gate", "2.v")
    write_lock(replace(make_lock(load_recipe(recipe)), units=units), recipe)
    # With the file, the lock is enough.
    assert call("run", recipe, tmp_path / "first", "--no-evaluate", "--locked").exit_code == 0
    text = recipe.read_text().replace('"layers": "1,2", "modules": "gate,v"', '"layers": "auto"')
    recipe.write_text(text.replace(f', "directions": "{tmp_path / "file" / FILE_NAME}"', ""))
    write_lock(replace(make_lock(load_recipe(recipe)), units=units), recipe)
    refused = call("run", recipe, tmp_path / "second", "--no-evaluate", "--locked")
    assert refused.exit_code == 2
    assert "not what the edit directions chose" in refused.stderr
    assert not (tmp_path / "second").exists()


def test_the_degrees_of_freedom_are_shown_beside_the_share_of_values(pair, table, repaired, tmp_path):
    report = json.loads((repaired / "dapa_report.json").read_text())
    # Three of four weights are not zero; gates of 48 x 32, and v of 16 x 32.
    assert report["directions"] == table.num_directions == 12
    assert report["degrees_of_freedom"] == 2 * 3 * (48 + 32) + 2 * 3 * (16 + 32)
    number = open_checkpoint(str(pair[0])).num_parameters
    changed = num_different(pair[0], repaired)
    assert report["share_changed"] == changed / number
    said = f"768 degrees of freedom, {100 * 768 / number:.2f} % of the parameters"
    card = (repaired / "README.md").read_text()
    moved = f", by {100 * report['size_of_change']:.2g} % of their size on average"
    assert f"That changed {100 * report['share_changed']:.2f} % of its parameters ({changed:,}){moved}; the" in card
    assert said in card
    shown = call("run", repaired / "mergekit_config.yml", tmp_path / "out", "--no-evaluate").stdout
    assert f"directions added    12 with {said}" in shown
    assert f"parameters changed  {100 * report['share_changed']:.2f} %{moved}" in shown
    older = {key: value for key, value in report.items() if key not in ("directions", "degrees_of_freedom")}
    (tmp_path / "old.json").write_text(json.dumps(older))
    assert read_report(tmp_path / "old.json").share_of_freedom is None


def test_the_size_of_a_change_is_that_of_the_edited_units_on_disk(pair, repaired):
    report = json.loads((repaired / "dapa_report.json").read_text())
    before, after = ({**weights(folder)} for folder in (pair[0], repaired))
    units = [f"layers.{unit.partition('.')[0]}." for unit in report["units"]]
    ends = tuple(f"{unit.partition('.')[2]}_proj.weight" for unit in report["units"])
    edited = [name for name in before if name.endswith(ends) and any(unit in name for unit in units)]
    moved = sum(float((after[name].double() - before[name].double()).square().sum()) for name in edited)
    size = sum(float(before[name].double().square().sum()) for name in edited)
    assert len(edited) == len(report["units"]) == 4
    assert report["size_of_change"] == pytest.approx((moved / size) ** 0.5, rel=1e-3)


def test_a_card_names_no_path_of_a_file_of_directions(pair, table, tmp_path):
    file = saved(tmp_path / "file", table)
    merge = configuration(*pair, layers="1,2", modules="gate,v", edit="directions", directions=str(file))
    run_merge(merge, str(tmp_path / "merged"), MergeOptions(quiet=True))
    # As `mergekit-yaml` does.
    shutil.copy(write(tmp_path, pair, file), tmp_path / "merged" / "mergekit_config.yml")
    written = call("card", tmp_path / "merged")
    assert written.exit_code == 0, written.stderr
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"directions: {FILE_NAME}" in card
    assert str(file) not in card
    assert "768 degrees of freedom" in card
