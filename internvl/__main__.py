"""`python -m internvl`."""

from internvl.cli import main

# Processes that libraries spawn import this module under another name.
if __name__ == "__main__":
    main()
