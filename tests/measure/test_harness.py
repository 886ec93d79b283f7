"""Tasks of lm-evaluation-harness on a live model."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import call, configuration, write_few

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import DapaError, UsageError
from dapa_merge.measure import skills
from dapa_merge.measure.generate import chat_prompt
from dapa_merge.measure.live import load_model
from dapa_merge.measure.meter import make_meter, skills_of
from dapa_merge.measure.prompts.sets import asked_after, load_prompts
from dapa_merge.measure.skills import Harness, Task, _load, _metrics, parse_task
from dapa_merge.recipe.options import Options

pytest.importorskip("lm_eval")
# To index what comes with the harness takes it long, and is done once in a process.
pytestmark = pytest.mark.xdist_group("harness")
MODEL = miniature.path("target")
# A question of the miniature's own words, with the right answer among three.
QUESTIONS = [
    {"question": f"What is two plus {number}?", "choices": ["It is four.", "It is five.", "It is six."], "right": right}
    for right, number in enumerate(("two", "three", "four"))
]
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: right
num_fewshot: {shots}
fewshot_split: test
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture
def task_file(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "sums.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    path = folder / "sums.yaml"
    path.write_text(TASK.format(data="sums.jsonl", shots=0))
    return path


@pytest.fixture(scope="module")
def loaded():
    return load_model(open_checkpoint(str(MODEL)), torch.device("cpu"))


def harness_of(file, metric=""):
    return Harness(Task(str(file), metric), [file])


def state(model, tokenizer):
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return bits, model.training, model.generation_config.to_dict(), tokenizer.padding_side, tokenizer.pad_token


def test_a_live_model_scores_what_its_files_score(task_file, loaded, capfd):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    before = state(*loaded)
    ours = harness_of(task_file, "acc_norm").score(*loaded, batch_size=2)
    assert capfd.readouterr() == ("", "")
    bits, *settings = state(*loaded)
    assert settings == list(before[1:])
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in bits.items())
    task_file.write_text(TASK.format(data=task_file.with_suffix(".jsonl"), shots=0))
    theirs = simple_evaluate(
        "hf", model_args={"pretrained": str(MODEL)}, tasks=[str(task_file)], device="cpu", batch_size=3,
        bootstrap_iters=0, task_manager=TaskManager(include_defaults=False),
    )["results"]["sums"]["acc_norm,none"]  # fmt: skip
    assert ours == theirs


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_after_a_system_message_or_in_another_template_a_task_is_asked_as_the_harness_would_ask_it(
    system, task_file, loaded, monkeypatch
):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    asked = []
    monkeypatch.setattr(skills, "chat_prompt", lambda *given: asked.append(given) or chat_prompt(*given))
    task_file.write_text(TASK.format(data=task_file.with_suffix(".jsonl"), shots=1))
    plain = harness_of(task_file, "acc_norm")
    ours = plain.formatted(system)
    score = ours.score(*loaded, batch_size=2)
    # The example is a turn of its own, after the message.
    (messages,) = {tuple(one.role for one in prompt.messages) for _, prompt in asked}
    assert messages == (*(["system"] if system else []), "user", "assistant", "user")
    for tokenizer, prompt in asked:
        given = [one._asdict() for one in prompt.messages]
        shown = tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
        assert chat_prompt(tokenizer, prompt) == shown
    theirs = simple_evaluate(
        "hf", model_args={"pretrained": str(MODEL)}, tasks=[str(task_file)], device="cpu", batch_size=3,
        bootstrap_iters=0, task_manager=TaskManager(include_defaults=False), apply_chat_template=True,
        system_instruction=system or None, fewshot_as_multiturn=True,
    )["results"]["sums"]["acc_norm,none"]  # fmt: skip
    assert score == theirs
    assert ours.identity != plain.identity
    asked.clear()
    plain.score(*loaded, batch_size=2)
    assert asked == []


def test_a_task_follows_the_system_message_and_the_template_of_a_recipe(task_file):
    name, options = f"lm-eval:{task_file}:acc", Options("cpu", task_files=(task_file,))
    prompts, found = load_prompts("miniature"), []
    for system, template in ((None, None), (None, "none"), ("Be brief.", None), (None, "mine.jinja")):
        asked = asked_after(prompts, system, template)
        (skill,) = (one.harness for one in skills_of(asked, name, options) if one.harness is not None)
        evaluator = make_meter(asked, options, evaluator=name).identity
        assert evaluator == skill.identity
        found.append(evaluator)
    assert found[0] == found[1]
    assert len({*found}) == 3


def test_the_same_model_scores_the_same_again_also_with_examples(task_file, loaded):
    task_file.write_text(TASK.format(data="sums.jsonl", shots=1))
    harness = harness_of(task_file)
    scores = [harness.score(*loaded, batch_size=2) for _ in range(3)]
    assert len(set(scores)) == 1
    assert harness_of(task_file).score(*loaded, batch_size=2) == scores[0]


@pytest.mark.parametrize("metric", ["f1", "acc,strict", "acc,none,"])
def test_an_unknown_metric_is_told_those_that_there_are(task_file, metric):
    with pytest.raises(UsageError, match=rf"has no metric '{metric}'; its metrics are acc,none, acc_norm,none$"):
        harness_of(task_file, metric)


def test_a_group_has_the_metrics_that_it_aggregates_with_the_filters_of_its_tasks(task_file):
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig

    loaded = _load(Task(str(task_file)), task_file)
    assert _metrics(loaded) == ["acc,none", "acc_norm,none"]
    group = Group("several", aggregate_metric_list=[AggMetricConfig("acc")])
    assert _metrics({**loaded, "groups": {"several": group}}) == ["acc,none"]


def test_a_metric_that_is_no_share_is_refused(task_file, loaded):
    text = task_file.read_text()
    for old, new in (
        ("output_type: multiple_choice", "output_type: loglikelihood_rolling"),
        ('doc_to_text: "{{question}}"', 'doc_to_text: ""'),
        ("doc_to_target: right", 'doc_to_target: "{{question}}"'),
        ("[{metric: acc}, {metric: acc_norm}]", "[{metric: word_perplexity}]"),
    ):
        assert old in text
        text = text.replace(old, new)
    task_file.write_text(text)
    with pytest.raises(UsageError, match=r"gave word_perplexity,none = .*; .* from 0 to 1"):
        harness_of(task_file).score(*loaded, batch_size=2)


def test_an_unknown_task_is_told_near_names():
    with pytest.raises(UsageError, match=r"has no task 'arc_esy'; near names are .*arc_easy"):
        Harness(Task("arc_esy"))


def test_data_that_cannot_be_had_is_one_sentence(task_file):
    task_file.with_suffix(".jsonl").unlink()
    with pytest.raises(UsageError, match=r"^lm-eval:.*sums.yaml cannot be read: "):
        harness_of(task_file)


@pytest.mark.parametrize("option", ["--skills", "--evaluator"])
def test_a_task_that_cannot_be_asked_is_said_before_a_model_is_loaded(option):
    for task, exit_code, sentence in (
        ("lm-eval:nonsense:acc", 2, "lm-evaluation-harness has no task 'nonsense'"),
        ("lm-eval:arc_easy:acc", 5, "cannot read lm-eval:arc_easy:acc, which is not all in the cache: HF_HUB_OFFLINE"),
    ):
        result = call("evaluate", MODEL, option, task, "--text", "builtin")
        assert result.exit_code == exit_code
        assert result.stderr.startswith(f"Error: {sentence}")
        assert result.stderr.count("\n") == 1


def test_a_hub_that_is_out_of_reach_is_asked_once_for_a_task(tmp_path, task_file):
    text = task_file.read_text()
    dataset = "dataset_path: allenai/ai2_arc\ndataset_name: ARC-Easy\n"
    task_file.write_text(dataset + "".join(line for line in text.splitlines(True) if not line.startswith("dataset_")))
    code = """
import sys
from dapa_merge.errors import HubError
from dapa_merge.measure.skills import Harness, Task
try:
    Harness(Task(sys.argv[1]), [sys.argv[1]])
except HubError as error:
    print(error)
"""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    result = subprocess.run(
        [sys.executable, "-c", code, task_file],
        capture_output=True,
        text=True,
        check=True,
        env={**environment, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)},
    )
    # Else it is asked six times, with a line on stderr and a longer pause after each.
    assert result.stderr == ""
    assert "not all in the cache: the Hub is out of reach (" in result.stdout


@pytest.mark.parametrize("text", ["lm-eval:", "lm-eval::acc", "lm-eval:a:", "lm-eval:a:b:c", "arc_easy"])
def test_what_is_no_task_is_said(text):
    with pytest.raises(UsageError, match="is not a task; write lm-eval:TASK or lm-eval:TASK:METRIC"):
        parse_task(text)


def test_a_task_is_parsed_and_spelt_alike():
    for text in ("lm-eval:arc_easy", "lm-eval:gsm8k:exact_match,strict-match", "lm-eval:./own/task.yaml:acc"):
        assert str(parse_task(text)) == text


def test_a_report_has_the_tasks_and_files_that_were_asked_for(tmp_path, task_file):
    skill = tmp_path / "spanish.jsonl"
    skill.write_text(miniature.path("target").parent.joinpath("prompts", "skill.jsonl").read_text())
    names = f"lm-eval:{task_file}:acc, {skill}"
    few = write_few(tmp_path / "few", 2)
    result = call("evaluate", MODEL, "--prompts", few, "--skills", names, "--max-new-tokens", 12, "--json")
    assert result.exit_code == 0, result.stderr
    task, spanish = json.loads(result.stdout)["skills"]
    assert task["name"] == f"lm-eval:{task_file}:acc"
    assert 0 <= task["score"] <= 1
    assert (spanish["name"], spanish["num_questions"]) == ("spanish", 80)
    assert spanish["score"] > 0.9


def test_a_search_goes_by_a_task(tmp_path, task_file, write_recipe):
    recipe = write_recipe(
        MODEL, miniature.path("source"), evaluator="'lm-eval:sums:acc'", prompts=write_few(tmp_path / "few", 4),
        max_new_tokens=2,
    )  # fmt: skip
    result = call("search", recipe, "--task-file", task_file)
    # The source adds no better than the target, so that there is nothing to gain by this evaluator.
    assert result.exit_code == 3
    assert "copied the lm-eval:sums:acc is " in result.stderr


EVIL = """
task: evil
dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: !function evil.ask
doc_to_choice: "{{choices}}"
doc_to_target: right
metric_list: [{metric: acc}]
"""


@pytest.fixture
def evil_file(task_file):
    """A task file that leaves a file behind if it runs."""
    path = task_file.with_name("evil.yaml")
    path.write_text(EVIL)
    ran = path.with_name("ran")
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\ndef ask(doc):\n    return doc['question']\n"
    path.with_name("evil.py").write_text(code)
    return path, ran


@pytest.mark.parametrize("key", ["skills", "evaluator"])
def test_a_task_file_of_a_recipe_never_runs(tmp_path, evil_file, write_recipe, key):
    path, ran = evil_file
    pair = MODEL, miniature.path("source")
    told = f"{key} names the task file "
    for name in (f"lm-eval:{path}:acc", f"lm-eval:{path}"):
        recipe = write_recipe(*pair, prompts="miniature", **{key: f"'{name}'"}, layers='"3-6"')
        calls = {
            "run": (recipe, tmp_path / "out"), "search": (recipe,), "plan": (recipe,), "outdated": (recipe,),
            "trace": (recipe, tmp_path / "t"), "compare": (recipe, "--out", tmp_path / "c"),
        }  # fmt: skip
        for command, arguments in calls.items():
            result = call(command, *arguments)
            assert (result.exit_code, told in result.stderr) == (2, True), (command, result.stderr)
        with pytest.raises(DapaError, match="names the task file"):
            configuration(*pair, prompts="miniature", **{key: name})
    assert not ran.exists()


@pytest.mark.parametrize("name", ["evil", "arc_easy", "evil,x"])
def test_a_file_with_the_name_of_a_task_never_runs(tmp_path, evil_file, write_recipe, monkeypatch, name):
    path, ran = evil_file
    monkeypatch.chdir(path.parent)
    path.with_name("arc_easy").write_bytes(path.read_bytes())
    path.with_name("evil").write_bytes(path.read_bytes())
    recipe = write_recipe(
        MODEL, miniature.path("source"), prompts="miniature", skills=f"'lm-eval:{name}'", layers='"3-6"'
    )
    assert call("run", recipe, tmp_path / "out").exit_code in (2, 5)
    # Whoever trusts another file trusts only that.
    with pytest.raises(UsageError, match=r"names a task file, which would run; name it with --task-file"):
        Harness(Task(str(path)), [path.with_name("sums.yaml")])
    assert not ran.exists()


def test_a_task_of_a_file_that_the_user_names_is_found_by_its_name_from_any_folder(
    tmp_path, task_file, evil_file, loaded, monkeypatch
):
    path, ran = evil_file
    wanted = harness_of(task_file, "acc").score(*loaded, batch_size=2)
    monkeypatch.chdir(tmp_path)
    few = write_few(tmp_path / "few", 2)
    result = call(
        "evaluate", MODEL, "--prompts", few, "--skills", "lm-eval:tasks/sums.yaml:acc, lm-eval:evil:acc",
        "--task-file", "tasks/evil.yaml", "--max-new-tokens", 2, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    sums, evil = json.loads(result.stdout)["skills"]
    assert (sums["name"], sums["score"]) == ("lm-eval:tasks/sums.yaml:acc", wanted)
    assert evil["name"] == "lm-eval:evil:acc"
    assert ran.exists()
    variables = {"DAPA_TASK_FILE": os.pathsep.join(map(str, (task_file, path)))}
    assert Options.from_environment(environment=variables).task_files == (task_file, path)


def test_a_changed_task_file_is_another_evaluator(task_file):
    before = harness_of(task_file).identity
    assert before == harness_of(task_file).identity
    task_file.write_text(task_file.read_text() + "# changed\n")
    assert harness_of(task_file).identity != before


def test_a_task_file_cannot_take_the_name_of_another_task(task_file):
    task_file.write_text(task_file.read_text().replace("task: sums", "task: arc_easy"))
    with pytest.raises(UsageError, match=r"sums\.yaml calls its task arc_easy, as the harness does its own"):
        Harness(Task("arc_easy"), [task_file])


def test_a_task_that_runs_what_the_model_writes_is_refused_at_once(task_file):
    task_file.write_text(task_file.read_text() + "unsafe_code: true\n")
    with pytest.raises(UsageError, match="runs code that the model writes"):
        harness_of(task_file)
