"""Merges a LoRA adapter into its base: only the tensors that it changes are computed, and only their bytes change.

A changed tensor is W + s B A in float32 (in float64 for a base of float64), rounded once to the base's dtype, as in
`merge_and_unload` of peft 0.21, whose names and settings this follows. For embeddings and `target_parameters` peft
rounds s B A before it adds it, and then the sum; here only the sum is rounded.

Every tensor of the adapter is used, or named in an error. Left out on purpose, and refused: adapters that are not LoRA;
variants of it whose sum is not W + s B A or DoRA's; weights that a file holds in another form than the module that was
trained (fused or split projections, except experts).
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import BufferedReader
from pathlib import Path
from shutil import copyfile
from typing import Any

import regex
import torch

from dapa_merge.checkpoint.folder import ADAPTER_CONFIG_NAME, open_regular
from dapa_merge.checkpoint.header import TORCH_NAMES, Tensor, read_header
from dapa_merge.checkpoint.open import TILE, Checkpoint, iterate_bytes
from dapa_merge.checkpoint.spelling import CONV1D, EMBEDDINGS, FUSED_EXPERTS, HEADS, bare_name
from dapa_merge.errors import CheckpointError

_ALL = "all-linear"
# What wrappers of trainers put into names.
_WRAPPED = regex.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_SAVED = regex.compile(r"\.modules_to_save(?:\.default)?(?=\.)")
# A factor's name, with the adapter's own name in it before peft 0.3 and in trainers' checkpoints.
_FACTOR = regex.compile(
    r"(?P<module>.+)\.(?P<factor>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|trainable_tokens_delta)(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<leaf>weight|bias))?"
)
_EXPERT = regex.compile(r"(?P<parent>.*\bexperts)\.(?P<number>\d+)\.(?P<leaf>\w+)\.weight")
_LAYER = regex.compile(r"(?P<stack>.*?)\.(?P<number>\d+)\.(?P<rest>.+)")
_NUMBER = regex.compile(r"\d+")
# Ranks and factors beyond it are an error, or a joke.
_LARGEST = 1e30
# For all patterns of a config together: a stranger's can take for ever.
PATTERN_SECONDS = 20.0


@dataclass(frozen=True)
class _Product:
    """A change s B A of a matrix.

    Attributes:
        a: The factor A, `[rank, inputs]`; for all experts at once `[experts * rank, inputs]`.
        b: The factor B, `[outputs, rank]`; for all experts at once `[outputs, rank * experts]`.
        scale: The factor s.
        is_transposed: Whether the matrix is stored as `[inputs, outputs]`.
        magnitude: DoRA's norms of the rows of W + s B A, `[outputs]`.
        num_experts: Number of experts in the factors.
        expert: Index of the matrix's expert; None for a matrix of all experts, `[experts, ...]`, or without experts.
        rows: The outputs that the matrix has, from all of B; None if all.
    """

    a: Tensor
    b: Tensor
    scale: float
    is_transposed: bool = False
    magnitude: Tensor | None = None
    num_experts: int = 1
    expert: int | None = None
    rows: tuple[int, int] | None = None


@dataclass
class _Change:
    """The steps that change one tensor of the base, in order: replace it, add to it, replace single rows."""

    whole: Tensor | None = None
    product: _Product | None = None
    addend: tuple[Tensor, float] | None = None
    rows: tuple[Tensor, tuple[int, ...]] | None = None


class Merge:
    """An adapter that fits its base.

    Attributes:
        shards: The files of the base that change.
    """

    def __init__(self, base: Checkpoint, config: Mapping[str, Any], weights: Path, name: str) -> None:
        """Read the adapter's names and shapes, and check that all can be merged; nothing is computed yet.

        Args:
            base: The model.
            config: The adapter's `adapter_config.json`, checked to be that of a LoRA.
            weights: Its safetensors.
            name: The adapter, in messages.

        Raises:
            CheckpointError: If it cannot be merged exactly into this base.
        """
        self._base, self._config, self._weights, self._name = base, config, weights, name
        self._changes: dict[str, _Change] = {}
        self._pattern_seconds = PATTERN_SECONDS
        # An output head for a base that has none of its own.
        self._tied_head: Tensor | None = None
        whole: dict[str, Tensor] = {}
        modules: dict[str, dict[int, dict[str, Tensor]]] = {}
        for tensor in read_header(weights):
            if tensor.dtype not in TORCH_NAMES:
                raise self._refusal(f"{tensor.name} is {tensor.dtype}, and only float tensors can be merged")
            place, depth, factor = _parse(tensor.name)
            found = whole if factor is None else modules.setdefault(place, {}).setdefault(depth, {})
            if (other := found.setdefault(factor or place, tensor)) is not tensor:
                raise self._refusal(f"{other.name} and {tensor.name} are for the same tensor of the base; keep one")
        for place, tensor in whole.items():
            self._replace(place, tensor)
        for place, depths in modules.items():
            self._add(place, depths)
        if not self._changes:
            raise self._refusal("it holds no tensor")
        self._check_tied()
        self._check_complete(modules)
        self.shards = tuple(dict.fromkeys(base.tensors[place].file for place in self._changes))

    def write(self, folder: Path) -> None:
        """Write the changed files into a folder; all bytes but those of changed tensors are the base's.

        Raises:
            CheckpointError: If a file cannot be read, or a value is not finite.
        """
        # Experts share factors: keep the last ones.
        read = lru_cache(maxsize=4)(self._read)
        for shard in self.shards:
            # Raises, if it is unreadable, what blames the base rather than the cache.
            self._base.open(shard).close()
            copyfile(self._base.path(shard), folder / shard)
            # The base's own mode may not allow writing.
            (folder / shard).chmod(0o644)
            with (folder / shard).open("r+b") as file:
                for place, change in self._changes.items():
                    tensor = self._base.tensors[place]
                    if tensor.file == shard:
                        file.seek(tensor.start)
                        for tile in self._tiles(tensor, change, read):
                            if not bool(tile.isfinite().all()):
                                raise self._refusal(f"{place} would hold a value that is not finite in {tensor.dtype}")
                            file.write(tile.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _refusal(self, reason: str) -> CheckpointError:
        return CheckpointError(f"the adapter {self._name} cannot be merged into {self._base.name}: {reason}")

    # Which tensors of the base change.

    @cached_property
    def _by_bare_name(self) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {}
        for tensor in self._base.tensors.values():
            found.setdefault(bare_name(tensor.name), []).append(tensor)
        return found

    def _find(self, place: str) -> Tensor | None:
        """The base's tensor of a module's parameter; None if it has none."""
        if place in self._base.tensors:
            return self._base.tensors[place]
        found = self._by_bare_name.get(bare_name(place), [])
        if len(found) > 1:
            raise self._refusal(f"{place} may be {found[0].name} or {found[1].name}")
        return found[0] if found else None

    def _set(self, target: Tensor, step: str, value: object) -> None:
        """Add a step to what becomes of a tensor of the base."""
        change = self._changes.setdefault(target.name, _Change())
        if target.dtype not in TORCH_NAMES:
            raise self._refusal(f"{target.name} is {target.dtype}, and only float tensors can be changed")
        if getattr(change, step) is not None:
            raise self._refusal(f"several of its tensors are for {target.name}")
        setattr(change, step, value)

    def _replace(self, place: str, tensor: Tensor) -> None:
        if (target := self._find(place)) is None:
            self._set_aside(place, tensor)
            return
        if tensor.shape != target.shape:
            raise self._misfit(tensor, target)
        self._set(target, "whole", tensor)

    def _set_aside(self, place: str, tensor: Tensor) -> None:
        """Keep what is for an output head that the base may share with its embeddings; nothing else may be left."""
        if not _is_outside(place, HEADS):
            raise self._refusal(f"{tensor.name} has no counterpart there; name the base that it was trained on")
        self._tied_head = tensor

    def _add(self, place: str, depths: Mapping[int, dict[str, Tensor]]) -> None:
        first = next(iter(depths[min(depths)].values()))
        if (target := self._find(f"{place}.weight")) is None:
            if not self._add_to_experts(place, depths):
                self._set_aside(place, first)
            return
        if len(depths) > 1:
            raise self._refusal(f"{first.name} is one of {len(depths)} changes of the same tensor")
        (factors,) = map(dict, depths.values())
        if tokens := factors.pop("trainable_tokens_delta", None):
            self._set(target, "rows", (tokens, self._token_rows(place, tokens, target)))
            if not factors:
                return
        by_parameter = _is_among(f"{place}.weight", self._config.get("target_parameters") or ())
        if not by_parameter and not self._is_asked_for(place):
            raise self._refusal(f"{first.name} is not of a module that {ADAPTER_CONFIG_NAME} names as its target")
        is_embedding = "lora_embedding_A" in factors
        a, b = (factors.pop(f"lora_{'embedding_' if is_embedding else ''}{one}", None) for one in "AB")
        if a is None or b is None:
            raise self._refusal(f"{first.name} is without its other factor, lora_{'A' if a is None else 'B'}")
        magnitude, bias = factors.pop("lora_magnitude_vector", None), factors.pop("lora_B.bias", None)
        if factors:
            raise self._refusal(f"{next(iter(factors.values())).name} is not a part of such a LoRA")
        if (magnitude is None) == (use_dora := bool(self._config.get("use_dora"))):
            has = "lacks" if use_dora else "has"
            raise self._refusal(
                f"{a.name} {has} a magnitude vector, but use_dora in {ADAPTER_CONFIG_NAME} is {use_dora}"
            )
        transposed = self._is_transposed(a, b, target, is_embedding)
        scale = self._scale(f"{place}.weight" if by_parameter else place, a, 1)
        if magnitude is not None and magnitude.num_parameters != b.shape[0]:
            raise self._misfit(magnitude, target)
        self._set(target, "product", _Product(a, b, scale, transposed, magnitude))
        if bias is not None:
            if (other := self._find(f"{place}.bias")) is None:
                raise self._refusal(f"{bias.name} has no counterpart there: {target.name} has no bias")
            if bias.shape != other.shape:
                raise self._misfit(bias, other)
            self._set(other, "addend", (bias, scale))

    def _is_transposed(self, a: Tensor, b: Tensor, target: Tensor, is_embedding: bool) -> bool:
        if len(a.shape) != 2 or len(b.shape) != 2 or len(target.shape) != 2 or a.shape[0] != b.shape[1]:
            raise self._misfit(a, target, b)
        stored, module = target.shape, (b.shape[0], a.shape[1])
        if is_embedding or (module == stored[::-1] and module != stored):
            if module != stored[::-1]:
                raise self._misfit(a, target, b)
            return True
        if module != stored:
            raise self._misfit(a, target, b)
        return stored[0] == stored[1] and self._base.config.get("model_type") in CONV1D

    def _add_to_experts(self, place: str, depths: Mapping[int, dict[str, Tensor]]) -> bool:
        """Add a LoRA of `target_parameters`, for all experts at once; returns False if the base has none there."""
        named = tuple(self._config.get("target_parameters") or ())
        # peft wraps the parameters of a module one around the other, in the order in which the module has them.
        leaves = [leaf for leaf in FUSED_EXPERTS if _is_among(f"{place}.{leaf}", named)]
        if not leaves:
            return False
        if len(leaves) != len(depths):
            raise self._refusal(
                f"{place} has {len(depths)} pairs of factors, and target_parameters in {ADAPTER_CONFIG_NAME} name "
                f"{' and '.join(leaves)}"
            )
        for leaf, depth in zip(leaves, sorted(depths, reverse=True), strict=True):
            factors = depths[depth]
            first = next(iter(factors.values()))
            if set(factors) != {"lora_A", "lora_B"}:
                raise self._refusal(f"{first.name} is without its other factor, or is not a part of such a LoRA")
            a, b = factors["lora_A"], factors["lora_B"]
            if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
                raise self._refusal(f"{a.name} {list(a.shape)} and {b.name} {list(b.shape)} are not a pair")
            if target := self._find(f"{place}.{leaf}"):
                self._add_to_fused(f"{place}.{leaf}", a, b, target)
            elif not self._add_to_each(place, leaf, a, b):
                return False
        return True

    def _add_to_fused(self, place: str, a: Tensor, b: Tensor, target: Tensor) -> None:
        module = (b.shape[0], a.shape[1])
        if len(target.shape) != 3 or target.shape[1:] not in (module, module[::-1]):
            raise self._misfit(a, target, b)
        if module[0] == module[1]:
            raise self._refusal(f"{a.name} is for square matrices, {list(module)}, which may be stored either way")
        scale = self._scale(place, a, num_experts := target.shape[0])
        is_transposed = target.shape[1:] != module
        self._set(target, "product", _Product(a, b, scale, is_transposed, num_experts=num_experts))

    def _add_to_each(self, place: str, leaf: str, a: Tensor, b: Tensor) -> bool:
        """Divide a LoRA of all experts among the base's tensors of single experts, if it has such."""
        layer = _LAYER.fullmatch(bare_name(place))
        start = f"{layer['stack']}.{layer['number']}." if layer else ""
        # Mixtral's files have `block_sparse_moe` where transformers 5 has `mlp`.
        matches = [
            match for name in self._by_bare_name if name.startswith(start) and (match := _EXPERT.fullmatch(name))
        ]
        if len({match["parent"] for match in matches}) != 1:
            return False
        for leaves in FUSED_EXPERTS[leaf]:
            found = {
                (int(match["number"]), match["leaf"]): match.string for match in matches if match["leaf"] in leaves
            }
            if not found:
                continue
            num_experts = 1 + max(number for number, _ in found)
            scale = self._scale(f"{place}.{leaf}", a, num_experts)
            for number in range(num_experts):
                position = 0
                for part in leaves:
                    target = self._find(found.get((number, part), f"{place}.{number}.{part}.weight"))
                    if target is None:
                        raise self._refusal(f"the base lacks {place}.{number}.{part}.weight")
                    rows = position, position + target.shape[0]
                    if target.shape[1:] != a.shape[1:] or rows[1] > b.shape[0]:
                        raise self._misfit(a, target, b)
                    position = rows[1]
                    product = _Product(a, b, scale, num_experts=num_experts, expert=number, rows=rows)
                    self._set(target, "product", product)
                if position != b.shape[0]:
                    raise self._refusal(f"{b.name} has {b.shape[0]} outputs, and an expert of the base {position}")
            return True
        return False

    def _scale(self, place: str, a: Tensor, num_experts: int) -> float:
        """The factor s for a module, by its rank, which must be that of its factors."""
        rank, alpha = (
            self._setting(place, *names) for names in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
        )
        if a.shape[0] != rank * num_experts:
            of_all = f" for each of {num_experts} experts" if num_experts > 1 else ""
            raise self._refusal(
                f"{a.name} has rank {a.shape[0]}, but {ADAPTER_CONFIG_NAME} says {rank:g}{of_all}; they are not of the "
                f"same adapter"
            )
        return alpha / math.sqrt(rank) if self._config.get("use_rslora") else alpha / rank

    def _setting(self, place: str, key: str, patterns: str) -> float:
        """A number of the config for one module: that of the first pattern that its name ends in, or the common one."""
        value = self._config.get(key, 8)
        for pattern, special in (self._config.get(patterns) or {}).items():
            if self._matches(rf"(?:.*\.)?(?:{pattern})$", place, f"{patterns}: {pattern}"):
                value = special
                break
        if type(value) not in (int, float) or not 0 < abs(value) < _LARGEST:
            raise self._refusal(
                f"{key} of {place} in {ADAPTER_CONFIG_NAME} is {str(value)[:30]!r}, not a number, or zero"
            )
        return float(value)

    def _matches(self, pattern: str, place: str, what: str) -> bool:
        started = time.monotonic()
        try:
            return regex.fullmatch(pattern, place, timeout=max(self._pattern_seconds, 0.001)) is not None
        except (regex.error, TimeoutError) as error:
            raise self._refusal(
                f"{what[:120]!r} in {ADAPTER_CONFIG_NAME} is not a pattern that can be matched in time"
            ) from error
        finally:
            self._pattern_seconds -= time.monotonic() - started

    def _token_rows(self, place: str, tokens: Tensor, target: Tensor) -> tuple[int, ...]:
        """The rows of an embedding that `trainable_token_indices` names."""
        named = self._config.get("trainable_token_indices")
        if isinstance(named, dict):
            named = next((rows for name, rows in named.items() if _is_among(place, [name])), None)
        if not isinstance(named, list) or not all(type(row) is int for row in named):
            raise self._refusal(f"{tokens.name} replaces tokens that {ADAPTER_CONFIG_NAME} does not name")
        if tokens.shape != (len(named), *target.shape[1:]) or len(target.shape) != 2:
            raise self._misfit(tokens, target)
        if outside := [row for row in named if not 0 <= row < target.shape[0]]:
            raise self._refusal(
                f"it is for another vocabulary: it changes token {outside[0]}, and {target.name} has {target.shape[0]}"
            )
        return tuple(named)

    def _misfit(self, tensor: Tensor, target: Tensor, other: Tensor | None = None) -> CheckpointError:
        """The error for a tensor, or a pair of factors, of another size than the base's."""
        shape = tensor.shape if other is None else (*other.shape[:1], *tensor.shape[1:])
        if _is_outside(target.name, (*EMBEDDINGS, *HEADS)):
            if "lora_embedding_A" in tensor.name:
                shape = shape[::-1]
            return self._refusal(
                f"it is for another vocabulary or size: its {tensor.name} is for {list(shape)}, and {target.name} is "
                f"{list(target.shape)}; name the base that it was trained on, with its vocabulary"
            )
        return self._refusal(
            f"it is for a model of another size: its {tensor.name} is for {list(shape)}, and {target.name} is "
            f"{list(target.shape)}; name the base that it was trained on"
        )

    # Whether nothing was left out.

    def _check_tied(self) -> None:
        """Refuse a change of the embeddings or the output head alone where the base has one tensor for both."""
        heads = [name for name in self._base.tensors if _is_outside(name, HEADS)]
        embedding = next((change for name, change in self._changes.items() if _is_outside(name, EMBEDDINGS)), None)
        head = next((self._changes[name] for name in heads if name in self._changes), None)
        if self._tied_head:
            head = _Change(whole=self._tied_head)
        if (head is None and embedding is None) or (heads and not self._is_tied(heads[0])):
            return
        if head is None and embedding is not None and not heads:
            # peft puts single tokens into both.
            if self._config.get("ensure_weight_tying") or not (embedding.whole or embedding.product):
                return
        elif (
            (head and embedding and head.whole and embedding.whole)
            and not (head.product or embedding.product)
            and torch.equal(self._read(head.whole), self._read(embedding.whole))
        ):
            return
        raise self._refusal(
            "it changes the embeddings and the output head apart, and the base has one tensor for both "
            "(tie_word_embeddings); save the base with a head of its own, or train with ensure_weight_tying"
        )

    def _is_tied(self, head: str) -> bool:
        """Whether a base that has an output head of its own replaces it by its embeddings."""
        for config in (self._base.config, self._base.config.get("text_config")):
            if isinstance(config, dict) and config.get("tie_word_embeddings") is not None:
                return bool(config["tie_word_embeddings"])
        # Some architectures do without being told; their files have it twice.
        embeddings = (tensor for name, tensor in self._base.tensors.items() if _is_outside(name, EMBEDDINGS))
        ours = self._base.tensors[head]
        return any(
            one.num_bytes == ours.num_bytes
            and all(map(operator.eq, iterate_bytes(self._base, one), iterate_bytes(self._base, ours)))
            for one in embeddings
        )

    def _is_asked_for(self, place: str) -> bool:
        """Whether the config asks for a module, by peft's rules."""
        targets = self._config.get("target_modules")
        excluded = self._config.get("exclude_modules") or ()
        if isinstance(excluded, str):
            if self._matches(excluded, place, "exclude_modules"):
                return False
        elif _is_among(place, excluded):
            return False
        if any(f".{name}." in f".{place}." for name in self._config.get("modules_to_save") or ()):
            return False
        if isinstance(targets, str):
            return targets == _ALL or self._matches(targets, place, "target_modules")
        only, within = self._config.get("layers_to_transform"), self._config.get("layers_pattern") or "[^.]*"
        if only in (None, []) or not _is_among(place, targets or ()):
            return _is_among(place, targets or ())
        stacks, numbers = ("|".join(map(str, one if isinstance(one, list) else [one])) for one in (within, only))
        # The first number counts: others are of experts.
        return self._matches(rf"(?>(?:.*?\.)?(?:{stacks})\.(?=\d+\.))(?:{numbers})\..*", place, "layers_pattern")

    def _check_complete(self, modules: Iterable[str]) -> None:
        """Refuse an adapter that lacks modules which its config asks for; peft would leave those as they are.

        Only stacks of layers that it touches are searched, since an adapter of a language model has none for the one
        that sees images, and only layers that the model runs, not those for the prediction of further tokens.
        """
        # The stacks, and the wrappers around them as the adapter writes them.
        stacks: dict[str | None, str] = {}
        for place in modules:
            if layer := _LAYER.fullmatch(name := bare_name(place)):
                stacks[layer["stack"]] = place[: len(place) - len(name)]
        named = self._config.get("target_modules")
        config = self._base.config.get("text_config")
        num_layers = (config if isinstance(config, dict) else self._base.config).get("num_hidden_layers")
        num_layers = num_layers if isinstance(num_layers, int) else math.inf
        # These are in every layer, or in none.
        kinds = {
            _NUMBER.sub("*", bare_name(name))
            for name, change in self._changes.items()
            if change.product and (named == _ALL or change.product.num_experts > 1)
        }
        for name, (tensor, *_) in self._by_bare_name.items():
            place, layer = name.removesuffix(".weight"), _LAYER.fullmatch(name)
            if tensor.name in self._changes or len(tensor.shape) < 2:
                continue
            if layer is None:
                is_missing = (
                    _is_outside(place, (*EMBEDDINGS, *HEADS)) and isinstance(named, list) and self._is_asked_for(place)
                )
            elif layer["stack"] not in stacks or (layer["stack"] == "layers" and int(layer["number"]) >= num_layers):
                continue
            else:
                is_missing = _NUMBER.sub("*", name) in kinds or (
                    (place != name and named != _ALL) and self._is_asked_for(stacks[layer["stack"]] + place)
                )
            if is_missing:
                raise self._refusal(
                    f"it lacks weights for {tensor.name}, which its {ADAPTER_CONFIG_NAME} asks for; name the base that "
                    f"it was trained on"
                )

    # The arithmetic.

    def _read(self, tensor: Tensor) -> torch.Tensor:
        """A tensor of the adapter, in float32 or its own larger dtype."""
        with open_regular(self._weights) as file:
            file.seek(tensor.start)
            return _floats(self._exactly(file, tensor.num_bytes), tensor)

    def _exactly(self, file: BufferedReader, num_bytes: int) -> bytes:
        if len(raw := file.read(num_bytes)) < num_bytes:
            raise self._refusal(f"{file.name} became shorter while it was read")
        return raw

    def _tiles(self, target: Tensor, change: _Change, read: Callable[[Tensor], torch.Tensor]) -> Iterator[torch.Tensor]:
        """The new values of a tensor, in order and in its dtype, a few rows at a time."""
        dtype = getattr(torch, TORCH_NAMES[target.dtype])
        work = torch.promote_types(dtype, torch.float32)
        matrices, shape = (target.shape[0], target.shape[1:]) if len(target.shape) == 3 else (1, target.shape)
        num_rows = shape[0] if shape else 1
        row = math.prod(shape[1:])
        step = max(1, TILE // max(row, 1))
        product = change.product
        if product is not None and product.magnitude is not None and product.is_transposed:
            # The norm of an output is that of a column.
            step = num_rows
        with self._base.open(target.file, target.start, target.stop) as file:
            for matrix in range(matrices):
                for first in range(0, num_rows, step):
                    stop = min(first + step, num_rows)
                    raw = self._exactly(file, (stop - first) * row * dtype.itemsize)
                    values = _floats(raw, target).to(work).reshape(stop - first, *shape[1:])
                    if change.whole is not None:
                        values = read(change.whole).to(dtype).to(work).reshape(target.shape)[first:stop]
                    if product is not None:
                        expert = product.expert if product.expert is not None else matrix
                        values = _changed(values, product, expert, first, stop, lambda one: read(one).to(work))
                    if change.addend is not None:
                        addend, scale = change.addend
                        values = values + read(addend).to(work)[first:stop].reshape(values.shape) * scale
                    if change.rows is not None:
                        tokens, rows = change.rows
                        values = values.clone()
                        for number, token in enumerate(rows):
                            if first <= token < stop:
                                values[token - first] = read(tokens)[number].to(work)
                    yield values.to(dtype)


def _changed(
    values: torch.Tensor,
    product: _Product,
    expert: int,
    first: int,
    stop: int,
    read: Callable[[Tensor], torch.Tensor],
) -> torch.Tensor:
    """Add s B A to rows of a matrix, and scale its outputs to DoRA's magnitudes."""
    a, b = read(product.a), read(product.b)
    if product.num_experts > 1:
        # peft's order: in A the ranks of an expert follow each other, in B those of all experts alternate.
        a = a.reshape(product.num_experts, -1, a.shape[-1])[expert]
        b = b.reshape(b.shape[0], -1, product.num_experts)[:, :, expert]
    if product.rows is not None:
        b = b[product.rows[0] : product.rows[1]]
    delta = (b @ a[:, first:stop]).T if product.is_transposed else b[first:stop] @ a
    values = values + delta * product.scale
    if product.magnitude is None:
        return values
    magnitude = read(product.magnitude).reshape(-1)
    if product.is_transposed:
        scales: torch.Tensor = magnitude / torch.linalg.norm(values.T, dim=1)
    else:
        scales = (magnitude[first:stop] / torch.linalg.norm(values, dim=1))[:, None]
    return scales * values


def _floats(raw: bytes, tensor: Tensor) -> torch.Tensor:
    """Bytes of a tensor as a flat float32 tensor, or float64 if it is; whole tensors in their shape."""
    values = torch.frombuffer(bytearray(raw), dtype=getattr(torch, TORCH_NAMES[tensor.dtype]))
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return values.reshape(tensor.shape) if values.numel() == tensor.num_parameters else values


def _parse(key: str) -> tuple[str, int, str | None]:
    """Divide an adapter's key.

    Returns:
        The module that it belongs to, or the whole parameter that it replaces; how deep the module lies in others of
        peft's; and the factor, None for a whole parameter.
    """
    place = _WRAPPED.sub("", key).removeprefix("module.")
    while place.startswith("base_model.model."):
        place = place.removeprefix("base_model.model.")
    match = _FACTOR.fullmatch(place)
    if match is None:
        return _SAVED.sub("", place).replace(".base_layer.", "."), 0, None
    module = match["module"].removesuffix(".token_adapter")
    bare = module.removesuffix(".base_layer")
    depth = 0
    while bare != module:
        depth, module, bare = depth + 1, bare, bare.removesuffix(".base_layer")
    return module, depth, match["factor"] + (".bias" if match["leaf"] == "bias" else "")


def _is_outside(name: str, leaves: Sequence[str]) -> bool:
    """Whether a module, or its weight, has one of these names and is not in a layer."""
    return name.removesuffix(".weight").rpartition(".")[2] in leaves and not _LAYER.fullmatch(name)


def _is_among(place: str, names: Sequence[str] | Iterable[str]) -> bool:
    """Whether a module is one of those that a list names by their whole names or their ends."""
    return any(place == name or place.endswith(f".{name}") for name in names)
