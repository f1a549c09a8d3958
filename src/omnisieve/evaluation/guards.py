"""Hearing and seeing tests: an evaluation whose model never gets the sound would look like any other.

The tokens of one modality are put into reverse order before they are merged; if no logit moves, they never reached
the LLM.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from omnisieve.backbones import Adapter
from omnisieve.evaluation.benchmarks import Clip
from omnisieve.evaluation.prompts import make_prompts, next_token_logits
from omnisieve.layout import Modality

_log = logging.getLogger(__name__)
_TESTS = {"hearing_test": Modality.AUDIO, "seeing_test": Modality.VIDEO}


@dataclass
class MediaGuard:
    """Runs each test once, on the first question that has the modality.

    Attributes:
        adapter: of the model.
        pad_token_id: of the tokenizer.
        found: per test whether it passed and the largest change of a logit; None while no clip had the modality.
    """

    adapter: Adapter
    pad_token_id: int
    found: dict[str, dict[str, float | bool] | None] = field(default_factory=lambda: dict.fromkeys(_TESTS))

    def look(self, clips: Sequence[Clip]) -> None:
        """Take a question of `clips` for the tests that still wait for one."""
        for test, modality in _TESTS.items():
            clip = next((c for c in clips if (c.questions[-1].tokens.modality == modality).any()), None)
            if self.found[test] is None and clip is not None:
                change = self._change(replace(clip, questions=clip.questions[-1:]), modality)
                self.found[test] = {"passed": change > 0, "largest_logit_change": change}
                if not change > 0:
                    _log.warning("%s failed: the model ignores %s", test.replace("_", " "), modality.name.lower())

    def _change(self, clip: Clip, modality: Modality) -> float:
        (prompt,) = make_prompts(self.adapter, [clip], pad_token_id=self.pad_token_id)
        name = modality.name.lower()
        reversed_ = replace(prompt.features, **{name: getattr(prompt.features, name).flip(0)})
        before = next_token_logits(self.adapter, prompt)
        after = next_token_logits(self.adapter, prompt.with_features(self.adapter, reversed_))
        return float((before - after).abs().max())
