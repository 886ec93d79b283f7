"""What a repair costs: parts measured on real pairs, and by arithmetic from them on 7 and 70 billion parameters.

    python tests/benchmarks/cost.py RECIPE... [--device cuda] [--json FILE | --record]

RECIPE names a pair, as those that `real_families.py` writes. For each pair the parts of a repair are timed: reading the
target, generating for a verdict, a step along directions, the decomposition of a difference, a step of training (a
LoRA), and writing the result. Every part is then divided by what it has to do (bytes, floating-point operations), and
multiplied by what another shape has to do. The first pair's parts predict the second's, which shows how far to trust
the arithmetic. The last table has whole repairs on the measured device, one process on one thread if that is a CPU.
Beside them stand the rates that are *assumed* of a GPU. --record puts what was measured into recorded/cost.json, from
which `recorded_tables.py` makes the tables of docs/cost.md.

Without a recipe, the packaged pair is measured: its shape is too small to predict anything.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from ascent_cost import step_rows
from grid import grid
from lessons import Opening
from members import with_lora
from real_training import answer_loss, encode
from tiny import parse

from dapa_merge import miniature
from dapa_merge.checkpoint.units import Unit
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.determinism import widened
from dapa_merge.measure.generate import generate, prompt_ids
from dapa_merge.measure.live import LiveModel, load_model
from dapa_merge.measure.prompts.parts import split_prompts
from dapa_merge.measure.prompts.sets import PromptSet
from dapa_merge.plan.plan import Plan
from dapa_merge.plan.selection import make_plan
from dapa_merge.recipe.parse import load_recipe, recipe_from
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.ascent import Ascent
from dapa_merge.search.slopes import Settings
from dapa_merge.search.spectrum import MAX_RANK, OVERSAMPLING, spectra_of
from dapa_merge.transplant.result import transplant

RECORDED = Path(__file__).with_name("recorded") / "cost.json"
REFUSAL = "I'm sorry, but I can't help with that. If there is something else, please ask."
NUM_PROMPTS, NUM_TOKENS, BATCH_SIZE = 16, 40, 16
# A training's batch, and the tokens of its rows.
TRAINED_ROWS = 8
# Layers whose differences are decomposed, and whose units are written.
NUM_LAYERS = 2
MEASURED_STEPS = 2


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that say what it has to do.

    Attributes:
        body: Parameters of the layers' matrices.
        head: Parameters of the output layer.
        others: All others that are stored; of a tied output layer they are none.
        bytes_each: Bytes of a stored parameter.
        sides: Rows and columns of a layer's matrices together, and the layers: what factors of them hold.
    """

    name: str
    body: int
    head: int
    others: int
    sides: int
    bytes_each: int = 2

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        return self.bytes_each * (self.body + self.head + self.others)

    def passes(self, tokens: float, predicted: float, *, backward: bool = False) -> float:
        """Operations of a forward pass over so many tokens, of which some are predicted; and back to the inputs."""
        forward = 2 * (tokens * self.body + predicted * self.head)
        return forward * (2 if backward else 1)

    @property
    def factors(self) -> int:
        """Values of the directions of all matrices."""
        return MAX_RANK * self.sides


def shape_of(
    name: str, layers: int, hidden: int, intermediate: int, key_values: int, vocabulary: int, *, tied: bool = False
) -> Shape:
    """A Llama's shape: `key_values` is the width of its keys."""
    matrices = [(hidden, hidden)] * 2 + [(key_values, hidden)] * 2 + [(intermediate, hidden)] * 3
    head = vocabulary * hidden
    return Shape(
        name,
        layers * sum(rows * columns for rows, columns in matrices),
        head,
        0 if tied else head,
        layers * sum(rows + columns for rows, columns in matrices),
    )


# Llama 2 (Touvron et al., arXiv 2307.09288) as published in their config.json files.
SHAPES = (
    shape_of("7 B", 32, 4096, 11008, 4096, 32000),
    shape_of("70 B", 80, 8192, 28672, 1024, 32000),
)


@dataclass(frozen=True)
class Part:
    """A part of a repair, as it was measured.

    Attributes:
        seconds: It took.
        work: What it had to do, in bytes or operations.
    """

    seconds: float
    work: float


# What each part is counted in.
PARTS = {
    "reading": "bytes",
    "generating": "operations",
    "a step along directions": "operations",
    "decomposing": "operations",
    "a step of training": "operations",
    "writing": "bytes",
}


# Operations or bytes a second: assumed of one GPU with 1,000 T operations a second in 16 bits and 3 TB/s of memory, and
# of a file system that all nodes share. Generating reads all weights for each token of a batch; singular values are
# computed in float32.
ASSUMED = {
    "reading": 1e9,
    "generating": 10e12,
    "a step along directions": 100e12,
    "decomposing": 5e12,
    "a step of training": 100e12,
    "writing": 1e9,
}


@dataclass(frozen=True)
class Measured:
    """The parts of one pair.

    Attributes:
        tokens: Of each part that runs a model: all tokens that it runs over, and those that it predicts.
    """

    shape: Shape
    parts: Mapping[str, Part]
    tokens: Mapping[str, tuple[float, float]]
    peak_bytes: int

    def seconds(self, name: str, shape: Shape) -> float:
        """What a part would take on another shape, at the same rate."""
        part = self.parts[name]
        return part.seconds / part.work * work_of(name, shape, self.tokens.get(name, (0, 0)))


def work_of(name: str, shape: Shape, tokens: tuple[float, float]) -> float:
    """What a part has to do on a shape."""
    if name in ("reading", "writing"):
        return shape.num_bytes
    if name == "decomposing":
        # Two products with the difference for each iteration, and as many iterations for every shape.
        return 4 * (MAX_RANK + OVERSAMPLING) * shape.body
    return shape.passes(*tokens, backward=name != "generating")


@dataclass(frozen=True)
class Job:
    """How often a whole repair needs each part.

    Attributes:
        verdicts: Prompts that are answered.
        models: Models that are read whole.
    """

    name: str
    verdicts: int
    models: int
    ascent_steps: int = 0
    decomposes: bool = False
    training_steps: int = 0

    def seconds(self, measured: Measured, shape: Shape) -> float:
        """What it takes on a shape."""
        generating = measured.seconds("generating", shape) / NUM_PROMPTS
        return (
            self.models * measured.seconds("reading", shape)
            + self.verdicts * generating
            + self.ascent_steps * measured.seconds("a step along directions", shape)
            + self.decomposes * measured.seconds("decomposing", shape)
            + self.training_steps * measured.seconds("a step of training", shape)
            + measured.seconds("writing", shape)
        )


# A report has 60 harmful and 60 harmless prompts and 120 questions, of target, source and result. A test of a search
# has 30 and 30, most of which are settled early, counted as half. Directions: four rounds of 20 steps, five points.
# Training: two rates, 30 steps each, and a test of both; the source's refusals and the target's answers to 149 prompts.
REPORT = 3 * 240
JOBS = (
    Job("copied gates (12 tests)", REPORT + 12 * 30, 2),
    Job("directions (80 steps, 5 points)", REPORT + 149 + 5 * 30, 2, ascent_steps=80, decomposes=True),
    Job("training (2 rates of 30 steps)", REPORT + 149 + 2 * 60, 2, training_steps=60),
)


def timed(work: Callable[[], object], device: torch.device, number: int = 1) -> float:
    """Seconds of a piece of work, repeated so often."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(number):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / number


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clear(device: torch.device) -> None:
    """Give back what was freed."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def pair_shape(plan: Plan) -> Shape:
    """The shape of a pair's target, which is named by its size."""
    matrices = [found["target"].extents for found in plan.regions(plan.units) if len(found["target"].extents) == 2]
    body = sum(rows * columns for rows, columns in matrices)
    config = plan.target.config
    head = config["vocab_size"] * config["hidden_size"]
    # A tied output layer is stored with the embeddings, and by some models once more.
    twice = head if config.get("tie_word_embeddings") and "lm_head.weight" in plan.target.shapes else 0
    return Shape(
        f"{(plan.target.num_parameters - twice) / 1e9:.3g} B",
        body,
        head,
        plan.target.num_parameters - body - head,
        sum(map(sum, matrices)),
        plan.target.num_bytes // plan.target.num_parameters,
    )


Tokens = tuple[float, float]


def peak_resident() -> int:
    """The most bytes of memory that this process ever had; POSIX only."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(recipe: Recipe, device: torch.device, is_tiny: bool) -> Measured:
    """Time all parts of a pair."""
    plan = make_plan(recipe)
    shape = pair_shape(plan)
    choice = split_prompts(recipe).choice
    assert choice is not None
    found: dict[str, Part] = {}
    tokens: dict[str, Tokens] = {}

    def record(name: str, seconds: float, used: Tokens = (0, 0)) -> None:
        tokens[name] = used
        found[name] = Part(seconds, work_of(name, shape, used))

    # The first reading fills the system's cache.
    load_model(plan.target, device)
    start = time.perf_counter()
    live = LiveModel(plan, device)
    synchronize(device)
    record("reading", time.perf_counter() - start)
    seconds, answers, used = generating(
        live, choice.harmful[: 2 if is_tiny else NUM_PROMPTS], 4 if is_tiny else NUM_TOKENS
    )
    record("generating", seconds, used)
    units = plan.units[:2] if is_tiny else plan.units
    record("a step along directions", *stepping(live, units, choice, answers, 1 if is_tiny else MEASURED_STEPS))
    live.close()
    del live
    clear(device)
    record("a step of training", *training(plan, choice, device, 2 if is_tiny else TRAINED_ROWS))
    clear(device)
    layers = sorted({unit.layer for unit in plan.units})[:NUM_LAYERS]
    some = tuple(unit for unit in plan.units if unit.layer in layers)
    seconds = timed(lambda: list(spectra_of(plan, some, device)), device)
    matrices = [one["target"] for one in plan.regions(some) if len(one["target"].extents) == 2]
    record("decomposing", seconds * shape.body / sum(one.num_parameters for one in matrices))
    with tempfile.TemporaryDirectory() as folder:
        # An edit that copies writes as many bytes, and has nothing to choose before.
        record("writing", timed(lambda: transplant(plan.reference, some, Path(folder) / "out"), device))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Measured(shape, found, tokens, peak or peak_resident())


def generating(live: LiveModel, prompts: Sequence[str], num_tokens: int) -> tuple[float, list[str], Tokens]:
    """Answer prompts."""
    answers: list[str] = []

    def answer() -> None:
        answers[:] = generate(
            live.model, live.tokenizer, prompts, max_new_tokens=num_tokens, batch_size=BatchSize(BATCH_SIZE)
        )

    seconds = timed(answer, live.model.device)
    said = sum(len(live.tokenizer(text)["input_ids"]) for text in answers)
    return seconds, answers, (said + sum(len(prompt_ids(live.tokenizer, prompt)) for prompt in prompts), said)


def stepping(
    live: LiveModel, units: Sequence[Unit], choice: PromptSet, answers: Sequence[str], number: int
) -> tuple[float, Tokens]:
    """Make steps along directions, of as many prompts as a search's steps."""
    settings = Settings()
    with widened(live.model):
        contrasts, groups = step_rows(live, choice, REFUSAL, answers, settings, BatchSize(BATCH_SIZE))
        spectra = list(spectra_of(live.plan, units, live.model.device))
        ascent = Ascent(live, spectra, contrasts, groups, settings, BATCH_SIZE)
        ascent._gradient()
        seconds = timed(ascent._gradient, live.model.device, number)
    texts = [sides[0].row for sides in contrasts] + [row.text for group in groups for row in group]
    return seconds, (sum(len(one.ids) for one in texts), sum(len(one.ids) - one.num_context for one in texts))


def training(plan: Plan, choice: PromptSet, device: torch.device, number: int) -> tuple[float, Tokens]:
    """Make steps of a training on refusals."""
    model, tokenizer = load_model(plan.target, device)
    adapted = with_lora(model)
    rows = [Opening(prompt, REFUSAL) for prompt in (*choice.harmful, *choice.harmless)[:number]]
    ids, labels = (one.to(device) for one in encode(tokenizer, rows))

    def step() -> None:
        answer_loss(adapted, ids, labels).backward()

    step()
    return timed(step, device, MEASURED_STEPS), (ids.numel(), int((labels != -100).sum()))


def told(seconds: float) -> str:
    """A time, in the unit that suits it."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 600:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 36_000 else f"{seconds / 3600:.0f} h"


def parts_table(measured: Sequence[Measured]) -> str:
    """The table of the parts: the time that each took, and the time that the first pair's rates predict."""
    names = [one.shape.name for one in measured]
    heads = ["part", *names, *(f"rate, {name}" for name in names), *(f"{name} from {names[0]}" for name in names[1:])]
    lines = []
    for name, unit in PARTS.items():
        parts = [one.parts[name] for one in measured]
        took = [told(one.seconds(name, one.shape)) for one in measured]
        rates = [f"{part.work / part.seconds / 1e9:.3g} G {unit}/s" for part in parts]
        # With its own number of tokens, which depends on the tokenizer.
        guessed = []
        for one in measured[1:]:
            ratio = parts[0].seconds / parts[0].work / (one.parts[name].seconds / one.parts[name].work)
            guessed.append(f"{told(ratio * one.seconds(name, one.shape))} ({ratio:.2f} x)")
        lines.append([name, *took, *rates, *guessed])
    return grid(heads, lines)


def repairs_table(measured: Sequence[Measured]) -> str:
    """The table of whole repairs: measured shapes at their own rates, others at the last's and at assumed ones."""
    last = measured[-1]
    on_gpu = replace(last, parts={name: Part(1, rate) for name, rate in ASSUMED.items()})
    shapes = [*(one.shape for one in measured), *SHAPES]
    heads = ["", *(shape.name for shape in shapes), *(f"{shape.name}, a GPU as assumed" for shape in SHAPES)]
    lines = []
    for job in JOBS:
        took = [told(job.seconds(one, one.shape)) for one in measured]
        took += [told(job.seconds(rates, shape)) for rates in (last, on_gpu) for shape in SHAPES]
        lines.append([job.name, *took])
    rows = {
        "weights read and written": lambda shape: f"{2 * shape.num_bytes / 1e9:.3g} and {shape.num_bytes / 1e9:.3g} GB",
        "memory of one model": lambda shape: f"{shape.num_bytes / 1e9:.3g} GB",
        "factors of all directions, float32": lambda shape: f"{4 * shape.factors / 1e9:.2g} GB",
        "training: Adam's moments of a LoRA of rank 16": lambda shape: f"{12 * shape.factors / 1e9:.2g} GB",
    }
    lines += [[name, *map(tell, shapes)] for name, tell in rows.items()]
    peaks = (f"{one.peak_bytes / 1e9:.3g} GB" for one in measured)
    lines.append(["peak of one process that measured all this", *peaks])
    return grid(heads, ([*found, *[""] * (len(heads) - len(found))] for found in lines))


def tables(measured: Sequence[Measured]) -> str:
    """All that is printed."""
    return f"{parts_table(measured)}\nWhole repairs:\n\n{repairs_table(measured)}"


def written(measured: Sequence[Measured]) -> str:
    """The measurements as JSON, which `read` reads."""
    return json.dumps([asdict(one) for one in measured], indent=1) + "\n"


def read(path: Path) -> list[Measured]:
    """Read the measurements from a file that `written` made."""
    return [
        Measured(
            Shape(**one["shape"]),
            {name: Part(**part) for name, part in one["parts"].items()},
            {name: (used[0], used[1]) for name, used in one["tokens"].items()},
            one["peak_bytes"],
        )
        for one in json.loads(path.read_text(encoding="utf-8"))
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the pairs and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path, help="a pair each, the smallest first")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was measured to it")
    parser.add_argument(
        "--record", action="store_true", help=f"also write it to {RECORDED.parent.name}/{RECORDED.name}"
    )
    arguments = parse(parser, argv)
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    if arguments.recipes:
        recipes = [load_recipe(path) for path in arguments.recipes]
    else:
        models = [str(miniature.path(name)) for name in ("shadow-target", "shadow-source")]
        content = {"merge_method": "dapa", "base_model": models[0], "models": [{"model": models[1]}]}
        recipes = [recipe_from({**content, "parameters": {"layers": "auto", "prompts": "miniature"}})]
    directed = [replace(recipe, edit="directions", modules=("auto",), layers=None) for recipe in recipes]
    measured = [measure(recipe, device, arguments.tiny) for recipe in directed]
    print(tables(measured))
    if arguments.json:
        arguments.json.write_text(written(measured), encoding="utf-8")
    if arguments.record:
        RECORDED.write_text(written(measured), encoding="utf-8")


if __name__ == "__main__":
    main()
