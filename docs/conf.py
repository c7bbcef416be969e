"""Sphinx configuration."""

import os
import sys
from pathlib import Path

from contrastive_kit import __version__

project = html_title = "contrastive-kit"
project_copyright = author = "The contrastive-kit developers"
release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "sphinx-mathjax-offline",
]
if os.environ.get("READTHEDOCS"):  # needs a network
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "kornia": ("https://kornia.readthedocs.io/en/stable", None),
    }
# The tutorial runs when it has changed, with the photographs of the examples.
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "tutorial",
    "download_all_examples": False,
    "min_reported_time": 1e9,
    "show_memory": False,
    "write_computation_times": False,
    "image_scrapers": ("matplotlib",),
}
myst_enable_extensions = ["dollarmath", "amsmath"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}  # what autosummary writes
exclude_patterns = ["_build", "_*.md", "tutorials", "sg_execution_times.rst"]
templates_path = ["_templates"]
html_theme = "furo"
autodoc_typehints = "description"
autodoc_member_order = "bysource"
copybutton_exclude = ".linenos, .gp, .go"
