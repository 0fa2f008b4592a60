"""Extractors against their definitions, worked out again another way."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from mdltool.data.features import EXTRACTORS, make_extractor
from mdltool.data.features.flow import FlowGrid
from mdltool.data.features.log_mel import LogMel, mel_filters
from mdltool.data.features.text import HashedNgrams
from mdltool.data.modalities import Flow, Sound, Utterance
from mdltool.data.modalities.flow import picked_pairs
from mdltool.errors import MdlError

SMALL = LogMel(bands=24, fft=512, window_ms=10.0, hop_ms=5.0, patch_s=0.2, patch_hop_s=0.1, bins=4)


def noise(seconds: float, rate: int = 8000) -> Sound:
    rng = np.random.default_rng(3)
    return Sound((rng.standard_normal(round(seconds * rate)) * 4000).astype(np.int16), rate)


def mel_spectrogram(wave: np.ndarray, rate: int, fft: int, window: int, hop: int, bands: int) -> np.ndarray:
    """torchaudio.transforms.MelSpectrogram(...)(wave), pad_mode="constant", from its formulas, frame by frame."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)  # periodic
    left = (fft - window) // 2
    hann = np.pad(hann, (left, fft - window - left))
    padded = np.pad(wave, fft // 2)
    frames = [padded[at : at + fft] * hann for at in range(0, len(padded) - fft + 1, hop)]
    power = np.array([np.abs(np.fft.rfft(frame)) ** 2 for frame in frames]).T
    top = 2595 * np.log10(1 + (rate / 2) / 700)
    corners = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)
    bank = np.zeros((bands, fft // 2 + 1))
    for band in range(bands):
        low, middle, high = corners[band : band + 3]
        for k in range(fft // 2 + 1):
            f = k * rate / fft
            if low < f <= middle:
                bank[band, k] = (f - low) / (middle - low)
            elif middle < f < high:
                bank[band, k] = (high - f) / (high - middle)
    return bank @ power


class TestLogMel:
    def test_is_the_published_spectrogram(self) -> None:
        sound = noise(0.5)
        wave = sound.samples_N / 32768
        wanted = np.log(mel_spectrogram(wave, 8000, 512, 80, 40, 24) + 1e-6)
        assert np.abs(SMALL.log_mel(sound, len(wave)).numpy() - wanted).max() < 1e-9

    def test_blocks_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sound = noise(0.55)
        whole = SMALL(sound).tokens_MD
        monkeypatch.setattr("mdltool.data.features.log_mel._BLOCK", 7)
        assert np.array_equal(SMALL(sound).tokens_MD, whole)

    @pytest.mark.parametrize(
        ("extractor", "rate", "what"),
        [
            (LogMel(), 44_100, "hop_ms 5 is 220.5 samples at 44100 a second"),
            (LogMel(patch_hop_s=0.4825, hop_ms=10.0), 24_000, "patch_hop_s 48.25 hops: not whole numbers"),
            (LogMel(fft=128), 24_000, "a window of 240 samples does not fit into 128 points"),
        ],
    )
    def test_rates_at_which_tokens_would_drift_are_refused(self, extractor: LogMel, rate: int, what: str) -> None:
        with pytest.raises(MdlError, match=what):
            extractor.check_rate(rate, "--set audio")
        LogMel(hop_ms=10.0).check_rate(44_100, "--set audio")

    def test_tokens_are_patches_pooled_over_time(self) -> None:
        sound = noise(0.55)
        tokens = SMALL(sound)
        assert tokens.tokens_MD.shape == (5, 96) == (5, SMALL.width)
        assert tokens.times_M2.round(6).tolist() == [[0, 0.2], [0.1, 0.3], [0.2, 0.4], [0.3, 0.5], [0.4, 0.55]]
        mel_LT = SMALL.log_mel(sound, round(0.6 * 8000)).numpy()
        third = mel_LT[:, 40:80].reshape(24, 4, 10).mean(2).T.ravel()
        assert np.allclose(tokens.tokens_MD[2], third, atol=1e-5)

    def test_no_band_is_empty_with_the_defaults(self) -> None:
        assert (mel_filters(128, LogMel().fft, 24_000).sum(1) > 0).all()
        assert LogMel().width == 1024

    def test_sound_shorter_than_a_patch_is_one_token(self) -> None:
        short = LogMel()(Sound(np.ones(7, np.int16), 24_000))
        assert short.tokens_MD.shape == (1, 1024)
        assert np.isfinite(short.tokens_MD).all()
        assert short.times_M2.tolist() == [[0, 7 / 24_000]]

    @pytest.mark.parametrize(("seconds", "count"), [(0.96, 1), (0.97, 2), (1.44, 2), (1.45, 3), (10.0, 20)])
    def test_patches_cover_the_clip(self, seconds: float, count: int) -> None:
        silence = Sound(np.zeros(round(seconds * 8000), np.int16), 8000)
        assert len(LogMel(bands=2, fft=128).__call__(silence).tokens_MD) == count


class TestFlowGrid:
    def test_a_stack_is_a_token(self) -> None:
        rows = picked_pairs(12, 3, 2)
        assert rows.tolist() == [[0, 1], [5, 6], [10, 11]]
        pixels = np.full((12, 2, 14, 21), 128, np.uint8)
        pixels[5, 0, :, :3] = 255
        pixels[6, 1] = 1
        times = np.arange(12)[:, None] / 10 + [0.0, 0.1]
        found = FlowGrid(pairs=2, grid=7)(Flow(pixels, times, rows))
        assert found.tokens_MD.shape == (3, 2 * 2 * 49)
        pairs = found.tokens_MD.reshape(3, 2, 2, 7, 7)
        assert (pairs[1, 0, 0, :, 0] == 1).all()
        assert (pairs[1, 1, 1] == -1).all()
        assert not pairs[[0, 2]].any()
        assert found.times_M2[1].round(6).tolist() == [0.5, 0.7]

    def test_few_pairs_are_repeated(self) -> None:
        assert picked_pairs(2, 3, 5).tolist() == [[0, 1, 1, 1, 1]] * 3
        assert picked_pairs(1, 1, 2).tolist() == [[0, 0]]


class TestHashedNgrams:
    def test_counts_what_the_hash_says(self) -> None:
        """crc32 is the same everywhere, unlike Python's hash."""
        wanted = np.zeros(64)
        for ngram in ("ab", "<ab", "ab>", "<ab>"):
            number = zlib.crc32(ngram.encode())
            wanted[(number >> 1) % 64] += 1 if number % 2 else -1
        (token,) = HashedNgrams(64)([Utterance(0.0, 1.0, "AB!")]).tokens_MD
        assert np.allclose(token, wanted / np.linalg.norm(wanted))

    def test_an_utterance_or_a_word_is_a_token(self) -> None:
        said = [Utterance(0.0, 3.0, "Cut the Ñora"), Utterance(4.0, 5.0, "...")]
        whole = HashedNgrams()(said)
        words = HashedNgrams(unit="word")(said)
        assert whole.tokens_MD.shape == (2, 512)
        assert words.times_M2.tolist() == [[0, 1], [1, 2], [2, 3], [4, 5]]
        assert np.allclose(np.linalg.norm(words.tokens_MD, axis=1), [1, 1, 1, 0])
        again = HashedNgrams(unit="word")([Utterance(9.0, 9.5, "ñora")])
        assert np.array_equal(again.tokens_MD[0], words.tokens_MD[2])


class TestTransformers:
    @pytest.fixture(scope="class")
    def encoder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A tiny text encoder with random weights, as save_pretrained writes it."""
        transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
        folder = tmp_path_factory.mktemp("encoder")
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cut", "the", "leek"]
        (folder / "vocab.txt").write_text("\n".join(words))
        config = transformers.BertConfig(
            vocab_size=8, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
        transformers.BertModel(config).save_pretrained(folder)
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
        return folder

    def test_means_and_tokens(self, encoder: Path) -> None:
        said = [Utterance(0.0, 2.0, "cut leek"), Utterance(2.0, 3.0, "the")]
        whole = make_extractor("transformers", "text", {"model": str(encoder)}, "text")
        assert whole.width == 12
        assert whole(said).tokens_MD.shape == (2, 12)
        assert np.array_equal(whole(said).tokens_MD[1], whole(said[1:]).tokens_MD[0])
        tokens = make_extractor("transformers", "text", {"model": str(encoder), "unit": "token"}, "text")(said)
        assert tokens.times_M2.tolist() == [[0, 1], [1, 2], [2, 3]]

    def test_says_what_to_do_without_it(self, tmp_path: Path) -> None:
        pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
        with pytest.raises(MdlError, match="text encoder cannot be loaded") as told:
            make_extractor("transformers", "text", {"model": str(tmp_path)}, "text")
        assert "hashed_ngrams" in str(told.value.fix)
        with pytest.raises(MdlError, match="no text encoder is given"):
            make_extractor("transformers", "text", {}, "text")


def test_every_extractor_says_what_it_reads() -> None:
    kinds = {name: EXTRACTORS.load(name).kind for name in EXTRACTORS}
    assert kinds == {
        "log_mel": "audio",
        "flow_grid": "flow",
        "hashed_ngrams": "text",
        "transformers": "text",
    }
    assert all(EXTRACTORS.load(name).version for name in EXTRACTORS)


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("flow_grid", {}, "'flow_grid' reads flow, not audio"),
        ("logmel", {}, "there is no feature extractor 'logmel'"),
        ("log_mel", {"band": 8}, "there is no option 'band'"),
        ("log_mel", {"bands": "many"}, "'many' is no int"),
        ("log_mel", {"bins": 7}, "192 frames of a patch do not divide into 7 bins"),
    ],
)
def test_options_that_mean_nothing(name: str, options: dict[str, object], what: str) -> None:
    with pytest.raises(MdlError, match=what):
        make_extractor(name, "audio", options, "--set audio")
