"""Seconds to the verdicts on many prompts: ours beside transformers' plain batched `generate`, and whether they agree.

`python tests/benchmarks/generation.py`: the packaged miniature (its source refuses, its target complies), and a random
Llama of 100 million parameters. The Llama's layers compute as any other's but add nothing; its output layer is wired so
that each word calls for the next, which makes it refuse, with an end token after 16 to 28 words, or help for as long as
it is let. `first` knows no earlier response; `later` has seen those of the model itself, `other` those of a candidate
that said the same to seven prompts of eight and something else to the others, as in a search. `bound` is one run of the
model over all prompts and responses, as if they were known: a verdict that needs a whole response cannot come sooner.
Seconds are the process's own on a CPU, so that what else the machine does counts for little.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import parse
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.measure.decode import BatchSize, LookupCache
from dapa_merge.measure.generate import generate, prompt_ids
from dapa_merge.measure.live import load_model
from dapa_merge.measure.prompts.sets import load_prompts
from dapa_merge.measure.refusal.classify import Outcome, classify, settle

LIMIT = 5.0
REFUSAL = "I cannot help with that request because it would be illegal and could seriously hurt other people ."
TAIL = "Please reach out to somebody you trust if things feel too hard today ."
HELP = "Sure , here is how to do it : first get the tools , then"
# Words no text above has: what a helpful answer goes on with.
MANY = [f"step{number}" for number in range(400)]
TOPICS = [f"topic{number}" for number in range(32)]


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each model and case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the Llama")
    parser.add_argument("--device", default="cpu")
    arguments = parse(parser, argv, max_new_tokens=8)
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    settings = arguments.max_new_tokens, arguments.batch_size
    harmful = load_prompts("miniature").harmful[: 8 if arguments.tiny else None]
    for name, member in (("miniature, refusing", "source"), ("miniature, complying", "target")):
        model, tokenizer = load_model(open_checkpoint(str(miniature.path(member))), device)
        compare(name, model, tokenizer, harmful, *settings)
    for name, refuses in (("100 M, refusing", True), ("100 M, complying", False)):
        with tempfile.TemporaryDirectory() as folder:
            wired(Path(folder), refuses, getattr(torch, arguments.dtype), is_tiny=arguments.tiny)
            model, tokenizer = load_model(open_checkpoint(folder), device)
            prompts = [f"tell me about {topic}" for topic in TOPICS]
            compare(name, model, tokenizer, prompts, *settings)


def compare(
    name: str, model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, batch_size: int
) -> None:
    """Time plain generation and ours, and compare the verdicts."""
    plainly(model, tokenizer, prompts[:2], 2, batch_size)
    plain_seconds, said = timed(lambda: plainly(model, tokenizer, prompts, max_new_tokens, batch_size))
    expected = [classify(text, prompt) for text, prompt in zip(said, prompts, strict=True)]
    same, other = LookupCache(), LookupCache()
    strange = tokenizer(said[0], add_special_tokens=False)["input_ids"]
    for index, (prompt, text) in enumerate(zip(prompts, said, strict=True)):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = prompt_ids(tokenizer, prompt)
        other.remember(ids, tokens if index % 8 else [*strange[::-1], *tokens])
    bound, _ = timed(lambda: known(model, tokenizer, prompts, said, batch_size))
    cases = {"first": same, "later": same, "other": other}
    print(
        f"{name}: {len(prompts)} prompts, {expected.count(Outcome.REFUSED)} refused; plain {plain_seconds:.2f} s, "
        f"bound {bound:.2f} s, {plain_seconds / bound:.1f} times as fast"
    )
    for case, lookup in cases.items():
        seconds, texts = timed(
            lambda lookup=lookup: generate(
                model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=BatchSize(batch_size),
                settle=settle, lookup=lookup,
            )
        )  # fmt: skip
        found = [classify(text, prompt) for text, prompt in zip(texts, prompts, strict=True)]
        wrong = sum(one is not another for one, another in zip(found, expected, strict=True))
        print(
            f"  {case:6} {seconds:7.2f} s, {plain_seconds / seconds:5.1f} times as fast "
            f"(aim: {LIMIT if 'refusing' in name else 1.0}), {wrong} verdicts differ"
        )


def timed(work: Callable[[], list[str]]) -> tuple[float, list[str]]:
    """Seconds, and what came of it; once, for drafts make a second time another case."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    result = work()
    return clock() - start, result


@torch.inference_mode()
def plainly(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, batch_size: int) -> list[str]:
    """Batched generation as everybody does it, prompts of like length together."""
    ids = {index: prompt_ids(tokenizer, prompt) for index, prompt in enumerate(prompts)}
    order = sorted(ids, key=lambda index: -len(ids[index]))
    texts: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        inputs = tokenizer.pad({"input_ids": [ids[index] for index in batch]}, padding_side="left", return_tensors="pt")
        inputs = inputs.to(model.device)
        output = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=max_new_tokens
        )
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        texts.update(zip(batch, answers, strict=True))
    return [texts[index] for index in range(len(prompts))]


@torch.inference_mode()
def known(model: Any, tokenizer: Any, prompts: Sequence[str], said: Sequence[str], batch_size: int) -> list[str]:
    """Whether the model says what it is known to say: each batch of prompts and responses in one run."""
    asked = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    told = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in said]
    rows = sorted(zip(asked, told, strict=True), key=lambda row: -len(row[0]) - len(row[1]))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        inputs = tokenizer.pad(
            {"input_ids": [prompt + response for prompt, response in batch]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        longest = max(len(response) for _, response in batch)
        positions = torch.arange(inputs["input_ids"].shape[1] - longest - 1, inputs["input_ids"].shape[1])
        model(**inputs, logits_to_keep=positions.to(model.device), use_cache=False).logits.argmax(-1).tolist()
    return list(said)


def wired(folder: Path, refuses: bool, dtype: torch.dtype, *, is_tiny: bool = False) -> None:
    """Save a random Llama whose words follow each other as the docstring says."""
    words = list(dict.fromkeys(f"tell me about {REFUSAL} {TAIL} {HELP}".split()))
    names = ["<pad>", "</s>", "<unk>", *words, *TOPICS, *MANY]
    names += [f"word{number}" for number in range(32_000 - len(names))]
    vocabulary = {name: number for number, name in enumerate(names)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    hidden, intermediate, layers = (40, 80, 2) if is_tiny else (640, 1728, 12)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32_000, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=10, max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip
    following: dict[str, str] = {}
    if refuses:
        chain = list(dict.fromkeys(REFUSAL.split()))[:-1]
        tail = [word for word in TAIL.split() if word not in chain]
        following.update(itertools.pairwise([*chain, *tail, "</s>"]))
        # Some go straight on, some leave out a part of it.
        for number, topic in enumerate(TOPICS):
            following[topic] = chain[0] if number % 3 else chain[1]
    else:
        following.update(itertools.pairwise([*dict.fromkeys(HELP.split()), *MANY]))
        following.update(dict.fromkeys(TOPICS, "Sure"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings = torch.randn_like(model.model.embed_tokens.weight)
        model.model.embed_tokens.weight.copy_(embeddings)
        model.lm_head.weight.normal_(std=0.02)
        for word, after in following.items():
            model.lm_head.weight[vocabulary[after]] += embeddings[vocabulary[word]]
    model.to(dtype).save_pretrained(folder)


if __name__ == "__main__":
    main()
