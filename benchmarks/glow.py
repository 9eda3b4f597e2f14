"""Glow: a training step, encode and decode, of lsmix and its peers, against bare convolutions and the machine's peak.

All contenders use the same precision, the same number of threads and the same settings of the memory allocator.
"""

import ctypes
import gc
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.contender import Contender, contenders, peak_mb
from benchmarks.turns import Scores, Table, measure, save

__all__ = ["against_peers", "floor_jobs", "flow_jobs", "run", "save_speeds", "speeds"]

_STEPS = 8  # K; the paper's 32 only multiplies the same work
_DEEP = 32  # the paper's K, for the memory of a training step
_TRAIN_BATCH, _BATCH = 32, 64
_CUDA_BATCH = 256
_PEERS = ("normflows", "nflows", "FrEIA")
_TURNS = (
    7  # odd, so that the median is a measured value; minimum and maximum of 7 enclose the true median in 98% of cases
)
# lsmix's allocator settings (mallopt in pipeline/engine/device.py) for all contenders: the process keeps freed memory.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1)}
_TOLERANCE = {"float32": 1e-3, "tf32": 5e-2}  # of decode(encode(y)) - y for y in a range of 1; beyond, a flow is broken
_LSMIX, _LIGHT, _CONVOLUTIONS, _PEAK = "lsmix", "lsmix, memory_light", "its convolutions only", "one wide convolution"


def flow_jobs(name: str, steps: int, device: str, precision: str = "float32") -> dict[str, Callable[[], Any]]:
    """Return the jobs of one flow after a few training steps; "inversion" returns its largest round-trip error.

    ``precision`` is the precision of convolutions and matrix products on CUDA, "float32" or "tf32". lsmix always
    encodes and decodes in float32.
    """
    import torch

    from benchmarks.flows import PEERS

    _set_precision(precision)
    batch = _TRAIN_BATCH if device == "cpu" else _CUDA_BATCH
    images = np.random.default_rng(0).integers(0, 256, (max(batch, _BATCH), 32, 32, 3), dtype=np.uint8)
    y = torch.from_numpy((images.transpose(0, 3, 1, 2).astype(np.float32) + 0.5) / 256 - 0.5).to(device)
    y = y.contiguous()  # (B, C, H, W) in memory, the layout of images from torchvision
    if name in PEERS:
        torch.manual_seed(0)
        model = PEERS[name](steps)
        model.module.to(device)
        optimiser = torch.optim.Adam(model.module.parameters(), lr=1e-4)

        def step(count: int = batch) -> int:
            optimiser.zero_grad()
            (-model.log_prob(y[:count]).mean() / 3072).backward()
            optimiser.step()
            if device != "cpu":
                torch.cuda.synchronize()
            return count

    else:
        model, step = _lsmix(steps, images, device, precision, light=name == _LIGHT)
    for _ in range(3):
        step()
    model.module.eval()
    with torch.no_grad():
        z = model.encode(y)

    def inversion() -> float:
        with torch.no_grad():
            return float((model.decode(z) - y).abs().max())

    def encode() -> int:
        with torch.no_grad():
            model.encode(y)
        return _done(len(y), device)

    def decode() -> int:
        with torch.no_grad():
            model.decode(z)
        return _done(len(y), device)

    def train() -> int:
        model.module.train()
        return step()

    def memory() -> float:
        model.module.train()
        step(2)  # allocates gradients and moments
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return peak_mb(step)

    jobs = {"train": train, "encode": _in(model, encode), "decode": _in(model, decode), "memory": memory}
    return {"inversion": _in(model, inversion), **jobs}


def _set_precision(precision: str) -> None:
    """Set whether CUDA computes float32 convolutions and matrix products in full precision or TF32 (not on CPUs)."""
    import torch

    kind = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cudnn.conv.fp32_precision = kind  # type: ignore[attr-defined]  # torch puts it there at import
    torch.backends.cuda.matmul.fp32_precision = kind


def _in(model: Any, work: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        if model.module.training:
            model.module.eval()
            work()  # fills the caches of evaluation mode outside the measurement, for every contender
        return work()

    return run


def _done(count: int, device: str) -> int:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
    return count


def _lsmix(
    steps: int, images: np.ndarray, device: str, precision: Any, *, light: bool
) -> tuple[Any, Callable[..., int]]:
    """Return the flow of lsmix, set up like ``lsmix run``, and the step of its trainer."""
    from benchmarks.flows import lsmix_model
    from lsmix.glow.config import FlowTraining
    from lsmix.glow.training import FlowTrainer
    from lsmix.pipeline.engine.device import prepare_device

    prepare_device(device)
    model = lsmix_model(steps)
    flow: Any = model.module.to(device)
    batch = _TRAIN_BATCH if device == "cpu" else _CUDA_BATCH
    settings = {"memory_light": light, "precision": precision}
    trainer = FlowTrainer(flow, FlowTraining(batch_size=batch, **settings), images)
    few = FlowTrainer(flow, FlowTraining(batch_size=2, **settings), images)
    few._adam = trainer._adam  # share the moments with the step on two images
    trainer.step()
    exact = flow.decode(flow.encode(images)) == images
    if not exact.all():
        raise RuntimeError("decode(encode(x)) differs from x, so the measurement is invalid.")

    def step(count: int = batch) -> int:
        (few if count == 2 else trainer).step()
        return _done(count, device)

    return model, step


def floor_jobs(device: str, precision: str = "float32") -> dict[str, Callable[[], Scores]]:
    """Return jobs for only the convolutions of K steps, and for one wide convolution, the machine's peak."""
    import torch
    from torch.nn import functional

    from benchmarks.flows import HIDDEN, LEVELS, SIDE

    _set_precision(precision)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)

    batch = _BATCH if device == "cpu" else _CUDA_BATCH
    layers: list[tuple[torch.Tensor, torch.Tensor]] = []
    last = {}
    for level in range(LEVELS):
        channels, side = 12 << level, SIDE >> (level + 1)
        wide = tensor(batch, HIDDEN, side, side)
        layers.append((tensor(batch, channels // 2, side, side), tensor(HIDDEN, channels // 2, 3, 3)))
        layers.append((wide, tensor(HIDDEN, HIDDEN, 1, 1)))
        layers.append((wide, tensor(channels, HIDDEN, 3, 3)))
        last[f"narrow {HIDDEN} → {channels}, {side}×{side}"] = [layers[-1]]
    peak = [(tensor(batch, HIDDEN, 16, 16), tensor(HIDDEN, HIDDEN, 3, 3))]

    def job(work: list[tuple[torch.Tensor, torch.Tensor]], times: int) -> Callable[[], float]:
        flops = sum(2.0 * w.numel() * x.shape[0] * x.shape[2] * x.shape[3] for x, w in work) * times

        def run() -> float:
            with torch.no_grad():
                for _ in range(times):
                    for x, w in work:
                        functional.conv2d(x, w, padding=w.shape[2] // 2)
            return flops * _done(1, device)

        return run

    jobs = {_CONVOLUTIONS: job(layers, _STEPS), _PEAK: job(peak, 4)}
    return jobs | {name: job(work, 8) for name, work in last.items()}  # type: ignore[return-value]


def run() -> None:
    """Measure and save; on CUDA first, if available."""
    tables: dict[str, Any] = {}
    cores = os.cpu_count() or 1
    if _has_cuda():
        for precision, jobs in (("float32", ("train", "encode", "decode")), ("tf32", ("train",))):
            speeds(tables, threads=cores, device="cuda", precision=precision, jobs=jobs)
    for threads in sorted({1, cores}):
        speeds(tables, threads=threads)
    tables["memory of a training step"] = {"figures": _memory()}
    save_speeds("glow", tables)


def save_speeds(name: str, tables: dict[str, Any]) -> None:
    """Save tables of ``speeds`` with the settings that all contenders share."""
    facts = {"steps": _STEPS, "train_batch": _TRAIN_BATCH, "batch": _BATCH, "peers": list(_PEERS)}
    save(name, tables, **facts, turns=_TURNS, allocator_of_all=_ALLOCATOR)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def speeds(
    tables: dict[str, Any],
    *,
    threads: int,
    device: str = "cpu",
    precision: str = "float32",
    jobs: Sequence[str] = ("train", "encode", "decode"),
) -> None:
    """Measure the flows in turns; add a table for each job, and one of the inversion errors."""
    from benchmarks.flows import coupling_flops

    image_flops = coupling_flops(_STEPS)
    cores = f"{threads} core{'s' if threads > 1 else ''}"
    where = f"{cores if device == 'cpu' else 'CUDA'}, {precision}"
    names = (_LSMIX, _LIGHT, *_PEERS)
    builders: dict[str, tuple[Any, ...]] = {
        name: ("benchmarks.glow:flow_jobs", name, _STEPS, device, precision) for name in names
    }
    builders["floor"] = ("benchmarks.glow:floor_jobs", device, precision)
    with contenders(builders, threads=threads, variables=_ALLOCATOR) as running:
        floors = running.pop("floor")
        tables[f"inversion, {where}"] = {"figures": _inversions(running, precision)}
        for job in jobs:
            flows = {name: running[name].job(job) for name in names if name != _LIGHT or job == "train"}
            best = f"{job}, {where}"
            shape = f"K={_STEPS}, L=3, width 128, 32×32"
            table = measure(flows, floor="FrEIA", title=f"{best} ({shape})", turns=_TURNS)
            tables[best] = {"floor": "FrEIA", "unit": "images", "rows": table, **against_peers(table)}
            passes = 3 if job == "train" else 1
            work = {name: _flops(running[name], job, passes * image_flops) for name in names if name in flows}
            work |= {name: floors.job(name) for name in (_CONVOLUTIONS, _PEAK)}
            title = f"{job}, {where}: floating-point operations of the coupling networks"
            rows = measure(work, floor=_PEAK, title=title, turns=3, unit="FLOP")
            tables[title] = {"floor": _PEAK, "unit": "FLOP", "rows": rows}
        narrow = [f"narrow 128 → {12 << level}, {16 >> level}×{16 >> level}" for level in range(3)]
        work = {name: floors.job(name) for name in (*narrow, _PEAK)}
        title = f"the narrow last convolution, {where}"
        tables[title] = {"floor": _PEAK, "unit": "FLOP", "rows": measure(work, floor=_PEAK, title=title, unit="FLOP")}


def _inversions(running: Mapping[str, Contender], precision: str) -> dict[str, float]:
    """Return the largest error of decode(encode(y)) for each contender; print those above the tolerance."""
    errors = {name: float(contender.call("inversion")) for name, contender in running.items()}
    print(f"\ninversion, {precision}: largest error (tolerance {_TOLERANCE[precision]:g})\n  {errors}")
    for name, error in errors.items():
        if not error < _TOLERANCE[precision]:
            print(f"  {name} exceeds the tolerance, so its speeds are of limited use")
    return {f"{name}, largest error": error for name, error in errors.items()} | {"tolerance": _TOLERANCE[precision]}


def _flops(contender: Contender, job: str, image_flops: float) -> Callable[[], Scores]:
    def run() -> Scores:
        items, seconds = contender.job(job)()
        return Scores(items * image_flops, seconds)

    return run


def against_peers(table: Table) -> dict[str, float]:
    """Return lsmix against the peer with the best median: median, least and most of the ratios within a turn."""
    best = max(_PEERS, key=lambda name: float(table[name]["per_second"]))
    figures: dict[str, float] = {}
    for name in (_LSMIX, _LIGHT):
        if name in table:
            ratios = [a / b for a, b in zip(table[name]["rates"], table[best]["rates"], strict=True)]
            figures[f"{name} against the best peer, {best}"] = statistics.median(ratios)
            figures |= {f"{name}, least": min(ratios), f"{name}, most": max(ratios)}
    return figures


def _memory() -> dict[str, float]:
    figures = {}
    for name in (_LSMIX, _LIGHT, *_PEERS):
        contender = Contender(
            "benchmarks.glow:flow_jobs", name, _DEEP, "cpu", threads=os.cpu_count() or 1, variables=_ALLOCATOR
        )
        figures[f"{name}, K={_DEEP}, batch {_TRAIN_BATCH}, MiB"] = contender.call("memory")
        contender.close()
    print(f"\nmemory of a training step in addition to model, gradients and optimizer state\n  {figures}")
    return figures
