"""Prompts from rows of any source: which column asks, and which tells harmful prompts from harmless ones.

Labels are read by the names and the values of columns, and by what is known of public sets. Nothing is guessed: what
looks like a label and is not understood, or may label something else than the prompt, is an error that says how to name
the column.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dapa_merge.errors import UsageError, nearest_of
from dapa_merge.measure.prompts.conversation import USER, read_messages
from dapa_merge.measure.prompts.rows import (
    CATEGORY_COLUMNS,
    PROMPT_COLUMNS,
    PromptRow,
    column_key,
    refuse_controls,
)

# Words of labels, in lower case, with blanks for hyphens and underscores.
HARMFUL_LABELS = ("harmful", "unsafe", "toxic", "malicious", "jailbreak")
HARMLESS_LABELS = (
    "harmless", "safe", "benign", "unharmful", "not harmful", "non harmful", "nontoxic", "non toxic", "not toxic",
)  # fmt: skip
PROMPT_KINDS = ("harmful", "harmless")
_HARMLESS_IN_NAME = re.compile(rf"(?<![a-z])(?:{'|'.join(HARMLESS_LABELS)}|nonharmful)(?![a-z])")
_YES, _NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")
# What WildJailbreak and XSTest-Response write before a word.
_BEFORE_LABELS = ("prompt", "vanilla", "adversarial")
# Words in the name of a column whose yes means harmful, whose yes means harmless, or that only says that it is a label.
_SAYS_HARMFUL = {
    "harm",
    "harmful",
    "harmfulness",
    "toxic",
    "toxicity",
    "unsafe",
    "jailbreak",
    "jailbreaking",
    "malicious",
}
_SAYS_HARMLESS = {"harmless", "safe", "benign", "unharmful"}
_SAYS_LABEL = {"label", "labels", "safety", "harmlessness", "refuse", "refused", "refusal", "flagged", "verdict"}
# Words in the name of a column that classes prompts otherwise.
_SAYS_TOPIC = {
    "category", "categories", "subcategory", "area", "areas", "type", "types", "subject", "topic", "hazard", "specific",
    "id", "source", "note", "reason",
}  # fmt: skip
_SAYS_PROMPT = {"prompt", "user", "input", "query", "question", "request"}
_SAYS_RESPONSE = {
    "response", "responses", "completion", "completions", "output", "outputs", "reply", "replies", "answer", "answers",
    "generation", "generations", "generated", "assistant", "bot", "llm", "model", "chosen", "rejected",
}  # fmt: skip
# Those of them that may also name who responds, or how.
_SAYS_RESPONDER = {"assistant", "bot", "llm", "model"}
# Words beside which another word of a name means its opposite, or nothing that is known: `unSafe`, `harm-free`.
_DENIES = {"not", "non", "no", "never", "without", "free", "less", "un", "in", "anti", "isn", "t"}


@dataclass(frozen=True)
class PublicSet:
    """A public set whose columns would be misread by their names alone.

    Attributes:
        name: Its name.
        columns: The keys of columns that it, and hardly another, has.
        prompts: Those that may hold the prompt, the first with text; empty for the usual ones.
        label: The prompts' label; None if all are harmful, or if its types tell them apart.
        fault: Why its prompts cannot be told apart; empty if they can.
        has_gaps: Whether some rows have no label, and are left out.
    """

    name: str
    columns: tuple[str, ...]
    prompts: tuple[str, ...] = ()
    label: str | None = None
    fault: str = ""
    has_gaps: bool = False


# A column of responses, or of several.
_RESPONSE = re.compile(r"responses?(_\w+)?|completion|(model_)?output|chosen|rejected|assistant")
_OF_RESPONSES = "label the response, not the prompt, so that nobody knows which prompts are harmful"
PUBLIC_SETS = (
    PublicSet("WildGuardMix", ("prompt", "prompt_harm_label"), label="prompt_harm_label", has_gaps=True),
    PublicSet("WildJailbreak", ("adversarial", "data_type"), ("adversarial", "vanilla"), "data_type"),
    PublicSet("ToxicChat", ("user_input", "toxicity"), ("user_input",), "toxicity"),
    PublicSet("Aegis 2.0", ("prompt", "prompt_label", "violated_categories"), label="prompt_label", has_gaps=True),
    PublicSet("XSTest-Response", ("prompt", "response", "prompt_type"), label="prompt_type"),
    PublicSet("XSTest's completions", ("prompt", "type", "completion", "final_label")),
    PublicSet("SORRY-Bench", ("turns", "prompt_style"), ("turns",)),
    PublicSet("Do-Not-Answer", ("question", "types_of_harm", "specific_harms")),
    PublicSet("BeaverTails", ("prompt", "response", "is_safe"), fault=f"its column is_safe {_OF_RESPONSES}"),
    PublicSet(
        "PKU-SafeRLHF", ("prompt", "is_response_0_safe"), fault=f"its columns is_response_..._safe {_OF_RESPONSES}"
    ),
    PublicSet(
        "OpenAI's moderation set", ("prompt", "s", "h", "v", "hr", "sh"),
        fault="it has a column for each kind of harm; add one column `label` (harmful or harmless)",
    ),
)  # fmt: skip
# Files and configurations of OR-Bench, whose rows have no labels.
KINDS_OF_NAMES = {"or-bench-80k": "harmless", "or-bench-hard-1k": "harmless", "or-bench-toxic": "harmful"}


def kind_of_name(name: str) -> str | None:
    """The kind that the name of a split, a configuration or a file implies, or None."""
    word = name.partition("[")[0].casefold()
    return KINDS_OF_NAMES.get(word) or _kind_of_word(_word(word))


@dataclass(frozen=True)
class Columns:
    """The columns of a set, as a recipe names them; None means the known names.

    Attributes:
        column: The prompt's column.
        label: The label's column; "none" if no column is one.
        category: The category's column.
        kind: "harmful" or "harmless" for all rows, regardless of their labels.
        harmful_if: The label of harmful prompts; all other labels are then harmless.
    """

    column: str | None = None
    label: str | None = None
    category: str | None = None
    kind: str | None = None
    harmful_if: str | None = None


@dataclass(frozen=True)
class Request:
    """A prompt, its kind ("harmful" or "harmless"), and its category if it has one."""

    prompt: str
    kind: str
    category: str | None


@dataclass(frozen=True)
class Requests:
    """The prompts of one source, in order.

    Attributes:
        source: A file, or a split of a dataset.
        how: What tells the kinds apart, in a few words.
        left_out: Number of rows without a label, in a public set that has such.
    """

    source: str
    requests: tuple[Request, ...]
    how: str
    left_out: int = 0

    def count(self, kind: str) -> int:
        """The number of prompts of a kind."""
        return sum(request.kind == kind for request in self.requests)

    def __str__(self) -> str:
        gaps = f"; {self.left_out} rows without a label were left out" if self.left_out else ""
        counts = " and ".join(f"{self.count(kind)} {kind}" for kind in PROMPT_KINDS)
        return f"read {counts} prompts from {self.source} ({self.how}{gaps})"


def read_requests(rows: Sequence[PromptRow], source: str, columns: Columns) -> Requests:
    """Read the prompts of one source.

    Kinds are told by a column of labels or, in XSTest without labels, by types that begin with `contrast`, or by the
    name of the file. If nothing looks like a label, all are harmful.

    Raises:
        UsageError: If a named column is missing, a row has no prompt or an unknown label, what looks like a label is
            not understood, or the labels are those of responses.
    """
    if columns.kind not in (None, *PROMPT_KINDS):
        raise UsageError(f"{source}: kind is {columns.kind!r}; it is harmful or harmless")
    table = _Table(rows, source)
    public = next((one for one in PUBLIC_SETS if table.by_key.keys() >= {*one.columns}), None)
    own = public.prompts if public is not None and columns.column is None else ()
    prompts = [table.named(columns.column)] if columns.column else table.those_of(own or PROMPT_COLUMNS)
    category = [table.named(columns.category)] if columns.category else table.those_of(CATEGORY_COLUMNS)
    if columns.label not in (None, NO_LABEL):
        table.named(str(columns.label))
    texts = [_prompt(row, prompts, table.names, may_be_empty=bool(own)) for row in rows]
    tell, how = _teller(table, columns, prompts, public)
    found = [
        Request(text, kind, _category(row, category))
        for row, text in zip(rows, texts, strict=True)
        if (kind := tell(row))
    ]
    if not found:
        raise UsageError(f"{source}: no row has a label")
    return Requests(source, tuple(found), how, len(rows) - len(found))


class _Table:
    """The rows of a source, and its columns by name and key."""

    def __init__(self, rows: Sequence[PromptRow], source: str) -> None:
        self.rows, self.source = rows, source
        self.names = list({name: None for row in rows for name in row.values if isinstance(name, str)})
        self.by_key: dict[str, list[str]] = {}
        for name in self.names:
            self.by_key.setdefault(column_key(name), []).append(name)

    def named(self, name: str) -> str:
        """The column that a recipe means by a name."""
        found = [name] if name in self.names else self.by_key.get(column_key(name), [])
        if len(found) != 1:
            raise UsageError(
                f"{self.source} has no column {name!r}{nearest_of(name, self.names)}; its columns are "
                f"{', '.join(self.names)}"
            )
        return found[0]

    def those_of(self, keys: Iterable[str]) -> list[str]:
        """The columns with these keys, in their order."""
        for key in keys:
            if len(same := self.by_key.get(key, ())) > 1:
                raise UsageError(f"{self.source} has two columns {key}: {', '.join(same)}; rename or remove one")
        return [self.by_key[key][0] for key in keys if key in self.by_key]

    def values(self, column: str) -> set[str]:
        """The values of a column as words, without empty ones."""
        return {word for row in self.rows if (word := _word(row.values.get(column)))}


Tell = Callable[[PromptRow], str | None]


def _teller(table: _Table, columns: Columns, prompts: Collection[str], public: PublicSet | None) -> tuple[Tell, str]:
    """Return a function from a row to its kind (None leaves the row out), and its rule in a few words."""
    if columns.kind is not None:
        return (lambda _: columns.kind), "all are of one kind, as named"
    if columns.label not in (None, NO_LABEL):
        return _by_label(table, table.named(str(columns.label)), harmful_if=columns.harmful_if)
    if columns.harmful_if is not None:
        raise UsageError(f"{table.source}: harmful_if={columns.harmful_if} needs the labels' column, as in ?label=NAME")
    if columns.label is None:
        if public is not None and public.fault:
            raise UsageError(f"{table.source} looks like {public.name}: {public.fault}; {_ADVICE}")
        if public is not None and public.label is not None:
            return _by_label(table, table.those_of([public.label])[0], has_gaps=public.has_gaps)
        if public is None and (label := _find_label(table, prompts)) is not None:
            return _by_label(table, label)
        types = table.those_of(["type"])
        if any(_is_contrast(row, types) for row in table.rows):
            return (lambda row: "harmful" if _is_contrast(row, types) else "harmless"), "by its types"
    stem = Path(table.source).stem
    if kind := kind_of_name(stem):
        return (lambda _: kind), "all are of one kind, by its name"
    if columns.label is None and _HARMLESS_IN_NAME.search(column_key(stem).replace("_", " ")):
        raise UsageError(f"{table.source} has no labels, and its name does not say whether all are harmless; {_ADVICE}")
    return (lambda _: "harmful"), "it has no labels" if columns.label is None else "no labels, as named"


NO_LABEL = "none"
_ADVICE = (
    "name the labels' column (?label=NAME, and &harmful_if=VALUE for other words than harmful and harmless), one kind "
    f"for all (?kind=harmful or ?kind=harmless), or ?label={NO_LABEL} if all are harmful"
)


def _by_label(table: _Table, column: str, *, harmful_if: str | None = None, has_gaps: bool = False) -> tuple[Tell, str]:
    wanted = None if harmful_if is None else _word(harmful_if)
    if wanted is not None and wanted not in (known := table.values(column)):
        raise UsageError(f"{table.source}: no {column} is {harmful_if!r}; there are {', '.join(sorted(known)[:8])}")

    def tell(row: PromptRow) -> str | None:
        word = _word(row.values.get(column))
        if not word:
            if has_gaps:
                return None
            raise UsageError(f"{row.where} has no label")
        if wanted is not None:
            return "harmful" if word == wanted else "harmless"
        if (kind := _kind_of_label(word, column)) is None:
            allowed = ", ".join((*HARMFUL_LABELS[:3], *HARMLESS_LABELS[:3]))
            raise UsageError(f"{row.where}: {column} is {word!r}; allowed are {allowed}; {_ADVICE}")
        return kind

    return tell, f"by its column {column}"


def _find_label(table: _Table, prompts: Collection[str]) -> str | None:
    """The column that labels the prompts; None if nothing looks like one."""
    others = {name: set(column_key(name).split("_")) for name in table.names if name not in prompts}
    named = {name: words for name, words in others.items() if _looks_like_label(table, name, words)}
    candidates = [name for name, words in named.items() if not words & _SAYS_RESPONSE]
    responses = [name for name, words in others.items() if name not in named and _holds_responses(name, words)]
    if responses:
        unclear = [name for name in candidates if not named[name] & _SAYS_PROMPT]
        candidates = [name for name in candidates if name not in unclear]
        if unclear and not candidates:
            raise UsageError(
                f"{table.source}: {unclear[0]} may label the {responses[0]} rather than the prompt; {_ADVICE}"
            )
    if named and not candidates:
        raise UsageError(f"{table.source}: its column {next(iter(named))} does {_OF_RESPONSES}; {_ADVICE}")
    # Also a column of another name, such as `type`, whose values are labels.
    said = candidates or [name for name in others if any(map(_is_harmless, table.values(name)))]
    understood = [name for name in said if all(_kind_of_label(word, name) for word in table.values(name))]
    if len(understood) > 1:
        for row in table.rows:
            kinds = [_kind_of_label(_word(row.values.get(name)), name) for name in understood]
            if len({*kinds}) > 1:
                raise UsageError(f"{row.where}: {' and '.join(understood)} look like labels and disagree; {_ADVICE}")
    # What looks like a label and is not understood is refused by the row where it is met.
    return next(iter(understood or said), None)


def _holds_responses(name: str, words: set[str]) -> bool:
    if _RESPONSE.fullmatch(column_key(name)):
        return True
    return not words & _SAYS_TOPIC and bool(words & (_SAYS_RESPONSE - _SAYS_RESPONDER))


def _looks_like_label(table: _Table, name: str, words: set[str]) -> bool:
    if words & _SAYS_TOPIC:
        return False
    if words & (_SAYS_HARMFUL | _SAYS_HARMLESS | _SAYS_LABEL):
        return True
    return "is" in words and len(values := table.values(name)) > 1 and values <= {*_YES, *_NO}


def _kind_of_label(word: str, column: str) -> str | None:
    """The kind that a label means, in a column of this name; None if it is not understood."""
    if kind := _kind_of_word(word):
        return kind
    words = set(column_key(column).split("_"))
    harmful, harmless = bool(words & _SAYS_HARMFUL), bool(words & _SAYS_HARMLESS)
    if word not in (*_YES, *_NO) or harmful == harmless or words & _DENIES:
        return None
    return "harmful" if harmful == (word in _YES) else "harmless"


def _kind_of_word(word: str) -> str | None:
    first, _, rest = word.partition(" ")
    word = rest if rest and first in _BEFORE_LABELS else word
    return "harmful" if word in HARMFUL_LABELS else "harmless" if word in HARMLESS_LABELS else None


def _is_harmless(word: str) -> bool:
    return _kind_of_word(word) == "harmless"


def _word(value: object) -> str:
    """A label in lower case, with blanks for hyphens and underscores; empty if absent, never long."""
    if value is None or value != value:  # Not a number stands for an absent value.
        return ""
    return re.sub(r"[\s_-]+", " ", str(value)[:60].strip()).casefold()


def _is_contrast(row: PromptRow, types: Sequence[str]) -> bool:
    return any(str(row.values.get(name)).startswith("contrast") for name in types)


def _prompt(row: PromptRow, names: Sequence[str], known: Sequence[str], *, may_be_empty: bool) -> str:
    for name in names:
        value = row.values.get(name)
        if (text := _asked(row.where, value)) is not None:
            return refuse_controls(text, row.where)
        if value is not None and not may_be_empty:
            break
    wanted = f"the column {names[0]}" if len(names) == 1 else "one of the columns prompt, goal, question, text, ..."
    raise UsageError(
        f"{row.where} has no prompt: {wanted} must hold text; the columns are {', '.join(known)} "
        "(another one: ?column=NAME)"
    )


def _asked(where: str, value: object) -> str | None:
    """The text of a prompt: a string, a list of those of the user, or a list of chat messages; None if empty."""
    if isinstance(value, str):
        return value if value.strip() else None
    if not isinstance(value, list) or not value:
        return None
    texts = [text for text in value if isinstance(text, str)]
    if not texts and all(isinstance(message, Mapping) for message in value):
        return read_messages(value, where)
    if len(texts) != len(value):
        return None
    if len(texts) > 1:
        # As in MT-Bench: each is put after the model's own answer to the one before.
        return read_messages([{"role": USER, "content": text} for text in texts], where)
    return texts[0] if texts and texts[0].strip() else None


def _category(row: PromptRow, names: Sequence[str]) -> str | None:
    for name in names:
        value = row.values.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
            return refuse_controls(str(value).strip(), row.where, "category")
    return None
