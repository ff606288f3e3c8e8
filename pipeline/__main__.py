"""`python -m qtool`."""

from qtool.cli import main

main(prog_name="qtool")
