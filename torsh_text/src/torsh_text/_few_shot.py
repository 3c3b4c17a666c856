"""A classifier from a few labelled texts: an encoder, fine-tuned or not, and a linear probe."""

import copy
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn

from ._backbone import digest
from ._cache import EmbeddingCache
from ._contrastive import tune_on_pairs
from ._encoder import Encoder
from ._labels import Label, check_ranking, checked_names, ranked
from ._packing import PackedBatch
from ._probe import fit_probe
from ._runtime import check_device
from ._saving import write_json
from ._token_model import warn_cut
from ._tokenizing import Long, checked_texts
from ._writing import staged_folder

_FORMAT = "torsh-text few-shot"
_VERSION = 1
_HALF = (torch.float16, torch.bfloat16)


def _label_of_each(labels: Iterable[str]) -> list[str]:
    """Return the texts' labels as a list of names."""
    if isinstance(labels, (str, bytes)):
        raise TypeError(
            f"labels={labels!r} is a single string; pass a list with the name of each text's label"
        )
    given = list(labels)
    for index, label in enumerate(given):
        if not isinstance(label, str):
            raise TypeError(
                f"labels[{index}] is {label!r} of type {type(label).__name__}, not a name; predict"
                " gives back what is learnt here, so map numbers to names first, such as"
                " [names[i] for i in labels]"
            )
    return given


class FewShot(nn.Module):
    """A text classifier learnt from a few examples of each class, in seconds.

    :meth:`fit` encodes the texts and solves a multinomial logistic regression on the vectors (the
    probe). With ``finetune`` it first trains a copy of the encoder so that texts of one class come
    close together, which takes about a hundred training steps.

    Args:
        encoder: An :class:`Encoder`, or what :meth:`Encoder.from_pretrained` takes, such as
            ``"sentence-transformers/all-MiniLM-L6-v2"``; never changed.
        finetune: Whether :meth:`fit` trains a copy of the encoder first.
        seed: Seed of everything random in :meth:`fit`.
        device: Where a path or hub id is loaded; None for CUDA if there is one, else the CPU.

    Attributes:
        encoder: The encoder that :meth:`predict` uses.
        head: ``nn.Linear`` from vectors to logits; None before :meth:`fit`.
        labels: Name of each label in the order of the logits, sorted.
        c: Inverse strength of the penalty that the probe was fitted with.
        losses: Loss of each fine-tuning step.

    Reference:
        Tunstall, Reimers, Jo, Bates, Korat, Wasserblat, Pereg: Efficient few-shot learning without
        prompts (SetFit). 2022. arXiv:2209.11055. Here every pair within a batch of single texts is
        used, where SetFit encodes both texts of each drawn pair.
    """

    def __init__(
        self,
        encoder: Encoder | str | os.PathLike[str],
        *,
        finetune: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_device(device, encoder)
        if isinstance(encoder, (str, os.PathLike)):
            # steps in half precision are too coarse to fine-tune
            dtype = "float32" if finetune else "auto"
            encoder = Encoder.from_pretrained(encoder, dtype=dtype, device=device)
        if not isinstance(encoder, Encoder):
            raise TypeError(
                f"encoder is a {type(encoder).__name__}; pass an Encoder, or the hub id or folder"
                " of one"
            )
        self.encoder = encoder
        self.head: nn.Linear | None = None
        self.labels: list[str] = []
        self.c: float | None = None
        self.losses: list[float] = []
        # in a tuple, so that it is no part: the weights of `encoder` are those that count
        self._given = (encoder,) if finetune else None
        self._seed = seed
        self.training = encoder.training

    def fit(
        self,
        texts: Iterable[str],
        labels: Iterable[str],
        *,
        c: float | Literal["auto"] = "auto",
        class_weight: Literal["balanced"] | None = "balanced",
        steps: int | None = None,
        batch_size: int | None = None,
        lr: float | None = None,
        long: Long = "truncate",
        cache: EmbeddingCache | str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> "FewShot":
        """Learn from labelled texts; starts anew each time.

        Args:
            texts: The texts.
            labels: Name of each text's label; two or more different ones.
            c: Inverse strength of the probe's L2 penalty, as in scikit-learn; ``"auto"`` chooses
                it by cross-validation on the log loss, among 0.1 to 1,000 over the vectors' mean
                squared length; it is 10 if a label has a single text or with ``finetune``, where
                held-out texts would have shaped the vectors.
            class_weight: ``"balanced"`` makes all labels count alike however many texts they have.
            steps: Most fine-tuning steps, which end early when the pairs fit; None for 100. This
                and the next two are refused without ``finetune``.
            batch_size: Texts encoded in each fine-tuning step, of which all pairs are compared;
                None for 32.
            lr: Largest learning rate of the fine-tuning; None for 5e-5.
            long: As for :meth:`Encoder.encode`; fine-tuning always cuts.
            cache: As for :meth:`Encoder.encode`.
            progress: Show a progress bar.

        Returns:
            Itself.

        Raises:
            TypeError: If a text or label is not a string, or all labels are one string.
            ValueError: If labels and texts do not fit together, there are too few, or an option
                does not fit.
            RuntimeError: If the encoder is in training mode.
        """
        items, given = checked_texts(texts), _label_of_each(labels)
        if len(given) != len(items):
            raise ValueError(f"there are {len(items)} texts and {len(given)} labels; give as many")
        tuning = {"steps": steps, "batch_size": batch_size, "lr": lr}
        for name, value in tuning.items():
            if value is not None and self._given is None:
                raise ValueError(
                    f"{name}={value} is for fine-tuning; make FewShot(encoder, finetune=True), or"
                    " leave it out"
                )
        if c != "auto" and not (isinstance(c, (int, float)) and c > 0):
            raise ValueError(f"c={c!r} is neither 'auto' nor a positive number")
        if class_weight not in ("balanced", None):
            raise ValueError(f"class_weight={class_weight!r} is neither 'balanced' nor None")
        names = checked_names(sorted(set(given)), least=2)
        places = {name: index for index, name in enumerate(names)}
        y = torch.tensor([places[label] for label in given])
        if self._given is not None:
            self._finetune(
                items,
                names,
                y,
                steps=100 if steps is None else steps,
                rows=32 if batch_size is None else batch_size,
                lr=5e-5 if lr is None else lr,
                progress=progress,
            )
            # these texts shaped the vectors, so holding some of them out would say nothing
            c = 10.0 if c == "auto" else c
        vectors, _, why = self.encoder.vectors_and_cuts(
            items, max_tokens="auto", long=long, cache=cache, progress=progress
        )
        self.encoder._warn_cut(why.cut, why.of, why.remedy)
        weight, bias, self.c = fit_probe(
            vectors,
            y.to(vectors.device),
            num_classes=len(names),
            c=c,
            balanced=class_weight == "balanced",
            seed=self._seed,
        )
        self.head = self._make_head(weight, bias)
        self.labels = names
        return self

    def forward(self, batch: PackedBatch | Mapping[str, Tensor]) -> Tensor:
        """Map a batch of tokens (see :meth:`Encoder.pack`) to logits; gradients flow.

        Returns:
            float32 ``(rows, labels)``.
        """
        return self._fitted()(self.encoder(batch))

    @overload
    def predict(
        self,
        texts: str,
        *,
        top_k: int | None = ...,
        min_score: float | None = ...,
        long: Long = ...,
        max_tokens: int | Literal["auto"] = ...,
        cache: EmbeddingCache | str | os.PathLike[str] | None = ...,
        progress: bool = ...,
    ) -> Label | list[Label]: ...

    @overload
    def predict(
        self,
        texts: Iterable[str],
        *,
        top_k: int | None = ...,
        min_score: float | None = ...,
        long: Long = ...,
        max_tokens: int | Literal["auto"] = ...,
        cache: EmbeddingCache | str | os.PathLike[str] | None = ...,
        progress: bool = ...,
    ) -> list[Label] | list[list[Label]]: ...

    def predict(
        self,
        texts: str | Iterable[str],
        *,
        top_k: int | None = None,
        min_score: float | None = None,
        long: Long = "truncate",
        max_tokens: int | Literal["auto"] = "auto",
        cache: EmbeddingCache | str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> Label | list[Label] | list[list[Label]]:
        """Label texts, in input order, without gradients.

        Args:
            texts: The texts, or one text.
            top_k: That many labels for each text, best first, as a list; None for the best alone.
            min_score: Labels below it are left out of the lists, 0 to 1; refused without ``top_k``.
            long: As for :meth:`Encoder.encode`, like all that follow.
            max_tokens: As there.
            cache: As there.
            progress: As there.

        Returns:
            For each text a :class:`Label` or a list of them; for one text, what it has.
        """
        self._fitted()
        check_ranking(top_k=top_k, min_score=min_score, several=False, count=len(self.labels))
        items = [texts] if isinstance(texts, str) else checked_texts(texts)
        scores, truncated = self._scored(items, long, max_tokens, cache, progress)
        found = ranked(
            scores,
            self.labels,
            top_k=top_k,
            several=False,
            min_score=min_score,
            truncated=truncated,
        )
        return found[0] if isinstance(texts, str) else found

    def scores(
        self,
        texts: str | Iterable[str],
        *,
        long: Long = "truncate",
        max_tokens: int | Literal["auto"] = "auto",
        cache: EmbeddingCache | str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Probability of every label for every text, without gradients.

        Takes what :meth:`predict` takes.

        Returns:
            float32 ``(texts, labels)``, or ``(labels,)`` for one text.

        Raises:
            RuntimeError: If there was no :meth:`fit`, or a score is not finite.
        """
        items = [texts] if isinstance(texts, str) else checked_texts(texts)
        scores, _ = self._scored(items, long, max_tokens, cache, progress)
        return scores[0] if isinstance(texts, str) else scores

    def _scored(
        self,
        texts: list[str],
        long: Long,
        max_tokens: int | Literal["auto"],
        cache: EmbeddingCache | str | os.PathLike[str] | None,
        progress: bool,
    ) -> tuple[Tensor, list[bool]]:
        """Scores ``(texts, labels)``, and whether each text was cut."""
        head = self._fitted()
        vectors, cut, why = self.encoder.vectors_and_cuts(
            texts, long=long, max_tokens=max_tokens, cache=cache, progress=progress
        )
        warn_cut(*why)
        with torch.no_grad():
            scores = head(vectors).softmax(-1)
        finite = scores.isfinite().all(1)
        if not bool(finite.all()):
            index = int((~finite).nonzero()[0])
            raise RuntimeError(
                f"a score of texts[{index}] is not finite; check the head's weights, or load the"
                " encoder with dtype='float32' and fit again"
            )
        return scores, cut

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a folder with the encoder, the head and the labels, that :meth:`load` reads."""
        from safetensors.torch import save_file

        head = {key: value.cpu() for key, value in self._fitted().state_dict().items()}
        with staged_folder(Path(path)) as staging:
            self.encoder.save_pretrained(staging / "encoder")
            save_file(head, staging / "head.safetensors")
            note = {
                "format": _FORMAT,
                "version": _VERSION,
                "labels": self.labels,
                "c": self.c,
                "checksum": digest(head, json.dumps(self.labels)),
            }
            write_json(staging / "few_shot.json", note)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
    ) -> "FewShot":
        """Read what :meth:`save` wrote, in eval mode.

        Args:
            path: The folder.
            dtype: As for :meth:`Encoder.from_pretrained`.
            device: As there.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If it was written by something else, or is damaged.
        """
        from safetensors.torch import load_file

        folder = Path(path)
        if not (folder / "few_shot.json").is_file():
            raise FileNotFoundError(f"{folder} holds no few_shot.json; pass a folder of save()")
        note: dict[str, Any] = json.loads((folder / "few_shot.json").read_text(encoding="utf-8"))
        if note.get("format") != _FORMAT or note.get("version") != _VERSION:
            raise ValueError(
                f"{folder} holds {note.get('format')!r} version {note.get('version')!r}; this"
                f" release reads {_FORMAT!r} version {_VERSION}"
            )
        head = load_file(folder / "head.safetensors")
        if digest(head, json.dumps(note["labels"])) != note["checksum"]:
            raise ValueError(f"{folder} is damaged: head and labels do not fit their checksum")
        found = cls(Encoder.from_pretrained(folder / "encoder", dtype=dtype, device=device))
        found.head = found._make_head(head["weight"], head["bias"])
        found.labels, found.c = note["labels"], note["c"]
        return found

    def _finetune(
        self,
        items: list[str],
        names: list[str],
        y: Tensor,
        *,
        steps: int,
        rows: int,
        lr: float,
        progress: bool,
    ) -> None:
        if self._given is None:
            return
        (given,) = self._given
        if given.backbone.dtype in _HALF:
            raise ValueError(
                f"the encoder has {given.backbone.dtype} weights, too coarse for small steps; load"
                " it with dtype='float32' to fine-tune"
            )
        if steps < 1 or rows < 4 or lr <= 0:
            raise ValueError(
                f"steps={steps}, batch_size={rows}, lr={lr}: fine-tuning needs one step, a batch"
                " of four texts and a positive lr at least"
            )
        counts = torch.bincount(y)
        if int(counts.min()) < 2:
            raise ValueError(
                f"label {names[int(counts.argmin())]!r} has a single text; fine-tuning compares"
                " texts of a label, so give two at least"
            )
        self.encoder = copy.deepcopy(given).to(self.encoder.backbone.device)
        self.losses = tune_on_pairs(
            self.encoder,
            items,
            y,
            steps=steps,
            rows=rows,
            lr=lr,
            seed=self._seed,
            progress=progress,
        )

    def _make_head(self, weight: Tensor, bias: Tensor) -> nn.Linear:
        made = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])
        head = cast("nn.Linear", made)
        head.load_state_dict({"weight": weight.float(), "bias": bias.float()})
        head.to(self.encoder.backbone.device).train(self.training)
        return head

    def _fitted(self) -> nn.Linear:
        if self.head is None:
            raise RuntimeError(
                "this FewShot has learnt nothing yet; call .fit(texts, labels) first"
            )
        return self.head
