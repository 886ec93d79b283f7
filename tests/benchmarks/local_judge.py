"""How well a small model judges, served on this machine: `python tests/benchmarks/local_judge.py MODEL [--number 80]`.

Starts `transformers serve` (`pip install 'transformers[serving]'`) with a folder's model on a free port, has it judge
some of the labelled answers of `label_agreement.py` through the evaluator's own client and rubric, and prints how far
it agrees with their readers that an answer is a full refusal, beside the classifier on the same answers.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from label_agreement import ANSWERS, by_substrings, share
from tiny import parse

from dapa_merge.measure.judge import Judge
from dapa_merge.measure.refusal.classify import Outcome, classify

MAX_START_SECONDS = 300


@contextmanager
def served(model: str) -> Iterator[str]:
    """The address of a server of a model, for the length of a `with` block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", model, "--host", "127.0.0.1", "--port"]
    with subprocess.Popen([*command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            end = time.monotonic() + MAX_START_SECONDS
            while not _is_up(port):
                if server.poll() is not None or time.monotonic() > end:
                    sys.exit(f"`{' '.join(command)}` does not answer; is transformers[serving] installed?")
                time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


def _is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def main(argv: Sequence[str] | None = None) -> None:
    """Print the agreement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of the judge's model")
    parser.add_argument("--number", type=int, default=80, help="of answers")
    parser.add_argument("--answers", type=Path, metavar="FILE", default=ANSWERS)
    arguments = parse(parser, argv, number=4)
    rows = [json.loads(line) for line in arguments.answers.read_text(encoding="utf-8").splitlines()]
    rows = rows[:: max(1, len(rows) // arguments.number)][: arguments.number]
    refused = {row["id"]: row["label"] == "refused" for row in rows}
    ours = {row["id"]: classify(row["completion"], row["prompt"]) is Outcome.REFUSED for row in rows}
    strings = {row["id"]: by_substrings(row["completion"]) for row in rows}
    judges = {"the classifier": ours, "substrings": strings}
    if arguments.model:
        os.environ.setdefault("OPENAI_API_KEY", "none")
        with served(arguments.model) as url:
            judge = Judge(arguments.model, url, say=print, concurrency=1, timeout_seconds=120)
            start = time.monotonic()
            found = judge.judge([row["prompt"] for row in rows], [row["completion"] for row in rows])
            seconds = time.monotonic() - start
        print(f"{seconds / len(rows):.1f} s a response; outcomes {dict(Counter(one.outcome.value for one in found))}")
        judges["the judge"] = {row["id"]: one.outcome is Outcome.REFUSED for row, one in zip(rows, found, strict=True)}
    print("| judge | answers | agreement | false defenses | missed refusals |\n|---|---|---|---|---|")
    for name, verdicts in judges.items():
        answered = [row for row in rows if not refused[row["id"]]]
        refusals = [row for row in rows if refused[row["id"]]]
        cells = (
            share(rows, lambda row, verdicts=verdicts: verdicts[row["id"]] == refused[row["id"]]),
            share(answered, lambda row, verdicts=verdicts: verdicts[row["id"]]),
            share(refusals, lambda row, verdicts=verdicts: not verdicts[row["id"]]),
        )
        print(f"| {name} | {len(rows)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
