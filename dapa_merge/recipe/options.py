"""Settings of a run that depend on the machine and are therefore not part of a recipe."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import click

from dapa_merge.checkpoint.open import ALLOW_VARIABLE
from dapa_merge.errors import UsageError

DTYPES = ("float32", "bfloat16", "float16")
# Bits of a quantized weight, by the option's value.
QUANTIZATIONS = {"4bit": 4, "8bit": 8}
_UNITS = {
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}
_LIMIT = re.compile(r"(?P<device>cpu|[a-z]+:[0-9]+)=(?P<number>[0-9]+(\.[0-9]+)?)(?P<unit>[KMGT]i?B)", re.IGNORECASE)


@dataclass(frozen=True)
class Where:
    """Where and in which arithmetic models are loaded to be measured.

    Attributes:
        device: A torch device; `auto` is the accelerator, or the CPU, or all of them for a model that does not fit.
        max_memory: Bytes of each device to spread a model over, in this order; empty for what is free.
        dtype: One of `DTYPES`; None for the config's own.
        quantize: One of `QUANTIZATIONS`; None for weights as they are.
    """

    device: str = "auto"
    max_memory: tuple[tuple[str, int], ...] = ()
    dtype: str | None = None
    quantize: str | None = None

    @property
    def parts(self) -> dict[str, str]:
        """The parts of a journal's identity besides the device; empty by default."""
        limits = ",".join(f"{device}={number}" for device, number in self.max_memory)
        found = {"max memory": limits, "dtype": self.dtype, "quantization": self.quantize}
        return {name: value for name, value in found.items() if value}

    @property
    def arithmetic(self) -> str | None:
        """In what figures are computed; None if as each model's config says."""
        weights = self.quantize and f"weights in {self.quantize}"
        return ", ".join(filter(None, (weights, self.dtype))) or None


def parse_memory(text: str | None) -> tuple[tuple[str, int], ...]:
    """Parse limits such as `cuda:0=20GiB,cpu=60GiB` as devices and bytes; empty for None.

    Raises:
        UsageError: If it is anything else, or names a device twice.
    """
    if text is None:
        return ()
    found: dict[str, int] = {}
    for part in text.split(","):
        match = _LIMIT.fullmatch(part.strip())
        size = match and int(float(match["number"]) * _UNITS[match["unit"].upper()])
        if match is None or not size or match["device"].lower() in found:
            raise UsageError(
                f"--max-memory has {part.strip()!r}; name each device once with its limit, as in cuda:0=20GiB,cpu=60GiB"
            )
        found[match["device"].lower()] = size
    return tuple(found.items())


@dataclass(frozen=True)
class Options:
    """Settings for searching and measuring.

    Attributes:
        device: A torch device; `auto` picks an accelerator if present.
        journal: The journal's file; None for one in the user's cache folder.
        uses_ray: Whether to test in Ray actors, each with its own target, instead of this process.
        num_workers: Number of actors; None for one per GPU or, without GPUs, per node.
        evaluator_file: A Python file that registers evaluators.
        task_files: Task files of lm-evaluation-harness, which may run, for recipes that name their tasks.
        judge_model: The judge's model; None for no judge.
        judge_url: The judge's OpenAI-compatible endpoint; None for the client's default.
        judge_requests: Maximum number of requests to the judge; None for no limit.
        allow_pickle: Whether to read pickled weights, as tensors only, if there are no others.
        pick: The number of the point to take, of those that an edit's choice offers; None for the best within limits.
        max_memory: The most of each device that a model may take, as `cuda:0=20GiB,cpu=60GiB`; None for what is free.
        dtype: What models are measured in, one of `DTYPES`; None for the config's own.
        quantize: How the weights of candidates are quantized, one of `QUANTIZATIONS`; None for not at all.
    """

    device: str = "auto"
    journal: Path | None = None
    uses_ray: bool = False
    num_workers: int | None = None
    evaluator_file: Path | None = None
    task_files: tuple[Path, ...] = ()
    judge_model: str | None = None
    judge_url: str | None = None
    judge_requests: int | None = None
    allow_pickle: bool = False
    pick: int | None = None
    max_memory: str | None = None
    dtype: str | None = None
    quantize: str | None = None

    def __post_init__(self) -> None:
        """Raise `UsageError` if the judge has an empty name or address, or memory, dtype or bits are not understood."""
        if parse_memory(self.max_memory) and self.device != "auto":
            raise UsageError(f"--max-memory spreads a model over devices, but --device is {self.device}; leave out one")
        for name, value, known in (("dtype", self.dtype, DTYPES), ("quantize", self.quantize, QUANTIZATIONS)):
            if value is not None and value not in known:
                raise UsageError(f"--{name} is {value!r}; write {', '.join(known)}, or leave it out")
        if self.judge_model is not None and not self.judge_model.strip():
            raise UsageError("the judge has no model name; name the model as its endpoint knows it")
        if self.judge_url is not None:
            check_url(self.judge_url, "the judge's url")

    @property
    def where(self) -> Where:
        """Where and how candidates are loaded."""
        return Where(self.device, parse_memory(self.max_memory), self.dtype, self.quantize)

    def for_worker(self, device: str) -> Options:
        """The same settings for a process with another working folder, perhaps elsewhere, on a kind of device."""
        file, tasks = self.evaluator_file, tuple(task.absolute() for task in self.task_files)
        return replace(
            self,
            # Limits are for `auto` alone.
            device=device if self.max_memory is None else self.device,
            evaluator_file=file and file.absolute(),
            task_files=tasks,
            uses_ray=False,
            num_workers=None,
        )

    @classmethod
    def from_environment(cls, device: str = "auto", environment: Mapping[str, str] = os.environ) -> Options:
        """Read the variables of the fields: `DAPA_ALLOW_PICKLE`, `DAPA_EVALUATOR_FILE`, `DAPA_TASK_FILE` and so on.

        Raises:
            UsageError: If `DAPA_JUDGE_REQUESTS` or `DAPA_PICK` is not a whole number of at least 1.
            click.BadParameter: If `DAPA_ALLOW_PICKLE` is neither yes nor no.
        """
        file, tasks = environment.get("DAPA_EVALUATOR_FILE"), environment.get("DAPA_TASK_FILE") or ""
        return cls(
            device,
            evaluator_file=Path(file) if file else None,
            task_files=tuple(Path(task) for task in tasks.split(os.pathsep) if task),
            judge_model=environment.get("DAPA_JUDGE_MODEL") or None,
            judge_url=environment.get("DAPA_JUDGE_URL") or None,
            judge_requests=parse_number(environment.get("DAPA_JUDGE_REQUESTS"), "DAPA_JUDGE_REQUESTS"),
            allow_pickle=bool(click.BOOL.convert(environment.get(ALLOW_VARIABLE) or "0", None, None)),
            pick=parse_number(environment.get("DAPA_PICK"), "DAPA_PICK"),
            max_memory=environment.get("DAPA_MAX_MEMORY") or None,
            dtype=environment.get("DAPA_DTYPE") or None,
            quantize=environment.get("DAPA_QUANTIZE") or None,
        )


def check_url(url: str, name: str) -> None:
    """Check that a URL such as http://localhost:8000/v1 is a valid HTTP address.

    Args:
        url: The address.
        name: The option or variable that holds it, for the message.

    Raises:
        UsageError: If scheme, host, port or a character is invalid.
    """
    # Reading a port above 65535 raises `ValueError`.
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        is_http = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        if is_http and url.isprintable() and " " not in url:
            return
    raise UsageError(
        f"{name} is not a valid address (scheme, host or port is wrong, or it has a space); "
        "expected something like http://localhost:8000/v1"
    )


def parse_number(text: str | None, name: str) -> int | None:
    """Parse a whole number from the option or variable `name`; None if empty.

    Raises:
        UsageError: If it is not a whole number of at least 1.
    """
    if not text:
        return None
    if not (text.isdecimal() and int(text) > 0):
        raise UsageError(f"{name} is {text!r}; write a whole number of at least 1")
    return int(text)
