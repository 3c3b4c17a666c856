"""Sphinx settings of the manual."""

import sys
from pathlib import Path

from sphinx.application import Sphinx

import torsh_optim

sys.path.insert(0, str(Path(__file__).parent))
from benchmark_pages import write_benchmark_pages

project = "ToRSh for PyTorch"
author = copyright = "The ToRSh authors"
version = release = torsh_optim.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
html_theme = "furo"
html_title = project
html_static_path: list[str] = []
exclude_patterns = ["_build", "examples"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def setup(app: Sphinx) -> None:
    """Turn benchmark results into pages before anything is read."""
    app.connect("builder-inited", lambda app: write_benchmark_pages(Path(app.srcdir, "benchmarks")))
