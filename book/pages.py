"""What the book adds to its pages, as a Sphinx extension.

- An image that a notebook's cell saved as a figure becomes that figure: the saved picture with the
  alt text and the caption of ``figures/manifest.json`` and a link to the data behind it.
- The cell that wrote the dashboards is followed by links to them.
- The landing page (``index.md``) is a template; its numbers come from the CSVs of ``figures/``.
- Mathematics becomes MathML, which browsers show without a script or a font from elsewhere.
- Every page says in its head what a link to it shows when it is shared.
- The headings of the list of pages say which level they have.
"""

import ast
import html
import json
import re
from pathlib import Path

import jinja2
import math_core
import pandas as pd
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

# What tells a test how to compare a cell tells a reader nothing.
TEST_MARKS = re.compile(r"# (NBVAL_CHECK_OUTPUT|REGRESS)\n")
AT_LEAST = 0.1  # the gain, its interval included, from which the landing page counts a feature
# A link in what a cell printed; those in the text of a notebook are Sphinx's.
NOTEBOOK_LINK = re.compile(r"(\]\(\w+)\.ipynb\)")
# A page of the book as a notebook links it on GitHub; in the book it lies a folder higher.
BOOK_LINK = re.compile(r"\]\(\.\./book/")
MAX_DESCRIPTION = 200  # characters; what is shown of a link is cut off at about that many


def names_in(code: str) -> set[str]:
    """The texts that stand as literals in a cell; none where it is no plain Python."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return set()
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str)}


def figure_of_cell(cell: dict, manifest: dict[str, dict], where: str) -> dict | None:
    """The row of the manifest that a cell with an image saved.

    Raises:
        ExtensionError: the cell shows an image and saved no figure, or more than one.
    """
    images = [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    if not images:
        return None
    saved = names_in(cell["source"]) & {id for id, row in manifest.items() if row["alt"]}
    if len(images) != 1 or len(saved) != 1:
        raise ExtensionError(
            f"{where} shows {len(images)} images and saves the figures {sorted(saved)}; a cell "
            "should save one figure (dfc_lib.results.figures.save_figure) and show it, or the "
            "image has neither caption nor alt text"
        )
    return manifest[saved.pop()]


def escape(text: str) -> str:
    """Plain text as Markdown that shows it."""
    return re.sub(r"([\\`*_{}\[\]<>$~|])", r"\\\1", text)


def show_figure(cell: dict, row: dict) -> None:
    """Let a cell show a figure as it was saved, with its alt text and caption."""
    text = (
        f"```{{figure}} /figures/{row['id']}.png\n"
        f":name: figure-{row['id']}\n:alt: {row['alt']}\n:width: 100%\n\n"
        f"{escape(row['caption'])} [Data](/figures/{row['id']}.csv)\n```\n"
    )
    for output in cell["outputs"]:
        if "image/png" in output.get("data", {}):
            output["data"] = {"text/markdown": text}
    cell["metadata"]["mystnb"] = {"markdown_format": "myst"}  # a directive is no plain Markdown


def dashboard_links(names: list[str]) -> dict:
    """A cell that links the pages of single features."""
    links = (
        f'<a href="../figures/dashboards/{name}.html">{html.escape(name.replace("_", " "))}</a>'
        for name in names
    )
    text = (
        f"**The pages**, also in a [list with explanations](../dashboards.md): {', '.join(links)}."
    )
    return {"cell_type": "markdown", "id": "dashboards", "metadata": {}, "source": text}


def prepare_notebook(app: Sphinx, docname: str, source: list[str]) -> None:
    """Give a notebook its figures, its dashboards and, from a GitHub clone, a link to Colab."""
    if not docname.startswith("notebooks/"):
        return
    notebook = json.loads(source[0])
    figures = Path(app.srcdir) / "figures"
    rows = json.loads((figures / "manifest.json").read_text(encoding="utf-8"))
    manifest = {row["id"]: row for row in rows}
    dashboards = sorted((Path(app.srcdir) / "extra/figures/dashboards").glob("*.html"))
    cells = []
    for number, cell in enumerate(notebook["cells"]):
        cells.append(cell)
        if cell["cell_type"] != "code":
            cell["source"] = BOOK_LINK.sub("](../", "".join(cell["source"]))
            continue
        cell["source"] = TEST_MARKS.sub("", "".join(cell["source"]), count=1)
        if row := figure_of_cell(cell, manifest, f"{docname}, cell {number}"):
            show_figure(cell, row)
        for output in cell["outputs"]:
            if "text/markdown" in output.get("data", {}):
                text = "".join(output["data"]["text/markdown"])
                output["data"]["text/markdown"] = NOTEBOOK_LINK.sub(r"\1.html)", text)
        if "dashboards" in names_in(cell["source"]):
            cells.append(dashboard_links([path.stem for path in dashboards]))
    notebook["cells"] = cells
    if app.config.repository:
        address = f"https://colab.research.google.com/github/{app.config.repository}"
        link = f"\n\n[Open in Colab]({address}/blob/main/{docname}.ipynb)"
        cells[0]["source"] = "".join(cells[0]["source"]) + link
    source[0] = json.dumps(notebook)


def lift_links(app: Sphinx, docname: str, source: list[str]) -> None:
    """In the book, pages of ``book/`` lie at the top, beside the README; on GitHub they do not."""
    if docname == "concepts":
        source[0] = source[0].replace("](../", "](")
    elif docname == "README":
        source[0] = source[0].replace("](book/", "](")


def percent(rate: float) -> str:
    """A rate as it is said: 94.5 %, 99 %."""
    return f"{100 * rate:.1f}".removesuffix(".0") + "\N{NO-BREAK SPACE}%"


def findings(figures: Path) -> dict:
    """What the landing page says was found, read from the CSVs behind the figures.

    Raises:
        ExtensionError: a table has not exactly one row where one number is read.
    """

    def table(id: str) -> pd.DataFrame:
        return pd.read_csv(figures / f"{id}.csv", keep_default_na=False, na_values=["NaN"])

    def only(frame: pd.DataFrame, **where) -> pd.Series:
        for column, value in where.items():
            frame = frame[frame[column] == value]
        if len(frame) != 1:
            raise ExtensionError(f"{len(frame)} rows have {where}; the landing page reads one")
        return frame.iloc[0]

    def called(cell: str) -> str:
        return percent(only(switch, cell=cell).called)

    def points(id: str) -> str:
        return f"{100 * only(readings, claim='C4', id=id).effect:+.0f}"

    def work(steered: pd.DataFrame) -> int:
        return int((steered.low > AT_LEAST).sum())

    def by_pair(what: str) -> str:
        *firsts, last = (f"{100 * gain:+.0f}" for gain in pairs.gain[pairs.what == what])
        return f"{', '.join(firsts)} and {last}" if firsts else last

    pairs = table("05_pairs")
    switch, case, blocks = table("05_switch"), table("05_case"), table("05_blocks")
    seeds, prose, public = table("05_seeds"), table("05_prose"), table("13_readings")
    directions, readings = table("05_random_directions"), table("05_readings")
    on = seeds[seeds.what == "feature"]
    steered = prose[(prose.what == "steered") & (prose.seed != "A - B")]
    best, held_out = (only(public, id=id) for id in ("C4 best cell", "C4 best cell, held-out half"))
    gain = only(public, id="C1 gain over runs")
    cases = {
        name: {"query": html.escape(part["query"].iloc[0])}
        | {row.cell: html.escape(row.response) for row in part.itertuples()}
        for name, part in case.groupby("case")
    }
    return {
        "turned_on": cases["turned on"],
        "turned_off": cases["turned off"],
        "at_least": f"{100 * AT_LEAST:.0f}",
        "n": int(only(switch, cell="clean").n),
        "clean": called("clean"),
        "off": called("ablated"),
        "on": called("feature"),
        "mean": called("mean A - B"),
        "random": called("random 1"),
        "n_random": int(directions.what.isin(["isotropic", "covariance"]).sum()),
        "feature_pairs": by_pair("feature"),
        "random_pairs": by_pair("best random direction"),
        "base": points("base, threshold"),
        "base_final": points("base, final"),
        "anchored": work(on[on.variant == "last anchored"]),
        "tied": work(on[on.variant == "last tied"]),
        "untied": work(on[on.variant == "last untied"]),
        "seeds": int((blocks.variant == "last tied").sum()),
        "prose": work(steered),
        "best": f"{100 * best.effect:.0f}",
        "best_low": f"{100 * best.low:.0f}",
        "best_high": f"{100 * best.high:.0f}",
        "held_out": f"{100 * held_out.effect:.0f}",
        "gain": f"{100 * gain.effect:.0f}",
        "gain_low": f"{100 * gain.low:.0f}",
        "gain_high": f"{100 * gain.high:.0f}",
        "key": next(
            row
            for row in json.loads((figures / "manifest.json").read_text(encoding="utf-8"))
            if row["id"] == "05_hero"
        ),
        "escape": escape,
    }


def fill_landing_page(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == "index":
        template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(source[0])
        source[0] = template.render(findings(Path(app.srcdir) / "figures"))


def description(doctree: nodes.document) -> str:
    """The first paragraph under a page's title, cut off after a word where it is long."""
    for paragraph in doctree.findall(nodes.paragraph):
        text = " ".join(paragraph.astext().split())
        if text and not isinstance(paragraph.parent, nodes.entry):
            break
    else:
        return ""
    if len(text) <= MAX_DESCRIPTION:
        return text
    return text[:MAX_DESCRIPTION].rsplit(" ", 1)[0].rstrip(",;:") + " …"


def describe(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree: nodes.document | None
) -> None:
    """Put into a page's head what is shown where a link to it is shared."""
    if doctree is None:  # the search and the index have no text of their own
        return
    title = re.sub(r"<[^>]+>", "", context["title"])  # escaped already
    tags = {"og:type": "article", "og:title": title, "og:site_name": app.config.html_title}
    if text := html.escape(description(doctree)):
        tags["og:description"] = text
        context["metatags"] += f'\n<meta name="description" content="{text}">'
    if base := app.config.html_baseurl:  # these two must be whole addresses
        tags["og:url"] = f"{base}{pagename}.html"
        for image in doctree.findall(nodes.image):
            tags["og:image"] = f"{base}_images/{Path(image['uri']).name}"
            break
    for name, content in tags.items():
        context["metatags"] += f'\n<meta property="{name}" content="{content}">'


def give_captions_a_level(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree: nodes.document | None
) -> None:
    """Sphinx makes captions of the list of pages headings of no level, which readers aloud need."""
    role = 'role="heading"'
    tree = context["furo_navigation_tree"]
    context["furo_navigation_tree"] = tree.replace(role, f'{role} aria-level="2"')


converter = math_core.LatexToMathML()


def mathml(translator, node: nodes.Element, displaystyle: bool) -> str:
    try:
        return converter.convert_with_local_state(node.astext(), displaystyle=displaystyle)
    except math_core.LatexError as error:
        raise ExtensionError(f"{node.source}: {node.astext()!r} is no formula: {error}") from error


def visit_math(translator, node: nodes.math) -> None:
    translator.body.append(mathml(translator, node, displaystyle=False))
    raise nodes.SkipNode


def visit_displaymath(translator, node: nodes.math_block) -> None:
    formula = mathml(translator, node, displaystyle=True)
    translator.body.append(f'<div class="math">{formula}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict:
    app.add_config_value("repository", None, "env", types=frozenset({str}))
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    app.connect("source-read", prepare_notebook)
    app.connect("source-read", fill_landing_page)
    app.connect("source-read", lift_links)
    app.connect("html-page-context", describe)
    app.connect("html-page-context", give_captions_a_level, priority=900)  # once furo has the list
    return {"parallel_read_safe": True, "parallel_write_safe": True}
