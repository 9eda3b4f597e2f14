"""Compare two artifacts or two recipes field by field."""

from pathlib import Path
from typing import Any

import msgspec

from lsmix.data.errors import RecipeError
from lsmix.data.store import open_artifact
from lsmix.pipeline.config.recipe import read_recipe
from lsmix.pipeline.engine.status import field_differences

__all__ = ["Difference", "differences"]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A field and its two values."""

    field: str  # such as "config.alpha" or "inputs.flow"
    a: Any  # None if the first one lacks the field
    b: Any  # None if the second one lacks the field


def differences(first: str, second: str) -> list[Difference]:
    """Return the fields in which two artifacts or two recipes, including their defaults, differ.

    Args:
        first: Folder or URL of an artifact, or the TOML file of a recipe.
        second: Another artifact or recipe, of the same kind as ``first``.

    Raises:
        RecipeError: One is a recipe and the other is not, or a recipe is invalid.
        LsmixError: An artifact cannot be opened.
    """
    recipes = [_is_recipe(path) for path in (first, second)]
    if len(set(recipes)) > 1:
        raise RecipeError("Cannot compare a recipe with an artifact. Name two recipes or two artifacts.")
    before, now = map(_recipe_fields if recipes[0] else _artifact_fields, (first, second))
    return [Difference(field=name, a=a, b=b) for name, a, b in field_differences(before, now)]


def _is_recipe(path: str) -> bool:
    return "://" not in path and (path.endswith(".toml") or Path(path).is_file())


def _recipe_fields(path: str) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(read_recipe(path))
    return fields


def _artifact_fields(path: str) -> dict[str, Any]:
    """Return the fields to compare: identity, configuration, inputs, counts and software, but no times."""
    manifest = open_artifact(path).manifest
    return {
        "stage": manifest.stage,
        "stage_version": manifest.stage_version,
        "name": manifest.name,
        "cache_key": manifest.cache_key,
        "content_digest": manifest.content_digest,
        "config": manifest.config,
        "inputs": {record.role: record.cache_key or record.content_digest[:12] for record in manifest.inputs},
        "counts": manifest.counts,
        "made_with": {
            **manifest.environment.get("versions", {}),
            "device": manifest.environment.get("device"),
        },
    }
