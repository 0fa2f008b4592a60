"""MST-Adapter, the class-token shift and ST-Adapter (spec mst_adapter 2, 7)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mdltool.adapters.base import TokenAdapter
from mdltool.model import MultiDomainModel
from mdltool.wrapping import TokenGrid, detach
from tests.adapters.test_token_adapters import (
    LAYOUTS,
    Entry,
    adapter,
    assert_same,
    identity,
    model,
    patch,
    patches,
    tokens,
)
from tests.models import clips, tiny_model

POSITIONS = {
    "post": ("mid", "exit"),
    "prior_norm": ("entry", "mid"),
    "prior_norm_branch": ("norm1_in", "norm2_in"),
    "prior_sub": ("attn_in", "mlp_in"),
    "post_sub": ("attn_out", "mlp_out"),
}
# Taps of the branches as (time, rows, columns) around a token: per branch kernel sizes and dilation.
TAPS: dict[str, list[tuple[int, int, int, int]]] = {
    "t357": [(3, 1, 1, 1), (5, 1, 1, 1), (7, 1, 1, 1)],
    "t135": [(1, 1, 1, 1), (3, 1, 1, 1), (5, 1, 1, 1)],
    "mixed17": [(1, 3, 3, 1), (3, 1, 1, 1), (5, 1, 1, 1)],
    "mixed31": [(1, 1, 1, 1), (3, 1, 1, 1), (3, 3, 3, 1)],
    "mixed39": [(1, 3, 3, 1), (3, 1, 1, 1), (3, 3, 3, 1)],
    "cube135": [(1, 1, 1, 1), (3, 3, 3, 1), (5, 5, 5, 1)],
    "cube357": [(3, 3, 3, 1), (5, 5, 5, 1), (7, 7, 7, 1)],
    "dil3": [(3, 1, 1, 1), (3, 1, 1, 2), (3, 1, 1, 3)],
}


def offsets(time: int, rows: int, columns: int, step: int) -> list[tuple[tuple[int, int, int], tuple[int, ...]]]:
    """Each tap of a kernel and where it looks."""
    found = []
    for tap in itertools.product(range(time), range(rows), range(columns)):
        found.append(
            (tap, tuple(step * (n - size // 2) for n, size in zip(tap, (time, rows, columns), strict=True)))
        )
    return found


def moved(x_BTHWR: Tensor, offset: tuple[int, ...]) -> Tensor:
    """What lies at an offset from each token, zeros outside."""
    for axis, by in enumerate(offset, 1):
        size = x_BTHWR.shape[axis]
        index = torch.arange(size) + by
        inside = ((index >= 0) & (index < size)).view([-1 if n == axis else 1 for n in range(5)])
        x_BTHWR = x_BTHWR.index_select(axis, index.clamp(0, size - 1)) * inside
    return x_BTHWR


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def branch_sum(made: Any, x_BTHWR: Tensor, kernels: str, weights: Any) -> Tensor:
    """sum_i a_i DW_i(X) as per-channel correlations, tap by tap."""
    total = torch.zeros_like(x_BTHWR)
    for a, branch, sizes in zip(weights, made.branches, TAPS[kernels], strict=True):
        correlated = branch.bias.expand_as(x_BTHWR).clone()
        for tap, offset in offsets(*sizes):
            correlated += branch.weight[:, 0, *tap] * moved(x_BTHWR, offset)
        total += a * correlated
    return total


def written_out(made: Any, x: Tensor, grid: TokenGrid, **options: Any) -> Tensor:
    """Spec mst_adapter 2.2, equation by equation."""
    fusion, act, pointwise = (options.get(key) for key in ("fusion", "act", "pointwise"))
    weights = [1 / 3] * 3 if fusion == "average" else made.weights.tolist()
    if fusion == "softmax":
        weights = (made.weights.exp() / made.weights.exp().sum()).tolist()

    def out(z: Tensor) -> Tensor:
        if pointwise == "depthwise":
            z = z + z * made.pointwise.weight + made.pointwise.bias
        elif pointwise != "none":
            z = z + torch.einsum("...i,oi->...o", z, made.pointwise.weight) + made.pointwise.bias
        return (gelu(z) if act == "gelu_up" else z) @ made.up.weight.T + made.up.bias

    low = x @ made.down.weight.T + made.down.bias
    low = gelu(low) if act == "gelu_down" else low
    batch = len(x) // grid.frames if grid.layout == "frame" else len(x)
    shape = (batch, grid.frames, grid.height, grid.width, low.shape[-1])
    inner = torch.stack([low[patch(grid, *place)] for place in patches(grid, batch)]).view(shape)
    added = out(inner + branch_sum(made, inner, options.get("kernels", "t357"), weights))
    y = x.clone()
    for place in patches(grid, batch):
        y[patch(grid, *place)] += added[place]
    if grid.layout != "grid" and options.get("cls", "linear") == "linear":
        y[:, 0] += out(low[:, 0])
    elif grid.layout != "grid" and options["cls"] == "grid1":
        slices = low[:, 0].reshape(batch, -1, 1, 1, low.shape[-1])
        own = slices + branch_sum(made, slices, options.get("kernels", "t357"), weights)
        y[:, 0] += out(own).reshape(len(x), -1)
    return y


CASES = [
    *({"kernels": name} for name in TAPS),
    {"fusion": "average"},
    {"fusion": "softmax", "cls": "bypass"},
    {"act": "gelu_down"},
    {"act": "gelu_up", "cls": "grid1"},
    {"pointwise": "none", "cls": "grid1", "kernels": "cube135"},
    {"pointwise": "depthwise", "fusion": "average", "kernels": "mixed17"},
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_adapter_written_out(layout: str, options: dict[str, Any]) -> None:
    """Property 7; frame counts below the kernels' sizes, odd ones and one frame are nothing special."""
    made = adapter("mst", layout=layout, r=4, **options)
    for frames, height, width in ((4, 3, 2), (1, 2, 2), (5, 1, 3)):
        grid = TokenGrid(frames, height, width, layout)
        x = tokens(grid)
        assert_same(made(identity, x, grid), written_out(made, x, grid, **options))


def test_without_branches_and_pointwise_it_is_a_linear_adapter() -> None:
    made, grid = adapter("mst", r=4), TokenGrid(3, 2, 2, "frame")
    made.weights.zero_()
    nn.init.zeros_(made.pointwise.weight)
    nn.init.zeros_(made.pointwise.bias)
    x = tokens(grid)
    assert_same(made(torch.sin, x, grid), x.sin() + made.up(made.down(x.sin())))


def test_one_frame_leaves_the_kernels_centres() -> None:
    made, grid = adapter("mst", r=4, pointwise="none"), TokenGrid(1, 2, 2, "grid")
    x = tokens(grid)
    low = made.down(x)
    pairs = list(zip(made.weights, made.branches, strict=True))
    gain = 1 + sum(a * b.weight[:, 0, size // 2, 0, 0] for (a, b), size in zip(pairs, (3, 5, 7), strict=True))
    assert_same(made(identity, x, grid), x + made.up(low * gain + sum(a * b.bias for a, b in pairs)))


def test_one_branch_alone_and_equal_branches() -> None:
    """Property 8."""
    grid = TokenGrid(4, 2, 2, "frame")
    x = tokens(grid)
    made = adapter("mst", r=4)
    made.weights.copy_(torch.tensor([1.0, 0.0, 0.0]))
    low = torch.stack([made.down(x)[patch(grid, *place)] for place in patches(grid)]).view(2, 4, 2, 2, 4)
    alone = low + made.branches[0](low.movedim(-1, 1)).movedim(1, -1)
    expected = x[:, 1:] + made.up(alone + made.pointwise(alone)).view(8, 4, 6)
    assert_same(made(identity, x, grid)[:, 1:], expected)
    other = adapter("mst", r=4)
    other.weights.copy_(made.weights)
    for branch in other.branches[1:]:
        nn.init.normal_(branch.weight)
    assert_same(other(identity, x, grid), made(identity, x, grid))
    average = adapter("mst", r=4, fusion="average")
    for fusion, equal in (("learned", 1 / 3), ("softmax", 0.7)):
        learned = adapter("mst", r=4, fusion=fusion)
        learned.load_state_dict(average.state_dict(), strict=False)
        learned.weights.fill_(equal)
        assert_same(learned(identity, x, grid), average(identity, x, grid))
        assert set(learned.state_dict()) - set(average.state_dict()) == {"weights"}


@pytest.mark.parametrize("kernels", TAPS)
def test_receptive_field(kernels: str) -> None:
    """Property 5: one changed patch token is felt where the kernels reach, and nowhere else."""
    made, grid = adapter("mst", layout="grid", r=8, kernels=kernels), TokenGrid(9, 9, 9, "grid")
    x = tokens(grid, batch=1)
    changed = x.clone()
    changed[0, 4, 4, 4] += 1
    felt = (made(identity, changed, grid) - made(identity, x, grid)).abs().amax(-1)[0] > 1e-12
    expected = torch.zeros(9, 9, 9, dtype=torch.bool)
    for sizes in TAPS[kernels]:
        for _, (t, i, j) in offsets(*sizes):
            expected[4 + t, 4 + i, 4 + j] = True
    assert torch.equal(felt, expected)


@pytest.mark.parametrize("layout", ["frame", "clip"])
@pytest.mark.parametrize("cls", ["linear", "bypass", "grid1"])
def test_class_and_patch_tokens_do_not_meet(layout: str, cls: str) -> None:
    """Property 6."""
    made, grid = adapter("mst", layout=layout, r=4, cls=cls), TokenGrid(9, 2, 2, layout)
    x = tokens(grid)
    before = made(identity, x, grid)
    others = x.clone()
    others[:, 1:] += 1
    assert_same(made(identity, others, grid)[:, 0], before[:, 0])
    row = 4 if layout == "frame" else 0
    changed = x.clone()
    changed[row, 0] += 1
    after = made(identity, changed, grid)
    assert_same(after[:, 1:], before[:, 1:])
    felt = [n for n in range(len(x)) if not torch.equal(after[n, 0], before[n, 0])]
    assert felt == (list(range(1, 8)) if (cls, layout) == ("grid1", "frame") else [row])
    if cls == "bypass":
        assert torch.equal(before[:, 0], x[:, 0])


@pytest.mark.parametrize("backbone", ["clip_vit_tiny", "vit_tiny", "vivit_tiny", "swin3d_tiny"])
@pytest.mark.parametrize("position", POSITIONS)
def test_every_position_starts_as_the_bare_backbone(backbone: str, position: str) -> None:
    """Property 1; where an adapter goes by its position."""
    fresh = tiny_model("mst", backbone=backbone, bn="frozen", options={"position": position, "r": 4})
    blocks = 4 if backbone == "swin3d_tiny" else 3
    assert set(fresh.sites) == {f"block{n}.{role}" for n in range(1, blocks + 1) for role in POSITIONS[position]}
    found = fresh(clips(), "a")
    detach(fresh.backbone.net)
    assert_same(found, fresh.heads["a"](fresh.backbone(clips())[:, 0]))


def test_the_shift_alone_changes_the_start_and_one_frame_has_none() -> None:
    entries: list[Entry] = [("mst", {"r": 4}), ("cls_shift", {})]
    made = model("clip_vit_tiny", *entries)
    for name, wrapper in made.sites.items():
        if "attn_in" not in name:
            nn.init.zeros_(wrapper.adapters["a"].up.weight)
            nn.init.zeros_(wrapper.adapters["a"].up.bias)
    several, one = made(clips(), "a"), made(clips(frames=1), "a")
    detach(made.backbone.net)
    assert not torch.allclose(several, made.heads["a"](made.backbone(clips())[:, 0]), atol=1e-4)
    assert_same(one, made.heads["a"](made.backbone(clips(frames=1))[:, 0]))


def test_positions_cost_the_same_and_differ() -> None:
    """Property 14."""
    models = [model("clip_vit_tiny", ("mst", {"position": position, "r": 4})) for position in POSITIONS]
    assert len({made.parameter_counts()["adapters"] for made in models}) == 1
    state = [wrapper.adapters["a"].state_dict() for wrapper in models[0].sites.values()]
    for made in models[1:]:
        for wrapper, own in zip(made.sites.values(), state, strict=True):
            wrapper.adapters["a"].load_state_dict(own)
    found = [made.backbone(clips()) for made in models]
    for first, second in itertools.combinations(found, 2):
        assert (first - second).abs().max() > 1e-4


@pytest.mark.parametrize("options", [{"kernels": "cube357", "cls": "grid1"}, {"position": "prior_sub"}], ids=str)
@pytest.mark.parametrize("border", ["zero", "circular"])
def test_clips_of_any_length_do_not_mix(options: dict[str, Any], border: str) -> None:
    """Property 13, with as many frames as each batch has."""
    made = model("clip_vit_tiny", ("mst", {"r": 4, **options}), ("cls_shift", {"border": border}))
    alone = {frames: made(clips(1, frames), "a") for frames in (3, 1, 5)}
    for frames in (5, 3, 1):
        batch = torch.cat([clips(2, frames, seed=7), clips(1, frames)])
        assert_same(made(batch, "a")[2:], alone[frames])
    with pytest.raises(RuntimeError):  # rows that are no whole clips
        TokenGrid(3, 2, 2, "frame").split(torch.zeros(7, 5, 6))


def shifted(x: Tensor, frames: int, fold: int, border: str = "zero") -> Tensor:
    """Spec mst_adapter 2.4, token by token."""
    y = x.clone()
    for row in range(len(x)):
        t = row % frames
        for first, near in ((0, t + 1), (fold, t - 1)):
            part = slice(first, first + fold)
            if border == "circular":
                near %= frames
            elif border == "replicate":
                near = min(max(near, 0), frames - 1)
            y[row, 0, part] = x[row - t + near, 0, part] if 0 <= near < frames else 0
    return y


@pytest.mark.parametrize("border", ["zero", "replicate", "circular"])
@pytest.mark.parametrize(("fold_div", "fold"), [(4, 2), (2, 5), (3, 3), (8, 1)])
def test_the_shift_token_by_token(border: str, fold_div: int, fold: int) -> None:
    """Property 4. Ten channels: a fraction that does not divide them is rounded down."""
    made = adapter("cls_shift", 10, fold_div=fold_div, border=border)
    for frames in (2, 5):
        x = tokens(TokenGrid(frames, 2, 2, "frame"), channels=10)
        assert torch.equal(made(identity, x, TokenGrid(frames, 2, 2, "frame")), shifted(x, frames, fold, border))
    one = tokens(TokenGrid(1, 2, 2, "frame"), channels=10)
    assert torch.equal(made(identity, one, TokenGrid(1, 2, 2, "frame")), one)


def test_what_the_shift_is() -> None:
    """Property 4: linear, its transpose swaps the groups, it moves with the clip, and costs nothing."""
    made, grid = adapter("cls_shift", 8), TokenGrid(6, 1, 1, "frame")
    x = tokens(grid, 1, 8)
    with FlopCounterMode(display=False) as counter:
        y = made(identity, x, grid)
    assert (counter.get_total_flops(), list(made.parameters())) == (0, [])
    assert torch.equal(y[:, 1:], x[:, 1:])
    later = made(identity, x.roll(1, 0), grid)
    assert torch.equal(later[2:-1], y[1:-2])

    def on_class_tokens(flat: Tensor) -> Tensor:
        return made(identity, flat.view(6, 1, 8), grid).flatten()

    matrix = torch.stack([on_class_tokens(row) for row in torch.eye(48, dtype=torch.float64)], 1)
    assert_same(matrix @ x[:, 0].flatten(), y[:, 0].flatten())
    swap = torch.tensor([2, 3, 0, 1, 4, 5, 6, 7]).repeat(6) + torch.arange(6).repeat_interleave(8) * 8
    assert torch.equal(matrix.T, matrix[swap][:, swap])
    constant = x[:1].expand(6, -1, -1)
    assert torch.equal(made(identity, constant, grid)[1:-1], constant[1:-1])
    assert not torch.equal(made(identity, constant, grid)[[0, -1]], constant[[0, -1]])
    for border in ("circular", "replicate"):
        assert torch.equal(adapter("cls_shift", 8, border=border)(identity, constant, grid), constant)


def test_where_the_shift_goes() -> None:
    for where, roles in (("branch", {"attn_in"}), ("stream", {"entry"}), ("stream_both", {"entry", "mid"})):
        sites = model("clip_vit_tiny", ("cls_shift", {"where": where})).sites
        assert set(sites) == {f"block{n}.{role}" for n in (1, 2, 3) for role in roles}


class Swapped(TokenAdapter):
    """A class-token shift with the roles of its two channel groups exchanged."""

    kinds = frozenset({"block"})

    def __init__(self, shift: Any, fold: int) -> None:
        nn.Module.__init__(self)
        self.shift, self.order = shift, [*range(fold, 2 * fold), *range(fold)]

    @classmethod
    def roles(cls, options: Any) -> frozenset[str]:
        return frozenset()

    def forward(self, inner: Any, x: Tensor, grid: TokenGrid) -> Tensor:
        order = torch.tensor([*self.order, *range(len(self.order), x.shape[-1])])
        return self.shift(lambda y: inner(x)[..., order], x, grid)[..., order]


def frame_outputs(made: MultiDomainModel, x: Tensor) -> Tensor:
    """Class tokens of every frame after the last block, [B, T, C]."""
    seen: list[Tensor] = []
    last = made.backbone.net.get_submodule("encoder.layers.2")
    hook = last.register_forward_hook(lambda module, args, y: seen.append(y[:, 0]))
    made(x, "a")
    hook.remove()
    return seen[0].unflatten(0, (len(x), -1))


@pytest.mark.parametrize("kernels", ["t357", "cube135", "dil3"])
def test_time_reversed(kernels: str) -> None:
    """Property 10: flipped kernels and swapped shift groups on the reversed clip give the reversed frames."""
    made = model("clip_vit_tiny", ("mst", {"r": 4, "kernels": kernels, "cls": "grid1"}), ("cls_shift", {}))
    x = clips(frames=5)
    expected = frame_outputs(made, x).flip(1)
    assert not torch.allclose(frame_outputs(made, x.flip(2)), expected, atol=1e-3)
    for wrapper in made.sites.values():
        own: Any = wrapper.adapters["a"]
        if wrapper.site.role == "attn_in":
            wrapper.adapters["a"] = Swapped(own, 16)
        else:
            for branch in own.branches:
                branch.weight.copy_(branch.weight.flip(2))
    assert_same(frame_outputs(made, x.flip(2)), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_st_adapter_tap_by_tap(layout: str, frames: int) -> None:
    """Spec mst_adapter 2.6: p + DW(p W_down + c_down) W_up + c_up; class tokens pass untouched."""
    made, grid = adapter("st", layout=layout, r=4), TokenGrid(frames, 2, 3, layout)
    x = tokens(grid)
    expected = x.clone()
    for b, t, i, j in patches(grid):
        hidden = made.conv.bias.clone()
        for tap, near in enumerate((t - 1, t, t + 1)):
            if 0 <= near < frames:
                token = x[patch(grid, b, near, i, j)]
                hidden += made.conv.weight[:, 0, tap, 0, 0] * (made.down.weight @ token + made.down.bias)
        expected[patch(grid, b, t, i, j)] += made.up.weight @ hidden + made.up.bias
    assert_same(made(identity, x, grid), expected)
    if layout != "grid":
        assert torch.equal(made(identity, x, grid)[:, 0], x[:, 0])


def test_where_the_st_adapter_goes() -> None:
    for per_block, roles in ((1, {"mid"}), (2, {"entry", "mid"})):
        sites = model("clip_vit_tiny", ("st", {"r": 4, "per_block": per_block})).sites
        assert set(sites) == {f"block{n}.{role}" for n in (1, 2, 3) for role in roles}
