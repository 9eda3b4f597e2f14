"""Wide residual networks have the published shapes, numbers of parameters and initial weights."""

import pytest
import torch
from torch import nn

from lsmix.classifiers.config import ClassifierTraining
from lsmix.classifiers.registry import build_classifier, cost_per_pixel
from lsmix.classifiers.wide_resnet import WideResNet


def blank(**fields):
    with torch.device("meta"):
        return WideResNet(10, **fields)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def grids(model, image_size):
    found = []
    for layer in (model.stem, *model.groups):
        layer.register_forward_hook(lambda _module, _inputs, output: found.append(tuple(output.shape[1:])))
    model.eval()(torch.zeros(1, 3, *image_size, device="meta"))
    return found


@pytest.mark.parametrize(("depth", "widening", "count"), [(28, 10, 36_479_194), (16, 4, 2_748_890), (40, 4, 8_949_210)])
def test_it_has_the_published_number_of_parameters(depth, widening, count):
    # Zagoruyko and Komodakis, table 4: WRN-28-10 has 36.5M, WRN-40-4 8.9M; exact counts are from their code.
    assert parameters(blank(depth=depth, widening=widening)) == count


def test_wrn_28_10_has_the_groups_of_table_1():
    # Zagoruyko and Komodakis, table 1: 16, 160, 320, 640 channels on 32×32, 32×32, 16×16, 8×8, with N = 4 blocks each.
    model = blank()
    assert grids(model, (32, 32)) == [(16, 32, 32), (160, 32, 32), (320, 16, 16), (640, 8, 8)]
    assert [len(group) for group in model.groups] == [4, 4, 4]
    kernels = [m.kernel_size for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert (kernels.count((3, 3)), kernels.count((1, 1)), len(kernels)) == (25, 3, 28)
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Conv2d))
    assert not [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert {(m.momentum, m.eps) for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {(0.1, 1e-5)}


@pytest.mark.parametrize(
    ("size", "sides"),
    [
        ((63, 63), [(63, 63), (63, 63), (32, 32), (16, 16)]),
        ((64, 64), [(64, 64), (32, 32), (16, 16), (8, 8)]),
        ((64, 63), [(64, 63), (64, 63), (32, 32), (16, 16)]),
        ((8, 8), [(8, 8), (8, 8), (4, 4), (2, 2)]),
        ((1, 1), [(1, 1), (1, 1), (1, 1), (1, 1)]),
    ],
)
def test_the_first_group_halves_images_of_at_least_64_pixels(size, sides):
    model = blank(depth=10, widening=1, image_size=size)
    assert [shape[1:] for shape in grids(model, size)] == sides
    # With widening 1, 16 channels stay 16, but a change of the grid needs a 1×1 shortcut convolution.
    assert (model.groups[0][0].shortcut is None) == (min(size) < 64)


def test_a_block_adds_to_its_input_or_to_a_convolution_of_its_activated_input():
    torch.manual_seed(0)
    model = WideResNet(10, depth=16, widening=2).eval()
    changing, keeping = model.groups[1][0], model.groups[1][1]
    for block in (changing, keeping):
        nn.init.zeros_(block.conv2.weight)  # so that only the shortcut remains
    x = torch.randn(2, 32, 8, 8)
    assert changing.shortcut.stride == (2, 2)
    active = torch.relu(changing.norm1(x.clone()))
    torch.testing.assert_close(changing(x), nn.functional.conv2d(active, changing.shortcut.weight, stride=2))
    y = torch.randn(2, 64, 4, 4)
    torch.testing.assert_close(keeping(y.clone()), y)


def test_the_weights_have_he_initialisation_by_fan_out():
    torch.manual_seed(0)
    model = WideResNet(10, depth=10, widening=8)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 16_384:
            expected = (2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5
            # 3% is more than five standard errors of the standard deviation.
            assert float(module.weight.detach().std()) == pytest.approx(expected, rel=0.03)
    assert not model.head.bias.any()


@pytest.mark.parametrize(("name", "size"), [("wrn-28-10", 32), ("wrn-16-4", 64), ("cnn-13", 32)])
def test_the_estimated_cost_matches_the_convolutions(name, size):
    config = ClassifierTraining(architecture=name)
    products = []

    def count(module, _inputs, output):
        products.append(module.weight.numel() * output.shape[2] * output.shape[3])

    with torch.device("meta"):
        model = build_classifier(config, 10, (size, size, 3))
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count)
        model.eval()(torch.zeros(1, 3, size, size))
    said_parameters, said_products = cost_per_pixel(config, size, size, 3)
    # The estimate omits batch norm, the head, CNN-13's first convolution and the border of its valid one.
    assert said_parameters == pytest.approx(parameters(model), rel=0.01)
    assert said_products * size * size == pytest.approx(sum(products), rel=0.1)
