"""Which feature may touch which model, and the space in which the dictionary lives."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

Raw = Float[Tensor, "batch model d_model"]  # activations of all models, raw units
Rows = Float[Tensor, "d_dict model d_model"]  # one row per feature and model
BATCH = 4096  # samples read at a time


# --------------------------------------------------------------------------------------------------
# Partition: which feature may touch which model


@dataclass(frozen=True)
class Block:
    """``size`` consecutive features that may read from and write to ``models``, and no other."""

    name: str
    size: int
    models: tuple[int, ...]


@dataclass(frozen=True)
class Partition:
    """An ordered set of blocks of features, each with the models it may read from and write to.

    >>> p = Partition.dedicated(1024, exclusive_share=0.05)
    >>> [(b.name, b.size) for b in p.blocks], p.slice("B_exclusive")
    ([('A_exclusive', 51), ('B_exclusive', 51), ('shared', 922)], slice(51, 102, None))
    """

    model_names: tuple[str, ...]
    blocks: tuple[Block, ...]

    @classmethod
    def plain(cls, dict_size: int, n_models: int = 2) -> "Partition":
        """The plain crosscoder: every feature is shared by all models."""
        names = tuple(chr(ord("A") + m) for m in range(n_models))
        return cls(names, (Block("shared", dict_size, tuple(range(n_models))),))

    @classmethod
    def dedicated(
        cls, dict_size: int, exclusive_share: float, model_names: Sequence[str] = ("A", "B")
    ) -> "Partition":
        """A DFC: a share of the features (rounded down) for each model alone, the rest shared.

        Block order is ``A_exclusive, B_exclusive, ..., shared``, as in the published checkpoints.

        Raises:
            ValueError: a model would get no exclusive feature, or no shared one would be left.
        """
        n_models = len(model_names)
        exclusive = int(dict_size * exclusive_share + 1e-9)  # 0.29 * 100 is 28.999... in binary
        if exclusive < 1 or n_models * exclusive >= dict_size:
            raise ValueError(
                f"exclusive_share={exclusive_share} of dict_size={dict_size} is {exclusive} "
                f"features for each of {n_models} models; every block needs at least one "
                "(Partition.plain has no exclusive features)"
            )
        blocks = [Block(f"{name}_exclusive", exclusive, (m,)) for m, name in enumerate(model_names)]
        shared = Block("shared", dict_size - n_models * exclusive, tuple(range(n_models)))
        return cls(tuple(model_names), (*blocks, shared))

    @property
    def n_models(self) -> int:
        return len(self.model_names)

    @property
    def dict_size(self) -> int:
        return sum(block.size for block in self.blocks)

    @property
    def names(self) -> tuple[str, ...]:
        """Block names in feature order."""
        return tuple(block.name for block in self.blocks)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Block name -> slice of the feature axis."""
        edges = np.cumsum([0, *(block.size for block in self.blocks)]).tolist()
        return {block.name: slice(edges[i], edges[i + 1]) for i, block in enumerate(self.blocks)}

    def slice(self, block: str) -> slice:
        """The features of one block. Raises ``KeyError`` naming the blocks there are."""
        if block not in self.names:
            raise KeyError(f"no block {block!r}; this partition has {list(self.names)}")
        return self.slices[block]

    def model(self, model: str | int) -> int:
        """The index of a model given by name or index. Raises ``KeyError`` naming the models."""
        if model in self.model_names:
            return self.model_names.index(model)
        if isinstance(model, int) and 0 <= model < self.n_models:
            return model
        raise KeyError(f"no model {model!r}; this crosscoder has {list(self.model_names)}")

    @property
    def shared_blocks(self) -> list[Block]:
        """The blocks that belong to every model."""
        return [block for block in self.blocks if len(block.models) == self.n_models]

    def mask(self) -> Bool[Tensor, "d_dict model"]:
        """True where a feature may touch a model."""
        return self.zero_forbidden_(torch.ones(self.dict_size, self.n_models)).bool()

    @cached_property
    def forbidden(self) -> list[tuple[slice, int]]:
        """Every (features, model) rectangle in which weights must be zero."""
        return [
            (self.slices[block.name], model)
            for block in self.blocks
            for model in range(self.n_models)
            if model not in block.models
        ]

    def zero_forbidden_(self, rows: Rows) -> Rows:
        """Set the forbidden weights (or their gradients) to zero in place.

        Slices, not a mask tensor: nothing to store, to move between devices or to lose in a copy.
        """
        for features, model in self.forbidden:
            rows[features, model] = 0.0
        return rows

    def largest_forbidden(self, rows: Rows) -> float:
        """The integrity check: the largest absolute value where weights must be zero."""
        rows = rows.detach()
        rectangles = [rows[features, model].abs().amax() for features, model in self.forbidden]
        return float(torch.stack(rectangles).amax()) if rectangles else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Partition":
        """From what ``to_dict`` gave."""
        blocks = tuple(Block(b["name"], int(b["size"]), tuple(b["models"])) for b in data["blocks"])
        return cls(tuple(data["model_names"]), blocks)


# --------------------------------------------------------------------------------------------------
# Normaliser: raw activations <-> the space in which the dictionary lives


def iterate_batches(activations: Any) -> Iterator[Raw]:
    """Walk through a tensor, or ``n`` + ``gather(indices)``, as float32."""
    is_source = hasattr(activations, "n")
    n = activations.n if is_source else len(activations)
    for start in range(0, n, BATCH):
        stop = min(start + BATCH, n)
        rows = activations.gather(np.arange(start, stop)) if is_source else activations[start:stop]
        yield rows.float()


@dataclass(frozen=True)
class Normaliser:
    """Per model: subtract the mean, divide by one scalar: the mean squared norm is ``d_model``.

    One scalar per model keeps the geometry of the residual stream (a z-score per dimension does
    not), and gives every model the same weight in the reconstruction loss.

    Attributes:
        mean: raw units.
        scale: raw units per normalised unit; the ``s_m`` of the steering equation.
    """

    mean: Float[Tensor, "model d_model"]
    scale: Float[Tensor, " model"]

    @classmethod
    def fit(cls, activations: Any, pooled: bool = False) -> "Normaliser":
        """From all of ``activations``, ``(n, n_models, d_model)`` (see ``iterate_batches``).

        Args:
            pooled: one mean and one scale for all models, the averages of theirs. Then a difference
                of two models is the same in normalised units but for the scale: for models that
                share a frame, such as a model and what was fine-tuned from it.

        Raises:
            ValueError: values that are not finite, or a model whose activations are all equal.
        """
        n, total, squares = 0, 0.0, 0.0
        for batch in iterate_batches(activations):
            n += len(batch)
            total = total + batch.double().sum(0)
            squares = squares + batch.double().square().sum((0, 2))
        mean = total / n
        power = squares / (n * mean.shape[-1])
        variance = power - mean.square().mean(-1)
        if not bool(torch.isfinite(variance).all()):
            raise ValueError("the activations contain NaN or infinity; lint the activation cache")
        if not bool((variance > 1e-12 * power).all()):
            raise ValueError(f"a model's activations are all equal (variances {variance.tolist()})")
        scale = variance.sqrt()
        if pooled:
            mean = mean.mean(0, keepdim=True).expand_as(mean)
            scale = scale.mean(0, keepdim=True).expand_as(scale)
        return cls(mean.float(), scale.float())

    def variance_of_differences(self, activations: Any, reference: int) -> Float[Tensor, " model"]:
        """Variance per dimension, about its mean, of each model minus the reference (there 0)."""
        n, total, squares = 0, 0.0, 0.0
        for batch in iterate_batches(activations):
            z = self.apply(batch.to(self.mean)).double()
            gap = z - z[:, [reference]]
            n, total = n + len(gap), total + gap.sum(0)
            squares = squares + gap.square().sum((0, 2))
        d_model = self.mean.shape[-1]
        return (squares / (n * d_model) - (total / n).square().mean(-1)).clamp(min=0).float()

    @property
    def is_identity(self) -> bool:
        """It changes nothing: published checkpoints do not say how they were scaled."""
        return not bool(self.mean.any()) and bool((self.scale == 1).all())

    def apply(self, x: Raw) -> Raw:
        """Raw to normalised."""
        return (x - self.mean) / self.scale[:, None]

    def invert(self, z: Raw) -> Raw:
        """Normalised to raw."""
        return z * self.scale[:, None] + self.mean
