"""Proofs of data/parallel.py: results in order, errors of either side, nothing that is left behind; how many cores."""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import build
import parallel
import pytest
import verify
from shards import DataError


class Work:
    """What the processes do: it must be importable, as they begin with nothing."""

    def __init__(self, offset: int = 0):
        self.offset = offset

    def square(self, number: int) -> int:
        """Returns the square, the sooner the larger it is: results come in another order than they are to leave."""
        time.sleep(0.02 if number % 4 == 0 else 0.0)
        return number * number + self.offset

    def fail(self, number: int) -> int:
        """Returns the number, or ends in one of the ways in which work ends."""
        if number == 5:
            raise DataError("five is wrong")
        if number == 6:
            raise FileNotFoundError("six is missing")
        if number == 7:
            os._exit(3)
        return number


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_results_come_in_the_order_of_the_items(jobs: int) -> None:
    found = list(parallel.in_order(functools.partial(Work, 7), "square", iter(range(40)), jobs))
    assert found == [number * number + 7 for number in range(40)]
    assert list(parallel.in_order(Work, "square", [], jobs)) == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_in_a_process_is_raised_here(jobs: int) -> None:
    with pytest.raises(DataError, match="five is wrong"):
        list(parallel.in_order(Work, "fail", range(1, 6), jobs))
    with pytest.raises((DataError, OSError), match="six is missing"):
        list(parallel.in_order(Work, "fail", [1, 6], jobs))


def test_a_process_that_ends_is_an_error_and_not_a_wait() -> None:
    with pytest.raises(DataError, match="a process ended, .*: try fewer than --jobs 2"):
        list(parallel.in_order(Work, "fail", [1, 7, *range(8, 30)], 2))


def test_who_stops_listening_leaves_no_process() -> None:
    results = parallel.in_order(Work, "square", iter(range(10**9)), 2)
    assert next(results) == 0
    results.close()


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_a_process_starts_is_heard_afterwards() -> None:
    with pytest.raises(KeyboardInterrupt):
        with parallel.interrupts_held_back():
            os.kill(os.getpid(), 2)
            time.sleep(0.05)
            finished = True
    assert finished


# ---- the cores that there are ----------------------------------------------------------------------------------------

V1_QUOTA, V1_PERIOD = "cpu.cfs_quota_us", "cpu.cfs_period_us"
MACHINE, MASK, QUOTA = "the machine", "the affinity mask", "the control group's quota"
CGROUP_TREES = [  # what /proc/self/cgroup says, files below /sys/fs/cgroup, the quota's cores; none where 0
    (None, {}, 0),
    (None, {"cpu.max": "400000 100000\n"}, 4),
    (None, {"cpu.max": "150000 100000\n"}, 2),  # 1.5 cores
    (None, {"cpu.max": "10000 100000\n"}, 1),
    (None, {f"cpu/{V1_QUOTA}": "400000\n", f"cpu/{V1_PERIOD}": "100000\n"}, 4),
    ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
    # Version 2: a group's own quota, and one of a group around it, which holds for it too.
    ("0::/a/b\n", {"a/b/cpu.max": "500000 100000\n"}, 5),
    ("0::/a/b\n", {"a/b/cpu.max": "500000 100000\n", "a/cpu.max": "200000 100000\n"}, 2),
    ("0::/a/b\n", {"a/b/cpu.max": "200000 100000\n", "a/cpu.max": "500000 100000\n"}, 2),
    ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "700000 100000\n"}, 7),
    ("0::/a/b\n", {"a/other/cpu.max": "100000 100000\n"}, 0),
    ("0::/system.slice/my job.service\n", {"system.slice/my job.service/cpu.max": "200000 100000\n"}, 2),
    ("0::/a:b\n", {"a:b/cpu.max": "200000 100000\n"}, 2),
    ("0::/../a\n", {"cpu.max": "600000 100000\n"}, 6),  # seen from inside of a namespace
    # Version 1, its controllers mounted under one name or several, and a hybrid of both versions.
    ("4:cpu,cpuacct:/a\n", {f"cpu/a/{V1_QUOTA}": "250000\n", f"cpu/a/{V1_PERIOD}": "100000\n"}, 3),
    ("4:cpu,cpuacct:/a\n", {f"cpu,cpuacct/a/{V1_QUOTA}": "200000", f"cpu,cpuacct/a/{V1_PERIOD}": "100000"}, 2),
    ("4:cpuacct,cpu:/a\n", {f"cpuacct,cpu/a/{V1_QUOTA}": "200000", f"cpuacct,cpu/a/{V1_PERIOD}": "100000"}, 2),
    (
        "4:cpu:/a/b\n",
        {f"cpu/a/b/{V1_QUOTA}": "-1", f"cpu/a/b/{V1_PERIOD}": "100000"}
        | {f"cpu/a/{V1_QUOTA}": "600000", f"cpu/a/{V1_PERIOD}": "100000"},
        6,
    ),
    ("4:cpuset:/a\n3:memory:/a\n", {f"cpuset/a/{V1_QUOTA}": "100000", f"cpuset/a/{V1_PERIOD}": "100000"}, 0),
    ("1:name=systemd:/a\n0::/a\n", {"unified/a/cpu.max": "300000 100000\n"}, 3),
    (
        "2:cpu:/a\n0::/b\n",
        {"unified/b/cpu.max": "300000 100000\n"} | {f"cpu/a/{V1_QUOTA}": "200000", f"cpu/a/{V1_PERIOD}": "100000"},
        2,
    ),
    # Nothing that is a limit.
    ("nonsense\n\n::::\n", {"cpu.max": "nonsense\n"}, 0),
    ("0::/a\n", {"a/cpu.max": "", "cpu.max": "1 2 3\n"}, 0),
    ("0::/a\n", {"a/cpu.max": "100000 0\n"}, 0),
    ("0::/a\n", {"a/cpu.max": "0 100000\n"}, 0),
    ("0::/a\n", {"a/cpu.max": "-5 100000\n"}, 0),
    ("0::/a\n", {"a/cpu.max/file": "a folder in its place"}, 0),
    ("4:cpu:/\n", {f"cpu/{V1_QUOTA}": "200000\n"}, 0),  # without a period
    ("0::/a\n", {"a/cpu.max": "max 100000", f"a/{V1_QUOTA}": "200000", f"a/{V1_PERIOD}": "100000"}, 2),
]


@pytest.fixture
def trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets data/parallel.py and train_gpt.py see a made-up machine instead of this one."""
    import train_gpt  # not above: every process that a test starts would import torch

    def show(own: str | None, files: dict[str, str], mask: set[int] | None, count: int | None) -> None:
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        if own is not None:
            (tmp_path / "own").write_text(own)
        for module in (parallel, train_gpt):
            monkeypatch.setattr(module, "CGROUPS", tmp_path / "cgroup")
            monkeypatch.setattr(module, "OWN_CGROUPS", tmp_path / "own")
        monkeypatch.setattr(os, "cpu_count", lambda: count)
        if mask is None:
            monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on a Mac
        else:
            monkeypatch.setattr(os, "sched_getaffinity", lambda _: mask, raising=False)

    return show


@pytest.mark.parametrize("mask", [None, {0, 3, 5}, set(range(64))], ids=["no mask", "3", "64"])
@pytest.mark.parametrize(("own", "files", "quota"), CGROUP_TREES, ids=range(len(CGROUP_TREES)))
def test_the_cores_are_those_of_the_mask_and_of_all_quotas_as_in_the_trainer(
    own: str | None, files: dict[str, str], quota: int, mask: set[int] | None, trees: Callable
) -> None:
    import train_gpt

    trees(own, files, mask, 64)
    limits = {MACHINE: 64}
    if mask is not None:
        limits[MASK] = len(mask)
    if quota:
        limits[QUOTA] = quota
    assert parallel.core_limits() == train_gpt.core_limits() == limits
    cores, limit = parallel.available_cores()
    assert cores == train_gpt.available_cores() == min(limits.values()) == limits[limit]


def test_a_machine_that_does_not_tell_its_cores_has_one(trees: Callable) -> None:
    import train_gpt

    trees(None, {}, None, None)
    assert parallel.available_cores() == (train_gpt.available_cores(), MACHINE) == (1, MACHINE)


def test_the_tools_take_as_many_processes_as_there_are_cores_and_say_why(
    trees: Callable, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trees("0::/a\n", {"a/cpu.max": "300000 100000\n"}, set(range(64)), 64)
    assert build.parse_arguments(["a.jsonl", "--name", "x", "--vocab", "bytes"]).jobs == 3
    for tool in (build, verify):
        with pytest.raises(SystemExit):
            tool.parse_arguments(["--help"])
        assert "processes (3, the cores of the control group's quota" in " ".join(capsys.readouterr().out.split())


def test_verify_takes_as_many_processes_as_there_are_cores(
    trees: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees("0::/a\n", {"a/cpu.max": "300000 100000\n"}, set(range(64)), 64)
    taken = []
    monkeypatch.setattr(verify, "in_order", lambda make, method, items, jobs: taken.append(jobs) or iter(()))
    folder = verify.Folder(tmp_path)
    folder.paths["train"] = [tmp_path / f"x_train_{number:06d}.bin" for number in range(40)]
    folder.num_tokens = dict.fromkeys(folder.paths["train"], 100_000_000)
    folder.look(0, everything=False)
    folder.look(7, everything=False)
    assert taken == [1, 3, 1, 7]  # validation, which there is none of here, and training


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_a_tokenizer_starts_one_thread_and_not_one_for_every_core(tmp_path: Path) -> None:
    """SentencePiece's default is one for every core: with a process for every core that is cores x cores."""
    path = tmp_path / "bytes.model"
    path.write_bytes(build.byte_tokenizer())
    code = (
        "import sys, threading, os, pickle; from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(build.__file__).parent)!r})\n"
        "import build\n"
        f"encoder = pickle.loads(pickle.dumps(build.Encoder(Path({str(path)!r}))))  # as verify.py hands it on\n"
        "most, done = 0, threading.Event()\n"
        "def watch():\n"
        "    global most\n"
        "    while not done.wait(0.0005):\n"
        "        most = max(most, len(os.listdir('/proc/self/task')))\n"
        "watcher = threading.Thread(target=watch)\n"
        "watcher.start()\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "encoder.decode(encoder.encode(['some words ' * 3000] * 100))\n"
        "done.set()\n"
        "watcher.join()\n"
        "print(most - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 1, done.stdout
