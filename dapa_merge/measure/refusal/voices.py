"""Splits a response into the voices that it speaks in. Standard library only.

An answer to a jailbreak template often comes twice, from one persona that refuses and from another that helps:
"[normal] I'm sorry, ... [free] Sure! First you ...". A voice is found by how it is marked, not by its name: a label at
the start of a line, in brackets, emphasis or tags, with a colon or an emoji; a key of a JSON object; a row of a table.
Headings, numbered items and the parts of a document ("Step 1:", "Chapter 2", "Subject:") are not voices.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# More labels than this are a document or a long play; the rest belongs to the last of them.
MAX_VOICES = 24
# A label has at most so many characters.
_NAME = 40
_EMOJI = "[\U0001f300-\U0001faff\u2600-\u27bf\u2b50]"
_EMOJIS = rf"(?:{_EMOJI}[\ufe0f\u200d ]*)"
# Not a bullet.
_EMPHASIS = r"(?![*-] )[*_#>~`\"' \t]{0,12}"
_OPENS, _CLOSES = r"[\[(<{【「]", r"[\])>}】」]"
_BRACKETED = re.compile(
    rf"(?m)^{_EMPHASIS}{_EMOJIS}{{0,4}}{_EMPHASIS}{_OPENS}(?![\]/])(?P<name>[^\[\](){{}}<>\n]{{1,{_NAME}}}){_CLOSES}"
    rf"[*_ ]{{0,4}}(?:response|output|mode|answer)?[*_ ]{{0,4}}(?P<colon>[:：]?)(?![(,.;])",
    re.IGNORECASE,
)
_NAMED = re.compile(
    rf"(?m)^{_EMPHASIS}{_EMOJIS}{{0,4}}{_EMPHASIS}(?P<name>\w[^\[\](){{}}<>|:：,.!?;\n]{{0,{_NAME}}}?)"
    rf"[*_ ]{{0,4}}(?:\([^()\n]{{1,{_NAME}}}\))?[*_ ]{{0,4}}[:：](?=[*_\s\"'“])"
)
_LETTERED = re.compile(r"(?m)^[*_ ]{0,4}(?P<name>[A-H])\)(?= )")
# The name of a character on a line of its own, as in a screenplay.
_IN_CAPITALS = re.compile(rf"(?m)^{_EMPHASIS}(?P<name>[A-Z][A-Z .'-]{{1,{_NAME}}})[*_ ]{{0,4}}$")
_BY_EMOJI = re.compile(rf"(?m)^[*_#>~` \t]{{0,8}}(?P<name>{_EMOJIS}{{1,3}})(?=[\w\"'“*_])")
_ROW = re.compile(r"(?m)^\|[ *_]{0,4}(?P<name>[^|\n]{1,40}?)[ *_]{0,4}\|")
_PAIR = re.compile(r"\"(?P<name>[^\"\n]{1,40})\"\s{0,8}:\s{0,8}\"(?P<text>(?:[^\"\\]|\\.){0,4000})")
# A label after the end of a sentence, on the same line.
_INLINE = re.compile(
    rf"(?<=[.!?\"”)])[ \t]{{1,4}}(?={_EMOJIS}{{0,2}}\[[^\[\]\n]{{1,{_NAME}}}\]|{_EMOJIS}{{1,2}}[(\w]|"
    rf"[*_]{{0,2}}[A-Z][\w-]{{1,20}}(?: [A-Z][\w-]{{1,20}}){{0,2}}[*_]{{0,2}}:[*_]{{0,2}} )"
)
# Names the part of a document, a step or a remark rather than someone who speaks.
_NO_SPEAKER = re.compile(
    r"(?:steps?|part|chapter|section|title|subject|verse|chorus|bridge|intro\w*|outro|conclusion|summary|abstract|notes?|"
    r"n\.?b|p\.?s|edit|warning|caution|disclaimer|reminder|remember|important|tips?|example|ingredients?|materials?|"
    r"tools?|method|results?|scene|act|int|ext|day|week|phase|stage|rule|lesson|item|goal|objective|plan|reason|source|"
    r"here|there|this|that|these|those|some|the following|for|if|to|in|on|at|by|with|from|as follows|remember|first|"
    r"second|third|next|then|finally|lastly|now|dear|date|time|from|re|fw|http|https|you|i|we|it|what|how|why|when|and|"
    r"but|so|or)\b|\W*\d+\W*$",
    re.IGNORECASE,
)


_SPEAKS = re.compile(
    r"^as (an?|your|my|the|if)?\b|\b(says?|said|repli(es|ed)|answers?|answered|responds?|responded|response|output|"
    r"mode|voice|version|persona|bot|gpt|assistant|translation)\b"
)
_CLOSING = re.compile(r"</[\w -]{1,40}>|\n[ \t]{0,4}[-=_*]{3,}[ \t]{0,4}(?=\n|\Z)")
# Characters of markup before a label at the start.
_START = 3


@dataclass(frozen=True)
class Voice:
    """The words of one speaker.

    Attributes:
        name: The label in lower case; empty for text before the first label.
        text: All that follows this label wherever it occurs, up to the next one.
    """

    name: str
    text: str


def voices(answer: str) -> tuple[Voice, ...]:
    """Split an answer into its voices, in the order of their first words.

    Args:
        answer: An answer as the model gave it, with its markup.

    Returns:
        A single voice if the answer is not visibly divided; its label, if any, is removed.
    """
    if pairs := _values(answer):
        return pairs
    answer = answer.strip()
    labels = _labels(answer)
    if labels and labels[0].at_start:
        answer = _INLINE.sub("\n", answer)
        labels = _labels(answer)
    # A label in the middle of an unlabelled text is a heading or an item of a list, unless it says otherwise.
    labels = [label for label in labels if labels[0].at_start or label.speaks][:MAX_VOICES]
    if not labels:
        return (Voice("", answer),)
    spoken: dict[str, list[str]] = {"": [answer[: labels[0].start]]}
    ends = [label.start for label in labels[1:]] + [len(answer)]
    for label, end in zip(labels, ends, strict=True):
        spoken.setdefault(label.name, []).append(answer[label.end : end])
    found = {name: "\n".join(part for text in texts if (part := _bare(text))) for name, texts in spoken.items()}
    return tuple(Voice(name, text) for name, text in found.items() if text) or (Voice("", answer),)


def is_divided(opening: str) -> bool:
    """Whether the beginning of an answer has the label of a voice, so that others may follow."""
    return any(voice.name for voice in voices(opening))


def _bare(text: str) -> str:
    """A text without the tags and rules that end it."""
    return _CLOSING.sub(" ", text).strip(" \t\n*_-|:>#")


def _values(answer: str) -> tuple[Voice, ...]:
    """The texts in a JSON object, by their keys."""
    head = answer[:40].lstrip("` \n\t").removeprefix("json").lstrip()
    if not head.startswith(("{", "[{")):
        return ()
    return tuple(Voice(pair["name"].lower(), pair["text"]) for pair in _PAIR.finditer(answer))


@dataclass(frozen=True)
class _Label:
    start: int
    end: int
    name: str
    # Whether it cannot be a heading or an item of a list.
    speaks: bool
    at_start: bool


def _labels(text: str) -> list[_Label]:
    """The labels in a text, in order."""
    found: dict[int, _Label] = {}
    for pattern in (_BRACKETED, _NAMED, _LETTERED, _ROW, _BY_EMOJI, _IN_CAPITALS):
        matches = [match for match in pattern.finditer(text) if match.start() not in found]
        names = [match["name"].strip(" *_").lower() for match in matches]
        if pattern in (_BY_EMOJI, _IN_CAPITALS) and len(set(names)) < 2:
            continue
        for match, name in zip(matches, names, strict=True):
            if pattern is not _BY_EMOJI and (_NO_SPEAKER.match(name) or not any(map(str.isalpha, name))):
                continue
            speaks = pattern in (_BRACKETED, _BY_EMOJI) or _SPEAKS.search(name) is not None
            found[match.start()] = _Label(match.start(), match.end(), name, speaks, match.start() <= _START)
    return [found[start] for start in sorted(found)]
