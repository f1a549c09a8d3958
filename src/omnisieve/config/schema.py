"""What can be configured: the dataclasses are the schema, the defaults and the help text at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import MISSING

from omnisieve.config.keys import ConfigError, in_unit_interval, not_negative, option, positive, require, section


@dataclass
class ModelSection:
    """The LLM with its encoders, as a stock transformers checkpoint."""

    path: str = option(MISSING, "local folder or hub name of the checkpoint")
    dtype: Literal["bfloat16", "float32"] = option(
        "bfloat16", "of the weights as they are loaded; bfloat16 halves memory, but is slower than float32 on most CPUs"
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = option(
        "sdpa",
        "eager materialises S x S attention; flash_attention_2 needs the flash-attn package and bfloat16, and cannot "
        "train the masked route",
    )
    encoder_attn_implementation: Literal["batched_sdpa", "sdpa", "eager", "flash_attention_2"] = option(
        "batched_sdpa",
        "of the vision and audio towers alone. batched_sdpa calls attention once per layer and window size, sdpa and "
        "eager once per layer and window: tens of thousands of calls per minute of video; flash_attention_2 needs the "
        "flash-attn package and bfloat16, and goes with every route",
    )

    def __post_init__(self) -> None:
        for key in ("attn_implementation", "encoder_attn_implementation"):
            if getattr(self, key) == "flash_attention_2" and self.dtype != "bfloat16":
                raise ConfigError(f"model.{key} flash_attention_2 needs model.dtype=bfloat16")


@dataclass
class AudioSection:
    """The sound of a sample."""

    max_seconds: float = option(300.0, "longer sound is cut, with one warning that counts it; 25 tokens a second")


@dataclass
class MediaSection:
    """How media files become encoder inputs. Visual tokens grow with fps, max_frames and max_pixels."""

    protocol: Literal["processor", "qwen_omni_utils", "omnisift", "omnizip", "seats"] | None = option(
        None,
        "how densely media are read, as published (docs/protocols.md): the keys from fps to total_pixels, and which "
        "frames are taken; a key that is given counts instead. processor: sizes of the model's own processor. null: "
        "qwen_omni_utils for a model with the released vocabulary, processor for another",
    )
    fps: float | None = option(
        None, "frames per second read from a video; 2 frames make one grid of tokens; null: the protocol's, 2"
    )
    min_frames: int | None = option(None, "of a video that is that long; null: the protocol's")
    max_frames: int | None = option(
        None, "longer videos are sampled more thinly over their whole length; null: the protocol's"
    )
    min_pixels: int | None = option(
        None,
        "smaller frames and images are enlarged to this; a token is 28 x 28 pixels, of Qwen3-Omni 32 x 32; null: the "
        "protocol's",
    )
    max_pixels: int | None = option(None, "larger frames and images are reduced to this; null: the protocol's")
    total_pixels: int | None = option(
        None, "budget of a whole video; the frames of long videos shrink to fit it; null: the protocol's"
    )
    audio: AudioSection = section(AudioSection)
    decode_seconds: float = option(60.0, "a file that takes longer to decode counts as broken")
    workers: int = option(2, "decoding processes per rank; raise it while the log shows data wait")
    feature_cache: str | None = option(
        None,
        "folder of tools/cache_features.py; saves decoding and encoders; at 7B, up to 340 MB per minute of video, "
        "150 under protocol omnisift",
    )
    feature_cache_dtype: Literal["bfloat16", "float32", "int8"] | None = option(
        None,
        "how tools/cache_features.py stores features; null: as the encoders give them, which equals encoding online. "
        "int8 takes half of bfloat16 and rounds each token to 1/254 of its largest value; reading needs no setting",
    )

    def __post_init__(self) -> None:
        sampling = ("fps", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels")
        positive("data", self, "decode_seconds", *(name for name in sampling if getattr(self, name) is not None))
        positive("data.audio", self.audio, "max_seconds")
        not_negative("data", self, "workers")
        for least, most in (("min_frames", "max_frames"), ("min_pixels", "max_pixels")):
            low, high = getattr(self, least), getattr(self, most)
            if low is not None and high is not None and low > high:
                raise ConfigError(f"data.{least} {low} is above data.{most} {high}")


@dataclass
class DataSection(MediaSection):
    """Training data: manifests in messages form, and how their media are read."""

    train: str = option(MISSING, "JSONL manifest; media paths in it are relative to its folder")
    val: str | None = option(None, "JSONL manifest for validation; null: no validation, the last step is the result")
    max_tokens: int | None = option(
        None, "a longer sample, text and media before compression, is treated as too_long says; null: no limit"
    )
    too_long: Literal["skip", "lower_fps"] = option(
        "skip",
        "skip: another sample takes its place, as with a broken file; lower_fps: its videos are read more thinly until "
        "it fits, and only what cannot fit is skipped; not from a feature_cache. Either is listed in output_dir",
    )
    recycle_after: int = option(
        1000, "samples after which a decoding process is replaced, without a pause; 0: never. Its memory stays bounded"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("data", self, "recycle_after")
        if self.max_tokens is not None:
            positive("data", self, "max_tokens")
        if self.too_long == "lower_fps" and self.max_tokens is not None and self.feature_cache is not None:
            raise ConfigError(
                "data.too_long is lower_fps, but the frame rate of what is in data.feature_cache is fixed: choose "
                "data.too_long=skip, or lower data.fps or data.max_frames and cache again"
            )


@dataclass
class EstimatorSection:
    """How the loss teaches a selection that is not differentiable."""

    route: Literal["masked", "hard_drop"] = option(
        "masked", "hard_drop removes dropped tokens: cheapest, but teaches kept ones only; masked teaches both"
    )
    candidates: float = option(
        1.0, "masked: share of the dropped tokens that stay in the sequence; 1 teaches most, 0.5 costs about half"
    )
    gate_clip: float | None = option(
        2.5, "largest norm, in nats, of what a step teaches the gates of one clip; null: no limit, learns less steadily"
    )

    def __post_init__(self) -> None:
        in_unit_interval("train.estimator", self, "candidates")
        if self.gate_clip is not None:
            positive("train.estimator", self, "gate_clip")


@dataclass
class RatioSection:
    """Elastic ratio: every step draws its retained ratio from [min, max]; both null keep the compressor's own."""

    min: float | None = option(None, "lowest retained ratio")
    max: float | None = option(None, "highest retained ratio; the exported compressor serves the whole range")

    def __post_init__(self) -> None:
        if (self.min is None) != (self.max is None):
            raise ConfigError("train.ratio needs both min and max, or neither")
        if self.min is not None and self.max is not None and not 0 < self.min <= self.max <= 1:
            raise ConfigError(f"train.ratio is [{self.min}, {self.max}]; it must satisfy 0 < min <= max <= 1")


@dataclass
class WarmStartSection:
    """Before anything else, learn the order in which a method inside the LLM, named in init_from, ranks tokens."""

    steps: int = option(
        0,
        "the first of max_steps, each a forward without gradients that sees all tokens up to the layer where the "
        "method scores first (omnidrop: layer 0); they need no answers",
    )
    settings: dict[str, Any] = option({}, "fields of that method; what it keeps, and so its ratio, does not matter")

    def __post_init__(self) -> None:
        not_negative("train.warm_start", self, "steps")


@dataclass
class LoraSection:
    """Low-rank adapters (peft) on linear modules of the LLM's layers, in float32."""

    rank: int = option(16, "of each adapter; parameters and optimiser state grow with it")
    alpha: float = option(32.0, "what an adapter says is scaled by alpha / rank")
    dropout: float = option(0.0, "of what an adapter sees in training; the LLM has none")
    targets: list[str] = option(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "names of linear modules within a layer; the first four are its attention",
    )

    def __post_init__(self) -> None:
        positive("train.llm.lora", self, "rank", "alpha")
        require("train.llm.lora", self, ("dropout",), lambda value: 0 <= value < 1, "must lie in [0, 1)")
        if not self.targets:
            raise ConfigError("train.llm.lora.targets is empty; name at least one module, such as q_proj")


@dataclass
class LlmSection:
    """Whether the LLM learns beside the compressor. Its encoders never do."""

    mode: Literal["frozen", "lora", "full"] = option(
        "frozen",
        "lora: low-rank adapters learn; full: layers, embeddings and head learn, which needs 16 bytes of memory for "
        "each of their parameters, spread over the ranks as zero_stage and offload say",
    )
    lr: float = option(1e-5, "peak learning rate of what learns of the LLM; adapters bear ten times as much")
    lora: LoraSection = section(LoraSection)

    def __post_init__(self) -> None:
        positive("train.llm", self, "lr")


@dataclass
class OffloadSection:
    """What waits in host memory while it is not needed, for a step that takes longer."""

    optimizer: bool = option(False, "optimiser states, 16 bytes a trainable parameter; the update runs on the CPU")
    parameters: bool = option(False, "the LLM's own weights, layer by layer; needs zero_stage 3")


@dataclass
class TrainSection:
    """The optimisation. One step sees micro_batch_size * gradient_accumulation_steps * ranks clips."""

    max_steps: int = option(MISSING, "optimiser steps")
    micro_batch_size: int = option(1, "clips per rank and forward; memory grows with it")
    gradient_accumulation_steps: int = option(1, "forwards per step; same result as a larger batch, takes longer")
    group_by_length: str | None = option(
        None,
        "sizes.jsonl of tools/check_data.py: the clips of each step are dealt out so that those of a forward, and the "
        "ranks of a forward, are alike in length after compression; saves padding and waiting. Same clips per step",
    )
    lr: float = option(2e-4, "peak learning rate of the compressor")
    llm: LlmSection = section(LlmSection)
    weight_decay: float = option(0.0, "AdamW, on matrices only")
    warmup_ratio: float = option(0.05, "share of the steps with rising learning rate")
    min_lr_ratio: float = option(0.1, "the cosine ends at this share of lr")
    max_grad_norm: float = option(1.0, "clipping of the global norm")
    estimator: EstimatorSection = section(EstimatorSection)
    ratio: RatioSection = section(RatioSection)
    distill_weight: float = option(
        0.0, "weight of the KL to the same LLM with all tokens; above 0 adds a full forward, about twice the time"
    )
    gradient_checkpointing: bool = option(False, "recompute the LLM in backward: a third slower, a fraction of memory")
    zero_stage: int = option(
        2,
        "shards over ranks: 1 the optimiser; 2 gradients too; 3 the LLM too, which no rank then ever holds whole, for "
        "more traffic",
    )
    offload: OffloadSection = section(OffloadSection)
    deepspeed: dict[str, Any] = option(
        {},
        "further settings of DeepSpeed as its own configuration writes them, for example {zero_optimization: "
        "{overlap_comm: true}}; settings that omnisieve derives from its own keys are refused",
    )
    seed: int = option(0, "of initialisation, data order and candidates")
    max_bad_steps: int = option(
        5, "so many steps in a row with a loss or gradient that is not finite end the run; a single one is left out"
    )
    watchdog_seconds: float = option(
        1800.0,
        "a run in which no step, no batch of a validation and no checkpoint gets done for so long ends, with the "
        "stacks of every rank in output_dir; 0: never",
    )
    log_every: int = option(10, "steps")
    histogram_every: int = option(
        100, "steps between histograms of the compressor's scores in the log; costs one wait for the device; 0: never"
    )
    eval_every: int = option(100, "steps between validations, the best of which is kept; 0: never")
    probe_clips: int = option(
        3,
        "the first clips of data.val: each validation logs how many of the tokens that stay are others than at the "
        "last, and draws them; 0: none",
    )
    picture_limit: int = option(
        20,
        "newest validations whose pictures of probe clips stay in output_dir/images, about 0.3 MB each (TensorBoard "
        "holds all); 0: nothing is drawn, which saves decoding the probe clips once",
    )
    save_every: int = option(100, "steps between checkpoints; they hold trainables and optimiser only; 0: only the end")
    save_total_limit: int = option(2, "newest checkpoints that stay; the best compressor is kept apart, in best/")
    stop_at: int | None = option(None, "end with a checkpoint after this step, to be resumed later; null: at max_steps")
    resume: str = option(
        "auto",
        "auto: from the newest checkpoint in output_dir, if any; never: in a folder without a run; or a checkpoint",
    )
    init_from: str | None = option(
        None,
        "training-free method to start as, such as stvp: untrained, the compressor keeps what that keeps, and its "
        "selection is computed in every step (fields in compressor.base_settings); or one inside the LLM, such as "
        "seats, whose order warm_start teaches; or the folder of an exported compressor, or its OWNER/NAME on the hub, "
        "to go on from its weights with a fresh optimiser (and from those of its LLM, if that was trained, too, in the "
        "same train.llm.mode)",
    )
    warm_start: WarmStartSection = section(WarmStartSection)

    def __post_init__(self) -> None:
        positive("train", self, "micro_batch_size", "gradient_accumulation_steps", "lr", "max_grad_norm")
        positive("train", self, "max_steps", "max_bad_steps", "log_every", "save_total_limit")
        not_negative("train", self, "weight_decay", "distill_weight", "eval_every", "save_every", "watchdog_seconds")
        not_negative("train", self, "histogram_every", "probe_clips", "picture_limit")
        in_unit_interval("train", self, "warmup_ratio", "min_lr_ratio")
        if self.stop_at is not None:
            positive("train", self, "stop_at")
        if self.max_steps != MISSING and self.warm_start.steps > self.max_steps:
            raise ConfigError(
                f"train.warm_start.steps {self.warm_start.steps} is above train.max_steps {self.max_steps}, of which "
                "they are a part"
            )
        if self.zero_stage not in (1, 2, 3):
            reason = " (0 would take one step too many in bfloat16)" if self.zero_stage == 0 else ""
            raise ConfigError(f"train.zero_stage is {self.zero_stage}; choose 1, 2 or 3{reason}")
        if self.offload.parameters and self.zero_stage != 3:
            raise ConfigError(
                f"train.offload.parameters needs train.zero_stage=3, which shards them; it is {self.zero_stage}"
            )


@dataclass
class TrainConfig:
    """A training run."""

    model: ModelSection = section(ModelSection)
    compressor: dict[str, Any] = option({}, "`method`, the fields of that method, and `preset` for a paper's ratios")
    data: DataSection = section(DataSection)
    train: TrainSection = section(TrainSection)
    output_dir: str = option(MISSING, "checkpoints, log, TensorBoard events and the resolved config go here")

    def __post_init__(self) -> None:
        if "method" not in self.compressor:
            raise ConfigError("compressor.method is missing; name a method such as omnisift")
        if self.train.estimator.route == "masked" and self.model.attn_implementation != "sdpa":
            raise ConfigError(
                f"model.attn_implementation {self.model.attn_implementation} is not used by train.estimator.route "
                "masked, whose attention is built on SDPA: set model.attn_implementation=sdpa, or choose "
                "train.estimator.route=hard_drop"
            )


@dataclass
class EvalConfig:
    """An evaluation run: every method at every ratio on one manifest."""

    model: ModelSection = section(ModelSection)
    data: MediaSection = section(MediaSection)
    manifest: str = option(MISSING, "JSONL manifest with questions and answers")
    benchmark: str = option("manifest", "its name in the report")
    methods: list[str] = option(
        MISSING,
        "names of methods, folders of exported compressors or their OWNER/NAME on the hub (all also as X@PRESET), or "
        "keys of settings",
    )
    plugins: list[str] = option([], "Python files that register further methods; CONTRIBUTING.md shows one")
    also: list[str] = option([], "further methods, beside those of a recipe; a compressor of your own, for example")
    ratios: list[float] = option([0.25], "retained ratios; the method full runs once")
    settings: dict[str, Any] = option(
        {},
        "by entry of `methods`: its fields; `method` makes a variant of that method, `at` holds fields by ratio, `llm` "
        "names an export whose adapters the LLM then has (null: none, also for an export that brings its own)",
    )
    batch_size: int = option(1, "clips whose questions may be asked together; their encoder outputs stay in memory")
    tokens_per_forward: int = option(
        65536, "of questions asked together, with their media; memory grows with it. A longer question is asked alone"
    )
    max_new_tokens: int = option(16, "of an answer, decoded greedily")
    limit: int | None = option(None, "only the first clips of the manifest")
    questions_per_clip: int | None = option(None, "only the first questions of each clip; time grows with questions")
    bootstrap: int = option(2000, "resamples behind the 95 % intervals, clustered by clip")
    seed: int = option(0, "of the bootstrap; methods that draw have a seed among their own fields")
    output_dir: str = option(MISSING, "report.json, the table and the resolved config go here")

    def __post_init__(self) -> None:
        positive("", self, "batch_size", "tokens_per_forward", "max_new_tokens", "bootstrap")
        positive("", self, *(name for name in ("limit", "questions_per_clip") if getattr(self, name) is not None))
        if not self.methods:
            raise ConfigError("methods is empty; name at least one, for example methods=[full,random]")
        if bad := [ratio for ratio in self.ratios if not 0 < ratio <= 1]:
            raise ConfigError(f"ratios holds {bad[0]}; a retained ratio lies in (0, 1]")

    @property
    def entries(self) -> list[str]:
        """All methods to evaluate."""
        return [*self.methods, *self.also]
