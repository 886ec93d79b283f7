"""What a GPU must do as a CPU does, and how fast: `python tests/benchmarks/gpu_check.py [--device cuda] [--folder F]`.

First the packaged pair: a search on the device and one on the CPU must select the same units, and after every
candidate the target's weights must be restored bit for bit. Then a random pair of Llama-2-7B's shapes, which differ in
directions of low rank, written to a folder with the packaged tokenizer: `cost.py` times the parts of a repair on it
beside the packaged pair's. With 60 GB of disk and 30 GB of memory on the device it is done in less than ten minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cost
import torch
from safetensors.torch import save_file
from tiny import parse
from transplant import HIDDEN, INTERMEDIATE, VOCABULARY, layer_shapes

from dapa_merge import miniature
from dapa_merge.measure.live import LiveModel
from dapa_merge.plan.selection import make_plan
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parse import load_recipe, recipe_from
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.search import search_plan

NUM_LAYERS, NUM_SHARDS, RANK = 32, 4, 16
# Of a random weight, and of the difference of the pair's.
SCALE, DIFFERENCE = 0.02, 0.002


def packaged() -> Recipe:
    """The packaged pair, whose gates repair it."""
    models = [str(miniature.path(name)) for name in ("target", "source")]
    content = {"merge_method": "dapa", "base_model": models[0], "models": [{"model": models[1]}]}
    return recipe_from({**content, "parameters": {"layers": "auto", "prompts": "miniature", "max_new_tokens": 24}})


def same_selection(device: str, folder: Path) -> str:
    """Search on the device and on the CPU."""
    recipe = packaged()
    found = {}
    for where in ("cpu", device):
        plan = make_plan(recipe)
        journal = folder / f"{where.replace(':', '-')}.jsonl"
        found[where] = [str(unit) for unit in search_plan(recipe, plan, Options(device=where, journal=journal)).units]
        journal.unlink(missing_ok=True)
    same = found["cpu"] == found[device]
    return f"selected on the CPU {found['cpu']}, on {device} {found[device]}: {'the same' if same else 'NOT THE SAME'}"


def restores(device: str) -> str:
    """Apply and take back every unit alone, and all together."""
    plan = make_plan(replace(packaged(), modules=("auto",)))
    live = LiveModel(plan, torch.device(device))
    before = {name: value.clone() for name, value in live.model.state_dict().items()}
    for units in (*((unit,) for unit in plan.units), plan.units):
        with live.transplanted(units):
            pass
        for name, value in live.model.state_dict().items():
            if not torch.equal(value.view(torch.uint8), before[name].view(torch.uint8)):
                return f"{name} is NOT RESTORED after {len(units)} units"
    return f"{len(plan.units)} units, one by one and together, restored bit for bit"


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
        print(restores(device), flush=True)
        if not arguments.tiny:
            print(same_selection(device, folder), flush=True)
        sizes = (2, 256, 512) if arguments.tiny else (NUM_LAYERS, HIDDEN, INTERMEDIATE)
        recipe = write_pair(folder, torch.device(device), *sizes)
        cost.main([str(recipe), "--device", device, *(["--tiny"] if arguments.tiny else [])])


if __name__ == "__main__":
    main()
