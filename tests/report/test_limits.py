"""Gates on the figures of a report."""

import json
import shutil

import pytest
from conftest import call

from dapa_merge.report.report import read_report


def gate(out, *options: object) -> tuple[int, dict]:
    ran = call("gate", out, *options, "--json")
    assert ran.exit_code in (0, 6), ran.output
    return ran.exit_code, json.loads(ran.stdout)


@pytest.fixture
def out(demo):
    return demo[0]


def test_a_report_comes_back_as_it_was(out):
    content = json.loads((out / "dapa_report.json").read_text())
    assert read_report(out).to_json() == content
    assert read_report(out / "dapa_report.json") == read_report(out)


FIGURES = {
    "--min-dsr": lambda before, after: after["dsr"],
    "--min-dsr-gain": lambda before, after: after["dsr"] - before["dsr"],
    "--max-over-refusal": lambda before, after: after["over_refusal"],
    "--max-over-refusal-rise": lambda before, after: after["over_refusal"] - before["over_refusal"],
    "--max-perplexity": lambda before, after: after["perplexity"],
    "--max-perplexity-ratio": lambda before, after: after["perplexity"] / before["perplexity"],
    "--max-divergence": lambda before, after: after["divergence"],
    "--min-skill": lambda before, after: after["skills"][0]["score"],
    "--min-skill-kept": lambda before, after: after["skills"][0]["score"] / before["skills"][0]["score"],
}


@pytest.mark.parametrize("option", FIGURES)
def test_a_figure_passes_at_its_limit_and_fails_beyond(demo, option, tmp_path):
    report = demo[1]
    # A share of nothing has no limit below it.
    report = {**report, "after": {**report["after"], "over_refusal": 0.25}}
    out = tmp_path / "dapa_report.json"
    out.write_text(json.dumps(report))
    value = FIGURES[option](report["before"], report["after"])
    code, said = gate(out, option, value)
    assert (code, said["passed"]) == (0, True)
    assert said["gates"][0]["value"] == pytest.approx(value)
    beyond = value + (0.001 if option.startswith("--min") else -0.001)
    code, said = gate(out, option, beyond)
    assert (code, said["passed"], said["gates"][0]["passed"]) == (6, False, False)


def test_one_of_several_that_fails_is_enough(out):
    code, said = gate(out, "--min-dsr", 0.5, "--min-skill", "skill=0.5", "--max-perplexity", 0.5)
    assert code == 6
    assert [one["passed"] for one in said["gates"]] == [True, False, True]


def test_the_worse_end_of_an_interval_can_be_asked(demo):
    out, report = demo
    after = report["after"]
    low, high = after["dsr_interval"][0], after["over_refusal_interval"][1]
    options = ("--min-dsr", low, "--max-over-refusal", high, "--min-skill", after["skills"][0]["interval"][0])
    code, said = gate(out, "--confident", *options)
    assert code == 0
    assert [one["value"] for one in said["gates"]] == pytest.approx([low, high, options[-1]])
    assert gate(out, "--confident", "--min-dsr", after["dsr"])[0] == 6


def test_what_was_not_measured_does_not_pass(demo, tmp_path):
    report = demo[1]
    path = tmp_path / "dapa_report.json"
    path.write_text(json.dumps({**report, "before": None, "after": None}))
    for option in FIGURES:
        code, said = gate(path, option, 0 if option.startswith("--min") else 1)
        assert (code, said["gates"][0]["value"]) == (6, None)
        assert "not measured" in call("gate", path, option, 0).stdout
    code, said = gate(demo[0], "--min-skill", "french=0.1")
    assert (code, said["gates"][0]["figure"], said["gates"][0]["value"]) == (6, "skill french", None)
    columns = ("before", "after", "source_alone")
    without = {column: {**report[column], "skills": [], "perplexity": None} for column in columns}
    path.write_text(json.dumps({**report, **without}))
    for option in ("--min-skill", "--min-skill-kept", "--max-perplexity", "--max-perplexity-ratio"):
        assert gate(path, option, 0 if option.startswith("--min") else 9)[0] == 6


def test_the_summary_of_a_job_gets_a_table(out, tmp_path, monkeypatch):
    summary = tmp_path / "summary.md"
    summary.write_text("# Before\n\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert gate(out, "--min-dsr", 0.9, "--max-perplexity", 1)[0] == 6
    text = summary.read_text()
    assert text.startswith("# Before\n\n### ")
    assert "| DSR | 0.984 | at least 0.9 | passes |" in text
    assert "| perplexity | 1.040 | at most 1 | **fails** |" in text
    other = tmp_path / "other.md"
    gate(out, "--min-dsr", 0.9, "--summary", other)
    assert "| DSR |" in other.read_text()
    assert summary.read_text() == text


BAD = {
    (): "no limit is given",
    ("--min-dsr", "nan"): "finite",
    ("--min-dsr", "much"): "not a valid float",
    ("--min-dsr", "60"): "60.0 is not in the range 0<=x<=1",
    ("--max-over-refusal", "-0.1"): "-0.1 is not in the range 0<=x<=1",
    ("--min-kept", "95"): "95.0 is not in the range 0<=x<=1",
    ("--max-kept-refused", "5"): "5.0 is not in the range 0<=x<=1",
    ("--min-dsr-gain", "30"): "30.0 is not in the range -1<=x<=1",
    ("--max-over-refusal-rise", "2"): "2.0 is not in the range -1<=x<=1",
    ("--min-skill", "much"): "write a number, or NAME=NUMBER",
    ("--min-skill", "=0.5"): "write a number, or NAME=NUMBER",
}


@pytest.mark.parametrize("options", BAD)
def test_what_cannot_be_asked_is_told(out, options):
    ran = call("gate", out, *options)
    assert ran.exit_code == 2
    assert BAD[options] in ran.stderr


def test_a_report_that_is_none_is_told(demo, tmp_path):
    out = shutil.copytree(demo[0], tmp_path / "out")
    (out / "dapa_report.json").write_text("[]")
    for place in (out, tmp_path / "nothing", tmp_path):
        ran = call("gate", place, "--min-dsr", 0.9)
        assert ran.exit_code == 4
        assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("before.dsr", lambda report: report["before"].pop("dsr")),
        ("after.dsr", lambda report: report["after"].update(dsr="0.9")),
        ("after.dsr_interval", lambda report: report["after"].update(dsr_interval=[0.5])),
        ("tests", lambda report: report.update(tests=True)),
        ("units", lambda report: report.update(units="3.gate")),
        ("requirement.min_score", lambda report: report["requirement"].update(min_score=[])),
    ],
)
def test_what_does_not_fit_in_a_report_is_named(demo, tmp_path, key, change):
    report = json.loads(json.dumps(demo[1]))
    change(report)
    path = tmp_path / "dapa_report.json"
    path.write_text(json.dumps(report))
    ran = call("gate", path, "--min-dsr", 0.9)
    assert ran.exit_code == 4
    assert f"{path} " in ran.stderr
    assert f" {key}" in ran.stderr
