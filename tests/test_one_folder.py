"""One folder, one answer: `run`, `verify`, `push`, `evaluate` and the card never disagree about it.

Folders are generated from a small model: files are added, removed, renamed and edited, as trainers, downloads, desktops
and strangers leave them. What transformers loads from a folder is asked of transformers itself.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import call, configuration, save_random, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dapa_merge.checkpoint.contents import is_licence, is_settings
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import CheckpointError, DapaError
from dapa_merge.flow import repair
from dapa_merge.measure.live import LiveModel, choose_device, load_model
from dapa_merge.plan.selection import make_plan
from dapa_merge.publish.commit import publishable
from dapa_merge.publish.write_card import write_card
from dapa_merge.recipe.parse import parse_recipe
from dapa_merge.verify.result import check_manifest, verify_result

CPU = choose_device("cpu")
INDEX = "model.safetensors.index.json"
ROLES = ("target", "source", "pretrained")
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A target and a source of two layers, two shards each."""
    folder = tmp_path_factory.mktemp("pair")
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24}
    target, source = (
        save_random(folder / name, tiny_llama(**shape), seed=seed, max_shard_size="12KB")
        for seed, name in enumerate(("target", "source"))
    )
    (folder / "adapter").mkdir()
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    place = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{place}.lora_A.weight": torch.ones(2, 16), f"{place}.lora_B.weight": torch.ones(16, 2)}
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    return target, source


def put(name: str, content: str | bytes = b"{}") -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def adapter(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            shutil.copy(folder.with_name("adapter") / name, folder / name)

    return change


def weights(name: str) -> Change:
    """Another file of weights, all of them zeros."""

    def change(folder: Path) -> None:
        found = {key: torch.zeros_like(value) for path in shards(folder) for key, value in load_file(path).items()}
        save_file(found, folder / name, metadata={"format": "pt"})

    return change


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-0*.safetensors"))


def config(**keys: object) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    return change


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink(missing_ok=True)


def tensor(name: str, value: torch.Tensor | None) -> Change:
    """Add a tensor, or remove one, in a shard and in the index."""

    def change(folder: Path) -> None:
        path = next((path for path in shards(folder) if name in load_file(path)), shards(folder)[-1])
        content = {key: found for key, found in load_file(path).items() if key != name}
        save_file({**content, **({} if value is None else {name: value})}, path, metadata={"format": "pt"})
        index = folder / INDEX
        owners = {key: file for key, file in json.loads(index.read_text())["weight_map"].items() if key != name}
        index.write_text(json.dumps({"weight_map": {**owners, **({} if value is None else {name: path.name})}}))

    return change


# Nothing of this changes what the folder's model is; it may be left behind.
HARMLESS: dict[str, Change] = {
    "a key": put("id_rsa", "-----BEGIN"),
    "training data": put("train.jsonl"),
    "a trainer's state": put("trainer_state.json"),
    "a log": put("train.log"),
    "settings of a run": put("wandb.yaml"),
    "a backup": put("model.safetensors.bak"),
    "a checkpoint": put("checkpoint-1/model.safetensors"),
    "another form": put("original/params.json"),
    "code that nothing names": put("train.py"),
    "macOS, a config": put("._config.json", b"\0\5\x16\7"),
    "macOS, a shard": put("._model-00001-of-00002.safetensors", b"\0\5\x16\7"),
    "macOS, a tokenizer": put("._tokenizer.json", b"\0\5\x16\7"),
    "macOS, a folder": put("__MACOSX/._model.safetensors", b"\0"),
    ".DS_Store": put(".DS_Store", b"\0"),
    "Windows": put("desktop.ini"),
    "thumbnails": put("Thumbs.db"),
    "notebooks": put(".ipynb_checkpoints/config.json"),
    "an editor": put("config.json~"),
    "GGUF": put("model-q4.gguf", b"GGUF"),
    "ONNX": put("model.onnx", b"x"),
    "Mistral's form": weights("consolidated.safetensors"),
    "a lone file of weights": weights("ema.safetensors"),
    "pickles": put("pytorch_model.bin", b"x"),
    "a licence": put("LICENSE", "Terms."),
    "a policy": put("USE_POLICY.md", "Terms."),
    "a template": put("additional_chat_templates/tools.jinja", "{{ messages }}"),
    "the same weights, named": config(transformers_weights=INDEX),
    "code": lambda folder: (
        config(auto_map={"AutoModel": "modeling_x.X"})(folder),
        put("modeling_x.py", "from .layers_x import y\n")(folder),
        put("layers_x.py", "")(folder),
    )[0],
    "sentence-transformers": put("modules.json", "[]"),
    "an earlier result": put("dapa_report.json", "{}"),
    "no index": remove(INDEX),
}  # fmt: skip
# With any of this, transformers loads other weights than the files that we would edit, or only some of them.
HARMFUL: dict[str, Change] = {
    "an adapter": adapter("adapter_config.json", "adapter_model.safetensors"),
    "an adapter's config": adapter("adapter_config.json"),
    "an adapter's weights": adapter("adapter_model.safetensors"),
    "other weights, named": lambda folder: (
        weights("other.safetensors")(folder),
        config(transformers_weights="other.safetensors")(folder),
    )[0],
    "absent weights, named": config(transformers_weights="absent.safetensors"),
    "another config": lambda folder: (
        put("config.4.0.0.json", json.dumps({**json.loads((folder / "config.json").read_text()), "rms_norm_eps": 9}))(
            folder
        ),
        config(configuration_files=["config.4.0.0.json"])(folder),
    )[0],
    "two forms": weights("model.safetensors"),
    "a distributed checkpoint": weights("shard-00001-model-00001-of-00001.safetensors"),
    "a missing head": tensor("lm_head.weight", None),
    "a missing norm": tensor("model.norm.weight", None),
    "an unmerged adapter": tensor("model.layers.0.self_attn.q_proj.lora_A.weight", torch.ones(2, 16)),
    "a value head": tensor("v_head.weight", torch.ones(1, 16)),
    "another shape": tensor("model.norm.weight", torch.ones(17)),
    "fewer layers": config(num_hidden_layers=1),
    "more layers": config(num_hidden_layers=3),
    "another size": config(hidden_size=32),
    "another task": config(architectures=["LlamaForSequenceClassification"]),
    "no config": remove("config.json"),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("*token*")] and None,
    "a lost shard": lambda folder: shards(folder)[0].unlink(),
}
CHANGES = {**HARMLESS, **HARMFUL}


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(open_checkpoint(str(folder)), CPU)[0].state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def accepted(step: Callable[[], object]) -> bool:
    try:
        step()
    except DapaError:
        return False
    return True


def check_folder(pair: tuple[Path, Path], names: frozenset[str]) -> bool:
    """Change a copy of the target, repair it, and compare all that is said of it; return whether it is repaired."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        target = shutil.copytree(pair[0], place / "target")
        shutil.copytree(pair[0].with_name("adapter"), place / "adapter")
        # In one order, the index's removal last: some changes read it.
        for name in sorted(names, key=lambda name: (name == "no index", list(CHANGES).index(name))):
            CHANGES[name](target)
        recipe = parse_recipe(
            f"merge_method: dapa\nbase_model: {target}\nmodels:\n  - model: {pair[1]}\nparameters:\n  layers: 1\n"
        )
        out = place / "out"
        # What a run does with the target's folder: it plans, loads, measures and writes.
        is_repaired = accepted(lambda: LiveModel(make_plan(recipe), CPU).close()) and accepted(
            lambda: repair(recipe, out, evaluate=False)
        )
        assert out.exists() == is_repaired
        assert accepted(lambda: loaded(target)) or not is_repaired
        if not is_repaired:
            return False
        before, after = loaded(target), loaded(out)
        if (target / INDEX).exists():
            # The authority: what anybody loads from the target and from the result, with peft installed.
            for folder, ours in ((target, before), (out, after)):
                assert same(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict(), ours)
        written = {name: value for path in shards(out) for name, value in load_file(path).items()}
        assert same(written, after)
        assert {name for name in written if not torch.equal(written[name], before[name])} == {
            "model.layers.1.mlp.gate_proj.weight"
        }
        assert verify_result(out, None).faults == ()
        assert check_manifest(out).faults == ()
        write_card(out)
        files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
        assert set(publishable(out)) == files
        described = {"README.md", "dapa.json", "dapa_report.json", "mergekit_config.yml"}
        assert {
            name
            for name in files - described - {path.name for path in shards(out)} - {INDEX}
            if not (is_settings(name) or is_licence(name))
        } == ({"modeling_x.py", "layers_x.py"} if "code" in names else set())
        assert ("modeling_x.py" in (out / "README.md").read_text()) == ("code" in names)
        return True


@settings(max_examples=15)
@given(st.frozensets(st.sampled_from(sorted(CHANGES)), max_size=4))
def test_run_verify_push_evaluate_and_card_say_the_same_of_any_folder(pair, names):
    if "two forms" in names:
        # Without the index there is one form only.
        names -= {"no index"}
    leads_away = "no index" in names and names & {"pickles", "the same weights, named"}
    assert check_folder(pair, names) == (not names & HARMFUL.keys() and not leads_away)


@pytest.mark.parametrize("left_out", ["no index", "pickles"])
def test_what_lies_beside_a_model_changes_nothing(pair, left_out):
    """All at once, but pickles without an index, since transformers would load them."""
    names = frozenset(HARMLESS) - {left_out}
    assert check_folder(pair, names - {"the same weights, named"} if "no index" in names else names)


@pytest.mark.parametrize("name", HARMFUL)
def test_what_transformers_would_load_otherwise_is_refused(pair, name):
    assert not check_folder(pair, frozenset([name]))


@pytest.mark.parametrize("role", ["target", "source", "pretrained"])
def test_every_command_refuses_an_adapter_beside_the_weights_of_any_model(pair, tmp_path, role, write_recipe):
    folders = {name: shutil.copytree(pair[0 if name == "target" else 1], tmp_path / name) for name in ROLES}
    shutil.copytree(pair[0].with_name("adapter"), tmp_path / "adapter")
    HARMFUL["an adapter"](folders[role])
    parameters = {"edit": "difference", "pretrained": folders["pretrained"]} if role == "pretrained" else {}
    recipe = write_recipe(folders["target"], folders["source"], layers=1, **parameters)
    out = tmp_path / "out"
    commands = [
        ("plan", recipe), ("run", recipe, out, "--no-evaluate"), ("search", recipe), ("evaluate", folders[role]),
        ("verify", pair[0], "--recipe", recipe), ("trace", recipe, out), ("compare", recipe, "--out", out),
        ("patch", "extract", folders[role], tmp_path / "a.dapa", "--base", pair[1]),
    ]  # fmt: skip
    for command in commands:
        refused = call(*command)
        assert refused.exit_code == 4, (command, refused.output)
        assert f"{folders[role]} has adapter_config.json and adapter_model.safetensors beside its own" in refused.output
    assert not out.exists()
    if role != "pretrained":
        with pytest.raises(CheckpointError, match=re.escape(f"{folders[role]} has adapter_config.json")):
            run_merge(configuration(folders["target"], folders["source"], layers="1"), str(out), MergeOptions())
