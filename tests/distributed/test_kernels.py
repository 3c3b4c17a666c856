import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torsh_dist import _codec
from torsh_dist._wire import plan

kernels = pytest.importorskip("torsh_dist._kernels", reason="needs triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INT8, FP32 = torch.int8, torch.float32
BUCKETS = [
    [("w", 300, INT8), ("b", 5, FP32), ("v", 7001, INT8)],
    [("a", 256, INT8), ("b", 1, INT8)],
    [("a", 1, INT8)],
]


def buckets(numel, dtype):
    values = torch.randn(numel) * torch.logspace(-44, 4, numel)
    if numel > 400:
        values[7], values[350], values[400] = float("nan"), float("-inf"), torch.finfo(dtype).max
    return values.to(dtype).to(DEVICE)


def bits(tensor):
    return tensor.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[tensor.element_size()])


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("group", [32, 256, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_their_twins_bit_for_bit(world, group, dtype):
    for params in BUCKETS:
        layout = plan(params, world, group)
        bucket = buckets(sum(numel for _, numel, _ in params), dtype)
        residual = 1e-3 * torch.randn(world, layout.codes.width, device=DEVICE)
        rows = torch.zeros(world, layout.row_bytes, dtype=torch.uint8, device=DEVICE)
        for rank in range(world):
            results = []
            for module in (_codec, kernels):
                ours, owed, sent = bucket.clone(), residual.clone(), rows.clone()
                module.encode(ours, owed, sent, layout, rank)
                results.append([owed.clone(), sent.clone()])
                module.reduce(owed, sent, layout, rank)
                results[-1] += [owed, sent]
                module.decode(ours, sent, layout)
                results[-1].append(ours)
            for slow, fast in zip(results[0][:4], results[1][:4], strict=True):
                assert torch.equal(bits(slow), bits(fast))
            slow, fast = results[0][4], results[1][4]
            if dtype == torch.bfloat16 and DEVICE == "cpu":
                # The interpreter cuts the last bits of a bfloat16 off where a GPU rounds.
                torch.testing.assert_close(slow, fast, rtol=2**-7, atol=1e-38, equal_nan=True)
            else:
                assert torch.equal(slow.isnan(), fast.isnan())
                assert torch.equal(bits(slow.nan_to_num(0.0)), bits(fast.nan_to_num(0.0)))


COMPILE = """
import re, subprocess, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from torsh_dist import _kernels

POINTERS = {"bucket": "*fp32", "residual": "*fp32", "codes": "*i8", "scales": "*fp32"}
ALIGNED = {*POINTERS, "numel", "code_stride", "width"}
for kernel in (_kernels.encode_kernel, _kernels.reduce_kernel, _kernels.decode_kernel):
    shape = dict(_kernels._shape(256))
    options = {key: shape.pop(key) for key in ("num_warps", "enable_fp_fusion")}
    names = kernel.arg_names
    kinds = {"divisor": "fp32", **POINTERS, **dict.fromkeys(shape, "constexpr")}
    source = ASTSource(
        fn=kernel,
        signature={name: kinds.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in shape.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in ALIGNED},
    )
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = built.asm["ptx"]
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx, kernel
    assert not re.search(r"(ld|st)\\.global[.\\w:]*\\.b8\\b", ptx), "bytes travel one by one"
    assert not re.search(r"\\bfma\\.", ptx), "rounding steps were fused"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    assert "STACK:0 " in usage and "LOCAL:0 " in usage, usage
    print(kernel.fn.__name__, re.search(r"REG:\\d+", usage)[0])
"""


def test_compile_for_hopper_with_vector_loads_and_no_spills():
    tool = pytest.importorskip("triton").__path__[0] + "/backends/nvidia/bin/cuobjdump"
    if not Path(tool).exists():
        pytest.skip(f"this triton brings no {Path(tool).name}")
    sources = str(Path(__file__).parents[2] / "torsh_dist" / "src")
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": sources}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("REG:") == 3
