from __future__ import annotations

import importlib.resources
import json
import re
import subprocess
import sys

import pytest

from dapa_merge.checkpoint.spelling import FUSED, GATED, PLAIN
from dapa_merge.checkpoint.units import find_units
from dapa_merge.errors import CheckpointError, UnsupportedArchitecture

HIDDEN, INTERMEDIATE, EXPERTS = 6, 10, 3
IN, OUT = (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
SQUARE = (HIDDEN, HIDDEN)


def stack(prefix: str, count: int, parts: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{layer}.{name}": shape for layer in range(count) for name, shape in parts.items()}


def gated(parent: str, gate: str, up: str, down: str, end: str = ".weight") -> dict[str, tuple[int, ...]]:
    return {f"{parent}.{gate}{end}": IN, f"{parent}.{up}{end}": IN, f"{parent}.{down}{end}": OUT}


LLAMA_PARTS = {
    **{f"self_attn.{name}_proj.weight": SQUARE for name in "qkvo"},
    **gated("mlp", "gate_proj", "up_proj", "down_proj"),
    "input_layernorm.weight": (HIDDEN,),
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 3}
LLAMA_SHAPES = {
    "model.embed_tokens.weight": (9, HIDDEN),
    **stack("model.layers", 3, LLAMA_PARTS),
    "lm_head.weight": (9, HIDDEN),
}


def config(architecture: str, count: int = 2, key: str = "num_hidden_layers") -> dict:
    return {"architectures": [architecture], key: count}


def places(unit) -> list[tuple[str, tuple]]:
    return [(part.tensor, part.box) for part in unit.parts]


def test_one_unit_per_layer_by_default():
    units = find_units(LLAMA, LLAMA_SHAPES)
    assert [str(unit) for unit in units] == ["0.gate", "1.gate", "2.gate"]
    assert units[1].tensors == ("model.layers.1.mlp.gate_proj.weight",)
    assert places(units[1]) == [("model.layers.1.mlp.gate_proj.weight", ((0, INTERMEDIATE), (0, HIDDEN)))]


def test_several_modules_are_units_of_their_own_and_mlp_is_one():
    units = find_units(LLAMA, LLAMA_SHAPES, ("down", "attention", "mlp"))
    assert [str(unit) for unit in units[:4]] == ["0.down", "0.attention", "0.mlp", "1.down"]
    assert units[1].tensors == tuple(f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo")
    assert units[2].tensors == tuple(f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))


def test_a_bias_goes_with_its_weight():
    biases = {name.replace("weight", "bias"): shape[:1] for name, shape in LLAMA_SHAPES.items() if "gate_proj" in name}
    unit = find_units(LLAMA, {**LLAMA_SHAPES, **biases})[2]
    assert unit.tensors == ("model.layers.2.mlp.gate_proj.weight", "model.layers.2.mlp.gate_proj.bias")


# Remote-code architectures of mergekit's that transformers cannot build, with their gate's real name.
REMOTE = {
    "BaichuanForCausalLM": ("model.layers", "mlp", "gate_proj", "up_proj", "down_proj"),
    "SolarForCausalLM": ("model.layers", "mlp", "gate_proj", "up_proj", "down_proj"),
    "StableLMEpochForCausalLM": ("model.layers", "mlp", "gate_proj", "up_proj", "down_proj"),
    "ExaoneForCausalLM": ("transformer.h", "mlp", "c_fc_0", "c_fc_1", "c_proj"),
    "InternLM2ForCausalLM": ("model.layers", "feed_forward", "w1", "w3", "w2"),
    "QWenLMHeadModel": ("transformer.h", "mlp", "w2", "w1", "c_proj"),
}


@pytest.mark.parametrize("architecture", REMOTE)
def test_the_gate_of_remote_code_architectures_is_the_activated_projection(architecture):
    prefix, parent, *names = REMOTE[architecture]
    units = find_units(config(architecture), stack(prefix, 2, gated(parent, *names)), ("gate", "up", "down"))
    assert [unit.tensors for unit in units[:3]] == [(f"{prefix}.0.{parent}.{name}.weight",) for name in names]


def test_jais_activates_its_second_projection():
    parts = {f"mlp.{name}.weight": (HIDDEN, INTERMEDIATE) for name in ("c_fc", "c_fc2")}
    parts |= {
        "mlp.c_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.c_fc.bias": (INTERMEDIATE,),
        "mlp.c_fc2.bias": (INTERMEDIATE,),
    }
    unit = find_units(config("JAISLMHeadModel", key="n_layer"), stack("transformer.h", 2, parts))[0]
    assert unit.tensors == ("transformer.h.0.mlp.c_fc2.weight", "transformer.h.0.mlp.c_fc2.bias")
    # Its weights are stored as the transpose: a neuron is a column, and one value of the bias.
    assert [part.axis for part in unit.parts] == [1, 0]
    assert unit.num_rows == INTERMEDIATE


TWICE = (2 * INTERMEDIATE, HIDDEN)
HALVES = {
    "Phi3ForCausalLM": ("model.layers", "mlp.gate_up_proj.weight", "mlp.down_proj.weight"),
    "Glm4ForCausalLM": ("model.layers", "mlp.gate_up_proj.weight", "mlp.down_proj.weight"),
    "ChatGLMModel": ("transformer.encoder.layers", "mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"),
    "GraniteMoeHybridForCausalLM": (
        "model.layers",
        "shared_mlp.input_linear.weight",
        "shared_mlp.output_linear.weight",
    ),
}


@pytest.mark.parametrize("architecture", HALVES)
def test_a_fused_gate_is_the_first_half_of_the_rows_and_up_the_second(architecture):
    prefix, both, down = HALVES[architecture]
    shapes = stack(prefix, 2, {both: TWICE, down: OUT})
    gate, up, whole = find_units(config(architecture), shapes, ("gate", "up", "mlp"))[:3]
    assert places(gate) == [(f"{prefix}.0.{both}", ((0, INTERMEDIATE), (0, HIDDEN)))]
    assert places(up) == [(f"{prefix}.0.{both}", ((INTERMEDIATE, 2 * INTERMEDIATE), (0, HIDDEN)))]
    assert (gate.num_rows, up.num_rows) == (INTERMEDIATE, INTERMEDIATE)
    assert whole.tensors == (f"{prefix}.0.{both}", f"{prefix}.0.{down}")


def test_a_plain_mlp_of_the_same_names_is_not_taken_for_a_fused_one():
    shapes = stack("transformer.h", 2, {"mlp.dense_h_to_4h.weight": IN, "mlp.dense_4h_to_h.weight": OUT})
    assert [str(unit) for unit in find_units(config("FalconForCausalLM"), shapes, ("up",))] == ["0.up", "1.up"]
    with pytest.raises(UnsupportedArchitecture, match="has no gate projection"):
        find_units(config("FalconForCausalLM"), shapes)


def experts(parent: str, *names: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for expert in range(EXPERTS) for name, shape in gated(f"{parent}.{expert}", *names).items()}


ONE_BY_ONE = {
    "MixtralForCausalLM": ("block_sparse_moe.experts", "w1", "w3", "w2"),
    "Qwen3MoeForCausalLM": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "JambaForCausalLM": ("feed_forward.experts", "gate_proj", "up_proj", "down_proj"),
}


@pytest.mark.parametrize("architecture", ONE_BY_ONE)
def test_the_gates_of_all_experts_of_a_layer_are_one_unit(architecture):
    parent, *names = ONE_BY_ONE[architecture]
    parts = {**experts(parent, *names), "mlp.gate.weight": (EXPERTS, HIDDEN)}
    unit = find_units(config(architecture), stack("model.layers", 2, parts))[1]
    assert unit.tensors == tuple(f"model.layers.1.{parent}.{expert}.{names[0]}.weight" for expert in range(EXPERTS))
    assert [part.first_row for part in unit.parts] == [expert * INTERMEDIATE for expert in range(EXPERTS)]
    assert unit.num_rows == EXPERTS * INTERMEDIATE


def test_experts_in_one_tensor_have_a_box_each():
    parts = {"mlp.experts.gate_up_proj": (EXPERTS, *TWICE), "mlp.experts.down_proj": (EXPERTS, *OUT)}
    gate, up, down = find_units(
        config("MixtralForCausalLM"),
        stack("model.layers", 1, parts) | stack("model.layers", 2, parts),
        ("gate", "up", "down"),
    )[:3]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert places(gate) == [(name, ((e, e + 1), (0, INTERMEDIATE), (0, HIDDEN))) for e in range(EXPERTS)]
    assert places(up) == [(name, ((e, e + 1), (INTERMEDIATE, 2 * INTERMEDIATE), (0, HIDDEN))) for e in range(EXPERTS)]
    assert [part.box for part in down.parts] == [((e, e + 1), (0, HIDDEN), (0, INTERMEDIATE)) for e in range(EXPERTS)]


def test_experts_that_are_stored_as_the_transpose_have_their_gates_in_columns():
    parts = {
        "feed_forward.experts.gate_up_proj": (EXPERTS, HIDDEN, 2 * INTERMEDIATE),
        "feed_forward.experts.down_proj": (EXPERTS, INTERMEDIATE, HIDDEN),
    }
    gate = find_units(config("Llama4ForCausalLM"), stack("model.layers", 2, parts))[0]
    assert [part.box for part in gate.parts] == [((e, e + 1), (0, HIDDEN), (0, INTERMEDIATE)) for e in range(EXPERTS)]
    assert {part.axis for part in gate.parts} == {2}
    assert gate.num_rows == EXPERTS * INTERMEDIATE


def test_a_shared_expert_comes_behind_the_others():
    parts = {
        **gated("mlp.shared_experts", "gate_proj", "up_proj", "down_proj"),
        **experts("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    }
    unit = find_units(config("DeepseekV3ForCausalLM"), stack("model.layers", 2, parts))[0]
    assert unit.tensors[-1] == "model.layers.0.mlp.shared_experts.gate_proj.weight"
    assert unit.parts[-1].first_row == EXPERTS * INTERMEDIATE


def test_more_than_nine_experts_are_in_the_order_of_their_numbers():
    parts = {name: shape for expert in range(12) for name, shape in gated(f"mlp.experts.{expert}", *GATED[0]).items()}
    unit = find_units(config("OlmoeForCausalLM"), stack("model.layers", 2, parts))[0]
    assert [int(re.search(r"experts\.(\d+)", name)[1]) for name in unit.tensors] == list(range(12))


def test_first_layers_may_be_dense_where_others_have_experts():
    shapes = stack("model.layers", 1, gated("mlp", *GATED[0]))
    shapes |= {
        name.replace("layers.0", "layers.1"): shape
        for name, shape in stack("model.layers", 1, experts("mlp.experts", *GATED[0])).items()
    }
    units = find_units(config("Glm4MoeForCausalLM"), shapes)
    assert [unit.num_rows for unit in units] == [INTERMEDIATE, EXPERTS * INTERMEDIATE]


def test_layers_that_predict_further_tokens_are_left_alone():
    deeper = {**LLAMA, "num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    assert [unit.layer for unit in find_units(deeper, LLAMA_SHAPES)] == [0, 1]


TOWERS = {
    "Gemma3ForConditionalGeneration": ("language_model.model.layers", "vision_tower.vision_model.encoder.layers"),
    "Qwen2_5_VLForConditionalGeneration": ("model.layers", "visual.blocks"),
    "Mistral3ForConditionalGeneration": ("language_model.model.layers", "vision_tower.transformer.layers"),
    "Qwen3VLForConditionalGeneration": ("model.language_model.layers", "model.visual.blocks"),
}


@pytest.mark.parametrize("architecture", TOWERS)
@pytest.mark.parametrize("num_vision_layers", [2, 3])
def test_only_the_language_tower_has_units(architecture, num_vision_layers):
    language, vision = TOWERS[architecture]
    shapes = {**stack(language, 2, LLAMA_PARTS), **stack(vision, num_vision_layers, gated("mlp", *GATED[0]))}
    settings = {"architectures": [architecture], "text_config": {"num_hidden_layers": 2}, "vision_config": {"depth": 9}}
    assert [unit.tensors for unit in find_units(settings, shapes)] == [
        (f"{language}.{layer}.mlp.gate_proj.weight",) for layer in range(2)
    ]


def test_a_gate_inside_attention_is_not_taken():
    parts = {**LLAMA_PARTS, "self_attn.gate_proj.weight": SQUARE}
    assert [unit.tensors for unit in find_units(config("NewForCausalLM"), stack("model.layers", 2, parts))] == [
        ("model.layers.0.mlp.gate_proj.weight",),
        ("model.layers.1.mlp.gate_proj.weight",),
    ]


def test_attention_may_be_fused_and_missing_in_some_layers():
    parts = {**gated("mlp", *GATED[0])}
    shapes = stack("model.layers", 2, parts) | {
        "model.layers.1.self_attn.qkv_proj.weight": (3 * HIDDEN, HIDDEN),
        "model.layers.1.self_attn.o_proj.weight": SQUARE,
    }
    (unit,) = find_units(config("NewForCausalLM"), shapes, ("attention",))
    assert unit.layer == 1
    assert unit.tensors == ("model.layers.1.self_attn.qkv_proj.weight", "model.layers.1.self_attn.o_proj.weight")


PLAIN_PARTS = {"mlp.c_fc.weight": IN, "mlp.c_proj.weight": OUT}
REFUSED = {
    "no gate": (
        config("GPT2LMHeadModel", key="n_layer"),
        stack("transformer.h", 2, PLAIN_PARTS),
        "GPT2LMHeadModel has no gate projection in its MLP, so `modules: gate` cannot be used with it; write "
        "`modules: up` or `modules: down` or `modules: mlp`",
    ),
    "gate and up in alternating rows": (
        config("GptOssForCausalLM"),
        stack(
            "model.layers",
            2,
            {
                "mlp.experts.gate_up_proj": (EXPERTS, HIDDEN, 2 * INTERMEDIATE),
                "mlp.experts.gate_up_proj_bias": (EXPERTS, 2 * INTERMEDIATE),
                "mlp.experts.down_proj": (EXPERTS, INTERMEDIATE, HIDDEN),
            },
        ),
        "GptOssForCausalLM interleaves the rows of gate and up in one tensor (gate_up_proj), so `modules: gate` "
        "cannot be used with it; write `modules: down` or `modules: mlp`",
    ),
    "gate and up in alternating rows of one tensor that is called up": (
        config("Phi3SmallForCausalLM"),
        stack("model.layers", 2, {"mlp.up_proj.weight": TWICE, "mlp.down_proj.weight": OUT}),
        "Phi3SmallForCausalLM interleaves the rows of gate and up in one tensor (up_proj)",
    ),
    "an unknown architecture with two towers": (
        config("NewForConditionalGeneration"),
        {**stack("model.layers", 2, LLAMA_PARTS), **stack("other.blocks", 2, LLAMA_PARTS)},
        "NewForConditionalGeneration has 2 stacks of layers with an MLP (model.layers, other.blocks)",
    ),
    "no MLP": (
        config("MambaForCausalLM"),
        stack("backbone.layers", 2, {"mixer.in_proj.weight": IN, "mixer.out_proj.weight": OUT}),
        "MambaForCausalLM has no MLP with known projection names",
    ),
    "an encoder": (
        config("BertForMaskedLM"),
        stack("bert.encoder.layer", 2, {"intermediate.dense.weight": IN, "output.dense.weight": OUT}),
        "BertForMaskedLM has no MLP",
    ),
    "no MLP in one layer": (
        config("NewForCausalLM"),
        stack("model.layers", 1, LLAMA_PARTS) | {"model.layers.1.mixer.weight": SQUARE},
        "NewForCausalLM has no MLP in layer 1, unlike other layers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_handled_is_refused_by_name(case):
    settings, shapes, message = REFUSED[case]
    with pytest.raises(UnsupportedArchitecture) as caught:
        find_units(settings, shapes)
    assert message in str(caught.value)


def test_attention_of_unknown_names_is_refused():
    with pytest.raises(UnsupportedArchitecture, match="has no attention with known projection names"):
        find_units(config("NewForCausalLM"), stack("model.layers", 2, PLAIN_PARTS), ("attention",))


def without(shapes: dict, name: str) -> dict:
    assert name in shapes
    return {key: shape for key, shape in shapes.items() if key != name}


MOE = stack("model.layers", 2, experts("mlp.experts", *GATED[0]))
BROKEN = {
    "a missing gate": (LLAMA, without(LLAMA_SHAPES, "model.layers.1.mlp.gate_proj.weight"), "model.layers.1.mlp.gate_proj.weight"),
    "a missing up": (LLAMA, without(LLAMA_SHAPES, "model.layers.2.mlp.up_proj.weight"), "model.layers.2.mlp.up_proj.weight"),
    "a missing query": (LLAMA, without(LLAMA_SHAPES, "model.layers.2.self_attn.q_proj.weight"), "model.layers.2.self_attn.q_proj.weight"),
    "an expert without its gate": (config("A"), without(MOE, "model.layers.1.mlp.experts.2.gate_proj.weight"), "model.layers.1.mlp.experts.2.gate_proj.weight"),
    "a missing expert": (config("A"), {name: shape for name, shape in MOE.items() if ".0.mlp.experts.1." not in name}, "model.layers.0.mlp.experts.1.*"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_missing_tensor_is_named(case):
    settings, shapes, name = BROKEN[case]
    modules = ("gate", "attention") if "query" in case else ("gate",)
    with pytest.raises(CheckpointError) as caught:
        find_units(settings, shapes, modules)
    assert f"the checkpoint lacks tensor {name}, which" in str(caught.value)


COUNTS = {
    "fewer layers than promised": ({**LLAMA, "num_hidden_layers": 4}, "says 4 layers, but the tensors have 3"),
    "more layers than promised": ({**LLAMA, "num_hidden_layers": 2}, "says 2 layers, but the tensors have 3"),
    "no number of layers": ({"architectures": ["LlamaForCausalLM"]}, "lacks num_hidden_layers"),
    "a number that is none": ({**LLAMA, "num_hidden_layers": "3"}, "says '3' layers, which is not a whole number"),
    "two architectures": ({"architectures": ["A", "B"]}, "exactly one architecture"),
    "no architecture": ({}, "exactly one architecture, but says None"),
}


@pytest.mark.parametrize("case", COUNTS)
def test_a_config_that_does_not_fit_is_refused(case):
    settings, message = COUNTS[case]
    with pytest.raises(CheckpointError, match=message):
        find_units(settings, LLAMA_SHAPES)


def definitions():
    """mergekit's definitions: of each its class, its config's key for the number of layers, and its layers' weights."""
    folder = importlib.resources.files("mergekit._data.architectures")
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if not file.name.endswith(".json"):
            continue
        definition = json.loads(file.read_text())
        parts = definition.get("modules", {"": {"architecture": definition}})
        for name in definition["architectures"]:
            yield pytest.param(name, parts, id=file.name.removesuffix(".json") + " " + name)


def invented_shape(name: str) -> tuple[int, ...]:
    """A shape that a weight of this name has, by what its name says."""
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    ins = {spelling[0] for spelling in FUSED}
    downs = {names[-1] for names in (*GATED, *FUSED, *PLAIN)}
    is_chatglm = "encoder" in name
    if not name.endswith(".weight") and leaf in ("gate_up_proj", "down_proj"):
        return (EXPERTS, *(TWICE if leaf == "gate_up_proj" else OUT))
    if "block_sparse_moe" in name and leaf in ("input_linear", "output_linear"):
        return (EXPERTS, *(TWICE if leaf == "input_linear" else OUT))
    if leaf in ins and (leaf != "dense_h_to_4h" or is_chatglm):
        return TWICE
    if leaf in downs and not ("w2" in leaf and "mlp.w2" in name):
        return OUT
    return IN if name.endswith(".weight") and "norm" not in leaf else (HIDDEN,)


GATELESS = (
    "Apertus", "Arcee", "Falcon", "GPTNeoX", "GPT2", "GPTBigCode", "MixFormerSequential", "PhiFor", "Starcoder2",
    "Phi3Small", "Mamba", "T5", "Whisper", "Bert", "BERT", "DistilBert", "Roberta",
)  # fmt: skip


@pytest.mark.parametrize(("architecture", "parts"), list(definitions()))
def test_every_definition_of_mergekit_gives_gates_of_each_layer_or_a_refusal(architecture, parts):
    settings: dict = {"architectures": [architecture]}
    shapes = {}
    for module in parts.values():
        definition, prefix = module["architecture"], module.get("weight_prefix") or ""
        key = definition.get("num_layers_config_key")
        weights = (definition.get("layer_templates") or {}).get("weights") or []
        if not key or not weights:
            continue
        outer, _, inner = key.rpartition(".")
        (settings.setdefault(outer, {}) if outer else settings)[inner] = 2
        for layer in range(2):
            names = [prefix + weight["name"].replace("${layer_index}", str(layer)) for weight in weights]
            shapes |= {name: invented_shape(name) for name in names}
    if architecture.startswith(GATELESS):
        with pytest.raises(CheckpointError, match=architecture):
            find_units(settings, shapes)
    else:
        units = find_units(settings, shapes)
        assert [unit.layer for unit in units] == [0, 1]
        for name in (name for unit in units for name in unit.tensors):
            assert not re.search("vision|visual|attn|attention", name)


def test_finding_units_loads_no_torch():
    code = (
        "import sys; from dapa_merge.checkpoint.units import find_units; "
        f"find_units({LLAMA!r}, {LLAMA_SHAPES!r}); assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
