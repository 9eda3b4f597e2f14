"""A coupling network without autograd: its output and manually derived gradients [Glow §3.3].

It computes the same function as the network in ``AffineCoupling`` with fewer passes over memory. The hidden activations
are the largest tensors, so ReLU is fused into the convolution or applied in place, and bias gradients are plain sums.

Axes: B batch, C channels, H height, W width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's convention

__all__ = [
    "OUTPUT_GAIN",
    "Activations",
    "NetworkWeights",
    "fused_conv",
    "network_gradients",
    "pixel_rows",
    "run_network",
]

OUTPUT_GAIN = 3.0  # Glow's factor on the log of the learned output scale; speeds up learning from the zero start

# oneDNN's convolution with fused ReLU, an internal operator that torch.compile emits. Its results are bit-identical to
# separate operators, and it saves 4% of a decode on one core. convolution_backward, also internal, cannot fuse ReLU.
_FUSED = getattr(torch.ops.mkldnn, "_convolution_pointwise", None) if torch._C._has_mkldnn else None

# cuDNN's convolution with bias and ReLU: one pass over the hidden activations instead of three. Cases without a kernel
# are recorded by device, types, shapes and precision, so that both directions of the flow use the same operator.
_CUDNN_RELU = torch.ops.aten.cudnn_convolution_relu
_CUDNN_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_NOT_IN_CUDNN: set[tuple[object, ...]] = set()


class NetworkWeights(NamedTuple):
    """Weights and biases of conv 3×3, conv 1×1, conv 3×3 in the compute type; the last includes the output gain."""

    weight_in: torch.Tensor
    bias_in: torch.Tensor
    weight_mid: torch.Tensor
    bias_mid: torch.Tensor
    weight_out: torch.Tensor
    bias_out: torch.Tensor

    @classmethod
    def of(cls, parameters: Sequence[torch.Tensor], dtype: torch.dtype | None = None) -> "NetworkWeights":
        """Convert the seven parameters of a coupling: three pairs of weight and bias, then ``log_gain_out``."""
        *weights, weight_out, bias_out, log_gain_out = (parameter.detach() for parameter in parameters)
        gain_C = torch.exp(OUTPUT_GAIN * log_gain_out)
        # Apply the gain to the small weight, not to the large activation: the same function with less memory traffic.
        weights += [weight_out * gain_C[:, None, None, None], bias_out * gain_C]
        return cls(*(weight.to(dtype or weight.dtype) for weight in weights))


class Activations(NamedTuple):
    """Hidden activations, which the gradients need in addition to input and weights."""

    h_in_BCHW: torch.Tensor  # after the first ReLU
    h_mid_BCHW: torch.Tensor  # after the second ReLU


def run_network(x_BCHW: torch.Tensor, weights: NetworkWeights) -> tuple[torch.Tensor, Activations]:
    """Return the network's output (B, 2C, H, W) in the type of x, and the activations in the type of the weights."""
    h_in_BCHW = _conv(x_BCHW.to(weights.weight_in.dtype), weights.weight_in, weights.bias_in, relu=True)
    h_mid_BCHW = _conv(h_in_BCHW, weights.weight_mid, weights.bias_mid, relu=True)
    out_BCHW = _conv(h_mid_BCHW, weights.weight_out, weights.bias_out, relu=False)
    return out_BCHW.to(x_BCHW.dtype), Activations(h_in_BCHW, h_mid_BCHW)


def network_gradients(
    g_out_BCHW: torch.Tensor, x_BCHW: torch.Tensor, activations: Activations, parameters: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the gradients with respect to x and to the seven ``parameters`` (see ``NetworkWeights.of``).

    Args:
        g_out_BCHW: Gradient with respect to the output.
        x_BCHW: Input of the network.
        activations: Activations that ``run_network`` returned for this input.
        parameters: Parameters of the coupling.
    """
    h_in_BCHW, h_mid_BCHW = activations
    dtype = h_in_BCHW.dtype
    weights = NetworkWeights.of(parameters, dtype)
    g_BCHW, g_weight_out, g_bias_out = _conv_gradients(g_out_BCHW.to(dtype), h_mid_BCHW, weights.weight_out)
    g_BCHW, *g_mid = _conv_gradients(_relu_gradient_(g_BCHW, h_mid_BCHW), h_in_BCHW, weights.weight_mid)
    g_BCHW, *g_in = _conv_gradients(_relu_gradient_(g_BCHW, h_in_BCHW), x_BCHW.to(dtype), weights.weight_in)
    *_, weight_out, bias_out, log_gain_out = (parameter.detach() for parameter in parameters)
    # Product rule for weight · gain and bias · gain, in the type of the parameters.
    gain_C = torch.exp(OUTPUT_GAIN * log_gain_out)
    g_weight_out = g_weight_out.to(gain_C.dtype) * gain_C[:, None, None, None]
    g_bias_out = g_bias_out.to(gain_C.dtype) * gain_C
    g_log_gain = OUTPUT_GAIN * ((g_weight_out * weight_out).sum(dim=(1, 2, 3)) + g_bias_out * bias_out)
    gradients = [gradient.to(gain_C.dtype) for gradient in (*g_in, *g_mid)]
    return g_BCHW.to(x_BCHW.dtype), [*gradients, g_weight_out, g_bias_out, g_log_gain]


def _conv(x_BCHW: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, relu: bool) -> torch.Tensor:
    if _is_matmul_faster(x_BCHW, weight):
        return _pixelwise(x_BCHW, weight, bias, relu=relu) if weight.shape[2] == 1 else _by_taps(x_BCHW, weight, bias)
    y_BCHW = fused_conv(x_BCHW, weight, bias, relu=relu)
    if y_BCHW is None and relu:
        y_BCHW = _cudnn_relu(x_BCHW, weight, bias)
    if y_BCHW is None:
        y_BCHW = F.conv2d(x_BCHW, weight, bias, padding=weight.shape[2] // 2)
        y_BCHW = F.relu_(y_BCHW) if relu else y_BCHW
    return y_BCHW


def _is_matmul_faster(x_BCHW: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether a matrix product is faster: on CUDA in full float32, which cuDNN computes in NCHW layout only.

    Measured in a decode of 512 images on an H200 at 16×16 pixels, cuDNN / matrix product: 243 / 116 µs for a 1×1
    convolution of 128 channels, 423 / 109 µs for a 3×3 convolution to 12 channels.
    """
    if x_BCHW.device.type != "cuda" or x_BCHW.dtype != torch.float32:
        return False
    if torch.backends.cudnn.conv.fp32_precision == "tf32":  # type: ignore[attr-defined]  # torch puts it there at import
        return False
    return weight.shape[2] == 1 or len(weight) < weight.shape[1]


def _pixelwise(x_BCHW: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, relu: bool) -> torch.Tensor:
    """Compute a 1×1 convolution as a matrix product with the channels of each pixel."""
    B, _, H, W = x_BCHW.shape
    multiply = torch._addmm_activation if relu else torch.addmm  # the former with fused ReLU
    y = multiply(bias, pixel_rows(x_BCHW), weight[:, :, 0, 0].t())
    return y.view(B, H, W, len(weight)).permute(0, 3, 1, 2)


def _by_taps(x_BCHW: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Compute a 3×3 convolution: multiply each pixel by all nine taps, then sum the products of neighbouring pixels."""
    B, C, H, W = x_BCHW.shape
    taps = weight.permute(2, 3, 0, 1).reshape(-1, C)
    products = (pixel_rows(x_BCHW) @ taps.t()).view(B, H, W, 3, 3, len(weight))
    y_BHWC = products[:, :, :, 1, 1] + bias
    for i, down in enumerate((-1, 0, 1)):
        for j, right in enumerate((-1, 0, 1)):
            if (down, right) != (0, 0):
                rows, columns = slice(max(0, -down), H - max(0, down)), slice(max(0, -right), W - max(0, right))
                from_rows, from_columns = (
                    slice(max(0, down), H - max(0, -down)),
                    slice(max(0, right), W - max(0, -right)),
                )
                y_BHWC[:, rows, columns] += products[:, from_rows, from_columns, i, j]
    return y_BHWC.permute(0, 3, 1, 2)


def pixel_rows(x_BCHW: torch.Tensor) -> torch.Tensor:
    """Return the channels of all pixels as rows, (B·H·W, C), without a copy if x is channels-last."""
    return x_BCHW.permute(0, 2, 3, 1).reshape(-1, x_BCHW.shape[1])


def fused_conv(
    x_BCHW: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, relu: bool = False
) -> torch.Tensor | None:
    """Return a size-preserving convolution, optionally with ReLU, by oneDNN; None if that is not available.

    The operator has no gradient.
    """
    if _FUSED is None or x_BCHW.device.type != "cpu" or x_BCHW.dtype != torch.float32:
        return None
    one, padding, attribute = [1, 1], [weight.shape[2] // 2] * 2, "relu" if relu else "none"
    fused: torch.Tensor = _FUSED(x_BCHW, weight, bias, padding, one, one, 1, attribute, [], "")
    return fused


def _cudnn_relu(x_BCHW: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor | None:
    """Return a size-preserving convolution with ReLU by one cuDNN kernel; None if that is not available."""
    if not _has_cudnn(x_BCHW):
        return None
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]  # torch puts it there at import
    case = x_BCHW.device, x_BCHW.dtype, x_BCHW.shape, weight.shape, precision
    if case in _NOT_IN_CUDNN:
        return None
    one, padding = [1, 1], [weight.shape[2] // 2] * 2
    try:
        fused: torch.Tensor = _CUDNN_RELU(x_BCHW, weight, bias, one, padding, one, 1)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        _NOT_IN_CUDNN.add(case)
        return None
    return fused


def _has_cudnn(x_BCHW: torch.Tensor) -> bool:
    if x_BCHW.device.type != "cuda" or x_BCHW.dtype not in _CUDNN_TYPES:
        return False
    return torch.version.hip is None and torch._C._has_cudnn and torch.backends.cudnn.enabled


def _conv_gradients(
    g_BCHW: torch.Tensor, x_BCHW: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients with respect to x, weight and bias."""
    one, padding = [1, 1], [weight.shape[2] // 2] * 2
    by_taps = g_BCHW.device.type == "cuda" and g_BCHW.dtype == torch.float32 and weight.shape[2] == 3
    g_x_BCHW, g_weight, _ = torch.ops.aten.convolution_backward(
        g_BCHW, x_BCHW, weight, None, one, padding, one, False, [0, 0], 1, [True, not by_taps, False]
    )
    if by_taps:  # cuDNN in TF32 takes 99 µs for 6 or 12 channels to or from 128 (65,536 pixels, H200)
        g_weight = _weight_gradient(g_BCHW, x_BCHW)
    # The bias gradient is summed here: oneDNN takes 200 µs for it, a plain sum 45 µs (128 channels, 8,192 pixels).
    return g_x_BCHW, g_weight, _channel_sums(g_BCHW)


def _weight_gradient(g_BCHW: torch.Tensor, x_BCHW: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a 3×3 convolution's weight, (outputs, inputs, 3, 3), as one product over all pixels."""
    outputs, inputs = g_BCHW.shape[1], x_BCHW.shape[1]
    if inputs <= outputs:  # expand the neighbourhoods of the tensor with fewer channels
        product = pixel_rows(g_BCHW).t() @ _neighbours(x_BCHW)
        return product.view(outputs, 3, 3, inputs).permute(0, 3, 1, 2)
    product = _neighbours(g_BCHW).t() @ pixel_rows(x_BCHW)  # flipped: x left of g means g right of x
    return product.view(3, 3, outputs, inputs).flip(0, 1).permute(2, 3, 0, 1)


def _neighbours(x_BCHW: torch.Tensor) -> torch.Tensor:
    """Return each pixel's 3×3 neighbourhood, zero-padded: (B·H·W, 9·C), channels last."""
    padded_BHWC = F.pad(x_BCHW.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    windows = padded_BHWC.unfold(1, 3, 1).unfold(2, 3, 1)  # (B, H, W, C, 3, 3)
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, 9 * x_BCHW.shape[1])


def _channel_sums(g_BCHW: torch.Tensor) -> torch.Tensor:
    """Return the sum of each channel, (C,)."""
    if g_BCHW.device.type != "cuda" or g_BCHW.dtype != torch.float32:
        return g_BCHW.sum(dim=(0, 2, 3))
    rows = pixel_rows(g_BCHW)  # a product takes 14 µs, a sum 65 µs (128 channels, 65,536 pixels, H200)
    return (rows.new_ones(1, len(rows)) @ rows)[0]


def _relu_gradient_(g_BCHW: torch.Tensor, h_BCHW: torch.Tensor) -> torch.Tensor:
    """Replace the gradient of a ReLU's output h by that of its input, in place."""
    masked: torch.Tensor = torch.ops.aten.threshold_backward.grad_input(g_BCHW, h_BCHW, 0, grad_input=g_BCHW)
    return masked
