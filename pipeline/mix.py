"""The mix stage: latents + flow + plan → ``pool.zarr``, the mixed images with their labels, shares and sources.

The plan says what is mixed with what; this module only applies it, and draws again what the flow cannot decode.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from lsmix.data.durable import write_durably
from lsmix.data.errors import RecipeError
from lsmix.data.latents import open_latents
from lsmix.data.pool import STATES, create_pool, pool_store, write_pool_shard
from lsmix.pipeline.keys import key_fields
from lsmix.pipeline.plan import Draw, MixPlan
from lsmix.pipeline.sharded import run_sharded
from lsmix.pipeline.stage import Estimate, InputArtifact, Outcome, Stage, StageTask, WorkSize

if TYPE_CHECKING:
    import torch

    from lsmix.glow.flow import Flow

__all__ = ["MIX", "PoolConfig"]

_PLAN_FILE = "plan.json"
_OK, _REDRAWN, _REPLACED = (STATES.index(name) for name in ("ok", "redrawn", "replaced"))

Rate = Annotated[float, Meta(ge=0, le=1)]


class PoolConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A pool of mixed images."""

    method: Literal["ls-mix"] = "ls-mix"  # how two latents are mixed
    alpha: Annotated[float, Meta(gt=0)] = 0.4  # λ ~ Beta(α, α), the share of the second image
    lambdas: tuple[Rate, ...] = ()  # instead of drawn λ: copy c takes lambdas[c % len(lambdas)]
    copies: Annotated[int, Meta(ge=0)] = 0  # times the training set is gone through; 0: one, or one for each of lambdas
    seed: Annotated[int, Meta(ge=0)] = 0  # of pairs and λ
    flow: str = ""  # another finished flow than the recipe's: its folder, or its name or key in the workspace
    output: Literal["8bit", "5bit"] = "8bit"  # levels of the decoded pixels
    batch_size: Annotated[int, Meta(ge=1, le=65536)] = 64  # images a pass; part of the key, since it changes last bits
    shard_rows: Annotated[int, Meta(ge=0)] = 0  # images a shard; 0 chooses about 25 MB
    on_corrupt: Literal["redraw", "keep"] = "redraw"  # what becomes of images that the flow cannot decode
    attempts: Annotated[int, Meta(ge=0, le=100)] = 3  # draws for a corrupted image before x₁ takes its place
    margin: Annotated[float, Meta(ge=0)] = 0.25  # how far outside [−½, ½] a pixel counts as broken
    broken_share: Rate = 0.02  # share of broken pixels above which an image is corrupted

    @property
    def copies_made(self) -> int:
        """The number of copies, at least 1."""
        return self.copies or max(len(self.lambdas), 1)


class _Loaded(NamedTuple):
    first: int  # row of the first image
    draw: Draw
    z_a: npt.NDArray[np.float32]
    z_b: npt.NDArray[np.float32]


class MixWorker:
    """Mixes and decodes the shards of one pool."""

    def __init__(self, folder: Path, config: PoolConfig, inputs: Mapping[str, InputArtifact], device: str) -> None:
        from lsmix.glow.checkpoint import load_flow
        from lsmix.pipeline.environment import prepare_device

        prepare_device(device)
        self._folder = folder
        self._config = config
        self._latents = open_latents(inputs["latents"].folder)
        self._labels = self._latents.label[:]
        self._flow: Flow = load_flow(inputs["flow"].folder, device=device)
        self._plan = make_plan(config, len(self._latents))
        self._order = self._latents.attributes["order"]
        self._store = pool_store(folder)

    def load(self, shard: int) -> _Loaded:
        """Read the latents that a shard mixes."""
        rows = self._store.shard_range(shard)
        draw = self._plan.rows(rows.start, rows.stop)
        z = self._latents.z
        return _Loaded(rows.start, draw, z.gather(draw.source_a), z.gather(draw.source_b))

    def compute(self, loaded: _Loaded) -> dict[str, npt.NDArray[Any]]:
        """Mix and decode a shard; draw corrupted images again."""
        source_b, lam = loaded.draw.source_b.copy(), loaded.draw.lam.copy()
        images, share, corrupted = self._mix(loaded.z_a, loaded.z_b, lam)
        state = np.full(len(lam), _OK, np.uint8)
        bad = np.flatnonzero(corrupted)
        if self._config.on_corrupt == "redraw":
            for attempt in range(1, self._config.attempts + 1):
                if not len(bad):
                    break
                again = [self._plan.again(loaded.first + int(row), attempt) for row in bad]
                source_b[bad], lam[bad] = (np.array(column) for column in zip(*again, strict=True))
                z_b = self._latents.z.gather(source_b[bad])
                images[bad], share[bad], still = self._mix(loaded.z_a[bad], z_b, lam[bad])
                state[bad] = _REDRAWN
                bad = bad[still]
            if len(bad):
                images[bad] = self._decode(loaded.z_a[bad])[0]
                share[bad], state[bad] = 0, _REPLACED
        return {
            "image": images,
            "source_a": loaded.draw.source_a,
            "source_b": source_b,
            "label_a": self._labels[loaded.draw.source_a],
            "label_b": self._labels[source_b],
            "lam": lam.astype(np.float32),
            "share_b": share,
            "state": state,
            "corrupted": corrupted,
        }

    def store(self, shard: int, computed: dict[str, npt.NDArray[Any]]) -> tuple[dict[str, str], dict[str, Any]]:
        """Write a shard of the pool."""
        corrupted = computed.pop("corrupted")
        state = computed["state"]
        digests = write_pool_shard(self._folder, shard, computed)
        first = self._store.shard_range(shard).start
        counts = {
            "images": len(state),
            "ok": int((state == _OK).sum()),
            "redrawn": int((state == _REDRAWN).sum()),
            "replaced": int((state == _REPLACED).sum()),
            "corrupted": int(corrupted.sum()),
            "corrupted_rows": (first + np.flatnonzero(corrupted)).tolist(),
        }
        return digests, counts

    def _mix(
        self, z_a: npt.NDArray[np.float32], z_b: npt.NDArray[np.float32], lam: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        from lsmix.glow.mixing import mix_latents

        z, share = mix_latents(self._config.method, z_a, z_b, lam, seed=self._config.seed)
        images, corrupted = self._decode(z)
        return images, share, corrupted

    def _decode(self, z: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        from lsmix.glow.mixing import is_corrupted

        config = self._config

        def judge(y_BCHW: "torch.Tensor") -> "torch.Tensor":
            return is_corrupted(y_BCHW, margin=config.margin, share=config.broken_share)

        return self._flow.decode_judged(z, judge, order=self._order, output=config.output, batch_size=config.batch_size)


def make_plan(config: PoolConfig, images: int) -> MixPlan:
    """Return the plan of a pool over ``images`` training images."""
    return MixPlan(
        images=images,
        copies=config.copies_made,
        alpha=config.alpha,
        lambdas=config.lambdas,
        seed=config.seed,
    )


def open_worker(folder: Path, config: dict[str, Any], inputs: Mapping[str, InputArtifact], device: str) -> MixWorker:
    """Open what makes the shards of an unfinished pool."""
    return MixWorker(folder, msgspec.convert(config, PoolConfig), inputs, device)


def run(task: StageTask) -> Outcome:
    """Make the pool."""
    config: PoolConfig = task.config
    latents = open_latents(task.inputs["latents"].folder)
    if len(latents) < 2:
        raise RecipeError(
            f"{task.label}: mixing needs at least 2 training images, got {len(latents)}. Raise 'data.limit'."
        )
    plan = make_plan(config, len(latents))
    facts = latents.attributes
    height, width, channels = facts["image_shape"]
    store = create_pool(
        task.folder,
        images_per_copy=plan.images,
        copies=plan.copies,
        image_shape=(height, width, channels),
        class_names=tuple(facts["class_names"]),
        method=config.method,
        shard_rows=min(config.shard_rows, len(plan)) or None,  # one longer than the pool would be padded on the disk
    )
    counts, digests = run_sharded(task, module=__name__, store=store)
    write_durably(task.folder / _PLAN_FILE, _plan_text(task))
    counts |= {"copies": plan.copies, "images_per_copy": plan.images}
    if counts["corrupted"]:
        task.progress.warn(
            f"{task.label}: {counts['corrupted']} of {counts['images']} images came out corrupted: "
            f"{counts['redrawn']} drawn again, {counts['replaced']} replaced by their first source."
        )
    return Outcome(payload=frozenset({"pool.zarr", _PLAN_FILE}), counts=counts, digests=digests)


def _plan_text(task: StageTask) -> bytes:
    """Return what is enough, with the inputs, to make every pixel again."""
    plan = {
        "format_version": 1,
        "stage_version": MIX.version,
        "pool": key_fields(task.config, MIX.not_in_key),
        "inputs": {role: artifact.manifest.root for role, artifact in task.inputs.items()},
        "latents": task.inputs["latents"].manifest.config,
    }
    return msgspec.json.format(msgspec.json.encode(plan, order="sorted"), indent=1) + b"\n"


def _estimate(config: PoolConfig, size: WorkSize) -> Estimate:
    images = size.images * config.copies_made
    return Estimate(bytes=images * (size.image_bytes + 41), flops=float(images) * size.flow_flops)


MIX = Stage(name="mix", version=1, run=run, estimate=_estimate, not_in_key=frozenset({"flow"}))
