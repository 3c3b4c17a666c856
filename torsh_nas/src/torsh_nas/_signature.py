"""Tell whether two modules would take the same time on two inputs."""

from collections.abc import Mapping, Sequence

from torch import Tensor, fx, jit, nn

from torsh_nas._activation import Call

_TORCHS_OWN = frozenset(vars(nn.Module()))


def signature_of(module: nn.Module, call: Call) -> str:
    """Return a text that is equal for modules of equal structure called with equal shapes.

    Covers class, attributes (private ones too), shapes and dtypes of parameters and buffers, and
    children. Anything it does not know makes the signature unique, so that it is measured for
    itself; so does a module whose code is not that of its class.
    """
    args, kwargs = call
    return f"{_of_module(module)} <- {_of_value(args)} {_of_value(kwargs)}"


def _of_module(module: nn.Module) -> str:
    kind = type(module)
    if isinstance(module, fx.GraphModule | jit.ScriptModule):
        return f"{kind.__qualname__}@{id(module)}"
    plain = sorted(
        f"{name}={_of_value(value)}"
        for name, value in vars(module).items()
        if name not in _TORCHS_OWN
    )
    tensors = [
        f"{name}:{_of_value(tensor.detach())}"
        for named in (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for name, tensor in named
    ]
    children = [f"{name}:{_of_module(child)}" for name, child in module.named_children()]
    return f"{kind.__module__}.{kind.__qualname__}({plain}, {tensors}, {children})"


def _of_value(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}{value.stride()}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, Sequence):
        return f"[{', '.join(_of_value(part) for part in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{k!r}: {_of_value(v)}' for k, v in value.items())}}}"
    return f"{type(value).__qualname__}@{id(value)}"
