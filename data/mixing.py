"""What a mixing method is: one pure function on pairs; and how methods, and other things by name, are found.

The one rule: a name leads to "package.module:function", so that names are listed and checked without importing anything
heavy; those of lsmix stand in a registry, those of other packages in their entry points.
"""

import difflib
import importlib
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lsmix.data.errors import RecipeError
from lsmix.data.rng import generator

if TYPE_CHECKING:
    import torch

__all__ = [
    "LATENT_METHODS",
    "PIXEL_METHODS",
    "Method",
    "Registry",
    "RowRng",
    "checked_rates",
    "import_object",
    "nearest",
    "row_rngs",
]

# Gives the generator of a row, 0 to N − 1; the same one in any split of the work.
RowRng: TypeAlias = Callable[[int], np.random.Generator]


# (x1, x2, λ float64 (N,) on the CPU, draws) -> mixed like x1, share of x2 float64 (N,) on the CPU.
# In latent space x is float (N, D), in pixel space uint8 (N, C, H, W).
Method: TypeAlias = "Callable[[torch.Tensor, torch.Tensor, torch.Tensor, RowRng], tuple[torch.Tensor, torch.Tensor]]"


class Registry:
    """Named objects, built in or from other packages.

    Args:
        kind: what they are, for messages: "mixing method in latent space".
        group: the group of entry points in which other packages name theirs.
        builtin: where those of lsmix stand, "package.module:name" by name.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str]) -> None:
        self.kind = kind
        self.group = group
        self._builtin = dict(builtin)

    def names(self) -> list[str]:
        """Return all names, built-in ones first."""
        return [*self._builtin, *sorted(self._others().keys() - self._builtin.keys())]

    def builtin(self) -> list[str]:
        """Return the names of lsmix's own, whatever else is installed."""
        return list(self._builtin)

    def __contains__(self, name: object) -> bool:
        return name in self._builtin or name in self._others()

    def check(self, name: str) -> None:
        """Raise RecipeError, with the nearest name, unless there is one of this name."""
        if name not in self:
            raise RecipeError(f"unknown {self.kind} {name!r}.{nearest(name, self.names())}")

    def load(self, name: str) -> Any:
        """Import and return what stands behind a name.

        Raises:
            RecipeError: there is none, or another package's cannot be imported.
        """
        self.check(name)
        return import_object(self._builtin.get(name) or self._others()[name], f"{self.kind} {name!r}")

    def _others(self) -> dict[str, str]:
        return {entry.name: entry.value for entry in entry_points(group=self.group)}


def import_object(reference: str, what: str) -> Any:
    """Return the object that ``reference``, "package.module:name", names.

    Raises:
        RecipeError: there is nothing of this name, or importing it fails; ``what`` begins the message.
    """
    module, _, name = reference.partition(":")
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # another package may raise anything while it is imported
        raise RecipeError(f"{what}: {reference!r} cannot be imported ({error}). Install its package.") from error
    return found


def nearest(word: str, known: list[str]) -> str:
    """Return the end of a message about an unknown word: the nearest known one, and all of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return (f" Did you mean {close[0]!r}?" if close else "") + f" Known: {', '.join(known)}."


def row_rngs(seed: int, *words: str | int) -> RowRng:
    """Return the generators of rows that are named by a seed, words and their own number."""
    return lambda row: generator(seed, *words, row)


def checked_rates(lam: ArrayLike, count: int) -> NDArray[np.float64]:
    """Return λ as float64 (count,), from a number or one for each pair.

    Raises:
        RecipeError: it has another shape, or lies outside [0, 1].
    """
    values = np.array(lam, np.float64)
    if values.shape not in ((), (count,)):
        raise RecipeError(f"λ has shape {values.shape}: expected a number or one per pair, ({count},).")
    bad = values[~((values >= 0.0) & (values <= 1.0))]
    if bad.size:
        raise RecipeError(f"λ must lie within [0, 1], got {float(bad.flat[0])!r}.")
    return np.broadcast_to(values, (count,)).copy()


LATENT_METHODS: Final = Registry(
    "mixing method in latent space",
    "lsmix.latent_methods",
    {
        "ls-mix": "lsmix.glow.latent_mixing:ls_mix",
        "linear": "lsmix.glow.latent_mixing:linear",
        "bern-mix": "lsmix.glow.latent_mixing:bern_mix",
        "swap-mix": "lsmix.glow.latent_mixing:swap_mix",
        "reverse-mix": "lsmix.glow.latent_mixing:reverse_mix",
    },
)


PIXEL_METHODS: Final = Registry(
    "mixing method in pixel space",
    "lsmix.pixel_methods",
    {
        "mixup": "lsmix.classifiers.pixel_mixing:mixup",
        "cutmix": "lsmix.classifiers.pixel_mixing:cutmix",
        "resizemix": "lsmix.classifiers.pixel_mixing:resizemix",
        "fmix": "lsmix.classifiers.pixel_mixing:fmix",
    },
)
