"""Studies of many runs: nothing is lost or run twice, means are those of the runs, and noise is no difference.

Most tests sweep a stand-in that takes a fraction of a second and keeps the manners of train_gpt.py: its folder, lock,
log and results, SIGTERM and RESUME. Those under "the script itself" sweep train_gpt.py."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import AUDITED, ROOT, shell
from test_records_report import browser, look  # noqa: F401

for package in ("optuna", "scipy", "matplotlib"):
    pytest.importorskip(package, reason=f"records/sweep.py needs {package}: pip install -r records/requirements.txt")
sys.path.insert(0, str(ROOT / "records"))
import launch  # noqa: E402
import optuna  # noqa: E402
import paired_runs  # noqa: E402
import study_table  # noqa: E402
import sweep  # noqa: E402
from scipy import stats  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:Heartbeat of storage"),
]
SWEEP = ROOT / "records" / "sweep.py"
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SECONDS = 120  # within which any study here ends
# loss(step) falls towards a value that depends on MATRIX_LR, best at 0.03; a seed adds its own noise.
STAND_IN = """
import fcntl, hashlib, json, os, pathlib, random, signal, sys, time
e = os.environ
KNOBS = ("NUM_LAYERS", "MATRIX_LR", "SEED", "ITERATIONS", "MAX_WALLCLOCK_SECONDS")
folder = pathlib.Path("logs") / e["RUN_ID"]
if folder.exists() and e.get("RESUME") != "1":
    sys.exit(f"{folder} exists already")
folder.mkdir(parents=True, exist_ok=True)
log = (folder / "train.log").open("a")
fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
with open("starts.txt", "a") as starts:
    starts.write(json.dumps({n: e.get(n, "") for n in ("RUN_ID", "RESUME", "CUDA_VISIBLE_DEVICES", "PET_MASTER_PORT",
                                                      "OMP_NUM_THREADS", "EVAL_ONLY", "TRAIN_LOG_EVERY")}) + "\\n")
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
rate, seed, steps = float(e["MATRIX_LR"]), int(e.get("SEED", 0)), int(e.get("ITERATIONS", 10))
if e["MATRIX_LR"] == e.get("BROKEN_RATE"):
    sys.exit("the rate is broken")
state = folder / "state"
first = int(state.read_text()) if state.exists() else 0
floor = 2 + 10 * abs(rate - 0.03) + random.Random(f"{rate} {seed}").gauss(0, 0.001)
with (folder / "metrics.jsonl").open("a") as events:
    for step in range(first + 1, steps + 1):
        time.sleep(float(e.get("STEP_SECONDS", 0)))
        print(json.dumps({"event": "train", "step": step, "train_loss": floor + 4 / step}), file=events, flush=True)
        state.write_text(str(step))
        if asked:
            sys.exit(143)
bpb = floor + 4 / steps + random.gauss(0, float(e.get("JITTER", 0)))  # as a GPU that does not repeat itself
if e.get("EVAL_ONLY"):
    result_of = {"artifact_sha256": hashlib.sha256(pathlib.Path(e["EVAL_ONLY"]).read_bytes()).hexdigest()}
else:
    result_of = {}
result = {**result_of, "val_bpb": bpb, "val_loss": 2 * bpb, "seed": seed, "steps": steps, "eval_seconds": 1.0,
          "bytes_total": 1000,
          "train_seconds": steps * float(e.get("CLAIMED_SECONDS", 1)),
          "calibration_seconds": float(e.get("CLAIMED_CALIBRATION", 0)),
          "code_sha256": "0" * 64, "machine": "stand-in",
          "settings": {name.lower(): json.loads(e[name]) for name in KNOBS if name in e}}
part = folder / "submission.json.part"
part.write_text(json.dumps(result))
part.rename(folder / "submission.json")
"""


class Sweeps:
    """Sweepers in one folder, on the stand-in: `run` works in this process, `start` begins another."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.capsys = capsys
        self.started: list[subprocess.Popen] = []
        self.environment = dict(os.environ)
        script = folder / "stand_in.py"
        script.write_text(STAND_IN)
        self.command = [sys.executable, str(script)]

    def words(self, words: tuple[str, ...], command: list[str] | None = None, heartbeat: int = 1) -> list[str]:
        own = [] if "--compare" in words else [f"--heartbeat={heartbeat}"]
        return [*words, *own, "--study", "s", "--", *(command or self.command)]

    def start(self, *words: str, environment: dict[str, object] | None = None, **options: object) -> subprocess.Popen:
        """Begins a sweeper as a process of its own."""
        process = subprocess.Popen(
            [sys.executable, str(SWEEP), *self.words(words, **options)], cwd=self.folder, text=True,
            env=self.environment | as_texts(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.started.append(process)
        return process

    def run(self, *words: str, status: int = 0, environment: dict[str, object] | None = None, **options: object) -> str:
        """Runs a sweep to its end, and returns what it printed."""
        handlers = {number: signal.getsignal(number) for number in STOPPING}
        self.capsys.readouterr()
        alarm = threading.Timer(SECONDS, os.kill, (os.getpid(), signal.SIGTERM))  # which a sweep takes for its end
        alarm.start()
        with self.monkeypatch.context() as patch:
            patch.chdir(self.folder)
            patch.setattr(sweep, "POLL_SECONDS", 0.02)
            patch.setattr(sweep, "IDLE_SECONDS", 0.1)
            patch.setattr(paired_runs, "POLL_SECONDS", 0.02)
            for name in set(os.environ) - set(self.environment):
                patch.delenv(name)
            for name, value in (self.environment | as_texts(environment)).items():
                patch.setenv(name, value)
            found = sweep.main(self.words(words, **options))
        alarm.cancel()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        captured = self.capsys.readouterr()
        assert found == status, captured.out + captured.err
        return captured.out + captured.err

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.wait()

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            for process in self.started:
                assert process.poll() in (None, 0, -signal.SIGKILL), process.communicate()[0]
            assert time.monotonic() < deadline, f"not within {SECONDS} s: {what}"
            time.sleep(0.02)

    def starts(self) -> list[dict[str, str]]:
        """The variables of each start of a run, in order."""
        path = self.folder / "starts.txt"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def rows(self, study: str = "s", name: str = "table.csv") -> list[dict[str, str]]:
        """The rows of a CSV of a study."""
        return list(csv.DictReader((self.folder / "logs" / "sweeps" / study / name).open()))

    def trials(self, study: str = "s") -> list[optuna.trial.FrozenTrial]:
        storage = sweep.open_storage(f"sqlite:///{self.folder}/logs/sweeps.db", 1)
        return sweep.current_trials(sweep.load_study(study, storage))

    def recomputed(self, study: str = "s") -> dict[str, float]:
        """Trial -> mean over its runs, from their submission.json alone."""
        scores: dict[str, list[float]] = {}
        for path in self.folder.glob(f"logs/{study}-*/submission.json"):
            number = path.parent.name.removeprefix(f"{study}-").split("-")[0]
            scores.setdefault(number, []).append(json.loads(path.read_text())["val_bpb"])
        return {number: pytest.approx(sum(own) / len(own), rel=1e-14) for number, own in scores.items()}


def as_texts(environment: dict[str, object] | None) -> dict[str, str]:
    return {name: str(value) for name, value in (environment or {}).items()}


@pytest.fixture
def sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Sweeps]:
    own = Sweeps(tmp_path, monkeypatch, capsys)
    yield own
    own.end()


def means(rows: list[dict[str, str]]) -> dict[str, float]:
    return {row["trial"]: float(row["bits per byte"]) for row in rows}


# ------------------------------------------------------------------------------------------- words of the command line
@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("TTT_EPOCHS=1,3,10", ["1", "3", "10"]),
        ("TTT_EPOCHS=auto,3", ["auto", "3"]),
        ("MATRIX_LR=0.001..0.1:log", sweep.Range(0.001, 0.1, True, False)),
        ("MATRIX_LR=0..1", sweep.Range(0.0, 1.0, False, False)),
        ("NUM_LAYERS=4..11", sweep.Range(4, 11, False, True)),
        ("MATRIX_LR=0.001..0.1:log:3", ["0.001", "0.01", "0.1"]),
        ("MATRIX_LR=1e-3..3e-3:5", ["0.001", "0.0015", "0.002", "0.0025", "0.003"]),
        ("NUM_LAYERS=4..6:9", ["4", "5", "6"]),
        ("LOADER=shuffled,sequential", ["shuffled", "sequential"]),
    ],
)
def test_a_word_is_a_list_or_a_range(word, expected):
    assert sweep.parse_dimension(*word.split("=")) == expected


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["MATRX_LR=1,2"], "did you mean MATRIX_LR"),
        (["MATRIX_LR=1,two"], "two"),
        (["MATRIX_LR=1,11"], "11"),
        (["MATRIX_LR=0.1,0.1"], "twice"),
        (["MATRIX_LR=0.1..0.1"], "low..high"),
        (["MATRIX_LR=0..1:log"], "above 0"),
        (["MATRIX_LR=0.1..1:1"], "at least 2"),
        (["VE_LAYERS=-2,-1"], "FILE.env"),
        (["SEED=1,1"], "twice"),
        (["SEED=x"], "seeds x"),
        (["MATRIX_LR=0.1,0.2", "MATRIX_LR=0.3,0.4"], "given twice"),
        (["MATRIX_LR=0.1,0.2", "MATRIX_LR=0.3"], "varied"),
        (["nonsense"], "nonsense is neither"),
        (["none.env"], "none.env is not there"),
        (["ITERATION=3"], "did you mean ITERATIONS"),
        (["ttt_lr=0.1,0.2"], "did you mean TTT_LR"),
        (["MATRIX_LR=0.1,0.10"], "twice"),
        (["MATRIX_LR=0.1..0.2:lg"], "low..high:log"),
        (["MATRIX_LR=.001..0.1"], "low..high:log"),
        (["ITERATIONS=many"], "ITERATIONS=many"),
    ],
)
def test_words_that_are_not_usable_are_refused_with_the_reason(words, told):
    with pytest.raises(launch.LaunchError, match=told):
        sweep.read_space(words, [])


def test_a_setting_of_the_shell_is_fixed_and_must_not_be_set_again(monkeypatch):
    monkeypatch.setenv("ITERATIONS", "7")
    assert sweep.read_space(["MATRIX_LR=0.1,0.2"], []).fixed == {"ITERATIONS": "7"}
    for words in (["ITERATIONS=8"], ["ITERATIONS=8,9"]):
        with pytest.raises(launch.LaunchError, match="ITERATIONS"):
            sweep.read_space(words, [])


def test_the_seeds_are_replicates_and_no_dimension():
    space = sweep.read_space(["MATRIX_LR=0.1,0.2", "SEED=1-3,7"], [])
    assert list(space.dimensions) == ["MATRIX_LR"] and len(space.grid()) == 2
    assert list(space.replicates) == ["seed1", "seed2", "seed3", "seed7"]
    assert sweep.read_space(["SEED=5"], []).replicates == {"seed5": {"SEED": "5"}}
    assert sweep.read_space([], []).replicates == {"seed1337": {"SEED": "1337"}}


def test_files_of_settings_are_read_as_a_shell_reads_them_one_after_the_other(tmp_path):
    (tmp_path / "a b.env").write_text("ITERATIONS=10\nMATRIX_LR=0.5  # a comment\nNOT_OURS=x\n")
    (tmp_path / "c.env").write_text("WARMDOWN_ITERS=$((ITERATIONS / 2))\nMATRIX_LR=${MATRIX_LR:+0.25}\n")
    found = launch.read_settings(
        [f"{tmp_path}/a b.env", "ITERATIONS=30", f"{tmp_path}/c.env"], {"PATH": os.environ["PATH"]}
    )
    assert found == {"ITERATIONS": "30", "WARMDOWN_ITERS": "15", "MATRIX_LR": "0.25", "NOT_OURS": "x"}
    for content in (b"\xef\xbb\xbfITERATIONS=1\n", b"ITERATIONS=1\r\n"):
        (tmp_path / "w.env").write_bytes(content)
        with pytest.raises(launch.LaunchError, match="sed -i"):
            launch.read_settings([f"{tmp_path}/w.env"])
    (tmp_path / "broken.env").write_text("ITERATIONS=$((\n")
    with pytest.raises(launch.LaunchError, match=r"broken\.env cannot be read"):
        launch.read_settings([f"{tmp_path}/broken.env"])


def test_every_file_of_settings_in_the_project_can_be_swept():
    for path in (ROOT / "records" / "env").glob("*.env"):
        space = sweep.read_space([str(path), "MATRIX_LR=0.1,0.2", "SEED=1,2"], [])
        assert space.fixed and not {"MATRIX_LR", "SEED"} & space.fixed.keys()  # what is varied overrules the file


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--sampler", "grid", "MATRIX_LR=0.1..0.2"], "number of points of MATRIX_LR"),
        (["--trials", "5", "MATRIX_LR=0.1,0.2"], "--sampler random"),
        (["--halving", "0", "MATRIX_LR=0.1,0.2"], "500:3"),
        (["--halving", "10:1", "MATRIX_LR=0.1,0.2"], "500:3"),
        (["--halving", "10", "EVAL_ONLY=x", "MATRIX_LR=0.1,0.2"], "do not train"),
        (["--from-artifact", "nowhere", "TTT_LR=0.1,0.2"], "nowhere is not there"),
        (["--storage", "oracle+nothing://x", "MATRIX_LR=0.1,0.2"], "cannot be used"),
        (["--gpus-per-trial", "99", "MATRIX_LR=0.1,0.2"], "GPUs are visible"),
        (["--gpus-per-trial", "99", "MATRIX_LR=0.1,0.2", "--dry-run"], "GPUs are visible"),
        (["--seeds", "1-3", "MATRIX_LR=0.1,0.2"], "SEED=1,2,3"),
        (["RUN_ID=a,b"], "each run has its own"),
    ],
)
def test_options_that_do_not_fit_end_with_status_2_and_one_line(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sweep.main(["--study", "s", *words, "--", sys.executable]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and error.startswith("sweep.py: error: ")


def test_a_command_that_is_not_there_or_starts_too_many_processes_is_refused():
    for command, gpus, told in (
        ([], 0, "missing"),
        (["no-such-program"], 0, "not there"),
        ([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=8", "x.py"], 2, "--nproc_per_node=2"),
        ([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "8", "x.py"], 2, "--gpus-per-trial 8"),
    ):
        with pytest.raises(launch.LaunchError, match=told):
            launch.check_command(command, gpus)


def test_the_password_of_a_database_is_never_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep.time, "sleep", lambda _: None)
    url = "postgresql+psycopg://me:secret@127.0.0.1:1/golf"
    assert sweep.main(["--study", "s", "--storage", url, "MATRIX_LR=0.1,0.2", "--", sys.executable]) == 2
    error = capsys.readouterr().err
    assert "127.0.0.1" in error and "secret" not in error and error.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------- studies
def test_the_value_of_a_configuration_is_the_mean_over_its_seeds(sweeps):
    out = sweeps.run("MATRIX_LR=0.01,0.03,0.1", "SEED=1,2,3")
    assert means(sweeps.rows()) == sweeps.recomputed()
    assert Counter(start["RUN_ID"] for start in sweeps.starts()) == Counter(
        f"s-{number:04d}-seed{seed}" for number in range(3) for seed in (1, 2, 3)
    )
    assert {f"{trial.number:04d}": trial.value for trial in sweeps.trials()} == sweeps.recomputed()
    best = sweeps.rows()[0]
    assert best["MATRIX_LR"] == "0.03" and best["verdict"] == "best so far"
    assert [row["verdict"] for row in sweeps.rows()[1:]] == ["worse", "worse"]  # the noise of a seed is in all three
    scores = [json.loads(path.read_text())["val_bpb"] for path in sweeps.folder.glob("logs/s-0001-*/submission.json")]
    assert float(best["std"]) == pytest.approx(statistics.stdev(scores), rel=1e-12)
    assert len(sweeps.rows(name="runs.csv")) == 9 and "| 0001" in out.replace("|  ", "| ")
    before = sweeps.starts()
    assert "best so far" in sweeps.run("MATRIX_LR=0.01,0.03,0.1", "SEED=1,2,3")  # the same command again
    assert sweeps.starts() == before


def test_a_killed_sweeper_loses_no_trial_and_two_share_them(sweeps):
    words = ("MATRIX_LR=0.01..0.08:8", "SEED=1,2")
    slow = {"STEP_SECONDS": 0.05}
    victim = sweeps.start(*words, environment=slow)
    sweeps.wait_until(lambda: len(sweeps.starts()) >= 2, "the second run begins")
    time.sleep(0.2)
    victim.kill()
    killed = sweeps.starts()[-1]["RUN_ID"]
    first = sweeps.start(*words, environment=slow)
    sweeps.run(*words, environment=slow)
    text, _ = first.communicate(timeout=SECONDS)
    assert first.returncode == 0, text
    assert means(sweeps.rows()) == sweeps.recomputed() and len(sweeps.recomputed()) == 8
    counts = Counter(start["RUN_ID"] for start in sweeps.starts())
    assert len(counts) == 16 and all(count == 1 for name, count in counts.items() if name != killed), counts
    steps = [json.loads(line)["step"] for line in (sweeps.folder / "logs" / killed / "metrics.jsonl").open()]
    assert steps == list(range(1, 11))  # it went on where it was: no step was done twice
    assert all(trial.state.name == "COMPLETE" for trial in sweeps.trials())


def test_a_sweep_that_has_lost_its_database_can_be_stopped_and_goes_on_when_it_is_back(sweeps):
    words = ("MATRIX_LR=0.01,0.02", "SEED=1,2")
    process = sweeps.start(*words, environment={"STEP_SECONDS": 0.2})
    sweeps.wait_until(lambda: list(sweeps.folder.glob("logs/s-*/state")), "a run has begun")
    database = sweeps.folder / "logs" / "sweeps.db"
    database.rename(sweeps.folder / "away.db")
    time.sleep(2)  # a heartbeat is due
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 143 and "the database does not answer" in out and "Traceback" not in out, out
    database.unlink(missing_ok=True)
    (sweeps.folder / "away.db").rename(database)
    sweeps.run(*words)
    assert means(sweeps.rows()) == sweeps.recomputed() and len(sweeps.rows()) == 2
    for folder in sweeps.folder.glob("logs/s-*"):
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]
        assert steps == list(range(1, 11))


def test_a_database_that_fails_once_while_a_trial_begins_costs_no_place(sweeps, monkeypatch):
    begin = sweep.Job.__init__
    failures = []

    def fail_once(job: sweep.Job, *arguments: object) -> None:
        if not failures:
            failures.append(1)
            raise optuna.exceptions.StorageInternalError("connection lost")
        begin(job, *arguments)

    monkeypatch.setattr(sweep.Job, "__init__", fail_once)
    monkeypatch.setattr(sweep, "RETRY_SECONDS", 0.1)
    assert "connection lost" in sweeps.run("MATRIX_LR=0.01,0.02")
    assert len(sweeps.rows()) == 2 and means(sweeps.rows()) == sweeps.recomputed()


def test_a_trial_that_was_taken_over_is_left_and_its_run_stopped(sweeps):
    """As on a machine that slept: another sweeper has taken this one for dead, and queued its trial again."""
    process = sweeps.start("MATRIX_LR=0.02", "SEED=1,2", environment={"STEP_SECONDS": 0.2}, heartbeat=1000)
    sweeps.wait_until(lambda: list(sweeps.folder.glob("logs/s-*/state")), "a run has begun")
    storage = sweep.open_storage(f"sqlite:///{sweeps.folder}/logs/sweeps.db", 1000)
    study = sweep.load_study("s", storage)
    trial = study.trials[0]
    study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    sweep.RetryHeartbeatStaleTrialCallback()(study, trial)
    out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0 and "another sweeper has taken it over" in out, out
    sweeps.run("MATRIX_LR=0.02", "SEED=1,2", heartbeat=1000)
    assert means(sweeps.rows()) == sweeps.recomputed() and len(sweeps.rows()) == 1
    for seed in (1, 2):
        lines = (sweeps.folder / f"logs/s-0000-seed{seed}/metrics.jsonl").open()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 11))  # no step was done twice


def test_a_run_without_training_that_was_stopped_is_kept_and_begun_anew(sweeps, monkeypatch):
    monkeypatch.chdir(sweeps.folder)
    (sweeps.folder / "final_model.bin").write_bytes(b"weights")
    left = sweeps.folder / "logs" / "x"
    left.mkdir(parents=True)
    (left / "train.log").write_text("half a run")
    settings = {"EVAL_ONLY": "final_model.bin", "MATRIX_LR": "0.02"}
    process = launch.Process("x", settings, sweeps.command, Path("out.txt"), {})
    sweeps.wait_until(lambda: process.poll() == "finished", "the run ends")
    assert (sweeps.folder / "logs" / "x.stopped-1" / "train.log").read_text() == "half a run"
    assert [start["RESUME"] for start in sweeps.starts()] == [""]


def test_a_run_whose_sweeper_was_killed_is_ended_with_it(sweeps):
    victim = sweeps.start("MATRIX_LR=0.01,0.02", environment={"STEP_SECONDS": 0.2})
    sweeps.wait_until(lambda: list(sweeps.folder.glob("logs/s-*/state")), "a run has begun")
    folder = next(sweeps.folder.glob("logs/s-*/state")).parent
    victim.kill()
    process = launch.Process(folder.name, {}, [], Path("none"), {})
    process.folder = folder
    sweeps.wait_until(lambda: not process._is_busy(), "the run has ended")
    assert not process.is_finished()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_stopped_sweep_puts_its_trial_back_and_goes_on(sweeps, number):
    words = ("MATRIX_LR=0.01,0.02", "SEED=1,2")
    process = sweeps.start(*words, environment={"STEP_SECONDS": 0.1}, heartbeat=1000)
    sweeps.wait_until(lambda: list(sweeps.folder.glob("logs/s-*/state")), "a run has begun")
    process.send_signal(number)
    out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + number and "put back into the queue" in out, out
    sweeps.run(*words)
    assert means(sweeps.rows()) == sweeps.recomputed() and len(sweeps.recomputed()) == 2
    counts = Counter(start["RUN_ID"] for start in sweeps.starts())
    assert sorted(counts.values()) == [1, 1, 1, 2]
    assert [start["RUN_ID"] for start in sweeps.starts() if start["RESUME"] == "1"] == [counts.most_common(1)[0][0]]


def test_a_failed_trial_is_recorded_with_its_last_lines_and_can_be_tried_again(sweeps):
    words = ("MATRIX_LR=0.01,0.02,0.03", "SEED=1,2")
    out = sweeps.run(*words, status=1, environment={"BROKEN_RATE": "0.02"})
    assert "the rate is broken" in out and out.count("FAILED") == 1
    assert sorted(means(sweeps.rows())) == ["0000", "0002"]
    failed = next(trial for trial in sweeps.trials() if trial.state.name == "FAIL")
    assert "the rate is broken" in failed.user_attrs["error"] and "status 1" in failed.user_attrs["error"]
    assert "the rate is broken" in sweeps.run(*words, status=1)  # nothing is tried again unless asked
    sweeps.run(*words, "--retry-failed")
    assert means(sweeps.rows()) == sweeps.recomputed() and len(sweeps.rows()) == 3


def test_a_sweep_in_which_everything_fails_ends_early(sweeps):
    out = sweeps.run("MATRIX_LR=0.01..0.09:9", status=1, command=[sys.executable, "-c", "raise SystemExit('no data')"])
    assert out.count("FAILED") == sweep.FAILURES and "all failed" in out and "no data" in out


def test_halving_stops_the_trials_that_are_worse_at_its_steps(sweeps):
    rates = "0.03,0.1,0.09,0.031,0.2,0.3,0.0302,0.5,0.0301"
    words = (f"MATRIX_LR={rates}", "--halving", "3:3", "ITERATIONS=30", "TRAIN_LOG_EVERY=7", "SEED=1,2")
    out = sweeps.run(*words, environment={"STEP_SECONDS": 0.02})
    states = {trial.user_attrs["values"]["MATRIX_LR"]: trial.state.name for trial in sweeps.trials()}
    assert states["0.03"] == "COMPLETE" and states["0.5"] == states["0.3"] == "PRUNED"
    stopped = [rate for rate, state in states.items() if state == "PRUNED"]
    assert len(stopped) >= 5 and out.count("stopped: others were better") == len(stopped)
    assert {start["TRAIN_LOG_EVERY"] for start in sweeps.starts()} == {"1"}  # what the user has set is too rare
    assert len(sweeps.starts()) == 2 * (len(states) - len(stopped)) + len(stopped)  # the first seed alone decides
    seen: dict[int, list[float]] = {}
    for trial in sweeps.trials():
        folder = sweeps.folder / f"logs/s-{trial.number:04d}-seed1"
        losses = {e["step"]: e["train_loss"] for e in map(json.loads, (folder / "metrics.jsonl").open())}
        assert (max(losses) < 30) == (trial.state.name == "PRUNED")
        for step, value in trial.intermediate_values.items():
            assert step in (3, 9, 27)
            window = [loss for n, loss in losses.items() if step - 1.5 < n <= step]
            assert value == pytest.approx(statistics.mean(window), rel=1e-12)
            rank = sum(other < value for other in seen.setdefault(step, []))
            seen[step].append(value)
            is_last = step == max(trial.intermediate_values)
            assert (rank < max(1, len(seen[step]) // 3)) == (trial.state.name == "COMPLETE" or not is_last)


def test_a_trial_that_was_put_back_counts_once_where_halving_decides(sweeps):
    """Three attempts at one trial are one loss: with nine trials at a factor of 3, the third best goes on."""
    sweeps.run("MATRIX_LR=0.03,0.031,0.032,0.033,0.034", "ITERATIONS=2")
    storage = sweep.open_storage(f"sqlite:///{sweeps.folder}/logs/sweeps.db", 1)
    study = sweep.load_study("s", storage)
    for number, loss in ((0, 3.0), (1, 3.1), (2, 3.2), (3, 3.3)):
        attempts = 3 if number == 0 else 1
        for attempt in range(attempts):
            history = {"failed_trial": number, "retry_history": [number]} if attempt else {}
            study.add_trial(optuna.create_trial(value=1.0, intermediate_values={9: loss}, system_attrs=history or {
                "failed_trial": number, "retry_history": [number]
            }))  # fmt: skip
    work = SimpleNamespace(study=study, halving=(9, 3))
    job = SimpleNamespace(number=99, rung=9)
    assert sweep.Sweep.may_go_on(work, job, 2.9) and not sweep.Sweep.may_go_on(work, job, 3.05)
    for number, loss in ((5, 4.0),):
        study.add_trial(optuna.create_trial(value=1.0, intermediate_values={9: loss}, system_attrs={
            "failed_trial": number, "retry_history": [number]
        }))  # fmt: skip
    assert sweep.Sweep.may_go_on(work, job, 3.05) and not sweep.Sweep.may_go_on(work, job, 3.15)  # 2 of 6


def test_tpe_draws_from_the_ranges_and_more_trials_go_on_with_a_study(sweeps):
    words = ("MATRIX_LR=0.001..1:log", "NUM_LAYERS=2..4", "SEED=1,2")
    sweeps.run(*words, "--trials", "4")
    drawn = [trial.user_attrs["values"] for trial in sweeps.trials()]
    assert len(drawn) == 4 and all(0.001 <= float(v["MATRIX_LR"]) <= 1 and v["NUM_LAYERS"] in "234" for v in drawn)
    sweeps.run(*words, "--trials", "6")
    assert [trial.user_attrs["values"] for trial in sweeps.trials()][:4] == drawn and len(sweeps.trials()) == 6
    assert means(sweeps.rows()) == sweeps.recomputed() and len(sweeps.rows()) == 6


def test_values_that_are_drawn_again_are_not_run_again(sweeps):
    out = sweeps.run("MATRIX_LR=0.01,0.02", "SEED=1,2", "--sampler", "tpe", "--trials", "6")
    assert out.count("not run again") == 6 - len(sweeps.starts()) / 2
    assert len(sweeps.trials()) == 6 and len(sweeps.starts()) <= 4 and len(sweeps.rows()) == len(sweeps.starts()) / 2
    ran = {number: mean for number, mean in sweeps.recomputed().items() if number in means(sweeps.rows())}
    assert means(sweeps.rows()) == ran


def test_random_takes_points_of_a_grid_without_repetition(sweeps):
    sweeps.run("MATRIX_LR=0.01,0.02,0.03", "NUM_LAYERS=2,3", "--sampler", "random", "--trials", "5")
    drawn = [tuple(trial.user_attrs["values"].values()) for trial in sweeps.trials()]
    assert len(set(drawn)) == 5


def test_the_gpus_are_divided_and_each_place_has_its_own_port_and_name(sweeps):
    environment = {"CUDA_VISIBLE_DEVICES": "4,5,6,7,8", "STEP_SECONDS": 0.05}
    environment |= {name: "" for name in ("OMP_NUM_THREADS",)}
    command = [*sweeps.command, "torchrun"]
    out = sweeps.run("MATRIX_LR=0.01..0.06:6", "--gpus-per-trial", "2", environment=environment, command=command)
    starts = sweeps.starts()
    assert "2 at a time" in out and "1 of 5 GPUs are left over" in out
    assert {start["CUDA_VISIBLE_DEVICES"] for start in starts} == {"4,5", "6,7"}
    assert len({start["RUN_ID"] for start in starts}) == 6 and len({start["PET_MASTER_PORT"] for start in starts}) == 6
    assert means(sweeps.rows()) == sweeps.recomputed()


def test_the_commands_of_a_dry_run_are_those_that_run(sweeps):
    out = sweeps.run("MATRIX_LR=0.01,0.02", "SEED=1,2", "ITERATIONS=5", "--dry-run")
    assert not (sweeps.folder / "logs").exists()
    commands = out.splitlines()
    assert len(commands) == 4
    for line in commands:
        subprocess.run(["bash", "-c", line], cwd=sweeps.folder, check=True)
    printed = sweeps.recomputed()
    shutil.rmtree(sweeps.folder / "logs")
    sweeps.run("MATRIX_LR=0.01,0.02", "SEED=1,2", "ITERATIONS=5")
    assert sweeps.recomputed() == printed


def test_a_study_goes_on_with_the_same_words_only(sweeps):
    sweeps.run("MATRIX_LR=0.01,0.02", "ITERATIONS=5")
    for words in (("MATRIX_LR=0.01,0.03", "ITERATIONS=5"), ("MATRIX_LR=0.01,0.02", "ITERATIONS=6")):
        assert "was begun otherwise" in sweeps.run(*words, status=2)
    assert "replicates was seed1337, is seed1,seed2" in sweeps.run(
        "MATRIX_LR=0.01,0.02", "ITERATIONS=5", "SEED=1,2", status=2
    )
    assert len(sweeps.starts()) == 2


def test_runs_of_another_study_are_not_taken_for_results(sweeps):
    sweeps.run("MATRIX_LR=0.01,0.02")
    (sweeps.folder / "logs" / "sweeps.db").unlink()
    assert "logs/s-0000-seed1337 is of an earlier study" in sweeps.run("MATRIX_LR=0.01,0.02", status=2)
    shutil.move(sweeps.folder / "logs" / "s-0001-seed1337", sweeps.folder / "logs" / "t-0000-seed1337")
    with pytest.raises(launch.LaunchError, match="MATRIX_LR=0.02, not 0.01"):
        launch.read_result(sweeps.folder / "logs" / "t-0000-seed1337", {"MATRIX_LR": "0.01"})


def test_a_study_that_its_creator_left_half_made_is_completed(sweeps, monkeypatch):
    (sweeps.folder / "logs").mkdir()
    study = optuna.create_study(
        study_name="s", storage=sweep.open_storage(f"sqlite:///{sweeps.folder}/logs/sweeps.db", 1)
    )
    study.enqueue_trial({"MATRIX_LR": "0.02"})
    monkeypatch.setattr(sweep, "SETUP_SECONDS", 0.1)
    sweeps.run("MATRIX_LR=0.01,0.02,0.03")
    assert sorted(row["MATRIX_LR"] for row in sweeps.rows()) == ["0.01", "0.02", "0.03"]


def test_a_trial_whose_sweeper_died_while_it_put_it_back_is_run_by_another(sweeps, monkeypatch):
    monkeypatch.setattr(sweep, "SETUP_SECONDS", 0.1)
    (sweeps.folder / "logs").mkdir()
    study = optuna.create_study(
        study_name="s", storage=sweep.open_storage(f"sqlite:///{sweeps.folder}/logs/sweeps.db", 1)
    )
    for rate in ("0.01", "0.02"):
        study.enqueue_trial({"MATRIX_LR": rate})
    study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)  # and not queued again
    put_back = study.ask()
    for name, value in ((sweep.HOST, "elsewhere"), (sweep.TAKEN, put_back.number)):
        put_back.set_user_attr(name, value)
    study.tell(put_back, state=optuna.trial.TrialState.FAIL)
    sweep.RetryHeartbeatStaleTrialCallback()(study, study.trials[put_back.number])
    assert study.ask().number == 2  # it is taken again, and has not even a heartbeat
    assert not study.get_trials(states=(optuna.trial.TrialState.WAITING,))
    sweeps.run("MATRIX_LR=0.01,0.02")
    assert len(sweeps.rows()) == 2 and means(sweeps.rows()) == sweeps.recomputed()


def test_the_last_trial_that_another_takes_first_leaves_no_trial_too_many(sweeps, monkeypatch):
    ask = optuna.Study.ask

    def ask_too_late(study: optuna.Study) -> optuna.Trial:
        """Another sweeper is faster with the last trial, and has it stopped at once."""
        if len(study.get_trials(states=(optuna.trial.TrialState.WAITING,))) == 1:
            study.tell(ask(study), state=optuna.trial.TrialState.PRUNED)
        return ask(study)

    monkeypatch.setattr(optuna.Study, "ask", ask_too_late)
    sweeps.run("MATRIX_LR=0.01,0.02,0.03")
    assert [trial.state.name for trial in sweeps.trials()] == ["COMPLETE", "COMPLETE", "PRUNED"]
    assert len(sweeps.starts()) == 2


def take_all(url: str) -> list[int]:
    """Takes trials as long as some wait, and returns their numbers."""
    study = sweep.load_study("s", sweep.open_storage(url, 60))
    taken = []
    while study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)):
        taken.append(study.ask().number)
    return taken


def test_no_trial_is_taken_twice_from_one_sqlite_file(tmp_path):
    url = f"sqlite:///{tmp_path}/claims.db"
    study = optuna.create_study(study_name="s", storage=sweep.open_storage(url, 60))
    for index in range(100):
        study.enqueue_trial({"index": index})
    with multiprocessing.get_context("fork").Pool(4) as takers:
        taken = [number for numbers in takers.map(take_all, [url] * 4) for number in numbers]
    assert max(Counter(taken).values()) == 1 and set(range(100)) <= set(taken)


# ---------------------------------------------------------------------------------------------------------- PostgreSQL
class Postgres:
    """A PostgreSQL server of this test's own, on loopback."""

    def __init__(self, initdb: str, as_user: list[str]):
        self.folder = Path(tempfile.mkdtemp(prefix="golf-postgres-"))
        if as_user:
            shutil.chown(self.folder, "postgres")
        self.port = launch.free_port()
        self.url = f"postgresql+psycopg://golf@127.0.0.1:{self.port}/postgres"
        data = str(self.folder / "data")
        self.control = [*as_user, str(Path(initdb).resolve().parent / "pg_ctl"), "-D", data, "-w"]
        self._run([*as_user, initdb, "-D", data, "-A", "trust", "-U", "golf"])

    def _run(self, command: list[str]) -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/")

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder} -c fsync=off"
        self._run([*self.control, "-l", f"{self.folder}/log", "-o", options, "start"])

    def stop(self) -> None:
        self._run([*self.control, "-m", "immediate", "stop"])


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    pytest.importorskip("psycopg", reason="psycopg is missing: pip install -r tests/requirements.txt")
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = str(binaries[-1]) if binaries else shutil.which("initdb")
    if not found:
        pytest.skip("PostgreSQL is not installed: on Debian the package postgresql")
    as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
    if as_user and subprocess.run([*as_user, "true"], capture_output=True, check=False).returncode:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    server = Postgres(found, as_user)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(server.folder)


def test_two_machines_share_a_study_in_postgresql_one_dies_and_the_database_restarts(
    sweeps, postgres, tmp_path_factory
):
    """Two folders are two machines: they have nothing in common but the database."""
    other = Sweeps(tmp_path_factory.mktemp("other"), sweeps.monkeypatch, sweeps.capsys)
    words = ("MATRIX_LR=0.01..0.04:4", "SEED=1,2", "--storage", postgres.url)
    slow = {"STEP_SECONDS": 0.05}
    victim = other.start(*words, environment=slow)

    def interfere() -> None:
        sweeps.wait_until(lambda: len(other.starts()) >= 2 and sweeps.starts(), "both work")
        victim.kill()
        postgres.stop()
        time.sleep(1)
        postgres.start()

    sweeps.monkeypatch.setattr(sweep, "RETRY_SECONDS", 1)
    sweeps.wait_until(other.starts, "the other machine works")
    interference = threading.Thread(target=interfere)
    interference.start()
    out = sweeps.run(*words, environment=slow)
    interference.join()
    victim.wait()
    assert "the database does not answer, trying again" in out
    rows = {row["trial"]: row for row in sweeps.rows()}
    assert len(rows) == 4
    runs = sweeps.rows(name="runs.csv")
    assert len(runs) == 8
    for number, row in rows.items():
        scores = [float(run["val_bpb"]) for run in runs if run["trial"] == number]
        assert float(row["bits per byte"]) == statistics.mean(scores)
    for run in runs:  # what a run says of itself, on whichever machine it is
        folders = [own.folder / run["run"] / "submission.json" for own in (sweeps, other)]
        results = [json.loads(path.read_text())["val_bpb"] for path in folders if path.exists()]
        assert float(run["val_bpb"]) in results


# --------------------------------------------------------------------------------------------------- paired comparison
def compare(sweeps: Sweeps, a: str, b: str, *words: str, status: int = 0, **options: object) -> str:
    return sweeps.run("--compare", a, b, "--steps", "10", *words, status=status, **options)


def test_two_sides_alternate_with_common_seeds_at_equal_steps_and_equal_seconds(sweeps):
    (sweeps.folder / "b.env").write_text("MATRIX_LR=0.05\nCLAIMED_SECONDS=1.5\nCLAIMED_CALIBRATION=2.5\n")
    out = compare(sweeps, "MATRIX_LR=0.03", "b.env", "--seeds", "1-3")
    order = [start["RUN_ID"] for start in sweeps.starts()]
    assert order[:3] == ["s-A-seed1", "s-again-seed1", "s-B-seed1"]  # the baseline against itself is first
    assert order[3:] == [f"s-{run}" for run in (
        "B-seed2", "A-seed2", "A-seed3", "B-seed3", "B-seconds-seed1", "B-seconds-seed2", "B-seconds-seed3"
    )]  # fmt: skip
    result = {path.parent.name: json.loads(path.read_text()) for path in sweeps.folder.glob("logs/s-*/submission.json")}
    # A takes 10 s. B calibrates for 2.5 of them, and its steps take 1.5.
    assert all(result[f"s-B-seconds-seed{seed}"]["steps"] == 5 for seed in (1, 2, 3))
    for arm in ("B", "B-seconds"):
        mean = statistics.mean(
            result[f"s-{arm}-seed{n}"]["val_bpb"] - result[f"s-A-seed{n}"]["val_bpb"] for n in (1, 2, 3)
        )
        assert f"{mean:+.5f}" in out
    assert "the same to the last bit" in out and "A: MATRIX_LR=0.03" in out
    rows = list(csv.DictReader((sweeps.folder / "logs/sweeps/s/compare.csv").open()))
    assert len(rows) == len(order)
    compare(sweeps, "MATRIX_LR=0.03", "b.env", "--seeds", "1-4")  # one seed more
    assert sorted(start["RUN_ID"] for start in sweeps.starts()[len(order) :]) == [
        "s-A-seed4",
        "s-B-seconds-seed4",
        "s-B-seed4",
    ]


def test_the_steps_of_equal_seconds_are_those_of_this_comparison(sweeps):
    """Runs of one comparison are moved away, and its name is used for another one."""
    (sweeps.folder / "b.env").write_text("MATRIX_LR=0.05\nCLAIMED_SECONDS=2\n")
    compare(sweeps, "MATRIX_LR=0.03", "b.env", "--seeds", "1,2")
    for folder in sweeps.folder.glob("logs/s-*"):
        folder.rename(sweeps.folder / f"old-{folder.name}")
    sweeps.run("--compare", "MATRIX_LR=0.03", "b.env", "--steps", "40", "--seeds", "1,2")
    result = json.loads((sweeps.folder / "logs/s-B-seconds-seed1/submission.json").read_text())
    assert result["steps"] == 20


def test_several_sides_are_compared_with_the_first_at_equal_steps(sweeps):
    rates = {"A": "0.03", "B": "0.05", "C": "0.02", "D": "0.04"}
    sides = [f"MATRIX_LR={rate}" for rate in rates.values()]
    words = ("--compare", *sides, "--equal-steps", "--steps", "10", "--seeds")
    out = sweeps.run(*words, "1,2")
    order = [start["RUN_ID"] for start in sweeps.starts()]
    assert order == [f"s-{run}" for run in (
        "A-seed1", "again-seed1", "B-seed1", "C-seed1", "D-seed1", "B-seed2", "C-seed2", "D-seed2", "A-seed2"
    )]  # fmt: skip
    out = sweeps.run(*words, "1-3")
    assert [start["RUN_ID"] for start in sweeps.starts()[len(order) :]] == [f"s-{side}-seed3" for side in "ABCD"]
    rows = list(csv.DictReader((sweeps.folder / "logs/sweeps/s/compare.csv").open()))
    score = {(row["arm"], row["replicate"]): float(row["val_bpb"]) for row in rows}
    tests = {}
    for side in "BCD":
        differences = [score[side, f"seed{n}"] - score["A", f"seed{n}"] for n in (1, 2, 3)]
        tests[side] = paired_runs.paired(differences, 0.05)
    corrected = dict(zip(tests, paired_runs.holm([test.p for test in tests.values()])))
    for side, test in tests.items():
        line = next(line for line in out.splitlines() if line.startswith(f"| {side} - A at 10 steps"))
        assert f"{test.mean:+.5f}" in line and f"{test.low:+.5f} to {test.high:+.5f}" in line
        assert line.rstrip(" |").endswith(f"{corrected[side]:.2g}")
        assert f"{side}: MATRIX_LR={rates[side]}  " in out.splitlines()
    assert "adjusted for 3 comparisons" in out and "equal seconds" not in out


def test_steps_that_take_equally_long_are_not_run_twice(sweeps):
    compare(sweeps, "MATRIX_LR=0.03", "MATRIX_LR=0.05", "--seeds", "1,2")
    assert not [start for start in sweeps.starts() if "seconds" in start["RUN_ID"]]


def test_on_a_machine_that_does_not_repeat_itself_the_baseline_is_compared_with_itself_at_every_seed(sweeps):
    out = compare(sweeps, "MATRIX_LR=0.03", "MATRIX_LR=0.05", "--seeds", "1-3", environment={"JITTER": 0.001})
    assert sum("again" in start["RUN_ID"] for start in sweeps.starts()) == 3
    rows = {row["arm"] + row["replicate"]: float(row["val_bpb"]) for row in csv.DictReader(
        (sweeps.folder / "logs/sweeps/s/compare.csv").open()
    )}  # fmt: skip
    test = paired_runs.paired([rows[f"againseed{n}"] - rows[f"Aseed{n}"] for n in (1, 2, 3)], 0.05)
    line = next(line for line in out.splitlines() if line.startswith("| A again - A"))
    assert f"{test.mean:+.5f}" in line and f"{test.low:+.5f} to {test.high:+.5f}" in line
    needed = paired_runs.paired_seeds_needed(
        0.005, paired_runs.summarize([rows[f"Bseed{n}"] - rows[f"Aseed{n}"] for n in (1, 2, 3)]).std, 0.05
    )
    assert f"{needed} for 0.005" in out


def test_a_comparison_goes_on_where_it_was_stopped_or_failed(sweeps):
    words = ("MATRIX_LR=0.03", "MATRIX_LR=0.05", "--seeds", "1,2")
    out = compare(sweeps, *words, status=1, environment={"BROKEN_RATE": "0.05"})
    assert "s-B-seed1 FAILED" in out and "the rate is broken" in out
    process = sweeps.start("--compare", *words[:2], "--steps", "10", *words[2:], environment={"STEP_SECONDS": 0.1})
    sweeps.wait_until(lambda: (sweeps.folder / "logs/s-B-seed2/state").exists(), "the second seed begins")
    process.send_signal(signal.SIGTERM)
    assert "goes on" in process.communicate(timeout=SECONDS)[0] and process.returncode == 143
    out = compare(sweeps, *words)
    assert out.count("was there already") == 3 and "B - A at 10 steps" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["MATRIX_LR=1", "MATRIX_LR=1", "--steps", "5"], "same settings"),
        (["MATRIX_LR=1", "MATRIX_LR=2"], "--steps"),
        (["MATRIX_LR=1 ITERATIONS=5", "MATRIX_LR=2 ITERATIONS=6"], "--steps"),
        (["MATRIX_LR=1", "SEED=2", "--steps", "5"], "--seeds"),
        (["MATRIX_LR=1", "MATRIX_LR=2", "--steps", "5", "--seeds", "3-1"], "seeds 3-1"),
        (["MATRIX_LR=1", "MATRIX_LR=2", "--steps", "5", "--claim", "x"], "--claim x"),
        (["MATRIX_LR=1", "MATRIX_LR=2", "--steps", "5", "LOADER=shuffled"], "belong to a side"),
        (["MATRIX_LR=1", "MATRIX_LR=1 MAX_WALLCLOCK_SECONDS=9", "--steps", "5"], "without a limit of time"),
        (["MATRIX_LR=1", "MATRIX_LR=1 ITERATIONS=9", "--steps", "5"], "same settings"),
        (["MATRIX_LR=1", "MATRIX_LR=2 RUN_ID=x", "--steps", "5"], "each run has its own"),
        (["MATRIX_LR=1", "'oops", "--steps", "5"], "No closing quotation"),
        (["MATRIX_LR=1", "--steps", "5"], "has 1 sides"),
        (["MATRIX_LR=1", "MATRIX_LR=2", "LOADER=shuffled", "--steps", "5"], "quote each"),
        (["MATRIX_LR=1", "MATRIX_LR=2", "MATRIX_LR=2", "--study", "x", "--steps", "5"], "B and C have the same"),
        (["MATRIX_LR=1", "MATRIX_LR=2", "--steps", "5", "--halving", "5"], "of a study"),
        (["MATRIX_LR=1", "MATRIX_LR=2", "--steps", "5", "--storage", "sqlite:///x.db"], "of a study"),
    ],
)
def test_sides_that_do_not_compare_are_refused(words, told, capsys):
    assert sweep.main(["--compare", *words, "--", sys.executable]) == 2
    assert told in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- noise and differences
def configuration(number: int, scores: np.ndarray) -> study_table.Configuration:
    results = {
        f"seed{seed}": launch.Result(float(score), 2 * score, 30, 9.0, 0.0, 2.0, 1000, "0", "m", "logs/x")._asdict()
        for seed, score in enumerate(scores)
    }
    return study_table.Configuration(number, {"MATRIX_LR": str(number)}, "complete", results, {}, "")


def verdicts(scores: list[np.ndarray], alpha: float = study_table.ALPHA) -> list[str]:
    """The verdicts on configurations of these scores by seed, in the order of the table."""
    study = SimpleNamespace(study_name="s")
    table = study_table.StudyTable(study, [configuration(i, own) for i, own in enumerate(scores)], alpha)
    return [difference.verdict for difference in table.differences.values()]


def test_a_planted_difference_of_two_standard_deviations_is_found_and_none_is_not_claimed():
    """20 repetitions each, 12 seeds: two standard deviations are found 19 times of 20 by the power of the test, and
    0.05 false claims of each repetition are 3 or fewer of 20 with a probability of 0.98; at 0.01, 1 or none."""
    random = np.random.default_rng(1)
    std, seeds = 0.0009, 12
    found = claimed = strict = 0
    for _ in range(20):
        base, other = random.normal(1.12, std, (2, seeds))
        found += verdicts([base, other + 2 * std]) == ["worse"]
        claimed += "not shown" not in verdicts([base, other])[0]
        strict += "not shown" not in verdicts([base, other], alpha=0.01)[0]
    assert found >= 18 and claimed <= 3 and strict <= 1, (found, claimed, strict)


@pytest.mark.parametrize(("count", "seeds"), [(2, 3), (10, 3), (20, 5)])
def test_of_many_configurations_that_are_alike_none_is_called_worse(count, seeds):
    """0.05 of such studies may claim something: 20 of 200 are three standard deviations more. Adjusted for the
    comparisons with the best alone, it is 0.09 to 0.15 of those of 10 and 20 configurations."""
    random = np.random.default_rng(2)
    studies = (list(random.normal(1.12, 0.001, (count, seeds))) for _ in range(200))
    claims = sum("worse" in verdicts(study) for study in studies)
    assert claims <= 20, claims


def test_the_tests_of_all_pairs_are_scipys():
    scores = np.random.default_rng(3).normal(1.1, 0.001, (5, 4))
    found = study_table.pairwise_p(scores)
    expected = {(i, j): stats.ttest_rel(scores[i], scores[j]).pvalue for i in range(5) for j in range(i + 1, 5)}
    assert found == pytest.approx(expected, rel=1e-9)
    assert study_table.pairwise_p(scores[:, :1]) == study_table.pairwise_p(scores[[0, 0]]) == {}


def test_one_seed_and_settings_without_effect_are_called_by_their_names():
    one = np.array([1.1])
    assert verdicts([one, one + 0.1]) == ["one seed: no test"]
    three = np.array([1.1, 1.2, 1.3])
    assert verdicts([three, three]) == ["the same"]


def test_a_configuration_that_was_drawn_twice_is_in_the_table_once():
    scores = np.array([1.1, 1.2])
    twins = [configuration(number, scores) for number in (0, 3)]
    twins[1].values = twins[0].values
    table = study_table.StudyTable(SimpleNamespace(study_name="s"), [*twins, configuration(1, scores + 0.1)], 0.05)
    assert [c.number for c in table.scored] == [0, 1]


def test_runs_of_two_scripts_or_machines_are_not_compared_in_silence():
    first, second = configuration(0, np.array([1.0, 1.1])), configuration(1, np.array([1.2, 1.3]))
    second.results["seed0"]["machine"] = "another"
    table = study_table.StudyTable(SimpleNamespace(study_name="s"), [first, second], 0.05)
    assert any("NOT COMPARABLE" in line and "another" in line for line in table.notes())


# ------------------------------------------------------------------------------------------------------------ the page
def study_of_everything() -> study_table.StudyTable:
    """A study with a range, a list with long values, trials that were stopped or failed, and hostile text."""
    study = optuna.create_study(study_name="a <b>study</b> with a rather long name of its own")
    random = np.random.default_rng(0)
    distributions = {"MATRIX_LR": optuna.distributions.FloatDistribution(0.001, 1, log=True)}
    distributions["LOADER"] = optuna.distributions.CategoricalDistribution(["shuffled", "sequential"])
    for index in range(30):
        rate, loader = float(10 ** random.uniform(-3, 0)), ("shuffled", "sequential")[index % 2]
        scores = random.normal(1.1 + 0.01 * abs(np.log10(rate) + 1.5), 0.001, 3)
        values = {"MATRIX_LR": f"{rate:.5g}", "LOADER": loader}
        attributes: dict[str, object] = {"values": values, "results": configuration(index, scores).results}
        losses = {500: 4.0 - 0.01 * index, 1500: 3.5 + 0.01 * index}
        state = optuna.trial.TrialState.COMPLETE
        if index % 7 == 3:
            state = optuna.trial.TrialState.PRUNED
            attributes["results"] = {}
            losses.pop(1500)
        if index == 20:
            state = optuna.trial.TrialState.FAIL
            attributes["error"] = "CUDA out of memory <script>alert(1)</script>"
        study.add_trial(
            optuna.create_trial(
                state=state, params={"MATRIX_LR": rate, "LOADER": loader}, distributions=distributions,
                user_attrs=attributes, intermediate_values=losses,
                value=float(scores.mean()) if state == optuna.trial.TrialState.COMPLETE else None,
            )
        )  # fmt: skip
    trials = [study_table.read_configuration(trial.number, trial) for trial in sweep.current_trials(study)]
    return study_table.StudyTable(study, trials, 0.05)


def test_the_page_is_shown_on_a_phone_and_a_desktop_in_light_and_dark(browser, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    paths = study_of_everything().write()
    page = tmp_path / next(path for path in paths if path.name == "index.html")
    assert "<script>" not in page.read_text() and "<b>study" not in page.read_text()
    for width, height, columns in ((360, 800, 1), (1280, 900, 2)):
        for mode in ("light", "dark"):
            seen = look(browser, page, width, height, mode)
            assert seen["overflow"] <= 0 and seen["columns"] == columns and seen["loose"] == 0, (width, mode, seen)
            assert len(seen["figures"]) == 10  # scores, two dimensions, importance, halving: each with its drawing
            assert min(seen["fonts"]) >= 10 and seen["cut"] == []
    assert browser.get_log("browser") == []


def test_the_page_tells_importance_and_what_was_stopped_and_failed(tmp_path):
    table = study_of_everything()
    importances = table.importances
    assert importances["MATRIX_LR"] > importances["LOADER"] and sum(importances.values()) == pytest.approx(1)
    notes = "\n".join(table.notes())
    assert "CUDA out of memory" in notes and notes.count("stopped 00") == 4
    assert len(table.scored) == 25 and table.best is table.scored[0]


# ---------------------------------------------------------------------------------------------------- the script itself
SHORT = {name: value for name, value in AUDITED.items() if name != "AUDIT"} | {"TTT_ENABLED": 0}


@pytest.fixture
def script(sweeps: Sweeps, corpus: SimpleNamespace) -> Sweeps:
    """Sweepers on train_gpt.py, on the demonstration corpus."""
    sweeps.environment = shell(corpus, **SHORT)
    sweeps.command = [sys.executable, str(ROOT / "train_gpt.py")]
    return sweeps


def segments(folder: Path) -> int:
    """How many processes have worked on a run."""
    return len(json.loads((folder / "journal.json").read_text())["segments"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "count"),
    [
        (("MATRIX_LR=0.01,0.1,1", "SEED=1,2"), 3),
        (("MATRIX_LR=0.01..0.3:log", "LOADER=shuffled,sequential", "SEED=1,2", "--trials", "2"), 2),
    ],
    ids=["grid", "tpe"],
)
def test_two_sweepers_on_one_file_and_one_killed(script, words, count):
    victim = script.start(*words)
    script.wait_until(lambda: list(script.folder.glob("logs/s-*/metrics.jsonl")), "a run has begun")
    victim.kill()
    other = script.start(*words)
    script.run(*words)
    text, _ = other.communicate(timeout=SECONDS)
    assert other.returncode == 0, text
    assert means(script.rows()) == script.recomputed() and len(script.recomputed()) == count
    folders = sorted(script.folder.glob("logs/s-*"))
    assert len(folders) == 2 * count
    assert sum(map(segments, folders)) <= 2 * count + 1  # the run that was killed, once more


@pytest.mark.slow
def test_halving_with_two_sweepers_on_one_file_and_one_killed(script):
    del script.environment["ITERATIONS"]
    words = ("MATRIX_LR=0.02,0,0.0001,0.001", "--halving", "8", "ITERATIONS=60")
    victim = script.start(*words)
    script.wait_until(lambda: list(script.folder.glob("logs/s-*/metrics.jsonl")), "a run has begun")
    victim.kill()
    other = script.start(*words)
    script.run(*words)
    text, _ = other.communicate(timeout=SECONDS)
    assert other.returncode == 0, text
    states = [trial.state.name for trial in script.trials()]
    assert states[0] == "COMPLETE" and "PRUNED" in states and set(states) == {"COMPLETE", "PRUNED"}
    for trial, state in zip(script.trials(), states):
        folder = next(script.folder.glob(f"logs/s-{sweep.first_number(trial):04d}-*"))
        assert (folder / "submission.json").exists() == (state == "COMPLETE")
        if state == "PRUNED":
            assert "stopped by SIGTERM" in (folder / "train.log").read_text()
            assert trial.intermediate_values[8] > script.trials()[0].intermediate_values[8]


@pytest.mark.slow
def test_settings_of_scoring_are_swept_on_the_artifacts_of_runs(script, audited):
    shutil.copytree(audited, script.folder / "logs" / "a")
    for name in SHORT:
        script.environment.pop(name, None)
    script.environment |= {"DEVICE": "cpu", "MAX_VAL_TOKENS": "1024"}
    script.run("EVAL_STRIDE=8,16,32", "TTT_ENABLED=0", "--from-artifact", "logs/a")
    rows = {row["EVAL_STRIDE"]: float(row["bits per byte"]) for row in script.rows()}
    assert len(rows) == 3 and len(set(rows.values())) == 3
    assert means(script.rows()) == script.recomputed()
    result = json.loads((script.folder / "logs/s-0002-a/submission.json").read_text())
    assert result["settings"]["eval_only"] == "logs/a/final_model.bin" and "steps" not in result
    assert result["val_bpb"] == rows["32"]
    shutil.copy(script.folder / "logs/a/train_gpt.py", script.folder / "logs/a/final_model.bin")  # another content
    assert "replicates was a of" in script.run(
        "EVAL_STRIDE=8,16,32", "TTT_ENABLED=0", "--from-artifact", "logs/a", status=2
    )
    with pytest.raises(launch.LaunchError, match="as it is now"):
        launch.read_result(
            script.folder / "logs/s-0002-a", {"EVAL_ONLY": str(script.folder / "logs/a/final_model.bin")}
        )
