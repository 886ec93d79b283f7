"""Inspects a pair of models: compares weights, tokenizers, templates and cards, and names the damage to the target."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy
import yaml
from rich.console import Console
from rich.table import Table

from dapa_merge.checkpoint.convert import open_location
from dapa_merge.checkpoint.folder import read_regular
from dapa_merge.checkpoint.header import TORCH_NAMES, read_json
from dapa_merge.checkpoint.location import Location
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.checkpoint.units import architecture_name, auto_modules
from dapa_merge.errors import CannotRepair, CheckpointError, DapaError, HubError, UnsupportedArchitecture, printable
from dapa_merge.imports import Shown
from dapa_merge.inspect.damage import OUTSIDE, Damage, Seen, name_damage, not_a_family
from dapa_merge.inspect.difference import MAX_RANK, Difference, differences
from dapa_merge.plan.plan import plan_transplant
from dapa_merge.progress import LOG, task
from dapa_merge.publish.parents import describe_parent
from dapa_merge.recipe.parameters import layer_spans
from dapa_merge.recipe.recipe import METHOD
from dapa_merge.report.drawing import Chart, Panel, layer_maps
from dapa_merge.report.report import jsonable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_TEMPLATE_BYTES = 4 << 20
# The tokenizer of Gemma 3 has 33 MB.
MAX_TOKENIZER_BYTES = 128 << 20
# What transformers' trainers write beside a model.
TRAINING_FILES = ("training_args.bin", "trainer_state.json", "optimizer.pt", "scheduler.pt", "all_results.json")
# What names of fine-tunes say that the names of aligned models do not.
_TUNED = re.compile(r"(?i)uncensored|ablit\w*|unaligned|unfiltered|heretic|jailbr\w*|nsfw|lora|fine-?tuned?")
_ROLE = {role: re.compile(rf"(?i)(?<![a-z]){role}(?![a-z])") for role in ("target", "source")}
_WHICH = "`dapa-merge evaluate` with both names shows which of them refuses"
# The heads of the columns of a printed table.
HEADS = ("differ", "by", "values", "rank", "directions for 0.9")


@dataclass(frozen=True)
class Surroundings:
    """Facts about a model besides its weights.

    Attributes:
        name: As the user wrote it.
        architecture: Its class in `config.json`.
        num_parameters: Number of parameters.
        dtypes: Number of parameters by the name of their dtype, the most first.
        num_tokens: Number of tokens in `tokenizer.json`; None without that file, or if it was not read.
        tokenizer: Digest of these tokens; None as above.
        template: Digest of the chat template; None without one.
        license: As the model's card names it; None if it does not.
        made_of: The base models that its card names.
        loaded_from: The model that it was loaded from before it was saved, as `config.json` names it.
        trained_with: Files that a training leaves in its folder.
    """

    name: str
    architecture: str
    num_parameters: int
    dtypes: Mapping[str, int]
    num_tokens: int | None = None
    tokenizer: str | None = None
    template: str | None = None
    license: str | None = None
    made_of: tuple[str, ...] = ()
    loaded_from: str | None = None
    trained_with: tuple[str, ...] = ()


@dataclass(frozen=True)
class Module:
    """How one module differs, over all layers.

    Attributes:
        module: Its name.
        num_layers: Number of layers, or of tensors outside of layers, that have it.
        layers: Those that differ; None stands for what is outside of layers.
        norm: The median of ||target - source|| / ||source|| over those that differ, in [0, inf).
        share_changed: The share of all its values that differ.
        rank: The rank that most of its matrices of low rank have; 0 if none is of low rank.
        num_directions: The median number of directions that hold nine tenths of a difference; None if too many.
    """

    module: str
    num_layers: int
    layers: tuple[int | None, ...]
    norm: float
    share_changed: float
    rank: int
    num_directions: float | None


@dataclass(frozen=True)
class Inspection(Shown):
    """Result of an inspection.

    Attributes:
        models: The surroundings of target, source and, if named, pretrained.
        damage: The kind of damage to the target.
        modules: Differences by module.
        notes: Sentences on other differences.
        differences: Every comparison, in the order of the layers; empty if the models are not one family.
        swap: Why target and source may be swapped, as a sentence; None without a sign of it.
    """

    models: Mapping[str, Surroundings]
    damage: Damage
    modules: tuple[Module, ...]
    notes: tuple[str, ...]
    differences: tuple[Difference, ...] = field(repr=False)
    swap: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON data: all but single tensors and directions."""
        found = {name: asdict(model) for name, model in self.models.items()}
        told = {"swap": self.swap, "command": self.command, "notes": self.notes}
        modules = [asdict(module) for module in self.modules]
        return dict(jsonable({"models": found, **asdict(self.damage), **told, "modules": modules}))

    @property
    def command(self) -> str | None:
        """The command that tries the advice, with OUT and PROMPTS to be named; None if nothing can help."""
        if self.damage.edit is None:
            return None
        target, source, *others = (shlex.quote(model.name) for model in self.models.values())
        return " ".join(
            ["dapa-merge repair", target, source, "OUT --keep PROMPTS", *(f"--pretrained {one}" for one in others)]
        )


def inspect_pair(
    target: Location, source: Location, pretrained: Location | None = None, *, allow_pickle: bool = False
) -> Inspection:
    """Compare a target with its source, and name the damage.

    Args:
        target: The fine-tune.
        source: The aligned model.
        pretrained: Their common base model, if known: it tells a fine-tune of the source from a sibling.
        allow_pickle: Read weights that exist only as pickles, accepting only tensors.

    Raises:
        CheckpointError: If a model cannot be read, or holds values that are infinite or not a number.
        HubError: If one cannot be fetched.
    """
    places = {"target": target, "source": source} | ({} if pretrained is None else {"pretrained": pretrained})
    opened = {name: open_location(place, partial=True, allow_pickle=allow_pickle) for name, place in places.items()}
    models = {name: _surroundings(opened[name], place) for name, place in places.items()}
    notes = list(_notes(models))
    try:
        modules = auto_modules(opened["target"].config, opened["target"].shapes)
        plan = plan_transplant(opened["target"], opened["source"], modules, pretrained=opened.get("pretrained"))
    except (CheckpointError, UnsupportedArchitecture) as error:
        return Inspection(models, not_a_family(str(error)), (), tuple(notes), ())
    with task("comparing the weights", opened["target"].num_parameters, "parameters"):
        found = tuple(differences(plan))
    if added := sum(one.added for one in found):
        notes.insert(0, f"the target has {added} values that the source lacks, such as the rows of further tokens")
    signs = list(_signs_of_a_swap(models))
    if Seen(found).is_swapped:
        signs.append(
            "by the weights, the source is the target plus a change, unless both were made of one base model and the "
            "target lies nearer to that"
        )
    swap = _swapped(signs) if signs else None
    return Inspection(models, name_damage(found), tuple(by_module(found)), tuple(notes), found, swap)


def warn_of_swap(target: Location, source: Location) -> None:
    """Warn if names, cards or files beside the weights of a pair say that the two are swapped.

    A model that cannot be opened is left to whoever opens it next.
    """
    with suppress(DapaError):
        places = {"target": target, "source": source}
        # A tokenizer tells nothing of this, and takes a second to read.
        models = {
            name: _surroundings(open_location(place, partial=True), place, reads_tokenizer=False)
            for name, place in places.items()
        }
        if signs := list(_signs_of_a_swap(models)):
            LOG.warning(_swapped(signs))


def _swapped(signs: Iterable[str]) -> str:
    return f"target and source may be swapped: {'; '.join(signs)}. {_WHICH}"


def by_module(found: Sequence[Difference]) -> Iterator[Module]:
    """Sum up the differences of each module, in the order of the modules."""
    for name in dict.fromkeys(one.module for one in found):
        seen = Seen(tuple(one for one in found if one.module == name))
        counts = [one.decay.num_directions or math.inf for one in seen.changed if one.decay is not None]
        num_directions = median(counts) if counts else math.inf
        yield Module(
            name,
            len(seen.all),
            tuple(one.layer for one in seen.changed),
            median(one.norm for one in seen.changed) if seen.changed else 0.0,
            sum(one.num_changed for one in seen.all) / max(1, sum(one.num_values for one in seen.all)),
            seen.rank,
            num_directions if math.isfinite(num_directions) else None,
        )


def recipe_of(found: Inspection) -> str:
    """Return the text of a recipe that follows the advice.

    Raises:
        CannotRepair: If nothing can help.
    """
    if found.damage.edit is None:
        raise CannotRepair(f"no recipe was written: {found.damage.what}; {found.damage.advice}")
    names = {role: model.name for role, model in found.models.items()}
    content = {
        "merge_method": METHOD,
        "base_model": names.pop("target"),
        "models": [{"model": names.pop("source")}],
        "parameters": {"layers": "auto", "edit": found.damage.edit, "prompts": "builtin", **names},
    }
    what = printable(f"{found.damage.what[0].upper()}{found.damage.what[1:]}.")
    head = textwrap.fill(what, 118, initial_indent="# ", subsequent_indent="# ")
    return (
        f"{head}\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}"
        f"  # Prompts of what the target is for, without answers; without them its skill may be lost.\n"
        f"  # keep: keep.jsonl\n"
        f"  # Questions that test its skill.\n"
        f"  # skills: skill.jsonl\n"
    )


def _surroundings(checkpoint: Checkpoint, place: Location, *, reads_tokenizer: bool = True) -> Surroundings:
    dtypes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        dtypes[TORCH_NAMES.get(tensor.dtype, tensor.dtype)] += tensor.num_parameters
    tokens = _tokens(checkpoint.folder / "tokenizer.json") if reads_tokenizer else None
    loaded_from = checkpoint.config.get("_name_or_path")
    try:
        card = describe_parent("", replace(place, adapter=None))
    except HubError:
        card = None
    return Surroundings(
        str(place),
        architecture_name(checkpoint.config, str(place)),
        checkpoint.num_parameters,
        dict(dtypes.most_common()),
        None if tokens is None else len(tokens),
        None if tokens is None else _digest(tokens),
        _template(checkpoint.folder),
        card.license.key if card is not None and card.license is not None else None,
        card.made_of if card is not None else (),
        loaded_from if isinstance(loaded_from, str) else None,
        tuple(name for name in TRAINING_FILES if (checkpoint.folder / name).exists()),
    )


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _tokens(path: Path) -> list[str] | None:
    """All tokens of a tokenizer, sorted; None if the file is absent or of another kind."""
    if not path.is_file():
        return None
    content = read_json(path, max_bytes=MAX_TOKENIZER_BYTES)
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        # Unigram models: pairs of a token and its score.
        vocabulary = [pair[0] for pair in vocabulary if isinstance(pair, list) and pair]
    if not isinstance(vocabulary, (dict, list)):
        return None
    more = [one.get("content") for one in added if isinstance(one, dict)] if isinstance(added, list) else []
    return sorted({str(token) for token in (*vocabulary, *more)})


def _template(folder: Path) -> str | None:
    """The digest of a model's chat template, in whichever file it is; None without one."""
    template: object = None
    if (path := folder / "chat_template.jinja").is_file():
        template = read_regular(path, MAX_TEMPLATE_BYTES).decode(errors="replace")
    for path in (folder / name for name in ("chat_template.json", "tokenizer_config.json")):
        template = template or (read_json(path).get("chat_template") if path.is_file() else None)
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default", template)
    # Jinja leaves out a newline at the end.
    return _digest(template.removesuffix("\n") if isinstance(template, str) else template) if template else None


def _notes(models: Mapping[str, Surroundings]) -> Iterator[str]:
    """Yields sentences on differences of target and source besides their weights."""
    target, source = models["target"], models["source"]
    if target.tokenizer != source.tokenizer:
        numbers = " and ".join("?" if one.num_tokens is None else str(one.num_tokens) for one in (target, source))
        yield f"the tokenizers differ; target and source have {numbers} tokens"
    if source.template is None and target.template is not None:
        yield "the source has no chat template, as a base model has none; a source must be the aligned model"
    elif target.template is None and source.template is not None:
        yield "the target has no chat template, and is then asked without one; people may use it with the source's"
    elif target.template != source.template:
        yield "the chat templates differ: each model is asked in its own"
    if list(target.dtypes) != list(source.dtypes):
        kinds = (", ".join(model.dtypes) for model in (target, source))
        yield "the target is stored as {}, the source as {}; the result keeps the target's".format(*kinds)
    if None not in (target.license, source.license) and target.license != source.license:
        yield f"the licenses differ: {target.license} and {source.license}; a result's card needs one that fits both"


def _signs_of_a_swap(models: Mapping[str, Surroundings]) -> Iterator[str]:
    """Yields what beside the weights speaks for the source being the fine-tune of the target; each may deceive."""
    target, source = models["target"], models["source"]
    if _names(source.made_of, target) and not _names(target.made_of, source):
        yield f"the source's card says that it was made of {target.name}"
    if _names((source.loaded_from or "",), target) and not _names((target.loaded_from or "",), source):
        yield f"the source's config.json says that it was loaded from {source.loaded_from}"
    if source.trained_with and not target.trained_with:
        yield f"the source's folder holds {source.trained_with[0]}, as a training leaves it"
    names = [Path(one.name).name for one in (target, source)]
    tuned = [_TUNED.search(name) for name in names]
    if tuned[1] and not tuned[0]:
        yield f"the source's name says {tuned[1].group()!r}"
    if _ROLE["source"].search(names[0]) and _ROLE["target"].search(names[1]):
        yield f"the target is called {names[0]}, and the source {names[1]}"


def _names(bases: Iterable[str], other: Surroundings) -> bool:
    """Whether one of some names is a model's, by its id or the name of its folder."""
    name = other.name.casefold()
    names = (name, Path(name).name)
    return any(base.casefold() in names or base.casefold().rpartition("/")[2] in names for base in bases if base)


def print_inspection(found: Inspection, console: Console) -> None:
    """Print a row for each module, then what was done, what to try, and what else differs."""
    if found.modules:
        table = Table("")
        for head in HEADS:
            table.add_column(head, justify="right")
        for module in found.modules:
            table.add_row(module.module, *_cells(module))
        console.print(table)
    label = {"it looks like": found.damage.kind, "because": found.damage.what}
    # Before any advice, which would be for the other pair.
    label |= {} if found.swap is None else {"look first": found.swap}
    label |= {"try": found.damage.advice} | ({} if found.command is None else {"command": found.command})
    width = max(40, min(console.width, 110) - 15)
    for name, text in [*label.items(), *(("note", note) for note in found.notes)]:
        text = printable(text)
        # A command is copied as one line.
        lines = [text] if name == "command" else textwrap.wrap(text, width, break_on_hyphens=False)
        for number, line in enumerate(lines):
            console.print(f"{'' if number else name:<15}{line}", highlight=False, markup=False, soft_wrap=True)


def _cells(module: Module) -> list[str]:
    if not module.layers:
        return ["-", "", "", "", ""]
    layers = [layer for layer in module.layers if layer is not None]
    where = f"{len(module.layers)} of {module.num_layers}"
    if module.module not in OUTSIDE:
        where = "all layers" if len(layers) == module.num_layers else f"layers {layer_spans(layers)}"
    is_matrix = module.module != "norm"
    number = f"{module.num_directions:.0f}" if module.num_directions is not None else f"over {MAX_RANK}"
    return [
        where,
        f"{100 * module.norm:.2g} %",
        f"{100 * module.share_changed:.0f} %",
        str(module.rank) if module.rank else "-",
        number if is_matrix else "",
    ]


def _draw(found: Inspection) -> Figure | None:
    inside = [one for one in found.differences if one.layer is not None and one.module not in OUTSIDE]
    if not any(one.num_changed for one in inside):
        return None
    modules = list(dict.fromkeys(one.module for one in inside))
    num_layers = max(one.layer for one in inside if one.layer is not None) + 1
    norms, numbers = (numpy.full((len(modules), num_layers), math.nan) for _ in range(2))
    for one in inside:
        assert one.layer is not None
        place = modules.index(one.module), one.layer
        norms[place] = one.norm
        if one.decay is not None:
            numbers[place] = one.decay.num_directions or MAX_RANK
    most = numpy.nanmax(numbers, initial=1.0)
    beyond = " or more" if most >= MAX_RANK else ""
    return layer_maps(
        [
            Panel(f"Norm of the difference (at most {100 * numpy.nanmax(norms):.2g} %)", norms),
            Panel(f"Directions for 0.9 of it (at most {most:.0f}{beyond})", numbers),
        ],
        modules,
    )


CHARTS = (
    Chart(
        "difference",
        "How much each module of each layer differs from the source's, as a share of the source's norm, and how many "
        "singular directions hold nine tenths of the difference's squared norm. Each map has its own scale; grey has "
        "no such module, or does not differ.",
        _draw,
    ),
)
