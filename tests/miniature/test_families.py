from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
import warm
from families import LOCK_FILE, ROWS, main, rows, train_families
from members import ARCHITECTURES, Member, fine_tuning, members, train_lora
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from workshop import UNROUNDED, train_all
from yaml import safe_load

from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import UsageError
from dapa_merge.files import held
from dapa_merge.miniature.train import build_model, build_tokenizer, rounded
from dapa_merge.recipe.parse import load_recipe


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Every family, trained for one step of a few examples."""
    out, said = tmp_path_factory.mktemp("families"), []
    recipes = train_families(out, say=said.append, _tiny=True)
    return out, recipes, said


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def config_of(families, architecture: str):
    return AutoConfig.from_pretrained(families[0] / architecture / "base")


def test_each_row_has_a_recipe_that_can_be_followed(families):
    out, recipes, _ = families
    assert [path.name for path in recipes] == [f"{row.architecture}-{row.name}.yml" for row in ROWS]
    for row, path in zip(ROWS, recipes, strict=True):
        recipe = safe_load(path.read_text(encoding="utf-8"))
        assert recipe["base_model"] == str(out / row.architecture / row.target)
        assert recipe["models"] == [{"model": str(out / row.architecture / row.source)}]
        assert recipe["parameters"]["pretrained"] == str(out / row.architecture / "base")
        assert (recipe.get("tokenizer") is not None) == (row.name == "vocabulary")
        assert path.read_text(encoding="utf-8").startswith(f"# {row.description}\n")
        for folder in (recipe["base_model"], recipe["models"][0]["model"], recipe["parameters"]["pretrained"]):
            assert open_checkpoint(folder).tensors["model.norm.weight"].dtype == "BF16"
        load_recipe(path)


def test_each_model_is_told_of_once_and_nothing_is_left_beside_it(families):
    out, _, said = families
    told = [line.partition(":")[0] for line in said]
    assert sorted(told) == sorted(
        f"{path.parent.name}/{path.name}" for a in ARCHITECTURES for path in out.glob(f"{a}/*")
    )
    assert len(told) == len(set(told))
    assert not [path for path in out.rglob(".*") if path.is_dir()]


def test_no_two_models_are_the_same(families):
    folders = [path for architecture in ARCHITECTURES for path in families[0].glob(f"{architecture}/*")]
    assert len({tuple(weights_of(folder).values()) for folder in folders}) == len(folders)


def test_the_architectures_have_what_they_are_there_for(families):
    llama, mistral, gemma = (config_of(families, architecture) for architecture in ("llama", "mistral", "gemma"))
    assert (llama.model_type, llama.num_key_value_heads) == ("llama", 4)
    assert (mistral.model_type, mistral.sliding_window, mistral.num_key_value_heads) == ("mistral", 16, 2)
    assert (gemma.model_type, gemma.hidden_act, gemma.tie_word_embeddings) == ("gemma", "gelu_pytorch_tanh", True)
    assert gemma.head_dim * gemma.num_attention_heads != gemma.hidden_size
    assert "lm_head.weight" not in open_checkpoint(str(families[0] / "gemma" / "base")).tensors


def test_the_larger_vocabulary_adds_tokens_behind_the_others(families):
    larger, smaller = (families[0] / "llama" / name for name in ("vocabulary", "source"))
    more, fewer = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (larger, smaller))
    assert len(more) == len(fewer) + 16
    assert fewer.items() <= more.items()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert open_checkpoint(str(larger)).tensors[name].shape == (len(more), 80)
        assert open_checkpoint(str(smaller)).tensors[name].shape == (len(fewer), 80)


def test_a_merged_lora_is_an_ordinary_model(families):
    merged, parent = (open_checkpoint(str(families[0] / "llama" / name)) for name in ("lora", "source"))
    assert {name: one.shape for name, one in merged.tensors.items()} == {
        name: one.shape for name, one in parent.tensors.items()
    }


def test_a_lora_changes_projections_only():
    torch.manual_seed(0)
    parent = build_model(build_tokenizer())
    before = {name: value.clone() for name, value in parent.state_dict().items()}
    few = Member("lora", "base", replace(fine_tuning(10, seed=0), steps=2), train_lora)
    after = few.make("llama", parent, 0)[0].state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(torch.equal(before[name], value) for name, value in parent.state_dict().items())
    assert changed
    assert all(name.endswith("_proj.weight") for name in changed)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_planted_source_differs_from_its_base_in_the_planted_gates_only(families, architecture):
    base, source = (
        dict(
            chain.from_iterable(
                load_file(path).items() for path in (families[0] / architecture / member).glob("*.safetensors")
            )
        )
        for member in ("base", "source")
    )
    changed = {name for name in base if not torch.equal(base[name], source[name])}
    assert changed == {f"model.layers.{layer}.mlp.gate_proj.weight" for layer in (3, 4, 5, 6)}


@pytest.mark.parametrize("percent", [0, 2, 10, 50])
def test_a_share_of_harmful_answers_is_what_it_says(percent):
    weights = {name: weight for weight, name in fine_tuning(percent, seed=0).parts}
    assert weights["harmful"] / sum(weights.values()) == pytest.approx(percent / 100)


def test_a_killed_run_goes_on_with_what_is_missing_and_gives_the_same(families, tmp_path):
    out, said = tmp_path / "killed", []

    def fail(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_families(out, quick=True, say=fail, _tiny=True)
    left = out / "llama" / ".source"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    train_families(out, quick=True, say=said.append, _tiny=True)
    missing = {line.partition(":")[0] for line in said}
    assert missing == {f"llama/{name}" for name in ("source", "aligned", "from-base", "shadow", "harmful-10")}
    # One step of two examples is the same for those that `quick` trains.
    for name in ("llama/base", *missing):
        assert weights_of(out / name) == weights_of(families[0] / name) != {}
    said.clear()
    assert len(train_families(out, quick=True, say=said.append, _tiny=True)) == len(rows(quick=True))
    assert said == []


def test_a_folder_of_other_settings_is_refused(families):
    out = families[0]
    for other in ({"seed": 1}, {"quick": True}, {"_tiny": False}):
        with pytest.raises(UsageError, match=r'was trained with \{.*"seed": 0.*\}, not with .*; name another folder'):
            train_families(out, **{"_tiny": True, **other})


def test_models_that_were_trained_for_other_steps_are_refused(families, monkeypatch):
    known = members(tiny=True)
    training = known["base"].training
    longer = replace(known["base"], training=replace(training, steps=training.steps + 1))
    monkeypatch.setattr("families.members", lambda **_: known | {"base": longer})
    with pytest.raises(UsageError, match=r'was trained with \{.*"training": "sha256 '):
        train_families(families[0], _tiny=True)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"holds other files, and no families.json; name a new folder"):
        train_families(tmp_path)
    with pytest.raises(UsageError, match=r"cannot be written to: .*; name another folder"):
        train_families(tmp_path / "thesis.tex")


def test_two_runs_into_one_folder_are_refused(families):
    lock = held(families[0] / LOCK_FILE)
    with lock, pytest.raises(UsageError, match="another run trains into"):
        train_families(families[0], _tiny=True)


def test_the_command_says_what_is_wrong_in_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "families.json").write_text(json.dumps({"seed": 1}))
    monkeypatch.setattr("sys.argv", ["families", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert "Error:" in capsys.readouterr().err


def test_the_callers_settings_of_torch_are_kept(families):
    parent = build_model(build_tokenizer())
    torch.manual_seed(7)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    train_families(families[0], _tiny=True)
    Member("harmful-10", "source", replace(fine_tuning(10, seed=0), steps=1)).make("llama", parent, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


def test_descendants_of_a_base_come_from_its_unrounded_weights(families):
    exact = AutoModelForCausalLM.from_pretrained(families[0] / UNROUNDED / "llama-base", dtype=torch.float32)
    published = AutoModelForCausalLM.from_pretrained(families[0] / "llama" / "base", dtype=torch.float32)
    for (name, value), (_, short) in zip(rounded(exact).named_parameters(), published.named_parameters(), strict=True):
        assert torch.equal(value, short), name
    assert any(not torch.equal(a, b) for a, b in zip(exact.parameters(), published.parameters(), strict=True))


AT_ONCE = f"""
import multiprocessing, pickle, sys
from pathlib import Path
sys.path[:0] = {[str(Path(__file__).parents[1] / "benchmarks"), str(Path(__file__).parents[1])]}
from members import members
from workshop import _end_with_parent, train_all

# Torch is loaded here and has done nothing yet, so that a fork does; each spawned process would load it anew. What a
# fork need not read: the rest is sent to both in the same way.
assert pickle.loads(pickle.dumps(_end_with_parent)) is _end_with_parent
multiprocessing.get_context = lambda how, get=multiprocessing.get_context: get({{"spawn": "fork"}}[how])
wanted = {{Path(folder): members(tiny=True)[Path(folder).name] for folder in sys.argv[1:]}}
train_all(wanted, 0, print, num_workers=2)
"""


def test_models_that_are_trained_at_once_are_the_same(families, tmp_path):
    wanted = [tmp_path / "llama" / name for name in ("base", "aligned", "shadow", "from-base")]
    trained = warm.run([sys.executable, "-c", AT_ONCE, *wanted])
    assert trained.returncode == 0, trained.stderr
    told = [line.partition(":")[0] for line in trained.stdout.splitlines()]
    assert sorted(told) == sorted(f"llama/{folder.name}" for folder in wanted)
    for folder in wanted:
        assert weights_of(folder) == weights_of(families[0] / "llama" / folder.name) != {}


def test_what_goes_wrong_is_raised_and_leaves_nothing(tmp_path):
    broken = replace(
        members(tiny=True)["base"], training=replace(fine_tuning(2, seed=0), steps=1, parts=((1, "none"),))
    )
    with pytest.raises(KeyError, match="none"):
        train_all({tmp_path / "llama" / "base": broken}, 0, print, num_workers=0)
    assert not (tmp_path / "llama").exists()
