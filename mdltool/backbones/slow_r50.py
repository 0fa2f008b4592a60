"""The 3D ResNet of Omi et al., Table 5: PyTorchVideo's slow_r50 (SLOW 8x8 R50)."""

from __future__ import annotations

from mdltool.backbones.pytorchvideo_net import PoolOptions, PyTorchVideoBackbone, create_resnet


class SlowR50(PyTorchVideoBackbone):
    """SLOW R50: 31,634,496 parameters without its classifier; sites of 64, 256, 512, 1024 and 2048 channels.

    It has no convolution before its head: M6 is the average pool alone (spec omi_mdl 2.1, trap 3).
    """

    about = "SLOW 8x8 ResNet-50 (PyTorchVideo)"
    weight_sources = {"kinetics400": "PyTorchVideo model zoo, kinetics/SLOW_8x8_R50.pyth"}  # noqa: RUF012
    default_frames = 8
    default_crop = 224

    def __init__(self, options: PoolOptions, num_frames: int, crop: int) -> None:
        net = create_resnet(model_depth=50, stem_conv_kernel_size=(1, 7, 7), head_pool_kernel_size=(8, 7, 7))
        super().__init__(net, num_frames, crop, options.pool)
