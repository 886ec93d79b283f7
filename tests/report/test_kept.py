"""What a report says of the fine-tune's own prompts, of the source's refusals, and of the limits."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from conftest import answer, call, skip_drawing
from hypothesis import given
from hypothesis import strategies as st

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.figures import KEEP, Response
from dapa_merge.measure.generate import generate
from dapa_merge.measure.live import choose_device, load_model
from dapa_merge.measure.meter import report_meter
from dapa_merge.measure.prompts.parts import split_prompts
from dapa_merge.measure.statistics import beside_source, interval, kept_figure
from dapa_merge.plan.ladder import make_ladder
from dapa_merge.publish.write_card import write_card
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.report.page import read_responses, read_sources
from dapa_merge.report.report import read_report
from dapa_merge.report.sentences import kept_text, meaning_lines
from dapa_merge.search.forecast import forecast

PAIR = miniature.path("shadow-target"), miniature.path("shadow-source")
REFUSED, ANSWERED, DEGENERATE = "refused", "complied", "degenerate"
outcomes = st.sampled_from([REFUSED, ANSWERED, DEGENERATE])
answers = st.lists(st.tuples(outcomes, st.sampled_from(["a b c", "a b d", "e"])), min_size=1, max_size=12)


def said(*given: tuple[str, str], kind: str = KEEP) -> list[Response]:
    return [Response(kind, "", f"prompt {at}", text, outcome) for at, (outcome, text) in enumerate(given)]


@given(st.data(), answers)
def test_every_keep_prompt_is_answered_as_before_or_otherwise_or_refused_or_without_content(data, before):
    after = data.draw(
        st.lists(st.tuples(outcomes, st.sampled_from(["a b c", "e"])), min_size=len(before), max_size=len(before))
    )
    found = kept_figure(said(*before), said(*after))
    same = [was[1] == now[1] for was, now in zip(before, after, strict=True)]
    changed = [now[0] for now, is_same in zip(after, same, strict=True) if not is_same]
    assert (found.num_prompts, found.num_same) == (len(before), sum(same))
    assert found.num_other == changed.count(ANSWERED)
    assert found.num_refused == [outcome for outcome, _ in after].count(REFUSED)
    pairs = [(was[0], now[0]) for was, now in zip(before, after, strict=True)]
    assert found.num_newly_refused == sum(now == REFUSED != was for was, now in pairs)
    assert found.num_degenerate == [outcome for outcome, _ in after].count(DEGENERATE)
    assert found.same_interval == interval(sum(same), len(same))


def test_the_target_answers_as_itself_and_other_prompts_do_not_count():
    target = said((ANSWERED, "one two three four"), (REFUSED, "no")) + said((REFUSED, "no"), kind="harmless")
    own = kept_figure(target, target)
    assert own.same_interval == (1.0, 1.0)
    assert (own.num_prompts, own.num_same, own.num_other, own.num_refused, own.num_newly_refused) == (2, 2, 0, 1, 0)
    # Three of four words, in order.
    other = kept_figure(target, [replace(target[0], response="one two five four"), *target[1:]])
    assert (other.num_same, other.num_other, other.words_shared) == (1, 1, 0.75)
    assert kept_figure(target[2:], target[2:]) is None


SENTENCES = {
    "all as before": (
        ((ANSWERED, "a"),) * 3, ((ANSWERED, "a"),) * 3, ((REFUSED, "no"), (ANSWERED, "a"), (ANSWERED, "b")),
        "3 of 3 keep prompts answered word for word as before; none refused (the source refuses 1)",
    ),
    "one otherwise": (
        ((ANSWERED, "a b"), (ANSWERED, "a")), ((ANSWERED, "a c"), (ANSWERED, "a")), ((ANSWERED, "x"),) * 2,
        "1 of 2 keep prompts answered word for word as before, 1 otherwise (50 % of their words the same); "
        "none refused",
    ),
    "some refused as the source refuses them": (
        ((ANSWERED, "a"),) * 4, ((REFUSED, "no"), (REFUSED, "no"), (ANSWERED, "a"), (DEGENERATE, "")),
        ((REFUSED, "no"), (ANSWERED, "a"), (REFUSED, "no"), (REFUSED, "no")),
        "1 of 4 keep prompts answered word for word as before; 2 refused and answered before "
        "(the source refuses 3, 1 of these among them); 1 without content",
    ),
    "refused before": (
        ((REFUSED, "no"),), ((REFUSED, "no"),), ((ANSWERED, "a"),),
        "1 of 1 keep prompts answered word for word as before; 1 refused as before",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SENTENCES)
def test_one_sentence_says_what_became_of_the_keep_prompts(case):
    target, result, source, expected = SENTENCES[case]
    figure = kept_figure(said(*target), said(*result))
    assert kept_text(figure, beside_source(said(*result), said(*source))) == expected


@pytest.fixture(scope="module")
def repaired(few, tmp_path_factory):
    """A run with keep prompts that finds directions: the recipe, the result and its report, and what was printed."""
    folder = tmp_path_factory.mktemp("kept")
    rows = (PAIR[0].parent / "prompts" / "skill.jsonl").read_text().splitlines()
    (folder / "mine.jsonl").write_text(
        "".join(json.dumps({"prompt": json.loads(row)["prompt"]}) + "\n" for row in rows[::3])
    )
    (folder / "recipe.yml").write_text(json.dumps({
        "merge_method": "dapa", "base_model": str(PAIR[0]), "models": [{"model": str(PAIR[1])}],
        "parameters": {
            "prompts": str(few), "keep": str(folder / "mine.jsonl"), "edit": "directions", "max_new_tokens": 12,
        },
    }))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        skip_drawing(patch, "png", "svg")
        result = call("run", folder / "recipe.yml", folder / "out", "--journal", folder / "journal.jsonl")
    assert result.exit_code == 0, result.stderr
    return folder / "recipe.yml", folder / "out", read_report(folder / "out"), result


def test_the_held_out_keep_prompts_are_put_to_all_three_models(repaired):
    path, out, report, _ = repaired
    parts = split_prompts(load_recipe(path))
    models = read_responses(out / "dapa_responses.jsonl")
    kept = {name: [one for one in responses if one.kind == KEEP] for name, responses in models.items()}
    for responses in kept.values():
        assert tuple(one.prompt for one in responses) == parts.report.keep
    assert not {*parts.report.keep} & {*parts.search.keep, *parts.choice.keep}
    loaded = load_model(open_checkpoint(str(out)), choose_device("cpu"))
    spoken = generate(*loaded, parts.report.keep, max_new_tokens=12, batch_size=BatchSize(8))
    assert [one.response for one in kept["result"]] == list(spoken)
    for column, name in (("before", "target"), ("after", "result"), ("source_alone", "source")):
        # As text, since NaN is not equal to itself.
        assert repr(getattr(report, column).kept) == repr(kept_figure(kept["target"], kept[name]))
    assert report.before.kept.num_same == len(parts.report.keep) > report.source_alone.kept.num_same
    assert report.beside_source == beside_source(models["result"], models["source"])


def test_the_same_sentences_are_on_the_terminal_in_the_card_on_the_page_and_in_a_notebook(repaired):
    _, out, report, result = repaired
    lines = meaning_lines(report)
    assert [label for label, _ in lines] == ["still answered", "kept", "beside the source", "limits", ""]
    places = [result.stdout, write_card(out).read_text(), read_sources([out]).text(), report._repr_html_()]
    for _, fact in lines:
        # Escaped, in HTML.
        assert all(fact in place.replace("&gt;", ">") for place in places), fact
    assert "held-out prompts" in lines[-1][1]


def test_the_answers_to_the_keep_prompts_can_be_held_to_limits(repaired, tmp_path):
    out = tmp_path / "dapa_report.json"
    content = repaired[2].to_json()
    # Some must be refused for a limit below.
    content["after"]["kept"] |= {"num_refused": 2, "num_newly_refused": 2, "num_same": 4}
    out.write_text(json.dumps(content))
    report = read_report(out)
    kept = report.after.kept
    for value, word, options in (
        (kept.share_same, "min-kept", ()),
        (kept.same_interval[0], "min-kept", ("--confident",)),
        (kept.num_newly_refused / kept.num_prompts, "max-kept-refused", ()),
    ):
        for limit, code in ((value, 0), (value + (0.001 if word == "min-kept" else -0.001), 6)):
            result = call("gate", out, f"--{word}", limit, *options, "--json")
            assert result.exit_code == code, result.output
            assert json.loads(result.stdout)["gates"][0]["value"] == pytest.approx(value)
    # Without keep prompts nothing is known.
    for column in ("before", "after", "source_alone"):
        del content[column]["kept"]
    out.write_text(json.dumps(content))
    assert call("gate", out, "--min-kept", 0).exit_code == 6
    assert "not measured" in call("gate", out, "--max-kept-refused", 1).stdout


def test_each_limit_of_the_recipe_is_there_once_for_the_search_prompts_and_once_for_the_held_out_ones(repaired):
    _, _, report, result = repaired
    searched, held_out = (
        [one for one in report.limits if one.prompts == name] for name in ("search prompts", "held-out prompts")
    )
    names = ["DSR", "over-refusal", "perplexity"]
    assert [one.figure for one in searched] == [one.figure for one in held_out] == names
    found = next(point for point in reversed(report.points) if point.number == report.picked or point.part_of)
    assert [one.value for one in searched] == [found.figures[name] for name in ("score", "over_refusal", "perplexity")]
    assert [one.value for one in held_out] == [report.after.dsr, report.after.over_refusal, report.after.perplexity]
    # Relative to the target's figures on the same prompts.
    assert held_out[1].limit == pytest.approx(report.before.over_refusal + 0.05)
    assert held_out[2].limit == pytest.approx(report.before.perplexity * 1.05)
    for one in report.limits:
        assert one.is_met == (one.value >= one.limit if one.is_floor else one.value <= one.limit)
    assert f"the limits: DSR at least {searched[0].limit:.3f}" in result.stderr
    full = float(re.search(r"with all 30 units copied: DSR ([0-9.]+)", result.stderr)[1])
    assert searched[0].limit == pytest.approx(0.95 * full)
    assert str(searched[0]).endswith(f", 95 % of the way from 0.000 to the {full:.3f} that all units reach)")
    assert not any(one.why for one in report.limits[1:])


def test_messages_say_once_which_prompts_are_which_and_call_them_so(repaired):
    path, _, report, result = repaired
    parts = split_prompts(load_recipe(path))
    numbers = {
        name: f"{len(part.harmful)} harmful, {len(part.harmless)} harmless and {len(part.keep)} keep"
        for name, part in (("report", parts.report), ("search", parts.search), ("choice", parts.choice))
    }
    assert (
        f"held-out prompts, for the report alone: {numbers['report']}; search prompts: {numbers['search']}; "
        f"choice prompts: {numbers['choice']}\n"
    ) in result.stderr
    seen = f"{report.searched.num_harmful} harmful and {report.searched.num_harmless} harmless search prompts: DSR "
    assert f"the target, on {seen}" in result.stderr
    told = f"{report.after.num_harmful} harmful and {report.after.num_harmless} harmless held-out prompts: DSR "
    assert f"measured the result on {told}" in result.stderr
    assert "the softened divergence is " in result.stderr
    assert "held-out prompts" in result.stdout.splitlines()[1]
    assert "point (search prompts)" in result.stdout


def test_the_forecast_counts_the_keep_prompts_that_the_report_asks(repaired):
    path, _, report, _ = repaired
    recipe = load_recipe(path)
    meter = replace(report_meter(recipe, split_prompts(recipe).report, Options("cpu")), asks_keep=True)
    asked = forecast(make_ladder(recipe), Options("cpu")).prompts
    assert asked == 3 * meter.num_prompts
    assert meter.num_prompts - replace(meter, asks_keep=False).num_prompts == report.after.kept.num_prompts


def test_named_layers_are_measured_on_all_keep_prompts(few, tmp_path, write_recipe, no_pictures):
    (tmp_path / "mine.txt").write_text("Say red house in Spanish.\nSay blue car in Spanish.\n")
    recipe = write_recipe(*PAIR, layers="3", prompts=few, keep=tmp_path / "mine.txt", max_new_tokens=12)
    report = answer("run", recipe, tmp_path / "out", "--json")
    assert [report[one]["kept"]["num_prompts"] for one in ("before", "after", "source_alone")] == [2, 2, 2]
    assert (report["held_out"], report["limits"]) == (False, [])
    assert forecast(make_ladder(load_recipe(recipe)), Options("cpu")).prompts == 3 * (32 + 32 + 2)


def test_without_keep_prompts_and_skills_a_report_says_that_nothing_was_measured_of_the_fine_tune(demo):
    report = read_report(demo[0])
    assert "kept" not in dict(meaning_lines(report))
    unskilled = replace(report, after=replace(report.after, skills=()))
    assert meaning_lines(unskilled)[1] == (
        "kept", "NOT measured: neither `keep` nor `skills` names prompts that the fine-tune is for",
    )  # fmt: skip


def test_a_limit_that_the_held_out_prompts_break_is_named(demo):
    report = read_report(demo[0])
    assert [one.value is None for one in report.limits] == [False, True, True, False, False, False]
    broken = replace(report.limits[-1], is_met=False)
    lines = meaning_lines(replace(report, limits=(*report.limits[:-1], broken)))
    assert lines[-1][1].startswith(f"NOT met by {broken.figure} on 64 harmful and 64 harmless held-out prompts: ")
    assert lines[-2][1].startswith("all met on 64 harmful and 64 harmless search prompts: DSR 0.953 (at least 0.950, ")


def test_a_report_of_an_earlier_version_is_read_without_all_this(demo, tmp_path):
    content = json.loads((demo[0] / "dapa_report.json").read_text())
    for name in ("beside_source", "held_out", "limits"):
        del content[name]
    for column in ("before", "after", "source_alone"):
        del content[column]["kept"]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(content))
    assert meaning_lines(read_report(path)) == [("still answered", "1 of 64 harmful prompts (the source answers none)")]
