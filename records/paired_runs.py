"""Settings, compared honestly: common seeds, alternating on one machine, at equal steps and at equal seconds.

    python records/sweep.py --compare A.env "A.env MLP_MULT=4" --seeds 1-4 -- python train_gpt.py

For sweep.py. Each side is a text of words as a shell has them: files of settings, and NAME=value. The first one, A, is
the baseline of all others: B, C, … For each seed there are runs of A, of A again, and of each other side, of which A
again shows how far this machine repeats itself; where its first one is the same to the last bit, the others are left
out. Then each other side is run for as many steps as fit into the seconds of A, unless only equal steps are asked for.

The same command again goes on where this one was stopped; more seeds use the runs that are there."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import shlex
import signal
import statistics
import string
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import study_table
from launch import (
    LOGS,
    LaunchError,
    Process,
    Result,
    as_command,
    catch_signals,
    check_command,
    join_settings,
    read_artifacts,
    read_result,
    read_seeds,
    t,
)
from significance import (
    POWER,
    PairedTest,
    finite,
    holm,
    load,
    paired,
    paired_seeds_needed,
    percent,
    smallest_difference,
    summarize,
)

POLL_SECONDS = 0.5
SAME_TIME = 0.01  # seconds of a step that differ by less than this part of them are the same
UNLIMITED = {"MAX_WALLCLOCK_SECONDS": "0"}


class Stopped(Exception):
    """A signal has asked this process to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class Comparison:
    """The runs of two or more sides. An arm is a side ("B"), A again ("again"), or a side at A's seconds
    ("B-seconds")."""

    name: str
    command: list[str]
    sides: dict[str, dict[str, str]]  # A, B, … -> settings of train_gpt.py
    others: dict[str, dict[str, str]]  # A, B, … -> other variables that their files set
    replicates: dict[str, dict[str, str]]  # name -> settings of a run of either side
    steps: int | None  # None where nothing is trained
    at_equal_seconds: bool = True
    results: dict[str, dict[str, Result]] = field(default_factory=dict)  # arm -> replicate -> result
    equal_seconds_steps: dict[str, int] = field(default_factory=dict)  # side -> steps

    def scores(self, arm: str) -> dict[str, float]:
        return {name: result.val_bpb for name, result in self.results.get(arm, {}).items()}

    def settings(self, arm: str, replicate: str) -> dict[str, str]:
        """Return the settings of a run of an arm."""
        settings = self.sides[side_of(arm)] | self.replicates[replicate]
        if self.steps:
            steps = self.equal_seconds_steps[side_of(arm)] if arm.endswith("-seconds") else self.steps
            settings |= UNLIMITED | {"ITERATIONS": str(steps)}
        return settings

    def variables(self, arm: str, replicate: str) -> dict[str, str]:
        """Return the same, with what else the files of the side set."""
        return self.others[side_of(arm)] | self.settings(arm, replicate)

    @property
    def candidates(self) -> list[str]:
        """The sides that are compared with A."""
        return [side for side in self.sides if side != "A"]

    def order(self) -> list[tuple[str, str]]:
        """Return (arm, replicate) of the runs at equal steps: the sides change places from seed to seed."""
        order = []
        for index, replicate in enumerate(self.replicates):
            baseline = ["A", "again"]
            arms = baseline + self.candidates if index % 2 == 0 else self.candidates + baseline
            order += [(arm, replicate) for arm in arms]
        return order

    def has_begun(self, arm: str, replicate: str) -> bool:
        return (LOGS / run_id(self, arm, replicate)).exists()

    @property
    def repeats_itself(self) -> bool:
        """Whether A again has given the same score as A, to the last bit."""
        again = self.scores("again")
        return bool(again) and all(self.scores("A").get(name) == score for name, score in again.items())


def side_of(arm: str) -> str:
    """Return the side whose settings an arm has."""
    return "A" if arm == "again" else arm.removesuffix("-seconds")


def compare(args: argparse.Namespace) -> int:
    """Run what is missing of a comparison, write its table, and return the exit status."""
    comparison = plan(args)
    if args.dry_run:
        for arm, replicate in comparison.order():
            settings = comparison.variables(arm, replicate) | {"RUN_ID": run_id(comparison, arm, replicate)}
            print(as_command(settings, args.command))
        if comparison.at_equal_seconds:
            print("# then the others for the steps that take as long as A's, where their steps take longer or shorter")
        return 0
    claims = read_claims(args.claim)
    catch_signals(raise_stopped)
    folder = study_table.folder_of(comparison.name)
    (folder / "lock").mkdir(parents=True, exist_ok=True)
    try:
        with t.lock(folder / "lock"):
            status = run_all(comparison)
    except t.UserError:
        raise LaunchError(f"another process works on the comparison {comparison.name}: wait for its end") from None
    except Stopped as stopped:
        print(f"stopped by {stopped}: the same command goes on")
        return 128 + stopped.number
    if comparison.scores("A") and any(comparison.scores(side) for side in comparison.candidates):
        text = "\n".join(table(comparison, args.alpha, claims))
        t.write_atomically(folder / "compare.md", text.encode())
        t.write_atomically(folder / "compare.csv", as_csv(comparison).encode())
        print(text)
        print(f"wrote {folder}/compare.md, compare.csv")
    return status


def raise_stopped(number: int, _: Any) -> None:
    raise Stopped(number)


def plan(args: argparse.Namespace) -> Comparison:
    """Return the comparison that the command line asks for. Raise LaunchError where it cannot be one."""
    if args.words:
        raise LaunchError(
            f"{args.words[0]}: with --compare all settings belong to a side, in quotes: 'A.env {args.words[0]}'"
        )
    for name in ("storage", "heartbeat", "trials", "halving", "sampler", "gpus_per_trial", "retry_failed"):
        if getattr(args, name):
            raise LaunchError(f"--{name.replace('_', '-')} is of a study, and has no effect on --compare")
    check_command(args.command, 0)
    most = len(string.ascii_uppercase)
    if not 2 <= len(args.compare) <= most:
        raise LaunchError(f"--compare has {len(args.compare)} sides: give 2 to {most}, each in quotes")
    sides, others = {}, {}
    for name, words in zip(string.ascii_uppercase, args.compare):
        sides[name], others[name] = join_settings(words_of(words))
        for knob, option in (("SEED", "--seeds"), ("EVAL_ONLY", "--from-artifact")):
            if knob in sides[name]:
                raise LaunchError(f"{knob} is of both sides: give it by {option}")
    steps = None
    if args.from_artifact:
        replicates = read_artifacts(args.from_artifact)
    else:
        replicates = {f"seed{seed}": {"SEED": str(seed)} for seed in read_seeds(args.seeds or "1-3")}
        given = {side.get("ITERATIONS") for side in sides.values()}
        if args.steps is None and (given == {None} or len(given) > 1):
            raise LaunchError("equal steps: give their number by --steps, or by the same ITERATIONS on all sides")
        steps = args.steps or int(given.pop())
    if len(args.compare) > 2 and not args.study:
        sides = "; ".join(args.compare)
        raise LaunchError(f"--compare has {len(args.compare)} sides ({sides}): quote each, and give a name by --study")
    name = args.study or "-vs-".join(short_name(words) for words in args.compare)
    comparison = Comparison(name, args.command, sides, others, replicates, steps, not args.equal_steps)
    check_sides_differ(comparison, args.compare)
    return comparison


def check_sides_differ(comparison: Comparison, given: list[str]) -> None:
    """Raise LaunchError where two sides, given by these words, are the same."""
    first = next(iter(comparison.replicates))
    variables = {side: comparison.variables(side, first) for side in comparison.sides}
    for (a, words_a), (b, words_b) in itertools.combinations(zip(comparison.sides, given), 2):
        if variables[a] == variables[b]:
            told = "; both run for the same steps, without a limit of time" if comparison.steps else ""
            raise LaunchError(f"--compare: {a} and {b} have the same settings ({words_a}; {words_b}){told}")


def words_of(side: str) -> list[str]:
    """Return the words of a side, as a shell has them."""
    try:
        return shlex.split(side)
    except ValueError as error:
        raise LaunchError(f"--compare {side}: {error}") from None


def short_name(words: str) -> str:
    """Return a side's words as part of a run's name."""
    parts = [Path(word).stem if word.endswith(".env") else word for word in words_of(words)]
    return re.sub(r"[^\w.-]+", "-", "-".join(parts)) or "defaults"


def read_claims(text: str | None) -> list[float]:
    """Return the differences to plan seeds for, in bits per byte."""
    try:
        claims = [float(part) for part in (text or "0.005,0.001").split(",")]
    except ValueError:
        claims = []
    if not claims or not all(math.isfinite(claim) and claim > 0 for claim in claims):
        raise LaunchError(f"--claim {text}: give differences in bits per byte, as 0.005,0.001")
    return claims


# =================================================== runs ============================================================
def run_id(comparison: Comparison, arm: str, replicate: str) -> str:
    return f"{comparison.name}-{arm}-{replicate}"


def run_all(comparison: Comparison) -> int:
    """Run all that is missing. Return 0, or 1 where a run failed."""
    if comparison.steps:
        limits = {side.get("MAX_WALLCLOCK_SECONDS") for side in comparison.sides.values()} - {None, "0"}
        told = f"; MAX_WALLCLOCK_SECONDS={limits.pop()} does not count" if limits else ""
        print(f"{comparison.steps:,} steps a run, without a limit of time{told}", flush=True)
    for arm, replicate in comparison.order():
        is_needless = arm == "again" and comparison.repeats_itself
        if not is_needless and not run(comparison, arm, replicate):
            return 1
    if not comparison.steps or not comparison.at_equal_seconds:
        return 0
    for side in comparison.candidates:
        comparison.equal_seconds_steps[side] = kept_steps(comparison, side)
        if comparison.equal_seconds_steps[side] == comparison.steps:
            continue
        for replicate in comparison.replicates:
            if not run(comparison, f"{side}-seconds", replicate):
                return 1
    return 0


def run(comparison: Comparison, arm: str, replicate: str) -> bool:
    """Do a run, or find it done. Return whether it has a result."""
    name = run_id(comparison, arm, replicate)
    settings = comparison.settings(arm, replicate)
    output = study_table.folder_of(comparison.name) / "output" / f"{name}.txt"
    process = Process(name, comparison.variables(arm, replicate), comparison.command, output, {})
    was_there = process.is_finished()
    if not was_there:
        print(f"{name} begins, {process.folder}", flush=True)
    try:
        while process.poll() in ("running", "busy"):
            time.sleep(POLL_SECONDS)
    except Stopped:
        process.stop()
        while process.poll() == "running":
            time.sleep(POLL_SECONDS)
        raise
    if not process.is_finished():
        print(f"{name} FAILED\n{process.last_lines()}\nthe same command goes on", flush=True)
        return False
    result = read_result(process.folder, settings)
    comparison.results.setdefault(arm, {})[replicate] = result
    told = ", was there already" if was_there else ""
    print(f"{name} has {result.val_bpb:.5f} bits per byte{told}", flush=True)
    return True


def kept_steps(comparison: Comparison, side: str) -> int:
    """Return a side's steps at equal seconds: those of the runs that are there, so that more seeds can be added; new
    ones where the comparison is another one."""
    arm = f"{side}-seconds"
    path = study_table.folder_of(comparison.name) / f"equal_seconds-{side}.json"
    of = {"steps": comparison.steps, "A": comparison.sides["A"], side: comparison.sides[side]}
    there = any(comparison.has_begun(arm, name) for name in comparison.replicates)
    if path.exists() and there:
        try:
            kept = load(path)
            if kept.get("of") == of:
                return max(1, int(finite(kept.get("steps"), f"steps in {path}")))
        except ValueError as error:
            raise LaunchError(f"{error}: remove the file, and the runs {comparison.name}-{arm}-*") from None
    steps = steps_of_equal_seconds(comparison, side)
    t.write_atomically(path, json.dumps({"steps": steps, "of": of}).encode())
    return steps


def steps_of_equal_seconds(comparison: Comparison, side: str) -> int:
    """Return how many steps of a side take the seconds of A's training, calibrations with them.

    By the median over seeds of how much longer its steps take, as runs of a seed are neighbours in time. A's number of
    steps where that is not longer at every seed, nor shorter at every seed."""
    step_seconds = {}
    calibration = {}
    for arm in ("A", side):
        results = comparison.results[arm].items()
        step_seconds[arm] = {name: (r.train_seconds - r.calibration_seconds) / r.steps for name, r in results}
        calibration[arm] = statistics.median(r.calibration_seconds for _, r in results)
    ratios = [step_seconds[side][name] / seconds for name, seconds in step_seconds["A"].items()]
    is_mixed = min(ratios) < 1 + SAME_TIME and max(ratios) > 1 - SAME_TIME
    if is_mixed and calibration["A"] == calibration[side]:
        return comparison.steps
    own = statistics.median(step_seconds["A"].values())
    budget = calibration["A"] + comparison.steps * own
    return max(1, round((budget - calibration[side]) / (own * statistics.median(ratios))))


# =================================================== table ===========================================================
def differences(comparison: Comparison, candidate: str, baseline: str) -> list[float]:
    """Return the differences by replicate of two arms."""
    ours, theirs = comparison.scores(candidate), comparison.scores(baseline)
    return [ours[name] - theirs[name] for name in ours if name in theirs]


def table(comparison: Comparison, alpha: float, claims: Sequence[float]) -> list[str]:
    """Return the comparison as lines of Markdown."""
    tests = {"A again - A": paired(differences(comparison, "again", "A"), alpha)} if comparison.scores("again") else {}
    at = f" at {comparison.steps:,} steps each" if comparison.steps else ""
    equal_steps, equal_seconds = {}, {}
    for side in comparison.candidates:
        if comparison.scores(side):
            equal_steps[f"{side} - A{at}"] = paired(differences(comparison, side, "A"), alpha)
        if comparison.scores(f"{side}-seconds"):
            name = f"{side} - A at equal seconds: {comparison.equal_seconds_steps[side]:,} steps of {side}"
            equal_seconds[name] = paired(differences(comparison, f"{side}-seconds", "A"), alpha)
    head = ["bits per byte", "seeds", "difference", f"{percent(1 - alpha)} interval", "p"]
    rows = [row_of(name, test, test.p) for name, test in tests.items()]
    for family in (equal_steps, equal_seconds):
        rows += [row_of(name, test, p) for (name, test), p in zip(family.items(), adjusted(family.values()))]
    lines = [f"**{comparison.name}**", ""]
    lines += [f"{side}: {settings}  " for side, settings in different_settings(comparison).items()]
    lines += ["", *study_table.markdown(head, rows), "", *seed_table(comparison), ""]
    return [*lines, *notes(comparison, list(equal_steps.values()), alpha, claims)]


def adjusted(tests: Collection[PairedTest]) -> list[float | None]:
    """Return the p of tests, adjusted for their number (Holm 1979)."""
    known = [test.p for test in tests if test.p is not None]
    corrected = iter(holm(known))
    return [None if test.p is None else next(corrected) for test in tests]


def row_of(name: str, test: PairedTest, p: float | None) -> list[str]:
    """Return a row of the table."""
    if p is None:
        reason = "the same to the last bit" if test.mean == 0 else test.reason
        return [name, str(test.n), f"{test.mean:+.5f}", reason, ""]
    return [name, str(test.n), f"{test.mean:+.5f}", f"{test.low:+.5f} to {test.high:+.5f}", f"{p:.2g}"]


def seed_table(comparison: Comparison) -> list[str]:
    """Return the scores of each run, and the mean seconds of each side, as lines of Markdown."""
    arms = ["A", "again", *comparison.candidates, *(f"{side}-seconds" for side in comparison.candidates)]
    rows = []
    for arm in arms:
        results = comparison.results.get(arm, {})
        if not results:
            continue
        scores = [f"{results[name].val_bpb:.5f}" if name in results else "" for name in comparison.replicates]
        seconds = statistics.mean(result.train_seconds or result.eval_seconds for result in results.values())
        if arm == "again":
            rows.append(["A again", *scores, ""])
        else:
            rows.append([arm.replace("-seconds", ", equal seconds"), *scores, f"{seconds:.1f}"])
    return study_table.markdown(["", *comparison.replicates, "seconds"], rows)


def different_settings(comparison: Comparison) -> dict[str, str]:
    """Return for each side the settings in which it differs from A, with defaults where it does not set them; for A,
    those in which any other does."""
    knobs = t.Hyperparameters.knobs()
    baseline = comparison.sides["A"]
    names = {}
    for side in comparison.candidates:
        settings = comparison.sides[side]
        names[side] = [n for n in sorted(baseline.keys() | settings.keys()) if baseline.get(n) != settings.get(n)]
    names = {"A": sorted(set(itertools.chain.from_iterable(names.values())))} | names
    return {
        side: " ".join(f"{n}={comparison.sides[side].get(n, knobs[n.lower()].default)}" for n in own)
        for side, own in names.items()
    }


def notes(comparison: Comparison, tests: list[PairedTest], alpha: float, claims: Sequence[float]) -> list[str]:
    """Return the noise, what the comparison could show, and what differs that should not. The tests are those of the
    other sides against A at equal steps."""
    lines = []
    if comparison.repeats_itself:
        again = ", ".join(comparison.scores("again"))
        lines.append(
            f"A again ({again}) is the same as A to the last bit: seeds make the noise, this machine does not."
        )
    if len(tests) > 1:
        lines.append(f"p: adjusted for {len(tests)} comparisons with A (Holm 1979); intervals are not.")
    spread = summarize(list(comparison.scores("A").values()))
    stds = [test.std for test in tests if not math.isnan(test.std)]
    if spread.n > 1 and stds:
        std = statistics.median(stds)
        of = "the differences one of" if len(stds) == 1 else f"the differences have {min(stds):.5f} to"
        lines.append(
            f"Noise: A has a standard deviation of {spread.std:.5f} over {spread.n} seeds, {of} {max(stds):.5f}."
        )
        if std:
            lines += what_shows(tests, std, alpha, claims)
    everything = [result for results in comparison.results.values() for result in results.values()]
    lines += study_table.incomparable([result._asdict() for result in everything])
    lines.append(f"Machine: {everything[0].machine}")
    return lines


def what_shows(tests: list[PairedTest], std: float, alpha: float, claims: Sequence[float]) -> list[str]:
    """Return which differences so many seeds would show at this standard deviation, and how many others would need."""
    n = max(test.n for test in tests)
    shown = smallest_difference(n, std, alpha)
    needed = {f"{claim:g}": paired_seeds_needed(claim, std, alpha) for claim in claims}
    if len(tests) == 1 and tests[0].mean:
        needed[f"{abs(tests[0].mean):.5f}, as measured"] = paired_seeds_needed(tests[0].mean, std, alpha)
    texts = [f"{count or 'over 1000'} for {claim}" for claim, count in needed.items()]
    return [
        f"{n} seeds would show a difference of {shown:.5f} {percent(POWER)} of the time (p < {alpha}).",
        f"Seeds needed for that: {'; '.join(texts)}.",
    ]


def as_csv(comparison: Comparison) -> str:
    """Return a row for each run, numbers in full."""
    rows = [
        [arm, replicate, *result]
        for arm, results in comparison.results.items()
        for replicate, result in results.items()
    ]
    return study_table.as_csv(["arm", "replicate", *Result._fields], rows)
