"""SAGA."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from torsh_optim import _saga_table as table_rows
from torsh_optim._checkpoint import align_groups, match_params
from torsh_optim._eager import run_eagerly
from torsh_optim._saga_file import read_tensors, write_tensors
from torsh_optim._saga_layers import LinearCalls
from torsh_optim._saga_update import Index, Update, sample_numbers

TableKind = Literal["auto", "scalar", "factored", "full"]

FORMAT = 2  # 1 had no checksums of inputs; they are taken as not seen yet
_KINDS = ("auto", "scalar", "factored", "full")
_SHARED = ("num_samples", "table", "table_dtype", "max_table_bytes")  # one value for all groups


class SAGA(Optimizer):
    """SGD whose noise vanishes at the optimum: it remembers the last gradient of every sample.

    The estimate of the gradient is that of the batch, minus what the table stores for the same
    samples, plus the mean of the table. It is unbiased, and near the optimum its error goes to
    zero, so a constant learning rate converges linearly on convex problems. For deep networks
    nothing is claimed; see :class:`SVRG` with a falling ``alpha``.

    What the table holds for a sample:

    - ``scalar``: the derivatives of the loss by the outputs of one ``nn.Linear``. For linear models
      (regression, softmax) whose input for a sample never changes. A checksum of it is kept, and
      a step with another input is an error.
    - ``factored``: input and output derivative of each ``nn.Linear``, in + out numbers in place of
      in x out. For layers called once on ``(batch, features)``; inputs may change, as behind other
      layers, dropout or augmentation.
    - ``full``: the gradient. For any model whose samples do not mix (no batch statistics). The
      closure returns the loss of each sample ``(batch,)``, or ``index`` is one number: that of a
      sample, or of a fixed minibatch.
    - ``auto``: the first of these that fits, found in the first step. It assumes that a sample
      always has the same input, which is checked: where augmentation or dropout comes before a
      single linear layer, take ``factored``.

    The layers are found by themselves while the closure runs; compiled models run uncompiled in
    it. Terms of the loss that use the parameters directly, such as a penalty, are not stored and
    stay exact in each step. It runs in one process: gradients averaged over ranks do not fit a
    table of one rank's samples. The table begins with zeros. It is part of ``state_dict()``;
    :meth:`save_table` writes it compressed. After a step each ``grad`` holds the estimate.

    Args:
        params: Tensors, name and tensor pairs, or dictionaries of parameter groups; groups may
            have their own ``lr``, ``weight_decay`` and ``l1``.
        lr: Learning rate, at least 0. ``1 / (3 L)`` is safe for batches of one, where L bounds the
            curvature of a sample's loss (for softmax: half the largest squared norm of an input,
            plus the weight decay); batches of b samples bear more, up to b times.
        num_samples: Samples (or fixed minibatches) that the loss is a mean of.
        table: See above.
        table_dtype: How gradients are stored: float32 is as good as float64 down to a gap of about
            1e-13 in the objective; bfloat16 and int8 (with a scale for each sample) take a half
            and about a quarter, and stop at a noise floor, of 2e-8 and 2e-7 for softmax regression
            on scikit-learn's centred digits, higher where single gradients are larger. Rounding
            never biases the estimate.
        weight_decay: Weight of ``0.5 * ||w||**2``, at least 0.
        l1: Weight of ``||w||_1``, at least 0, by a proximal step, so weights become exactly 0.
        max_table_bytes: A larger table is refused.

    Raises:
        TypeError: ``table_dtype`` is not one of float64, float32, bfloat16 and int8, or a rate is
            not a number.
        ValueError: An option is out of range, or a full table would be too large.

    Example:
        The mean of 1 and 4 is the optimum. The first estimate is -1, with nothing stored; the
        second -3.5 - 0 + (-1 + 0) / 2 = -4.

        >>> x, y = torch.ones(2, 1), torch.tensor([[1.0], [4.0]])
        >>> linear = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(linear.weight)
        >>> saga = SAGA(linear.parameters(), lr=0.5, num_samples=2)
        >>> path = []
        >>> for i in [0, 1] * 20:
        ...     _ = saga.step(lambda: 0.5 * (linear(x[[i]]) - y[[i]]).square().mean(), index=i)
        ...     path.append(linear.weight.item())
        >>> path[:2], round(path[-1], 4)
        ([0.5, 2.5], 2.5)

    Reference:
        Aaron Defazio, Francis Bach, Simon Lacoste-Julien: SAGA: A Fast Incremental Gradient Method
        With Support for Non-Strongly Convex Composite Objectives, 2014, arXiv 1407.0202. There a
        step takes one sample and the table begins with gradients at the start; here a step takes a
        batch and the table begins with zeros, which is unbiased as well.
    """

    needs_index = True  # wrappers that step without it refuse this class

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        num_samples: int,
        *,
        table: TableKind = "auto",
        table_dtype: torch.dtype = torch.float32,
        weight_decay: float = 0.0,
        l1: float = 0.0,
        max_table_bytes: int = 2**30,
    ) -> None:
        options = {
            "lr": lr,
            "num_samples": num_samples,
            "table": table,
            "table_dtype": table_dtype,
            "weight_decay": weight_decay,
            "l1": l1,
            "max_table_bytes": max_table_bytes,
            "torsh_version": FORMAT,
        }
        _check(options)
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its part of the table begins with zeros.

        Args:
            param_group: ``params`` and, where they differ, ``lr``, ``weight_decay`` and ``l1``.

        Raises:
            ValueError: An option is unknown, out of range or must be the same for all groups, or
                the table becomes too large.
        """
        if isinstance(param_group, dict):
            known = {"params", "param_names", "initial_lr", *self.defaults}
            unknown = sorted(param_group.keys() - known)
            if unknown:
                raise ValueError(
                    f"unknown option {unknown[0]!r} in a parameter group; SAGA takes lr, "
                    "weight_decay and l1"
                )
            shared = self.param_groups[0] if self.param_groups else self.defaults
            for key in _SHARED:
                if param_group.get(key, shared[key]) != shared[key]:
                    raise ValueError(
                        f"{key}={param_group[key]!r} in a parameter group; it is {shared[key]!r} "
                        "for all groups: give it to SAGA itself"
                    )
            param_group = {**{key: shared[key] for key in _SHARED}, **param_group}
            _check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if not param.is_floating_point():
                kind = param.dtype
                self.param_groups.pop()
                raise ValueError(f"SAGA updates floating-point tensors, got {kind}")
        if self.param_groups[0]["table"] == "full":
            try:
                self._check_size("full", [param.numel() for param in self._params()])
            except ValueError:
                self.param_groups.pop()
                raise

    def _params(self) -> list[Tensor]:
        return list(chain.from_iterable(group["params"] for group in self.param_groups))

    def _check_size(self, kind: str, widths: Iterable[int], checked: bool = False) -> None:
        group = self.param_groups[0]
        limit, dtype = group["max_table_bytes"], group["table_dtype"]
        table_rows.check_size(kind, group["num_samples"], widths, dtype, limit, checked)

    @property
    def table_bytes(self) -> int:
        """Bytes of the table so far, with scales and checksums, without its mean; 0 at first."""
        return sum(
            tensor.nbytes
            for state in self.state.values()
            for key, tensor in state.items()
            if key != "gradient_mean"
        )

    # --- the step ---

    @overload
    def step(self, closure: None = None, *, index: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any], *, index: Index | None = None) -> Any: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, index: Index | None = None) -> Any:
        """Take a step with a batch of samples.

        Without arguments and with learning rate 0 in all groups nothing happens:
        ``torch.distributed.checkpoint`` takes such a step before it loads.

        Args:
            closure: Evaluates the model on the batch and returns the mean loss, or the losses
                ``(batch,)``. It need not call ``backward``, and may.
            index: Numbers of the samples of the batch, in ``[0, num_samples)``, in its order. A
                number may occur twice. Those on a device are waited for.

        Returns:
            What the closure returned.

        Raises:
            IndexError: A number is out of range.
            RuntimeError: The loss does not fit the table, a gradient is not finite, or the input
                of a sample in a scalar table has changed. Nothing has been changed then.
            TypeError: ``index`` holds no integers, or is a mask.
            ValueError: ``closure`` or ``index`` is missing, or the table would be too large.
        """
        if closure is None:
            if index is None and all(float(group["lr"]) == 0 for group in self.param_groups):
                return None
            raise ValueError("SAGA.step needs a closure that returns the loss of the batch")
        if index is None:
            raise ValueError(
                "SAGA.step needs index=, the numbers of the batch's samples from 0 to "
                f"{self.param_groups[0]['num_samples'] - 1}: without them it would be plain SGD; "
                "let the data set return its index with each item"
            )
        numbers = sample_numbers(index, self.param_groups[0]["num_samples"])
        params = self._params()
        batch = len(numbers)
        for param in params:
            param.grad = None
        with torch.enable_grad(), run_eagerly(), LinearCalls(params) as layers:
            loss = closure()
            if not isinstance(loss, Tensor) or loss.dim() > 1:
                found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise RuntimeError(
                    f"the closure must return the mean loss or the losses (batch,), got {found}"
                )
            if loss.dim() == 1 and len(loss) != batch:
                raise RuntimeError(f"the closure returned {len(loss)} losses for {batch} numbers")
            kind = self._kind(layers, batch, loss)
            rows = self._backward(loss, params, kind)
        where = index if isinstance(index, Tensor) else torch.tensor(numbers)
        where = where.reshape(-1).to(params[0].device, torch.int64)
        once = None
        if len(set(numbers)) < batch:  # the table changes once for a sample that occurs twice
            last = {number: i for i, number in enumerate(numbers)}
            once = torch.zeros(batch, 1, dtype=torch.float64, device=where.device)
            once[list(last.values())] = 1
        dtype = self.param_groups[0]["table_dtype"]
        update = Update(self.state, dtype, where, once)
        if rows is not None:
            update.add_rows(params, rows)
        else:
            update.add_layers(layers.calls, params, kind == "scalar")
        update.store(self.param_groups[0]["num_samples"])
        for group in self.param_groups:
            for param in group["params"]:
                if param in update.change:
                    self._apply(param, update, group)
        return loss

    def _kind(self, layers: LinearCalls, batch: int, loss: Tensor) -> str:
        """Choose the table in the first step; see that the model fits it in all."""
        kind = self.param_groups[0]["table"]
        obstacle = layers.obstacle()
        if kind == "auto":
            if obstacle is not None:
                kind = "full"
            else:
                calls = layers.calls
                kind = "scalar" if len(calls) == 1 and calls[0].fixed_input else "factored"
        checked = False
        if kind == "full":
            if loss.dim() == 0 and batch > 1:
                why = f" (auto chose it: {obstacle})" if obstacle else ""
                raise RuntimeError(
                    f"the full table{why} needs the gradient of each of the {batch} samples; "
                    "return the losses (batch,), as with reduction='none', or give one number: of "
                    "a sample, or of a fixed minibatch"
                )
            widths = [param.numel() for param in self._params()]
        else:
            if obstacle is None and kind == "scalar" and len(layers.calls) != 1:
                obstacle = f"{len(layers.calls)} linear layers are called"
            if obstacle is not None:
                others = "'factored' or 'full'" if kind == "scalar" else "'full'"
                raise RuntimeError(f"the {kind} table does not fit: {obstacle}; use table={others}")
            for call in layers.calls:
                if len(call.input) != batch:
                    raise RuntimeError(
                        f"index has {batch} numbers, but {call.layer} got {len(call.input)} rows"
                    )
            mine = set(map(id, self._params()))
            inputs = [c.layer.in_features for c in layers.calls if id(c.layer.weight) in mine]
            widths = [call.layer.out_features for call in layers.calls]
            widths += inputs if kind == "factored" else []
            checked = kind == "scalar" and bool(inputs)
        self._check_size(kind, widths, checked)
        for group in self.param_groups:
            group["table"] = kind
        return kind

    def _backward(self, loss: Tensor, params: list[Tensor], kind: str) -> list[Tensor] | None:
        """Fill the gradients; return those of each sample if the table is full."""
        needed = [param for param in params if param.requires_grad]
        if kind == "full" and loss.dim() == 1 and len(loss) > 1:
            eye = torch.eye(len(loss), dtype=loss.dtype, device=loss.device)
            found = torch.autograd.grad(loss, needed, eye, is_grads_batched=True, allow_unused=True)
            by_param = dict(zip(needed, found, strict=True))
            rows = []
            for param in params:
                grad = by_param.get(param)
                rows.append(param.new_zeros(len(loss), param.numel()) if grad is None else grad)
                if grad is not None:
                    param.grad = grad.mean(0)
            return [row.flatten(1) for row in rows]
        if all(param.grad is None for param in params):
            (loss.mean() if loss.dim() else loss).backward()
        if kind != "full":
            return None
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        return [grad.reshape(1, -1) for grad in grads]

    def _apply(self, param: Tensor, update: Update, group: dict[str, Any]) -> None:
        """Replace the gradient by the estimate, and move."""
        state = self.state[param]
        if "gradient_mean" not in state:  # the mean of the table
            state["gradient_mean"] = torch.zeros_like(param, dtype=torch.float64)
        mean = state["gradient_mean"]
        estimate = torch.add(mean, update.old_sum[param], alpha=-1 / update.batch)
        if param.grad is not None:
            estimate += param.grad
        mean.add_(update.change[param], alpha=1 / group["num_samples"])
        if param.requires_grad:  # one frozen for a while keeps its part of the table
            param.grad = estimate.to(param.dtype)
            _move(param, estimate, group)

    # --- state dictionaries and files ---

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by SAGA; the run continues bit for bit.

        Tables keep their element type, whatever the parameter's. Where both sides name their
        parameters, the names decide.

        Args:
            state_dict: What ``state_dict`` returned; not changed.

        Raises:
            ValueError: Groups, shapes, types or the number of samples do not fit, or another
                optimizer saved the state.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            if result is not None:
                state_dict = result
        table_rows.check_saved(state_dict["param_groups"], FORMAT)
        saved_groups = align_groups(self.param_groups, state_dict["param_groups"])
        targets = match_params(self.param_groups, saved_groups)
        groups = []
        for own, saved in zip(self.param_groups, saved_groups, strict=True):
            kept = {key: own[key] for key in ("params", "param_names") if key in own}
            kept["torsh_version"] = FORMAT
            groups.append({**self.defaults, **copy.deepcopy(saved), **kept})
            _check(groups[-1])
        self._check_samples(groups[0])
        entries = {}
        for number, values in state_dict["state"].items():
            if number not in targets:
                raise ValueError(f"state {number!r} of the loaded state belongs to no parameter")
            param, _, name = targets[number]
            entries[param] = {
                key: table_rows.fitted(key, value, param, name, groups[0])
                for key, value in values.items()
            }
        self._restore(entries, groups)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _check_samples(self, saved: dict[str, Any]) -> None:
        num_samples = self.param_groups[0]["num_samples"]
        if saved["num_samples"] != num_samples:
            raise ValueError(
                f"the loaded table is for num_samples={saved['num_samples']}, this SAGA for "
                f"{num_samples}; load a table of the same data"
            )

    def _restore(
        self, entries: dict[Tensor, dict[str, Tensor]], groups: list[dict[str, Any]]
    ) -> None:
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        state.update(entries)
        self.__setstate__({"state": state, "param_groups": groups})

    def save_table(self, path: str | Path) -> None:
        """Write the table and its mean to a compressed file, losslessly.

        The file replaces an older one only when it is complete and on disk: a process killed at
        any moment leaves the old or the new one. It holds neither weights nor learning rates.

        Args:
            path: The file. ``path + '.tmp'`` is used on the way.

        Raises:
            RuntimeError: There is no table before the first step.
        """
        if not self.state:
            raise RuntimeError("there is no table to save before the first step")
        tensors = {
            f"{name}/{key}": value
            for name, param in self._named()
            for key, value in self.state.get(param, {}).items()
        }
        group = self.param_groups[0]
        facts = {
            "num_samples": group["num_samples"],
            "table": group["table"],
            "table_dtype": str(group["table_dtype"]).removeprefix("torch."),
        }
        write_tensors(Path(path), tensors, facts)

    def load_table(self, path: str | Path) -> None:
        """Read what :meth:`save_table` wrote; with the weights of that moment the run continues.

        Args:
            path: The file.

        Raises:
            ValueError: The file is damaged, naming the chunk, or of other data or another model.
        """
        tensors, facts = read_tensors(Path(path))
        shared = {
            "num_samples": facts.get("num_samples"),
            "table": facts.get("table"),
            "table_dtype": getattr(torch, str(facts.get("table_dtype")), None),
        }
        groups = [{**group, **shared} for group in self.param_groups]
        try:
            _check(groups[0])
        except TypeError as error:
            raise ValueError(f"{path}: {error}") from error
        self._check_samples(shared)
        named = dict(self._named())
        entries: dict[Tensor, dict[str, Tensor]] = {}
        for entry, value in tensors.items():
            name, _, key = entry.rpartition("/")
            if name not in named:
                raise ValueError(
                    f"{path} has {entry!r}, but there is no parameter {name!r}; parameters are "
                    f"{sorted(named)}"
                )
            param = named[name]
            fitted = table_rows.fitted(key, value, param, f"parameter {name!r}", groups[0])
            entries.setdefault(param, {})[key] = fitted
        self._restore(entries, groups)

    def _named(self) -> list[tuple[str, Tensor]]:
        """Names of the parameters, or their numbers."""
        named: list[tuple[str, Tensor]] = []
        for group in self.param_groups:
            names = group.get("param_names")
            for i, param in enumerate(group["params"]):
                named.append((names[i] if names else str(len(named)), param))
        return named


def _move(param: Tensor, estimate: Tensor, group: dict[str, Any]) -> None:
    """Go down the estimate and the L2 term, then through the proximal map of the L1 term."""
    lr = float(group["lr"])
    if group["weight_decay"]:
        estimate = estimate.add(param, alpha=group["weight_decay"])
    param.add_(estimate.to(param.dtype), alpha=-lr)
    if group["l1"]:
        param.copy_(F.softshrink(param, lr * group["l1"]))


def _check(options: dict[str, Any]) -> None:
    for key in ("lr", "weight_decay", "l1"):
        value = options[key]
        if isinstance(value, str | bool):
            raise TypeError(f"{key}={value!r} is a {type(value).__name__}, not a number")
        if isinstance(value, Tensor) and (key != "lr" or value.numel() != 1):
            raise ValueError(f"{key} is a tensor of shape {tuple(value.shape)}; give a number")
        if not 0.0 <= float(value) < float("inf"):
            raise ValueError(f"{key}={value!r} must be a finite number of at least 0")
    for key in ("num_samples", "max_table_bytes"):
        value = options[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key}={value!r} must be an integer of at least 1")
    if options["table"] not in _KINDS:
        raise ValueError(f"table={options['table']!r} must be one of {', '.join(_KINDS)}")
    if options["table_dtype"] not in table_rows.TABLE_DTYPES:
        raise TypeError(
            f"table_dtype={options['table_dtype']!r} must be torch.float32, torch.bfloat16, "
            "torch.int8 or torch.float64"
        )
