"""Rules on bytes: 16,000,000 for the code as shipped and the model."""

from __future__ import annotations

from collections.abc import Iterator

from challenge import SIZE_LIMIT

from .folder import Folder
from .logs import Log, counted_code, model_bytes
from .rules import Finding, rule
from .submission import bytes_of, first

SIZE_MARGIN = 10_000  # bytes: the model's size moves by +-5 kB from run to run (#1978)


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


@rule("S1", "reject", "code as shipped + model <= 16,000,000 bytes, for every seed", "R1, #1835, #1809")
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


@rule("S2", "warn", "log, submission.json and the files on disk count the same bytes", "R1, #1835, #1530")
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


@rule("S3", "reject", "other local files that the script loads count as code", "R1, #1412")
@rule("P3", "warn", "the script needs no module that lies beside it", "#150, #448, #998")
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


@rule("S4", "warn", "a packed script can be unpacked", "#1804")
def check_unpacked(folder: Folder) -> Iterator[Finding]:
    """S4: what is packed can be looked into."""
    for script in folder.scripts:
        if script.problem:
            yield Finding("S4", "warn", f"could not be unpacked: {script.problem}", script.name)
        elif script.packed:
            message = f"packed ({script.packed}): {script.size:,} bytes hold {len(script.source.encode()):,} of source"
            yield Finding("S4", "note", message, script.name)
