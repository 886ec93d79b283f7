from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import warm
from click.testing import Result
from conftest import call, change_tensor, prove, save_random, tiny_llama
from safetensors.torch import load_file, save_file

from dapa_merge.checkpoint.open import open_checkpoint, read_bytes
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.plan.plan import plan_transplant
from dapa_merge.transplant.result import transplant
from dapa_merge.transplant.staging import finished_files
from dapa_merge.verify.tensors import verify


def plan_of(pair, modules=("gate",)):
    target, source = (open_checkpoint(str(folder)) for folder in pair)
    return plan_transplant(target, source, modules)


def units_of_layers(plan, layers):
    return tuple(unit for unit in plan.units if unit.layer in layers)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def test_selected_tensors_are_the_sources_and_all_others_the_targets(llama_pair, tmp_path):
    plan = plan_of(llama_pair)
    transplant(plan, units_of_layers(plan, {1, 3}), tmp_path / "out")
    target, source, out = tensors(llama_pair[0]), tensors(llama_pair[1]), tensors(tmp_path / "out")
    assert out.keys() == target.keys()
    gates = {f"model.layers.{layer}.mlp.gate_proj.weight" for layer in (1, 3)}
    for name, tensor in out.items():
        assert torch.equal(tensor, (source if name in gates else target)[name]), name


def test_everything_but_the_selected_bytes_is_the_targets_own(llama_pair, tmp_path):
    plan = plan_of(llama_pair)
    selection = units_of_layers(plan, {2})
    transplant(plan, selection, tmp_path / "out")
    before, after = contents(llama_pair[0]), contents(tmp_path / "out")
    assert {*before, "dapa.json"} == after.keys()
    (gate,) = (regions["target"].tensor for regions in plan.regions(selection))
    changed = [name for name in before if before[name] != after[name]]
    assert changed == [gate.file]
    assert before[gate.file][: gate.start] == after[gate.file][: gate.start]
    assert before[gate.file][gate.stop :] == after[gate.file][gate.stop :]


def test_the_small_files_come_from_the_target_and_other_weights_do_not(llama_pair, tmp_path):
    target = shutil.copytree(llama_pair[0], tmp_path / "target")
    (target / "chat_template.jinja").write_text("the target's template")
    for name in (
        "pytorch_model.bin",
        "model.gguf",
        "README.md",
        "consolidated.safetensors",
        "optimizer.pt",
        "dapa.json",
        "dapa_search.png",
        "dapa_figures.svg",
    ):
        (target / name).write_bytes(b"not to be copied")
    (target / "checkpoint-1").mkdir()
    plan = plan_of((target, llama_pair[1]))
    transplant(plan, plan.units, tmp_path / "out", extras={"note.txt": "ours", "picture.png": b"\x89PNG\xff"})
    out = contents(tmp_path / "out")
    assert out["chat_template.jinja"] == b"the target's template"
    assert out["note.txt"] == b"ours"
    assert out["picture.png"] == b"\x89PNG\xff"
    assert set(out) == {*contents(llama_pair[0]), "note.txt", "picture.png", "dapa.json"}


def test_what_stays_behind_is_named_and_clutter_is_not(llama_pair, tmp_path, caplog):
    target = shutil.copytree(llama_pair[0], tmp_path / "target")
    for name in ("id_rsa", "train.jsonl", "._config.json", "desktop.ini", "README.md", "dapa_report.json", "LICENSE"):
        (target / name).write_text("{}")
    (target / "runs").mkdir()
    plan = plan_of((target, llama_pair[1]))
    with caplog.at_level("INFO", "dapa_merge"):
        transplant(plan, plan.units, tmp_path / "out")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith(": id_rsa, runs/, train.jsonl")
    assert set(contents(tmp_path / "out")) == {*contents(llama_pair[0]), "LICENSE", "dapa.json"}


@pytest.mark.parametrize("name", ["adapter_config.json", "shard-00001-model-00001-of-00001.safetensors"])
def test_a_result_that_would_be_loaded_otherwise_does_not_appear(llama_pair, tmp_path, name):
    plan = plan_of(llama_pair)
    with pytest.raises(CheckpointError, match=rf"out would not be loaded as it was written.*{name}"):
        transplant(plan, plan.units, tmp_path / "out", extras={name: "{}"})
    assert not any(tmp_path.iterdir())


def test_a_target_of_links_is_read_and_its_blobs_stay_as_they_are(llama_pair, tmp_path):
    """A Hub cache is a folder of links to shared blobs."""
    blobs = shutil.copytree(llama_pair[0], tmp_path / "models--some--model" / "blobs")
    snapshot = tmp_path / "models--some--model" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
        path.chmod(0o444)
    before = contents(blobs)
    plan = plan_of((snapshot, llama_pair[1]))
    transplant(plan, plan.units, tmp_path / "out", finish=lambda folder: prove(folder, plan, plan.units))
    assert contents(blobs) == before
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", ["file", "full folder", "link"])
def test_an_existing_result_is_never_touched(llama_pair, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("precious")
    elif kind == "full folder":
        out.mkdir()
        (out / "precious").write_text("precious")
    else:
        out.symlink_to(tmp_path / "nowhere")
    plan = plan_of(llama_pair)
    for name in ("out/..", "out/../out", "none/../out"):
        with pytest.raises(UsageError, match=f"{name} exists already; name another folder or remove it"):
            transplant(plan, plan.units, tmp_path / name)
    with pytest.raises(UsageError, match="out exists already; name another folder or remove it"):
        transplant(plan, plan.units, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_may_be_filled(llama_pair, tmp_path):
    (tmp_path / "out").mkdir()
    plan = plan_of(llama_pair)
    transplant(plan, plan.units, tmp_path / "out")
    assert verify(tmp_path / "out", plan).holds


def test_a_result_that_appears_meanwhile_is_not_replaced(llama_pair, tmp_path):
    plan = plan_of(llama_pair)
    out = tmp_path / "out"

    def another_run_finishes(_folder):
        out.mkdir()
        (out / "precious").write_text("precious")

    with pytest.raises(UsageError, match="out was created by another program"):
        transplant(plan, plan.units, out, finish=another_run_finishes)
    assert contents(out) == {"precious": b"precious"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_check_leaves_nothing(llama_pair, tmp_path):
    plan = plan_of(llama_pair)

    def fail(folder):
        raise CheckpointError("not what it should be")

    with pytest.raises(CheckpointError):
        transplant(plan, plan.units, tmp_path / "out", finish=fail)
    assert list(tmp_path.iterdir()) == []


def test_the_proof_notices_one_flipped_bit(llama_pair, tmp_path):
    plan = plan_of(llama_pair)
    out = tmp_path / "out"
    selection = units_of_layers(plan, {0})
    transplant(plan, selection, out)
    tensor = open_checkpoint(str(out)).tensors["model.norm.weight"]
    with (out / tensor.file).open("r+b") as file:
        file.seek(tensor.stop - 1)
        byte = file.read(1)
        file.seek(tensor.stop - 1)
        file.write(bytes([byte[0] ^ 1]))
    assert verify(out, plan).differences == (("model.norm.weight", "differs from the target"),)
    with pytest.raises(CheckpointError, match=r"is wrong: model\.norm\.weight differs from the target"):
        prove(out, plan, selection)


def test_the_proof_notices_a_gate_that_is_neither(llama_pair, tmp_path):
    plan = plan_of(llama_pair)
    out = tmp_path / "out"
    transplant(plan, units_of_layers(plan, {0}), out)
    tensor = open_checkpoint(str(out)).tensors["model.layers.0.mlp.gate_proj.weight"]
    with (out / tensor.file).open("r+b") as file:
        file.seek(tensor.start)
        file.write(bytes(8))
    assert verify(out, plan).differences == ((f"{tensor.name}[0:1]", "is neither the target's nor the source's"),)


def test_the_proof_notices_another_selection(llama_pair, tmp_path):
    plan = plan_of(llama_pair)
    transplant(plan, units_of_layers(plan, {0, 1}), tmp_path / "out")
    verification = verify(tmp_path / "out", plan)
    assert verification.holds
    assert [unit.layer for unit in verification.transplanted] == [0, 1]
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.gate_proj\.weight differs from the target"):
        prove(tmp_path / "out", plan, units_of_layers(plan, {0}))
    with pytest.raises(CheckpointError, match="not those that were selected"):
        prove(tmp_path / "out", plan, units_of_layers(plan, {0, 1, 2}))


def test_the_proof_reports_missing_and_additional_tensors(llama_pair, tmp_path):
    plan = plan_of(llama_pair)
    out = shutil.copytree(llama_pair[0], tmp_path / "out")
    for path in out.glob("model*.safetensors*"):
        path.unlink()
    kept = tensors(llama_pair[0])
    kept["extra"] = torch.ones(1)
    kept["model.norm.weight"] = kept["model.norm.weight"].float()
    del kept["lm_head.weight"]
    save_file(kept, out / "model.safetensors")
    shape = list(kept["model.norm.weight"].shape)
    assert verify(out, plan).differences == (
        ("extra", "is in the result but not in the target"),
        ("lm_head.weight", "is missing"),
        ("model.norm.weight", f"is F32 {shape}, not BF16 {shape}"),
    )


def test_units_that_are_alike_in_both_models_prove_nothing_and_disturb_nothing(llama_pair, tmp_path):
    source = shutil.copytree(llama_pair[0], tmp_path / "twin")
    plan = plan_of((llama_pair[0], source))
    transplant(plan, plan.units, tmp_path / "out", finish=lambda folder: prove(folder, plan, plan.units))
    verification = verify(tmp_path / "out", plan)
    assert verification.transplanted == ()
    assert verification.alike == plan.units


@pytest.mark.parametrize("dtypes", [("float16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")])
def test_a_source_of_another_dtype_is_rounded_as_torch_does(tmp_path, dtypes):
    target_dtype, source_dtype = (getattr(torch, name) for name in dtypes)
    target = save_random(tmp_path / "target", tiny_llama(), seed=1, dtype=target_dtype)
    source = save_random(tmp_path / "source", tiny_llama(), seed=2, dtype=source_dtype)
    plan = plan_of((target, source))
    transplant(plan, plan.units, tmp_path / "out", finish=lambda folder: prove(folder, plan, plan.units))
    name = "model.layers.2.mlp.gate_proj.weight"
    assert torch.equal(tensors(tmp_path / "out")[name], tensors(source)[name].to(target_dtype))


def test_a_value_that_the_targets_dtype_cannot_hold_is_refused(tmp_path):
    target = save_random(tmp_path / "target", tiny_llama(), seed=1, dtype=torch.float16)
    source = save_random(tmp_path / "source", tiny_llama(), seed=2)
    name = "model.layers.0.mlp.gate_proj.weight"
    change_tensor(source, name, lambda tensor: tensor[0, 0].fill_(1e6))
    plan = plan_of((target, source))
    with pytest.raises(
        CheckpointError,
        match=r"gate_proj\.weight of the source .* that F16, the target's dtype, cannot hold: at least 1",
    ):
        transplant(plan, plan.units, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_shard_that_shrinks_while_it_is_copied_is_noticed(llama_pair, tmp_path):
    target = shutil.copytree(llama_pair[0], tmp_path / "target")
    plan = plan_of((target, llama_pair[1]))
    with (target / plan.target.shards[0]).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError):
        transplant(plan, plan.units, tmp_path / "out", finish=lambda folder: prove(folder, plan, plan.units))
    assert not (tmp_path / "out").exists()


MISMATCHES = {
    "another architecture": ("MistralConfig", {}, "is a MistralForCausalLM but the target .* is a LlamaForCausalLM"),
    "more layers": ("LlamaConfig", {"num_hidden_layers": 5}, "has 5 layers but the target .* has 4"),
    "another size": ("LlamaConfig", {"intermediate_size": 64}, r"is \[64, 32\] in the source .* but \[48, 32\]"),
    "biases": ("LlamaConfig", {"mlp_bias": True}, r"only one of .* has tensor model\.layers\.0\.mlp\.gate_proj\.bias"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_a_source_that_does_not_fit_is_refused(llama_pair, tmp_path, case):
    import transformers

    class_name, changes, message = MISMATCHES[case]
    shape = {**tiny_llama().to_dict(), **changes}
    for key in ("model_type", "architectures", "rope_parameters"):
        shape.pop(key, None)
    source = save_random(tmp_path / "source", getattr(transformers, class_name)(**shape), seed=3)
    with pytest.raises(CheckpointError, match=message):
        plan_of((llama_pair[0], source))


def test_a_quantized_model_is_refused(llama_pair, tmp_path):
    target = shutil.copytree(llama_pair[0], tmp_path / "target")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match=r"is quantized \(gptq\)"):
        plan_of((target, llama_pair[1]))


def test_a_missing_gate_is_named(llama_pair, tmp_path):
    source = shutil.copytree(llama_pair[1], tmp_path / "source")
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = "model.layers.2.mlp.gate_proj.weight"
    shard = source / content["weight_map"].pop(name)
    index.write_text(json.dumps(content))
    remaining = load_file(shard)
    del remaining[name]
    save_file(remaining, shard)
    with pytest.raises(CheckpointError, match=r"lacks tensor model\.layers\.2\.mlp\.gate_proj\.weight"):
        plan_of((llama_pair[0], source))


# Real processes, killed for real.

# A job in the background of a script is started with SIGINT ignored, and hands that down.
SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from dapa_merge.cli import main
main(["run", sys.argv[1], sys.argv[2], "--no-evaluate"])
"""


@pytest.fixture(scope="module")
def large_pair(tmp_path_factory):
    """A target large enough to be caught in the middle of its copy: 150 MB of embeddings."""
    folder = tmp_path_factory.mktemp("large")
    pair = []
    for seed, name in enumerate(("target", "source")):
        path = save_random(folder / name, tiny_llama(), seed=seed, max_shard_size="1GB")
        content = load_file(path / "model.safetensors")
        content["model.padding"] = torch.full((150_000_000 if name == "target" else 2,), 7, dtype=torch.uint8)
        save_file(content, path / "model.safetensors", metadata={"format": "pt"})
        pair.append(path)
    yield tuple(pair)
    shutil.rmtree(folder)


@pytest.fixture
def stopped_run(large_pair, tmp_path, write_recipe):
    """A run held in the middle of its copy: the process, its recipe and its result's place."""
    recipe = write_recipe(*large_pair, layers=2)
    out = tmp_path / "results" / "out"
    out.parent.mkdir()
    return start_and_stop_in_the_copy(recipe, out), recipe, out


def start_and_stop_in_the_copy(recipe: Path, out: Path) -> warm.Process:
    process = warm.Process([sys.executable, "-c", SCRIPT, recipe, out])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for staging in out.parent.glob(".dapa-merge-*.partial"):
            with contextlib.suppress(FileNotFoundError):
                # In the midst of the weights, with at least one small file finished.
                is_copying = (staging / "result" / "model.safetensors").stat().st_size > 0
                if is_copying and finished_files(staging):
                    os.kill(process.pid, signal.SIGSTOP)
                    return process
        assert process.poll() is None, "the copy ended before it could be stopped"
    raise AssertionError("the copy did not start")


def run_again(recipe: Path, out: Path) -> Result:
    return call("run", recipe, out, "--no-evaluate")


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_kill_9_in_the_copy_leaves_no_result_and_the_next_run_clears_up(stopped_run):
    process, recipe, out = stopped_run
    assert not out.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert len(list(out.parent.iterdir())) == 1, "the killed run's staging folder is still there"
    again = run_again(recipe, out)
    assert again.exit_code == 0, again.stderr
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_in_the_copy_keeps_what_is_finished_and_says_so(stopped_run):
    process, recipe, out = stopped_run
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    assert process.wait() == 130
    (staging,) = out.parent.iterdir()
    finished = set(finished_files(staging))
    assert {path.name for path in (staging / "result").iterdir()} == finished, "what is not finished takes space"
    (line,) = re.findall(r"^Stopped by Ctrl-C; (.*)$", process.stderr, re.MULTILINE)
    assert re.fullmatch(
        rf"\d+ finished files \(0\.\d\d GB\) are kept in {re.escape(str(staging))}, "
        r"and the same command goes on from there",
        line,
    )
    assert run_again(recipe, out).exit_code == 0
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_second_run_into_the_same_place_is_told_who_is_there(stopped_run):
    process, recipe, out = stopped_run
    second = run_again(recipe, out)
    assert second.exit_code == 2
    assert re.search(
        rf"out is being made by another run \(process {process.pid} on {re.escape(socket.gethostname())}, "
        r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\); wait for it, or name another folder",
        second.stderr,
    )
    process.send_signal(signal.SIGCONT)
    assert process.wait() == 0
    assert list(out.parent.iterdir()) == [out]


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_copied(large_pair, small_disk):
    plan = plan_of(large_pair)
    with pytest.raises(UsageError, match=r"the result needs 0\.15 GB on the disk of .*, which has 0\.00 GB left"):
        transplant(plan, plan.units, small_disk / "out")
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_in_the_copy_gets_back_what_is_not_finished(large_pair, small_disk, monkeypatch):
    plan = plan_of(large_pair)
    # As if the space were taken by another program after it was checked.
    monkeypatch.setattr("dapa_merge.transplant.result.check_destination", lambda *_: None)
    with pytest.raises(UsageError, match=r"no space left on the disk of .*; .* kept"):
        transplant(plan, plan.units, small_disk / "out")
    assert list(small_disk.rglob("*.safetensors")) == []


def test_bytes_are_copied_through_memory_where_the_kernel_cannot(llama_pair, tmp_path, monkeypatch):
    import errno

    def unable(*_):
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "copy_file_range", unable, raising=False)
    plan = plan_of(llama_pair)
    transplant(plan, plan.units, tmp_path / "out", finish=lambda folder: prove(folder, plan, plan.units))
    result = open_checkpoint(str(tmp_path / "out"))
    name = "lm_head.weight"
    assert read_bytes(result, result.tensors[name]) == read_bytes(plan.target, plan.target.tensors[name])


def test_folders_that_only_look_like_leftovers_are_left_alone(llama_pair, tmp_path):
    precious = [
        tmp_path / name for name in (".out.v2.partial", ".out.abcdefgh.partial", ".dapa-merge-x.partial", "new")
    ]
    for folder in precious:
        folder.mkdir()
        (folder / "precious").write_text("precious")
    plan = plan_of(llama_pair)
    transplant(plan, plan.units, tmp_path / "out")
    transplant(plan, plan.units, tmp_path / "*")
    assert all((folder / "precious").exists() for folder in precious)


def test_parents_that_were_made_for_a_failed_run_are_gone_again(llama_pair, tmp_path):
    plan = plan_of(llama_pair)

    def fail(folder):
        raise CheckpointError("not what it should be")

    with pytest.raises(CheckpointError):
        transplant(plan, plan.units, tmp_path / "a" / "b" / "out", finish=fail)
    assert list(tmp_path.iterdir()) == []
    transplant(plan, plan.units, tmp_path / "a" / "b" / "out")
    assert (tmp_path / "a" / "b" / "out" / "config.json").exists()


def test_the_current_folder_is_refused_and_a_roundabout_name_understood(llama_pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = plan_of(llama_pair)
    with pytest.raises(UsageError, match="is the folder you are in"):
        transplant(plan, plan.units, Path())
    transplant(plan, plan.units, Path("a/../out/"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["file/out", "x" * 300])
def test_a_place_that_cannot_be_is_refused(llama_pair, tmp_path, name):
    (tmp_path / "file").write_text("a file")
    plan = plan_of(llama_pair)
    with pytest.raises(UsageError, match="cannot be made"):
        transplant(plan, plan.units, tmp_path / name)


def test_a_long_but_possible_name_is_fine(llama_pair, tmp_path):
    plan = plan_of(llama_pair)
    transplant(plan, plan.units, tmp_path / ("x" * 250))
    assert (tmp_path / ("x" * 250) / "config.json").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_source_gate_that_is_not_finite_is_refused(llama_pair, tmp_path, value):
    source = shutil.copytree(llama_pair[1], tmp_path / "source")
    change_tensor(source, "model.layers.1.mlp.gate_proj.weight", lambda tensor: tensor[-1, -1].fill_(value))
    plan = plan_of((llama_pair[0], source))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.gate_proj.* infinite or not a number; it is damaged"):
        transplant(plan, plan.units, tmp_path / "out")
    # What is not taken from the source does not matter.
    selection = units_of_layers(plan, {0})
    transplant(plan, selection, tmp_path / "out", finish=lambda folder: prove(folder, plan, selection))


def test_values_that_do_not_fit_matter_only_where_they_are_taken(tmp_path):
    target = save_random(tmp_path / "target", tiny_llama(), seed=1, dtype=torch.float16)
    source = save_random(tmp_path / "source", tiny_llama(), seed=2)
    change_tensor(source, "model.layers.1.mlp.gate_proj.weight", lambda tensor: tensor[0, 0].fill_(1e6))
    plan = plan_of((target, source))
    selection = units_of_layers(plan, {3})
    transplant(plan, selection, tmp_path / "out", finish=lambda folder: prove(folder, plan, selection))
    assert [unit.layer for unit in verify(tmp_path / "out", plan).transplanted] == [3]


def test_the_proof_names_the_tensor_that_is_wrong_and_not_its_neighbours(llama_pair, tmp_path):
    plan = plan_of(llama_pair, ("mlp",))
    transplant(plan, units_of_layers(plan, {1}), tmp_path / "out")
    tensor = open_checkpoint(str(tmp_path / "out")).tensors["model.layers.1.mlp.up_proj.weight"]
    with (tmp_path / "out" / tensor.file).open("r+b") as file:
        file.seek(tensor.start)
        file.write(read_bytes(plan.target, plan.target.tensors[tensor.name]))
    gate, down = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "down"))
    what = "is the source's, but others of its unit are the target's"
    assert verify(tmp_path / "out", plan).differences == ((down, what), (gate, what))


def test_further_chat_templates_are_copied(llama_pair, tmp_path):
    target = shutil.copytree(llama_pair[0], tmp_path / "target")
    (target / "additional_chat_templates").mkdir()
    (target / "additional_chat_templates" / "tools.jinja").write_text("with tools")
    plan = plan_of((target, llama_pair[1]))
    transplant(plan, plan.units, tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").read_text() == "with tools"


@pytest.mark.parametrize("shape", [(3, 0), (0, 5), (0,)])
def test_tensors_without_values_are_proved_too(llama_pair, tmp_path, shape):
    target = shutil.copytree(llama_pair[0], tmp_path / "target")
    path = next(iter(sorted(target.glob("*.safetensors"))))
    save_file({**load_file(path), "empty": torch.empty(shape)}, path, metadata={"format": "pt"})
    index = json.loads((target / "model.safetensors.index.json").read_text())
    index["weight_map"]["empty"] = path.name
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    plan = plan_of((target, llama_pair[1]))
    transplant(plan, plan.units[:1], tmp_path / "out")
    prove(tmp_path / "out", plan, plan.units[:1])
    assert verify(tmp_path / "out", plan).transplanted == plan.units[:1]
