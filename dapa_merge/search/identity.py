"""The journal of a recipe's search: its place, and everything that identifies it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from dapa_merge import __version__
from dapa_merge.checkpoint.digest import settings_digest, tensors_digest
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.files import cache_folder
from dapa_merge.measure.divergence import MAX_NEW_TOKENS
from dapa_merge.measure.live import choose_device
from dapa_merge.measure.meter import Meter
from dapa_merge.measure.placement import spread_over
from dapa_merge.measure.prompts.parts import split_prompts
from dapa_merge.plan.plan import Plan
from dapa_merge.progress import LOG, task
from dapa_merge.recipe.options import Where
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.bench import Bench
from dapa_merge.search.journal import Journal, JournalUnavailable, check_writable, name_of
from dapa_merge.search.requirement import identity_of, refers
from dapa_merge.search.slopes import Settings


def open_journal(recipe: Recipe, plan: Plan, bench: Bench, path: Path | None, possible: float | None = None) -> Journal:
    """The journal of a recipe's search: the given file, or one in the user's cache folder if that can be written.

    Args:
        recipe: Its limits decide verdicts.
        plan: The models, the units and the edit.
        bench: What candidates are tested with.
        path: The file; None for the cache folder.
        possible: As `Session.possible`.

    Raises:
        UsageError: If a given file belongs to another search, is damaged, or cannot be written.
    """
    if path is not None:
        # Checked first: reading large checkpoints takes minutes.
        check_writable(path)
    parts = _parts(recipe, plan, bench) | ({} if possible is None else {"possible": str(possible)})
    if path is not None:
        return telling(Journal(path, parts))
    try:
        return telling(Journal(_cached(parts), parts))
    except JournalUnavailable as error:
        LOG.info(f"{error}; this search is not recorded, and starts again if it is killed")
        return Journal()


def telling(journal: Journal) -> Journal:
    """Log what a journal has of an earlier run, rather than of an earlier try of this one, and return it."""
    tests, notes = (len(journal.earlier & known.keys()) for known in (journal.tests, journal.notes))
    if tests or notes:
        LOG.info(
            f"an earlier run recorded {tests} tests and other measurements ({notes}) of this search in the journal "
            f"{journal.path}: it goes on from there, in less time"
        )
    return journal


def take_over(journal: Journal) -> tuple[int, float]:
    """Take over what `run` or `search` recorded of the same search in the user's cache folder: `Journal.take_over`."""
    path = _cached(journal.parts)
    number, seconds = (0, 0.0) if path == journal.path else journal.take_over(path)
    if number:
        LOG.info(f"{number} measurements of the same search are taken over from the journal {path}")
    return number, seconds


def _cached(parts: Mapping[str, str]) -> Path:
    return cache_folder("journals") / name_of(parts)


def _parts(recipe: Recipe, plan: Plan, bench: Bench) -> dict[str, str]:
    """Everything that affects a verdict, by name."""
    names: dict[str, set[str]] = {name: set() for name in plan.others}
    for regions in plan.regions(plan.units):
        for name, of_model in names.items():
            of_model.add(regions[name].tensor.name)
    read = [plan.models[name].tensors[tensor].num_bytes for name, of_model in names.items() for tensor in of_model]
    with task("reading the checkpoints", plan.target.num_bytes + sum(read), "bytes"):
        parts = {name: tensors_digest(checkpoint, names.get(name)) for name, checkpoint in plan.models.items()}
    parts |= {key: str(value) for key, value in plan.edit.to_json().items()}
    prompts = bench.meter.prompts
    asked: list[Iterable[object]] = [prompts.harmful, prompts.harmless, [asdict(text) for text in prompts.passages]]
    if refers(recipe):
        parts["keep"] = data_digest([bench.meter.keep, MAX_NEW_TOKENS])
    if plan.target.chat_template is not None:
        parts["chat template"] = data_digest(plan.target.chat_template)
    if bench.meter.skills:
        parts["skill"] = data_digest([asdict(question) for one in bench.meter.skills for question in one.questions])
    if plan.edit.chooses and (choice := split_prompts(recipe).choice) is not None:
        parts["choice"] = data_digest([choice.harmful, choice.harmless, choice.keep, asdict(Settings())])
    return parts | {
        "strength": f"{plan.edit.strength} {plan.max_overflow}",
        "tokenizer and config": settings_digest(plan.target),
        "prompts": data_digest(asked),
        "evaluator": bench.meter.identity,
        "units": data_digest([str(unit) for unit in plan.units]),
        "limits": identity_of(recipe),
        "generation": f"greedy, {bench.meter.max_new_tokens} tokens, batches of {bench.meter.batch_size.limit}",
        "device": bench.device_kind,
        "versions": versions(),
        **bench.where.parts,
    }


def models_parts(recipe: Recipe, models: Mapping[str, Checkpoint], meter: Meter, where: Where) -> dict[str, str]:
    """Everything that affects the figures of a recipe's models, by name, whatever the edit."""
    with task("reading the checkpoints", sum(model.num_bytes for model in models.values()), "bytes"):
        weights = {name: tensors_digest(model) for name, model in models.items()}
    # The batch size affects only rounding, so a folder can be resumed with a smaller one after a shortage of memory.
    others = (*models, "pretrained", "batch_size", "chat_template", "_lines", "_folder")
    said = {name: value for name, value in asdict(recipe).items() if name not in others}
    # All of them are asked with the same template, and laid out alike.
    first = next(iter(models.values()))
    if (template := first.chat_template) is not None:
        weights["chat template"] = data_digest(template)
    if refers(recipe):
        weights["keep"] = data_digest([meter.keep, MAX_NEW_TOKENS])
    return weights | {
        "tokenizers and configs": " ".join(map(settings_digest, models.values())),
        "recipe": data_digest(said),
        "prompts": data_digest([meter.prompts.harmful, meter.prompts.harmless]),
        "text": data_digest(asdict(meter.text) if meter.text else [asdict(text) for text in meter.prompts.passages]),
        "skills": data_digest([repr(skill) for skill in meter.skills]),
        # Includes the user's own code and a judge's rubric.
        "evaluator": data_digest([meter.identity, *(one.identity for one in meter.classifiers)]),
        "generation": f"greedy, {meter.max_new_tokens} tokens",
        "device": spread_over(first, where) or choose_device(where.device).type,
        "versions": versions(),
        **where.parts,
    }


def versions() -> str:
    """Versions of this package and of the computing packages, which affect rounding."""
    return f"dapa-merge {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"


def data_digest(content: object) -> str:
    """The SHA-256 of plain data."""
    return "sha256 " + hashlib.sha256(json.dumps(content).encode()).hexdigest()
