"""What `dapa.json` says of a result, and what is noticed when a result is no longer so."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from blake3 import blake3
from conftest import answer, as_format_1, call, change_tensor, sha256_of
from hypothesis import given, settings
from hypothesis import strategies as st

import dapa_merge
from dapa_merge.checkpoint.open import open_checkpoint, read_bytes
from dapa_merge.errors import CheckpointError
from dapa_merge.plan.edit import Copy
from dapa_merge.plan.plan import plan_transplant
from dapa_merge.plan.selection import given_selection
from dapa_merge.transplant.manifest import read_manifest
from dapa_merge.transplant.result import transplant
from dapa_merge.verify.result import check


@pytest.fixture(scope="module")
def made(llama_pair, tmp_path_factory) -> Path:
    """A result with layers 1 and 3 from the source, and half of layer 2."""
    target, source = (open_checkpoint(str(folder)) for folder in llama_pair)
    plan = plan_transplant(target, source, ("gate",))
    half = plan.part(plan.units[2], (8, 24))
    out = tmp_path_factory.mktemp("manifest") / "out"
    transplant(plan, (plan.units[1], half, plan.units[3]), out, extras={"vocab.txt": "ours\n"})
    return out


@pytest.fixture
def result(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "result"))


def rewrite(folder: Path, change) -> None:
    path = folder / "dapa.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_it_names_the_models_every_file_and_every_changed_tensor(llama_pair, made):
    manifest = read_manifest(made)
    assert manifest.version == dapa_merge.__version__
    assert tuple(origin.model for origin in manifest.models.values()) == tuple(map(str, llama_pair))
    assert (manifest.models["target"].commit, manifest.edit) == (None, Copy())
    written = json.loads((made / "dapa.json").read_text())
    assert (written["format"], written["algorithm"], manifest.algorithm) == (2, "blake3", "blake3")
    assert manifest.units == ("1.gate", "2.gate[8:24]", "3.gate")
    assert set(manifest.files) == {path.name for path in made.iterdir()} - {"dapa.json"}
    for name, file in manifest.files.items():
        raw = (made / name).read_bytes()
        assert (file.num_bytes, file.digest) == (len(raw), blake3(raw).hexdigest())
    result = open_checkpoint(str(made))
    assert list(manifest.tensors) == [f"model.layers.{layer}.mlp.gate_proj.weight" for layer in (1, 2, 3)]
    for name, tensor in manifest.tensors.items():
        assert tensor.file == result.tensors[name].file
        assert tensor.digest == blake3(read_bytes(result, result.tensors[name])).hexdigest()
    boxes = [tensor.boxes for tensor in manifest.tensors.values()]
    assert boxes == [None, (((8, 24), (0, 32)),), None]


def test_a_result_as_it_was_made_has_no_fault(made):
    assert check(made) == []


def test_a_run_writes_it_and_its_report_is_in_it(llama_pair, tmp_path, write_recipe):
    answer("run", write_recipe(*llama_pair, layers="0-1"), tmp_path / "out", "--no-evaluate", "--json")
    assert check(tmp_path / "out") == []
    assert {"dapa_report.json", "mergekit_config.yml"} <= read_manifest(tmp_path / "out").files.keys()


def test_what_is_put_beside_a_model_later_is_no_fault(result):
    (result / "README.md").write_text("# a card")
    (result / ".gitattributes").write_text("*.safetensors filter=lfs")
    (result / ".cache" / "huggingface").mkdir(parents=True)
    (result / ".cache" / "huggingface" / "x").write_text("x")
    assert check(result) == []


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def link_elsewhere(folder: Path) -> None:
    (folder / "elsewhere").symlink_to("/")


def loop(folder: Path) -> None:
    (folder / "vocab.txt").unlink()
    (folder / "vocab.txt").symlink_to("vocab.txt")


FAULTS = {
    "missing": (lambda folder: (folder / "vocab.txt").unlink(), "vocab.txt is missing"),
    "a folder in its place": (
        lambda folder: ((folder / "vocab.txt").unlink(), (folder / "vocab.txt").mkdir()),
        "vocab.txt is missing",
    ),
    "a link to itself": (loop, "vocab.txt is missing"),
    "longer": (lambda folder: (folder / "vocab.txt").write_text("ours\n\n"), "vocab.txt has 6 bytes, not 5"),
    "another byte": (lambda folder: flip(folder / "vocab.txt"), "vocab.txt does not match its digest in dapa.json"),
    "too many": (lambda folder: (folder / "more.bin").write_bytes(b"x"), "more.bin is not in dapa.json"),
    "a link to a folder": (link_elsewhere, "elsewhere is not in dapa.json"),
}


@pytest.fixture(params=[1, 2])
def of_format(request, result) -> Path:
    """A result with a manifest of each format."""
    return as_format_1(result) if request.param == 1 else result


@pytest.mark.parametrize("case", FAULTS)
@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_every_fault_is_told(of_format, case):
    result = of_format
    assert check(result) == []
    damage, sentence = FAULTS[case]
    damage(result)
    found = check(result)
    assert found[0] == sentence if case != "a link to itself" else found


def test_a_changed_tensor_that_is_another_is_told_by_name(of_format):
    result = of_format
    name = "model.layers.2.mlp.gate_proj.weight"
    change_tensor(result, name, lambda tensor: tensor.neg_())
    file = open_checkpoint(str(result)).tensors[name].file
    says = "does not match its digest in dapa.json"
    assert check(result) == [f"{file} {says}", f"{name} {says}"]


def test_a_tensor_that_its_file_does_not_have_is_told(result):
    name = "model.layers.2.mlp.gate_proj.weight"
    rewrite(result, lambda content: content["tensors"].update(other=content["tensors"][name]))
    assert check(result) == [f"other is not in {read_manifest(result).tensors[name].file}"]


def test_a_part_that_its_tensor_does_not_have_is_told(result):
    name = "model.layers.2.mlp.gate_proj.weight"
    rewrite(result, lambda content: content["tensors"][name].update(changed=[[[0, 49], [0, 32]]]))
    assert check(result) == [f"{name} does not have the changed parts recorded in dapa.json"]


NAMES = ["../x", "/etc/passwd", "a/../../x", "", ".", "a//b", "a\\b", "C:x", "a\0b", "a\nb", "a/", "/"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leads_out_of_the_folder_is_refused(result, name):
    rewrite(result, lambda content: content["files"].update({name: {"bytes": 1, "digest": "0" * 64}}))
    with pytest.raises(CheckpointError, match=r"dapa\.json is damaged: files\..* not a path inside the folder"):
        check(result)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_folder_that_is_a_link_is_not_followed(result, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_bytes(b"x")
    (result / "sub").symlink_to(tmp_path / "secret")
    entry = {"bytes": 1, "digest": blake3(b"x").hexdigest()}
    rewrite(result, lambda content: content["files"].update({"sub/key": entry}))
    assert "sub/key is missing" in check(result)


@pytest.mark.parametrize("unknown", [3, 0, None, "2", [2], {}])
def test_another_format_is_told(result, unknown):
    rewrite(result, lambda content: content.update(format=unknown))
    with pytest.raises(CheckpointError, match=r"dapa\.json is of format .*, not one of 1, 2; install a newer"):
        read_manifest(result)


@pytest.mark.parametrize("unknown", ["md5", None, 3, ["blake3"], {}])
def test_another_algorithm_is_told(result, unknown):
    rewrite(result, lambda content: content.update(algorithm=unknown))
    with pytest.raises(CheckpointError, match=r"dapa\.json has digests by .*, not by one of blake3, sha256; install a"):
        read_manifest(result)


def test_no_manifest_is_told(result):
    (result / "dapa.json").unlink()
    with pytest.raises(CheckpointError, match=r"it has no dapa\.json"):
        read_manifest(result)


@pytest.mark.parametrize(
    ("change", "key"),
    [({"files": []}, "files"), ({"tensors": {"x": 1}}, r"tensors\.x"), ({"target": None}, "target")],
)
def test_entries_of_another_kind_are_named(result, change, key):
    rewrite(result, lambda content: content.update(change))
    with pytest.raises(CheckpointError, match=rf"dapa\.json is damaged: {key}: "):
        read_manifest(result)


def test_a_manifest_of_an_earlier_version_is_read(result):
    manifest = read_manifest(result)
    before = read_manifest(as_format_1(result))
    assert before.algorithm == "sha256"
    assert {name: file.digest for name, file in before.files.items()} == {
        name: sha256_of(result / name) for name in manifest.files
    }
    assert before.tensors.keys() == manifest.tensors.keys()
    assert [one.boxes for one in before.tensors.values()] == [one.boxes for one in manifest.tensors.values()]


def test_digests_of_one_algorithm_are_not_taken_for_those_of_another(result):
    before = json.loads((as_format_1(result) / "dapa.json").read_text())
    (result / "dapa.json").write_text(json.dumps({**before, "format": 2, "algorithm": "blake3"}))
    assert len(check(result)) == len(before["files"]) + len(before["tensors"])


def test_a_result_of_an_earlier_version_is_verified_with_and_without_its_models(llama_pair, tmp_path, write_recipe):
    out = tmp_path / "out"
    answer("run", write_recipe(*llama_pair, layers="1-2"), out, "--no-evaluate", "--json")
    as_format_1(out)
    for options in ((), ("--files-only",)):
        found = answer("verify", out, *options, "--json")
        assert (found["correct"], found["manifest"]) == (True, True)
    refused = call("verify", out, "--write-manifest")
    assert (refused.exit_code, "has a dapa.json already" in refused.stderr) == (2, True)
    # What the models do not say, only the manifest can.
    flip(out / "dapa_report.json")
    for options in ((), ("--files-only",)):
        found = json.loads(call("verify", out, *options, "--json").stdout)
        assert found["faults"] == ["dapa_report.json does not match its digest in dapa.json"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300)
@given(data=st.data())
def test_whatever_stands_in_its_place_is_refused_or_read_but_never_a_crash(made, tmp_path_factory, data):
    content = json.loads((made / "dapa.json").read_text())
    where = content
    while True:
        key = data.draw(st.sampled_from(sorted(where) if isinstance(where, dict) else range(len(where))))
        if data.draw(st.booleans()) or not isinstance(where[key], (dict, list)) or not where[key]:
            break
        where = where[key]
    where[key] = data.draw(JSON)
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "dapa.json").write_text(json.dumps(content))
    try:
        found = check(folder)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(found, list)


def test_selections_of_recipes_are_what_it_names(llama_pair, tmp_path, write_recipe):
    from dapa_merge.plan.selection import make_plan
    from dapa_merge.recipe.parse import load_recipe

    recipe = write_recipe(*llama_pair, layers="1-2")
    answer("run", recipe, tmp_path / "out", "--no-evaluate", "--json")
    parsed = load_recipe(recipe)
    assert read_manifest(tmp_path / "out").units == tuple(map(str, given_selection(parsed, make_plan(parsed))))
