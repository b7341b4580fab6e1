"""What a submission is made of, and what speaks against it: from audited runs of this project, or from another author's
script and logs. For submit.py.

Nothing is taken on trust that can be recomputed. What cannot is in `unverified`, and the README says so."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from challenge import SEEDS_OF_A_RECORD, SIZE_LIMIT, TIME_LIMIT, VAL_BYTES
from checker.logs import MIXTURE, Log, last_score, model_bytes, parse_log, scoring_seconds, train_seconds, train_steps
from checker.metric import LAUNCH_BYTES, implied_bytes
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
    calibration_seconds: float = 0.0
    eval_seconds: float | None = None
    eval_seconds_strict: float | None = None
    stages: dict[str, float] = field(default_factory=dict)  # bits per byte on the way
    audit: dict[str, Any] | None = None  # compliance.json

    @property
    def training(self) -> float | None:
        """Returns the seconds that the rules call training: the steps and the calibrations after them."""
        return None if self.train_seconds is None else self.train_seconds + self.calibration_seconds


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

    def total(self, entry: Entry) -> int | None:
        """Returns the bytes that count for one seed: the script as shipped and the model."""
        return None if entry.bytes_model is None else len(self.script) + entry.bytes_model

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
            yield f"seed {entry.seed}: code + model are {total:,} bytes, over {SIZE_LIMIT:,}: raise QUANT_FLOOR"


def few_seeds(entries: list[Entry]) -> list[str]:
    """Returns the reason that too few seeds are for a record, if they are."""
    num = len(entries)
    return [f"{num} of at least {SEEDS_OF_A_RECORD} seeds"] if num < SEEDS_OF_A_RECORD else []


# ============================================== audited runs of this project =========================================
class Run(NamedTuple):
    """A run that is complete, and whose files are those that it reported on."""

    folder: Path
    result: dict[str, Any]  # submission.json
    audit: dict[str, Any]  # compliance.json
    script: bytes
    entry: Entry


def of_runs(folders: list[Path]) -> Material:
    """Returns the material of finished, audited runs; Refusal where their files do not fit together."""
    runs = sorted((read_run(folder) for folder in folders), key=lambda run: run.result["seed"])
    first = runs[0]
    script = read_script(first.folder / "train_gpt.py")
    defaults = dict(knob_defaults(script))
    settings = {name: value for name, value in first.result["settings"].items() if defaults.get(name) != value}
    processes = re.search(r" processes:(\d+)", first.result["machine"])
    entries = [run.entry for run in runs]
    material = Material(
        entries=entries,
        script=first.script,
        source=script.source.encode() if script.packed else None,
        requirements=(ROOT / "requirements.txt").read_bytes(),
        settings=settings,
        data=first.result.get("data", {}),
        processes=int(processes[1]) if processes else None,
        no_record=[*dict.fromkeys(reason for run in runs for reason in why_no_record(run.result)), *few_seeds(entries)],
    )
    if not material.data:
        material.unverified.append("on which data: the runs are of a script that does not name them")
    material.refusals += [*refusals(material), *run_refusals(runs)]
    return material


def read_run(folder: Path) -> Run:
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
    return Run(folder, result, audit, script, entry)


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


def run_refusals(runs: list[Run]) -> Iterable[str]:
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
    "that the file of the weights has the bytes that the logs say, and scores what they say: it was not there",
    "that targets are scored before they are trained on, once each, by probabilities that sum to one: nothing was run",
    "that the logs are of this script, on the machines and data that they speak of",
)


def of_logs(script_path: Path, log_paths: list[Path]) -> Material:
    """Returns the material of somebody's script and logs, which are only parsed; Refusal where they cannot do."""
    if not script_path.is_file():
        raise Refusal(f"--script {script_path} is no file")
    script = read_script(script_path)
    if script.error:
        raise Refusal(f"--script {script_path} is no Python: {script.error[0]}, line {script.error[1]}")
    beside = sorted(loaded_files(script, [path.name for path in script_path.parent.iterdir()]))
    if beside:
        raise Refusal(
            f"{script_path} loads {', '.join(beside)} from its folder: a submission has one script, join them"
        )
    logs = [(path, read_log(path)) for path in log_paths]
    requirements = script_path.with_name("requirements.txt")
    entries = sorted((entry_of(path, log) for path, log in logs), key=lambda entry: entry.seed)
    processes = {int(count) for _, log in logs if (count := log.get("world_size"))}
    material = Material(
        entries=entries,
        script=script_path.read_bytes(),
        source=script.source.encode() if script.packed else None,
        requirements=requirements.read_bytes() if requirements.is_file() else None,
        processes=min(processes, default=None),
        unverified=[*UNSEEN, *unknown_figures(entries)],
        no_record=[*dict.fromkeys(reason for path, log in logs for reason in speaks_against(path, log))],
    )
    if script.problem:
        material.unverified.append(f"what the script does: {script.problem}")
    if material.requirements is None:
        material.unverified.append(f"which packages it needs: no {requirements.name} lies beside {script_path.name}")
    material.no_record += few_seeds(entries)
    material.refusals += refusals(material)
    return material


def read_log(path: Path) -> Log:
    """Returns the figures of a log; Refusal without a score of the stored model, or a seed."""
    if not path.is_file():
        raise Refusal(f"--log {path} is no file")
    log = parse_log(path)
    if last_score(log) is None:
        raise Refusal(f"--log {path} has no score of the stored model (val_bpb:…): give the log of a run that ended")
    if log.seed is None:
        raise Refusal(f"--log {path} names no seed, nor does its name: rename it to train_seed<N>.log")
    return log


def entry_of(path: Path, log: Log) -> Entry:
    """Returns what a log says of its seed."""
    score, model = last_score(log), model_bytes(log)
    train, steps = train_seconds(log), train_steps(log)
    unquantized = [earlier.bpb for earlier in log.scores if earlier.kind == "unquantized"]
    return Entry(
        seed=log.seed,
        val_bpb=float(score.bpb),
        val_loss=None if score.loss is None else float(score.loss),
        bytes_model=None if model is None else int(model),
        log=path.read_bytes(),
        steps=None if steps is None else int(steps),
        step_avg_ms=1000 * train / steps if train and steps else None,
        train_seconds=train,
        calibration_seconds=max((seconds for seconds, _ in log.values.get("calibration_s", ())), default=0.0),
        eval_seconds=scoring_seconds(log, score),
        stages={"averaged": unquantized[-1]} if unquantized else {},
    )


def unknown_figures(entries: list[Entry]) -> Iterable[str]:
    """Yields which figures the logs lack."""
    names = {
        "bytes_model": "bytes of the model",
        "val_loss": "nats a token",
        "train_seconds": "seconds of training",
        "eval_seconds": "seconds of scoring",
    }
    for name, words in names.items():
        without = [str(entry.seed) for entry in entries if getattr(entry, name) is None]
        if without:
            yield f"{words}: not in the log of seed {', '.join(without)}"


def speaks_against(path: Path, log: Log) -> Iterable[str]:
    """Yields what a log says that keeps it out of the record track."""
    score = last_score(log)
    entry = entry_of(path, log)
    if entry.training is not None and entry.training > TIME_LIMIT:
        yield f"seed {log.seed}: {entry.training:.1f} s of training, over {TIME_LIMIT:.0f}"
    if entry.eval_seconds is not None and entry.eval_seconds > TIME_LIMIT:
        yield f"seed {log.seed}: {entry.eval_seconds:.1f} s of scoring, over {TIME_LIMIT:.0f}"
    processes = log.get("world_size")
    if processes is not None and processes != 8:
        yield f"trained by {processes:.0f} processes, not on 8 H100s"
    num_bytes, error = implied_bytes(log, score)
    if MIXTURE.search(score.label):
        yield f"seed {log.seed}: {score.label!r} is a byte mixture, which #1902 excluded"
    elif num_bytes is None:
        yield f"seed {log.seed}: its log does not show that the challenge's whole validation text was scored"
    elif all(abs(num_bytes - known) > 0.005 * known + error for known in (*VAL_BYTES, LAUNCH_BYTES)):
        yield f"seed {log.seed}: {num_bytes:,.0f} bytes were scored, which is not the challenge's validation text"
