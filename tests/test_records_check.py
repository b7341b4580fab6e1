"""records/check.py on synthetic folders in the challenge's dialects: every rule both ways, and files of any content."""

from __future__ import annotations

import base64
import hashlib
import json
import lzma
import math
import os
import random
import re
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest

CHECK = Path(__file__).resolve().parent.parent / "records" / "check.py"
sys.path.insert(0, str(CHECK.parent))
from checker import audit, main, portability, scripts  # noqa: E402
from checker import folder as reading_folders  # noqa: E402
from checker import logs as dialects  # noqa: E402
from checker.command import as_json  # noqa: E402
from checker.logs import last_score, model_bytes, train_seconds  # noqa: E402
from checker.rules import RULES, SEVERITIES  # noqa: E402
from checker.seconds import IGNORED  # noqa: E402

TOKENS, VAL_BYTES = 40_540_160, 151.05e6  # of sp8192
MODEL, SEEDS = 15_900_000, (42, 314, 999)
BPB = {42: 1.08103, 314: 1.08131, 999: 1.08177}
BOOLEANS = ("train_under_600s", "artifact_under_16mb", "eval_under_600s", "three_seeds")
SCRIPT = """
import os
import torch

class Hyperparameters:
    seed = int(os.environ.get("SEED", 1337))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.02))

class GPT(torch.nn.Module):
    pass

def build_sentencepiece_luts(sp): ...
def load_validation_tokens(pattern): ...
def eval_val(model, val_tokens): ...
def main():
    torch.cuda.synchronize()

if __name__ == "__main__":
    main()
"""
README = """# A record

**val_bpb: 1.08137** (3-seed mean)

```bash
pip install brotli
SEED=42 MATRIX_LR=0.02 NCCL_NET=Socket \\
torchrun --standalone --nproc_per_node=8 train_gpt.py
```
"""


def loss_of(bpb: float, tokens: int = TOKENS, num_bytes: float = VAL_BYTES) -> float:
    """Returns the loss at which tokens and bits per byte give a number of bytes."""
    return bpb * math.log(2) * num_bytes / tokens


def log_text(seed: int, bpb: float | None = None, code: int = len(SCRIPT), extra: str = "", **changed: object) -> str:
    """Returns a log in the dialect of April; `changed` overrides what it prints."""
    bpb = BPB.get(seed, 1.0815) if bpb is None else bpb
    said = {
        "train_ms": 588_047, "hessians": 11.3, "model": MODEL, "tokens": TOKENS, "loss": loss_of(bpb), "shards": 80,
        "lr": 0.02, "label": "quantized_ttt", "eval_ms": 366_525, "cap": 600.0, "world": 8, "total": None,
    } | changed  # fmt: skip
    total = said["total"] or said["model"] + code
    return f"""W0409 04:38:18.092000 206 torch/distributed/run.py:803] *****
Hyperparameters:
  artifact_dir:{" "}
  logfile: logs/{seed}-run.txt
  matrix_lr: {said["lr"]}
  max_wallclock_seconds: {said["cap"]}
  run_id: run-{seed}
  seed: {seed}
  ttt_enabled: True
  world_size: {said["world"]}
train_shards: {said["shards"]}
val_tokens: {said["tokens"]}
warmup_step: 1/20
0/20000 val_loss: 9.0090 val_bpb: 3.4877
500/20000 train_loss: 3.3346 train_time: 0.9m tok/s: 7691255
4550/20000 val_loss: 2.8119 val_bpb: 1.0886
stopping_early: wallclock_cap train_time: {said["train_ms"]}ms step: 4550/20000
pre-quantization post-ema val_loss:2.80873254 val_bpb:{bpb - 0.006:.8f} eval_time:7440ms
Serialized model: 135431033 bytes
Code size: {code} bytes
GPTQ:collected 67 Hessians in {said["hessians"]}s
Serialized model quantized+brotli: {said["model"]} bytes
Total submission size quantized+brotli: {total} bytes
quantized val_loss:2.84065044 val_bpb:{bpb + 0.005:.8f} eval_time:25515ms
ttt:start chunks=1238 ttt_lr=0.005 ttt_epochs=3
{said["label"]} val_loss:{said["loss"]:.8f} val_bpb:{bpb:.8f} eval_time:{said["eval_ms"]}ms
{extra}"""


def submission(**changed: object) -> dict:
    """Returns a submission.json that fits the logs; a value of None takes the key away."""
    content = {
        "author": "A", "github_id": "a", "name": "Record", "date": "2026-04-09", "track": "10min_16mb",
        "hardware": "8xH100",
        "val_loss": round(loss_of(1.08137), 5), "val_bpb": 1.08137, "val_bpb_std": 0.00037, "seeds": list(SEEDS),
        "seed_results": {str(s): {"val_bpb": BPB[s], "artifact_bytes": MODEL + len(SCRIPT)} for s in SEEDS},
        "bytes_total": MODEL + len(SCRIPT), "bytes_code": len(SCRIPT),
        "compliance": {key: True for key in BOOLEANS},
    } | changed  # fmt: skip
    return {key: value for key, value in content.items() if value is not None}


@pytest.fixture
def folder(tmp_path: Path):
    """Returns a function that writes a folder: clean unless files are replaced (None removes one, bytes go in raw)."""

    def write(files: dict | None = None, track: str = "track_10min_16mb", name: str = "2026-04-09_Name") -> Path:
        path = tmp_path / track / name
        clean = {"README.md": README, "submission.json": submission(), "train_gpt.py": SCRIPT}
        clean |= {f"train_seed{seed}.log": log_text(seed) for seed in SEEDS}
        for file, content in (clean | (files or {})).items():
            if content is None:
                continue
            place = path / file
            place.parent.mkdir(parents=True, exist_ok=True)
            content = json.dumps(content) if isinstance(content, (dict, list)) else content
            place.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def findings(path: Path, rule: str = "", grade: str = "") -> list:
    """Returns the findings of a folder, of one rule or severity."""
    found = audit(path)[1]
    assert not [f for f in found if f.rule == "X1"], found
    return [f for f in found if rule in ("", f.rule) and grade in ("", f.severity)]


def grades(path: Path, rule: str) -> set[str]:
    """Returns the severities that a rule gives a folder."""
    return {finding.severity for finding in findings(path, rule)}


def logs(**changed: object) -> dict:
    """Returns the three logs with something changed in all of them."""
    return {f"train_seed{seed}.log": log_text(seed, **changed) for seed in SEEDS}


def test_a_clean_folder_has_no_finding_but_notes(folder):
    assert [f for f in findings(folder()) if f.severity != "note"] == []


def test_the_table_of_rules_is_complete_and_every_example_of_a_field_is_read():
    assert all(rule.gravest in SEVERITIES and rule.meaning and rule.source for rule in RULES.values())
    for name, pattern, _, example in dialects.FIELDS:
        assert re.search(pattern, example), (name, example)


# ------------------------------------------------------------ files
@pytest.mark.parametrize("name", ["README.md", "submission.json", "train_gpt.py"])
def test_a_missing_file_rejects_a_record_and_warns_elsewhere(folder, name):
    assert grades(folder({name: None}), "F1") == {"reject"}
    assert grades(folder({name: None}, track="track_non_record_16mb"), "F1") == {"warn"}
    assert grades(folder(name="2026-04-10_Whole"), "F1") == set()


def test_the_folder_of_a_run_is_told_from_a_submission(folder):
    path = folder({"README.md": None, "metrics.jsonl": "{}\n"})
    assert any("this is the folder of a run" in finding.message for finding in findings(path, "F1", "note"))


def test_a_record_without_a_log_is_rejected_and_an_unknown_dialect_is_said(folder):
    none = dict.fromkeys((f"train_seed{seed}.log" for seed in SEEDS), None)
    path = folder(none | {"train.log": "nothing that is known\n"})
    assert grades(path, "F1") == {"reject", "note"}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"submission.json": None, "submission_ternary.json": submission()}, "submission.json"),
        ({"train_gpt.py": None, "train_gpt_v5.py": SCRIPT}, "train_gpt.py"),
        ({"train_seed42.log": None, "train_seed7.log": log_text(42)}, "the log ran seed 42"),
        ({"submission.json": submission(track="non-record-16mb")}, "one of them is wrong"),
    ],
)
def test_deviating_names_are_found_and_the_files_are_read_all_the_same(folder, files, said):
    path = folder(files)
    assert any(said in finding.message for finding in findings(path, "F2", "warn"))
    assert as_json(*audit(path))["mean_val_bpb"] == pytest.approx(sum(BPB.values()) / 3)


def test_a_folder_without_a_date_is_found(folder):
    assert grades(folder(name="MyRecord"), "F2") == {"warn"}


def test_missing_keys_are_named(folder):
    path = folder({"submission.json": submission(author=None, github_id="", val_bpb=None, mean_val_bpb=1.08137)})
    (finding,) = findings(path, "F3", "warn")
    assert all(word in finding.message for word in ("author", "github_id", "val_bpb (there under another name)"))


def test_a_link_that_leads_outside_is_not_read(folder, tmp_path):
    path = folder({"train_seed42.log": None})
    (tmp_path / "secret.log").write_text(log_text(42))
    (path / "train_seed42.log").symlink_to(tmp_path / "secret.log")
    assert any("leads outside" in finding.message for finding in findings(path, "F2"))
    assert "train_seed42.log" not in [log.name for log in audit(path)[0].logs]


# ------------------------------------------------------------ bytes
def test_an_artifact_over_the_cap_is_rejected_from_the_log_line(folder):
    path = folder({"train_seed314.log": log_text(314, model=16_071_321)})
    (finding,) = findings(path, "S1", "reject")
    assert f"{16_071_321 + len(SCRIPT):,}" in finding.message and finding.file == "train_seed314.log"
    assert (path / finding.file).read_text().splitlines()[finding.line - 1].startswith("Total submission size")
    assert grades(path, "N4") == {"warn"}  # compliance.artifact_under_16mb


def test_the_size_as_shipped_is_script_plus_model_where_the_log_counts_less(folder):
    script = SCRIPT + "#" * 120_000
    path = folder({"train_gpt.py": script} | logs(code=30_000))  # of a packed script that is not there
    (finding,) = findings(path, "S1", "warn")
    assert f"{MODEL + len(script):,}" in finding.message and len(finding.also) == 2
    assert any("ship the packed script" in f.message for f in findings(path, "S2", "warn"))


def test_the_size_as_shipped_rejects_where_the_log_counts_no_code(folder):
    text = {
        n: t.replace("Total submission", "Whole").replace("Code size", "Text")
        for n, t in logs(model=15_999_900).items()
    }
    assert grades(folder(text), "S1") == {"reject"}


def test_a_thin_margin_is_a_note(folder):
    assert grades(folder(logs(model=15_995_000)), "S1") == {"note"}


def test_a_larger_readable_twin_in_the_log_is_a_note_only(folder):
    human = SCRIPT + "#" * 200_000
    path = folder({"train_gpt_human.py": human} | logs(code=len(human)))
    assert grades(path, "S1") == {"note"} and grades(path, "S2") == {"note"}
    assert any("it counts train_gpt_human.py" in finding.message for finding in findings(path, "S2", "note"))


def test_a_larger_script_in_the_log_that_is_not_in_the_folder_rejects(folder):
    assert grades(folder(logs(code=200_000)), "S1") == {"reject"}


def test_a_log_of_another_script_is_flagged(folder):
    (finding,) = [
        f for f in findings(folder(logs(code=len(SCRIPT) + 900)), "S2", "warn") if "another script" in f.message
    ]
    assert f"{len(SCRIPT):,} lie in the folder" in finding.message


def test_claimed_bytes_that_are_the_model_alone_are_flagged(folder):
    results = {str(s): {"val_bpb": BPB[s], "artifact_bytes": MODEL} for s in SEEDS}
    path = folder({"submission.json": submission(seed_results=results, bytes_total=MODEL, bytes_code=65_000)})
    messages = [finding.message for finding in findings(path, "S2", "warn")]
    assert any("the model without the code" in message for message in messages)
    assert any("bytes_code 65,000" in message for message in messages)


def test_a_loader_of_another_file_counts_both_and_can_break_the_cap(folder):
    loader = 'exec(open(__file__.replace("train_gpt.py", "train_gpt_decode.py")).read())\n'
    real = SCRIPT + "#" * 78_000
    files = {"train_gpt.py": loader, "train_gpt_decode.py": real}
    over = folder(files | logs(code=len(loader), model=15_976_275))
    assert grades(over, "S3") == {"reject"} and grades(over, "S1") == {"reject"} and grades(over, "P3") == {"warn"}
    seen = folder(files | logs(code=len(loader) + len(real), model=15_800_000), name="2026-04-10_Seen")
    assert grades(seen, "S3") == {"note"} and grades(seen, "S1") == set()


def test_an_imported_sibling_counts_as_code(folder):
    path = folder({"train_gpt.py": "import helper\n" + SCRIPT, "helper.py": "import deeper", "deeper.py": "x = 1"})
    (finding,) = findings(path, "S3")
    assert "helper.py" in finding.message and "deeper.py" in finding.message and finding.severity == "warn"
    assert audit(path)[0].code() == len("import helper\n" + SCRIPT) + len("import deeper") + len("x = 1")


def raw_lzma(source: str) -> bytes:
    """Returns raw LZMA2 data, as the packed records have it."""
    return lzma.compress(source.encode(), lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])


def packed_scripts(source: str) -> dict[str, str]:
    """Returns a source in wrappers of the kinds that are in use."""
    raw, b85 = raw_lzma(source), base64.b85encode(raw_lzma(source)).decode()
    half, options = len(b85) // 2, "format=L.FORMAT_RAW,filters=[{'id':L.FILTER_LZMA2}]"
    return {
        "raw LZMA2 + b85": 'import lzma as L,base64 as B\nexec(L.decompress(B.b85decode("' + b85
        + '"),format=L.FORMAT_RAW,filters=[{"id":L.FILTER_LZMA2}]))',
        "lzma alone": f"import lzma\nexec(lzma.decompress({lzma.compress(source.encode())!r}))",
        "raw bytes": f"import lzma as L\nexec(L.decompress({raw!r},{options}))",
        "zlib + b64": "import zlib,base64\nexec(zlib.decompress(base64.b64decode("
        + repr(base64.b64encode(zlib.compress(source.encode()))) + ")))",
        "in pieces": "import lzma as L,base64 as B\nexec(L.decompress(B.b85decode((\n"
        + f'"{b85[:half]}"\n"{b85[half:]}"\n)),{options}))',
    }  # fmt: skip


@pytest.mark.parametrize("kind", list(packed_scripts("")))
def test_a_packed_script_is_unpacked_and_looked_into(folder, kind):
    source = SCRIPT.replace("import torch\n", "import torch\nfrom flash_attn_interface import flash_attn_func\n")
    source += "\n".join(f"NAME_{i} = {i * i}" for i in range(60))
    path = folder({"train_gpt.py": packed_scripts(source)[kind]})
    assert any("packed" in finding.message for finding in findings(path, "S4", "note"))
    assert any("flash_attn_interface" in finding.message for finding in findings(path, "P2"))
    assert audit(path)[0].scripts[0].source == source


def test_a_script_packed_twice_is_unpacked_twice(folder):
    once = packed_scripts(SCRIPT + "\n".join(f"N_{i} = {i * i}" for i in range(400)))["raw LZMA2 + b85"]
    assert "def eval_val" in audit(folder({"train_gpt.py": packed_scripts(once)["zlib + b64"]}))[0].scripts[0].source


def test_what_cannot_be_unpacked_is_said(folder, monkeypatch):
    payload = base64.b85encode(random.Random(0).randbytes(3000)).decode()
    path = folder({"train_gpt.py": f"import brotli,base64\nexec(brotli.decompress(base64.b85decode({payload!r})))"})
    monkeypatch.setattr(scripts, "brotli_module", lambda: None)
    (finding,) = findings(path, "S4", "warn")
    assert "brotli" in finding.message and "pip install" in finding.message


def test_a_script_packed_with_brotli_is_unpacked(folder):
    brotli = pytest.importorskip("brotli", reason="brotli is not installed, and check.py says so where it is needed")
    source = SCRIPT + "\n".join(f"N_{i} = {i * i}" for i in range(60))
    payload = base64.b85encode(brotli.compress(source.encode())).decode()
    path = folder({"train_gpt.py": f"import brotli,base64\nexec(brotli.decompress(base64.b85decode({payload!r})))"})
    assert audit(path)[0].scripts[0].source == source


def test_a_bomb_is_unpacked_within_bounds(folder):
    bomb = base64.b85encode(raw_lzma("x = 1\n" * 10_000_000)).decode()  # 60 MB
    path = folder({"train_gpt.py": f"import lzma,base64\nexec(lzma.decompress(base64.b85decode({bomb!r})))"})
    assert "more than 1,000,000 bytes" in findings(path, "S4", "warn")[0].message


def test_nothing_of_a_script_is_run(folder, tmp_path):
    mark = tmp_path / "ran"
    evil = f"open({str(mark)!r}, 'w').write('x')\n" + "\n".join(f"N_{i} = {i}" for i in range(90))
    for kind, text in {"plain": evil, **packed_scripts(evil)}.items():
        path = folder(
            {"train_gpt.py": text, "sitecustomize.py": evil, "brotli.py": evil, "conftest.py": evil}, name=kind
        )
        done = subprocess.run([sys.executable, str(CHECK), str(path)], cwd=path, capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stderr
        assert not mark.exists()


# ------------------------------------------------------------ seconds
@pytest.mark.parametrize(
    ("train_ms", "hessians", "rule", "expected"),
    [
        (588_047, 11.3, "T2", set()), (600_038, 0, "T2", {"warn"}), (603_000, 0, "T2", {"reject"}),
        (588_047, 11.3, "T1", set()), (588_047, 12.7, "T1", {"warn"}), (599_672, 6.9, "T1", {"warn"}),
        (600_000, 46.0, "T1", {"reject"}),
    ],
)  # fmt: skip
def test_training_and_calibration_fit_600_seconds(folder, train_ms, hessians, rule, expected):
    assert grades(folder(logs(train_ms=train_ms, hessians=hessians)), rule) == expected


def test_calibration_on_generated_data_is_not_charged(folder):
    extra = "gptq:generating autoregressive calibration data (64 seqs x 2048 tokens)...\ngptq:done in 239.9s\n"
    assert grades(folder(logs(extra=extra)), "T1") == {"note"}


def test_time_limits_do_not_bind_outside_the_record_track_but_size_does(folder):
    path = folder(logs(train_ms=7_763_153, eval_ms=900_000, model=16_100_000), track="track_non_record_16mb")
    assert {f.rule for f in findings(path) if f.severity == "reject"} == {"S1"}


@pytest.mark.parametrize(
    ("eval_ms", "extra", "expected"),
    [
        (508_785, "", set()),
        (605_000, "", {"reject"}),
        (600_400, "", {"warn"}),
        (508_785, "Deserialize: decompression done in 24.0s\nttt_lora:compile warmup done (137.6s)\n", {"warn"}),
    ],
)
def test_the_evaluation_fits_600_seconds_by_its_own_clock_and_strictly(folder, eval_ms, extra, expected):
    assert grades(folder(logs(eval_ms=eval_ms, extra=extra)), "T3") == expected


def test_seconds_that_are_not_in_the_log_are_said_to_be_missing(folder):
    text = {name: t.replace(" eval_time:366525ms", "").replace("stopping_early", "stop") for name, t in logs().items()}
    text = {name: t.replace("588047ms", "?") for name, t in text.items()}
    path = folder(text)
    assert grades(path, "T3") == {"note"} and grades(path, "T2") == {"note"}


def test_seeds_of_different_configurations_are_rejected_and_paths_and_names_are_not(folder):
    (finding,) = findings(folder({"train_seed999.log": log_text(999, lr=0.03)}), "T4")
    assert finding.severity == "reject" and "matrix_lr is 0.03, in train_seed314.log 0.02" in finding.message


def test_names_clocks_and_cadences_may_differ_and_no_other_setting():
    free = (
        "seed run_id tokenizer_path data_dir train_files logfile local_rank rank s val_loss_every max_wallclock_seconds"
    )
    bound = (
        "ttt_lora_rank logit_softcap train_batch_tokens muon_backend_steps swa_every warmup_steps mtp_loss_weight lr"
    )
    assert [key for key in free.split() if not IGNORED.search(key)] == []
    assert [key for key in bound.split() if IGNORED.search(key)] == []


def test_a_difference_that_comes_after_the_result_only_warns(folder):
    late = log_text(42, label="quantized_sliding_window").replace("ttt_enabled: True", "ttt_enabled: False")
    rest = {f"train_seed{s}.log": log_text(s, label="quantized_sliding_window") for s in SEEDS[1:]}
    assert grades(folder({"train_seed42.log": late} | rest), "T4") == {"warn"}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"cap": 700.0}, {"warn"}), ({"cap": 599.0}, set()), ({"world": 1}, {"warn"}),
        ({"world": "8\n  force_stop_step: 4945"}, {"warn"}),
        ({"world": "8\n  force_stop_step: 4945", "train_ms": 601_500}, {"reject"}),
    ],
)  # fmt: skip
def test_caps_forced_stops_and_processes_are_those_of_a_record(folder, changed, expected):
    assert grades(folder(logs(**changed)), "T4") == expected


# ------------------------------------------------------------ metric
@pytest.mark.parametrize(
    ("num_bytes", "tokens", "rule", "expected"),
    [
        (151.05e6, TOKENS, "M1", set()), (151.05e6, 62_021_632, "M1", set()), (176.3e6, TOKENS, "M1", {"reject"}),
        (157.3e6, TOKENS, "M1", {"reject"}), (164.6e6, 47_851_520, "M1", {"reject"}),
        (155.77e6, 63_779_840, "M1", {"note"}),
        (150.95e6, TOKENS, "M1", {"warn"}), (151.05e6, TOKENS, "M2", set()), (125.7e6, 33_730_000, "M2", {"reject"}),
    ],
)  # fmt: skip
def test_the_metric_has_the_bytes_of_the_validation_text(folder, num_bytes, tokens, rule, expected):
    text = {f"train_seed{s}.log": log_text(s, loss=loss_of(BPB[s], tokens, num_bytes), tokens=tokens) for s in SEEDS}
    assert grades(folder(text), rule) == expected


def test_a_subset_warns_outside_the_record_track_and_is_a_note_where_the_readme_says_so(folder):
    few = {f"train_seed{s}.log": log_text(s, tokens=64_768, loss=loss_of(BPB[s], 64_768, 167_632)) for s in SEEDS}
    assert grades(folder(few, track="track_non_record_16mb"), "M2") == {"warn"}
    said = folder(few | {"README.md": README + "\nScored on a subset."}, track="track_non_record_16mb")
    assert grades(said, "M2") == {"note"}


def test_printed_digits_widen_the_interval(folder):
    text = {f"train_seed{s}.log": log_text(s).replace(f"{BPB[s]:.8f}", f"{BPB[s]:.4f}") for s in SEEDS}
    assert grades(folder(text), "M1") == set()


def test_shards_that_differ_and_the_signature_of_the_leak_are_found(folder):
    assert grades(folder({"train_seed42.log": log_text(42, shards=1)}), "M5") == {"warn"}
    assert grades(folder(logs(shards=1499), name="2026-04-10_Leak"), "M6") == {"reject"}
    assert grades(folder(logs(), name="2026-04-11_Good"), "M6") == set()


# ------------------------------------------------------------ claims
@pytest.mark.parametrize(
    ("claimed", "expected"),
    [
        (1.08137, set()),
        (1.0814, set()),
        (1.0650, {"reject"}),
        (1.08105, {"warn"}),
        (1.09, {"warn"}),
        (1.08177, {"warn"}),
    ],
)
def test_the_headline_is_the_mean_of_the_logs(folder, claimed, expected):
    readme = README.replace("1.08137", str(claimed))
    path = folder(
        {"submission.json": submission(val_bpb=claimed, seed_results=None, compliance=None), "README.md": readme}
    )
    assert grades(path, "H1") == expected


def test_a_claim_for_a_seed_that_its_log_does_not_print_is_found(folder):
    results = {str(s): {"val_bpb": BPB[s]} for s in SEEDS} | {"999": {"val_bpb": 1.0700}}
    messages = [f for f in findings(folder({"submission.json": submission(seed_results=results)}), "H1", "reject")]
    assert any("seed 999: 1.07 is claimed" in finding.message for finding in messages)


def test_a_stale_log_with_a_worse_score_is_rejected(folder):
    none = dict.fromkeys((f"train_seed{seed}.log" for seed in SEEDS), None)
    one = submission(
        val_bpb=1.15015359, seeds=None, seed_results=None, val_bpb_std=None, val_loss=None, compliance=None
    )
    files = none | {"submission.json": one, "train.log": log_text(1337, bpb=1.16660881), "README.md": "1.15015359"}
    assert grades(folder(files), "H1") == {"reject"}


def test_the_last_of_several_runs_in_one_log_counts(folder):
    path = folder({"train_seed42.log": log_text(42, bpb=1.2, model=16_500_000, hessians=460.0) + log_text(42)})
    assert [f for f in findings(path) if f.severity != "note"] == []


def test_a_copy_of_a_log_is_not_a_further_seed(folder):
    for number, seeds in enumerate(({"seeds": None, "seed_results": None}, {})):
        path = folder(
            {"train.log": log_text(42), "submission.json": submission(**seeds)}, name=f"2026-04-1{number}_Copy"
        )
        assert [f for f in findings(path) if f.severity != "note"] == [] and len(audit(path)[0].used) == 3
        assert [finding.file for finding in findings(path, "H2")] == ["train.log"]


def test_a_seed_without_a_log_and_a_log_without_a_use_are_found(folder):
    lacking = findings(folder({"train_seed999.log": None}), "H2", "warn")
    assert ["seed 999" in finding.message for finding in lacking] == [True]
    unused = findings(folder({"train_seed7.log": log_text(7)}, name="2026-04-10_More"), "H2", "warn")
    assert [finding.file for finding in unused] == ["train_seed7.log"]
    results = {"note": "best 3", "all_5_seeds": [1, 2, 42, 314, 999]}
    cut = log_text(999).partition("quantized_ttt")[0].replace("quantized val", "diagnostic quantized val")
    over = cut.replace(f"{MODEL}", "16200000").replace(f"{MODEL + len(SCRIPT)}", "16300000")
    assert grades(folder({"train_seed999.log": over}, name="2026-04-13_Cut"), "S1") == {"reject"}
    ended = findings(folder({"train_seed999.log": cut}, name="2026-04-12_Cut"))
    assert [(f.rule, f.file) for f in ended if f.severity != "note"] == [
        ("H2", "train_seed999.log"),
        ("N4", "submission.json"),
    ]
    chosen = folder({"submission.json": submission(disclosure=results)}, name="2026-04-11_Chosen")
    assert "lists 5 seeds" in findings(chosen, "H2", "warn")[0].message


def test_the_original_and_not_the_rerun_of_a_seed_is_used_where_it_is_what_is_claimed(folder):
    path = folder({"train_seed42_rerun.log": log_text(42, bpb=1.0790)})
    assert sorted(log.name for log in audit(path)[0].used) == [f"train_seed{s}.log" for s in sorted(SEEDS, key=str)]
    assert grades(path, "H2") == {"note"}


def test_a_result_of_a_later_evaluation_in_a_subfolder_is_found_there(folder):
    files = {f"train_seed{s}.log": log_text(s, bpb=BPB[s] + 0.001) for s in SEEDS}
    path = folder(files | {f"ttt/seed_{s}.log": log_text(s) for s in SEEDS})
    found = findings(path, "H1")
    assert {f.severity for f in found} == {"warn"} and all("another log" in f.message for f in found)
    assert [place.split(":")[0] for f in found for place in (f.file, *f.also)] == [
        f"ttt/seed_{s}.log" for s in (314, 42, 999)
    ]


def test_a_worse_line_after_the_result_is_found(folder):
    late = "final_int6_ttt val_loss:3.45000000 val_bpb:1.33603200 eval_time:90000ms\n"
    (finding,) = findings(folder({"train_seed42.log": log_text(42, extra=late)}), "H3")
    assert finding.severity == "warn" and "1.336032" in finding.message


def test_a_score_of_weights_before_they_were_stored_is_rejected(folder):
    results = {str(s): {"val_bpb": round(BPB[s] - 0.006, 8)} for s in SEEDS}
    mean = round(sum(BPB.values()) / 3 - 0.006, 6)
    path = folder({"submission.json": submission(val_bpb=mean, seed_results=results), "README.md": f"{mean}"})
    assert grades(path, "H4") == {"reject"} and grades(folder(name="2026-04-10_Good"), "H4") == set()


def test_a_costly_quantization_is_a_note(folder):
    text = {
        n: t.replace("quantized val_loss:2.84065044 val_bpb:", "quantized val_loss:2.9 val_bpb:1.2 old:")
        for n, t in logs().items()
    }
    assert grades(folder(text), "H3") == {"note"}


def test_the_readme_states_the_headline(folder):
    (finding,) = findings(folder({"README.md": README.replace("1.08137", "1.0700")}), "H1")
    assert finding.severity == "warn" and finding.file == "README.md"


def test_the_deviation_of_a_population_is_found(folder):
    values = list(BPB.values())
    population = round((sum((v - sum(values) / 3) ** 2 for v in values) / 3) ** 0.5, 5)
    (finding,) = findings(folder({"submission.json": submission(val_bpb_std=population)}), "N1")
    assert "the population's" in finding.message and "0.000373631" in finding.message


def test_bytes_total_that_is_a_mean_is_found(folder):
    (finding,) = findings(folder({"submission.json": submission(bytes_total=15_890_000)}), "N2")
    assert f"{MODEL + len(SCRIPT):,}" in finding.message


@pytest.mark.parametrize(("p", "expected"), [(0.00041, set()), (0.00082, set()), (0.05, {"warn"}), ("<0.001", set())])
def test_a_p_value_follows_from_its_t(folder, p, expected):
    path = folder({"submission.json": submission(t_statistic=-11.834, welch_df=3.306, p_value=p)})
    assert grades(path, "N3") == expected


def test_booleans_against_the_figures_are_found(folder):
    messages = [f.message for f in findings(folder(logs(train_ms=604_000, eval_ms=650_000)), "N4")]
    assert len(messages) == 2 and "train_under_600s" in messages[0] and "eval_under_600s" in messages[1]


# ------------------------------------------------------------ dialects
def test_a_source_dump_is_not_taken_for_what_the_log_says(folder):
    dump = 'log0("gptq:calibrating with 64 batches (using val data)...")\n    # gptq: calibrate using val data\n'
    dump += "seed: int = 7\n"
    dump += 'log0(f"final_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")\nworld_size = 4\n'
    after = (
        "# Total submission size int8+zlib: 17000000 bytes\nlog0(f'Code size: 70000 bytes')\n"  # of a second process
    )
    path = folder({"train_seed42.log": dump + "=" * 100 + "\nRunning Python 3.12.3\n" + log_text(42, extra=after)})
    assert [f for f in findings(path) if f.severity != "note"] == []


def test_the_early_dialect_is_read(folder):
    text = f"""val_loader:shards pattern=./data/fineweb_val_*.bin tokens:62021632
train_loader:dataset:fineweb10B_sp1024 train_shards:80
world_size:8 grad_accum_steps:1
tie_embeddings:True embed_lr:0.035 head_lr:0.0
parallel_residual:active=1 start_layer=7
seed:1337
step:7412/9000 val_loss:1.9303 val_bpb:1.1432 train_time:600001ms step_avg:80.95ms
Serialized model: 105783807 bytes
Code size: 64,415 bytes
Serialized model int6+zstd: 15624965 bytes (payload:100 raw_torch:200)
Total submission size int6+zstd: 15689380 bytes
final_int6_roundtrip_exact val_loss:1.94903166 val_bpb:1.15432633
final_int6_sliding_window val_loss:1.9110 val_bpb:1.1318 stride:64 eval_time:68889ms
final_int6_sliding_window_exact val_loss:{loss_of(1.13178056, 62_021_632):.8f} val_bpb:1.13178056
ttt_chunk [1891/1893] val_bpb=1.121468 time=409.5s
"""
    log = audit(folder({"train.log": text}))[0]
    log = next(log for log in log.logs if log.name == "train.log")
    assert (log.seed, log.get("val_tokens"), log.get("train_shards"), log.get("world_size")) == (1337, 62021632, 80, 8)
    assert (log.get("code"), log.get("model"), log.get("total"), log.get("train_s")) == (
        64415,
        15624965,
        15689380,
        600.001,
    )
    assert last_score(log).bpb == 1.13178056 and [s.kind for s in log.scores] == ["training"] + ["final"] * 3
    assert log.config["embed_lr"][0] == "0.035" and "parallel_residual" not in log.config


def test_the_dialect_of_this_project_is_read(folder):
    text = f"""run: logs/x
device:cuda (H100) processes:8 dtype:bfloat16 torch:2.9.1
settings (defaults): SEED=42 (1337), MATRIX_LR=0.02 (0.04)
validation: 1 shards, 40,540,160 targets (223 left off), 151,050,000 bytes, 3.7 bytes a target
training: 80 shards, 8,000,000,000 tokens, 786,432 a step
trained: steps:4550 train_time:588047ms step_avg:129.2ms epochs:0.4
artifact: model 15,900,000 + code = {15_900_000 + len(SCRIPT):,} bytes of 16,000,000, floor 0.00000
quantized val_loss:2.84065044 val_bpb:1.0850000 eval_time:18844ms
rules: none broken, as far as this run can tell
final_exact val_loss:{loss_of(1.08103):.8f} val_bpb:1.08103000 kind:ttt_score_first eval_time:318844ms compliant:1
"""
    path = folder({"train_seed42.log": text})
    assert [f for f in findings(path) if f.severity != "note"] == []
    broken = folder({"train_seed42.log": text.replace("compliant:1", "compliant:0")}, name="2026-04-10_Broken")
    assert grades(broken, "A1") == {"reject"}


def test_our_audit_is_read(folder):
    good = {
        "seed": 42,
        "passed": True,
        "proofs": {"future_flip": {"passed": True, "says": "x"}, "sum": {"passed": True}},
    }
    bad = {
        "seed": 42,
        "passed": False,
        "proofs": {"future_flip": {"passed": False, "says": "x"}, "sum": {"passed": True}},
    }
    assert grades(folder({"compliance_seed42.json": good}), "A1") == set()
    (finding,) = findings(folder({"compliance_seed42.json": bad}, name="2026-04-10_Bad"), "A1")
    assert finding.severity == "reject" and finding.message.endswith(": proofs.future_flip")
    assert finding.file == "compliance_seed42.json"
    for number, (script, expected) in enumerate({SCRIPT: set(), SCRIPT + "x = 1\n": {"reject"}}.items()):
        of_it = good | {"code_sha256": hashlib.sha256(SCRIPT.encode()).hexdigest()}
        packed = packed_scripts(script + "\n" * 2000)[
            "lzma alone"
        ]  # the readable twin beside the packed one is the audited
        files = {"train_gpt.py": packed, "train_gpt_readable.py": script, "compliance_seed42.json": of_it}
        assert grades(folder(files, name=f"2026-04-1{number}_Code"), "A1") == expected
    for number, empty in enumerate([{}, [], {"passed": "yes", "proofs": {"x": {}}}, "passed"]):
        assert grades(folder({"compliance_seed42.json": json.dumps(empty)}, name=f"2026-05-1{number}_E"), "A1") == {
            "warn"
        }


@pytest.mark.parametrize(
    "seeds",
    [
        {"seeds": [{"seed": s, "val_bpb": BPB[s]} for s in SEEDS], "seed_results": None},
        {"seeds": {str(s): BPB[s] for s in SEEDS}, "seed_results": None},
        {"seeds": [str(s) for s in SEEDS], "seed_results": None},
        {"seed_results": {f"seed_{s}": {"val_bpb": f"{BPB[s]}"} for s in SEEDS}},
        {"seed_results": [{"seed": s, "val_bpb": BPB[s]} for s in SEEDS]},
        {"seed_results": None, "seed_scores": list(BPB.values())},
    ],
)
def test_seeds_are_read_as_list_dict_strings_and_objects(folder, seeds):
    path = folder({"submission.json": submission(**seeds)})
    assert sorted(audit(path)[0].seeds) == sorted(SEEDS)
    assert [f for f in findings(path) if f.severity != "note"] == []


def test_a_log_in_utf_16_and_one_with_colours_are_read(folder):
    files = {"train_seed42.log": log_text(42).encode("utf-16")}
    files["train_seed999.log"] = "".join(f"1776144156.999 {line}\n" for line in log_text(999).splitlines())
    files["train_seed314.log"] = "".join(f"\x1b[32m[rank0]: {line}\n" for line in log_text(314).splitlines())
    path = folder(files)
    assert {log.seed for log in audit(path)[0].used} == set(SEEDS)
    assert all(log.dumped and log.config["matrix_lr"][0] == "0.02" for log in audit(path)[0].logs)
    assert [f for f in findings(path) if f.severity != "note"] == []


# ------------------------------------------------------------ script
def test_calibration_on_validation_data_is_rejected(folder):
    extra = "gptq:calibrating with 64 batches (using val data)...\n"
    assert grades(folder(logs(extra=extra)), "L2") == {"reject"}
    random_tokens = logs(extra="ttt_lora:warming up compile (random tokens, no val data)\n")
    assert grades(folder(random_tokens, name="2026-04-10_Good"), "L2") == set()


ADAPT = """
def adapt(model, val_tokens, optimizer, ttt_epochs):
    for epoch in range(ttt_epochs):
        loss = model(val_tokens)
        loss.backward()
        optimizer.step()
"""
INDIRECT = ADAPT.replace("val_tokens, optimizer", "val_data, optimizer").replace(
    "(val_tokens)", "(val_data.val_tokens)"
)
LEGAL = """
def eval_val_ttt(model, val_tokens, optimizer, ttt_epochs):
    for chunk in chunks(val_tokens):
        with torch.no_grad():
            loss_sum += model(chunk)
        if not is_last_chunk:
            for epoch in range(ttt_epochs):
                model(chunk).backward()
                optimizer.step()
"""
CALLER = """
def eval_phased(model, val_tokens, optimizer):
    for chunk in chunks(val_tokens):
        with torch.inference_mode():
            loss_sum += model(chunk)
        adapt(model, chunk, optimizer, 3)
"""


def test_training_on_validation_tokens_before_scoring_is_found(folder):
    assert grades(folder({"train_gpt.py": SCRIPT + ADAPT}), "L1") == {"warn"}
    assert grades(folder({"train_gpt.py": SCRIPT + INDIRECT}, name="2026-04-12_Indirect"), "L1") == {"warn"}
    assert grades(folder({"train_gpt.py": SCRIPT + LEGAL}, name="2026-04-10_Legal"), "L1") == set()
    assert grades(folder({"train_gpt.py": SCRIPT + ADAPT + CALLER}, name="2026-04-11_Caller"), "L1") == set()


def test_epochs_of_adaptation_in_the_log_before_the_only_score_are_rejected(folder):
    epochs = "".join(
        f"{kind}epoch:{i}/50 loss:2.{i} time:1.0s\n" for i, kind in enumerate(("ttt_", "ttt: ", "ttt "), 1)
    )
    text = {n: t.replace("ttt:start chunks", epochs + "ttt:start chunks") for n, t in logs().items()}
    (finding,) = findings(folder(text | {"train_gpt.py": SCRIPT + ADAPT}), "L1")
    assert finding.severity == "reject" and finding.file == "train_seed314.log" and finding.line > 0
    assert grades(folder(text, name="2026-04-10_NoPattern"), "L1") == set()


def test_names_that_were_ruled_out_are_listed_and_those_that_are_off_are_a_note(folder):
    on = SCRIPT + "\ndef slot_adapt(logits, full_key): ...\n"
    (finding,) = findings(folder({"train_gpt.py": on}), "L9")
    assert finding.severity == "warn" and "slot_adapt" in finding.message and "full_key" in finding.message
    off = SCRIPT + '\netlb_enabled = bool(int(os.environ.get("ETLB_ENABLED", "0")))\n'
    assert grades(folder({"train_gpt.py": off}, name="2026-04-10_Off"), "L9") == {"note"}
    fine = SCRIPT + "\nclass BigramHash: ...\n__slots__ = ()\n"
    assert grades(folder({"train_gpt.py": fine}, name="2026-04-11_Fine"), "L9") == set()


NEWER = ["x = {'a': 1}\ny = f'{x['a']}'", 'y = f"{chr(10) + "\\n"}"', "y = f'{\n1}'", 'y = f"{1 # one\n}"']
OLDER = [
    "x = {'a': 1}\ny = f\"{x['a']:>{3}}\"",
    "y = f'''{\n'a'}'''",
    "y = f'{1}\\n'",
    "y = f\"{f'{1}'}\" '\"'",
    "y = f'a\\\n{1}'",
]


@pytest.mark.parametrize("source", NEWER)
def test_an_f_string_of_python_3_12_warns_on_every_interpreter(folder, source):
    assert grades(folder({"train_gpt.py": SCRIPT + source + "\n"}), "P1") == {"warn"}


@pytest.mark.parametrize("source", OLDER)
def test_an_f_string_of_python_3_10_is_not_taken_for_a_newer_one(folder, source):
    assert grades(folder({"train_gpt.py": SCRIPT + source + "\n"}), "P1") == set()


def test_a_broken_script_and_a_newer_statement_are_found(folder):
    assert grades(folder({"train_gpt.py": SCRIPT + "def f(:\n"}), "P1") == {"reject"}
    both = SCRIPT + "x = {'a': 1}\ny = f'{x['a']}'\ndef f(:\n"
    assert grades(folder({"train_gpt.py": both}, name="2026-04-11_Both"), "P1") == {"reject"}
    deep = SCRIPT + "x = " + "-" * 200_000 + "1\n"
    assert grades(folder({"train_gpt.py": deep}, name="2026-04-12_Deep"), "P1") == {"warn"}
    newer = SCRIPT + "try:\n    pass\nexcept* ValueError:\n    pass\n"
    assert grades(folder({"train_gpt.py": newer}, name="2026-04-10_Newer"), "P1") == {"warn"}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from flash_attn_interface import flash_attn_func", {"warn"}), ("import os, triton.language as tl", {"warn"}),
        ("torch.cuda.set_device(0)", {"warn"}), ("x = torch.zeros(1).cuda()", {"warn"}),
        ("try:\n    import triton\nexcept ImportError:\n    triton = None", set()),
        ("if torch.cuda.is_available():\n    import triton", set()), ("def f():\n    import triton", set()),
        ("torch.backends.cuda.matmul.allow_tf32 = True", set()),
    ],
)  # fmt: skip
def test_what_an_import_needs_of_a_gpu_is_found(folder, code, expected):
    assert grades(folder({"train_gpt.py": SCRIPT + code + "\n"}), "P2") == expected


def test_variables_that_the_script_never_reads_are_found(folder):
    command = "```\nexport EMA_DECAY=0.99\nQAT\\_ON=1 MATRIX_LR=0.02 \\\n  # a comment\n"
    command += "CUDA_VISIBLE_DEVICES=0 torchrun train_gpt.py\n```\n"
    data = "```\nSHARDS=80 python data/prepare.py\nABLATE=1 python train_ablation.py\n```\nText with OTHER=1 outside.\n"
    (finding,) = findings(folder({"README.md": README + command + data, "train_ablation.py": "x = 1"}), "P4")
    assert finding.message.endswith(": EMA_DECAY, QAT_ON") and finding.severity == "warn"


def test_variables_that_are_read_by_a_helper_or_by_computed_names_are_read(folder):
    readme = README + "```\nMODEL_DIM=512 torchrun train_gpt.py\n```\n"
    helper = SCRIPT + "\nmodel_dim = _e('MODEL_DIM', 512, int)\n"
    computed = SCRIPT + "\nmodel_dim: int = 512\nfor k in vars(): os.environ.get(k.upper())\n"
    for name, script in (("2026-04-10_A", helper), ("2026-04-11_B", computed)):
        assert grades(folder({"README.md": readme, "train_gpt.py": script}, name=name), "P4") == set()


def test_traps_of_reviewers_machines_are_notes(folder):
    trap = "from dataclasses import dataclass\nimport os\nimport einops\n"
    trap += "@dataclass\nclass Hyperparameters:\n    x: int = 1\n"
    trap += "try:\n    import zstandard\n    CODEC = 'zstd'\nexcept ImportError:\n    CODEC = 'zlib'\n"
    path = folder({"train_gpt.py": trap})
    assert [("dataclass" in f.message, "zlib" in f.message, "einops" in f.message) for f in findings(path, "P5")].count(
        (False, False, False)
    ) == 0 and len(findings(path, "P5")) == 3
    (finding,) = findings(path, "D1")
    assert "GPT" in finding.message and "eval_val" in finding.message
    assert findings(folder(name="2026-04-10_Good"), "D1") == []


# ------------------------------------------------------------ what folders of other kinds have taught
PREQUANT = """
def pre_quant_adamw_ttt(h, device, val_data, model, optimizer):
    for epoch in range(h.prequant_ttt_epochs):
        for start in range(9):
            model(val_data.val_tokens[start]).backward()
        score = eval_val(h, device, val_data, model)

@torch.inference_mode()
def eval_val(h, device, val_data, model):
    return model(val_data.val_tokens)

def train_and_eval(h, device, val_data):
    eval_val(h, device, val_data, model)
    pre_quant_adamw_ttt(h, device, val_data, model, None)
"""


@pytest.mark.parametrize(
    "line", ["prequant_ttt:epoch {}/3 val_bpb=1.0{}", "prequant_ttt:epoch {}/3 chunk {}/9 lr=1e-4"]
)
def test_epochs_on_validation_tokens_that_print_their_score_or_chunk_are_rejected(folder, line):
    epochs = "".join(line.format(i, 9 - i) + "\n" for i in (1, 2, 3))
    text = {n: t.replace("pre-quantization post", epochs + "pre-quantization post") for n, t in logs().items()}
    path = folder(text | {"train_gpt.py": SCRIPT + PREQUANT})
    (finding,) = findings(path, "L1", "reject")
    assert (path / finding.file).read_text().splitlines()[finding.line - 1].startswith("prequant_ttt:epoch 1/3")
    assert {s.kind for s in audit(path)[0].logs[0].scores if "prequant_ttt" in s.label} <= {"training"}


HELPED = """
@torch.inference_mode()
def score_chunk(model, x):
    return model(x)
def eval_val_ttt(h, model, val_tokens):
    for ci in range(10):
        total += score_chunk(model, val_tokens[ci])
        for epoch in range(h.ttt_epochs):
            model(val_tokens[ci]).backward()
"""


def test_scoring_by_a_helper_before_each_chunks_epochs_is_seen(folder):
    chunks = "".join(f"ttt chunk {c}/9 epoch {e}/2 loss 2.1\n" for c in (1, 2) for e in (1, 2))
    anew = "".join(f"ttt epoch {e}/2 loss 2.1\n" for _ in range(2) for e in (1, 2))
    for number, lines in enumerate((chunks, anew, "ttt chunk 1/9 epoch 1/2 loss 2\nttt chunk 1/9 epoch 2/2 loss 2\n")):
        text = {n: t.replace("ttt:start", lines + "ttt:start") for n, t in logs().items()}
        path = folder(text | {"train_gpt.py": SCRIPT + HELPED}, name=f"2026-04-1{number}_Helped")
        assert grades(path, "L1") == set()
        path = folder(text | {"train_gpt.py": SCRIPT + ADAPT}, name=f"2026-05-1{number}_Unseen")
        assert grades(path, "L1") == {"warn"}  # the pattern alone: the log does not show that it is illegal
    before = HELPED.replace("    for ci in range(10):\n        total +=", "    total =").replace(
        "        for e", "    for e"
    )
    before = before.replace("            model(val", "        model(val").replace("[ci]", "")
    assert grades(folder({"train_gpt.py": SCRIPT + before}, name="2026-06-10_Whole"), "L1") == {"warn"}
    called = HELPED.replace("for epoch in range(h.ttt_epochs):", "adapt(model, val_tokens[ci], None, 3)")
    called = called.replace("            model(val_tokens[ci]).backward()\n", "")
    assert grades(folder({"train_gpt.py": SCRIPT + ADAPT + called}, name="2026-06-11_Called"), "L1") == set()


def test_a_call_to_a_helper_excuses_only_what_is_in_the_same_loop_over_chunks(folder):
    once = HELPED.replace("    for ci", "    total = score_chunk(model, val_tokens)\n    for ci")
    once = once.replace("        total += score_chunk(model, val_tokens[ci])\n", "")
    inner = HELPED.replace("for ci in range(10)", "for epoch in h.epochs").replace(
        "for epoch in range(h.ttt_epochs)", "if 1"
    )
    inner = inner.replace("        total +=", "        for ci in range(10):\n            total +=").replace(
        "        if 1:\n", ""
    )
    for number, code in enumerate((once, inner, HELPED.replace("@torch.inference_mode()\n", ""))):
        assert grades(folder({"train_gpt.py": SCRIPT + code}, name=f"2026-04-1{number}_A"), "L1") == {"warn"}


def test_a_score_inside_of_epochs_over_the_whole_text_excuses_nothing(folder):
    shown = """
def adapt(model, val_tokens, optimizer, ttt_epochs):
    for epoch in range(ttt_epochs):
        with torch.no_grad():
            shown = model(val_tokens)
        model(val_tokens).backward()
        optimizer.step()
"""
    chunks = shown.replace("    for epoch", "    for chunk in val_tokens:\n     for epoch").replace(
        "model(val", "model(chunk or val"
    )
    assert grades(folder({"train_gpt.py": SCRIPT + shown}), "L1") == {"warn"}
    assert grades(folder({"train_gpt.py": SCRIPT + chunks}, name="2026-04-10_Chunks"), "L1") == set()


def test_long_lines_and_many_functions_take_no_time(folder):
    lines = [f"{word} " * (20_000 // len(word)) for word in ("gptq ttt epoch 1/2", "collected hessian in", "gptq done")]
    many = "".join(f"def f{i}(val_tokens):\n    for epoch in range(3):\n        x.backward()\n" for i in range(800))
    readme = README + "\n```\npython " + "a" * 80_000 + "\n```\n```\n" + "python a \\\n" * 10_000 + "\n```\n"
    path = folder(logs(extra="\n".join(lines) + "\n") | {"train_gpt.py": SCRIPT + many, "README.md": readme})
    started = time.process_time()
    assert len(findings(path, "L1", "warn")[0].also) == 799
    for line in lines:
        assert not any(pattern.search(line) for _, pattern, _ in dialects.PATTERNS)
    assert portability.COMMAND.search("python " + "a" * 80_000)[1] is None
    dialects.parse_line(log := dialects.Log("x"), "x" * dialects.MAX_PARSED + " val_bpb:1.0", 1, True)
    assert log.scores == []
    assert time.process_time() - started < 4  # 0.6 s alone; minutes where a pattern is cubic


@pytest.mark.parametrize(
    ("seeds", "readme", "bpb", "expected"),
    [
        ({"seeds": list(SEEDS)}, "val_bpb 1.0814", 1.0829, {"warn"}),
        ({"n_seeds": 3}, "val_bpb 1.0814", 1.0829, {"warn"}),
        ({}, "val_bpb 1.0814, 3-seed mean", 1.0829, {"warn"}),
        ({}, "val_bpb 1.0814\n| 42 | 1.0860 |\n| 1 | 1.0814 |\n", 1.0860, {"warn"}),
        ({}, "val_bpb 1.0814", 1.0829, {"reject"}),
        ({"seeds": list(SEEDS)}, "val_bpb 1.0814", 1.0860, {"reject"}),
    ],
)
def test_a_mean_of_seeds_whose_logs_are_missing_is_not_called_wrong(folder, seeds, readme, bpb, expected):
    none = dict.fromkeys((f"train_seed{seed}.log" for seed in SEEDS), None)
    content = submission(**{"seeds": None, "seed_results": None, "val_loss": None, "val_bpb_std": None} | seeds)
    files = none | {"submission.json": content, "README.md": readme, "train_seed42.log": log_text(42, bpb=bpb)}
    found = [f for f in findings(folder(files), "H1")]
    assert {f.severity for f in found} == expected
    assert any("seeds can be recomputed" in f.message for f in found) == (expected == {"warn"})


def test_calibration_that_is_said_not_to_read_validation_data_is_fine(folder):
    for number, how in enumerate(("never using", "not using", "without", "doesn't calibrate when using")):
        path = folder(logs(extra=f"GPTQ calibration on own text, {how} validation data\n"), name=f"2026-04-1{number}_A")
        assert grades(path, "L2") == set()
    assert grades(folder(logs(extra="GPTQ calibration using validation data\n")), "L2") == {"reject"}


@pytest.mark.parametrize(
    ("changed", "record"),
    [
        ({"name": "11L + full ablation table, unlimited"}, True), ({"name": "Non-record: 4 hours"}, False),
        ({"track": "unlimited"}, False), ({"category": "ablation"}, False), ({"name": "Beats every non-record"}, True),
    ],
)  # fmt: skip
def test_the_track_is_not_guessed_from_a_word_of_the_title(folder, changed, record):
    assert audit(folder({"submission.json": submission(**changed)}))[0].record is record


def test_of_several_readmes_the_one_that_states_the_score_is_read(folder):
    plan = "# Plan\nbaseline 1.1000\n"
    assert audit(folder({"V9_README.md": plan}))[0].readme[0] == "README.md"
    files = {"README.md": None, "V19_README.md": README, "V21_README.md": plan}
    assert audit(folder(files, name="2026-04-10_A"))[0].readme[0] == "V19_README.md"
    assert audit(folder(files | {"V19_README.md": plan}, name="2026-04-11_B"))[0].readme[0] == "V21_README.md"


LUT = """
def luts(sp):
    base_bytes_np[i] = len(piece.encode("utf-8")){plus}
def count(x, y):
    return base_bytes_lut[y] + (has_leading_space_lut[y] & ~is_boundary_token_lut[x])
"""


def test_the_dialect_without_a_loss_is_read_and_its_space_that_is_counted_twice_is_rejected(folder):
    text = "seed: 42\nstep 100 | loss 3.2 | 131s\nTraining complete in 590s (1857 steps)\nEMA BPB (no XSA): 1.017970\n"
    text += "Quantized BPB (no XSA): 1.081030\nArtifact: 15,417,768 bytes (14.70 MB)\n"
    path = folder({"train_seed42.log": text, "train_gpt.py": SCRIPT + LUT.format(plus=" + 1")})
    log = next(log for log in audit(path)[0].used if log.seed == 42)
    assert [(s.kind, s.bpb) for s in log.scores] == [("unquantized", 1.01797), ("final", 1.08103)]
    assert (model_bytes(log), train_seconds(log)) == (15_417_768, 590)
    (finding,) = findings(path, "M3", "reject")
    assert (path / "train_gpt.py").read_text().splitlines()[finding.line - 1].strip().startswith("base_bytes_np[i]")
    once = LUT.format(plus=" + 1").replace(" + (has_leading_space_lut[y] & ~is_boundary_token_lut[x])", "")
    for number, code in enumerate((LUT.format(plus=""), once)):
        assert grades(folder({"train_gpt.py": SCRIPT + code}, name=f"2026-04-1{number}_Once"), "M3") == set()


@pytest.mark.parametrize(
    ("line", "reject"),
    [
        ("ppm_mixer val_bpb:{0} eval_time:9ms N_sidecar_bytes=151074499\nppm_sliding val_loss:2.45 val_bpb:{0}", set()),
        ("cond_ppm tokens=47851520 bytes=164594398 cond_mix_bpb={0}", {"M1"}),
        ("ppm_mix bytes=29365687 mix_bpb={0}", {"M2"}),
    ],
)
def test_a_mixture_over_bytes_is_called_so_and_its_own_bytes_are_checked(folder, line, reject):
    files = {f"train_seed{s}.log": log_text(s).partition("quantized_ttt")[0] + line.format(BPB[s]) for s in SEEDS}
    found = findings(folder(files))
    assert any(f.rule == "M1" and "byte mixture" in f.message for f in found)
    assert {f.rule for f in found if f.severity == "reject"} == reject
    assert not any("byte mixture" in f.message for f in findings(folder(name="2026-04-10_Mixed_int6"), "M1"))


def test_figures_of_submission_json_count_where_the_logs_are_silent(folder):
    results = {str(s): {"val_bpb": BPB[s], "train_wallclock_ms": 612_048, "eval_time_ms": 659_602} for s in SEEDS}
    content = submission(seed_results=results, bytes_total=16_071_321)
    assert [f.rule for f in findings(folder({"submission.json": content}), "", "reject")] == []
    silent = {}
    for name, text in logs().items():
        text = text.replace(" eval_time:366525ms", "").replace("588047ms", "?").replace(" bytes\n", "\n")
        silent[name] = text
    path = folder(silent | {"submission.json": content}, name="2026-04-10_Silent")
    assert {f.rule for f in findings(path, "", "reject")} == {"S1", "T1", "T2", "T3"}
    assert "612.048 s" in findings(path, "T2")[0].message
    each = {str(s): {"val_bpb": BPB[s], "artifact_bytes": 16_024_793} for s in SEEDS}
    path = folder(silent | {"submission.json": submission(seed_results=each)}, name="2026-04-11_Each")
    assert "16,024,793" in findings(path, "S1", "reject")[0].message
    each["42"].pop("artifact_bytes")  # of the others the logs say less
    files = {"train_seed42.log": silent["train_seed42.log"], "submission.json": submission(seed_results=each)}
    assert grades(folder(files, name="2026-04-12_Said"), "S1") == {"note"}


def test_variables_of_the_shell_are_not_the_scripts(folder):
    shell = "OUT=logs && SEED=42 torchrun train_gpt.py > $OUT/x.log\nexport ROOT=/x\nDIR=/y; ls\nROOT2=a; SEED=1 "
    shell += "torchrun train_gpt.py --data ${ROOT}\n"
    assert grades(folder({"README.md": f"{README}```\n{shell}```\n"}), "P4") == set()
    held = 'ENV_VARS="MATRIX_LR=1 \\\n  PHASED_TTT=1"\nenv SEED=$SEED $ENV_VARS torchrun train_gpt.py\n'
    held += "export EMA_ON=1 && torchrun train_gpt.py\n"
    (finding,) = findings(folder({"README.md": f"{README}```\n{held}```\n"}, name="2026-04-10_Held"), "P4")
    assert finding.message.endswith(": EMA_ON, PHASED_TTT")


def test_a_forced_stop_is_seen_by_its_traces_and_one_that_is_off_is_not(folder):
    steps = "".join(f"{i}/20000 train_loss: 3.1 train_time: 0.0m tok/s: 8\n" for i in range(100, 140))
    world = "8\n  train_log_every: 500\n  force_stop_step: -1"
    off = logs(world=world)
    assert grades(folder(off), "T4") == set()
    traced = {n: t.replace("4550/20000 val_loss", steps + "4550/20000 val_loss") for n, t in off.items()}
    assert "every step is logged" in findings(folder(traced, name="2026-04-10_Steps"), "T4", "warn")[0].message
    readme = README + "```\nFORCE_STOP_STEP=4920 SEED=42 torchrun train_gpt.py\n```\n"
    path = folder({"README.md": readme, "submission.json": submission(force_stop_step_set=4920)}, name="2026-04-11_B")
    (finding,) = findings(path, "T4", "warn")
    assert (finding.file, finding.also) == ("submission.json", [f"README.md:{len(readme.splitlines()) - 1}"])


def test_a_reader_that_goes_away_ends_neither_the_audit_nor_its_verdict(folder):
    good, bad = folder(), folder(logs(model=16_500_000), name="2026-04-10_Bad")
    command = [sys.executable, str(CHECK), *[str(good)] * 40, str(bad)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == 1


def test_a_folder_that_cannot_be_read_is_said_and_the_others_are_checked(folder, monkeypatch, capsys):
    good, real = folder(), reading_folders.read_logs
    odd = folder(name="2026-04-10_Odd")

    def failing(read, top):
        if read.path == odd:
            raise RecursionError("too deep")
        return real(read, top)

    monkeypatch.setattr(reading_folders, "read_logs", failing)
    assert main([str(odd), str(good)]) == 1
    out = capsys.readouterr().out
    assert "nothing was checked" in out and "OK: 0 reject, 0 warn" in out


def test_figures_that_are_no_scores_are_dropped(folder):
    path = folder(logs(extra="total val_bpb:40540.160000\n"))
    assert [f for f in findings(path) if f.severity != "note"] == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("ngram_hash = ngram_embed = 3\ndef free_slot(slot): return slot", set()), ("slot_lr = 1", {"warn"}),
        ("use_slot_steps = 1", {"warn"}), ("ngram_order = 3", {"warn"}), ("class A:\n    full_key: int = 1", {"warn"}),
    ],
)  # fmt: skip
def test_names_of_embeddings_and_loops_are_not_ruled_out(folder, code, expected):
    assert grades(folder({"train_gpt.py": f"{SCRIPT}\n{code}\n"}), "L9") == expected


def test_a_lambda_and_a_probed_expression_do_not_run_at_import(folder):
    fine = "f = lambda x: x.cuda()\ny = torch.zeros(1).cuda() if torch.cuda.is_available() else None\n"
    assert grades(folder({"train_gpt.py": SCRIPT + fine}), "P2") == set()
    bad = "f = [x.cuda() for x in y] if z else None\n"
    assert grades(folder({"train_gpt.py": SCRIPT + bad}, name="2026-04-10_Bad"), "P2") == {"warn"}


def test_a_second_submission_and_an_env_file_are_found(folder):
    second = {"other/submission.json": "{}", "other/train_gpt.py": "x = 1", ".env": "KEY=1"}
    assert {(f.severity, f.file) for f in findings(folder(second), "F2")} == {
        ("warn", "other/submission.json"),
        ("warn", ".env"),
    }
    assert grades(folder({"ttt/seed_7.log": log_text(7)}, name="2026-04-10_Logs"), "F2") == set()


@pytest.mark.parametrize(
    ("code", "counted"),
    [
        ('src = open("real.py").read()\nexec(src)', "real.py"),
        ('p = Path(__file__).with_name("real.py")\nexec(p.read_text())', "real.py"),
        ('subprocess.run([sys.executable, "real.py"])', "real.py"), ('exec(unpack(open("code.xz").read()))', "code.xz"),
        ('src = Path("state.c")\nsubprocess.run(["gcc", str(src)])', "state.c"),
        ('exec("1")\nprint("see real.py", open("final_model.bin"), "notes.json", "a.model")', None),
        ('print("real.py", "state.c")', None),
    ],
)  # fmt: skip
def test_files_that_are_loaded_in_two_steps_count_as_code(folder, code, counted):
    names = ("real.py", "code.xz", "state.c", "final_model.bin", "notes.json", "a.model")
    path = folder(dict.fromkeys(names, "x = 1\n" * 100) | {"train_gpt.py": f"{SCRIPT}\n{code}\n"})
    assert [script.name for script in audit(path)[0].scripts] == ["train_gpt.py"] + [counted] * bool(counted)


# ------------------------------------------------------------ robustness
VALUES = [
    None,
    True,
    -1,
    0,
    1e400,
    10**400,
    "",
    "x",
    "1.08",
    [],
    [1, None, "a", [2]],
    {},
    {"seed": {}},
    float("nan"),
    [[]],
    "\ud800",
]


@pytest.mark.parametrize(
    "key", [*submission(), "p_value", "t_statistic", "welch_df", "bytes_total", "runs", "seed", "disclosure"]
)
def test_a_wrong_type_under_any_key_of_submission_json_is_no_crash(folder, key):
    path = folder()
    for value in VALUES:
        (path / "submission.json").write_text(json.dumps(submission() | {key: value}))
        assert "X1" not in {f.rule for f in findings(path)}, value  # X1: a rule of the program failed


@pytest.mark.parametrize("key", ["val_bpb", "val_loss", "artifact_bytes", "eval_time_s", "calib_time_s", "seed"])
def test_a_wrong_type_under_any_key_of_a_seed_is_no_crash(folder, key):
    path = folder()
    for value in VALUES:
        results = {"42": {"val_bpb": 1.081, key: value}, "x": value, "314": value}
        for content in (results, list(results.values())):
            (path / "submission.json").write_text(json.dumps(submission(seed_results=content)))
            assert "X1" not in {f.rule for f in findings(path)}, content


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "null", "{", '{"val_bpb": NaN}', '"\\ud800"', "[" * 50_000, '{"a":' + "9" * 5000 + "}", "\0"],
)
def test_any_text_as_submission_json_is_no_crash(folder, text):
    assert {f.rule for f in findings(folder({"submission.json": text}))}  # something is always missing


def test_any_bytes_in_any_file_are_no_crash(folder):
    path, source = folder({"helper.py": "x = 1", "compliance_seed42.json": {"passed": True}}), random.Random(7)
    for _ in range(60):
        name = source.choice(sorted(os.listdir(path)))
        old = (path / name).read_bytes()
        cut, kind = source.randrange(len(old) + 1), source.randrange(4)
        noise = source.randbytes(40)
        new = (old[:cut], old[:cut] + noise + old[cut:], source.randbytes(3000), old[cut:] + old[:cut])[kind]
        (path / name).write_bytes(new)
        json.dumps(as_json(*audit(path)))
        assert "X1" not in {f.rule for f in findings(path)}, name
        (path / name).write_bytes(old)


def test_directories_empty_files_and_odd_names_are_no_crash(folder, tmp_path):
    path = folder({"train_seed42.log": "", "a\nb\x1b[31m.log": "nothing", "sub/deep/er/x.log": log_text(1)})
    (path / "train.log").mkdir()
    (path / "submission.json.d").mkdir()
    os.mkfifo(path / "train_fifo.log")
    (path / "loop.log").symlink_to(path / "loop.log")
    (path / os.fsdecode(b"bad\xff.log")).write_text(log_text(999))
    done = subprocess.run([sys.executable, str(CHECK), str(path)], capture_output=True, timeout=60)
    assert done.returncode in (0, 1) and b"\x1b" not in done.stdout and b"Traceback" not in done.stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    assert len(findings(empty, "F1", "reject")) == 4


def test_a_large_log_is_read_as_a_stream_and_quickly(folder):
    long_line, steps = "x" * 5_000_000 + "\n", "step:1/9 train_loss:6.2 train_time:816ms step_avg:81.61ms\n" * 100_000
    path = folder({"train_seed42.log": long_line + log_text(42).replace("warmup_step: 1/20\n", steps)})
    started = time.process_time()
    log = dialects.parse_log(path / "train_seed42.log")
    assert time.process_time() - started < 5  # 0.5 s alone: 100 MB in some ten seconds
    score, lines = last_score(log), (path / "train_seed42.log").read_text().split("\n")
    assert log.seed == 42 and lines[score.line - 1].startswith("quantized_ttt ") and score.bpb == BPB[42]
    path = folder({"train_seed42.log": long_line}, name="2026-04-10_Line")
    tracemalloc.start()
    dialects.parse_log(path / "train_seed42.log")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000  # of a line of 5 MB
    tracemalloc.stop()


def test_the_severity_of_a_finding_is_never_graver_than_its_rule_says(folder):
    order = {"reject": 0, "warn": 1, "note": 2}
    bad = logs(train_ms=700_000, eval_ms=700_000, model=17_000_000, shards=1499, tokens=1000, lr=0.1, world=1, cap=0)
    path = folder(bad | {"train_gpt.py": SCRIPT + ADAPT + "def f(:", "submission.json": submission(val_bpb=0.5)})
    for finding in findings(path):
        assert finding.severity == "note" or order[finding.severity] >= order[RULES[finding.rule].gravest], finding


# ------------------------------------------------------------ command line
def test_the_exit_status_is_0_without_1_with_a_reject_and_2_without_a_folder(folder, capsys):
    good, bad = folder(), folder(logs(model=16_500_000), name="2026-04-10_Bad")
    assert main([str(good)]) == 0
    assert main([str(good), str(bad)]) == 1
    out = capsys.readouterr().out
    assert "OK: 0 reject, 0 warn" in out and "REJECT: 1 reject" in out and "(train_seed314.log:" in out
    assert main([str(good), str(good / "absent")]) == 2
    assert main([str(good / "README.md")]) == 2
    assert "no such folder" in (error := capsys.readouterr().err) and error.rstrip().endswith(
        "give the folder that it is in"
    )


def test_the_rules_and_the_accepted_records_are_listed(capsys):
    assert main(["--rules"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name:3} {rule.gravest}" in f"\n{out}" for name, rule in RULES.items())
    assert "2026-05-01  1.0565  #2135" in out
    with pytest.raises(SystemExit):
        main([])


def test_json_is_one_document_of_the_described_form(folder, capsys):
    good, bad = folder(), folder(logs(model=16_500_000), name="2026-04-10_Bad")
    assert main(["--json", str(good), str(bad)]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["version"] == 1 and [entry["verdict"] for entry in document["folders"]] == ["ok", "reject"]
    entry = document["folders"][1]
    assert entry["mean_val_bpb"] == pytest.approx(1.08137) and entry["std_val_bpb"] == pytest.approx(
        0.0003736, abs=1e-7
    )
    assert [row["seed"] for row in entry["logs"]] == [314, 42, 999]
    assert entry["logs"][0]["shipped_bytes"] == 16_500_000 + len(SCRIPT) and entry["logs"][0]["train_s"] == 588.047
    assert entry["counts"]["reject"] == sum(f["severity"] == "reject" for f in entry["findings"]) == 1
    assert set(entry["findings"][0]) == {"rule", "severity", "message", "file", "line", "also", "source"}
