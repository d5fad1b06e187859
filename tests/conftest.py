"""Settings for every test."""

from hypothesis import settings

# No deadline: a busy machine is no failure. Derandomised: a failure seen once can be seen again.
settings.register_profile("dfc", deadline=None, derandomize=True)
settings.load_profile("dfc")
