"""Texts that are packed into one sequence, against each text alone."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from dapa_merge.measure import packed
from dapa_merge.measure.packed import packed_logits, reader
from dapa_merge.measure.perplexity import ScoredText, counted_logits

TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Large, so that tokens matter to each other.
    "initializer_range": 0.5,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
# The first is far longer than the second, so that a model that reads over the ends of texts is noticed.
ROWS = (ScoredText([5, 6, 7, 8, 9, 10, 11, 12, 13, 14], 7), ScoredText([5, 6, 7, 20, 21], 4))


@functools.cache
def made(kind: str, **settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    settings = {key: [*value] if isinstance(value, tuple) else value for key, value in settings.items()}
    config = AutoConfig.for_model(kind, **{**TINY, **settings})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def alone(model, rows):
    return [counted_logits(model, 0, [row])[0] for row in rows]


@st.composite
def texts(draw):
    """Texts that begin alike, at least with one token, which is given."""
    tokens = st.integers(3, 63)
    shared = draw(st.lists(tokens, min_size=1, max_size=6))
    rows = []
    for own in draw(st.lists(st.lists(tokens, min_size=1, max_size=8), min_size=1, max_size=5)):
        ids = shared + own
        rows.append(ScoredText(ids, draw(st.integers(1, len(ids)))))
    return rows


@given(texts())
def test_each_text_is_read_as_if_it_were_alone(rows):
    model = made("llama")
    found = packed._packed(model, rows, packed._num_shared(rows))
    for one, other in zip(found, alone(model, rows), strict=True):
        # Logits have a spread of 2; rounding grows in a model whose tokens matter so much to each other.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@given(texts())
def test_what_texts_share_ends_before_the_first_counted_token_is_predicted(rows):
    shared = packed._num_shared(rows)
    assert shared < min(row.num_context for row in rows)
    assert len({tuple(row.ids[:shared]) for row in rows}) == 1
    longer = {tuple(row.ids[: shared + 1]) for row in rows}
    assert len(longer) > 1 or shared + 1 == min(row.num_context for row in rows)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("llama", {"attn_implementation": "eager"}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": 64}),
        ("gemma2", {"sliding_window": 64, "query_pre_attn_scalar": 8}),
        ("phi3", {}),
        ("olmo2", {}),
        ("qwen3_moe", {"moe_intermediate_size": 16, **EXPERTS}),
    ],
)
def test_architectures_with_attention_alone_pack(kind, settings):
    model = made(kind, **settings)
    assert reader(model, 0, ROWS) is packed_logits
    for one, other in zip(packed._packed(model, ROWS, 3), alone(model, ROWS), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mamba", {"state_size": 4}),
        # Its positions are no argument: they are counted in the mask.
        ("bloom", {"n_layer": 2, "n_head": 2}),
        # Layers that convolve over neighbours, whatever the mask says.
        ("lfm2", {"layer_types": ("conv", "full_attention")}),
        (
            "qwen3_next",
            {"layer_types": ("linear_attention", "full_attention"), "num_experts": 4, "num_experts_per_tok": 2},
        ),
    ],
)
def test_other_architectures_are_padded(kind, settings):
    assert reader(made(kind, **settings), 0, ROWS) is counted_logits


def test_a_text_longer_than_a_sliding_window_is_padded():
    # Its mask is given, and says nothing of windows.
    assert reader(made("mistral", sliding_window=3), 0, ROWS) is counted_logits


def test_gradients_are_those_of_the_texts_alone():
    model = made("llama")
    found = []
    for read in (packed_logits, counted_logits):
        model.zero_grad()
        rows = [ScoredText([*range(3, 23), 30 + number], 20) for number in range(4)]
        sum(logits.log_softmax(-1)[0, number] for number, logits in enumerate(read(model, 0, rows))).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("number", "num_tokens"), [(1, 20), (4, 24)])
def test_what_texts_share_is_computed_once_where_that_saves_something(number, num_tokens):
    seen = []
    model = made("llama")
    rows = [ScoredText([*range(3, 23), 30 + number], 20) for number in range(number)]
    handle = model.model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    packed_logits(model, 0, rows)
    handle.remove()
    assert seen == [num_tokens if number == 1 else 19 + number]


def test_many_tokens_are_padded(monkeypatch):
    monkeypatch.setattr(packed, "MAX_TOKENS", 10)
    monkeypatch.setattr(packed, "_packed", None)
    rows = [ScoredText([*range(3, 23), 30 + number], 20) for number in range(4)]
    model = made("llama")
    for one, other in zip(packed_logits(model, 0, rows), counted_logits(model, 0, rows), strict=True):
        assert torch.equal(one, other)
