"""Prompts of several messages: a system message, earlier turns, the beginning of the answer.

A prompt is a text, which is one user message, or a `Conversation`, which is a text too: whatever counts, compares,
stores or shows prompts takes both, and only what asks a model reads the messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from dapa_merge.errors import UsageError
from dapa_merge.recipe.attacks import Attack

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
# Names of roles in public sets (ShareGPT's are human and gpt).
ROLES = {
    "system": SYSTEM, "developer": SYSTEM, "user": USER, "human": USER, "assistant": ASSISTANT, "gpt": ASSISTANT,
    "model": ASSISTANT, "bot": ASSISTANT, "chatbot": ASSISTANT,
}  # fmt: skip


class Message(NamedTuple):
    """A message of a conversation; the role is `system`, `user` or `assistant`."""

    role: str
    content: str


class Conversation(str):
    """A prompt of several messages; as a text, each begins with its role, and its further lines are indented.

    A system message can only be the first. The last one is the user's, or the beginning of the answer, which the model
    continues. Several of the user's in succession are put one after the other, each with the model's own answers to
    those before it (`first_turn`).
    """

    messages: tuple[Message, ...]

    __slots__ = ("messages",)

    def __new__(cls, messages: Iterable[Message]) -> Conversation:
        """Make a prompt of messages, in order."""
        messages = tuple(messages)
        shown = (f"[{role}] " + content.replace("\n", "\n    ") for role, content in messages)
        self = super().__new__(cls, "\n".join(shown))
        self.messages = messages
        return self

    def __reduce__(self) -> tuple[type[Conversation], tuple[tuple[Message, ...]]]:
        return Conversation, (self.messages,)


def messages_of(prompt: str) -> tuple[Message, ...]:
    """The messages of a prompt, without the beginning of the answer."""
    if not isinstance(prompt, Conversation):
        return (Message(USER, prompt),)
    return prompt.messages[:-1] if prompt.messages[-1].role == ASSISTANT else prompt.messages


def opening_of(prompt: str) -> str:
    """The beginning of the answer that a prompt puts into the model's mouth; empty without one."""
    last = prompt.messages[-1] if isinstance(prompt, Conversation) else Message(USER, prompt)
    return last.content if last.role == ASSISTANT else ""


def request_of(prompt: str) -> str:
    """The user's last message, which the answer is judged by."""
    return messages_of(prompt)[-1].content


def first_turn(prompt: str) -> str | None:
    """The conversation up to the first message that waits for the model's own answer; None if only the last does."""
    number = _first_open(prompt)
    return None if number is None else _prompt_of(messages_of(prompt)[: number + 1])


def with_answer(prompt: str, answer: str) -> str:
    """A prompt with an answer to its first turn."""
    number = _first_open(prompt)
    assert number is not None
    before, after = messages_of(prompt)[: number + 1], messages_of(prompt)[number + 1 :]
    return _prompt_of([*before, Message(ASSISTANT, answer), *after], opening_of(prompt))


def answers_between(asked: str, held: str) -> tuple[str, ...]:
    """The answers that a conversation has got since it was asked, in order."""
    if asked is held:
        return ()
    given = iter(messages_of(asked))
    expected, found = next(given, None), []
    for message in messages_of(held):
        if message == expected:
            expected = next(given, None)
        else:
            found.append(message.content)
    return tuple(found)


def num_turns(prompt: str) -> int:
    """The number of answers that a model gives to a prompt."""
    roles = [message.role for message in messages_of(prompt)]
    return 1 + sum(one == other == USER for one, other in pairwise(roles))


def _first_open(prompt: str) -> int | None:
    roles = enumerate(pairwise(message.role for message in messages_of(prompt)))
    return next((number for number, (one, other) in roles if one == other == USER), None)


def with_system(prompt: str, system: str | None) -> str:
    """A prompt after a system message, unless it has one of its own; the prompt itself without a message."""
    if not system or messages_of(prompt)[0].role == SYSTEM:
        return prompt
    return _prompt_of([Message(SYSTEM, system), *messages_of(prompt)], opening_of(prompt))


def attacked(prompt: str, attack: Attack) -> str:
    """A prompt as an attack asks it: with its system message in place of another, and its texts around the request."""
    *before, request = messages_of(prompt)
    if attack.system:
        before = [Message(SYSTEM, attack.system), *(one for one in before if one.role != SYSTEM)]
    request = Message(USER, attack.message(request.content))
    return _prompt_of([*before, request], attack.opening or opening_of(prompt))


def _prompt_of(messages: Sequence[Message], opening: str = "") -> str:
    if len(messages) == 1 and not opening:
        return messages[0].content
    return Conversation([*messages, Message(ASSISTANT, opening)] if opening else messages)


def read_messages(value: Sequence[Mapping[str, Any]], where: str) -> str | None:
    """Read the prompt of a row with chat messages, in the form of OpenAI (`role`, `content`) or ShareGPT.

    An answer at the end is not part of the prompt, unless it has `"prefix": true`: then the model continues it.

    Returns:
        A text if it has one user message and nothing else; None without a user's text.

    Raises:
        UsageError: If a role is unknown, messages are out of order, or one has no text.
    """
    messages, opening = [_read(message, where) for message in value], ""
    if messages and messages[-1].role == ASSISTANT:
        opening = messages[-1].content if value[-1].get("prefix") is True else ""
        messages = messages[:-1]
    roles = [message.role for message in messages]
    if USER not in roles:
        return None
    ordered = roles[roles[0] == SYSTEM :]
    is_twice = (ASSISTANT, ASSISTANT) in pairwise(ordered)
    if ordered[0] != USER or ordered[-1] != USER or SYSTEM in ordered or is_twice:
        raise UsageError(
            f"{where}: its messages are of {', '.join(roles)}; a system message may come first, then the user's, each "
            f"with one answer of the assistant or none, the user's last"
        )
    if empty := next((one.role for one in messages if not one.content.strip()), None):
        raise UsageError(f"{where}: a message of the {empty} is empty; remove it, or give it a text")
    return _prompt_of(messages, opening)


def _read(message: Mapping[str, Any], where: str) -> Message:
    said, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise UsageError(f"{where}: a message has the role {said!r:.40}; known are {', '.join(ROLES)}")
    if isinstance(content, list) and all(isinstance(one, Mapping) and one.get("type") == "text" for one in content):
        content = "\n".join(str(one.get("text")) for one in content)
    if not isinstance(content, str):
        raise UsageError(f"{where}: a message of the {role} has no text; only texts can be asked")
    return Message(role, content)
