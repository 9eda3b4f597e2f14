"""Named random streams and stratified samples: every draw follows from a seed and a purpose."""

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
    """Return how many of ``count`` rows each class gives: its share, rounded down or up, ``count`` in total.

    Shares that were rounded down the most are rounded up first; ``ranks`` (one a class) settles ties, lowest first.

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
    """Return ``count`` rows, ascending, int64 (count,), with every class at its share of ``labels`` to within one.

    ``words`` name the choice, as in ``seeds.generator``.
    """
    classes, members = np.unique(labels, return_inverse=True)
    ranks = generator(seed, *words, "ranks").permutation(len(classes))
    quotas = class_quotas(np.bincount(members, minlength=len(classes)), count, ranks)
    chosen = [
        # Keyed by the class, so that a class's order does not change with the size of the others.
        generator(seed, *words, "class", int(label)).permutation(np.flatnonzero(members == k))[: quotas[k]]
        for k, label in enumerate(classes)
    ]
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)


Seed = Annotated[
    int, msgspec.Meta(ge=0, le=2**53 - 1)
]  # as a recipe says it; larger ones lose digits in many JSON readers


def _digest(seed: int, words: tuple[str | int, ...]) -> bytes:
    return hashlib.sha256(json.dumps([seed, *words]).encode()).digest()


def generator(seed: int, *words: str | int) -> np.random.Generator:
    """Return the counter-based (Philox) generator named by a seed and words.

    Example:
        >>> from lsmix.data.rng import generator
        >>> bool(generator(0, "mix", 3).random() == generator(0, "mix", 3).random())
        True
    """
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(seed, words)[:16], "little")))


def torch_seed(seed: int, *words: str | int) -> int:
    """Return the 63-bit seed for a ``torch.Generator`` named by a seed and words."""
    return int.from_bytes(_digest(seed, words)[16:24], "little") >> 1
