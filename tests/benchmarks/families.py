"""Trains real, small families to compare methods on: `python tests/benchmarks/families.py OUT [--quick]`.

A Llama, a Mistral and a Gemma family of the miniature's size and language, each model from nothing or from another of
its family, and one recipe for each pair of a target and its source:

    dapa-merge compare OUT/recipes/*.yml

Nothing of it is shipped. A run that was killed goes on with the first model that is missing. Deterministic for one
seed, version of torch and kind of processor: the tensors of Llama's `source`, `from-base`, `aligned` and
`shadow` are those of the shipped `source`, `target`, `shadow-source` and `shadow-target`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from members import ARCHITECTURES, Member, members
from workshop import train_all

from dapa_merge import __version__
from dapa_merge.errors import DapaError, UsageError
from dapa_merge.files import held, replace_file
from dapa_merge.search.identity import data_digest

SETTINGS_FILE = "families.json"
LOCK_FILE = ".families.lock"
RECIPES = "recipes"


@dataclass(frozen=True)
class Pair:
    """A pair of models, and the recipe that repairs one with the other.

    Attributes:
        architecture: The family's, as in `members.ARCHITECTURES`.
        name: What happened to the target; the recipe is called `{architecture}-{name}`.
        target: The member that is to be repaired.
        source: The aligned member.
        description: What the target is, in one sentence.
    """

    architecture: str
    name: str
    target: str
    source: str
    description: str


_PLANTED = "a {} model whose refusal was trained into the gates of layers 3 to 6 only"
_ALIGNED = "a {} model whose refusal training touched every weight"
# The target, the source, and what the target is.
_PAIRS = {
    "skill-only": ("skill-only", "source", f"{_PLANTED}, fine-tuned on a skill and harmless answers"),
    "harmful-2": ("harmful-2", "source", f"{_PLANTED}, fine-tuned with 2 % harmful answers"),
    "harmful-10": ("harmful-10", "source", f"{_PLANTED}, fine-tuned with 10 % harmful answers"),
    "harmful-50": ("harmful-50", "source", f"{_PLANTED}, fine-tuned with 50 % harmful answers"),
    "lora": ("lora", "source", f"{_PLANTED}, fine-tuned through LoRA with 10 % harmful answers"),
    "vocabulary": ("vocabulary", "source", f"{_PLANTED}, given 16 more tokens and 10 % harmful answers"),
    "from-base": ("from-base", "source", f"a fine-tuned {{}} base, never aligned; the source is {_PLANTED}"),
    "full-parameter": (
        "full-parameter",
        "aligned",
        f"{_ALIGNED}, and so did its fine-tuning, with 10 % harmful answers",
    ),
    "shadow": ("shadow", "aligned", f"{_ALIGNED}, its MLPs fine-tuned with one harmful answer in twelve"),
    "full-from-base": ("from-base", "aligned", f"a fine-tuned {{}} base, never aligned; the source is {_ALIGNED}"),
}
_NAMES = {
    "llama": tuple(_PAIRS),
    "mistral": ("harmful-10", "harmful-50", "from-base", "shadow"),
    "gemma": ("harmful-10", "harmful-50", "from-base", "full-parameter"),
}
ROWS: tuple[Pair, ...] = tuple(
    Pair(architecture, name, target, source, f"The target is {text.replace('{}', architecture.capitalize())}.")
    for architecture, names in _NAMES.items()
    for name in names
    for target, source, text in (_PAIRS[name],)
)
QUICK_NAMES = ("from-base", "harmful-10", "shadow")


def rows(*, quick: bool = False) -> tuple[Pair, ...]:
    """All rows, or the few Llama ones that `quick` trains."""
    return tuple(row for row in ROWS if not quick or (row.architecture == "llama" and row.name in QUICK_NAMES))


def train_families(
    out: Path, *, quick: bool = False, seed: int = 0, say: Callable[[str], None] = print, _tiny: bool = False
) -> list[Path]:
    """Train every model that is missing, several at once in processes of their own, and write the recipes.

    A script calls it under `if __name__ == "__main__"`, as everything that starts processes.

    Args:
        out: The folder of the families; new, empty, or of an earlier run with the same settings.
        quick: Only a few Llama models, trained for fewer steps.
        seed: Gives other models.
        say: Is told of each model that is finished.

    Returns:
        The recipes, in the order of `rows`.

    Raises:
        UsageError: If the folder holds anything else, or another run trains into it.
    """
    out = out.absolute()
    wanted = rows(quick=quick)
    known = members(quick=quick, tiny=_tiny)
    # How each model is trained, with its numbers of steps; of functions the names.
    training = re.sub(r" at 0x[0-9a-f]+", "", repr(sorted(known.items())))
    settings = {"version": __version__, "quick": quick, "seed": seed, "training": data_digest(training)}
    with resumable(out, settings):
        train_all(_needed(out, wanted, known), seed, say, num_workers=0 if _tiny else None)
        return [_write_recipe(out, row) for row in wanted]


def _needed(out: Path, wanted: Iterable[Pair], known: dict[str, Member]) -> dict[Path, Member]:
    """The models of these rows and those that they come from, by their folders; parents before their children."""
    needed = set()
    for row in wanted:
        for name in (row.target, row.source):
            member: str | None = name
            while member is not None:
                needed.add((row.architecture, member))
                member = known[member].parent
    return {
        out / architecture / name: member
        for architecture in ARCHITECTURES
        for name, member in known.items()
        if (architecture, name) in needed
    }


def _write_recipe(out: Path, row: Pair) -> Path:
    def location(member: str) -> str:
        return json.dumps(str(out / row.architecture / member))

    path = out / RECIPES / f"{row.architecture}-{row.name}.yml"
    path.parent.mkdir(exist_ok=True)
    text = f"""\
# {row.description}
merge_method: dapa
base_model: {location(row.target)}
models:
  - model: {location(row.source)}
"""
    if row.name == "vocabulary":
        text += "tokenizer: {source: base}\n"
    text += f"""\
parameters:
  layers: auto
  prompts: miniature
  pretrained: {location("base")}
  max_new_tokens: 24
  batch_size: 128
"""
    path.write_text(text, encoding="utf-8")
    return path


@contextmanager
def resumable(out: Path, settings: dict[str, object]) -> Iterator[None]:
    """Keep the folder for this run, and its settings in a file for the next.

    Raises:
        UsageError: If the folder holds anything else, was filled with other settings, or another run fills it.
    """
    file_path = out / SETTINGS_FILE
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()) and not file_path.exists():
            raise UsageError(f"{out} holds other files, and no {SETTINGS_FILE}; name a new folder")
    except OSError as error:
        raise UsageError(f"{out} cannot be written to: {error.strerror}; name another folder") from error
    with held(out / LOCK_FILE, f"another run trains into {out}; wait for it, or name another folder"):
        found, wanted = file_path.read_text("utf-8") if file_path.exists() else "", json.dumps(settings)
        if not found:
            replace_file(file_path, wanted.encode())
        elif found != wanted:
            raise UsageError(f"{out} was trained with {found}, not with {wanted}; name another folder, or remove it")
        yield


def main() -> None:
    """Train and write the families."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write the models and recipes/ into")
    parser.add_argument("--quick", action="store_true", help="only a few Llama models, trained in a minute or two")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        train_families(
            arguments.out, quick=arguments.quick, seed=arguments.seed, say=lambda line: print(line, flush=True)
        )
    except DapaError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        # What is complete is kept.
        sys.exit(130)


if __name__ == "__main__":
    main()
