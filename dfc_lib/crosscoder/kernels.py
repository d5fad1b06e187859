"""Sparse forward and backward of a top-k dictionary: work only for the features that fire.

Of ``d_dict`` features only ``k`` per sample are active, so of the dense cost of a training step
(five products of ``2 * batch * width * d_dict`` operations, with ``width = n_models * d_model``)
one is needed, the encoder's product that finds the active features. Everything after it touches
``batch * k`` rows:

====================  ==========================================  ==================================
quantity              formula (``S`` = the sparse code)           computed by
====================  ==========================================  ==================================
reconstruction        ``S @ W_dec``                               ``Decode.forward``
gradient of ``W_dec``  ``S.T @ grad``                             ``Pattern.weight_gradient``
gradient of ``S``     ``grad @ W_dec.T`` where ``S`` is stored    ``Decode.backward``
gradient of ``W_enc``  ``grad_S.T @ x``                           ``Pattern.weight_gradient``
====================  ==========================================  ==================================

Both weight matrices are stored feature-major, ``(d_dict, width)`` and contiguous, so an active
feature is one row. The gradients are exact, not approximations: ``tests/test_crosscoder.py``
compares them with the dense path in float64.

At ``d_model = 2048`` a fresh gradient is 134 MB, and the page faults of allocating it cost more
than computing it. So where a weight has a ``.grad`` already, which a training loop zeroes and
keeps, its gradient is added there in place, and autograd sees none for it.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Pattern:
    """Which features are active in which sample, in compressed sparse row form, without values.

    Attributes:
        starts: the entries of sample ``b`` are ``feature[starts[b] : starts[b + 1]]``.
        feature: the active feature of each entry, ascending within a sample.
        d_dict: number of features.
    """

    starts: Int64[Tensor, " batch+1"]
    feature: Int64[Tensor, " entries"]
    d_dict: int

    @property
    def batch(self) -> int:
        return self.starts.numel() - 1

    @cached_property
    def sample(self) -> Int64[Tensor, " entries"]:
        """The sample of each entry."""
        samples = torch.arange(self.batch, device=self.feature.device)
        return samples.repeat_interleave(self.starts.diff(), output_size=self.feature.numel())

    @cached_property
    def _by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        # Stable: the order of summation, and with it every bit of the result, is reproducible.
        feature, order = self.feature.sort(stable=True)
        edges = torch.arange(self.d_dict + 1, device=feature.device)
        return torch.searchsorted(feature, edges), self.sample.index_select(0, order), order

    def dense(self, values: Float[Tensor, " entries"]) -> Float[Tensor, "batch d_dict"]:
        """The code as an ordinary matrix."""
        code = values.new_zeros(self.batch, self.d_dict)
        return code.index_put((self.sample, self.feature), values)

    def weight_gradient(
        self,
        values: Float[Tensor, " entries"],
        samples: Float[Tensor, "batch width"],
        buffer: Float[Tensor, "d_dict width"] | None,
    ) -> Float[Tensor, "d_dict width"] | None:
        """``S.T @ samples``: for each feature the weighted sum over the samples it fires in.

        Added to ``buffer``, and None, where there is one.
        """
        starts, sample, order = self._by_feature
        transposed = _csr(starts, sample, values.index_select(0, order), (self.d_dict, self.batch))
        if buffer is None:
            return transposed @ samples
        buffer.addmm_(transposed, samples)
        return None


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


with warnings.catch_warnings():  # PyTorch announces once per process that this format is in beta
    warnings.simplefilter("ignore")
    _csr(torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([1.0]), (1, 1))


def top_k(preactivations: Float[Tensor, "batch d_dict"], k: int) -> Pattern:
    """The ``k`` largest pre-activations of each sample."""
    return _of_equal_size(_largest(preactivations, k), preactivations.shape[1])


def reserved_top_k(
    preactivations: Float[Tensor, "batch d_dict"], k: int, reserved: Sequence[slice]
) -> Pattern:
    """The largest pre-activation of each reserved block, and of the others as many as make k."""
    others = preactivations.clone()
    chosen = []
    for block in reserved:
        chosen.append(preactivations[:, block].argmax(-1, keepdim=True) + block.start)
        others[:, block] = -torch.inf
    chosen.append(_largest(others, k - len(reserved)))
    return _of_equal_size(torch.cat(chosen, dim=1).sort(dim=-1).values, preactivations.shape[1])


def _largest(values: Float[Tensor, "batch n"], k: int) -> Int64[Tensor, "batch k"]:
    """Where the ``k`` largest values of each row are, in ascending order of place.

    On a CPU by NumPy's vectorised partition, which finds the k-th largest value in less than half
    of the time that ``topk`` takes to find it and the places.
    """
    batch, n = values.shape
    if values.device.type == "cpu" and k < n:
        rows = values.numpy()
        kth = np.partition(rows, n - k, axis=-1)[:, n - k, None]
        places = np.flatnonzero(rows >= kth)
        if len(places) == batch * k:  # else some row has a tie for its last place, or NaN
            return torch.from_numpy(places).remainder_(n).view(batch, k)
    return values.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values


def _of_equal_size(feature: Int64[Tensor, "batch k"], d_dict: int) -> Pattern:
    batch, k = feature.shape
    starts = torch.arange(0, batch * k + 1, k, device=feature.device)
    return Pattern(starts, feature.flatten(), d_dict)


def batch_top_k(preactivations: Float[Tensor, "batch d_dict"], k: int) -> Pattern:
    """The ``k * batch`` largest pre-activations of the batch (BatchTopK, arXiv 2412.06410)."""
    batch, d_dict = preactivations.shape
    flat = preactivations.flatten().topk(k * batch, sorted=False).indices.sort().values
    return _from_flat(flat, batch, d_dict)


def above(preactivations: Float[Tensor, "batch d_dict"], threshold: float) -> Pattern:
    """All pre-activations above a threshold: how a trained BatchTopK dictionary is used."""
    flat = (preactivations.flatten() > threshold).nonzero().squeeze(-1)
    return _from_flat(flat, *preactivations.shape)


def _from_flat(flat: Int64[Tensor, " entries"], batch: int, d_dict: int) -> Pattern:
    row_edges = torch.arange(0, (batch + 1) * d_dict, d_dict, device=flat.device)
    return Pattern(torch.searchsorted(flat, row_edges), flat % d_dict, d_dict)


class Encode(Function):
    """The pre-activations at ``pattern``, differentiable in ``W_enc`` and ``b_enc``.

    ``preactivations`` must be ``x @ W_enc.T + b_enc``; it was needed to choose the pattern, so it
    is not computed twice.
    """

    @staticmethod
    def forward(
        ctx,
        x: Float[Tensor, "batch width"],
        W_enc: Float[Tensor, "d_dict width"],
        b_enc: Float[Tensor, " d_dict"],
        preactivations: Float[Tensor, "batch d_dict"],
        pattern: Pattern,
    ) -> Float[Tensor, " entries"]:
        ctx.save_for_backward(x)
        ctx.pattern, ctx.buffer = pattern, W_enc.grad
        return preactivations.take(pattern.sample * pattern.d_dict + pattern.feature)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        grad_W = ctx.pattern.weight_gradient(grad, x, ctx.buffer)
        grad_b = grad.new_zeros(ctx.pattern.d_dict).index_add_(0, ctx.pattern.feature, grad)
        return None, grad_W, grad_b, None, None


class Decode(Function):
    """``S @ W_dec``, differentiable with respect to ``values`` and ``W_dec``."""

    @staticmethod
    def forward(
        ctx,
        values: Float[Tensor, " entries"],
        W_dec: Float[Tensor, "d_dict width"],
        pattern: Pattern,
    ) -> Float[Tensor, "batch width"]:
        ctx.save_for_backward(values, W_dec)
        ctx.pattern, ctx.buffer = pattern, W_dec.grad
        if pattern.feature.numel() == 0:
            return W_dec.new_zeros(pattern.batch, W_dec.shape[1])
        return F.embedding_bag(
            pattern.feature,
            W_dec,
            pattern.starts,
            mode="sum",
            per_sample_weights=values,
            include_last_offset=True,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        values, W_dec = ctx.saved_tensors
        grad, pattern = grad.contiguous(), ctx.pattern
        shape = pattern.batch, pattern.d_dict
        stored = _csr(pattern.starts, pattern.feature, torch.zeros_like(values), shape)
        grad_values = torch.sparse.sampled_addmm(stored, grad, W_dec.t(), beta=0.0).values()
        return grad_values, pattern.weight_gradient(values, grad, ctx.buffer), None


class SummedRowNorms(Function):
    """``sum_m ||rows[i, m]||`` for a slice of features; the gradient of a zero row is zero."""

    @staticmethod
    def forward(
        ctx, rows: Float[Tensor, "d_dict width"], features: slice, n_models: int
    ) -> Float[Tensor, " features"]:
        norms = rows[features].unflatten(-1, (n_models, -1)).norm(dim=-1)
        ctx.save_for_backward(rows, norms)
        ctx.features, ctx.buffer = features, rows.grad
        return norms.sum(dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, norms = ctx.saved_tensors
        per_model = rows[ctx.features].unflatten(-1, (norms.shape[-1], -1))
        scale = torch.where(norms > 0, grad[:, None] / norms, 0.0)
        grad_rows = (per_model * scale[..., None]).flatten(-2)
        gradient = torch.zeros_like(rows) if ctx.buffer is None else ctx.buffer
        gradient[ctx.features] += grad_rows
        return gradient if ctx.buffer is None else None, None, None
