"""Evaluators of the user's own: found, asked, and refused where they misbehave."""

from __future__ import annotations

import importlib
import json
import math
import re
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import answer, call, write_few
from hypothesis import given
from hypothesis import strategies as st

import dapa_merge
from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import UsageError
from dapa_merge.measure import callback
from dapa_merge.measure.callback import Candidate, evaluator, find_callback, load_file
from dapa_merge.measure.evaluators import Scorer, ask, find_evaluator, substance
from dapa_merge.measure.live import load_model
from dapa_merge.recipe.options import Options

PAIR = miniature.path("target"), miniature.path("source")


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(callback, "_REGISTERED", {})


@pytest.fixture(scope="module")
def candidate():
    model, tokenizer = load_model(open_checkpoint(str(PAIR[0])), torch.device("cpu"))
    return Candidate(model, tokenizer, ())


@pytest.fixture
def write_evaluators(tmp_path):
    def write(text: str):
        path = tmp_path / "mine.py"
        path.write_text("import dapa_merge\n\n" + textwrap.dedent(text))
        return path

    return write


def test_a_registered_function_is_found_by_its_name():
    @evaluator("mine")
    def score(candidate):
        return 0.5

    assert find_callback("mine", None) is score
    assert dapa_merge.evaluator is evaluator


@pytest.mark.parametrize("name", ["", " ", "lm-eval:mine"])
def test_a_name_that_a_recipe_could_not_mean_is_refused(name):
    with pytest.raises(UsageError, match="is not a name for an evaluator"):
        evaluator(name)


@given(st.floats(0, 1) | st.sampled_from([0, 1]))
def test_a_share_is_handed_through(value):
    model = torch.nn.Linear(1, 1)
    assert ask("mine", lambda _: value, Candidate(model, None, ())) == value


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (math.nan, "nan"), (math.inf, "inf"), (-0.1, "-0.1"), (1.5, "1.5"), (True, "bool"), (None, "NoneType"),
        ("0.5", "str"), (torch.tensor(0.5), "Tensor"), ([0.5], "list"),
    ],
)  # fmt: skip
def test_anything_but_a_share_is_an_error_that_names_the_evaluator(value, shown):
    with pytest.raises(
        UsageError, match=rf"^the evaluator 'mine' returned {shown}; it must return a float from 0 to 1$"
    ):
        ask("mine", lambda _: value, Candidate(torch.nn.Linear(1, 1), None, ()))


def test_a_function_that_raises_is_named_with_its_reason():
    def score(candidate):
        raise KeyError("answers.json")

    with pytest.raises(UsageError, match=r"^the evaluator 'mine' failed: KeyError: 'answers.json'$"):
        ask("mine", score, Candidate(torch.nn.Linear(1, 1), None, ()))


@pytest.mark.parametrize("code", ["sys.exit()", "sys.exit(0)", "raise SystemExit('done')", "raise GeneratorExit"])
def test_leaving_python_is_no_success(write_evaluators, code):
    path = write_evaluators(f"import sys\n@dapa_merge.evaluator('leaves')\ndef score(candidate):\n    {code}\n")
    with pytest.raises(UsageError, match=r"^the evaluator 'leaves' failed: (SystemExit|GeneratorExit)"):
        ask("leaves", find_callback("leaves", path), Candidate(torch.nn.Linear(1, 1), None, ()))
    with pytest.raises(UsageError, match=r"mine\.py cannot be run: (SystemExit|GeneratorExit)"):
        load_file(write_evaluators(f"import sys\n{code}\n"))


def test_ctrl_c_stays_ctrl_c():
    def score(candidate):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask("mine", score, Candidate(torch.nn.Linear(1, 1), None, ()))


def test_an_asynchronous_function_is_refused_and_leaves_no_warning():
    async def score(candidate):
        return 0.5

    with pytest.raises(UsageError, match="'mine' returned coroutine; it must return a float"):
        ask("mine", score, Candidate(torch.nn.Linear(1, 1), None, ()))


def test_what_an_evaluator_prints_goes_to_stderr(write_evaluators, capsys):
    path = write_evaluators(
        """
        print("at import")
        @dapa_merge.evaluator("talks")
        def score(candidate):
            print("at work")
            return 0.5
        """
    )
    ask("talks", find_callback("talks", path), Candidate(torch.nn.Linear(1, 1), None, ()))
    assert capsys.readouterr() == ("", "at import\nat work\n")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@given(data=st.data())
def test_one_changed_bit_of_any_weight_changes_the_substance(dtype, data):
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    model = torch.nn.Module()
    model.register_parameter("weight", torch.nn.Parameter(torch.ones(shape, dtype=dtype), requires_grad=False))
    before = substance(model, None)
    assert substance(model, None) == before
    bits = model.weight.data.view(-1).view(torch.uint8)
    bits[data.draw(st.integers(0, len(bits) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert substance(model, None) != before


def test_an_evaluator_that_changes_the_weights_is_refused(candidate):
    weight = candidate.model.model.layers[4].mlp.up_proj.weight
    kept = weight.clone()

    def score(candidate):
        weight.data[3, 5] += 1  # Through `data`, which autograd's own version counter does not see.
        return 1.0

    try:
        with pytest.raises(
            UsageError, match=r"'mine' changed the model's weights \(model.layers.4.mlp.up_proj.weight\)"
        ):
            ask("mine", score, candidate)
    finally:
        weight.data.copy_(kept)


@pytest.mark.parametrize(
    ("change", "undo", "what"),
    [
        (
            lambda model: model.model.rotary_emb.inv_freq.mul_(2),
            lambda model: model.model.rotary_emb.inv_freq.div_(2),
            r"buffers \(model\.rotary_emb\.inv_freq\)",
        ),
        (
            lambda model: model.lm_head.register_forward_hook(lambda *_: None),
            lambda model: model.lm_head._forward_hooks.clear(),
            r"hooks \(lm_head\)",
        ),
        (
            lambda model: setattr(model, "forward", lambda **_: None),
            lambda model: delattr(model, "forward"),
            r"modules \(the model itself\)",
        ),
        (
            lambda model: setattr(model.model.layers[0].mlp, "act_fn", torch.nn.ReLU()),
            lambda model: setattr(model.model.layers[0].mlp, "act_fn", torch.nn.SiLU()),
            r"modules \(model\.layers\.0\.mlp\.act_fn\)",
        ),
    ],
)
def test_an_evaluator_that_changes_more_than_weights_is_refused_too(candidate, change, undo, what):
    def score(candidate):
        change(candidate.model)
        return 1.0

    try:
        with pytest.raises(UsageError, match=f"^the evaluator 'mine' changed the model's {what}; "):
            ask("mine", score, candidate)
    finally:
        undo(candidate.model)


def test_a_weight_that_was_replaced_by_its_like_is_noticed_since_transplants_would_miss_it(candidate):
    kept = candidate.model.lm_head.weight

    def score(candidate):
        candidate.model.lm_head.weight = torch.nn.Parameter(kept.clone(), requires_grad=False)
        return 1.0

    try:
        with pytest.raises(UsageError, match=r"changed the model's weights \(lm_head\.weight\)"):
            ask("mine", score, candidate)
    finally:
        candidate.model.lm_head.weight = kept


def test_modes_and_settings_that_an_evaluator_changes_are_put_back_also_when_it_fails(candidate):
    model, tokenizer = candidate.model, candidate.tokenizer

    def state():
        settings = [model.config.to_json_string(), model.generation_config.to_json_string(), tokenizer.padding_side]
        modes = [module.training for module in model.modules()]
        gradients = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
        return settings, tokenizer.chat_template, tokenizer.pad_token_id, modes, gradients, generation

    def score(candidate):
        model.train()
        model.generation_config.do_sample = True
        model.generation_config = type(generation)(num_beams=7)
        model.config.use_cache = False
        tokenizer.padding_side = "right"
        tokenizer.chat_template = "{{ messages }}"
        tokenizer.pad_token = tokenizer.unk_token
        model.requires_grad_(True)
        model(torch.tensor([[1, 2]])).logits.sum().backward()
        raise RuntimeError("no disk")

    generation = model.generation_config
    before = state()
    with pytest.raises(UsageError, match="no disk"):
        ask("mine", score, candidate)
    assert state() == before
    assert model.generation_config is generation


def test_an_evaluator_may_ask_for_whatever_a_model_gives(candidate):
    """Hidden states make transformers install hooks of its own, for good."""

    def score(candidate):
        ids = candidate.tokenizer(["one two", "one"], return_tensors="pt", padding=True)
        candidate.model(ids["input_ids"], output_hidden_states=True, output_attentions=True)
        candidate.model.generate(**ids, max_new_tokens=2)
        return 0.5

    assert ask("mine", score, candidate) == 0.5


def test_a_file_registers_its_evaluators_once(write_evaluators):
    path = write_evaluators(
        """
        @dapa_merge.evaluator("from-file")
        def score(candidate):
            return 0.25
        """
    )
    function = find_callback("from-file", path)
    assert function(None) == 0.25
    load_file(path)
    assert find_callback("from-file", path) is function
    found = find_evaluator("from-file", Options(evaluator_file=path))
    assert isinstance(found, Scorer)
    changed = path.read_text().replace("0.25", "0.75")
    path.write_text(changed)
    assert find_evaluator("from-file", Options(evaluator_file=path)).identity != found.identity


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("1 / 0", "cannot be run: ZeroDivisionError: division by zero"), ("def", "cannot be run: SyntaxError")],
)
def test_a_file_that_cannot_be_run_is_one_sentence(write_evaluators, text, sentence):
    with pytest.raises(UsageError, match=sentence):
        load_file(write_evaluators(text))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"the evaluator file .*missing\.py does not exist"):
        load_file(tmp_path / "missing.py")


def test_a_file_that_is_no_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"^the evaluator file .* is a folder; name a Python file$"):
        load_file(tmp_path)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match=r"mine\.txt is not a Python file; its name must end in \.py"):
        load_file(tmp_path / "mine.txt")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x = 1", r"registers no evaluator; write @dapa_merge\.evaluator\(\"a-name\"\) above a function"),
        ("@dapa_merge.evaluator\ndef f(c): ...", r"cannot be run: @dapa_merge\.evaluator needs a name: write "),
        ("@dapa_merge.evaluator('judge')\ndef f(c): ...", "cannot be run: 'judge' is the name of a built-in evaluator"),
        (
            "@dapa_merge.evaluator('a')\ndef f(c): ...\n@dapa_merge.evaluator('a')\ndef g(c): ...",
            "cannot be run: two evaluators have the name 'a'",
        ),
    ],
)
def test_a_file_that_registers_what_cannot_be_meant_is_one_sentence(write_evaluators, text, sentence):
    path = write_evaluators(text)
    with pytest.raises(UsageError, match=rf"^the evaluator file .*mine\.py {sentence}"):
        load_file(path)
    # Also where another evaluator is asked for.
    with pytest.raises(UsageError, match=sentence):
        find_evaluator("refusal", Options(evaluator_file=path))


def test_what_a_file_registers_is_known_with_that_file_only(write_evaluators):
    path = write_evaluators("@dapa_merge.evaluator('in-file')\ndef f(c): ...")
    with pytest.raises(UsageError, match=r"'other'; known are .*in-file; your own come from .*mine\.py$"):
        find_evaluator("other", Options(evaluator_file=path))
    assert find_callback("in-file", None) is None


def test_a_file_may_be_named_in_the_environment(write_evaluators, monkeypatch, tmp_path):
    path = write_evaluators("@dapa_merge.evaluator('half')\ndef f(c): return 0.5")
    monkeypatch.setenv("DAPA_EVALUATOR_FILE", str(path))
    assert Options.from_environment().evaluator_file == path
    settings = ("--prompts", write_few(tmp_path / "few", 2), "--max-new-tokens", 2, "--json")
    assert answer("evaluate", PAIR[0], "--evaluator", "half", *settings)["score"] == 0.5


def test_an_installed_package_declares_evaluators(tmp_path, monkeypatch):
    """A real distribution on the path, as pip would leave it."""
    (tmp_path / "somebodys_scores.py").write_text("def fluency(candidate):\n    return 0.125\n")
    metadata = tmp_path / "somebodys_scores-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-scores\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[dapa_merge.evaluators]\nfluency = somebodys_scores:fluency\nbroken = nowhere_at_all:score\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert find_callback("fluency", None)(None) == 0.125
    with pytest.raises(
        UsageError, match="evaluator 'broken' of nowhere_at_all:score cannot be imported: ModuleNotFound"
    ):
        find_callback("broken", None)
    with pytest.raises(
        UsageError, match=r"known are refusal, paper, judge, lm-eval:TASK:METRIC, broken, fluency; your"
    ):
        find_evaluator("unknown", Options())


def test_a_search_goes_by_an_evaluator_of_ones_own(tmp_path, write_recipe, write_evaluators, no_pictures):
    """It likes candidates by their layers alone, so that the answer is known without asking a prompt."""
    path = write_evaluators(
        """
        @dapa_merge.evaluator("layers-2-and-7")
        def score(candidate):
            assert candidate.model.training is False
            return len({unit.layer for unit in candidate.selection} & {2, 7}) / 2
        """
    )
    few = write_few(tmp_path / "few", 8)
    recipe = write_recipe(*PAIR, evaluator="layers-2-and-7", prompts=few, max_new_tokens=4, batch_size=8)
    result = call("run", recipe, tmp_path / "out", "--evaluator-file", path, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["layers"] == [2, 7]
    assert report["requirement"]["measure"] == "layers-2-and-7"
    assert (report["before"]["score"], report["after"]["score"]) == (0, 1)
    assert report["searched"]["measure"] == "layers-2-and-7"
    # Whatever it scored, the report has the honest figures too.
    assert report["before"]["num_harmful"] == 4


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("return float('nan')", "the evaluator 'bad' returned nan; it must return a float from 0 to 1"),
        ("raise RuntimeError('no disk')", "the evaluator 'bad' failed: RuntimeError: no disk"),
        ("candidate.model.lm_head.weight.data.zero_(); return 1.0", "the evaluator 'bad' changed the model's weights"),
        ("candidate.model.model.rotary_emb.inv_freq.zero_(); return 1.0", "changed the model's buffers"),
        ("raise SystemExit", "the evaluator 'bad' failed: SystemExit"),
        ("return 0.5", "the bad is 0.500, and without them 0.500"),
    ],
)
def test_a_bad_evaluator_ends_a_run_in_one_sentence_and_writes_nothing(
    tmp_path, write_recipe, write_evaluators, body, sentence
):
    path = write_evaluators(f"@dapa_merge.evaluator('bad')\ndef score(candidate):\n    {body}\n")
    few = write_few(tmp_path / "few", 4)
    recipe = write_recipe(*PAIR, evaluator="bad", prompts=few, max_new_tokens=2, batch_size=8)
    result = call("run", recipe, tmp_path / "out", "--evaluator-file", path)
    assert result.exit_code == (3 if "0.500" in sentence else 2)
    assert sentence in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_example_of_the_documents_runs(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "measuring.md").read_text()
    (code,) = re.findall(r"```python\n(import dapa_merge\n.*?)```", text, re.DOTALL)
    path = tmp_path / "mine.py"
    path.write_text(code)
    settings = ("--prompts", write_few(tmp_path / "few", 2), "--max-new-tokens", 2, "--json")
    figures = answer("evaluate", PAIR[0], "--evaluator", "counts", "--evaluator-file", path, *settings)
    # The miniature was never taught to count, but it is asked.
    assert figures["score"] in (0, 1)


def test_an_unknown_evaluator_is_named_before_a_model_is_loaded(tmp_path, write_recipe):
    result = call("run", write_recipe(*PAIR, evaluator="helpfulness", prompts="miniature"), tmp_path / "out")
    assert result.exit_code == 2
    assert "evaluator 'helpfulness'; known are refusal, paper, judge" in result.stderr
    assert "loading" not in result.stderr
