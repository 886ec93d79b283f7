"""Published models as tests need them: what configs and cards say, and folders with the headers of their weights.

A fact in `unsure` is a guess, and no table states it. The sizes are those of the official models, whose `parameters`
are published too, so that a wrong number among them shows.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

FLOATS_16 = {"bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Size:
    """The sizes of an official model, its vocabulary among them.

    Attributes:
        model_type: As in `config.json`.
        architecture: The class that `config.json` names.
        parameters: How many parameters the official model has with its own vocabulary.
        vocab_size: The official model's.
        sizes: Keys of `config.json`, in order: hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
            num_key_value_heads, head_dim.
        tied: Whether input and output embeddings are one tensor.
        experts: Experts of a layer; 0 if the model is no mixture.
    """

    model_type: str
    architecture: str
    parameters: int
    vocab_size: int
    sizes: tuple[int, int, int, int, int, int]
    tied: bool = False
    experts: int = 0


SIZES = {
    "llama-2-7b": Size("llama", "LlamaForCausalLM", 6_738_415_616, 32000, (4096, 11008, 32, 32, 32, 128)),
    "llama-2-13b": Size("llama", "LlamaForCausalLM", 13_015_864_320, 32000, (5120, 13824, 40, 40, 40, 128)),
    "llama-3.1-8b": Size("llama", "LlamaForCausalLM", 8_030_261_248, 128256, (4096, 14336, 32, 32, 8, 128)),
    "mistral-7b": Size("mistral", "MistralForCausalLM", 7_241_732_096, 32000, (4096, 14336, 32, 32, 8, 128)),
    "nemo-12b": Size("mistral", "MistralForCausalLM", 12_247_782_400, 131072, (5120, 14336, 40, 32, 8, 128)),
    "mixtral-8x7b": Size(
        "mixtral", "MixtralForCausalLM", 46_702_792_704, 32000, (4096, 14336, 32, 32, 8, 128), experts=8
    ),
    "gemma-2b": Size("gemma", "GemmaForCausalLM", 2_506_172_416, 256000, (2048, 16384, 18, 8, 1, 256), tied=True),
    "gemma-7b": Size("gemma", "GemmaForCausalLM", 8_537_680_896, 256000, (3072, 24576, 28, 16, 16, 256), tied=True),
    "gemma-2-9b": Size("gemma2", "Gemma2ForCausalLM", 9_241_705_984, 256000, (3584, 14336, 42, 16, 8, 256), tied=True),
    "qwen2.5-7b": Size("qwen2", "Qwen2ForCausalLM", 7_615_616_512, 152064, (3584, 18944, 28, 28, 4, 128)),
    "qwen3-8b": Size("qwen3", "Qwen3ForCausalLM", 8_190_735_360, 151936, (4096, 12288, 36, 32, 8, 128)),
    "phi-4": Size("phi3", "Phi3ForCausalLM", 14_659_507_200, 100352, (5120, 17920, 40, 40, 10, 128)),
}


@dataclass(frozen=True)
class Published:
    """What a repository's config and card say.

    Attributes:
        size: Key of `SIZES`.
        dtype: What the weights are stored in.
        licence: As on the card, or the name of the licence where the card says `other`.
        vocab_size: Rows of the embeddings; None for the official model's.
        unsure: Which of `id`, `vocab_size`, `dtype` and `licence` nothing at hand confirms.
    """

    size: str
    dtype: str
    licence: str
    vocab_size: int | None = None
    unsure: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.vocab_size or SIZES[self.size].vocab_size


BF16, F16 = "bfloat16", "float16"
IMPACT = "ai2-impact-license-low-risk"
ROWS, DTYPE, LICENCE = "vocab_size", "dtype", "licence"
MODELS = {
    "meta-llama/Llama-2-7b-hf": Published("llama-2-7b", F16, "llama2"),
    "meta-llama/Llama-2-7b-chat-hf": Published("llama-2-7b", F16, "llama2"),
    "meta-llama/Llama-2-13b-hf": Published("llama-2-13b", F16, "llama2"),
    "meta-llama/Llama-2-13b-chat-hf": Published("llama-2-13b", F16, "llama2"),
    "hfl/chinese-alpaca-2-7b": Published("llama-2-7b", F16, "apache-2.0", 55296),
    "lmsys/vicuna-7b-v1.5": Published("llama-2-7b", F16, "llama2"),
    "lmsys/vicuna-13b-v1.5": Published("llama-2-13b", F16, "llama2"),
    "allenai/tulu-2-7b": Published("llama-2-7b", BF16, IMPACT, unsure=(ROWS, DTYPE)),
    "allenai/tulu-2-13b": Published("llama-2-13b", BF16, IMPACT, unsure=(ROWS, DTYPE)),
    "allenai/tulu-2-dpo-7b": Published("llama-2-7b", BF16, IMPACT, unsure=(ROWS, DTYPE)),
    "allenai/tulu-2-dpo-13b": Published("llama-2-13b", BF16, IMPACT, unsure=(ROWS, DTYPE)),
    "NousResearch/Redmond-Puffin-13B": Published("llama-2-13b", F16, "mit", unsure=(ROWS, DTYPE)),
    "WizardLMTeam/WizardLM-13B-V1.2": Published("llama-2-13b", F16, "llama2", unsure=(ROWS, DTYPE)),
    "mistralai/Mistral-7B-v0.1": Published("mistral-7b", BF16, "apache-2.0"),
    "mistralai/Mistral-7B-Instruct-v0.2": Published("mistral-7b", BF16, "apache-2.0"),
    "teknium/OpenHermes-2-Mistral-7B": Published("mistral-7b", BF16, "apache-2.0", 32002, (ROWS, DTYPE)),
    "teknium/OpenHermes-2.5-Mistral-7B": Published("mistral-7b", BF16, "apache-2.0", 32002, (DTYPE,)),
    "cognitivecomputations/dolphin-2.2.1-mistral-7b": Published(
        "mistral-7b", BF16, "apache-2.0", 32002, (ROWS, DTYPE)
    ),
    "cognitivecomputations/dolphin-2.6-mistral-7b-dpo": Published(
        "mistral-7b", BF16, "apache-2.0", 32002, (ROWS, DTYPE)
    ),
    "HuggingFaceH4/zephyr-7b-alpha": Published("mistral-7b", BF16, "mit"),
    "Open-Orca/Mistral-7B-OpenOrca": Published("mistral-7b", BF16, "apache-2.0", 32002, (DTYPE,)),
    "openchat/openchat_3.5": Published("mistral-7b", BF16, "apache-2.0", 32002, (DTYPE,)),
    "berkeley-nest/Starling-LM-7B-alpha": Published("mistral-7b", BF16, "apache-2.0", 32002, (DTYPE,)),
    "abhishekchohan/mistral-7B-forest-dpo": Published("mistral-7b", BF16, "", unsure=(ROWS, DTYPE, LICENCE)),
    "google/gemma-2b": Published("gemma-2b", BF16, "gemma"),
    "google/gemma-2b-it": Published("gemma-2b", BF16, "gemma"),
    "google/gemma-7b": Published("gemma-7b", BF16, "gemma"),
    "google/gemma-7b-it": Published("gemma-7b", BF16, "gemma"),
    "HuggingFaceH4/zephyr-7b-gemma-v0.1": Published("gemma-7b", BF16, "gemma-terms-of-use"),
    "mlabonne/Gemmalpaca-2B": Published("gemma-2b", BF16, "", unsure=(ROWS, DTYPE, LICENCE)),
    "mlabonne/Gemmalpaca-7B": Published("gemma-7b", BF16, "", unsure=(ROWS, DTYPE, LICENCE)),
    "Syed-Hasan-8503/openhermes-gemma-2b-it": Published("gemma-2b", BF16, "", unsure=(ROWS, DTYPE, LICENCE)),
    "macadeliccc/gemma-orchid-7b-dpo": Published("gemma-7b", BF16, "", unsure=("id", ROWS, DTYPE, LICENCE)),
    "meta-llama/Llama-3.1-8B-Instruct": Published("llama-3.1-8b", BF16, "llama3.1"),
    "NousResearch/Hermes-3-Llama-3.1-8B": Published("llama-3.1-8b", BF16, "llama3"),
    "dphn/Dolphin3.0-Llama3.1-8B": Published("llama-3.1-8b", BF16, "llama3.1", 128258),
    "Orenguteng/Llama-3.1-8B-Lexi-Uncensored-V2": Published("llama-3.1-8b", BF16, "llama3.1", unsure=(DTYPE,)),
    "mistralai/Mistral-Nemo-Instruct-2407": Published("nemo-12b", BF16, "apache-2.0"),
    "dphn/dolphin-2.9.3-mistral-nemo-12b": Published("nemo-12b", BF16, "apache-2.0", unsure=(ROWS, DTYPE)),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": Published("mixtral-8x7b", BF16, "apache-2.0"),
    "cognitivecomputations/dolphin-2.5-mixtral-8x7b": Published("mixtral-8x7b", BF16, "apache-2.0", 32002, (DTYPE,)),
    "Qwen/Qwen2.5-7B-Instruct": Published("qwen2.5-7b", BF16, "apache-2.0"),
    "huihui-ai/Qwen2.5-7B-Instruct-abliterated-v2": Published("qwen2.5-7b", BF16, "apache-2.0", unsure=(DTYPE,)),
    "Qwen/Qwen3-8B": Published("qwen3-8b", BF16, "apache-2.0"),
    "mlabonne/Qwen3-8B-abliterated": Published("qwen3-8b", BF16, "", unsure=(LICENCE,)),
    "google/gemma-2-9b-it": Published("gemma-2-9b", BF16, "gemma"),
    "IlyaGusev/gemma-2-9b-it-abliterated": Published("gemma-2-9b", BF16, "gemma", unsure=(DTYPE,)),
    "microsoft/phi-4": Published("phi-4", BF16, "mit"),
    "huihui-ai/phi-4-abliterated": Published("phi-4", BF16, "mit", unsure=(DTYPE,)),
}  # fmt: skip


def config_of(model: Published) -> dict[str, object]:
    """What `config.json` says of a model, as far as it decides names and shapes."""
    size = SIZES[model.size]
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim",
    )  # fmt: skip
    config: dict[str, object] = {
        "model_type": size.model_type, "architectures": [size.architecture], "vocab_size": model.num_tokens,
        "tie_word_embeddings": size.tied, "torch_dtype": model.dtype, "pad_token_id": 0,
        **dict(zip(names, size.sizes, strict=True)),
    }  # fmt: skip
    return config | ({"num_local_experts": size.experts} if size.experts else {})


@cache
def shapes_of(size: str, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint, by the names in its files: built without memory for their values."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    config = config_of(Published(size, BF16, "", vocab_size))
    config.pop("architectures")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    # transformers keeps the experts of a mixture in one tensor, files one by one.
    tensors = revert_weight_conversion(model, model.state_dict())
    if SIZES[size].tied:
        del tensors["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@cache
def _header(size: str, vocab_size: int, dtype: str) -> tuple[bytes, int]:
    """The beginning of a safetensors file that holds a whole model, and how long the file is."""
    entries: dict[str, dict[str, object]] = {}
    position = 0
    for name, shape in shapes_of(size, vocab_size).items():
        end = position + 2 * prod(shape)
        entries[name] = {"dtype": FLOATS_16[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + position


def write_published(folder: Path, model_id: str) -> Path:
    """A folder with a published model's config and a weight file of its size, which is all hole behind its header."""
    model = MODELS[model_id]
    start, num_bytes = _header(model.size, model.num_tokens, model.dtype)
    path = folder / model_id
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config_of(model)))
    with (path / "model.safetensors").open("wb") as file:
        file.write(start)
        file.truncate(num_bytes)
    return path


def unit_tensors(model: Published, layer: int, module: str) -> set[str]:
    """The names of a layer's tensors that belong to a module: said by name, not by the code under test."""
    pattern = {
        "gate": r"block_sparse_moe\.experts\.\d+\.w1\.weight"
        if SIZES[model.size].experts
        else r"mlp\.gate_proj\.weight",
        "down": r"mlp\.down_proj\.weight",
        "attention": r"self_attn\.(q|k|v|o|qkv)_proj\.(weight|bias)",
    }[module]
    names = shapes_of(model.size, model.num_tokens)
    return {name for name in names if re.fullmatch(rf"model\.layers\.{layer}\.{pattern}", name)}
