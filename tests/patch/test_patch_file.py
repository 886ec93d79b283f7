"""Patch files that lie: each gives one sentence, and nothing is written."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import call
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import NAMES, arrays, contents, repaired, write_model

from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import CheckpointError
from dapa_merge.patch.apply import apply_in_place
from dapa_merge.patch.extract import extract
from dapa_merge.patch.file import read_patch
from dapa_merge.patch.undo import UNDO_NAME

DIGEST = "0" * 64


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a base, its repaired result, and the patch between them."""
    folder = tmp_path_factory.mktemp("world")
    base = write_model(folder / "base", arrays(), [NAMES[:3], NAMES[3:]])
    result = write_model(folder / "result", repaired(arrays()), [NAMES[:3], NAMES[3:]])
    extract(open_checkpoint(str(result)), open_checkpoint(str(base)), folder / "p.safetensors")
    return folder


def parts(content: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def whole(header: dict, values: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + values


def lie(world, path, change) -> None:
    """Write the patch with its header, its entries and its values as `change` leaves them."""
    header, values = parts((world / "p.safetensors").read_bytes())
    entries = json.loads(header["__metadata__"]["entries"])
    change(header, entries)
    header["__metadata__"]["entries"] = json.dumps(entries)
    path.write_bytes(whole(header, values))


def of(entries, key):
    return next(entry for entry in entries if entry["key"] == key)


LIES = {
    "rows outside the tensor": (lambda _, e: of(e, "embed[3:5]").update(rows=[59, 61]), "its tensor does not have"),
    "rows backwards": (lambda _, e: of(e, "embed[3:5]").update(rows=[5, 3]), "which its tensor does not have"),
    "no rows": (lambda _, e: of(e, "embed[3:5]").update(rows=[3, 3]), "which its tensor does not have"),
    "more rows than bytes": (lambda _, e: of(e, "embed[3:5]").update(rows=[3, 9]), "is not what its header says"),
    "negative rows": (lambda _, e: of(e, "embed[3:5]").update(rows=[-2, 0]), r"rows\.\d: Input should be"),
    "huge rows": (lambda _, e: of(e, "embed[3:5]").update(rows=[10**30, 10**30 + 2]), "which its tensor does not have"),
    "three rows": (lambda _, e: of(e, "embed[3:5]").update(rows=[3, 4, 5]), "is a damaged patch"),
    "rows that are true": (lambda _, e: of(e, "embed[3:5]").update(rows=[True, 3]), r"rows\.\d: Input should be"),
    "rows that are fractions": (lambda _, e: of(e, "embed[3:5]").update(rows=[3.0, 5.0]), r"rows\.\d: Input should be"),
    "a huge shape": (lambda _, e: of(e, "norm").update(shape=[2**70]), "is not what its header says|does not have"),
    "another shape": (lambda _, e: of(e, "norm").update(shape=[2, 160], rows=[0, 2]), "is not what its header says"),
    "another dtype": (lambda _, e: of(e, "norm").update(dtype="I32"), "is not what its header says"),
    "no dtype": (lambda _, e: of(e, "norm").update(dtype="F99"), r"dtype: .*not a dtype"),
    "a dtype that is a list": (lambda _, e: of(e, "norm").update(dtype=[]), "is a damaged patch"),
    "the same rows twice": (lambda _, e: of(e, "embed[40:41]").update(rows=[4, 5]), "has the same rows twice"),
    "the same key twice": (lambda _, e: e.append(dict(e[0])), "its entries are not those of its header"),
    "an entry too few": (lambda _, e: e.pop(), "its entries are not those of its header"),
    "no entries": (lambda _, e: e.clear(), "its entries are not those of its header"),
    "an unknown attribute": (lambda _, e: e[0].update(path="/etc/passwd"), "is a damaged patch"),
    "a digest that is none": (lambda _, e: e[0].update(new_sha256="../../x"), "new_sha256: "),
    "no change": (lambda _, e: e[0].update(new_sha256=e[0]["base_sha256"]), "does not change the rows that it says"),
    "too many changed": (lambda _, e: e[0].update(num_changed=10**9), "does not change the rows that it says"),
    "no digest of the rest": (lambda h, _: h["__metadata__"].pop("base_rest"), "base_rest"),
    "a layout that is none": (lambda h, _: h["__metadata__"].update(base_layout="x"), "base_layout: "),
    "metadata that are numbers": (lambda h, _: h["__metadata__"].update(tool=7), "does not map strings to strings"),
    "metadata that are a list": (lambda h, _: h["__metadata__"].update(base=[1]), "does not map strings to strings"),
    "another version": (lambda h, _: h["__metadata__"].update(dapa_patch="3"), "of format '3', not 1 or 2"),
    "a name that leads elsewhere": (lambda _, e: e[0].update(tensor="../../etc/passwd"), "which .*base does not have"),
    "a name of control characters": (lambda _, e: e[0].update(tensor="\x1b[2J\n"), r"changes '\\x1b\[2J\\n', which"),
    "another base": (lambda h, _: h["__metadata__"].update(base_layout=DIGEST), "has other tensors, dtypes or shapes"),
    "another old value": (lambda _, e: of(e, "norm").update(base_sha256=DIGEST), "other values in rows 0 to 1 of norm"),
    "another new value": (lambda _, e: of(e, "norm").update(new_sha256=DIGEST), "bytes for 'norm' are not the"),
    "that it is an undo file": (lambda h, _: h["__metadata__"].update(undo_of=DIGEST), "is an undo file"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_a_patch_that_lies_is_refused_in_one_sentence_and_nothing_is_written(world, tmp_path, name):
    change, message = LIES[name]
    path = tmp_path / "p.safetensors"
    lie(world, path, change)
    base = shutil.copytree(world / "base", tmp_path / "base")
    before, beside = contents(base), sorted(tmp_path.iterdir())
    for place in ("--in-place", tmp_path / "out"):
        refused = call("patch", "apply", path, base, place)
        assert refused.exit_code == 4, refused.stdout
        (sentence,) = refused.stderr.splitlines()
        assert sentence.isprintable()
        with pytest.raises(CheckpointError, match=message):
            raise CheckpointError(sentence)
    assert contents(base) == before
    assert sorted(tmp_path.iterdir()) == beside


@pytest.mark.parametrize("entries", ["[" * 100_000, "{}", "[1]", '[{"key": 1}]', "null", "9" * 10_000, "\ud800"])
def test_entries_that_are_none_are_refused(world, tmp_path, entries):
    header, values = parts((world / "p.safetensors").read_bytes())
    header["__metadata__"]["entries"] = entries
    (tmp_path / "p.safetensors").write_bytes(whole(header, values))
    with pytest.raises(CheckpointError, match=r"is a damaged patch|damaged safetensors header"):
        read_patch(tmp_path / "p.safetensors")


WORDS = st.sampled_from([*NAMES, "embed[3:5]", "F16", "F32", "U8", DIGEST, "", "../x", "1"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 200) | st.integers() | st.floats() | WORDS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)


def mutate(data, value):
    """Another value in one random place of a JSON value."""
    while isinstance(value, (dict, list)) and value and data.draw(st.integers(0, 5)):
        place = data.draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        inner = value[place]
        if not isinstance(inner, (dict, list)) or not inner or not data.draw(st.integers(0, 5)):
            value[place] = data.draw(JSON)
            return
        value = inner


@settings(max_examples=300)
@given(data=st.data())
def test_no_change_of_a_patch_file_makes_a_wrong_model(world, tmp_path_factory, data):
    content = (world / "p.safetensors").read_bytes()
    kind = data.draw(st.sampled_from(["bytes", "header", "entries"]))
    if kind == "bytes":
        damaged = bytearray(content)
        for _ in range(data.draw(st.integers(1, 3))):
            limit = data.draw(st.sampled_from([16, 4000, len(content)]))
            damaged[data.draw(st.integers(0, limit - 1))] = data.draw(st.integers(0, 255))
        damaged = damaged[: data.draw(st.sampled_from([len(content), data.draw(st.integers(0, len(content)))]))]
    else:
        header, values = parts(content)
        entries = json.loads(header["__metadata__"]["entries"])
        mutate(data, header if kind == "header" else entries)
        if kind == "entries":
            header["__metadata__"]["entries"] = json.dumps(entries)
        damaged = whole(header, values)
    folder = tmp_path_factory.mktemp("damaged")
    path, base = folder / "p.safetensors", shutil.copytree(world / "base", folder / "base")
    path.write_bytes(damaged)
    before = contents(base)
    try:
        apply_in_place(read_patch(path), open_checkpoint(str(base)))
    except CheckpointError as error:
        assert str(error).isprintable()
        assert contents(base) == before
    else:
        after = contents(base)
        del after[UNDO_NAME]
        assert after == contents(world / "result")
    finally:
        shutil.rmtree(folder)
