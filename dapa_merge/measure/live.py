"""A target in memory, to which selections are applied in place and undone bit for bit.

The source is never loaded: its tensors are read from their files when a selection needs them, and the target's are
restored from its own files. The device needs memory for only one tensor more than the model.
"""

from __future__ import annotations

import base64
import json
import math
import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers import __version__ as transformers_version

from dapa_merge.checkpoint.contents import parts_of
from dapa_merge.checkpoint.convert import standard_folder
from dapa_merge.checkpoint.folder import refuse_pointer, refuse_stray_link
from dapa_merge.checkpoint.header import TORCH_NAMES, Tensor, read_json
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.checkpoint.region import Region, TensorBox
from dapa_merge.checkpoint.units import OTHER_HEADS, OTHER_TOWERS, Unit, find_units
from dapa_merge.errors import CheckpointError, DapaError, UsageError, one_line
from dapa_merge.measure import confined, determinism
from dapa_merge.measure.generate import prepare_for_greedy, thought_before
from dapa_merge.measure.placement import device_map, is_spread, spread
from dapa_merge.measure.quantized import (
    State,
    configuration,
    prepare,
    put,
    quantize,
    quantized_layers,
    state_of,
    stored_shape,
)
from dapa_merge.progress import LOG, quiet
from dapa_merge.recipe.options import Where

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dapa_merge.plan.plan import Plan


_LAYER = re.compile(r"\.layers\.(\d+)\.")
_TO_FIT = "; spread it over several devices (--device auto), or hold it in 8 or 4 bits (--quantize)"
# Part of every tag of a thought.
_THOUGHTS = re.compile(r"think|thought|reason|scratchpad|reflection|inner_|channel", re.IGNORECASE)


def choose_device(device: str = "auto") -> torch.device:
    """Return a device by name; `auto` is torch's accelerator, or else the CPU.

    Raises:
        UsageError: If torch has no such device here.
    """
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        # Fails on a device without data (`meta`).
        value = torch.ones(1, device=device)
        value.item()
        return value.device
    except Exception as error:
        # Each missing backend raises a different error.
        raise UsageError(f"device {device!r} cannot be used here: {one_line(error)}") from error


def load_model(checkpoint: Checkpoint, device: torch.device | Where) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint for greedy generation; never run code from the checkpoint.

    Args:
        checkpoint: The model.
        device: One device, for the dtype of its config; or where and how.

    Raises:
        CheckpointError: If transformers cannot load it, would randomly initialize weights that its files lack, or would
            leave out others that they hold.
        HubError: If weights are missing here and cannot be fetched.
        UsageError: If it does not fit in the device's memory.
    """
    checkpoint = checkpoint.whole()
    where = device if isinstance(device, Where) else Where(str(device))
    device = choose_device(device.device) if isinstance(device, Where) else device
    quantization = None if where.quantize is None else configuration(where.quantize, device)
    if not any("token" in name for name in parts_of(checkpoint.folder)):
        raise CheckpointError(f"{checkpoint.name} has no tokenizer; copy the tokenizer's files from its base model")
    try:
        with quiet("transformers"), standard_folder(checkpoint) as folder:
            for path in filter(Path.is_file, (checkpoint.folder / name for name in parts_of(checkpoint.folder))):
                refuse_stray_link(path, checkpoint.folder)
                refuse_pointer(path)
            loader, config = _loader(checkpoint)
            tokenizer = _load_tokenizer(checkpoint, folder, has_processor=loader is AutoModelForImageTextToText)
            # Ready when the prompts are.
            confined.start(tokenizer.chat_template)
            places = {"": device}
            if is_spread(checkpoint, where):
                dtype = where.dtype or getattr(config.get_text_config(), "dtype", None) or torch.float32
                dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
                places = device_map(_without_values(loader, config), checkpoint.name, where, dtype)
            model, loading = loader.from_pretrained(
                folder,
                config=config,
                dtype=where.dtype or "auto",
                device_map=places,
                quantization_config=quantization,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            prepare(model)
            if len(places) > 1:
                spread(model, places)
            prepare_for_greedy(model, tokenizer)
    except DapaError:
        raise
    except torch.OutOfMemoryError as error:
        raise UsageError(f"{checkpoint.name} does not fit in the memory of {device}{_TO_FIT}") from error
    except Exception as error:
        # transformers has no common error class for damaged or unknown folders.
        raise CheckpointError(f"transformers cannot load {checkpoint.name}: {one_line(error)}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, loading[kind])):
            raise CheckpointError(
                f"{checkpoint.name} lacks {len(names)} of its weights, or has them in another shape, and "
                f"transformers would initialize them randomly: {names[0]}"
            )
    if names := sorted(name for name in loading["unexpected_keys"] if not _is_left_out(name, model)):
        raise CheckpointError(
            f"{checkpoint.name} holds tensors that transformers does not load into a {type(model).__name__}, so its "
            f"figures would not be those of its files ({len(names)}, the first is {names[0]}); correct its "
            f"config.json, or remove them"
        )
    model.eval().requires_grad_(False)
    _try_out(model, checkpoint.name)
    return model, tokenizer


@torch.inference_mode()
def _try_out(model: PreTrainedModel, name: str) -> None:
    """Raise `CheckpointError` if a model cannot read a single token, because its config does not fit together."""
    try:
        model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=True)[0]
    except torch.OutOfMemoryError as error:
        raise UsageError(f"{name} does not fit in the memory of {model.device}{_TO_FIT}") from error
    except Exception as error:
        # transformers has no common error class for configs that it takes and cannot follow.
        raise CheckpointError(f"transformers loads {name}, but cannot run it: {one_line(error)}") from error


def opens_thought(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's chat template opens a thought that the model must close before it answers.

    Reads the tokenizer only if its files speak of thoughts. False for a damaged one: `load_model` names the fault.
    """
    try:
        named = (*_PROCESSOR_FILES, "tokenizer_config.json")
        files = (*checkpoint.folder.glob("*chat_template*"), *(checkpoint.folder / name for name in named))
        texts: Iterable[str] = (path.read_text(encoding="utf-8", errors="replace") for path in files if path.is_file())
        if checkpoint.chat_template is not None:
            texts = (checkpoint.chat_template,)
        if not any(_THOUGHTS.search(text) for text in texts):
            return False
        with quiet("transformers"), standard_folder(checkpoint) as folder:
            loader, _ = _loader(checkpoint)
            tokenizer = _load_tokenizer(checkpoint, folder, has_processor=loader is AutoModelForImageTextToText)
            return bool(thought_before(tokenizer, "How?"))
    except Exception:
        return False


def _is_left_out(name: str, model: PreTrainedModel) -> bool:
    """Whether transformers leaves out a tensor on purpose: of another tower, or of a layer for further tokens."""
    config = model.config.get_text_config()
    number = _LAYER.search(name)
    has_more = bool(getattr(config, "num_nextn_predict_layers", 0))
    is_further = has_more and number is not None and int(number[1]) >= config.num_hidden_layers
    return is_further or OTHER_TOWERS.search(name) is not None


def _without_values(loader: Any, config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        # A copy, in which the dtype is noted.
        model: PreTrainedModel = loader.from_config(deepcopy(config), dtype=torch.float32, trust_remote_code=False)
    model.tie_weights()
    return model


def empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Build a checkpoint's model without values, to see where transformers puts them; never run code from it.

    Raises:
        CheckpointError: If transformers does not know it.
    """
    try:
        with quiet("transformers"), torch.device("meta"):
            loader, config = _loader(checkpoint)
            model: PreTrainedModel = loader.from_config(config, trust_remote_code=False)
            return model
    except DapaError:
        raise
    except Exception as error:
        # transformers has no common error class for damaged or unknown folders.
        raise CheckpointError(f"transformers cannot build {checkpoint.name}: {one_line(error)}") from error


def _loader(checkpoint: Checkpoint) -> tuple[Any, PreTrainedConfig]:
    """Return the auto class that loads a checkpoint for text generation, with or without images, and its config.

    An encoder such as BERT would load silently and generate noise.

    Raises:
        CheckpointError: If it is another kind of model, or transformers does not know it.
    """
    model_type = checkpoint.config.get("model_type")
    if model_type is not None and model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"transformers {transformers_version} cannot load {checkpoint.name}: it does not know the model type "
            f"{model_type!r}; a newer transformers may (code that comes with a model is never run)"
        )
    _refuse_many_parts(checkpoint.config, checkpoint.name)
    config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    forget_kernels(config, checkpoint.name)
    architectures = config.architectures or []
    loaders = (
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
    )
    loader = next((loader for known, loader in loaders if type(config) in known), None)
    if config.is_encoder_decoder or loader is None or (architectures and all(map(OTHER_HEADS.search, architectures))):
        raise CheckpointError(
            f"{checkpoint.name} is a {', '.join(architectures) or model_type}, but only decoder-only language models "
            "(...ForCausalLM), with or without an image tower, can be measured"
        )
    return loader, config


# Layers, labels or experts that a config may ask for; published models have a few hundred, and labels a few thousand.
MAX_PARTS = 100_000
# The largest vocabularies have a quarter of a million rows.
MAX_SIZE = 100_000_000
_SIZE_OF_PART = re.compile(r".*_(size|dim)|d_model|d_ff|n_embd|n_inner", re.IGNORECASE)
_NUMBER_OF_PARTS = re.compile(r"(n|num)_(.*_)?(layers?|labels|experts|blocks)|.*depth|.*_layers", re.IGNORECASE)


def _refuse_many_parts(config: Mapping[str, Any], name: str) -> None:
    """Raise `CheckpointError` if transformers would make parts so many, or so large, that it does not end well."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _refuse_many_parts(value, name)
            continue
        limits = ((_NUMBER_OF_PARTS, MAX_PARTS), (_SIZE_OF_PART, MAX_SIZE))
        most = next((number for pattern, number in limits if pattern.fullmatch(key)), None)
        if most is not None and isinstance(value, (int, float)) and value > most:
            raise CheckpointError(
                f"{key} in the config.json of {name} is {str(value)[:30]}, and no model has more than {most:,}"
            )


# What transformers brings along, by attribute of a config. Any other may be code that it fetches from the Hub and runs.
_OWN_KERNELS = {
    "_attn_implementation": ("eager", "sdpa"),
    "_experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}


def forget_kernels(config: PreTrainedConfig, name: str) -> None:
    """Let transformers choose its own code wherever a config, or a part of it, names code of the Hub."""
    for attribute, own in _OWN_KERNELS.items():
        value = getattr(config, attribute, None)
        if value is not None and value not in own:
            LOG.warning("%s asks for %r as its %s, which may be fetched code; it is not used", name, value, attribute)
            setattr(config, attribute, None)
    for key in config.sub_configs:
        if isinstance(part := getattr(config, key, None), PreTrainedConfig):
            forget_kernels(part, name)


# The largest published tokenizer, Gemma's with 262,144 tokens, has 33 MB; its longest token 31 characters, Qwen's 128.
MAX_TOKENIZER_BYTES = 1 << 28
MAX_TOKEN_CHARACTERS = 10_000
# Characters that a tokenizer may make of one before it looks for tokens; published ones make up to 18.
MAX_GROWTH = 1000
_TOKENIZER_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
# Files of a processor with a chat template; the first that has one counts, as for transformers.
_PROCESSOR_FILES = ("processor_config.json", "chat_template.json")


def _load_tokenizer(checkpoint: Checkpoint, folder: Path, *, has_processor: bool) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer with its processor's chat template, which counts if transformers uses a processor.

    Raises:
        CheckpointError: If a file is too large, or the tokenizer makes very long texts of short ones.
    """
    for path in checkpoint.folder.iterdir():
        if path.suffix in _TOKENIZER_SUFFIXES and path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise CheckpointError(f"{path} has more than {MAX_TOKENIZER_BYTES >> 20} MiB, which no tokenizer needs")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # The folder may be a temporary one.
    tokenizer.name_or_path = checkpoint.name
    if has_processor or not tokenizer.chat_template:
        found = (checkpoint.folder / name for name in _PROCESSOR_FILES)
        templates = (read_json(path).get("chat_template") for path in found if path.is_file())
        tokenizer.chat_template = next(filter(None, templates), tokenizer.chat_template)
    if checkpoint.chat_template is not None:
        tokenizer.chat_template = checkpoint.chat_template or None
        if checkpoint.chat_template:
            # For messages about the template.
            tokenizer.name_or_path = f"{checkpoint.name} (given in place of its own)"
    longest = max(map(len, tokenizer.get_vocab()), default=0)
    if longest > MAX_TOKEN_CHARACTERS:
        raise CheckpointError(
            f"the tokenizer of {checkpoint.name} has a token of {longest:,} characters, expected at most "
            f"{MAX_TOKEN_CHARACTERS:,}; use the tokenizer of its base model"
        )
    for kind in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        part = getattr(getattr(tokenizer, "backend_tokenizer", None), kind, None)
        times = growth(json.loads(part.__getstate__())) if part is not None else 1
        if times > MAX_GROWTH:
            raise CheckpointError(
                f"the {kind} of {checkpoint.name}'s tokenizer may make {min(times, 10**12):,} characters of one, "
                f"expected at most {MAX_GROWTH:,}; use the tokenizer of its base model"
            )
    return tokenizer


def growth(part: object) -> int:
    """How many characters or tokens a part of a `tokenizer.json` may make of one; an upper bound.

    Parts in a sequence multiply. What Unicode prescribes is not counted: it does not grow when it is repeated.
    """
    if isinstance(part, list):
        return math.prod(map(growth, part))
    if not isinstance(part, dict):
        return 1
    own = 1
    if part.get("type") in ("Replace", "Prepend"):
        own = len(part.get("content") or part.get("prepend") or "")
    elif part.get("type") in ("ByteLevel", "Metaspace"):
        # Two characters for most bytes of a letter, and a space before each word.
        own = 2
    elif part.get("type") == "Precompiled":
        # SentencePiece: the size of a trie, the trie, and the texts that replace others, ended by zeros.
        charsmap = base64.b64decode(part["precompiled_charsmap"])
        own = max(map(len, charsmap[4 + int.from_bytes(charsmap[:4], "little") :].split(b"\0")))
    elif part.get("type") == "TemplateProcessing":
        own = sum("Sequence" in piece for piece in part["single"])
    return max(own, 1) * math.prod(map(growth, part.values()))


class Slot(NamedTuple):
    """A part of a unit in the model, and its values' regions on disk.

    Attributes:
        slices: The part of `parameter`.
        regions: The same part on disk, by model.
    """

    unit: Unit
    parameter: torch.nn.Parameter
    slices: tuple[slice, ...]
    regions: Mapping[str, Region]


# A part of a parameter, its region on disk, and values for it in the dtype of the file.
Piece = tuple[tuple[slice, ...], Region, torch.Tensor]


class LiveModel:
    """The target in memory during a search.

    Attributes:
        model: The target, in evaluation mode; within `transplanted`, the candidate.
        tokenizer: The target's.
        plan: Locates the units of all models on disk.
        where: Where and how it is loaded.
        quantized: The layers whose weights are quantized, by weight.
    """

    def __init__(self, plan: Plan, device: torch.device | Where) -> None:
        """Load the target, as `load_model` does.

        Raises:
            CheckpointError: If it cannot be loaded, or a unit's tensor has no parameter of its own in the model.
        """
        self.plan = plan
        self.where = device if isinstance(device, Where) else Where(str(device))
        self.model, self.tokenizer = load_model(plan.target, device)
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self.quantized = {layer.weight: layer for _, layer in quantized_layers(self.model)}
        self._twins = self._find_twins()
        self._changed: set[Unit] = set()
        self._kept: dict[torch.nn.Parameter, State] = {}

    def _find_twins(self) -> dict[Unit, Unit]:
        """Map each whole unit to its twin in memory, where parameters may be fused and named differently."""
        kind = type(self.model).__name__
        modules = tuple(dict.fromkeys(unit.module for unit in self.plan.units))
        try:
            twins = {unit: unit for unit in units_in(self.model, modules)}
        except CheckpointError as error:
            raise CheckpointError(
                f"transformers loads {self.plan.target.name} as a {kind}, but its units are not found there: {error}"
            ) from error
        for unit in self.plan.twins:
            twin = twins.get(unit)
            parts = zip_longest(unit.whole_parts, twin.whole_parts if twin else ())
            if not all(part and other and _extents(part) == _extents(other) for part, other in parts):
                raise CheckpointError(
                    f"transformers loads {self.plan.target.name} as a {kind}, where {unit} is missing or has another "
                    f"size than in the files"
                )
        return twins

    def slots(self, units: Iterable[Unit]) -> Iterator[Slot]:
        """Yield the slots of units, part by part."""
        for unit in units:
            twin = replace(self._twins[unit.whole], rows=unit.rows)
            for part, regions in zip(twin.parts, self.plan.regions((unit,)), strict=True):
                slices = tuple(slice(first, stop) for first, stop in part.box)
                yield Slot(unit, self._parameters[part.tensor], slices, regions)

    @contextmanager
    def transplanted(self, selection: Iterable[Unit]) -> Iterator[PreTrainedModel]:
        """Edit the selected units in memory inside a `with` block, which gets the model.

        The selection may hold blocks of rows, even of units that are whole in the plan. On exit, with or without an
        error, the target is restored bit for bit. Cannot be nested.

        Raises:
            RuntimeError: If a selection is already transplanted.
        """
        if self._changed:
            raise RuntimeError("a selection is already transplanted; leave its `with` block first")
        whole: dict[torch.nn.Parameter, list[Slot]] = {}
        try:
            for unit in selection:
                # Recorded before the first write, because an unfinished change must be undone too.
                self._changed.add(unit)
                for slot in self.slots((unit,)):
                    if slot.parameter in self.quantized:
                        whole.setdefault(slot.parameter, []).append(slot)
                    else:
                        self._put(slot, self.new_values(slot))
            for parameter, slots in whole.items():
                pieces = ((slot.slices, slot.regions["target"], self.new_values(slot)) for slot in slots)
                self.quantize_anew(parameter, pieces)
            with quiet("transformers"):
                yield self.model
        finally:
            self.restore_quantized()
            for unit in list(self._changed):
                for slot in self.slots((unit,)):
                    if slot.parameter not in self.quantized:
                        self._put(slot, mapped_values(self.plan.target, slot.regions["target"]))
                self._changed.remove(unit)

    def quantize_anew(self, parameter: torch.nn.Parameter, pieces: Iterable[Piece]) -> None:
        """Quantize the weight of a quantized layer with other values in some pieces, until `restore_quantized`.

        Raises:
            CheckpointError: If the matrix is stored in parts.
        """
        layer = self.quantized[parameter]
        values: torch.Tensor | None = None
        stored: Tensor | None = None
        for slices, region, new in pieces:
            if region.tensor.shape != stored_shape(layer) or stored not in (None, region.tensor):
                raise CheckpointError(
                    f"{region.tensor.name} of {self.plan.target.name} is only a part of a matrix in memory, which "
                    f"cannot be quantized anew; leave out --quantize"
                )
            if values is None:
                stored, values = region.tensor, mapped_values(self.plan.target, Region.of(region.tensor)).clone()
            box = values[slices]
            box.copy_(new.reshape(box.shape))
        if values is None:
            return
        state = quantize(layer, values, self.model.dtype)
        self._kept.setdefault(parameter, state_of(layer))
        put(layer, state)

    def restore_quantized(self) -> None:
        """Put all matrices that were quantized anew back as they were loaded, bit for bit."""
        for parameter, state in self._kept.items():
            put(self.quantized[parameter], state)
        self._kept.clear()

    def new_values(self, slot: Slot) -> torch.Tensor:
        """Compute a slot's new values in the target's dtype."""
        plan = self.plan
        values = {name: mapped_values(plan.models[name], slot.regions[name]) for name in plan.edit.inputs}
        # A model may store a single expert with an extra dimension.
        shape = values[plan.edit.inputs[-1]].shape
        own = plan.edit.own_values(slot.regions["target"])
        values |= {name: torch.from_numpy(array) for name, array in own.items()}
        dtype = getattr(torch, TORCH_NAMES[slot.regions["target"].tensor.dtype])
        return plan.edit.new_values({name: value.reshape(shape) for name, value in values.items()}, dtype)

    def _put(self, slot: Slot, values: torch.Tensor) -> None:
        with torch.no_grad():
            box = slot.parameter[slot.slices]
            # Rounded here: some accelerators lack dtypes of files.
            box.copy_(values.reshape(box.shape).to(box.dtype))

    def close(self) -> None:
        """Free the memory."""
        self._parameters, self.quantized = {}, {}
        free(self.model)
        del self.model


def free(model: PreTrainedModel) -> None:
    """Free the memory of a model's weights at once, whoever still holds the model."""
    determinism.drop_copies(model)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.new_empty(0)
    torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def units_in(model: PreTrainedModel, modules: Sequence[str]) -> tuple[Unit, ...]:
    """Find the units of a model in memory; raises `CheckpointError` as `find_units` does."""
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    parameters = model.named_parameters(remove_duplicate=False)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters}
    return find_units(config, shapes | {name: stored_shape(layer) for name, layer in quantized_layers(model)}, modules)


def mapped_values(checkpoint: Checkpoint, region: Region) -> torch.Tensor:
    """Memory-map a region's values as stored; the pages belong to the file cache, not to this process.

    Returns:
        A view in the region's shape; do not write to it.
    """
    tensor = region.tensor
    checkpoint.ensure_all((tensor.file, first, first + num_bytes) for first, num_bytes in region.runs())
    start = tensor.start - tensor.start % mmap.ALLOCATIONGRANULARITY
    with checkpoint.open(tensor.file, tensor.start, tensor.start) as file:
        # Private and writable, because torch warns of read-only memory; nothing writes to it.
        mapped = mmap.mmap(file.fileno(), tensor.stop - start, access=mmap.ACCESS_COPY, offset=start)
    values = torch.frombuffer(mapped, dtype=torch.uint8, offset=tensor.start - start)
    return values.view(getattr(torch, TORCH_NAMES[tensor.dtype])).view(tensor.shape)[region.slices()]


def _extents(part: TensorBox) -> list[int]:
    return [stop - first for first, stop in part.box if stop - first != 1]


class Resident:
    """Owns a live target: loads it on first use and keeps it until `close`."""

    def __init__(self, plan: Plan, device: torch.device | Where, on_load: Callable[[], None] = lambda: None) -> None:
        """Load nothing yet; `on_load` is called just before."""
        self.plan = plan
        self.where = device if isinstance(device, Where) else Where(str(device))
        self.device = choose_device(device.device) if isinstance(device, Where) else device
        self._on_load = on_load

    @cached_property
    def live(self) -> LiveModel:
        """The resident target; raises `CheckpointError` if it cannot be loaded."""
        self._on_load()
        return LiveModel(self.plan, self.where)

    def use(self, plan: Plan) -> None:
        """Go on with a plan of the same models and matrices, but another edit or fewer units."""
        self.plan = plan
        if "live" in self.__dict__:
            self.live.plan = plan

    def close(self) -> None:
        """Free the target's memory, if it was loaded."""
        if "live" in self.__dict__:
            self.live.close()
            del self.__dict__["live"]
