import logging

import pytest
from judge_server import COMPLIED, REFUSED, Reply, fault, judge_server

from dapa_merge.errors import UsageError
from dapa_merge.measure.judge import Judge, Judgement
from dapa_merge.measure.refusal.classify import Outcome
from dapa_merge.recipe.options import Options

SECRET = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # Half a second, then twice as long each time, would be long for a test.
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def judge_one(script, **options) -> Judgement:
    with judge_server(script) as (url, _):
        return Judge("m", url, **options).judge(["How?"], ["Here is how: step one."])[0]


def by_response(response, *_):
    return Reply(REFUSED if response.startswith("No") else COMPLIED)


@pytest.mark.parametrize(
    ("rejected", "kept"),
    [
        (("seed",), {"temperature", "max_tokens", "response_format"}),
        (("response_format",), {"temperature", "max_tokens", "seed"}),
        (("max_tokens", "temperature"), {"seed", "response_format", "max_completion_tokens"}),
    ],
)
def test_parameters_that_an_endpoint_rejects_are_left_out_from_then_on(rejected, kept):
    def script(_response, _earlier, request):
        # As OpenAI's, which names one at a time.
        wrong = next((name for name in rejected if name in request), None)
        return fault(400, f"Unsupported parameter: '{wrong}'") if wrong else Reply(COMPLIED)

    with judge_server(script) as (url, log):
        judgements = Judge("m", url).judge(["How?"] * 5, [f"Sure {i}." for i in range(5)])
    assert {j.outcome for j in judgements} == {Outcome.COMPLIED}
    assert len(log.requests) == 5 + len(rejected)
    assert set(log.requests[-1]) == {"model", "messages"} | kept


def test_parameters_are_all_left_out_if_the_endpoint_does_not_say_which_it_rejects():
    script = lambda _r, _n, q: Reply(REFUSED) if "seed" not in q else fault(422, "bad request")  # noqa: E731
    assert judge_one(script).outcome is Outcome.REFUSED


def test_a_request_that_is_rejected_for_its_content_costs_no_second_one():
    script = lambda r, *_: fault(400, f"filtered, {SECRET}") if "7" in r else Reply(COMPLIED)  # noqa: E731
    with judge_server(script) as (url, log):
        judgements = Judge("m", url).judge(["How?"] * 8, [f"Sure {i}." for i in range(8)])
    assert len(log.requests) == 8
    assert judgements[7].reason.startswith("HTTP 400: ")
    assert "***" in judgements[7].reason
    assert SECRET not in judgements[7].reason


def test_a_judge_that_thinks_gets_room_for_it():
    def script(_response, _earlier, request):
        if request["max_tokens"] < 1000:
            return Reply("<think>Let me see", finish_reason="length")
        return Reply(f"<think>Perhaps {REFUSED}?</think>\n{COMPLIED}")

    assert judge_one(script).outcome is Outcome.COMPLIED


def test_the_key_is_sent_but_is_nowhere_else(caplog, capfd):
    caplog.set_level(logging.DEBUG)
    with judge_server(by_response) as (url, log):
        judge = Judge("m", url)
        judgements = judge.judge(["How?"], ["No."])
    assert log.keys == [f"Bearer {SECRET}"]
    written = [
        repr(judgements),
        judge.identity,
        repr(vars(judge)),
        caplog.text,
        *capfd.readouterr(),
    ]
    assert not any(SECRET in text for text in written)


def test_an_endpoint_with_an_address_needs_no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert judge_one(by_response).outcome is Outcome.COMPLIED


def test_the_address_may_come_from_the_environment(monkeypatch):
    with judge_server(by_response) as (url, _):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        assert Judge("m").judge(["How?"], ["No."])[0].outcome is Outcome.REFUSED


def test_without_key_and_address_it_says_what_to_set(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UsageError, match="no key and no address: set OPENAI_API_KEY, or name its url"):
        Judge("m").judge(["How?"], ["No."])


def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-abc\nsk-def")
    with pytest.raises(UsageError, match=r"^OPENAI_API_KEY ") as error:
        Judge("m").judge(["How?"], ["No."])
    assert "sk-" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"judge_model": " "},
        {"judge_url": "localhost:8000/v1"},
        {"judge_url": "http://"},
        {"judge_url": "http://127.0.0.1:99999/v1"},
        {"judge_url": "http://a b/v1"},
        {"judge_url": "http://a/v\t1"},
        {"judge_url": "http://[::1/v1"},
        {"judge_url": "http://:8000/v1"},
    ],
)
def test_invalid_options_of_a_judge_are_refused(options):
    with pytest.raises(UsageError, match="the judge"):
        Options(**options)


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999/v1", "http://a b/v1", "nowhere"])
def test_an_address_in_the_environment_that_is_none_is_refused(monkeypatch, url):
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(
        UsageError, match=r"^OPENAI_BASE_URL is not a valid address .*; expected something like http://"
    ):
        Judge("m").judge(["How?"], ["No."])


def test_a_host_that_is_no_host_leaves_the_response_undecided_and_is_told():
    judge = Judge("m", f"http://{'a' * 300}.example/v1")
    assert judge.judge(["How?"], ["No."])[0].outcome is Outcome.UNDECIDED
    assert "gives no usable answer" in judge.fault
