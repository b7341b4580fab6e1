"""What a submission is made of, and what speaks against it: from audited runs of this project, or from another author's
script and logs. For submit.py.

Nothing is taken on trust that can be recomputed. What cannot is in `unverified`, and the README says so."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from challenge import SEEDS_OF_A_RECORD, SIZE_LIMIT, TIME_LIMIT, VAL_BYTES
from checker.logs import (
    MIXTURE,
    Log,
    calibration_seconds,
    counted_code,
    last_score,
    model_bytes,
    parse_log,
    scoring_seconds,
    train_seconds,
    train_steps,
)
from checker.metric import LAUNCH_BYTES, implied_bytes
from checker.reading import read_text
from checker.scripts import Script, loaded_files, read_script
from runs import read_events

# May differ from run to run.
OWN_SETTINGS = (
    *("seed", "run_id", "audit", "tensorboard", "resume", "checkpoint_every", "fallback_dir"),
    *("device", "data_path", "tokenizer_path"),
)
# And those in which the audit of a finished run differs from that run.
AUDIT_SETTINGS = (*OWN_SETTINGS, "eval_only", "export_only", "max_val_tokens", "attn_backend", "compile", "smoke")
PROOFS = {"artifact", "future_flip", "sum_of_probabilities", "once_only", "last_chunk", "files", "network"}
H100S = re.compile(r"^device:cuda \(NVIDIA H100 80GB HBM3\) processes:8 ")  # as torch names the SXM module
ROOT = Path(__file__).resolve().parent.parent
RUN_FILES = ("submission.json", "metrics.jsonl", "train.log", "train_gpt.py", "final_model.bin")


class Refusal(ValueError):
    """Why there can be no submission: the thing, its value, the fix."""


@dataclass
class Entry:
    """One seed. None: not known."""

    seed: int
    val_bpb: float
    val_loss: float | None
    bytes_model: int | None
    log: bytes
    machine: str = ""
    steps: int | None = None
    step_avg_ms: float | None = None
    train_seconds: float | None = None
    calibration_seconds: float | None = None
    eval_seconds: float | None = None
    eval_seconds_strict: float | None = None
    stages: dict[str, float] = field(default_factory=dict)  # bits per byte on the way
    audit: dict[str, Any] | None = None  # compliance.json
    bytes_logged: int | None = None  # of the artifact, where a log counts another script than this one

    @property
    def training(self) -> float | None:
        """Returns the seconds that the rules call training: the steps and the calibrations after them."""
        return None if self.train_seconds is None else self.train_seconds + (self.calibration_seconds or 0.0)


@dataclass
class Material:
    """All that a submission is made of, and what speaks against one."""

    entries: list[Entry]
    script: bytes  # as it is counted
    source: bytes | None = None  # of a packed script
    requirements: bytes | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # that are no defaults of the script
    data: dict[str, str] = field(default_factory=dict)  # SHA-256 of tokenizer and splits
    processes: int | None = None
    unverified: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)  # why it can be in no track
    no_record: list[str] = field(default_factory=list)  # why it can be no record
    is_own: bool = True  # of audited runs of this project

    def total(self, entry: Entry) -> int | None:
        """Returns the bytes that count for a seed: the script as shipped and the model, or more where its log says."""
        own = [len(self.script) + entry.bytes_model] if entry.bytes_model is not None else []
        return max([*own, *filter(None, [entry.bytes_logged])], default=None)

    def totals(self) -> list[int]:
        """Returns those of all seeds whose bytes are known."""
        return [total for total in map(self.total, self.entries) if total is not None]


def refusals(material: Material) -> Iterable[str]:
    """Yields what speaks against a submission, whoever has run it."""
    seeds = [entry.seed for entry in material.entries]
    for seed in sorted(set(seeds)):
        if seeds.count(seed) > 1:
            yield f"the seed {seed} is there twice, every run must have its own"
    for entry in material.entries:
        total = material.total(entry) or 0
        if total > SIZE_LIMIT:
            fix = ": raise QUANT_FLOOR" if entry.audit else ""
            yield f"seed {entry.seed}: code + model are {total:,} bytes, over {SIZE_LIMIT:,}{fix}"


def few_seeds(entries: list[Entry]) -> list[str]:
    """Returns the reason that too few seeds are for a record, if they are."""
    num = len(entries)
    word = "seed" if num == 1 else "seeds"
    return [f"{num} {word}, a record has at least {SEEDS_OF_A_RECORD}"] if num < SEEDS_OF_A_RECORD else []


# ============================================== audited runs of this project =========================================
class AuditedRun(NamedTuple):
    """A run that is complete, and whose files are those that it reported on."""

    folder: Path
    result: dict[str, Any]  # submission.json
    audit: dict[str, Any]  # compliance.json
    script: bytes
    entry: Entry


def of_runs(folders: list[Path]) -> Material:
    """Returns the material of finished, audited runs; Refusal where their files do not fit together."""
    runs = sorted((read_audited(folder) for folder in folders), key=lambda run: run.result["seed"])
    first = runs[0]
    script = read_script(first.folder / "train_gpt.py")
    defaults = dict(knob_defaults(script))
    settings = {name: value for name, value in first.result["settings"].items() if defaults.get(name) != value}
    processes = re.search(r" processes:(\d+)", first.result["machine"])
    entries = [run.entry for run in runs]
    material = Material(
        entries=entries,
        script=first.script,
        source=script.content if script.packed else None,
        requirements=(ROOT / "requirements.txt").read_bytes(),
        settings=settings,
        data=first.result.get("data", {}),
        processes=int(processes[1]) if processes else None,
        no_record=[*dict.fromkeys(reason for run in runs for reason in why_no_record(run.result)), *few_seeds(entries)],
    )
    material.unverified += unknown_data(material.data)
    material.refusals += [*refusals(material), *run_refusals(runs)]
    return material


def unknown_data(data: dict[str, str]) -> Iterable[str]:
    """Yields what is not known of the data of audited runs."""
    if "train_sha256" in data:
        yield "that the training shards are those of their manifest (python data/verify.py FOLDER says)"
    for name, words in (("tokenizer", "tokenizer"), ("train", "training data"), ("val", "validation data")):
        if f"{name}_sha256" not in data:
            yield f"which {words} the runs had: they do not name them"


def read_audited(folder: Path) -> AuditedRun:
    """Returns a run that is complete and whose files are those that it reported on; Refusal or RunError otherwise."""
    for name in RUN_FILES:
        if not (folder / name).is_file():
            raise Refusal(f"{folder / name} is missing: give the folder of a finished training run in logs/")
    if not (folder / "compliance.json").is_file():
        raise Refusal(f"{folder} was not audited: run `python records/audit.py {folder}`, or train with AUDIT=1")
    events, _ = read_events(folder / "metrics.jsonl")
    stages = {event["stage"]: float(event["val_bpb"]) for event in events if event["event"] == "eval"}
    finals = [{n: v for n, v in e.items() if n not in ("event", "time")} for e in events if e["event"] == "final"]
    try:
        result, audit = (json.loads((folder / f"{name}.json").read_bytes()) for name in ("submission", "compliance"))
        check_report(result, audit, stages)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refusal(f"{folder} holds no report that can be read ({error!r}): finish the run again") from None
    model = (folder / "final_model.bin").read_bytes()
    if finals != [result] or len(model) != result["bytes_model"]:
        raise Refusal(f"{folder}: submission.json is not what metrics.jsonl and final_model.bin say: run it again")
    script = (folder / "train_gpt.py").read_bytes()
    for name, key, content in (("train_gpt.py", "code_sha256", script), ("final_model.bin", "artifact_sha256", model)):
        if hashlib.sha256(content).hexdigest() != result[key]:
            raise Refusal(f"{folder / name} is not the file that was scored ({key} differs): it changed after the run")
        if audit.get(key) != result[key]:
            raise Refusal(f"{folder / 'compliance.json'} is of another {name}: run `python records/audit.py {folder}`")
    for name, value in result["settings"].items():
        other = audit["settings"].get(name)
        if name not in AUDIT_SETTINGS and other != value:
            raise Refusal(f"{folder / 'compliance.json'} is of {name.upper()}={other}, not {value}")
    entry = Entry(
        seed=result["seed"],
        val_bpb=result["val_bpb"],
        val_loss=result["val_loss"],
        bytes_model=result["bytes_model"],
        log=(folder / "train.log").read_bytes(),
        machine=result["machine"],
        steps=result.get("steps"),
        step_avg_ms=result.get("step_avg_ms"),
        train_seconds=result.get("train_seconds"),
        calibration_seconds=result.get("calibration_seconds", 0.0),
        eval_seconds=result["eval_seconds"],
        eval_seconds_strict=result["eval_seconds_strict"],
        stages=stages,
        audit=audit,
    )
    return AuditedRun(folder, result, audit, script, entry)


def check_report(result: dict[str, Any], audit: dict[str, Any], stages: dict[str, float]) -> None:
    """Raises ValueError, KeyError or TypeError unless all is there that read_events does not look at."""
    seeds = {result["seed"], result["settings"]["seed"], audit["seed"]}
    if len(seeds) > 1 or type(result["seed"]) is not int or "averaged" not in stages:
        raise ValueError(f"seeds {seeds}, stages {list(stages)}")
    if not all(isinstance(result[name], str) for name in ("kind", "machine", "code_sha256", "artifact_sha256")):
        raise TypeError("kind, machine and hashes are texts")
    numbers = "eval_seconds_strict", *(("steps", "step_avg_ms") if "train_seconds" in result else ())
    if not all(type(result[name]) in (int, float) for name in numbers):
        raise TypeError(f"{', '.join(numbers)} are numbers")
    proofs, data = audit["proofs"], result.get("data", {})
    if not all(isinstance(part, dict) for part in (result["rule_breaks"], data, proofs, *proofs.values())):
        raise TypeError("rule_breaks, data and proofs are objects")
    if not all(re.fullmatch("[0-9a-f]{64}", str(value)) for value in data.values()):
        raise ValueError(f"data {data}")
    json.dumps(audit, allow_nan=False)


def run_refusals(runs: list[AuditedRun]) -> Iterable[str]:
    """Yields the reasons for which runs of this project can be in neither track."""
    first = runs[0]
    for run in runs:
        result, proofs = run.result, run.audit["proofs"]
        failed = sorted(name for name in PROOFS | proofs.keys() if proofs.get(name, {}).get("passed") is not True)
        if run.audit.get("passed") is not True or failed:
            yield f"{run.folder}: the audit failed ({', '.join(failed)}): see its compliance.json"
        if result["kind"] == "ttt_pre" or "order" in result["rule_breaks"]:
            yield f"{run.folder}: TTT_MODE=pre trains on validation tokens before they are scored, no track takes that"
        if result["settings"].get("eval_only") or "train_seconds" not in result:
            yield f"{run.folder} did not train: give the run that made the artifact"
        if result["code_sha256"] != first.result["code_sha256"]:
            yield f"{run.folder} is of another script than {first.folder}: all seeds must be of one"
        if result.get("data", {}) != first.result.get("data", {}):
            yield f"{run.folder} has other data than {first.folder}: all seeds must have the same"
        for name in sorted(result["settings"].keys() | first.result["settings"].keys()):
            values = [other.result["settings"].get(name) for other in (run, first)]
            if values[0] != values[1] and name not in OWN_SETTINGS:
                yield f"{run.folder}: {name.upper()}={values[0]}, {values[1]} in {first.folder}: make them equal"


def why_no_record(result: dict[str, Any]) -> list[str]:
    """Returns what keeps a run out of the record track."""
    reasons = [str(reason) for rule, reason in sorted(result["rule_breaks"].items()) if rule != "order"]
    if not H100S.match(result["machine"]):
        reasons.append(f"trained on {result['machine'].partition(' dtype:')[0]}, not on 8 H100s")
    return reasons


def knob_defaults(script: Script) -> Iterable[tuple[str, Any]]:
    """Yields setting and default from the class body of a run's script, which is only parsed."""
    for node in script.nodes():
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and len(node.value.args) == 3:
            name = getattr(node.value.func, "id", "")
            if name in ("Knob", "ModelKnob") and isinstance(node.targets[0], ast.Name):
                try:
                    yield node.targets[0].id, ast.literal_eval(node.value.args[0])
                except ValueError:  # a name: the size limit
                    yield node.targets[0].id, SIZE_LIMIT


# ============================================= another author's script and logs ======================================
UNSEEN = (
    "the weights: their file was not there, so nobody has counted its bytes or scored it",
    "the order: that targets are scored before they are trained on, once each, by probabilities that sum to one",
    "the origin of the logs: that they are of this script with one configuration, and of the machines that they name",
    "the data: which tokenizer, training and validation shards they were",
)
GPU = re.compile(r"^device:(\S+ \([^)\n]{1,60}\))|\b(NVIDIA (?:[A-Z]{1,3}\d{2,4}|GeForce|RTX|GH200)[\w -]{0,30})", re.M)
TORCH = re.compile(r"(?:^Running PyTorch |\btorch:)(\d[\w.+]{1,30})", re.M)


def of_logs(script_path: Path, log_paths: list[Path]) -> Material:
    """Returns the material of somebody's script and logs, which are only parsed; Refusal where they cannot do."""
    script = read_foreign_script(script_path)
    logs = [(path, read_log(path)) for path in log_paths]
    refuse_copies(logs)
    requirements = script_path.with_name("requirements.txt")
    entries = sorted((entry_of(path, log, script.size) for path, log in logs), key=lambda entry: entry.seed)
    processes = {int(count) for _, log in logs if (count := log.get("world_size"))}
    material = Material(
        is_own=False,
        entries=entries,
        script=script_path.read_bytes(),
        source=script.content if script.packed and not script.problem else None,
        requirements=requirements.read_bytes() if requirements.is_file() else None,
        processes=processes.pop() if len(processes) == 1 else None,
        unverified=[*UNSEEN, *unknown_figures(entries), *other_code(logs, script)],
        no_record=[*dict.fromkeys(reason for path, log in logs for reason in speaks_against(log, path, script.size))],
    )
    if script.problem:
        material.unverified.append(f"what the script does: {script.problem}")
    if material.requirements is None:
        material.unverified.append(f"which packages it needs: no {requirements.name} lies beside {script_path.name}")
    material.no_record += few_seeds(entries)
    material.refusals += refusals(material)
    return material


def read_foreign_script(path: Path) -> Script:
    """Returns a script that stands alone and is Python; Refusal otherwise."""
    if not path.is_file() or not path.stat().st_size:
        raise Refusal(f"--script {path} is {'empty' if path.is_file() else 'no file'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in somebody's strings
            ast.parse(path.read_bytes())  # with the encoding that it declares
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Refusal(f"--script {path} is no Python: {error}") from None
    script = read_script(path)
    folder = path.parent
    names = [file.relative_to(folder).as_posix() for depth in ("*", "*/*") for file in folder.glob(depth)]
    beside = sorted(loaded_files(script, names))
    beside = [name for name in beside if not script.packed or (folder / name).read_bytes() != script.content]
    if beside:
        raise Refusal(f"{path} loads {', '.join(beside)} from its folder: a submission has one script, join them")
    return script


def read_log(path: Path) -> Log:
    """Returns the figures of the log of one finished run; Refusal otherwise."""
    if not path.is_file():
        raise Refusal(f"--log {path} is no file")
    log = parse_log(path)
    if log.num_before or len(log.seeds) > 1:
        seeds = f" of the seeds {', '.join(map(str, sorted(log.seeds)))}" if len(log.seeds) > 1 else ""
        raise Refusal(f"--log {path} has several runs{seeds}: cut it into one log a run")
    score = last_score(log)
    if score is None:
        raise Refusal(f"--log {path} has no score of the stored model (val_bpb:…): give the log of a run that ended")
    if not all(0 < value < 1e6 for value in (score.bpb, score.loss) if value is not None):
        raise Refusal(f"--log {path}:{score.line}: val_loss {score.loss}, val_bpb {score.bpb} is no score")
    later = [other for other in log.finals() if other.line > score.line and abs(other.bpb - score.bpb) > 6e-5]
    if later:
        what = f"{later[-1].bpb} ({later[-1].label!r})"
        raise Refusal(f"--log {path}:{later[-1].line} ends with {what}, after {score.bpb}: which one is the result?")
    if log.seed is None:
        raise Refusal(f"--log {path} names no seed, nor does its name: if you know it, name it train_seed<N>.log")
    named = log.get("seed_of_name")
    if named is not None and "seed" in path.name.lower():
        raise Refusal(f"--log {path} is of seed {log.seed}, and its name says {named:.0f}: rename it")
    return log


def refuse_copies(logs: list[tuple[Path, Log]]) -> None:
    """Raises Refusal where two logs print the same scores after the same seconds."""
    known: dict[tuple, Path] = {}
    for path, log in logs:
        first = known.setdefault((train_seconds(log), *(score.bpb for score in log.scores)), path)
        if first is not path and train_seconds(log):
            raise Refusal(f"--log {path} prints the scores and seconds of {first}: it is a copy")


def entry_of(path: Path, log: Log, code_size: int) -> Entry:
    """Returns what a log says of its seed."""
    score, model = last_score(log), model_bytes(log)
    logged = log.get("total") or (model or 0) + (counted_code(log) or 0)
    train, steps = train_seconds(log) or None, train_steps(log) or None
    average = log.get("step_avg_ms")
    if average is None and train and log.get("stop_step"):
        average = 1000 * train / log.get("stop_step")
    text = read_text(path)
    gpu, torch = GPU.search(text), TORCH.search(text)
    named = [f"device:{gpu[1] or gpu[2]}"] if gpu else []
    named += [f"torch:{torch[1]}"] if torch else []
    return Entry(
        seed=log.seed,
        val_bpb=float(score.bpb),
        val_loss=None if score.loss is None else float(score.loss),
        bytes_model=None if model is None else int(model),
        log=path.read_bytes(),
        machine=" ".join(named),
        steps=None if steps is None else int(steps),
        step_avg_ms=average,
        train_seconds=train,
        calibration_seconds=calibration_seconds(log),
        eval_seconds=scoring_seconds(log, score),
        bytes_logged=int(logged) if counts_other_code(log, code_size) else None,
    )


def counts_other_code(log: Log, code_size: int) -> bool:
    """Returns whether a log counts another number of bytes of code than the script has."""
    counted = counted_code(log)
    return counted is not None and abs(counted - code_size) > 2  # a line end or two


def other_code(logs: list[tuple[Path, Log]], script: Script) -> Iterable[str]:
    """Yields which logs count another script."""
    for _, log in logs:
        if counts_other_code(log, script.size):
            counted = f"its log counts {counted_code(log):,.0f} bytes of code, this script has {script.size:,}"
            yield f"the script of seed {log.seed}: {counted}; the larger sum is taken"


def unknown_figures(entries: list[Entry]) -> Iterable[str]:
    """Yields which figures the logs lack."""
    names = {
        "bytes_model": "bytes of the model",
        "val_loss": "nats a token",
        "steps": "steps",
        "train_seconds": "seconds of training",
        "calibration_seconds": "seconds of calibration, if there was one",
        "eval_seconds": "seconds of scoring",
        "machine": "GPUs and packages",
    }
    for name, words in names.items():
        without = [str(entry.seed) for entry in entries if getattr(entry, name) in (None, "")]
        if without:
            yield f"{words}: not in the log of seed {', '.join(without)}"


def speaks_against(log: Log, path: Path, code_size: int) -> Iterable[str]:
    """Yields what a log says, or does not show, that keeps it out of the record track."""
    score, entry = last_score(log), entry_of(path, log, code_size)
    processes, who = log.get("world_size"), f"seed {log.seed}"
    if entry.training is None:
        yield f"{who}: its log does not show the seconds of training"
    elif entry.training > TIME_LIMIT:
        more = f" + {entry.calibration_seconds:.1f} s of calibration" if entry.calibration_seconds else ""
        yield f"{who}: {entry.train_seconds:.1f} s of training{more}, over {TIME_LIMIT:.0f}"
    if entry.eval_seconds is None:
        yield f"{who}: its log does not show the seconds of scoring"
    elif entry.eval_seconds > TIME_LIMIT:
        yield f"{who}: {entry.eval_seconds:.1f} s of scoring, over {TIME_LIMIT:.0f}"
    if entry.bytes_model is None and entry.bytes_logged is None:
        yield f"{who}: its log does not show the bytes of the model"
    if processes is None:
        yield f"{who}: its log does not show that it ran on 8 GPUs"
    elif processes != 8:
        yield f"{who}: trained by {processes:.0f} processes, not on 8 H100s"
    if entry.machine.startswith("device:") and "H100" not in entry.machine:
        yield f"{who}: trained on {entry.machine.partition(' torch:')[0]}, not on H100s"
    mixed = next((other for other in log.finals() if MIXTURE.search(other.label)), None)
    num_bytes, error = implied_bytes(log, score)
    if mixed:
        yield f"{who}: {mixed.label!r} is a byte mixture, which #1902 excluded"
    elif num_bytes is None:
        yield f"{who}: its log does not show that the challenge's whole validation text was scored"
    elif all(abs(num_bytes - known) > 0.005 * known + error for known in (*VAL_BYTES, LAUNCH_BYTES)):
        yield f"{who}: {num_bytes:,.0f} bytes were scored, which is not the challenge's validation text"
    adapts = log.config.get("ttt_enabled", ("", 0))[0].lower() in ("1", "true")
    if adapts and not any("ttt" in other.label.lower() for other in log.finals()):
        yield f"{who}: ttt_enabled is set, and its log has no score after adaptation"
