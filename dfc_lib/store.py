"""What is kept on disk is whole, and named by what it was made from."""

import hashlib
import json
import os
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def key(*parts: Any) -> str:
    """16 hex digits that name JSON values, whatever the order of a mapping's entries.

    >>> key({"steps": 60, "seed": 0}, "tied") == key({"seed": 0, "steps": 60}, "tied")
    True

    What is kept is named by everything that it was made from: settings, data and the code
    (:func:`dfc_lib.provenance.code_hash`).
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(path: Path, digest: str) -> str:
    """What is wrong with a file whose SHA-256 should be ``digest``; empty if nothing is."""
    if not path.is_file():
        return "missing"
    return "" if sha256(path) == digest else "truncated or altered (its SHA-256 differs)"


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write ``content`` (text as UTF-8, newlines as given); ``path`` is never seen half written.

    Folders on the way are created; two writers at once leave one complete file, never a mixture.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because os.replace is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def lock(path: Path, wait: bool = True) -> AbstractContextManager:
    """Hold the lock whose file is ``path``; the system lets go however its holder ends.

    >>> with lock(folder / ".lock"):
    ...     ...  # nobody else is here

    Folders on the way are created; the file stays.

    Raises:
        filelock.Timeout: on entering, when another one holds it and ``wait`` is false.
    """
    from filelock import FileLock

    return FileLock(path, blocking=wait)


def save_tensors(
    tensors: "dict[str, Tensor]", path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write ``safetensors``, never half written."""
    from safetensors.torch import save

    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(whole, metadata))
