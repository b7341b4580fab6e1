"""Rules on the files of a folder, their names, and the keys of submission.json."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .folder import Folder
from .rules import Finding, rule
from .submission import bpb_of, number, walk


@rule("F1", "reject", "README.md, submission.json, a log and a script are there and can be read", "R9, #505, #561")
def check_files(folder: Folder) -> Iterator[Finding]:
    """F1: the four files that R9 demands. Merged non-record folders lack logs or scripts: there it is a warning."""
    missing = {
        "no README.md: R9 demands one that explains the submission": not folder.readme[0],
        "no submission.json: R9 demands one with name, GitHub ID, val_bpb": not folder.json_name,
        "no train log with a score or a training time: R9 demands one that the script wrote": not folder.logs,
        "no train_gpt.py: R9 demands the script that was run": not folder.scripts,
    }
    yield from (Finding("F1", folder.grade("reject"), message) for message, absent in missing.items() if absent)
    if "metrics.jsonl" in folder.files and not folder.readme[0]:
        message = "this is the folder of a run: `python records/submit.py` makes a submission of audited runs"
        yield Finding("F1", "note", message, "metrics.jsonl")


@rule("F2", "warn", "names and layout are those that tools and reviewers expect", "R9, #1143")
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


@rule("F3", "warn", "submission.json has the keys of merged records", "R9")
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


@rule("A1", "reject", "our own audit of the trained model was passed, our own log reports no break", "R2, R6, R14")
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
