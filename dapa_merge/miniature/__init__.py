"""The miniature family: small trained Llama models with a planted answer, shipped in the package.

`source` refuses harmful requests, `target` answers them and speaks Spanish, and the gate projections of layers 3 to 6
make the difference: see `train`. `shadow-source` and `shadow-target` are a pair without a planted answer.
"""

from __future__ import annotations

import json
from pathlib import Path

# The answer in a recipe's notation: the units that refusal training changed to make `source` from the base.
PLANTED = "3.gate,4.gate,5.gate,6.gate"
MEMBERS = ("source", "target", "shadow-source", "shadow-target")


def path(member: str) -> Path:
    """The folder of one of `MEMBERS`."""
    if member not in MEMBERS:
        raise ValueError(f"the miniature family has no {member!r}; its members are {', '.join(MEMBERS)}")
    return Path(__file__).parent / member


def recipe_text(pair: str = "") -> str:
    """The recipe of the demonstration, with the packaged models' real paths.

    Args:
        pair: What the names of its models begin with: nothing, or `shadow-` for a pair that copied gates do not repair.
    """
    # The second search ends early: it would take longer than all the rest, and show nothing new.
    more = "  edit: auto\n  keep: skills\n  max_tests: 1\n" if pair else ""
    return f"""\
merge_method: dapa
base_model: {json.dumps(str(path(f"{pair}target")))}
models:
  - model: {json.dumps(str(path(f"{pair}source")))}
parameters:
  layers: auto
{more}\
  prompts: miniature
  max_new_tokens: 24
  batch_size: 128
"""
