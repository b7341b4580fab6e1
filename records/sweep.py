"""Runs train_gpt.py with many settings as one study, and says which differences are more than noise.

    python records/sweep.py --study ttt TTT_LR=0.001..0.1:log TTT_EPOCHS=1,3,10 SEED=1,2,3 -- python train_gpt.py
    python records/sweep.py --study ttt                         # the table as it stands; nothing runs
    python records/sweep.py --compare A.env "A.env MLP_MULT=4" --seeds 1-4 -- python train_gpt.py

The words before -- are settings: NAME=value is fixed, NAME=a,b,c has these values, NAME=low..high is a range (with :log
by its logarithm, with :5 of five points), FILE.env is a file of settings as in records/env/. SEED is no dimension: its
values are replicates, and a configuration's value is their mean. With --from-artifact so are the artifacts.

A study is kept by Optuna (Akiba et al. 2019), in SQLite or in any database that it takes. The same command again goes
on with it; several machines at once share its trials. Each run is logs/<study>-<trial>-<replicate>; the table, all runs
as CSV and a page with figures are in logs/sweeps/<study>/. Needs records/requirements.txt. Ends with status 0 where no
trial failed, 1 where some did, 2 for a mistake in the command, 128 + signal where it was stopped."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import re
import shlex
import signal
import socket
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

try:
    import optuna
    import sqlalchemy
    import study_table
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
    from optuna.trial import FrozenTrial, TrialState
except ImportError as missing:
    sys.exit(f"sweep.py: error: {missing}: pip install -r records/requirements.txt")

import paired_runs
from audit import sha256
from launch import (
    LOGS,
    LaunchError,
    Process,
    as_command,
    catch_signals,
    check_command,
    check_setting,
    join_settings,
    places,
    read_artifacts,
    read_events,
    read_result,
    read_seeds,
    t,
)
from study_table import ERROR, RESULTS, VALUES

warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of heartbeats, since 2021
warnings.filterwarnings("ignore", "Heartbeat of storage")  # which `Sweep._beat` records
DEFAULT_STORAGE = f"sqlite:///{LOGS}/sweeps.db"
DEFAULT_HEARTBEAT = 30  # seconds
POLL_SECONDS = 0.5  # between two looks at the runs
IDLE_SECONDS = 2.0  # between two looks at the trials of other sweepers
RETRY_SECONDS = 10.0  # between two tries where the database does not answer
SETUP_SECONDS = 30.0  # after which a study that its creator has left unfinished is completed by another sweeper
FAILURES = 3  # trials that all fail at the start end the sweep: the others would fail likewise
LOSSES_A_RUNG = 10  # train losses, of which halving compares the mean
DIGITS = 5  # of a value drawn from a range
WITH_COMMAS = ("VE_LAYERS", "TTT_LR_GROUPS", "FP16_KEEP_NAME_PATTERNS")  # settings whose own values have commas
BOUND = r"([-+\deE]*\d(?:\.\d+)?(?:[eE][-+]?\d+)?)"
RANGE = re.compile(rf"{BOUND}\.\.{BOUND}(:log)?(?::(\d{{1,6}}))?")
SPACE = "space"  # attribute of a study: what it varies
COMMAND = "command"  # attribute of a study: with which it was begun
NUM_TRIALS = "num_trials"  # attribute of a study: how many were queued; set when all are
HOST = "host"  # attribute of a trial: the machine that has begun it
TAKEN = "taken"  # attribute of a trial that has a heartbeat: its own number, which one that goes on for it has not
SURPLUS = "surplus"  # attribute of a trial that was asked for when none was left
DATABASE_ERRORS = (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError)
OWN_OPTIONS = "--study --dry-run --compare --seeds --steps --equal-steps --trials --sampler --halving --storage".split()


# =================================================== what is varied ==================================================
class Range(NamedTuple):
    """A dimension between two bounds."""

    low: float
    high: float
    is_log: bool
    is_whole: bool  # integers only


Dimension = list[str] | Range  # the values of a list are kept as they were typed


@dataclass
class Space:
    """What a study varies, and what it does not."""

    dimensions: dict[str, Dimension]
    replicates: dict[str, dict[str, str]]  # name -> the settings of each run of a configuration
    fixed: dict[str, str]  # settings of train_gpt.py, from words, files and this shell
    others: dict[str, str]  # other variables that the files set

    @property
    def is_finite(self) -> bool:
        return not any(isinstance(values, Range) for values in self.dimensions.values())

    def grid(self) -> list[dict[str, str]]:
        """Return all configurations of lists."""
        return [dict(zip(self.dimensions, values)) for values in itertools.product(*self.dimensions.values())]

    def described(self) -> dict[str, str]:
        """Return what must be the same where a study goes on. Of an artifact, the content must."""
        words = {name: text for name, text in self.fixed.items() if name.lower() not in t.FREE_SETTINGS}
        words |= self.others | {name: describe(values) for name, values in self.dimensions.items()}
        replicates = [
            f"{name} of {sha256(Path(settings['EVAL_ONLY']))[:16]}" if "EVAL_ONLY" in settings else name
            for name, settings in self.replicates.items()
        ]
        return words | {"replicates": ",".join(replicates)}

    def settings(self, values: dict[str, str], replicate: str, first_rung: int) -> dict[str, str]:
        """Return the variables of a run, beside those of this shell.

        Where halving decides at `first_rung` steps, and not 0, the run logs often enough for it."""
        settings = self.others | self.fixed | values | self.replicates[replicate]
        if first_rung:
            settings["TRAIN_LOG_EVERY"] = str(max(1, first_rung // (2 * LOSSES_A_RUNG)))
        return settings


def describe(dimension: Dimension) -> str:
    """Return a dimension as it may be typed."""
    if isinstance(dimension, Range):
        return f"{dimension.low}..{dimension.high}{':log' * dimension.is_log}"
    return ",".join(dimension)


def parse_dimension(name: str, text: str) -> Dimension:
    """Return the values of NAME=text: a list, or a range, which with a number of points is a list.

    Raise LaunchError where a value is none of the setting's."""
    match = RANGE.fullmatch(text)
    if name in WITH_COMMAS:
        raise LaunchError(f"{name}={text}: commas are part of this setting's values, so put it into a FILE.env")
    if not match:
        if is_broken_range(name, text):
            raise LaunchError(f"{name}={text}: a range is low..high, low..high:log, low..high:5 or low..high:log:5")
        values = text.split(",")
        meant = [check_setting(name, value) for value in values]
        if len(set(meant)) < len(meant):
            raise LaunchError(f"{name}={text}: {statistics.mode(meant)} is there twice")
        return values
    low, high = (check_setting(name, bound) for bound in match.group(1, 2))
    if type(low) not in (int, float) or type(high) is not type(low):
        raise LaunchError(f"{name}={text}: only numbers have ranges, list the values of this setting with commas")
    if not low < high or (match[3] and low <= 0):
        raise LaunchError(f"{name}={text}: a range is low..high, with low above 0 where it is :log")
    span = Range(low, high, bool(match[3]), type(low) is int)
    return spread(span, int(match[4])) if match[4] else span


def is_broken_range(name: str, text: str) -> bool:
    """Whether a text is meant as a range and does not have the form of one: paths may have two dots, numbers do not."""
    knob = t.Hyperparameters.knobs().get(name.lower())
    return ".." in text and knob is not None and type(knob.default) in (int, float)


def spread(span: Range, count: int) -> list[str]:
    """Return so many values of a range, at equal distances."""
    if count < 2:
        raise LaunchError(f"a range of {count} points: at least 2 are needed")
    values = []
    for i in range(count):
        part = i / (count - 1)
        value = span.low + part * (span.high - span.low)
        if span.is_log:
            value = span.low * (span.high / span.low) ** part
        values.append(as_text(round(value) if span.is_whole else value))
    return list(dict.fromkeys(values))  # a short range of integers has fewer


def as_text(value: float) -> str:
    """Return a number as the environment gets it."""
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)


def read_space(words: Sequence[str], artifacts: Sequence[str]) -> Space:
    """Return what the words of the command line vary, beside the settings of this shell."""
    dimensions: dict[str, Dimension] = {}
    replicates: dict[str, dict[str, str]] = {}
    rest = []
    for word in words:
        name, _, text = word.partition("=")
        if name == "SEED":
            replicates = {f"seed{seed}": {"SEED": str(seed)} for seed in read_seeds(text)}
        elif "," in text or RANGE.fullmatch(text) or is_broken_range(name, text):
            if name in dimensions:
                raise LaunchError(f"{name} is given twice")
            dimensions[name] = parse_dimension(name, text)
        else:
            rest.append(word)
    fixed, others = join_settings(rest)
    for name in [*dimensions, *["SEED"] * bool(replicates)]:
        if name in os.environ or any(word.startswith(f"{name}=") for word in rest):
            raise LaunchError(
                f"{name}={fixed[name]} is set, by this shell or the command, and varied: remove one of them"
            )
        fixed.pop(name, None)  # of a file
    if artifacts:
        if replicates or "SEED" in fixed:
            raise LaunchError("--from-artifact trains nothing, so SEED has no effect: give several artifacts instead")
        replicates = read_artifacts(artifacts)
    if not replicates:
        seed = fixed.pop("SEED", str(t.Hyperparameters.seed))
        replicates = {f"seed{seed}": {"SEED": seed}}
    return Space(dimensions, replicates, fixed, others)


# =================================================== study ===========================================================
def open_storage(url: str, heartbeat: int) -> RDBStorage:
    """Return the database of studies, made where it is not there yet. Raise LaunchError where it cannot be used."""
    options: dict[str, Any] = {"pool_pre_ping": True}
    is_sqlite = url.startswith("sqlite")
    problem: Exception | None = None
    try:
        if is_sqlite:
            options = {"connect_args": {"timeout": 60.0}}
            Path(sqlalchemy.make_url(url).database or ".").parent.mkdir(parents=True, exist_ok=True)
        for _ in range(5):  # two that make the tables at once get in each other's way
            try:
                storage = RDBStorage(
                    url, options, heartbeat_interval=heartbeat, grace_period=2 * heartbeat,
                    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
                )  # fmt: skip
            except (sqlalchemy.exc.DBAPIError, optuna.exceptions.StorageInternalError) as error:
                problem = error
                time.sleep(1 + random.random())
            else:
                if is_sqlite:
                    begin_immediately(storage.engine)
                return storage
    except (ImportError, ValueError, OSError, sqlalchemy.exc.ArgumentError) as error:
        problem = error
    raise LaunchError(f"--storage {hidden(url)} cannot be used: {cause_of(problem)}")


def cause_of(error: Exception | None) -> str:
    """Return the line in which a database says what is wrong, and no more."""
    inner = getattr(error, "__cause__", None) or error
    return str(getattr(inner, "orig", None) or inner).strip().splitlines()[0]


def begin_immediately(engine: sqlalchemy.Engine) -> None:
    """Let each transaction of SQLite lock the database when it begins: it has no SELECT … FOR UPDATE. Without this, six
    processes that took 200 waiting trials took 21 of them twice (Optuna 4.9.0)."""
    engine.dispose()

    @sqlalchemy.event.listens_for(engine, "connect")
    def leave_transactions_to_us(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @sqlalchemy.event.listens_for(engine, "begin")
    def begin(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def hidden(url: str) -> str:
    """Return the address of a database without its password."""
    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return url


def load_study(name: str, storage: RDBStorage, **options: Any) -> optuna.Study:
    """Return a study that is there. Raise LaunchError where it is not."""
    try:
        return optuna.load_study(study_name=name, storage=storage, **options)
    except KeyError:
        known = ", ".join(optuna.get_all_study_names(storage)) or "none"
        raise LaunchError(f"there is no study {name} in this database, which has: {known}") from None


def open_study(args: argparse.Namespace, space: Space, storage: RDBStorage) -> optuna.Study:
    """Return the study, made where there is none of the name, with its trials queued.

    All are queued at the start, those of a grid with their values: what is queued is taken by one sweeper only. Raise
    LaunchError where the study of that name is another one."""
    options = {"storage": storage, "sampler": pick_sampler(args)}
    described = space.described() | {"halving": args.halving or "off"}
    try:
        study = optuna.create_study(study_name=args.study, **options)
    except optuna.exceptions.DuplicatedStudyError:
        study = load_study(args.study, **options)
        wait_for_creator(study)
        check_same(study, described)
    else:
        earlier = sorted(LOGS.glob(f"{args.study}-[0-9][0-9][0-9][0-9]-*"))
        if earlier:
            optuna.delete_study(study_name=args.study, storage=storage)
            raise LaunchError(f"{earlier[0]} is of an earlier study of this name: choose another, or move it away")
        study.set_user_attr(SPACE, described)
        study.set_user_attr(COMMAND, args.command)
    if study.user_attrs.get(COMMAND, args.command) != args.command:
        print(f"note: the study was begun with `{shlex.join(study.user_attrs[COMMAND])}`, another command")
    queue_trials(study, args, space)
    for trial in current_trials(study):
        if trial.state == TrialState.FAIL and args.retry_failed:
            queue_again(study, trial)
    return study


def wait_for_creator(study: optuna.Study) -> None:
    """Wait until all trials of a study are queued by the sweeper that makes it, if that is still alive."""
    deadline = time.monotonic() + SETUP_SECONDS
    while NUM_TRIALS not in study.user_attrs and time.monotonic() < deadline:
        time.sleep(IDLE_SECONDS)


def check_same(study: optuna.Study, described: dict[str, str]) -> None:
    """Raise LaunchError where a study was begun with other words than those of this command."""
    before = study.user_attrs.get(SPACE, described)
    different = [
        f"{name} was {before.get(name, 'not set')}, is {described.get(name, 'not set')}"
        for name in sorted(before.keys() | described.keys())
        if before.get(name) != described.get(name)
    ]
    if different:
        fix = "type the command as before, or choose another --study: runs of both would not compare"
        raise LaunchError(f"study {study.study_name} was begun otherwise ({'; '.join(different)}); {fix}")


def pick_sampler(args: argparse.Namespace) -> optuna.samplers.BaseSampler:
    """Return what draws the values of trials that are queued without."""
    if args.sampler == "tpe":
        return optuna.samplers.TPESampler(multivariate=True, constant_liar=True)  # several are under way at once
    return optuna.samplers.RandomSampler()


def halving_steps(text: str) -> tuple[int, int]:
    """Return the first step and the factor of --halving STEP[:FACTOR]."""
    match = re.fullmatch(r"([1-9]\d{0,8})(?::([2-9]|[1-9]\d))?", text)
    if not match:
        raise LaunchError(f"--halving {text}: give the step of the first decision and a factor of at least 2, as 500:3")
    return int(match[1]), int(match[2] or 3)


def queue_trials(study: optuna.Study, args: argparse.Namespace, space: Space) -> None:
    """Queue the trials that the study does not have yet."""
    queued = [
        trial.system_attrs["fixed_params"]
        for trial in study.get_trials(deepcopy=False)
        if "fixed_params" in trial.system_attrs and trial.number == first_number(trial)
    ]
    if args.sampler == "grid":
        missing = [values for values in space.grid() if values not in queued]
    elif args.sampler == "random" and space.is_finite:  # without repetition
        unused = [values for values in space.grid() if values not in queued]
        number = min(len(unused), max(0, args.trials - len(queued)))
        missing = random.sample(unused, number)
    else:
        missing = [{} for _ in range(args.trials - len(queued))]
    for values in missing:
        study.enqueue_trial(values)
    study.set_user_attr(NUM_TRIALS, len(queued) + len(missing))


def current_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials, without those that another goes on for. Where two do, the one that is further counts."""
    order = (TrialState.FAIL, TrialState.WAITING, TrialState.RUNNING, TrialState.PRUNED, TrialState.COMPLETE)
    best: dict[int, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        number = first_number(trial)
        is_further = number not in best or order.index(trial.state) >= order.index(best[number].state)
        if SURPLUS not in trial.user_attrs and is_further:
            best[number] = trial
    return [best[number] for number in sorted(best)]


def queue_again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue a trial that was begun: under a new number, with its values, results and the number that names its runs."""
    RetryHeartbeatStaleTrialCallback()(study, trial)


def is_lost(trial: FrozenTrial) -> bool:
    """Whether a trial was taken off and is not queued again, as in the moment in which a sweeper puts it back."""
    return trial.state == TrialState.FAIL and not trial.user_attrs.get(ERROR)


def first_number(trial: FrozenTrial) -> int:
    """Return the number that names a trial's runs: that of the first of those that went on for each other."""
    number = RetryHeartbeatStaleTrialCallback.retried_trial_number(trial)
    return trial.number if number is None else number


def values_of(trial: optuna.Trial, space: Space) -> dict[str, str]:
    """Return the values of a trial's dimensions: those that it was queued with, or new ones."""
    values = {}
    for name, dimension in space.dimensions.items():
        if isinstance(dimension, list):
            values[name] = trial.suggest_categorical(name, dimension)
        elif dimension.is_whole:
            values[name] = as_text(trial.suggest_int(name, dimension.low, dimension.high, log=dimension.is_log))
        else:
            values[name] = as_text(trial.suggest_float(name, dimension.low, dimension.high, log=dimension.is_log))
    return values


# =================================================== trials ==========================================================
class Job:
    """A trial under way: its replicates, one after the other, in one place of the machine."""

    def __init__(self, sweep: Sweep, trial: optuna.Trial, frozen: FrozenTrial, place: dict[str, str]):
        self.sweep = sweep
        self.trial = trial
        self.place = place
        self.number = first_number(frozen)
        self.values = values_of(trial, sweep.space)
        self.results: dict[str, dict[str, Any]] = dict(trial.user_attrs.get(RESULTS, {}))
        self.process: Process | None = None
        self.replicate = ""
        self.rung = 0  # the next step at which halving decides; 0: it does not
        self.is_hopeless = False
        self.is_taken_over = False
        trial.set_user_attr(VALUES, self.values)
        trial.set_user_attr(ERROR, "")
        trial.set_user_attr(HOST, socket.gethostname())
        trial.set_user_attr(TAKEN, trial.number)

    def __str__(self) -> str:
        return " ".join([f"trial {self.number:04d}", *(f"{name}={value}" for name, value in self.values.items())])

    def advance(self) -> bool:
        """Move the trial on. Return whether it has ended."""
        if self.is_taken_over:
            return self._leave()
        try:
            return self._advance()
        except optuna.exceptions.UpdateFinishedTrialError:  # this machine slept, and another took the trial over
            print(f"{self}: another sweeper has taken it over", flush=True)
            self.is_taken_over = True
            return self._leave()
        except LaunchError as error:
            return self._fail(str(error))

    def _advance(self) -> bool:
        if self.process is None:
            return self._begin()
        state = self.process.poll()
        if state in ("running", "busy"):
            self._follow()
            return False
        if state == "finished":
            self._keep_result()
            return False
        if state == "failed":
            return self._fail(self.process.last_lines())
        if self.is_hopeless:
            return self._end("stopped: others were better at that step", state=TrialState.PRUNED)
        return self._put_back()

    def _begin(self) -> bool:
        """Begin the next replicate, or end the trial where all have a result."""
        space = self.sweep.space
        missing = [name for name in space.replicates if name not in self.results]
        twin = self.sweep.find_twin(self) if missing else None
        if twin:
            self.trial.set_user_attr(RESULTS, twin)
            self.results = twin
            missing = []
        if not missing:
            mean = statistics.mean(self.results[name]["val_bpb"] for name in space.replicates)
            told = ", of a trial with the same values: not run again" if twin else ""
            return self._end(f"{mean:.5f} bits per byte{told}", value=mean)
        self.replicate = missing[0]
        self.rung = 0
        if self.replicate == next(iter(space.replicates)):
            self.rung = self.sweep.halving[0]
        run_id = f"{self.sweep.name}-{self.number:04d}-{self.replicate}"
        output = self.sweep.folder / "output" / f"{run_id}.txt"
        settings = space.settings(self.values, self.replicate, self.sweep.halving[0])
        self.process = Process(run_id, settings, self.sweep.command, output, self.place)
        print(f"{self}: {self.replicate} begins, {self.process.folder}", flush=True)
        return False

    def _follow(self) -> None:
        """At the steps where halving decides, compare the loss with that of the other trials, and stop the run where a
        larger part of them was better.

        The first replicate alone is followed: it has the same seed, and so the same batches, in all trials."""
        if not self.rung:
            return
        events = read_events(self.process.folder, "train")
        while self.rung and events and events[-1]["step"] >= self.rung:
            begin = self.rung - self.sweep.halving[0] / 2  # the ten logged last, or all where there are fewer steps
            loss = statistics.mean(e["train_loss"] for e in events if begin < e["step"] <= self.rung)
            self.trial.report(loss, self.rung)
            self.is_hopeless = not self.sweep.may_go_on(self, loss)
            self.rung *= self.sweep.halving[1]
            if self.is_hopeless:
                self.rung = 0
                self.process.stop()

    def _keep_result(self) -> None:
        expected = self.sweep.space.fixed | self.values | self.sweep.space.replicates[self.replicate]
        result = read_result(self.process.folder, expected)
        self.trial.set_user_attr(RESULTS, self.results | {self.replicate: result._asdict()})
        self.results[self.replicate] = result._asdict()
        if self.process.process:  # it was not there already
            self.sweep.seconds.append(time.monotonic() - self.process.begun)
        self.process = None
        self.is_hopeless = False  # it was finished before it could be stopped
        print(f"{self}: {self.replicate} has {result.val_bpb:.5f} bits per byte", flush=True)

    def _end(self, told: str, **outcome: Any) -> bool:
        self.sweep.study.tell(self.trial, outcome.get("value"), outcome.get("state"), skip_if_finished=True)
        self.sweep.num_ended += 1
        print(f"{self}: {told}{self.sweep.outlook()}", flush=True)
        return True

    def _fail(self, why: str) -> bool:
        self.trial.set_user_attr(ERROR, why)
        self.sweep.study.tell(self.trial, state=TrialState.FAIL, skip_if_finished=True)
        self.sweep.num_failed += 1
        print(f"{self}: FAILED\n    " + why.replace("\n", "\n    "), flush=True)
        return True

    def stop(self) -> None:
        """Ask the run to end."""
        if self.process:
            self.process.stop()

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() == "running"

    def _leave(self) -> bool:
        """Stop the run. Return whether it has ended."""
        self.stop()
        return not self.is_running()

    def _put_back(self) -> bool:
        """Queue the trial again, as this sweeper ends."""
        self.sweep.study.tell(self.trial, state=TrialState.FAIL, skip_if_finished=True)
        queue_again(self.sweep.study, self.sweep.frozen(self.trial))
        print(f"{self}: put back into the queue", flush=True)
        return True


class Sweep:
    """This process's work on a study."""

    def __init__(self, args: argparse.Namespace, space: Space, study: optuna.Study, storage: RDBStorage):
        self.name = args.study
        self.command = args.command
        self.space = space
        self.study = study
        self.storage = storage
        self.heartbeat = args.heartbeat
        self.halving = halving_steps(args.halving) if args.halving else (0, 0)  # first step, factor
        self.folder = study_table.folder_of(args.study)
        self.free = places(args.gpus_per_trial)
        self.num_places = len(self.free)
        self.jobs: list[Job] = []
        self.seconds: list[float] = []  # of the runs that it has done
        self.num_ended = 0  # trials with a score, or stopped as hopeless
        self.num_failed = 0
        self.signal = 0
        self.last_beat = 0.0
        self.last_look = 0.0
        self.is_waiting = False
        self.lost: dict[int, float] = {}  # number of a trial that nobody cares for -> since when

    def run(self) -> None:
        """Work until no trial is left, here or elsewhere, or a signal comes."""
        catch_signals(self._on_signal)
        while True:
            if self.signal or self.all_fail():
                for job in self.jobs:
                    job.stop()
            try:
                if not self._turn():
                    return
                time.sleep(POLL_SECONDS)
            except DATABASE_ERRORS as error:
                print(f"the database does not answer, trying again: {cause_of(error)}", flush=True)
                if self.signal and not any(job.is_running() for job in self.jobs):
                    print("stopped without the database, which will take these trials for lost, and queue them again")
                    return
                time.sleep(POLL_SECONDS if self.signal else RETRY_SECONDS)

    def _turn(self) -> bool:
        """Move everything on by one step. Return whether there is more to do."""
        self._beat()
        for job in list(self.jobs):
            if job.advance():
                self.jobs.remove(job)
                self.free.append(job.place)
                self.last_look = 0.0
        if self.signal or self.all_fail():
            return bool(self.jobs)
        if not self.free or time.monotonic() - self.last_look < IDLE_SECONDS:
            return True
        self.last_look = time.monotonic()
        self._care_for_others()
        if self._take():
            self.last_look = 0.0  # there may be more
            return True
        return bool(self.jobs) or self._wait_for_others()

    def _beat(self) -> None:
        """Tell the database that this sweeper is alive. Without that for two intervals, its trials are taken over."""
        if time.monotonic() - self.last_beat >= self.heartbeat:
            for job in self.jobs:
                self.storage.record_heartbeat(job.trial._trial_id)
            self.last_beat = time.monotonic()

    def _care_for_others(self) -> None:
        """Queue again what belonged to sweepers that have died."""
        optuna.storages.fail_stale_trials(self.study)
        for trial in current_trials(self.study):
            without_heartbeat = trial.state == TrialState.RUNNING and trial.user_attrs.get(TAKEN) != trial.number
            if not without_heartbeat and not is_lost(trial):
                self.lost.pop(trial.number, None)
                continue
            seen = self.lost.setdefault(trial.number, time.monotonic())
            if time.monotonic() - seen < 2 * self.heartbeat:
                continue  # its sweeper is about to write more
            self.lost[trial.number] = math.inf  # it has died at that moment: done once
            if without_heartbeat:
                self.storage.record_heartbeat(trial._trial_id)  # from now on it ages
            else:
                queue_again(self.study, trial)

    def _take(self) -> bool:
        """Begin a trial that waits. Return whether there was one."""
        if not self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            return False
        trial = self.study.ask()
        self.storage.record_heartbeat(trial._trial_id)
        frozen = self.frozen(trial)
        if "fixed_params" not in frozen.system_attrs:  # another sweeper took the last one in between
            trial.set_user_attr(SURPLUS, True)
            self.study.tell(trial, state=TrialState.FAIL)
            return False
        self.jobs.append(Job(self, trial, frozen, self.free[0]))
        self.free.pop(0)
        self.is_waiting = False
        return True

    def _wait_for_others(self) -> bool:
        """Return whether other sweepers still work on trials, which come back to the queue if they die."""
        running = [trial for trial in current_trials(self.study) if trial.state == TrialState.RUNNING or is_lost(trial)]
        if running and not self.is_waiting:
            hosts = sorted({str(trial.user_attrs.get(HOST)) for trial in running})
            print(f"waiting for {len(running)} trials of other sweepers, on {', '.join(hosts)}", flush=True)
        self.is_waiting = bool(running)
        return self.is_waiting

    def all_fail(self) -> bool:
        """Whether the first trials have all failed, so that the others would too."""
        return self.num_failed >= FAILURES and not self.num_ended

    def _on_signal(self, number: int, _: Any) -> None:
        if self.signal:
            os._exit(128 + number)  # the runs get SIGTERM then
        self.signal = number
        print(
            f"stopped by {signal.Signals(number).name}: runs end with their step. The same command goes on", flush=True
        )

    def frozen(self, trial: optuna.Trial) -> FrozenTrial:
        """Return all that the database knows of a trial."""
        return next(other for other in self.study.get_trials(deepcopy=False) if other.number == trial.number)

    def find_twin(self, job: Job) -> dict[str, dict[str, Any]] | None:
        """Return the results of a trial with the same values, where there is one: a sampler may draw some again."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if trial.user_attrs.get(VALUES) == job.values:
                return trial.user_attrs[RESULTS]
        return None

    def may_go_on(self, job: Job, loss: float) -> bool:
        """Return whether a loss is among the best of those of all trials at that step so far, the best third where the
        factor is 3: asynchronous successive halving (Li et al. 2018), but a trial that is stopped stays so.

        Optuna's own pruner counts a trial that was put back again with each of its attempts."""
        losses = {
            first_number(trial): trial.intermediate_values[job.rung]
            for trial in self.study.get_trials(deepcopy=False)
            if job.rung in trial.intermediate_values
        }
        losses[job.number] = loss
        kept = max(1, len(losses) // self.halving[1])
        return loss <= sorted(losses.values())[kept - 1]

    def outlook(self) -> str:
        """Return how many trials are done, and how long the others should take."""
        trials = current_trials(self.study)
        ended = [trial for trial in trials if trial.state.is_finished()]
        text = f" ({len(ended)} of {len(trials)} trials"
        if self.seconds and len(ended) < len(trials):
            runs = (len(trials) - len(ended)) * len(self.space.replicates)
            minutes = math.ceil(statistics.mean(self.seconds) * runs / self.num_places / 60)
            text += f", about {minutes} min left for this sweeper alone, if none is stopped"
        return text + ")"


# =================================================== commands ========================================================
def show_commands(args: argparse.Namespace, space: Space) -> None:
    """Print the command of each run, and draw nothing from a database: ranges are shown as they are."""
    configurations = space.grid() if space.is_finite and args.sampler == "grid" else [{}]
    if configurations == [{}] and space.dimensions:
        drawn = " ".join(f"{name}={describe(values)}" for name, values in space.dimensions.items())
        print(f"# {args.trials} configurations, drawn by {args.sampler} from {drawn}; of each:")
    for place in places(args.gpus_per_trial):
        if place:
            print(f"# one at a time with {as_command(place, [])}")
    first_rung = halving_steps(args.halving)[0] if args.halving else 0
    for number, values in enumerate(configurations):
        for replicate in space.replicates:
            settings = space.settings(values, replicate, first_rung)
            settings["RUN_ID"] = f"{args.study}-{number:04d}-{replicate}"
            print(as_command(settings, args.command))


def sweep(args: argparse.Namespace) -> int:
    """Work on a study, write its table, and return the exit status."""
    space = read_space(args.words, args.from_artifact)
    if args.sampler is None:
        args.sampler = "grid" if space.is_finite else "tpe"
    if args.sampler == "grid" and not space.is_finite:
        names = ", ".join(name for name, values in space.dimensions.items() if isinstance(values, Range))
        raise LaunchError(f"--sampler grid needs the number of points of {names}, as {names.split(',')[0]}=low..high:5")
    if args.sampler == "grid" and args.trials is not None:
        raise LaunchError(f"--trials {args.trials}: a grid has as many as it has points; --sampler random takes some")
    args.trials = args.trials or 20
    if args.halving and (args.from_artifact or space.fixed.get("EVAL_ONLY")):
        raise LaunchError("--halving follows the training loss, and runs from an artifact do not train: leave it out")
    for name in ("seeds", "steps", "claim", "equal_steps"):
        if getattr(args, name) is not None:
            raise LaunchError(f"--{name} is of --compare: seeds of a study are SEED=1,2,3")
    check_command(args.command, args.gpus_per_trial)
    if args.dry_run:
        show_commands(args, space)
        return 0
    storage = open_storage(args.storage, args.heartbeat)
    work = Sweep(args, space, open_study(args, space, storage), storage)
    print(f"study {args.study} in {hidden(args.storage)}: {work.study.user_attrs[NUM_TRIALS]} configurations, ", end="")
    print(f"{len(space.replicates)} runs of each, {work.num_places} at a time", flush=True)
    work.run()
    try:
        failed = write_table(work.study, args.alpha)
    except DATABASE_ERRORS:
        if not work.signal:
            raise
    if work.signal:
        return 128 + work.signal
    if work.all_fail():
        print(f"the first {work.num_failed} trials all failed, so the sweep ends: --retry-failed tries them again")
    return int(failed)


def show_study(args: argparse.Namespace) -> int:
    """Write and print the table of a study that is there."""
    database = sqlalchemy.make_url(args.storage).database if args.storage.startswith("sqlite") else ""
    if database and not Path(database).exists():
        raise LaunchError(f"{database} is not there: a study is shown in the folder where it was begun")
    write_table(load_study(args.study, storage=open_storage(args.storage, args.heartbeat)), args.alpha)
    return 0


def write_table(study: optuna.Study, alpha: float) -> bool:
    """Write and print the table of a study as it stands. Return whether a trial failed."""
    configurations = [study_table.read_configuration(first_number(trial), trial) for trial in current_trials(study)]
    table = study_table.StudyTable(study, configurations, alpha)
    paths = table.write()
    print(table.text())
    print(f"wrote {', '.join(map(str, paths))}")
    return any(configuration.state == "failed" for configuration in configurations)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the command line; what follows -- is the command of a run."""
    parser = argparse.ArgumentParser(
        prog="sweep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("words", nargs="*", metavar="SETTING", help="NAME=value, NAME=a,b,c, NAME=low..high[:log][:points], FILE.env")
    add("--study", help="name of the study, and begin of its runs' names")
    add("--storage", help=f"database of the studies ({DEFAULT_STORAGE})")
    add("--sampler", choices=("grid", "random", "tpe"), help="default: grid, or tpe where there is a range")
    add("--trials", type=int, help="configurations that random and tpe draw (20); more of them go on with a study")
    add("--halving", metavar="STEP[:3]", help="stop all but the best third at this step, at 3 times it, and so on")
    add("--from-artifact", action="append", default=[], metavar="RUN",
        help="score what this run has left, train nothing; may be given several times")  # fmt: skip
    add("--gpus-per-trial", type=int, default=0, metavar="N", help="divide the GPUs, and run as many trials at once")
    add("--retry-failed", action="store_true", help="try again what has failed")
    add("--dry-run", action="store_true", help="print the commands, run nothing")
    add("--heartbeat", type=int, metavar="SECONDS",
        help=f"a sweeper that is silent for two of these is taken for dead ({DEFAULT_HEARTBEAT})")  # fmt: skip
    add("--alpha", type=float, default=study_table.ALPHA, help="claim differences with p below this (%(default)s)")
    add("--compare", nargs="+", metavar="SIDE",
        help="instead of a study: a baseline and others, each a text of words as above, in quotes")  # fmt: skip
    add("--seeds", help="of --compare (1-3)")
    add("--equal-steps", action="store_true", default=None, help="of --compare: leave out the runs at equal seconds")
    add("--steps", type=int, help="of --compare; default: ITERATIONS of its settings")
    add("--claim", help="of --compare: differences to plan seeds for (0.005,0.001)")
    own = list(arguments)
    command: list[str] = []
    if "--" in own:
        command = own[own.index("--") + 1 :]
        own = own[: own.index("--")]
    args = parser.parse_intermixed_args(own)
    args.command = command
    for option in OWN_OPTIONS:
        if option in command:
            parser.error(f"{option} stands after --, where the command of a run begins: put it before")
    for name, least in (("trials", 1), ("gpus_per_trial", 0), ("heartbeat", 1), ("steps", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: at least {least}")
    if not 0 < args.alpha < 1:
        parser.error(f"--alpha {args.alpha}: it lies between 0 and 1")
    if not re.fullmatch(r"(\w[\w.-]*)?", args.study or ""):
        parser.error(f"--study {args.study}: use letters, digits, '.', '_' and '-'")
    if not args.study and not args.compare:
        parser.error("give the study a name: --study NAME")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        if args.compare:
            return paired_runs.compare(args)
        args.storage = args.storage or DEFAULT_STORAGE
        args.heartbeat = args.heartbeat or DEFAULT_HEARTBEAT
        if args.words or args.command:
            return sweep(args)
        return show_study(args)
    except LaunchError as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        return 2
    except DATABASE_ERRORS as error:
        print(f"sweep.py: error: the database of {hidden(args.storage)}: {cause_of(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
