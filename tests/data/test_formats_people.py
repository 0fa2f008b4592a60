"""MPIIGroupInteraction and UDIVA: snippets and windows, labels, side files and participants."""

from __future__ import annotations

import wave
from pathlib import Path

import pytest

from mdltool.data.formats.udiva import TRAITS
from mdltool.data.index import ShardIndex
from mdltool.data.modalities.asked import asked
from mdltool.data.modalities.plan import Streams
from mdltool.data.modalities.video import streams_of_video
from mdltool.errors import MdlError
from mdltool.stages.shard import Dataset, Writing, run
from tests.data.test_formats import read, touch
from tests.data.tiny_shards import make_video
from tests.data.tiny_sound import RATE, tone
from tests.data.tiny_sound import make_video as make_sounding

BEHAVIOURS = ("Settle", "Legs crossed", "Groom")


class TestMpiigi:
    def folder(self, tmp_path: Path, inner: str = "clips_train", rows: str = "1,1,0,1\n2,0,0,0\n3,0,1,0\n") -> Path:
        touch(tmp_path / "clips_train", *(f"{inner}/{n:05d}-video.mp4" for n in (1, 2)))
        touch(tmp_path / "clips_train", *(f"{inner}/00001-audio{k}.wav" for k in range(3)))
        (tmp_path / "bodily_train.csv").write_text(f"clip,{','.join(BEHAVIOURS)}\n{rows}")
        (tmp_path / "bodily_val.csv").write_text("clip,Settle\n1,0\n")
        return tmp_path

    @pytest.mark.parametrize("inner", [".", "clips_train"])
    def test_reads_snippets_labels_and_microphones(self, tmp_path: Path, inner: str) -> None:
        listing = read("mpiigi", self.folder(tmp_path, inner), None, "train")
        assert (listing.task, listing.classes) == ("multi_label", BEHAVIOURS)
        first, second = listing.clips
        assert (first.label, second.label) == ((0, 2), ())
        folder = first.video.parent
        assert first.sides == {f"audio_mic{k}": folder / f"00001-audio{k}.wav" for k in range(3)}
        assert second.sides == {}
        assert listing.missing == (("clips_train/3", "no file 3-video.*"),)
        assert "microphones: beside 1 snippets" in listing.notes

    @pytest.mark.parametrize("split", ["val", "validation"])
    def test_snippets_of_another_split_are_not_taken(self, tmp_path: Path, split: str) -> None:
        """Every split's snippets count from 1."""
        folder = self.folder(tmp_path, inner=".")
        labels = folder / "bodily_val.csv"
        with pytest.raises(MdlError, match=rf"no folder has the snippets of '{split}' .there is: clips_train"):
            read("mpiigi", folder, labels, split)
        with pytest.raises(MdlError, match="there is: clips_train"):
            read("mpiigi", folder / "clips_train", labels, split)
        touch(folder / "clips_val", "00001-video.mp4")
        (clip,) = read("mpiigi", folder, labels, split).clips
        assert clip.video == folder / "clips_val" / "00001-video.mp4"

    def test_snippets_may_lie_in_the_source_itself(self, tmp_path: Path) -> None:
        touch(tmp_path, "00001-video.mp4")
        (tmp_path / "val.csv").write_text("clip,Settle\n1,0\n")
        assert len(read("mpiigi", tmp_path, None, "val").clips) == 1

    def test_microphones_are_never_the_videos_own_track(self, tmp_path: Path) -> None:
        """Not even where no snippet has one; and `predict` knows from the shards that they are side files."""
        folder = self.folder(tmp_path, inner=".")
        for wav in (folder / "clips_train").glob("*.wav"):
            wav.unlink()
        listing = read("mpiigi", folder, None, "train")
        wanted = asked(("audio_mic0", "audio"), (), (), ())
        streams = Streams(wanted, listing.clips, folder, listing.sides)
        mic, own = streams.of(listing.clips[0])
        assert (mic.plan.side, mic.source, own.plan.side) == (True, None, False)
        assert mic.plan.info.options["side"] is True
        assert "side" not in own.plan.info.options
        video = tmp_path / "v.mkv"
        video.write_bytes(make_sounding(tone(1.0), 1.0))
        infos = {plan.name: plan.info for plan in streams.plans}
        found = streams_of_video(video, infos)
        assert found["audio_mic0"].missing == "it comes from a side file: --side audio_mic0=..."
        assert found["audio"].missing is None
        found = streams_of_video(video, infos, sides={"audio_mic0": video})
        assert found["audio_mic0"].missing is None

    def test_chosen_columns_and_names_of_files(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path, rows="00002-video.mp4,0,1,1\n")
        listing = read("mpiigi", folder, folder / "bodily_train.csv", "train", classes=["Groom", "Settle"])
        assert (listing.classes, listing.clips[0].label) == (("Groom", "Settle"), (0,))

    def test_shards_take_the_microphones_that_the_layout_names(self, tmp_path: Path) -> None:
        """The second snippet has none: its stream is missing, not its video's own track."""
        folder = self.folder(tmp_path, inner=".")
        for n in (1, 2):
            (folder / "clips_train" / f"{n:05d}-video.mp4").write_bytes(
                make_sounding(tone(1.6), 1.6, container="mp4")
            )
        with wave.open(str(folder / "clips_train" / "00001-audio0.wav"), "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))
            file.writeframes(tone(1.6).astype("<i2").tobytes())
        streams = asked(("audio_mic0",), (), (), ("audio_mic0.bands=16", "audio_mic0.fft=512", "audio_mic0.bins=4"))
        index = ShardIndex.open(
            run(Dataset(folder, "mpiigi", "d", "train"), tmp_path / "out", Writing(streams=streams))
        )
        found = {key: index.clip(i)[0]["streams"]["audio_mic0"] for i, key in enumerate(index.keys)}
        assert found["clips_train/00001-video"]["tokens"] > 0
        assert found["clips_train/00002-video"]["tokens"] == 0
        assert found["clips_train/00002-video"]["missing"]
        assert index.streams["audio_mic0"].clips == 1

    @pytest.mark.parametrize(
        ("rows", "split", "what"),
        [
            ("1,2,0,1\n", "train", "'2' in column 'Settle' is not 0 or 1"),
            ("a,1,0,1\n", "train", "'a' is no snippet"),
            ("1,1,0,1\n", "test", "has 0 CSV files with 'test' in their names"),
        ],
    )
    def test_faults(self, tmp_path: Path, rows: str, split: str, what: str) -> None:
        with pytest.raises(MdlError, match=what):
            read("mpiigi", self.folder(tmp_path, rows=rows), None, split)


class TestUdiva:
    def folder(self, tmp_path: Path) -> Path:
        """Two sessions; the second participant of the first is the first of the second."""
        metadata = tmp_path / "metadata_val"
        metadata.mkdir()
        (metadata / "sessions_val.csv").write_text("ID,LANGUAGE,PART.1,PART.2\n002003,es,2,3\n003005,es,3,5\n")
        rows = [f"{person},F,{','.join(str(person + i / 10) for i in range(5))}" for person in (2, 3, 5)]
        (metadata / "parts_val_unmasked.csv").write_text("\n".join([f"ID,GENDER,{','.join(TRAITS)}", *rows]) + "\n")
        (metadata / "parts_val.csv").write_text("ID,GENDER\n2,F\n3,F\n5,F\n")
        short = make_video(140, rate=25, size=(32, 32))
        for session in ("002003", "003005"):
            here = tmp_path / "recordings" / "talk_recordings_val" / session
            here.mkdir(parents=True)
            for camera in (1, 2):
                (here / f"FC{camera}_T.mp4").write_bytes(short if session == "002003" else short[:100])
        touch(tmp_path, "recordings/talk_recordings_val/002003/FC2_T.wav")
        touch(tmp_path, "transcripts/002003/FC1_T.srt", "transcripts/003005_T.srt", "transcripts/002003_A.srt")
        return tmp_path

    def test_windows_traits_sides_and_participants(self, tmp_path: Path) -> None:
        listing = read("udiva", self.folder(tmp_path), None, "val")
        assert (listing.task, listing.classes) == ("regression", TRAITS)
        here = tmp_path / "recordings" / "talk_recordings_val" / "002003"
        assert [(clip.video, clip.start_s, clip.end_s) for clip in listing.clips] == [
            (here / f"FC{camera}_T.mp4", start, start + 2.56) for camera in (1, 2) for start in (0.0, 2.56)
        ]
        assert listing.clips[0].label == (2.0, 2.1, 2.2, 2.3, 2.4)
        assert listing.clips[2].label == (3.0, 3.1, 3.2, 3.3, 3.4)
        one, other = here / "FC1_T.mp4", here / "FC2_T.wav"
        text = tmp_path / "transcripts" / "002003" / "FC1_T.srt"
        assert listing.clips[0].sides == {"audio_self": one, "audio_other": other, "text_self": text}
        assert listing.clips[2].sides == {"audio_self": other, "audio_other": one, "text_other": text}
        assert listing.sides == ("audio_self", "audio_other", "text_self", "text_other", "text")
        keys = [clip.key for clip in listing.clips]
        assert listing.participants == {"2": tuple(keys[:2]), "3": tuple(keys[2:])}
        assert len(listing.missing) == 2, "recordings that cannot be read are missing"

    def test_without_sound_files_a_recording_has_its_own_track(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path)
        (folder / "recordings/talk_recordings_val/002003/FC2_T.wav").unlink()
        listing = read("udiva", folder, None, "val")
        assert "audio_self" not in {*listing.sides, *listing.clips[0].sides}
        assert listing.clips[0].sides["audio_other"] == listing.clips[2].video

    def test_the_others_transcript_is_not_what_lies_beside_a_video(self, tmp_path: Path) -> None:
        listing = read("udiva", self.folder(tmp_path), None, "val")
        (plan,) = Streams(asked(("text_other",), (), (), ()), listing.clips, tmp_path, listing.sides).plans
        video = listing.clips[0].video
        video.with_suffix(".srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nme\n")
        found = streams_of_video(video, {"text_other": plan.info})["text_other"]
        assert found.missing == "it comes from a side file: --side text_other=..."

    def test_shards_name_the_participants(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path)
        index = ShardIndex.open(run(Dataset(folder, "udiva", "udiva", "val"), tmp_path / "out"))
        assert index.participants == {
            person: {key for key in index.keys if f"FC{camera}_T" in key} for person, camera in (("2", 1), ("3", 2))
        }
        assert len(index) == 4

    def test_faults(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path)
        with pytest.raises(MdlError, match=r"there is no sessions_train\.csv"):
            read("udiva", folder, None, "train")
        (folder / "metadata_val" / "parts_val_unmasked.csv").unlink()
        with pytest.raises(MdlError, match="no column 'openmindedness_z'"):
            read("udiva", folder, None, "val")
