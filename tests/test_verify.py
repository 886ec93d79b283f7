"""`dapa-merge verify`: against target and source, against `dapa.json`, and by somebody who has other paths."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import answer, call, configuration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from dapa_merge.checkpoint.open import open_checkpoint

GATE = "model.layers.2.mlp.gate_proj.weight"


@pytest.fixture
def result(llama_pair, tmp_path, write_recipe):
    target, source = (shutil.copytree(folder, tmp_path / folder.name) for folder in llama_pair)
    answer("run", write_recipe(target, source, layers='"1-2"'), tmp_path / "out", "--no-evaluate", "--json")
    return tmp_path / "out"


def flip(out, name):
    tensor = open_checkpoint(str(out)).tensors[name]
    with (out / tensor.file).open("r+b") as file:
        file.seek(tensor.start)
        byte = file.read(1)[0]
        file.seek(tensor.start)
        file.write(bytes([byte ^ 1]))


def test_everything_that_is_not_the_targets_is_named(result):
    found = answer("verify", result, "--json")
    assert found["changed"] == dict.fromkeys((GATE.replace("2", "1"), GATE), "source")
    assert (found["correct"], found["manifest"], found["notes"]) == (True, True, [])
    shown = call("verify", result)
    assert "correct: 39 tensors compared; from the source: gate of layers 1-2" in shown.stdout
    assert "correct: the files and dapa.json" in shown.stdout


def test_a_published_result_is_proved_with_models_that_are_elsewhere(result, tmp_path):
    published = result.rename(tmp_path / "published")
    for name in ("target", "source"):
        (tmp_path / name).rename(tmp_path / f"my {name}")
    assert call("verify", published).exit_code != 0
    models = ("--target", tmp_path / "my target", "--source", tmp_path / "my source")
    assert answer("verify", published, *models, "--json")["correct"]
    # The two in each other's place.
    swapped = call("verify", published, "--target", models[3], "--source", models[1], "--json")
    assert swapped.exit_code == 4
    assert "unexplained" in json.loads(swapped.stdout)["num_changed"]


@pytest.mark.parametrize("name", ["model.norm.weight", GATE])
def test_a_flipped_bit_is_found_with_and_without_the_models(result, name):
    flip(result, name)
    whole = json.loads(call("verify", result, "--json").stdout)
    assert whole["changed"][f"{name}[0:1]" if name == GATE else name] == "unexplained"
    alone = call("verify", result, "--files-only")
    assert alone.exit_code == 4
    assert "does not match its digest in dapa.json" in alone.stdout


def test_small_files_count_too(result):
    (result / "generation_config.json").write_text("{}")
    found = call("verify", result)
    assert found.exit_code == 4
    assert "generation_config.json has 2 bytes, not" in found.stdout
    assert "note: generation_config.json is not the target's, byte for byte" in found.stdout


def test_a_file_too_many_is_named_and_a_card_is_none(result):
    (result / "README.md").write_text("a card")
    assert answer("verify", result, "--files-only", "--json")["correct"]
    (result / "extra.safetensors").write_bytes(b"")
    found = call("verify", result, "--files-only")
    assert found.exit_code == 4
    assert "extra.safetensors is not in dapa.json" in found.stdout


@pytest.mark.parametrize("options", [(), ("--files-only",)])
def test_a_link_that_a_push_would_refuse_is_noted(result, tmp_path, options):
    (tmp_path / "private").write_text("secret")
    (result / "notes.md").symlink_to(tmp_path / "private")
    (result / "more.md").symlink_to("nowhere")
    told = answer("verify", result, *options, "--json")
    assert told["correct"]
    assert any("notes.md is a link that leads out of its folder" in note for note in told["notes"])
    assert any("`push` refuses more.md" in note for note in told["notes"])


def test_files_only_needs_no_model_and_no_torch(result, tmp_path):
    import subprocess
    import sys

    shutil.rmtree(tmp_path / "target")
    shutil.rmtree(tmp_path / "source")
    code = (
        "import sys; from dapa_merge.cli import main\n"
        f"try: main(['verify', {str(result)!r}, '--files-only'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_with_named_layers_loads_no_torch(llama_pair, tmp_path, write_recipe):
    import subprocess
    import sys

    recipe = write_recipe(*llama_pair, layers=1)
    for command in (["run", str(recipe), str(tmp_path / "out"), "--no-evaluate"], ["verify", str(tmp_path / "out")]):
        code = (
            "import sys; from dapa_merge.cli import main\n"
            f"try: main({command!r})\n"
            "except SystemExit as stop: assert not stop.code\n"
            "assert 'torch' not in sys.modules, 'torch'"
        )
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_what_mergekit_wrote_is_correct_without_a_manifest(llama_pair, tmp_path, write_recipe):
    run_merge(configuration(*llama_pair, layers="1-2"), str(tmp_path / "out"), MergeOptions(quiet=True))
    found = answer("verify", tmp_path / "out", "--recipe", write_recipe(*llama_pair, layers='"1-2"'), "--json")
    assert (found["correct"], found["manifest"]) == (True, False)
    refused = call("verify", tmp_path / "out", "--files-only")
    assert refused.exit_code == 4
    assert "has no dapa.json" in refused.stderr


def test_a_blend_is_replayed_and_verified_as_one(llama_pair, tmp_path, write_recipe):
    recipe = write_recipe(*llama_pair, layers=2, strength=0.25)
    answer("run", recipe, tmp_path / "out", "--no-evaluate", "--json")
    assert json.loads((tmp_path / "out" / "dapa.json").read_text())["strength"] == 0.25
    found = answer("verify", tmp_path / "out", "--json")
    assert found["changed"] == {GATE: "blend"}
    answer("run", tmp_path / "out" / "mergekit_config.yml", tmp_path / "again", "--no-evaluate", "--json")
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_options_that_exclude_each_other_are_refused(result):
    refused = call("verify", result, "--files-only", "--target", "x")
    assert refused.exit_code == 2
    assert "--files-only reads no recipe and no other model" in refused.stderr


def test_a_result_without_a_manifest_is_as_good_and_can_be_given_one(llama_pair, tmp_path, write_recipe):
    recipe = write_recipe(*llama_pair, layers=1)
    for name, options in (("with", ()), ("without", ("--no-manifest",))):
        answer("run", recipe, tmp_path / name, "--no-evaluate", *options, "--json")
    assert not (tmp_path / "without" / "dapa.json").exists()
    assert not answer("verify", tmp_path / "without", "--json")["manifest"]
    assert answer("verify", tmp_path / "without", "--write-manifest", "--json")["manifest"]
    one, other = (json.loads((tmp_path / name / "dapa.json").read_text()) for name in ("with", "without"))
    for content in (one, other):
        # Has the time in it.
        del content["files"]["dapa_report.json"]
    assert one == other
    assert answer("verify", tmp_path / "without", "--files-only", "--json")["correct"]
    again = call("verify", tmp_path / "without", "--write-manifest")
    assert again.exit_code == 2
    assert "has a dapa.json already" in again.stderr


def test_a_wrong_result_gets_no_manifest(result):
    (result / "dapa.json").unlink()
    flip(result, GATE)
    assert call("verify", result, "--write-manifest").exit_code == 4
    assert not (result / "dapa.json").exists()


def test_a_result_of_mergekits_can_be_given_a_manifest(llama_pair, tmp_path, write_recipe):
    run_merge(configuration(*llama_pair, layers="1-2"), str(tmp_path / "out"), MergeOptions(quiet=True))
    recipe = write_recipe(*llama_pair, layers='"1-2"')
    answer("verify", tmp_path / "out", "--recipe", recipe, "--write-manifest", "--json")
    found = answer("verify", tmp_path / "out", "--recipe", recipe, "--json")
    assert (found["correct"], found["manifest"]) == (True, True)


BESIDE = {
    "adapter_config.json": "adapter_config.json beside its own weights",
    "pytorch_model.bin": "pytorch_model.bin holds other weights",
    "zzz.safetensors": "zzz.safetensors holds other weights",
    "modeling_x.py": "modeling_x.py is code that the target does not have",
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_would_be_loaded_besides_is_a_fault_and_gets_no_manifest(result, name):
    (result / "dapa.json").unlink()
    (result / name).write_text("{}")
    for options in ((), ("--write-manifest",)):
        found = call("verify", result, *options)
        assert found.exit_code == 4
        assert BESIDE[name] in found.output
    assert not (result / "dapa.json").exists()


def test_the_undo_file_of_a_patch_is_not_taken_for_weights(result):
    (result / "dapa.json").unlink()
    (result / ".dapa-undo.safetensors").write_bytes(b"x")
    assert answer("verify", result, "--json")["correct"]


def test_a_config_that_loads_other_code_is_a_fault_and_other_keys_are_named(result):
    (result / "dapa.json").unlink()
    config = json.loads((result / "config.json").read_text())
    (result / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True, "x": 1}))
    found = answer("verify", result, "--json")
    assert (found["correct"], found["notes"]) == (
        True, ["config.json is not the target's, byte for byte; it differs in tie_word_embeddings, x"]
    )  # fmt: skip
    (result / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModel": "a/b--c.D", "AutoConfig": [None]}})
    )
    found = call("verify", result)
    assert found.exit_code == 4
    assert "config.json names code that the target's does not: a/b--c.D" in found.stdout
    target = result.parent / json.loads((result / "dapa_report.json").read_text())["target"]
    for named in ("c.D", f"{target}--c.D"):
        (result / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": named}}))
        (target / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "c.D"}}))
        assert answer("verify", result, "--json")["correct"]


def test_a_blend_is_called_one(llama_pair, tmp_path, write_recipe):
    recipe = write_recipe(*llama_pair, layers=1, strength=0.5)
    answer("run", recipe, tmp_path / "out", "--no-evaluate", "--json")
    assert "tensors compared; a blend with the source: gate of layer 1\n" in call("verify", tmp_path / "out").stdout


LIES = {
    "another strength": (
        lambda content: content.update(strength=0.5),
        "says strength 0.5, but the recipe",
    ),
    "other units": (lambda content: content.update(units=["0.gate"]), "says that gate of layer 0 was edited"),
    "units that are none": (lambda content: content.update(units=["banana"]), "says that banana was edited"),
    "a tensor that was not changed": (
        lambda content: content["tensors"].update({"model.norm.weight": next(iter(content["tensors"].values()))}),
        "says that model.norm.weight was changed, but it is the target's",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_says_what_was_not_done_is_wrong(result, lie):
    content = json.loads((result / "dapa.json").read_text())
    LIES[lie][0](content)
    (result / "dapa.json").write_text(json.dumps(content))
    found = call("verify", result)
    assert found.exit_code == 4
    assert LIES[lie][1] in found.stdout


def test_a_result_is_not_its_own_target(result):
    refused = call("verify", result, "--target", result)
    assert refused.exit_code == 2
    assert "is the target or the source itself" in refused.stderr


def test_a_result_inside_its_target_is_refused(llama_pair, tmp_path, write_recipe):
    target = shutil.copytree(llama_pair[0], tmp_path / "target")
    refused = call("run", write_recipe(target, llama_pair[1], layers=1), target / "out", "--no-evaluate")
    assert refused.exit_code == 2
    assert "is inside the target's own folder; name a place next to it" in refused.stderr


def test_an_index_that_names_the_wrong_shard_is_refused(result):
    (result / "dapa.json").unlink()
    index = result / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = min(content["weight_map"])
    owners = content["weight_map"]
    owners[name] = next(file for file in owners.values() if file != owners[name])
    index.write_text(json.dumps(content))
    assert call("verify", result).exit_code == 4
