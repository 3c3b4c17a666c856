"""Quantization-aware training as a callback for Lightning's Trainer."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from torsh_quant._flow import Flow, _module_names, _Recorder
from torsh_quant._fold import BatchNorm
from torsh_quant._layers import replace_modules
from torsh_quant._qat import (
    QATMethod,
    converted,
    prepare_qat,
    qat_layers,
)
from torsh_quant._qat_layers import QATLayer
from torsh_quant._quantize import DEFAULT_SKIP
from torsh_quant._spec import Scheme

if TYPE_CHECKING or find_spec("lightning") is not None:
    from lightning.pytorch.callbacks import Callback
elif find_spec("pytorch_lightning") is not None:
    from pytorch_lightning.callbacks import Callback
else:
    raise ImportError("torsh_quant.lightning needs Lightning: pip install 'torsh-quant[lightning]'")

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["QATCallback"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_SWAPPED = "_torsh_quant_swapped"  # on the LightningModule: a later Trainer has another callback


class QATCallback(Callback):
    """Train a LightningModule rounded, and leave it quantized.

    Layers are prepared before the optimizers are made, so learned scales are among
    ``self.parameters()`` in ``configure_optimizers``. At the end of ``fit`` the quantized layers
    take their place in the module. A later ``fit``, with or without ``ckpt_path``, goes on training
    with the prepared ones; ``test``, ``validate`` and ``predict`` run quantized, with the weights
    of ``ckpt_path`` where it is given. Checkpoints hold the prepared layers.

    If there is batch normalisation, the first batch of training runs in floats: it shows which
    layer each one follows, to be folded. List the callback ahead of one that averages weights, and
    let that begin behind ``start_epoch``.

    Args:
        scheme: As for :func:`torsh_quant.quantize`.
        method: ``"lsq"`` learns the scales, ``"ste"`` takes them from the weights.
        start_epoch: Train in floats before it.
        freeze_bn_epoch: From this epoch on batch normalisation keeps its statistics.
        freeze_range_epoch: From this epoch on the inputs of static schemes keep their scales.
        convert_on_end: Quantize at the end of ``fit``, and for the other stages; otherwise they run
            on the prepared layers.
        skip: Layers that stay float.
        overrides: Schemes of single layers.
        fold_bn: As for :func:`torsh_quant.prepare_qat`.

    Raises:
        ValueError: If an epoch is negative, or freezing comes before ``start_epoch``.

    Example:
        >>> callback = QATCallback("w4a8-static", start_epoch=1, freeze_bn_epoch=3)
        >>> str(callback.scheme)
        'w4a8-static'
    """

    def __init__(
        self,
        scheme: str | Scheme = "w8a8",
        *,
        method: QATMethod = "lsq",
        start_epoch: int = 0,
        freeze_bn_epoch: int | None = None,
        freeze_range_epoch: int | None = None,
        convert_on_end: bool = True,
        skip: Sequence[str] = DEFAULT_SKIP,
        overrides: Mapping[str, str | Scheme | None] | None = None,
        fold_bn: bool = True,
    ) -> None:
        super().__init__()
        if start_epoch < 0:
            raise ValueError(f"start_epoch={start_epoch} is negative; use 0 or more")
        for name, epoch in (
            ("freeze_bn_epoch", freeze_bn_epoch),
            ("freeze_range_epoch", freeze_range_epoch),
        ):
            if epoch is not None and epoch < start_epoch:
                raise ValueError(
                    f"{name}={epoch} comes before start_epoch={start_epoch}; use that or later"
                )
        self.scheme: Scheme = Scheme.parse(scheme)
        self.method: QATMethod = method
        self.start_epoch = start_epoch
        self.freeze_bn_epoch = freeze_bn_epoch
        self.freeze_range_epoch = freeze_range_epoch
        self.convert_on_end = convert_on_end
        self.skip = tuple(skip)
        self.overrides: dict[str, str | Scheme | None] = dict(overrides or {})
        self.fold_bn = fold_bn
        self._pairs: list[tuple[str, str]] | None = None if fold_bn else []
        self._switches: tuple[bool, bool, bool] = (False, False, False)
        self._loaded: bool = False
        self._recording: tuple[ExitStack, _Recorder] | None = None

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Put the layers that train in place.

        Raises:
            ValueError: If a callback that averages weights has copied the module already.
        """
        others = _averaging(trainer)
        listed: list[Callback] = cast("Any", trainer).callbacks
        if others and listed.index(others[0]) < listed.index(self):
            raise ValueError(
                f"callbacks lists {type(others[0]).__name__} ahead of QATCallback, so it averages "
                "a model without the learned scales; list QATCallback first"
            )
        swapped = pl_module.__dict__.pop(_SWAPPED, None)
        if swapped is not None:
            replace_modules(pl_module, _turned(swapped))
        if next(qat_layers(pl_module), None) is not None:
            return
        prepare_qat(
            pl_module,
            self.scheme,
            method=self.method,
            skip=self.skip,
            overrides=self.overrides,
            fold_bn=False,
            inplace=True,
        )
        for _, layer in qat_layers(pl_module):
            layer.enabled = False
        if not any(type(module) in _NORMS for module in pl_module.modules()):
            self._pairs = []

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Find the normalisations again that the checkpoint knows."""
        self._restore(pl_module)

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Do so too where the strategy restores late."""
        self._restore(pl_module)

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Switch on what this epoch has, and watch the first batch of all."""
        epoch = trainer.current_epoch
        started = epoch >= self.start_epoch
        if self._pairs is None:
            self._watch(pl_module, observe=started)
            return
        norms = self.freeze_bn_epoch is not None and epoch >= self.freeze_bn_epoch
        ranges = self.freeze_range_epoch is not None and epoch >= self.freeze_range_epoch
        if ranges and not self._switches[2]:
            ranges = all(layer.saw_data for _, layer in qat_layers(pl_module))
        self._switches = started, norms, ranges
        self._switch(pl_module)

    def on_train_batch_end(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Link the normalisations that the first batch has shown."""
        if self._recording is None:
            return
        recorder = self._stop_watching()
        self._pairs = _pairs(pl_module, Flow(recorder.uses, recorder.outputs, recorder.results))
        self._link(pl_module)
        if trainer.current_epoch >= self.start_epoch:
            # At once: a callback that averages weights copies the buffers after the first batch.
            for _, layer in qat_layers(pl_module):
                layer.take_weight_scale()

    def on_exception(
        self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException
    ) -> None:
        """Stop watching."""
        if self._recording is not None:
            self._stop_watching()

    def on_fit_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Put the quantized layers in place."""
        self._convert(pl_module)

    def on_test_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Put the quantized layers in place."""
        self._start_stage(pl_module)

    def on_predict_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Put the quantized layers in place."""
        self._start_stage(pl_module)

    def on_validation_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Put the quantized layers in place, unless validation is part of training."""
        if trainer.state.fn != "validate":
            return
        if _averaging(trainer):  # which swaps parameters at each validation
            self._restore(pl_module)
        else:
            self._start_stage(pl_module)

    def on_save_checkpoint(
        self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """Keep the prepared layers in checkpoints that are saved after ``fit`` too."""
        swapped = pl_module.__dict__.get(_SWAPPED)
        if swapped is not None:
            replace_modules(pl_module, _turned(swapped))
            checkpoint["state_dict"] = pl_module.state_dict()
            replace_modules(pl_module, swapped)

    def state_dict(self) -> dict[str, Any]:
        """Return what is switched on, and which normalisation follows which layer."""
        pairs = None if self._pairs is None else [list(pair) for pair in self._pairs]
        return {"version": 1, "pairs": pairs, "switches": list(self._switches)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take that from a checkpoint.

        Raises:
            ValueError: If it is of another version.
        """
        if state_dict.get("version") != 1:
            raise ValueError(
                f"this state of QATCallback has version {state_dict.get('version')}; known is 1"
            )
        pairs = state_dict["pairs"]
        self._pairs = None if pairs is None else [(layer, norm) for layer, norm in pairs]
        enabled, norms, ranges = state_dict["switches"]
        self._switches = enabled, norms, ranges
        self._loaded = True

    def _start_stage(self, module: "LightningModule") -> None:
        self._restore(module)
        self._convert(module)

    def _convert(self, module: "LightningModule") -> None:
        if not self.convert_on_end or _SWAPPED in module.__dict__:
            return
        if not all(layer.enabled and layer.saw_data for _, layer in qat_layers(module)):
            warnings.warn(
                "the model has not been trained rounded yet and stays float; fit it up to "
                f"start_epoch={self.start_epoch}, or give ckpt_path=",
                stacklevel=2,
            )
            return
        with torch.inference_mode(False), torch.no_grad():
            swapped = converted(module)
        for before, after in swapped.items():
            after.train(before.training)
        replace_modules(module, swapped)
        module.__dict__[_SWAPPED] = swapped

    def _link(self, module: "LightningModule") -> None:
        layers = dict(qat_layers(module))
        for name, norm in self._pairs or ():
            found = cast("BatchNorm", module.get_submodule(norm))
            if layers[name].batch_norm is not found:
                layers[name].link(found)

    def _restore(self, module: "LightningModule") -> None:
        self._link(module)
        if self._loaded:
            # Averaged weights come with the switches of the start.
            for _, layer in qat_layers(module):
                layer.enabled, layer.norm_frozen, layer.ranges_frozen = self._switches
            self._loaded = False

    def _switch(self, module: "LightningModule") -> None:
        enabled, norms, ranges = self._switches
        for _, layer in qat_layers(module):
            layer.enabled |= enabled
            layer.norm_frozen |= norms
            if ranges:
                layer.freeze_ranges()

    def _watch(self, module: "LightningModule", *, observe: bool) -> None:
        recorder, stack = _Recorder(), ExitStack()
        for _, layer in qat_layers(module):
            if observe and layer.scheme.is_static:
                stack.callback(layer.register_forward_pre_hook(_observe).remove)
        stack.enter_context(_module_names(module, recorder))
        stack.enter_context(recorder)
        self._recording = stack, recorder

    def _stop_watching(self) -> _Recorder:
        assert self._recording is not None
        stack, recorder = self._recording
        self._recording = None
        stack.close()
        return recorder


def _averaging(trainer: "Trainer") -> list[Callback]:
    """The callbacks that average weights, told by name: older Lightning has none."""
    return [
        other
        for other in cast("Any", trainer).callbacks
        if any(kind.__name__ == "WeightAveraging" for kind in type(other).__mro__)
    ]


def _turned(swapped: dict[nn.Module, nn.Module]) -> dict[nn.Module, nn.Module]:
    return {after: before for before, after in swapped.items()}


def _observe(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    with torch._C.DisableTorchFunction():
        cast("QATLayer", layer).observe(inputs[0])


def _pairs(module: nn.Module, flow: Flow) -> list[tuple[str, str]]:
    """Return the prepared layers whose output one batch normalisation alone uses."""
    norms = {name: one for name, one in module.named_modules() if type(one) in _NORMS}
    found: list[tuple[str, str]] = []
    for name, layer in qat_layers(module):
        use = flow.only_user(name)
        if use is None or use.function != "batch_norm" or use.module not in norms:
            continue
        norm = cast("BatchNorm", norms[use.module])
        if flow.output(use.module) is None or norm.running_var is None:
            continue
        if norm.num_features == len(layer.weight):
            found.append((name, use.module))
    return found
