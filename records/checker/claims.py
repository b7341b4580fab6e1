"""Rules on what a folder claims: the headline, the seeds, the statistics."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator

from scipy import stats

from .folder import Folder, stated, states
from .logs import Log, ScoreLine, matching
from .reading import MAX_README
from .rules import Finding, further, rule
from .seconds import check_eval_time, check_train_time
from .sizes import check_size
from .submission import bpb_of, bytes_of, first, tolerance, walk

WORSE = 0.0005  # bits per byte: less is the noise of a seed
NEAR_SEED = 0.003  # bits per byte: a seed alone is no farther from the mean of several


@rule("H1", "reject", "the headline follows from the logs, the README states it", "R7, R9, #86, #1334, #2118")
def check_headline(folder: Folder) -> Iterator[Finding]:
    """H1: the headline against the mean of the results, else against what else it may be: another line, one seed."""
    claimed, found, place = bpb_of(folder.submission), folder.results(), folder.json_name
    if claimed is None or not found:
        return
    known = {log.seed for log, _ in found}
    without = (
        [bpb_of(entry) for seed, entry in folder.seeds.items() if seed not in known] if known & {*folder.seeds} else []
    )
    unknown = [value for value in without if value is not None]
    mean = statistics.fmean([score.bpb for _, score in found] + unknown)
    loss, losses = first(folder.submission, "val_loss"), [score.loss for _, score in found if score.loss is not None]
    if loss is not None and losses and not min(losses) - 0.005 <= loss <= max(losses) + 0.005:
        message = f"val_loss {loss:.8g} is claimed, the logs say {min(losses)} to {max(losses)}"
        yield Finding("H1", "warn", message, place)
    near = max(tolerance(claimed, min(score.digits[0] for _, score in found)), 2e-6)
    what = f"val_bpb {claimed:.8g} is claimed, "
    rest = [log for log in folder.logs if log not in folder.used and log.name in folder.picked]
    if abs(mean - claimed) <= near:
        if not folder.seeds and rest:
            names = f"{', '.join(log.name for log in found_logs(found)[:3])} of {len(folder.logs)} logs"
            yield Finding("H1", "warn", f"{what}that is {names}: say what the others are, or use all seeds", place)
        return
    what += f"the mean of {len(found)} logs{f' and {len(unknown)} claims' if unknown else ''} is {mean:.8g}"
    lines = {score.label for log, _ in found for score in log.finals()}
    means = {label: common_mean(found_logs(found), label) for label in lines}
    label = next((label for label, value in means.items() if value is not None and abs(value - claimed) <= near), None)
    single = any(abs(score.bpb - claimed) <= near for log in folder.logs for score in log.finals())
    if label is not None:
        yield Finding("H1", "note", f"{what}; the claim is the mean of the lines {label!r}", place)
    elif single:
        yield Finding("H1", "warn", f"{what}; the claim is a single line's: use the mean", place)
    elif (seeds := claimed_seeds(folder)) > len(found) + len(unknown) and (
        abs(mean - claimed) < NEAR_SEED or all(states(folder.readme[1], score.bpb, 4) for _, score in found)
    ):
        message = f"{what}; only {len(found)} of {seeds} seeds can be recomputed: add the other logs"
        yield Finding("H1", "warn", message, place)
    elif claimed < mean - max(near, WORSE):
        message = f"{what}, {mean - claimed:.5f} worse; no line and no mean of the logs is the claim"
        yield Finding("H1", "reject", message, place)
    else:
        yield Finding("H1", "warn", f"{what}: write what the logs say", place)


def claimed_seeds(folder: Folder) -> int:
    """Returns the number of seeds that submission.json or the README speaks of, 1 if they speak of none."""
    text = " ".join([folder.readme[1][:MAX_README], *(str(folder.submission.get(key)) for key in ("name", "blurb"))])
    said = [m[1].lower() for m in re.finditer(r"\b(\d|three|five)[- ]seeds?\b", text, re.I)]
    counts = [{"three": 3, "five": 5}.get(word) or int(word) for word in said]
    counts.append(len(re.findall(r"^\|[ *]*(?:seed )?\d{1,6}[ *]*\|.{0,200}?\b[01]\.\d{4}", text, re.M | re.I)))
    return max(1, len(folder.seeds), int(first(folder.submission, "n_seeds", "num_seeds") or 0), *counts)


def found_logs(found: list[tuple[Log, ScoreLine]]) -> list[Log]:
    """Returns the logs of some results."""
    return [log for log, _ in found]


def common_mean(logs: list[Log], label: str) -> float | None:
    """Returns the mean over logs of the last line with a label, None unless all have it."""
    found = [[score.bpb for score in log.finals() if score.label == label][-1:] for log in logs]
    return statistics.fmean(value[0] for value in found) if all(found) else None


@rule("H2", "warn", "every seed of submission.json has a log, every log is used, no seed is dropped", "R7, R9, #1769")
def check_seeds(folder: Folder) -> Iterator[Finding]:
    """H1 and H2: a log for every seed with the claimed result, a use for every log, no seed dropped."""
    known = {log.seed for log in folder.logs}
    lacking = [str(seed) for seed in folder.seeds if seed not in known]
    if lacking and folder.logs and not (None in known and len(folder.logs) >= len(folder.seeds)):
        message = f"no log of seed {', '.join(lacking[:10])}: R9 wants the log of each run that counts"
        yield Finding("H2", "warn", message, folder.json_name)
    for log in folder.logs if folder.seeds else []:
        if log.seed in folder.seeds and log.name not in folder.picked:
            message = f"seed {log.seed}: its log has no score of the stored model: it ends before"
            yield Finding("H2", "warn", message, log.name)
        if log not in folder.used and log.name in folder.picked:
            value = folder.picked[log.name].bpb
            message = f"not used by submission.json (seed {log.seed}, {value}): say why, or count it"
            yield Finding("H2", "note" if log.seed in folder.seeds else "warn", message, log.name)
    for log, score in folder.results():
        claimed = bpb_of(folder.entry(log))
        if score.file != log.name:
            message = f"seed {log.seed}: the result stands in another log than {log.name}, of an evaluation of its own"
            yield Finding("H1", "warn", message, score.file, score.line)
        elif claimed is not None and matching(log, claimed) is None:
            grade = "reject" if claimed < score.bpb - WORSE else "warn"
            message = f"seed {log.seed}: {claimed:.8g} is claimed, no line of its log says so, but {score.bpb}"
            yield Finding("H1", grade, message, log.name, score.line)
    for place, key, value in walk(folder.submission):
        if re.search(r"all_?\d*_?(?:seeds|runs)$", key) and isinstance(value, (list, dict)):
            if len(value) > len(folder.seeds) > 0:
                message = f"{place} lists {len(value)} seeds, the result is the mean of {len(folder.seeds)}: use all"
                yield Finding("H2", "warn", message, folder.json_name)


@rule("H3", "warn", "no later line of a log is worse than its result, storing the model costs little", "#1334, #863")
@rule("H4", "reject", "the score is that of the stored artifact", "R1, R9")
def check_lines(folder: Folder) -> Iterator[Finding]:
    """H3 and H4: what the line of the result is, and what the log says before and after it."""
    for log, score in folder.results():
        finals = log.finals() if score.file == log.name else []
        if score.kind in ("unquantized", "training") and finals:
            far = min(abs(other.bpb - score.bpb) for other in finals) > WORSE
            message = f"the score is of weights before they were stored ({score.label!r}): score the artifact"
            yield Finding("H4", folder.grade("reject") if far else "note", message, log.name, score.line)
        known = {other.label for other in finals if other.line <= score.line}
        later = [s for s in finals if s.line > score.line and s.bpb > score.bpb + WORSE and s.label not in known]
        if later and score.kind == "final":
            message = (
                f"after the result ({score.label!r} {score.bpb}) it says {later[-1].label!r} {later[-1].bpb}: why?"
            )
            yield Finding("H3", "warn", message, log.name, later[-1].line)
        before = [s for s in log.scores if s.kind == "unquantized" and s.line < score.line]
        stored = [s for s in log.scores if s.kind in ("final", "diagnostic")]
        after = [s for s in stored if before and s.line > before[-1].line]
        if after and after[0].bpb > before[-1].bpb + 0.02:
            message = f"storing the model costs {after[0].bpb - before[-1].bpb:.4f} bpb, from {before[-1].bpb} on"
            yield Finding("H3", "note", message, log.name, after[0].line)


@further("H1")
def check_readme(folder: Folder) -> Iterator[Finding]:
    """H1: the README states the submission's figure."""
    claimed, (name, text) = bpb_of(folder.submission), folder.readme
    if claimed is not None and stated(text) and not states(text, claimed):
        yield Finding("H1", "warn", f"val_bpb {claimed:.8g} of {folder.json_name} is nowhere in it", name)


@rule("N1", "warn", "standard deviations are those of a sample (n - 1)", "R7, #1610, #1855")
@rule("N2", "warn", "bytes_total is that of the largest artifact", "R1, #1394")
def check_deviations(folder: Folder) -> Iterator[Finding]:
    """N1 and N2: standard deviations of a sample, the largest artifact as bytes_total."""
    for key in ("val_bpb", "val_loss"):
        claimed = first(folder.submission, f"{key}_std", f"std_{key}", f"{key}_stdev", f"std_{key[4:]}")
        values = [bpb_of(e) if key == "val_bpb" else first(e, key) for e in folder.seeds.values()]
        values = [value for value in values if value is not None]
        if key == "val_bpb" and len(values) < 2:
            values = [score.bpb for _, score in folder.results()]
        if claimed is None or len(values) < 2:
            continue
        sample, population = statistics.stdev(values), statistics.pstdev(values)
        near = max(tolerance(claimed), 2e-5 if key == "val_bpb" else 5e-5)
        if abs(claimed - sample) > near:
            what = "the population's (n)" if abs(claimed - population) <= near else "no standard deviation of them"
            message = f"{key}_std {claimed:.6g} is {what}: the sample's (n - 1) of {len(values)} seeds is {sample:.6g}"
            yield Finding("N1", "warn", message, folder.json_name)
    sizes = [size for entry in folder.seeds.values() if (size := bytes_of(entry)) is not None]
    sizes = sizes or [total for log in folder.logs if (total := log.get("total")) is not None]
    total = first(folder.submission, "bytes_total")
    if total is not None and sizes and abs(total - max(sizes)) > 100:
        message = f"bytes_total {total:,.0f} is not the largest artifact's, {max(sizes):,.0f}: every seed must fit"
        yield Finding("N2", "warn", message, folder.json_name)


@rule("N3", "warn", "a p-value follows from its t and degrees of freedom", "R7, #1019")
def check_p_value(folder: Folder) -> Iterator[Finding]:
    """N3: p from t and its degrees of freedom, one-sided or two-sided; nothing where one of them is missing."""
    t, p = first(folder.submission, "t_statistic", "welch_t"), first(folder.submission, "p_value", "welch_p")
    df = first(folder.submission, "welch_df", "df", "degrees_of_freedom")
    if t is None or p is None or df is None or not 1 <= df <= 1e5 or not 0 < p < 1:
        return
    tail = float(stats.t.sf(abs(t), df))
    if not any(abs(p - sides * tail) <= max(0.1 * sides * tail, tolerance(p)) for sides in (1, 2)):
        message = f"p_value {p:.4g} does not follow from t = {t:.4g}, df = {df:.4g}: one-sided it is {tail:.4g}"
        yield Finding("N3", "warn", message, folder.json_name)


@rule("N4", "warn", "the booleans of `compliance` agree with the figures", "#1493")
def check_booleans(folder: Folder) -> Iterator[Finding]:
    """N4: booleans typed by hand against the figures of the same folder."""
    said = folder.submission.get("compliance")
    if not isinstance(said, dict) or not folder.used:
        return
    grave = ("reject", "warn")
    facts = {
        "train_under_600s": [f.message for f in check_train_time(folder) if f.severity in grave],
        "artifact_under_16mb": [f.message for f in check_size(folder) if f.severity in grave],
        "eval_under_600s": [f.message for f in check_eval_time(folder) if f.severity == "reject"],
        "three_seeds": [f"{len(folder.used)} logs are used"] if len(folder.used) < 3 else [],
    }
    for key, against in facts.items():
        if said.get(key) is True and against:
            yield Finding("N4", "warn", f"compliance.{key} is true, but: {against[0]}", folder.json_name)
