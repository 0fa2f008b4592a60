"""Something-Something v2, Moments in Time, ActivityNet and Kinetics-600/700: published files and their faults."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mdltool.data.decode import decode
from mdltool.data.formats import FORMATS
from mdltool.data.formats.common import in_order, read_class_list
from mdltool.data.index import ShardIndex
from mdltool.errors import MdlError
from mdltool.stages.shard import Dataset, run
from mdltool.types import Listing
from tests.data.test_formats import labels, read, touch
from tests.data.tiny_shards import make_video


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("base", [0, 1])
def test_numbered_classes_come_in_the_order_of_their_numbers(base: int) -> None:
    numbers = {"c": str(base + 2), "a": base, "b": f"{base + 1}"}
    assert in_order(numbers, Path("labels.json")) == (("a", "b", "c"), base)


@pytest.mark.parametrize(
    ("numbers", "what"),
    [
        ({}, "it is empty"),
        ({"a": 2, "b": 3}, "2 classes have numbers from 2 to 3"),
        ({"a": 0, "b": 2}, "2 classes have numbers from 0 to 2"),
        ({"a": 0, "b": "0"}, "two classes have the number 0: 'a', 'b'"),
        ({"a": "x"}, "the class 'a' has the number 'x'"),
        ({"a": -1}, "the class 'a' has the number -1"),
        ({"a": None}, "the class 'a' has the number None"),
    ],
)
def test_faults_of_numbered_classes(numbers: dict[str, Any], what: str) -> None:
    with pytest.raises(MdlError, match=what):
        in_order(numbers, Path("labels.json"))


class TestSsv2:
    LABELS = {"Opening something": "1", "Closing something": "0", "Moving something up": "2"}  # noqa: RUF012

    def lists(self, folder: Path, prefix: str = "something-something-v2-") -> Path:
        write_json(folder / f"{prefix}labels.json", self.LABELS)
        records = [
            {"id": "7", "label": "opening a jar", "template": "Opening [something]", "placeholders": ["a jar"]},
            {"id": "8", "label": "closing it", "template": "Closing [something]", "placeholders": ["it"]},
        ]
        write_json(folder / f"{prefix}train.json", records)
        write_json(folder / f"{prefix}validation.json", [{"id": "9", "template": "Moving [something] up"}])
        write_json(folder / f"{prefix}test.json", [{"id": "10"}])
        return folder

    def test_the_published_records(self, tmp_path: Path, test_data: Path) -> None:
        folder = test_data / "annotations" / "something_something_v2"
        records = json.loads((folder / "train_5shot.json").read_text())
        touch(tmp_path / "videos", *(f"{record['id']}.webm" for record in records[::3]))
        for name in ("something-something-v2-labels.json", "ssv2_labels_string_index.json"):
            lists = tmp_path / name.removesuffix(".json")
            lists.mkdir()
            (lists / "labels.json").write_bytes((folder / name).read_bytes())
            (lists / "train.json").write_bytes((folder / "train_5shot.json").read_bytes())
            listing = read("ssv2", tmp_path / "videos", lists)
            official = {key: int(number) for key, number in json.loads((folder / name).read_text()).items()}
            assert {c: i for i, c in enumerate(listing.classes)} == official
            assert len(official) == 174
            expected = {r["id"]: r["template"].replace("[", "").replace("]", "") for r in records}
            assert labels(listing) == {r["id"]: expected[r["id"]] for r in records[::3]}
            assert len(listing.clips) + len(listing.missing) == len(records) == 430
            assert "list: train.json, 430 clips" in listing.notes
            assert "labels: 0-based, labels.json" in listing.notes
            assert f"classes: {len({expected[r['id']] for r in records[::3]})} seen of 174 listed" in listing.notes

    def test_the_real_clip(self, tmp_path: Path, test_data: Path) -> None:
        name = "Poking something so that it falls over"
        folder = test_data / "annotations" / "something_something_v2"
        classes = read_class_list(folder / "label_map.txt")
        path = write_json(
            tmp_path / "train.json", [{"id": "166766", "template": name.replace("something", "[something]")}]
        )
        listing = read("ssv2", test_data / "clips" / "ssv2", path, classes=classes)
        assert labels(listing) == {f"{name}/166766": name}

    @pytest.mark.parametrize("prefix", ["something-something-v2-", ""])
    def test_lists_of_both_releases_beside_the_videos_or_given(self, tmp_path: Path, prefix: str) -> None:
        touch(tmp_path / "20bn-something-something-v2", "7.webm", "9.mp4")
        source, lists = tmp_path / "20bn-something-something-v2", self.lists(tmp_path / "labels", prefix)
        assert labels(read("ssv2", source)) == {"7": "Opening something"}
        assert labels(read("ssv2", source, lists, "val")) == {"9": "Moving something up"}
        listing = read("ssv2", source, lists / f"{prefix}train.json")
        assert listing.classes == ("Closing something", "Opening something", "Moving something up")
        assert listing.missing == (("8", "no file 8.webm"),)

    def test_the_answers_of_the_test_list(self, tmp_path: Path) -> None:
        lists = self.lists(tmp_path / "labels", "")
        touch(tmp_path / "videos", "10.webm")
        with pytest.raises(MdlError, match="there is no 'template'") as fault:
            read("ssv2", tmp_path / "videos", lists, "test")
        assert "test-answers.csv" in str(fault.value.fix)
        (lists / "test-answers.csv").write_text('10;Opening something\n11;"Closing something"\n')
        listing = read("ssv2", tmp_path / "videos", lists, "test")
        assert labels(listing) == {"10": "Opening something"}
        assert [key for key, _ in listing.missing] == ["11"]
        (lists / "test-answers.csv").write_text("10,Opening something\n")
        with pytest.raises(MdlError, match="expected '<id>;<class>'"):
            read("ssv2", tmp_path / "videos", lists, "test")

    @pytest.mark.parametrize(
        ("content", "what", "where"),
        [
            ("{", "not a JSON file", "train.json"),
            ("{}", "expected a list of records", "train.json"),
            ("[]", "expected a list of records", "train.json"),
            ('["7"]', "expected an object", "record 0"),
            ('[{"template": "Opening [something]"}]', "there is no 'id'", "record 0"),
            ('[{"id": "7", "template": ""}]', "'template' is ''", "record 0"),
            ('[{"id": "7", "template": "Openin [something]"}]', "'Openin something' is not in", "record 0"),
            ('[{"id": "6", "template": "Opening [something]"}]', "none of the 1 listed files", "train.json"),
        ],
    )
    def test_faults(self, tmp_path: Path, content: str, what: str, where: str) -> None:
        lists = self.lists(tmp_path / "labels", "")
        touch(tmp_path / "videos", "7.webm")
        (lists / "train.json").write_text(content)
        with pytest.raises(MdlError, match=what) as fault:
            read("ssv2", tmp_path / "videos", lists)
        assert where in str(fault.value.where)

    def test_faults_of_the_folder(self, tmp_path: Path) -> None:
        videos = touch(tmp_path / "videos", "7.webm")
        with pytest.raises(MdlError, match=r"there is no something-something-v2-train\.json or train\.json"):
            read("ssv2", videos, tmp_path)
        with pytest.raises(MdlError, match="no split 'dev'"):
            read("ssv2", videos, tmp_path, "dev")
        (self.lists(tmp_path, "") / "labels.json").unlink()
        with pytest.raises(MdlError, match="the labels file is not beside the list"):
            read("ssv2", videos, tmp_path)
        assert len(read("ssv2", videos, tmp_path, classes=list(self.LABELS)).clips) == 1


class TestMit:
    def lists(self, folder: Path, categories: str = "clapping,1\nplaying+fun,0\n") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "moments_categories.txt").write_text(categories)
        (folder / "trainingSet.csv").write_text(
            "clapping/yt-5of6ffo6-Bw_205.mp4,clapping,3,1\nplaying+fun/a.b_1.mp4,playing+fun,4,0\n"
        )
        (folder / "validationSet.csv").write_text("playing+fun/c.mp4,playing+fun,4,0\n")
        return folder

    @pytest.mark.parametrize("layout", ["training/{}/{}", "{}/{}", "{1}"])
    def test_every_layout(self, tmp_path: Path, layout: str) -> None:
        source = self.lists(tmp_path / "mit")
        touch(
            source, layout.format("clapping", "yt-5of6ffo6-Bw_205.mp4"), layout.format("playing+fun", "a.b_1.webm")
        )
        listing = read("mit", source)
        found = {key.rsplit("/", 1)[-1]: name for key, name in labels(listing).items()}
        assert found == {"yt-5of6ffo6-Bw_205": "clapping", "a_b_1": "playing+fun"}
        assert listing.classes == ("playing+fun", "clapping")
        assert {"list: trainingSet.csv, 2 clips", "labels: 0-based, moments_categories.txt"} <= set(listing.notes)
        with pytest.raises(MdlError, match=r"none of the 1 listed files is there.*c\.mp4"):
            read("mit", source, split="val")

    def test_the_published_classes(self, tmp_path: Path, test_data: Path) -> None:
        published = test_data / "annotations" / "moments_in_time" / "category_momentsv2.txt"
        names = published.read_text().split("\n")[:305]
        rows = [f"{name}/v{i}.mp4,{name},3,0" for i, name in enumerate(names)]
        touch(tmp_path / "training", *(row.split(",")[0] for row in rows))
        (tmp_path / "trainingSet.csv").write_text("\n".join(rows))
        (tmp_path / "moments_categories.txt").write_bytes(published.read_bytes())
        listing = read("mit", tmp_path)
        assert list(listing.classes) == names
        assert [clip.label for clip in listing.clips] == list(range(305))
        assert read("mit", tmp_path, classes=read_class_list(published)).classes == listing.classes

    def test_a_file_of_another_class_is_not_this_rows(self, tmp_path: Path) -> None:
        lists = self.lists(tmp_path / "lists")
        (lists / "trainingSet.csv").write_text("clapping/x.mp4,clapping,3,1\nplaying+fun/x.mp4,playing+fun,3,1\n")
        both = read("mit", touch(tmp_path / "both", "clapping/x.mp4", "playing+fun/x.mp4"), lists)
        assert labels(both) == {"clapping/x": "clapping", "playing+fun/x": "playing+fun"}
        one = read("mit", touch(tmp_path / "one", "clapping/x.mp4"), lists)
        assert labels(one) == {"clapping/x": "clapping"}
        assert one.missing == (("playing+fun/x", "no file playing+fun/x.mp4"),)

    @pytest.mark.parametrize(
        ("text", "what"),
        [
            ("", "no rows"),
            ("clapping/x.mp4\n", "expected '<path>,<label>"),
            ("clapping/x.mp4,claping,3,1\n", "'claping' is not in the class list"),
        ],
    )
    def test_faults_of_the_list(self, tmp_path: Path, text: str, what: str) -> None:
        (self.lists(tmp_path) / "trainingSet.csv").write_text(text)
        with pytest.raises(MdlError, match=what):
            read("mit", touch(tmp_path, "clapping/x.mp4"))

    def test_faults_of_the_folder(self, tmp_path: Path) -> None:
        source = tmp_path / "a" / "mit"
        with pytest.raises(MdlError, match=r"trainingSet\.csv is not there"):
            read("mit", touch(source, "clapping/x.mp4"))
        with pytest.raises(MdlError, match="no labels of 'test' are published"):
            read("mit", source, split="test")
        with pytest.raises(MdlError, match="'clapping' stands twice"):
            read("mit", self.lists(source, "clapping,0\nclapping,1\n"))
        (source / "moments_categories.txt").unlink()
        with pytest.raises(MdlError, match=r"moments_categories\.txt is not beside"):
            read("mit", source)


def entry(
    subset: str | None, *annotations: tuple[float, float, Any], duration: float | None = 60.0
) -> dict[str, Any]:
    found: dict[str, Any] = {"annotations": [{"segment": [a, b], "label": name} for a, b, name in annotations]}
    return found | {k: v for k, v in (("subset", subset), ("duration", duration)) if v is not None}


class TestActivityNet:
    def read(
        self, folder: Path, videos: dict[str, Any], files: Sequence[str] | None = None, **words: Any
    ) -> Listing:
        (folder / "videos").mkdir(exist_ok=True)
        touch(folder / "videos", *(files if files is not None else [f"v_{name}.mp4" for name in videos]))
        path = write_json(folder / "activity_net.v1-3.min.json", {"version": "1.3", "database": videos})
        return read("activitynet", folder / "videos", path, **words)

    def spans(self, listing: Listing) -> list[tuple[float | None, float | None]]:
        return [(clip.start_s, clip.end_s) for clip in listing.clips]

    @pytest.mark.parametrize(
        ("segment", "spans"),
        [
            ((0, 20), [(0, 10), (10, 20)]),
            ((5.5, 28.25), [(5.5, 15.5), (15.5, 25.5), (25.5, 28.25)]),
            ((0, 11), [(0, 10), (10, 11)]),
            ((0, 10.999), [(0, 10)]),
            ((0, 1), [(0, 1)]),
            ((50, 75.3), [(50, 60)]),  # the video ends at 60 s
            ((58.9, 75), [(58.9, 60)]),
        ],
    )
    def test_segments_are_cut_from_their_start(
        self, tmp_path: Path, segment: tuple[float, float], spans: list[tuple[float, float]]
    ) -> None:
        listing = self.read(tmp_path, {"abc": entry("training", (*segment, "Polo"))})
        assert self.spans(listing) == spans
        assert all(clip.key.startswith("v_abc_000") for clip in listing.clips)

    def test_subsets_share_the_classes_and_notes_count_them(self, tmp_path: Path) -> None:
        videos = {
            "a": entry("training", (0, 25, "Polo"), (30, 30.5, "Polo"), (40, 50, "Ballet")),
            "b": entry("validation", (0, 9, "Zumba")),
            "c": entry("testing"),
            "d": entry("training", (0, 5, "Ballet")),
        }
        listing = self.read(tmp_path, videos, ["v_a.mkv", "deep/b.mp4"])
        assert listing.classes == ("Ballet", "Polo", "Zumba")
        assert list(labels(listing).values()) == ["Polo"] * 3 + ["Ballet"]
        assert listing.missing == (("v_d_00000000_00005000", "no file v_d.* or d.*"),)
        assert listing.notes[0] == "videos: testing 1, training 2, validation 1"
        assert "segments: 4 cut into 5 clips of at most 10 s" in listing.notes
        assert "left out: 1 pieces below 1 s" in listing.notes
        assert "classes: 2 seen of 3 listed" in listing.notes
        val = self.read(tmp_path, videos, [], split="val")
        assert (val.classes, labels(val)) == (listing.classes, {"deep/b_00000000_00009000": "Zumba"})
        with pytest.raises(MdlError, match=r"no labelled video is of 'test' \(the file has: testing 1, training 2"):
            self.read(tmp_path, videos, [], split="test")

    def test_the_first_of_several_labels_counts(self, tmp_path: Path) -> None:
        videos = {"a": entry("training", (0, 10, ["Polo", "Zumba"]), (0, 15, "Ballet"), (0, 10, "Ballet"))}
        listing = self.read(tmp_path, videos)
        assert labels(listing) == {"v_a_00000000_00010000": "Polo", "v_a_00010000_00015000": "Ballet"}
        assert any(note.startswith("repeated: 2 spans") for note in listing.notes)

    def test_the_published_layouts(self, tmp_path: Path, test_data: Path) -> None:
        folder = test_data / "annotations" / "activitynet"
        classes = read_class_list(folder / "label_map.txt")
        touch(tmp_path, "v_bYUmtLBL7W4.mp4")
        listing = read("activitynet", tmp_path, folder / "gt.json", "val", classes=classes)
        # 45.5, 57.3 and 65.8 s in pieces of 10 s
        assert len(listing.clips) == 5 + 6 + 7
        assert {listing.classes[clip.label] for clip in listing.clips} == {"Wakeboarding"}
        assert all(0 < c.end_s - c.start_s <= 10.001 for c in listing.clips)  # type: ignore[operator]

    def test_published_segments_are_covered_but_for_rests_below_a_second(
        self, tmp_path: Path, test_data: Path
    ) -> None:
        folder = test_data / "annotations" / "activitynet"
        videos = json.loads((folder / "anet_anno_action.json").read_text())
        touch(tmp_path, *(f"{name}.mp4" for name in videos))
        listing = read("activitynet", tmp_path, folder / "anet_anno_action.json")
        assert listing.notes[0] == "videos: 300, all taken: this file names no subsets"
        known = set(read_class_list(folder / "label_map.txt"))
        assert set(listing.classes) <= known
        assert len(listing.classes) == 129
        covered: dict[str, float] = {}
        for clip in listing.clips:
            assert clip.start_s is not None
            assert clip.end_s is not None
            assert 1.0 <= round(clip.end_s - clip.start_s, 3) <= 10.0
            covered[clip.video.stem] = covered.get(clip.video.stem, 0.0) + clip.end_s - clip.start_s
        for name, video in videos.items():
            spans = [
                (a["segment"][0], min(a["segment"][1], video["duration_second"])) for a in video["annotations"]
            ]
            annotated = sum(end - start for start, end in spans)
            assert annotated - len(spans) - 0.01 <= covered.get(name, 0.0) <= annotated + 0.01

    def test_clips_of_a_real_video_show_their_seconds(self, tmp_path: Path) -> None:
        (tmp_path / "videos").mkdir()
        (tmp_path / "videos" / "v_abcdefghijk.mp4").write_bytes(make_video(140, rate=10))
        path = write_json(
            tmp_path / "anet.json", {"database": {"abcdefghijk": entry("training", (0.5, 13.5, "Polo"))}}
        )
        dataset = Dataset(tmp_path / "videos", "activitynet", "anet", "train", path)
        index = ShardIndex.open(run(dataset, tmp_path / "out"))
        assert sorted(index.keys) == ["v_abcdefghijk_00000500_00010500", "v_abcdefghijk_00010500_00013500"]
        metadata, video = index.clip(index.keys.index("v_abcdefghijk_00010500_00013500"))
        got = decode(video, lambda t: range(len(t)), trim=tuple(metadata["trim"]))
        expected = decode(tmp_path / "videos" / "v_abcdefghijk.mp4", lambda t: range(105, 135))
        assert bool((got.frames == expected.frames).all())

    @pytest.mark.parametrize(
        ("videos", "what"),
        [
            ([], "expected an object"),
            ({}, "lists no videos"),
            ({"a": []}, "expected an object"),
            ({"a": {"subset": 3}}, "the subset is 3"),
            ({"a": {"annotations": 3}}, "'annotations' is 3, no list"),
            ({"a": {"annotations": [{"label": "Polo"}]}}, r"the segment is None, not \[start, end\]"),
            ({"a": {"annotations": [{"segment": [0, 9]}]}}, "the label is None"),
            ({"a": entry("training", (float("nan"), 9, "Polo"))}, "nan is no time in seconds"),
            ({"a": entry("training", (-2, 9, "Polo"))}, "-2 s is no time in a video"),
            ({"a": entry("training", (0, 1e12, "Polo"))}, "1e[+]12 s is no time in a video"),
            ({"a": entry("training", (9, 2, "Polo"))}, "no labelled video is of 'train'"),
        ],
    )
    def test_faults(self, tmp_path: Path, videos: Any, what: str) -> None:
        with pytest.raises(MdlError, match=what):
            self.read(tmp_path, videos)

    def test_the_file_is_found_in_its_folder_or_asked_for(self, tmp_path: Path) -> None:
        self.read(tmp_path, {"a": entry("training", (0, 9, "Polo"))})
        assert len(read("activitynet", tmp_path / "videos", tmp_path).clips) == 1
        with pytest.raises(MdlError, match="JSON file is not given"):
            read("activitynet", tmp_path)
        with pytest.raises(MdlError, match="holds 0 files activity_net"):
            read("activitynet", tmp_path, tmp_path / "videos")


class TestLaterKinetics:
    """Kinetics-600 and 700: no is_cc column, no quotes but where needed, 'validate', several clips of one video."""

    TEXT = (
        "label,youtube_id,time_start,time_end,split\n"
        "testifying,---QUuC4vJs,84,94,{0}\n"
        "washing feet,--GkrdYZ9Tc,0,10,{0}\n"
        "washing feet,--GkrdYZ9Tc,20,30,{0}\n"
        '"passing American football (not in game)",_0-nQbRBEz2,104.0,114.0,{0}\n'
        "massaging person's head,zz-nQbRBEz2,1,11,train\n"
    )

    def test_their_columns(self, tmp_path: Path) -> None:
        (tmp_path / "list.csv").write_text(self.TEXT.format("validate"))
        names = ("---QUuC4vJs_000084_000094", "--GkrdYZ9Tc_000000_000010", "--GkrdYZ9Tc_000020_000030")
        files = (*(f"washing feet/{name}.mp4" for name in names), "_0-nQbRBEz2_000104_000114.mp4")
        listing = read("kinetics", touch(tmp_path / "videos", *files), tmp_path / "list.csv", "val")
        football = "passing American football (not in game)"
        assert [listing.classes[clip.label] for clip in listing.clips] == [
            "testifying",
            "washing feet",
            "washing feet",
            football,
        ]
        assert listing.classes == ("massaging person's head", football, "testifying", "washing feet")
        assert "classes: 3 seen of 4 listed" in listing.notes


def test_every_format_of_the_table_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "shard.md").read_text()
    assert [name for name in FORMATS if f"| `{name}` |" not in text] == []
