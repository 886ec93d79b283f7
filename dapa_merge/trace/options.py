"""Options of `dapa-merge trace`. Imports nothing heavy, so the command line can show them at once."""

from __future__ import annotations

from dataclasses import dataclass

# Hidden states of the residual stream, and outputs of the modules of a layer.
SITE_KINDS = ("hidden", "mlp", "attention", "gate", "up", "down")
# Models of a recipe that can be traced.
TRACED = ("source", "target")
# The noise, in standard deviations of the subjects' embeddings; ROME, appendix B.1.
NOISE = 3.0
NUM_SAMPLES = 5
# Prompts for influence, as in the paper, and for attribution, as in a search.
MAX_INFLUENCE_PROMPTS = 128
MAX_ATTRIBUTION_PROMPTS = 32
# Prompts whose influence is measured before it is written; fewer would transplant each unit more often.
PROMPTS_AT_ONCE = 8


@dataclass(frozen=True)
class Stage:
    """A part of a trace that can be made without the others.

    Attributes:
        finds: What it finds, for the help and the page.
        compares: Whether it needs prompts that only the source refuses.
    """

    name: str
    finds: str
    compares: bool = True


# In the order in which they are made.
STAGES = (
    Stage("search", "a selection, if the recipe names none", compares=False),
    Stage("influence", "the effect of each unit of the source, alone in the target"),
    Stage("directions", "what chosen directions put back, if the recipe's edit chooses some"),
    Stage("groups", "groups of units, put in and left out", compares=False),
    Stage("edits", "edits of every size"),
    Stage("traces", "causal tracing"),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)


@dataclass(frozen=True)
class TraceOptions:
    """The options of a trace.

    Attributes:
        traced: The one of `TRACED` that is traced causally.
        kinds: Some of `SITE_KINDS` to restore; None for all that the model has.
        noise: The noise on the subject's embeddings, in their standard deviations.
        window: Layers of MLP or attention that are restored at once; None for a fifth of all.
        num_tokens: Tokens of each response that are counted, at most.
        seed: The seed of the noise and the random controls.
        subjects: A prompt's subject is the first of these that it contains; if empty, subjects are detected.
        responses: A refusal and an answer for every prompt, instead of the models' own.
        num_controls: Random selections for each size of a group.
        stages: Names of `STAGES`; None for all that the recipe has.
        num_examples: Prompts with charts of their own.
    """

    traced: str = "source"
    kinds: tuple[str, ...] | None = None
    num_prompts: int = 32
    noise: float = NOISE
    num_samples: int = NUM_SAMPLES
    window: int | None = None
    num_tokens: int = 4
    seed: int = 0
    subjects: tuple[str, ...] = ()
    responses: tuple[str, str] | None = None
    num_controls: int = 5
    stages: tuple[str, ...] | None = None
    num_examples: int = 1
