"""Random generators named by words: every draw in lsmix comes from one of these.

A generator is keyed by a seed and the words that say what it is for, such as ("mix", copy, index); nothing is drawn
from a shared stream, so the plan is the same however the work is split, resumed or repeated.
"""

import hashlib
import json
from typing import Annotated

import msgspec
import numpy as np

__all__ = ["Seed", "generator", "torch_seed"]

Seed = Annotated[
    int, msgspec.Meta(ge=0, le=2**53 - 1)
]  # as a recipe says it; larger ones lose digits in many JSON readers


def _digest(seed: int, words: tuple[str | int, ...]) -> bytes:
    return hashlib.sha256(json.dumps([seed, *words]).encode()).digest()


def generator(seed: int, *words: str | int) -> np.random.Generator:
    """Return the counter-based (Philox) generator named by a seed and words.

    Example:
        >>> from lsmix.data.seeds import generator
        >>> bool(generator(0, "mix", 3).random() == generator(0, "mix", 3).random())
        True
    """
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(seed, words)[:16], "little")))


def torch_seed(seed: int, *words: str | int) -> int:
    """Return the 63-bit seed for a ``torch.Generator`` named by a seed and words."""
    return int.from_bytes(_digest(seed, words)[16:24], "little") >> 1
