"""Sampling with a seed: the right distribution, and responses that depend on the seed and the prompt alone."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import answer, call, write_few
from hypothesis import given, settings
from hypothesis import strategies as st

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import UsageError
from dapa_merge.measure.decode import BatchSize, LookupCache
from dapa_merge.measure.determinism import is_deterministic
from dapa_merge.measure.generate import generate
from dapa_merge.measure.live import load_model
from dapa_merge.measure.prompts.sets import load_prompts
from dapa_merge.measure.sampling import choose, draws
from dapa_merge.recipe.asking import Sampling

LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12)
NUMBER = 4096


@pytest.fixture(scope="module")
def source():
    return load_model(open_checkpoint(str(miniature.path("source"))), torch.device("cpu"))


def shares(logits, sampling):
    """How often each token is chosen, of numbers spread evenly over [0, 1)."""
    grid = (torch.arange(NUMBER) + 0.5) / NUMBER
    chosen = choose(sampling, torch.tensor(logits).expand(NUMBER, -1), grid)
    return chosen.bincount(minlength=len(logits)) / NUMBER


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.floats(0.1, 4))
def test_each_token_is_chosen_as_often_as_softmax_says(logits, temperature):
    wanted = (torch.tensor(logits) / temperature).softmax(-1)
    assert torch.allclose(shares(logits, Sampling(temperature)), wanted, atol=2 / NUMBER)


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.floats(0.05, 0.99))
def test_top_p_keeps_the_likeliest_tokens_that_hold_it_as_in_transformers(logits, top_p):
    from transformers import TopPLogitsWarper

    kept = TopPLogitsWarper(top_p)(None, torch.tensor([logits]))[0].softmax(-1)
    if len({*logits}) == len(logits):  # Ties may be broken either way.
        assert torch.allclose(shares(logits, Sampling(1.0, top_p)), kept, atol=2 / NUMBER)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval_choose_a_token_that_has_a_chance(number):
    logits = torch.tensor([[3.0, float("-inf"), 3.0, float("-inf")]])
    assert int(choose(Sampling(), logits, torch.tensor([number]))) in (0, 2)


def test_numbers_depend_on_seed_prompt_and_place_alone():
    together = draws(5, [1, 2, 3], 0, 8)
    assert together[3:5] == draws(5, [1, 2, 3], 3, 2)
    assert len({*together, *draws(6, [1, 2, 3], 0, 8), *draws(5, [1, 2, 4], 0, 8)}) == 24
    assert all(0 <= number < 1 for number in together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_response_does_not_depend_on_batches_or_speculative_decoding(source, dtype):
    model, tokenizer = copy.deepcopy(source[0]).to(dtype), source[1]
    prompts, sampling = load_prompts("miniature").harmless[:6], Sampling(4.0, 0.98, 11)
    if not is_deterministic(model, 64):
        # Nearly as many tokens could follow as there are: rounding decides between them in most responses.
        pytest.skip("on this processor, rounding to 16 bits depends on the batch")

    def said(prompts, size, lookup=None):
        return generate(
            model, tokenizer, prompts, max_new_tokens=12, batch_size=BatchSize(size), lookup=lookup, sampling=sampling
        )

    first = said(prompts, 6)
    assert first == said(prompts, 1)
    assert first[3:4] == said(prompts[3:4], 1)
    lookup = LookupCache()
    assert first == said(prompts, 4, lookup)
    # Now the drafts are whole responses.
    assert first == said(prompts, 4, lookup)
    greedy = generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=BatchSize(6))
    assert first != greedy


def test_a_model_that_must_use_its_own_generate_samples_the_same(source, monkeypatch):
    # In 16 bits the two would round differently, which decides near-ties.
    model, tokenizer = copy.deepcopy(source[0]).float(), source[1]
    prompts, sampling = load_prompts("miniature").harmful[:4], Sampling(4.0, 0.98, 2)
    fast = generate(model, tokenizer, prompts, max_new_tokens=10, batch_size=BatchSize(4), sampling=sampling)
    monkeypatch.setattr("dapa_merge.measure.generate.is_batchable", lambda _: False)
    slow = generate(model, tokenizer, prompts, max_new_tokens=10, batch_size=BatchSize(4), sampling=sampling)
    assert fast == slow


@pytest.mark.parametrize("temperature", [float("nan"), 1e-9, -1.0, 11.0])
def test_a_temperature_that_means_nothing_is_refused(temperature):
    with pytest.raises(UsageError, match=r"the temperature is .*; write 0, or a number from 0\.01 to 10"):
        Sampling(temperature)


def test_the_same_seed_gives_the_same_figures_and_the_answer_says_how_it_was_drawn(tmp_path):
    few = write_few(tmp_path / "few", 4)
    command = ["evaluate", miniature.path("source"), "--prompts", few, "--max-new-tokens", 8, "--temperature", 2]
    files = [tmp_path / f"{name}.jsonl" for name in "abc"]
    first = answer(*command, "--json", "--responses", files[0])
    assert first["asking"] == {"sampling": {"temperature": 2.0, "top_p": 1.0, "seed": 0}}
    assert answer(*command, "--json", "--responses", files[1], "--seed", 0) == first
    answer(*command, "--json", "--responses", files[2], "--seed", 1)
    texts = [path.read_text() for path in files]
    assert texts[0] == texts[1] != texts[2]
    assert "sampled at temperature 2, seed 0" in call(*command).stdout
