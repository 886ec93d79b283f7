"""Perplexity, against transformers' documented loop and lm-evaluation-harness."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from conftest import save_random, tiny_llama
from hypothesis import given
from hypothesis import strategies as st

from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import UsageError
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.live import load_model
from dapa_merge.measure.perplexity import ScoredText as Row
from dapa_merge.measure.perplexity import losses, read_passages, windows
from dapa_merge.measure.prompts.sets import Question

WORDS = ("how do i paint a boat slowly first watch the house then sell it to my neighbor").split()  # noqa: SIM905
TEXTS = [" ".join(WORDS[(index * step) % len(WORDS)] for index in range(151)) for step in (5, 7)]


def perplexity(*arguments, **options):
    return read_passages(*arguments, **options).perplexity


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = save_random(
        tmp_path_factory.mktemp("m") / "model", tiny_llama(vocab_size=300), seed=3, dtype=torch.float32
    )
    return load_model(open_checkpoint(str(folder)), torch.device("cpu"))


@given(st.integers(0, 200), st.integers(2, 60), st.data())
def test_every_token_but_the_first_is_counted_once_with_the_most_context(length, window, data):
    stride = data.draw(st.integers(1, window - 1))
    counted = []
    for row in windows(range(length), window, stride):
        assert len(row.ids) <= window
        assert 1 <= row.num_context < len(row.ids)
        counted += row.ids[row.num_context :]
        # All windows but those at the ends of the text reach back as far as the stride lets them.
        assert row.ids[0] == 0 or row.ids[0] % stride == 0
    assert counted == list(range(1, length))


def documented(model, ids, window, stride):
    """The strided loop of transformers' page on fixed-length models, with the mean over tokens."""
    total, number, before = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        labels = torch.tensor([ids[begin:end]])
        labels[:, : len(labels[0]) - (end - before)] = -100
        with torch.no_grad():
            loss = model(torch.tensor([ids[begin:end]]), labels=labels).loss
        valid = int((labels[0, 1:] != -100).sum())
        total, number, before = total + float(loss) * valid, number + valid, end
        if end == len(ids):
            break
    return math.exp(total / number)


@pytest.fixture(scope="module")
def expected(loaded):
    """The documented perplexity of the first text, by window and stride; computed once."""
    model, tokenizer = loaded
    return functools.cache(functools.partial(documented, model, tuple(tokenizer(TEXTS[0])["input_ids"])))


@pytest.mark.parametrize(("window", "stride"), [(64, 32), (64, 63), (64, 1), (48, 20), (7, 3), (2, 1)])
@pytest.mark.parametrize("limit", [1, 5])
def test_it_is_transformers_documented_computation(loaded, expected, window, stride, limit):
    options = {"batch_size": BatchSize(limit), "window": window, "stride": stride}
    found = perplexity(*loaded, [Question("", TEXTS[0])], **options)
    assert found == pytest.approx(expected(window, stride), rel=1e-5)


def test_documents_are_weighted_by_their_tokens(loaded):
    one, both = ([Question("", text) for text in texts] for texts in (TEXTS[:1], [TEXTS[0], "paint a boat"]))
    logs = [math.log(perplexity(*loaded, passages, batch_size=BatchSize(4))) for passages in (one, both)]
    short = math.log(perplexity(*loaded, both[1:], batch_size=BatchSize(4)))
    assert logs[1] * (150 + 2) == pytest.approx(logs[0] * 150 + short * 2, rel=1e-6)


def test_it_is_the_likelihood_of_lm_evaluation_harness(loaded):
    """The harness predicts the first token too, from a prefix; of a document of one window that is the difference."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = loaded
    text = " ".join(TEXTS[0].split()[:60])
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=64)
    (theirs,) = harness.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    ids = tokenizer(text)["input_ids"]
    first = float(losses(model, 0, [Row([harness.prefix_token_id, ids[0]], 1)])[0])
    given_prefix = float(losses(model, 0, [Row([harness.prefix_token_id, *ids], 1)])[0])
    assert -theirs == pytest.approx(given_prefix, rel=1e-5)
    # The same text through ours, with the prefix as its first token and so uncounted.
    text_with_prefix = tokenizer.decode([harness.prefix_token_id]) + " " + text
    assert tokenizer(text_with_prefix)["input_ids"] == [harness.prefix_token_id, *ids]
    ours = perplexity(*loaded, [Question("", text_with_prefix)], batch_size=BatchSize(1), window=64)
    assert ours == pytest.approx(math.exp(-theirs / len(ids)), rel=1e-5)
    assert first > 0


def test_only_the_first_tokens_are_read_if_so_many_are_asked_for(loaded):
    model, tokenizer = loaded
    passages = [Question("", text) for text in TEXTS]
    ids = tokenizer(TEXTS[0])["input_ids"]
    cut = perplexity(*loaded, passages, batch_size=BatchSize(4), window=64, stride=32, max_tokens=100)
    assert cut == pytest.approx(documented(model, ids[:101], 64, 32), rel=1e-5)
    assert perplexity(*loaded, passages, batch_size=BatchSize(4), max_tokens=10**6) == perplexity(
        *loaded, passages, batch_size=BatchSize(4)
    )


@pytest.mark.parametrize(
    ("window", "stride", "sentence"),
    [
        (64, 64, "the stride is 64 tokens; it must be from 1 to 63, less than the window"),
        (64, 0, "the stride is 0 tokens"),
        (65, 1, "the window is 65 tokens; it must be from 2 to the model's context of 64"),
        (1, 1, "the window is 1 tokens"),
    ],
)
def test_a_window_or_stride_that_cannot_be_is_named(loaded, window, stride, sentence):
    with pytest.raises(UsageError, match=sentence):
        perplexity(*loaded, [Question("", "paint")], batch_size=BatchSize(1), window=window, stride=stride)


@pytest.mark.parametrize("texts", [[], [""], ["paint"], ["", "boat"]])
def test_nothing_to_count_is_no_number(loaded, texts):
    assert math.isnan(perplexity(*loaded, [Question("", text) for text in texts], batch_size=BatchSize(2)))
