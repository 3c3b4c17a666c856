"""The classifier: texts or batches in, labels or logits out."""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor

from . import _backbone
from ._attention import left_aligned, positioned
from ._heads import check_head, find_head, head_logits, load_classifier
from ._labels import Label, check_ranking, checked_names, ranked
from ._packing import PackedBatch
from ._runtime import check_max_tokens, join_pieces, progress_bar, tokenized_windows
from ._token_model import Attention, TokenModel
from ._tokenizing import Long
from ._writing import staged_folder, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNCHECKED = "unchecked"


class Classifier(TokenModel):
    """A sequence classifier of transformers, run without padding.

    As a layer (:meth:`forward`) it maps a batch of tokens to logits and lets gradients flow. As a
    tool (:meth:`predict`) it maps texts to labels in input order. Most people start with
    :meth:`from_pretrained`; this constructor takes parts that are already loaded.

    The head is fed with the states of packed rows. At construction four random rows run through it
    and through the padded model of transformers; where they differ, and for encoder-decoders, the
    model runs padded and a warning says so.

    Args:
        model: A ``...ForSequenceClassification`` model of transformers. If its configuration has
            no padding token, it gets the tokenizer's: transformers needs one for several rows.
        tokenizer: Its tokenizer.
        max_length: Tokens after which a text is cut, special tokens included; None for as many as
            the model and tokenizer allow.
        lower_case: Whether texts are lower-cased first.
        attn: ``"auto"``, ``"packed"`` (raise where a check fails) or ``"padded"`` (the model's own
            forward).
        name: What messages call the model.

    Attributes:
        model: The whole classifier of transformers; ``state_dict()`` has its names behind
            ``model.``.
        tokenizer: The tokenizer as it was given.
        labels: Name of each label, in the order of the logits.

    Raises:
        ValueError: If an argument does not fit the model.
        RuntimeError: If ``attn="packed"`` and the model cannot run packed.
    """

    _kind = "classifier"

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: Any,
        *,
        max_length: int | None = None,
        lower_case: bool = False,
        attn: Attention = "auto",
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.model: PreTrainedModel = model
        names = cast("Mapping[int, str]", model.config.id2label)
        self.labels: list[str] = [str(names[i]) for i in range(len(names))]
        text_config = model.config.get_text_config()
        if text_config.pad_token_id is None:
            pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
            text_config.pad_token_id = next(i for i in pads if i is not None)
        self._head = find_head(model)
        self._head_fault: str | None = _UNCHECKED
        self._read_with(
            tokenizer,
            max_length=max_length,
            lower_case=lower_case,
            attn=attn,
            name=name or type(model).__name__,
        )

    @property
    def backbone(self) -> "PreTrainedModel":  # pyrefly: ignore[bad-override]
        """The transformer without the head."""
        return cast("PreTrainedModel", self.model.base_model)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        labels: Iterable[str] | None = None,
        *,
        multi_label: bool = False,
        seed: int = 0,
        max_length: int | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        attn: Attention = "auto",
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
    ) -> "Classifier":
        """Load a classifier, in eval mode; or a model without a head, to train one.

        Weights are read from safetensors, or with ``weights_only=True``; nothing is unpickled.

        Args:
            name: Hub id such as ``"cardiffnlp/twitter-roberta-base-sentiment-latest"``, or a
                folder.
            labels: Names for a new head with random weights, which has to be trained before it
                says anything. A head that the weights hold is kept if it has as many labels and
                these names, or only placeholders (``LABEL_0``). None: the weights hold the head.
            multi_label: Whether a text may have several of the new labels. False leaves a head that
                is kept as it was trained.
            seed: Seed of the new head.
            max_length: Tokens after which a text is cut; None reads it from the folder.
            dtype: ``"auto"`` is bfloat16 on CUDA and float32 elsewhere; or a torch dtype or its
                name. For training in mixed precision, load float32 and use autocast.
            device: None for CUDA if there is one, else the CPU.
            attn: ``"auto"`` packs where the checks at load pass; ``"packed"`` insists;
                ``"padded"`` never packs.
            revision: Branch, tag or commit on the hub.
            local_files_only: Do not ask the hub.
            trust_remote_code: Let the model's own code run on this machine.

        Raises:
            FileNotFoundError: If the model is neither a folder nor to be had from the hub.
            ValueError: If weights are missing, which would be random, or the head is that of a
                tagger, and ``labels`` is None.
        """
        from transformers import AutoTokenizer

        place = _backbone.resolve_device(device)
        folder = _backbone.find_model(
            name,
            revision=revision,
            local_files_only=local_files_only,
            trust_remote_code=trust_remote_code,
        )
        layout = _backbone.read_layout(folder)
        model = load_classifier(
            layout.transformer,
            labels=None if labels is None else checked_names(labels),
            multi_label=multi_label,
            seed=seed,
            dtype=_backbone.resolve_dtype(dtype, place),
            trust_remote_code=trust_remote_code,
        )
        torch.nn.Module.to(model, place)
        classifier = cls(
            model,
            AutoTokenizer.from_pretrained(layout.transformer, trust_remote_code=trust_remote_code),
            max_length=layout.max_length if max_length is None else max_length,
            lower_case=layout.lower_case,
            attn=attn,
            name=str(name),
        )
        return classifier.eval()

    def forward(self, batch: PackedBatch | Mapping[str, Tensor]) -> Tensor:
        """Map a batch of tokens to logits; gradients flow.

        Args:
            batch: A :class:`PackedBatch` (see :meth:`pack`), or a padded mapping with
                ``input_ids`` ``(rows, length)`` and, unless nothing is padded,
                ``attention_mask``, which runs as transformers runs it.

        Returns:
            float32 ``(rows, labels)``.
        """
        self._check_tokens(batch)
        if not isinstance(batch, PackedBatch):
            return self._padded_logits(batch)
        if self._why_padded() is not None or self._head is None:
            return self._padded_logits(batch.padded(self._config_pad))
        states = self._token_states(batch)
        return head_logits(self._head, states, batch, self._config_pad).float()

    @overload
    def predict(
        self,
        texts: str,
        *,
        multi_label: bool | None = ...,
        top_k: int | None = ...,
        min_score: float | None = ...,
        long: Long = ...,
        max_tokens: int | Literal["auto"] = ...,
        progress: bool = ...,
    ) -> Label | list[Label]: ...

    @overload
    def predict(
        self,
        texts: Iterable[str],
        *,
        multi_label: bool | None = ...,
        top_k: int | None = ...,
        min_score: float | None = ...,
        long: Long = ...,
        max_tokens: int | Literal["auto"] = ...,
        progress: bool = ...,
    ) -> list[Label] | list[list[Label]]: ...

    def predict(
        self,
        texts: str | Iterable[str],
        *,
        multi_label: bool | None = None,
        top_k: int | None = None,
        min_score: float | None = None,
        long: Long = "truncate",
        max_tokens: int | Literal["auto"] = "auto",
        progress: bool = False,
    ) -> Label | list[Label] | list[list[Label]]:
        """Label texts, in input order, without gradients.

        Args:
            texts: The texts, or one text.
            multi_label: Whether a text may have several labels; None asks the model's
                configuration.
            top_k: That many labels for each text, best first, as a list. None: the best label
                alone, or with ``multi_label`` the list of those that reach ``min_score``.
            min_score: Labels below it are left out of the lists, 0 to 1. None is 0.5 with
                ``multi_label`` and without ``top_k``, else 0. Refused where each text gets its
                best label alone.
            long: As for :meth:`scores`.
            max_tokens: As for :meth:`scores`.
            progress: Show a progress bar.

        Returns:
            For each text a :class:`Label` or a list of them; for one text, what it has.

        Raises:
            TypeError: As :meth:`scores`.
            ValueError: As :meth:`scores`.
            RuntimeError: As :meth:`scores`.
        """
        several = self._several(multi_label)
        check_ranking(top_k=top_k, min_score=min_score, several=several, count=len(self.labels))
        single = isinstance(texts, str)
        scores, truncated, why = self._scored(texts, multi_label, long, max_tokens, progress)
        self._warn_cut(*why)
        found = ranked(
            scores,
            self.labels,
            top_k=top_k,
            several=several,
            min_score=min_score,
            truncated=truncated,
        )
        return found[0] if single else found

    def scores(
        self,
        texts: str | Iterable[str],
        *,
        multi_label: bool | None = None,
        long: Long = "truncate",
        max_tokens: int | Literal["auto"] = "auto",
        progress: bool = False,
    ) -> Tensor:
        """Score every label for every text, in input order, without gradients.

        Equal texts are computed once. If the device runs out of memory, the budget is halved and
        stays so.

        Args:
            texts: The texts, or one text.
            multi_label: True scores each label by itself (sigmoid), False all of them together
                (softmax); None asks the model's configuration.
            long: What happens to texts beyond ``max_length``: ``"truncate"`` cuts them and warns
                with their number, ``"error"`` raises, ``"mean"`` averages the scores of
                consecutive pieces, weighted by their tokens.
            max_tokens: Most tokens in a batch; ``"auto"`` is 768 on the CPU, 65,536 on CUDA in
                half precision.
            progress: Show a progress bar.

        Returns:
            float32 ``(texts, labels)``, or ``(labels,)`` for one text: probabilities, or the
            values of a regression model.

        Raises:
            TypeError: If an item is not a string, or ``max_tokens`` no integer.
            ValueError: If an option does not fit, or a text is no Unicode or too long.
            RuntimeError: If the classifier is in training mode, or a score is not finite.
        """
        scores, _, why = self._scored(texts, multi_label, long, max_tokens, progress)
        self._warn_cut(*why)
        return scores[0] if isinstance(texts, str) else scores

    def logits_of_pairs(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        numbers: Sequence[int],
        long: Long = "truncate",
        max_tokens: int | Literal["auto"] = "auto",
        progress: bool = False,
    ) -> tuple[Tensor, list[tuple[str, str]]]:
        """Logits of pairs of texts, in input order, without gradients.

        Args:
            pairs: First and second text of each; only the first is ever cut.
            numbers: What errors number the text of each pair by.
            long: ``"truncate"`` or ``"error"``.
            max_tokens: As for :meth:`scores`.
            progress: Show a progress bar.

        Returns:
            float32 ``(pairs, labels)``, and the different pairs that were cut.
        """
        self._texts([])
        logits, cut = self._rows_through(
            pairs,
            torch.clone,
            numbers=numbers,
            long=long,
            max_tokens=max_tokens,
            progress=progress,
        )
        return logits, cast("list[tuple[str, str]]", cut)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a folder that :meth:`from_pretrained` and transformers load."""
        with staged_folder(Path(path)) as staging, _backbone.quiet_loading():
            self.model.save_pretrained(staging)
            self.tokenizer.save_pretrained(staging)
            limits = {"max_seq_length": self.max_length, "do_lower_case": self._lower_case}
            write_json(staging / "sentence_bert_config.json", limits)

    @property
    def _problem(self) -> str:
        kind = self.model.config.problem_type
        if kind is not None:
            return str(kind)
        return "regression" if len(self.labels) == 1 else "single_label_classification"

    def _several(self, multi_label: bool | None) -> bool:
        if multi_label is False and len(self.labels) == 1:
            raise ValueError(
                f"multi_label=False needs two labels or more; {self.name} has only"
                f" {self.labels[0]!r}"
            )
        return self._problem == "multi_label_classification" if multi_label is None else multi_label

    @property
    def _config_pad(self) -> int:
        return int(self.model.config.get_text_config().pad_token_id)

    def _scored(
        self,
        texts: str | Iterable[str],
        multi_label: bool | None,
        long: Long,
        max_tokens: int | Literal["auto"],
        progress: bool,
    ) -> tuple[Tensor, list[bool], tuple[int, str, str]]:
        """Scores, whether each text was cut, and what to say about it."""
        if self._several(multi_label):
            finish: Callable[[Tensor], Tensor] = torch.sigmoid
        elif self._problem == "regression" and multi_label is None:
            finish = torch.clone
        else:
            finish = _softmax
        items = self._texts(texts)
        scores, cut = self._rows_through(
            items, finish, long=long, max_tokens=max_tokens, progress=progress
        )
        lost = set(cut if long == "truncate" else ())
        of = f"{len(set(items))} different texts"
        why = (len(lost), of, "; use long='mean' or long='error'")
        return scores, [text in lost for text in items], why

    def _rows_through(
        self,
        items: Sequence[str] | Sequence[tuple[str, str]],
        finish: Callable[[Tensor], Tensor],
        *,
        numbers: Sequence[int] | None = None,
        long: Long,
        max_tokens: int | Literal["auto"],
        progress: bool = False,
    ) -> tuple[Tensor, list[str] | list[tuple[str, str]]]:
        """Finished logits of texts or pairs ``(items, labels)``, and those that did not fit.

        Errors number texts by their place, and pairs, of which no ``"mean"`` can be taken, by
        ``numbers``.
        """
        named = range(len(items)) if numbers is None else numbers
        remedies = "long='truncate', long='mean'" if numbers is None else "long='truncate'"
        check_max_tokens(max_tokens)
        if long not in ("truncate", "error", "mean"):
            raise ValueError(f"long={long!r} is none of 'truncate', 'error', 'mean'")
        unique: dict[str | tuple[str, str], int] = {}
        where = [unique.setdefault(item, len(unique)) for item in items]
        keys = cast("list[str]", list(unique))
        cut: list[str] = []
        scores = torch.empty(len(keys), len(self.labels), device=self.backbone.device)
        with torch.inference_mode(), progress_bar(len(keys), shown=progress) as bar:
            for start, rows in tokenized_windows(keys, self.row_tokenizer, long=long):
                cut += [keys[start + index] for index in rows.too_long]
                if cut and long == "error":
                    index = named[where.index(start + rows.too_long[0])]
                    raise ValueError(
                        f"texts[{index}] has more than max_length={self.max_length} tokens; use"
                        f" {remedies} or a larger max_length"
                    )
                if "token_type_ids" not in self.tokenizer.model_input_names:
                    rows = replace(rows, types=None)
                parts = torch.empty(len(rows.lengths), len(self.labels), device=scores.device)

                def compute(batch: PackedBatch, indices: Tensor, parts: Tensor = parts) -> None:
                    parts.index_copy_(0, indices, finish(self.forward(batch)))
                    bar.update(len(indices))

                self._compute(rows, compute, max_tokens)
                scores[start : start + len(rows.pieces)] = join_pieces(parts, rows)
        finite = scores.isfinite().all(1)
        if not bool(finite.all()):
            index = named[where.index(int((~finite).nonzero()[0]))]
            raise RuntimeError(
                f"a score of texts[{index}] is not finite; load the model with dtype='float32'"
            )
        if len(unique) != len(items):
            scores = scores[torch.tensor(where, device=scores.device)]
        return scores, cut

    def _padded_logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits from the whole model of transformers."""
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = {key: batch[key] for key in names if key in batch}
        config = self.model.config
        if not config.is_encoder_decoder:
            inputs = positioned(self.model, inputs, self.first_position)
            return self.model(**inputs).logits.float()
        # BART and T5 count positions from the left, read the state of the last end-of-text token
        # and want as many in every row
        inputs = left_aligned(inputs)
        ends = (inputs["input_ids"] == config.eos_token_id).sum(1)
        counts = ends.unique().tolist()
        if counts[0] == 0:
            raise ValueError(
                f"row {int((ends == 0).nonzero()[0])} has no end-of-text token"
                f" ({config.eos_token_id}), whose state {self.name} reads; let the tokenizer add it"
            )
        logits = torch.empty(len(ends), len(self.labels), device=ends.device)
        for count in counts:
            rows = (ends == count).nonzero()[:, 0]
            some = {key: value[rows] for key, value in inputs.items()}
            logits = logits.index_copy(0, rows, self.model(**some).logits.float())
        return logits

    def _why_padded(self) -> str | None:
        if self._attn != "padded" and self.model.config.is_encoder_decoder:
            return self._refuse_packing("it is an encoder-decoder, whose decoder is not packed")
        if (why := super()._why_padded()) is not None:
            return why
        if self._head_fault == _UNCHECKED:
            self._head_fault = check_head(
                self.model,
                self._head,
                pad_id=self._config_pad,
                first_position=self.first_position,
                longest=self.max_length,
            )
            if self._head_fault is not None:
                return self._refuse_packing(self._head_fault)
        return self._head_fault

    def _refuse_packing(self, why: str) -> str:
        if self._attn == "packed":
            raise RuntimeError(
                f"{self.name} cannot run packed: {why}. Use attn='auto' to pad instead"
            )
        if self._checked[1] != why:
            warnings.warn(
                f"{self.name} runs padded, which is slower: {why}. attn='padded' chooses this"
                " silently",
                stacklevel=5,
            )
            self._checked = (self._checked[0], why)
        return why

    def _facts(self) -> dict[str, str]:
        kind = self._problem.replace("_", " ")
        shown = ", ".join(self.labels[:6]) + (", ..." if len(self.labels) > 6 else "")
        return {"labels": f"{len(self.labels)} ({shown}), {kind}"}


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)
