"""The card of a result: valid for the Hub, true to the report, and without a path of this machine."""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from conftest import call
from hub_card import check_card
from huggingface_hub import ModelCard
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from publish.conftest import upload

from dapa_merge.checkpoint.location import without_paths
from dapa_merge.publish.card_file import BEGIN, END
from dapa_merge.publish.parents import metadata_of, split_card
from dapa_merge.recipe.parse import parse_recipe


def make_card(out: Path, *options: object) -> str:
    ran = call("card", out, *options)
    assert ran.exit_code == 0, ran.output
    text = (out / "README.md").read_text()
    assert check_card(text) == []
    # huggingface_hub's own reading of it gives the same metadata.
    assert ModelCard(text).data.to_dict().keys() == metadata_of(text).keys()
    return text


@pytest.fixture
def repaired(demo, tmp_path) -> Path:
    """The demonstration's result, which was measured."""
    return shutil.copytree(demo[0], tmp_path / "repaired")


@pytest.fixture
def copied(llama_pair, write_recipe, tmp_path) -> Path:
    """A result that was not measured, of a random pair."""
    out = tmp_path / "copied"
    assert call("run", write_recipe(*llama_pair, layers=1), out, "--no-evaluate").exit_code == 0
    return out


def test_the_card_says_what_the_report_says(repaired):
    report = json.loads((repaired / "dapa_report.json").read_text())
    text = make_card(repaired)
    rows = {
        cells[0].removeprefix("&nbsp;&nbsp;"): cells[1:]
        for line in text.splitlines()
        if line.startswith("| ") and len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 4
    }
    columns = [report[name] for name in ("before", "after", "source_alone")]
    assert rows["DSR (64 harmful)"] == [f"{one['dsr']:.3f}" for one in columns]
    assert rows["over-refusal (64 harmless)"] == [f"{one['over_refusal']:.3f}" for one in columns]
    assert rows["perplexity"] == [f"{one['perplexity']:.3f}" for one in columns]
    assert rows["skill (80 questions)"] == [f"{one['skills'][0]['score']:.3f}" for one in columns]
    low, high = report["after"]["dsr_interval"]
    assert f"95 % interval {low:.3f}-{high:.3f}" in text
    assert f"{100 * report['share_changed']:.2f} % of its parameters ({report['parameters_changed']:,})" in text
    assert f"asked {report['tests']} of 2^{report['num_candidates']} selections" in text
    for unit in report["certificate"]:
        assert f"- without the gate of layer {unit.partition('.')[0]}: " in text
    results = metadata_of(text)["model-index"][0]["results"]
    values = {metric["type"]: metric["value"] for result in results for metric in result["metrics"]}
    after = report["after"]
    assert values == {
        "dsr": pytest.approx(after["dsr"]),
        "over-refusal": pytest.approx(after["over_refusal"]),
        "perplexity": pytest.approx(after["perplexity"], abs=1e-6),
        "accuracy": pytest.approx(after["skills"][0]["score"]),
    }
    for name in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text):
        assert (repaired / name).is_file()
    assert text.count("![") == 2


def test_the_recipe_in_the_card_is_one_that_can_be_followed(repaired):
    text = make_card(repaired)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    report = json.loads((repaired / "dapa_report.json").read_text())
    assert [choice.layer for choice in parse_recipe(recipe).layers] == report["layers"]


def test_what_was_not_measured_is_said_to_be_so_and_no_figure_is_made_up(copied):
    text = make_card(copied)
    assert "**Not measured.**" in text
    assert "model-index" not in metadata_of(text)
    assert "| DSR" not in text
    assert "Treat it as the unaligned model" in text


@pytest.mark.parametrize("which", [pytest.param("repaired", marks=pytest.mark.xdist_group("demo")), "copied"])
def test_no_path_of_this_machine_is_in_a_card(which, request, llama_pair):
    out = request.getfixturevalue(which)
    text = make_card(out)
    for folder in (out.parent, Path.cwd(), Path.home(), llama_pair[0].parent):
        assert f"{folder}/" not in text
    assert "base_model" not in metadata_of(text)


def test_code_that_travels_with_a_model_is_named_as_the_targets(llama_pair, write_recipe, tmp_path):
    target = shutil.copytree(llama_pair[0], tmp_path / "target")
    config = json.loads((target / "config.json").read_text())
    classes = {"AutoModel": "modeling_x.X", "AutoConfig": "someone/model--configuration_x.X", "AutoTokenizer": "`x`.y"}
    (target / "config.json").write_text(json.dumps({**config, "auto_map": classes}))
    for name in ("other_x.py", "train.py"):
        (target / name).write_text("raise SystemExit")
    (target / "modeling_x.py").write_text("from .other_x import x")
    out = tmp_path / "out"
    assert call("run", write_recipe(target, llama_pair[1], layers=1), out, "--no-evaluate").exit_code == 0
    text = make_card(out)
    assert "`modeling_x.py`, `other_x.py`. That code is the target's" in text
    assert "`someone/model`" in text
    assert "train.py" not in text
    assert "`x`" not in text


PATHS = {
    "builtin": "builtin",
    "someone/set@v1?split=test": "someone/set@v1?split=test",
    "/data/me/my.csv?column=ask": "my.csv?column=ask",
    "advbench, ../mine/x.txt": "advbench,x.txt",
    "~/x.jsonl": "x.jsonl",
    "C:\\me\\x.csv": "x.csv",
    "lm-eval:arc_easy:acc": "lm-eval:arc_easy:acc",
}


@pytest.mark.parametrize("names", PATHS)
def test_names_lose_their_folders(names):
    assert without_paths(names) == PATHS[names]


def test_what_somebody_wrote_around_and_into_it_stays(repaired):
    text = make_card(repaired)
    head, body = split_card(text)
    metadata = {**yaml.safe_load(head), "datasets": ["a/b"], "language": ["es"], "license": "mit"}
    metadata["tags"] = [*metadata["tags"], "spanish"]
    (repaired / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\nAbove.\n{body}Below.\n")
    again = make_card(repaired)
    assert again.split("---\n", 2)[2].startswith("\nAbove.\n")
    assert again.endswith(f"{END}\n\nBelow.\n")
    kept = metadata_of(again)
    assert (kept["datasets"], kept["license"], kept["language"]) == (["a/b"], "mit", ["es"])
    assert kept["tags"] == ["mergekit", "merge", "dapa", "spanish"]
    assert again.count(BEGIN) == again.count(END) == 1
    assert make_card(repaired) == again


def test_somebody_elses_card_is_replaced_only_if_asked(repaired):
    (repaired / "README.md").write_text("# Mine\n")
    ran = call("card", repaired)
    assert ran.exit_code == 2
    assert "--replace-card" in ran.stderr
    assert (repaired / "README.md").read_text() == "# Mine\n"
    assert "Mine" not in make_card(repaired, "--replace-card")


def test_a_result_of_mergekits_gets_a_card_of_what_it_turns_out_to_be(llama_pair, write_recipe, tmp_path):
    out = tmp_path / "merged"
    content = yaml.safe_load(write_recipe(*llama_pair, layers='"1,3"').read_text())
    text = yaml.safe_dump(content)
    run_merge(MergeConfiguration.model_validate(content), str(out), MergeOptions(quiet=True), config_source=text)
    assert "mergekit" in (out / "README.md").read_text()
    card = make_card(out, "--license", "apache-2.0")
    assert "gate of layers 1,3" in card
    assert "**Not measured.**" in card
    assert "inside mergekit" in card
    assert "--files-only" not in card
    assert "the recipe, or its lock, named them" in card


@pytest.mark.parametrize("modules", ["gate", '"gate, down"'])
def test_the_card_of_mergekits_own_search_says_so_and_its_recipe_replays_it(
    llama_pair, write_recipe, tmp_path, modules
):
    """Such a result has mergekit's copy of a recipe that names no layers, and no report."""
    out, units = tmp_path / "merged", "1,3" if modules == "gate" else "1.gate,3.down"
    named = {"layers": f'"{units}"'} | ({"modules": "gate"} if modules == "gate" else {})
    assert call("run", write_recipe(*llama_pair, **named), out, "--no-evaluate", "--no-manifest").exit_code == 0
    (out / "dapa_report.json").unlink()
    searching = write_recipe(
        *llama_pair, layers="auto", modules=modules, search="ddmin", max_tests=9, prompts="advbench"
    )
    shutil.copy(searching, out / "mergekit_config.yml")
    card = make_card(out)
    assert "named them" not in card
    assert "mergekit-yaml searched for them" in card
    (recipe,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    content = yaml.safe_load(recipe)
    assert content["parameters"] == (
        {"layers": "1,3", "modules": "gate"} if modules == "gate" else {"layers": units}
    ) | {"prompts": "advbench"}
    content |= {"base_model": str(llama_pair[0]), "models": [{"model": str(llama_pair[1])}]}
    (tmp_path / "replay.yml").write_text(yaml.safe_dump(content))
    assert call("run", tmp_path / "replay.yml", tmp_path / "again", "--no-evaluate").exit_code == 0
    for path in out.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


BOMB = "a: &a [x, x]\n" + "".join(
    f"{one}: &{one} [*{last}, *{last}]\n" for last, one in pairwise("abcdefghijklmnopqrstuvwxyz")
)
MERGED = "a: &a {x: y}\n" + "".join(
    f"{one}: &{one} {{<<: [*{last}, *{last}, *{last}]}}\n" for last, one in pairwise("abcdefghijklmnop")
)
HEADS = {
    "a tag that contradicts its value": "x: !!bool maybe",
    "an empty number": "x: !!int ''",
    "no time": "x: !!timestamp never",
    "a number of thousands of digits": f"x: {'9' * 6000}",
    "a number of thousands of digits to the base 60": f"x: {':'.join(['59'] * 50_000)}",
    "lists in lists": f"x: {'[' * 20_000}",
    "aliases of aliases": BOMB,
    "merged aliases of aliases": MERGED,
    "a key twice": "license: mit\nlicense: apache-2.0",
    "a key that is a list": "? [a]\n: b",
    "an object of Python": "x: !!python/object/apply:os.system [true]",
    "a control character": "x: \x00",
    "more than any card has": f"x: {'y' * (1 << 20)}",
}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_is_wrong_in_any_way_says_nothing_and_costs_no_result(head, llama_pair, write_recipe, tmp_path):
    card = f"---\n{HEADS[head]}\nlanguage: en\n---\n"
    assert metadata_of(card) == {}
    if head == "a tag that contradicts its value":
        target = shutil.copytree(llama_pair[0], tmp_path / "target")
        (target / "README.md").write_text(card)
        ran = call("run", write_recipe(target, llama_pair[1], layers=1), tmp_path / "out", "--no-evaluate")
        assert ran.exit_code == 0, ran.output
        assert "none stated" in (tmp_path / "out" / "README.md").read_text()


CARDS = {
    "nothing after it": "---\nlicense: mit\n---",
    "a space after its end": "---\nlicense: mit\n--- \n# Mine",
    "empty lines before it": "\n\n---\nlicense: mit\n---\n# Mine",
    "the ends of lines of Windows": "---\r\nlicense: mit\r\n---\r\n# Mine",
}


@pytest.mark.parametrize("card", CARDS)
def test_a_head_is_found_where_the_hubs_client_finds_it(card):
    text = CARDS[card]
    assert metadata_of(text) == ModelCard(text, ignore_metadata_errors=True).data.to_dict() == {"license": "mit"}
    assert "---" not in split_card(text)[1]


def test_a_card_that_fails_in_an_unforeseen_way_costs_no_result(llama_pair, write_recipe, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise KeyError("maybe")

    monkeypatch.setattr("dapa_merge.publish.write_card.card_facts", broken)
    ran = call("run", write_recipe(*llama_pair, layers=1), tmp_path / "out", "--no-evaluate")
    assert ran.exit_code == 0, ran.output
    assert "no card yet: KeyError" in ran.stderr
    assert (tmp_path / "out" / "dapa.json").is_file()


def test_a_result_appears_with_its_card_and_nothing_is_written_into_it_later(
    llama_pair, write_recipe, tmp_path, monkeypatch
):
    out, rename, seen = tmp_path / "mine", Path.rename, {}

    def named(self, place):
        if place == out:
            seen.update({path.name: path.read_bytes() for path in self.iterdir() if path.is_file()})
        return rename(self, place)

    monkeypatch.setattr(Path, "rename", named)
    ran = call("run", write_recipe(*llama_pair, layers=1), out, "--no-evaluate")
    assert ran.exit_code == 0, ran.output
    assert b"# target, repaired" in seen["README.md"]
    assert seen == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_keys_of_any_kind_in_a_users_own_head_stay(copied):
    text = make_card(copied)
    (copied / "README.md").write_text(text.replace("---\n", "---\non: x\n7: y\ndate: 2024-01-01\n", 1))
    ran = call("card", copied)
    assert ran.exit_code == 0, ran.output
    assert {"True": "x", "7": "y"}.items() <= metadata_of((copied / "README.md").read_text()).items()


@pytest.mark.parametrize("note", ["[" * 100_000, '{"title": "a/b; touch x"}'])
def test_the_note_in_a_strangers_card_says_nothing_wrong(copied, note):
    make_card(copied)
    path = copied / "README.md"
    path.write_text(re.sub("<!-- said: .* -->", f"<!-- said: {note} -->", path.read_text()))
    ran = call("card", copied)
    assert ran.exit_code == 0, ran.output
    if "title" in note:
        assert "hf download 'a/b; touch x' --local-dir" in path.read_text()


def test_a_manifest_that_no_model_needs_is_not_read(copied):
    (copied / "dapa.json").write_text(f'{{"x": "{"y" * (64 << 20)}"}}')
    ran = call("verify", copied, "--files-only")
    assert ran.exit_code == 4
    assert "dapa.json" in ran.stderr
    assert "larger than 17 MB" in ran.stderr


def test_parents_on_the_hub_are_linked_pinned_and_inherited_from(hub, new_id, llama_pair, write_recipe, tmp_path):
    names = new_id("target"), new_id("source")
    cards = [
        "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\nlanguage: [en, es]\n"
        "pipeline_tag: image-text-to-text\n---\n",
        "---\nlicense: other\nlicense_name: Mine\nlanguage: en\n---\n",
    ]
    for name, folder, card in zip(names, llama_pair, cards, strict=True):
        copy = shutil.copytree(folder, tmp_path / "models" / name)
        (copy / "LICENSE").write_text(f"Terms of {name}\n")
        upload(hub.api, name, copy, card)
    out = tmp_path / "out"
    assert call("run", write_recipe(*names, layers=1), out, "--no-evaluate").exit_code == 0
    assert (out / "LICENSE").read_text() == f"Terms of {names[0]}\n"
    text = (out / "README.md").read_text()
    assert check_card(text) == []
    metadata = metadata_of(text)
    assert metadata["base_model"] == list(names)
    assert metadata["base_model_relation"] == "merge"
    assert (metadata["license"], metadata["license_name"]) == ("other", "mine")
    assert metadata["license_link"] == f"https://huggingface.co/{names[0]}/blob/main/LICENSE"
    assert metadata["language"] == ["en", "es"]
    assert metadata["pipeline_tag"] == "image-text-to-text"
    for name in names:
        commit = hub.store.repositories[name].branches["main"]
        assert f"[{name}](https://huggingface.co/{name}) | `{commit}`" in text
        assert f"{name}@{commit}" in text


def test_a_run_of_folders_names_where_they_are_published_if_told_and_compares_them(
    hub, new_id, llama_pair, write_recipe, tmp_path
):
    names = new_id("target"), new_id("source")
    for name, folder in zip(names, llama_pair, strict=True):
        upload(hub.api, name, shutil.copytree(folder, tmp_path / "models" / name))
    recipe, options = write_recipe(*llama_pair, layers=1), ("--target", names[0], "--source", names[1])
    ran = call("run", recipe, tmp_path / "out", "--no-evaluate", *options)
    assert ran.exit_code == 0, ran.output
    text = (tmp_path / "out" / "README.md").read_text()
    assert metadata_of(text)["base_model"] == list(names)
    assert metadata_of(text)["license"] == "apache-2.0"
    # Others than these are told in the log, and no card says so.
    ran = call("run", recipe, tmp_path / "wrong", "--no-evaluate", "--target", names[1])
    assert ran.exit_code == 0
    assert f"was not made of {names[1]}" in ran.stderr
    assert not (tmp_path / "wrong" / "README.md").exists()
    # What is not there is told before anything is done.
    ran = call("run", recipe, tmp_path / "none", "--no-evaluate", "--target", "someone/nothing")
    assert ran.exit_code == 5
    assert "someone/nothing" in ran.stderr
    assert not (tmp_path / "none").exists()


def test_licenses_that_differ_are_told_in_time_and_cost_no_repair(hub, new_id, llama_pair, write_recipe, tmp_path):
    names = new_id("target"), new_id("source")
    for name, folder, license in zip(names, llama_pair, ("mit", "apache-2.0"), strict=True):
        copy = shutil.copytree(folder, tmp_path / "models" / name)
        upload(hub.api, name, copy, f"---\nlicense: {license}\n---\n")
    recipe, out, repository = write_recipe(*names, layers=1), tmp_path / "out", new_id("repaired")
    ran = call("run", recipe, out, "--no-evaluate", "--push", repository)
    assert ran.exit_code == 2
    assert not out.exists()
    for part in (*names, "mit", "apache-2.0", "--license"):
        assert part in ran.stderr
    ran = call("run", recipe, out, "--no-evaluate")
    assert ran.exit_code == 0
    assert "no card yet" in ran.stderr
    assert not (out / "README.md").exists()
    assert call("push", out, repository).exit_code == 2
    assert repository not in hub.store.repositories
    assert call("card", out).exit_code == 2
    assert metadata_of(make_card(out, "--license", "mit"))["license"] == "mit"
    # What was said once holds for the push.
    assert call("push", out, repository).exit_code == 0
    assert hub.api.model_info(repository).card_data.license == "mit"


def test_what_is_no_result_has_no_card(llama_pair, tmp_path):
    for folder in (llama_pair[0], tmp_path / "nothing"):
        ran = call("card", folder)
        assert ran.exit_code == 2
        assert "not a result" in ran.stderr or f"no folder {tmp_path / 'nothing'} here" in ran.stderr


CONTRADICTIONS = {
    "a name that is no unit": {"units": ["3.gate", "\x1b[31m"]},
    "no unit in a reason": {"certificate": {"3.gate": ["4.gate", ""]}},
    "more than all": {"after": {"complied": 1e308}},
    "less than nothing": {"after": {"dsr": -1.0}},
    "no prompts": {name: {"num_harmful": 0} for name in ("before", "after", "source_alone")},
    "other prompts": {"before": {"num_harmless": 63}},
    "no skills in one column": {"source_alone": {"skills": []}},
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
@pytest.mark.xdist_group("demo")
def test_a_report_that_contradicts_itself_is_not_read(repaired, what, tmp_path):
    report = json.loads((repaired / "dapa_report.json").read_text())
    for key, value in CONTRADICTIONS[what].items():
        report[key] = {**report[key], **value} if isinstance(value, dict) else value
    (tmp_path / "report.json").write_text(json.dumps(report))
    ran = call("gate", tmp_path / "report.json", "--min-dsr", "0.5")
    assert ran.exit_code == 4, ran.output
    assert "is not a report that this version reads" in ran.stderr


def test_a_damaged_report_is_told(copied):
    path = copied / "dapa_report.json"
    report = json.loads(path.read_text())
    for wrong in ({**report, "units": 3}, {**report, "share_changed": "much"}, {}, {**report, "before": {"dsr": 1}}):
        path.write_text(json.dumps(wrong))
        ran = call("card", copied)
        assert ran.exit_code == 4
        assert ran.stderr.count("\n") == 1
