"""What made a thing: its code as a hash, part of every content key, and the machine's arithmetic.

A module counts with everything it reaches through the library's imports (lazy ones included) and
with the data files beside it that it names. Comments, blank lines and docstrings do not count, so
rewording or reformatting makes nothing anew; changing one operation does.
"""

import ast
import hashlib
import io
import json
import os
import platform
import re
import threading
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.util import resolve_name
from pathlib import Path

PACKAGE = "dfc_lib"
_NAMES_DATA = re.compile(r"\w[\w/-]*\.(?!py$)\w+")

# Without these, torch's kernels, oneDNN and MKL each sum in the order that suits the processor.
# AVX2 is what every x86-64 machine of the last ten years has; it costs a training nothing.
ARITHMETIC = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"}
# CPython 3.11 counts the depth of what it parses in one place for all threads, and raises
# SystemError where two parse at once, as trainings side by side do when they name their code.
_PARSING = threading.Lock()


def code_text(source: str, *, docstrings: bool = False) -> str:
    """``source`` without comments, blank lines and, unless ``docstrings``, docstrings.

    What cannot be parsed is returned as it is, so that any edit to it counts as a change.
    """
    source = source.replace("\r\n", "\n")
    try:
        tree = ast.parse(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, tokenize.TokenError):
        return source
    lines = source.split("\n")
    for token in tokens:
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in [] if docstrings else ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            start, end = first.lineno - 1, first.end_lineno
            before = lines[start].encode()[: first.col_offset]
            after = lines[end - 1].encode()[first.end_col_offset :]
            if not before.strip() and not after.strip():  # nothing else stands on its lines
                lines[start:end] = [""] * (end - start)
    return "\n".join(line.rstrip() for line in lines if line.strip())


@dataclass
class Library:
    """The modules of ``root/dfc_lib``: what each depends on, and a hash of each one's code."""

    root: Path
    _direct: dict[str, set[str]] = field(default_factory=dict)
    _fingerprints: dict[str, str] = field(default_factory=dict)

    @cached_property
    def files(self) -> dict[str, Path]:
        found = {}
        for path in sorted((self.root / PACKAGE).rglob("*.py")):
            parts = path.relative_to(self.root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        return found

    def imported(self, source: str, package: str = "", file: str | Path = "<cell>") -> set[str]:
        """Modules that ``source`` imports or names in a string, and the packages above them.

        ``package`` is what relative imports start from; ``file`` is named where it is not Python. A
        string counts because of ``importlib.import_module("dfc_lib.x")`` and ``python -m
        dfc_lib.x``.
        """
        tree = ast.parse(source, file)
        names = _strings_in(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = resolve_name("." * node.level + (node.module or ""), package)
                names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        found = [f"{name}." for name in names & self.files.keys()]
        return {module for module in self.files if any(n.startswith(f"{module}.") for n in found)}

    def closure(self, sources: Iterable[str]) -> list[str]:
        """Every library module that code with these sources reaches.

        Raises:
            SyntaxError: one of them, or such a module, is not Python; names file and line.
        """
        todo: set[str] = set().union(*(self.imported(source) for source in sources))
        reached: set[str] = set()
        while todo:
            name = todo.pop()
            reached.add(name)
            if name not in self._direct:
                path = self.files[name]
                package = name if path.name == "__init__.py" else name.rpartition(".")[0]
                self._direct[name] = self.imported(path.read_text("utf-8"), package, path)
            todo |= self._direct[name] - reached
        return sorted(reached)

    def fingerprint(self, name: str) -> str:
        """A hash of one module's code and of the data files beside it that it names."""
        if name not in self._fingerprints:
            path = self.files[name]
            source = path.read_text(encoding="utf-8")
            parts = [code_text(source)]
            for text in sorted(_strings_in(ast.parse(source))):
                beside = path.parent / text if _NAMES_DATA.fullmatch(text) else None
                if beside and beside.is_file():
                    data = beside.read_bytes().replace(b"\r\n", b"\n")
                    parts.append(hashlib.sha256(data).hexdigest())
            self._fingerprints[name] = digest(parts)
        return self._fingerprints[name]


@cache
def _this_library() -> Library:
    return Library(Path(__file__).parents[1])


@cache
def code_hash(*modules: str) -> str:
    """16 hex digits that name the code of library modules and of all that they reach.

    >>> key = code_hash("dfc_lib.crosscoder.training")  # changes when the loss does

    Raises:
        KeyError: the library has no such module.
    """
    library = _this_library()
    sources = [f"import {name}" for name in modules]
    if unknown := set(modules) - set(library.files):
        raise KeyError(f"the library has no module {', '.join(sorted(unknown))}")
    with _PARSING:
        reached = library.closure(sources)
        return digest([name, library.fingerprint(name)] for name in reached)[:16]


def fix_arithmetic() -> None:
    """Make sums round alike on all x86-64 machines; called before torch is loaded.

    Sets environment variables, which processes started later inherit. ``DFC_ARITHMETIC=native``
    leaves everything to the machine: other last bits, so take a build folder of its own with it
    (``DFC_BUILD``).
    """
    native = os.environ.get("DFC_ARITHMETIC") == "native"
    if platform.machine().lower() in ("x86_64", "amd64") and not native:
        os.environ.update(ARITHMETIC)


def arithmetic() -> dict[str, str | None]:
    """What the environment says on the order of sums, by variable; None where it leaves it open."""
    return {name: os.environ.get(name) for name in ARITHMETIC}


def digest(items: Iterable) -> str:
    """The sha256 of a list of JSON values."""
    return hashlib.sha256(json.dumps(list(items)).encode()).hexdigest()


def _strings_in(tree: ast.AST) -> set[str]:
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str)}
