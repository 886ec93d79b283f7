"""A repository on the Hub: what is fetched of it, and where huggingface_hub keeps it."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapa_merge.checkpoint.weights import INDEX_NAME
from dapa_merge.errors import CheckpointError, HubError, one_line

# The small files: never pickles. Code is copied into a result, as a part of its target, but never run.
SMALL_PATTERNS = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py"]
# A licence may ask that whoever passes a model on passes its text on too.
SMALL_PATTERNS += ["LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*"]
# What lies in a subfolder is a training's or another program's, but for the chat templates (additional_...).
SUBFOLDERS = ["[!a]*/*", "a[!d]*/*"]


@dataclass(frozen=True)
class Snapshot:
    """A commit of a repository, with its small files here.

    Attributes:
        repository: Its id.
        commit: The full hash.
        folder: Where huggingface_hub keeps its files.
        files: The names of all files of the repository's top folder; without a connection, of those that are here.
    """

    repository: str
    commit: str
    folder: Path
    files: frozenset[str]

    def fetch(self, names: Sequence[str]) -> Path:
        """Bring whole files here, and give the folder that they are in.

        Raises:
            HubError: If the Hub does not give them; what came is kept, and continued the next time.
        """
        from huggingface_hub import snapshot_download

        if not self.lacks(names):
            return self.folder
        patterns = [glob.escape(name) for name in names]
        return Path(_asked(self.repository, snapshot_download, revision=self.commit, allow_patterns=patterns))

    def lacks(self, names: Sequence[str]) -> list[str]:
        """Which of these files are not here."""
        return [name for name in names if not (self.folder / name).is_file()]


def open_snapshot(repository: str, revision: str | None) -> Snapshot:
    """Fetch the small files of a repository, or find them in the cache where the Hub is not reached.

    Args:
        repository: Its id.
        revision: Branch, tag or commit; None for `main`.

    Raises:
        CheckpointError: If it is no id.
        HubError: If the Hub does not give it.
    """
    from huggingface_hub import snapshot_download

    patterns = {"allow_patterns": SMALL_PATTERNS, "ignore_patterns": SUBFOLDERS}
    folder = Path(_asked(repository, snapshot_download, revision=revision, **patterns))
    here = {path.name for place in (folder, mirror_folder(repository, folder.name)) for path in place.glob("*.*")}
    try:
        here |= set(_asked(repository, _top_files, revision=folder.name))
    except HubError:
        # What is in the caches can be used without a connection.
        if not any(name.endswith((".safetensors", INDEX_NAME)) for name in here):
            raise
    return Snapshot(repository, folder.name, folder, frozenset(here))


def mirror_folder(repository: str, commit: str) -> Path:
    """Where the partial weights of a commit are kept, in the user's cache folder."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("dapa-merge")) / "mirrors" / repository.replace("/", "--") / commit


def _top_files(repository: str, revision: str) -> list[str]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    tree = HfApi().list_repo_tree(repository, revision=revision)
    return [item.path for item in tree if isinstance(item, RepoFile)]


def _asked(repository: str, ask: Callable[..., Any], **options: Any) -> Any:
    """What a function of huggingface_hub answers about a repository."""
    from huggingface_hub.errors import HFValidationError

    try:
        return ask(repository, **options)
    except HFValidationError:
        raise CheckpointError(f"{repository!r} is neither a folder here nor the id of a Hub repository") from None
    except Exception as error:
        # Its HTTP library's faults are of no common class; whatever it was, the Hub did not give the model.
        raise HubError(f"{repository} is no folder here, and the Hub does not give it: {one_line(error)}") from error
