"""From a user's text to the tokens of a prompt: framed, never interpreted, cut at its own end."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ._tokenizing import named_surrogates

_MARK = "\ue000text\ue001"  # private-use characters, which templates leave alone


@dataclass(frozen=True)
class Prompts:
    """Prompts as tokens.

    Attributes:
        rows: Token ids of each prompt.
        cut: Whether the end of its text did not fit.
    """

    rows: list[list[int]]
    cut: list[bool]


class PromptFrame:
    """What stands around a text in a prompt.

    A chat template is rendered once, around a mark, and the text takes the mark's place, so no
    text ever runs through the template. Special tokens spelled out in a text, such as
    ``<|im_end|>``, are read as plain characters: a text cannot end its message.

    Args:
        tokenizer: A tokenizer of transformers.
        chat: Whether to use its chat template.
        instruction: What comes before each text and is never cut.
        system: Message before the user's; chat templates only.
    """

    def __init__(
        self, tokenizer: Any, *, chat: bool, instruction: str = "", system: str | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        self._head, self._tail = instruction, ""
        if system is not None and not chat:
            raise ValueError("system= needs a tokenizer with a chat template; use instruction=")
        if chat:
            messages = [{"role": "user", "content": instruction + _MARK}]
            if system is not None:
                messages.insert(0, {"role": "system", "content": system})
            rendered = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            if rendered.count(_MARK) != 1:
                raise ValueError(
                    "the tokenizer's chat template drops or repeats the user's message"
                )
            self._head, self._tail = rendered.split(_MARK)
        special = {*tokenizer.all_special_tokens}
        special |= {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        self._special = re.compile("|".join(map(re.escape, sorted(special))) or r"(?!)")

    def overhead(self) -> int:
        """Tokens of a prompt with an empty text."""
        return len(self._rows([""])[0])

    def fit(self, texts: Sequence[str], room: int) -> Prompts:
        """Tokenize prompts of at most ``room`` tokens, cutting texts at their end.

        Raises:
            ValueError: If not even an empty text fits, or a text is no Unicode.
        """
        with named_surrogates(texts):
            rows = self._rows(texts)
        cut = [len(row) > room for row in rows]
        if any(cut) and self.overhead() >= room:
            raise ValueError(
                f"the prompt without its text has {self.overhead()} tokens where {room} fit; use a"
                " shorter instruction, a smaller max_new_tokens or a larger max_length"
            )
        for index in (i for i, long in enumerate(cut) if long):
            fits, beyond = 0, len(texts[index])
            while beyond - fits > 1:
                middle = (fits + beyond) // 2
                if len(self._rows([texts[index][:middle]])[0]) <= room:
                    fits = middle
                else:
                    beyond = middle
            rows[index] = self._rows([texts[index][:fits]])[0]
        return Prompts(rows, cut)

    def _rows(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        if not self._chat:
            whole = [self._head + text for text in texts]
            return self._ids(whole, special=True, split=True)
        texts = [text.strip() for text in texts]  # as templates do with a message
        rows = self._ids([self._head + text + self._tail for text in texts])
        spelled = [i for i, text in enumerate(texts) if self._special.search(text)]
        if spelled:
            head, tail = self._ids([self._head])[0], self._ids([self._tail])[0]
            inner = self._ids([texts[i] for i in spelled], split=True)
            for index, ids in zip(spelled, inner, strict=True):
                rows[index] = [*head, *ids, *tail]
        return rows

    def _ids(
        self, texts: list[str], *, special: bool = False, split: bool = False
    ) -> list[list[int]]:
        found = self._tokenizer(
            texts,
            add_special_tokens=special,
            split_special_tokens=split,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )
        return found["input_ids"]
