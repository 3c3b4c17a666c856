"""The tagger: texts in, entities out."""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import _backbone
from ._attention import packed_inputs, positioned
from ._crf import CRF
from ._entities import Entity, find_entities
from ._packing import PackedBatch
from ._runtime import WINDOW, check_max_tokens, progress_bar
from ._spans import Scheme, TagScheme
from ._tagged_batch import TaggedBatch, collate_tagged
from ._tagger_files import read_settings, write_tagger
from ._token_heads import check_token_head, label_names, load_token_model
from ._token_model import Attention, TokenModel
from ._tokenizing import TokenRows, Window
from ._words import AGGREGATIONS, Aggregation, by_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Tagger(TokenModel):
    """A token classification model of transformers that finds entities, without padding.

    As a tool (:meth:`predict`) it reads texts of any length and returns entities with their
    characters; tags always follow their scheme's rules. As a layer (:meth:`forward`,
    :meth:`loss`) it is trained in plain loops or Lightning. Most people start with
    :meth:`from_pretrained`; this constructor takes parts that are already loaded.

    Args:
        model: A ``...ForTokenClassification`` model; its ``config.id2label`` names the tags.
        tokenizer: Its tokenizer, a fast one.
        scheme: What the tags mean (:class:`torsh_text.TagScheme`).
        crf: A CRF over the model's outputs; None to tag each word by itself within the rules.
        max_length: Tokens of a window, special tokens included; None for as many as the model
            and tokenizer allow.
        attn: ``"auto"``, ``"packed"`` (raise where the check fails) or ``"padded"``.
        name: What messages call the model.

    Attributes:
        model: The whole model; its ``state_dict()`` is that of transformers.
        crf: The CRF, or None.
        scheme: The tags and what they mean.
        tokenizer: The tokenizer as it was given.

    Raises:
        ValueError: If an argument does not fit the model.
        RuntimeError: If ``attn="packed"`` and the model cannot run packed.
    """

    _kind = "tagger"

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: Any,
        *,
        scheme: Scheme | Literal["auto"] = "auto",
        crf: CRF | None = None,
        max_length: int | None = None,
        attn: Attention = "auto",
        name: str | None = None,
    ) -> None:
        super().__init__()
        labels = label_names(model.config)
        self.scheme: TagScheme = TagScheme.from_labels(labels, scheme)
        if crf is not None and crf.num_tags != len(labels):
            raise ValueError(f"crf has {crf.num_tags} tags, the model {len(labels)}")
        self.model: PreTrainedModel = model
        self.crf: CRF | None = crf
        self._legal = self.scheme.transitions()
        self._head_why: str | None = None
        self._read_with(
            tokenizer,
            max_length=max_length,
            lower_case=False,  # would move characters
            attn=attn,
            name=name or type(model).__name__,
        )
        if self._why_padded() is None:
            self._head_why = check_token_head(
                self.model,
                pad_id=self.pad_id,
                first_position=self.first_position,
                longest=self.max_length,
            )
        if self._head_why is not None and attn == "packed":
            raise RuntimeError(
                f"{self.name} cannot run packed: {self._head_why}. Use attn='auto' to pad instead"
            )
        if self._head_why is not None:
            warnings.warn(
                f"{self.name} runs padded, which is slower: {self._head_why}. attn='padded' chooses"
                " this silently",
                stacklevel=2,
            )

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        labels: Sequence[str] | None = None,
        scheme: Scheme | Literal["auto"] = "auto",
        crf: bool | Literal["auto"] = "auto",
        seed: int = 0,
        max_length: int | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        attn: Attention = "auto",
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
    ) -> "Tagger":
        """Load a token classification model, or put a fresh head on any encoder; in eval mode.

        Args:
            name: Hub id such as ``"dslim/bert-base-NER"``, or a folder.
            labels: Names of the tags. A head with these tags is kept, as is one of as many tags
                that have no names yet; else a fresh one is made, to be trained. None for those of
                the model.
            scheme: What the tags mean; ``"auto"`` reads it from the folder or the tags' names.
            crf: Whether a CRF decides; ``"auto"`` if one was saved with the model. A new one
                allows what the scheme allows and has still to be trained.
            seed: Decides the weights of a fresh head.
            max_length: Tokens of a window; None for what was saved, or all the model allows.
            dtype: ``"auto"`` is bfloat16 on CUDA and float32 elsewhere; or a torch dtype or its
                name. For training in mixed precision, load float32 and use autocast.
            device: None for CUDA if there is one, else the CPU.
            attn: ``"auto"`` packs where the check at load passes; ``"packed"`` insists;
                ``"padded"`` never packs.
            revision: Branch, tag or commit on the hub.
            local_files_only: Do not ask the hub.
            trust_remote_code: Let the model's own code run on this machine.

        Raises:
            FileNotFoundError: If the model is neither a folder nor to be had from the hub.
            ValueError: If its files are damaged, or ``labels`` is None and there is no head, or one
                for whole texts.
        """
        place = _backbone.resolve_device(device)
        folder = _backbone.find_model(
            name,
            revision=revision,
            local_files_only=local_files_only,
            trust_remote_code=trust_remote_code,
        )
        if labels is not None:
            labels = TagScheme.from_labels(labels, scheme).labels
        model, tokenizer, fresh = load_token_model(
            folder,
            labels=labels,
            seed=seed,
            dtype=_backbone.resolve_dtype(dtype, place),
            trust_remote_code=trust_remote_code,
        )
        torch.nn.Module.to(model, place)
        saved = None if fresh else read_settings(folder)
        if saved is not None and scheme == "auto":
            scheme = saved.scheme
        if saved is not None and max_length is None:
            max_length = saved.max_length
        tagger = cls(
            model,
            tokenizer,
            scheme=scheme,
            max_length=max_length,
            attn=attn,
            name=str(name),
        )
        weights = saved.crf if saved is not None and crf else None
        if crf is True or weights is not None:
            tagger.crf = CRF(len(tagger.scheme.labels), tagger.scheme.transitions()).to(place)
            if weights is not None:
                tagger.crf.load_state_dict(weights)
        return tagger.eval()

    @property
    def backbone(self) -> "PreTrainedModel":  # type: ignore[override]
        """The transformer without its head."""
        return cast("PreTrainedModel", self.model.base_model)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the tags, in the order of the logits."""
        return self.scheme.labels

    def forward(self, batch: PackedBatch | Mapping[str, Tensor]) -> Tensor:
        """Map a batch of tokens to the scores of their tags; gradients flow.

        Args:
            batch: A :class:`PackedBatch`, or a padded mapping with ``input_ids`` and, unless
                nothing is padded, ``attention_mask``.

        Returns:
            float32 logits, ``(tokens, labels)`` of a packed batch, ``(rows, length, labels)`` of
            a padded one. The CRF, if there is one, comes behind them.
        """
        self._check_tokens(batch)
        if not isinstance(batch, PackedBatch):
            return self._logits(positioned(self.model, batch, self.first_position))
        self._check_batch(batch)
        if self._why_padded() is None:
            return self._logits(packed_inputs(batch))[0]
        inputs = batch.padded(self.pad_id)
        return self._logits(inputs)[inputs["attention_mask"].bool()]

    def loss(self, batch: TaggedBatch) -> Tensor:
        """Loss of a batch from :meth:`collate`, for training.

        Returns:
            The mean over words of the cross-entropy or, with a CRF, of the negative
            log-likelihood of the sentences' tags.
        """
        logits = self(batch.tokens).index_select(0, batch.places)
        if self.crf is None:
            return F.cross_entropy(logits, batch.tags)
        return -self.crf(logits, batch.tags, batch.lengths).sum() / len(batch.tags)

    def collate(self, examples: Iterable[tuple[Sequence[str], Sequence[str | int]]]) -> TaggedBatch:
        """Tokenize sentences given as words and their tags: ``collate_fn`` of a ``DataLoader``.

        Words are joined by spaces, as they would come in a text. The first token of each word
        bears its tag. Sentences beyond ``max_length`` are cut into several rows; nothing is lost.
        Words without any token (some tokenizers drop control characters) are left out.

        Args:
            examples: ``(words, tags)`` pairs; tags are names, or places in :attr:`labels` as in
                the data sets of the hub (check that these are in the same order).

        Returns:
            The batch on the CPU. Its rows are sorted by length, its words are in input order.

        Raises:
            TypeError: If an example is no pair of lists, or holds what is no word or tag.
            ValueError: If words and tags do not match, a tag is unknown or, with a CRF, illegal.
        """
        return collate_tagged(
            examples,
            tokenizer=self.row_tokenizer,
            scheme=self.scheme,
            legal=None if self.crf is None else self._legal,
            first_position=self.first_position,
        )

    @overload
    def predict(
        self,
        texts: str,
        *,
        stride: int | None = ...,
        aggregation: Aggregation = ...,
        min_score: float = ...,
        max_tokens: int | Literal["auto"] = ...,
        progress: bool = ...,
    ) -> list[Entity]: ...

    @overload
    def predict(
        self,
        texts: Iterable[str],
        *,
        stride: int | None = ...,
        aggregation: Aggregation = ...,
        min_score: float = ...,
        max_tokens: int | Literal["auto"] = ...,
        progress: bool = ...,
    ) -> list[list[Entity]]: ...

    def predict(
        self,
        texts: str | Iterable[str],
        *,
        stride: int | None = None,
        aggregation: Aggregation = "first",
        min_score: float = 0.0,
        max_tokens: int | Literal["auto"] = "auto",
        progress: bool = False,
    ) -> list[Entity] | list[list[Entity]]:
        """Find the entities of texts, in input order, without gradients.

        Texts longer than a window are read whole, in overlapping windows; each token is judged
        where it has most context. The best sequence of tags of the whole text that the scheme
        allows decides. Equal texts are computed once.

        Words are the tokenizer's, split further at punctuation and, in scripts without spaces, at
        every token.

        Args:
            texts: The texts, or one text.
            stride: Tokens that neighbouring windows share. Half of it is the least context. None
                for 64, or for half of the tokens that fit a window if that is less.
            aggregation: Which tokens speak for a word: the ``"first"``, as most models are
                trained; the surest (``"max"``); the ``"mean"`` of all; or ``"token"``, where each
                token is a word.
            min_score: Least score of an entity to be returned, 0 to 1.
            max_tokens: Most tokens in a batch; ``"auto"`` is 768 on the CPU, 65,536 on CUDA in
                half precision.
            progress: Show a progress bar.

        Returns:
            For each text its entities in reading order, a ``list[list[Entity]]``; for one text a
            ``list[Entity]``.

        Raises:
            TypeError: If an item is not a string or the tokenizer knows no offsets.
            ValueError: If an option does not fit.
            RuntimeError: If the tagger is in training mode, or a score is not finite.
        """
        check_max_tokens(max_tokens)
        if aggregation not in AGGREGATIONS:
            raise ValueError(
                f"aggregation={aggregation!r} is none of {', '.join(map(repr, AGGREGATIONS))}"
            )
        if not 0 <= min_score <= 1:
            raise ValueError(f"min_score={min_score} is not between 0 and 1")
        items = self._texts(texts)
        if stride is None:
            stride = min(64, self.row_tokenizer.room // 2)
        unique = list(dict.fromkeys(items))
        found: dict[str, list[Entity]] = {}
        with torch.inference_mode(), progress_bar(len(unique), shown=progress) as bar:
            for start in range(0, len(unique), WINDOW):
                some = unique[start : start + WINDOW]
                groups = by_text(
                    self.row_tokenizer.windows(some, stride=stride),
                    from_end=self.row_tokenizer.from_end,
                )
                scores, starts = self._scores(groups, some, max_tokens)
                found.update(
                    find_entities(
                        some,
                        groups,
                        scores,
                        starts,
                        scheme=self.scheme,
                        legal=self._legal,
                        crf=self.crf,
                        stride=stride,
                        aggregation=aggregation,
                    )
                )
                bar.update(len(some))
        kept = {text: [e for e in found[text] if e.score >= min_score] for text in unique}
        if isinstance(texts, str):
            return kept[texts]
        return [list(kept[text]) for text in items]

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a folder that :meth:`from_pretrained` and transformers load.

        transformers reads the model alone; the CRF lies beside it in ``crf.safetensors``.
        """
        write_tagger(
            Path(path),
            model=self.model,
            tokenizer=self.tokenizer,
            scheme=self.scheme,
            max_length=self.max_length,
            crf=self.crf,
        )

    def _facts(self) -> dict[str, str]:
        how = "a CRF" if self.crf is not None else "the scheme's rules"
        return {"tags": f"{len(self.labels)} of {self.scheme.name}, decoded by {how}"}

    def _why_padded(self) -> str | None:
        return super()._why_padded() or self._head_why

    def _logits(self, inputs: dict[str, Any]) -> Tensor:
        return self.model(**inputs).logits.float()

    def _scores(
        self,
        groups: list[list[Window]],
        texts: Sequence[str],
        max_tokens: int | Literal["auto"],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities ``(tokens, labels)`` of all windows, and where each row starts."""
        in_rows = [window for parts in groups for window in parts]
        lengths = np.array([len(window.ids) for window in in_rows], np.int64)
        starts = np.cumsum(lengths) - lengths
        filled = np.flatnonzero(lengths)  # a tokenizer without special tokens leaves empty rows
        total = int(lengths.sum())
        device = self.model.device
        scores = torch.empty(total, len(self.labels), device=device)
        if not len(filled):
            return scores.cpu().numpy(), starts
        ids = np.fromiter((i for window in in_rows for i in window.ids), np.int32, total)
        rows = TokenRows(ids, lengths[filled], np.ones(len(filled), np.int64), [])
        begin = torch.from_numpy(starts[filled]).to(device)

        def compute(batch: PackedBatch, indices: Tensor) -> None:
            ends = batch.cu_seqlens.long()
            shift = (begin[indices] - ends[:-1]).repeat_interleave(
                ends.diff(), output_size=batch.num_tokens
            )
            where = shift + torch.arange(batch.num_tokens, device=device)
            scores.index_copy_(0, where, self(batch).log_softmax(1))

        self._compute(rows, compute, max_tokens)
        found = scores.cpu().numpy()
        finite = np.isfinite(found).all(axis=1)
        if not finite.all():
            row = int(np.searchsorted(starts, int(np.argmin(finite)), "right")) - 1
            raise RuntimeError(
                f"the scores of {texts[in_rows[row].text][:60]!r} are not finite; load the model"
                " with dtype='float32'"
            )
        return found, starts
