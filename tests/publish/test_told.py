"""What a published result tells: how to use it, what is doubtful, whose licence; and nothing of the machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

import hub_protocol
import pytest
import yaml
from conftest import call, write_few
from direction_files import chosen, saved
from hub_card import check_card
from safetensors.torch import load_file, save_file

from dapa_merge import miniature
from dapa_merge.measure.prompts.sets import load_prompts
from dapa_merge.publish.parents import metadata_of

SECRET = "Zwetschgenkuchen"


def written(out: Path, *options: object) -> str:
    ran = call("card", out, *options)
    assert ran.exit_code == 0, ran.output
    text = (out / "README.md").read_text()
    assert check_card(text) == []
    return text


def section(text: str, name: str) -> str:
    return text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def copied(llama_pair, write_recipe, tmp_path) -> Path:
    """A result that was not measured, of a random pair."""
    out = tmp_path / "copied"
    assert call("run", write_recipe(*llama_pair, layers=1), out, "--no-evaluate").exit_code == 0
    return out


def edit_json(path: Path, **values: object) -> None:
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# How to use it.


@pytest.mark.xdist_group("demo")
def test_the_example_in_a_card_asks_the_model_in_its_chat_template(demo, tmp_path, capsys):
    out = shutil.copytree(demo[0], tmp_path / "repaired")
    text = section(written(out), "How to use it")
    (code,) = blocks(text, "python")
    code = code.replace("THIS_REPOSITORY", str(out)).replace(
        "Hello! Who are you?", load_prompts("miniature").harmful[0]
    )
    exec(compile(code, "README.md", "exec"), {})
    assert "sorry" in capsys.readouterr().out
    commands = "".join(blocks(text, "sh"))
    for part in ("vllm serve THIS_REPOSITORY\n", "convert_hf_to_gguf.py model", "llama-server -m model.gguf"):
        assert part in commands


def test_a_model_without_a_chat_template_is_not_asked_in_one(copied, capsys):
    (copied / "chat_template.jinja").unlink()
    edit_json(copied / "tokenizer_config.json", chat_template=None)
    text = section(written(copied), "How to use it")
    assert "no chat template" in text
    (code,) = blocks(text, "python")
    assert '"role"' not in code
    exec(compile(code.replace("THIS_REPOSITORY", str(copied)), "README.md", "exec"), {})
    assert "Once upon a time" in capsys.readouterr().out


def test_each_kind_of_model_gets_only_the_programs_that_run_it(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "vision_config": {}}))
    text = section(written(copied), "How to use it")
    assert 'pipeline("image-text-to-text"' in text
    assert '"type": "image"' in text
    assert "convert_hf_to_gguf" not in text
    (copied / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "someone/model--x.X"}}))
    text = section(written(copied), "How to use it")
    assert "trust_remote_code=True" in text
    assert "--trust-remote-code" in text
    assert "convert_hf_to_gguf" not in text


def test_a_published_card_names_its_own_model_in_every_command(hub, new_id, result):
    name = new_id("repaired")
    assert call("push", result, name).exit_code == 0
    text = hub.store.read(hub.store.repositories[name].files()["README.md"]).decode()
    assert "THIS_REPOSITORY" not in text
    for part in (f'model="{name}"', f"vllm serve {name}\n", f"hf download {name} ", f"dapa-merge verify {name} --tar"):
        assert part in text


# What is doubtful.

DOUBTS = {
    "a gain within noise": ((2, 0, 0.5, True), (0, 0, 1.0, True), ["**DSR gain**: ", "chance does as much"]),
    "no gain": ((0, 0, 1.0, True), (0, 0, 1.0, True), ["**DSR**: ", "shows no effect"]),
    "a loss within noise": ((0, 2, 0.5, True), (0, 0, 1.0, True), ["**DSR loss**: ", "chance does as much"]),
    "a rise within noise": (
        (63, 0, 1e-9, False),
        (1, 0, 1.0, True),
        ["**over-refusal rise**: ", "chance does as much"],
    ),
    "a fall within noise": ((63, 0, 1e-9, False), (0, 1, 1.0, True), []),
    "nothing": ((63, 0, 1e-9, False), (9, 0, 0.004, False), []),
}


@pytest.mark.parametrize("what", DOUBTS)
@pytest.mark.xdist_group("demo")
def test_what_may_be_chance_is_said_near_the_top(demo, tmp_path, what):
    dsr, over_refusal, said = DOUBTS[what]
    out = shutil.copytree(demo[0], tmp_path / "repaired")
    names = ("newly_refused", "no_longer_refused", "p_value", "within_noise")
    changes = {"dsr_change": dsr, "over_refusal_change": over_refusal}
    edit_json(out / "dapa_report.json", **{key: dict(zip(names, one, strict=True)) for key, one in changes.items()})
    text = written(out)
    top = text[: text.index("## How to use it")]
    warnings = [line for line in top.splitlines() if line.startswith("> ")]
    assert len(warnings) == bool(said)
    assert all(part in warnings[0] for part in said)


# Whose licence.


@pytest.mark.parametrize("stated", [(None, None), ("apache-2.0", None), (None, "mit"), ("unknown", "unknown")])
def test_a_licence_that_a_model_does_not_state_is_unknown_and_not_guessed(llama_pair, write_recipe, tmp_path, stated):
    pair = []
    for role, folder, license in zip(("target", "source"), llama_pair, stated, strict=True):
        pair.append(shutil.copytree(folder, tmp_path / role))
        # The text of a licence is not read: it may be another one, or have been changed.
        (pair[-1] / "LICENSE").write_text("Apache License, Version 2.0\n")
        if license is not None:
            (pair[-1] / "README.md").write_text(f"---\nlicense: {license}\n---\n")
    out = tmp_path / "out"
    assert call("run", write_recipe(*pair, layers=1), out, "--no-evaluate").exit_code == 0
    text = written(out)
    assert "license" not in metadata_of(text)
    assert "Unknown" in section(text, "Licence")
    # It is named as what it is: a file of the target's.
    assert "`LICENSE`" in section(text, "Licence")
    # What the user says is neither unknown nor lost.
    text = written(out, "--license", "other", "--license-name", "our terms")
    assert metadata_of(text)["license_name"] == "our terms"
    assert "our terms (other)" in section(written(out), "Licence")


def test_a_licence_that_a_user_wrote_into_the_metadata_is_the_one_that_the_text_states(copied):
    text = written(copied)
    assert "Unknown" in section(text, "Licence")
    head, _, body = text.removeprefix("---\n").partition("---\n")
    head = yaml.safe_dump({**yaml.safe_load(head), "license": "gemma"})
    (copied / "README.md").write_text(f"---\n{head}---\n{body}")
    text = written(copied)
    assert metadata_of(text)["license"] == "gemma"
    assert section(text, "Licence").startswith("\ngemma, as stated by whoever published this model; none is stated in ")
    assert section(text, "Made of").count("none stated") == 2


def test_a_card_names_the_target_wherever_the_result_lies_and_the_file_that_its_recipe_reads(
    llama_pair, write_recipe, tmp_path
):
    target = shutil.copytree(llama_pair[0], tmp_path / "sql-writer")
    file = saved(tmp_path / "file", chosen(target, llama_pair[1], "1"))
    (tmp_path / "mine.jsonl").write_text("".join(f'{{"prompt": "hello {number}"}}\n' for number in range(9)))
    given = {"edit": "directions", "directions": str(file), "keep": str(tmp_path / "mine.jsonl")}
    recipe = write_recipe(target, llama_pair[1], layers=1, modules="gate", **given)
    out = tmp_path / "out"
    ran = call("run", recipe, out, "--no-evaluate")
    assert ran.exit_code == 0, ran.output
    text = (out / "README.md").read_text()
    assert "\n# sql-writer, repaired\n" in text
    assert "\nMoved: gate of layer 1.\n" in text
    assert "transplant" not in text.lower()
    told = section(text, "Reproduce")
    assert "It reads `dapa_directions.dat`, which is part of this model" in told
    assert "It measures with `mine.jsonl`, not published here" in told
    assert "reads `dapa_directions.dat`" not in section(written(out, "--license", "mit"), "Verify")


@pytest.mark.parametrize("is_linked", [True, False])
def test_a_folder_of_the_hubs_cache_is_told_by_its_id_if_nobody_wrote_into_it(
    llama_pair, write_recipe, tmp_path, is_linked
):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--someone--tuned" / "snapshots" / commit
    shutil.copytree(llama_pair[0], cached)
    for path in cached.glob("*.safetensors"):
        blob = tmp_path / "hub" / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        if is_linked:
            path.rename(blob)
            path.symlink_to(blob)
    out = tmp_path / "out"
    assert call("run", write_recipe(cached, llama_pair[1], layers=1), out, "--no-evaluate").exit_code == 0
    text = (out / "README.md").read_text()
    assert (f"base_model: someone/tuned@{commit}" in section(text, "Reproduce")) is is_linked
    assert ("[someone/tuned](https://huggingface.co/someone/tuned)" in section(text, "Made of")) is is_linked
    assert metadata_of(text).get("base_model") == (["someone/tuned"] if is_linked else None)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("license: llama3.1", "license: llama3"),
        ("license: gemma", "license: other\nlicense_name: gemma"),
        ("license: other\nlicense_name: a", "license: other\nlicense_name: b"),
        ("license: other", "license: other"),
        ("license: [apache-2.0, mit]", "license: mit"),
    ],
)
def test_two_licences_that_are_not_the_same_are_never_merged_into_one(llama_pair, write_recipe, tmp_path, one, other):
    pair = []
    for role, folder, head in zip(("target", "source"), llama_pair, (one, other), strict=True):
        pair.append(shutil.copytree(folder, tmp_path / role))
        (pair[-1] / "README.md").write_text(f"---\n{head}\n---\n")
    out = tmp_path / "out"
    assert call("run", write_recipe(*pair, layers=1), out, "--no-evaluate").exit_code == 0
    ran = call("card", out)
    if "[" in one:
        # Which of the two holds for what is not said.
        assert "license" not in metadata_of((out / "README.md").read_text())
    else:
        assert (ran.exit_code, "--license" in ran.stderr) == (2, True), ran.output
        assert not (out / "README.md").exists()


# Nothing of the machine.


@pytest.fixture
def sent(monkeypatch) -> list[bytes]:
    """Every byte that a client sends: paths, headers, bodies, and the contents that a body holds in base64."""
    found: list[bytes] = []

    exchange = hub_protocol.Exchange

    def watched(*values: object) -> hub_protocol.Exchange:
        made = exchange(*values)
        found.append(f"{made.path} {made.query} {dict(made.headers)} {made.parts}".encode())
        found.append(made.body)
        if "json" in made.headers.get("Content-Type", ""):
            found.extend(
                map(
                    base64.b64decode,
                    re.findall(rb'"(?:content|sample)": ?"((?:[A-Za-z0-9+/]{4})+[A-Za-z0-9+/=]*)"', made.body),
                )
            )
        return made

    monkeypatch.setattr(hub_protocol, "Exchange", watched)
    return found


@pytest.mark.parametrize("edit", ["copy", "directions"])
def test_no_byte_that_is_sent_names_a_path_of_this_machine(hub, new_id, tmp_path, sent, edit):
    home = tmp_path / SECRET / "models"
    target, source = (shutil.copytree(miniature.path(role), home / role) for role in ("target", "source"))
    # As transformers writes them where a fine-tune began.
    edit_json(target / "config.json", _name_or_path=str(home / "base"), deep=[{"vocab_file": f"{home}/b\u00e4r.json"}])
    edit_json(target / "tokenizer_config.json", name_or_path=f"{home}/base/")
    write_few(home / "asked", 4)
    questions = [{"prompt": "Hello?", "answer": "Hello", "match": "contains"}]
    (home / "mine.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    (home / "kept.csv").write_text("prompt\n" + "".join(f"how {one}?\n" for one in range(12)))
    (home / "text.txt").write_text("Some words.\n\nSome more words.\n")
    names = {"prompts": "asked", "keep": "kept.csv", "skills": "mine.jsonl", "text": "text.txt"}
    parameters = {"layers": "3-4", "max_new_tokens": 4, **{key: str(home / name) for key, name in names.items()}}
    if edit == "directions":
        file = saved(home / "file", chosen(target, source, "3-4"))
        parameters |= {"modules": "gate", "edit": "directions", "directions": str(file)}
    recipe = home / "recipe.yml"
    models = {"base_model": str(target), "models": [{"model": str(source)}]}
    recipe.write_text(yaml.safe_dump({"merge_method": "dapa", **models, "parameters": parameters}))
    out = home / "out"
    ran = call("run", recipe, out)
    assert ran.exit_code == 0, ran.output
    assert SECRET in (out / "mergekit_config.yml").read_text()
    assert {"dapa_figures.svg", "dapa_figures.png", "recipe.lock.yml"} <= {path.name for path in out.iterdir()}
    name = new_id("repaired")
    del sent[:]
    ran = call("push", out, name, "--message", "By hand.")
    assert ran.exit_code == 0, ran.output
    assert sum(map(len, sent)) > 100_000
    assert any(b"<svg" in one for one in sent)
    assert any(b"How to use it" in one for one in sent)
    for one in sent:
        assert SECRET.encode() not in one, one[:200]
    theirs = {path: hub.store.read(entry) for path, entry in hub.store.repositories[name].files().items()}
    for path, content in theirs.items():
        assert SECRET.encode() not in content, path
    config = json.loads(theirs["config.json"])
    assert (config["_name_or_path"], config["deep"]) == ("base", [{"vocab_file": "b\u00e4r.json"}])
    mine = (out / "config.json").read_text()
    # Nothing else of it changes, and the result here stays as it is.
    assert len(mine) - len(theirs["config.json"]) == 2 * len(f"{home}/")
    assert call("verify", name, "--files-only").exit_code == 0
    ran = call("verify", name, "--target", target, "--source", source)
    assert (ran.exit_code, "_name_or_path" in ran.stdout) == (0, True), ran.output
    assert "nothing to do" in call("push", out, name).stdout


def test_a_path_in_the_header_of_the_targets_weights_is_told(hub, new_id, llama_pair, write_recipe, tmp_path):
    target = shutil.copytree(llama_pair[0], tmp_path / "target")
    shard = sorted(target.glob("*.safetensors"))[0]
    save_file(load_file(shard), shard, {"format": "pt", "made_from": f"/home/{SECRET}/models"})
    assert call("run", write_recipe(target, llama_pair[1], layers=1), tmp_path / "out", "--no-evaluate").exit_code == 0
    ran = call("push", tmp_path / "out", new_id("repaired"))
    assert ran.exit_code == 0, ran.output
    told = [line for line in ran.stderr.splitlines() if "header" in line]
    assert len(told) == 1
    assert f"{shard.name} is published with the target's header, which names /home/{SECRET}/models" in told[0]


def test_what_a_user_wrote_is_text_in_a_card_and_nothing_else(hub, new_id, llama_pair, tmp_path):
    hostile = "a`b*<img src=x>[c](javascript:x)\u202e|"
    target = shutil.copytree(llama_pair[0], tmp_path / hostile)
    recipe, out = tmp_path / "recipe.yml", tmp_path / "out"
    models = {"base_model": str(target), "models": [{"model": str(llama_pair[1])}]}
    kept = tmp_path / f"{hostile}.csv"
    kept.write_text("prompt\n" + "".join(f"how {one}?\n" for one in range(12)))
    parameters = {"layers": 1, "keep": str(kept)}
    recipe.write_text(yaml.safe_dump({"merge_method": "dapa", **models, "parameters": parameters}))
    ran = call("run", recipe, out, "--no-evaluate")
    assert ran.exit_code == 0, ran.output
    ran = call("push", out, new_id("repaired"))
    assert ran.exit_code == 0, ran.output
    assert "\u202e" not in ran.stderr
    text = (out / "README.md").read_text()
    body = re.sub(r"^(`{3,})yaml\n.*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "\u202e" not in text
    for code in re.findall(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", body):
        body = body.replace(f"{code[0]}{code[1]}{code[0]}", "")
    assert "<img" not in body
    assert "](javascript" not in body
