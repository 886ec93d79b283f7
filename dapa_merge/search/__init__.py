"""The search for the few units that are needed; `dapa_merge.search(...)` calls `api.search`."""

from dapa_merge.imports import make_callable

make_callable(__name__)
