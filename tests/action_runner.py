"""Runs the steps of a composite action, or of a job, on this machine as GitHub's runner does.

`run:` steps are real processes of bash with files for their outputs, environment, path and summary; `uses:` steps are
handed to a function of the test. Whatever this does not know, in an expression or in a step, is an error.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

# Called with what stands behind `uses:` and with the inputs; returns the outputs, or raises `StepFailed`.
Uses = Callable[[str, dict[str, str]], "Mapping[str, str] | None"]
STEP_KEYS = {"id", "name", "if", "env", "run", "shell", "uses", "with", "working-directory"}
SHELLS = {"bash": "bash --noprofile --norc -eo pipefail {0}", None: "bash -e {0}"}
FILES = ("OUTPUT", "ENV", "PATH", "STEP_SUMMARY")
TOKEN = re.compile(r"\s*('(?:[^']|'')*'|[A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*)*|==|!=|&&|\|\||[!(),])")
STATUS = {
    "success": lambda state: state == "success",
    "failure": lambda state: state == "failure",
    "cancelled": lambda state: state == "cancelled",
    "always": lambda state: True,
}


class StepFailed(Exception):
    """Raised by the function of a test for a `uses:` step that fails."""


@dataclass
class Step:
    """What became of a step: `success`, `failure`, `cancelled` or `skipped`; and of its process, if it ran one."""

    outcome: str
    outputs: dict[str, str] = field(default_factory=dict)
    exit_code: int | None = None
    log: str = ""


@dataclass
class Result:
    """What became of an action or a job: its steps in order, by id (or name, or position), outputs and summary."""

    steps: dict[str, Step]
    outputs: dict[str, str]
    summary: str

    @property
    def exit_code(self) -> int:
        """That of the first step that failed; 1 where that was no process, and 0 if none failed."""
        failed = (step for step in self.steps.values() if step.outcome in ("failure", "cancelled"))
        return next((step.exit_code or 1 for step in failed), 0)

    @property
    def ran(self) -> list[str]:
        """The steps that were not skipped."""
        return [name for name, step in self.steps.items() if step.outcome != "skipped"]


def run_action(
    path: Path, inputs: Mapping[str, str], env: Mapping[str, str], uses: Uses | None = None, **how: Any
) -> Result:
    """Run the composite action in a folder; inputs that are not given have their defaults, `how` as of `run_steps`."""
    action = yaml.safe_load((path / "action.yml").read_text())
    steps, known = action["runs"]["steps"], action.get("inputs", {})
    if action["runs"]["using"] != "composite" or any("run" in step and "shell" not in step for step in steps):
        raise ValueError(f"{path} is no composite action, or GitHub misses a shell in it")
    required = {name for name, one in known.items() if one.get("required")}
    if wrong := (inputs.keys() - known.keys()) | (required - inputs.keys()):
        raise ValueError(f"{path} has no such inputs, or needs them: {sorted(wrong)}")
    values = {name: str(one.get("default", "")) for name, one in known.items()} | dict(inputs)
    how["contexts"] = {**how.get("contexts", {}), "inputs": values}
    outputs = {name: one["value"] for name, one in action.get("outputs", {}).items()}
    return run_steps(steps, env, uses, action_path=path.resolve(), outputs=outputs, **how)


def run_job(path: Path, job: str, env: Mapping[str, str], uses: Uses | None = None, **how: Any) -> Result:
    """Run the steps of a workflow's job; `how` as of `run_steps`, with `inputs` among the `contexts`."""
    content = yaml.safe_load(path.read_text())["jobs"][job]
    return run_steps(content["steps"], env, uses, outputs=content.get("outputs", {}), **how)


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
        uses: Called for each `uses:` step; without it, such a step is an error.
        workspace: Where commands run.
        temp: An existing folder: the runner's own for temporary files.
        skip: Ids of steps that are left out as if they had succeeded, without outputs.
        cancel_in: The id of a step at whose end the job is cancelled.
        contexts: More of what expressions may name: `github`, `inputs`, `secrets`, ...
        outputs: Their expressions, by name.
        action_path: The folder of the action, if these are the steps of one.
    """
    given = contexts or {}
    github = {"workspace": str(workspace), "run_id": "1", "run_attempt": "1"} | dict(given.get("github", {}))
    variables = {"GITHUB_ACTIONS": "true", "GITHUB_WORKSPACE": str(workspace), "RUNNER_TEMP": str(temp)}
    if action_path is not None:
        variables["GITHUB_ACTION_PATH"] = github["action_path"] = str(action_path)
    runner = {"os": "Linux", "arch": "X64", "temp": str(temp)}
    run = _Run({**given, "github": github, "runner": runner}, {**env, **variables}, uses, workspace, temp)
    for number, step in enumerate(steps):
        name = step.get("id") or step.get("name") or f"step {number}"
        if (unknown := step.keys() - STEP_KEYS) or name in run.steps:
            raise ValueError(f"this runner does not know {sorted(unknown)} of {step}, or knows another {name}")
        done = Step("success") if step.get("id") in skip else run.do(step)
        if cancel_in is not None and step.get("id") == cancel_in:
            done.outcome = "cancelled"
        run.steps[name] = done
    found = {name: interpolate(str(text), run.contexts(run.env)) for name, text in (outputs or {}).items()}
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

    def contexts(self, env: Mapping[str, str]) -> dict[str, Any]:
        """What expressions may name now."""
        outcomes = {done.outcome for done in self.steps.values()}
        state = next((bad for bad in ("cancelled", "failure") if bad in outcomes), "success")
        steps = {name: {"outputs": done.outputs, "outcome": done.outcome} for name, done in self.steps.items()}
        return {**self.given, "env": env, "steps": steps, "state": state}

    def do(self, step: dict[str, Any]) -> Step:
        """Run a step, or skip it."""
        contexts = self.contexts(self.env)
        condition = str(step.get("if", "success()")).strip()
        if condition.startswith("${{"):
            condition = condition[3:].removesuffix("}}")
        holds = bool(evaluate(condition, contexts))
        asks_state = re.search(rf"\b({'|'.join(STATUS)})\(", condition)
        if not holds or (not asks_state and contexts["state"] != "success"):
            return Step("skipped")
        env = self.env | {name: interpolate(_text(text), contexts) for name, text in step.get("env", {}).items()}
        contexts = self.contexts(env)
        if "run" in step:
            return self._execute(step, env, contexts)
        if self.uses is None:
            raise ValueError(f"nothing stands in for {step['uses']}")
        inputs = {name: interpolate(_text(text), contexts) for name, text in step.get("with", {}).items()}
        try:
            return Step("success", dict(self.uses(step["uses"], inputs) or {}))
        except StepFailed as error:
            return Step("failure", log=str(error))

    def _execute(self, step: dict[str, Any], env: dict[str, str], contexts: dict[str, Any]) -> Step:
        folder = self.temp / f"_step{len(self.steps)}"
        folder.mkdir()
        files = {f"GITHUB_{name}": folder / name for name in FILES}
        for file in files.values():
            file.touch()
        script = folder / "script.sh"
        script.write_text(interpolate(step["run"], contexts))
        shell = SHELLS.get(step.get("shell"), step.get("shell"))
        if "{0}" not in shell:
            raise ValueError(f"this runner does not know the shell {shell}")
        done = subprocess.run(
            [word.replace("{0}", str(script)) for word in shlex.split(shell)],
            cwd=self.workspace / interpolate(step.get("working-directory", "."), contexts),
            env=env | {name: str(file) for name, file in files.items()},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        self.summary += files["GITHUB_STEP_SUMMARY"].read_text()
        self.env |= assignments(files["GITHUB_ENV"].read_text())
        for line in files["GITHUB_PATH"].read_text().splitlines():
            self.env["PATH"] = f"{line}{os.pathsep}{self.env['PATH']}"
        # What a step that fails wrote before counts too.
        outputs = assignments(files["GITHUB_OUTPUT"].read_text())
        return Step("failure" if done.returncode else "success", outputs, done.returncode, done.stdout + done.stderr)


def assignments(text: str) -> dict[str, str]:
    """The lines `NAME=VALUE`, and values of several lines `NAME<<END`, of a file that a step wrote."""
    values: dict[str, str] = {}
    lines = iter(text.splitlines())
    for line in lines:
        if found := re.fullmatch(r"([^=<]+)<<(.+)", line):
            values[found[1]] = "\n".join(itertools.takewhile(lambda one, end=found[2]: one != end, lines))
        elif found := re.fullmatch(r"([^=]+)=(.*)", line):
            values[found[1]] = found[2]
        else:
            raise ValueError(f"no assignment: {line}")
    return values


def interpolate(text: str, contexts: Mapping[str, Any]) -> str:
    """A text of YAML with the values of its expressions."""
    return re.sub(r"\$\{\{(.*?)\}\}", lambda found: _text(evaluate(found[1], contexts)), text)


def evaluate(expression: str, contexts: Mapping[str, Any]) -> Any:
    """The value of an expression."""
    tokens, position = [], 0
    expression = expression.strip()
    while position < len(expression):
        if not (found := TOKEN.match(expression, position)):
            raise ValueError(f"this runner does not know {expression[position:]!r} in {expression!r}")
        tokens.append(found[1])
        position = found.end()
    value = _joined(tokens, contexts)
    if tokens:
        raise ValueError(f"this runner does not know {tokens[0]!r} in {expression!r}")
    return value


def _joined(tokens: list[str], contexts: Mapping[str, Any], signs: tuple[str, ...] = ("||", "&&")) -> Any:
    if not signs:
        return _comparison(tokens, contexts)
    value = _joined(tokens, contexts, signs[1:])
    while tokens[:1] == [signs[0]]:
        del tokens[0]
        other = _joined(tokens, contexts, signs[1:])
        value = (value or other) if signs[0] == "||" else (value and other)
    return value


def _comparison(tokens: list[str], contexts: Mapping[str, Any]) -> Any:
    value = _operand(tokens, contexts)
    if tokens[:1] not in (["=="], ["!="]):
        return value
    sign = tokens.pop(0)
    other = _operand(tokens, contexts)
    if type(value) is not type(other):
        raise ValueError(f"this runner does not compare {value!r} with {other!r}")
    # GitHub compares without regard to case.
    same = value.casefold() == other.casefold() if isinstance(value, str) else value == other
    return same == (sign == "==")


def _operand(tokens: list[str], contexts: Mapping[str, Any]) -> Any:
    if not tokens:
        raise ValueError("an expression ends too soon")
    token = tokens.pop(0)
    if token == "!":
        return not _operand(tokens, contexts)
    if token == "(":
        value = _joined(tokens, contexts)
        if tokens[:1] != [")"]:
            raise ValueError("an expression misses a )")
        del tokens[0]
        return value
    if token.startswith("'"):
        return token[1:-1].replace("''", "'")
    if token in ("true", "false"):
        return token == "true"
    if token in STATUS and tokens[:2] == ["(", ")"]:
        del tokens[:2]
        return STATUS[token](contexts["state"])
    return _named(token, contexts)


def _named(name: str, contexts: Mapping[str, Any]) -> Any:
    head, *rest = name.split(".")
    value: Any = contexts
    for number, key in enumerate([head, *rest]):
        # GitHub takes these for empty where they are not set; everything else that is not there is a slip.
        may_lack = (head in ("env", "secrets") and number == 1) or (head == "steps" and number == 3)
        if not isinstance(value, Mapping) or (key not in value and not may_lack):
            raise ValueError(f"this runner does not know {name}")
        value = value.get(key, "")
    if not rest or isinstance(value, Mapping):
        raise ValueError(f"this runner does not know {name}")
    return value


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
