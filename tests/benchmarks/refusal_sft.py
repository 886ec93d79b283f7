"""What does training on refusals cost and bring, beside DAPA? On the packaged pairs.

`python tests/benchmarks/refusal_sft.py [RECIPE ...] [--quick] [--seeds 3] [--json FILE]`: a table for each recipe, and
sentences that are computed from it. All figures are measured with the half of the prompts that neither method saw; the
target's skill is in that half only. Training: AdamW on the tokens of the answers, LoRA (peft) on all linear layers or
all parameters, in float32, stored and measured in the target's dtype. The data decide:

- search's prompts: what DAPA's search is given: harmful prompts, with the family's refusal, and as many harmless ones,
  with the target's own answers
- harmful only: the same without the harmless ones
- training set: the corpus' own training examples, 14 times as many of each kind
- set and skill: the same and the examples that taught the target its skill, which DAPA never sees

Each learning rate is chosen by the search half alone: of those within 0.05 of the best DSR less over-refusal, the one
with the lowest perplexity. DAPA has what training has not: the aligned model.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from refusal_sft_arms import BATCH_SIZE, FULL_RATES, LORA_RATES, Arm, Seen, Setting, Stand, best
from tiny import parse

from dapa_merge.errors import DapaError
from dapa_merge.measure.statistics import interval
from dapa_merge.measure.statistics import mcnemar as compare
from dapa_merge.recipe.parse import load_recipe

RECIPES = ("recipes/miniature.yml", "recipes/shadow.yml")
STEPS = (5, 10, 20, 40, 80, 160)
# Ranks for each kind of data; None is every parameter. The first rank is the one that has all seeds.
RANKS: dict[str, tuple[int | None, ...]] = {
    "search's prompts": (8, 2, 32, None),
    "harmful only": (8,),
    "training set": (8, None),
    "set and skill": (8, None),
}
# What prompts, of a kind, a difference is told by; and whether more is better.
TOLD_BY = {
    "DSR": ("dsr", "refused", True),
    "over-refusal": ("over_refusal", "over_refused", False),
    "skill": ("skill", "right", True),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table and its sentences for each recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES, metavar="RECIPE")
    parser.add_argument(
        "--quick", action="store_true", help="one kind of data, one rank, three numbers of steps, one seed"
    )
    parser.add_argument("--seeds", type=int, default=3, help="of the first rank of each kind of data; others have one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to it")
    arguments = parse(parser, argv, quick=True)
    torch.set_num_threads(1)
    written = {}
    for name in arguments.recipes:
        try:
            wanted = [Setting("search's prompts", 8, 1)] if arguments.tiny else settings(arguments.quick)
            recipe = load_recipe(Path(name))
            if arguments.tiny:
                recipe = replace(recipe, max_new_tokens=4)
            stand = Stand(recipe, max_prompts=2 if arguments.tiny else None)
            arms = run(name, stand, wanted, 1 if arguments.quick else arguments.seeds)
        except DapaError as error:
            parser.exit(2, f"{name}: {error}\n")
        print("\n" + "\n".join(sentences(arms)), end="\n\n", flush=True)
        written[name] = [asdict(arm) for arm in arms]
    if arguments.json:
        arguments.json.write_text(json.dumps(written) + "\n", encoding="utf-8")


def settings(is_quick: bool) -> list[Setting]:
    """What is trained, in order."""
    every = [Setting(data, rank, steps) for data, ranks in RANKS.items() for rank in ranks for steps in STEPS]
    return every[: len(STEPS) // 2] if is_quick else every


def run(name: str, stand: Stand, wanted: Iterable[Setting], num_seeds: int) -> list[Arm]:
    """Measure all lines of a recipe's table, and print each when it is there."""
    print(
        f"{name}: {len(stand.confirming.harmful)} harmful, {len(stand.confirming.harmless)} harmless prompts, "
        f"{len(stand.confirming.skill)} questions of skill; chosen by {len(stand.searching.harmful)} and "
        f"{len(stand.searching.harmless)} others\nlearning rates {', '.join(map(str, LORA_RATES))} (LoRA), "
        f"{', '.join(map(str, FULL_RATES))} (all); seconds of the process, one thread; the target's own answers for "
        f"the data took {stand.seconds_answers:.1f} s\n\n"
        f"{'method':34} {'data':16} {'rank':>4} {'steps':>8} {'rate':>6} {'trained':>8} {'changed':>8} {'DSR':>6} "
        f"{'95 % interval':>13} {'over-ref.':>9} {'perpl.':>7} {'skill':>6} {'by seed':>13} {'s':>6} {'s, rates':>8}"
    )
    arms = [Arm("target", (stand.see(stand.target),))]
    show(arms[0])
    arms.append(stand.dapa())
    show(arms[1])
    for setting in wanted:
        seeds = range(num_seeds if setting.rank == RANKS[setting.data][0] else 1)
        arms.append(stand.trained(setting, seeds))
        show(arms[-1])
    return arms


def show(arm: Arm) -> None:
    """One line of the table; the interval is that of the seeds' mean."""
    setting, num_prompts = arm.setting, len(arm.seen[0].refused)
    low, high = interval(round(arm.mean("dsr") * num_prompts), num_prompts)
    data, rank, rate = "", "", ""
    if setting:
        data, rank, rate = setting.data, str(setting.rank or "all"), f"{arm.rate:g}"
    skills = [seen.skill for seen in arm.seen]
    spread = f"{min(skills):.3f}-{max(skills):.3f}" if len(skills) > 1 else ""
    print(
        f"{arm.name:34} {data:16} {rank:>4} {arm.work:>8} {rate:>6} {arm.trained:8.2%} {arm.mean('changed'):8.2%} "
        f"{arm.mean('dsr'):6.3f} {f'{low:.3f}-{high:.3f}':>13} {arm.mean('over_refusal'):9.3f} "
        f"{arm.mean('perplexity'):7.3f} {arm.mean('skill'):6.3f} {spread:>13} {arm.seconds:6.1f} "
        f"{arm.seconds_chosen:8.1f}",
        flush=True,
    )


def sentences(arms: Sequence[Arm]) -> Iterable[str]:
    """What the table says, from its figures."""
    target, dapa, *trained = arms
    yield f"{told(dapa)}; the target: skill {target.mean('skill'):.3f}."
    for data in dict.fromkeys(arm.setting.data for arm in trained):
        of_data = [arm for arm in trained if arm.setting.data == data]
        chosen = best(of_data, lambda arm: arm.glance)
        yield (
            f"Training, {data}, chosen by the search half among {len(of_data)} settings (all of which took "
            f"{sum(arm.seconds_chosen for arm in of_data):.0f} s): {told(chosen)}."
        )
        yield from (f"  {line}" for line in beside(chosen, dapa))
        reaching = [arm for arm in of_data if is_level(arm, dapa, "DSR")]
        if not reaching:
            yield "  No setting reaches DAPA's DSR."
            continue
        yield (
            f"  {len(reaching)} of {len(of_data)} reach DAPA's DSR within noise, with an over-refusal of "
            f"{span(reaching, 'over_refusal')} and a skill of {span(reaching, 'skill')}."
        )
        level = [arm for arm in reaching if is_level(arm, dapa, "over-refusal")]
        if not level:
            yield "  None of them does so without more over-refusal."
            continue
        # With hindsight: what follows is told by the figures that are reported.
        kept = [arm for arm in level if is_level(arm, dapa, "skill")]
        quicker = sum(arm.seconds < dapa.seconds for arm in kept)
        yield (
            f"  Without more over-refusal: {len(level)}, whose median skill is {median_skill(level):.3f}; within noise "
            f"of DAPA's skill: {len(kept)}, {quicker} of them trained in less time than the search took (hindsight)."
        )
        yield f"  The cheapest without more over-refusal (hindsight): {told(min(level, key=cost))}."
        yield f"  The one with the most skill (hindsight): {told(max(level, key=lambda arm: arm.mean('skill')))}."


def median_skill(arms: Sequence[Arm]) -> float:
    """Of settings, each with its seeds' mean."""
    return median(arm.mean("skill") for arm in arms)


def span(arms: Sequence[Arm], figure: str) -> str:
    """From the least to the most of a figure."""
    low, high = (f"{extreme(arm.mean(figure) for arm in arms):.3f}" for extreme in (min, max))
    return low if low == high else f"{low} to {high}"


def told(arm: Arm) -> str:
    """An arm in words."""
    what = f"{arm.setting}, rate {arm.rate:g}" if arm.setting else arm.name
    rates = f" ({arm.seconds_chosen:.1f} s with the choice of its rate)" if arm.setting else f", {arm.work}"
    return (
        f"{what}: DSR {arm.mean('dsr'):.3f}, over-refusal {arm.mean('over_refusal'):.3f}, "
        f"skill {arm.mean('skill'):.3f}, {arm.mean('changed'):.1%} changed, {arm.seconds:.1f} s{rates}"
    )


def cost(arm: Arm) -> tuple[int, float]:
    """What a setting costs: examples seen, then parameters trained."""
    return arm.setting.steps * BATCH_SIZE, arm.trained


def beside(arm: Arm, dapa: Arm) -> Iterable[str]:
    """Who wins where: what every seed shows beyond chance (McNemar), and what is simply counted."""
    wins: dict[str, list[str]] = {"training wins": [], "DAPA wins": [], "no difference": [], "the seeds disagree": []}
    for name, (figure, _, _) in TOLD_BY.items():
        words = f"{name} ({arm.mean(figure):.3f} against {dapa.mean(figure):.3f})"
        wins[who_wins(arm, dapa, name)].append(words)
    changed = f"parameters changed ({arm.mean('changed'):.1%} against {dapa.mean('changed'):.1%})"
    wins["training wins" if arm.mean("changed") < dapa.mean("changed") else "DAPA wins"].append(changed)
    seconds = (
        f"{arm.seconds:.1f} s, or {arm.seconds_chosen:.1f} s with the choice of its rate, against {dapa.seconds:.1f}"
    )
    if arm.seconds_chosen < dapa.seconds:
        wins["training wins"].append(f"time ({seconds})")
    elif arm.seconds > dapa.seconds:
        wins["DAPA wins"].append(f"time ({seconds})")
    else:
        wins["no difference"].append(f"time, as one counts ({seconds})")
    always = ("training wins", "DAPA wins")
    return (f"{who}: {', '.join(what) or 'nowhere'}." for who, what in wins.items() if what or who in always)


def who_wins(arm: Arm, dapa: Arm, name: str) -> str:
    """What the seeds say together: one of the headings of `beside`."""
    found = set()
    for seen in arm.seen:
        if is_worse(dapa.seen[0], seen, name):
            found.add("training wins")
        else:
            found.add("DAPA wins" if is_worse(seen, dapa.seen[0], name) else "no difference")
    return found.pop() if len(found) == 1 else "the seeds disagree"


def is_level(arm: Arm, dapa: Arm, name: str) -> bool:
    """Whether training is as good as DAPA with every seed, or better, up to what may be chance."""
    return not any(is_worse(seen, dapa.seen[0], name) for seen in arm.seen)


def is_worse(one: Seen, other: Seen, name: str) -> bool:
    """Whether one model is worse than another, prompt by prompt, beyond chance."""
    figure, by_prompt, more_is_better = TOLD_BY[name]
    change = compare(getattr(other, by_prompt), getattr(one, by_prompt))
    is_less = getattr(one, figure) < getattr(other, figure)
    return not change.within_noise and is_less == more_is_better


if __name__ == "__main__":
    main()
