"""Crosscoders on disk: our own checkpoints, through SAELens, and the published format."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import SAE
from safetensors import SafetensorError
from torch import Tensor

from dfc_lib import paths
from dfc_lib.crosscoder.model import ARCHITECTURE, Crosscoder
from dfc_lib.crosscoder.partition import Block, Partition

PUBLISHED_FILES = "config.json", "model.pt"


class Source(NamedTuple):
    """A crosscoder's folder, in either format."""

    folder: Path
    name: str  # the hub name, or the folder's own
    commit: str = ""  # of the hub; empty where it is not known


def locate(source: str | Path) -> Source:
    """Find a crosscoder: a folder as it is; a hub name in ``downloads/``, else on the hub.

    >>> locate("antebe1/dfc-D8k-excl10-k45")  # or name@commit, which stays what it is

    Raises:
        FileNotFoundError: there is no such folder, or the hub cannot be reached; says what to do.
    """
    if Path(source).is_dir():
        return Source(Path(source), Path(source).resolve().name)
    name, _, revision = str(source).partition("@")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{source} is not a folder, nor the hub name of a crosscoder (owner/name). A folder "
            "holds cfg.json and sae_weights.safetensors (ours) or config.json and model.pt (the "
            "published format)"
        )
    here = paths.downloaded(name)
    # What `hf download` writes beside the files; the commit stands in its first line.
    record = here and next(here.glob(".cache/huggingface/download/*.metadata"), None)
    commit = record.read_text().partition("\n")[0] if record else ""
    if here and (not revision or commit.startswith(revision)):
        return Source(here, name, commit)
    from huggingface_hub import snapshot_download

    files = [SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, *PUBLISHED_FILES]
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=files))
    except Exception as error:  # the hub's client has many kinds of its own
        place = paths.DOWNLOADS / name.rpartition("/")[2]
        wanted = f"{name} --revision {revision}" if revision else name
        raise FileNotFoundError(
            f"{source}: cannot be had from the Hugging Face hub ({type(error).__name__}: {error}). "
            f"On a machine with network access run `hf download {wanted} --local-dir "
            f"{os.path.relpath(place, paths.ROOT)}` and copy that folder to {place}, where it is "
            "found; or give a folder's path instead of the name."
        ) from error
    return Source(folder, name, folder.name)  # the cache calls a snapshot's folder by its commit


def load(directory: str | Path, device: str = "cpu") -> Crosscoder:
    """Read what ``save`` wrote, through SAELens' own loader; in evaluation mode and frozen.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: not a crosscoder, damaged, without a normaliser, or with a forbidden weight that
            is not zero.
    """
    directory = Path(directory)
    for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} holds no crosscoder: {name} is missing")
    try:
        architecture = json.loads((directory / SAE_CFG_FILENAME).read_text()).get("architecture")
        if architecture != ARCHITECTURE:
            raise ValueError(f"its architecture is {architecture!r}, not {ARCHITECTURE!r}")
        crosscoder = SAE.load_from_disk(directory, device=device)
        crosscoder.check_integrity()
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{directory} is damaged ({error}); delete it and train again") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot load the crosscoder in {directory}: {error}") from error
    return crosscoder.eval().requires_grad_(False)


def load_published(directory: str | Path) -> Crosscoder:
    """Read a checkpoint in the format of arXiv 2606.26474's authors; identity normaliser.

    The folder holds ``config.json`` (``activation_dim, dict_size, k, n_a, n_b``) and ``model.pt``,
    a torch state dict: ``W_enc (2, d, D)``, ``b_enc (D,)``, ``W_dec (D, 2, d)``, ``b_dec (2, d)``
    and optionally ``enc_mask (2, D)``, ``dec_mask (D, 2)``. Feature order: A-exclusive,
    B-exclusive, shared. ``b_dec`` is not subtracted before encoding. In evaluation mode and frozen.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: naming what is wrong with the file.
    """
    directory = Path(directory)
    for name in PUBLISHED_FILES:
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} is no published checkpoint: {name} is missing")
    sizes = _published_sizes(directory / "config.json")
    D, n_a, n_b = sizes["dict_size"], sizes["n_a"], sizes["n_b"]
    blocks = [
        Block("A_exclusive", n_a, (0,)),
        Block("B_exclusive", n_b, (1,)),
        Block("shared", D - n_a - n_b, (0, 1)),
    ]
    partition = Partition(("A", "B"), tuple(block for block in blocks if block.size))
    path = directory / "model.pt"
    state = _published_state(path, sizes, partition.mask())

    crosscoder = Crosscoder.create(sizes["activation_dim"], partition, sizes["k"])
    with torch.no_grad():
        for name, weight in state.items():
            getattr(crosscoder, name).copy_(weight)
    for name, largest in crosscoder.integrity().items():
        if largest:
            raise ValueError(
                f"{path}: the {name} has a weight of {largest:.3g} where n_a={n_a}, n_b={n_b} and "
                "the feature order A-exclusive, B-exclusive, shared ask for 0"
            )
    return crosscoder.eval().requires_grad_(False)


def _published_sizes(path: Path) -> dict[str, int]:
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    sizes = {}
    for name, least in {"activation_dim": 1, "dict_size": 1, "k": 1, "n_a": 0, "n_b": 0}.items():
        value = config.get(name) if isinstance(config, dict) else None
        if type(value) is not int or value < least:
            raise ValueError(f"{path}: {name} is {value!r}, expected a whole number >= {least}")
        sizes[name] = value
    for what, value in {"n_a + n_b": sizes["n_a"] + sizes["n_b"], "k": sizes["k"]}.items():
        if value > sizes["dict_size"]:
            raise ValueError(f"{path}: {what} = {value} exceeds dict_size = {sizes['dict_size']}")
    return sizes


def _published_state(path: Path, sizes: dict[str, int], mask: Tensor) -> dict[str, Tensor]:
    d, D = sizes["activation_dim"], sizes["dict_size"]
    shapes = {"W_enc": (2, d, D), "b_enc": (D,), "W_dec": (D, 2, d), "b_dec": (2, d)}
    masks = {"enc_mask": mask.T, "dec_mask": mask}
    try:
        # The published format is a pickle; weights_only executes nothing from it.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds: unpickling, zip, end of file
        raise ValueError(f"{path} cannot be read as a torch state dict: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a state dict")
    if missing := sorted(shapes.keys() - state.keys()):
        raise ValueError(f"{path} lacks {missing}; it has {sorted(map(str, state))}")
    if unknown := sorted(map(str, state.keys() - shapes.keys() - masks.keys())):
        raise ValueError(f"{path} has the unknown entries {unknown}")
    for name, shape in shapes.items():
        found = tuple(getattr(state[name], "shape", ()))
        if not isinstance(state[name], Tensor) or found != shape:
            raise ValueError(f"{path}: {name} has shape {found}, config.json asks for {shape}")
        if not bool(torch.isfinite(state[name]).all()):
            raise ValueError(f"{path}: {name} contains NaN or infinity")
    for name, expected in masks.items():
        if name in state and not torch.equal(state[name].bool(), expected):
            raise ValueError(
                f"{path}: {name} does not fit n_a and n_b in the order A-exclusive, B-exclusive, "
                "shared"
            )
    return {name: state[name].float() for name in shapes}
