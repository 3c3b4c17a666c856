"""The scores of layers under schemes, as a table, JSON or a picture."""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from torsh_quant._table import text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Score = Literal["kl", "mse", "grad"]
FORMAT = "torsh-quant-sensitivity"
VERSION = 2


@dataclass(frozen=True)
class LayerScore:
    """The score of one layer under one scheme.

    Args:
        layer: Name in the model.
        scheme: Short name of the scheme.
        value: The score; 0 is no change.
        nbytes: Bytes of the layer under the scheme.
        nbytes_bias: Those of them that are its bias.
        nbytes_float: Bytes of the float layer.
        weights: How many weights it has.
    """

    layer: str
    scheme: str
    value: float
    nbytes: int
    nbytes_bias: int
    nbytes_float: int
    weights: int


@dataclass(frozen=True)
class Sensitivity:
    """Scores of all layers under all schemes, in the order of the model.

    Args:
        score: What was measured: ``"kl"``, ``"mse"`` or ``"grad"``.
        samples: Number of samples measured on.
        rows: One for each layer and scheme.
    """

    score: Score
    samples: int
    rows: tuple[LayerScore, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in the order of the model."""
        return tuple(dict.fromkeys(row.layer for row in self.rows))

    @property
    def schemes(self) -> tuple[str, ...]:
        """Short names of the schemes, as they were given."""
        return tuple(dict.fromkeys(row.scheme for row in self.rows))

    def value(self, layer: str, scheme: str) -> float:
        """Return the score of one layer under one scheme.

        Raises:
            KeyError: If it was not measured.
        """
        for row in self.rows:
            if (row.layer, row.scheme) == (layer, scheme):
                return row.value
        raise KeyError(f"layer={layer!r} with scheme={scheme!r} was not measured")

    def table(self) -> str:
        """Return a text table: a layer a line, a scheme a column, the most sensitive first."""
        worst = {
            layer: max(self.value(layer, scheme) for scheme in self.schemes)
            for layer in self.layers
        }
        rows = [
            [layer or "(model)", *(f"{self.value(layer, scheme):.2e}" for scheme in self.schemes)]
            for layer in sorted(self.layers, key=lambda layer: -worst[layer])
        ]
        return text_table([f"layer ({self.score})", *self.schemes], rows)

    def to_json(self) -> str:
        """Return everything as JSON, with the format's name and version."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Sensitivity":
        """Undo :meth:`to_json`.

        Raises:
            ValueError: If the text is something else, of a newer version, or damaged.
        """
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"text is no JSON: {error}") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"text is no {FORMAT}; pass what Sensitivity.to_json() returned")
        if found.get("version") != VERSION:
            raise ValueError(
                f"text has version {found.get('version')!r} of {FORMAT}, this package reads "
                f"{VERSION}; measure again, or use the package that wrote it"
            )
        try:
            rows = tuple(LayerScore(**row) for row in found["rows"])
            return cls(found["score"], int(found["samples"]), rows)
        except (KeyError, TypeError) as error:
            raise ValueError(f"text is a damaged {FORMAT}: {error}") from None

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw one line of points per scheme over the layers, on a logarithmic scale.

        Args:
            ax: Where to draw; by default the current axes of matplotlib.

        Returns:
            The axes.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot as plt
        except ImportError as error:
            message = "Sensitivity.plot needs matplotlib: pip install 'torsh-quant[plot]'"
            raise ImportError(message) from error
        axes: Axes = plt.gca() if ax is None else ax
        places = range(len(self.layers))
        floor = min((row.value for row in self.rows if row.value > 0), default=1.0)
        for scheme in self.schemes:
            values = [max(self.value(layer, scheme), floor) for layer in self.layers]
            axes.plot(places, values, marker="o", linewidth=1, label=scheme)
        axes.set_yscale("log")
        axes.set_xticks(list(places), [layer or "(model)" for layer in self.layers], rotation=90)
        label = {"kl": "KL divergence of the output", "mse": "relative squared error of the output"}
        axes.set_ylabel(label.get(self.score, "estimated relative squared error of the output"))
        axes.legend()
        return axes

    def __str__(self) -> str:
        return self.table()
