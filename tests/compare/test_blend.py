from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, SHAPE, save_random
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.compare.blend import Blender, MergekitBlend, merge_config
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.measure.live import LiveModel, load_model
from dapa_merge.plan.plan import plan_transplant

BLENDS = (
    MergekitBlend("linear", 0.3),
    MergekitBlend("task_arithmetic", 0.4),
    MergekitBlend("ties", 0.6, 0.4),
    MergekitBlend("slerp", 0.3),
)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
EMBEDDING = "model.embed_tokens.weight"


def config_of(architecture: str, **changes):
    name, own = ARCHITECTURES[architecture]
    return getattr(transformers, name)(**{**SHAPE, "num_hidden_layers": 1, **own, **changes})


def save_three(folder: Path, config, dtypes=(BF16, BF16, BF16), others=None) -> list[Path]:
    """A target, a source and a pretrained model."""
    return [
        save_random(folder / name, config if name == "target" else others or config, seed=seed, dtype=dtype)
        for seed, (name, dtype) in enumerate(zip(("target", "source", "pretrained"), dtypes, strict=True))
    ]


def blender_of(folders: list[Path], has_pretrained: bool = True, live: LiveModel | None = None, **options) -> Blender:
    target, source, *others = (open_checkpoint(str(folder)) for folder in folders)
    live = live or LiveModel(plan_transplant(target, source, ("mlp",)), torch.device("cpu"))
    return Blender(live, target, source, others[0] if has_pretrained else None, **options)


def mergekits(
    blend: MergekitBlend, folders: list[Path], has_pretrained: bool, out: Path, keeps_tokenizer: bool
) -> dict:
    """What mergekit writes, in the dtypes of the target's files."""
    target, source, pretrained = map(str, folders)
    config = merge_config(
        blend, target, source, pretrained if has_pretrained else None, keeps_tokenizer=keeps_tokenizer
    )
    run_merge(config, str(out), MergeOptions(quiet=True))
    stored = tensors_of(folders[0])
    return {name: value.to(stored[name].dtype) if name in stored else value for name, value in tensors_of(out).items()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for shard in folder.glob("*.safetensors") for name, value in load_file(shard).items()}


def bits(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []


def faults(folders: list[Path], out: Path, *, keeps_tokenizer: bool = False) -> list[tuple[MergekitBlend, str]]:
    """Tensors that a live blend does not have as mergekit writes them; and the target is what it was afterwards."""
    live, found = None, []
    for has_pretrained in (True, False):
        blender = blender_of(folders, has_pretrained, live=live)
        live = blender.live
        assert not blender.why_not
        before = bits(blender.live.model)
        for blend in BLENDS:
            place = out / f"{blend.method} {has_pretrained}"
            wanted = mergekits(blend, folders, has_pretrained, place, keeps_tokenizer)
            with blender.blended(blend) as (model, tokenizer):
                assert model is blender.live.model
                assert tokenizer is blender.live.tokenizer
                state = bits(model)
            for name, value in wanted.items():
                is_mergekits = torch.equal(state[name][: len(value)], value.to(state[name].dtype))
                # Rows that are no token's.
                if not is_mergekits or not torch.equal(state[name][len(value) :], before[name][len(value) :]):
                    found.append((blend, name))
            changed = {name for name in before if not torch.equal(state[name], before[name])}
            assert wanted.keys() <= changed
            assert_same(bits(blender.live.model), before)
    return found


@pytest.mark.parametrize(
    "architecture",
    ["LlamaForCausalLM", "MistralForCausalLM", "GemmaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
     "Phi3ForCausalLM"],
)  # fmt: skip
def test_a_live_blend_is_what_mergekit_writes(architecture, tmp_path):
    assert faults(save_three(tmp_path, config_of(architecture)), tmp_path / "out") == []


@pytest.mark.parametrize("dtypes", [(BF16, F32, F16), (F16, BF16, F32)])
def test_dtypes_are_promoted_as_mergekit_does_it_and_stored_as_the_targets(dtypes, tmp_path):
    assert faults(save_three(tmp_path, config_of("LlamaForCausalLM"), dtypes), tmp_path / "out") == []


def test_each_tensor_is_stored_as_the_target_stores_it(tmp_path):
    folders = save_three(tmp_path, config_of("LlamaForCausalLM"), (BF16, F32, F32))
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folders[0], name, lambda value: value.float())
    assert faults(folders, tmp_path / "out") == []


def rewrite(folder: Path, name: str, change) -> None:
    """Put something else in a tensor's place in its file."""
    shard = folder / open_checkpoint(str(folder)).tensors[name].file
    content = load_file(shard)
    content[name] = change(content[name])
    save_file(content, shard, metadata={"format": "pt"})


def add_tokens(folder: Path, *tokens: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.add_tokens(list(tokens)) == len(tokens)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GemmaForCausalLM"])
def test_tokens_and_rows_that_only_the_target_has_stay_its_own(architecture, tmp_path):
    size = len(AutoTokenizer.from_pretrained(save_random(tmp_path / "any", config_of(architecture), seed=0)))
    # Of the target, the last rows are of no token.
    config = config_of(architecture, vocab_size=size + 5)
    folders = save_three(tmp_path, config, others=config_of(architecture, vocab_size=size))
    add_tokens(folders[0], "<one>", "<two>", "<three>")
    assert faults(folders, tmp_path / "out", keeps_tokenizer=True) == []

    blender = blender_of(folders)
    own = bits(blender.live.model)[EMBEDDING]
    with blender.blended(MergekitBlend("task_arithmetic", 0.5)) as (model, _):
        found = model.state_dict()[EMBEDDING]
        assert not torch.equal(found[:size], own[:size])
        assert torch.equal(found[size:], own[size:])


def test_tokens_that_have_another_id_in_the_source_are_matched(tmp_path):
    folders = save_three(tmp_path, config_of("LlamaForCausalLM", vocab_size=190))
    add_tokens(folders[0], "<one>", "<two>")
    for folder in folders[1:]:
        add_tokens(folder, "<two>", "<one>")
    assert faults(folders, tmp_path / "out", keeps_tokenizer=True) == []


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_what_transformers_fuses_is_written_by_mergekit_and_loaded(architecture, tmp_path):
    folders = save_three(tmp_path, config_of(architecture))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for has_pretrained, blend in ((False, BLENDS[0]), (True, BLENDS[2])):
        blender = blender_of(folders, has_pretrained, dir=scratch)
        assert blender.why_not
        assert re.match(
            "transformers loads .* with model.layers.0.mlp.*, which is not a tensor of its", blender.why_not
        )
        before = bits(blender.live.model)
        out = tmp_path / blend.method
        mergekits(blend, folders, has_pretrained, out, False)
        wanted = bits(load_model(open_checkpoint(str(out)), torch.device("cpu"))[0])
        with blender.blended(blend) as (model, tokenizer):
            assert model is not blender.live.model
            assert tokenizer.get_vocab() == blender.live.tokenizer.get_vocab()
            assert_same(bits(model), wanted)
            assert any(scratch.iterdir())
        assert not any(parameter.numel() for parameter in model.parameters())
        assert not any(scratch.iterdir())
        assert_same(bits(blender.live.model), before)


def test_what_is_written_generates_as_the_target_does(tmp_path):
    folders = save_three(tmp_path, config_of("MixtralForCausalLM", vocab_size=190))
    add_tokens(folders[0], "<one>")
    (folders[0] / "chat_template.jinja").write_text("{{ messages[0].content }}, said with a template of the target's")
    (folders[2] / "tokenizer_config.json").unlink()
    blender = blender_of(folders)
    live = blender.live
    live.model.generation_config.save_pretrained(folders[0])
    with blender.blended(MergekitBlend("task_arithmetic", 0.5)) as (model, tokenizer):
        assert tokenizer.chat_template == live.tokenizer.chat_template
        assert len(tokenizer) == len(live.tokenizer)
        assert model.dtype == live.model.dtype
        assert model.generation_config.eos_token_id == live.model.generation_config.eos_token_id


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    return save_three(tmp_path_factory.mktemp("three"), config_of("LlamaForCausalLM", num_hidden_layers=2))


@pytest.fixture(scope="module")
def blender(folders) -> Blender:
    return blender_of(folders)


def test_the_target_is_put_back_after_an_exception(blender):
    before = bits(blender.live.model)
    seen = []

    def fail() -> None:
        with blender.blended(BLENDS[0]) as (model, _):
            seen.append(bits(model)[EMBEDDING])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not torch.equal(seen[0], before[EMBEDDING])
    assert_same(bits(blender.live.model), before)
    with blender.blended(BLENDS[1]) as (model, _):
        assert not torch.equal(bits(model)[EMBEDDING], before[EMBEDDING])


@pytest.mark.parametrize("number", [1, 4, 21])
def test_the_target_is_put_back_when_blending_breaks_off(blender, number, monkeypatch):
    before = bits(blender.live.model)
    put, calls = Blender._put, []

    def failing(self, name, value):
        calls.append(name)
        if len(calls) == number:
            put(self, name, torch.full_like(value, torch.nan))
            raise MemoryError
        put(self, name, value)

    monkeypatch.setattr(Blender, "_put", failing)
    with pytest.raises(CheckpointError, match="MemoryError"), blender.blended(BLENDS[2]):
        pytest.fail("it was blended")
    assert len(calls) == 2 * number
    assert_same(bits(blender.live.model), before)


def test_blends_do_not_nest(blender):
    with (
        blender.blended(BLENDS[0]),
        pytest.raises(RuntimeError, match="blended already"),
        blender.blended(BLENDS[1]),
    ):
        pytest.fail("they nest")


def test_a_weight_of_one_is_the_source(blender, folders):
    with blender.blended(MergekitBlend("linear", 1.0)) as (model, _):
        assert_same(bits(model), {**bits(model), **tensors_of(folders[1])})


def test_the_live_target_must_be_as_in_its_files(folders, tmp_path):
    target = Path(shutil.copytree(folders[0], tmp_path / "target"))
    blender = blender_of([target, *folders[1:]])
    rewrite(target, "model.norm.weight", lambda value: value + 1)
    again = Blender(blender.live, open_checkpoint(str(target)), open_checkpoint(str(folders[1])), None)
    assert again.why_not == (
        f"transformers loads {target} as a LlamaForCausalLM in which model.norm.weight is not as in its files"
    )


def test_what_mergekit_cannot_do_is_said_in_a_sentence(folders, blender, tmp_path):
    changes = {"hidden_size": 48, "num_hidden_layers": 2}
    wide = save_random(tmp_path / "wide", config_of("LlamaForCausalLM", **changes), seed=3)
    alien = save_random(tmp_path / "alien", config_of("Qwen2ForCausalLM"), seed=3)
    before = bits(blender.live.model)
    for pretrained, fault in ((wide, "ValueError: Tensor size mismatch"), (alien, ".* different architectures")):
        with_other = blender_of([*folders[:2], pretrained], live=blender.live)
        with (
            pytest.raises(CheckpointError, match=rf"^mergekit cannot merge .*target, .*source, {pretrained}: {fault}"),
            with_other.blended(BLENDS[2]),
        ):
            pytest.fail("it was blended")
        assert_same(bits(blender.live.model), before)
        with with_other.blended(BLENDS[0]) as (model, _):
            assert not torch.equal(bits(model)[EMBEDDING], before[EMBEDDING])
    with (
        pytest.raises(UsageError, match="'nearswap' is not a method of a blend"),
        blender.blended(MergekitBlend("nearswap", 0.5)),
    ):
        pytest.fail("it was blended")


def test_folders_of_any_name_and_weights_of_any_are_read(folders, tmp_path):
    odd = [Path(shutil.copytree(folder, tmp_path / f"{folder.name}+a@b@c")) for folder in folders]
    for folder in odd:
        (folder / "model.safetensors.index.json").unlink()
    blender, plain = blender_of(odd), blender_of(folders)
    assert not blender.why_not
    for blend in BLENDS:
        with blender.blended(blend) as (one, _), plain.blended(blend) as (other, _):
            assert_same(bits(one), bits(other))


def test_nothing_is_said_and_loggers_are_as_before(tmp_path, capfd):
    folders = save_three(tmp_path, config_of("LlamaForCausalLM", vocab_size=190))
    add_tokens(folders[0], "<one>")
    root, logger = logging.getLogger(), logging.getLogger("mergekit")
    before = (list(root.handlers), list(root.filters), logger.level)
    blender = blender_of(folders)
    capfd.readouterr()
    with blender.blended(BLENDS[2]):
        pass
    assert capfd.readouterr() == ("", "")
    assert (list(root.handlers), list(root.filters), logger.level) == before


def test_mergekit_is_told_what_a_blend_means():
    def told(*arguments, keeps_tokenizer=False):
        config = merge_config(*arguments, keeps_tokenizer=keeps_tokenizer)
        return config.model_dump(exclude_none=True, mode="json")

    ours, theirs = {"model": "a/target"}, {"model": "a/source@v1"}
    models = ("a/target", "a/source@v1", "a/base")
    assert told(MergekitBlend("linear", 0.25), *models) == {
        "merge_method": "linear",
        "base_model": "a/target",
        "models": [{**ours, "parameters": {"weight": 0.75}}, {**theirs, "parameters": {"weight": 0.25}}],
    }
    assert told(MergekitBlend("task_arithmetic", 0.5), *models, keeps_tokenizer=True) == {
        "merge_method": "task_arithmetic",
        "base_model": "a/base",
        "models": [{**ours, "parameters": {"weight": 1.0}}, {**theirs, "parameters": {"weight": 0.5}}],
        "tokenizer": {"source": "a/target"},
    }
    assert told(MergekitBlend("ties", 0.5, 0.2), *models[:2], None, keeps_tokenizer=True) == {
        "merge_method": "ties",
        "base_model": "a/target",
        "models": [{**theirs, "parameters": {"weight": 1.0, "density": 0.2}}],
        "parameters": {"lambda": 0.5},
        "tokenizer": {"source": "base"},
    }
    assert MergekitBlend("task_arithmetic", 0.5).name == "task arithmetic 0.5"
