"""The machine: devices, collectives, clock, log, files, progress, and which attention is used."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import textwrap
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

import train_gpt as t


@pytest.fixture
def runtime(tiny: Callable[..., t.Hyperparameters], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator:
    """Makes runtimes of one process that work in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    made = []

    def make(launch: t.Launch | None = None, **overrides: object) -> t.Runtime:
        made.append(t.Runtime(tiny(**overrides), launch))
        return made[-1]

    yield make
    for file in (file for rt in made for file in rt.files):
        file.close()


# ---- devices and collectives -----------------------------------------------------------------------------------------


def test_with_one_process_a_collective_returns_its_argument(runtime: Callable) -> None:
    rt, tensor = runtime(), torch.arange(6.0).view(3, 2)
    assert rt.all_reduce(tensor) is tensor
    for collective in (rt.reduce_scatter, rt.all_gather):
        assert collective(tensor)() is tensor
    assert tensor.tolist() == [[0, 1], [2, 3], [4, 5]]
    # Times and byte counts pass through it: a float32 would turn 0.1 and 2^53 - 1 into other numbers.
    assert rt.broadcast_from_rank0(0.1) == 0.1 and rt.broadcast_from_rank0(2**53 - 1) == 2**53 - 1
    assert (rt.rank, rt.world_size, rt.device.type, rt.dtype) == (0, 1, "cpu", torch.float32)
    rt.close()
    assert not torch.distributed.is_initialized()


def test_functions_are_compiled_only_where_that_is_on(runtime: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: calls.append(options) or "compiled")
    assert runtime(compile="auto").compile(len) is len and runtime(compile="0").compile(len) is len and not calls
    rt = runtime(compile="1")
    monkeypatch.setattr(torch, "compile", lambda function, **options: calls.append(options) or (lambda x: (x, rt)))
    assert rt.compile(len)("x") == ("x", rt) and rt.compiler.called == "len"
    assert calls == [{"dynamic": False, "fullgraph": True}]  # a graph break or a new shape is an error, not a slow run


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB",
        "MPS backend out of memory (MPS allocated: 9.00 GB, other allocations: 1 KB)",
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_work_that_runs_out_of_memory_does_not_fit(runtime: Callable, message: str) -> None:
    def work() -> None:
        raise RuntimeError(message)

    rt = runtime()
    assert rt.fits(lambda: None) and not rt.fits(work)


def test_any_other_error_is_no_question_of_memory(runtime: Callable) -> None:
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory")):

        def work(error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error), match=str(error)):
            runtime().fits(work)


@pytest.mark.parametrize(
    ("settings", "costs", "dtype"),
    [
        ({"compile": "1"}, [0.5, 1.0], torch.bfloat16),
        ({"compile": "1"}, [0.9, 1.0], torch.float32),  # a small gain is not worth the rounding
        ({"compile": "1"}, [26.0, 1.0], torch.float32),  # emulated
        ({"compile": "0"}, [], torch.float32),  # nothing is tried
        ({"compile": "1", "dtype": "float32"}, [], torch.float32),
        ({"compile": "0", "dtype": "bfloat16"}, [], torch.bfloat16),
    ],
)
def test_a_cpu_takes_bfloat16_only_where_it_is_compiled_and_wins(
    runtime: Callable, monkeypatch: pytest.MonkeyPatch, settings: dict, costs: list[float], dtype: torch.dtype
) -> None:
    dtypes = []

    def milliseconds(_: t.Runtime, product: Callable) -> float:
        dtypes.append(product().dtype)
        return costs.pop(0)

    monkeypatch.setattr(t.Runtime, "milliseconds", milliseconds)
    rt = runtime(**settings)
    assert rt.dtype == dtype and not costs and not rt.has_kernels
    assert dtypes == ([torch.bfloat16, torch.float32] if "dtype" not in settings and rt.compiled else [])


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, (128, 128, 32)),  # passes of 4,096 tokens, at most 32 windows
        ({"train_seq_len": 256, "eval_seq_len": 512}, (16, 8, 8)),
        ({"train_seq_len": 8192, "eval_seq_len": 8192, "train_batch_tokens": 8192}, (1, 1, 1)),
        ({"micro_batch_tokens": 96, "eval_batch_seqs": 5}, (3, 3, 5)),
        ({"micro_batch_tokens": 1}, (1, 1, 32)),
        ({"ttt_chunk_tokens": 100}, (128, 128, 13)),  # no more windows than a chunk has, 8 targets each
        ({"ttt_chunk_tokens": 100, "ttt_enabled": False}, (128, 128, 32)),
    ],
)
def test_passes_on_a_cpu_are_small_unless_a_setting_says_how_large(
    runtime: Callable, settings: dict, rows: tuple[int, int, int]
) -> None:
    rt = runtime(**{"eval_batch_seqs": "auto", "ttt_chunk_tokens": 32_768, **settings})
    assert tuple(rt.max_rows[phase] for phase in ("training", "adaptation", "scoring")) == rows


def test_freed_memory_is_kept_unless_the_user_has_said_how(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(t.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *args: calls.append(args)))
    monkeypatch.setattr(sys, "platform", "linux")
    t.keep_freed_memory()
    assert calls == [(-4, 0), (-1, -1)]  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    t.keep_freed_memory()
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1")
    t.keep_freed_memory()
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setattr(sys, "platform", "win32")
    t.keep_freed_memory()
    assert len(calls) == 2
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(t.ctypes, "CDLL", lambda _: SimpleNamespace())  # another library than glibc
    t.keep_freed_memory()


def test_a_function_may_be_compiled_for_every_size_of_a_batch_that_is_halved(
    runtime: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    rt = runtime(compile="1", dtype="float32")
    double = rt.compile(lambda x: 2 * x)
    for rows in range(1, 20):
        assert double(torch.ones(rows)).sum() == 2 * rows
    assert len(rt.compiler.seconds) == 19
    rt.close()


def test_the_seed_fixes_the_generator(runtime: Callable) -> None:
    draws = [(runtime(seed=seed), torch.rand(4).tolist())[1] for seed in (5, 5, 6)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("num_cores", "num_processes", "given", "by_launcher", "chosen", "reason"),
    [
        (12, 1, "", False, [12], "12 cores of the machine"),
        (12, 3, "", False, [4], "12 cores of the machine, shared by 3 processes"),
        (2, 3, "", False, [1], "2 cores of the machine, shared by 3 processes"),
        (12, 1, "1", False, [], "OMP_NUM_THREADS=1"),  # the user's own choice, which torch reads itself
        (12, 3, "2", False, [], "OMP_NUM_THREADS=2"),
        (12, 3, "1", True, [4], "12 cores of the machine, shared by 3 processes"),  # torchrun's own doing
        (12, 3, "1", False, [], "OMP_NUM_THREADS=1"),  # the user has exported it before torchrun
        (12, 1, "4,2", False, [], "OMP_NUM_THREADS=4,2"),  # of nested regions
        (12, 1, "many", False, [12], "12 cores of the machine"),  # which libgomp ignores
        (12, 1, "0", False, [12], "12 cores of the machine"),
    ],
)
def test_the_processes_of_a_machine_share_its_cores(
    num_cores: int,
    num_processes: int,
    given: str,
    by_launcher: bool,
    chosen: list[int],
    reason: str,
    runtime: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(t, "core_limits", lambda: {"the machine": num_cores, "the affinity mask": num_cores})
    monkeypatch.setattr(t, "is_set_by_launcher", lambda _: by_launcher)
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    rt = runtime(t.Launch(local_world_size=num_processes))
    assert calls == chosen
    assert rt.describe().endswith(f"threads:{torch.get_num_threads()} ({reason})")
    # torch.compile's workers share them as well; its own default is up to 32 for each process.
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == str(max(1, num_cores // num_processes))


@pytest.mark.parametrize(
    ("files", "affinity", "count", "expected"),
    [
        ({}, {0, 1, 2}, 8, 3),  # taskset, or a scheduler's mask
        ({}, None, 8, 8),  # a Mac has no masks
        ({}, None, None, 1),
        ({"cpu.max": "400000 100000\n"}, set(range(64)), 64, 4),
        ({"cpu.max": "150000 100000\n"}, set(range(64)), 64, 2),  # 1.5 cores
        ({"cpu.max": "400000 100000\n"}, {0, 1}, 64, 2),
        ({"cpu.max": "max 100000\n"}, set(range(64)), 64, 64),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, set(range(64)), 64, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, set(range(64)), 64, 64),
        ({"cpu.max": "nonsense\n"}, {0, 1}, 64, 2),
        ({"cpu.max": "400000 0\n"}, {0, 1}, 64, 2),
        ({"cpu.max": "10000 100000\n"}, set(range(64)), 64, 1),  # a tenth of a core
        # Without a namespace of its own, a process sees its group by its whole path; those around it have limits, too.
        ({"own": "0::/a/b\n", "a/b/cpu.max": "300000 100000\n"}, set(range(64)), 64, 3),
        ({"own": "0::/a/b\n", "a/b/cpu.max": "max 100000\n", "a/cpu.max": "500000 100000\n"}, None, 64, 5),
        ({"own": "0::/a\n", "a/cpu.max": "300000 100000\n", "cpu.max": "200000 100000\n"}, None, 64, 2),
        ({"own": "0::/a\n", "b/cpu.max": "100000 100000\n"}, None, 64, 64),  # of a neighbour
        (
            {
                "own": "1:cpu,cpuacct:/a\n",
                "cpu,cpuacct/a/cpu.cfs_quota_us": "700000",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000",
            },
            None,
            64,
            7,
        ),
        ({"own": "3:memory:/a\n0::/a\n", "unified/a/cpu.max": "600000 100000\n"}, None, 64, 6),  # both versions
        ({"own": "no lines of\nthis form\n"}, None, 64, 64),
    ],
)
def test_the_cores_of_a_process_are_those_of_its_mask_and_its_containers_quota(
    files: dict, affinity: set | None, count: int | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(t, "CGROUPS", tmp_path)
    monkeypatch.setattr(t, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    if affinity is None:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    else:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: affinity, raising=False)
    assert t.available_cores() == expected


def test_mix_order_reductions_are_off_unless_the_user_turns_them_on(
    runtime: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "TORCHINDUCTOR_MIX_ORDER_REDUCTION"
    monkeypatch.delenv(name, raising=False)
    runtime()
    assert os.environ[name] == "0"
    monkeypatch.setenv(name, "1")
    runtime()
    assert os.environ[name] == "1"


def test_what_is_compiled_is_timed_and_named_and_after_the_preflight_a_warning(
    runtime: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a real compilation, of functions whose shapes change, and of a gradient."""
    torch.compiler.reset()
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="aot_eager", **options))
    monkeypatch.setattr(t, "SLOW_COMPILE_SECONDS", 0.0)
    rt = runtime(compile="1")
    rt.open_log(Path("logs/compiled"))
    handler = sys.modules["torch._dynamo.callback"].callback_handler

    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    doubled = rt.compile(double)
    for length in (3, 3, 4):
        doubled(torch.ones(length))
    x = torch.ones(3, requires_grad=True)
    doubled(x).sum().backward()
    rt.compiler.preflight_is_over = True
    doubled(torch.ones(4))
    assert rt.compiler.num_late == 0
    doubled(torch.ones(5))
    assert rt.compiler.num_late == 1
    rt.compiler.close()
    doubled(torch.ones(6))  # of another run
    assert rt.compiler.num_late == 1 and not handler.start_callbacks and not handler.end_callbacks
    events = [json.loads(line) for line in (rt.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [event["after_preflight"] for event in events] == [False] * (len(events) - 1) + [True]
    assert len(events) == len(rt.compiler.seconds) >= 4  # lengths 3, 4, 3 with a gradient, 5
    lines = (rt.run_dir / "train.log").read_text().splitlines()
    assert lines[0].startswith(f"compiled {double.__qualname__} in ") and lines[0].endswith("s")
    assert lines[-1].startswith(f"WARNING: {double.__qualname__} was compiled after the preflight, in ")
    assert sum(event["seconds"] for event in events) == sum(rt.compiler.seconds) > 0


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


def add_into(total: torch.Tensor) -> Callable[..., None]:
    """Returns a function that works in place, and cannot be recorded if it looks at a value."""

    def add(values: torch.Tensor, factor: float | torch.Tensor) -> None:
        total.add_(values.sum() * factor)

    return add


def test_work_warms_up_is_recorded_and_then_replayed_on_new_values(runtime: Callable) -> None:
    rt, total, graphs = runtime(), torch.zeros(()), []

    def record_graph(work: Callable) -> Callable:
        graphs.append([0])
        return lambda graph=graphs[-1]: (graph.append(graph.pop() + 1), work())[1]

    rt.has_graphs = rt.records_graphs = True
    rt.record_graph = record_graph
    cache, add, expected = t.GraphCache(rt, "adding"), add_into(total), 0.0
    for i, length in enumerate([3, 3, 3, 2, 3, 2, 2]):
        cache.run(add, torch.full((length,), i + 1.0), 0.5 * i)
        expected += length * (i + 1.0) * 0.5 * i
        assert total.item() == expected
    # Of each shape, the first call is the warm-up, the second is recorded and replayed.
    assert graphs == [[3], [2]]
    for _ in range(2):
        cache.run(lambda values, factor: total.fill_(factor), torch.ones(2), factor=7.0)
    assert total.item() == 7.0 and len(graphs) == 3, "another function, another graph"


def test_an_argument_of_recorded_work_may_change_afterwards(runtime: Callable) -> None:
    rt, seen = runtime(), []
    rt.has_graphs = rt.records_graphs = True
    rt.record_graph = lambda work: work
    cache, values = t.GraphCache(rt, "looking"), torch.ones(2)
    for _ in range(3):
        cache.run(lambda values: seen.append(values), values)
    assert len({tensor.data_ptr() for tensor in seen}) == 1, "the place is always the same"
    assert seen[0].data_ptr() != values.data_ptr()


@pytest.mark.parametrize("rank", [0, 1])
def test_where_a_graph_cannot_be_recorded_a_warning_says_so_once_and_the_work_is_done(
    runtime: Callable, capsys: pytest.CaptureFixture, rank: int
) -> None:
    rt, total = runtime(), torch.zeros(())

    def fail(work: Callable) -> Callable:
        work()  # what a real capture does not carry out: it must not count
        total.sub_(total)
        raise RuntimeError("operation not permitted when stream is capturing\nmore about it")

    rt.rank, rt.record_graph = rank, fail
    rt.has_graphs = rt.records_graphs = True
    cache, add = t.GraphCache(rt, "adding"), add_into(total)
    for factor in (1.0, 2.0, 3.0):
        cache.run(add, torch.ones(3), factor)
    assert total.item() == 6.0 + 9.0
    out, err = capsys.readouterr()
    (line,) = (out + err).splitlines()
    prefix = "WARNING: " if rank == 0 else "rank 1: WARNING: "
    assert line == f"{prefix}adding is not replayed as a CUDA graph and so takes longer: " + (
        "operation not permitted when stream is capturing"
    )
    assert (out == "") == (rank == 1), "rank 0 has the log, the others their standard error"


def test_without_graphs_the_arguments_are_tensors_all_the_same(runtime: Callable) -> None:
    """So that the arithmetic does not depend on whether a graph could be recorded."""
    rt, total, seen = runtime(), torch.zeros(()), []
    rt.record_graph = None  # not called

    def add(values: torch.Tensor, factor: float | torch.Tensor) -> None:
        seen.append(factor)
        total.add_(values.sum() * factor)

    for records_graphs, records in ((False, True), (True, False)):
        rt.has_graphs, rt.records_graphs = True, records_graphs
        cache = t.GraphCache(rt, "adding", records)
        for factor in range(3):
            cache.run(add, torch.ones(2), factor)
    assert total.item() == 2 * (0 + 2 + 4)
    assert all(isinstance(factor, torch.Tensor) for factor in seen)
    rt.has_graphs = False
    cache.run(add, torch.ones(2), 5)
    assert seen[-1] == 5 and total.item() == 22.0, "on a CPU an argument is what it was"


def test_what_is_only_tried_for_its_memory_is_not_recorded_but_is_later(runtime: Callable) -> None:
    rt, total, recorded = runtime(), torch.zeros(()), []
    rt.has_graphs = rt.records_graphs = True
    rt.record_graph = lambda work: recorded.append(work) or work
    cache, add = t.GraphCache(rt, "adding"), add_into(total)
    for _ in range(3):
        assert rt.fits(lambda: cache.run(add, torch.ones(1), 1.0))
    assert not recorded and rt.records_graphs
    cache.run(add, torch.ones(1), 1.0)
    assert len(recorded) == 1 and total.item() == 4.0


def test_nothing_of_the_object_whose_work_is_recorded_is_held(runtime: Callable) -> None:
    """A cycle would keep a text's scores, and on a GPU its graph's memory, until Python looks for cycles."""
    rt = runtime()

    class Worker:
        def __init__(self) -> None:
            self.graphs = t.GraphCache(rt, "work")

        def work(self, values: torch.Tensor) -> None:
            values.add_(1)

    for records in (False, True):
        rt.has_graphs, rt.records_graphs, rt.record_graph = True, records, lambda work: lambda: None
        worker = Worker()
        for _ in range(3):
            worker.graphs.run(worker.work, torch.ones(1))
        gone = weakref.ref(worker)
        del worker
        assert gone() is None


def test_the_pace_is_the_time_of_one_call_on_the_slowest_rank(
    runtime: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    rt, now, calls = runtime(), [100.0], []
    rt.now = lambda: now[0]
    rt.least = lambda number: min(number, -7.0)  # another rank took 7 s

    def work() -> None:
        calls.append(None)
        now[0] += 5.0

    assert rt.pace(work) == 7.0 and len(calls) == 1
    rt.least = lambda number: number
    assert rt.pace(work) == 5.0
    rt.device = torch.device("cuda")  # two calls, the recording and the first replay, are not timed
    calls.clear()
    assert rt.pace(work) == 5.0 and len(calls) == 12


def test_an_array_arrives_as_int64_with_the_same_values(runtime: Callable) -> None:
    array = np.array([[0, 1023], [65_535, 7]], dtype=np.int32)
    tensor = runtime().to_device(array)
    assert tensor.dtype == torch.int64 and tensor.tolist() == array.tolist()


def test_the_host_waits_for_the_number_before_the_last_only(runtime: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with its events replaced: waiting for the last one would drain the device in every step."""
    waited, recorded, empty = [], [], torch.empty

    def record_event() -> SimpleNamespace:
        recorded.append(len(recorded))
        return SimpleNamespace(synchronize=lambda number=recorded[-1]: waited.append(number))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(record_event=record_event))
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory, **kwargs: empty(*args, **kwargs))
    rt = runtime()
    rt.lag = 1
    numbers = [rt.lagged_list(torch.tensor([float(step), 7.0])) for step in range(4)]
    assert numbers == [None, [0.0, 7.0], [1.0, 7.0], [2.0, 7.0]]
    assert recorded == [0, 1, 2, 3] and waited == [0, 1, 2]


def test_on_a_cpu_the_followed_number_is_the_one_just_queued(runtime: Callable) -> None:
    rt = runtime()
    assert rt.lag == 0 and [rt.lagged_list(torch.tensor([x])) for x in (1.5, 2.5)] == [[1.5], [2.5]]


@pytest.mark.parametrize(
    ("cuda", "mps", "picked"),
    [(True, True, "cuda:1"), (True, False, "cuda:1"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_picks_the_first_device_that_is_there(
    cuda: bool, mps: bool, picked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    device = t.Runtime._pick_device(SimpleNamespace(local_rank=1, world_size=1), "auto")
    assert str(device) == picked and chosen == ([1] if cuda else [])
    assert (
        str(t.Runtime._pick_device(SimpleNamespace(local_rank=1, world_size=1), "cpu")) == "cpu"
    )  # what is asked for is taken


@pytest.mark.parametrize(
    ("device", "num_gpus", "local_rank"), [("cuda", 0, 0), ("mps", 0, 0), ("cuda", 1, 1), ("auto", 2, 7)]
)
def test_a_device_that_is_not_there_is_an_error_that_names_it(
    device: str, num_gpus: int, local_rank: int, runtime: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    name = "cuda" if device == "auto" else device
    with pytest.raises(t.UserError, match=f"DEVICE={name} is not available for process {local_rank}.*nproc_per_node"):
        runtime(t.Launch(local_rank=local_rank, local_world_size=8), device=device)


RANK_SCRIPT = """
    import json, sys, time
    from pathlib import Path

    import torch

    root, tiny, out = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    sys.path.insert(0, root)
    import train_gpt as t

    rt = t.Runtime(t.Hyperparameters(**tiny))
    rank = rt.rank
    x = torch.arange(8.0).view(4, 2) * 10**rank
    reduced = rt.all_reduce(total := x.clone())
    stack = torch.arange(12.0).view(4, 3) * 10**rank
    wide = torch.arange(6.0).view(3, 2) + 100 * rank

    def too_much_for_rank_1():
        if rank:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    result = {
        "in_place": reduced is total,
        "all_reduce": reduced.tolist(),
        "reduce_scatter": rt.reduce_scatter(stack)().tolist(),
        "all_gather": rt.all_gather(wide)().tolist(),
        "all_gather_transposed": rt.all_gather(wide.T)().tolist(),  # not contiguous
        "int64": rt.all_reduce(torch.tensor([2**40 + rank])).tolist(),
        "broadcast_from_rank0": rt.broadcast_from_rank0(0.1 + rank),
        "least": rt.least(2.3 - rank),
        "fits": [rt.fits(lambda: None), rt.fits(too_much_for_rank_1)],
        "seed": torch.initial_seed(),
        "threads": torch.get_num_threads(),
    }
    rt.dtype = torch.bfloat16  # as on a GPU
    torch.manual_seed(rank)
    values = torch.randn(4, 1000)
    part, gathered = rt.reduce_scatter(values)(), rt.all_gather(values.bfloat16())()
    result["bfloat16"] = [values.tolist(), part.tolist(), gathered.float().tolist(), str(part.dtype)]
    if rank:
        real = time.time
        time.time = lambda: real() + 3600  # a clock that is wrong, as on another machine
    journal = t.Journal(t.Hyperparameters(**tiny), rt)
    rt.open_log(journal.folder)
    result["run_dir"] = str(rt.run_dir)
    rt.log(f"said by {rank}")
    rt.record("event", by=rank)
    result["from_rank0"] = rt.on_rank0(lambda: bytes([rank, 7])).hex() + rt.on_rank0(bytes).hex()
    try:
        rt.on_rank0(lambda: t.find_run(t.Hyperparameters(**tiny, run_id=rt.run_dir.name)))
    except t.UserError as error:
        result["refused"] = str(error)
    torch.optim.AdamW([torch.nn.Parameter(x)])  # imports parts of torch that bind the process group if it exists
    rt.close()
    assert not torch.distributed.is_initialized()
    tasks = Path("/proc/self/task")
    result["threads_left"] = [f.read_text().strip() for f in tasks.glob("*/comm")] if tasks.exists() else None
    (out / f"rank{rank}.json").write_text(json.dumps(result))
"""


@pytest.fixture(scope="session")
def two_ranks(once: Callable) -> SimpleNamespace:
    """What two real processes, started by torchrun on gloo, found."""

    def fill(folder: Path) -> None:
        script = folder / "rank.py"
        script.write_text(textwrap.dedent(RANK_SCRIPT))
        (folder / "runs").mkdir()
        knobs = t.Hyperparameters.knobs()
        # Nobody has set a number of threads: torchrun sets one itself.
        environment = {n: v for n, v in os.environ.items() if n.lower() not in knobs and n != "OMP_NUM_THREADS"}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = subprocess.run(
            [*launcher, str(script), str(ROOT), json.dumps(TINY), str(folder)],
            env=environment,
            cwd=folder / "runs",
            text=True,
            capture_output=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / "stdout.txt").write_text(done.stdout)

    folder = once("two-ranks", fill)
    results = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return SimpleNamespace(folder=folder / "runs", results=results, stdout=(folder / "stdout.txt").read_text())


def test_collectives_of_two_processes_sum_scatter_gather_and_agree(two_ranks: SimpleNamespace) -> None:
    # All sums are of whole numbers below 2^24, exact in float32: no tolerance.
    stack = np.arange(12.0).reshape(4, 3) * 11
    parts = [np.arange(6.0).reshape(3, 2) + 100 * rank for rank in range(2)]
    for rank, result in enumerate(two_ranks.results):
        assert result["in_place"]
        assert result["all_reduce"] == (np.arange(8.0).reshape(4, 2) * 11).tolist()
        assert result["reduce_scatter"] == stack[2 * rank : 2 * rank + 2].tolist()
        assert result["all_gather"] == np.concatenate(parts).tolist()
        assert result["all_gather_transposed"] == np.concatenate([part.T for part in parts]).tolist()
        assert result["int64"] == [2**41 + 1]
        assert result["broadcast_from_rank0"] == 0.1  # rank 0's, in float64
        assert result["from_rank0"] == "0007"
        assert result["least"] == 2.3 - 1
        assert result["fits"] == [True, False]  # what is too much for one is for all
        assert result["seed"] == t.Hyperparameters.seed
        # torchrun sets OMP_NUM_THREADS=1; the processes of a machine share its cores instead.
        assert result["threads"] == max(1, os.cpu_count() // 2)


def test_in_bfloat16_a_contribution_is_rounded_once_and_the_sum_is_fp32(two_ranks: SimpleNamespace) -> None:
    values = [torch.tensor(result["bfloat16"][0]) for result in two_ranks.results]
    rounded = [x.bfloat16().float() for x in values]
    for rank, result in enumerate(two_ranks.results):
        _, part, gathered, dtype = result["bfloat16"]
        own = slice(2 * rank, 2 * rank + 2)
        assert dtype == "torch.float32"
        assert torch.equal(torch.tensor(part), (rounded[0] + rounded[1])[own])  # to the last bit
        assert torch.equal(torch.tensor(gathered), torch.cat(rounded))
        exact = (values[0].double() + values[1].double())[own]
        error = torch.tensor(part).double() - exact
        # A rounding to 8 bits is off by at most 2^-8 of each value, so what changes is rounding and nothing else.
        assert (error.abs() <= 2**-8 * (values[0].abs() + values[1].abs())[own] + 1e-6).all()
        assert error.abs().max() > 0


def test_no_thread_of_the_process_group_outlives_it(two_ranks: SimpleNamespace) -> None:
    """One that does may need the interpreter while that is torn down: 2 of some 40 runs, all work done, aborted."""
    for result in two_ranks.results:
        if result["threads_left"] is None:
            pytest.skip("this system does not list the threads of a process")
        assert not [name for name in result["threads_left"] if "gloo" in name]


def test_two_processes_share_one_run_folder_in_which_rank_0_writes(two_ranks: SimpleNamespace) -> None:
    (folder,) = (two_ranks.folder / "logs").iterdir()
    assert [result["run_dir"] for result in two_ranks.results] == [f"logs/{folder.name}"] * 2
    assert (folder / "train.log").read_text() == "said by 0\n" and two_ranks.stdout == "said by 0\n"
    event = json.loads((folder / "metrics.jsonl").read_text())
    assert event.pop("time") > 0 and event == {"event": "event", "by": 0}
    for result in two_ranks.results:  # all ranks stop, or those left over would wait for the others
        assert result["refused"].startswith(f"logs/{folder.name} exists already")


# ---- log, files, progress --------------------------------------------------------------------------------------------


def test_a_run_has_a_folder_with_its_log_and_its_metrics(runtime: Callable, capsys: pytest.CaptureFixture) -> None:
    rt = runtime()
    rt.log("before the folder")
    rt.record("before", value=1)
    rt.open_log(Path("logs/first"))
    rt.log("step:1/2 a — line")
    rt.record("eval", stage="raw", val_bpb=1.25)
    assert rt.run_dir == Path("logs/first")
    assert sorted(path.name for path in rt.run_dir.iterdir()) == ["metrics.jsonl", "train.log"]
    # Read while the run goes on: each line is there at once.
    assert (rt.run_dir / "train.log").read_text(encoding="utf-8") == "step:1/2 a — line\n"
    lines = [json.loads(line) for line in (rt.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert abs(lines[0].pop("time") - time.time()) < 60
    assert lines == [{"event": "eval", "stage": "raw", "val_bpb": 1.25}]
    assert capsys.readouterr().out == "before the folder\nstep:1/2 a — line\n"


class Interrupted(BaseException):
    """Ctrl-C, or a full disk, at the worst moment."""


@pytest.mark.parametrize("moment", ["writing", "replacing", "never"])
def test_a_file_is_the_old_one_or_all_of_the_new_one(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, old, new = tmp_path / "final_model.bin", b"old" * 100, b"new" * 5000
    path.write_bytes(old)
    fsync, replace = os.fsync, os.replace
    seen = []

    def sync(number: int) -> None:
        seen.append(path.read_bytes())
        if moment == "writing":
            raise Interrupted
        fsync(number)

    def refuse(source: Any, target: Any) -> None:
        seen.append(path.read_bytes())
        assert Path(source).read_bytes() == new and Path(source).parent == path.parent  # a rename, no copy
        if moment == "replacing":
            raise Interrupted
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", refuse)
    if moment == "never":
        t.write_atomically(path, new[:7], new[7:])
        assert path.read_bytes() == new and list(tmp_path.iterdir()) == [path]
    else:
        with pytest.raises(Interrupted):
            t.write_atomically(path, new)
        assert path.read_bytes() == old
    assert seen[0] == old and set(seen[:2]) == {old}  # at no moment before it is whole and on the disk


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that is set by hand."""
    times = [1000.0]
    monkeypatch.setattr("time.perf_counter", lambda: times[0])
    return lambda seconds: times.__setitem__(0, 1000.0 + seconds)


def test_progress_is_a_line_with_rate_elapsed_and_time_left(clock: Callable) -> None:
    lines: list[str] = []
    events: list[dict[str, Any]] = []
    rt = SimpleNamespace(rank=0, log=lines.append, record=lambda event, **fields: events.append(fields))
    progress = t.Progress(rt, "scoring", 10_000, "tok")
    for seconds, amount in ((10, 400), (15, 100), (20, 1500), (34, 500), (40, 2500), (100, 5000)):
        clock(seconds)
        progress.advance(amount)
    assert lines == [
        "scoring: 2,000/10,000 100.0 tok/s elapsed:20s left:80s",  # not at 15 s: more has to pass
        "scoring: 5,000/10,000 125.0 tok/s elapsed:40s left:40s",  # 20 s after the line before it, not at 34 s
    ]  # and none at the end, which has lines of its own
    assert events[0] == {"label": "scoring", "done": 2000, "total": 10_000, "seconds": 20} and len(events) == 2


def test_several_processes_do_not_share_an_apple_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert str(t.Runtime._pick_device(SimpleNamespace(local_rank=0, world_size=2), "auto")) == "cpu"
    with pytest.raises(t.UserError, match="DEVICE=mps"):
        t.Runtime._pick_device(SimpleNamespace(local_rank=0, world_size=2), "mps")


def test_a_missing_package_is_an_error_that_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(t.UserError, match="package zstandard is missing: `pip install zstandard`, or else"):
        t.require("zstandard", "or else")
    assert t.require("json", "it is there") is json
