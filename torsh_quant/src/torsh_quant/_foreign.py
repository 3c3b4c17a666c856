"""What a file is that holds no quantized model of ours, told from its first bytes and its names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LONGEST_HEADER = 100_000_000  # as safetensors has it
_STARTS = (
    (b"PK\x03\x04", "a zip file, such as torch.save writes"),
    (b"\x80", "a pickle, such as old releases of torch.save wrote; it is not read"),
    (b"GGUF", "a GGUF file of llama.cpp"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip file"),
)
_NAMES = (
    (("qweight", "qzeros", "g_idx"), "a GPTQ checkpoint"),
    (("qweight", "qzeros"), "an AWQ checkpoint"),
    (("weight_packed", "weight_scale"), "a checkpoint of compressed-tensors"),
    (("weight", "weight_scale"), "a checkpoint of compressed-tensors"),
    (("weight", "absmax"), "a checkpoint of bitsandbytes"),
    (("_data", "_scale"), "a checkpoint of quanto"),
)


def what_it_is(path: Path) -> str:
    """Name the kind of a file; empty where it has none that is known.

    Args:
        path: Any file. No more than a safetensors header is read of it.
    """
    with path.open("rb") as file:
        begin = file.read(8)
        if not begin:
            return "empty"
        for start, kind in _STARTS:
            if begin.startswith(start) and begin[4:8] != b"\0\0\0\0":
                return kind
        length = int.from_bytes(begin, "little")
        if len(begin) < 8 or not 2 <= length <= _LONGEST_HEADER:
            return ""
        header = file.read(length)
    if len(header) < length:
        return "cut short: not even its header is all there"
    try:
        found = json.loads(header)
    except (ValueError, RecursionError):
        return ""
    return _named(found, path.stat().st_size - 8 - length) if isinstance(found, dict) else ""


def _named(header: Mapping[str, Any], held: int) -> str:
    ends = [one.get("data_offsets") for one in header.values() if isinstance(one, dict)]
    sizes = [one[1] for one in ends if isinstance(one, list) and len(one) == 2]
    wanted = max((size for size in sizes if type(size) is int), default=0)
    if wanted > held:
        return f"cut short: {held} bytes of tensors are left of {wanted}"
    metadata = header.get("__metadata__")
    metadata = metadata if isinstance(metadata, dict) else {}
    own = metadata.get("format")
    if isinstance(own, str) and own.startswith("torsh-"):
        return f"a file of the format {own!r:.80}"
    last = {name.rpartition(".")[2] for name in header}
    for names, kind in _NAMES:
        if last.issuperset(names):
            return kind
    if "torsh-quant" in metadata:
        return ""
    return "a plain safetensors file, as of float models; quantize the model, then save it"
