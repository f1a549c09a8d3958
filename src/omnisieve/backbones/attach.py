"""`with attach(model, compressor):` makes a stock model compress its input, by hooks alone.

Three hooks carry it. The embedding sees `input_ids`; the decoder sees merged embeddings, positions and mask, and is
given the compressed ones; the head sees hidden states, of which it is given the answer rows when labels were handed in.
While decoding only the attention mask is replaced. What decoding must know lives on the cache, what a forward must
know belongs to its thread, so several generations may run at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakSet

import numpy as np
from torch import Tensor, nn

from omnisieve.backbones.adapter import Adapter, BackboneError, adapter_for, arrange
from omnisieve.backbones.answers import answer_rows, take_rows
from omnisieve.backbones.arguments import cache_of, check_arguments, padding_side_of
from omnisieve.backbones.deepstack import install_deepstack, take_over
from omnisieve.backbones.estimator import Estimator
from omnisieve.backbones.flow import Answers, Expected, Flow
from omnisieve.backbones.gated_attention import GatedAttentionSwitch, gated_attention_switch
from omnisieve.backbones.inner import STATE, DecodeStep, HeldPrompt, InnerRun, Kept, before_layer, inner_run
from omnisieve.backbones.router_mask import RouterMask
from omnisieve.backbones.saliency import install_saliency
from omnisieve.compressors.base import Compressor, Need
from omnisieve.compressors.inner import InnerCompressor
from omnisieve.layout import TokenLayout
from omnisieve.plan import Plan

_attached: WeakSet[nn.Module] = WeakSet()
# Attribute of the cache that holds its `HeldPrompt`.
_PROMPT = "omnisieve_prompt"


class Attachment:
    """A running `attach`; tells a forward what the caller knows, and the caller what a forward did.

    Attributes:
        adapter: the model's parts.
        compressor: what plans, for the model's depth; may be exchanged between forwards, e.g. for
            `compressor.at(retained_ratio=...)`.
        estimator: the gradient route; used only where the compressor's plan has gates.
        seed: of sampled candidates.
        last_plan, last_layout: of the latest prompt or training forward.
        targets: [N] answer tokens, row by row with the logits of the latest forward that was given labels.
    """

    def __init__(
        self, adapter: Adapter, compressor: Compressor, estimator: Estimator, switch: GatedAttentionSwitch
    ) -> None:
        self.adapter = adapter
        self.compressor = compressor
        self.estimator = estimator
        self.seed = 0
        self.last_plan: Plan | None = None
        self.last_layout: TokenLayout | None = None
        self.targets: Tensor | None = None
        self._last_run: InnerRun | None = None
        self._flow = Flow()
        self._router_mask = RouterMask()
        self._switch = switch
        self._paused = False

    @property
    def compressor(self) -> Compressor:
        return self._compressor

    @compressor.setter
    def compressor(self, compressor: Compressor) -> None:
        if isinstance(compressor, InnerCompressor):
            compressor = compressor.for_depth(len(self.adapter.layers))
        self._compressor = compressor

    @property
    def layout(self) -> TokenLayout | None:
        """Layout for the thread's next prompt or training forward, which uses it up; None reads it from `input_ids`."""
        return self._flow.expected.layout

    @layout.setter
    def layout(self, layout: TokenLayout | None) -> None:
        self._flow.expected = replace(self._flow.expected, layout=layout)

    def expect(
        self,
        *,
        layout: TokenLayout | None = None,
        needs: Mapping[Need, Tensor] | None = None,
        labels: Tensor | None = None,
        answer_tokens: int = 0,
    ) -> None:
        """Say what this thread's next prompt or training forward will be; it uses this up.

        Args:
            layout: of the batch; required when the model is given `inputs_embeds`.
            needs: encoder statistics [B, S, ...] that come with cached features, instead of computing them.
            labels: [B, S] long, unshifted, -100 outside answers. The logits then are [N, V], one row for each
                answer token of the batch, and `targets` holds the tokens.
            answer_tokens: N, counted on the host.
        """
        self._flow.expected = Expected(layout, needs, labels, answer_tokens)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards inside see all tokens; answer rows are taken as usual."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def layer_counts(self) -> np.ndarray:
        """Video and audio tokens that each decoder layer processed in the latest prompt or training forward.

        Returns:
            int64 [L, B, 2], read back from the device.
        """
        if self.last_plan is None or self.last_layout is None:
            raise BackboneError("nothing was compressed yet: run the model first")
        if self._last_run is not None:
            return self._last_run.layer_counts()
        kept = self.last_plan.measured(self.last_layout)
        return np.stack([kept["video"], kept["audio"]], axis=-1)[None].repeat(len(self.adapter.layers), axis=0)

    # Hooks.

    def _install(self, hooks: ExitStack) -> None:
        adapter = self.adapter
        hooks.callback(adapter.embeddings.register_forward_pre_hook(self._on_embedding, with_kwargs=True).remove)
        hooks.callback(adapter.decoder.register_forward_pre_hook(self._on_decoder, with_kwargs=True).remove)
        hooks.callback(adapter.lm_head.register_forward_pre_hook(self._on_head).remove)
        for number, layer in enumerate(adapter.layers):
            hooks.callback(layer.register_forward_pre_hook(partial(before_layer, number), with_kwargs=True).remove)
        install_deepstack(adapter.deepstack_layers, hooks)
        self._router_mask.install(adapter.thinker, hooks)
        install_saliency(adapter.audio_tower, adapter.visual, self.compressor.needs, self._on_saliency, hooks)

    def _on_embedding(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._flow.input_ids = args[0] if args else kwargs.get("input")

    def _on_saliency(self, need: Need, values: Tensor) -> None:
        self._flow.saliency[need] = values

    def _on_head(self, module: nn.Module, args: tuple) -> Any:
        answers, self._flow.answers = self._flow.answers, None
        if answers is None:
            return None
        labels = answers.labels if answers.run is None else answers.run.remaining(answers.labels)
        rows, self.targets = answer_rows(labels, answers.count)
        return take_rows(args[0], rows), *args[1:]

    def _on_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        ids, self._flow.input_ids, self._flow.answers = self._flow.input_ids, None, None
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            return None
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            self._decode(cache, embeds, ids, kwargs)
        else:
            self._prefill(cache, embeds, ids, kwargs)
        return args, kwargs

    def _decode(self, cache: Any, embeds: Tensor, ids: Tensor | None, kwargs: dict[str, Any]) -> None:
        prompt: HeldPrompt | None = getattr(cache, _PROMPT, None)
        several = embeds.shape[1] > 1
        if prompt is None:
            if several and not self._paused and (ids is None or self._has_media(ids)):
                raise BackboneError(
                    "media tokens on top of a filled cache cannot be compressed: give the whole prompt at once, "
                    "without prefill_chunk_size and without the cache of an earlier turn"
                )
            return
        if several:
            raise BackboneError(
                "several tokens on top of a compressed prompt: assisted decoding, prefill_chunk_size and reusing the "
                "cache for a further turn are not supported; generate token by token from the whole prompt"
            )
        new = cache.get_seq_length() - prompt.lengths[0] + 1
        kwargs["attention_mask"] = prompt.mask(0, new)
        if not prompt.uniform:
            kwargs[STATE] = DecodeStep(self.adapter.decoder.config, prompt, new)

    def _prefill(self, cache: Any, embeds: Tensor, ids: Tensor | None, kwargs: dict[str, Any]) -> None:
        if hasattr(cache, _PROMPT):
            delattr(cache, _PROMPT)  # the cache was reset and serves another prompt
        expected, self._flow.expected = self._flow.expected, Expected()
        labels = expected.labels
        plan = run = None
        if not self._paused:
            layout = self._layout(expected.layout, embeds, ids, kwargs)
            plan = self._plan(embeds, layout, expected.needs)
            run = inner_run(self.compressor, self.adapter.decoder, layout, plan)
            self.last_plan, self.last_layout, self._last_run = plan, layout, run
            if run is not None or not plan.is_identity(layout):
                labels = self._compress(plan, run, layout, cache, embeds, labels, kwargs)
        self._flow.saliency.clear()
        self._switch.set(plan is not None and plan.candidates is not None)
        if labels is not None:
            self._flow.answers = Answers(labels, expected.answer_tokens, run)

    # Steps of a prefill.

    def _layout(
        self, given: TokenLayout | None, embeds: Tensor, ids: Tensor | None, kwargs: dict[str, Any]
    ) -> TokenLayout:
        """The layout that was given, widened to beams, or the one that the ids tell."""
        rows, length = embeds.shape[:2]
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise BackboneError(
                "a prepared attention mask cannot be compressed: pass a mask [B, S], and generate with the default "
                "dynamic cache (static caches prepare masks)"
            )
        if given is not None:
            beams, rest = divmod(rows, given.batch_size)
            if given.length != length or rest:
                raise BackboneError(
                    f"the layout is for [{given.batch_size}, {given.length}] tokens, the forward has [{rows}, {length}]"
                )
            same = given if beams == 1 else given.select(np.repeat(np.arange(given.batch_size), beams))
            return same.to(embeds.device) if same.device != embeds.device else same
        if ids is None or ids.shape != embeds.shape[:2]:
            raise BackboneError(
                "the model was given inputs_embeds, which do not tell what each token is: set the attachment's layout "
                "before the call, or pass input_ids"
            )
        return self.adapter.layout(ids, kwargs.get("position_ids"), mask)

    def _plan(self, embeds: Tensor, layout: TokenLayout, given: Mapping[Need, Tensor] | None) -> Plan:
        needs = {need: self._need(need, layout, given or {}) for need in self.compressor.needs}
        plan = self.compressor.plan(embeds, layout, needs)
        if self.estimator.route == "masked" and plan.gate is not None:
            plan = plan.with_candidates(layout, self.estimator.candidates, self.seed)
        return plan

    def _need(self, need: Need, layout: TokenLayout, given: Mapping[Need, Tensor]) -> Tensor:
        """[B, S, ...], given with cached features or measured in the encoder that has just run."""
        if need in given:
            return given[need].repeat_interleave(layout.batch_size // len(given[need]), dim=0)
        values = self._flow.saliency.get(need)
        if values is None and layout.counts(need.modality).any():
            raise BackboneError(
                f"{self.compressor.name} needs {need.kind} of {need.modality.name.lower()} tokens, but the encoder "
                "did not run in this forward: hand it in with `attachment.expect(needs=...)`"
            )
        return arrange(values, need, layout)

    def _compress(
        self,
        plan: Plan,
        run: InnerRun | None,
        layout: TokenLayout,
        cache: Any,
        embeds: Tensor,
        labels: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor | None:
        """Replace the decoder's arguments; returns the compressed labels."""
        check_arguments(self.adapter, run, layout, kwargs)
        cache = cache_of(self.adapter, plan, cache, kwargs)
        side = padding_side_of(layout, cached=cache is not None)
        compressed = plan.apply(embeds, position_ids=kwargs.get("position_ids"), labels=labels, padding_side=side)
        take_over(kwargs, compressed.index, compressed.attention_mask)
        self._router_mask.follow(compressed.attention_mask)
        kept = Kept.entering(compressed)
        prompt = HeldPrompt([kept] * len(self.adapter.layers))
        if cache is not None:
            setattr(cache, _PROMPT, prompt)
        # Causal attention never looks at padding on the right; without a mask kernels are fused.
        masked = cache is not None or side == "left"
        if run is not None:
            run.start(kept, prompt, side, masked=masked, labels=labels)
            kwargs[STATE] = run
        kwargs["inputs_embeds"] = compressed.embeds
        kwargs["position_ids"] = compressed.position_ids
        kwargs["attention_mask"] = kept.mask if masked else None
        if compressed.key_gate is not None:
            kwargs["key_gate"] = compressed.key_gate
        return compressed.labels if run is None else labels

    def _has_media(self, ids: Tensor) -> bool:
        return any(bool((ids == token_id).any()) for token_id in self.adapter.token_ids.values())


@contextmanager
def attach(model: nn.Module, compressor: Compressor, estimator: Estimator | None = None) -> Iterator[Attachment]:
    """Compress what `model` reads, inside the context.

    Forward and `generate` (greedy, sampling, beams) work as they do without; the logits of a compressed prompt have
    its compressed length. At ratio 1 nothing is touched, bit for bit. Static caches, chunked prefill and assisted
    decoding are refused. Run the backward pass inside the context, because some versions call the hooks again when
    checkpointing repeats a layer, and in the `masked` route before the next forward. Without a cache a method that
    prunes inside the LLM is asked anew by every generated token.

    Raw media are spread over beams by the stock model, wrongly in 5.17 and 5.18 (videos) and so far in all versions
    (several sounds per sample): hand in merged embeddings with `Attachment.layout` there.

    Args:
        model: see `adapter_for`.
        compressor: moves to no device by itself.
        estimator: the gradient route of a learned compressor in training; `hard_drop` when None.

    Raises:
        BackboneError: the model is not supported, has the wrong width for the compressor, is on another device, or is
            attached already.
    """
    adapter = adapter_for(model)
    width = getattr(compressor, "hidden_size", adapter.hidden_size)
    if width != adapter.hidden_size:
        raise BackboneError(f"{compressor.name} is for hidden size {width}, the model has {adapter.hidden_size}")
    place = adapter.thinker.get_input_embeddings().weight.device
    if elsewhere := {parameter.device for parameter in compressor.parameters()} - {place}:
        raise BackboneError(
            f"{compressor.name} is on {elsewhere.pop()}, the model on {place}: move it there with .to()"
        )
    if adapter.decoder in _attached:
        raise BackboneError("a compressor is attached to this model already: leave that context first")
    with ExitStack() as hooks:
        switch = hooks.enter_context(gated_attention_switch(adapter.decoder))
        attachment = Attachment(adapter, compressor, estimator or Estimator(), switch)
        _attached.add(adapter.decoder)
        hooks.callback(_attached.discard, adapter.decoder)
        attachment._install(hooks)
        yield attachment
