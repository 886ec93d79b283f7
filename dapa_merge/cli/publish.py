"""The commands that publish a model and keep it current: `card`, `push`, `outdated` and `gate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dapa_merge.checkpoint.location import is_published
from dapa_merge.cli.options import (
    FilePath,
    card_options,
    destination_options,
    json_option,
    print_answer,
    recipe_argument,
)
from dapa_merge.errors import UsageError, printable
from dapa_merge.progress import quiet
from dapa_merge.publish.options import CardOptions, Destination
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.report import limits as gates
from dapa_merge.report.report import REPORT_NAME, read_report

GATE_FAILED = 6
OUTDATED = 10
SHARE = click.FloatRange(0, 1)
CHANGE = click.FloatRange(-1, 1)


@click.command()
@recipe_argument
@click.option(
    "--published",
    metavar="REPO",
    help="Compare with the lock of the model that is published there, or that an open pull request of yours brings "
    "there, rather than with the one next to RECIPE.",
)
@json_option
def outdated(recipe: Path, published: str | None, as_json: bool) -> None:
    """Ask whether a model of RECIPE moved.

    Compares the weight, config and tokenizer files of target and source with the lock that `run` wrote next to RECIPE.
    A commit that changes none of them, e.g. one of a card, does not count. The exit code is 0 if nothing changed, and
    10 if RECIPE should be run (again).
    """
    from dapa_merge.publish.outdated import compare_with_lock

    with quiet("huggingface_hub", bars=True):
        status = compare_with_lock(load_recipe(recipe), recipe, published)
    print_answer(status.to_json(), status.lines(), as_json)
    if status.is_outdated:
        sys.exit(OUTDATED)


@click.command()
@click.argument("report")
@click.option("--min-dsr", type=SHARE, help="DSR of the result, at least.")
@click.option("--min-dsr-gain", type=CHANGE, help="Rise of DSR from the target to the result, at least.")
@click.option("--max-over-refusal", type=SHARE, help="Over-refusal of the result, at most.")
@click.option("--max-over-refusal-rise", type=CHANGE, help="Its rise from the target to the result, at most.")
@click.option("--max-perplexity", type=float, help="Perplexity of the result, at most.")
@click.option("--max-perplexity-ratio", type=float, help="Perplexity of the result to that of the target, at most.")
@click.option(
    "--max-divergence", type=float, help="Divergence of the result from the target, in nats per token, at most."
)
@click.option(
    "--min-kept",
    type=SHARE,
    help="Share of keep prompts that the result answers word for word as before, at least.",
)
@click.option(
    "--max-kept-refused", type=SHARE, help="Share of them that the result refuses and the target does not, at most."
)
@click.option("--min-skill", metavar="[NAME=]FLOAT", multiple=True, help="A skill of the result, or each, at least.")
@click.option("--min-skill-kept", type=float, help="Each skill of the result to that of the target, at least.")
@click.option(
    "--confident",
    is_flag=True,
    help="Hold the worse end of the 95 % interval of DSR, over-refusal, --min-kept and skills against their limits.",
)
@click.option(
    "--summary",
    type=FilePath(),
    envvar="GITHUB_STEP_SUMMARY",
    show_envvar=True,
    help="Append the table to this file, as Markdown.",
)
@json_option
def gate(
    report: str,
    min_skill: tuple[str, ...],
    confident: bool,
    summary: Path | None,
    as_json: bool,
    **asked: float | None,
) -> None:
    """Fail unless the figures of a result are good enough.

    REPORT is a result's folder, its dapa_report.json, or the Hub id of a published result, also id@revision. A figure
    that was not measured does not pass. The exit code is 6 if a figure is outside of its limit.
    """
    limits = gates.Limits(min_skills=tuple(map(gates.parse_skill, min_skill)), confident=confident, **asked)
    found = read_report(_report_file(report))
    verdicts = gates.judge(found, limits)

    def show(console: Console) -> None:
        table = Table("", "found", "asked", "")
        for verdict in verdicts:
            told = "passes" if verdict.passes else "FAILS"
            table.add_row(Text(printable(verdict.figure)), verdict.found, verdict.asked, told)
        console.print(table)

    print_answer(gates.as_json(verdicts), show, as_json)
    if summary is not None:
        try:
            with summary.open("a", encoding="utf-8") as file:
                file.write(gates.as_markdown(found, verdicts))
        except OSError as error:
            raise UsageError(f"--summary {summary} cannot be written: {error.strerror}") from error
    if not all(verdict.passes for verdict in verdicts):
        sys.exit(GATE_FAILED)


def _report_file(place: str) -> Path:
    if not is_published(place):
        return Path(place)
    from dapa_merge.verify.published import fetch_result

    with quiet("huggingface_hub", bars=True):
        return fetch_result(place, REPORT_NAME).folder / REPORT_NAME


@click.command()
@click.argument("out", type=FilePath())
@card_options
@click.option("--replace-card", is_flag=True, help="Replace a README.md that dapa-merge and mergekit did not write.")
@json_option
def card(out: Path, card: CardOptions, replace_card: bool, as_json: bool) -> None:
    """Write or renew the model card of OUT.

    OUT was written by `run` or `mergekit-yaml`; the card is OUT/README.md. It states the measurements, or "not
    measured". Text that you wrote above and below the marked part is kept, and so is your metadata.
    """
    from dapa_merge.publish.write_card import write_card

    with quiet("huggingface_hub", bars=True):
        path = write_card(out, card, replace_other=replace_card)
    print_answer({"card": str(path)}, [f"wrote {path}"], as_json)


@click.command()
@click.argument("out", type=FilePath())
@click.argument("repository", metavar="REPO")
@destination_options
@card_options
@click.option("--message", help="Of the commit, or the pull request's title.  [default: what it is]")
@click.option("--dry-run", is_flag=True, help="Show the files and the commit, and send nothing; needs no token.")
@json_option
def push(
    out: Path,
    repository: str,
    destination: dict[str, Any],
    card: CardOptions,
    message: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Publish OUT in the Hub's repository REPO.

    Verifies OUT first, writes its card, and makes one commit of it, so nobody ever sees half a model; afterwards
    compares the Hub's checksums with those of OUT. Run it again after a failure: nothing is sent twice. Creates REPO if
    it is missing. Leaves out hidden files, weights of other programs (GGUF, ONNX) and the models' responses. The token
    is that of HF_TOKEN, of `hf auth login`, or of a CI job (HF_OIDC_RESOURCE).
    """
    from dapa_merge.publish import push as publishing

    to = Destination(repository, message=message, **destination)
    with quiet("huggingface_hub", bars=True):
        if dry_run:
            ready = publishing.prepare(out, to, card)
            print_answer({"repository": repository, **ready.to_json()}, ready.lines(to), as_json)
            return
        published = publishing.push(out, to, card)
    print_answer(published.to_json(), published.lines(), as_json)
