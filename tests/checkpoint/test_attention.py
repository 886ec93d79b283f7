"""The boxes of q, k, v and o, held to the keys and values that transformers computes from files with zeros in them."""

from __future__ import annotations

import functools

import numpy
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, SHAPE, UNGATED, call, save_random
from transformers import AutoModelForCausalLM

from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.checkpoint.region import Region, remainder, whole_box
from dapa_merge.checkpoint.units import ATTENTION_MODULES, auto_modules, find_units
from dapa_merge.errors import CheckpointError, UnsupportedArchitecture
from dapa_merge.measure.live import units_in

GPTJ = {"n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4}
OTHERS = {
    "GptOssForCausalLM": ("GptOssConfig", {"num_local_experts": 4, "head_dim": 8}),
    "OPTForCausalLM": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "GPTJForCausalLM": ("GPTJConfig", GPTJ),
    "BloomForCausalLM": ("BloomConfig", {"n_layer": 4, "n_head": 4}),
    "GPTBigCode, several heads of keys": (
        "GPTBigCodeConfig",
        {"n_layer": 4, "n_embd": 32, "n_head": 4, "multi_query": False},
    ),
    "DeepseekV2ForCausalLM": (
        "DeepseekV2Config",
        {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    ),
    "Phi3 whose heads are wider than the hidden states": (
        "Phi3Config",
        {"head_dim": 12, "original_max_position_embeddings": 64},
    ),
}
ALL = {**ARCHITECTURES, **UNGATED, **OTHERS}
FUSED = [
    name
    for name in ("Phi3ForCausalLM", "DbrxForCausalLM", "MptForCausalLM", "GPT2LMHeadModel", "GPTBigCodeForCausalLM")
    if name in ALL
]
MIXED = {
    "FalconForCausalLM": "query_key_value",
    "GPTNeoXForCausalLM": "query_key_value",
    "BloomForCausalLM": "query_key_value",
    "GPTBigCode, several heads of keys": "c_attn",
}
LATENT = ("DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM")
APART = (*FUSED, *(name for name in ALL if name not in (*FUSED, *MIXED, *LATENT)))


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """Saves a random model of an architecture, once for all who ask."""

    def new(name):
        kind, changes = ALL[name]
        shape = {"vocab_size": 152} if kind == "DbrxConfig" else SHAPE
        config = getattr(transformers, kind)(**{**shape, **changes})
        return save_random(tmp_path_factory.mktemp("model"), config, seed=1, dtype=torch.float32)

    return functools.cache(new)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def cached(folder, layer):
    """The keys and values that a layer computes for some tokens."""
    with torch.inference_mode():
        found = load(folder)(torch.arange(3, 15)[None], use_cache=True).past_key_values.layers[layer]
    return found.keys, found.values


def zeroed(folder, unit, copy):
    """A copy of a model with zeros in the boxes of one unit."""
    transformers.AutoConfig.from_pretrained(folder).save_pretrained(copy)
    for path in folder.glob("*.safetensors*"):
        (copy / path.name).write_bytes(path.read_bytes())
    checkpoint = open_checkpoint(str(folder))
    for part in unit.parts:
        region = Region.of(checkpoint.tensors[part.tensor], part)
        with (copy / region.tensor.file).open("r+b") as file:
            for start, size in region.runs():
                file.seek(start)
                file.write(bytes(size))
    return copy


@pytest.mark.parametrize("name", APART)
def test_zeros_in_the_box_of_k_or_v_are_zero_keys_or_values_and_nothing_else(name, save, tmp_path):
    folder = save(name)
    checkpoint = open_checkpoint(str(folder))
    units = {unit.module: unit for unit in find_units(checkpoint.config, checkpoint.shapes, ATTENTION_MODULES)[:4]}
    layer = units["q"].layer
    before = cached(folder, layer)
    # Whatever is not a box of k or v in a fused projection is one of q: both are left as they are by zeros there.
    expected = {"q": before, "k": (None, before[1]), "v": (before[0], None), "o": before}
    for module, unit in units.items():
        found = cached(zeroed(folder, unit, tmp_path / module), layer)
        for tensor, as_before in zip(found, expected[module], strict=True):
            assert torch.equal(tensor, torch.zeros_like(tensor) if as_before is None else as_before), module


@pytest.mark.parametrize("name", APART)
def test_q_k_v_and_o_are_disjoint_and_together_attention_in_files_and_in_memory(name, save):
    checkpoint, model = open_checkpoint(str(save(name))), load(save(name))
    in_files = find_units(checkpoint.config, checkpoint.shapes, (*ATTENTION_MODULES, "attention"))
    in_memory = units_in(model, (*ATTENTION_MODULES, "attention"))
    assert in_files == in_memory
    assert [len(unit.parts) for unit in in_files] == [len(unit.parts) for unit in in_memory]
    for index in range(0, len(in_files), 5):
        *apart, whole = in_files[index : index + 5]
        assert [unit.module for unit in apart] == list(ATTENTION_MODULES)
        for part in whole.parts:
            shape = checkpoint.shapes[part.tensor]
            boxes = [one.box for unit in apart for one in unit.parts if one.tensor == part.tensor]
            assert remainder(whole_box(shape), boxes) == []
            sizes = [numpy.prod([stop - first for first, stop in box]) for box in boxes]
            assert sum(sizes) == numpy.prod(shape)


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("module", ["q", "k", "v"])
def test_rows_that_alternate_by_head_are_refused_and_o_and_attention_are_not(name, module, save):
    checkpoint = open_checkpoint(str(save(name)))
    with pytest.raises(UnsupportedArchitecture) as caught:
        find_units(checkpoint.config, checkpoint.shapes, (module,))
    assert f"has {module} in a projection that it shares with others ({MIXED[name]})" in str(caught.value)
    assert str(caught.value).endswith("write `modules: attention`")
    output, whole = find_units(checkpoint.config, checkpoint.shapes, ("o", "attention"))[:2]
    assert set(output.tensors) < set(whole.tensors)


@pytest.mark.parametrize("name", LATENT)
def test_latent_attention_has_q_and_o_but_neither_k_nor_v(name, save):
    checkpoint = open_checkpoint(str(save(name)))
    queries, output = find_units(checkpoint.config, checkpoint.shapes, ("q", "o"))[:2]
    leaves = [tensor.removesuffix(".weight").rpartition(".")[2] for tensor in (*queries.tensors, *output.tensors)]
    assert leaves == (["q_a_proj", "q_b_proj", "o_proj"] if name == LATENT[0] else ["q_proj", "o_proj"])
    for module in ("k", "v"):
        with pytest.raises(UnsupportedArchitecture, match=rf"{module} in a projection that .*\(kv_a_proj_with_mqa\)"):
            find_units(checkpoint.config, checkpoint.shapes, (module,))


HIDDEN, MLP = 6, {"mlp.gate_proj.weight": (10, 6), "mlp.up_proj.weight": (10, 6), "mlp.down_proj.weight": (6, 10)}


def units_of(parts, *modules, layers=2):
    shapes = {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in parts.items()}
    return find_units({"architectures": ["NewForCausalLM"], "num_hidden_layers": layers}, shapes, modules)


def test_baichuan_packs_thirds():
    # Its code comes with the model: `proj.unflatten(-1, (3, self.hidden_size))`.
    parts = {**MLP, "self_attn.W_pack.weight": (3 * HIDDEN, HIDDEN), "self_attn.o_proj.weight": (HIDDEN, HIDDEN)}
    assert [unit.parts[0].box for unit in units_of(parts, "q", "k", "v")[:3]] == [
        ((first, first + HIDDEN), (0, HIDDEN)) for first in (0, HIDDEN, 2 * HIDDEN)
    ]


@pytest.mark.parametrize("rows", [17, 14, 6, 5])
def test_a_fused_projection_whose_sizes_are_not_those_of_q_k_and_v_is_refused(rows):
    # An odd rest, keys of which queries are no multiple, and no keys.
    parts = {**MLP, "self_attn.qkv_proj.weight": (rows, HIDDEN), "self_attn.o_proj.weight": (HIDDEN, HIDDEN)}
    with pytest.raises(UnsupportedArchitecture, match=r"\(qkv_proj\), where its rows cannot be told apart"):
        units_of(parts, "q")


def test_internlm2_groups_its_rows_by_heads_and_is_refused():
    parts = {**MLP, "attention.wqkv.weight": (10, HIDDEN), "attention.wo.weight": (HIDDEN, HIDDEN)}
    with pytest.raises(UnsupportedArchitecture, match=r"\(wqkv\)"):
        units_of(parts, "v")


def test_layers_whose_attention_is_of_another_kind_are_refused_as_such():
    latent = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    shapes = {
        f"model.layers.{layer}.{name}": shape
        for layer, names in enumerate((("q_proj", "k_proj", "v_proj", "o_proj"), latent))
        for name, shape in {**MLP, **{f"self_attn.{leaf}.weight": (HIDDEN, HIDDEN) for leaf in names}}.items()
    }
    with pytest.raises(CheckpointError, match="has attention of another kind in layer 1 than in others"):
        find_units({"architectures": ["NewForCausalLM"], "num_hidden_layers": 2}, shapes, ("q",))


def test_attention_beside_one_of_its_parts_is_refused(write_recipe, llama_pair):
    for parameters in ({"modules": "q,attention"}, {"layers": '"1.attention,2.v"'}):
        refused = call("plan", write_recipe(*llama_pair, **parameters))
        assert refused.exit_code == 2
        assert "attention q, k, v and o" in refused.stderr


@pytest.mark.parametrize("name", ALL)
def test_auto_is_the_smallest_modules_that_each_model_has_in_files_and_in_memory(name, save):
    mlp = ("up", "down") if name in (*UNGATED, *MIXED, "OPTForCausalLM", "GPTJForCausalLM") else MLP_MODULES
    expected = {"GptOssForCausalLM": ("mlp",)}.get(name, mlp)
    expected += ("attention",) if name in (*MIXED, *LATENT) else ATTENTION_MODULES
    checkpoint = open_checkpoint(str(save(name)))
    assert auto_modules(checkpoint.config, checkpoint.shapes) == expected
    assert units_in(load(save(name)), expected) == find_units(checkpoint.config, checkpoint.shapes, expected)


MLP_MODULES = ("gate", "up", "down")
NO_ATTENTION = {
    "another mixer": {**MLP, "mixer.in_proj.weight": (HIDDEN, HIDDEN)},
    "unknown names": {**MLP, "attention.query.weight": (HIDDEN, HIDDEN)},
}


@pytest.mark.parametrize("case", NO_ATTENTION)
def test_auto_without_a_known_attention_is_the_mlp(case):
    shapes = {f"model.layers.{layer}.{name}": shape for layer in (0, 1) for name, shape in NO_ATTENTION[case].items()}
    assert auto_modules({"architectures": ["NewForCausalLM"], "num_hidden_layers": 2}, shapes) == MLP_MODULES
