"""Clips and a benchmark for the tiny thinker, in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from omnisieve.backbones import adapter_for
from omnisieve.data.batch import Patches, Sample
from omnisieve.data.tokens import VideoRun, expand
from omnisieve.evaluation.benchmarks import Clip
from tests.models import (
    FIRST_WORD,
    MEL_BINS,
    MERGE,
    PAD,
    PATCH,
    QWEN3,
    QWEN3_PATCH,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCABULARY,
    family_of,
)


def tiny_clip(model: nn.Module, name: str, *, questions: int = 2, grids: int = 4, mel: int = 400) -> Clip:
    """A video of `grids` grids of 2 x 3 tokens, `mel` frames of sound (0: silent), and questions of random words."""
    rules = adapter_for(model).token_rules()
    generator = torch.Generator().manual_seed(sum(name.encode()))
    patch = QWEN3_PATCH if family_of(model) == QWEN3 else PATCH
    pixels = torch.randn(grids * 6 * MERGE**2, 3 * 2 * patch**2, generator=generator)
    sound = torch.randn(MEL_BINS, mel, generator=generator)
    run = VideoRun((grids, 2 * MERGE, 3 * MERGE), 1.0, rules.audio_tokens(mel))
    samples = []
    for turn in range(questions):
        words = torch.randint(FIRST_WORD, VOCABULARY, (3 + turn,), generator=generator).tolist()
        sequence = expand(np.array([FIRST_WORD, VISION_START, VIDEO, VISION_END, *words]), [run], rules)
        samples.append(
            Sample(
                id=name,
                input_ids=torch.from_numpy(sequence.input_ids),
                labels=torch.from_numpy(sequence.labels),
                position_ids=torch.from_numpy(sequence.position_ids),
                tokens=sequence.tokens,
                videos=(Patches(pixels, run.grid, 1.0),),
                audios=(sound,) if mel else (),
                video_grids=(run.grid,),
                seconds_per_grid=(1.0,),
                meta={
                    "turn": turn,
                    "answer": str(turn),
                    "family": f"family {turn}",
                    "evidence": {"video": [[1, 0, 2]], "audio": [5] if mel else []},
                },
            )
        )
    return Clip(name, questions, tuple(samples))


@dataclass
class TinyBenchmark:
    """Clips in a list; an answer is right if its first token is even."""

    clips: Sequence[Clip]
    name: str = "tiny"
    pad_token_id: int = PAD
    eos_token_id: int = VOCABULARY  # none of its words, so that all answers are equally long

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Clip:
        return self.clips[index]

    def decode(self, ids: Tensor) -> list[str]:
        return [" ".join(map(str, row)) for row in ids.tolist()]

    def is_correct(self, predicted: str, expected: str) -> bool:
        return int(predicted.split()[0]) % 2 == 0
