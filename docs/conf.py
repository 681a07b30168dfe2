"""Sphinx configuration. `make docs` builds the site with warnings as errors."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(Path(__file__).resolve().parent)]
os.environ.setdefault("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
os.environ.setdefault("TQDM_DISABLE", "1")

import l0fast  # noqa: E402

project = "l0fast"
author = "the l0fast developers"
copyright = "2026, the l0fast developers"
release = version = l0fast.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "command_reference",
    "docstrings",
    "mathml",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints", "gallery/*.ipynb", "gallery/*.py"]
default_role = "code"  # a single backtick in a docstring is code
nitpicky = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

# The build needs no network. Links to PyTorch resolve where its inventory can be fetched.
intersphinx_mapping = (
    {"torch": ("https://docs.pytorch.org/docs/stable/", None)}
    if os.environ.get("L0FAST_DOCS_ONLINE")
    else {}
)

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": os.environ.get("L0FAST_DOCS_EXAMPLES", r"\.py$"),
    "abort_on_example_error": True,
    "show_memory": False,
    "show_signature": False,
    "download_all_examples": False,
    "min_reported_time": 1,
}

html_math_renderer = "mathml"
html_theme = "furo"
html_title = "l0fast"
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False
