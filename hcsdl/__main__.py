"""`hcsdl …`, also `python -m hcsdl`."""

import sys

from hcsdl.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
