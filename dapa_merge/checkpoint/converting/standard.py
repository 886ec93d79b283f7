"""A checkpoint as other programs look for it: under the standard names, with an index."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dapa_merge.checkpoint.files import Checkpoint
from dapa_merge.checkpoint.weights import INDEX_NAME, SINGLE_NAME
from dapa_merge.errors import CheckpointError


@contextmanager
def standard_folder(checkpoint: Checkpoint) -> Iterator[Path]:
    """The checkpoint's folder, or one of links to its files that lasts as long as the `with` block.

    The links are made where the weights have other names than `model.safetensors`, and no index.

    Raises:
        CheckpointError: If there can be no links.
    """
    folder = checkpoint.folder
    if (folder / INDEX_NAME).is_file() or (folder / SINGLE_NAME).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="dapa-merge-") as temporary:
        try:
            for path in folder.iterdir():
                os.symlink(path.absolute(), Path(temporary, path.name))
        except OSError as error:
            raise CheckpointError(
                f"{checkpoint.name} has neither {SINGLE_NAME} nor {INDEX_NAME}, and no links to its files can be made "
                f"({error.strerror}); name its weights as these"
            ) from error
        index = {"metadata": {}, "weight_map": {name: tensor.file for name, tensor in checkpoint.tensors.items()}}
        Path(temporary, INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
        yield Path(temporary)
