"""The command `dapa-merge trace`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dapa_merge.cli_options import (
    allow_pickle_option,
    device_option,
    evaluator_options,
    journal_option,
    json_option,
    out_argument,
    recipe_argument,
    search_options,
)
from dapa_merge.cli_output import print_answer, reporter
from dapa_merge.errors import UsageError
from dapa_merge.trace_options import TRACED, TraceOptions

if TYPE_CHECKING:
    from rich.console import Console

    from dapa_merge.evaluate.options import EvaluatorOptions

DEFAULTS = TraceOptions()


@click.command()
@recipe_argument
@out_argument
@click.option(
    "--model",
    "traced",
    type=click.Choice(TRACED),
    default=DEFAULTS.traced,
    show_default=True,
    help="Which model is traced causally.",
)
@click.option(
    "--kinds",
    metavar="LIST",
    help="What is restored, with commas: hidden, mlp, attention, gate, up, down.  [default: all that the model has]",
)
@click.option(
    "--num-prompts",
    type=click.IntRange(1),
    default=DEFAULTS.num_prompts,
    show_default=True,
    help="Trace at most so many prompts causally.",
)
@click.option(
    "--noise",
    type=click.FloatRange(0),
    default=DEFAULTS.noise,
    show_default=True,
    help="Noise on the subject's embeddings, in their standard deviations.",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=DEFAULTS.num_samples,
    show_default=True,
    help="Samples of noise for each prompt.",
)
@click.option(
    "--window",
    type=click.IntRange(1),
    help="Layers of MLP or attention that are restored at once, half of them before the one that is shown.  "
    "[default: a fifth of all]",
)
@click.option(
    "--num-tokens",
    type=click.IntRange(1),
    default=DEFAULTS.num_tokens,
    show_default=True,
    help="Tokens of each response that are counted, from the first in which refusal and answer differ.",
)
@click.option(
    "--subject",
    "subjects",
    metavar="TEXT",
    multiple=True,
    help="Words that the noise is put on; only prompts that contain them are traced. May be given several times.  "
    "[default: of each prompt all but how it begins, as in: how do I]",
)
@click.option(
    "--refusal", metavar="TEXT", help="Compare this refusal with --answer for all prompts.  [default: the models' own]"
)
@click.option("--answer", metavar="TEXT", help="The answer that --refusal is compared with.")
@click.option(
    "--controls",
    type=click.IntRange(0),
    default=DEFAULTS.num_controls,
    show_default=True,
    help="Random selections for each size of a group.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=DEFAULTS.seed,
    show_default=True,
    help="Decides the noise and the random controls.",
)
@click.option("--no-search", is_flag=True, help="Do not search for a selection where the recipe names no layers.")
@click.option(
    "--examples",
    type=click.IntRange(0),
    default=DEFAULTS.num_examples,
    show_default=True,
    help="Draw so many prompts each by itself.",
)
@device_option
@journal_option
@evaluator_options
@allow_pickle_option
@json_option
@click.pass_obj
def trace(
    quiet: bool,
    recipe: Path,
    out: Path,
    traced: str,
    kinds: str | None,
    num_prompts: int,
    noise: float,
    samples: int,
    window: int | None,
    num_tokens: int,
    subjects: tuple[str, ...],
    refusal: str | None,
    answer: str | None,
    controls: int,
    seed: int,
    no_search: bool,
    examples: int,
    device: str,
    journal: Path | None,
    evaluators: EvaluatorOptions,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Show where the alignment of RECIPE's models lives.

    Writes figures, traces, summary.json and a page, index.html, to OUT. Traces refusing causally, transplants each unit
    alone, puts groups of units in and takes them out, beside random ones, measures edits of every size, and says
    whether tracing would have found what the search selects. Stopped, the same command goes on. Needs matplotlib.
    """
    from dapa_merge.recipe_file import load_recipe
    from dapa_merge.trace_flow import trace_recipe

    if not math.isfinite(noise):
        raise UsageError(f"--noise is {noise}; write a number of at least 0")
    if not all(subject.strip() for subject in subjects):
        raise UsageError("--subject is empty; write what stands in the prompt, or leave it out")
    wanted = TraceOptions(
        traced=traced,
        kinds=_kinds(kinds),
        num_prompts=num_prompts,
        noise=noise,
        num_samples=samples,
        window=window,
        num_tokens=num_tokens,
        seed=seed,
        subjects=subjects,
        responses=_responses(refusal, answer),
        num_controls=controls,
        searches=not no_search,
        num_examples=examples,
    )
    options = search_options(device, journal, None, evaluators, allow_pickle)
    summary = trace_recipe(load_recipe(recipe), out, wanted, options, reporter(quiet))

    def show(console: Console) -> None:
        for sentence in summary["findings"]:
            console.print(f"- {sentence}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"\nthe page: {out / 'index.html'}", highlight=False, markup=False, soft_wrap=True)

    print_answer(summary, show, as_json)


def _kinds(text: str | None) -> tuple[str, ...] | None:
    from dapa_merge.trace_options import KINDS

    if text is None:
        return None
    kinds = tuple(kind.strip().lower() for kind in text.split(","))
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"--kinds: there is no kind {kind!r}; known are {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in kinds)


def _responses(refusal: str | None, answer: str | None) -> tuple[str, str] | None:
    if refusal is None and answer is None:
        return None
    if refusal is None or answer is None:
        raise UsageError("--refusal and --answer are compared with each other; give both or neither")
    if not refusal.strip() or not answer.strip() or refusal == answer:
        raise UsageError("--refusal and --answer must be texts that differ, and neither may be empty")
    return refusal, answer
