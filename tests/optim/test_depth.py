"""Depths against timm's, recorded as numbers, and against the models' own block numbers."""

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from torsh_optim._depth import parameter_depths
from torsh_optim._head import find_head

# Tensors in each layer as timm 1.0.31 numbers them in its own models (group_parameters with the
# model's group_matcher); torchvision's models have the same tensors.
_TIMM = {
    "resnet18": [3, 6, 6, 9, 6, 9, 6, 9, 6, 2],
    "resnet50": [3, 12, 9, 9, 12, 9, 9, 9, 12, 9, 9, 9, 9, 9, 12, 9, 9, 2],
    "vit_b_16": [4, *[12] * 11, 14, 2],
    "swin_t": [4, 13, 13, 16, 13, 16, 13, 13, 13, 13, 13, 16, 15, 2],
    "convnext_tiny": [4, 9, 9, 9, 13, 9, 9, 13, *[9] * 8, 13, 9, 9, 4],
}


def depths_of(model: nn.Module) -> dict[str, int]:
    depths = parameter_depths(model, find_head(model))
    assert depths.keys() == {name for name, _ in model.named_parameters()}
    assert set(depths.values()) == set(range(max(depths.values()) + 1))
    return depths


@pytest.mark.parametrize("name", _TIMM)
def test_torchvision_counts_as_timm_does(name: str) -> None:
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        depths = depths_of(models.get_model(name, weights=None))
    layers = Counter(depths.values())
    assert [layers[i] for i in range(len(layers))] == _TIMM[name]
    assert next(iter(depths.values())) == 0
    assert list(depths.values())[-1] == len(_TIMM[name]) - 1


@pytest.mark.parametrize(
    ("name", "pattern", "layers"),
    [
        ("mobilenet_v2", r"features\.(1[0-7]|[1-9])\.", 19),
        ("densenet121", r"denseblock1\.denselayer(\d+)", 60),
        ("efficientnet_b0", r"features\.1\.()", 18),
        ("shufflenet_v2_x0_5", r"stage2\.()0\.", 18),
        ("squeezenet1_0", r"features\.(3)\.", 10),
        ("alexnet", r"features\.(0)\.", 6),
        ("googlenet", r"conv(\d)\.", 13),
    ],
)
def test_torchvision_blocks_are_layers(name: str, pattern: str, layers: int) -> None:
    models = pytest.importorskip("torchvision").models
    options = {"init_weights": False} if name == "googlenet" else {}
    with torch.device("meta"):
        model = models.get_model(name, weights=None, **options)
    depths = depths_of(model)
    assert max(depths.values()) == layers - 1
    offset = {"squeezenet1_0": -2, "googlenet": -1}.get(name, 0)
    found = {
        parameter: match[1]
        for parameter in depths
        if (match := re.search(pattern, parameter)) is not None
    }
    assert found
    for parameter, number in found.items():
        assert depths[parameter] == int(number or 1) + offset, parameter


_SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_TEXT = _SMALL | {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def hugging_face(name: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = re.sub("(For|LMHead|Model).*", "", name) + "Config"
    model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**options))
    return model


@pytest.mark.parametrize(
    ("name", "options", "block", "stem", "last_norm", "head"),
    [
        ("BertForSequenceClassification", _TEXT, r"layer\.(\d)", "embeddings", "", "pooler|^class"),
        ("BertModel", _TEXT, r"layer\.(\d)", "embeddings", "", "pooler"),
        ("ModernBertForSequenceClassification", _TEXT | {"cls_token_id": 1, "sep_token_id": 2},
         r"layers\.(\d)", "embeddings", "final_norm", "^head|^classifier"),
        ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 32,
                             "bos_token_id": 1, "eos_token_id": 2},
         r"h\.(\d)\.", "wte|wpe", "ln_f", "^lm_head"),
        ("LlamaForCausalLM", _TEXT, r"layers\.(\d)", "embed_tokens", r"model\.norm", "^lm_head"),
        ("MixtralForCausalLM", _TEXT | {"num_local_experts": 2}, r"layers\.(\d)", "embed_tokens",
         r"model\.norm", "^lm_head"),
        ("ViTForImageClassification", _SMALL, r"layers?\.(\d)", "embeddings", r"vit\.layernorm",
         "^classifier"),
    ],
)  # fmt: skip
def test_transformers_blocks_are_layers(
    name: str, options: dict[str, Any], block: str, stem: str, last_norm: str, head: str
) -> None:
    depths = depths_of(hugging_face(name, **options))
    for parameter, depth in depths.items():
        if found := re.search(block, parameter):
            assert depth == int(found[1]) + 1, parameter
        elif re.search(head, parameter):
            assert depth == 4, parameter
        elif last_norm and re.search(last_norm, parameter):
            assert depth == 3, parameter
        else:
            assert re.search(stem, parameter), parameter
            assert depth == 0, parameter


@pytest.mark.parametrize(
    ("name", "options", "block", "downsample"),
    [
        ("SwinForImageClassification",
         {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]},
         r"layers\.(\d)\.blocks\.(\d)", r"layers\.(\d)\.downsample"),
        ("ConvNextForImageClassification",
         {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1]},
         r"stages\.(\d)\.layers\.(\d)", r"stages\.(\d)\.downsampling_layer"),
        ("ResNetForImageClassification",
         {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1]},
         r"stages\.(\d)\.layers\.(\d)", None),
    ],
)  # fmt: skip
def test_transformers_stages_are_entered(
    name: str, options: dict[str, Any], block: str, downsample: str | None
) -> None:
    depths = depths_of(hugging_face(name, **options))
    assert max(depths.values()) == 6  # stem, 1 + 1 + 2 + 1 blocks, head
    starts = [1, 2, 3, 5]
    for parameter, depth in depths.items():
        if found := re.search(block, parameter):
            assert depth == starts[int(found[1])] + int(found[2]), parameter
        elif downsample and (found := re.search(downsample, parameter)):
            after = int(found[1]) + name.startswith("Swin")  # Swin's comes at the end of a stage
            assert depth == starts[after], parameter


def test_encoder_and_decoder_follow_each_other() -> None:
    options = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    model = hugging_face("T5ForConditionalGeneration", vocab_size=32, **options)
    depths = depths_of(model)
    assert depths["shared.weight"] == 0
    assert depths["encoder.block.1.layer.0.SelfAttention.q.weight"] == 2
    assert depths["encoder.final_layer_norm.weight"] == 2
    assert depths["decoder.block.0.layer.0.SelfAttention.q.weight"] == 3
    assert depths["decoder.final_layer_norm.weight"] == 4


def test_embeddings_of_a_decoder_are_layer_0() -> None:
    options = {f"{side}_{name}": 2 for side in ("encoder", "decoder")
               for name in ("layers", "attention_heads", "ffn_dim")}  # fmt: skip
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
               "decoder_start_token_id": 2, "forced_eos_token_id": 2}  # fmt: skip
    model = hugging_face(
        "BartForConditionalGeneration", d_model=16, vocab_size=32, **options, **special
    )
    depths = depths_of(model)
    assert depths["model.decoder.embed_positions.weight"] == 0
    assert depths["model.decoder.layernorm_embedding.weight"] == 0
    assert depths["model.decoder.layers.1.fc1.weight"] == 4


def test_the_encoders_of_clip_are_side_by_side() -> None:
    model = hugging_face(
        "CLIPModel",
        text_config=_TEXT | {"max_position_embeddings": 8},
        vision_config=_SMALL | {"num_hidden_layers": 2, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    depths = depths_of(model)
    for i in range(3):
        assert depths[f"text_model.encoder.layers.{i}.mlp.fc1.weight"] == i + 1
    for i in range(2):  # ends with the text's
        assert depths[f"vision_model.encoder.layers.{i}.mlp.fc1.weight"] == i + 2
    assert depths["text_model.embeddings.token_embedding.weight"] == 0
    assert depths["visual_projection.weight"] == depths["logit_scale"] == 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)


class MixtureBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.experts = nn.ModuleList(Expert() for _ in range(16))


class PreNorm(nn.Module):
    """Not a norm, whatever its name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(4), Expert()


class Numbered(nn.Module):
    """Blocks as attributes b1, b2, ..."""

    def __init__(self, count: int) -> None:
        super().__init__()
        for i in range(1, count + 1):
            self.add_module(f"b{i}", Block())


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Linear(2, 2), [0]),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)),
         [0, 1, 2]),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2), nn.Linear(2, 2)),
         [0, 0, 1, 2]),
        (nn.Sequential(nn.Embedding(3, 4), Block(), Block(), nn.LayerNorm(4), nn.Linear(4, 2)),
         [0, 1, 2, 2, 3]),
        (nn.Sequential(nn.Sequential(Block(), Block()), nn.Linear(4, 4),
                       nn.Sequential(Block(), Block()), nn.Linear(4, 2)), [0, 1, 2, 2, 3, 4]),
        (nn.ModuleList([MixtureBlock(), MixtureBlock()]), [0, 1]),
        (nn.Sequential(nn.Embedding(3, 4), MixtureBlock(), nn.Linear(4, 2)), [0, 1, 2]),
        (nn.ModuleList([PreNorm(), PreNorm()]), [0, 1]),
        (nn.Sequential(Block(), nn.Linear(4, 4), nn.LayerNorm(4), Block(), Block()), [0, 1, 2]),
        (nn.Sequential(nn.Conv1d(2, 4, 1), Numbered(3), nn.Linear(4, 2)), [0, 1, 2, 3, 4]),
        (nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Sequential(nn.Linear(2, 2)),
                       nn.Linear(2, 1)), [0, 1, 2]),
    ],
)  # fmt: skip
def test_own_stacks(model: nn.Module, expected: list[int]) -> None:
    depths = list(depths_of(model).values())
    assert [depth for i, depth in enumerate(depths) if i == 0 or depth != depths[i - 1]] == sorted(
        set(expected)
    )
    leaves = [m for m in model.modules() if isinstance(m, Block | MixtureBlock | Expert)]
    if not leaves:
        named = depths_of(model)
        weights = [depth for name, depth in named.items() if name.endswith("weight")]
        assert weights == expected


@pytest.mark.parametrize(
    ("name", "module"),
    [("tokens", nn.Embedding(3, 4)), ("position_embed", nn.Linear(3, 4))],
)
def test_registration_does_not_hide_embeddings(name: str, module: nn.Module) -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([Block(), Block()])
    model.add_module(name, module)
    model.out = nn.Linear(4, 2)
    depths = depths_of(model)
    assert depths[f"{name}.weight"] == 0
    assert depths["blocks.1.mlp.2.weight"] == 2
    assert depths["out.weight"] == 3


def test_a_backbone_called_embedder_is_no_embedding() -> None:
    model = nn.ModuleDict({"embedder": nn.Sequential(Block(), Block()), "out": nn.Linear(4, 2)})
    depths = depths_of(model)
    assert depths["embedder.0.norm.weight"] == 0
    assert depths["embedder.1.norm.weight"] == 1
    assert depths["out.weight"] == 2


def test_a_head_inside_of_a_block() -> None:
    model = nn.Sequential(Block(), Block(), Block())
    depths = parameter_depths(model, ["1.mlp.2"])
    assert depths["1.mlp.0.weight"] == 1
    assert depths["2.mlp.2.weight"] == 2
    assert depths["1.mlp.2.weight"] == 3


class Matched(nn.Module):
    """A model that speaks timm's protocol: blocks in another order than registered."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.stages = nn.ModuleList([Block(), Block()])
        self.downsample = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.norm = nn.LayerNorm(4)
        self.patch = nn.Linear(3, 4)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        assert not coarse
        blocks = [(r"^downsample\.(\d+)", None), (r"^stages\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^patch", "blocks": blocks}

    def get_classifier(self) -> nn.Module:
        return self.head


class Forwards(nn.Module):
    """A wrapper that passes on attributes of what it holds, as LoRA's and compiled models do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


@pytest.mark.parametrize("wrap", [lambda model: model, Forwards, torch.compile])
def test_group_matcher_decides(wrap: Any) -> None:
    depths = list(depths_of(wrap(Matched())).items())
    found = {name.removeprefix("inner.").removeprefix("_orig_mod."): d for name, d in depths}
    expected = {"patch": 0, "downsample.0": 1, "stages.0": 1, "downsample.1": 2, "stages.1": 2,
                "norm": 2, "head": 3}  # fmt: skip
    for start, depth in expected.items():
        assert {d for name, d in found.items() if name.startswith(start)} == {depth}, start


def test_group_matcher_of_a_backbone() -> None:
    model = nn.Module()
    model.backbone = Matched()
    model.projection = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    depths = depths_of(model)
    assert depths["backbone.patch.weight"] == 0
    assert depths["backbone.norm.weight"] == 2
    assert depths["projection.1.weight"] == depths["backbone.head.weight"] == 3


def test_group_matcher_in_a_wrapper_beside_others() -> None:
    depths = depths_of(nn.ModuleDict({"a": Forwards(Matched()), "out": nn.Linear(4, 2)}))
    assert depths["a.inner.patch.weight"] == 0
    assert depths["a.inner.stages.1.norm.weight"] == 2
    assert depths["out.weight"] == 3


def test_group_matcher_after_blocks() -> None:
    depths = depths_of(nn.Sequential(Block(), Block(), Matched()))
    assert depths["1.norm.weight"] == 1
    assert depths["2.patch.weight"] == 2
    assert depths["2.stages.0.norm.weight"] == 3


def test_group_matcher_may_be_a_function() -> None:
    class ByFunction(Matched):
        def group_matcher(self, coarse: bool = False) -> Any:
            return lambda name: (5.0,) if name.startswith("head") else 1

    depths = depths_of(ByFunction())
    assert depths["head.weight"] == 1
    assert {depth for name, depth in depths.items() if not name.startswith("head")} == {0}


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny", "resnet50",
     "efficientnet_b0", "eva02_tiny_patch14_224", "mobilenetv3_small_100", "densenet121",
     "maxvit_tiny_rw_224", "xcit_nano_12_p16_224"],
)  # fmt: skip
def test_timm_itself_agrees(name: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name)
    matcher = model.group_matcher(coarse=False)
    assert depths_of(model) == timm.models.group_parameters(model, matcher, reverse=True)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (Matched, ("head",)),
        (lambda: Forwards(Matched()), ("inner.head",)),
        (lambda: torch.compile(Matched()), ("_orig_mod.head",)),
        (lambda: nn.Sequential(Block(), Block()), ()),
        (lambda: nn.Sequential(Block(), Block(), nn.Linear(4, 2)), ("2",)),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), ()),
        (lambda: nn.Linear(2, 2), ()),
        (lambda: nn.ModuleDict({"body": Block(), "cls_head": Block()}), ("cls_head",)),
        (lambda: hugging_face("BertForQuestionAnswering", **_TEXT), ("qa_outputs",)),
        (lambda: hugging_face("BertModel", **_TEXT), ()),
        (lambda: hugging_face("Wav2Vec2ForSequenceClassification", **_TEXT, conv_dim=(8,),
                              conv_stride=(2,), conv_kernel=(3,), num_conv_pos_embeddings=4,
                              num_conv_pos_embedding_groups=2), ("projector", "classifier")),
        (lambda: nn.ModuleDict({"fc": nn.Linear(2, 2), "head": nn.Linear(2, 2)}), ("head",)),
        (lambda: nn.ModuleDict({"model": hugging_face("LlamaForCausalLM", **_TEXT)}),
         ("model.lm_head",)),
    ],
)  # fmt: skip
def test_find_head(build: Any, expected: tuple[str, ...]) -> None:
    assert find_head(build()) == expected


def test_find_head_of_torchvision() -> None:
    models = pytest.importorskip("torchvision").models
    heads = {"resnet18": "fc", "vit_b_16": "heads", "swin_t": "head", "convnext_tiny": "classifier"}
    with torch.device("meta"):
        for name, head in heads.items():
            assert find_head(models.get_model(name, weights=None)) == (head,)
