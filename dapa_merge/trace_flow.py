"""The flow of `dapa-merge trace`: what is traced, and the folder that keeps what was found.

The same command goes on with what a killed one left.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from dapa_merge.new_file import replace_file
from dapa_merge.progress import Reporter
from dapa_merge.recipe import Recipe
from dapa_merge.search_options import SearchOptions
from dapa_merge.search_record import models_parts
from dapa_merge.selection import make_plan, plan_of_all, split_prompts
from dapa_merge.trace_options import TraceOptions
from dapa_merge.trace_result import Traced
from dapa_merge.trace_store import (
    FIGURES_NAME,
    PAGE_NAME,
    SUMMARY_NAME,
    check_folder,
    forget_figures,
    opened,
)


def trace_recipe(
    recipe: Recipe, out: Path, wanted: TraceOptions, options: SearchOptions, reporter: Reporter
) -> dict[str, Any]:
    """Trace a recipe's models, and leave traces, figures, a summary and a page in a folder.

    Args:
        recipe: What to trace.
        out: A new folder, or one of a trace of the same models: what is in it already is not made again.
        wanted: How to trace.
        options: Where to evaluate, and where the journal of the search is.
        reporter: Hears of the steps.

    Returns:
        The summary, plain data.

    Raises:
        CannotRepair: If no prompt is refused by the source and answered by the target.
        UsageError: If matplotlib is not installed, or the folder is of something else.
        DapaError: For whatever else does not fit; what was found is kept.
    """
    # Before the hours that a trace may take: this raises where matplotlib is not.
    import dapa_merge.trace.plot  # noqa: F401
    from dapa_merge.evaluate.prompts import load_prompts
    from dapa_merge.meters import search_meter, skills_of
    from dapa_merge.trace.subject import with_subject
    from dapa_merge.trace_stages import Stages

    check_folder(out)
    chosen = make_plan(recipe, partial=False, allow_pickle=options.allow_pickle)
    # What a search picks is judged with prompts that it has not seen.
    prompts = split_prompts(recipe)[1] if recipe.layers is None else load_prompts(recipe.prompts)
    meter = replace(search_meter(recipe, prompts, options.evaluators), skills=skills_of(prompts, recipe.skills))
    if wanted.subjects:
        with_subject(prompts.harmful, wanted.subjects)
    plan = plan_of_all(recipe, chosen)
    models = {"target": plan.target, "source": plan.source}
    with opened(out, models_parts(recipe, models, meter, options.device, reporter)) as journal:
        return _write(Stages(recipe, chosen, plan, meter, out, wanted, options, journal, reporter).run(), out)


def _write(found: Traced, out: Path) -> dict[str, Any]:
    """Write figures, summary and page; returns the summary."""
    from dapa_merge.trace.plot_style import render
    from dapa_merge.trace_figures import figures_of
    from dapa_merge.trace_page import Picture, page
    from dapa_merge.trace_summary import summarize

    summary = summarize(found)
    pictures = []
    forget_figures(out)
    for name, caption, figure in figures_of(found):
        for kind in ("png", "svg"):
            content = render(figure, kind)
            replace_file(out / FIGURES_NAME / f"{name}.{kind}", content)
            if kind == "png":
                pictures.append(Picture(name, caption, content))
    replace_file(out / SUMMARY_NAME, (json.dumps(summary, indent=2) + "\n").encode())
    replace_file(out / PAGE_NAME, page(summary, pictures).encode())
    return summary
