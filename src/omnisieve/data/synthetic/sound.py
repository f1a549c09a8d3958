"""Synthesises a clip's sound: float32 waveform [191488], 16 kHz mono."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from omnisieve.data.synthetic.world import SECONDS, Clip, Domain

SAMPLE_RATE = 16_000
TOKEN = 640
"""Samples of one audio token (40 ms)."""
SAMPLES = 187 * 1024

BASE_MEL = tuple(range(30, 66, 6))
"""Mel bins (of 128) of the fundamental of each tone."""
TIMBRES = ((10, 18), (10, 26), (10, 34), (18, 26), (18, 34), (26, 34), (10, 18, 26), (18, 26, 34))
"""Offsets of the partials above the fundamental, in mel bins, one timbre for each shape."""
REGISTER_MEL = (26, 44, 62, 80)
LOUDNESS = 0.12
RAMP = 64


def mel_to_hz(bins: np.ndarray | float) -> np.ndarray:
    """Return the centre frequency in Hz of (fractional) mel bins 0..127, Slaney scale up to 8 kHz."""
    mels = (np.asarray(bins, dtype=np.float64) + 1) * (45.245640471924965 / 129)
    return np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(np.log(6.4) / 27 * (mels - 15)))


def make_waveform(clip: Clip) -> np.ndarray:
    """Return the sound of a clip, float32 [191488] within -1..1."""
    rng = clip.rng(2)
    wave = _hum(clip.domain, rng)
    for token, length, tone, timbre in (
        *((e.token, e.length, e.tone, e.shape) for e in clip.events),
        *((b.token, b.length, b.tone, b.timbre) for b in clip.beeps),
    ):
        _add(wave, token, _beep(length, tone, timbre, clip.domain.timbre_slope, rng))
    for call in clip.calls:
        _add(wave, call.token, _call(call.kind, call.register))
    for chirp in clip.chirps:
        _add(wave, chirp.token, clip.domain.chirp_loudness * _chirp(chirp.band, rng))
    return np.clip(wave, -1, 1).astype(np.float32)


def _add(wave: np.ndarray, token: int, sound: np.ndarray) -> None:
    """Add a sound, faded in and out over 4 ms, at the start of an audio token."""
    faded = sound * _envelope(len(sound))
    start = token * TOKEN
    wave[start : start + len(sound)] += faded


@lru_cache(maxsize=4)
def _envelope(n: int) -> np.ndarray:
    ramp = 0.5 - 0.5 * np.cos(np.pi * (np.arange(RAMP) + 0.5) / RAMP)
    return np.concatenate([ramp, np.ones(n - 2 * RAMP), ramp[::-1]])


def _beep(length: int, tone: int, timbre: int, slope: float, rng: np.random.Generator) -> np.ndarray:
    """Return partials of equal energy (times `slope` for each step up), slightly detuned, of random loudness."""
    time = np.arange(length * TOKEN) / SAMPLE_RATE
    offsets = np.array((0, *TIMBRES[timbre])) + rng.uniform(-0.6, 0.6)
    frequencies = mel_to_hz(BASE_MEL[tone] + offsets)
    phases = rng.uniform(0, 2 * np.pi, len(offsets))
    amplitudes = slope ** np.arange(len(offsets))
    amplitudes *= rng.uniform(0.75, 1.25) * LOUDNESS * np.sqrt(2 / (amplitudes**2).sum())
    return (amplitudes[:, None] * np.sin(2 * np.pi * frequencies[:, None] * time + phases[:, None])).sum(0)


def _call(kind: int, register: int) -> np.ndarray:
    """Return a sweep of 80 ms: up, down, up and down, trill, buzz (dense harmonics), croak (pulses)."""
    x = np.linspace(0, 1, 2 * TOKEN, endpoint=False)
    bend = (
        20 * x,
        20 - 20 * x,
        20 - 40 * abs(x - 0.5),
        10 + 10 * np.sign(np.sin(8 * np.pi * x)),
        10 + 0 * x,
        10 + 0 * x,
    )
    phase = 2 * np.pi * np.cumsum(mel_to_hz(REGISTER_MEL[register] + bend[kind])) / SAMPLE_RATE
    if kind == 4:
        wave = sum(np.sin(phase * (1 + 0.16 * k)) for k in range(5)) / np.sqrt(5)
    elif kind == 5:
        wave = np.sin(phase) * (np.sin(2 * np.pi * 6 * x) > 0) * np.sqrt(2)
    else:
        wave = np.sin(phase)
    return np.sqrt(2) * LOUDNESS * wave


def _chirp(band: int, rng: np.random.Generator) -> np.ndarray:
    """Return noise of one audio token in one of eight bands, 14 mel bins wide."""
    low, high = (float(mel_to_hz(15 + 12 * band + edge)) for edge in (0, 14))
    frequencies = np.fft.rfftfreq(TOKEN, 1 / SAMPLE_RATE)
    inside = (frequencies >= low) & (frequencies <= high)
    spectrum = np.where(inside, rng.normal(size=inside.size) + 1j * rng.normal(size=inside.size), 0)
    noise = np.fft.irfft(spectrum, TOKEN)
    return LOUDNESS * noise / max(float(noise.std()), 1e-9)


def _hum(domain: Domain, rng: np.random.Generator) -> np.ndarray:
    """Return background noise [191488] that falls off with frequency and swells slowly."""
    n = SAMPLES
    frequencies = np.fft.rfftfreq(n, 1 / SAMPLE_RATE)
    spectrum = np.fft.rfft(rng.normal(size=n)) / np.sqrt(1 + (frequencies / rng.uniform(300, 1200)) ** 2)
    noise = np.fft.irfft(spectrum, n)
    knots = rng.uniform(0.3, 1.0, SECONDS + 1)
    swell = np.interp(np.arange(n) / SAMPLE_RATE, np.arange(SECONDS + 1), knots)
    return domain.hum * swell * noise / noise.std()
