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


class TextEncoder(Protocol):
    """What turns texts into vectors, such as :class:`torsh_text.Encoder`."""

    def encode(self, texts: list[str], /) -> Tensor | np.ndarray:
        """Return a vector for each text, ``(texts, dim)``."""
        ...


def loaded_encoder(encoder: TextEncoder | str | os.PathLike[str] | None) -> TextEncoder | None:
    """Return the encoder itself, or load the one of this path or hub id."""
    return Encoder.from_pretrained(encoder) if isinstance(encoder, (str, os.PathLike)) else encoder


def document_vectors(
    texts: list[str],
    vectors: Tensor | np.ndarray | None,
    *,
    encoder: TextEncoder | None,
    cache: EmbeddingCache | str | os.PathLike[str] | None,
    dim: int | None,
) -> Tensor:
    """Check vectors, or make them.

    Args:
        texts: The documents.
        vectors: Their vectors, if there are any already.
        encoder: What makes them otherwise.
        cache: Where an :class:`Encoder` keeps them.
        dim: Entries that a vector has to have; None for any.

    Returns:
        float32 ``(documents, dim)``.

    Raises:
        TypeError: If ``cache`` is given with another encoder.
        ValueError: If there is neither encoder nor vectors, or they do not fit.
    """
    if vectors is None:
        vectors = _encoded(texts, encoder, cache) if texts else torch.empty(0, dim or 1)
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
    return finite_rows(x, "vectors")


def _encoded(
    texts: list[str],
    encoder: TextEncoder | None,
    cache: EmbeddingCache | str | os.PathLike[str] | None,
) -> Tensor | np.ndarray:
    if encoder is None:
        raise ValueError("this TopicModel has no encoder; pass vectors, or make it with an encoder")
    if isinstance(encoder, Encoder):
        return encoder.encode(texts, cache=cache)
    if cache is not None:
        raise TypeError(f"cache is for an Encoder; this encoder is a {type(encoder).__name__}")
    return encoder.encode(texts)
