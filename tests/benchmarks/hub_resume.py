"""A download of gates that is killed again and again, from a server that breaks connections: what comes of it?

`python tests/benchmarks/hub_resume.py [--kills 20] [--drop-megabytes 3]`: runs `dapa-merge run --no-evaluate` with a
source on a local server, in processes of their own, and kills each with SIGKILL at a random moment after its first
bytes of weights came. When all kills are done, it may end. Weights that differ from those of a local source are a
fault, and the exit code 1. Prints how many bytes of weights the server sent, beside those that were needed.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import parse

sys.path.insert(0, str(Path(__file__).parents[1]))

from hub_server import Faults, command_line, environment, hub

NUM_LAYERS = 8
SHAPE = (4096, 2048)
RECIPE = """\
merge_method: dapa
base_model: {target}
models: [{{model: {source}}}]
parameters: {{layers: "0-5"}}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--drop-megabytes", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parse(parser, argv, kills=1, drop_megabytes=0.1)
    shape, delay = ((512, 256), 0.1) if arguments.tiny else (SHAPE, 0.01)
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        target, source = make(folder / "target", 1, shape), make(folder / "source", 2, shape)
        run(folder, target, source, folder / "expected", {})
        faults = Faults(drop_every=int(arguments.drop_megabytes * 1e6), delay_seconds=delay)
        kills = 0
        with hub({"someone/source": source}, faults=faults) as (endpoint, log):
            variables = environment(endpoint, folder / "home", XDG_CACHE_HOME=str(folder / "cache"))
            while kills < arguments.kills:
                before = log.num_weight_bytes()
                process = start(folder, target, "someone/source", folder / "out", variables)
                while log.num_weight_bytes() == before and process.poll() is None:
                    time.sleep(0.01)
                try:
                    process.wait(generator.uniform(0, 1))
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    kills += 1
                else:
                    raise SystemExit("it was over before its kill came; give --kills a smaller number")
            faults.delay_seconds = 0
            began = time.monotonic()
            run(folder, target, "someone/source", folder / "out", variables)
            seconds = time.monotonic() - began
        needed = sum(2 * shape[0] * shape[1] for _ in range(6)) + sum(
            map(num_header_bytes, source.glob("*.safetensors"))
        )
        same = all(
            path.read_bytes() == (folder / "out" / path.name).read_bytes()
            for path in (folder / "expected").glob("*.safetensors")
        )
        whole = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        print(f"{kills} kills while bytes came; then {seconds:.1f} s")
        sent = log.num_weight_bytes()
        print(f"{sent / 1e6:.1f} MB were sent, {needed / 1e6:.1f} MB were needed of {whole / 1e6:.1f} MB")
        print("the result is the same" if same else "THE RESULT IS WRONG")
        return 0 if same else 1


def make(folder: Path, seed: int, shape: tuple[int, int]) -> Path:
    """A checkpoint of random gates, ups and downs in two shards."""
    folder.mkdir()
    torch.manual_seed(seed)
    owners = {}
    for shard in range(2):
        name = f"model-{shard + 1:05d}-of-00002.safetensors"
        weights = {
            f"model.layers.{layer}.mlp.{projection}_proj.weight": torch.randn(
                shape if projection != "down" else shape[::-1]
            ).bfloat16()
            for layer in range(shard * NUM_LAYERS // 2, (shard + 1) * NUM_LAYERS // 2)
            for projection in ("gate", "up", "down")
        }
        owners |= dict.fromkeys(weights, name)
        save_file(weights, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": owners}))
    (folder / "config.json").write_text(json.dumps({"architectures": ["SomeLM"], "num_hidden_layers": NUM_LAYERS}))
    return folder


def num_header_bytes(path: Path) -> int:
    """The length of a weight file's header, with its own length before it."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def start(folder: Path, target: Path, source: object, out: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a transplant in a process of its own."""
    recipe = folder / "recipe.yml"
    recipe.write_text(RECIPE.format(target=target, source=source))
    command = command_line("run", recipe, out, "--no-evaluate", "--json")
    return subprocess.Popen(command, env=variables or None, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run(folder: Path, target: Path, source: object, out: Path, variables: dict[str, str]) -> None:
    """A transplant that must succeed."""
    code = start(folder, target, source, out, variables).wait()
    if code:
        raise SystemExit(f"the transplant ended with {code}")


if __name__ == "__main__":
    raise SystemExit(main())
