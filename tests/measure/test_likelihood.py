"""Likelihoods, held to transformers' own loss."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_llama
from transformers import AutoModelForCausalLM

from dapa_merge.measure.perplexity import ScoredText as Row
from dapa_merge.measure.perplexity import losses

ROWS = (
    Row([5, 9, 14, 3, 8, 21, 7], num_context=3),
    Row([5, 9, 14, 3], num_context=1),
    Row([31, 4, 6, 77, 90], num_context=4),
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_llama()).float().eval()


def expected(model, row):
    labels = torch.tensor([[-100] * row.num_context + row.ids[row.num_context :]])
    with torch.no_grad():
        mean = model(input_ids=torch.tensor([row.ids]), labels=labels).loss
    return float(mean) * (len(row.ids) - row.num_context)


def test_the_loss_of_each_row_is_transformers_own(model):
    found = losses(model, 0, ROWS)
    assert found.tolist() == pytest.approx([expected(model, row) for row in ROWS], rel=1e-5)
    assert found.requires_grad


def test_no_logits_are_computed_before_the_first_token_that_counts(model):
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape[:2]))
    losses(model, 0, ROWS[::2])
    handle.remove()
    # Of seven tokens, the first two positions predict what is given in both rows, and the last one predicts nothing.
    assert shapes == [(2, 4)]


def test_a_model_that_cannot_leave_logits_out_is_asked_for_all(model, monkeypatch):
    forward = model.forward

    def without(input_ids, attention_mask):
        return forward(input_ids=input_ids, attention_mask=attention_mask)

    monkeypatch.setattr(model, "forward", without)
    assert losses(model, 0, ROWS).tolist() == pytest.approx([expected_of(forward, row) for row in ROWS], rel=1e-5)


def expected_of(forward, row):
    logits = forward(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
    return -sum(float(logits[index - 1, row.ids[index]].detach()) for index in range(row.num_context, len(row.ids)))
