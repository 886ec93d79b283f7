"""Whether a patch is for a base, whether it holds what it says, and what the base holds in its place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum

from dapa_merge.checkpoint.files import Checkpoint
from dapa_merge.checkpoint.patching.patch_file import Entry, Patch, iterate_range, layout_digest
from dapa_merge.errors import CheckpointError

THREADS = 4


class State(Enum):
    """What the rows of an entry are in a model."""

    BASE = "as the patch found them"
    PATCHED = "as the patch makes them"
    OTHER = "neither"


def check_layout(patch: Patch, base: Checkpoint) -> None:
    """Raise `CheckpointError` unless the base has exactly the tensors, dtypes and shapes that the patch is for."""
    for entry in patch.entries:
        tensor = base.tensors.get(entry.tensor)
        name = f"{entry.tensor[:120]!r}"
        if tensor is None:
            raise CheckpointError(f"{patch.path} changes {name}, which {base.name} does not have{_made_for(patch)}")
        if (tensor.dtype, tensor.shape) != (entry.dtype, entry.shape):
            raise CheckpointError(
                f"{patch.path} changes {name} of {entry.dtype} {list(entry.shape)}, but {base.name} has it as "
                f"{tensor.dtype} {list(tensor.shape)}{_made_for(patch)}"
            )
    if layout_digest(base.tensors) != patch.metadata["base_layout"]:
        raise CheckpointError(
            f"{base.name} has other tensors, dtypes or shapes than the model that {patch.path} is for{_made_for(patch)}"
        )


def check_rest(patch: Patch, base: Checkpoint, progress: Callable[[int], None] = lambda _: None) -> None:
    """Raise `CheckpointError` unless the base has the recorded values also where the patch changes nothing.

    It reads all of the base but the patch's rows.
    """
    if rest_digest(base, patch.entries, progress) != patch.metadata["base_rest"]:
        raise CheckpointError(
            f"{base.name} has other values than the model that {patch.path} was made for, in rows that the patch does "
            f"not change{_made_for(patch)}; name that model"
        )


def rest_digest(model: Checkpoint, entries: Iterable[Entry], progress: Callable[[int], None] = lambda _: None) -> str:
    """One SHA-256 of all values of a model but some rows, however it is divided into files.

    Args:
        model: The model.
        entries: The rows that are left out.
        progress: Called with numbers of bytes as they are read.
    """
    left_out: dict[str, list[tuple[int, int]]] = {}
    for entry in entries:
        left_out.setdefault(entry.tensor, []).append(entry.place(model.tensors[entry.tensor]))

    def digest(name: str) -> str:
        tensor = model.tensors[name]
        ends = [tensor.start, *(end for span in sorted(left_out.get(name, ())) for end in span), tensor.stop]
        pieces = (
            piece
            for start, stop in zip(ends[::2], ends[1::2], strict=True)
            for piece in iterate_range(model, tensor.file, start, stop)
        )
        return _digest(pieces, progress)

    names = sorted(model.tensors)
    with ThreadPoolExecutor(THREADS) as pool:
        return hashlib.sha256("".join(pool.map(digest, names)).encode()).hexdigest()


def check_content(patch: Patch, progress: Callable[[int], None] = lambda _: None) -> None:
    """Raise `CheckpointError` unless the patch's bytes have the digests that it records."""

    def check(entry: Entry) -> None:
        if _digest(patch.pieces(entry), progress) != entry.new_sha256:
            raise content_fault(patch, entry)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(check, patch.entries))


def checked_pieces(patch: Patch, entry: Entry) -> Iterator[bytes]:
    """The new bytes of one entry, of which the last are given only if all are those that the patch records.

    Raises:
        CheckpointError: Before the last piece, if they are not.
    """
    state = hashlib.sha256()
    remaining = entry.num_bytes
    for piece in patch.pieces(entry):
        state.update(piece)
        remaining -= len(piece)
        if not remaining and state.hexdigest() != entry.new_sha256:
            raise content_fault(patch, entry)
        yield piece


def content_fault(patch: Patch, entry: Entry) -> CheckpointError:
    """What is to be raised where an entry's bytes in the patch have not the digest that it records."""
    return CheckpointError(
        f"{patch.path} is damaged: its bytes for {entry.key[:120]!r} are not those it records; get it again"
    )


def states(patch: Patch, base: Checkpoint, progress: Callable[[int], None] = lambda _: None) -> list[State]:
    """What the base holds for each entry of the patch."""

    def state(entry: Entry) -> State:
        tensor = base.tensors[entry.tensor]
        found = _digest(iterate_range(base, tensor.file, *entry.place(tensor)), progress)
        by_digest = {entry.base_sha256: State.BASE, entry.new_sha256: State.PATCHED}
        return by_digest.get(found, State.OTHER)

    # Reading and hashing both let other threads run.
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(state, patch.entries))


def refuse_other(patch: Patch, base: Checkpoint, found: Sequence[State], hint: str) -> None:
    """Raise `CheckpointError` unless all entries are as the patch found them; `hint` says what to do."""
    for entry, state in zip(patch.entries, found, strict=True):
        if state is State.OTHER:
            first, stop = entry.rows
            raise CheckpointError(
                f"{base.name} holds other values in rows {first} to {stop} of {entry.tensor} than the model that "
                f"{patch.path} was made for{_made_for(patch)}{hint}"
            )
    if all(state is State.PATCHED for state in found):
        raise CheckpointError(f"{base.name} holds what {patch.path} would write already")
    if State.PATCHED in found:
        patched, unpatched = (patch.entries[found.index(state)].tensor for state in (State.PATCHED, State.BASE))
        raise CheckpointError(f"{base.name} has {patched} as {patch.path} makes it, but not {unpatched}{hint}")


def _made_for(patch: Patch) -> str:
    """What the base was called when the patch was made; a stranger's words."""
    name = repr(patch.metadata.get("base", "an unnamed model")[:120])
    commit = patch.metadata.get("base_commit")
    return f" ({name}{f' at commit {commit[:40]!r}' if commit else ''})"


def _digest(pieces: Iterable[bytes], progress: Callable[[int], None]) -> str:
    state = hashlib.sha256()
    for piece in pieces:
        state.update(piece)
        progress(len(piece))
    return state.hexdigest()
