"""``make crosscoder``: puts one crosscoder of the embedded pair into ``data/crosscoder``.

So that the quickstart can show a feature at work in a minute, without caches and without training.
Which one is a rule, shown in notebook 02 with the numbers behind it: of the profile's seeds of one
recipe the crosscoder with the feature, in whichever block, whose ablation lowers A's propensity
most on the selection prompts. Notebook 02 also compares the weights with those that it trains.

Needs the caches of notebook 01 (``make figures NB=01``); crosscoders that the build folder lacks
are trained.
"""

import sys
from pathlib import Path

from dfc_lib import paths, profiles, provenance
from dfc_lib.crosscoder.fidelity import fidelity
from dfc_lib.reading import switches
from dfc_lib.store import sha256
from dfc_lib.study import Study
from tools.make_pair.card import write_checksums
from tools.publish import Provenance, publish


def ship(study: Study, folder: Path) -> Path:
    """Write the crosscoder into ``folder``, whole, and ``SHA256SUMS`` beside it.

    What is needed to use it is in its configuration: ``cfg.metadata`` has its ``recipe``, ``seed``
    and ``feature`` with its ``block``, the ``layer``, the folders of both ``models`` and the
    SHA-256 of their ``weights``.

    Raises:
        FileExistsError: the folder holds something else.
        FileNotFoundError: notebook 01 has not run at this profile.
        ValueError: no feature that writes to A is live on tool prompts.
    """
    profile, recipe = study.profile, study.recipes[switches.RECIPE]
    found = study.crosscoders([switches.RECIPE], range(profile.many_seeds))
    crosscoders = {seed: crosscoder for (_, seed), crosscoder in found.items()}
    table = switches.ablations(study, crosscoders)
    if table.empty:
        raise ValueError(f"no feature of {len(crosscoders)} crosscoders that writes to A is live")
    best = table.iloc[0]
    seed, feature = int(best.seed), int(best.feature)
    print(f"{switches.RECIPE}, seed {seed}, feature {feature} ({best.block}):", end=" ")
    print(f"its ablation takes A's propensity from {best.clean:.3f} to {best.ablated:.3f}")

    models = {"A": f"{profile.pair}/{profile.model_a}", "B": f"{profile.pair}/{profile.model_b}"}
    weights = {name: paths.ROOT / model / "model.safetensors" for name, model in models.items()}
    metadata = crosscoders[seed].cfg.metadata
    metadata.recipe, metadata.seed, metadata.feature = switches.RECIPE, seed, feature
    metadata.block, metadata.layer, metadata.models = best.block, profile.layer, models
    metadata.weights = {name: sha256(path) for name, path in weights.items()}
    job = recipe.job(seed)
    publish(
        crosscoders[seed],
        folder,
        fidelity=fidelity(crosscoders[seed], study.cache("ranking_last").to_tensor()),
        provenance=Provenance(
            models=models,
            site=f"residual stream after block {profile.layer} (counted from 0), last prompt token",
            config=job.config.to_dict(),
            data_key=job.data_key,
            code_hash=provenance.code_hash("dfc_lib.crosscoder.training"),
        ),
    )
    write_checksums(folder.parent)
    return folder


def main() -> int:
    """The command line; returns the exit status."""
    try:
        ship(Study(profiles.get("toy")), switches.SHIPPED)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
