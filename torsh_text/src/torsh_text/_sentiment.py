"""Sentiment: a classifier whose labels stand for negative, neutral and positive."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from ._classify import Classifier
from ._heads import MissingHeadError
from ._labels import Label
from ._packing import PackedBatch
from ._runtime import check_device
from ._token_model import Attention
from ._tokenizing import Long

DEFAULT = "cardiffnlp/twitter-roberta-base-sentiment-latest"
_NAMES = ("negative", "neutral", "positive")
_VALENCES = {
    "very negative": -1.0,
    "negative": -1.0,
    "neg": -1.0,
    "bad": -1.0,
    "neutral": 0.0,
    "neu": 0.0,
    "positive": 1.0,
    "pos": 1.0,
    "good": 1.0,
    "very positive": 1.0,
}
_RANKS = re.compile(r"(?:label[ _])?(\d+)(?: stars?)?")


@dataclass(frozen=True)
class SentimentLabel(Label):
    """What a text sounds like.

    Attributes:
        name: ``"negative"``, ``"neutral"`` or ``"positive"``.
        score: Its probability.
        index: 0, 1 or 2, in that order.
        truncated: Whether the text was too long and its end was not read.
        signed: Expected valence from -1 (negative) to 1 (positive).
    """

    signed: float


def valences_of(labels: Iterable[str]) -> list[float]:
    """Read a valence from -1 to 1 off each label name.

    Words count as they say: negative, neg, bad; neutral, neu; positive, pos, good, in any case;
    with ``very`` beside them, the plain ones count half. Two, three or five labels that are only
    numbered (``LABEL_0``, ``1 star``, ``0``) count evenly from the worst to the best, as in SST-2
    (0 is negative), TweetEval (0, 1, 2) and star ratings.

    Raises:
        ValueError: If the names say neither.

    Example:
        >>> valences_of(["POS", "NEG", "neutral"])
        [1.0, -1.0, 0.0]
        >>> valences_of([f"{n} stars" for n in range(1, 6)])
        [-1.0, -0.5, 0.0, 0.5, 1.0]
    """
    names = [" ".join(label.casefold().replace("_", " ").split()) for label in labels]
    if all(name in _VALENCES for name in names):
        graded = any(name.startswith("very ") for name in names)
        found = [
            _VALENCES[name] * (0.5 if graded and not name.startswith("very ") else 1.0)
            for name in names
        ]
    else:
        matches = [_RANKS.fullmatch(name) for name in names]
        ranks = [int(match[1]) for match in matches if match]
        even = sorted(ranks) == list(
            range(min(ranks, default=0), min(ranks, default=0) + len(names))
        )
        if len(names) not in (2, 3, 5) or not even or min(ranks) > 1:
            raise ValueError(
                f"labels {list(labels)} do not say which is negative or positive; pass"
                " valences={label: number from -1 to 1}"
            )
        found = [2.0 * (rank - min(ranks)) / (len(names) - 1) - 1.0 for rank in ranks]
    if min(found) >= 0 or max(found) <= 0:
        raise ValueError(
            f"labels {list(labels)} lack a negative or a positive one; pass valences={{label:"
            " number from -1 to 1}}"
        )
    return found


def _load(name: str | os.PathLike[str], **options: Any) -> Classifier:
    """Load a classifier that is trained already: labels for a new head would say nothing."""
    try:
        return Classifier.from_pretrained(name, **options)
    except MissingHeadError as error:
        raise ValueError(
            f"{error.lack}. Use a model trained for sentiment, such as {DEFAULT!r}, or train one"
            " with Classifier.from_pretrained(..., labels=['negative', 'positive']) and save it"
        ) from error


class Sentiment(nn.Module):
    """A classifier whose labels are read as negative, neutral and positive.

    The probability of ``"positive"`` is that of all labels with a positive valence together, and
    so on; the signed score is the expected valence.

    Args:
        classifier: A :class:`Classifier` with one label for each text, or what
            :meth:`Classifier.from_pretrained` takes, such as
            ``"cardiffnlp/twitter-roberta-base-sentiment-latest"``.
        valences: Valence from -1 to 1 of each label name; None reads them off the names (see
            :func:`valences_of` for the rules), which refuses what it cannot read.
        device: Where a path or hub id is loaded; None for CUDA if there is one, else the CPU.

    Attributes:
        classifier: The classifier.
        labels: Which of negative, neutral and positive there are.
    """

    def __init__(
        self,
        classifier: Classifier | str | os.PathLike[str],
        *,
        valences: Mapping[str, float] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_device(device, classifier)
        if isinstance(classifier, (str, os.PathLike)):
            classifier = _load(classifier, device=device)
        if not isinstance(classifier, Classifier):
            raise TypeError(
                f"classifier is a {type(classifier).__name__}; pass a Classifier, or the hub id or"
                " folder of one"
            )
        names = classifier.labels
        if valences is None:
            found = valences_of(names)
        else:
            if set(valences) != set(names):
                raise ValueError(
                    f"valences has {sorted(valences)}, the model's labels are {sorted(names)}"
                )
            found = [float(valences[name]) for name in names]
            if not all(-1 <= value <= 1 for value in found):
                raise ValueError(f"valences {dict(valences)} are not all between -1 and 1")
        self.classifier = classifier
        self._valences = torch.tensor(found)
        signs = self._valences.sign().long() + 1
        self._groups = nn.functional.one_hot(signs, 3).float()
        self.labels: list[str] = [_NAMES[i] for i in sorted(set(signs.tolist()))]
        self.train(classifier.training)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = DEFAULT,
        *,
        valences: Mapping[str, float] | None = None,
        max_length: int | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        attn: Attention = "auto",
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
    ) -> "Sentiment":
        """Load a sentiment classifier, in eval mode.

        Args:
            name: Hub id or folder; without one, English tweets
                (``cardiffnlp/twitter-roberta-base-sentiment-latest``).
            valences: As for the constructor.
            max_length: As for :meth:`Classifier.from_pretrained`, like all that follow.
            dtype: As there.
            device: As there.
            attn: As there.
            revision: As there.
            local_files_only: As there.
            trust_remote_code: As there.

        Raises:
            FileNotFoundError: As there.
            ValueError: If the model has no trained head, or its labels do not say what they mean.
        """
        classifier = _load(
            name,
            max_length=max_length,
            dtype=dtype,
            device=device,
            attn=attn,
            revision=revision,
            local_files_only=local_files_only,
            trust_remote_code=trust_remote_code,
        )
        return cls(classifier, valences=valences)

    def forward(self, batch: PackedBatch | Mapping[str, Tensor]) -> Tensor:
        """Logits of the classifier's own labels; gradients flow."""
        return self.classifier(batch)

    @overload
    def predict(
        self,
        texts: str,
        *,
        long: Long = ...,
        max_tokens: int | Literal["auto"] = ...,
        progress: bool = ...,
    ) -> SentimentLabel: ...

    @overload
    def predict(
        self,
        texts: Iterable[str],
        *,
        long: Long = ...,
        max_tokens: int | Literal["auto"] = ...,
        progress: bool = ...,
    ) -> list[SentimentLabel]: ...

    def predict(
        self,
        texts: str | Iterable[str],
        *,
        long: Long = "truncate",
        max_tokens: int | Literal["auto"] = "auto",
        progress: bool = False,
    ) -> SentimentLabel | list[SentimentLabel]:
        """Say how texts sound, in input order, without gradients.

        Args:
            texts: The texts, or one text.
            long: As for :meth:`Classifier.scores`, like all that follow.
            max_tokens: As there.
            progress: As there.

        Returns:
            A :class:`SentimentLabel` for each text; one for one text.
        """
        single = isinstance(texts, str)
        scores, truncated, why = self.classifier._scored(
            texts, multi_label=False, long=long, max_tokens=max_tokens, progress=progress
        )
        self.classifier._warn_cut(*why)
        scores = scores.cpu()
        grouped, signed = scores @ self._groups, scores @ self._valences
        best, where = grouped.max(dim=1)
        found = [
            SentimentLabel(_NAMES[index], score, index, value, truncated=cut)
            for score, index, value, cut in zip(
                best.tolist(), where.tolist(), signed.tolist(), truncated, strict=True
            )
        ]
        return found[0] if single else found
