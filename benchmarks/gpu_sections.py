"""The sections of ``benchmarks.gpu``, measured through public functions of lsmix."""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks import roofline
from benchmarks.pools import smooth_images
from benchmarks.sections import Results
from lsmix.classifiers.config import ClassifierTraining
from lsmix.classifiers.training import ClassifierTrainer
from lsmix.data.loaders.arithmetic import arithmetic
from lsmix.data.loaders.array_loader import ArrayLoader
from lsmix.data.rng import generator
from lsmix.glow.checkpoint import save_flow
from lsmix.glow.config import FlowConfig, FlowTraining
from lsmix.glow.flow import Flow
from lsmix.glow.latent_order import join_parts, split_parts
from lsmix.glow.pixels import dequantise, draw_noise, quantise
from lsmix.glow.training import FlowTrainer, augment

__all__ = ["FULL", "TINY", "Bench", "Size", "tf32_round_trips"]

_LEVELS, _SIDE = 3, 32


@dataclass(frozen=True, kw_only=True)
class Size:
    """The sizes of all measurements."""

    steps: int  # K of the flow
    hidden: int  # width of its coupling networks
    images: int  # for encode and decode between NumPy arrays
    train_batch: int
    trained: int  # training steps before exact round trips are counted
    repeats: int
    batches: tuple[int, ...]  # batch sizes of encode and decode on the device
    array_batches: tuple[int, ...]  # batch sizes of encode and decode between NumPy arrays
    architectures: tuple[str, ...]
    width: int  # of CNN-13
    class_batch: int
    class_updates: int  # per timed epoch
    mixed: int  # images of the mix stage


FULL = Size(
    steps=32,
    hidden=128,
    images=4096,
    train_batch=256,
    trained=100,
    repeats=8,
    batches=(64, 512, 2048),
    array_batches=(64, 512),
    architectures=("cnn-13", "wrn-28-10"),
    width=128,
    class_batch=128,
    class_updates=16,
    mixed=25_000,
)
TINY = Size(
    steps=1,
    hidden=8,
    images=24,
    train_batch=4,
    trained=2,
    repeats=2,
    batches=(4,),
    array_batches=(8,),
    architectures=("cnn-13", "wrn-10-1"),
    width=4,
    class_batch=8,
    class_updates=2,
    mixed=32,
)


class Bench:
    """The sections, and the flow and the images that they share."""

    def __init__(self, results: Results, device: str, size: Size) -> None:
        self.results, self.device, self.size = results, device, size
        self.images = smooth_images(size.images)

    def free(self) -> None:
        """Free the device memory after a section."""
        self.flow.forget_recordings()
        if self.device != "cpu":
            torch.cuda.empty_cache()

    @cached_property
    def flow(self) -> Flow:
        """The paper's flow on the device, initially untrained; ``training`` trains it."""
        config = FlowConfig(
            height=_SIDE, width=_SIDE, channels=3, levels=_LEVELS, steps=self.size.steps, hidden=self.size.hidden
        )
        return Flow(config).to(self.device)

    def training(self) -> None:
        """Measure a training step in each precision and with memory_light, and the parts of a step."""
        size, add = self.size, self.results.add
        for precision, light in (("float32", False), ("tf32", False), ("bf16", False), ("float32", True)):
            trainer = self._trainer(precision, light=light)
            together = trainer.steps_together  # as in the stage, where the host runs ahead of the device
            self._reset_peak()
            step = self._timed(lambda t=trainer, n=together: t.steps(n), 2, warm=1) / together
            name = f"step, {precision}{', memory-light' if light else ''}, batch {size.train_batch}"
            details = {"busy_ms": self._busy_ms(trainer.step), "steps_together": together, "peak_MiB": self._peak_mib()}
            add(name, step, "ms", None if light else roofline.flow_step_ms(precision), **details)
        parameters = list(self.flow.parameters())
        adam = torch.optim.Adam(parameters, lr=0.0, fused=True)
        pieces: dict[str, Callable[[], Any]] = {
            "preparing a batch on the host": self._host_batch,
            "copying a batch to the device": self._move_batch,
            "clipping the gradient": lambda: torch.nn.utils.clip_grad_norm_(parameters, 50.0),
            "Adam, fused": adam.step,
        }
        for name, work in pieces.items():
            add(f"part of a step: {name}", self._timed(work), "ms")
        self._trainer("float32", learning_rate=1e-4).steps(size.trained)

    def _trainer(self, precision: Any, *, light: bool = False, learning_rate: float = 1e-12) -> FlowTrainer:
        """Return a new trainer of the flow, by default with a learning rate that leaves it practically unchanged."""
        settings = FlowTraining(
            batch_size=self.size.train_batch, precision=precision, memory_light=light, learning_rate=learning_rate
        )
        return FlowTrainer(self.flow, settings, self.images)

    def _host_batch(self) -> tuple[np.ndarray, np.ndarray]:
        rng = generator(0, "benchmark", "batch")
        rows = rng.integers(0, len(self.images), self.size.train_batch)
        images = np.ascontiguousarray(augment(self.images[np.sort(rows)], rng, translate=2, flip=True))
        return images, draw_noise(rng, images.shape)

    def _move_batch(self) -> torch.Tensor:
        pixels, noise = (torch.from_numpy(part).to(self.device) for part in self._prepared)
        return dequantise(pixels, "uniform", bits=5, noise_BHWC=noise)

    @cached_property
    def _prepared(self) -> tuple[np.ndarray, np.ndarray]:
        return self._host_batch()

    def passes(self) -> None:
        """Measure encode and decode of one batch on the device, as recorded graphs and as plain calls."""
        flow = self.flow.eval()

        def plain_encode(y: torch.Tensor) -> torch.Tensor:
            with arithmetic(), torch.no_grad():
                return join_parts(flow(y)[0])

        def plain_decode(z: torch.Tensor) -> torch.Tensor:
            with arithmetic(), torch.no_grad():
                return flow.inverse(split_parts(z, flow.part_shapes))

        for batch in self.size.batches:
            y = self._y(batch)
            z = flow.encode_batch(y)[0]
            work: dict[str, Callable[[], Any]] = {
                "encode, recorded": lambda y=y: flow.encode_batch(y),
                "decode, recorded": lambda z=z: flow.decode_batch(z),
                "encode, plain": lambda y=y: plain_encode(y),
                "decode, plain": lambda z=z: plain_decode(z),
            }
            for name, call in work.items():
                took = self._timed(call)
                predicted = roofline.decode_ms(batch) if "recorded" in name else None
                self.results.add(f"{name}, batch {batch}", took, "ms", predicted, images_per_s=1e3 * batch / took)
            flow.forget_recordings()

    def arrays(self) -> None:
        """Measure encode and decode between NumPy arrays, as stages use them, and count exact round trips."""
        flow, images = self.flow.eval(), self.images
        for batch in self.size.array_batches:
            z = flow.encode(images, batch_size=batch)
            exact = int((flow.decode(z, batch_size=batch) == images).all(axis=(1, 2, 3)).sum())
            rate = 1e3 * batch / roofline.decode_ms(batch)
            for name, work in (("encode", flow.encode), ("decode", flow.decode)):
                given = images if name == "encode" else z
                took = self._timed(lambda work=work, given=given, batch=batch: work(given, batch_size=batch), 2, warm=0)
                self.results.add(f"{name}, batch {batch}", 1e3 * len(images) / took, "images/s", rate)
            self.results.add(f"exact round trips, batch {batch}", exact, f"of {len(images)}", float(len(images)))

    def tf32(self) -> None:
        """Count exact round trips with TF32 in both directions, which lsmix does not use."""
        exact = tf32_round_trips(self.flow.eval(), self.images, batch=max(self.size.array_batches))
        details = {"flow trained for steps": self.size.trained}
        self.results.add("exact round trips", exact, f"of {len(self.images)}", **details)

    def fused(self) -> None:
        """Measure convolution, bias and ReLU of the coupling networks as one kernel against three."""
        batch = self.size.batches[min(2, len(self.size.batches) - 1)]
        total = {"separate": 0.0, "fused": 0.0}
        worst = 0.0
        for level in range(_LEVELS):
            side, half = _SIDE >> (level + 1), 6 << level
            for inputs, edge in ((half, 3), (self.size.hidden, 1)):
                x, weight = self._random(batch, inputs, side, side), self._random(self.size.hidden, inputs, edge, edge)
                bias = torch.zeros(self.size.hidden, device=self.device)

                def separate(x: torch.Tensor = x, w: torch.Tensor = weight, b: torch.Tensor = bias) -> torch.Tensor:
                    return functional.relu_(functional.conv2d(x, w, b, padding=w.shape[2] // 2))

                def fused(x: torch.Tensor = x, w: torch.Tensor = weight, b: torch.Tensor = bias) -> torch.Tensor:
                    return _fused(x, w, b)

                with arithmetic(), torch.no_grad():
                    worst = max(worst, float((separate() - fused()).abs().max()))
                    for name, work in (("separate", separate), ("fused", fused)):
                        total[name] += self.size.steps * self._timed(work)
        for name, took in total.items():
            self.results.add(f"first two layers of all coupling networks, batch {batch}, {name}", took, "ms")
        self.results.add("largest difference between them", worst, "of numbers near 1")

    def classifiers(self) -> None:
        """Measure a training step of each classifier in three precisions."""
        size = self.size
        images = np.resize(self.images, (size.class_batch * size.class_updates, _SIDE, _SIDE, 3))
        labels = np.arange(len(images)) % 10
        for architecture in size.architectures:
            width = {"width": size.width} if architecture == "cnn-13" else {}
            for precision in ("bf16", "tf32", "float32"):
                settings = ClassifierTraining(
                    architecture=architecture, batch_size=size.class_batch, precision=precision, **width
                )
                trainer = ClassifierTrainer(settings, 10, (_SIDE, _SIDE, 3), seed=0, device=self.device)
                loader = ArrayLoader(images, labels, size.class_batch)
                self._reset_peak()
                took = self._timed(lambda t=trainer, source=loader: t.run_epoch(source), 2, warm=1) / size.class_updates
                busy = self._busy_ms(lambda t=trainer, source=loader: t.run_epoch(source)) / size.class_updates
                self.results.add(
                    f"{architecture}, {precision}, batch {size.class_batch}",
                    took,
                    "ms per step",
                    roofline.classifier_step_ms(architecture, precision),
                    busy_ms=busy,
                    peak_MiB=self._peak_mib(),
                )

    def mix_stage(self) -> None:
        """Measure the complete mix and encode stages, disk to disk."""
        from benchmarks.mix import Stages

        count = self.size.mixed
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            images, labels = smooth_images(count), np.arange(count) % 10
            train = {"train_images": images, "train_labels": labels}
            np.savez(folder / "data.npz", **train, test_images=images[:10], test_labels=labels[:10])
            (folder / "flow").mkdir()
            save_flow(folder / "flow", self.flow.eval(), {})
            stages = Stages(folder, folder / "flow", count, 0, device=self.device, batch=max(self.size.array_batches))
            for stage, seconds in (("mix", roofline.COPY_SECONDS), ("encode", roofline.ENCODE_SECONDS)):
                done = stages.job(stage)()
                self.results.add(f"{stage}, {count} images", count / done.seconds, "images/s", 50_000 / seconds)

    def profiles(self) -> None:
        """Write tables of the slowest kernels as text files."""
        flow, batch = self.flow, self.size.batches[min(2, len(self.size.batches) - 1)]
        y, z = self._y(batch), torch.zeros(batch, flow.dim, device=self.device)
        trainers = {name: self._trainer(name) for name in ("float32", "tf32")}
        work: dict[str, Callable[[], Any]] = {
            f"training-step-{name}": trainer.step for name, trainer in trainers.items()
        }
        work |= {"encode": lambda: flow.eval().encode_batch(y), "decode": lambda: flow.eval().decode_batch(z)}
        for name, call in work.items():
            call()
            call()
            with self._profiler() as profile:
                call()
                self._wait()
            sort = "self_cpu_time_total" if self.device == "cpu" else "self_device_time_total"
            table = profile.key_averages().table(sort_by=sort, row_limit=40, max_name_column_width=90)
            path = self.results.folder / f"profile-{name}.txt"
            path.write_text(table, encoding="utf-8")
            self.results.add(f"{name}, its kernels", _device_ms(profile), "ms", file=path.name)

    # Measuring.

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def _timed(self, work: Callable[[], Any], repeats: int = 0, *, warm: int = 2) -> float:
        """Return the median duration of ``repeats`` calls in milliseconds, with synchronization after each call."""
        for _ in range(warm):
            work()
        self._wait()
        took = []
        for _ in range(repeats or self.size.repeats):
            begun = time.perf_counter()
            work()
            self._wait()
            took.append(1e3 * (time.perf_counter() - begun))
        return statistics.median(took)

    def _profiler(self) -> Any:
        from torch.profiler import ProfilerActivity, profile

        activity = ProfilerActivity.CPU if self.device == "cpu" else ProfilerActivity.CUDA  # both would take 30 s
        return profile(activities=[activity], acc_events=True)

    def _busy_ms(self, work: Callable[[], Any]) -> float:
        """Return the milliseconds of a call during which the device is busy."""
        with self._profiler() as profile:
            work()
            self._wait()
        return _device_ms(profile)

    def _reset_peak(self) -> None:
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()

    def _peak_mib(self) -> int:
        return 0 if self.device == "cpu" else torch.cuda.max_memory_allocated() >> 20

    def _y(self, batch: int) -> torch.Tensor:
        images = np.resize(self.images, (batch, _SIDE, _SIDE, 3))
        return dequantise(torch.from_numpy(images).to(self.device))

    def _random(self, *shape: int) -> torch.Tensor:
        fan_in = shape[1] * shape[2] * shape[3] if shape[2] <= 3 else 1  # scales weights, so that results are near 1
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / fan_in**0.5
        return values.to(self.device).contiguous(memory_format=torch.channels_last)


def _device_ms(profile: Any) -> float:
    """Return the total milliseconds of all kernels of a profile, or on the CPU of all operations."""
    from torch.autograd import DeviceType

    events = profile.key_averages()
    kernels = [event.self_device_time_total for event in events if event.device_type == DeviceType.CUDA]
    return sum(kernels or [event.self_cpu_time_total for event in events]) / 1e3


def _fused(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Convolve, add the bias and apply ReLU in one kernel, of cuDNN or on the CPU of oneDNN."""
    pad = [weight.shape[2] // 2] * 2
    result: torch.Tensor
    if x.device.type == "cuda":
        result = torch.ops.aten.cudnn_convolution_relu(x, weight, bias, [1, 1], pad, [1, 1], 1)
    else:
        result = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, pad, [1, 1], [1, 1], 1, "relu", [], "")
    return result


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    conv = cudnn.conv  # type: ignore[attr-defined]  # torch puts it there at import
    before = conv.fp32_precision, matmul.fp32_precision
    try:
        conv.fp32_precision = matmul.fp32_precision = "tf32"
        with torch.no_grad():
            yield
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


def tf32_round_trips(flow: Flow, images: np.ndarray, *, batch: int) -> int:
    """Return how many images, uint8 (N, H, W, C), are recovered exactly if encode and decode use TF32.

    The flow must not need padding. On a CPU, which has no TF32, both use float32.
    """
    exact = 0
    for start in range(0, len(images), batch):
        part = torch.from_numpy(np.array(images[start : start + batch])).to(flow.device)
        with _tf32():
            back = quantise(flow.inverse(flow(dequantise(part))[0]))
        exact += int((back == part).flatten(1).all(dim=1).sum())
    return exact
