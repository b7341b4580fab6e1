"""Rules on mechanisms that were ruled out, recognized by their structure, and on scores that cannot be."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from typing import NamedTuple

from challenge import ACCEPTED, Accepted

from .flow import WEIGHTS, Event, Flow, KnownCall, Loop, flows_of, overlap
from .folder import Folder
from .rules import Finding, rule
from .scripts import Script, name_of
from .submission import bpb_of


class Mechanism(NamedTuple):
    """One that was recognized."""

    rule: str
    line: int
    message: str


KEY = "looks counts up by a hashed key that holds the target: what it finds for all pieces does not sum to one"
BEST = "takes the better of two losses of a target: which one it is, only the target tells"
CHOICE = "mixes a count in only where the target has one: the probabilities of all pieces sum to more than one"


def find_mechanisms(script: Script) -> list[Mechanism]:
    """Return what was recognized in a script, the first place of each kind in each function."""
    found: dict[tuple[str, str], Mechanism] = {}
    for flow in flows_of(script.tree) if script.tree else ():
        if not flow.is_whole:
            script.unseen.append(flow.function.name)
        for mechanism in (*optimized(flow), *rescored(flow), *remarked(flow)):
            name = flow.function.name
            told = Mechanism(mechanism.rule, mechanism.line, f"{name} {mechanism.message}")
            found.setdefault((name, mechanism.rule), told)
    return list(found.values())


def remarked(flow: Flow) -> Iterator[Mechanism]:
    """Yield the expressions that are remarkable by themselves."""
    kinds = {"key": ("L5", KEY), "best": ("L6", BEST), "choice": ("L6", CHOICE)}
    for kind, line in flow.remarks:
        identifier, message = kinds[kind]
        yield Mechanism(identifier, line, message)


def optimized(flow: Flow) -> Iterator[Mechanism]:
    """Yield where targets are trained on, or counted in a table, and scored after that, but not before. Scores count
    that the function returns; if it returns none, all do."""
    scores = [event for event in flow.events if event.kind == "score"]
    results = frozenset().union(*(value.objects for value in flow.returned)) | {"return"}
    counting = [score for score in scores if score.name in results] or scores
    for event in flow.events:
        if event.kind not in ("train", "count"):
            continue
        same = [score for score in counting if depends(score, event) and is_shared(flow, event, score)]
        after = [score for score in same if is_after(score, event)]
        names = {score.name for score in after} - {score.name for score in same if score not in after}
        for score in after:
            if score.name in names:
                verb = "optimizes on" if event.kind == "train" else "counts"
                what = f"{verb} targets (line {event.line}) that it scores after that and not before"
                yield Mechanism("L3", score.line, what)
                return


def is_after(score: Event, event: Event) -> bool:
    """Whether a score was computed after something had happened, maybe in an earlier round of a loop."""
    ended = score.made_in - set(score.loops)  # loops of which it is the last round's
    return score.time > event.time or bool(ended & set(event.loops))


def is_shared(flow: Flow, a: Event, b: Event) -> bool:
    """Whether two events are of the same tokens: in a round of the innermost loop around both, or in the function."""
    around = [number for number in a.loops if number in b.loops]
    inner = frozenset(loop.number for loop in flow.all_loops) - set(around)
    targets = {path.root for path in flow.targets}
    for x in a.data:
        for y in b.data:
            if not overlap(x, y, inner):
                continue
            if around and around[-1] in x.loops() & y.loops():
                return True
            is_input = x.root in flow.parameters and x.root in flow.inputs | targets and not (x.steps or y.steps)
            if not around and (is_input or (x.is_part() and y.is_part())):
                return True
    return False


def rescored(flow: Flow) -> Iterator[Mechanism]:
    """Yield where targets are scored with what a whole pass over them has changed."""
    updates = [event for event in flow.events if event.kind != "score"]
    scores = [event for event in flow.events if event.kind == "score"]
    loops = {loop.number: loop for loop in flow.all_loops}
    for update in updates:
        for score in scores:
            if not depends(score, update) or not is_swept_by_both(update, score, frozenset(loops)):
                continue
            if second := later_sweep(update, score, loops):
                what = f"scores in a second pass (line {second}) with what a first one over the same tokens changed"
                yield Mechanism("L4", score.line, what)
            elif passes := repeated_sweep(flow, update, score, loops):
                what = f"makes several passes (line {passes}), and the last one's score counts"
                yield Mechanism("L4", score.line, what)
    for index, call in enumerate(flow.calls):
        for later in flow.calls[index + 1 :]:
            if (later.name, later.key) == (call.name, call.key) and not are_exclusive(call, later):
                yield Mechanism("L4", later.line, f"calls {call.name} a second time on what its first call has changed")
                return


def is_swept_by_both(update: Event, score: Event, loops: frozenset[int]) -> bool:
    """Whether two events are of the same tokens, each in its own loops."""
    pairs = ((x, y) for x in update.data for y in score.data)
    return any(x.loops() and y.loops() and overlap(x, y, loops) for x, y in pairs)


def are_exclusive(one: KnownCall, other: KnownCall) -> bool:
    """Whether two calls are in different arms of one `if`."""
    arms = dict(one.branches)
    return any(line in arms and arms[line] != arm for line, arm in other.branches)


def depends(score: Event, update: Event) -> bool:
    """Whether a score is of something that was changed."""
    return WEIGHTS in update.objects or bool(score.objects & update.objects)


def later_sweep(update: Event, score: Event, loops: dict[int, Loop]) -> int:
    """Return the line of the loop that scores, if it sweeps what an earlier loop has swept; 0 otherwise."""
    firsts = [loops[number] for number in update.loops if number not in score.loops]
    seconds = [loops[number] for number in score.loops if number not in update.loops]
    if not firsts or not seconds or set(update.loops) & set(score.loops):
        return 0
    first, second = firsts[0], seconds[0]
    is_later = second.node.lineno > (first.node.end_lineno or 0)
    is_same = first.covers() == second.covers() != ""
    if any(first.number in path.loops() for path in second.over.data):  # it runs over what the first one kept
        is_read = bool(update.objects & score.objects - second.over.objects)  # and reads what has changed since
        is_same = is_read or (WEIGHTS in update.objects and second.number in score.made_in)
    return second.node.lineno if is_later and is_same else 0


def repeated_sweep(flow: Flow, update: Event, score: Event, loops: dict[int, Loop]) -> int:
    """Return the line of a loop of passes over the same tokens, whose sums begin anew; 0 if there is none."""
    for number in score.loops[:-1]:
        passes = loops[number]
        inner = score.loops[score.loops.index(number) + 1]
        if inner not in update.loops or any(number in path.loops() for path in score.data):
            continue
        is_begun = score.name in begun_in(passes.node, loops[inner].node)
        if is_begun and is_read_after(flow.function, score.name, passes.node.end_lineno or 0):
            return passes.node.lineno
    return 0


def begun_in(passes: ast.AST, inner: ast.AST) -> set[str]:
    """Return the variables that are set, or filled in place, in each round of a loop, but not in the loop inside it."""
    parts = set(ast.walk(passes)) - set(ast.walk(inner))
    begun = {target for node in parts if isinstance(node, ast.Assign) for target in node.targets}
    begun |= {part for node in begun if isinstance(node, ast.Tuple) for part in node.elts}
    begun |= {node.target for node in parts if isinstance(node, ast.AnnAssign)}
    calls = [node.func for node in parts if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    begun |= {function.value for function in calls if function.attr in ("zero_", "fill_", "copy_")}
    return {name_of(node.value if isinstance(node, ast.Subscript) else node) for node in begun}


def is_read_after(function: ast.AST, name: str, line: int) -> bool:
    """Whether a variable is read below a line."""
    reads = (node for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))
    return any(node.id == name and node.lineno > line for node in reads)


def recognized(folder: Folder) -> list[tuple[str, Mechanism]]:
    """Return what was recognized in the scripts of a folder, each with the name of the script."""
    found = []
    for script in folder.scripts:
        if script.mechanisms is None:
            script.mechanisms = find_mechanisms(script)
        found += [(script.name, mechanism) for mechanism in script.mechanisms]
    return found


# Where the organizers have drawn the line: #1017's conditions, and rulings on single pull requests.
@rule("L3", "warn", "nothing is optimized on targets that are scored after that", "R6, #1240, #677")
@rule("L4", "warn", "no target is scored again after a pass over all of them", "#677, #991, #573")
@rule("L5", "warn", "no counts are looked up by a hashed key that holds the target", "#779, #982")
@rule("L6", "warn", "what is mixed is a distribution over the vocabulary", "#659, #1872, #1902")
def check_mechanisms(folder: Folder) -> Iterator[Finding]:
    """L3 to L6: mechanisms that explain scores which cannot be, by their structure. A reader must see whether they are
    used: the score of the folder decides whether they are a reject (B1)."""
    for name, mechanism in recognized(folder):
        yield Finding(mechanism.rule, "warn", mechanism.message, name, mechanism.line)
    for script in folder.scripts:
        if script.unseen:
            message = f"{', '.join(script.unseen[:5])}: too large or nested too deeply, so not looked through"
            yield Finding("L3", "note", message, script.name)


# Bits per byte that more training might be worth: 24 times of it gave the baseline 0.017 (1.2244 to 1.2074).
UNLIMITED = 0.05


@rule("B1", "reject", "the score is not below that of every accepted record", "the challenge's README of 2026-05-04")
def check_plausibility(folder: Folder) -> Iterator[Finding]:
    """B1: a score that no accepted record has reached. It is a reject where a mechanism that explains it is in the
    script, and a loud warning elsewhere."""
    scores = [score.bpb for _, score in folder.results()]
    claimed = bpb_of(folder.submission)
    known = ([claimed] if claimed is not None else []) + ([statistics.fmean(scores)] if scores else [])
    best = min(ACCEPTED, key=lambda record: record.bpb)
    limit = best.bpb if folder.record else best.bpb - UNLIMITED
    if not known or min(known) >= limit:
        return
    message = (
        f"{min(known):.4f} bits per byte: no accepted record is below {best.bpb} (#{best.pull_request}, {best.date})"
    )
    if earlier := accepted_before(folder):
        message += f", at the folder's date {earlier.bpb} (#{earlier.pull_request}) was the best"
    explained = sorted({f"{mechanism.rule} {mechanism.message}" for _, mechanism in recognized(folder)})
    if explained:
        yield Finding("B1", "reject", f"{message}. The script explains it: {'; '.join(explained[:4])}", *place(folder))
    else:
        message += ". Such scores came from text that was trained on or counted before it was scored, from miscounted "
        message += "bytes, or from mixtures that sum to more than one: find out which, before anything else"
        yield Finding("B1", "warn", message, *place(folder))


def place(folder: Folder) -> tuple[str, int]:
    """Return where the score stands."""
    for _, score in folder.results():
        return score.file, score.line
    return folder.json_name, 0


def accepted_before(folder: Folder) -> Accepted | None:
    """Return the best record that was accepted before the date in a folder's name; None without a date."""
    match = re.match(r"\d{4}-\d\d-\d\d", folder.path.resolve().name)
    earlier = [record for record in ACCEPTED if match and record.date < match[0]]
    return min(earlier, key=lambda record: record.bpb, default=None)
