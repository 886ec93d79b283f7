"""The workers of a search, and the oracle that answers its questions by their tests.

With several workers, the idle ones test the selections that the search will probably ask about next. The outcome is
exactly the sequential one: `minimize` asks one question after the other and gets the same answers, some of them
computed ahead of time. Ray (an extra) keeps the workers alive, on one machine or a cluster. `search/bench.py` says what
a test does; nothing here loads torch.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from functools import cached_property
from io import StringIO
from typing import Any, Protocol

from dapa_merge.checkpoint.units import Unit
from dapa_merge.errors import DapaError, UsageError, one_line
from dapa_merge.progress import LOG
from dapa_merge.recipe.parameters import spans
from dapa_merge.search.journal import Journal, MarkedJournal

Selection = frozenset[Unit]
# The outcome of a test, as the journal has it: a `Verdict` as plain data, and its `seconds`.
Test = Mapping[str, Any]
# Restarts of a lost worker, and repetitions of its test, before the search gives up.
MAX_RESTARTS = 3
CONNECT_SECONDS = 10


class Workers(Protocol):
    """Tests selections, at most `number` at a time."""

    @property
    def number(self) -> int: ...

    @property
    def running(self) -> Collection[Selection]:
        """The selections that were submitted and not yet waited for."""

    def submit(self, selection: Selection) -> None:
        """Begin a test."""

    def wait(self) -> tuple[Selection, Test]:
        """Wait for the next test to end."""

    def close(self) -> None:
        """Stop what was begun."""


class Oracle:
    """Answers the questions of delta debugging by tests, each of which is written to the journal.

    Attributes:
        asked: The selections asked, by the names of their units.
    """

    def __init__(self, journal: Journal | MarkedJournal, workers: Workers) -> None:
        self.asked: dict[frozenset[str], Selection] = {}
        self._journal = journal
        self._workers = workers

    def among(
        self, units: Sequence[Unit], likely: Callable[[Mapping[Selection, bool], int], list[Selection]]
    ) -> Callable[[Selection], bool]:
        """The oracle of a search among some units; workers may still be busy with an earlier search.

        Args:
            units: All units that the search may ask about.
            likely: Takes all answers and a number, and returns that many selections that the search will probably ask
                about next, the certain one first. Idle workers test them ahead of time.
        """
        names = {str(unit): unit for unit in units}
        answers: dict[Selection, bool] = {
            frozenset(names[name] for name in selection): test["holds"]
            for selection, test in self._journal.tests.items()
            if selection <= names.keys()
        }
        # The requirement is made so that the empty selection never holds and the full one does.
        answers |= {frozenset(): False, frozenset(units): True}
        workers = self._workers

        def submit(selection: Selection) -> None:
            if selection not in workers.running and len(workers.running) < workers.number:
                workers.submit(selection)

        def holds(selection: Selection) -> bool:
            self.asked[names_of(selection)] = selection
            while selection not in answers:
                submit(selection)
                if len(workers.running) < workers.number:
                    for other in likely(answers, workers.number + len(workers.running)):
                        submit(other)
                done, test = workers.wait()
                answers[done] = self._record(done, test)
            return answers[selection]

        return holds

    def _record(self, selection: Selection, test: Test) -> bool:
        self._journal.record(names_of(selection), test)
        why = f": {test['complaint']}" if test["complaint"] else ""
        LOG.info(f"  {'holds' if test['holds'] else 'fails'}  {spans(in_order(selection))}{why}")
        return bool(test["holds"])


class RayWorkers:
    """Ray actors that each keep a model in memory; Ray replaces an actor that dies, and repeats its test."""

    def __init__(
        self, make: Callable[[int], Callable[[Selection], Test]], number: int | None, *, uses_gpu: bool
    ) -> None:
        """Start the workers, which load their models while the search goes on.

        Args:
            make: Called once in each worker, with its number of threads; makes the function that tests a selection.
            number: None for one per GPU of the cluster or, without GPUs, per node.
            uses_gpu: Whether each worker gets a GPU of its own.

        Raises:
            UsageError: If Ray is not installed or does not start, or the cluster has too few GPUs.
        """
        ray = import_ray()
        self._ray = ray
        # Ray reports lost workers on stdout, which may be another program's input.
        self._stdout = redirect_stdout(sys.stderr)
        self._stdout.__enter__()
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Selection, Any]] = {}
        self._began_here = not ray.is_initialized()
        self._on_sigterm = signal.getsignal(signal.SIGTERM)
        if self._began_here:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            address = "local"
            try:
                # Join a cluster only if it is named: Ray would join any that it finds on this machine, even a dead one.
                address = os.environ.get("RAY_ADDRESS") or "local"
                _check_reachable(address)
                ray.init(address, include_dashboard=False, log_to_driver=False, logging_level="error")
            except Exception as error:
                self._stdout.__exit__(None, None, None)
                raise UsageError(f"Ray does not start with address {address}: {one_line(error)}") from error
        hosts = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        num_gpus = int(sum(host.get("GPU", 0) for host in hosts))
        self.number = number or (num_gpus if uses_gpu else len(hosts)) or 1
        if uses_gpu:
            hosts = [host for host in hosts if host.get("GPU", 0)]
            if num_gpus < self.number:
                self.close()
                raise UsageError(f"{self.number} workers need a GPU each, but the Ray cluster has {num_gpus}")
        # Cores are divided into threads, not reserved: on unequal nodes a worker could wait forever for its share.
        fewest_cores = min(host.get("CPU", 1) for host in hosts)
        num_threads = max(1, int(fewest_cores / math.ceil(self.number / len(hosts))))
        actor = ray.remote(
            num_gpus=1 if uses_gpu else 0,
            num_cpus=0,
            scheduling_strategy="SPREAD",
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,
        )(_Actor)
        self._idle = [actor.remote(make, num_threads) for _ in range(self.number)]
        for worker in self._idle:
            worker.load.remote()

    @property
    def running(self) -> Collection[Selection]:
        return {selection for selection, _ in self._busy.values()}

    def submit(self, selection: Selection) -> None:
        actor = self._idle.pop()
        self._busy[actor.test.remote(selection)] = (selection, actor)

    def wait(self) -> tuple[Selection, Test]:
        """Wait for the next test to end; raises its worker's error, or `UsageError` if workers are lost."""
        (reference,), _ = self._ray.wait(list(self._busy), num_returns=1)
        selection, actor = self._busy.pop(reference)
        try:
            outcome = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, DapaError):
                raise error.cause from error
            raise
        except self._ray.exceptions.RayActorError as error:
            lost = f"a worker was lost for good, after up to {MAX_RESTARTS} restarts"
            raise UsageError(f"{lost}: {one_line(error)}") from error
        self._idle.append(actor)
        return selection, outcome

    def close(self) -> None:
        """Stop the workers, even during a test, and the cluster if it was started for them."""
        # Hide Ray's messages about tests that fail because their workers are stopped.
        with redirect_stdout(StringIO()):
            for actor in [*self._idle, *(actor for _, actor in self._busy.values())]:
                self._ray.kill(actor)
            self._idle, self._busy = [], {}
            if self._began_here:
                self._ray.shutdown()
                if threading.current_thread() is threading.main_thread():
                    # Ray leaves its own handler.
                    signal.signal(signal.SIGTERM, self._on_sigterm)
        self._stdout.__exit__(None, None, None)


class _Actor:
    """A worker, in a process of its own."""

    def __init__(self, make: Callable[[int], Callable[[Selection], Any]], num_threads: int) -> None:
        self._make = make
        self._num_threads = num_threads

    @cached_property
    def _tester(self) -> Callable[[Selection], Any]:
        # Not in `__init__`: Ray would take an error there for a lost worker, and hide its message.
        return self._make(self._num_threads)

    def load(self) -> None:
        """Make the tester; if that fails, the first test raises the error."""
        with suppress(Exception):
            _ = self._tester

    def test(self, selection: Selection) -> Any:
        return self._tester(selection)


def import_ray() -> Any:
    """Import Ray, which is an extra; raises `UsageError` if it is not installed."""
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UsageError("--workers ray needs Ray; install it with: pip install ray") from error
    except Exception as error:
        raise UsageError(f"--workers ray needs Ray, which is installed but broken: {one_line(error)}") from error
    return ray


def _check_reachable(address: str) -> None:
    """Raise `OSError` if nothing answers at `host:port`; Ray itself would try forever."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS):
            pass


def in_order(selection: Iterable[Unit]) -> list[Unit]:
    """Sort units into the order in which every process transplants them."""
    return sorted(selection, key=lambda unit: (unit.layer, unit.module, unit.rows or (0, 0)))


def names_of(units: Collection[Unit]) -> frozenset[str]:
    """The names of units, which identify them in a journal."""
    return frozenset(map(str, units))


def note_of(what: str, units: Iterable[object]) -> str:
    """A name for a journal's note on some units (or whatever decides it), short even for many."""
    return f"{what} {hashlib.sha256(' '.join(map(str, units)).encode()).hexdigest()[:32]}"
