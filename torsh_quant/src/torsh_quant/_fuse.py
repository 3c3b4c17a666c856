"""Static layers joined, so that bytes and not floats go from one to the next."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from torsh_quant import _ops as _ops  # registers the operators used below
from torsh_quant._layers import quantized_layers

_aten = torch.ops.aten
_own = torch.ops.torsh_quant
_MOVES = (
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.reshape.default,
    _aten.flatten.using_ints,
    _aten.permute.default,
    _aten.transpose.int,
    _aten.clone.default,
    _aten.cat.default,
)


def fuse(model: nn.Module, batch: Any, *, dynamic_shapes: Any = None) -> fx.GraphModule:
    """Join the static layers of a model, so that bytes go from one to the next.

    A layer of a ``-static`` scheme alone takes floats, rounds them to bytes, and gives floats
    again. Here the model is turned into a graph (:func:`torch.export.export`) in which a layer
    whose output goes into static layers rounds its sums right to their bytes, with the bias, a
    skip connection and ReLU, ReLU6 or Hardtanh between them. What comes between static and other
    layers stays float.

    A skip connection then carries the bytes that the next layer reads, where it carried floats;
    all else differs only by single roundings.

    Args:
        model: From :func:`quantize` with a static scheme.
        batch: Example input: a tensor, a tuple or list whose first item is the input, or a
            dictionary of keyword arguments. Its values do not matter.
        dynamic_shapes: As :func:`torch.export.export` takes them. None leaves all sizes of all
            tensors free that the model leaves free; a batch of one is doubled for that.

    Returns:
        A graph module with the same arguments and results. It shares the buffers of ``model``.

    Raises:
        RuntimeError: If no layer is static, or torch cannot export the model.

    Example:
        >>> from torsh_quant import quantize
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> batch = torch.randn(4, 8)
        >>> joined = fuse(quantize(net, "w8a8-static", data=[batch]), batch)
        >>> [node.name for node in joined.graph.nodes if node.op == "call_function"]
        ['to_bytes_default', 'byte_linear_default', 'byte_linear_default_1']

    Reference:
        B. Jacob et al., Quantization and training of neural networks for efficient
        integer-arithmetic-only inference, 2018, arXiv:1712.05877, section 2.4.
    """
    static = [name for name, layer in quantized_layers(model) if layer.scheme.is_static]
    if not static:
        raise RuntimeError(
            f"{type(model).__name__} has no static layer to join; quantize it with data= and "
            "'w8a8-static' first"
        )
    args, kwargs = _arguments(batch)
    if dynamic_shapes is None:
        args, kwargs = _doubled(args), _doubled(kwargs)
        dynamic_shapes = _free(args) if args else _free(kwargs)
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
        graph_module = program.run_decompositions({}).module()
    _Fusion(cast("fx.GraphModule", graph_module)).run()
    return cast("fx.GraphModule", graph_module)


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), {name: value for name, value in batch.items() if name != "labels"}
    return (batch[0] if isinstance(batch, (tuple, list)) else batch,), {}


def _doubled(value: Any) -> Any:
    """A batch of two where it is of one: torch takes a size of 1 for one that never changes."""
    if isinstance(value, Tensor):
        return torch.cat([value, value]) if value.ndim and value.shape[0] == 1 else value
    if isinstance(value, Mapping):
        return {name: _doubled(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_doubled(item) for item in value)
    return value


def _free(value: Any) -> Any:
    """Sizes that torch is to leave free where it can."""
    if isinstance(value, Tensor):
        auto, fixed = torch.export.Dim.AUTO, torch.export.Dim.STATIC
        sizes = enumerate(value.shape)
        return {dim: (auto if size > 1 else fixed) for dim, size in sizes}
    if isinstance(value, Mapping):
        return {name: _free(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_free(item) for item in value)
    return None


@dataclass(frozen=True)
class _Grid:
    """Scale, zero point and bits of the integers a layer reads, and where its buffers are."""

    scale: float
    zero_point: float
    bits: int
    scale_name: str = field(compare=False)
    zero_point_name: str = field(compare=False)


@dataclass
class _Joined:
    """A layer with what is computed where its sums come out; ``end`` is the last node of it."""

    call: fx.Node
    end: fx.Node
    add: fx.Node | None = None
    low: float | None = None
    high: float | None = None


class _Fusion:
    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.graph = module.graph
        self.order = {node: place for place, node in enumerate(self.graph.nodes)}
        self.grids: dict[fx.Node, _Grid] = {}
        self.joined: dict[fx.Node, _Joined] = {}  # by their ends
        self.inside: dict[fx.Node, _Joined] = {}  # by all their nodes
        self.bytes: dict[fx.Node, _Grid] = {}
        self.rounded: dict[tuple[fx.Node, _Grid], fx.Node] = {}

    def run(self) -> None:
        nodes = list(self.graph.nodes)
        for node in nodes:
            if (grid := self._static_grid(node)) is not None:
                self.grids[node] = grid
        for node in self.grids:
            self._join(node)
        wanted = {}
        for node in reversed(nodes):
            wanted[node] = self._wanted(node, wanted)
        for node in nodes:
            grid = wanted[node]
            if node in self.joined:
                self._emit_layer(self.joined[node], grid)
            elif grid is not None and _moves(node):
                self._emit_move(node, grid)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        self.module.recompile()

    def _static_grid(self, node: fx.Node) -> _Grid | None:
        if node.target not in (_own.convolution.default, _own.linear.default):
            return None
        bits, scale, zero_point = node.args[5:8]
        if not isinstance(scale, fx.Node) or not isinstance(zero_point, fx.Node):
            return None
        if scale.op != "get_attr" or node.meta["val"].dtype != torch.float32:
            return None
        step, offset = (float(self._tensor(one).item()) for one in (scale, zero_point))
        return _Grid(step, offset, cast("int", bits), str(scale.target), str(zero_point.target))

    def _tensor(self, node: fx.Node) -> Tensor:
        value: Any = self.module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value

    def _join(self, call: fx.Node) -> None:
        made = _Joined(call, call)
        self.inside[call] = made
        while len(made.end.users) == 1:
            user = next(iter(made.end.users))
            bounds = _bounds(user)
            if bounds is not None:
                made.low, made.high = bounds
            elif made.add is None and self._can_add(made, user):
                made.add = user
            else:
                break
            made.end = user
            self.inside[user] = made
            if bounds is not None:
                break
        self.joined[made.end] = made

    def _can_add(self, made: _Joined, user: fx.Node) -> bool:
        if user.target is not _aten.add.Tensor or user.kwargs.get("alpha", 1) != 1:
            return False
        if made.call.target is not _own.convolution.default:
            return False
        other = _other(user, made.end)
        if not isinstance(other, fx.Node) or self.order[other] > self.order[made.call]:
            return False
        sum_of, left = other.meta.get("val"), made.end.meta["val"]
        if not isinstance(sum_of, Tensor) or sum_of.dtype != left.dtype:
            return False
        return str(sum_of.shape) == str(left.shape)  # as text, since sizes may be free

    def _wanted(self, node: fx.Node, wanted: Mapping[fx.Node, _Grid | None]) -> _Grid | None:
        """The one grid in which all users of a value can take bytes."""
        found: set[_Grid | None] = set()
        for user in node.users:
            made = self.inside.get(user)
            if user in self.grids and user.args[0] is node:
                found.add(self.grids[user])
            elif made is not None and user is made.add and made.call.args[0] is not user:
                continue  # takes floats and bytes of any grid
            elif _moves(user):
                found.add(wanted[user])
            else:
                return None
        return found.pop() if len(found) == 1 else None

    def _as_bytes(self, node: fx.Node, grid: _Grid) -> fx.Node:
        if self.bytes.get(node) == grid:
            return node
        if (node, grid) not in self.rounded:
            with self.graph.inserting_after(node):
                scale = self.graph.get_attr(grid.scale_name)
            with self.graph.inserting_after(scale):
                zero_point = self.graph.get_attr(grid.zero_point_name)
            with self.graph.inserting_after(zero_point):
                args = (node, scale, zero_point, grid.bits)
                self.rounded[node, grid] = self.graph.call_function(_own.to_bytes.default, args)
        return self.rounded[node, grid]

    def _buffers(self, grid: _Grid | None) -> tuple[int, fx.Node | None, fx.Node | None]:
        if grid is None:
            return 0, None, None
        scale = self.graph.get_attr(grid.scale_name)
        return grid.bits, scale, self.graph.get_attr(grid.zero_point_name)

    def _emit_layer(self, made: _Joined, target: _Grid | None) -> None:
        x, weight, scale, _, bias, *act = made.call.args[:8]
        source = self._as_bytes(cast("fx.Node", x), self.grids[made.call])
        inputs = (source, weight, scale, bias, *act)
        with self.graph.inserting_before(made.end):
            ends = (made.low, made.high, *self._buffers(target))
            if made.call.target is _own.linear.default:
                new = self.graph.call_function(_own.byte_linear.default, (*inputs, *ends))
            else:
                other = None if made.add is None else self._other_of(made)
                grid = None if other is None else self.bytes.get(other)
                added = (other, *self._buffers(grid))
                args = (*inputs, *made.call.args[8:13], *added, *ends)
                new = self.graph.call_function(_own.byte_convolution.default, args)
        self._replace(made.end, new, target)

    def _other_of(self, made: _Joined) -> fx.Node:
        assert made.add is not None
        own = {node for node, one in self.inside.items() if one is made}
        return next(node for node in made.add.all_input_nodes if node not in own)

    def _emit_move(self, node: fx.Node, grid: _Grid) -> None:
        first, rest = node.args[0], node.args[1:]
        if isinstance(first, (list, tuple)):
            first = [self._as_bytes(cast("fx.Node", one), grid) for one in first]
        else:
            first = self._as_bytes(cast("fx.Node", first), grid)
        target = cast("Callable[..., Any]", node.target)
        if target is _aten.max_pool2d.default:
            target, rest = _own.max_pool.default, _window(node)[:3]
        elif target is _aten.view.default:
            target = _aten.reshape.default  # images are channels last now
        with self.graph.inserting_before(node):
            new = self.graph.call_function(target, (first, *rest), dict(node.kwargs))
        self._replace(node, new, grid)

    def _replace(self, node: fx.Node, new: fx.Node, grid: _Grid | None) -> None:
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        if grid is not None:
            self.bytes[new] = grid


def _other(add: fx.Node, one: fx.Node) -> Any:
    first, second = add.args[:2]
    return second if first is one else first


def _bounds(node: fx.Node) -> tuple[float | None, float | None] | None:
    if node.target is _aten.relu.default:
        return 0.0, None
    if node.target is _aten.relu6.default:
        return 0.0, 6.0
    if node.target is _aten.hardtanh.default:
        low, high = (*node.args[1:], *(-1.0, 1.0)[len(node.args) - 1 :])
        return float(cast("float", low)), float(cast("float", high))
    if node.target is _aten.clamp.default:
        bounds = [None if one is None else one for one in (*node.args[1:], None, None)[:2]]
        if all(one is None or isinstance(one, (int, float)) for one in bounds):
            low, high = cast("list[float | None]", bounds)
            return low, high
    return None


def _window(node: fx.Node) -> tuple[Any, Any, Any, Any, Any]:
    """Kernel, stride, padding, dilation and ceil mode of a pooling."""
    defaults: list[Any] = [None, [0, 0], [1, 1], False]
    kernel, *rest = cast("tuple[Any, ...]", node.args[1:])
    stride, padding, dilation, ceil = (*rest, *defaults[len(rest) :])
    return kernel, stride or kernel, padding, dilation, ceil


def _moves(node: fx.Node) -> bool:
    """Whether an operation moves or picks values and so does the same to bytes."""
    if node.target is _aten.max_pool2d.default:
        *_, dilation, ceil = _window(node)
        return list(dilation) == [1, 1] and not ceil and node.meta["val"].ndim == 4
    return node.target in _MOVES
