"""Fast generation says what the model's own `generate` says, whatever is drafted and whoever leaves early."""

from __future__ import annotations

import functools
import math
import random
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, SHAPE, save_random
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.compare.blend import Blender, MergekitBlend
from dapa_merge.errors import UsageError
from dapa_merge.measure import decode, determinism
from dapa_merge.measure.decode import BatchSize, LookupCache
from dapa_merge.measure.determinism import is_deterministic
from dapa_merge.measure.generate import generate, prompt_ids
from dapa_merge.measure.live import LiveModel, load_model
from dapa_merge.measure.prompts.sets import load_prompts
from dapa_merge.measure.refusal.classify import Outcome
from dapa_merge.plan.plan import plan_transplant

WORDS = "how do i paint a boat slowly watch the house sell it to my neighbor what is two plus four".split()  # noqa: SIM905
SIZES = (1, 9, 2, 5, 12, 3, 1, 7, 4, 2)
PROMPTS = [" ".join(WORDS[start : start + size]) for start, size in enumerate(SIZES)]


def load(folder, architecture, **changes):
    class_name, own = ARCHITECTURES[architecture]
    # Room for every token of the tokenizer; in float32, where near-ties are rare.
    config = getattr(transformers, class_name)(**{**SHAPE, "vocab_size": 320, **own, **changes})
    save_random(folder / "model", config, seed=5, dtype=torch.float32)
    model, tokenizer = load_model(open_checkpoint(str(folder / "model")), torch.device("cpu"))
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # Large enough for words that differ; small models as they are initialized say one word for ever.
                parameter.copy_(0.4 * torch.randn_like(parameter))
    return model, tokenizer


@torch.inference_mode()
def plainly(model, tokenizer, prompts, max_new_tokens) -> list[str]:
    """transformers' own batched generation."""
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    output = model.generate(**batch, max_new_tokens=max_new_tokens)
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_says_what_its_own_generate_says_and_in_16_bits_what_it_says_without_drafts(
    architecture, tmp_path
):
    """Also where the text is longer than a sliding window, and with the drafts of a first round."""
    model, tokenizer = load(tmp_path, architecture)
    expected = plainly(model, tokenizer, PROMPTS, 20)
    assert len(set(expected)) > 2
    lookup = LookupCache()
    for size in (5, 10):
        said = generate(model, tokenizer, PROMPTS, max_new_tokens=20, batch_size=BatchSize(size), lookup=lookup)
        assert said == expected

    model.to(torch.bfloat16)
    ask = functools.partial(generate, model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=BatchSize(10))
    expected = ask()
    lookup = LookupCache()
    for _ in range(2):
        assert ask(lookup=lookup, deterministic=True) == expected


@given(st.randoms(use_true_random=False), st.integers(1, 20), st.integers(1, 10))
@settings(max_examples=10)
def test_no_draft_changes_what_is_said(llama, generator: random.Random, max_new_tokens, size):
    """Drafts that are right, wrong, right only at first, too long, or hold an end token in their midst."""
    model, tokenizer = llama
    expected = plainly(model, tokenizer, PROMPTS, max_new_tokens)
    lookup = LookupCache()
    for prompt, right in zip(PROMPTS, expected, strict=True):
        tokens = tokenizer(right, add_special_tokens=False)["input_ids"]
        for index in range(len(tokens)):
            if generator.random() < 0.15:
                tokens[index] = generator.choice([2, generator.randrange(150)])
        tokens += [generator.randrange(150) for _ in range(generator.randrange(30))]
        if generator.random() < 0.7:
            lookup.remember(prompt_ids(tokenizer, prompt), tokens)
    said = generate(model, tokenizer, PROMPTS, max_new_tokens=max_new_tokens, batch_size=BatchSize(size), lookup=lookup)
    assert said == expected


def test_a_second_time_takes_far_fewer_runs_through_the_model(llama, monkeypatch):
    model, tokenizer = llama
    runs = []
    forward = type(model).forward

    @functools.wraps(forward)
    def counted(self, input_ids, **options):
        runs.append(len(input_ids))
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(model), "forward", counted)
    lookup = LookupCache()
    first = generate(model, tokenizer, PROMPTS, max_new_tokens=24, batch_size=BatchSize(10), lookup=lookup)
    number = len(runs)
    again = generate(model, tokenizer, PROMPTS, max_new_tokens=24, batch_size=BatchSize(10), lookup=lookup)
    assert again == first
    assert (
        len(runs) - number <= math.ceil(len(PROMPTS) / 10) + 1
    )  # The beginning that all prompts share, and the batches.


def test_who_is_settled_leaves_and_nobody_else(llama):
    model, tokenizer = llama
    whole = plainly(model, tokenizer, PROMPTS, 24)
    leaving = set(PROMPTS[::2])

    def settle(beginning, prompt):
        return Outcome.COMPLIED if prompt in leaving and len(beginning) > 10 else None

    said = generate(model, tokenizer, PROMPTS, max_new_tokens=24, batch_size=BatchSize(4), settle=settle)
    for prompt, text, full in zip(PROMPTS, said, whole, strict=True):
        assert full.startswith(text)
        assert len(text) > 10
        if prompt not in leaving:
            assert text == full
    assert any(len(text) < len(full) for text, full in zip(said, whole, strict=True))


def test_every_prompt_is_counted_once_as_it_is_done(llama, monkeypatch):
    done = []
    monkeypatch.setattr("dapa_merge.measure.generate.advance", lambda amount, unit: done.append(amount))
    generate(*llama, PROMPTS, max_new_tokens=3, batch_size=BatchSize(4))
    assert sum(done) == len(PROMPTS)


def test_without_a_batch_size_one_is_found(llama):
    size = BatchSize(None)
    expected = plainly(*llama, PROMPTS, 8)
    assert generate(*llama, PROMPTS, max_new_tokens=8, batch_size=size) == expected
    assert size.limit == 32


def test_a_batch_is_doubled_while_that_pays_in_one_of_three_batches(monkeypatch):
    memory = SimpleNamespace(total=100, available=26, free=1)
    monkeypatch.setattr(decode.psutil, "virtual_memory", lambda: memory)
    size = BatchSize(None)

    def sizes(*seconds: float) -> list[int]:
        found = []
        for one in seconds:
            size.observe(size.size, one)
            found.append(size.size)
        return found

    # Twice as many in the same time; then a disturbed batch, and one that is not.
    assert sizes(1.0, 1.0, 9.0, 1.0) == [16, 32, 32, 64]
    # A batch that is not full says nothing.
    size.observe(63, 0.1)
    assert sizes(2.0, 2.0, 2.0) == [64, 64, 64]
    assert sizes(0.1) == [64]


def test_a_batch_is_not_doubled_where_memory_is_short_and_files_in_memory_do_not_count(monkeypatch):
    memory = SimpleNamespace(total=100, available=24, free=24)
    monkeypatch.setattr(decode.psutil, "virtual_memory", lambda: memory)
    size = BatchSize(None)
    size.observe(size.size, 1.0)
    assert size.size == decode.FIRST


def test_a_prompt_that_leaves_no_room_for_an_answer_is_named(llama):
    long = "paint " * 80
    with pytest.raises(UsageError, match=r"prompt 2 of 2 has \d+ tokens, but the model's context ends at 64"):
        generate(*llama, ["paint", long], max_new_tokens=3, batch_size=BatchSize(4))


def test_an_empty_prompt_without_a_template_is_named(llama):
    model, tokenizer = llama
    template = tokenizer.chat_template
    tokenizer.chat_template = None
    try:
        with pytest.raises(UsageError, match="prompt 1 of 2 is empty"):
            generate(model, tokenizer, ["", "paint"], max_new_tokens=3, batch_size=BatchSize(4))
    finally:
        tokenizer.chat_template = template


def test_a_model_that_emits_only_padding_says_nothing(llama):
    model, tokenizer = llama
    ends = model.generation_config.eos_token_id
    weight = model.lm_head.weight
    kept = weight.clone()
    try:
        with torch.no_grad():
            weight.zero_()
        # All logits are equal: the first token, which is the padding, is the greedy one.
        assert tokenizer.pad_token_id == 0
        assert generate(model, tokenizer, PROMPTS[:3], max_new_tokens=5, batch_size=BatchSize(4)) == ["", "", ""]
    finally:
        with torch.no_grad():
            weight.copy_(kept)
        model.generation_config.eos_token_id = ends


@pytest.fixture(scope="module")
def tied():
    """Half of each of the miniature's two models, in which some tokens tie to the last bit; and prompts."""
    target, source = (open_checkpoint(str(miniature.path(name))) for name in ("target", "source"))
    live = LiveModel(plan_transplant(target, source, ("mlp",)), torch.device("cpu"))
    with Blender(live, target, source, None).blended(MergekitBlend("linear", 0.5)) as (model, tokenizer):
        yield model, tokenizer, load_prompts("miniature").harmful


def test_in_16_bits_no_draft_and_no_batch_changes_what_is_said(tied):
    *both, prompts = tied
    ask = functools.partial(generate, *both, prompts, max_new_tokens=40)
    expected = ask(batch_size=BatchSize(64))
    lookup = LookupCache()
    for size in (64, 64, 7, 1):
        assert ask(batch_size=BatchSize(size), lookup=lookup) == expected
    assert both[0].config._attn_implementation == "sdpa"


def test_where_attention_rounds_otherwise_a_deterministic_figure_is_had_without_drafts(tied, monkeypatch):
    monkeypatch.setattr("dapa_merge.measure.determinism.MAX_TOKENS", 0)
    *both, prompts = tied
    ask = functools.partial(generate, *both, prompts, max_new_tokens=40, batch_size=BatchSize(64))
    expected = ask()
    lookup = LookupCache()
    assert ask(lookup=lookup, deterministic=True) == expected
    ask(lookup=lookup)
    # The drafts are there now, and otherwise this says nothing.
    assert ask(lookup=lookup) != expected
    assert ask(lookup=lookup, deterministic=True) == expected


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("shape", [(576, 1536), (896, 4864), (4096, 64)])
def test_whether_layers_round_alike_is_the_same_in_every_process_and_true_with_16_bit_arithmetic(shape, packs):
    found = set()
    for seed in range(12):
        # A process begins with a seed of its own.
        torch.manual_seed(seed)
        determinism._layer_repeats.cache_clear()
        found.add(determinism._layer_repeats(shape, torch.bfloat16, torch.get_num_threads(), packs))
    assert len(found) == 1
    # Without, it depends on the kernel of float32.
    assert found == {True} or (determinism.is_slow(torch.bfloat16) and not packs)


def test_a_token_alone_is_computed_as_among_others_and_a_layer_is_as_before_afterwards():
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(1536, 576).to(torch.bfloat16)
    states = torch.randn(2, 100, 1536, generator=generator).to(torch.bfloat16)
    with torch.no_grad(), determinism.batch_invariant(layer):
        if determinism.is_slow(layer.weight.dtype):
            pytest.skip("this processor has no 16-bit arithmetic")
        expected = layer(states)
        assert all(torch.equal(layer(states[:1, [at]]), expected[:1, [at]]) for at in range(100))
        assert torch.equal(layer(states[0, 0]), expected[0, 0])
    assert "forward" not in layer.__dict__


@pytest.mark.parametrize(("heads", "key_heads", "tokens", "columns"), [(4, 4, 3, 3), (6, 2, 1, 9), (9, 3, 5, 7)])
def test_attention_without_copies_of_keys_is_the_exact_one(heads, key_heads, tokens, columns):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, count, length, 8, generator=generator, dtype=torch.float64)
        for count, length in ((heads, tokens), (key_heads, columns), (key_heads, columns))
    )
    mask = torch.zeros(2, 1, tokens, columns, dtype=torch.float64)
    # The second text has a column less.
    mask[1, ..., 0] = torch.finfo(torch.bfloat16).min
    for one in (None, mask):
        found = determinism._grouped(query, key, value, one, 0.3)
        exact = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=one, scale=0.3, enable_gqa=True
        )
        assert torch.allclose(found, exact.transpose(1, 2), rtol=0, atol=1e-14)
    assert not torch.equal(*(determinism._grouped(query, key, value, one, 0.3) for one in (None, mask)))


def test_only_attention_that_does_what_llamas_does_is_replaced_by_ours():
    # The last caps the scores.
    modules = (modeling_llama, modeling_qwen2, modeling_gemma2)
    assert [determinism._is_plain(module.eager_attention_forward) for module in modules] == [True, True, False]


def test_only_what_rounds_alike_is_trusted(tied, tmp_path, monkeypatch):
    model = tied[0]
    assert is_deterministic(model, 100)
    assert not is_deterministic(model, 100_000)
    experts, _ = load(tmp_path, "MixtralForCausalLM")
    assert is_deterministic(experts, 100_000)
    assert not is_deterministic(experts.to(torch.bfloat16), 100)
    # Layers whose sums depend on how many tokens are beside one, as large ones on some processors.
    linear = torch.nn.Linear.forward
    monkeypatch.setattr(determinism, "can_pack", lambda _: False)
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, states: linear(self, states) + len(states))
    determinism._layer_repeats.cache_clear()
    assert not is_deterministic(model, 100)
    determinism._layer_repeats.cache_clear()
