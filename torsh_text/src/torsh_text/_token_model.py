"""A transformer that reads rows of tokens: what the encoder, classifiers and taggers share."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from torch import Tensor, nn

from . import _backbone
from ._attention import ATTENTION, AttentionPath, last_states, packed_inputs, packed_path
from ._packing import PackedBatch
from ._runtime import Budget, compute_rows, default_max_tokens
from ._selfcheck import adopt_packed_attention, attention_dropout, longest_window
from ._tokenizing import RowTokenizer, TokenRows, checked_texts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Attention = Literal["auto", "packed", "padded"]


class Cut(NamedTuple):
    """What :func:`warn_cut` takes, for a warning that a public method gives."""

    cut: int
    of: str
    max_length: int
    remedy: str = ""


@dataclass(frozen=True)
class Packer:
    """Texts to one packed batch on the CPU, in order, as a model wants it but without the model.

    Attributes:
        tokenizer: Cuts at the model's ``max_length``.
        prefix: Put before each text.
        first_position: Position of a row's first token.
    """

    tokenizer: RowTokenizer
    prefix: str
    first_position: int

    def __call__(self, texts: Sequence[str]) -> PackedBatch:
        """Tokenize; texts that are too long are cut, with a warning."""
        items = checked_texts(texts, unicode=True)
        if not items:
            raise ValueError("texts is empty; a batch needs at least one text")
        rows = self.tokenizer.rows([self.prefix + text for text in items])
        warn_cut(len(rows.too_long), f"{len(items)} texts", self.tokenizer.max_length)
        return rows.batch(np.arange(len(items)), first_position=self.first_position)


def warn_cut(cut: int, of: str, max_length: int, remedy: str = "") -> None:
    """Say that texts were cut, if any were, of the line that called the caller's caller."""
    if cut:
        warnings.warn(
            f"{cut} of {of} have more than max_length={max_length} tokens and were cut{remedy}",
            stacklevel=4,
        )


class TokenModel(nn.Module):
    """A transformer and its tokenizer, run without padding where a check allows it.

    A subclass has the transformer as ``backbone``, calls :meth:`_read_with` once and computes with
    :meth:`_token_states` in :meth:`_compute`.

    Attributes:
        backbone: The transformer without a head.
        tokenizer: The tokenizer as it was given.
        name: What messages call the model.
        first_position: Position of a row's first token.
        pad_id: Token written into padding.
        row_tokenizer: Its copy that cuts at ``max_length``.
    """

    backbone: "PreTrainedModel"
    _kind = "model"  # in messages

    def _read_with(
        self,
        tokenizer: Any,
        *,
        max_length: int | None,
        lower_case: bool,
        attn: Attention,
        name: str | None,
    ) -> None:
        """Get ready to read texts, and check how the backbone can run."""
        if attn not in ("auto", "packed", "padded"):
            raise ValueError(f"attn={attn!r} is none of 'auto', 'packed', 'padded'")
        self.tokenizer = tokenizer
        self.name = name or type(self.backbone).__name__
        self.first_position = _backbone.first_position(self.backbone)
        self._lower_case = lower_case
        self.max_length = _backbone.resolve_max_length(self.backbone, tokenizer, max_length)
        config = self.backbone.config.get_text_config()
        self._head_dim: int = getattr(config, "head_dim", None) or (
            config.hidden_size // getattr(config, "num_attention_heads", 1)
        )
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id: int = next(i for i in pads if i is not None)
        self._budgets: dict[tuple[torch.device, torch.dtype], Budget] = {}
        self._attn: Attention = attn
        self._checked: tuple[object, str | None] = (None, None)
        self._why_padded()

    @property
    def max_length(self) -> int:
        """Tokens after which a text is cut, special tokens included; may be set."""
        return self.row_tokenizer.max_length

    @max_length.setter
    def max_length(self, value: int) -> None:
        value = _backbone.resolve_max_length(self.backbone, self.tokenizer, value)
        self.row_tokenizer = RowTokenizer(
            self.tokenizer, max_length=value, lower_case=self._lower_case
        )

    @property
    def attention(self) -> AttentionPath:
        """Which attention runs here for texts, and why."""
        why = self._why_padded()
        if why is not None:
            return AttentionPath("padded", why)
        return packed_path(
            self.backbone.device,
            self.backbone.dtype,
            head_dim=self._head_dim,
            dropout=attention_dropout(self.backbone) if self.training else 0.0,
            windowed=longest_window(self.backbone) > 0,
        )

    @property
    def packer(self) -> Packer:
        """What :meth:`pack` does, as something that a process without the model can hold."""
        return Packer(self.row_tokenizer, self._prefix, self.first_position)

    def pack(self, texts: Sequence[str]) -> PackedBatch:
        """Tokenize texts into one packed batch on the CPU, in order: input of :meth:`forward`.

        Texts beyond ``max_length`` are cut, with a warning. :class:`torsh_text.Collator` does the
        same in the workers of a ``DataLoader``.

        Raises:
            TypeError: If an item is not a string.
            ValueError: If there are no texts, or one is no Unicode.
        """
        return self.packer(texts)

    @property
    def _prefix(self) -> str:
        """Text put before every text unless another one is asked for."""
        return ""

    def explain(self) -> str:
        """Say in a small table what runs and why."""
        kind = (self.backbone.device, self.backbone.dtype)
        learnt = self._budgets.get(kind)
        budget = learnt.max_tokens if learnt else default_max_tokens(*kind)
        lines = {
            "model": self.name,
            **self._facts(),
            "device": f"{self.backbone.device}, {str(self.backbone.dtype).removeprefix('torch.')}",
            "attention": ": ".join(self.attention),
            "batches": f"at most {budget:,} tokens",
            "texts": f"cut after {self.max_length:,} tokens",
        }
        return "\n".join(f"{key:<10}{value}" for key, value in lines.items())

    def _facts(self) -> dict[str, str]:
        """Lines of :meth:`explain` about what comes out."""
        return {}

    def _compute(
        self,
        rows: TokenRows,
        compute: Callable[[PackedBatch, Tensor], None],
        max_tokens: int | Literal["auto"],
    ) -> None:
        """Run rows through ``compute`` under the asked or the learnt budget."""
        longest = int(rows.lengths.max())
        if max_tokens != "auto" and max_tokens < longest:
            raise ValueError(
                f"max_tokens={max_tokens} is less than the {longest} tokens of one text"
            )
        kind = (self.backbone.device, self.backbone.dtype)
        learnt = self._budgets.setdefault(kind, Budget(default_max_tokens(*kind)))
        compute_rows(
            rows,
            compute,
            budget=learnt if max_tokens == "auto" else Budget(max_tokens),
            device=self.backbone.device,
            first_position=self.first_position,
            padded=self._why_padded() is not None,
        )

    def _why_padded(self) -> str | None:
        """Why rows are padded where the model is now; None if they run packed."""
        if self._attn == "padded":
            return "attn='padded' was asked for"
        kind = (self.backbone.device.type, self.backbone.dtype, self.max_length)
        known = self._checked[0] == kind
        if known and self._checked[1] is None:  # somebody may have switched it since
            known = self.backbone.config._attn_implementation == ATTENTION
        if not known:
            first, longest, pad = self.first_position, self.max_length, self.pad_id
            why = adopt_packed_attention(
                self.backbone, first_position=first, max_length=longest, pad_id=pad
            )
            if why and self._attn == "packed":
                raise RuntimeError(
                    f"{self.name} cannot run packed: {why}. Use attn='auto' to pad instead"
                )
            if why and why != self._checked[1]:
                warnings.warn(
                    f"{self.name} runs padded, which is slower: {why}."
                    " attn='padded' chooses this silently",
                    stacklevel=4,
                )
            self._checked = (kind, why)
        return self._checked[1]

    def _texts(self, texts: str | Iterable[str]) -> list[str]:
        """Check texts that a method without gradients shall read."""
        for name, module in self.named_modules():
            if module.training:
                what = f"{name!r} of the {self._kind}" if name else f"the {self._kind}"
                raise RuntimeError(
                    f"{what} is in training mode, where dropout would change the result and"
                    f" this call would drop gradients; call .eval() first, or call the"
                    f" {self._kind} on a batch"
                )
        return checked_texts([texts] if isinstance(texts, str) else texts, unicode=True)

    def _warn_cut(self, cut: int, of: str, remedy: str = "") -> None:
        warn_cut(cut, of, self.max_length, remedy)

    def _token_states(self, batch: PackedBatch) -> Tensor:
        """Token states ``(tokens, hidden)`` of a packed batch."""
        self._check_batch(batch)
        if self._why_padded() is None:
            return last_states(self.backbone, packed_inputs(batch))[0]
        inputs = batch.padded(self.pad_id)
        return last_states(self.backbone, inputs)[inputs["attention_mask"].bool()]

    def _check_tokens(self, batch: object) -> None:
        """Refuse texts where a batch of tokens is wanted."""
        if not isinstance(batch, (PackedBatch, Mapping)):
            raise TypeError(
                f"the {self._kind} was called with a {type(batch).__name__}, not a batch of tokens;"
                " give it .pack(texts), or use the method that takes texts"
            )

    def _check_batch(self, batch: PackedBatch) -> None:
        """Refuse a batch whose positions are not the model's."""
        if batch.first_position != self.first_position:
            raise ValueError(
                f"the batch counts positions from {batch.first_position}, {self.name} from"
                f" {self.first_position}; make batches with the {self._kind} itself"
            )
        limit = _backbone.longest_row(self.backbone)
        if limit is not None and batch.max_length > limit:
            raise ValueError(
                f"a row has {batch.max_length} tokens, the model has {limit} positions"
            )
