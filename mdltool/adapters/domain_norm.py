"""BatchNorms of the backbone with statistics, or weights too, of their own for each domain (spec omi_mdl 6.4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mdltool.sync_norm import Synchronisable, batch_norm
from mdltool.types import StreamSpec
from mdltool.wrapping import DomainWrapper, Route, library_modules, replace

BatchNorm = nn.BatchNorm2d | nn.BatchNorm3d
BATCH_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)


def affine_of(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """What a BatchNorm in eval mode multiplies with and adds, [C] each."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    if not norm.affine:
        return scale, -norm.running_mean * scale
    return norm.weight * scale, norm.bias - norm.running_mean * norm.weight * scale


class DomainStatistics(nn.Module):
    """One domain's running statistics, and with `affine` its weight and bias, copied from the shared layer."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, source: BatchNorm, affine: bool) -> None:
        super().__init__()
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(source, name).clone())
        self.weight = nn.Parameter(source.weight.detach().clone()) if affine else None
        self.bias = nn.Parameter(source.bias.detach().clone()) if affine else None

    def reset(self) -> None:
        """Forget the statistics; what comes next is averaged with equal weights (see DomainBatchNorm)."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()


class DomainBatchNorm(Synchronisable, DomainWrapper):
    """A backbone's BatchNorm that normalises each domain with that domain's statistics.

    affine: weight and bias are per domain too (`per_domain`); else shared (`per_domain_stats`). use_shared: be as
    the library's layer, statistics included, while a `recalibrate` run trains. recalibrating: average batches with
    equal weights instead of a decaying one.
    """

    inner: BatchNorm

    def __init__(self, inner: BatchNorm, domains: Iterable[str], affine: bool, route: Route) -> None:
        super().__init__(inner, route)
        self.affine = affine
        self.use_shared = False
        self.recalibrating = False
        self.statistics = nn.ModuleDict({domain: DomainStatistics(inner, affine) for domain in domains})

    def forward(self, x: Tensor) -> Tensor:
        if self.use_shared:
            return self.inner(x)
        if self.route.segments:
            return torch.cat([self._normalised(rows, domain) for domain, rows in self.route.rows(x)])
        assert self.route.domain is not None
        return self._normalised(x, self.route.domain)

    def _normalised(self, x: Tensor, domain: str) -> Tensor:
        own = self.statistics[domain]
        assert isinstance(own, DomainStatistics)
        momentum = self.inner.momentum if self.inner.momentum is not None else 0.1
        if self.training:
            own.num_batches_tracked += 1
            if self.recalibrating:
                momentum = 1 / float(own.num_batches_tracked)
        weight = self.inner.weight if own.weight is None else own.weight
        bias = self.inner.bias if own.bias is None else own.bias
        mean, var, eps = own.running_mean, own.running_var, self.inner.eps
        if self.training and self.reduce is not None:
            return batch_norm(x, mean, var, weight, bias, momentum, eps, self.reduce)
        return torch.nn.functional.batch_norm(x, mean, var, weight, bias, self.training, momentum, eps)

    def reset_statistics(self) -> None:
        """Forget every domain's statistics."""
        for statistics in self.statistics.values():
            assert isinstance(statistics, DomainStatistics)
            statistics.reset()

    @property
    def domain_modules(self) -> nn.ModuleDict:
        return self.statistics

    def fresh(self, domain: str, streams: Mapping[str, StreamSpec]) -> nn.Module:
        return DomainStatistics(self.inner, self.affine)

    @torch.no_grad()
    def become(self, domain: str) -> None:
        """Give the backbone's own layer one domain's statistics and, where they are per domain, its weights."""
        for name, tensor in [*self.statistics[domain].named_parameters(), *self.statistics[domain].named_buffers()]:
            getattr(self.inner, name).copy_(tensor)


def attach_domain_norms(
    net: nn.Module, domains: Iterable[str], affine: bool, route: Route
) -> dict[str, DomainBatchNorm]:
    """Wrap every BatchNorm of the network itself. Returns library path -> wrapper.

    Called before adapters attach, so that the paths are the library's and the adapters' own norms stay as they are.
    """
    domains = tuple(domains)
    wrapped = {}
    norms = [(path, module) for path, module in library_modules(net) if isinstance(module, BATCH_NORMS)]
    for path, norm in norms:
        wrapped[path] = DomainBatchNorm(norm, domains, affine, route)
        replace(net, path, wrapped[path])
    return wrapped
