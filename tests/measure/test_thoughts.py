"""A thought that the chat template opens itself is never judged: only the answer that follows it is."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict

import pytest
import torch
from conftest import call, write_few
from judge_server import Reply, judge_server
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.evaluators import paper
from dapa_merge.measure.figures import Figures, Response
from dapa_merge.measure.generate import generate, prompt_ids, thought_before
from dapa_merge.measure.judge import Judge
from dapa_merge.measure.live import load_model, opens_thought
from dapa_merge.measure.meter import THINKING_NEW_TOKENS, search_meter
from dapa_merge.measure.prompts.conversation import attacked
from dapa_merge.measure.prompts.sets import Question, load_prompts
from dapa_merge.measure.refusal.classify import Outcome, classify, closing_tag, opened_thought, settle
from dapa_merge.measure.skills import is_right
from dapa_merge.measure.statistics import refusal_figures
from dapa_merge.recipe.attacks import ATTACKS
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.report.report import jsonable, read_figures
from dapa_merge.report.tables import figure_rows
from dapa_merge.search.attribution import Contrast, sides_of

REFUSAL = "I'm sorry, but I can't help with that."
HELP = "Sure, here is how to do it: first open the door and walk in."
# Long enough, and confident enough, to be called an answer.
THOUGHT = (
    "Sure, here is how to think about it: 1. They ask for a plan. 2. It may harm others. 3. Then decide what is right. "
)
# The ends of rendered prompts, and what closes the thought.
OPENINGS = {
    # DeepSeek-R1 and distills, QwQ, Qwen3-Thinking-2507, LFM2.5, GLM-Z1.
    "<｜User｜>How?<｜Assistant｜><think>\n": "</think>",
    "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n<think>": "</think>",
    "[|user|]How?[|endofturn|]\n[|assistant|]<thought>\n": "</thought>",
    "Human: How?\nAssistant: <reasoning>\n\n": "</reasoning>",
    "[INST]How?[/INST][THINK]": "[/THINK]",
    "<|im_user|>How?<|im_assistant|>assistant<|im_middle|>◁think▷": "◁/think▷",
    "<seed:bos>assistant\n<seed:think>": "</seed:think>",
    "How?<|CHATBOT_TOKEN|><|START_THINKING|>": "<|END_THINKING|>",
    "How?<|assistant_start|><|inner_prefix|>": "<|inner_suffix|>",
    "How?<|start|>assistant<|channel|>analysis<|message|>": "<|end|><|start|>assistant<|channel|>final<|message|>",
    "How?<start_of_turn>model\n<|channel>thought\n": "<channel|>",
    "How?<|assistant|>\nHere are my reasoning steps:\n": "[BEGIN FINAL RESPONSE]",
    "How?<|begin_of_thought|>\n": "<|end_of_thought|>",
}
CLOSED = [
    # Qwen 3 with `enable_thinking=False`, Gemma 4, DeepSeek V3.1, Command A.
    "How?<|im_start|>assistant\n<think>\n\n</think>\n\n", "How?<start_of_turn>model\n<|channel>thought\n<channel|>",
    "How?<｜Assistant｜></think>", "How?<|CHATBOT_TOKEN|><|START_THINKING|><|END_THINKING|>",
    "First think inside [THINK] and [/THINK]. [INST]How?[/INST]", "Put thoughts into <think>. User: How? Assistant:",
]  # fmt: skip


@pytest.mark.parametrize(("rendered", "closing"), OPENINGS.items())
def test_the_answer_after_an_opened_thought_is_judged_and_a_thought_that_is_cut_off_is_undecided(rendered, closing):
    assert rendered.endswith(opened_thought(rendered, "How?"))
    assert opened_thought(rendered, "How?")
    assert closing_tag(opened_thought(rendered, "How?")) == closing
    for prompt, opened in ((rendered, ""), ("How?", opened_thought(rendered, "How?"))):
        for thought in (THOUGHT, REFUSAL, ""):
            said = f"{opened}{thought}"
            assert classify(f"{said}{closing}\n\n{REFUSAL}", prompt) is Outcome.REFUSED
            assert classify(f"{said}{closing}\n\n{HELP}", prompt) is Outcome.COMPLIED
            assert classify(said, prompt) is Outcome.UNDECIDED
    assert classify(THOUGHT, "How?") is Outcome.COMPLIED


@pytest.mark.parametrize("rendered", OPENINGS)
def test_nothing_is_certain_inside_an_opened_thought(rendered):
    opened = opened_thought(rendered, "How?")
    for end in range(0, len(THOUGHT * 4), 9):
        assert settle((THOUGHT * 4)[:end], rendered) is settle(opened + (THOUGHT * 4)[:end], "How?") is None
    assert settle(f"{opened}{THOUGHT}{OPENINGS[rendered]}{THOUGHT}", "How?") is Outcome.COMPLIED


@pytest.mark.parametrize("rendered", CLOSED)
def test_an_empty_thought_that_the_template_closes_and_a_tag_before_the_request_open_nothing(rendered):
    assert opened_thought(rendered, "How?") == ""
    assert classify(THOUGHT, rendered) is Outcome.COMPLIED


@pytest.mark.parametrize("request_", ["think", "n", "assistant <think>", " How? "])
def test_no_request_hides_an_opened_thought(request_):
    assert opened_thought(f"<|user|>{request_.strip()}<|assistant|>\n<think>\n", request_) == "<think>\n"
    assert opened_thought(f"<|user|>{request_.strip()}<|assistant|>\n", request_) == ""


def test_a_beginning_of_the_thought_that_the_template_writes_belongs_to_it():
    assert opened_thought("<|user|>How?<|assistant|><think>\nOkay, ", "How?") == "<think>\nOkay, "


def chain_model(folder, says: str, *, opening: str = "<think>\n", special: bool = False):
    """A real model that always says these words, each once: each word leads to the next, and the last to the end."""
    words = ["<unk>", "<end>", opening.strip(), *says.split()]
    index = {word: number for number, word in enumerate(words)}
    assert len(index) == len(words) <= 64
    tokenizer = Tokenizer(models.WordLevel(index, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tags = [word for word in words[2:] if word[0] in "<["] if special else []
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=tags,
        chat_template="{% for one in messages %}{{ one.role }} {{ one.content }} {% endfor %}model {{ "
        + repr(opening)
        + " }}",
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=4096, tie_word_embeddings=False, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(float("norm" in name))
        model.model.embed_tokens.weight.copy_(torch.eye(64))
        for number in range(2, len(words)):
            model.lm_head.weight[(number + 1) if number + 1 < len(words) else 1, number] = 1
    model.save_pretrained(folder)
    return folder


RESPONSES = {
    f"Okay, someone asks. Let me think </think> {REFUSAL}": "refused",
    f"{REFUSAL} No, wait. </think> Sure, here is how to do it: open the door.": "complied",
    "Sure, here is how to do it: first open the door, then": "undecided",
}


@pytest.mark.parametrize(("says", "outcome"), RESPONSES.items())
def test_the_figures_of_a_model_whose_template_opens_a_thought_are_of_its_answers(tmp_path, says, outcome):
    folder = chain_model(tmp_path / "model", says)
    if outcome == "undecided":
        # A real cut: it would have refused.
        folder = chain_model(tmp_path / "cut", f"{says} </think> {REFUSAL}")
    tokens = ("--max-new-tokens", len(says.split())) if outcome == "undecided" else ()
    few, file = write_few(tmp_path / "few", 2), tmp_path / "responses.jsonl"
    options = ("--prompts", few, "--attacks", "prefill", "--evaluator", "paper", "--responses", file)
    result = call("evaluate", folder, *options, *tokens, "--json")
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)
    shares = {"refused": figures["dsr"], "complied": figures["complied"], "undecided": figures["undecided"]}
    assert shares == {name: float(name == outcome) for name in shares}
    assert figures["over_refusal"] == shares["refused"]
    assert figures["harmless_undecided"] == shares["undecided"]
    assert figures["markers"][0]["undecided"] == shares["undecided"]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    plain = [line for line in lines if line["kind"] in ("harmful", "harmless")]
    assert {(line["response"], line["outcome"]) for line in plain} == {(f"<think>\n{says}", outcome)}
    assert {line["others"]["paper"] for line in plain} == {outcome}
    # An attack's opening of the answer stands after the thought, which is closed for it.
    assert len(lines) == 6
    assert all("<think>" not in line["response"] for line in lines[4:])


def test_a_thought_between_special_tokens_is_not_part_of_the_answer(tmp_path):
    """As Mistral's and gpt-oss's tags are, which decoding usually removes."""
    says = f"Sure, here is how to do it: 1. go [/THINK] {REFUSAL}"
    folder = chain_model(tmp_path / "model", says, opening="[THINK]", special=True)
    model, tokenizer = load_model(open_checkpoint(str(folder)), torch.device("cpu"))
    for settles in (None, settle):
        (said,) = generate(model, tokenizer, ["How?"], max_new_tokens=60, batch_size=BatchSize(1), settle=settles)
        assert said == f"[THINK]{says}"
        assert classify(said, "How?") is Outcome.REFUSED


def test_responses_get_room_for_the_thought_once_said_and_only_where_the_template_opens_one(tmp_path, caplog):
    thinking = open_checkpoint(str(chain_model(tmp_path / "one", f"Hm </think> {REFUSAL}")))
    plain = open_checkpoint(str(chain_model(tmp_path / "other", REFUSAL, opening="model")))
    assert opens_thought(thinking)
    assert not opens_thought(plain)
    prompts = load_prompts("miniature")

    def length(*models, **settings) -> int:
        recipe = Recipe(target="a", source="b", **settings)
        return search_meter(recipe, prompts, Options(), models).max_new_tokens

    with caplog.at_level(logging.INFO, logger="dapa_merge"):
        assert (length(plain), length(plain, max_new_tokens=9)) == (100, 9)
        assert caplog.messages == []
        assert length(plain, thinking) == length(thinking) == THINKING_NEW_TOKENS == 1024
        assert length(plain, thinking) == 1024
    (said,) = caplog.messages
    assert "one" in said
    assert "1024" in said
    assert "max_new_tokens" in said
    with caplog.at_level(logging.WARNING, logger="dapa_merge"):
        assert length(thinking, max_new_tokens=2000) == 2000
        assert len(caplog.messages) == 1
        assert length(thinking, max_new_tokens=9) == 9
    assert "9 tokens" in caplog.messages[1]


def test_a_thought_that_is_cut_off_is_reported(tmp_path):
    folder = chain_model(tmp_path / "model", f"Let me think </think> {REFUSAL}")
    result = call("evaluate", folder, "--prompts", write_few(tmp_path / "few", 2), "--max-new-tokens", 3)
    assert result.exit_code == 0, result.stderr
    assert "4 of 4 responses" in " ".join(result.stderr.split())
    assert "never came to an answer" in result.stdout


def test_only_the_answer_is_sent_to_a_judge():
    sent = []

    def reply(_response, _number, request):
        sent.append(json.dumps(request, ensure_ascii=False))
        return Reply('{"refused": true, "specific": 1, "convincing": 1}')

    with judge_server(reply) as (url, _):
        (judgement,) = Judge("m", url).judge(["How?"], [f"<think>\nA secret plan.</think>\n{REFUSAL}"])
    assert judgement.outcome is Outcome.REFUSED
    assert len(sent) == 1
    assert REFUSAL in sent[0]
    assert "secret" not in sent[0]


@pytest.mark.parametrize(
    ("match", "said", "right"),
    [
        ("contains", "<think>\nIs it Rome? No.</think>\nParis.", "Paris"),
        ("number", "<think>\n5 or 6?</think>\nIt is 42.", "42"),
        ("exact", "<think>\nHm.</think>\n\nblue", "blue"),
        ("regex", "[THINK]no[/THINK]yes", "^yes$"),
    ],
)
def test_a_skill_is_judged_by_the_answer_after_the_thought(match, said, right):
    assert is_right(said, Question("?", right, match))
    assert not is_right(said.partition("/")[0], Question("?", right, match))
    assert not is_right(said.replace(right.strip("^$"), "7"), Question("?", right, match))


def test_the_papers_strings_are_not_looked_for_in_a_thought():
    classifier = paper()
    said = [f"<think>{REFUSAL}</think>{HELP}", f"<think>{HELP}</think>{REFUSAL}", f"<think>{REFUSAL}"]
    assert classifier.classify(["How?"] * 3, said) == [Outcome.COMPLIED, Outcome.REFUSED, Outcome.UNDECIDED]
    assert classifier.settle(said[2], "How?") is None


def test_a_contrast_of_two_responses_counts_the_template_s_own_tag_once(tmp_path):
    folder = chain_model(tmp_path / "model", f"Hm </think> {REFUSAL}")
    _, tokenizer = load_model(open_checkpoint(str(folder)), torch.device("cpu"))
    carrying = Contrast("How?", f"<think>\nHm </think> {REFUSAL}", f"<think>\n</think> {REFUSAL}")
    alone = Contrast("How?", f"Hm </think> {REFUSAL}", f"</think> {REFUSAL}")
    assert sides_of(tokenizer, carrying, 4) == sides_of(tokenizer, alone, 4)
    context = prompt_ids(tokenizer, "How?")
    assert sides_of(tokenizer, carrying, 4)[0].row.ids[: len(context)] == context


def test_an_opening_of_an_attack_begins_the_answer_after_a_closed_thought(tmp_path):
    folder = chain_model(tmp_path / "model", f"Hm [/THINK] {REFUSAL}", opening="[THINK]", special=True)
    _, tokenizer = load_model(open_checkpoint(str(folder)), torch.device("cpu"))
    thought, closed = tokenizer.convert_tokens_to_ids(["[THINK]", "[/THINK]"])
    opened = attacked("How?", ATTACKS[0])
    context = prompt_ids(tokenizer, opened)
    assert [token for token in context if token in (thought, closed)] == [thought, closed]
    assert thought_before(tokenizer, opened) == ""


def test_degenerate_and_undecided_answers_to_harmless_prompts_are_in_the_table_and_unknown_in_older_reports():
    said = [("harmful", "refused"), ("harmless", "degenerate"), ("harmless", "undecided")]
    said += [("harmless", "complied")] * 2
    responses = [Response(kind, "", f"prompt {number}", "", outcome) for number, (kind, outcome) in enumerate(said)]
    other = {"score": None, "perplexity": 2.0, "text": "builtin", "skills": ()}
    figures = Figures(**refusal_figures(responses), **other)
    rows = [label for label, _ in figure_rows([figures])]
    after = rows.index("over-refusal (4 harmless)")
    assert figure_rows([figures])[after + 2 : after + 4] == [
        ("  degenerate", ["0.250"]), ("  never came to an answer", ["0.250"]),
    ]  # fmt: skip
    old = {key: value for key, value in jsonable(asdict(figures)).items() if not key.startswith("harmless_")}
    assert figure_rows([read_figures(old)])[after + 2] == ("  degenerate", ["-"])
    assert read_figures(jsonable(asdict(figures))).harmless_degenerate == 0.25
