"""Ends a tool with one line where a package of records/requirements.txt is missing; imported by tools before those."""

import importlib.util
import sys
from pathlib import Path

MISSING = [name for name in ("numpy", "scipy", "matplotlib") if importlib.util.find_spec(name) is None]
if MISSING:
    tool = Path(sys.argv[0]).name
    sys.exit(f"{tool}: error: missing packages: {', '.join(MISSING)}: pip install -r records/requirements.txt")
