"""Several candidates at once: the search runs as if alone, and other workers test what it will probably ask next.

The outcome is exactly the sequential one: `minimize` asks one question after the other, and gets the same answers;
some are merely there already. Ray (an extra) is the engine: on one machine or a cluster, it keeps the workers alive.

What a recipe does not say about its run, because other machines have something else.

Who tests the selections of a search: this process, or Ray actors with a target each.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import asdict, replace
from functools import cached_property
from io import StringIO
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from dapa_merge.checkpoint.units import Unit
from dapa_merge.errors import DapaError, UsageError, one_line
from dapa_merge.plan.plan import Plan
from dapa_merge.plan.selection import open_plan, with_pinned_models
from dapa_merge.progress import LOG, task
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parameters import spans
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.requirement import Requirement, settings_of

if TYPE_CHECKING:
    from dapa_merge.measure.prompts.sets import PromptSet
    from dapa_merge.search.bench import Bench


U = TypeVar("U", bound=Hashable)
V = TypeVar("V")
V_co = TypeVar("V_co", covariant=True)

# How often Ray starts a lost worker again, and gives it its test again, before the search gives up.
MAX_RESTARTS = 3
CONNECT_SECONDS = 10


class Workers(Protocol[U, V_co]):
    """Who tests selections, several at a time; outlives one search among some units, and serves the next."""

    @property
    def number(self) -> int:
        """How many selections are tested at once."""
        ...

    @property
    def running(self) -> Collection[frozenset[U]]:
        """The selections that are being tested."""
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
            workers: Who tests; some may still be busy for an earlier search.
            foresee: Given all answers, the selections that the search will ask next, the certain one first.
            settle: Called once with every outcome, as it comes; gives the answer.
            answers: What is known before.
        """
        self.answers = dict(answers)
        self._workers = workers
        self._foresee = foresee
        self._settle = settle

    def holds(self, selection: frozenset[U]) -> bool:
        """The answer to a question; waits for it if need be."""
        while selection not in self.answers:
            self._submit(selection)
            done, outcome = self._workers.wait()
            self.answers[done] = self._settle(done, outcome)
        return self.answers[selection]

    def _submit(self, selection: frozenset[U]) -> None:
        """Give every idle worker a test: first what is asked now, then what is likeliest to be asked."""
        workers = self._workers
        if selection not in workers.running and len(workers.running) < workers.number:
            workers.submit(selection)
        if len(workers.running) >= workers.number:
            return
        for likely in self._foresee(self.answers, workers.number + len(workers.running)):
            if likely not in workers.running and len(workers.running) < workers.number:
                workers.submit(likely)


class RayWorkers(Generic[U, V]):
    """Ray actors, each of which holds what it needs for a test, such as a model, for as long as it lives.

    An actor that dies is replaced by Ray, and its test asked again.
    """

    def __init__(
        self, make: Callable[[int], Callable[[frozenset[U]], V]], number: int | None, *, uses_gpu: bool
    ) -> None:
        """Start the workers; they load what they need while the search goes on.

        Args:
            make: Called in each worker, once, with the number of its threads: makes what tests a selection.
            number: How many workers; None for one on each GPU of the cluster or, without GPUs, one on each node.
            uses_gpu: Whether each worker gets a GPU of its own.

        Raises:
            UsageError: If Ray is not installed, does not start, or the cluster has not so many GPUs.
        """
        ray = import_ray()
        self._ray = ray
        self._stdout = ExitStack()
        # Where Ray tells of lost workers, in the middle of what is another program's input.
        self._stdout.enter_context(redirect_stdout(sys.stderr))
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[frozenset[U], Any]] = {}
        self._began_here = not ray.is_initialized()
        if self._began_here:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            address = "local"
            try:
                # A cluster only where one is named: Ray would join whatever it finds on this machine, also a dead one.
                address = os.environ.get("RAY_ADDRESS") or "local"
                _check_reachable(address)
                ray.init(address, include_dashboard=False, log_to_driver=False, logging_level="error")
            except Exception as error:
                self._stdout.close()
                raise UsageError(f"Ray does not start with address {address}: {one_line(error)}") from error
        hosts = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        num_gpus = int(sum(host.get("GPU", 0) for host in hosts))
        self.number = number or (num_gpus if uses_gpu else len(hosts)) or 1
        if uses_gpu:
            hosts = [host for host in hosts if host.get("GPU", 0)]
            if num_gpus < self.number:
                self.close()
                raise UsageError(f"{self.number} workers need a GPU each, but the Ray cluster has {num_gpus}")
        # Cores are shared out as threads, not reserved: on unequal nodes a worker could wait for its share for ever.
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
    def running(self) -> Collection[frozenset[U]]:
        return {selection for selection, _ in self._busy.values()}

    def submit(self, selection: frozenset[U]) -> None:
        actor = self._idle.pop()
        self._busy[actor.test.remote(selection)] = (selection, actor)

    def wait(self) -> tuple[frozenset[U], V]:
        """The next test that is done.

        Raises:
            UsageError: If workers were lost again and again.
            DapaError: What a worker raised.
        """
        (reference,), _ = self._ray.wait(list(self._busy), num_returns=1)
        selection, actor = self._busy.pop(reference)
        try:
            outcome = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, DapaError):
                raise error.cause from error
            raise
        except self._ray.exceptions.RayActorError as error:
            raise UsageError(
                f"a worker was lost for good, after up to {MAX_RESTARTS} restarts: {one_line(error)}"
            ) from error
        self._idle.append(actor)
        return selection, outcome

    def close(self) -> None:
        """Stop the workers, whatever they do, and the cluster if it was started for them."""
        # Ray would tell of tests that fail because their workers are stopped.
        with redirect_stdout(StringIO()):
            for actor in [*self._idle, *(actor for _, actor in self._busy.values())]:
                self._ray.kill(actor)
            self._idle, self._busy = [], {}
            if self._began_here:
                self._ray.shutdown()
        self._stdout.close()


class _Actor:
    """Lives in a process of its own."""

    def __init__(self, make: Callable[[int], Callable[[frozenset[Any]], Any]], num_threads: int) -> None:
        self._make = make
        self._num_threads = num_threads

    @cached_property
    def _tester(self) -> Callable[[frozenset[Any]], Any]:
        # Not in `__init__`: a fault there would be a lost worker to Ray, and its sentence would be lost too.
        return self._make(self._num_threads)

    def load(self) -> None:
        """Make the tester; a fault is told by the first test."""
        with suppress(Exception):
            _ = self._tester

    def test(self, selection: frozenset[Any]) -> Any:
        return self._tester(selection)


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
    except Exception as error:
        raise UsageError(f"--workers ray needs Ray, which is installed but broken: {one_line(error)}") from error
    return ray


def _check_reachable(address: str) -> None:
    """Raise `OSError` if nobody answers at `host:port`; Ray itself would try for ever."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS):
            pass


# What became of a test, as the journal has it: a `Verdict` as plain data, and its `seconds`.
Test = Mapping[str, Any]


def make_bench(recipe: Recipe, plan: Plan, prompts: PromptSet, options: Options) -> Bench:
    """The test bench of a recipe; it loads the target when that is needed.

    Raises:
        UsageError: If the recipe's evaluator or the device is not there, or workers cannot go by the evaluator.
    """
    from dapa_merge.measure.meter import search_meter
    from dapa_merge.search.bench import Bench

    if options.uses_ray and recipe.evaluator == "judge" and options.judge_requests is not None:
        raise UsageError("workers do not share a limit of requests to the judge; leave out --workers or the limit")
    meter = search_meter(recipe, prompts, options)
    return Bench(
        plan, meter, options.device, settings_of(recipe), lambda: LOG.info(f"loading the target {plan.target.name}")
    )


class InProcess:
    """Tests one selection at a time, here."""

    number = 1

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.running: list[frozenset[Unit]] = []

    def submit(self, selection: frozenset[Unit]) -> None:
        self.running.append(selection)

    def wait(self) -> tuple[frozenset[Unit], Test]:
        selection = self.running.pop()
        with task(f"testing {spans(in_order(selection))}", self._bench.num_prompts, "prompts"):
            return selection, _test(self._bench, selection)

    def close(self) -> None:
        """Nothing to let go of; the bench is its owner's."""


def start_workers(
    recipe: Recipe, plan: Plan, bench: Bench, limits: Requirement, options: Options
) -> InProcess | RayWorkers[Unit, Test]:
    """Whoever tests the selections of a search: this process, or Ray actors with a target of their own each."""
    if not options.uses_ray:
        return InProcess(bench)
    # Other machines, other folders, and hours later: the same weights all the same.
    recipe = with_pinned_models(recipe, plan)
    file = options.evaluator_file
    options = replace(options, device=bench.device.type, evaluator_file=file and file.absolute())
    make = functools.partial(_make_tester, recipe, bench.meter.prompts, limits, options)
    return RayWorkers(make, options.num_workers, uses_gpu=bench.device.type == "cuda")


def _make_tester(
    recipe: Recipe, prompts: PromptSet, limits: Requirement, options: Options, num_threads: int
) -> Callable[[frozenset[Unit]], Test]:
    """Called in a worker: loads a target of its own there."""
    import torch

    torch.set_num_threads(num_threads)
    plan = open_plan(recipe, allow_pickle=options.allow_pickle)
    bench = make_bench(recipe, plan, prompts, options)
    bench.require(limits)
    return functools.partial(_test, bench)


def _test(bench: Bench, selection: frozenset[Unit]) -> Test:
    began = time.monotonic()
    verdict = bench.examine(in_order(selection))
    return {**asdict(verdict), "seconds": round(time.monotonic() - began, 3)}


def in_order(selection: Iterable[Unit]) -> list[Unit]:
    """Always the same order, in which every process transplants."""
    return sorted(selection, key=lambda unit: (unit.layer, unit.module, unit.rows or (0, 0)))


def note_of(what: str, units: Iterable[Unit]) -> str:
    """A journal's name of what was measured with some units, short however many they are."""
    return f"{what} {hashlib.sha256(' '.join(map(str, units)).encode()).hexdigest()[:32]}"
