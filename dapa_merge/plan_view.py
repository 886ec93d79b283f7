"""What `dapa-merge plan` shows: a plan as JSON and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dapa_merge.checkpoint.architecture import Unit, architecture_name
from dapa_merge.checkpoint.plan import Plan, cut

# So many other tensors are named beside the first one of a unit; the experts of a mixture would fill a page.
MAX_BESIDE = 3

if TYPE_CHECKING:
    from rich.console import Console


def plan_json(plan: Plan, selection: Sequence[Unit] | None) -> dict[str, Any]:
    """The plan as plain data; `selected` is None where a search decides.

    Units of which rows are selected are shown in parts: these rows, and those between them.
    """
    units = plan.units if selection is None else cut(plan, selection).units
    return {
        "architecture": architecture_name(plan.target.config),
        "target": {"name": plan.target.name, "parameters": plan.target.num_parameters, "bytes": plan.target.num_bytes},
        "source": {"name": plan.source.name},
        "units": [
            {
                "unit": str(unit),
                "tensors": list(unit.tensors),
                "parameters": plan.num_parameters((unit,)),
                "bytes": plan.num_bytes((unit,)),
                "selected": None if selection is None else unit in selection,
            }
            for unit in units
        ],
        "selected_parameters": None if selection is None else plan.num_parameters(selection),
        "selected_share": None if selection is None else plan.share(selection),
        "search_memory_bytes": search_memory(plan),
    }


def print_plan(plan: Plan, selection: Sequence[Unit] | None, console: Console) -> None:
    """The plan for people: a line for each unit, and what they add up to."""
    from rich.table import Table
    from rich.text import Text

    chosen = plan.units if selection is None else tuple(selection)
    table = Table("unit", "tensors")
    table.add_column("MB", justify="right")
    table.add_column("parameters", justify="right")
    for unit in chosen:
        share = f"{100 * plan.share((unit,)):.2f} %"
        table.add_row(str(unit), Text(_tensors(unit, plan)), f"{plan.num_bytes((unit,)) / 1e6:.2f}", share)
    console.print(table)
    decided = "a search chooses among" if selection is None else "transplants"
    facts = [
        (
            "target",
            f"{plan.target.name} ({architecture_name(plan.target.config)}, {plan.target.num_bytes / 1e6:.2f} MB)",
        ),
        ("source", plan.source.name),
        (decided, f"{len(chosen)} units, {plan.num_bytes(chosen) / 1e6:.2f} MB"),
        ("parameters", f"{100 * plan.share(chosen):.2f} % of the target's"),
        ("memory of a search", f"{search_memory(plan) / 1e6:.2f} MB on its device, and the batches"),
    ]
    for label, fact in facts:
        console.print(f"{label:<24}{fact}", highlight=False, markup=False, soft_wrap=True)


def _tensors(unit: Unit, plan: Plan) -> str:
    """Where a unit lives, in a line: the first tensor in full, and what lies beside it, if that is not too much."""
    regions = [ours for ours, _ in plan.regions((unit,))]
    first, *others = dict.fromkeys(region.name for region in regions)
    if len(others) > MAX_BESIDE:
        return f"{first}, and {len(others)} more of {len(unit.tensors)} tensors"
    beside = [name.removeprefix(_parent(first)) for name in others]
    return ", ".join([first, *beside])


def _parent(name: str) -> str:
    """What the names of tensors beside this one begin with."""
    return name.removesuffix(".weight").rpartition(".")[0] + "."


def search_memory(plan: Plan) -> int:
    """Bytes that a search keeps on the device besides activations: the target, and the largest tensor on its way."""
    return plan.target.num_bytes + max(region.num_bytes for region, _ in plan.regions(plan.units))
