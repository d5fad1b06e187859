"""Build the book: ``python book/build.py FOLDER`` leaves the pages in ``FOLDER/html``.

Notebooks, figures and pages are first copied into ``FOLDER/source`` in the repository's own layout,
so that links between them hold in the book as they do on GitHub. Nothing is executed: what is shown
is what ``make figures`` left. What stands in ``source/extra`` comes into the book as it is.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What a dashboard needs on a phone, and the way back. The pages themselves are a notebook's results
# and stay as they are.
IN_HEAD = (
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    "<style>code{overflow-wrap:anywhere}.n{white-space:nowrap}svg{max-width:100%}</style>"
)
WAY_BACK = '<p><a href="../../dashboards.html">All features</a></p>'


def copy(source: Path) -> None:
    """Copy what the book is made of into a folder that is made anew."""
    shutil.rmtree(source, ignore_errors=True)
    generated = shutil.ignore_patterns("build.py", "__pycache__", ".ipynb_checkpoints")
    shutil.copytree(ROOT / "book", source, ignore=generated)
    shutil.copytree(ROOT / "notebooks", source / "notebooks", ignore=generated)
    pages = ("README.md", "CONTRIBUTING.md", "TEACHING.md", "data/pairs/README.md")
    for page in (*pages, "data/pairs/README.md"):
        (source / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / page, source / page)
    (source / "figures").mkdir()
    shown = [*(ROOT / "figures").glob("*.png"), *(ROOT / "figures").glob("*.csv")]
    for path in [*shown, ROOT / "figures" / "manifest.json"]:
        shutil.copy(path, source / "figures")


def copy_dashboards(source: Path) -> None:
    """Bring the pages of single features into the book, and write the page that lists them."""
    target = source / "extra" / "figures" / "dashboards"
    target.mkdir(parents=True)
    rows = []
    # index.html has the order in which the notebook made them; its place is taken by our own list.
    listed = (ROOT / "figures" / "dashboards" / "index.html").read_text(encoding="utf-8")
    for name in re.findall(r'href="([^"]+)"', listed):
        text = (ROOT / "figures" / "dashboards" / name).read_text(encoding="utf-8")
        (title,) = re.findall(r"<h1>(.*?)</h1>", text)
        (explanation,) = re.findall(r"<p>Explanation: (.*?)\.?</p>", text)
        (detection,) = re.findall(r"detection: balanced accuracy (\S+)", text)
        for tag, addition in (("</head>", IN_HEAD + "</head>"), ("<body>", "<body>" + WAY_BACK)):
            if text.count(tag) != 1:
                raise ValueError(f"figures/dashboards/{name} should have one {tag}")
            text = text.replace(tag, addition)
        (target / name).write_text(text, encoding="utf-8")
        link = f'<a href="figures/dashboards/{name}">{title}</a>'
        rows.append(f"<tr><td>{link}</td><td>{explanation}</td><td>{detection}</td></tr>")
    missing = {p.name for p in (ROOT / "figures" / "dashboards").glob("*.html")} - {
        "index.html",
        *(path.name for path in target.iterdir()),
    }
    if missing:
        raise ValueError(f"figures/dashboards/index.html does not list {sorted(missing)}")
    template = (source / "dashboards.md").read_text(encoding="utf-8")
    (source / "dashboards.md").write_text(
        template.replace("<!-- rows -->", "\n".join(rows)), encoding="utf-8"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where source/ and html/ are made")
    folder = parser.parse_args().folder
    source = folder / "source"
    copy(source)
    copy_dashboards(source)
    dial = [sys.executable, "-m", "tools.dial", (source / "extra" / "dial").resolve()]
    subprocess.run(dial, cwd=ROOT, check=True)
    shutil.rmtree(folder / "html", ignore_errors=True)
    sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    command = [*sphinx, "-d", folder / "doctrees", source, folder / "html"]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
