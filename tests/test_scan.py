"""The site scan against the engine that interventions are run by."""

import pytest

from dfc_lib import profiles
from dfc_lib.steering.interventions import Clean, OtherModel
from dfc_lib.steering.scan import scan
from dfc_lib.study import Study

STYLE = "desk"


@pytest.fixture(scope="module")
def study():
    return Study(profiles.get("smoke"))


@pytest.fixture(scope="module")
def records(study):
    return study.calls("selection", 6)


@pytest.fixture(scope="module")
def scanned(study, records):
    models = study.pair.models
    named = {"tuned": models["A"]}
    options = {"styles": [STYLE], "layers": [1, 3], "batch_size": 4}
    return scan(named, models["B"], study.pair.tokenizer, records, **options)


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("position", ["last", "every"])
@pytest.mark.parametrize(("direction", "target"), [("A->B", "B"), ("B->A", "A")])
def test_a_patch_is_what_the_engine_makes_of_it(
    study, records, scanned, layer, position, direction, target
):
    other = Study(study.profile, layer=layer)
    cells = {"clean": Clean(), "patched": OtherModel(1 - study.pair.index(target))}
    frame = other.propensity(cells, records, target, position=position, out_dir=None)
    want = frame.pivot(index="prompt", columns="cell", values="propensity")
    here = (scanned.layer == layer) & (scanned.position == position)
    found = scanned[here & (scanned.direction == direction)].set_index("prompt").loc[want.index]
    assert found.propensity.tolist() == pytest.approx(want.patched.tolist(), abs=1e-4)
    assert found.clean_propensity.tolist() == pytest.approx(want.clean.tolist(), abs=1e-4)
    assert (found.propensity - found.clean_propensity).abs().max() > 1e-3


def test_what_is_left_alone_acts_as_it_answers(study, records, scanned):
    """`acts` is the first token of the greedy answer."""
    opens = study.evaluate("A", records, STYLE).response.str.startswith(("<", "{"))
    alone = scanned[(scanned.direction == "B->A") & (scanned.layer == 1)]
    alone = alone[alone.position == "last"].sort_values("prompt").clean_acts
    assert alone.tolist() == opens.astype(float).tolist()
