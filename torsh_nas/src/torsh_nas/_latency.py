"""What each option costs on this machine, and what a whole architecture will."""

import copy
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from torsh_nas._activation import Call, capture_inputs, find_choices
from torsh_nas._architecture import Architecture
from torsh_nas._cell import NONE
from torsh_nas._derive import derive
from torsh_nas._document import dump_document, parse_document, write_atomically
from torsh_nas._measure import DeviceInfo, evaluating, place_inputs, time_calls, torch_threads
from torsh_nas._signature import signature_of
from torsh_nas._solve import maximise, minimise
from torsh_nas._space import Space, space

_KIND = "torsh_nas.latency_table"
_VERSION = 1

_logger = logging.getLogger(__name__)


class LatencyTable:
    """Latency of every option, and a straight line from their sum to that of the whole model.

    The prediction is ``intercept_ms + scale * (sum of the chosen options)``. :meth:`build`
    measures the options on the inputs that really reach them and fits the line on whole models;
    the constructor takes numbers you have. Every time is in milliseconds.

    Args:
        space: Space of the model.
        costs: One time per option, ``(options,)`` by label; ``"none"`` of an edge costs 0.
        intercept_ms: Time of everything outside the choices.
        scale: Factor between options timed alone and inside a model.
        residual_ms: Root mean square error of the line on the models it was fitted on.
        device_info: Where it was measured; ``None`` for given numbers.
        input_specs: Shape and dtype of each input of the model.

    Raises:
        ValueError: A label or time is missing, negative or not finite.

    Example:
        >>> from torsh_nas import LatencyTable, Space
        >>> space = Space({"a": ("slow", "fast"), "b": ("slow", "fast")})
        >>> table = LatencyTable(space, {"a": (3.0, 1.0), "b": (4.0, 1.0)}, intercept_ms=0.5)
        >>> table.predict({"a": "slow", "b": "fast"})
        4.5
    """

    def __init__(
        self,
        space: Space,
        costs: Mapping[str, Sequence[float]],
        *,
        intercept_ms: float = 0.0,
        scale: float = 1.0,
        residual_ms: float = 0.0,
        device_info: DeviceInfo | None = None,
        input_specs: Sequence[tuple[tuple[int, ...], str]] = (),
    ) -> None:
        if set(costs) != set(space.labels):
            raise ValueError(f"costs has labels {sorted(costs)}, the space {sorted(space.labels)}")
        self.space = space
        self.costs = {label: tuple(float(c) for c in costs[label]) for label in space.labels}
        self.intercept_ms, self.scale, self.residual_ms = intercept_ms, scale, residual_ms
        self.device_info = device_info
        self.input_specs = tuple((tuple(shape), dtype) for shape, dtype in input_specs)
        self._tensors: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        for label, options in space.choices.items():
            times = self.costs[label]
            if len(times) != len(options):
                raise ValueError(f"costs[{label!r}] has {len(times)} times for options {options}")
            if not all(np.isfinite(t) and t >= 0 for t in times):
                raise ValueError(f"costs[{label!r}] = {times} must be finite and not negative")
        if not (np.isfinite(intercept_ms) and np.isfinite(scale) and scale > 0):
            raise ValueError(f"need finite intercept_ms={intercept_ms} and scale={scale} > 0")

    def __repr__(self) -> str:
        where = "given numbers" if self.device_info is None else self.device_info.name
        return f"LatencyTable({len(self.costs)} decisions, {where}, +-{self.residual_ms:.3g} ms)"

    @classmethod
    def build(
        cls,
        model: nn.Module,
        example_inputs: object,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        threads: int | None = None,
        calibration: int = 8,
        min_time_s: float = 0.1,
        seed: int = 0,
    ) -> "LatencyTable":
        """Measure a table for this model on this machine.

        Every choice runs once on ``example_inputs`` to see what reaches it; then each distinct
        pair of option and input shape is timed alone, in rounds over all pairs so that a slow
        moment of the machine falls on all alike. Finally whole derived models are timed: the
        slowest, the fastest and random ones, to fit the intercept and the scale.

        Args:
            model: A model with choices; not changed.
            example_inputs: One input tensor or a tuple of them, with the batch size and
                resolution that count.
            device: Where to measure; by default where the inputs are.
            dtype: Measure in this floating-point type; by default in that of the model.
            threads: CPU threads; by default as many as torch uses now.
            calibration: Whole models to time, at least 2.
            min_time_s: Seconds to time each option and each whole model for.
            seed: Seed of the random architectures.

        Raises:
            TypeError: An input is not a tensor.
            ValueError: As :func:`space`, or an option changes its input in place.
        """
        if calibration < 2:
            raise ValueError(f"calibration={calibration}: a line needs at least 2 models")
        inputs, place = place_inputs(example_inputs, device)
        tensors = _as_tensors(inputs, dtype)
        model = _moved(model, place, dtype)
        its_space = space(model)
        with torch_threads(threads), evaluating(model), torch.inference_mode():
            costs = _time_options(model, tensors, place, min_time_s)
            archs = _spread(its_space, costs, calibration, seed)
            models = [derive(model, arch).eval() for arch in archs]
            calls = [((tensors, {}), plain) for plain in models]
            times = _time_interleaved(calls, place, min_time_s)
            info = DeviceInfo.of(place)
        sums = np.array([_total(its_space, costs, arch) for arch in archs])
        intercept, scale = _fit_line(sums, np.array(times))
        residuals = np.array(times) - (intercept + scale * sums)
        residual = float(np.sqrt(np.mean(residuals**2)))
        if residual > 0.15 * float(np.mean(times)):
            _logger.warning(
                "latency table is rough: whole models are %.3g ms off the prediction on average; "
                "build it on an idle machine, or with threads=1 on a shared one",
                residual,
            )
        specs = [(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in tensors]
        return cls(
            its_space,
            costs,
            intercept_ms=intercept,
            scale=scale,
            residual_ms=residual,
            device_info=info,
            input_specs=specs,
        )

    def predict(self, arch: Mapping[str, str]) -> float:
        """Return the predicted latency of an architecture in milliseconds.

        Args:
            arch: An :class:`Architecture` of the table's space, or option names by label.

        Raises:
            ValueError: As :meth:`Space.check`.
        """
        if isinstance(arch, Architecture):
            self.space.check(arch)
        else:
            arch = self.space.architecture(arch)
        return self.intercept_ms + self.scale * _total(self.space, self.costs, arch)

    def expected(self, probabilities: Mapping[str, Tensor]) -> Tensor:
        """Return the expected latency in milliseconds, differentiable in the probabilities.

        The expectation over architectures of the space whose decisions are drawn independently.
        At nodes with ``keep`` each edge stays with probability ``keep / edges``, and the
        probabilities of its operations are taken relative to their sum without ``"none"``.

        Args:
            probabilities: ``(options,)`` by label, as :meth:`DARTS.probabilities` gives them.
        """
        keep = {
            label: group.keep / len(group.labels)
            for group in self.space.groups
            for label in group.labels
        }
        first = next(iter(probabilities.values()))
        costs = self._on(first.device, first.dtype)
        terms: list[Tensor] = []
        for label in self.space.labels:
            p, c = probabilities[label], costs[label]
            if label in keep:
                terms.append(keep[label] * torch.dot(p[:-1], c[:-1]) / p[:-1].sum())
            else:
                terms.append(torch.dot(p, c))
        return self.intercept_ms + self.scale * torch.stack(terms).sum()

    def example_inputs(self, device: torch.device | str) -> tuple[Tensor, ...]:
        """Make inputs of the shapes and dtypes the table was measured with."""
        made: list[Tensor] = []
        for shape, name in self.input_specs:
            dtype = cast("torch.dtype", getattr(torch, name))
            generator = torch.Generator().manual_seed(0)
            values = torch.rand(shape, generator=generator) if dtype.is_floating_point else None
            zeros = torch.zeros(shape, dtype=dtype)
            made.append((zeros if values is None else values.to(dtype)).to(device))
        return tuple(made)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON."""
        info = None if self.device_info is None else asdict(self.device_info)
        content = {
            "space_id": self.space.space_id,
            "space": self.space.describe(),
            "device_info": info,
            "inputs": [[list(shape), dtype] for shape, dtype in self.input_specs],
            "costs_ms": {label: list(times) for label, times in self.costs.items()},
            "intercept_ms": self.intercept_ms,
            "scale": self.scale,
            "residual_ms": self.residual_ms,
        }
        write_atomically(path, dump_document(_KIND, _VERSION, content).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LatencyTable":
        """Read a table written by :meth:`save`.

        Raises:
            ValueError: Another format or version, or a damaged file.
        """
        text = Path(path).read_text(encoding="utf-8")
        content = cast("dict[str, Any]", parse_document(text, _KIND, _VERSION))
        info = content["device_info"]
        return cls(
            Space.from_description(content["space"]),
            content["costs_ms"],
            intercept_ms=content["intercept_ms"],
            scale=content["scale"],
            residual_ms=content["residual_ms"],
            device_info=None if info is None else DeviceInfo(**info),
            input_specs=[(tuple(shape), dtype) for shape, dtype in content["inputs"]],
        )

    def check(self, space: Space) -> None:
        """Raise unless the table fits a space and, if it was measured, this machine.

        :class:`Search` calls it under the table's number of threads, for it times with that.

        Raises:
            ValueError: Another space or device than the table's or, for a table of a CPU, another
                number of threads than torch uses now.
        """
        if space.space_id != self.space.space_id:
            raise ValueError(
                f"the latency table belongs to space {self.space.space_id}, the model has space "
                f"{space.space_id}; build a table for this model"
            )
        if self.device_info is None:
            return
        if self.device_info.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"the latency table was measured on {self.device_info.name!r} and this machine "
                "has no CUDA device; build one here"
            )
        name = DeviceInfo.of(self.device_info.device).name
        if name != self.device_info.name:
            raise ValueError(
                f"the latency table was measured on {self.device_info.name!r}, this is {name!r}; "
                "build one here"
            )
        threads = torch.get_num_threads()
        if self.device_info.device == "cpu" and self.device_info.threads != threads:
            raise ValueError(
                f"the latency table was measured with {self.device_info.threads} threads, torch "
                f"uses {threads} now; call torch.set_num_threads({self.device_info.threads}), or "
                f"build one with threads={threads}"
            )
        if self.device_info.torch != str(torch.__version__):
            warnings.warn(
                f"the latency table was measured with torch {self.device_info.torch}, this is "
                f"{torch.__version__}; build it again if the predictions are off",
                stacklevel=3,
            )

    def _on(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        key = (device, dtype)
        if key not in self._tensors:
            self._tensors[key] = {
                label: torch.tensor(times, device=device, dtype=dtype)
                for label, times in self.costs.items()
            }
        return self._tensors[key]


def _as_tensors(inputs: tuple[object, ...], dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    tensors: list[Tensor] = []
    for value in inputs:
        if not isinstance(value, Tensor):
            raise TypeError(f"a latency table needs tensor inputs, got {type(value).__name__}")
        cast_it = dtype is not None and value.is_floating_point()
        tensors.append(value.to(dtype) if cast_it else value)
    return tuple(tensors)


def _moved(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    there = all(p.device.type == device.type for p in model.parameters())
    if there and dtype is None:
        return model
    return copy.deepcopy(model).to(device=device, dtype=dtype)


def _time_options(
    model: nn.Module, inputs: tuple[Tensor, ...], device: torch.device, min_time_s: float
) -> dict[str, tuple[float, ...]]:
    found = find_choices(model)
    captured = capture_inputs(model, found, inputs)
    jobs: dict[str, tuple[Call, nn.Module]] = {}
    uses: dict[tuple[str, str], list[str]] = {}
    for label, choices in found.items():
        for choice in choices:
            for call in captured[id(choice)]:
                for option, op in choice.ops.items():
                    key = signature_of(op, call)
                    jobs.setdefault(key, (call, op))
                    uses.setdefault((label, option), []).append(key)
    times = dict(zip(jobs, _time_interleaved([*jobs.values()], device, min_time_s), strict=True))
    return {
        label: tuple(
            0.0 if option == NONE and (label, option) not in uses
            else sum(times[key] for key in uses[label, option])
            for option in choices[0].options
        )
        for label, choices in found.items()
    }  # fmt: skip


def _time_interleaved(
    jobs: Sequence[tuple[Call, nn.Module]], device: torch.device, min_time_s: float
) -> list[float]:
    """Return the median time of each job in milliseconds.

    One call of each in turn: a slow moment of the machine falls on all alike, and no job finds
    the caches as its own last call left them, which it would not inside a model either.
    """
    calls = [lambda m=module, a=args, k=kwargs: m(*a, **k) for (args, kwargs), module in jobs]
    seconds = time_calls(calls, device, warmup=3, min_time_s=min_time_s * len(jobs))
    return [1e3 * float(np.median(runs)) for runs in seconds]


def _spread(
    its_space: Space, costs: Mapping[str, tuple[float, ...]], count: int, seed: int
) -> list[Architecture]:
    generator = torch.Generator().manual_seed(seed)
    archs = [maximise(its_space, costs), minimise(its_space, costs)]
    return archs + [its_space.sample(generator) for _ in range(count - 2)]


def _total(
    its_space: Space, costs: Mapping[str, tuple[float, ...]], arch: Mapping[str, str]
) -> float:
    return sum(
        costs[label][options.index(arch[label])] for label, options in its_space.choices.items()
    )


def _fit_line(sums: np.ndarray, times: np.ndarray) -> tuple[float, float]:
    centred = sums - sums.mean()
    spread = float(centred @ centred)
    scale = float(centred @ times) / spread if spread > 0 else 1.0
    if scale <= 0:
        warnings.warn(
            "whole models did not get slower with the sum of their options: the machine was too "
            "busy, or the options cost next to nothing; predictions use the plain sum",
            stacklevel=3,
        )
        scale = 1.0
    return float(times.mean() - scale * sums.mean()), scale
