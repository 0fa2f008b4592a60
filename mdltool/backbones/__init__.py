"""Backbones: a library's own network, its input specification and its sites. One thin file per backbone."""

from mdltool.registry import Table

BACKBONES = Table(
    "backbone",
    {
        "x3d_m": "mdltool.backbones.x3d:X3DM",
        "x3d_tiny": "mdltool.backbones.x3d:X3DTiny",
        "swin3d_t": "mdltool.backbones.swin3d:Swin3dT",
        "swin3d_s": "mdltool.backbones.swin3d:Swin3dS",
        "swin3d_b": "mdltool.backbones.swin3d:Swin3dB",
        "swin3d_tiny": "mdltool.backbones.swin3d:Swin3dTiny",
        "clip_vit_b16": "mdltool.backbones.image_transformer:ClipB16",
        "clip_vit_l14": "mdltool.backbones.image_transformer:ClipL14",
        "clip_vit_tiny": "mdltool.backbones.image_transformer:ClipTiny",
        "clip_vit_small": "mdltool.backbones.image_transformer:ClipSmall",
        "vit_b16": "mdltool.backbones.image_transformer:VitB16",
        "vit_tiny": "mdltool.backbones.image_transformer:VitTiny",
        "vivit_b": "mdltool.backbones.vivit:VivitB16x2",
        "vivit_tiny": "mdltool.backbones.vivit:VivitTiny",
        "mvit_v2_s": "mdltool.backbones.mvit:MvitV2S",
        "mvit_tiny": "mdltool.backbones.mvit:MvitTiny",
        "multitrain_mvit_b": "mdltool.backbones.mvit:MultitrainMvitB",
        "multitrain_mvit_s": "mdltool.backbones.mvit:MultitrainMvitS",
        "multitrain_mvit_tiny": "mdltool.backbones.mvit:MultitrainMvitTiny",
        "slow_r50": "mdltool.backbones.slow_r50:SlowR50",
        "resnet26": "mdltool.backbones.resnet26:ResNet26",
        "resnet26_tiny": "mdltool.backbones.resnet26:ResNet26Tiny",
    },
)
