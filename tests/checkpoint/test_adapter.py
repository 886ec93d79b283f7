"""Adapters merged into their bases, against peft's own `merge_and_unload`."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import typing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import save_random, tiny_llama
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
)

from dapa_merge.checkpoint import adapter as adapter_module
from dapa_merge.checkpoint.convert import _KNOWN, _REFUSED, _STARTS, open_location
from dapa_merge.checkpoint.location import Location
from dapa_merge.checkpoint.open import Checkpoint, open_checkpoint, read_bytes
from dapa_merge.checkpoint.spelling import CONV1D
from dapa_merge.errors import CheckpointError

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.usefixtures("own_cache"),
]

SHAPE = dict(
    vocab_size=152, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=2,
)  # fmt: skip
EXPERTS = dict(num_local_experts=3, num_experts_per_tok=2)
CONFIGS = {
    "llama": lambda: tiny_llama(num_hidden_layers=2, attention_bias=True),
    "tied": lambda: tiny_llama(num_hidden_layers=2, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(vocab_size=152, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=2),
    "phi3": lambda: Phi3Config(**SHAPE),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "mixtral": lambda: MixtralConfig(**SHAPE, **EXPERTS),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SHAPE, moe_intermediate_size=24, shared_expert_intermediate_size=40, num_experts=3, num_experts_per_tok=2
    ),
}
IMAGE = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
)
# Models that see, of which transformers 5 names the modules otherwise than the files do.
SEEING = {
    "llava": lambda: LlavaConfig(
        text_config=LlamaConfig(**SHAPE), vision_config=CLIPVisionConfig(**IMAGE), image_token_index=150
    ),
    "gemma3": lambda: Gemma3Config(
        text_config={**SHAPE, "head_dim": 8, "sliding_window": 16}, vision_config=IMAGE, mm_tokens_per_image=4,
        image_token_index=149, boi_token_index=150, eoi_token_index=151,
    ),
}  # fmt: skip
ATTENTION_AND_MLP = ["q_proj", "gate_proj", "down_proj"]
# Architecture, dtype and settings of the adapter.
EQUAL = {
    "plain, bfloat16": ("llama", "bfloat16", dict(target_modules=ATTENTION_AND_MLP)),
    "plain, float16": ("llama", "float16", dict(target_modules=ATTENTION_AND_MLP)),
    "plain, float32": ("llama", "float32", dict(target_modules=ATTENTION_AND_MLP)),
    "plain, float64": ("llama", "float64", dict(target_modules=ATTENTION_AND_MLP)),
    "all linear": ("llama", "bfloat16", dict(target_modules="all-linear")),
    "a pattern": ("llama", "bfloat16", dict(target_modules=r".*layers\.\d+\.mlp\.(up|down)_proj")),
    "some layers of a stack": (
        "llama",
        "bfloat16",
        dict(target_modules=["o_proj"], layers_to_transform=1, layers_pattern=["layers"]),
    ),
    "some layers": ("llama", "bfloat16", dict(target_modules=["o_proj"], layers_to_transform=[1])),
    "all but some": (
        "llama",
        "bfloat16",
        dict(target_modules=["q_proj"], exclude_modules=["layers.1.self_attn.q_proj"]),
    ),
    "stabilized ranks": ("llama", "bfloat16", dict(target_modules=["q_proj"], use_rslora=True)),
    "patterns of ranks": (
        "llama",
        "bfloat16",
        dict(
            target_modules=ATTENTION_AND_MLP,
            rank_pattern={"down_proj": 3, r"^model.layers.1.self_attn.q_proj": 5, r".*\.gate_proj": 2},
            alpha_pattern={"layers.0.mlp.down_proj": 7, "gate_proj": 1.5},
        ),
    ),
    "DoRA": ("llama", "bfloat16", dict(target_modules=ATTENTION_AND_MLP, use_dora=True)),
    "DoRA, float16": ("llama", "float16", dict(target_modules=ATTENTION_AND_MLP, use_dora=True)),
    "all biases": ("llama", "bfloat16", dict(target_modules=["q_proj"], bias="all")),
    "biases of LoRA": ("qwen2", "bfloat16", dict(target_modules=["q_proj", "o_proj"], bias="lora_only")),
    "biases in B": ("qwen2", "bfloat16", dict(target_modules=["q_proj", "v_proj"], lora_bias=True)),
    "saved modules": (
        "llama",
        "bfloat16",
        dict(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    ),
    "saved norms": ("llama", "bfloat16", dict(target_modules=["q_proj"], modules_to_save=["input_layernorm"])),
    "single tokens": ("llama", "bfloat16", dict(target_modules=["q_proj"], trainable_token_indices=[3, 1, 150])),
    "single tokens, tied": ("tied", "bfloat16", dict(target_modules=["q_proj"], trainable_token_indices=[3, 1])),
    "the head": ("llama", "bfloat16", dict(target_modules=["q_proj", "lm_head"])),
    "columns": ("gpt2", "bfloat16", dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "columns, DoRA": ("gpt2", "float32", dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=True)),
    "fused": ("phi3", "bfloat16", dict(target_modules=["qkv_proj", "gate_up_proj"])),
}
# peft rounds the change before it adds it.
ROUNDED_TWICE = {
    "embeddings": ("llama", "bfloat16", dict(target_modules=["q_proj", "embed_tokens"])),
    "embeddings, DoRA": ("llama", "bfloat16", dict(target_modules=["embed_tokens"], use_dora=True)),
    "experts of one file each": (
        "mixtral",
        "bfloat16",
        dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ),
    "experts' second projection": (
        "qwen2_moe",
        "bfloat16",
        dict(target_modules=[], target_parameters=["mlp.experts.down_proj"]),
    ),
    "a router": ("qwen2_moe", "float32", dict(target_modules=[], target_parameters=["mlp.gate.weight"])),
}


def loader_of(base: Path):
    seeing = json.loads((base / "config.json").read_text())["model_type"] in SEEING
    return AutoModelForImageTextToText if seeing else AutoModelForCausalLM


def save_base(folder: Path, kind: str, dtype: str = "bfloat16") -> Path:
    if kind in SEEING:
        torch.manual_seed(1)
        model = AutoModelForImageTextToText.from_config(SEEING[kind]()).to(getattr(torch, dtype))
        model.save_pretrained(folder, max_shard_size="60KB")
        return folder
    return save_random(folder, CONFIGS[kind](), seed=1, dtype=getattr(torch, dtype))


def save_adapter(base: Path, folder: Path, seed: int = 5, **settings) -> Path:
    """An adapter of random values, as after training."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, **settings})
    model = get_peft_model(loader_of(base).from_pretrained(base, dtype="auto"), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def merged(base: Path, adapter: Path) -> Checkpoint:
    return open_location(Location(str(base), adapter=Location(str(adapter))))


def by_peft(base: Path, adapter: Path, dtype: str = "auto") -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(loader_of(base).from_pretrained(base, dtype=dtype), adapter)
    return model.merge_and_unload().state_dict()


def assert_merged_as_by_peft(base: Path, adapter: Path, dtype: str = "auto") -> None:
    """Compare tensors as transformers loads them; `dtype` is that of the base when peft merges."""
    ours = loader_of(base).from_pretrained(merged(base, adapter).folder, dtype="auto").state_dict()
    before = loader_of(base).from_pretrained(base, dtype="auto").state_dict()
    theirs = by_peft(base, adapter, dtype)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, theirs[name].to(tensor.dtype)), name
    assert any(not torch.equal(tensor, before[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("how", EQUAL)
def test_a_merge_is_pefts_bit_for_bit(tmp_path, how):
    kind, dtype, settings = EQUAL[how]
    base = save_base(tmp_path / "base", kind, dtype)
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    assert_merged_as_by_peft(base, adapter)


@pytest.mark.parametrize("how", ROUNDED_TWICE)
def test_a_merge_is_rounded_once_where_peft_rounds_twice(tmp_path, how):
    kind, dtype, settings = ROUNDED_TWICE[how]
    base = save_base(tmp_path / "base", kind, dtype)
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    assert_merged_as_by_peft(base, adapter, "float32")


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_an_adapter_of_single_experts_as_transformers_4_had_them_is_merged_as_by_peft(tmp_path):
    base = save_base(tmp_path / "base", "mixtral")
    torch.manual_seed(3)
    tensors = {}
    for name, tensor in open_checkpoint(str(base)).tensors.items():
        if ".experts." in name:
            outputs, inputs = tensor.shape
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(4, inputs)
            tensors[f"{module}.lora_B.weight"] = torch.randn(outputs, 4) / 10
    assert len(tensors) == 2 * 2 * 3 * 3
    adapter = tmp_path / "adapter"
    LoraConfig(r=4, lora_alpha=6, target_modules=["w1", "w2", "w3"], task_type="CAUSAL_LM").save_pretrained(adapter)
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert_merged_as_by_peft(base, adapter, "float32")


@pytest.mark.parametrize("kind", SEEING)
def test_an_adapter_of_a_model_that_sees_changes_its_towers_under_the_names_of_the_files(tmp_path, kind):
    base = save_base(tmp_path / "base", kind)
    names = {name.partition(".")[0] for name in open_checkpoint(str(base)).tensors}
    assert "language_model" in names
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "up_proj", "fc1"])
    assert_merged_as_by_peft(base, adapter)
    # As trained on the language model alone, whose modules have fewer wrappers.
    text = {
        name.replace("model.language_model.", "model."): value
        for name, value in load_file(adapter / "adapter_model.safetensors").items()
        if "language_model" in name
    }
    save_file(text, adapter / "adapter_model.safetensors")
    before, after = open_checkpoint(str(base)), merged(base, adapter)
    changed = {name for name, tensor in before.tensors.items() if value_of(before, name) != value_of(after, name)}
    assert changed == {
        name for name in before.tensors if "language_model" in name and ("q_proj" in name or "up_proj" in name)
    }


def value_of(checkpoint: Checkpoint, name: str) -> bytes:
    return read_bytes(checkpoint, checkpoint.tensors[name])


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A base and an adapter for it, which nobody changes."""
    folder = tmp_path_factory.mktemp("pair")
    base = save_base(folder / "base", "llama")
    return base, save_adapter(base, folder / "adapter", target_modules=["q_proj", "down_proj"])


def edit(adapter: Path, folder: Path, tensors: Callable[[dict], dict] = dict, **settings) -> Path:
    """A copy of an adapter with other tensors and settings."""
    shutil.copytree(adapter, folder)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file(tensors(load_file(weights)), weights)
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    return folder


def test_all_but_the_changed_values_is_the_bases_bit_for_bit(pair, tmp_path):
    base, adapter = shutil.copytree(pair[0], tmp_path / "base"), pair[1]
    config = json.loads((base / "config.json").read_text())
    # As older versions of transformers, and other programs, write and read it.
    config |= {"rope_theta": 5e5, "rope_scaling": None, "num_nextn_predict_layers": 1}
    del config["rope_parameters"]
    (base / "config.json").write_text(json.dumps(config))
    for name in ("LICENSE", "NOTICE", "USE_POLICY.md", "preprocessor_config.json", "processor_config.json"):
        (base / name).write_text(json.dumps({"name": name}))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("tools")
    index = base / "model.safetensors.index.json"
    owners = json.loads(index.read_text())
    extra = {
        "mtp.layers.0.self_attn.q_proj.weight": torch.ones(4, 4),
        "model.layers.2.mlp.down_proj.weight": torch.ones(4),
    }
    save_file(extra, base / "mtp.safetensors")
    owners["weight_map"] |= dict.fromkeys(extra, "mtp.safetensors")
    index.write_text(json.dumps(owners))
    before, after = open_checkpoint(str(base)), merged(base, adapter)
    for path in filter(Path.is_file, base.rglob("*")):
        if path.suffix != ".safetensors":
            assert (after.folder / path.relative_to(base)).read_bytes() == path.read_bytes()
    assert after.tensors == before.tensors
    assert after.shards == before.shards
    changed = {name for name in before.tensors if value_of(before, name) != value_of(after, name)}
    assert changed == {
        f"model.layers.{n}.{kind}.weight" for n in (0, 1) for kind in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert {path.name for path in after.folder.iterdir()} == {path.name for path in base.iterdir()}
    # Whole files that stay take no place.
    untouched = set(before.shards) - {before.tensors[name].file for name in changed}
    assert untouched
    assert all((after.folder / shard).is_symlink() for shard in untouched)


def test_tensors_of_other_dtypes_keep_them(pair, tmp_path):
    base, adapter = shutil.copytree(pair[0], tmp_path / "base"), pair[1]

    def to_float32(content: dict) -> None:
        for name in content:
            if "norm" in name or name.endswith("down_proj.weight"):
                content[name] = content[name].float()

    for shard in open_checkpoint(str(base)).shards:
        content = load_file(base / shard)
        to_float32(content)
        save_file(content, base / shard)
    before, after = open_checkpoint(str(base)), merged(base, adapter)
    assert {tensor.dtype for tensor in after.tensors.values()} == {"BF16", "F32"}
    assert after.tensors == before.tensors


NAMINGS = {
    "with the adapter's name": lambda name: name.replace("lora_A.", "lora_A.default.").replace(
        "lora_B.", "lora_B.mine."
    ),
    "of a compiled model": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "of a divided model": lambda name: name.replace(".mlp.", "._fsdp_wrapped_module.mlp."),
    "wrapped twice": lambda name: f"base_model.model.{name}",
    "without a wrapper": lambda name: name.removeprefix("base_model.model."),
    "of the model inside": lambda name: name.replace("model.model.layers", "model.layers"),
    "of a model that sees": lambda name: name.replace("model.model.layers", "model.model.language_model.layers"),
}


@pytest.mark.parametrize("how", NAMINGS)
def test_names_of_other_trainers_are_understood(pair, tmp_path, how):
    base, adapter = pair
    other = edit(
        adapter, tmp_path / "other", lambda tensors: {NAMINGS[how](name): one for name, one in tensors.items()}
    )
    first, second = merged(base, adapter), merged(base, other)
    assert all(value_of(first, name) == value_of(second, name) for name in first.tensors)


def test_every_tensor_of_an_adapter_is_used_or_named(pair, tmp_path):
    base, adapter = pair
    for number, name in enumerate(load_file(adapter / "adapter_model.safetensors")):
        for part in ("_proj", "lora_"):
            other = name.replace(part, f"{part}other_")
            strange = renamed(lambda key, name=name, other=other: other if key == name else key)
            faulty = edit(adapter, tmp_path / f"{number}{part}", strange)
            with pytest.raises(CheckpointError) as caught:
                merged(base, faulty)
            # Its own name, or that of the factor which it left alone.
            pairs = {name.replace("lora_A", factor).replace("lora_B", factor) for factor in ("lora_A", "lora_B")}
            assert any(text in str(caught.value) for text in (other, *pairs))


def test_a_module_that_the_adapter_lacks_is_named(pair, tmp_path):
    base, adapter = pair
    for place in ("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
        lacking = edit(
            adapter,
            tmp_path / place,
            lambda tensors, place=place: {name: one for name, one in tensors.items() if place not in name},
        )
        with pytest.raises(CheckpointError, match=f"lacks weights for {place}.weight"):
            merged(base, lacking)


def renamed(rename: Callable[[str], str]) -> Callable[[dict], dict]:
    return lambda tensors: {rename(name): one for name, one in tensors.items()}


def first_factor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], dict]:
    def changed(tensors: dict) -> dict:
        name = min(tensors)
        return {**tensors, name: change(tensors[name]).contiguous()}

    return changed


Q = "base_model.model.model.layers.0.self_attn.q_proj"
TOKENS = "base_model.model.model.embed_tokens"
# What is changed in an adapter, and what the message names.
FAULTS = {
    "of another width": (first_factor(lambda one: one[:, 1:]), {}, ["another size", "[32, 47]", "[32, 48]"]),
    "of another rank": (dict, {"r": 8}, ["rank 4", "8"]),
    "with values that are not numbers": (first_factor(lambda one: one * math.nan), {}, ["down_proj", "not finite"]),
    "of whole numbers": (first_factor(lambda one: one.to(torch.int64)), {}, ["I64"]),
    "with another vocabulary": (
        lambda tensors: {**tensors, f"{TOKENS}.weight": torch.ones(160, 32)}, {},
        ["another vocabulary", "[160, 32]", "[152, 32]"],
    ),
    "with embeddings of another vocabulary": (
        lambda tensors: {
            **tensors, f"{TOKENS}.lora_embedding_A": torch.ones(4, 160), f"{TOKENS}.lora_embedding_B": torch.ones(32, 4)
        },
        {"target_modules": ["q_proj", "down_proj", "embed_tokens"]}, ["another vocabulary", "[160, 32]", "[152, 32]"],
    ),
    "with tokens outside": (
        lambda tensors: {**tensors, f"{TOKENS}.token_adapter.trainable_tokens_delta": torch.ones(1, 32)},
        {"trainable_token_indices": {"embed_tokens": [152]}}, ["another vocabulary", "token 152", "has 152"],
    ),
    "with tokens that are not named": (
        lambda tensors: {**tensors, f"{TOKENS}.token_adapter.trainable_tokens_delta": torch.ones(1, 32)}, {},
        ["trainable_tokens_delta"],
    ),
    "with a magnitude but no DoRA": (
        lambda tensors: {**tensors, f"{Q}.lora_magnitude_vector": torch.ones(32)}, {}, [Q, "use_dora"],
    ),
    "without its magnitudes": (dict, {"use_dora": True}, ["magnitude", "use_dora"]),
    "with the same twice": (
        lambda tensors: {**tensors, f"{Q}.lora_A.second.weight": torch.ones(4, 32)}, {}, [Q, "second"],
    ),
    "with two names of one module": (
        lambda tensors: tensors | {
            name.replace("model.model.layers", "model.layers"): one.clone()
            for name, one in tensors.items() if "layers.0" in name
        },
        {}, ["model.layers.0.", "several"],
    ),
    "with a bias that the base lacks": (
        lambda tensors: {**tensors, "base_model.model.model.layers.0.mlp.down_proj.lora_B.bias": torch.ones(32)},
        {"lora_bias": True}, ["down_proj.lora_B.bias", "has no bias"],
    ),
    "of a module that is not asked for": (dict, {"target_modules": ["q_proj"]}, ["down_proj", "target"]),
    "of an excluded module": (dict, {"exclude_modules": ["down_proj"]}, ["down_proj", "target"]),
    "with a pattern without end": (dict, {"target_modules": r"(.|.)*\d\d\d"}, ["target_modules"]),
    "with a rank for a pattern without end": (dict, {"rank_pattern": {r"(.|.)*\d\d\d": 2}}, ["rank_pattern"]),
    "with a scale beyond all": (dict, {"lora_alpha": 10**400}, ["lora_alpha"]),
    "of a layer that is not asked for": (dict, {"layers_to_transform": [1]}, ["layers.0.", "target"]),
    "of layers of another name": (
        dict, {"layers_to_transform": [0, 1], "layers_pattern": "blocks"}, ["layers.0.", "target"],
    ),
    "with layers that are none": (dict, {"layers_to_transform": "all"}, ["layers_to_transform", "'all'"]),
    "with a name for a list": (dict, {"modules_to_save": "lm_head"}, ["modules_to_save", "'lm_head'"]),
    "with a list for patterns": (dict, {"alpha_pattern": [8]}, ["alpha_pattern", "[8]"]),
    "with a rank that is none": (dict, {"r": "4"}, ["r of ", "'4'"]),
    "with repeated layers": (dict, {"layer_replication": [[0, 2]]}, ["layer_replication"]),
    "that starts elsewhere": (dict, {"init_lora_weights": "pissa_niter_4"}, ["init_lora_weights", "pissa_niter_4"]),
    "with an unknown setting": (dict, {"use_future": True}, ["use_future"]),
    "without tensors": (lambda tensors: {}, {}, ["no tensor"]),
}  # fmt: skip


@pytest.mark.parametrize("how", FAULTS)
def test_an_adapter_that_cannot_be_merged_exactly_is_one_sentence(pair, tmp_path, how, own_cache, monkeypatch):
    monkeypatch.setattr(adapter_module, "PATTERN_SECONDS", 0.3)
    base, adapter = pair
    tensors, settings, named = FAULTS[how]
    faulty = edit(adapter, tmp_path / "faulty", tensors, **settings)
    with pytest.raises(CheckpointError) as caught:
        merged(base, faulty)
    assert all(text in str(caught.value) for text in (*named, str(faulty)))
    assert not list(own_cache.rglob("*.safetensors"))


@pytest.mark.parametrize("kind", [one.value for one in PeftType if one.value != "LORA"])
def test_adapters_that_are_not_lora_are_named(pair, tmp_path, kind):
    base, adapter = pair
    with pytest.raises(CheckpointError, match=f"is not a LoRA: peft_type .* is '{kind}'"):
        merged(base, edit(adapter, tmp_path / "other", peft_type=kind))


def test_every_setting_of_peft_is_followed_or_refused():
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= {*_KNOWN, *_REFUSED}
    starts = typing.get_args(typing.get_type_hints(LoraConfig)["init_lora_weights"])
    named = {one for start in starts for one in typing.get_args(start)}
    # The base is changed by the rest, which peft says in its documentation.
    assert named - set(_STARTS) == {"olora", "pissa", "pissa_niter_[number of iters]", "corda", "loftq"}


def test_the_models_with_transposed_weights_are_those_of_transformers():
    models = Path(transformers.models.__file__).parent
    uses = "from ...pytorch_utils import Conv1D"
    found = {path.parent.name for path in models.glob("*/modeling_*.py") if uses in path.read_text(encoding="utf-8")}
    assert {name.replace("openai-gpt", "openai") for name in CONV1D} == found


TIED = {
    "embeddings by LoRA": dict(target_modules=["q_proj", "embed_tokens"]),
    "embeddings as a whole": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "both apart": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "the head by LoRA": dict(target_modules=["q_proj", "lm_head"]),
}


@pytest.mark.parametrize("how", TIED)
def test_shared_embeddings_are_not_changed_alone(tmp_path, how):
    base = save_base(tmp_path / "base", "tied")
    adapter = save_adapter(base, tmp_path / "adapter", **TIED[how])
    with pytest.raises(CheckpointError, match=r"embeddings and the output head apart.*tie_word_embeddings"):
        merged(base, adapter)


def test_shared_embeddings_that_an_adapter_holds_twice_are_written_once(tmp_path):
    base = save_base(tmp_path / "base", "tied")
    adapter = save_adapter(base, tmp_path / "adapter", **TIED["both apart"])
    both = edit(
        adapter,
        tmp_path / "both",
        lambda tensors: {**tensors, "base_model.model.lm_head.weight": tensors[f"{TOKENS}.weight"].clone()},
    )
    after = merged(base, both)
    assert (
        value_of(after, "model.embed_tokens.weight")
        == load_file(both / "adapter_model.safetensors")[f"{TOKENS}.weight"]
        .to(torch.bfloat16)
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )
