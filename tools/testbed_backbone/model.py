"""The testbed's tokenizer, processor and (random) model: stock Qwen2.5-Omni classes at a small size."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

from omnisieve.backbones import adapter_for
from omnisieve.backbones.tower_attention import batch_tower_attention
from omnisieve.data.synthetic.questions import WORDINGS, answer_words

HIDDEN = 128
HEAD_DIM = 32

SPECIAL_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "vision_pad_token": "<|vision_pad|>",
}
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif part['type'] == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the world's questions, so that each of its words is one token.

    Raises:
        RuntimeError: a word of the world came out as several tokens.
    """
    words = answer_words()
    corpus = [f"{role}\n" for role in ("user", "assistant", "system")]
    corpus += [wording.format(word) for wording in WORDINGS.values() for word in words] + [*words]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[*CONTROL_TOKENS, *SPECIAL_TOKENS.values()],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    for text in (*words, *(" " + w for w in words)):
        if len(tokenizer.encode(text).ids) != 1:
            raise RuntimeError(f"the tokenizer splits {text!r} into {tokenizer.encode(text).tokens}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=32768,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5OmniProcessor:
    """Wrap the tokenizer and stock feature extractors (frames from 56 x 56 pixels up are not enlarged).

    The stock processor's call has a size of its own for videos, which counts before that of its video processor's file.
    Only what the tokenizer's file says counts before both.
    """
    size = {"shortest_edge": 56 * 56, "longest_edge": 768 * 28 * 28}
    tokenizer.init_kwargs["size"] = size
    return Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        video_processor=Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False),
        feature_extractor=WhisperFeatureExtractor(feature_size=128),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast, layers: int) -> Qwen2_5OmniThinkerConfig:
    """Return the configuration of the backbone with the given number of decoder layers."""

    def token_id(token: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(token))

    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 384,
        "num_hidden_layers": layers,
        "num_attention_heads": HIDDEN // HEAD_DIM,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 4, 4]},
        "tie_word_embeddings": False,
        "pad_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_heads": 4,
        "window_size": 84,
        "fullatt_block_indexes": [1],
        "out_hidden_size": HIDDEN,
    }
    audio = {
        "num_mel_bins": 128,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 256,
        "d_model": 64,
        "n_window": 100,
        "output_dim": HIDDEN,
    }
    return Qwen2_5OmniThinkerConfig(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        audio_token_index=token_id("<|AUDIO|>"),
        image_token_index=token_id("<|IMAGE|>"),
        video_token_index=token_id("<|VIDEO|>"),
        audio_start_token_id=token_id("<|audio_bos|>"),
        audio_end_token_id=token_id("<|audio_eos|>"),
        vision_start_token_id=token_id("<|vision_bos|>"),
        vision_end_token_id=token_id("<|vision_eos|>"),
        user_token_id=token_id("user"),
        position_id_per_seconds=25,
        seconds_per_chunk=2,
        tie_word_embeddings=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, layers: int, seed: int
) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """Return a model with random weights of standard deviation fan_in^-1/2 (the library's 0.02 stays on a plateau)."""
    torch.manual_seed(seed)
    model = Qwen2_5OmniThinkerForConditionalGeneration(build_config(tokenizer, layers)).float()
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "embed_tokens" not in name:
            fan_in = parameter[0].numel()
            nn.init.normal_(parameter, std=fan_in**-0.5)
    adapter = adapter_for(model)
    batch_tower_attention(adapter)
    decoder_layers = adapter.layers
    for layer in decoder_layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data.mul_((2 * layers) ** -0.5)
    rotation = question_rotation(seed)
    for layer in decoder_layers[: layers // 2 + 1]:
        _match_content(layer.self_attn, rotation)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    return model


def question_rotation(seed: int) -> Tensor:
    """Return the orthogonal matrix [128, 128] that turns a concept vector into that of the word in a question."""
    generator = torch.Generator().manual_seed(seed + 1000)
    return torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator))[0]


def _match_content(attention: nn.Module, rotation: Tensor) -> None:
    """Give two heads a start: one looks for tokens like itself, one for the media that a question's word names.

    Without the rotation a word would match itself best, and never look at the media.
    """
    for group, (gain, turn) in enumerate(((2.0, torch.eye(HIDDEN)), (3.0, rotation))):
        basis = torch.empty(HIDDEN, HIDDEN)
        nn.init.orthogonal_(basis)
        rows, head = basis[:HEAD_DIM], 2 * group
        attention.k_proj.weight.data[group * HEAD_DIM : (group + 1) * HEAD_DIM] = rows
        attention.q_proj.weight.data[head * HEAD_DIM : (head + 1) * HEAD_DIM] = gain * rows @ turn


def concept_vectors(names: list[str], seed: int) -> dict[str, Tensor]:
    """Return one vector [128] of unit variance per name, orthogonal to each other.

    Raises:
        ValueError: more names than dimensions.
    """
    if len(names) > HIDDEN:
        raise ValueError(f"{len(names)} concepts do not fit into {HIDDEN} orthogonal directions")
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator))
    return {name: basis[i] * HIDDEN**0.5 for i, name in enumerate(names)}


def embed_words(
    model: Qwen2_5OmniThinkerForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    concepts: dict[str, Tensor],
    seed: int,
) -> None:
    """Start answer words at the concept vectors that the towers are taught, question words at their rotation."""
    generator = torch.Generator().manual_seed(seed)
    rotation = question_rotation(seed)
    embedding = adapter_for(model).embeddings.weight.data
    embedding.copy_(torch.randn(embedding.shape, generator=generator))
    model.lm_head.weight.data.copy_(embedding / HIDDEN**0.5)
    for word in answer_words():
        in_answer, in_question = tokenizer.convert_tokens_to_ids([word, tokenizer.tokenize(" " + word)[0]])
        embedding[in_answer] = concepts[word]
        embedding[in_question] = concepts[word] @ rotation
        model.lm_head.weight.data[in_answer] = concepts[word] / HIDDEN**0.5
