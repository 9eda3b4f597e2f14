"""Glow: a training step, encode and decode, ours and the peers', against the convolutions alone and the machine's peak."""

import ctypes
import gc
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.contender import Contender, contenders, peak_mb
from benchmarks.turns import Scores, Table, measure, save

_STEPS = 8  # K; the paper's 32 only multiplies the same work
_DEEP = 32  # the paper's K, for the memory of a step
_TRAIN_BATCH, _BATCH = 32, 64
_CUDA_BATCH = 256
_PEERS = ("normflows", "nflows", "FrEIA")
_OURS, _LIGHT, _ALONE, _PEAK = "lsmix", "lsmix, memory_light", "its convolutions alone", "one wide convolution"


def flow_jobs(name: str, steps: int, device: str) -> dict[str, Callable[[], Any]]:
    """Return the jobs of one flow, after a few steps of training and a look whether it still inverts."""
    import torch

    from benchmarks.flows import PEERS

    batch = _TRAIN_BATCH if device == "cpu" else _CUDA_BATCH
    images = np.random.default_rng(0).integers(0, 256, (max(batch, _BATCH), 32, 32, 3), dtype=np.uint8)
    y = torch.from_numpy((images.transpose(0, 3, 1, 2).astype(np.float32) + 0.5) / 256 - 0.5).to(device)
    y = y.contiguous()  # (B, C, H, W) in memory, as torchvision gives images to everybody
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
        model, step = _ours(steps, images, device, light=name == _LIGHT)
    for _ in range(3):
        step()
    model.module.eval()
    with torch.no_grad():
        z = model.encode(y)
        worst = float((model.decode(z) - y).abs().max())
    if not worst < 1e-3:
        raise RuntimeError(f"{name} does not invert: {worst}; the measurement would be of something broken")

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
        step(2)  # gradients and moments are there
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return peak_mb(step)

    return {"train": train, "encode": _in(model, encode), "decode": _in(model, decode), "memory": memory}


def _in(model: Any, work: Callable[[], int]) -> Callable[[], int]:
    def run() -> int:
        if model.module.training:
            model.module.eval()
            work()  # what a flow keeps between calls in evaluation is made outside of the measurement, for all alike
        return work()

    return run


def _done(count: int, device: str) -> int:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
    return count


def _ours(steps: int, images: np.ndarray, device: str, *, light: bool) -> tuple[Any, Callable[..., int]]:
    """Return our flow as ``lsmix run`` sets it up, and its trainer's step."""
    from benchmarks.flows import ours
    from lsmix.glow.config import FlowTraining
    from lsmix.glow.training import FlowTrainer
    from lsmix.pipeline.engine.device import prepare_device

    prepare_device(device)
    model = ours(steps)
    flow: Any = model.module.to(device)
    batch = _TRAIN_BATCH if device == "cpu" else _CUDA_BATCH
    trainer = FlowTrainer(flow, FlowTraining(batch_size=batch, memory_light=light), images)
    few = FlowTrainer(flow, FlowTraining(batch_size=2, memory_light=light), images)
    few._adam = trainer._adam  # the same moments, for a step on two images
    trainer.step()
    exact = flow.decode(flow.encode(images)) == images
    if not exact.all():
        raise RuntimeError("decode(encode(x)) differs from x: the measurement would be of something broken")

    def step(count: int = batch) -> int:
        (few if count == 2 else trainer).step()
        return _done(count, device)

    return model, step


def floor_jobs(device: str) -> dict[str, Callable[[], Scores]]:
    """Return the convolutions of K steps and nothing else, and one wide convolution, which is as good as it gets."""
    import torch
    from torch.nn import functional

    from benchmarks.flows import HIDDEN, LEVELS, SIDE

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

    jobs = {_ALONE: job(layers, _STEPS), _PEAK: job(peak, 4)}
    return jobs | {name: job(work, 8) for name, work in last.items()}  # type: ignore[return-value]


def run() -> None:
    """Measure and save."""
    from benchmarks.flows import coupling_flops

    tables: dict[str, Any] = {}
    for threads in sorted({1, os.cpu_count() or 1}):
        _speeds(tables, threads, "cpu", coupling_flops(_STEPS))
    tables["memory of a training step"] = {"figures": _memory()}
    if _has_cuda():
        _speeds(tables, os.cpu_count() or 1, "cuda", coupling_flops(_STEPS))
    save("glow", tables, steps=_STEPS, train_batch=_TRAIN_BATCH, batch=_BATCH, peers=list(_PEERS))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _speeds(tables: dict[str, Any], threads: int, device: str, image_flops: float) -> None:
    where = f"{threads} core{'s' if threads > 1 else ''}" if device == "cpu" else "CUDA"
    names = (_OURS, _LIGHT, *_PEERS)
    builders: dict[str, tuple[Any, ...]] = {name: ("benchmarks.glow:flow_jobs", name, _STEPS, device) for name in names}
    builders["floor"] = ("benchmarks.glow:floor_jobs", device)
    with contenders(builders, threads=threads) as running:
        floors = running.pop("floor")
        for job, passes in (("train", 3), ("encode", 1), ("decode", 1)):
            flows = {name: running[name].job(job) for name in names if name != _LIGHT or job == "train"}
            best = f"{job}, {where}"
            table = measure(flows, floor="FrEIA", title=f"{best} (K={_STEPS}, L=3, width 128, 32×32)")
            tables[best] = {"floor": "FrEIA", "unit": "images", "rows": table, **_against_peers(table)}
            work = {name: _flops(running[name], job, passes * image_flops) for name in names if name in flows}
            work |= {name: floors.job(name) for name in (_ALONE, _PEAK)}
            title = f"{job}, {where}: floating-point operations of the coupling networks"
            rows = measure(work, floor=_PEAK, title=title, turns=3, unit="FLOP")
            tables[title] = {"floor": _PEAK, "unit": "FLOP", "rows": rows}
        narrow = [f"narrow 128 → {12 << level}, {16 >> level}×{16 >> level}" for level in range(3)]
        work = {name: floors.job(name) for name in (*narrow, _PEAK)}
        title = f"the narrow last convolution, {where}"
        tables[title] = {"floor": _PEAK, "unit": "FLOP", "rows": measure(work, floor=_PEAK, title=title, unit="FLOP")}


def _flops(contender: Contender, job: str, image_flops: float) -> Callable[[], Scores]:
    def run() -> Scores:
        items, seconds = contender.job(job)()
        return Scores(items * image_flops, seconds)

    return run


def _against_peers(table: Table) -> dict[str, float]:
    """Return ours against the peer that was best."""
    best = max(table[name]["per_second"] for name in _PEERS)
    return {
        f"{name} against the best peer": table[name]["per_second"] / best for name in (_OURS, _LIGHT) if name in table
    }


def _memory() -> dict[str, float]:
    figures = {}
    for name in (_OURS, _LIGHT, *_PEERS):
        contender = Contender("benchmarks.glow:flow_jobs", name, _DEEP, "cpu", threads=os.cpu_count() or 1)
        figures[f"{name}, K={_DEEP}, batch {_TRAIN_BATCH}, MiB"] = contender.call("memory")
        contender.close()
    print(f"\nmemory of a training step above what model, gradients and optimiser hold\n  {figures}")
    return figures
