"""COCO-style JSON, class folders of images, image arrays: the published files as they are, and every fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdltool.errors import MdlError
from tests.data.test_formats import labels, read, touch

DECATHLON = {"daimlerpedcls": (2, 400), "dtd": (47, 400), "ucf101": (101, 400)}


@pytest.fixture
def annotations(test_data: Path) -> Path:
    return test_data / "annotations"


def file_names(path: Path) -> list[str]:
    return [image["file_name"] for image in json.loads(path.read_text())["images"]]


class TestDecathlon:
    @pytest.mark.parametrize("domain", DECATHLON)
    def test_the_published_files(self, domain: str, annotations: Path, tmp_path: Path) -> None:
        path = annotations / "visual_decathlon" / f"{domain}_test.json"
        content = json.loads(path.read_text())
        listing = read("coco", touch(tmp_path, *file_names(path)), path, "test")
        classes, images = DECATHLON[domain]
        assert (len(listing.classes), len(listing.clips), listing.task) == (classes, images, "single_label")
        first = min(entry["id"] for entry in content["categories"])
        by_image = {entry["image_id"]: entry["category_id"] - first for entry in content["annotations"]}
        expected = {image["file_name"][:-4]: by_image[image["id"]] for image in content["images"]}
        assert {clip.key: clip.label for clip in listing.clips} == expected
        assert f"labels: {classes} categories, ids {first} to {first + classes - 1}, in the order of their ids" in (
            listing.notes
        )
        assert "images: 400 of them" in listing.notes
        assert not [note for note in listing.notes if note.startswith("split")]

    def test_the_folder_may_be_given_at_any_depth(self, annotations: Path, tmp_path: Path) -> None:
        path = annotations / "visual_decathlon" / "dtd_test.json"
        touch(tmp_path, *file_names(path)[:5])
        for inner, key in (("data", "dtd/test/000001"), ("data/dtd", "test/000001"), ("data/dtd/test", "000001")):
            listing = read("coco", tmp_path / inner, path, "test")
            assert len(listing.clips) == 5
            assert key in {clip.key for clip in listing.clips}
            assert "missing: 395 of 400 listed files, e.g. no file data/dtd/test/000021.jpg" in listing.notes

    def test_images_of_another_split_are_not_taken_for_these(self, annotations: Path, tmp_path: Path) -> None:
        path = annotations / "visual_decathlon" / "dtd_test.json"
        source = touch(tmp_path, "train/000001.jpg") / "train"
        with pytest.raises(MdlError, match="none of the 400 listed files is there"):
            read("coco", source, path, "test")

    def test_a_file_named_after_another_split_is_said(self, annotations: Path, tmp_path: Path) -> None:
        path = annotations / "visual_decathlon" / "ucf101_test.json"
        listing = read("coco", touch(tmp_path, *file_names(path)), path, "val")
        assert "split: ucf101_test.json is named after 'test', stored as 'val'" in listing.notes
        assert "classes: 97 seen of 101 listed" in listing.notes


class TestCoco:
    def test_several_categories_make_it_multi_label(self, annotations: Path, tmp_path: Path) -> None:
        path = annotations / "coco_style" / "dali_coco_dummy_instances.json"
        listing = read("coco", touch(tmp_path, *file_names(path)), path)
        assert (listing.task, len(listing.classes), len(listing.clips)) == ("multi_label", 80, 64)
        assert {"task: multi_label, since 50 images have several categories", "clips of no class: 2"} <= set(
            listing.notes
        )
        content = json.loads(path.read_text())
        names = {entry["id"]: entry["name"] for entry in content["categories"]}
        for image in content["images"]:
            own = {names[a["category_id"]] for a in content["annotations"] if a["image_id"] == image["id"]}
            (clip,) = (clip for clip in listing.clips if clip.key == image["file_name"].split(".")[0])
            assert {listing.classes[number] for number in clip.label} == own
            assert list(clip.label) == sorted(clip.label)

    def test_captions_are_no_labels(self, annotations: Path, tmp_path: Path) -> None:
        path = annotations / "coco_style" / "captions_val2017_samples.json"
        with pytest.raises(MdlError, match="the file has captions"):
            read("coco", tmp_path, path)

    def content(self) -> dict[str, Any]:
        return {
            "images": [{"id": i, "file_name": f"{i}.png"} for i in range(3)],
            "annotations": [{"image_id": 0, "category_id": 9}, {"image_id": 1, "category_id": 4}],
            "categories": [{"id": 9, "name": "late"}, {"id": 4, "name": "early"}],
        }

    def read(self, folder: Path, content: dict[str, Any], form: str = "coco", **options: Any) -> Any:
        touch(folder, "0.png", "1.png", "2.png")
        (folder / "a.json").write_text(json.dumps(content))
        return read(form, folder, folder / "a.json", **options)

    def test_labels_follow_the_ids_whatever_the_file_order(self, tmp_path: Path) -> None:
        listing = self.read(tmp_path, self.content())
        assert listing.classes == ("early", "late")
        assert labels(listing) == {"0": "late", "1": "early"}
        assert "without a category: 1 images, left out" in listing.notes

    def test_asked_for_multi_label_images_without_a_category_stay(self, tmp_path: Path) -> None:
        listing = self.read(tmp_path, self.content(), "coco_multilabel")
        assert [clip.label for clip in listing.clips] == [(1,), (0,), ()]

    def test_boxes_of_one_category_are_one_label(self, tmp_path: Path) -> None:
        content = self.content()
        content["annotations"] *= 2
        assert self.read(tmp_path, content).task == "single_label"

    def test_annotations_of_images_that_are_not_listed_decide_nothing(self, tmp_path: Path) -> None:
        content = self.content()
        content["annotations"] += [{"image_id": 77, "category_id": 4}, {"image_id": 77, "category_id": 9}]
        assert self.read(tmp_path, content).task == "single_label"

    def test_a_class_list_fixes_the_labels(self, tmp_path: Path) -> None:
        listing = self.read(tmp_path, self.content(), classes=("late", "x", "early"))
        assert [clip.label for clip in listing.clips] == [0, 2]
        with pytest.raises(MdlError, match="'early' is not in the class list"):
            self.read(tmp_path, self.content(), classes=("late",))

    def test_names_that_stand_twice_are_told_apart(self, tmp_path: Path) -> None:
        content = self.content()
        content["categories"] = [
            {"id": 4, "name": "c1", "supercategory": "Greek"},
            {"id": 9, "name": "c1", "supercategory": "Latin"},
            {"id": 10, "name": "same"},
            {"id": 11, "name": "same"},
        ]
        assert self.read(tmp_path, content).classes == ("Greek/c1", "Latin/c1", "same (10)", "same (11)")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"images": []}, "the file has no 'images'"),
            ({"annotations": []}, "the file has no 'annotations'"),
            ({"categories": None}, "the file has no 'categories'"),
            ({"annotations": [{"image_id": 0, "category_id": 5}]}, "category 5, which is not listed"),
            ({"annotations": [{"category_id": 4}]}, "'image_id' is None, no id"),
            ({"categories": [{"id": 4, "name": "a"}, {"id": 4, "name": "b"}]}, "category id 4 is no number, or"),
            ({"categories": [{"id": 4}, {"id": 9, "name": "b"}]}, "there is no 'name'"),
            ({"images": [{"id": 0}]}, "there is no 'file_name'"),
            ({"images": [7]}, "expected an object"),
            ({"images": [{"id": 0, "file_name": "0.png"}, {"id": 0, "file_name": "1.png"}]}, "id 0 stands twice"),
            ({"images": [{"id": "0", "file_name": "0.png"}]}, "no image has an annotation"),
            ({"images": [{"id": 0, "file_name": "../0.png"}]}, "leaves the folder of the images"),
            ({"images": [{"id": 0, "file_name": "/etc/0.png"}]}, "leaves the folder of the images"),
            (
                {"images": [{"id": 0, "file_name": "0.png"}, {"id": 1, "file_name": "0.png"}]},
                "two clips have the key",
            ),
        ],
    )
    def test_faults(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(MdlError, match=message):
            self.read(tmp_path, self.content() | change)


class TestFolder:
    def test_images_and_videos_together_but_no_thumbnails(self, tmp_path: Path) -> None:
        listing = read("folder", touch(tmp_path, "a/1.mp4", "a/1.jpg", "a/2.JPEG", "b/1.png", "b/x.txt"))
        assert {clip.key: clip.video.suffix for clip in listing.clips} == {
            "a/1": ".mp4",
            "a/2": ".JPEG",
            "b/1": ".png",
        }
        assert "images beside videos of their name, left out: 1" in listing.notes
        assert "images: 2 of them" in listing.notes


class TestArrays:
    X = np.arange(5 * 4 * 6 * 3, dtype=np.uint8).reshape(5, 4, 6, 3)
    Y = np.array([2, 0, 1, 2, 0])

    def test_one_file_with_both_splits_shares_its_classes(self, tmp_path: Path) -> None:
        path = tmp_path / "cifar.npz"
        np.savez(path, x_train=self.X, y_train=self.Y, x_test=self.X[:2], y_test=[[1], [1]], mean=np.zeros(3))
        listing = read("arrays", path)
        assert listing.classes == ("0", "1", "2")
        assert labels(listing) == {f"cifar_npz/x_train/{i:06d}": str(y) for i, y in enumerate(self.Y)}
        assert "arrays: cifar.npz x_train" in listing.notes
        assert [clip.label for clip in read("arrays", path, split="test").clips] == [1, 1]

    @pytest.mark.parametrize(
        ("images", "targets"),
        [("images", "labels"), ("train_images", "train_labels"), ("X", "y"), ("data", "targets")],
    )
    def test_npy_files_pair_by_name(self, images: str, targets: str, tmp_path: Path) -> None:
        np.save(tmp_path / f"{images}.npy", self.X[..., 0])
        np.save(tmp_path / f"{targets}.npy", self.Y)
        listing = read("arrays", tmp_path)
        assert [clip.item for clip in listing.clips] == [("", i) for i in range(5)]
        assert listing.clips[3].key == f"{images}_npy/000003"

    def test_a_folder_of_files_named_after_splits(self, tmp_path: Path) -> None:
        for name, part in (("train_1", slice(0, 2)), ("train_2", slice(2, 4)), ("val", slice(4, 5))):
            np.savez_compressed(tmp_path / f"{name}.npz", images=self.X[part], labels=self.Y[part])
        assert [clip.label for clip in read("arrays", tmp_path).clips] == [2, 0, 1, 2]
        assert [clip.label for clip in read("arrays", tmp_path, split="validation").clips] == [0]
        with pytest.raises(MdlError, match=r"no array is of the split 'test' \(there are: train, val\)"):
            read("arrays", tmp_path, split="test")

    def test_names_for_the_numbers(self, tmp_path: Path) -> None:
        path = tmp_path / "svhn.npz"
        np.savez(path, images=self.X, labels=self.Y + 1)
        listing = read("arrays", path, classes=("a", "b", "c"))
        assert [clip.label for clip in listing.clips] == self.Y.tolist()
        assert "labels: numbers from 1, names from --classes" in listing.notes
        np.savez(path, images=self.X, labels=self.Y, classes=["a", "b", "c"])
        assert read("arrays", path).classes == ("a", "b", "c")
        np.savez(path, images=self.X, labels=self.Y, classes=np.array(["a", "\u00e9", "c"]).astype("U1"))
        assert read("arrays", path).classes == ("a", "\u00e9", "c")
        np.savez(path, images=self.X, labels=self.Y, classes=[name.encode() for name in ("a", "\u00e9", "c")])
        assert read("arrays", path).classes == ("a", "\u00e9", "c"), "names as bytes"
        np.savez(path, images=self.X, labels=self.Y, classes=[b"a", b"\xff", b"c"])
        with pytest.raises(MdlError, match="the classes are no UTF-8"):
            read("arrays", path)
        np.savez(path, images=self.X, labels=np.array(["b", "a", "b", "b", "c"]))
        assert [clip.label for clip in read("arrays", path).clips] == [1, 0, 1, 1, 2]

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"x": X.astype(np.float32), "y": Y}, "the images are float32, not uint8"),
            ({"x": X.transpose(0, 3, 1, 2), "y": Y}, "channels first"),
            ({"x": X.reshape(5, -1), "y": Y}, r"the images are \[5, 72\]"),
            ({"x": X, "y": Y[:4]}, r"labels of shape \[4\] for 5 images"),
            ({"x": X, "y": Y / 2}, "labels are float64"),
            ({"x": X}, "1 of images and 0 of labels"),
            ({"x": X, "y": Y, "data": X}, "2 of images and 1 of labels"),
            ({"other": X}, "holds no array of images"),
            ({"x": X, "y": np.array([{}] * 5, dtype=object)}, "Python objects"),
        ],
    )
    def test_faults(self, arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(MdlError, match=message):
            read("arrays", tmp_path / "a.npz")

    def test_nothing_is_unpickled(self, tmp_path: Path) -> None:
        import pickle

        (tmp_path / "images.npy").write_bytes(pickle.dumps(self.X))
        (tmp_path / "a.npz").write_bytes(b"PK nothing")
        for name in ("images.npy", "a.npz"):
            with pytest.raises(MdlError, match="no file of NumPy arrays"):
                read("arrays", tmp_path / name)

    def test_no_arrays(self, tmp_path: Path) -> None:
        with pytest.raises(MdlError, match=r"holds no .npz or .npy file"):
            read("arrays", tmp_path)
        with pytest.raises(MdlError, match="need no annotations"):
            read("arrays", tmp_path, tmp_path)
