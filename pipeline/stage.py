"""What a stage is: a plain function of its configuration, its inputs and an output folder.

Stages know neither the recipe nor each other; the runner hands them complete inputs and makes the result an artifact.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsmix.data.manifest import Manifest
from lsmix.pipeline.progress import Progress

if TYPE_CHECKING:
    from lsmix.pipeline.executors import Executor

__all__ = ["InputArtifact", "Outcome", "Stage", "StageTask"]


@dataclass(frozen=True, kw_only=True)
class InputArtifact:
    """A complete artifact that a stage reads."""

    folder: Path
    manifest: Manifest


@dataclass(frozen=True, kw_only=True)
class StageTask:
    """One piece of work: make ``folder`` from ``config`` and ``inputs``.

    ``folder / "work"`` keeps whatever lets the work go on after an interruption; it is removed at the end.
    """

    stage: str
    label: str  # how to call it to a user: "mix lsmix"
    folder: Path
    config: Any  # the stage's own configuration model
    inputs: Mapping[str, InputArtifact]
    device: str
    executor: "Executor"
    progress: Progress

    @property
    def work(self) -> Path:
        """The folder for unfinished work, made if need be."""
        path = self.folder / "work"
        path.mkdir(parents=True, exist_ok=True)
        return path


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a stage says of its work when it is done."""

    payload: frozenset[str]  # files, or first parts of paths, that the next stages read
    counts: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)  # SHA-256 by path, where known from writing


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage by name, with what its key must know."""

    name: str
    version: int  # raised whenever the same inputs would give other bytes
    run: Callable[[StageTask], Outcome]
    estimate_bytes: Callable[[Any, Mapping[str, InputArtifact]], int]  # size of the result, before it is made
    not_in_key: frozenset[str] = frozenset()
    uses_torch: bool = True
