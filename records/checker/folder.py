"""Reads a submission folder: README, submission.json, logs, scripts, and the log lines that the headline rests on."""

from __future__ import annotations

import itertools
import json
import os
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .logs import Log, ScoreLine, last_score, matching, parse_log, scoring_seconds, train_seconds
from .reading import read_text
from .rules import Finding
from .scripts import Script, loaded_files, read_script
from .submission import Printed, bpb_of, read_seeds, seconds_of, tolerance

NOT_A_LOG = re.compile(r"require|readme|license|notes?\b", re.I)
IS_A_LOG = re.compile(r"\.(?:log|txt|out)$", re.I)


@dataclass
class Folder:
    """All that was read of one submission folder."""

    path: Path
    files: list[str] = field(default_factory=list)
    record: bool = True  # of the record track: time limits bind
    readme: tuple[str, str] = ("", "")  # name and text
    json_name: str = ""
    submission: dict[str, Any] = field(default_factory=dict)
    seeds: dict[int, dict[str, Any]] = field(default_factory=dict)  # results a seed, of submission.json
    logs: list[Log] = field(default_factory=list)
    scripts: list[Script] = field(default_factory=list)  # the script that is shipped, then the files that it loads
    twins: list[Script] = field(default_factory=list)  # other Python files
    audits: dict[str, Any] = field(default_factory=dict)  # our compliance_seed<N>.json
    findings: list[Finding] = field(default_factory=list)  # of reading
    elsewhere: list[Log] = field(default_factory=list)  # logs of subfolders, where the folder itself has logs
    picked: dict[str, ScoreLine] = field(default_factory=dict)  # log -> the line of its result, also of `elsewhere`
    used: list[Log] = field(default_factory=list)  # logs that the headline rests on

    def grade(self, gravest: str) -> str:
        """Returns the severity of a rule that binds records: in the other track it is one step less."""
        return gravest if self.record else {"reject": "warn"}.get(gravest, "note")

    def entry(self, log: Log) -> dict[str, Any]:
        """Returns what submission.json says of a log's seed."""
        return self.seeds.get(log.seed, {}) if log.seed is not None else {}

    def results(self) -> list[tuple[Log, ScoreLine]]:
        """Returns the logs that the headline rests on, each with the line that is its result."""
        return [(log, self.picked[log.name]) for log in self.used]

    def runs(self) -> list[Log]:
        """Returns the logs that the headline rests on, and those that end before a score: both must keep the limits."""
        return self.used + [log for log in self.logs if log.name not in self.picked]

    def code(self) -> int:
        """Returns the bytes of the script and of the files that it loads, as they lie in the folder."""
        return sum(script.size for script in self.scripts)


def guarded(folder: Folder, name: str, reader: Callable[[Path], Any], empty: Any) -> Any:
    """Returns reader(file); where the file cannot be opened, `empty` with a finding."""
    try:
        return reader(folder.path / name)
    except OSError as error:
        folder.findings.append(Finding("F1", "warn", f"cannot be read: {error.strerror}", name))
        return empty


def list_files(folder: Folder) -> list[str]:
    """Returns the regular files, three levels deep. Links that lead outside are findings, not read."""
    root, found = folder.path.resolve(), []

    def unlistable(error: OSError) -> None:
        folder.findings.append(Finding("F1", "warn", f"cannot be listed: {error.strerror}", Path(error.filename).name))

    for parent, directories, names in os.walk(root, onerror=unlistable):
        depth = len(Path(parent).relative_to(root).parts)
        hidden = ("__pycache__", ".git", ".ipynb_checkpoints")
        directories[:] = sorted(d for d in directories if d not in hidden)[:200] if depth < 2 else []
        for path in (Path(parent, name) for name in sorted(names)[:2000]):
            name = path.relative_to(root).as_posix()
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
                folder.findings.append(Finding("F2", "warn", "a link that leads outside the folder is not read", name))
            elif os.path.isfile(path):
                found.append(name)
    return found


def choose_readme(folder: Folder, names: list[str]) -> tuple[str, str]:
    """Returns name and text of README.md; without one, of the README that states the score; of none, the last one."""
    names.sort(key=lambda name: (name == "README.md", name.lower().endswith(".md"), name), reverse=True)
    names = names[: 1 if "README.md" in names else 5]
    texts = [(name, guarded(folder, name, read_text, "")) for name in names]
    claimed = bpb_of(folder.submission)
    told = [entry for entry in texts if claimed is not None and states(entry[1], claimed, 4)]
    return (told or texts or [("", "")])[0]


def stated(text: str) -> list[tuple[float, int]]:
    """Returns the figures of a text that may be scores, with their decimals."""
    return [(float(m[0]), len(m[0]) - 2) for m in re.finditer(r"(?<![\d.])[0-3]\.\d{3,10}(?![\d.])", text)]


def states(text: str, claimed: float, least: int = 3) -> bool:
    """Returns whether a text has a figure, with so many decimals at least, as rounded there."""
    return any(d >= least and abs(v - claimed) <= max(tolerance(claimed, d), 1e-5) for v, d in stated(text))


def read_folder(path: Path) -> Folder:
    """Returns all that is read of a folder. What cannot be read is among its findings."""
    folder = Folder(path)
    folder.files = list_files(folder)
    top = [name for name in folder.files if "/" not in name]
    read_submission(folder, top)
    folder.readme = choose_readme(folder, [name for name in top if re.search(r"readme(?:\.\w+)?$", name, re.I)])
    read_logs(folder, top)
    read_scripts(folder, top)
    place, said = path.resolve().parent.name.lower(), folder.submission
    own = " ".join(str(said.get(key, "")) for key in ("track", "submission_type", "category"))
    other = re.search(r"non.?record|unlimited|ablation", own, re.I)
    other = other or re.match(r"\W*non[- _]?record", str(said.get("name", "")), re.I)
    folder.record = "non" not in place.split("_") and not other
    folder.audits = {name: read_json(folder, name) for name in top if re.fullmatch(r"compliance\w*\.json", name)}
    choose_scores(folder)
    return folder


def read_logs(folder: Folder, top: list[str]) -> None:
    """Sets the logs: files that are logs by content. Those of subfolders come second where the folder has some."""
    for names in (top, [name for name in folder.files if "/" in name][:200]):
        found = folder.elsewhere if folder.logs else folder.logs
        for name in names:
            if not IS_A_LOG.search(name) or NOT_A_LOG.search(Path(name).name):
                continue
            log = guarded(folder, name, parse_log, None)
            if log and (log.scores or log.get("train_s") is not None):
                log.name, own = name, log.get("seed_of_name")
                for score in log.scores:
                    score.file = name
                if log.seed not in folder.seeds and own in folder.seeds:
                    log.seed = int(own)  # submission.json has it under the name's seed: check_layout speaks of it
                found.append(log)
            elif log and name.lower().endswith(".log"):
                message = "no score and no training time found: no log of a run, or a dialect that is not known here"
                folder.findings.append(Finding("F1", "note", message, name))


def read_json(folder: Folder, name: str) -> Any:
    """Returns the content of a JSON file, None with a finding where it is none."""
    text = guarded(folder, name, read_text, "")
    try:
        return json.loads(text, parse_float=Printed)
    except (ValueError, RecursionError) as error:
        grade = "reject" if name == folder.json_name else "warn"
        message = f"is not JSON ({str(error)[:80]}): mend it, tools read it"
        folder.findings.append(Finding("F1", grade, message, name, getattr(error, "lineno", 0)))
        return None


def read_submission(folder: Folder, top: list[str]) -> None:
    """Sets submission.json, or the one file that is named after it, and the results of its seeds."""
    names = [name for name in top if re.fullmatch(r"submission.*\.json", name, re.I)]
    if not names:
        return
    folder.json_name = min(names, key=lambda name: (name != "submission.json", name))
    content = read_json(folder, folder.json_name)
    if isinstance(content, dict):
        folder.submission = content
        folder.seeds = read_seeds(content)
    elif not any(finding.file == folder.json_name for finding in folder.findings):
        message = f"holds a {type(content).__name__}: an object with name, val_bpb, … is expected"
        folder.findings.append(Finding("F1", "reject", message, folder.json_name))


def read_scripts(folder: Folder, top: list[str]) -> None:
    """Sets the script that is shipped with the files that it loads, and the other Python files."""
    names = [name for name in folder.files if name.endswith(".py")][:60]
    found = {name: guarded(folder, name, read_script, None) for name in names}
    scripts = {name: script for name, script in found.items() if script}
    for name, script in scripts.items():
        script.name = name
    likely = [name for name in scripts if name in top and re.fullmatch(r"train\w*\.py", name)]
    if likely:
        main = min(likely, key=lambda n: (n != "train_gpt.py", not n.startswith("train_gpt"), len(n), n))
        # The source of a packed script, beside it, adds nothing to what the packed one holds.
        same = {name for name, script in scripts.items() if name != main and script.hashes & scripts[main].hashes}
        wanted = [main]
        for name in wanted:  # grows while it is walked
            size = guarded(folder, name, lambda path: path.stat().st_size, 0)
            folder.scripts.append(scripts.get(name) or Script(name, size))
            wanted += sorted(loaded_files(folder.scripts[-1], folder.files) - set(wanted) - same)
    folder.twins = [script for script in scripts.values() if script not in folder.scripts]


def choose_scores(folder: Folder) -> None:
    """Sets, for each log, the line that is its result, and the logs that the headline rests on.

    The result is the line that prints what submission.json claims of that seed, or of the whole if there is no result a
    seed: of several the last of the stored model, those with more decimals first. Failing that it is the last line of
    the stored model with six decimals, or just the last. The headline rests on one log a seed of submission.json; where
    that names no seeds, on all logs, or on as many of them as have its value for their mean if all have not."""
    whole, by_seed = bpb_of(folder.submission), any(bpb_of(entry) is not None for entry in folder.seeds.values())
    chosen: dict[Any, Log] = {}
    drop_copies(folder)
    for log in folder.logs:
        claimed = bpb_of(folder.entry(log)) if by_seed else whole
        others = [other for other in folder.elsewhere if by_seed and other.seed == log.seed]
        found = (matching(candidate, claimed) for candidate in (log, *others))  # others: a later evaluation of its own
        score = next((score for score in found if score), None) or last_score(log)
        if score is None:
            continue
        folder.picked[log.name] = score
        key = log.seed if log.seed in folder.seeds else log.name
        if key not in chosen or (matching(log, claimed) and not matching(chosen[key], claimed)):
            chosen[key] = log
    named = [log for key, log in chosen.items() if key in folder.seeds]
    folder.used = named or list(chosen.values())
    if not named and whole is not None and 1 < len(folder.used) <= 10:
        for size in range(len(folder.used), 0, -1):
            for part in itertools.combinations(folder.used, size):
                if abs(statistics.fmean(folder.picked[log.name].bpb for log in part) - whole) <= tolerance(whole):
                    folder.used = list(part)
                    return


def drop_copies(folder: Folder) -> None:
    """Takes copies of a log away, with a finding: train.log often is one of those that have a seed in their name."""
    runs: dict[str, Log] = {}
    for log in sorted(folder.logs, key=lambda log: ("seed" not in log.name, log.name)):
        run = str([(score.bpb, score.line) for score in log.scores]) + str(train_seconds(log))
        if runs.setdefault(run, log) is not log:
            message = f"a copy of {runs[run].name}: it is counted once"
            folder.findings.append(Finding("H2", "note", message, log.name))
    folder.logs = sorted(runs.values(), key=lambda log: log.name)


def eval_seconds(folder: Folder, log: Log, score: ScoreLine) -> float | None:
    """Returns the seconds of the evaluation of a result, by its log or else by submission.json."""
    own = scoring_seconds(log, score)
    return own if own is not None else seconds_of(folder.entry(log), "eval_time", "ttt_eval_time")
