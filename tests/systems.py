"""The files of settings in records/env/, as settings and as runs at toy scale. For the tests of what is in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from conftest import ONE_THREAD, ROOT

import train_gpt as t

sys.path.insert(0, str(ROOT / "records"))
import fidelity  # noqa: E402


def load(*names: str) -> t.Hyperparameters:
    """Settings of the files records/env/<name>.env, read one after the other."""
    knobs, settings = t.Hyperparameters.knobs(), fidelity.settings_of(*names)
    return t.Hyperparameters(**{name.lower(): knobs[name.lower()].parse(name, settings[name]) for name in settings})


def run_at_toy_scale(name: str, folder: Path, data: Path, **settings: str) -> None:
    """Runs a file and toy.env in a folder as a user would, with settings of one's own put last."""
    (folder / "data").symlink_to(data)  # where toy.env looks for it
    files = [str(ROOT / "records" / "env" / f"{part}.env") for part in (name, "toy")]
    own = "".join(f"{variable}={value}; " for variable, value in settings.items())
    script = f'for f; do . "$f" || exit; done; {own}exec "$PYTHON" "$SCRIPT"'
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "SCRIPT": str(t.CODE), **ONE_THREAD}
    environment |= {"RUN_ID": name, "DEVICE": "cpu"}
    command = ["bash", "-ac", script, "toy", *files]
    process = subprocess.run(command, env=environment, cwd=folder, text=True, capture_output=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr


def read_run(folder: Path) -> SimpleNamespace:
    """What a run left in its folder."""
    return SimpleNamespace(
        folder=folder,
        result=json.loads((folder / "submission.json").read_text()),
        events=[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        log=(folder / "train.log").read_text(),
    )
