"""`python -m internvl`."""

from internvl.cli import main

main()
