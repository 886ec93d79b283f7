"""False alarms of the degenerate rule on real texts of many kinds, and the noise that it catches, by kind.

`python tests/benchmarks/degenerate_text.py FOLDER`: besides what any machine with this project has (Python's manual,
source and docstrings, the readmes and licences of installed packages, `responses.jsonl`), texts are read from FOLDER,
such as /usr/share: translations (`.mo`, one kind for each language), manual pages (`.gz`), and `.md`, `.rst` and `.txt`
files. A text is as long as a response of 100 tokens, or a single sentence. Every language in Latin script is also shown
without its diacritics.

Noise is made of the same texts. `--noise FILE` adds real noise: JSON lines with `kind` and `text`, such as responses of
damaged models. `--beside FILE` is another version of `degenerate.py` to show beside this one, and `--show` prints false
alarms. `--pairs` prints the table of letter pairs, learned from every second text, and nothing else.
"""

from __future__ import annotations

import argparse
import ast
import gettext
import gzip
import importlib.metadata
import importlib.util
import json
import math
import random
import re
import sysconfig
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

from refusal_training import written_rows
from tiny import parse

from dapa_merge.measure.refusal.degenerate import is_degenerate

# What 100 new tokens are, roughly, and the shortest text that is judged.
CHARACTERS, FEWEST = 450, 20
Texts = dict[str, list[str]]
# Of the table of pairs: the edge of a word and the letters, what a pair that never occurred counts, and a language's
# fewest pairs.
LETTERS, RARE, MIN_PAIRS = "^abcdefghijklmnopqrstuvwxyz", 0.002, 500
POEM = """\
The tide came in, the tide went out,
the gulls cried high, the gulls cried low.
I had no word, I had no doubt;
you had to stay, I had to go.

By noon the sky was thin and wide.
By six the sea was grey as tin.
We sat an hour side by side
and let the dark come slowly in.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--noise", nargs="*", type=Path, default=[])
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--each", type=int, default=400, help="texts of a kind")
    parser.add_argument("--show", type=int, default=0, help="print so many false alarms of each kind")
    parser.add_argument("--pairs", action="store_true")
    arguments = parse(parser, argv, each=3)
    rules = {"new": is_degenerate}
    if arguments.beside:
        rules = {"old": rule_of(arguments.beside), **rules}
    texts = real_texts(arguments.folders, arguments.each)
    if arguments.pairs:
        print("\n".join(pairs_table(texts)))
        return
    print_shares("called degenerate, real texts", texts, rules, arguments.show)
    noise = noises(texts, arguments.each)
    for path in arguments.noise:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            noise.setdefault(row["kind"], []).append(row["text"])
    print_shares("called degenerate, noise", noise, rules, 0)


def pairs_table(texts: Texts) -> Iterator[str]:
    """Half bits of each letter after another, `^` at the edges of a word, in base 36; each kind has the same weight."""
    shares: Counter[str] = Counter()
    for kind, some in texts.items():
        if kind.endswith("diacritics") or kind.startswith("answers") or kind in ("code", "numbers", "tables", "poem"):
            continue
        # Each word once: names of programs are in every language.
        words = {word for text in some[::2] for word in re.findall(r"[^\W\d_]{3,}", without_marks(text.lower()))}
        found = Counter(pair for word in words if word.isascii() for pair in map("".join, pairwise(f"^{word}^")))
        if found.total() >= MIN_PAIRS:
            for pair, number in found.items():
                shares[pair] += number / found.total()
    for first in LETTERS:
        total = sum(shares[first + second] for second in LETTERS)
        bits = [-math.log2((shares[first + second] + RARE) / (total + 27 * RARE)) for second in LETTERS]
        yield "".join("0123456789abcdefghijklmnopqrstuvwxyz"[min(35, round(2 * one))] for one in bits)


def without_marks(text: str) -> str:
    """A text without accents and other marks."""
    return "".join(one for one in unicodedata.normalize("NFD", text) if not unicodedata.combining(one))


def rule_of(path: Path) -> Callable[[str], bool]:
    """The rule of another version of the module."""
    spec = importlib.util.spec_from_file_location("beside", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.is_degenerate


def print_shares(head: str, kinds: Texts, rules: dict[str, Callable[[str], bool]], shown: int) -> None:
    """For each kind, how many of its texts each rule calls degenerate."""
    print(f"{head}: {', '.join(rules)}")
    totals = dict.fromkeys(rules, 0)
    languages = dict.fromkeys(rules, 0)
    number = num_languages = 0
    for kind, texts in kinds.items():
        found = {name: [text for text in texts if rule(text)] for name, rule in rules.items()}
        number += len(texts)
        for name, some in found.items():
            totals[name] += len(some)
        if kind.startswith("language "):
            num_languages += len(texts)
            for name, some in found.items():
                languages[name] += len(some)
        if not kind.startswith("language ") or found["new"]:
            print(f"  {kind}: {', '.join(str(len(some)) for some in found.values())} of {len(texts)}")
        for text in found["new"][:shown]:
            print(textwrap.indent(text, "    | "))
    if num_languages:
        print(f"  all languages: {', '.join(map(str, languages.values()))} of {num_languages}")
    print(f"  all: {', '.join(map(str, totals.values()))} of {number}")


def real_texts(folders: Sequence[Path], each: int) -> Texts:
    """Texts by kind, at most `each` of a kind, always the same draw."""
    draw = random.Random(0)
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    sources = [
        path.read_text(encoding="utf-8", errors="replace") for path in draw.sample(library, min(60, len(library)))
    ]
    packages = list(importlib.metadata.distributions())
    readmes = [str(one.metadata.get_payload() or "") for one in packages]
    licences = [
        file.read_text(encoding="utf-8")
        for one in packages
        for file in one.files or ()
        if re.search(r"licen[cs]e|copying|notice", file.name, re.I) and file.suffix in ("", ".txt", ".md")
        and Path(str(file.locate())).is_file()
    ]  # fmt: skip
    manual = [re.sub(r"[*`]", "", text) for text in topics.values()]
    prose = [*map(paragraphs, manual), *map(paragraphs, readmes)]
    sentences = [one for part in prose for text in part for one in re.split(r"(?<=[.!?])\s+", text)]
    answers = [row["completion"] for row in written_rows() if row["style"] != "damaged"]
    numbers = [
        ", ".join(str(draw.randint(0, 10 ** draw.randint(1, 6))) for _ in range(draw.randint(8, 60)))
        for _ in range(each)
    ]
    tables = ["\n".join(f"| {a} | {b} | {a * b} |" for a in range(1, n % 9 + 4)) for n in range(each) for b in [n]]
    words = sorted({word for text in answers for word in re.findall(r"[a-z]+", text.lower())})
    short = [word for word in words if len(word) <= 4]
    kinds: Texts = {
        "manual": pieces(manual),
        "manual, sentences": [one for one in sentences if len(one) < CHARACTERS],
        "docstrings": pieces(docstrings(sources)),
        "code": windows(sources),
        "readmes": windows(readmes),
        "licences": windows(licences),
        "answers": answers,
        "answers, sentences": [one for text in answers for one in re.split(r"(?<=[.!?])\s+", text)],
        "answers, upper case": [text.upper() for text in answers],
        "lists of words": [", ".join(draw.sample(words, 25)) for _ in range(each)],
        "lists of words in lines": [
            "\n".join(f"{n}. {word}" for n, word in enumerate(draw.sample(words, 15), 1)) for _ in range(each)
        ],
        "lists of short words": [", ".join(draw.sample(short, 30)) for _ in range(each)],
        "numbers": numbers,
        "tables": tables,
        "poem": [POEM, *POEM.split("\n\n"), "\n".join(POEM.split("\n")[:3])],
    }
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix in READERS:
                for kind, text in READERS[path.suffix](path):
                    kinds.setdefault(kind, []).append(text)
    for kind in [kind for kind in kinds if kind.startswith("language ")]:
        bare = [without_marks(text) for text in kinds[kind]]
        if not all(text.isascii() for text in kinds[kind]) and sum(text.isascii() for text in bare) > len(bare) / 2:
            kinds[f"{kind}, without diacritics"] = bare
    return {
        kind: draw.sample(some, min(each, len(some)))
        for kind, texts in kinds.items()
        if (some := [text for text in texts if len(text.strip()) >= FEWEST])
    }


def paragraphs(text: str) -> list[str]:
    """Paragraphs of prose, each in one line."""
    found = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [one for one in found if len(one) >= FEWEST and re.match(r"[A-Z][a-z ]", one) and one[-1] in ".!?"]


def pieces(texts: Iterable[str]) -> list[str]:
    """Paragraphs as they are, cut off like a response."""
    return [part[:CHARACTERS] for text in texts for part in re.split(r"\n\s*\n", text) if len(part) >= FEWEST]


def windows(texts: Iterable[str]) -> list[str]:
    """Texts in pieces of a response's length, as they are."""
    return [text[start : start + CHARACTERS] for text in texts for start in range(0, len(text), CHARACTERS)]


def docstrings(sources: Iterable[str]) -> Iterator[str]:
    """The docstrings of modules, classes and functions."""
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (found := ast.get_docstring(node)):
                yield found


def translations(path: Path) -> Iterator[tuple[str, str]]:
    """Messages of a compiled translation, several together as a text; short ones, as of menus, are left out."""
    if path.parent.name != "LC_MESSAGES":
        return
    try:
        with path.open("rb") as file:
            catalog = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    except (OSError, ValueError, LookupError):
        return
    said = [" ".join(value.split()) for key, value in catalog.items() if key and value != key and len(value) > 30]
    text = ""
    for one in said:
        text += re.sub(r"%\S*|[<{][^>}]*[>}]|[_&]", "", one) + " "
        if len(text) >= CHARACTERS // 2:
            yield f"language {path.parent.parent.name}", text
            text = ""


def manual_page(path: Path) -> Iterator[tuple[str, str]]:
    """Pieces of a manual page without its commands."""
    if "/man" not in str(path):
        return
    try:
        text = gzip.decompress(path.read_bytes()).decode()
    except (OSError, ValueError, EOFError):
        return
    lines = [line for line in text.splitlines() if not line.startswith((".", "'"))]
    plain = re.sub(r"\\f.|\\[&|/,]", "", "\n".join(lines)).replace("\\-", "-")
    for one in windows([plain])[:20]:
        yield "manual pages", one


def document(path: Path) -> Iterator[tuple[str, str]]:
    """Pieces of a text file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    for one in windows([text])[:20]:
        yield f"{path.suffix} files", one


READERS: dict[str, Callable[[Path], Iterator[tuple[str, str]]]] = {
    ".mo": translations, ".gz": manual_page, ".md": document, ".rst": document, ".txt": document,
}  # fmt: skip


def noises(texts: Texts, each: int) -> Texts:
    """Noise by kind, made of real texts."""
    draw = random.Random(0)
    heads = [" ".join(text.split())[:CHARACTERS] for text in texts["answers"][:each]]
    words = [text.split() for text in heads]
    vocabulary = sorted({word for some in words for word in some})
    parts = [word[start : start + draw.randint(1, 4)] for word in vocabulary for start in range(0, len(word), 3)]
    foreign = [
        text for kind, some in texts.items() if kind.startswith("language ") for text in some if not text.isascii()
    ]
    foreign = draw.sample(foreign, min(each, len(foreign))) or ["Übergrößenträger äßern Späße über Äpfel. " * 4]
    letters = "abcdefghijklmnopqrstuvwxyz"
    scripts = "abcdefgабвгдежзиمنابتथदनपकあいうえお日本語中文한국어"
    return {
        "a word again and again": [f"{draw.choice(some)} " * 60 for some in words],
        "a phrase again and again": [" ".join(some[:6]) + " " + (" ".join(some[2:6]) + " ") * 20 for some in words],
        "an answer that turns into a loop": [" ".join(some[:12]) + " and then" * 40 for some in words],
        "random letters": [
            " ".join("".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(60)) for _ in heads
        ],
        "shuffled characters": ["".join(draw.sample(text, len(text))) for text in heads],
        "shuffled within words": [" ".join("".join(draw.sample(word, len(word))) for word in some) for some in words],
        "random scripts": [" ".join("".join(draw.choices(scripts, k=5)) for _ in range(50)) for _ in heads],
        "random parts of words": [
            "".join(draw.choice(["", " "]) + draw.choice(parts) for _ in range(100)) for _ in heads
        ],
        "random words": [" ".join(draw.choices(vocabulary, k=70)) for _ in heads],
        "shuffled words": [" ".join(draw.sample(some, len(some))) for some in words],
        "wrong encoding": [text.encode().decode("cp1252", "replace") for text in foreign],
        "padding": ["<pad>" * draw.randint(1, 100) for _ in heads],
    }


if __name__ == "__main__":
    main()
