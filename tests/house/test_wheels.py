"""Each package, built and installed alone beside torch, as a user gets it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.house.packages import AREAS, ROOT

UV = Path(sys.executable).with_name("uv")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not UV.exists(), reason="needs the uv of `make test`'s environment"),
]


def run(*command: object, expect: int = 0) -> str:
    words = [str(word) for word in command]
    # A user's environment: the interpreter that the tests switch on needs NumPy.
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(words, capture_output=True, text=True, cwd="/", env=env, timeout=600)
    assert result.returncode == expect, f"{' '.join(words)}\n{result.stdout}\n{result.stderr}"
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    for area in AREAS:
        run(UV, "build", "--quiet", "--wheel", "--out-dir", folder, ROOT / f"torsh_{area}")
    return {area: next(folder.glob(f"torsh_{area}-*.whl")) for area in AREAS}


@pytest.mark.parametrize("area", AREAS)
def test_wheel_is_pure_typed_and_licensed(wheels, area):
    wheel = wheels[area]
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert f"torsh_{area}/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {f"torsh_{area}"}


@pytest.mark.parametrize("area", AREAS)
def test_wheel_installs_alone_beside_torch(wheels, area, tmp_path):
    python = tmp_path / "env/bin/python"
    pins = ["--quiet", "--python", python, "--constraints", ROOT / "constraints.txt"]
    run(UV, "venv", "--quiet", "--python", sys.executable, tmp_path / "env")
    run(UV, "pip", "install", *pins, "torch", wheels[area])
    installed = run(UV, "pip", "list", "--quiet", "--python", python, "--format", "freeze")
    have = {line.partition("==")[0] for line in installed.split()}
    assert "torch" in have
    for heavy, owner in {"transformers": "text", "pyarrow": "data", "scipy": "nas"}.items():
        assert (heavy in have) == (area == owner), heavy
    assert not have & {"torchvision", "lightning", "scikit-learn", "matplotlib", "tyro", "pandas"}

    # torch itself warns when there is no NumPy; the package must not
    strict = "import torch, warnings; warnings.simplefilter('error')"
    where = run(python, "-c", f"{strict}; import torsh_{area}; print(torsh_{area}.__file__)")
    assert str(tmp_path) in where
    command = python.with_name(f"torsh-{area}")
    assert f"pip install 'torsh-{area}[cli]'" in run(command, "--help", expect=1)

    run(UV, "pip", "install", *pins, f"torsh-{area}[cli] @ file://{wheels[area]}")
    assert "doctor" in run(command, "--help")
    run(command, "doctor", "--json")
    shutil.rmtree(tmp_path / "env")  # several gigabytes of links each
