"""Small recipes, data sets and pools for tests."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

# Runs all stages in a few seconds.
TINY_RECIPE = """\
name = "tiny"
[data]
format = "digits"
heldout = 30
test = 80
limit = 330
[flow]
levels = 2
steps = 2
hidden = 16
threads = 1
checkpoint_every = 10
evaluate_every = 20
evaluate_images = 64
[flow.training]
iterations = 40
batch_size = 32
learning_rate = 1e-3
warmup = 10
flip = false
translate = 1
[latents]
chunk_rows = 64
[pools.lsmix]
alpha = 0.4
copies = 2
chunk_rows = 128
[pools.zero]
lambdas = [0.0, 1.0]
[classifier]
threads = 1
width = 8
epochs = 2
batch_size = 64
flip = false
translate = 1
[runs.baseline]
seeds = [0, 1]
[runs.lsmix]
pool = "lsmix"
[report]
pairs = 2
bits_images = 64
"""

# Runs all stages in a tenth of a second each, on the images of ``write_images``.
SMALL_RECIPE = """\
name = "small"
[data]
path = "images.npz"
format = "npz"
heldout = 4
[flow]
levels = 1
steps = 1
hidden = 4
threads = 1
checkpoint_every = 1
evaluate_every = 2
evaluate_images = 4
[flow.training]
iterations = 2
batch_size = 8
warmup = 1
flip = false
translate = 0
[latents]
chunk_rows = 8
[pools.mixed]
alpha = 0.4
chunk_rows = 8
[classifier]
threads = 1
width = 2
epochs = 2
batch_size = 8
flip = false
translate = 0
[runs.mixed]
pool = "mixed"
[naturalness]
methods = ["ls-mix", "mixup"]
pairs = 2
bootstrap = 10
classifier = "mixed"
[report]
pairs = 1
bits_images = 8
"""

# The common data set and flow of recipes with pools of every mixing method.
METHODS_RECIPE = """\
name = "methods"
[data]
format = "digits"
limit = 150
test = 60
[flow]
levels = 2
steps = 2
hidden = 16
threads = 1
evaluate_images = 16
[flow.training]
iterations = 40
batch_size = 32
learning_rate = 1e-3
warmup = 10
flip = false
translate = 1
"""
CLASSES = ("cat", "dog", "frog")


def write_images(path: Path, labels: "np.ndarray", test_labels: "np.ndarray | None" = None) -> Path:
    """Write a data set of random grey 8×8 images with the given labels."""
    import numpy as np  # not before conftest.py has set the number of threads

    draw = np.random.default_rng(0)
    arrays = {"train_images": draw.integers(0, 256, (len(labels), 8, 8), dtype=np.uint8), "train_labels": labels}
    if test_labels is not None:
        arrays["test_images"] = draw.integers(0, 256, (len(test_labels), 8, 8), dtype=np.uint8)
        arrays["test_labels"] = test_labels
    np.savez(path, **arrays)
    return path


def invented_plan(origin: dict[str, Any], method: str = "ls-mix") -> bytes:
    """Return the content of plan.json for a pool of random images; ``origin`` is as in the pool's attributes."""
    from lsmix.data.mixing import LATENT_METHODS
    from lsmix.data.pool_spec import SPEC_FORMAT, EncodeConfig, PoolConfig, PoolSpec, Provenance

    latent = method in LATENT_METHODS
    inputs = {"latents": "1" * 64, "flow": "2" * 64} if latent else {"dataset": origin["content_digest"]}
    spec = PoolSpec(
        format_version=SPEC_FORMAT,
        stage_version=2,
        pool=PoolConfig(method=method),
        inputs=inputs,
        origin=Provenance(**origin),
        latents=EncodeConfig() if latent else None,
        dim=48 if latent else None,
    )
    return spec.to_json()


def flip(path: Path, place: int | None = None) -> None:
    """Flip one bit of a file, in the byte at ``place`` or by default in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(content)


def contents(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder by relative path, sorted."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_pool(
    folder: Path,
    *,
    rows: int = 48,
    copies: int = 2,
    chunk_rows: int = 16,
    seed: int = 0,
    image_shape: tuple[int, int, int] = (8, 8, 3),
    class_names: tuple[str, ...] = CLASSES,
    method: str = "mixup",
    sources: int = 2,
    corners: bool = False,
    origin: dict[str, Any] | None = None,
    columns: "Callable[[np.ndarray], dict[str, np.ndarray]] | None" = None,
    complete: bool = True,
    **manifest: Any,
) -> Path:
    """Write a complete pool of random images; with ``origin``, it has a plan and rows of every status.

    ``columns`` is called with row numbers and returns columns that replace the random ones.
    """
    import numpy as np

    from lsmix.data.pool import create_pool, write_pool_shard

    draw, images = np.random.default_rng(seed), rows // copies
    store = create_pool(
        folder,
        images_per_copy=images,
        copies=copies,
        image_shape=image_shape,
        class_names=class_names,
        method=method,
        chunk_rows=chunk_rows,
        sources=sources,
        corners=corners,
        attributes={"origin": origin} if origin else {},
    )
    for shard in range(store.shards):
        own = np.asarray(store.shard_range(shard))
        count, first, second = len(own), own % images, draw.integers(0, images, len(own))
        arrays = {
            "image": draw.integers(0, 256, (count, *image_shape), dtype=np.uint8),
            "source_a": first,
            "source_b": second,
            "label_a": first % len(class_names),
            "label_b": second % len(class_names),
            "lam": draw.random(count, dtype=np.float32),
            "share_b": draw.random(count, dtype=np.float32),
            "status": draw.integers(0, 3 if origin else 1, count).astype(np.uint8),
        }
        if sources > 2:
            more = draw.integers(0, images, (count, sources - 2))
            arrays |= {"source_more": more, "label_more": more % len(class_names)}
            share = draw.dirichlet([1.0] * sources, count).astype(np.float32)
            arrays |= {"lam": share[:, 1], "share_b": share[:, 1], "lam_more": share[:, 2:], "share_more": share[:, 2:]}
        if corners:
            arrays["corner"] = draw.integers(0, 4, count).astype(np.uint8)
        for name, values in columns(own).items() if columns else ():
            arrays[name] = values.astype(arrays[name].dtype)
        write_pool_shard(folder, shard, arrays)
    if origin:
        (folder / "plan.json").write_bytes(invented_plan(origin, method))
    else:
        (folder / "samples.csv").touch()
        (folder / "README.md").write_text("hello")
    if complete:
        complete_artifact(folder, **manifest)
    return folder


def complete_artifact(folder: Path, **manifest: Any) -> None:
    """Write the manifest of a folder, of a pool by default; ``manifest`` overrides its fields."""
    from lsmix.data.artifact import Manifest, content_digest, record_files, write_manifest

    files = record_files(folder)
    digests = {"cache_key": "0123456789ab", "content_digest": content_digest(files)}
    fields = {"stage": "mix", "stage_version": 1, "name": "mine", "config": {}, "inputs": [], **digests, **manifest}
    write_manifest(folder, Manifest(files=files, **fields))


def reseal(folder: Path, **changes: Any) -> None:
    """Rewrite the manifest of a modified pool with matching checksums, like a forger; ``changes`` sets other fields."""
    import msgspec

    from lsmix.data.artifact import content_digest, read_manifest, record_files, write_manifest

    files = record_files(folder, {"pool.zarr", "plan.json"})
    manifest = msgspec.structs.replace(
        read_manifest(folder), files=files, content_digest=content_digest(files), **changes
    )
    write_manifest(folder, manifest)


def artifact_folder(workspace: Path, stage: str, name: str) -> Path:
    """Return the folder of the only artifact with this name in a stage."""
    (folder,) = (workspace / stage).glob(f"{name}-*")
    return folder


def content_digests(workspace: Path | str, *stages: str) -> dict[str, str]:
    """Return the content digests of all complete artifacts of the given stages."""
    from lsmix.pipeline.workspace.workspace import Workspace

    opened = Workspace(workspace)
    return {f"{stage}/{found.name}": found.content_digest for stage in stages for _, found in opened.manifests(stage)}
