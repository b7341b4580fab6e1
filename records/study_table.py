"""The table of a study: what each configuration scored, and which differences are more than noise. For sweep.py.

As text, as CSV (of configurations and of runs), and as a page with figures in the style of report.py."""

from __future__ import annotations

import csv
import functools
import io
import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import page
from launch import LOGS, t
from matplotlib.ticker import FuncFormatter, MaxNLocator
from optuna.trial import FrozenTrial, TrialState
from scipy import stats
from significance import POWER, PairedTest, holm, paired, paired_seeds_needed, percent, summarize

ALPHA = 0.05  # a difference is claimed below this p
VALUES = "values"  # attribute of a trial: its dimensions, as the environment gets them
RESULTS = "results"  # attribute of a trial: replicate -> result
ERROR = "error"  # attribute of a trial: why it failed, or nothing
LEAST_FOR_IMPORTANCE = 4  # complete configurations
MOST_ROWS = 24  # of a figure
LONGEST_LABEL = 36  # characters; longer ones have the values without their names
STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def folder_of(study: str) -> Path:
    """Return the folder of a study's table, page and outputs."""
    return LOGS / "sweeps" / study


@dataclass
class Configuration:
    """One point of a study, with the results of its replicates."""

    number: int
    values: dict[str, str]
    state: str
    results: dict[str, dict[str, Any]]  # replicate -> launch.Result
    losses: dict[int, float]  # step -> train loss, where halving looked
    error: str

    @property
    def scores(self) -> dict[str, float]:
        return {name: result["val_bpb"] for name, result in self.results.items()}

    @property
    def mean(self) -> float:
        return statistics.mean(self.scores.values())

    def mean_of(self, name: str) -> float | None:
        """Return the mean over the replicates of a number in their results, None where one lacks it."""
        numbers = [result[name] for result in self.results.values()]
        return None if None in numbers or not numbers else statistics.mean(numbers)

    def described(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.values.items()) or "all alike"


def read_configuration(number: int, trial: FrozenTrial) -> Configuration:
    """Return what the database knows of a trial."""
    values = trial.user_attrs.get(VALUES, trial.system_attrs.get("fixed_params", {}))
    error = trial.user_attrs.get(ERROR, "")
    results = trial.user_attrs.get(RESULTS, {})
    losses = dict(sorted(trial.intermediate_values.items()))
    return Configuration(number, dict(values), STATES[trial.state], dict(results), losses, error)


class Difference(NamedTuple):
    """A configuration against the best one."""

    test: PairedTest
    p: float | None  # adjusted for the number of comparisons; None without a test
    verdict: str


def pairwise_p(scores: np.ndarray) -> dict[tuple[int, int], float]:
    """Return (i, j) -> two-sided p of the paired t-test between rows i < j, for those whose differences vary."""
    count, n = scores.shape
    if n < 2:
        return {}
    first, second = np.triu_indices(count, 1)
    differences = scores[first] - scores[second]
    mean, std = differences.mean(axis=1), differences.std(axis=1, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stats.t.sf(np.abs(mean) / std * math.sqrt(n), n - 1)
    return {(int(i), int(j)): float(p) for i, j, p, s in zip(first, second, p, std) if s > 0}


class StudyTable:
    """The configurations of a study, best first, and how sure their order is."""

    def __init__(self, study: optuna.Study, configurations: Sequence[Configuration], alpha: float):
        configurations = merge_twins(configurations)
        self.study = study
        self.name = study.study_name
        self.alpha = alpha
        self.dimensions = list(dict.fromkeys(name for c in configurations for name in c.values))
        self.scored = sorted((c for c in configurations if c.results and c.state != "failed"), key=lambda c: c.mean)
        self.whole = [c for c in self.scored if c.state == "complete"]
        self.best = self.whole[0] if self.whole else None
        self.num_tests = 0
        self.rest = [c for c in configurations if c not in self.scored]
        self.stopped = sorted((c for c in self.rest if c.state == "stopped"), key=lambda c: [*c.losses.values()][-1:])
        self.failed = [c for c in self.rest if c.state == "failed"]
        self.differences = self._compare()

    def _compare(self) -> dict[int, Difference]:
        """Return number -> difference from the best, for the others that are complete.

        The best is chosen by the very scores that are tested, so the tests are those of all pairs: with those against
        the best alone, 9% of studies of ten equal configurations and 3 seeds claim something at alpha 0.05."""
        if not self.whole:
            return {}
        names = list(self.whole[0].scores)
        scores = np.array([[c.scores[name] for name in names] for c in self.whole])
        p_values = pairwise_p(scores)
        adjusted = dict(zip(p_values, holm(list(p_values.values()))))
        self.num_tests = len(p_values)
        differences = {}
        for index, other in enumerate(self.whole[1:], 1):
            test = paired(list(scores[index] - scores[0]), self.alpha)
            p = adjusted.get((0, index))
            differences[other.number] = Difference(test, p, self._verdict(test, p))
        return differences

    def _verdict(self, test: PairedTest, p: float | None) -> str:
        if test.std == 0:
            return "the same" if test.mean == 0 else "all seeds differ by the same"
        if p is None:
            return "one seed: no test"
        if p < self.alpha:
            return "worse"
        needed = paired_seeds_needed(test.mean, test.std, self.alpha / self.num_tests) if test.mean else None
        return f"not shown: {needed or 'over 1000'} seeds would"

    def rows(self) -> tuple[list[str], list[list[Any]]]:
        """Return the names of the columns, and the rows of the configurations with scores."""
        head = ["trial", *self.dimensions, "seeds", "bits per byte", "std", "from best", "interval", "p", "verdict"]
        head += ["steps", "training s", "scoring s", "bytes"]
        rows = []
        for c in self.scored:
            difference = self.differences.get(c.number)
            mean, std, n = summarize(list(c.scores.values()))
            row: list[Any] = [f"{c.number:04d}", *(c.values.get(name, "") for name in self.dimensions), n]
            row += [mean, None if n < 2 else std]
            if difference is None:
                row += [None, None, None, "best so far" if c is self.best else ""]
            else:
                test = difference.test
                row += [test.mean, (test.low, test.high) if test.low is not None else None, difference.p]
                row.append(difference.verdict)
            row[-1] += "" if c.state == "complete" else f" ({c.state})"
            row += [c.mean_of(name) for name in ("steps", "train_seconds", "eval_seconds", "bytes_total")]
            rows.append(row)
        return head, rows

    def notes(self) -> list[str]:
        """Return what a reader of the table has to know."""
        lines = []
        if self.num_tests:
            adjusted = f", adjusted for {self.num_tests} comparisons, of each with each (Holm 1979)"
            lines.append(
                f"p: paired by seed, two-sided{adjusted if self.num_tests > 1 else ''}. An interval has "
                f"{percent(1 - self.alpha)} confidence by itself, and does not know that the best was chosen."
            )
        if any(difference.verdict.startswith("not shown") for difference in self.differences.values()):
            lines.append(
                f"So many seeds would show a difference as large as the measured one {percent(POWER)} of the time."
            )
        if self.differences:
            lines.append("The best of many is partly luck: with other seeds it will score worse than here.")
        if any(len(c.results) < 2 for c in self.whole):
            lines.append("One run shows no spread, so nothing can be told from noise: give several seeds, or artifacts")
        lines += incomparable([result for c in self.scored for result in c.results.values()])
        for c in self.stopped:
            lines.append(
                f"stopped {c.number:04d} {c.described()}: "
                + ", ".join(f"loss {v:.4f} at step {n}" for n, v in c.losses.items())
            )
        for c in self.failed:
            lines.append(f"failed {c.number:04d} {c.described()}: {(c.error.splitlines() or ['unknown'])[-1]}")
        if self.failed:
            lines.append("--retry-failed tries again what has failed.")
        waiting = [c for c in self.rest if c.state in ("running", "waiting")]
        if waiting:
            lines.append(f"{len(waiting)} configurations have no score yet")
        for name, value in self.importances.items():
            lines.append(f"importance of {name}: {value:.2f}")
        if len(self.dimensions) > 1 and not self.importances:
            lines.append(f"importance of the dimensions: not before {LEAST_FOR_IMPORTANCE} complete configurations")
        return lines

    @functools.cached_property
    def importances(self) -> dict[str, float]:
        """Dimension -> its share in what makes configurations good, by PED-ANOVA (Watanabe 2023). Nothing for a single
        dimension, or where configurations are too few."""
        if len(self.dimensions) < 2 or len(self.whole) < LEAST_FOR_IMPORTANCE:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            return optuna.importance.get_param_importances(self.study, evaluator=evaluator)

    def text(self) -> str:
        """Return the table as Markdown that is also readable as it is."""
        head, rows = self.rows()
        lines = markdown(head, [[show(column, value) for column, value in zip(head, row)] for row in rows])
        return "\n".join([f"Study {self.name}", "", *(lines if rows else ["no scores yet"]), "", *self.notes(), ""])

    def write(self) -> list[Path]:
        """Write table.txt, table.csv, runs.csv and index.html, each whole or not at all, and return their paths."""
        folder = folder_of(self.name)
        folder.mkdir(parents=True, exist_ok=True)
        head, rows = self.rows()
        split = head.index("interval")
        flat = [[*row[:split], *(row[split] or (None, None)), *row[split + 1 :]] for row in rows]
        columns = [*head[:split], "low", "high", *head[split + 1 :]]
        files = {
            "table.txt": self.text(),
            "table.csv": as_csv(columns, flat),
            "runs.csv": as_csv(*self.runs()),
            "index.html": page_of(self),
        }
        for name, content in files.items():
            t.write_atomically(folder / name, content.encode())
        return [folder / name for name in files]

    def runs(self) -> tuple[list[str], list[list[Any]]]:
        """Return the names of the columns, and a row for each run that has a result."""
        everything = [*self.scored, *self.rest]
        names = list(dict.fromkeys(name for c in everything for result in c.results.values() for name in result))
        rows = [
            [
                f"{c.number:04d}",
                replicate,
                c.state,
                *(c.values.get(n, "") for n in self.dimensions),
                *map(result.get, names),
            ]
            for c in everything
            for replicate, result in c.results.items()
        ]
        return ["trial", "replicate", "state", *self.dimensions, *names], rows


def merge_twins(configurations: Sequence[Configuration]) -> list[Configuration]:
    """Return the configurations, of those with the same values and scores one: a sampler may draw values again."""
    seen = set()
    kept = []
    for c in configurations:
        key = (tuple(c.values.items()), tuple(c.scores.items()))
        if c.state != "complete" or key not in seen:
            kept.append(c)
        seen.add(key)
    return kept


def incomparable(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line where these results are of several scripts, and one where they are of several machines."""
    lines = []
    for name, what in (("code_sha256", "scripts"), ("machine", "machines")):
        found = sorted({str(result[name]) for result in results})
        if len(found) > 1:
            lines.append(f"NOT COMPARABLE without care: these runs are of {len(found)} {what}: {'; '.join(found)}")
    return lines


# =================================================== text ============================================================
FORMS = {"bits per byte": ".5f", "std": ".5f", "from best": "+.5f", "p": ".3g", "steps": ",.0f", "bytes": ",.0f"}


def show(column: str, value: Any) -> str:
    """Return a cell as text."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return f"{value[0]:+.5f} to {value[1]:+.5f}"
    if isinstance(value, float):
        return f"{value:{FORMS.get(column, ',.1f')}}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table whose columns are aligned; those of numbers to the right."""
    widths = [max(3, *(len(row[i]) for row in [head, *rows])) for i in range(len(head))]
    numeric = [all(not row[i] or row[i][0] in "+-.0123456789" for row in rows) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if right else c.ljust(w) for c, w, right in zip(cells, widths, numeric)]
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * (width - 1)}{':' if right else '-'}" for width, right in zip(widths, numeric)]
    return [line(head), f"|{'|'.join(f' {dashes} ' for dashes in rule)}|", *map(line, rows)]


def as_csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table as CSV, numbers in full."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return buffer.getvalue()


# =================================================== page ============================================================
def page_of(table: StudyTable) -> str:
    """Return the page of a study: the table, and figures of scores, dimensions, importance and halving."""
    head, rows = table.rows()
    cells = [[cell_html(column, value) for column, value in zip(head, row)] for row in rows]
    notes = "".join(f"<li>{page.esc(line)}</li>" for line in table.notes())
    inner = page.table("Configurations", head, cells) if cells else "<p>No scores yet.</p>"
    sections = {"Comparison": page.card(inner, f"<ul>{notes}</ul>" if notes else "")}
    with page.page_look():
        pictures = draw_all(table)
        figures = "".join(page.figure_html(picture) for picture in pictures)
    if figures:
        sections["Figures"] = figures
    made = "Made by records/sweep.py. table.csv and runs.csv beside this page have all numbers in full."
    return page.whole_page("a study", page.esc(table.name), "", sections, made)


def cell_html(column: str, value: Any) -> str:
    """Return a cell of the page's table; a number has its exact value beside it."""
    if isinstance(value, float):
        return page.num(value, FORMS.get(column, ",.1f"))
    if isinstance(value, int):
        return page.num(value)
    return page.esc(show(column, value)) or "–"


def draw_all(table: StudyTable) -> list[page.Picture]:
    """Return the figures for which the study has data."""
    pictures = []
    if table.scored:
        pictures.append(draw_scores(table))
        pictures += [draw_dimension(table, name) for name in table.dimensions]
    if table.importances:
        pictures.append(draw_importances(table.importances))
    halved = [c for c in [*table.scored, *table.rest] if c.losses]
    if halved:
        pictures.append(draw_halving(halved))
    return pictures


def draw_scores(table: StudyTable) -> page.Picture:
    """Return the scores of each configuration: a small dot for each replicate, a large one for their mean."""
    shown = table.scored[:MOST_ROWS]
    row = 36
    height = row * len(shown) + 40
    figure, axes = page.new_axes(height, 10, 14, 36, 4)
    told = []
    for y, c in enumerate(shown):
        colour = page.PAINT["c2" if c is table.best else "c0"]
        scores = list(c.scores.values())
        axes.scatter(scores, [y + 0.68] * len(scores), s=14, color=page.PAINT["c6"])
        axes.scatter([c.mean], [y + 0.68], s=46, color=colour, edgecolor=page.PAINT["card"], linewidth=1, zorder=3)
        label = f"{c.number:04d} {c.described()}"
        if len(label) > LONGEST_LABEL:
            label = f"{c.number:04d} {', '.join(c.values.values())}"
        place = {"y": y + 0.36, "color": page.PAINT["text"], "transform": axes.get_yaxis_transform()}
        axes.text(x=0, s=page.shorten(label), **place)
        axes.text(x=1, s=f"{c.mean:.5f}", ha="right", **place)
        told.append(f"{label} {c.mean:.5f}")
    axes.set_ylim(len(shown), 0)
    axes.set_yticks([])
    axes.margins(x=0.06)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=page.ROUND))
    figure.text(0.5, 6 / height, "bits per byte, less is better", ha="center", color=page.PAINT["muted"])
    caption = "Small dots: replicates. Large dots: their mean."
    if len(shown) < len(table.scored):
        caption += f" The best {len(shown)} of {len(table.scored)} configurations."
    words = f"Bits per byte by configuration: {'; '.join(told)}"
    return page.Picture("scores", "Scores", figure, [], words, caption)


def draw_dimension(table: StudyTable, name: str) -> page.Picture:
    """Return the means of the configurations against one of their values."""
    points = [(c.values[name], c.mean) for c in table.scored if name in c.values]
    height = 216
    figure, axes = page.new_axes(height, 56, 16, 44, 26)
    values = sorted({value for value, _ in points}, key=lambda value: (not is_number(value), as_number(value), value))
    positions: dict[str, float] = {value: i for i, value in enumerate(values)}
    if all(map(is_number, values)) and len(values) > 5:
        positions = {value: float(value) for value in values}
        if min(positions.values()) > 0 and max(positions.values()) >= 20 * min(positions.values()):
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(page.compact))
    else:
        axes.set_xticks(range(len(values)), [page.shorten(value, 16) for value in values])
        axes.set_xlim(-0.5, len(values) - 0.5)
    best = table.best
    for value, mean in points:
        is_best = best is not None and best.values.get(name) == value and best.mean == mean
        colour = page.PAINT["c2" if is_best else "c0"]
        axes.scatter([positions[value]], [mean], s=30, color=colour, edgecolor=page.PAINT["card"], linewidth=0.8)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=page.ROUND))
    figure.text(0.5, 7 / height, name, ha="center", color=page.PAINT["muted"])
    figure.text(4 / page.WIDTH, 1 - 14 / height, "bits per byte", color=page.PAINT["muted"])
    words = f"Bits per byte against {name}: " + "; ".join(f"{value} {mean:.5f}" for value, mean in points)
    return page.Picture(f"by-{name.lower()}", f"Score by {page.esc(name)}", figure, [], words)


def is_number(text: str) -> bool:
    return not math.isnan(as_number(text))


def as_number(text: str) -> float:
    """Return a text as a number, nan where it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def draw_importances(importances: dict[str, float]) -> page.Picture:
    """Return the share of each dimension, as lying bars."""
    row = 36
    height = row * len(importances) + 40
    figure, axes = page.new_axes(height, 10, 14, 36, 4)
    for y, (name, value) in enumerate(importances.items()):
        axes.barh(y + 0.68, value, 0.3, color=page.PAINT["c0"])
        place = {"y": y + 0.36, "color": page.PAINT["text"], "transform": axes.get_yaxis_transform()}
        axes.text(x=0, s=page.shorten(name), **place)
        axes.text(x=1, s=f"{value:.2f}", ha="right", **place)
    axes.set_ylim(len(importances), 0)
    axes.set_xlim(0, 1)
    axes.set_yticks([])
    figure.text(0.5, 6 / height, "share", ha="center", color=page.PAINT["muted"])
    caption = "PED-ANOVA (Watanabe 2023): what sets the best tenth of the configurations apart from the others."
    words = "Importance: " + "; ".join(f"{name} {value:.2f}" for name, value in importances.items())
    return page.Picture("importance", "Importance", figure, [], words, caption)


def draw_halving(configurations: Sequence[Configuration]) -> page.Picture:
    """Return the losses at the steps where halving decided."""
    height = 240
    figure, axes = page.new_axes(height, 40, 16, 44, 26)
    for c in configurations:
        is_stopped = c.state == "stopped"
        colour = page.PAINT["c6" if is_stopped else "c2"]
        axes.plot(*zip(*c.losses.items()), color=colour, marker="o", markersize=4, linewidth=1.2)
    axes.set_xscale("log")
    steps = sorted({step for c in configurations for step in c.losses})
    axes.set_xticks(steps, [page.compact(step) for step in steps])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=page.ROUND))
    figure.text(0.5, 7 / height, "step", ha="center", color=page.PAINT["muted"])
    figure.text(4 / page.WIDTH, 1 - 14 / height, "train loss, nats a token", color=page.PAINT["muted"])
    legend = [page.Key("went on", "c2", ()), page.Key("stopped", "c6", ())]
    words = "Train loss at the steps of halving: " + "; ".join(
        f"{c.described()} {[*c.losses.values()]}" for c in configurations
    )
    return page.Picture("halving", "Where trials were stopped", figure, legend, words)
