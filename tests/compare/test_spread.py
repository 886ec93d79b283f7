"""A comparison over several workers: in this process in any order, and in Ray actors of which some are lost."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from conftest import answer, call, without_time, write_few

from dapa_merge import miniature
from dapa_merge.compare import spread
from dapa_merge.errors import DapaError
from dapa_merge.report import drawing

# With whatever else starts Ray.
pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]
SETTINGS = (
    "--methods", "dapa,random,random-search,linear", "--seeds", 1, "--weights", "0.5", "--points", 2, "--device", "cpu",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def no_charts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "render", lambda _figure, _kind: b"")
        yield


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> list[Path]:
    """One whose search finds something, and one whose target cannot be loaded."""
    folder = tmp_path_factory.mktemp("recipes")
    broken = folder / "broken-target"
    shutil.copytree(miniature.path("target"), broken)
    for path in broken.glob("*token*"):
        path.unlink()
    settings = {
        "layers": "auto",
        "prompts": str(write_few(folder / "prompts", 8)),
        "max_new_tokens": 12,
        "max_tests": 4,
    }
    paths = []
    for name, target in (("bad", broken), ("good", miniature.path("target"))):
        content = {
            "merge_method": "dapa",
            "base_model": str(target),
            "models": [{"model": str(miniature.path("source"))}],
            "parameters": settings,
        }
        paths.append(folder / f"{name}.yml")
        # JSON is YAML.
        paths[-1].write_text(json.dumps(content))
    return paths


@pytest.fixture(scope="module")
def alone(recipes, tmp_path_factory) -> Path:
    """The folder of their comparison by one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    result = call("compare", *recipes, "--out", out, *SETTINGS)
    assert result.exit_code == 4
    return out


def check_same(out: Path, alone: Path) -> None:
    """The same table, and journals with the same notes."""
    one, other = (json.loads((folder / "summary.json").read_text())["rows"] for folder in (out, alone))
    assert without_time(one) == without_time(other)
    assert (out / "curve.csv").read_bytes() == (alone / "curve.csv").read_bytes()
    notes = [
        {entry["note"]: without_time(entry["value"]) for entry in entries(folder, "good") if "note" in entry}
        for folder in (out, alone)
    ]
    assert notes[0] == notes[1]
    assert len(notes[0]) == len(entries(out, "good")) - 1


def entries(out: Path, row: str) -> list[dict]:
    return [json.loads(line) for line in (out / "rows" / row / "figures.jsonl").read_text().splitlines()]


class Here:
    """Workers in this process that are done in any order, and of which some are lost with what they did."""

    def __init__(self, make, number, *, uses_gpu) -> None:
        assert not uses_gpu
        self.number = number
        self.random = random.Random(number)
        self.make = make
        self.hands = [make(1) for _ in range(number)]
        self.running = {}
        self.num_lost = 0

    @property
    def idle(self):
        return tuple(number for number in range(self.number) if number not in self.running)

    def submit(self, key, argument, number):
        self.running[number] = key, argument

    def wait(self):
        number = self.random.choice(list(self.running))
        key, argument = self.running.pop(number)
        if self.random.random() < 0.1:
            self.hands[number](argument)
            self.hands[number] = self.make(1)
            self.num_lost += 1
        try:
            return key, self.hands[number](argument), None
        except DapaError as error:
            return key, None, error

    def close(self):
        Here.last = self


def test_workers_in_any_order_make_the_same_table(recipes, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(spread, "Actors", Here)
    result = call("compare", *recipes, "--out", tmp_path / "out", *SETTINGS, "--workers", "ray:3")
    assert result.exit_code == 4
    assert "bad.yml: " in result.stderr
    assert "has no tokenizer" in result.stderr
    check_same(tmp_path / "out", alone)
    failures = [json.loads((out / "summary.json").read_text())["failures"] for out in (tmp_path / "out", alone)]
    assert failures[0] == failures[1]
    assert Here.last.num_lost > 0


def test_workers_go_on_with_what_a_process_alone_left_off(recipes, alone, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(alone, out)
    journal = out / "rows" / "good" / "figures.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-5]))
    monkeypatch.setattr(spread, "Actors", Here)
    call("compare", *recipes, "--out", out, *SETTINGS, "--workers", "ray:2")
    assert journal.read_text().splitlines(keepends=True)[:-5] == lines[:-5]
    check_same(out, alone)


def test_a_cluster_that_loses_a_node_makes_the_same_table(cluster, recipes, alone, tmp_path):
    journal = tmp_path / "out" / "rows" / "good" / "figures.jsonl"
    arguments = (recipes[1], "--out", tmp_path / "out", *SETTINGS, "--workers", "ray:2", "--json")
    with cluster.losing("node", lambda: journal.exists() and journal.read_bytes().count(b"\n") > 3) as lost:
        answer("compare", *arguments)
    assert lost
    check_same(tmp_path / "out", alone)
