import importlib
import inspect
import types

import pytest

from tests.house.packages import PACKAGES


@pytest.mark.parametrize("name", PACKAGES)
def test_import_finds_the_sources_and_not_an_empty_namespace(name):
    assert importlib.import_module(name).__file__ is not None


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names_are_listed_once_and_real(name):
    package = importlib.import_module(name)
    listed = package.__all__  # ruff keeps it sorted
    assert len(listed) == len(set(listed))
    assert len(listed) > 1, "a package with no public name but its version"
    for public in listed:
        assert hasattr(package, public), public


@pytest.mark.parametrize("name", PACKAGES)
def test_nothing_public_is_left_out_of_the_list(name):
    package = importlib.import_module(name)
    unlisted = [
        attribute
        for attribute, value in vars(package).items()
        if not attribute.startswith("_")
        and attribute not in package.__all__
        and not isinstance(value, types.ModuleType)
    ]
    assert unlisted == []


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_class_and_function_is_documented(name):
    package = importlib.import_module(name)
    for public in package.__all__:
        value = getattr(package, public)
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        text = inspect.getdoc(value) or ""
        assert text.splitlines()[:1], f"{name}.{public} has no docstring"
        assert not text.startswith(f"{public}("), f"{name}.{public} has a generated docstring"
        if inspect.isroutine(value) and inspect.signature(value).parameters:
            assert "Args:" in text, f"{name}.{public} does not document its arguments"
