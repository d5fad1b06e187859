"""The page of concepts: its numbers are what its code gives, its picture what the script draws."""

import doctest
import importlib
import re

import pytest

from dfc_lib import paths
from dfc_lib.crosscoder.partition import Block, Partition

BOOK = paths.ROOT / "book"
TEXT = (BOOK / "concepts.md").read_text(encoding="utf-8")


def test_every_number_of_the_worked_example_is_computed():
    failed, tried = doctest.testfile(str(BOOK / "concepts.md"), module_relative=False)
    assert failed == 0
    assert tried > 15


def test_its_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#\s]+)", TEXT)
    assert [t for t in targets if "://" not in t and not (BOOK / t).exists()] == []


@pytest.fixture
def drawing(monkeypatch):
    monkeypatch.syspath_prepend(BOOK)
    return importlib.import_module("partition")


def test_the_picture_is_what_the_script_draws(drawing):
    assert drawing.FILE.read_text(encoding="utf-8") == drawing.draw(Partition.dedicated(1_024, 0.1))


def test_an_arrow_stands_where_weights_are_free(drawing):
    """One pair of heads for each block and model that it may touch."""
    plain = Partition(("A", "B"), (Block("shared", 8, (0, 1)),))
    for partition in (Partition.dedicated(100, 0.1), plain):
        free = sum(len(block.models) for block in partition.blocks)
        assert drawing.draw(partition).count("<line ") == free
