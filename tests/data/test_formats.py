"""Annotation formats: the published files as they are, and every fault with one message."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest

from mdltool.data.formats import FORMATS
from mdltool.data.formats.common import key_of, read_class_list, relative_name
from mdltool.data.formats.query import Query
from mdltool.errors import MdlError
from mdltool.types import Listing


def read(
    form: str,
    source: Path,
    annotations: Path | None = None,
    split: str = "train",
    fold: int = 1,
    classes: Sequence[str] | None = None,
) -> Listing:
    fixed = None if classes is None else tuple(classes)
    return FORMATS.load(form)(Query(source, annotations, split, fold, fixed))


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def labels(listing: Listing) -> dict[str, str]:
    return {clip.key: listing.classes[clip.label] for clip in listing.clips}


@pytest.mark.parametrize(
    ("name", "segment", "key"),
    [
        ("a/b.mp4", (None, None), "a/b"),
        ("a.b/c.d.avi", (None, None), "a_b/c_d"),
        ("a/b.mp4", (1.5, 12.25), "a/b_00001500_00012250"),
        ("a/b.mp4", (None, 2.0), "a/b_00000000_00002000"),
        ("a/b.mp4", (2.0, None), "a/b_00002000_end"),
        ("/data/x.mp4", (None, None), "data/x"),
        ("../x.mp4", (None, None), "__/x"),
        ("__pycache__/x.mp4", (None, None), "_pycache__/x"),
        ("__id__.mp4", (None, None), "__id__"),
        ("noext", (None, None), "noext"),
    ],
)
def test_keys_hold_no_dots_and_survive_webdataset(
    name: str, segment: tuple[float | None, float | None], key: str
) -> None:
    assert key_of(name, *segment) == key


def test_names_are_relative_to_the_source_where_they_lie_inside(tmp_path: Path) -> None:
    assert relative_name(tmp_path / "a" / "b.mp4", tmp_path) == "a/b.mp4"
    assert relative_name(Path("/other/b.mp4"), tmp_path) == "other/b.mp4"


class TestFolder:
    def test_classes_are_the_folders_sorted_whatever_the_order_on_disk(self, tmp_path: Path) -> None:
        touch(
            tmp_path, "wave/2.mp4", "box/1.AVI", "box/deep/3.mkv", "box/notes.txt", "wave/.hidden.mp4", ".git/x.mp4"
        )
        listing = read("folder", tmp_path)
        assert listing.classes == ("box", "wave")
        assert labels(listing) == {"box/1": "box", "box/deep/3": "box", "wave/2": "wave"}

    def test_a_class_list_fixes_the_labels(self, tmp_path: Path) -> None:
        listing = read("folder", touch(tmp_path, "wave/2.mp4"), classes=("run", "wave", "box"))
        assert [clip.label for clip in listing.clips] == [1]
        assert "classes: 1 seen of 3 listed" in listing.notes

    def test_linked_folders_are_followed_but_not_in_circles(self, tmp_path: Path) -> None:
        touch(tmp_path / "real", "1.mp4")
        source = tmp_path / "source"
        source.mkdir()
        (source / "box").symlink_to(tmp_path / "real")
        (tmp_path / "real" / "again").symlink_to(tmp_path / "real")
        assert [clip.key for clip in read("folder", source).clips] == ["box/1"]

    @pytest.mark.parametrize(
        ("files", "what"),
        [
            ((), "no such directory"),
            (("video.mp4",), "no class folders"),
            (("box/1.mp4", "wave/readme.txt"), "the class folder holds no video"),
            (("box/1.mp4", "box/1.avi"), "two clips have the key 'box/1'"),
            (("train/box/1.mp4", "val/box/1.mp4"), "folders of splits, not of classes"),
        ],
    )
    def test_faults(self, tmp_path: Path, files: tuple[str, ...], what: str) -> None:
        with pytest.raises(MdlError, match=what):
            read("folder", touch(tmp_path / "source", *files))

    def test_a_folder_outside_the_class_list_is_named_with_the_nearest(self, tmp_path: Path) -> None:
        with pytest.raises(MdlError, match="the label 'waev' is not in the class list") as fault:
            read("folder", touch(tmp_path, "waev/1.mp4"), classes=("box", "wave"))
        assert "'wave'" in (fault.value.fix or "")
        assert str(tmp_path / "waev") == fault.value.where


class TestCsv:
    def read(self, folder: Path, text: str, **words: object) -> Listing:
        touch(folder / "videos", "a.mp4", "deep/b.mp4")
        (folder / "list.csv").write_text(text)
        return read("csv", folder / "videos", folder / "list.csv", **words)

    def test_rows_with_quotes_blanks_bom_and_segments(self, tmp_path: Path) -> None:
        text = (
            '\ufeffpath, label ,start,end\na.mp4,"air, drumming",,\n\ndeep/b.mp4, wave ,1.5,3\ndeep/b.mp4,wave,3,\n'
        )
        listing = self.read(tmp_path, text)
        assert labels(listing) == {
            "a": "air, drumming",
            "deep/b_00001500_00003000": "wave",
            "deep/b_00003000_end": "wave",
        }
        assert [(c.start_s, c.end_s) for c in listing.clips] == [(None, None), (1.5, 3.0), (3.0, None)]

    def test_the_splits_of_one_file_share_their_labels(self, tmp_path: Path) -> None:
        text = "path,label,split\na.mp4,wave,train\ndeep/b.mp4,box,validation\n"
        train, val = self.read(tmp_path, text), self.read(tmp_path, text, split="val")
        assert train.classes == val.classes == ("box", "wave")
        assert (labels(train), labels(val)) == ({"a": "wave"}, {"deep/b": "box"})

    def test_missing_files_are_listed_and_absolute_paths_taken(self, tmp_path: Path) -> None:
        other = touch(tmp_path / "other", "c.mp4") / "c.mp4"
        listing = self.read(tmp_path, f"path,label\na.mp4,x\ngone.mp4,y\n{other},x\n")
        assert listing.missing == (("gone", "no file gone.mp4"),)
        assert listing.clips[1].video == other
        assert any(note.startswith("missing: 1 of 3") for note in listing.notes)

    @pytest.mark.parametrize(
        ("text", "what", "where"),
        [
            ("path,class\na.mp4,x\n", "no column 'label'", "list.csv"),
            ("a.mp4,x\n", "no column 'path'", "list.csv"),
            ("", "no column 'path'", "list.csv"),
            ("path,label\n", "no rows", "list.csv"),
            ("path,label\na.mp4,\n", "the column 'label' is empty", "row 2"),
            ("path,label\na.mp4,x,y\n", "3 cells", "row 2"),
            ("path,label,start,end\na.mp4,x,5,2\n", "ends at 2 s, before it starts at 5 s", "row 2"),
            ("path,label,start,end\na.mp4,x,,0\n", "before it starts at 0 s", "row 2"),
            ("path,label,start,end\na.mp4,x,-1,2\n", "'-1' in column 'start' is no time", "row 2"),
            ("path,label,start,end\na.mp4,x,nan,2\n", "'nan' in column 'start' is no time", "row 2"),
            ("path,label,start,end\na.mp4,x,1:05,2\n", "'1:05' in column 'start' is no time", "row 2"),
            ("path,label\na.mp4,x\na.mp4,x\n", "two clips have the key 'a'", "list.csv"),
            (
                "path,label,split\na.mp4,x,val\n",
                r"no row is of the split 'train' \(the file has: val\)",
                "list.csv",
            ),
            ("path,label\n.,x\n", "none of the 1 listed files", "list.csv"),
            ("path,label\nz.mp4,x\n", "none of the 1 listed files is there, the first: no file z.mp4", "list.csv"),
        ],
    )
    def test_faults_name_the_row(self, tmp_path: Path, text: str, what: str, where: str) -> None:
        with pytest.raises(MdlError, match=what) as fault:
            self.read(tmp_path, text)
        assert where in str(fault.value.where)

    def test_a_label_outside_the_class_list_names_row_and_nearest(self, tmp_path: Path) -> None:
        with pytest.raises(MdlError, match="the label 'wvae' is not in the class list") as fault:
            self.read(tmp_path, "path,label\na.mp4,box\ndeep/b.mp4,wvae\n", classes=("box", "wave"))
        assert "row 3" in str(fault.value.where)
        assert "'wave'" in str(fault.value.fix)

    def test_bytes_that_are_no_text_and_a_missing_file(self, tmp_path: Path) -> None:
        (tmp_path / "list.csv").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(MdlError, match="not a CSV file"):
            read("csv", tmp_path, tmp_path / "list.csv")
        with pytest.raises(MdlError, match="no such file"):
            read("csv", tmp_path, tmp_path / "none.csv")
        with pytest.raises(MdlError, match="a directory, not a CSV file"):
            read("csv", tmp_path, tmp_path)
        with pytest.raises(MdlError, match="the CSV file is not given"):
            read("csv", tmp_path)


def test_class_lists(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text('box\n"air drumming"\n\n wave \n')
    assert read_class_list(path) == ("box", "air drumming", "wave")
    path.write_text("box\nbox\n")
    with pytest.raises(MdlError, match="'box' stands twice"):
        read_class_list(path)
    path.write_text("\n")
    with pytest.raises(MdlError, match="empty"):
        read_class_list(path)


class TestUcf101:
    @pytest.mark.parametrize(
        ("fold", "split", "count"),
        [(1, "train", 9537), (2, "train", 9586), (3, "train", 9624), (1, "test", 3783), (2, "val", 3734)],
    )
    def test_every_published_line_is_a_clip_of_its_folders_class(
        self, tmp_path: Path, test_data: Path, fold: int, split: str, count: int
    ) -> None:
        lists = test_data / "annotations" / "ucf101"
        published = lists / f"{'trainlist' if split == 'train' else 'testlist'}{fold:02d}.txt"
        names = [line.split()[0] for line in published.read_text().splitlines() if line.strip()]
        touch(tmp_path, *names[::40])
        listing = read("ucf101", tmp_path, lists, split, fold)
        assert len(listing.clips) == len(names[::40])
        assert len(listing.clips) + len(listing.missing) == count == len(names)
        assert all(key.split("/")[0] == name for key, name in labels(listing).items())
        official = [line.split()[1] for line in (lists / "classInd.txt").read_text().splitlines()]
        assert list(listing.classes) == official
        assert len(official) == 101

    def test_real_clips_come_with_their_labels_flat_or_re_encoded(self, tmp_path: Path, test_data: Path) -> None:
        lists = test_data / "annotations" / "ucf101"
        folders = read("ucf101", test_data / "clips" / "ucf101", lists, "val")
        with open(test_data / "MANIFEST.csv", newline="") as handle:
            rows = [row for row in csv.DictReader(handle) if row["domain"] == "ucf101"]
        expected = {Path(r["file"]).stem: r["label"] for r in rows if "testlist01" in r["official_split"]}
        assert {key.split("/")[1]: name for key, name in labels(folders).items()} == expected
        flat = read("ucf101", touch(tmp_path, *(f"{stem}.mp4" for stem in expected)), lists, "val")
        assert labels(flat) == expected

    def test_the_label_base_is_found_and_said(self, tmp_path: Path) -> None:
        touch(tmp_path, "A/v1.avi", "B/v2.avi")
        (tmp_path / "classInd.txt").write_text("1 A\n2 B\n")
        for base in (0, 1):
            (tmp_path / "trainlist01.txt").write_text(f"A/v1.avi {base}\r\nB/v2.avi {base + 1} \r\n")
            listing = read("ucf101", tmp_path)
            assert labels(listing) == {"A/v1": "A", "B/v2": "B"}
            assert f"labels: {base}-based; classInd.txt agrees" in listing.notes

    def test_a_number_that_contradicts_its_folder_is_named(self, tmp_path: Path) -> None:
        touch(tmp_path, "A/v1.avi", "B/v2.avi")
        (tmp_path / "classInd.txt").write_text("1 A\n2 B\n")
        (tmp_path / "trainlist01.txt").write_text("A/v1.avi 1\nB/v2.avi 1\n")
        with pytest.raises(MdlError, match=r"the label 1 of B/v2\.avi is not that class") as fault:
            read("ucf101", tmp_path)
        assert "line 2" in str(fault.value.where)

    def test_faults(self, tmp_path: Path) -> None:
        with pytest.raises(MdlError, match=r"trainlist01\.txt is not there"):
            read("ucf101", tmp_path)
        (tmp_path / "trainlist01.txt").write_text("A/v1.avi 1\n")
        with pytest.raises(MdlError, match=r"classInd\.txt is not there"):
            read("ucf101", tmp_path)
        with pytest.raises(MdlError, match="no split 'dev'"):
            read("ucf101", tmp_path, split="dev")


class TestHmdb51:
    @pytest.mark.parametrize(("fold", "split", "count"), [(1, "train", 3570), (1, "val", 1530), (2, "test", 1530)])
    def test_the_official_counts(self, tmp_path: Path, test_data: Path, fold: int, split: str, count: int) -> None:
        lists = test_data / "annotations" / "hmdb51"
        if not list((lists / "testTrainMulti_7030_splits").glob(f"*_test_split{fold}.txt")):
            pytest.skip(f"fold {fold} is not among the test data")
        mark = {"train": "1"}.get(split, "2")
        names = {}
        for path in (lists / "testTrainMulti_7030_splits").glob(f"*_test_split{fold}.txt"):
            for line in path.read_text().splitlines():
                name, found = line.rsplit(maxsplit=1)
                if found == mark:
                    names[name] = path.name.removesuffix(f"_test_split{fold}.txt")
        touch(tmp_path, *(f"{folder}/{name}" for name, folder in names.items()))
        listing = read("hmdb51", tmp_path, lists, split, fold)
        assert len(listing.clips) == count
        assert listing.classes == tuple(sorted(set(names.values())))
        assert len(listing.classes) == 51
        assert {clip.video.name: listing.classes[clip.label] for clip in listing.clips} == names
        assert all("." not in clip.key for clip in listing.clips)

    def test_faults(self, tmp_path: Path) -> None:
        touch(tmp_path, "wave/a b.avi")
        with pytest.raises(MdlError, match="no split files"):
            read("hmdb51", tmp_path)
        lists = touch(tmp_path / "splits", "wave_test_split1.txt")
        (lists / "wave_test_split1.txt").write_text("a b.avi 1 \nc.avi 0\n")
        assert labels(read("hmdb51", tmp_path)) == {"wave/a b": "wave"}
        (lists / "wave_test_split1.txt").write_text("a b.avi\n")
        with pytest.raises(MdlError, match=r"expected '<file> 0\|1\|2'"):
            read("hmdb51", tmp_path)


class TestKinetics:
    def test_published_rows_in_every_layout(self, tmp_path: Path, test_data: Path) -> None:
        path = test_data / "annotations" / "kinetics400" / "tiny_val.csv"
        with open(path, newline="") as handle:
            rows = list(csv.DictReader(handle))
        assert len(rows) == 400
        timed = [f"{r['youtube_id']}_{int(r['time_start']):06d}_{int(r['time_end']):06d}" for r in rows]
        layouts = (
            [f"{name}.mp4" for name in timed],
            [f"{row['youtube_id']}.webm" for row in rows],
            [f"{row['label'].replace(' ', '_')}/{name}.mp4" for row, name in zip(rows, timed, strict=True)],
        )
        expected = [row["label"] for row in rows]
        for number, names in enumerate(layouts):
            listing = read("kinetics", touch(tmp_path / str(number), *names[::7]), path, "val")
            assert [listing.classes[clip.label] for clip in listing.clips] == expected[::7]
            assert [clip.video.name for clip in listing.clips] == [Path(name).name for name in names[::7]]
            assert listing.classes == tuple(sorted(expected))
            assert len(listing.missing) == 400 - len(expected[::7])

    def test_one_id_in_two_class_folders_goes_by_its_folder(self, tmp_path: Path) -> None:
        touch(tmp_path, "air drumming/x.mp4", "zumba/x.mp4")
        (tmp_path / "list.csv").write_text("label,youtube_id,time_start,time_end,split\nzumba,x,1,11,train\n")
        assert labels(read("kinetics", tmp_path, tmp_path / "list.csv")) == {"zumba/x": "zumba"}

    def test_a_class_list_covers_an_excerpt(self, tmp_path: Path, test_data: Path) -> None:
        folder = test_data / "annotations" / "kinetics400"
        classes = read_class_list(folder / "label_map.txt")
        path = folder / "kinetics-400_val.csv"
        listing = read("kinetics", test_data / "clips" / "kinetics400", path, "val", classes=classes)
        assert labels(listing) == {"using_segway/SOX5yA1l24A": "using segway"}
        assert len(listing.classes) == 400
        assert listing.clips[0].label == classes.index("using segway")

    def test_faults(self, tmp_path: Path, test_data: Path) -> None:
        folder = test_data / "annotations" / "kinetics400"
        with pytest.raises(MdlError, match="no column 'label'") as fault:
            read("kinetics", tmp_path, folder / "kinetics-400_test.csv", "test")
        assert "carry no labels" in str(fault.value.fix)
        with pytest.raises(MdlError, match="none of the 400 listed files is there"):
            read("kinetics", tmp_path, folder / "tiny_val.csv", "val")
        with pytest.raises(MdlError, match="CSV file is not given"):
            read("kinetics", tmp_path)


@pytest.mark.parametrize("form", list(FORMATS))
def test_every_format_refuses_a_missing_source(form: str, tmp_path: Path) -> None:
    with pytest.raises(MdlError, match="no such directory"):
        read(form, tmp_path / "none")
