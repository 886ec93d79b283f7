"""Peers' arithmetic against the formulas of their papers, in float64, and in resident targets that are restored."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, SHAPE, change_tensor, save_random, weights
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.checkpoint.units import auto_modules
from dapa_merge.compare.peers import DAMPING, Deltas, Weights, cosine, dropped, inverse, projected, safe_delta
from dapa_merge.errors import CheckpointError
from dapa_merge.measure.live import LiveModel, load_model
from dapa_merge.measure.quantized import quantized_layers, state_of
from dapa_merge.plan.plan import plan_transplant
from dapa_merge.recipe.options import Where

BF16, F32 = torch.bfloat16, torch.float32
GATE = "model.layers.0.mlp.gate_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
# Each with a setting that changes something.
SETTINGS = {"safe_lora": (0.5,), "safemerge": (0.5, 0.8), "resta": (0.3, 0.5), "safe_delta": (0.2,)}


def config_of(architecture: str, **changes):
    name, own = ARCHITECTURES[architecture]
    return getattr(transformers, name)(**{**SHAPE, "num_hidden_layers": 1, **own, **changes})


def bits(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def matrices(number: int, rows: int, columns: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(number)]


def moment_of(columns: int, seed: int = 0) -> torch.Tensor:
    (inputs,) = matrices(1, 3 * columns, columns, seed + 1)
    return inputs.T @ inputs


# The formulas.
def test_safe_lora_projects_by_the_papers_matrix():
    delta, safety = matrices(2, 7, 5)
    wanted = sum(
        torch.outer(safety[:, index], safety[:, index]) @ delta for index in range(5)
    ) / safety.square().sum().sqrt()  # fmt: skip
    torch.testing.assert_close(projected(delta, safety), wanted)
    # The direction is that of the exact projection where the singular values of the safety vector are equal.
    orthogonal = torch.linalg.qr(safety).Q
    exact = orthogonal @ torch.linalg.pinv(orthogonal) @ delta
    assert cosine(projected(delta, orthogonal), exact) == pytest.approx(1)


def test_a_cosine_is_one_without_a_delta_and_zero_without_a_safety_vector():
    delta, safety = matrices(2, 4, 3)
    zero = torch.zeros_like(delta)
    assert cosine(zero, projected(zero, safety)) == 1
    assert cosine(delta, projected(delta, zero)) == 0
    assert cosine(delta, 3 * delta) == pytest.approx(1)


@given(rate=st.floats(0, 0.9), seed=st.integers(0, 100))
def test_dare_drops_a_share_and_keeps_the_mean(rate, seed):
    delta = torch.ones(200, 50, dtype=torch.float64)
    found = dropped(delta, rate, torch.Generator().manual_seed(seed))
    assert set(found.unique().tolist()) <= {0.0, 1 / (1 - rate)}
    assert float((found == 0).double().mean()) == pytest.approx(rate, abs=0.03)
    assert torch.equal(found, dropped(delta, rate, torch.Generator().manual_seed(seed)))


def test_an_inverse_is_that_of_the_damped_moments_also_for_inputs_that_are_always_zero():
    moment = moment_of(5)
    moment[2], moment[:, 2] = 0, 0
    filled = moment.clone()
    filled[2, 2] = 1
    damped = filled + DAMPING * filled.diagonal().mean() * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(inverse(moment) @ damped, torch.eye(5, dtype=torch.float64), atol=1e-9, rtol=0)


@given(share=st.floats(0, 1), seed=st.integers(0, 20))
def test_safe_delta_keeps_greedily_and_compensates_optimally(share, seed):
    source, target = matrices(2, 4, 5, seed)
    inverted = inverse(moment_of(5, seed))
    found = safe_delta(source, target, inverted, share)
    # Element by element, as section 4 has it.
    delta, hessian = target - source, torch.linalg.inv(inverted)
    places = [(column, row) for column in range(5) for row in range(4)]
    elements = sorted(places, key=lambda one: (-inverted[one[0], one[0]], one[1]))
    cost = {(column, row): delta[row, column] ** 2 / (2 * inverted[column, column]) for column, row in elements}
    budget, spent, kept = share * sum(cost.values()), 0.0, torch.zeros(4, 5, dtype=torch.bool)
    for column, row in elements:
        spent += cost[column, row]
        if spent > budget + 1e-12:
            break
        kept[row, column] = True
    assert (kept ^ (found == target)).sum() <= 1
    for row in range(4):
        is_kept = found[row] == target[row]
        free = ~is_kept
        # The least loss of a row, given what is kept: a gradient of zero in all that is free.
        gradient = hessian @ (found[row] - source[row])
        torch.testing.assert_close(gradient[free], torch.zeros_like(gradient[free]), atol=1e-7, rtol=0)


def test_safe_delta_of_nothing_is_the_source_and_of_all_the_target():
    source, target = matrices(2, 4, 5)
    inverted = inverse(moment_of(5))
    assert torch.equal(safe_delta(source, target, inverted, 0.0), source)
    assert torch.equal(safe_delta(source, target, inverted, 1.0), target)
    assert torch.equal(safe_delta(source, source, inverted, 0.5), source)


# In a resident target.
def deltas_of(folders: list[Path], has_pretrained: bool = True, where: Where | None = None) -> tuple[Deltas, LiveModel]:
    target, source, *others = (open_checkpoint(str(folder)) for folder in folders)
    plan = plan_transplant(target, source, auto_modules(target.config, target.shapes))
    live = LiveModel(plan, where or Where("cpu"))
    weights = Weights(live, plan, others[0] if has_pretrained else None)
    sizes = {place.tensor: place.shape[1] for place in weights.layers if place.is_matrix}
    inverted = {name: inverse(moment_of(size).float()) for name, size in sizes.items()}
    return Deltas(weights, inverted, seed=3), live


def three(folder: Path, config=None, dtype=F32, others=None) -> list[Path]:
    """A target, a source and a pretrained model, not far from each other."""
    config = config or config_of("LlamaForCausalLM")
    return [
        save_random(folder / name, config if name == "target" else others or config, seed=seed, dtype=dtype)
        for seed, name in enumerate(("target", "source", "pretrained"))
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    return three(tmp_path_factory.mktemp("three"))


@pytest.fixture(scope="module")
def deltas(folders) -> tuple[Deltas, LiveModel]:
    return deltas_of(folders)


@pytest.mark.parametrize("method", SETTINGS)
def test_the_target_is_restored_bit_for_bit_also_after_an_error(method, deltas):
    found, live = deltas
    before = bits(live.model)
    with getattr(found, method)(*SETTINGS[method]):
        during = bits(live.model)
        num_changed = sum(int((during[name] != before[name]).sum()) for name in before)
        assert 0 < num_changed == found.weights.num_changed
    with pytest.raises(ZeroDivisionError), getattr(found, method)(*SETTINGS[method]):
        raise ZeroDivisionError
    assert all(torch.equal(value, before[name]) for name, value in bits(live.model).items())


def values(folders: list[Path]) -> list[dict[str, torch.Tensor]]:
    return [{name: value.double() for name, value in weights(folder).items()} for folder in folders]


def test_only_the_least_safe_matrices_are_projected(folders, deltas):
    found, live = deltas
    target, source, pretrained = values(folders)
    names = [name for name in target if ".layers." in name and target[name].dim() == 2]
    cosines = {
        name: cosine(delta := target[name] - source[name], projected(delta, source[name] - pretrained[name]))
        for name in names
    }
    chosen = set(sorted(names, key=cosines.__getitem__)[: (len(names) + 1) // 2])
    for method, setting in (("safe_lora", (0.5,)), ("safemerge", (0.5, 0.8))):
        with getattr(found, method)(*setting):
            state = bits(live.model)
        for name, value in state.items():
            delta = target[name] - source[name]
            wanted = target[name]
            if name in chosen and method == "safe_lora":
                wanted = source[name] + projected(delta, source[name] - pretrained[name])
            elif name in chosen:
                wanted = 0.8 * source[name] + 0.2 * target[name]
            torch.testing.assert_close(value.double(), wanted, atol=1e-6, rtol=1e-5)


def test_resta_adds_the_safety_vector_to_all_tensors(folders, deltas):
    found, live = deltas
    target, source, pretrained = values(folders)
    with found.resta(0.0, 0.5):
        for name, value in bits(live.model).items():
            wanted = target[name] + 0.5 * (source[name] - pretrained[name])
            torch.testing.assert_close(value.double(), wanted, atol=1e-6, rtol=1e-5)
    with found.resta(0.5, 0.0):
        kept = bits(live.model)[GATE].double() - source[GATE]
        delta = target[GATE] - source[GATE]
        is_kept = kept.abs() > 1e-7
        torch.testing.assert_close(kept[is_kept], 2 * delta[is_kept], atol=1e-6, rtol=1e-4)
        assert 0.3 < float(is_kept.double().mean()) < 0.7
    # Dropped elements differ from tensor to tensor, and not from run to run.
    with found.resta(0.5, 0.0):
        assert torch.equal(bits(live.model)[GATE].double() - source[GATE], kept)


def test_without_a_pretrained_model_resta_adds_what_an_abliteration_would_remove(folders):
    found, live = deltas_of(folders, has_pretrained=False)
    target, source, _ = values(folders)
    direction = torch.nn.functional.normalize(torch.arange(1.0, SHAPE["hidden_size"] + 1), dim=0)
    abliterating = Deltas(found.weights, direction=direction)
    with abliterating.resta(0.0, 0.5):
        for name, value in bits(live.model).items():
            wanted = target[name]
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                # What is left without the direction writes nothing along it.
                abliterated = source[name] - torch.outer(direction, direction).double() @ source[name]
                assert float((direction.double() @ abliterated).abs().max()) < 1e-6
                wanted = wanted + 0.5 * (source[name] - abliterated)
            torch.testing.assert_close(value.double(), wanted, atol=1e-6, rtol=1e-5)


def test_without_a_delta_or_a_safety_vector_nothing_breaks(tmp_path):
    folders = three(tmp_path)
    # The target is the source in one matrix, and the source the pretrained model in another.
    other = "model.layers.0.mlp.up_proj.weight"
    source = weights(folders[1])
    change_tensor(folders[0], GATE, lambda value: value.copy_(source[GATE]))
    change_tensor(folders[2], other, lambda value: value.copy_(source[other]))
    found, live = deltas_of(folders)
    assert found.cosines[next(place.name for place in found.matrices if place.tensor == GATE)] == 1
    assert found.cosines[next(place.name for place in found.matrices if place.tensor == other)] == 0
    for method, setting in SETTINGS.items():
        with getattr(found, method)(*setting):
            assert all(value.isfinite().all() for value in bits(live.model).values()), method
    with found.safe_lora(1.0):
        state = bits(live.model)
        assert torch.equal(state[GATE], source[GATE])
        # Projected on nothing, a delta is nothing.
        assert torch.equal(state[other], source[other])


def test_a_vocabulary_that_grew_stays_the_targets(tmp_path):
    folders = three(tmp_path, config_of("LlamaForCausalLM", vocab_size=160), others=config_of("LlamaForCausalLM"))
    found, live = deltas_of(folders)
    before = bits(live.model)
    for method, setting in SETTINGS.items():
        with getattr(found, method)(*setting):
            state = bits(live.model)
        assert torch.equal(state[EMBEDDING], before[EMBEDDING])
        assert not torch.equal(state[GATE], before[GATE]) or method in ("safe_lora", "safemerge")


@pytest.mark.parametrize("architecture", ["GemmaForCausalLM", "Phi3ForCausalLM"])
def test_tied_embeddings_and_fused_projections_are_rewritten_once_in_bfloat16(architecture, tmp_path):
    folders = three(tmp_path, config_of(architecture), BF16)
    found, live = deltas_of(folders)
    target, source, pretrained = values(folders)
    before = bits(live.model)
    with found.resta(0.0, 1.0):
        state = bits(live.model)
        for name, own in target.items():
            # Computed in float32, and rounded once.
            wanted = (own.float() - source[name].float()) + source[name].float()
            wanted = wanted + (source[name].float() - pretrained[name].float())
            torch.testing.assert_close(state[name], wanted.to(BF16), atol=0, rtol=2**-8)
    assert all(torch.equal(value, before[name]) for name, value in bits(live.model).items())


def test_experts_that_are_fused_in_memory_are_rewritten_one_by_one(tmp_path):
    folders = three(tmp_path, config_of("MixtralForCausalLM"), BF16)
    found, live = deltas_of(folders)
    before = bits(live.model)
    target, source, pretrained = values(folders)
    experts = [place for place in found.matrices if "experts" in place.tensor]
    assert len({id(place.parameter) for place in experts}) < len(experts)
    with found.resta(0.0, 1.0):
        for place in experts:
            name = place.regions["target"].tensor.name
            wanted = (target[name] + source[name] - pretrained[name]).to(BF16)
            torch.testing.assert_close(
                place.parameter[place.slices].reshape(wanted.shape), wanted, atol=2**-8, rtol=2**-7
            )
    assert all(torch.equal(value, before[name]) for name, value in bits(live.model).items())


def states(model) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {name: state_of(layer) for name, layer in quantized_layers(model)}
    return {name: (one.data.clone(), getattr(one.scales, "absmax", one.scales)) for name, one in found.items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(*pair) for name in one for pair in zip(one[name], other[name], strict=True)
    )


@pytest.mark.parametrize("few", ["4bit", "8bit"])
@pytest.mark.parametrize("method", SETTINGS)
def test_in_quantized_weights_a_method_is_its_result_loaded_in_as_many_bits(method, few, tmp_path):
    pytest.importorskip("bitsandbytes")
    folders, where = three(tmp_path, dtype=BF16), Where("cpu", quantize=few)
    exact, live = deltas_of(folders)
    with getattr(exact, method)(*SETTINGS[method]):
        shutil.copytree(folders[0], tmp_path / "written", ignore=shutil.ignore_patterns("model*"))
        save_file(bits(live.model), tmp_path / "written" / "model.safetensors", metadata={"format": "pt"})
        num_changed = exact.weights.num_changed
    loaded, _ = load_model(open_checkpoint(str(tmp_path / "written")), where)
    found, quantized = deltas_of(folders, where=where)
    before = states(quantized.model)
    with getattr(found, method)(*SETTINGS[method]) as model:
        assert found.weights.num_changed == num_changed
        assert same(states(model), states(loaded))
    with pytest.raises(ZeroDivisionError), getattr(found, method)(*SETTINGS[method]):
        raise ZeroDivisionError
    assert not same(before, states(loaded))
    assert same(states(quantized.model), before)


def test_a_pretrained_model_of_another_size_is_refused_by_name(tmp_path):
    folders = three(tmp_path)
    folders[2] = save_random(tmp_path / "deeper", config_of("LlamaForCausalLM", num_hidden_layers=2), seed=5)
    with pytest.raises(CheckpointError, match=r"pretrained.*deeper"):
        deltas_of(folders)
