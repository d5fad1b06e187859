"""Settings for every test."""

import shutil

import pytest
from hypothesis import settings

# No deadline: a busy machine is no failure. Derandomised: a failure seen once can be seen again.
settings.register_profile("dfc", deadline=None, derandomize=True)
settings.load_profile("dfc")


# One fixture for all that open pages: playwright runs an event loop in this thread, and a second
# one cannot start while the first is open. A module's end closes it, so that no other test finds a
# loop that runs.
@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium; nothing is downloaded."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no chromium here; Debian has it as a package: apt-get install chromium")
    with api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()
