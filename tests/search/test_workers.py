from __future__ import annotations

import functools
import itertools
import os
import random
import signal
import sys
import time

import pytest

from dapa_merge import progress
from dapa_merge.checkpoint.units import Unit
from dapa_merge.delta.minimize import ALGORITHMS, foresee, minimize
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.search.cluster import Actors
from dapa_merge.search.journal import Journal
from dapa_merge.search.workers import Oracle, RayWorkers, names_of

UNITS = tuple(Unit(layer, "gate", ()) for layer in range(32))
NEEDED = frozenset(UNITS[layer] for layer in (5, 6, 7, 20, 21, 22))
PRIOR = {unit: (unit in NEEDED) + (unit.layer % 5) / 4 for unit in UNITS}


class Shuffled:
    """Workers that are done in any order."""

    is_away = True

    def __init__(self, number, seed):
        self.number = number
        self.generator = random.Random(seed)
        self.running = []
        self.submitted = []

    def submit(self, selection):
        assert len(self.running) < self.number
        self.running.append(selection)
        self.submitted.append(selection)

    def wait(self):
        selection = self.running.pop(self.generator.randrange(len(self.running)))
        return selection, outcome(selection)


def outcome(selection):
    return {"holds": selection >= NEEDED, "complaint": None}


def search(workers, algorithm="guided", journal=None):
    oracle = Oracle(journal or Journal(), workers)
    holds = oracle.among(UNITS, functools.partial(foresee, UNITS, algorithm=algorithm, prior=PRIOR))
    return minimize(UNITS, holds, algorithm=algorithm, prior=PRIOR), set(oracle.asked.values())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("number", [1, 2, 5])
def test_the_outcome_is_exactly_the_sequential_one(algorithm, number, monkeypatch):
    alone = minimize(UNITS, lambda selection: selection >= NEEDED, algorithm=algorithm, prior=PRIOR)
    workers = Shuffled(number, seed=number)
    recorded = []
    journal = Journal()
    monkeypatch.setattr(journal, "record", lambda names, _test: recorded.append(names))
    together, asked = search(workers, algorithm, journal)
    assert together == alone
    assert len(set(workers.submitted)) == len(workers.submitted)
    assert len(asked) == alone.tests
    # Every outcome is recorded once, and those that were not needed can be told from those that were.
    assert len(recorded) == len(set(recorded)) <= len(workers.submitted)
    assert {names_of(selection) for selection in asked - {frozenset(UNITS)}} <= set(recorded)


def test_a_search_elsewhere_tells_how_long_the_rest_takes_by_the_questions_that_were_answered(monkeypatch):
    clock = itertools.count(step=2.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    oracle, left = Oracle(Journal(), Shuffled(2, seed=0)), []
    oracle.expect(20, 50.0)
    holds = oracle.among(UNITS, functools.partial(foresee, UNITS, algorithm="guided", prior=PRIOR))

    def asked(selection):
        answer = holds(selection)
        left.append(progress._jobs[0].seconds_left())
        return answer

    with progress.job({"prompts": 1000.0}):
        progress.expect("copy", prompts=10_000)
        progress.begin("copy")
        found = minimize(UNITS, asked, algorithm="guided", prior=PRIOR)
    # Neither the prompts nor their pace in this process count: about one question's time for each that is expected.
    assert found.tests == len(left) < 20
    # The answer for all units is known without a test.
    assert left[0] == 10_000 * 1000.0
    assert all(0 < seconds < 20 * 40 for seconds in left[1:]), left
    assert left[-1] < left[1]


def test_one_worker_tests_nothing_that_is_not_asked():
    workers = Shuffled(1, seed=0)
    alone, asked = search(workers)
    assert len(workers.submitted) == alone.tests - 1
    assert set(workers.submitted) <= asked


def test_a_second_search_takes_over_workers_that_are_still_busy_for_the_first():
    num_busy = 0
    for seed in range(10):
        workers = Shuffled(3, seed)
        first, _ = search(workers, "ddmin")
        num_busy += bool(workers.running)
        second, _ = search(workers, "probdd")
        assert set(first.units) == set(second.units) == NEEDED
    assert num_busy > 5


def slow_test(folder, num_threads):
    """Made in each worker: tells its process, and tests."""
    assert num_threads == 1

    def test(selection):
        (folder / f"{os.getpid()}").touch()
        time.sleep(0.05)
        return outcome(selection)

    return test


def failing_test(num_threads):
    def test(selection):
        raise CheckpointError("the target is damaged")

    return test


# One process of pytest for all that starts Ray, which needs the cores.
pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def ray_workers(make, number=2):
    return RayWorkers(Actors(make, number, uses_gpu=False), lambda selection: selection)


def test_two_ray_actors_give_the_sequential_outcome_also_when_one_is_killed(cluster, tmp_path):
    alone = minimize(UNITS, lambda selection: selection >= NEEDED, prior=PRIOR)
    workers = ray_workers(functools.partial(slow_test, tmp_path))
    killed = []
    wait = workers.wait

    def wait_and_kill():
        if not killed:
            # Both have a test from the first question on.
            while len(list(tmp_path.iterdir())) < 2:
                time.sleep(0.02)
            killed.append(int(next(tmp_path.iterdir()).name))
            os.kill(killed[0], signal.SIGKILL)
        return wait()

    workers.wait = wait_and_kill
    try:
        together, _ = search(workers)
        processes = {int(path.name) for path in tmp_path.iterdir()}
        # A search may end before the third has started. Two at once: one alone goes to whoever was last busy.
        for number in range(600):
            if len(processes) == 3:
                break
            for unit in (UNITS[number % 32], UNITS[(number + 1) % 32]):
                workers.submit(frozenset({unit}))
            workers.wait()
            workers.wait()
            processes = {int(path.name) for path in tmp_path.iterdir()}
    finally:
        workers.close()
    assert together == alone
    assert killed
    assert len(processes) == 3  # Two, and the one that took the place of the dead.
    assert os.getpid() not in processes


def test_a_fault_in_a_worker_is_the_users_own_sentence(cluster):
    workers = ray_workers(failing_test)
    try:
        workers.submit(frozenset({1}))
        with pytest.raises(CheckpointError, match="the target is damaged"):
            workers.wait()
    finally:
        workers.close()


def test_gpus_that_are_not_there_are_named(cluster):
    with pytest.raises(UsageError, match="3 workers need a GPU each, but the Ray cluster has 0"):
        Actors(failing_test, 3, uses_gpu=True)


def unloadable(num_threads):
    raise CheckpointError("the target is not on this node")


def test_a_worker_that_cannot_load_its_model_says_why(cluster):
    workers = ray_workers(unloadable)
    try:
        workers.submit(frozenset({1}))
        with pytest.raises(CheckpointError, match="the target is not on this node"):
            workers.wait()
    finally:
        workers.close()


def test_a_cluster_that_does_not_answer_is_named(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UsageError, match=r"Ray does not start with address 127.0.0.1:1: ConnectionRefusedError"):
        ray_workers(failing_test)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"needs Ray; install it with: pip install ray"):
        ray_workers(failing_test)
