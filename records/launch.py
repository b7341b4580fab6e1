"""Starts runs of train_gpt.py as a shell would, follows their logs, and finds again those that are there already.

For records/sweep.py and records/fidelity.py. A run is a folder, logs/<RUN_ID>, below where the command is started. What
is there is never done twice: a finished run is read, one that another process works on is waited for, one that was
stopped goes on by RESUME=1."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from audit import sha256
from significance import finite, load

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t  # noqa: E402

LOGS = Path("logs")
LAST_LINES = 12  # of a failed run's output, which say why
LONGEST_MESSAGE = 2000  # characters: databases have columns of limited width
STOP_SECONDS = 120.0  # a run that is asked to stop first finishes its step, or its export
PATH_SETTINGS = ("eval_only", "export_only")
OF_SHELL = ("_", "PWD", "OLDPWD", "SHLVL")  # variables that a shell sets for itself
TORCHRUN_PROCESSES = re.compile(r"--nproc[_-]per[_-]node[= ](\d+)")


class LaunchError(ValueError):
    """Something about a command, its settings or its runs that the user can mend: the message says how."""


# =================================================== settings ========================================================
def read_settings(words: Sequence[str], environment: dict[str, str] | None = None) -> dict[str, str]:
    """Return what files of settings (*.env) and words of the form NAME=value set, read in order by a shell, as
    `make train` reads them. `environment` is what the shell begins with, by default this process's.

    Raise LaunchError for a word that is neither, and for a file that a shell cannot read."""
    before = dict(os.environ if environment is None else environment)
    script = []
    for word in words:
        if re.match(r"[A-Za-z_]\w*=", word):
            script.append('export "$1"')
        elif word.endswith(".env"):
            check_unix_text(Path(word))
            script.append('set -a; case "$1" in */*) . "$1" ;; *) . "./$1" ;; esac')
        else:
            raise LaunchError(
                f"{word} is neither a file of settings (*.env) nor of the form NAME=value. A path with a space needs "
                "quotes (within --compare inside the others), each artifact its own --from-artifact"
            )
    lines = [f"{line} || exit; set +a; shift" for line in script]
    command = ["bash", "-c", "\n".join([*lines, "env -0"]), "settings", *words]
    done = subprocess.run(command, env=before, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LaunchError(f"{' '.join(words)} cannot be read: {done.stderr.strip()}")
    after = dict(entry.split("=", 1) for entry in done.stdout.split("\0") if "=" in entry)
    return {name: value for name, value in after.items() if before.get(name) != value and name not in OF_SHELL}


def check_unix_text(path: Path) -> None:
    """Raise LaunchError where the file is not there, or has a byte order mark or the line ends of Windows, which a
    shell takes for part of the values."""
    if not path.is_file():
        raise LaunchError(f"{path} is not there: give the path of a file of settings, as records/env/bench.env")
    content = path.read_bytes()
    if content.startswith(b"\xef\xbb\xbf") or b"\r" in content:
        fix = f"sed -i.bak $'1s/^\\xef\\xbb\\xbf//; s/\\r$//' '{path}'"
        raise LaunchError(f"{path} has the line ends of Windows (CR LF) or a byte order mark. This removes them: {fix}")


def given_settings(environment: dict[str, str]) -> dict[str, str]:
    """Return NAME -> text of the settings of train_gpt.py in an environment."""
    knobs = t.Hyperparameters.knobs()
    return {name: value for name, value in environment.items() if name.lower() in knobs and name.isupper()}


def check_setting(name: str, text: str) -> Any:
    """Return the value of a setting. Raise LaunchError where there is no such setting, or the value is not allowed."""
    knobs = t.Hyperparameters.knobs()
    if name in ("RUN_ID", "RESUME"):
        raise LaunchError(f"{name} is no setting of a sweep: each run has its own")
    if name.lower() not in knobs or not name.isupper():
        near = t.suggest(name.upper(), [knob.upper() for knob in knobs])
        raise LaunchError(f"{name} is not a setting of train_gpt.py{near}")
    try:
        return knobs[name.lower()].parse(name.lower(), text)
    except t.UserError as error:
        raise LaunchError(str(error)) from None


def contradictions(expected: dict[str, str], found: dict[str, Any]) -> list[str]:
    """Return a line for each setting that a finished run has differently. Where things are does not count."""
    lines = []
    for name, text in expected.items():
        key = name.lower()
        if key in t.FREE_SETTINGS or key in PATH_SETTINGS or text == "auto":
            continue  # of an artifact, the content counts; what was chosen for auto may stand there
        if key not in found or check_setting(name, text) != found[key]:
            lines.append(f"{name}={found.get(key, 'not set')}, not {text}")
    return lines


def read_seeds(text: str) -> list[int]:
    """Return the seeds of 1,2,3 or 1-4 or 1..4 or a mixture of these. Raise LaunchError where they are none."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,10})(?:(?:-|\.\.)(\d{1,10}))?", part)
        if not match or int(match[2] or match[1]) - int(match[1]) not in range(1000):
            raise LaunchError(f"seeds {text}: give them as 1,2,3 or 1-4")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(seeds)) < len(seeds):
        raise LaunchError(f"seeds {text}: {statistics.mode(seeds)} is there twice")
    for seed in seeds:
        check_setting("SEED", str(seed))
    return seeds


def read_artifacts(artifacts: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return name -> settings of the runs that score each artifact, given as the folder of a run or as a file."""
    settings = {}
    for given in artifacts:
        path = Path(given)
        path = path / "final_model.bin" if path.is_dir() else path
        if not path.is_file():
            raise LaunchError(f"{path} is not there: give the folder of a finished run, or an artifact")
        name = re.sub(r"[^\w.-]", "-", path.resolve().parent.name or path.stem)
        if name in settings:
            raise LaunchError(f"two artifacts are in folders of the name {name}: rename one")
        settings[name] = {"EVAL_ONLY": str(path)}
    return settings


def join_settings(words: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the settings of train_gpt.py that these words and this shell's environment make together, and the other
    variables that the words set. Raise LaunchError where both set one, or a value is not allowed."""
    exported = given_settings(dict(os.environ))
    for name in ("RUN_ID", "RESUME"):
        exported.pop(name, None)  # each run has its own
    set_here = read_settings(words)
    for name in sorted(set_here.keys() & exported.keys()):
        raise LaunchError(f"{name}={exported[name]} is exported in this shell, and set by the command: unset {name}")
    own = given_settings(set_here)
    for name, text in (exported | own).items():
        check_setting(name, text)
    others = {name: text for name, text in set_here.items() if name not in own}
    unknown = [name for name in others if any(word.startswith(f"{name}=") for word in words)]
    for name in unknown:
        check_setting(name, others[name])
    return exported | own, others


# =================================================== results =========================================================
class Result(NamedTuple):
    """What a finished run says of itself in submission.json."""

    val_bpb: float
    val_loss: float
    steps: int | None  # None without training
    train_seconds: float | None  # with calibrations, which are of the same budget
    calibration_seconds: float
    eval_seconds: float
    bytes_total: int
    code_sha256: str
    machine: str
    run: str  # folder


def read_result(folder: Path, expected: dict[str, str]) -> Result:
    """Return the result of a finished run. Raise LaunchError unless it was one with these settings."""
    path = folder / "submission.json"
    try:
        document = load(path)
        numbers = {name: finite(document.get(name), name) for name in ("val_bpb", "val_loss", "eval_seconds")}
        calibration = finite(document.get("calibration_seconds", 0.0), "calibration_seconds")
        steps = document.get("steps")
        train_seconds = None
        if steps is not None:
            train_seconds = finite(document.get("train_seconds"), "train_seconds") + calibration
            steps = int(finite(steps, "steps"))
        texts = [document.get(name) for name in ("code_sha256", "machine")]
        settings = document.get("settings")
        if not all(isinstance(text, str) for text in texts) or not isinstance(settings, dict):
            raise ValueError(f"{path} has no code_sha256, machine and settings: is it of a run of train_gpt.py?")
        size = int(finite(document.get("bytes_total"), "bytes_total"))
    except ValueError as error:
        raise LaunchError(str(error)) from None
    different = contradictions(expected, settings)
    artifact = expected.get("EVAL_ONLY")
    if artifact and document.get("artifact_sha256") != sha256(Path(artifact)):
        different.append(f"its artifact was not {artifact} as it is now")
    if different:
        raise LaunchError(
            f"{folder} is the folder of another run ({'; '.join(different)}): give the study another name, or move "
            "that folder away"
        )
    return Result(**numbers, steps=steps, train_seconds=train_seconds, calibration_seconds=calibration,
                  bytes_total=size, code_sha256=texts[0], machine=texts[1], run=str(folder))  # fmt: skip


def read_events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the events of a kind in a run's metrics.jsonl, as far as it is written."""
    events = []
    with contextlib.suppress(OSError):
        content = (folder / "metrics.jsonl").read_bytes()
        for line in content.split(b"\n")[:-1]:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and event.get("event") == kind:
                    events.append(event)
    return events


# =================================================== processes =======================================================
def catch_signals(handler: Callable[[int, Any], None]) -> None:
    """Let a handler take the signals that ask a process to end."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handler)


def as_command(settings: dict[str, str], command: Sequence[str]) -> str:
    """Return a command as it may be typed, with those settings that this shell does not have already."""
    own = [f"{name}={shlex.quote(text)}" for name, text in settings.items() if os.environ.get(name) != text]
    return " ".join([*own, shlex.join(command)])


def places(gpus_per_trial: int) -> list[dict[str, str]]:
    """Return the variables of each place that takes one run at a time: all of the machine, or a part of its GPUs.

    Raise LaunchError where there are not enough of them."""
    if not gpus_per_trial:
        return [{}]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(index) for index in range(t.torch.cuda.device_count())]
    if named is not None:
        gpus = [gpu for gpu in named.split(",") if gpu]
    count = len(gpus) // gpus_per_trial
    if not count:
        raise LaunchError(f"--gpus-per-trial {gpus_per_trial}: {len(gpus)} GPUs are visible here, so give fewer")
    if len(gpus) % gpus_per_trial:
        print(f"{len(gpus) % gpus_per_trial} of {len(gpus)} GPUs are left over")
    own = []
    for index in range(count):
        group = gpus[index * gpus_per_trial : (index + 1) * gpus_per_trial]
        own.append({"CUDA_VISIBLE_DEVICES": ",".join(group)})
    if count > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, t.available_cores() // (count * gpus_per_trial))
        own = [place | {"OMP_NUM_THREADS": str(threads)} for place in own]
    return own


def check_command(command: Sequence[str], gpus_per_trial: int) -> None:
    """Raise LaunchError where the command is no program, or starts more or fewer processes than it is given GPUs."""
    if not command:
        raise LaunchError("the command of a run is missing: put it after --, as in `-- python train_gpt.py`")
    if shutil.which(command[0]) is None:
        raise LaunchError(f"{command[0]} is not there: put the command of a run after --, as `-- python train_gpt.py`")
    found = TORCHRUN_PROCESSES.search(" ".join(command))
    if gpus_per_trial and found and int(found[1]) != gpus_per_trial:
        fix = f"use --nproc_per_node={gpus_per_trial}, or --gpus-per-trial {found[1]}"
        raise LaunchError(f"the command starts {found[1]} processes on {gpus_per_trial} GPUs: {fix}")


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end_with_parent() -> None:
    """Let Linux send SIGTERM to this process when the one that started it dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Process:
    """A run in logs/<run_id>: found finished, waited for, resumed or started.

    `poll` moves it on and says how it stands; it never waits."""

    def __init__(
        self, run_id: str, settings: dict[str, str], command: Sequence[str], output: Path, place: dict[str, str]
    ):
        self.run_id = run_id
        self.folder = LOGS / run_id
        self.settings = settings
        self.command = list(command)
        self.output = output  # takes what the command prints
        self.place = place
        self.process: subprocess.Popen | None = None
        self.begun = time.monotonic()
        self.stop_time: float | None = None

    def poll(self) -> str:
        """Return "finished"; "failed"; "stopped", as it was asked to; "running"; or "busy": by another process."""
        if self.process is not None:
            return self._poll_process()
        if self.is_finished():
            return "finished"
        if self.stop_time is not None:
            return "stopped"
        if self._is_busy():
            return "busy"
        self._start()
        return "running"

    def is_finished(self) -> bool:
        return (self.folder / "submission.json").is_file()

    def stop(self) -> None:
        """Ask the run to end as soon as it can go on later."""
        if self.stop_time is None:
            self.stop_time = time.monotonic()
            self._signal(signal.SIGTERM)

    def last_lines(self) -> str:
        """Return how the command ended, and what it printed last."""
        lines = [f"{' '.join(self.command)} ended with status {self.process.returncode}" if self.process else ""]
        with contextlib.suppress(OSError):
            lines += self.output.read_text(errors="replace").splitlines()[-LAST_LINES:]
        return "\n".join(lines)[-LONGEST_MESSAGE:]

    def _poll_process(self) -> str:
        status = self.process.poll()
        if status is None:
            if self.stop_time is not None and time.monotonic() - self.stop_time > STOP_SECONDS:
                self._signal(getattr(signal, "SIGKILL", signal.SIGTERM))
            return "running"
        if self.is_finished():
            return "finished"
        return "failed" if self.stop_time is None else "stopped"

    def _is_busy(self) -> bool:
        """Whether another process works on the run: one whose sweeper was killed may still do."""
        if not (self.folder / "train.log").exists():
            return False
        try:
            t.lock(self.folder).close()
        except t.UserError:
            return True
        return False

    def _start(self) -> None:
        environment = os.environ | self.settings | self.place | {"RUN_ID": self.run_id}
        environment.pop("RESUME", None)
        if self.place and any("torch" in word for word in self.command):
            environment["PET_MASTER_PORT"] = str(free_port())  # of a torchrun that is not --standalone
        if self.folder.exists():
            if any(self.settings.get(name.upper()) or os.environ.get(name.upper()) for name in PATH_SETTINGS):
                self._set_aside()  # without training there is nothing to resume
            else:
                environment["RESUME"] = "1"
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                self.command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=end_with_parent if os.name == "posix" else None,
            )  # fmt: skip
        self.begun = time.monotonic()

    def _set_aside(self) -> None:
        """Rename the folder of a run that was stopped: no run overwrites another."""
        number = 1
        while self.folder.with_name(f"{self.folder.name}.stopped-{number}").exists():
            number += 1
        self.folder.rename(self.folder.with_name(f"{self.folder.name}.stopped-{number}"))

    def _signal(self, number: int) -> None:
        if self.process is None:
            return
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, number)  # with the processes that torchrun or make have started
            else:
                self.process.send_signal(number)
