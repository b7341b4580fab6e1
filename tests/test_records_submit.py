"""Packaging: what comes out of real runs is complete, counted rightly and runs; what breaks a rule stays inside."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import json
import lzma
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import AUDITED, ROOT, shell
from test_records_check import BPB, MODEL, SCRIPT, SEEDS, log_text

import train_gpt as t

sys.path.insert(0, str(ROOT / "records"))
submit = pytest.importorskip(
    "submit", reason="the tools' packages are missing: pip install -r records/requirements.txt"
)
import material  # noqa: E402
from checker import audit as check_folder  # noqa: E402
from checker.portability import syntax_error  # noqa: E402

SOURCE = (ROOT / "train_gpt.py").read_bytes()
PACKED = t.pack(SOURCE)
H100 = "device:cuda (NVIDIA H100 80GB HBM3) processes:8 dtype:bfloat16 compile:1 attention:fa3 (found) torch:2.13.0"


@pytest.fixture
def make(audited: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a run like the real one, of another seed and score; `change` edits its result and its compliance. On
    `h100` its figures are those of a run on the challenge's hardware and text."""

    def run(seed: int, change: Callable | None = None, h100: bool = False, script: bytes = PACKED) -> Path:
        folder = tmp_path / f"logs/s{seed}"
        shutil.copytree(audited, folder)
        result, compliance = (json.loads((folder / f"{n}.json").read_text()) for n in ("submission", "compliance"))
        result["seed"] = result["settings"]["seed"] = compliance["seed"] = compliance["settings"]["seed"] = seed
        log = (folder / "train.log").read_text()
        if h100:
            # 151,060,000 bytes in 62,021,632 targets, as the challenge's text has them.
            loss = 1.9 + seed / 1000
            bpb = loss * 62_021_632 / 0.6931471805599453 / 151_060_000
            result |= {"val_loss": loss, "val_bpb": bpb, "num_targets": 62_021_632, "num_bytes": 151_060_000}
            result |= {"machine": H100, "rule_breaks": {}, "compliant": True}
            final = f"final_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f} kind:{result['kind']} targets:62021632 "
            final += f"bytes:151060000 eval_time:2000ms total_bytes:{result['bytes_total']} compliant:1"
            log = re.sub(r"^validation: .*$", "validation: 1 shards, 62,021,632 targets", log, flags=re.M)
            log = re.sub(r"^device:.*$", H100, re.sub(r"^final_exact.*$", final, log, flags=re.M), flags=re.M)
        if change:
            change(result, compliance)
        if result["bytes_model"] == 15_990_000:
            (folder / "final_model.bin").write_bytes(bytes(15_990_000))
            digest = hashlib.sha256(bytes(15_990_000)).hexdigest()
            result["artifact_sha256"] = compliance["artifact_sha256"] = digest
        for content in (result, compliance):
            content["code_sha256"] = hashlib.sha256(script).hexdigest()
        (folder / "train_gpt.py").write_bytes(script)
        (folder / "train.log").write_text(log)
        events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        events = [event for event in events if event["event"] != "final"] + [
            {"event": "final", "time": 1.8e9, **result}
        ]
        lines = [json.dumps(event) + "\n" for event in events]
        (folder / "metrics.jsonl").write_text("".join([*lines, "\n"]))  # a blank line is no event
        (folder / "submission.json").write_text(json.dumps(result))
        (folder / "compliance.json").write_text(json.dumps(compliance))
        return folder

    return run


def package(tmp_path: Path, *runs: Path, **options: Any) -> Path:
    """Returns the folder that the command writes."""
    given = {"name": "A test", "github-id": "somebody", "date": "2026-04-01", "out": tmp_path / "records"} | options
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    submit.main([*map(str, runs), *flags])
    (folder,) = (tmp_path / "records").glob("*/*")
    return folder


def refused(tmp_path: Path, *runs: Path, **options: Any) -> str:
    """Returns why the command wrote nothing."""
    with pytest.raises(SystemExit) as caught:
        package(tmp_path, *runs, **options)
    assert str(caught.value).startswith("submit.py: error: ")
    assert not [path for path in (tmp_path / "records").rglob("*") if path.is_file()]
    return str(caught.value)


# ---- packing ----


def load(path: Path) -> ModuleType:
    """Loads a script as review tools do."""
    spec = importlib.util.spec_from_file_location("train_module", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_packed_script_holds_its_source_byte_for_byte_and_parses_on_every_python(tmp_path: Path) -> None:
    assert t.unpack(PACKED) == SOURCE and len(PACKED) < 0.4 * len(SOURCE)
    assert t.unpack(SOURCE) is None
    for text in (PACKED, SOURCE):
        ast.parse(text, feature_version=(3, 10))
        assert syntax_error(text.decode()) is None
    for version in ("3.10", "3.11", "3.12", "3.13"):
        interpreter = shutil.which(f"python{version}")
        if interpreter and subprocess.run([interpreter, "-c", ""], capture_output=True, check=False).returncode == 0:
            (tmp_path / "packed.py").write_bytes(PACKED)
            command = "import ast, sys; ast.parse(open(sys.argv[1]).read()); ast.parse(open(sys.argv[2]).read())"
            files = [str(tmp_path / "packed.py"), str(ROOT / "train_gpt.py")]
            subprocess.run([interpreter, "-c", command, *files], check=True)


def test_a_packed_script_loads_as_the_readable_one_does_and_counts_its_own_bytes(tmp_path: Path) -> None:
    (tmp_path / "train_gpt.py").write_bytes(PACKED)
    packed, readable = load(tmp_path / "train_gpt.py"), load(ROOT / "train_gpt.py")
    assert packed.CODE == tmp_path / "train_gpt.py"
    assert {n for n in vars(packed) if n[0] != "_"} == {n for n in vars(readable) if n[0] != "_"} | {
        "linecache",
        "source",
    }
    assert packed.Hyperparameters().values() == readable.Hyperparameters().values()


def test_a_damaged_packed_script_is_refused() -> None:
    middle = len(PACKED) // 2
    with pytest.raises(t.UserError, match="damaged"):
        t.unpack(PACKED[:middle] + b"0000" + PACKED[middle + 4 :])
    assert t.unpack(PACKED + b"print('more')\n") is None  # not one of ours: it would do more than it holds


@pytest.mark.parametrize("inside", [True, False])
def test_the_packaged_script_runs_inside_its_folder_and_elsewhere_with_the_same_result(
    make: Callable, audited: Path, tmp_path: Path, corpus: SimpleNamespace, inside: bool
) -> None:
    folder = package(tmp_path, make(1))
    cwd = folder if inside else tmp_path
    environment = shell(corpus, **{**AUDITED, "AUDIT": 0}, RUN_ID="p")
    command = [sys.executable, str(folder / "train_gpt.py")]
    done = subprocess.run(command, env=environment, cwd=cwd, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    events = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (audited, cwd / "logs/p")
    ]
    losses = [[event["train_loss"] for event in part if event["event"] == "train"] for part in events]
    scores = [[event["val_bpb"] for event in part if event["event"] in ("eval", "final")] for part in events]
    assert losses[0] == losses[1] and scores[0] == scores[1] and len(scores[0]) >= 5
    assert events[1][-1]["bytes_code"] == (folder / "train_gpt.py").stat().st_size


def test_a_packed_script_keeps_its_source_for_decorators_that_ask_for_it(tmp_path: Path) -> None:
    """As @triton.jit does, which reads and compiles the source of the function below it."""
    script = b"""
import inspect

def jit(function):
    return inspect.getsourcelines(function)

@jit
def kernel(x):
    return x + 1

if __name__ == "__main__":
    print(repr(kernel))
"""
    (tmp_path / "train_gpt.py").write_bytes(t.pack(script))
    command = [sys.executable, "train_gpt.py"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    lines, first = ast.literal_eval(done.stdout)
    assert "".join(lines) == "@jit\ndef kernel(x):\n    return x + 1\n" and first == 7
    loaded = load(tmp_path / "train_gpt.py")  # as a module, as the audit of a run loads it
    assert loaded.kernel == (lines, first)


def test_a_run_of_the_readable_script_ships_that_file_alone(make: Callable, tmp_path: Path) -> None:
    folder = package(tmp_path, make(1, script=SOURCE))
    assert (folder / "train_gpt.py").read_bytes() == SOURCE and not (folder / "train_gpt_readable.py").exists()
    assert json.loads((folder / "submission.json").read_text())["bytes_code"] == len(SOURCE)


# ---- folders ----


def test_three_seeds_become_a_complete_folder_whose_figures_are_those_of_the_runs(
    make: Callable, tmp_path: Path
) -> None:
    runs = [make(seed, h100=True) for seed in (3, 1, 2)]
    folder = package(tmp_path, *runs, blurb="What is new.")
    assert folder.relative_to(tmp_path / "records") == Path("track_10min_16mb/2026-04-01_A_test")
    names = {"README.md", "submission.json", "requirements.txt", "train_gpt.py", "train_gpt_readable.py"}
    names |= {f"train_seed{seed}.log" for seed in (1, 2, 3)} | {f"compliance_seed{seed}.json" for seed in (1, 2, 3)}
    assert {path.name for path in folder.iterdir()} == names
    content, results = json.loads((folder / "submission.json").read_text()), {}
    for run in runs:
        result = json.loads((run / "submission.json").read_text())
        results[result["seed"]] = result
        assert (folder / f"train_seed{result['seed']}.log").read_bytes() == (run / "train.log").read_bytes()
    scores = [results[seed]["val_bpb"] for seed in (1, 2, 3)]
    assert content["val_bpb"] == statistics.fmean(scores) and content["val_bpb_std"] == statistics.stdev(scores)
    assert content["track"] == "10min_16mb" and content["seeds"] == [1, 2, 3] and "why_no_record" not in content
    code = (folder / "train_gpt.py").stat().st_size
    totals = [code + results[seed]["bytes_model"] for seed in (1, 2, 3)]
    assert content["bytes_code"] == code and content["bytes_total"] == max(totals)
    assert [content["seed_results"][str(seed)]["artifact_bytes"] for seed in (1, 2, 3)] == totals
    assert all(content["compliance"].values()) and content["hardware"] == "8xH100 80GB SXM"
    assert (folder / "train_gpt.py").read_bytes() == PACKED
    assert (folder / "train_gpt_readable.py").read_bytes() == SOURCE
    text = (folder / "README.md").read_text()
    assert f"**val_bpb: {content['val_bpb']:.6f}**" in text and "not a record" not in text and "What is new." in text
    assert all(f"| {seed} | 4 | " in text and f"{results[seed]['val_bpb']:.6f}" in text for seed in (1, 2, 3))
    assert content["data"] == results[1]["data"] and len(content["data"]) == 3
    assert all(f"- `{digest}`: " in text for digest in content["data"].values())
    assert content["not_verified"] == [
        "that the training shards are those of their manifest (python data/verify.py FOLDER says)"
    ]
    assert "/corpus" not in text and "/corpus" not in (folder / "compliance_seed1.json").read_text()  # nobody's paths
    _, findings = check_folder(folder)
    assert [f for f in findings if f.severity != "note"] == []


def test_a_run_on_another_machine_and_text_becomes_a_folder_that_says_so(make: Callable, tmp_path: Path) -> None:
    folder = package(tmp_path, make(1))
    content, text = json.loads((folder / "submission.json").read_text()), (folder / "README.md").read_text()
    assert folder.parent.name == "track_non_record_16mb" and content["track"] == "non_record_16mb"
    reasons = content["why_no_record"]
    assert len(reasons) == 3 and "not the challenge's validation set" in reasons[0]
    assert "not on 8 H100s" in reasons[1] and reasons[2] == "1 seed, a record has at least 3"
    assert "**This is not a record:** " + "; ".join(reasons) in text
    assert content["val_bpb_std"] is None and content["compliance"]["three_seeds"] is False


def test_a_comparison_has_both_tests_as_significance_computes_them(make: Callable, tmp_path: Path) -> None:
    baseline = tmp_path / "baseline"
    baseline.mkdir()
    scores = {str(seed): {"val_bpb": 1.2 + seed / 5000, "val_loss": 2.026 + seed / 3000} for seed in (1, 2, 3)}
    (baseline / "submission.json").write_text(json.dumps({"seed_results": scores}))
    runs = [make(seed, h100=True) for seed in (1, 2, 3)]
    folder = package(tmp_path, *runs, against=baseline)
    content, text = json.loads((folder / "submission.json").read_text()), (folder / "README.md").read_text()
    own = [content["seed_results"][str(seed)]["val_bpb"] for seed in (1, 2, 3)]
    plain = submit.significance.welch(own, [entry["val_bpb"] for entry in scores.values()])
    assert (content["t_statistic"], content["welch_df"], content["p_value"]) == plain[:3]
    assert content["p_value"] < content["p_value_with_margin"] and f"p = {plain.p:.4g}" in text
    assert content["delta_bpb"] == pytest.approx(statistics.fmean(own) - 1.2004)


def test_runs_that_do_not_name_their_data_are_taken_and_the_folder_says_so(make: Callable, tmp_path: Path) -> None:
    folder = package(tmp_path, make(1, lambda result, compliance: result.pop("data")))
    content, text = json.loads((folder / "submission.json").read_text()), (folder / "README.md").read_text()
    assert content["data"] is None and len(content["not_verified"]) == 3
    assert all(f"which {what} the runs had" in text for what in ("tokenizer", "training data", "validation data"))


# ---- another author's script and logs ----
@pytest.fixture
def theirs(tmp_path: Path) -> Callable[..., list[str]]:
    """Writes a script and logs in a dialect of the challenge, and returns the words that name them."""

    def write(script: str | bytes = SCRIPT, seeds: tuple[int, ...] = SEEDS, **changed: Any) -> list[str]:
        folder = tmp_path / "their run"
        folder.mkdir(exist_ok=True)
        content = script.encode() if isinstance(script, str) else script
        (folder / "best_v7.py").write_bytes(content)
        logs = [folder / f"{seed}.txt" for seed in seeds]
        for seed, path in zip(seeds, logs):
            path.write_text(log_text(seed, code=len(content), **changed))
        return ["--script", str(folder / "best_v7.py"), "--log", *map(str, logs)]

    return write


def test_another_authors_script_and_logs_become_a_folder_with_their_figures_and_what_nobody_verified(
    theirs: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = theirs()
    (tmp_path / "their run/requirements.txt").write_text("brotli\n")
    folder = package(tmp_path, *words, author="A. Author")
    content, text = json.loads((folder / "submission.json").read_text()), (folder / "README.md").read_text()
    assert folder.parent.name == "track_10min_16mb" and content["author"] == "A. Author"
    assert content["val_bpb"] == pytest.approx(statistics.fmean(BPB.values()), abs=1e-9)
    assert content["seeds"] == [42, 314, 999]
    assert content["bytes_total"] == MODEL + len(SCRIPT) and content["bytes_code"] == len(SCRIPT)
    result = content["seed_results"]["42"]
    assert (result["steps"], result["train_time_s"], result["eval_time_s"]) == (4550, 588.047, 366.525)
    assert result["calib_time_s"] == 11.3 and result["eval_time_strict_s"] is None
    assert content["compliance"]["artifact_under_16mb"] is True and content["compliance"]["score_first_ttt"] is None
    assert (
        content["data"] is None and content["hardware"] == "by the logs 8 processes on hardware that they do not name"
    )
    assert (folder / "train_gpt.py").read_text() == SCRIPT and (folder / "requirements.txt").read_text() == "brotli\n"
    assert (folder / "train_seed42.log").read_bytes() == (tmp_path / "their run/42.txt").read_bytes()
    printed = capsys.readouterr().out
    for what in (
        "the weights: their file was not there",
        "the order: that targets",
        "the origin of the logs",
        "the data:",
    ):
        assert what in " ".join(content["not_verified"]) and what in text and what in printed
    _, findings = check_folder(folder)
    assert [f for f in findings if f.severity == "reject"] == []


def test_a_packed_script_of_another_author_is_shipped_as_it_is_with_its_source_beside_it(
    theirs: Callable, tmp_path: Path
) -> None:
    packed = b"import lzma as L, base64 as B\nexec(L.decompress(B.b85decode(%r)))\n"
    packed %= base64.b85encode(lzma.compress(SCRIPT.encode()))
    folder = package(tmp_path, *theirs(packed))
    assert (folder / "train_gpt.py").read_bytes() == packed
    assert (folder / "train_gpt_readable.py").read_text() == SCRIPT


def test_what_their_logs_lack_or_break_is_no_record_or_refused(theirs: Callable, tmp_path: Path) -> None:
    for number, (changed, reason) in enumerate(
        (
            ({"world": 1}, "trained by 1 processes, not on 8 H100s"),
            ({"train_ms": 700_000}, "seed 42: 700.0 s of training + 11.3 s of calibration, over 600"),
            ({"train_ms": 0}, "seed 42: its log does not show the seconds of training"),
            ({"eval_ms": 0}, "seed 42: its log does not show the seconds of scoring"),
            ({"world": ""}, "seed 42: its log does not show that it ran on 8 GPUs"),
            ({"label": "ttt_ppm_mix"}, "'ttt_ppm_mix' is a byte mixture"),
            ({"label": "quantized_sliding"}, "ttt_enabled is set, and its log has no score after adaptation"),
            ({"extra": "| 0  NVIDIA A100-SXM4-80GB  On |\n"}, "seed 42: trained on device:NVIDIA A100"),
            ({"eval_ms": 601_000}, "seed 42: 601.0 s of scoring, over 600"),
            ({"tokens": 1_000_000}, "bytes were scored, which is not the challenge's validation text"),
            ({"seeds": (42, 314)}, "2 seeds, a record has at least 3"),
        )
    ):
        words = theirs(**changed)
        assert reason in refused_words(words, tmp_path, track="record")
        submit.main([*words, "--name", f"N{number}", "--github-id", "a", "--out", str(tmp_path / "records")])
        (folder,) = (tmp_path / "records").glob(f"*/*_N{number}")
        assert folder.parent.name == "track_non_record_16mb"
        assert reason in " ".join(json.loads((folder / "submission.json").read_text())["why_no_record"])
    assert "over 16,000,000" in refused_words(theirs(model=16_100_000), tmp_path)


def refused_words(words: list[str], tmp_path: Path, **options: Any) -> str:
    """Returns why the command wrote nothing, where folders of other calls may lie."""
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    with pytest.raises(SystemExit) as caught:
        submit.main([*words, "--name", "x", "--github-id", "a", "--out", str(tmp_path / "records"), *flags])
    assert str(caught.value).startswith("submit.py: error: ")
    return str(caught.value)


def test_what_is_no_script_or_log_is_refused_with_the_fix(theirs: Callable, make: Callable, tmp_path: Path) -> None:
    folder, words = tmp_path / "their run", theirs()
    (folder / "empty.txt").write_text("seed: 1\nnothing else\n")
    (folder / "nameless.txt").write_text("final val_loss:2.0 val_bpb:1.10000000\n")
    script, log = words[:2], words[2:4]
    for given, reason in (
        ([], "give the folders of runs, or another author's --script FILE and --log FILE"),
        ([*script], "--log is missing"),
        ([*log], "--script is missing"),
        ([*script, *words], "--script is there 2 times"),
        ([str(make(1)), *words], "do not go together"),
        ([*words, *log], "42.txt prints the scores and seconds of"),
        (["--script", str(folder / "no.py"), *log], "no.py is no file"),
        ([*script, "--log", str(folder / "no.txt")], "no.txt is no file"),
        ([*script, "--log", str(folder / "empty.txt")], "empty.txt has no score of the stored model"),
        (
            [*script, "--log", str(folder / "nameless.txt")],
            "names no seed, nor does its name: if you know it, name it train_seed<N>.log",
        ),
    ):
        assert reason in refused_words(given, tmp_path), given
    one = (folder / "42.txt").read_text()
    for name, text, reason in (
        ("seed7.txt", one, "is of seed 42, and its name says 7"),
        ("two.txt", one + one, "two.txt has several runs: cut it into one log a run"),
        ("seeds.txt", one + one.replace("seed: 42", "seed: 43"), "has several runs of the seeds 42, 43"),
        ("later.txt", one + "quantized_again val_bpb:1.0500 eval_time:900000ms\n", "ends with 1.05"),
        (
            "zero.txt",
            re.sub(r"(quantized_ttt val_loss:)\S+ val_bpb:\S+", r"\g<1>2.0 val_bpb:0.00000000", one),
            "is no score",
        ),
        ("long.txt", re.sub(r"(quantized_ttt val_loss:)\S+", r"\g<1>" + "9" * 400 + ".0", one), "is no score"),
    ):
        (folder / name).write_text(text)
        assert reason in refused_words([*script, "--log", str(folder / name)], tmp_path), name
    assert "best_v7.py is empty" in refused_words(theirs(""), tmp_path)
    assert "best_v7.py is no Python: " in refused_words(theirs(b"x = '\xe9'\n" + SCRIPT.encode()), tmp_path)
    assert "best_v7.py is no Python: " in refused_words(theirs(SCRIPT + "\ndef f(:\n"), tmp_path)
    (folder / "helper.py").write_text("x = 1\n")
    assert "loads helper.py from its folder" in refused_words(theirs("import helper\n" + SCRIPT), tmp_path)
    (folder / "package").mkdir()
    (folder / "package/__init__.py").write_text("x = 1\n")
    assert "loads package/__init__.py from" in refused_words(theirs("import package\n" + SCRIPT), tmp_path)


def test_text_of_another_author_cannot_break_out_of_the_readme(theirs: Callable, tmp_path: Path) -> None:
    folder = package(tmp_path, *theirs(label="<img src=x> ![x](http://evil) ppm"))
    content, text = json.loads((folder / "submission.json").read_text()), (folder / "README.md").read_text()
    assert "is a byte mixture" in text and "<img" in " ".join(content["why_no_record"])
    assert "<img" not in text and "](http" not in text


def test_a_log_that_counts_another_script_is_taken_by_its_own_sum_and_the_folder_says_so(
    theirs: Callable, tmp_path: Path
) -> None:
    words = theirs(total=MODEL + 70_000)
    (log,) = (Path(word) for word in words if word.endswith("314.txt"))
    said = re.sub(r"Total.*\n", "", log.read_text())
    log.write_text(re.sub(r"Code size: \d+", "Code size: 70000", said))
    folder = package(tmp_path, *words)
    content, text = json.loads((folder / "submission.json").read_text()), (folder / "README.md").read_text()
    assert {result["artifact_bytes"] for result in content["seed_results"].values()} == {MODEL + 70_000}
    assert content["bytes_total"] == MODEL + 70_000 and "the script that was given" in text
    assert f"its log counts 70,000 bytes of code, this script has {len(SCRIPT):,}" in text
    assert "records/check.py: S2" in text  # what the checker warns of stands in the folder


def test_scores_are_not_compared_with_those_of_another_text(make: Callable, theirs: Callable, tmp_path: Path) -> None:
    own = [make(seed, h100=True) for seed in (1, 2, 3)]
    other = [make(seed, edit("r/data/val_sha256", "0" * 64), h100=True) for seed in (4, 5)]
    against = ["--against", *map(str, other)]
    assert "their validation text is another" in refused_words([*map(str, own), *against], tmp_path)
    folder = package(tmp_path, *theirs(), *against)
    assert "is not known: the hash of one is missing" in (folder / "README.md").read_text()


# ---- refusals ----


def edit(path: str, value: Any) -> Callable:
    """A change of a run's result (r…) or compliance (c…)."""
    which, *keys = path.split("/")

    def change(result: dict, compliance: dict) -> None:
        place = {"r": result, "c": compliance}[which]
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


def both(path: str, value: Any) -> Callable:
    """A change of the run's result and of its compliance alike."""
    return lambda *contents: [edit(f"{which}/{path}", value)(*contents) for which in "rc"]


def resize(result: dict, compliance: dict) -> None:
    result["bytes_model"] = 15_990_000  # `make` writes as many bytes


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (edit("r/kind", "ttt_pre"), "trains on validation tokens before they are scored"),
        (edit("r/rule_breaks", {"order": "TTT_MODE=pre"}), "trains on validation tokens before they are scored"),
        (
            resize,
            r"code \+ model are 16,0\d\d,\d\d\d bytes, over 16,000,000: raise QUANT_FLOOR",
        ),
        (edit("c/passed", False), r"the audit failed"),
        (edit("c/proofs/once_only/passed", False), r"the audit failed \(once_only\)"),
        (edit("c/proofs/once_only/passed", "yes"), r"the audit failed \(once_only\)"),
        (edit("c/proofs", {}), r"the audit failed \(artifact, files, future_flip, "),
        (edit("c/proofs/once_only", None), "holds no report that can be read"),
        (edit("c/settings/ttt_enabled", False), "compliance.json is of TTT_ENABLED=False, not True"),
        (edit("c/seed", 99), "holds no report that can be read"),
        (edit("r/settings/seed", 99), "holds no report that can be read"),
        (edit("r/seed", "../../x"), "holds no report that can be read"),
        (edit("r/step_avg_ms", None), "step_avg_ms of event final is None, a number is needed"),
        (edit("r/bytes_model", 1000), "is not what metrics.jsonl and final_model.bin say"),
        (edit("r/settings/eval_only", "some.bin"), "did not train"),
        (both("settings/matrix_lr", 0.5), "MATRIX_LR=0.5, 0.027 in .*s1: make them equal"),
        (edit("r/artifact_sha256", "0" * 64), "final_model.bin is not the file that was scored"),
        (edit("c/artifact_sha256", "0" * 64), "compliance.json is of another final_model.bin"),
        (edit("r/val_bpb", "low"), r"s2/metrics.jsonl:\d+: val_bpb of event final is 'low', a number is needed"),
        (edit("r/val_bpb", float("nan")), "val_bpb of event final is nan, a number is needed"),
        (edit("r/data", {"val_sha256": "0" * 64}), "s2 has other data than .*s1: all seeds must have the same"),
        (edit("r/data", {"val_sha256": "<b>"}), "holds no report that can be read"),
        (edit("r/data", []), "holds no report that can be read"),
        (edit("r/settings", []), "holds no report that can be read"),
    ],
)
def test_what_breaks_a_rule_or_does_not_fit_together_is_refused_with_the_reason(
    make: Callable, tmp_path: Path, change: Callable, reason: str
) -> None:
    runs = [make(1, h100=True), make(2, change, h100=True), make(3, h100=True)]
    assert re.search(reason, refused(tmp_path, *runs)), refused(tmp_path, *runs)


def test_runs_of_two_scripts_or_a_seed_twice_are_refused(make: Callable, tmp_path: Path) -> None:
    other = make(2, script=t.pack(SOURCE + b"# another\n"))
    assert "is of another script" in refused(tmp_path, make(1), other)
    shutil.copytree(tmp_path / "logs/s1", tmp_path / "logs/again")
    assert "the seed 1 is there twice" in refused(tmp_path, tmp_path / "logs/s1", tmp_path / "logs/again")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("compliance.json", r"was not audited: run `python records/audit\.py .*s1`"),
        ("final_model.bin", "is missing|not the file"),
        ("train.log", "train.log is missing: give the folder of a finished training run"),
    ],
)
def test_an_incomplete_run_is_refused(make: Callable, tmp_path: Path, name: str, reason: str) -> None:
    run = make(1)
    (run / name).unlink()
    assert re.search(reason, refused(tmp_path, run))


def test_a_changed_script_or_artifact_is_refused(make: Callable, tmp_path: Path) -> None:
    run = make(1)
    (run / "final_model.bin").write_bytes(bytes((run / "final_model.bin").stat().st_size))
    assert "final_model.bin is not the file that was scored (artifact_sha256 differs)" in refused(tmp_path, run)


def test_a_record_that_is_none_is_refused_where_a_record_is_asked_for(make: Callable, tmp_path: Path) -> None:
    message = refused(tmp_path, *(make(seed) for seed in (1, 2, 3)), track="record")
    assert "this is no record" in message and "not on 8 H100s" in message and "--track non-record" in message


def test_a_folder_that_the_checker_rejects_is_not_left_behind(
    make: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log says another score than the report: the headline would not follow from the logs."""
    runs = [make(seed, h100=True) for seed in (1, 2, 3)]
    log = (runs[1] / "train.log").read_text()
    (runs[1] / "train.log").write_text(re.sub(r"(final_exact val_loss:\S+ val_bpb:)\S+", r"\g<1>1.05000000", log))
    assert "records/check.py rejects the folder" in refused(tmp_path, *runs)


def test_a_folder_is_never_overwritten(make: Callable, tmp_path: Path) -> None:
    run = make(1)
    folder = package(tmp_path, run)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit, match="exists already: choose another --name"):
        package(tmp_path, run)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("option", "value"), [("date", "today"), ("date", "2026-13-99"), ("name", "../.."), ("name", "n" * 300)]
)
def test_a_name_or_date_that_makes_no_folder_is_refused(
    make: Callable, tmp_path: Path, option: str, value: str
) -> None:
    assert f"--{option} {value}" in refused(tmp_path, make(1), **{option: value})


def test_text_of_the_user_cannot_break_out_of_the_folder_or_the_shell(make: Callable, tmp_path: Path) -> None:
    def hostile(result: dict, compliance: dict) -> None:
        for content in (result, compliance):
            content["settings"]["fp16_keep_name_patterns"] = "$(touch pwned); `id`"
        compliance["proofs"]["network"]["says"] = "<script>alert(1)</script> | x"

    folder = package(tmp_path, make(1, hostile), name="../etc/x y", blurb="b")
    assert folder.parent.parent == tmp_path / "records" and folder.name == "2026-04-01_etc_x_y"
    text = (folder / "README.md").read_text()
    assert "FP16_KEEP_NAME_PATTERNS='$(touch pwned); `id`'" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| 1 | network |"))
    assert "alert(1)" in row and "<script>" not in row and row.count("|") == 5


@pytest.mark.parametrize("machine", [H100.replace("80GB HBM3", "PCIe"), H100.replace("processes:8", "processes:1")])
def test_other_h100s_are_not_the_challenges(make: Callable, tmp_path: Path, machine: str) -> None:
    folder = package(tmp_path, *(make(seed, edit("r/machine", machine), h100=True) for seed in (1, 2, 3)))
    content = json.loads((folder / "submission.json").read_text())
    assert content["track"] == "non_record_16mb" and content["hardware"] == machine.partition(" dtype:")[0]
    assert content["why_no_record"] == [f"trained on {content['hardware']}, not on 8 H100s"]


def test_the_audit_that_is_asked_for_is_the_one_that_is_made() -> None:
    import audit

    assert material.PROOFS == {*audit.PROBES, "artifact", "files", "network"}
