"""What `dapa-merge plan` shows: a plan as JSON and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dapa_merge.checkpoint.architecture import Unit, architecture_name
from dapa_merge.checkpoint.plan import Plan

if TYPE_CHECKING:
    from rich.table import Table


def plan_json(plan: Plan, selection: Sequence[Unit] | None) -> dict[str, Any]:
    """The plan as plain data; `selected` is None where a search decides."""
    return {
        "architecture": architecture_name(plan.target.config),
        "target": {"name": plan.target.name, "parameters": plan.target.num_parameters, "bytes": _num_bytes(plan)},
        "source": {"name": plan.source.name},
        "units": [
            {
                "unit": str(unit),
                "tensors": list(unit.tensors),
                "parameters": plan.num_parameters((unit,)),
                "bytes": plan.num_bytes((unit,)),
                "selected": None if selection is None else unit in selection,
            }
            for unit in plan.units
        ],
        "selected_parameters": None if selection is None else plan.num_parameters(selection),
        "selected_share": None if selection is None else plan.share(selection),
        "search_memory_bytes": search_memory(plan),
    }


def plan_table(plan: Plan, selection: Sequence[Unit] | None) -> Table:
    """The plan for people."""
    from rich.table import Table

    architecture = architecture_name(plan.target.config)
    table = Table(
        title=f"{plan.source.name} into {plan.target.name} ({architecture})", title_justify="left", show_footer=True
    )
    chosen = plan.units if selection is None else tuple(selection)
    what = f"all {len(chosen)} that a search may choose from" if selection is None else f"{len(chosen)} units"
    table.add_column("unit", footer=what)
    table.add_column("tensors", footer=f"search needs {search_memory(plan) / 1e9:.2f} GB and its batches")
    table.add_column("MB", justify="right", footer=f"{plan.num_bytes(chosen) / 1e6:.2f}")
    table.add_column("parameters", justify="right", footer=f"{100 * plan.share(chosen):.2f} %")
    for unit in chosen:
        names = [unit.tensors[0], *(name.rsplit(".", 2)[-2] for name in unit.tensors[1:])]
        share = f"{100 * plan.share((unit,)):.2f} %"
        table.add_row(str(unit), ", ".join(names), f"{plan.num_bytes((unit,)) / 1e6:.2f}", share)
    return table


def search_memory(plan: Plan) -> int:
    """Bytes that a search keeps on the device besides activations: the target, and the largest tensor on its way."""
    return _num_bytes(plan) + max(tensor.num_bytes for tensor, _ in plan.tensors(plan.units))


def _num_bytes(plan: Plan) -> int:
    return sum(tensor.num_bytes for tensor in plan.target.tensors.values())
