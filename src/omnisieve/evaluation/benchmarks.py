"""Where clips, questions and the rule for a right answer come from.

A benchmark is anything with the attributes of `Benchmark`. The one here reads a manifest; a published benchmark
needs only its own way from its files to `Conversation`s and its own `is_correct`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from torch import Tensor

from omnisieve.data.batch import Sample
from omnisieve.data.dataset import MediaLoader
from omnisieve.data.errors import DataError, SampleError
from omnisieve.data.manifest import Conversation, ManifestError
from omnisieve.evaluation.matching import is_same


@dataclass(frozen=True)
class Clip:
    """One clip with questions about it.

    Attributes:
        id: the same wherever the media are the same.
        n_questions: how many there are, also those that cannot be asked.
        questions: prompts without answers; `id` and `meta["turn"]` identify one, `meta["answer"]` answers it,
            `meta["family"]` is its kind if there are kinds.
        error: why none of them, or not all, can be asked.
    """

    id: str
    n_questions: int
    questions: tuple[Sample, ...] = ()
    error: SampleError | None = None


class Benchmark(Protocol):
    """Clips with questions, and how an answer is read and judged."""

    name: str
    pad_token_id: int
    eos_token_id: int

    def __len__(self) -> int:
        """Number of clips."""

    def __getitem__(self, index: int) -> Clip:
        """Read one clip; worker processes call this."""

    def decode(self, ids: Tensor) -> list[str]:
        """Generated ids [B, N] as texts."""

    def is_correct(self, predicted: str, expected: str) -> bool:
        """Whether a generated answer counts as right."""


class ManifestBenchmark:
    """Every question turn of a manifest, asked on its own, right if it says what the manifest's answer says."""

    def __init__(
        self,
        name: str,
        conversations: Sequence[Conversation],
        loader: MediaLoader,
        *,
        questions_per_clip: int | None = None,
    ) -> None:
        """
        Args:
            name: in the report.
            conversations: see `with_questions`.
            loader: reads the media of each line once for all its questions.
            questions_per_clip: ask only the first so many of each; None asks all.
        """
        self.name = name
        self._conversations = conversations
        self._loader = loader
        self._questions_per_clip = questions_per_clip
        self._tokenizer = loader.preprocessor.tokenizer
        self.pad_token_id = int(self._tokenizer.pad_token_id)
        if self._tokenizer.eos_token_id is None:
            raise DataError(
                f"{name}: the model's tokenizer has no eos_token, so no answer would end: name one in its config"
            )
        self.eos_token_id = int(self._tokenizer.eos_token_id)

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, index: int) -> Clip:
        conversation = self._conversations[index]
        questions = list(islice(conversation.questions(), self._questions_per_clip))
        clip = " ".join(str(part.path) for part in conversation.media) or conversation.id
        try:
            media = self._loader.load(questions[-1])
        except SampleError as error:
            return Clip(clip, len(questions), error=error)
        samples: list[Sample] = []
        failed: SampleError | None = None
        for question in questions:
            # A question sees the media of its own turn and of those before it.
            seen = media[: len(question.media)]
            try:
                samples.append(self._loader.sample(question, seen, generation_prompt=True))
            except SampleError as error:
                failed = failed or error
        return Clip(clip, len(questions), tuple(samples), failed)

    def decode(self, ids: Tensor) -> list[str]:
        return self._tokenizer.batch_decode(ids, skip_special_tokens=True)

    def is_correct(self, predicted: str, expected: str) -> bool:
        return is_same(predicted, expected)


def with_questions(name: str, conversations: Iterable[Conversation]) -> list[Conversation]:
    """The lines of a manifest that ask something.

    Args:
        name: of the benchmark.
        conversations: e.g. a `Manifest`.

    Raises:
        ManifestError: no questions, or two lines have the same id.
    """
    asking = [c for c in conversations if any(True for _ in c.questions())]
    ids = Counter(c.id for c in asking)
    if not ids:
        raise ManifestError(f"{name}: the manifest has no user turn that is followed by an answer")
    if ids.most_common(1)[0][1] > 1:
        raise ManifestError(f"{name}: two lines have the id {ids.most_common(1)[0][0]!r}; ids must be unique")
    return asking
