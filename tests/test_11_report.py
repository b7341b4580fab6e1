"""The record of a run: final line, metrics.jsonl, submission.json, and what it says about the rules."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ONE_THREAD

import train_gpt as t

SCORE = t.Score(val_loss=2.0, val_bpb=1.2, num_targets=200, num_bytes=151_060_000, seconds=1.0)
FIGURES = {
    "bytes_model": 1000,
    "train_seconds": 10.0,
    "train_segments": 1,
    "eval_seconds": 2.0,
    "load_seconds": 3.0,
    "preflight_seconds": 4.0,
}


@pytest.fixture
def reported(make_run: Callable[..., t.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    """Reports a made-up score of a run with the given settings; returns submission.json, the log and the metrics."""
    monkeypatch.chdir(tmp_path)

    def report(figures: dict | None = None, score: t.Score = SCORE, **settings: object) -> dict:
        run = make_run(**settings)
        run.rt.open_log(Path(f"logs/run-{len(list(tmp_path.glob('logs/*')))}"))
        t.write_code(run)
        t.banner(run)
        known = {name: value for name, value in {**FIGURES, **(figures or {})}.items() if value is not None}
        t.report(run, score, known)
        folder = run.rt.run_dir
        return {
            **json.loads((folder / "submission.json").read_text()),
            "log": (folder / "train.log").read_text(),
            "metrics": [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
            "script": (folder / "train_gpt.py").read_bytes(),
        }

    return report


FINAL = re.compile(
    r"^final_exact val_loss:2\.00000000 val_bpb:1\.20000000 kind:(\w+) targets:200 bytes:151060000 "
    r"eval_time:2000ms total_bytes:(\d+) compliant:([01])$",
    re.MULTILINE,
)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, "ttt_score_first"),
        ({"ttt_mode": "pre"}, "ttt_pre"),
        ({"ttt_enabled": False}, "sliding"),
        ({"ttt_enabled": False, "eval_stride": 0}, "plain"),
    ],
)
def test_the_final_line_has_one_form_for_every_kind_of_score(reported: Callable, settings: dict, kind: str) -> None:
    lines = FINAL.findall(reported(**settings)["log"])
    assert [line[0] for line in lines] == [kind]
    assert int(lines[0][1]) == 1000 + t.CODE.stat().st_size


@pytest.mark.parametrize(
    ("settings", "figures", "rule", "reason"),
    [
        ({"ttt_mode": "pre"}, {}, "order", "before they are scored"),
        ({}, {"train_seconds": None}, "train", "this run did not train"),
        ({}, {"bytes_model": 16_000_000}, "size", "over 16,000,000 bytes"),
        ({}, {"train_seconds": 600.1}, "train", "training and calibration took over 600 s"),
        ({}, {"train_segments": 2}, "train", "it trained in 2 segments, and a record does in one"),
        ({}, {"eval_seconds": 600.1}, "eval", "scoring took over 600 s"),
    ],
)
def test_each_broken_rule_is_named_and_makes_the_run_not_compliant(
    reported: Callable, settings: dict, figures: dict, rule: str, reason: str
) -> None:
    result = reported(figures, **settings)
    assert result["compliant"] is False
    assert result["rule_breaks"].keys() == {rule} and reason in result["rule_breaks"][rule]
    assert reason in result["log"] and "compliant:0" in result["log"]


@pytest.mark.parametrize("num_bytes", [167_632, 151_019_999, 151_100_001, 157_300_000])
def test_another_text_than_the_challenges_is_not_compliant(reported: Callable, num_bytes: int) -> None:
    # All merged logs imply 151.024 to 151.081 million bytes; miscounted ones 157.3, 164.6 and 176.3 million.
    result = reported(score=SCORE._replace(num_bytes=num_bytes))
    assert result["rule_breaks"] == {"data": f"{num_bytes} bytes are not the challenge's validation set"}


def test_a_run_within_the_rules_is_compliant_and_its_record_complete(reported: Callable) -> None:
    result = reported()
    assert result["compliant"] is True and result["rule_breaks"] == {}
    assert result["eval_seconds_strict"] == 2.0 + 3.0 + 4.0  # with reading the file and the preflight's compilation
    assert result["bytes_total"] == result["bytes_model"] + result["bytes_code"] == 1000 + len(t.CODE.read_bytes())
    assert (result["val_loss"], result["val_bpb"], result["seed"]) == (2.0, 1.2, 1337)
    assert result["settings"].keys() == t.Hyperparameters.knobs().keys()
    assert result["code_sha256"] == hashlib.sha256(t.CODE.read_bytes()).hexdigest()
    assert result["script"] == t.CODE.read_bytes()
    assert [event["event"] for event in result["metrics"]] == ["config", "final"]
    final = result["metrics"][-1]
    assert all(final[key] == result[key] for key in ("val_loss", "val_bpb", "kind", "bytes_total", "compliant"))


def test_the_banner_accounts_for_every_parameter(reported: Callable) -> None:
    log = reported()["log"]
    counts = [int(n.replace(",", "")) for n in re.findall(r"^parameters: \w+ +([\d,]+) in ", log, re.MULTILINE)]
    total = int(re.search(r"^parameters: ([\d,]+) in all", log, re.MULTILINE)[1].replace(",", ""))
    assert len(counts) == len(t.PARAM_GROUPS) and sum(counts) == total > 0
    for expected in (
        "device:cpu",
        "compile:0",
        "validation: random",
        "training: 1 shards, 5,000 tokens",
        "plan: ",
    ):
        assert expected in log


# ---- what reviewers run ----


def smoke(cwd: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {"SMOKE": "1", **ONE_THREAD, **settings}  # and nothing else: no PATH, no home
    command = [sys.executable, str(t.CODE)]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)


def test_smoke_prints_the_one_line_that_reviewers_look_for_and_leaves_nothing(tmp_path: Path) -> None:
    done = smoke(tmp_path)
    sizes = rf"dim=512, layers=11, vocab=1024, code={t.CODE.stat().st_size} B"
    assert re.fullmatch(rf"import OK in \d+\.\d\ds, {sizes}, SMOKE_TEST_PASS\n", done.stdout), done.stdout + done.stderr
    assert done.returncode == 0 and list(tmp_path.iterdir()) == []


def test_smoke_fails_where_the_untrained_model_does_not_guess_uniformly(tmp_path: Path) -> None:
    done = smoke(tmp_path, TIED_EMBED_INIT_STD="10", NUM_LAYERS="2")
    assert done.returncode != 0 and "PASS" not in done.stdout and "the guesses are not uniform" in done.stderr
