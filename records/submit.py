"""Turn finished, audited runs into a submission folder of the challenge, or say why they cannot be one.

    python records/submit.py logs/a logs/b logs/c --name "XSA and cosine TTT" --github-id somebody
    python records/submit.py … --against records/track_10min_16mb/2026-03-24_Baseline    # with Welch's tests

Everything in the folder comes from the runs: README.md, submission.json, train_seed<N>.log, compliance_seed<N>.json,
requirements.txt, the script as it is counted (train_gpt.py) and, where that is packed, its source
(train_gpt_readable.py). Only runs of one script with one configuration and passed audits are taken, and each that is
named is counted. On other hardware, data or times than the challenge's, they become a folder of the non-record track
that says so. What breaks a rule of both tracks is refused: an artifact over the limit, a failed or missing audit,
training before scoring. The folder appears whole or not at all, and only if records/check.py rejects nothing in it."""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import json
import math
import re
import shlex
import shutil
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import checker
import significance
from challenge import SEEDS_OF_A_RECORD, SIZE_LIMIT, TIME_LIMIT

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from train_gpt import unpack  # noqa: E402 - the packer of the runs themselves

OWN_SETTINGS = (
    "seed",
    "run_id",
    "audit",
    "tensorboard",
    "resume",
    "checkpoint_every",
    "fallback_dir",
    "device",
    "data_path",
    "tokenizer_path",
)  # may differ from run to run
# And those in which the audit of a finished run differs from that run.
AUDIT_SETTINGS = (*OWN_SETTINGS, "eval_only", "export_only", "max_val_tokens", "attn_backend", "compile", "smoke")
PROOFS = {"artifact", "future_flip", "sum_of_probabilities", "once_only", "last_chunk", "files", "network"}
H100S = re.compile(r"^device:cuda \(NVIDIA H100 80GB HBM3\) processes:8 ")  # as torch names the SXM module


class Refusal(ValueError):
    """Why runs cannot become a folder: the thing, its value, the fix."""


class Run(NamedTuple):
    folder: Path
    result: dict[str, Any]  # submission.json
    compliance: dict[str, Any]
    stages: dict[str, float]  # bits per byte by stage
    script: bytes  # train_gpt.py as it ran and was counted
    log: bytes


# -------------------------------------------------------------------------------------------------------- what is there


def read_run(folder: Path) -> Run:
    """Returns a run that is complete and whose files are those that it reported on; Refusal otherwise."""
    names = ("submission.json", "metrics.jsonl", "train.log", "train_gpt.py", "final_model.bin", "compliance.json")
    for name in names[:-1]:
        if not (folder / name).is_file():
            raise Refusal(f"{folder / name} is missing: give the folder of a finished training run in logs/")
    if not (folder / "compliance.json").is_file():
        raise Refusal(f"{folder} was not audited: run `python records/audit.py {folder}`, or train with AUDIT=1")
    blobs = {name: (folder / name).read_bytes() for name in names}
    try:
        result, compliance = (json.loads(blobs[name]) for name in ("submission.json", "compliance.json"))
        events = [json.loads(line) for line in blobs["metrics.jsonl"].splitlines() if line.strip()]
        stages = {str(e["stage"]): float(e["val_bpb"]) for e in events if e["event"] == "eval"}
        finals = [{n: v for n, v in e.items() if n not in ("event", "time")} for e in events if e["event"] == "final"]
        check_types(result, compliance, stages)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refusal(f"{folder} holds no report that can be read ({error!r}): finish the run again") from None
    if finals != [result] or len(blobs["final_model.bin"]) != result["bytes_model"]:
        raise Refusal(f"{folder}: submission.json is not what metrics.jsonl and final_model.bin say: run it again")
    for name, key in (("train_gpt.py", "code_sha256"), ("final_model.bin", "artifact_sha256")):
        if hashlib.sha256(blobs[name]).hexdigest() != result[key]:
            raise Refusal(f"{folder / name} is not the file that was scored ({key} differs): it changed after the run")
        if compliance.get(key) != result[key]:
            raise Refusal(f"{folder / 'compliance.json'} is of another {name}: run `python records/audit.py {folder}`")
    for name, value in result["settings"].items():
        if name not in AUDIT_SETTINGS and compliance["settings"].get(name) != value:
            raise Refusal(
                f"{folder / 'compliance.json'} is of {name.upper()}={compliance['settings'].get(name)}, not {value}"
            )
    return Run(folder, result, compliance, stages, blobs["train_gpt.py"], blobs["train.log"])


def check_types(result: dict[str, Any], compliance: dict[str, Any], stages: dict[str, float]) -> None:
    """Raises ValueError, KeyError or TypeError unless everything is there, of its type and finite."""
    numbers = "val_loss val_bpb bytes_model eval_seconds eval_seconds_strict num_bytes".split()
    numbers += "train_seconds steps step_avg_ms".split() if "train_seconds" in result else []
    for value in (*(result[name] for name in numbers), *stages.values()):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{value} is no number")
    seeds = {result["seed"], result["settings"]["seed"], compliance["seed"]}
    if len(seeds) > 1 or type(result["seed"]) is not int or "averaged" not in stages:
        raise ValueError(f"seeds {seeds}, stages {list(stages)}")
    if not all(isinstance(result[name], str) for name in ("kind", "machine", "code_sha256", "artifact_sha256")):
        raise TypeError("kind, machine and hashes are texts")
    proofs = compliance["proofs"]
    if not all(isinstance(part, dict) for part in (result["rule_breaks"], proofs, *proofs.values())):
        raise TypeError("rule_breaks and proofs are objects")
    json.dumps(compliance, allow_nan=False)


def refusals(runs: list[Run], shipped: bytes) -> Iterable[str]:
    """Yields the reasons for which the runs can be in neither track."""
    seeds = [run.result["seed"] for run in runs]
    for run in runs:
        result = run.result
        total = len(shipped) + int(result["bytes_model"])
        proofs = run.compliance["proofs"]
        failed = sorted(name for name in PROOFS | proofs.keys() if proofs.get(name, {}).get("passed") is not True)
        if run.compliance.get("passed") is not True or failed:
            yield f"{run.folder}: the audit failed ({', '.join(failed)}): see its compliance.json"
        if result["kind"] == "ttt_pre" or "order" in result["rule_breaks"]:
            yield f"{run.folder}: TTT_MODE=pre trains on validation tokens before they are scored, no track takes that"
        if total > SIZE_LIMIT:
            yield f"{run.folder}: code + model are {total:,} bytes, over {SIZE_LIMIT:,}: raise QUANT_FLOOR"
        if result["settings"].get("eval_only") or "train_seconds" not in result:
            yield f"{run.folder} did not train: give the run that made the artifact"
        if seeds.count(result["seed"]) > 1:
            yield f"{run.folder}: the seed {result['seed']} is there twice, every run must have its own"
        if result["code_sha256"] != runs[0].result["code_sha256"]:
            yield f"{run.folder} is of another script than {runs[0].folder}: all seeds must be of one"
        for name in sorted(result["settings"].keys() | runs[0].result["settings"].keys()):
            values = [other.result["settings"].get(name) for other in (run, runs[0])]
            if values[0] != values[1] and name not in OWN_SETTINGS:
                yield f"{run.folder}: {name.upper()}={values[0]}, {values[1]} in {runs[0].folder}: make them equal"


def why_no_record(runs: list[Run]) -> list[str]:
    """Returns what keeps the runs out of the record track: nothing, where they can be a record."""
    reasons = []
    for run in runs:
        reasons += [str(reason) for rule, reason in sorted(run.result["rule_breaks"].items()) if rule != "order"]
        if not H100S.match(run.result["machine"]):
            reasons.append(f"trained on {run.result['machine'].partition(' dtype:')[0]}, not on 8 H100s")
    if len(runs) < SEEDS_OF_A_RECORD:
        reasons.append(f"{len(runs)} of at least {SEEDS_OF_A_RECORD} seeds")
    return list(dict.fromkeys(reasons))


# ------------------------------------------------------------------------------------------------------ what is written


def booleans(runs: list[Run], shipped: bytes) -> dict[str, bool | None]:
    """Returns the `compliance` of submission.json, derived from figures and proofs; None where nobody has watched."""

    def proven(*names: str) -> bool:
        return all(run.compliance["proofs"][name]["passed"] is True for run in runs for name in names)

    watched = all("train" in run.compliance["proofs"]["files"].get("phases_watched", ()) for run in runs)
    results = [run.result for run in runs]
    return {
        "train_under_600s": all(training_seconds(result) <= TIME_LIMIT for result in results),
        "eval_under_600s": all(result["eval_seconds"] <= TIME_LIMIT for result in results),
        "artifact_under_16mb": all(len(shipped) + result["bytes_model"] <= SIZE_LIMIT for result in results),
        "three_seeds": len(runs) >= SEEDS_OF_A_RECORD,
        "score_first_ttt": proven("future_flip", "once_only", "last_chunk"),
        "normalized_over_vocabulary": proven("sum_of_probabilities"),
        "single_pass": proven("once_only"),
        "scored_weights_are_the_files": proven("artifact"),
        "no_pre_quant_ttt": proven("files") if watched else None,
        "no_network_in_scoring": proven("network"),
    }


def training_seconds(result: dict[str, Any]) -> float:
    """Return the seconds that the rules call training: the steps and the calibrations after them."""
    return result["train_seconds"] + result.get("calibration_seconds", 0.0)


def submission(runs: list[Run], shipped: bytes, options: argparse.Namespace, record: bool) -> dict[str, Any]:
    """Returns submission.json: the keys of merged records, each a figure of the runs."""
    losses, scores = ([run.result[key] for run in runs] for key in ("val_loss", "val_bpb"))
    totals = [len(shipped) + run.result["bytes_model"] for run in runs]
    seeds = {}
    for run, total in zip(runs, totals):
        result = run.result
        seeds[str(result["seed"])] = {
            "val_loss": result["val_loss"], "val_bpb": result["val_bpb"], "artifact_bytes": total,
            "bytes_model": result["bytes_model"], "steps": result["steps"],
            "step_avg_ms": round(result["step_avg_ms"], 3), "train_time_s": round(result["train_seconds"], 3),
            "calib_time_s": round(result.get("calibration_seconds", 0.0), 3),
            "eval_time_s": round(result["eval_seconds"], 3),
            "eval_time_strict_s": round(result["eval_seconds_strict"], 3),
        }  # fmt: skip
    several = len(runs) > 1
    content = {
        "author": options.author or options.github_id, "github_id": options.github_id, "name": options.name,
        "blurb": options.blurb, "date": options.date, "track": "10min_16mb" if record else "non_record_16mb",
        "val_loss": statistics.fmean(losses), "val_bpb": statistics.fmean(scores),
        "val_loss_std": statistics.stdev(losses) if several else None,
        "val_bpb_std": statistics.stdev(scores) if several else None,
        "seeds": [run.result["seed"] for run in runs], "seed_results": seeds,
        "pre_quant_val_bpb": statistics.fmean(run.stages.get("averaged", math.nan) for run in runs),
        "bytes_code": len(shipped), "bytes_total": max(totals), "artifact_bytes_mean": statistics.fmean(totals),
        "artifact_bytes_max": max(totals), "hardware": hardware(runs), "pytorch_version": version(runs, "torch"),
        "compliance": booleans(runs, shipped),
    }  # fmt: skip
    if not record:
        content["why_no_record"] = why_no_record(runs)
    if options.against:
        content |= comparison(runs, options.against)
    return content


def hardware(runs: list[Run]) -> str:
    """Returns what the runs were on, as records name it where it is the challenge's."""
    machines = {run.result["machine"].partition(" dtype:")[0] for run in runs}
    return "8xH100 80GB SXM" if all(H100S.match(run.result["machine"]) for run in runs) else "; ".join(sorted(machines))


def version(runs: list[Run], package: str) -> str:
    """Returns the version or versions of a package that the runs report."""
    found = {m[1] for run in runs if (m := re.search(rf" {package}:(\S+)", run.result["machine"]))}
    return ", ".join(sorted(found)) or "unknown"


def comparison(runs: list[Run], against: list[str]) -> dict[str, Any]:
    """Returns the keys on the difference to other runs or a published folder, with both of Welch's tests."""
    own = [significance.Score(run.result["seed"], run.result["val_bpb"], run.result["val_loss"]) for run in runs]
    found = significance.compare(own, significance.pool([Path(path) for path in against]))
    plain, margin = found["tests"]
    return {
        "comparison_baseline": " ".join(Path(path).name for path in against),
        "comparison_baseline_bpb": found["baseline"]["mean"]["bits_per_byte"],
        "delta_bpb": found["difference"]["bits_per_byte"], "delta_nats": found["difference"]["nats_per_token"],
        "t_statistic": plain["t"], "welch_df": plain["df"], "p_value": plain["p"],
        "t_statistic_with_margin": margin["t"], "welch_df_with_margin": margin["df"],
        "p_value_with_margin": margin["p"], "margin_nats_per_token": margin["margin_nats_per_token"],
        "margin_bpb": margin["margin_bpb"],
        "significance_notes": [test["reason"] for test in found["tests"] if test["reason"]],
    }  # fmt: skip


def readme(runs: list[Run], content: dict[str, Any], shipped: bytes, source: bytes | None) -> str:
    """Returns README.md: headline, table, commands, proofs, all of them from the runs."""
    std = "one seed" if content["val_bpb_std"] is None else f"sample std {content['val_bpb_std']:.6f}"
    lines = [f"# {content['name']}", "", f"**val_bpb: {content['val_bpb']:.6f}** (mean of {len(runs)}, {std}), "]
    lines[-1] += f"largest artifact {content['bytes_total']:,} bytes, {content['hardware']}"
    lines += [""]
    if "why_no_record" in content:
        lines += ["**This is not a record:** " + "; ".join(content["why_no_record"]) + ".", ""]
    lines += [content["blurb"], ""] if content["blurb"] else []
    lines += [
        "| Seed | Steps | ms/step | averaged bpb | quantized bpb | final bpb | bytes | train s | eval s (strict) |"
    ]
    lines += ["|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for run in runs:
        row, stages = content["seed_results"][str(run.result["seed"])], run.stages
        before = [f"{stages[name]:.6f}" if name in stages else "-" for name in ("averaged", "quantized")]
        cells = [run.result["seed"], row["steps"], f"{row['step_avg_ms']:.2f}", *before, f"{row['val_bpb']:.6f}"]
        cells += [f"{row['artifact_bytes']:,}", f"{row['train_time_s']:.1f}"]
        cells += [f"{row['eval_time_s']:.1f} ({row['eval_time_strict_s']:.1f})"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        f"Loss {content['val_loss']:.6f} nats a token. Strict seconds add reading the artifact and the preflight.",
    ]
    lines += ["", *tests_of(content), *commands_of(runs), *proofs_of(runs), *files_of(shipped, source)]
    return "\n".join(lines) + "\n"


def tests_of(content: dict[str, Any]) -> list[str]:
    """Returns the section on the difference to another folder, empty without one."""
    if "comparison_baseline" not in content:
        return []
    lines = ["## Difference", "", f"To {content['comparison_baseline']}: {content['delta_bpb']:+.6f} bits per byte"]
    lines[-1] += f", {content['delta_nats']:+.6f} nats a token." if content["delta_nats"] is not None else "."
    for name, suffix in (("without a margin", ""), ("by more than 0.005 nats a token", "_with_margin")):
        t, df, p = (content[key + suffix] for key in ("t_statistic", "welch_df", "p_value"))
        if p is not None:
            lines.append(f"Welch's test, one-sided, {name}: t = {t:.3f}, df = {df:.2f}, p = {p:.4g}.")
    lines += [f"No test: {reason}." for reason in content["significance_notes"]]
    return [*lines, ""]


def commands_of(runs: list[Run]) -> list[str]:
    """Returns the section with set-up and commands: the settings are those that are not the script's defaults."""
    defaults = {name: default for name, default in knob_defaults(runs[0])}
    changed = {name: value for name, value in runs[0].result["settings"].items() if defaults.get(name) != value}
    text = {name: str(int(v) if isinstance(v, bool) else v) for name, v in changed.items()}
    skip = (
        "seed",
        "run_id",
        "audit",
        "tensorboard",
        *(name for name in text if name.endswith("_path") and text[name][:1] == "/"),
    )
    given = " ".join(f"{name.upper()}={shlex.quote(value)}" for name, value in text.items() if name not in skip)
    processes = re.search(r" processes:(\d+)", runs[0].result["machine"])
    start = f"torchrun --standalone --nproc_per_node={processes[1] if processes else 8} train_gpt.py"
    seeds = [str(run.result["seed"]) for run in runs]
    lines = ["## Run it", "", "```bash", "pip install -r requirements.txt"]
    lines += [" ".join(filter(None, (f"SEED={seeds[0]}", given, start)))]
    lines += [f"# and the same with SEED={', SEED='.join(seeds[1:])}"] if seeds[1:] else []
    lines += [
        "```",
        "",
        "DATA_PATH and TOKENIZER_PATH, where they are not given, are looked for in the folders above this",
    ]
    return [*lines, "one, too.", ""]


def knob_defaults(run: Run) -> Iterable[tuple[str, Any]]:
    """Yields setting and default from the class body of the run's script, which is only parsed."""
    for node in ast.walk(ast.parse(unpack(run.script) or run.script)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and len(node.value.args) == 3:
            name = getattr(node.value.func, "id", "")
            if name in ("Knob", "ModelKnob") and isinstance(node.targets[0], ast.Name):
                try:
                    yield node.targets[0].id, ast.literal_eval(node.value.args[0])
                except ValueError:  # a name: the size limit
                    yield node.targets[0].id, SIZE_LIMIT


def proofs_of(runs: list[Run]) -> list[str]:
    """Returns the section on the rules: what the audit of each seed's trained model found."""
    lines = [
        "## Rules",
        "",
        "Experiments on the trained, adapted model of each seed (compliance_seed*.json has all figures):",
    ]
    lines += ["", "| seed | proof | passed | what was found |", "|--:|---|---|---|"]
    for run in runs:
        for name, proof in run.compliance["proofs"].items():
            says = re.sub(r"[^\w .,;:%()+=/'-]", "?", str(proof.get("says", "")))
            lines.append(f"| {run.result['seed']} | {name} | {'yes' if proof['passed'] is True else 'NO'} | {says} |")
    return [*lines, ""]


def files_of(shipped: bytes, source: bytes | None) -> list[str]:
    """Returns the section on the files, with what is counted."""
    lines = [
        "## Files",
        "",
        f"- `train_gpt.py`, {len(shipped):,} bytes: the script that ran, and what is counted",
    ]
    if source is not None:
        lines[-1] += "; LZMA + base85, unpacks itself"
        lines += [f"- `train_gpt_readable.py`, {len(source):,} bytes: the source in it, byte for byte"]
    return [*lines, "- logs and audits of every seed, `requirements.txt`", ""]


# ----------------------------------------------------------------------------------------------------------- the folder


def is_date(text: str) -> bool:
    """Returns whether a text is a day as YYYY-MM-DD."""
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def slug(name: str) -> str:
    """Returns a name as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_.")


def write_folder(runs: list[Run], options: argparse.Namespace) -> Path:
    """Returns the folder, written whole and found without fault by records/check.py; Refusal otherwise."""
    shipped = runs[0].script
    source = unpack(shipped)  # None: it is readable as it is
    if reasons := list(dict.fromkeys(refusals(runs, shipped))):
        raise Refusal("\n  ".join(["these runs can be in no track:", *reasons]))
    missing = why_no_record(runs)
    if options.track == "record" and missing:
        raise Refusal(
            "\n  ".join(["this is no record:", *missing, "(--track non-record writes a folder that says so)"])
        )
    record = not missing and options.track != "non-record"
    content = submission(runs, shipped, options, record)
    folder = Path(
        options.out, "track_10min_16mb" if record else "track_non_record_16mb", f"{options.date}_{slug(options.name)}"
    )
    if folder.exists():
        raise Refusal(f"{folder} exists already: choose another --name or --date, or move it away")
    temporary = folder.with_name("." + folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    part = temporary / folder.relative_to(options.out)  # the checker reads the track from the path
    part.mkdir(parents=True)
    try:
        files = {"train_gpt.py": shipped}
        if source is not None:
            files["train_gpt_readable.py"] = source
        files["requirements.txt"] = (ROOT / "requirements.txt").read_bytes()
        files["submission.json"] = (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
        files["README.md"] = readme(runs, content, shipped, source).encode()
        for run in runs:
            files[f"train_seed{run.result['seed']}.log"] = run.log
            compliance = json.dumps(run.compliance, indent=2, allow_nan=False) + "\n"
            files[f"compliance_seed{run.result['seed']}.json"] = compliance.encode()
        for name, data in files.items():
            (part / name).write_bytes(data)
        _, findings = checker.audit(part)
        if faults := [f"{f.rule} {f.message} ({f.file})" for f in findings if f.severity == "reject"]:
            raise Refusal("\n  ".join(["records/check.py rejects the folder:", *faults]))
        part.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def main(arguments: list[str] | None = None) -> None:
    """Writes a folder and says where it is and what it can be; exits with status 1 and the reasons if it cannot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished, audited runs, one a seed")
    parser.add_argument("--name", required=True, help="of the submission")
    parser.add_argument("--github-id", required=True)
    parser.add_argument("--author", default="", help="default: the GitHub id")
    parser.add_argument("--blurb", default="", help="what is new, in a sentence or two")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="YYYY-MM-DD (default: today)")
    parser.add_argument("--against", nargs="+", metavar="FOLDER", help="what it is compared with: a folder, or runs")
    parser.add_argument("--track", choices=("auto", "record", "non-record"), default="auto")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "records", help="where the tracks' folders are (%(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        if not is_date(options.date) or not 0 < len(slug(options.name)) <= 100:
            raise Refusal(f"--date {options.date} --name {options.name}: use YYYY-MM-DD and 1 to 100 letters or digits")
        runs = [read_run(folder) for folder in options.runs]
        folder = write_folder(sorted(runs, key=lambda run: run.result["seed"]), options)
    except (ValueError, OSError) as error:  # Refusal, what significance.py cannot use, a full disk
        sys.exit(f"submit.py: error: {error}")
    content = json.loads((folder / "submission.json").read_text())
    print(f"{folder}: {content['val_bpb']:.6f} bpb over {len(runs)} seeds, {content['bytes_total']:,} bytes at most")
    for reason in content.get("why_no_record", []):
        print(f"  no record: {reason}")


if __name__ == "__main__":
    main()
