"""Makes `merge_method: dapa` known to an unmodified mergekit.

mergekit has no entry points, but its recipes are pydantic models, and pydantic loads plugins from the entry-point group
`pydantic`. This plugin watches mergekit's `MergeConfiguration` only; every other model keeps its validator untouched.
Every program that uses pydantic loads this module, so it does not import anything.

Protocol: https://docs.pydantic.dev/latest/concepts/plugins/
"""

_WATCHED = ("mergekit.config", "MergeConfiguration")
_NOTHING = (None, None, None)


class _RecipeHandler:
    """Called by pydantic before it validates a merge configuration."""

    def on_enter(self, raw: object, **_options: object) -> None:
        """Register the method, and reject a recipe that mergekit would accept but not understand."""
        if isinstance(raw, dict) and raw.get("merge_method") == "dapa":
            from dapa_merge.mergekit_plugin import accept

            accept(raw)


class _Plugin:
    """The object that the entry point names."""

    def new_schema_validator(
        self, schema: object, schema_type: object, schema_type_path: object, *_: object
    ) -> tuple[object, None, None]:
        """Watch one class; leave all others alone."""
        return (_RecipeHandler(), None, None) if schema_type_path == _WATCHED else _NOTHING


plugin = _Plugin()
