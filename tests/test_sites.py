"""From a site scan to a layer: the changes, and the rule."""

import pandas as pd
import pytest

from dfc_lib.results import sites


def scanned(up, down, clean=(0.1, 0.5)):
    """Two prompts; what patching adds to the base (up) and takes from A (down), by layer."""
    rows = []
    for direction, moves, start in (("A->B", up, clean[0]), ("B->A", down, clean[1])):
        for layer, move in enumerate(moves):
            for prompt in range(2):
                at = {"model": "RL", "style": "fixed", "direction": direction, "layer": layer}
                at |= {"position": "last", "prompt": prompt, "clean_acts": 0, "acts": 0}
                rows.append(at | {"clean_propensity": start, "propensity": start + move})
    return pd.DataFrame(rows)


def test_changes_are_paired_differences_with_their_n():
    table = sites.changes(scanned([0.1, 0.2], [-0.1, -0.3]), n_bootstrap=50)
    row = table[(table.direction == "B->A") & (table.layer == 1) & (table.outcome == "propensity")]
    assert row.change.iloc[0] == pytest.approx(-0.3)
    assert row.patched.iloc[0] == pytest.approx(0.2)
    assert row.n.iloc[0] == 2


@pytest.mark.parametrize(
    ("up", "down", "layer"),
    [
        ([0.0, 0.25, 0.3, 0.4], [0.0, -0.25, -0.3, -0.4], 1),  # the first with half of the gap
        ([0.0, 0.3, 0.3, 0.4], [0.0, -0.1, -0.2, -0.4], 2),  # both directions count
        ([0.0, 0.15, 0.1, 0.4], [0.0, -0.15, -0.1, -0.4], 1),  # none: the largest smaller move
        ([0.0, 0.0, 0.1, 0.4], [0.0, 0.0, -0.1, -0.4], 2),  # the last layer never counts
    ],
)
def test_the_layer_follows_the_rule(up, down, layer):
    table = sites.changes(scanned(up, down), n_bootstrap=50)
    assert sites.layer_of(table, "RL", "fixed", "last") == layer


def test_a_scan_without_the_model_says_what_it_holds():
    table = sites.changes(scanned([0.0, 0.1], [0.0, -0.1]), n_bootstrap=50)
    with pytest.raises(ValueError, match="RL"):
        sites.layer_of(table, "SFT", "fixed", "last")


def test_a_setting_is_patched_at_every_position_where_the_last_token_moves_too_little():
    """And all settings keep the first one's layer: a crosscoder knows one."""
    last = scanned([0.0, 0.25, 0.3, 0.4], [0.0, -0.25, -0.3, -0.4])
    weak = scanned([0.0, 0.05, 0.1, 0.4], [0.0, -0.05, -0.1, -0.4]).assign(style="training")
    every = scanned([0.3] * 4, [-0.3] * 4).assign(position="every")
    whole = pd.concat([last, weak, every, every.assign(style="training")])
    table = sites.changes(whole, n_bootstrap=50)
    wanted = {"one": ("RL", "fixed"), "two": ("RL", "training")}
    found = sites.settings(table, wanted).set_index("setting")
    assert found.position.to_dict() == {"one": "last", "two": "every"}
    assert found.layer.to_dict() == {"one": 1, "two": 1}
    assert found.rule.to_dict() == {"one": 1, "two": 2}
    assert found.up.round(3).to_dict() == {"one": 0.25, "two": 0.3}
    assert sites.settings(table, wanted, layer=3).layer.tolist() == [3, 3]
