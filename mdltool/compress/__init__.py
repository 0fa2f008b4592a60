"""Adapters made smaller, or a part of the backbone.

`joint_svd` and `ranks` are the algebra and know of no models; the others apply it to them, and fold adapters in.
"""
