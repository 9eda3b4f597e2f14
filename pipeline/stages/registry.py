"""The stages in execution order, with their command-line help. Imports neither NumPy nor the stages.

The ``Stage`` object in each stage's module defines its version and function.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["STAGES", "STAGE_COMMANDS", "StageCommand"]


@dataclass(frozen=True, kw_only=True)
class StageCommand:
    """The command-line help of a stage."""

    summary: str  # help text, one line
    example: str = ""  # options in the example
    section: str = ""  # required section of the recipe; "" if none is required
    divisible: bool = False  # whether the tasks of a job array can share its shards


STAGE_COMMANDS: Final[Mapping[str, StageCommand]] = {
    "ingest": StageCommand(summary="Read the data set of RECIPE into dataset.h5.", example=" --set data.heldout=500"),
    "train-glow": StageCommand(
        summary="Train the flow of RECIPE, and build its inputs.", example=" --device cuda", section="[flow]"
    ),
    "encode": StageCommand(
        summary="Encode the training images of RECIPE to latents.",
        example=" --workers 2",
        section="[flow]",
        divisible=True,
    ),
    "mix": StageCommand(
        summary="Build the pools of RECIPE.",
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
