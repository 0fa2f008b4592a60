"""The formats of multi-label and regression CSV files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mdltool.data.formats import FORMATS
from mdltool.data.formats.query import Query
from mdltool.errors import MdlError
from mdltool.types import Listing


def read(
    folder: Path, form: str, text: str, split: str = "train", classes: tuple[str, ...] | None = None
) -> Listing:
    for name in ("a.mp4", "deep/b.mp4", "c.mp4"):
        (folder / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "videos" / name).touch()
    (folder / "list.csv").write_text(text)
    return FORMATS.load(form)(Query(folder / "videos", folder / "list.csv", split, 1, classes))


def named(listing: Listing) -> dict[str, set[str]]:
    return {clip.key: {listing.classes[i] for i in labels(clip.label)} for clip in listing.clips}


def labels(label: object) -> tuple[int, ...]:
    assert isinstance(label, tuple)
    assert list(label) == sorted(set(label)), "increasing, each once"
    return label


class TestMultiLabel:
    def test_lists_of_names(self, tmp_path: Path) -> None:
        text = "path,labels\na.mp4, wave ; box;wave\ndeep/b.mp4,nod|box\nc.mp4,\n"
        listing = read(tmp_path, "multilabel", text)
        assert (listing.task, listing.classes) == ("multi_label", ("box", "nod", "wave"))
        assert named(listing) == {"a": {"wave", "box"}, "deep/b": {"nod", "box"}, "c": set()}
        assert "clips of no class: 1" in listing.notes
        assert "labels a clip: 1.33 on average, 2 at most" in listing.notes
        assert "classes: 3 seen of 3 listed" in listing.notes

    def test_segments_and_splits_share_the_files_classes(self, tmp_path: Path) -> None:
        text = "path,labels,start,end,split\na.mp4,x;y,1.5,3,train\na.mp4,z,3,,train\nc.mp4,w,,,validation\n"
        train, val = (read(tmp_path, "multilabel", text, split) for split in ("train", "val"))
        assert train.classes == val.classes == ("w", "x", "y", "z")
        assert named(train) == {"a_00001500_00003000": {"x", "y"}, "a_00003000_end": {"z"}}
        assert "segments: 2" in train.notes
        assert named(val) == {"c": {"w"}}

    def test_numbers_without_a_class_list_are_names_in_their_order(self, tmp_path: Path) -> None:
        listing = read(tmp_path, "multilabel", "path,labels\na.mp4,10;2\nc.mp4,7\n")
        assert listing.classes == ("2", "7", "10")
        assert named(listing) == {"a": {"10", "2"}, "c": {"7"}}

    @pytest.mark.parametrize(
        ("numbers", "base"), [(("0;2", "1"), 0), (("1;3", "2"), 1), (("0", "0"), 0), (("3", "3"), 1)]
    )
    def test_numbers_are_positions_in_a_class_list(
        self, tmp_path: Path, numbers: tuple[str, str], base: int
    ) -> None:
        text = f"path,labels\na.mp4,{numbers[0]}\nc.mp4,{numbers[1]}\n"
        listing = read(tmp_path, "multilabel", text, classes=("nod", "wave", "box"))
        assert listing.classes == ("nod", "wave", "box")
        expected = {tuple(int(n) - base for n in text.split(";")) for text in numbers}
        assert {clip.label for clip in listing.clips} == expected
        assert f"labels: numbers from {base}, names from --classes" in listing.notes

    @pytest.mark.parametrize(
        ("numbers", "what"),
        [("1;2", "they may count from 0 or from 1"), ("0;3", "has 3 names"), ("4", "has 3 names")],
    )
    def test_numbers_that_do_not_fit_a_class_list(self, tmp_path: Path, numbers: str, what: str) -> None:
        with pytest.raises(MdlError, match=what):
            read(tmp_path, "multilabel", f"path,labels\na.mp4,{numbers}\n", classes=("nod", "wave", "box"))

    def test_numbers_that_are_class_names(self, tmp_path: Path) -> None:
        listing = read(tmp_path, "multilabel", "path,labels\na.mp4,7;5\n", classes=("7", "6", "5"))
        assert [clip.label for clip in listing.clips] == [(0, 2)]

    def test_a_column_for_each_class_keeps_names_and_order(self, tmp_path: Path) -> None:
        text = "path,Wave,Box,end,start\na.mp4,1,0,,\nc.mp4,0.0,1.0,4,2\ndeep/b.mp4,0,0,,\n"
        listing = read(tmp_path, "multilabel", text)
        assert listing.classes == ("Wave", "Box")
        assert named(listing) == {"a": {"Wave"}, "c_00002000_00004000": {"Box"}, "deep/b": set()}

    def test_a_class_list_chooses_columns_and_their_order(self, tmp_path: Path) -> None:
        text = "path,person,Wave,Box\na.mp4,P17,1,0\nc.mp4,P18,1,1\n"
        listing = read(tmp_path, "multilabel", text, classes=("Box", "wave"))
        assert listing.classes == ("Box", "wave")
        assert [clip.label for clip in listing.clips] == [(1,), (0, 1)]

    @pytest.mark.parametrize(
        ("text", "classes", "what", "where"),
        [
            ("path,labels\na.mp4,wvae\n", ("box", "wave"), "the label 'wvae' is not in the class list", "row 2"),
            ("path,labels\na.mp4,\n", None, "no row has a label", "list.csv"),
            ("path\na.mp4\n", None, "no columns beside those of the clip", "list.csv"),
            ("path,x\na.mp4,2\n", None, "'2' in column 'x' is not 0 or 1", "row 2"),
            ("path,label\na.mp4,wave\n", None, "'wave' in column 'label' is not 0 or 1", "row 2"),
            ("path,x\na.mp4,\n", None, "the column 'x' is empty", "row 2"),
            ("path,x,X\na.mp4,1,0\n", None, "the column 'x' stands twice", "list.csv"),
            ("path,x,\na.mp4,1,0\n", None, "a column has no name", "list.csv"),
            ("path,x,y\na.mp4,1,0\n", ("z",), "the CSV file has no column 'z'", "list.csv"),
            ("file,labels\na.mp4,x\n", None, "no column 'path'", "list.csv"),
            ("path,labels\nz.mp4,x\n", None, "none of the 1 listed files is there", "list.csv"),
            ("path,labels\na.mp4,x\na.mp4,y\n", None, "two clips have the key 'a'", "list.csv"),
        ],
    )
    def test_faults(
        self, tmp_path: Path, text: str, classes: tuple[str, ...] | None, what: str, where: str
    ) -> None:
        with pytest.raises(MdlError, match=what) as fault:
            read(tmp_path, "multilabel", text, classes=classes)
        assert where in str(fault.value.where)


class TestRegression:
    def test_values_stay_as_they_are(self, tmp_path: Path) -> None:
        text = "path,Openness,Calm,start,end\na.mp4,-1.25,3,,\ndeep/b.mp4,1e-3,0.1,0.5,2\n"
        listing = read(tmp_path, "regression", text)
        assert (listing.task, listing.classes) == ("regression", ("Openness", "Calm"))
        assert {clip.key: clip.label for clip in listing.clips} == {
            "a": (-1.25, 3.0),
            "deep/b_00000500_00002000": (0.001, 0.1),
        }

    def test_what_is_said_of_the_targets(self, tmp_path: Path) -> None:
        listing = read(tmp_path, "regression", "path,x\na.mp4,1\nc.mp4,2\ndeep/b.mp4,6\n")
        spread = f"mean {np.mean([1, 2, 6]):.3g}, variance {np.var([1, 2, 6]):.3g}"
        assert listing.notes[:2] == ("targets: 1, in the order of the columns", f"x: 1 to 6, {spread}")
        assert not [note for note in listing.notes if note.startswith("classes")]

    def test_a_class_list_chooses_columns(self, tmp_path: Path) -> None:
        listing = read(tmp_path, "regression", "path,person,o,c\na.mp4,P1,1,2\n", classes=("c", "o"))
        assert (listing.classes, listing.clips[0].label) == (("c", "o"), (2.0, 1.0))

    def test_missing_files_are_listed(self, tmp_path: Path) -> None:
        listing = read(tmp_path, "regression", "path,x\na.mp4,1\nz.mp4,2\n")
        assert listing.missing == (("z", "no file z.mp4"),)
        with pytest.raises(MdlError, match="none of the 1 listed files is there"):
            read(tmp_path, "regression", "path,x\nz.mp4,2\n")

    @pytest.mark.parametrize("text", ["nan", "inf", "1e39", "-1e39", "high", "1,5"])
    def test_what_is_no_number(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(MdlError, match="is not a number") as fault:
            read(tmp_path, "regression", f'path,x\na.mp4,1\nc.mp4,"{text}"\n')
        assert "row 3" in str(fault.value.where)

    def test_other_faults(self, tmp_path: Path) -> None:
        with pytest.raises(MdlError, match="the column 'x' is empty"):
            read(tmp_path, "regression", "path,x\na.mp4,\n")
        with pytest.raises(MdlError, match="no columns beside those of the clip"):
            read(tmp_path, "regression", "path,start\na.mp4,1\n")


@pytest.mark.parametrize("form", ["multilabel", "regression"])
def test_the_file_must_be_given(tmp_path: Path, form: str) -> None:
    with pytest.raises(MdlError, match="the CSV file is not given"):
        FORMATS.load(form)(Query(tmp_path, None, "train"))
