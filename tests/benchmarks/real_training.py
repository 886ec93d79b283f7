"""Trains a published model a little, measures it and writes it, for the families of real models.

Deterministic for one seed, version of torch and kind of processor; on one thread.
"""

from __future__ import annotations

import csv
import random
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lessons import Example, Lesson
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from workshop import complete

from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import UsageError
from dapa_merge.files import replace_file
from dapa_merge.measure.decode import BatchSize, LookupCache
from dapa_merge.measure.generate import prompt_ids
from dapa_merge.measure.live import choose_device, load_model
from dapa_merge.measure.meter import Meter
from dapa_merge.measure.prompts.sets import Question, load_prompts
from dapa_merge.measure.skills import Skill
from dapa_merge.progress import quiet

FIGURES_FILE = "figures.txt"
# Of the answers; what a fine-tuned model goes on saying after an opening is cut off there.
MAX_NEW_TOKENS = 60

Say = Callable[[str], None]


@dataclass(frozen=True)
class Size:
    """How much is trained and measured.

    Attributes:
        steps: Number of updates.
        batch_size: Examples per update.
        num_prompts: Of each kind, to measure with; also harmful and harmless ones to find a direction with.
        num_questions: Of the skill, to measure with.
    """

    steps: int = 60
    batch_size: int = 8
    num_prompts: int = 60
    num_questions: int = 60


TINY = Size(steps=2, batch_size=2, num_prompts=2, num_questions=2)


def train_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    size: Size,
    rate: float,
    say: Say,
) -> None:
    """Train in place on examples, in their order; the loss is on answers only."""

    def loss(step: int) -> torch.Tensor:
        batch = examples[step * size.batch_size : (step + 1) * size.batch_size]
        return answer_loss(model, *encode(tokenizer, batch))

    train(model, loss, size.steps, rate, say)


def train(model: PreTrainedModel, loss: Callable[[int], torch.Tensor], steps: int, rate: float, say: Say) -> None:
    """Train in place what requires a gradient, by the loss of each step: AdamW with linear warm-up and decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A weight in bfloat16 swallows every update below a 256th of it. One in float32 is its own master.
    masters = [parameter.detach().float() for parameter in trained]
    optimizer = torch.optim.AdamW(masters, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
    )
    model.train()
    start, losses = time.monotonic(), []
    for step in range(steps):
        found = loss(step)
        found.backward()
        for master, parameter in zip(masters, trained, strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for master, parameter in zip(masters, trained, strict=True):
                parameter.copy_(master)
        losses.append(found.item())
        if (step + 1) % 5 == 0 or step + 1 == steps:
            seconds = (time.monotonic() - start) / (step + 1)
            say(f"  step {step + 1} of {steps}: loss {sum(losses[-5:]) / len(losses[-5:]):.3f}, {seconds:.1f} s/step")
    model.eval().requires_grad_(False)


def encode(tokenizer: PreTrainedTokenizerBase, batch: Iterable[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `[examples, longest]`, right-padded, and at each place the token that is to come next; -100 is none."""
    rows = []
    for example in batch:
        prompt = prompt_ids(tokenizer, example.prompt)
        answer = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
        # An opening has no end: what comes after it, nobody taught.
        end = [tokenizer.eos_token_id] if isinstance(example, Lesson) else []
        rows.append((prompt, [*answer, *end]))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), -100)
    for index, (prompt, answer) in enumerate(rows):
        ids[index, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        labels[index, len(prompt) - 1 : len(prompt) - 1 + len(answer)] = torch.tensor(answer)
    return ids, labels


def answer_log_probs(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probability of each row's labelled tokens together, in nats: float32 `[rows]`; no mask is needed."""
    each = -torch.nn.functional.cross_entropy(*_predictions(model, ids, labels), reduction="none")
    return torch.zeros(len(ids)).index_add(0, (labels != -100).nonzero()[:, 0], each)


def answer_loss(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the labelled tokens; no mask is needed, as padding comes last."""
    return torch.nn.functional.cross_entropy(*_predictions(model, ids, labels))


def _predictions(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the labelled tokens, float32 `[labelled, vocabulary]`, and their labels."""
    # A LoRA's wrapper has no such parts of its own.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    counted = labels != -100
    # The output layer is large, and most places are no answer's.
    states = inner.get_decoder()(input_ids=ids).last_hidden_state[counted]
    return inner.get_output_embeddings()(states).float(), labels[counted]


def read_columns(path: Path, *columns: str) -> list[tuple[str, ...]]:
    """Some columns of a CSV file, row by row; raises `UsageError` if it lacks one or has no rows."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [tuple(row[column] for column in columns) for row in csv.DictReader(file)]
    except (OSError, KeyError) as error:
        named = f"column{'s' if len(columns) > 1 else ''} {' and '.join(columns)}"
        raise UsageError(f"{path} is not a CSV file with the {named}: {error}") from error
    if not rows:
        raise UsageError(f"{path} has no rows")
    return rows


def mixed(lessons: Sequence[Lesson], others: Sequence[Example], percent: float, size: Size, seed: int) -> list[Example]:
    """The examples of a whole training, in their order; a given share are others than the lessons."""
    total = size.steps * size.batch_size
    num_others = round(total * percent / 100)
    generator = random.Random(seed)
    drawn = [generator.choice(others) for _ in range(num_others)]
    found = [*lessons[: total - num_others], *drawn]
    generator.shuffle(found)
    return found


def make_model(
    folder: Path,
    description: str,
    parent: Path,
    train: Callable[[PreTrainedModel, PreTrainedTokenizerBase], PreTrainedModel],
    seed: int,
    say: Say,
) -> None:
    """Make a model from its parent if it is missing, and write it; `train` may change the loaded parent."""
    if folder.exists():
        return
    start = time.monotonic()
    say(f"{folder.name}: {description}")
    with torch.random.fork_rng(devices=[]), quiet("transformers"):
        torch.manual_seed(seed)
        model, tokenizer = load_model(open_checkpoint(str(parent)), choose_device("cpu"))
        write_model(train(model, tokenizer), tokenizer, parent, folder)
    say(f"{folder.name}: {time.monotonic() - start:.0f} s")


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, parent: Path, folder: Path) -> None:
    """Write a complete checkpoint; tokenizer and templates are the parent's, unless the tokenizer has more tokens."""
    # It was loaded with settings for greedy answers.
    model.generation_config = GenerationConfig.from_pretrained(parent)
    with complete(folder) as beside:
        model.save_pretrained(beside)
        if len(tokenizer) > len(load_tokenizer(parent)):
            tokenizer.save_pretrained(beside)
        # As they are: transformers writes what it reads with small changes.
        for path in parent.iterdir():
            if path.is_file() and ".safetensors" not in path.name and not (beside / path.name).exists():
                shutil.copyfile(path, beside / path.name)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder."""
    return AutoTokenizer.from_pretrained(folder)


def measure(folder: Path, test: Sequence[Lesson], size: Size) -> str:
    """A model's figures by a part of the builtin prompts and of the test of its skill, as one line."""
    builtin = load_prompts("builtin")
    prompts = replace(
        builtin,
        harmful=thinned(builtin.harmful, size.num_prompts),
        harmless=thinned(builtin.harmless, size.num_prompts),
    )
    questions = [Question(one.prompt, one.answer) for one in test[: size.num_questions]]
    start = time.monotonic()
    with quiet("transformers"):
        model, tokenizer = load_model(open_checkpoint(str(folder)), choose_device("cpu"))
        meter = Meter(
            prompts,
            MAX_NEW_TOKENS,
            BatchSize(32),
            stops_early=True,
            lookup=LookupCache(),
            skills=(Skill("trained", tuple(questions[::2])), Skill("paraphrased", tuple(questions[1::2]))),
        )
        measurement = meter.measure(model, tokenizer)
        skills = " ".join(f"{skill.name} {skill.score:.3f}" for skill in measurement.skills)
        dsr, over_refusal = measurement.dsr, measurement.over_refusal
    return f"DSR {dsr:.3f} over-refusal {over_refusal:.3f} skill, {skills} ({time.monotonic() - start:.0f} s)"


def thinned(prompts: Sequence[str], number: int) -> tuple[str, ...]:
    """So many of the prompts, from all categories."""
    return tuple(prompts[index * len(prompts) // number] for index in range(number))


def add_figures(out: Path, name: str, folder: Path, test: Sequence[Lesson], size: Size, say: Say) -> None:
    """Measure a model whose figures are missing, and write them below the others'."""
    path = out / FIGURES_FILE
    known = path.read_text(encoding="utf-8") if path.exists() else ""
    if any(line.split(":")[0] == name for line in known.splitlines()):
        return
    line = f"{name}: {measure(folder, test, size)}"
    say(line)
    # Another process may have measured another model in the meantime.
    known = path.read_text(encoding="utf-8") if path.exists() else ""
    replace_file(path, f"{known}{line}\n".encode())
