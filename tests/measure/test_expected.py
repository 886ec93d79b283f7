"""What an evaluation is said to take, against what it asks; and the time that is left while it runs."""

from __future__ import annotations

import re

import pytest
from conftest import write_few

from dapa_merge import miniature, progress
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.measure import expected
from dapa_merge.measure.evaluate import evaluate_models
from dapa_merge.measure.expected import Calibration, Expected
from dapa_merge.measure.live import choose_device
from dapa_merge.progress import collected, shown
from dapa_merge.recipe.asking import Asking
from dapa_merge.recipe.options import Options

PAIR = [str(miniature.path(member)) for member in ("target", "source")]


@pytest.fixture
def lines_of(monkeypatch, tmp_path, capsys):
    """Evaluates the pair with a few prompts; returns the steps, and how many prompts were asked."""

    def evaluate(**settings) -> tuple[list[str], int]:
        asked = [0]

        def count(number: int, unit: str) -> None:
            asked[0] += number
            progress.advance(number, unit)

        monkeypatch.setattr("dapa_merge.measure.generate.advance", count)
        few = write_few(tmp_path / "few", 12)
        with shown(), collected() as lines:
            evaluate_models(PAIR, str(few), Options("cpu"), max_new_tokens=12, batch_size=4, text="builtin", **settings)
        capsys.readouterr()
        return lines, asked[0]

    return evaluate


def test_a_long_evaluation_says_beforehand_what_it_takes_and_then_what_is_left(lines_of, monkeypatch):
    monkeypatch.setattr(expected, "TOLD_SECONDS", 0)
    monkeypatch.setattr(progress, "TOLD_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(expected.psutil, "getloadavg", lambda: (0.2, 0.2, 0.2))
    told: list[Expected] = []
    tell = Expected.tell
    monkeypatch.setattr(Expected, "tell", lambda self: (told.append(self), tell(self)))
    lines, asked = lines_of(attacks="prefill")
    (first,) = told
    assert set(first.parts) == set(PAIR)
    # Harmful ones twice, because of the attack.
    assert asked == sum(part["prompts"] for part in first.parts.values()) == 2 * (12 + 12 + 12)
    where = [at for at, line in enumerate(lines) if line.startswith("this takes about ")]
    loading = [at for at, line in enumerate(lines) if line.startswith("loading")]
    assert len(where) == 1
    assert where[0] < loading[0]
    assert re.fullmatch(r"this takes about \d+ s on cpu, 0\.0 GB of its memory and the batches", lines[where[0]])
    left = [line for line in lines if line.startswith("measuring the model: ")]
    assert all(re.search(r" prompts, about .* left in all$", line) for line in left)
    assert len(left) > 4


def test_a_short_evaluation_says_nothing_of_it(lines_of):
    lines, _ = lines_of()
    assert not [line for line in lines if line.startswith("this takes")]


def test_the_part_of_a_limited_evaluation_is_smaller(lines_of, monkeypatch):
    monkeypatch.setattr(expected, "TOLD_SECONDS", 0)
    told: list[Expected] = []
    monkeypatch.setattr(Expected, "tell", lambda self: told.append(self))
    _, asked = lines_of(asking=Asking(limit=3))
    assert asked == sum(part["prompts"] for part in told[0].parts.values()) == 2 * (3 + 3)


def test_more_tokens_and_more_layers_take_longer():
    passes = Calibration(open_checkpoint(PAIR[0]), choose_device("cpu"))
    assert passes.num_layers == 10
    assert 0 < passes.answer_seconds(1) < passes.answer_seconds(60)
    assert passes.answer_seconds(60) <= 3 * passes.answer_seconds(None)


def test_products_of_the_same_shape_are_tried_once(monkeypatch):
    tried = []
    monkeypatch.setattr(expected, "timed", lambda *_: tried.append(None) or 1.0)
    passes = Calibration(open_checkpoint(PAIR[0]), choose_device("cpu"))
    layer = passes.num_layers * (len(passes.inner) + expected.OVERHEAD)
    assert passes.pass_seconds(8, 8) == pytest.approx(layer + 1)
    # The output layer's is one of them.
    shapes = {tensor.shape for tensor in passes.inner}
    assert len(tried) == len(shapes) < len(passes.inner)
    passes.pass_seconds(8, 8)
    assert len(tried) == len(shapes)


@pytest.mark.parametrize(
    ("load", "ending"), [(1.4, "the batches"), (3.06, "load of 3.1 on 2 processors; less without other programs)")]
)
def test_a_busy_machine_is_named_beside_what_was_timed_on_it(load, ending, monkeypatch):
    monkeypatch.setattr(expected.psutil, "getloadavg", lambda: (load, 9.0, 9.0))
    monkeypatch.setattr(expected.psutil, "cpu_count", lambda: 2)
    assert str(Expected({"a": {"prompts": 10}}, {"prompts": 2.0}, 0, 0, "cpu")).endswith(ending)


def test_what_has_no_pace_is_shown_without_a_time():
    known = Expected({"a": {"prompts": 10}, "b": {"requests": 5}}, {"prompts": 2.0}, 0, 0, "cpu")
    with known.told():
        assert progress._jobs[0].seconds_left() is None
    assert known.total_seconds == 20
