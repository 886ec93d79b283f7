"""Runs the steps of a composite action, or of a job, on this machine as GitHub's runner does.

`run:` steps are real processes of bash with files for their outputs, path and summary; `uses:` steps are handed to a
function of the test. Anything else in an expression or in a step is an error.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

# Called with the value of `uses:` and with the inputs; raises `StepFailed` for a step that fails.
Uses = Callable[[str, dict[str, str]], None]
STEP_KEYS = {"id", "name", "if", "env", "run", "shell", "uses", "with"}
TOKEN = re.compile(r"'(?:[^']|'')*'|[A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*)*|==|!=|&&|\|\||\S")
PYTHON = {"&&": "and", "||": "or", "==": "==", "!=": "!=", "(": "(", ")": ")", "true": "True", "false": "False"}
STATUS = ("success", "failure", "always")


class StepFailed(Exception):
    """Raised by the function of a test for a `uses:` step that fails."""


@dataclass
class Step:
    """The end of a step: `success`, `failure`, `cancelled` or `skipped`; and of its process, if it ran one."""

    outcome: str
    outputs: dict[str, str] = field(default_factory=dict)
    exit_code: int | None = None
    log: str = ""


@dataclass
class Result:
    """The end of an action or a job: its steps by id, in order, its outputs and its summary."""

    steps: dict[str, Step]
    outputs: dict[str, str]
    summary: str

    @property
    def exit_code(self) -> int:
        """Of the first step that failed; 1 if that was not a process, and 0 if none failed."""
        failed = (step for step in self.steps.values() if step.outcome in ("failure", "cancelled"))
        return next((step.exit_code or 1 for step in failed), 0)

    @property
    def ran(self) -> list[str]:
        """The steps that were not skipped."""
        return [name for name, step in self.steps.items() if step.outcome != "skipped"]


def run_action(path: Path, inputs: Mapping[str, str], env: Mapping[str, str], uses: Uses, **how: Any) -> Result:
    """Run the composite action in a folder; absent inputs have their defaults, `how` as of `run_steps`."""
    action = yaml.safe_load((path / "action.yml").read_text())
    steps, known = action["runs"]["steps"], action["inputs"]
    assert action["runs"]["using"] == "composite"
    assert all("shell" in step for step in steps if "run" in step), "GitHub wants a shell in each"
    assert inputs.keys() <= known.keys()
    assert {name for name, one in known.items() if one.get("required")} <= inputs.keys()
    values = {name: str(one.get("default", "")) for name, one in known.items()} | dict(inputs)
    outputs = {name: one["value"] for name, one in action["outputs"].items()}
    how |= {"contexts": {"inputs": values}, "action_path": path.resolve(), "outputs": outputs}
    return run_steps(steps, env, uses, **how)


def run_job(path: Path, job: str, env: Mapping[str, str], uses: Uses, **how: Any) -> Result:
    """Run the steps of a workflow's job; `how` as of `run_steps`, with `inputs` among the `contexts`."""
    content = yaml.safe_load(path.read_text())["jobs"][job]
    return run_steps(content["steps"], env, uses, outputs=content["outputs"], **how)


def run_steps(
    steps: list[dict[str, Any]],
    env: Mapping[str, str],
    uses: Uses | None = None,
    *,
    workspace: Path,
    temp: Path,
    skip: Collection[str] = (),
    cancel_in: str | None = None,
    contexts: Mapping[str, Any] | None = None,
    outputs: Mapping[str, str] | None = None,
    action_path: Path | None = None,
) -> Result:
    """Run steps in order.

    Args:
        steps: As in YAML.
        env: The environment of the job. Its processes see nothing else of this process's.
        uses: Called for each `uses:` step.
        workspace: Where commands run.
        temp: An existing folder: the runner's own for temporary files.
        skip: Ids of steps that are left out as if they had succeeded, without outputs.
        cancel_in: The id of a step at whose end the job is cancelled.
        contexts: More of what expressions may name: `inputs`, `secrets`, ...
        outputs: Their expressions, by name.
        action_path: The folder of the action, if these are the steps of one.
    """
    github = {"run_id": "1", "run_attempt": "1"}
    variables = {"GITHUB_ACTIONS": "true", "RUNNER_TEMP": str(temp), "GITHUB_ACTION_PATH": str(action_path)}
    known = {"github": github, "runner": {"os": "Linux"}, **(contexts or {})}
    run = _Run(known, {**env, **variables}, uses, workspace, temp)
    for number, step in enumerate(steps):
        name = step.get("id", f"step {number}")
        assert step.keys() <= STEP_KEYS, step
        assert name not in run.steps
        done = Step("success") if name in skip else run.do(step)
        if name == cancel_in:
            done.outcome = "cancelled"
        run.steps[name] = done
    found = {name: interpolate(text, run.contexts()) for name, text in (outputs or {}).items()}
    return Result(run.steps, found, run.summary)


@dataclass
class _Run:
    """The state of a job while its steps run."""

    given: dict[str, Any]
    env: dict[str, str]
    uses: Uses | None
    workspace: Path
    temp: Path
    steps: dict[str, Step] = field(default_factory=dict)
    summary: str = ""

    def contexts(self) -> dict[str, Any]:
        """What expressions may name now."""
        outcomes = {done.outcome for done in self.steps.values()}
        state = next((bad for bad in ("cancelled", "failure") if bad in outcomes), "success")
        steps = {name: {"outputs": done.outputs, "outcome": done.outcome} for name, done in self.steps.items()}
        return {**self.given, "steps": steps, "state": state}

    def do(self, step: dict[str, Any]) -> Step:
        """Run a step, or skip it."""
        contexts, condition = self.contexts(), step.get("if", "success()")
        asks_state = any(f"{name}()" in condition for name in STATUS)
        if not evaluate(condition, contexts) or not (asks_state or contexts["state"] == "success"):
            return Step("skipped")
        if "run" in step:
            env = {name: interpolate(text, contexts) for name, text in step.get("env", {}).items()}
            return self._execute(step, self.env | env, contexts)
        inputs = {name: interpolate(text, contexts) for name, text in step.get("with", {}).items()}
        try:
            self.uses(step["uses"], inputs)
        except StepFailed as error:
            return Step("failure", log=str(error))
        return Step("success")

    def _execute(self, step: dict[str, Any], env: dict[str, str], contexts: dict[str, Any]) -> Step:
        folder = self.temp / f"_step{len(self.steps)}"
        folder.mkdir()
        files = {f"GITHUB_{name}": folder / name for name in ("OUTPUT", "PATH", "STEP_SUMMARY")}
        for file in files.values():
            file.touch()
        script = folder / "script.sh"
        script.write_text(interpolate(step["run"], contexts))
        shell = step.get("shell", "bash -e {0}")
        assert "{0}" in shell, shell
        done = subprocess.run(
            [word.replace("{0}", str(script)) for word in shlex.split(shell)],
            cwd=self.workspace, env=env | {name: str(file) for name, file in files.items()},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        self.summary += files["GITHUB_STEP_SUMMARY"].read_text()
        for line in files["GITHUB_PATH"].read_text().splitlines():
            self.env["PATH"] = f"{line}{os.pathsep}{self.env['PATH']}"
        # Outputs that a step wrote before it failed count too.
        outputs = dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines())
        return Step("failure" if done.returncode else "success", outputs, done.returncode, done.stdout + done.stderr)


def interpolate(text: object, contexts: Mapping[str, Any]) -> str:
    """A scalar of YAML with the values of its expressions, as text."""
    return re.sub(r"\$\{\{(.*?)\}\}", lambda found: _text(evaluate(found[1], contexts)), _text(text))


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class _Text(str):
    """GitHub compares texts without regard to case."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, str):
            raise ValueError(f"this runner does not compare {self!r} with {other!r}")
        return self.casefold() == other.casefold()

    def __ne__(self, other: object) -> bool:
        return not self == other


def evaluate(expression: str, contexts: Mapping[str, Any]) -> Any:
    """The value of an expression, which Python computes."""
    values: dict[str, Any] = {
        "success": lambda: contexts["state"] == "success",
        "failure": lambda: contexts["state"] == "failure",
        "always": lambda: True,
    }

    def in_python(found: re.Match[str]) -> str:
        token = found[0]
        if token in PYTHON or token in STATUS:
            return f" {PYTHON.get(token, token)} "
        if not re.match(r"'.|\w+\.", token):
            raise ValueError(f"this runner does not know {token} in {expression!r}")
        value = token[1:-1].replace("''", "'") if token.startswith("'") else _named(token, contexts)
        values[f"value{len(values)}"] = _Text(value) if isinstance(value, str) else value
        return f" value{len(values) - 1} "

    try:
        return eval(TOKEN.sub(in_python, expression).strip(), {"__builtins__": {}}, values)
    except SyntaxError:
        raise ValueError(f"this runner does not know {expression!r}") from None


def _named(name: str, contexts: Mapping[str, Any]) -> Any:
    head, *rest = name.split(".")
    value: Any = contexts
    for number, key in enumerate([head, *rest]):
        # GitHub takes these for empty where they are not set; everything else that is not there is a slip.
        may_lack = (head == "secrets" and number == 1) or (head == "steps" and number == 3)
        if not isinstance(value, Mapping) or (key not in value and not may_lack):
            raise ValueError(f"this runner does not know {name}")
        value = value.get(key, "")
    if isinstance(value, Mapping):
        raise ValueError(f"this runner does not know {name}")
    return value
