"""The stages in the order of their work, with what the command line says of each. Imports neither NumPy nor the stages.

A stage itself, with its version and its function, is the ``Stage`` object of its module.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["STAGES", "STAGE_COMMANDS", "StageCommand"]


@dataclass(frozen=True, kw_only=True)
class StageCommand:
    """The command of a stage."""

    summary: str  # its help text, one line
    example: str = ""  # options of its example
    section: str = ""  # of the recipe, without which there is nothing to make; "" where no section is needed
    divisible: bool = False  # whether the tasks of a job array may share its shards


STAGE_COMMANDS: Final[Mapping[str, StageCommand]] = {
    "ingest": StageCommand(summary="Read the data set of RECIPE into dataset.h5.", example=" --set data.heldout=500"),
    "train-glow": StageCommand(
        summary="Train the flow of RECIPE, and make what it needs.", example=" --device cuda", section="[flow]"
    ),
    "encode": StageCommand(
        summary="Encode the training images of RECIPE to latents.",
        example=" --workers 2",
        section="[flow]",
        divisible=True,
    ),
    "mix": StageCommand(
        summary="Make the pools of RECIPE.",
        example=" --set pools.lsmix.alpha=0.2",
        section="[pools.NAME]",
        divisible=True,
    ),
    "train": StageCommand(
        summary="Train the classifiers of RECIPE.", example=" --set classifier.epochs=5", section="[runs.NAME]"
    ),
    "naturalness": StageCommand(
        summary="Measure how natural the mixes of each method in RECIPE are.",
        example=" --set naturalness.pairs=200",
        section="[naturalness]",
    ),
    "report": StageCommand(summary="Write the report of RECIPE."),
}
STAGES: Final = tuple(STAGE_COMMANDS)
