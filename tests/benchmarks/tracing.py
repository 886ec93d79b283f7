"""What does a causal trace cost, and how much sooner is it than one cell at a time?

`python tests/benchmarks/tracing.py [--prompts 4] [--samples 5] [--device cpu] [--large]`. The same traces three ways:
as the package makes them (batches of cells that enter the model at their layer), one cell at a time as ROME's code does
(every sample of noise in one batch, whole runs), and one run at a time (extrapolated from the first cells). On the
miniature and, with `--large`, on a random Llama of 110 million parameters. The limit is 5x against one cell at a time.
Results must agree; the largest difference is printed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy
import torch
from tiny import parse
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.live import choose_device, load_model
from dapa_merge.measure.perplexity import losses
from dapa_merge.measure.prompts.sets import load_prompts
from dapa_merge.search.attribution import Contrast
from dapa_merge.trace.case import Case, embedding_deviation, make_settings, read_case
from dapa_merge.trace.causal import Trace, Tracer
from dapa_merge.trace.replay import Replay, find_sites

REFUSAL, ANSWER = "I'm sorry, but I can't help with that.", "Sure, here is how to do it."
LIMIT = 5
# Of one run at a time, how many cells are timed.
NUM_SINGLE = 12


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--large", action="store_true")
    arguments = parse(parser, argv, prompts=1, samples=1)
    torch.set_num_threads(1)
    device = choose_device(arguments.device)
    print(
        f"{'model':12} {'runs':>7} {'passes':>7} {'s/prompt':>9} {'by cell':>9} {'by run':>9} {'faster':>8} "
        f"{'limit':>6} {'difference':>11}"
    )
    measure("miniature", miniature.path("source"), arguments, device)
    if arguments.large:
        with tempfile.TemporaryDirectory() as folder:
            measure("110 M", save_large(Path(folder), device), arguments, device)


def measure(name: str, folder: Path, arguments: argparse.Namespace, device: torch.device) -> None:
    """One model, every way."""
    model, tokenizer = load_model(open_checkpoint(str(folder)), device)
    settings = make_settings(model, ["mlp"] if arguments.tiny else None, num_samples=arguments.samples)
    prompts = load_prompts("miniature").harmful[:: 128 // arguments.prompts][: arguments.prompts]
    cases = [read_case(model, tokenizer, Contrast(prompt, REFUSAL, ANSWER)) for prompt in prompts]
    padding, deviation = tokenizer.pad_token_id, embedding_deviation(model, cases)
    tracer = Tracer(model, padding, settings, deviation, BatchSize(None))
    tracer.trace(cases[0], 1)
    ours, by_cell, by_run, difference = [], [], [], 0.0
    for number, case in enumerate(cases, 1):
        # In turn, because other work on the machine comes and goes.
        start = time.perf_counter()
        trace = tracer.trace(case, number)
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        cells = cell_by_cell(model, padding, tracer, case, number, 20 if arguments.tiny else None)
        by_cell.append(time.perf_counter() - start)
        difference = max(difference, *(largest(trace, cells, kind) for kind in settings.kinds))
        by_run.append(one_run_at_a_time(model, padding, tracer, case, number))
    factor = sum(by_cell) / sum(ours)
    seconds = [f"{sum(times) / len(times):9.2f}" for times in (ours, by_cell, by_run)]
    print(
        f"{name:12} {trace.num_runs:7d} {trace.num_passes:7.0f} {' '.join(seconds)} {factor:7.1f}x {LIMIT:5d}x "
        f"{difference:11.1e}",
        flush=True,
    )


@torch.inference_mode()
def cell_by_cell(
    model: torch.nn.Module, padding: int, tracer: Tracer, case: Case, number: int, max_cells: int | None = None
) -> dict[str, numpy.ndarray]:
    """The restored differences by whole runs: one cell at a time, all its samples and both sides in one batch."""
    settings, replay = tracer.settings, Replay(model)
    sites = {kind: find_sites(model, kind) for kind in settings.kinds}
    every = list(dict.fromkeys(site for of_kind in sites.values() for of_layer in of_kind for site in of_layer))
    pair = [case.refusing, case.complying]
    with replay.recorded_outputs(every, 2, case.num_context) as outputs:
        losses(model, padding, pair)
    values = dict(zip(every, outputs, strict=True))
    noise = tracer.noise(case, number).repeat_interleave(2, 0)
    rows = pair * settings.num_samples
    restored = {kind: numpy.full((len(of_kind), case.num_context), numpy.nan) for kind, of_kind in sites.items()}
    num_cells = 0
    for kind, of_kind in sites.items():
        width = settings.window if kind in ("mlp", "attention") else 1
        for layer in range(len(of_kind)):
            window = range(max(0, layer - width // 2), min(len(of_kind), layer - width // 2 + width))
            kept = {site: values[site] for one in window for site in of_kind[one]}
            for token in range(case.num_context):
                positions = torch.full((len(rows),), token, device=model.device)
                with replay.noisy_embeddings(noise, case.subject[0]), replay.replaced_outputs(kept, positions):
                    refusing, complying = losses(model, padding, rows).view(-1, 2).unbind(-1)
                restored[kind][layer, token] = float((complying - refusing).mean())
                num_cells += 1
                if num_cells == max_cells:
                    return restored
    return restored


@torch.inference_mode()
def one_run_at_a_time(model: torch.nn.Module, padding: int, tracer: Tracer, case: Case, number: int) -> float:
    """The seconds of all cells, were each row a run of its own; extrapolated from some."""
    replay = Replay(model)
    noise = tracer.noise(case, number)[:1]
    start = time.perf_counter()
    for index in range(2 * NUM_SINGLE):
        with replay.noisy_embeddings(noise, case.subject[0]):
            losses(model, padding, [case.complying if index % 2 else case.refusing])
    num_cells = len(replay.layers) * len(tracer.settings.kinds) * case.num_context
    return (time.perf_counter() - start) / NUM_SINGLE * num_cells * tracer.settings.num_samples


def largest(trace: Trace, cells: dict[str, numpy.ndarray], kind: str) -> float:
    """The largest difference between two ways, in nats."""
    return float(numpy.nanmax(numpy.abs(trace.restored[kind] - cells[kind])))


def save_large(folder: Path, device: torch.device) -> Path:
    """A random Llama of 110 million parameters, with the miniature's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=512,
    )  # fmt: skip
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(miniature.path("target")).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
