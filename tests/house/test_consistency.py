import importlib
import re
import tomllib

import pytest

from tests.house.packages import AREAS, PACKAGES, ROOT, TEST_FOLDERS


def test_all_packages_have_one_version():
    versions = {name: importlib.import_module(name).__version__ for name in PACKAGES}
    assert len(set(versions.values())) == 1, versions
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {versions['torsh_optim']}" in citation


@pytest.mark.parametrize("area", AREAS)
def test_licence_is_the_same_in_every_package(area):
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert (ROOT / f"torsh_{area}" / "LICENSE").read_text() == text


@pytest.mark.parametrize("area", AREAS)
def test_changelog_has_the_current_version(area):
    version = importlib.import_module(f"torsh_{area}").__version__
    assert f"## [{version}]" in (ROOT / f"torsh_{area}" / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("area", AREAS)
def test_package_is_typed_and_has_tests(area):
    assert (ROOT / f"torsh_{area}/src/torsh_{area}/py.typed").exists()
    assert list((ROOT / "tests" / TEST_FOLDERS[area]).glob("test_*.py"))


@pytest.mark.parametrize("area", AREAS)
def test_metadata_names_the_floor_and_every_extra(area):
    project = tomllib.loads((ROOT / f"torsh_{area}" / "pyproject.toml").read_text())["project"]
    assert "torch>=2.11" in project["dependencies"]
    assert project["requires-python"] == ">=3.11"
    assert project["scripts"] == {f"torsh-{area}": f"torsh_{area}.__main__:main"}
    extras = project["optional-dependencies"]
    assert extras["all"] == [f"torsh-{area}[{','.join(name for name in extras if name != 'all')}]"]


def test_no_package_brings_a_heavy_dependency_it_need_not():
    allowed = {
        "optim": {"torch"},
        "text": {"torch", "numpy", "transformers", "safetensors"},
        "data": {"torch", "numpy", "pyarrow", "xxhash", "fsspec"},
        "quant": {"torch", "safetensors"},
        "nas": {"torch", "numpy", "scipy"},
        "dist": {"torch"},
    }
    for area in AREAS:
        text = (ROOT / f"torsh_{area}" / "pyproject.toml").read_text()
        needs = tomllib.loads(text)["project"]["dependencies"]
        assert {re.split(r"[<>=!~ \[]", need)[0] for need in needs} == allowed[area], area


def test_pins_name_no_address():
    assert "://" not in (ROOT / "constraints.txt").read_text()
