"""Runs a spread model on devices that torch only pretends to have, and that refuse each other's tensors.

Values are not computed (torch's `FakeTensorMode`), but the device of every tensor is, and an operation with tensors of
two devices fails as it would on real ones. Nor does any have float64, which Apple's accelerator lacks.
"""

import inspect

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from dapa_merge.measure import placement
from dapa_merge.measure.decode import RowCache
from dapa_merge.measure.divergence import ReferenceRow, divergences
from dapa_merge.measure.live import Slot
from dapa_merge.measure.perplexity import ScoredText, counted_logits, losses
from dapa_merge.search.slopes import Axis, _adding

NUM_LAYERS, RANK = 4, 3
_setup_privateuseone_for_python_backend("gpu")
_tensor = torch.tensor


def tensor(data, *arguments, device=None, **settings):
    """As `torch.tensor`, which does not reach a device that is pretended."""
    made = _tensor(data, *arguments, **settings)
    return made if device is None else made.to(device)


class NoDoubles(TorchDispatchMode):
    """Refuses what would be float64 on an accelerator."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for one in found if isinstance(found, (list, tuple)) else (found,):
            if isinstance(one, torch.Tensor) and one.device.type == "gpu" and one.dtype == torch.float64:
                raise TypeError(f"{function} makes float64 on {one.device}")
        return found


def spread(first, second, last):
    names = {"model.embed_tokens": first, "model.rotary_emb": first, "model.norm": last, "lm_head": last}
    return names | {
        f"model.layers.{layer}": first if layer < NUM_LAYERS // 2 else second for layer in range(NUM_LAYERS)
    }


def put(model, where) -> None:
    """As transformers loads them: parameters and buffers on the devices of a map."""
    for name, module in list(model.named_modules()):
        device = next((where[key] for key in where if name == key or name.startswith(f"{key}.")), None)
        if device is not None:
            for key, one in list(module._parameters.items()):
                if one is not None:
                    made = torch.empty(one.shape, dtype=one.dtype, device=device)
                    module._parameters[key] = torch.nn.Parameter(made, requires_grad=False)
            for key, one in list(module._buffers.items()):
                module._buffers[key] = torch.empty(one.shape, dtype=one.dtype, device=device)


def decode(model, cache, num_rows: int, num_tokens: int, name: str) -> torch.Tensor:
    device, columns = model.device, cache.columns
    places = torch.arange(columns + num_tokens, device=device)
    return model(
        input_ids=torch.zeros((num_rows, num_tokens), dtype=torch.long, device=device),
        attention_mask=torch.ones((num_rows, columns + num_tokens), dtype=torch.long, device=device),
        position_ids=places[columns:].expand(num_rows, -1),
        logits_to_keep=torch.arange(num_tokens, device=device),
        use_cache=True,
        **{name: cache},
    ).logits


def check(where) -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=NUM_LAYERS, num_attention_heads=4, vocab_size=60
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    put(model, where)
    placement.spread(model, where)
    expected = [where[f"model.layers.{layer}"] for layer in range(NUM_LAYERS)]
    assert model.device == where["model.embed_tokens"]
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache = RowCache()
    assert decode(model, cache, 2, 5, name).device == model.device
    assert [layer.keys.device for layer in cache.layers] == expected
    cache.arrange([1, 0, 1], [5, 4, 5], 4)
    cache.join(cache.copy())
    assert decode(model, cache, 6, 1, name).device == model.device
    assert [layer.keys.device for layer in cache.layers] == expected
    texts = [ScoredText([1, 2, 3, 4], 2), ScoredText([1, 2, 3], 1)]
    assert {one.device for one in counted_logits(model, 0, texts)} == {model.device}
    assert losses(model, 0, texts).device == model.device
    for is_logits, width in ((True, 60), (False, 32)):
        rows = [ReferenceRow(text, torch.empty(2, width), is_logits) for text in texts]
        assert divergences(model, 0, rows).device == model.device
    weights = torch.zeros(NUM_LAYERS * RANK**2).to(model.device).requires_grad_()
    called: set[int] = set()
    for number in range(NUM_LAYERS):
        layer = model.model.layers[number].mlp.gate_proj
        slot = Slot(None, layer.weight, (slice(0, layer.out_features), slice(0, layer.in_features)), {})
        left, right = (torch.empty(size, RANK, device=layer.weight.device) for size in layer.weight.shape)
        axis = Axis(slot, left, right, slice(number * RANK**2, (number + 1) * RANK**2))
        layer.register_forward_hook(_adding(axis, weights, called))
    # Forward only: torch's backward needs real devices.
    assert divergences(model, 0, rows, 2.0).requires_grad
    assert len(called) == NUM_LAYERS


if __name__ == "__main__":
    torch.tensor = tensor
    cpu, one, other = torch.device("cpu"), torch.device("gpu", 0), torch.device("gpu", 1)
    maps = {
        "gpu+cpu": spread(one, cpu, cpu),
        "cpu+gpu": spread(cpu, one, one),
        "gpu+gpu": spread(one, other, other),
        "gpu+gpu+cpu": spread(one, other, cpu),
    }
    for name, where in maps.items():
        with FakeTensorMode(allow_non_fake_inputs=True), NoDoubles():
            check(where)
        print(name)
