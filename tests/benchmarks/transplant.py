"""The transplant on disk beside its peers: `mergekit-yaml` on the same recipe, `cp -r`, and parallel plain copies.

`python tests/benchmarks/transplant.py [--gigabytes 1 2 5] [--shards 3] [--repeat 5] [--brief] [--folder F]`: writes a
checkpoint of Llama-2-7B's layer shapes under a temporary folder, runs each program as its own process, in turn, so
often, and prints medians: seconds until it ended, and until a `sync` after it returned (most copies leave that to
others; ours has nothing left to write, nor has the copy that flushes each file); processor seconds; peak memory; bytes
that its system calls read and wrote (rchar and wchar of /proc/self/io; what is mapped is not in them), and those of
them that came from the disk and went there (read_bytes and write_bytes). Then the ratios that the budgets limit: how
many times as fast as mergekit, and how much of the time of a parallel copy until it is on disk; of medians, and the
median of the ratios within a round, which a busy hour moves less. `--brief` runs only what these need. At the end, how
seconds and memory grow with the size.
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
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import parse

# Llama-2-7B's, and how many shards it has.
HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 11008, 32000
NUM_SHARDS = 3
TINY_SHAPE = {"hidden": 64, "intermediate": 256, "vocabulary": 256}


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


def in_child(program: str, *arguments: str) -> dict[str, float]:
    """Run Python code in a process of its own, and return what it cost."""
    code = (
        f"import sys, json, os, time\nstart = time.perf_counter()\nsys.argv = {['x', *arguments]!r}\n{program}\n"
        "seconds = time.perf_counter() - start\n"
        "io = {key: int(value) / 1e9 for key, value in (line.split(': ') for line in open('/proc/self/io'))}\n"
        "print(json.dumps({'seconds': seconds, 'processor': sum(os.times()[:2]),"
        # Not ru_maxrss, which a child inherits from the process that started it.
        " 'peak': int(dict(line.split(':') for line in open('/proc/self/status'))['VmHWM'].split()[0]) / 1024,"
        " 'read': io['rchar'], 'written': io['wchar'], 'from_disk': io['read_bytes'], 'to_disk': io['write_bytes']}))"
    )
    began = time.perf_counter()
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    cost = json.loads(output.splitlines()[-1])
    # With the start of the interpreter, which a user waits for too.
    return cost | {"seconds": time.perf_counter() - began}


def timed_cp(origin: Path, destination: str) -> dict[str, float]:
    """`cp -r`, which reads and writes every byte once."""
    began, before = time.perf_counter(), os.times()
    subprocess.run(["cp", "-r", str(origin), destination], check=True)
    after = os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    size = sum(path.stat().st_size for path in origin.iterdir()) / 1e9
    unknown = dict.fromkeys(("peak", "from_disk", "to_disk"), float("nan"))
    return {"seconds": time.perf_counter() - began, "processor": processor, "read": size, "written": size} | unknown


COMMAND_LINE = "try: main()\nexcept SystemExit as stop: assert not stop.code, stop.code"
OURS = f"sys.argv[0] = 'dapa-merge'\nfrom dapa_merge.cli import main\n{COMMAND_LINE}"
# Neither read back nor hashed: what the copy alone takes.
UNPROVED = f"import dapa_merge.transplant.shard as copying\ncopying._read_back = lambda *_: None\n{OURS}"
MERGEKIT = f"from mergekit.scripts.run_yaml import main\n{COMMAND_LINE}"
# Without this file's own imports, torch among them.
PARALLEL = (
    "import shutil, pathlib\nfrom concurrent.futures import ThreadPoolExecutor\n"
    "origin, destination = map(pathlib.Path, sys.argv[1:])\ndestination.mkdir()\n"
    "with ThreadPoolExecutor(4) as pool:\n"
    "    list(pool.map(lambda path: shutil.copyfile(path, destination / path.name), sorted(origin.iterdir())))"
)
# Until it is on disk, as ours is when it ends.
PARALLEL_ON_DISK = (
    "import os, shutil, pathlib\nfrom concurrent.futures import ThreadPoolExecutor\n"
    "origin, destination = map(pathlib.Path, sys.argv[1:])\ndestination.mkdir()\n"
    "def flush(path):\n"
    "    descriptor = os.open(path, os.O_RDONLY)\n"
    "    os.fsync(descriptor)\n"
    "    os.close(descriptor)\n"
    "def copy(path):\n"
    "    shutil.copyfile(path, destination / path.name)\n"
    "    flush(destination / path.name)\n"
    "with ThreadPoolExecutor(4) as pool: list(pool.map(copy, sorted(origin.iterdir())))\n"
    "flush(destination)"
)
# What somebody would do without this project who wants a plain copy and the digests that a manifest has.
PARALLEL_HASHED = (
    f"{PARALLEL}\n"
    "import hashlib\n"
    "def digest(path):\n"
    "    whole = hashlib.sha256()\n"
    "    with path.open('rb', buffering=0) as file:\n"
    "        buffer = memoryview(bytearray(1 << 18))\n"
    "        while size := file.readinto(buffer): whole.update(buffer[:size])\n"
    "    return whole.hexdigest()\n"
    "with ThreadPoolExecutor(4) as pool: list(pool.map(digest, sorted(destination.iterdir())))"
)
PROOF, BARE, PLAIN, ON_DISK, HASHED, PEER = (
    "dapa-merge run",
    "  with --no-manifest",
    "parallel plain copy",
    "parallel copy until on disk",
    "parallel copy and SHA-256s",
    "mergekit-yaml",
)
# The budgets of writing a result.
MIN_SPEEDUP, MAX_RATIO = 5.0, 1.1


def measure(
    folder: Path, num_bytes: float, repeat: int, num_shards: int, *, is_brief: bool, is_tiny: bool
) -> dict[str, dict[str, float]]:
    """The medians of each program on a checkpoint of one size, printed as they are known."""
    num_layers = 2 if is_tiny else layers_for(num_bytes)
    for seed, name in enumerate(("target", "source")):
        write_checkpoint(folder / name, num_layers, seed, num_shards=num_shards, **(TINY_SHAPE if is_tiny else {}))
    os.sync()
    recipe = folder / "recipe.yml"
    recipe.write_text(
        f"merge_method: dapa\nbase_model: {folder / 'target'}\nmodels:\n  - model: {folder / 'source'}\n"
        f"parameters:\n  layers: 1-{num_layers // 2}\n"
    )
    size = sum(path.stat().st_size for path in (folder / "target").iterdir())
    what = f"{num_layers} layers, {size / 1e9:.2f} GB, shards: {num_shards}"
    print(f"{what}, gates of layers 1-{num_layers // 2} from the source", flush=True)
    out = folder / "out"
    command = ("--quiet", "run", str(recipe), str(out), "--no-evaluate")
    programs: dict[str, Callable[[], dict[str, float]]] = {
        PROOF: lambda: in_child(OURS, *command),
        "  with --link": lambda: in_child(OURS, *command, "--link"),
        BARE: lambda: in_child(OURS, *command, "--no-manifest"),
        "  and without proof": lambda: in_child(UNPROVED, *command, "--no-manifest"),
        PLAIN: lambda: in_child(PARALLEL, str(folder / "target"), str(out)),
        ON_DISK: lambda: in_child(PARALLEL_ON_DISK, str(folder / "target"), str(out)),
        HASHED: lambda: in_child(PARALLEL_HASHED, str(folder / "target"), str(out)),
        "cp -r": lambda: timed_cp(folder / "target", str(out)),
        PEER: lambda: in_child(MERGEKIT, str(recipe), str(out), "--quiet", "--no-copy-tokenizer"),
    }
    if is_brief:
        programs = {name: programs[name] for name in (PROOF, BARE, ON_DISK, PEER)}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    names = list(programs)
    for number in range(repeat):
        # In turn, so that whatever else the machine does meets them all, and each time another one first: who comes
        # after a program that freed much memory pays for it.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            cost = programs[name]()
            began = time.perf_counter()
            os.sync()
            runs[name].append(cost | {"durable": cost["seconds"] + time.perf_counter() - began})
            shutil.rmtree(out)
    in_child(OURS, *command)
    checks = () if is_brief else (("dapa-merge verify", ()), ("  with --files-only", ("--files-only",)))
    for name, options in checks:
        runs[name] = [in_child(OURS, "--quiet", "verify", str(out), *options) for _ in range(repeat)]
        for run in runs[name]:
            run["durable"] = run["seconds"]
    shutil.rmtree(out)
    medians = {name: {key: statistics.median(run[key] for run in of) for key in of[0]} for name, of in runs.items()}
    for name, cost in medians.items():
        print(
            f"{name:<28}{cost['seconds']:6.2f} s, on disk {cost['durable']:6.2f} s, "
            f"processor {cost['processor']:6.2f} s, peak {cost['peak']:5.0f} MB, "
            f"read {cost['read']:5.2f} GB ({cost['from_disk']:.2f} from disk), "
            f"written {cost['written']:5.2f} GB ({cost['to_disk']:.2f} to disk)",
            flush=True,
        )
    for name in (name for name in (PLAIN, HASHED, "cp -r") if name in medians):
        for ours in (PROOF, BARE):
            seconds, durable = (medians[ours][key] / medians[name][key] for key in ("seconds", "durable"))
            print(
                f"{ours.strip()} takes {seconds:.2f} of the time of {name.strip()}, {durable:.2f} until it is on disk",
                flush=True,
            )
    for ours in (PROOF, BARE):
        speedup, by_round = ratios(runs[PEER], runs[ours])
        print(f"{ours.strip()}: {speedup:.2f} times as fast as {PEER}, {by_round:.2f} by round; limit {MIN_SPEEDUP:g}")
        ratio, by_round = ratios(runs[ours], runs[ON_DISK])
        print(f"{ours.strip()}: {ratio:.2f} of the {ON_DISK}, {by_round:.2f} by round; limit {MAX_RATIO:g}", flush=True)
    for name in ("target", "source"):
        shutil.rmtree(folder / name)
    return medians


def ratios(some: Sequence[dict[str, float]], others: Sequence[dict[str, float]]) -> tuple[float, float]:
    """How the seconds of two programs compare: the ratio of their medians, and the median of the ratios by round."""
    pairs = [(one["seconds"], other["seconds"]) for one, other in zip(some, others, strict=True)]
    of_medians = statistics.median(one for one, _ in pairs) / statistics.median(other for _, other in pairs)
    return of_medians, statistics.median(one / other for one, other in pairs)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the checkpoints, run everything, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 2.0, 5.0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--shards", type=int, default=NUM_SHARDS)
    parser.add_argument("--brief", action="store_true", help="only what the limits need")
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parse(parser, argv, gigabytes=[0.001], repeat=1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder, repeat = Path(temporary), arguments.repeat
        how = {"is_brief": arguments.brief, "is_tiny": arguments.tiny}
        sizes = {size: measure(folder, size * 1e9, repeat, arguments.shards, **how) for size in arguments.gigabytes}
    print("growth of seconds and of peak memory in MB:")
    for name in next(iter(sizes.values())):
        found = "; ".join(
            f"{size:g} GB: {of[name]['seconds']:.2f} s, {of[name]['peak']:.0f}" for size, of in sizes.items()
        )
        print(f"{name:<28}{found}")


if __name__ == "__main__":
    main()
