"""Results that are begun, interrupted and gone on with: each ends with the bytes that an uninterrupted run writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import kill_transplant
import pytest
import torch
import warm
from blake3 import blake3
from conftest import answer, call, change_tensor, prove, save_random, sha256_of, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dapa_merge.checkpoint.digest import Digests
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import CheckpointError, HubError, UsageError
from dapa_merge.files import Record
from dapa_merge.plan.plan import plan_transplant
from dapa_merge.transplant import result as making
from dapa_merge.transplant.result import transplant
from dapa_merge.transplant.staging import FinishedFiles, finished_files, staging_folder


def plan_of(pair, modules=("gate",)):
    target, source = (open_checkpoint(str(folder)) for folder in pair)
    return plan_transplant(target, source, modules)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def expected(llama_pair, tmp_path) -> dict[str, bytes]:
    plan = plan_of(llama_pair)
    out = tmp_path / "uninterrupted"
    transplant(plan, plan.units, out)
    return contents(out)


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """The names of the files that are written, in order."""
    names: list[str] = []
    write_file = making.write_file

    def observed(origin, destination, *arguments, **options):
        names.append(destination.name)
        return write_file(origin, destination, *arguments, **options)

    monkeypatch.setattr(making, "write_file", observed)
    return names


def interrupt(monkeypatch, plan, out: Path, fault: BaseException, after: int = 3, **how) -> BaseException:
    """Have a run end with a fault when so many files are finished; one file at a time."""
    write_file = making.write_file
    finished: list[str] = []

    def failing(origin, destination, *arguments, **options):
        if len(finished) >= after:
            raise fault
        finished.append(destination.name)
        return write_file(origin, destination, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(making, "write_file", failing)
        patch.setattr(making, "num_threads", lambda: 1)
        with pytest.raises(BaseException) as caught:  # noqa: PT011 - whatever it is
            transplant(plan, how.pop("units", plan.units), out, **how)
    return caught.value


FAULTS = {
    "a full disk": (lambda: OSError(28, "No space left on device"), UsageError, "no space left on the disk of"),
    "a lost network": (lambda: HubError("the Hub is gone"), HubError, "the Hub is gone"),
    "an unreadable file": (lambda: OSError(5, "Input/output error"), OSError, ""),
}


@pytest.mark.parametrize("case", FAULTS)
def test_after_a_fault_that_passes_the_same_job_goes_on(llama_pair, tmp_path, monkeypatch, expected, written, case):
    make, kind, words = FAULTS[case]
    plan, out = plan_of(llama_pair), tmp_path / "results" / "out"
    error = interrupt(monkeypatch, plan, out, make())
    assert isinstance(error, kind)
    assert str(error).startswith(words) or not words
    place = staging_folder(out)
    if words:
        assert str(error).endswith(f"are kept in {place}, and the same command goes on from there")
    finished = set(finished_files(place))
    assert len(finished) == 3
    written.clear()
    transplant(plan, plan.units, out)
    assert finished.isdisjoint(written)
    assert contents(out) == expected
    assert list(out.parent.iterdir()) == [out]


def test_after_a_fault_that_stays_nothing_is_kept(llama_pair, tmp_path, monkeypatch):
    plan, out = plan_of(llama_pair), tmp_path / "a" / "out"
    error = interrupt(monkeypatch, plan, out, CheckpointError("bad"))
    assert str(error) == "bad"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_job_is_not_gone_on_from(llama_pair, tmp_path, monkeypatch, expected, written):
    plan, out = plan_of(llama_pair), tmp_path / "out"
    interrupt(monkeypatch, plan, out, HubError("gone"))
    stranger = plan_of(llama_pair, ("up",))
    written.clear()
    transplant(stranger, stranger.units, tmp_path / "out")
    assert set(written) == set(expected) - {"dapa.json"}
    assert contents(out) != expected
    assert not staging_folder(out).exists()


def test_a_source_that_changed_meanwhile_is_another_job(llama_pair, tmp_path, monkeypatch):
    source = shutil.copytree(llama_pair[1], tmp_path / "source")
    plan, out = plan_of((llama_pair[0], source)), tmp_path / "out"
    interrupt(monkeypatch, plan, out, HubError("gone"), after=4)
    for layer in range(4):
        change_tensor(source, f"model.layers.{layer}.mlp.gate_proj.weight", lambda tensor: tensor.mul_(2))
    plan = plan_of((llama_pair[0], source))
    transplant(plan, plan.units, out)
    transplant(plan, plan.units, tmp_path / "again")
    assert contents(out) == contents(tmp_path / "again")


@pytest.mark.parametrize("role", ["target", "source"])
def test_a_model_that_changed_under_its_old_time_is_another_job(llama_pair, tmp_path, monkeypatch, role):
    pair = [shutil.copytree(folder, tmp_path / folder.name) for folder in llama_pair]
    plan, out = plan_of(pair), tmp_path / "out"
    interrupt(monkeypatch, plan, out, HubError("gone"), after=4)
    assert staging_folder(out).exists()
    model = plan.target if role == "target" else plan.source
    for name, tensor in model.tensors.items():
        if name.endswith(("gate_proj.weight", "norm.weight")):
            overwrite(model.path(tensor.file), tensor.start)
    transplant(plan, plan.units, out)
    transplant(plan, plan.units, tmp_path / "again")
    assert contents(out) == contents(tmp_path / "again")
    prove(out, plan, plan.units)


def overwrite(path: Path, start: int) -> None:
    """Write into a file, and give it the time back that it had."""
    state = path.stat()
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(4))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_run_that_links_goes_on_and_hashes_what_it_links_anew(llama_pair, tmp_path, monkeypatch, written):
    pair = [shutil.copytree(folder, tmp_path / folder.name) for folder in llama_pair]
    plan, out = plan_of(pair), tmp_path / "out"
    units = [unit for unit in plan.units if unit.layer in (0, 3)]
    interrupt(monkeypatch, plan, out, HubError("gone"), units=units, link=True)
    finished = set(finished_files(staging_folder(out)))
    assert finished
    linked = next(
        name
        for name in plan.target.shards
        if not any(plan.target.tensors[t].file == name for u in units for t in u.tensors)
    )
    norm = next(tensor for tensor in plan.target.tensors.values() if tensor.file == linked)
    overwrite(plan.target.path(linked), norm.start)
    written.clear()
    transplant(plan, units, out, link=True)
    assert not finished & set(written)
    assert (out / linked).samefile(plan.target.path(linked))
    found = json.loads((out / "dapa.json").read_text())["files"][linked]["digest"]
    assert found == blake3((out / linked).read_bytes()).hexdigest()


DAMAGES = {
    "another digit in the middle": lambda raw: raw.replace(b"1", b"2", 1),
    "no first line": lambda raw: raw.split(b"\n", 1)[1],
    "nothing": lambda raw: b"",
    "zeros": lambda raw: bytes(len(raw)),
    "a torn first line": lambda raw: raw[:20],
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_not_believed(llama_pair, tmp_path, monkeypatch, expected, written, damage):
    plan, out = plan_of(llama_pair), tmp_path / "out"
    interrupt(monkeypatch, plan, out, HubError("gone"))
    record = staging_folder(out) / "record"
    record.write_bytes(DAMAGES[damage](record.read_bytes()))
    written.clear()
    transplant(plan, plan.units, out)
    assert set(written) == set(expected) - {"dapa.json"}
    assert contents(out) == expected


def test_the_files_of_an_earlier_version_are_written_again(llama_pair, tmp_path, monkeypatch, expected, written):
    plan, out = plan_of(llama_pair), tmp_path / "out"
    interrupt(monkeypatch, plan, out, HubError("gone"))
    place = staging_folder(out) / "record"
    first, *lines = Record(place).read()
    assert lines
    place.unlink()
    # As versions that hashed by SHA-256 wrote it.
    before = {key: value for key, value in first["job"].items() if key != "digests"}
    record = Record(place)
    record.append({"job": {**before, "format": 2, "hashes": True}})
    for line in lines:
        content = {key: value for key, value in line.items() if key != "digest"}
        record.append({**content, "sha256": sha256_of(staging_folder(out) / "result" / line["file"])})
    written.clear()
    transplant(plan, plan.units, out)
    assert set(written) == set(expected) - {"dapa.json"}
    assert contents(out) == expected


def test_a_last_line_without_its_end_costs_its_own_file_only(llama_pair, tmp_path, monkeypatch, expected, written):
    plan, out = plan_of(llama_pair), tmp_path / "out"
    interrupt(monkeypatch, plan, out, HubError("gone"))
    record = staging_folder(out) / "record"
    record.write_bytes(record.read_bytes()[:-7])
    finished = set(finished_files(staging_folder(out)))
    written.clear()
    transplant(plan, plan.units, out)
    assert set(written) == set(expected) - finished - {"dapa.json"}
    assert len(finished) == 2
    assert contents(out) == expected


@pytest.mark.parametrize("change", ["shortened", "overwritten", "overwritten secretly", "removed", "a link"])
def test_a_finished_file_that_is_not_as_recorded_is_written_anew(llama_pair, tmp_path, monkeypatch, expected, change):
    plan, out = plan_of(llama_pair), tmp_path / "out"
    interrupt(monkeypatch, plan, out, HubError("gone"))
    path = next((staging_folder(out) / "result").glob("*.safetensors"))
    precious = tmp_path / "precious"
    precious.write_bytes(path.read_bytes())
    if change == "shortened":
        path.write_bytes(path.read_bytes()[:-1])
    elif change == "overwritten":
        path.write_bytes(bytes(path.stat().st_size))
        os.utime(path, ns=(0, 0))
    elif change == "overwritten secretly":
        overwrite(path, path.stat().st_size - 4)
    else:
        path.unlink()
    if change == "a link":
        path.symlink_to(precious)
    transplant(plan, plan.units, out)
    assert contents(out) == expected
    assert not any(path.is_symlink() for path in out.iterdir())


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 2000))
def test_a_record_that_is_cut_anywhere_still_tells_the_truth(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("record")
    path, job = folder / "record", {"job": [1, "ä"]}
    record = FinishedFiles(path, job, folder)
    for number in range(4):
        (folder / str(number)).write_bytes(bytes(number))
        record.add(str(number), folder / str(number), Digests(number, "0" * 64, {"t": "1" * 64}))
    files = dict(record.files)
    path.write_bytes(path.read_bytes()[:cut])
    again = FinishedFiles(path, job, folder)
    assert again.files.items() <= files.items()
    again.add("3", folder / "3", files["3"])
    last = FinishedFiles(path, job, folder)
    assert last.files == again.files


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_in_the_place_of_the_hidden_folder_is_not_followed(llama_pair, tmp_path):
    plan, out = plan_of(llama_pair), tmp_path / "results" / "out"
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "result").mkdir()
    out.parent.mkdir()
    staging_folder(out).symlink_to(precious)
    with pytest.raises(UsageError, match="belongs to another user or is a link; remove it"):
        transplant(plan, plan.units, out)
    assert [path.name for path in precious.iterdir()] == ["result"]


# A real disk that fills up.

RUN = """
import sys
from dapa_merge.cli import main
main(["run", *sys.argv[1:], "--no-evaluate"])
"""


@pytest.fixture(scope="module")
def pair_of_60_mb(tmp_path_factory):
    """A target of ten shards and 60 MB, its source, and what an uninterrupted run makes of them."""
    folder = tmp_path_factory.mktemp("sixty")
    shape = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=31)
    target, source = (
        save_random(folder / name, tiny_llama(**shape), seed=seed, dtype=torch.bfloat16, max_shard_size="6MB")
        for seed, name in enumerate(("target", "source"))
    )
    recipe = folder / "recipe.yml"
    recipe.write_text(
        f"merge_method: dapa\nbase_model: {target}\nmodels: [{{model: {source}}}]\nparameters: {{layers: 3-9}}\n"
    )
    answer("run", recipe, folder / "out", "--no-evaluate", "--json")
    yield recipe, without_time(folder / "out")
    shutil.rmtree(folder)


@pytest.fixture
def disk_of_50_mb(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", str(folder)]
    if os.name == "nt" or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("remedy", ["enlarged", "cleared"])
def test_a_disk_that_fills_up_ends_in_the_same_bytes_once_there_is_space(pair_of_60_mb, disk_of_50_mb, remedy):
    recipe, expected = pair_of_60_mb
    disk, out = disk_of_50_mb, disk_of_50_mb / "out"
    ballast = disk / "ballast"
    enlarge = ["mount", "-o", "remount,size=90m", str(disk)]
    if remedy == "cleared":
        subprocess.run(enlarge, check=True)
    # Another program takes the space while the run is at work, so that it was enough when it was checked.
    script = (
        "import dapa_merge.flow\nimport dapa_merge.transplant.result as module\n"
        "from pathlib import Path\n"
        "check = module.check_destination\n"
        "def then_fill(*arguments):\n"
        f"    {'check(*arguments)' if remedy == 'cleared' else 'pass'}\n"
        f"    Path({str(ballast)!r}).write_bytes(bytes({40_000_000 if remedy == 'cleared' else 0}))\n"
        "module.check_destination = then_fill\n"
    )
    if remedy == "enlarged":
        script += "dapa_merge.flow.check_destination = lambda *_: None\n"
    first = warm.run([sys.executable, "-c", script + RUN, recipe, out])
    assert first.returncode == 2, first.stderr
    assert "no space left on the disk of" in first.stderr
    assert "the same command goes on from there" in first.stderr
    finished = len(finished_files(staging_folder(out)))
    assert finished > 3
    # Without more space it is refused before anything is written, if what is kept does not make up for it.
    if remedy == "enlarged":
        second = call("run", recipe, out, "--no-evaluate")
        assert second.exit_code == 2
        assert "the result needs 0.06 GB on the disk" in second.stderr
        assert len(finished_files(staging_folder(out))) == finished
        subprocess.run(enlarge, check=True)
    else:
        ballast.unlink()
    third = call("run", recipe, out, "--no-evaluate")
    assert third.exit_code == 0, third.stderr
    ballast.unlink(missing_ok=True)
    assert [path.name for path in disk.iterdir()] == ["out"]
    assert without_time(out) == expected


def without_time(folder: Path) -> dict[str, bytes]:
    """A result but for the seconds in its report, what depends on them, and the card, which has its folder's name."""
    found = contents(folder)
    del found["README.md"]
    report = json.loads(found.pop("dapa_report.json"))
    found["report"] = json.dumps({**report, "seconds": 0}).encode()
    if raw := found.pop("dapa.json", None):
        manifest = json.loads(raw)
        del manifest["files"]["dapa_report.json"]
        found["manifest"] = json.dumps(manifest).encode()
    return found


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_runs_that_are_killed_at_random_moments_end_in_the_same_bytes(tmp_path, warm_processes, capsys):
    kill_transplant.main(["--kills", "3", "--megabytes", "100", "--folder", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) | {"started_anew": 0} == {
        "kills": 3, "started_anew": 0, "files": 15, "same": True
    }  # fmt: skip
