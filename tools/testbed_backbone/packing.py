"""Packs a clip's kept media tokens and several questions into one sequence.

In a *packed* sequence every question follows the media at the same position and sees no other question, which
equals one forward per question; in a *conversation* the questions are the turns of one ordinary causal sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from omnisieve.data.synthetic import Clip, all_questions
from omnisieve.data.synthetic.questions import AUDITORY, CROSS, VISUAL, VOCABULARY, WORDINGS, Question, attributes
from omnisieve.data.synthetic.world import CELLS
from testbed_backbone.features import AUDIO_TOKENS, GRID_THW, MEL_FRAMES, VIDEO_TOKENS, media_order

FAMILIES = tuple(WORDINGS)
MEDIA = VIDEO_TOKENS + AUDIO_TOKENS
ORDER = media_order().numpy()
_PLACE = np.argsort(ORDER)
IS_AUDIO = ORDER >= VIDEO_TOKENS
NONE = 99
"""Label of a media token that belongs to no event or call."""
TONE = list(VOCABULARY).index("tone")
SECOND = np.where(IS_AUDIO, (ORDER - VIDEO_TOKENS) // 25, ORDER // CELLS**2)
"""Second [731] of each media token, in sequence order."""


@dataclass
class Record:
    """What the language model is trained on: one clip's features, labels and questions, in sequence order."""

    features: Tensor
    """float16 [731, D]."""
    labels: np.ndarray
    """int [731, 6]: attributes of the event or call that a token belongs to; NONE for other tokens, -1 unknown."""
    evidence: list[list[int]]
    """Media tokens of each event and call."""
    attributes: np.ndarray
    """int [events + calls, 6]: index of each attribute's word in its vocabulary, -1 where there is none."""
    questions: list[Question]


def media_index(clip: Clip, group: int) -> list[int]:
    """Return the media tokens (in sequence order) that show an event or sound a call."""
    if group < len(clip.events):
        e = clip.events[group]
        video = [(e.second * CELLS + e.row) * CELLS + e.column]
        return [int(_PLACE[i]) for i in video + [VIDEO_TOKENS + e.token + k for k in range(e.length)]]
    call = clip.calls[group - len(clip.events)]
    return [int(_PLACE[VIDEO_TOKENS + call.token + k]) for k in range(2)]


def make_record(clip: Clip, video: Tensor, audio: Tensor, questions: list[Question] | None = None) -> Record:
    """Return the record of a clip from its video [432, D] and audio [299, D] features."""
    words = attributes(clip)
    known = np.array([[VOCABULARY[a].index(w[a]) if a in w else -1 for a in VOCABULARY] for w in words])
    evidence = [media_index(clip, group) for group in range(len(words))]
    labels = np.full((MEDIA, len(VOCABULARY)), NONE)
    for tokens, values in zip(evidence, known, strict=True):
        labels[tokens] = np.where(values < 0, NONE, values)
        labels[[t for t in tokens if not IS_AUDIO[t]], TONE] = -1
    features = torch.cat([video, audio])[ORDER].half()
    return Record(features, labels, evidence, known, all_questions(clip) if questions is None else questions)


@dataclass
class Batch:
    """One packed batch. S = 5 + K + 2 + longest text."""

    keep: Tensor
    """Kept media tokens [B, K], ascending."""
    head: Tensor
    """Token ids before the media [5]."""
    text: Tensor
    """Token ids after the media [B, T], beginning with the two closing tokens."""
    positions: Tensor
    """[3, B, S]."""
    mask: Tensor
    """bool [B, 1, S, S], True where the row may attend."""
    rows: Tensor
    """[N, 2]: (sample, position in S) of the tokens that predict an answer or its end."""
    labels: Tensor
    """Token to be predicted at each row [N]."""
    families: Tensor
    """Family of each row's question [N]; -1 for rows that predict the end."""
    keys: Tensor
    """[Q, 2]: (sample, position in S) of the word that each question asks from."""
    groups: Tensor
    """[Q, 2]: (sample, event or call) that each question is about."""


class Packer:
    """Builds batches for a tokenizer and the stock position rule of a model."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, model: Any) -> None:
        def ids(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        self.ids = ids
        self.head = ids("<|im_start|>user\n<|vision_bos|><|audio_bos|>")
        self.tail = ids("<|audio_eos|><|vision_eos|>")
        self.prompt_end = ids("<|im_end|>\n<|im_start|>assistant\n")
        self.end = ids("<|im_end|>")
        self.next_turn = ids("\n<|im_start|>user\n")
        self.cache: dict[str, list[int]] = {}
        self.words = {ids(" " + word)[0] for words in VOCABULARY.values() for word in words}
        video, audio = ids("<|VIDEO|>"), ids("<|AUDIO|>")
        media = [audio[0] if heard else video[0] for heard in IS_AUDIO]
        prefix = torch.tensor([self.head + media + self.tail])
        positions, _ = model.get_rope_index(
            prefix,
            video_grid_thw=torch.tensor([GRID_THW]),
            attention_mask=torch.ones_like(prefix),
            use_audio_in_video=True,
            audio_seqlens=torch.tensor([MEL_FRAMES]),
            second_per_grids=torch.tensor([1.0]),
        )
        self.prefix_positions = positions[:, 0].long()
        self.first_free = int(positions.max()) + 1

    def encode(self, text: str) -> list[int]:
        """Tokenize with a cache."""
        if text not in self.cache:
            self.cache[text] = self.ids(text)
        return self.cache[text]

    def pack(
        self,
        keep: np.ndarray,
        questions: list[list[Question]],
        conversation: bool = False,
        offsets: np.ndarray | None = None,
    ) -> Batch:
        """Return a batch of kept tokens [B, K] and each clip's questions; `offsets` [B] shifts their positions."""
        texts = [
            self._text(q, conversation, 0 if offsets is None else int(offsets[i])) for i, q in enumerate(questions)
        ]
        longest = max(len(t[0]) for t in texts)
        batch, kept = keep.shape
        start = len(self.head) + kept
        ids = np.full((batch, longest), self.end[0])
        places = np.full((batch, longest), self.first_free)
        segments = np.full((batch, longest), -2)
        rows, labels, families, keys, groups = [], [], [], [], []
        for i, (tokens, position, segment, answers) in enumerate(texts):
            ids[i, : len(tokens)], places[i, : len(tokens)], segments[i, : len(tokens)] = tokens, position, segment
            for question, (at, key) in zip(questions[i], answers, strict=True):
                family = FAMILIES.index(question.family)
                keys.append((i, start + key))
                groups.append((i, question.group))
                rows += [(i, start + at - 1), (i, start + at)]
                labels += [tokens[at], tokens[at + 1]]
                families += [family, -1]
        index = torch.from_numpy(keep)
        media = self.prefix_positions[:, len(self.head) : len(self.head) + MEDIA][:, index]
        head = self.prefix_positions[:, None, : len(self.head)].expand(3, batch, -1)
        after = torch.from_numpy(places).expand(3, -1, -1)
        seg = torch.cat([torch.zeros(batch, start, dtype=torch.long), torch.from_numpy(segments)], 1)
        size = seg.shape[1]
        causal = torch.ones(size, size, dtype=torch.bool).tril()
        mask = causal & ((seg[:, None, :] == 0) | (seg[:, None, :] == seg[:, :, None]))
        return Batch(
            index,
            torch.tensor(self.head),
            torch.from_numpy(ids),
            torch.cat([head, media, after], 2),
            mask[:, None],
            torch.tensor(rows),
            torch.tensor(labels),
            torch.tensor(families),
            torch.tensor(keys),
            torch.tensor(groups),
        )

    def _text(
        self, questions: list[Question], conversation: bool, offset: int
    ) -> tuple[list[int], list[int], list[int], list[tuple[int, int]]]:
        """Return tokens, positions, segments and (index of the answer, of the word asked from) after the media."""
        tokens, segments = [*self.tail], [0, 0]
        positions = self.prefix_positions[0, -2:].tolist()
        answers = []
        for k, question in enumerate(questions):
            turn = [*self.next_turn] if conversation and k else []
            turn += [*self.encode(question.text), *self.prompt_end]
            key = max(k for k, token in enumerate(turn) if token in self.words)
            answers.append((len(tokens) + len(turn), len(tokens) + key))
            turn += [*self.encode(question.answer), *self.end]
            begin = positions[-1] + 1 if conversation and k else self.first_free + offset
            tokens += turn
            positions += range(begin, begin + len(turn))
            segments += [0 if conversation else k + 1] * len(turn)
        return tokens, positions, segments, answers


def draw_tokens(records: list[Record], kept: int, rng: np.random.Generator) -> np.ndarray:
    """Return kept media tokens [B, kept] at random, all evidence among them; shares vary by window and modality."""
    scores = rng.random((len(records), MEDIA))
    scores += rng.normal(0, 0.25, (len(records), 6))[:, SECOND // 2]
    scores += np.where(IS_AUDIO, rng.normal(0, 0.25, (len(records), 1)), 0)
    for row, record in zip(scores, records, strict=True):
        row[[i for group in record.evidence for i in group]] = 10
    return np.sort(np.argsort(-scores, axis=1)[:, :kept], axis=1)


def sample_questions(questions: list[Question], n: int, rng: np.random.Generator) -> list[Question]:
    """Return `n` questions in random order, about as many visual as cross-modal as auditory ones."""
    kinds = [[q for q in questions if q.family in kind] for kind in (VISUAL, CROSS, AUDITORY)]
    drawn: list[Question] = []
    for i, kind in enumerate(kinds):
        share = n // 3 + (i < n % 3)
        drawn += [kind[k] for k in rng.choice(len(kind), min(share, len(kind)), replace=False)]
    return [drawn[i] for i in rng.permutation(len(drawn))]
