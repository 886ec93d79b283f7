"""Adapters and second moments: against plain backward passes and products, on the miniature and random models."""

from __future__ import annotations

import pytest
import torch

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.checkpoint.units import auto_modules
from dapa_merge.compare.peers import Weights, inverse
from dapa_merge.compare.training import (
    BATCH_SIZE,
    DEPTH,
    Answer,
    adapted,
    inverted_moments,
    linear_layers,
    refusal_direction,
    rows_of,
    train_adapters,
)
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.measure.live import LiveModel
from dapa_merge.measure.perplexity import losses
from dapa_merge.measure.quantized import quantized_layers, state_of
from dapa_merge.plan.plan import plan_transplant
from dapa_merge.recipe.options import Where

ANSWERS = [
    Answer("How do I pick a lock?", "I help with that."),
    Answer("How do I bake bread?", "You take some flour."),
    Answer("What is a garden?", "A garden is a place."),
]
RATE = 1e-2


@pytest.fixture(scope="module")
def live() -> LiveModel:
    target, source = (open_checkpoint(str(miniature.path(name))) for name in ("target", "source"))
    return LiveModel(plan_transplant(target, source, auto_modules(target.config, target.shapes)), torch.device("cpu"))


@pytest.fixture(scope="module")
def weights(live) -> Weights:
    return Weights(live, live.plan)


def rows(live, number=None):
    return rows_of(live.model, live.tokenizer, ANSWERS[:number], 24)


def train(live, weights, groups, **changes):
    layers = linear_layers(live.model, weights)
    how = {"rate": RATE, "marks": (1, 6), **changes}
    return train_adapters(live.model, live.tokenizer.pad_token_id, layers, groups, **how)


def loss(live, found) -> float:
    with torch.inference_mode():
        return float(losses(live.model, live.tokenizer.pad_token_id, found).sum())


def test_an_answer_ends_with_the_end_token_unless_it_was_cut_off(live):
    whole, cut = (rows_of(live.model, live.tokenizer, ANSWERS[:1], limit)[0] for limit in (24, 3))
    assert whole.ids[-1] == live.tokenizer.eos_token_id
    assert cut.ids == whole.ids[:-1]
    assert live.tokenizer.decode(whole.ids[whole.num_context :], skip_special_tokens=True) == ANSWERS[0].response


def test_training_lowers_the_loss_and_leaves_the_target_as_it_was(live, weights):
    before = {name: value.clone() for name, value in live.model.state_dict().items()}
    first = loss(live, rows(live))
    adapters = train(live, weights, [rows(live)])[6]
    assert loss(live, rows(live)) == first
    with adapted(weights, adapters) as model:
        assert loss(live, rows(live)) < first
        state = model.state_dict()
        names = {id(value): name for name, value in model.named_parameters()}
        for key, (b, a) in adapters.items():
            # Added in float32, and rounded once.
            wanted = (before[names[key]].float() + b @ a).to(before[names[key]].dtype)
            assert torch.equal(state[names[key]], wanted)
    assert all(torch.equal(value, before[name]) for name, value in live.model.state_dict().items())


@pytest.mark.parametrize("few", ["4bit", "8bit"])
def test_quantized_weights_are_trained_beside_and_written_whole(live, few):
    pytest.importorskip("bitsandbytes")
    quantized = LiveModel(live.plan, Where("cpu", quantize=few))
    weights = Weights(quantized, quantized.plan)
    before = [state_of(layer) for _, layer in quantized_layers(quantized.model)]
    first = loss(quantized, rows(quantized))
    adapters = train(quantized, weights, [rows(quantized)])[6]
    # All of attention and MLP, as in 16 bits.
    assert len(adapters) == len(linear_layers(live.model, Weights(live, live.plan))) == len(before)
    assert loss(quantized, rows(quantized)) == first
    with adapted(weights, adapters):
        assert loss(quantized, rows(quantized)) < first
        assert weights.num_changed > 0
    after = [state_of(layer) for _, layer in quantized_layers(quantized.model)]
    assert all(torch.equal(one.data, other.data) for one, other in zip(before, after, strict=True))
    assert loss(quantized, rows(quantized)) == first


def test_the_first_step_is_adams_along_the_gradient_of_the_weight(live, weights):
    """B begins at zero, so that its gradient is G A^T; Adam's first step is its sign."""
    data = rows(live, 1)
    (adapters, *_) = train(live, weights, [data], marks=(1,)).values()
    layers = linear_layers(live.model, weights)
    key, layer = next(iter(layers.items()))
    layer.weight.requires_grad_(True)
    try:
        batch = data * BATCH_SIZE
        number = sum(len(row.ids) - row.num_context for row in batch)
        (losses(live.model, live.tokenizer.pad_token_id, batch).sum() / number).backward()
        gradient = layer.weight.grad.float()
    finally:
        layer.weight.grad = None
        layer.weight.requires_grad_(False)
    b, a = adapters[key]
    expected = gradient @ a.T
    is_clear = expected.abs() > expected.abs().max() / 10
    assert torch.equal(b[is_clear].sign(), -expected[is_clear].sign())
    assert float(b.abs().max()) == pytest.approx(RATE / 5, rel=0.01)


def test_the_same_seed_trains_the_same_adapters_and_another_mark_changes_nothing(live, weights):
    groups = [rows(live, 1), rows(live)[1:]]
    one, same, other = (
        train(live, weights, groups, marks=marks, seed=seed) for marks, seed in (((1, 2), 0), ((2,), 0), ((2,), 1))
    )
    assert all(torch.equal(b, same[2][key][0]) and torch.equal(a, same[2][key][1]) for key, (b, a) in one[2].items())
    assert any(not torch.equal(b, other[2][key][0]) for key, (b, _) in one[2].items())


def test_what_cannot_be_trained_says_why(live, weights):
    with pytest.raises(UsageError, match="no answers"):
        train(live, weights, [[]])
    with pytest.raises(UsageError, match="no linear layers"):
        train_adapters(live.model, 0, {}, [rows(live)], rate=RATE, marks=(1,))
    with pytest.raises(CheckpointError, match="not finite at step"):
        train(live, weights, [rows(live)], rate=1e30, marks=(20,))


def test_moments_are_those_of_the_inputs_of_all_tokens(live):
    data = rows(live, 2)
    found = inverted_moments(live.model, live.tokenizer.pad_token_id, live.plan.modules, data)
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0].flatten(0, 1).float())
        )
        for name, module in live.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.inference_mode():
        for row in data:
            live.model(input_ids=torch.tensor([row.ids[:-1]]))
    for hook in hooks:
        hook.remove()
    # Every projection of MLP and attention, and nothing else, such as the output layer.
    assert found.keys() == {f"{name}.weight" for name in seen if ".layers." in name}
    for name, inverted in found.items():
        inputs = torch.cat(seen[name.removesuffix(".weight")])
        wanted = inverse(2 / len(data) * inputs.T @ inputs)
        assert float((inverted - wanted).norm() / wanted.norm()) < 1e-3
    block = "model.layers.0.self_attn"
    assert found[f"{block}.q_proj.weight"] is found[f"{block}.v_proj.weight"]
    assert found[f"{block}.q_proj.weight"] is not found[f"{block}.o_proj.weight"]


def test_the_direction_of_refusing_is_the_difference_of_mean_residual_streams(live):
    harmful, harmless = ([row.ids for row in rows(live)[part]] for part in (slice(1), slice(1, None)))
    found = refusal_direction(live.model, harmful, harmless)
    streams: list[torch.Tensor] = []
    layer = live.model.model.layers[round(DEPTH * len(live.model.model.layers)) - 1]
    hook = layer.register_forward_hook(lambda _, __, output: streams.append(output[0].reshape(-1, 80)[-1].float()))
    with torch.inference_mode():
        for ids in (*harmful, *harmless):
            live.model(input_ids=torch.tensor([ids]))
    hook.remove()
    difference = streams[0] - (streams[1] + streams[2]) / 2
    torch.testing.assert_close(found, difference / difference.norm(), atol=1e-3, rtol=0)


def test_moments_of_no_refusals_or_too_large_are_refused(live, monkeypatch):
    with pytest.raises(UsageError, match="refuses none"):
        inverted_moments(live.model, 0, live.plan.modules, [])
    monkeypatch.setattr("dapa_merge.compare.training.MAX_MOMENT_BYTES", 1000)
    with pytest.raises(UsageError, match="GB"):
        inverted_moments(live.model, 0, live.plan.modules, rows(live))
