"""Write constraints.txt from two working environments, one per set of supported Pythons.

    python tools/pin.py OLD/bin/python NEW/bin/python > constraints.txt

OLD runs Python 3.11, whose last JAX is 0.10; NEW runs the newest supported Python. Both hold every
extra. Where they differ, environment markers tell the pins apart.
"""

from __future__ import annotations

import argparse
import re
import subprocess

HEADER = """\
# The releases that the test suite last passed with. Written by tools/pin.py; do not edit by hand.
#     pip install -e '.[test]' -c constraints.txt
"""
OLD_MARKER = "python_version < '3.12'"
NEW_MARKER = "python_version >= '3.12'"
# The installer's own packages are not ours to pin.
UNPINNED = {"mesh-transformer", "pip", "wheel"}


def installed(python: str) -> dict[str, str]:
    """Return the version of each package in an interpreter's environment, by normalised name."""
    freeze = [python, "-m", "pip", "freeze", "--exclude-editable"]
    lines = subprocess.run(freeze, check=True, capture_output=True, text=True).stdout.splitlines()
    # A local version such as 2.13.0+cpu names one build, which other machines may lack.
    pins = (line.partition("+")[0].partition("==") for line in lines if "==" in line)
    named = {re.sub(r"[-_.]+", "-", name).lower(): version for name, _, version in pins}
    return {name: version for name, version in named.items() if name not in UNPINNED}


def merged(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Return one constraint per package, or two with markers where the environments differ."""
    lines = []
    for name in sorted(old | new):
        versions = {old.get(name, new.get(name)), new.get(name, old.get(name))}
        if len(versions) == 1:
            lines.append(f"{name}=={versions.pop()}")
        else:
            lines.append(f"{name}=={old[name]} ; {OLD_MARKER}")
            lines.append(f"{name}=={new[name]} ; {NEW_MARKER}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old", help="interpreter of the environment on Python 3.11")
    parser.add_argument("new", help="interpreter of the environment on the newest Python")
    args = parser.parse_args()
    print(HEADER + "\n".join(merged(installed(args.old), installed(args.new))))


if __name__ == "__main__":
    main()
