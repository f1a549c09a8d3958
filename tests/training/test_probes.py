"""Probe clips: what changes of what stays, through checkpoints, on several ranks."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from omnisieve.data.batch import Batch
from omnisieve.data.errors import DataError
from omnisieve.layout import MEDIA
from omnisieve.training.pictures import WIDTH
from omnisieve.training.probes import Probes
from tests.models import SILENT, SOUNDING, SPEECH, tiny_thinker
from tests.training.batches import make_batch
from tests.training.clips import probes_of
from tests.training.runs import Alone
from tests.waiting import NoWaiting

CLIPS = [SOUNDING, SILENT, SPEECH]


@dataclass
class Gathering(Alone):
    """The first of two ranks; the other brings `others`."""

    others: list[Any] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        return [value, *self.others]


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    model = tiny_thinker()
    made = []
    for number, clip in enumerate(CLIPS):
        batch = make_batch(model, [[clip]])
        made.append(Batch(**{**vars(batch), "ids": (f"clip {number}",)}))
    return made


def draw(batch: Batch, seed: int, share: float = 0.5) -> torch.Tensor:
    """A random selection [B, S] in which text stays."""
    random = torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(seed)) < share
    return random | ~batch.layout.mask(*MEDIA)


def look(probes: Probes, batches: list[Batch], seed: int) -> dict[str, float]:
    for batch in batches:
        probes.note(batch, draw(batch, seed))
    return probes.settle()


def changed(batches: list[Batch], before: int, after: int) -> dict[str, float]:
    """By its definition: 1 - |both| / |kept now|, over all clips."""
    shares = {}
    for kind in MEDIA:
        masks = [batch.layout.mask(kind) for batch in batches]
        both = sum(int((draw(b, before) & draw(b, after) & m).sum()) for b, m in zip(batches, masks, strict=True))
        kept = sum(int((draw(b, after) & m).sum()) for b, m in zip(batches, masks, strict=True))
        shares[kind.name.lower()] = 1 - both / kept
    return shares


def make(batches: list[Batch], ranks: Alone | None = None) -> Probes:
    return Probes(probes_of(lambda clips: batches[clips[0]], len(batches)), ranks or Gathering())


def test_churn_is_the_share_of_kept_tokens_that_were_not_kept_before(batches):
    probes = make(batches)
    assert look(probes, batches, 0) == {}
    assert look(probes, batches, 1) == pytest.approx(changed(batches, 0, 1))
    assert look(probes, batches, 1) == {"video": 0.0, "audio": 0.0}
    assert look(probes, batches, 2) == pytest.approx(changed(batches, 1, 2))


def test_a_checkpoint_remembers_what_stayed(batches):
    probes, resumed = make(batches), make(batches)
    look(probes, batches, 0)
    resumed.load_state_dict(json.loads(json.dumps(probes.state_dict())))
    assert look(resumed, batches, 1) == look(probes, batches, 1) != {}


def test_clips_of_other_ranks_count_and_padding_does_not(batches):
    others: list[Any] = []
    ranks = Gathering(others=others)
    probes, alone = make(batches, ranks), make(batches)
    wide = torch.nn.functional.pad
    for seed in (0, 1):
        modality = np.pad(batches[0].layout.modality[0], (0, 3))  # in another batch, clip 0 is padded
        others[:] = [{"clip 0": (modality, wide(draw(batches[0], seed)[0], (0, 3)).numpy())}]
        found = look(probes, batches[1:], seed)
        expected = look(alone, batches, seed)
    assert found == pytest.approx(expected)
    assert probes.state_dict().keys() == alone.state_dict().keys()


def test_noting_what_stays_never_waits_for_the_device(batches):
    keep = draw(batches[0], 0).to("meta")
    with NoWaiting():
        make(batches).note(batches[0], keep)


def test_clips_that_are_no_probes_are_not_looked_at(batches):
    probes = Probes({}, Gathering())
    assert look(probes, batches, 0) == look(probes, batches, 1) == {}
    assert probes.state_dict() == {}
    assert probes.pictures("step 1") == {}


def test_each_clip_is_decoded_once_and_drawn_as_it_was_seen(batches):
    asked: list[int] = []

    def batch(clips: list[int]) -> Batch:
        asked.extend(clips)
        return batches[clips[0]]

    probes = Probes(probes_of(batch, len(batches)), Gathering())
    look(probes, batches, 0)
    first = probes.pictures("step 1")
    look(probes, batches, 1)
    second = probes.pictures("step 1")
    assert asked == [0, 1, 2]
    assert first.keys() == {"clip 0", "clip 1", "clip 2"}
    assert all(rgb.shape[1:] == (WIDTH, 3) and rgb.dtype == np.uint8 for rgb in first.values())
    assert not np.array_equal(first["clip 0"], second["clip 0"])


def test_a_clip_that_cannot_be_decoded_is_named_once_and_still_compared(batches, capsys: pytest.CaptureFixture[str]):
    def broken() -> Any:
        raise DataError("the file is gone")

    clips = probes_of(lambda clips: batches[clips[0]], len(batches))
    # The last one decodes to other tokens than the validation saw.
    probes = Probes({**clips, "clip 0": broken, "clip 2": clips["clip 1"]}, Gathering())
    look(probes, batches, 0)
    assert probes.pictures("step 1").keys() == probes.pictures("step 2").keys() == {"clip 1"}
    said = capsys.readouterr().err
    assert said.count("no pictures of probe clip clip 0: the file is gone") == 1
    assert said.count("no pictures of probe clip clip 2: it has") == 1
    assert look(probes, batches, 1) == pytest.approx(changed(batches, 0, 1))
