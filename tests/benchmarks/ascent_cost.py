"""Times a step along directions, the same forward and backward passes alone, and the same with weight gradients.

    python tests/benchmarks/ascent_cost.py [TARGET SOURCE] [--steps 5]

By default the packaged shadow pair. *Passes alone*: the same rows and losses, padded, differentiated by the embeddings
only, so that the backward pass goes through every layer and no weight gets a gradient. *Weight gradients*: the same
with a gradient for every matrix that has directions, each contracted and freed at once. The limit is 1.5 times the
passes alone. With ONEDNN_MAX_CPU_ISA=AVX2 in the environment it is as on a processor without 16-bit arithmetic.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from tiny import parse

from dapa_merge import miniature
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.determinism import widened
from dapa_merge.measure.divergence import ReferenceRow, divergences, make_reference
from dapa_merge.measure.generate import generate
from dapa_merge.measure.live import LiveModel
from dapa_merge.measure.perplexity import counted_logits
from dapa_merge.measure.prompts.parts import split_prompts
from dapa_merge.measure.prompts.sets import PromptSet
from dapa_merge.plan.selection import make_plan
from dapa_merge.recipe.parse import recipe_from
from dapa_merge.search.ascent import Ascent
from dapa_merge.search.attribution import Contrast, sides_of
from dapa_merge.search.slopes import Settings, Sides
from dapa_merge.search.spectrum import spectra_of

LIMIT = 1.5
REFUSAL = "I'm sorry, but I can't help with that."


def main(argv: Sequence[str] | None = None) -> None:
    """Time all three and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, help="target and source")
    parser.add_argument("--steps", type=int, default=5)
    arguments = parse(parser, argv, steps=1)
    models = arguments.models or [miniature.path("shadow-target"), miniature.path("shadow-source")]
    prompts = "builtin" if arguments.models else "miniature"
    torch.set_num_threads(1)
    content = {"merge_method": "dapa", "base_model": str(models[0]), "models": [{"model": str(models[1])}]}
    recipe = recipe_from({**content, "parameters": {"layers": "auto", "edit": "directions", "prompts": prompts}})
    plan = make_plan(recipe)
    start = time.perf_counter()
    spectra = list(spectra_of(plan, plan.units, torch.device("cpu")))
    seconds = time.perf_counter() - start
    num_values = sum(one.left.numel() + one.right.numel() for one in spectra)
    print(
        f"{len(spectra)} matrices, {sum(one.rank for one in spectra)} directions in {seconds:.1f} s; their factors "
        f"take {4 * num_values / 1e6:.1f} MB beside a model of {plan.target.num_bytes / 1e6:.1f} MB"
    )
    live = LiveModel(plan, torch.device("cpu"))
    choice = split_prompts(recipe).choice
    assert choice is not None
    settings, batch = Settings(), BatchSize(16)
    answers = generate(
        live.model, live.tokenizer, choice.harmful[: settings.num_contrasts], max_new_tokens=24, batch_size=batch
    )
    with widened(live.model):
        contrasts, groups = step_rows(live, choice, REFUSAL, answers, settings, batch)
        ascent = Ascent(live, spectra, contrasts, groups, settings, 16)
        ascent._gradient()
        rivals: dict[str, Callable[[], object]] = {
            "a step along directions": ascent._gradient,
            "passes alone": lambda: _passes(
                ascent, live, contrasts, groups, [live.model.get_input_embeddings().weight]
            ),
            "weight gradients": lambda: _passes(ascent, live, contrasts, groups, _weights(live)),
        }
        times = {name: _seconds(work, arguments.steps) for name, work in rivals.items()}
    for name, took in times.items():
        print(f"{name:24} {took * 1e3:9.1f} ms   {took / times['passes alone']:5.2f} x")
    ratio = times["a step along directions"] / times["passes alone"]
    print(f"limit {LIMIT} x: {'kept' if ratio <= LIMIT else f'missed by {ratio - LIMIT:.2f}'}")


def step_rows(
    live: LiveModel, choice: PromptSet, refusal: str, answers: Sequence[str], settings: Settings, batch: BatchSize
) -> tuple[list[Sides], list[list[ReferenceRow]]]:
    """Rows of one step: harmful prompts with a refusal and an answer, and two groups of the target's own answers."""
    answers = answers[: settings.num_contrasts]
    contrasts = [
        tuple(sides_of(live.tokenizer, Contrast(prompt, refusal, answer), settings.num_tokens))
        for prompt, answer in zip(choice.harmful[: len(answers)], answers, strict=True)
    ]
    groups = [
        make_reference(
            live.model, live.tokenizer, choice.harmless[: settings.num_keep], batch_size=batch, max_new_tokens=number
        ).rows
        for number in (settings.num_keep_tokens, settings.num_tokens)
    ]
    return contrasts, groups


def _seconds(work: Callable[[], object], number: int) -> float:
    found = []
    for _ in range(number):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return median(found)


def _weights(live: LiveModel) -> list[torch.nn.Parameter]:
    return list({id(slot.parameter): slot.parameter for slot in live.slots(live.plan.units)}.values())


def _passes(ascent: Ascent, live: LiveModel, contrasts, groups, parameters: Sequence[torch.nn.Parameter]) -> None:
    """The losses of a step, differentiated by some parameters of the model as it is."""
    hooks = []
    for parameter in parameters:
        parameter.requires_grad_(True)
        hooks.append(parameter.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None)))
    padding = live.tokenizer.pad_token_id
    try:
        refusals = counted_logits(live.model, padding, [refusing.row for refusing, _ in contrasts])
        ascent.slopes.refusal(contrasts, refusals)[0].backward()
        for group in groups:
            divergences(live.model, padding, group).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


if __name__ == "__main__":
    main()
