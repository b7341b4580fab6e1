"""What the records after the four found, as files of settings: each line has its evidence, it fits, and it runs."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import train_gpt as t

pytest.importorskip("scipy", reason="records/fidelity.py needs scipy: pip install -r records/requirements.txt")
from systems import fidelity, load, read_run, run_at_toy_scale  # noqa: E402

FILES = ("beyond_sp1024", "beyond_sp8192")
CODE_BYTES = 120_000  # of the packed script, at most
pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="a shell reads the files of settings, bash is missing")


@pytest.mark.parametrize("name", FILES)
def test_each_line_differs_from_the_defaults_and_has_the_grade_of_its_evidence(name: str) -> None:
    knobs = t.Hyperparameters.knobs()
    for line in (ROOT / "records" / "env" / f"{name}.env").read_text().splitlines():
        setting, _, evidence = line.partition(" # ")
        if line.startswith("#") or not line:
            continue
        variable, value = setting.split("=")
        assert knobs[variable.lower()].parse(variable, value) != knobs[variable.lower()].default, line
        is_of_data = variable in ("DATA_PATH", "VOCAB_SIZE")
        assert is_of_data or re.match(r"[ABC], #\d+|.*measured here", evidence), line


def numbers(text: str) -> set[int]:
    return {int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\d", text)}


@pytest.mark.parametrize(("name", "bits_each"), [("beyond_sp1024", 4.18), ("beyond_sp8192", 3.50)])
def test_it_fits_by_the_arithmetic_in_the_file(name: str, bits_each: float) -> None:
    h = load(name)
    with torch.device("meta"):
        parameters = dict(t.GPT(h).named_parameters())
    quantized = [p for n, p in parameters.items() if t.stored_bits(h, n) < 16]
    num_codes = sum(p.numel() for p in quantized)
    num_rows = sum(len(p) for p in quantized)
    num_fp16 = sum(p.numel() for p in parameters.values()) - num_codes
    left = t.SIZE_LIMIT_BYTES - CODE_BYTES - 2 * num_fp16 - 2 * num_rows
    stated = numbers((ROOT / "records" / "env" / f"{name}.env").read_text())
    assert {num_codes, num_rows, num_fp16, 2 * num_fp16, 2 * num_rows, left, CODE_BYTES} <= stated
    assert len(t.pack(t.CODE.read_bytes())) < CODE_BYTES
    assert 8 * left / num_codes == pytest.approx(bits_each, abs=0.006)
    # Entropy of a normal variable of deviation 1 in steps of s: log2(sqrt(2 pi e) / s) = 2.05 - log2(s).
    step = 2 ** (0.5 * math.log2(2 * math.pi * math.e) - bits_each)
    assert f"{step:.2f}" in (ROOT / "records" / "env" / f"{name}.env").read_text()
    assert step < 0.41, "in the mean over all codes, no coarser than #1394's matrices, 12.85 / 31 of a deviation"


def check_run(name: str, folder: Path, data: Path, **own: str) -> t.GPT:
    """Runs a file at toy scale, with its audit, checks that every mechanism is on, and returns the stored model."""
    run_at_toy_scale(name, folder, data, AUDIT="1", **own)
    run = read_run(folder / "logs" / name)
    audit = json.loads((run.folder / "compliance.json").read_text())
    settings = run.result["settings"]
    sizes = {*fidelity.settings_of("toy"), "DATA_PATH", "VOCAB_SIZE"}
    for variable, text in fidelity.settings_of(name).items():
        if variable not in sizes:
            knob = t.Hyperparameters.knobs()[variable.lower()]
            assert settings[variable.lower()] == knob.parse(variable, text), variable
    assert settings["recur_layers"] == "2,3" and settings["parallel_last_n"] == 2
    assert "recurrence: blocks 2,3 run twice from step 16 on" in run.log
    losses = [float(loss) for loss in re.findall(r"train_loss:([\d.]+)", run.log)]
    vocab_size = settings["vocab_size"]
    assert losses[0] == pytest.approx(math.log(vocab_size), abs=0.2) and losses[-1] < losses[0] - 0.5
    assert audit["passed"] and run.result["rule_breaks"].keys() == {"data"}  # the text is another one
    h, model = t.load_artifact(run.folder / "final_model.bin")
    assert model.block_order == [0, 1, 2, 3, 2, 3, 4, 5] and h.attn_gate_dims == 12 and h.parallel_last_n == 2
    assert h.vocab_size == vocab_size == int(own.get("VOCAB_SIZE", 1024))
    return model


@pytest.mark.slow
def test_with_1024_pieces_it_runs_and_is_legal(corpus: SimpleNamespace, tmp_path: Path) -> None:
    check_run("beyond_sp1024", tmp_path, corpus.folder)


@pytest.mark.slow
def test_with_8192_pieces_it_runs_and_is_legal(tmp_path: Path) -> None:
    data = tmp_path / "demo"
    command = [sys.executable, str(ROOT / "data" / "demo.py"), "build", "--vocab-size", "8192", "--output", str(data)]
    subprocess.run(command, check=True, capture_output=True)
    (tmp_path / "run").mkdir()
    own = {"DATA_PATH": "./data/datasets/demo_sp8192", "VOCAB_SIZE": "8192"}
    model = check_run("beyond_sp8192", tmp_path / "run", data, **own)
    assert model.bigram is None and model.ve_shared is None
