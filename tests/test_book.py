"""The built book as a reader gets it: figures, tables, links, nothing from elsewhere."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest
from bs4 import BeautifulSoup
from docutils import nodes
from docutils.utils import new_document
from sphinx.errors import ExtensionError

from dfc_lib import paths, profiles
from dfc_lib.results import figures

WIDTHS = (1280, 400)
AUDITED = ("notebooks/05_steering", "notebooks/14_scorecard")
# What makes a browser ask for something without being told to; a link does not.
LOADING = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "link": "href",
    "source": "src",
    "object": "data",
}


@pytest.fixture(scope="session")
def book(tmp_path_factory) -> Path:
    """The pages, built once from the working tree."""
    folder = tmp_path_factory.mktemp("book")
    command = [sys.executable, str(paths.ROOT / "book" / "build.py"), str(folder)]
    result = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder / "html"


@pytest.fixture(scope="session")
def pages(book) -> dict[str, BeautifulSoup]:
    """Every page, by its path in the book."""
    return {
        path.relative_to(book).as_posix(): BeautifulSoup(path.read_text("utf-8"), "html.parser")
        for path in sorted(book.rglob("*.html"))
    }


@pytest.fixture(scope="session")
def manifest() -> list[dict]:
    return json.loads((paths.ROOT / "figures" / "manifest.json").read_text(encoding="utf-8"))


def notebook(name: str) -> dict:
    return json.loads((paths.ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))


def outputs(name: str, kind: str) -> list[str]:
    """What the cells of a notebook show of one kind."""
    shown = [
        o["data"] for c in notebook(name)["cells"] for o in c.get("outputs", []) if "data" in o
    ]
    return ["".join(data[kind]) for data in shown if kind in data]


def plain(text: str) -> str:
    """Without line breaks and curled quotes, which a page may set otherwise than its source."""
    for quote, curled in (("'", "‘’"), ('"', "“”")):
        text = re.sub(f"[{curled}]", quote, text)
    return " ".join(text.split())


def names() -> list[str]:
    return sorted(path.stem for path in (paths.ROOT / "notebooks").glob("*.ipynb"))


def test_every_image_has_the_alt_text_of_its_figure(book, pages, manifest):
    """A hash as alt text is what a screen reader would read out."""
    alts = {f"{row['id']}.png": row["alt"] for row in manifest if row["alt"]}
    seen = [(page, image) for page, soup in pages.items() for image in soup.find_all("img")]
    assert len(seen) >= len(alts)
    for page, image in seen:
        name = Path(image["src"]).name
        drawn = page == "concepts.html" and name == "partition.svg"  # by book/partition.py
        assert name in alts or page == "README.html" or drawn, f"{page} shows {name}, no figure"
        if page != "README.html" and not drawn:
            assert plain(image["alt"]) == plain(alts[name]), page
        assert len(image["alt"].split()) >= 4, page
        assert (book / page).parent.joinpath(unquote(image["src"])).is_file()


@pytest.mark.parametrize("name", names())
def test_every_image_of_a_notebook_is_a_figure_with_its_caption(pages, manifest, name):
    """n, the seeds and how the interval was made stand in the caption."""
    rows = {row["id"]: row for row in manifest}
    soup = pages[f"notebooks/{name}.html"]
    shown = soup.find_all("figure")
    assert len(shown) == len(outputs(name, "image/png")) == len(soup.find_all("img"))
    for figure in shown:
        row = rows[Path(figure.img["src"]).stem]
        assert row["notebook"] == name
        assert plain(row["caption"]) in plain(figure.figcaption.get_text())


@pytest.mark.parametrize("name", names())
def test_every_table_that_a_cell_shows_is_a_table(pages, name):
    """Markdown of a cell once fell apart into running text."""
    marked = [text for text in outputs(name, "text/markdown") if "|---" in text]
    pandas = [text for text in outputs(name, "text/html") if "<table" in text]
    shown = pages[f"notebooks/{name}.html"].select(".cell_output table")
    assert len(shown) >= len(marked) + len(pandas)
    for text in marked:
        lines = text[text.index("|") :].splitlines()
        width = lines[1].count("|") - 1
        rows = sum(line.startswith("|") for line in lines) - 1  # not the line under the head
        sizes = [(len(t.find_all("tr")), len(t.tr.find_all(["th", "td"]))) for t in shown]
        assert (rows, width) in sizes
    loose = [p.get_text() for p in pages[f"notebooks/{name}.html"].select(".cell_output p")]
    assert not [text for text in loose if "|---" in text]


def reachable(book: Path, pages: dict[str, BeautifulSoup], start: str) -> set[str]:
    """The pages that links lead to, from one page on."""
    found, todo = set(), [start]
    while todo:
        page = todo.pop()
        if page in found or page not in pages:
            continue
        found.add(page)
        for link in pages[page].find_all("a", href=True):
            address = urldefrag(link["href"]).url
            if address and not urlparse(address).scheme:
                target = unquote(urljoin(f"/{page}", address)).lstrip("/")
                assert (book / target).exists(), f"{page} links {address}, which is not there"
                todo.append(target)
    return found


def test_every_page_is_reachable_from_the_landing_page(book, pages):
    """The dashboards were once linked from nowhere."""
    made = {p.name for p in (paths.ROOT / "figures" / "dashboards").glob("*.html")} - {"index.html"}
    assert made
    found = reachable(book, pages, "index.html")
    assert {f"figures/dashboards/{name}" for name in made} <= found
    assert set(pages) - {"search.html", "genindex.html"} <= found


def test_dashboards_are_linked_where_they_are_made_and_fit_a_phone(pages):
    makers = [
        name
        for name in names()
        if any('/ "dashboards"' in "".join(cell["source"]) for cell in notebook(name)["cells"])
    ]
    assert makers
    dashboards = [page for page in pages if page.startswith("figures/dashboards/")]
    for name in makers:
        links = {a["href"] for a in pages[f"notebooks/{name}.html"].find_all("a", href=True)}
        assert {f"../{page}" for page in dashboards} <= links
    for page in dashboards:
        content = pages[page].find("meta", attrs={"name": "viewport"})["content"]
        assert "width=device-width" in content


def test_no_page_asks_for_anything_from_elsewhere(book, pages):
    """A book that is read from a disk or behind a firewall shows the same."""
    for page, soup in pages.items():
        for tag, attribute in LOADING.items():
            for element in soup.find_all(tag, attrs={attribute: True}):
                address = urlparse(element[attribute])
                local = not address.netloc and address.scheme in ("", "data")
                assert local or element.get("rel") == ["canonical"], f"{page}: {element}"
        assert "cdn" not in (book / page).read_text(encoding="utf-8").lower(), page
    for path in book.rglob("*.css"):
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/", "")
        assert "url(http" not in text.replace('"', "").replace("'", ""), path.name
        assert "@import" not in text, path.name


def test_formulas_are_shown_without_a_script(pages):
    formulas = [f for soup in pages.values() for f in soup.find_all("math")]
    assert len(formulas) >= 5
    for formula in formulas:
        assert not formula.find("merror")
        assert "\\" not in formula.get_text()


def test_every_page_says_what_a_link_to_it_shows(book, pages):
    titles = {}
    for page, soup in pages.items():
        brought_along = (book.parent / "source" / "extra" / page).exists()
        if brought_along or page in ("search.html", "genindex.html"):
            continue
        tags = {m["property"]: m["content"] for m in soup.find_all("meta", property=True)}
        titles[page] = tags["og:title"]
        said = soup.find("meta", attrs={"name": "description"})["content"]
        assert said == tags["og:description"]
        assert 20 < len(said) <= 202, page
    assert len(set(titles.values())) == len(titles)


def test_on_github_pages_a_shared_link_has_an_address_and_a_picture(monkeypatch):
    """Those who show a link need whole addresses, and only a published book has them."""
    monkeypatch.syspath_prepend(paths.ROOT / "book")
    pages = importlib.import_module("pages")
    document = new_document("index.md")
    document += nodes.paragraph(text="What was <found>.")
    document += nodes.image(uri="../_images/05_switch.png")
    for base in ("", "https://owner.github.io/name/"):
        config = SimpleNamespace(html_title="Book", html_baseurl=base)
        context = {"title": "Five", "metatags": ""}
        pages.describe(SimpleNamespace(config=config), "notebooks/05", "", context, document)
        soup = BeautifulSoup(context["metatags"], "html.parser")
        tags = {m["property"]: m["content"] for m in soup.find_all("meta", property=True)}
        assert tags["og:description"] == "What was <found>."
        assert tags.get("og:url", "") == (base and f"{base}notebooks/05.html")
        assert tags.get("og:image", "") == (base and f"{base}_images/05_switch.png")


def test_a_cell_shows_the_one_figure_that_it_saved(monkeypatch):
    """An image that no figure was made of would come without caption and alt text."""
    monkeypatch.syspath_prepend(paths.ROOT / "book")
    pages = importlib.import_module("pages")
    rows = {id: {"id": id, "alt": "A line rises."} for id in ("05_a", "05_b")}
    picture = {"data": {"image/png": ""}}
    cell = {"source": 'save_figure(fig, "05_a")', "outputs": [{"text": "done"}, picture]}
    assert pages.figure_of_cell(cell, rows, "05, cell 1") == rows["05_a"]
    assert pages.figure_of_cell(cell | {"outputs": []}, rows, "05, cell 1") is None
    for source in ("plt.show()", 'save_figure(one, "05_a"); save_figure(two, "05_b")'):
        with pytest.raises(ExtensionError, match="05, cell 1 shows 1 images"):
            pages.figure_of_cell(cell | {"source": source}, rows, "05, cell 1")


def test_the_landing_page_takes_its_numbers_from_the_tables(pages):
    """Typed numbers would outlive the results that they were read from."""
    template = (paths.ROOT / "book" / "index.md").read_text(encoding="utf-8")
    prose = re.sub(r"\{\{.*?\}\}|^:.*$|\(.*?\)|[Nn]otebook \d+", "", template, flags=re.M)
    assert re.findall(r"\d+", prose.split("## Where to go")[0]) == []
    assert "{{" not in pages["index.html"].get_text()
    switch = figures.load_data("05_switch", profiles.load("toy"))
    rate = f"{100 * switch[switch.cell == 'feature'].called.item():.1f}".removesuffix(".0")
    assert f"need one to {rate} %" in plain(pages["index.html"].article.p.get_text())


def test_no_page_scrolls_sideways_or_leaves_its_folder(book, pages, browser):
    """What is wider than the page scrolls inside itself."""
    context = browser.new_context()
    asked = []
    context.on("request", lambda request: asked.append(request.url))
    tab = context.new_page()
    wide = {}
    for page in pages:
        tab.goto((book / page).as_uri())
        for width in WIDTHS:
            tab.set_viewport_size({"width": width, "height": 900})
            across = tab.evaluate("document.documentElement.scrollWidth")
            if across > width:
                wide[page, width] = across
    context.close()
    assert wide == {}
    assert [url for url in asked if not url.startswith((book.as_uri(), "data:"))] == []


@pytest.mark.parametrize("page", ["index", "dial", "dial/index", *AUDITED])
def test_axe_finds_nothing_serious(book, browser, page):
    """What keeps a reader out who has no mouse, or who listens to the page."""
    api = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
    )
    context = browser.new_context()
    tab = context.new_page()
    found = []
    for width in WIDTHS:
        tab.set_viewport_size({"width": width, "height": 900})
        tab.goto((book / f"{page}.html").as_uri())
        tab.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
        # Letters have the same colours at every width, and to compare these takes longest.
        rules = {"color-contrast": {"enabled": width == WIDTHS[0]}}
        options = {"resultTypes": ["violations"], "rules": rules}
        for rule in api.Axe().run(tab, options=options).response["violations"]:
            if rule["impact"] in ("serious", "critical"):
                found += [(width, rule["id"], node["html"][:200]) for node in rule["nodes"]]
    context.close()
    assert found == []
