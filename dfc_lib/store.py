"""What is kept on disk is whole, and named by what it was made from."""

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

if TYPE_CHECKING:
    from torch import Tensor


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


def lock(path: Path) -> FileLock:
    """Hold a file for as long as ``with lock(path):`` lasts; a second holder waits.

    The system lets go of it when its holder ends, however that happens.
    """
    return FileLock(path)


def key(*parts: Any) -> str:
    """16 hex digits that name JSON values: what a thing was made from."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def save_tensors(
    tensors: "dict[str, Tensor]", path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write ``safetensors``, never half written."""
    from safetensors.torch import save

    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(whole, metadata))
