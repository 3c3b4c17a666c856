"""A place in the user's model where one of several modules will stand."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from torsh_nas._mixing import mix


class Choice(nn.Module):
    """One of several modules, to be decided by a search.

    An ordinary module: put it anywhere in your own model. Outside a search it runs its default
    option. During a search it runs a weighted sum of all options, or just one, as the strategy
    says (see :func:`single_path`). :func:`derive` puts the chosen option itself in its place.

    Choices with the same label are decided together: give the cells of a deep model one label
    and there is one decision for all of them. Their weights stay their own.

    Args:
        ops: The options by name, or a list (the names are then ``"0"``, ``"1"``, ...). At least
            two; all must give tensors of one shape, and none may change its input in place.
        label: Name of the decision; by default the place of the module in the model, such as
            ``"features.3"``.
        default: The option that runs outside a search; by default the first.

    Raises:
        ValueError: Fewer than two options, or a name that a module cannot have.
        TypeError: An option is not a module.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torsh_nas import Choice, single_path
        >>> choice = Choice({"conv": nn.Conv1d(1, 1, 1, bias=False), "skip": nn.Identity()})
        >>> _ = nn.init.constant_(choice.ops["conv"].weight, 2.0)
        >>> x = torch.ones(1, 1, 3)
        >>> choice(x).tolist()
        [[[2.0, 2.0, 2.0]]]
        >>> with single_path(choice, {"choice": "skip"}):
        ...     choice(x).tolist()
        [[[1.0, 1.0, 1.0]]]
    """

    def __init__(
        self,
        ops: Mapping[str, nn.Module] | Sequence[nn.Module],
        label: str | None = None,
        default: str | None = None,
    ) -> None:
        super().__init__()
        named = (
            dict(ops)
            if isinstance(ops, Mapping)
            else {str(position): op for position, op in enumerate(ops)}
        )
        if len(named) < 2:
            raise ValueError(
                f"a Choice needs at least two options, got {list(named)}; "
                "put a single module into the model directly"
            )
        for name, op in named.items():
            _check_option(name, op)
        if default is not None and default not in named:
            raise ValueError(f"default={default!r} is not an option; use one of {list(named)}")
        self.ops = nn.ModuleDict(named)
        self.label = label
        self.default = next(iter(named)) if default is None else default
        # Set for the length of a forward by the context managers in _activation.py.
        self._active: str | None = None
        self._weights: tuple[Tensor, ...] | None = None

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options, in order."""
        return tuple(self.ops)

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Run the active option, or the weighted sum of all under a mixed strategy."""
        if self._weights is not None:
            return mix(self._outputs(*args, **kwargs), self._weights)
        return cast("Tensor", self.ops[self._active or self.default](*args, **kwargs))

    def _outputs(self, *args: object, **kwargs: object) -> list[Tensor]:
        """Run all options and compare their shapes with that of the first."""
        outputs: list[Tensor] = []
        for name, op in self.ops.items():
            before = _versions(args)
            output = op(*args, **kwargs)
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"option {name!r} of {self._title()} returned {type(output).__name__}; "
                    "every option must return one tensor"
                )
            if before != _versions(args):
                raise ValueError(
                    f"option {name!r} of {self._title()} changes its input in place, which the "
                    "other options read too; build it with inplace=False"
                )
            if outputs and output.shape != outputs[0].shape:
                raise ValueError(
                    f"option {name!r} of {self._title()} gives shape {tuple(output.shape)}, but "
                    f"{next(iter(self.ops))!r} gives {tuple(outputs[0].shape)}; "
                    "all options of a Choice must give the same shape"
                )
            outputs.append(output)
        return outputs

    def _title(self) -> str:
        return "a Choice" if self.label is None else f"Choice {self.label!r}"

    def extra_repr(self) -> str:
        """Show the label and the default."""
        return f"label={self.label!r}, default={self.default!r}"


def _check_option(name: object, op: object) -> None:
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"{name!r} cannot name an option: use a non-empty string without dots that is not "
            "already an attribute of ModuleDict"
        )
    if not isinstance(op, nn.Module):
        raise TypeError(f"option {name!r} is {type(op).__name__}, not an nn.Module")


def _versions(args: tuple[object, ...]) -> list[int]:
    """Write counters of the tensor arguments; empty where torch keeps none."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return []
    return [a._version for a in args if isinstance(a, Tensor) and not a.is_inference()]
