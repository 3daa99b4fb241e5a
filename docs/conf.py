"""Sphinx configuration of the documentation site: make docs.

The source folder is the repository, so that links between docs/ and the other Markdown files are checked too.
"""

project = "sdtune"
author = "The sdtune team"
extensions = ["myst_parser", "sphinx_copybutton", "sphinxcontrib.mermaid"]
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "experiments/README.md",
    "experiments/**/README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]
html_theme = "furo"
html_title = "sdtune"
html_show_copyright = False
smartquotes = False  # options such as --n stay as they are

# Anchors as on GitHub, so that a link to a heading works in both places.
myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]
