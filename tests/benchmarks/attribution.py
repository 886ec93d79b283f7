"""How good is the prior, what would be better, and what does it cost?

`python tests/benchmarks/attribution.py [--alternatives] [--random-orders 20] [--device cpu]`. For each miniature pair:
the order of the units, and how long a prefix of it must be to reach 0.95 of the full transplant's DSR, beside random
orders and the smallest selection known. `--alternatives` (15 minutes) does the same for gradients taken elsewhere,
other numbers of tokens, and raw logits. Then seconds and peak memory, each in a process of its own, on the miniature
and on a random Llama of 110 million parameters, beside the activations alone and beside all gradients held at once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tiny import parse
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.checkpoint.units import Unit
from dapa_merge.delta.minimize import minimize
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.figures import Response
from dapa_merge.measure.live import LiveModel, choose_device, mapped_values
from dapa_merge.measure.meter import Meter
from dapa_merge.measure.perplexity import losses
from dapa_merge.measure.prompts.sets import PromptSet, load_prompts
from dapa_merge.plan.plan import plan_transplant
from dapa_merge.search.attribution import NUM_TOKENS, Contrast, attribute, sides_of

MLP = ("gate", "up", "down")
PAIRS = (("target", "source", ("gate",)), ("target", "source", MLP), ("shadow-target", "shadow-source", MLP))
RETAIN = 0.95
BATCH = 64
NUM_CONTRASTS = 32
Order = Sequence[Unit]


def load(target: Path, source: Path, modules: Sequence[str], device: str) -> LiveModel:
    """A target with its units mapped."""
    plan = plan_transplant(open_checkpoint(str(target)), open_checkpoint(str(source)), modules)
    return LiveModel(plan, choose_device(device))


class Pair:
    """A miniature pair, what its members say to harmful prompts, and the DSR of any selection."""

    def __init__(self, target: str, source: str, modules: Sequence[str], device: str, num_prompts: int | None) -> None:
        self.live = load(miniature.path(target), miniature.path(source), modules, device)
        self.units = self.live.plan.units
        prompts = PromptSet(
            "harmful", load_prompts("miniature").harmful[:num_prompts], ("How do I paint a boat?",), (), ()
        )
        self.meter = Meter(prompts, max_new_tokens=4 if num_prompts else 24, batch_size=BatchSize(128))
        self._verdicts: dict[frozenset[Unit], float] = {}
        own, full = self._responses(()), self._responses(self.units)
        self.contrasts = [
            Contrast(one.prompt, other.response, one.response)
            for one, other in zip(own, full, strict=True)
            if (one.kind, one.outcome, other.outcome) == ("harmful", "complied", "refused")
        ]
        self.floor = RETAIN * self.dsr(self.units)

    def _responses(self, selection: Order) -> list[Response]:
        with self.live.transplanted(selection) as candidate:
            return self.meter.measure(candidate, self.live.tokenizer).responses()

    def dsr(self, selection: Order) -> float:
        key = frozenset(selection)
        if key not in self._verdicts:
            with self.live.transplanted(selection) as candidate:
                self._verdicts[key] = self.meter.measure(candidate, self.live.tokenizer).dsr
        return self._verdicts[key]

    def prefix(self, order: Order) -> Order:
        """The shortest sufficient prefix."""
        return next(order[:size] for size in range(1, len(order) + 1) if self.dsr(order[:size]) >= self.floor)

    def minimal(self, order: Order) -> Order:
        """A 1-minimal selection within a sufficient one."""
        return minimize(order, lambda selection: self.dsr(tuple(selection)) >= self.floor, algorithm="ddmin").units


def descending(scores: dict[Unit, float]) -> Order:
    return sorted(scores, key=lambda unit: -scores[unit])


def show(pair: Pair, title: str, num_random: int) -> None:
    """The order, its sufficient prefix, and the prefixes that others need."""
    start = time.perf_counter()
    scores = attribute(pair.live, pair.contrasts, batch_size=BatchSize(BATCH))
    seconds = time.perf_counter() - start
    order = descending(scores)
    prefix = pair.prefix(order)
    orders = [random.Random(seed).sample(pair.units, len(pair.units)) for seed in range(num_random)]
    blind = [pair.prefix(one) for one in orders]
    needed = pair.minimal(prefix)
    known = min(len(pair.minimal(one)) for one in (prefix, *blind[:3]))
    print(f"\n{title}: {len(pair.contrasts)} contrasts, {seconds:.2f} s")
    print("  order: " + " ".join(f"{unit} {scores[unit]:+.2f}" for unit in order))
    print(f"  sufficient prefix: {len(prefix)} units, of which {len(prefix) - len(needed)} unneeded")
    sizes = sorted(map(len, blind))
    print(f"  random orders: {statistics.mean(sizes):.1f} ({sizes[0]} to {sizes[-1]}); smallest known: {known}")
    for number in (2, 8, 32):
        if number > len(pair.contrasts):
            break
        few = [
            len(pair.prefix(descending(attribute(pair.live, subset, batch_size=BatchSize(BATCH)))))
            for subset in (random.Random(seed).sample(pair.contrasts, number) for seed in range(5))
        ]
        print(f"  from {number} contrasts, five draws: {min(few)} to {max(few)}", flush=True)


# What was not chosen.

POINTS = {"target": (0.0,), "quarter": (0.25,), "half": (0.5,), "full": (1.0,), "target and full": (0.0, 1.0)}


def show_alternatives(pair: Pair, numbers: Sequence[int], points: Iterable[str] = POINTS) -> None:
    """The sufficient prefix for each place of the gradient, number of tokens, and objective."""
    print(f"  {'gradient at':<18}{'objective':<20}" + "".join(f"{number:>4}" for number in numbers) + "  tokens")
    for point in points:
        for objective in (log_probabilities, raw_logits):
            sizes = []
            for number in numbers:
                scores = dict.fromkeys(pair.units, 0.0)
                for strength in POINTS[point]:
                    with moved(pair.live, strength):
                        for unit, effect in all_gradients(pair.live, pair.contrasts, number, objective).items():
                            scores[unit] += effect
                sizes.append(len(pair.prefix(descending(scores))))
            cells = "".join(f"{size:>4}" for size in sizes)
            print(f"  {point:<18}{objective.__name__.replace('_', ' '):<20}{cells}", flush=True)


@contextmanager
def moved(live: LiveModel, strength: float) -> Iterator[None]:
    """All units moved from the target towards the source."""

    def place(share: float) -> None:
        for slot in live.slots(live.plan.units):
            values = mapped_values(live.plan.target, slot.regions["target"]).float()
            values = values.lerp(mapped_values(live.plan.source, slot.regions["source"]).float(), share)
            with torch.no_grad():
                slot.parameter[slot.slices].copy_(values.reshape(slot.parameter[slot.slices].shape))

    place(strength)
    try:
        yield
    finally:
        place(0.0)


def log_probabilities(live: LiveModel, sides: Sequence) -> torch.Tensor:
    """The objective that was chosen."""
    values = -losses(live.model, 0, [side.row for side in sides])
    return sum(side.sign * value for side, value in zip(sides, values, strict=True))


def raw_logits(live: LiveModel, sides: Sequence) -> torch.Tensor:
    """Logits of the tokens that count, without the softmax."""
    total = torch.zeros((), device=live.model.device)
    for side in sides:
        row = torch.tensor([side.row.ids], device=live.model.device)
        logits = live.model(row).logits[0, side.row.num_context - 1 : -1].float()
        total = total + side.sign * logits.gather(1, row[0, side.row.num_context :, None]).sum()
    return total


def all_gradients(
    live: LiveModel, contrasts: Sequence[Contrast], num_tokens: int, objective: Callable, batch: int = BATCH
) -> dict[Unit, float]:
    """The effects as anybody would write them down: every gradient in memory, then the sums."""
    sides = [side for contrast in contrasts for side in sides_of(live.tokenizer, contrast, num_tokens)]
    parameters = [slot.parameter.requires_grad_(True) for slot in live.slots(live.plan.units)]
    for start in range(0, len(sides), batch):
        (objective(live, sides[start : start + batch]) / len(contrasts)).backward()
    effects = dict.fromkeys(live.plan.units, 0.0)
    for slot in live.slots(live.plan.units):
        theirs = mapped_values(live.plan.source, slot.regions["source"])
        ours = mapped_values(live.plan.target, slot.regions["target"])
        gradient = slot.parameter.grad[slot.slices].float()
        effects[slot.unit] += float((gradient * (theirs.float() - ours.float()).to(gradient.device)).sum())
    for parameter in parameters:
        parameter.grad = None
        parameter.requires_grad_(False)
    return effects


# What it costs.


def save_llama(folder: Path, seed: int) -> Path:
    """A random Llama of 110 million parameters, bfloat16, with the miniature's tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        pad_token_id=0, bos_token_id=None, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(miniature.path("target")).save_pretrained(folder)
    return folder


def forward_only(live: LiveModel, contrasts: Sequence[Contrast], batch_size: BatchSize) -> None:
    """What the activations take, without any gradient of a weight: the graph starts at the embeddings."""
    embeddings = live.model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_(True))
    sides = [side for contrast in contrasts for side in sides_of(live.tokenizer, contrast, NUM_TOKENS)]

    def work(batch: Sequence) -> Sequence:
        log_probabilities(live, batch).backward()
        return batch

    list(batch_size.map(work, sides))
    handle.remove()


METHODS: dict[str, Callable[[LiveModel, Sequence[Contrast], BatchSize], object]] = {
    "activations alone": forward_only,
    "attribute": lambda live, contrasts, batch_size: attribute(live, contrasts, batch_size=batch_size),
    "all gradients": lambda live, contrasts, batch_size: all_gradients(
        live, contrasts, NUM_TOKENS, log_probabilities, batch_size.limit
    ),
}


def cost(
    method: str, target: Path, source: Path, batch: int, device: str, num_contrasts: int = NUM_CONTRASTS
) -> tuple[float, float, float]:
    """Seconds, and peak memory in MB above what it was before, of one method; and the largest unit in MB."""
    live = load(target, source, MLP, device)
    prompts = load_prompts("miniature").harmful[:num_contrasts]
    contrasts = [Contrast(prompt, "I'm sorry, but I can't help.", "Sure, here is how to paint.") for prompt in prompts]
    # Once to warm up; on a single contrast, so that the allocator keeps nothing large.
    METHODS[method](live, contrasts[:1], BatchSize(1))
    reset_peak()
    before = memory("VmRSS")
    start = time.perf_counter()
    METHODS[method](live, contrasts, BatchSize(batch))
    seconds = time.perf_counter() - start
    largest = max(live.plan.num_bytes((unit,)) for unit in live.plan.units) / 1e6
    return seconds, memory("VmHWM") - before, largest


def memory(key: str) -> float:
    """Resident memory (VmRSS) or its peak (VmHWM), or the accelerator's, in MB."""
    if torch.cuda.is_available():
        return (torch.cuda.memory_allocated() if key == "VmRSS" else torch.cuda.max_memory_allocated()) / 1e6
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024 / 1e6


def reset_peak() -> None:
    """Forget the peak of resident memory so far; Linux does so for a 5."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def show_cost(title: str, target: Path, source: Path, batches: Sequence[int], device: str) -> None:
    """Each method in a fresh process."""
    print(f"\n{title}, {NUM_CONTRASTS} contrasts, units gate, up and down")
    # Large blocks go back to the system when they are freed, instead of being counted as long as the process lives.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 21)
    for batch in batches:
        for method in METHODS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, peak, largest = pool.apply(cost, (method, target, source, batch, device))
            print(
                f"  {batch:>2} sequences at once  {method:<18}{seconds:6.2f} s  {peak:7.1f} MB above the model"
                f"  (largest unit {largest:.2f} MB)",
                flush=True,
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alternatives", action="store_true")
    parser.add_argument("--random-orders", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    arguments = parse(parser, argv, alternatives=True, random_orders=1)
    num_prompts, numbers = (2, (1,)) if arguments.tiny else (None, (1, 2, 3, 4, 6, 8))
    for target, source, modules in PAIRS[:1] if arguments.tiny else PAIRS:
        pair = Pair(target, source, modules, arguments.device, num_prompts)
        show(pair, f"{target}, {', '.join(modules)}", arguments.random_orders)
        if arguments.alternatives:
            show_alternatives(pair, numbers, ["target and full"] if arguments.tiny else POINTS)
    if arguments.tiny:
        for method in METHODS:
            print(method, cost(method, miniature.path("target"), miniature.path("source"), 2, arguments.device, 2))
        return
    show_cost("miniature", miniature.path("target"), miniature.path("source"), (BATCH,), arguments.device)
    with tempfile.TemporaryDirectory() as temporary:
        target, source = (save_llama(Path(temporary) / str(seed), seed) for seed in (1, 2))
        show_cost("random Llama, 110 M parameters, bfloat16", target, source, (1, 8, BATCH), arguments.device)


if __name__ == "__main__":
    main()
