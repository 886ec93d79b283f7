import hashlib
import importlib.util
import json
import os
import re
import sys
from dataclasses import dataclass, field
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from action_runner import Result, StepFailed, evaluate, interpolate, run_action, run_job, run_steps
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
ACTION = ROOT / ".github" / "actions" / "remerge"
WORKFLOWS = ROOT / ".github" / "workflows"
GATES = {"min-dsr": "0.9", "max-over-refusal": "0.05", "max-perplexity-ratio": "1.1", "min-skill": "0.5"}
ID_TOKEN = "makes tokens"
URL = "https://hub/you/repaired/discussions/1"
# Writes down how it was called, and ends as it was told.
COMMAND = f"""#!{sys.executable}
import json, os, sys
here = os.path.dirname(__file__)
name = sys.argv[1]
keys = ("HF_TOKEN", "HF_OIDC_RESOURCE", "ACTIONS_ID_TOKEN_REQUEST_TOKEN")
variables = {{key: os.environ.get(key) for key in keys}}
with open(here + "/calls", "a") as log:
    log.write(json.dumps([sys.argv[1:], variables]) + "\\n")
if name == "gate":
    with open(os.environ["GITHUB_STEP_SUMMARY"], "a") as summary:
        summary.write("| gate | limit |\\n")
code, answer = json.load(open(here + "/plan"))[name]
print(answer)
sys.exit(code)
"""
PYTHON = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$(dirname "$(realpath "$0")")/calls"
if [ "$2" = venv ]; then mkdir -p "$3/bin"; ln -s "$(realpath "$0")" "$3/bin/python"; fi
"""


@dataclass
class Bench:
    """An action's surroundings: a workspace with a recipe, and a `dapa-merge` of ours on the path.

    Attributes:
        plan: The exit code and the answer of each command.
        used: The steps with `uses:`, each with its inputs.
    """

    folder: Path
    plan: dict[str, list] = field(
        default_factory=lambda: {
            "outdated": [10, ""],
            "run": [0, ""],
            "gate": [0, ""],
            "push": [0, json.dumps({"url": "https://hub/you/repaired", "pull_request": URL, "changed": True})],
        }
    )
    used: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def __post_init__(self):
        for name in ("bin", "work", "temp"):
            (self.folder / name).mkdir()
        self.write("dapa-merge", COMMAND)
        self.recipe = self.folder / "work" / "recipe.yml"
        self.recipe.write_text("merge_method: dapa\n")

    def write(self, name: str, text: str) -> None:
        program = self.folder / "bin" / name
        program.write_text(text)
        program.chmod(0o755)

    @property
    def where(self) -> dict[str, Path]:
        return {"workspace": self.folder / "work", "temp": self.folder / "temp"}

    @property
    def env(self) -> dict[str, str]:
        path = [str(self.folder / "bin"), str(Path(sys.executable).parent), os.defpath]
        folders = {"HOME": str(self.folder), "XDG_CACHE_HOME": str(self.folder / "cache")}
        return {"PATH": os.pathsep.join(path), "ACTIONS_ID_TOKEN_REQUEST_TOKEN": ID_TOKEN, **folders}

    def uses(self, reference: str, inputs: dict[str, str]) -> None:
        self.used.append((reference.partition("@")[0], inputs))

    def run(self, skip=("install",), cancel_in=None, **inputs: str) -> Result:
        (self.folder / "bin" / "plan").write_text(json.dumps(self.plan))
        given = {"recipe": "recipe.yml", "repository": "you/repaired"}
        given |= {name.replace("_", "-"): value for name, value in inputs.items()}
        return run_action(ACTION, given, self.env, self.uses, skip=skip, cancel_in=cancel_in, **self.where)

    @property
    def calls(self) -> list[list[str]]:
        """The arguments of every call of `dapa-merge`."""
        return [arguments for arguments, _ in self.calls_with_variables]

    @property
    def calls_with_variables(self) -> list[tuple[list[str], dict[str, str]]]:
        log = self.folder / "bin" / "calls"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    @property
    def used_names(self) -> list[str]:
        return [name for name, _ in self.used]


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


def test_a_current_model_is_left_alone(bench):
    bench.plan["outdated"] = [0, ""]
    result = bench.run(**GATES)
    assert result.exit_code == 0
    assert result.ran == ["python", "install", "outdated"]
    assert bench.calls == [["outdated", "--published", "you/repaired", "--", "recipe.yml"]]
    assert bench.used_names == ["actions/setup-python"]
    assert result.outputs == {"outdated": "false", "gate": "", "url": ""}
    assert "you/repaired is up to date" in result.summary


def test_an_outdated_model_is_run_gated_and_pushed_in_order(bench):
    result = bench.run(license="llama2", device="cpu", **GATES)
    out = result.steps["run"].outputs["out"]
    assert out.startswith(str(bench.folder / "temp"))
    assert not Path(out).exists()
    assert bench.calls == [
        ["outdated", "--published", "you/repaired", "--", "recipe.yml"],
        ["run", "--device", "cpu", "--", "recipe.yml", out],
        ["gate", out, *(word for name, limit in GATES.items() for word in (f"--{name}", limit))],
        ["push", out, "you/repaired", "--create-pr", "--json", "--license", "llama2"],
    ]
    assert result.ran == [
        "python", "install", "outdated", "journals", "restore", "run", "save", "gate", "push",
    ]  # fmt: skip
    assert result.outputs == {"outdated": "true", "gate": "passed", "url": URL}
    assert result.exit_code == 0
    assert result.summary.index("| gate | limit |") < result.summary.index(URL)


def test_without_a_limit_there_is_no_gate(bench):
    result = bench.run()
    assert [name for name, *_ in bench.calls] == ["outdated", "run", "push"]
    assert result.outputs == {"outdated": "true", "gate": "", "url": URL}


@pytest.mark.parametrize("gate", GATES)
def test_each_limit_alone_is_a_gate(bench, gate):
    result = bench.run(**{gate: "0"})
    assert bench.calls[2] == ["gate", result.steps["run"].outputs["out"], f"--{gate}", "0"]
    assert result.outputs["gate"] == "passed"


def test_a_result_below_a_gate_is_not_pushed_and_keeps_the_journal(bench):
    bench.plan["gate"] = [6, ""]
    result = bench.run(**GATES)
    assert result.exit_code == 6
    assert [name for name, *_ in bench.calls] == ["outdated", "run", "gate"]
    assert bench.used_names[-1] == "actions/cache/save"
    assert result.outputs == {"outdated": "true", "gate": "failed", "url": ""}
    assert "| gate | limit |" in result.summary


def test_a_gate_that_cannot_be_asked_is_no_verdict(bench):
    bench.plan["gate"] = [4, ""]
    result = bench.run(**GATES)
    assert (result.exit_code, result.outputs["gate"], result.steps["push"].outcome) == (4, "", "skipped")


@pytest.mark.parametrize("code", [1, 2, 5])
def test_what_cannot_be_asked_about_fails_and_nothing_runs(bench, code):
    bench.plan["outdated"] = [code, ""]
    result = bench.run(**GATES)
    assert result.exit_code == code
    assert [name for name, *_ in bench.calls] == ["outdated"]
    assert bench.used_names == ["actions/setup-python"]
    assert result.outputs == {"outdated": "", "gate": "", "url": ""}


def test_a_run_that_fails_keeps_the_journal(bench):
    bench.plan["run"] = [3, ""]
    result = bench.run(**GATES)
    assert result.exit_code == 3
    assert [name for name, *_ in bench.calls] == ["outdated", "run"]
    assert bench.used_names[-2:] == ["actions/cache/restore", "actions/cache/save"]


def test_a_cancelled_run_keeps_the_journal(bench):
    result = bench.run(cancel_in="run", **GATES)
    assert result.ran[-2:] == ["run", "save"]
    assert result.steps["run"].outcome == "cancelled"
    assert bench.used_names[-1] == "actions/cache/save"


def test_a_push_that_the_hub_refuses_fails(bench):
    bench.plan["push"] = [5, ""]
    result = bench.run()
    assert (result.exit_code, result.outputs["url"]) == (5, "")
    assert "waits at" not in result.summary


def test_without_a_pull_request_the_url_is_the_repository(bench):
    bench.plan["push"] = [0, json.dumps({"url": "https://hub/you/repaired", "pull_request": None, "changed": False})]
    assert bench.run().outputs["url"] == "https://hub/you/repaired"


def test_force_runs_without_asking(bench):
    bench.plan["outdated"] = [5, ""]
    result = bench.run(force="true")
    assert [name for name, *_ in bench.calls] == ["run", "push"]
    assert result.outputs["outdated"] == "true"


def test_inputs_arrive_as_they_are_and_run_nothing(bench):
    evil = "a \"b\" 'c' $(touch pwned) `touch pwned`; touch pwned #"
    (bench.folder / "work" / evil).write_text("")
    result = bench.run(recipe=evil, repository=evil, license=evil, device=evil, **dict.fromkeys(GATES, evil))
    out = result.steps["run"].outputs["out"]
    assert bench.calls == [
        ["outdated", "--published", evil, "--", evil],
        ["run", "--device", evil, "--", evil, out],
        ["gate", out, *(word for name in GATES for word in (f"--{name}", evil))],
        ["push", out, evil, "--create-pr", "--json", "--license", evil],
    ]
    assert not list(bench.folder.rglob("pwned"))


@pytest.mark.parametrize(
    ("token", "keyless", "writes"),
    [
        ("", "false", ("", "")),
        ("hf_write", "false", ("hf_write", "")),
        ("", "true", ("", "you/repaired")),
        # huggingface_hub takes the resource first.
        ("hf_write", "true", ("hf_write", "you/repaired")),
    ],
)
@pytest.mark.parametrize("read", ["", "hf_read"])
def test_only_the_step_that_pushes_may_write(bench, token, keyless, writes, read):
    bench.run(token=token, keyless=keyless, read_token=read, **GATES)
    seen = {arguments[0]: tuple(env.values()) for arguments, env in bench.calls_with_variables}
    reads = (read, None, None)
    assert seen == {"outdated": reads, "run": reads, "gate": (None, None, ID_TOKEN), "push": (*writes, ID_TOKEN)}


def test_every_package_that_is_installed_has_one_version():
    names = {}
    for line in (ACTION / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            found = Requirement(line)
            assert [one.operator for one in found.specifier] == ["=="], line
            names.setdefault(canonicalize_name(found.name), []).append(found)
    for python in ("3.10", "3.11", "3.12", "3.13"):
        for name, lines in names.items():
            where = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux"}
            fitting = [one for one in lines if one.marker is None or one.marker.evaluate(where)]
            assert len(fitting) <= 1, (python, name)
    wanted = [*map(Requirement, ("hatchling", "hatch-fancy-pypi-readme", *requires("dapa-merge")))]
    wanted = [one for one in wanted if not re.search("test|docs|dev", str(one.marker))]
    assert {"mergekit", "lm-eval"} <= {one.name for one in wanted}
    for one in wanted:
        if one.name != "torch":
            pinned = names[canonicalize_name(one.name)]
            assert all(one.specifier.contains(next(iter(pin.specifier)).version) for pin in pinned), one


def test_the_journals_are_found_again_for_the_same_recipe_only(bench):
    bench.run()
    recipe = hashlib.sha256(bench.recipe.read_bytes()).hexdigest()
    (restored, saved) = (inputs for name, inputs in bench.used if "/cache/" in name)
    assert restored["path"] == saved["path"] == str(bench.folder / "cache" / "dapa-merge" / "journals")
    assert restored["restore-keys"] == f"dapa-journals-Linux-{recipe}-"
    assert saved["key"] == f"dapa-journals-Linux-{recipe}-1-1"


def test_torch_is_installed_first_and_then_the_checkout_of_the_action(bench):
    bench.write("python3", PYTHON)
    steps = yaml.safe_load((ACTION / "action.yml").read_text())["runs"]["steps"]
    result = run_steps(
        [
            *(step for step in steps if step["id"] == "install"),
            {"id": "path", "run": "echo path=$PATH >> $GITHUB_OUTPUT"},
        ],
        bench.env,
        **bench.where,
        action_path=ACTION,
        contexts={"inputs": {"torch": "torch==2.13.0", "extras": "plot,eval"}},
    )
    environment = bench.folder / "temp" / "dapa-merge"
    install = f"pip install --quiet --constraint {ACTION / 'constraints.txt'}"
    assert (bench.folder / "bin" / "calls").read_text().splitlines() == [
        f"python3 -m venv {environment}",
        f"python -m {install} torch==2.13.0 hatchling hatch-fancy-pypi-readme setuptools wheel",
        f"python -m {install} --no-build-isolation {ROOT}[plot,eval]",
    ]
    assert result.steps["path"].outputs["path"].startswith(f"{environment}/bin:")


def test_the_workflow_passes_everything_on(bench):
    action = yaml.safe_load((ACTION / "action.yml").read_text())
    workflow = yaml.safe_load((WORKFLOWS / "remerge.yml").read_text())[True]["workflow_call"]
    shared = action["inputs"].keys() - {"token", "read-token", "setup-python"}
    assert workflow["inputs"].keys() == shared | {"runner", "timeout-minutes"}
    for name in shared:
        ours, theirs = action["inputs"][name], workflow["inputs"][name]
        assert str(theirs.get("default")).lower() == str(ours.get("default")).lower()
        assert theirs.get("required", False) == ours.get("required", False)
    assert workflow["outputs"].keys() == action["outputs"].keys()
    given = {name: f"value of {name}" for name in shared} | {"force": True, "keyless": False}
    contexts = {
        "inputs": given,
        "secrets": {"HF_TOKEN": "hf_a", "HF_READ_TOKEN": "hf_b"},
        "job": {"workflow_repository": "its/own", "workflow_sha": "0" * 40},
    }
    result = run_job(WORKFLOWS / "remerge.yml", "remerge", bench.env, bench.uses, contexts=contexts, **bench.where)
    checkout, own, remerge = bench.used
    assert checkout == ("actions/checkout", {"persist-credentials": "false"})
    assert (own[1]["repository"], own[1]["ref"]) == ("its/own", "0" * 40)
    assert own[1]["persist-credentials"] == "false"
    assert remerge[0] == f"./{own[1]['path']}/{ACTION.relative_to(ROOT)}"
    assert remerge[1] == given | {"force": "true", "keyless": "false", "token": "hf_a", "read-token": "hf_b"}
    assert result.outputs.keys() == workflow["outputs"].keys()


def test_the_failure_of_the_action_is_the_jobs(bench):
    def uses(reference, inputs):
        if reference.startswith("./"):
            raise StepFailed("6")

    contexts = {"inputs": dict.fromkeys(yaml.safe_load((ACTION / "action.yml").read_text())["inputs"], "")}
    contexts |= {"secrets": {}, "job": {"workflow_repository": "its/own", "workflow_sha": "0" * 40}}
    result = run_job(WORKFLOWS / "remerge.yml", "remerge", bench.env, uses, contexts=contexts, **bench.where)
    assert (result.exit_code, result.steps["remerge"].outcome) == (1, "failure")


def test_a_runner_that_does_not_know_the_workflow_is_no_way_to_another_action(bench):
    contexts = {"inputs": dict.fromkeys(yaml.safe_load((ACTION / "action.yml").read_text())["inputs"], "")}
    contexts |= {"secrets": {}, "job": {"workflow_repository": "", "workflow_sha": ""}}
    result = run_job(WORKFLOWS / "remerge.yml", "remerge", bench.env, bench.uses, contexts=contexts, **bench.where)
    assert (result.exit_code, result.steps["remerge"].outcome) == (1, "skipped")


def test_the_example_calls_the_workflow_where_it_is_set_up():
    example = yaml.safe_load((WORKFLOWS / "remerge-example.yml").read_text())
    workflow = yaml.safe_load((WORKFLOWS / "remerge.yml").read_text())[True]["workflow_call"]
    (job,) = example["jobs"].values()
    assert "schedule" in example[True]
    assert job["uses"] == "./.github/workflows/remerge.yml"
    assert job["with"].keys() <= workflow["inputs"].keys()
    assert job["with"].keys() >= {name for name, one in workflow["inputs"].items() if one.get("required")} | set(GATES)
    assert job["secrets"].keys() <= workflow["secrets"].keys()
    assert evaluate(job["if"], {"vars": {"REMERGE_REPOSITORY": "you/repaired"}}) is True
    assert evaluate(job["if"], {"vars": {"REMERGE_REPOSITORY": ""}}) is False


@pytest.mark.parametrize(
    ("name", "permissions"),
    [
        ("ci.yml", {"contents": "read"}),
        ("remerge.yml", {"contents": "read", "id-token": "write"}),
        ("remerge-example.yml", {"contents": "read", "id-token": "write"}),
    ],
)
def test_permissions_are_minimal(name, permissions):
    workflow = yaml.safe_load((WORKFLOWS / name).read_text())
    assert workflow["permissions"] == permissions
    assert not any("permissions" in job for job in workflow["jobs"].values())


def test_two_runs_for_one_repository_wait_for_each_other():
    job = yaml.safe_load((WORKFLOWS / "remerge.yml").read_text())["jobs"]["remerge"]
    groups = {interpolate(job["concurrency"]["group"], {"inputs": {"repository": name}}) for name in ("a/b", "a/c")}
    assert len(groups) == 2
    assert job["concurrency"]["cancel-in-progress"] is False
    assert "timeout-minutes" in job


def test_foreign_actions_are_pinned_by_commit_and_version():
    files = [*WORKFLOWS.glob("*.yml"), *ACTION.parent.glob("*/action.yml")]
    lines = [line.strip().removeprefix("- ") for file in files for line in file.read_text().splitlines()]
    foreign = [line for line in lines if line.startswith("uses: ") and not line.startswith("uses: ./")]
    pin = re.compile(r"uses: ([\w-]+/[\w-]+)[\w/-]*@([0-9a-f]{40}) # (v\d+\.\d+\.\d+)")
    pins = [pin.fullmatch(line) for line in foreign]
    assert all(pins), foreign
    assert len(foreign) >= 7
    # One commit and version for each.
    assert len({found.groups() for found in pins}) == len({found[1] for found in pins}) == 7


def lint():
    spec = importlib.util.spec_from_file_location("lint_workflows", ROOT / ".ci" / "lint_workflows.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("step", "finding"),
    [
        ({"uses": "actions/checkout@v6"}, "not pinned"),
        ({"uses": f"actions/checkout@{'0' * 39}"}, "not pinned"),
        ({"run": "echo ${{ inputs.recipe }}"}, "holds an expression"),
        ({"run": "if true; then"}, "bash cannot read"),
    ],
)
def test_the_lint_finds_what_actionlint_does_not(step, finding):
    assert finding in next(lint().check_step(step))


def test_the_lint_shows_the_steps_of_an_action_on_their_lines():
    text = (ACTION / "action.yml").read_text()
    wrapped = lint().as_workflow(text)
    assert yaml.safe_load(wrapped)["jobs"]["steps_of_the_action"]["steps"] == yaml.safe_load(text)["runs"]["steps"]
    start = text.splitlines().index("  steps:")
    assert wrapped.splitlines()[start:] == text.splitlines()[start:]


@pytest.mark.parametrize(
    "expression",
    ["hashFiles('a')", "inputs.unknown", "steps.later.outcome", "github.token", "1 == 1", "inputs", "'a", "a b"],
)
def test_the_runner_of_these_tests_refuses_what_it_does_not_know(expression):
    with pytest.raises(ValueError, match="does not know"):
        evaluate(expression, {"inputs": {}, "steps": {}, "github": {}, "state": "success"})


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("inputs.a == 'X' && inputs.a != 'y'", True),
        ("inputs.a && 'it''s' || ''", "it's"),
        ("(failure() || always()) && success()", True),
        ("secrets.none", ""),
    ],
)
def test_the_runner_of_these_tests_knows_expressions(expression, value):
    contexts = {"inputs": {"a": "x"}, "steps": {}, "secrets": {}, "state": "success"}
    assert evaluate(expression, contexts) == value
