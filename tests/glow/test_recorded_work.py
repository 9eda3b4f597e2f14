"""CUDA graphs give the same results as plain calls, even after moves, failures and divergence.

These tests use an emulation that records on the CPU, and stand-ins for torch.cuda to check calls to CUDA itself.
tests/glow/test_cuda.py tests on a device.
"""

import contextlib
import copy
import gc
import io
import pickle

import msgspec
import numpy as np
import pytest
import torch
from emulated_graphs import emulate_cuda_graphs

from lsmix.data.errors import DivergedError
from lsmix.data.loaders import cuda_graph
from lsmix.data.loaders.cuda_graph import Replayed
from lsmix.glow import network
from lsmix.glow.config import FlowConfig, FlowTraining
from lsmix.glow.flow import Flow
from lsmix.glow.training import FlowTrainer
from lsmix.pipeline.api import run
from lsmix.pipeline.config.results import read_log

CONFIG = FlowConfig(height=8, width=8, channels=1, levels=2, steps=2, hidden=8)
IMAGES = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
TRAINING = FlowTraining(batch_size=8, learning_rate=1e-2, warmup=3, weight_decay=1e-5)
LIGHT = msgspec.structs.replace(TRAINING, memory_light=True)
EACH_TRAINING = pytest.mark.parametrize("training", [TRAINING, LIGHT], ids=["plain", "memory-light"])


@pytest.fixture
def recorder():
    """Record CUDA graphs on the CPU."""
    with emulate_cuda_graphs() as recorder:
        yield recorder


@contextlib.contextmanager
def _nothing_recorded():
    """Replace recordings by plain calls; everything else works as on CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replayed, "__call__", lambda self, *inputs: list(self._function(*inputs)))
        yield


def _flow():
    """Return a flow with perturbed parameters."""
    flow = Flow(CONFIG)
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=numbers)
    return flow


def _same_state(one, other):
    found, expected = one.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# Encoding and decoding.


def test_each_direction_is_recorded_once_and_is_bit_identical_to_plain_calls(recorder):
    flow = _flow().eval()
    z = flow.encode(IMAGES, batch_size=4)
    assert (recorder.captures, recorder.replays) == (1, 5)
    back = flow.decode(z, batch_size=4)
    assert (recorder.captures, recorder.replays) == (2, 10)
    assert np.array_equal(back, IMAGES)
    with _nothing_recorded():
        assert np.array_equal(flow.encode(IMAGES, batch_size=4), z)
        assert np.array_equal(flow.decode(z, batch_size=4), back)


def test_nothing_is_recorded_in_training_mode(recorder):
    flow = _flow()
    z = flow.encode(IMAGES, batch_size=4)
    assert recorder.captures == 0
    assert np.array_equal(flow.eval().encode(IMAGES, batch_size=4), z)


def test_each_batch_size_is_recorded_once_and_only_the_last_few_are_kept(recorder):
    flow = _flow().eval()
    z = flow.encode(IMAGES, batch_size=4)
    for _ in range(3):
        flow.encode(IMAGES, batch_size=5)
        assert np.array_equal(flow.encode(IMAGES, batch_size=4), z)
    assert recorder.captures == 2
    for size in range(6, 16):
        flow.encode(IMAGES[:5], batch_size=size)
    ((_, replayed),) = flow._recordings.values()
    assert len(replayed._recordings) == 4


@pytest.mark.parametrize("change", ["written", "replaced", "moved", "loaded"])
def test_recordings_are_updated_when_parameters_change(recorder, change):
    flow = _flow().eval()
    before = flow.encode(IMAGES, batch_size=4)
    norm = next(flow._levels()[0].steps()).actnorm
    with torch.no_grad():
        if change == "written":
            norm.shift.add_(1.0)
        elif change == "replaced":
            norm.shift = torch.nn.Parameter(norm.shift + 1.0)
        elif change == "moved":
            norm.shift.data = norm.shift + 1.0
        else:
            flow.load_state_dict(
                {name: 1.1 * value for name, value in flow.state_dict().items() if value.is_floating_point()},
                strict=False,
            )
    after = flow.encode(IMAGES, batch_size=4)
    assert not np.array_equal(after, before)
    with _nothing_recorded():
        assert np.array_equal(flow.encode(IMAGES, batch_size=4), after)


@pytest.mark.parametrize("fault", ["refused", "empty", "no memory"])
def test_a_call_that_cannot_be_recorded_runs_plainly_with_a_warning(recorder, fault):
    with _nothing_recorded():
        expected = _flow().eval().encode(IMAGES, batch_size=4)
    flow = _flow().eval()
    recorder.fault = fault
    with pytest.warns(
        RuntimeWarning, match="without a CUDA graph, which is slower: .*(not permitted|different results|memory)"
    ):
        z = flow.encode(IMAGES, batch_size=4)
    assert np.array_equal(z, expected)
    assert recorder.captures == 1, "recording was tried again"


def test_an_empty_graph_is_detected(recorder):
    recorder.fault = "empty"
    flow = _flow().eval()
    with pytest.warns(RuntimeWarning, match="different results"):
        flow.encode(IMAGES[:4], batch_size=4)
    assert not np.array_equal(flow.encode(IMAGES[4:8], batch_size=4), flow.encode(IMAGES[:4], batch_size=4))


@pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy"])
def test_a_flow_with_recordings_can_be_copied_and_pickled(recorder, how):
    flow = _flow().eval()
    z = flow.encode(IMAGES, batch_size=4)
    next(iter(flow._recordings.values()))[1]._graph = lambda: None
    if how == "pickle":
        other = pickle.loads(pickle.dumps(flow))
    elif how == "deepcopy":
        other = copy.deepcopy(flow)
    else:
        torch.save(flow, file := io.BytesIO())
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert flow._recordings
    assert not other._recordings
    assert np.array_equal(other.encode(IMAGES, batch_size=4), z)
    with torch.no_grad():
        next(other._levels()[0].steps()).actnorm.shift.add_(1.0)
    assert not np.array_equal(other.encode(IMAGES, batch_size=4), z)
    assert np.array_equal(flow.encode(IMAGES, batch_size=4), z), "the copy shares memory with the original"


# Training.


@EACH_TRAINING
def test_recorded_training_equals_plain_training_and_is_recorded_once(recorder, training):
    recorded, plain = FlowTrainer(_flow(), training, IMAGES), FlowTrainer(_flow(), training, IMAGES)
    results = [recorded.step() for _ in range(5)]
    assert (recorder.captures, recorder.replays) == (1, 5)
    with _nothing_recorded():
        assert [plain.step() for _ in range(5)] == results
    _same_state(recorded, plain)


def test_values_kept_for_comparison_have_no_autograd_node(recorder, monkeypatch):
    # The autograd node of a parameter uses the stream that created it; CUDA then rejects the recording.
    kept = []
    restore, same = cuda_graph._restore, cuda_graph._same
    monkeypatch.setattr(cuda_graph, "_restore", lambda to, values: (kept.extend(values), restore(to, values))[1])
    monkeypatch.setattr(cuda_graph, "_same", lambda found, expected: (kept.extend(expected), same(found, expected))[1])
    FlowTrainer(_flow(), TRAINING, IMAGES).step()
    assert kept
    assert recorder.captures == 1
    assert not any(value.requires_grad for value in kept)


def test_recorded_training_is_close_to_training_on_the_cpu():
    plain = FlowTrainer(_flow(), TRAINING, IMAGES)
    with emulate_cuda_graphs():
        recorded = FlowTrainer(_flow(), TRAINING, IMAGES)
        recorded.steps(6)
    plain.steps(6)
    for name, value in plain.state_dict().items():
        # The learning rate is a float32 tensor if steps are recorded, and a float64 number otherwise.
        assert torch.allclose(recorded.state_dict()[name].double(), value.double(), rtol=1e-4, atol=1e-5), name


def test_several_steps_per_call_equal_single_steps(recorder):
    single, grouped = FlowTrainer(_flow(), TRAINING, IMAGES), FlowTrainer(_flow(), TRAINING, IMAGES)
    results = [single.step() for _ in range(7)]
    assert [*grouped.steps(3), *grouped.steps(4)] == results
    _same_state(grouped, single)


@pytest.mark.parametrize("emulated", [False, True])
def test_no_update_is_applied_after_a_step_diverged(emulated, monkeypatch):
    batch = FlowTrainer._batch
    monkeypatch.setattr(
        FlowTrainer, "_batch", lambda self, i, part: batch(self, i, part) * (torch.nan if i == 2 else 1.0)
    )
    with emulate_cuda_graphs() if emulated else contextlib.nullcontext():
        many, few = FlowTrainer(_flow(), TRAINING, IMAGES), FlowTrainer(_flow(), TRAINING, IMAGES)
        results = few.steps(2)
        with pytest.raises(DivergedError, match=r"diverged at iteration 2: .* The update was not applied"):
            many.steps(5)  # later batches are valid
        assert many.iteration == 2
        _same_state(many, few)
        monkeypatch.undo()
        few._ahead = None  # the invalid batch was prepared in advance
        assert many.steps(2) == few.steps(2) != results, "training can continue"


@EACH_TRAINING
def test_training_continues_after_a_divergence_and_a_restore(recorder, training):
    trainer, other = FlowTrainer(_flow(), training, IMAGES), FlowTrainer(_flow(), training, IMAGES)
    trainer.steps(3)
    kept = trainer.state_dict()
    with torch.no_grad():
        next(trainer.flow._levels()[0].steps()).coupling.bias_out.fill_(torch.nan)
    with pytest.raises(DivergedError):
        trainer.step()
    trainer.load_state_dict(kept)
    results = trainer.steps(3)
    assert all(result.grad_norm > 0 for result in results)
    other.steps(3)
    assert other.steps(3) == results
    _same_state(trainer, other)


def test_two_trainers_of_one_flow_use_separate_gradients(recorder):
    def trained():
        flow = _flow()
        small, large = FlowTrainer(flow, TRAINING, IMAGES), FlowTrainer(flow, LIGHT, IMAGES[::-1])
        return [trainer.step() for _ in range(4) for trainer in (small, large)], large

    results, recorded = trained()
    assert recorder.captures == 2
    with _nothing_recorded():
        expected, plain = trained()
    assert results == expected
    _same_state(recorded, plain)


@pytest.mark.parametrize(
    ("training", "moved"),
    [(TRAINING, "all"), (TRAINING, "a parameter"), (TRAINING, "a buffer"), (LIGHT, "all")],
    ids=["all", "a parameter", "a buffer", "all, memory-light"],
)
def test_a_flow_that_moves_during_training_is_recorded_again(recorder, training, moved):
    def trained():
        trainer = FlowTrainer(_flow(), training, IMAGES)
        results = trainer.steps(2)
        conv = next(trainer.flow._levels()[1].steps()).conv1x1
        if moved == "all":
            trainer.flow._apply(torch.clone)  # like cpu() and cuda()
        elif moved == "a parameter":
            conv.lower.data = conv.lower.data.clone()
        else:
            conv.sign = -conv.sign
        return results + trainer.steps(2), trainer

    results, recorded = trained()
    assert recorder.captures == 2
    with _nothing_recorded():
        expected, plain = trained()
    assert results == expected
    _same_state(recorded, plain)


@pytest.mark.parametrize("fault", ["refused", "empty"])
def test_training_that_cannot_be_recorded_equals_plain_training(recorder, fault):
    with _nothing_recorded():
        plain = FlowTrainer(_flow(), TRAINING, IMAGES)
        expected = plain.steps(3)
    recorder.fault = fault
    trainer = FlowTrainer(_flow(), TRAINING, IMAGES)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph"):
        results = trainer.steps(3)
    assert results == expected, "the calls before a recording must not update"
    _same_state(trainer, plain)


def test_the_next_batch_is_prepared_once_before_the_host_waits(recorder, monkeypatch):
    training = msgspec.structs.replace(TRAINING, iterations=5)
    trainer = FlowTrainer(_flow(), training, IMAGES)
    prepared = []
    batch = FlowTrainer._batch
    monkeypatch.setattr(FlowTrainer, "_batch", lambda self, i, part: (prepared.append(i), batch(self, i, part))[1])
    trainer.steps(2)
    assert prepared == [0, 1, 2]
    trainer.steps(3)
    assert prepared == [0, 1, 2, 3, 4], "there is no sixth step"


def test_no_batch_is_prepared_in_advance_on_the_cpu():
    trainer = FlowTrainer(_flow(), TRAINING, IMAGES)
    trainer.step()
    assert trainer._ahead is None
    assert trainer.steps_together == 1


def test_the_stage_groups_steps_up_to_each_evaluation_and_checkpoint(recorder, small_recipe, tmp_path, monkeypatch):
    sizes = []
    steps = FlowTrainer.steps
    monkeypatch.setattr(FlowTrainer, "steps", lambda self, count: (sizes.append(count), steps(self, count))[1])
    settings = ["flow.training.iterations=40", "flow.checkpoint_every=25", "flow.evaluate_every=20"]
    made = run(small_recipe, workspace=tmp_path / "runs", device="cpu", stage="train-glow", overrides=settings)
    assert sizes == 2 * [16, 4, 5, 15]  # for the flow and the evaluator
    log = read_log(made["train-glow/small"].folder)
    assert [line.iteration for line in log] == list(range(1, 41))
    assert [line.iteration for line in log if line.heldout_bits_per_dim is not None] == [20, 40]


def test_training_restores_torchs_settings():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def settings():
        return cudnn.conv.fp32_precision, matmul.fp32_precision, cudnn.deterministic, cudnn.benchmark

    before, seen = settings(), []
    trainer = FlowTrainer(_flow(), TRAINING, IMAGES)
    trainer._update = lambda y: (seen.append(settings()), [torch.ones(2)])[1]
    trainer.step()
    assert seen == [("tf32", "ieee", True, False)]
    assert settings() == before


def test_tf32_equals_float32_on_the_cpu():
    trainer = FlowTrainer(_flow(), msgspec.structs.replace(TRAINING, precision="tf32"), IMAGES)
    default = FlowTrainer(_flow(), TRAINING, IMAGES)
    assert trainer.steps(3) == default.steps(3)
    _same_state(trainer, default)


# Calls to CUDA.


class _FakeCuda:
    """Record calls to torch.cuda."""

    def __init__(self, monkeypatch, fails):
        self.calls = []
        self.device = "cuda:0"

        @contextlib.contextmanager
        def device(index):
            before, self.device = self.device, str(index)
            yield
            self.device = before

        @contextlib.contextmanager
        def graph(graph, **options):
            self.calls.append((self.device, options))
            assert not gc.isenabled(), "collecting a CUDA graph now would make this recording fail"
            yield
            if fails:
                raise RuntimeError("capture invalidated")

        monkeypatch.setattr(torch.cuda, "device", device)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the current stream of {device}")
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: self.calls.append(("back to", stream)))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
        end = lambda index, pool: self.calls.append(("closed", index, pool))  # noqa: E731 - one line
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)


@pytest.mark.parametrize("fails", [False, True])
def test_a_recording_passes_device_stream_and_mode_and_closes_its_pool_on_failure(monkeypatch, fails):
    cuda = _FakeCuda(monkeypatch, fails)
    x = torch.empty(2, device="meta")

    class OnSecond:
        device = torch.device("cuda:1")

    stream = "a stream of cuda:1"
    with cuda_graph._device_guard(OnSecond.device), pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        cuda_graph._capture(lambda _: [x], [OnSecond()], stream)
    options = {"pool": (0, 7), "stream": stream, "capture_error_mode": "thread_local"}
    assert cuda.calls[0] == ("cuda:1", options)
    back = ("back to", "the current stream of cuda:1")  # torch does not restore it if the end of a recording fails
    assert cuda.calls[1:] == ([back, ("closed", 1, (0, 7))] if fails else [])
    assert cuda.device == "cuda:0"
    assert gc.isenabled()


def test_recording_and_replaying_happen_on_the_device_of_the_input(recorder, monkeypatch):
    guarded = []
    inside = []

    @contextlib.contextmanager
    def guard(device):
        guarded.append(device)
        inside.append(True)
        yield
        inside.pop()

    monkeypatch.setattr(cuda_graph, "_device_guard", guard)
    double = Replayed(lambda x: (assert_inside(), [2 * x])[1])

    def assert_inside():
        assert inside, "called outside of the guard"

    x = torch.arange(3.0)
    for i in range(3):
        assert torch.equal(double(x + i)[0], 2 * (x + i))
    assert guarded == [x.device] * 3


# The fused convolution with bias and ReLU.


def _stand_in(x, w, b, stride, padding, *_):
    return torch.relu(torch.conv2d(x, w, b, padding=padding))


@pytest.fixture
def cudnn(monkeypatch):
    """Return a function that replaces cuDNN's kernel and returns a list of the input shapes of its calls."""

    def use(kernel):
        shapes = []
        monkeypatch.setattr(network, "_FUSED", None)
        monkeypatch.setattr(network, "_has_cudnn", lambda x: True)
        monkeypatch.setattr(network, "_NOT_IN_CUDNN", set())
        monkeypatch.setattr(network, "_CUDNN_RELU", lambda x, *rest: (shapes.append(x.shape), kernel(x, *rest))[1])
        return shapes

    return use


def test_both_directions_use_the_fused_kernel(cudnn):
    flow, shapes = _flow().eval(), cudnn(_stand_in)
    z = flow.encode(IMAGES, batch_size=20)
    in_encode = sorted(shapes)
    assert len(in_encode) == 2 * 2 * 2  # two ReLUs in each of two steps of two levels
    shapes.clear()
    assert np.array_equal(flow.decode(z, batch_size=20), IMAGES)
    assert sorted(shapes) == in_encode


def test_a_missing_fused_kernel_is_not_tried_again(cudnn):
    def none(*_):
        raise RuntimeError("FIND was unable to find an engine to execute this computation")

    flow, shapes = _flow().eval(), cudnn(none)
    z = flow.encode(IMAGES, batch_size=4)
    assert len(shapes) == len(set(shapes)) <= 4
    assert np.array_equal(flow.decode(z, batch_size=4), IMAGES)


def test_running_out_of_memory_is_not_treated_as_a_missing_kernel(cudnn):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    cudnn(full)
    with pytest.raises(torch.OutOfMemoryError):
        _flow().eval().encode(IMAGES, batch_size=4)
    assert not network._NOT_IN_CUDNN
