"""Runs that begin in the middle of a model, held to whole runs; and that nothing of them stays on the model."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, SHAPE, UNGATED, tiny_llama
from transformers import AutoModelForCausalLM

from dapa_merge.errors import CheckpointError, UnsupportedArchitecture
from dapa_merge.trace.replay import Replay, find_sites

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


def random_model(name="LlamaForCausalLM"):
    config, extra = {**ARCHITECTURES, **UNGATED}[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, config)(**{**SHAPE, **extra})).eval()


@torch.inference_mode()
def run(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits.clone()


def everything_on(model):
    """What could be left on a model: hooks, stand-ins for methods, and changed values."""
    return [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), sorted(module.__dict__))
        for name, module in model.named_modules()
    ], {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_as_before(model, before):
    modules, tensors = everything_on(model)
    assert modules == before[0]
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", [*ARCHITECTURES, *UNGATED])
def test_a_run_that_enters_any_layer_with_its_states_ends_as_the_whole_run(name):
    model = random_model(name)
    before = everything_on(model)
    replay = Replay(model)
    with replay.recorded_states() as states:
        expected = run(model)
    assert len(states) == len(replay.layers) + 1 == 5
    for start in range(5):
        # Other tokens: what is before the layer must not matter.
        with replay.entered_at(start, states[start]):
            assert torch.allclose(run(model, IDS.flip(0)), expected, atol=1e-5), start
    assert_as_before(model, before)


@pytest.mark.parametrize("kind", ["hidden", "mlp", "attention", "gate", "up", "down"])
def test_outputs_that_are_read_and_put_back_everywhere_change_nothing_and_make_a_noisy_run_clean(kind):
    model = random_model()
    replay = Replay(model)
    sites = [site for of_layer in find_sites(model, kind) for site in of_layer]
    ids = IDS[:1]
    with replay.recorded_outputs(sites, 1, 5) as values:
        clean = run(model, ids)
    noise = torch.randn(1, 2, 32)

    def restored(kept, noisy=True):
        with ExitStack() as stack:
            stack.enter_context(replay.noisy_embeddings(noise if noisy else noise * 0, 1))
            for position in range(5):
                stack.enter_context(replay.replaced_outputs(kept, torch.tensor([position])))
            return run(model, ids)

    every = dict(zip(sites, values, strict=True))
    assert torch.equal(restored(every, noisy=False), clean)
    corrupted = restored({})
    assert not torch.allclose(corrupted, clean, atol=1e-3)
    if kind == "hidden":
        # A run with every module restored is the clean run.
        assert torch.allclose(restored(every), clean, atol=1e-6)
    else:
        # The noise itself stays in the residual stream.
        assert not torch.allclose(restored(every), corrupted, atol=1e-4)


def test_with_every_module_of_every_layer_restored_only_the_noise_itself_is_left():
    """Attention and MLP of all layers restored: the last states differ from the clean ones by the embeddings' noise."""
    model = random_model()
    replay = Replay(model)
    sites = [site for kind in ("attention", "mlp") for of_layer in find_sites(model, kind) for site in of_layer]
    ids = IDS[:1]
    with replay.recorded_outputs(sites, 1, 5) as values, replay.recorded_states() as clean:
        run(model, ids)
    noise = torch.randn(1, 2, 32)
    every = dict(zip(sites, values, strict=True))
    with ExitStack() as stack:
        stack.enter_context(replay.noisy_embeddings(noise, 1))
        for position in range(5):
            stack.enter_context(replay.replaced_outputs(every, torch.tensor([position])))
        restored = stack.enter_context(replay.recorded_states())
        run(model, ids)
    difference = restored[-1] - clean[-1]
    assert torch.allclose(difference[0, 1:3], noise[0], atol=1e-5)
    assert torch.allclose(difference[0, [0, 3, 4]], torch.zeros(3, 32), atol=1e-6)


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_nothing_stays_on_a_model_whose_run_fails(fault):
    model = random_model()
    replay = Replay(model)
    with replay.recorded_states() as states:
        run(model)
    # A stand-in that was there before, as accelerate's, is there again.
    model.model.layers[1].__dict__["forward"] = marker = model.model.layers[1].forward
    site = find_sites(model, "mlp")[2][0]

    def fail(*_arguments, **_named):
        raise fault

    handle = model.lm_head.register_forward_hook(fail)
    before = everything_on(model)
    with ExitStack() as stack:
        stack.enter_context(pytest.raises(fault))
        stack.enter_context(replay.entered_at(2, states[2]))
        stack.enter_context(replay.recorded_states())
        stack.enter_context(replay.noisy_embeddings(torch.zeros(2, 1, 32), 0))
        stack.enter_context(replay.replaced_outputs({site: torch.zeros(5, 32)}, torch.tensor([0, 1])))
        run(model)
    assert_as_before(model, before)
    assert model.model.layers[1].__dict__["forward"] is marker
    handle.remove()


def test_a_model_that_hands_on_more_than_states_is_refused():
    model = AutoModelForCausalLM.from_config(tiny_llama()).eval()
    replay = Replay(model)
    # A model that takes something else than the states from the layers before.
    kept = []
    model.model.layers[0].register_forward_hook(lambda _m, _g, output: kept.append(output.sum()))
    model.model.norm.register_forward_hook(lambda _m, _g, output: output * kept[-1])
    with replay.recorded_states() as states:
        expected = run(model)
    with pytest.raises(
        UnsupportedArchitecture, match=r"^LlamaForCausalLM passes more than one state per token from layer to layer"
    ):
        replay.check(lambda: run(model), states, expected)


def test_a_model_that_computes_no_numbers_is_named():
    model = random_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"^LlamaForCausalLM computes infinities or NaN; its"):
        Replay(model).check_numbers(run(model))


def test_states_that_are_not_one_for_each_token_are_refused():
    model = random_model()
    model.model.layers[0].register_forward_pre_hook(lambda _m, given: (given[0][None], *given[1:]))
    with Replay(model).recorded_states(), pytest.raises(UnsupportedArchitecture, match=r"cannot be traced yet$"):
        run(model)
