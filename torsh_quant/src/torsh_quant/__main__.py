"""The torsh-quant command."""

import json as json_format
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torsh_quant import __version__
from torsh_quant._command_input import UsageError, named_data, named_model
from torsh_quant._doctor import Diagnosis, diagnose
from torsh_quant._explain import Explanation, plan_for
from torsh_quant._explain import explain as explained
from torsh_quant._file import FILE_NAME, save, saved_layers
from torsh_quant._hf import copy_beside
from torsh_quant._quantize import DEFAULT_SKIP
from torsh_quant._quantize import quantize as quantized
from torsh_quant._scores import Score
from torsh_quant._sensitivity import sensitivity as measured


def quantize(
    model: str,
    out: Path,
    /,
    *,
    scheme: str = "w8a8",
    method: tuple[str, ...] = ("rtn",),
    data: Path | None = None,
    batch_size: int = 32,
    length: int = 128,
    max_batches: int = 128,
    skip: tuple[str, ...] = DEFAULT_SKIP,
    override: tuple[str, ...] = (),
    observer: str = "mse",
    resume: Path | None = None,
    device: str = "cpu",
    strict: bool = False,
    force: bool = False,
    json: bool = False,
) -> None:
    """Quantize a model and write it to one safetensors file.

    A model of Hugging Face's is written to a folder, with its configuration and tokenizer; load it
    with torsh_quant.load(folder).

    Args:
        model: package.module:factory, called for the float model, or a folder with a model of
            Hugging Face's.
        out: File to write; for a folder, the folder.
        scheme: w8a8, w8a8-static, w8a16, w4a16, w4a8, w4a16-g32-asym and so on.
        method: One or several of rtn, hqq, gptq, adaround, equalize, smoothquant, bias_correction.
        data: Calibration data: .safetensors or .pt with tensors by argument name, batch dimension
            first, or text for a model with a tokenizer.
        batch_size: Samples of a batch.
        length: Most tokens of a sample of text.
        max_batches: Most batches to use.
        skip: Layers that stay float, by pattern.
        override: Schemes of single layers, as PATTERN=SCHEME; PATTERN=float keeps them float.
        observer: How static schemes choose ranges: minmax, moving_average, percentile, entropy or
            mse.
        resume: Folder that keeps finished work; a killed run goes on there.
        device: Where to work: cpu or cuda.
        strict: Fail where a layer would run slowly.
        force: Replace what is there.
        json: Print JSON instead of a table.
    """
    overrides = _overrides(override)
    if out.exists() and not force:
        raise UsageError(f"{str(out)!r} exists; --force replaces it")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {str(out.parent)!r}")
    net, folder = named_model(model, device)
    if folder is not None and out.exists() and (not out.is_dir() or out.samefile(folder)):
        raise UsageError(f"{str(out)!r} must be a folder other than MODEL's")
    batches = None if data is None else named_data(data, net, folder, batch_size, length)
    made = quantized(
        net,
        scheme,
        data=batches,
        method=list(method),
        skip=skip,
        overrides=overrides,
        observer=observer,
        max_batches=max_batches,
        resume=resume,
        inplace=True,
        strict=strict,
        progress=False if json else None,
    )
    report: Any = made.quant_report
    place = out
    if folder is not None:
        out.mkdir(exist_ok=True)
        copy_beside(folder, out)
        place = out / FILE_NAME
    save(made, place)
    if json:
        _print_json({"file": str(place), "file_bytes": place.stat().st_size, **asdict(report)})
    else:
        print(report)
        print(f"{place}: {place.stat().st_size:,} bytes")


def explain(
    target: str,
    /,
    *,
    scheme: str | None = None,
    device: str = "cpu",
    json: bool = False,
) -> None:
    """Say which kernel each layer runs on here, and what to expect of it.

    Args:
        target: A file or folder that quantize wrote, or a model as quantize takes it.
        scheme: Say it of the float model in this scheme.
        device: cpu or cuda.
        json: Print JSON instead of a table.
    """
    if Path(target).is_file():
        if scheme is not None:
            raise UsageError("--scheme goes with a float model, not with a file")
        layers = saved_layers(target).items()
        plan = Explanation(
            tuple(plan_for(name, layer.to_empty(device=device)) for name, layer in layers)
        )
    else:
        model = named_model(target, device)[0]
        plan = explained(model if scheme is None else quantized(model, scheme, inplace=True))
    if json:
        _print_json(asdict(plan))
    else:
        print(plan)


def sensitivity(
    model: str,
    /,
    *,
    data: Path,
    schemes: tuple[str, ...] = ("w8a8", "w4a16"),
    score: Score = "kl",
    batch_size: int = 32,
    length: int = 128,
    max_batches: int = 128,
    resume: Path | None = None,
    plot: Path | None = None,
    device: str = "cpu",
    json: bool = False,
) -> None:
    """Measure what quantizing each layer alone does to the output of a model.

    Args:
        model: package.module:factory, called for the float model, or a folder with a model of
            Hugging Face's.
        data: Data to measure on: .safetensors or .pt with tensors by argument name, batch dimension
            first, or text for a model with a tokenizer.
        schemes: Schemes to measure.
        score: What to measure.
        batch_size: Samples of a batch.
        length: Most tokens of a sample of text.
        max_batches: Most batches to use.
        resume: Folder that keeps finished work; a killed run goes on there.
        plot: Picture to write: .svg, .png or .pdf.
        device: Where to work: cpu or cuda.
        json: Print JSON instead of a table.
    """
    net, folder = named_model(model, device)
    batches = named_data(data, net, folder, batch_size, length)[:max_batches]
    batches = [_moved(batch, device) for batch in batches]
    kept: dict[str, Any] = {} if resume is None else {"resume": resume}
    found = measured(net, batches, schemes, score=score, **kept)
    if plot is not None:
        _draw(found, plot)
    print(found.to_json() if json else found.table())


def doctor(*, json: bool = False) -> None:
    """Say what this machine has, which kernels run on it, and whether they are exact.

    Args:
        json: Print one JSON object instead of tables.
    """
    found = diagnose()
    if json:
        _print_json({"torsh_quant": __version__, **asdict(found)})
    else:
        _print_tables(found)
    if not all(found.self_check.values()):
        raise SystemExit(1)


def _overrides(pairs: tuple[str, ...]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for pair in pairs:
        pattern, equals, scheme = pair.rpartition("=")
        if not (equals and pattern and scheme):
            raise UsageError(f"--override {pair!r} is not of the form PATTERN=SCHEME")
        found[pattern] = None if scheme == "float" else scheme
    return found


def _moved(batch: Any, device: str) -> Any:
    if isinstance(batch, dict):
        return {name: tensor.to(device) for name, tensor in batch.items()}
    return batch.to(device)


def _draw(found: Any, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'torsh-quant[plot]'") from None
    figure = Figure(figsize=(max(6.0, 0.2 * len(found.layers)), 5), layout="constrained")
    if path.suffix.removeprefix(".") not in figure.canvas.get_supported_filetypes():
        raise UsageError(f"--plot={str(path)!r} is no kind of picture; use .svg, .png or .pdf")
    found.plot(figure.add_subplot())
    figure.savefig(path)


def _print_json(found: dict[str, Any]) -> None:
    print(json_format.dumps(found, indent=1))


def _print_tables(found: Diagnosis) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    console.print(f"torsh-quant {__version__}, {versions}")
    console.print(f"CPU: {found.cpu}, VNNI {'yes' if found.vnni else 'no'}")
    for name, value in found.capped.items():
        console.print(f"[yellow]{name}={value} keeps a library from using all of the CPU[/]")
    console.print(f"CUDA: {', '.join(found.devices) or 'none'}")
    checks = Table("integer kernel", "sums on full-range data", title="Self-check")
    for name, exact in found.self_check.items():
        checks.add_row(name, "[green]exact[/]" if exact else "[red]WRONG[/]")
    console.print(checks)
    paths = Table("device", "layer", "scheme", "kernel", "act bits", "gain", "why not more")
    for path in found.paths:
        bits = "float" if path.act_bits is None else str(path.act_bits)
        paths.add_row(
            path.device, path.layer, path.scheme, path.kernel, bits, path.gain, path.reason
        )
    console.print(paths)


def _say(message: object, *_: object, **__: object) -> None:
    print(f"torsh-quant: {str(message).strip()}", file=sys.stderr)


def main() -> None:
    """Run the command line."""
    try:
        from tyro.extras import subcommand_cli_from_dict
    except ImportError:
        message = "torsh-quant needs its command-line extra: pip install 'torsh-quant[cli]'"
        raise SystemExit(message) from None
    commands = {
        "quantize": quantize,
        "explain": explain,
        "sensitivity": sensitivity,
        "doctor": doctor,
    }
    warnings.showwarning = _say
    try:
        subcommand_cli_from_dict(
            commands, prog="torsh-quant", description=sys.modules["torsh_quant"].__doc__
        )
    except UsageError as error:
        _say(error)
        raise SystemExit(2) from None
    except (ValueError, RuntimeError, TypeError, OSError, ImportError) as error:
        _say(error)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
