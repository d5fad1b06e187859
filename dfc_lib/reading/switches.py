"""The features on which a model's tool use hangs, and the crosscoder that is shipped for one.

Being discriminative against prose is not being the switch: a feature is ranked here by what taking
it out does to the model.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from dfc_lib import paths
from dfc_lib.steering.interventions import Clean, Codec, Steer

if TYPE_CHECKING:
    from dfc_lib.crosscoder.model import Crosscoder
    from dfc_lib.study import Study

SHIPPED = paths.DATA / "crosscoder" / "last_anchored"  # one crosscoder of the embedded pair
RECIPE = "last anchored"  # how it was trained
LIVE = 0.05  # a feature counts if it fires on at least this share of tool prompts


def ablations(
    study: "Study",
    crosscoders: "Mapping[int, Crosscoder]",
    blocks: Sequence[str] = ("A_exclusive", "shared"),
) -> pd.DataFrame:
    """What A's propensity becomes on the selection prompts when one feature is taken out.

    Of B-exclusive features nothing is asked: they do not write to A.

    Args:
        crosscoders: by seed.
        blocks: those whose features are taken out.

    Returns:
        one line per feature that fires on at least :data:`LIVE` of the tool prompts of the ranking
        split, the one first whose ablation lowers the propensity most: ``seed``, ``block``,
        ``feature``, ``fires`` (on which share), ``clean``, ``ablated``, ``change``.
    """
    seen = study.cache("ranking_last")
    streams = seen.gather(seen.where(source="tool"))
    records = study.calls("selection", study.profile.n_steering)
    cells, found = {("clean",): Clean()}, []
    for seed, crosscoder in crosscoders.items():
        codec = Codec(crosscoder)
        fires = (crosscoder.encode(streams) > 0).float().mean(0).tolist()
        for block in blocks:
            of_block = range(crosscoder.d_dict)[crosscoder.partition.slice(block)]
            for feature in (i for i in of_block if fires[i] >= LIVE):
                cells["ablated", seed, feature] = Steer(codec, (feature,), 0.0)
                found.append((seed, block, feature, fires[feature]))
    frame = study.propensity(cells, records, levels=("cell", "seed", "feature"))
    table = pd.DataFrame(found, columns=["seed", "block", "feature", "fires"])
    table = table.astype({"seed": int, "feature": int, "fires": float})  # also where there is none
    table["clean"] = frame[frame.cell == "clean"].propensity.mean()
    ablated = frame[frame.cell == "ablated"].groupby(["seed", "feature"]).propensity.mean()
    table["ablated"] = pd.Series([ablated[seed, i] for seed, _, i, _ in found], dtype=float)
    table["change"] = table.ablated - table.clean
    return table.sort_values("change", ignore_index=True)
