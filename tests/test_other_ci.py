"""What docs/other-ci.md shows: its scripts are run as they stand there, as GitLab's runner and cron run them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import warm
import yaml
from conftest import change_tensor, write_few
from filelock import FileLock
from hub_server import dapa_merge
from hub_stand_in import serve
from publish.conftest import CARD, connect, reaching_servers

import dapa_merge as package
from dapa_merge import miniature

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "other-ci.md"
BLOCKS = dict(re.findall(r"^```(yaml|sh)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)[:2])
JOB = yaml.safe_load(BLOCKS["yaml"])["remerge"]
GATES = ["--min-dsr", "0.9", "--max-over-refusal", "0.05", "--min-skill", "0.5"]
TARGET, SOURCE, REPAIRED = "alice/target", "alice/source", "alice/repaired"
# Write down how they were called, with the tokens that they see, and end as they were told.
COMMAND = """#!/usr/bin/env bash
token=${HF_TOKEN:-}${HF_TOKEN_PATH:+$(cat "$HF_TOKEN_PATH")}
echo "$(basename "$0") $* [$token]${HF_WRITE_TOKEN:+ and the token that may write}" >> "$CALLS"
if [ "$1" = run ]; then mkdir "${@: -1}"; fi
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && touch "$3/bin/activate"; fi
exit "$(cat "$CODES/$1" 2> /dev/null || echo 0)"
"""


@dataclass
class Bench:
    """A folder with a recipe, and programs of ours on the path.

    Attributes:
        folder: Where the recipe lies.
        beside: Where the programs are, and what they wrote down.
        env: The variables of the process.
    """

    folder: Path
    beside: Path
    env: dict[str, str]

    def ends(self, **codes: int) -> None:
        """Let commands of dapa-merge end with these exit codes."""
        for name, code in codes.items():
            (self.beside / name).write_text(str(code))

    @property
    def calls(self) -> list[str]:
        log = self.beside / "calls"
        return log.read_text().splitlines() if log.exists() else []

    def gitlab(self, *parts: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run parts of the job in one bash, as GitLab's runner does; `variables` are those of the pipeline."""
        given = {name: text.replace("$CI_PROJECT_DIR", str(self.folder)) for name, text in JOB["variables"].items()}
        script = "\n".join(["set -eo pipefail", *(line for part in parts for line in JOB[part])])
        return self._run(["bash", "-c", script], {**given, **variables})

    def cron(self) -> subprocess.CompletedProcess[str]:
        """Run the script from another folder, as cron does."""
        return self._run([str(self.folder / "remerge.sh")], {})

    def _run(self, command: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
        cwd = self.folder if command[0] == "bash" else self.beside
        return subprocess.run(
            command, cwd=cwd, env={**self.env, **variables}, capture_output=True, text=True, check=False
        )


@pytest.fixture
def bench(tmp_path) -> Bench:
    folder, beside = tmp_path / "work", tmp_path / "beside"
    folder.mkdir()
    (beside / "bin").mkdir(parents=True)
    for name in ("dapa-merge", "git", "python3", "pip"):
        (beside / "bin" / name).write_text(COMMAND)
        (beside / "bin" / name).chmod(0o755)
    script = folder / "remerge.sh"
    script.write_text(BLOCKS["sh"])
    script.chmod(0o755)
    (folder / "recipe.yml").write_text("merge_method: dapa\n")
    for kind in ("read", "write"):
        (folder / f"{kind}-token").write_text(f"hf_{kind}")
    path = os.pathsep.join([str(beside / "bin"), os.defpath])
    env = {"PATH": path, "CALLS": str(beside / "calls"), "CODES": str(beside), "HOME": str(tmp_path)}
    return Bench(folder, beside, env)


def commands(bench: Bench) -> list[str]:
    return [call.split()[1] for call in bench.calls if call.startswith("dapa-merge ")]


def test_gitlab_installs_the_pinned_versions_and_hides_the_token_that_may_write(bench):
    done = bench.gitlab("before_script", HF_WRITE_TOKEN="hf_write", HF_READ_TOKEN="hf_read")
    assert done.returncode == 0, done.stderr
    pins = "--constraint .program/.github/actions/remerge/constraints.txt"
    builders = "hatchling hatch-fancy-pypi-readme setuptools wheel"
    assert bench.calls == [
        "git clone --quiet https://github.com/OWNER/dapa-merge .program [hf_read]",
        "git -C .program checkout --quiet main [hf_read]",
        "python3 -m venv .venv [hf_read]",
        f"pip install --quiet {pins} torch==2.13.0 {builders} [hf_read]",
        f"pip install --quiet {pins} --no-build-isolation ./.program [hf_read]",
    ]
    assert (ROOT / ".github" / "actions" / "remerge" / "constraints.txt").exists()
    action = (ROOT / ".github" / "actions" / "remerge" / "action.yml").read_text()
    assert builders in action


def test_gitlab_runs_gates_and_pushes_in_order_and_only_the_push_may_write(bench):
    bench.ends(outdated=10)
    tokens = {"HF_WRITE_TOKEN": "hf_write", "HF_READ_TOKEN": "hf_read", "LICENSE": "llama2"}
    done = bench.gitlab("before_script", "script", **tokens)
    assert done.returncode == 0, done.stderr
    outdated, run, gate, push = bench.calls[-4:]
    out = run.split()[-2]
    assert outdated == "dapa-merge outdated --published you/your-model -- recipe.yml [hf_read]"
    assert run == f"dapa-merge run -- recipe.yml {out} [hf_read]"
    assert gate == f"dapa-merge gate {out} {' '.join(GATES)} [hf_read]"
    assert push == f"dapa-merge push {out} you/your-model --create-pr --license llama2 [hf_write]"


@pytest.mark.parametrize("way", ["gitlab", "cron"])
@pytest.mark.parametrize(
    ("codes", "called", "ends"),
    [
        ({}, ["outdated"], 0),
        ({"outdated": 5}, ["outdated"], 5),
        ({"outdated": 2}, ["outdated"], 2),
        ({"outdated": 10, "run": 3}, ["outdated", "run"], 3),
        ({"outdated": 10, "gate": 6}, ["outdated", "run", "gate"], 6),
        ({"outdated": 10, "push": 5}, ["outdated", "run", "gate", "push"], 5),
        ({"outdated": 10}, ["outdated", "run", "gate", "push"], 0),
    ],
)
def test_every_exit_code_is_heeded(bench, way, codes, called, ends):
    bench.ends(**codes)
    done = bench.cron() if way == "cron" else bench.gitlab("script")
    assert (commands(bench), done.returncode) == (called, ends), done.stdout + done.stderr
    # cron sends what is printed: nothing where nobody has to look.
    if way == "cron":
        assert bool(done.stdout) == (called != ["outdated"] or ends != 0)
        assert done.stderr == ""
        assert len(list((bench.folder / "logs").iterdir())) == 1


def test_gitlab_asks_nothing_when_forced_and_holds_to_no_gate_when_told(bench):
    bench.ends(outdated=5)
    assert bench.gitlab("script", FORCE="true", GATES="").returncode == 0
    assert commands(bench) == ["run", "push"]


def test_cron_gives_each_command_the_token_that_it_needs(bench):
    bench.ends(outdated=10)
    assert bench.cron().returncode == 0
    assert [call.rpartition(" ")[2] for call in bench.calls] == ["[hf_read]"] * 3 + ["[hf_write]"]
    assert not (bench.folder / "out").exists()


def test_cron_keeps_a_refused_result_apart_and_goes_on_after_a_failed_push(bench):
    bench.ends(outdated=10, gate=6)
    assert "out.refused was not pushed (exit code 6)" in bench.cron().stdout
    assert [(bench.folder / name).exists() for name in ("out", "out.refused")] == [False, True]
    bench.ends(gate=0, push=5)
    assert "goes on with it (exit code 5)" in bench.cron().stdout
    bench.ends(push=0)
    assert bench.cron().returncode == 0
    assert commands(bench)[-4:] == ["push", "outdated", "gate", "push"]


def test_cron_runs_once_at_a_time(bench):
    with FileLock(bench.folder / "remerge.lock"):
        done = bench.cron()
    assert (done.returncode, done.stdout, bench.calls) == (0, "", [])


def test_the_page_says_what_the_workflow_on_github_does():
    inputs = yaml.safe_load((ROOT / ".github" / "workflows" / "remerge-example.yml").read_text())["jobs"]["remerge"]
    assert {"schedule", "web"} <= set(re.findall(r'"(\w+)"', JOB["rules"][0]["if"]))
    assert JOB["variables"]["GATES"].split() == GATES
    assert {word[2:] for word in GATES[::2]} <= inputs["with"].keys()
    assert JOB["cache"]["when"] == "always"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with reaching_servers(monkeypatch), serve(tmp_path / "hub") as hub:
        yield hub


def test_cron_and_gitlab_offer_a_new_result_when_the_target_moves(bench, hub, tmp_path, monkeypatch):
    """The real program and a Hub: nothing is done, then once; also while it waits, and in the other way."""
    api = connect(hub, monkeypatch)
    target, source = (
        shutil.copytree(miniature.path(name), tmp_path / name, dirs_exist_ok=True) for name in ("target", "source")
    )

    def upload(name: str, folder: Path) -> None:
        (folder / "README.md").write_text(CARD)
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)

    def move() -> None:
        change_tensor(target, "model.norm.weight", lambda values: values[:1].mul_(1.1))
        upload(TARGET, target)

    upload(TARGET, target)
    upload(SOURCE, source)
    prompts = write_few(tmp_path / "prompts", 16)
    recipe = bench.folder / "recipe.yml"
    recipe.write_text(
        f"merge_method: dapa\nbase_model: {TARGET}\nmodels:\n  - model: {SOURCE}\n"
        f"parameters:\n  layers: 3-6\n  prompts: {prompts}\n  max_new_tokens: 12\n  batch_size: 128\n"
    )
    ran = dapa_merge(
        hub.endpoint, tmp_path / "home", "run", recipe, tmp_path / "first", "--push", REPAIRED,
        HF_TOKEN=hub.token("alice"), OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr

    for kind in ("read", "write"):
        (bench.folder / f"{kind}-token").write_text(hub.token("alice"))
    script = bench.folder / "remerge.sh"
    text = script.read_text()
    # The miniature's skill is no part of these few prompts.
    for old, new in {"you/your-model": REPAIRED, " --min-skill 0.5": ""}.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    script.write_text(text)
    bench.env |= {
        "PATH": os.pathsep.join([str(bench.beside / "bin"), str(Path(sys.executable).parent), os.defpath]),
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(package.__file__).parents[1]),
    }
    variables = {"HF_TOKEN": hub.token("alice"), "write_token": hub.token("alice"), "REPOSITORY": REPAIRED}
    variables |= {"GATES": "--min-dsr 0.9 --max-over-refusal 0.05", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    pulls = hub.store.repositories[REPAIRED].pull_requests
    with warm.program(bench.beside / "bin" / "dapa-merge", "from dapa_merge.cli import main; main()"):
        quiet = bench.cron()
        assert (quiet.returncode, quiet.stdout, quiet.stderr, len(pulls)) == (0, "", "", 0)
        move()
        done = bench.cron()
        assert (done.returncode, done.stdout) == (0, f"remerge: a new result waits at {REPAIRED}\n")
        assert len(pulls) == 1
        # It waits.
        assert bench.cron().stdout == ""
        assert bench.gitlab("script", **variables).returncode == 0
        assert len(pulls) == 1
        move()
        done = bench.gitlab("script", **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(pulls) == 2
    logs = "".join(path.read_text() for path in (bench.folder / "logs").iterdir())
    assert hub.token("alice") not in logs + done.stdout + done.stderr
