"""One domain of a model folded into its backbone's weights (spec residual_adapters 2.3).

Shape suffixes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace as changed
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mdltool.adapters import ADAPTERS
from mdltool.adapters.base import AdaptedSite, AnyAdapter, NotFoldable
from mdltool.adapters.domain_norm import BATCH_NORMS, affine_of
from mdltool.backbones.base import Backbone, some
from mdltool.errors import MdlError
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_spec import FusedSpec, ModelSpec
from mdltool.wrapping import Wrapper, detach, find, library_modules, replace


@torch.no_grad()
def check_foldable(model: MultiDomainModel, domain: str, where: object) -> None:
    """Raise MdlError that names the adapters of a domain that no weight can hold, each with the reason."""
    faults: dict[tuple[str, str], list[str]] = {}
    for name, site in model.sites.items():
        adapter = adapter_of(site, domain)
        try:
            adapter.folded(layer_of(site))
        except NotFoldable as reason:
            faults.setdefault((ADAPTERS.name_of(type(adapter)), str(reason)), []).append(name)
    if faults:
        listing = "; ".join(f"{kind} at {some(at, 3)}: {reason}" for (kind, reason), at in faults.items())
        raise MdlError(f"these adapters cannot be folded: {listing}", where, "use the model as it is")


@torch.no_grad()
def is_sum(model: MultiDomainModel, domain: str) -> bool:
    """Whether each adapter of a domain adds to a weight, so that `subtract` can take it out again."""
    try:
        for site in model.sites.values():
            adapter_of(site, domain).added(layer_of(site))
    except NotFoldable:
        return False
    return True


@torch.no_grad()
def fused(model: MultiDomainModel, domain: str, fold_bn: bool = False) -> MultiDomainModel:
    """The model of one domain whose adapters are in its backbone's weights, in eval mode.

    `model` is used up: its backbone becomes the new one's. The adapters have to pass `check_foldable`. A bias
    that they add goes into the running mean of the BatchNorm that follows, or else to the layer. fold_bn:
    BatchNorms that follow a convolution go into it. The algebra is done in float64.
    """
    dtype = next(model.parameters()).dtype
    backbone = model.double().backbone
    for norm in model.norms.values():
        norm.become(domain)
    gained = [site.site.path for site in model.sites.values() if _fold(site, domain)]
    detach(backbone.net)
    followers = norms_after(backbone)
    for path in [path for path in gained if path in followers and not fold_bn]:
        _absorb(find(backbone.net, path), find(backbone.net, followers[path]))
        gained.remove(path)
    folded = followers if fold_bn else {}
    for path, norm_path in folded.items():
        gained += [path] if _fold_norm(find(backbone.net, path), find(backbone.net, norm_path)) else []
        replace(backbone.net, norm_path, nn.Identity())
    made = build_model(fused_spec(model.spec, FusedSpec(domain, gained, list(folded.values()))), backbone).double()
    made.heads[domain].load_state_dict(model.heads[domain].state_dict())
    return made.to(dtype).eval()


def fused_spec(spec: ModelSpec, how: FusedSpec) -> ModelSpec:
    """A model's spec after fusing."""
    return changed(spec.of([how.domain]), adapters=[], factors={}, bn="frozen", fused=how)


@torch.no_grad()
def subtract(model: MultiDomainModel, domain: str) -> None:
    """Take a domain's adapters out of the weights that hold them, in place; they have to pass `is_sum`."""
    for site in reversed(model.sites.values()):
        layer = layer_of(site)
        layer.weight -= adapter_of(site, domain).added(layer)


def adapter_of(site: AdaptedSite, domain: str) -> AnyAdapter:
    adapter = site.adapters[domain]
    assert isinstance(adapter, AnyAdapter)
    return adapter


def layer_of(site: AdaptedSite) -> Any:
    """The library's layer at a site."""
    layer: nn.Module = site
    while isinstance(layer, Wrapper):
        layer = layer.inner
    return layer


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hex) of tensors by name: their types, shapes and bytes."""
    found = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        found.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _fold(site: AdaptedSite, domain: str) -> bool:
    """Fold a site's adapter into the layer; says whether the layer gained a bias."""
    layer = layer_of(site)
    assert site.shared is None, "what domains share follows adapters that cannot be folded"
    weight, bias = adapter_of(site, domain).folded(layer)
    gains = layer.bias is None and bias is not None
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)
    return gains


def _absorb(layer: Any, norm: Any) -> None:
    """BN(y + b) is the BatchNorm of y whose running mean is smaller by b."""
    norm.running_mean -= layer.bias
    layer.bias = None


def _fold_norm(layer: Any, norm: Any) -> bool:
    """Fold a BatchNorm into the convolution before it; says whether this gained a bias."""
    scale_C, shift_C = affine_of(norm)
    gains = layer.bias is None
    bias = shift_C if gains else layer.bias * scale_C + shift_C
    layer.weight = nn.Parameter(layer.weight * scale_C.view(-1, *[1] * (layer.weight.ndim - 1)))
    layer.bias = nn.Parameter(bias)
    return gains


def norms_after(backbone: Backbone) -> dict[str, str]:
    """Convolution -> the BatchNorm that reads its output, where nothing else reads it and each runs once.

    backbone: without adapters. Paths are the library's. They come from one dry forward on the meta device.
    """
    dry = copy.deepcopy(backbone).to("meta").float().eval()
    modules = dict(library_modules(dry.net))
    layers = {path: module for path, module in modules.items() if isinstance(module, nn.Conv2d | nn.Conv3d)}
    norms = {path: module for path, module in modules.items() if isinstance(module, BATCH_NORMS)}
    if not norms:
        return {}
    parameters: Iterable[tuple[str, Any]] = [(p, m.weight) for p, m in layers.items()]
    parameters = [*parameters, *((p, m.running_mean) for p, m in norms.items())]
    seen = _Reads({id(tensor): path for path, tensor in parameters})
    clip = torch.empty(1, 3, dry.num_frames, dry.crop, dry.crop, device="meta")
    with torch.no_grad(), seen:
        dry(clip)
    return dict(seen.pairs(layers, norms))


class _Reads(TorchDispatchMode):
    """Watches operators: what each layer read and gave, and how often every tensor is read."""

    def __init__(self, layers: Mapping[int, str]) -> None:
        super().__init__()
        self._layers = layers  # id of a layer's weight or running mean -> its path
        self._runs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._reads: Counter[int] = Counter()
        self._kept: list[Tensor] = []  # so that no other tensor gets an id that was counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._kept += given + made
        self._reads.update(id(tensor) for tensor in given)
        for path in {self._layers[id(tensor)] for tensor in given if id(tensor) in self._layers}:
            self._runs.setdefault(path, []).append((given[0], made[0]))
        return result

    def pairs(self, layers: Iterable[str], norms: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Layer and norm, where each runs once and nothing but the norm reads what the layer gives."""
        once = {path: runs[0] for path, runs in self._runs.items() if len(runs) == 1}
        readers = {id(once[path][0]): path for path in norms if path in once}
        for path in layers:
            made = id(once[path][1]) if path in once else None
            if made in readers and self._reads[made] == 1:
                yield path, readers[made]
