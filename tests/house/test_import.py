import subprocess
import sys

import pytest

from tests.house.packages import AREAS, ROOT

LAZY = ["triton", "matplotlib", "rich", "tyro", "sklearn", "lightning", "torchvision", "jinja2"]
SCRIPT = """
import sys
import torch
{needs}
before = set(sys.modules)
import torsh_{area}
loaded = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(sorted(loaded & set({lazy})), torch.cuda.is_initialized(), torch.distributed.is_initialized())
"""


@pytest.mark.parametrize("area", AREAS)
def test_importing_loads_nothing_optional_and_touches_no_device(area):
    needs = "import transformers" if area == "text" else ""
    script = SCRIPT.format(area=area, needs=needs, lazy=LAZY)
    command = [sys.executable, "-W", "error", "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[] False False"


@pytest.mark.parametrize("area", [area for area in AREAS if area != "text"])
def test_only_text_needs_transformers(area):
    script = f"import sys, torsh_{area}; print('transformers' in sys.modules)"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.stdout.strip() == "False", result.stderr
