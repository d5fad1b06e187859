"""Whose a feature is, over several training runs: the instrument of arXiv 2604.25011.

The study's crosscoder has no top-k: a ReLU, and an L1 penalty in which an activation counts its
decoder norms, so that a norm that one model does not need costs something. Here are that loss in
the units of :mod:`dfc_lib.crosscoder.losses`, the pairs of models on which it is repeated, the
checkpoints of one run around the displacement of another, and features planted to see whether it
finds them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dfc_lib import paths
from dfc_lib.crosscoder.partition import Partition
from dfc_lib.crosscoder.training import TrainConfig
from dfc_lib.profiles import Profile


def replications(profile: Profile) -> dict[str, Profile]:
    """The profile on every pair that lies beside its own, by the folder's name.

    Pairs are folders with a number for a name and checkpoints of an RL and of an SFT run; they come
    in the order of their numbers. A pair in a folder of another name has none beside it.

    Raises:
        ValueError: the profile's own pair has no checkpoints of both runs.
    """
    own = paths.ROOT / profile.pair if profile.pair else Path()
    folders = [own]
    if profile.pair and own.name.isdigit():
        numbered = [folder for folder in own.parent.iterdir() if folder.name.isdigit()]
        folders = sorted(numbered, key=lambda folder: int(folder.name))
    both = {}
    for folder in folders:
        pair = replace(profile, pair=str(folder))
        if all(len(pair.checkpoints(run)) > 1 for run in ("rl", "sft")):
            both[folder.name] = pair
    if not profile.pair or own.name not in both:
        raise ValueError(
            f"profile {profile.name} has no checkpoints of an RL and of an SFT run from one base; "
            "they are needed in <pair>/rl/step_<n> and <pair>/sft/step_<n>"
        )
    return both


def weighted_l1(
    names: Sequence[str],
    dict_size: int,
    d_model: int,
    coefficient: float = 2.0,
    **options: Any,
) -> TrainConfig:
    """A plain crosscoder of these models with a ReLU and a norm-weighted L1 penalty.

    The loss of the study is, per sample and in normalised units (mean squared norm ``d_model``),

        sum_m ||z_m - z^_m||^2 + coefficient * sum_i f_i sum_m ||W_dec[i, m]||

    ``losses`` means the first over models and dimensions, the second over features: that is the
    same over ``n_models * d_model`` if its coefficient is ``coefficient * D / (n_models d_model)``.

    Args:
        options: for ``TrainConfig``. ``k`` only caps the number of active features, which saves
            time in the first steps; default: a quarter of them.
    """
    partition = replace(Partition.plain(dict_size, len(names)), model_names=tuple(names))
    scaled = coefficient * dict_size / (len(names) * d_model)
    options = {"k": dict_size // 4, "aux_coef": 0.0} | options
    return TrainConfig(partition, shared_coef=scaled, variant="exclusive_only", **options)


def bracket(moved: Mapping[str, float], to: float) -> tuple[str, str, float]:
    """The checkpoints between whose displacements ``to`` lies, and the weight of the second one.

    A measure of both, so weighted, is that of a run that has moved exactly as far. Where none has
    moved less, or none more, the closest one stands for both.
    """
    below = max((n for n in moved if moved[n] <= to), key=moved.__getitem__, default=None)
    above = min((n for n in moved if moved[n] >= to), key=moved.__getitem__, default=below)
    below = above if below is None else below
    span = moved[above] - moved[below]
    return below, above, (to - moved[below]) / span if span else 0.0


def plant(
    base: Float[Tensor, "n d_model"], size: float, n_features: int, share: float, seed: int = 0
) -> Float[Tensor, "n d_model"]:
    """A copy of the base with features of its own: fixed directions, orthogonal to each other.

    Args:
        size: the root mean square norm of all that is added.
        share: of the samples on which each feature is on, independently.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(base.shape[1], n_features, generator=generator)
    directions = torch.linalg.qr(directions)[0].T
    on = (torch.rand(len(base), n_features, generator=generator) < share).float()
    return base + (on @ directions) * (size / (n_features * share) ** 0.5)
