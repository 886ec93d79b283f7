"""Writes the card of a result, from its folder and the cards of its models."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from dapa_merge import __version__
from dapa_merge.checkpoint.contents import LICENCES, code_elsewhere, code_files
from dapa_merge.checkpoint.folder import read_regular
from dapa_merge.checkpoint.header import read_json
from dapa_merge.checkpoint.location import Location, is_path, without_paths
from dapa_merge.checkpoint.open import find_model
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.files import replace_file
from dapa_merge.hub_client import find, is_id
from dapa_merge.plan.plan import join
from dapa_merge.plan.selection import RECIPE_NAME, edit_of, make_plan, models_of, num_changed
from dapa_merge.progress import LOG
from dapa_merge.publish.card import CardFacts
from dapa_merge.publish.card_file import CardFile, read_card, render_card
from dapa_merge.publish.lock import LOCK_NAME, named_parts
from dapa_merge.publish.options import CardOptions, inherited, license_in, unknown_licenses
from dapa_merge.publish.parents import MAX_CARD_BYTES, Parent, describe_parent
from dapa_merge.publish.public import public_recipe
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.report import charts
from dapa_merge.report.replay import layer_parameters
from dapa_merge.report.report import REPORT_NAME, Report, read_report
from dapa_merge.transplant.manifest import CARD_NAME, MANIFEST_NAME, files_in, read_manifest
from dapa_merge.verify.result import Check, location_option, no_result, verify_result


def write_card(out: Path, options: CardOptions | None = None, *, replace_other: bool = False) -> Path:
    """Write or renew the card of a result, including one that `mergekit-yaml` wrote.

    Text outside of the marked part is kept, and so is metadata that users added.

    Args:
        out: The result's folder.
        options: The user's statements about it.
        replace_other: Whether a card that neither dapa-merge nor mergekit wrote is replaced.

    Raises:
        UsageError: If the folder is not a result, its models' licenses differ, or its card was written by others.
        CheckpointError: If it is damaged, or was not made of the models that `options` names.
        HubError: If the cards of its models cannot be fetched.
    """
    require_result(out)
    before = existing_card(out)
    if before.is_anothers and not replace_other:
        raise UsageError(f"{out / CARD_NAME} was not written by dapa-merge; move it away, or add --replace-card")
    options = options or CardOptions()
    settled = settle_facts(options, before)
    check: Check | None = None
    if options.target or options.source:
        check = verify_result(out, None, target=settled.target, source=settled.source)
        if check.faults:
            named = " and ".join(str(place) for place in (settled.target, settled.source) if place)
            raise CheckpointError(f"{out} was not made of {named}: {check.faults[0]}; name the commits it was made of")
    facts = card_facts(out, settled, check)
    text = render_card(facts, CardFile() if before.is_anothers else before, settled.to_said())
    replace_file(out / CARD_NAME, text.encode())
    return out / CARD_NAME


def existing_card(out: Path) -> CardFile:
    """Read the card in a folder; an empty one if absent.

    Raises:
        UsageError: If it cannot be read, or its head is damaged.
    """
    try:
        card = read_card(read_regular(out / CARD_NAME, MAX_CARD_BYTES).decode())
    except FileNotFoundError:
        return CardFile()
    except OSError as error:
        raise UsageError(f"cannot read {out / CARD_NAME}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise UsageError(f"{out / CARD_NAME} is not UTF-8; save it as such, or move it away") from None
    if card.is_broken and not card.is_anothers:
        raise UsageError(f"the YAML at the head of {out / CARD_NAME} cannot be read; correct it, or move the file away")
    return card


def settle_facts(options: CardOptions, before: CardFile) -> CardOptions:
    """Fill in missing options from the existing card, and pin models to their current commits.

    Raises:
        UsageError: If the card names something that is not a model.
    """

    def location(now: Location | None, name: str) -> Location | None:
        return _pinned(now) if now else location_option(before.said.get(name), f"the {name} in the card")

    return CardOptions(
        title=options.title or before.said.get("title"),
        license=options.license or license_in(before.said, ""),
        target=location(options.target, "target"),
        source=location(options.source, "source"),
    )


def _pinned(location: Location) -> Location:
    """Pin a model to its revision's current commit, so the model compared is the model named."""
    adapter = None if location.adapter is None else _pinned(location.adapter)
    info = find(location.path, location.revision) if not os.path.isdir(location.path) and is_id(location.path) else None
    return replace(location, revision=str(info.sha) if info else location.revision, adapter=adapter)


def card_facts(out: Path, options: CardOptions, check: Check | None = None) -> CardFacts:
    """Gather the facts about a result.

    Args:
        out: The result.
        options: The user's statements about it.
        check: The outcome of a comparison with its models; None if not compared.

    Raises:
        CheckpointError: If programs would load other weights than the ones described.
    """
    recipe = load_recipe(require_result(out))
    find_model(str(out)).shards()
    report = read_report(out) if (out / REPORT_NAME).is_file() else None
    manifest = read_manifest(out) if (out / MANIFEST_NAME).is_file() else None
    units, named, share, number = _transplanted(out, report, recipe, check)
    parents = parents_of(recipe, options)
    stated = [(parent.name, parent.license) for parent in parents]
    if options.license is None:
        for warning in unknown_licenses(stated):
            LOG.warning(warning)
    is_searched = bool(named) and recipe.layers is None
    return CardFacts(
        title=options.title or _title(parents),
        parents=parents,
        license=options.license or inherited(stated),
        units=units,
        edit=edit_of(recipe),
        share_changed=share,
        parameters_changed=number,
        report=report,
        recipe=public_recipe(out / RECIPE_NAME, parents, named if is_searched else {}),
        is_by_mergekits_search=is_searched,
        has_manifest=manifest is not None,
        has_lock=(out / LOCK_NAME).is_file(),
        pictures=[name for chart in charts.CHARTS if (out / (name := f"{chart.name}.png")).is_file()],
        version=report.version if report else manifest.version if manifest else __version__,
        task=parents[0].task or _task(out),
        made_by="dapa-merge" if report else "mergekit",
        settings={
            "prompts": without_paths(report.prompts if report else recipe.prompts),
            "keep": without_paths(recipe.keep or ""),
            "text": without_paths(report.after.text) if report and report.after else "",
        },
        has_template=_has_template(out),
        has_config=(out / "config.json").is_file(),
        sees=_task(out) == "image-text-to-text",
        license_files=[
            name for name in files_in(out) if "/" not in name and any(fnmatchcase(name, one) for one in LICENCES)
        ],
        code=code_files(out),
        code_elsewhere=code_elsewhere(out),
        elsewhere=_files_elsewhere(recipe),
    )


def _title(parents: Sequence[Parent]) -> str:
    """The name of a result that has none yet: its folder may be called anything."""
    *_, target = (parent for parent in parents if parent.role.startswith("target"))
    return f"{target.name.rpartition('/')[2]}, repaired"


def _files_elsewhere(recipe: Recipe) -> list[str]:
    """The names of files of a user's own that a recipe measures with."""
    values = (recipe.prompts, recipe.keep, recipe.text, recipe.skills, recipe.attacks)
    names = [part.strip() for value in values if value for part in value.split(",")]
    return sorted({without_paths(name) for name in names if is_path(name)})


def require_result(out: Path) -> Path:
    """Return the path of the recipe in a result.

    Raises:
        UsageError: If the folder is not a result.
    """
    if not out.is_dir():
        raise UsageError(no_result(out))
    if not (out / RECIPE_NAME).is_file():
        raise UsageError(f"{out} has no {RECIPE_NAME}; it is not a result of dapa-merge or mergekit")
    return out / RECIPE_NAME


def _transplanted(
    out: Path, report: Report | None, recipe: Recipe, check: Check | None
) -> tuple[Sequence[str], Mapping[str, str], float, int]:
    """The units of a result, their share of its parameters, and their number of parameters.

    Second are the parameters of a recipe that name the units, if these were found by comparing.
    """
    if report is not None:
        return report.units, {}, report.share_changed, report.parameters_changed
    if check is None:
        LOG.info(f"{out} has no {REPORT_NAME}; comparing it with its models")
        check = verify_result(out, None)
    if check.faults or check.verification is None:
        raise CheckpointError(f"{out} is not what its recipe says: {check.faults[0]}; a card would be wrong")
    plan = make_plan(recipe)
    units = join(plan, check.verification.transplanted)
    named = layer_parameters(units, tuple({unit.module for unit in units})) if units else {}
    number = num_changed(plan, units)
    return tuple(map(str, units)), named, number / plan.target.num_parameters, number


def parents_of(recipe: Recipe, options: CardOptions) -> list[Parent]:
    """The models that a recipe's result is made of, the target first, each with the facts of its own card."""
    published = {"target": options.target, "source": options.source}
    models = {role: published.get(role) or location for role, location in models_of(recipe).items()}
    return [describe_parent(name, part) for role in models for name, part in named_parts(role, models[role])]


def _task(out: Path) -> str:
    path = out / "config.json"
    config = read_json(path) if path.is_file() else {}
    return "image-text-to-text" if "vision_config" in config else "text-generation"


def _has_template(out: Path) -> bool:
    if any((out / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    path = out / "tokenizer_config.json"
    return path.is_file() and bool(read_json(path).get("chat_template"))
