"""Proves that a result is the target plus exactly its selection; `dapa_merge.verify(...)` calls `api.verify`."""

from dapa_merge.imports import make_callable

make_callable(__name__)
