"""The loss of a compressor: what the LLM makes of the tokens that were kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnisieve.backbones import Adapter, Attachment, Estimator, adapter_for, attach
from omnisieve.backbones.tuning import set_dropout, without_lora
from omnisieve.compressors import Compressor
from omnisieve.compressors.inner import InnerCompressor
from omnisieve.data.batch import Batch, Features
from omnisieve.data.tokens import IGNORED
from omnisieve.layout import Modality
from omnisieve.plan import Plan
from omnisieve.training.warm_start import Listener, agreement, order_loss


class TrainingModule(nn.Module):
    """An LLM and a compressor, as one module that DeepSpeed can wrap.

    The encoders run without gradients, or not at all when a batch brings their features. Only rows that predict an
    answer token reach the LLM's head.

    Attributes:
        after_encoders: called in every forward, when the encoders have run.
    """

    def __init__(
        self,
        backbone: nn.Module,
        compressor: Compressor,
        *,
        estimator: Estimator | None = None,
        gate_clip: float | None = None,
        distill_weight: float = 0.0,
        gradient_checkpointing: bool = False,
        teacher: InnerCompressor | None = None,
    ) -> None:
        """Combine the two.

        Args:
            backbone: stock model; frozen parameters stay frozen.
            compressor: learned.
            estimator: gradient route; `masked` over the whole sequence when None.
            gate_clip: largest norm of a clip's gradient of the summed loss with respect to its gates. A gate of a token
                that the LLM would look at almost alone has a gradient of any size, while restoring that token changes
                the loss by a few nats; without a limit such tokens drown all others of their step.
            distill_weight: weight of the KL divergence from the same LLM with all tokens; above 0 costs a forward.
            gradient_checkpointing: recompute the LLM's layers in the backward pass.
            teacher: method inside the LLM whose order a warm start teaches.
        """
        super().__init__()
        self.backbone = backbone
        self.compressor = compressor
        self.adapter: Adapter = adapter_for(backbone)
        self._estimator = estimator or Estimator("masked")
        self._gate_clip = gate_clip
        self._distill_weight = distill_weight
        self._checkpointing = gradient_checkpointing
        self._listener = None if teacher is None else Listener(teacher)
        self._attachment: Attachment | None = None
        self.after_encoders: Callable[[], None] | None = None
        if gradient_checkpointing:
            thinker = self.adapter.thinker
            # Its name in later versions of transformers, then that in earlier ones.
            enable = getattr(thinker, "activation_checkpointing_enable", None) or thinker.gradient_checkpointing_enable
            enable({"use_reentrant": False})

    @property
    def last_plan(self) -> Plan:
        """Of the latest forward inside `attached`; in a warm start it is the teacher's."""
        if self._attachment is None or self._attachment.last_plan is None:
            raise RuntimeError("there was no forward yet, or `module.attached()` has ended")
        return self._attachment.last_plan

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach the compressor for all forwards and backwards inside: recomputed layers need the hooks, too."""
        with attach(self.backbone, self.compressor, self._estimator) as attachment:
            self._attachment = attachment
            try:
                yield
            finally:
                self._attachment = None

    def train(self, mode: bool = True) -> TrainingModule:
        """Set the mode of the compressor; of the LLM only that of adapters, or where checkpointing asks for it."""
        super().train(mode)
        self.backbone.eval()
        self.adapter.decoder.train(mode and self._checkpointing)
        set_dropout(self.adapter.decoder, mode)
        return self

    def forward(
        self,
        batch: Batch,
        *,
        scale: float = 1.0,
        ratio: float | None = None,
        seed: int = 0,
        warm_start: bool = False,
        lockstep: Set[Modality] = frozenset(),
    ) -> dict[str, Tensor]:
        """Run one micro-batch; call inside `attached`.

        Args:
            batch: on the module's device.
            scale: factor of the loss.
            ratio: retained ratio of this forward; the compressor's own when None.
            seed: of sampled candidates.
            warm_start: learn the teacher's order instead; what is returned then is said at `_warm_start`.
            lockstep: see `Adapter.encode`.

        Returns:
            Scalars. "loss": the objective summed over the answer tokens, times `scale`; the only one with a gradient.
            Sums for the record: "objective", "cross_entropy" and "divergence" over answer tokens, "correct_tokens",
            "correct_answers" and "answers" (an answer is correct if its every token is the likeliest), "kept_video",
            "kept_audio".
        """
        attachment = self._attachment
        if attachment is None:
            raise RuntimeError("TrainingModule.forward runs inside `with module.attached():`")
        compressor = self.compressor if ratio is None else self.compressor.at(retained_ratio=ratio)
        features = self.adapter.encode(batch, self.compressor.needs, lockstep)
        if self.after_encoders is not None:
            self.after_encoders()
        if warm_start:
            return self._warm_start(attachment, compressor, batch, features, scale)
        attachment.compressor = compressor
        attachment.seed = seed
        # The full forward comes first: between the compressed one and its backward there must be no other.
        teacher = self._teacher(attachment, batch, features) if self._distill_weight else None
        logits = self._logits(attachment, batch, features)
        assert attachment.targets is not None  # the forward was given labels
        assert attachment.last_plan is not None
        cross_entropy = F.cross_entropy(logits, attachment.targets, reduction="sum")
        divergence = cross_entropy.new_zeros(()) if teacher is None else divergence_from(teacher, logits)
        objective = cross_entropy + self._distill_weight * divergence
        gate = attachment.last_plan.gate
        if self._gate_clip is not None and gate is not None:
            gate.register_hook(partial(clip_rows, limit=self._gate_clip * scale))
        keep = attachment.last_plan.keep
        return {
            "loss": objective * scale,
            "objective": objective.detach(),
            "cross_entropy": cross_entropy.detach(),
            "divergence": divergence.detach(),
            **_accuracy(logits.detach(), attachment.targets, batch),
            "kept_video": (keep & batch.layout.mask(Modality.VIDEO)).sum(),
            "kept_audio": (keep & batch.layout.mask(Modality.AUDIO)).sum(),
        }

    def _warm_start(
        self, attachment: Attachment, compressor: Compressor, batch: Batch, features: Features, scale: float
    ) -> dict[str, Tensor]:
        """Teach the order of tokens; no gradient passes through the LLM.

        Returns:
            Scalars. "loss": `order_loss` summed over clips, times `scale`; the only one with a gradient. Sums for the
            record: "order" over clips, "clips", "agreeing" and "chosen" (see `agreement`), "kept_video", "kept_audio".
        """
        teacher = self._attended(attachment, batch, features)
        needs = self.adapter.needs(features, batch.layout, compressor.needs)
        video, audio = compressor.rank(self.adapter.merge(batch.input_ids, features), batch.layout, needs)
        # The similarity pruner has nothing to learn.
        parts = [part for part in (video, audio) if part.scores.requires_grad]
        loss = order_loss(parts, teacher).sum()
        agreeing, chosen = agreement(parts, teacher)
        return {
            "loss": loss * scale,
            "order": loss.detach(),
            "clips": torch.full((), len(batch), device=loss.device),
            "agreeing": agreeing,
            "chosen": chosen,
            "kept_video": video.keep().sum(),
            "kept_audio": audio.keep().sum(),
        }

    @torch.no_grad()
    def _attended(self, attachment: Attachment, batch: Batch, features: Features) -> Tensor:
        """[B, S] float32, what the teacher's query rows attend to among all tokens."""
        if self._listener is None:
            raise RuntimeError("a warm start needs a teacher")
        attachment.compressor = self._listener
        self._logits(attachment, batch, features)
        heard = attachment.compressor.heard  # by the one for the model's depth
        return torch.zeros(batch.labels.shape, device=batch.labels.device) if heard is None else heard

    def _logits(self, attachment: Attachment, batch: Batch, features: Features) -> Tensor:
        """[N, V] float32, one row per answer token."""
        attachment.expect(
            layout=batch.layout,
            needs=self.adapter.needs(features, batch.layout, self.compressor.needs),
            labels=batch.labels,
            answer_tokens=sum(batch.answer_tokens),
        )
        with self.adapter.deepstack(features, batch.layout):
            output = self.backbone(
                inputs_embeds=self.adapter.merge(batch.input_ids, features),
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            )
        return output.logits.float()

    @torch.no_grad()
    def _teacher(self, attachment: Attachment, batch: Batch, features: Features) -> Tensor:
        """[N, V] float32, of the LLM with all tokens and without adapters."""
        with attachment.paused(), without_lora(self.adapter.decoder):
            return self._logits(attachment, batch, features)


def clip_rows(values: Tensor, limit: float) -> Tensor:
    """Rows [B, S] scaled down to a norm of at most `limit` each."""
    norm = values.norm(dim=1, keepdim=True)
    return values * (limit / norm.clamp(min=limit))


def divergence_from(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of logits [N, V], summed over N."""
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)


def _accuracy(logits: Tensor, targets: Tensor, batch: Batch) -> dict[str, Tensor]:
    wrong = logits.argmax(-1) != targets
    starts = _answer_starts(batch.labels, len(targets))
    # Slot k collects the wrong tokens of answer k; there are at most as many answers as tokens.
    per_answer = wrong.new_zeros(len(targets), dtype=torch.long).index_add(0, starts.cumsum(0) - 1, wrong.long())
    answers = starts.sum()
    return {
        "correct_tokens": (~wrong).sum(),
        "correct_answers": answers - (per_answer > 0).sum(),
        "answers": answers,
    }


def _answer_starts(labels: Tensor, count: int) -> Tensor:
    """[count] bool, which of the answer tokens of `labels` [B, S] begin an answer; nothing waits for the device."""
    place = (labels == IGNORED).flatten().to(torch.uint8).argsort(stable=True)[:count]
    before = F.pad(labels[:, :-1], (1, 0), value=IGNORED).flatten()
    return before[place] == IGNORED
