"""Tests of what a system lacks are skipped with a reason, and no others."""

import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import needs
import pytest
import warm

SOURCE = """
import os, signal, warm
def make(path): os.mkfifo(path)
def plain(path): path.touch()
TABLE = {"link": (lambda path: path.symlink_to("nowhere"), "x"), "file": (plain, "y")}
def killed(): return signal.SIGKILL
def test_itself(tmp_path): (tmp_path / "a").symlink_to("b")
def test_by_a_helper(tmp_path): [make(tmp_path / name) for name in "ab"]
def test_by_a_table(tmp_path, kind): TABLE[kind][0](tmp_path / "a")
def test_by_a_parameter(tmp_path, kind): kind(tmp_path / "a")
def test_by_a_fixture(killed): assert killed
def test_by_another_module(path): warm.program(path, "")
def test_of_a_device(path): open("/dev/full", "w")
def test_of_nothing(tmp_path): (tmp_path / "a").touch()
"""


@pytest.mark.parametrize(
    ("name", "parameter", "named"),
    [
        ("itself", None, "symbolic links"),
        ("by_a_helper", None, "named pipes"),
        ("by_a_table", "link", "symbolic links"),
        ("by_a_table", "file", ""),
        ("by_a_parameter", "make", "named pipes"),
        ("by_a_parameter", "plain", ""),
        ("by_a_fixture", None, "signals of POSIX"),
        ("by_another_module", None, "sockets of Unix"),
        ("of_a_device", None, "devices of Linux"),
        ("of_nothing", None, ""),
    ],
)
def test_what_a_test_needs_is_read_from_its_code(name, parameter, named):
    made: dict = {}
    exec(compile(SOURCE, str(Path(__file__).with_name("made.py")), "exec"), made)
    fixtures = {"killed": [SimpleNamespace(func=made["killed"])]} if name == "by_a_fixture" else {}
    item = SimpleNamespace(
        function=made[f"test_{name}"],
        _fixtureinfo=SimpleNamespace(name2fixturedefs=fixtures),
        callspec=SimpleNamespace(params={"kind": made.get(parameter, parameter)}),
    )
    found = list(needs.reasons(item, list(needs.NEEDS)))
    assert any(named in reason for reason in found) if named else found == []


@pytest.mark.skipif("without_posix" in sys.modules, reason="needs what the plugin takes away")
def test_linux_has_everything():
    assert sys.platform != "linux" or needs.missing_here() == []


def test_a_process_that_cannot_be_forked_is_started_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(warm, "CAN_FORK", False)
    code = "import sys; print(sys.argv[1]); print('no', file=sys.stderr); sys.exit(3)"
    done = warm.run([sys.executable, "-c", code, "yes"])
    assert (done.returncode, done.stdout, done.stderr) == (3, "yes\n", "no\n")
    endless = warm.Process([sys.executable, "-c", "import time; time.sleep(600)"], cwd=str(tmp_path))
    assert endless.poll() is None
    endless.send_signal(signal.SIGTERM)
    assert endless.wait() != 0
