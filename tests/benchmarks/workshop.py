"""Trains the missing models of `families`: several at once, each on one core, and each complete or not there.

The sizes are such that a second core makes the training of one model little faster, and two models on two cores are
done in half the time.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import torch
from members import Member
from transformers import AutoModelForCausalLM, PreTrainedModel

from dapa_merge.miniature.train import save
from dapa_merge.progress import quiet

# The bases as they were trained: their descendants come from weights that were not rounded, as the shipped ones do.
UNROUNDED = "unrounded"
# No family has more than a few models that wait for nothing.
MAX_WORKERS = 4


def train_all(
    wanted: Mapping[Path, Member], seed: int, say: Callable[[str], None], *, num_workers: int | None = None
) -> None:
    """Train the models that are missing.

    Args:
        wanted: The members by the folders that they get: `.../{architecture}/{member.name}`, with all their ancestors.
        seed: The families' seed.
        say: Is told of each model that is finished.
        num_workers: Processes; 0 trains in this one, None takes one for each core.
    """
    missing = [folder for folder in wanted if not folder.exists()]
    if num_workers is None:
        num_workers = min(MAX_WORKERS, os.cpu_count() or 1)
    if num_workers == 0:
        for folder in missing:
            say(_finished(folder, _train(folder, wanted[folder], seed)))
    elif missing:
        _train_at_once(missing, wanted, seed, say, num_workers)


def _train_at_once(
    missing: list[Path], wanted: Mapping[Path, Member], seed: int, say: Callable[[str], None], num_workers: int
) -> None:
    # Spawned: a fork of a process whose torch has threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=_end_with_parent) as pool:
        running: dict[Future[float], Path] = {}
        waiting = list(missing)
        try:
            while waiting or running:
                unfinished = {*waiting, *running.values()}
                ready = [folder for folder in waiting if _parent(folder, wanted[folder]) not in unfinished]
                running |= {pool.submit(_train, folder, wanted[folder], seed): folder for folder in ready}
                waiting = [folder for folder in waiting if folder not in ready]
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    say(_finished(running.pop(future), future.result()))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """Have this process end when the one that started it does, however that ends: nobody waits for its model."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _parent(folder: Path, member: Member) -> Path | None:
    return None if member.parent is None else folder.with_name(member.parent)


def _finished(folder: Path, seconds: float) -> str:
    return f"{folder.parent.name}/{folder.name}: {seconds:.0f} s"


def _train(folder: Path, member: Member, seed: int) -> float:
    """Train one model and write it; the seconds that it took."""
    start = time.monotonic()
    with reproducible(), quiet("transformers"):
        parent = _parent(folder, member)
        loaded = None if parent is None else _load(_unrounded(parent) if member.parent == "base" else parent)
        model, tokenizer = member.make(folder.parent.name, loaded, seed)
        if parent is None:
            with complete(_unrounded(folder)) as beside:
                model.save_pretrained(beside)
        with complete(folder) as beside:
            save(model, tokenizer, beside)
    return time.monotonic() - start


def _unrounded(base: Path) -> Path:
    return base.parent.parent / UNROUNDED / f"{base.parent.name}-{base.name}"


def _load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model


@contextmanager
def complete(folder: Path) -> Iterator[Path]:
    """A folder to write into, that gets its name once everything in it is there."""
    beside = folder.with_name(f".{folder.name}")
    # What a killed run left: half of it, or a base without rounding whose rounded one is missing.
    for left_over in (beside, folder):
        shutil.rmtree(left_over, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    beside.rename(folder)


@contextmanager
def reproducible() -> Iterator[None]:
    """The settings of torch that a result depends on; the caller has their own back."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
