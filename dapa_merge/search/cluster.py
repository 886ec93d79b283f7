"""Ray actors that each keep a model in memory: started, given work, replaced when they are lost, and stopped.

Ray (an extra) starts a lost actor again, on another node if it must. Its work is not kept waiting for that: it goes to
the next actor that is free. Nothing here loads torch.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from typing import Any

from dapa_merge.errors import DapaError, UsageError, one_line

# Restarts of a lost actor, and repetitions of its work, before it is given up.
MAX_RESTARTS = 3
CONNECT_SECONDS = 10
# How long to wait for any lost actor if none is left.
RETURN_SECONDS = 600


@dataclass
class _Work:
    """Something to do.

    Attributes:
        key: Identifies it.
        argument: For the function of whoever does it.
        num_lost: Actors that were lost while they did it.
    """

    key: Hashable
    argument: Any
    num_lost: int = 0


@dataclass(frozen=True)
class Shared:
    """Something that every actor can have, however often it is an argument."""

    reference: Any

    def get(self) -> Any:
        """It, in an actor."""
        return import_ray().get(self.reference)


class Actors:
    """A number of actors, each of which does one piece of work at a time.

    Attributes:
        number: How many there are.
    """

    def __init__(self, make: Callable[[int], Callable[[Any], Any]], number: int | None, *, uses_gpu: bool) -> None:
        """Start the actors, which make their function while whoever starts them goes on.

        Args:
            make: Called once in each actor, with its number of threads; makes the function that does a piece of work.
            number: None for one per GPU of the cluster or, without GPUs, per node.
            uses_gpu: Whether each actor gets a GPU of its own.

        Raises:
            UsageError: If Ray is not installed or does not start, or the cluster has too few GPUs.
        """
        ray = import_ray()
        self._ray = ray
        # Ray reports lost actors on stdout, which may be another program's input.
        self._stdout = redirect_stdout(sys.stderr)
        self._stdout.__enter__()
        self._actors: list[Any] = []
        self._idle: list[int] = []
        self._busy: dict[Any, tuple[_Work, int]] = {}
        self._waiting: deque[_Work] = deque()
        self._num_rounds = 0
        # Actors that were lost and are being started again, by what says that they are there.
        self._returning: dict[Any, int] = {}
        errors = ray.exceptions
        # An actor dies alone, with its node, or because its node's memory is short: Ray ends the largest.
        self._lost = errors.RayActorError, errors.NodeDiedError, errors.OutOfMemoryError
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
        # Cores are divided into threads, not reserved: on unequal nodes an actor could wait forever for its share.
        fewest_cores = min(host.get("CPU", 1) for host in hosts)
        num_threads = max(1, int(fewest_cores / math.ceil(self.number / len(hosts))))
        # Lost work is repeated here, not by Ray: a lost node's GPUs may be long in coming back.
        actor = ray.remote(
            num_gpus=1 if uses_gpu else 0, num_cpus=0, scheduling_strategy="SPREAD", max_restarts=MAX_RESTARTS
        )(_Actor)
        self._actors = [actor.remote(make, num_threads) for _ in range(self.number)]
        self._idle = list(range(self.number))
        for one in self._actors:
            one.load.remote()

    def share(self, value: Any) -> Shared:
        """Send something to all actors once; arguments may hold what this returns."""
        return Shared(self._ray.put(value))

    def each(self, arguments: Sequence[Any], on_done: Callable[[int], None] = lambda _number: None) -> list[Any]:
        """Do some work with each argument; returns what it gave, in their order. Earlier work is not waited for.

        Raises:
            DapaError: The first error of any of them.
        """
        self._num_rounds += 1
        for number, argument in enumerate(arguments):
            self.submit((self._num_rounds, number), argument)
        found: dict[int, Any] = {}
        while len(found) < len(arguments):
            key, result, error = self.wait()
            if not isinstance(key, tuple) or key[0] != self._num_rounds:
                continue
            if error is not None:
                raise error
            found[key[1]] = result
            on_done(key[1])
        return [found[number] for number in range(len(arguments))]

    @property
    def idle(self) -> tuple[int, ...]:
        """The numbers of the actors that have nothing to do; none as long as work waits for one."""
        return () if self._waiting else tuple(self._idle)

    @property
    def running(self) -> tuple[Hashable, ...]:
        """The keys of the work that was submitted and not yet waited for."""
        return tuple(work.key for work in (*(work for work, _ in self._busy.values()), *self._waiting))

    def submit(self, key: Hashable, argument: Any, on: int | None = None) -> None:
        """Begin some work, on an idle actor or, if none is, on the next one that is free."""
        work = _Work(key, argument)
        if on is not None:
            self._begin(work, on)
        else:
            self._waiting.append(work)
            self._begin_waiting()

    def _begin(self, work: _Work, number: int) -> None:
        self._idle.remove(number)
        self._busy[self._actors[number].do.remote(work.argument)] = work, number

    def _begin_waiting(self) -> None:
        while self._waiting and self._idle:
            self._begin(self._waiting.popleft(), self._idle[-1])

    def wait(self) -> tuple[Hashable, Any, DapaError | None]:
        """Wait for the next work to end.

        Returns:
            Its key, what it gave, and the error that it raised for the user, if any.

        Raises:
            UsageError: If all actors are lost for good, or for long.
        """
        while True:
            self._begin_waiting()
            if not self._busy and not self._returning:
                raise UsageError(f"all workers were lost for good, each after {MAX_RESTARTS} restarts")
            timeout = None if self._busy else RETURN_SECONDS
            ready, _ = self._ray.wait([*self._busy, *self._returning], num_returns=1, timeout=timeout)
            if not ready:
                raise UsageError(
                    f"all workers were lost, and none came back within {RETURN_SECONDS} seconds; run again when their "
                    f"nodes are there"
                )
            (reference,) = ready
            if reference in self._returning:
                self._welcome(reference)
                continue
            work, number = self._busy.pop(reference)
            try:
                found = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                self._idle.append(number)
                if isinstance(error.cause, DapaError):
                    return work.key, None, error.cause
                raise
            except self._lost as error:
                self._await(number)
                work.num_lost += 1
                if work.num_lost > MAX_RESTARTS:
                    lost = f"a worker was lost for good, after up to {MAX_RESTARTS} restarts"
                    return work.key, None, UsageError(f"{lost}: {one_line(error)}")
                self._waiting.appendleft(work)
                continue
            self._idle.append(number)
            return work.key, found, None

    def _await(self, number: int) -> None:
        """Be told when a lost actor has been started again."""
        self._returning[self._actors[number].is_there.options(max_task_retries=-1).remote()] = number

    def _welcome(self, reference: Any) -> None:
        number = self._returning.pop(reference)
        # Otherwise it is lost for good, and the others go on.
        with suppress(*self._lost):
            self._ray.get(reference)
            self._idle.append(number)
            self._actors[number].load.remote()

    def close(self) -> None:
        """Stop the actors, even at work, and the cluster if it was started for them."""
        # Hide Ray's messages about work that fails because its actor is stopped.
        with redirect_stdout(StringIO()):
            for actor in self._actors:
                self._ray.kill(actor)
            self._actors, self._idle, self._busy, self._returning = [], [], {}, {}
            self._waiting.clear()
            if self._began_here:
                self._ray.shutdown()
                if threading.current_thread() is threading.main_thread():
                    # Ray leaves its own handler.
                    signal.signal(signal.SIGTERM, self._on_sigterm)
        self._stdout.__exit__(None, None, None)


class _Actor:
    """What does the work, in a process of its own."""

    def __init__(self, make: Callable[[int], Callable[[Any], Any]], num_threads: int) -> None:
        self._make = make
        self._num_threads = num_threads

    @cached_property
    def _work(self) -> Callable[[Any], Any]:
        # Not in `__init__`: Ray would take an error there for a lost actor, and hide its message.
        return self._make(self._num_threads)

    def load(self) -> None:
        """Make the function; if that fails, the first work raises the error."""
        with suppress(Exception):
            _ = self._work

    def is_there(self) -> None:
        """Return at once."""

    def do(self, argument: Any) -> Any:
        return self._work(argument)


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
