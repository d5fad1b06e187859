"""Where everything is. All paths are absolute, so a notebook works from any current directory.

=============  =============================================================================
``ROOT``       the compendium: this checkout (``DFC_ROOT`` overrides, for an installed copy)
``NOTEBOOKS``  the numbered notebooks, committed as executed at the published profile
``DATA``       what is committed as input; ``PAIR`` is the notebooks' model pair in it
``FIGURES``    PNG + PDF + CSV of every figure and ``manifest.json``, committed
``BUILD``      generated intermediates, one folder per profile; safe to delete (see ``build_root``)
``DOWNLOADS``  models and data sets of the hub that were downloaded by hand; not committed
=============  =============================================================================
"""

import os
from pathlib import Path

ROOT = Path(os.environ.get("DFC_ROOT") or Path(__file__).parents[1]).resolve()
NOTEBOOKS = ROOT / "notebooks"
DATA = ROOT / "data"
PAIR = DATA / "pairs" / "0"
FIGURES = ROOT / "figures"
BUILD = ROOT / "build"
DOWNLOADS = ROOT / "downloads"


class BuildFolderError(OSError):
    """The build folder cannot be created or written to."""


def downloaded(name: str) -> Path | None:
    """The folder of a model or data set ``owner/name`` in ``DOWNLOADS``; None if it has none."""
    folder = DOWNLOADS / name.rpartition("/")[2]
    return folder if name.count("/") == 1 and folder.is_dir() else None


def build_root() -> Path:
    """The root of what is generated: ``DFC_BUILD``, read at every call, if set, else ``BUILD``."""
    return Path(os.environ.get("DFC_BUILD") or BUILD).expanduser().resolve()


def build(profile_name: str, *parts: str) -> Path:
    """The absolute path ``<build root>/<profile_name>/<parts...>``.

    The profile's folder is created, what lies below it is the caller's to make.

    Raises:
        BuildFolderError: the folder cannot be created or is not writable.
    """
    folder = build_root() / profile_name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("no write permission")
    except OSError as error:
        raise BuildFolderError(
            f"cannot write to the build folder {folder} ({error.strerror or error}). Make it "
            "writable, or set the environment variable DFC_BUILD to a folder that is: "
            "DFC_BUILD=~/dfc-build make figures"
        ) from error
    return folder.joinpath(*parts)


def activations(profile_name: str, setting: str = "threshold") -> Path:
    """The folder of the activation caches of a setting; that of ``threshold`` holds the others'."""
    folder = build(profile_name, "activations")
    return folder if setting == "threshold" else folder / setting


def cores() -> int:
    """The CPU cores that this process may use; ``DFC_CORES``, if that is set.

    The runner sets it for notebooks that run side by side: each has its share.

    Raises:
        ValueError: ``DFC_CORES`` is not a whole number from 1.
    """
    if given := os.environ.get("DFC_CORES"):
        if not given.isdigit() or int(given) < 1:
            raise ValueError(f"DFC_CORES={given!r}: give a whole number from 1, or unset it")
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
