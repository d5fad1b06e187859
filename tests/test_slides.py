"""Slides: what the selection names is there, and a deck needs nothing from elsewhere."""

import html
import io
import re
import tarfile
import tomllib

import nbformat
import pytest

from dfc_lib import paths
from dfc_lib.results.figures import read_manifest
from tools import slides
from tools.freshness import CompendiumError, load_notebooks

DECKS = tomllib.loads(slides.SELECTION.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", DECKS)
def test_every_slide_of_the_selection_is_there(name):
    """A renamed section or figure must not end a build in front of a class."""
    chosen = DECKS[name]
    deck = slides.deck(chosen["title"], chosen["slides"])
    nbformat.validate(deck)
    headings = [c.source.partition("\n")[0] for c in deck.cells if c.source.startswith("## ")]
    assert len(set(headings)) >= len({(s["notebook"], s["section"]) for s in chosen["slides"]}) - 2
    shown = [o["data"].get("text/html", "") for c in deck.cells for o in c.get("outputs", ())]
    pictures = [text for text in shown if 'src="data:image/png' in text]
    alts = {html.escape(row["alt"] or "") for row in read_manifest(paths.FIGURES)}
    assert pictures
    assert all(re.search('alt="(.*?)"', text, re.DOTALL)[1] in alts for text in pictures)


def test_a_deck_fetches_nothing():
    """A lecture room may have no network; reveal.js lies in the folder beside the page."""
    some = [
        s for s in DECKS["lesson"]["slides"] if s["notebook"] in ("00_model_pair", "05_steering")
    ]
    page = slides.html(slides.deck("A lesson", some))
    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=\"([^\"]+)\"", page)
    assert "reveal/dist/reveal.js" in loaded
    assert [at for at in loaded if "//" in at[:8]] == []
    assert not re.search(r"import .* from ['\"]http|@import url\(['\"]?http", page)
    shown = re.findall(r'<img[^>]*alt="([^"]*)"', page)
    assert any("\\alpha - 1" in alt for alt in shown)  # a formula
    assert "No description has been provided" not in page
    assert 'class="notes"' in page


def test_a_section_ends_where_the_next_begins():
    """`You should see` of the section before often stands in the cell of the next heading."""
    found = slides.sections(load_notebooks(paths.ROOT)["05_steering"])
    assert sorted(found) == list(range(1, len(found) + 1))
    assert found[2].heading == "2 · The steering equation"
    assert "$$" in slides.paragraphs(found[2])
    assert slides.should_see(found[3]).startswith("**You should see**")
    assert "You should see" not in slides.paragraphs(found[4])


@pytest.mark.parametrize(
    ("slide", "message"),
    [
        ({"notebook": "55_nothing", "section": 1}, "no notebook '55_nothing'"),
        ({"notebook": "05_steering", "section": 99}, "no section 99; it has 1, 2"),
        ({"notebook": "05_steering", "section": 2, "code": "g = 1"}, "no code 'g = 1'"),
        ({"notebook": "05_steering", "section": 3, "show": ["05_x"]}, "no figure or table '05_x'"),
        (
            {"notebook": "05_steering", "section": 3, "show": ["05_seeds"]},
            "no cell that saves 05_se",
        ),
    ],
)
def test_what_is_not_there_is_named(slide, message):
    with pytest.raises(CompendiumError, match=message):
        slides.deck("A deck", [slide])


def test_formulas_become_pictures_and_prices_do_not():
    text = slides.with_formulas(r"so $\frac{a}{b}$ costs 5 $" + "\n\n" + r"$$\sum_{i \in S} f_i$$")
    assert text.count("<img") == 2
    assert r'alt="\sum_{i \in S} f_i"' in text
    assert "costs 5 $" in text


def package(names) -> bytes:
    """An archive as npm packs it."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(f"package/{name}")
            member.size = 1
            archive.addfile(member, io.BytesIO(b"x"))
    return packed.getvalue()


def test_of_reveal_only_what_is_needed_is_unpacked(tmp_path):
    archive = tmp_path / "reveal.tgz"
    archive.write_bytes(package(["dist/reveal.js", "LICENSE", "test/x.js"]))
    slides.unpack(archive, tmp_path / "out")
    made = sorted(p.relative_to(tmp_path / "out").as_posix() for p in tmp_path.rglob("out/**/*.*"))
    assert made == ["dist/reveal.js"]
    assert (tmp_path / "out" / "LICENSE").is_file()


def test_another_archive_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(slides, "REVEAL_URL", f"file://{tmp_path}/nothing.tgz")
    (tmp_path / slides.REVEAL).write_bytes(package(["dist/reveal.js"]))
    with pytest.raises(CompendiumError, match=r"reveal\.js cannot be had"):
        slides.fetch_reveal(tmp_path)


def test_without_a_network_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(slides, "REVEAL_URL", f"file://{tmp_path}/nothing.tgz")
    with pytest.raises(CompendiumError, match=r"npm pack reveal\.js@5\.2\.1"):
        slides.fetch_reveal(tmp_path)
    assert list(tmp_path.iterdir()) == []
