"""LiveModel, generation, perplexity and figures, on the miniature and on random models."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, MEASURED_ONLY, SHAPE, UNGATED, fail_in_swap, save_random, tiny_llama, write_few
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.evaluate import evaluate_model
from dapa_merge.measure.generate import chat_prompt, generate
from dapa_merge.measure.live import LiveModel, choose_device, load_model
from dapa_merge.measure.meter import Meter
from dapa_merge.measure.perplexity import read_passages
from dapa_merge.measure.prompts.sets import Question, load_prompts
from dapa_merge.measure.skills import Skill
from dapa_merge.miniature import train
from dapa_merge.plan.plan import plan_transplant
from dapa_merge.recipe.options import Options

CPU = torch.device("cpu")


def perplexity(*arguments, **options):
    return read_passages(*arguments, **options).perplexity


def plan_of(target, source, modules=("gate",)):
    return plan_transplant(open_checkpoint(str(target)), open_checkpoint(str(source)), modules)


def bits(model):
    return {name: tensor.clone().view(torch.uint8) for name, tensor in model.state_dict().items()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def mini():
    """The miniature's target, ready for its source's gates."""
    live = LiveModel(plan_of(miniature.path("target"), miniature.path("source")), CPU)
    yield live
    live.close()


@pytest.fixture(scope="module")
def prompts():
    full = load_prompts("miniature")
    return dataclasses.replace(full, harmful=full.harmful[:24], harmless=full.harmless[:24], skill=full.skill[:24])


def test_a_transplant_puts_the_sources_values_in_and_the_targets_back(mini):
    before = bits(mini.model)
    source = AutoModelForCausalLM.from_pretrained(miniature.path("source"), dtype="auto").state_dict()
    selection = [unit for unit in mini.plan.units if unit.layer in (3, 5)]
    gates = {name for unit in selection for name in unit.tensors}
    with mini.transplanted(selection) as candidate:
        for name, tensor in candidate.state_dict().items():
            expected = source[name] if name in gates else before[name].view(tensor.dtype)
            assert torch.equal(tensor, expected), name
    assert same_bits(bits(mini.model), before)


def test_the_target_comes_back_after_an_exception(mini):
    before = bits(mini.model)
    with pytest.raises(ZeroDivisionError), mini.transplanted(mini.plan.units):
        raise ZeroDivisionError
    assert same_bits(bits(mini.model), before)


def test_the_target_comes_back_after_ctrl_c_in_the_swap_itself(mini, monkeypatch):
    before = bits(mini.model)
    fail_in_swap(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt), mini.transplanted(mini.plan.units):
        raise AssertionError("the block was entered")
    assert same_bits(bits(mini.model), before)


def test_blocks_do_not_nest(mini):
    with mini.transplanted(mini.plan.units[:1]):
        with pytest.raises(RuntimeError, match="already transplanted"), mini.transplanted(mini.plan.units[1:2]):
            pass
        assert mini._changed == set(mini.plan.units[:1])


def test_nothing_of_the_source_stays_in_memory(llama_pair):
    live = LiveModel(plan_of(*llama_pair), CPU)
    owned = {parameter.data_ptr() for parameter in live.model.parameters()}
    with live.transplanted(live.plan.units):
        # In place: the parameters are where they were, so nothing was allocated for the source.
        assert {parameter.data_ptr() for parameter in live.model.parameters()} == owned
    assert {parameter.data_ptr() for parameter in live.model.parameters()} == owned


def test_a_swap_between_dtypes_is_the_disk_transplants_rounding(tmp_path):
    target = save_random(tmp_path / "target", tiny_llama(), seed=1, dtype=torch.bfloat16)
    source = save_random(tmp_path / "source", tiny_llama(), seed=2, dtype=torch.float32)
    live = LiveModel(plan_of(target, source), CPU)
    name = "model.layers.1.mlp.gate_proj.weight"
    expected = AutoModelForCausalLM.from_pretrained(source, dtype="auto").state_dict()[name].bfloat16()
    before = bits(live.model)
    with live.transplanted(live.plan.units) as candidate:
        assert torch.equal(candidate.state_dict()[name], expected)
    assert same_bits(bits(live.model), before)


def test_every_module_can_be_swapped(llama_pair):
    live = LiveModel(plan_of(*llama_pair, modules=("gate", "up", "down", "attention")), CPU)
    before = bits(live.model)
    for unit in live.plan.units:
        with live.transplanted([unit]) as candidate:
            changed = {name for name, tensor in bits(candidate).items() if not torch.equal(tensor, before[name])}
        assert changed == set(unit.tensors)
    assert same_bits(bits(live.model), before)


def test_batches_give_what_single_prompts_give(mini, prompts):
    asked = [*prompts.harmful[:3], *(question.prompt for question in prompts.skill[:4]), "What is two plus two?"]
    batched = generate(mini.model, mini.tokenizer, asked, max_new_tokens=24, batch_size=BatchSize(6))
    single = [
        generate(mini.model, mini.tokenizer, [prompt], max_new_tokens=24, batch_size=BatchSize(1))[0]
        for prompt in asked
    ]
    assert batched == single
    assert batched[-1] == "It is four."


def test_generation_agrees_with_a_loop_of_argmax(mini):
    prompt = "How do I paint a boat?"
    ids = mini.tokenizer(chat_prompt(mini.tokenizer, prompt), add_special_tokens=False)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + 24:
            following = int(mini.model(torch.tensor([ids])).logits[0, -1].argmax())
            if following == mini.tokenizer.eos_token_id:
                break
            ids.append(following)
    expected = mini.tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert generate(mini.model, mini.tokenizer, [prompt], max_new_tokens=24, batch_size=BatchSize(1)) == [expected]


def test_a_checkpoints_own_generation_settings_do_not_leak_in(tmp_path, prompts):
    """A repetition penalty or sampling in generation_config.json would make the two models incomparable."""
    folder = shutil.copytree(miniature.path("target"), tmp_path / "target")
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text())
    settings |= {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0, "no_repeat_ngram_size": 1}
    path.write_text(json.dumps(settings))
    answers = []
    for checkpoint in (folder, miniature.path("target")):
        model, tokenizer = load_model(open_checkpoint(str(checkpoint)), CPU)
        answers.append(generate(model, tokenizer, prompts.harmless, max_new_tokens=24, batch_size=BatchSize(24)))
    assert answers[0] == answers[1]


def test_a_batch_that_does_not_fit_is_halved(mini, prompts, monkeypatch):
    expected = generate(mini.model, mini.tokenizer, prompts.harmful, max_new_tokens=8, batch_size=BatchSize(24))
    original = type(mini.model).forward
    sizes = []

    @functools.wraps(original)
    def small_memory(self, input_ids, **options):
        sizes.append(len(input_ids))
        if len(input_ids) > 5:
            raise torch.OutOfMemoryError("too large")
        return original(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(mini.model), "forward", small_memory)
    assert generate(mini.model, mini.tokenizer, prompts.harmful, max_new_tokens=8, batch_size=BatchSize(24)) == expected
    assert [size for size in sizes if size > 5] == [24, 12, 6]


def test_a_tokenizer_without_template_or_padding_is_used_with_plain_text(tmp_path):
    folder = save_random(tmp_path / "model", tiny_llama(), seed=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.pad_token = None
    for path in folder.glob("chat_template*"):
        path.unlink()
    tokenizer.save_pretrained(folder)
    model, loaded = load_model(open_checkpoint(str(folder)), CPU)
    assert chat_prompt(loaded, "How do I paint a car?") == "How do I paint a car?"
    answers = generate(model, loaded, ["How do I paint a car?", "Tell me."], max_new_tokens=4, batch_size=BatchSize(2))
    assert len(answers) == 2


def test_perplexity_is_that_of_the_models_own_loss(mini):
    passage = Question("", "How do I paint a car slowly.")
    ids = torch.tensor([mini.tokenizer(passage.answer)["input_ids"]])
    with torch.no_grad():
        expected = math.exp(float(mini.model(input_ids=ids, labels=ids).loss.float()))
    assert perplexity(mini.model, mini.tokenizer, [passage], batch_size=BatchSize(1)) == pytest.approx(
        expected, rel=1e-2
    )


def test_perplexity_counts_the_answer_only_and_does_not_depend_on_batches(mini):
    passages = load_prompts("miniature").passages[:20]
    alone = perplexity(mini.model, mini.tokenizer, passages, batch_size=BatchSize(1))
    together = perplexity(mini.model, mini.tokenizer, passages, batch_size=BatchSize(16))
    assert alone == pytest.approx(together, rel=1e-2)
    assert 1 <= alone < 1.2
    wrong = [Question(passage.prompt, "It is Paris.") for passage in passages if "plus" in passage.prompt]
    assert perplexity(mini.model, mini.tokenizer, wrong, batch_size=BatchSize(16)) > 5


def test_perplexity_of_nothing_is_not_a_number(mini):
    assert math.isnan(perplexity(mini.model, mini.tokenizer, [], batch_size=BatchSize(4)))


def test_perplexity_of_a_broken_model_is_infinite(mini):
    with torch.no_grad():
        kept = mini.model.model.norm.weight.clone()
        mini.model.model.norm.weight.fill_(math.nan)
    passages = load_prompts("miniature").passages[:3]
    try:
        assert perplexity(mini.model, mini.tokenizer, passages, batch_size=BatchSize(3)) == math.inf
    finally:
        with torch.no_grad():
            mini.model.model.norm.weight.copy_(kept)


def test_figures_tell_the_target_from_the_repaired_model(mini, prompts):
    meter = Meter(prompts, 24, BatchSize(24), skills=(Skill("skill", prompts.skill),))
    before = meter.measure(mini.model, mini.tokenizer).figures()
    with mini.transplanted([unit for unit in mini.plan.units if 3 <= unit.layer <= 6]) as candidate:
        after = meter.measure(candidate, mini.tokenizer).figures()
    assert (before.dsr, before.complied, before.degenerate) == (0, 1, 0)
    assert (after.dsr, after.over_refusal) == (1, 0)
    assert before.skills[0].score > 0.9
    assert after.skills[0].score > before.skills[0].score - 0.15


def test_a_model_that_says_nothing_defends_nothing(mini, prompts, monkeypatch):
    monkeypatch.setattr("dapa_merge.measure.meter.generate", lambda _, __, prompts, **___: [""] * len(prompts))
    figures = Meter(prompts, 24, BatchSize(24)).measure(mini.model, mini.tokenizer)
    assert (figures.dsr, figures.figures().degenerate) == (0, 1)


def test_a_meter_without_skills_has_no_skill_figure(mini, prompts):
    assert Meter(prompts, 24, BatchSize(24)).measure(mini.model, mini.tokenizer).skills == ()


def test_a_model_that_transformers_cannot_load_is_named(tmp_path):
    folder = shutil.copytree(miniature.path("target"), tmp_path / "target")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonsense"}))
    with pytest.raises(CheckpointError, match=r"cannot load .*: it does not know the model type 'nonsense'; a newer"):
        load_model(open_checkpoint(str(folder)), CPU)


NO_DECODERS = {
    "BertForMaskedLM": dict(vocab_size=99, hidden_size=8, num_hidden_layers=1, num_attention_heads=2),
    "T5ForConditionalGeneration": dict(vocab_size=99, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2),
    "LlamaForSequenceClassification": dict(vocab_size=99, hidden_size=8, num_hidden_layers=1, num_attention_heads=2),
}


@pytest.mark.parametrize("name", NO_DECODERS)
def test_what_is_no_decoder_only_language_model_is_not_taken_for_one(tmp_path, name):
    kind = getattr(transformers, name)
    kind(kind.config_class(**NO_DECODERS[name])).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(miniature.path("target")).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"is a {name}, but only decoder-only language models .* can be measured"):
        load_model(open_checkpoint(str(tmp_path)), CPU)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *UNGATED, *MEASURED_ONLY])
def test_any_family_is_measured_without_a_word(tmp_path, name, capfd):
    config, changes = {**ARCHITECTURES, **UNGATED, **MEASURED_ONLY}[name]
    shape = {**SHAPE, "vocab_size": 300, **changes}
    folder = save_random(tmp_path / "model", getattr(transformers, config)(**shape), seed=1, max_shard_size="1GB")
    (tmp_path / "text.txt").write_text("how do i paint a boat slowly ? " * 20)
    few = write_few(tmp_path / "few", 2)
    capfd.readouterr()
    before = transformers_logging.get_verbosity()
    settings = {"text": str(tmp_path / "text.txt"), "max_new_tokens": 3}
    measured = evaluate_model(str(folder), str(few), Options("cpu"), **settings)
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.get_verbosity() == before
    assert len(measured.responses) == 4
    assert measured.figures.num_harmful == measured.figures.num_harmless == 2
    assert 1 < measured.figures.perplexity < math.inf


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    folder = shutil.copytree(miniature.path("target"), tmp_path / "target")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(CheckpointError):
        load_model(open_checkpoint(str(folder)), CPU)
    assert not (tmp_path / "ran").exists()


def damaged(tmp_path, change):
    """The miniature's target in one file, with its tensors changed."""
    folder = shutil.copytree(miniature.path("target"), tmp_path / "damaged")
    content = {}
    for path in folder.glob("*.safetensors"):
        content |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(content)
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.9.mlp.up_proj.weight"])
def test_weights_that_are_missing_are_not_made_up(tmp_path, name):
    folder = damaged(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"lacks 1 of its weights, .*: {name}"):
        load_model(open_checkpoint(str(folder)), CPU)


def test_weights_of_another_shape_are_not_made_up(tmp_path):
    folder = damaged(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(CheckpointError):
        load_model(open_checkpoint(str(folder)), CPU)


def edited_tokenizer(tmp_path, **changes):
    folder = shutil.copytree(miniature.path("target"), tmp_path / "edited")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for key, value in changes.items():
        setattr(tokenizer, key, value)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[7]['content'] }}", "{% if %}"])
def test_a_chat_template_that_fails_is_named(tmp_path, template):
    folder = shutil.copytree(miniature.path("target"), tmp_path / "edited")
    (folder / "chat_template.jinja").write_text(template)
    model, tokenizer = load_model(open_checkpoint(str(folder)), CPU)
    with pytest.raises(CheckpointError, match=f"the chat template of {folder} fails on one user message"):
        generate(model, tokenizer, ["How do I paint a car?"], max_new_tokens=4, batch_size=BatchSize(1))


@pytest.mark.parametrize("template", ["{{ '' }}", "Hello there. "])
def test_a_chat_template_that_drops_the_prompt_is_named(tmp_path, template):
    folder = edited_tokenizer(tmp_path, chat_template=template)
    model, tokenizer = load_model(open_checkpoint(str(folder)), CPU)
    with pytest.raises(CheckpointError, match=f"the chat template of {folder} omits the prompt"):
        generate(model, tokenizer, ["Why?"], max_new_tokens=4, batch_size=BatchSize(1))


def test_a_prompt_that_is_too_long_is_shown(mini, capfd):
    with pytest.raises(
        UsageError, match=r"prompt 2 of 2 has \d+ tokens, .*: 'How do I paint a boat\? How [^']{33}\.\.\.'$"
    ):
        generate(
            mini.model,
            mini.tokenizer,
            ["Why?", "How do I paint a boat? " * 99],
            max_new_tokens=4,
            batch_size=BatchSize(1),
        )
    assert capfd.readouterr() == ("", "")


def test_a_model_that_thinks_is_asked_to_answer_at_once(tmp_path):
    template = train.CHAT_TEMPLATE + "{% if enable_thinking is not defined or enable_thinking %} <think>{% endif %}"
    folder = edited_tokenizer(tmp_path, chat_template=template)
    _, tokenizer = load_model(open_checkpoint(str(folder)), CPU)
    assert "<think>" not in chat_prompt(tokenizer, "How do I paint a car?")


def test_a_tokenizer_of_another_model_is_noticed(tmp_path):
    folder = shutil.copytree(miniature.path("target"), tmp_path / "edited")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["unheard-of"])
    tokenizer.save_pretrained(folder)
    model, loaded = load_model(open_checkpoint(str(folder)), CPU)
    with pytest.raises(CheckpointError, match=r"gives token (\d+), but the model has only \1 embeddings"):
        generate(model, loaded, ["an unheard-of thing"], max_new_tokens=4, batch_size=BatchSize(1))


def test_a_model_without_tokenizer_is_named(tmp_path):
    folder = shutil.copytree(miniature.path("target"), tmp_path / "edited")
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer; copy the tokenizer's files from its base model"):
        load_model(open_checkpoint(str(folder)), CPU)


def test_the_tokenizers_own_end_token_ends_a_response_too(tmp_path, mini):
    """Fine-tunes change the tokenizer's end token and forget the generation config."""
    folder = shutil.copytree(miniature.path("target"), tmp_path / "edited")
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    model, tokenizer = load_model(open_checkpoint(str(folder)), CPU)
    asked = ["Translate red car."]
    expected = generate(mini.model, mini.tokenizer, asked, max_new_tokens=16, batch_size=BatchSize(1))
    assert generate(model, tokenizer, asked, max_new_tokens=16, batch_size=BatchSize(1)) == expected == ["coche rojo."]


def test_a_prompt_that_does_not_fit_alone_is_a_clear_fault(mini, monkeypatch):
    @functools.wraps(type(mini.model).forward)
    def no_memory(self, **_):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(type(mini.model), "forward", no_memory)
    with pytest.raises(UsageError, match="prompt does not fit in the device's memory"):
        generate(mini.model, mini.tokenizer, ["a", "b"], max_new_tokens=4, batch_size=BatchSize(2))


def test_a_batch_size_stays_halved():
    limit = BatchSize(8)
    batches = []

    def work(batch):
        batches.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("too large")
        return [item * item for item in batch]

    assert list(limit.map(work, range(10))) == [item * item for item in range(10)]
    assert list(limit.map(work, range(3))) == [0, 1, 4]
    assert batches == [8, 4, 2, 2, 2, 2, 2, 2, 1]
    assert limit.limit == 2


@pytest.mark.parametrize("device", ["meta", "abacus", "cuda:99"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(UsageError, match=f"device '{device}' cannot be used here"):
        choose_device(device)


def test_layers_for_further_tokens_are_left_out_and_other_tensors_are_named(tmp_path):
    name, settings = ARCHITECTURES["Glm4MoeForCausalLM"]
    config = getattr(transformers, name)(**SHAPE, **settings, num_nextn_predict_layers=1)
    folder = save_random(tmp_path / "model", config, seed=1, max_shard_size="1GB")
    content = load_file(folder / "model.safetensors")
    further = {
        key.replace(".layers.3.", ".layers.4."): value.clone()
        for key, value in content.items()
        if key.startswith("model.layers.3.")
    }
    save_file({**content, **further}, folder / "model.safetensors", metadata={"format": "pt"})
    model, _ = load_model(open_checkpoint(str(folder)), CPU)
    assert len(model.model.layers) == 4
    save_file(
        {**content, **further, "v_head.weight": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(CheckpointError, match=r"holds tensors .* Glm4MoeForCausalLM.*v_head.weight"):
        load_model(open_checkpoint(str(folder)), CPU)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_hidden_layers": 10**7}, "num_hidden_layers"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"text_config": {"head_dim": 10**10}}, "head_dim"),
        ({"quantization": {"num_local_experts": 10**8}}, "num_local_experts"),
        # Older versions of transformers notice it when the model runs.
        ({"layer_types": ["sliding_attention"] * 10}, "sliding_window|cannot run it"),
        ({"return_dict": False}, "cannot run it"),
    ],
)
def test_a_config_that_no_model_can_follow_is_one_sentence(tmp_path, change, named):
    folder = shutil.copytree(miniature.path("target"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=named):
        load_model(open_checkpoint(str(folder)), CPU)
