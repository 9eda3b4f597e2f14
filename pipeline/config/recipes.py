"""The built-in recipes. Does not import ``Recipe``, so that ``lsmix init`` starts quickly."""

import difflib
import re
from pathlib import Path

from lsmix.data.errors import RecipeError

__all__ = ["builtin_recipes", "recipe_list", "recipe_path", "recipe_text"]

_RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def builtin_recipes() -> list[str]:
    """Return the names of the built-in recipes."""
    return sorted(path.stem for path in _RECIPES.glob("*.toml"))


def recipe_list() -> str:
    """Return one line per built-in recipe: its name and the first sentence of its first comment."""
    texts = {name: recipe_text(name).removeprefix("# ").partition("\n")[0] for name in builtin_recipes()}
    width = max(map(len, texts))
    return "".join(
        f"{name:<{width}}  {re.split(r'(?<=[?]) |[.:] ', text)[0].rstrip('.')}\n" for name, text in texts.items()
    )


def recipe_path(name: str) -> Path:
    """Return the file of a built-in recipe.

    Raises:
        RecipeError: There is no built-in recipe of this name.
    """
    known = builtin_recipes()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise RecipeError(f"there is no built-in recipe {name!r}.{hint} Available: {', '.join(known)}.")
    return _RECIPES / f"{name}.toml"


def recipe_text(name: str) -> str:
    """Return the text of a built-in recipe.

    Raises:
        RecipeError: There is no built-in recipe of this name.
    """
    return recipe_path(name).read_text(encoding="utf-8")
