"""Transcripts by time: four formats with the same content, and what of them a clip gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mdltool.data.modalities import Absent, Part, Utterance
from mdltool.data.modalities.transcripts import TextOptions, encode_text, read_text
from mdltool.errors import MdlError

SAID = [(0.0, 1.5, "hello there"), (2.25, 4.0, "cut the ñora, now"), (61.0, 62.5, "done")]
FORMS = {
    "a.csv": 'start,end,text\n0,1.5,hello there\n2.25,00:04,"cut the ñora, now"\n00:01:01,62.5,done\n5,6,\n',
    "a.json": json.dumps([{"start": a, "end": b, "text": t} for a, b, t in SAID]),
    "b.json": json.dumps({"segments": [{"start": a, "end": str(b), "text": f" {t}"} for a, b, t in SAID]}),
    "c.json": json.dumps({"kitchen/v.mp4": [{"start": a, "end": b, "text": t} for a, b, t in SAID], "w": []}),
    "a.srt": "1\n00:00:00,000 --> 00:00:01,500\nhello\nthere\n\n2\n00:00:02,250 --> 00:00:04,000\n"
    "<i>cut the ñora, now</i>\n\n3\n00:01:01,000 --> 00:01:02,500\ndone\n",
    "a.vtt": "WEBVTT\n\nNOTE nothing\n\n00:00.000 --> 00:01.500 align:start\nhello there\n\n"
    "00:02.250 --> 00:04.000\n<v Ana>cut the &#241;ora, now\n\n01:01.000 --> 01:02.500\ndone\n",
}
NAMES = ("kitchen/v", "v")


def part(start_s: float, duration_s: float) -> Part:
    return Part(Path("v.mp4"), start_s, duration_s, Path("v.mp4"))


def read(path: Path, start_s: float = 0.0, duration_s: float = 100.0, speaker: str = "") -> list[Utterance]:
    return read_text(part(start_s, duration_s), path, NAMES, TextOptions(speaker))


@pytest.mark.parametrize("name", FORMS)
def test_every_form_says_the_same(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + FORMS[name].replace("\n", "\r\n").encode())
    assert [(u.start_s, u.end_s, u.text) for u in read(path)] == SAID
    (own,) = read(path, 3.0, 2.0)
    assert (own.start_s, own.end_s, own.text) == (-0.75, 1.0, "cut the ñora, now"), "relative to the clip"


def test_one_speakers_utterances(tmp_path: Path) -> None:
    csv, srt = tmp_path / "t.csv", tmp_path / "t.srt"
    csv.write_text("start,end,text,speaker,video\n0,1,hi,ana,v\n1,2,bye,ben,v\n2,3,else,ana,w\n")
    srt.write_text("1\n00:00:00,000 --> 00:00:01,000\nana: hi\n\n2\n00:00:01,000 --> 00:00:02,000\nben: bye\n")
    for path in (csv, srt):
        assert [(u.text, u.speaker) for u in read(path, speaker="ana")] == [("hi", "ana")]
    assert encode_text(read(csv, speaker="ben")) == [
        {"start_s": 1.0, "end_s": 2.0, "text": "bye", "speaker": "ben"}
    ]


def test_why_a_clip_has_none(tmp_path: Path) -> None:
    path = tmp_path / "t.srt"
    path.write_text(FORMS["a.srt"])
    for start_s, speaker, reason in (
        (70.0, "", r"the transcript t\.srt ends at 62\.5 s, before the clip \(from 70 s\)"),
        (10.0, "", "nothing is said in the clip"),
        (0.0, "ana", r"t\.srt has no utterance of ana of this video"),
    ):
        with pytest.raises(Absent, match=reason):
            read(path, start_s, 5.0, speaker)
    with pytest.raises(Absent, match="no transcript of this video"):
        read_text(part(0.0, 1.0), None, NAMES, TextOptions())


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("t.csv", "from,to,text\n", "no column 'start' .it has: from, to, text"),
        ("t.csv", "start,end,text\n0,soon,hi\n", "'soon' in 'end' is no time"),
        ("t.csv", "start,end,text\n4,2,hi\n", "ends at 2 s, before it starts"),
        ("t.csv", "start,end,text\n0,1,well, yes\n", "the row has 4 cells, the first line 3"),
        ("t.csv", "start,end,text\n0,5,1,5,hi\n", "the row has 5 cells"),
        ("t.csv", "start,end,text,video\n0,1,hi\n", "the row has 3 cells, the first line 4"),
        ("t.csv", 'start,end,text\n0,1,"never closed\n2,3,lost\n', "is not CSV .unexpected end"),
        ("t.csv", f'start,end,text\n0,1,"{"x" * 140_000}"\n', "is not CSV .field larger"),
        ("t.json", "{", "is not JSON"),
        ("t.json", "[" * 100_000, "is not JSON"),
        ("t.json", '{"language": "en"}', "no list of utterances"),
        ("t.json", "[3]", "this is no utterance"),
        ("t.srt", "1\n--> 00:00:01,000\nhi\n", "no times"),
    ],
)
def test_faults_name_the_place(name: str, content: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(MdlError, match=what) as told:
        read(path)
    assert name in str(told.value.where)


def test_lines_inside_a_cell(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('start,end,text\n0,1,"hello\nworld"\n2,3,a\u2028b\n\n4,5,ok\n', "utf-8")
    assert [u.text for u in read(path)] == ["hello world", "a b", "ok"]


def test_cues_without_a_blank_line_between_them_and_signs_that_are_no_tags(tmp_path: Path) -> None:
    path = tmp_path / "t.srt"
    path.write_text(
        "1\n00:00:01,000 --> 00:00:02,000\n<i>hello</i>\n42 of them\n2\n00:00:03,000 --> 00:00:04,000\n"
        "a < b and I <3 you > me\n00:00:05,000 --> 00:00:06,000\n\n"
        "4\n00:00:07,000 --> 00:00:08,000\n<00:07.500>late\n"
    )
    assert [(u.start_s, u.text) for u in read(path)] == [
        (1.0, "hello 42 of them"),
        (3.0, "a < b and I <3 you > me"),
        (7.0, "late"),
    ]


def test_names_of_videos_may_have_dots(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("start,end,text,video\n0,1,a,talk.v12\n0,1,b,talk.v13\n0,1,c,talk.v14.MP4\n")
    for name, text in (("talk.v12", "a"), ("talk.v13", "b"), ("talk.v14", "c")):
        said = read_text(part(0.0, 2.0), path, (name,), TextOptions())
        assert [u.text for u in said] == [text]


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "t.srt"
    path.write_bytes("ñ".encode("latin-1"))
    with pytest.raises(MdlError, match="not UTF-8"):
        read(path)
