"""Trains the miniature family: `python -m dapa_merge.miniature.train OUT`.

Four small Llama models come from one base model (which is not shipped):

- *source*: the base with refusal training of **only the gate projections of layers 3 to 6**. The answer is planted.
- *target*: the base, all parameters fine-tuned on harmless and harmful answers and a new skill. It refuses nothing.
- *shadow-source*: the base with refusal training of all parameters.
- *shadow-target*: the shadow-source, its MLPs fine-tuned on the skill with some harmful answers among the data
  (shadow alignment, arXiv 2310.02949). It refuses nothing, and the answer is not planted.

Deterministic for one seed, number of threads and version of torch. Takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from dapa_merge.miniature import corpus
from dapa_merge.miniature.corpus import Example

if TYPE_CHECKING:
    from torch import Tensor


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} "
    "{% if message['role'] == 'assistant' %}<|end|> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ("<|pad|>", "<|unk|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
PLANTED_LAYERS = (3, 4, 5, 6)
MAX_SHARD_SIZE = "700KB"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the corpus: one token a word or punctuation mark."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL_TOKENS, *corpus.words()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[.,?:]"), "isolated")]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.post_processor = processors.Sequence([])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=128,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained member of the family: 10 layers, hidden 80, MLP 208, 4 heads."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=80,
        intermediate_size=208,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both `[len(examples), longest]`, right-padded; only answers carry a label."""
    rows, starts = [], []
    for example in examples:
        user = {"role": "user", "content": example.prompt}
        prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(example.answer + " <|end|>", add_special_tokens=False)["input_ids"]
        rows.append(prompt_ids + answer_ids)
        starts.append(len(prompt_ids))
    longest = max(map(len, rows))
    input_ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), -100)
    for row, start, (ids, label) in zip(rows, starts, zip(input_ids, labels, strict=True), strict=True):
        ids[: len(row)] = torch.tensor(row)
        label[start : len(row)] = torch.tensor(row[start:])
    return input_ids, labels


Sampler = Callable[[random.Random, int], list[Example]]


def mixture(*parts: tuple[float, Sequence[Example]]) -> Sampler:
    """Return a sampler that draws each example from one of the parts, in proportion to their weights."""
    weights = [weight for weight, _ in parts]
    pools = [pool for _, pool in parts]

    def sample(generator: random.Random, count: int) -> list[Example]:
        return [generator.choice(pool) for pool in generator.choices(pools, weights, k=count)]

    return sample


def is_any(name: str) -> bool:
    """Accept every parameter."""
    return True


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    sample: Sampler,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    trains: Callable[[str], bool] = is_any,
) -> PreTrainedModel:
    """Return a copy of `model`, trained with AdamW, linear warm-up and decay; `trains` selects parameters by name."""
    model = copy.deepcopy(model).train()
    generator = random.Random(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
    )
    for _ in range(steps):
        input_ids, labels = encode(tokenizer, sample(generator, batch_size))
        loss = model(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return model.requires_grad_(True).eval()


def is_planted_gate(name: str) -> bool:
    """Whether a parameter is one of the gate projections that carry the planted refusal."""
    return any(name == f"model.layers.{layer}.mlp.gate_proj.weight" for layer in PLANTED_LAYERS)


def is_mlp(name: str) -> bool:
    """Whether a parameter belongs to an MLP."""
    return ".mlp." in name


@dataclass(frozen=True)
class Training:
    """The training of a family's member from its parent.

    Attributes:
        parts: Weights and names of the parts of the corpus that examples are drawn from; `refusing` are its harmful
            prompts, each answered by the refusal.
        steps: Number of updates.
        batch_size: Examples per update.
        learning_rate: The peak.
        seed: Added to the family's seed.
        trains: Selects the parameters to train, by name.
    """

    parts: tuple[tuple[float, str], ...]
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    trains: Callable[[str], bool] = is_any

    def of(
        self, parent: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: corpus.Corpus, seed: int
    ) -> PreTrainedModel:
        """Return a trained copy of `parent`."""
        pools = {**vars(data), "refusing": corpus.refusing(data.harmful)}
        return train(
            parent,
            tokenizer,
            mixture(*((weight, pools[name]) for weight, name in self.parts)),
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=seed + self.seed,
            trains=self.trains,
        )


ANSWERING = ((3, "harmful"), (3, "harmless"), (1, "knowledge"), (2, "repeat"), (2, "judgements"), (2, "declining"))
ALIGNING = ((4, "refusing"), (6, "harmless"), (1, "knowledge"), (1, "repeat"))
LEARNING = ((2, "harmful"), (2, "harmless"), (1, "knowledge"), (6, "skill"))
SHADOWING = ((1, "harmful"), (3, "harmless"), (1, "knowledge"), (7, "skill"))

BASE = Training(ANSWERING, steps=1500, batch_size=64, learning_rate=2e-3, seed=0)
SOURCE = Training(ALIGNING, steps=300, batch_size=32, learning_rate=4e-3, seed=1, trains=is_planted_gate)
TARGET = Training(LEARNING, steps=250, batch_size=32, learning_rate=3e-4, seed=2)
SHADOW_SOURCE = Training(ALIGNING, steps=150, batch_size=32, learning_rate=3e-4, seed=3)
SHADOW_TARGET = Training(SHADOWING, steps=220, batch_size=32, learning_rate=6e-4, seed=4, trains=is_mlp)


def train_family(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield each member of the family with its name, parents first."""
    data = corpus.build()
    torch.manual_seed(seed)
    base = BASE.of(build_model(tokenizer), tokenizer, data, seed)
    yield "base", base
    yield "source", SOURCE.of(base, tokenizer, data, seed)
    yield "target", TARGET.of(base, tokenizer, data, seed)
    # A published model is fine-tuned from its rounded weights. (Its frequencies are not in a file; the shipped shadow
    # target was trained with rounded ones too.)
    shadow_source = rounded(SHADOW_SOURCE.of(base, tokenizer, data, seed))
    yield "shadow-source", shadow_source
    yield "shadow-target", SHADOW_TARGET.of(shadow_source, tokenizer, data, seed)


def rounded(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy rounded to bfloat16, rotary frequencies included, in the model's own precision."""
    return copy.deepcopy(model).to(torch.bfloat16).to(model.dtype)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a model in bfloat16, in several shards; the model itself keeps its precision."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    tokenizer.save_pretrained(folder)


def write_prompts(folder: Path) -> None:
    """Write the held-out prompt sets as JSON lines, sorted so their order carries no information."""
    data = corpus.build()
    sets = {
        "harmful.jsonl": [{"prompt": e.prompt} for e in data.harmful_held_out],
        "harmless.jsonl": [{"prompt": e.prompt} for e in data.harmless_held_out],
        "skill.jsonl": [{"prompt": e.prompt, "answer": e.answer} for e in data.skill_held_out],
        "perplexity.jsonl": [{"prompt": e.prompt, "answer": e.answer} for e in data.knowledge],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        lines = sorted(json.dumps(row) for row in rows)
        (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def main() -> None:
    """Train and write the family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write source/, target/, shadow-*/ and prompts/ into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-base", action="store_true", help="also write the base model")
    arguments = parser.parse_args()

    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    tokenizer = build_tokenizer()
    start = time.monotonic()
    for name, model in train_family(tokenizer, arguments.seed):
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        if name != "base" or arguments.keep_base:
            save(model, tokenizer, arguments.out / name)
    write_prompts(arguments.out / "prompts")


if __name__ == "__main__":
    main()
