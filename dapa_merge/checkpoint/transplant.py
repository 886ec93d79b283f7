"""Writing the repaired model: the target's files with the selected units of the source, and what it was made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dapa_merge.checkpoint.architecture import Unit
from dapa_merge.checkpoint.plan import Plan
from dapa_merge.checkpoint.streams import Digests
from dapa_merge.checkpoint.values import Rounding
from dapa_merge.checkpoint.writing.changes import find_changes
from dapa_merge.checkpoint.writing.copying import Progress
from dapa_merge.checkpoint.writing.manifest import make_manifest, manifest_text
from dapa_merge.checkpoint.writing.result import identity, write_result


def transplant(
    plan: Plan,
    selection: Sequence[Unit],
    out: Path,
    *,
    extras: Mapping[str, str | bytes] | None = None,
    link: bool = False,
    manifest: bool = True,
    check: Callable[[Path], object] = lambda _: None,
    progress: Progress = lambda _: None,
) -> Rounding:
    """Write the target with the selected units replaced by the source's into `out`.

    Every byte is read back as soon as it is written, and compared with the target's or the source's. What an earlier
    run of the same job finished is kept.

    Args:
        plan: Target and source.
        selection: The units to replace.
        out: The folder to make; it must not exist, or be empty.
        extras: Further small files to write into it, by name.
        link: Let weight files that do not change be the target's own, under a second name. Small files are copied all
            the same: people edit them.
        manifest: Write `dapa.json`, with the SHA-256 of everything.
        check: Called with the finished folder before it gets its name; what it raises keeps `out` from appearing.
        progress: Called with numbers of bytes as they are done with.

    Returns:
        What was lost where values were stored in a narrower dtype, of the files that this call wrote.

    Raises:
        UsageError: If `out` exists, cannot be made, does not fit on its disk, or is being made by another run; if files
            are to be linked where that is impossible.
        CheckpointError: If a source value does not fit the target's dtype, or a file changes while it is read.
    """
    rounding = Rounding()
    changes = find_changes(plan, selection, rounding)
    sources = sorted({change.source_file for of_file in changes.values() for change in of_file})
    units = tuple(map(str, selection))

    def describe(files: Mapping[str, Digests]) -> str:
        return manifest_text(make_manifest(plan, units, changes, files))

    job = {"source": identity(plan.source, sources), "selection": list(units)}
    write_result(
        plan.target,
        changes,
        out,
        job,
        extras=extras,
        describe=describe if manifest else None,
        link=link,
        check=check,
        progress=progress,
    )
    return rounding
