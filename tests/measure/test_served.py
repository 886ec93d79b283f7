"""Models that are served elsewhere: every request is sent, retried, kept and judged as it should be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import answer, call, write_few
from judge_server import Reply, fault, judge_server, prompt_in

import dapa_merge
from dapa_merge import miniature
from dapa_merge.errors import UsageError
from dapa_merge.measure.prompts.conversation import Conversation, Message
from dapa_merge.measure.served import Served
from dapa_merge.recipe.asking import Sampling, ServedModel

NO = "I'm sorry, but I can't help with that."
SURE = "Sure! First, take a long ladder to the wall."
SOON = {"retry-after-ms": "5"}


@pytest.fixture(autouse=True)
def own_environment(monkeypatch, tmp_path):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def few(tmp_path):
    return write_few(tmp_path / "few", 4)


def asking(prompts, script, **settings):
    """The responses to prompts, and what was requested."""
    with judge_server(script, prompt_in) as (url, log):
        with Served("m", url, max_new_tokens=8, **settings) as served:
            said = served.ask(prompts)
        return said, log


def evaluate(url, few, *options):
    return call("evaluate", "--served", url, "--model", "m", "--prompts", few, *options)


def refusing_harm(few):
    harmful = (few / "harmful.txt").read_text().splitlines()
    return lambda prompt, *_: Reply(NO if prompt in harmful else SURE)


def test_the_figures_are_of_the_answers_and_nothing_is_said_of_what_needs_the_model(few):
    with judge_server(refusing_harm(few), prompt_in) as (url, log):
        result = evaluate(url, few, "--json")
    figures = json.loads(result.stdout)
    assert (figures["dsr"], figures["over_refusal"], figures["undecided"]) == (1, 0, 0)
    assert (figures["perplexity"], figures["divergence"]) == (None, None)
    assert len(log.requests) == 8
    assert {(one["temperature"], one["max_tokens"], one["seed"]) for one in log.requests} == {(0, 100, 0)}
    assert {one["chat_template_kwargs"]["enable_thinking"] for one in log.requests} == {False}


def test_a_request_is_the_conversation_and_the_settings_that_were_asked_for():
    prompt = Conversation([Message("system", "Be brief."), Message("user", "How?"), Message("assistant", "So."),
                           Message("user", "Why?")])  # fmt: skip
    said, log = asking([prompt], lambda *_: Reply("Because."), sampling=Sampling(0.5, 0.9, 7))
    assert said == ["Because."]
    assert log.requests[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How?"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "Why?"},
    ]
    assert [log.requests[0][key] for key in ("temperature", "top_p", "seed", "max_tokens")] == [0.5, 0.9, 7, 8]


def test_a_thought_that_is_given_apart_is_not_judged_and_one_without_an_answer_is_undecided():
    def script(prompt, *_):
        if prompt == "long":
            return Reply(None, "I wonder whether", finish_reason="length")
        return Reply(NO, "Sure, first take a ladder.")

    said, _ = asking(["short", "long"], script)
    assert said == [f"<think>Sure, first take a ladder.</think>{NO}", "<think>I wonder whether"]


def test_parameters_that_the_server_does_not_know_are_left_out():
    def script(_prompt, _earlier, request):
        return (
            fault(400, "Unknown parameter: 'chat_template_kwargs'") if "chat_template_kwargs" in request else Reply(NO)
        )

    said, log = asking(["How?", "Why?"], script)
    assert said == [NO, NO]
    assert len(log.requests) == 3
    assert {"temperature", "max_tokens", "seed"} <= set(log.requests[-1])


def test_a_request_that_fails_is_undecided_and_only_that_is_asked_again(few):
    broken = [True]
    harmful = (few / "harmful.txt").read_text().splitlines()
    right = refusing_harm(few)

    def script(prompt, *rest):
        return fault(500, **SOON) if broken[0] and prompt == harmful[2] else right(prompt, *rest)

    with judge_server(script, prompt_in) as (url, log):
        first = evaluate(url, few, "--json")
        figures = json.loads(first.stdout)
        assert (figures["dsr"], figures["undecided"], figures["over_refusal"]) == (0.75, 0.25, 0)
        assert "1 of 8 requests failed, and their prompts are undecided: HTTP 500 (1)" in first.stderr
        assert "the same command asks again what failed" in first.stderr
        broken[0] = False
        log.requests.clear()
        second = evaluate(url, few, "--json")
        assert "going on with 7 answers of a measurement that was not completed" in second.stderr
        assert json.loads(second.stdout)["dsr"] == 1
        assert [prompt_in(one) for one in log.requests] == [harmful[2]]
        log.requests.clear()
        # That measurement was complete, so the next begins anew: the server may have another model by then.
        assert json.loads(evaluate(url, few, "--json").stdout)["dsr"] == 1
        assert len(log.requests) == 8


def test_a_killed_measurement_goes_on_where_it_was(few, tmp_path):
    slow = [True]
    right = refusing_harm(few)

    def script(prompt, earlier, request):
        reply = right(prompt, earlier, request)
        reply.wait_seconds = 30 if slow[0] and len(log.requests) > 5 else 0
        return reply

    with judge_server(script, prompt_in) as (url, log):
        command = ["evaluate", "--served", url, "--model", "m", "--prompts", few, "--concurrency", 1, "--json"]
        child = subprocess.Popen([sys.executable, "-m", "dapa_merge", *map(str, command)], env=dict(os.environ))
        while len(log.requests) < 6 and child.poll() is None:
            time.sleep(0.02)
        child.kill()
        child.wait()
        slow[0] = False
        asked = {prompt_in(one) for one in log.requests[:-1]}
        log.requests.clear()
        assert answer(*command)["dsr"] == 1
    assert asked
    assert asked.isdisjoint({prompt_in(one) for one in log.requests})
    assert len(asked) + len(log.requests) == 8


def test_a_server_that_is_not_there_is_one_sentence(few):
    with judge_server(refusing_harm(few), prompt_in) as (url, _):
        pass
    result = evaluate(url, few)
    assert result.exit_code == 2
    assert "the served model m at 127.0.0.1:" in result.stderr
    assert "gives no usable answer: no connection; check that it runs" in result.stderr


def test_a_server_that_is_still_loading_says_so(few):
    with judge_server(lambda *_: fault(503, "Loading model", **SOON), prompt_in) as (url, _):
        result = evaluate(url, few)
    assert result.exit_code == 2
    assert "gives no usable answer: HTTP 503: Loading model" in result.stderr


@pytest.mark.parametrize(("status", "words"), [(401, "does not accept the key"), (404, "has no model 'm'")])
def test_a_wrong_key_or_name_is_one_sentence_after_one_request(status, words, few):
    with judge_server(lambda *_: fault(status), prompt_in) as (url, log):
        result = evaluate(url, few)
    assert result.exit_code == 2
    assert f"the served model at 127.0.0.1:{url[17:-3]} answered {status}: it {words}" in result.stderr
    assert len(log.requests) == 1


def test_a_served_model_stands_beside_a_local_one_with_a_paired_test(few):
    source = str(miniature.path("source"))
    settings = ["--prompts", few, "--max-new-tokens", 16, "--attacks", "prefill"]
    with judge_server(lambda *_: Reply(SURE), prompt_in) as (url, _):
        both = ["evaluate", source, "--served", url, "--model", "deployed", *settings]
        found = answer(*both, "--json")
        shown = call(*both)
    deployed = f"deployed at {url[7:-3]}"
    assert [(one["model"], one["dsr"]) for one in found["models"]] == [(source, 1), (deployed, 0)]
    (change,) = found["changes"]
    assert change["to"] == deployed
    assert change["dsr_change"]["no_longer_refused"] == 4
    # A sign test of four equal signs: 2 / 2^4.
    assert change["dsr_change"]["p_value"] == pytest.approx(0.125)
    assert f"{deployed.partition(':')[0]}:" in shown.stdout
    assert ", DSR loss" in shown.stdout
    assert "1.000 -> 0.000" in shown.stdout
    assert "deployed cannot be given the beginning of an answer: its server does not count the tokens" in shown.stderr


def test_a_program_measures_a_served_model_too(few):
    with judge_server(refusing_harm(few), prompt_in) as (url, _):
        found = dapa_merge.evaluate(served=url, served_models=["m"], prompts=few)
    ((name, measured),) = found.models.items()
    assert name == f"m at {url[7:-3]}"
    assert measured.figures.dsr == 1
    for wrong in ({"served": url}, {"served_models": ["m"]}, {}):
        with pytest.raises(UsageError, match="served"):
            dapa_merge.evaluate(prompts=few, **wrong)


def server_like(kind, say=lambda opening: f"{opening} a ladder."):
    """A server with a template like ChatML's, a token a word; by kind, it goes on with an assistant's last message.

    What it says after a beginning is `say` of that, and in a new answer a refusal.
    """

    def script(_item, _earlier, request):
        *before, last = request["messages"]
        opening = last["content"] if last["role"] == "assistant" else ""
        if kind == "rejects" and opening:
            return fault(400, "the last message must be the user's")
        if kind == "leaves out" and opening:
            opening, last = "", before.pop()
        flags = [request.get(key) for key in ("continue_final_message", "add_generation_prompt")]
        goes_on = kind in ("goes on", "repeats") or (kind == "goes on if told" and flags == [True, False])
        words = sum(len(one["content"].split()) + 3 for one in [*before, last])
        words += 0 if flags[1] is False and kind == "goes on if told" else 2
        if opening and goes_on:
            said, words = say(opening), words - 3 - (0 if kind == "goes on if told" else 2)
        else:
            said = NO
        if request["max_tokens"] == 1:
            said = f"{opening} ladder" if opening and goes_on else "I"
        shown = said if kind == "repeats" else said.removeprefix(opening)
        return Reply(shown, num_prompt_tokens=None if kind == "counts no tokens" else words)

    return script


@pytest.mark.parametrize("kind", ["goes on", "repeats", "goes on if told"])
def test_a_server_that_goes_on_with_an_answer_is_given_its_beginning(kind, few):
    with judge_server(server_like(kind), prompt_in) as (url, log):
        found = json.loads(evaluate(url, few, "--attacks", "prefill", "--json").stdout)
    assert [(one["name"], one["dsr"], one["num_prompts"]) for one in found["attacks"]] == [("prefilled opening", 0, 4)]
    # The same prompts without it are refused.
    assert found["dsr"] == 1
    begun = [one for one in log.requests if one["messages"][-1]["role"] == "assistant" and one["max_tokens"] == 100]
    assert {one["messages"][-1]["content"] for one in begun} == {"Sure, here is"}
    assert {one.get("continue_final_message") for one in begun} == {True if kind == "goes on if told" else None}
    assert {one["chat_template_kwargs"]["enable_thinking"] for one in begun} == {False}


@pytest.mark.parametrize("kind", ["goes on", "repeats", "goes on if told"])
def test_an_answer_begins_with_its_beginning_once(kind):
    prompts = [
        Conversation([Message("user", "How?"), Message("assistant", "Sure, sure")]),
        Conversation([Message("user", "How?"), Message("assistant", "No, no")]),
        "Why?",
    ]
    with judge_server(server_like(kind), prompt_in) as (url, _), Served("m", url, max_new_tokens=8) as served:
        assert served.why_not_continued() is None
        assert served.ask(prompts) == ["Sure, sure a ladder.", "No, no a ladder.", NO]


NOT_GIVEN = {
    "begins anew": "its server ends that, and begins a new one",
    "leaves out": "its server ends that, and begins a new one",
    "counts no tokens": "its server does not count the tokens",
    "rejects": "its server rejects that (HTTP 400: the last message must",
}


@pytest.mark.parametrize("kind", NOT_GIVEN)
def test_a_server_that_does_not_go_on_is_not_asked_after_the_beginning_of_an_answer(kind, few, tmp_path):
    with judge_server(server_like(kind), prompt_in) as (url, log):
        result = evaluate(url, few, "--attacks", "prefill", "--json")
        assert json.loads(result.stdout)["attacks"][0]["dsr"] is None
        assert f"m cannot be given the beginning of an answer: {NOT_GIVEN[kind]}" in result.stderr
        assert not [one for one in log.requests if "Sure, here is" in str(one)]
        # In a prompt set it is an error, before anything is measured.
        rows = [{"messages": [{"role": "user", "content": f"How {number}?"},
                              {"role": "assistant", "content": "Sure", "prefix": True}], "label": label}
                for number, label in enumerate(["harmful", "harmless"])]  # fmt: skip
        (tmp_path / "begun.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        log.requests.clear()
        result = evaluate(url, tmp_path / "begun.jsonl")
    assert result.exit_code == 2
    assert f"2 prompts have the beginning of an answer, which m cannot be given: {NOT_GIVEN[kind]}" in result.stderr
    assert {one["max_tokens"] for one in log.requests} == {1}


def test_failures_that_differ_in_numbers_only_are_told_once():
    def script(prompt, *_):
        return (
            Reply(NO)
            if prompt == "short"
            else fault(400, f"request ({prompt} tokens) exceeds the context (256 tokens)")
        )

    said, _ = asking(["short", "456", "457", "458"], script, say=(told := []).append, concurrency=1)
    assert said == [NO, None, None, None]
    assert told[0].endswith("HTTP 400: request (456 tokens) exceeds the context (256 tokens) (3)")


def test_answers_that_the_servers_own_limit_cuts_off_are_told_of():
    def script(prompt, *_):
        number = 8 if prompt == "whole" else 5
        return Reply(SURE, finish_reason="length", num_prompt_tokens=4, num_tokens=number)

    asking(["whole", "cut", "short"], script, say=(told := []).append)
    (warning,) = told
    assert "2 of 3 answers were cut off before 8 tokens" in warning


def test_a_server_that_answers_with_another_model_is_told_of(few):
    # As llama.cpp's, which answers with the model that it has, whatever is asked for.
    def script(prompt, *_):
        return Reply(NO, model="m-2026-11-29" if prompt.startswith("v") else "other.gguf")

    said, _ = asking(["How?", "Why?"], script, say=(told := []).append)
    assert said == [NO, NO]
    assert told == [
        "the served model m: its server answers as 'other.gguf'; if that is another model, correct the name"
    ]
    asking(["v"], script, say=(told := []).append)
    assert told == []


IMPOSSIBLE = {
    "template": (["--chat-template", "none"], "asked with its server's chat template"),
    "evaluator": (["--evaluator", "counts"], "unknown evaluator"),
    "dtype": (["--dtype", "float32"], "float32 is for models that are measured here"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_needs_the_model_is_refused_before_a_request(case, few):
    options, words = IMPOSSIBLE[case]
    with judge_server(refusing_harm(few), prompt_in) as (url, log):
        result = evaluate(url, few, *options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert log.requests == []


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "http://h:99999/v1", "ftp://h/v1"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(UsageError, match="--served is not a valid address"):
        ServedModel("m", url)
