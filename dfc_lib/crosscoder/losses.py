"""The loss: reconstruction, sparsity penalties, and help for dead features.

``mse + shared_coef * l1_shared + exclusive_coef * l1_exclusive + aux_coef * aux + difference_coef *
difference``; all means are over all elements, in normalised units (raw for the identity
normaliser):

- ``mse``: mean of ``(z^ - z)**2`` over batch, models and dimensions.
- ``published`` (arXiv 2606.26474 and its code): ``l1_shared`` is the mean of the shared features,
  ``l1_exclusive`` the average over models of the mean of *all* features that the model has, so that
  shared features are penalised in both.
- ``exclusive_only``: ``l1_exclusive`` is the mean over the features that do not belong to every
  model. In both terms a feature counts ``f_i * sum_m ||W_dec[i, m]||``, so that a growing decoder
  cannot dodge the penalty.
- ``aux``: mean squared error of reconstructing the residual from the ``2 * k`` strongest dead
  features (arXiv 2406.04093, A.2). No such term in ``published``.
- ``difference``: how much of the difference of a model and the reference is left unexplained, the
  mean squared error of ``(z_m - z_reference)^`` over the variance of ``z_m - z_reference``,
  averaged over the other models. Two models that differ in a hundredth of their variance leave
  ``mse`` no reason to explain that hundredth.
"""

from collections.abc import Iterable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dfc_lib.crosscoder import kernels
from dfc_lib.crosscoder.partition import Block

if TYPE_CHECKING:
    from dfc_lib.crosscoder.model import Crosscoder, Forward

Variant = Literal["published", "exclusive_only"]
VARIANTS = get_args(Variant)
Scalar = Float[Tensor, ""]


def penalty(variant: Variant) -> ModuleType:
    """What sets a variant apart; one module each, so that an edit of one retrains its own alone.

    Raises:
        ValueError: there is no such variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r} is unknown; use one of {VARIANTS}")
    return import_module(f"{__package__}.penalty_{variant}")


class Differences(NamedTuple):
    """What the models are compared with, and how far they are from it.

    Attributes:
        reference: index of the model that the others are compared with.
        variance: ``Normaliser.variance_of_differences``.
    """

    reference: int
    variance: Float[Tensor, " model"]


def terms(
    crosscoder: "Crosscoder",
    forward: "Forward",
    variant: Variant,
    dead: Bool[Tensor, " d_dict"] | None = None,
    differences: Differences | None = None,
    skip: Iterable[str] = (),
) -> dict[str, Scalar]:
    """The terms of a forward pass, before weighting.

    Args:
        dead: the features that have not fired for long; None: no auxiliary loss.
        differences: None: no such term.
        skip: terms that stay 0 (saves time).

    Raises:
        ValueError: there is no such variant.
    """
    penalised, partition = penalty(variant), crosscoder.partition
    groups = {
        "l1_shared": [partition.shared_blocks],
        "l1_exclusive": penalised.exclusive_groups(partition),
    }
    found = {"mse": F.mse_loss(forward.reconstruction, forward.z)}
    for name, of in groups.items():
        means = [
            _mean_activation(crosscoder, forward, blocks, penalised.weight)
            for blocks in ([] if name in skip else of)
        ]
        found[name] = sum(means, forward.z.new_zeros(())) / max(1, len(means))
    found["aux"] = forward.z.new_zeros(())
    if dead is not None and penalised.AUXILIARY and "aux" not in skip:
        found["aux"] = _auxiliary(crosscoder, forward, dead)
    found["difference"] = forward.z.new_zeros(())
    if differences is not None:
        found["difference"] = _difference(crosscoder, forward, differences)
    return found


def weigh(
    terms: dict[str, Scalar],
    shared_coef: float,
    exclusive_coef: float,
    aux_coef: float = 0.0,
    difference_coef: float = 0.0,
) -> Scalar:
    """The total loss from its terms."""
    penalties = shared_coef * terms["l1_shared"] + exclusive_coef * terms["l1_exclusive"]
    total = terms["mse"] + penalties + aux_coef * terms["aux"]
    return total + difference_coef * terms["difference"] if difference_coef else total


def _difference(crosscoder: "Crosscoder", forward: "Forward", to: Differences) -> Scalar:
    """The share of the differences to the reference that is left unexplained."""
    error = forward.reconstruction - forward.z
    error = error.view(len(error), crosscoder.n_models, -1)
    of_models = (error - error[:, [to.reference]]).square().mean((0, 2))
    # Two models that are the same leave nothing to explain: no term, rather than a division by 0.
    share = (of_models / to.variance.clamp(min=1e-12)) * (to.variance > 0)
    return share.sum() / (crosscoder.n_models - 1)


def _mean_activation(
    crosscoder: "Crosscoder", forward: "Forward", blocks: list[Block], weight_of
) -> Scalar:
    """Mean over batch and features of the (weighted) activations of some blocks."""
    weight = forward.z.new_zeros(crosscoder.d_dict)
    for block in blocks:
        features = crosscoder.partition.slices[block.name]
        weight[features] = weight_of(crosscoder, features)
    total = (forward.activations * weight[forward.pattern.feature]).sum()
    return total / max(1, len(forward.z) * sum(block.size for block in blocks))


def _auxiliary(crosscoder: "Crosscoder", forward: "Forward", dead: Tensor) -> Scalar:
    candidates = dead.nonzero().squeeze(-1)
    if candidates.numel() == 0:
        return forward.z.new_zeros(())
    wanted = 2 * crosscoder.cfg.k
    of_dead = forward.preactivations.index_select(1, candidates)
    chosen = kernels.top_k(of_dead, min(wanted, candidates.numel()))
    pattern = kernels.Pattern(chosen.starts, candidates[chosen.feature], crosscoder.d_dict)
    encoder, b_enc = crosscoder.encoder, crosscoder.b_enc
    values = kernels.Encode.apply(forward.z, encoder, b_enc, forward.preactivations, pattern)
    explained = kernels.Decode.apply(values.relu(), crosscoder.decoder, pattern)
    residual = (forward.z - forward.reconstruction).detach()
    # A few dead features cannot explain much of the residual: pull at them more gently.
    return F.mse_loss(explained, residual) * min(candidates.numel() / wanted, 1.0)
