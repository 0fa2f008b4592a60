"""Adapters: small modules for one kind of site. One file per method."""

from mdltool.registry import Table

ADAPTERS = Table(
    "adapter",
    {
        "2d": "mdltool.adapters.stage_conv:Conv2dAdapter",
        "2plus1d": "mdltool.adapters.stage_conv:Conv2Plus1dAdapter",
        "3d": "mdltool.adapters.stage_conv:Conv3dAdapter",
        "mhva": "mdltool.adapters.mhva:MhvaAdapter",
        "adaptformer": "mdltool.adapters.mhva:AdaptFormerAdapter",
        "prefix": "mdltool.adapters.prefix:PrefixAdapter",
        "caa": "mdltool.adapters.cross_attention:CrossAttentionAdapter",
        "st": "mdltool.adapters.st_adapter:StAdapter",
        "mst": "mdltool.adapters.mst_adapter:MstAdapter",
        "cls_shift": "mdltool.adapters.cls_shift:ClassTokenShift",
        "lora": "mdltool.adapters.lora:LoraAdapter",
        "2d_tmix": "mdltool.adapters.frame_mixing:FrameMixingAdapter",
        "series": "mdltool.adapters.residual:SeriesAdapter",
        "parallel": "mdltool.adapters.residual:ParallelAdapter",
    },
)
