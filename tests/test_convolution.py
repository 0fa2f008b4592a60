"""Convolutions that a CPU gets wrong: clips that are shorter than the kernel, strided taps of few channels."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from mdltool.convolution import PaddedConv3d, PointConv2d, pad_short_inputs
from tests.memory import soil

CASES = [  # kernel, clip (T, H, W), stride, dilation
    ((7, 1, 1), (4, 4, 4), (1, 1, 1), (1, 1, 1)),
    ((7, 1, 1), (2, 4, 4), (1, 1, 1), (1, 1, 1)),
    ((5, 1, 1), (4, 7, 7), (2, 1, 1), (1, 1, 1)),
    ((3, 3, 3), (2, 4, 4), (1, 2, 2), (1, 1, 1)),
    ((3, 1, 1), (4, 2, 2), (1, 1, 1), (2, 1, 1)),
    ((1, 5, 7), (3, 9, 1), (1, 1, 1), (1, 1, 1)),
    ((3, 3, 3), (8, 7, 7), (1, 1, 1), (1, 1, 1)),
]


def _gradients(layer: nn.Conv3d, clip: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    layer.zero_grad()
    x = clip.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = layer(x)
    soil()
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
    assert x.grad is not None
    return [y.detach().float(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize(("kernel", "size", "stride", "dilation"), CASES)
def test_bf16_gradients_are_those_of_float32(
    kernel: tuple[int, int, int],
    size: tuple[int, int, int],
    stride: tuple[int, int, int],
    dilation: tuple[int, int, int],
    groups: int,
) -> None:
    torch.manual_seed(0)
    padding = tuple(step * (extent // 2) for step, extent in zip(dilation, kernel, strict=True))
    layer = nn.Conv3d(16, 16, kernel, stride, padding, dilation, groups).to(memory_format=torch.channels_last_3d)
    clip = torch.randn(2, 16, *size).to(memory_format=torch.channels_last_3d)
    plain = [value.clone() for value in _gradients(layer, clip, torch.float32)]
    pad_short_inputs(layer)
    assert type(layer) is PaddedConv3d
    for found, expected in zip(_gradients(layer, clip, torch.float32), plain, strict=True):
        torch.testing.assert_close(found, expected)
    for found, expected in zip(_gradients(layer, clip, torch.bfloat16), plain, strict=True):
        assert float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_state_and_other_paddings_stay() -> None:
    net = nn.Sequential(nn.Conv3d(2, 2, 3, padding="same"), nn.Conv3d(2, 2, 3, padding=1, padding_mode="replicate"))
    clip = torch.randn(1, 2, 2, 4, 4)
    expected, keys = net(clip), list(net.state_dict())
    pad_short_inputs(net)
    torch.testing.assert_close(net(clip), expected)
    assert list(net.state_dict()) == keys


CRASHED = """
import torch
from mdltool.convolution import PointConv2d
for inputs in (4, 8, 12):
    layer = PointConv2d(inputs, 16, 1, stride=2, bias=False)
    x = torch.randn(16, inputs, 72, 72).contiguous(memory_format=torch.channels_last).requires_grad_()
    layer(x).square().sum().backward()
    print(float(x.grad[:, :, 1::2].abs().sum()), float(layer.weight.grad.abs().sum()) > 0)
"""


def test_few_channels_that_lie_last_do_not_crash_the_process() -> None:
    ran = subprocess.run([sys.executable, "-c", CRASHED], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.split()) == (0, 3 * ["0.0", "True"]), ran.stderr


@pytest.mark.parametrize(
    ("channels", "size", "stride"), [(8, (7, 6), (2, 2)), (3, (5, 5), (3, 1)), (16, (7, 6), 2)]
)
def test_a_strided_tap_is_the_frameworks(channels: int, size: tuple[int, int], stride: Any) -> None:
    torch.manual_seed(0)
    theirs = nn.Conv2d(channels, 5, 1, stride, bias=False).double()
    ours = PointConv2d(channels, 5, 1, stride, bias=False).double()
    ours.load_state_dict(theirs.state_dict())
    x, z = (
        torch.randn(2, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for _ in "xz"
    )
    y = [layer(part.requires_grad_()) for layer, part in ((theirs, x), (ours, z))]
    torch.testing.assert_close(y[1], y[0], rtol=1e-12, atol=1e-12)
    for part in y:
        part.square().sum().backward()
    torch.testing.assert_close(z.grad, x.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-12, atol=1e-12)
