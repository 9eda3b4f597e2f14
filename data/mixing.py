"""The mixing methods by name, with what is known of each, and ``Registry``, which finds things of any kind by name.

Entries name their functions as "package.module:function", so that names are checked without importing torch.
Other packages add methods with the entry point groups ``lsmix.latent_methods`` and ``lsmix.pixel_methods``.
"""

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, cast

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
    "MixingMethod",
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
_Floats: TypeAlias = NDArray[np.float64]
_Space: TypeAlias = Literal["latent", "pixel"]


@dataclass(frozen=True, kw_only=True)
class MixingMethod:
    """What is known of a mixing method."""

    function: str  # "package.module:name" of its Method, imported on use
    title: str  # as its paper spells it
    citation: str = ""  # of its paper; "" for none
    # The share of x₂ from λ, float64 (N,), and the sizes, (D,) or (height, width). None: the method must be run.
    share: Callable[[_Floats, tuple[int, ...]], _Floats] | None = None
    # "package.module:name" of the function that returns the pixels of x₂, bool (height, width), from ⌊λD⌋, the FlowConfig
    # and the latent order. "" for a method that spreads x₂ over the image, or that mixes pixels: those are run instead.
    region: str = ""


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


def _rate(lam: _Floats, _sizes: tuple[int, ...]) -> _Floats:
    return lam


def _whole(lam: _Floats, sizes: tuple[int, ...]) -> _Floats:
    """⌊λn⌋/n of n components or pixels."""
    total = int(np.prod(sizes))
    share: _Floats = np.floor(lam * total) / total
    return share


def _patch(lam: _Floats, sizes: tuple[int, ...]) -> _Floats:
    """The area of a patch with √λ of the image's sides, rounded down."""
    height, width = sizes
    share: _Floats = np.floor(height * np.sqrt(lam)) * np.floor(width * np.sqrt(lam)) / (height * width)
    return share


_PAPER: Final = (
    "G. Osada, B. Ahsan and T. Nishide, Mixed Samples Data Augmentation with Replacing Latent Vector Components in "
    "Normalizing Flow."
)
_REGIONS: Final = "lsmix.pipeline.naturalness.regions"
_METHODS: Final[dict[_Space, dict[str, MixingMethod]]] = {
    "latent": {
        "ls-mix": MixingMethod(
            function="lsmix.glow.latent_mixing:ls_mix",
            title="LS-Mix",
            citation=_PAPER,
            share=_whole,
            region=f"{_REGIONS}:second_region",
        ),
        "linear": MixingMethod(
            function="lsmix.glow.latent_mixing:linear", title="Linear", citation=_PAPER, share=_rate
        ),
        "bern-mix": MixingMethod(function="lsmix.glow.latent_mixing:bern_mix", title="Bern-Mix", citation=_PAPER),
        "swap-mix": MixingMethod(
            function="lsmix.glow.latent_mixing:swap_mix",
            title="Swap-Mix",
            citation=_PAPER,
            share=_whole,
            region=f"{_REGIONS}:trailing_region",
        ),
        "reverse-mix": MixingMethod(
            function="lsmix.glow.latent_mixing:reverse_mix",
            title="Reverse-Mix",
            citation=_PAPER,
            share=_whole,
            region=f"{_REGIONS}:second_region",
        ),
    },
    "pixel": {
        "mixup": MixingMethod(
            function="lsmix.classifiers.pixel_mixing:mixup",
            title="MixUp",
            citation="H. Zhang, M. Cisse, Y. N. Dauphin and D. Lopez-Paz, mixup: Beyond Empirical Risk Minimization, "
            "ICLR 2018.",
            share=_rate,
        ),
        "cutmix": MixingMethod(
            function="lsmix.classifiers.pixel_mixing:cutmix",
            title="CutMix",
            citation="S. Yun, D. Han, S. J. Oh, S. Chun, J. Choe and Y. Yoo, CutMix: Regularization Strategy to Train "
            "Strong Classifiers with Localizable Features, ICCV 2019.",
        ),
        "resizemix": MixingMethod(
            function="lsmix.classifiers.pixel_mixing:resizemix",
            title="ResizeMix",
            citation="J. Qin, J. Fang, Q. Zhang, W. Liu, X. Wang and X. Wang, ResizeMix: Mixing Data with Preserved "
            "Object Information and True Labels, 2020.",
            share=_patch,
        ),
        "fmix": MixingMethod(
            function="lsmix.classifiers.pixel_mixing:fmix",
            title="FMix",
            citation="E. Harris, A. Marcu, M. Painter, M. Niranjan, A. Prügel-Bennett and J. Hare, FMix: Enhancing "
            "Mixed Sample Data Augmentation, 2020.",
            share=_whole,
        ),
    },
}


class MethodRegistry(Registry):
    """The mixing methods of one space: lsmix's own, and those that other packages name in their entry points.

    An entry point names a ``MixingMethod``, or the function alone, which then has no citation and no share formula.
    """

    def __init__(self, space: _Space) -> None:
        own = {name: method.function for name, method in _METHODS[space].items()}
        super().__init__(f"mixing method in {space} space", f"lsmix.{space}_methods", own)
        self._own = _METHODS[space]

    def entry(self, name: str) -> MixingMethod:
        """Return what is known of a method; one of another package is imported.

        Raises:
            RecipeError: there is none, or another package's cannot be imported.
        """
        if name in self._own:
            return self._own[name]
        found = super().load(name)
        return found if isinstance(found, MixingMethod) else MixingMethod(function=self._others()[name], title=name)

    def load(self, name: str) -> Method:
        """Import and return a method's function.

        Raises:
            RecipeError: as ``entry``.
        """
        return cast(Method, import_object(self.entry(name).function, f"{self.kind} {name!r}"))

    def _others(self) -> dict[str, str]:
        taken = {name for methods in _METHODS.values() for name in methods}  # in either space
        return {name: value for name, value in super()._others().items() if name not in taken}


LATENT_METHODS: Final = MethodRegistry("latent")
PIXEL_METHODS: Final = MethodRegistry("pixel")
