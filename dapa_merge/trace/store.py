"""The folder of a trace, and its page. Each prompt is saved before the next is begun, so a kill loses at most one.

Charts, summary and page are written after each stage, so that a stopped trace leaves those of the stages that it made.
"""

from __future__ import annotations

import io
import os
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy
from jinja2 import Environment, StrictUndefined

from dapa_merge import files as work_folder
from dapa_merge.errors import Stopped, printable
from dapa_merge.files import JOURNAL_BEGINS, replace_file
from dapa_merge.report.drawing import Picture
from dapa_merge.search.journal import Journal
from dapa_merge.trace.case import Case
from dapa_merge.trace.causal import Trace
from dapa_merge.trace.options import STAGES

JOURNAL_NAME = "journal.jsonl"
TRACES_NAME = "traces"
FIGURES_NAME = "figures"
SUMMARY_NAME = "summary.json"
PAGE_NAME = "index.html"
INFLUENCE_NAME = "influence.npz"
TEMPLATE_PATH = Path(__file__).with_name("page.html.jinja")
# Cells that the page lists for each traced kind.
NUM_CELLS = 3


def check_folder(out: Path) -> None:
    """Raise `UsageError` if a folder holds something other than a trace."""
    work_folder.check_folder(out, _is_trace, "trace")


def _is_trace(out: Path) -> bool:
    try:
        with (out / JOURNAL_NAME).open("rb") as file:
            begins = file.read(len(JOURNAL_BEGINS))
        # A kill may have left an empty or partial journal, but then nothing else.
        own = {JOURNAL_NAME, TRACES_NAME, FIGURES_NAME}
        return begins == JOURNAL_BEGINS or (JOURNAL_BEGINS.startswith(begins) and {*os.listdir(out)} <= own)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False


@contextmanager
def opened(out: Path, parts: Mapping[str, str]) -> Iterator[Journal]:
    """Open the journal in a trace's folder, for one run at a time.

    Raises:
        UsageError: If the folder belongs to other models or settings, or another run is using it.
    """
    with closing(Journal(out / JOURNAL_NAME, parts, kind="trace", place="folder")) as journal:
        for name in (TRACES_NAME, FIGURES_NAME):
            work_folder.make_folder(out / name)
        try:
            yield journal
        except Stopped:
            raise
        except KeyboardInterrupt as stop:
            raise Stopped(f"the results so far are in {out}, and the same command resumes from there") from stop


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write a `.npz` file, which `numpy.load` reads."""
    buffer = io.BytesIO()
    numpy.savez_compressed(buffer, **arrays)
    replace_file(path, buffer.getvalue())


def read_arrays(path: Path) -> dict[str, Any] | None:
    """The arrays of a `.npz` file by name; None if it is missing or damaged."""
    try:
        # From memory: numpy leaves a damaged file open.
        with numpy.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception:
        # For damage, numpy and zipfile raise all kinds of errors.
        return None


def trace_path(out: Path, number: int) -> Path:
    """The file of a prompt's trace; prompts count from 1."""
    return out / TRACES_NAME / f"{number:04d}.npz"


def page(summary: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    """Write the page of a trace: one HTML file that needs no network and no other files."""
    template = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, finalize=_shown
    )
    template.filters.update(number=_number, interval=_interval, range=_range, base64=_base64, ranked=_ranked)
    target, source = (summary[name].rstrip("/").rpartition("/")[2] for name in ("target", "source"))
    title, cells = f"Where alignment lives: {target} and {source}", list(_best_cells(summary["trace"] or {"kinds": {}}))
    follow = [stage for stage in STAGES if stage.name in summary["stages"]["follow"]]
    text = TEMPLATE_PATH.read_text(encoding="utf-8")
    return template.from_string(text).render(
        title=title, summary=summary, pictures=pictures, cells=cells, follow=follow
    )


def _best_cells(trace: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The cells that restore most, for each kind."""
    for kind, means in trace["kinds"].items():
        cells = [
            (mean, layer, role)
            for layer, of_layer in enumerate(means["mean"])
            for role, mean in enumerate(of_layer)
            if mean is not None
        ]
        for mean, layer, role in sorted(cells, reverse=True)[:NUM_CELLS]:
            low, high = (means[side][layer][role] for side in ("low", "high"))
            yield {"kind": kind, "layer": layer, "role": trace["roles"][role], "mean": mean, "low": low, "high": high}


def _shown(value: object) -> object:
    # Markup is what this template made itself.
    return printable(value) if type(value) is str else value


def _base64(content: bytes) -> str:
    return b64encode(content).decode()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(cell: Mapping[str, float | None]) -> str:
    return f"{_number(cell['mean'])} ({_number(cell['low'])} to {_number(cell['high'])})"


def _ranked(one: Mapping[str, float | None]) -> str:
    return _interval({"mean": one["spearman"], "low": one["low"], "high": one["high"]})


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}" if values else "-"


def write_trace(path: Path, trace: Trace, case: Case, settings: str, seconds: float) -> None:
    """Write the trace of one prompt, with its texts and settings."""
    write_arrays(
        path,
        {
            "settings": settings,
            "prompt": trace.prompt,
            "refusing": case.contrast.refusing,
            "complying": case.contrast.complying,
            "tokens": numpy.array(trace.tokens),
            "subject": numpy.array(trace.subject),
            "clean": trace.clean,
            "corrupted": trace.corrupted,
            **{f"restored_{kind}": values for kind, values in trace.restored.items()},
            "num_runs": trace.num_runs,
            "num_passes": trace.num_passes,
            "seconds": seconds,
        },
    )


def read_trace(path: Path, case: Case, settings: str, kinds: tuple[str, ...]) -> tuple[Trace, float] | None:
    """The trace of a case and its seconds; None if the file is missing, damaged, or for other texts or settings."""
    arrays = read_arrays(path)
    texts = [settings, case.contrast.prompt, case.contrast.refusing, case.contrast.complying]
    names = ("settings", "prompt", "refusing", "complying")
    if arrays is None or [str(arrays.get(name)) for name in names] != texts:
        return None
    trace = Trace(
        prompt=case.contrast.prompt,
        tokens=tuple(map(str, arrays["tokens"])),
        subject=(int(arrays["subject"][0]), int(arrays["subject"][1])),
        clean=float(arrays["clean"]),
        corrupted=arrays["corrupted"],
        restored={kind: arrays[f"restored_{kind}"] for kind in kinds},
        num_runs=int(arrays["num_runs"]),
        num_passes=float(arrays["num_passes"]),
    )
    return (trace, float(arrays["seconds"])) if trace.subject == case.subject else None
