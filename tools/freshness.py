"""What a notebook's results depend on, as one hash.

A notebook declares in its metadata what cannot be read off its code::

    "dfc": {"minutes": 4,  about how long it runs
            "needs": ["01_cache_activations"],  notebooks that run before it
            "inputs": ["data/pair"],            files or folders of the compendium that it reads
            "outputs": ["activations"]}         what it leaves in build/<profile>/ for later ones

Its *key* hashes everything that may change its results: its code cells, the library modules they
import (followed through ``dfc_lib`` by reading syntax trees, lazy imports included) with the data
files those name, its inputs' contents, the profile, overridden parameters, ``requirements.lock``
and the keys of the notebooks it needs. Comments, blank lines, markdown and the library's docstrings
are left out. Content decides, not times: a git checkout scrambles those.

Standard library only: it runs before anything is known to need running.
"""

import ast
import contextlib
import hashlib
import heapq
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from dfc_lib import paths, store
from dfc_lib.provenance import Library, code_text, digest


class CompendiumError(Exception):
    """Something to tell the user in one message, without a traceback."""


@dataclass(frozen=True)
class Notebook:
    """One numbered notebook as it was on disk when it was read."""

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
    def minutes(self) -> float:
        """About how long it runs at the published profile; decides what begins first."""
        return float(self.content["metadata"].get("dfc", {}).get("minutes", 0))

    @cached_property
    def code(self) -> list[str]:
        """The source of each code cell."""
        cells = (cell for cell in self.content["cells"] if cell["cell_type"] == "code")
        return [_joined(cell["source"]) for cell in cells]

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """The literals assigned in the cell tagged ``parameters``, by name."""
        found: dict[str, Any] = {}
        for cell in self.content["cells"]:
            if "parameters" in cell["metadata"].get("tags", []):
                for node in ast.parse(_joined(cell["source"])).body:
                    if isinstance(node, ast.Assign | ast.AnnAssign):
                        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                        with contextlib.suppress(ValueError):
                            value = ast.literal_eval(node.value)
                            found |= {t.id: value for t in targets if isinstance(t, ast.Name)}
        return found


def load_notebooks(root: Path) -> dict[str, Notebook]:
    """The numbered notebooks of ``root/notebooks``, each after those it needs, else by number.

    Raises:
        CompendiumError: a file is no notebook, a need names none, or needs run in a circle.
    """
    found: dict[str, Notebook] = {}
    for path in sorted((root / "notebooks").glob("[0-9]*.ipynb")):
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
    for notebook in found.values():
        for need in set(notebook.declared("needs")) - set(found):
            raise CompendiumError(
                f"{notebook.path.name}: metadata.dfc.needs names {need!r}, "
                f"which is none of: {', '.join(found)}"
            )
    sorter = TopologicalSorter({name: nb.declared("needs") for name, nb in found.items()})
    try:
        sorter.prepare()
    except CycleError as error:
        circle = " -> ".join(error.args[1])
        raise CompendiumError(f"notebooks need each other in a circle: {circle}") from error
    ordered: dict[str, Notebook] = {}
    ready = list(sorter.get_ready())
    heapq.heapify(ready)
    while ready:
        name = heapq.heappop(ready)
        ordered[name] = found[name]
        sorter.done(name)
        for more in sorter.get_ready():
            heapq.heappush(ready, more)
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
class Contents:
    """SHA-256 of files and folders, remembered by size and time so that rechecking is quick."""

    memory: Path

    @cached_property
    def known(self) -> dict[str, list]:
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self.memory.read_text(encoding="utf-8"))
        return {}

    def file(self, path: Path) -> str:
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        if self.known.get(str(path), [])[:2] != stamp:
            with path.open("rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            self.known[str(path)] = [*stamp, sha256]
        return self.known[str(path)][2]

    def of(self, path: Path) -> str:
        """The hash of a file, of a folder's visible files with their names, or ``missing``."""
        if path.is_file():
            return self.file(path)
        if not path.is_dir():
            return "missing"
        names = {file.relative_to(path): file for file in path.rglob("*") if file.is_file()}
        hidden = re.compile(r"\.|__pycache__$")
        return digest(
            [name.as_posix(), self.file(names[name])]
            for name in sorted(names)
            if not any(hidden.match(part) for part in name.parts)
        )

    def save(self) -> None:
        """Failing to remember costs time only, so it is no error."""
        with contextlib.suppress(OSError):
            store.write_atomically(self.memory, json.dumps(self.known))


@dataclass
class Keys:
    """The keys of a compendium's notebooks at one profile, as files are at first use."""

    root: Path
    profile: str
    contents: Contents
    notebooks: dict[str, Notebook]
    _keys: dict[str, str] = field(default_factory=dict)

    @cached_property
    def modules(self) -> Library:
        return Library(self.root)

    def parts(self, name: str, overrides: dict[str, Any] | None = None) -> dict[str, str]:
        """Everything the notebook's results depend on: a readable name and a hash for each."""
        notebook = self.notebooks[name]
        plain = []
        for number, source in enumerate(notebook.code, 1):
            try:
                plain.append(_without_magics(source))
            except SyntaxError as error:
                raise CompendiumError(
                    f"{notebook.path.name}, code cell {number}, line {error.lineno}: {error.msg}; "
                    "the imports of every cell are read, so each must be Python (% and ! are fine)"
                ) from error
        lock = self.root / "requirements.lock"
        pins = lock.read_text(encoding="utf-8").splitlines() if lock.exists() else []
        return {
            "profile": self.profile,
            "its code cells": digest(code_text(text, docstrings=True) for text in notebook.code),
            **{f"parameter {key}": repr(value) for key, value in (overrides or {}).items()},
            **{module: self.modules.fingerprint(module) for module in self.modules.closure(plain)},
            **{item: self.contents.of(self.root / item) for item in notebook.declared("inputs")},
            **{need: self.key(need) for need in notebook.declared("needs")},
            "requirements.lock": digest(pin for pin in pins if not pin.startswith("#")),
        }

    def key(self, name: str, overrides: dict[str, Any] | None = None) -> str:
        """The hash of :meth:`parts`; the ``code_hash`` in the figures' manifest."""
        if overrides:
            return digest(sorted(self.parts(name, overrides).items()))
        if name not in self._keys:
            self._keys[name] = digest(sorted(self.parts(name).items()))
        return self._keys[name]


def code_hash(notebook: str, profile: str) -> str:
    """The key of a notebook as it is now, for what is saved outside a run: in Jupyter, by nbval."""
    contents = Contents(paths.build(profile, "state", "contents.json"))
    return Keys(paths.ROOT, profile, contents, load_notebooks(paths.ROOT)).key(notebook)


def _joined(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)


def _without_magics(source: str) -> str:
    """A cell as plain Python: % and ! lines become ``pass``; another language, empty."""
    plain = re.sub(r"(?m)^([ \t]*)[%!?].*$", r"\1pass", source)
    try:
        ast.parse(plain)
    except SyntaxError:
        if source.lstrip().startswith("%%"):
            return ""
        raise
    return plain
