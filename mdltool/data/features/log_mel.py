"""Log-mel patches of sound, with torch alone (spec cm3t 5.3).

The spectrogram is torchaudio's MelSpectrogram with its defaults (periodic Hann window, power 2, HTK mel scale,
filters that are not normalised, centred frames) but for silence around the sound, which may be shorter than a
window. A patch becomes one token: its frames averaged over `bins` equal parts of its time.

Axes: N samples, F frequencies, L bands, T frames, M patches, D = L * bins.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from mdltool.data.features import Tokens
from mdltool.data.modalities import Sound
from mdltool.errors import MdlError

_BLOCK = 2048  # frames whose spectra are in memory together
_FLOOR = 1e-6  # of the power, before the logarithm


@dataclass(frozen=True)
class LogMel:
    """bands: of the mel scale, from 0 Hz to half the rate. fft: points, a window is zero-padded to them; window_ms,
    hop_ms, patch_s, patch_hop_s: times. bins: parts of a patch's time that a token keeps apart."""

    bands: int = 128
    fft: int = 1024
    window_ms: float = 10.0
    hop_ms: float = 5.0
    patch_s: float = 0.96
    patch_hop_s: float = 0.48
    bins: int = 8
    kind: ClassVar[str] = "audio"
    version: ClassVar[str] = "1"

    @property
    def width(self) -> int:
        return self.bands * self.bins

    def check(self, where: str) -> None:
        """Raises MdlError unless a patch has frames for every bin and patches move on."""
        frames, hop = self._frames(self.patch_s), self._frames(self.patch_hop_s)
        if min(self.bands, self.bins, self.fft, hop) < 1 or min(self.hop_ms, self.window_ms) <= 0:
            raise MdlError("bands, bins, fft, window, hop and patch hop must be above 0", where, None)
        if frames % self.bins:
            raise MdlError(
                f"{frames} frames of a patch do not divide into {self.bins} bins", f"{where}.bins", "e.g. 8"
            )

    def check_rate(self, rate: int, where: str) -> None:
        """Raises MdlError for a rate at which frames or patches do not lie on whole samples: they would drift."""
        window, hop = (ms * rate / 1000 for ms in (self.window_ms, self.hop_ms))
        if round(window) > self.fft:
            what = f"a window of {round(window)} samples does not fit into {self.fft} points"
            raise MdlError(what, f"{where}.fft", "a larger power of 2")
        hops = self.patch_hop_s * 1000 / self.hop_ms
        if round(window) < 1 or not all(math.isclose(n, round(n), rel_tol=1e-9) for n in (hop, hops)):
            what = f"hop_ms {self.hop_ms:g} is {hop:g} samples at {rate} a second, and patch_hop_s {hops:g} hops"
            raise MdlError(
                f"{what}: not whole numbers", f"{where}.hop_ms", f"e.g. {where}.rate=24000, or hop_ms=10"
            )

    def __call__(self, sound: Sound) -> Tokens:
        """At least one token; the last ones reach beyond the sound, which is silence there."""
        length = sound.duration_s
        count = max(1, int(np.ceil(round((length - self.patch_s) / self.patch_hop_s, 6))) + 1)
        mel_LT = self.log_mel(sound, round(((count - 1) * self.patch_hop_s + self.patch_s) * sound.rate))
        frames, hop = self._frames(self.patch_s), self._frames(self.patch_hop_s)
        patches_LMT = mel_LT[:, : (count - 1) * hop + frames].unfold(1, frames, hop)
        pooled_LMB = patches_LMT.unflatten(2, (self.bins, -1)).mean(3)
        tokens_MD = pooled_LMB.permute(1, 2, 0).flatten(1).float().numpy()
        starts = np.arange(count) * self.patch_hop_s
        return Tokens(tokens_MD, np.stack([starts, np.minimum(starts + self.patch_s, length)], 1))

    def log_mel(self, sound: Sound, samples: int) -> torch.Tensor:
        """float64 [L, T] of the first `samples` samples, silence where there are fewer.

        In float64, so that another FFT library or processor gives the same float16 tokens; in blocks of frames, or
        a minute's spectra would take 250 MB.
        """
        window, hop = (round(ms * sound.rate / 1000) for ms in (self.window_ms, self.hop_ms))
        filters_LF = mel_filters(self.bands, self.fft, sound.rate)
        mel_LT = torch.empty(self.bands, samples // hop + 1, dtype=torch.float64)
        for first in range(0, mel_LT.shape[1], _BLOCK):
            block_LT = mel_LT[:, first : first + _BLOCK]
            begin = first * hop - self.fft // 2  # frames are centred on their time
            wave_N = _wave(sound, begin, begin + (block_LT.shape[1] - 1) * hop + self.fft, samples)
            hann = torch.hann_window(window, dtype=torch.float64)
            spectrum_FT = torch.stft(wave_N, self.fft, hop, window, hann, center=False, return_complex=True)
            power_FT = spectrum_FT.real**2 + spectrum_FT.imag**2
            block_LT.copy_((filters_LF @ power_FT + _FLOOR).log())
        return mel_LT

    def _frames(self, seconds: float) -> int:
        return round(seconds * 1000 / self.hop_ms)


def _wave(sound: Sound, begin: int, end: int, samples: int) -> torch.Tensor:
    """float64 [end - begin], from -1 to 1, of the sound's first `samples`; silence around them."""
    own_N = sound.samples_N[max(0, begin) : max(0, min(end, samples))]
    wave_N = torch.from_numpy(own_N.astype(np.float64)) / 32768
    before = max(0, -begin)
    return torch.nn.functional.pad(wave_N, (before, end - begin - before - len(wave_N)))


@functools.lru_cache(maxsize=4)
def mel_filters(bands: int, fft: int, rate: int) -> torch.Tensor:
    """float64 [L, F]: triangles whose corners are even on the HTK mel scale, mel = 2595 log10(1 + f / 700)."""
    frequencies_F = torch.linspace(0, rate / 2, fft // 2 + 1, dtype=torch.float64)
    top = 2595 * np.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, bands + 2, dtype=torch.float64) / 2595) - 1)
    low, middle, high = (corners[i : i + bands, None] for i in range(3))
    rising = (frequencies_F - low) / (middle - low)
    falling = (high - frequencies_F) / (high - middle)
    return torch.minimum(rising, falling).clamp(min=0)
