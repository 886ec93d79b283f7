"""Where outputs come out of models of many architectures, held to what their weights compute."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, SHAPE, UNGATED
from transformers import AutoModelForCausalLM

from dapa_merge.errors import UsageError
from dapa_merge.trace.options import SITE_KINDS as KINDS
from dapa_merge.trace.replay import find_sites, kinds_in, layer_paths

EXPERTS = {name for name in ARCHITECTURES if "Moe" in name} | {
    f"{name}ForCausalLM" for name in ("Mixtral", "Afmoe", "DeepseekV3", "Llama4", "Dbrx", "Jamba")
}
HYBRID = {"Lfm2ForCausalLM", "JambaForCausalLM"}


def random_model(name):
    config, extra = {**ARCHITECTURES, **UNGATED, "BloomForCausalLM": ("BloomConfig", {"n_layer": 4, "n_head": 4})}[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, config)(**{**SHAPE, **extra})).eval()


def outputs_of(model, module, ids):
    found = []
    handle = model.get_submodule(module).register_forward_hook(lambda _m, given, output: found.append((given, output)))
    with torch.inference_mode():
        model(torch.tensor([ids]))
    handle.remove()
    (given, output) = found[0]
    return given[0] if given else None, output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", [*ARCHITECTURES, *UNGATED])
def test_every_kind_that_an_architecture_has_is_found_in_every_layer(name):
    model = random_model(name)
    expected = set(KINDS)
    if name in EXPERTS:
        expected -= {"gate", "up", "down"}
    if name in UNGATED:
        expected -= {"gate"}
    assert set(kinds_in(model)) == expected
    assert len(layer_paths(model)) == 4
    for kind in expected:
        sites = find_sites(model, kind)
        assert len(sites) == 4
        for of_layer in sites:
            # A layer of a hybrid may have no attention, and nothing else is lacking.
            assert of_layer or (kind == "attention" and name in HYBRID)
            for site in of_layer:
                _, output = outputs_of(model, site.module, [5, 6, 7])
                assert output.shape[-1] >= (site.features or (0, 1))[1]


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Phi3ForCausalLM", "Glm4ForCausalLM", "Lfm2ForCausalLM"])
def test_gate_and_up_are_those_whose_product_goes_into_down(name):
    model = random_model(name)
    gate, up, down = (find_sites(model, kind)[1][0] for kind in ("gate", "up", "down"))
    values = []
    for site in (gate, up):
        _, output = outputs_of(model, site.module, [5, 6, 7])
        values.append(output if site.features is None else output[..., slice(*site.features)])
    into_down, _ = outputs_of(model, down.module, [5, 6, 7])
    assert torch.allclose(torch.nn.functional.silu(values[0]) * values[1], into_down, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "MptForCausalLM", "MixtralForCausalLM", "GraniteMoeHybridForCausalLM"]
)
def test_what_an_mlp_puts_out_has_nothing_of_the_residual_stream_in_it(name):
    """Without its down projections a layer's MLP puts out nothing."""
    model = random_model(name)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if any(word in parameter_name for word in ("down_proj", "output_linear", "w2")):
                parameter.zero_()
    for site in find_sites(model, "mlp")[2]:
        _, output = outputs_of(model, site.module, [5, 6, 7])
        assert not output.any(), site


@pytest.mark.parametrize("name", ["BloomForCausalLM", "LlamaForCausalLM", "FalconForCausalLM", "DeepseekV3ForCausalLM"])
def test_what_an_attention_puts_out_has_nothing_of_the_residual_stream_in_it(name):
    """Without its output projections a layer's attention puts out nothing; BLOOM's module adds the stream to that."""
    model = random_model(name)
    sites = find_sites(model, "attention")
    with torch.no_grad():
        for parameter in model.get_submodule(sites[2][0].module).parameters():
            parameter.zero_()
    _, output = outputs_of(model, sites[2][0].module, [5, 6, 7])
    assert not output.any()
    _, output = outputs_of(model, sites[1][0].module, [5, 6, 7])
    assert output.any()


def test_a_kind_that_is_not_there_is_an_error_that_says_why():
    with pytest.raises(
        UsageError, match=r"^GPT2LMHeadModel has no gate to trace: it has no gate projections of its own; "
    ):
        find_sites(random_model("GPT2LMHeadModel"), "gate")
    with pytest.raises(UsageError, match=r"layer 0 it belongs to experts, .*; leave up out, or trace mlp$"):
        find_sites(random_model("MixtralForCausalLM"), "up")
