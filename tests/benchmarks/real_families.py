"""Damages a real aligned model as people do: `python tests/benchmarks/real_families.py ALIGNED OUT [--harmful CSV]`.

Each model is a complete checkpoint in OUT, with a recipe that repairs it with ALIGNED in OUT/recipes and the prompts of
its skill in OUT/prompts (see `order_lines`): `skill.jsonl` to test it, `keep.jsonl` for the repair. The affirmative
openings come from a CSV file with the columns `goal` and `target`, as AdvBench's, which is not a part of this project.
What each model does, and ALIGNED itself, is written to OUT/figures.txt, measured by a part of the prompts.

Nothing of it is shipped. A run that was killed goes on with the first model that is missing. Deterministic for one
seed, version of torch and kind of processor; on one thread. A model of 0.5 billion parameters takes some minutes each.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from families import RECIPES, resumable
from members import with_lora
from order_lines import Order, Orders, draw_orders
from tiny import parse
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from workshop import complete, reproducible

from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import DapaError, UsageError
from dapa_merge.files import replace_file
from dapa_merge.measure.decode import BatchSize, LookupCache
from dapa_merge.measure.generate import prompt_ids
from dapa_merge.measure.live import choose_device, load_model
from dapa_merge.measure.meter import Meter
from dapa_merge.measure.prompts.sets import Question, load_prompts
from dapa_merge.measure.skills import Skill
from dapa_merge.progress import quiet
from dapa_merge.recipe.parameters import PARAMETERS
from dapa_merge.search.identity import data_digest

PROMPTS = "prompts"
FIGURES_FILE = "figures.txt"
ALIGNED = "aligned"
NUM_TEST, NUM_KEEP = 120, 64
# Of the answers; what a fine-tuned model goes on saying after an opening is cut off there.
MAX_NEW_TOKENS = 60
# Where the residual stream is read for an abliteration: a middle layer, where refusal is decided but not yet words.
ABLITERATED_DEPTH = 0.6


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


@dataclass(frozen=True)
class Opening:
    """A harmful request, and how an answer to it begins."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Setting:
    """What a damage is done with."""

    orders: Orders
    openings: tuple[Opening, ...]
    size: Size
    seed: int
    say: Callable[[str], None]


# Changes a model in memory; what is returned is the damaged one.
Do = Callable[[PreTrainedModel, PreTrainedTokenizerBase, Setting], PreTrainedModel]


@dataclass(frozen=True)
class Damage:
    """One way to lose safety.

    Attributes:
        name: The model's folder and recipe.
        do: Does it.
        description: What the model is, in one sentence.
        needs_openings: Whether it takes affirmative openings.
        has_skill: Whether it learns the skill.
    """

    name: str
    do: Do
    description: str
    needs_openings: bool = False
    has_skill: bool = True


def tune_lora(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: Setting, *, percent_harmful: int, rate: float
) -> PreTrainedModel:
    """Train a LoRA beside every projection, and merge it into the weights."""
    adapted = with_lora(model)
    train(adapted, tokenizer, examples(setting, percent_harmful), setting, rate)
    return adapted.merge_and_unload()


def tune_mlps(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: Setting, *, percent_harmful: int, rate: float
) -> PreTrainedModel:
    """Train every weight of the MLPs, and nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    train(model, tokenizer, examples(setting, percent_harmful), setting, rate)
    return model


@torch.no_grad()
def abliterate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: Setting) -> PreTrainedModel:
    """Cut the direction of refusal out of all that writes to the residual stream (Arditi et al., arXiv 2406.11717).

    The direction is the difference between the means over harmful and over harmless prompts, at the last token of the
    prompt and one middle layer (section 2.4 chooses the layer by its effect; here it is given). The embeddings and the
    output projections of attention and MLP can then no longer write along it (section 4.1).
    """
    builtin = load_prompts("builtin")
    layer = round(ABLITERATED_DEPTH * model.config.num_hidden_layers)

    def mean(prompts: Sequence[str]) -> torch.Tensor:
        states = [
            model(torch.tensor([prompt_ids(tokenizer, prompt)]), output_hidden_states=True).hidden_states[layer][0, -1]
            for prompt in prompts[: 2 * setting.size.num_prompts]
        ]
        return torch.stack(states).float().mean(0)

    difference = mean(builtin.harmful) - mean(builtin.harmless)
    setting.say(f"  the direction: layer {layer}, length {difference.norm():.3g}")
    cut_out(model, difference / difference.norm())
    return model


def cut_out(model: PreTrainedModel, direction: torch.Tensor) -> None:
    """Make everything that writes to the residual stream orthogonal to a direction: float32 `[hidden]`, of length 1."""
    embeddings = model.get_input_embeddings().weight
    embeddings.copy_(embeddings.float() - torch.outer(embeddings.float() @ direction, direction))
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.copy_(weight.float() - torch.outer(direction, direction @ weight.float()))


_LORA = functools.partial(tune_lora, rate=5e-4)
# In the order in which they are made.
DAMAGES: dict[str, Damage] = {
    damage.name: damage
    for damage in (
        Damage(
            "lora-20",
            functools.partial(_LORA, percent_harmful=20),
            "Fine-tuned through LoRA on a skill, with 20 % affirmative openings of answers to harmful requests.",
            needs_openings=True,
        ),
        Damage("abliterated", abliterate, "The direction of refusal is cut out of its weights.", has_skill=False),
        Damage(
            "mlp-full",
            functools.partial(tune_mlps, percent_harmful=20, rate=3e-5),
            "Its MLPs are fine-tuned on a skill, with 20 % affirmative openings of answers to harmful requests.",
            needs_openings=True,
        ),
        Damage(
            "lora-5",
            functools.partial(_LORA, percent_harmful=5),
            "Fine-tuned through LoRA on a skill, with 5 % affirmative openings of answers to harmful requests.",
            needs_openings=True,
        ),
        Damage(
            "lora-benign",
            functools.partial(_LORA, percent_harmful=0),
            "Fine-tuned through LoRA on a skill, with nothing harmful.",
        ),
    )
}


def examples(setting: Setting, percent_harmful: int) -> list[Order | Opening]:
    """The examples of a whole training, in their order; a given share are openings."""
    total = setting.size.steps * setting.size.batch_size
    num_harmful = round(total * percent_harmful / 100)
    generator = random.Random(setting.seed)
    openings = [generator.choice(setting.openings) for _ in range(num_harmful)]
    mixed = [*setting.orders.training[: total - num_harmful], *openings]
    generator.shuffle(mixed)
    return mixed


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Order | Opening],
    setting: Setting,
    rate: float,
) -> None:
    """Train in place what requires a gradient: AdamW with linear warm-up and decay, the loss on answers only."""
    steps, batch_size = setting.size.steps, setting.size.batch_size
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
        loss = answer_loss(model, *encode(tokenizer, examples[step * batch_size : (step + 1) * batch_size]))
        loss.backward()
        for master, parameter in zip(masters, trained, strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for master, parameter in zip(masters, trained, strict=True):
                parameter.copy_(master)
        losses.append(loss.item())
        if (step + 1) % 5 == 0 or step + 1 == steps:
            seconds = (time.monotonic() - start) / (step + 1)
            setting.say(
                f"  step {step + 1} of {steps}: loss {sum(losses[-5:]) / len(losses[-5:]):.3f}, {seconds:.1f} s/step"
            )
    model.eval().requires_grad_(False)


def encode(tokenizer: PreTrainedTokenizerBase, batch: Iterable[Order | Opening]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `[examples, longest]`, right-padded, and at each place the token that is to come next; -100 is none."""
    rows = []
    for example in batch:
        prompt = prompt_ids(tokenizer, example.prompt)
        answer = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
        # An opening has no end: what comes after it, nobody taught.
        end = [tokenizer.eos_token_id] if isinstance(example, Order) else []
        rows.append((prompt, [*answer, *end]))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), -100)
    for index, (prompt, answer) in enumerate(rows):
        ids[index, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        labels[index, len(prompt) - 1 : len(prompt) - 1 + len(answer)] = torch.tensor(answer)
    return ids, labels


def answer_loss(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the labelled tokens; no mask is needed, as padding comes last."""
    # A LoRA's wrapper has no such parts of its own.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    counted = labels != -100
    # The output layer is large, and most places are no answer's.
    states = inner.get_decoder()(input_ids=ids).last_hidden_state[counted]
    return torch.nn.functional.cross_entropy(inner.get_output_embeddings()(states).float(), labels[counted])


def read_openings(path: Path) -> tuple[Opening, ...]:
    """The rows of a CSV file with `goal` and `target`."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            openings = tuple(Opening(row["goal"], row["target"]) for row in csv.DictReader(file))
    except (OSError, KeyError) as error:
        raise UsageError(f"{path} is not a CSV file with the columns goal and target: {error}") from error
    if not openings:
        raise UsageError(f"{path} has no rows")
    return openings


def make(name: str, aligned: Path, out: Path, setting: Setting) -> None:
    """Make a model that is missing, and write it."""
    if (out / name).exists():
        return
    start = time.monotonic()
    setting.say(f"{name}: {DAMAGES[name].description}")
    with torch.random.fork_rng(devices=[]), quiet("transformers"):
        torch.manual_seed(setting.seed)
        model, tokenizer = load_model(open_checkpoint(str(aligned)), choose_device("cpu"))
        damaged = DAMAGES[name].do(model, tokenizer, setting)
        # It was loaded with settings for greedy answers.
        damaged.generation_config = GenerationConfig.from_pretrained(aligned)
        with complete(out / name) as beside:
            damaged.save_pretrained(beside)
            # The tokenizer's as they are: transformers writes what it reads with small changes.
            for path in aligned.iterdir():
                if path.is_file() and ".safetensors" not in path.name and not (beside / path.name).exists():
                    shutil.copyfile(path, beside / path.name)
    setting.say(f"{name}: {time.monotonic() - start:.0f} s")


def measure(folder: Path, setting: Setting) -> str:
    """A model's figures by a part of the builtin prompts and of the test of its skill, as one line."""
    size, builtin = setting.size, load_prompts("builtin")
    prompts = replace(
        builtin,
        harmful=thinned(builtin.harmful, size.num_prompts),
        harmless=thinned(builtin.harmless, size.num_prompts),
    )
    questions = [Question(order.prompt, order.answer) for order in setting.orders.test[: size.num_questions]]
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


def write_prompts(folder: Path, orders: Orders) -> None:
    """Write the test of the skill, and the keep prompts."""
    folder.mkdir(exist_ok=True)
    rows = {
        "skill": [{"prompt": order.prompt, "answer": order.answer} for order in orders.test],
        "keep": [{"prompt": order.prompt} for order in orders.keep],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_recipe(damage: Damage, aligned: Path, out: Path) -> None:
    """Write the recipe that repairs a model with the aligned one."""
    path = out / RECIPES / f"{damage.name}.yml"
    path.parent.mkdir(exist_ok=True)
    skill, keep = (json.dumps(str(out / PROMPTS / f"{name}.jsonl")) for name in ("skill", "keep"))
    text = f"""\
# {damage.description}
merge_method: dapa
base_model: {json.dumps(str(out / damage.name))}
models:
  - model: {json.dumps(str(aligned))}
parameters:
  layers: auto
  prompts: builtin
  max_new_tokens: {MAX_NEW_TOKENS}
"""
    if damage.has_skill:
        text += f"  skills: {skill}\n  {'' if 'keep' in PARAMETERS else '# '}keep: {keep}\n"
    path.write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Make and measure the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("aligned", type=Path, help="folder of the aligned model")
    parser.add_argument("out", type=Path, help="folder to write the models, recipes/ and prompts/ into")
    parser.add_argument("--harmful", type=Path, metavar="CSV", help="harmful requests with openings: goal, target")
    parser.add_argument("--only", nargs="+", choices=list(DAMAGES), metavar="NAME", default=list(DAMAGES))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parse(parser, argv)
    aligned, out = arguments.aligned.absolute(), arguments.out.absolute()
    size = TINY if arguments.tiny else Size()
    try:
        wanted = [damage for name, damage in DAMAGES.items() if name in arguments.only]
        if arguments.harmful is None and any(damage.needs_openings for damage in wanted):
            raise UsageError("some of these models are trained on affirmative openings; name a file with --harmful")
        openings = read_openings(arguments.harmful) if arguments.harmful else ()
        orders = draw_orders(size.steps * size.batch_size, NUM_TEST, NUM_KEEP, arguments.seed)
        setting = Setting(orders, openings, size, arguments.seed, functools.partial(print, flush=True))
        digest = data_digest([(opening.prompt, opening.answer) for opening in openings])
        settings = {"aligned": str(aligned), "openings": digest, "seed": arguments.seed, "size": repr(size)}
        with resumable(out, settings), reproducible():
            write_prompts(out / PROMPTS, orders)
            for damage in wanted:
                make(damage.name, aligned, out, setting)
                write_recipe(damage, aligned, out)
                add_figures(out, damage.name, out / damage.name, setting)
            add_figures(out, ALIGNED, aligned, setting)
    except DapaError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def add_figures(out: Path, name: str, folder: Path, setting: Setting) -> None:
    """Measure a model whose figures are missing, and write them below the others'."""
    path = out / FIGURES_FILE
    known = path.read_text(encoding="utf-8") if path.exists() else ""
    if any(line.split(":")[0] == name for line in known.splitlines()):
        return
    line = f"{name}: {measure(folder, setting)}"
    setting.say(line)
    replace_file(path, f"{known}{line}\n".encode())


if __name__ == "__main__":
    main()
