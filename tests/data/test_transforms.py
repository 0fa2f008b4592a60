"""Crops and scaling, against the specification's numbers and a float computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mdltool.data.augment import EraseSpec
from mdltool.data.transforms import TrainTransform, crop_corners, flipped_classes, normalise, resized, scaled
from mdltool.errors import MdlError


def frames(count: int, height: int, width: int, channels_last: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)
    planes = pixels.permute(0, 3, 1, 2)
    return planes if channels_last else planes.contiguous()


def test_the_longer_side_is_rounded_down() -> None:
    assert scaled(240, 320, 256) == (256, 341)
    assert scaled(340, 256, 224) == (297, 224)
    assert scaled(100, 100, 224) == (224, 224)
    assert resized(frames(2, 50, 77), 32).shape == (2, 3, 32, 49)


def test_scaling_is_bilinear_without_corner_alignment_or_antialias() -> None:
    given = frames(1, 40, 60)
    height, width = 25, 37
    ys = np.clip((np.arange(height) + 0.5) * 40 / height - 0.5, 0, 39)
    xs = np.clip((np.arange(width) + 0.5) * 60 / width - 0.5, 0, 59)
    y0, x0 = np.floor(ys).astype(int), np.floor(xs).astype(int)
    y1, x1 = np.minimum(y0 + 1, 39), np.minimum(x0 + 1, 59)
    wy, wx = (ys - y0)[:, None], (xs - x0)[None]
    image = given[0].numpy().astype(float)
    top = image[:, y0][:, :, x0] * (1 - wx) + image[:, y0][:, :, x1] * wx
    bottom = image[:, y1][:, :, x0] * (1 - wx) + image[:, y1][:, :, x1] * wx
    wanted = top * (1 - wy) + bottom * wy
    assert np.abs(resized(given, 25)[0].numpy() - wanted).max() <= 1.01  # uint8 arithmetic rounds twice


def test_memory_layout_changes_no_pixel() -> None:
    assert torch.equal(resized(frames(2, 48, 64), 40), resized(frames(2, 48, 64, channels_last=False), 40))


def test_frames_of_the_right_size_are_not_copied() -> None:
    given = frames(2, 48, 64)
    assert resized(given, 48).data_ptr() == given.data_ptr()


def test_a_training_clip_is_one_draw_for_all_frames() -> None:
    still = frames(1, 48, 64).expand(5, -1, -1, -1)
    clip = TrainTransform((40, 56), 32, 0.5)(still, np.random.default_rng(0))
    assert clip.shape == (3, 5, 32, 32)
    assert clip.dtype == torch.uint8
    assert clip.is_contiguous()
    assert all(torch.equal(clip[:, 0], clip[:, t]) for t in range(5))


def test_training_crops_are_windows_of_the_scaled_frame() -> None:
    given = frames(2, 20, 30)
    transform = TrainTransform((16, 24), 12, 0.5)
    seen = set()
    for seed in range(400):
        clip = transform(given, np.random.default_rng(seed))
        seen.add(_where(given, clip))
    assert {side for side, _, _, _ in seen} == set(range(16, 25))  # both bounds are drawn
    assert {flip for _, _, _, flip in seen} == {False, True}
    at_20 = [(y, x) for side, y, x, _ in seen if side == 20]
    assert max(y for y, _ in at_20) <= 8
    assert max(x for _, x in at_20) <= 18
    assert len(set(at_20)) > 20


def _where(given: torch.Tensor, clip: torch.Tensor) -> tuple[int, int, int, bool]:
    for side in range(16, 25):
        whole = resized(given, side)
        for y in range(whole.shape[2] - 11):
            for x in range(whole.shape[3] - 11):
                window = whole[..., y : y + 12, x : x + 12].transpose(0, 1)
                for flip in (False, True):
                    if torch.equal(window.flip(-1) if flip else window, clip):
                        return side, y, x, flip
    raise AssertionError("the clip is no window of any scaled frame")


def test_flips_happen_as_often_as_asked() -> None:
    ramp = torch.arange(32, dtype=torch.uint8).expand(1, 3, 32, 32)
    for probability in (0.0, 0.25, 1.0):
        transform = TrainTransform((32, 32), 32, probability)
        flipped = sum(int(transform(ramp, np.random.default_rng(seed))[0, 0, 0, 0]) == 31 for seed in range(800))
        assert flipped / 800 == pytest.approx(probability, abs=0.05)


def test_a_clip_that_may_not_flip_has_the_draws_of_one_that_may() -> None:
    transform = TrainTransform((40, 56), 32, 1.0, erase=EraseSpec(1.0, "constant"))
    flipped, yes = transform.apply(frames(3, 48, 64), np.random.default_rng(5))
    plain, no = transform.apply(frames(3, 48, 64), np.random.default_rng(5), may_flip=False)
    assert (yes, no) == (True, False)
    still = TrainTransform((40, 56), 32, 0.0, erase=EraseSpec(1.0, "constant"))
    assert torch.equal(plain, still(frames(3, 48, 64), np.random.default_rng(5)))
    assert not torch.equal(plain, flipped)


def test_classes_of_mirror_images() -> None:
    names = [
        "Push left",
        "Push right",
        "From left to right",
        "From right to left",
        "Leftover",
        "Turn right",
        "move_left",
    ]
    assert flipped_classes(names) == {0: 1, 1: 0, 2: 3, 3: 2, 4: 4}


def test_the_same_generator_gives_the_same_clip() -> None:
    transform = TrainTransform((40, 56), 32, 0.5)
    one, two = (transform(frames(3, 48, 64), np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(one, two)


def test_a_clip_can_be_written_in_place() -> None:
    transform = TrainTransform((40, 56), 32, 0.5)
    batch = torch.zeros((2, 3, 3, 32, 32), dtype=torch.uint8)
    transform(frames(3, 48, 64), np.random.default_rng(5), batch[1])
    assert torch.equal(batch[1], transform(frames(3, 48, 64), np.random.default_rng(5)))
    assert not batch[0].any()


@pytest.mark.parametrize("rounding", ["floor", "ceil"])
def test_the_centre_window_is_the_test_protocols(rounding: str) -> None:
    whole = frames(3, 41, 55)
    own = TrainTransform((41, 41), 32, 0.0, centre=rounding)(whole, np.random.default_rng(5))
    ((y, x),) = crop_corners(41, 55, 32, 1, rounding=rounding)
    assert (y, x) == ((4, 11) if rounding == "floor" else (5, 12))
    assert torch.equal(own, whole[:, :, y : y + 32, x : x + 32].transpose(0, 1))


def test_crops_of_256_by_340() -> None:
    assert crop_corners(256, 340, 224, 3) == [(16, 0), (16, 58), (16, 116)]
    assert crop_corners(256, 340, 224, 1) == [(16, 58)]
    assert crop_corners(340, 256, 224, 3) == [(58, 0), (58, 16), (58, 32)]
    assert crop_corners(340, 256, 224, 3, axis="long_side") == [(0, 16), (58, 16), (116, 16)]
    assert crop_corners(256, 340, 224, 3, axis="long_side") == [(16, 0), (16, 58), (16, 116)]
    assert crop_corners(257, 341, 224, 3) == [(16, 0), (16, 58), (16, 117)]
    assert crop_corners(257, 341, 224, 3, rounding="ceil") == [(17, 0), (17, 59), (17, 117)]


def test_what_does_not_fit_is_refused() -> None:
    for make in (
        lambda: TrainTransform((200, 256), 224, 0.5),
        lambda: TrainTransform((256, 224), 224, 0.5),
        lambda: crop_corners(256, 340, 224, 2),
        lambda: crop_corners(256, 340, 224, 3, axis="vertical"),
        lambda: crop_corners(256, 340, 224, 3, rounding="round"),
    ):
        with pytest.raises(MdlError):
            make()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalising(dtype: torch.dtype) -> None:
    given = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1, 1)
    mean = torch.tensor([0.45, 0.2, 0.0], dtype=dtype).view(1, 3, 1, 1, 1)
    std = torch.tensor([0.225, 0.5, 2.0], dtype=dtype).view(1, 3, 1, 1, 1)
    assert torch.allclose(normalise(given, mean, std).flatten(), torch.tensor([-2.0, 0.0, 0.5], dtype=dtype))
    assert normalise(given, mean, std).dtype == dtype
