"""The commands that the tools in data/ print, taken from what they print and run in a real shell. The checkout's path
has a space and an umlaut, and so have the folders of the data."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import demo
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import test_data_download
import zstandard
from conftest import ROOT, SMALL, shell
from test_data_build import TEXTS, write_jsonl, zstd_of_window
from test_data_download import NAME, REPO, TRAIN, VAL, Hub, environment, export_of, pack

pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="bash is missing")
NEW = "Neue Wörter"  # a folder as users have it


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the commands name."""
    folder = tmp_path / "Meine Wörter"
    (folder / "data").mkdir(parents=True)
    shutil.copy(ROOT / "train_gpt.py", folder)
    for path in (*ROOT.glob("data/*.py"), ROOT / "data/requirements.txt"):
        shutil.copy(path, folder / "data")
    return folder


@pytest.fixture
def hub(corpus: SimpleNamespace) -> Iterator[Hub]:
    hub = Hub(**vars(export_of(corpus)))
    yield hub
    hub.close()


@pytest.fixture
def sh(checkout: Path, tmp_path: Path, hub: Hub) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a line in a shell in the checkout, with this Python first; the Hub is the server on this machine."""
    short = SMALL | {"ITERATIONS": 1, "TTT_ENABLED": 0, "MAX_VAL_TOKENS": 256}
    settings = shell(SimpleNamespace(data_path="", tokenizer_path=""), **short)
    del settings["DATA_PATH"], settings["TOKENIZER_PATH"]
    settings |= environment(hub, tmp_path / "home")
    settings["PATH"] = f"{tmp_path / 'stubs'}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def run(line: str, status: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-o", "pipefail", "-c", line]
        done = subprocess.run(command, cwd=checkout, env=settings | more, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, (line, done.stdout[-2000:], done.stderr[-2000:])
        return done

    return run


def stub(tmp_path: Path, name: str, script: str) -> None:
    path = tmp_path / "stubs" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


@pytest.mark.slow
def test_what_download_prints_trains_on_what_it_fetched(sh: Callable, tmp_path: Path) -> None:
    """With eight processes in the command, which are one here: a stub says what torchrun is given."""
    stub(tmp_path, "torchrun", 'printf "%s\\n" "$@" > ../torchrun.txt\nexec python "${@: -1}"')
    for number, root in enumerate(("", f" --root '{NEW}'")):
        out = sh(f"python data/download.py --repo {REPO} --train-shards 4{root}").stdout
        (line,) = re.findall("^train with: (.*)", out, re.M)
        ran = sh(line, RUN_ID=f"r{number}")
        assert "final_exact" in ran.stdout
        words = (tmp_path / "torchrun.txt").read_text().split()
        assert words == ["--standalone", "--nproc_per_node=8", "train_gpt.py"]


def test_what_download_prints_where_there_is_no_network_brings_the_files(
    sh: Callable, checkout: Path, hub: Hub
) -> None:
    hub.files |= {"docs_selected.jsonl": b'{"text": "x"}\n', "docs_selected.source_manifest.json": b"{}"}
    options = f"--repo {REPO} --train-shards 3 --with-docs --root '{NEW}'"
    error = sh(f"python data/download.py {options}", status=1, HF_ENDPOINT="http://127.0.0.1:9").stderr
    (line,) = re.findall("run `(python data/download.py .*)`, and copy", error)
    assert "missing or unproven of sp1024, 7 files" in error and error.endswith(f"to {NEW}\n")
    sh(line.replace("FOLDER", "'auf dem Stück'"))  # "where there is a network"
    shutil.copytree(checkout / "auf dem Stück", checkout / NEW, dirs_exist_ok=True)
    out = sh(f"python data/download.py {options}", HF_ENDPOINT="http://127.0.0.1:9").stdout
    assert "all is there" in out and "train  3 of 3" in out
    # Also where the export is in another place of the repository.
    error = sh(f"python data/download.py --remote-root '' {options}1", 1, HF_ENDPOINT="http://127.0.0.1:9").stderr
    assert "--remote-root '' --revision main" in error


@pytest.mark.skipif(not shutil.which("zstd"), reason="zstd is missing")
@pytest.mark.parametrize("given", ["'{}'", '"$PWD/{}"', "- < '{}'"])
def test_what_build_prints_for_large_windows_unpacks_them(given: str, sh: Callable, checkout: Path) -> None:
    lines = write_jsonl(checkout / "a.jsonl", TEXTS).read_bytes()
    path = checkout / f"{NEW}.jsonl.zst"
    path.write_bytes(zstd_of_window(lines, 30))
    options = f"--name x --vocab bytes --dedup none --root '{NEW}'"
    error = sh(f"python data/build.py {given.format(path.name)} {options}", status=1).stderr
    (line,) = re.findall(": (zstd -dc .* …)", error)
    if "<" in given:
        line = f"cat '{path.name}' | {line}"  # what came from standard input still does
    sh(line.replace("…", options))
    sh("python data/build.py a.jsonl --name y --vocab bytes --dedup none")
    for split in ("train", "val"):
        found = checkout / NEW / f"datasets/x_byte260/x_{split}_000000.bin"
        expected = checkout / f"data/datasets/y_byte260/y_{split}_000000.bin"
        assert found.read_bytes() == expected.read_bytes()
    assert not list(checkout.rglob("*stdin*"))


@pytest.mark.parametrize(
    ("absent", "command"),
    [
        ("huggingface_hub", "python data/download.py --list"),
        ("socksio", "ALL_PROXY=socks5://127.0.0.1:9 NO_PROXY= python data/download.py --list"),
        ("rensa", "python data/build.py a.jsonl --name x --vocab bytes"),
        ("pyarrow", "python data/build.py a.parquet --name x --vocab bytes"),
        ("", "python data/download.py --list"),  # too old
    ],
)
def test_what_is_printed_for_a_missing_package_installs_it(
    absent: str, command: str, sh: Callable, checkout: Path, tmp_path: Path
) -> None:
    """Nothing is installed and nobody is asked: pip finds what is named here, or a package of that name in a folder."""
    if not importlib.util.find_spec("pip"):
        pytest.skip("pip is missing")
    write_jsonl(checkout / "a.jsonl", TEXTS)
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), checkout / "a.parquet")
    code = f"import sys; sys.modules['{absent}'] = None"
    if not absent:
        code = "import huggingface_hub as h; h.__version__ = '0.9'"
    (tmp_path / "sitecustomize.py").write_text(code)
    error = sh(command, status=1, PYTHONPATH=str(tmp_path)).stderr
    line = re.findall(r"pip install [^,`\n]*", error)[-1]  # httpx names one of its own before
    with zipfile.ZipFile(tmp_path / "socksio-1.0.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("socksio-1.0.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: socksio\nVersion: 1.0.0\n")
        wheel.writestr("socksio-1.0.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("socksio-1.0.0.dist-info/RECORD", "")
    out = sh(line, PIP_NO_INDEX="1", PIP_DRY_RUN="1", PIP_FIND_LINKS=str(tmp_path)).stdout
    assert re.search("Requirement already satisfied|Would install socksio-1.0.0", out), out


# ---- what --help prints ----------------------------------------------------------------------------------------------


def commands_of(text: str) -> list[str]:
    """Returns the commands in a help text: its indented lines, without comments, and what stands in backticks."""
    text = text.replace("\\\n", " ")
    lines = re.findall(r"^    ((?:python data/|zstdcat ).*)", text, re.M)
    return [line.split("  #")[0].strip() for line in lines] + re.findall(r"`(\w+=\S+ python [^`]*)`", text)


@pytest.mark.slow
def test_every_command_that_help_prints_works_as_it_stands(
    sh: Callable, checkout: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in one folder, one after the other, as a user tries them."""
    texts = sorted(demo.collect_documents(Path(os.__file__).parent))
    write_jsonl(checkout / "documents.jsonl", texts)
    (checkout / "docs.zst").write_bytes(zstandard.compress((checkout / "documents.jsonl").read_bytes()))
    (checkout / "corpus").mkdir()
    for number, text in enumerate(texts[:150]):
        (checkout / f"corpus/{number}.txt").write_text(text)
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), checkout / "more.parquet")
    monkeypatch.setattr(test_data_download, "REPO", "willdepueoai/parameter-golf")
    tokens = np.concatenate([np.frombuffer(hub.files[path], "<u2", offset=1024) for path in TRAIN])
    for number, part in enumerate(np.split(tokens, 80)):
        hub.files[f"datasets/{NAME}/fineweb_train_{number:06d}.bin"] = pack(part)
    val = np.frombuffer(hub.files[VAL], "<u2", offset=1024)
    hub.files[VAL] = pack(val[np.argmax(val == 1) :])  # which begins with a document
    hub.manifest["datasets"][0]["stats"] = {}
    few = [{"text": f"{number} of fifty thousand documents"} for number in range(50_000)]
    lines = [json.dumps(line) + "\n" for line in [*few, *({"text": text} for text in texts)]]
    losses = [{"event": "train", "step": step, "train_loss": loss} for step, loss in enumerate((6.9, 3.0))]
    final = {"event": "final", "val_loss": 3.0, "val_bpb": 2.0}  # of a demonstration that went well
    (checkout / "logs/demo").mkdir(parents=True)
    (checkout / "logs/demo/metrics.jsonl").write_text("\n".join(map(json.dumps, [*losses, final])))
    count = 0
    for tool in ("download", "build", "verify", "demo"):
        commands = commands_of(sh(f"python data/{tool}.py --help").stdout)
        (checkout / "data/docs_selected.jsonl").write_text("".join(lines))
        for command in commands:
            if tool == "verify":  # placeholders
                command = command.replace(" folder ", f" '{NEW}' ").replace(" file ", f" '{NEW}/tokenizer.model' ")
                shutil.copytree(checkout / "data/datasets/mine_sp4096", checkout / NEW, dirs_exist_ok=True)
            sh(command)
            count += 1
    assert count == 3 + 5 + 4 + 2
    built = {path.name for path in (checkout / "data/datasets").iterdir() if path.is_dir()}
    assert built == {NAME, "mine_sp4096", "mine_byte260", "mine_sp1024", "fineweb10B_sp8192", "demo_sp1024"}
