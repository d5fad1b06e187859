"""``python -m tools.dial [OUT]`` makes the page, ``--measure`` what it is made from."""

import argparse
import sys
from pathlib import Path

from dfc_lib import paths
from tools.dial import measure, pack


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.dial", description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=paths.BUILD / "dial")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="into data/dial, with the crosscoders of the build folder; what it lacks is trained",
    )
    options = parser.parse_args(arguments)
    try:
        if options.measure:
            measure.measure()
        else:
            print(pack.pack(options.out))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
