"""Registries of mixing methods with their metadata, and the general class ``Registry``.

Entries refer to their functions as "package.module:function", so that names can be checked without importing torch.
Other packages add methods through the entry point groups ``lsmix.latent_methods`` and ``lsmix.pixel_methods``.
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

# Returns the generator of a row, 0 to N − 1, which does not depend on how the work is split.
RowRng: TypeAlias = Callable[[int], np.random.Generator]

# (x1, x2, λ, generators) -> (mixed, share of x2). x1, x2 and mixed are float (N, D) in latent space and uint8
# (N, C, H, W) in pixel space; λ and share are float64 (N,) on the CPU.
Method: TypeAlias = "Callable[[torch.Tensor, torch.Tensor, torch.Tensor, RowRng], tuple[torch.Tensor, torch.Tensor]]"
_Floats: TypeAlias = NDArray[np.float64]
_Space: TypeAlias = Literal["latent", "pixel"]


@dataclass(frozen=True, kw_only=True)
class MixingMethod:
    """Metadata of a mixing method."""

    function: str  # "package.module:name" of its Method, imported on use
    title: str  # as spelled in its paper
    citation: str = ""  # of its paper; "" for none
    # Computes the share of x₂ from λ, float64 (N,), and the sizes, (D,) or (height, width). None: run the method.
    share: Callable[[_Floats, tuple[int, ...]], _Floats] | None = None
    # "package.module:name" of the function that returns the pixels of x₂, bool (height, width), from ⌊λD⌋, the FlowConfig
    # and the latent order. "": run the method; for methods that spread x₂ over the image or mix pixels.
    region: str = ""


class Registry:
    """Objects by name: the built-in ones and those of other packages.

    Args:
        kind: Kind of object, for messages, such as "mixing method in latent space".
        group: Entry point group through which other packages add objects.
        builtin: "package.module:name" of the built-in objects, by name.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str]) -> None:
        self.kind = kind
        self.group = group
        self._builtin = dict(builtin)

    def names(self) -> list[str]:
        """Return all names, built-in ones first."""
        return [*self._builtin, *sorted(self._external().keys() - self._builtin.keys())]

    def builtin(self) -> list[str]:
        """Return the names of the built-in objects."""
        return list(self._builtin)

    def __contains__(self, name: object) -> bool:
        return name in self._builtin or name in self._external()

    def check(self, name: str) -> None:
        """Raise RecipeError and suggest the nearest name if the name is unknown."""
        if name not in self:
            raise RecipeError(f"unknown {self.kind} {name!r}.{nearest(name, self.names())}")

    def load(self, name: str) -> Any:
        """Import and return the object with this name.

        Raises:
            RecipeError: The name is unknown, or the object cannot be imported.
        """
        self.check(name)
        return import_object(self._builtin.get(name) or self._external()[name], f"{self.kind} {name!r}")

    def _external(self) -> dict[str, str]:
        return {entry.name: entry.value for entry in entry_points(group=self.group)}


def import_object(reference: str, what: str) -> Any:
    """Import and return the object that ``reference``, "package.module:name", refers to.

    Raises:
        RecipeError: The object does not exist or cannot be imported; ``what`` begins the message.
    """
    module, _, name = reference.partition(":")
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing another package may raise any exception
        raise RecipeError(f"{what}: {reference!r} cannot be imported ({error}). Install its package.") from error
    return found


def nearest(word: str, known: list[str]) -> str:
    """Return the end of a message about an unknown word: a suggestion and all known words."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return (f" Did you mean {close[0]!r}?" if close else "") + f" Known: {', '.join(known)}."


def row_rngs(seed: int, *words: str | int) -> RowRng:
    """Return the generators of rows, each derived from a seed, words and the row's number."""
    return lambda row: generator(seed, *words, row)


def checked_rates(lam: ArrayLike, count: int) -> NDArray[np.float64]:
    """Return λ as float64 (count,) from one number, or from one per pair.

    Raises:
        RecipeError: Λ has another shape or is outside [0, 1].
    """
    values = np.array(lam, np.float64)
    if values.shape not in ((), (count,)):
        raise RecipeError(f"λ has shape {values.shape}: expected a number or one per pair, ({count},).")
    bad = values[~((values >= 0.0) & (values <= 1.0))]
    if bad.size:
        raise RecipeError(f"λ must be within [0, 1], got {float(bad.flat[0])!r}.")
    return np.broadcast_to(values, (count,)).copy()


def _rate(lam: _Floats, _sizes: tuple[int, ...]) -> _Floats:
    return lam


def _floor(lam: _Floats, sizes: tuple[int, ...]) -> _Floats:
    """Return ⌊λn⌋/n for n components or pixels."""
    total = int(np.prod(sizes))
    share: _Floats = np.floor(lam * total) / total
    return share


def _patch(lam: _Floats, sizes: tuple[int, ...]) -> _Floats:
    """Return the relative area of a patch whose sides are √λ of the image's sides, rounded down."""
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
            share=_floor,
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
            share=_floor,
            region=f"{_REGIONS}:trailing_region",
        ),
        "reverse-mix": MixingMethod(
            function="lsmix.glow.latent_mixing:reverse_mix",
            title="Reverse-Mix",
            citation=_PAPER,
            share=_floor,
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
            share=_floor,
        ),
    },
}


class MethodRegistry(Registry):
    """The mixing methods of one space: the built-in ones and those of other packages.

    An entry point refers to a ``MixingMethod``, or to a function alone, which then has no citation and no share formula.
    """

    def __init__(self, space: _Space) -> None:
        functions = {name: method.function for name, method in _METHODS[space].items()}
        super().__init__(f"mixing method in {space} space", f"lsmix.{space}_methods", functions)
        self._methods = _METHODS[space]

    def entry(self, name: str) -> MixingMethod:
        """Return the metadata of a method; methods of other packages are imported.

        Raises:
            RecipeError: The name is unknown, or the method cannot be imported.
        """
        if name in self._methods:
            return self._methods[name]
        found = super().load(name)
        return found if isinstance(found, MixingMethod) else MixingMethod(function=self._external()[name], title=name)

    def load(self, name: str) -> Method:
        """Import and return a method's function.

        Raises:
            RecipeError: As for ``entry``.
        """
        return cast(Method, import_object(self.entry(name).function, f"{self.kind} {name!r}"))

    def _external(self) -> dict[str, str]:
        reserved = {name for methods in _METHODS.values() for name in methods}  # built-in names of both spaces
        return {name: value for name, value in super()._external().items() if name not in reserved}


LATENT_METHODS: Final = MethodRegistry("latent")
PIXEL_METHODS: Final = MethodRegistry("pixel")
