"""Adapters merged into their bases, against peft's own `merge_and_unload`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import save_random, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
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

from dapa_merge.checkpoint.convert import open_location
from dapa_merge.checkpoint.location import Location
from dapa_merge.checkpoint.open import Checkpoint, open_checkpoint, read_bytes

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
