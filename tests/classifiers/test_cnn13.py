"""CNN-13 has the layers of Table 5, adapts to small images, and evaluates with bias-corrected statistics."""

import pytest
import torch
from torch import nn

from lsmix.classifiers.cnn13 import Cnn13, pooled_sides
from lsmix.data.errors import RecipeError


def convolutions(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def test_it_has_the_convolutions_of_table_5():
    # From [P Table 5], rows 1-3, 5-7, 9-11: (channels in, channels out, kernel, padding).
    expected = [
        (3, 128, 3, 1),
        (128, 128, 3, 1),
        (128, 128, 3, 1),
        (128, 256, 3, 1),
        (256, 256, 3, 1),
        (256, 256, 3, 1),
        (256, 512, 3, 0),
        (512, 256, 1, 0),
        (256, 128, 1, 0),
    ]
    found = [(c.in_channels, c.out_channels, c.kernel_size[0], c.padding[0]) for c in convolutions(Cnn13(10))]
    assert found == expected
    assert all(convolution.bias is None for convolution in convolutions(Cnn13(10, width=4)))


def test_its_layers_match_the_rows_of_table_5():
    def described(layer):
        names = " ".join(type(part).__name__.lstrip("_") for part in layer)
        if names == "MaxPool2d Dropout":
            return f"{layer[0].kernel_size}×{layer[0].kernel_size} max-pool, dropout {layer[1].p}"
        assert names == "Conv2d BatchNorm2d LeakyReLU"
        side = layer[0].kernel_size[0]
        padding = {(3, 1): " same padding", (3, 0): " valid padding", (1, 0): ""}[side, layer[0].padding[0]]
        return f"{side}×{side} conv. {layer[0].out_channels}{padding}"

    model = Cnn13(10, final_batch_norm=True)
    # [P Table 5], rows 1 to 14, quoted; each convolution there continues with "BNorm, lReLU".
    assert [described(layer) for layer in model.features] == [
        "3×3 conv. 128 same padding",
        "3×3 conv. 128 same padding",
        "3×3 conv. 128 same padding",
        "2×2 max-pool, dropout 0.5",
        "3×3 conv. 256 same padding",
        "3×3 conv. 256 same padding",
        "3×3 conv. 256 same padding",
        "2×2 max-pool, dropout 0.5",
        "3×3 conv. 512 valid padding",
        "1×1 conv. 256",
        "1×1 conv. 128",
    ]
    assert model.final_grid == (6, 6)  # 12: global average pool 6×6 → 1×1
    assert (model.head.in_features, model.head.out_features) == (128, 10)  # 13: fully connected 128 → 10
    assert model.head_norm.num_features == 10  # 14: BNorm, only for SVHN
    assert isinstance(Cnn13(10).head_norm, nn.Identity)


def test_it_has_the_number_of_parameters_of_table_5():
    # 9·(3·128 + 2·128² + 128·256 + 2·256² + 256·512) + 512·256 + 256·128 weights of convolutions,
    # 2·(3·128 + 3·256 + 512 + 256 + 128) of batch norm, 128·10 + 10 of the fully connected layer.
    assert sum(parameter.numel() for parameter in Cnn13(10).parameters()) == 3_116_416 + 4_096 + 1_290
    assert sum(parameter.numel() for parameter in Cnn13(10, final_batch_norm=True).parameters()) == 3_121_802 + 20


def test_the_grids_of_a_32_pixel_image_match_table_5():
    grids = []
    model = Cnn13(10, width=2).eval()
    for layer in model.features:
        layer.register_forward_hook(lambda _module, _inputs, output: grids.append(tuple(output.shape[1:])))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    first, second, last = [(2, 32, 32)] * 3, [(4, 16, 16)] * 3, [(8, 6, 6), (4, 6, 6), (2, 6, 6)]
    assert grids == [*first, (2, 16, 16), *second, (4, 8, 8), *last]
    assert model.final_grid == (6, 6)


def test_norm_activation_and_dropout_use_the_documented_constants():
    model = Cnn13(10, final_batch_norm=True)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.01, 1e-6)}
    assert len(norms) == 10
    assert {m.negative_slope for m in model.modules() if isinstance(m, nn.LeakyReLU)} == {0.1}
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("size", "grids", "final"),
    [
        ((64, 64), ((64, 64), (32, 32), (16, 16)), (14, 14)),
        ((12, 12), ((12, 12), (6, 6), (3, 3)), (1, 1)),
        ((11, 32), ((11, 32), (5, 16), (5, 16)), (3, 14)),
        ((8, 8), ((8, 8), (4, 4), (4, 4)), (2, 2)),
        ((5, 5), ((5, 5), (5, 5), (5, 5)), (3, 3)),
        ((3, 3), ((3, 3), (3, 3), (3, 3)), (1, 1)),
    ],
)
def test_a_pool_is_omitted_if_the_valid_convolution_would_not_fit(size, grids, final):
    assert pooled_sides(size) == grids
    model = Cnn13(7, in_channels=1, image_size=size, width=2).eval()
    assert model.final_grid == final
    assert model(torch.zeros(2, 1, *size)).shape == (2, 7)


def test_images_below_3_pixels_are_rejected():
    with pytest.raises(RecipeError, match="needs images of at least 3×3 pixels, got 2×9"):
        Cnn13(10, image_size=(2, 9))


def test_the_weights_have_he_initialisation():
    torch.manual_seed(0)
    for convolution in convolutions(Cnn13(10))[1:]:
        fan_in = convolution.weight[0].numel()
        expected = (2 / (1 + 0.1**2) / fan_in) ** 0.5
        # At least 16,384 weights each: 3% is more than five standard errors of their standard deviation.
        assert float(convolution.weight.detach().std()) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("batches", [1, 5])
def test_evaluation_after_a_few_batches_ignores_the_initial_statistics(batches):
    torch.manual_seed(0)
    norm = next(m for m in Cnn13(10, width=4).modules() if isinstance(m, nn.BatchNorm2d))
    x = 30 + 5 * torch.randn(8, 4, 6, 6)
    for _ in range(batches):
        trained = norm(x)
    # The stored variance is unbiased, the variance of a batch is not: they differ by a factor of 288/287.
    torch.testing.assert_close(norm.eval()(x), trained * (287 / 288) ** 0.5, rtol=1e-4, atol=1e-4)


def test_evaluation_before_any_batch_is_the_identity():
    norm = next(m for m in Cnn13(10, width=4).modules() if isinstance(m, nn.BatchNorm2d)).eval()
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(norm(x), x)  # up to eps 1e-6
