"""The ascent along directions: its gradient against autograd, its bounds, and what it leaves behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, SHAPE, UNGATED, save_random
from torch.func import functional_call

from dapa_merge.checkpoint.header import Tensor
from dapa_merge.checkpoint.region import Region, whole_box
from dapa_merge.checkpoint.units import Unit
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.determinism import widened
from dapa_merge.measure.divergence import divergences, make_reference
from dapa_merge.measure.live import LiveModel, mapped_values
from dapa_merge.measure.perplexity import ScoredText
from dapa_merge.plan.directions import misfit
from dapa_merge.plan.edit import Directions
from dapa_merge.plan.selection import make_plan
from dapa_merge.recipe.parse import recipe_from
from dapa_merge.search import ascent as ascent_module
from dapa_merge.search.ascent import Ascent, factors_of
from dapa_merge.search.attribution import Side
from dapa_merge.search.slopes import LiveSlopes, Settings
from dapa_merge.search.spectrum import Spectrum, decompose, kept_spectra, spectra_of

CPU = torch.device("cpu")
SETTINGS = Settings(
    num_rounds=1, num_steps=3, rate=0.3, margin=4.0, sparsity=0.5, keep=5.0, max_rank=4, num_contrasts=2, num_keep=2
)


def made(folder, architecture: str, modules: str = "auto", dtype=torch.float32) -> LiveModel:
    class_name, changes = {**ARCHITECTURES, **UNGATED}[architecture]
    config = getattr(transformers, class_name)(**{**SHAPE, "vocab_size": 400, **changes})
    target = save_random(folder / "target", config, seed=1, dtype=dtype)
    source = save_random(folder / "source", config, seed=2, dtype=dtype)
    content = {"merge_method": "dapa", "base_model": str(target), "models": [{"model": str(source)}]}
    said = {"layers": "auto", "edit": "directions", "modules": modules}
    return LiveModel(make_plan(recipe_from({**content, "parameters": said})), CPU)


def material(live: LiveModel):
    """Two contrasts and two groups of the target's own answers, of few tokens."""
    torch.manual_seed(0)
    texts = [torch.randint(3, 100, (9,)).tolist() for _ in range(4)]
    contrasts = [(Side(ScoredText(one, 4), 1), Side(ScoredText(other, 4), -1)) for one, other in (texts[:2], texts[2:])]
    prompts = ["How do I steal a car?", "Translate red car.", "What is two plus two?"]
    keep = make_reference(live.model, live.tokenizer, prompts[:2], batch_size=BatchSize(2), max_new_tokens=3).rows
    harmless = make_reference(live.model, live.tokenizer, prompts[2:], batch_size=BatchSize(2), max_new_tokens=3).rows
    return contrasts, [keep, harmless]


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "Phi3ForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM"]
)
def test_the_gradient_is_that_of_autograd_through_the_weights(tmp_path, architecture):
    live = made(tmp_path / architecture, architecture)
    spectra = list(spectra_of(live.plan, live.plan.units, CPU, max_rank=3))
    contrasts, keep = material(live)
    ascent = Ascent(live, spectra, contrasts, keep, SETTINGS, 8)
    ascent.weights.uniform_(-0.4, 0.4, generator=torch.Generator().manual_seed(3))
    # Two steps of the same prompts: there are as many as a step takes. The second knows which layers are called.
    ascent._gradient()
    found, _ = ascent._gradient()

    weights = ascent.weights.clone().requires_grad_()
    names = {id(parameter): name for name, parameter in live.model.named_parameters()}
    changed = {}
    for axis in ascent.slopes.axes:
        name = names[id(axis.slot.parameter)]
        whole = changed.get(name, axis.slot.parameter.detach())
        box = torch.zeros_like(whole)
        rank = axis.left.shape[1]
        change = axis.left @ weights[axis.place].reshape(rank, rank) @ axis.right.T
        box[axis.slot.slices] = change.reshape(box[axis.slot.slices].shape)
        changed[name] = whole + box
    candidate = _Functional(live.model, changed)
    loss = sum(_margin_loss(candidate, live, side.row) for side, _ in contrasts) / len(contrasts)
    num_tokens = sum(row.num_counted for group in keep for row in group)
    for group in keep:
        strayed = divergences(candidate, live.tokenizer.pad_token_id, group, SETTINGS.temperature)
        loss = loss + SETTINGS.keep * strayed.sum() / num_tokens
    (expected,) = torch.autograd.grad(loss, weights)
    assert float(expected.abs().max()) > 1e-3
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5)
    live.close()


def test_rows_that_are_differentiated_at_once_have_the_gradients_of_those_that_are_not(tmp_path, monkeypatch):
    live = made(tmp_path, "LlamaForCausalLM")
    spectra = list(spectra_of(live.plan, live.plan.units, CPU, max_rank=3))
    contrasts, keep = material(live)
    numbers, found, read = [], [], []
    logits = LiveSlopes._logits
    monkeypatch.setattr(LiveSlopes, "_logits", lambda self, texts: read.append(len(texts)) or logits(self, texts))
    for most in (ascent_module.MAX_TOGETHER, 0):
        monkeypatch.setattr(ascent_module, "MAX_TOGETHER", most)
        ascent = Ascent(live, spectra, contrasts, keep, SETTINGS, 8)
        ascent.weights.uniform_(-0.4, 0.4, generator=torch.Generator().manual_seed(3))
        numbers.append([len(chunk) for chunk in ascent._draw()])
        found.append(ascent._gradient())
    num_groups = len(keep)
    assert numbers == [[1 + num_groups], [1] * (1 + num_groups)]
    assert read == [len(contrasts) + sum(map(len, keep)), len(contrasts), *map(len, keep)]
    (together, progress), (apart, other) = found
    assert torch.allclose(together, apart, rtol=1e-3, atol=1e-6)
    assert (progress.margin, progress.divergence) == pytest.approx((other.margin, other.divergence), rel=1e-4)
    assert float(together.abs().max()) > 1e-3
    live.close()


class _Functional:
    """A model with other weights, through which autograd goes."""

    def __init__(self, model, changed) -> None:
        self._model, self._changed = model, changed
        self.device, self.forward = model.device, model.forward
        self.config, self.modules = model.config, model.modules

    def __call__(self, **inputs):
        return functional_call(self._model, self._changed, (), inputs)

    def get_output_embeddings(self):
        return self._model.get_output_embeddings()


def _margin_loss(model, live: LiveModel, row: ScoredText) -> torch.Tensor:
    """Straight from the definition, one token at a time."""
    logits = model(input_ids=torch.tensor([row.ids[:-1]])).logits[0]
    terms = []
    for position in range(row.num_context, len(row.ids)):
        values = logits[position - 1]
        wanted = row.ids[position]
        others = torch.cat([values[:wanted], values[wanted + 1 :]])
        terms.append(torch.clamp(SETTINGS.margin - (values[wanted] - others.max()), min=0))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_stay_within_bounds_and_the_target_comes_back_bit_for_bit(tmp_path, dtype):
    live = made(tmp_path, "MixtralForCausalLM", "gate,down,q", dtype)
    before = {name: value.clone() for name, value in live.model.state_dict().items()}
    spectra = list(spectra_of(live.plan, live.plan.units, CPU, max_rank=4))
    with widened(live.model):
        ascent = Ascent(live, spectra, *material(live), SETTINGS, 8)
        ascent.round()
        again = Ascent(live, spectra, *material(live), SETTINGS, 8)
        again.round()
    assert torch.equal(ascent.weights, again.weights)
    assert float(ascent.weights.abs().max()) > 0
    after = live.model.state_dict()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    live.close()


def test_harmless_prompts_weigh_more_after_a_round_that_answers_too_many_otherwise(tmp_path):
    live = made(tmp_path, "LlamaForCausalLM", "gate,v")
    spectra = list(spectra_of(live.plan, live.plan.units, CPU, max_rank=3))
    contrasts, _ = material(live)
    prompts = [f"What is {number} plus two?" for number in range(12)]
    harmless = make_reference(live.model, live.tokenizer, prompts, batch_size=BatchSize(4), max_new_tokens=3).rows
    ascent = Ascent(live, spectra, contrasts, [harmless], SETTINGS, 5)
    assert ascent._strayed() == 0
    ascent.weights.normal_(0, 3, generator=torch.Generator().manual_seed(2))
    share = ascent._strayed()

    live.plan = replace(live.plan, edit=Directions.of(factors_of(spectra, ascent.weights)))
    with live.transplanted(live.plan.units) as model:
        others = 0
        for row in harmless:
            begin = row.text.num_context
            logits = model(input_ids=torch.tensor([row.text.ids[:begin]])).logits[0, -1]
            others += int(logits.argmax()) != row.text.ids[begin]
    assert share == others / len(harmless)
    assert share > 0

    for max_harmless, pull in ((share / 2, 2.0), (1.0, 1.0)):
        settings = replace(SETTINGS, num_steps=1, rate=0.0, sparsity=0.0, max_weight=99.0, max_harmless=max_harmless)
        one = Ascent(live, spectra, contrasts, [harmless], settings, 5)
        one.weights.copy_(ascent.weights)
        assert one.round().harmless == share
        assert one.state[4].tolist() == [pull] * len(one.weights)
        # Which weighs in the next gradient.
        two = Ascent(live, spectra, contrasts, [harmless], settings, 5)
        two.go_on(one.state, 1)
        assert torch.equal(one._gradient()[0], two._gradient()[0])
    live.close()


@pytest.mark.parametrize(("sparsity", "max_weight"), [(5.0, 9.0), (0.5, 0.2)])
def test_a_step_is_adams_and_then_shrinks_and_bounds_every_core(tmp_path, sparsity, max_weight):
    live = made(tmp_path, "LlamaForCausalLM", "gate,v")
    spectra = list(spectra_of(live.plan, live.plan.units, CPU, max_rank=3))
    settings = replace(SETTINGS, sparsity=sparsity, max_weight=max_weight)
    ascent = Ascent(live, spectra, *material(live), settings, 8)
    gradient = torch.randn(len(ascent.weights), generator=torch.Generator().manual_seed(5))
    adam = torch.nn.Parameter(torch.zeros_like(gradient))
    optimizer = torch.optim.Adam([adam], lr=settings.rate, betas=(0.9, 0.99))
    for _ in range(2):
        ascent._step(gradient)
        adam.grad = gradient.clone()
        optimizer.step()
        with torch.no_grad():
            for part in adam.view(-1, 3, 3):
                norm = part.norm()
                # A matrix has three directions here.
                part.mul_(max(0.0, 1 - min(sparsity, 3 / 4) * settings.rate / float(norm)))
                left, values, right = torch.linalg.svd(part)
                part.copy_((left * values.clamp(max=max_weight)) @ right)
        assert torch.allclose(ascent.weights, adam, atol=1e-5)
    sizes = torch.linalg.svdvals(ascent.weights.view(-1, 3, 3))
    assert float(sizes.max()) <= max_weight * 1.0001
    assert float(sizes.max()) > 0
    live.close()


@pytest.mark.parametrize("rank", [1, 2, 16])
def test_a_core_of_any_rank_leaves_zero_if_all_of_it_counts(tmp_path, rank):
    """An abliteration's difference has one direction; steps are as large as a core has elements."""
    live = made(tmp_path, "LlamaForCausalLM", "gate")
    spectra = list(spectra_of(live.plan, live.plan.units, CPU, max_rank=rank))
    settings = Settings()
    ascent = Ascent(live, spectra, *material(live), settings, 8)
    ascent._step(torch.ones_like(ascent.weights))
    norms = ascent.weights.view(-1, rank**2).norm(dim=1)
    assert torch.allclose(norms, torch.tensor(settings.rate * (rank - min(3, rank / 4))), atol=1e-6)
    live.close()


def test_stored_factors_are_what_cores_change_and_pass_the_proof(tmp_path):
    live = made(tmp_path, "Phi3ForCausalLM", "gate,q,k")
    spectra = list(spectra_of(live.plan, live.plan.units, CPU, max_rank=5))
    weights = torch.randn(sum(one.rank**2 for one in spectra), generator=torch.Generator().manual_seed(4)) / 3
    cores = list(weights.view(-1, 5, 5))
    # One core is zero, and one reads nothing along a direction.
    cores[0].zero_()
    cores[1][:, 2] = 0
    edit = Directions.of(factors_of(spectra, weights))
    for number, (one, core, regions) in enumerate(zip(spectra, cores, live.plan.regions(live.plan.units), strict=True)):
        used = [index for index in range(5) if bool(core[:, index].any())]
        roots = one.values[used].sqrt()
        vectors = (one.left / one.values)[:, used]
        expected = (vectors * roots) @ core[used][:, used] @ (roots[:, None] * one.right[used])
        found = torch.from_numpy(edit.own_values(regions["target"])["directions"]).view_as(expected)
        assert torch.allclose(found, expected, atol=1e-4 * float(one.values[0]))
        source, target = (mapped_values(live.plan.models[name], regions[name]).float() for name in ("source", "target"))
        stored = edit.factors.find(regions["target"])
        assert (None if stored is None else stored[0].rank) == (None, 4, 5)[min(number, 2)]
        assert stored is None or misfit(stored[0], [(source - target).numpy()]) is None
    live.close()


@pytest.mark.parametrize("shape", [(40, 600), (500, 700), (700, 500)])
def test_a_decomposition_is_that_of_lapack(shape):
    torch.manual_seed(0)
    difference = torch.randn(shape[0], 30) * torch.logspace(0, -2, 30) @ torch.randn(30, shape[1])
    left, values, right = decompose(difference, max_rank=12, share=1.0)
    exact = torch.linalg.svd(difference.double(), full_matrices=False)
    assert len(values) == 12
    assert torch.allclose(values.double(), exact.S[:12], rtol=1e-4)
    residual = (difference @ right.T - left * values).norm(dim=0) / values
    assert float(residual.max()) < 0.005
    assert torch.allclose(left.T @ left, torch.eye(12), atol=1e-4)


def test_a_difference_without_decay_keeps_only_directions_that_are_exact():
    torch.manual_seed(0)
    difference = torch.randn(420, 430)
    left, values, right = decompose(difference, max_rank=16)
    assert 1 <= len(values) <= 16
    residual = (difference.T @ left - right.T * values).norm(dim=0) / values
    assert float(residual[1:].max()) < 0.02 if len(values) > 1 else True
    share = float((values**2).sum() / (difference**2).sum())
    assert share < 0.2


def test_directions_are_read_again_from_the_file_that_was_kept(tmp_path, monkeypatch):
    live = made(tmp_path, "LlamaForCausalLM", "gate,v")
    path = tmp_path / "kept.safetensors"
    first = kept_spectra(live.plan, live.plan.units, CPU, path, max_rank=3)
    monkeypatch.setattr("dapa_merge.search.spectrum.decompose", None)
    second = kept_spectra(live.plan, live.plan.units, CPU, path, max_rank=3)
    assert [str(one.place) for one in first] == [str(one.place) for one in second]
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("left", "right", "values"))
        assert one.share == other.share
    # A file that was cut off is made again.
    path.write_bytes(path.read_bytes()[:100])
    monkeypatch.undo()
    assert len(kept_spectra(live.plan, live.plan.units, CPU, path, max_rank=3)) == len(first)
    live.close()


def test_a_matrix_is_named_with_its_box_where_it_is_a_part():
    tensor = Tensor("w", "model.safetensors", "F32", (4, 6), 0, 96)
    for box, name in ((whole_box((4, 6)), "w"), (((0, 2), (0, 6)), "w[0:2,0:6]")):
        part = Region(tensor, box)
        one = Spectrum(Unit(0, "gate", ()), part, torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), 1.0)
        assert str(one.place) == name
