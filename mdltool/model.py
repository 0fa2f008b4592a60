"""Backbone + adapters + heads: the one place where a multi-domain model is assembled.

Shape suffixes: B batch, C channels, T frames, H height, W width, P pooled positions, F features, N outputs.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdltool.adapters.base import AdaptedSite, attach
from mdltool.adapters.domain_norm import BATCH_NORMS as BATCH_NORM_LAYERS
from mdltool.adapters.domain_norm import DomainBatchNorm, attach_domain_norms
from mdltool.adapters.streams import StreamEmbedders, Streams, reordered
from mdltool.backbones.base import Backbone
from mdltool.convolution import pad_short_inputs
from mdltool.counting import parameter_counts
from mdltool.domain_pack import DomainPack, content_digest, model_form, with_tensors
from mdltool.errors import MdlError
from mdltool.heads import MlpHead
from mdltool.model_spec import REGIMES, ModelSpec, build_backbone, check_streams, method_of, sites_of
from mdltool.recompute import recompute
from mdltool.registry import did_you_mean
from mdltool.wrapping import PerDomain, library_modules, library_tensors

_DOMAIN_NORMS = ("per_domain_stats", "per_domain", "recalibrate")


class MultiDomainModel(nn.Module):
    """y_d = head_d(M(x)) with domain d's adapters, and the shared norms after them, at the sites (eq. 2)."""

    def __init__(self, backbone: Backbone, spec: ModelSpec) -> None:
        super().__init__()
        for domain in spec.domains:
            _check_name(domain)
        self.spec = spec
        self.route = backbone.route
        self.backbone = backbone
        self.norms: dict[str, DomainBatchNorm] = {}
        self.sites: dict[str, AdaptedSite] = {}
        self._eval_modules: list[nn.Module] = []
        self._digests: tuple[Any, dict[str, str]] | None = None
        self._empty: dict[str, dict[str, nn.Module]] = {}
        self.types: dict[str, str] = {}
        check_streams(spec.streams, spec.sharing)
        parts = [(entry, *method_of(entry)) for entry in spec.adapters]
        sites = sites_of(backbone, parts)
        if spec.bn in _DOMAIN_NORMS:
            affine = spec.bn == "per_domain"
            self.norms = attach_domain_norms(backbone.net, spec.domains, affine, self.route)
        backbone.open_blocks(site.block for chosen in sites for site in chosen if site.block is not None)
        for (entry, method, options), chosen in zip(parts, sites, strict=True):
            attached = attach(backbone.net, chosen, spec.domains, method, options, self.route, spec.streams)
            for name, wrapper in attached.items():
                # State is stored by site; a second adapter at a site adds its type.
                name = name if name not in self.sites else f"{name}+{entry.type}"
                self.sites[name], self.types[name] = wrapper, entry.type
                wrapper.factor(spec.factors.get(name, {}))
        dropout = max((getattr(options, "stream_dropout", 0.0) for _, _, options in parts), default=0.0)
        self.embedders = StreamEmbedders(spec.domains, spec.streams, spec.sharing, dropout)
        self.mute(spec.mute)
        pad_short_inputs(self)
        # A head of two layers has its dropout between them.
        self.dropout = nn.Dropout(spec.dropout if spec.head == "linear" else 0.0)
        self.heads = nn.ModuleDict({d: _head(spec, backbone.feature_dim, n) for d, n in spec.domains.items()})
        mean, std = torch.tensor(backbone.mean), torch.tensor(backbone.std)
        self.register_buffer("mean", mean.view(1, 3, 1, 1, 1), persistent=False)
        self.register_buffer("std", std.view(1, 3, 1, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def forward(
        self, frames_BCTHW: Tensor, domain: str | Sequence[str], streams: Streams | None = None
    ) -> Tensor | list[Tensor]:
        """Logits of clips: uint8 frames, or floats that are normalised already. streams: of the clips, by name.

        domain: that of all clips, and the logits are [B, N]; or each clip's, and they are a list of B tensors [N]
        in the clips' order, N by domain. Clips of several domains share one pass through the backbone; that is for
        inference: MdlError in training mode.
        """
        for name in [domain] if isinstance(domain, str) else dict.fromkeys(domain):
            if name not in self.heads:
                raise MdlError(f"the model has no domain '{name}'", "domain", did_you_mean(name, self.spec.domains))
        if isinstance(domain, str):
            return self.logits(self.features(frames_BCTHW, domain, streams), domain)
        return self._mixed(frames_BCTHW, domain, streams)

    def _mixed(self, frames_BCTHW: Tensor, domains: Sequence[str], streams: Streams | None) -> list[Tensor]:
        """Each clip's logits [N]. The batch is sorted by domain meanwhile, so that a domain's rows are adjacent."""
        if len(domains) != len(frames_BCTHW):
            what = f"{len(frames_BCTHW)} clips and {len(domains)} domains"
            raise MdlError(what, "domain", "give one domain for each clip, or one name for all")
        counts = Counter(domains)  # in the order of their first clips
        if self.training and len(counts) > 1:
            raise MdlError("a batch of several domains is for inference", "domain", "model.eval()")
        if not counts:
            return []
        if len(counts) == 1:
            self.route.serve(domains[0])
        else:
            self.route.serve(None, tuple(counts.items()))
        order = [i for domain in counts for i, name in enumerate(domains) if name == domain]
        if order != sorted(order):
            frames_BCTHW, streams = frames_BCTHW[order], reordered(streams, order)
        features_BPF = self._run(frames_BCTHW, counts.items(), streams)
        parts = zip(counts, features_BPF.split(list(counts.values())), strict=True)
        logits = [row for domain, part_BPF in parts for row in self.logits(part_BPF, domain)]
        return [row for _, row in sorted(zip(order, logits, strict=True), key=lambda entry: entry[0])]

    def features(self, frames_BCTHW: Tensor, domain: str | None, streams: Streams | None = None) -> Tensor:
        """[B, P, F] of clips; domain None: of several domains, for a model that all of it is shared by."""
        self.route.serve(domain)
        return self._run(frames_BCTHW, [(domain, len(frames_BCTHW))], streams)

    def _run(
        self, frames_BCTHW: Tensor, counts: Iterable[tuple[str | None, int]], streams: Streams | None
    ) -> Tensor:
        """[B, P, F] of clips of what the route says. counts: (domain, its clips, which are adjacent)."""
        self.route.streams = self.embedders.routed(streams, counts, self.mean.dtype)
        if frames_BCTHW.dtype == torch.uint8:
            mean, std = self._pixel_statistics(list(counts))
            frames_BCTHW = (frames_BCTHW.to(mean.dtype) / 255 - mean) / std
        features_BPF: Tensor = self.backbone(frames_BCTHW)
        self.route.streams = {}  # which hold on to a training step's graph
        return features_BPF

    def _pixel_statistics(self, counts: Sequence[tuple[str | None, int]]) -> tuple[Tensor, Tensor]:
        """Mean and deviation that the clips' pixels are normalised by, [1, 3, 1, 1, 1] or [B, 3, 1, 1, 1]."""
        own = self.spec.normalize
        if not any(domain in own for domain, _ in counts):
            return self.mean, self.std
        usual = {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
        chosen = [own.get(domain or "", usual) for domain, clips in counts for _ in range(clips)]
        chosen = chosen[:1] if len(counts) == 1 else chosen
        mean, std = (self.mean.new_tensor([row[name] for row in chosen]).view(-1, 3, 1, 1, 1) for name in usual)
        return mean, std

    def logits(self, features_BPF: Tensor, domain: str) -> Tensor:
        """[B, N] of one domain's head. Several positions are left only under a fixed pool: logits are averaged."""
        logits_BPN: Tensor = self.heads[domain](self.dropout(features_BPF))
        return logits_BPN.mean(dim=1)

    def train(self, mode: bool = True) -> MultiDomainModel:
        """As nn.Module.train, but what the regime froze stays in eval mode."""
        super().train(mode)
        for module in self._eval_modules:
            module.training = False
        return self

    def channels_last(self) -> MultiDomainModel:
        """Convolution weights in the memory format that their kernels like best; the numbers stay."""
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        for parameter in self.parameters():
            if parameter.ndim in formats:
                parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])
        return self

    def checkpoint_activations(self) -> None:
        """Keep the inputs alone of the backbone's stages or blocks, and run them again in the backward pass."""
        recompute(self.backbone.net, self.backbone.block_paths(), self.route)

    def mute(self, types: Iterable[str]) -> None:
        """Leave the adapters of these types out of the output, and no others; a bottleneck that another adapter
        reads is still computed (spec cm3t 2.8, full_caa).
        """
        for name, wrapper in self.sites.items():
            wrapper.muted = self.types[name] in types

    def constrain(self) -> None:
        """Put parameters back into their range, after an update of the training."""
        for wrapper in self.sites.values():
            wrapper.constrain()

    def apply_regime(
        self,
        regime: str,
        bn: str | None = None,
        only: tuple[str, ...] | None = None,
        shared_factors: bool = False,
        adapters: Sequence[str] | None = None,
    ) -> None:
        """Set requires_grad and the BatchNorm mode of every part (spec omi_mdl 2.7).

        regime: of REGIMES. bn: the recipe's choice; None takes the regime's default, `shared` where the backbone
        trains and `frozen` elsewhere. `shared` with a frozen backbone is the naive freeze, whose statistics keep
        moving. only: of what the regime trains, the tensors of these names, and those below names that end in /;
        all others stay as they are. shared_factors: of a compressed model, train the factors that domains share
        with the adapters (spec residual_adapters 2.6: they are frozen). adapters: types; these train in every
        regime and no others do, while None leaves it to the regime. Streams that nothing trains for and nothing
        uses yet are passed over.
        """
        if regime not in REGIMES:
            raise MdlError(f"there is no regime '{regime}'", "train.steps.regime", did_you_mean(regime, REGIMES))
        trains = REGIMES[regime]
        bn = bn or ("shared" if trains.backbone else "frozen")
        for parameter in self.backbone.parameters():
            parameter.requires_grad_(trains.backbone)
        trained = {n: trains.adapters if adapters is None else kind in adapters for n, kind in self.types.items()}
        for name, wrapper in self.sites.items():
            wrapper.set_trainable(trained[name], shared_factors)
        reads = any(trained[name] for name, wrapper in self.sites.items() if wrapper.reads_streams)
        self.embedders.requires_grad_(reads)
        self.embedders.idle = not reads and all(w.is_zero for w in self.sites.values() if w.reads_streams)
        for norm in self.norms.values():
            norm.statistics.requires_grad_(trains.backbone or trains.adapters)
            norm.use_shared = bn == "recalibrate"
            if self.spec.bn == "per_domain":
                norm.inner.requires_grad_(False)  # each domain has its own; the library's copy idles
        self.heads.requires_grad_(trains.heads)
        if only is not None:
            self._train_no_others(only)
        self._eval_modules = self.backbone_norms() if bn == "frozen" else []
        self._eval_modules += self._frozen_modules(trains.backbone, trained, reads)

    def _train_no_others(self, names: tuple[str, ...]) -> None:
        """Freeze what has none of these names of `tensors`, and is not below one that ends in /."""
        below = tuple(name for name in names if name.endswith("/"))
        for key, tensor in self.tensors().items():
            if isinstance(tensor, nn.Parameter) and key not in names and not key.startswith(below):
                tensor.requires_grad_(False)

    def _frozen_modules(self, backbone: bool, sites: Mapping[str, bool], streams: bool) -> Iterator[nn.Module]:
        """Where dropout and stochastic depth rest, by which parts train; none of the backbone's BatchNorms."""
        if not backbone:  # the library's own modules: its wrappers train
            norms = {id(norm) for norm in self.backbone_norms()}
            yield from (m for _, m in library_modules(self.backbone.net) if id(m) not in norms)
        for name, wrapper in self.sites.items():
            if not sites[name]:
                yield from wrapper.adapters.modules()
        if not streams:
            yield from self.embedders.modules()

    def backbone_parameters(self) -> list[nn.Parameter]:
        """The parameters of the library's network itself."""
        return [tensor for _, tensor in library_tensors(self.backbone.net) if isinstance(tensor, nn.Parameter)]

    def backbone_norms(self) -> list[nn.Module]:
        """Every BatchNorm of the backbone itself, the wrappers of per-domain ones included."""
        own = [m for _, m in library_modules(self.backbone.net) if isinstance(m, BATCH_NORM_LAYERS)]
        return own + list(self.norms.values())

    def tensors(self, with_backbone: bool = True) -> dict[str, Tensor]:
        """The model's state under site names: backbone/<library key>, shared/<site>/<param>,
        <domain>/<site>/<param>, <domain>/head/<param>; the tensors themselves, not copies. Of a factored parameter:
        shared/<site>/factors.<param> and <domain>/<site>/<param>.private.
        """
        named: dict[str, Tensor] = {}
        if with_backbone:
            named |= {f"backbone/{key}": value for key, value in library_tensors(self.backbone.net)}
        for site, wrapper in self._wrappers():
            for domain, module in wrapper.domain_modules.items():
                named |= {f"{domain}/{site}/{key}": value for key, value in _state(module)}
        named |= self.shared_tensors()
        for domain, head in self.heads.items():
            named |= {f"{domain}/head/{key}": value for key, value in _state(head)}
        return named

    def shared_tensors(self) -> dict[str, Tensor]:
        """What domains share beside the backbone, under the names of `tensors`."""
        named: dict[str, Tensor] = {}
        for site, wrapper in self.sites.items():
            for part in (wrapper.shared, wrapper.common):
                if part is not None:
                    named |= {f"shared/{site}/{key}": value for key, value in _state(part)}
            factors = wrapper.shared_factors()
            named |= {f"shared/{site}/factors.{parameter}": value for parameter, value in factors.items()}
        return named | self.embedders.shared_tensors()

    def digests(self) -> dict[str, str]:
        """What the backbone's tensors and the shared ones hash to: {"backbone", "shared"}.

        The first call reads them all (0.4 s of one core for 350 MB); later ones do where a tensor was changed.
        """
        parts = {"backbone": dict(library_tensors(self.backbone.net)), "shared": self.shared_tensors()}
        tensors = [tensor for part in parts.values() for tensor in part.values()]
        state = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
        if self._digests is None or self._digests[0] != state:
            self._digests = state, {name: content_digest(part) for name, part in parts.items()}
        return self._digests[1]

    def mount(self, domain: str, pack: DomainPack) -> None:
        """Add a domain that was taken out of a model with the same backbone and shared parts, under a name.

        The pack's tensors become the domain's, without a copy; nothing else changes. It is for inference: before
        further training `apply_regime` has to be called again. Raises MdlError, and adds nothing, where it does
        not fit.
        """
        _check_name(domain)
        if domain in self.spec.domains:
            raise MdlError(f"the model has a domain '{domain}' already", pack.where, "give it another name")
        pack.check(model_form(self.spec), **self.digests())
        if domain != pack.domain and {domain, pack.domain} & set(self.spec.sharing):
            what = f"'{pack.domain}' shares its cross-attention by its name, so that it cannot be '{domain}' here"
            raise MdlError(what, pack.where, "keep its name")
        normalize = {**self.spec.normalize, **({domain: pack.normalize} if pack.normalize else {})}
        streams = {**self.spec.streams, **({domain: dict(pack.streams)} if pack.streams else {})}
        check_streams(streams, self.spec.sharing)
        parts = with_tensors(self._shells(domain, pack), pack, self.mean.device)
        self.heads[domain] = parts["head"].train(self.training)
        for name, wrapper in self._wrappers():
            wrapper.domain_modules[domain] = parts[name].train(self.training)
        self.embedders.specs[domain] = dict(pack.streams)
        domains = {**self.spec.domains, domain: pack.outputs}
        self.spec = dataclasses.replace(self.spec, domains=domains, normalize=normalize, streams=streams)

    def _shells(self, domain: str, pack: DomainPack) -> dict[str, nn.Module]:
        """What one more domain is made of, without storage, and so without initial values; kept for the next."""
        shape = json.dumps([domain in self.spec.sharing, list(map(dataclasses.asdict, pack.streams.values()))])
        shape += json.dumps(list(pack.streams))
        with torch.device("meta"):
            if shape not in self._empty:
                parts = {name: wrapper.fresh(domain, pack.streams) for name, wrapper in self._wrappers()}
                for module in parts.values():
                    pad_short_inputs(module)
                self._empty[shape] = parts
            return {**self._empty[shape], "head": _head(self.spec, self.backbone.feature_dim, pack.outputs)}

    def unmount(self, domain: str) -> None:
        """Forget a domain. Raises MdlError for one that the model has not."""
        if domain not in self.spec.domains:
            raise MdlError(
                f"the model has no domain '{domain}'", "unmount", did_you_mean(domain, self.spec.domains)
            )
        for modules in (self.heads, *(wrapper.domain_modules for _, wrapper in self._wrappers())):
            del modules[domain]
        self.spec = self.spec.of(name for name in self.spec.domains if name != domain)

    def load_tensors(self, state: Mapping[str, Tensor], where: object, with_backbone: bool = True) -> None:
        """Copy stored tensors in. Raises MdlError for missing, unknown and misshapen ones."""
        own = self.tensors(with_backbone)
        faults = [f"missing {key}" for key in own if key not in state]
        faults += [f"unknown {key}" for key in state if key not in own]
        faults += [f"shape of {key}" for key in own if key in state and own[key].shape != state[key].shape]
        if faults:
            raise MdlError(f"the weights do not fit the model ({'; '.join(faults[:4])})", where, "train it again")
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(state[key])
        self.embedders.idle = False

    def _wrappers(self) -> Iterator[tuple[str, PerDomain]]:
        yield from self.sites.items()
        yield from self.norms.items()
        yield "streams", self.embedders

    def parameter_counts(self) -> dict[str, Any]:
        """See counting.parameter_counts."""
        return parameter_counts(self)


def _check_name(domain: str) -> None:
    taken = hasattr(nn.ModuleDict, domain) or domain in ("training", "backbone", "shared", "head")
    if taken or not re.fullmatch(r"[\w-]+", domain):
        fix = f"call it {domain}_1" if taken else "use letters, digits, _ and -"
        raise MdlError(f"a domain cannot be called '{domain}'", "domains", fix)


def _head(spec: ModelSpec, features: int, outputs: int) -> nn.Module:
    if spec.head == "mlp":
        head: nn.Module = MlpHead(features, outputs, spec.head_hidden, spec.dropout, spec.logit_dropout)
    else:
        head = nn.Linear(features, outputs)
    if spec.head_init == "normal":
        for layer in head.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=spec.head_std)
                nn.init.zeros_(layer.bias)
    return head


def build_model(spec: ModelSpec, backbone: Backbone | None = None) -> MultiDomainModel:
    """Assemble a model; adapters and heads are freshly initialised from torch's generator."""
    return MultiDomainModel(backbone or build_backbone(spec), spec)


def reuse_classifier(model: MultiDomainModel, classes: Mapping[str, list[str]], pretrained: list[str]) -> list[str]:
    """Copy the backbone's own classifier into the head of each domain that has its classes. Returns their names."""
    tensors = {key.rsplit(".", 1)[1]: value for key, value in model.backbone.classifier.items()}
    reused = []
    for domain, names in classes.items():
        head = model.heads[domain]
        if not isinstance(head, nn.Linear):
            continue
        if list(names) == list(pretrained) and tensors.get("weight", torch.empty(0)).shape == head.weight.shape:
            head.load_state_dict(tensors)
            reused.append(domain)
    return reused


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
