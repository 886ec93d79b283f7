"""Shell completion: the command `completion`, and outlines of all commands.

A shell asks at every press of a key, and the commands' modules take longer to import than anybody waits. So it is
answered from `outlines.json`, which has what completion needs of them; `python tests/test_completion.py` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class

from dapa_merge.cli import COMPLETING as VARIABLE

PROGRAM = "dapa-merge"
OUTLINES_PATH = Path(__file__).with_name("outlines.json")
# What click's scripts lack. zsh knows `compdef` only after `compinit`, which no new ~/.zshrc calls; fish would cut a
# description at its first comma.
MENDED = {
    "zsh": {
        "    compdef _": "    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit }\n    compdef _",
    },
    "fish": {'string split ","': 'string split --max 1 ","'},
}
# Options whose value may be a file or something else.
FILES = ("prompts", "keep", "skills", "text", "chat_template", "recipe")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes SHELL complete commands, options and paths.

    \b
    bash: eval "$(dapa-merge completion bash)" in ~/.bashrc
    zsh:  eval "$(dapa-merge completion zsh)" in ~/.zshrc
    fish: dapa-merge completion fish > ~/.config/fish/completions/dapa-merge.fish
    """  # noqa: D301  click needs the character.
    found = get_completion_class(shell)
    assert found is not None
    script = found(click.Group(), {}, PROGRAM, VARIABLE).source()
    for old, new in MENDED.get(shell, {}).items():
        assert script.count(old) == 1
        script = script.replace(old, new)
    click.echo(script)


def outline(command: click.Command) -> dict[str, Any]:
    """The parts of a command that completion needs, as plain data."""
    if isinstance(command, click.Group):
        return {"help": command.help, "commands": {name: outline(one) for name, one in command.commands.items()}}
    return {"help": command.help, "parameters": [_outline(parameter) for parameter in command.params]}


def _outline(parameter: click.Parameter) -> dict[str, Any]:
    values: str | list[str] = ""
    if isinstance(parameter.type, click.Choice):
        values = list(map(str, parameter.type.choices))
    elif (
        isinstance(parameter.type, click.Path)
        or parameter.name in FILES
        or parameter.metavar in ("MODEL", "FILE")
        or (isinstance(parameter, click.Argument) and parameter.name != "repository")
    ):
        values = "path"
    if isinstance(parameter, click.Option):
        names = [*parameter.opts, *parameter.secondary_opts]
        return {"names": names, "flag": parameter.is_flag, "multiple": parameter.multiple, "values": values}
    return {"names": [parameter.name], "nargs": parameter.nargs, "values": values}


def outlined(name: str) -> click.Command:
    """A command with the names and values that completion offers, which does nothing."""
    return _command(name, json.loads(OUTLINES_PATH.read_text(encoding="utf-8"))[name])


def _command(name: str, data: Mapping[str, Any]) -> click.Command:
    if "commands" in data:
        commands = {inner: _command(inner, one) for inner, one in data["commands"].items()}
        return click.Group(name, help=data["help"], commands=commands)
    return click.Command(name, help=data["help"], params=[_parameter(one) for one in data["parameters"]])


def _parameter(data: Mapping[str, Any]) -> click.Parameter:
    values = data["values"]
    kind: Any = click.STRING
    if values:
        kind = click.Path() if values == "path" else click.Choice(values)
    if "nargs" in data:
        return click.Argument(data["names"], nargs=data["nargs"], type=kind)
    # An argument may be called as an option is.
    names = [*data["names"], f"option_{data['names'][0].strip('-').replace('-', '_')}"]
    if data["flag"]:
        return click.Option(names, is_flag=True)
    return click.Option(names, multiple=data["multiple"], type=kind)
