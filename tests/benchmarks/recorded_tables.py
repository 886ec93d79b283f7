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
        low, high = row["dsr_interval"]
        return [
            REAL_PAIRS[pair] if method == "directions" else "",
            method,
            f"{before('dsr')}{row['dsr']:.2f} ({low:.2f}-{high:.2f})",
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
# Of a fine-tune's skill, what a repair should keep.
KEEPS = 0.97


def by_method(name: str, pairs: Mapping[str, str]) -> str:
    """DSR, over-refusal and skill of every method on every pair; bold is what repairs and keeps the skill."""
    rows = {(pair, NAMES.get(method, method)): row for (pair, method), row in read_rows(name).items()}
    there = {pair: label for pair, label in pairs.items() if (pair, "target") in rows}

    def cell(pair: str, method: str) -> str:
        row = rows.get((pair, method), {})
        if "dsr" not in row:
            return "-" if row else ""
        skill = "" if row["skill"] is None else f" / {row['skill']:.2f}"
        text = f"{row['dsr']:.2f} / {row['over_refusal']:.2f}{skill}"
        return f"**{text}**" if is_good(row, rows[pair, "target"]) else text

    def cells(method: str) -> list[str]:
        return [method, *(cell(pair, method) for pair in there)]

    methods = dict.fromkeys(method for _, method in rows)
    return grid(["DSR / over-refusal / skill", *there.values()], map(cells, methods))


# What `compare` calls them, where that is not what it is to be called here.
NAMES = {
    "dapa": "gates, searched", "gates": "all gates", "safe-lora": "Safe LoRA",
    "safemerge": "SafeMERGE", "resta": "RESTA", "safe-delta": "Safe Delta", "ties": "TIES", "slerp": "SLERP",
    "linear": "linear blend", "task-arithmetic": "task arithmetic", "training": "training on refusals",
    "training-keep": "the same, and on own answers", "ties of target": "TIES", "resta abliterated": "RESTA",
}  # fmt: skip


def is_good(row: Mapping[str, Any], target: Mapping[str, Any]) -> bool:
    """Whether a result repairs by the limits of its recipe, and keeps the skill."""
    if not row.get("repairs"):
        return False
    return target["skill"] is None or row["skill"] >= KEEPS * target["skill"]


def by_price(name: str, pairs: Mapping[str, str]) -> str:
    """What every method costs on average: what it changes besides, and the seconds of its choice."""
    rows = {(pair, NAMES.get(method, method)): row for (pair, method), row in read_rows(name).items()}
    methods = dict.fromkeys(method for _, method in rows if method != "target")

    def cells(method: str) -> list[str] | None:
        found = [(rows[pair, method], rows[pair, "target"]) for pair in pairs if "dsr" in rows.get((pair, method), {})]
        if not found:
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


HARMLESS = "harmless prompts: divergence"


def deeper(name: str, pairs: Mapping[str, str]) -> str:
    """What else was asked of some methods, by pair."""
    rows = read_rows(name)
    kinds = [key for row in rows.values() for key in row.get("further", {}) if not key.endswith("divergence")]
    heads = list(dict.fromkeys(kinds))

    def shown(measured: Sequence[Any] | None) -> str:
        if measured is None:
            return ""
        value, (low, high), _ = measured
        return f"{value:.2f} ({low:.2f}-{high:.2f})"

    def lines() -> Iterator[list[str]]:
        for pair, label in pairs.items():
            found = [
                (method, row["further"]) for (one, method), row in rows.items() if one == pair and "further" in row
            ]
            asked = [(method, further) for method, further in found if any(head in further for head in heads)]
            for number, (method, further) in enumerate(asked):
                yield [label if number == 0 else "", NAMES.get(method, method), *(shown(further.get(h)) for h in heads)]

    return grid(["", "", *heads], lines())


def every(name: str, pairs: Mapping[str, str]) -> str:
    """All figures of every method on every pair, with intervals, and the setting that was chosen."""
    rows = read_rows(name)

    def cells(pair: str, method: str) -> list[str]:
        row, first = rows[pair, method], method == "target"
        head = [f"`{pair}`" if first else "", NAMES.get(method, method)]
        if "dsr" not in row:
            return [*head, "-", "", "", "", "", "", row["why_not"]]
        rates = [f"{row[one]:.3f} ({row[f'{one}_interval'][0]:.3f}-{row[f'{one}_interval'][1]:.3f})" for one in RATES]
        skills = " / ".join(f"{skill:.3f}" for skill in row["skills"]) or "-"
        harmless = row["further"][HARMLESS][0]
        return [
            *head,
            *rates,
            skills,
            f"{row['divergence']:.2g}",
            f"{harmless:.2g}",
            f"{row['perplexity'] / rows[pair, 'target']['perplexity']:.2f}",
            row["setting"] if method not in ("target", "source") else "",
        ]

    heads = [
        "",
        "",
        "DSR",
        "over-refusal",
        "skill",
        "divergence, keep",
        "harmless",
        "perplexity",
        "what was chosen, or why not",
    ]
    return grid(heads, (cells(pair, method) for pair in pairs for one, method in rows if one == pair))


RATES = ("dsr", "over_refusal")
TABLES: Mapping[str, Callable[[], str]] = {
    "families": families,
    "real": real,
    "methods": lambda: by_method("methods", METHODS_ON),
    "methods-price": lambda: by_price("methods", METHODS_ON),
    "methods-deeper": lambda: deeper("methods", METHODS_ON),
    "methods-all": lambda: every("methods", METHODS_ON),
}


def written(page: str) -> str:
    """A page with the tables that the rows make."""
    return TABLE.sub(lambda found: f"<!-- recorded: {found[1]} -->\n{TABLES[found[1]]()}", page)


def main(argv: Sequence[str] | None = None) -> None:
    """Print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into the pages under docs/")
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
