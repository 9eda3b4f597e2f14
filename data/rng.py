"""Random generators derived from a seed and words, and stratified sampling."""

import hashlib
import json
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

__all__ = ["Seed", "class_quotas", "generator", "stratified_sample", "torch_seed"]


def class_quotas(
    class_counts: npt.NDArray[np.int64], count: int, ranks: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.int64]:
    """Return the number of rows to choose from each class: its share of ``count``, rounded down or up.

    The shares with the largest remainders are rounded up; ``ranks``, one per class, breaks ties, lowest first.

    Example:
        >>> import numpy as np
        >>> class_quotas(np.array([50, 30, 20]), 5).tolist()
        [3, 1, 1]
    """
    total = int(class_counts.sum())
    if not 0 <= count <= total:
        raise ValueError(f"cannot choose {count} of {total} rows")
    if total == 0:
        return np.zeros_like(class_counts)
    quotas, remainders = np.divmod(class_counts * count, total)
    ties = np.arange(len(class_counts)) if ranks is None else ranks
    raised = np.lexsort((ties, -remainders))[: count - int(quotas.sum())]
    quotas[raised] += 1
    return quotas


def stratified_sample(
    labels: npt.NDArray[np.int64], count: int, *, seed: int, words: tuple[str | int, ...]
) -> npt.NDArray[np.int64]:
    """Choose ``count`` rows, int64 (count,), ascending, that keep every class's share of ``labels`` to within one row.

    ``words`` select the random stream, as for ``generator``.
    """
    classes, members = np.unique(labels, return_inverse=True)
    ranks = generator(seed, *words, "ranks").permutation(len(classes))
    quotas = class_quotas(np.bincount(members, minlength=len(classes)), count, ranks)
    chosen = [
        # One generator per class, so that the order within a class does not depend on the sizes of other classes.
        generator(seed, *words, "class", int(label)).permutation(np.flatnonzero(members == k))[: quotas[k]]
        for k, label in enumerate(classes)
    ]
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)


# A seed in a recipe. Many JSON readers lose digits of larger numbers.
Seed = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]


def _digest(seed: int, words: tuple[str | int, ...]) -> bytes:
    return hashlib.sha256(json.dumps([seed, *words]).encode()).digest()


def generator(seed: int, *words: str | int) -> np.random.Generator:
    """Return the counter-based (Philox) generator derived from a seed and words.

    Example:
        >>> from lsmix.data.rng import generator
        >>> bool(generator(0, "mix", 3).random() == generator(0, "mix", 3).random())
        True
    """
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(seed, words)[:16], "little")))


def torch_seed(seed: int, *words: str | int) -> int:
    """Return the 63-bit seed of a ``torch.Generator``, derived from a seed and words."""
    return int.from_bytes(_digest(seed, words)[16:24], "little") >> 1
