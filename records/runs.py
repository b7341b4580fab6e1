"""Reads runs of train_gpt.py: what metrics.jsonl, final_model.bin and compliance.json of a folder in logs/ say.

For report.py, watch.py, forecast.py and submit.py. All files are only parsed; a broken one is a RunError that names the
line and the fix, a missing one is a note."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t  # noqa: E402

STAGES = ("raw", "averaged", "quantized", "sliding", "ttt")
PHASES = ("preflight", "train", "calibration", "validation", "export", "load", "other scores", "score")
FAMILIES = (*(family.name for family in t.PARAM_GROUPS), "header", "other")
MOST_RUNS = 24  # that a page can tell apart
ZSTD_LEVEL = 3  # of a model of 0.96 MB the parts took, alone and together, within 0.5% of the file at any level


class RunError(ValueError):
    """Something about the runs that the user can mend: the message names the file, what is wrong, and the fix."""


# What an event must hold: names of numbers, then names of values of another type.
FIELDS: dict[str, tuple[str, dict[str, type | tuple[type, ...]]]] = {
    "config": ("seed train_batch_tokens", {"machine": str}),
    "segment": ("number", {"stage": str}),
    "resumed": ("step seconds", {}),
    "trained": ("steps seconds", {}),
    "ended": ("", {"reason": str}),
    "progress": ("done total seconds", {"label": str}),
    "plan": ("scoring_seconds epochs epoch_seconds", {}),
    "train": ("step train_loss seconds", {}),
    "eval": ("val_loss val_bpb seconds", {"stage": str}),
    "stored": ("weights bits bytes", {"family": str}),
    "final": (
        "val_loss val_bpb num_targets num_bytes bytes_model bytes_code bytes_total eval_seconds",
        {"kind": str, "compliant": bool, "rule_breaks": dict, "code_sha256": str},
    ),
}
LATEST = 2.5e11  # seconds since 1970, in the year 9892: what calendars here can show
# Numbers that an event need not have: an older log, a run without training, values that are not quantized.
OPTIONAL = {
    "config": "iterations max_wallclock_seconds eval_budget_seconds warmdown_frac warmdown_iters train_seq_len",
    "train": "lr_scale",
    "final": "steps step_avg_ms train_seconds calibration_seconds export_seconds preflight_seconds load_seconds "
    "eval_seconds_strict",
    "stored": "clip error",
}


class Part(NamedTuple):
    """What tensors of one family and precision take in the artifact; `alone`: compressed by themselves."""

    family: str
    bits: int
    values: int
    stored: int
    alone: int

    @property
    def label(self) -> str:
        return f"{self.family}, {self.bits} bits" if self.bits else self.family


@dataclass
class Run:
    """What the files of a run say, and in `notes` what they do not."""

    name: str
    index: int
    alone: bool  # the page has no other
    config: dict[str, Any] = field(default_factory=dict)
    train: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    final: dict[str, Any] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    grids: dict[str, dict[str, Any]] = field(default_factory=dict)  # family -> what the log says of its grid
    notes: list[str] = field(default_factory=list)
    bytes_artifact: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)  # all of them, in their order

    def last(self, *kinds: str) -> dict[str, Any]:
        """Returns the last event of these kinds, or an empty one."""
        return next((event for event in reversed(self.events) if event["event"] in kinds), {})

    @property
    def settings(self) -> dict[str, Any]:
        """Returns all settings but those of a run's own; audit and curves change nothing of a score."""
        own = ("event", "time", "machine", "seed", "run_id", "audit", "tensorboard")
        return {n: v for n, v in self.config.items() if n not in own}

    @property
    def steps(self) -> int | None:
        """Returns the steps that were taken, as far as the log says."""
        trained = self.last("trained").get("steps", self.train[-1]["step"] if self.train else None)
        return self.final.get("steps", trained)

    @property
    def train_seconds(self) -> float | None:
        """Returns the seconds of training, as far as the log says."""
        trained = self.last("trained").get("seconds", self.train[-1]["seconds"] if self.train else None)
        return self.final.get("train_seconds", trained)

    def ladder(self) -> dict[str, float]:
        """Returns stage -> bits per byte of the stages that this run has, in their order."""
        return {stage: self.scores[stage]["val_bpb"] for stage in STAGES if stage in self.scores}

    def validations(self) -> list[tuple[float, float, float]]:
        """Returns (step, seconds, val_loss) of the raw weights; the seconds lie between those of the train events."""
        steps, seconds = ([event[name] for event in self.train] for name in ("step", "seconds"))
        found = {int(m[1]): s for name, s in self.scores.items() if (m := re.fullmatch(r"step:(\d{1,15})/\d+", name))}
        points = [(step, float(np.interp(step, steps, seconds)), found[step]["val_loss"]) for step in sorted(found)]
        last = [(self.steps, self.train_seconds, self.scores["raw"]["val_loss"])] if "raw" in self.scores else []
        return points + last

    def seconds(self) -> dict[str, float]:
        """Returns phase -> seconds, as the run clocked them; none of these lies in another."""
        clocked = {name: self.final.get(f"{name}_seconds") for name in ("preflight", "export", "load")}
        clocked["calibration"] = self.final.get("calibration_seconds") or None  # 0: there was none
        clocked |= {"train": self.train_seconds, "score": self.final.get("eval_seconds")}
        reported = [*self.ladder()][-1:] if self.final else []  # its seconds are the run's eval_seconds
        for stage, event in self.scores.items():
            name = "other scores" if stage in STAGES[2:] else "validation"
            if stage not in reported:
                clocked[name] = clocked.get(name, 0.0) + event["seconds"]
        return {name: clocked[name] for name in PHASES if clocked.get(name) is not None}

    def verdict(self) -> tuple[str, list[str]]:
        """Returns whether the run kept the rules, as far as it can tell itself, and what speaks for or against it."""
        if not self.final:
            return "unfinished", []
        says = [str(reason) for reason in self.final["rule_breaks"].values()]
        failed = [name for name, passed in self.audit.items() if passed is False and name != "passed"]
        if self.audit:
            says.append("audit passed" if self.audit["passed"] else f"audit failed: {', '.join(failed)}")
        return "yes" if self.final["compliant"] and self.audit.get("passed", True) else "no", says


def check_event(event: Any, where: str) -> dict[str, Any]:
    """Returns the event if it is an object that holds what this page reads of its kind; RunError otherwise."""
    kind = event.get("event") if isinstance(event, dict) else None
    if not isinstance(kind, str):
        raise RunError(f'{where} is no object with a text "event": is this the metrics.jsonl of a run?')
    numbers, others = FIELDS.get(kind, ("", {}))
    for name in [*numbers.split(), *(n for n in OPTIONAL.get(kind, "").split() if n in event)]:
        if type(event.get(name)) not in (int, float) or not abs(event[name]) < 1e15:
            raise RunError(f"{where}: {name} of event {kind} is {event.get(name)!r:.60}, a number is needed")
        if event[name] < 0 and name in ("step", "steps", "seconds"):
            raise RunError(f"{where}: {name} of event {kind} is {event[name]}, and cannot be below 0")
    if "time" in event and not (type(event["time"]) in (int, float) and 0 <= event["time"] < LATEST):
        raise RunError(f"{where}: time of event {kind} is {event['time']!r:.60}, seconds since 1970 are needed")
    for name, wanted in others.items():
        if not isinstance(event.get(name), wanted):
            raise RunError(f"{where}: {name} of event {kind} is {event.get(name)!r:.60}, which is of another type")
    return event


def read_events(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the events of a metrics.jsonl, and notes. RunError with the line where one is broken; only a last line
    without its end, which a killed run leaves, is left out with a note."""
    events, notes, lines = [], [], path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            event = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise RunError(f"{path}:{number} is not JSON ({error}): mend or remove the line") from None
            notes.append(f"line {number} of metrics.jsonl is cut off and left out")
        else:
            events.append(check_event(event, f"{path}:{number}"))
    return events, notes


def read_run(folder: Path, name: str, index: int, alone: bool) -> Run:
    """Returns what the folder of a run says; RunError if it is no run, or its log is broken."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise RunError(f"{folder} has no metrics.jsonl: give the folder of a run, as logs/demo")
    events, notes = read_events(path)
    run = Run(name, index, alone, notes=notes, events=events)
    before: list[dict[str, Any]] = []  # the steps of earlier segments, of which a checkpoint may have kept some
    num_segments = 1
    for event in events:
        kind = event["event"]
        if kind == "segment":
            num_segments = event["number"]
            if event["stage"] == "train":
                before, run.train = run.train, []
        elif kind == "resumed":
            run.train = [step for step in before if step["step"] <= event["step"]]
        elif kind in ("config", "final"):
            if getattr(run, kind) and num_segments == 1:
                raise RunError(f"{path} has two {kind} events: it holds two runs, give each its own folder")
            setattr(run, kind, event)
        elif kind == "train":
            run.train.append(event)
        elif kind == "eval":
            run.scores[event["stage"]] = event
        elif kind == "stored":
            run.grids[event["family"]] = event
    if events and not run.config or "raw" in run.scores and not run.train:
        raise RunError(f"{path} has no {'train' if run.config else 'config'} event: its first lines are missing")
    if num_segments > 1:
        notes.append(f"stopped and resumed: {num_segments} segments; steps that were taken twice are drawn once")
    note_missing(run, folder / "final_model.bin")
    read_audit(run, folder / "compliance.json")
    return run


def read_audit(run: Run, path: Path) -> None:
    """Reads the verdicts of the audit of the run's artifact, where there is one."""
    if not path.is_file() or not run.final:
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        audit = {str(name): bool(proof["passed"]) for name, proof in content["proofs"].items()}
        audit["passed"] = content["passed"] is True and all(audit.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{path} is no audit ({error!r:.80}): run `python records/audit.py {path.parent}`") from None
    if content.get("artifact_sha256") == run.final.get("artifact_sha256"):
        run.audit = audit
    else:
        run.notes.append("compliance.json is of another artifact, so it says nothing here")


def note_missing(run: Run, path: Path) -> None:
    """Reads the run's artifact where there is one, and notes what the run's files lack."""
    if not run.final:
        steps = f" after step {run.steps:,}" if run.train else ""
        ended = run.events[-1].get("reason") if run.events and run.events[-1]["event"] == "ended" else None
        why = f": {ended}" if ended else ", without a final score"
        run.notes.append(f"unfinished: the log ends{steps}{why}")
    if not path.is_file():
        other = run.config.get("eval_only")
        run.notes.append(f"no final_model.bin here{f', it scored {other}' if other else ''}: no bytes by family")
        return
    blob = path.read_bytes()
    run.bytes_artifact, digest = len(blob), hashlib.sha256(blob).hexdigest()
    try:
        run.parts = read_parts(blob, path.name)
    except t.UserError as error:
        run.notes.append(f"no bytes by family: {error}")
    if run.final and len(blob) != run.final["bytes_model"]:
        run.notes.append(f"final_model.bin has {len(blob):,} bytes, but the run reported {run.final['bytes_model']:,}")
    elif run.final.get("artifact_sha256", digest) != digest:
        run.notes.append("final_model.bin is not the file that the run reported: it has another SHA-256")


def read_parts(blob: bytes, source: str) -> list[Part]:
    """Returns what each family of parameters takes in the artifact, in each of its bits, and what the header takes.
    Family and bits are those of the file, not of the settings. UserError if the file is no sound artifact."""
    header, tensors = t.read_stored(blob, source)
    is_rans = t.PREFIX.unpack_from(blob)[3] == t.CODECS["rans"]
    compress = t.require("zstandard", "it measures the parts of an artifact").ZstdCompressor(level=ZSTD_LEVEL).compress
    members: dict[tuple[str, int], list[t.Stored]] = {}
    for tensor in tensors:
        members.setdefault((t.family_of(tensor.name), tensor.bits), []).append(tensor)
    text = bytes(4) + json.dumps(header).encode()
    parts = [Part("header", 0, 0, len(text), len(compress(text)))]
    for (family, bits), own in members.items():
        codes = b"".join(t.raw_bytes(tensor.values) for tensor in own if bits < 16)
        rest = b"".join(t.raw_bytes(tensor.values if bits >= 16 else tensor.scales) for tensor in own)
        alone = len(compress(codes + rest))
        if is_rans:
            code_bits = sum(t.model_rows(own, "rans").bits_by_family().values())
            alone = math.ceil(code_bits / 8) + len(compress(rest))
        values = sum(tensor.values.numel() for tensor in own)
        parts.append(Part(family, bits, values, len(codes) + len(rest), alone))
    return sorted(parts, key=lambda part: (FAMILIES.index(part.family), part.bits))


def read_runs(folders: list[str], missing_ok: bool = False) -> list[Run]:
    """Returns the runs in the order given, under names that differ; with `missing_ok`, those that have begun."""
    if len(folders) > MOST_RUNS:
        raise RunError(f"{len(folders)} runs are more than the {MOST_RUNS} that a page can tell apart: give fewer")
    paths = [Path(folder).resolve() for folder in folders]
    for path in paths:
        if path.is_file():
            raise RunError(f"{path} is a file: give the folder of a run, as logs/demo")
        if paths.count(path) > 1:
            raise RunError(f"{path} is given twice: give each run once")
    short = [path.name for path in paths]
    names = [path.name if short.count(path.name) == 1 else f"{path.parent.name}/{path.name}" for path in paths]
    return [
        read_run(path, printable(names[i]), i, len(paths) == 1)
        for i, path in enumerate(paths)
        if not missing_ok or (path / "metrics.jsonl").is_file()
    ]


def printable(text: Any) -> str:
    """Returns the text with a mark for each character that a page cannot show."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
