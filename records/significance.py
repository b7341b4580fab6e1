"""Compares runs over seeds: mean, sample standard deviation, and Welch's test as the challenge's rules ask for it.

    python records/significance.py logs/a logs/b logs/c                      # the summary of three runs
    python records/significance.py logs/a logs/b logs/c --against FOLDER     # and the tests against other runs

A path is a run's folder, a submission's folder, or a JSON file as in one. A new record has to be better by at least
0.005 nats at p < 0.01, so there are two one-sided tests: that the mean is lower at all, and that it is lower by more
than 0.005 nats per token. Nats per token do not compare across tokenizers, bits per byte do: the tests are done in the
latter, the margin converted by the candidate's own tokens. Nats per byte are bits per byte times ln 2, the same test.
No seed is ever left out: one that is there twice, is missing or has no number is an error, and the exit status 2.
Where seeds are common, there is also the paired test: two-sided, with an interval of confidence 1 - alpha."""

from __future__ import annotations

import argparse
import bisect
import json
import math
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import available_packages  # noqa: F401
import numpy as np
from challenge import ALPHA, MARGIN
from scipy import optimize, stats

POWER = 0.8  # the usual chance of success that an experiment is planned for (Cohen 1988)
MAX_SEEDS = 1000  # seeds_needed looks no further
# val_bpb / val_loss is the number of tokens per byte, over ln 2. In the published scores it differs by up to 0.04%
# within one tokenizer, and by 5% and more between the tokenizers of the challenge.
SAME_TOKENS = 1e-3
MAX_BYTES = 10_000_000  # of a JSON file; published ones have a few thousand
UNITS = ("bits_per_byte", "nats_per_token", "nats_per_byte")


class Score(NamedTuple):
    seed: int
    val_bpb: float
    val_loss: float | None  # nats per token; many published folders do not have it by seed


class Summary(NamedTuple):
    mean: float
    std: float  # of the sample, ddof = 1; nan with one value, which shows no spread
    n: int


class WelchTest(NamedTuple):
    t: float | None  # None, like df and p, where no test is possible
    df: float | None
    p: float | None
    reason: str = ""  # why there is no test


class PairedTest(NamedTuple):
    """Of differences by seed: their mean, sample standard deviation, confidence interval, and two-sided p."""

    n: int
    mean: float
    std: float  # nan with one
    low: float | None = None  # None, like high and p, where no test is possible
    high: float | None = None
    p: float | None = None
    reason: str = ""  # why there is no test


def finite(value: Any, what: str) -> float:
    """Returns a number as a float; raises ValueError where it is none, or is not finite."""
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{what} is {str(value)[:40]!r}: a finite number is needed")
    return number


def percent(share: float) -> str:
    """Returns a share as text, with all of its digits: 95%, 99.9%."""
    return f"{100 * share:g}%"


def summarize(values: Sequence[float]) -> Summary:
    """Returns mean, sample standard deviation (ddof = 1, nan with one value) and number of the values."""
    values = [finite(value, "a score") for value in values]
    if not values:
        raise ValueError("there are no scores: at least one is needed")
    return Summary(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan, len(values))


def welch(candidate: Sequence[float], baseline: Sequence[float], margin: float = 0.0) -> WelchTest:
    """Returns Welch's t, its degrees of freedom and the one-sided p of "candidate is lower by more than margin".

    Scores and margin are in one unit; the variances need not be equal (Welch 1947). Small p: candidate is better."""
    if finite(margin, "the margin") < 0:
        raise ValueError(f"the margin is {margin}: it must not be negative, lower scores are better")
    for name, side in (("candidate", summarize(candidate)), ("baseline", summarize(baseline))):
        if side.n < 2:
            return WelchTest(None, None, None, f"the {name} has one seed, and its spread needs at least 2")
        if side.std == 0:
            return WelchTest(None, None, None, f"the scores of the {name} are all equal, like copies of one run")
    shifted = np.asarray(candidate, dtype=float) + margin
    test = stats.ttest_ind(shifted, np.asarray(baseline, dtype=float), equal_var=False, alternative="less")
    return WelchTest(float(test.statistic), float(test.df), float(test.pvalue))


def welch_power(n: int, effect: float, alpha: float = ALPHA) -> float:
    """Returns how often Welch's test gives p < alpha with n seeds on each side whose true means are effect standard
    deviations apart, beyond the margin.

    Exact for normal scores of equal variance: t then follows the noncentral t distribution with 2(n - 1) degrees of
    freedom, whatever the ratio of the two sample variances is. That ratio, of an F distribution, gives Welch's own
    degrees of freedom, which at n = 2 can halve the power. The mean over it is taken at 200 of its quantiles."""
    ratio = stats.f.ppf((np.arange(200) + 0.5) / 200, n - 1, n - 1)
    critical = stats.t.isf(alpha, (n - 1) * (1 + ratio) ** 2 / (1 + ratio**2))
    return float(stats.nct.sf(critical, 2 * (n - 1), effect * math.sqrt(n / 2)).mean())


def seeds_needed(
    delta: float, margin: float, std: float, alpha: float = ALPHA, power: float | None = None
) -> int | None:
    """Returns the smallest number of seeds on each side at which Welch's test gives p < alpha, None if over MAX_SEEDS.

    In truth the candidate is lower by delta and both sides have this standard deviation. Without power: t is what it
    is expected to be, which real comparisons miss about half the time. With it: that share of them gives p < alpha."""
    if not (finite(std, "the standard deviation") > 0 and 0 < alpha < 1 and (power is None or 0 < power < 1)):
        raise ValueError(f"std {std}, alpha {alpha}, power {power}: need std over 0, the others between 0 and 1")
    effect = (finite(delta, "the difference") - finite(margin, "the margin")) / std
    for n in range(2, MAX_SEEDS + 1 if effect > 0 else 2):
        if power is None:
            enough = effect * math.sqrt(n / 2) > stats.t.isf(alpha, 2 * (n - 1))
        else:
            enough = welch_power(n, effect, alpha) >= power
        if enough:
            return n
    return None


# ------------------------------------------------------------------------------------------------- paired by seed


def paired(differences: Sequence[float], alpha: float = ALPHA) -> PairedTest:
    """Returns the paired t-test (Student 1908) of differences between runs of common seeds: the mean with its interval
    at confidence 1 - alpha, and the two-sided p of "there is none"."""
    mean, std, n = summarize(differences)
    if n < 2:
        return PairedTest(n, mean, std, reason="one common seed shows no spread: at least 2 are needed")
    if std == 0:
        return PairedTest(n, mean, std, reason="the differences are all equal, as of settings without effect")
    error = std / math.sqrt(n)
    reach = float(stats.t.isf(alpha / 2, n - 1)) * error
    return PairedTest(n, mean, std, mean - reach, mean + reach, float(2 * stats.t.sf(abs(mean) / error, n - 1)))


def paired_power(n: int, effect: float, alpha: float = ALPHA) -> float:
    """Returns how often the paired test of n seeds gives p < alpha, with the right sign, where the true difference is
    effect standard deviations of the differences. Exact for normal ones (noncentral t)."""
    return float(stats.nct.sf(stats.t.isf(alpha / 2, n - 1), n - 1, abs(effect) * math.sqrt(n)))


def paired_seeds_needed(delta: float, std: float, alpha: float = ALPHA, power: float = POWER) -> int | None:
    """Returns the smallest number of common seeds at which the paired test shows a difference of delta with this power,
    std being the standard deviation of the differences. None if over MAX_SEEDS."""
    if not finite(std, "the standard deviation") > 0:
        raise ValueError(f"the standard deviation is {std}: it must be over 0")
    effect = finite(delta, "the difference") / std
    counts = range(2, MAX_SEEDS + 1)  # the power grows with them
    place = bisect.bisect_left(counts, power, key=lambda n: paired_power(n, effect, alpha))
    return counts[place] if place < len(counts) else None


def smallest_difference(n: int, std: float, alpha: float = ALPHA, power: float = POWER) -> float:
    """Returns the difference that n common seeds would show with this power."""
    high = 1.0
    while paired_power(n, high, alpha) < power:
        high *= 2
    return std * optimize.brentq(lambda effect: paired_power(n, effect, alpha) - power, 0.0, high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values adjusted for their number (Holm 1979): the chance of any false claim among all that are
    below alpha is at most alpha."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


# ------------------------------------------------------------------------------------------------------ reading scores


def load(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, which must not hold NaN, infinities or a key twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            raise ValueError(f"{statistics.mode(keys)[:40]!r} is there twice in one object")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    if not path.is_file():
        raise ValueError(
            f"{path} is no file: a folder needs a submission.json, which a run writes when it has finished"
        )
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        document = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once, parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: thousands of brackets
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds a {type(document).__name__}: an object is needed")
    return document


def file_of(path: str | Path) -> Path:
    """Returns the JSON file that a run's folder or a submission's folder is meant by."""
    path = Path(path)
    return path / "submission.json" if path.is_dir() else path


def by_seed(document: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Returns (seed, its entry) as the file has them, in one of the forms that submissions use."""
    seeds, listed = document.get("seeds"), document.get("seed_scores")
    results = document.get("seed_results", seeds if isinstance(seeds, dict) else None)  # seeds: pull request 1514
    if isinstance(results, dict) and results:
        return list(results.items())
    if results is None and isinstance(seeds, list) and isinstance(listed, list) and len(seeds) == len(listed) > 0:
        return [(seed, {"val_bpb": score}) for seed, score in zip(seeds, listed)]  # the submission of 2026-04-03
    if results is None and "seed" in document:  # one run
        return [(document["seed"], document)]
    raise ValueError("there are no scores by seed (seed_results, or seed): a mean alone shows no spread")


def read_seed(value: Any) -> int:
    """Returns a seed that is an integer, or text with one: 42, "42", "seed_42"."""
    match = re.fullmatch(r"(?:seed[_ ]?)?(-?[0-9]{1,20})", str(value))
    if not match:
        raise ValueError(f"{str(value)[:40]!r} stands where a seed is needed")
    return int(match[1])


def check_seeds(scores: Sequence[Score]) -> None:
    """Raises ValueError where a seed is there twice, only some have a val_loss, or the tokens differ."""
    seeds = [score.seed for score in scores]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seed {statistics.mode(seeds)} is there twice: every seed counts once, none is left out")
    ratios = {score.seed: score.val_bpb / score.val_loss for score in scores if score.val_loss is not None}
    without = [seed for seed in seeds if ratios and seed not in ratios]
    if without:
        raise ValueError(f"seed {without[0]} has no val_loss, others have: give it for all of them")
    if ratios and max(ratios.values()) > min(ratios.values()) * (1 + SAME_TOKENS):
        odd = [max(ratios, key=ratios.__getitem__), min(ratios, key=ratios.__getitem__)]
        raise ValueError(f"seeds {odd[0]} and {odd[1]} differ in val_bpb / val_loss: other tokens are another sample")


def read_scores(path: str | Path) -> list[Score]:
    """Returns the score of every seed in a run's folder, a submission's folder or a JSON file in the form of theirs.

    Raises ValueError, with the path, for a seed that is there twice, is missing or has no positive score."""
    path = file_of(path)
    document, scores = load(path), []
    try:
        for key, entry in by_seed(document):
            seed = read_seed(key)
            if not isinstance(entry, dict):
                raise ValueError(f"seed {seed} has no object with a val_bpb")
            loss, bpb = entry.get("val_loss"), finite(entry.get("val_bpb"), f"val_bpb of seed {seed}")
            loss = None if loss is None else finite(loss, f"val_loss of seed {seed}")
            if bpb <= 0 or (loss is not None and loss <= 0):
                raise ValueError(f"seed {seed} has val_bpb {bpb}, val_loss {loss}: a score is over 0")
            scores.append(Score(seed, bpb, loss))
        check_seeds(scores)
        found, announced = sorted(score.seed for score in scores), document.get("seeds")
        if isinstance(announced, list) and sorted(map(read_seed, announced)) != found:
            raise ValueError(f"seeds announces {announced}, there are scores of {found}: no seed may be left out")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return scores


def pool(paths: Sequence[str | Path]) -> list[Score]:
    """Returns the scores of all paths, which are one side of a comparison."""
    scores = [score for path in paths for score in read_scores(path)]
    try:
        check_seeds(scores)
    except ValueError as error:
        raise ValueError(f"{', '.join(map(str, paths))}: {error}") from None
    return scores


def read_settings(path: str | Path) -> dict[str, Any]:
    """Returns the settings that a run says it had; none where the file is of another kind."""
    settings = load(file_of(path)).get("settings")
    own = ("run_id", "seed", "resume", "data_path", "tokenizer_path", "fallback_dir")  # of a run or a machine
    return {n: v for n, v in settings.items() if n not in own} if isinstance(settings, dict) else {}


def text_of(path: str | Path) -> str | None:
    """Returns the SHA-256 of the validation shards that a run or a submission names, None where it names none."""
    data = load(file_of(path)).get("data")
    return data.get("val_sha256") if isinstance(data, dict) else None


def varied_settings(paths: Sequence[str | Path]) -> dict[str, list[str]]:
    """Returns name -> values of the settings in which these runs differ, as text."""
    known = [settings for settings in map(read_settings, paths) if settings]
    names = sorted({name for settings in known for name in settings})
    values = {name: sorted({json.dumps(settings.get(name)) for settings in known}) for name in names}
    return {name: found for name, found in values.items() if len(found) > 1}


def show_settings(candidate: Sequence[str | Path], baseline: Sequence[str | Path]) -> list[str]:
    """Returns as lines of text in what the runs of a side differ, which they should not, and in what the sides do."""
    lines, within = [], set()
    for name, paths in (("candidate", candidate), ("baseline", baseline)):
        varied = varied_settings(paths)
        within |= varied.keys()
        if varied:
            told = "; ".join(f"{setting.upper()} {', '.join(values)}" for setting, values in varied.items())
            lines.append(f"NOT one sample: the runs of the {name} differ in {told}")
    between = {n: v for n, v in varied_settings([*candidate, *baseline]).items() if n not in within} if baseline else {}
    if between:
        first, second = read_settings(candidate[0]), read_settings(baseline[0])
        told = [f"{n.upper()} {json.dumps(first.get(n))}, not {json.dumps(second.get(n))}" for n in between]
        lines.append(f"the candidate has {'; '.join(told)}")
    return lines


# ---------------------------------------------------------------------------------------------------------- comparison


def describe(scores: Sequence[Score]) -> dict[str, Any]:
    """Returns n, seeds, {unit: mean} and {unit: sample standard deviation}, None where a figure is not known."""
    bpb, losses = [s.val_bpb for s in scores], [s.val_loss for s in scores if s.val_loss is not None]
    values = dict(zip(UNITS, (bpb, losses, [math.log(2) * score for score in bpb])))
    summaries = {unit: summarize(values[unit]) if values[unit] else None for unit in UNITS}
    means = {unit: summary and summary.mean for unit, summary in summaries.items()}
    stds = {unit: summary.std if summary and summary.n > 1 else None for unit, summary in summaries.items()}
    return {"n": len(scores), "seeds": [score.seed for score in scores], "mean": means, "std": stds}


def bpb_per_nat(side: dict[str, Any]) -> float | None:
    """Returns the bits per byte of one nat per token, None without losses."""
    bpb, loss, _ = side["mean"].values()
    return None if loss is None else bpb / loss


def compare(candidate: Sequence[Score], baseline: Sequence[Score], alpha: float = ALPHA) -> dict[str, Any]:
    """Returns both sides, their differences (below 0: the candidate is better), and the two tests; ready for JSON."""
    ours, theirs = describe(candidate), describe(baseline)
    rate, other = bpb_per_nat(ours), bpb_per_nat(theirs)
    same = None if rate is None or other is None else abs(rate / other - 1) <= SAME_TOKENS
    difference = {
        unit: ours["mean"][unit] - theirs["mean"][unit] if same or unit != "nats_per_token" else None for unit in UNITS
    }
    spreads = [side["std"]["bits_per_byte"] for side in (ours, theirs) if side["std"]["bits_per_byte"]]
    std = math.sqrt(statistics.mean(spread**2 for spread in spreads)) if spreads else None
    tests = []
    for nats in (0.0, MARGIN):
        margin = nats * rate if rate is not None else None if nats else 0.0
        test = WelchTest(None, None, None, "the candidate has no val_loss: the margin is in nats of its tokens")
        needed: dict[str, int | None] = {"expected_t": None, f"power_{POWER}": None}
        if margin is not None:
            test = welch([score.val_bpb for score in candidate], [score.val_bpb for score in baseline], margin)
        if margin is not None and std:
            for name, power in zip(needed, (None, POWER)):
                needed[name] = seeds_needed(-difference["bits_per_byte"], margin, std, alpha, power)
        passes = None if test.p is None else test.p < alpha
        margins = {"margin_nats_per_token": nats, "margin_bpb": margin}
        tests.append(margins | test._asdict() | {"passes": passes, "seeds_needed": needed})
    sides = {"candidate": ours, "baseline": theirs, "same_tokens": same}
    by_seed_there = {score.seed: score.val_bpb for score in baseline}
    pairs = [score.val_bpb - by_seed_there[score.seed] for score in candidate if score.seed in by_seed_there]
    by_seeds = paired(pairs, alpha)._asdict() if len(pairs) > 1 else None
    rest = {"difference": difference, "pooled_bpb_std": std, "tests": tests, "paired": by_seeds}
    return {"alpha": alpha, **sides, **rest}


def show_side(name: str, side: dict[str, Any]) -> list[str]:
    """Returns one side as lines of text."""
    lines = [f"{name}: n = {side['n']}, seeds {', '.join(map(str, side['seeds']))}"]
    for unit, mean in side["mean"].items():
        std = side["std"][unit]
        spread = "unknown, one seed" if std is None else f"{std:.8f}"
        lines.append(
            f"  {unit.replace('_', ' '):<15} "
            + ("no val_loss" if mean is None else f"mean {mean:.8f}  sample std {spread}")
        )
    return lines


def show_paired(test: dict[str, Any] | None, alpha: float) -> list[str]:
    """Returns the paired test as lines of text; none without common seeds."""
    if test is None:
        return []
    told = test["reason"]
    if test["p"] is not None:
        told = f"{percent(1 - alpha)} interval {test['low']:+.8f} to {test['high']:+.8f}  p {test['p']:.4g}"
    return [f"paired by the {test['n']} common seeds, two-sided: {test['mean']:+.8f}", f"    {told}"]


def show(result: dict[str, Any]) -> list[str]:
    """Returns a comparison as lines of text."""
    lines = show_side("candidate", result["candidate"]) + show_side("baseline", result["baseline"])
    unknown = "a side has no val_loss" if result["same_tokens"] is None else "not comparable: the tokens differ"
    lines.append("candidate - baseline (below 0: the candidate is better)")
    for unit, value in result["difference"].items():
        lines.append(f"  {unit.replace('_', ' '):<15} {unknown if value is None else format(value, '+.8f')}")
    lines.append("Welch's test, one-sided, in bits per byte: the candidate is lower")
    for test in result["tests"]:
        nats, margin = test["margin_nats_per_token"], test["margin_bpb"]
        converted = "" if margin is None else f" = {margin:.8f} bits per byte"
        lines.append(f"  by more than {nats} nats per token of its own{converted}" if nats else "  at all")
        if test["p"] is None:
            lines.append(f"    no test: {test['reason']}")
        else:
            verdict = ("passes" if test["passes"] else "does not pass") + f" at p < {result['alpha']}"
            lines.append(f"    t {test['t']:.3f}  df {test['df']:.3f}  p {test['p']:.4g}  {verdict}")
        if margin is not None and result["pooled_bpb_std"]:
            counts = [count or f"none up to {MAX_SEEDS}" for count in test["seeds_needed"].values()]
            lines.append(
                f"    seeds needed: {counts[0]} by the expected t, {counts[1]} to pass {POWER:.0%} of the time"
            )
    lines += show_paired(result["paired"], result["alpha"])
    if result["pooled_bpb_std"]:
        lines.append("seeds needed, on each side: if the measured difference is the true one, and the true standard")
        lines.append(f"deviation {result['pooled_bpb_std']:.8f} bits per byte, as measured")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="significance.py", description="Means and Welch's tests over seeds.")
    parser.add_argument("paths", nargs="+", help="folders of runs or submissions: the candidate")
    parser.add_argument("--against", nargs="+", metavar="PATH", help="the same of the baseline")
    parser.add_argument("--alpha", type=float, default=ALPHA, help="a test passes with p below this (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(arguments)
    if not 0 < args.alpha < 1:
        parser.error(f"--alpha {args.alpha}: it lies between 0 and 1, the rules ask for {ALPHA}")
    try:
        candidate = pool(args.paths)
        result = compare(candidate, pool(args.against), args.alpha) if args.against else describe(candidate)
    except ValueError as error:
        print(f"significance.py: error: {error}", file=sys.stderr)
        return 2
    lines = show(result) if args.against else show_side("candidate", result)
    lines += show_settings(args.paths, args.against or [])
    print(json.dumps(result, indent=2, allow_nan=False) if args.json else "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
