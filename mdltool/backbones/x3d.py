"""X3D from PyTorchVideo's builder: the official X3D-M and a small member of the family for CPUs.

Swish is torch's own SiLU, the same function: PyTorchVideo's has a backward that the compiler cannot read.
"""

from __future__ import annotations

from torch import nn

from mdltool.backbones.pytorchvideo_net import PoolOptions, PyTorchVideoBackbone, create_x3d


class X3DM(PyTorchVideoBackbone):
    """X3D-M: 2,974,674 parameters without its classifier; sites of 24, 24, 48, 96 and 192 channels."""

    about = "X3D-M (PyTorchVideo)"
    weight_sources = {"kinetics400": "PyTorchVideo model zoo, kinetics/X3D_M.pyth"}  # noqa: RUF012
    default_frames = 16
    default_crop = 224

    def __init__(self, options: PoolOptions, num_frames: int, crop: int) -> None:
        net = create_x3d(input_clip_length=16, input_crop_size=224, inner_act=nn.SiLU)
        super().__init__(net, num_frames, crop, options.pool)


class TinyOptions(PoolOptions):
    """temporal_kernels: false makes every kernel 1 x k x k, so that the network cannot tell the frames' order."""

    temporal_kernels: bool = True


class X3DTiny(PyTorchVideoBackbone):
    """A few-hundred-thousand-parameter X3D with the same five sites, for CPUs, tests and the demo."""

    Options = TinyOptions
    about = "a small X3D for CPUs (PyTorchVideo's builder)"
    default_frames = 8
    default_crop = 64

    def __init__(self, options: TinyOptions, num_frames: int, crop: int) -> None:
        stem_kt, stage_kt = (5, 3) if options.temporal_kernels else (1, 1)
        net = create_x3d(
            input_clip_length=8,
            input_crop_size=64,
            width_factor=1.0,
            depth_factor=0.5,
            stem_dim_in=16,
            stem_conv_kernel_size=(stem_kt, 3, 3),
            stage_conv_kernel_size=((stage_kt, 3, 3),) * 4,
            head_dim_out=256,
            inner_act=nn.SiLU,
        )
        super().__init__(net, num_frames, crop, options.pool)
