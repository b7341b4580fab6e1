"""The command line: audits folders, and prints a table or JSON."""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

from challenge import ACCEPTED

from .folder import Folder, eval_seconds, read_folder
from .logs import model_bytes, train_seconds
from .reading import clean
from .rules import FAULT, FIRST, RULES, SEVERITIES, Finding, run_rules
from .submission import bpb_of


def audit(path: Path) -> tuple[Folder, list[Finding]]:
    """Return what was read of a folder, and all findings, gravest first."""
    try:
        folder = read_folder(path)
    except Exception as error:  # the other folders are still checked, and this one is not called good
        message = f"could not be read ({type(error).__name__}: {error}), so nothing was checked: please report it"
        return Folder(path), [Finding(FAULT, "reject", message)]
    return folder, run_rules(folder)


def verdict_of(findings: list[Finding]) -> str:
    """Return "reject", "doubtful" for a score that no accepted record has reached, or "ok"."""
    if any(finding.severity == "reject" for finding in findings):
        return "reject"
    return "doubtful" if any(finding.rule == FIRST for finding in findings) else "ok"


def as_json(folder: Folder, findings: list[Finding]) -> dict[str, Any]:
    """Returns the audit of a folder for machines: verdict, the figures as recomputed, a row a log, the findings."""
    rows = []
    for log, score in folder.results():
        model = model_bytes(log)
        rows.append({
            "log": clean(score.file), "seed": log.seed, "line": score.line, "label": clean(score.label),
            "val_bpb": score.bpb, "val_loss": score.loss, "train_s": train_seconds(log),
            "eval_s": eval_seconds(folder, log, score),
            "shipped_bytes": int(model + folder.code()) if model and folder.scripts else None,
        })  # fmt: skip
    values = [row["val_bpb"] for row in rows]
    counts = Counter(finding.severity for finding in findings)
    return {
        "folder": clean(str(folder.path)), "record": folder.record, "verdict": verdict_of(findings),
        "counts": {name: counts[name] for name in SEVERITIES}, "claimed_val_bpb": bpb_of(folder.submission),
        "mean_val_bpb": statistics.fmean(values) if values else None,
        "std_val_bpb": statistics.stdev(values) if len(values) > 1 else None, "logs": rows,
        "findings": [{
            "rule": f.rule, "severity": f.severity, "message": clean(f.message), "file": clean(f.file), "line": f.line,
            "also": [clean(place) for place in f.also], "source": RULES[f.rule].source,
        } for f in findings],
    }  # fmt: skip


def show(text: str) -> None:
    """Prints a text. A reader that went away, as `head` does, ends the printing, not the audit."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def table_of(folder: Folder, entry: dict[str, Any]) -> str:
    """Returns the findings of a folder and its closing line."""
    lines = [f"== {clean(folder.path.resolve().name)} ({'record' if entry['record'] else 'non-record'} track)"]
    for finding in entry["findings"]:
        places = [f"{finding['file']}:{finding['line']}" if finding["line"] else finding["file"], *finding["also"]]
        listed = ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
        text = f"{finding['message']} [{finding['source']}]" + (f" ({listed})" if listed else "")
        start = f"{finding['severity']:7}{finding['rule']:3} "
        lines.append(textwrap.fill(text, 118, initial_indent=start, subsequent_indent=" " * 11))
    mean = f"{entry['mean_val_bpb']:.6f} bpb, mean of {len(entry['logs'])} logs" if entry["logs"] else "no result found"
    counts = ", ".join(f"{count} {name}" for name, count in entry["counts"].items())
    return "\n".join([*lines, f"{entry['verdict'].upper()}: {counts}; {mean}: {entry['folder']}\n"])


def list_of_rules() -> str:
    """Return all rules with their gravest severity, and the records that scores are compared with."""
    lines = [f"{name:3} {rule.gravest:7}{rule.meaning} [{rule.source}]" for name, rule in sorted(RULES.items())]
    lines += ["", "Accepted records, each the best at its time (date, bits per byte, pull request):"]
    lines += [f"{record.date}  {record.bpb:.4f}  #{record.pull_request}" for record in ACCEPTED]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Audit the folders that are named, print what was found, and return the exit status."""
    parser = argparse.ArgumentParser(description="audits submission folders from their files alone; runs none of them")
    parser.add_argument("folders", nargs="*", metavar="FOLDER")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    parser.add_argument(
        "--rules", action="store_true", help="list the rules and the accepted records, and check nothing"
    )
    options = parser.parse_args(arguments)
    if options.rules:
        show(list_of_rules())
        return 0
    if not options.folders:
        parser.error("give the folder of a submission, or --rules")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names may have characters that a terminal has not
    if absent := [name for name in options.folders if not os.path.isdir(name)]:
        fix = ": give the folder that it is in" if any(os.path.isfile(name) for name in absent) else ""
        print(f"check.py: error: no such folder: {clean(', '.join(absent))}{fix}", file=sys.stderr)
        return 2
    entries = []
    for name in options.folders:
        folder, findings = audit(Path(name))
        entries.append(as_json(folder, findings))
        if not options.json:
            show(table_of(folder, entries[-1]))
    if options.json:
        show(json.dumps({"version": 1, "folders": entries}, indent=1))
    return int(any(entry["verdict"] == "reject" for entry in entries))
