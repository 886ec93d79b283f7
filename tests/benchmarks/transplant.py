"""The transplant on disk beside its peers: `mergekit-yaml` on the same recipe, `cp -r`, and a parallel plain copy.

`python tests/benchmarks/transplant.py [--gigabytes 5] [--repeat 3]`: writes a checkpoint of Llama-2-7B's layer shapes
in three shards under a temporary folder (`--folder` to choose the disk), runs each program as its own process, prints
median seconds, peak memory, and bytes read and written as Linux counts them in /proc/self/io.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

# Llama-2-7B's, and how many shards it has.
HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 11008, 32000
NUM_SHARDS = 3


def layer_shapes(hidden: int = HIDDEN, intermediate: int = INTERMEDIATE) -> dict[str, tuple[int, ...]]:
    """The weights of one layer of a Llama without grouped queries."""
    return {
        **{f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"},
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }


def layers_for(num_bytes: float) -> int:
    """How many layers make up so many bytes, at least two."""
    layer_bytes = 2 * sum(torch.Size(shape).numel() for shape in layer_shapes().values())
    return max(2, round((num_bytes - 4 * VOCABULARY * HIDDEN) / layer_bytes))


def write_checkpoint(
    folder: Path,
    num_layers: int,
    seed: int,
    *,
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
    vocabulary: int = VOCABULARY,
    num_shards: int = NUM_SHARDS,
) -> None:
    """A bf16 Llama checkpoint of random values."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for layer in range(num_layers):
        for name, shape in layer_shapes(hidden, intermediate).items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    shapes["lm_head.weight"] = (vocabulary, hidden)
    names = list(shapes)
    owners = {}
    for index in range(num_shards):
        file = f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[len(names) * index // num_shards : len(names) * (index + 1) // num_shards]
        tensors = {name: torch.randn(shapes[name], generator=generator).bfloat16() for name in part}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        owners |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": owners}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": num_layers,
        "hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": 32, "vocab_size": vocabulary,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def parallel_copy(origin: Path, destination: Path) -> None:
    """The plain copy that the transplant is held to."""
    destination.mkdir()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda path: shutil.copyfile(path, destination / path.name), sorted(origin.iterdir())))


def in_child(program: str, *arguments: str) -> dict[str, float]:
    """Run Python code in a process of its own, and return what it cost."""
    code = (
        f"import sys, json, time\nstart = time.perf_counter()\nsys.argv = {['x', *arguments]!r}\n{program}\n"
        "io = dict(line.split(': ') for line in open('/proc/self/io').read().splitlines())\n"
        "print(json.dumps({'seconds': time.perf_counter() - start,"
        # Not ru_maxrss, which a child inherits from the process that started it.
        " 'peak': int(dict(line.split(':') for line in open('/proc/self/status'))['VmHWM'].split()[0]) / 1024,"
        " 'read': int(io['rchar']) / 1e9, 'written': int(io['wchar']) / 1e9}))"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


COMMAND_LINE = "try: main()\nexcept SystemExit as stop: assert not stop.code, stop.code"
OURS = f"sys.argv[0] = 'dapa-merge'\nfrom dapa_merge.cli import main\n{COMMAND_LINE}"
UNPROVED = f"import dapa_merge.run\ndapa_merge.run.prove = lambda *_: None\n{OURS}"
MERGEKIT = f"from mergekit.scripts.run_yaml import main\n{COMMAND_LINE}"
PARALLEL = (
    "import importlib.util, pathlib\n"
    f"spec = importlib.util.spec_from_file_location('bench', {__file__!r})\n"
    "bench = importlib.util.module_from_spec(spec); spec.loader.exec_module(bench)\n"
    "start = time.perf_counter()\n"
    "bench.parallel_copy(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))"
)


def main() -> None:
    """Write the checkpoints, run everything, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    num_layers = layers_for(arguments.gigabytes * 1e9)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        for seed, name in enumerate(("target", "source")):
            write_checkpoint(folder / name, num_layers, seed)
        recipe = folder / "recipe.yml"
        recipe.write_text(
            f"merge_method: dapa\nbase_model: {folder / 'target'}\nmodels:\n  - model: {folder / 'source'}\n"
            f"parameters:\n  layers: 1-{num_layers // 2}\n"
        )
        size = sum(path.stat().st_size for path in (folder / "target").iterdir())
        print(f"{num_layers} layers, {size / 1e9:.2f} GB, gates of layers 1-{num_layers // 2} from the source")
        out = str(folder / "out")
        command = ("--quiet", "run", str(recipe), out, "--no-evaluate")
        programs = {
            "dapa-merge, proved byte by byte": lambda: in_child(OURS, *command),
            "dapa-merge, the copy alone": lambda: in_child(UNPROVED, *command),
            "parallel plain copy": lambda: in_child(PARALLEL, str(folder / "target"), out),
            "cp -r": lambda: timed_cp(folder / "target", out),
            "mergekit-yaml": lambda: in_child(MERGEKIT, str(recipe), out, "--quiet", "--no-copy-tokenizer"),
        }
        for name, program in programs.items():
            runs = []
            for _ in range(arguments.repeat):
                runs.append(program())
                os.sync()
                shutil.rmtree(out)
            cost = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            print(
                f"{name:<34}{cost['seconds']:7.2f} s  peak {cost['peak']:7.0f} MB  "
                f"read {cost['read']:6.2f} GB  written {cost['written']:6.2f} GB",
                flush=True,
            )


def timed_cp(origin: Path, destination: str) -> dict[str, float]:
    """`cp -r`, which reads and writes every byte once."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(origin), destination], check=True)
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in origin.iterdir()) / 1e9
    return {"seconds": seconds, "peak": float("nan"), "read": size, "written": size}


if __name__ == "__main__":
    main()
