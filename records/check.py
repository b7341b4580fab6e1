"""Audit submission folders of the challenge from their files alone. Nothing in them is run.

    python records/check.py records/track_10min_16mb/2026-04-09_Name …      # a table and a closing line per folder
    python records/check.py --json FOLDER … > audit.json                    # the same for machines

The exit status is 0 without a reject, 1 with one, 2 for a folder that does not exist. How it works: checker/."""

import sys

import available_packages  # noqa: F401
from checker import main

if __name__ == "__main__":
    sys.exit(main())
