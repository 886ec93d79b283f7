"""The offline page of a run's responses: every prompt with the models' answers side by side, in one HTML file.

The page loads nothing: its policy allows only the script and the style within it, and pictures as `data:`. Prompts,
responses and names are hostile input. They travel as JSON that cannot end its element, and are shown as text only;
what moves a cursor or turns the direction of writing is escaped before. Answers that may do harm are folded away. The
page holds no figures of its own making but shares and their intervals; the others are the report's.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from dapa_merge import __version__
from dapa_merge.errors import CheckpointError, UsageError, printable, why_unreadable
from dapa_merge.files import nearest_here, refuse_special
from dapa_merge.measure.figures import KEEP, Response
from dapa_merge.measure.refusal.classify import Outcome
from dapa_merge.measure.statistics import count, interval
from dapa_merge.recipe.parameters import spans
from dapa_merge.report.charts import CHARTS
from dapa_merge.report.report import REPORT_NAME, Report, read_report
from dapa_merge.report.sentences import meaning_lines, prompts_name
from dapa_merge.report.tables import TableRow, category_rows, change_lines, figure_rows, moved_text, span
from dapa_merge.transplant.manifest import PAGE_NAME, RESPONSES_NAME

# The responses of four models to fifty thousand prompts of the usual length; a browser takes some seconds for them.
MAX_BYTES = 64 << 20
MAX_PICTURE_BYTES = 4 << 20
# What stays as it is beside what `str.isprintable` allows: lines, the spaces of other scripts, and joiners, without
# which Persian, Hindi and many emoji fall apart.
KEPT = "\n\t\u00a0\u202f\u3000\u200c\u200d"
# The beginning of every page, by which a command knows its own.
BEGINS = "<!doctype html>\n<!-- dapa-merge: responses -->\n"
LABELS = {"target": "before", "result": "after", "source": "source"}
_PAIR = ("target", "result")
_HARMLESS = "harmless"
_KEYS = ("model", "kind", "category", "prompt", "response", "outcome")
_PNG = b"\x89PNG\r\n\x1a\n"

Responses = Mapping[str, Sequence[Response]]


def page_text(
    title: str, models: Responses, report: Report | None = None, pictures: Mapping[str, bytes] | None = None
) -> str:
    """The page as HTML.

    Args:
        title: Its title, such as the result's name.
        models: Responses by the name of the model; `target`, `result` and `source` of a run are shown as before, after
            and source, and the first two are compared.
        report: The run's report. Without one, the figures are counted from the responses.
        pictures: The contents of the run's charts by file name, of which those in PNG are shown.

    Raises:
        UsageError: If there are no responses, or too many for a page.
    """
    if not any(models.values()):
        raise UsageError("there are no responses to show; name the responses of a run or of `evaluate --responses`")
    data = _data(models)
    if len(data) > MAX_BYTES:
        raise UsageError(
            f"the responses take {len(data) / 1e6:.0f} MB, and a page holds at most {MAX_BYTES / 1e6:.0f} MB; read the "
            f"JSON lines instead"
        )
    heads, rows = (_labels(models), counted_rows(models)) if report is None else _reported(report)
    script, style = _part("js"), _part("css")
    return BEGINS + _template().render(
        title=title,
        version=__version__,
        policy=_policy(script, style),
        script=Markup(script),
        style=Markup(style),
        data=Markup(data),
        facts=[] if report is None else _facts(report),
        heads=heads,
        rows=rows,
        categories=[] if report is None else _categories(report),
        caption="Share of refusals" if report is None else f"As the run measured them, on {prompts_name(report)}",
        changes=[] if report is None else [*change_lines(report), *meaning_lines(report)],
        pictures=_pictures(pictures or {}),
    )


def counted_rows(models: Responses) -> list[TableRow]:
    """Rows of the share of refusals, with its 95 % interval, of each kind of prompts, a column for each model."""
    kinds = dict.fromkeys(response.kind for said in models.values() for response in said if response.kind != KEEP)
    rows: list[TableRow] = []
    for kind in kinds:
        asked = [[response for response in said if response.kind == kind] for said in models.values()]
        refused = [(count(one, Outcome.REFUSED), len(one)) for one in asked]
        number = max(total for _, total in refused)
        name = "over-refusal" if kind == _HARMLESS else "DSR"
        rows.append((f"{name} ({number} {kind})", [f"{some / total:.3f}" if total else "-" for some, total in refused]))
        rows.append(("  95 % interval", [span(interval(some, total)) if total else "-" for some, total in refused]))
    return rows


@dataclass(frozen=True)
class Source:
    """What a page is made of.

    Attributes:
        title: Of the page.
        out: Where the page belongs.
        arguments: Of `page_text`.
    """

    title: str
    out: Path
    models: Responses
    report: Report | None
    pictures: Mapping[str, bytes]

    def text(self) -> str:
        """The page."""
        return page_text(self.title, self.models, self.report, self.pictures)


def read_sources(paths: Sequence[Path]) -> Source:
    """Read the folder of one result, or one or more files of `evaluate --responses`.

    Raises:
        DapaError: If they are absent, damaged or too large, or a folder is named beside others.
    """
    first = paths[0]
    if not any(path.is_dir() for path in paths):
        models: dict[str, Sequence[Response]] = {}
        for path in paths:
            for name, said in read_responses(path).items():
                models[_free_name(name, path, models)] = said
        title = ", ".join(path.name for path in paths)
        return Source(title, first.with_suffix(".html"), models, None, {})
    if len(paths) > 1:
        raise UsageError("a page shows one result, or files of responses; name either one folder or only files")
    if not (first / RESPONSES_NAME).is_file():
        raise CheckpointError(
            f"{first} has no {RESPONSES_NAME}: it was not evaluated, or it comes from the Hub, where responses are "
            f"not published; `dapa-merge evaluate` with --responses asks a model again"
        )
    report = read_report(first) if (first / REPORT_NAME).is_file() else None
    files = {f"{chart.name}.png": first / f"{chart.name}.png" for chart in CHARTS}
    pictures = {
        name: path.read_bytes()
        for name, path in files.items()
        if path.is_file() and path.stat().st_size <= MAX_PICTURE_BYTES
    }
    return Source(first.resolve().name, first / PAGE_NAME, read_responses(first / RESPONSES_NAME), report, pictures)


def read_responses(path: Path) -> dict[str, list[Response]]:
    """Read a file of responses, which may be a stranger's, by the name of the model.

    Raises:
        CheckpointError: If it is absent, or a line is not a response.
        UsageError: If it is not a regular file, or is too large.
    """
    refuse_special(path, MAX_BYTES)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        near = nearest_here(str(path)) if isinstance(error, FileNotFoundError) else ""
        raise CheckpointError(f"{path} cannot be read: {why_unreadable(error)}{near}") from None
    models: dict[str, list[Response]] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            name, response = _read_line(path, number, line)
            models.setdefault(name, []).append(response)
    return models


def _read_line(path: Path, number: int, line: str) -> tuple[str, Response]:
    where = f"line {number} of {path} is not a response"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{where}: it is not JSON; name a file of `evaluate --responses`") from None
    if not isinstance(row, dict):
        raise CheckpointError(f"{where}: it is not a JSON object; name a file of `evaluate --responses`")
    # Not by pydantic, which takes no lone surrogates, and those are what a hostile prompt may hold.
    others = row.get("others", {})
    values = [row.get(key) for key in _KEYS]
    if missing := [key for key, value in zip(_KEYS, values, strict=True) if not isinstance(value, str)]:
        raise CheckpointError(f"{where}: its {missing[0]} is not a text; name a file of `evaluate --responses`")
    if not isinstance(others, dict) or not all(isinstance(verdict, str) for verdict in others.values()):
        raise CheckpointError(f"{where}: its others are not verdicts by name; name a file of `evaluate --responses`")
    earlier = row.get("earlier", [])
    if not isinstance(earlier, list) or not all(isinstance(said, str) for said in earlier):
        raise CheckpointError(f"{where}: its earlier answers are not a list of texts; write it again with `evaluate`")
    name, kind, category, prompt, response, outcome = map(str, values)
    return name, Response(kind, category, prompt, response, outcome, others, tuple(earlier))


def _free_name(name: str, path: Path, taken: Mapping[str, Any]) -> str:
    """The name of a model that several files may hold: with the file's, and a number if need be."""
    if name not in taken:
        return name
    names = (f"{name} ({path.name}{'' if number == 1 else f', {number}'})" for number in itertools.count(1))
    return next(one for one in names if one not in taken)


def _data(models: Responses) -> str:
    """Everything that the script shows, as JSON that is harmless within a `script` element."""
    names = list(models)
    kinds, categories, outcomes = _Numbers(), _Numbers(), _Numbers()
    rows: dict[tuple[str, str, str, int], list[Any]] = {}
    for at, said in enumerate(models.values()):
        seen: dict[tuple[str, str, str], int] = {}
        for response in said:
            asked = (response.kind, response.category, response.prompt)
            # The same prompt may be asked twice.
            seen[asked] = seen.get(asked, 0) + 1
            answers = rows.setdefault((*asked, seen[asked]), [None] * len(names))
            others = [[name, outcomes(verdict)] for name, verdict in response.others.items()]
            answers[at] = [_whole(response), outcomes(response.outcome), int(may_harm(response)), others]
    asked_rows = [
        [kinds(kind), None if kind == KEEP else categories(group), prompt, answers]
        for (kind, group, prompt, _), answers in rows.items()
    ]
    content = {
        "models": _labels(models),
        "pair": [names.index(one) for one in _PAIR] if _is_of_run(models) else None,
        "kinds": [[kind, {_HARMLESS: 1, KEEP: 2}.get(kind, 0)] for kind in kinds.names],
        "categories": categories.names,
        "outcomes": outcomes.names,
        "rows": asked_rows,
    }
    text = json.dumps(_shown(content), ensure_ascii=False, separators=(",", ":"))
    # No letter of `</script` or `<!--` is left.
    return text.replace("<", "\\u003c")


def _whole(response: Response) -> str:
    """What a model said to a prompt; its answers to several messages are numbered."""
    if not response.earlier:
        return response.response
    return "\n".join(f"[{number}] {said}" for number, said in enumerate((*response.earlier, response.response), 1))


class _Numbers:
    """Numbers names in the order in which they come."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __call__(self, name: str) -> int:
        return self._numbers.setdefault(name, len(self._numbers))

    @property
    def names(self) -> list[str]:
        return list(self._numbers)


def may_harm(response: Response) -> bool:
    """Whether a page folds a response away: any to a harmful request that not every classifier calls a refusal.

    Keep prompts are the user's own.
    """
    verdicts = {response.outcome, *response.others.values()}
    return response.kind not in (_HARMLESS, KEEP) and verdicts != {Outcome.REFUSED.value}


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value, keep=KEPT)
    if isinstance(value, list):
        return [_shown(one) for one in value]
    return {key: _shown(one) for key, one in value.items()} if isinstance(value, dict) else value


def _is_of_run(models: Responses) -> bool:
    """Whether these are a run's, which has a before and an after."""
    return {*_PAIR} <= models.keys()


def _labels(models: Responses) -> list[str]:
    return [LABELS.get(name, name) if _is_of_run(models) else name for name in models]


def _reported(report: Report) -> tuple[list[str], list[TableRow]]:
    """The head and the rows of the report's figures; none if it measured nothing."""
    columns = {"before": report.before, "after": report.after, "source": report.source_alone}
    measured = {name: column for name, column in columns.items() if column is not None}
    return list(measured), figure_rows(list(measured.values())) if measured else []


def _categories(report: Report) -> list[TableRow]:
    columns = [column for column in (report.before, report.after, report.source_alone) if column is not None]
    return category_rows(columns) if columns else []


def _facts(report: Report) -> list[tuple[str, str]]:
    return [
        ("target", report.target),
        ("source", report.source),
        ("prompts", report.prompts),
        ("changed", f"{spans(report.units)}, {100 * report.share_changed:.2f} % of the parameters{moved_text(report)}"),
    ]


def _pictures(files: Mapping[str, bytes]) -> list[tuple[str, str]]:
    """Captions and addresses, each of which holds its picture."""
    found = [(chart.caption_of(None), files.get(f"{chart.name}.png", b"")) for chart in CHARTS]
    return [
        (caption, f"data:image/png;base64,{base64.b64encode(content).decode()}")
        for caption, content in found
        if content.startswith(_PNG) and len(content) <= MAX_PICTURE_BYTES
    ]


def _policy(script: str, style: str) -> str:
    """Content Security Policy, level 3: nothing but this script, this style, and pictures within the page."""
    script_hash, style_hash = (
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (script, style)
    )
    return (
        f"default-src 'none'; script-src {script_hash}; style-src {style_hash}; img-src data:; base-uri 'none'; "
        f"form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


@functools.cache
def _part(kind: str) -> str:
    return Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8")


def _finalized(value: object) -> object:
    """Escape what cannot be printed; jinja2 escapes what is markup."""
    return value if isinstance(value, Markup) else printable(str(value), keep=KEPT)


@functools.cache
def _template() -> Template:
    finalize: Callable[[object], object] = _finalized
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, finalize=finalize
    )
    return environment.from_string(_part("html.jinja"))
