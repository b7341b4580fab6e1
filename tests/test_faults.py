"""Faults for real: processes that are killed, hosts that are cut off, two runs in each other's way. No run is lost, and
what comes out is what would have come out, to the last bit."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SMALL, shell

import train_gpt as t

# Every stage, and a checkpoint every few steps: a run of about ten seconds.
SMALL = {
    **SMALL,
    "COMPILE": 0,
    "ITERATIONS": 40,
    "MAX_WALLCLOCK_SECONDS": 0,
    "CHECKPOINT_EVERY": 0.1,
    "TRAIN_LOG_EVERY": 1,
    "VAL_LOSS_EVERY": 15,
    "SWA_ENABLED": 1,
    "SWA_EVERY": 2,
    "TTT_CHUNK_TOKENS": 512,
}
pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc, as on Linux")
NOTICED_WITHIN = 15.0  # seconds, from the end of a process to that of all others


class Started:
    """The script as a process that goes on beside the test, in a group of its own."""

    def __init__(self, folder: Path, environment: dict[str, str], command: list[str]):
        self.folder = folder
        self.path = folder / "output.txt"
        with self.path.open("a") as output:
            self.process = subprocess.Popen(
                command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.begin = self.path.stat().st_size

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.path.read_bytes()[self.begin :].decode()

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Waits until it has printed a text."""
        deadline = time.monotonic() + seconds
        while text not in self.output:
            assert self.process.poll() is None and time.monotonic() < deadline, f"no {text!r} in {self.output}"
            time.sleep(0.01)

    def wait(self, seconds: float = 120) -> int:
        """Waits for its end, and returns its exit status."""
        return self.process.wait(seconds)

    def workers(self) -> list[int]:
        """The processes of the ranks that torchrun has started, in the order of the ranks."""
        ranks = {}
        with contextlib.suppress(OSError):  # it may end meanwhile
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            for child in map(int, children):
                variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                ranks.update({int(v[5:]): child for v in variables if v.startswith(b"RANK=")})
        return [ranks[rank] for rank in sorted(ranks)]

    def kill(self) -> None:
        """Kills it and all that it has started, as a pod dies."""
        pids = [self.process.pid, *self.workers()] if self.process.poll() is None else []
        for pid in pids:  # the workers have sessions of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path, corpus: SimpleNamespace) -> Iterator[Callable[..., Started]]:
    """Starts the script under python or torchrun, on the demonstration corpus; what still runs at the end is killed."""
    started = []

    def begin(
        num_processes: int = 1,
        options: tuple[str, ...] = (),
        before: tuple[str, ...] = (),
        script: Path = t.CODE,
        **settings: object,
    ) -> Started:
        command = [sys.executable, str(script)]
        if num_processes > 1 or options:
            launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={num_processes}"]
            command = [sys.executable, *launcher, *(options or ("--standalone",)), str(script)]
        folder = Path(settings.pop("cwd", tmp_path))
        folder.mkdir(exist_ok=True)
        started.append(Started(folder, shell(corpus, **{**SMALL, **settings}), [*before, *command]))
        return started[-1]

    yield begin
    for process in started:
        process.kill()


def outcome(folder: Path) -> dict[str, object]:
    """Returns all that a run leaves and that may not depend on when it was stopped."""
    losses, scores = {}, {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "train":
            losses[event["step"]] = event["train_loss"]
        elif event["event"] == "eval":
            scores[event["stage"]] = (event["val_loss"], event["val_bpb"])
    files = {name: (folder / name).read_bytes() for name in ("checkpoint.bin", "final_model.bin")}
    result = json.loads((folder / "submission.json").read_text())
    return {"losses": losses, "scores": scores, "val_bpb": result["val_bpb"], **files}


@pytest.fixture(scope="session")
def undisturbed(once: Callable, corpus: SimpleNamespace) -> Callable[[int], SimpleNamespace]:
    """Returns what a run of so many processes leaves that nothing happens to, and the seconds that it takes."""

    def run(num_processes: int) -> SimpleNamespace:
        def fill(folder: Path) -> None:
            command = [sys.executable, str(t.CODE)]
            if num_processes > 1:
                launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
                command = [sys.executable, *launcher, str(t.CODE)]
            begun = time.monotonic()
            started = Started(folder, shell(corpus, **SMALL, RUN_ID="a"), command)
            assert started.wait() == 0, started.output
            (folder / "seconds").write_text(str(time.monotonic() - begun))

        folder = once(f"undisturbed-{num_processes}", fill)
        return SimpleNamespace(outcome=outcome(folder / "logs/a"), seconds=float((folder / "seconds").read_text()))

    return run


def segments(folder: Path) -> list[str]:
    """Returns the stage that each segment of a run began with."""
    return [segment["stage"] for segment in json.loads((folder / "submission.json").read_text())["segments"]]


# ------------------------------------------------------------------------------------------------------------- killed
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_that_is_killed_in_each_stage_goes_on_to_the_last_bit(
    start: Callable, undisturbed: Callable, tmp_path: Path, num_processes: int
) -> None:
    moments = ("checkpoint: after step 9", "artifact: model", "quantized val_loss")
    if num_processes == 2:
        moments = ("preflight: ", "step:20/", "averaged val_loss")
    for number, moment in enumerate(moments):
        resume = {"RESUME": 1} if number else {}
        run = start(num_processes, RUN_ID="a", **resume, **({"CHECKPOINT_EVERY": 1e-6} if number < 2 else {}))
        run.wait_for(moment)
        run.kill()
    run = start(num_processes, RUN_ID="a", RESUME=1)
    assert run.wait() == 0, run.output
    folder = tmp_path / "logs/a"
    assert outcome(folder) == undisturbed(num_processes).outcome
    assert len(segments(folder)) == 4
    if num_processes == 1:
        assert segments(folder)[:2] == ["train", "train"] and segments(folder)[3] == "score"
    left = {path.name for path in folder.iterdir()}
    assert not [name for name in left if name.startswith("checkpoint-") or name.endswith(".tmp")]
    assert "resumed: from the checkpoint after step" in (folder / "train.log").read_text()
    # What was trained in pieces is no record, and says so.
    assert "trained in 2 segments" in (folder / "train.log").read_text()


@pytest.mark.faults
@pytest.mark.parametrize("num_processes", [2])
def test_of_25_kills_at_random_moments_none_costs_a_run_or_a_bit(
    start: Callable, undisturbed: Callable, tmp_path: Path, num_processes: int
) -> None:
    """Until 25 processes have been killed: a run that gets through is compared, and another one begins."""
    expected = undisturbed(num_processes)
    draw, kills, runs, stages = random.Random(15), 0, 0, []
    name, resume = "run0", {}
    while kills < 25:
        run = start(num_processes, RUN_ID=name, **resume)
        with contextlib.suppress(subprocess.TimeoutExpired):
            # Half of the time is start-up, in which there is nothing to lose.
            assert run.wait(draw.uniform(0.35, 0.95) * expected.seconds) == 0, run.output
        folder = tmp_path / "logs" / name
        if run.process.poll() is None:
            kills += 1
            run.kill()
        if not (folder / "submission.json").exists():
            resume = {"RESUME": 1} if folder.exists() else {}
            continue
        assert outcome(folder) == expected.outcome, f"{name} after {kills} kills"
        stages += segments(folder)[1:]
        runs += 1
        name, resume = f"run{runs}", {}
    if resume:
        run = start(num_processes, RUN_ID=name, **resume)
        assert run.wait() == 0, run.output
        assert outcome(folder) == expected.outcome
        stages += segments(folder)[1:]
        runs += 1
    print(f"{kills} kills, {runs} runs, all complete and equal; went on in {sorted(stages)}")
    assert len(stages) >= 10


def test_a_run_goes_on_with_another_number_of_processes(start: Callable, undisturbed: Callable, tmp_path: Path) -> None:
    run = start(2, RUN_ID="a")
    run.wait_for("step:20/")
    run.kill()
    run = start(1, RUN_ID="a", RESUME=1)
    assert run.wait() == 0, run.output
    assert "resumed: from the checkpoint" in run.output and "processes:1" in run.output
    found, expected = outcome(tmp_path / "logs/a"), undisturbed(1).outcome
    # Sums over two processes add up in another order.
    assert found["losses"].keys() == expected["losses"].keys()
    assert found["val_bpb"] == pytest.approx(expected["val_bpb"], abs=0.005)


# ------------------------------------------------------------------------------------------------------------ signals
@pytest.mark.parametrize(("num_processes", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_ends_a_training_after_a_step_that_is_kept(
    start: Callable,
    undisturbed: Callable,
    tmp_path: Path,
    interruptible: None,
    num_processes: int,
    number: signal.Signals,
) -> None:
    run = start(num_processes, RUN_ID="a", CHECKPOINT_EVERY=0)
    run.wait_for("step:12/")
    run.process.send_signal(number)
    status = run.wait(NOTICED_WITHIN)
    assert status == (128 + number if num_processes == 1 else 1), run.output  # torchrun has a status of its own
    assert f"stopped by {number.name}; the same command with RESUME=1 RUN_ID=a goes on" in run.output
    (checkpoint,) = (tmp_path / "logs/a").glob("checkpoint-*.bin")
    step = int(checkpoint.stem.partition("-")[2])
    assert f"step:{step}/" in run.output and f"step:{step + 1}/" not in run.output
    run = start(num_processes, RUN_ID="a", RESUME=1)
    assert run.wait() == 0, run.output
    assert f"step:{step + 1}/" in run.output and f"step:{step}/" not in run.output  # no step is taken twice
    assert outcome(tmp_path / "logs/a") == undisturbed(num_processes).outcome


def test_a_signal_ends_scoring_at_once_and_no_training_is_done_again(start: Callable, tmp_path: Path) -> None:
    run = start(RUN_ID="a", TTT_EPOCHS=1000)
    run.wait_for("quantized val_loss")
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(NOTICED_WITHIN) == 143 and "stopped by SIGTERM" in run.output
    run = start(RUN_ID="a", TTT_EPOCHS=1000, RESUME=1)
    run.wait_for("quantized val_loss")
    assert "step:" not in run.output


# -------------------------------------------------------------------------------------------------------- dead ranks
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("settings", "until"),
    [({"ITERATIONS": 100_000}, "step:12/"), ({"TTT_EPOCHS": 1000}, "quantized val_loss")],
    ids=["training", "scoring"],
)
def test_the_end_of_a_rank_is_that_of_all_within_seconds(
    start: Callable, rank: int, settings: dict[str, int], until: str
) -> None:
    run = start(2, RUN_ID="a", **settings)
    run.wait_for(until)
    begun = time.monotonic()
    os.kill(run.workers()[rank], signal.SIGKILL)
    assert run.wait(NOTICED_WITHIN) == 1
    print(f"noticed after {time.monotonic() - begun:.1f}s")
    assert f"rank {rank} of 2 is gone (its connection" in run.output, run.output


def test_a_rank_that_raises_has_its_own_traceback_in_its_own_file(start: Callable, tmp_path: Path) -> None:
    script = tmp_path / "train_gpt.py"
    source = t.CODE.read_text()
    marker = "        checkpoints.after_step()\n"
    assert marker in source
    script.write_text(source.replace(marker, marker + "        assert rt.rank == 0 or trainer.num_steps < 9, 'boom'\n"))
    run = start(2, script=script, RUN_ID="a")
    run.wait_for("step:8/")
    assert run.wait(NOTICED_WITHIN) == 1
    assert "AssertionError: boom" in (tmp_path / "logs/a/rank1.error.txt").read_text()
    assert "rank 1 of 2 is gone" in run.output and not (tmp_path / "logs/a/rank0.error.txt").exists()
    assert "boom" in run.output.rpartition("Root Cause")[2]  # torchrun shows it, too


@pytest.mark.faults
def test_a_long_export_of_rank_0_trips_nothing(start: Callable, undisturbed: Callable, tmp_path: Path) -> None:
    """Rank 0 compresses for longer than silence is allowed to last, while rank 1 waits for it in a collective."""
    script = tmp_path / "train_gpt.py"
    source = t.CODE.read_text()
    marker = "        blob, quant_floor = fit_artifact(run, weights)\n"
    assert source.count(marker) == 1
    busy = "        deadline = time.monotonic() + SILENCE_SECONDS + 5\n"
    busy += "        while time.monotonic() < deadline:\n"
    busy += "            lzma.compress(os.urandom(3_000_000), **LZMA)\n"
    script.write_text(source.replace(marker, busy + marker))
    run = start(2, script=script, RUN_ID="a", CHECKPOINT_EVERY=0)
    assert run.wait() == 0, run.output
    folder = tmp_path / "logs/a"
    seconds = json.loads((folder / "submission.json").read_text())["export_seconds"]
    assert seconds > t.SILENCE_SECONDS + 5 and outcome(folder) == undisturbed(2).outcome
    print(f"rank 0 exported for {seconds:.1f}s")


def test_torchrun_picks_a_run_up_by_itself(start: Callable, undisturbed: Callable, tmp_path: Path) -> None:
    run = start(2, options=("--standalone", "--max-restarts=1"))
    run.wait_for("checkpoint: after step")
    os.kill(run.workers()[1], signal.SIGKILL)
    assert run.wait() == 0, run.output
    (folder,) = (tmp_path / "logs").iterdir()  # it has found its folder, which has no name of the user's
    assert segments(folder) == ["train", "train"] and outcome(folder) == undisturbed(2).outcome


# ------------------------------------------------------------------------------------------------------ several nodes
@pytest.fixture(params=["namespaces", "loopback"])
def two_hosts(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    """Two hosts: network namespaces with a cable between them, which are hosts as far as sockets can tell. Or, where
    those are not allowed, two launchers here, of which one is stopped instead of cut off."""
    if request.param == "loopback":

        def cut(hosts: list[Started]) -> None:
            for pid in (hosts[1].process.pid, *hosts[1].workers()):
                os.kill(pid, signal.SIGSTOP)

        yield SimpleNamespace(before=[()] * 2, ends=["lo"] * 2, address="127.0.0.1", cut=cut, mend=lambda hosts: None)
        return
    if not shutil.which("ip"):
        pytest.skip("hosts are network namespaces, which need the command ip (iproute2)")
    mark = f"pg{os.getpid()}"
    names, ends = [f"{mark}a", f"{mark}b"], [f"{mark}x", f"{mark}y"]

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"hosts are network namespaces, which are not allowed here: {done.stderr.strip()}")

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for number, (name, end) in enumerate(zip(names, ends), start=1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield SimpleNamespace(
            before=[("ip", "netns", "exec", name) for name in names],
            ends=ends,
            address="10.77.0.1",
            cut=lambda hosts: ip("-n", names[1], "link", "set", ends[1], "down"),
            mend=lambda hosts: ip("-n", names[1], "link", "set", ends[1], "up"),
        )
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def test_two_hosts_without_a_common_disk_train_are_cut_off_notice_it_and_go_on(
    start: Callable, undisturbed: Callable, two_hosts: SimpleNamespace, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]

    def start_both(**settings: object) -> list[Started]:
        hosts = []
        for rank, (before, end) in enumerate(zip(two_hosts.before, two_hosts.ends)):
            rendezvous = (f"--master_addr={two_hosts.address}", f"--master_port={port}")
            options = ("--nnodes=2", f"--node_rank={rank}", *rendezvous)
            settings |= {"cwd": tmp_path / f"host{rank}", "GLOO_SOCKET_IFNAME": end, "RUN_ID": "a"}
            hosts.append(start(1, options=options, before=before, **settings))
        return hosts

    hosts = start_both(CHECKPOINT_EVERY=1e-6)
    hosts[0].wait_for("step:12/")
    two_hosts.cut(hosts)
    begun = time.monotonic()
    assert hosts[0].wait(NOTICED_WITHIN) == 1
    print(f"noticed after {time.monotonic() - begun:.1f}s")
    assert "rank 1 of 2 is gone (nothing was heard of it" in hosts[0].output
    if two_hosts.before[1]:  # it runs, and sees the same
        assert hosts[1].wait(NOTICED_WITHIN) == 1 and "rank 0 of 2 is gone" in hosts[1].output
    two_hosts.mend(hosts)
    hosts[1].kill()
    hosts = start_both(RESUME=1)
    assert [host.wait() for host in hosts] == [0, 0], hosts[0].output + hosts[1].output
    assert "resumed: from the checkpoint" in hosts[0].output
    assert outcome(tmp_path / "host0/logs/a") == undisturbed(2).outcome
    assert not (tmp_path / "host1/logs").exists()  # the second host needs none of the run's files


# ------------------------------------------------------------------------------------------ runs in each other's way
def test_of_two_runs_with_one_name_at_once_one_is_refused_and_the_other_unharmed(
    start: Callable, undisturbed: Callable, tmp_path: Path
) -> None:
    runs = [start(RUN_ID="a", cwd=tmp_path) for _ in range(2)]
    statuses = sorted(run.wait() for run in runs)
    assert statuses == [0, 1] and outcome(tmp_path / "logs/a") == undisturbed(1).outcome
    assert (tmp_path / "output.txt").read_text().count("logs/a exists already") == 1


def test_three_runs_in_one_second_without_names_all_have_their_own(start: Callable, tmp_path: Path) -> None:
    runs = [start(ITERATIONS=2, TTT_ENABLED=0) for _ in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    assert len(list((tmp_path / "logs").glob("*/submission.json"))) == 3
