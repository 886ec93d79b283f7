"""Names the damage to a target from its weights and its source's; `dapa_merge.inspect(...)` calls `api.inspect`."""

from dapa_merge.imports import make_callable

make_callable(__name__)
