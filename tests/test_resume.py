"""A run that was stopped goes on: the state of a training, the journal, and what finds and refuses a run."""

from __future__ import annotations

import concurrent.futures
import json
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_gpt as t

EVERYTHING = {"swa_enabled": True, "swa_every": 1, "swa_start_frac": 1.0, "iterations": 7, "max_wallclock_seconds": 0.0}


@pytest.fixture(autouse=True)
def in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


# ------------------------------------------------------------------------------------------ the state of a training
def train(run: t.Run, stop_after: int = 0) -> tuple[dict[int, float], dict | None]:
    """Trains, and returns the losses by step, and the stats, or None where a signal came during step `stop_after`."""
    losses, step = {}, t.Trainer.step
    readings = run.rt.readings

    def read(started: float) -> tuple[float, int]:
        is_time = stop_after and len(losses) == stop_after
        return readings(started)[0], int(signal.SIGTERM) if is_time else 0

    def spy(self: t.Trainer, lr_scale: float, batch: list) -> torch.Tensor:
        loss = step(self, lr_scale, batch)
        losses[self.num_steps] = loss.item()
        return loss

    run.rt.readings = read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.Trainer, "step", spy)
        try:
            return losses, t.train(run)
        except t.Stopped as stopped:
            assert stopped.number == signal.SIGTERM and stop_after
            return losses, None


@pytest.mark.parametrize(
    "settings",
    [{}, {"ema_enabled": False}, {"value_residual": True, "loader": "sequential"}, {"recur_layers": "1"}],
)
@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_a_training_that_was_stopped_goes_on_to_the_last_bit(
    make_run: Callable, settings: dict, stop_after: int
) -> None:
    whole = make_run(**EVERYTHING, **settings)
    expected, _ = train(whole)
    first, second = make_run(**EVERYTHING, **settings), make_run(**EVERYTHING, **settings)
    second.rt.run_dir = first.rt.run_dir
    before, stats = train(first, stop_after)
    assert stats is None
    torch.manual_seed(99)
    after, stats = train(second)
    assert sorted(before) + sorted(after) == sorted(expected) and before | after == expected
    assert stats["steps"] == 7 and stats["train_segments"] == 1 + (stop_after < 7)
    for one, other in zip(whole.model.parameters(), second.model.parameters()):
        assert torch.equal(one, other)
    names = ("checkpoint.bin",)
    assert [(whole.rt.run_dir / n).read_bytes() for n in names] == [(second.rt.run_dir / n).read_bytes() for n in names]


def test_recurrence_goes_on_or_begins_in_a_training_that_goes_on(make_run: Callable) -> None:
    """It begins after 4 of 7 steps. Whichever part of the run takes the fifth step says so, and no other."""
    settings = {**EVERYTHING, "recur_layers": "1", "val_loss_every": 0}
    for stop_after, lines in ((3, [0, 1]), (4, [0, 1]), (5, [1, 0])):
        first, second = make_run(**settings), make_run(**settings)
        second.rt.run_dir = first.rt.run_dir
        told = []
        for run, stop in ((first, stop_after), (second, 0)):
            events: list[str] = []
            run.rt.record = lambda event, events=events, **fields: events.append(event)
            train(run, stop)
            told.append(events.count("recurrence"))
        assert told == lines, stop_after


def test_a_signal_after_the_last_step_ends_the_run_before_the_export(make_run: Callable) -> None:
    first, second = make_run(**EVERYTHING), make_run(**EVERYTHING)
    second.rt.run_dir = first.rt.run_dir
    readings = first.rt.readings
    last = 0.0  # of what the clock is read from, after the last step
    first.rt.readings = lambda started: (readings(started)[0], int(signal.SIGTERM) if started == last else 0)
    with pytest.raises(t.Stopped):
        t.train(first)
    losses, stats = train(second)
    assert not losses and stats["steps"] == 7 and stats["train_segments"] == 1


def test_the_clock_goes_on_from_what_was_spent(make_run: Callable) -> None:
    first, second = make_run(**EVERYTHING), make_run(**EVERYTHING)
    second.rt.run_dir = first.rt.run_dir
    clock = iter([10.0, 11.0, 12.0])
    first.rt.readings = lambda started: (next(clock), 0)
    with pytest.raises(StopIteration):
        train_with_checkpoints(first)
    wait_until((first.rt.run_dir / "checkpoint-3.bin").exists)
    trainer = t.Trainer(second)
    t.Checkpoints(trainer).restore()
    assert (trainer.num_steps, trainer.elapsed, trainer.settled, trainer.step_seconds) == (3, 12.0, 11.0, 1.0)
    trainer.start_clock()
    trainer.tick()
    assert 12.0 <= trainer.elapsed < 13.0


def train_with_checkpoints(run: t.Run) -> None:
    """Trains with a checkpoint after every step."""
    run.h.checkpoint_every = 1e-9
    t.train(run)


def test_random_numbers_go_on_where_they_were(make_run: Callable) -> None:
    first, second = make_run(), make_run()
    second.rt.run_dir = first.rt.run_dir
    trainer = t.Trainer(first)
    checkpoints = t.Checkpoints(trainer)
    checkpoints.save()
    checkpoints.wait()
    expected = torch.rand(5)
    torch.rand(100)
    t.Checkpoints(t.Trainer(second)).restore()
    assert torch.equal(torch.rand(5), expected)


def test_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over_aloud(
    make_run: Callable, capsys: pytest.CaptureFixture
) -> None:
    run = make_run(**EVERYTHING)
    train(run)
    whole = (run.rt.run_dir / "checkpoint.bin").read_bytes()
    first, second = make_run(**EVERYTHING), make_run(**EVERYTHING)
    first.h.checkpoint_every = 1e-9
    train(first, stop_after=5)
    folder = second.rt.run_dir = first.rt.run_dir
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-4.bin", "checkpoint-5.bin"]
    newest = folder / "checkpoint-5.bin"
    blob = bytearray(newest.read_bytes())
    blob[len(blob) // 2] ^= 1
    newest.write_bytes(blob)
    (folder / "checkpoint-x.bin").write_bytes(b"not one of ours")
    capsys.readouterr()
    losses, _ = train(second)
    said = capsys.readouterr().out
    assert "WARNING" in said and "checkpoint-5.bin is truncated or damaged" in said
    assert sorted(losses) == [5, 6, 7] and (folder / "checkpoint.bin").read_bytes() == whole


def test_a_checkpoint_that_cannot_be_written_is_a_warning_and_leaves_no_half_file(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = make_run(**EVERYTHING, checkpoint_every=1e-9)
    fsync = os.fsync
    full = [True] * 3

    def sync(number: int) -> None:
        if full and full.pop():
            raise OSError(28, "No space left on device")
        fsync(number)

    monkeypatch.setattr(os, "fsync", sync)
    _, stats = train(run)
    said = capsys.readouterr().out
    assert said.count("WARNING: the checkpoint after step") == 3 and "No space left on device" in said
    assert stats["steps"] == 7 and not list(run.rt.run_dir.glob("*.tmp"))


def test_a_step_waits_for_the_copy_and_not_for_the_disk(make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    checkpoints = t.Checkpoints(t.Trainer(run))
    may_write, writes = threading.Event(), []

    def write(path: Path, *pieces: bytes) -> None:
        assert may_write.wait(60)
        writes.append(path.name)

    monkeypatch.setattr(t, "write_atomically", write)
    checkpoints.save()
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.zero_()  # the next step
    assert not writes and all(copied.any() for copied in checkpoints.copies[:3])
    may_write.set()
    checkpoints.wait()
    assert writes == ["checkpoint-0.bin"]


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_a_state_is_whole_and_taken_over_by_any_number_of_processes(make_run: Callable, world_size: int) -> None:
    run = make_run(**EVERYTHING)
    trainer = t.Trainer(run)
    for _ in range(2):
        trainer.step(1.0, t.random_batch(run))
    numbers, tensors = trainer.state()
    parts = []
    for rank in range(world_size):
        run.rt.rank, run.rt.world_size = rank, world_size
        other = t.Trainer(run)
        other.load_state(numbers, [tensor.clone() for tensor in tensors])
        parts.append(other.optimizer)
    run.rt.rank, run.rt.world_size = 0, 1
    for index, group in enumerate(trainer.optimizer.saved_groups):
        joined = torch.cat([optimizer.saved_groups[index].momentum for optimizer in parts])
        assert torch.equal(joined[: len(group.momentum)], group.momentum) and group.momentum.any()
        assert not joined[len(group.momentum) :].any()  # padding
    for parameter in trainer.optimizer.replicated:
        own = trainer.optimizer.adamw.state[parameter]
        for optimizer in parts:
            theirs = optimizer.adamw.state[parameter]
            assert own["step"] == theirs["step"] == 2
            assert all(torch.equal(own[name], theirs[name]) for name in ("exp_avg", "exp_avg_sq"))


# -------------------------------------------------------------------------------------------------------- the journal
OPEN: dict[Path, t.Journal] = {}  # by the run's folder


def begin(make_run: Callable, **settings: object) -> tuple[t.Run, t.Journal]:
    """Begins a run, or a segment of it, as `main` does."""
    run = make_run(**settings)
    journal = t.Journal(run.h, run.rt)
    journal.begin(run)
    OPEN[run.rt.run_dir] = journal
    return run, journal


def end(run: t.Run) -> None:
    """Ends the process of a run, as far as files are concerned."""
    for file in run.rt.files:
        file.close()
    OPEN.pop(run.rt.run_dir).lock.close()


def test_each_difference_to_what_the_run_was_is_named(make_run: Callable) -> None:
    run, journal = begin(make_run, run_id="a")
    end(run)
    changed = {"matrix_lr": 0.02, "ttt_epochs": 5, "train_log_every": 7}
    other = make_run(run_id="a", resume="1", num_targets=201, **changed)
    journal = t.Journal(other.h, other.rt)
    with pytest.raises(t.UserError) as caught:
        journal.begin(other._replace(code=b"another script", train_shards=[]))
    message = str(caught.value)
    for part in (
        "MATRIX_LR is 0.02 and not 0.027",
        "TTT_EPOCHS is 5 and not 3",
        "the validation text in DATA_PATH=",
        "is another; its script is logs/a/train_gpt.py",
    ):
        assert part in message
    assert "TRAIN_LOG_EVERY" not in message and "training shards" not in message
    segments = json.loads(Path("logs/a/journal.json").read_text())["segments"]
    assert len(segments) == 1  # what is refused leaves no trace


def test_segments_have_their_wall_clock_and_the_log_shows_the_break(make_run: Callable) -> None:
    run, _ = begin(make_run, run_id="a")
    run.rt.log("step:1")
    end(run)
    log = Path("logs/a/train.log")
    log.write_text(log.read_text() + "step:2\nstep:3 train_lo")  # killed while it wrote
    begun = t.datetime.fromisoformat(json.loads(Path("logs/a/journal.json").read_text())["segments"][0]["begun"])
    os.utime(log, (0, begun.timestamp() + 100))
    run, journal = begin(make_run, run_id="a", resume="1")
    lines = log.read_text().splitlines()
    assert lines[:2] == ["step:1", "step:2"] and "stopped 100s after" in lines[2] and "segment 2" in lines[2]
    first, second = journal.segments()
    assert first["seconds"] == 100 and 0 <= second["seconds"] < 60 and second["processes"] == 1


def test_a_run_goes_on_after_its_last_complete_stage(make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t, "load_artifact", lambda path: (None, path))
    stats = {"steps": 5, "train_seconds": 1 / 3, "artifact": "final_model.bin", "checkpoint": "checkpoint.bin"}
    for complete, stage in (([], "train"), (["train"], "calibrate"), (["train", "calibrate", "export"], "score")):
        name = f"run{len(complete)}"
        run, journal = begin(make_run, run_id=name)
        t.write_checkpoint(run)
        for done in complete:
            journal.complete(done, stats)
        end(run)
        run = make_run(run_id=name, resume="1")
        journal = t.Journal(run.h, run.rt)
        assert run.h.first_stage == stage and run.h.trains == (stage == "train")
        assert journal.stats() == (stats if complete else {})
        model = journal.trained_model()
        assert (model is not None) == (stage == "calibrate")


def test_the_arithmetic_that_was_chosen_is_chosen_again(make_run: Callable) -> None:
    run, journal = begin(make_run, run_id="a", ttt_epochs="auto")
    run.rt.dtype, run.rt.max_rows, run.h.ttt_epochs = torch.bfloat16, {"training": 3, "scoring": 5}, 7
    journal.keep_plan()
    end(run)
    run, _ = begin(make_run, run_id="a", ttt_epochs="auto", resume="1")
    assert run.rt.dtype == torch.bfloat16 and run.rt.keeps_rows and run.h.ttt_epochs == 7
    assert run.rt.max_rows["training"] == 3 and run.rt.max_rows["scoring"] == 5
    end(run)
    path = Path("logs/a/journal.json")
    path.write_text(path.read_text().replace('"processes": 1', '"processes": 2'))
    run, _ = begin(make_run, run_id="a", ttt_epochs="auto", resume="1")
    assert run.rt.max_rows["training"] != 3 and not run.rt.keeps_rows  # another number has another plan
    assert run.rt.dtype == torch.bfloat16 and run.h.ttt_epochs == 7


def test_what_cannot_go_on_is_said_with_the_fix(make_run: Callable, tiny: Callable) -> None:
    with pytest.raises(t.UserError, match=r"RESUME=1 .*RUN_ID"):
        tiny(resume="1")
    with pytest.raises(t.UserError, match="RESUME is for runs that train"):
        tiny(resume="1", run_id="a", eval_only="x")
    with pytest.raises(t.UserError, match=r"no run in logs/b: give 1 and"):
        t.find_run(tiny(resume="1", run_id="b"))
    run, _ = begin(make_run, run_id="a")
    with pytest.raises(t.UserError, match=r"logs/a exists already: .*RESUME=1"):
        t.find_run(tiny(run_id="a"))
    (run.rt.run_dir / "journal.json.tmp").write_text("of the live run")
    log = run.rt.run_dir / "train.log"
    log.write_text("half a line of the live run")
    with pytest.raises(t.UserError, match="another process is at work in logs/a"):
        begin(make_run, run_id="a", resume="1")
    assert (run.rt.run_dir / "journal.json.tmp").exists() and log.read_text() == "half a line of the live run"
    end(run)
    for folder in (".", "logs"):
        Path(folder, "x.tmp").write_text("mine")
        with pytest.raises(t.UserError, match="has no train.log, so it is not the folder of a run"):
            t.find_run(tiny(resume=folder))
        assert Path(folder, "x.tmp").exists()
    old = Path("logs/old")
    old.mkdir()
    for name in ("train.log", "checkpoint.bin"):
        (old / name).write_text("")
    with pytest.raises(t.UserError, match=r"no journal.json, .*EXPORT_ONLY=logs/old/checkpoint.bin"):
        t.find_run(tiny(resume="1", run_id="old"))
    (run.rt.run_dir / "submission.json").write_text("{}")
    with pytest.raises(t.UserError, match=r"logs/a is finished: EVAL_ONLY="):
        t.find_run(tiny(run_id="a", resume="1"))
    for text in ("[1]", "{", "5", "[" * 100_000):
        Path("logs/a/journal.json").write_text(text)
        with pytest.raises(t.UserError, match="is no journal of a run"):
            t.read_journal(Path("logs/a"))


def test_a_folder_of_a_run_can_be_named_itself(make_run: Callable) -> None:
    run, _ = begin(make_run, run_id="a")
    end(run)
    Path("logs/a").rename("elsewhere")
    run, _ = begin(make_run, resume="elsewhere")
    assert run.rt.run_dir == Path("elsewhere")


def test_runs_without_an_id_have_names_of_their_own_though_they_begin_at_once(make_run: Callable) -> None:
    runs = [begin(make_run)[0] for _ in range(3)]
    assert len({run.rt.run_dir for run in runs}) == 3


def test_of_two_runs_with_one_id_at_once_one_is_refused(make_run: Callable) -> None:
    runs = [make_run(run_id="a") for _ in range(2)]
    journals = [t.Journal(run.h, run.rt) for run in runs]  # neither finds the other's folder
    journals[0].begin(runs[0])
    with pytest.raises(t.UserError, match="logs/a exists already"):
        journals[1].begin(runs[1])


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
@pytest.mark.parametrize("run_id", ["a", ""])
def test_a_launcher_that_restarts_a_run_lets_it_go_on(
    make_run: Callable, tiny: Callable, monkeypatch: pytest.MonkeyPatch, launcher: str, run_id: str
) -> None:
    monkeypatch.setenv(launcher, "0")
    run, _ = begin(make_run, run_id=run_id)
    end(run)
    monkeypatch.setenv(launcher, "1")
    Path("logs/damaged").mkdir()
    Path("logs/damaged/journal.json").write_text("{")
    if launcher.startswith("SLURM") and not run_id:
        assert t.find_run(tiny())[0]["is_new"]  # process numbers say nothing on another machine
        return
    found, lock = t.find_run(tiny(run_id=run_id))
    lock.close()
    with pytest.MonkeyPatch.context() as patch:  # a requeued job's torchrun restarts its processes, too
        patch.setattr(t, "launch_name", lambda: "the next command")
        other, _ = begin(make_run, resume=str(run.rt.run_dir))
        end(other)
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        found, lock = t.find_run(tiny(run_id=run_id))
        lock.close()
        assert not found["is_new"]
    again, _ = begin(make_run, resume=str(run.rt.run_dir))
    end(again)
    assert (found["folder"], found["is_new"]) == (str(run.rt.run_dir), False)
    (run.rt.run_dir / "submission.json").write_text("{}")
    with pytest.raises(t.UserError, match="is finished"):
        t.find_run(tiny(run_id=run_id))
    (run.rt.run_dir / "submission.json").unlink()
    if launcher.startswith("TORCH"):
        monkeypatch.setattr(t, "launch_name", lambda: "another command")
        if run_id:  # a run of another day, which a restart must not take
            with pytest.raises(t.UserError, match="exists already"):
                t.find_run(tiny(run_id=run_id))
        else:
            assert t.find_run(tiny())[0]["is_new"]


def test_a_clock_that_is_set_back_harms_nothing(make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_run(**EVERYTHING)
    expected, _ = train(whole)
    real, ahead = time.time, [1e6]
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])
    first, journal = begin(make_run, run_id="a", **EVERYTHING)
    before, _ = train(first, stop_after=3)
    end(first)
    ahead[0] = 0.0
    second, journal = begin(make_run, run_id="a", resume="1", **EVERYTHING)
    after, _ = train(second)
    assert before | after == expected
    assert [segment["seconds"] for segment in journal.segments()] == [0.0, pytest.approx(0, abs=60)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full, as Linux has")
def test_no_run_ends_for_a_line(make_run: Callable, capsys: pytest.CaptureFixture) -> None:
    run, _ = begin(make_run, run_id="a")
    end(run)
    run.rt.files = [open("/dev/full", "w", buffering=1) for _ in range(2)]  # noqa: SIM115
    for number in range(2):
        run.rt.log(f"line {number}")
        run.rt.record("event", number=number)
    said = capsys.readouterr().out.splitlines()
    warning = "WARNING: /dev/full takes no more lines: [Errno 28] No space left on device"
    assert said == ["line 0", warning, warning, "line 1"]


# ------------------------------------------------------------------------------------------------------------ signals
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_waits_for_the_step_and_a_second_one_does_not(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rt, number = make_run().rt, getattr(signal, name)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)}
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail(f"left with {status}"))
    try:
        for n in before:
            signal.signal(n, signal.SIG_DFL)
        rt.catch_signals()
        rt.finishes_steps = True
        signal.raise_signal(number)
        assert rt.stop_signal == number and rt.readings(0.0)[1] == number
        clock[0] += 0.5
        signal.raise_signal(number)  # torchrun repeats that of a terminal
        clock[0] += 1.0
        with pytest.raises(pytest.fail.Exception, match=f"left with {128 + number}"):
            signal.raise_signal(number)
        rt.finishes_steps, rt.stop_signal = False, 0
        with pytest.raises(t.Stopped, match=name):
            signal.raise_signal(number)
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_a_signal_that_is_ignored_stays_ignored(make_run: Callable) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    others = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    try:
        make_run().rt.catch_signals()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        for n, handler in {signal.SIGINT: before, **others}.items():
            signal.signal(n, handler)


# ----------------------------------------------------------------------------------------------------------- lifeline
@pytest.fixture
def lifelines(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[t.Lifeline]]:
    """Returns the lifelines of so many ranks, all in this process. One that would end its process notes why instead."""
    monkeypatch.setattr(t, "HEARTBEAT_SECONDS", 0.05)
    made = []

    def end(status: int) -> None:
        for line in made:
            line.is_armed = line.is_armed and not line.rt.said  # what has had its say is gone

    monkeypatch.setattr(os, "_exit", end)

    def make(world_size: int) -> list[t.Lifeline]:
        ports: queue.Queue = queue.Queue()

        def runtime(rank: int) -> SimpleNamespace:
            def broadcast_from_rank0(port: float) -> float:
                if rank == 0:
                    knock(int(port))
                    [ports.put(port) for _ in range(world_size - 1)]
                    return port
                return ports.get(timeout=30)

            rt = SimpleNamespace(rank=rank, world_size=world_size, master="127.0.0.1", stop_signal=0, said=[])
            rt.how_to_resume = lambda: ""
            rt.broadcast_from_rank0, rt.on_rank0 = broadcast_from_rank0, lambda function: b"0123456789abcdef"
            rt.warn = rt.said.append
            rt.note_signal = lambda number: setattr(rt, "stop_signal", number)
            return rt

        with concurrent.futures.ThreadPoolExecutor(world_size) as pool:
            made.extend(pool.map(lambda rank: t.Lifeline(runtime(rank)), range(world_size)))
        return made[-world_size:]

    return make


def knock(port: int) -> None:
    """Two strangers connect first: one says something, one hangs up."""
    for message in (b"GET / HTTP/1.1\r\n\r\n  ", b""):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(message)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_strangers_are_no_ranks_and_a_rank_that_is_gone_is_named_by_all(lifelines: Callable) -> None:
    first, second, third = lifelines(3)
    assert sorted(first.peers.values()) == [1, 2] and list(third.peers.values()) == [0]
    (connection,) = second.peers
    connection.shutdown(socket.SHUT_RDWR)  # rank 1 is killed
    wait_until(lambda: bool(first.rt.said and third.rt.said))
    assert first.rt.said[0].startswith("rank 1 of 3 is gone (its connection is closed)")
    assert third.rt.said[0].startswith("rank 1 of 3 is gone (rank 0 says so)")


def test_a_rank_that_fails_says_so_before_its_connection_breaks(lifelines: Callable) -> None:
    first, second, third = lifelines(3)
    second.tell_failure()
    wait_until(lambda: first.failed == 1)
    assert not first.rt.said and not third.rt.said  # the launcher sees the end of rank 1 first
    (connection,) = second.peers
    connection.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: bool(first.rt.said and third.rt.said))
    assert first.rt.said[0].startswith("rank 1 of 3 is gone (it has failed)")
    assert third.rt.said[0].startswith("rank 1 of 3 is gone (rank 0 says so)")


def test_a_silent_rank_is_gone_and_one_that_has_said_good_bye_is_not(
    lifelines: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = lifelines(2)
    second.close()
    wait_until(lambda: not first.peers)
    monkeypatch.setattr(t, "SILENCE_SECONDS", 0.5)
    first, second = lifelines(2)
    second._say = lambda message: None  # its host is cut off
    wait_until(lambda: bool(first.rt.said))
    assert first.rt.said[0].startswith("rank 1 of 2 is gone (nothing was heard of it for 0s)")


def test_time_in_which_this_process_was_suspended_does_not_count(
    lifelines: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = lifelines(2)
    wait_until(lambda: len(first.heard) == len(second.heard) == 1)
    real = time.monotonic
    first._say = second._say = lambda message: None  # both are suspended
    time.sleep(0.2)  # what was under way arrives
    monkeypatch.setattr(time, "monotonic", lambda: real() + 3600)
    time.sleep(1.0)  # twice what one that leaves waits before it says so
    assert not first.rt.said and not second.rt.said
    monkeypatch.setattr(time, "monotonic", real)
    for lifeline in (first, second):
        lifeline.is_armed = False


def test_a_signal_to_any_rank_is_heard_by_rank_0(lifelines: Callable) -> None:
    lines = lifelines(3)
    lines[2].tell_rank0(signal.SIGUSR1)
    wait_until(lambda: lines[0].rt.stop_signal == signal.SIGUSR1)
    assert lines[1].rt.stop_signal == 0
    for lifeline in lines:
        lifeline.close()
