"""Sphinx configuration."""

from contrastive_kit import __version__

project = "contrastive-kit"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "amsmath"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "_*.md"]
html_theme = "furo"
autodoc_typehints = "description"
autodoc_member_order = "bysource"
