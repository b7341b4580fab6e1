"""Forecasts where a training that is under way will end: when, after how many steps, and at which loss. For watch.py.

Where a finished run with the same schedule stands beside it, that run's end is moved by how far apart the two have been
so far. Otherwise the loss after s of N steps is taken to be L0 + A (s / N)^-a + B r, with the learning-rate scale r: a
power law, and the noise that a high rate keeps up (after Tissue, Wang and Wang 2024, arXiv:2408.11029). How much the
fall of the rate will bring, B, can only be seen once it falls: until then it is what runs of this project had, and the
forecast says how little it knows."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from runs import Run, t

LEAST_POINTS = 6  # of a fit
LEAST_PART = 0.2  # of all steps, before which nothing is forecast
FIRST_PART = 0.1  # of the steps so far; the law does not describe them
# Nats by which the law itself may be wrong for each doubling of the steps that is still to come. With it, the end of
# six trainings of 60 and 300 steps was within 2.6 spreads, from a fifth to nine tenths of the steps (2026-11-29).
LAW_ERROR = 0.15
EXPONENTS = np.linspace(0.2, 1.4, 13)
# What is known of L0, A and B before any step, as means and standard deviations in nats; of L0 below the loss so far.
# B was 0.33 to 0.39 in four runs of 300 steps (records/README.md#fidelity).
BEFORE = ((-0.3, 3.0), (0.3, 1.0), (0.3, 0.15))
SCHEDULE = "iterations max_wallclock_seconds warmdown_frac warmdown_iters train_batch_tokens train_seq_len vocab_size"
SCHEDULE += " recur_layers recur_start_frac"


class Forecast(NamedTuple):
    """Where a training will end. Times are in seconds since 1970."""

    training_ends: float
    last_step: int
    score_is_there: float | None  # export and the scores before it not counted
    loss: float | None  # nats a token
    spread: float  # its standard deviation, as far as can be told
    how: str


def forecast(run: Run, others: list[Run], now: float) -> Forecast | None:
    """Return where the training of a run will end, or None where it is over or has not begun."""
    if (
        not run.train
        or run.last("trained")
        or "raw" in run.scores
        or not {"iterations", "warmdown_frac"} <= run.config.keys()
    ):
        return None
    seconds_left, last_step = remaining(run)
    ends = run.last("train", "resumed").get("time", now) + seconds_left  # logs before 2026-11-29 have no time
    plan = run.last("plan")
    score = None
    if plan:
        score = ends + plan["scoring_seconds"] + plan["epochs"] * plan["epoch_seconds"]
    loss, spread, how = loss_by_comparison(run, others) or loss_by_law(run, last_step) or (None, 0.0, "")
    return Forecast(ends, last_step, score, loss, spread, how)


def remaining(run: Run) -> tuple[float, int]:
    """Return the seconds and the last step of the training, at the pace so far, by the script's own clock."""
    settings = {name: knob.default for name, knob in t.Hyperparameters.knobs().items()}  # an old log may lack some
    settings |= {name: value for name, value in run.config.items() if name in settings}
    budget = t.training_budget(SimpleNamespace(predicted_seconds={}, **settings)) or math.inf
    last = run.train[-1]
    reached = run.last("train", "resumed")  # of a resumed run, where its checkpoint was
    longer = run.last("recurrence")  # from which on RECUR_LAYERS run twice in a step
    begin = longer or {"step": 0, "seconds": 0.0}
    half = begin["step"] + (last["step"] - begin["step"]) // 2
    before = next((e for e in reversed(run.train) if begin["step"] <= e["step"] <= half), begin)
    pace = (last["seconds"] - before["seconds"]) / max(1, last["step"] - before["step"])
    steps = run.config["iterations"] - reached["step"]
    left = budget - reached["seconds"]
    num_twice = len(settings["recur_layers"].split(",")) if settings["recur_layers"] and not longer else 0
    now = steps  # steps at this pace; the others are longer
    if num_twice:
        now = round(settings["recur_start_frac"] * run.config["iterations"]) - reached["step"]
        if pace and math.isfinite(budget):
            now = min(now, int((settings["recur_start_frac"] * budget - reached["seconds"]) / pace))
        now = min(steps, max(0, now))
    later_pace = pace * (1 + num_twice / settings["num_layers"])
    if pace and math.isfinite(budget):
        now = min(now, max(0, int(left / pace)))
        steps = min(steps, now + max(0, int((left - now * pace) / later_pace)))
    steps = max(0, steps)
    return now * pace + (steps - now) * later_pace, int(reached["step"] + steps)


def loss_by_comparison(run: Run, others: list[Run]) -> tuple[float, float, str] | None:
    """Return the validation loss of the raw weights at the end, its spread, and how it was found: that of a finished
    run with the same schedule, and the mean difference of the train losses in the second half of the steps so far."""
    for other in others:
        if "raw" not in other.scores or any(run.config.get(n) != other.config.get(n) for n in SCHEDULE.split()):
            continue
        theirs = {event["step"]: event["train_loss"] for event in other.train}
        half = run.train[-1]["step"] / 2
        apart = [e["train_loss"] - theirs[e["step"]] for e in run.train if e["step"] >= half and e["step"] in theirs]
        if len(apart) >= 3:
            how = f"validation loss of the raw weights, if it stays {np.mean(apart):+.3f} from {other.name}"
            return other.scores["raw"]["val_loss"] + float(np.mean(apart)), float(np.std(apart, ddof=1)), how
    return None


def loss_by_law(run: Run, last_step: int) -> tuple[float, float, str] | None:
    """Return the train loss at the end, its spread, and how it was found."""
    step = run.train[-1]["step"]
    begin = FIRST_PART * step
    points = [(e["step"], e["train_loss"], e.get("lr_scale", 1.0)) for e in run.train if e["step"] >= begin]
    if len(points) < LEAST_POINTS or step < LEAST_PART * last_step:
        return None
    steps, losses, rates = np.array(points, dtype=float).T
    loss, spread = follow_law(steps / last_step, losses, rates)
    spread = math.hypot(spread, LAW_ERROR * math.log2(max(1.0, last_step / step)))
    return loss, spread, "train loss, by a power law of the steps and the learning rate"


def follow_law(parts: np.ndarray, losses: np.ndarray, rates: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation of the loss where part and rate of the law are 1 and 0, given losses before:
    Bayesian linear regression for each exponent, averaged over exponents by their evidence."""
    noise = max(1e-8, float(np.median(np.diff(losses) ** 2)) / 0.91)  # variance: the median of 2 chi^2 is 0.91
    centre = np.array([mean for mean, _ in BEFORE])
    centre[0] += losses[-5:].mean()
    prior = np.diag([deviation**-2 for _, deviation in BEFORE])
    end = np.array([1.0, 1.0, 0.0])
    means, variances, evidences = [], [], []
    for exponent in EXPONENTS:
        columns = np.stack([np.ones_like(parts), parts**-exponent, rates], axis=1)
        precision = columns.T @ columns / noise + prior
        weights = np.linalg.solve(precision, columns.T @ losses / noise + prior @ centre)
        errors, moved = losses - columns @ weights, weights - centre
        means.append(end @ weights)
        variances.append(end @ np.linalg.solve(precision, end))
        evidences.append(-0.5 * (errors @ errors / noise + moved @ prior @ moved + np.linalg.slogdet(precision)[1]))
    shares = np.exp(np.array(evidences) - max(evidences))
    shares /= shares.sum()
    mean = float(shares @ means)
    variance = float(shares @ (np.array(variances) + (np.array(means) - mean) ** 2))
    return mean, math.sqrt(variance)
