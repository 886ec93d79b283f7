"""Measures models by their names, local or served, side by side and on the same prompts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapa_merge.checkpoint.convert import open_location
from dapa_merge.checkpoint.location import parse_location
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.errors import UsageError
from dapa_merge.imports import Shown
from dapa_merge.measure.callback import Candidate
from dapa_merge.measure.confined import template_fault
from dapa_merge.measure.expected import Calibration, Expected, bytes_to_fetch
from dapa_merge.measure.figures import Change
from dapa_merge.measure.live import choose_device
from dapa_merge.measure.meter import MeasuredModel, Measurement, Meter, make_meter, measure_checkpoint, measure_in_full
from dapa_merge.measure.perplexity import Reading
from dapa_merge.measure.placement import weight_bytes
from dapa_merge.measure.prompts.conversation import opening_of
from dapa_merge.measure.prompts.sets import PromptSet, asked_after, load_prompts, read_json, tell_prompts
from dapa_merge.measure.skills import named_task_files
from dapa_merge.measure.statistics import change_of
from dapa_merge.progress import LOG, begin, end
from dapa_merge.recipe.asking import NO_TEMPLATE, Asking, ServedModel, read_template
from dapa_merge.recipe.attacks import Attack
from dapa_merge.recipe.options import Options

if TYPE_CHECKING:
    from dapa_merge.measure.served import Served


@dataclass(frozen=True)
class Evaluated(Shown):
    """Models that were measured on the same prompts.

    Attributes:
        models: Each model and its measurement, in the order of the names.
        changes: From the first to each other model: of DSR, and of over-refusal.
        asking: How they were asked.
    """

    models: Mapping[str, MeasuredModel]
    changes: Mapping[str, tuple[Change, Change]]
    asking: Asking

    def to_json(self) -> dict[str, Any]:
        """Plain data: of a single model its figures, of several a list of them and their changes."""
        asking = {"asking": found} if (found := self.asking.to_json()) else {}
        first, *_ = self.models.values()
        read = {"read": list(first.read)}
        if len(self.models) == 1:
            return {**asdict(first.figures), **read, **asking}
        return {
            "models": [{"model": name, **asdict(one.figures)} for name, one in self.models.items()],
            "changes": [
                {"to": name, "dsr_change": asdict(dsr), "over_refusal_change": asdict(over_refusal)}
                for name, (dsr, over_refusal) in self.changes.items()
            ],
            **read,
            **asking,
        }


def evaluate_model(model: str, prompts: str, options: Options, **settings: Any) -> MeasuredModel:
    """Measure one model, a folder or Hub id, in full; `settings` are further arguments of `make_meter`.

    Raises:
        DapaError: If the model cannot be read, loaded or run.
    """
    (measured,) = evaluate_models([model], prompts, options, **settings).models.values()
    return measured


def evaluate_models(
    models: Sequence[str | ServedModel],
    prompts: str,
    options: Options,
    *,
    asking: Asking | None = None,
    tell: Callable[[str, MeasuredModel], object] = lambda *_: None,
    **settings: Any,
) -> Evaluated:
    """Measure models in full, one in memory at a time.

    Args:
        models: Folders, Hub ids, or served models; all distinct.
        prompts: As in a recipe.
        options: Of the command line.
        asking: How they are asked.
        tell: Called with each model's name and figures as soon as they are there.
        settings: Further arguments of `make_meter`.

    Raises:
        DapaError: If a model cannot be read, loaded, reached or run; what was measured before has been told.
    """
    asking = asking or Asking()
    if repeated := next((str(one) for one in models if list(map(str, models)).count(str(one)) > 1), None):
        raise UsageError(f"{repeated} is named twice; name each model once")
    # Whoever names a task file in an option trusts it; in a recipe it is refused.
    named = [*map(named_task_files, (settings.get("skills"), settings.get("evaluator")))]
    options = replace(options, task_files=(*options.task_files, *(file for files in named for file in files)))
    prompt_set = _limited(asked_after(load_prompts(prompts), asking.system, asking.chat_template), asking.limit)
    template = _template(asking.chat_template)
    opened = {str(one): None if isinstance(one, ServedModel) else _opened(one, options, template) for one in models}
    local = [checkpoint for checkpoint in opened.values() if checkpoint is not None]
    meter = make_meter(prompt_set, options, models=local, sampling=asking.sampling, **settings)
    skills = tuple(replace(one, questions=_spread(one.questions, asking.limit)) for one in meter.skills)
    meter = replace(meter, skills=skills)
    served = [one for one in models if isinstance(one, ServedModel)]
    if served:
        _check_servable(meter, asking)
        if not local and options.where.arithmetic is not None:
            raise UsageError(
                f"{options.where.arithmetic} is for models that are measured here; leave it out for a served one"
            )
    tell_prompts(prompt_set)
    read = read_json(prompt_set)
    found: dict[str, MeasuredModel] = {}
    with _expected(opened, meter, options).told():
        whole = {name: checkpoint and checkpoint.whole() for name, checkpoint in opened.items()}
        for one in models:
            name = str(one)
            begin(name)
            checkpoint = whole[name]
            if isinstance(one, ServedModel):
                measured = _measure_served(one, meter)
            else:
                assert checkpoint is not None
                measured = measure_checkpoint(checkpoint, meter, options.where, "model")
            end()
            found[name] = replace(measured, read=read)
            tell(name, found[name])
    (_, first), *others = found.items()
    kinds = ("harmful", "harmless")
    changes = {
        name: (change_of(kinds[0], first.responses, one.responses), change_of(kinds[1], first.responses, one.responses))
        for name, one in others
    }
    return Evaluated(found, changes, asking)


def _expected(opened: Mapping[str, Checkpoint | None], meter: Meter, options: Options) -> Expected:
    """The estimate for measuring models; how fast a served one answers, nobody knows before."""
    local = [one for one in opened.values() if one is not None]
    parts = {name: {"prompts": meter.num_prompts} for name in opened}
    if not local:
        return Expected(parts, {}, 0, 0, "")
    device = choose_device(options.device)
    seconds = [Calibration(one, device, options.dtype).answer_seconds(meter.max_new_tokens) for one in local]
    memory = max(weight_bytes(one, options.where) for one in local)
    return Expected(parts, {"prompts": statistics.mean(seconds)}, memory, bytes_to_fetch(local), device.type)


def _template(name: str | None) -> str | None:
    """The text of a chat template; empty for `none`, None for the models' own."""
    if name is None or name == NO_TEMPLATE:
        return None if name is None else ""
    text = read_template(Path(name))
    if fault := template_fault(text):
        raise UsageError(f"the chat template {name} {fault}")
    return text


def _opened(model: str, options: Options, template: str | None) -> Checkpoint:
    """The model, of which weights on the Hub are not fetched yet."""
    try:
        location = parse_location(model)
    except ValueError:
        raise UsageError(f"{model!r} is not a model: pass a folder, a Hub id or id@revision") from None
    opened = open_location(location, partial=True, allow_pickle=options.allow_pickle)
    return replace(opened, chat_template=template)


def _limited(prompts: PromptSet, limit: int | None) -> PromptSet:
    return replace(
        prompts,
        harmful=_spread(prompts.harmful, limit),
        harmless=_spread(prompts.harmless, limit),
        skill=_spread(prompts.skill, limit),
    )


def _spread(items: tuple[Any, ...], limit: int | None) -> tuple[Any, ...]:
    """At most so many items, evenly from all: sets are sorted by category."""
    if limit is None or len(items) <= limit:
        return items
    return tuple(items[index * len(items) // limit] for index in range(limit))


def _check_servable(meter: Meter, asking: Asking) -> None:
    if meter.scorer is not None:
        raise UsageError(
            f"the evaluator {meter.scorer.name} needs the model in memory, and a served one is not; use refusal, paper "
            f"or judge"
        )
    if harness := next((skill.name for skill in meter.skills if skill.harness is not None), None):
        raise UsageError(f"{harness} needs the model in memory, and a served one is not; name files of questions")
    if asking.chat_template is not None:
        raise UsageError("a served model is asked with its server's chat template; leave out --chat-template")


def _measure_served(model: ServedModel, meter: Meter) -> MeasuredModel:
    try:
        from dapa_merge.measure.served import Served
    except ImportError as error:
        raise UsageError("a served model needs the package openai; install it with: pip install openai") from error
    with ExitStack() as stack:
        served = Served(
            model.name,
            model.url,
            max_new_tokens=meter.max_new_tokens,
            sampling=meter.sampling,
            concurrency=model.concurrency,
        )
        served.prepare()
        LOG.info(f"asking the served model {model.name}")
        stack.enter_context(served)
        _check_openings(served, meter)
        return measure_in_full(_ServedMeasurement(served, meter), meter, "served model")


def _check_openings(served: Served, meter: Meter) -> None:
    """Raise `UsageError` if prompts begin the answer, and the server does not go on with it."""
    questions = [question.prompt for skill in meter.skills for question in skill.questions]
    begun = [prompt for prompt in (*meter.prompts.harmful, *meter.prompts.harmless, *questions) if opening_of(prompt)]
    if begun and (why := served.why_not_continued()):
        raise UsageError(
            f"{len(begun)} prompts have the beginning of an answer, which {served.model} cannot be given: "
            f"{why}; leave these out, or measure the model itself"
        )


class _ServedMeasurement(Measurement):
    """Figures of a served model: those that need only its answers."""

    def __init__(self, served: Served, meter: Meter) -> None:
        # Nothing below reads a model.
        super().__init__(meter, Candidate(None, None, ()))
        self._served = served

    def _ask(self, prompts: Sequence[str], *, whole: bool) -> Sequence[str | None]:
        del whole
        return self._served.ask(prompts)

    def _can_try(self, attack: Attack) -> bool:
        if not attack.opening or (why := self._served.why_not_continued()) is None:
            return True
        LOG.warning(f"{self._served.model} cannot be given the beginning of an answer: {why}; not asked: {attack.name}")
        return False

    @cached_property
    def score(self) -> float | None:
        """None: a scorer needs the model."""
        return None

    @cached_property
    def divergence(self) -> float:
        """NaN, without a target."""
        return math.nan

    @cached_property
    def _reading(self) -> Reading:
        return Reading(math.nan, is_cut=False)

    @property
    def _text(self) -> str:
        return ""
