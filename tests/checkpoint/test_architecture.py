from __future__ import annotations

import importlib.resources
import json
import subprocess
import sys

import pytest

from dapa_merge.checkpoint.architecture import GATED_MLPS, find_units
from dapa_merge.errors import CheckpointError, UnsupportedArchitecture


def names(prefix: str, count: int, *parts: str) -> list[str]:
    return [f"{prefix}.{layer}.{part}.weight" for layer in range(count) for part in parts]


LLAMA_PARTS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj", "input_layernorm", "post_attention_layernorm",
)  # fmt: skip
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 3}
LLAMA_NAMES = ["model.embed_tokens.weight", *names("model.layers", 3, *LLAMA_PARTS), "lm_head.weight"]

# Remote-code architectures of mergekit's that transformers cannot build, with their gate's real name.
REMOTE = {
    "BaichuanForCausalLM": ("model.layers", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "SolarForCausalLM": ("model.layers", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "StableLMEpochForCausalLM": ("model.layers", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "ExaoneForCausalLM": ("transformer.h", "mlp.c_fc_0", "mlp.c_fc_1", "mlp.c_proj"),
    "InternLM2ForCausalLM": ("model.layers", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2"),
    "QWenLMHeadModel": ("transformer.h", "mlp.w2", "mlp.w1", "mlp.c_proj"),
}


def test_one_unit_per_layer_by_default():
    units = find_units(LLAMA, LLAMA_NAMES)
    assert [str(unit) for unit in units] == ["0.gate", "1.gate", "2.gate"]
    assert units[1].tensors == ("model.layers.1.mlp.gate_proj.weight",)


def test_several_modules_are_units_of_their_own_and_mlp_is_one():
    units = find_units(LLAMA, LLAMA_NAMES, ("down", "attention", "mlp"))
    assert [str(unit) for unit in units[:4]] == ["0.down", "0.attention", "0.mlp", "1.down"]
    assert units[1].tensors == tuple(f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo")
    assert units[2].tensors == tuple(f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))


def test_a_bias_goes_with_its_weight():
    with_bias = [*LLAMA_NAMES, *(name.replace("weight", "bias") for name in LLAMA_NAMES if "gate_proj" in name)]
    unit = find_units(LLAMA, with_bias)[2]
    assert unit.tensors == ("model.layers.2.mlp.gate_proj.weight", "model.layers.2.mlp.gate_proj.bias")


@pytest.mark.parametrize("architecture", REMOTE)
def test_the_gate_of_remote_code_architectures_is_the_activated_projection(architecture):
    prefix, gate, up, down = REMOTE[architecture]
    config = {"architectures": [architecture], "num_hidden_layers": 2}
    units = find_units(config, names(prefix, 2, gate, up, down, "ln_1"), ("gate", "up", "down"))
    assert [unit.tensors for unit in units[:3]] == [(f"{prefix}.0.{part}.weight",) for part in (gate, up, down)]


def test_jais_activates_its_second_projection():
    config = {"architectures": ["JAISLMHeadModel"], "n_layer": 2}
    tensors = names("transformer.h", 2, "mlp.c_fc", "mlp.c_fc2", "mlp.c_proj")
    tensors += [name.replace("weight", "bias") for name in tensors]
    unit = find_units(config, tensors)[0]
    assert unit.tensors == ("transformer.h.0.mlp.c_fc2.weight", "transformer.h.0.mlp.c_fc2.bias")


def test_a_gate_inside_attention_is_not_taken():
    config = {"architectures": ["NewForCausalLM"], "num_hidden_layers": 2}
    tensors = names("model.layers", 2, *LLAMA_PARTS, "self_attn.gate_proj")
    assert [unit.tensors for unit in find_units(config, tensors)] == [
        ("model.layers.0.mlp.gate_proj.weight",),
        ("model.layers.1.mlp.gate_proj.weight",),
    ]


def test_an_unknown_architecture_is_read_off_its_checkpoint():
    config = {"architectures": ["NewForCausalLM"], "num_hidden_layers": 2}
    assert len(find_units(config, ["embed.weight", *names("backbone.blocks", 2, *LLAMA_PARTS)])) == 2


REFUSED = {
    "a router called gate": (
        {"architectures": ["MixtralForCausalLM"], "num_hidden_layers": 1},
        ["model.layers.0.mlp.gate.weight", "model.layers.0.mlp.experts.gate_up_proj"],
        "MixtralForCausalLM is a mixture of experts",
    ),
    "experts in separate tensors": (
        {"architectures": ["MixtralForCausalLM"], "num_hidden_layers": 1},
        names("model.layers.0.block_sparse_moe.experts", 2, "w1", "w2", "w3"),
        "MixtralForCausalLM is a mixture of experts",
    ),
    "a first dense layer before experts": (
        {"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "num_hidden_layers": 2},
        [*names("model.layers", 1, *LLAMA_PARTS), "model.layers.1.mlp.experts.gate_up_proj"],
        "Glm4MoeForCausalLM is a mixture of experts",
    ),
    "fused gate and up": (
        {"architectures": ["Phi3ForCausalLM"], "num_hidden_layers": 1},
        ["model.layers.0.mlp.gate_up_proj.weight", "model.layers.0.mlp.down_proj.weight"],
        "Phi3ForCausalLM fuses its gate and up projections",
    ),
    "no gate": (
        {"architectures": ["GPT2LMHeadModel"], "n_layer": 1},
        ["transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_proj.weight"],
        "GPT2LMHeadModel has no separate gate projection",
    ),
    "several towers": (
        {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"},
        names("language_model.model.layers", 2, *LLAMA_PARTS),
        "Gemma3ForConditionalGeneration has several towers (text_decoder, multi_modal_projector, vision_tower)",
    ),
    "an unknown architecture with a gated vision tower": (
        {"architectures": ["NewForConditionalGeneration"], "num_hidden_layers": 2},
        [*names("model.layers", 2, *LLAMA_PARTS), *names("visual.blocks", 2, *LLAMA_PARTS)],
        "NewForConditionalGeneration is not defined in mergekit, and its checkpoint has 2 stacks",
    ),
    "separate projections missing in attention": (
        {"architectures": ["QWenLMHeadModel"], "num_hidden_layers": 1},
        names("transformer.h", 1, "attn.c_attn", "mlp.w1", "mlp.w2", "mlp.c_proj"),
        "QWenLMHeadModel has no separate q_proj",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_handled_is_refused_by_name(case):
    config, tensors, message = REFUSED[case]
    modules = ("attention",) if "attention" in case else ("gate",)
    with pytest.raises(UnsupportedArchitecture) as caught:
        find_units(config, tensors, modules)
    assert message in str(caught.value)
    assert "so far" in str(caught.value)


BROKEN = {
    "a missing tensor": (
        LLAMA,
        [name for name in LLAMA_NAMES if name != "model.layers.1.mlp.gate_proj.weight"],
        "the checkpoint lacks tensor model.layers.1.mlp.gate_proj.weight",
    ),
    "fewer layers than promised": ({**LLAMA, "num_hidden_layers": 4}, LLAMA_NAMES, "says 4 layers, but the tensors"),
    "no number of layers": ({"architectures": ["LlamaForCausalLM"]}, LLAMA_NAMES, "lacks num_hidden_layers"),
    "two architectures": ({"architectures": ["A", "B"]}, LLAMA_NAMES, "exactly one architecture"),
    "no architecture": ({}, LLAMA_NAMES, "exactly one architecture, but says None"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_named(case):
    config, tensors, message = BROKEN[case]
    with pytest.raises(CheckpointError, match=message):
        find_units(config, tensors)


def definitions():
    folder = importlib.resources.files("mergekit._data.architectures")
    for file in folder.iterdir():
        if file.name.endswith(".json"):
            definition = json.loads(file.read_text())
            if "modules" not in definition:
                yield from ((name, definition) for name in definition["architectures"])


@pytest.mark.parametrize(("architecture", "definition"), [pytest.param(*item, id=item[0]) for item in definitions()])
def test_every_definition_of_mergekit_gives_gates_in_an_mlp_or_a_refusal(architecture, definition):
    config = {
        "architectures": [architecture],
        "model_type": definition["model_type"],
        definition["num_layers_config_key"]: 2,
    }
    templates = [weight["name"] for weight in definition["layer_templates"]["weights"]]
    tensors = [name.replace("${layer_index}", str(layer)) for layer in range(2) for name in templates]
    try:
        units = find_units(config, tensors)
    except UnsupportedArchitecture as error:
        assert architecture in str(error)
        gate_names = {f"mlp.{gate}.weight" for gate, *_ in GATED_MLPS}
        separate = any(name.endswith(tuple(gate_names)) for name in templates)
        assert not separate or "experts" in str(error)
    else:
        assert len(units) == 2
        for unit in units:
            parent = unit.tensors[0].split(".")[-3]
            assert parent in ("mlp", "feed_forward")


def test_finding_units_loads_no_torch():
    code = (
        "import sys; from dapa_merge.checkpoint.architecture import find_units; "
        f"find_units({LLAMA!r}, {LLAMA_NAMES!r}); assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
