"""Work on many items in several processes, with results in order, bounded memory, and an end that never waits; and how
many processes there is room for.

The standard library's executors were tried first. Interrupted at the wrong moment they wait for ever (one in ten tries
on CPython 3.11): queues and locks are shared, and their owner may be gone. Here each process has a pipe of its own."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from shards import DataError

AHEAD = 4  # items a process that may be under way, or wait for an earlier one's result
END = object()
CGROUPS = Path("/sys/fs/cgroup")  # where Linux tells what control groups may use,
OWN_CGROUPS = Path("/proc/self/cgroup")  # and which ones are this process's


# ---- the cores that there are: by the rule of section 2 of train_gpt.py, whose import takes seconds ------------------


def core_limits() -> dict[str, int]:
    """Returns how many cores this process may use, by what says so: the machine, its affinity mask, and the quotas of
    its control groups and of those around them, of version 1 or 2."""
    limits = {"the machine": os.cpu_count() or 1}
    if hasattr(os, "sched_getaffinity"):
        limits["the affinity mask"] = len(os.sched_getaffinity(0))
    quotas = list(filter(None, map(cpu_quota, cgroup_folders())))
    if quotas:
        limits["the control group's quota"] = math.ceil(min(quotas))
    return limits


def cgroup_folders() -> set[Path]:
    """Returns the folders in which this process's control groups, and those around them, may have a CPU quota."""
    folders = {CGROUPS, CGROUPS / "cpu"}  # all that is seen of them in most containers
    lines = ""
    with contextlib.suppress(OSError):
        lines = OWN_CGROUPS.read_text(errors="replace")
    for line in lines.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        mounts = []
        if not controllers:  # version 2
            mounts = [CGROUPS, CGROUPS / "unified"]
        elif "cpu" in controllers.split(","):
            mounts = [CGROUPS / "cpu", CGROUPS / controllers]
        for mount in mounts:
            own = mount / group.strip("/")
            folders |= {own, *own.parents}
    return folders


def cpu_quota(folder: Path) -> float:
    """Returns the cores that a control group may use at a time; 0 where it has no limit, or says none."""
    version_1 = [folder / f"cpu.cfs_{name}_us" for name in ("quota", "period")]
    for paths in ([folder / "cpu.max"], version_1):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # no limit is max, or -1
            quota, period = " ".join(path.read_text() for path in paths).split()
            return max(0.0, int(quota) / int(period))
    return 0.0


def available_cores() -> tuple[int, str]:
    """Returns the number of cores that this process may use, and which of `core_limits` it is."""
    limits = core_limits()
    tightest = min(limits, key=limits.__getitem__)
    return limits[tightest], tightest


# ---- the processes ---------------------------------------------------------------------------------------------------


def in_order(make: Callable[[], Any], method: str, items: Iterable[Any], jobs: int) -> Iterator[Any]:
    """Yields `make().<method>(item)` of all items in their order. With more than one job `make` runs once in each
    process; with one, here. A DataError in a process is raised here; so is one if a process ends on its own."""
    if jobs == 1:
        yield from map(getattr(make(), method), items)
        return
    with started(make, method, jobs) as idle:
        items, busy, done, num_sent, num_yielded, more = iter(items), [], {}, 0, 0, True
        while more or busy:
            while more and idle and num_sent - num_yielded < AHEAD * jobs:
                if more := (item := next(items, END)) is not END:
                    busy.append(idle.pop())
                    with ends_as_errors(jobs):
                        busy[-1].send((num_sent, item))
                    num_sent += 1
            for connection in multiprocessing.connection.wait(busy) if busy else ():
                number, done[number] = receive(connection, jobs)
                busy.remove(connection)
                idle.append(connection)
            while num_yielded in done:
                yield done.pop(num_yielded)
                num_yielded += 1


@contextlib.contextmanager
def started(make: Callable[[], Any], method: str, jobs: int) -> Iterator[list[Any]]:
    """Yields connections to processes that are ready to work; they are gone after the block, however it ends."""
    context, processes, connections = multiprocessing.get_context("spawn"), [], []
    try:
        for _ in range(jobs):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, make, method), daemon=True)
            with interrupts_held_back():
                process.start()
                processes.append(process)
            theirs.close()
            connections.append(ours)
        yield list(connections)
    finally:
        for process in processes:
            process.terminate()
            process.join()
        for connection in connections:
            connection.close()


def serve(connection: Any, make: Callable[[], Any], method: str) -> None:
    """Answers a connection until its other end is closed."""
    with contextlib.suppress(EOFError, OSError):
        work = None
        while True:
            number, item = connection.recv()
            try:
                work = work or getattr(make(), method)
                answer = work(item)
            except (DataError, OSError) as error:  # any other is a mistake of ours: it is seen, and the process ends
                answer = DataError(str(error))
            connection.send((number, answer))


def receive(connection: Any, jobs: int) -> tuple[int, Any]:
    """Returns the number and the result that a process sends; raises the DataError that it sends instead."""
    with ends_as_errors(jobs):
        number, result = connection.recv()
    if isinstance(result, DataError):
        raise result
    return number, result


@contextlib.contextmanager
def ends_as_errors(jobs: int) -> Iterator[None]:
    """Raises a DataError where the process at the other end of a pipe is gone."""
    try:
        yield
    except (EOFError, OSError):
        raise DataError(f"a process ended, for want of memory perhaps: try fewer than --jobs {jobs}") from None


@contextlib.contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Starts processes that Ctrl-C does not reach: it is the parent's concern, which hears of it after the block."""
    multiprocessing.resource_tracker.ensure_running()  # its start would end the mask
    heard: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))  # other threads have no mask
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # what is started here inherits it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if heard and handler != signal.SIG_IGN:  # as it is for what a shell starts in the background
        raise KeyboardInterrupt
