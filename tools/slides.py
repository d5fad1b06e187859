"""Slides from the executed notebooks, without touching them: nbconvert's reveal exporter.

    make slides      python -m tools.slides

``tools/slides.toml`` says which sections become slides. The decks are written to ``build/slides/``
as HTML with their pictures inside; reveal.js lies beside them, so that nothing is fetched while
they are shown. It is taken from its npm package once, at a fixed version whose hash is checked.
Formulas are drawn as pictures. Nothing is executed.
"""

import base64
import html as html_text
import io
import re
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dfc_lib import paths, store
from dfc_lib.results.figures import read_manifest
from tools.freshness import CompendiumError, Notebook, load_notebooks

if TYPE_CHECKING:
    from nbformat import NotebookNode

SELECTION = Path(__file__).with_suffix(".toml")
REVEAL = "reveal.js-5.2.1.tgz"
REVEAL_URL = f"https://registry.npmjs.org/reveal.js/-/{REVEAL}"
REVEAL_SHA256 = "359b575dd51bbda32f89b2fd4c7dc46ad7389a805572158916c29252f7a27333"
THEME = "white"
WANTED = re.compile(
    rf"LICENSE|dist/reveal\.(css|js)|dist/theme/{THEME}\.css"
    r"|dist/theme/fonts/source-sans-pro/.*\.(css|woff)|plugin/notes/(notes\.js|speaker-view\.html)"
)
TEMPLATE = Path(__file__).with_suffix(".html.j2")


class Section(NamedTuple):
    """A numbered section of a notebook: its heading and the cells up to the next one."""

    heading: str
    cells: list[dict[str, Any]]


# --------------------------------------------------------------------------------------------------
# What a notebook has


def sections(notebook: Notebook) -> dict[int, Section]:
    """The numbered sections (``## 3 · ...``) of a notebook by number; markdown is cut at them."""
    found: dict[int, Section] = {}
    cells: list[dict[str, Any]] = []  # of the section being read
    for cell in notebook.content["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "markdown":
            cells.append(cell | {"source": source})
            continue
        for part in re.split(r"(?m)^(?=## )", source):
            if part.startswith("## "):
                heading, _, part = part.partition("\n")
                cells = []
                if number := re.match(r"## (\d+) · ", heading):
                    found[int(number[1])] = Section(heading.removeprefix("## "), cells)
            if part.strip():
                cells.append({"cell_type": "markdown", "source": part.strip()})
    return found


def paragraphs(section: Section) -> str:
    """The prose between a section's heading and its first cell of code."""
    before = []
    for cell in section.cells:
        if cell["cell_type"] == "code":
            break
        before.append(cell["source"])
    whole = "\n\n".join(before)
    return "\n\n".join(p for p in whole.split("\n\n") if not p.startswith("**You should see**"))


def should_see(section: Section) -> str:
    """The section's paragraphs that begin with *You should see*."""
    prose = [c["source"] for c in section.cells if c["cell_type"] == "markdown"]
    told = [p for text in prose for p in text.split("\n\n") if p.startswith("**You should see**")]
    return "\n\n".join(told)


def outputs(section: Section, id: str, alt: str) -> list[dict[str, Any]]:
    """What the cell that saves a figure or table shows, with the alt text on its picture.

    Raises:
        CompendiumError: no cell of the section saves it and shows something.
    """
    for cell in section.cells:
        # The cell that saves it, not one that reads it.
        saves = re.search(rf'(?s)save_(figure|table)\(.*"{id}"', cell["source"])
        if cell["cell_type"] == "code" and saves:
            shown = [_with_alt(output, alt) for output in cell["outputs"]]
            if shown:
                return shown
    raise CompendiumError(
        f"{SELECTION.name}: section '{section.heading}' has no cell that saves {id} and shows it"
    )


def code(section: Section, piece: str) -> str:
    """The source of the section's cell of code that holds ``piece``.

    Raises:
        CompendiumError: there is none.
    """
    for cell in section.cells:
        if cell["cell_type"] == "code" and piece in cell["source"]:
            return cell["source"]
    raise CompendiumError(f"{SELECTION.name}: section '{section.heading}' has no code {piece!r}")


def _with_alt(output: dict[str, Any], alt: str) -> dict[str, Any]:
    if "data" not in output:
        return output | {"text": "".join(output.get("text", ""))}
    # On disk a text may be a list of lines.
    data = {kind: "".join(v) if isinstance(v, list) else v for kind, v in output["data"].items()}
    if "image/png" in data:  # as HTML, for the exporter gives a picture no alt text
        data = {"text/html": _picture("image/png", data["image/png"].strip(), alt, "figure")}
    return output | {"data": data}


def _picture(kind: str, encoded: str, alt: str, look: str) -> str:
    escaped = html_text.escape(alt, quote=True)
    return f'<img class="{look}" alt="{escaped}" src="data:{kind};base64,{encoded}">'


# --------------------------------------------------------------------------------------------------
# Formulas


def with_formulas(text: str) -> str:
    """Markdown with its TeX drawn: pictures whose alt text is the TeX."""
    text = re.sub(r"\$\$(.+?)\$\$", lambda m: _drawn(m[1], "formula"), text, flags=re.DOTALL)
    return re.sub(r"(?<![\\$])\$([^$\n]+)\$", lambda m: _drawn(m[1], "inline"), text)


def _drawn(tex: str, look: str) -> str:
    from matplotlib import font_manager, mathtext

    size = font_manager.FontProperties(size=18)
    tex = " ".join(tex.split())
    picture = io.BytesIO()
    plain = re.sub(r"\\(big|Big)\b(?=[()])", "", tex)  # what matplotlib's TeX lacks
    mathtext.math_to_image(f"${plain}$", picture, size, format="svg")
    return _picture("image/svg+xml", base64.b64encode(picture.getvalue()).decode(), tex, look)


# --------------------------------------------------------------------------------------------------
# Decks


def deck(title: str, slides: list[dict[str, Any]]) -> "NotebookNode":
    """The notebook of a deck: cells with reveal's slide types.

    Raises:
        CompendiumError: a slide names a notebook, section, figure or table that is not there.
    """
    import nbformat

    notebooks = load_notebooks(paths.ROOT)
    alts = {row["id"]: row["alt"] for row in read_manifest(paths.FIGURES)}
    cells = [_cell("markdown", "slide", f"# {title}")]
    for slide in slides:
        if slide["notebook"] not in notebooks:
            raise CompendiumError(f"{SELECTION.name}: there is no notebook {slide['notebook']!r}")
        cells += _slide(notebooks[slide["notebook"]], slide, alts)
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"title": title})
    return nbformat.from_dict(notebook)


def _slide(notebook: Notebook, slide: dict[str, Any], alts: dict[str, str]) -> Iterator[dict]:
    """The cells of one section: what is shown, then what should be seen, then the note."""
    there = sections(notebook)
    if slide["section"] not in there:
        raise CompendiumError(
            f"{SELECTION.name}: {notebook.name} has no section {slide['section']}; it has "
            f"{', '.join(map(str, there))}"
        )
    section = there[slide["section"]]
    if unknown := [id for id in slide.get("show", ()) if id not in alts]:
        raise CompendiumError(f"{SELECTION.name}: there is no figure or table {unknown[0]!r}")
    text = paragraphs(section) if slide.get("text") else ""
    yield _cell("markdown", "slide", f"## {section.heading}\n\n{with_formulas(text)}".strip())
    if "code" in slide:
        yield _cell("markdown", "-", f"```python\n{code(section, slide['code'])}\n```")
    for id in slide.get("show", ()):
        # Beside a text there is no room for a picture.
        yield _cell("code", "subslide" if text else "-", outputs=outputs(section, id, alts[id]))
    if see := slide.get("show") and should_see(section):
        yield _cell("markdown", "subslide", f"## {section.heading}\n\n{with_formulas(see)}")
    if "ask" in slide:
        yield _cell("markdown", "notes", slide["ask"])


def _cell(kind: str, slide_type: str, source: str = "", **more: Any) -> dict[str, Any]:
    import nbformat

    made = getattr(nbformat.v4, f"new_{kind}_cell")(source, **more)
    made.metadata["slideshow"] = {"slide_type": slide_type}
    return made


def html(notebook: "NotebookNode") -> str:
    """A deck as a page that needs ``reveal/`` beside it and nothing else."""
    from nbconvert.exporters import SlidesExporter

    exporter = SlidesExporter(
        raw_template=TEMPLATE.read_text(encoding="utf-8"),
        reveal_url_prefix="reveal",
        reveal_theme=THEME,
        exclude_input=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    return exporter.from_notebook_node(notebook)[0]


# --------------------------------------------------------------------------------------------------
# reveal.js


def fetch_reveal(folder: Path) -> Path:
    """The package's archive in ``folder``, downloaded if it is not there.

    Raises:
        CompendiumError: it cannot be had, or is not the version that was checked.
    """
    import pooch

    pooch.get_logger().setLevel("WARNING")
    try:
        pooch.retrieve(REVEAL_URL, f"sha256:{REVEAL_SHA256}", REVEAL, folder)
    except (OSError, ValueError) as error:
        raise CompendiumError(
            f"reveal.js cannot be had from {REVEAL_URL} ({type(error).__name__}: {error}). On a "
            f"machine with a network run `npm pack reveal.js@{REVEAL[10:-4]}` and copy {REVEAL} to "
            f"{folder}"
        ) from error
    return folder / REVEAL


def unpack(archive: Path, folder: Path) -> None:
    """Put what the decks need of reveal.js into ``folder``."""
    with tarfile.open(archive) as packed:
        for member in packed:
            name = member.name.removeprefix("package/")
            if WANTED.fullmatch(name):
                store.write_atomically(folder / name, packed.extractfile(member).read())


def write(folder: Path) -> list[Path]:
    """Write every deck of the selection into ``folder``; gives their paths."""
    written = []
    for name, chosen in tomllib.loads(SELECTION.read_text(encoding="utf-8")).items():
        written.append(folder / f"{name}.html")
        store.write_atomically(written[-1], html(deck(chosen["title"], chosen["slides"])))
    return written


def main() -> int:
    """The command line; returns the exit status."""
    folder = paths.build("slides")
    try:
        written = write(folder)
        unpack(fetch_reveal(folder), folder / "reveal")
    except (CompendiumError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(*written, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
