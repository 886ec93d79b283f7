"""What a recipe does not say about its run, because other machines have something else."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dapa_merge.evaluate.options import EvaluatorOptions


@dataclass(frozen=True)
class SearchOptions:
    """Where and how to search and measure.

    Attributes:
        device: Where to evaluate; `auto` takes an accelerator if there is one.
        journal: The file of the journal; None for one in the user's cache folder.
        uses_ray: Whether Ray actors test, each with a target of its own, rather than this process.
        num_workers: How many; None for one on each GPU or, without GPUs, on each node.
        evaluators: Where evaluators of the user's own are, and which judge to ask.
        allow_pickle: Whether weights that there are as pickles only are read, as nothing but tensors.
    """

    device: str = "auto"
    journal: Path | None = None
    uses_ray: bool = False
    num_workers: int | None = None
    evaluators: EvaluatorOptions = field(default_factory=EvaluatorOptions)
    allow_pickle: bool = False
