"""How models are asked beside the prompts, and models that are served elsewhere: data of `evaluate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dapa_merge.checkpoint.folder import read_regular
from dapa_merge.errors import UsageError, why_unreadable
from dapa_merge.recipe.options import check_url

# A chat template of this name leaves the model's own out.
NO_TEMPLATE = "none"
# Published templates hold less than 50,000 characters.
MAX_TEMPLATE_BYTES = 1 << 20


def read_template(path: Path) -> str:
    """Read a chat template; an empty one would leave the prompts out.

    Raises:
        UsageError: If it cannot be read, or is empty.
    """
    try:
        text = read_regular(path, MAX_TEMPLATE_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the chat template {path}: {why_unreadable(error)}") from error
    if not text.strip():
        raise UsageError(f"the chat template {path} is empty; write {NO_TEMPLATE} to ask without one")
    return text


@dataclass(frozen=True)
class Sampling:
    """How the tokens of responses are drawn.

    Attributes:
        temperature: Divides the logits; from 0.01 to 10.
        top_p: The least likely tokens beyond this probability mass are left out (nucleus sampling, Holtzman et al.
            2020), in (0, 1].
        seed: Decides the draws.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise `UsageError` for a temperature at which float32 has no digits left."""
        # Also false for NaN.
        if not 0.01 <= self.temperature <= 10:
            raise UsageError(f"the temperature is {self.temperature:g}; write 0, or a number from 0.01 to 10")

    def __str__(self) -> str:
        mass = "" if self.top_p == 1 else f", top-p {self.top_p:g}"
        return f"sampled at temperature {self.temperature:g}{mass}, seed {self.seed}"


def sampling_of(
    temperature: float | None, top_p: float | None, seed: int | None, told: Mapping[str, str]
) -> Sampling | None:
    """How tokens are drawn; None for greedy decoding, at a temperature of 0 or None.

    Raises:
        UsageError: If there is nothing to sample for a top-p or a seed; `told` has what a user calls the three.
    """
    if temperature:
        return Sampling(temperature, 1.0 if top_p is None else top_p, 0 if seed is None else seed)
    idle = next((name for name, value in (("top_p", top_p), ("seed", seed)) if value is not None), None)
    if idle is not None:
        raise UsageError(f"{told[idle]} is for sampling; name a {told['temperature']} above 0")
    return None


@dataclass(frozen=True)
class Asking:
    """How models are asked, beside the prompts.

    Attributes:
        system: A system message before every prompt and question; None for none.
        chat_template: A file with a chat template in place of the models' own, or `none`; None for their own.
        sampling: How tokens are drawn; None for greedy decoding.
        limit: Most prompts of a kind, and questions of a skill, spread over all; None for all.
    """

    system: str | None = None
    chat_template: str | None = None
    sampling: Sampling | None = None
    limit: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The settings other than the defaults, as plain data."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def lines(self) -> Iterator[str]:
        """Say what differs from the defaults."""
        if self.system is not None:
            yield f"asked after the system message {self.system!r}"
        if self.chat_template is not None:
            yield f"asked with the chat template {self.chat_template}"
        if self.sampling is not None:
            yield str(self.sampling)
        if self.limit is not None:
            yield f"at most {self.limit} prompts of each kind, spread over all"


@dataclass(frozen=True)
class ServedModel:
    """A model behind an OpenAI-compatible endpoint.

    Attributes:
        name: Its name there.
        url: The endpoint, such as http://localhost:8000/v1.
        concurrency: Most requests under way at once.
    """

    name: str
    url: str
    concurrency: int = 8

    def __post_init__(self) -> None:
        """Raise `UsageError` if the address is invalid or the name is empty."""
        check_url(self.url, "--served")
        if not self.name.strip():
            raise UsageError("the served model has no name; name it with --model, as its server knows it")

    def __str__(self) -> str:
        # A server may know a model by the name of a folder that is measured beside it.
        return f"{self.name} at {urlsplit(self.url).netloc.rpartition('@')[2]}"
