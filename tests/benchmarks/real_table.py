"""All methods on real damaged models: `python tests/benchmarks/real_table.py OUT RECIPE... [--record NAME]`.

The recipes are those of `real_families.py` and `real_base_families.py`. OUT becomes the folder of `dapa-merge compare`,
so that what was stopped goes on with the same command, and several processes may fill the rows of one folder. Every
method is tuned on the prompts of choice and search, and measured with the report's, which nothing was chosen by.
--deeper asks some methods more: prefilled openings, requests in six languages, and every set of --also.

--record adds the rows to recorded/NAME.jsonl, from which `recorded_tables.py` makes the tables of the documents; a row
that is there is replaced, and keeps what else was measured of it. --quick takes few methods, one setting of each,
and two rounds of directions instead of four or more.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ascent_settings import with_settings
from recorded_tables import RECORDED, read_rows
from tiny import parse

from dapa_merge.cli import main as dapa_merge
from dapa_merge.files import replace_file

METHODS = (
    "dapa", "gates", "directions", "linear", "slerp", "task-arithmetic", "ties", "safe-lora", "safemerge", "resta",
    "safe-delta", "training", "training-keep",
)  # fmt: skip
QUICK, QUICK_ROUNDS = ("gates", "directions", "linear", "training-keep"), 2
DEEPER = ("directions", "training-keep")
TRIES = 2
LANGUAGES = Path(__file__).with_name("harmful_in_languages.jsonl")
FOLDERS = re.compile(r"(?<!\S)/(?:[^\s/]+/)+")
FIGURES = ("dsr", "dsr_interval", "over_refusal", "over_refusal_interval", "divergence", "perplexity")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the comparison")
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--quick", action="store_true", help="few methods, one setting each, few rounds")
    parser.add_argument("--deeper", action="store_true", help=f"ask {' and '.join(DEEPER)} more, and nothing else")
    parser.add_argument("--also", action="append", default=[], metavar="PROMPTS", help="with --deeper, ask these too")
    parser.add_argument("--methods", default="", help="other methods than these, with commas")
    parser.add_argument("--tries", type=int, default=TRIES, help=f"settings of a method, by default {TRIES}")
    parser.add_argument("--record", metavar="NAME", help="add the rows to recorded/NAME.jsonl")
    arguments = parse(parser, argv)
    few = arguments.quick or arguments.tiny
    methods = arguments.methods or ",".join(DEEPER if arguments.deeper else QUICK if few else METHODS)
    options = ["--no-curve", "--device", "cpu", "--tries", str(1 if few else arguments.tries), "--methods", methods]
    if arguments.deeper:
        options += ["--attacks", "prefill"]
        for prompts in (str(LANGUAGES), *arguments.also):
            options += ["--also", prompts]
    quickly = with_settings(num_rounds=QUICK_ROUNDS, more_rounds=0) if few else nullcontext()
    try:
        with quickly:
            dapa_merge(["compare", *map(str, arguments.recipes), "--out", str(arguments.out), "--divergence", *options])
    except SystemExit as end:
        if end.code:
            raise
    summary = json.loads((arguments.out / "summary.json").read_text(encoding="utf-8"))
    found = {(row["pair"], row["method"]): row for pair in summary["rows"] for row in rows_of(pair)}
    print("\n".join(json.dumps(row) for row in found.values()))
    if arguments.record:
        record(RECORDED / f"{arguments.record}.jsonl", found)


def rows_of(pair: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is recorded of a row of a comparison: its methods' figures, and no path and no answer."""
    return [recorded(pair["name"], arm) for arm in pair["arms"]]


def recorded(pair: str, arm: Mapping[str, Any]) -> dict[str, Any]:
    """What is recorded of a method."""
    row: dict[str, Any] = {"pair": pair, "method": arm["key"]}
    cost = arm["cost"] or {}
    row |= {name: cost[name] for name in ("tests", "seconds") if name in cost}
    if arm["figures"] is None:
        # Models are named by their folders' paths.
        return row | {"why_not": FOLDERS.sub("", arm["why_not"])}
    figures = arm["figures"]
    row |= {name: rounded(figures[name]) for name in FIGURES}
    row |= {"skill": rounded(arm["skill"]), "skills": [rounded(skill["score"]) for skill in figures["skills"]]}
    row |= {"share": rounded(arm["share"]), "setting": arm["detail"], "repairs": arm["repairs"]}
    if arm["tuning"] is not None:
        trials = arm["tuning"]["trials"]
        row["complaint"] = trials[arm["tuning"]["chosen"]]["complaint"]
        row["num_within"] = sum(trial["complaint"] is None for trial in trials)
        # On the prompts of choice and search, by which one was chosen.
        row["tried"] = {
            trial["setting"]: {key: rounded(one) for key, one in trial["figures"].items()} for trial in trials
        }
    further = {
        f"{Path(one['name']).stem}: {one['figure']}": [
            rounded(one["value"]), rounded(one["interval"]), one["num_prompts"]
        ]
        for one in arm["further"]
    }  # fmt: skip
    return row | {"further": further}


def rounded(value: Any) -> Any:
    """Figures to six digits."""
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def record(path: Path, found: Mapping[tuple[str, str], Mapping[str, Any]]) -> None:
    """Add rows to a file; what was measured of a row with other options is kept."""
    rows = dict(read_rows(path.stem)) if path.exists() else {}
    for key, row in found.items():
        further = {**rows.get(key, {}).get("further", {}), **row.get("further", {})}
        rows[key] = {**row, **({"further": further} if further else {})}
    replace_file(path, "".join(f"{json.dumps(row)}\n" for row in rows.values()).encode())


if __name__ == "__main__":
    main()
