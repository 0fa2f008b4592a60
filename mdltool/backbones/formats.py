"""Published checkpoint layouts: foreign state dicts to the keys of the libraries that our backbones are built from.

A layout is told by its keys, never by a file's name. Every mapping is a pure function on dictionaries; tensors are
renamed, split or dropped, never changed in value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from mdltool.backbones.base import some
from mdltool.errors import MdlError

State = Mapping[str, Tensor]


# A pattern, and what takes the place of what it matches.
Rule = tuple[str, str | Callable[[re.Match[str]], str]]


@dataclass(frozen=True)
class Format:
    """One layout. target: a pattern that a key of every network has which it can be read into. sign: a pattern that
    its files alone hold. convert: (file's state, network's own state) -> state under the network's keys.
    """

    about: str
    target: str
    sign: str
    convert: Callable[[State, State], dict[str, Tensor]]


def to_library(state: State, own: State, where: object) -> dict[str, Tensor]:
    """A checkpoint's tensors under the keys of `own`, the state of the bare network with its classifier.

    What the file has beyond the layout's network stays in, for `load_library_state` to name. Raises MdlError where
    the keys are of no layout that this network can be read from.
    """
    state = _without_wrapper(state)
    for layout in FORMATS:
        if _holds(own, layout.target) and _holds(state, layout.sign):
            return layout.convert(state, own)
    if any(key in own for key in state):
        return dict(state)
    raise _no_layout(state, own, where)


def _no_layout(state: State, own: State, where: object) -> MdlError:
    accepted = [layout.about for layout in FORMATS if _holds(own, layout.target)]
    found = [layout.about for layout in FORMATS if _holds(state, layout.sign)]
    looks = f"it looks like {found[0]}" if found else f"its keys: {some(state, 4)}"
    return MdlError(
        f"this file is in no layout that this backbone is read from; {looks}",
        where,
        f"this backbone accepts: {'; '.join([*accepted, OWN])}",
    )


def _holds(state: State, sign: str) -> bool:
    return any(re.search(sign, key) for key in state)


def _without_wrapper(state: State) -> State:
    """Without the `module.` that data-parallel wrappers put before every key."""
    if state and all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _renamed(state: State, rules: Iterable[Rule]) -> dict[str, Tensor]:
    """Every key through every rule (pattern, replacement), in order; a key that becomes empty is dropped."""
    found = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        if key:
            found[key] = value
    return found


def _only(state: State, prefix: str) -> State:
    """What lies under a prefix, without it; everything where nothing does."""
    inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return inner or state


def _from_transformers_clip(state: State, own: State) -> dict[str, Tensor]:
    """CLIPModel, CLIPVisionModel and CLIPVisionModelWithProjection: the vision tower alone."""
    return _renamed(_only(state, "vision_model."), [(r"^(embeddings\.position_ids|visual_projection\..*)$", "")])


def _from_transformers_vit(state: State, own: State) -> dict[str, Tensor]:
    """ViT and ViViT, bare or under their task's model, as transformers 5 has them or as it stores them.

    A classifier is kept where the network has one under that key.
    """
    head = {key: value for key, value in state.items() if key.startswith("classifier.") and key in own}
    body = _only(_only(state, "vit."), "vivit.")
    return _renamed(body, _VIT_RULES) | head


_VIT_RULES: tuple[Rule, ...] = (
    (r"^(classifier|pooler)\..*$", ""),
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.attention\.(query|key|value)\.", lambda found: f".attention.{found[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)


def _from_openai_clip(state: State, own: State) -> dict[str, Tensor]:
    """OpenAI's CLIP, whole or its visual part: the fused in_proj is query, key and value one after the other."""
    found = _renamed(_only(state, "visual."), _CLIP_RULES)
    for key in [key for key in found if ".self_attn.in_proj_" in key]:
        block, kind = key.split("in_proj_")
        for name, part in zip("qkv", found.pop(key).chunk(3), strict=True):
            found[f"{block}{name}_proj.{kind}"] = part
    return found


_CLIP_RULES: tuple[Rule, ...] = (
    (r"^proj$", ""),
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^ln_pre\.", "pre_layrnorm."),
    (r"^ln_post\.", "post_layernorm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def _from_video_swin(state: State, own: State) -> dict[str, Tensor]:
    """Video Swin of its authors and of mmaction2 (which calls the last norm `norm3`, by its stage).

    Merging concatenates the four neighbours in the order of torchvision (rows first), and the bias table is indexed
    by the same rule, so no weight is permuted. Index buffers are the network's own where the file has none.
    """
    head = {key.replace("cls_head.fc_cls", "head"): state[key] for key in state if "cls_head.fc_cls" in key}
    body = {key: value for key, value in _only(state, "backbone.").items() if not key.startswith("cls_head.")}
    found = _renamed(body, _SWIN_RULES) | head
    for key, value in own.items():
        if key.endswith(".relative_position_index"):
            found.setdefault(key, value)
    return found


_SWIN_RULES: tuple[Rule, ...] = (
    (r"^norm\d+\.", "norm."),
    (r"^layers\.(\d+)\.blocks\.", lambda found: f"features.{2 * int(found[1])}."),
    (r"^layers\.(\d+)\.downsample\.", lambda found: f"features.{2 * int(found[1]) + 1}."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
)


def _unchanged(state: State, own: State) -> dict[str, Tensor]:
    return dict(state)


OWN = "a state dict with the library's own keys (.pyth, .pth, .safetensors)"
FORMATS = (
    Format(
        "a transformers directory or file of CLIPModel or CLIPVisionModel",
        r"^pre_layrnorm\.",
        r"^vision_model\.|^embeddings\.position_ids$",
        _from_transformers_clip,
    ),
    Format("OpenAI's CLIP state dict", r"^pre_layrnorm\.", r"^(visual\.)?ln_pre\.", _from_openai_clip),
    Format(
        "a transformers directory or file of ViT or ViViT",
        r"^layers\.0\.attention\.q_proj\.",
        r"^(vit|vivit|classifier|pooler)\.|^encoder\.layer\.\d+\.attention\.attention\.",
        _from_transformers_vit,
    ),
    Format(
        "a Video Swin checkpoint of its authors or of mmaction2",
        r"^features\.0\.0\.attn\.relative_position_bias_table$",
        r"^(backbone\.)?layers\.\d+\.blocks\.\d+\.attn\.relative_position_bias_table$",
        _from_video_swin,
    ),
    # The network's own loader renames these keys.
    Format("the residual adapters' exported state dict", r"^stem\.conv\.", r"^pre_layers_conv\.", _unchanged),
)
