"""Measures what the testbed's backbone can do, and what a selection of tokens is worth.

    python tools/testbed_reference.py [--backbone data/testbed/backbone] [--clips 104] [--split test]

Writes `results/testbed_reference.json` and the backbone's card. Real mp4 files are written, decoded and encoded;
every question is asked alone, about the same media tokens.

- full tokens, per family, one question at a time and as one conversation;
- floors: no media, and 25 % of the tokens at random; oracle: all evidence plus random tokens, at 25 % and 15 %;
- the audio half: the video fixed to the similarity pruner at 25 %, the audio chosen by an oracle, by dissimilarity
  to its window's mean, by dissimilarity to the token before, at random, or as any beep or call without looking at
  the picture. The oracle must lead the similarity methods and random by 8 points.

The pruner and the audio scores are written out here in a few lines so that the reference does not depend on the
library's compressors.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoTokenizer

from omnisieve.backbones import load_backbone
from omnisieve.data.synthetic import Clip, draw_questions, make_clip
from testbed_backbone.card import write_card
from testbed_backbone.features import AUDIO_TOKENS, VIDEO_TOKENS, encoder_inputs, tower_features
from testbed_backbone.language import evaluate
from testbed_backbone.packing import IS_AUDIO, MEDIA, ORDER, Packer, Record, make_record

ROOT = Path(__file__).resolve().parent.parent
RATIO = 0.25


def main() -> None:
    """Parse the command line, measure both domains, write the report and the backbone's card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, default=ROOT / "data" / "testbed" / "backbone")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "testbed_reference.json")
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--clips", type=int, default=104)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    start = time.time()
    report: dict[str, Any] = {
        "split": args.split,
        "clips": args.clips,
        "domains": {d: measure(args.backbone, d, args.split, args.clips, args.workers) for d in "ab"},
        "environment": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    report["seconds"] = round(time.time() - start)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    write_card(args.backbone, report)
    for domain, part in report["domains"].items():
        print(domain, json.dumps({k: v for k, v in part.items() if k != "families"}, indent=1))


def measure(backbone: Path, domain: str, split: str, clips: int, workers: int) -> dict[str, Any]:
    """Return every figure for one domain, accuracies in percent."""
    model = load_backbone(backbone)
    packer = Packer(AutoTokenizer.from_pretrained(backbone), model)
    worlds = [make_clip(domain, split, i) for i in range(clips)]
    records = encode(model, worlds, domain, split, workers)

    def accuracy(choose: Callable[[Record, Clip, np.random.Generator], np.ndarray]) -> dict[str, float]:
        rng = np.random.default_rng(0)
        return evaluate(model, packer, records, [choose(r, c, rng) for r, c in zip(records, worlds, strict=True)])

    full = evaluate(model, packer, records)
    floors = {
        "no media": accuracy(lambda *_: np.zeros(0, dtype=int)),
        "random 25 %": accuracy(lambda _r, _c, rng: np.sort(rng.permutation(MEDIA)[: round(RATIO * MEDIA)])),
        "oracle 25 %": accuracy(lambda r, _c, rng: keep_evidence(r, RATIO, rng)),
        "oracle 15 %": accuracy(lambda r, _c, rng: keep_evidence(r, 0.15, rng)),
    }
    audio = {
        name: accuracy(lambda r, c, rng, score=score: fixed_video(r, score(r, c, rng)))  # type: ignore[misc]
        for name, score in AUDIO_SCORES.items()
    }
    recall = np.mean([np.isin(g[0], fixed_video(r, np.zeros(AUDIO_TOKENS))) for r in records for g in r.evidence[:4]])
    return {
        "questions": sum(len(r.questions) for r in records),
        "full": full["all"],
        "full as conversation": evaluate(model, packer, records, conversation=True)["all"],
        **{name: result["all"] for name, result in floors.items()},
        "video by similarity at 25 %, audio by": {name: result["all"] for name, result in audio.items()},
        "shapes kept by the similarity pruner": round(100 * float(recall), 1),
        "families": {
            family: {"full": full[family], **{name: result[family] for name, result in floors.items()}}
            for family in full
            if family != "all"
        },
    }


def encode(model: Any, worlds: list[Clip], domain: str, split: str, workers: int) -> list[Record]:
    """Return the records of clips, by way of mp4 files and the stock towers."""
    jobs = [(domain, split, i) for i in range(len(worlds))]
    records = []
    with ProcessPoolExecutor(workers) as pool, torch.no_grad():
        for clip, inputs in zip(worlds, tqdm(pool.map(_inputs, jobs, chunksize=4), total=len(jobs)), strict=True):
            video, audio = tower_features(model, *(torch.from_numpy(x)[None] for x in inputs))
            records.append(make_record(clip, video[0], audio[0], draw_questions(clip)))
    return records


def _inputs(job: tuple[str, str, int]) -> tuple[np.ndarray, np.ndarray]:
    torch.set_num_threads(1)
    patches, mel = encoder_inputs(*(make_clip(*job),) * 2)
    return patches.numpy(), mel.numpy()


def keep_evidence(record: Record, ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Return all evidence tokens, filled up at random to `ratio` of all tokens."""
    scores = rng.random(MEDIA)
    scores[[i for group in record.evidence for i in group]] = 2
    return np.sort(np.argsort(-scores)[: round(ratio * MEDIA)])


def fixed_video(record: Record, audio_scores: np.ndarray) -> np.ndarray:
    """Return the similarity pruner's quarter of the video and the best-scored quarter of each window's audio."""
    media = torch.empty(MEDIA, record.features.shape[1])
    media[torch.from_numpy(ORDER)] = record.features.float()
    grids = F.normalize(media[:VIDEO_TOKENS].unflatten(0, (12, 36)), dim=-1)
    mean = F.normalize(media[:VIDEO_TOKENS].unflatten(0, (12, 36)).mean(1), dim=-1)
    spatial = -(grids * mean[:, None]).sum(-1)
    temporal = -(grids[1::2] * grids[::2]).sum(-1)
    scores = spatial.clone()
    scores[1::2] = temporal
    kept = [i * 36 + j for i, row in enumerate(scores) for j in row.topk(round(36 * RATIO)).indices.tolist()]
    for window in range(6):
        first, last = window * 50, min(window * 50 + 50, AUDIO_TOKENS)
        count = round(RATIO * last) - round(RATIO * first)
        best = np.argsort(-audio_scores[first:last], kind="stable")[:count]
        kept += (VIDEO_TOKENS + first + best).tolist()
    return np.flatnonzero(np.isin(ORDER, kept))


def _audio(record: Record) -> torch.Tensor:
    return record.features[torch.from_numpy(IS_AUDIO)].float()


def from_mean(record: Record, *_: Any) -> np.ndarray:
    """Score audio tokens [299] by cosine dissimilarity to the mean of their 2-s window."""
    windows = _audio(record).split(50)
    return torch.cat([-F.cosine_similarity(w, w.mean(0, keepdim=True)) for w in windows]).numpy()


def from_previous(record: Record, *_: Any) -> np.ndarray:
    """Score audio tokens [299] by cosine dissimilarity to the token before; the first counts as new."""
    audio = _audio(record)
    return np.concatenate([[1.0], -F.cosine_similarity(audio[1:], audio[:-1]).numpy()])


def at_random(_record: Record, _clip: Clip, rng: np.random.Generator) -> np.ndarray:
    """Score audio tokens [299] at random."""
    return rng.random(AUDIO_TOKENS)


def oracle(_record: Record, clip: Clip, rng: np.random.Generator) -> np.ndarray:
    """Score audio tokens [299] so that the evidence comes first, then random ones."""
    scores = rng.random(AUDIO_TOKENS)
    scores[clip.evidence()["audio"]] += 1
    return scores


def unguided(_record: Record, clip: Clip, rng: np.random.Generator) -> np.ndarray:
    """Score audio tokens [299] so that calls come first, then all beeps alike, on screen or not, then the rest."""
    scores = rng.random(AUDIO_TOKENS)
    for sound in (*clip.events, *clip.beeps):
        scores[sound.token : sound.token + sound.length] += 1
    for call in clip.calls:
        scores[call.token : call.token + 2] += 2
    return scores


AUDIO_SCORES: dict[str, Callable[..., np.ndarray]] = {
    "oracle": oracle,
    "any beep or call": unguided,
    "dissimilarity to window mean": from_mean,
    "dissimilarity to previous": from_previous,
    "random": at_random,
}

if __name__ == "__main__":
    main()
