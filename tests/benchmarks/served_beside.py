"""A model here and the same behind servers, figure by figure: `served_beside.py FOLDER NAME=URL [NAME=URL ...]`.

Measures the folder, and then each model that a server at URL has under a NAME (the folder converted, quantized, or as
it is), on the same prompts with the same length of answers. An answer is the same if one begins with the other: a local
one ends where its verdict is certain.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import groupby

from tiny import parse

from dapa_merge.measure.evaluate import evaluate_models
from dapa_merge.measure.figures import Response
from dapa_merge.measure.meter import MeasuredModel
from dapa_merge.recipe.asking import Asking, ServedModel
from dapa_merge.recipe.options import Options


def rows(name: str, here: Sequence[Response], there: Sequence[Response]) -> Iterator[str]:
    """A line for each kind of prompts, with the prompts whose verdicts differ below."""
    pairs = zip(here, there, strict=True)
    for kind, group in groupby(pairs, key=lambda pair: pair[0].kind):
        same = answers = refused = 0
        differing = []
        for ours, theirs in (found := list(group)):
            refused += theirs.outcome == "refused"
            same += theirs.outcome == ours.outcome
            one, other = (text.response.strip() for text in (ours, theirs))
            answers += one.startswith(other) or other.startswith(one)
            if ours.outcome != theirs.outcome:
                differing.append(f"    {ours.outcome} here, {theirs.outcome} there: {ours.prompt[:70]!r}")
        number = len(found)
        yield f"| {name} | {kind} | {refused / number:.3f} | {same} of {number} | {answers} of {number} |"
        yield from differing


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the model here")
    parser.add_argument("served", nargs="+", metavar="NAME=URL", help="as out-q4=http://localhost:8080/v1")
    parser.add_argument("--prompts", default="builtin")
    parser.add_argument("--attacks", default="prefill")
    parser.add_argument("--limit", type=int, default=24, help="of prompts of each kind")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="of each answer")
    parser.add_argument("--dtype", help="that the model here computes in; default: that of its weights")
    parser.add_argument("--concurrency", type=int, default=8, help="of requests")
    arguments = parse(parser, argv, limit=2, max_new_tokens=4)
    served = [ServedModel(*one.split("=", 1), arguments.concurrency) for one in arguments.served]
    here: dict[str, MeasuredModel] = {}

    def tell(name: str, measured: MeasuredModel) -> None:
        first = here.setdefault("here", measured)
        # Kinds that a server was not asked are left out.
        kinds = {response.kind for response in measured.responses}
        ours = [response for response in first.responses if response.kind in kinds]
        print(*rows("here" if measured is first else name, ours, measured.responses), sep="\n", flush=True)

    print("| model | prompts | refused | same verdict as here | same answer as here |\n|---|---|---|---|---|")
    evaluate_models(
        [arguments.folder, *served],
        arguments.prompts,
        Options(dtype=arguments.dtype),
        asking=Asking(limit=arguments.limit),
        tell=tell,
        attacks=arguments.attacks,
        max_new_tokens=arguments.max_new_tokens,
    )


if __name__ == "__main__":
    main()
