"""Turn finished, audited runs into a submission folder of the challenge, or say why they cannot be one.

    python records/submit.py logs/a logs/b logs/c --name "XSA and cosine TTT" --github-id somebody
    python records/submit.py … --against records/track_10min_16mb/2026-03-24_Baseline    # with Welch's tests
    python records/submit.py --script theirs.py --log s1.log s2.log s3.log …             # another author's

Everything in the folder comes from the runs: README.md, submission.json, train_seed<N>.log, compliance_seed<N>.json,
requirements.txt, the script as it is counted (train_gpt.py) and, where that is packed, its source
(train_gpt_readable.py). Only runs of one script with one configuration and passed audits are taken, and each that is
named is counted. On other hardware, data or times than the challenge's, they become a folder of the non-record track
that says so. What breaks a rule of both tracks is refused: an artifact over the limit, a failed or missing audit,
training before scoring. Of another author's script and logs, which are only parsed, the README lists what could not be
verified. The folder appears whole or not at all, and only if records/check.py rejects nothing in it."""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shlex
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import available_packages  # noqa: F401
import checker
import significance
from challenge import SEEDS_OF_A_RECORD, SIZE_LIMIT, TIME_LIMIT
from material import H100S, ROOT, Entry, Material, Refusal, of_logs, of_runs

# ---------------------------------------------------------------------------------------------------- submission.json


def known_mean(values: list[float | None]) -> float | None:
    """Returns the mean, None where a value is not known."""
    return None if None in values or not values else statistics.fmean(values)


def within(values: list[float | None], limit: float) -> bool | None:
    """Returns whether all values are within a limit, None where that is not known."""
    if any(value is not None and value > limit for value in values):
        return False
    return None if None in values else True


def booleans(material: Material) -> dict[str, bool | None]:
    """Returns the `compliance` of submission.json, derived from figures and proofs; None where nobody has watched."""
    entries = material.entries
    audits = [entry.audit for entry in entries if entry.audit is not None]

    def proven(*names: str) -> bool | None:
        if len(audits) < len(entries):
            return None
        return all(audit["proofs"][name]["passed"] is True for audit in audits for name in names)

    watched = all("train" in audit["proofs"]["files"].get("phases_watched", ()) for audit in audits)
    return {
        "train_under_600s": within([entry.training for entry in entries], TIME_LIMIT),
        "eval_under_600s": within([entry.eval_seconds for entry in entries], TIME_LIMIT),
        "artifact_under_16mb": within([material.total(entry) for entry in entries], SIZE_LIMIT),
        "three_seeds": len(entries) >= SEEDS_OF_A_RECORD,
        "score_first_ttt": proven("future_flip", "once_only", "last_chunk"),
        "normalized_over_vocabulary": proven("sum_of_probabilities"),
        "single_pass": proven("once_only"),
        "scored_weights_are_the_files": proven("artifact"),
        "no_pre_quant_ttt": proven("files") if watched else None,
        "no_network_in_scoring": proven("network"),
    }


def rounded(value: float | None) -> float | None:
    """Returns a time with three decimals."""
    return None if value is None else round(value, 3)


def seed_result(entry: Entry, total: int | None) -> dict[str, Any]:
    """Returns what submission.json says of one seed."""
    return {
        "val_loss": entry.val_loss,
        "val_bpb": entry.val_bpb,
        "artifact_bytes": total,
        "bytes_model": entry.bytes_model,
        "steps": entry.steps,
        "step_avg_ms": rounded(entry.step_avg_ms),
        "train_time_s": rounded(entry.train_seconds),
        "calib_time_s": rounded(entry.calibration_seconds),
        "eval_time_s": rounded(entry.eval_seconds),
        "eval_time_strict_s": rounded(entry.eval_seconds_strict),
    }


def submission(material: Material, options: argparse.Namespace, record: bool) -> dict[str, Any]:
    """Returns submission.json: the keys of merged records, each a figure of the runs."""
    entries, totals = material.entries, material.totals()
    losses = [entry.val_loss for entry in entries]
    scores = [entry.val_bpb for entry in entries]
    several = len(entries) > 1
    content = {
        "author": options.author or options.github_id,
        "github_id": options.github_id,
        "name": options.name,
        "blurb": options.blurb,
        "date": options.date,
        "track": "10min_16mb" if record else "non_record_16mb",
        "val_loss": known_mean(losses),
        "val_bpb": statistics.fmean(scores),
        "val_loss_std": statistics.stdev(losses) if several and None not in losses else None,
        "val_bpb_std": statistics.stdev(scores) if several else None,
        "seeds": [entry.seed for entry in entries],
        "seed_results": {str(entry.seed): seed_result(entry, material.total(entry)) for entry in entries},
        "pre_quant_val_bpb": known_mean([entry.stages.get("averaged") for entry in entries]),
        "bytes_code": len(material.script),
        "bytes_total": max(totals, default=None),
        "artifact_bytes_mean": statistics.fmean(totals) if totals else None,
        "artifact_bytes_max": max(totals, default=None),
        "hardware": hardware(material),
        "pytorch_version": version(entries, "torch"),
        "data": material.data or None,
        "compliance": booleans(material),
    }
    if not record:
        content["why_no_record"] = material.no_record
    if material.unverified:
        content["not_verified"] = material.unverified
    if options.against:
        content |= comparison(material, options.against)
    return content


def hardware(material: Material) -> str:
    """Returns what the runs were on, as records name it where it is the challenge's."""
    machines = [entry.machine for entry in material.entries]
    if all(map(H100S.match, machines)):
        return "8xH100 80GB SXM"
    named = sorted({re.split(" dtype:| ?torch:", machine)[0] for machine in machines} - {""})
    if material.is_own:
        return "; ".join(named)
    count = f"{material.processes} processes" if material.processes else "an unknown number of processes"
    return f"by the logs {count} on {' and '.join(named).replace('device:', '') or 'hardware that they do not name'}"


def version(entries: list[Entry], package: str) -> str:
    """Returns the version or versions of a package that the runs report."""
    found = {m[1] for entry in entries if (m := re.search(rf"\b{package}:(\S+)", entry.machine))}
    return ", ".join(sorted(found)) or "unknown"


def comparison(material: Material, against: list[str]) -> dict[str, Any]:
    """Returns the keys on the difference to other runs or a published folder, with both of Welch's tests; Refusal where
    they are known to be of another text."""
    entries, paths, text = material.entries, [Path(path) for path in against], material.data.get("val_sha256")
    texts = {significance.text_of(path) for path in paths}
    if text and texts - {None, text}:
        raise Refusal(
            f"--against {shlex.join(against)}: their validation text is another, so no difference can be told"
        )
    own = [significance.Score(entry.seed, entry.val_bpb, entry.val_loss) for entry in entries]
    found = significance.compare(own, significance.pool(paths))
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
        "same_text": True if text and texts == {text} else None,
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------- README.md


def show(value: float | None, form: str) -> str:
    """Returns a figure of the table, a dash where it is not known."""
    return "–" if value is None else format(value, form)


def readme(material: Material, content: dict[str, Any]) -> str:
    """Returns README.md: headline, table, commands, proofs, all of them from the runs."""
    num = len(material.entries)
    std = "one seed" if content["val_bpb_std"] is None else f"sample std {content['val_bpb_std']:.6f}"
    size = f"largest artifact {show(content['bytes_total'], ',')} bytes"
    lines = [f"# {content['name']}", ""]
    lines += [f"**val_bpb: {content['val_bpb']:.6f}** (mean of {num}, {std}), {size}, {content['hardware']}", ""]
    if content.get("why_no_record"):
        lines += ["**This is not a record:** " + "; ".join(map(shown, content["why_no_record"])) + ".", ""]
    lines += [content["blurb"], ""] if content["blurb"] else []
    lines += table_of(material)
    if content["val_loss"] is not None:
        lines += [f"Loss {content['val_loss']:.6f} nats a token.", ""]
    lines += [*tests_of(content), *commands_of(material), *data_of(material)]
    lines += [*unverified_of(material), *proofs_of(material), *files_of(material)]
    return "\n".join(lines) + "\n"


def table_of(material: Material) -> list[str]:
    """Returns the table of the seeds."""
    head = "| Seed | Steps | ms/step | averaged bpb | quantized bpb | final bpb | bytes | train s | eval s (strict) |"
    lines = [head, "|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for entry in material.entries:
        before = [show(entry.stages.get(name), ".6f") for name in ("averaged", "quantized")]
        cells = [str(entry.seed), show(entry.steps, "d"), show(entry.step_avg_ms, ".2f"), *before]
        cells += [f"{entry.val_bpb:.6f}", show(material.total(entry), ","), show(entry.train_seconds, ".1f")]
        cells += [f"{show(entry.eval_seconds, '.1f')} ({show(entry.eval_seconds_strict, '.1f')})"]
        lines.append("| " + " | ".join(cells) + " |")
    strict = any(entry.eval_seconds_strict is not None for entry in material.entries)
    return [*lines, "", *(["Strict seconds add reading the artifact and the preflight.", ""] if strict else [])]


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
    if not content["same_text"]:
        lines += ["", "That both are scores of one text is not known: the hash of one is missing."]
    return [*lines, ""]


def commands_of(material: Material) -> list[str]:
    """Returns the section with set-up and commands: the settings are those that are not the script's defaults."""
    seeds = [str(entry.seed) for entry in material.entries]
    text = {name: str(int(v) if isinstance(v, bool) else v) for name, v in material.settings.items()}
    skip = ("seed", "run_id", "audit", "tensorboard")
    skip += tuple(name for name in text if name.endswith("_path") and text[name][:1] == "/")
    given = " ".join(f"{name.upper()}={shlex.quote(value)}" for name, value in text.items() if name not in skip)
    start = f"torchrun --standalone --nproc_per_node={material.processes or 8} train_gpt.py"
    if not material.is_own:
        return ["## Run it", "", "The commands and their settings are in no file that this folder was made of.", ""]
    lines = ["## Run it", "", "```bash", "pip install -r requirements.txt"]
    lines += [" ".join(filter(None, (f"SEED={seeds[0]}", given, start)))]
    lines += [f"# and the same with SEED={', SEED='.join(seeds[1:])}"] if seeds[1:] else []
    rest = "DATA_PATH and TOKENIZER_PATH, where they are not given, are looked for in the folders above this one, too."
    return [*lines, "```", "", rest, ""]


def data_of(material: Material) -> list[str]:
    """Returns the section on the data, with the commands that give the same hashes."""
    commands = {
        "tokenizer_sha256": "tokenizer, `sha256sum` of its model",
        "val_sha256": "validation shards, `sha256sum *_val_*.bin | sha256sum` in their folder",
        "train_sha256": "training shards, `sha256sum *_train_*.bin | sha256sum` by their manifest",
    }
    items = [f"- `{material.data[name]}`: {words}" for name, words in commands.items() if name in material.data]
    return ["## Data", "", "SHA-256 of the", "", *items, ""] if items else []


def unverified_of(material: Material) -> list[str]:
    """Returns the section on what nobody has looked at."""
    if not material.unverified:
        return []
    items = [f"- {shown(what)}" for what in material.unverified]
    whose = "" if material.is_own else "All figures here are what the logs say. "
    return ["## Not verified", "", f"{whose}Nobody has verified", "", *items, ""]


def shown(text: str) -> str:
    """Returns somebody's text without what Markdown and HTML would read."""
    return re.sub(r"[^\w .,;:%()+=/'-]", "?", text)


def proofs_of(material: Material) -> list[str]:
    """Returns the section on the rules: what the audit of each seed's trained model found."""
    audited = [entry for entry in material.entries if entry.audit is not None]
    if not audited:
        return []
    lines = ["## Rules", ""]
    lines += ["Experiments on the trained, adapted model of each seed (compliance_seed*.json has all figures):", ""]
    lines += ["| seed | proof | passed | what was found |", "|--:|---|---|---|"]
    for entry in audited:
        for name, proof in entry.audit["proofs"].items():
            passed = "yes" if proof["passed"] is True else "NO"
            lines.append(f"| {entry.seed} | {name} | {passed} | {shown(str(proof.get('says', '')))} |")
    return [*lines, ""]


def files_of(material: Material) -> list[str]:
    """Returns the section on the files, with what is counted."""
    what = "the script that ran" if material.is_own else "the script that was given"
    counted = f"- `train_gpt.py`, {len(material.script):,} bytes: {what}, and what is counted"
    if material.source is None:
        lines = [counted]
    else:
        readable = f"- `train_gpt_readable.py`, {len(material.source):,} bytes: the source in it, byte for byte"
        lines = [f"{counted}; packed, unpacks itself", readable]
    rest = ["logs of every seed"]
    rest += ["their audits"] if material.entries[0].audit else []
    rest += ["`requirements.txt`"] if material.requirements is not None else []
    return ["## Files", "", *lines, f"- {', '.join(rest)}", ""]


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


def folder_files(material: Material, content: dict[str, Any]) -> dict[str, bytes]:
    """Returns name -> bytes of all files of the folder."""
    files = {"train_gpt.py": material.script}
    if material.source is not None:
        files["train_gpt_readable.py"] = material.source
    if material.requirements is not None:
        files["requirements.txt"] = material.requirements
    files["submission.json"] = (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
    files["README.md"] = readme(material, content).encode()
    for entry in material.entries:
        files[f"train_seed{entry.seed}.log"] = entry.log
        if entry.audit is not None:
            audit = json.dumps(entry.audit, indent=2, allow_nan=False) + "\n"
            files[f"compliance_seed{entry.seed}.json"] = audit.encode()
    return files


def refuse(head: str, reasons: list[str], *rest: str) -> None:
    """Raises Refusal if there are reasons."""
    if reasons:
        raise Refusal("\n  ".join([head, *dict.fromkeys(reasons), *rest]))


def write_folder(material: Material, options: argparse.Namespace) -> tuple[Path, dict[str, Any], list[str]]:
    """Returns the folder, written whole and rejected in nothing by records/check.py, its submission.json, and what the
    checker doubts; Refusal otherwise."""
    refuse("these runs can be in no track:", material.refusals)
    if options.track == "record":
        refuse("this is no record:", material.no_record, "(--track non-record writes a folder that says so)")
    record = not material.no_record and options.track != "non-record"
    content = submission(material, options, record)
    track = "track_10min_16mb" if record else "track_non_record_16mb"
    folder = Path(options.out, track, f"{options.date}_{slug(options.name)}")
    if folder.exists():
        raise Refusal(f"{folder} exists already: choose another --name or --date, or move it away")
    temporary = folder.with_name("." + folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    part = temporary / folder.relative_to(options.out)  # the checker reads the track from the path
    part.mkdir(parents=True)
    try:
        doubts = write_checked(part, material, content)
        if doubts and not material.is_own:  # they go into the folder
            material.unverified += [f"records/check.py: {doubt}" for doubt in doubts]
            content["not_verified"] = material.unverified
            write_checked(part, material, content)
        part.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder, content, doubts if material.is_own else []


def write_checked(folder: Path, material: Material, content: dict[str, Any]) -> list[str]:
    """Writes the files and returns what records/check.py warns of; Refusal where it rejects them."""
    for name, data in folder_files(material, content).items():
        (folder / name).write_bytes(data)
    _, findings = checker.audit(folder)
    told: dict[str, list[str]] = {grade: [] for grade in ("reject", "warn", "note")}
    for finding in findings:
        told[finding.severity].append(f"{finding.rule} {finding.message} ({finding.file})")
    refuse("records/check.py rejects the folder:", told["reject"])
    return told["warn"]


def read_material(options: argparse.Namespace) -> Material:
    """Returns what the command line names: runs, or a script and logs."""
    scripts, logs = options.script or [], options.log or []
    if options.runs and (scripts or logs):
        raise Refusal("folders of runs and --script, --log do not go together: a submission is of one or the other")
    if options.runs:
        return of_runs(options.runs)
    if not scripts and not logs:
        raise Refusal("give the folders of runs, or another author's --script FILE and --log FILE …")
    if not scripts or not logs:
        raise Refusal(f"--{'script' if logs else 'log'} is missing: another author's runs need both")
    if len(scripts) > 1:
        raise Refusal(f"--script is there {len(scripts)} times: a submission has one")
    return of_logs(scripts[0], logs)


def main(arguments: list[str] | None = None) -> None:
    """Writes a folder and says where it is and what it can be; exits with status 1 and the reasons if it cannot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished, audited runs, one a seed")
    parser.add_argument("--script", type=Path, action="append", help="another author's script, as it is counted")
    help_of_log = "the logs of its runs, one a seed"
    parser.add_argument("--log", nargs="+", type=Path, action="extend", metavar="LOG", help=help_of_log)
    parser.add_argument("--name", required=True, help="of the submission")
    parser.add_argument("--github-id", required=True, help="the author's")
    parser.add_argument("--author", default="", help="default: the GitHub id")
    parser.add_argument("--blurb", default="", help="what is new, in a sentence or two")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="YYYY-MM-DD (default: today)")
    parser.add_argument("--against", nargs="+", metavar="FOLDER", help="what it is compared with: a folder, or runs")
    parser.add_argument("--track", choices=("auto", "record", "non-record"), default="auto")
    place = "where the tracks' folders are (%(default)s)"
    parser.add_argument("--out", type=Path, default=ROOT / "records", help=place)
    options = parser.parse_args(arguments)
    try:
        is_name = options.name.isprintable() and 0 < len(slug(options.name)) <= 100
        if not is_date(options.date) or not is_name:
            raise Refusal(f"--date {options.date} --name {options.name}: use YYYY-MM-DD and 1 to 100 letters or digits")
        folder, content, doubts = write_folder(read_material(options), options)
    except (ValueError, OSError) as error:  # Refusal, RunError, what significance.py cannot use, a full disk
        sys.exit(f"submit.py: error: {error}")
    size = show(content["bytes_total"], ",")
    print(
        f"{folder}: {content['val_bpb']:.6f} bpb, seeds {', '.join(map(str, content['seeds']))}, {size} bytes at most"
    )
    for label, key in (("no record", "why_no_record"), ("not verified", "not_verified")):
        for reason in content.get(key, []):
            print(f"  {label}: {reason}")
    for doubt in doubts:
        print(f"  check.py warns: {doubt}")


if __name__ == "__main__":
    main()
