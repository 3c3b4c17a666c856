"""The tagger: texts in, entities out."""

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import _backbone
from ._attention import packed_inputs, positioned
from ._crf import CRF
from ._packing import PackedBatch
from ._runtime import WINDOW, check_max_tokens, progress_bar
from ._selfcheck import disagreement
from ._spans import Scheme, TagScheme, legal_paths
from ._tagger_files import read_settings, write_tagger
from ._token_heads import label_names, load_token_model
from ._token_model import Attention, TokenModel
from ._tokenizing import TokenRows, Window
from ._words import AGGREGATIONS, Aggregation, aggregate, by_text, find_words

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entity:
    """A named thing in a text.

    Attributes:
        text: Its characters: ``document[start:end]``.
        label: What it is.
        start: Index of its first character.
        end: Index behind its last character.
        score: Mean over its words of the probability of the word's tag.
    """

    text: str
    label: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class TaggedBatch:
    """Tokenized sentences with their tags, on which :meth:`Tagger.loss` computes.

    Attributes:
        tokens: The tokens, packed.
        places: Index among the tokens of the one that speaks for each word, in order of the
            sentences and their words, int64 ``(words,)``.
        tags: Index of each word's tag, int64 ``(words,)``.
        lengths: Words of each sentence.
    """

    tokens: PackedBatch
    places: Tensor
    tags: Tensor
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        """Return the number of sentences."""
        return len(self.lengths)

    def _moved(self, move: Callable[[Any], Any]) -> "TaggedBatch":
        return TaggedBatch(move(self.tokens), move(self.places), move(self.tags), self.lengths)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "TaggedBatch":
        """Move to a device."""
        return self._moved(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "TaggedBatch":
        """Copy into page-locked host memory (a ``DataLoader`` with ``pin_memory`` calls this)."""
        return self._moved(lambda x: x.pin_memory())


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
        self._index: dict[str, int] = {label: i for i, label in enumerate(labels)}
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
            self._head_why = self._check_head()
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
            ValueError: If its files are damaged, or it has no head and ``labels`` is None.
        """
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
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

    def collate(self, examples: Iterable[tuple[Sequence[str], Sequence[str]]]) -> TaggedBatch:
        """Tokenize sentences given as words and their tags: ``collate_fn`` of a ``DataLoader``.

        Words are joined by spaces, as they would come in a text. The first token of each word
        bears its tag. Sentences beyond ``max_length`` are cut into several rows; nothing is lost.
        Words without any token (some tokenizers drop control characters) are left out.

        Args:
            examples: ``(words, tags)`` pairs; tags are names.

        Returns:
            The batch on the CPU. Its rows are sorted by length, its words are in input order.

        Raises:
            ValueError: If words and tags do not match, a tag is unknown or, with a CRF, illegal.
        """
        texts, spans, tags = self._joined(examples)
        windows = by_text(self.row_tokenizer.windows(texts, stride=0), from_end=self._from_end)
        flat = [window for parts in windows for window in parts]
        lengths = np.array([len(window.ids) for window in flat], np.int64)
        order = np.argsort(-lengths, kind="stable")
        starts = np.empty_like(lengths)
        starts[order] = np.cumsum(lengths[order]) - lengths[order]
        places: list[int] = []
        kept: list[int] = []
        counts: list[int] = []
        row = 0
        for sentence, parts in enumerate(windows):
            first = _first_tokens(texts[sentence], spans[sentence], parts)
            for word, found in enumerate(first):
                if found is not None:
                    places.append(int(starts[row + found[0]]) + found[1])
                    kept.append(tags[sentence][word])
                elif self.scheme.parts[tags[sentence][word]] != "O":
                    start, end = spans[sentence][word]
                    raise ValueError(
                        f"the word {texts[sentence][start:end]!r} of example {sentence} has a tag"
                        " and no token; remove it"
                    )
            counts.append(sum(found is not None for found in first))
            if self.crf is not None and not self._legal.allow(kept[len(kept) - counts[-1] :]):
                names = [self.labels[i] for i in tags[sentence]]
                raise ValueError(
                    f"the tags of example {sentence} break the rules of {self.scheme.name}, which"
                    f" the CRF knows: {' '.join(names)}"
                )
            row += len(parts)
        if not places:
            raise ValueError("examples holds no words")
        ids = np.fromiter((i for window in flat for i in window.ids), np.int32, int(lengths.sum()))
        rows = TokenRows(ids, lengths, np.ones(len(flat), np.int64), [])
        return TaggedBatch(
            rows.batch(order, first_position=self.first_position),
            torch.tensor(places),
            torch.tensor(kept),
            tuple(counts),
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
                    self.row_tokenizer.windows(some, stride=stride), from_end=self._from_end
                )
                scores, starts = self._scores(groups, some, max_tokens)
                found.update(self._entities(some, groups, scores, starts, stride, aggregation))
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

    @property
    def _from_end(self) -> bool:
        return self.row_tokenizer.from_end

    def _facts(self) -> dict[str, str]:
        how = "a CRF" if self.crf is not None else "the scheme's rules"
        return {"tags": f"{len(self.labels)} of {self.scheme.name}, decoded by {how}"}

    def _why_padded(self) -> str | None:
        return super()._why_padded() or self._head_why

    @torch.no_grad()
    def _check_head(self) -> str | None:
        """Say what is wrong if the head does not see packed rows as it sees padded ones."""
        size = self.model.config.get_text_config().vocab_size
        rows = [[(7 * i + 5) % size for i in range(min(n, self.max_length))] for n in (9, 3, 9)]
        batch = PackedBatch.pack(rows, first_position=self.first_position)
        batch = batch.to(self.model.device)
        inputs = batch.padded(self.pad_id)
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            apart = self._logits(inputs)[inputs["attention_mask"].bool()]
            together = self._logits(packed_inputs(batch))[0]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # any model's code runs here; whatever it raises, padding works
            logger.debug("head check", exc_info=True)
            why = (str(error).splitlines() or [""])[0][:200]
            return f"its head does not take packed rows ({type(error).__name__}: {why})"
        finally:
            for module, training in modes:
                module.training = training
        why = disagreement(together, apart)
        return None if why is None else f"its head does not hand the rows on ({why})"

    def _logits(self, inputs: dict[str, Any]) -> Tensor:
        return self.model(**inputs).logits.float()

    def _joined(
        self, examples: Iterable[tuple[Sequence[str], Sequence[str]]]
    ) -> tuple[list[str], list[list[tuple[int, int]]], list[list[int]]]:
        """Join words by spaces; return texts, the characters of each word, and tag indices."""
        texts: list[str] = []
        spans: list[list[tuple[int, int]]] = []
        tags: list[list[int]] = []
        for index, (words, names) in enumerate(examples):
            if isinstance(words, str) or len(words) != len(names):
                raise ValueError(
                    f"example {index} has {len(words)} words and {len(names)} tags; pass a list of"
                    " words and one tag for each"
                )
            unknown = [name for name in names if name not in self._index]
            if unknown:
                raise ValueError(
                    f"example {index} has the tag {unknown[0]!r}; known: {', '.join(self.labels)}"
                )
            start = 0
            places: list[tuple[int, int]] = []
            for word in words:
                places.append((start, start + len(word)))
                start += len(word) + 1
            texts.append(" ".join(words))
            spans.append(places)
            tags.append([self._index[name] for name in names])
        return texts, spans, tags

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

    def _entities(
        self,
        texts: Sequence[str],
        groups: list[list[Window]],
        scores: np.ndarray,
        starts: np.ndarray,
        stride: int,
        aggregation: Aggregation,
    ) -> dict[str, list[Entity]]:
        """Decode the words of each text."""
        whole = aggregation != "token"
        words = [
            find_words(text, parts, stride=stride, whole=whole)
            for text, parts in zip(texts, groups, strict=True)
        ]
        tokens: list[int] = []
        row = 0
        for parts, found in zip(groups, words, strict=True):
            tokens += [
                int(starts[row + window]) + place for word in found.tokens for window, place in word
            ]
            row += len(parts)
        counts = np.array([len(word) for found in words for word in found.tokens], np.int64)
        lengths = [len(found.spans) for found in words]
        emissions = torch.from_numpy(
            aggregate(scores[np.array(tokens, np.int64)], counts, aggregation)
        )
        if self.crf is None:
            tags, chances = legal_paths(emissions, lengths, self._legal), emissions.exp()
        else:
            emissions = emissions.to(self.crf.first.device)
            tags = self.crf.viterbi(emissions, lengths).tags.cpu()
            chances = self.crf.marginals(emissions, lengths).cpu()
        chance = chances.gather(1, tags.unsqueeze(1)).squeeze(1).tolist()
        path = tags.tolist()
        found_in: dict[str, list[Entity]] = {}
        word = 0
        for text, found in zip(texts, words, strict=True):
            stop = word + len(found.spans)
            entities = []
            for label, first, last in self.scheme.spans(path[word:stop]):
                start, end = found.spans[first][0], found.spans[last - 1][1]
                score = sum(chance[word + first : word + last]) / (last - first)
                entities.append(Entity(text[start:end], label, start, end, score))
            found_in[text] = entities
            word = stop
        return found_in


def _first_tokens(
    text: str, spans: Sequence[tuple[int, int]], windows: Sequence[Window]
) -> list[tuple[int, int] | None]:
    """For each word the window and place of the first token that starts in it.

    Args:
        text: The text.
        spans: First character of each word and the one behind its last.
        windows: The text's windows, without overlap.
    """
    found: list[tuple[int, int] | None] = [None] * len(spans)
    word = 0
    for index, window in enumerate(windows):
        for place, (start, end) in enumerate(window.offsets):
            piece = text[start:end]
            if window.words[place] < 0 or not piece.strip():
                continue
            start += len(piece) - len(piece.lstrip())
            while word < len(spans) and spans[word][1] <= start:
                word += 1
            if word < len(spans) and found[word] is None:
                found[word] = (index, place)
    return found
