"""Writes a page of runs, index.html, and its figures as PNGs: loss, the ladder of scores, bytes, seconds, comparison.

    python records/report.py logs/demo                        # into logs/demo/report/
    python records/report.py logs/a logs/b logs/c --out page  # up to 24 runs on one page, into page/
    python records/report.py logs/a --watch                   # while it runs: http://localhost:8765, always the latest

The page is one file that opens from disk: no script, no request, readable on a phone and in dark mode. It shows what
metrics.jsonl and final_model.bin of each run say, both only parsed; what is missing is named on the page. The same
files give the same bytes. Needs records/requirements.txt. Ends with status 2 where a run cannot be read."""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import html
import io
import json
import math
import re
import statistics
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ImportError as missing:
    sys.exit(f"report.py: error: the package {missing.name} is missing: pip install -r records/requirements.txt")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t  # noqa: E402

STAGES = ("raw", "averaged", "quantized", "sliding", "ttt")
# Name -> (light, dark). Figures are drawn in the light colours, which PNGs keep; on the page each becomes var(--name).
# c0 to c5: at least 3 to 1 on the card, and OKLab distances of 0.09 or more between any two, also as seen with each
# kind of dichromacy (Machado et al. 2009); the well-known palette of Okabe and Ito has 0.076 by the same measure.
COLOURS = {
    "ground": ("#f3f5f7", "#0d0f12"),
    "card": ("#ffffff", "#171a1f"),
    "text": ("#1b2027", "#e7eaef"),
    "muted": ("#57606b", "#a3adb9"),
    "rule": ("#d8dde3", "#353c46"),
    "c0": ("#2f6fd0", "#598ae2"),
    "c1": ("#c4594c", "#e17c44"),
    "c2": ("#0d5e0f", "#17bd8d"),
    "c3": ("#824396", "#ff93cd"),
    "c4": ("#009cdd", "#00cdfc"),
    "c5": ("#c08a00", "#d6d660"),
    "c6": ("#8a939f", "#7f8894"),
    "c7": ("#454d58", "#c5ccd6"),
}
PAINT = {name: light for name, (light, _) in COLOURS.items()}
DASHES = ((), (6, 2.5), (1.8, 1.8), (7, 2, 1.8, 2))
MOST_RUNS = 6 * len(DASHES)  # a run is a colour and a dash
FAMILY_COLOURS = {family.name: f"c{i}" for i, family in enumerate(t.PARAM_GROUPS)} | {"header": "c6", "code": "c7"}
PHASE_COLOURS = {"preflight": "c1", "train": "c2", "calibration": "c6", "validation": "c0"}
PHASE_COLOURS |= {"export": "c3", "load": "c7", "other scores": "c5", "score": "c4"}
ROUND = (1, 2, 2.5, 5, 10)  # ticks are multiples of these
WIDTH, FONT = 384, 12.5  # units of a figure: on a phone of 360 pixels a unit is 0.81, so its text has 10.2
ZSTD_LEVEL = 3  # of a model of 0.96 MB the parts took, alone and together, within 0.5% of the file at any level


class ReportError(ValueError):
    """Something about the runs that the user can mend: the message names the file, what is wrong, and the fix."""


# =================================================== reading =========================================================
# What an event must hold for this page: names of numbers, then names of values of another type.
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
    "final": "steps train_seconds calibration_seconds export_seconds preflight_seconds load_seconds "
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
    def colour(self) -> str:
        return f"c{self.index % 6}"

    @property
    def dash(self) -> tuple[float, ...]:
        return DASHES[self.index // 6]

    @property
    def steps(self) -> int | None:
        trained = self.last("trained").get("steps", self.train[-1]["step"] if self.train else None)
        return self.final.get("steps", trained)

    @property
    def train_seconds(self) -> float | None:
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
        return {name: clocked[name] for name in PHASE_COLOURS if clocked.get(name) is not None}

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
    """Returns the event if it is an object that holds what this page reads of its kind; ReportError otherwise."""
    kind = event.get("event") if isinstance(event, dict) else None
    if not isinstance(kind, str):
        raise ReportError(f'{where} is no object with a text "event": is this the metrics.jsonl of a run?')
    numbers, others = FIELDS.get(kind, ("", {}))
    for name in [*numbers.split(), *(n for n in OPTIONAL.get(kind, "").split() if n in event)]:
        if type(event.get(name)) not in (int, float) or not abs(event[name]) < 1e15:
            raise ReportError(f"{where}: {name} of event {kind} is {event.get(name)!r:.60}, a number is needed")
        if event[name] < 0 and name in ("step", "steps", "seconds"):
            raise ReportError(f"{where}: {name} of event {kind} is {event[name]}, and cannot be below 0")
    if "time" in event and not (type(event["time"]) in (int, float) and 0 <= event["time"] < LATEST):
        raise ReportError(f"{where}: time of event {kind} is {event['time']!r:.60}, seconds since 1970 are needed")
    for name, wanted in others.items():
        if not isinstance(event.get(name), wanted):
            raise ReportError(f"{where}: {name} of event {kind} is {event.get(name)!r:.60}, which is of another type")
    return event


def read_events(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the events of a metrics.jsonl, and notes. ReportError with the line where one is broken; only a last line
    without its end, which a killed run leaves, is left out with a note."""
    events, notes, lines = [], [], path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            event = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise ReportError(f"{path}:{number} is not JSON ({error}): mend or remove the line") from None
            notes.append(f"line {number} of metrics.jsonl is cut off and left out")
        else:
            events.append(check_event(event, f"{path}:{number}"))
    return events, notes


def read_run(folder: Path, name: str, index: int, alone: bool) -> Run:
    """Returns what the folder of a run says; ReportError if it is no run, or its log is broken."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ReportError(f"{folder} has no metrics.jsonl: give the folder of a run, as logs/demo")
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
                raise ReportError(f"{path} has two {kind} events: it holds two runs, give each its own folder")
            setattr(run, kind, event)
        elif kind == "train":
            run.train.append(event)
        elif kind == "eval":
            run.scores[event["stage"]] = event
        elif kind == "stored":
            run.grids[event["family"]] = event
    if events and not run.config or "raw" in run.scores and not run.train:
        raise ReportError(f"{path} has no {'train' if run.config else 'config'} event: its first lines are missing")
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
        raise ReportError(f"{path} is no audit ({error!r:.80}): run `python records/audit.py {path.parent}`") from None
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
    order = [*FAMILY_COLOURS, "other"]
    return sorted(parts, key=lambda part: (order.index(part.family), part.bits))


def read_runs(folders: list[str], missing_ok: bool = False) -> list[Run]:
    """Returns the runs in the order given, under names that differ; with `missing_ok`, those that have begun."""
    if len(folders) > MOST_RUNS:
        raise ReportError(f"{len(folders)} runs are more than the {MOST_RUNS} that a page can tell apart: give fewer")
    paths = [Path(folder).resolve() for folder in folders]
    for path in paths:
        if path.is_file():
            raise ReportError(f"{path} is a file: give the folder of a run, as logs/demo")
        if paths.count(path) > 1:
            raise ReportError(f"{path} is given twice: give each run once")
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


def shorten(text: str, most: int = 36) -> str:
    """Returns the text, its middle left out where it is longer."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[len(text) + 1 - most + most // 2 :]}"


# =================================================== comparing =======================================================
def changed_settings(run: Run) -> dict[str, Any]:
    """Returns the settings that are no defaults of this project's script."""
    knobs = t.Hyperparameters.knobs()
    return {n: v for n, v in run.settings.items() if n not in knobs or v != knobs[n].default}


def shared_settings(runs: list[Run]) -> dict[str, Any]:
    """Returns the settings that are no defaults and have one value in all these runs."""
    changed = [changed_settings(run) for run in runs if run.config] or [{}]
    return {n: v for n, v in changed[0].items() if all(n in other and other[n] == v for other in changed)}


def seed_groups(runs: list[Run]) -> list[list[Run]]:
    """Returns the finished runs, grouped by equality of all settings but the seed, of script, kind and scored text."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.final:
            same = [run.final[name] for name in ("code_sha256", "kind", "num_targets", "num_bytes")]
            groups.setdefault(json.dumps([run.settings, same], sort_keys=True), []).append(run)
    return list(groups.values())


# =================================================== figures =========================================================
class Key(NamedTuple):
    """An entry of a legend: a line with its dash, or an area."""

    label: str
    colour: str
    dash: tuple[float, ...] | None = None


class Picture(NamedTuple):
    """A drawn figure: name of its PNG, title, legend, its content in words, what to know about it."""

    name: str
    title: str
    figure: Figure
    legend: list[Key]
    words: str
    caption: str = ""


def new_axes(height: float, left: float, right: float, bottom: float, top: float) -> tuple[Figure, Axes]:
    """Returns a figure of the page's width, and axes in it with these margins; all in units of the page."""
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    sides = (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (bottom + top) / height)
    axes = figure.add_axes(sides)
    axes.grid(True, color=PAINT["rule"], linewidth=0.8)
    axes.tick_params(length=0, pad=5, labelcolor=PAINT["muted"])
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(PAINT["muted"])
    axes.set_axisbelow(True)
    return figure, axes


def legend_of(runs: list[Run]) -> list[Key]:
    """Returns the legend of runs: none where the page has one alone."""
    return [Key(run.name, run.colour, run.dash) for run in runs if not run.alone]


def line_style(key: Key | Run) -> dict[str, Any]:
    return {"color": PAINT[key.colour], "linewidth": 1.7, "linestyle": (0, key.dash) if key.dash else "-"}


def compact(value: float, _position: object = None) -> str:
    """Returns the number of an axis: 1.5B, 20k, 0.25."""
    scales = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (0, ""))
    size, letter = next((pair for pair in scales if value >= pair[0]), (1, ""))
    return f"{value / (size or 1):.4g}{letter}"


def difference(value: float) -> str:
    """Returns a signed number with a true minus."""
    return f"{value:+.5f}".replace("-", "\N{MINUS SIGN}")


def draw_loss(runs: list[Run], unit: str) -> Picture:
    """Returns train loss, as lines, and validation loss, as dots, against steps, tokens or seconds."""
    height, everything, framed, told = 286, [], [], []
    figure, axes = new_axes(height, 34, 16, 44, 26)
    for run in runs:
        factor = run.config["train_batch_tokens"] if unit == "tokens" else 1
        rows, dots = [(e["step"], e["seconds"], e["train_loss"]) for e in run.train], run.validations()
        x, dots_x = ([p[1] if unit == "seconds" else p[0] * factor for p in points] for points in (rows, dots))
        axes.plot(x, [p[2] for p in rows], **line_style(run), marker="." if len(rows) == 1 else None)
        dot = {"s": 50, "color": PAINT[run.colour], "edgecolor": PAINT["card"], "linewidth": 1.2, "zorder": 3}
        axes.scatter(dots_x, [p[2] for p in dots], **dot)
        # Of a long run the first steps would take all of the height: the frame begins after a twentieth.
        least = 0.05 * rows[-1][0] if rows[-1][0] >= 1000 else 0
        everything += [p[2] for p in rows + dots]
        framed += [p[2] for p in rows + dots if p[0] >= least]
        told.append(f"{run.name} from {rows[0][2]:.4f} to {rows[-1][2]:.4f}")
    low, high, most = min(everything), max(framed), max(everything)
    pad = 0.05 * (high - low) or 0.1
    axes.set(xlim=(0, None), ylim=(low - pad, high + pad))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(compact))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=ROUND))
    label = "seconds of training, validations not counted" if unit == "seconds" else unit
    figure.text(0.5, 7 / height, label, ha="center", color=PAINT["muted"])
    figure.text(4 / WIDTH, 1 - 14 / height, "nats a token", color=PAINT["muted"])
    caption = f"The first steps, up to {most:.2f}, lie above the frame." if most > high else ""
    words = f"Train loss against {unit}, in nats a token: {'; '.join(told)}"
    return Picture(f"loss_{unit}", f"Loss against {unit}", figure, legend_of(runs), words, caption)


def draw_ladder(runs: list[Run]) -> Picture:
    """Returns the scores of the stages, from above to below, in bits per byte; of one run with the differences."""
    stages, alone = [stage for stage in STAGES if any(stage in run.scores for run in runs)], runs[0].alone
    height, right, told = 62 + 42 * len(stages), 146 if alone else 18, []
    figure, axes = new_axes(height, 78, right, 42, 8)
    for run in runs:
        ladder = [(score, stages.index(stage)) for stage, score in run.ladder().items()]
        axes.plot(*zip(*ladder), **line_style(run), marker="o", markersize=7, markeredgecolor=PAINT["card"])
        for (score, y), before in zip(ladder, [None, *ladder]) if alone else ():
            side = {"y": y, "ha": "right", "va": "center_baseline", "transform": axes.get_yaxis_transform()}
            axes.text(x=1 + 70 / (WIDTH - 78 - right), s=f"{score:.5f}", color=PAINT["text"], **side)
            text = difference(score - before[0]) if before else ""
            axes.text(x=1 + 142 / (WIDTH - 78 - right), s=text, color=PAINT["muted"], **side)
        told.append(f"{run.name}: " + ", ".join(f"{stage} {score:.5f}" for stage, score in run.ladder().items()))
    axes.set_ylim(len(stages) - 0.5, -0.5)
    axes.set_yticks(range(len(stages)), stages, color=PAINT["text"])
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(3 if alone else 5, steps=ROUND))
    figure.text(4 / WIDTH, 7 / height, "bits per byte, less is better", color=PAINT["muted"])
    title, words = "From the trained weights to the score", f"Bits per byte. {'; '.join(told)}"
    return Picture("ladder", title, figure, legend_of(runs), words)


def draw_shares(name: str, title: str, shares: list[tuple[Run, dict[Key, float], float]], form: str) -> Picture:
    """Returns what parts make of a whole, as lying bars under their labels: of one run a bar for each part, of several
    a bar for each run, cut into the parts and with the whole beside it."""
    bars, legend = [(run.name, parts, whole) for run, parts, whole in shares], {k for _, p, _ in shares for k in p}
    if shares[0][0].alone:
        bars, legend = [(key.label, {key: value}, value) for key, value in shares[0][1].items()], set()
    row, told, figure = 40, [], Figure(figsize=(WIDTH / 72, 40 * len(bars) / 72))
    axes = figure.add_axes((4 / WIDTH, 0, 1 - 8 / WIDTH, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, max(sum(parts.values()) for _, parts, _ in bars) or 1), ylim=(len(bars), 0))
    for i, (label, parts, whole) in enumerate(bars):
        edge = {"edgecolor": PAINT["card"], "linewidth": 0.8} if len(parts) > 1 else {}
        for left, (key, value) in zip(np.cumsum([0, *parts.values()]), parts.items()):
            axes.barh(i + 25 / row, value, 12 / row, left, color=PAINT[key.colour], **edge)
        side = {"y": i + 14 / row, "color": PAINT["text"], "transform": axes.get_yaxis_transform()}
        axes.text(x=0, s=shorten(label), **side)
        axes.text(x=1, s=form.format(whole), ha="right", **side)
        told.append(f"{label} {form.format(whole)}")
    order = [*FAMILY_COLOURS, *PHASE_COLOURS]
    keys = sorted(legend, key=lambda key: (order.index(key.label) if key.label in order else len(order), key.label))
    return Picture(name, title, figure, keys, f"{title}: {'; '.join(told)}")


def byte_shares(run: Run) -> dict[Key, float]:
    """Returns the bytes of the artifact's parts and of the code; of several runs a family's bits are one part."""
    shares: dict[Key, float] = {}
    for part in run.parts:
        key = Key(part.label if run.alone else part.family, FAMILY_COLOURS.get(part.family, "c7"))
        shares[key] = shares.get(key, 0) + part.alone
    return shares | ({Key("code", FAMILY_COLOURS["code"]): run.final["bytes_code"]} if run.final else {})


def draw_all(runs: list[Run]) -> dict[str, Picture]:
    """Returns name -> picture of all figures for which some run has data."""
    trained, scored = [run for run in runs if run.train], [run for run in runs if run.ladder()]
    sizes = [(r, byte_shares(r), r.bytes_artifact + r.final.get("bytes_code", 0)) for r in runs if r.parts]
    phases = [(r, {Key(n, PHASE_COLOURS[n]): v for n, v in r.seconds().items()}) for r in runs]
    spans = [(run, parts, sum(parts.values())) for run, parts in phases if parts]
    pictures = [draw_loss(trained, unit) for unit in ("steps", "tokens", "seconds") if trained]
    pictures += [draw_ladder(scored)] if scored else []
    pictures += [draw_shares("bytes", "Where the bytes went", sizes, "{:,.0f} bytes")] if sizes else []
    pictures += [draw_shares("seconds", "Where the seconds went", spans, "{:,.1f} s")] if spans else []
    return {picture.name: picture for picture in pictures}


def to_svg(picture: Picture) -> str:
    """Returns the figure as an element of the page: its colours are the page's variables, its text is text."""
    buffer = io.BytesIO()
    picture.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root, variables = ElementTree.fromstring(buffer.getvalue()), {PAINT[name]: f"var(--{name})" for name in PAINT}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):  # that style would be the whole page's
                parent.remove(child)
    attributes = [(element, key, value) for element in root.iter() for key, value in element.attrib.items()]
    used = set(re.findall(r"#([\w-]+)", " ".join(v for _, k, v in attributes if k.endswith(("href", "clip-path")))))
    for element, key, value in attributes:
        del element.attrib[key]
        if key == "style":
            value = re.sub(r"#[0-9a-f]{6}\b", lambda found: variables[found[0]], value)
            value = re.sub(r"font-family:[^;]*; ?", "", re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", value))
        elif key == "id" or key.endswith(("href", "clip-path")):  # the page has several figures: names must differ
            value = re.sub(r"^(url\(#|#|)", rf"\1{picture.name}-", value) if key != "id" or value in used else ""
        if value:
            element.set(key.rpartition("}")[2], value)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": picture.words}
    return re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode"))


def to_png(picture: Picture) -> bytes:
    """Returns the figure on a light ground, with title and legend, which the page has as text."""
    figure, keys, height, buffer = picture.figure, picture.legend, picture.figure.get_figheight() * 72, io.BytesIO()
    figure.text(4 / WIDTH, 1 + 12 / height, picture.title, weight="bold", color=PAINT["text"])
    if keys:
        handles = [Patch(color=PAINT[k.colour]) if k.dash is None else Line2D([], [], **line_style(k)) for k in keys]
        place = {"loc": "upper left", "bbox_to_anchor": (0, -4 / height), "frameon": False}
        columns = 2 if max(len(key.label) for key in keys) < 20 else 1
        legend = figure.legend(handles, ["name"] * len(keys), ncols=columns, labelcolor=PAINT["text"], **place)
        for text, key in zip(legend.get_texts(), keys):  # set later: before 3.10 a label like _a is left out
            text.set_text(shorten(key.label))
    look = {"dpi": 200, "bbox_inches": "tight", "pad_inches": 0.15, "facecolor": PAINT["card"]}
    figure.savefig(buffer, format="png", metadata={"Software": None}, **look)
    return buffer.getvalue()


# =================================================== page ============================================================
CSS = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
header, main, footer { max-width: 74rem; margin: 0 auto; padding: 0 12px; }
header { padding-top: 1.25rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p, ul, dl { margin: 0 0 .75rem; }
ul { padding-left: 1.1rem; overflow-wrap: anywhere; }
.muted, footer, figcaption, small { color: var(--muted); }
figcaption, small, footer, dt, .legend { font-size: .875rem; }
small { display: block; line-height: 1.4; }
.grid, .tiles { display: grid; gap: 12px; grid-template-columns: minmax(0, 1fr); }
.tiles { grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); margin-top: 1rem; }
.card, figure { margin: 0; padding: 14px; min-width: 0; background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px; }
.card > :last-child, .notes ul { margin-bottom: 0; }
figure { padding: 14px 10px; }
figure h3, figcaption, .legend { padding: 0 4px; }
figure > svg { display: block; width: 100%; max-width: 33rem; height: auto; }
svg text { font-family: system-ui, sans-serif; }
svg * { stroke-linejoin: round; }
.legend { list-style: none; margin: .6rem 0; display: grid; gap: .1rem .8rem;
  grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); }
.legend li { display: flex; align-items: baseline; min-width: 0; overflow-wrap: anywhere; }
.swatch { width: 28px; height: 10px; margin-right: .45rem; flex: none; }
dt { color: var(--muted); }
dd { margin: 0; }
dd b { display: block; font-size: 1.45rem; line-height: 1.35; font-weight: 500; }
.notes { border-left: 4px solid var(--c5); margin-top: 1rem; }
.scroll { overflow-x: auto; margin: 0 -6px .75rem; }
:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
table { border-collapse: collapse; min-width: 100%; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem 6px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
thead th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; white-space: nowrap; }
tr:last-child > * { border-bottom: 0; }
.n { text-align: right; }
td.n { white-space: nowrap; }
.long { min-width: 9.5rem; overflow-wrap: anywhere; }
summary { cursor: pointer; padding: .2rem 0; overflow-wrap: anywhere; }
footer { padding-top: 1.5rem; padding-bottom: 2.5rem; }
@media (max-width: 40rem) { tbody th { white-space: normal; min-width: 9.25rem; overflow-wrap: anywhere; } }
@media (min-width: 62rem) {
  .grid { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
  header, main, footer { padding-left: 24px; padding-right: 24px; }
}
"""
KINDS = {
    "ttt_score_first": "adapting at test time, score first",
    "ttt_pre": "adapted before scoring, against the rules",
    "sliding": "sliding windows, no adaptation",
    "plain": "windows that do not overlap, no adaptation",
}


def esc(text: Any) -> str:
    """Returns the text for HTML, in and out of attributes."""
    return html.escape(printable(text))


def num(value: float | None, form: str = ",.0f") -> str:
    """Returns a number as shown, with the exact one of the file beside it; a dash where there is none."""
    return "–" if value is None else f'<data value="{value!r}">{value:{form}}</data>'


def swatch(key: Key) -> str:
    """Returns a small sample of a line or an area."""
    look = f'stroke-width="{10 if key.dash is None else 2.6}" stroke-dasharray="{" ".join(map(str, key.dash or ()))}"'
    line = f'<line x2="28" y1="5" y2="5" style="stroke:var(--{key.colour})" {look}/>'
    return f'<svg class="swatch" viewBox="0 0 28 10" aria-hidden="true">{line}</svg>'


def named(run: Run) -> str:
    """Returns the run's name, with the sample of its line where the page has several."""
    return "".join(map(swatch, legend_of([run]))) + f'<span title="{esc(run.name)}">{esc(shorten(run.name))}</span>'


def table(label: str, head: list[str], rows: list[list[str]]) -> str:
    """Returns a table in a box of its own that scrolls; cells are HTML, those of numbers stand to the right."""
    heads, body = "", ""
    for column, text in enumerate(head):
        numeric = any(row[column].startswith("<data") for row in rows)
        heads += f'<th scope="col"{" class=n" * numeric}>{esc(text)}</th>'
    for row in rows:
        kinds = ["n" if cell.startswith(("<data", "–")) else "long" if len(cell) > 24 else "short" for cell in row]
        cells = "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(kinds[1:], row[1:]))
        body += f'<tr><th scope="row">{row[0]}</th>{cells}</tr>'
    box = f'<div class="scroll" role="region" aria-label="{esc(label)}" tabindex="0">'
    return f"{box}<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"


def card(*parts: str) -> str:
    return f'<div class="card">{"".join(parts)}</div>'


def figure_html(picture: Picture) -> str:
    """Returns the figure with its title, legend and caption."""
    keys = () if picture.name in ("loss_tokens", "loss_seconds") else picture.legend  # as in loss_steps, before them
    legend = "".join(f"<li>{swatch(key)}{esc(shorten(key.label))}</li>" for key in keys)
    rest = f'<ul class="legend">{legend}</ul>' * bool(legend) + f"<figcaption>{picture.caption}</figcaption>"
    return f'<figure id="{picture.name}"><h3>{picture.title}</h3>{to_svg(picture)}{rest}</figure>'


def tiles_html(run: Run) -> str:
    """Returns the figures of one run: score, size, seconds, rules, seed."""
    tiles, final = [], run.final
    if final:
        loss = f"{num(final['val_loss'], '.5f')} nats a token, {esc(KINDS.get(final['kind'], final['kind']))}"
        size = f"{final['bytes_total'] / t.SIZE_LIMIT_BYTES:.1%} of {t.SIZE_LIMIT_BYTES:,}: "
        size += f"model {num(final['bytes_model'])}, code {num(final['bytes_code'])}"
        tiles += [("bits per byte", num(final["val_bpb"], ".5f"), loss), ("bytes", num(final["bytes_total"]), size)]
    if run.train:
        tiles.append(("seconds of training", num(run.train_seconds, ",.1f"), f"{num(run.steps)} steps"))
    if final:
        text = f"{num(final['num_targets'])} targets of {num(final['num_bytes'])} bytes"
        if "eval_seconds_strict" in final:
            text += f"; {num(final['eval_seconds_strict'], ',.1f')} with loading and preflight"
        kept, says = run.verdict()
        tiles.append(("seconds of scoring", num(final["eval_seconds"], ",.1f"), text))
        tiles.append(("rules kept", kept, esc("; ".join(says))))
    if run.config:
        tiles.append(("seed", num(run.config["seed"], ""), ""))
    cells = "".join(card(f"<dt>{name}</dt><dd><b>{big}</b><small>{rest}</small></dd>") for name, big, rest in tiles)
    return f'<dl class="tiles">{cells}</dl>'


def comparison_html(runs: list[Run]) -> str:
    """Returns the table of several runs, and the means over seeds of equal settings."""
    shared, rows = shared_settings(runs), []
    for run in runs:
        final, own = run.final, {n: v for n, v in changed_settings(run).items() if n not in shared}
        row = [named(run), num(run.config.get("seed"), ""), num(final.get("val_bpb"), ".5f")]
        row += [num(final.get("bytes_total")), num(run.steps), num(run.train_seconds, ",.1f")]
        kept, says = run.verdict()
        verdict = kept + "".join(f"<small>{esc(text)}</small>" for text in says)
        different = esc(", ".join(f"{n.upper()}={v}" for n, v in own.items()) or "none")
        if len(own) > 2:  # they would make the row a page high on a phone
            different = f"<details><summary>{len(own)} settings</summary>{different}</details>"
        rows.append([*row, num(final.get("eval_seconds"), ",.1f"), verdict, different])
    head = ["run", "seed", "bits per byte", "bytes", "steps", "training, s", "scoring, s", "rules kept"]
    means = means_html([group for group in seed_groups(runs) if len(group) > 1])
    return table("Runs", [*head, "settings that differ"], rows) + means


def means_html(groups: list[list[Run]]) -> str:
    """Returns means and sample standard deviations over runs that differ in their seed alone; none is left out."""
    rows = []
    for group in groups:
        seeds, figures = sorted(run.config["seed"] for run in group), []
        for name in ("val_bpb", "val_loss"):
            values = [run.final[name] for run in group]
            figures += [num(statistics.mean(values), ".5f"), num(statistics.stdev(values), ".5f")]
        twice = ": one is there more than once" if len(set(seeds)) < len(seeds) else ""
        names = "<br>".join(named(run) for run in group)
        rows.append([names, num(len(group)), *figures, esc(", ".join(map(str, seeds)) + twice)])
    head = ["runs of equal settings", "n", "bits per byte", "sample std", "nats a token", "sample std", "seeds"]
    none = "<p>No two finished runs here differ in their seed alone, so there is no mean over seeds.</p>"
    return f"<h3>Mean over seeds</h3>{table('Mean over seeds', head, rows)}" if rows else none


def losses_html(runs: list[Run]) -> str:
    """Returns what the curves begin and end with."""
    rows = []
    for run in runs:
        last = run.validations()[-1:] or [(0, 0, None)]
        losses = (run.train[0]["train_loss"], run.train[-1]["train_loss"], last[0][2])
        tokens = run.steps * run.config["train_batch_tokens"]
        rows.append([named(run), num(run.steps), num(tokens), *(num(loss, ".4f") for loss in losses)])
    text = """<p>Lines: train loss as logged, of a batch. Dots: validation loss of the raw weights, the last one after
    the last step. Both in nats a token.</p>"""
    head = ["run", "steps", "tokens", "first train", "last train", "validation"]
    return text + table("Losses", head, rows)


def ladder_html(runs: list[Run]) -> str:
    """Returns the scores on the way, with the differences from the stage before."""
    stages, rows = [stage for stage in STAGES if any(stage in run.scores for run in runs)], []
    for run in runs:
        ladder, before = run.ladder(), dict(zip(list(run.ladder())[1:], run.ladder().values()))
        steps = {stage: f"<small>{difference(ladder[stage] - before[stage])}</small>" for stage in before}
        rows.append([named(run), *(num(ladder.get(stage), ".5f") + steps.get(stage, "") for stage in stages)])
    text = """<p>Bits per byte, and the difference from the stage before. <b>raw</b>: the weights after the last step;
    <b>averaged</b>: their moving average; <b>quantized</b>: that, stored in few bits and read back from the file;
    <b>sliding</b>: the same in overlapping windows; <b>ttt</b>: the same, training on what it has scored.</p>"""
    return text + table("Scores on the way", ["run", *stages], rows)


def bytes_html(runs: list[Run]) -> str:
    """Returns what each part of each artifact takes."""
    whole = "" if runs[0].alone else " The number beside a bar is the real size of the run's file and code."
    text = f"""<p>The file is compressed as a whole, so no part has a size of its own in it: shown is each part
    compressed alone, codes and scales, by zstd level {ZSTD_LEVEL}, or codes by the tables of rans where that is the
    file's coder. Code is counted as it is.{whole} From the run's log: <b>clip</b>, the mean over rows of the largest
    value that can be stored; <b>error</b>, of what is stored, as a part of the weights, both root mean squares.</p>"""
    for run in runs:
        together, rows = sum(part.alone for part in run.parts), []
        for part in run.parts:
            each = 8 * part.alone / part.values if part.values else None
            grid = run.grids.get(part.family, {}) if part.bits and part.bits < 16 else {}
            clip, error = num(grid.get("clip"), ".4f"), num(grid.get("error"), ".2%")
            rows.append([esc(part.label), *map(num, part[2:]), num(each, ".2f"), clip, error])
        head = ["part", "values", "bytes stored", "bytes alone", "bits a value", "clip", "error"]
        sums = f"<p>Together {num(together)} bytes; final_model.bin has {num(run.bytes_artifact)}.</p>"
        inner = sums + table(f"Parts of {run.name}", head, rows)
        text += inner if run.alone else f"<details><summary>{named(run)}</summary>{inner}</details>"
    return text


def seconds_html(runs: list[Run]) -> str:
    """Returns the seconds of each phase of each run."""
    spans = [run.seconds() for run in runs]
    names = [name for name in PHASE_COLOURS if any(name in span for span in spans)]
    rows = [[named(run), *(num(span.get(name), ",.1f") for name in names)] for run, span in zip(runs, spans)]
    text = """<p>Wall-clock seconds. <b>train</b> and <b>score</b> are what the challenge limits to 600 s each;
    <b>validation</b> is of raw and averaged weights, <b>other scores</b> only inform. Set-up, and what comes after the
    score, are not clocked.</p>"""
    return text + table("Seconds of the phases", ["run", *names], rows)


def settings_html(runs: list[Run]) -> str:
    """Returns the settings that are no defaults and the same in all runs, and the machines."""
    knobs, rows = t.Hyperparameters.knobs(), []
    for name, value in shared_settings(runs).items():
        default = esc(knobs[name].default) if name in knobs else "no setting of this script"
        rows.append([esc(name.upper()), esc(value), default])
    settings = table("Settings", ["setting", "value", "default"], rows) if rows else "<p>None.</p>"
    machines = "".join(f"<li>{esc(m)}</li>" for m in dict.fromkeys(run.config["machine"] for run in runs if run.config))
    return card(settings) + card(f"<h3>Machine</h3><ul>{machines or '<li>not in the log</li>'}</ul>")


def notes_html(runs: list[Run]) -> str:
    """Returns what is missing or does not fit, each with the runs of which it is true."""
    notes: dict[str, list[str]] = {}
    for run in runs:
        for note in run.notes:
            notes.setdefault(note, []).append(esc(shorten(run.name)))
    who = {note: "all runs" if len(names) == len(runs) else ", ".join(names) for note, names in notes.items()}
    items = (f"<li>{'' if runs[0].alone else f'<b>{who[note]}</b>: '}{esc(note)}</li>" for note in notes)
    return f'<div class="card notes" role="note"><ul>{"".join(items)}</ul></div>' if notes else ""


def page_html(runs: list[Run], pictures: dict[str, Picture], now: str = "", style: str = "", script: str = "") -> str:
    """Returns the whole page; while runs are watched, with their state of now at its top, its style, and a script."""
    alone, figures = runs[0].alone, {name: figure_html(picture) for name, picture in pictures.items()}
    sections = {} if alone else {"Comparison": card(comparison_html(runs))}
    trained, stored = [run for run in runs if run.train], [run for run in runs if run.parts]
    scored, timed = [run for run in runs if run.ladder()], [run for run in runs if run.seconds()]
    if trained:
        curves = "".join(figures[f"loss_{unit}"] for unit in ("steps", "tokens", "seconds"))
        sections["Loss"] = curves + card(losses_html(trained))
    for title, name, of, rest in (
        ("Score", "ladder", scored, ladder_html),
        ("Bytes", "bytes", stored, bytes_html),
        ("Seconds", "seconds", timed, seconds_html),
    ):
        if of:
            sections[title] = figures[name] + card(rest(of))
    sections[f"Settings that are not defaults{'' if alone else ', the same in all runs'}"] = settings_html(runs)
    title = esc(runs[0].name) if alone else f"{len(runs)} runs"
    head = now + notes_html(runs) + (tiles_html(runs[0]) if alone else "")
    made = """Made by records/report.py from metrics.jsonl and final_model.bin of each run. Where a number is rounded,
its element in the page's source has the exact value. The figures lie beside this page as PNGs."""
    return whole_page(f"report of {'a run' if alone else 'runs'}", title, head, sections, made, style, script)


def whole_page(
    of: str, title: str, head: str, sections: dict[str, str], made: str, style: str = "", script: str = ""
) -> str:
    """Returns a page: what it is of, its title, what stands below that, title -> content of each section, how it was
    made, styles of its own, and a script that may ask the page's server; all as HTML. A section named Comparison takes
    the whole width, the others have two columns."""
    main = "".join(
        f'<section><h2>{name}</h2><div class="{"" if name == "Comparison" else "grid"}">{inner}</div></section>'
        for name, inner in sections.items()
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'; connect-src 'self'"
        script = f"<script>{script}</script>\n"
    light, dark = (" ".join(f"--{name}: {pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title} · Parameter Golf</title>
<style>
:root {{ color-scheme: light dark; {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}{CSS}{style}</style>
</head>
<body>
<header><p class="muted">Parameter Golf, {of}</p><h1>{title}</h1>
{head}</header>
<main>{main}</main>
<footer>{made}</footer>
{script}</body>
</html>
"""


# =================================================== main ============================================================
PICTURES = ("loss_steps", "loss_tokens", "loss_seconds", "ladder", "bytes", "seconds")
LOOK = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "parameter-golf",
    "font.size": FONT,
    "text.parse_math": False,  # a $ in a run's name is a $
    "axes.formatter.useoffset": False,
}


@contextlib.contextmanager
def page_look() -> Iterator[None]:
    """Draws, in this context, as pages need it: the user's own settings would change them."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(LOOK)
        yield


def write_report(runs: list[Run], out: Path) -> list[Path]:
    """Writes the page and the PNGs, each whole or not at all, and returns their paths. PNGs of an earlier report whose
    figure these runs do not have are removed."""
    out.mkdir(parents=True, exist_ok=True)
    with page_look():
        pictures = draw_all(runs)
        page = page_html(runs, pictures).encode()  # first: PNGs add titles and legends to the figures
        images = {name: to_png(picture) for name, picture in pictures.items()}
    for name in PICTURES:
        path = out / f"{name}.png"
        if name in images:
            t.write_atomically(path, images[name])
        else:
            path.unlink(missing_ok=True)
    t.write_atomically(out / "index.html", page)
    return [out / "index.html", *(out / f"{name}.png" for name in images)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a page, and PNGs, of the figures of runs.")
    parser.add_argument("runs", nargs="+", metavar="logs/RUN", help="folder of a run, with its metrics.jsonl")
    parser.add_argument("--out", type=Path, help="folder of the page; default: report/ in the first run's folder")
    parser.add_argument("--watch", action="store_true", help="serve the page to this machine while the runs go on")
    parser.add_argument("--port", type=int, help="of --watch; 0 takes a free one (8765)")
    given = parser.parse_args(arguments)
    if given.watch and given.out:
        parser.error("--watch writes no page, so --out has no effect: leave one of them out")
    if given.port is not None and not given.watch:
        parser.error("--port is of --watch: leave it out, or add that")
    if given.watch:
        import watch

        return watch.main(given.runs, 8765 if given.port is None else given.port)
    try:
        runs = read_runs(given.runs)
        paths = write_report(runs, given.out or Path(given.runs[0]) / "report")
    except (ReportError, OSError, t.UserError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {printable(note)}")
    print(f"wrote {paths[0]} and {len(paths) - 1} PNGs beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
