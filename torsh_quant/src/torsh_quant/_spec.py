"""What a quantized layer stores and computes with, as two frozen dataclasses and a short string."""

import re
from dataclasses import dataclass
from typing import Literal

Granularity = Literal["tensor", "channel", "token"]

_PRESET = re.compile(
    r"w(?P<weight>[2-8])a(?:(?P<act>[2-8])(?P<static>-static)?|16)"
    r"(-(?:g(?P<group>\d+)|(?P<unit>channel|tensor)))?(?P<asymmetric>-asym)?"
)
_ACTS = (("token", True), ("tensor", False))


@dataclass(frozen=True)
class IntSpec:
    """One integer format: how many bits, and how many numbers share a scale.

    Args:
        bits: 2 to 8.
        symmetric: The zero of the floats is the zero of the integers. Otherwise each scale comes
            with an integer zero point.
        group: What shares one scale: the whole ``"tensor"``, an output ``"channel"``, a
            ``"token"`` (one row of activations; one image for convolutions), or that many
            neighbouring weights of one output channel.
        dynamic: The scale is taken from the values at run time, not from calibration data
            (activations only).

    Raises:
        ValueError: If ``bits`` or ``group`` is out of range.

    Example:
        >>> IntSpec(bits=4, group=32)
        IntSpec(bits=4, symmetric=True, group=32, dynamic=False)
        >>> [(spec.qmin, spec.qmax) for spec in (IntSpec(8), IntSpec(8, False), IntSpec(4))]
        [(-127, 127), (-128, 127), (-8, 7)]
    """

    bits: int = 8
    symmetric: bool = True
    group: Granularity | int | None = "channel"
    dynamic: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} is not an integer format; use 2 to 8")
        if isinstance(self.group, int):
            if self.group < 1:
                raise ValueError(f"group={self.group} is not a group size; use 1 or more")
        elif self.group not in ("tensor", "channel", "token", None):
            raise ValueError(
                f"group={self.group!r} is not known; use 'tensor', 'channel', 'token' or a number"
            )

    @property
    def qmax(self) -> int:
        """Largest integer in use."""
        return 2 ** (self.bits - 1) - 1

    @property
    def qmin(self) -> int:
        """Smallest integer in use; symmetric formats above 4 bits leave the lowest one out."""
        return -self.qmax if self.symmetric and self.bits > 4 else -self.qmax - 1


@dataclass(frozen=True)
class Scheme:
    """The integer formats of one layer: its weight, and its input where that is quantized too.

    Wherever a scheme is asked for, its short name does: ``w8a8`` (8-bit weights, 8-bit
    activations, integer arithmetic), ``w4a16`` (4-bit weights, float arithmetic). The pattern is
    ``w{2-8}a{2-8|16}``, then ``-static`` for activations with one scale, found on calibration data,
    then ``-g{size}``, ``-channel`` or ``-tensor`` for what shares a weight scale, then ``-asym``
    for weights with zero points.

    Args:
        weight: Format of the weight. ``group=None`` picks per layer: one scale per output channel
            above 4 bits, groups (see :func:`default_group_size`) at 4 bits and below.
        act: Format of the input; None leaves it in floating point. Always with a zero point: per
            token and dynamic, or per tensor and static. ``bits=7`` gives the same integers on every
            machine: CPUs without VNNI have no fast exact 8-bit product (see :func:`explain`).

    Raises:
        ValueError: If the two formats cannot be multiplied as integers.

    Example:
        >>> Scheme.parse("w4a16-g32").weight
        IntSpec(bits=4, symmetric=True, group=32, dynamic=False)
        >>> Scheme.parse("w8a8").act
        IntSpec(bits=8, symmetric=False, group='token', dynamic=True)
        >>> Scheme.parse("w8a8-static").act
        IntSpec(bits=8, symmetric=False, group='tensor', dynamic=False)
        >>> str(Scheme.parse("w4a16-g32-asym"))
        'w4a16-g32-asym'
    """

    weight: IntSpec
    act: IntSpec | None = None

    def __post_init__(self) -> None:
        if self.weight.group == "token" or self.weight.dynamic:
            raise ValueError(
                f"weight={self.weight} changes with the input; use a static format with "
                "group 'channel', 'tensor' or a group size"
            )
        if self.act is None:
            return
        if (self.act.group, self.act.dynamic) not in _ACTS or self.act.symmetric:
            raise ValueError(
                f"act={self.act} is not supported; use "
                "IntSpec(bits, symmetric=False, group='token', dynamic=True), or group='tensor' "
                "with dynamic=False"
            )
        if not self.weight.symmetric:
            raise ValueError(
                "weight has zero points, which the integer kernels do not take; use a symmetric "
                "weight format, or act=None"
            )

    @classmethod
    def parse(cls, scheme: "str | Scheme") -> "Scheme":
        """Read a short name; a scheme comes back as it is.

        Raises:
            ValueError: If the name does not follow the pattern.
        """
        if isinstance(scheme, Scheme):
            return scheme
        found = _PRESET.fullmatch(scheme)
        if found is None:
            raise ValueError(
                f"scheme={scheme!r} is not known; use for example 'w8a8', 'w8a8-static', 'w8a16', "
                "'w4a16', 'w4a8' or 'w4a16-g32-asym'"
            )
        bits, unit = int(found["weight"]), found["unit"]
        group: Granularity | int | None = "channel" if bits > 4 else None
        if found["group"]:
            group = int(found["group"])
        elif unit:
            group = "tensor" if unit == "tensor" else "channel"
        weight = IntSpec(bits=bits, symmetric=not found["asymmetric"], group=group)
        if not found["act"]:
            return cls(weight)
        shared: Granularity = "tensor" if found["static"] else "token"
        act = IntSpec(int(found["act"]), symmetric=False, group=shared, dynamic=not found["static"])
        return cls(weight, act)

    @property
    def is_static(self) -> bool:
        """Whether the scale of the input comes from calibration data."""
        return self.act is not None and not self.act.dynamic

    def __str__(self) -> str:
        default = "channel" if self.weight.bits > 4 else None
        group = self.weight.group
        unit = "" if group == default else f"-g{group}" if isinstance(group, int) else f"-{group}"
        if group is None and default is not None:
            unit = "-auto"
        tail = "" if self.weight.symmetric else "-asym"
        act = f"{self.act.bits}{'-static' * self.is_static}" if self.act else "16"
        return f"w{self.weight.bits}a{act}{unit}{tail}"


def default_group_size(in_features: int) -> int:
    """Group size used at 4 bits and below when the scheme names none.

    The first of 128, 64, 32 that divides ``in_features``; otherwise its largest divisor from 16 to
    127; a row of up to 32 weights, or one that none of these divides, is one group.

    Args:
        in_features: Weights of one output channel, at least 1; of a convolution,
            ``in_channels / groups * height * width``.

    Returns:
        Weights that share a scale: a divisor of ``in_features``.

    Example:
        >>> [default_group_size(n) for n in (4096, 576, 144, 27, 131)]
        [128, 64, 72, 27, 131]
    """
    if in_features <= 32:
        return in_features
    for size in (128, 64, 32, *range(127, 15, -1)):
        if in_features % size == 0:
            return size
    return in_features


def group_size_for(spec: IntSpec, in_features: int, layer: str) -> int:
    """Return how many weights of one output channel share a scale.

    Raises:
        ValueError: If the group size of ``spec`` does not divide ``in_features``.
    """
    if spec.group is None:
        return default_group_size(in_features) if spec.bits <= 4 else in_features
    if not isinstance(spec.group, int):
        return in_features
    if in_features % spec.group:
        fitting = [size for size in (16, 32, 64, 128, 256) if in_features % size == 0]
        if len(fitting) > 3:
            fitting = fitting[1:4]
        if not fitting:
            fitting = [size for size in range(2, in_features + 1) if in_features % size == 0][-3:]
        *most, last = map(str, fitting)
        valid = f"{', '.join(most)} or {last}" if most else last
        raise ValueError(
            f"group_size={spec.group} does not divide in_features={in_features} of {layer!r}; "
            f"use {valid}"
        )
    return spec.group
