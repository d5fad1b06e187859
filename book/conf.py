"""The book: the executed notebooks and the pages around them, as HTML. `make book` builds it.

Nothing is executed here: what is shown is what `make figures` left. `make book` copies notebooks,
figures and pages into one folder first, in the repository's own layout, so that links between them
hold in the book as they do on GitHub.
"""

import json
import re
import subprocess

project = "What does RL for tool use change in a model?"
author = copyright = "The compendium's authors"
extensions = ["myst_nb", "sphinx_copybutton"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_title = "RL-induced tool use, feature by feature"
exclude_patterns = ["README.md"]  # it is included in index.md
html_theme_options = {"navigation_with_keys": True}

nb_execution_mode = "off"
nb_code_prompt_show = "Show the solution"  # only solutions are folded
nb_code_prompt_hide = "Hide the solution"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "html_image"]
myst_heading_anchors = 4
copybutton_prompt_text = r"\$ "
suppress_warnings = ["mystnb.unknown_mime_type"]  # a notebook's own widget state


def repository() -> str | None:
    """owner/name, where this clone came from GitHub."""
    command = ["git", "config", "--get", "remote.origin.url"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    match = re.search(r"github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?$", found)
    return match and match[1]


def add_badge(app, docname, source):
    """A Colab badge in the first cell of a notebook, where the repository has an address."""
    address = repository()
    if not (address and docname.startswith("notebooks/")):
        return
    notebook = json.loads(source[0])
    link = f"https://colab.research.google.com/github/{address}/blob/main/{docname}.ipynb"
    badge = "https://colab.research.google.com/assets/colab-badge.svg"
    first = notebook["cells"][0]
    first["source"] = [*first["source"], f"\n\n[![Open in Colab]({badge})]({link})"]
    source[0] = json.dumps(notebook)


def setup(app):
    app.connect("source-read", add_badge)
