"""Model folders as the hub serves them: nested and old configs, sharded weights of the whole model, released token ids.

What differs from a release is said here: weights are random; of talker and vocoder there is one tensor each, because
nothing but its name is met when a thinker is loaded; the vocabulary has the released size and ids, but its merges only
where `released_ranks` can be had. Widths are tiny, or those of a released model.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import distribution
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import PretrainedConfig

from omnisieve.backbones.families import family_of
from omnisieve.backbones.reference import reference_config
from tests.models import QWEN2_5, QWEN3

GenerationConfig = Literal["absent", "empty", "sampling"]
"""What stands in generation_config.json: no such file, one that says nothing, or one that asks for sampling."""

BASE_VOCABULARY = 151_643
END_OF_TEXT, MESSAGE_START, MESSAGE_END = range(BASE_VOCABULARY, BASE_VOCABULARY + 3)
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RENAMED = {"model.audio_tower.": "audio_tower.", "model.visual.": "visual.", "model.language_model.": "model."}
_INDEXED = ("image_token_id", "video_token_id", "audio_token_id")
_TINY: dict[str, dict[str, Any]] = {
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 64,
    },
    "audio_config": {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "output_dim": 32,
        "downsample_hidden_size": 4,
    },
}


@dataclass(frozen=True)
class Release:
    """What is published under one name.

    Attributes:
        shape: of the thinker, see `reference_config`.
        architecture: of the whole model, as its config.json names it.
        processor, tokens: class of the processor; special tokens by id.
        roles: names of the media tokens, as the tokenizer's config gives them.
        vocoder: prefix of the weights that make sound of codes.
    """

    shape: str
    architecture: str
    processor: str
    tokens: Mapping[int, str]
    roles: Mapping[str, str]
    vocoder: str


_TEXT_TOKENS = {END_OF_TEXT: "<|endoftext|>", MESSAGE_START: "<|im_start|>", MESSAGE_END: "<|im_end|>"}
RELEASES = {
    QWEN2_5: Release(
        shape="qwen2_5_omni_7b",
        architecture="Qwen2_5OmniModel",
        processor="Qwen2_5OmniProcessor",
        tokens=_TEXT_TOKENS
        | {
            151646: "<|AUDIO|>",
            151647: "<|audio_bos|>",
            151648: "<|audio_eos|>",
            151649: "<|box_end|>",
            151650: "<|quad_start|>",
            151651: "<|quad_end|>",
            151652: "<|vision_bos|>",
            151653: "<|vision_eos|>",
            151654: "<|vision_pad|>",
            151655: "<|IMAGE|>",
            151656: "<|VIDEO|>",
        },
        roles={
            "image_token": "<|IMAGE|>",
            "audio_token": "<|AUDIO|>",
            "video_token": "<|VIDEO|>",
            "vision_bos_token": "<|vision_bos|>",
            "vision_eos_token": "<|vision_eos|>",
            "audio_bos_token": "<|audio_bos|>",
            "audio_eos_token": "<|audio_eos|>",
        },
        vocoder="token2wav",
    ),
    QWEN3: Release(
        shape="qwen3_omni_30b_a3b",
        architecture="Qwen3OmniMoeForConditionalGeneration",
        processor="Qwen3OmniMoeProcessor",
        tokens=_TEXT_TOKENS
        | {token: f"<|unused_{token}|>" for token in range(151646, 151676)}
        | {
            151652: "<|vision_start|>",
            151653: "<|vision_end|>",
            151655: "<|image_pad|>",
            151656: "<|video_pad|>",
            151669: "<|audio_start|>",
            151670: "<|audio_end|>",
            151675: "<|audio_pad|>",
        },
        roles={
            "image_token": "<|image_pad|>",
            "audio_token": "<|audio_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
            "audio_bos_token": "<|audio_start|>",
            "audio_eos_token": "<|audio_end|>",
        },
        vocoder="code2wav",
    ),
}


def save_release(
    folder: Path,
    family: str = QWEN2_5,
    *,
    generation_config: GenerationConfig = "empty",
    eos_in_config: bool = False,
    ranks: Mapping[bytes, int] | None = None,
) -> Path:
    """A tiny release whose answers end by themselves.

    Args:
        folder: to write; it must not exist.
        family: of the model.
        generation_config: what stands in generation_config.json.
        eos_in_config: whether the thinker's section of config.json names the end token; otherwise the tokenizer alone
            knows it.
        ranks: of the released vocabulary; None makes one of the same size that knows single bytes only.
    """
    config = tiny_release_config(family)
    folder.mkdir(parents=True)
    model = answering_thinker(family, config)
    save_shards(folder, {name: (value.shape, value.clone) for name, value in named_as_released(model)}, family, 8 << 20)
    save_configs(folder, family, config, generation_config=generation_config, eos_in_config=eos_in_config)
    save_processor(folder, family, ranks)
    return folder


def save_true_release(folder: Path, shape: str, *, layers: int | None = None, seed: int = 0) -> Path:
    """A release of Qwen2.5-Omni at its true widths, with random bfloat16 weights that are made shard by shard.

    Args:
        folder: to write; it must not exist.
        shape: "qwen2_5_omni_3b" or "qwen2_5_omni_7b".
        layers: of the LLM; None makes all of them.
        seed: of the weights.
    """
    config = reference_config(shape)
    if layers is not None:
        config.text_config.num_hidden_layers = layers
        config.text_config.layer_types = config.text_config.layer_types[:layers]
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = _thinker(config)
    numbers = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(seed))
    tensors = {
        name: (value.shape, partial(_random, name, value.shape, numbers)) for name, value in named_as_released(model)
    }
    save_shards(folder, tensors, QWEN2_5, 4 << 30)
    save_configs(folder, QWEN2_5, config)
    save_processor(folder, QWEN2_5, released_ranks())
    return folder


_BLOCK = 4_194_301
"""Random numbers of which all weights are made, over and over: a prime, so that no two rows of a matrix are alike."""


def _random(name: str, shape: torch.Size, numbers: Tensor) -> Tensor:
    """Norms are ones, biases zeros, and matrices keep the scale of what passes through them."""
    if len(shape) == 1:
        return torch.full(shape, float(name.endswith("weight")), dtype=torch.bfloat16)
    start = zlib.crc32(name.encode()) % _BLOCK
    scaled = (numbers.roll(start) * shape[1:].numel() ** -0.5).bfloat16()
    return scaled.repeat(-(-shape.numel() // _BLOCK))[: shape.numel()].reshape(shape).clone()


def _thinker(config: PretrainedConfig) -> Any:
    family = family_of(config.model_type)
    assert family is not None
    return family.thinker._from_config(config, dtype=torch.bfloat16)


def tiny_release_config(family: str) -> Any:
    """The thinker's config of a release at tiny widths; vocabulary, ids, patches and clocks as released."""
    config = reference_config(RELEASES[family].shape)
    for name, values in _TINY.items():
        section = getattr(config, name)
        for key, value in values.items():
            if hasattr(section, key):
                setattr(section, key, value)
    config.text_config.rope_parameters = config.text_config.rope_parameters | {"mrope_section": [2, 1, 1]}
    return config


LINE_BREAK = 198
"""Token id of what the header of an answer ends with."""
ANSWER = (65, 66)
"""Token ids of what `answering_thinker` says to every question before the end token: "bc"."""


@torch.no_grad()
def answering_thinker(family: str, config: Any) -> Any:
    """A random thinker that answers every prompt with `ANSWER` and the end token, and would then begin anew.

    Its layers are as random as in any tiny model, but what they add weighs little beside a token's own embedding.
    """
    torch.manual_seed(0)
    model = _thinker(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            scale = 0.05 if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")) else 1.0
            parameter.normal_(std=scale * parameter[0].numel() ** -0.5)
    embed, head = model.get_input_embeddings().weight, model.lm_head.weight
    chain = (LINE_BREAK, *ANSWER, MESSAGE_END)
    for place, (token, following) in enumerate(zip(chain, (*chain[1:], ANSWER[0]), strict=True)):
        embed[token] = 6 * torch.eye(embed.shape[1])[place]
        head[following] += 6 * torch.eye(embed.shape[1])[place]
    return model.eval()


def named_as_released(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A thinker's weights under the names of a release, with the projections of each expert apart."""
    for name, value in model.state_dict().items():
        for new, old in _RENAMED.items():
            name = f"thinker.{old}{name.removeprefix(new)}" if name.startswith(new) else name
        name = name if name.startswith("thinker.") else f"thinker.{name}"
        if ".experts." not in name:
            yield name, value.clone()
            continue
        stem, projection = name.split(".experts.")
        parts = {"down_proj": ("down_proj",), "gate_up_proj": ("gate_proj", "up_proj")}[projection]
        for expert, weights in enumerate(value):
            for part, weight in zip(parts, weights.chunk(len(parts)), strict=True):
                yield f"{stem}.experts.{expert}.{part}.weight", weight.clone()


def save_shards(
    folder: Path, tensors: Mapping[str, tuple[torch.Size, Callable[[], Tensor]]], family: str, shard_bytes: int
) -> None:
    """Write bfloat16 tensors in files of about `shard_bytes`, with the index; one file's tensors exist at a time.

    Args:
        folder: to write to.
        tensors: shape of each, and what makes it.
        family: whose talker and vocoder are hinted at.
        shard_bytes: of one file.
    """
    rest = {f"{name}.weight": (torch.Size([2, 2]), partial(torch.zeros, 2, 2, dtype=torch.bfloat16))
            for name in ("talker.lm_head", f"{RELEASES[family].vocoder}.proj")}  # fmt: skip
    shards: list[dict[str, Callable[[], Tensor]]] = [{}]
    size = total = 0
    for name, (shape, make) in {**tensors, **rest}.items():
        if size > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = make
        size, total = size + 2 * shape.numel(), total + 2 * shape.numel()
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: make() for name, make in shard.items()}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def save_configs(
    folder: Path,
    family: str,
    config: PretrainedConfig,
    *,
    generation_config: GenerationConfig = "empty",
    eos_in_config: bool = False,
) -> None:
    """config.json as transformers 4.50 wrote it, and generation_config.json.

    Args:
        folder: to write to.
        family: of the model.
        config: of its thinker.
        generation_config, eos_in_config: see `save_release`.
    """
    release = RELEASES[family]
    thinker = _aged(config.to_dict()) | {"torch_dtype": "bfloat16"}
    if eos_in_config:
        thinker |= {"bos_token_id": MESSAGE_START, "eos_token_id": MESSAGE_END, "pad_token_id": END_OF_TEXT}
    prefix = thinker["model_type"].removesuffix("_thinker")
    whole = {
        "architectures": [release.architecture],
        "enable_audio_output": True,
        "enable_talker": True,
        "model_type": prefix,
        "talker_config": {"model_type": f"{prefix}_talker"},
        "thinker_config": thinker,
        f"{release.vocoder}_config": {"model_type": f"{prefix}_{release.vocoder}"},
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
    }
    _write(folder / "config.json", whole)
    written: dict[str, Any] = {"_from_model_config": True, "transformers_version": "4.50.0.dev0"}
    if generation_config == "sampling":
        written |= {"do_sample": True, "temperature": 5.0, "repetition_penalty": 1.5}
    if generation_config != "absent":
        _write(folder / "generation_config.json", written)


_YOUNG = frozenset({
    "transformers_version", "id2label", "label2id", "problem_type", "output_hidden_states", "return_dict",
    "chunk_size_feed_forward", "is_encoder_decoder", "_name_or_path", "output_attentions", "architectures", "dtype",
    "layer_types",
})  # fmt: skip
"""What a config of today says beside what one of then did."""


def _aged(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as an old version wrote it: rope in two keys, the encoder's in none, and nothing that is null."""
    aged: dict[str, Any] = {}
    for key, value in config.items():
        if key == "rope_parameters":
            if "mrope_section" in value:
                aged["rope_theta"] = value["rope_theta"]
                aged["rope_scaling"] = {k: v for k, v in value.items() if k != "rope_theta"} | {"type": "default"}
        elif key not in _YOUNG and value is not None:
            aged[key] = _aged(value) if isinstance(value, Mapping) else value
    return aged


def save_processor(folder: Path, family: str, ranks: Mapping[bytes, int] | None = None) -> None:
    """Tokenizer, chat template and preprocessor_config.json.

    Args:
        folder: to write to.
        family: of the model.
        ranks: see `save_release`.
    """
    release = RELEASES[family]
    tokenizer = make_tokenizer(release, ranks)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2TokenizerFast",
            "processor_class": release.processor,
            "bos_token": None,
            "eos_token": release.tokens[MESSAGE_END],
            "pad_token": release.tokens[END_OF_TEXT],
            "extra_special_tokens": dict(release.roles),
            "model_max_length": 32768,
            **release.roles,
        },
    )
    _write(folder / "chat_template.json", {"chat_template": chat_template(release)})
    patch = 14 if family == QWEN2_5 else 16
    _write(
        folder / "preprocessor_config.json",
        {
            "processor_class": release.processor,
            "image_processor_type": "Qwen2VLImageProcessor",
            "feature_extractor_type": "WhisperFeatureExtractor",
            "min_pixels": 4 * (2 * patch) ** 2,
            "max_pixels": 16384 * (2 * patch) ** 2,
            "patch_size": patch,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073] if family == QWEN2_5 else [0.5, 0.5, 0.5],
            "image_std": [0.26862954, 0.26130258, 0.27577711] if family == QWEN2_5 else [0.5, 0.5, 0.5],
            "feature_size": 128,
            "sampling_rate": 16000,
            "hop_length": 160,
            "chunk_length": 300,
            "n_fft": 400,
            "n_samples": 4800000,
            "nb_max_frames": 30000,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": True,
            "dither": 0.0,
        },
    )


def make_tokenizer(release: Release, ranks: Mapping[bytes, int] | None = None) -> Tokenizer:
    """A byte-level tokenizer with the special tokens of a release at their ids.

    Args:
        release: whose tokens.
        ranks: id of each token of the base vocabulary; None fills all ids behind the single bytes with unused ones.
    """
    letters = _letters()
    if ranks is None:
        vocabulary = {letter: place for place, letter in enumerate(letters.values())}
        vocabulary |= {f"<unused {token}>": token for token in range(len(letters), BASE_VOCABULARY)}
        merges: list[tuple[str, str]] = []
    else:
        vocabulary = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
        merges = [
            ("".join(letters[byte] for byte in left), "".join(letters[byte] for byte in right))
            for left, right in _merges(ranks)
        ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for _, text in sorted(release.tokens.items())]
    )
    return tokenizer


def _letters() -> dict[int, str]:
    """The printable letter that stands for each byte, in the order in which byte-level vocabularies begin."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pair that makes each token, in the order of their ranks: what merging by lower ranks leaves of it."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[place : place + 1] for place in range(len(token))]
        while len(parts) > 2:
            options = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            place = options.index(min(options))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def released_ranks() -> dict[bytes, int]:
    """The base vocabulary of the released tokenizers, 151,643 tokens, out of the package `dashscope`.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    (file,) = (path for path in distribution("dashscope").files or () if path.name == "qwen.tiktoken")
    lines = Path(str(file.locate())).read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


def chat_template(release: Release) -> str:
    """Renders conversations as the released template does, with a default system message."""
    roles = release.roles
    parts = {
        "image": roles["vision_bos_token"] + roles["image_token"] + roles["vision_eos_token"],
        "video": roles["vision_bos_token"] + roles["video_token"] + roles["vision_eos_token"],
        "audio": roles["audio_bos_token"] + roles["audio_token"] + roles["audio_eos_token"],
    }
    branches = "".join(f"{{% elif part.type == '{kind}' %}}{text}" for kind, text in parts.items())
    return (
        "{% for message in messages %}"
        "{% if loop.first and message.role != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ message.role }}\n"
        "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
        "{% if part.type == 'text' %}{{ part.text }}" + branches + "{% endif %}{% endfor %}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
