"""How much memory a rank of a run will need: arithmetic on sizes, before anybody rents the GPUs.

Counted is what a step keeps: weights, gradients, optimiser states, DeepSpeed's buckets, the sequence before compression
and what the LLM's forward leaves for the backward pass; or, if they need more before that, the encoders' passing
activations. Not counted are what a process takes before it loads a model (an accelerator's context, on a CPU the
libraries) and the allocator's waste: leave a fifth of a device free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from omnisieve.backbones.loading import shape_of
from omnisieve.backbones.shape import DecoderShape, decoder_shape
from omnisieve.backbones.tuning import adapter_width
from omnisieve.config import TrainConfig
from omnisieve.data.batch import Batch
from omnisieve.layout import Modality
from omnisieve.training.deepspeed_settings import bucket_elements, trains_in_bfloat16
from omnisieve.training.objective import TrainingModule

_FLOAT32 = 4
_ADAM = 3 * _FLOAT32
"""Of a trainable parameter: two moments, and the float32 value that they update."""
_MEL_FRAMES_PER_SECOND = 100
_LIVE_PARAMETERS = 1_000_000_000
"""What ZeRO-3 holds whole at once at most (DeepSpeed's stage3_max_live_parameters)."""


@dataclass(frozen=True)
class Sizes:
    """What memory depends on.

    Attributes:
        frozen, trainable: parameters.
        element: bytes of one number of the LLM.
        decoder: its shape.
        experts_per_token: that a token passes in each layer; 0 in a dense LLM.
        adapter_inputs: width of what adapters see, over all layers.
        tokens: that the LLM's layers process in one forward, padding included.
        answer_tokens: of one forward, each of which gets logits.
        sequence: tokens of one forward before compression, padding included.
        encoder_inputs, encoders: bytes of what one forward encodes, and of what passes through the encoders at once.
    """

    frozen: int
    trainable: int
    element: int
    decoder: DecoderShape
    experts_per_token: int
    adapter_inputs: int
    tokens: int
    answer_tokens: int
    sequence: int = 0
    encoder_inputs: int = 0
    encoders: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights, gradients, optimizer, buckets, encoders, sequence, activations, logits: on its device.
        host: in the memory of its machine, because it is offloaded.
    """

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    encoders: int
    sequence: int
    activations: int
    logits: int
    host: int

    @property
    def device(self) -> int:
        """At the peak: the encoders are done when the LLM begins."""
        stays = self.weights + self.gradients + self.optimizer + self.buckets
        return stays + max(self.encoders, self.sequence + self.activations + self.logits)


def sizes_of(module: TrainingModule, batch: Batch, config: TrainConfig) -> Sizes:
    """Sizes of a run, from its model and a batch of it."""
    parameters = [(p, shape_of(p).numel()) for p in module.parameters()]
    element = getattr(torch, config.model.dtype).itemsize
    llm = module.adapter.decoder
    inputs, passing = (0, 0) if config.data.feature_cache is not None else encoder_bytes(module, batch)
    return Sizes(
        sequence=batch.layout.length * len(batch),
        encoder_inputs=inputs,
        encoders=passing,
        frozen=sum(size for p, size in parameters if not p.requires_grad),
        trainable=sum(size for p, size in parameters if p.requires_grad),
        element=element,
        decoder=decoder_shape(llm.config, element),
        experts_per_token=getattr(llm.config, "num_experts_per_tok", 0),
        adapter_inputs=adapter_width(llm),
        tokens=processed_tokens(module, batch, config),
        answer_tokens=sum(batch.answer_tokens),
    )


def encoder_bytes(module: TrainingModule, batch: Batch) -> tuple[int, int]:
    """What the encoders are given for a batch, and their peak activation memory, without gradients.

    The larger of both towers counts. A patch takes most where the rotary embedding turns its query and key in float32;
    of sound it is Qwen2.5-Omni's feed-forward, or Qwen3-Omni's first convolution.
    """
    thinker = module.adapter.thinker
    vision, audio, element = thinker.config.vision_config, thinker.config.audio_config, thinker.dtype.itemsize
    layout = batch.layout
    patches = int(layout.counts(Modality.VIDEO, Modality.IMAGE).sum()) * vision.spatial_merge_size**2
    pixels = patches * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * element
    seeing = patches * vision.hidden_size * (6 * element + 6 * _FLOAT32)
    seconds = int(layout.counts(Modality.AUDIO).sum()) / module.adapter.token_rules().ids_per_second
    frames = int(seconds * _MEL_FRAMES_PER_SECOND)
    if channels := getattr(audio, "downsample_hidden_size", 0):
        hearing = frames * 3 * channels * audio.num_mel_bins // 4 * element
    else:
        hearing = frames * (2 * audio.d_model + audio.encoder_ffn_dim) * element
    return pixels + frames * audio.num_mel_bins * element, pixels + max(seeing, hearing)


def processed_tokens(module: TrainingModule, batch: Batch, config: TrainConfig) -> int:
    """Tokens of a batch that the LLM's layers process in training, padding included; at the highest ratio drawn."""
    layout, highest = batch.layout, config.train.ratio.max
    compressor = module.compressor if highest is None else module.compressor.at(retained_ratio=highest)
    budget = compressor.budget(layout)
    media = layout.counts(Modality.VIDEO, Modality.AUDIO)
    kept = budget.video + budget.audio
    estimator = config.train.estimator
    share = estimator.candidates if estimator.route == "masked" else 0.0
    lengths = layout.counts(Modality.TEXT, Modality.IMAGE) + kept + share * (media - kept)
    return int(lengths.max()) * len(lengths)


def estimate(config: TrainConfig, sizes: Sizes, ranks: int) -> Memory:
    """Memory of each of so many ranks."""
    train, decoder = config.train, sizes.decoder
    own = 2 if trains_in_bfloat16(config) else _FLOAT32
    spread = [ranks if train.zero_stage >= stage else 1 for stage in (1, 2, 3)]
    weights = sizes.frozen * sizes.element + sizes.trainable * own
    live = 0
    if train.zero_stage == 3:
        live = min(weights, _LIVE_PARAMETERS * sizes.element)
    resident = weights // spread[2]
    optimizer = sizes.trainable * _ADAM // spread[0]
    inputs = decoder.layers * decoder.hidden_size * sizes.element
    layers = decoder.layers * layer_bytes(sizes, train.llm.mode) + sizes.adapter_inputs * _FLOAT32
    # With checkpointing every layer's input, and one layer at a time in full.
    stored = inputs + layers // decoder.layers if train.gradient_checkpointing else layers
    # An offloaded optimiser holds a float32 gradient beside its states.
    host = optimizer + sizes.trainable * _FLOAT32 // spread[0] if train.offload.optimizer else 0
    host += resident if train.offload.parameters else 0
    return Memory(
        weights=(0 if train.offload.parameters else resident) + live,
        gradients=sizes.trainable * own // spread[1],
        optimizer=0 if train.offload.optimizer else optimizer,
        buckets=bucket_bytes(config, sizes.trainable * own, own),
        encoders=sizes.encoders,
        # Features, merged embeddings, and the float32 copies that a learned compressor keeps.
        sequence=sizes.encoder_inputs + sizes.sequence * decoder.hidden_size * 2 * (sizes.element + _FLOAT32),
        activations=sizes.tokens * stored,
        # The LLM's logits, the same in float32, their gradient and the softmax of the loss.
        logits=sizes.answer_tokens * decoder.vocabulary * (sizes.element + 3 * _FLOAT32),
        host=host,
    )


def bucket_bytes(config: TrainConfig, gradients: int, element: int) -> int:
    """What DeepSpeed reduces gradients in: two buckets where that overlaps with the backward pass.

    Args:
        config: of the run.
        gradients: bytes of all of them.
        element: bytes of one.
    """
    given = config.train.deepspeed
    overlaps = config.train.zero_stage < 3 and given.get("zero_optimization", {}).get("overlap_comm", False)
    return bucket_elements(gradients // element, given) * element * (2 if overlaps else 1)


def layer_bytes(sizes: Sizes, mode: str) -> int:
    """What one layer keeps of a token for its backward pass, with fused attention and without adapters.

    Both norms keep a float32 copy of the residual stream; attention its queries, keys and values for every head, what
    it says, and the quotient of the gated route; the gated feed-forward three times its width. A layer that learns
    keeps the inputs of its linear modules, too.
    """
    decoder = sizes.decoder
    norms = 2 * decoder.hidden_size * _FLOAT32
    attention = 6 * decoder.attention_width
    feed_forward = 3 * decoder.intermediate_size + sizes.experts_per_token * decoder.hidden_size
    inputs = 0
    if mode == "full":
        inputs = (2 + sizes.experts_per_token) * decoder.hidden_size
        inputs += decoder.attention_width + decoder.intermediate_size
    return norms + (attention + feed_forward + inputs) * sizes.element


def table(config: TrainConfig, sizes: Sizes, ranks: Sequence[int], device_bytes: int) -> list[str]:
    """Lines that show the estimate for some numbers of ranks, in GiB, against what a device has."""
    rows = ["ranks  weights  gradients  optimiser  buckets  encoders  sequence  activations  logits   peak   host"]
    for count in ranks:
        need = estimate(config, sizes, count)
        parts = [need.weights, need.gradients, need.optimizer, need.buckets, need.encoders, need.sequence]
        parts += [need.activations, need.logits, need.device, need.host]
        widths = (7, 9, 9, 7, 8, 8, 11, 6, 5, 5)
        cells = [f"{value / 2**30:>{width}.1f}" for value, width in zip(parts, widths, strict=True)]
        fits = "fits" if need.device <= 0.8 * device_bytes else "does not fit"
        rows.append(f"{count:>5}  {'  '.join(cells)}  {fits} {device_bytes / 2**30:.0f} GiB with a fifth to spare")
    return rows
