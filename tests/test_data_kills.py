"""Kill -9 for data/download.py and data/build.py, in each of their phases: what comes out is what would have come out,
nothing unfinished has a final name, and nothing is left over. And the same for huggingface_hub's own download, which is
why data/download.py has one."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import shards
import test_data_download
from conftest import ROOT
from test_data_build import make_texts, write_jsonl
from test_data_download import COMMIT, MODEL, REPO, TRAIN, VAL, VOCAB, Answer, Hub, environment, pack

# Python runs this before the tool. It writes down which phase begins, and makes the moments long around all that
# changes the disk, so that kills hit them. Build's journal is written after every batch.
WATCH = """
import os, sys, threading, time
if sys.orig_argv[1:] and sys.orig_argv[1].endswith(("data/download.py", "data/build.py")):
    trace = open(os.environ["TRACE"], "w", buffering=1)
    phases, slow = set(os.environ["PHASES"].split()), {os.replace, os.fsync, os.unlink, os.rmdir}
    def watch(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_name in phases and os.path.dirname(code.co_filename).endswith("/data"):
            trace.write(code.co_name + "\\n")
            if "JOURNAL_SECONDS" in frame.f_globals:
                frame.f_globals["JOURNAL_SECONDS"] = 0.0
            time.sleep(0.02)
        elif event in ("c_call", "c_return") and argument in slow:
            time.sleep(0.02)
    sys.setprofile(watch)
    threading.setprofile(watch)
"""
# Functions that a phase begins with, and seconds after that in which the kill comes. "": from the process's start.
DOWNLOAD_PHASES = {
    "": 0.5,
    "read_export": 0.2,
    "find_all": 0.2,
    "fetch_rest": 0.8,
    "place": 0.2,
    "write_manifest": 0.15,
    "clean": 0.15,
}
BUILD_PHASES = {
    "": 0.5,
    "recipe": 0.1,
    "scan": 1.0,
    "select": 1.0,
    "train_tokenizer_apart": 0.6,
    "encode": 1.0,
    "save": 0.3,
    "finish": 0.3,
    "write_manifest": 0.15,
}


class Tool(NamedTuple):
    """A command line and its environment."""

    command: list[str]
    environment: dict[str, str]

    def start(self, folder: Path) -> subprocess.Popen[bytes]:
        """Starts it in a process group of its own."""
        with (folder / "output.txt").open("wb") as output:
            return subprocess.Popen(
                self.command, env=self.environment, cwd=folder, stdout=output, stderr=output, start_new_session=True
            )


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def files_below(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def kill_again_and_again(
    make: Callable[[Path], Tool], root: Path, phases: dict[str, float], count: int, check: Callable[[Path, bool], None]
) -> int:
    """Starts a tool until so many of its processes were killed, in each phase in turn, and it has got through. Checks
    the folder after each kill, and what is complete; then another begins. Returns how many are complete."""
    draw, kills, complete, seen = random.Random(20), 0, 0, Counter()
    rounds = count // len(phases) + 1
    order = [phase for _ in range(rounds) for phase in draw.sample(list(phases), len(phases))]
    trace = root / "trace.txt"
    folder = root / "0"
    folder.mkdir()
    while kills < count or complete == 0 or len(list(folder.iterdir())):
        phase = order[kills] if kills < count else None
        trace.unlink(missing_ok=True)
        tool = make(folder)
        tool.environment.update(PYTHONPATH=str(root), TRACE=str(trace), PHASES=" ".join(phases))
        process = tool.start(root)
        try:
            deadline = time.monotonic() + 120
            while process.poll() is None and phase not in ("", *entered(trace)):
                assert time.monotonic() < deadline, (phase, entered(trace))
                time.sleep(0.003)
            if process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(draw.uniform(0, phases[phase]))
        finally:
            was_killed = process.poll() is None
            kill(process)
        if was_killed:
            kills += 1
            seen.update(entered(trace)[-1:] or ["the start"])
            check(folder, False)
            continue
        assert process.returncode == 0, (root / "output.txt").read_text()
        check(folder, True)
        complete += 1
        folder = root / str(complete)
        folder.mkdir()
    print(f"{kills} kills, {complete} complete and equal; killed after the begin of {dict(seen)}")
    assert count < len(phases) or len(seen) > len(phases) // 2, "most phases were not hit"
    return complete


def entered(trace: Path) -> list[str]:
    """Returns the phases that a process has begun, in order."""
    with contextlib.suppress(FileNotFoundError):
        return trace.read_text().split()
    return []


@pytest.fixture
def watched(tmp_path: Path) -> Path:
    """A folder in which Python finds what watches the tools."""
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    return tmp_path


HOW_OFTEN = pytest.mark.parametrize(
    "count", [pytest.param(4, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.faults)]
)


# ---- download.py -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(corpus: SimpleNamespace) -> Iterator[Hub]:
    """A server with an export of 72 MB, three shards of 24 MB. Sizes matter: huggingface_hub takes 10 MB at a time."""
    draw = np.random.default_rng(0)
    files = {path: pack(draw.integers(4, 1024, 12_000_000)) for path in (*TRAIN[:2], VAL)}
    files |= {MODEL: corpus.tokenizer_path.read_bytes(), VOCAB: b"piece\t0\n"}
    dataset = {"name": test_data_download.NAME, "tokenizer_name": "sp", "vocab_size": 1024, "stats": {}}
    tokenizer = {"name": "sp", "model_path": MODEL, "vocab_path": VOCAB}
    hub = Hub(files, {"version": "1", "docs_meta": {}, "tokenizers": [tokenizer], "datasets": [dataset]})
    hub.pace = 20e6
    yield hub
    hub.close()


def download(hub: Hub, root: Path) -> Tool:
    options = ["--repo", REPO, "--root", str(root), "--train-shards", "2", "--jobs", "2"]
    return Tool([sys.executable, str(ROOT / "data/download.py"), *options], environment(hub, root.parent / "home"))


@HOW_OFTEN
def test_kills_of_a_download_cost_no_byte_of_the_result(hub: Hub, watched: Path, count: int) -> None:
    """Each kill may cost what is on its way: two connections, and at most what their buffers hold."""
    total = sum(map(len, hub.files.values()))
    (watched / "undisturbed").mkdir()
    process = download(hub, watched / "undisturbed").start(watched)
    assert process.wait(120) == 0 and hub.num_sent == total, (watched / "output.txt").read_text()
    expected = files_below(watched / "undisturbed")
    assert {path: expected[path] for path in hub.files} == hub.files

    def check(root: Path, is_complete: bool) -> None:
        found = files_below(root)
        if is_complete:
            assert found.keys() == expected.keys(), "missing, or left over"
        for path in expected.keys() & found.keys():
            assert found[path] == expected[path], f"{path} is not whole"

    hub.num_sent = 0
    complete = kill_again_and_again(lambda root: download(hub, root), watched, DOWNLOAD_PHASES, count, check)
    twice = hub.num_sent - complete * total
    print(f"{twice / 1e6:.1f} MB of {complete * total / 1e6:.0f} came twice, {twice / count / 1e3:.0f} kB a kill")
    assert 0 <= twice <= count * 4e6


# Programs that fetch the files named after a folder, one attempt each, as users would write them.
THEIRS = {
    "hf_hub_download": """
for path in paths:
    huggingface_hub.hf_hub_download(repo, path, repo_type="dataset", revision=commit, local_dir=root)
""",
    "snapshot_download": """
kind = {"repo_type": "dataset", "revision": commit, "allow_patterns": paths, "max_workers": 2}
huggingface_hub.snapshot_download(repo, local_dir=root, **kind)
""",
    "its http_get, with resume_size": """
from huggingface_hub.file_download import http_get
for path in paths:
    final, url = root / path, huggingface_hub.hf_hub_url(repo, path, repo_type="dataset", revision=commit)
    final.parent.mkdir(parents=True, exist_ok=True)
    if not final.exists():
        with final.with_suffix(".part").open("ab", buffering=0) as part:
            http_get(url, part, resume_size=part.tell())
        os.replace(part.name, final)
""",
}
HEAD = "import os, sys, huggingface_hub; from pathlib import Path; root = Path(sys.argv[3]);"
HEAD += "repo, commit, paths = *sys.argv[1:3], sys.argv[4:]\n"


@pytest.mark.faults
def test_huggingface_hubs_own_download_begins_again_and_does_not_check(hub: Hub, tmp_path: Path) -> None:
    """Measured, not believed: the same server, files and moments for all. Where huggingface_hub comes out as well as
    data/download.py, the code there that fetches can go."""
    total, rows = sum(map(len, hub.files.values())), {}
    remote = [f"datasets/{path}" for path in hub.files]
    for tool in ("data/download.py", *THEIRS):

        def make(root: Path, tool: str = tool) -> Tool:
            if tool not in THEIRS:
                return download(hub, root)
            program = [sys.executable, "-c", HEAD + THEIRS[tool], REPO, COMMIT, str(root), *remote]
            return Tool(program, environment(hub, root.parent / "home"))

        folder = tmp_path / tool.split(",")[0].replace("/", "-")
        folder.mkdir()
        rows[tool] = measure(hub, folder, make, total)
    names = ("MB twice a kill", "MB left over", "changed on disk", "and its time kept", "wrong bytes sent")
    shards.print_table([("20 kills", *names), *((tool, *map(str, row.values())) for tool, row in rows.items())])
    ours = rows.pop("data/download.py")
    assert ours["twice"] < 4 and ours["left"] == 0 and list(ours.values())[2:] == ["mended"] * 3
    for tool, row in rows.items():
        assert row["twice"] >= 4 or list(row.values())[2:] != ["mended"] * 3, f"{tool} does it all: use it"


def measure(hub: Hub, folder: Path, make: Callable[[Path], Tool], total: int) -> dict[str, object]:
    """Returns the MB that came twice for each of 20 kills, the MB left over, and what another call makes of a file that
    was changed on disk, its size kept and perhaps its time, and a first call of one of which wrong bytes are sent."""
    draw, kills, complete, hub.num_sent = random.Random(7), 0, 0, 0
    root = folder / "0"
    while kills < 20 or not complete or root.exists():
        root.mkdir(exist_ok=True)
        process, limit = make(root).start(folder), hub.num_sent + draw.uniform(0, 0.8) * total
        while process.poll() is None and (hub.num_sent < limit or kills == 20):
            time.sleep(0.002)
        was_killed = process.poll() is None
        kill(process)
        kills += was_killed
        if not was_killed:
            assert process.returncode == 0, (folder / "output.txt").read_text()
            complete += 1
            root = folder / str(complete)
    twice = (hub.num_sent - complete * total) / kills / 1e6
    left = (sum(map(len, files_below(folder / "0").values())) - total) / 1e6

    def outcome(root: Path) -> str:
        process = make(root).start(folder)
        process.wait(120)
        (path,) = root.rglob(Path(VAL).name)
        return "mended" if path.read_bytes() == hub.files[VAL] else f"wrong, status {process.returncode}"

    (path,) = (folder / "0").rglob(Path(VAL).name)
    damaged = bytearray(hub.files[VAL])
    damaged[5000] ^= 1
    path.write_bytes(damaged)
    changed = outcome(folder / "0")
    before = path.stat()
    path.write_bytes(damaged)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    rotten = outcome(folder / "0")
    hub.answers[VAL] = [Answer(body=bytes(damaged))]
    (folder / "new").mkdir()
    corrupted = outcome(folder / "new")
    wrong = {"changed": changed, "rotten": rotten, "corrupted": corrupted}
    return {"twice": round(twice, 1), "left": max(0.0, round(left, 1)), **wrong}


# ---- build.py --------------------------------------------------------------------------------------------------------


@HOW_OFTEN
def test_kills_of_a_build_cost_no_byte_of_the_result(watched: Path, count: int) -> None:
    path = write_jsonl(watched / "a.jsonl", make_texts(9_000))  # 3 MB: four batches

    def build(root: Path) -> Tool:
        options = ["--name", "x", "--vocab", "600", "--jobs", "2", "--shard-tokens", "50000", "--root", str(root)]
        return Tool([sys.executable, str(ROOT / "data/build.py"), str(path), *options], dict(os.environ))

    (watched / "undisturbed").mkdir()
    process = build(watched / "undisturbed").start(watched)
    assert process.wait(120) == 0, (watched / "output.txt").read_text()
    expected = files_below(watched / "undisturbed")
    assert len([name for name in expected if name.endswith(".bin")]) > 5

    def check(root: Path, is_complete: bool) -> None:
        if is_complete or (root / "datasets/x_sp600").exists():
            assert files_below(root) == expected

    assert kill_again_and_again(build, watched, BUILD_PHASES, count, check) >= 1
