"""The stages on CUDA against the CPU: the same plan, the same pixels within ±1, latents within a stated tolerance."""

from pathlib import Path

import numpy as np
import pytest

from lsmix.data.latents import open_latents
from lsmix.data.pool import open_pool
from lsmix.pipeline.api import run

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cuda_workspace(tiny_recipe: Path, finished_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace in which everything but the flow, which is the CPU's, was made on CUDA."""
    (flow,) = (finished_workspace / "train-glow").glob("tiny-*")
    workspace = tmp_path_factory.mktemp("cuda") / "runs"
    run(tiny_recipe, workspace=workspace, device="cuda", overrides=[f"flow.path='{flow}'"])
    return workspace


def _one(workspace: Path, stage: str, name: str) -> Path:
    (folder,) = (workspace / stage).glob(f"{name}-*")
    return folder


def test_latents_agree(finished_workspace: Path, cuda_workspace: Path) -> None:
    cpu = open_latents(_one(finished_workspace, "encode", "tiny"))
    cuda = open_latents(_one(cuda_workspace, "encode", "tiny"))
    # float32 sums in another order over 4 steps of 16 channels: a few hundred units in the last place of values near 1.
    np.testing.assert_allclose(cuda.z[:], cpu.z[:], rtol=0, atol=1e-3)
    assert cuda.manifest.counts["exact_round_trips"] == len(cuda)


def test_the_plan_is_equal_and_pixels_differ_by_at_most_one(finished_workspace: Path, cuda_workspace: Path) -> None:
    cpu = open_pool(_one(finished_workspace, "mix", "lsmix"))
    cuda = open_pool(_one(cuda_workspace, "mix", "lsmix"))
    for column in ("source_a", "source_b", "label_a", "label_b", "lam", "share_b", "state"):
        np.testing.assert_array_equal(getattr(cuda, column)[:], getattr(cpu, column)[:], err_msg=column)
    assert np.abs(cuda.image[:].astype(int) - cpu.image[:].astype(int)).max() <= 1


def test_training_the_flow_on_cuda_twice_gives_the_same_bytes(tiny_recipe: Path, tmp_path: Path) -> None:
    roots = [
        run(tiny_recipe, workspace=tmp_path / name, device="cuda", stage="train-glow")["train-glow"].manifest.root
        for name in ("first", "second")
    ]
    assert roots[0] == roots[1]
