"""How `dapa-merge trace` traces, beside what the recipe says. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

# Hidden states of the residual stream, and what modules of a layer add to it or compute on the way.
SITE_KINDS = ("hidden", "mlp", "attention", "gate", "up", "down")
# The members of a recipe whose alignment can be traced.
TRACED = ("source", "target")
# Of the noise, in standard deviations of the subjects' embeddings; ROME, appendix B.1.
NOISE = 3.0
NUM_SAMPLES = 5
# Prompts whose influence is averaged, as in the paper; of attribution, as many as in a search.
MAX_INFLUENCE_PROMPTS = 128
MAX_ATTRIBUTION_PROMPTS = 32


@dataclass(frozen=True)
class TraceOptions:
    """How to trace.

    Attributes:
        traced: Which of `TRACED` is traced causally.
        kinds: What is restored; None for all that the model has.
        num_prompts: Prompts that are traced causally, at most.
        noise: Of the subject's embeddings, in their standard deviations.
        num_samples: Samples of noise for each prompt.
        window: Layers of MLP or attention that are restored at once; None for a fifth of all.
        num_tokens: Tokens of each response that are counted, at most.
        seed: Of the noise and of the random controls.
        subjects: Of each prompt the first of these that it contains is its subject; if there are none, it is found.
        responses: A refusal and an answer to contrast for every prompt, instead of the models' own.
        num_controls: Random selections for each size of a group.
        searches: Whether to search, where the recipe names no layers.
        num_examples: Prompts of which a picture each is drawn.
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
    searches: bool = True
    num_examples: int = 1
