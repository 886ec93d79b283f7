"""A recipe, once it is read: what to repair, with what, and how well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from dapa_merge.checkpoint.location import Location
from dapa_merge.recipe.parameters import PARAMETERS, LayerChoice

METHOD = "dapa"


@dataclass(frozen=True)
class Recipe:
    """What to repair, with what, and how well; immutable.

    Attributes:
        target: mergekit's `base_model`.
        source: The one other model.
        dtype: mergekit's `dtype`, which must be the target's own.
        layers: What to transplant, or None to search.
        modules: Which modules of a layer are units.
        granularity: How fine the units of a search get: `layer`, `expert`, or `block:N` for blocks of N rows.
        edit: Name of how new values are computed.
        strength: How much of the edit's change is made, in (0, 2]; a copy of another strength than 1 is a blend.
        max_overflow: How many values that the target's dtype cannot hold may be cut to the largest that it can.
        evaluator: Name of what scores a candidate.
        prompts: Name or path of the prompt set.
        confirm: Share of the prompts that is kept out of a search, for the report on what it found, in (0, 1).
        retain: Share of the full transplant's gain in DSR that must be kept, in (0, 1].
        max_over_refusal: Rise of over-refusal allowed over the target's own, in [0, 1].
        max_perplexity: Perplexity allowed, as a ratio to the target's own, at least 1.
        search: Name of the algorithm.
        prefer: A module whose units are searched alone if they are enough.
        max_tests: The search ends after so many tests, proved minimal or not; None for no limit.
        max_new_tokens: Where responses are cut off; None for the evaluator's own number.
        batch_size: Prompts that are answered at once; None for as many as is best.
        text: What the report takes perplexity of; None for the prompts' own passages, or a text of the Hub's.
        skills: What else the report tests: files of questions and lm-evaluation-harness tasks, with commas.
        pretrained: What target and source were both fine-tuned from; read by some edits, and by `dapa-merge compare`.
        keeps_tokenizer: Whether mergekit is told to keep the target's tokenizer (`tokenizer: {source: base}`).
    """

    target: Location
    source: Location
    dtype: str | None = None
    layers: tuple[LayerChoice, ...] | None = None
    modules: tuple[str, ...] = ("gate",)
    granularity: str = "layer"
    edit: str = "copy"
    strength: float = 1.0
    max_overflow: int = 0
    evaluator: str = "refusal"
    prompts: str = "builtin"
    confirm: float = 0.5
    retain: float = 0.95
    max_over_refusal: float = 0.05
    max_perplexity: float = 1.05
    search: str = "guided"
    prefer: str | None = None
    max_tests: int | None = None
    max_new_tokens: int | None = None
    batch_size: int | None = None
    text: str | None = None
    skills: str | None = None
    pretrained: Location | None = None
    keeps_tokenizer: bool = False
    _lines: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rows_per_block(self) -> int | None:
        """Rows of a block that the search may end with, or None if its units stay whole."""
        _, _, number = self.granularity.partition(":")
        return int(number) if number else None

    def where(self, *keys: str) -> str:
        """The place of the first of `keys` that the recipe has, for messages: file and line if known, and the key."""
        key = next((key for key in keys if key in self._lines), keys[0])
        return f"{self._lines[key]}: {key}" if key in self._lines else key


DEFAULTS = {item.name: item.default for item in fields(Recipe) if item.name in PARAMETERS}
