"""A parsed recipe: which model to repair, from which, and the limits of the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path

from dapa_merge.checkpoint.location import Location
from dapa_merge.checkpoint.units import AUTO
from dapa_merge.errors import RecipeError, UsageError
from dapa_merge.recipe.asking import NO_TEMPLATE, read_template
from dapa_merge.recipe.attacks import NONE
from dapa_merge.recipe.constraints import CONSTRAINTS
from dapa_merge.recipe.parameters import PARAMETERS, LayerChoice

METHOD = "dapa"


_LIMITS = [(one.key, "float | None", field(default=one.default, kw_only=True)) for one in CONSTRAINTS]


@dataclass(frozen=True)
class Recipe(make_dataclass("Limits", _LIMITS, frozen=True)):  # type: ignore[misc]
    """Which model to repair, from which, and the limits of the result.

    Attributes:
        target: mergekit's `base_model`.
        source: The aligned model, the one entry of mergekit's `models`.
        dtype: mergekit's `dtype`, which must be the target's own.
        layers: The units to transplant, or None to search.
        modules: The modules of a layer that are units; `("auto",)` for those that `auto_modules` finds in the target;
            empty for those of each rung, if the edit is `auto`.
        granularity: The finest units of a search: `layer`, `expert`, or `block:N` for blocks of N rows.
        edit: Name of an edit, or `auto` for those of `LADDER`.
        directions: A file of directions that an earlier search chose, absolute or next to the recipe.
        strength: Share of the edit's change to apply, in (0, 2]; a copy of a strength other than 1 is a blend.
        max_overflow: Number of overflowing values that may be clamped to the largest of the target's dtype.
        evaluator: Name of the evaluator that scores a candidate.
        prompts: Name or path of the prompt set.
        keep: Name or path of prompts that the fine-tune is for, or `skills`; None for the harmless prompts.
        confirm: Share of the prompts held out from the search, for the report, in (0, 1).
        retain: Share of the full transplant's gain in DSR that must be kept, in (0, 1].
        max_over_refusal: Rise of over-refusal allowed over the target's own, in [0, 1].
        max_perplexity: Perplexity allowed, as a ratio to the target's own, at least 1.
        max_divergence: Divergence from the target allowed, in nats per token; None for any.
        min_skill: Share of the target's own skill to keep, in (0, 1]; None for any.
        search: Name of the algorithm.
        prefer: A module that is searched alone if its units suffice.
        max_tests: Number of tests after which the search ends, proved minimal or not; None for no limit.
        max_new_tokens: Length at which responses are cut off; None for the evaluator's own.
        batch_size: Prompts answered at once; None to find the best.
        text: The text whose perplexity the report gives; None for the prompts' own passages, or a text from the Hub.
        skills: Further tests for the report: files of questions and lm-evaluation-harness tasks, separated by commas.
        attacks: Attacks that the report tries on the models: kinds of `ATTACKS` and files, separated by commas, or
            `none`.
        system: A system message before every prompt and question; None for none.
        chat_template: A file, absolute or next to the recipe, with the chat template that target and source are asked
            with in place of their own; `none` to ask without one; None for their own.
        pretrained: The model that target and source were fine-tuned from; read by some edits and `dapa-merge compare`.
        keeps_tokenizer: Whether mergekit is told to keep the target's tokenizer (`tokenizer: {source: base}`).
    """

    target: Location
    source: Location
    dtype: str | None = None
    layers: tuple[LayerChoice, ...] | None = None
    modules: tuple[str, ...] = ("gate",)
    granularity: str = "layer"
    edit: str = "copy"
    directions: str | None = None
    strength: float = 1.0
    max_overflow: int = 0
    evaluator: str = "refusal"
    prompts: str = "builtin"
    keep: str | None = None
    confirm: float = 0.5
    search: str = "guided"
    prefer: str | None = None
    max_tests: int | None = None
    max_new_tokens: int | None = None
    batch_size: int | None = None
    text: str | None = None
    skills: str | None = None
    attacks: str = NONE
    system: str | None = None
    chat_template: str | None = None
    pretrained: Location | None = None
    keeps_tokenizer: bool = False
    _lines: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    _folder: Path | None = field(default=None, compare=False, repr=False)

    @property
    def is_auto(self) -> bool:
        """Whether its modules are those that the target turns out to have."""
        return self.modules == (AUTO,)

    @property
    def rows_per_block(self) -> int | None:
        """Rows of the search's smallest blocks, or None if units stay whole."""
        _, _, number = self.granularity.partition(":")
        return int(number) if number else None

    @property
    def directions_file(self) -> Path | None:
        """The file of directions; a relative name is looked for next to the recipe, and then in the current folder."""
        return None if self.directions is None else self._beside(self.directions)

    def _beside(self, name: str) -> Path:
        beside = (self._folder or Path()) / name
        return beside if beside.exists() else Path(name)

    @property
    def template_file(self) -> Path | None:
        """The file of its chat template, looked for as `directions_file`; None without one."""
        if self.chat_template is None or self.chat_template == NO_TEMPLATE:
            return None
        return self._beside(self.chat_template)

    def template(self) -> str | None:
        """The text of its chat template; empty for `none`, None if it has none.

        Raises:
            RecipeError: If the file cannot be read, or is empty.
        """
        if (file := self.template_file) is None:
            return None if self.chat_template is None else ""
        try:
            return read_template(file)
        except UsageError as error:
            raise RecipeError(f"{self.where('parameters.chat_template')}: {error}") from None

    def where(self, *keys: str) -> str:
        """The first of `keys` that the recipe has, with file and line if known, for messages."""
        key = next((key for key in keys if key in self._lines), keys[0])
        place = self._lines.get(key)
        return key if place is None else f"{place}: {key}" if place else key.rpartition(".")[2]


DEFAULTS = {item.name: item.default for item in fields(Recipe) if item.name in PARAMETERS}
