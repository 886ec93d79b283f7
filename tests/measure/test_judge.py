import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import answer, call, write_few
from judge_server import (
    COMPLIED,
    REFUSED,
    Reply,
    fault,
    free_port,
    judge_server,
    save_model_that_always_says,
    start_transformers,
    wait_for,
)

from dapa_merge import miniature
from dapa_merge.errors import UsageError
from dapa_merge.measure.endpoint import MAX_FAILURES, MAX_FIRST_FAILURES
from dapa_merge.measure.judge import Judge, Judgement
from dapa_merge.measure.refusal.classify import Outcome

# One worker has the server of transformers.
pytestmark = pytest.mark.xdist_group("judge")
SOON = {"retry-after-ms": "5"}
SECRET = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    # Half a second, then twice as long each time, would be long for a test.
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module", autouse=True)
def transformers_server():
    """Started before the other tests, because its start takes seconds; asked by the last."""
    port = free_port()
    server = start_transformers(port)
    yield server, f"http://127.0.0.1:{port}"
    server.send_signal(signal.SIGTERM)
    server.wait(30)


def judge_one(script, **options) -> Judgement:
    with judge_server(script) as (url, _):
        return Judge("m", url, **options).judge(["How?"], ["Here is how: step one."])[0]


def always(content, **more):
    return lambda *_: Reply(content, **more)


def by_response(response, *_):
    return Reply(REFUSED if response.startswith("No") else COMPLIED)


def test_judgements_come_in_the_order_of_the_responses(monkeypatch):
    responses = [f"No, never number {i}." if i % 3 else f"Sure, number {i} goes so." for i in range(24)]
    told = []
    for module in ("judge", "endpoint"):
        monkeypatch.setattr(f"dapa_merge.measure.{module}.advance", lambda amount, unit: told.append(amount))
    with judge_server(by_response) as (url, log):
        judgements = Judge("m", url).judge(["How?"] * 24, responses)
    assert [j.outcome for j in judgements] == [Outcome.REFUSED if i % 3 else Outcome.COMPLIED for i in range(24)]
    assert [j.score for j in judgements] == [0.0 if i % 3 else 7 / 8 for i in range(24)]
    assert sum(told) == 24 == len(log.requests)


def test_no_more_requests_than_asked_for_are_under_way_at_once():
    script = always(COMPLIED, wait_seconds=0.05)
    with judge_server(script) as (url, log):
        Judge("m", url, concurrency=3).judge(["How?"] * 12, [f"Sure {i}." for i in range(12)])
    assert log.most_under_way == 3


def test_the_same_pair_is_asked_once():
    with judge_server(by_response) as (url, log):
        judge = Judge("m", url)
        first = judge.judge(["How?", "How?", "Why?"], ["Sure so."] * 3)
        assert judge.judge(["Why?", "How?"], ["Sure so."] * 2) == first[:2]
    assert len(log.requests) == 2


def test_an_answer_that_is_garbage_is_paid_for_once():
    with judge_server(lambda r, *_: Reply("I would say it is fine" if r == "Sure." else REFUSED)) as (url, log):
        judge = Judge("m", url)
        judge.judge(["How?"], ["No."])
        assert {judge.judge(["How?"], ["Sure."])[0].outcome for _ in range(3)} == {Outcome.UNDECIDED}
    assert len(log.requests) == 2


@pytest.mark.parametrize("response", ["", " \n", "go go go go go go go go go"])
def test_a_degenerate_response_is_not_asked_about(response):
    with judge_server(by_response) as (url, log):
        assert Judge("m", url).judge(["How?"], [response]) == [Judgement(Outcome.DEGENERATE)]
    assert log.requests == []


def test_a_response_that_never_came_to_its_answer_is_undecided_without_a_call():
    with judge_server(by_response) as (url, log):
        (judgement,) = Judge("m", url).judge(["How?"], ["<think>First I will consider whether"])
    assert judgement.outcome is Outcome.UNDECIDED
    assert log.requests == []


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_a_busy_server_that_answers_the_fourth_time_has_answered(status):
    assert judge_one(lambda _r, n, _q: fault(status, **SOON) if n < 3 else Reply(COMPLIED)).outcome is Outcome.COMPLIED


@pytest.mark.parametrize("status", [302, 400, 422])
def test_what_another_attempt_would_not_mend_is_not_tried_again(status):
    with judge_server(lambda r, *_: fault(status, **SOON) if r == "Sure." else Reply(COMPLIED)) as (url, log):
        Judge("m", url).judge(["How?"] * 2, ["So.", "Sure."])
    assert len(log.requests) == 2


def test_retry_after_is_honoured():
    times = []

    def script(_response, earlier, _request):
        times.append(time.monotonic())
        return fault(429, **{"Retry-After": "0.6"}) if earlier == 0 else Reply(REFUSED)

    assert judge_one(script).outcome is Outcome.REFUSED
    # The client's own first wait is at most half a second.
    assert times[1] - times[0] >= 0.6


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (lambda *_: fault(500, **SOON), "HTTP 500"),
        (lambda *_: fault(429, **SOON), "HTTP 429"),
        (lambda *_: Reply(body=b"<html>hello</html>", headers={"Content-Type": "text/html"}), "not a chat completion"),
        (lambda *_: Reply(body=b"{{{ not JSON"), "not a chat completion"),
        (lambda *_: Reply(body=b""), "not a chat completion"),
        (lambda *_: Reply(body=b'{"choices": []}'), "not a chat completion"),
        (lambda *_: Reply(body=b'{"choices": [{"message": {"content": 7}}]}'), "not a chat completion"),
        (lambda *_: Reply(body=b"[" * 200_000), "not a chat completion"),
        (lambda *_: Reply(None), "the requested form"),
        (lambda *_: Reply(COMPLIED + REFUSED), "the requested form"),
        (lambda *_: Reply("refused"), "the requested form"),
    ],
)
def test_what_is_no_answer_leaves_the_response_undecided(script, reason):
    judgement = judge_one(script, max_retries=1)
    assert (judgement.outcome, judgement.score) == (Outcome.UNDECIDED, None)
    assert reason in judgement.reason


def test_an_endpoint_that_does_not_answer_leaves_the_response_undecided():
    judgement = judge_one(always(COMPLIED, wait_seconds=1), timeout_seconds=0.2, max_retries=0)
    assert judgement == Judgement(Outcome.UNDECIDED, None, "no answer in time")


def test_an_endpoint_that_is_not_there_leaves_the_response_undecided():
    judge = Judge("m", f"http://127.0.0.1:{free_port()}/v1")
    assert judge.judge(["How?"], ["So."]) == [Judgement(Outcome.UNDECIDED, None, "no connection")]


def test_a_failed_call_among_good_ones_is_told_and_tried_again_when_the_pair_comes_again():
    said = []
    script = lambda r, n, _q: fault(500) if r == "No." and n == 0 else Reply(REFUSED)  # noqa: E731
    with judge_server(script) as (url, _):
        judge = Judge("m", url, max_retries=0, say=said.append)
        judgements = [judge.judge(["How?"] * 2, ["No way.", "No."])[1] for _ in range(2)]
    assert judgements == [Judgement(Outcome.UNDECIDED, None, "HTTP 500"), Judgement(Outcome.REFUSED, 0.0)]
    assert judge.fault is None
    assert said == ["the judge m: 1 of 2 responses are undecided: HTTP 500 (1)"]


def test_an_endpoint_that_never_answers_is_asked_few_times():
    said = []
    with judge_server(lambda *_: fault(500)) as (url, log):
        judge = Judge("m", url, max_retries=0, say=said.append)
        judgements = judge.judge(["How?"] * 40, [f"Sure {i}." for i in range(40)])
    assert {j.outcome for j in judgements} == {Outcome.UNDECIDED}
    assert len(log.requests) == MAX_FIRST_FAILURES
    assert re.fullmatch(
        r"the judge m at 127\.0\.0\.1:\d+ gives no usable answer: HTTP 500; .* url and model .*", judge.fault
    )
    assert said == []


def test_an_endpoint_that_dies_later_is_not_asked_to_the_end():
    script = lambda r, *_: fault(503) if "Sure" in r else Reply(REFUSED)  # noqa: E731
    with judge_server(script) as (url, log):
        judge = Judge("m", url, max_retries=0, concurrency=2)
        outcomes = [j.outcome for j in judge.judge(["How?"] * 41, ["No.", *(f"Sure {i}." for i in range(40))])]
        assert (outcomes[0], set(outcomes[1:])) == (Outcome.REFUSED, {Outcome.UNDECIDED})
        assert "no usable answer: HTTP 503" in judge.fault
        assert len(log.requests) <= 1 + MAX_FAILURES + 1
        num_requests = len(log.requests)
        judge.judge(["How?"], ["Sure so."])
        assert len(log.requests) == num_requests
        judge.prepare()
        assert judge.judge(["How?"], ["No, not so."])[0].outcome is Outcome.REFUSED


def test_an_endpoint_that_fails_for_all_that_is_asked_at_once_is_at_fault():
    """So that no test of a search rests on it."""
    script = lambda r, *_: fault(503) if "Sure" in r else Reply(REFUSED)  # noqa: E731
    with judge_server(script) as (url, _):
        judge = Judge("m", url, max_retries=0)
        judge.judge(["How?"], ["No."])
        judge.judge(["How?"] * 2, ["Sure 0.", "Sure 1."])
        assert judge.fault is None
        judge.judge(["How?"] * 3, ["Sure 0.", "Sure 1.", "Sure 2."])
    assert "no usable answer: HTTP 503" in judge.fault


def test_a_judge_that_never_keeps_to_the_form_is_at_fault_and_one_that_does_so_at_times_is_not():
    with judge_server(always("I would say it is fine")) as (url, log):
        judge = Judge("m", url)
        judge.judge(["How?"] * 40, [f"Sure {i}." for i in range(40)])
    assert "no usable answer: the judge's answer does not have the requested form" in judge.fault
    assert len(log.requests) < 40
    with judge_server(lambda r, *_: Reply(COMPLIED if r == "Sure 0." else "fine")) as (url, log):
        judge = Judge("m", url)
        judge.judge(["How?"] * 40, [f"Sure {i}." for i in range(40)])
    assert judge.fault is None
    assert len(log.requests) == 40


def test_an_endpoint_that_hangs_is_given_up_and_waiting_for_it_is_told(monkeypatch):
    monkeypatch.setattr("dapa_merge.measure.judge.Judge.quiet_seconds", 0.1)
    said = []
    with judge_server(always(COMPLIED, wait_seconds=1)) as (url, log):
        judge = Judge("m", url, say=said.append, timeout_seconds=0.3)
        judge.judge(["How?"] * 40, [f"Sure {i}." for i in range(40)])
    assert "no usable answer: no answer in time" in judge.fault
    assert len(log.requests) == 5
    assert said[0] == "the judge m: no answer for 0.1 seconds; waiting for 40"


def test_an_endpoint_that_drips_without_end_is_given_up(monkeypatch):
    monkeypatch.setattr("dapa_merge.measure.judge.Judge.quiet_seconds", 0.1)
    monkeypatch.setattr("dapa_merge.measure.judge.Judge.max_quiet_seconds", 0.3)
    with judge_server(lambda r, *_: Reply(REFUSED, wait_seconds=2 * ("Sure" in r))) as (url, _):
        judge = Judge("m", url)
        outcomes = [judgement.outcome for judgement in judge.judge(["How?"] * 3, ["No.", "Sure 1.", "Sure 2."])]
    assert outcomes == [Outcome.REFUSED, Outcome.UNDECIDED, Outcome.UNDECIDED]
    assert re.search(r"gives no usable answer: no answer for 0\.[34]\d* seconds", judge.fault)


def test_an_endpoint_that_asks_for_a_long_wait_is_not_waited_for():
    with judge_server(lambda *_: fault(429, **{"Retry-After": "200"})) as (url, log):
        judge = Judge("m", url)
        judge.judge(["How?"] * 40, [f"Sure {i}." for i in range(40)])
    assert "HTTP 429, asking to wait 200 seconds" in judge.fault
    assert len(log.requests) == MAX_FIRST_FAILURES


@pytest.fixture
def evaluate(tmp_path):
    """The arguments of an evaluation with few prompts."""
    settings = ("--prompts", write_few(tmp_path / "few", 4), "--max-new-tokens", 4)
    return ("evaluate", miniature.path("target"), *settings)


DEAD = {
    "no connection": None,
    "HTTP 500": fault(500, **SOON),
    "HTTP 302": Reply(body=b"", status=302),
    "it redirects without end": Reply(body=b"", status=307, headers={"Location": "/v1/chat/completions"}),
    "the answer is not a chat completion": Reply(body=b"<html>hello</html>", headers={"Content-Type": "text/html"}),
    "the judge's answer does not have the requested form": Reply("I cannot say"),
}


@pytest.mark.parametrize("reason", DEAD)
def test_a_dead_judge_ends_what_goes_by_it_and_is_left_out_where_it_is_a_second_opinion(evaluate, reason):
    reply = DEAD[reason]
    with judge_server(lambda *_: reply) as (url, _):
        judge = ("--judge-model", "m", "--judge-url", f"http://127.0.0.1:{free_port()}/v1" if reply is None else url)
        result = call(*evaluate, "--evaluator", "judge", *judge)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert re.match(rf"Error: the judge m at \S+ gives no usable answer: {reason}", result.stderr.splitlines()[-1])
        result = call(*evaluate, *judge, "--json")
    assert result.exit_code == 0
    (told,) = [line for line in result.stderr.splitlines() if "usable" in line]
    assert f"gives no usable answer: {reason}" in told
    assert told.endswith("without it")
    (seen,) = json.loads(result.stdout)["markers"]
    assert (seen["dsr"], seen["dsr_interval"], seen["over_refusal"], seen["undecided"]) == (None, None, None, 1)


def test_the_figures_of_a_judge_that_judged_nothing_are_shown_as_none(evaluate):
    result = call(*evaluate, "--judge-model", "m", "--judge-url", f"http://127.0.0.1:{free_port()}/v1")
    assert re.search(r"DSR by judge +│ +- │", result.stdout)


def test_a_search_does_not_go_on_with_a_dead_judge_and_goes_on_with_one_that_was_mended(tmp_path, write_recipe):
    """It refuses what the source would say, until it dies, and again when it is mended."""
    is_well = True
    script = lambda r, *_: (Reply(REFUSED if "sorry" in r else COMPLIED)) if is_well else fault(400)  # noqa: E731
    few = write_few(tmp_path / "few", 8)
    pair = miniature.path("target"), miniature.path("source")
    recipe = write_recipe(*pair, evaluator="judge", prompts=few, max_new_tokens=12, batch_size=8)
    with judge_server(script) as (url, log):
        arguments = ("search", recipe, "--journal", tmp_path / "journal", "--judge-model", "m", "--judge-url", url)
        result = call(*arguments, "--judge-requests", 10)
        assert result.exit_code == 2
        assert "Error: the limit of 10 requests to the judge is reached" in result.stderr.splitlines()[-1]
        assert len(log.requests) == 10
        is_well = False
        result = call(*arguments)
        assert result.exit_code == 2
        assert "gives no usable answer: HTTP 400" in result.stderr.splitlines()[-1]
        is_well = True
        assert answer(*arguments, "--json")["one_minimal"]


def test_workers_cannot_share_a_limit_of_requests(tmp_path, write_recipe):
    recipe = write_recipe(miniature.path("target"), miniature.path("source"), evaluator="judge", prompts="miniature")
    judge = ("--judge-model", "m", "--judge-url", "http://127.0.0.1:1/v1", "--judge-requests", 9)
    result = call("search", recipe, "--workers", "ray:2", *judge)
    assert result.exit_code == 2
    assert result.stderr.endswith(
        "Error: workers do not share a limit of requests to the judge; leave out --workers or the limit\n"
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--judge-url", "http://127.0.0.1:1/v1"), "--judge-url needs a judge; name its model with --judge-model"),
        (("--judge-requests", 9), "--judge-requests needs a judge; name its model with --judge-model"),
        (("--judge-model", "m", "--judge-requests", 0), "--judge-requests is '0'; write a whole number of at least 1"),
        (
            ("--judge-model", "m", "--judge-url", "http://127.0.0.1:99999/v1"),
            "the judge's url is not a valid address (scheme, host or port is wrong, or it has a space); "
            "expected something like http://localhost:8000/v1",
        ),
    ],
)
def test_options_of_a_judge_that_cannot_be_meant_are_one_sentence(evaluate, options, sentence):
    result = call(*evaluate, *options)
    assert (result.exit_code, result.stderr) == (2, f"Error: {sentence}\n")


def test_a_judge_that_could_not_be_asked_is_named_before_a_model_is_loaded(evaluate, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    result = call(*evaluate, "--judge-model", "m")
    assert result.exit_code == 2
    assert result.stderr.endswith("Error: the judge has no key and no address: set OPENAI_API_KEY, or name its url\n")


def test_variables_of_a_judge_are_checked_too(evaluate, monkeypatch):
    monkeypatch.setenv("DAPA_JUDGE_REQUESTS", "abc")
    result = call(*evaluate)
    sentence = "Error: DAPA_JUDGE_REQUESTS is 'abc'; write a whole number of at least 1\n"
    assert (result.exit_code, result.stderr) == (2, sentence)


def test_no_more_requests_are_sent_than_the_cap_allows_and_that_is_said_once():
    said = []
    with judge_server(by_response) as (url, log):
        judge = Judge("m", url, max_requests=7, say=said.append)
        judgements = judge.judge(["How?"] * 20, [f"No, not {i}." for i in range(20)])
        judge.judge(["Why?"], ["No, not so."])
    outcomes = [j.outcome for j in judgements]
    assert (outcomes.count(Outcome.REFUSED), outcomes.count(Outcome.UNDECIDED)) == (7, 13)
    assert len(log.requests) == judge.num_requests == 7
    assert said == ["the judge m: the rest is undecided: the limit of 7 requests is reached"]


def test_retries_count_as_requests():
    with judge_server(lambda *_: fault(500, **SOON)) as (url, log):
        (judgement,) = Judge("m", url, max_requests=3, max_retries=4).judge(["How?"], ["So."])
    assert len(log.requests) == 3
    assert judgement == Judgement(Outcome.UNDECIDED, None, "the limit of 3 requests is reached")


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"the judge at 127\.0\.0\.1:\d+ answered 401: it does not accept the key; set OPENAI_API_KEY to one "),
        (403, r"answered 403: it does not accept the key"),
        (404, r"answered 404: it has no model 'm', or its url lacks a path such as /v1; correct"),
    ],
)
def test_a_wrong_key_or_model_ends_it_with_one_request(status, message):
    script = lambda *_: fault(status, f"bad key {SECRET}")  # noqa: E731
    with judge_server(script) as (url, log), pytest.raises(UsageError, match=message) as error:
        Judge("m", url).judge(["How?"] * 9, [f"Sure {i}." for i in range(9)])
    assert len(log.requests) == 1
    assert SECRET not in str(error.value)


def test_a_key_that_is_refused_later_leaves_responses_undecided():
    script = lambda response, *_: fault(401) if "3" in response else Reply(COMPLIED)  # noqa: E731
    with judge_server(script) as (url, _):
        judgements = Judge("m", url).judge(["How?"] * 6, [f"Sure {i}." for i in range(6)])
    assert [i for i, j in enumerate(judgements) if j.outcome is Outcome.UNDECIDED] == [3]
    assert judgements[3].reason == "HTTP 401"


def test_the_identity_names_model_and_rubric_but_no_address():
    identity = Judge("some/model", "http://user:pass@host/v1").identity
    assert re.fullmatch(r"some/model rubric:[0-9a-f]{16}", identity)


def test_ctrl_c_ends_it_while_requests_are_under_way():
    code = (
        # A shell that runs tests in the background has them ignore it.
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from dapa_merge.measure.judge import Judge\n"
        "judge = Judge('m', sys.argv[1], timeout_seconds=300)\n"
        "try: judge.judge(['How?'] * 30, [f'Sure {i}.' for i in range(30)])\n"
        "except KeyboardInterrupt: print('ended')"
    )
    # Longer than the process is given to end.
    script = lambda response, *_: Reply(COMPLIED, wait_seconds=0 if response == "Sure 0." else 40)  # noqa: E731
    with judge_server(script) as (url, log):
        child = subprocess.Popen([sys.executable, "-c", code, url], stdout=subprocess.PIPE, text=True, env=os.environ)
        while log.under_way < 8 and child.poll() is None:
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        try:
            assert child.communicate(timeout=20)[0] == "ended\n"
        finally:
            child.kill()
            child.wait()


def test_transformers_own_server_judges_and_its_garbage_is_undecided(transformers_server, tmp_path):
    refusing = save_model_that_always_says(REFUSED, tmp_path / "judge")
    server, url = transformers_server
    wait_for(server, f"{url}/health")
    prompts, responses = ["How?", "Why?"], ["No.", "Because it is so."]
    judgements = Judge(str(refusing), f"{url}/v1").judge(prompts, responses)
    assert judgements == [Judgement(Outcome.REFUSED, 0.0)] * 2
    garbage = Judge(str(miniature.path("target")), f"{url}/v1").judge(prompts, responses)
    assert {(j.outcome, j.reason) for j in garbage} == {
        (Outcome.UNDECIDED, "the judge's answer does not have the requested form")
    }


def test_a_served_model_has_the_figures_that_it_has_here(transformers_server, tmp_path):
    server, url = transformers_server
    wait_for(server, f"{url}/health")
    few, model = write_few(tmp_path / "few", 6), str(miniature.path("source"))
    settings = ["--prompts", few, "--max-new-tokens", 16, "--attacks", "jailbreak,prefill", "--json"]
    here = answer("evaluate", model, "--dtype", "float32", *settings)
    there = answer("evaluate", "--served", f"{url}/v1", "--model", model, "--concurrency", 2, *settings)
    told = {name: [one["dsr"] for one in figures["attacks"]] for name, figures in (("here", here), ("there", there))}
    # The server cannot be given the beginning of an answer.
    assert told["there"] == [None, *told["here"][1:]]
    assert math.isnan(float("nan" if there["perplexity"] is None else there["perplexity"]))
    same = ("dsr", "dsr_interval", "complied", "degenerate", "undecided", "over_refusal", "categories", "read")
    assert {key: there[key] for key in same} == {key: here[key] for key in same}
    assert here["dsr"] == 1
