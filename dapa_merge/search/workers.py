"""Several candidates at once: the search runs as if alone, and other workers test what it will probably ask next.

The outcome is exactly the sequential one: `minimize` asks one question after the other, and gets the same answers;
some are merely there already. Ray (an extra) is the engine: on one machine or a cluster, it keeps the workers alive.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack, redirect_stdout
from typing import Any, Generic, Protocol, TypeVar

from dapa_merge.errors import DapaError, UsageError, one_line

U = TypeVar("U", bound=Hashable)
V = TypeVar("V")
V_co = TypeVar("V_co", covariant=True)

# How often Ray starts a lost worker again, and gives it its test again, before the search gives up.
MAX_RESTARTS = 3


class Workers(Protocol[U, V_co]):
    """Who tests selections, several at a time."""

    @property
    def number(self) -> int:
        """How many selections are tested at once."""
        ...

    def submit(self, selection: frozenset[U]) -> None:
        """Begin a test."""
        ...

    def wait(self) -> tuple[frozenset[U], V_co]:
        """The next test that is done, and its outcome."""
        ...


class Foresight(Generic[U, V]):
    """Answers a search's questions, and keeps the workers busy with those that it will probably ask next.

    Attributes:
        answers: Every answer so far, the unasked ones included.
        asked: What the search did ask.
    """

    def __init__(
        self,
        workers: Workers[U, V],
        foresee: Callable[[Mapping[frozenset[U], bool], int], list[frozenset[U]]],
        settle: Callable[[frozenset[U], V], bool],
        answers: Mapping[frozenset[U], bool],
    ) -> None:
        """Make an oracle for `minimize`.

        Args:
            workers: Who tests.
            foresee: Given all answers, the selections that the search will ask next, the certain one first.
            settle: Called once with every outcome, as it comes; gives the answer.
            answers: What is known before.
        """
        self.answers = dict(answers)
        self.asked: set[frozenset[U]] = set()
        self._workers = workers
        self._foresee = foresee
        self._settle = settle
        self._running: set[frozenset[U]] = set()

    def holds(self, selection: frozenset[U]) -> bool:
        """The answer to a question; waits for it if need be."""
        self.asked.add(selection)
        while selection not in self.answers:
            self._submit(selection)
            done, outcome = self._workers.wait()
            self._running.remove(done)
            self.answers[done] = self._settle(done, outcome)
        return self.answers[selection]

    def _submit(self, selection: frozenset[U]) -> None:
        """Give every idle worker a test: first what is asked now, then what is likeliest to be asked."""
        if selection not in self._running:
            self._running.add(selection)
            self._workers.submit(selection)
        if len(self._running) >= self._workers.number:
            return
        for likely in self._foresee(self.answers, self._workers.number + len(self._running)):
            if likely not in self._running and len(self._running) < self._workers.number:
                self._running.add(likely)
                self._workers.submit(likely)


class RayWorkers(Generic[U, V]):
    """Ray actors, each of which holds what it needs for a test, such as a model, for as long as it lives.

    An actor that dies is replaced by Ray, and its test asked again.
    """

    def __init__(
        self,
        make: Callable[[], Callable[[frozenset[U]], V]],
        number: int | None,
        *,
        uses_gpu: bool,
        num_threads: int | None,
    ) -> None:
        """Start the workers; they load what they need while the search goes on.

        Args:
            make: Called in each worker, once: makes what tests a selection.
            number: How many workers; None for one on each GPU of the cluster or, without GPUs, one on each node.
            uses_gpu: Whether each worker gets a GPU of its own.
            num_threads: Threads of each worker; None for an equal share of the cluster's cores.

        Raises:
            UsageError: If Ray is not installed, does not start, or the cluster has not so many GPUs.
        """
        ray = import_ray()
        self._ray = ray
        self._stdout = ExitStack()
        # Where Ray tells of lost workers, in the middle of what is another program's input.
        self._stdout.enter_context(redirect_stdout(sys.stderr))
        self._began_here = not ray.is_initialized()
        if self._began_here:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            try:
                # An existing cluster if RAY_ADDRESS or a running head says so, else one of this machine only.
                ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
            except Exception as error:
                self._stdout.close()
                raise UsageError(f"Ray does not start: {one_line(error)}") from error
        resources = ray.cluster_resources()
        num_gpus, num_cpus = int(resources.get("GPU", 0)), resources.get("CPU", 1.0)
        self.number = number or (num_gpus if uses_gpu else len([node for node in ray.nodes() if node["Alive"]])) or 1
        if uses_gpu and num_gpus < self.number:
            self.close()
            raise UsageError(f"{self.number} workers need a GPU each, but the Ray cluster has {num_gpus}")
        # Actors that wait for a core would wait for ever: their share is rounded down, if need be to none.
        share = num_cpus / self.number
        actor = ray.remote(
            num_gpus=1 if uses_gpu else 0,
            num_cpus=int(share) if share >= 1 else 0,
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,
        )(_Actor)
        self._idle: list[Any] = [actor.remote(make, num_threads or max(int(share), 1)) for _ in range(self.number)]
        self._running: dict[Any, tuple[frozenset[U], Any]] = {}

    def submit(self, selection: frozenset[U]) -> None:
        actor = self._idle.pop()
        self._running[actor.test.remote(selection)] = (selection, actor)

    def wait(self) -> tuple[frozenset[U], V]:
        """The next test that is done.

        Raises:
            UsageError: If workers were lost again and again.
            DapaError: What a worker raised.
        """
        (reference,), _ = self._ray.wait(list(self._running), num_returns=1)
        selection, actor = self._running.pop(reference)
        try:
            outcome = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, DapaError):
                raise error.cause from error
            raise
        except self._ray.exceptions.RayActorError as error:
            raise UsageError(
                f"a worker was lost {MAX_RESTARTS + 1} times, the last time with {one_line(error)}"
            ) from error
        self._idle.append(actor)
        return selection, outcome

    def close(self) -> None:
        """Stop the workers, whatever they do, and the cluster if it was started for them."""
        for actor in [*getattr(self, "_idle", ()), *(actor for _, actor in getattr(self, "_running", {}).values())]:
            self._ray.kill(actor)
        self._idle, self._running = [], {}
        if self._began_here:
            self._ray.shutdown()
        self._stdout.close()


class _Actor:
    """Lives in a process of its own."""

    def __init__(self, make: Callable[[], Callable[[frozenset[Any]], Any]], num_threads: int) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self._test = make()

    def test(self, selection: frozenset[Any]) -> Any:
        return self._test(selection)


def import_ray() -> Any:
    """Ray, which is an extra.

    Raises:
        UsageError: If it is not installed.
    """
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UsageError("--workers ray needs Ray; install it with: pip install 'dapa-merge[ray]'") from error
    return ray
