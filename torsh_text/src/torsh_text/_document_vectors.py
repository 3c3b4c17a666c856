"""Vectors of documents: given by the caller, or made by an encoder."""

import os
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ._arrays import as_tensor
from ._cache import EmbeddingCache
from ._cluster import finite_rows
from ._encoder import Encoder
from ._runtime import check_device
from ._token_model import Cut
from ._tokenizing import Long


class TextEncoder(Protocol):
    """What turns texts into vectors, such as :class:`torsh_text.Encoder`."""

    def encode(self, texts: list[str], /) -> Tensor | np.ndarray:
        """Return a vector for each text, ``(texts, dim)``."""
        ...


def loaded_encoder(
    encoder: TextEncoder | str | os.PathLike[str] | None,
    device: torch.device | str | None = None,
) -> TextEncoder | None:
    """Return the encoder itself, or load the one of this path or hub id."""
    check_device(device, encoder)
    if isinstance(encoder, (str, os.PathLike)):
        return Encoder.from_pretrained(encoder, device=device)
    return encoder


def document_vectors(
    texts: list[str],
    vectors: Tensor | np.ndarray | None,
    *,
    encoder: TextEncoder | None,
    cache: EmbeddingCache | str | os.PathLike[str] | None,
    dim: int | None,
    long: Long,
) -> tuple[Tensor, list[bool], Cut | None]:
    """Check vectors, or make them.

    Args:
        texts: The documents.
        vectors: Their vectors, if there are any already.
        encoder: What makes them otherwise.
        cache: Where an :class:`Encoder` keeps them.
        dim: Entries that a vector has to have; None for any.
        long: What an :class:`Encoder` does with long texts.

    Returns:
        float32 ``(documents, dim)``, whether each document was cut, and what to warn of.

    Raises:
        TypeError: If ``cache`` or ``long`` is given with another encoder.
        ValueError: If there is neither encoder nor vectors, or they do not fit.
    """
    cut, why = [False] * len(texts), None
    if vectors is None and not texts:
        vectors = torch.empty(0, dim or 1)
    elif vectors is None and isinstance(encoder, Encoder):
        vectors, cut, why = encoder.vectors_and_cuts(
            texts, max_tokens="auto", long=long, cache=cache, progress=False
        )
    elif vectors is None:
        vectors = _encoded(texts, encoder, cache, long)
    elif long != "truncate":
        raise ValueError(f"vectors were given, so long={long!r} has nothing to do; leave it out")
    elif cache is not None:
        raise ValueError("vectors were given, so cache has nothing to keep; leave it out")
    x = as_tensor(vectors, "vectors").detach()
    if x.ndim != 2 or len(x) != len(texts):
        raise ValueError(
            f"vectors have shape {tuple(x.shape)}; expected ({len(texts)}, dim) for"
            f" {len(texts)} texts"
        )
    if dim is not None and x.shape[1] != dim:
        raise ValueError(f"vectors have {x.shape[1]} entries, those of the topics {dim}")
    return finite_rows(x, "vectors"), cut, why


def _encoded(
    texts: list[str],
    encoder: TextEncoder | None,
    cache: EmbeddingCache | str | os.PathLike[str] | None,
    long: Long,
) -> Tensor | np.ndarray:
    if encoder is None:
        raise ValueError("this TopicModel has no encoder; pass vectors, or make it with an encoder")
    for name, given in (("cache", cache is not None), ("long", long != "truncate")):
        if given:
            raise TypeError(f"{name} is for an Encoder; this encoder is a {type(encoder).__name__}")
    return encoder.encode(texts)
