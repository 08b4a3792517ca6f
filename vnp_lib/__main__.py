"""Run the `vnp` command as `python -m vnp_lib`."""

from __future__ import annotations

import sys

from vnp_lib.cli import main

if __name__ == "__main__":
    sys.exit(main())
