"""The command that converts the optimizer state in a checkpoint."""

import json as json_format
import re
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from torsh_optim._adam import AdvancedAdam
from torsh_optim._convert import Kind, state_from, state_to
from torsh_optim._foreign_moments import unnested
from torsh_optim._foreign_options import PACKAGES
from torsh_optim._lamb import LAMB
from torsh_optim._lion import Lion
from torsh_optim._sgd import SGD
from torsh_optim._state_file import SUFFIX, read_checkpoint, write_checkpoint

FileKind = Literal["torsh"] | Kind

_ALGORITHMS = {"adam": AdvancedAdam, "lamb": LAMB, "lion": Lion, "sgd": SGD}
_PARTITIONED = {"base_optimizer_state", "fp32_groups_flat", "fp32_flat_groups"}
_DEPTH = 4  # how far below the top of a file a state is looked for
_PATIENCE = 2.0  # seconds before progress is shown


@dataclass(frozen=True)
class Part:
    """Tensors or numbers of one name in the states of all parameters.

    Attributes:
        name: The key, such as ``exp_avg``.
        count: Number of parameters that have it.
        dtypes: Element types of the tensors; ``number`` for what is none.
        num_bytes: Of all its tensors together.
    """

    name: str
    count: int
    dtypes: tuple[str, ...]
    num_bytes: int


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        source: File that was read.
        target: File that was written.
        source_kind: Whose state it was.
        target_kind: Whose state it is now.
        key: Where in the file the state is; empty if it is the whole file.
        parameters: Number of parameters with a state.
        read: The parts of the state before.
        written: The parts of the state after.
        options: Group options that are the same after.
        dropped: Group options that the new state does not have.
        warnings: What got lost and changes the result.
        kept: Other keys of the file, which are as they were.
        left_out: Other keys of the file that the new one does not have.
    """

    source: str
    target: str
    source_kind: str
    target_kind: str
    key: str
    parameters: int
    read: tuple[Part, ...]
    written: tuple[Part, ...]
    options: tuple[str, ...]
    dropped: tuple[str, ...]
    warnings: tuple[str, ...]
    kept: tuple[str, ...]
    left_out: tuple[str, ...]


def convert(
    source: Path,
    target: Path,
    /,
    *,
    from_: FileKind,
    to: FileKind,
    key: str = "",
    algorithm: Literal["adam", "lamb", "lion", "sgd"] | None = None,
    bits: Literal[32, 8] = 32,
    force: bool = False,
    json: bool = False,
) -> None:
    """Convert the optimizer state in a checkpoint to that of another package.

    The state is found in what torch.save wrote of an optimizer, in a checkpoint of Lightning, in
    optimizer.pt of the Hugging Face Trainer, or in a dictionary of your own. Everything else in the
    file stays as it is. Files are read without unpickling, so they cannot run code.

    Args:
        source: File to read.
        target: File to write. One named *.safetensors gets the optimizer state alone.
        from_: Whose state it is; te is TransformerEngine, bnb is bitsandbytes.
        to: Whose state to write; torsh is what the optimizers of this package save.
        key: Where the state is if the file has several, such as optimizer_states.1.
        algorithm: What a state of bitsandbytes belongs to that does not say it: lion or sgd.
        bits: 8 writes moments of bitsandbytes as 8-bit codes.
        force: Replace the target if it exists.
        json: Print JSON instead of tables.
    """
    if target.exists() and not force:
        raise SystemExit(f"{target} exists; --force replaces it")
    if not target.absolute().parent.is_dir():
        raise SystemExit(f"there is no folder {target.parent}")
    if from_ == to and source.suffix == target.suffix:
        raise SystemExit(f"--from {from_} --to {to} has nothing to convert")
    if algorithm is not None and from_ != "bnb":
        raise SystemExit("--algorithm is for --from bnb: the other states say it themselves")
    if bits != 32 and to != "bnb":
        raise SystemExit(f"--bits {bits} is for --to bnb")
    try:
        with _Progress() as progress:
            progress.show(f"reading {source}")
            content = read_checkpoint(source)
            path, found = _find(content, key)
            if found.keys() & _PARTITIONED:
                raise ValueError(
                    "the flat partitions of DeepSpeed do not have the shapes of the parameters; "
                    "in Python, state_from(shards, kind='deepspeed', target=optimizer) takes them "
                    "from the optimizer that will load the state"
                )
            _check_kind(found, from_)
            progress.show("converting")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                state = _converted(found, from_, to, algorithm, bits)
            whole = state if target.suffix == SUFFIX else _replaced(content, path, state)
            progress.show(f"writing {target}", total=_num_bytes(whole))
            write_checkpoint(target, whole, progress=progress.advance)
    except (ValueError, TypeError, OSError, ImportError) as error:
        text = str(error)
        if "target=optimizer" in text and from_ == "bnb":
            text = "the state does not say what it belongs to; --algorithm lion or sgd does"
        text, contradicted, _ = text.partition(", but target is a ")
        if contradicted:
            text += f", which --algorithm {algorithm} contradicts"
        raise SystemExit(text if str(source) in text else f"{source}: {text}") from None
    others = tuple(map(str, content)) if path else ()
    others = tuple(other for other in others if path and other != str(path[0]))
    alone = target.suffix == SUFFIX
    before, after = _options(found), _options(state)
    done = Conversion(
        source=str(source),
        target=str(target),
        source_kind=from_,
        target_kind=to,
        key=".".join(map(str, path)),
        parameters=len(state["state"]),
        read=_parts(found),
        written=_parts(state),
        options=tuple(option for option in before if option in after),
        dropped=tuple(option for option in before if option not in after),
        warnings=tuple(str(warning.message) for warning in caught),
        kept=() if alone else others,
        left_out=others if alone else (),
    )
    if json:
        sys.stdout.write(json_format.dumps(asdict(done)) + "\n")
    else:
        _show(done)


def _converted(
    found: Mapping[str, Any],
    from_: FileKind,
    to: FileKind,
    algorithm: str | None,
    bits: Literal[32, 8],
) -> dict[str, Any]:
    state = dict(found)
    if from_ != "torsh" and from_ != to:
        # only looked at, to tell the algorithm
        target = None if algorithm is None else _ALGORITHMS[algorithm]([torch.zeros(0)])
        state = state_from(state, kind=from_, target=target)
    if to != "torsh" and from_ != to:
        try:
            state = state_to(state, kind=to, bits=bits)
        except ValueError as error:
            raise ValueError(re.sub(r"kind='(\w+)'", r"--to \1", str(error))) from None
    return state


def _check_kind(found: Mapping[str, Any], from_: FileKind) -> None:
    """Refuse a state that is visibly not what it is said to be."""
    kinds = _kinds(found)
    if kinds and from_ not in kinds:
        names = " or ".join("torsh_optim" if k == "torsh" else PACKAGES[k] for k in kinds)
        ways = " or ".join(f"--from {kind}" for kind in kinds)
        raise ValueError(f"this looks like a state of {names}, not of {from_}: {ways}")


def _kinds(found: Mapping[str, Any]) -> tuple[str, ...]:
    """Whose state it can be, as far as its options and the names of its tensors tell; or empty."""
    options: set[str] = set().union(*found["param_groups"])
    kept: set[str] = set().union(*map(unnested, found["state"].values()))
    if "torsh_version" in options:
        return ("torsh",)
    if "state1" in kept or {"alpha", "t_alpha"} <= options:
        return ("bnb",)
    if any(key.startswith(("lookahead_", "svrg_")) for key in options):
        return ()  # one of our wrappers around a torch optimizer
    if {"foreach", "differentiable"} <= options:
        return ("torch",)
    if {"bias_correction", "betas"} <= options:
        return ("apex", "te", "deepspeed")  # they have one origin
    return ()


def _find(content: Any, key: str) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Find the optimizer state in a file.

    Returns:
        The keys that lead to it, and the state.
    """
    states = dict(_states(content, ()))
    names = {".".join(map(str, path)): path for path in states}
    if key:
        if key not in names:
            raise ValueError(
                f"no optimizer state at {key!r}; there is one at "
                f"{', '.join(map(repr, names)) or 'no place'}"
            )
        return names[key], states[names[key]]
    if len(states) > 1:
        raise ValueError(f"several optimizer states; give --key, one of {', '.join(names)}")
    if not states:
        have = (
            f"has {', '.join(map(str, content))}"
            if isinstance(content, Mapping)
            else (f"is a {type(content).__name__}")
        )
        raise ValueError(
            f"no optimizer state, which has 'state' and 'param_groups'; the file {have}"
        )
    [(path, found)] = states.items()
    return path, found


def _states(content: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, Any]]:
    if isinstance(content, Mapping):
        if content.keys() >= {"state", "param_groups"} or content.keys() & _PARTITIONED:
            yield path, content
            return
        parts: Any = content.items()
    elif isinstance(content, (list, tuple)):
        parts = enumerate(content)
    else:
        return
    if len(path) < _DEPTH:
        for key, part in parts:
            yield from _states(part, (*path, key))


def _replaced(content: Any, path: tuple[Any, ...], state: dict[str, Any]) -> Any:
    """Copy the containers on the way to the state, with the new one at its place."""
    if not path:
        return state
    key, *rest = path
    inner = _replaced(content[key], tuple(rest), state)
    if isinstance(content, Mapping):
        changed = content.copy() if isinstance(content, dict) else dict(content)
        changed[key] = inner
        return changed
    parts = [inner if i == key else part for i, part in enumerate(content)]
    return type(content)(parts)


def _options(state: Mapping[str, Any]) -> dict[str, None]:
    """Names of the options of all groups, in order."""
    hidden = {"params", "param_names", "torsh_version"}
    return {key: None for group in state["param_groups"] for key in group if key not in hidden}


def _parts(state: Mapping[str, Any]) -> tuple[Part, ...]:
    found: dict[str, list[Any]] = {}
    for values in state["state"].values():
        for name, value in unnested(values).items():
            found.setdefault(str(name), []).append(value)
    return tuple(
        Part(
            name,
            len(values),
            tuple(sorted({_dtype(value) for value in values})),
            _num_bytes(values),
        )
        for name, values in found.items()
    )


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else "number"


def _num_bytes(content: Any) -> int:
    if isinstance(content, Tensor):
        return content.nbytes
    if isinstance(content, Mapping):
        return sum(map(_num_bytes, content.values()))
    return sum(map(_num_bytes, content)) if isinstance(content, (list, tuple)) else 0


def _show(done: Conversion) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    where = f" at {done.key}" if done.key else ""
    console.print(
        f"{done.source}{where} ({done.source_kind}) -> {done.target} ({done.target_kind}), "
        f"{done.parameters:,} parameters",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    for title, parts in (("read", done.read), ("written", done.written)):
        table = Table("state", "parameters", "type", "MiB", title=title)
        for part in parts:
            size = f"{part.num_bytes / 2**20:,.2f}"
            table.add_row(part.name, f"{part.count:,}", ", ".join(part.dtypes), size)
        console.print(table)
    for name, values in (
        ("options kept", done.options),
        ("options dropped", done.dropped),
        ("kept in the file", done.kept),
        ("left out of the file", done.left_out),
    ):
        if values:
            console.print(f"{name}: {', '.join(values)}", highlight=False, markup=False)
    for message in done.warnings:
        console.print(f"warning: {message}", style="yellow", highlight=False, markup=False)


class _Progress:
    """A bar on the standard error stream for what takes long; nothing where that is no terminal."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "_Progress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

            columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn()]
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=None)
            self._timer = threading.Timer(_PATIENCE, self._bar.start)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
            self._bar.stop()

    def show(self, what: str, total: int | None = None) -> None:
        """Begin another part of the work."""
        if self._bar is not None:
            self._bar.update(self._task, description=what, total=total, completed=0)

    def advance(self, num_bytes: int) -> None:
        """Note progress."""
        if self._bar is not None:
            self._bar.advance(self._task, num_bytes)
