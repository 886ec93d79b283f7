"""A repair by directions as a small file: the directions, from which every bit is computed."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
from conftest import answer, call, change_tensor
from direction_files import made

from dapa_merge.checkpoint.open import open_checkpoint, read_bytes
from dapa_merge.errors import CheckpointError, DapaError
from dapa_merge.patch import apply as applying
from dapa_merge.patch.apply import apply_in_place
from dapa_merge.patch.file import lay_out, read_patch
from dapa_merge.plan.directions import FILE_NAME

MODULES = {"GPT2LMHeadModel": "up,k", "Phi3ForCausalLM": "gate,v"}


@pytest.fixture(scope="module")
def repair(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A base, its repair, and the patch."""
    folder = tmp_path_factory.mktemp("repair")
    base, out = made(folder, weights=(0.5,))
    answer("patch", "extract", out, folder / "repair.safetensors", "--json")
    return base, out, folder / "repair.safetensors"


def same_tensors(one: Path, other: Path) -> bool:
    first, second = open_checkpoint(str(one)), open_checkpoint(str(other))
    return all(
        read_bytes(first, tensor) == read_bytes(second, second.tensors[name]) for name, tensor in first.tensors.items()
    )


@pytest.mark.parametrize(
    "architecture", ["Phi3ForCausalLM", "MixtralForCausalLM", "Llama4ForCausalLM", "GPT2LMHeadModel"]
)
def test_rows_of_fused_projections_and_of_experts_are_computed_too(architecture, tmp_path):
    base, out = made(tmp_path, architecture, MODULES.get(architecture, "gate,down"), strength=0.7)
    patch = tmp_path / "repair.safetensors"
    found = answer("patch", "extract", out, patch, "--json")
    # Nothing but directions.
    assert read_patch(patch).num_stored_bytes == 0
    assert found["edit"]["strength"] == 0.7
    answer("patch", "apply", patch, base, tmp_path / "again", "--json")
    assert same_tensors(tmp_path / "again", out)


def test_a_patch_holds_the_directions_instead_of_rows(repair):
    _, out, path = repair
    patch = read_patch(path)
    assert patch.metadata["dapa_patch"] == "2"
    assert set(patch.contents) == {FILE_NAME}
    assert patch.contents[FILE_NAME].num_bytes == (out / FILE_NAME).stat().st_size
    assert b"".join(patch._stored(FILE_NAME)) == (out / FILE_NAME).read_bytes()
    shown = answer("patch", "show", path, "--json")
    assert {entry["tensor"] for entry in shown["entries"]} == set(
        json.loads((out / "dapa.json").read_text())["tensors"]
    )
    assert all(entry["computed"] for entry in shown["entries"])
    assert shown["edit"]["directions"] == 4
    lines = call("patch", "show", path).stdout
    assert "rows 0:48, computed" in lines
    assert "4 tensors in 4 ranges by directions" in lines


def test_a_patched_copy_is_the_result(repair, tmp_path):
    base, out, path = repair
    answer("patch", "apply", path, base, tmp_path / "copy", "--json")
    assert same_tensors(tmp_path / "copy", out)
    assert FILE_NAME not in {file.name for file in (tmp_path / "copy").iterdir()}
    refused = call("patch", "apply", path, out, tmp_path / "twice")
    assert refused.exit_code == 4
    assert "already holds what" in refused.stderr


def test_a_patch_in_place_is_the_result_and_reverts_to_every_bit(repair, tmp_path):
    base, out, path = repair
    model = shutil.copytree(base, tmp_path / "model")
    assert answer("patch", "apply", path, model, "--in-place", "--json")["applied"]
    assert same_tensors(model, out)
    assert not answer("patch", "apply", path, model, "--in-place", "--json")["applied"]
    answer("patch", "revert", model, "--json")
    for file in base.iterdir():
        assert (model / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("stop", range(4))
def test_a_patch_in_place_that_was_stopped_goes_on_or_back(repair, stop, tmp_path, monkeypatch):
    base, out, path = repair
    model = shutil.copytree(base, tmp_path / "model")
    write, done = applying.write_all, []

    def failing(file, piece):
        if len(done) == stop:
            write(file, piece[: len(piece) // 2 // 4096 * 4096])
            raise OSError(errno.EIO, "Input/output error")
        done.append(piece)
        write(file, piece)

    with monkeypatch.context() as patched:
        patched.setattr(applying, "write_all", failing)
        with pytest.raises(DapaError, match="partly written"):
            apply_in_place(read_patch(path), open_checkpoint(str(model)))
    half = shutil.copytree(model, tmp_path / "half")
    answer("patch", "apply", path, model, "--in-place", "--json")
    assert same_tensors(model, out)
    answer("patch", "revert", half, "--json")
    assert same_tensors(half, base)


def test_another_base_is_refused(repair, tmp_path):
    base, _, path = repair
    other = shutil.copytree(base, tmp_path / "other")
    change_tensor(other, "model.layers.1.mlp.gate_proj.weight", lambda tensor: tensor[0, 0].add_(1))
    for where in ((tmp_path / "out",), ("--in-place",)):
        refused = call("patch", "apply", path, other, *where)
        assert refused.exit_code == 4
        assert "holds other values in rows 0 to 48 of model.layers.1.mlp.gate_proj.weight" in refused.stderr


def test_what_the_directions_do_not_explain_is_stored_as_rows(repair, tmp_path):
    base, out, _ = repair
    changed = shutil.copytree(out, tmp_path / "changed")
    name = "model.layers.3.mlp.gate_proj.weight"
    change_tensor(changed, name, lambda tensor: tensor[5, 0].add_(1))
    change_tensor(changed, "model.layers.0.mlp.down_proj.weight", lambda tensor: tensor[3].add_(1))
    path = tmp_path / "mixed.safetensors"
    answer("patch", "extract", changed, path, "--json")
    stored = {entry["tensor"] for entry in answer("patch", "show", path, "--json")["entries"] if not entry["computed"]}
    assert stored == {name, "model.layers.0.mlp.down_proj.weight"}
    answer("patch", "apply", path, base, tmp_path / "again", "--json")
    assert same_tensors(tmp_path / "again", changed)


def test_without_its_file_of_directions_a_patch_holds_rows(repair, tmp_path):
    _, out, _ = repair
    bare = shutil.copytree(out, tmp_path / "bare")
    (bare / FILE_NAME).unlink()
    path = tmp_path / "rows.safetensors"
    extracted = call("patch", "extract", bare, path)
    assert extracted.exit_code == 0
    assert read_patch(path).metadata["dapa_patch"] == "1"
    assert read_patch(path).num_stored_bytes == read_patch(path).num_bytes


def rewritten(path: Path, new: Path, change) -> Path:
    """A patch with other metadata and directions, which `change` makes of a dictionary of both."""
    patch = read_patch(path)
    said = dict(patch.metadata)
    content = {"metadata": said, "file": b"".join(patch._stored(FILE_NAME))}
    change(content)
    header, offsets = lay_out([(FILE_NAME, "U8", (len(content["file"]),))], said)
    new.write_bytes(header + content["file"])
    assert offsets[FILE_NAME] == len(header)
    return new


def edited(content: dict, **changes: object) -> None:
    said = json.loads(content["metadata"]["edit"]) | changes
    content["metadata"]["edit"] = json.dumps({key: value for key, value in said.items() if value is not None})


DAMAGE = {
    "an older format": (lambda content: content["metadata"].update(dapa_patch="1"), "does not go with format 1"),
    "no edit": (lambda content: content["metadata"].pop("edit"), "does not go with format 2"),
    "another strength": (lambda content: edited(content, strength=9), "no strength from 0 to 2"),
    "no strength": (lambda content: edited(content, strength=None), "no strength from 0 to 2"),
    "another edit": (lambda content: edited(content, edit="copy"), "not what its files hold"),
    "an unknown edit": (lambda content: edited(content, edit="x"), "'x' is not an edit"),
    "a wrong digest": (lambda content: edited(content, directions="0" * 64), "not what its files hold"),
    "damaged directions": (lambda content: content.update(file=content["file"][:-2]), "is not a file of directions"),
    "no JSON": (lambda content: content["metadata"].update(edit="["), "damaged patch"),
    "rows of another tensor": (
        lambda content: content["metadata"].update(
            entries=content["metadata"]["entries"].replace("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
        ),
        "which the target does not have",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_patch_is_refused(case, repair, tmp_path):
    change, what = DAMAGE[case]
    path = rewritten(repair[2], tmp_path / "damaged.safetensors", change)
    with pytest.raises(CheckpointError) as raised:
        read_patch(path)
    assert what in str(raised.value)


def test_directions_that_do_not_give_the_recorded_rows_change_nothing(repair, tmp_path):
    base, _, path = repair
    damaged = rewritten(path, tmp_path / "damaged.safetensors", lambda content: edited(content, strength=0.5))
    model = shutil.copytree(base, tmp_path / "model")
    for where in ((tmp_path / "out",), ("--in-place",)):
        refused = call("patch", "apply", damaged, model, *where)
        assert refused.exit_code == 4
        assert "its bytes for 'model.layers" in refused.stderr
    assert same_tensors(model, base)
    assert not (tmp_path / "out").exists()
