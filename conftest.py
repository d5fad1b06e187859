"""How pytest treats the notebooks (nbval) and the tests.

It stands at the top because it is for ``notebooks/`` and ``tests/``, which lie below it.
"""

import os

from dfc_lib import profiles, provenance

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
provenance.fix_arithmetic()  # before anything loads torch; nbval's kernels inherit it


def pytest_configure(config):
    """``# REGRESS`` marks rounded results, compared at the profile that they were made at."""
    if config.getoption("nbval", False) or config.getoption("nbval_lax", False):
        from nbval import plugin

        plugin.comment_markers["REGRESS"] = ("check", profiles.load("toy").published)


def pytest_collectstart(collector):
    """What goes to stderr, progress bars above all, differs at every run: never compare it."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare = (*collector.skip_compare, "stderr")
