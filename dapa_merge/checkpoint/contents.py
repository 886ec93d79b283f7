"""Tells the files that make a model from all others in its folder: the one table of their names.

What is copied into a result, converted, published and listed is decided here. Names that are in no row stay behind: a
folder of a model often holds data sets, logs, keys and other programs' weights. The table was made from the file names
of published models, and from transformers, where they are in `utils/__init__.py` and `vocab_files_names` of tokenizers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dapa_merge.checkpoint.folder import INDEX_NAME, Layout, is_clutter, read_regular, refuse_stray_link
from dapa_merge.checkpoint.header import MAX_CONFIG_BYTES, read_json
from dapa_merge.errors import CheckpointError

# Folder of the chat templates beyond the first.
TEMPLATES = "additional_chat_templates"
# Files of settings, by what they are for; `*` matches any part of a name.
SETTINGS = (
    # The model; Mistral AI's form of its config; ModelScope's.
    "config.json", "generation_config.json", "params.json", "configuration.json",
    # Images, sound and video: preprocessor_config.json, video_preprocessor_config.json, processor_config.json.
    "*processor_config.json",
    # Tokenizers, also of remote code: their names are in tokenizer classes, which are not run.
    "tokenizer.json", "tokenizer.*.json", "*tokenizer_config.json", "special_tokens*.json", "added_tokens.json",
    "*vocab*.json", "*vocab*.txt", "vocab.bpe", "merges*.txt", "encoder.json", "dict.txt", "tekken.json",
    "bpe.codes", "byte_maps.json", "emoji.json", "normalizer.json",
    "*.model", "tokenizer.model.*", "*.tiktoken", "*.spm",
    # Prompts.
    "*.jinja", "chat_template.json", "SYSTEM_PROMPT*.txt", f"{TEMPLATES}/*.jinja",
)  # fmt: skip
# Terms that must travel with a model: LICENSE, LICENSE-CODE, MODEL_LICENSE, NOTICE.md, USE_POLICY.md and the like.
_LICENCE = re.compile(
    r"((.*[ _-])?licen[sc]es?|notice|copying|use[_-]policy|acceptable[_-]use|terms|third[_-]party)([ _.-].*)?",
    re.IGNORECASE,
)
_LICENCE_SUFFIX = re.compile(r"|\.(md|txt|pdf|rst|html|\d+)", re.IGNORECASE)
# As globs, for downloads.
LICENCES = (
    "*LICENSE*", "*LICENCE*", "*License*", "NOTICE*", "Notice*", "COPYING*", "USE_POLICY*", "TERMS*", "THIRD_PARTY*",
)  # fmt: skip
# A class of code next to a config, as its `auto_map` names it: module and class.
_CLASS = re.compile(r"([A-Za-z_]\w*)\.[A-Za-z_]\w*", re.ASCII)
# Code on the Hub: its repository before the same.
_REMOTE_CLASS = re.compile(r"([\w.-]+/[\w.-]+)--[\w.]+", re.ASCII)
# As transformers finds them, in `dynamic_module_utils.get_relative_imports`.
_IMPORT = re.compile(
    r"^\s*(?:import\s+\.(\w+)|from\s+\.(\w+)\s+import|from\s+\.\s+import\s+\(?([\w ,]+))", re.MULTILINE | re.ASCII
)


def is_settings(name: str) -> bool:
    """Whether a file is a model's config, tokenizer, processor, template or generation settings, by its path."""
    # A `*` would match a slash, too.
    rows = (row for row in SETTINGS if row.count("/") == name.count("/"))
    return any(fnmatchcase(name, row) for row in rows) and not is_clutter(name)


def is_licence(name: str) -> bool:
    """Whether a file in a model's top folder holds terms of use; never one that is named after a key."""
    is_text = _LICENCE_SUFFIX.fullmatch(Path(name).suffix)
    return bool(_LICENCE.fullmatch(name) and is_text and "key" not in name.lower() and not is_clutter(name))


def parts_of(folder: Path) -> list[str]:
    """The files of a model besides its weights, by their paths in its folder: settings, licences, code, the index.

    Links are listed wherever they lead, so that the caller can refuse them. Folders are not, such as `licenses/`.

    Raises:
        CheckpointError: If the settings that name code are not JSON, or the folder of templates is a file or a link
            out of the folder.
    """
    names = [path.name for path in folder.iterdir() if path.name == TEMPLATES or not path.is_dir()]
    kept = {name for name in names if is_settings(name) or is_licence(name) or name == INDEX_NAME}
    if TEMPLATES in names:
        refuse_stray_link(folder / TEMPLATES, folder)
        if not (folder / TEMPLATES).is_dir():
            raise CheckpointError(f"{folder / TEMPLATES} must be a folder of chat templates, but is a file; remove it")
        inside = (f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).iterdir())
        kept |= set(filter(is_settings, inside))
    return sorted(kept | set(code_files(folder)))


def left_behind(folder: Path, kept: Collection[str]) -> list[str]:
    """The files and folders (with a slash at their end) next to a model's own files, which are not parts of it.

    Args:
        folder: The model's.
        kept: The paths of its own files, weights too.
    """
    own = {name.partition("/")[0] for name in kept}
    others = (path for path in sorted(folder.iterdir()) if path.name not in own and not is_clutter(path.name))
    return [f"{path.name}/" if path.is_dir() else path.name for path in others]


def code_files(folder: Path) -> list[str]:
    """The code that a model's settings name, and what that imports from next to it; nothing of it is run.

    Raises:
        CheckpointError: If a settings file is not JSON, or a file of code is a link out of the folder.
    """
    return [name for name in sorted(named_code(folder)) if (folder / name).is_file()]


def named_code(folder: Path) -> set[str]:
    """As `code_files`, with files that are absent."""
    found: set[str] = set()
    waiting = {f"{match[1]}.py" for name in classes_of(folder) if (match := _CLASS.fullmatch(name))}
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        if not (folder / name).is_file():
            continue
        refuse_stray_link(folder / name, folder)
        try:
            text = read_regular(folder / name, MAX_CONFIG_BYTES).decode(errors="replace")
        except OSError as error:
            raise CheckpointError(f"cannot read {folder / name}: {error.strerror}") from error
        for one, other, several in _IMPORT.findall(text):
            waiting |= {f"{module.split()[0]}.py" for module in (one, other, *several.split(",")) if module.strip()}
    return found


def code_elsewhere(folder: Path) -> list[str]:
    """The Hub repositories whose code a model's settings name.

    Raises:
        CheckpointError: If a settings file is not JSON.
    """
    return sorted({match[1] for name in classes_of(folder) if (match := _REMOTE_CLASS.fullmatch(name))})


def classes_of(folder: Path) -> set[str]:
    """The classes that the settings of a model tell programs to load from code.

    Raises:
        CheckpointError: If a settings file is not JSON.
    """
    configs = (path for path in folder.iterdir() if path.name.endswith("config.json") and is_settings(path.name))
    return {name for path in configs for name in named_classes(read_json(path))}


def named_classes(settings: Mapping[str, Any]) -> set[str]:
    """The classes that one settings file tells programs to load from code next to it or on the Hub."""
    pipelines = settings.get("custom_pipelines")
    said = [settings.get("auto_map")]
    if isinstance(pipelines, Mapping):
        said += [one.get("impl") for one in pipelines.values() if isinstance(one, Mapping)]
    values = (value for of_key in said for value in (of_key.values() if isinstance(of_key, Mapping) else [of_key]))
    return {
        str(name) for value in values for name in (value if isinstance(value, list) else [value]) if name is not None
    }


def refuse_other_weights(config: Mapping[str, Any], layout: Layout, name: str) -> None:
    """Raise if transformers would follow a config to other weights, or to another config, than those that are edited.

    transformers: `modeling_utils._get_resolved_checkpoint_files` and `configuration_utils.get_config_dict`.

    Args:
        config: `config.json`.
        layout: The weights that are read and edited.
        name: The model's name in messages.

    Raises:
        CheckpointError: If it would.
    """
    ours = layout.index or (layout.shards[0] if len(layout.shards) == 1 else None)
    for key, settings in _with_towers(config):
        named = settings.get("transformers_weights")
        if named is not None and named != ours:
            raise CheckpointError(
                f"the config.json of {name} says {key}transformers_weights: {str(named)[:120]!r}, which transformers "
                f"loads instead of {ours or layout.shards[0]}; remove that key, or all other weights"
            )
        if others := settings.get("configuration_files"):
            raise CheckpointError(
                f"the config.json of {name} has {key}configuration_files, {str(others)[:120]}, from which transformers "
                f"chooses another config; remove that key"
            )


def _with_towers(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields a config and the configs inside it, each with the beginning of its keys in messages."""
    yield "", config
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield f"{key}.", value
