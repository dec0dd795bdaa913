"""`internvl doctor`: what this machine has and misses."""

import argparse

from internvl.cli.common import Arguments, loading


def run(args: Arguments) -> int:
    """Check this machine and its libraries; says how to install what is missing."""
    from internvl.compute import doctor

    with loading("the libraries of this machine"):
        findings = doctor.report()
    print(doctor.render(findings))
    return int(doctor.is_broken(findings))


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Adds no option."""
