"""Writing a model folder that transformers and sentence-transformers read."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from ._backbone import Dense, quiet_loading
from ._writing import staged_folder, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_model(
    folder: Path,
    *,
    backbone: "PreTrainedModel",
    tokenizer: Any,
    dim_in: int,
    pooling: tuple[str, ...],
    dense: nn.ModuleList,
    normalize: bool,
    max_length: int,
    lower_case: bool,
    prompts: dict[str, str],
    default_prompt: str | None,
) -> None:
    """Write beside the final place, then move each file in: no file is ever half there."""
    from safetensors.torch import save_file

    with staged_folder(folder) as staging:
        with quiet_loading():
            backbone.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        kind = "sentence_transformers.models."
        modules = [
            {"idx": 0, "name": "0", "path": "", "type": kind + "Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": kind + "Pooling"},
        ]
        limits = {"max_seq_length": max_length, "do_lower_case": lower_case}
        write_json(staging / "sentence_bert_config.json", limits)
        old_names = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}
        old_names["weightedmean"] = "weightedmean_tokens"
        settings: dict[str, Any] = {"word_embedding_dimension": dim_in, "include_prompt": True}
        for mode in ("cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"):
            settings[f"pooling_mode_{old_names.get(mode, mode)}"] = mode in pooling
        (staging / "1_Pooling").mkdir()
        write_json(staging / "1_Pooling" / "config.json", settings)
        for layer in cast("list[Dense]", list(dense)):
            index = len(modules)
            name = f"{index}_Dense"
            modules.append({"idx": index, "name": str(index), "path": name, "type": kind + "Dense"})
            (staging / name).mkdir()
            activation = type(layer.activation)
            config = {
                "in_features": layer.linear.in_features,
                "out_features": layer.linear.out_features,
                "bias": layer.linear.bias is not None,
                "activation_function": f"{activation.__module__}.{activation.__name__}",
            }
            write_json(staging / name / "config.json", config)
            state = {key: value.contiguous() for key, value in layer.state_dict().items()}
            save_file(state, staging / name / "model.safetensors")
        if normalize:
            index = len(modules)
            path = f"{index}_Normalize"
            entry = {"idx": index, "name": str(index), "path": path, "type": kind + "Normalize"}
            modules.append(entry)
            (staging / path).mkdir()
        write_json(
            staging / "config_sentence_transformers.json",
            {"prompts": prompts, "default_prompt_name": default_prompt},
        )
        write_json(staging / "modules.json", modules)
