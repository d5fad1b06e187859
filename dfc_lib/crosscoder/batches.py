"""The batches of a training run: which samples, in which order and scale."""

from functools import cached_property
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dfc_lib.crosscoder.partition import iterate_batches

if TYPE_CHECKING:
    from dfc_lib.crosscoder.loop import TrainConfig


@runtime_checkable
class ActivationSource(Protocol):
    """Activations that are not one array: ``n`` samples by index (a cache of ``activations``)."""

    n: int

    def gather(
        self, indices: Int64[np.ndarray, " batch"]
    ) -> Float[Tensor, "batch model d_model"]: ...


AnyActivations = Float[Tensor, "n model d_model"] | ActivationSource


class Batches:
    """Activations in the order of a run, which is a pure function of (seed, step)."""

    def __init__(
        self, config: "TrainConfig", activations: AnyActivations, labels: np.ndarray | None
    ):
        self.activations, self.config = activations, config
        self.is_source = hasattr(activations, "n")
        self.n = int(activations.n) if self.is_source else len(activations)
        if self.n < 1:
            raise ValueError("there are no activations to train on")
        shape = tuple(self._gather(np.arange(1)).shape)
        if len(shape) != 3 or shape[1] != config.partition.n_models:
            raise ValueError(
                f"activations have shape {(self.n, *shape[1:])}, the partition asks for "
                f"(n, {config.partition.n_models}, d_model)"
            )
        self.d_model = shape[2]
        self._epoch, self._order = -1, np.arange(0)
        self.labels, self.n_labels = None, 0
        if config.normalise == "zscore_unstored":
            self.labels = np.zeros(self.n, dtype=np.int64) if labels is None else np.asarray(labels)
            if self.labels.shape != (self.n,):
                raise ValueError(f"labels have shape {self.labels.shape}, expected ({self.n},)")
            names, self.labels = np.unique(self.labels, return_inverse=True)
            self.n_labels = len(names)

    def indices(self, step: int) -> Int64[np.ndarray, " batch"]:
        """The samples of a step, ascending (kinder to a memory map than the drawn order)."""
        size, parts = self.config.batch_size, []
        position, end = step * size, (step + 1) * size
        while position < end:
            epoch, offset = divmod(position, self.n)
            if epoch != self._epoch:
                order = np.random.default_rng([self.config.seed, epoch]).permutation(self.n)
                self._epoch, self._order = epoch, order
            part = self._order[offset : offset + end - position]
            parts.append(part)
            position += len(part)
        return np.sort(np.concatenate(parts))

    def batch(self, step: int) -> Float[Tensor, "batch model d_model"]:
        """The activations of a step, on the device; raw, or z-scored in the published protocol."""
        indices = self.indices(step)
        x = self._gather(indices).to(self.config.device, getattr(torch, self.config.dtype))
        if self.labels is not None:
            label = torch.as_tensor(self.labels[indices], device=x.device)
            mean, deviation = (s.to(x) for s in self.statistics)
            x = (x - mean[label]) / deviation[label]
        return x

    def _gather(self, indices: np.ndarray) -> Tensor:
        if self.is_source:
            return self.activations.gather(indices)
        return self.activations[torch.as_tensor(indices, device=self.activations.device)]

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation per label, model and dimension."""
        shape = (self.n_labels, self.config.partition.n_models, self.d_model)
        count = torch.zeros(self.n_labels, 1, 1, dtype=torch.float64)
        total = torch.zeros(shape, dtype=torch.float64)
        squares = torch.zeros_like(total)
        start = 0
        for batch in iterate_batches(self.activations):
            batch = batch.double().cpu()
            label = torch.as_tensor(self.labels[start : start + len(batch)])
            start += len(batch)
            count.index_add_(0, label, torch.ones(len(batch), 1, 1, dtype=torch.float64))
            total.index_add_(0, label, batch)
            squares.index_add_(0, label, batch.square())
        mean = total / count
        variance = (squares - count * mean.square()) / (count - 1).clamp(min=1)
        deviation = variance.clamp(min=0).sqrt().clamp(min=1e-6)  # the published floor
        return mean.float(), deviation.float()
