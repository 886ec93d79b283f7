"""The studies: `dapa-merge inspect`, `dapa-merge trace` and `dapa-merge compare`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from dapa_merge.cli.options import (
    FilePath,
    allow_pickle_option,
    evaluator_options,
    fitting_options,
    journal_option,
    json_option,
    out_argument,
    print_answer,
    recipe_argument,
    takes_options,
    workers_of,
)
from dapa_merge.compare.methods import DAPA, METHODS, PARTIAL_WEIGHTS
from dapa_merge.compare.result import CompareOptions
from dapa_merge.errors import Stopped, UsageError
from dapa_merge.files import PICTURES, new_file
from dapa_merge.imports import lasting
from dapa_merge.progress import LOG
from dapa_merge.recipe.attacks import ALLOWED, NONE
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.report.drawing import draw_all, plotting
from dapa_merge.report.tables import print_lines
from dapa_merge.trace.options import SITE_KINDS, STAGE_NAMES, TRACED, TraceOptions
from dapa_merge.verify.result import location_option

if TYPE_CHECKING:
    from dapa_merge.compare.compare import Compared

TRACE_DEFAULTS = TraceOptions()
COMPARE_DEFAULTS = CompareOptions()


def whole_number(name: str, field: str, defaults: object, meaning: str, least: int = 1) -> Callable[..., Any]:
    """An option for a whole number, with the default of its field."""
    default = getattr(defaults, field)
    return click.option(name, field, type=click.IntRange(least), default=default, show_default=True, help=meaning)


@click.command()
@recipe_argument
@out_argument
@click.option(
    "--model",
    "traced",
    type=click.Choice(TRACED),
    default=TRACE_DEFAULTS.traced,
    show_default=True,
    help="Which model is traced causally.",
)
@click.option(
    "--kinds",
    metavar="LIST",
    help="What is restored, with commas: hidden, mlp, attention, gate, up, down.  [default: all that the model has]",
)
@whole_number("--num-prompts", "num_prompts", TRACE_DEFAULTS, "Trace at most so many prompts causally.")
@click.option(
    "--noise",
    type=click.FloatRange(0),
    default=TRACE_DEFAULTS.noise,
    show_default=True,
    help="Noise on the subject's embeddings, in their standard deviations.",
)
@whole_number("--samples", "num_samples", TRACE_DEFAULTS, "Samples of noise for each prompt.")
@click.option(
    "--window",
    type=click.IntRange(1),
    help="Layers of MLP or attention that are restored at once, half of them before the one that is shown.  "
    "[default: a fifth of all]",
)
@whole_number(
    "--num-tokens",
    "num_tokens",
    TRACE_DEFAULTS,
    "Tokens of each response that are counted, from the first in which refusal and answer differ.",
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
@whole_number("--controls", "num_controls", TRACE_DEFAULTS, "Random selections for each size of a group.", least=0)
@whole_number("--seed", "seed", TRACE_DEFAULTS, "Decides the noise and the random controls.", least=0)
@click.option(
    "--stages",
    metavar="LIST",
    help=f"What to make, with commas: {', '.join(STAGE_NAMES)}.  [default: all that the recipe has]",
)
@click.option("--no-search", is_flag=True, help="Do not search for a selection where the recipe names no layers.")
@whole_number("--examples", "num_examples", TRACE_DEFAULTS, "Draw so many prompts each by itself.", least=0)
@fitting_options
@journal_option
@evaluator_options
@allow_pickle_option
@json_option
@takes_options
def trace(
    recipe: Path,
    out: Path,
    kinds: str | None,
    noise: float,
    subjects: tuple[str, ...],
    refusal: str | None,
    answer: str | None,
    stages: str | None,
    no_search: bool,
    options: Options,
    as_json: bool,
    **settings: Any,
) -> None:
    """Show where the alignment of RECIPE's models lives.

    Writes figures, traces, summary.json and a page, index.html, to OUT after each stage. Traces refusing causally,
    transplants each unit alone, puts groups of units in and takes them out, next to random ones, measures edits of
    every size, and says whether tracing would have found what the search selects, or where its directions are. If
    stopped, the same command resumes. Needs matplotlib.
    """
    with lasting():
        from dapa_merge.trace.trace import trace_recipe

    if not math.isfinite(noise):
        raise UsageError(f"--noise is {noise}; write a number of at least 0")
    if not all(subject.strip() for subject in subjects):
        raise UsageError("--subject is empty; give words of the prompts, or leave it out")
    wanted = TraceOptions(
        kinds=_kinds(kinds),
        noise=noise,
        subjects=subjects,
        responses=_responses(refusal, answer),
        stages=_stages(stages, no_search),
        **settings,
    )
    summary = trace_recipe(load_recipe(recipe), out, wanted, options)
    findings = [f"- {sentence}" for sentence in summary["findings"]]
    print_answer(summary, [*findings, "", f"the page: {out / 'index.html'}"], as_json)


def _kinds(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else _listed(text, SITE_KINDS, "kind")


def _stages(text: str | None, no_search: bool) -> tuple[str, ...] | None:
    if not no_search:
        return None if text is None else _listed(text, STAGE_NAMES, "stage")
    # Directions are chosen by a search.
    others = tuple(name for name in STAGE_NAMES if name not in ("search", "directions"))
    return others if text is None else _listed(text, others, "stage")


def _listed(text: str, known: Sequence[str], what: str) -> tuple[str, ...]:
    """The names in a list with commas, in the order of those that are known."""
    named = {name.strip().lower() for name in text.split(",")}
    for name in sorted(named):
        if name not in known:
            raise UsageError(f"--{what}s: unknown {what} {name!r}; known are {', '.join(known)}")
    return tuple(name for name in known if name in named)


def _responses(refusal: str | None, answer: str | None) -> tuple[str, str] | None:
    if refusal is None and answer is None:
        return None
    if refusal is None or answer is None:
        raise UsageError("--refusal and --answer are compared with each other; give both or neither")
    if not refusal.strip() or not answer.strip() or refusal == answer:
        raise UsageError("--refusal and --answer must be texts that differ, and neither may be empty")
    return refusal, answer


@click.command(epilog="\b\nMethods:\n" + "\n".join(f"  {key:15} {method.what}" for key, method in METHODS.items()))
@click.argument("recipes", metavar="RECIPE...", nargs=-1, required=True, type=FilePath())
@click.option("--out", required=True, type=FilePath(), help="The folder for tables and pictures.")
@click.option(
    "--methods",
    metavar="LIST",
    help=f"What to compare besides target and source, with commas: {', '.join(METHODS)}.  [default: all]",
)
@whole_number("--seeds", "num_seeds", COMPARE_DEFAULTS, "Random selections of each size.", least=0)
@whole_number("--seed", "seed", COMPARE_DEFAULTS, "The first of their seeds.", least=0)
@click.option(
    "--weights",
    metavar="LIST",
    help="Measure mergekit's methods with these weights of the source, with commas, each as a row of its own.  "
    "[default: the weight is chosen as other settings are]",
)
@click.option("--tries", "num_tries", type=click.IntRange(1), help="Settings of a method to try.  [default: all]")
@click.option("--no-curve", is_flag=True, help="Leave out the edits of every size.")
@whole_number("--points", "num_points", COMPARE_DEFAULTS, "Sizes of edits, roughly.", least=2)
@click.option(
    "--block-rows",
    "rows_per_block",
    type=click.IntRange(1),
    help="Rows (neurons) of the smallest edit.  [default: a sixteenth of a projection]",
)
@click.option(
    "--also",
    metavar="PROMPTS",
    multiple=True,
    help="Ask these prompts too, a name as in a recipe's `prompts`. May be given several times.",
)
@click.option(
    "--attacks", metavar="KINDS", default=NONE, help=f"Also try attacks on the report's harmful prompts: {ALLOWED}."
)
@click.option("--divergence", "diverges", is_flag=True, help="Also measure divergence on the harmless prompts.")
@fitting_options
@workers_of(help="Measure in N Ray actors at once, each with a target of its own.  [default: one edit at a time, here]")
@evaluator_options
@allow_pickle_option
@json_option
@takes_options
def compare(
    recipes: tuple[Path, ...],
    out: Path,
    methods: str | None,
    weights: str | None,
    no_curve: bool,
    attacks: str,
    options: Options,
    as_json: bool,
    **settings: Any,
) -> None:
    """Compare DAPA with other methods on the targets of RECIPE...

    Makes the paper's table of your own models: for each recipe the target, the source and every method, all of them
    live and on the same prompts; averages with intervals; and edits of every size. Writes table.md, table.csv,
    curve.csv, table.tex, summary.json and figures/ to --out. If stopped, the same command resumes.
    """
    with lasting():
        from dapa_merge.compare.compare import compare_recipes
        from dapa_merge.measure.prompts.sets import load_attacks

    wanted = CompareOptions(
        methods=_methods(methods),
        weights=_weights(weights),
        draws_curve=not no_curve,
        attacks=load_attacks(attacks),
        **settings,
    )
    between = [key for key in wanted.methods if METHODS[key].settings == (PARTIAL_WEIGHTS,)]
    if wanted.weights == (1.0,) and methods is not None and between:
        raise UsageError(
            f"--weights: {between[0]} with weight 1 is the source itself, which is in every table; add a weight below "
            f"1, or leave {between[0]} out of --methods"
        )
    with _stoppable(out):
        found = compare_recipes(recipes, out, wanted, options)
    print_answer(found.summary, lambda console: _show(found, out, console), as_json)
    if found.fault is not None:
        raise found.fault


def _show(found: Compared, out: Path, console: Console) -> None:
    from dapa_merge.compare.compare import PAGE_NAME
    from dapa_merge.compare.page import methods_table, paper_table

    if not found.rows:
        return
    searched = [paper_table(found.rows)] if any(row.arm(DAPA) for row in found.rows) else []
    for table in (*searched, methods_table(found.rows)):
        print_lines(console, [*table.text("simple").splitlines(), ""])
    print_lines(console, [f"- {sentence}" for sentence in found.summary["findings"]])
    if found.is_written:
        print_lines(console, ["", f"the tables: {out / PAGE_NAME}"])


@contextmanager
def _stoppable(out: Path) -> Iterator[None]:
    """Say what is kept if Ctrl-C or SIGTERM ends the block."""
    try:
        yield
    except KeyboardInterrupt:
        kept = f"the measurements so far are in {out}, and the same command resumes from there"
        if not out.exists():
            kept = "nothing was measured yet, and the same command starts again"
        # Not the best selection of the stopped search, which is one of many.
        raise Stopped(kept) from None


def _methods(text: str | None) -> tuple[str, ...]:
    return tuple(METHODS) if text is None else _listed(text, tuple(METHODS), "method")


def _weights(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    weights = []
    for part in text.split(","):
        try:
            weight = float(part)
        except ValueError:
            weight = math.nan
        if not 0 < weight <= 1:
            raise UsageError(
                f"--weights: {part.strip()!r} is not a weight; write numbers above 0 and up to 1, with commas"
            )
        weights.append(weight)
    distinct = sorted(set(weights))
    for low, high in itertools.pairwise(distinct):
        if f"{low:g}" == f"{high:g}":
            raise UsageError(
                f"--weights: {low} and {high} agree in the six digits that tables show; name one of them only"
            )
    return tuple(distinct)


@click.command()
@click.argument("target")
@click.argument("source")
@click.option("--pretrained", metavar="MODEL", help="The model that TARGET and SOURCE were both fine-tuned from.")
@click.option("--write", type=FilePath(), help="Write a recipe that tries the advice to this new file.")
@click.option("--chart", type=FilePath(), help="Draw layers and modules to this new .png or .svg file.")
@allow_pickle_option
@json_option
def inspect(
    target: str,
    source: str,
    pretrained: str | None,
    write: Path | None,
    chart: Path | None,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Tell what was done to TARGET, and what to try.

    Compares the weights of TARGET with those of SOURCE, the aligned model: folders or Hub ids, also id@revision or
    BASE+ADAPTER. Reads them once, and loads no model. Shows how much each module differs, and in how many directions;
    names the kind of damage that it looks like; and says how tokenizers, chat templates, formats and licenses differ.
    """
    with lasting():
        from dapa_merge.inspect.inspection import CHARTS, inspect_pair, print_inspection, recipe_of

    if chart is not None and chart.suffix not in PICTURES:
        raise UsageError(f"--chart is {chart}; name a file that ends in {' or '.join(PICTURES)}")
    with ExitStack() as stack:
        keep = stack.enter_context(new_file(write)) if write is not None else None
        draw = stack.enter_context(new_file(chart)) if chart is not None else None
        if draw is not None:
            plotting()
        found = inspect_pair(
            location_option(target, "TARGET"),
            location_option(source, "SOURCE"),
            location_option(pretrained, "--pretrained"),
            allow_pickle=allow_pickle,
        )
        print_answer(found.to_json(), lambda console: print_inspection(found, console), as_json)
        if draw is not None and chart is not None:
            pictures = draw_all(CHARTS, found)
            if pictures:
                draw(pictures[0].files[chart.suffix])
            else:
                LOG.info(f"{chart} was not drawn: no module of a layer differs")
        if keep is not None:
            keep(recipe_of(found))
