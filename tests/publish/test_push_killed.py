"""A push that is killed at any moment, by a process of its own against a real server."""

import os
import random
import signal
import time

import warm
from conftest import call
from hub_server import command_line
from publish.conftest import tree

NUM_KILLS = 6


def test_a_killed_push_leaves_the_old_or_the_new_model(hub, new_id, pair, write_recipe, tmp_path):
    name = new_id("repaired")
    results = []
    for layer in (1, 2):
        out = tmp_path / f"out{layer}"
        assert call("run", write_recipe(*pair, layers=layer), out, "--no-evaluate").exit_code == 0
        results.append(out)
    # The card is of the repository from the first push on.
    for out in reversed(results):
        assert call("push", out, name).exit_code == 0
    wholes = [tree(out) for out in results]
    # A fast disk would leave little to be killed in.
    hub.faults.add(method="PUT|POST", delay_seconds=0.02)
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": hub.token("alice")}
    environment.pop("HF_HUB_OFFLINE", None)

    def start(out) -> tuple[warm.Process, float]:
        """Start a push; gives it, and when it first asked the hub."""
        num_requests = len(hub.requests)
        process = warm.Process(command_line("push", out, name), env=environment)
        while len(hub.requests) == num_requests and process.poll() is None:
            time.sleep(0.005)
        return process, time.monotonic()

    def state() -> dict[str, bytes]:
        files = hub.store.repositories[name].files()
        return {path: hub.store.read(entry) for path, entry in files.items() if path != ".gitattributes"}

    process, began = start(results[1])
    assert process.wait() == 0, process.stderr
    duration = time.monotonic() - began
    assert state() == wholes[1]
    num_killed, draw = 0, random.Random(7)
    for number in range(NUM_KILLS):
        new, old = number % 2, 1 - number % 2
        process, _ = start(results[new])
        time.sleep(draw.uniform(0, duration))
        process.send_signal(signal.SIGKILL)
        num_killed += process.wait() == -signal.SIGKILL
        assert state() in (wholes[old], wholes[new])
        assert call("push", results[new], name).exit_code == 0
        assert state() == wholes[new]
    assert num_killed > NUM_KILLS // 2
    for seen in hub.store.repositories[name].seen()[1:]:
        content = {path: hub.store.read(entry) for path, entry in seen.items() if path != ".gitattributes"}
        assert content in wholes
