"""Find the inputs of a pool: data set, latents and flow, each checked against its digest in the plan."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from lsmix.data.artifact import (
    MANIFEST_NAME,
    Artifact,
    Manifest,
    content_digest,
    record_file,
    verify_files,
    write_manifest,
)
from lsmix.data.dataset import DATASET_NAME, DataSet, open_dataset
from lsmix.data.errors import CorruptError, FormatError, LsmixError, MissingError, RecipeError
from lsmix.data.latents import open_latents
from lsmix.data.pool_spec import PoolSpec, Provenance
from lsmix.data.progress import Progress
from lsmix.data.store import local_folder, open_artifact, open_input, shipped_flow
from lsmix.pipeline.config.schema import DataConfig
from lsmix.pipeline.engine.executor import InProcessExecutor
from lsmix.pipeline.engine.runner import bring_up_to_date
from lsmix.pipeline.engine.stage import Node
from lsmix.pipeline.stages.ingest import INGEST, dataset_counts
from lsmix.pipeline.workspace.cache_key import KEY_DIGITS
from lsmix.pipeline.workspace.workspace import Workspace

__all__ = ["PoolInputs", "check_flow", "find_base", "provide_dataset", "require"]

_DIGITS = "digits"  # the built-in data set, which has no path


@dataclass(frozen=True, kw_only=True)
class PoolInputs:
    """The artifacts that a pool was built from, as far as they are available."""

    dataset: Artifact | None = None
    latents: Artifact | None = None
    flow: Artifact | None = None
    given: str = ""  # path of the data set, if the user named one

    def labels(self) -> tuple[npt.NDArray[np.int64] | None, str]:
        """Return the class of each training image, int64 (N,), and its origin; None if no labels are available."""
        if self.dataset:
            return open_dataset(self.dataset).train.labels, f"the data set {self.given or self.dataset.location!r}"
        if self.latents:
            return open_latents(self.latents).labels, f"the latents {self.latents.location!r}"
        return None, ""


def find_base(
    pool: Path,
    plan: PoolSpec,
    *,
    data: Path | str | None,
    flow: Path | str | None,
    scratch: Path,
    progress: Progress,
) -> PoolInputs:
    """Return the inputs of a pool: the ones that the user named, or the ones in the pool's workspace.

    Published files are ingested into a workspace at ``scratch``.

    Raises:
        RecipeError: The pool was not built from ``data`` or ``flow``.
        LsmixError: An input cannot be read.
    """
    given = check_flow(flow, plan) if flow else None
    home = Workspace(pool.resolve().parent.parent)
    dataset = provide_dataset(data, plan.origin, Workspace(scratch), progress) if data else None
    return PoolInputs(
        dataset=dataset or _find(home, "ingest", plan.origin.content_digest),
        latents=_find(home, "encode", plan.inputs.get("latents")),
        flow=given or _find(home, "train-glow", plan.inputs.get("flow")) or shipped_flow(plan.inputs.get("flow")),
        given=str(data) if data and local_folder(data) else "",
    )


def _find(home: Workspace, stage: str, content_digest: str | None) -> Artifact | None:
    """Return the artifact of a stage with this content digest, fully verified; None if there is none."""
    artifact = home.find_content(stage, content_digest) if content_digest else None
    try:
        return artifact and _verified(artifact)
    except LsmixError:
        return None


def _verified(artifact: Artifact) -> Artifact:
    """Return an artifact after verifying all bytes of a local one; files from a URL are verified on download."""
    if artifact.is_local and artifact.manifest.cache_key:  # a flow without a manifest was just hashed
        verify_files(artifact.folder, artifact.manifest)
    return artifact


def check_flow(flow: Path | str, plan: PoolSpec) -> Artifact:
    """Return the flow in a folder or at a URL after checking that its bytes match the plan.

    Raises:
        RecipeError: The plan needs no flow, or another flow.
        MissingError, FormatError, CorruptError: The flow does not exist or is damaged.
    """
    wanted = plan.inputs.get("flow")
    if wanted is None:
        raise RecipeError(f"{plan.pool.method!r} mixes pixels and needs no flow. Remove '--flow'.")
    artifact = _verified(open_input(flow, "flow"))
    if artifact.manifest.content_digest != wanted:
        raise RecipeError(
            f"flow {artifact.location!r} does not match the plan: its content digest is "
            f"{artifact.manifest.content_digest[:12]}…, expected {wanted[:12]}…. Use the flow that encoded the latents."
        )
    return artifact


def _data_config(origin: Provenance, data: Path | str) -> DataConfig:
    """Return the configuration to read a plan's base set from published files at ``data`` or the built-in digits."""
    location: dict[str, Any] = {"format": _DIGITS} if str(data) == _DIGITS else {"path": str(data)}
    try:
        return msgspec.convert({**origin.config, **location}, DataConfig)
    except msgspec.ValidationError as error:
        raise FormatError(f"the plan's origin has settings that lsmix does not know: {error}.") from error


def provide_dataset(data: Path | str, origin: Provenance, workspace: Workspace, progress: Progress) -> Artifact:
    """Return the data set that ``origin`` describes, built in a workspace if necessary.

    ``data`` is the folder or URL of this data set or its dataset.h5. It can also be published files or "digits", which
    are ingested with the settings in ``origin``.

    Raises:
        RecipeError: The result is another data set. The message lists the differences.
        FormatError: The settings in ``origin`` are unknown.
        LsmixError: The data cannot be read.
    """
    path = local_folder(data)
    folder = path.parent if path and path.name == DATASET_NAME and path.is_file() else path
    if folder is None or (folder / MANIFEST_NAME).is_file():
        artifact = _verified(open_input(folder or data, "dataset"))
        settings = {name: value for name, value in artifact.manifest.config.items() if name not in INGEST.not_in_key}
        if artifact.manifest.content_digest == origin.content_digest and settings != origin.config:
            raise CorruptError(
                f"{artifact.location!r} contains the plan's data set, but its manifest was altered. Download it again."
            )
    elif path and path != folder:
        artifact = _import_file(path, origin, workspace)
    else:
        node = Node(stage=INGEST, name="base", config=_data_config(origin, data))
        (built,) = bring_up_to_date([node], workspace, executor=InProcessExecutor(), progress=progress)
        artifact = open_artifact(built.location)  # with its configuration in file order, as latents and pools store it
    if artifact.manifest.content_digest != origin.content_digest:
        raise RecipeError(_difference(data, open_dataset(artifact), artifact.manifest, origin))
    return artifact


def _import_file(file: Path, origin: Provenance, workspace: Workspace) -> Artifact:
    """Import a dataset.h5 without a manifest as an artifact, if it has the expected content."""
    dataset, files = open_dataset(file), [record_file(file.parent, DATASET_NAME, payload=True)]
    manifest = Manifest(
        stage=INGEST.name,
        stage_version=INGEST.version,
        name="given",
        cache_key=origin.content_digest[:KEY_DIGITS],  # the real key is unknown, since the sources are
        content_digest=content_digest(files),
        config=dict(origin.config),
        inputs=[],
        files=files,
        counts=dataset_counts(dataset),
    )
    if manifest.content_digest != origin.content_digest:
        raise RecipeError(_difference(file, dataset, manifest, origin))
    folder = workspace.folder(INGEST.name, manifest.name, manifest.cache_key)
    if not (folder / MANIFEST_NAME).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / DATASET_NAME)
        write_manifest(folder, manifest)
    return open_artifact(folder)


def _difference(data: Path | str, found: DataSet, manifest: Manifest, origin: Provenance) -> str:
    """Return a message that lists the differences to the expected data set."""
    hints = []
    if len(found.train) != origin.train_images:
        hints.append(f"it has {len(found.train)} training images, expected {origin.train_images}")
    if found.licence != origin.licence:
        hints.append(f"its licence is {found.licence!r}, expected {origin.licence!r}")
    if found.citation != origin.citation:
        hints.append("it has another citation, so it is another data set")
    for name, wanted in origin.config.items():
        if manifest.config.get(name) != wanted:
            hints.append(f"{name} is {manifest.config.get(name)!r}, expected {wanted!r}")
    default = "the images or their order differ; it may be another version or subset of the published files"
    return (
        f"the data set from {str(data)!r} is not the base set of the pool: content digest "
        f"{manifest.content_digest[:12]}…, expected {origin.content_digest[:12]}…; {'; '.join(hints or [default])}. "
        "Name the published files that the pool was built from."
    )


def require(found: Artifact | None, what: str, option: str) -> Artifact:
    """Return the artifact; raise MissingError if it is None."""
    if found is None:
        raise MissingError(f"the {what} of the pool was not found. Name it with '{option}'.")
    return found
