"""Reads logs: figures, scores and settings, in the dialects of the challenge's scripts and of this one."""

from __future__ import annotations

import io
import re
from collections import defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path

from .reading import MAX_LINE, encoding_of
from .submission import number, tolerance

COUNT = r"(\d[\d,_]*)"
DECIMAL = r"(\d+(?:\.\d+)?)"
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
    ("val_step", rf"^(?:step:?\s?)?{COUNT}/\d+:? val_loss", 1, "4550/20000 val_loss: 2.8 val_bpb: 1.1"),
    ("step_avg_ms", rf"\bstep_avg\s*[:=]\s*{DECIMAL}\s*ms", 1, "step:10/9000 … train_time:816ms step_avg:81.6ms"),
    ("stop_step", rf"\bstopping_early.{{0,200}}\bstep\s?[:=]\s?{COUNT}", 1, "stopping_early … step: 4550/20000"),
    ("stop_step", rf"^trained: steps:{COUNT}", 1, "trained: steps:150 train_time:97105ms …"),
    ("stop_step", rf"^Training complete in [\d.]+s \({COUNT} steps\)", 1, "Training complete in 590s (1857 steps)"),
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
STEP_PATTERNS = [entry for entry in PATTERNS if entry[0] in ("train_s", "step", "val_step", "step_avg_ms")]
LOSS = re.compile(r"\bval[_ ]loss\s*[:=]\s*(\d+\.\d+)", re.I)
BPB = re.compile(r"\b(val[_ ]bpb|\w{0,40}mix_bpb|(?:EMA|Quantized) BPB \([^()]{1,20}\))\s*[:=]\s*\**(\d+\.\d+)", re.I)
MIXTURE = re.compile(r"ppm|n_?gram|(?:^|_)mix(?:er|ture)?(?:_|\b)", re.I)  # of distributions over bytes
MIXED_BYTES = re.compile(r"\b(?:N_sidecar_)?bytes=(\d{1,15})\b")
EVAL_TIME = re.compile(rf"\b(?:eval_)?time\s*[:=]\s*{DECIMAL}\s*(ms|s)\b")
WORTH = re.compile(  # once training has begun, all other lines say nothing that is looked for
    r"bpb|val[_ ](?:tokens|loader)|complete in|seed|shards|stopping|trained:|train_time|\bt:\d|hessian|gptq|awq"
    r"|calibration|code|total|serialize|artifact|budget|compile|decompress|compliant|epoch|hyperparameters|running py"
    r"|^run: |^params:|^device:",
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
# Another run, appended to the same log.
RESTART = re.compile(r"^(?:Running Py|Hyperparameters:|val_bpb:enabled|run: |params:|device:)")
DUMPED = re.compile(r"^\s{2,}(\w+)\s*:(?:\s(.*))?$")  # a line of the dump that "Hyperparameters:" begins
PAIRS = re.compile(r"\w+[:=][^\s:=]+(?:\s+\w+[:=][^\s:=]+)*")  # embed_lr:0.035 …, also with =
SETTING = re.compile(r"\b([A-Z][A-Z0-9_]+)=(\S*) \(")  # settings (defaults): NAME=value (default), …
MAX_BPB = 20.0  # more is no score
MAX_PARSED = 2_000  # characters of a line that regular expressions see


@dataclass
class ScoreLine:
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
    scores: list[ScoreLine] = field(default_factory=list)
    config: dict[str, tuple[str, int]] = field(default_factory=dict)
    dumped: bool = False  # the settings are a complete dump
    seed: int | None = None
    epochs: list[tuple[int, str, int]] = field(default_factory=list)  # of adaptation: line, name, number
    num_before: int = 0  # runs that stand before this one in the file
    seeds: set[int] = field(default_factory=set)  # that the file speaks of

    def get(self, name: str) -> float | None:
        """Returns the last value of a field, None where the log has none."""
        return self.values[name][-1][0] if self.values.get(name) else None

    def at(self, *names: str) -> tuple[str, int]:
        """Returns the place of the first of some fields that the log has."""
        return self.name, next((self.values[name][-1][1] for name in names if self.values.get(name)), 0)

    def finals(self) -> list[ScoreLine]:
        """Returns the scores of the stored model, in order."""
        return [score for score in self.scores if score.kind == "final"]


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
                log, training = Log(path.name, num_before=log.num_before + 1, seeds=seeds_of(log)), False
            if line == "Hyperparameters:":
                in_dump = log.dumped = True
            elif in_dump := in_dump and bool(pair := DUMPED.match(line)):
                log.config[pair[1].lower()] = (pair[2] or "").strip(), count
            if in_dump or not SOURCE.search(line):
                parse_line(log, line, count, not training)
    log.seeds = seeds_of(log)
    patterns = (r"seed[_-]?(\d{1,9})", r"(?:_s|log|train|run)[_-]?(\d{1,9})$", r"_(\d{1,9})$")
    named = next((match for pattern in patterns if (match := re.search(pattern, path.stem, re.I))), None)
    stated = log.get("seed") if log.get("seed") is not None else number(log.config.get("seed", ("", 0))[0])
    own = int(named[1]) if named else None
    log.seed = int(stated) if stated is not None else own
    if stated is not None and own not in (None, log.seed):
        log.values["seed_of_name"].append((float(own or 0), log.at("seed")[1]))
    return log


def seeds_of(log: Log) -> set[int]:
    """Returns the seeds that a log, and the runs before it, speak of."""
    dumped = number(log.config.get("seed", ("", 0))[0])
    said = [seed for seed, _ in log.values.get("seed", ())] + [dumped]
    return log.seeds | {int(seed) for seed in said if seed is not None}


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
        log.scores.append(ScoreLine(label[-80:], float(bpb[2]), value, digits, count, kind, seconds, "", num_bytes))
    elif header and PAIRS.fullmatch(line):
        pairs = (re.split("[:=]", pair, maxsplit=1) for pair in line.split())
        log.config.update({key.lower(): (value, count) for key, value in pairs})
    elif line.startswith("settings (defaults):"):
        log.config.update({key.lower(): (value, count) for key, value in SETTING.findall(settings)})


def matching(log: Log, claimed: float | None) -> ScoreLine | None:
    """Returns the line of a log that prints the claimed score: of the stored model first, then any other."""
    if claimed is None:
        return None
    near = [s for s in log.scores if abs(s.bpb - claimed) <= tolerance(claimed, s.digits[0])]
    rank = {"final": 3, "diagnostic": 2, "unquantized": 1, "training": 0}
    return max(near, key=lambda s: (rank[s.kind], s.loss is not None, min(s.digits[0], 6), s.line), default=None)


def last_score(log: Log) -> ScoreLine | None:
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


def train_steps(log: Log) -> float | None:
    """Returns the steps of training: the stop's, else the last ones of which a loss was logged."""
    logged = [value for name in ("step", "val_step") if (value := log.get(name)) is not None]
    return log.get("stop_step") or max(logged, default=None)


def calibration_seconds(log: Log) -> float | None:
    """Returns the seconds of calibrations on training data, None where the log has none."""
    return max((seconds for seconds, _ in log.values.get("calibration_s", ())), default=None)


def scoring_seconds(log: Log, score: ScoreLine) -> float | None:
    """Returns the seconds of the evaluation of a result: on its line, on the same score's above, of the whole."""
    timed = [s for s in log.scores if s.seconds is not None and s.line <= score.line and s.file == score.file]
    same = [s.seconds for s in (*timed, score) if s.seconds is not None and abs(s.bpb - score.bpb) < 6e-5]
    return same[-1] if same else log.get("eval_s")
