"""The penalty of the calibrated protocol, see ``losses``."""

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from dfc_lib.crosscoder import kernels
from dfc_lib.crosscoder.partition import Block, Partition

if TYPE_CHECKING:
    from dfc_lib.crosscoder.model import Crosscoder

AUXILIARY = True


def exclusive_groups(partition: Partition) -> list[list[Block]]:
    """The groups of blocks whose means ``l1_exclusive`` averages: one, of what is not shared."""
    return [[b for b in partition.blocks if b not in partition.shared_blocks]]


def weight(crosscoder: "Crosscoder", features: slice) -> Float[Tensor, " features"]:
    """What an activation counts: the feature's decoder norms, summed over models."""
    return kernels.SummedRowNorms.apply(crosscoder.decoder, features, crosscoder.n_models)
