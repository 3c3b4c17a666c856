import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torsh_nas as nas

names = st.text(min_size=1, max_size=12)


@given(
    choices=st.dictionaries(
        names, st.lists(names, min_size=2, max_size=5, unique=True), min_size=1
    ),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_json_round_trip(choices: dict[str, list[str]], seed: int) -> None:
    space = nas.Space(choices)
    arch = space.sample(torch.Generator().manual_seed(seed))
    back = nas.Architecture.from_json(arch.to_json(), space=space)
    assert back == arch
    assert hash(back) == hash(arch)
    assert back.to_json() == arch.to_json()


SPACE = nas.Space({"a": ("x", "y"), "b": ("x", "y")})
ARCH = SPACE.architecture({"a": "x", "b": "y"})


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "arch.json"
    text = ARCH.to_json(path)
    assert path.read_text() == text
    assert nas.Architecture.from_json(path, space=SPACE) == ARCH
    assert nas.Architecture.from_json(str(path)) == ARCH
    assert [p.name for p in tmp_path.iterdir()] == ["arch.json"]


def test_is_immutable_and_hashable() -> None:
    with pytest.raises(TypeError):
        ARCH["a"] = "y"  # type: ignore[index]
    with pytest.raises(AttributeError):
        ARCH.space_id = "other"  # type: ignore[misc]
    assert {ARCH: 1}[SPACE.architecture({"b": "y", "a": "x"})] == 1
    assert SPACE.architecture({"a": "y", "b": "y"}) != ARCH
    assert ARCH != {"a": "x", "b": "y"}


def edited(**changes: object) -> str:
    document = json.loads(ARCH.to_json())
    document.update(changes)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{broken", "not valid JSON"),
        (edited(format="torsh_nas.latency_table"), "format is 'torsh_nas.latency_table'"),
        (edited(version=2), "version 2 cannot be read; this torsh_nas reads version 1"),
        (edited(choices={"a": "y", "b": "y"}), "checksum .* does not match"),
    ],
)
def test_refuses_foreign_and_damaged_files(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nas.Architecture.from_json(text)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"a": ("x", "z"), "b": ("x", "z")}, "unknown option 'y' of 'b'; use one of"),
        ({"a": ("x", "y")}, "unknown choice 'b'; this space has"),
        ({"a": ("x", "y"), "b": ("x", "y"), "c": ("x", "y")}, "no option given for 'c'"),
        ({"a": ("x", "y", "z"), "b": ("x", "y")}, "belongs to space"),
    ],
)
def test_refuses_another_space(choices: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nas.Architecture.from_json(ARCH.to_json(), space=nas.Space(choices))


def test_refuses_values_that_are_no_strings() -> None:
    with pytest.raises(TypeError, match="'a': 3"):
        nas.Architecture({"a": 3}, space_id="")  # type: ignore[dict-item]
