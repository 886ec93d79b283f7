"""Conversations: what is said is what `generate` says, as it comes, and a result speaks out of its target."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from conftest import change_tensor, weights
from hypothesis import given
from hypothesis import strategies as st
from measure.test_thoughts import chain_model

from dapa_merge import miniature
from dapa_merge.checkpoint.location import Location, parse_location
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.measure import chat
from dapa_merge.measure.chat import Manner, speakers
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.generate import generate
from dapa_merge.measure.live import load_model
from dapa_merge.measure.prompts.conversation import Message
from dapa_merge.measure.prompts.sets import load_prompts
from dapa_merge.measure.refusal.classify import partial_answers, thought_parts
from dapa_merge.recipe.options import Where

CPU = torch.device("cpu")
PROMPTS = load_prompts("miniature").harmful[:4]
TARGET = str(miniature.path("target"))


@pytest.fixture(scope="module")
def mini():
    return load_model(open_checkpoint(TARGET), CPU)


def nothing(*_: object) -> None:
    pass


def said(location: str, prompt: str, **how: object) -> dict[str, str]:
    """What each speaker says to one message."""
    with speakers(parse_location(location), Where("cpu"), **how) as loaded:
        return {one.name: one.ask(prompt, "", Manner(40), nothing) for one in loaded}


def alone(folder: Path | str, prompt: str) -> str:
    model, tokenizer = load_model(open_checkpoint(str(folder)), CPU)
    (answer,) = generate(model, tokenizer, [prompt], max_new_tokens=40, batch_size=BatchSize(1))
    return answer


@pytest.fixture
def copied(demo, tmp_path) -> Path:
    """A copy of the demonstration's result, to be changed."""
    return Path(shutil.copytree(demo[0], tmp_path / "out"))


@pytest.fixture
def one_memory(monkeypatch):
    """A device that two models do not fit on."""
    monkeypatch.setattr(chat, "free_on", lambda _: 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_answer_is_what_the_measurements_hear(mini, dtype):
    model, tokenizer = load_model(open_checkpoint(TARGET), CPU)
    model.to(dtype)
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=30, batch_size=BatchSize(4))
    for prompt, answer in zip(PROMPTS, expected, strict=True):
        pieces: list[str] = []
        speaker = chat.Speaker("model", tokenizer, lambda: chat.nullcontext(model))
        assert speaker.ask(prompt, "", Manner(30), lambda piece, _, told=pieces: told.append(piece)) == answer
        assert "".join(pieces) == answer
        # As it came.
        assert len(pieces) > 3
        assert speaker.turns == [("user", prompt), ("assistant", answer)]


def test_a_conversation_is_shown_to_the_model_as_transformers_shows_it(mini):
    _, tokenizer = mini
    turns = [Message(*turn) for turn in (("system", "s"), ("user", "How?"), ("assistant", "So."), ("user", "And why?"))]
    messages = [{"role": role, "content": text} for role, text in turns]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat._formatted(tokenizer, turns) == expected


def test_without_a_template_the_turns_are_lines(mini, caplog):
    tokenizer = load_model(open_checkpoint(TARGET), CPU)[1]
    tokenizer.chat_template = None
    turns = [Message(*turn) for turn in (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"))]
    assert chat._formatted(tokenizer, turns) == "a\nb\nc"


def test_a_result_speaks_out_of_its_target_as_it_does_alone_in_the_memory_of_one_model(
    demo, one_memory, monkeypatch, caplog
):
    out, _ = demo
    # Whoever loads both models would need this.
    monkeypatch.setattr(chat, "load_model", None)
    with caplog.at_level(logging.INFO, "dapa_merge"):
        for prompt in PROMPTS[:2]:
            found = said(str(out), prompt, with_target=True)
            assert found == {"before": alone(TARGET, prompt), "after": alone(out, prompt)}
            assert found["before"] != found["after"]
    assert "both loaded" not in caplog.text
    assert "target and result take turns in the memory of one model" in caplog.text


def test_where_both_fit_neither_waits_for_the_other(demo, monkeypatch, caplog):
    out, _ = demo
    monkeypatch.setattr(chat, "LiveModel", None)
    model = open_checkpoint(str(out))
    # Weights, and copies of them in float32.
    needed = 2 * (sum(tensor.num_bytes for tensor in model.tensors.values()) + 4 * model.num_parameters)
    monkeypatch.setattr(chat, "free_on", lambda _: needed / chat.SHARE + 1)
    with caplog.at_level(logging.INFO, "dapa_merge"):
        found = said(str(out), PROMPTS[0], with_target=True)
    assert found == {"before": alone(TARGET, PROMPTS[0]), "after": alone(out, PROMPTS[0])}
    assert "turns" not in caplog.text
    monkeypatch.setattr(chat, "free_on", lambda _: needed / chat.SHARE - 1)
    assert not chat._both_fit(model, Where("cpu"))
    assert not chat._both_fit(model, Where("cpu", max_memory=(("cpu", 1 << 40),)))


def test_a_result_of_directions_speaks_out_of_its_target_too(shadow_demo, one_memory, monkeypatch):
    out, _ = shadow_demo
    monkeypatch.setattr(chat, "load_model", None)
    assert said(str(out), PROMPTS[0], with_target=True)["after"] == alone(out, PROMPTS[0])


def change_selected(out: Path) -> None:
    change_tensor(out, "model.layers.4.mlp.gate_proj.weight", lambda tensor: tensor.zero_())


def change_template(out: Path) -> None:
    with (out / "chat_template.jinja").open("a") as file:
        file.write(" ")


def lose_source(out: Path) -> None:
    recipe = out / "mergekit_config.yml"
    recipe.write_text(recipe.read_text().replace("miniature/source", "miniature/nowhere"))


@pytest.mark.parametrize(
    ("change", "named"),
    [(change_selected, "4.mlp.gate_proj"), (change_template, "chat_template.jinja"), (lose_source, "nowhere")],
)
def test_what_is_not_its_target_with_its_selection_is_loaded_beside_it(copied, change, named, one_memory, caplog):
    change(copied)
    with caplog.at_level(logging.INFO, "dapa_merge"):
        found = said(str(copied), PROMPTS[0], with_target=True)
    assert found == {"before": alone(TARGET, PROMPTS[0]), "after": alone(copied, PROMPTS[0])}
    assert "both loaded" in caplog.text
    assert named in caplog.text


def test_a_model_without_a_recipe_needs_the_name_of_its_target(copied):
    (copied / "mergekit_config.yml").unlink()
    with pytest.raises(UsageError, match=r"mergekit_config\.yml.*--target"):
        said(str(copied), PROMPTS[0], with_target=True)
    found = said(str(copied), PROMPTS[0], with_target=True, target=Location(TARGET))
    assert found == {"before": alone(TARGET, PROMPTS[0]), "after": alone(copied, PROMPTS[0])}


def test_a_target_that_was_a_folder_of_the_publisher_is_asked_for(copied):
    recipe = copied / "mergekit_config.yml"
    recipe.write_text(recipe.read_text().replace(TARGET, "./target"))
    with pytest.raises(UsageError, match=r"\./target.*--target"):
        said(str(copied), PROMPTS[0], with_target=True)
    assert said(str(copied), PROMPTS[0], with_target=True, target=Location(TARGET))["before"] == alone(
        TARGET, PROMPTS[0]
    )


def test_a_stopped_answer_stays_in_the_conversation_and_the_target_comes_back(demo, one_memory):
    out, _ = demo

    told: list[str] = []

    def stop(piece: str, _: bool) -> None:
        told.append(piece)
        if len(told) == 2:
            raise KeyboardInterrupt

    with speakers(Location(str(out)), Where("cpu"), with_target=True) as (before, after):
        with pytest.raises(KeyboardInterrupt):
            after.ask(PROMPTS[0], "", Manner(40), stop)
        (_, (role, text)) = after.turns
        assert (role, alone(out, PROMPTS[0]).startswith(text), len(text) > 0) == ("assistant", True, True)
        assert "".join(told) == text
        with before.speaking() as model:
            held = dict(model.named_parameters(remove_duplicate=False))
            assert all(torch.equal(held[name], value) for name, value in weights(Path(TARGET)).items())
        after.forget_last()
        assert after.turns == []


def test_sampling_is_repeated_by_its_seed(mini):
    model, tokenizer = mini
    speaker = chat.Speaker("model", tokenizer, lambda: chat.nullcontext(model))

    def sample(seed: int, temperature: float = 5.0) -> str:
        speaker.turns.clear()
        return speaker.ask(PROMPTS[0], "", Manner(20, temperature, seed), nothing)

    state = torch.random.get_rng_state()
    seen = [sample(seed) for seed in range(4)]
    assert [sample(seed) for seed in range(4)] == seen
    assert len({*seen}) == 4
    # Almost nothing but the likeliest.
    assert sample(1, 0.01) == sample(2, 0.0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_conversation_that_is_too_long_is_told_with_its_length(mini):
    model, tokenizer = mini
    speaker = chat.Speaker("model", tokenizer, lambda: chat.nullcontext(model))
    context = model.config.max_position_embeddings
    with pytest.raises(UsageError, match=f"ends at {context}"):
        speaker.ask("house " * context, "", Manner(), nothing)
    assert speaker.turns == []


def test_a_thought_is_told_as_one_and_is_no_turn_of_the_conversation(tmp_path):
    chain_model(tmp_path / "model", "first we think </think> It is so . Done")
    model, tokenizer = load_model(open_checkpoint(str(tmp_path / "model")), CPU)
    speaker = chat.Speaker("model", tokenizer, lambda: chat.nullcontext(model))
    told: dict[bool, str] = {True: "", False: ""}

    def tell(piece: str, is_thought: bool) -> None:
        told[is_thought] += piece

    speaker.ask("How?", "", Manner(50), tell)
    assert told[True].split() == ["<think>", "first", "we", "think", "</think>"]
    assert told[False].split()[:3] == ["It", "is", "so"]
    assert speaker.turns[-1] == ("assistant", told[False].strip())


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "[THINK]", "[/THINK]", "a", " b\n", "<", "think"]), max_size=12)
)
def test_the_parts_of_a_response_are_all_of_it_and_tell_the_answer(words):
    text = "".join(words)
    parts = list(thought_parts(text))
    assert "".join(part for part, _ in parts) == text
    *_, whole = partial_answers(text)
    assert parts[-1][1] == whole.thinking
    # A stray closing tag makes a thought of what was told before it.
    assert "".join(part for part, is_thought in parts if not is_thought).lstrip().endswith(whole.answer)


def test_a_template_that_fails_on_a_conversation_is_named(tmp_path):
    chain_model(tmp_path / "model", "so it is", opening="open")
    model, tokenizer = load_model(open_checkpoint(str(tmp_path / "model")), CPU)
    tokenizer.chat_template = (
        "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[-1].content }} open"
    )
    speaker = chat.Speaker("model", tokenizer, lambda: chat.nullcontext(model))
    speaker.ask("How?", "", Manner(3), nothing)
    with pytest.raises(CheckpointError, match=r"messages of user, assistant, user: .*one turn only"):
        speaker.ask("And why?", "", Manner(3), nothing)
