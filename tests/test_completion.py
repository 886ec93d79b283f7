"""Completion as bash does it, and the outlines that it is answered from: `python tests/test_completion.py` writes them.

Global options behind a command, and how help tells defaults, are here too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from dapa_merge.cli import COMMANDS, COMPLETING, main
from dapa_merge.cli.completion import OUTLINES_PATH, VARIABLE, outline

CONTEXT = click.Context(main)


def outlines_text() -> str:
    found = {name: outline(main.get_command(CONTEXT, name)) for name in sorted(COMMANDS)}
    return json.dumps(found, indent=1) + "\n"


def test_the_outlines_are_of_the_commands_as_they_are():
    assert outlines_text() == OUTLINES_PATH.read_text(encoding="utf-8")


@pytest.fixture
def programs(tmp_path) -> Path:
    """A folder with the program, as an installation puts it on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "dapa-merge"
    program.write_text(f"#!{sys.executable}\nfrom dapa_merge.cli import main\nmain()\n")
    program.chmod(0o755)
    return folder


def complete(programs: Path, *words: str) -> list[str]:
    """What bash offers for the last word, after it read what `completion` prints."""
    typed = " ".join(f"'{word}'" for word in words)
    script = (
        'eval "$(dapa-merge completion bash)"\n'
        "compopt() { OFFERED=$2; }\n"
        f"COMP_WORDS=({typed})\nCOMP_CWORD={len(words) - 1}\n"
        "_dapa_merge_completion dapa-merge\n"
        'printf "%s\\n" "${COMPREPLY[@]}" $OFFERED'
    )
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert ran.stderr == ""
    return ran.stdout.split()


OFFERED = {
    "a command": (("ver",), ["verify"]),
    "several": (("pa",), ["page", "patch"]),
    "a command within a command": (("patch", "re"), ["revert"]),
    "an option": (("run", "--jou"), ["--journal"]),
    "an option of a command within": (("patch", "extract", "--lo"), ["--lora"]),
    "a global option before": (("--qui",), ["--quiet"]),
    "a global option behind": (("run", "recipe.yml", "--qui"), ["--quiet"]),
    "a value": (("trace", "--model", "so"), ["source"]),
    "a shell": (("completion", "z"), ["zsh"]),
    "a recipe": (("run", ""), ["default"]),
    "a model": (("repair", "a", ""), ["default"]),
    "a model of an option": (("verify", "out", "--target", ""), ["default"]),
    "nothing": (("push", "out", ""), []),
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize("what", OFFERED)
def test_bash_completes(programs, what):
    words, offered = OFFERED[what]
    assert complete(programs, "dapa-merge", *words) == offered


SHELLS = {
    # Both call what the script defines as the shell does, and print what it would offer.
    "zsh": """
        compdef() {{ }}
        eval "$(dapa-merge completion zsh)"
        compadd() {{ print -l -- ${{completions[@]}} }}
        _describe() {{ print -l -- ${{completions_with_descriptions[@]%%:*}} }}
        _path_files() {{ print default }}
        words=({words}) CURRENT={number}
        _dapa_merge_completion
    """,
    "fish": """
        dapa-merge completion fish | source
        complete --do-complete '{typed}' | string split --fields 1 \\t; true
    """,
}


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("what", OFFERED)
def test_zsh_and_fish_complete_as_bash_does(programs, what, shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    words, offered = OFFERED[what]
    quoted = " ".join(f"'{word}'" for word in ("dapa-merge", *words))
    script = SHELLS[shell].format(words=quoted, number=len(words) + 1, typed=" ".join(("dapa-merge", *words)))
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a file").touch()
    ran = run_in(shell, script, programs, tmp_path / "here")
    assert ran.stderr == ""
    # fish looks for files itself.
    assert ran.stdout.splitlines() == (["a file"] if shell == "fish" and offered == ["default"] else offered)


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_tells_whole_descriptions(programs, tmp_path):
    script = "dapa-merge completion fish | source; complete --do-complete 'dapa-merge patc'"
    told = run_in("fish", script, programs, tmp_path).stdout
    assert told == "patch\tPass a repair on as a small file, apply it, take it back.\n"


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_a_new_zsh_without_settings_takes_the_script(programs, tmp_path):
    ran = run_in("zsh", 'eval "$(dapa-merge completion zsh)"; print $_comps[dapa-merge]', programs, tmp_path)
    assert (ran.stdout, ran.stderr) == ("_dapa_merge_completion\n", "")


def run_in(shell: str, script: str, programs: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script in a shell without any settings of the user's."""
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "HOME": str(programs),
        "XDG_CONFIG_HOME": str(programs),
    }
    words = [shell, *(["-f"] if shell == "zsh" else ["--no-config"]), "-c", script]
    return subprocess.run(words, capture_output=True, text=True, check=True, env=environment, cwd=folder)


def test_every_command_completes_without_its_module():
    for name, (module, _) in COMMANDS.items():
        code = (
            "import sys\nfrom dapa_merge.cli import main\ntry: main(prog_name='dapa-merge')\nexcept SystemExit: pass\n"
            f"print({{'torch', 'numpy', 'pydantic', 'huggingface_hub', {module!r}}} & {{*sys.modules}})"
        )
        asked = {COMPLETING: "bash_complete", "COMP_WORDS": f"dapa-merge {name} --qui", "COMP_CWORD": "2"}
        ran = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **asked}
        )
        *offered, loaded = ran.stdout.splitlines()
        own = {"dapa_merge.cli.completion"} & {module}
        assert loaded == (repr(own) if own else "set()"), ran.stderr
        assert name == "patch" or offered == ["plain,--quiet"]
    assert COMPLETING == VARIABLE


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_asks_by_the_same_variable(shell):
    ran = subprocess.run(
        [sys.executable, "-m", "dapa_merge", "completion", shell], capture_output=True, text=True, check=True
    )
    assert f"{VARIABLE}={shell}_complete" in ran.stdout
    assert "dapa-merge" in ran.stdout


# Global options behind a command.


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dapa_merge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_quiet_and_debug_may_stand_behind_the_command(llama_pair, write_recipe, tmp_path):
    recipe = write_recipe(*llama_pair, layers=1)
    loud = run("run", recipe, tmp_path / "loud", "--no-evaluate")
    assert f"wrote {tmp_path / 'loud'}" in loud.stderr
    for number, order in enumerate((("--quiet", "run"), ("run", "--quiet"))):
        ran = run(*order, recipe, tmp_path / f"out{number}", "--no-evaluate")
        assert (ran.returncode, ran.stderr) == (0, "")
    for words in (("--debug", "plan", "x.yml"), ("plan", "--debug", "x.yml"), ("plan", "x.yml", "--debug")):
        ran = run(*words)
        assert ran.returncode == 2
        assert "Traceback" in ran.stderr
    ran = run("patch", "show", "nothing", "--debug", "--quiet")
    assert "Traceback" in ran.stderr
    # What stands behind -- is no option.
    assert "Traceback" not in run("plan", "--", "--debug").stderr


# Defaults.


def test_every_default_in_a_help_is_told_in_one_way():
    def options(command: click.Command) -> list[click.Option]:
        inner = command.commands.values() if isinstance(command, click.Group) else ()
        own = [one for one in command.params if isinstance(one, click.Option)]
        return [*own, *(option for one in inner for option in options(one))]

    helps = [option.help for name in COMMANDS for option in options(main.get_command(CONTEXT, name))]
    told = [found for text in helps if (found := re.search(r"(\s*)\[default: ([^\]]*)\]$", text))]
    assert len(told) > 10
    assert {found[1] for found in told} == {"  "}
    assert not [text for text in helps if "default" in text and not re.search(r"  \[default: [^\]]+\]$", text)]
    assert "found" not in {found[2] for found in told}


if __name__ == "__main__":
    OUTLINES_PATH.write_text(outlines_text(), encoding="utf-8")
