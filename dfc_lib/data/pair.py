"""The pair under study: a tuned model A, a base model B, one tokenizer, one layer.

Every later step reads and writes at one *site*: the residual stream after block ``layer`` (counted
from 0). In Hugging Face's outputs this is ``hidden_states[layer + 1]`` (for every block but the
last, whose entry HF normalises), in TransformerLens' names ``blocks.{layer}.hook_out``.

Models are plain Hugging Face decoders (Qwen2, Llama and alike: ``model.model.layers``); the same
loader serves the embedded pair and ``Qwen/Qwen2.5-3B``. Weights are safetensors only and no code
from a model repository is ever run.
"""

from __future__ import annotations

import gc
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from dfc_lib import paths, store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SUMS = "SHA256SUMS"
T = TypeVar("T")


class PairError(RuntimeError):
    """A model folder or file is missing, damaged or does not fit; the message says what to do."""


# ---------------------------------------------------------------------------------------------
# files

_REMEDY = (
    "Restore it with `git checkout -- data/pairs`, remake it with `make pair`, or download it again."
)


def verify(folder: str | Path) -> None:
    """Check a model folder where a ``SHA256SUMS`` in or above it covers it (the shipped pair's do).

    A flipped byte in a weight raises nothing on loading, it just changes the results. Raises
    :class:`PairError` naming every file that is missing, truncated or altered, with the remedy.
    """
    folder = Path(folder).resolve()
    above = next((p for p in [folder, *folder.parents][:4] if (p / SUMS).is_file()), None)
    if above is None:
        return
    problems = []
    for line in (above / SUMS).read_text().splitlines():
        digest, _, name = line.partition("  ")
        path = above / name
        if path.is_relative_to(folder) and (why := store.damage(path, digest)):
            problems.append(f"{path}: {_unreadable(path) or why}")
    if problems:
        raise PairError("\n".join([*problems, _REMEDY]))


def _unreadable(path: Path) -> str:
    """What keeps a ``safetensors`` file from being read; empty if nothing does."""
    if path.suffix == ".safetensors" and path.is_file():
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            return f"truncated or altered ({path.stat().st_size:,} bytes; {error})"
    return ""


# ---------------------------------------------------------------------------------------------
# loading


def load_model(
    name_or_directory: str | Path,
    dtype: torch.dtype | str = torch.float32,
    device: str = "cpu",
) -> PreTrainedModel:
    """A causal language model from a local folder or the Hugging Face hub, frozen, in eval mode.

    ``dtype`` is the dtype computed in (torch's, or its name), whatever the files hold (the embedded
    pair ships as bfloat16 and runs in float32). Raises :class:`PairError` where the folder is
    missing or damaged, where the hub cannot be reached, where there are no safetensors weights, and
    where the device is not there or too small.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    source = _resolve(name_or_directory)
    _need_device(device)
    bars = logging.is_progress_bar_enabled()
    if isinstance(source, Path):
        _need_weights(source)
        verify(source)
        logging.disable_progress_bar()  # one per load clutters notebooks; downloads keep theirs
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
        return model.to(device).eval().requires_grad_(False)
    except Exception as error:  # every loader below raises its own kind
        raise _explain(source, error, device) from error
    finally:
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(name_or_directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a model. Raises :class:`PairError` as :func:`load_model` does."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = _resolve(name_or_directory)
    if isinstance(source, Path) and not any(source.glob("tokenizer*")):
        raise PairError(f"{source}: no tokenizer files (tokenizer.json, tokenizer_config.json).")
    try:
        # AutoTokenizer goes by the model type in config.json: beside a Qwen2 model it would put
        # Qwen2's own pre-tokenizer in the place of the one that tokenizer.json states.
        if isinstance(source, Path) and (source / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(source)
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise _explain(source, error) from error


def _resolve(name: str | Path) -> Path | str:
    """A folder where there is one, a hub name where it reads like one; an error otherwise."""
    if Path(name).is_dir():
        return Path(name)
    if folder := paths.downloaded(str(name)):
        return folder
    if isinstance(name, Path) or not is_hub_name(name):
        raise PairError(
            f"{name}: no such model folder; a hub model is named 'owner/name'. {_REMEDY}"
        )
    return name


def is_hub_name(name: str) -> bool:
    """Whether it reads like ``owner/name``, and not like a path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def by_hand(name: str, error: Exception, options: str = "") -> str:
    """What to do where a model or data set of the hub (``owner/name``) cannot be reached."""
    folder = name.rpartition("/")[2]
    return (
        f"{name}: cannot be had from the Hugging Face hub ({type(error).__name__}: {error}). On a "
        f"machine with network access run `hf download {name}{options} --local-dir "
        f"{paths.DOWNLOADS.name}/{folder}` and copy that folder to {paths.DOWNLOADS / folder}, "
        "where it is found; or give a path instead of the name."
    )


def _need_weights(folder: Path) -> None:
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise PairError(
            f"{folder}: no config.json or no *.safetensors in it. Only safetensors weights are "
            "loaded (a pickled checkpoint can run code): convert it with `save_pretrained`. "
            f"{_REMEDY}"
        )


def device_is_here(device: str) -> bool:
    """Whether torch finds such a device on this machine."""
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    return available.get(torch.device(device).type, lambda: True)()


def _need_device(device: str) -> None:
    if not device_is_here(device):
        raise PairError(
            f"device {device!r}: torch {torch.__version__} finds none here. Take a machine with one "
            "and a build of torch for it (`make setup TORCH_INDEX=...`, see the README), or run on "
            'the CPU: a profile file with "device": "cpu".'
        )


def _is_out_of_memory(error: BaseException) -> bool:
    # torch's CPU allocator raises a plain RuntimeError
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "t allocate memory" in str(error)


def _explain(source: Path | str, error: Exception, device: str = "") -> PairError:
    if _is_out_of_memory(error):
        return PairError(
            f"{source}: does not fit into the memory of {device or 'this machine'} ({error}). "
            "`python -m tools.budget --profile NAME` lists what a profile needs. Free the device "
            'of other programs, or load in "bfloat16".'
        )
    if isinstance(source, Path):
        damaged = [f"{p}: {why}" for p in sorted(source.glob("*")) if (why := _unreadable(p))]
        where = ", ".join(damaged) or f"{source}: cannot be loaded"
        return PairError(f"{where} ({type(error).__name__}: {error}). {_REMEDY}")
    return PairError(by_hand(source, error))


# ---------------------------------------------------------------------------------------------
# the pair


@dataclass(frozen=True)
class Pair:
    """Models of one width that share a tokenizer, and the layer at which they are compared.

    ``models`` maps names to models *in order*; this order is the ``model`` axis of every activation
    array (``{"A": tuned, "B": base}``; more than two are allowed). ``layer`` counts blocks from 0.
    """

    models: Mapping[str, Any]
    tokenizer: Any
    layer: int

    def __post_init__(self) -> None:
        models = self.models.items()
        widths = {name: width(model) for name, model in models}
        embedded = {name: len(model.get_input_embeddings().weight) for name, model in models}
        for what, values in {"width (hidden_size)": widths, "vocabulary": embedded}.items():
            if len(set(values.values())) > 1:
                shown = ", ".join(f"{name}: {value}" for name, value in values.items())
                raise PairError(
                    f"the models differ in {what} ({shown}). A crosscoder compares models of one "
                    "family: take a tuned model and the base it was tuned from."
                )
        for name, model in models:
            if not 0 <= self.layer < depth(model):
                raise PairError(
                    f"layer {self.layer}: model {name} has {depth(model)} blocks, "
                    f"so layer must lie in 0..{depth(model) - 1}."
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Model names, in the order of the ``model`` axis."""
        return tuple(self.models)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return width(next(iter(self.models.values())))

    def index(self, name: str) -> int:
        """Position of a model on the ``model`` axis."""
        if name not in self.models:
            raise PairError(f"no model {name!r} in this pair; there are {', '.join(self.models)}.")
        return self.names.index(name)


def load_pair(
    sources: Mapping[str, str | Path],
    layer: int,
    dtype: torch.dtype | str = torch.float32,
    device: str = "cpu",
) -> Pair:
    """Load ``{"A": folder or hub name, "B": ...}``, and the tokenizer of the first one."""
    models = {name: load_model(source, dtype, device) for name, source in sources.items()}
    return Pair(models, load_tokenizer(next(iter(sources.values()))), layer)


def width(model: nn.Module) -> int:
    """Width of the residual stream (``hidden_size``)."""
    return model.config.hidden_size


def depth(model: nn.Module) -> int:
    """Number of decoder blocks."""
    return len(model.model.layers)


def fingerprint(model: nn.Module) -> str:
    """16 hex digits that change when any weight does: caches are addressed by it.

    Per tensor: name, shape, dtype, the exact integer sum of its bit patterns (no rounding, so it is
    the same on any number of threads) and a sample of 1,024 values. Fast enough for 3B parameters.
    """
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        flat = value.detach().reshape(-1).view(bits[value.element_size()])
        sample = flat[:: max(1, flat.numel() // 1024)][:1024].tolist()
        total = int(flat.sum(dtype=torch.int64))
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}{total}{sample}".encode())
    return digest.hexdigest()[:16]


def in_chunks(
    order: Sequence[int],
    rows_each: Callable[[int], int],
    batch_size: int,
    work: Callable[[list[int], int], T],
) -> Iterator[T]:
    """Yield ``work(items, batch_size)`` over runs of ``order`` of about ``batch_size`` rows each.

    Out of memory: the batch size is halved and the same run is tried again. With one row left it
    is a :class:`PairError`, for then no batch size helps.
    """
    done = 0
    while done < len(order):
        stop, rows = done + 1, rows_each(order[done])
        while stop < len(order) and rows + rows_each(order[stop]) <= batch_size:
            rows += rows_each(order[stop])
            stop += 1
        try:
            result = work(list(order[done:stop]), batch_size)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if batch_size == 1:
                raise PairError(
                    f"out of memory even with one row at a time ({error}). Use shorter sequences, "
                    "a smaller dtype (bfloat16) or a device with more memory."
                ) from error
        else:
            done = stop
            yield result
            continue
        # After the except clause, whose traceback would keep the large tensors alive.
        batch_size = max(1, min(batch_size, rows) // 2)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(f"out of memory: going on with batch_size={batch_size}", stacklevel=3)
