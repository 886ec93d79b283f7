"""dapa-merge: give a fine-tuned model its safety back (DAPA, arXiv 2406.01514).

Public names are imported on first use. Importing the package must stay cheap, because pydantic imports it in every
program of an environment where it is installed (see `pydantic_hook`).
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "Recipe": "dapa_merge.recipe.recipe",
    "load_recipe": "dapa_merge.recipe.parse",
    "repair": "dapa_merge.flow",
    "Report": "dapa_merge.report.report",
    "minimize": "dapa_merge.delta.minimize",
    "classify": "dapa_merge.measure.refusal.classify",
    "evaluator": "dapa_merge.measure.callback",
    "Candidate": "dapa_merge.measure.callback",
    "DapaError": "dapa_merge.errors",
}
__all__ = [
    "Candidate",
    "DapaError",
    "Recipe",
    "Report",
    "__version__",
    "classify",
    "evaluator",
    "load_recipe",
    "minimize",
    "repair",
]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
