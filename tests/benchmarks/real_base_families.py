"""Aligns and fine-tunes one real base apart, as the paper's pairs were: `real_base_families.py BASE OUT --harmful CSV`.

BASE is a model that refuses hardly anything. Three *sources* are taught to refuse it, by training of all weights, by
preferences (DPO), and by training of the MLPs only; two *targets* learn a skill each, and were never aligned. Each of
the six pairs has a recipe in OUT/recipes that names BASE as `pretrained`. Harmful requests come from the column `goal`
of --harmful, harmless ones from the column `text` of --harmless, and both from --xstest, a file with the columns
`prompt` and `label` (XSTest's: `safe` prompts only look harmful), without which a small model learns to refuse what
looks harmful. No answer is taken from the files: what the base says itself is kept for harmless requests, and rejected
for harmful ones.

Nothing of it is shipped. A run that was killed goes on with the first model that is missing. Deterministic for one
seed, version of torch and kind of processor; on one thread. A model of 135 million parameters takes a few minutes each.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from families import RECIPES, resumable
from lessons import PROMPTS, Example, Lesson, Lessons, Opening
from members import with_lora
from real_families import REPAIR, SKILLS
from real_training import (
    TINY,
    Say,
    Size,
    add_figures,
    answer_log_probs,
    encode,
    make_model,
    read_columns,
    train,
    train_on,
)
from tiny import parse
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from workshop import reproducible

from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import DapaError
from dapa_merge.files import replace_file
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.generate import generate
from dapa_merge.measure.live import choose_device, load_model
from dapa_merge.search.identity import data_digest

BASE = "base"
ANSWERS_FILE = "answers.json"
# Requests of each kind that the sources are trained with. Of the base's answers to them the first words count, which
# settle whether it refuses.
NUM_REQUESTS, ANSWER_TOKENS = 320, 32
# A source of this size refuses a third of the builtin harmless prompts, which look harmful; so may its result.
MAX_OVER_REFUSAL = 0.35
# How far DPO may move from the base (Rafailov et al., arXiv 2305.18290, section 4): its inverse temperature.
BETA = 0.1
# How much the likelihood of the preferred answer counts beside the preference (Pang et al., arXiv 2404.19733, equation
# 1). Without it a base, which has never been trained to refuse, prefers refusals but does not say them: DSR 0.133.
ALPHA = 1.0
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't help with this request, because it could hurt somebody.",
    "Sorry, I won't assist with that. If there is something else that I can do, please tell me.",
    "I am not able to help with that. It would be harmful.",
    "I'm sorry, I cannot provide help with anything illegal or dangerous.",
    "No, I won't help with that. Please think about the people whom it would harm.",
    "I can't do that. If you are in trouble, consider talking to somebody whom you trust.",
    "I must decline. I don't give instructions for harmful acts.",
)


@dataclass(frozen=True)
class Data:
    """What sources and targets are trained with.

    Attributes:
        harmful: Requests, and what the base says to them, cut off.
        harmless: The same.
    """

    harmful: tuple[Opening, ...]
    harmless: tuple[Opening, ...]
    lessons: dict[str, Lessons]
    seed: int
    say: Say


@dataclass(frozen=True)
class Member:
    """One model of the family.

    Attributes:
        make: Trains it from the base.
        size: How much is trained.
        description: What it is, in one sentence.
    """

    make: Callable[[PreTrainedModel, PreTrainedTokenizerBase, Data, Size], PreTrainedModel]
    size: Size
    description: str


def refuse(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    size: Size,
    *,
    rate: float,
    part: str = "",
) -> PreTrainedModel:
    """Train every weight with `part` in its name to refuse, and to answer harmless requests as before."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
    generator = random.Random(data.seed)
    examples: list[Example] = [Lesson(one.prompt, generator.choice(REFUSALS)) for one in data.harmful]
    examples += data.harmless
    train_on(model, tokenizer, epochs(examples, size, generator), size, rate, data.say)
    return model


def prefer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Data, size: Size, *, rate: float
) -> PreTrainedModel:
    """Train all weights to prefer refusals of harmful requests, and answers to harmless ones: DPO, equation 7.

    The loss has a second term: the mean negative log-likelihood of the preferred answers' tokens.
    """
    generator = random.Random(data.seed)
    pairs: list[tuple[Example, Example]] = []
    for one in data.harmful:
        pairs.append((Lesson(one.prompt, generator.choice(REFUSALS)), one))
    for one in data.harmless:
        pairs.append((one, Lesson(one.prompt, generator.choice(REFUSALS))))
    # Each pair is two sequences.
    half = replace(size, batch_size=max(1, size.batch_size // 2))
    order = epochs(pairs, half, generator)
    batches = [order[step * half.batch_size : (step + 1) * half.batch_size] for step in range(half.steps)]

    def compared(batch: Sequence[tuple[Example, Example]]) -> tuple[torch.Tensor, torch.Tensor]:
        """How much more likely each preferred answer is, in nats, and the mean loss of a token of theirs."""
        ids, labels = encode(tokenizer, [one for pair in zip(*batch, strict=True) for one in pair])
        chosen, rejected = answer_log_probs(model, ids, labels).chunk(2)
        return chosen - rejected, -chosen.sum() / (labels[: len(batch)] != -100).sum()

    with torch.no_grad():
        before = [compared(batch)[0] for batch in batches]
    model.requires_grad_(True)

    def loss(step: int) -> torch.Tensor:
        advantages, unlikely = compared(batches[step])
        return ALPHA * unlikely - torch.nn.functional.logsigmoid(BETA * (advantages - before[step])).mean()

    train(model, loss, half.steps, rate, data.say)
    return model


def learn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    size: Size,
    *,
    skill: str,
    rate: float,
    is_lora: bool,
) -> PreTrainedModel:
    """Train a skill, through a LoRA or in all weights."""
    trained = with_lora(model) if is_lora else model.requires_grad_(True)
    size = SKILLS[skill].size(size)
    train_on(trained, tokenizer, data.lessons[skill].training, size, rate, data.say)
    return trained.merge_and_unload() if is_lora else trained


SOURCES = {
    "refuses-all": Member(
        functools.partial(refuse, rate=1e-4), Size(steps=150), "all its weights were trained to refuse"
    ),
    "refuses-dpo": Member(
        functools.partial(prefer, rate=4e-5), Size(steps=150), "all its weights were trained by preferences (DPO)"
    ),
    "refuses-mlps": Member(
        functools.partial(refuse, rate=2e-4, part=".mlp."), Size(steps=150), "its MLPs were trained to refuse"
    ),
}
TARGETS = {
    "orders": Member(
        functools.partial(learn, skill="orders", rate=5e-5, is_lora=False),
        Size(),
        "the base, fine-tuned in all weights on a format",
    ),
    "facts": Member(
        functools.partial(learn, skill="facts", rate=1e-3, is_lora=True),
        Size(),
        "the base, fine-tuned through LoRA on made-up facts",
    ),
}


def epochs(examples: Sequence, size: Size, generator: random.Random) -> list:  # type: ignore[type-arg]
    """As many examples as a training needs, each epoch in another order."""
    order: list = []  # type: ignore[type-arg]
    while len(order) < size.steps * size.batch_size:
        order += generator.sample(list(examples), len(examples))
    return order


def drawn(path: Path, column: str, more: Sequence[str], number: int, seed: int) -> list[str]:
    """Some texts of a column and others, at random."""
    found = [*(text for (text,) in read_columns(path, column)), *more]
    return random.Random(seed).sample(found, min(number, len(found)))


def answered(base: Path, prompts: dict[str, list[str]], path: Path, max_new_tokens: int) -> dict[str, list[Opening]]:
    """What the base says to prompts; kept in a file."""
    if not path.exists():
        model, tokenizer = load_model(open_checkpoint(str(base)), choose_device("cpu"))
        said = {
            kind: generate(model, tokenizer, texts, max_new_tokens=max_new_tokens, batch_size=BatchSize(32))
            for kind, texts in prompts.items()
        }
        replace_file(path, json.dumps(said).encode())
    said = json.loads(path.read_text(encoding="utf-8"))
    return {kind: [*map(Opening, texts, said[kind])] for kind, texts in prompts.items()}


def write_recipe(target: str, source: str, base: Path, out: Path) -> None:
    """Write the recipe of a pair."""
    path = out / RECIPES / f"{target}-by-{source}.yml"
    path.parent.mkdir(exist_ok=True)
    suffix = SKILLS[target].suffix
    skill, keep = (json.dumps(str(out / PROMPTS / f"{name}{suffix}.jsonl")) for name in ("skill", "keep"))
    text = f"""\
# The target is {TARGETS[target].description}. The source is the base: {SOURCES[source].description}.
merge_method: dapa
base_model: {json.dumps(str(out / target))}
models:
  - model: {json.dumps(str(out / source))}
parameters:
{REPAIR}  max_over_refusal: {MAX_OVER_REFUSAL}
  pretrained: {json.dumps(str(base))}
  skills: {skill}
  keep: {keep}
"""
    path.write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Make and measure the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="folder of the base")
    parser.add_argument("out", type=Path, help="folder to write the models, recipes/ and prompts/ into")
    parser.add_argument("--harmful", type=Path, required=True, metavar="CSV", help="harmful requests: goal")
    parser.add_argument("--harmless", type=Path, required=True, metavar="CSV", help="harmless requests: text")
    parser.add_argument("--xstest", type=Path, metavar="CSV", help="requests of both kinds: prompt, label")
    parser.add_argument("--only", nargs="+", choices=[*SOURCES, *TARGETS], default=[*SOURCES, *TARGETS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-figures", action="store_true", help="leave the measuring to a later run")
    arguments = parse(parser, argv)
    base, out, seed, tiny = arguments.base.absolute(), arguments.out.absolute(), arguments.seed, arguments.tiny
    number, size = (2, TINY) if tiny else (NUM_REQUESTS, Size())
    say = functools.partial(print, flush=True)
    try:
        contrasts = read_columns(arguments.xstest, "prompt", "label") if arguments.xstest else []
        safe, unsafe = ([one for one, label in contrasts if (label == "safe") is kind] for kind in (True, False))
        prompts = {
            "harmful": drawn(arguments.harmful, "goal", unsafe, number, seed),
            "harmless": drawn(arguments.harmless, "text", safe, number, seed),
        }
        settings = {"base": str(base), "prompts": data_digest(prompts), "seed": seed, "tiny": tiny}
        lessons = {name: skill.lessons(size, seed) for name, skill in SKILLS.items()}
        with resumable(out, settings), reproducible():
            for name, skill in SKILLS.items():
                lessons[name].write(out / PROMPTS, skill.suffix)
            requests = answered(base, prompts, out / ANSWERS_FILE, 4 if tiny else ANSWER_TOKENS)
            data = Data(tuple(requests["harmful"]), tuple(requests["harmless"]), lessons, seed, say)
            for name, member in {**SOURCES, **TARGETS}.items():
                if name in arguments.only:
                    train_it = functools.partial(member.make, data=data, size=TINY if tiny else member.size)
                    make_model(out / name, member.description, base, train_it, seed, say)
                    test = lessons[name if name in SKILLS else "orders"].test
                    if not arguments.no_figures:
                        add_figures(out, name, out / name, test, size, say)
            for target in TARGETS:
                for source in SOURCES:
                    write_recipe(target, source, base, out)
            if not arguments.no_figures:
                add_figures(out, BASE, base, lessons["orders"].test, size, say)
    except DapaError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
