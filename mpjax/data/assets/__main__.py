"""The command line of the assets: lists them, or fetches those named."""

from __future__ import annotations

import sys

from mpjax.data.assets import available, fetch
from mpjax.data.assets.asset_table import TABLE
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
    sys.exit(main(sys.argv[1:]))
