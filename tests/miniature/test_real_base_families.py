"""Tests of the benchmark that aligns and fine-tunes one real base apart, on the miniature."""

import math
import random
from dataclasses import replace

import pytest
import torch
from lessons import Lesson, Opening
from real_base_families import REFUSALS, SOURCES, TARGETS, Data, main, prefer
from real_training import TINY, answer_log_probs, answer_loss, encode
from transformers import AutoModelForCausalLM, AutoTokenizer

from dapa_merge import miniature
from dapa_merge.recipe.parse import load_recipe

BASE = str(miniature.path("target"))
ROWS = (Opening("Sing a song.", "Sure here is a"), Lesson("Tell a long story now.", "Once there was a fox."))


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def test_log_probabilities_of_answers_are_those_of_each_row_alone(model, tokenizer):
    together = answer_log_probs(model, *encode(tokenizer, ROWS))
    for row, found in zip(ROWS, together, strict=True):
        ids, labels = encode(tokenizer, [row])
        expected = -answer_loss(model, ids, labels) * (labels != -100).sum()
        assert torch.allclose(found, expected, atol=1e-4)


def test_preferred_answers_become_likely_and_more_so_than_rejected_ones(model, tokenizer):
    data = Data((Opening(*vars(ROWS[0]).values()),), (Opening(*vars(ROWS[1]).values()),), {}, 0, lambda _: None)
    refusal = Lesson(ROWS[0].prompt, random.Random(0).choice(REFUSALS))
    pair = encode(tokenizer, [refusal, ROWS[0]])
    before = answer_log_probs(model, *pair)
    size = replace(TINY, steps=20, batch_size=4)
    after = answer_log_probs(prefer(model, tokenizer, data, size, rate=3e-4), *pair)
    assert after[0] > before[0] + 1
    assert after[0] - after[1] > before[0] - before[1] + 1


def test_at_first_nothing_is_preferred_and_the_likelihood_of_the_preferred_answers_counts(model, tokenizer):
    """The loss is log(2), and the mean of what their tokens cost."""
    said = []
    data = Data((Opening(*vars(ROWS[0]).values()),), (Opening(*vars(ROWS[1]).values()),), {}, 0, said.append)
    preferred = [Lesson(ROWS[0].prompt, random.Random(0).choice(REFUSALS)), Opening(*vars(ROWS[1]).values())]
    expected = answer_loss(model, *encode(tokenizer, preferred)).item()
    prefer(model, tokenizer, data, replace(TINY, steps=1, batch_size=4), rate=1e-9)
    assert float(said[-1].split("loss ")[1].split(",")[0]) == pytest.approx(math.log(2) + expected, abs=2e-3)


def test_each_pair_has_a_recipe_that_names_the_base(tmp_path, capsys):
    (tmp_path / "harmful.csv").write_text("goal\nSing a song\nTell a story\n")
    (tmp_path / "harmless.csv").write_text("text\nName a bird\nName a tree\n")
    out = tmp_path / "out"
    data = ["--harmful", str(tmp_path / "harmful.csv"), "--harmless", str(tmp_path / "harmless.csv")]
    main([BASE, str(out), *data, "--tiny", "--only", "refuses-mlps", "orders"])
    assert len(list((out / "recipes").iterdir())) == len(SOURCES) * len(TARGETS)
    recipe = load_recipe(out / "recipes" / "orders-by-refuses-mlps.yml")
    assert (str(recipe.target), str(recipe.source)) == (str(out / "orders"), str(out / "refuses-mlps"))
    assert str(recipe.pretrained) == BASE
    changed = {
        name.split(".")[-2]
        for name, weight in AutoModelForCausalLM.from_pretrained(out / "refuses-mlps").state_dict().items()
        if not torch.equal(weight, AutoModelForCausalLM.from_pretrained(BASE).state_dict()[name])
    }
    assert changed == {"gate_proj", "up_proj", "down_proj"}


def test_a_file_without_the_column_is_named(tmp_path, capsys):
    (tmp_path / "harmful.csv").write_text("prompt\nSing a song\n")
    with pytest.raises(SystemExit) as end:
        main([BASE, str(tmp_path / "out"), "--harmful", str(tmp_path / "harmful.csv"), "--harmless", "none.csv"])
    assert end.value.code == 2
    assert "goal" in capsys.readouterr().err
