"""Multiply-accumulate operations (MACs) of a net: the true number, and the number as the paper counts.

Nothing is computed: the nets run on the meta device, which knows shapes only, so that any size is cheap.
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# What the paper's counter charges per element of the output; it reads layers, so that operators outside a layer go unseen.
_LAYER_CHARGES = {nn.InstanceNorm3d: 2, nn.GroupNorm: 2, nn.LayerNorm: 2, nn.PReLU: 1, nn.Softmax: 3}


def count_macs(net: nn.Module, *input_shapes: tuple[int, ...]) -> int:
    """True MACs of one call: those of convolutions and matrix products.

    Args:
        input_shapes: of each input, (B, 1, D, H, W) of the image.
    """
    return _macs(_on_meta(net), input_shapes, formulas={})


def published_macs(net: nn.Module, *input_shapes: tuple[int, ...]) -> int:
    """MACs of one call as the paper counts them, for comparison with its tables only; inferred from the figures of its Table 2.

    Transposed convolutions are charged at the size of their output, 8 times too much at stride 2; the products of the attention
    are not seen; normalization, PReLU and softmax are charged.
    """
    on_meta = _on_meta(net)
    layer_macs: list[int] = []
    for layer in on_meta.modules():
        if type(layer) in _LAYER_CHARGES:
            layer.register_forward_hook(_charging(layer_macs, charge=_LAYER_CHARGES[type(layer)]))
    aten = torch.ops.aten
    macs = _macs(on_meta, input_shapes, formulas={aten.convolution: _convolution_at_output, aten.bmm: _unseen})
    return macs + sum(layer_macs)


def _on_meta(net: nn.Module) -> nn.Module:
    """A copy without values."""
    return copy.deepcopy(net).to("meta").eval()


def _macs(on_meta: nn.Module, input_shapes: tuple[tuple[int, ...], ...], *, formulas: dict) -> int:
    """MACs of one call; torch counts FLOPs, two for each MAC."""
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter, torch.no_grad():
        on_meta(*(torch.empty(shape, device="meta") for shape in input_shapes))
    return counter.get_total_flops() // 2


def _charging(layer_macs: list[int], *, charge: int) -> Callable[[nn.Module, tuple, Tensor], None]:
    """A hook that notes a charge for each element of a layer's output."""

    def charge_output(_layer: nn.Module, _inputs: tuple, output: Tensor) -> None:
        layer_macs.append(charge * output.numel())

    return charge_output


# torch.utils.flop_counter passes the shapes of the operator's arguments in their order, and the output's as out_shape
def _convolution_at_output(x_shape, w_shape, _bias, _stride, _padding, _dilation, _transposed, _output_padding, _groups, *, out_shape) -> int:
    """FLOPs of a convolution, transposed or not, charged at the size of its output."""
    return 2 * x_shape[0] * math.prod(w_shape) * math.prod(out_shape[2:])


def _unseen(_a_shape, _b_shape, *, out_shape) -> int:
    """FLOPs of an operator that the paper's counter does not see."""
    return 0
