"""What a notebook's results depend on, as one hash, and whether those that are here are fresh.

A notebook declares in its metadata what cannot be read off its code::

    "dfc": {"minutes": 4,  about how long it runs
            "needs": ["01_cache_activations"],  notebooks that run before it
            "inputs": ["data/pairs/0"],         files or folders of the compendium that it reads
            "outputs": ["activations"],         what it leaves in build/<profile>/ for later ones
            "fetch": "dfc_lib.data.x"}          module whose fetch() downloads what it reads

Its *key* hashes everything that may change its results: its code cells, the library modules they
import (see :mod:`dfc_lib.provenance`), its inputs' contents, the profile's values,
``requirements.lock`` and the keys of the notebooks it needs. Comments, blank lines, markdown and
the library's docstrings are left out. Content decides, not times: a git checkout scrambles those.

Standard library only: it runs before anything is known to need running.
"""

import ast
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from dfc_lib import paths
from dfc_lib.profiles import Profile
from dfc_lib.provenance import Library, code_text, digest
from dfc_lib.results.figures import read_manifest


class CompendiumError(Exception):
    """Something to tell the user in one message, without a traceback."""


@dataclass(frozen=True)
class Notebook:
    """One notebook as it was on disk when it was read."""

    path: Path
    content: dict

    @property
    def name(self) -> str:
        return self.path.stem

    def declared(self, what: str) -> list[str]:
        """``metadata.dfc.needs``, ``.inputs`` or ``.outputs``."""
        items = self.content["metadata"].get("dfc", {}).get(what, [])
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise CompendiumError(
                f"{self.path.name}: metadata.dfc.{what} must be a list of strings, not {items!r}"
            )
        return items

    @property
    def fetch(self) -> str | None:
        """The module that downloads what it reads, see :func:`tools.execute.out_of_reach`."""
        return self.content["metadata"].get("dfc", {}).get("fetch")

    @property
    def minutes(self) -> float:
        """About how long it runs at the published profile; decides what begins first."""
        return float(self.content["metadata"].get("dfc", {}).get("minutes", 0))

    @cached_property
    def code(self) -> list[str]:
        """The source of each code cell."""
        cells = (cell for cell in self.content["cells"] if cell["cell_type"] == "code")
        return ["".join(cell["source"]) for cell in cells]

    @cached_property
    def plain_code(self) -> list[str]:
        """The same as plain Python: % and ! lines are ``pass``; cells in another language, empty.

        Raises:
            CompendiumError: a cell is no Python, so that its imports cannot be read.
        """
        plain = []
        for number, source in enumerate(self.code, 1):
            text = re.sub(r"(?m)^([ \t]*)[%!?].*$", r"\1pass", source)
            try:
                ast.parse(text)
            except SyntaxError as error:
                if not source.lstrip().startswith("%%"):
                    raise CompendiumError(
                        f"{self.path.name}, code cell {number}, line {error.lineno}: {error.msg}; "
                        "the imports of every cell are read, so each must be Python (% and ! are "
                        "fine)"
                    ) from error
                text = ""
            plain.append(text)
        return plain


def load_notebooks(root: Path) -> dict[str, Notebook]:
    """The notebooks of ``root/notebooks``, each after those it needs: the quickstart, then the
    numbered ones by number. Other files there, such as a reader's own copies, are left alone.

    Raises:
        CompendiumError: there is none, or a file is no notebook, a need names none, or needs run
            in a circle.
    """
    found: dict[str, Notebook] = {}
    place = root / "notebooks"
    for path in [*place.glob("quickstart.ipynb"), *sorted(place.glob("[0-9]*.ipynb"))]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["nbformat"] != 4 or not isinstance(content["cells"], list):
                raise ValueError("not in format 4")
            if not all("id" in cell for cell in content["cells"]):
                raise ValueError("a cell has no id, so nbformat would invent one at every run")
        except (ValueError, KeyError, TypeError) as error:
            raise CompendiumError(
                f"{path} is no notebook ({error}); restore it with git"
            ) from error
        found[path.stem] = Notebook(path, content)
    if not found:
        raise CompendiumError(f"no numbered notebooks in {place}")
    needs = {name: set(notebook.declared("needs")) for name, notebook in found.items()}
    for name in found:
        for need in needs[name] - set(found):
            raise CompendiumError(
                f"{name}.ipynb: metadata.dfc.needs names {need!r}, "
                f"which is none of: {', '.join(found)}"
            )
    ordered: dict[str, Notebook] = {}
    while left := [name for name in found if name not in ordered]:
        name = next((name for name in left if needs[name] <= set(ordered)), None)
        if name is None:
            raise CompendiumError(f"some of these need each other in a circle: {', '.join(left)}")
        ordered[name] = found[name]
    return ordered


def select(notebooks: dict[str, Notebook], wanted: Iterable[str]) -> list[str]:
    """Full names for ``05``, ``05_steering`` or ``notebooks/05_steering.ipynb``."""
    chosen = []
    for text in wanted:
        stem = Path(text).name.removesuffix(".ipynb")
        matches = [n for n in notebooks if stem == n or stem.zfill(2) == n.split("_")[0]]
        if len(matches) != 1:
            raise CompendiumError(
                f"no single notebook is called {text!r}; choose from: {', '.join(notebooks)}"
            )
        chosen += matches
    return chosen


def with_needs(notebooks: dict[str, Notebook], names: Iterable[str]) -> list[str]:
    """``names`` and everything they need, in the order in which to run."""
    wanted: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in wanted:
            wanted.add(name)
            todo += notebooks[name].declared("needs")
    return [name for name in notebooks if name in wanted]


@dataclass
class Project:
    """A compendium at one profile: where things go, and which notebooks are fresh.

    Files are taken as they are at first use: what is edited during a run counts as changed after.
    """

    root: Path
    profile: Profile
    output: Path | None = None  # a folder for results, for a check
    _inputs: dict[str, str] = field(default_factory=dict)
    _keys: dict[str, str] = field(default_factory=dict)

    # -- where things go

    @cached_property
    def build(self) -> Path:
        if self.root == paths.ROOT or os.environ.get("DFC_BUILD"):
            return paths.build(self.profile.name)
        return self.root / "build" / self.profile.name

    @property
    def results(self) -> Path:
        """Where state and unfinished notebooks are, and finished ones unless they are published."""
        return self.output or self.build

    @property
    def published(self) -> bool:
        return self.profile.published and not self.output

    @property
    def figures(self) -> Path:
        return (self.root if self.published else self.results) / "figures"

    def executed(self, name: str) -> Path:
        """Where the executed notebook goes: over its own source if it is published."""
        return (self.root if self.published else self.results) / "notebooks" / f"{name}.ipynb"

    def staging(self, name: str) -> Path:
        """The folder of a run that is not finished: its notebook, its figures, what it reported."""
        return self.results / "staging" / name

    def state_file(self, name: str) -> Path:
        return self.results / "state" / f"{name}.json"

    # -- what is fresh

    @cached_property
    def notebooks(self) -> dict[str, Notebook]:
        return load_notebooks(self.root)

    @cached_property
    def modules(self) -> Library:
        return Library(self.root)

    def parts(self, name: str) -> dict[str, str]:
        """Everything the notebook's results depend on: a readable name and a hash for each.

        Raises:
            CompendiumError: a cell or a module is not Python.
        """
        notebook = self.notebooks[name]
        lock = self.root / "requirements.lock"
        pins = lock.read_text(encoding="utf-8").splitlines() if lock.exists() else []
        try:
            names = self.modules.closure(notebook.plain_code)
        except SyntaxError as error:
            raise CompendiumError(f"{error.filename}:{error.lineno}: {error.msg}") from error
        return {
            "profile": self.profile.identity,
            "arithmetic": os.environ.get("DFC_ARITHMETIC") or "fixed",
            "its code cells": digest(code_text(text, docstrings=True) for text in notebook.code),
            **{module: self.modules.fingerprint(module) for module in names},
            **{item: self._input(item) for item in notebook.declared("inputs")},
            **{need: self._need(need) for need in notebook.declared("needs")},
            "requirements.lock": digest(pin for pin in pins if not pin.startswith("#")),
        }

    def key(self, name: str) -> str:
        """The hash of :meth:`parts`; the ``code_hash`` in the figures' manifest."""
        if name not in self._keys:
            self._keys[name] = digest(sorted(self.parts(name).items()))
        return self._keys[name]

    def _need(self, name: str) -> str:
        """The key of a notebook; of one that may be kept as it is, what its figures hold."""
        if not self.notebooks[name].fetch:
            return self.key(name)
        rows = read_manifest(Project(self.root, self.profile).figures)
        return digest(row["data_sha256"] for row in rows if row["notebook"] == name)

    def _input(self, item: str) -> str:
        if item not in self._inputs:
            self._inputs[item] = contents(self.root / item)
        return self._inputs[item]

    def state(self, name: str) -> dict | None:
        """What the last successful run recorded, None if there was none."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self.state_file(name).read_text(encoding="utf-8"))
        return None

    def why_stale(self, name: str) -> str | None:
        """The first reason why the notebook must run, None when it is fresh."""
        state = self.state(name)
        if state is None:
            return "never run here"
        now, before = self.parts(name), state["parts"]
        if changed := [part for part in {**before, **now} if now.get(part) != before.get(part)]:
            return f"changed: {', '.join(changed[:3])}" + (" ..." if len(changed) > 3 else "")
        executed = self.executed(name)
        if not executed.exists():
            return f"missing: {executed.name}"
        if outputs_digest(executed.read_text(encoding="utf-8")) != state["outputs_sha256"]:
            return "altered: its stored outputs"
        for file, sha256 in state["files"].items():
            now = contents(self.figures / file)
            if now != sha256:
                return f"{'missing' if now == MISSING else 'altered'}: {file}"
        for item in self.notebooks[name].declared("outputs"):
            if not (self.build / item).exists():
                return f"missing: {item} in the build folder"
        return None


MISSING = "missing"


def contents(path: Path) -> str:
    """The sha256 of a file, a hash of a folder's visible files with their names, or ``MISSING``."""
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    if not path.is_dir():
        return MISSING
    names = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    hidden = re.compile(r"\.|__pycache__$")
    visible = (name for name in names if not any(hidden.match(part) for part in name.parts))
    return digest([name.as_posix(), contents(path / name)] for name in visible)


def outputs_digest(text: str) -> str:
    """A hash of what the code cells of a notebook file show."""
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return digest([cell.get("execution_count"), cell.get("outputs")] for cell in cells)
