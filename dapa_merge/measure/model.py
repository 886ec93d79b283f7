"""One whole model measured: a folder, a Hub id, or a resident candidate."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dapa_merge.checkpoint.convert import open_location
from dapa_merge.checkpoint.location import parse_location
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.checkpoint.units import Unit
from dapa_merge.errors import UsageError
from dapa_merge.measure.callback import Candidate
from dapa_merge.progress import LOG, task
from dapa_merge.recipe.options import Options

if TYPE_CHECKING:
    from dapa_merge.measure.figures import Figures, Response
    from dapa_merge.measure.live import LiveModel
    from dapa_merge.measure.meter import Meter


@dataclass(frozen=True)
class MeasuredModel:
    """A model's figures, and the responses behind them; the model itself may be gone."""

    figures: Figures
    responses: Sequence[Response]


def measure_live(live: LiveModel, selection: Sequence[Unit], meter: Meter, name: str) -> MeasuredModel:
    """The target with a selection transplanted, measured in full."""
    with live.transplanted(selection) as model:
        return measure_candidate(Candidate(model, live.tokenizer, tuple(selection)), meter, name)


def measure_checkpoint(checkpoint: Checkpoint, meter: Meter, device: str, name: str) -> MeasuredModel:
    """A model that is loaded for it, measured in full."""
    from dapa_merge.measure.live import choose_device, load_model
    from dapa_merge.progress import quiet

    LOG.info(f"loading the {name} {checkpoint.name}")
    model, tokenizer = load_model(checkpoint, choose_device(device))
    with quiet("transformers"):
        return measure_candidate(Candidate(model, tokenizer, ()), meter, name)


def measure_candidate(candidate: Candidate, meter: Meter, name: str, level: int = logging.INFO) -> MeasuredModel:
    """A model in memory, measured in full."""
    prompts = meter.prompts
    total = len(prompts.harmful) + len(prompts.harmless) + sum(skill.num_questions for skill in meter.skills)
    with task(f"measuring the {name}", total, "prompts"):
        measurement = meter.measure(candidate.model, candidate.tokenizer, candidate.selection)
        figures = measurement.figures()
    LOG.log(level, f"measured the {name}: DSR {figures.dsr:.3f}, over-refusal {figures.over_refusal:.3f}")
    return MeasuredModel(figures, measurement.responses())


def responses_text(responses: Mapping[str, Sequence[Response]]) -> str:
    """Every prompt, response and verdict as JSON lines, by the names of the models."""
    lines = [
        json.dumps({"model": model} | asdict(response), ensure_ascii=False)
        for model, said in responses.items()
        for response in said
    ]
    return "".join(line + "\n" for line in lines)


def evaluate_model(model: str, prompts: str, options: Options, **settings: Any) -> MeasuredModel:
    """All figures of one model: a folder or a Hub id, as `id@revision` if need be.

    Args:
        model: Where it is.
        prompts: Name of the prompt set.
        options: Where and how to measure.
        settings: Further arguments of `make_meter`.

    Raises:
        DapaError: If it cannot be read, loaded or asked.
    """
    from dapa_merge.measure.prompts.sets import load_prompts

    prompt_set = load_prompts(prompts)
    try:
        checkpoint = open_location(parse_location(model), allow_pickle=options.allow_pickle)
    except ValueError:
        raise UsageError(f"{model!r} is no model; write a folder, a Hub id or id@revision") from None
    from dapa_merge.measure.meter import make_meter

    return measure_checkpoint(checkpoint, make_meter(prompt_set, options, **settings), options.device, "model")
