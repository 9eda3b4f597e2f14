"""Classifiers by name: known names, names that are rejected before any work, and networks from other packages."""

import subprocess
import sys
import types

import pytest
import torch
from torch import nn

from lsmix.classifiers.config import ClassifierTraining, check_architecture
from lsmix.classifiers.registry import build_classifier
from lsmix.classifiers.training import ClassifierTrainer
from lsmix.data.errors import RecipeError
from lsmix.pipeline.config.recipe import read_recipe

SHAPE = (8, 8, 3)


@pytest.fixture
def package(monkeypatch):
    """Return a module that acts as an installed package; recipes can name its attributes."""
    module = types.ModuleType("somebodys_nets")
    module.__spec__ = types.SimpleNamespace(name=module.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def build(name, classes=5):
    return build_classifier(ClassifierTraining(architecture=name), classes, SHAPE)


@pytest.mark.parametrize("name", ["cnn-13", "wrn-28-10", "wrn-10-1", "wrn-40-4", "torch:nn.Linear", "torch.nn:Linear"])
def test_known_names_and_callables_of_installed_packages_are_accepted(name):
    check_architecture(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cnn13", r"unknown architecture 'cnn13'\. Did you mean 'cnn-13'\? Known: cnn-13, wrn-28-10, "),
        ("wrn-28", r"unknown architecture 'wrn-28'\. Did you mean 'wrn-28-10'\?"),
        ("wrn-27-10", r"D must be 6n \+ 4"),
        ("wrn-4-10", r"D must be 6n \+ 4"),
        ("wrn-28-0", r"K 1 to 64"),
        ("wrn-28-10\n", r"unknown architecture"),
        ("wrn-99999-10", r"unknown architecture"),
        ("", r"unknown architecture ''\."),
        ("timm:", r"timm names contain only letters"),
        ("timm:hf-hub:somebody/net", r"timm names contain only letters"),
        ("timm:local-dir:/tmp/net", r"timm names contain only letters"),
        ("no_such_package:net", r"needs the package 'no_such_package', which is not installed"),
        ("no_such_package.nets:net", r"needs the package 'no_such_package', which is not installed"),
        ("__main__:net", r"needs the package '__main__', which is not installed"),
        ("../nets:net", r"unknown architecture"),
        ("torch:", r"unknown architecture"),
    ],
)
def test_other_names_are_rejected(name, message):
    with pytest.raises(RecipeError, match=message):
        check_architecture(name)


def test_a_recipe_with_an_unknown_architecture_is_rejected_immediately(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text('name = "a"\n[data]\nformat = "digits"\n[runs.wide]\n', encoding="utf-8")
    expected = r"unknown architecture 'wnr-28-10'\. Did you mean 'wrn-28-10'\? Known: .*:CALLABLE\.$"
    for key, where in (
        ("classifier", r"recipe '.*': classifier"),
        ("runs.wide.classifier", r"^runs\.wide\.classifier"),
    ):
        with pytest.raises(RecipeError, match=f"{where}: {expected}"):
            read_recipe(path, [f"{key}.architecture=wnr-28-10"])


def test_checking_names_imports_neither_torch_nor_the_named_package():
    code = (
        "import sys\n"
        "from lsmix.classifiers.config import ClassifierTraining, PixelMix\n"
        "for name in ('cnn-13', 'wrn-28-10', 'torch.nn:Linear'): ClassifierTraining(architecture=name)\n"
        "PixelMix(method='cutmix')\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_fields_of_cnn_13_are_rejected_for_other_architectures():
    for fields in ({"width": 64}, {"final_batch_norm": True}):
        with pytest.raises(RecipeError, match="width and final_batch_norm apply to 'cnn-13' only"):
            ClassifierTraining(architecture="wrn-10-1", **fields)


def test_a_callable_receives_the_number_of_classes_and_its_network_is_trained(package):
    calls = []

    def net(classes):
        calls.append(classes)
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))

    package.net = net
    config = ClassifierTraining(architecture="somebodys_nets:net")
    states = [ClassifierTrainer(config, 5, SHAPE, seed=seed).state_dict() for seed in (0, 0, 1)]
    assert calls == [5, 5, 5]
    assert states[0]["model.1.weight"].shape == (5, 8 * 8 * 3)
    assert torch.equal(states[0]["model.1.weight"], states[1]["model.1.weight"])
    assert not torch.equal(states[0]["model.1.weight"], states[2]["model.1.weight"])


def test_checking_a_network_does_not_change_its_statistics(package):
    package.net = lambda classes: nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, classes))
    assert int(build("somebodys_nets:net")[0].num_batches_tracked) == 0


def test_errors_name_mistakes_of_other_packages(package):
    package.no_module = lambda _classes: "net"
    package.wrong_size = lambda classes: nn.Sequential(nn.Flatten(), nn.Linear(192, classes + 1))
    package.no_tensor = lambda _classes: _Tuple()
    package.wrong_input = lambda classes: nn.Sequential(nn.Flatten(), nn.Linear(7, classes))
    package.no_callable = 3
    for name, message in {
        "no_module": r"returned str; expected a torch\.nn\.Module",
        "wrong_size": r"returns \(2, 6\) for 2 images; expected logits \(2, 5\)",
        "no_tensor": r"returns tuple for 2 images",
        "wrong_input": r"fails for 5 classes and images of 8×8×3: mat1 and mat2",
        "no_callable": r"fails for 5 classes .*'int' object is not callable",
        "not_there": r"'somebodys_nets:not_there' cannot be imported",
    }.items():
        with pytest.raises(RecipeError, match=message) as caught:
            build(f"somebodys_nets:{name}")
        assert f"architecture 'somebodys_nets:{name}'" in str(caught.value)


class _Tuple(nn.Module):
    def forward(self, x):
        return (x,)


def test_timm_creates_an_untrained_network_of_the_right_size(monkeypatch):
    options = {}

    def create_model(name, **fields):
        options.update(fields, name=name)
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(5))

    timm = types.ModuleType("timm")
    timm.__spec__, timm.create_model = types.SimpleNamespace(name="timm"), create_model
    monkeypatch.setitem(sys.modules, "timm", timm)
    build("timm:resnet18")
    assert options == {"name": "resnet18", "pretrained": False, "num_classes": 5, "in_chans": 3}


def test_the_error_without_timm_tells_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        RecipeError, match=r"needs the package 'timm', which is not installed\. pip install 'lsmix\[timm\]'"
    ):
        check_architecture("timm:resnet18")


def test_a_real_timm_network_returns_the_requested_logits():
    pytest.importorskip("timm", reason="timm is an option: pip install 'lsmix[timm]'")
    assert build("timm:resnet10t")(torch.zeros(1, 3, 8, 8)).shape == (1, 5)
    with pytest.raises(RecipeError, match=r"architecture 'timm:resnet10000' fails .*Unknown model"):
        build("timm:resnet10000")
