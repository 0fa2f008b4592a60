"""RandAugment, erasing and resized crops: values against PIL and numpy, draws against their distributions."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from mdltool.data.augment import (
    EraseSpec,
    RandAugmentSpec,
    drawn_operations,
    erase,
    operations,
    rand_augment,
    random_window,
)
from mdltool.data.transforms import TrainTransform, resized, scaled
from mdltool.errors import MdlError
from mdltool.recipe import load
from mdltool.stages.plan import train_transform

RAND = RandAugmentSpec(probability=1.0)
ERASE = {mode: EraseSpec(1.0, mode) for mode in ("pixel", "mean", "constant")}
TRANSFORMS = {
    "short_side": TrainTransform((34, 48), 32, 0.5),
    "resized": TrainTransform(None, 32, 0.5, area=(0.08, 1.0)),
    "rand_augment": TrainTransform((34, 48), 32, 0.5, rand_augment=RAND),
    **{mode: TrainTransform((34, 48), 32, 0.5, erase=spec) for mode, spec in ERASE.items()},
    "all": TrainTransform(None, 32, 0.5, area=(0.08, 1.0), rand_augment=RAND, erase=ERASE["pixel"]),
}


def frames(count: int, height: int = 45, width: int = 61) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)
    return pixels.permute(0, 3, 1, 2)


def photo(height: int = 40, width: int = 56) -> torch.Tensor:
    """Smooth colours of every brightness, uint8 [3, H, W]."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [128 + 120 * np.sin(x / 9 + c) * np.cos(y / (7 + c)) for c in range(3)]
    return torch.from_numpy(np.stack(planes).round().astype(np.uint8))


def global_state() -> tuple[str, ...]:
    numpy_state: Any = np.random.get_state()
    parts = [torch.get_rng_state().numpy().tobytes(), numpy_state[1].tobytes(), repr(numpy_state[2:]).encode()]
    return (*(hashlib.sha256(part).hexdigest() for part in parts), str(hash(random.getstate())))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_clip_is_a_pure_function_of_the_generator(name: str) -> None:
    transform, given = TRANSFORMS[name], frames(3)
    kept, before = given.clone(), global_state()
    clips = [transform(given, np.random.default_rng(seed)) for seed in range(12)]
    torch.rand(3), np.random.rand(3)  # what others draw has no effect
    again = [transform(given, np.random.default_rng(seed)) for seed in range(12)]
    assert all(torch.equal(one, two) for one, two in zip(clips, again, strict=True))
    assert len({clip.numpy().tobytes() for clip in clips}) == 12
    assert torch.equal(given, kept)
    assert before != global_state()  # the comparison below can fail
    before = global_state()
    transform(given, np.random.default_rng(0))
    assert before == global_state()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_draw_holds_for_all_frames(name: str) -> None:
    still = frames(1).expand(5, -1, -1, -1)
    for seed in range(20):
        clip = TRANSFORMS[name](still, np.random.default_rng(seed))
        assert all(torch.equal(clip[:, 0], clip[:, t]) for t in range(5))
        one = TRANSFORMS[name](still[:1], np.random.default_rng(seed))
        assert torch.equal(one, clip[:, :1])  # whatever the number of frames


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(("height", "width"), [(45, 61), (61, 45), (33, 33), (7, 90)])
def test_shapes(name: str, height: int, width: int) -> None:
    out = torch.zeros((2, 3, 2, 32, 32), dtype=torch.uint8)
    for seed in range(5):
        clip = TRANSFORMS[name](frames(2, height, width), np.random.default_rng(seed), out[1])
        assert clip.dtype == torch.uint8
        assert clip.shape == (3, 2, 32, 32)
        assert torch.equal(clip, TRANSFORMS[name](frames(2, height, width), np.random.default_rng(seed)))
        assert torch.equal(out[1], clip)
        assert not out[0].any()


@pytest.mark.parametrize("crop", [1, 2, 3])
def test_crops_of_few_pixels(crop: int) -> None:
    transform = TrainTransform(None, crop, 0.5, area=(0.08, 1.0), rand_augment=RAND, erase=ERASE["constant"])
    for seed in range(60):
        assert transform(frames(1, 9, 5), np.random.default_rng(seed)).shape == (3, 1, crop, crop)


def test_the_short_side_crop_draws_a_side_a_corner_and_a_flip_and_nothing_else() -> None:
    given = frames(2)
    for seed in range(20):
        rng, reference = np.random.default_rng(seed), np.random.default_rng(seed)
        clip = TRANSFORMS["short_side"](given, rng)
        side = int(reference.integers(34, 49))
        height, width = scaled(45, 61, side)
        y, x = int(reference.integers(0, height - 31)), int(reference.integers(0, width - 31))
        window = resized(given, side)[..., y : y + 32, x : x + 32].transpose(0, 1)
        assert torch.equal(clip, window.flip(-1) if reference.random() < 0.5 else window)
        assert rng.random() == reference.random()


def test_a_transform_crops_in_one_way() -> None:
    for make in (lambda: TrainTransform(None, 32, 0.5), lambda: TrainTransform((32, 32), 32, 0.5, area=(0.1, 1.0))):
        with pytest.raises(MdlError, match="either short_side or area"):
            make()


def test_windows_have_the_area_and_aspect_asked_for() -> None:
    rng = np.random.default_rng(0)
    windows = np.array([random_window(400, 600, (0.08, 0.5), (3 / 4, 4 / 3), rng) for _ in range(4000)])
    top, left, rows, columns = windows.T
    assert top.min() >= 0
    assert left.min() >= 0
    assert (top + rows).max() <= 400
    assert (left + columns).max() <= 600
    area, log_aspect = rows * columns / 240_000, np.log(columns / rows)
    assert 0.079 < area.min() < 0.085
    assert 0.49 < area.max() < 0.501
    assert abs(log_aspect).max() < np.log(4 / 3) + 0.01
    # All of these fit but for the tallest, so that area and log aspect are nearly uniform.
    assert area.mean() == pytest.approx(0.29, abs=0.012)
    assert area.std() == pytest.approx(0.42 / np.sqrt(12), abs=0.01)
    assert log_aspect.std() == pytest.approx(2 * np.log(4 / 3) / np.sqrt(12), rel=0.05)
    assert np.corrcoef(top / (401 - rows), left / (601 - columns))[0, 1] == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize(
    ("height", "width", "window"),
    [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10)), (1, 100, (0, 49, 1, 1)), (1, 1, (0, 0, 1, 1))],
)
def test_what_no_window_fits_is_cropped_in_the_centre(
    height: int, width: int, window: tuple[int, int, int, int]
) -> None:
    assert random_window(height, width, (0.5, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0)) == window


def test_a_resized_crop_is_its_window_scaled() -> None:
    given = frames(1, 50, 70)
    transform = TrainTransform(None, 24, 0.0, area=(0.3, 0.9))
    for seed in range(10):
        top, left, rows, columns = random_window(50, 70, (0.3, 0.9), (3 / 4, 4 / 3), np.random.default_rng(seed))
        part = given[0, :, top : top + rows, left : left + columns].numpy().astype(float)
        wanted = bilinear(part, *np.meshgrid(centres(24, rows), centres(24, columns), indexing="ij"))
        clip = transform(given, np.random.default_rng(seed))[:, 0].numpy()
        assert np.abs(clip - wanted).max() <= 1.01  # uint8 arithmetic rounds twice


def centres(size: int, source: int) -> np.ndarray:
    return np.clip((np.arange(size) + 0.5) * source / size - 0.5, 0, source - 1)


def bilinear(image_CHW: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Values at [H, W] places; those outside the image are of its edge."""
    height, width = image_CHW.shape[1:]
    y, x = np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)
    y0, x0 = np.floor(y).astype(int), np.floor(x).astype(int)
    y1, x1 = np.minimum(y0 + 1, height - 1), np.minimum(x0 + 1, width - 1)
    wy, wx = y - y0, x - x0
    top = image_CHW[:, y0, x0] * (1 - wx) + image_CHW[:, y0, x1] * wx
    return top * (1 - wy) + (image_CHW[:, y1, x0] * (1 - wx) + image_CHW[:, y1, x1] * wx) * wy


# RandAugment


def test_operations_are_drawn_as_often_and_as_strongly_as_asked() -> None:
    rng = np.random.default_rng(0)
    draws = [drawn_operations(RandAugmentSpec(), rng) for _ in range(6000)]
    counts = np.bincount([len(drawn) for drawn in draws], minlength=5) / 6000
    assert counts == pytest.approx(np.array([1, 4, 6, 4, 1]) / 16, abs=0.02)
    names = Counter(name for drawn in draws for name, _ in drawn)
    assert set(names) == set(operations())
    assert len(names) == 15
    total = names.total()
    assert all(count / total == pytest.approx(1 / 15, abs=0.01) for count in names.values())
    strengths = np.array([strength for drawn in draws for _, strength in drawn])
    assert np.abs(strengths).mean() == pytest.approx(0.7, abs=0.003)
    assert np.abs(strengths).std() == pytest.approx(0.05, abs=0.002)
    assert (strengths < 0).mean() == pytest.approx(0.5, abs=0.02)


def test_strengths_stay_in_range_and_num_ops_and_probability_are_heeded() -> None:
    rng = np.random.default_rng(0)
    for magnitude in (0.0, 10.0):
        drawn = [s for _ in range(300) for _, s in drawn_operations(RandAugmentSpec(3, magnitude, 4.0, 1.0), rng)]
        assert len(drawn) == 900
        assert np.abs(drawn).max() <= 1
        assert np.mean(np.abs(drawn) == magnitude / 10) == pytest.approx(0.5, abs=0.07)  # what is clipped
    assert drawn_operations(RandAugmentSpec(probability=0.0), rng) == []


def test_the_drawn_operations_are_done_in_turn() -> None:
    for seed in range(30):
        clip = torch.stack([photo(), photo().flip(-1)], dim=1)
        wanted = [clip[:, t].clone() for t in range(2)]
        for name, strength in drawn_operations(RandAugmentSpec(), np.random.default_rng(seed)):
            wanted = [operations()[name](frame, strength) for frame in wanted]
        rand_augment(clip, RandAugmentSpec(), np.random.default_rng(seed))
        assert torch.equal(clip, torch.stack(wanted, dim=1))


PIL_OF: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "auto_contrast": lambda image, s: ImageOps.autocontrast(image),
    "equalize": lambda image, s: ImageOps.equalize(image),
    "invert": lambda image, s: ImageOps.invert(image),
    "posterize": lambda image, s: ImageOps.posterize(image, {0.25: 3, 0.7: 2, 1.0: 1}[abs(s)]),
    "solarize": lambda image, s: ImageOps.solarize(image, {0.25: 192, 0.7: 77, 1.0: 0}[abs(s)]),
    "solarize_add": lambda image, s: image.point(
        [v + {0.25: 27, 0.7: 77, 1.0: 110}[abs(s)] if v < 128 else v for v in range(256)] * 3
    ),
    "colour": lambda image, s: ImageEnhance.Color(image).enhance(1 + 0.9 * s),
    "contrast": lambda image, s: ImageEnhance.Contrast(image).enhance(1 + 0.9 * s),
    "brightness": lambda image, s: ImageEnhance.Brightness(image).enhance(1 + 0.9 * s),
    "sharpness": lambda image, s: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * s),
}


@pytest.mark.parametrize("strength", [-1.0, -0.7, 0.25, 0.7, 1.0])
@pytest.mark.parametrize("name", PIL_OF)
def test_colours_are_those_of_pil(name: str, strength: float) -> None:
    wanted = np.asarray(PIL_OF[name](Image.fromarray(photo().permute(1, 2, 0).numpy()), strength))
    given = operations()[name](photo(), strength).permute(1, 2, 0).numpy()
    # Greys are rounded at different places; blends around them are up to 1.9 times as far off.
    assert np.abs(given.astype(int) - wanted.astype(int)).max() <= 2


GEOMETRY = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def sources(name: str, strength: float, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the pixel at (y, x) comes from, in coordinates of pixel centres."""
    if name == "rotate":
        angle = np.radians(30 * strength)
        return y * np.cos(angle) + x * np.sin(angle), x * np.cos(angle) - y * np.sin(angle)
    if name == "shear_x":
        return y, x + 0.3 * strength * y
    if name == "shear_y":
        return y + 0.3 * strength * x, x
    shift = round(0.45 * strength * (56 if name == "translate_x" else 40))
    return (y, x - shift) if name == "translate_x" else (y - shift, x)


@pytest.mark.parametrize("strength", [-1.0, -0.7, 0.25, 0.7, 1.0])
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry(name: str, strength: float) -> None:
    y, x = np.meshgrid(np.arange(40.0), np.arange(56.0), indexing="ij")
    centre_y, centre_x = (19.5, 27.5) if name == "rotate" else (-0.5, -0.5)
    y_from, x_from = sources(name, strength, y - centre_y, x - centre_x)
    y_from, x_from = y_from + centre_y, x_from + centre_x
    inside = (y_from > 0.01) & (y_from < 38.99) & (x_from > 0.01) & (x_from < 54.99)
    outside = (y_from < -1.01) | (y_from > 40.01) | (x_from < -1.01) | (x_from > 56.01)
    given = operations()[name](photo(), strength).numpy()
    wanted = bilinear(photo().numpy().astype(float), y_from, x_from)
    assert inside.sum() > 500
    assert np.abs(given - wanted)[:, inside].max() <= 1
    assert outside.any()
    assert (given[:, outside] == 128).all()


@pytest.mark.parametrize("name", sorted(set(operations()) - {"auto_contrast", "equalize", "invert"}))
def test_more_strength_changes_more(name: str) -> None:
    ramp = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(3, 3, 3)
    ramp[1:] //= 2
    given = ramp if name not in GEOMETRY else photo()
    changes = [float((operations()[name](given, s).float() - given).abs().mean()) for s in (0.0, 0.3, 0.6, 1.0)]
    assert changes[0] == 0 or name == "posterize"  # 4 bits are what it begins with
    assert all(a < b for a, b in pairwise(changes))


# Erasing


def boxes(spec: EraseSpec, draws: int, height: int, width: int) -> list[tuple[int, int, int, int]]:
    """(top, left, rows, columns) of what is erased from a white clip, in draws that erased something."""
    rng, found = np.random.default_rng(0), []
    for _ in range(draws):
        clip = torch.full((3, 2, height, width), 255, dtype=torch.uint8)
        erase(clip, spec, rng)
        gone = clip == 0
        if gone.any():
            assert all(torch.equal(gone[0, 0], gone[c, t]) for c in range(3) for t in range(2))
            ys, xs = gone[0, 0].nonzero().unbind(1)
            box = int(ys.min()), int(xs.min()), int(ys.max() - ys.min() + 1), int(xs.max() - xs.min() + 1)
            assert int(gone[0, 0].sum()) == box[2] * box[3]
            found.append(box)
    return found


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_boxes_are_erased_as_often_as_asked(probability: float) -> None:
    count = len(boxes(EraseSpec(probability, "constant"), 2000, 30, 40))
    assert count / 2000 == pytest.approx(probability, abs=0.03)


def test_boxes_have_the_area_and_aspect_asked_for() -> None:
    top, left, rows, columns = np.array(boxes(EraseSpec(1.0, "constant"), 3000, 80, 120)).T
    area, log_aspect = rows * columns / 9600, np.log(columns / rows)
    # The same on a fine grid of what may be drawn, without what is as high or wide as the picture.
    areas, logs = np.meshgrid(np.linspace(0.02, 1 / 3, 2001), np.linspace(np.log(0.3), np.log(3.3), 2001))
    fits = (np.sqrt(areas * 9600 / np.exp(logs)) < 79.5) & (np.sqrt(areas * 9600 * np.exp(logs)) < 119.5)
    assert 0.9 < fits.mean() < 0.99
    assert area.mean() == pytest.approx(areas[fits].mean(), abs=0.006)
    assert area.std() == pytest.approx(areas[fits].std(), abs=0.005)
    assert 0.018 < area.min() < 0.022
    assert 0.32 < area.max() < 0.34
    assert log_aspect.mean() == pytest.approx(logs[fits].mean(), abs=0.04)
    assert log_aspect.std() == pytest.approx(logs[fits].std(), abs=0.03)
    for first, size, whole in ((top, rows, 80), (left, columns, 120)):
        assert first.min() == 0
        assert (first + size).max() == whole
        assert (first / (whole - size)).mean() == pytest.approx(0.5, abs=0.02)


def test_what_boxes_are_filled_with() -> None:
    for mode, value in (("mean", 115), ("constant", 0)):
        clip = torch.full((3, 2, 40, 40), 255, dtype=torch.uint8)
        erase(clip, ERASE[mode], np.random.default_rng(0))
        assert set(clip.unique().tolist()) == {value, 255}
    rng, noise = np.random.default_rng(0), []
    for _ in range(40):
        black = torch.zeros((3, 2, 60, 60), dtype=torch.uint8)
        erase(black, EraseSpec(1.0, "pixel", (0.3, 1 / 3), (0.9, 1.1)), rng)
        assert torch.equal(black[:, 0], black[:, 1])
        noise.append(black[:, 0][:, (black[:, 0] != 0).any(0)].flatten().double())
    # Gaussian of mean 0.45 and deviation 0.225, clipped to 0..1: its moments by integration.
    z = np.linspace(-8, 8, 160_001)
    weights, values = np.exp(-z * z / 2), np.clip(0.45 + 0.225 * z, 0, 1) * 255
    mean = np.average(values, weights=weights)
    deviation = np.sqrt(np.average((values - mean) ** 2, weights=weights))
    pixels = torch.cat(noise)
    assert len(pixels) > 100_000
    assert float(pixels.mean()) == pytest.approx(mean, abs=0.6)
    assert float(pixels.std()) == pytest.approx(deviation, abs=0.6)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(MdlError, match="one of: pixel, mean, constant"):
        EraseSpec(mode="noise")


# The recipe's keys


def test_a_recipe_names_the_augmentation() -> None:
    plain = train_transform(load("tiny_demo"), "chalk")
    assert plain.area is None
    assert plain.rand_augment is None
    assert plain.erase is None
    keys = (
        "crop=resized",
        "area=[0.2, 0.9]",
        "rand_augment={ops: 2, magnitude: 5, std: 0, probability: 1}",
        "erase={probability: 0.5, mode: mean}",
    )
    changed = train_transform(load("tiny_demo", [f"data.augment.{key}" for key in keys]), "chalk")
    assert changed == TrainTransform(
        None,
        plain.crop,
        plain.flip,
        (0.2, 0.9),
        (3 / 4, 4 / 3),
        RandAugmentSpec(2, 5, 0, 1),
        EraseSpec(0.5, "mean"),
    )
    released = train_transform(
        load("tiny_demo", ["data.augment.rand_augment={}", "data.augment.erase={}"]), "chalk"
    )
    assert (released.rand_augment, released.erase) == (RandAugmentSpec(), EraseSpec())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("crop=random", "data.augment.crop"),
        ("short_side=null", r"give short_side: \[lo, hi\] in pixels, or crop: resized"),
        ("area=[0.5, 0.1]", "the lower bound is above the upper one"),
        ("area=[0.5, 1.5]", "a share of the picture is 1 at most"),
        ("area=[0, 1]", "data.augment.area.0"),
        ("aspect=[2, 1]", "the lower bound is above the upper one"),
        ("rand_augment={magnitude: 11}", "data.augment.rand_augment.magnitude"),
        ("rand_augment={num_ops: 4}", "data.augment.rand_augment.num_ops: unknown key"),
        ("erase={mode: noise}", "data.augment.erase.mode"),
        ("mixup=-1", "data.augment.mixup"),
        ("mix_probability=2", "data.augment.mix_probability"),
        ("mix_scope=all", "data.augment.mix_scope"),
        ("smoothing=1", "data.augment.smoothing"),
        ("smooth_classes=700", "smooth_classes says how to smooth, but smoothing is 0"),
        ("repeat=0", "data.augment.repeat"),
    ],
)
def test_faults(override: str, message: str) -> None:
    with pytest.raises(MdlError, match=message):
        load("tiny_demo", [f"data.augment.{override}"])


def test_a_resized_crop_does_not_read_the_short_side() -> None:
    small = ["data.augment.short_side=[8, 8]", "data.augment.crop=resized"]
    assert train_transform(load("tiny_demo", small), "chalk").short_side is None
    with pytest.raises(MdlError, match="its lower bound is below"):
        load("tiny_demo", small[:1])
