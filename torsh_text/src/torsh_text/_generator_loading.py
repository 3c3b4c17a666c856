"""Loading of models that write: safe formats, and GGUF files through their extra."""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ._backbone import find_model, quiet_loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_generator(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    gguf_file: str | None,
    revision: str | None,
    local_files_only: bool,
    trust_remote_code: bool,
) -> tuple["PreTrainedModel", Any]:
    """Find and load a seq2seq or causal model and its tokenizer, on the CPU.

    Raises:
        FileNotFoundError: If the model or the GGUF file is not to be had.
        ValueError: If the model cannot write or lacks weights.
        ImportError: If a GGUF file is asked for without the packages that read it.
    """
    if gguf_file is None and str(name).endswith(".gguf"):
        path = Path(name)
        name, gguf_file = path.parent, path.name
    extra: dict[str, Any] = {}
    if gguf_file is not None:
        file = _find_gguf(name, gguf_file, revision=revision, local_files_only=local_files_only)
        folder = file.parent
        extra = {"gguf_file": file.name}
    else:
        folder = find_model(
            name,
            revision=revision,
            local_files_only=local_files_only,
            trust_remote_code=trust_remote_code,
        )
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
    )

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **extra)
    written = [a for a in config.architectures or [] if a.endswith("ForMaskedLM")]
    if written and not config.is_encoder_decoder:
        raise ValueError(f"{str(name)!r} is a {written[0]}, which fills in words and cannot write")
    loader: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with quiet_loading(reports=False):
        model, report = loader.from_pretrained(
            folder,
            config=None if extra else config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **extra,
        )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"the weights in {folder} lack {len(missing)} tensors of {type(model).__name__} (first:"
            f" {missing[0]!r}); they would be random. Load a model that was trained to write"
        )
    model.eval()
    if not config.is_encoder_decoder and _looks_ahead(model):
        raise ValueError(
            f"{str(name)!r} is an encoder: as a {type(model).__name__} its words see those that"
            " come later, so it cannot write. Load a causal or seq2seq model"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **extra)
    return model, tokenizer


@torch.inference_mode()
def _looks_ahead(model: "PreTrainedModel") -> bool:
    """Whether scores of a token change with the one behind it, as in an encoder with a head."""
    ids = torch.tensor([[3, 4], [3, 5]], device=model.device)
    first, second = model(input_ids=ids, use_cache=False).logits[:, 0].float()
    return not torch.allclose(first, second, rtol=1e-2, atol=1e-2)


def _find_gguf(
    name: str | os.PathLike[str], gguf_file: str, *, revision: str | None, local_files_only: bool
) -> Path:
    lacking = [p for p in ("gguf", "accelerate") if importlib.util.find_spec(p) is None]
    if lacking:
        raise ImportError(
            f"{gguf_file} needs {' and '.join(lacking)}: pip install 'torsh-text[gguf]'"
        )
    folder = Path(name)
    if folder.is_dir() or isinstance(name, os.PathLike) or name.startswith((".", "/", "~")):
        if not (folder / gguf_file).is_file():
            raise FileNotFoundError(f"{str(folder / gguf_file)!r} is no file on this machine")
        return folder / gguf_file
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(
            hf_hub_download(name, gguf_file, revision=revision, local_files_only=local_files_only)
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise FileNotFoundError(
            f"{gguf_file!r} of {name!r} is not in the local model cache and the hub cannot be asked"
            f" (offline, or local_files_only=True). Run `hf download {name} {gguf_file}` once on a"
            " connected machine, or pass the path of the file"
        ) from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"the hub does not give out {name!r}: {error}") from error
