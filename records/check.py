"""Audits submission folders of the challenge from their files alone: README, submission.json, logs and scripts.

    python records/check.py records/track_10min_16mb/2026-04-09_Name …      # a table and a closing line per folder
    python records/check.py --json FOLDER … > audit.json                    # the same for machines

Nothing that is checked is ever run or imported: scripts are unpacked within bounds and parsed, logs are read line by
line. A finding has a rule, a severity, the values with what to do, and the file and line. `reject`: a written rule or a
ruling of the organizers is broken by the folder's own figures. `warn`: merged records have it too, a reviewer will ask.
`note`: good to know. What is not found is said to be not found; nothing is guessed. The exit status is 0 without a
reject, 1 with one, 2 for a folder that does not exist.

Reading downwards: rules, the folder, logs, submission.json, scripts, one function a rule, printing."""

from __future__ import annotations

import argparse
import ast
import base64
import bz2
import codecs
import hashlib
import io
import itertools
import json
import lzma
import math
import os
import re
import statistics
import sys
import textwrap
import tokenize
import warnings
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# ================================================ 1  RULES ============================================================
# Rn: the challenge's README, rule by rule; "#n": a pull request or issue of openai/parameter-golf.
# id: (gravest severity, meaning, source)
RULES = {
    "F1": ("reject", "README.md, submission.json, a log and a script are there and can be read", "R9, #505, #561"),
    "F2": ("warn", "names and layout are those that tools and reviewers expect", "R9, #1143"),
    "F3": ("warn", "submission.json has the keys of merged records", "R9"),
    "A1": ("reject", "our own audit of the trained model was passed, our own log reports no break", "R2, R6, R14"),
    "S1": ("reject", "code as shipped + model <= 16,000,000 bytes, for every seed", "R1, #1835, #1809"),
    "S2": ("warn", "log, submission.json and the files on disk count the same bytes", "R1, #1835, #1530"),
    "S3": ("reject", "other local files that the script loads count as code", "R1, #1412"),
    "S4": ("warn", "a packed script can be unpacked", "#1804"),
    "T1": ("reject", "training + calibration on training data <= 600 s", "R3, #677, #634, #1868"),
    "T2": ("reject", "training <= 600 s", "R3"),
    "T3": ("reject", "scoring <= 600 s; warns where it is more with loading and compiling", "R4, #1972"),
    "T4": ("reject", "one configuration for all seeds, no forced stop, 600 s, 8 processes", "R3, #2124, #1908"),
    "M1": ("reject", "tokens x loss / (ln 2 x bpb) is the validation text's number of bytes", "R8, #1719, #2071"),
    "M2": ("reject", "the whole validation split is scored", "R14, #2109"),
    "M3": ("reject", "a leading space is counted once, not in the table of bytes and beside it", "R8, #1719"),
    "M5": ("warn", "the same training shards for every seed, not one of 80", "#363"),
    "M6": ("reject", "no signature of a data preparation that leaks validation text", "R5, #2018, #2127, #2130"),
    "H1": ("reject", "the headline follows from the logs, the README states it", "R7, R9, #86, #1334, #2118"),
    "H2": ("warn", "every seed of submission.json has a log, every log is used, no seed is dropped", "R7, R9, #1769"),
    "H3": ("warn", "no later line of a log is worse than its result, storing the model costs little", "#1334, #863"),
    "H4": ("reject", "the score is that of the stored artifact", "R1, R9"),
    "N1": ("warn", "standard deviations are those of a sample (n - 1)", "R7, #1610, #1855"),
    "N2": ("warn", "bytes_total is that of the largest artifact", "R1, #1394"),
    "N3": ("warn", "a p-value follows from its t and degrees of freedom", "R7, #1019"),
    "N4": ("warn", "the booleans of `compliance` agree with the figures", "#1493"),
    "L1": ("reject", "no training on validation tokens before they are scored", "R6, #402, #1972"),
    "L2": ("reject", "calibration does not read validation data", "#728, #1919"),
    "L9": ("warn", "no names of mechanisms that were ruled out", "#677, #1240, #1902"),
    "P1": ("reject", "the script parses, also on Python 3.10", "R9, #1541, #1523"),
    "P2": ("warn", "the script imports without a GPU and its kernels", "#280, #735"),
    "P3": ("warn", "the script needs no module that lies beside it", "#150, #448, #998"),
    "P4": ("warn", "variables of the README's commands are read by the script", "#549, #1787, #1855"),
    "P5": ("note", "no traps: dataclass, silent codec, unnamed requirements", "R10, #840, #274"),
    "D1": ("note", "the names that automated reviewers look for", "#1741, #420"),
    "X1": ("reject", "the folder was read and every rule ran (else it is this program's fault)", "records/check.py"),
}
SIZE_LIMIT, TIME_LIMIT = 16_000_000, 600.0
SIZE_MARGIN = 10_000  # bytes: the model's size moves by +-5 kB from run to run (#1978)
OVERSHOOT = 1.0  # seconds: 44 of 127 merged logs test the cap after the step, by 51 ms in the median
CALIBRATION_MERGED = 610.0  # seconds: training + calibration of merged records reach 606.6 (#2135)
VAL_BYTES = (151.02e6, 151.10e6)  # merged logs since 2026-03-18 lie in 151.024e6 .. 151.081e6
LAUNCH_BYTES = 155.77e6  # of the baseline of launch day, an older export of the same documents
TOKENS_PER_BYTE = {"sp1024": 0.41052, "sp4096": 0.30125, "sp8192": 0.26834, "CaseOps": 0.31674, "byte260": 1.0}
LEAK_SHARDS = 1499
WORSE = 0.0005  # bits per byte: less is the noise of a seed
NEAR_SEED = 0.003  # bits per byte: a seed alone is no farther from the mean of several
MAX_BPB = 20.0  # more is no score
MAX_TEXT, MAX_SOURCE, MAX_LINE = 4_000_000, 1_000_000, 20_000  # bytes of a text, of an unpacked script, of a line
MAX_PARSED, MAX_COMMANDS = 2_000, 200_000  # of a log's line, of a README, that regular expressions see


@dataclass
class Finding:
    """What one rule says of one folder, and the line that shows it."""

    rule: str
    severity: str
    message: str
    file: str = ""
    line: int = 0
    also: list[str] = field(default_factory=list)  # further places of the same finding


@dataclass
class Score:
    """One line with a score: what stands before the numbers, the numbers, and their decimals as printed."""

    label: str
    bpb: float
    loss: float | None
    digits: tuple[int, int]
    line: int
    kind: str  # final: of the stored model; diagnostic: of it, on the way; unquantized: before it; training: at a step
    seconds: float | None = None
    file: str = ""
    num_bytes: float | None = None  # that a mixture of byte distributions counted


@dataclass
class Log:
    """Figures of one log: the last values of each field with their lines, all scores, the settings."""

    name: str
    values: dict[str, deque[tuple[float, int]]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=20)))
    scores: list[Score] = field(default_factory=list)
    config: dict[str, tuple[str, int]] = field(default_factory=dict)
    dumped: bool = False  # the settings are a complete dump
    seed: int | None = None
    epochs: list[tuple[int, str, int]] = field(default_factory=list)  # of adaptation: line, name, number

    def get(self, name: str) -> float | None:
        """Returns the last value of a field, None where the log has none."""
        return self.values[name][-1][0] if self.values.get(name) else None

    def at(self, *names: str) -> tuple[str, int]:
        """Returns the place of the first of some fields that the log has."""
        return self.name, next((self.values[name][-1][1] for name in names if self.values.get(name)), 0)

    def finals(self) -> list[Score]:
        """Returns the scores of the stored model, in order."""
        return [score for score in self.scores if score.kind == "final"]


@dataclass
class Script:
    """One file of code: its size as shipped, its source after unpacking, its tree where it parses."""

    name: str
    size: int
    source: str = ""
    tree: ast.Module | None = None
    error: tuple[str, int] | None = None  # why it does not parse, and where
    packed: str = ""  # how it was packed
    problem: str = ""  # why it could not be unpacked
    hashes: set[str] = field(default_factory=set)  # SHA-256 of the file and of what is packed in it

    def nodes(self) -> Iterator[ast.AST]:
        """Yields all nodes of the tree, none where the source does not parse."""
        return ast.walk(self.tree) if self.tree else iter(())


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
    picked: dict[str, Score] = field(default_factory=dict)  # log -> the line that is its result, also of `elsewhere`
    used: list[Log] = field(default_factory=list)  # logs that the headline rests on

    def grade(self, gravest: str) -> str:
        """Returns the severity of a rule that binds records: in the other track it is one step less."""
        return gravest if self.record else {"reject": "warn"}.get(gravest, "note")

    def entry(self, log: Log) -> dict[str, Any]:
        """Returns what submission.json says of a log's seed."""
        return self.seeds.get(log.seed, {}) if log.seed is not None else {}

    def results(self) -> list[tuple[Log, Score]]:
        """Returns the logs that the headline rests on, each with the line that is its result."""
        return [(log, self.picked[log.name]) for log in self.used]

    def runs(self) -> list[Log]:
        """Returns the logs that the headline rests on, and those that end before a score: both must keep the limits."""
        return self.used + [log for log in self.logs if log.name not in self.picked]

    def code(self) -> int:
        """Returns the bytes of the script and of the files that it loads, as they lie in the folder."""
        return sum(script.size for script in self.scripts)


# =========================================== 2  READING A FOLDER ======================================================
NOT_A_LOG = re.compile(r"require|readme|license|notes?\b", re.I)
IS_A_LOG = re.compile(r"\.(?:log|txt|out)$", re.I)


def encoding_of(start: bytes) -> str:
    """Returns the encoding that a file's first bytes tell: Windows shells write UTF-16."""
    return "utf-16" if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def read_text(path: Path, most: int = MAX_TEXT) -> str:
    """Returns up to so many bytes of a file as text, whatever its bytes are."""
    with open(path, "rb") as file:
        data = file.read(most)
    return data.decode(encoding_of(data[:2]), "replace")


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


# ================================================ 3  LOGS =============================================================
COUNT, DECIMAL = r"(\d[\d,_]*)", r"(\d+(?:\.\d+)?)"
NOT_DENIED = r"(?!.{0,400}(?:\b(?:no|not|never|without)\b|n't\b))"
# field, pattern, scale, an example of the dialect
FIELDS = [
    ("seed", rf"^\s*seed\s*[:=]\s*{COUNT}\s*$", 1, "seed:1337"),
    ("seed", rf"^params:.*\bs:{COUNT}", 1, "params:73685840 L:10 … ws:8 ga:1 s:1337"),
    ("seed", rf"\bSEED={COUNT} \(", 1, "settings (defaults): SEED=42 (1337), …"),
    ("world_size", rf"\bworld_size\s*[:=]\s*{COUNT}", 1, "world_size:8 grad_accum_steps:1"),
    ("world_size", rf"^params:.*\bws:{COUNT}", 1, "params:73685840 L:10 … ws:8 ga:1 s:1337"),
    ("world_size", rf"^device:.*\bprocesses:{COUNT}", 1, "device:cuda (H100) processes:8 …"),
    ("val_tokens", rf"\bval_tokens\s*[:=]\s*{COUNT}", 1, "val_tokens: 40540160"),
    ("val_tokens", rf"\bval_loader:.{{0,400}}\btokens\s*[:=]\s*{COUNT}", 1, "val_loader:shards … tokens:62021632"),
    ("val_tokens", rf"^validation: \d+ shards, {COUNT} targets", 1, "validation: 1 shards, 64,768 targets …"),
    ("train_shards", rf"\btrain_shards\s*[:=]\s*{COUNT}", 1, "train_shards: 80"),
    ("train_shards", rf"^training: {COUNT} shards", 1, "training: 80 shards, 8,000,000,000 tokens, …"),
    ("stop_s", rf"\bstopping_early.{{0,200}}train_time\s?[:=]\s?{DECIMAL}\s*ms", 1e-3, "stopping_early train_time:1ms"),
    ("stop_s", rf"^trained:.*train_time:{DECIMAL}ms", 1e-3, "trained: steps:150 train_time:97105ms …"),
    ("step", rf"^(?:step:?\s?)?{COUNT}/\d+:? train_loss", 1, "500/20000 train_loss: 3.3 …"),
    ("stop_s", rf"^Training complete in {DECIMAL}s \(", 1, "Training complete in 590s (1857 steps)"),
    ("train_s", rf"\btrain_time\s*[:=]\s*{DECIMAL}\s*ms", 1e-3, "step:10/9000 train_loss:6.2 train_time:816ms"),
    ("train_s", rf"^step:\d+/\d+ .*\bt:{DECIMAL}ms", 1e-3, "step:500/50000 loss:3.1 t:77000ms avg:155.3ms"),
    ("calibration_s", rf"(?i)\bcollected .{{0,99}}hessian.{{0,99}} in {DECIMAL}s\b", 1, "collected 6 Hessians in 1s"),
    ("calibration_s", rf"(?i)\bgptq\b.{{0,200}}\b(?:done|took|finished)\D{{0,40}}{DECIMAL}\s*s\b", 1, "gptq done 9s"),
    ("calibration_s", rf"(?i)\bcalibration (?:done|took|time)\D{{0,40}}{DECIMAL}\s*s\b", 1, "calibration took 9.1 s"),
    ("selfgen", r"(?i)^gptq\b.{0,200}(?:autoregressive|self-?gen|generated \d+ seq)()", 1, "gptq:… (AR self-gen)"),
    ("val_calibration", rf"(?i)^(?:gptq|awq)\b{NOT_DENIED}.{{0,200}}calibrat.{{0,200}}\busing val(?:idation)?\b()", 1,
     "gptq:calibrating with 64 batches (using val data)..."),
    ("code_packed", rf"(?i)\bcode[ _]size \(compressed\)\s*[:=]\s*{COUNT}", 1, "Code size (compressed): 31999 bytes"),
    ("code", rf"(?i)\bcode[ _]size(?: \(uncompressed\))?\s*[:=]\s*{COUNT}", 1, "Code size: 64415 bytes"),
    ("code", rf"^artifact:.*\bcode:{COUNT}", 1, "artifact:15.60MB binary:… fp:… code:70399"),
    ("model", rf"(?i)^serialized[ _]model[ _]\S[^:]*:\s*{COUNT} bytes", 1, "Serialized model int6+zlib: 1 bytes"),
    ("model", rf"^artifact: model {COUNT} \+ code", 1, "artifact: model 965,568 + code = 1,061,031 bytes of …"),
    ("model", rf"^Artifact:\s*{COUNT} bytes", 1, "Artifact: 15,417,768 bytes (14.70 MB)"),
    ("total", rf"(?i)\btotal submission size \S[^:]*:\s*{COUNT} bytes", 1, "Total submission size int6+lzma: 1 bytes"),
    ("total", rf"^artifact: model .*= {COUNT} bytes of", 1, "artifact: model 965,568 + code = 1,061,031 bytes of …"),
    ("total", rf"^budget:\s*{COUNT}/\d+", 1, "budget:15670651/16000000 (15.67/16.00MB) FITS"),
    ("warmup_s", rf"(?i)compile warm-?up done \({DECIMAL}s\)", 1, "ttt_lora:compile warmup done (137.6s)"),
    ("load_s", rf"(?i)^(?:deserialize|decompress).*\bin {DECIMAL}s", 1, "Deserialize: decompression done in 24.0s"),
    ("eval_s", rf"\btotal_eval_time\s*[:=]\s*{DECIMAL}\s*s", 1, "total_eval_time:508.8s"),
    ("breaks", r"\bcompliant:0()\s*$", 1, "final_exact … total_bytes:1061031 compliant:0"),
]  # fmt: skip
PATTERNS = [(name, re.compile(pattern), scale) for name, pattern, scale, _ in FIELDS]
STEP_PATTERNS = [entry for entry in PATTERNS if entry[0] in ("train_s", "step")]
LOSS = re.compile(r"\bval[_ ]loss\s*[:=]\s*(\d+\.\d+)", re.I)
BPB = re.compile(r"\b(val[_ ]bpb|\w{0,40}mix_bpb|(?:EMA|Quantized) BPB \([^()]{1,20}\))\s*[:=]\s*\**(\d+\.\d+)", re.I)
MIXTURE = re.compile(r"ppm|n_?gram|(?:^|_)mix(?:er|ture)?(?:_|\b)", re.I)  # of distributions over bytes
MIXED_BYTES = re.compile(r"\b(?:N_sidecar_)?bytes=(\d{1,15})\b")
EVAL_TIME = re.compile(rf"\b(?:eval_)?time\s*[:=]\s*{DECIMAL}\s*(ms|s)\b")
WORTH = re.compile(  # once training has begun, all other lines say nothing that is looked for
    r"bpb|val[_ ](?:tokens|loader)|complete in|seed|shards|stopping|trained:|train_time|\bt:\d|hessian|gptq|awq"
    r"|calibration|code|total|serialize|artifact|budget|compile|decompress|compliant|epoch|hyperparameters|running py"
    r"|^run: ",
    re.I)  # fmt: skip
# A log may begin with the script itself: its lines have quotes, comments, assignments.
SOURCE = re.compile(r"""["#]|\(f?'|^\s*f?'|^\s*[\w.]+ = |^\s*(?:def|class|import|from|return|if|for)\b|:$""")
STAMP = re.compile(
    r"^(?:\x1b\[[0-9;]*m|\d{10}\.\d+\s|\[?rank\d+\]?:?\s|\[?(?:\d{4}-\d\d-\d\d[T ])?\d\d:\d\d:\d\d[.,\dZ]*\]?\s)+"
)
STEP = re.compile(r"^(?:step|iter\w*|it|epoch)\b\s*[:=]?\s*\d|^\d+\s*/\s*\d+", re.I)
PROGRESS = re.compile(r"chunk|\[\d+/\d+\]|\bbatch\b|\bphase\b|progress|running|partial|warm.?up|\bso far\b", re.I)
UNQUANTIZED = re.compile(r"pre[-_ ]?quant|post[-_ ]?(?:ema|swa|train)|^EMA BPB|\braw\b|^averaged|unquantized", re.I)
EPOCH = re.compile(  # a chunk that is named before the epoch is adapted to alone, as one after scoring it is
    r"\W{0,8}([\w-]{0,40}(?:ttt|adapt)[\w-]{0,40}?)[:\s_]{0,3}epoch\s?[:=]?\s?(\d{1,6})\s?/\s?\d", re.I)  # fmt: skip
RESTART = re.compile(r"^(?:Running Py|Hyperparameters:|val_bpb:enabled|run: )")  # another run, appended to the same log
DUMPED = re.compile(r"^\s{2,}(\w+)\s*:(?:\s(.*))?$")  # a line of the dump that "Hyperparameters:" begins
PAIRS = re.compile(r"\w+[:=][^\s:=]+(?:\s+\w+[:=][^\s:=]+)*")  # embed_lr:0.035 …, also with =
SETTING = re.compile(r"\b([A-Z][A-Z0-9_]+)=(\S*) \(")  # settings (defaults): NAME=value (default), …


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


def parse_log(path: Path) -> Log:
    """Returns the figures of a log, read as a stream: lines are cut at MAX_LINE, bytes that are no text replaced."""
    log = Log(path.name)
    with open(path, "rb") as raw:
        encoding = encoding_of(raw.read(2))
        raw.seek(0)
        text, count, whole = io.TextIOWrapper(raw, encoding, "replace"), 0, True
        in_dump = training = False
        while line := text.readline(MAX_LINE):
            count, continued, whole = count + whole, not whole, line.endswith("\n")
            if continued or (training and not WORTH.search(line)):
                continue
            line = STAMP.sub("", line.rstrip())
            training |= bool(STEP.match(line))
            if RESTART.match(line) and log.finals():
                log, training = Log(path.name), False
            if line == "Hyperparameters:":
                in_dump = log.dumped = True
            elif in_dump := in_dump and bool(pair := DUMPED.match(line)):
                log.config[pair[1].lower()] = (pair[2] or "").strip(), count
            if in_dump or not SOURCE.search(line):
                parse_line(log, line, count, not training)
    patterns = (r"seed[_-]?(\d{1,9})", r"(?:_s|log|train|run)[_-]?(\d{1,9})$", r"_(\d{1,9})$")
    named = next((match for pattern in patterns if (match := re.search(pattern, path.stem, re.I))), None)
    stated = log.get("seed") if log.get("seed") is not None else number(log.config.get("seed", ("", 0))[0])
    own = int(named[1]) if named else None
    log.seed = int(stated) if stated is not None else own
    if stated is not None and own not in (None, log.seed):
        log.values["seed_of_name"].append((float(own or 0), log.at("seed")[1]))
    return log


def parse_line(log: Log, line: str, count: int, header: bool) -> None:
    """Adds what one line says to the log; lines of steps, which are most of them, have a time and maybe a score."""
    settings, line = line, line[:MAX_PARSED]
    for name, pattern, scale in STEP_PATTERNS if STEP.match(line) else PATTERNS:
        if match := pattern.search(line):
            log.values[name].append((float(match[1].replace(",", "").replace("_", "")[:18] or 1) * scale, count))
    bpb, loss, epoch = BPB.search(line), LOSS.search(line), EPOCH.match(line)
    if epoch:
        log.epochs.append((count, epoch[1].strip("_").lower(), int(epoch[2])))
    if bpb and float(bpb[2]) <= MAX_BPB:
        label = line[: min(match.start() for match in (bpb, loss) if match)].strip(" \t:|-=>*")
        if PROGRESS.search(label):
            return
        label = label if bpb[1].lower() in ("val_bpb", "val bpb") else f"{label} {bpb[1]}".strip()
        kind = "unquantized" if UNQUANTIZED.search(label) else "final"
        kind = "diagnostic" if kind == "final" and label.lower().startswith("diagnostic") else kind
        kind = "training" if epoch or STEP.match(label) else kind
        digits = len(bpb[2].partition(".")[2]), len(loss[1].partition(".")[2]) if loss else 0
        took, mixed = EVAL_TIME.search(line), MIXED_BYTES.search(line)
        seconds = (float(took[1]) * (1e-3 if took[2] == "ms" else 1) if took else 0.0) or None  # 0ms was not measured
        value, num_bytes = float(loss[1]) if loss else None, float(mixed[1]) if mixed else None
        log.scores.append(Score(label[-80:], float(bpb[2]), value, digits, count, kind, seconds, "", num_bytes))
    elif header and PAIRS.fullmatch(line):
        pairs = (re.split("[:=]", pair, maxsplit=1) for pair in line.split())
        log.config.update({key.lower(): (value, count) for key, value in pairs})
    elif line.startswith("settings (defaults):"):
        log.config.update({key.lower(): (value, count) for key, value in SETTING.findall(settings)})


# ============================================ 4  SUBMISSION.JSON ======================================================
class Printed(float):
    """A number of a JSON file that remembers how many decimals it was written with."""

    decimals: int = 0

    def __new__(cls, text: Any) -> Any:
        value = super().__new__(cls, text)
        if not isinstance(text, str):  # the statistics of Python 3.10 make their results of the type of their values
            return float(value)
        mantissa, _, exponent = text.lower().partition("e")
        value.decimals = len(mantissa.partition(".")[2]) - int(exponent[:4] or 0)
        return value


def number(value: Any) -> float | None:
    """Returns a finite number, also one written as text; None for everything else, booleans included."""
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d[\d,]{0,30}(?:\.\d{1,30})?(?:[eE][-+]?\d{1,3})?\s*", value):
        value = Printed(value.strip().replace(",", ""))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e18:
        return None
    return value if math.isfinite(value) else None


def first(entry: dict[str, Any], *keys: str) -> float | None:
    """Returns the first of some keys that is a number."""
    return next((value for key in keys if (value := number(entry.get(key))) is not None), None)


def bpb_of(entry: dict[str, Any]) -> float | None:
    """Returns the bits per byte that submission.json gives for the whole or for a seed."""
    others = ("mean_bpb", "val_bpb_exact", "final_val_bpb", "bpb", "ttt_val_bpb")
    return first(entry, "val_bpb", "val_bpb_mean", "mean_val_bpb", *others)


def bytes_of(entry: dict[str, Any]) -> float | None:
    """Returns the bytes of the artifact that submission.json gives for a seed."""
    return first(entry, "artifact_bytes", "bytes_total", "total_bytes", "submission_bytes", "artifact_size_bytes")


def seconds_of(entry: dict[str, Any], *names: str) -> float | None:
    """Returns the first of some times that submission.json gives for a seed, in seconds."""
    units = (("_s", 1.0), ("_seconds", 1.0), ("_ms", 1e-3))
    found = (value * scale for n in names for u, scale in units if (value := number(entry.get(n + u))) is not None)
    return next(found, None)


def tolerance(claimed: float, decimals: int = 8) -> float:
    """Returns how far two figures may be apart that are the same number: one unit of the last digit printed."""
    printed = claimed.decimals if isinstance(claimed, Printed) else 8
    return min(max(1.01 * 10.0 ** -max(min(printed, decimals), 0), 1e-6), 5e-3)


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


def read_seeds(submission: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Returns the results of each seed: an object or a list under one of the names in use, else the list of seeds, with
    the list of scores beside it where there is one of the same length."""
    scores = submission.get("seed_scores", submission.get("seed_val_bpb"))
    for key in ("seed_results", "per_seed_results", "per_seed", "results_by_seed", "runs", "results", "seeds", "seed"):
        value = submission.get(key)
        if isinstance(value, dict):
            entries = list(value.items())
        else:
            listed = value if isinstance(value, list) else [value]
            beside = scores if isinstance(scores, list) and len(scores) == len(listed) else [None] * len(listed)
            entries = [
                (e.get("seed"), e) if isinstance(e, dict) else (e, {"val_bpb": s}) for e, s in zip(listed, beside)
            ]
        found: dict[int, dict[str, Any]] = {}
        for name, entry in entries[:1000]:
            digits = re.search(r"\d{1,9}", str(name)) if isinstance(name, (str, int)) else None
            if digits and not isinstance(name, bool) and (isinstance(entry, dict) or key not in ("runs", "results")):
                found[int(digits[0])] = entry if isinstance(entry, dict) else {"val_bpb": entry}
        if found:
            return found
    return {}


def walk(content: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, str, Any]]:
    """Yields (place, key, value) of every key of a JSON document."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs if depth < 20 else ():
        place = f"{path}.{key}".strip(".")[-120:]
        yield place, str(key), value
        yield from walk(value, place, depth + 1)


# ================================================ 5  SCRIPTS ==========================================================
TEXT_CODES = {code.__name__: code for code in (base64.b85decode, base64.a85decode, base64.b64decode, base64.b32decode)}
LOADERS = re.compile(
    r"exec|eval|run_path|run_module|import_module|__import__|spec_from_file_location|SourceFileLoader|CDLL|load_library"
    r"|load|load_inline")  # fmt: skip
RUNNERS = re.compile(r"\b(?:exec|CDLL|subprocess|runpy|import_module)\b")
LOADABLE = re.compile(r"\.(?:py|pyc|so|cpp|cu|cc|c|dll|pyd|xz|br|zip|b85|bin)$")
DATA = re.compile(r"model|weight|checkpoint|fineweb|train_|val_|token|quant.*\.bin$")


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


def read_script(path: Path) -> Script:
    """Returns a script, unpacked as often as it was packed (three times at most), and parsed. Nothing of it is run."""
    script = Script(path.name, path.stat().st_size, read_text(path, MAX_SOURCE))
    script.hashes.add(hashlib.sha256(path.read_bytes() if script.size < MAX_SOURCE else b"").hexdigest())
    parse_script(script)
    for _ in range(3):
        payload = longest_constant(script)
        if payload is None:
            break
        unpacked, how = unpack(payload, script.source)
        if not unpacked:
            script.problem = how
            break
        script.source, script.packed = unpacked, f"{script.packed} > {how}".strip(" >")
        script.hashes.add(hashlib.sha256(unpacked.encode()).hexdigest())
        parse_script(script)
    return script


def parse_script(script: Script) -> None:
    """Sets the tree of a script's source, or why and where the running Python does not parse it."""
    script.tree, script.error = None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in somebody's strings
        try:
            script.tree = ast.parse(script.source)
        except SyntaxError as error:
            script.error = str(error.msg), error.lineno or 0
        except (ValueError, RecursionError, MemoryError) as error:  # null bytes, nesting
            script.error = str(error) or type(error).__name__, 0


def longest_constant(script: Script) -> bytes | str | None:
    """Returns the payload of a packed script: the constant that most of a source with exec is; None if there is none.
    Bytes are spelled with up to four characters each. Text with blanks is no payload."""
    runs = re.search(r"\b(?:exec|eval|__import__)\b", script.source)
    if not runs or not re.search(r"decompress|decode|marshal", script.source):
        return None
    values = [node.value for node in script.nodes() if isinstance(node, ast.Constant)]
    values = [v for v in values if isinstance(v, bytes) or (isinstance(v, str) and not re.search(r"\s", v[:500]))]
    longest = max(values, key=len, default="")
    return longest if len(longest) > max(200, 0.2 * len(script.source)) else None


def unpack(payload: bytes | str, wrapper: str) -> tuple[str, str]:
    """Returns the source in a payload and how it was packed; no source, and why, where no known way leads to one."""
    data = payload.encode("utf-8", "surrogatepass") if isinstance(payload, str) else payload
    candidates = [("bytes", data)] if isinstance(payload, bytes) else []
    for name, decode in TEXT_CODES.items():
        if name in wrapper:
            try:
                candidates.append((name, decode(data)))
            except ValueError:
                continue
    for (name, packed), (codec, decompress) in itertools.product(candidates, DECOMPRESSORS.items()):
        if len(content := decompress(packed)) >= MAX_SOURCE:
            return "", f"it holds more than {MAX_SOURCE:,} bytes of source"
        text = content.decode("utf-8", "replace")
        if len(text) > 20 and "\0" not in text[:1000] and text.count("\ufffd") < 10:
            return text, f"{codec}, {name}"
    if "brotli" in wrapper and not brotli_module():
        return "", "it is packed with brotli, and the package `brotli` is not installed here (pip install brotli)"
    return "", "it is packed in a way that is not known here: ship the readable source beside it"


def unlzma(data: bytes) -> bytes:
    """Returns the content of LZMA data, with a header or raw LZMA2 or LZMA1; nothing where it is none of them."""
    raw = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 25}], [{"id": lzma.FILTER_LZMA1}]
    for make in (
        lambda: lzma.LZMADecompressor(lzma.FORMAT_AUTO, memlimit=1 << 28),
        lambda: lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=raw[0]),
        lambda: lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=raw[1]),
    ):
        try:
            content = (decoder := make()).decompress(data, MAX_SOURCE)
        except (lzma.LZMAError, EOFError, ValueError):
            continue
        if decoder.eof or len(content) > 200:
            return content
    return b""


def unzlib(data: bytes) -> bytes:
    """Returns the content of zlib, gzip or raw deflate data; nothing where it is none of them."""
    for window in (47, -15):
        try:
            return zlib.decompressobj(window).decompress(data, MAX_SOURCE)
        except zlib.error:
            continue
    return b""


def unbz2(data: bytes) -> bytes:
    """Returns the content of bzip2 data; nothing where it is none."""
    try:
        return bz2.BZ2Decompressor().decompress(data, MAX_SOURCE)
    except (OSError, ValueError):
        return b""


def brotli_module() -> Any:
    """Returns the brotli package, None where it is not installed."""
    try:
        import brotli
    except ImportError:
        return None
    return brotli


def unbrotli(data: bytes) -> bytes:
    """Returns the content of brotli data, fed in small pieces: a bomb ends early; nothing without the package."""
    brotli, pieces, length = brotli_module(), [], 0
    if brotli is None or len(data) > 2_000_000:
        return b""
    decoder = brotli.Decompressor()
    try:
        for start in range(0, len(data), 64):
            pieces.append(decoder.process(data[start : start + 64]))
            length += len(pieces[-1])
            if length > MAX_SOURCE:
                return b""
    except brotli.error:
        return b""
    return b"".join(pieces)


DECOMPRESSORS = {"lzma": unlzma, "zlib": unzlib, "bz2": unbz2, "brotli": unbrotli}


def name_of(node: ast.AST) -> str:
    """Returns the name with its dots, "os.environ.get", of an expression; nothing for anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([*([node.id] if isinstance(node, ast.Name) else []), *reversed(parts)])


def loaded_files(script: Script, files: list[str]) -> set[str]:
    """Returns the files of the folder that a script imports or loads by a name that it spells: they count as code."""
    stems: set[str] = set()
    for node in script.nodes() if not script.problem else ():  # else it is a wrapper that is seen, not the script
        if isinstance(node, ast.Import):
            stems |= {alias.name.replace(".", "/") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").replace(".", "/")
            stems |= {base} | {f"{base}/{alias.name}".strip("/") for alias in node.names}
        elif isinstance(node, ast.Call) and LOADERS.fullmatch(name_of(node.func).rpartition(".")[2]):
            texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            stems |= {Path(text).name for text in texts if isinstance(text, str) and len(text) < 200}
    if RUNNERS.search(script.source):  # then a file may be loaded in two steps
        stems |= {n.value for n in script.nodes() if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    paths = {path for stem in stems for path in (stem, f"{stem}.py", f"{stem}/__init__.py")}
    paths = {path for path in paths & set(files) if LOADABLE.search(path) and path != script.name}
    return {path for path in paths if not (DATA.search(path) and path.endswith((".bin", ".xz", ".br", ".zip")))}


def newer_fstring(source: str) -> int:
    """Returns the line of the first f-string that only Python 3.12 parses (PEP 701), 0 if there is none.

    `ast.parse(feature_version=(3, 10))` does not see them. From 3.12 on the tokenizer shows the parts of an f-string:
    older grammars allow within its braces no quote of the outer string, no backslash, no comment and, between single
    quotes, no line break. Older interpreters need no such search: there the source does not parse."""
    if sys.version_info < (3, 12):
        return 0
    start, end, middle = tokenize.FSTRING_START, tokenize.FSTRING_END, tokenize.FSTRING_MIDDLE
    stack: list[tuple[str, int]] = []  # of each open f-string: its quote, and the line of its last part within braces
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            text = "" if token.type in (tokenize.NL, tokenize.NEWLINE) else token.string
            for quote, line in stack[:-1] if token.type in (middle, end) else stack:
                broken = len(quote) == 1 and line not in (0, token.start[0])
                if quote in text or "\\" in text or token.type == tokenize.COMMENT or broken:
                    return token.start[0]
            if token.type == start:
                stack.append((token.string.lstrip("rRfFbBuU"), 0))
            elif token.type == end and stack:
                stack.pop()
            elif stack:
                inside = token.type != middle and token.string != "}"
                stack[-1] = stack[-1][0], token.end[0] if inside else 0
    except (tokenize.TokenError, SyntaxError):
        return 0  # reported as a script that does not parse
    return 0


# ====================================== 6  WHAT THE HEADLINE RESTS ON =================================================
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


def matching(log: Log, claimed: float | None) -> Score | None:
    """Returns the line of a log that prints the claimed score: of the stored model first, then any other."""
    if claimed is None:
        return None
    near = [s for s in log.scores if abs(s.bpb - claimed) <= tolerance(claimed, s.digits[0])]
    rank = {"final": 3, "diagnostic": 2, "unquantized": 1, "training": 0}
    return max(near, key=lambda s: (rank[s.kind], s.loss is not None, min(s.digits[0], 6), s.line), default=None)


def last_score(log: Log) -> Score | None:
    """Returns the last score of the stored model with six decimals, else its last one."""
    finals = [score for score in log.finals() if score.loss is not None] or log.finals()
    return ([score for score in finals if score.digits[0] >= 6] or finals or [None])[-1]


def counted_code(log: Log) -> float | None:
    """Returns the bytes of code that a log counted: the total less the model, else as printed."""
    total, model = log.get("total"), log.get("model")
    return total - model if total and model and total >= model else log.get("code_packed") or log.get("code")


def model_bytes(log: Log) -> float | None:
    """Returns the bytes of a log's stored model: as printed, or the total less the code that was counted."""
    total, code = log.get("total"), counted_code(log)
    return log.get("model") or (total - code if total and code else None)


def train_seconds(log: Log) -> float | None:
    """Returns the seconds of training: the stop's, else the last step's."""
    return log.get("stop_s") if log.get("stop_s") is not None else log.get("train_s")


def eval_seconds(folder: Folder, log: Log, score: Score) -> float | None:
    """Returns the seconds of the evaluation of a result: on its line, on the same score's above, of the whole."""
    timed = [s for s in log.scores if s.seconds is not None and s.line <= score.line and s.file == score.file]
    same = [s.seconds for s in (*timed, score) if s.seconds is not None and abs(s.bpb - score.bpb) < 6e-5]
    own = same[-1] if same else log.get("eval_s")
    return own if own is not None else seconds_of(folder.entry(log), "eval_time", "ttt_eval_time")


# ============================================ 7  RULES: FILES =========================================================
def check_files(folder: Folder) -> Iterator[Finding]:
    """F1: the four files that R9 demands. Merged non-record folders lack logs or scripts: there it is a warning."""
    missing = {
        "no README.md: R9 demands one that explains the submission": not folder.readme[0],
        "no submission.json: R9 demands one with name, GitHub ID, val_bpb": not folder.json_name,
        "no train log with a score or a training time: R9 demands one that the script wrote": not folder.logs,
        "no train_gpt.py: R9 demands the script that was run": not folder.scripts,
    }
    yield from (Finding("F1", folder.grade("reject"), message) for message, absent in missing.items() if absent)


def check_layout(folder: Folder) -> Iterator[Finding]:
    """F2: names. Folders are renamed on request, deviating names break reviewers' tools."""
    resolved = folder.path.resolve()
    if not re.match(r"\d{4}-\d\d-\d\d_\w", resolved.name):
        yield Finding("F2", "warn", f"the folder is named {resolved.name!r}: YYYY-MM-DD_Name is asked for")
    script = folder.scripts[0].name if folder.scripts else ""
    for name, usual in (
        (folder.readme[0], "README.md"),
        (folder.json_name, "submission.json"),
        (script, "train_gpt.py"),
    ):
        if name not in ("", usual):
            yield Finding("F2", "warn", f"rename it to {usual}: tools look for that name", name)
    place, own = resolved.parent.name.lower(), str(folder.submission.get("track", "")).lower()
    if place.startswith("track_") and own and ("non" in place) != ("non" in own):
        yield Finding("F2", "warn", f"track {own[:40]!r} in {place}: one of them is wrong", folder.json_name)
    for name in folder.files:
        if re.search(r"\.(?:pt|pth|ptz|safetensors|npz|ckpt)$|^final_model|checkpoint\.bin$", name):
            yield Finding("F2", "note", "weights are not committed: leave the file out", name)
    for name in (name for name in folder.files if name.endswith("/submission.json")):
        grade = "warn" if name.replace("submission.json", "train_gpt.py") in folder.files else "note"
        yield Finding("F2", grade, "a second submission in a subfolder: one clean folder is asked for", name)
    if ".env" in folder.files:
        yield Finding("F2", "warn", "a .env may hold secrets: leave it out", ".env")
    for log in folder.logs:
        own = log.get("seed_of_name")
        if own is not None and ("seed" in log.name.lower() or own in folder.seeds):
            message = f"the name says seed {own:.0f}, the log ran seed {log.get('seed') or 0:.0f}: rename it"
            yield Finding("F2", "warn", message, *log.at("seed_of_name"))


def check_keys(folder: Folder) -> Iterator[Finding]:
    """F3: keys that nearly all merged files have."""
    if not folder.submission:
        return
    wanted, good = ("author", "github_id", "name", "date"), ("val_loss", "bytes_total", "track", "seeds", "hardware")
    missing = [key for key in wanted if not str(folder.submission.get(key) or "").strip()]
    if number(folder.submission.get("val_bpb")) is None:
        missing.append("val_bpb" + (" (there under another name)" if bpb_of(folder.submission) is not None else ""))
    if missing:
        yield Finding("F3", "warn", f"missing or empty: {', '.join(missing)}; add them", folder.json_name)
    if optional := [key for key in good if key not in folder.submission]:
        yield Finding("F3", "note", f"good to have: {', '.join(optional)}", folder.json_name)


def check_audit(folder: Folder) -> Iterator[Finding]:
    """A1: the verdicts of our audit of the trained model, where the folder has them, and our log's own."""
    for name, content in folder.audits.items():
        proofs, code = (content.get(key) if isinstance(content, dict) else None for key in ("proofs", "code_sha256"))
        verdicts = {place.removesuffix(".passed"): value for place, key, value in walk(content) if key == "passed"}
        if not isinstance(proofs, dict) or not proofs or not all(v in (True, False) for v in verdicts.values()):
            yield Finding("A1", "warn", "is no audit that can be read: passed and proofs are expected", name)
        if isinstance(code, str) and not any(code in script.hashes for script in folder.scripts + folder.twins):
            message = f"the audit is of another script: no file here has its code_sha256 {code[:12]}…"
            yield Finding("A1", folder.grade("reject"), message, name)
        failed = [place for place, value in verdicts.items() if value is False]
        if failed:
            message = f"the audit of the model failed: {', '.join(failed[1:6] or failed)}"
            yield Finding("A1", folder.grade("reject"), message, name)
    for log in folder.logs:
        if log.get("breaks") is not None:
            message = "the run says itself that it breaks a rule (compliant:0): it is no record"
            yield Finding("A1", "reject" if folder.record else "note", message, *log.at("breaks"))


# ============================================ 8  RULES: BYTES =========================================================
def hypothetical(folder: Folder, log: Log) -> bool:
    """Returns whether a log counts less code than the folder ships, as of a packed script that is not there."""
    code = counted_code(log)
    return bool(code and folder.scripts and not folder.scripts[0].packed and code < 0.6 * folder.scripts[0].size)


def larger_form(folder: Folder, log: Log) -> str:
    """Returns which larger form of the script a log counts: another file, or the source of the packed one; none: ""."""
    code = counted_code(log)
    if not code or not folder.scripts or code <= folder.code():
        return ""
    twin = next((twin.name for twin in folder.twins if abs(twin.size - code) <= 2), "")
    main = folder.scripts[0]
    return twin or ("the source of the packed script" if main.packed or main.problem else "")


def check_size(folder: Folder) -> Iterator[Finding]:
    """S1: bytes as shipped, of every log that is used. A total over the cap in the log alone was rejected (#1835)."""
    largest, sized = 0.0, []
    for log in folder.runs():
        model, totals, place = model_bytes(log), [t for t, _ in log.values.get("total", ())], log.at("total", "model")
        shipped = model + folder.code() if model and folder.scripts else None
        if shipped is None and not totals:
            yield Finding("S1", "note", "bytes of the model: not found in the log", log.name)
            continue
        largest = max(largest, shipped or totals[-1])
        sized.append(log.seed)
        form = larger_form(folder, log) if shipped and shipped <= SIZE_LIMIT else ""
        if totals and min(totals) > SIZE_LIMIT:
            message = f"{totals[-1]:,.0f} bytes by the log, over {SIZE_LIMIT:,}"
            message += f": with {form}, as shipped it is {shipped:,.0f}" if form else ": rejected from such a line"
            yield Finding("S1", "note" if form else "reject", message, *place)
        elif shipped and shipped > SIZE_LIMIT:
            packed = hypothetical(folder, log)
            message = f"model {model:,.0f} + code as shipped {folder.code():,} = {shipped:,.0f}, over {SIZE_LIMIT:,}"
            message += f"; the log counts {counted_code(log):,.0f} of code: ship what it counts" if packed else ""
            yield Finding("S1", "warn" if packed else "reject", message, *place)
    said = [bytes_of(entry) or 0 for seed, entry in folder.seeds.items() if seed not in sized]
    said += [bytes_of(folder.submission) or 0, first(folder.submission, "artifact_bytes_max") or 0]
    if len(sized) < max(1, len(folder.seeds)) and max(said) > SIZE_LIMIT:
        message = f"{max(said):,.0f} bytes are claimed, over {SIZE_LIMIT:,}, and no log says less"
        yield Finding("S1", "reject", message, folder.json_name)
    if 0 <= SIZE_LIMIT - largest < SIZE_MARGIN:
        message = f"the largest artifact has {largest:,.0f} bytes: runs differ by +-5 kB, keep {SIZE_MARGIN:,} free"
        yield Finding("S1", "note", message)


def check_counts(folder: Folder) -> Iterator[Finding]:
    """S2: what the logs counted against what is shipped and what submission.json says."""
    disk = folder.code()
    for log in folder.used if disk else []:
        code, form = counted_code(log), larger_form(folder, log)
        if not code or abs(code - disk) <= 2:  # a line end or two
            continue
        message = f"the log counts {code:,.0f} bytes of code, {disk:,} lie in the folder: "
        if form:
            grade, message = "note", message + f"it counts {form}"
        elif hypothetical(folder, log):
            grade, message = "warn", message + "ship the packed script that is counted"
        else:
            grade = "note" if abs(code - disk) < 0.02 * disk else "warn"
            message += "the script was changed after the run, or the log is another script's"
        yield Finding("S2", grade, message, *log.at("code_packed", "code", "total"))
    for log in folder.used:
        claimed, model = bytes_of(folder.entry(log)), model_bytes(log)
        true = [total for total, _ in log.values.get("total", ())] + ([model + disk] if model and disk else [])
        if claimed and true and all(abs(claimed - size) > 100 for size in true):
            what = "that is the model without the code" if claimed == model else f"off by {claimed - true[-1]:+,.0f}"
            message = f"seed {log.seed}: {claimed:,.0f} bytes claimed, {true[0]:,.0f} by {log.name}: {what}"
            yield Finding("S2", "warn", message, folder.json_name)
    said, counted = first(folder.submission, "bytes_code", "code_bytes"), [counted_code(log) for log in folder.used]
    if said and disk and all(abs(said - code) > 2 for code in (disk, *(c for c in counted if c))):
        message = f"bytes_code {said:,.0f} is neither what the logs count nor what lies in the folder, {disk:,} bytes"
        yield Finding("S2", "warn", message, folder.json_name)


def check_modules(folder: Folder) -> Iterator[Finding]:
    """S3 and P3: files that the script loads from its folder count as code, and are not found from elsewhere."""
    if len(folder.scripts) < 2:
        return
    main, *modules = folder.scripts
    listed = ", ".join(f"{module.name} ({module.size:,} bytes)" for module in modules[:6])
    largest = max((model_bytes(log) or 0 for log in folder.used), default=0)
    message = f"loads {listed}: they count as code, {folder.code():,} bytes in all"
    message += f", {largest + folder.code():,.0f} with the model" if largest else ""
    seen = all((counted_code(log) or 0) > main.size + 0.5 * (folder.code() - main.size) for log in folder.used)
    packed = any(hypothetical(folder, log) for log in folder.used)
    over = largest + main.size <= SIZE_LIMIT < largest + folder.code()
    grade = "note" if seen and folder.used else "reject" if over and not packed else "warn"
    yield Finding("S3", grade, message, main.name)
    yield Finding("P3", "warn", "a module beside the script is not found from elsewhere: use one file", main.name)


def check_unpacked(folder: Folder) -> Iterator[Finding]:
    """S4: what is packed can be looked into."""
    for script in folder.scripts:
        if script.problem:
            yield Finding("S4", "warn", f"could not be unpacked: {script.problem}", script.name)
        elif script.packed:
            message = f"packed ({script.packed}): {script.size:,} bytes hold {len(script.source.encode()):,} of source"
            yield Finding("S4", "note", message, script.name)


# ============================================ 9  RULES: SECONDS =======================================================
def check_train_time(folder: Folder) -> Iterator[Finding]:
    """T1 and T2: training, and calibration on training data, within 600 s. They bind records only."""
    for log in folder.runs():
        train, place = train_seconds(log), log.at("stop_s", "train_s")
        if train is None:
            train, place = seconds_of(folder.entry(log), "train_wallclock", "train_time"), (folder.json_name, 0)
        calibration = max((s for s, _ in log.values.get("calibration_s", ())), default=0.0)
        calibration = calibration or seconds_of(folder.entry(log), "calib_time", "gptq_time") or 0.0
        if train is None:
            yield Finding("T2", "note", "milliseconds of training: not found in the log", log.name)
            continue
        if train > TIME_LIMIT:
            grade = "note" if not folder.record else "reject" if train > TIME_LIMIT + OVERSHOOT else "warn"
            message = f"trained for {train:.3f} s of {TIME_LIMIT:.0f}: stop a step earlier"
            yield Finding("T2", grade, message, *place)
        both, what = train + calibration, f"training {train:.1f} s + calibration {calibration:.1f} s"
        if calibration and both > TIME_LIMIT and log.get("selfgen") is not None:
            message = f"{what}: its data are generated by the model, which was not charged to training so far"
            yield Finding("T1", "note", message, *log.at("calibration_s"))
        elif calibration and both > TIME_LIMIT:
            grade = "note" if not folder.record else "reject" if both > CALIBRATION_MERGED else "warn"
            message = f"{what} = {both:.1f} s, over {TIME_LIMIT:.0f}: it counts as training, reserve it"
            yield Finding("T1", grade, message, *log.at("calibration_s"))


def check_eval_time(folder: Folder) -> Iterator[Finding]:
    """T3: the final evaluation by its own clock, and with loading and compiling: 13 of 39 merged logs exceed that."""
    for log, score in folder.results():
        seconds = eval_seconds(folder, log, score)
        if seconds is None:
            yield Finding("T3", "note", "seconds of scoring: not found in the log", score.file, score.line)
            continue
        strict = seconds + (log.get("load_s") or 0) + (log.get("warmup_s") or 0)
        strict = max(strict, first(folder.entry(log), "eval_time_strict_s") or 0)
        if seconds > TIME_LIMIT:
            grade = "note" if not folder.record else "reject" if seconds > TIME_LIMIT + OVERSHOOT else "warn"
            yield Finding("T3", grade, f"scored in {seconds:.1f} s, over {TIME_LIMIT:.0f}", score.file, score.line)
        elif strict > TIME_LIMIT:
            message = f"scored in {seconds:.1f} s, with loading and compiling {strict:.1f} s: over, if they count"
            yield Finding("T3", "warn" if folder.record else "note", message, score.file, score.line)


# Names, places, clocks, how often something is logged: all that may differ between seeds.
IGNORED = re.compile(
    r"(?:^|_)(?:seed|run_id|path|dir|files?|logfile|name|device|time|host|port|uuid|prefix|debug|verbose)$|^rank$"
    r"|^local_rank$|^s$|^is_main|^wandb|^world_size$|warmup_step$|^step$|elapsed|wallclock|(?:log|val|val_loss)_every$",
    re.I)  # fmt: skip


def settings_of(log: Log) -> dict[str, tuple[str, int]]:
    """Returns the settings that must be the same for all seeds: no names, paths, clocks; 600 and 600.0 are one."""
    kept = {}
    for key, (text, line) in log.config.items():
        if not IGNORED.search(key) and not re.search(r"[/\\]", text):
            value = number(text)
            kept[key] = text if value is None else str(float(value)), line
    return kept


def check_settings(folder: Folder) -> Iterator[Finding]:
    """T4: one configuration: the organizers want a mean "from the same submitted configuration"."""
    base = next((log for log in folder.used if log.config), None)
    adapted = any("ttt" in score.label.lower() for _, score in folder.results())
    for log in folder.used if base else []:
        ours, theirs, dumps = settings_of(base), settings_of(log), log.dumped and base.dumped
        for key in sorted(ours.keys() & theirs.keys()):
            if ours[key][0] != theirs[key][0]:
                idle = "ttt" in key and not adapted  # what comes after the result has no part in it
                message = f"{key} is {theirs[key][0]}, in {base.name} {ours[key][0]}: seeds of different configurations"
                grade = folder.grade("reject" if dumps and not idle else "warn")
                yield Finding("T4", grade, message, log.name, theirs[key][1])
        if dumps and (alone := sorted(ours.keys() ^ theirs.keys())):
            message = f"settings of only one of this log and {base.name}: {', '.join(alone[:8])}: another script?"
            yield Finding("T4", "warn", message, log.name)


def check_caps(folder: Folder) -> Iterator[Finding]:
    """T4: a cap of 600 s, no forced stop, 8 processes, as records have them."""
    said = [(value, folder.json_name, 0) for _, key, value in walk(folder.submission) if "force_stop_step" in key]
    for count, line in enumerate(folder.readme[1].splitlines(), 1):
        said += [(m[1], folder.readme[0], count) for m in re.finditer(r"\bFORCE_STOP_STEP=(\d{1,9})", line)]
    for value, *place in said if folder.record else []:
        if (number(value) or 0) > 0:
            yield Finding("T4", "warn", f"force_stop_step is {value}: counted as an ablation", *place)
    for log in folder.used if folder.record else []:
        train = train_seconds(log) or 0.0
        keys = "max_wallclock_seconds", "force_stop_step", "train_log_every"
        cap, stop, every = (log.config.get(key, ("", 0)) for key in keys)
        if (seconds := number(cap[0])) is not None and not 0 < seconds <= TIME_LIMIT:
            message = f"max_wallclock_seconds is {cap[0]}: a record's cap is {TIME_LIMIT:.0f}; it trained {train:.1f} s"
            yield Finding("T4", "warn", message, log.name, cap[1])
        if (number(stop[0]) or 0) > 0:
            grade = "reject" if train > TIME_LIMIT else "warn"
            yield Finding("T4", grade, f"force_stop_step is {stop[0]}: counted as an ablation", log.name, stop[1])
        steps = [step for step, _ in log.values.get("step", ())]
        if len(steps) == 20 and steps[-1] - steps[0] == 19 and (number(every[0]) or 0) > 1:
            message = f"every step is logged though train_log_every is {every[0]}, as with a forced stop: say why"
            yield Finding("T4", "warn", message, *log.at("step"))
        if log.get("world_size") not in (None, 8):
            message = f"{log.get('world_size'):.0f} processes: a record is shown on 8 H100s"
            yield Finding("T4", "warn", message, *log.at("world_size"))


# ============================================ 10  RULES: METRIC =======================================================
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
        value = tokens * score.loss / (math.log(2) * score.bpb)
        error = value * sum(0.5 * 10.0**-d / v for d, v in zip(score.digits, (score.bpb, score.loss)))  # of rounding
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


# ============================================ 11  RULES: CLAIMS =======================================================
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
    text = " ".join([folder.readme[1][:MAX_COMMANDS], *(str(folder.submission.get(key)) for key in ("name", "blurb"))])
    said = [m[1].lower() for m in re.finditer(r"\b(\d|three|five)[- ]seeds?\b", text, re.I)]
    counts = [{"three": 3, "five": 5}.get(word) or int(word) for word in said]
    counts.append(len(re.findall(r"^\|[ *]*(?:seed )?\d{1,6}[ *]*\|.{0,200}?\b[01]\.\d{4}", text, re.M | re.I)))
    return max(1, len(folder.seeds), int(first(folder.submission, "n_seeds", "num_seeds") or 0), *counts)


def found_logs(found: list[tuple[Log, Score]]) -> list[Log]:
    """Returns the logs of some results."""
    return [log for log, _ in found]


def common_mean(logs: list[Log], label: str) -> float | None:
    """Returns the mean over logs of the last line with a label, None unless all have it."""
    found = [[score.bpb for score in log.finals() if score.label == label][-1:] for log in logs]
    return statistics.fmean(value[0] for value in found) if all(found) else None


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


def check_readme(folder: Folder) -> Iterator[Finding]:
    """H1: the README states the submission's figure."""
    claimed, (name, text) = bpb_of(folder.submission), folder.readme
    if claimed is not None and stated(text) and not states(text, claimed):
        yield Finding("H1", "warn", f"val_bpb {claimed:.8g} of {folder.json_name} is nowhere in it", name)


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


def student_tail(t: float, df: float) -> float:
    """Returns P(T > t) of Student's t with df degrees of freedom: Simpson's rule over the angle atan(t / sqrt(df))."""
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    start, steps = math.atan(t / math.sqrt(df)), 2000
    width = (math.pi / 2 - start) / steps
    heights = [max(math.cos(start + i * width), 1e-300) ** (df - 1) for i in range(steps + 1)]
    return scale * width / 3 * (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]))


def check_p_value(folder: Folder) -> Iterator[Finding]:
    """N3: p from t and its degrees of freedom, one-sided or two-sided; nothing where one of them is missing."""
    t, p = first(folder.submission, "t_statistic", "welch_t"), first(folder.submission, "p_value", "welch_p")
    df = first(folder.submission, "welch_df", "df", "degrees_of_freedom")
    if t is None or p is None or df is None or not 1 <= df <= 1e5 or not 0 < p < 1:
        return
    tail = student_tail(abs(t), df)
    if not any(abs(p - sides * tail) <= max(0.1 * sides * tail, tolerance(p)) for sides in (1, 2)):
        message = f"p_value {p:.4g} does not follow from t = {t:.4g}, df = {df:.4g}: one-sided it is {tail:.4g}"
        yield Finding("N3", "warn", message, folder.json_name)


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


# ============================================ 12  RULES: SCRIPT =======================================================
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
    """Returns where a function scores, and the lines that this may excuse: of a block under no_grad the whole function,
    of a call to a helper the loop around it, which is none over epochs: that of chunks."""
    inside = list(ast.walk(function))
    blocks = [node.lineno for node in inside if is_scoring(node)]
    calls = [node for node in inside if isinstance(node, ast.Call)]
    lines = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id in helpers]
    loops = [(node, over_epochs(node)) for node in inside if isinstance(node, (ast.For, ast.While))][:30]
    epochs = [(loop.lineno, loop.end_lineno or 0) for loop, over in loops if over]
    spans = [(loop.lineno, loop.end_lineno or 0) for loop, over in loops if not over]
    spans = [(a, b) for a, b in spans if not any(start <= a and b <= end for start, end in epochs)]
    found = [(line, a, b) for line in sorted(lines)[:30] for a, b in spans if a <= line <= b]
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


def adapted_first(log: Log, score: Score) -> bool:
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


def check_parses(folder: Folder) -> Iterator[Finding]:
    """P1: the grammar of Python 3.10, which reviewers run. A script that the running Python, 3.12 or later, does not
    parse is broken; an older Python cannot tell a newer script from a broken one."""
    running, newest = f"{sys.version_info[0]}.{sys.version_info[1]}", sys.version_info >= (3, 12)
    for script in (script for script in folder.scripts if script.name.endswith(".py")):
        if script.error:
            message = f"does not parse on Python {running}: {script.error[0]}; "
            message += "broken scripts are not accepted" if newest else "if it does on 3.12, write it for 3.10"
            yield Finding("P1", "reject" if newest else "warn", message, script.name, script.error[1])
        elif line := newer_fstring(script.source):
            message = "an f-string that only Python 3.12 parses (PEP 701): reviewers run 3.10, write it for that"
            yield Finding("P1", "warn", message, script.name, line)
        else:
            try:
                ast.parse(script.source, feature_version=(3, 10))
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                message, line = getattr(error, "msg", str(error)), getattr(error, "lineno", 0) or 0
                yield Finding("P1", "warn", f"does not parse on Python 3.10: {message}", script.name, line)


GPU_ONLY = re.compile(
    r"(?:flash_attn\w*|triton|xformers|cutlass\w*|transformer_engine|liger_kernel|bitsandbytes|apex|mamba_ssm|causal_conv1d"
    r"|fla|deep_gemm|pynvml|cupy)(?:\.|$)")  # fmt: skip
USUAL = {"torch", "numpy", "sentencepiece", "tqdm", "huggingface_hub", "datasets", "tiktoken", "typing_extensions"}


PROBE = re.compile(r"is_available|find_spec|hasattr|HAS_|environ")


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the parts of a statement that run with it: not those of lambdas, nor what a probe decides on."""
    parts = [node]
    for part in parts:  # grows while it is walked
        yield part
        if not isinstance(part, ast.Lambda) and not (isinstance(part, ast.IfExp) and PROBE.search(ast.dump(part.test))):
            parts += ast.iter_child_nodes(part)


def top_statements(body: list[ast.stmt], safe: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    """Yields the statements that run at import, each with whether a try or a probe guards it; none of functions."""
    for node in body:
        if isinstance(node, ast.Try):
            yield from top_statements(node.body, True)
            yield from top_statements([s for handler in node.handlers for s in handler.body], safe)
        elif isinstance(node, ast.If):
            test = ast.dump(node.test)
            if "__name__" not in test and "TYPE_CHECKING" not in test:
                probed = safe or bool(PROBE.search(test))
                yield from top_statements(node.body + node.orelse, probed)
        elif isinstance(node, (ast.With, ast.For, ast.While, ast.ClassDef)):
            yield from top_statements(node.body, safe)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node, safe


def check_imports(folder: Folder) -> Iterator[Finding]:
    """P2 and P5: what an import of the script needs: kernels, a GPU, packages that no requirements.txt names."""
    needed: set[str] = set()
    for script in folder.scripts:
        kernels: dict[str, int] = {}
        for node, safe in top_statements(script.tree.body) if script.tree else []:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            needed |= {name.split(".")[0] for name in names if name and not safe}
            kernels.update({name: node.lineno for name in names if GPU_ONLY.match(name) and not safe})
            for call in (n for n in at_import(node) if isinstance(n, ast.Call) and not safe):
                name = name_of(call.func)
                if re.search(r"^torch\.cuda\.(?!is_available|device_count|amp)|(?:^|\.)cuda$", name):
                    message = f"{name}() runs at import: reviewers import on a CPU, move it into main"
                    yield Finding("P2", "warn", message, script.name, call.lineno)
        if kernels:
            message = f"imports {', '.join(sorted(kernels))} unguarded: nothing runs without, fall back or say so"
            yield Finding("P2", "warn", message, script.name, min(kernels.values()))
    local = {script.name.split("/")[0].removesuffix(".py") for script in folder.scripts}
    extra = sorted(needed - USUAL - local - set(sys.stdlib_module_names))
    if extra and not any(Path(name).name.startswith("requirements") for name in folder.files):
        message = f"no requirements.txt, and the script needs {', '.join(extra[:8])}: name them (R10)"
        yield Finding("P5", "note", message, folder.scripts[0].name)


COMMAND = re.compile(r"\b(?:torchrun|python3?(?:\.\d+)?|accelerate|uv run)\b(?:.*?([\w./-]{1,200}\.py)\b)?")
ASSIGNED = re.compile(r"(?:^|[\s;(\"'])([A-Z][A-Z0-9_]{2,})=")
ELSEWHERE = re.compile(  # read by the shell, by torch and its libraries, by the scripts of the challenge's data
    r"(?:NCCL|CUDA|TORCH\w*|PYTORCH|PYTHON|HF|HUGGING\w*|TRITON|TOKENIZERS|WANDB|OMP|MKL|PIP|UV|GLOO|NVIDIA|CUBLAS|LD|UCX"
    r"|MASTER|NV|XLA|INDUCTOR|RUNPOD|MATCHED|MODAL|AWS|CONDA|VIRTUAL)_\w+"
    r"|PATH|HOME|RANK|WORLD_SIZE|LOCAL_RANK|TMPDIR|CC|CXX|NPROC\w*|NGPU\w*|MAX_JOBS|VENV|PWD|TZ|LANG")  # fmt: skip


def commands(text: str) -> Iterator[tuple[int, list[str], str]]:
    """Yields (line, variables set, script) of each command in a README's code blocks that runs Python. What a line sets
    for the shell alone, before && or ;, is not passed on, unless a command has it by $NAME and it sets variables."""
    inside, joined, first_line, exported, shell = False, "", 0, [], {}
    for count, line in enumerate(text[:MAX_COMMANDS].splitlines(), 1):
        if line.lstrip(" >-*").startswith(("```", "~~~")):
            inside, joined, exported = not inside, "", []
        elif inside:
            first_line = first_line if joined else count
            line = re.sub(r"(?:^|\s)#.*", "", line).strip()
            if not line and joined:
                continue
            joined = f"{joined} {line.removesuffix(chr(92))}"[:MAX_LINE]
            if line.endswith("\\"):
                continue
            run = COMMAND.search(joined)
            *before, last = re.split(r"&&|;", joined[: run.start()] if run else joined)
            exported = exported + ASSIGNED.findall(" ".join(part for part in before if "export " in part))
            if run:
                variables = [*exported, *ASSIGNED.findall(last)]
                for name in {*re.findall(r"\$\{?(\w+)", last)} & shell.keys():
                    variables += ASSIGNED.findall(shell[name])
                yield first_line, variables, Path(run[1] or "").name
            elif joined.strip().startswith("export "):
                exported = exported + ASSIGNED.findall(last)
            elif text_of := re.fullmatch(r"\s*(\w+)=([\"'])(.*)\2\s*", joined):
                shell[text_of[1]] = text_of[3][:4000]
            joined = ""


def check_variables(folder: Folder) -> Iterator[Finding]:
    """P4: a variable that a README's command sets and whose name is nowhere in the code: it does nothing. A name counts
    as read if it stands in the source; where names are computed, also in small letters."""
    code = "\n".join(script.source for script in folder.scripts)
    if "environ" not in code and "getenv" not in code or any(script.problem for script in folder.scripts):
        return
    whole, made = (
        r"environ(?:\.items\(|\.keys\(|\.copy\(|\)|\s*$)|\.upper\(\)",
        r"(?:environ\.get\(|environ\[|getenv\()f",
    )
    computed = re.search(f"{whole}|{made}", code, re.M)
    names = set(re.findall(r"\w+", code.upper() if computed else code))
    names |= set(re.findall(r"\$\{?(\w+)", folder.readme[1][:MAX_COMMANDS]))  # read by the shell
    others = {Path(name).name for name in folder.files} - {folder.scripts[0].name}
    unread: dict[str, int] = {}
    for line, variables, script in commands(folder.readme[1].replace("\\_", "_")):
        if script in others or (script and not script.startswith("train")):
            continue
        unread.update({name: line for name in variables if name not in names and not ELSEWHERE.fullmatch(name)})
    if unread:
        message = f"set by a command, read nowhere in the script, so without effect: {', '.join(sorted(unread))}"
        yield Finding("P4", "warn", message, folder.readme[0], min(unread.values()))


def check_traps(folder: Folder) -> Iterator[Finding]:
    """P5 and D1: what trips reviewers' machines, and the names that they look for."""
    nodes = [(script.name, node) for script in folder.scripts for node in script.nodes()]
    for place, node in nodes:
        if isinstance(node, ast.ClassDef) and node.name.startswith("Hyper") and node.decorator_list:
            if "dataclass" in ast.dump(node.decorator_list[0]):
                message = "a dataclass fails where 3.10 loads the file by spec_from_file_location: use a plain class"
                yield Finding("P5", "note", message, place, node.lineno)
        if isinstance(node, ast.Try) and any("ImportError" in ast.dump(h) for h in node.handlers):
            if re.search(r"'(?:zstandard|brotli|zstd)'", ast.dump(node)) and "zlib" in ast.dump(node):
                message = "without its codec it falls back to zlib silently and outgrows the cap: fail at the start"
                yield Finding("P5", "note", message, place, node.lineno)
    names = {node.name for _, node in nodes if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    wanted = ("Hyperparameters", "GPT", "main", "eval_val", "build_sentencepiece_luts", "load_validation_tokens")
    missing = [name for name in wanted if name not in names]
    guard = any(re.search(r"__name__\s*==", script.source) for script in folder.scripts)
    if names and (missing or not guard):
        message = f"automated reviewers look for {', '.join(missing + ([] if guard else ['a guard of main']))}"
        yield Finding("D1", "note", message, folder.scripts[0].name)


# ============================================ 13  RUNNING AND PRINTING ================================================
CHECKS: list[Callable[[Folder], Iterator[Finding]]] = [
    check_files, check_layout, check_keys, check_audit, check_size, check_counts, check_modules, check_unpacked,
    check_train_time, check_eval_time, check_settings, check_caps, check_metric, check_table, check_shards,
    check_headline, check_seeds, check_lines, check_readme, check_deviations, check_p_value, check_booleans,
    check_calibration, check_order, check_names, check_parses, check_imports, check_variables, check_traps,
]  # fmt: skip
ORDER = {"reject": 0, "warn": 1, "note": 2}


def audit(path: Path) -> tuple[Folder, list[Finding]]:
    """Returns what was read of a folder and all findings, gravest first; those that differ in numbers only are one."""
    try:
        folder = read_folder(path)
    except Exception as error:  # as below: the other folders are still checked, and this one is not called good
        message = f"could not be read ({type(error).__name__}: {error}), so nothing was checked: please report it"
        return Folder(path), [Finding("X1", "reject", message)]
    findings = list(folder.findings)
    for check in CHECKS:
        try:
            findings += check(folder)
        except Exception as error:  # one rule's fault must not hide what the others found, and must be heard of
            message = f"{check.__name__} failed ({type(error).__name__}: {error}): please report this folder"
            findings.append(Finding("X1", "warn", message))
    merged: dict[tuple[str, str, str], Finding] = {}
    for finding in findings:
        key = finding.rule, finding.severity, re.sub(r"[\d.,]+", "#", finding.message)
        first_one = merged.setdefault(key, finding)
        if first_one is not finding:
            first_one.also.append(f"{finding.file}:{finding.line}" if finding.line else finding.file)
    rank = list(RULES)
    return folder, sorted(merged.values(), key=lambda f: (ORDER[f.severity], rank.index(f.rule), f.file, f.line))


def clean(text: str) -> str:
    """Returns text without control characters and lone surrogates: names and labels are somebody else's."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(character if character.isprintable() else "?" for character in text)


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
        "folder": clean(str(folder.path)), "record": folder.record, "verdict": "reject" if counts["reject"] else "ok",
        "counts": {name: counts[name] for name in ORDER}, "claimed_val_bpb": bpb_of(folder.submission),
        "mean_val_bpb": statistics.fmean(values) if values else None,
        "std_val_bpb": statistics.stdev(values) if len(values) > 1 else None, "logs": rows,
        "findings": [{
            "rule": f.rule, "severity": f.severity, "message": clean(f.message), "file": clean(f.file), "line": f.line,
            "also": [clean(place) for place in f.also], "source": RULES[f.rule][2],
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


def main(arguments: list[str] | None = None) -> int:
    """Audits the folders that are named and returns the exit status."""
    parser = argparse.ArgumentParser(description="audits submission folders from their files alone; runs none of them")
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names may have characters that a terminal has not
    if absent := [name for name in options.folders if not os.path.isdir(name)]:
        print(f"check.py: error: no such folder: {clean(', '.join(absent))}", file=sys.stderr)
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


if __name__ == "__main__":
    sys.exit(main())
