"""How many tests a search asks until its result is proved 1-minimal, beside its peers and its limits.

`python tests/benchmarks/search_cost.py [--seeds 200]`: distinct selections asked, the full one included, as mean and
maximum over random oracles. `planted`: a selection holds if it has every needed unit; these stand in up to three runs.
`scattered`: the same, anywhere. `additive`: each unit contributes a share, most of them near one layer, and 80 % of the
total are enough. `noisy`: planted, but judged by a measurement with an error, so that it is not monotone.

The limits are those of the project's plan; a star marks what is above probdd where no limit was set. picire's ddmin is
asked in the same run (picire 21.8 needs setuptools<81).
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import warnings
from collections.abc import Callable, Sequence

from tiny import parse

from dapa_merge.delta.minimize import minimize

Oracle = Callable[[frozenset[int]], bool]
# By (oracle, units, needed): published or planned figures.
REFERENCE = {
    ("planted", 32, 6): {"picire": 60, "probdd": 33.5},
    ("planted", 64, 6): {"picire": 67, "probdd": 38},
    ("planted", 128, 10): {"picire": 112, "probdd": 63},
    ("additive", 32, 0): {"picire": 51, "probdd": 29},
}
LIMITS = {
    ("planted", 32, 1): 4,
    ("planted", 32, 6): 14,
    ("planted", 64, 6): 15,
    ("planted", 128, 10): 22,
}


# The oracles on which each kind of prior has a limit, by its first four letters.
LIMITED = {
    "good": ("planted",),
    "poor": ("planted",),
    "reve": ("planted",),
    "none": ("planted", "additive"),
}


def planted(num_units: int, num_needed: int, generator: random.Random) -> tuple[list[float], Oracle]:
    """Needed units in runs; the first value is how much each unit matters."""
    num_runs = min(3, num_needed)
    sizes = [num_needed // num_runs + (run < num_needed % num_runs) for run in range(num_runs)]
    needed: set[int] = set()
    while len(needed) != num_needed:
        starts = [generator.randrange(num_units - size + 1) for size in sizes]
        needed = {start + offset for start, size in zip(starts, sizes, strict=True) for offset in range(size)}
    return _matter(num_units, needed), lambda selection: needed <= selection


def scattered(num_units: int, num_needed: int, generator: random.Random) -> tuple[list[float], Oracle]:
    """Needed units anywhere."""
    needed = set(generator.sample(range(num_units), num_needed))
    return _matter(num_units, needed), lambda selection: needed <= selection


def additive(num_units: int, _: int, generator: random.Random) -> tuple[list[float], Oracle]:
    """Shares that follow a bell around one layer, and 80 % of their sum are enough."""
    center = generator.uniform(0.25, 0.75) * num_units
    shares = [
        math.exp(-(((unit - center) / (num_units / 8)) ** 2) / 2) * generator.uniform(0.5, 1.5)
        for unit in range(num_units)
    ]
    enough = 0.8 * sum(shares)
    largest = max(shares)
    return [
        0.8 * share / largest for share in shares
    ], lambda selection: sum(shares[unit] for unit in selection) >= enough


def noisy(num_units: int, num_needed: int, generator: random.Random) -> tuple[list[float], Oracle]:
    """Planted, but judged by a measurement with an error: half a needed unit is two standard deviations."""
    matter, _ = planted(num_units, num_needed, generator)
    needed = {unit for unit, value in enumerate(matter) if value}
    salt = generator.random()

    def measured(selection: frozenset[int]) -> bool:
        error = random.Random(f"{salt} {sorted(selection)}").gauss(0, 0.25)
        return len(needed & selection) + error * (len(selection) < num_units) >= num_needed - 0.5

    return matter, measured


def _matter(num_units: int, needed: set[int]) -> list[float]:
    return [0.8 if unit in needed else 0.0 for unit in range(num_units)]


ORACLES = {"planted": planted, "scattered": scattered, "additive": additive, "noisy": noisy}
CASES = [
    ("planted", 32, 1), ("planted", 32, 6), ("planted", 64, 6), ("planted", 128, 10),
    ("scattered", 32, 6), ("scattered", 64, 6), ("scattered", 128, 10),
    ("additive", 32, 0), ("additive", 64, 0), ("additive", 128, 0),
    ("noisy", 32, 6), ("noisy", 64, 6), ("noisy", 128, 10),
]  # fmt: skip


def prior_of(kind: str, matter: list[float], generator: random.Random) -> dict[int, float] | None:
    """A prior: what matters with Gaussian noise; `reversed` has the good one's sign turned."""
    if kind == "none":
        return None
    noise = {"good 0.2": 0.2, "poor 0.5": 0.5, "reversed": 0.2}[kind]
    sign = -1 if kind == "reversed" else 1
    return {unit: sign * (value + generator.gauss(0, noise)) for unit, value in enumerate(matter)}


def picire_tests(num_units: int, holds: Oracle) -> int:
    """Distinct configurations that picire's ddmin asks about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from picire import DD, Outcome
    asked: set[frozenset[int]] = set()

    def test(configuration: list[int], _: object) -> Outcome:
        asked.add(frozenset(configuration))
        return Outcome.FAIL if holds(frozenset(configuration)) else Outcome.PASS

    DD(test)(list(range(num_units)))
    return len(asked)


def our_tests(num_units: int, holds: Oracle, algorithm: str, prior: dict[int, float] | None) -> tuple[int, int]:
    """Tests that one of our algorithms asks, and how many units it keeps; fails if the result is not proved."""
    minimum = minimize(range(num_units), holds, algorithm=algorithm, prior=prior)
    if not minimum.one_minimal:
        raise AssertionError(f"{algorithm} ended without a certificate")
    return minimum.tests, len(minimum.units)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each case, and whether the limits are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200)
    arguments = parse(parser, argv, seeds=1)
    seeds = range(arguments.seeds)
    kinds = ("good 0.2", "poor 0.5", "reversed", "none")
    print("distinct tests, mean (max); picire's and probdd's published figures in brackets\n")
    print(
        f"{'oracle':10} {'units/needed':>12} {'bound':>6} {'picire ddmin':>16} {'ddmin':>11} {'probdd':>18}"
        + "".join(f"{'guided, ' + kind:>18}" for kind in kinds)
        + "   limits"
    )
    broken = 0
    for name, num_units, num_needed in CASES[:: 4 if arguments.tiny else 1]:
        columns: dict[str, list[int]] = {}
        kept = []
        for seed in seeds:
            generator = random.Random(seed)
            matter, holds = ORACLES[name](num_units, num_needed, generator)
            columns.setdefault("picire", []).append(picire_tests(num_units, holds))
            for algorithm in ("ddmin", "probdd"):
                columns.setdefault(algorithm, []).append(our_tests(num_units, holds, algorithm, None)[0])
            for kind in kinds:
                tests, num_kept = our_tests(num_units, holds, "guided", prior_of(kind, matter, generator))
                columns.setdefault(kind, []).append(tests)
                kept.append(num_kept)
        means = {column: statistics.mean(figures) for column, figures in columns.items()}
        reference = REFERENCE.get((name, num_units, num_needed), {})
        limit = LIMITS.get((name, num_units, num_needed))
        verdicts = {f"good <= {limit}": means["good 0.2"] <= limit} if limit else {}
        verdicts |= {f"{kind} <= probdd": means[kind] <= means["probdd"] for kind in kinds}
        faults = [verdict for verdict, is_kept in verdicts.items() if not is_kept and name in LIMITED[verdict[:4]]]
        broken += len(faults)
        cells = {column: f"{means[column]:.1f} ({max(figures)})" for column, figures in columns.items()}
        for kind in kinds:
            cells[kind] += "*" * (means[kind] > means["probdd"])
        for peer, figure in reference.items():
            cells[peer] += f" [{figure}]"
        print(
            f"{name:10} {f'{num_units}/{num_needed or round(statistics.mean(kept))}':>12} "
            f"{(num_needed or statistics.mean(kept)) + 1:6.1f} "
            f"{cells['picire']:>16} {cells['ddmin']:>11} {cells['probdd']:>18}"
            + "".join(f"{cells[kind]:>18}" for kind in kinds)
            + "   "
            + (f"BROKEN: {', '.join(faults)}" if faults else "kept")
        )
    print(f"\n{broken} limits broken")


if __name__ == "__main__":
    main()
