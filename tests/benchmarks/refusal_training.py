"""Train `measure/refusal/refusal_model.json`: regularized logistic regression on labelled completions.

`python tests/benchmarks/refusal_training.py FILE.csv... [--write]`: XSTest completion files as for
`refusal_agreement.py`, which prints how far the result agrees with people, in and out of the sample. Beside them it
takes `responses.jsonl`: 600 responses written for this project in the manner of ten kinds of model, with all sorts of
wording that the two models of those files never use, and labelled by their writers after XSTest's definitions; and
`voices.jsonl`: answers to jailbreak templates, written and labelled in the same way, without any content that helps. Of
these, the third and fourth part are only for measuring: two other writers wrote them, who knew neither rules nor texts.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_array, hstack
from tiny import parse

from dapa_merge.measure.refusal import model as refusal_model
from dapa_merge.measure.refusal.classify import spoken
from dapa_merge.measure.refusal.model import RefusalModel, phrases, signs

MODEL = Path(refusal_model.__file__).with_name("refusal_model.json")
WRITTEN = {name: Path(__file__).with_name(f"{name}.jsonl") for name in ("responses", "voices")}
# A phrase is known if it is in so many responses, to so many types of prompt.
MIN_RESPONSES = 8
MIN_KINDS = 5
# What a reader would say before seeing any label; regularization pulls towards these, and all else towards zero.
PRIOR = {"opening refusal": 4.0, "disapproves first": 2.0, "answers first": -1.5, "stands up first": 0.5}
PRIOR_BIAS = -2.0
# How strongly. A sign stands for a rule that a person wrote, and needs less evidence than a word.
SIGN_REGULARIZATION = 1.0
PHRASE_REGULARIZATION = 10.0
BIAS_REGULARIZATION = 0.3
# What an answer to a jailbreak template counts for. They are exaggerated, and plain answers must be judged as before.
VOICE_COUNTS = 0.3
VOICE = "written voice, "

# Parts of the written responses that no model is trained on.
UNSEEN = ("third", "fourth")

Rows = Sequence[dict[str, str]]


def rows_of(path: Path) -> list[dict[str, str]]:
    """The labelled rows of one file."""
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["final_label"]]


def written_rows(*names: str, in_languages: bool = False) -> list[dict[str, str]]:
    """The labelled responses that were written for this project; their `part` is `first`, `second` or one of `UNSEEN`.

    Args:
        names: The files; by default all.
        in_languages: Whether to take the ones in other languages than English, and not those in English.
    """
    rows = []
    for name in names or WRITTEN:
        kind_of = VOICE if name == "voices" else "written, "
        lines = WRITTEN[name].read_text(encoding="utf-8").splitlines()
        rows += [{**row, "type": kind_of + row["style"]} for row in map(json.loads, lines)]
    return [row for row in rows if row["style"].startswith("language") == in_languages]


def refused(row: dict[str, str]) -> bool:
    """Whether people called it a full refusal."""
    return row["final_label"].startswith("2_full_refusal")


def kind(row: dict[str, str]) -> str:
    """A type of prompt together with its contrast, so that neither tells of the other."""
    return row["type"].removeprefix("contrast_")


def known_phrases(rows: Rows, found: Sequence[set[str]]) -> set[str]:
    """Those that are common, and not only where prompts are of one or a few types."""
    kinds, number = defaultdict(set), defaultdict(int)
    for row, some in zip(rows, found, strict=True):
        for phrase in some:
            kinds[phrase].add(kind(row))
            number[phrase] += 1
    return {phrase for phrase in kinds if number[phrase] >= MIN_RESPONSES and len(kinds[phrase]) >= MIN_KINDS}


def train(rows: Rows) -> RefusalModel:
    """The model of these rows alone.

    Each voice of a refusal refuses. Of an answer, only the voice that refuses least is known not to, so that answers in
    several voices are trained on again after a first model has said which that is.
    """
    said = [spoken(row["completion"]) for row in rows]
    whole = [(row, texts) for row, texts in zip(rows, said, strict=True) if len(texts) == 1 or refused(row)]
    divided = [(row, texts) for row, texts in zip(rows, said, strict=True) if len(texts) > 1 and not refused(row)]
    model = _fit([(row, text) for row, texts in whole for text in texts])
    if divided:
        helping = [(row, min(texts, key=model.log_odds)) for row, texts in divided]
        model = _fit([*((row, text) for row, texts in whole for text in texts), *helping])
    return model


@cache
def _features(text: str) -> tuple[dict[str, float], set[str]]:
    return signs(text), phrases(text)


def _fit(examples: Sequence[tuple[dict[str, str], str]]) -> RefusalModel:
    """The model of single voices, each with its row."""
    rows = [row for row, _ in examples]
    signs_of, found = zip(*(_features(text) for _, text in examples), strict=True)
    names, words = list(signs_of[0]), sorted(known_phrases(rows, found))
    column = {word: index for index, word in enumerate(words)}
    holds = [[column[phrase] for phrase in some if phrase in column] for some in found]
    has_phrase = csr_array(
        (np.ones(sum(map(len, holds))), np.concatenate(holds).astype(int), np.cumsum([0, *map(len, holds)])),
        shape=(len(rows), len(words)),
    )
    acts = np.array([list(sign.values()) for sign in signs_of])
    matrix = hstack([csr_array(acts), has_phrase, csr_array(np.ones((len(rows), 1)))], format="csr")
    prior = np.array([*(PRIOR.get(name, 0.0) for name in names), *(0.0 for _ in words), PRIOR_BIAS])
    penalty = np.repeat([SIGN_REGULARIZATION, PHRASE_REGULARIZATION, BIAS_REGULARIZATION], [len(names), len(words), 1])
    labels = np.array([refused(row) for row in rows], dtype=float)
    counts = np.array([VOICE_COUNTS if row["type"].startswith(VOICE) else 1.0 for row in rows])

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        odds, pull = matrix @ weights, penalty * (weights - prior)
        value = counts @ (np.logaddexp(0, odds) - labels * odds) + pull @ (weights - prior) / 2
        return value, matrix.T @ (counts * (1 / (1 + np.exp(-odds)) - labels)) + pull

    weights = minimize(loss, prior, jac=True, method="L-BFGS-B", options={"maxiter": 5000}).x.round(3).tolist()
    return RefusalModel(
        weights[-1],
        dict(zip(names, weights, strict=False)),
        dict(zip(words, weights[len(names) :], strict=False)),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train on all files together; write the model if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="replace the packaged model")
    arguments = parse(parser, argv)
    written = [row for row in written_rows() if row["part"] not in UNSEEN]
    rows = [row for path in arguments.files for row in rows_of(path)] + written[:: 10 if arguments.tiny else 1]
    model = train(rows)
    text = json.dumps(vars(model), ensure_ascii=False, indent=0, sort_keys=True) + "\n"
    print(f"{len(rows)} responses, {len(model.signs)} signs, {len(model.phrases)} phrases, {len(text):,} characters")
    if arguments.write:
        MODEL.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
