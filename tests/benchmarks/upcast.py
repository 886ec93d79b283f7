"""How fast a processor answers in a model's 16 bits: packed weights beside weights upcast for each pass, and float32.

`python tests/benchmarks/upcast.py MODEL [--prompts 12] [--max-new-tokens 40] [--rounds 2]`: answers the first builtin
prompts in turn in each way, with as many threads as torch takes, and prints the seconds of the fastest round, the
memory, and how many answers are those of the first way, word for word. On a processor with arithmetic of the model's
dtype nothing is upcast, and the first two ways are the same. At the end, for one layer of each shape of the model, how
long a product of 1, 12, 100 and 400 rows takes in each way, and whether packed rows have the same bits in any number.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack
from unittest.mock import patch

import psutil
import torch
from tiny import parse

from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.measure import determinism
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.determinism import batch_invariant, drop_copies
from dapa_merge.measure.expected import timed
from dapa_merge.measure.generate import generate
from dapa_merge.measure.live import load_model
from dapa_merge.measure.prompts.sets import load_prompts
from dapa_merge.recipe.options import Where

CPU = torch.device("cpu")
# By name: the dtype to load the model in, None for its own, and whether weights may be packed.
WAYS = {"upcast each pass": (None, False), "packed": (None, True), "float32": ("float32", False)}


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each way, and one for each shape of a layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parse(parser, argv, prompts=2, max_new_tokens=2, rounds=1)
    builtin = load_prompts("builtin")
    prompts = [*builtin.harmful, *builtin.harmless][: arguments.prompts]
    best: dict[str, float] = {}
    said: dict[str, list[str]] = {}
    memory: dict[str, float] = {}
    for _ in range(arguments.rounds):
        for name, (dtype, packs) in WAYS.items():
            model, tokenizer = load_model(open_checkpoint(arguments.model), Where("cpu", dtype=dtype))
            with ExitStack() as stack:
                if not packs:
                    stack.enter_context(patch.object(determinism, "can_pack", lambda _: False))
                start = time.perf_counter()
                said[name] = list(
                    generate(
                        model, tokenizer, prompts, max_new_tokens=arguments.max_new_tokens,
                        batch_size=BatchSize(len(prompts)),
                    )
                )  # fmt: skip
                best[name] = min(time.perf_counter() - start, best.get(name, float("inf")))
            memory[name] = psutil.Process().memory_info().rss / 1e9
            drop_copies(model)
            shapes = {tuple(layer.weight.shape) for layer in model.modules() if type(layer) is torch.nn.Linear}
            if dtype is None:
                own = model.dtype
            del model
    first = next(iter(WAYS))
    dtype_name = str(own).removeprefix("torch.")
    print(f"{arguments.model}, {dtype_name}, {len(prompts)} prompts, {torch.get_num_threads()} threads")
    print(f"this processor has arithmetic of {dtype_name}: {'no' if determinism.is_slow(own) else 'yes'}")
    for name, seconds in best.items():
        same = sum(one == other for one, other in zip(said[name], said[first], strict=True))
        print(
            f"{name:<18}{seconds:7.1f} s, {best[first] / seconds:.2f} times as fast, {memory[name]:.1f} GB, "
            f"{same} of {len(prompts)} answers those of the first"
        )
    for shape in sorted(shapes):
        print(f"{shape[1]} x {shape[0]}: {', '.join(_products(shape, own, rows) for rows in (1, 12, 100, 400))}")
        print(f"  packed, a row has the same bits in any number of rows: {'yes' if _is_alike(shape, own) else 'NO'}")


def _products(shape: tuple[int, ...], own: torch.dtype, rows: int) -> str:
    """Milliseconds of a product of so many rows in each way."""
    layer = torch.nn.Linear(shape[1], shape[0], bias=False)
    states, found = torch.randn(rows, shape[1]), []
    for dtype, packs in WAYS.values():
        kind = own if dtype is None else torch.float32
        layer, states = layer.to(kind), states.to(kind)
        with torch.inference_mode(), batch_invariant(layer, packs=packs):
            found.append(1000 * timed(lambda: layer(states), CPU))  # noqa: B023  Called before they change.
    return f"{rows} rows " + " / ".join(f"{one:.2f}" for one in found) + " ms"


def _is_alike(shape: tuple[int, ...], own: torch.dtype) -> bool:
    """Whether a row has the same bits among 1 to 200 rows."""
    layer = torch.nn.Linear(shape[1], shape[0], bias=False).to(own)
    states = torch.randn(200, shape[1]).to(own)
    with torch.inference_mode(), batch_invariant(layer, packs=True):
        expected = layer(states)
        numbers = (1, 2, 3, 5, 16, 33, 100)
        return all(torch.equal(torch.cat([layer(part) for part in states.split(one)]), expected) for one in numbers)


if __name__ == "__main__":
    main()
