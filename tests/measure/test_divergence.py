"""Divergence, against brute force in float64 over answers of the model's own `generate`."""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, SHAPE, save_random, tiny_llama

from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.divergence import divergence, divergences, make_reference
from dapa_merge.measure.generate import prompt_ids
from dapa_merge.measure.live import load_model

PROMPTS = ("How do I paint a boat?", "Write a poem about the sea and the wind.", "Why?", "Name a tree.")
NUM_TOKENS = 7
# Their logits are changed after the output layer.
CHANGED = {
    "Gemma2ForCausalLM": {"final_logit_softcapping": 3.0},
    "CohereForCausalLM": {"logit_scale": 0.5},
    "GraniteForCausalLM": {"logits_scaling": 3.0},
}


def load(folder, config, dtype):
    return load_model(open_checkpoint(str(save_random(folder, config, seed=3, dtype=dtype))), torch.device("cpu"))


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "GPT2LMHeadModel", *CHANGED])
def target(request, tmp_path_factory):
    if request.param == "GPT2LMHeadModel":
        config = transformers.GPT2Config(vocab_size=300, n_positions=64, n_layer=2, n_embd=32, n_head=4, eos_token_id=2)
    else:
        name, changes = ARCHITECTURES[request.param]
        changes = {**SHAPE, **changes, "vocab_size": 300, **CHANGED.get(request.param, {})}
        config = getattr(transformers, name)(**changes)
    return load(tmp_path_factory.mktemp("target") / "model", config, torch.float32)


def moved(model, amount=0.02, seed=0):
    """A copy of a model whose layers, but neither embeddings nor output layer, differ a little."""
    other = copy.deepcopy(model)
    fixed = {id(other.get_input_embeddings().weight), id(other.get_output_embeddings().weight)}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            if id(parameter) not in fixed:
                parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return other


def answers(model, tokenizer):
    for prompt in PROMPTS:
        ids = prompt_ids(tokenizer, prompt)
        said = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=NUM_TOKENS
        )
        yield ids, said[0].tolist()


def brute_force(target, tokenizer, other, size=None):
    """The mean divergence by one forward pass of each model per answer, all positions, in float64."""
    found = []
    for context, whole in answers(target, tokenizer):
        with torch.no_grad():
            ours, theirs = (
                model(torch.tensor([whole])).logits[0, len(context) - 1 : -1, :size].double().log_softmax(-1)
                for model in (target, other)
            )
        found += (ours.exp() * (ours - theirs)).sum(-1).tolist()
    return math.fsum(found) / len(found)


def reference_of(target, **options):
    return make_reference(*target, PROMPTS, max_new_tokens=NUM_TOKENS, batch_size=BatchSize(3), **options)


@pytest.mark.parametrize("keeps_logits", [False, True])
def test_divergence_is_that_of_full_softmaxes_in_float64(target, keeps_logits):
    model, tokenizer = target
    other = moved(model)
    expected = brute_force(model, tokenizer, other)
    assert expected > 1e-3
    found = divergence(other, reference_of(target, keeps_logits=keeps_logits), BatchSize(2))
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_model_does_not_diverge_from_itself(target):
    assert divergence(target[0], reference_of(target), BatchSize(2)) < 1e-7


def test_each_model_diverges_from_the_other_in_its_own_way(target):
    model, tokenizer = target
    other = moved(model)
    back = divergence(model, reference_of((other, tokenizer)), BatchSize(4))
    assert back == pytest.approx(brute_force(other, tokenizer, model), rel=1e-4)
    assert back != pytest.approx(divergence(other, reference_of(target), BatchSize(4)), rel=1e-3)


def test_the_counted_tokens_are_those_that_the_target_generates(target):
    model, tokenizer = target
    rows = reference_of(target).rows
    assert sorted(row.text.ids for row in rows) == sorted(whole for _, whole in answers(model, tokenizer))
    assert [len(row.text.ids) for row in rows] == sorted((len(row.text.ids) for row in rows), reverse=True)


def test_logits_are_kept_only_where_states_do_not_determine_them(target):
    model, _ = target
    is_changed = type(model).__name__ in CHANGED
    for row in reference_of(target).rows:
        assert row.is_logits == is_changed
        assert row.known.shape == (row.num_counted, 300 if is_changed else 32)


def test_an_answer_that_ends_by_itself_counts_its_end_token(target):
    model, _ = target
    first = reference_of(target).rows[0]
    end = first.text.ids[first.text.num_context + 2]
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [end]
    try:
        rows = reference_of(target).rows
    finally:
        model.generation_config.eos_token_id = before
    said = [row.text.ids[row.text.num_context :] for row in rows]
    assert any(answer[-1] == end and len(answer) < NUM_TOKENS for answer in said)
    assert all(end not in answer[:-1] for answer in said)


def test_the_gradient_is_that_of_finite_differences(target):
    model = moved(target[0]).double()
    reference = reference_of(target)
    rows = [row._replace(known=row.known.double()) for row in reference.rows]
    parameter = next(value for name, value in model.named_parameters() if value.dim() == 2 and "mlp" in name)
    parameter.requires_grad_()
    (gradient,) = torch.autograd.grad(divergences(model, reference.padding, rows).sum(), parameter)
    index = int(gradient.abs().argmax())
    sides = []
    # Norms compute in float32 whatever the dtype, so the step cannot be tiny.
    for step in (1e-4, -1e-4):
        with torch.no_grad():
            parameter.view(-1)[index] += step
            sides.append(float(divergences(model, reference.padding, rows).sum()))
            parameter.view(-1)[index] -= step
    assert float(gradient.view(-1)[index]) == pytest.approx((sides[0] - sides[1]) / 2e-4, rel=1e-2)


def test_a_larger_vocabulary_is_compared_where_both_have_entries(target, tmp_path):
    model, tokenizer = target
    other = moved(model)
    other.resize_token_embeddings(310, mean_resizing=False)
    found = divergence(other, reference_of(target, keeps_logits=True), BatchSize(4))
    assert found == pytest.approx(brute_force(model, tokenizer, other, size=300), rel=1e-4)


def test_nothing_to_compare_is_no_number_and_damage_is_infinite(target):
    model, _ = target
    reference = reference_of(target)
    assert math.isnan(divergence(model, replace(reference, rows=()), BatchSize(4)))
    damaged = moved(model)
    with torch.no_grad():
        next(value for value in damaged.parameters() if value.dim() == 1).fill_(math.nan)
    assert divergence(damaged, reference, BatchSize(4)) == math.inf


def test_a_model_without_embeddings_for_the_answers_is_not_compared(target):
    reference = reference_of(target, keeps_logits=True)
    largest = max(max(row.text.ids) for row in reference.rows)
    other = moved(target[0])
    other.resize_token_embeddings(largest, mean_resizing=False)
    assert math.isnan(divergence(other, reference, BatchSize(4)))


def test_a_batch_that_does_not_fit_is_halved(target, monkeypatch):
    model, _ = target
    reference = reference_of(target)
    other = moved(model)
    expected = divergence(other, reference, BatchSize(1))
    forward = other.forward

    sizes = []

    def small(input_ids, **options):
        sizes.append(len(input_ids))
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError
        return forward(input_ids=input_ids, **options)

    small.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(other, "forward", small)
    assert divergence(other, reference, BatchSize(4)) == pytest.approx(expected, rel=1e-5)
    assert sizes == [4, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits_hardly_diverges(tmp_path, dtype):
    target = load(tmp_path / "model", tiny_llama(vocab_size=300), dtype)
    reference = reference_of(target)
    assert all(not row.is_logits and row.known.dtype == dtype for row in reference.rows)
    assert divergence(target[0], reference, BatchSize(1)) < 1e-5
    expected = brute_force(*target, moved(target[0]))
    assert divergence(moved(target[0]), reference, BatchSize(2)) == pytest.approx(expected, rel=0.05)
