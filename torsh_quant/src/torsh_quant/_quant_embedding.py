"""Tables of vectors with integer entries."""

from typing import Self

import torch
from torch import Tensor, nn

from torsh_quant._layer import QuantizedLayer
from torsh_quant._rounding import Rounded
from torsh_quant._spec import Scheme


class QuantEmbedding(QuantizedLayer):
    """An embedding whose vectors are stored as integers; those asked for become floats.

    State as of :class:`QuantLinear`, with ``num_embeddings`` rows of ``embedding_dim``.

    Args:
        num_embeddings: Vectors in the table.
        embedding_dim: Size of each.
        padding_idx: As in :class:`torch.nn.Embedding`; kept for :meth:`to_float`.
        scheme: Scheme of the weight or its short name, with float activations: ``"w8a16"``.
        dtype: Of the vectors that come out.
        device: Where the buffers go.

    Raises:
        ValueError: If the scheme does not fit.

    Example:
        >>> table = nn.Embedding.from_pretrained(torch.tensor([[0.0, 0.0], [127.0, -2.0]]))
        >>> QuantEmbedding.from_float(table)(torch.tensor([1, 0]))
        tensor([[127.,  -2.],
                [  0.,   0.]])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        scheme: str | Scheme = "w8a16",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        layer: str = "QuantEmbedding",
    ) -> None:
        scheme = Scheme.parse(scheme)
        if scheme.act is not None:
            raise ValueError(
                f"scheme={str(scheme)!r} rounds activations, but {layer!r} has indices for input; "
                f"use 'w{scheme.weight.bits}a16'"
            )
        super().__init__(
            num_embeddings, embedding_dim, scheme, bias=False, device=device, layer=layer
        )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.dtype = dtype

    @classmethod
    def from_float(
        cls,
        layer: nn.Embedding,
        scheme: str | Scheme = "w8a16",
        *,
        name: str = "Embedding",
        rounded: Rounded | None = None,
    ) -> Self:
        """Quantize a float layer.

        Args:
            layer: The float layer.
            scheme: Scheme or its short name.
            name: Used in error messages.
            rounded: The integers; None rounds to nearest.

        Raises:
            ValueError: If the scheme does not fit it, or it renormalises its vectors.
        """
        if layer.max_norm is not None:
            raise ValueError(
                f"{name!r} changes its weight when it is read (max_norm={layer.max_norm}); leave "
                "it out"
            )
        made = cls(
            layer.num_embeddings,
            layer.embedding_dim,
            layer.padding_idx,
            scheme=scheme,
            dtype=layer.weight.dtype,
            device=layer.weight.device,
            layer=name,
        )
        made._fill(layer.weight, None, rounded, None, name)
        return made.train(layer.training)

    def to_float(self, dtype: torch.dtype = torch.float32) -> nn.Embedding:
        """Return a float layer with the vectors the integers stand for."""
        made = nn.Embedding(
            self.num_embeddings,
            self.embedding_dim,
            self.padding_idx,
            device=self.weight.device,
            dtype=dtype,
        )
        with torch.no_grad():
            made.weight.copy_(self.dequantized_weight())
        return made.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map indices of any shape to vectors ``(..., embedding_dim)``."""
        return torch.ops.torsh_quant.embedding(
            x, self.weight, self.scale, self.zero_point, self.embedding_dim, self.dtype
        )

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {super().extra_repr()}"
