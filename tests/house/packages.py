"""The six distributions, as the house tests see them."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
AREAS = ["optim", "text", "data", "quant", "nas", "dist"]
PACKAGES = [f"torsh_{area}" for area in AREAS]
TEST_FOLDERS = {area: "distributed" if area == "dist" else area for area in AREAS}
