"""Annotation formats, read as published. One file per format; each offers a `query.Reader`."""

from mdltool.registry import Table

FORMATS = Table(
    "annotation format",
    {
        "folder": "mdltool.data.formats.folder:read",
        "csv": "mdltool.data.formats.csv_list:read",
        "multilabel": "mdltool.data.formats.multilabel:read",
        "regression": "mdltool.data.formats.regression:read",
        "coco": "mdltool.data.formats.coco:read",
        "coco_multilabel": "mdltool.data.formats.coco:read_multilabel",
        "arrays": "mdltool.data.formats.arrays:read",
        "ucf101": "mdltool.data.formats.ucf101:read",
        "hmdb51": "mdltool.data.formats.hmdb51:read",
        "kinetics": "mdltool.data.formats.kinetics:read",
        "ssv2": "mdltool.data.formats.ssv2:read",
        "mit": "mdltool.data.formats.mit:read",
        "activitynet": "mdltool.data.formats.activitynet:read",
        "epic_kitchens": "mdltool.data.formats.epic_kitchens:read",
        "epic_kitchens_actions": "mdltool.data.formats.epic_kitchens:read_actions",
        "mpiigi": "mdltool.data.formats.mpiigi:read",
        "udiva": "mdltool.data.formats.udiva:read",
    },
)
