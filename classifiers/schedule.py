"""Learning rates as pure functions of the number of updates done so far.

The one rule: a schedule holds no state, so a resumed run asks for the same rate as one that was never stopped.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

__all__ = ["Schedule", "constant", "cosine", "exponential"]

Schedule: TypeAlias = Callable[[int], float]  # number of updates done so far -> learning rate of the next one


def constant(learning_rate: float) -> Schedule:
    """Return the schedule that always gives ``learning_rate``."""
    return lambda _: learning_rate


def exponential(
    learning_rate: float, *, factor: float, every_epochs: int, after_updates: int, updates_per_epoch: int
) -> Schedule:
    """Return the schedule that multiplies by ``factor`` at every ``every_epochs`` epochs after ``after_updates`` updates.

    The first multiplication comes ``every_epochs`` epochs after that many updates, as [P B.3] reads literally. Its 184,000
    updates for CIFAR-10 are never reached in 300 epochs of 391 updates (117,300): the rate then stays constant.

    Example:
        >>> rate = exponential(1.0, factor=0.5, every_epochs=2, after_updates=100, updates_per_epoch=10)
        >>> [rate(update) for update in (0, 100, 119, 120, 140)]
        [1.0, 1.0, 1.0, 0.5, 0.25]
    """
    period = every_epochs * updates_per_epoch
    return lambda update: learning_rate * factor ** (max(0, update - after_updates) // period)


def cosine(learning_rate: float, *, total_updates: int) -> Schedule:
    """Return the schedule that falls from ``learning_rate`` to 0 over ``total_updates`` as half a cosine wave.

    Example:
        >>> rate = cosine(0.1, total_updates=100)
        >>> [round(rate(update), 3) for update in (0, 50, 100)]
        [0.1, 0.05, 0.0]
    """
    return lambda update: 0.5 * learning_rate * (1.0 + math.cos(math.pi * min(update, total_updates) / total_updates))
