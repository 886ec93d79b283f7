"""Rows of a Hugging Face Hub dataset, or of a local folder that the `datasets` library can read.

A Hub dataset is read at one commit and only once per process, from the cache if the Hub does not answer. The token is
the one that huggingface_hub finds. A dataset's code is never run.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants

from dapa_merge.errors import HubError, UsageError, nearest_of, one_line
from dapa_merge.hub_client import NoAnswer, api, asking, fault, hub_cause, no_folder
from dapa_merge.measure.prompts.rows import base_and_query, parse_query
from dapa_merge.progress import quiet

HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([^@?]+))?", re.ASCII)


@dataclass(frozen=True)
class DatasetName:
    """A dataset as a recipe names it.

    Attributes:
        id: Hub id, or path of a local folder.
        revision: Branch, tag or commit; None for the main branch, or for a folder.
        config: None for its only or default config.
        split: Also `a+b` and `a[:100]`; None for its only split.
        options: The other keys with their values.
    """

    id: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    options: tuple[tuple[str, str], ...] = ()

    def option(self, key: str) -> str | None:
        """The value of another key; None if absent."""
        return dict(self.options).get(key)

    def __str__(self) -> str:
        return self.id + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class Rows:
    """Rows of one split.

    Attributes:
        rows: Values by column; a class is given by its name.
        commit: The dataset's; None for a local folder.
    """

    rows: tuple[dict[str, Any], ...]
    columns: tuple[str, ...]
    split: str
    commit: str | None


def parse_dataset(name: str, options: Sequence[str] = ()) -> DatasetName:
    """Parse `ID[@REVISION][?config=CONFIG&split=SPLIT&KEY=VALUE]`, where ID is a Hub id or an existing folder.

    Raises:
        UsageError: If it has another form or an unknown key.
    """
    base, query = base_and_query(name)
    values = parse_query(name, query, ("config", "split", *options))
    config, split = values.pop("config", None), values.pop("split", None)
    others = tuple(values.items())
    if os.path.isdir(base):
        return DatasetName(base, None, config, split, others)
    match = HUB_ID.fullmatch(base)
    if not match:
        raise UsageError(f"{no_folder(base)}, and it is not the id of a dataset on the Hub, such as someone/name")
    return DatasetName(match[1], match[2], config, split, others)


def load_rows(dataset: DatasetName) -> Rows:
    """Read all rows of the named split, or of the only one.

    Raises:
        UsageError: If the config or split is unknown or has to be chosen, or the dataset cannot be read.
        HubError: If it can neither be fetched nor found in the cache.
    """
    splits = split_names(dataset)
    if dataset.split is None and len(splits) > 1:
        raise UsageError(
            f"the dataset {dataset} has the splits {', '.join(splits)}: choose one, as in ?split={splits[0]}"
        )
    wanted = dataset.split or splits[0]
    for split in re.findall(r"(?:^|\+)\s*([^+\[]*)", wanted):
        if split.strip() not in splits:
            nearest = nearest_of(split, splits)
            raise UsageError(f"the dataset {dataset} has no split {split!r}{nearest}; it has {', '.join(splits)}")
    opened = _open(dataset)
    try:
        table = opened.read(wanted)
    except ValueError as error:
        raise UsageError(f"the dataset {dataset} has no split {wanted!r}: {one_line(error)}") from error
    return Rows(tuple(_named_classes(table)), tuple(table.column_names), wanted, opened.commit)


def split_names(dataset: DatasetName) -> tuple[str, ...]:
    """List the splits of a dataset's config, in its order; raises as `load_rows` does."""
    return tuple(_open(dataset).splits)


def known_commit(dataset: DatasetName) -> str | None:
    """The commit at which this process read a Hub dataset; None if it did not."""
    return _COMMITS.get((dataset.id, dataset.revision))


_COMMITS: dict[tuple[str, str | None], str] = {}


def _open(dataset: DatasetName) -> Prepared:
    """Prepare a dataset's config; a folder is prepared each time, because it may have changed."""
    if os.path.isdir(dataset.id):
        return prepare(dataset.id, None, dataset.config)
    return _prepare_once(dataset.id, dataset.revision, dataset.config)


@functools.lru_cache(maxsize=16)
def _prepare_once(name: str, revision: str | None, config: str | None) -> Prepared:
    # All configs of a dataset come from one commit.
    opened = prepare(name, _COMMITS.get((name, revision), revision), config)
    if opened.commit:
        _COMMITS[name, revision] = opened.commit
    return opened


def _named_classes(table: Any) -> list[dict[str, Any]]:
    names = {column: feature.names for column, feature in table.features.items() if hasattr(feature, "names")}
    rows: list[dict[str, Any]] = table.to_list()
    for row in rows:
        for column, classes in names.items():
            # An unknown class is -1 or missing.
            row[column] = classes[row[column]] if row[column] is not None and row[column] >= 0 else None
    return rows


COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Prepared:
    """A dataset's config on this machine; a folder has no commit, and one written by `save_to_disk` no builder."""

    splits: dict[str, Any]
    commit: str | None
    builder: Any = None

    def read(self, split: str) -> Any:
        """Return the table of a split or of a split expression such as `train[:100]`."""
        if split in self.splits:
            return self.splits[split]
        if self.builder is None:
            raise ValueError("a dataset that was saved to disk can only be read by whole splits")
        with quiet("datasets", "huggingface_hub"):
            return self.builder.as_dataset(split=split)


def prepare(name: str, revision: str | None, config: str | None) -> Prepared:
    """Fetch and convert a config of a Hub dataset or a folder; use the cache offline.

    Raises:
        UsageError: If the config is unknown or has to be chosen, or its files cannot be read.
        HubError: If it can neither be fetched nor found in the cache.
    """
    with quiet("datasets", "huggingface_hub"):
        if os.path.isdir(name):
            saved = _saved_to_disk(Path(name))
            return saved or _build(name, None, config)
        try:
            commit = _commit(name, revision)
        except NoAnswer as error:
            return _from_cache(name, revision, config, error)
        built = _build(name, commit, config)
        if built.commit != commit:
            raise HubError(f"the Hub did not send the files of the dataset {name} at {commit}: try again later")
        return built


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Let other code read datasets quietly, and at once from the cache if the Hub does not answer.

    Raises:
        HubError: If that code fails because of the Hub.
    """
    what = f"read {name}, which is not all in the cache"
    no_answer = _no_answer(what)
    with quiet("datasets", "huggingface_hub"), _offline() if no_answer else contextlib.nullcontext():
        try:
            yield
        except Exception as error:
            if (cause := hub_cause(error)) is None:
                raise
            raise no_answer or fault(what, cause) from error


def _commit(name: str, revision: str | None) -> str:
    with asking(f"get the dataset {name}" + (f"@{revision}" if revision else "")):
        found = api().dataset_info(name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        # Anyone may list a gated dataset's files, but not read them.
        if found.gated:
            api().auth_check(name, repo_type="dataset")
        return str(found.sha)


def _no_answer(what: str) -> HubError | None:
    """Return an error if the Hub does not answer at all; None if it does.

    A single request, because the libraries retry for most of a minute.
    """
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:
        return fault(what, error)
    return None


def _from_cache(name: str, revision: str | None, config: str | None, why: NoAnswer) -> Prepared:
    if revision is not None and not COMMIT.fullmatch(revision):
        raise HubError(f"{why}; a cached copy cannot be matched to {revision!r}; name a commit, or a local file")
    try:
        with _offline():
            built = _build(name, revision, config)
    except (UsageError, HubError) as error:
        # The cache does not tell whether a config does not exist or was not fetched.
        raise HubError(f"{why}; it is not in the cache either; name a local file") from error
    if revision is not None and built.commit != revision:
        raise HubError(f"{why}; the cache has it at {built.commit} only")
    return built


def _build(name: str, commit: str | None, config: str | None) -> Prepared:
    local = os.path.isdir(name)
    try:
        builder = _library().load_dataset_builder(name, config, revision=commit)
        _refuse_foreign_files(builder, name, commit)
        builder.download_and_prepare()
        tables = builder.as_dataset()
    except UsageError:
        raise
    except Exception as error:
        # The library's errors have no common class, and only the message tells that a config does not exist.
        known = re.search(r"(?:Available|available configs): \[(.*)\]", str(error))
        if known:
            raise UsageError(_no_config(name, config, re.findall(r"'([^']*)'", known[1]))) from error
        if not local and _is_of_the_hub(error):
            raise fault(f"get the files of the dataset {name}", hub_cause(error) or error) from error
        raise UsageError(f"the dataset {name} cannot be read: {one_line(list(_causes(error))[-1])}") from error
    return Prepared(dict(tables), None if local else str(builder.hash), builder)


def _refuse_foreign_files(builder: Any, name: str, commit: str | None) -> None:
    """Refuse a dataset whose card or links name files elsewhere, which the library would read.

    Raises:
        UsageError: If a file of it is outside its folder, or outside its commit on the Hub.
    """
    files = [str(file) for split in (builder.config.data_files or {}).values() for file in split]
    if os.path.isdir(name):
        _refuse_outside(name, files, "README.md")
    elif other := next((file for file in files if not file.startswith(f"hf://datasets/{name}@")), None):
        raise UsageError(_FOREIGN.format(name, other, "README.md"))


_FOREIGN = "the dataset {} names {}, which is not a file of its own; correct its {}"


def _refuse_outside(name: str, files: Sequence[str], said_in: str) -> None:
    """Raise `UsageError` if a file of a folder is outside of it, wherever links lead."""
    home = Path(os.path.realpath(name))
    # Files of the Hub's cache are links to blobs.
    homes = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    for file in files:
        if not any(map(Path(os.path.realpath(file)).is_relative_to, homes)):
            raise UsageError(_FOREIGN.format(name, file, said_in))


def _no_config(name: str, config: str | None, known: list[str]) -> str:
    listed = ", ".join(known)
    if config is None:
        return f"the dataset {name} has the configs {listed}: choose one, as in ?config={known[0]}"
    return f"the dataset {name} has no config {config!r}{nearest_of(config, known)}; it has {listed}"


def _is_of_the_hub(error: BaseException) -> bool:
    library = _library()
    # Missing files, or files of an unknown kind, are not the Hub's fault.
    if isinstance(error, (library.data_files.EmptyDatasetError, library.exceptions.DataFilesNotFoundError)):
        return False
    return isinstance(error, OSError) or "http" in type(error).__module__


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its chain of causes."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _saved_to_disk(folder: Path) -> Prepared | None:
    """Load a folder written by `save_to_disk`, which has its own layout; None for any other folder."""
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return None
    try:
        # Mapped, and not read: which files it has is then known.
        loaded = _library().load_from_disk(str(folder), keep_in_memory=False)
    except Exception as error:
        raise UsageError(f"the dataset {folder} cannot be read: {one_line(error)}") from error
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    files = [file["filename"] for split in splits.values() for file in split.cache_files]
    _refuse_outside(str(folder), files, "state.json or dataset_dict.json")
    return Prepared(splits, None)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Behave as if HF_HUB_OFFLINE were set."""
    places = (_library().config, constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _library() -> Any:
    """Import `datasets` lazily: it takes a second, and loads pandas and pyarrow."""
    import datasets

    return datasets
