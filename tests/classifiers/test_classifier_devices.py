"""Classifiers compute on the device of their batch; checked on torch's meta device and on fake CUDA tensors.

Neither has values, and both raise if tensors of two devices are combined, so no GPU is needed.
"""

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from lsmix.classifiers import training
from lsmix.classifiers.config import ClassifierTraining, PixelMix
from lsmix.classifiers.evaluation import logits_of, passes
from lsmix.classifiers.normalise import channel_statistics
from lsmix.classifiers.pixel_mixing import mix_batch
from lsmix.classifiers.training import ClassifierTrainer, augment
from lsmix.data.loaders import cuda_graph
from lsmix.data.loaders.arithmetic import arithmetic
from lsmix.data.loaders.batch import Batch, soft_target, to_device
from lsmix.data.mixing import PIXEL_METHODS
from lsmix.data.rng import generator

SHAPE = (8, 8, 3)
NETWORKS: dict[str, dict[str, Any]] = {
    "cnn-13": {"width": 4},
    "cnn-13 on SVHN": {"width": 4, "final_batch_norm": True, "normalise": "channel"},
    "wide": {"architecture": "wrn-10-1", "normalise": "channel", "optimiser": "sgd", "grad_clip": 5.0},
}
METHODS = PIXEL_METHODS.builtin()
every_network = pytest.mark.parametrize("fields", NETWORKS.values(), ids=NETWORKS)


class _FakeCuda(FakeTensorMode):
    """Fake CUDA tensors, which have no values, without affecting CPU tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(leaf, FakeTensor) or getattr(leaf, "type", "") == "cuda" for leaf in leaves):
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def _no_autocast(*_args, **_kwargs):
    return contextlib.nullcontext()


@pytest.fixture(params=["meta", "cuda"])
def device(request, monkeypatch):
    """Return a device whose tensors have no values: meta, or fake CUDA if torch was built with CUDA."""
    if request.param == "meta":
        monkeypatch.setattr(torch, "autocast", _no_autocast)  # not supported by this device
        yield torch.device("meta")
        return
    if torch.version.cuda is None:
        pytest.skip("this torch is built without CUDA")
    monkeypatch.setattr(training, "seeded", lambda *_args: contextlib.nullcontext())  # there is no generator to seed
    monkeypatch.setattr(cuda_graph, "_RECORDED_ON", frozenset())
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    real = torch.inference_mode  # inside it, copying to CUDA needs a driver
    monkeypatch.setattr(torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else real(False))
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_args, **_kwargs: True)
    with _FakeCuda(allow_non_fake_inputs=True):
        yield torch.device("cuda", 0)


def _pixels(count):
    return np.zeros((count, *SHAPE), np.uint8)


def _batch(count):
    labels = torch.arange(count) % 10
    return Batch(torch.from_numpy(_pixels(count)).permute(0, 3, 1, 2), labels, labels, torch.zeros(count))


def _trainer(device, **fields):
    mixes = [PixelMix(method=method) for method in METHODS]
    return ClassifierTrainer(
        ClassifierTraining(**fields),
        10,
        SHAPE,
        seed=0,
        device=device,
        statistics=channel_statistics(_pixels(1)),
        mixes=lambda _epoch, _index: mixes,
    )


@every_network
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_a_training_step_and_an_evaluation_stay_on_their_device(fields, precision, device, monkeypatch):
    if (device.type, precision) == ("meta", "bf16"):
        pytest.skip("the meta device has no autocast")
    learner = _trainer(device, **fields, precision=precision)
    learner.model.train()
    if device.type == "cuda":  # autograd needs a driver there

        def backward(_loss):
            for parameter in learner.model.parameters():
                parameter.grad = torch.zeros_like(parameter)

        monkeypatch.setattr(Tensor, "backward", backward)
    with arithmetic(precision):
        for index in range(2):  # the second one uses the optimiser's moments
            loss = learner._train_batch(_batch(16), index)
    assert (loss.shape, loss.device.type, loss.dtype) == ((), device.type, torch.float32)
    own = [*learner.model.parameters(), *learner.model.buffers()]
    own += [kept for state in learner.optimiser.state.values() for kept in state.values() if kept.ndim]
    assert {tensor.device.type for tensor in own} == {device.type}
    assert {tensor.dtype for tensor in own if tensor.is_floating_point()} == {torch.float32}
    for rows, logits in passes(learner.model, _pixels(300), device=device, precision=precision):
        assert (logits.shape, logits.device.type, logits.dtype) == (
            (len(range(*rows.indices(300))), 10),
            device.type,
            torch.float32,
        )


def test_bfloat16_affects_layers_but_not_statistics(device):
    if device.type == "meta":
        pytest.skip("the meta device has no autocast")
    learner = _trainer(device, width=4, precision="bf16")
    types = []
    learner.model.head.register_forward_hook(lambda _module, _inputs, output: types.append(output.dtype))
    for mode in (True, False):
        learner.model.train(mode)
        logits_of(learner.model, _batch(4).images.to(device), "bf16")
    assert types == [torch.bfloat16] * 2
    assert {tensor.dtype for tensor in learner.model.buffers()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("rate", ["per-sample", "per-batch"])
@pytest.mark.parametrize("method", METHODS)
def test_every_mixing_method_mixes_on_the_device_of_the_batch(method, rate, device):
    images, label_a, label_b, share_b = (to_device(part, device) for part in _batch(6))
    target = soft_target(label_a, label_b, share_b, 10)
    mixed, soft = mix_batch(PixelMix(method=method, rate=rate), images, target, 0, "test")
    assert (mixed.shape, mixed.dtype, mixed.device.type) == (images.shape, torch.uint8, device.type)
    assert (soft.shape, soft.dtype, soft.device.type) == ((6, 10), torch.float32, device.type)


@pytest.mark.parametrize(("translate", "flip"), [(0, False), (0, True), (2, True)])
def test_augmentation_stays_on_the_device_of_the_batch(translate, flip, device):
    images = to_device(_batch(6).images, device)
    moved = augment(images, translate=translate, flip=flip, generator=np.random.default_rng(0))
    assert (moved.shape, moved.dtype, moved.device.type) == (images.shape, torch.uint8, device.type)
    assert moved.is_contiguous(memory_format=torch.channels_last)


def test_random_draws_do_not_depend_on_the_device(device, monkeypatch):
    drawn = []

    def spy(*words):
        drawn.append(words)
        return generator(*words)

    for module in ("training", "pixel_mixing"):
        monkeypatch.setattr(f"lsmix.classifiers.{module}.generator", spy)
    names = []
    for where in (torch.device("cpu"), device):
        drawn.clear()
        _trainer(where, width=4)._prepare(_batch(8), 3)
        names.append(list(drawn))
    assert names[0] == names[1]
    assert len(names[0]) == 1 + len(METHODS)


def test_a_batch_for_cuda_is_copied_from_pinned_memory_without_waiting(monkeypatch):
    calls = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(Tensor, "to", lambda self, *args, **options: calls.append((args, options)) or self)
    tensor, cuda = torch.zeros(2), torch.device("cuda")
    to_device(tensor, cuda)
    assert calls == ["pinned", ((cuda,), {"non_blocking": True})]
    calls.clear()
    to_device(tensor, torch.device("cpu"))
    assert calls == [((torch.device("cpu"),), {"non_blocking": True})]


def test_the_loss_is_checked_once_in_64_updates(monkeypatch):
    # Each check synchronises with the GPU.
    checks = []
    learner = _trainer(torch.device("cpu"), width=4)
    monkeypatch.setattr(learner, "_check_finite", lambda _loss: checks.append(learner.update))
    monkeypatch.setattr(learner, "_train_batch", lambda _batch, _index: torch.zeros(()))

    class Source(list[Batch]):
        def set_epoch(self, epoch):
            pass

    learner.run_epoch(Source([_batch(1)] * 130))
    assert checks == [64, 128, 130]


@pytest.mark.gpu
@every_network
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_an_epoch_on_cuda_never_waits_for_the_device(fields, precision, waits_fail):
    learner = _trainer(torch.device("cuda"), **fields, precision=precision)
    learner.model.train()
    with arithmetic(precision):
        learner._train_batch(_batch(16), 0)  # loading libraries waits
        with waits_fail():
            learner._train_batch(_batch(16), 1)


@pytest.mark.gpu
def test_batches_are_prepared_identically_on_cuda_and_the_cpu():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (16, 3, 8, 8), dtype=np.uint8))
    batch = _batch(16)._replace(images=images)
    (cpu, target), (cuda, cuda_target) = (
        _trainer(torch.device(name), width=4)._prepare(batch, 3) for name in ("cpu", "cuda")
    )
    assert torch.equal(cuda.cpu(), cpu)
    torch.testing.assert_close(cuda_target.cpu(), target)
