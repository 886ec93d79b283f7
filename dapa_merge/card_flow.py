"""Writing the card of a result: what its folder and its models' cards say, and nothing that nobody measured."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dapa_merge import __version__
from dapa_merge.checkpoint.header import read_json
from dapa_merge.checkpoint.plan import join
from dapa_merge.checkpoint.untrusted import read_regular
from dapa_merge.checkpoint.writing.manifest import CARD_NAME, Manifest, read_manifest
from dapa_merge.checkpoint.writing.manifest import FILE_NAME as MANIFEST_NAME
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.hub.card_facts import CardFacts
from dapa_merge.hub.card_metadata import card_metadata
from dapa_merge.hub.card_text import CAPTIONS, card_text
from dapa_merge.hub.licence import Licence, inherited, licence_in
from dapa_merge.hub.lock import FILE_NAME as LOCK_NAME
from dapa_merge.hub.parent import MAX_CARD_BYTES, Parent, describe_parent, metadata_of, split_card
from dapa_merge.hub.upstream import parts
from dapa_merge.new_file import replace_file
from dapa_merge.progress import Reporter
from dapa_merge.recipe import Location, Recipe
from dapa_merge.recipe_file import load_recipe
from dapa_merge.report import FILE_NAME as REPORT_NAME
from dapa_merge.report import Report
from dapa_merge.report_file import read_report
from dapa_merge.run import RECIPE_NAME
from dapa_merge.selection import make_plan
from dapa_merge.verify_flow import verify_result

BEGIN = "<!-- made by dapa-merge; `dapa-merge card` makes it anew up to the line that says so, and keeps the rest -->"
END = "<!-- made by dapa-merge up to here -->"
# By this sentence mergekit's own cards are known.
MERGEKIT = "created using [mergekit]"
NEW_LINE = "\n"


@dataclass(frozen=True)
class CardOptions:
    """What a user says about a card.

    Attributes:
        title: What the model is called; None for what the card says already, or the folder's name.
        licence: What it is published under; None for what the card says already, or what both models are under.
        target: Where the target is published, if the recipe names a folder.
        source: The same of the source.
    """

    title: str | None = None
    licence: Licence | None = None
    target: Location | None = None
    source: Location | None = None


def write_card(
    out: Path, reporter: Reporter, options: CardOptions = CardOptions(), *, replace_other: bool = False
) -> Path:
    """Write or renew the card of a result, also of one that `mergekit-yaml` wrote.

    What stands outside of the marked part stays, and so does metadata that is not ours.

    Args:
        out: The result's folder.
        reporter: Hears of the steps.
        options: What the user says about it.
        replace_other: Whether a card that neither dapa-merge nor mergekit wrote is replaced.

    Raises:
        UsageError: If the folder is no result, the licences of its models differ, or its card is somebody else's.
        CheckpointError: If it is damaged.
        HubError: If the cards of its models cannot be fetched.
    """
    before = existing_card(out)
    if before and not is_made(before) and not replace_other:
        raise UsageError(
            f"{out / CARD_NAME} is a card of somebody else's; move it away, or replace it with --replace-card"
        )
    facts = card_facts(out, reporter, options)
    replace_file(out / CARD_NAME, render_card(facts, before if is_made(before) else "").encode())
    return out / CARD_NAME


def existing_card(out: Path) -> str:
    """The card that a folder has; empty if it has none."""
    try:
        return read_regular(out / CARD_NAME, MAX_CARD_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UsageError(f"cannot read {out / CARD_NAME}: {error.strerror}") from error


def is_made(card: str) -> bool:
    """Whether a card is dapa-merge's or mergekit's, or nobody's."""
    return not card.strip() or BEGIN in card or MERGEKIT in card


def render_card(facts: CardFacts, before: str) -> str:
    """The whole card; `before` is the one that it takes the place of."""
    kept = metadata_of(before) if BEGIN in before else {}
    above, below = _around(split_card(before)[1]) if BEGIN in before else ("", "")
    head = yaml.safe_dump(card_metadata(facts, kept), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{head}---\n{above or NEW_LINE}{BEGIN}\n\n{card_text(facts)}\n{END}{below or NEW_LINE}"


def _around(body: str) -> tuple[str, str]:
    """What stands before and after our part."""
    above, _, rest = body.partition(BEGIN)
    _, end, below = rest.partition(END)
    return above, below if end else ""


def card_facts(out: Path, reporter: Reporter, options: CardOptions) -> CardFacts:
    """What there is to say of a result.

    Raises:
        DapaError: As `write_card` does.
    """
    if not (out / RECIPE_NAME).is_file():
        raise UsageError(f"{out} has no {RECIPE_NAME}; it is no result of dapa-merge or mergekit")
    recipe = load_recipe(out / RECIPE_NAME)
    report = read_report(out) if (out / REPORT_NAME).is_file() else None
    manifest = read_manifest(out) if (out / MANIFEST_NAME).is_file() else None
    units, share, number = _transplanted(out, report, manifest, recipe, reporter)
    parents = _parents(recipe, manifest, options)
    before = existing_card(out)
    licence = options.licence or licence_in(metadata_of(before) if BEGIN in before else {}, "")
    if licence is None:
        licence = inherited([(parent.name, parent.licence) for parent in parents])
    return CardFacts(
        title=options.title or _title(before) or out.resolve().name,
        parents=parents,
        licence=licence,
        units=units,
        strength=recipe.strength,
        share_changed=share,
        parameters_changed=number,
        report=report,
        recipe=public_recipe(out / RECIPE_NAME, recipe, parents),
        has_manifest=manifest is not None,
        has_lock=(out / LOCK_NAME).is_file(),
        pictures=[name for name in CAPTIONS if (out / name).is_file()],
        version=report.version if report else manifest.version if manifest else __version__,
        task=parents[0].task or _task(out),
        made_by="dapa-merge" if report else "mergekit",
        settings={
            "prompts": without_paths(report.prompts if report else recipe.prompts),
            "text": without_paths(report.after.text) if report and report.after else "",
        },
    )


def _transplanted(
    out: Path, report: Report | None, manifest: Manifest | None, recipe: Recipe, reporter: Reporter
) -> tuple[Sequence[str], float, int]:
    """The units of a result, the share of its parameters that they are, and how many."""
    if report is not None:
        return report.units, report.share_changed, report.parameters_changed
    reporter.say(f"{out} has no {REPORT_NAME}; comparing it with its models")
    check = verify_result(out, None, reporter)
    if check.faults or check.verification is None:
        raise CheckpointError(f"{out} is not what its recipe says: {check.faults[0]}; a card would be wrong")
    plan = make_plan(recipe)
    units = join(plan, check.verification.transplanted)
    names = manifest.units if manifest else tuple(map(str, units))
    return names, plan.share(units), plan.num_parameters(units)


def _parents(recipe: Recipe, manifest: Manifest | None, options: CardOptions) -> list[Parent]:
    found = []
    for role, location, given in (("target", recipe.target, options.target), ("source", recipe.source, options.source)):
        for index, part in enumerate(parts(given or location)):
            parent = describe_parent(role if index == 0 else f"{role}'s adapter", replace(part, adapter=None))
            found.append(parent)
    return found


def _title(card: str) -> str | None:
    """What a card of ours calls the model."""
    found = re.search(r"^# (\S.*)$", card.partition(BEGIN)[2], re.MULTILINE)
    return found.group(1).strip() if found else None


def _task(out: Path) -> str:
    config = read_json(out / "config.json")
    return "image-text-to-text" if "vision_config" in config else "text-generation"


def public_recipe(path: Path, recipe: Recipe, parents: Sequence[Parent]) -> str:
    """The recipe of a result as a stranger can use it: folders of this machine become their names.

    A placeholder that is no path at all would be followed to somebody's repository of that name.
    """
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["base_model"] = _public_location(parents, "target")
    content["models"] = [{"model": _public_location(parents, "source")}]
    parameters: Mapping[str, Any] = content.get("parameters") or {}
    content["parameters"] = {
        key: without_paths(value) if key in ("prompts", "text", "skills") and isinstance(value, str) else value
        for key, value in parameters.items()
    }
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _public_location(parents: Sequence[Parent], role: str) -> str:
    def place(parent: Parent) -> str:
        if parent.repository is None:
            return f"./{parent.name}"
        return f"{parent.repository}@{parent.commit}" if parent.commit else parent.repository

    return "+".join(place(parent) for parent in parents if parent.role.startswith(role))


def without_paths(names: str) -> str:
    """Names of prompts, texts or skills, with files and folders of this machine as their names only."""
    return ",".join(map(_without_path, names.split(",")))


def _without_path(name: str) -> str:
    base, mark, query = name.strip().partition("?")
    is_path = os.path.exists(base) or base.startswith(("/", "./", "../", "~")) or "\\" in base
    return f"{Path(base.replace(chr(92), '/')).name if is_path else base}{mark}{query}"
