"""What a test of a search costs: ours beside plain batched generation of everything, for the same selections.

`python tests/benchmarks/examination.py [--batch-size 32]`: searches the miniature's gates and the shadow pair's gates,
ups and downs, as `dapa-merge` does, and takes the time of every test: weights in and out, generation, verdict.
Then each selection is tested again as everybody would: transplanted in memory, all prompts answered by transformers'
`generate` in batches of the same size, all passages read, all answers judged. The limit is 5 times as fast. Seconds are
the process's own, on one thread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

from generation import plainly
from tiny import few_prompts, parse

from dapa_merge import miniature
from dapa_merge.checkpoint.location import Location
from dapa_merge.measure.figures import Response
from dapa_merge.measure.prompts.parts import split_prompts
from dapa_merge.measure.refusal.classify import classify
from dapa_merge.plan.selection import make_plan
from dapa_merge.recipe.constraints import Constraint
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parse import parse_recipe
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.bench import Bench, make_bench
from dapa_merge.search.identity import open_journal
from dapa_merge.search.requirement import PROMPT_KINDS
from dapa_merge.search.search import search
from dapa_merge.search.session import Session

LIMIT = 5.0


class Plain:
    """A candidate that answers every prompt before it is asked anything."""

    def __init__(self, bench: Bench, selection: Any, batch_size: int) -> None:
        meter = bench.meter
        self._responses: dict[str, list[list[Response]]] = {}
        with bench.live.transplanted(selection) as model:
            for kind in PROMPT_KINDS:
                # In the pieces that the requirement knows, which are as large as a batch.
                self._responses[kind] = []
                for piece in bench._pieces[kind]:
                    said = plainly(model, bench.live.tokenizer, piece, meter.max_new_tokens, batch_size)
                    self._responses[kind].append(
                        [
                            Response(kind, "", prompt, text, classify(text, prompt).value)
                            for text, prompt in zip(said, piece, strict=True)
                        ]
                    )
            self._perplexity = meter.measure(model, bench.live.tokenizer, tuple(selection)).perplexity

    def responses(self, kind: str, piece: int) -> list[Response]:
        return self._responses[kind][piece]

    def figure(self, constraint: Constraint) -> float:
        """The one that is measured as a whole."""
        return self._perplexity


def compare(name: str, recipe: Recipe, batch_size: int) -> None:
    """Search, and test each selection of the search again."""
    plan = make_plan(recipe)
    searching = split_prompts(recipe).search
    ours: list[tuple[Any, bool, float]] = []
    examine = Bench.examine

    def timed(bench: Bench, selection: Any, *arguments: Any, **options: Any) -> Any:
        selection = tuple(selection)
        start = time.process_time()
        verdict = examine(bench, selection, *arguments, **options)
        ours.append((selection, verdict.holds, time.process_time() - start))
        return verdict

    with (
        tempfile.TemporaryDirectory() as folder,
        closing(make_bench(recipe, plan, searching, Options("cpu"))) as bench,
    ):
        options = Options("cpu", Path(folder) / "journal")
        with (
            mock.patch.object(Bench, "examine", timed),
            closing(open_journal(recipe, plan, bench, options.journal)) as journal,
        ):
            found = search(Session(recipe, plan, bench, journal, options))
        examiner = bench.require(found.requirement)
        theirs, wrong = [], 0
        for selection, holds, _ in ours:
            start = time.process_time()
            verdict = examiner.examine(Plain(bench, selection, batch_size), stop_early=False)
            theirs.append(time.process_time() - start)
            wrong += verdict.holds is not holds
    seconds = [each for *_, each in ours]
    print(
        f"{name}, batches of {batch_size}: {len(ours)} tests; a test {statistics.mean(seconds):.3f} s, plain "
        f"{statistics.mean(theirs):.3f} s, {sum(theirs) / sum(seconds):.1f} times as fast (limit {LIMIT}); "
        f"{wrong} verdicts differ",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    arguments = parse(parser, argv)
    recipe = replace(parse_recipe(miniature.recipe_text()), batch_size=arguments.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.tiny:
            few = replace(recipe, prompts=str(few_prompts(Path(folder))), max_new_tokens=4)
            compare("miniature, few prompts", few, arguments.batch_size)
            return
    shadow = replace(
        recipe,
        target=Location(str(miniature.path("shadow-target"))),
        source=Location(str(miniature.path("shadow-source"))),
    )
    for name, wanted in (
        ("miniature, gates, guided", recipe),
        ("miniature, gates, ddmin", replace(recipe, search="ddmin")),
        ("shadow pair, all modules, guided", replace(shadow, modules=("gate", "up", "down"))),
    ):
        compare(name, wanted, arguments.batch_size)


if __name__ == "__main__":
    main()
