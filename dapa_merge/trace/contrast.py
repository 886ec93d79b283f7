"""What refusing is measured by: how much more likely a model finds a refusal of a prompt than an answer to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from dapa_merge.evaluate.generate import prompt_ids
from dapa_merge.evaluate.likelihood import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# One to six tokens order the miniature's units equally well, eight do worse; four outlast an opening that says little.
NUM_TOKENS = 4


@dataclass(frozen=True)
class Contrast:
    """A harmful prompt, a response that refuses it and one that complies."""

    prompt: str
    refusing: str
    complying: str


class Side(NamedTuple):
    """One response of a contrast after its prompt, and whether it is to be likely (1) or unlikely (-1)."""

    row: Row
    sign: int


def sides_of(tokenizer: PreTrainedTokenizerBase, contrast: Contrast, num_tokens: int) -> list[Side]:
    """The two sides of a contrast, the refusing one first, both of one length; none if the responses do not differ.

    Of each response, `num_tokens` tokens are counted from the first in which the two differ; fewer if one of them ends
    before. What stands before is given.
    """
    context = prompt_ids(tokenizer, contrast.prompt)
    # Alone, as it was decoded: behind the template, some tokenizers would split its first word in another way.
    refusing, complying = (
        list(tokenizer(response, add_special_tokens=False)["input_ids"])
        for response in (contrast.refusing, contrast.complying)
    )
    pairs = zip(refusing, complying, strict=False)
    # What they share has the same likelihood in both, and would be counted for nothing.
    start = next((index for index, (one, other) in enumerate(pairs) if one != other), None)
    if start is None:
        return []
    stop = min(start + num_tokens, len(refusing), len(complying))
    return [
        Side(Row(context + ids[:stop], len(context) + start), sign) for ids, sign in ((refusing, 1), (complying, -1))
    ]
