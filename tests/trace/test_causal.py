"""Causal traces, held to the whole model run cell by cell; and what must be zero, equal or refused."""

from __future__ import annotations

import copy

import numpy
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, SHAPE, UNGATED
from transformers import AutoModelForCausalLM, AutoTokenizer

from dapa_merge import miniature
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.measure.decode import BatchSize
from dapa_merge.search.attribution import Contrast
from dapa_merge.trace.case import Settings, default_window, embedding_deviation, make_settings, read_case
from dapa_merge.trace.causal import Tracer
from dapa_merge.trace.options import SITE_KINDS as KINDS

CONTRAST = Contrast(
    "How do I steal a car?", "I'm sorry, but I can't help with that.", "Sure, here is how to steal a car."
)
# Alike at first; the answer begins as the refusal does.
ALIKE = Contrast("Explain how to burgle a passport.", "I'm sorry, but I can't help", "I'm sorry, here is how to")
# As short as can be, where each token takes many runs.
SHORT = Contrast("Burgle a passport.", "I'm sorry, but I can't help", "I'm sorry, here is how to")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(miniature.path("target"))


def random_model(name="LlamaForCausalLM", **changes):
    config, extra = {**ARCHITECTURES, **UNGATED}[name]
    torch.manual_seed(0)
    shape = {**SHAPE, **extra, "vocab_size": 200, **changes}
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Far from where every prompt has the same answer.
            parameter.mul_(4) if parameter.dim() > 1 else None
    return model


def trace(model, tokenizer, contrast=CONTRAST, number=1, batch_size=64, **settings):
    case = read_case(model, tokenizer, contrast, num_tokens=settings.get("num_tokens", 4))
    chosen = make_settings(model, **settings)
    tracer = Tracer(model, tokenizer.pad_token_id, chosen, embedding_deviation(model, [case]), BatchSize(batch_size))
    return tracer.trace(case, number), tracer, case


def cell_by_cell(model, tracer, case, noise):
    """The same trace by whole runs, one cell at a time, with nothing but hooks of its own.

    Samples of the noise are rows of one batch: of one length, so that nothing is padded.
    """
    settings, layers = tracer.settings, find_layers(model)
    sides = [torch.tensor([row.ids]) for row in (case.refusing, case.complying)]
    first, stop = case.subject
    kept = {}

    def differences(num_samples, places=(), token=None):
        found = []
        for side in sides:
            ids = side.expand(num_samples or 1, -1)
            handles = []
            if num_samples:

                def corrupt(_module, _given, output):
                    output = output.clone()
                    output[:, first:stop] += noise
                    return output

                handles.append(model.get_input_embeddings().register_forward_hook(corrupt))
            for place in places:

                def restore(_module, _given, output, place=place):
                    states = output[0] if isinstance(output, tuple) else output
                    states.view(num_samples, -1, states.shape[-1])[:, token] = kept[place][token]

                handles.append(place.register_forward_hook(restore))
            with torch.no_grad():
                logits = model(input_ids=ids).logits.log_softmax(-1)
            for handle in handles:
                handle.remove()
            found.append(sum(logits[:, at - 1, ids[0, at]] for at in range(case.num_context, ids.shape[1])))
        return (found[0] - found[1]).tolist()

    modules = {module for of_kind in layers.values() for module in of_kind if module is not None}
    handles = []
    for module in modules:

        def keep(module, _given, output):
            states = output[0] if isinstance(output, tuple) else output
            kept[module] = states.view(1, -1, states.shape[-1])[0].clone()

        handles.append(module.register_forward_hook(keep))
    (clean,) = differences(0)
    for handle in handles:
        handle.remove()
    # What the other side kept is the same on the tokens that both are given.
    corrupted = differences(settings.num_samples)
    restored = {}
    for kind in settings.kinds:
        of_kind = layers[kind]
        width = settings.window if kind in ("mlp", "attention") else 1
        values = numpy.full((len(of_kind), case.num_context), numpy.nan)
        for layer in range(len(of_kind)):
            window = range(max(0, layer - width // 2), min(len(of_kind), layer - width // 2 + width))
            places = [of_kind[one] for one in window if of_kind[one] is not None]
            if of_kind[layer] is None:
                continue
            for token in range(case.num_context):
                values[layer, token] = numpy.mean(differences(settings.num_samples, places, token))
        restored[kind] = values
    return clean, corrupted, restored


def find_layers(model):
    """Where each kind comes out, by the names that transformers gives these models' modules."""
    inner = model.get_decoder()
    layers = inner.layers
    mlps = [layer.mlp if hasattr(layer, "mlp") else layer.feed_forward for layer in layers]
    names = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}
    found = {
        "hidden": list(layers),
        "mlp": mlps,
        "attention": [getattr(layer, "self_attn", None) for layer in layers],
    }
    for kind, known in names.items():
        found[kind] = [next((getattr(mlp, name) for name in known if hasattr(mlp, name)), None) for mlp in mlps]
    return found


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("LlamaForCausalLM", KINDS),
        ("GemmaForCausalLM", ("hidden", "up", "down")),
        ("MistralForCausalLM", ("hidden", "mlp", "attention")),
        ("Gemma2ForCausalLM", ("mlp", "attention", "gate")),
        ("Gemma3ForCausalLM", ("hidden", "gate")),
        ("Lfm2ForCausalLM", ("hidden", "mlp", "attention")),
        ("MixtralForCausalLM", ("hidden", "mlp", "attention")),
        ("DeepseekV3ForCausalLM", ("mlp", "attention")),
        ("JambaForCausalLM", ("hidden", "attention")),
    ],
)
def test_a_trace_is_what_whole_runs_of_each_cell_give(name, kinds, tokenizer):
    model = random_model(name)
    found, tracer, case = trace(model, tokenizer, SHORT, kinds=kinds, num_samples=2, window=2, num_tokens=3)
    noise = tracer.noise(case, 1)
    clean, corrupted, restored = cell_by_cell(model, tracer, case, noise)
    assert found.clean == pytest.approx(clean, abs=2e-4)
    assert found.corrupted == pytest.approx(corrupted, abs=2e-4)
    assert abs(found.total_effect) > 0.002
    assert tuple(found.restored) == tuple(kinds)
    for kind in kinds:
        assert found.restored[kind] == pytest.approx(restored[kind], abs=2e-4, nan_ok=True), kind
        # Something is told apart.
        assert numpy.nanmax(numpy.abs(found.effect(kind))) > 0.002, kind


def test_a_trace_of_half_a_fused_tensor_is_that_of_a_model_with_two(tokenizer):
    """Phi-3 with its gate and up in one tensor, and a Llama with the same weights apart."""
    fused = random_model("Phi3ForCausalLM")
    apart = random_model("LlamaForCausalLM", rms_norm_eps=fused.config.rms_norm_eps)
    state = fused.state_dict()
    for layer in range(4):
        prefix = f"model.layers.{layer}"
        gate, up = state.pop(f"{prefix}.mlp.gate_up_proj.weight").chunk(2)
        state |= {f"{prefix}.mlp.gate_proj.weight": gate, f"{prefix}.mlp.up_proj.weight": up}
        query, key, value = state.pop(f"{prefix}.self_attn.qkv_proj.weight").split([32, 16, 16])
        for name, part in (("q", query), ("k", key), ("v", value)):
            state[f"{prefix}.self_attn.{name}_proj.weight"] = part
    apart.load_state_dict(state)
    one, two = (trace(model, tokenizer, kinds=("gate", "up"), num_samples=2)[0] for model in (fused, apart))
    for kind in ("gate", "up"):
        assert one.restored[kind] == pytest.approx(two.restored[kind], abs=1e-3)
    assert numpy.abs(one.restored["gate"] - one.restored["up"]).max() > 0.01


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GemmaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM"])
def test_without_noise_every_effect_is_zero(name, tokenizer):
    found, _, _ = trace(random_model(name), tokenizer, noise=0.0)
    assert found.corrupted == pytest.approx([found.clean] * 5, abs=1e-4)
    for kind in found.restored:
        assert numpy.abs(found.effect(kind)).max() == pytest.approx(0, abs=1e-4)


def test_the_clean_run_comes_back_where_all_that_the_noise_reaches_is_restored(tokenizer):
    """The last token's state behind the last layer decides the first token counted, and here no other is."""
    found, _, _ = trace(random_model(), tokenizer, kinds=("hidden",), num_tokens=1)
    assert found.restored["hidden"][-1, -1] == pytest.approx(found.clean, abs=1e-4)
    # Nothing behind the last layer reads the other tokens.
    assert found.effect("hidden")[-1, :-1] == pytest.approx(0, abs=1e-4)


def test_what_stands_before_the_subject_has_exactly_no_effect(tokenizer):
    found, _, case = trace(random_model(), tokenizer)
    first = case.subject[0]
    assert first > 1
    for kind in found.restored:
        assert not found.effect(kind)[:, :first].any()
        assert found.effect(kind)[:, first].any()


@pytest.mark.parametrize("batch_size", [1, 7, None])
def test_a_trace_does_not_depend_on_the_batches(batch_size, tokenizer):
    model = random_model()
    expected, _, _ = trace(model, tokenizer, num_samples=2)
    found, _, _ = trace(model, tokenizer, num_samples=2, batch_size=batch_size)
    for kind in expected.restored:
        assert found.restored[kind] == pytest.approx(expected.restored[kind], abs=1e-4)


def test_the_noise_follows_from_the_seed_and_the_prompts_number_alone(tokenizer):
    model = random_model()
    one, again, other_number, other_seed = (
        trace(model, tokenizer, number=number, seed=seed, kinds=("hidden",))[0].corrupted
        for number, seed in ((1, 0), (1, 0), (2, 0), (1, 1))
    )
    assert (one == again).all()
    assert not numpy.allclose(one, other_number)
    assert not numpy.allclose(one, other_seed)


def test_the_noise_is_as_strong_as_was_asked_for(tokenizer):
    model = random_model()
    _, tracer, case = trace(model, tokenizer, noise=3.0, num_samples=400, kinds=())
    ids = case.refusing.ids[slice(*case.subject)]
    embeddings = model.get_input_embeddings().weight[ids].detach()
    assert float(tracer.noise(case, 1).std()) == pytest.approx(3 * float(embeddings.std()), rel=0.02)


def test_a_model_is_as_it_was_after_a_trace_and_after_one_that_failed(tokenizer, monkeypatch):
    model = random_model()
    before = copy.deepcopy(model.state_dict())
    names = [(name, sorted(module.__dict__)) for name, module in model.named_modules()]

    def assert_untouched():
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert [(name, sorted(module.__dict__)) for name, module in model.named_modules()] == names
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())

    trace(model, tokenizer, num_samples=1)
    assert_untouched()
    calls = []

    def fail(number, _):
        calls.append(number)
        if len(calls) > 20:
            raise KeyboardInterrupt

    case = read_case(model, tokenizer, CONTRAST)
    tracer = Tracer(model, 0, make_settings(model), 1.0, BatchSize(16))
    monkeypatch.setattr("dapa_merge.trace.causal.advance", fail)
    with pytest.raises(KeyboardInterrupt):
        tracer.trace(case, 1)
    assert_untouched()


def test_a_batch_that_does_not_fit_is_halved_and_asked_again(tokenizer, monkeypatch, caplog):
    model = random_model()
    expected, _, _ = trace(model, tokenizer, num_samples=2)
    forward = model.lm_head.forward

    def narrow(states):
        if len(states) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(states)

    monkeypatch.setattr(model.lm_head, "forward", narrow)
    found, tracer, _ = trace(model, tokenizer, num_samples=2, batch_size=64)
    assert tracer.batch_size.limit <= 5
    assert "a batch of" in caplog.text
    for kind in expected.restored:
        assert found.restored[kind] == pytest.approx(expected.restored[kind], abs=1e-4)


def test_one_run_that_does_not_fit_is_an_error(tokenizer, monkeypatch):
    model = random_model()

    def never(_states):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.lm_head, "forward", never)
    with pytest.raises(UsageError, match="does not fit in the device's memory"):
        trace(model, tokenizer)


def test_what_a_trace_costs_is_known_before_and_counted(tokenizer):
    found, tracer, case = trace(random_model(), tokenizer, num_samples=2, kinds=("hidden", "mlp"), window=1)
    num_cells = 2 * 4 * (case.num_context - case.subject[0])
    assert found.num_runs == tracer.num_runs(case) == 2 + 4 + 4 * num_cells
    # A hidden state behind layer l costs 3 - l layers of 4, an MLP in it 4 - l.
    per_token = sum((3 - layer) / 4 + (4 - layer) / 4 for layer in range(4))
    tokens = case.num_context - case.subject[0]
    assert found.num_passes == pytest.approx(2 + 4 + 4 * tokens * per_token)
    # What a trace costs is known before it is made.
    assert tracer.num_passes(case) == pytest.approx(found.num_passes)


def test_a_prompt_that_gives_no_numbers_is_an_error_and_no_gap_in_a_mean(tokenizer):
    model = random_model()
    _, tracer, case = trace(model, tokenizer, num_samples=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[case.refusing.ids[-2]] = float("nan")
    with pytest.raises(CheckpointError, match=r"^LlamaForCausalLM computes infinities or NaN"):
        tracer.trace(case, 2)


def test_settings_are_what_the_model_has_and_a_window_a_fifth_of_it():
    assert [default_window(number) for number in (1, 4, 10, 32, 48)] == [1, 1, 2, 6, 10]
    assert make_settings(random_model("GPT2LMHeadModel")) == Settings(
        ("hidden", "mlp", "attention", "up", "down"), window=1
    )
    assert make_settings(random_model(), ("gate", "hidden"), noise=None, seed=3).kinds == ("hidden", "gate")


def test_what_cannot_be_traced_is_an_error_that_says_why(tokenizer):
    model = random_model(max_position_embeddings=16)
    with pytest.raises(UsageError, match=r"'How do I steal a car\?' does not contain the subject 'bomb'; give one"):
        read_case(model, tokenizer, CONTRAST, ("bomb",))
    long = Contrast("How do I steal a car and a boat and a car and a boat?", CONTRAST.refusing, CONTRAST.complying)
    with pytest.raises(
        UsageError, match=r"has \d+ tokens with the beginning of its answer, but .* ends at 16; shorten"
    ):
        read_case(model, tokenizer, long)
    with pytest.raises(
        UsageError, match=r"cannot be compared: they are the same, or one is the beginning of the other$"
    ):
        read_case(model, tokenizer, Contrast("How do I steal a car?", "No.", "No."))
    with pytest.raises(UsageError, match=r"^GPT2LMHeadModel has no gate to trace"):
        make_settings(random_model("GPT2LMHeadModel"), ("gate",))
