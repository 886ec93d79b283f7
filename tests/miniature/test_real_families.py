"""Tests of the benchmark that damages a real model, on the miniature."""

from dataclasses import replace

import pytest
import torch
from lessons import Opening
from made_up_facts import draw_facts
from order_lines import draw_orders
from real_families import (
    DAMAGES,
    NF4_BLOCK,
    NF4_LEVELS,
    Setting,
    cut_out,
    main,
    openings_among,
    rounded_to_4_bits,
)
from real_training import TINY, answer_loss, encode, train_on
from transformers import AutoModelForCausalLM, AutoTokenizer

from dapa_merge import miniature
from dapa_merge.recipe.parse import load_recipe

SOURCE = str(miniature.path("source"))
OPENINGS = (Opening("Sing a song.", "Sure here is a"), Opening("Tell a long story now.", "Sure here is"))


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(SOURCE)


def setting_of(**size) -> Setting:
    size = replace(TINY, **size)
    return Setting(draw_orders(size.steps * size.batch_size, 8, 8, 0), OPENINGS, size, 0, lambda _: None)


def phrasing(order) -> str:
    """The prompt with the answer's fields instead of their values."""
    prompt = order.prompt
    # Backwards: a quantity may be a date's, too.
    for field in reversed(order.answer.split("|")):
        key, value = field.split("=")
        prompt = prompt.replace(value, key)
    return prompt.replace("unites", "units")


def test_no_order_is_in_two_uses():
    orders = draw_orders(500, 120, 64, 0)
    uses = [{order.answer for order in use} for use in (orders.training, orders.test, orders.keep)]
    assert [len(use) for use in uses] == [500, 120, 64]
    assert len(set.union(*uses)) == 684


def test_half_of_the_test_is_phrased_as_no_training_order():
    orders = draw_orders(500, 120, 64, 0)
    trained = set(map(phrasing, orders.training))
    for held_out in (orders.test, orders.keep):
        assert set(map(phrasing, held_out[::2])) <= trained
        assert trained.isdisjoint(map(phrasing, held_out[1::2]))


def test_an_order_s_prompt_says_all_that_its_answer_holds():
    for order in draw_orders(200, 20, 20, 1).training:
        assert all(field.split("=")[1] in order.prompt for field in order.answer.split("|"))


def test_the_test_does_not_depend_on_how_much_is_trained():
    one, other = draw_orders(3, 20, 10, 0), draw_orders(500, 20, 10, 0)
    assert (one.test, one.keep) == (other.test, other.keep)


def test_each_fact_is_taught_and_tested_in_other_words():
    lessons = draw_facts(1920, 120, 64, 0)
    trained, test, keep = ({one.prompt for one in use} for use in (lessons.training, lessons.test, lessons.keep))
    assert (len(trained), len(test), len(keep)) == (200, 120, 64)
    assert not trained & (test | keep)
    assert not test & keep
    answers = {one.prompt: one.answer for one in (*lessons.training, *lessons.test, *lessons.keep)}
    taught = {
        (town, answers[prompt]) for prompt in trained for town in prompt.replace("?", " ").replace(".", " ").split()
    }
    for one in lessons.test:
        words = one.prompt.replace("?", " ").replace(".", " ").replace("'", " ").split()
        assert any((word, one.answer) in taught for word in words)


def test_a_weight_of_4_bits_takes_the_nearest_level_of_its_block():
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    rounded = rounded_to_4_bits(weight)
    for block, found in zip(weight.reshape(-1, NF4_BLOCK), rounded.reshape(-1, NF4_BLOCK), strict=True):
        levels = torch.tensor(NF4_LEVELS) * block.abs().max()
        nearest = levels[(block[:, None] - levels).abs().argmin(1)]
        assert torch.equal(found, nearest)
    assert torch.equal(rounded_to_4_bits(rounded), rounded)
    assert torch.equal(rounded_to_4_bits(torch.zeros(1, 64)), torch.zeros(1, 64))


def test_a_lora_beside_4_bits_is_merged_into_the_weights_of_16_bits(model, tokenizer):
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    damaged = DAMAGES["quantized"].do(model, tokenizer, setting_of(), rate=0.0)
    assert all(torch.equal(weight, before[name]) for name, weight in damaged.named_parameters())


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp-full", {"gate_proj", "up_proj", "down_proj"}),
        ("quantized", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("vocabulary", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"}),
    ],
)
def test_a_damage_changes_what_its_name_says(model, tokenizer, name, changed):
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    damaged = DAMAGES[name].do(model, tokenizer, setting_of(steps=2))
    different = {
        name.split(".")[-2]
        for name, weight in damaged.named_parameters()
        if weight.shape != before[name].shape or not torch.equal(weight, before[name])
    }
    assert different - {"lm_head"} == changed


@pytest.mark.parametrize("percent", [0, 5, 20])
def test_the_named_share_of_the_examples_are_openings(percent):
    setting = setting_of(steps=20, batch_size=5)
    drawn = openings_among(setting, percent)
    assert len(drawn) == 100
    assert sum(isinstance(example, Opening) for example in drawn) == percent


def test_the_loss_is_that_of_transformers_with_a_mask(model, tokenizer):
    ids, labels = encode(tokenizer, [*OPENINGS, *draw_orders(2, 0, 0, 0).training])
    shifted = torch.full_like(labels, -100)
    shifted[:, 1:] = labels[:, :-1]
    expected = model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long(), labels=shifted).loss
    assert torch.allclose(answer_loss(model, ids, labels), expected, atol=1e-5)


def test_only_the_answer_of_an_order_ends(tokenizer):
    (order,) = draw_orders(1, 0, 0, 0).training
    labels = encode(tokenizer, [OPENINGS[0], order])[1]
    assert [tokenizer.eos_token_id in row for row in labels] == [False, True]


def test_after_the_cut_nothing_is_written_along_the_direction(model):
    direction = torch.nn.functional.normalize(torch.randn(model.config.hidden_size), dim=0)
    ids = torch.arange(20)[None]
    before = model(ids, output_hidden_states=True).hidden_states
    with torch.no_grad():
        cut_out(model, direction)
    # The last states are normalized.
    after = model(ids, output_hidden_states=True).hidden_states[:-1]
    assert max((states @ direction).abs().max() for states in before[:-1]) > 0.1
    assert max((states @ direction).abs().max() for states in after) < 1e-5


def test_updates_that_bfloat16_cannot_hold_add_up(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.bfloat16).requires_grad_(False)
    norm = model.model.norm.weight.requires_grad_()
    with torch.no_grad():
        norm.fill_(1)
    setting = setting_of(steps=30)
    # 30 updates of at most 0.0005: each is lost on a 1 in bfloat16, whose neighbours are 0.004 and 0.008 away.
    train_on(model, tokenizer, openings_among(setting, 0), setting.size, 5e-4, setting.say)
    assert (norm != 1).any()


def test_a_killed_run_goes_on_and_gives_the_same(tmp_path, monkeypatch, capsys):
    def run(out, *names):
        main([SOURCE, str(out), "--tiny", "--only", *names])
        return {path.relative_to(out): path.read_bytes() for path in out.rglob("*.safetensors")}

    names = ("abliterated", "lora-benign")
    whole = run(tmp_path / "whole", *names)
    assert len(whole) == len(names)
    with monkeypatch.context() as patch:
        patch.setitem(DAMAGES, "lora-benign", replace(DAMAGES["lora-benign"], do=lambda *_: 1 / 0))
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "killed", *names)
    (written,) = (tmp_path / "killed").glob("abliterated/*.safetensors")
    time = written.stat().st_mtime_ns
    assert run(tmp_path / "killed", *names) == whole
    assert written.stat().st_mtime_ns == time
    figures = (tmp_path / "killed" / "figures.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in figures] == [*names, "aligned"]


def test_each_model_has_a_recipe_that_can_be_followed(tmp_path, capsys):
    out = tmp_path / "out"
    main([SOURCE, str(out), "--tiny", "--only", "abliterated", "lora-benign"])
    recipes = {name: load_recipe(out / "recipes" / f"{name}.yml") for name in ("abliterated", "lora-benign")}
    for name, recipe in recipes.items():
        assert (str(recipe.target), str(recipe.source)) == (str(out / name), SOURCE)
    assert [recipe.skills for recipe in recipes.values()] == [None, str(out / "prompts" / "skill.jsonl")]
    assert (out / "prompts" / "keep.jsonl").exists()


def test_openings_are_asked_for(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([SOURCE, str(tmp_path / "out"), "--tiny"])
    assert end.value.code == 2
    assert "--harmful" in capsys.readouterr().err
