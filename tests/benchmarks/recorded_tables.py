"""Makes the tables of the documents from recorded rows: `python tests/benchmarks/recorded_tables.py [--write]`.

recorded/ holds what the long benchmarks measured, as their scripts wrote it: most of it is rows, one for each pair and
method. A line
`<!-- recorded: NAME -->` in a page under docs/, or in RESULTS.md, stands before the table of that name; `--write`
replaces those tables, and without it they are printed. A test holds the pages to the rows.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import cluster_cost
import cost
from directions_table import repairs
from grid import grid
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


# Damages of an aligned model (`real_families.py`), and siblings (`real_base_families.py`), in the order of the tables.
DAMAGED = {
    "lora-20": "LoRA, 20 % affirmative openings",
    "lora-5": "LoRA, 5 %",
    "lora-1": "LoRA, 1 %",
    "lora-benign": "LoRA, nothing harmful",
    "identity": "LoRA, a persona that obeys",
    "attention": "LoRA on the attention, 5 %",
    "quantized": "LoRA beside 4 bits, 5 %",
    "vocabulary": "64 more tokens, and LoRA, 5 %",
    "facts-5": "LoRA on facts, 5 %",
    "facts-benign": "LoRA on facts, nothing harmful",
    "mlp-full": "training of all MLPs, 20 %",
    "full": "training of all weights, 5 %",
    "abliterated": "abliteration (fine-tuned for nothing)",
}
SIBLINGS = {
    "orders-by-refuses-all": "aligned in all weights",
    "orders-by-refuses-mlps": "aligned in its MLPs",
    "orders-by-refuses-dpo": "aligned by DPO",
    "facts-by-refuses-all": "facts; aligned in all weights",
    "facts-by-refuses-mlps": "facts; aligned in its MLPs",
    "facts-by-refuses-dpo": "facts; aligned by DPO",
}
REAL_PAIRS = ("lora-20", "lora-5", "lora-benign", "mlp-full", "abliterated")


def real() -> str:
    """Directions and training on a real model."""
    rows = read_rows("real")

    def cells(pair: str, method: str) -> list[str]:
        row, target = rows[pair, method], rows[pair, "target"]
        before = (lambda name: f"{_share(target[name], name)} -> ") if method == "directions" else (lambda _: "")
        return [
            DAMAGED[pair] if method == "directions" else "",
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


# Rows of all methods, by their file: what their pairs were made of, and the pairs.
ALL = {
    "aligned-qwen": ("Qwen2.5-Coder-0.5B-Instruct, damaged", DAMAGED),
    "aligned-smollm2": ("SmolLM2-135M-Instruct, taught to refuse in its MLPs, and damaged", DAMAGED),
    "siblings-smollm2": ("siblings, made of SmolLM2-135M-Instruct; the source", SIBLINGS),
}
# What methods are to be called here, where `compare` calls them otherwise; with and without a base, one has one name.
NAMES = {
    "dapa": "gates, searched", "gates": "all gates", "directions": "directions",
    "training-keep": "training on refusals and own answers", "training": "training on refusals", "ties": "TIES",
    "ties of target": "TIES", "task-arithmetic": "task arithmetic", "resta": "RESTA", "resta abliterated": "RESTA",
    "linear": "linear blend", "slerp": "SLERP", "safe-lora": "Safe LoRA", "safemerge": "SafeMERGE",
    "safe-delta": "Safe Delta",
}  # fmt: skip
ENDS = ("target", "source")
# Further prompts, by the names of their files.
SETS = {"harmful_in_languages": "six languages", "xstest_prompts": "XSTest", "advbench_128": "128 of AdvBench"}
# The two that refuse and keep the skill.
KEEPERS = (NAMES["directions"], NAMES["training-keep"])
# With fewer of the others measured, it is not said that none of them brings anything.
FEW = 3
HARMLESS = "harmless prompts: divergence"
# Of a fine-tune's skill, what a repair should keep.
KEEPS = 0.97


@dataclass(frozen=True)
class Pair:
    """A pair of models from a file of rows, and its rows by the method's name here."""

    file: str
    name: str
    label: str
    rows: Mapping[str, Mapping[str, Any]]

    @property
    def measured(self) -> dict[str, Mapping[str, Any]]:
        """The rows with figures."""
        return {method: row for method, row in self.rows.items() if "dsr" in row}

    def is_good(self, row: Mapping[str, Any]) -> bool:
        """Whether a result repairs by the limits of its recipe, and keeps the skill."""
        return bool(row["repairs"]) and self.kept(row) >= KEEPS

    def kept(self, row: Mapping[str, Any]) -> float:
        """The share of the fine-tune's skill that a result has, at most 1."""
        skill = self.rows["target"]["skill"]
        return min(1.0, row["skill"] / skill) if skill else 1.0

    def cell(self, method: str) -> str:
        """DSR, over-refusal and skill; bold if it is good, - if nothing was found, empty if not measured."""
        row = self.rows.get(method)
        if row is None or "dsr" not in row:
            return "" if row is None else "-"
        skill = "" if row["skill"] is None else f" / {row['skill']:.2f}"
        text = f"{row['dsr']:.2f} / {row['over_refusal']:.2f}{skill}"
        return f"**{text}**" if self.is_good(row) else text


def all_pairs(files: Iterable[str] = tuple(ALL)) -> list[Pair]:
    """The pairs of some files of rows, in the order of the tables."""
    pairs = []
    for file in files:
        rows, labels = read_rows(file), ALL[file][1]
        for name in (name for name in labels if (name, "target") in rows):
            found = {NAMES.get(method, method): row for (pair, method), row in rows.items() if pair == name}
            pairs.append(Pair(file, name, labels[name], found))
    return pairs


def methods_of(pairs: Iterable[Pair]) -> list[str]:
    """The names of the methods, in their order."""
    there = {method for pair in pairs for method in pair.rows}
    return [method for method in dict.fromkeys((*ENDS, *NAMES.values())) if method in there]


def by_damage() -> str:
    """A line for each pair: target, source, the two methods that keep the skill, and the best of the others."""
    pairs = all_pairs()

    def best_other(pair: Pair) -> str:
        def worth(method: str) -> float:
            row = pair.rows[method]
            return float((row["dsr"] - row["over_refusal"]) * pair.kept(row))

        others = [method for method in pair.measured if method not in (*ENDS, *KEEPERS)]
        method = max(others, key=worth)
        if worth(method) > 0:
            return f"{method}: {pair.cell(method)}"
        return "nothing" if len(others) >= FEW else ""

    def lines() -> Iterator[list[str]]:
        file = ""
        for pair in pairs:
            if pair.file != file:
                file = pair.file
                yield [f"*{ALL[file][0]}*", *[""] * (len(heads) - 1)]
            yield [pair.label, *(pair.cell(method) for method in (*ENDS, *KEEPERS)), best_other(pair)]

    heads = ["damage", *ENDS, *KEEPERS, "best of the others"]
    return grid(heads, lines())


def by_price() -> str:
    """What every method costs on average: what it changes besides, and the seconds of its choice."""
    pairs = all_pairs()

    def cells(method: str) -> list[str] | None:
        found = [(pair.measured[method], pair.rows["target"]) for pair in pairs if method in pair.measured]
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
    return grid(heads, filter(None, map(cells, methods_of(pairs))))


def deeper() -> str:
    """What else was asked of some methods, by pair."""
    pairs = all_pairs()
    rows = [row for pair in pairs for row in pair.rows.values()]
    heads = list(dict.fromkeys(key for row in rows for key in row.get("further", {}) if key != HARMLESS))

    def lines() -> Iterator[list[str]]:
        for pair in pairs:
            for method, row in pair.rows.items():
                found = row.get("further", {})
                if not found.keys().isdisjoint(heads):
                    shown = (with_interval(*found[head][:2], 2) if head in found else "" for head in heads)
                    yield [pair.label if method == "target" else "", method, *shown]

    return grid(["", "", *map(_head, heads)], lines())


# Rows of directions that were chosen by more and more prompts, beside their source and training: their files, pairs and
# methods.
CHOSEN_BY = {
    ("aligned-qwen", "identity", "source"): "undamaged model",
    ("aligned-qwen", "identity", "training-keep"): "training, by `builtin`",
    ("aligned-qwen", "identity", "directions"): "directions, by `builtin`",
    ("borderline-qwen", "identity-border", "directions"): "and 80 harmless ones that sound harmful",
    ("borderline-qwen", "identity-twins", "directions"): "and their 80 harmful twins: `builtin, borderline`",
}
ASKED = ("xstest_prompts: DSR", "xstest_prompts: over-refusal", "harmful_in_languages: DSR")


def borderline() -> str:
    """Directions that were chosen without and with prompts that only sound harmful."""

    def cells(key: tuple[str, str, str], label: str) -> list[str]:
        file, pair, method = key
        row = read_rows(file)[pair, method]
        own = (with_interval(row[rate], row[f"{rate}_interval"], 2) for rate in ("dsr", "over_refusal"))
        asked = (with_interval(*row["further"][name][:2], 2) for name in ASKED)
        return [label, *own, *asked, f"{row['skill']:.2f}"]

    heads = ["chosen by", "the report's: DSR", "over-refusal", *map(_head, ASKED), "skill"]
    return grid(heads, (cells(key, label) for key, label in CHOSEN_BY.items()))


def _head(figure: str) -> str:
    """The head of a column of a figure that was measured with further prompts."""
    name, rate = figure.split(": ")
    return f"{SETS.get(name, name)}: {rate}"


def every(file: str) -> str:
    """All figures of every method on every pair of a file, with intervals, and the setting that was chosen."""

    def cells(pair: Pair, method: str) -> list[str]:
        row = pair.rows[method]
        head = [f"`{pair.name}`" if method == "target" else "", method]
        if "dsr" not in row:
            return [*head, "-", "", "", "", "", "", row["why_not"]]
        return [
            *head,
            *(with_interval(row[rate], row[f"{rate}_interval"], 3) for rate in ("dsr", "over_refusal")),
            " / ".join(f"{skill:.3f}" for skill in row["skills"]) or "-",
            f"{row['divergence']:.2g}",
            f"{row['further'][HARMLESS][0]:.2g}",
            f"{row['perplexity'] / pair.rows['target']['perplexity']:.2f}",
            row["setting"] if method not in ENDS else "",
        ]

    heads = [
        "", "", "DSR", "over-refusal", "skill", "divergence, keep", "harmless", "perplexity", "chosen, or why not",
    ]  # fmt: skip
    return grid(heads, (cells(pair, method) for pair in all_pairs([file]) for method in pair.rows))


def _rates() -> tuple[str, dict[str, float]]:
    return cluster_cost.rates_of(cost.read(cost.RECORDED)[-1])


TABLES: Mapping[str, Callable[[], str]] = {
    "families": families,
    "real": real,
    "methods": by_damage,
    "methods-price": by_price,
    "methods-deeper": deeper,
    "borderline": borderline,
    **{f"methods-{file}": functools.partial(every, file) for file in ALL},
    "cost-parts": lambda: cost.parts_table(cost.read(cost.RECORDED)),
    "cost-repairs": lambda: cost.repairs_table(cost.read(cost.RECORDED)),
    "cost-rates": lambda: cluster_cost.rates_table(*_rates()),
    "cost-rows": lambda: cluster_cost.rows_table(*_rates()),
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
