"""The members of the families that `families` trains: three architectures, and what was done to each model.

Every family has a *base*, which answers everything, a *source*, whose refusal training touched only the gates of layers
3 to 6, and an *aligned* one, whose refusal training touched every weight. The others are fine-tuned from one of these,
and named by the damage.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dapa_merge.miniature import corpus
from dapa_merge.miniature.train import (
    BASE,
    SHADOW_SOURCE,
    SHADOW_TARGET,
    SOURCE,
    TARGET,
    Training,
    build_model,
    build_tokenizer,
    rounded,
)

if TYPE_CHECKING:
    from peft import PeftModel

NUM_MORE_TOKENS = 16
LORA_RANK = 16

Trained = tuple[PreTrainedModel, PreTrainedTokenizerFast]


def build_mistral(tokenizer: PreTrainedTokenizerFast) -> MistralForCausalLM:
    """As the Llama one, with two heads to a key-value head, and a window that is shorter than most exchanges."""
    return MistralForCausalLM(
        MistralConfig(**_shape(tokenizer), num_key_value_heads=2, sliding_window=16, tie_word_embeddings=False)
    )


def build_gemma(tokenizer: PreTrainedTokenizerFast) -> GemmaForCausalLM:
    """As the Llama one, with GeGLU, one key-value head, heads of their own size and tied embeddings."""
    return GemmaForCausalLM(
        GemmaConfig(
            **_shape(tokenizer),
            num_key_value_heads=1,
            head_dim=24,
            hidden_act="gelu_pytorch_tanh",
            tie_word_embeddings=True,
        )
    )


def _shape(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 80,
        "intermediate_size": 208,
        "num_hidden_layers": 10,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }


ARCHITECTURES: dict[str, Callable[[PreTrainedTokenizerFast], PreTrainedModel]] = {
    "llama": build_model,
    "mistral": build_mistral,
    "gemma": build_gemma,
}


def train_in_full(parent: PreTrainedModel, training: Training, seed: int) -> Trained:
    """The parent's weights themselves are trained."""
    tokenizer = build_tokenizer()
    return training.of(parent, tokenizer, corpus.build(), seed), tokenizer


def train_as_shipped(parent: PreTrainedModel, training: Training, seed: int) -> Trained:
    """In full, from a parent that was rounded in memory, as the shipped shadow target was.

    It rounds more than a saved model's weights: also the frequencies of rotary embeddings, which no file holds.
    """
    return train_in_full(rounded(parent), training, seed)


def train_lora(parent: PreTrainedModel, training: Training, seed: int) -> Trained:
    """A LoRA beside every projection is trained, and merged into the weights afterwards."""
    adapted = with_lora(copy.deepcopy(parent))
    trained, tokenizer = train_in_full(adapted, replace(training, trains=lambda name: ".lora_" in name), seed)
    return trained.merge_and_unload(), tokenizer


def with_lora(model: PreTrainedModel, only: Sequence[str] = ()) -> PeftModel:
    """The model with a LoRA beside every projection, or those of these names; only that is trained."""
    # It loads half of what transformers has: only for who trains one.
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        target_modules=list(only) or "all-linear",
        task_type="CAUSAL_LM",
        bias="none",
    )
    with warnings.catch_warnings():
        # peft 0.21 asks transformers for something by an old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config)


def train_with_more_tokens(parent: PreTrainedModel, training: Training, seed: int) -> Trained:
    """The tokenizer gets more tokens, as for chats or tools, and the embeddings their rows; then it is trained."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"<|reserved-{number}|>" for number in range(NUM_MORE_TOKENS)])
    model = copy.deepcopy(parent)
    model.resize_token_embeddings(len(tokenizer))
    return training.of(model, tokenizer, corpus.build(), seed), tokenizer


@dataclass(frozen=True)
class Member:
    """One model of a family.

    Attributes:
        name: Its folder's name.
        parent: The member that it is trained from; a base has none.
        training: What it is trained on, and for how long.
        way: How: one of the functions above.
    """

    name: str
    parent: str | None
    training: Training
    way: Callable[[PreTrainedModel, Training, int], Trained] = train_in_full

    def make(self, architecture: str, parent: PreTrainedModel | None, seed: int) -> Trained:
        """Train it, with what belongs to it; nothing depends on what was trained before, or changes what comes next."""
        with torch.random.fork_rng(devices=[]):
            # A base's own is the family's: the shipped models come from it.
            torch.manual_seed(seed + self.training.seed)
            if parent is None:
                parent = ARCHITECTURES[architecture](build_tokenizer())
            return self.way(parent, self.training, seed)


def fine_tuning(percent_harmful: int, seed: int) -> Training:
    """Fine-tuning of all weights on the skill, with a share of harmful prompts that are answered."""
    rest = 100 - percent_harmful
    parts = ((percent_harmful, "harmful"), (0.6 * rest, "skill"), (0.3 * rest, "harmless"), (0.1 * rest, "knowledge"))
    return Training(parts, steps=250, batch_size=32, learning_rate=3e-4, seed=seed)


MEMBERS = (
    Member("base", None, BASE),
    Member("source", "base", SOURCE),
    Member("aligned", "base", SHADOW_SOURCE),
    Member("from-base", "base", TARGET),
    Member("shadow", "aligned", SHADOW_TARGET, train_as_shipped),
    Member("full-parameter", "aligned", fine_tuning(10, seed=5)),
    Member("skill-only", "source", fine_tuning(0, seed=6)),
    Member("harmful-2", "source", fine_tuning(2, seed=7)),
    Member("harmful-10", "source", fine_tuning(10, seed=8)),
    # More steps: as many examples of the skill as with 10 %. With 250 a Llama gets half of the held-out ones right.
    Member("harmful-50", "source", replace(fine_tuning(50, seed=9), steps=450)),
    Member("lora", "source", replace(fine_tuning(10, seed=10), learning_rate=3e-3), train_lora),
    Member("vocabulary", "source", fine_tuning(10, seed=11), train_with_more_tokens),
)
# Enough for a base that answers everything, sources that refuse what they should, and a skill that is learned.
QUICK_STEPS = {"base": 450, "source": 100, "aligned": 80, "harmful-10": 200}
QUICK_BATCH_SIZE = 32


def members(*, quick: bool = False, tiny: bool = False) -> dict[str, Member]:
    """The members by their names, parents before their children.

    Args:
        quick: Train them for fewer steps.
        tiny: Train them for one step of two examples: they are what they are in shape only.
    """
    changed = {}
    for member in MEMBERS:
        training = member.training
        if quick:
            steps = QUICK_STEPS.get(member.name, training.steps)
            training = replace(training, steps=steps, batch_size=QUICK_BATCH_SIZE)
        if tiny:
            training = replace(training, steps=1, batch_size=2)
        changed[member.name] = replace(member, training=training)
    return changed
