"""The book: the executed notebooks and the pages around them, as HTML. `make book` builds it.

`build.py` says how its sources are brought together, `pages.py` what is done to a page.
"""

import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for pages.py


def find_repository() -> str | None:
    """owner/name, where this clone came from GitHub."""
    command = ["git", "config", "--get", "remote.origin.url"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    match = re.search(r"github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?$", found)
    return match and match[1]


project = "What does RL for tool use change in a model?"
author = copyright = "The compendium's authors"
extensions = ["myst_nb", "sphinx_copybutton", "pages"]
html_theme = "furo"
pygments_dark_style = "github-dark"  # furo's own underlines every module
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_js_files = ["book.js"]
html_title = "RL-induced tool use, feature by feature"
html_extra_path = ["extra"]
html_math_renderer = "mathml"
repository = find_repository()
# Where GitHub Pages shows it. Only there can a page give its own whole address.
html_baseurl = "https://{}.github.io/{}/".format(*repository.split("/")) if repository else ""
exclude_patterns = ["extra"]
html_theme_options = {"navigation_with_keys": True}

nb_execution_mode = "off"
nb_code_prompt_show = "Show the solution"  # only solutions are folded
nb_code_prompt_hide = "Hide the solution"
nb_merge_streams = True
nb_render_markdown_format = "gfm"  # a cell's Markdown has tables
nb_ipywidgets_js = {}  # widgets need a kernel, and their scripts would come from elsewhere
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "html_image"]
myst_heading_anchors = 4
copybutton_prompt_text = r"\$ "
suppress_warnings = ["mystnb.unknown_mime_type"]  # a notebook's own widget state
