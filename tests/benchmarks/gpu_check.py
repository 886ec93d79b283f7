"""What a GPU must do as a CPU does, and how fast: `python tests/benchmarks/gpu_check.py [--device cuda] [--folder F]`.

First the packaged pair: a search on the device and one on the CPU must select the same units, and after every
candidate the target's weights must be restored bit for bit. The same with the target spread over the device and the
CPU, half of its layers on each, and with weights in 8 and in 4 bits, whose answers are compared with those in 16. Then
a random pair of Llama-2-7B's shapes, which differ in directions of low rank, written to a folder with the packaged
tokenizer: `cost.py` times the parts of a repair on it beside the packaged pair's. With 60 GB of disk and 30 GB of
memory on the device it is done in less than ten minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import cost
import torch
from safetensors.torch import save_file
from tiny import parse
from transplant import HIDDEN, INTERMEDIATE, VOCABULARY, layer_shapes

from dapa_merge import miniature
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.generate import generate
from dapa_merge.measure.live import LiveModel, choose_device
from dapa_merge.measure.prompts.sets import load_prompts
from dapa_merge.measure.quantized import quantized_layers, state_of
from dapa_merge.plan.plan import Plan
from dapa_merge.plan.selection import make_plan
from dapa_merge.recipe.options import QUANTIZATIONS, Options
from dapa_merge.recipe.parse import load_recipe, recipe_from
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.search import search_plan

NUM_LAYERS, NUM_SHARDS, RANK = 32, 4, 16
NUM_PROMPTS = 32
# Of a random weight, and of the difference of the pair's.
SCALE, DIFFERENCE = 0.02, 0.002


def packaged() -> Recipe:
    """The packaged pair, whose gates repair it."""
    models = [str(miniature.path(name)) for name in ("target", "source")]
    content = {"merge_method": "dapa", "base_model": models[0], "models": [{"model": models[1]}]}
    return recipe_from({**content, "parameters": {"layers": "auto", "prompts": "miniature", "max_new_tokens": 24}})


def ways(device: str, plan: Plan) -> dict[str, Options]:
    """Where and how to search, by name: the CPU and the device, both together, and the device in few bits."""
    found = {"cpu": Options("cpu"), device: Options(device)}
    if device != "cpu":
        half = f"{plan.target.num_bytes // 1300}KB"
        found[f"{device} and cpu"] = Options(max_memory=f"{choose_device(device)}={half},cpu=8GiB")
    return found | {f"{device} in {bits}": Options(device, quantize=bits) for bits in QUANTIZATIONS}


def same_selections(device: str, folder: Path) -> Iterator[str]:
    """Search in every way, and compare with the CPU."""
    recipe = packaged()
    expected = None
    for name, options in ways(device, make_plan(recipe)).items():
        journal, start = folder / "journal.jsonl", time.perf_counter()
        found = search_plan(recipe, make_plan(recipe), replace(options, journal=journal))
        units = [str(unit) for unit in found.minimum.units]
        journal.unlink(missing_ok=True)
        expected = expected or units
        same = "as on the CPU" if units == expected else "NOT AS ON THE CPU"
        yield f"{name}: selected {units} in {time.perf_counter() - start:.1f} s, {same}; DSR {found.full.score:.3f}"


def restores(device: str) -> Iterator[str]:
    """Apply and take back every unit alone, and all together, and compare answers with those in 16 bits."""
    plan = make_plan(replace(packaged(), modules=("auto",)))
    prompts = load_prompts("miniature").harmful[:NUM_PROMPTS]
    expected: list[str] = []
    for name, options in ways(device, plan).items():
        live = LiveModel(plan, options.where)
        places = {str(parameter.device) for parameter in live.model.parameters()}
        before = {key: value.clone() for key, value in bits_of(live).items()}
        fault = None
        for units in (*((unit,) for unit in plan.units), plan.units):
            with live.transplanted(units):
                pass
            for key, value in bits_of(live).items():
                if not torch.equal(value, before[key]):
                    fault = f"{key} is NOT RESTORED after {len(units)} units"
        with live.transplanted(plan.units) as model:
            said = generate(model, live.tokenizer, prompts, max_new_tokens=24, batch_size=BatchSize(NUM_PROMPTS))
        expected = expected or said
        same = sum(one == other for one, other in zip(said, expected, strict=True))
        held = fault or f"{len(plan.units)} units, one by one and together, restored bit for bit"
        yield f"{name} ({', '.join(sorted(places))}): {held}; {same} of {len(said)} answers of the result as on the CPU"
        live.close()


def bits_of(live: LiveModel) -> dict[str, torch.Tensor]:
    """Everything that a model computes with, as bytes."""
    found = dict(live.model.named_parameters())
    for name, layer in quantized_layers(live.model):
        state = state_of(layer)
        found |= {name: state.data, f"{name} scales": getattr(state.scales, "absmax", state.scales)}
    return {name: value.detach().contiguous().view(torch.uint8) for name, value in found.items()}


def write_pair(folder: Path, device: torch.device, layers: int, hidden: int, intermediate: int) -> Path:
    """Write a random target and source, and the recipe that names them."""
    generator = torch.Generator(device).manual_seed(0)
    tokenizer = miniature.path("target")
    vocabulary = VOCABULARY if hidden == HIDDEN else json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    shapes = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,), "lm_head": (vocabulary, hidden)}
    for layer in range(layers):
        for name, shape in layer_shapes(hidden, intermediate).items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    config = json.loads((tokenizer / "config.json").read_text()) | {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate, "head_dim": None,
        "num_attention_heads": hidden // 128 or 1, "num_key_value_heads": hidden // 128 or 1, "vocab_size": vocabulary,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    names = list(shapes)
    owners: dict[str, str] = {}
    for model in ("target", "source"):
        (folder / model).mkdir(parents=True)
        for path in tokenizer.iterdir():
            if path.suffix not in (".safetensors", ".txt"):
                shutil.copyfile(path, folder / model / path.name)
        (folder / model / "config.json").write_text(json.dumps(config))
    for index in range(NUM_SHARDS):
        file = f"model-{index + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        shards: dict[str, dict[str, torch.Tensor]] = {"target": {}, "source": {}}
        for name in names[len(names) * index // NUM_SHARDS : len(names) * (index + 1) // NUM_SHARDS]:
            shape = shapes[name]
            value = torch.randn(shape, generator=generator, device=device) * SCALE + (len(shape) == 1)
            other = value
            if len(shape) == 2 and ".layers." in name:
                left, right = (torch.randn((size, RANK), generator=generator, device=device) for size in shape)
                other = value + DIFFERENCE * left @ right.T / RANK**0.5
            for model, weight in (("target", value), ("source", other)):
                shards[model][f"{name}.weight"] = weight.bfloat16().cpu()
            owners[f"{name}.weight"] = file
        for model, tensors in shards.items():
            save_file(tensors, folder / model / file, metadata={"format": "pt"})
    for model in ("target", "source"):
        index_text = json.dumps({"metadata": {}, "weight_map": owners})
        (folder / model / "model.safetensors.index.json").write_text(index_text)
    recipe = folder / "7b.yml"
    recipe.write_text(
        f"merge_method: dapa\nbase_model: {folder / 'target'}\nmodels: [{{model: {folder / 'source'}}}]\n"
        "parameters: {layers: auto, prompts: miniature}\n"
    )
    load_recipe(recipe)
    return recipe


def main(argv: Sequence[str] | None = None) -> None:
    """Check the packaged pair, and time the large one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="for the random pair; a temporary one if not given")
    arguments = parse(parser, argv)
    device = arguments.device
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        for line in restores(device):
            print(line, flush=True)
        if not arguments.tiny:
            for line in same_selections(device, folder):
                print(line, flush=True)
        sizes = (2, 256, 512) if arguments.tiny else (NUM_LAYERS, HIDDEN, INTERMEDIATE)
        recipe = write_pair(folder, torch.device(device), *sizes)
        cost.main([str(recipe), "--device", device, *(["--tiny"] if arguments.tiny else [])])


if __name__ == "__main__":
    main()
