from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from conftest import answer, call
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small_models import NAMES, arrays, contents, repaired, write_model

from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.patch.apply import apply_in_place, apply_to_copy
from dapa_merge.patch.extract import extract
from dapa_merge.patch.file import layout_digest, read_patch, rest_digest

SHARDS = [NAMES[:2], NAMES[2:5], NAMES[5:]]


@pytest.fixture
def base(tmp_path):
    return write_model(tmp_path / "base", arrays(), SHARDS)


@pytest.fixture
def result(tmp_path):
    return write_model(tmp_path / "result", repaired(arrays()), SHARDS)


def extracted(result: Path, base: Path, path: Path):
    return extract(open_checkpoint(str(result)), open_checkpoint(str(base)), path)


@pytest.fixture
def patch(result, base, tmp_path):
    return extracted(result, base, tmp_path / "repair.safetensors")


def tensors(folder: Path) -> dict[str, numpy.ndarray]:
    return {name: array for path in folder.glob("*.safetensors") for name, array in load_file(path).items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(numpy.array_equal(one[name], other[name]) for name in one)


def test_a_patch_holds_what_changed_and_the_safetensors_library_reads_it(patch):
    changed = repaired(arrays())
    # Experts as rows of a matrix of their last dimension.
    experts = changed["layers.0.experts"].reshape(128, 320)
    expected = {
        "embed[3:5]": changed["embed"][3:5],
        "embed[40:41]": changed["embed"][40:41],
        "layers.0.gate": changed["layers.0.gate"],
        "layers.0.gate_up[0:64]": changed["layers.0.gate_up"][:64],
        "layers.0.experts[32:48]": experts[32:48],
        "layers.0.experts[64:80]": experts[64:80],
        "norm": changed["norm"],
        "scale": changed["scale"],
    }
    assert same(load_file(patch.path), expected)


def test_every_value_in_a_patch_lies_where_its_dtype_is_aligned(patch):
    for tensor in patch.contents.values():
        assert tensor.start % (tensor.num_bytes // max(1, tensor.num_parameters)) == 0
    assert min(tensor.start for tensor in patch.contents.values()) % 8 == 0


def test_the_metadata_are_strings_that_say_where_everything_belongs(patch, base):
    with safe_open(patch.path, framework="numpy") as file:
        metadata = file.metadata()
    assert metadata["dapa_patch"] == "1"
    assert metadata["base"] == str(base)
    assert metadata["base_rest"] == rest_digest(open_checkpoint(str(base)), patch.entries)
    assert metadata["base_layout"] == layout_digest(open_checkpoint(str(base)).tensors)
    entry = next(entry for entry in json.loads(metadata["entries"]) if entry["key"] == "layers.0.experts[32:48]")
    assert (entry["tensor"], entry["dtype"], entry["shape"]) == ("layers.0.experts", "F16", [4, 32, 320])
    assert (entry["rows"], entry["num_changed"]) == ([32, 48], 16)


@pytest.mark.parametrize("shards", [None, [NAMES[4:], NAMES[:4]], [[name] for name in reversed(NAMES)]])
def test_a_patch_applies_to_any_division_of_its_base_into_files(patch, tmp_path, shards):
    other = write_model(tmp_path / "other", arrays(), shards)
    before = contents(other)
    apply_to_copy(patch, open_checkpoint(str(other)), tmp_path / "out")
    assert same(tensors(tmp_path / "out"), repaired(arrays()))
    assert contents(other) == before
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(before)


def test_a_patched_copy_is_the_result_byte_for_byte(patch, base, result, tmp_path):
    apply_to_copy(patch, open_checkpoint(str(base)), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(result)


@given(data=st.data())
def test_any_change_of_values_goes_through_a_patch(data, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("any")
    before = {"a": numpy.zeros((30, 200), numpy.uint8), "b": numpy.zeros((3, 5, 300), numpy.float16)}
    before |= {"a[0:2]": numpy.zeros((1, 4), numpy.int64)}
    after = {name: array.copy() for name, array in before.items()}
    for name, array in after.items():
        places = st.lists(st.integers(0, array.size - 1), max_size=12)
        array.reshape(-1)[data.draw(places, label=name)] = 1
    base, result = (
        write_model(tmp_path / "base", before),
        write_model(tmp_path / "result", after, [["b"], ["a", "a[0:2]"]]),
    )
    if same(before, after):
        with pytest.raises(UsageError, match="there is nothing to extract"):
            extracted(result, base, tmp_path / "patch.safetensors")
        return
    patch = extracted(result, base, tmp_path / "patch.safetensors")
    apply_to_copy(patch, open_checkpoint(str(base)), tmp_path / "out")
    assert same(tensors(tmp_path / "out"), after)


def test_a_patch_of_a_patched_model_follows_the_first(patch, base, result, tmp_path):
    further = {name: numpy.asarray(2 * array) for name, array in repaired(arrays()).items()}
    second = extracted(write_model(tmp_path / "further", further), result, tmp_path / "second.safetensors")
    apply_to_copy(patch, open_checkpoint(str(base)), tmp_path / "one")
    apply_to_copy(second, open_checkpoint(str(tmp_path / "one")), tmp_path / "two")
    assert same(tensors(tmp_path / "two"), further)
    with pytest.raises(CheckpointError, match="holds other values in rows"):
        apply_to_copy(second, open_checkpoint(str(base)), tmp_path / "three")


def test_another_base_is_refused_by_name_and_nothing_is_written(patch, tmp_path):
    changed = arrays()
    changed["layers.0.experts"][2, 3, 7] += 1
    other = open_checkpoint(str(write_model(tmp_path / "other", changed)))
    with pytest.raises(CheckpointError, match=r"other holds other values in rows 64 to 80 of layers\.0\.experts than"):
        apply_to_copy(patch, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["between the patch's rows", "a tensor that it does not change"])
def test_a_base_that_differs_where_the_patch_changes_nothing_is_refused_too(patch, base, tmp_path, where):
    changed, touched = arrays(), {entry.tensor for entry in patch.entries}
    if where == "between the patch's rows":
        changed["layers.0.experts"][3, 3, 7] += 1
    else:
        name = next(name for name, values in changed.items() if values.size and name not in touched)
        changed[name].reshape(-1)[-1] += 1
    other = open_checkpoint(str(write_model(tmp_path / "other", changed)))
    before = contents(other.folder)
    sentence = r"other has other values than the model that .*repair\.safetensors was made for, in rows that the"
    with pytest.raises(CheckpointError, match=sentence):
        apply_to_copy(patch, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match=sentence):
        apply_in_place(patch, other)
    assert contents(other.folder) == before


def test_a_base_of_other_tensors_is_refused_before_its_values_are_read(patch, tmp_path):
    for name, change, message in (
        ("more", {"more": numpy.zeros(2)}, "has other tensors, dtypes or shapes than the model that"),
        ("dtype", {"norm": numpy.zeros(160)}, r"changes 'norm' of F32 \[320\], but .* has it as F64 \[160\]"),
    ):
        other = open_checkpoint(str(write_model(tmp_path / name, {**arrays(), **change})))
        with pytest.raises(CheckpointError, match=message):
            apply_to_copy(patch, other, tmp_path / "out")
    fewer = arrays()
    del fewer["norm"]
    with pytest.raises(CheckpointError, match=r"changes 'norm', which .* does not have"):
        apply_to_copy(patch, open_checkpoint(str(write_model(tmp_path / "fewer", fewer))), tmp_path / "out")


def test_a_model_that_is_patched_already_is_refused_as_such(patch, result, tmp_path):
    with pytest.raises(CheckpointError, match=r"result already holds what .*repair\.safetensors would write"):
        apply_to_copy(patch, open_checkpoint(str(result)), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": numpy.zeros(3)}, "base has no tensor extra, which .*result has; a patch holds changed values only"),
        ({"norm": numpy.zeros(320)}, r"norm is F64 \[320\] in .*result, but F32 \[320\] in .*base; a patch holds"),
        ({"norm": numpy.zeros((1, 320), numpy.float32)}, r"norm is F32 \[1, 320\] in .*result, but F32 \[320\]"),
    ],
)
def test_a_result_of_other_tensors_is_no_patch(base, tmp_path, change, message):
    result = write_model(tmp_path / "result", {**arrays(), **change})
    with pytest.raises(CheckpointError, match=message):
        extracted(result, base, tmp_path / "patch.safetensors")
    assert not (tmp_path / "patch.safetensors").exists()


def test_an_existing_patch_is_never_written_over(result, base, tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    for name in ("precious", "link"):
        with pytest.raises(UsageError, match=f"{name} exists already; name another file or remove it"):
            extracted(result, base, tmp_path / name)
    with pytest.raises(UsageError, match="cannot be written: No such file or directory"):
        extracted(result, base, tmp_path / "nowhere" / "patch.safetensors")
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_file_that_appears_while_the_patch_is_written_is_kept(result, base, tmp_path, monkeypatch):
    path = tmp_path / "patch.safetensors"
    monkeypatch.setattr("dapa_merge.patch.extract.advance", lambda *_: path.write_text("precious"))
    one, other = open_checkpoint(str(result)), open_checkpoint(str(base))
    with pytest.raises(UsageError, match="exists already"):
        extract(one, other, path)
    assert path.read_text() == "precious"
    assert not list(tmp_path.glob(".dapa*"))


def test_many_scattered_rows_become_few_ranges(tmp_path, monkeypatch):
    monkeypatch.setattr("dapa_merge.patch.extract.MAX_TENSOR_RANGES", 10)
    before = {"a": numpy.zeros((400, 600), numpy.uint8)}
    after = {"a": before["a"].copy()}
    after["a"][::3] = 1
    base, result = write_model(tmp_path / "base", before), write_model(tmp_path / "result", after)
    patch = extracted(result, base, tmp_path / "patch.safetensors")
    assert len(patch.entries) == 10
    assert sum(entry.num_changed for entry in patch.entries) == 134
    apply_to_copy(patch, open_checkpoint(str(base)), tmp_path / "out")
    assert same(tensors(tmp_path / "out"), after)


def test_the_commands_say_what_they_did(base, result, tmp_path):
    (result / "config.json").write_text('{"model_type": "another"}')
    (result / "mergekit_config.yml").write_text(
        f"merge_method: dapa\nbase_model: {base}\nmodels:\n  - model: {result}\nparameters: {{layers: 0}}\n"
    )
    patch, out = tmp_path / "p.safetensors", tmp_path / "out"
    told = answer("patch", "extract", result, patch, "--json")
    assert (told["tensors"], told["ranges"], told["other_files"]) == (6, 8, ["config.json"])
    assert told["file_bytes"] == patch.stat().st_size
    shown = answer("patch", "show", patch, "--json")
    assert shown["recipe"] == (result / "mergekit_config.yml").read_text()
    assert shown["base"] == str(base)
    assert {entry["tensor"] for entry in shown["entries"]} == set(NAMES) - {"none", "ids"}
    assert "layers.0.experts F16 [4, 32, 320] rows 32:48" in call("patch", "show", patch).stdout
    assert answer("patch", "apply", patch, base, out, "--json")["out"] == str(out)
    assert answer("patch", "apply", patch, base, "--in-place", "--json")["applied"]
    again = call("patch", "apply", patch, base, "--in-place")
    assert (again.exit_code, "already holds what" in again.stdout) == (0, True)
    assert answer("patch", "revert", base, "--json")["bytes"] == told["bytes"]


def test_commands_that_cannot_be_meant_are_refused(base, result, patch, tmp_path):
    for arguments, message in (
        (["apply", patch.path, base], "name either a folder for the patched copy, or --in-place"),
        (["apply", patch.path, base, tmp_path / "out", "--in-place"], "name either a folder"),
        (["apply", patch.path, base, tmp_path / "out", "--undo", "x"], "--undo is only for --in-place"),
        (
            ["extract", result, tmp_path / "p"],
            "result has no mergekit_config.yml that names its base; name the base with --base",
        ),
        (["extract", "a@b@c", tmp_path / "p", "--base", base], "'a@b@c' is not a model"),
        (["revert", base], "does not exist: no patch was applied in place"),
    ):
        refused = call("patch", *arguments)
        assert refused.exit_code == 2, refused.stdout
        assert message in refused.stderr


@pytest.mark.parametrize("private", ["secret.txt", "/proc/self/environ"])
def test_a_recipe_that_is_a_link_out_of_its_folder_gets_into_no_patch(base, result, tmp_path, private):
    (tmp_path / "secret.txt").write_text("secret")
    folder = Path(shutil.copytree(result, tmp_path / "strange"))
    (folder / "mergekit_config.yml").unlink(missing_ok=True)
    (folder / "mergekit_config.yml").symlink_to(tmp_path / private)
    found = call("patch", "extract", folder, tmp_path / "p.safetensors", "--base", base)
    assert found.exit_code == 4
    assert "mergekit_config.yml" in found.stderr.splitlines()[-1]
    assert not (tmp_path / "p.safetensors").exists()


def test_a_repair_by_recipe_goes_through_a_patch(llama_pair, write_recipe, tmp_path):
    recipe = write_recipe(*llama_pair, layers='"1.gate[0:16],3.gate"')
    assert call("run", recipe, tmp_path / "result", "--no-evaluate").exit_code == 0
    told = answer("patch", "extract", tmp_path / "result", tmp_path / "p.safetensors", "--json")
    assert (told["tensors"], told["ranges"], told["other_files"]) == (2, 2, [])
    answer("patch", "apply", tmp_path / "p.safetensors", llama_pair[0], tmp_path / "copy", "--json")
    for path in (tmp_path / "result").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes()


def test_no_patch_command_loads_torch(base, result, tmp_path):
    code = (
        "import sys\nfrom dapa_merge.cli import main\n"
        "result, patch, base = sys.argv[1:]\n"
        "for command in (['extract', result, patch, '--base', base], ['apply', patch, base, '--in-place'],\n"
        "                ['revert', base], ['show', patch]):\n"
        "    main(['patch', *command], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'mergekit'} & set(sys.modules)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, result, tmp_path / "p.safetensors", base], check=True, capture_output=True
    )
    assert (tmp_path / "p.safetensors").exists()


def test_a_patch_that_is_no_patch_is_told_from_one_that_is_damaged(base, patch, tmp_path):
    save_file({"a": numpy.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="is not a patch; `dapa-merge patch extract` writes one"):
        read_patch(tmp_path / "other.safetensors")
    content = bytearray(patch.path.read_bytes())
    content[-1] ^= 1
    patch.path.write_bytes(content)
    before = contents(base)
    for place in (tmp_path / "out", "--in-place"):
        refused = call("patch", "apply", patch.path, base, place)
        assert refused.exit_code == 4
        assert "is damaged: its bytes for 'ids'" in refused.stderr or "are not the recorded ones" in refused.stderr
    assert contents(base) == before
    assert not (tmp_path / "out").exists()
    shutil.copyfile(patch.path, tmp_path / "short.safetensors")
    with (tmp_path / "short.safetensors").open("r+b") as file:
        file.truncate(len(content) - 1)
    with pytest.raises(CheckpointError, match="is truncated"):
        read_patch(tmp_path / "short.safetensors")
