"""``python -m tools.dial [OUT]`` makes the page, ``--measure`` what it is made from."""

import argparse
import sys
from pathlib import Path

from dfc_lib import paths, profiles
from tools.dial import measure, pack


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.dial", description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=paths.BUILD / "dial")
    parser.add_argument("--profile", default="toy")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure with the crosscoders of the build folder (those that it lacks are trained), "
        "into data/dial for the published profile, else into the profile's build folder",
    )
    options = parser.parse_args(arguments)
    try:
        profile = profiles.load(options.profile)
        if options.measure:
            measure.measure(profile)
        else:
            print(pack.pack(profile, options.out))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
