"""Output without content: empty, a loop, noise, an echo. Standard library only.

Precision comes first: a short answer in any language, code, a table or a poem must never be taken for noise. Some noise
therefore passes, mostly real words of languages other than English.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from itertools import pairwise

# Minimum characters, repetitions and share of the response of a loop: a repeated phrase at the end of a response.
LOOP_CHARACTERS = 24
LOOP_REPETITIONS = 6
LOOP_SHARE = 0.5
# Longer phrases need fewer repetitions: normal text does not repeat thirty characters four times in a row.
LONG_PHRASE_CHARACTERS = 30
LONG_PHRASE_REPETITIONS = 4
MAX_PHRASE_WORDS = 40
MAX_PHRASE_CHARACTERS = 30
# Compressed bytes per byte. English prose of 400 characters has 0.55, of 1,300 characters 0.45.
MIN_COMPRESSION = 0.15
MIN_COMPRESSED_CHARACTERS = 300
# Minimum share of impossible words in any language that makes a response noise.
NOISE_SHARE = 0.3
MIN_NOISE_WORDS = 8
# Fewer impossible words suffice in a longer text with hardly any function words of any language.
NOISE_SHARE_WITHOUT_GRAMMAR = 0.1
MIN_FUNCTION_SHARE = 0.05
# Minimum number of impossible pairs of English words in noise, and minimum number per word.
MIN_IMPOSSIBLE_PAIRS = 3
IMPOSSIBLE_SHARE = 0.03

_SPECIAL = re.compile(
    r"<\|?/?(?:pad|unk|s|eos|bos|mask|endoftext|im_start|im_end|end_of_turn|eot_id)\|?>|\[(?:PAD|UNK|MASK|SEP|CLS)\]"
)
_WORD = re.compile(r"[^\W\d_]+")
# Pairs of letters and runs of consonants that no European language writes (z after a consonant is Polish).
_UNPRONOUNCEABLE = re.compile(
    r"[jqvx][bcdfghjkmpqtwxz]|[bcdfgjkmpqtvwz][qx]|[bcdfghklmpqstvwxz]j[bcdfghklmpqrstvwxz]|q[aeosnlmr]|"
    r"[bcdfghjklmnpqrstvwxz]{6}|^[bcdfghjklmnpqrstvwxz]{5,}$|[aeiou]{5}|^(hn|tg|lm|rn|dt|nr|sr|mt|nh|"
    r"rt|nt|lt|td|ht|ln|fm|hd|rd|gt|tn|hl|ns|pm|pn|rl|rg|rm|ls|lr|lw)|(.)\1\1"
)
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "the and for are was were with you that this not have from your can but they will has his her its "
        "their which or que los las una para por con del como más les des une est pas pour dans vous sur "
        "avec der die das und ist nicht ein eine den von mit auf für che per non sono della gli não uma com "
        "dos een het van dat niet zijn voor met jest nie się jak och att det som inte bir için ile yang dan "
        "untuk dengan tidak của và các không",
    )
)
# "The of", "for is", "they was"; not "the can", "the will".
_IMPOSSIBLE_PAIR = re.compile(
    r"\b(?:(?:the|a|an|my|your|our|their|every) (?=(?:the|a|an|of|to|and|or|is|are|was|were|be|been|in|on|at|by|with|"
    r"for|from|that|it|you|they|we|he|she|i|could|would|should|has|have|do|does|if|but|because|as|not)\b)|"
    r"(?:of|to|for|with|from|by|at|in|on) (?=(?:is|are|was|were|of|could|would|should|has|does|but)\b)|"
    r"(?:and|or|but) (?=(?:and|or|of|but)\b)|"
    r"(?:could|should|would|must) (?=(?:is|are|was|were|to|a|an|and|or|in|for|with|could|should|would)\b)|"
    r"(?:i|you|they|it|he|she|we) (?=(?:of|an|a)\b)|"
    r"(?:is|are|was|were) (?=(?:is|are|was|were|could|should|would|have|has)\b)|"
    r"(?:they|you|we) (?=(?:is|was|has)\b)|it (?=(?:are|have)\b)|"
    r"(?P<twice>(?!that|had|no|very|so|bye|ha|row)[a-z]+)(?: (?P=twice)\b)+|not (?=(?:of|is|are|and)\b))",
    re.IGNORECASE,
)
# `re` does not count vowel signs and the like as letters, but they are part of words.
_SIGNS = re.compile(r"[^\w\s\u0300-\u036f\u0600-\u06ff\u0900-\u0dff\u0e00-\u0eff]")
_CODE = re.compile(r"[(){}\[\]=;<>]")
_SPACELESS = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "FULLWIDTH")
_MOJIBAKE = re.compile(
    "\N{REPLACEMENT CHARACTER}|[\u00c3\u00c2\u00e2]"
    "[\u0080-\u00bf\u20ac\u201a-\u201e\u2020-\u2026\u0152\u0153\u0160\u0161\u2122\u02c6\u02dc]"
)
_WANTS_REPETITION = re.compile(
    r"\b(repeat\w*|times|copies|over and over|again and again|echo|copy|translate|quote)\b|重复|重複|"
    r"repite|wiederhol|répète",
    re.I,
)


def is_degenerate(answer: str, prompt: str | None = None) -> bool:
    """Whether an answer, without its thought, has no content; repetition is fine if the prompt asks for it or repeats."""
    text = _SPECIAL.sub(" ", answer).strip()
    if not any(character.isalnum() for character in text):
        return True
    return _is_noise(text) or _is_echo(text, prompt) or (not _allows_loops(text, prompt) and _is_loop(text))


def is_echo_so_far(answer: str, prompt: str | None) -> bool:
    """Whether a beginning so far only repeats the prompt's words."""
    asked = _WORD.findall((prompt or "").lower())
    said = _WORD.findall(answer.lower())[:-1]
    return bool(said) and said == asked[: len(said)]


def _is_echo(text: str, prompt: str | None) -> bool:
    asked = _WORD.findall((prompt or "").lower())
    if len(asked) < 4 or _WANTS_REPETITION.search(prompt or ""):
        return False
    return _WORD.findall(text.lower()) == asked


def _allows_loops(text: str, prompt: str | None) -> bool:
    if not prompt:
        return False
    if _WANTS_REPETITION.search(prompt):
        return True
    return len(prompt) >= MIN_COMPRESSED_CHARACTERS and _compression(text) > 0.6 * _compression(prompt)


def _compression(text: str) -> float:
    data = text.encode(errors="replace")
    return len(zlib.compress(data, 9)) / len(data)


def _is_loop(text: str) -> bool:
    if len(text) < LOOP_CHARACTERS:
        return False
    # Numbers may well repeat: a matrix, a binary number, a row of a table.
    if not any(character.isalpha() for character in text):
        return False
    if len(text) >= MIN_COMPRESSED_CHARACTERS and _compression(text) < MIN_COMPRESSION:
        return True
    words = text.split()
    if _ends_in_loop(words, [len(word) + 1 for word in words], MAX_PHRASE_WORDS, len(text)):
        return True
    compact = "".join(words)
    if _ends_in_loop(list(compact), [1] * len(compact), MAX_PHRASE_CHARACTERS, len(compact)):
        return True
    lines = Counter(line.strip() for line in text.splitlines())
    return any(
        count >= LOOP_REPETITIONS and len(line) >= 12 and count * len(line) >= LOOP_SHARE * len(text)
        for line, count in lines.items()
    )


def _ends_in_loop(items: list[str], lengths: list[int], max_period: int, total: int) -> bool:
    """Whether the sequence ends in a repeated phrase; the last repetition may be cut off."""
    # The last item may be an incomplete word.
    items, lengths = items[:-1], lengths[:-1]
    for period in range(1, min(max_period, len(items) // 2) + 1):
        matching = 0
        while matching < len(items) - period and items[-1 - matching] == items[-1 - matching - period]:
            matching += 1
        if matching < period:
            continue
        repetitions = matching / period + 1
        covered = sum(lengths[-matching - period :])
        phrase = covered / repetitions
        needed = LONG_PHRASE_REPETITIONS if phrase >= LONG_PHRASE_CHARACTERS else LOOP_REPETITIONS
        if not any(character.isalpha() for item in items[-period:] for character in item):
            # Rules of tables and dotted lines.
            continue
        if repetitions >= needed and covered >= max(LOOP_CHARACTERS, LOOP_SHARE * total):
            return True
    return False


def _is_noise(text: str) -> bool:
    # Code and mathematics have many symbols, but are not mostly symbols.
    if len(text) >= 20 and "```" not in text:
        plain = len(text) - len(_SIGNS.findall(text))
        if plain < 0.35 * len(text) and not re.search(r"[-|=+]{3}", text):
            return True
    if len(_MOJIBAKE.findall(text)) > max(3, len(text) / 40):
        return True
    words = _WORD.findall(text)
    if not text.isascii() and len(words) >= MIN_NOISE_WORDS and _mixes_scripts(words):
        return True
    # A word with inner capitals, digits or marks is an identifier, not prose.
    prose = [word for word in words if len(word) >= 4 and word.isascii() and (word[1:].islower())]
    strange = sum(_UNPRONOUNCEABLE.search(word.lower()) is not None for word in prose)
    if len(prose) < MIN_NOISE_WORDS or "```" in text or len(_CODE.findall(text)) > 0.02 * len(text):
        return False
    if len(_IMPOSSIBLE_PAIR.findall(text)) >= max(MIN_IMPOSSIBLE_PAIRS, IMPOSSIBLE_SHARE * len(words)):
        return True
    function_words = sum(word.lower() in _FUNCTION_WORDS for word in words)
    few = function_words < MIN_FUNCTION_SHARE * len(words) and len(prose) >= 2 * MIN_NOISE_WORDS
    return strange >= (NOISE_SHARE_WITHOUT_GRAMMAR if few else NOISE_SHARE) * len(prose)


def _script(character: str) -> str:
    if character.isascii():
        return "LATIN"
    name = unicodedata.name(character, "UNKNOWN").split(" ", 1)[0]
    return "SPACELESS" if name in _SPACELESS else name


def _mixes_scripts(words: list[str]) -> bool:
    """Whether scripts change at random: inside words, or from word to word among several scripts."""
    sets = [{_script(character) for character in word if unicodedata.category(character)[0] == "L"} for word in words]
    # Chinese, Japanese and Korean put Latin words between their own without a space.
    mixed = sum(len(scripts) > 1 for scripts in sets if scripts != {"SPACELESS", "LATIN"})
    if mixed >= 3 and mixed > 0.2 * len(words):
        return True
    pairs = list(pairwise(sets))
    changes = sum(not (before & after) for before, after in pairs)
    return len(set().union(*sets)) >= 4 and changes > 0.5 * len(pairs)
