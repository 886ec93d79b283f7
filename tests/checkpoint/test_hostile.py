"""Files that an enemy made. What holds of any of them is tried on many; what once went wrong stands here by name."""

from __future__ import annotations

import json
import os
import sys
import tracemalloc
from pathlib import Path
from random import Random

import pytest
import warm
from conftest import prove
from hostile_checks import SOUND_INDEX, check_header, check_index, library_reads, trap_folder
from hostile_files import Object, Raw, dump, hostile_file, hostile_index, tensor, weight_file
from hostile_models import GATES, check_pair, empty, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dapa_merge.checkpoint.folder import refuse_stray_link
from dapa_merge.checkpoint.header import MAX_CONFIG_BYTES, MAX_HEADER_BYTES, MAX_INDEX_BYTES, read_header, read_json
from dapa_merge.checkpoint.open import open_checkpoint, read_bytes
from dapa_merge.errors import CheckpointError, DapaError
from dapa_merge.plan.plan import plan_transplant
from dapa_merge.transplant.result import transplant

SOUND = tensor("U8", [2], 0, 2)
randoms = st.randoms(use_true_random=False)
many = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def traps(folder) -> Path:
    trap_folder(folder / "model")
    return folder / "model"


@pytest.fixture
def model(tmp_path) -> Path:
    """A sound sharded model."""
    for seed in range(20):
        write_model(empty(tmp_path / "made") / "model", Random(seed), mutations=0)
        if (tmp_path / "made" / "model" / "one.safetensors").exists():
            break
    return tmp_path / "made" / "model"


@many
@given(random=randoms)
def test_a_mutated_header_is_refused_in_a_sentence_or_read_as_safetensors_reads_it(folder, random):
    assert check_header(folder / "t.safetensors", hostile_file(random))


@many
@given(content=st.binary(max_size=200), is_length_right=st.booleans())
def test_any_bytes_are_refused_in_a_sentence_or_read_as_safetensors_reads_them(folder, content, is_length_right):
    assert check_header(folder / "t.safetensors", weight_file(content, b"") if is_length_right else content)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@many
@given(header=json_values, num_data_bytes=st.integers(0, 9))
def test_any_json_is_refused_in_a_sentence_or_read_as_safetensors_reads_it(folder, header, num_data_bytes):
    assert check_header(folder / "t.safetensors", weight_file(json.dumps(header), bytes(num_data_bytes)))


@many
@given(random=randoms)
def test_a_mutated_index_is_refused_in_a_sentence_or_read_from_its_own_folder(traps, random):
    assert check_index(traps, hostile_index(random, SOUND_INDEX))


@settings(parent=many, max_examples=100)
@given(random=randoms)
def test_a_hostile_pair_is_refused_without_a_trace_or_transplanted_byte_for_byte(folder, random):
    assert check_pair(empty(folder / "pair"), random)


# Each was read by an earlier reader, and is refused by the safetensors library.
ONCE_READ = {
    "utf-16": dump(Object([["a", SOUND]])).encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + dump(Object([["a", SOUND]])).encode(),
    "field twice": dump(Object([["a", Object([["dtype", "I8"], *SOUND])]])).encode(),
    "NaN in an unknown field": dump(Object([["a", Object([*SOUND, ["x", Raw("NaN")]])]])).encode(),
    "200 levels": dump(Object([["a", Object([*SOUND, ["x", Raw("[" * 200 + "]" * 200)]])]])).encode(),
    "minus zero": dump(Object([["a", tensor("U8", [2], Raw("-0"), 2)]])).encode(),
    "text for a shape": dump(Object([["a", tensor("U16", "", 0, 2)]])).encode(),
    "object for a shape": dump(Object([["a", tensor("U16", Object(), 0, 2)]])).encode(),
    "product that overflows": dump(Object([["a", SOUND], ["b", tensor("U8", [2**63, 2, 0], 2, 2)]])).encode(),
    "size beyond 64 bits": dump(Object([["a", SOUND], ["b", tensor("U8", [0, 10**20], 2, 2)]])).encode(),
    "metadata of numbers": dump(Object([["__metadata__", Object([["a", 1]])], ["a", SOUND]])).encode(),
    "metadata as a list": dump(Object([["__metadata__", []], ["a", SOUND]])).encode(),
    "metadata twice": dump(Object([["__metadata__", Object()], ["__metadata__", Object()], ["a", SOUND]])).encode(),
    "half a pair": dump(Object([["__metadata__", Object([["a", Raw('"\\ud800"')]])], ["a", SOUND]])).encode(),
    "half a pair as name": dump(Object([[Raw('"\\ud800"'), SOUND]])).encode(),
    "half a pair in bytes": b'{"\xed\xa0\x80":' + dump(SOUND).encode() + b"}",
}


@pytest.mark.parametrize("case", ONCE_READ)
def test_a_header_that_only_a_lenient_reader_takes_is_refused(tmp_path, case):
    assert library_reads(weight_file(ONCE_READ[case], b"ab")) is None
    assert check_header(tmp_path / "t.safetensors", weight_file(ONCE_READ[case], b"ab")) != "read"


# The library reads these, but programs would differ about them, or a message would hide or bury something.
STRICTER = {
    "occurs twice": Object([["a", SOUND], ["a", tensor("I8", [2], 0, 2)]]),
    "is not a valid tensor name": Object([["a\x1b[2J", SOUND]]),
    "dimensions and": Object([["a", tensor("U8", [2, *[1] * 64], 0, 2)]]),
    "exactly a dtype": Object([["a", Object([*SOUND, ["strides", [1]]])]]),
}


@pytest.mark.parametrize("message", STRICTER)
def test_a_header_that_could_be_read_in_two_ways_is_refused(tmp_path, message):
    raw = weight_file(dump(STRICTER[message]), b"ab")
    assert library_reads(raw) is not None
    assert message in check_header(tmp_path / "t.safetensors", raw)


REAL = {
    "nothing": "{}",
    "spaces behind": dump(Object([["a", SOUND]])) + "     ",
    "a header of odd length": " " + dump(Object([["a", SOUND]])),
    "another order than the bytes": dump(Object([["b", tensor("U8", [1], 1, 2)], ["a", tensor("U8", [], 0, 1)]])),
    "empty tensors": dump(Object([["b", tensor("F32", [0], 0, 0)], ["a", SOUND], ["c", tensor("F32", [2, 0], 2, 2)]])),
    "half bytes": dump(Object([["a", tensor("F4", [4], 0, 2)]])),
    "metadata": dump(Object([["__metadata__", Object([["format", "pt"], ["\u00fc", "\n"]])], ["a", SOUND]])),
    "no metadata": dump(Object([["__metadata__", Raw("null")], ["a", SOUND]])),
    "names of other scripts": dump(Object([["\u6a21\u578b.\u00fc \U0001f600", SOUND]])),
    "escaped names": dump(Object([["a", Object([[Raw('"\\u0064type"'), "U8"], *SOUND[1:]])]])),
}


@pytest.mark.parametrize("case", REAL)
def test_a_header_of_unusual_but_sound_form_is_read(tmp_path, case):
    raw = weight_file(REAL[case], b"ab" if case != "nothing" else b"")
    assert check_header(tmp_path / "t.safetensors", raw) == "read"


@pytest.mark.parametrize("filler", [b"[],", b"[[]],", b"{},", b'{"":0},', b"1,"])
def test_the_largest_header_takes_at_most_forty_times_its_size(tmp_path, filler, monkeypatch):
    monkeypatch.setattr("dapa_merge.checkpoint.header.MAX_HEADER_BYTES", 400_000)
    head = b'{"a":{"dtype":"U8","shape":['
    path = tmp_path / "t.safetensors"
    path.write_bytes(weight_file(head + filler * ((399_900 - len(head)) // len(filler)) + b"0]}}", b""))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="damaged"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 16_000_000
    finally:
        tracemalloc.stop()


def sparse(path: Path, head: bytes, size: int) -> Path:
    path.write_bytes(head)
    os.truncate(path, size)
    return path


def test_a_header_beyond_the_limit_is_not_even_read(tmp_path):
    path = sparse(tmp_path / "t.safetensors", (MAX_HEADER_BYTES + 1).to_bytes(8, "little"), 1 << 40)
    with pytest.raises(CheckpointError, match="has a header of 16 MB, but at most 16 MB are read; save it again"):
        read_header(path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_text_of_a_gigabyte_is_refused(model, name):
    sparse(model / name, b"{", 1 << 30)
    with pytest.raises(CheckpointError, match=rf"cannot read .*{name}: It is larger than (8|32) MB"):
        open_checkpoint(str(model))
    assert (MAX_CONFIG_BYTES, MAX_INDEX_BYTES) == (8_000_000, 32_000_000)


@pytest.mark.parametrize("depth", [51, 900, *range(940, 1001, 4), 100_000])
@pytest.mark.parametrize("key", ["architectures", "num_hidden_layers", "quantization_config", "model_type"])
def test_a_deep_config_is_refused_in_a_sentence(model, key, depth):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config)[:-1] + f',"{key}":' + "[" * depth + "]" * depth + "}")
    with pytest.raises(CheckpointError, match=r"config\.json (has lists or objects|is not JSON)") as caught:
        open_checkpoint(str(model))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "one.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop", "nothing"])
def test_what_is_no_file_is_named_and_never_waited_for(model, name, kind):
    path = model / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path.name, "nothing": "gone"}[kind])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(model))
    assert name in str(caught.value)


def test_a_shard_that_became_a_pipe_is_not_waited_for(model):
    checkpoint = open_checkpoint(str(model))
    (model / "one.safetensors").unlink()
    os.mkfifo(model / "one.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot read .*one\.safetensors: It is a pipe, not a file"):
        read_bytes(checkpoint, next(t for t in checkpoint.tensors.values() if t.file == "one.safetensors"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_small_file_that_leads_out_of_its_folder_is_refused(model, name):
    (model / name).rename(model.parent / "elsewhere.json")
    (model / name).symlink_to("../elsewhere.json")
    with pytest.raises(CheckpointError, match=rf"{name} is a link that leads out of its folder, to .*elsewhere"):
        open_checkpoint(str(model))


def test_links_within_a_folder_and_from_a_snapshot_to_its_blobs_are_followed(model, tmp_path):
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "again.json").symlink_to("config.json")
    (tmp_path / "named").symlink_to(snapshot)
    assert open_checkpoint(str(tmp_path / "named")).tensors == open_checkpoint(str(snapshot)).tensors
    assert read_json(snapshot / "again.json") == read_json(snapshot / "config.json")


@pytest.mark.parametrize("where", ["../../blobs/key", "../../other/key", "/etc/hostname", "../key"])
def test_a_snapshot_leads_nowhere_but_to_its_own_blobs(tmp_path, where):
    """Also not where the folder of the blobs is a link itself, as it can be in an archive."""
    snapshot = tmp_path / "cache" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("{}")
    (tmp_path / "cache" / "blobs").symlink_to("../private")
    (snapshot / "key.json").symlink_to(where)
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        refuse_stray_link(snapshot / "key.json", snapshot)


def test_a_weight_file_may_lie_on_another_disk(model):
    (model / "one.safetensors").rename(model.parent / "elsewhere")
    (model / "one.safetensors").symlink_to(model.parent / "elsewhere")
    checkpoint = open_checkpoint(str(model))
    assert read_bytes(checkpoint, next(t for t in checkpoint.tensors.values() if t.file == "one.safetensors"))


def test_a_name_in_a_message_cannot_move_the_cursor():
    assert str(DapaError("lacks \x1b[2J\n\u202eevil\ud800")) == "lacks \\x1b[2J\\n\\u202eevil\\ud800"
    assert len(str(CheckpointError("x" * 10_000_000))) < 2100


def test_an_index_that_says_a_tensor_twice_is_refused(traps):
    raw = b'{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}'
    assert check_index(traps, raw) == "occurs twice"


@pytest.mark.parametrize("changed", ["target", "source"])
@pytest.mark.parametrize("moment", ["before it is copied", "before it is proved"])
def test_a_file_that_is_replaced_meanwhile_gives_no_wrong_result(tmp_path, changed, moment):
    """Of the same size, with the names of two gates exchanged, so that only their places tell."""
    for member, seed in (("target", 1), ("source", 2)):
        names = [*GATES, "model.norm.weight"]
        write_gates(tmp_path / member, names, seed)
    plan = plan_transplant(*(open_checkpoint(str(tmp_path / member)) for member in ("target", "source")), ("gate",))

    def replace() -> None:
        write_gates(tmp_path / changed, [*reversed(GATES), "model.norm.weight"], 3)

    def check(made: Path) -> None:
        if moment == "before it is proved":
            replace()
        prove(made, plan, plan.units)

    if moment == "before it is copied":
        replace()
    before = sorted(tmp_path.iterdir())
    try:
        transplant(plan, plan.units, tmp_path / "out", finish=check)
    except DapaError:
        assert sorted(tmp_path.iterdir()) == before
    else:
        # It is still one of the states that the files were in: the source's gates by the places of its first header.
        prove(tmp_path / "out", plan, plan.units)


def write_gates(folder: Path, gates: list[str], seed: int) -> None:
    """A Llama of gates (and what has to stand beside them), in the given order."""
    folder.mkdir(exist_ok=True)
    beside = [gate.replace("gate", part) for gate in GATES for part in ("up", "down")]
    header = Object([name, tensor("BF16", [1], 2 * i, 2 * i + 2)] for i, name in enumerate([*gates, *beside]))
    data = bytes(Random(seed).randrange(64) for _ in range(2 * len(header)))
    (folder / "new").write_bytes(weight_file(dump(header), data))
    (folder / "new").rename(folder / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))


WATCHED = """
import os, sys
# Python would write its own files of modules that nobody has loaded before.
sys.dont_write_bytecode = True
sys.path[:0] = sys.argv[1:]
from pathlib import Path
from random import Random
from hostile_checks import SOUND_INDEX, check_index, trap_folder
from hostile_files import hostile_index
from hostile_models import check_pair, empty
import dapa_merge.verify.tensors, importlib.resources, torch

own = os.getcwd()
trap_folder(Path(own, "model"))
check_pair(empty(Path(own, "pair")), Random(0))
allowed = (own + os.sep, os.path.realpath(sys.prefix) + os.sep, os.path.realpath(sys.base_prefix) + os.sep)
touched, seen = set(), 0

def watch(event, arguments):
    global seen
    paths = arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]
    if event in ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link",
                 "os.symlink", "os.truncate", "os.chmod"):
        for path in paths:
            if isinstance(path, (str, bytes)):
                seen += 1
                real = os.path.realpath(os.fsdecode(path))
                writes = event != "open" and event not in ("os.listdir", "os.scandir")
                if event == "open":
                    mode, flags = arguments[1:3]
                    writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
                if real != own and not real.startswith(allowed[:1] if writes else allowed):
                    touched.add((event, real))

sys.addaudithook(watch)
for seed in range(40):
    assert check_pair(empty(Path(own, "pair")), Random(seed))
for seed in range(100):
    assert check_index(Path(own, "model"), hostile_index(Random(seed), SOUND_INDEX))
print(seen, sorted(touched))
"""


def test_nothing_outside_the_folders_is_opened_made_or_removed(tmp_path, monkeypatch):
    """As the interpreter's own audit sees it; other than the files of Python and its packages, which are only read."""
    tests = Path(__file__).parent.parent
    monkeypatch.chdir(empty(tmp_path / "own"))
    done = warm.run([sys.executable, "-c", WATCHED, tests, tests.parent])
    assert done.returncode == 0, done.stderr
    number, touched = done.stdout.split(maxsplit=1)
    assert int(number) > 1000
    assert touched.strip() == "[]"
