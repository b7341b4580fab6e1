"""Rules on the metric: the bytes that it implies, the split that was scored, the training shards."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator

from challenge import VAL_BYTES

from .folder import Folder
from .logs import MIXTURE, Log, ScoreLine
from .rules import Finding, rule
from .scripts import name_of

LAUNCH_BYTES = 155.77e6  # of the baseline of launch day, an older export of the same documents
TOKENS_PER_BYTE = {"sp1024": 0.41052, "sp4096": 0.30125, "sp8192": 0.26834, "CaseOps": 0.31674, "byte260": 1.0}
LEAK_SHARDS = 1499


def implied_bytes(log: Log, score: ScoreLine) -> tuple[float | None, float]:
    """Returns the bytes of text that a result is of, and how much its rounding hides; None where the log lacks its
    number of tokens or its loss."""
    tokens = log.get("val_tokens")
    if not tokens or not score.loss or not score.bpb:
        return None, 0.0
    value = tokens * score.loss / (math.log(2) * score.bpb)
    return value, value * sum(0.5 * 10.0**-d / v for d, v in zip(score.digits, (score.bpb, score.loss)))


@rule("M1", "reject", "tokens x loss / (ln 2 x bpb) is the validation text's number of bytes", "R8, #1719, #2071")
@rule("M2", "reject", "the whole validation split is scored", "R14, #2109")
def check_metric(folder: Folder) -> Iterator[Finding]:
    """M1 and M2: the denominator of the metric, whatever the tokenizer, and the whole split."""
    said = re.search(r"subset|not the challenge|demo|smoke|partial val|proxy", folder.readme[1], re.I)
    grade = "reject" if folder.record else "note" if said else "warn"
    wanted = f"the validation text has {VAL_BYTES[0] / 1e6:.2f} to {VAL_BYTES[1] / 1e6:.2f} million"
    for log, score in folder.results():
        tokens, place = log.get("val_tokens"), (score.file, score.line)
        if mixed := MIXTURE.search(score.label):
            message = "a byte mixture, excluded in #1902; val_loss and val_bpb are of different distributions"
            yield Finding("M1", "warn" if folder.record else "note", f"{score.label!r}: {message}", *place)
        same = [s.num_bytes for s in log.scores if s.num_bytes and abs(s.bpb - score.bpb) < 6e-5]
        if mixed and same and not VAL_BYTES[0] <= same[-1] <= VAL_BYTES[1]:
            what = f"{same[-1]:,.0f} bytes by its line, {wanted}: {100 * same[-1] / VAL_BYTES[0]:.1f} % of them"
            yield Finding("M2" if same[-1] < VAL_BYTES[0] else "M1", grade, what, *place)
        if mixed:
            continue
        if not tokens or not score.loss or not score.bpb:
            what = "val_loss of the result" if tokens else "number of validation tokens"
            yield Finding("M1", "note", f"{what}: not found in the log, the metric's bytes cannot be checked", *place)
            continue
        value, error = implied_bytes(log, score)
        what = f"{tokens:,.0f} tokens x {score.loss} / (ln 2 x {score.bpb}) = {value:,.0f} bytes, {wanted}: "
        near = [name for name, known in TOKENS_PER_BYTE.items() if abs(tokens / value / known - 1) < 0.015]
        if VAL_BYTES[0] - error <= value <= VAL_BYTES[1] + error:
            continue
        if abs(value - LAUNCH_BYTES) < 1e5 + error:
            yield Finding("M1", "note", f"{what}it is the export of launch day, older than today's", *place)
        elif abs(value / VAL_BYTES[0] - 1) < 5e-3:
            yield Finding("M1", "warn", f"{what}some targets are counted otherwise, say which", *place)
        elif value < VAL_BYTES[0] and (near or not folder.record):
            share = f"{100 * value / VAL_BYTES[0]:.1f} % of the split{' in ' + near[0] if near else ''}"
            yield Finding("M2", grade, f"{what}{share}, score all of it", *log.at("val_tokens"))
        else:
            off = 100 * (value / VAL_BYTES[0] - 1)
            yield Finding("M1", grade, f"{what}off by {off:+.1f} %, the bytes are miscounted", *place)


COUNTS_SPACE = re.compile(r"(1 \+ )?len\(.*\.encode\((?:.utf-?8.)?\)\)(?(1)| \+ 1)", re.I)


@rule("M3", "reject", "a leading space is counted once, not in the table of bytes and beside it", "R8, #1719")
def check_table(folder: Folder) -> Iterator[Finding]:
    """M3: a table of bytes that has + 1 for the space, in a script that adds the space a second time."""
    for script in folder.scripts:
        again = re.search(r"has_(?:leading_)?space\w{0,40}\[[^\]\n]{1,80}\]\s*&\s*~\s*is_boundary", script.source)
        for node in script.nodes() if again else ():
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
                if "base_bytes" in name_of(node.targets[0].value) and COUNTS_SPACE.fullmatch(ast.unparse(node.value)):
                    message = f"the table has {ast.unparse(node.value)[:60]}, and the metric adds the space again: the "
                    message += "bytes are too many, the bpb too low; leave the + 1 out"
                    yield Finding("M3", folder.grade("reject"), message, script.name, node.lineno)


@rule("M5", "warn", "the same training shards for every seed, not one of 80", "#363")
@rule("M6", "reject", "no signature of a data preparation that leaks validation text", "R5, #2018, #2127, #2130")
def check_shards(folder: Folder) -> Iterator[Finding]:
    """M5 and M6: training shards: equal over the seeds, not one alone, not the signature of a known leak."""
    counts = {log.name: int(count) for log in folder.used if (count := log.get("train_shards")) is not None}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        yield Finding("M5", "warn", f"the numbers of training shards differ: {listed}", next(iter(counts)))
    for log in folder.used:
        if counts.get(log.name) == LEAK_SHARDS:
            message = f"train_shards {LEAK_SHARDS}: the signature of a preparation that trains on validation text"
            yield Finding("M6", folder.grade("reject"), message, *log.at("train_shards"))
        elif counts.get(log.name) == 1:
            grade = "warn" if folder.record else "note"
            yield Finding("M5", grade, "one training shard: 80 are about 0.1 bpb better", *log.at("train_shards"))
