"""`python -m qtool`: as the command `qtool`, which takes no module from the current folder (`-m` looks there first)."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]

from qtool.cli import main

main(prog_name="qtool")
