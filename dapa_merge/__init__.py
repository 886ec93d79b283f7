"""dapa-merge: give a fine-tuned model its safety back (DAPA, arXiv 2406.01514).

Public names are imported on first use. Importing the package must stay cheap, because pydantic imports it in every
program of an environment where it is installed (see `pydantic_hook`).
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dapa_merge.api import evaluate, inspect, push, repair, search, verify
    from dapa_merge.delta.minimize import minimize
    from dapa_merge.errors import DapaError
    from dapa_merge.inspect.inspection import Inspection
    from dapa_merge.measure.callback import Candidate, evaluator
    from dapa_merge.measure.evaluate import Evaluated
    from dapa_merge.measure.figures import Figures
    from dapa_merge.measure.meter import MeasuredModel
    from dapa_merge.measure.refusal.classify import classify
    from dapa_merge.publish.commit import Published
    from dapa_merge.recipe.parse import load_recipe
    from dapa_merge.recipe.recipe import Recipe
    from dapa_merge.report.report import Report
    from dapa_merge.search.result import Search
    from dapa_merge.verify.result import Check

__version__ = "0.1.0"

_PUBLIC = {
    "Candidate": "dapa_merge.measure.callback",
    "Check": "dapa_merge.verify.result",
    "DapaError": "dapa_merge.errors",
    "Evaluated": "dapa_merge.measure.evaluate",
    "Figures": "dapa_merge.measure.figures",
    "Inspection": "dapa_merge.inspect.inspection",
    "MeasuredModel": "dapa_merge.measure.meter",
    "Published": "dapa_merge.publish.commit",
    "Recipe": "dapa_merge.recipe.recipe",
    "Report": "dapa_merge.report.report",
    "Search": "dapa_merge.search.result",
    "classify": "dapa_merge.measure.refusal.classify",
    "evaluate": "dapa_merge.api",
    "evaluator": "dapa_merge.measure.callback",
    "load_recipe": "dapa_merge.recipe.parse",
    "minimize": "dapa_merge.delta.minimize",
    "push": "dapa_merge.api",
    "repair": "dapa_merge.api",
}
# Packages that are called as the function of their name.
_CALLED = ("inspect", "search", "verify")
__all__ = [
    "Candidate",
    "Check",
    "DapaError",
    "Evaluated",
    "Figures",
    "Inspection",
    "MeasuredModel",
    "Published",
    "Recipe",
    "Report",
    "Search",
    "__version__",
    "classify",
    "evaluate",
    "evaluator",
    "inspect",
    "load_recipe",
    "minimize",
    "push",
    "repair",
    "search",
    "verify",
]


def __getattr__(name: str) -> object:
    if name in _CALLED:
        return importlib.import_module(f"dapa_merge.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
