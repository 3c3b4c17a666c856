"""Finding, reading and writing models: safe formats only, sentence-transformers' layout."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._pooling import POOLINGS, Pooling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
_OTHER_RUNTIMES = ["onnx/*", "openvino/*"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU)
}


def resolve_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """Return the dtype meant by ``"auto"``, a name or a dtype."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={dtype!r} is no floating-point dtype; try 'auto' or 'float32'")
    return found


def resolve_device(device: torch.device | str | None) -> torch.device:
    """Return the device that is meant; None is CUDA where there is one, else the CPU.

    Raises:
        ValueError: If torch knows no such device, or it is CUDA and there is none.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is no device; use 'cpu' or 'cuda'") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={str(device)!r}, but torch sees {torch.cuda.device_count()} CUDA devices;"
            " use 'cpu', or see `torsh-text doctor`"
        )
    return place


class Dense(nn.Module):
    """A linear layer and its activation behind the pooling, as sentence-transformers saves it."""

    def __init__(self, size_in: int, size_out: int, *, bias: bool, activation: str) -> None:
        super().__init__()
        self.linear = nn.Linear(size_in, size_out, bias=bias)
        self.activation = _ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(x.to(self.linear.weight.dtype)))


@dataclass(frozen=True)
class Layout:
    """What a model folder says about the way from token states to a vector.

    Attributes:
        transformer: Folder of the transformer.
        pooling: Pooling modes, concatenated.
        normalize: Whether vectors are scaled to length one.
        max_length: Tokens after which texts are cut; None if the folder does not say.
        lower_case: Whether texts are lower-cased.
        dense: Folders of dense layers behind the pooling.
        prompts: Named prefixes the model was trained with.
        default_prompt: Name of the prefix used when none is given.
        pools_prompt: Whether a prefix's tokens count in the pooling.
    """

    transformer: Path
    pooling: tuple[Pooling, ...] = ("mean",)
    normalize: bool = False
    max_length: int | None = None
    lower_case: bool = False
    dense: tuple[Path, ...] = ()
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    pools_prompt: bool = True


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _pooling_modes(settings: dict[str, Any], path: Path) -> tuple[str, ...]:
    modes = settings.get("pooling_mode")
    if modes is None:
        old = {
            "cls": "cls_token",
            "max": "max_tokens",
            "mean": "mean_tokens",
            "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
            "weightedmean": "weightedmean_tokens",
            "lasttoken": "lasttoken",
        }
        modes = [m for m, key in old.items() if settings.get(f"pooling_mode_{key}")] or ["mean"]
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    if unknown := set(modes) - set(POOLINGS):
        raise ValueError(f"{path} asks for pooling {sorted(unknown)}; known are {list(POOLINGS)}")
    return modes


def read_layout(folder: Path) -> Layout:
    """Read ``modules.json`` and the files it names; a plain transformers folder is fine too.

    Raises:
        ValueError: If the folder uses a sentence-transformers module this package has not.
    """
    found: dict[str, Any] = {"transformer": folder, "dense": ()}
    if (folder / "config_sentence_transformers.json").exists():
        settings = _read(folder / "config_sentence_transformers.json")
        prompts = settings.get("prompts") or {}
        found["prompts"] = {name: text for name, text in prompts.items() if text}
        found["default_prompt"] = settings.get("default_prompt_name")
    if (folder / "modules.json").exists():
        for entry in _read(folder / "modules.json"):
            path = folder / entry["path"]
            kind = entry["type"].rpartition(".")[2]
            if kind == "Transformer":
                found["transformer"] = path
            elif kind == "Pooling":
                settings = _read(path / "config.json")
                found["pooling"] = _pooling_modes(settings, path)
                found["pools_prompt"] = settings.get("include_prompt", True)
            elif kind == "Dense":
                found["dense"] += (path,)
            elif kind == "Normalize":
                found["normalize"] = True
            else:
                raise ValueError(
                    f"{folder / 'modules.json'} has a module {entry['type']!r}; this encoder reads"
                    " Transformer, Pooling, Dense and Normalize"
                )
    limits = found["transformer"] / "sentence_bert_config.json"
    if limits.exists():
        settings = _read(limits)
        found["max_length"] = settings.get("max_seq_length")
        found["lower_case"] = bool(settings.get("do_lower_case", False))
    return Layout(**found)


def find_model(
    name: str | os.PathLike[str],
    *,
    revision: str | None,
    local_files_only: bool,
    trust_remote_code: bool,
) -> Path:
    """Return the folder of a model: as given, or downloaded once into the hub's cache.

    Raises:
        FileNotFoundError: If it is neither a folder nor in the cache nor to be downloaded.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").exists() and not (folder / "modules.json").exists():
            if (folder / "few_shot.json").exists():
                raise FileNotFoundError(
                    f"{str(folder)!r} is the folder of a FewShot; FewShot.load reads it"
                )
            raise FileNotFoundError(
                f"the folder {str(folder)!r} holds no model: neither config.json (transformers) nor"
                " modules.json (sentence-transformers) is in it"
            )
        return folder
    if isinstance(name, os.PathLike) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"name={str(name)!r} is no folder on this machine")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = [*_FILES, "*.py"] if trust_remote_code else _FILES

    def fetch(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                local_files_only=local_files_only,
                allow_patterns=patterns,
                ignore_patterns=_OTHER_RUNTIMES,
            )
        )

    try:
        folder = fetch(patterns)
        if not any(folder.rglob("*.safetensors")):
            folder = fetch([*patterns, "*.bin"])
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise FileNotFoundError(
            f"{name!r} is not in the local model cache and the hub cannot be asked (offline, or"
            f" local_files_only=True). Run `hf download {name}` once on a connected machine"
            " (HF_HOME says where its cache is), or name a folder that holds a model instead"
        ) from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(
            f"the hub does not give out {name!r}: {str(error).splitlines()[0]}"
        ) from error
    return folder


@contextmanager
def quiet_loading(*, reports: bool = True) -> Iterator[None]:
    """No progress bars of transformers meanwhile; without ``reports`` no table of what is missing.

    Without the table, who calls has to look at ``missing_keys`` and say what it means.
    """
    from transformers.utils import logging as hf_logging

    shown, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    if not reports:
        hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if shown:
            hf_logging.enable_progress_bar()


def load_backbone(
    folder: Path, *, dtype: torch.dtype, trust_remote_code: bool
) -> "PreTrainedModel":
    """Load the transformer of a folder on the CPU.

    Weights come from safetensors, or from a ``.bin`` file read with ``weights_only=True``.

    Raises:
        ValueError: If weights are missing (they would be random) or the model has no encoder.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    loader = AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel
    with quiet_loading():
        model, report = loader.from_pretrained(
            folder,
            config=config,
            dtype=dtype,  # not .to(dtype): that would round rotary tables too
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    missing = sorted(key for key in report["missing_keys"] if "pooler." not in key)
    if missing:
        raise ValueError(
            f"the weights in {folder} lack {len(missing)} tensors of {type(model).__name__}"
            f" (first: {missing[0]!r}); they would be random. Save the base model with its weights"
        )
    if getattr(model, "pooler", None) is not None:
        model.pooler.requires_grad_(False)  # never used here; DDP refuses unused parameters
    return model.eval()


def load_dense(folder: Path) -> Dense:
    """Load one dense layer in sentence-transformers' format."""
    settings = _read(folder / "config.json")
    activation = (settings.get("activation_function") or "Identity").rpartition(".")[2]
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{folder} has activation {activation!r}; known: {sorted(_ACTIVATIONS)}")
    if settings.get("use_residual") or settings.get("module_input_name", "sentence_embedding") != (
        "sentence_embedding"
    ):
        raise ValueError(
            f"{folder} is a dense layer with a residual or another input; not readable"
        )
    layer = Dense(
        settings["in_features"],
        settings["out_features"],
        bias=settings.get("bias", True),
        activation=activation,
    )
    if (folder / "model.safetensors").exists():
        from safetensors.torch import load_file

        weights = load_file(folder / "model.safetensors")
    else:
        weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    layer.load_state_dict(weights)
    return layer


def first_position(backbone: "PreTrainedModel") -> int:
    """Position of a row's first token: RoBERTa's relatives start behind their padding index."""
    for module in backbone.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding):
            return 0 if table.padding_idx is None else table.padding_idx + 1
    return 0


def longest_row(backbone: "PreTrainedModel") -> int | None:
    """Tokens for which the model has positions; None if it has no limit."""
    text_config = backbone.config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    return None if limit is None else limit - first_position(backbone)


def resolve_max_length(backbone: "PreTrainedModel", tokenizer: Any, asked: int | None) -> int:
    """Tokens after which texts are cut: what was asked, or all that model and tokenizer allow."""
    limit = longest_row(backbone)
    if asked is None:
        # tokenizers without a limit say 10**30
        limits = [n for n in (limit, tokenizer.model_max_length) if n and n < 10**9]
        return min(limits, default=512)
    if not isinstance(asked, int) or isinstance(asked, bool):
        raise TypeError(f"max_length={asked!r} is no integer")
    if limit is not None and asked > limit:
        raise ValueError(f"max_length={asked} is beyond the {limit} positions of the model")
    return asked


@dataclass(frozen=True)
class Parts:
    """What an encoder is made of."""

    layout: Layout
    backbone: "PreTrainedModel"
    tokenizer: Any
    dense: list[Dense]


def load_parts(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None,
    local_files_only: bool,
    trust_remote_code: bool,
) -> Parts:
    """Find and load all parts of a model."""
    from transformers import AutoTokenizer

    folder = find_model(
        name,
        revision=revision,
        local_files_only=local_files_only,
        trust_remote_code=trust_remote_code,
    )
    layout = read_layout(folder)
    if not layout.pools_prompt and layout.prompts:
        raise ValueError(
            f"{str(name)!r} leaves its prompt out of the pooling, which this encoder cannot"
        )
    source = layout.transformer
    backbone = load_backbone(source, dtype=dtype, trust_remote_code=trust_remote_code)
    nn.Module.to(backbone, device)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    dense = [load_dense(path).to(device, dtype) for path in layout.dense]
    return Parts(layout, backbone, tokenizer, dense)


def digest(state: dict[str, Tensor], *texts: str) -> str:
    """Hash tensors, with names, dtypes and shapes, and texts."""
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(state.items()):
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().data)
    for text in texts:
        total.update(hashlib.blake2b(text.encode()).digest())
    return total.hexdigest()
