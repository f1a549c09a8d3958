"""Published rules in plain steps, token by token, for vectors that no published output is at hand for.

    python -m tests.goldens.plain

writes the files `*_plain_*` of `vectors/`, from the inputs there. Nothing here uses the package: what it computes is
what the package is compared with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

VECTORS = Path(__file__).parent / "vectors"
VIDEO_ID, AUDIO_ID = 151656, 151646
FLOOR, CONTEXTUAL, K, LAYERS = 0.05, 0.05, 2, 28
INPUTS = ("w3_4x4_a10_s0", "w4_4x6_a26tail_s0")


def solved(ratio: float, video: int, audio: int) -> tuple[float, float]:
    """Shares of video and audio where audio is to stay whole: the total is cut off, the video has a floor."""
    total = int(ratio * video + ratio * audio)
    share = (total - audio) / video
    if share >= FLOOR:
        return share, 1.0
    return FLOOR, (total - FLOOR * video) / audio


def rounded(share: float, count: int) -> int:
    """max(1, round(share * n)), of the plain product."""
    return max(1, round(share * count))


def behind(ratio: float) -> float:
    """FastV's share behind its cut, of a mean over layers."""
    return (ratio * LAYERS - K) / (LAYERS - K)


def best(scores: list[float], count: int) -> list[int]:
    """Places of the largest scores, the earlier first where they are equal."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


# VisionZip.


def zip_counts(share: float, size: int) -> tuple[int, int]:
    """Dominant and contextual tokens of a window."""
    dominant = max(int(np.float32(share - CONTEXTUAL) * np.float32(size)), 1) if share > CONTEXTUAL else 0
    return dominant, min(max(round(CONTEXTUAL * size), 1), size - dominant)


def zipped(
    rows: np.ndarray, attention: np.ndarray, keys: np.ndarray, share: float
) -> tuple[list[int], dict[int, np.ndarray]]:
    """Kept places of a window, and the rows that the contextual ones among them become."""
    dominant_count, contextual_count = zip_counts(share, len(rows))
    dominant = best(attention.tolist(), dominant_count)
    rest = [i for i in range(len(rows)) if i not in dominant]
    step = max(1, len(rest) // contextual_count)
    anchors = rest[::step][:contextual_count]
    members: dict[int, list[int]] = {anchor: [] for anchor in anchors}
    for i in rest:
        if i not in anchors:
            likeness = [float(unit(keys[i]) @ unit(keys[anchor])) for anchor in anchors]
            members[anchors[likeness.index(max(likeness))]].append(i)
    merged = {a: rows[a] + (rows[who].mean(axis=0) if who else 0) for a, who in members.items()}
    return sorted(dominant + anchors), merged


def unit(row: np.ndarray) -> np.ndarray:
    wide = row.astype(np.float64)
    return wide / (np.linalg.norm(wide) + 1e-6)


def visionzip_file(name: str, ratio: float) -> dict[str, Any]:
    arrays = np.load(VECTORS / "inputs" / f"{name}.npz")
    ids, embeds = arrays["input_ids"][0], arrays["inputs_embeds"][0]
    video = np.flatnonzero(ids == VIDEO_ID)
    audio_count = int((ids == AUDIO_ID).sum())
    share, audio_share = solved(ratio, len(video), audio_count)
    frames, rows, columns = (int(n) for n in arrays["video_grid_thw"][0])
    size = rows * columns // 4
    kept, out = [], embeds.astype(np.float64)
    for frame in range(frames):
        at = video[frame * size : (frame + 1) * size]
        places = slice(frame * size, (frame + 1) * size)
        stay, merged = zipped(embeds[at], arrays["video_attn"][places], arrays["video_key"][0, places], share)
        kept += [int(at[i]) for i in stay]
        for anchor, row in merged.items():
            out[at[anchor]] = row
    return {
        "inputs_file": f"inputs/{name}.npz",
        "ratio": ratio,
        "video_ratio": share,
        "audio_ratio": audio_share,
        "kept_video": np.array(kept),
        "kept_video_embeds": out[kept].astype(np.float32),
        "audio_count": rounded(audio_share, audio_count),
    }


# FastV.


def fastv_file(name: str, ratio: float) -> dict[str, Any]:
    arrays = np.load(VECTORS / "inputs" / f"{name}.npz")
    ids, scores = arrays["input_ids"][0], arrays["llm_scores"]
    video = np.flatnonzero(ids == VIDEO_ID)
    audio_count = int((ids == AUDIO_ID).sum())
    share, audio_share = solved(behind(ratio), len(video), audio_count)
    return {
        "inputs_file": f"inputs/{name}.npz",
        "ratio": ratio,
        "video_ratio": share,
        "audio_ratio": audio_share,
        "kept_video": video[best(scores[video].tolist(), rounded(share, len(video)))],
        "audio_count": rounded(audio_share, audio_count),
    }


def counts_file() -> dict[str, list[int]]:
    """Kept tokens of one frame and its sound: "method|ratio(s)|video tokens|audio tokens"."""
    found: dict[str, list[int]] = {}
    for ratio, video, audio in ((0.5, 288, 50), (0.29, 100, 0), (0.2, 144, 50), (0.35, 271, 195), (0.82, 301, 77)):
        share, audio_share = solved(ratio, video, audio) if audio else (int(ratio * video) / video, 0.0)
        whole = sum(zip_counts(share, video)), rounded(audio_share, audio) if audio else 0
        found[f"visionzip|{ratio}|{video}|{audio}"] = list(whole)
        if audio:
            shares = solved(behind(ratio), video, audio)
            found[f"fastv|{ratio}|{video}|{audio}"] = [
                rounded(s, n) for s, n in zip(shares, (video, audio), strict=True)
            ]
    for ratios, video, audio in (((0.3, 0.55), 500, 195), ((0.1, 0.45), 96, 30), ((0.58, 0.35), 143, 26)):
        shares = [behind(ratio) for ratio in ratios]
        found[f"fastv_om|{ratios[0]},{ratios[1]}|{video}|{audio}"] = [
            rounded(s, n) for s, n in zip(shares, (video, audio), strict=True)
        ]
        found[f"divprune_om|{ratios[0]},{ratios[1]}|{video}|{audio}"] = [
            round(r * n) for r, n in zip(ratios, (video, audio), strict=True)
        ]
    # 0.145 * 100 is 14.499999999999998.
    found["divprune_om|0.145,0.29|100|50"] = [round(0.145 * 100), round(0.29 * 50)]
    return found


# SEATS, stage II.


def runs_of(kinds: list[str], kind: str) -> list[list[int]]:
    """Places of contiguous runs of one kind."""
    runs: list[list[int]] = []
    for place, found in enumerate(kinds):
        if found != kind:
            continue
        if place == 0 or kinds[place - 1] != kind:
            runs.append([])
        runs[-1].append(place)
    return runs


def softmax(values: list[float], tau: float) -> list[float]:
    powers = [math.exp((value - max(values)) / tau) for value in values]
    return [power / sum(powers) for power in powers]


def top_down(kinds: list[str], scores: list[float], ratio: float, tau: float) -> list[int]:
    """Places that stay of a sequence of "text", "video" and "audio" (step by step as METHODS' section on SEATS)."""
    places = {kind: [i for i, found in enumerate(kinds) if found == kind] for kind in ("video", "audio")}
    wanted = {kind: max(1, round(ratio * len(at))) for kind, at in places.items()}
    text = [i for i, found in enumerate(kinds) if found == "text"]
    runs = {kind: runs_of(kinds, kind) for kind in places}
    if not all(runs.values()) or max(len(found) for found in runs.values()) == 1:
        kept = [at[i] for kind, at in places.items() for i in best([scores[p] for p in at], wanted[kind])]
        return sorted(text + kept)
    windows = max(len(found) for found in runs.values())
    members = {kind: found + [[]] * (windows - len(found)) for kind, found in runs.items()}
    mean = {
        kind: [sum(scores[p] for p in run) / len(run) if run else 0.0 for run in found]
        for kind, found in members.items()
    }
    weight = {kind: softmax(values, tau) for kind, values in mean.items()}
    total = wanted["video"] + wanted["audio"]
    caps = [len(members["video"][w]) + len(members["audio"][w]) for w in range(windows)]
    budget = [
        min(cap, max(1, round((weight["video"][w] + weight["audio"][w]) / 2 * total))) for w, cap in enumerate(caps)
    ]
    while sum(budget) > total and max(budget) > 1:
        budget[budget.index(max(budget))] -= 1
    while sum(budget) < total and any(b < cap for b, cap in zip(budget, caps, strict=True)):
        open_ = [w for w in range(windows) if budget[w] < caps[w]]
        budget[min(open_, key=lambda w: (budget[w], w))] += 1
    kept = list(text)
    for w in range(windows):
        sizes = {kind: len(members[kind][w]) for kind in members}
        demand = {kind: weight[kind][w] * wanted[kind] for kind in members}
        share = demand["video"] / (demand["video"] + demand["audio"] + 1e-12)
        video = min(round(budget[w] * share), sizes["video"])
        audio = min(budget[w] - video, sizes["audio"])
        video = min(budget[w] - audio, sizes["video"])
        if video == 0 and sizes["video"]:
            video, audio = 1, audio - (audio > 1)
        if audio == 0 and sizes["audio"]:
            video, audio = video - (video > 1), 1
        for kind, count in (("video", video), ("audio", audio)):
            run = members[kind][w]
            kept += [run[i] for i in best([scores[p] for p in run], count)]
    return sorted(kept)


def runs_file(name: str, seed: int) -> dict[str, Any]:
    """Two cuts one after the other, of a sequence of which a first stage left little: whole runs are gone."""
    arrays = np.load(VECTORS / "inputs" / f"{name}.npz")
    generator = np.random.default_rng(seed)
    kind_of = {VIDEO_ID: "video", AUDIO_ID: "audio"}
    kinds = [kind_of.get(int(token), "text") for token in arrays["input_ids"][0]]
    runs = runs_of(kinds, "audio") + runs_of(kinds, "video")[1:]
    gone = {place for run in (runs[1], runs[-1]) for place in run}
    alive = [kind == "text" or (place not in gone and generator.random() < 0.6) for place, kind in enumerate(kinds)]
    left, kept = [place for place, stays in enumerate(alive) if stays], []
    scores, ratios, tau = generator.random((2, len(kinds))) ** 3 * 0.1, (0.7949, 0.2986), 0.1
    for row, ratio in zip(scores, ratios, strict=True):
        stay = top_down([kinds[p] for p in left], [float(row[p]) for p in left], ratio, tau)
        left = [left[i] for i in stay]
        kept.append([place in left for place in range(len(kinds))])
    return {
        "inputs_file": f"inputs/{name}.npz",
        "alive": np.array(alive),
        "scores": scores,
        "ratios": np.array(ratios),
        "tau": tau,
        "keep": np.array(kept),
    }


def files() -> Iterator[tuple[str, dict[str, Any]]]:
    """All vectors by file name."""
    for name, ratios in zip(INPUTS, ((0.3, 0.2), (0.5, 0.3)), strict=True):
        for ratio in ratios:
            yield f"visionzip_plain_{name}_r{round(100 * ratio)}.npz", visionzip_file(name, ratio)
            yield f"fastv_plain_{name}_r{round(100 * ratio)}.npz", fastv_file(name, ratio)
    for name in INPUTS:
        for seed in range(2):
            yield f"seats_plain_runs_{name}_{seed}.npz", runs_file(name, seed)
    yield "plain_counts.json", counts_file()


def main() -> None:
    """Write the files."""
    for name, values in files():
        if name.endswith(".json"):
            (VECTORS / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        else:
            np.savez_compressed(VECTORS / name, **values)


if __name__ == "__main__":
    main()
