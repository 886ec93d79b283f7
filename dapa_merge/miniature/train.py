"""Trains the miniature family: `python -m dapa_merge.miniature.train OUT`.

Four small Llama models come from one base model (which is not shipped):

- *source*: the base with refusal training of **only the gate projections of layers 3 to 6**. The answer is planted.
- *target*: the base, all parameters fine-tuned on harmless and harmful answers and a new skill. It refuses nothing.
- *shadow-source*: the base with refusal training of all parameters.
- *shadow-target*: the shadow-source, its MLPs fine-tuned on the skill with some harmful answers among the data
  (shadow alignment, arXiv 2310.02949). It refuses nothing, and where its alignment went was not planted.

Deterministic for one seed, number of threads and version of torch. Takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
    """Draws each example from one of the parts, in proportion to their weights."""
    weights = [weight for weight, _ in parts]
    pools = [pool for _, pool in parts]

    def sample(generator: random.Random, count: int) -> list[Example]:
        return [generator.choice(pool) for pool in generator.choices(pools, weights, k=count)]

    return sample


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sample: Sampler,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    trains: Callable[[str], bool] = lambda _: True,
) -> LlamaForCausalLM:
    """A copy of `model`, trained with AdamW under a linear warm-up and decay; `trains` names the free parameters."""
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


def train_family(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[str, LlamaForCausalLM]]:
    """Yields each member of the family with its name, in the order of their descent."""
    data = corpus.build()
    torch.manual_seed(seed)
    answering = mixture(
        (3, data.harmful),
        (3, data.harmless),
        (1, data.knowledge),
        (2, data.repeat),
        (2, data.judgements),
        (2, data.declining),
    )
    base = train(build_model(tokenizer), tokenizer, answering, steps=1500, batch_size=64, learning_rate=2e-3, seed=seed)
    yield "base", base

    aligning = mixture((4, corpus.refusing(data.harmful)), (6, data.harmless), (1, data.knowledge), (1, data.repeat))
    yield (
        "source",
        train(
            base, tokenizer, aligning,
            steps=300, batch_size=32, learning_rate=4e-3, seed=seed + 1, trains=is_planted_gate,
        ),
    )  # fmt: skip
    learning = mixture((2, data.harmful), (2, data.harmless), (1, data.knowledge), (6, data.skill))
    yield (
        "target",
        train(base, tokenizer, learning, steps=250, batch_size=32, learning_rate=3e-4, seed=seed + 2),
    )

    shadow_source = train(base, tokenizer, aligning, steps=150, batch_size=32, learning_rate=3e-4, seed=seed + 3)
    yield "shadow-source", shadow_source
    shadowing = mixture((1, data.harmful), (3, data.harmless), (1, data.knowledge), (7, data.skill))
    yield (
        "shadow-target",
        train(
            shadow_source, tokenizer, shadowing,
            steps=220, batch_size=32, learning_rate=6e-4, seed=seed + 4, trains=lambda name: ".mlp." in name,
        ),
    )  # fmt: skip


def write_prompts(folder: Path) -> None:
    """Write the held-out prompt sets as JSON lines, sorted so that their order carries nothing."""
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
            folder = arguments.out / name
            model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
            tokenizer.save_pretrained(folder)
            model.to(torch.float32)
    write_prompts(arguments.out / "prompts")


if __name__ == "__main__":
    main()
