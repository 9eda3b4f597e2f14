"""Work that is recorded as a CUDA graph: the same numbers as plain calls, also after moves, failures and divergence.

An emulation records on the CPU; what it asks of CUDA itself is tested with stand-ins for torch.cuda, and on a device by
tests/glow/test_cuda.py.
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
EACH_WAY_TO_TRAIN = pytest.mark.parametrize("training", [TRAINING, LIGHT], ids=["plain", "memory-light"])


@pytest.fixture
def recorder():
    """Record on the CPU."""
    with emulate_cuda_graphs() as recorder:
        yield recorder


@contextlib.contextmanager
def _nothing_recorded():
    """Do what would be recorded as plain calls, everything else as on CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replayed, "__call__", lambda self, *inputs: list(self._function(*inputs)))
        yield


def _flow():
    """Return a flow whose layers are off their starts."""
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


def test_each_direction_is_recorded_once_and_gives_the_bits_of_plain_calls(recorder):
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


def test_batch_sizes_that_alternate_are_recorded_once_each_and_only_the_last_few_are_kept(recorder):
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
def test_a_recording_follows_the_parameters(recorder, change):
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
    assert recorder.captures == 1, "it is not tried again"


def test_a_graph_that_does_nothing_is_found(recorder):
    recorder.fault = "empty"
    flow = _flow().eval()
    with pytest.warns(RuntimeWarning, match="different results"):
        flow.encode(IMAGES[:4], batch_size=4)
    assert not np.array_equal(flow.encode(IMAGES[4:8], batch_size=4), flow.encode(IMAGES[:4], batch_size=4))


@pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy"])
def test_a_flow_with_recordings_can_be_copied_and_stored(recorder, how):
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
    assert np.array_equal(flow.encode(IMAGES, batch_size=4), z), "the copy shares nothing with it"


# Training.


@EACH_WAY_TO_TRAIN
def test_recorded_training_is_plain_training_and_is_recorded_once(recorder, training):
    recorded, plain = FlowTrainer(_flow(), training, IMAGES), FlowTrainer(_flow(), training, IMAGES)
    facts = [recorded.step() for _ in range(5)]
    assert (recorder.captures, recorder.replays) == (1, 5)
    with _nothing_recorded():
        assert [plain.step() for _ in range(5)] == facts
    _same_state(recorded, plain)


def test_values_kept_for_comparison_hold_no_node_of_autograd(recorder, monkeypatch):
    # A node of a parameter's gradient works on the stream that it was made on, and CUDA then refuses the recording.
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
        # The learning rate is a float32 tensor where steps are recorded, and a float64 number otherwise.
        assert torch.allclose(recorded.state_dict()[name].double(), value.double(), rtol=1e-4, atol=1e-5), name


def test_steps_at_once_are_steps_one_by_one(recorder):
    one_by_one, at_once = FlowTrainer(_flow(), TRAINING, IMAGES), FlowTrainer(_flow(), TRAINING, IMAGES)
    facts = [one_by_one.step() for _ in range(7)]
    assert [*at_once.steps(3), *at_once.steps(4)] == facts
    _same_state(at_once, one_by_one)


@pytest.mark.parametrize("emulated", [False, True])
def test_no_update_is_applied_from_the_step_on_that_diverged(emulated, monkeypatch):
    batch = FlowTrainer._batch
    monkeypatch.setattr(
        FlowTrainer, "_batch", lambda self, i, part: batch(self, i, part) * (torch.nan if i == 2 else 1.0)
    )
    with emulate_cuda_graphs() if emulated else contextlib.nullcontext():
        many, few = FlowTrainer(_flow(), TRAINING, IMAGES), FlowTrainer(_flow(), TRAINING, IMAGES)
        facts = few.steps(2)
        with pytest.raises(DivergedError, match=r"diverged at iteration 2: .* The update was not applied"):
            many.steps(5)  # the batches after the broken one are sound
        assert many.iteration == 2
        _same_state(many, few)
        monkeypatch.undo()
        few._ahead = None  # it is the broken batch
        assert many.steps(2) == few.steps(2) != facts, "and it can go on"


@EACH_WAY_TO_TRAIN
def test_training_continues_after_a_divergence_and_a_restore(recorder, training):
    trainer, other = FlowTrainer(_flow(), training, IMAGES), FlowTrainer(_flow(), training, IMAGES)
    trainer.steps(3)
    kept = trainer.state_dict()
    with torch.no_grad():
        next(trainer.flow._levels()[0].steps()).coupling.bias_out.fill_(torch.nan)
    with pytest.raises(DivergedError):
        trainer.step()
    trainer.load_state_dict(kept)
    facts = trainer.steps(3)
    assert all(fact.grad_norm > 0 for fact in facts)
    other.steps(3)
    assert other.steps(3) == facts
    _same_state(trainer, other)


def test_two_trainers_of_one_flow_keep_to_their_own_gradients(recorder):
    def trained():
        flow = _flow()
        small, large = FlowTrainer(flow, TRAINING, IMAGES), FlowTrainer(flow, LIGHT, IMAGES[::-1])
        return [trainer.step() for _ in range(4) for trainer in (small, large)], large

    facts, recorded = trained()
    assert recorder.captures == 2
    with _nothing_recorded():
        expected, plain = trained()
    assert facts == expected
    _same_state(recorded, plain)


@pytest.mark.parametrize(
    ("training", "moved"),
    [(TRAINING, "all"), (TRAINING, "a parameter"), (TRAINING, "a buffer"), (LIGHT, "all")],
    ids=["all", "a parameter", "a buffer", "all, memory-light"],
)
def test_a_flow_that_moves_in_mid_training_is_recorded_again(recorder, training, moved):
    def trained():
        trainer = FlowTrainer(_flow(), training, IMAGES)
        facts = trainer.steps(2)
        conv = next(trainer.flow._levels()[1].steps()).conv1x1
        if moved == "all":
            trainer.flow._apply(torch.clone)  # what cpu() and cuda() do
        elif moved == "a parameter":
            conv.lower.data = conv.lower.data.clone()
        else:
            conv.sign = -conv.sign
        return facts + trainer.steps(2), trainer

    facts, recorded = trained()
    assert recorder.captures == 2
    with _nothing_recorded():
        expected, plain = trained()
    assert facts == expected
    _same_state(recorded, plain)


@pytest.mark.parametrize("fault", ["refused", "empty"])
def test_training_that_cannot_be_recorded_is_plain_training(recorder, fault):
    with _nothing_recorded():
        plain = FlowTrainer(_flow(), TRAINING, IMAGES)
        expected = plain.steps(3)
    recorder.fault = fault
    trainer = FlowTrainer(_flow(), TRAINING, IMAGES)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph"):
        facts = trainer.steps(3)
    assert facts == expected, "the calls before a recording are no updates"
    _same_state(trainer, plain)


def test_the_next_batch_is_prepared_before_the_host_waits_and_only_once(recorder, monkeypatch):
    training = msgspec.structs.replace(TRAINING, iterations=5)
    trainer = FlowTrainer(_flow(), training, IMAGES)
    prepared = []
    batch = FlowTrainer._batch
    monkeypatch.setattr(FlowTrainer, "_batch", lambda self, i, part: (prepared.append(i), batch(self, i, part))[1])
    trainer.steps(2)
    assert prepared == [0, 1, 2]
    trainer.steps(3)
    assert prepared == [0, 1, 2, 3, 4], "there is no sixth step"


def test_on_the_cpu_no_batch_is_prepared_ahead():
    trainer = FlowTrainer(_flow(), TRAINING, IMAGES)
    trainer.step()
    assert trainer._ahead is None
    assert trainer.steps_together == 1


def test_the_stage_trains_in_groups_that_end_at_measures_and_checkpoints(recorder, small_recipe, tmp_path, monkeypatch):
    sizes = []
    steps = FlowTrainer.steps
    monkeypatch.setattr(FlowTrainer, "steps", lambda self, count: (sizes.append(count), steps(self, count))[1])
    settings = ["flow.training.iterations=40", "flow.checkpoint_every=25", "flow.evaluate_every=20"]
    made = run(small_recipe, workspace=tmp_path / "runs", device="cpu", stage="train-glow", overrides=settings)
    assert sizes == 2 * [16, 4, 5, 15]  # of the flow and of the evaluator
    log = read_log(made["train-glow/small"].folder)
    assert [line.iteration for line in log] == list(range(1, 41))
    assert [line.iteration for line in log if line.heldout_bits_per_dim is not None] == [20, 40]


def test_a_training_leaves_torch_as_it_was():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def settings():
        return cudnn.conv.fp32_precision, matmul.fp32_precision, cudnn.deterministic, cudnn.benchmark

    before, seen = settings(), []
    trainer = FlowTrainer(_flow(), TRAINING, IMAGES)
    trainer._update = lambda y: (seen.append(settings()), [torch.ones(2)])[1]
    trainer.step()
    assert seen == [("tf32", "ieee", True, False)]
    assert settings() == before


def test_on_the_cpu_tf32_gives_the_bytes_of_float32():
    trainer = FlowTrainer(_flow(), msgspec.structs.replace(TRAINING, precision="tf32"), IMAGES)
    default = FlowTrainer(_flow(), TRAINING, IMAGES)
    assert trainer.steps(3) == default.steps(3)
    _same_state(trainer, default)


# What is asked of CUDA.


class _FakeCuda:
    """Notes what is asked of torch.cuda."""

    def __init__(self, monkeypatch, fails):
        self.asked = []
        self.device = "cuda:0"

        @contextlib.contextmanager
        def device(index):
            before, self.device = self.device, str(index)
            yield
            self.device = before

        @contextlib.contextmanager
        def graph(graph, **options):
            self.asked.append((self.device, options))
            assert not gc.isenabled(), "a CUDA graph that is collected now makes this recording fail"
            yield
            if fails:
                raise RuntimeError("capture invalidated")

        monkeypatch.setattr(torch.cuda, "device", device)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the current stream of {device}")
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: self.asked.append(("back to", stream)))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
        end = lambda index, pool: self.asked.append(("closed", index, pool))  # noqa: E731 - one line
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)


@pytest.mark.parametrize("fails", [False, True])
def test_a_recording_names_device_stream_and_mode_and_closes_its_pool_if_it_fails(monkeypatch, fails):
    cuda = _FakeCuda(monkeypatch, fails)
    x = torch.empty(2, device="meta")

    class OnSecond:
        device = torch.device("cuda:1")

    stream = "a stream of cuda:1"
    with cuda_graph._device_guard(OnSecond.device), pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        cuda_graph._capture(lambda _: [x], [OnSecond()], stream)
    options = {"pool": (0, 7), "stream": stream, "capture_error_mode": "thread_local"}
    assert cuda.asked[0] == ("cuda:1", options)
    back = ("back to", "the current stream of cuda:1")  # torch leaves the recording's own where its end fails
    assert cuda.asked[1:] == ([back, ("closed", 1, (0, 7))] if fails else [])
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


# The convolution with bias and ReLU in one kernel.


def _stand_in(x, w, b, stride, padding, *_):
    return torch.relu(torch.conv2d(x, w, b, padding=padding))


@pytest.fixture
def cudnn(monkeypatch):
    """Return a function that puts something in the place of cuDNN's kernel, and returns the shapes that it was asked."""

    def use(kernel):
        asked = []
        monkeypatch.setattr(network, "_FUSED", None)
        monkeypatch.setattr(network, "_has_cudnn", lambda x: True)
        monkeypatch.setattr(network, "_NOT_IN_CUDNN", set())
        monkeypatch.setattr(network, "_CUDNN_RELU", lambda x, *rest: (asked.append(x.shape), kernel(x, *rest))[1])
        return asked

    return use


def test_both_directions_take_the_fused_kernel(cudnn):
    flow, asked = _flow().eval(), cudnn(_stand_in)
    z = flow.encode(IMAGES, batch_size=20)
    there = sorted(asked)
    assert len(there) == 2 * 2 * 2  # two ReLUs in each of two steps of two levels
    asked.clear()
    assert np.array_equal(flow.decode(z, batch_size=20), IMAGES)
    assert sorted(asked) == there


def test_a_failing_fused_kernel_is_not_tried_again(cudnn):
    def none(*_):
        raise RuntimeError("FIND was unable to find an engine to execute this computation")

    flow, asked = _flow().eval(), cudnn(none)
    z = flow.encode(IMAGES, batch_size=4)
    assert len(asked) == len(set(asked)) <= 4
    assert np.array_equal(flow.decode(z, batch_size=4), IMAGES)


def test_running_out_of_memory_is_not_taken_for_a_missing_kernel(cudnn):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    cudnn(full)
    with pytest.raises(torch.OutOfMemoryError):
        _flow().eval().encode(IMAGES, batch_size=4)
    assert not network._NOT_IN_CUDNN
