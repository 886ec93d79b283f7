"""What target and source were both fine-tuned from, if a recipe names it."""

from __future__ import annotations

from dapa_merge.checkpoint.architecture import architecture_name
from dapa_merge.checkpoint.files import Checkpoint
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.recipe import Recipe
from dapa_merge.selection import open_location


def open_pretrained(
    recipe: Recipe, target: Checkpoint, source: Checkpoint, *, partial: bool = False, allow_pickle: bool = False
) -> Checkpoint | None:
    """Open the recipe's `pretrained`.

    Args:
        recipe: The recipe.
        target: Its target.
        source: Its source.
        partial: Whether the headers of a model of the Hub are enough.
        allow_pickle: Whether files that may run code are read.

    Returns:
        None if the recipe names none, or the target itself: with nothing to subtract, task arithmetic is the linear
        blend.

    Raises:
        UsageError: If it is the source.
        CheckpointError: If it is of another architecture or size than the target.
        HubError: If the Hub does not give it.
    """
    if recipe.pretrained is None:
        return None
    found = open_location(recipe.pretrained, partial=partial, allow_pickle=allow_pickle)
    if found.folder.samefile(target.folder):
        return None
    if found.folder.samefile(source.folder):
        raise UsageError(f"{recipe.where('parameters.pretrained')}: the pretrained model is the source itself")
    ours, theirs = architecture_name(target.config), architecture_name(found.config)
    if ours != theirs:
        raise CheckpointError(
            f"the pretrained model {found.name} is a {theirs} but the target {target.name} is a {ours}; name what "
            "target and source were both fine-tuned from"
        )
    for name, shape in target.shapes.items():
        other = found.shapes.get(name)
        # The vocabulary may have grown, and the output layer may be the embedding.
        if (other is None and ".layers." in name) or (other is not None and other[1:] != shape[1:]):
            raise CheckpointError(
                f"the pretrained model {found.name} has {list(other) if other else 'nothing'} for {name} but the "
                f"target {target.name} has {list(shape)}; name what target and source were both fine-tuned from"
            )
    return found
