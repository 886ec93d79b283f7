"""Means over prompts with their 95 % intervals, of traces also token by token: prompts have tokens of the same role.

No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy

from dapa_merge.evaluate.chance import LEVEL

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dapa_merge.trace.causal import Trace

# In the order of a prompt. Tokens before the subject have no role: restoring them changes nothing.
ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "next token",
    "further tokens",
    "last token",
)


@dataclass(frozen=True)
class Mean:
    """A mean over prompts for each cell, and where the mean of many more prompts like these lies with 95 % confidence.

    Attributes:
        mean: NaN where there was no prompt.
        low: NaN where there were less than two.
        high: Likewise.
        number: How many prompts each cell is the mean of.
    """

    mean: NDArray[numpy.float64]
    low: NDArray[numpy.float64]
    high: NDArray[numpy.float64]
    number: NDArray[numpy.int64]


def mean_of(values: NDArray[numpy.floating]) -> Mean:
    """The mean along the first axis, that of the prompts, and its interval (Student's t); NaN values do not count."""
    from scipy.stats import t

    values = numpy.asarray(values, numpy.float64)
    number = numpy.sum(~numpy.isnan(values), axis=0)
    with numpy.errstate(invalid="ignore", divide="ignore"):
        mean = numpy.nansum(values, axis=0) / number
        deviation = numpy.sqrt(numpy.nansum((values - mean) ** 2, axis=0) / (number - 1))
        half = t.ppf(1 - LEVEL / 2, numpy.maximum(number - 1, 1)) * deviation / numpy.sqrt(number)
    half = numpy.where(number > 1, half, math.nan)
    return Mean(mean, mean - half, mean + half, number)


def roles_of(subject: tuple[int, int], num_tokens: int) -> list[int | None]:
    """For each token of a prompt the index of its role in `ROLES`; None before the subject.

    A subject of one token is its last; a token with two roles, such as the last one behind the subject, has the later.
    """
    first, stop = subject
    roles: list[int | None] = [None] * first
    for index in range(first, num_tokens):
        if index == num_tokens - 1:
            roles.append(5)
        elif index < stop:
            roles.append(2 if index == stop - 1 else 0 if index == first else 1)
        else:
            roles.append(3 if index == stop else 4)
    return roles


def mean_effect(traces: Sequence[Trace], kind: str) -> Mean:
    """The mean effect of restoring a kind, in nats, `[layers, roles]`; a prompt's tokens of one role are averaged."""
    return mean_of(numpy.stack([_by_role(trace, kind) for trace in traces]))


def layer_scores(traces: Sequence[Trace], kind: str) -> list[float]:
    """How much each layer matters by tracing: its mean effect at the role where that is largest; NaN for none.

    Where the noise makes a model refuse more, what takes that back counts.
    """
    sign = 1 if sum(trace.total_effect for trace in traces) >= 0 else -1
    means = sign * mean_effect(traces, kind).mean
    return [float(numpy.nanmax(of)) if not numpy.isnan(of).all() else math.nan for of in means]


def _by_role(trace: Trace, kind: str) -> NDArray[numpy.float64]:
    effect = trace.effect(kind)
    roles = roles_of(trace.subject, len(trace.tokens))
    result = numpy.full((len(effect), len(ROLES)), math.nan)
    for role in range(len(ROLES)):
        tokens = [index for index, one in enumerate(roles) if one == role]
        if tokens:
            result[:, role] = effect[:, tokens].mean(axis=1)
    return result
