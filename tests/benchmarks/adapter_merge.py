"""A LoRA adapter merged into its base, beside peft's `merge_and_unload` as mergekit calls it.

`python tests/benchmarks/adapter_merge.py [BASE] [--rank 16] [--modules q_proj,...] [--folder F]`: makes an adapter of
random values for BASE (by default the miniature's target), merges it by either, each as its own process, and prints
seconds, peak memory, and bytes written; then how many tensors the results have, how many values of tensors that the
adapter changes differ from peft's, and which files of the base are gone or rewritten.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dapa_merge import miniature
from dapa_merge.checkpoint.open import Checkpoint, open_checkpoint
from dapa_merge.checkpoint.spelling import bare_name

# Each prints the folder of its result.
OURS = """\
from dapa_merge.checkpoint.convert import open_location
from dapa_merge.checkpoint.location import Location
import sys
print(open_location(Location(sys.argv[1], adapter=Location(sys.argv[2]))).folder)
"""
THEIRS = """\
from mergekit.common import ModelReference
import sys
print(ModelReference.parse(f"{sys.argv[1]}+{sys.argv[2]}").merged(cache_dir=sys.argv[3]).model.path)
"""
# Not ru_maxrss, which a child inherits from the process that started it.
PEAK = """\
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def write_adapter(base: Checkpoint, folder: Path, rank: int, modules: Sequence[str]) -> Path:
    """A LoRA of random values for modules of these names, as peft saves it."""
    torch.manual_seed(0)
    tensors = {}
    for tensor in base.tensors.values():
        place, leaf = tensor.name.removesuffix(".weight"), tensor.name.rpartition(".")[2]
        if leaf == "weight" and place.rpartition(".")[2] in modules:
            outputs, inputs = tensor.shape
            name = f"base_model.model.model.{bare_name(place)}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inputs) / inputs**0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, rank) * 0.02
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": list(modules)}))
    return folder


def run(code: str, *arguments: object, cache: Path) -> tuple[Path, float, float]:
    """The folder that a program prints, its seconds, and the peak of its memory in MB."""
    command = [sys.executable, "-c", code + PEAK, *map(str, arguments), str(cache / "mergekit")]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    started = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - started
    folder, kilobytes = done.stdout.splitlines()[-2:]
    return Path(folder), seconds, int(kilobytes) / 1e3


def tensors_of(folder: Path) -> dict[str, tuple[Path, str]]:
    """Where each tensor of a folder is, by its name without the wrappers of the model."""
    checkpoint = open_checkpoint(str(folder))
    return {bare_name(name): (folder / tensor.file, name) for name, tensor in checkpoint.tensors.items()}


def differing(ours: Path, theirs: Path) -> tuple[int, int]:
    """How many values of tensors that both have differ, and how many there are."""
    first, second = tensors_of(ours), tensors_of(theirs)
    differ = total = 0
    for name in first.keys() & second.keys():
        one, other = (read(*place) for place in (first[name], second[name]))
        differ += int((one != other).sum())
        total += one.numel()
    return differ, total


def read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", type=Path, default=miniature.path("target"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--modules", default="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj")
    parser.add_argument("--folder", type=Path, help="where to write; by default a temporary folder")
    parser.add_argument("--tiny", action="store_true", help="a small adapter of the miniature, to test this script")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        modules = ["q_proj"] if options.tiny else options.modules.split(",")
        adapter = write_adapter(open_checkpoint(str(options.base)), folder / "adapter", options.rank, modules)
        results = {}
        print("| merged by | seconds | peak MB | MB written | tensors | files lost | files rewritten |")
        print("|---|---|---|---|---|---|---|")
        for who, code in (("dapa-merge", OURS), ("mergekit (peft)", THEIRS)):
            made, seconds, megabytes = run(code, options.base.absolute(), adapter, cache=folder / who.split()[0])
            results[who] = made
            written = sum(path.stat().st_size for path in made.rglob("*") if path.is_file() and not path.is_symlink())
            small = [path for path in options.base.iterdir() if path.is_file() and path.suffix != ".safetensors"]
            lost = [path.name for path in small if not (made / path.name).exists()]
            rewritten = [
                path.name for path in small
                if path.name not in lost and not filecmp.cmp(path, made / path.name, shallow=False)
            ]  # fmt: skip
            print(
                f"| {who} | {seconds:.1f} | {megabytes:.0f} | {written / 1e6:.0f} | {len(tensors_of(made))} | "
                f"{', '.join(lost) or '-'} | {', '.join(rewritten) or '-'} |"
            )
        differ, total = differing(*results.values())
        print(f"{differ} of {total} values differ between the two.")


if __name__ == "__main__":
    main()
