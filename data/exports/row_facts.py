"""The numbers of a row as JSON, for forms that hold one image a file.

The one rule: numbers keep their names and values; names of classes are added to them, so that a row explains itself.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from lsmix.data.exports.rows import Block

__all__ = ["row_facts"]


def row_facts(block: Block, first_row: int, class_names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Go through the rows of a block: everything but the image, ready for JSON.

    Args:
        block: some rows, by column.
        first_row: which row of the pool the first one is.
        class_names: by label.
    """
    numbers = {name: values.tolist() for name, values in block.items() if name != "image"}
    for index in range(len(block["state"])):
        facts: dict[str, Any] = {"row": first_row + index}
        facts |= {name: values[index] for name, values in numbers.items()}
        facts["class_a"], facts["class_b"] = class_names[facts["label_a"]], class_names[facts["label_b"]]
        yield facts
