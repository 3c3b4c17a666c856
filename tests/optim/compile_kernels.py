"""Compiles the kernels for sm_90 without a GPU, and prints what came out as JSON.

A program of its own: the tests run with TRITON_INTERPRET=1, which leaves nothing to compile.
"""

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from torsh_optim import _kernels

POINTERS = {
    "table": "*i64",
    "entries": "*i64",
    "constants": "*fp32",
    "factors": "*fp32",
    "blocks": "*i32",
    "sums": "*fp32",
    "control": "*fp32",
    "partials": "*fp32",
}
FACTORS = {"ramp": "fp32", "factor1": "fp32", "factor2": "fp32"}
# name: rule, states used, coupled, cautious, controlled, partial sums, loads and stores per element
KINDS = {
    "adamw": ("adam", 0b000011, False, False, False, 0, 4, 3),
    "adamw clip": ("adam", 0b000011, False, False, True, 0, 4, 3),
    "adam amsgrad": ("adam", 0b000111, True, False, False, 0, 5, 4),
    "adam ema": ("adam", 0b001011, False, False, True, 0, 5, 4),
    "adam cautious": ("adam", 0b000011, False, True, True, 0, 4, 3),
    "adam adaptive": ("adam", 0b110011, False, False, True, 2, 6, 4),
    "adam amsgrad ema": ("adam", 0b001111, True, False, True, 0, 6, 5),
    "adam all": ("adam", 0b001111, True, True, True, 0, 6, 5),
    "adam all adaptive": ("adam", 0b111111, True, False, True, 2, 8, 6),
    "agree": ("agree", 0b000011, False, True, True, 2, 2, 0),
    "lion": ("lion", 0b000001, False, False, False, 0, 3, 2),
    "sgd": ("sgd", 0b000000, True, False, False, 0, 2, 1),
    "sgd momentum": ("sgd", 0b000001, True, False, False, 0, 3, 2),
    "lamb moments": ("lamb_moments", 0b000011, False, False, True, 2, 4, 2),
    "lamb": ("lamb", 0b000011, False, False, True, 0, 3, 1),
    "norm": ("norm", 0b000000, False, False, False, 1, 1, 0),
}

# name of a kernel: types of its arguments, and its constants
OTHERS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "tensor_sums": (
        {"table": "*i64", "partials": "*fp32", "sums": "*fp32"},
        {"BLOCK": _kernels.BLOCK, "CHUNK": 1024},
    ),
    "total": (
        {"partials": "*fp32", "result": "*fp64", "count": "i32"},
        {"PARTIALS": 2, "CHUNK": 1024},
    ),
    "decide": ({"squares": "*fp64", "control": "*fp32"}, {}),
    "estimate": ({"sums": "*fp64", "control": "*fp32", "inv_d0": "fp32"}, {}),
    **{
        f"advance {kind}": (
            {
                "table": "*i64",
                "entries": "*i64",
                "exponents": "*fp64",
                "counts": "*fp32",
                "control": "*fp32",
                "factors": "*fp32",
                "tensors": "i32",
            },
            {"KIND": kind, "CHUNK": 128},
        )
        for kind in ("bias", "first", "none")
    },
}


def ptxas() -> str:
    """Path of the assembler that comes with Triton."""
    from triton.backends.nvidia import compiler

    if not hasattr(compiler, "get_ptxas"):
        return str(triton.knobs.nvidia.ptxas.path)
    try:
        return str(compiler.get_ptxas(90).path)
    except TypeError:
        return str(compiler.get_ptxas().path)


def compiled(name: str, dtype: tl.dtype) -> dict[str, Any]:
    """Compile one kind of the kernel for one element type."""
    rule, used, coupled, cautious, controlled, partials, loads, stores = KINDS[name]
    block = _kernels.NORM_BLOCK if rule == "norm" else _kernels.BLOCK
    constants: dict[str, Any] = dict.fromkeys(["P", "G", *(f"S{i}" for i in range(6))], dtype)
    constants |= {"RULE": rule, "USED": used, "COUPLED": coupled, "CAUTIOUS": cautious}
    constants |= {"CONTROLLED": controlled, "PARTIALS": partials}
    constants |= {"BLOCK": block, "TAIL": _kernels.TAIL}
    source = ASTSource(
        fn=_kernels.update,
        signature=POINTERS | FACTORS | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(POINTERS))},
    )
    options = {"num_warps": _kernels.NUM_WARPS, "enable_fp_fusion": True}
    options["maxnreg"] = _kernels.registers(used, cautious=cautious)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    found = re.search(r"[.]target (sm_90a?)", ptx)
    assert found is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas(), "-v", f"-arch={found.group(1)}", file.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    size = dtype.primitive_bitwidth // 8
    return {
        "name": name,
        "dtype": str(dtype),
        "loads": len(re.findall(r"ld[.]global[.]v4[.]b32", ptx)),
        "stores": len(re.findall(r"st[.]global[.]v4[.]b32", ptx)),
        # of 16 bytes, for each thread
        "expected_loads": loads * block * size // (_kernels.NUM_WARPS * 32 * 16),
        "expected_stores": stores * block * size // (_kernels.NUM_WARPS * 32 * 16),
        "spills": [int(n) for n in re.findall(r"(\d+) bytes spill", log)],
        "registers": int(re.findall(r"Used (\d+) registers", log)[0]),
    }


def compile_other(name: str) -> None:
    """Compile a kernel that reduces or decides."""
    types, constants = OTHERS[name]
    kernel = getattr(_kernels, name.split()[0])
    unspecialized = {kernel.arg_names[i] for i in kernel.do_not_specialize if isinstance(i, int)}
    unspecialized |= {i for i in kernel.do_not_specialize if isinstance(i, str)}
    integers = {argument for argument, kind in types.items() if kind == "i32"}
    assert integers <= unspecialized, "a value of 1 would become a constant"
    source = ASTSource(
        fn=kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
    )
    triton.compile(source, target=GPUTarget("cuda", 90, 32))


if __name__ == "__main__":
    for other in OTHERS:
        compile_other(other)
    names = sys.argv[1:] or list(KINDS)
    print(json.dumps([compiled(n, d) for n in names for d in (tl.float32, tl.bfloat16)]))
