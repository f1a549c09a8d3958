"""Conversations to token ids and labels, through the tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from omnisieve.data.errors import DataError
from omnisieve.data.tokens import IGNORED

Message = Mapping[str, Any]
"""{"role": ..., "content": a string, or a list of parts {"type": "text", "text": ...} and {"type": "video"}}.

An assistant message with `"loss": False` is not supervised.
"""


class ChatFormat:
    """Renders and tokenizes conversations; each medium stays one placeholder token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        """`template`: the chat template; the tokenizer's own when None."""
        self.tokenizer = tokenizer
        self.template = template if template is not None else tokenizer.chat_template
        if self.template is None:
            raise DataError("the tokenizer has no chat template; save one with the processor")

    def encode(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels of a conversation.

        An answer is tokenized apart from the prompt before it, as generation does it, so that training and
        generation see the same tokens.

        Args:
            messages: the conversation.
            generation_prompt: end with the header of the answer to come.

        Returns:
            input_ids [n] and labels [n], int64; a label is the token's id in every supervised assistant turn
            including its end token, -100 elsewhere.

        Raises:
            DataError: the chat template does not suit the tokenizer, or rewrites earlier turns.
        """
        pieces = self._pieces(messages, generation_prompt)
        encoded = self.tokenizer([text for text, _ in pieces], add_special_tokens=False)["input_ids"]
        ids = [np.asarray(part, dtype=np.int64) for part in encoded]
        labels = [
            self._answer_labels(part) if supervised else np.full(len(part), IGNORED)
            for part, (_, supervised) in zip(ids, pieces, strict=True)
        ]
        return np.concatenate(ids), np.concatenate(labels)

    def _pieces(self, messages: Sequence[Message], generation_prompt: bool) -> list[tuple[str, bool]]:
        """The rendered text, cut where answers start and end: (text, whether it is supervised)."""
        pieces: list[tuple[str, bool]] = []
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:index], True)
            answer = self._render(messages[: index + 1], False)
            if not (prompt.startswith(done) and answer.startswith(prompt)):
                raise DataError(
                    "the chat template rewrites earlier turns when a turn is added, so answers cannot be told "
                    "from prompts; use a template that only appends"
                )
            pieces += [(prompt[len(done) :], False), (answer[len(prompt) :], message.get("loss", True))]
            done = answer
        if not pieces or generation_prompt or messages[-1]["role"] != "assistant":
            pieces.append((self._render(messages, generation_prompt)[len(done) :], False))
        return pieces

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        plain = [{"role": m["role"], "content": _plain(m["content"])} for m in messages]
        return self.tokenizer.apply_chat_template(
            plain, chat_template=self.template, tokenize=False, add_generation_prompt=generation_prompt
        )

    def _answer_labels(self, ids: np.ndarray) -> np.ndarray:
        """The answer's own ids up to its last end token; what a template writes behind it is not supervised."""
        ends = np.flatnonzero(ids == self.tokenizer.eos_token_id)
        if not len(ends):
            raise DataError(
                f"an answer does not end with the tokenizer's end token {self.tokenizer.eos_token!r}: tokenizer "
                "and chat template do not belong together"
            )
        return np.where(np.arange(len(ids)) <= ends[-1], ids, IGNORED)


def _plain(content: str | Sequence[Mapping[str, Any]]) -> Any:
    """Content without the keys that only we read."""
    if isinstance(content, str):
        return content
    return [
        {"type": "text", "text": part["text"]} if part["type"] == "text" else {"type": part["type"]} for part in content
    ]
