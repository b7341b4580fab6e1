"""Rules on the order of training and scoring."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator

from .folder import Folder
from .logs import Log, ScoreLine
from .rules import Finding, rule
from .scripts import name_of


@rule("L2", "reject", "calibration does not read validation data", "#728, #1919")
def check_calibration(folder: Folder) -> Iterator[Finding]:
    """L2: calibration on validation data, as the log says it."""
    for log in folder.used:
        if log.get("val_calibration") is not None:
            message = "calibrated on validation data, which was ruled out: use training or generated data"
            yield Finding("L2", folder.grade("reject"), message, *log.at("val_calibration"))


NO_GRAD = re.compile(r"no_grad|inference_mode")


def is_scoring(node: ast.AST) -> bool:
    """Returns whether a statement is a block under no_grad or inference_mode."""
    heads = [item.context_expr for item in node.items] if isinstance(node, ast.With) else []
    return any(NO_GRAD.search(name_of(h.func if isinstance(h, ast.Call) else h)) for h in heads)


def over_epochs(node: ast.AST) -> bool:
    """Returns whether a node is a loop over epochs."""
    parts = (*ast.walk(node.iter), *ast.walk(node.target)) if isinstance(node, ast.For) else ()
    return any("epoch" in name_of(part).lower() for part in parts)


def scoring_helpers(functions: list[ast.FunctionDef]) -> set[str]:
    """Returns the functions that give a result, are or have a block under no_grad, and do not train."""
    found = set()
    for function in functions:
        inside, heads = list(ast.walk(function)), [ast.dump(head) for head in function.decorator_list]
        scores = NO_GRAD.search(" ".join(heads)) or any(map(is_scoring, inside))
        trains = any(getattr(node, "attr", "") == "backward" for node in inside)
        if scores and not trains and any(isinstance(node, ast.Return) and node.value for node in inside):
            found.add(function.name)
    return found


def scorings(function: ast.FunctionDef, helpers: set[str]) -> list[tuple[int, int, int]]:
    """Returns where a function scores, and the lines that this may excuse. A block under no_grad excuses the whole
    function, unless it stands in a loop over epochs that no loop over chunks is around; a call to a helper excuses the
    loop around it, which is none over epochs."""
    inside = list(ast.walk(function))
    blocks = [node.lineno for node in inside if is_scoring(node)]
    calls = [node for node in inside if isinstance(node, ast.Call)]
    lines = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id in helpers]
    loops = [(node, over_epochs(node)) for node in inside if isinstance(node, (ast.For, ast.While))][:30]
    epochs = [(loop.lineno, loop.end_lineno or 0) for loop, over in loops if over]
    spans = [(loop.lineno, loop.end_lineno or 0) for loop, over in loops if not over]
    spans = [(a, b) for a, b in spans if not any(start <= a and b <= end for start, end in epochs)]
    found = [(line, a, b) for line in sorted(lines)[:30] for a, b in spans if a <= line <= b]
    # Over the whole text again and again: what such a loop scores comes after its first steps.
    whole = [(a, b) for a, b in epochs if not any(start <= a and b <= end for start, end in spans)]
    blocks = [line for line in blocks if not any(a <= line <= b for a, b in whole)]
    return [(line, 0, sys.maxsize) for line in sorted(blocks)[:1]] + found


def excused(line: int, by: list[tuple[int, int, int]]) -> bool:
    """Returns whether something is scored before a line, in what is around both."""
    return any(scored < line and start <= line <= end for scored, start, end in by)


def trains_first(function: ast.FunctionDef, helpers: set[str]) -> bool:
    """Returns whether a function gets val_tokens and calls backward in a loop over epochs, with no scoring before."""
    listed = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    arguments = {argument.arg for argument in listed}
    inside = {name_of(node) for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    if "val_tokens" not in arguments and not ("val_data" in arguments and "val_data.val_tokens" in inside):
        return False
    scored = scorings(function, helpers)
    for loop in (node for node in ast.walk(function) if over_epochs(node)):
        calls = [node for node in ast.walk(loop) if isinstance(node, ast.Call)]
        if any(name_of(call.func).endswith("backward") and not excused(call.lineno, scored) for call in calls):
            return True
    return False


def called_after_scoring(functions: list[ast.FunctionDef], helpers: set[str]) -> set[str]:
    """Returns the functions that another one calls after it has scored: it orders the two."""
    found = set()
    for function in functions:
        last: dict[str, int] = {}
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            name = name_of(call.func).rpartition(".")[2]
            last[name] = max(last.get(name, 0), call.lineno)
        scored = scorings(function, helpers)
        found |= {name for name, line in last.items() if name != function.name and excused(line, scored)}
    return found


@rule("L1", "reject", "no training on validation tokens before they are scored", "R6, #402, #1972")
def check_order(folder: Folder) -> Iterator[Finding]:
    """L1: a function that trains on val_tokens for epochs and scores nothing first. The pattern alone warns, since a
    caller may have scored; with epochs in the log, two at least, and no score among them, it is what was closed."""
    ran = [(log.name, log.epochs[0][0]) for log, score in folder.results() if adapted_first(log, score)]
    for script in folder.scripts:
        functions = [node for node in script.nodes() if isinstance(node, ast.FunctionDef)]
        helpers = scoring_helpers(functions)
        suspects = [node for node in functions if trains_first(node, helpers)]
        ordered = called_after_scoring(functions, helpers) if suspects else set()
        for node in (node for node in suspects if node.name not in ordered):
            message = f"{node.name} trains on val_tokens for epochs and scores none of them first: "
            message += "only tokens that were scored may be trained on"
            place = ran[0] if ran else (script.name, node.lineno)
            yield Finding("L1", folder.grade("reject") if ran else "warn", message, *place)


def adapted_first(log: Log, score: ScoreLine) -> bool:
    """Returns whether a log has epochs of adaptation before its result, two at least, with no score but their own among
    them. Epochs that begin anew are those of a chunk each, which may have been scored before."""
    for name in {name for _, name, _ in log.epochs}:
        inside = [(line, number) for line, own, number in log.epochs if own == name and line < score.line]
        numbers, lines = [number for _, number in inside], {line for line, _ in inside}
        if len(set(numbers)) > 1 and numbers == sorted(numbers):
            if not any(min(lines) < other.line < max(lines) and other.line not in lines for other in log.scores):
                return True
    return False


SUSPICIOUS = re.compile(  # ngrams of an input embedding and variables called slot are something else
    r"^(slot)_|_(slot)_(?:enabled|lr|steps|iters)|^(?!.*n_?gram.*(?:hash|emb|dim|proj|vocab))(?:.*_)?"
    r"(n_?gram|ppmd?|etlb|logit_bias|full_key|pre_?quant_ttt)(?:_|\d|$)", re.I)  # fmt: skip


@rule("L9", "warn", "no names of mechanisms that were ruled out", "#677, #1240, #1902")
def check_names(folder: Folder) -> Iterator[Finding]:
    """L9: names of mechanisms that were ruled out. Whether they are on a reader must see; a log may tell."""
    off = {key for log in folder.used for key, (value, _) in log.config.items() if value in ("False", "0", "0.0")}
    for script in folder.scripts:
        found: dict[str, tuple[str, int]] = {}
        for node in script.nodes():
            name = getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "name", None)
            if isinstance(name, str) and (match := SUSPICIOUS.search(name[:200])):
                found.setdefault(str(match[match.lastindex or 0]).lower(), (name, getattr(node, "lineno", 0)))
        default = r"""['"]\s*,\s*['"]?(?:0|False)\b"""
        idle = {key for key in found if any(key in setting for setting in off)}
        idle |= {key for key in found if re.search(rf"{key}\w*(?:ENABLED)?{default}", script.source, re.I)}
        for grade, keys in (("warn", found.keys() - idle), ("note", idle)):
            if keys:
                listed = ", ".join(sorted(found[key][0] for key in keys))
                ruled = "ruled out, unless normalised over the vocabulary and of the strict prefix only"
                state = "off, by the log's settings or by default" if grade == "note" else ruled
                yield Finding("L9", grade, f"names {listed}: {state}", script.name, min(found[key][1] for key in keys))
