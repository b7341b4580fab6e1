"""At home on other people's machines: launchers, screens, disks, data that changes, numbers that are none, limits.

Situations are made, not described: real processes, real full disks, real broken files. What is right is one line with
the value and the fix, the right exit status, and no run that is lost."""

from __future__ import annotations

import concurrent.futures
import errno
import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import AUDITED, ROOT, shell

import train_gpt as t

# A run of a second or two.
SHORT = {name: value for name, value in AUDITED.items() if name != "AUDIT"}


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """Returns the one line that a run has ended with."""
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("train_gpt.py: error: ")]
    assert len(lines) == 1 and lines[0].isprintable(), done.stderr
    return lines[0]


def last_result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "submission.json").read_text())


# ------------------------------------------------------------------------------------------------------- launchers
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
LAUNCHES = {
    "nothing": ({}, t.Launch()),
    "an address alone": (ADDRESS, t.Launch()),
    "one process": ({"RANK": "0", "WORLD_SIZE": "1"}, t.Launch()),
    "one process of torchrun": (
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **ADDRESS},
        t.Launch(),
    ),
    "torchrun": (
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **ADDRESS},
        t.Launch(5, 8, 1, 4, "127.0.0.1", 29500),
    ),
    "by hand": ({"RANK": "1", "WORLD_SIZE": "2", **ADDRESS}, t.Launch(1, 2, -1, 1, "127.0.0.1", 29500)),
    "a batch script": ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, t.Launch()),
    "one task of srun": ({"SLURM_STEP_NUM_TASKS": "1"}, t.Launch()),
}
WRONG_LAUNCHES = {
    "a rank alone": ({"RANK": "1"}, "WORLD_SIZE is not set (RANK='1')"),
    "a size alone": ({"WORLD_SIZE": "8"}, "RANK is not set"),
    "a local rank alone": ({"LOCAL_RANK": "3"}, "RANK is not set (LOCAL_RANK='3')"),
    "half of the local pair": ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "LOCAL_WORLD_SIZE is not set"),
    "an empty rank": ({"RANK": ""}, "RANK is empty or not set (RANK='')"),
    "an empty size": ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE is empty"),
    "a rank too high": ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is not below WORLD_SIZE"),
    "a negative rank": ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is no whole number"),
    "a carriage return": ({"RANK": "0\r", "WORLD_SIZE": "2"}, "RANK is no whole number (RANK='0\\r'"),
    "no process": ({"RANK": "0", "WORLD_SIZE": "0"}, "1 <= LOCAL_WORLD_SIZE <= WORLD_SIZE"),
    "a local rank too high": (
        {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"},
        "LOCAL_RANK is not below LOCAL_WORLD_SIZE",
    ),
    "more here than anywhere": (
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"},
        "1 <= LOCAL_WORLD_SIZE <= WORLD_SIZE",
    ),
    "no address": ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR, the machine of rank 0, is not set"),
    "an empty address": ({"RANK": "0", "WORLD_SIZE": "2", **ADDRESS, "MASTER_ADDR": " "}, "MASTER_ADDR"),
    "no port": ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT is empty or not set"),
    "a port too high": ({"RANK": "0", "WORLD_SIZE": "2", **ADDRESS, "MASTER_PORT": "99999"}, "MASTER_PORT is not from"),
    "srun without torchrun": ({"SLURM_STEP_NUM_TASKS": "8"}, "srun has started 8 processes"),
    "mpirun without torchrun": ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun has started 2 processes"),
}
LAUNCHER_VARIABLES = {*t.RANK_VARIABLES, *ADDRESS, *t.OTHER_LAUNCHERS.values(), "TORCHELASTIC_USE_AGENT_STORE"}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], t.Launch]:
    """Returns the launch of a process with these variables and no others of a launcher's."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def read(variables: dict[str, str]) -> t.Launch:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return t.read_launch()

    return read


@pytest.mark.parametrize("what", LAUNCHES)
def test_a_process_has_the_place_that_its_launcher_gives_it(what: str, launched: Callable) -> None:
    variables, expected = LAUNCHES[what]
    assert launched(variables) == expected


@pytest.mark.parametrize("what", WRONG_LAUNCHES)
def test_variables_of_a_launcher_that_do_not_fit_together_are_named(what: str, launched: Callable) -> None:
    variables, message = WRONG_LAUNCHES[what]
    with pytest.raises(t.UserError) as caught:
        launched(variables)
    assert message in str(caught.value) and "torchrun" in str(caught.value)
    assert str(caught.value).isprintable()
    if "started" not in message:
        assert f"`unset {next(iter(variables))}" in str(caught.value)


def test_a_rank_that_is_left_over_is_refused_before_anything_else(run_script: Callable) -> None:
    """Without the check it trained zeroed weights, in silence, as no rank but 0 prints anything."""
    done = run_script(RANK=1, DATA_PATH="nowhere", SEED="wrong")
    assert "WORLD_SIZE is not set (RANK='1')" in error_line(done)


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def meet_all(launches: list[t.Launch]) -> list[t.Launch | str]:
    """Returns what each process of a run finds, all in this process; errors as text."""

    def join(launch: t.Launch) -> t.Launch | str:
        try:
            store, found = t.meet(launch)
            stores.append(store)
            return found
        except t.UserError as error:
            return str(error)

    stores: list = []  # the first is the others' server
    with concurrent.futures.ThreadPoolExecutor(len(launches)) as pool:
        return list(pool.map(join, launches))


def test_processes_that_are_started_by_hand_find_their_local_ranks(
    port: int, launched: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = iter(["a", "b", "a", "a"])
    monkeypatch.setattr(t, "host_name", lambda: next(names))
    found = meet_all([t.Launch(rank, 4, -1, 1, "127.0.0.1", port) for rank in range(4)])
    by_host = {}
    for launch in found:
        by_host.setdefault(launch.local_world_size, []).append(launch.local_rank)
    assert by_host == {3: [0, 1, 2], 1: [0]}
    assert [launch.rank for launch in found] == [0, 1, 2, 3]


def test_who_is_missing_is_said_and_waited_for_no_longer_than_is_said(
    port: int, launched: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    clock = [0.0]
    fake = SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda _: clock.__setitem__(0, clock[0] + 1))
    monkeypatch.setattr(t, "time", fake)
    found = meet_all([t.Launch(0, 4, 0, 4, "127.0.0.1", port)])
    missing = f"3 of 4 processes at MASTER_ADDR:MASTER_PORT=127.0.0.1:{port} (rank 1, 2, 3)"
    assert found == [f"waited 301s for {missing}: start them, or correct WORLD_SIZE"]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"train_gpt.py: waiting for {missing}; 296s more, then this run ends" and len(said) == 19
    clock[0] = 0.0
    found = meet_all([t.Launch(1, 2, 1, 2, "127.0.0.1", port)])
    assert "for rank 0 of 2 at" in found[0] and "Connection refused" in found[0] and "start it there" in found[0]
    clock[0] = 0.0
    monkeypatch.setattr(t, "JOIN_SECONDS", 10.0)  # looking for a name takes time
    found = meet_all([t.Launch(1, 2, 1, 2, "no.such.host.invalid", port)])
    assert "no.such.host.invalid" in found[0] and "correct the address" in found[0]


def test_processes_that_are_not_of_one_run_are_refused(port: int, launched: Callable) -> None:
    def launch(rank: int, world_size: int) -> t.Launch:
        return t.Launch(rank, world_size, rank, world_size, "127.0.0.1", port)

    _, wrong_size, _, first, second = meet_all([launch(0, 3), launch(1, 2), launch(2, 3), launch(1, 3), launch(1, 3)])
    assert "WORLD_SIZE=2, but rank 0 at" in wrong_size and "has 3: give all the same" in wrong_size
    assert sorted(isinstance(found, str) for found in (first, second)) == [False, True]
    assert "have RANK=1: give each its own" in (first if isinstance(first, str) else second)


@pytest.mark.slow
def test_something_else_at_the_port_is_waited_for_no_longer_and_ctrl_c_is_heard(
    port: int, launched: Callable, monkeypatch: pytest.MonkeyPatch, corpus: SimpleNamespace, tmp_path: Path
) -> None:
    """It takes connections and says nothing: torch's store would wait, deaf to signals, and then try again."""
    monkeypatch.setattr(t, "JOIN_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", port)):
        (found,) = meet_all([t.Launch(1, 2, 1, 2, "127.0.0.1", port)])
        assert "for an answer of rank 0 from" in found and "choose another MASTER_PORT" in found
        settings = {**SHORT, "RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(t.CODE)]
        environment = shell(corpus, **settings)
        with subprocess.Popen(
            command, env=environment, cwd=tmp_path, text=True, stderr=subprocess.PIPE, preexec_fn=hear_ctrl_c
        ) as process:
            assert "waiting for an answer of rank 0" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            assert "stopped before the run began" in process.communicate(timeout=60)[1]
    assert process.returncode == 130


def hear_ctrl_c() -> None:
    """Undo what a shell does to what it starts in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_port_that_is_taken_is_said(port: int, launched: Callable) -> None:
    with socket.create_server(("", port)):
        (found,) = meet_all([t.Launch(0, 2, 0, 2, "127.0.0.1", port)])
    assert "rank 0 cannot join the others" in found and "choose another MASTER_PORT" in found


def test_a_launchers_variables_are_told_from_those_that_it_was_started_with() -> None:
    code = "import os, sys; sys.path.insert(0, sys.argv[1]); import train_gpt as t; print(t.is_set_by_launcher('A_B'))"
    inner = [sys.executable, "-c", code, str(ROOT)]
    outer = f"import subprocess, os; subprocess.run({inner!r}, env={{**os.environ, 'A_B': '1'}}, check=True)"
    for exported, expected in ({}, "True"), ({"A_B": "1"}, "False"):
        environment = {**os.environ, **exported}
        done = subprocess.run(
            [sys.executable, "-c", outer], env=environment, text=True, capture_output=True, check=True
        )
        assert done.stdout.strip() == expected


@pytest.mark.slow
def test_ranks_with_other_settings_than_rank_0_are_refused(corpus: SimpleNamespace, tmp_path: Path, port: int) -> None:
    """As on a second node whose shell lacks an export: each would train on its own."""
    processes = []
    for rank, seed in enumerate((1, 2)):
        settings = {**SHORT, "RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environment = shell(corpus, **settings, SEED=seed)
        command = [sys.executable, str(t.CODE)]
        processes.append(subprocess.Popen(command, env=environment, cwd=tmp_path, text=True, stderr=subprocess.PIPE))
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert "rank 1 is not of the run of rank 0: SEED is 2 and not 1" in said[1]
    assert all(process.returncode != 0 for process in processes)


# ---------------------------------------------------------------------------------------------------------- script
@pytest.mark.slow
@pytest.mark.parametrize("change", ["appended to", "deleted", "replaced by another"])
def test_a_script_that_is_changed_while_it_runs_is_not_read_again(
    change: str, corpus: SimpleNamespace, tmp_path: Path
) -> None:
    script = tmp_path / "train_gpt.py"
    shutil.copy(t.CODE, script)
    environment = shell(corpus, **SHORT, RUN_ID="a", PYTHONUNBUFFERED=1)
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, env=environment, cwd=tmp_path, text=True, stdout=subprocess.PIPE) as process:
        process.stdout.readline()  # the first line of the banner
        if change == "appended to":
            script.write_text(script.read_text() + "\nraise SystemExit\n")
        elif change == "deleted":
            script.unlink()
        else:
            script.write_text("print('of another branch')\n")
        process.communicate(timeout=120)
    assert process.returncode == 0
    result = last_result(tmp_path / "logs/a")
    shipped = (tmp_path / "logs/a/train_gpt.py").read_bytes()
    assert t.unpack(shipped) == t.SCRIPT and result["bytes_code"] == len(shipped)


# ---------------------------------------------------------------------------------------------------- the terminal
SCREENS = {
    "a pipe that closes": "{command} | head -2 > head.txt",
    "no standard output": "{command} >&-",
    "no standard error": "{command} 2>&-",
    "a full device": "{command} > /dev/full",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", SCREENS)
def test_no_screen_ends_a_run(what: str, corpus: SimpleNamespace, tmp_path: Path) -> None:
    command = SCREENS[what].format(command=f"'{sys.executable}' '{t.CODE}'")
    environment = shell(corpus, **SHORT, RUN_ID="a")
    subprocess.run(["bash", "-c", command], env=environment, cwd=tmp_path, capture_output=True, check=False)
    assert last_result(tmp_path / "logs/a")["steps"] == 4
    assert "final_exact" in (tmp_path / "logs/a/train.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("what", SCREENS)
def test_no_screen_ends_the_building_of_data(what: str, tmp_path: Path) -> None:
    command = SCREENS[what].format(command=f"'{sys.executable}' '{ROOT}/data/demo.py' build --output x")
    subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, check=False)
    assert (tmp_path / "x/datasets/demo_sp1024/manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_path_is_printed_in_any_encoding(encoding: str, corpus: SimpleNamespace, tmp_path: Path) -> None:
    """Folders with a space, an umlaut, a character beyond Latin-1, and a byte that is not UTF-8."""
    name = os.fsdecode("Läufe \u2192 x".encode() + b"\xff")
    folder = tmp_path / name
    shutil.copytree(corpus.data_path, folder / "data")
    settings = {**SHORT, "RUN_ID": "a", "DATA_PATH": folder / "data", "PYTHONIOENCODING": encoding}
    environment = shell(corpus, **settings)
    done = subprocess.run(
        [sys.executable, str(t.CODE)], env=environment, cwd=folder, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0 and b"takes no more lines" not in done.stdout, done
    assert done.stdout.count(b"\n") == (folder / "logs/a/train.log").read_bytes().count(b"\n")


def test_control_characters_of_a_value_are_shown(run_script: Callable) -> None:
    """A file of settings with the line ends of Windows: a bare \\r would overwrite the line that is about it."""
    assert "SEED=1337\\r is not allowed" in error_line(run_script(SEED="1337\r"))


# ------------------------------------------------------------------------------------------------------------ disks
def no_room(path: Path | str) -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", str(path))


@pytest.fixture
def saving(make_run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A runtime that saves while folders are full: `full` has pairs of a folder and the time at which there is room."""
    rt = make_run().rt
    clock, warnings, full = [0.0], [], {}
    monkeypatch.setattr(rt, "warn", warnings.append)
    fake = SimpleNamespace(
        time=time.time, perf_counter=lambda: clock[0], sleep=lambda s: clock.__setitem__(0, clock[0] + s)
    )
    monkeypatch.setattr(t, "time", fake)
    monkeypatch.setattr(t.tempfile, "mkdtemp", lambda prefix: str(tmp_path / "temporary" / prefix))
    write = t.write_atomically

    def write_if_there_is_room(path: Path, *pieces: bytes) -> None:
        if clock[0] < max((until for folder, until in full.items() if path.is_relative_to(folder)), default=0.0):
            raise no_room(path)
        write(path, *pieces)

    monkeypatch.setattr(t, "write_atomically", write_if_there_is_room)
    return SimpleNamespace(rt=rt, clock=clock, warnings=warnings, full=full)


def test_a_result_waits_for_room_and_goes_elsewhere_where_there_is_none(
    saving: SimpleNamespace, tmp_path: Path
) -> None:
    rt, home = saving.rt, saving.rt.run_dir
    assert rt.save("a", b"1") == home / "a" and not saving.warnings
    saving.full[home] = 4.0  # there is room again at the second try
    assert rt.save("b", b"2") == home / "b" and len(saving.warnings) == 1
    assert f"{home / 'b'}: No space left on device" in saving.warnings[0] and "free 1 bytes" in saving.warnings[0]
    saving.full[home] = math.inf
    rt.fallback_dir = str(tmp_path / "spare")
    spare = tmp_path / "spare" / home.name
    assert rt.save("c", b"3", b"4") == spare / "c" and (spare / "c").read_bytes() == b"34"
    assert saving.warnings[-1] == f"c is in {spare}, because {home} took no more"
    saving.full[tmp_path / "spare"] = math.inf
    found = rt.save("d", b"5")
    assert found.is_relative_to(tmp_path / "temporary") and found.read_bytes() == b"5"
    assert rt.saved == {"a": home / "a", "b": home / "b", "c": spare / "c", "d": found}
    saving.full[tmp_path] = math.inf
    saving.warnings.clear()
    with pytest.raises(t.UserError, match="e was not written for 1500s: .*No space left"):
        rt.save("e", b"6")
    assert len(saving.warnings) == 26  # one a minute
    assert not list(tmp_path.rglob("*.tmp")) and not list(home.glob("*.tmp"))


def test_weights_that_nothing_takes_stay_in_memory_and_the_journal_never_promises_them(
    saving: SimpleNamespace, make_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()._replace(rt=saving.rt)
    saving.full[Path("/")] = math.inf
    assert t.write_checkpoint(run) == "" and saving.clock[0] == 0.0  # without waiting
    assert "goes on with those in memory" in saving.warnings[-1]
    saving.full.clear()
    journal = t.Journal.__new__(t.Journal)
    journal.rt, journal.folder, journal.content = saving.rt, saving.rt.run_dir, {"stages": {}}
    journal.is_stale = journal.is_closed = False
    (journal.folder / "checkpoint-3.bin").touch()
    journal.complete("train", {"checkpoint": ""})
    journal.complete("export", {"artifact": "final_model.bin"})
    assert (journal.folder / "checkpoint-3.bin").exists() and not (journal.folder / "journal.json").exists()


def test_a_journal_that_cannot_be_written_is_one_warning_and_keeps_the_checkpoints(saving: SimpleNamespace) -> None:
    journal = t.Journal.__new__(t.Journal)
    journal.rt, journal.folder, journal.content = saving.rt, saving.rt.run_dir, {"stages": {}}
    journal.is_stale = journal.is_closed = False
    (journal.folder / "checkpoint-3.bin").touch()
    saving.full[journal.folder] = 1.0
    journal.complete("train", {"checkpoint": "checkpoint.bin"})
    journal.keep_plan = journal._write
    assert not journal._write() and len(saving.warnings) == 1 and "RESUME would begin" in saving.warnings[0]
    assert (journal.folder / "checkpoint-3.bin").exists()
    saving.clock[0] = 2.0
    journal.complete("calibrate", {})
    assert not (journal.folder / "checkpoint-3.bin").exists()
    assert json.loads((journal.folder / "journal.json").read_text())["stages"].keys() == {"train", "calibrate"}


@pytest.mark.parametrize(
    ("free", "fallback", "outcome"),
    [
        (10**12, "", ""),
        (3_000_000, "", "error"),
        (3_000_000, "full too", "error"),
        (3_000_000, "/on a large disk", "warning"),
        (7_000_000, "", "warning"),
    ],
)
def test_room_is_looked_for_before_the_run(
    free: int, fallback: str, outcome: str, make_run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = make_run(fallback_dir=fallback)
    results, checkpoints = t.bytes_to_write(run)
    num_bytes = 4 * sum(p.numel() for p in run.model.parameters())
    assert 2**22 < results < 2**23 and 9 * num_bytes < checkpoints < 12 * num_bytes
    checkpoints_of_run = 3 * sum(s.numel() * 4 for s in t.Trainer(run).state()[1])
    assert checkpoints == checkpoints_of_run
    journal = t.Journal.__new__(t.Journal)
    journal.h, journal.rt, journal.folder = run.h, run.rt, tmp_path / "logs" / "new"
    warnings: list[str] = []
    monkeypatch.setattr(run.rt, "warn", warnings.append)
    rooms = {Path("/"): 10**12}
    monkeypatch.setattr(t.shutil, "disk_usage", lambda path: SimpleNamespace(total=1, free=rooms.get(path, free)))
    if outcome == "error":
        with pytest.raises(t.UserError, match="has room for 3 MB, and the results of this run take 5 MB: free some"):
            journal._check_room(run)
    else:
        if free == 7_000_000:
            free = results + checkpoints - 1
            monkeypatch.setattr(t.shutil, "disk_usage", lambda path: SimpleNamespace(total=free, free=free))
        journal._check_room(run)
    assert len(warnings) == (outcome == "warning")
    monkeypatch.setattr(t.shutil, "disk_usage", lambda path: SimpleNamespace(total=0, free=0))
    journal._check_room(run)  # a volume that does not tell


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB, where this process may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.mark.slow
@pytest.mark.parametrize("fallback", ["FALLBACK_DIR", "TMPDIR"])
def test_a_disk_that_fills_up_in_training_costs_no_result(
    fallback: str, small_disk: Path, corpus: SimpleNamespace, tmp_path: Path
) -> None:
    """It has room for two checkpoints of 7 MB and not for the third, nor for what comes after a neighbour's file."""
    spare = tmp_path / "spare"
    spare.mkdir()
    settings = {**SHORT, "RUN_ID": "a", "ITERATIONS": 400, "CHECKPOINT_EVERY": 0.3, fallback: spare}
    environment = shell(corpus, **settings)
    command = [sys.executable, str(t.CODE)]
    with subprocess.Popen(command, env=environment, cwd=small_disk, text=True, stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            if line.startswith("checkpoint: "):
                break
        with (small_disk / "of a neighbour").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))
        rest = process.stdout.read()
    assert process.returncode == 0, rest
    assert "was not written" in rest and "because logs/a took no more" in rest
    (folder,) = spare.iterdir()
    result = last_result(folder)
    assert result["steps"] == 400 and result["artifact"] == str(folder / "final_model.bin")
    assert not list(small_disk.rglob("*.tmp"))
    settings = {name: value for name, value in settings.items() if name != "CHECKPOINT_EVERY"}
    environment = shell(corpus, **settings | {"RUN_ID": "again", "EVAL_ONLY": folder / "final_model.bin"})
    subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=True)
    assert last_result(tmp_path / "logs/again")["val_bpb"] == result["val_bpb"]


def test_a_disk_without_room_is_refused_before_the_run(small_disk: Path, run_script: Callable) -> None:
    (small_disk / "of a neighbour").write_bytes(bytes(12_000_000))
    line = error_line(run_script(cwd=small_disk, **SHORT))
    assert f"{small_disk} has room for 5 MB, and the results of this run take 8 MB" in line
    assert not (small_disk / "logs").exists()


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_costs_checkpoints_and_nothing_else(
    corpus: SimpleNamespace, tmp_path: Path
) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    environment = shell(corpus, **SHORT, RUN_ID="a")
    done = subprocess.run(
        [sys.executable, str(t.CODE)], env=environment, cwd=tmp_path, preexec_fn=limit, text=True, capture_output=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "checkpoint after step 4 was not written" in done.stdout and "File too large" in done.stdout
    assert "goes on with those in memory" in done.stdout
    assert last_result(tmp_path / "logs/a")["artifact"] == "final_model.bin"


def dangling_link(folder: Path) -> None:
    (folder / "logs").symlink_to("/mnt/gone/logs")


def plain_file(folder: Path) -> None:
    (folder / "logs").write_text("")


def read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (dangling_link, "a link to /mnt/gone/logs, which is not there"),
        (plain_file, "Not a directory"),
        (read_only, "Read-only file system"),
    ],
)
def test_a_folder_that_takes_no_files_is_refused_before_the_data_is_read(
    spoil: Callable, said: str, small_disk: Path, run_script: Callable
) -> None:
    spoil(small_disk)
    line = error_line(run_script(cwd=small_disk, TOKENIZER_PATH="no tokenizer", DATA_PATH=ROOT / "tests", **SHORT))
    assert said in line and f"{small_disk}/logs takes no files" in line and "start in another folder" in line


# ------------------------------------------------------------------------------------------------- data that changes
@pytest.fixture
def shard(corpus: SimpleNamespace, tmp_path: Path) -> t.Shard:
    """A shard of a run in progress."""
    path = tmp_path / "demo_train_000000.bin"
    shutil.copy(corpus.data_path / path.name, path)
    os.utime(path, (1e9, 1e9))
    return t.load_data_shard(path)


@pytest.fixture
def loader(shard: t.Shard, tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., t.TokenLoader]:
    """Makes the loader of that run, which keeps its warnings."""
    monkeypatch.setattr(t.Shard, "TRIES", 1)

    def make(vocab_size: int = 1024) -> t.TokenLoader:
        h = tiny(vocab_size=vocab_size)
        rt = SimpleNamespace(rank=0, world_size=1, max_rows={"training": 8}, warnings=[])
        rt.to_device = lambda windows: torch.from_numpy(windows).long()
        rt.warn = rt.warnings.append
        return t.TokenLoader(h, rt, [shard])

    return make


def step_until_it_fails(loader: t.TokenLoader) -> str:
    with pytest.raises(t.UserError) as caught:
        for _ in range(4):  # two steps are read ahead
            loader.next_batch()
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_a_shard_that_is_cut_short_ends_a_run_with_a_line(shard: t.Shard, loader: Callable) -> None:
    """Mapped into memory, its missing pages would have ended the process with SIGBUS."""
    steps = loader()
    steps.next_batch()
    os.truncate(shard.path, shard.size // 2)
    assert f"{shard.path} had {shard.size} bytes, and has {shard.size // 2} now" in step_until_it_fails(steps)


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_a_damaged_one(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A volume that fails must not cost the checkpoints: the one before, or none, would have been gone on from."""
    run = make_run(iterations=3, max_wallclock_seconds=0.0, val_loss_every=0, checkpoint_every=1e-9)
    t.train(run)
    kept = {path: path.read_bytes() for path in run.rt.run_dir.glob("checkpoint-*.bin")}
    newest = max(kept, key=lambda path: path.name)

    def fail(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(t.UserError, match=f"{newest.name} cannot be read: Input/output error"):
        t.Checkpoints(t.Trainer(run)).restore()
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in run.rt.run_dir.glob("checkpoint-*.bin")} == kept
    newest.write_bytes(kept[newest][:-1])
    t.Checkpoints(t.Trainer(run)).restore()
    assert newest.with_name(f"{newest.name}.damaged").exists() and not newest.exists()


def test_a_shard_that_is_deleted_ends_a_run_with_a_line(shard: t.Shard, loader: Callable) -> None:
    steps = loader()
    shard.path.unlink()
    line = step_until_it_fails(steps)
    assert f"{shard.path}: No such file or directory" in line and "DATA_PATH" in line


def test_a_shard_that_is_written_to_is_one_warning_and_one_with_other_tokens_an_error(
    shard: t.Shard, loader: Callable
) -> None:
    steps = loader()
    os.utime(shard.path, (2e9, 2e9))
    for _ in range(6):
        steps.next_batch()
    assert [str(shard.path) in line for line in steps.rt.warnings] == [True]
    with shard.path.open("r+b") as file:  # without a moment in which it is shorter
        file.seek(t.SHARD_HEADER_BYTES)
        file.write(b"\xff" * (shard.size - t.SHARD_HEADER_BYTES))
    assert "has token 65535 since it was looked at" in step_until_it_fails(steps)


def test_a_volume_that_fails_for_a_moment_is_asked_again(shard: t.Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(t, "time", SimpleNamespace(sleep=pauses.append))
    expected, read = shard[5:50].tolist(), t.Shard._read
    failures = [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle")]

    def fail_twice(self: t.Shard, begin: int, tokens: np.ndarray) -> None:
        if failures:
            raise failures.pop()
        read(self, begin, tokens)

    monkeypatch.setattr(t.Shard, "_read", fail_twice)
    assert shard[5:50].tolist() == expected and pauses == [1, 2]
    failures += [OSError(errno.EIO, "Input/output error")] * 5
    with pytest.raises(t.UserError, match="Input/output error.* for 5 times: is DATA_PATH still there"):
        shard[5:50]
    assert sum(pauses) == 3 + 15


def test_a_slow_volume_is_waited_for_and_named(loader: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = loader()
    times = iter([0.0, 0.5, 1.0, 13.5, 20.0, 22.0, 90.0, 92.0])
    monkeypatch.setattr(t, "time", SimpleNamespace(perf_counter=lambda: next(times), time=time.time))
    for _ in range(4):
        steps.next_batch()
    assert steps.waited == 17.0 and len(steps.rt.warnings) == 2  # one a minute at most
    assert "a step waited 12.5s for its tokens from DATA_PATH=" in steps.rt.warnings[0]


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (make_pipe, "is no regular file"),
        (Path.mkdir, "is no regular file"),
        (lambda path: path.symlink_to("/mnt/gone"), "No such file or directory"),
    ],
)
def test_what_is_no_file_among_the_shards_is_refused(make: Callable, said: str, tmp_path: Path) -> None:
    """Reading a pipe would wait for ever."""
    path = tmp_path / "a_train_000000.bin"
    make(path)
    with pytest.raises(t.UserError, match=said):
        t.load_data_shard(path)


def test_a_folder_or_a_pipe_in_the_place_of_a_file_is_named_as_such(tmp_path: Path, run_script: Callable) -> None:
    (tmp_path / "run").mkdir()
    line = error_line(run_script(EVAL_ONLY="run"))
    assert "run is a folder: give its file, run/final_model.bin" in line
    os.mkfifo(tmp_path / "pipe")
    for name, limit, said in ("run", 9, "is a folder"), ("pipe", 9, "is a pipe"), ("none", 9, "No such file"):
        with pytest.raises(t.UserError, match=f"A={tmp_path / name} .*{said}"):
            t.read_file(tmp_path / name, limit, "A")
    (tmp_path / "large").write_bytes(bytes(10))
    with pytest.raises(t.UserError, match="large has 10 bytes, and such files have at most 9"):
        t.read_file(tmp_path / "large", 9)


# ---------------------------------------------------------------------------------------------- numbers that are none
@pytest.mark.parametrize("name", ["tok_emb", "blocks.1.mlp.proj", "blocks.2.attn_scale"])
def test_the_first_gradient_that_is_not_finite_is_named(name: str, make_run: Callable) -> None:
    run = make_run(iterations=4, max_wallclock_seconds=0.0, val_loss_every=0, checkpoint_every=1e-9)
    full = next(full for full, _ in run.model.named_parameters() if name in full)
    parameter = dict(run.model.named_parameters())[full]
    calls = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * (math.inf if len(calls) == 3 else 1.0)

    parameter.register_hook(spoil)
    with pytest.raises(t.UserError) as caught:
        t.train(run)
    rate = t.param_group_of(full).lr
    assert "step 3: train_loss is " in str(caught.value)
    assert f"the gradient of {full} is not finite: lower {rate.upper()}=" in str(caught.value)
    assert "checkpoint-1.bin, checkpoint-2.bin stay in" in str(caught.value)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_the_rank_that_has_the_gradient_names_it_for_all(world_size: int, make_run: Callable) -> None:
    run = make_run()
    order = [name for name, _ in run.model.named_parameters()]
    wrong = {"blocks.1.attn.c_q.weight", "blocks.2.mlp.fc.weight", "blocks.2.attn_scale"}
    assert wrong <= set(order)
    parameters = dict(run.model.named_parameters())
    votes: dict[int, list[float]] = {}

    def optimizer(rank: int, least: Callable) -> t.Optimizer:
        rt = SimpleNamespace(rank=rank, world_size=world_size, device=run.rt.device, compile=lambda f: f, least=least)
        return t.Optimizer(run.h, rt, run.model)

    def norms_of(made: t.Optimizer, rank: int) -> list[float]:
        own = []
        for group in made.muon_groups:
            size = len(group.momentum)
            padded = [*group.wide, *group.tall] + [None] * (size * world_size)
            own += padded[rank * size : (rank + 1) * size]
        own += made.replicated
        bad = [id(parameters[name]) for name in wrong]
        return [math.nan if id(p) in bad else 1.0 for p in own]

    for rank in range(world_size):  # what each says by itself
        votes[rank] = []
        made = optimizer(rank, lambda number, rank=rank: votes[rank].append(number) or number)
        made.first_not_finite(norms_of(made, rank))
    first, all_wrong = (min(numbers) for numbers in zip(*votes.values()))
    answers = iter([first, all_wrong])
    made = optimizer(0, lambda number: next(answers))
    assert made.first_not_finite(norms_of(made, 0)) == min(wrong, key=order.index)


def score(bpb: float) -> t.Score:
    return t.Score(val_loss=bpb, val_bpb=bpb, **{name: 1 for name in t.Score._fields[2:]})


@pytest.mark.parametrize(
    ("averaged", "quantized", "sliding", "adapted", "alarms"),
    [
        (1.20, 1.205, 1.17, 1.16, []),
        (1.20, 1.23, 1.17, 1.16, ["quantization made the score worse by 0.0300"]),
        (1.20, 1.205, 1.17, 1.18, ["adaptation made the score worse by 0.0100"]),
        (math.nan, 1.23, 1.17, 1.16, []),  # EVAL_ONLY knows of no average
        (1.20, 1.23, 1.17, 1.34, ["quantization made", "adaptation made the score worse by 0.1700"]),
    ],
)
def test_a_step_of_the_ladder_that_goes_down_is_an_alarm(
    averaged: float, quantized: float, sliding: float, adapted: float, alarms: list[str],
    make_run: Callable, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = make_run(eval_ladder=True)
    warnings: list[str] = []
    monkeypatch.setattr(run.rt, "warn", warnings.append)
    for name, bpb in (("eval_val", quantized), ("eval_val_sliding", sliding), ("final_score", adapted)):
        monkeypatch.setattr(t, name, lambda run, bpb=bpb: score(bpb))
    assert t.evaluate(run, averaged)[0].val_bpb == adapted
    assert len(warnings) == len(alarms)
    for line, alarm in zip(warnings, alarms):
        assert line.startswith("ALARM: ") and alarm in line


def test_a_score_that_is_none_is_refused(make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t, "final_score", lambda run: score(math.nan))
    with pytest.raises(t.UserError, match="the final score is nan: lower TTT_LR=0.03, or set TTT_ENABLED=0"):
        t.evaluate(make_run())


def test_a_chunk_larger_than_the_text_costs_the_preflight_nothing(make_run: Callable) -> None:
    run = make_run(ttt_chunk_tokens=10**9, iterations=1)
    start = time.process_time()
    t.preflight(run)
    assert time.process_time() - start < 60  # 10**9 random tokens take minutes and 4 GB
