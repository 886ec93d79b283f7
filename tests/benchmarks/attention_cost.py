"""Seconds of answering prompts in 16 bits: attention in float64, ours and the model's own, beside torch's fused.

`python tests/benchmarks/attention_cost.py [MODEL]`: the packaged miniature, or a folder. Also says how many answers are
others in batches of another size, which is to be none with the first two. Seconds are the process's own, on one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from tiny import parse

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.measure import determinism, generate
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.live import load_model
from dapa_merge.measure.prompts.sets import load_prompts

WAYS = {
    "float64, keys shared": (),
    "float64, the model's own": (patch.object(determinism, "_is_plain", lambda _: False),),
    "fused": (
        patch.object(determinism, "is_deterministic", lambda *_: False),
        patch.object(generate, "is_deterministic", lambda *_: False),
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=miniature.path("target"), help="folder of a model")
    parser.add_argument("--num-prompts", type=int, default=30, help="of each kind")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    arguments = parse(parser, argv, num_prompts=2, max_new_tokens=4)
    torch.set_num_threads(1)
    model, tokenizer = load_model(open_checkpoint(str(arguments.model)), torch.device("cpu"))
    builtin = load_prompts("builtin")
    prompts = [*builtin.harmful[: arguments.num_prompts], *builtin.harmless[: arguments.num_prompts]]

    def ask(batch_size: int) -> tuple[list[str], float]:
        start = time.process_time()
        answers = generate.generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=arguments.max_new_tokens,
            batch_size=BatchSize(batch_size),
        )
        return answers, time.process_time() - start

    # The first run of a process takes longer, and tests each layer.
    determinism.is_deterministic(model, determinism.MAX_TOKENS)
    ask(len(prompts))
    for name, patches in WAYS.items():
        for one in patches:
            one.start()
        try:
            (whole, seconds), (parted, _) = ask(len(prompts)), ask(max(1, len(prompts) // 5))
        finally:
            for one in patches:
                one.stop()
        others = sum(first != second for first, second in zip(whole, parted, strict=True))
        print(f"{name}: {seconds:.1f} s, {others} of {len(prompts)} answers others in batches of a fifth", flush=True)


if __name__ == "__main__":
    main()
