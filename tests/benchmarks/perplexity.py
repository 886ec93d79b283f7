"""Perplexity, ours beside transformers' documented loop and lm-evaluation-harness, on the same text.

`python tests/benchmarks/perplexity.py`: on the miniature and a random Llama, in float32, with the packaged text.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny import parse
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.live import load_model
from dapa_merge.measure.perplexity import ScoredText as Row
from dapa_merge.measure.perplexity import losses, read_passages
from dapa_merge.measure.prompts.sets import Question, load_prompts

LIMIT = 1e-4


def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures; the difference is relative."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    is_tiny = parse(parser, argv).tiny
    passages = load_prompts("builtin").passages[: 2 if is_tiny else None]
    text = "\n\n".join(passage.answer for passage in passages)
    with tempfile.TemporaryDirectory() as folder:
        for name, path in (("miniature", miniature.path("target")), ("random Llama", _random(Path(folder)))):
            model, tokenizer = load_model(open_checkpoint(str(path)), torch.device("cpu"))
            model.float()
            ids = tokenizer(text, verbose=False)["input_ids"]
            for window, stride in ((128, 64), (128, 127), (64, 16))[: 1 if is_tiny else None]:
                start = time.perf_counter()
                options = {"batch_size": BatchSize(8), "window": window, "stride": stride}
                ours = read_passages(model, tokenizer, [Question("", text)], **options).perplexity
                middle = time.perf_counter()
                theirs = documented(model, ids, window, stride)
                end = time.perf_counter()
                print(
                    f"{name}, {len(ids)} tokens, window {window}, stride {stride}: ours {ours:.6f} "
                    f"({middle - start:.2f} s), transformers' loop {theirs:.6f} ({end - middle:.2f} s), difference "
                    f"{abs(ours / theirs - 1):.1e} (limit {LIMIT})"
                )
            harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=128)
            request = Instance("loglikelihood_rolling", {}, (text,), 0)
            (total,) = harness.loglikelihood_rolling([request], disable_tqdm=True)
            theirs, ours = math.exp(-total / len(ids)), rolling(model, ids, harness.prefix_token_id, 128)
            print(
                f"{name}, disjoint windows of 128: our likelihood {ours:.6f}, lm-evaluation-harness {theirs:.6f}, "
                f"difference {abs(ours / theirs - 1):.1e} (limit {LIMIT})"
            )


def documented(model: LlamaForCausalLM, ids: list[int], window: int, stride: int) -> float:
    """The strided loop that transformers documents, with the mean over tokens."""
    total, number, before = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        labels = torch.tensor([ids[begin:end]])
        labels[:, : end - begin - (end - before)] = -100
        with torch.no_grad():
            loss = model(torch.tensor([ids[begin:end]]), labels=labels).loss
        valid = int((labels[0, 1:] != -100).sum())
        total, number, before = total + float(loss) * valid, number + valid, end
        if end == len(ids):
            break
    return math.exp(total / number)


@torch.inference_mode()
def rolling(model: LlamaForCausalLM, ids: list[int], prefix: int, window: int) -> float:
    """The harness's windows, with our likelihood: `window` tokens each, the first of them given."""
    given = [prefix, *ids]
    total = 0.0
    for start in range(0, len(ids), window):
        stop = min(start + window, len(ids))
        # The last window looks back as far as it can.
        first = max(stop - window, 0)
        total += float(losses(model, 0, [Row(given[first : stop + 1], start - first + 1)])[0])
    return math.exp(total / len(ids))


def _random(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(miniature.path("target"))
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **shape)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
