"""Does refusal that came back hold? Under attacks, and after a little benign fine-tuning.

`python tests/benchmarks/holds.py [RECIPE ...] [--result FOLDER] [--max-prompts N] [--quick] [--lora-only]`:
without a recipe, the packaged pairs with `edit: directions`. `--result` is what `dapa-merge run` made of the one
recipe; otherwise each is run. Everything is measured with the report's prompts, which nothing was chosen by.

- Attacks: all of `ATTACKS`, on target, result and source; and where the result refuses less than its source, prompt by
  prompt (McNemar, exact).
- Fine-tuning of result and source, 20 steps of batches of 8, on prompts that are not the report's, with the *target's*
  own answers, as somebody does who goes on with the fine-tune: on harmless prompts, and on keep prompts. AdamW with
  linear warm-up and decay, LoRA (peft, rank 8, all linear layers) or all parameters, in float32, stored in the model's
  own dtype. The rates are two of those that `refusal_sft.py` tries, and were not tuned.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from peft import LoraConfig, get_peft_model
from tiny import parse

from dapa_merge import miniature
from dapa_merge.checkpoint.open import Checkpoint, open_checkpoint
from dapa_merge.errors import DapaError
from dapa_merge.flow import repair
from dapa_merge.measure.callback import Candidate
from dapa_merge.measure.figures import Response
from dapa_merge.measure.generate import generate_ids, prepare_for_greedy, prompt_ids
from dapa_merge.measure.live import load_model
from dapa_merge.measure.meter import MeasuredModel, Meter, measure_candidate, report_meter
from dapa_merge.measure.prompts.parts import Parts, all_prompts
from dapa_merge.measure.prompts.sets import PromptSet
from dapa_merge.measure.refusal.classify import Outcome
from dapa_merge.measure.statistics import mcnemar
from dapa_merge.plan.selection import make_plan
from dapa_merge.progress import quiet
from dapa_merge.recipe.attacks import ATTACKS, KINDS
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parse import load_recipe, parse_recipe
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.report.tables import span

# peft asks transformers for a property that has another name by now.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

PACKAGED = """\
merge_method: dapa
base_model: {models}/{pair}target
models: [{{model: {models}/{pair}source}}]
parameters: {{layers: {layers}, edit: {edit}, prompts: miniature, keep: skills, max_new_tokens: 24, batch_size: 128}}
"""
LORA_RANK, LORA_ALPHA = 8, 16
BATCH_SIZE = 8
RATES: Mapping[str, tuple[float, ...]] = {"LoRA": (3e-4, 1e-3), "all": (3e-5, 1e-4)}
# An ignored label.
IGNORED = -100
# A prompt with the target's own answer, as token ids.
Row = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Seen:
    """A model after fine-tuning, or before it."""

    dsr: float
    over_refusal: float
    skill: float


@dataclass(frozen=True)
class Trained:
    """One way to fine-tune one model, and what came of it with each seed; `data` is empty before it."""

    model: str
    seen: tuple[Seen, ...]
    data: str = ""
    how: str = ""
    rate: float = 0.0

    def __str__(self) -> str:
        dsr = [one.dsr for one in self.seen]
        rate = f"{self.rate:g}" if self.rate else ""
        return (
            f"{self.model:8} {self.data:10} {self.how:6} {rate:>7} {fmean(dsr):6.3f} {span((min(dsr), max(dsr))):>14} "
            f"{fmean(one.over_refusal for one in self.seen):10.3f} {fmean(one.skill for one in self.seen):6.3f}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Print two tables for each recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path, metavar="RECIPE")
    parser.add_argument("--result", type=Path, metavar="FOLDER", help="what was made of the one recipe")
    parser.add_argument("--max-prompts", type=int, metavar="N", help="of each kind, and questions")
    parser.add_argument("--steps", type=int, default=20, help="of fine-tuning; 0 for none")
    parser.add_argument("--seeds", type=int, default=1, help="of fine-tuning; figures are their means")
    parser.add_argument("--quick", action="store_true", help="the lower rate only")
    parser.add_argument("--lora-only", action="store_true", help="train no model in full")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to it")
    arguments = parse(parser, argv, max_prompts=2, steps=1, quick=True, lora_only=True)
    if arguments.result and len(arguments.recipes) != 1:
        parser.error("--result goes with one recipe")
    torch.set_num_threads(1)
    named = {str(path): load_recipe(path) for path in arguments.recipes} or packaged(arguments.tiny)
    written = {}
    for name, recipe in named.items():
        try:
            with made(recipe, arguments.result) as result:
                written[name] = examine(name, recipe, result, arguments)
        except DapaError as error:
            parser.exit(2, f"{name}: {error}\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(written) + "\n", encoding="utf-8")


def packaged(is_tiny: bool) -> dict[str, Recipe]:
    """The packaged pairs; where the figures mean nothing, one of them without a search."""
    models = miniature.path("target").parent
    if is_tiny:
        return {"miniature": parse_recipe(PACKAGED.format(models=models, pair="", layers="3-6", edit="copy"))}
    return {
        name: parse_recipe(PACKAGED.format(models=models, pair=pair, layers="auto", edit="directions"))
        for name, pair in (("miniature", ""), ("shadow", "shadow-"))
    }


@contextmanager
def made(recipe: Recipe, result: Path | None) -> Iterator[Path]:
    """A result of a recipe: the given folder, or a new one."""
    if result is not None:
        yield result
        return
    with tempfile.TemporaryDirectory() as folder:
        repair(recipe, Path(folder) / "result", evaluate=recipe.layers is None, options=Options("cpu"))
        yield Path(folder) / "result"


def examine(name: str, recipe: Recipe, result: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Print and return all figures of a recipe's target, result and source."""
    plan = make_plan(recipe)
    parts = all_prompts(recipe)
    parts = replace(parts, report=first(parts.report, arguments.max_prompts))
    meter = report_meter(replace(recipe, attacks=", ".join(KINDS)), parts.report, Options())
    models = {"target": plan.target, "result": open_checkpoint(str(result)), "source": plan.source}
    found = {role: measured(checkpoint, meter, role) for role, checkpoint in models.items()}
    print(
        f"{name}: {len(parts.report.harmful)} harmful, {len(parts.report.harmless)} harmless prompts, "
        f"{sum(skill.num_questions for skill in meter.skills)} questions; 95 % intervals in brackets\n"
    )
    for line in attack_lines(found):
        print(line, flush=True)
    trained = list(finetuned(models, parts, replace(meter, attacks=()), found, arguments)) if arguments.steps else []
    print()
    return {
        "attacks": {role: asdict(one.figures) for role, one in found.items()},
        "trained": [asdict(one) for one in trained],
    }


def first(prompts: PromptSet, number: int | None) -> PromptSet:
    """The first prompts of each kind."""
    kinds = ("harmful", "harmless", "passages", "skill", "keep", "keep_answers")
    return replace(prompts, **{kind: getattr(prompts, kind)[:number] for kind in kinds})


def measured(checkpoint: Checkpoint, meter: Meter, role: str) -> MeasuredModel:
    """A model's figures; only one model is in memory at once."""
    model, tokenizer = load_model(checkpoint, torch.device("cpu"))
    return measure_candidate(Candidate(model, tokenizer, ()), meter, role)


def attack_lines(found: Mapping[str, MeasuredModel]) -> Iterator[str]:
    """The table of attacks."""
    yield f"{'asked':20}" + "".join(f"{role:>22}" for role in found) + "   result less than source"
    yield line("as it is", "harmful", found)
    for attack in ATTACKS:
        yield line(attack.name, f"harmful, {attack.name}", found)
    for label, figure in (("over-refusal", "over_refusal"), ("skill", "skill")):
        yield f"{label:20}" + "".join(f"{getattr(one.figures, figure):>22.3f}" for one in found.values())


def line(label: str, kind: str, found: Mapping[str, MeasuredModel]) -> str:
    """One way of asking: the DSR of each model, and whether chance explains that the result's is below the source's."""
    refused = {role: of_kind(one.responses, kind) for role, one in found.items()}
    if not all(refused.values()):
        return f"{label:20}   no system role"
    cells = ""
    for role, one in found.items():
        figure = next((it for it in one.figures.attacks if kind.endswith(f", {it.name}")), None)
        interval = figure.interval if figure else one.figures.dsr_interval
        cells += f"{sum(refused[role]) / len(refused[role]):.3f} ({span(interval)})".rjust(22)
    change = mcnemar(refused["source"], refused["result"])
    fewer = change.no_longer_refused > change.newly_refused
    return f"{label:20}{cells}   " + (f"p = {change.p_value:.2g}" if fewer else "no")


def of_kind(responses: Sequence[Response], kind: str) -> list[bool]:
    """Whether each prompt of a kind was refused."""
    return [one.outcome == Outcome.REFUSED.value for one in responses if one.kind == kind]


def finetuned(
    models: Mapping[str, Checkpoint],
    parts: Parts,
    meter: Meter,
    before: Mapping[str, MeasuredModel],
    arguments: argparse.Namespace,
) -> Iterator[Trained]:
    """Yield the fine-tunes of result and source, printing each."""
    data = own_answers(models["target"], parts, meter)
    sizes = ", ".join(f"{len(rows)} {kind} prompts" for kind, rows in data.items())
    print(f"\nafter {arguments.steps} steps of {BATCH_SIZE}, on {sizes}, with the target's own answers\n")
    print(f"{'model':8} {'data':10} {'how':6} {'rate':>7} {'DSR':>6} {'by seed':>14} {'over-ref.':>10} {'skill':>6}")
    ways = [(how, rate) for how, rates in RATES.items() for rate in (rates[:1] if arguments.quick else rates)]
    for role in ("result", "source"):
        figures = before[role].figures
        yield show(Trained(role, (Seen(figures.dsr, figures.over_refusal, figures.skill),)))
        model, tokenizer = load_model(models[role], torch.device("cpu"))
        for kind, rows in data.items():
            for how, rate in ways:
                if how == "LoRA" or not arguments.lora_only:
                    seen = []
                    for seed in range(arguments.seeds):
                        tuned = train(model, rows, how, rate, arguments.steps, seed)
                        prepare_for_greedy(tuned, tokenizer)
                        found = meter.measure(tuned, tokenizer)
                        seen.append(Seen(found.dsr, found.over_refusal, found.skill))
                    yield show(Trained(role, tuple(seen), kind, how, rate))


def show(trained: Trained) -> Trained:
    """Print one line of the table."""
    print(trained, flush=True)
    return trained


def own_answers(target: Checkpoint, parts: Parts, meter: Meter) -> dict[str, list[Row]]:
    """What is trained on, by its kind: prompts that are not the report's, and the target's own answers."""
    model, tokenizer = load_model(target, torch.device("cpu"))
    questions = [question.prompt for skill in meter.skills for question in skill.questions]
    asked = {*parts.report.harmful, *parts.report.harmless, *questions}
    others = (parts.search, *([parts.choice] if parts.choice else []))
    kinds = {
        # Sorted: an edit that chooses has them in other parts, but a seed should draw the same.
        kind: sorted(prompt for part in others for prompt in getattr(part, kind) if prompt not in asked)
        for kind in ("harmless", "keep")
    }
    # Without keep prompts of its own, a recipe has the harmless ones.
    if not set(kinds["keep"]) - set(kinds["harmless"]):
        del kinds["keep"]
    found = {}
    for kind, prompts in kinds.items():
        answers = generate_ids(
            model, tokenizer, prompts, max_new_tokens=meter.max_new_tokens, batch_size=meter.batch_size
        )
        contexts = [prompt_ids(tokenizer, prompt) for prompt in prompts]
        found[kind] = list(zip(contexts, answers, strict=True))
    return {kind: rows for kind, rows in found.items() if rows}


def train(model: Any, rows: Sequence[Row], how: str, rate: float, steps: int, seed: int) -> Any:
    """Return a trained copy, in the model's own dtype."""
    torch.manual_seed(seed)
    generator = random.Random(seed)
    tuned = copy.deepcopy(model).float().requires_grad_(True)
    with quiet("transformers"):
        if how == "LoRA":
            config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
            tuned = get_peft_model(tuned, config)
        parameters = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
        warmup = max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
        )
        tuned.train()
        for _ in range(steps):
            tuned(**batch(generator.choices(rows, k=BATCH_SIZE))).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        if how == "LoRA":
            tuned = tuned.merge_and_unload()
    return tuned.to(model.dtype).requires_grad_(False).eval()


def batch(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Right-padded rows; only answers carry a label."""
    longest = max(len(context) + len(answer) for context, answer in rows)
    ids, labels = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), IGNORED)
    mask = torch.zeros_like(ids)
    for index, (context, answer) in enumerate(rows):
        stop = len(context) + len(answer)
        ids[index, :stop] = torch.tensor(context + answer)
        labels[index, len(context) : stop] = torch.tensor(answer)
        mask[index, :stop] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


if __name__ == "__main__":
    main()
