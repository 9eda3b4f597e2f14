"""Copies to and from a CUDA device overlap with its work; tested on fake streams that run as late as possible."""

import contextlib
from collections import deque

import numpy as np
import pytest
import torch

from lsmix.data.loaders.batch import to_device
from lsmix.glow import transfers
from lsmix.glow.config import FlowConfig
from lsmix.glow.flow import Flow
from lsmix.glow.transfers import run_batches


class Event:
    def record(self, stream):
        self._stream, self._position = stream, stream.queued

    def reached(self):
        """Run everything that was queued before this event."""
        self._stream.work(self._position)

    def synchronize(self):
        Device.log.append("wait")
        self.reached()


class Stream:
    """Run queued work only when something waits for it, so that only explicit synchronisation orders it."""

    def __init__(self, *_):
        self._queue, self.queued, self._done = deque(), 0, 0

    def add(self, action):
        self._queue.append(action)
        self.queued += 1

    def wait_event(self, event):
        self.add(event.reached)

    def work(self, until):
        while self._done < until:
            self._done += 1
            self._queue.popleft()()


class Device:
    """The streams of a fake CUDA device."""

    log: list[str]
    stream: Stream

    @classmethod
    @contextlib.contextmanager
    def on(cls, stream):
        cls.stream, before = stream, cls.stream
        yield
        cls.stream = before


@pytest.fixture
def lazy_device(monkeypatch):
    Device.log, Device.stream = [], Stream()

    def copied(source, target):
        target.fill_(113)  # until the copy has finished
        stream = Device.stream
        stream.add(lambda: target.copy_(source))
        return target

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", Device.on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Device.stream)
    monkeypatch.setattr(transfers, "_copied", copied)
    monkeypatch.setattr(transfers, "_pinned_like", torch.empty_like)
    monkeypatch.setattr(transfers, "to_device", lambda values, _: copied(values.clone(), torch.empty_like(values)))


def rows_of(count, size):
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def overlapped(images, size):
    """Return the images multiplied by 2 on the fake device."""

    def load(rows):
        Device.log.append(f"load {rows.start}")
        return [images[rows]]

    def compute(rows, batch):
        Device.log.append(f"compute {rows.start}")
        result = torch.full_like(batch[0], -1)
        Device.stream.add(lambda: torch.mul(batch[0], 2, out=result))
        return [result]

    return transfers._overlapped(torch.device("cpu"), rows_of(len(images), size), load, compute)


@pytest.mark.usefixtures("lazy_device")
@pytest.mark.parametrize("count", [0, 1, 3, 4, 7, 12, 13])
def test_every_result_belongs_to_its_batch_even_if_streams_are_late(count):
    images = np.random.default_rng(0).integers(0, 50, (count, 5))
    kept = list(overlapped(images, 3))
    assert [rows for rows, _ in kept] == rows_of(count, 3)
    for rows, (result,) in kept:  # checked at the end: later batches must not overwrite it
        np.testing.assert_array_equal(result, 2 * images[rows])
    assert Device.log.count("wait") == len(kept), "the host waits once a batch"


@pytest.mark.usefixtures("lazy_device")
def test_the_next_batch_is_queued_before_the_host_waits():
    list(overlapped(np.zeros((8, 1), np.int64), 2))
    assert Device.log == [
        *("load 0", "compute 0", "load 2", "compute 2", "load 4", "wait"),
        *("compute 4", "load 6", "wait", "compute 6", "wait", "wait"),
    ]


def test_batches_and_results_are_not_copied_on_the_cpu():
    images = np.arange(12).reshape(6, 2)
    made = []

    def compute(_, batch):
        assert np.shares_memory(batch[0].numpy(), images)
        made.append(batch[0] + 1)
        return made[-1:]

    results = [
        result for _, (result,) in run_batches(torch.device("cpu"), rows_of(6, 4), lambda r: [images[r]], compute)
    ]
    assert all(np.shares_memory(result, tensor.numpy()) for result, tensor in zip(results, made, strict=True))
    np.testing.assert_array_equal(np.concatenate(results), images + 1)


def test_arrays_that_torch_cannot_share_are_copied():
    images = np.arange(12).reshape(6, 2)
    images.flags.writeable = False
    for odd in (images, images[::-1], images[:, ::-1]):
        ((_, (result,)),) = run_batches(torch.device("cpu"), [slice(0, 6)], lambda r, odd=odd: [odd[r]], lambda _, b: b)
        np.testing.assert_array_equal(result, odd)


@pytest.mark.parametrize("mode", ["low-bits", "uniform"])
def test_overlapping_copies_do_not_change_the_results_of_a_flow(mode, lazy_device, monkeypatch):
    flow = Flow(FlowConfig(height=6, width=8, channels=1, levels=2, steps=2, hidden=8)).eval()
    images = np.random.default_rng(0).integers(0, 256, (11, 6, 8, 1), dtype=np.uint8)

    def made():
        z, log_prob = flow.encode(images, dequantise=mode, batch_size=4, return_log_prob=True)
        return z, log_prob, *flow.decode(z, validate=lambda y: (y > 0.1).flatten(1).any(dim=1), batch_size=4)

    def run_eagerly(device, batches, load, compute):
        def computed(rows, batch):
            event = Event()
            event.record(Device.stream)
            event.reached()  # real work is not queued, so finish its dependencies first
            return compute(rows, batch)

        return transfers._overlapped(device, batches, load, computed)

    expected = made()
    monkeypatch.setattr("lsmix.glow.flow.run_batches", run_eagerly)
    for array, other in zip(made(), expected, strict=True):
        np.testing.assert_array_equal(array, other)
    assert Device.log == ["wait"] * 6


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 3, 64])
def test_gpu_results_match_the_cpu_and_the_host_waits_once_per_batch(size, waits_fail):
    images = np.random.default_rng(0).integers(0, 50, (200, 1000))

    def compute(_, batch):
        return [batch[0] * to_device(torch.tensor(2), batch[0].device)]

    with waits_fail():
        kept = list(run_batches(torch.device("cuda"), rows_of(200, size), lambda rows: [images[rows]], compute))
    np.testing.assert_array_equal(np.concatenate([result for _, (result,) in kept]), 2 * images)
