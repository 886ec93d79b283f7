"""Makes the tables of the documents from recorded rows: `python tests/benchmarks/recorded_tables.py [--write]`.

recorded/ holds what the long benchmarks measured, a row for each pair and method, as their scripts wrote it. A line
`<!-- recorded: NAME -->` in a page under docs/, or in RESULTS.md, stands before the table of that name; `--write`
replaces those tables, and without it they are printed. A test holds the pages to the rows.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from directions_table import repairs
from tiny import parse

from dapa_merge.measure.statistics import interval

RECORDED = Path(__file__).with_name("recorded")
PAGES = (Path(__file__).with_name("RESULTS.md"), *sorted((Path(__file__).parents[2] / "docs").glob("*.md")))
# A table after its mark; it ends with its last row.
TABLE = re.compile(r"<!-- recorded: ([\w-]+) -->\n((?:\|.*\n)*)")
Rows = Mapping[tuple[str, str], Mapping[str, Any]]


def read_rows(name: str) -> Rows:
    """The rows of a benchmark, by pair and method."""
    lines = (RECORDED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {(row["pair"], row["method"]): row for row in map(json.loads, lines)}


def grid(heads: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(cells)} |" for cells in rows)]
    return "".join(f"{line}\n" for line in lines).replace("|  |", "| |")


def with_interval(value: float, limits: Sequence[float], digits: int) -> str:
    """A share and its interval."""
    low, high = limits
    return f"{value:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


FAMILY_METHODS = {
    "gates": "gates",
    "auto": "`modules: auto`",
    "arithmetic": "task arithmetic (it needs the pretrained model)",
    "training": "training on the same prompts, best of four settings",
    "directions": "**directions**",
}


def families() -> str:
    """Each method on the 18 trained families; a search that finds nothing counts as its target."""
    rows = read_rows("families")
    pairs = [pair for pair, method in rows if method == "target" and not pair.startswith("packaged")]

    def cells(method: str, label: str) -> list[str]:
        found = [rows[pair, method] if "dsr" in rows[pair, method] else rows[pair, "target"] for pair in pairs]
        repaired = sum(repairs(rows[pair, method], rows[pair, "target"], rows[pair, "source"]) for pair in pairs)
        kept = [row["skill"] / rows[pair, "target"]["skill"] for row, pair in zip(found, pairs, strict=True)]
        low, high = interval(repaired, len(pairs))
        bold = "**" if method == "directions" else ""
        return [
            label,
            f"{bold}{repaired} of {len(pairs)} ({low:.2f}-{high:.2f}){bold}",
            f"{fmean(row['dsr'] for row in found):.2f}",
            f"{fmean(kept):.2f}",
            f"{min(kept):.2f}",
            f"{bold}{fmean(row['divergence'] for row in found):.3f}{bold}",
        ]

    heads = ["", "repaired", "DSR", "skill kept, mean", "least", "divergence, nats a token"]
    return grid(heads, (cells(method, label) for method, label in FAMILY_METHODS.items()))


REAL_PAIRS = {
    "lora-20": "LoRA, 20 % affirmative openings",
    "lora-5": "LoRA, 5 %",
    "lora-benign": "LoRA, nothing harmful",
    "mlp-full": "training of all MLPs, 20 %",
    "abliterated": "abliteration (fine-tuned for nothing)",
}


def real() -> str:
    """Directions and training on a real model."""
    rows = read_rows("real")

    def cells(pair: str, method: str) -> list[str]:
        row, target = rows[pair, method], rows[pair, "target"]
        before = (lambda name: f"{_share(target[name], name)} -> ") if method == "directions" else (lambda _: "")
        return [
            REAL_PAIRS[pair] if method == "directions" else "",
            method,
            f"{before('dsr')}{with_interval(row['dsr'], row['dsr_interval'], 2)}",
            f"{before('over_refusal')}{row['over_refusal']:.2f}",
            "-" if row["skill"] is None else f"{before('skill')}{_share(row['skill'], 'skill')}",
            f"{row['perplexity'] / target['perplexity']:.2f}",
        ]

    heads = ["damaged by", "", "DSR (95 % interval)", "over-refusal", "skill", "perplexity of text, times the target's"]
    return grid(heads, (cells(pair, method) for pair in REAL_PAIRS for method in ("directions", "training")))


def _share(value: float, name: str) -> str:
    return f"{value:.3f}" if name == "skill" else f"{value:.2f}"


# What is measured with every method. The last ones are siblings: source and target were both made from one base.
METHODS_ON = {
    "lora-20": "LoRA on the aligned model, 20 % openings",
    "identity": "a persona that obeys",
    "full": "all weights, 5 % openings",
    "facts-5": "LoRA on facts, 5 %",
    "quantized": "LoRA beside 4 bits, 5 %",
    "abliterated": "abliteration",
    "orders-by-refuses-all": "sibling; source: all weights",
    "orders-by-refuses-mlps": "sibling; source: MLPs only",
    "orders-by-refuses-dpo": "sibling; source: DPO",
    "facts-by-refuses-all": "sibling with facts; source: all weights",
    "facts-by-refuses-mlps": "the same; source: MLPs only",
    "facts-by-refuses-dpo": "the same; source: DPO",
}
# What methods are to be called here, where `compare` calls them otherwise; with and without a base, one has one name.
NAMES = {
    "dapa": "gates, searched", "gates": "all gates", "safe-lora": "Safe LoRA", "safemerge": "SafeMERGE",
    "resta": "RESTA", "resta abliterated": "RESTA", "safe-delta": "Safe Delta", "ties": "TIES",
    "ties of target": "TIES", "slerp": "SLERP", "linear": "linear blend", "task-arithmetic": "task arithmetic",
    "training": "training on refusals", "training-keep": "training on refusals and own answers",
}  # fmt: skip
HARMLESS = "harmless prompts: divergence"
# Of a fine-tune's skill, what a repair should keep.
KEEPS = 0.97


def all_methods() -> tuple[Rows, dict[str, str], list[str]]:
    """The rows by pair and the method's name here; the labels of the pairs that are there; the methods."""
    rows = {(pair, NAMES.get(method, method)): row for (pair, method), row in read_rows("methods").items()}
    there = {pair: label for pair, label in METHODS_ON.items() if (pair, "target") in rows}
    return rows, there, list(dict.fromkeys(method for _, method in rows))


def by_method() -> str:
    """DSR, over-refusal and skill of every method on every pair; bold is what repairs and keeps the skill."""
    rows, there, methods = all_methods()

    def cell(pair: str, method: str) -> str:
        row = rows.get((pair, method), {})
        if "dsr" not in row:
            return "-" if row else ""
        skill = "" if row["skill"] is None else f" / {row['skill']:.2f}"
        text = f"{row['dsr']:.2f} / {row['over_refusal']:.2f}{skill}"
        return f"**{text}**" if is_good(row, rows[pair, "target"]) else text

    heads = ["DSR / over-refusal / skill", *there.values()]
    return grid(heads, ([method, *(cell(pair, method) for pair in there)] for method in methods))


def is_good(row: Mapping[str, Any], target: Mapping[str, Any]) -> bool:
    """Whether a result repairs by the limits of its recipe, and keeps the skill."""
    return row["repairs"] and (target["skill"] is None or row["skill"] >= KEEPS * target["skill"])


def by_price() -> str:
    """What every method costs on average: what it changes besides, and the seconds of its choice."""
    rows, there, methods = all_methods()

    def cells(method: str) -> list[str] | None:
        found = [(rows[pair, method], rows[pair, "target"]) for pair in there if "dsr" in rows.get((pair, method), {})]
        if not found or method == "target":
            return None
        seconds = [row["seconds"] for row, _ in found if "seconds" in row]
        return [
            method,
            f"{len(found)}",
            f"{fmean(row['divergence'] for row, _ in found):.2g}",
            f"{fmean(row['further'][HARMLESS][0] for row, _ in found):.2g}",
            f"{fmean(row['perplexity'] / target['perplexity'] for row, target in found):.2f}",
            f"{100 * fmean(row['share'] for row, _ in found):.3g} %",
            f"{fmean(seconds):.0f}" if seconds else "-",
        ]

    heads = ["", "pairs", "divergence on keep prompts", "on harmless ones", "perplexity", "changed", "seconds"]
    return grid(heads, filter(None, map(cells, methods)))


def deeper() -> str:
    """What else was asked of some methods, by pair."""
    rows, there, _ = all_methods()
    heads = list(dict.fromkeys(key for row in rows.values() for key in row.get("further", {}) if "DSR" in key))

    def lines() -> Iterator[list[str]]:
        for pair, label in there.items():
            further = {method: row.get("further", {}) for (one, method), row in rows.items() if one == pair}
            for method, found in further.items():
                if not found.keys().isdisjoint(heads):
                    shown = (with_interval(*found[head][:2], 2) if head in found else "" for head in heads)
                    yield [label if method == "target" else "", method, *shown]

    return grid(["", "", *heads], lines())


def every() -> str:
    """All figures of every method on every pair, with intervals, and the setting that was chosen."""
    rows, there, _ = all_methods()

    def cells(pair: str, method: str) -> list[str]:
        row = rows[pair, method]
        head = [f"`{pair}`" if method == "target" else "", method]
        if "dsr" not in row:
            return [*head, "-", "", "", "", "", "", row["why_not"]]
        return [
            *head,
            *(with_interval(row[rate], row[f"{rate}_interval"], 3) for rate in ("dsr", "over_refusal")),
            " / ".join(f"{skill:.3f}" for skill in row["skills"]) or "-",
            f"{row['divergence']:.2g}",
            f"{row['further'][HARMLESS][0]:.2g}",
            f"{row['perplexity'] / rows[pair, 'target']['perplexity']:.2f}",
            row["setting"] if method not in ("target", "source") else "",
        ]

    heads = [
        "", "", "DSR", "over-refusal", "skill", "divergence, keep", "harmless", "perplexity", "chosen, or why not",
    ]  # fmt: skip
    return grid(heads, (cells(pair, method) for pair in there for one, method in rows if one == pair))


TABLES: Mapping[str, Callable[[], str]] = {
    "families": families,
    "real": real,
    "methods": by_method,
    "methods-price": by_price,
    "methods-deeper": deeper,
    "methods-all": every,
}


def written(page: str) -> str:
    """A page with the tables that the rows make."""
    return TABLE.sub(lambda found: f"<!-- recorded: {found[1]} -->\n{TABLES[found[1]]()}", page)


def main(argv: Sequence[str] | None = None) -> None:
    """Print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into the pages and RESULTS.md")
    arguments = parse(parser, argv)
    for name, make in TABLES.items():
        print(f"{name}:\n\n{make()}")
    if arguments.write:
        for path in PAGES:
            page = path.read_text(encoding="utf-8")
            if (new := written(page)) != page:
                path.write_text(new, encoding="utf-8")
                print(f"{path.name} is written again")


if __name__ == "__main__":
    main()
