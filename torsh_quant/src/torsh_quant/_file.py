"""Quantized models in one safetensors file, read as if anyone had written it."""

import copy
import json
import os
from collections import OrderedDict
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from torsh_quant._foreign import what_it_is
from torsh_quant._journal import digest_of
from torsh_quant._layer import QuantizedLayer
from torsh_quant._layers import quantizable_layers, quantized_layers, replace_modules
from torsh_quant._quantize import leave_fused_paths
from torsh_quant._state_layout import layer_of, record_of, require_same

FORMAT = "torsh-quant"
VERSION = 1
FILE_NAME = "quantized.safetensors"  # in a folder that has more than the model

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class Layout:
    """What a file says of its model besides the tensors.

    Args:
        layers: The record of each quantized layer by name; see ``_state_layout``.
        identities: Names of ``nn.Identity`` modules, some of which were batch normalisations.
        tied: Names whose tensor is another's, by name.
        buffers: Names of buffers that are not part of ``state_dict()``.
        versions: Of the state of modules where it is not 1.
    """

    layers: dict[str, Any]
    identities: tuple[str, ...]
    tied: dict[str, str]
    buffers: tuple[str, ...]
    versions: dict[str, int]


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a quantized model to one safetensors file.

    The file holds every parameter and buffer, tied ones once; in its header, as JSON, what each
    quantized layer is; and a checksum of all of it. It appears whole or not at all.

    Args:
        model: A model from :func:`quantize`, on any device.
        path: The file. By custom its name ends in ``.safetensors``.

    Raises:
        ValueError: If no layer is quantized, or something in the model cannot be in such a file.

    Example:
        >>> import tempfile
        >>> from torsh_quant import quantize
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
        >>> small = quantize(net, "w8a8")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(small, f"{folder}/net.safetensors")
        ...     again = load(f"{folder}/net.safetensors", net)
        >>> x = torch.randn(3, 4)
        >>> torch.equal(again(x), small(x))
        True
    """
    if next(quantized_layers(model), None) is None:
        raise ValueError(
            f"{type(model).__name__} has no quantized layer; call quantize first, or save float "
            "models with torch.save or safetensors"
        )
    tensors, layout = _taken_apart(model)
    document = {"version": VERSION, **_versions(), **asdict(layout)}
    document["digest"] = digest_of([("header", _text(document)), *sorted(tensors.items())])
    metadata = {FORMAT: _text(document)}
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata)
        _on_disk(temporary)
        temporary.replace(path)
    except SafetensorError as error:
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {str(path.parent)!r}") from None
        raise OSError(f"{str(path)!r} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    _on_disk(path.parent)


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Read a quantized model.

    Layers that are quantized in the file, and batch normalisations that were folded, are replaced;
    every other parameter and buffer comes from the file too, with the dtype it has there, and
    tensors tied there are tied. Nothing in the file is run or unpickled, and nothing is allocated
    before its header is checked.

    Args:
        path: A file that :func:`save` wrote, or a folder with one named ``quantized.safetensors``.
        model: The float model, for its architecture: its weights are not looked at, and may be on
            the meta device. None for a single layer, and for a folder with the ``config.json`` of
            a model of Hugging Face's transformers.
        device: Where the model goes; None for where ``model`` is, the CPU if that is nowhere.
        inplace: Change ``model`` instead of making another. It stays as it was on errors.

    Returns:
        The model in evaluation mode, with the very integers that were saved.

    Raises:
        ValueError: If the file is damaged, of another kind, of a newer version, or does not fit
            ``model``; it says what and where.
        FileNotFoundError: If there is no file.

    Example:
        See :func:`save`.
    """
    place = Path(path)
    if place.is_dir():
        folder, place = place, place / FILE_NAME
        if model is None and (folder / "config.json").exists():
            from torsh_quant._hf import empty_model

            model = empty_model(folder)
    if not place.is_file():
        raise FileNotFoundError(f"there is no file {str(place)!r}")
    with torch.inference_mode(False), torch.no_grad(), _opened(place) as file:
        layout, text, digest = _layout(place, file)
        made = _made(place, layout)
        if model is None:
            if list(made) != [""]:
                raise ValueError(
                    f"{str(place)!r} holds a model of {len(made)} quantized layers; pass the float "
                    "model it was made of, with any weights: load(path, model)"
                )
            work: nn.Module = made[""]
        else:
            work = _placed(_emptied(model), made, layout)
        _require_fit(place, work, layout, file)
        target = torch.device(device) if device is not None else _device_of(model)
        tensors = _tensors(place, file, text, digest, target)
        _filled(work, layout, tensors)
    _restore_the_rest(work, model, target)
    leave_fused_paths(work)
    work.eval()
    if inplace and model is not None and type(work) is type(model):
        model.__dict__.update(work.__dict__)
        return model
    return work


def saved_layers(path: str | os.PathLike[str]) -> dict[str, QuantizedLayer]:
    """Return the quantized layers that a file names, on the meta device.

    Raises:
        ValueError: As :func:`load` does.
    """
    with _opened(Path(path)) as file:
        return _made(Path(path), _layout(Path(path), file)[0])


def _versions() -> dict[str, str]:
    from torsh_quant import __version__

    return {"torsh_quant": __version__, "torch": str(torch.__version__)}


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"))


def _on_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _taken_apart(model: nn.Module) -> tuple[dict[str, Tensor], Layout]:
    """Return the tensors to write, each once, and what else there is to say."""
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    buffers = [name for name, _ in model.named_buffers(remove_duplicate=False)]
    state |= {name: model.get_buffer(name) for name in buffers if name not in state}
    hidden = tuple(name for name in buffers if name not in model.state_dict())
    first: dict[Any, str] = {}
    tied: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name!r} is a {type(value).__name__}, not a tensor; a file of tensors cannot "
                "hold it"
            )
        if value.is_meta:
            raise ValueError(f"{name!r} is on the meta device; load the weights before save")
        if value.layout != torch.strided or value.dtype not in _DTYPES.values():
            raise ValueError(f"{name!r} is {value.dtype}, {value.layout}: a file cannot hold it")
        key = (value.data_ptr(), value.dtype, value.shape, value.stride())
        owner = first.setdefault(key if value.numel() else id(value), name)
        if owner != name:
            tied[name] = owner
            continue
        held = value.detach().cpu().contiguous()
        if held.untyped_storage().data_ptr() in storages:
            held = held.clone()  # part of another one; safetensors wants each by itself
        storages.add(held.untyped_storage().data_ptr())
        tensors[name] = held
    versions = {
        name: module._version for name, module in model.named_modules() if module._version != 1
    }
    identities = tuple(name for name, one in model.named_modules() if type(one) is nn.Identity)
    layers = {name: record_of(name, layer) for name, layer in quantized_layers(model)}
    return tensors, Layout(layers, identities, tied, hidden, versions)


@contextmanager
def _opened(path: Path) -> Generator[Any]:
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, ValueError, OverflowError, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        kind = what_it_is(path)
        reason = f"it is {kind}" if kind else f"it is damaged or no safetensors file ({error})"
        raise ValueError(f"{str(path)!r} holds no quantized model: {reason}") from None
    with file:
        yield file


def _layout(path: Path, file: Any) -> tuple[Layout, str, object]:
    """Return what the header says, all of that as text, and the checksum."""
    metadata = file.metadata() or {}
    if FORMAT not in metadata:
        kind = what_it_is(path) or "of another kind"
        raise ValueError(f"{str(path)!r} holds no quantized model: it is {kind}")
    damaged = f"the header of {str(path)!r} is damaged"
    try:
        found = json.loads(metadata[FORMAT])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{damaged}: {error}") from None
    if not isinstance(found, dict) or type(found.get("version")) is not int:
        raise ValueError(f"{damaged}: it has no version")
    own = _versions()
    if found["version"] != VERSION:
        raise ValueError(
            f"{str(path)!r} has version {found['version']!r:.80} of its format, written by "
            f"torsh_quant {found.get('torsh_quant')!s:.80}; torsh_quant {own['torsh_quant']} reads "
            f"version {VERSION}: upgrade torsh-quant"
        )
    digest, fields = found.pop("digest", None), set(Layout.__dataclass_fields__)
    if set(metadata) != {FORMAT} or set(found) != {"version", *own, *fields}:
        raise ValueError(f"{damaged}: its keys are not those of version {VERSION}")
    text = _text(found)
    lists = [found["identities"], found["buffers"]]
    tables = [found["layers"], found["tied"], found["versions"]]
    kinds = (dict, str, int)
    if not (
        all(isinstance(one, list) and all(type(item) is str for item in one) for one in lists)
        and all(isinstance(one, dict) for one in tables)
        and all(
            type(item) is kind
            for one, kind in zip(tables, kinds, strict=True)
            for item in one.values()
        )
    ):
        raise ValueError(f"{damaged}: a value is of the wrong type")
    held = {name: found[name] for name in fields}
    held |= {name: tuple(held[name]) for name in ("identities", "buffers")}
    return Layout(**held), text, digest


def _made(path: Path, layout: Layout) -> dict[str, QuantizedLayer]:
    try:
        return {name: layer_of(name, record) for name, record in layout.layers.items()}
    except ValueError as error:
        raise ValueError(f"the header of {str(path)!r} is damaged: {error}") from None


def _emptied(model: nn.Module) -> nn.Module:
    """Return a copy without the values: all its parameters and buffers on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        memo[id(parameter)] = empty
    memo |= {id(buffer): buffer.detach().to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def _placed(work: nn.Module, made: Mapping[str, QuantizedLayer], layout: Layout) -> nn.Module:
    """Put the quantized layers and identities of a file into an empty model."""
    modules = dict(work.named_modules())
    new: dict[nn.Module, nn.Module] = {}
    for name, layer in made.items():
        if name not in modules:
            raise ValueError(f"the model has no layer {name!r}, which is quantized in the file")
        require_same(name, layer, modules[name])
        new[modules[name]] = layer
    for name in layout.identities:
        there = modules.get(name)
        if type(there) in _NORMS:
            new[cast("nn.Module", there)] = nn.Identity()
        elif type(there) is not nn.Identity:
            raise ValueError(
                f"{name!r} is an Identity in the file, but {type(there).__name__} in the model"
            )
    return replace_modules(work, new)


def _require_fit(path: Path, work: nn.Module, layout: Layout, file: Any) -> None:
    """Compare names, shapes and dtypes of the file's tensors with the model's, reading none."""
    header = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    for name, owner in layout.tied.items():
        if owner not in header or name in header:
            raise ValueError(f"{name!r} is tied to {owner!r}, which {str(path)!r} does not have")
    found = {**{name: name for name in header}, **layout.tied}
    _add_biases(work, found, header)
    buffers = dict(work.named_buffers(remove_duplicate=False))
    wanted = work.state_dict(keep_vars=True)
    hidden = {name: buffers[name] for name in layout.buffers if name in buffers}
    hidden = {name: buffer for name, buffer in hidden.items() if name not in wanted}
    for what, names in (
        ("does not have", set(wanted) - set(found)),
        ("has, but the model has not,", set(found) - set(wanted) - set(layout.buffers)),
        ("has no values of the buffers", set(layout.buffers) - set(found)),
    ):
        if names:
            listed = ", ".join(map(repr, sorted(names)[:6])) + ", ..." * (len(names) > 6)
            raise ValueError(f"{str(path)!r} {what} {listed}; pass the model that was quantized")
    exact = {
        id(buffer)
        for _, layer in quantized_layers(work)
        for buffer in layer._buffers.values()
        if buffer is not None
    }
    for name, there in wanted.items():
        shape, dtype = tuple(header[found[name]].get_shape()), header[found[name]].get_dtype()
        same = dtype in _DTYPES and _same_kind(_DTYPES[dtype], there.dtype)
        if id(there) in exact:
            same = _DTYPES.get(dtype) == there.dtype
        if shape != tuple(there.shape) or not same:
            raise ValueError(
                f"{name!r} is {dtype} {shape} in {str(path)!r}, but "
                f"{str(there.dtype).removeprefix('torch.')} {tuple(there.shape)} in the model"
            )


def _same_kind(one: torch.dtype, other: torch.dtype) -> bool:
    kind = other.is_floating_point, other.is_complex, other == torch.bool
    return (one.is_floating_point, one.is_complex, one == torch.bool) == kind


def _add_biases(work: nn.Module, found: Mapping[str, str], header: Mapping[str, Any]) -> None:
    # A batch normalisation folded into a layer that stayed float has left it a bias.
    for name, layer in quantizable_layers(work):
        key = f"{name}.bias" if name else "bias"
        rows = layer.weight.shape[0]
        fits = key in found and header[found[key]].get_shape() == [rows]
        if layer.bias is None and fits:
            layer.bias = nn.Parameter(torch.empty(rows, device="meta"))


def _device_of(model: nn.Module | None) -> torch.device:
    if model is not None:
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_meta:
                return tensor.device
    return torch.device("cpu")


def _tensors(
    path: Path, file: Any, text: str, digest: object, device: torch.device
) -> dict[str, Tensor]:
    """Read all tensors to a device, and check them and the header against the checksum."""
    tensors: dict[str, Tensor] = {}

    def items() -> Generator[tuple[str, Any]]:
        yield "header", text
        for name in sorted(file.keys()):
            held = file.get_tensor(name).clone()  # not a view of a file that may change
            yield name, held
            tensors[name] = held.to(device)

    if digest_of(items()) != digest:
        raise ValueError(
            f"{str(path)!r} is damaged: its checksum does not fit; copy or write it anew"
        )
    return tensors


def _filled(work: nn.Module, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
    own = dict(work.named_parameters(remove_duplicate=False))
    parameters: dict[str, nn.Parameter] = {}
    state: OrderedDict[str, Tensor] = OrderedDict()
    for name in work.state_dict():
        key = layout.tied.get(name, name)
        state[name] = tensors[key]
        if name in own:  # one object for all that are tied
            floats = tensors[key].is_floating_point() or tensors[key].is_complex()
            made = parameters.setdefault(
                key, nn.Parameter(tensors[key], own[name].requires_grad and floats)
            )
            state[name] = made
    versions = {name: {"version": layout.versions.get(name, 1)} for name, _ in work.named_modules()}
    cast("Any", state)._metadata = OrderedDict(versions)
    try:
        work.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the file does not fit the model: {error}") from None
    there = dict(work.named_buffers(remove_duplicate=False))
    for name in layout.buffers:
        tensor = tensors[layout.tied.get(name, name)]
        if name in there and there[name].shape == tensor.shape:
            parent, _, last = name.rpartition(".")
            setattr(work.get_submodule(parent), last, tensor)


def _restore_the_rest(work: nn.Module, model: nn.Module | None, device: torch.device) -> None:
    """Buffers that no state has come from the model; nothing else may be left empty."""
    own = {} if model is None else dict(model.named_buffers(remove_duplicate=False))
    for name, buffer in list(work.named_buffers(remove_duplicate=False)):
        if buffer.is_meta and name in own and not own[name].is_meta:
            parent, _, last = name.rpartition(".")
            setattr(work.get_submodule(parent), last, own[name].detach().clone().to(device))
    for name, tensor in (*work.named_parameters(), *work.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"{name!r} is not in the file, and the model has no values for it: it is on the "
                "meta device; build the model on the CPU"
            )
