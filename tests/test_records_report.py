"""The page of runs: its numbers are the files', hostile text stays text, broken logs are named, a browser shows it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import statistics
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, prepare

import train_gpt as t

sys.path.insert(0, str(ROOT / "records"))
import report  # noqa: E402
from page import COLOURS, LOOK, Picture  # noqa: E402
from runs import MOST_RUNS, STAGES, ZSTD_LEVEL, Run, RunError, read_run, read_runs  # noqa: E402

HOSTILE = "</title><script>alert(1)</script>&amp; \"'$x_1$ #2f6fd0"


def final_event(settings: dict[str, Any], bpb: float, **figures: Any) -> dict[str, Any]:
    """The event that ends a log, as report() of the script writes it."""
    event = {
        "event": "final",
        "seed": settings["seed"],
        "kind": "ttt_score_first",
        "val_loss": bpb * 1.78,
        "val_bpb": bpb,
    }
    event |= {"num_targets": 64768, "num_bytes": 167632, "seconds": 18.8, "bytes_model": 965568, "eval_seconds": 18.84}
    event |= {
        "bytes_code": 95463,
        "bytes_total": 1061031,
        "compliant": False,
        "rule_breaks": {"data": "167632 bytes are few"},
    }
    return event | {"code_sha256": "65ece7", "settings": settings} | figures


def write_run(
    folder: Path, bpb: float = 1.947, steps: int = 30, trained: bool = True, **settings: Any
) -> list[dict[str, Any]]:
    """Writes a plausible metrics.jsonl and returns its events. The losses depend on the score, so that no two agree."""
    settings = {name: knob.default for name, knob in t.Hyperparameters.knobs().items()} | settings
    settings |= {"run_id": folder.name} | ({} if trained else {"eval_only": "logs/demo/final_model.bin"})
    events: list[dict[str, Any]] = [{"event": "config", "machine": "device:cpu (x86_64) processes:1", **settings}]

    def score(stage: str, value: float) -> None:
        figures = {
            "val_loss": 1.78 * value,
            "val_bpb": value,
            "num_targets": 64768,
            "num_bytes": 167632,
            "seconds": 1.5,
        }
        events.append({"event": "eval", "stage": stage, **figures})

    figures: dict[str, Any] = {}
    if trained:
        for step in sorted({1, 2, 5, *range(10, steps + 1, max(1, steps // 40))}):
            loss = 1.7 * bpb + 3.6 * 2.718 ** (-step / 12)
            events.append({"event": "train", "step": step, "train_loss": loss, "seconds": 0.65 * step, "lr_scale": 1.0})
            if step == steps // 2 // 10 * 10:
                score(f"step:{step}/{steps}", bpb + 0.4)
        score("raw", bpb + 0.0095)
        score("averaged", bpb + 0.0069)
        figures = {"steps": steps, "train_seconds": 0.65 * steps + 0.01, "export_seconds": 1.25}
    for stage, above in (("quantized", 0.0076), ("sliding", 0.0018), ("ttt", 0.0)):
        score(stage, bpb + above)
    events.append(final_event(settings, bpb, **figures))
    write_events(folder, events)
    return events


def write_events(folder: Path, events: list[Any], end: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + end)


def write_artifact(folder: Path, codec: str = "zstd", **overrides: Any) -> tuple[t.Hyperparameters, dict[str, Any]]:
    """Writes a real artifact of a tiny model into a run; returns its settings and weights."""
    h = t.Hyperparameters(**{**TINY, **overrides})
    weights = dict(t.GPT(h).named_parameters())
    blob = t.encode(h, t.quantize_weights(prepare(h, weights), 0.0), 0.0, codec)
    (folder / "final_model.bin").write_bytes(blob)
    return h, weights


def encode_as(name: str, bits: object, values: torch.Tensor, scales: torch.Tensor | None) -> bytes:
    """An artifact of one tensor whose header says what it likes, with a checksum that is right."""
    body = b"".join(part.numpy().tobytes() for part in (values, scales) if part is not None)
    header = json.dumps({"model": {}, "floor": 0.0, "tensors": [(name, bits, list(values.shape))]}).encode()
    payload = struct.pack("<I", len(header)) + header + body
    covered = t.PREFIX.pack(t.MAGIC, b"", t.VERSION, t.CODECS["none"], len(payload))[20:] + payload
    return t.MAGIC + hashlib.sha256(covered).digest()[:16] + covered


class Page(HTMLParser):
    """What a page holds: tags, ids, texts, attributes, and (text, exact value) of its numbers."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.texts, self.numbers = Counter(), [], [], []
        self.text, self.value = text, None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        self.value = dict(attrs).get("value") if tag == "data" else None

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.value is not None:
            self.numbers.append((data, float(self.value)))
            self.value = None

    @property
    def values(self) -> set[float]:
        return {value for _, value in self.numbers}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Page]:
    """Makes the page of folders; without its PNGs, which take the time."""
    monkeypatch.setattr(report, "to_png", lambda picture: b"")

    def make(*folders: Path) -> Page:
        assert report.main([*map(str, folders), "--out", str(tmp_path / "out")]) == 0
        return Page((tmp_path / "out" / "index.html").read_text())

    return make


def fail(capsys: pytest.CaptureFixture[str], *folders: Path) -> str:
    """Returns the message with which the report of folders fails."""
    assert report.main(list(map(str, folders))) == 2
    assert not list(folders[0].glob("report/*"))
    return capsys.readouterr().err


def draw(*folders: Path) -> dict[str, Picture]:
    return report.draw_all(read_runs(list(map(str, folders))))


# ---------------------------------------------------------------------------------------------------- numbers


def test_the_numbers_of_a_page_are_those_of_the_files(tmp_path: Path, make: Callable[..., Page]) -> None:
    events = write_run(tmp_path / "a", bpb=1.9470030212345, seed=7)
    page, final = make(tmp_path / "a"), events[-1]
    names = (
        "val_bpb",
        "val_loss",
        "bytes_total",
        "bytes_model",
        "bytes_code",
        "eval_seconds",
        "train_seconds",
        "steps",
    )
    assert {final[name] for name in names} <= page.values
    assert {event["val_bpb"] for event in events if event.get("stage") in STAGES} <= page.values
    losses = [event["train_loss"] for event in events if event["event"] == "train"]
    assert {losses[0], losses[-1], 7.0, 30 * 786_432.0} <= page.values
    assert ("1.94700", 1.9470030212345) in page.numbers and ("1,061,031", 1061031.0) in page.numbers
    for text, value in page.numbers:  # what is shown is the value, rounded
        places = len(text.partition(".")[2])
        assert abs(float(text.replace(",", "")) - value) <= 0.5 * 10**-places + 1e-9, (text, value)


def test_the_curves_run_through_the_logged_points(tmp_path: Path) -> None:
    events = write_run(tmp_path / "a", steps=40, train_batch_tokens=1024)
    train = [event for event in events if event["event"] == "train"]
    raw = next(event for event in events if event.get("stage") == "raw")
    x = {"steps": [e["step"] for e in train], "seconds": [e["seconds"] for e in train]}
    x["tokens"] = [1024 * step for step in x["steps"]]
    last = {"steps": 40, "seconds": events[-1]["train_seconds"], "tokens": 40 * 1024}
    middle = {"steps": 20, "seconds": 0.65 * 20, "tokens": 20 * 1024}
    for unit, expected in x.items():
        axes = draw(tmp_path / "a")[f"loss_{unit}"].figure.axes[0]
        assert axes.lines[0].get_xdata().tolist() == expected
        assert axes.lines[0].get_ydata().tolist() == [e["train_loss"] for e in train]
        dots = axes.collections[0].get_offsets().tolist()
        assert dots == [[pytest.approx(middle[unit]), pytest.approx(1.78 * 2.347)], [last[unit], raw["val_loss"]]]


def test_the_first_steps_of_a_long_run_leave_the_frame_and_the_page_says_so(tmp_path: Path) -> None:
    write_run(tmp_path / "short", steps=300)
    write_run(tmp_path / "long", steps=7000)
    short, long = draw(tmp_path / "short")["loss_steps"], draw(tmp_path / "long")["loss_steps"]
    first = long.figure.axes[0].lines[0].get_ydata()[0]
    assert short.figure.axes[0].get_ylim()[1] > first and short.caption == ""
    assert long.figure.axes[0].get_ylim()[1] < first and f"up to {first:.2f}" in long.caption


def test_the_ladder_has_its_differences_written(tmp_path: Path, make: Callable[..., Page]) -> None:
    write_run(tmp_path / "a", bpb=1.5)
    write_run(tmp_path / "b", bpb=1.25, trained=False)
    texts = make(tmp_path / "a").texts
    for text in ("1.50950", "\N{MINUS SIGN}0.00260", "+0.00070", "\N{MINUS SIGN}0.00580", "\N{MINUS SIGN}0.00180"):
        assert texts.count(text) == 2, text  # in the figure and in the table
    several = make(tmp_path / "a", tmp_path / "b").texts
    assert several.count("\N{MINUS SIGN}0.00580") == 2 and several.count("\N{MINUS SIGN}0.00260") == 1


def test_a_stage_that_was_left_out_is_bridged(tmp_path: Path, make: Callable[..., Page]) -> None:
    events = write_run(tmp_path / "a", bpb=1.5)
    write_events(tmp_path / "a", [event for event in events if event.get("stage") != "sliding"])
    page = make(tmp_path / "a")
    assert "\N{MINUS SIGN}0.00760" in page.texts and "sliding" not in page.texts[page.texts.index("raw") :][:9]


def test_mean_and_sample_deviation_are_over_the_seeds_of_equal_settings(
    tmp_path: Path, make: Callable[..., Page]
) -> None:
    scores = [1.123456, 1.12701, 1.119]
    folders = [tmp_path / name for name in ("a", "b", "c", "other_setting", "other_script")]
    for seed, (folder, bpb) in enumerate(zip(folders, [*scores, 1.9, 1.8])):
        events = write_run(folder, bpb=bpb, seed=seed, audit=seed == 1, matrix_lr=0.02 if seed == 3 else 0.027)
        if folder.name == "other_script":
            write_events(folder, [*events[:-1], events[-1] | {"code_sha256": "other"}])
    page = make(*folders)
    rounded = {round(value, 12) for value in page.values}
    assert {round(statistics.fmean(scores), 12), round(float(np.std(scores, ddof=1)), 12)} <= rounded
    begin = page.texts.index("Mean over seeds")
    row = page.texts[begin : page.texts.index("Loss")]  # of one group: heads, names, n, figures, seeds
    assert row[8:12] == ["a", "b", "c", "3"] and row[-1] == "0, 1, 2" and "other_setting" not in row
    assert page.texts.count("MATRIX_LR=0.02") == 1


def test_when_a_run_was_and_what_it_showed_is_no_difference(tmp_path: Path, make: Callable[..., Page]) -> None:
    for seed, folder in enumerate((tmp_path / "a", tmp_path / "b")):
        events = write_run(folder, seed=seed, tensorboard=seed == 1)
        write_events(folder, [event | {"time": 1e9 + 1000 * seed + i} for i, event in enumerate(events)])
    page = make(tmp_path / "a", tmp_path / "b")
    assert "there is no mean over seeds" not in page.text and "TIME=" not in page.text
    assert page.texts.count("none") == 2  # settings that differ


def test_a_seed_that_is_there_twice_is_named_and_none_is_dropped(tmp_path: Path, make: Callable[..., Page]) -> None:
    for name, bpb in (("a", 1.5), ("b", 1.6)):
        write_run(tmp_path / name, bpb=bpb, seed=3)
    page = make(tmp_path / "a", tmp_path / "b")
    assert "3, 3: one is there more than once" in page.texts and 1.55 in page.values


def test_runs_without_a_common_setting_have_no_mean(tmp_path: Path, make: Callable[..., Page]) -> None:
    write_run(tmp_path / "a", num_layers=4, mlp_bits=5)
    write_run(tmp_path / "b", num_layers=4, mlp_bits=4, eval_stride=32)
    write_run(tmp_path / "c", num_layers=4, beta1=0.8, beta2=0.9, muon_wd=0.0)
    page = make(tmp_path / "a", tmp_path / "b")
    assert "there is no mean over seeds" in page.text and "Mean over seeds" not in page.text
    different = {"MLP_BITS=5", "MLP_BITS=4, EVAL_STRIDE=32"}
    assert different <= set(page.texts)  # what differs stands in the rows of the runs,
    assert page.texts.count("NUM_LAYERS") == 1 and "NUM_LAYERS=4" not in page.text  # what is common below, once
    assert "MLP_BITS" not in page.texts
    page = make(tmp_path / "a", tmp_path / "c")
    assert "<summary>3 settings</summary>MUON_WD=0.0, BETA1=0.8, BETA2=0.9<" in page.text


# ---------------------------------------------------------------------------------------------------- bytes and seconds


@pytest.mark.parametrize("codec", list(t.CODECS))
def test_the_bytes_are_those_of_the_artifact_by_its_own_bits(tmp_path: Path, codec: str) -> None:
    write_run(tmp_path / "a", mlp_bits=6)
    h, weights = write_artifact(tmp_path / "a", codec, mlp_bits=5, fp16_keep_name_patterns="tok_emb")
    parts = {(part.family, part.bits): part for part in read_runs([str(tmp_path / "a")])[0].parts}
    values, stored = Counter(), Counter()
    for name, w in weights.items():
        key = (t.param_group_of(name).name, t.stored_bits(h, name))
        values[key] += w.numel()
        stored[key] += 2 * w.numel() if key[1] == 16 else w.numel() + 2 * len(w)
    assert ("mlp", 5) in values and ("embedding", 8) in values and ("embedding", 16) in values
    assert {key: part.values for key, part in parts.items()} == values | {("header", 0): 0}
    header = parts.pop(("header", 0))
    assert {key: part.stored for key, part in parts.items()} == stored
    blob = (tmp_path / "a" / "final_model.bin").read_bytes()
    if codec == "rans":  # tables and classes stand for the codes there
        assert 0.9 * len(blob) < sum(part.alone for part in parts.values()) < len(blob)
        return
    assert header.stored + sum(stored.values()) == t.PREFIX.unpack_from(blob)[4]
    codes, scales = zip(
        *(
            t.quantize_rows(w.detach(), t.row_clips(w.detach()), 5, 0.0)
            for name, w in weights.items()
            if t.param_group_of(name).name == "mlp"
        )
    )
    whole = b"".join(part.numpy().tobytes() for part in (*codes, *scales))
    alone = t.require("zstandard", "").ZstdCompressor(level=ZSTD_LEVEL).compress(whole)
    assert parts["mlp", 5].alone == len(alone)


def test_the_page_tells_clip_and_error_of_each_quantized_family(tmp_path: Path, make: Callable[..., Page]) -> None:
    events = write_run(tmp_path / "a")
    write_artifact(tmp_path / "a")
    told = {"event": "stored", "family": "mlp", "weights": 9, "bits": 4.5, "bytes": 5, "clip": 0.8125, "error": 0.0625}
    write_events(tmp_path / "a", [*events[:-1], told, events[-1] | {"calibration_seconds": 7.25}])
    page = make(tmp_path / "a")
    assert {0.8125, 0.0625, 7.25} <= page.values and ">6.25%<" in page.text
    told["error"] = "much"
    write_events(tmp_path / "a", [*events[:-1], told, events[-1]])
    with pytest.raises(RunError, match="error of event stored"):
        read_runs([str(tmp_path / "a")])


def test_the_page_tells_the_parts_of_the_artifact_and_its_real_size(tmp_path: Path, make: Callable[..., Page]) -> None:
    events = write_run(tmp_path / "a")
    write_artifact(tmp_path / "a")
    size = (tmp_path / "a" / "final_model.bin").stat().st_size
    write_events(tmp_path / "a", [*events[:-1], events[-1] | {"bytes_model": size}])
    page, run = make(tmp_path / "a"), read_runs([str(tmp_path / "a")])[0]
    assert run.notes == [] and 'class="card notes"' not in page.text
    for part in run.parts:
        assert {part.alone, part.stored} <= page.values and f"{part.alone:,} bytes" in page.texts
    assert {size, sum(part.alone for part in run.parts)} <= page.values and "95,463 bytes" in page.texts
    write_run(tmp_path / "b")
    assert f"{size + 95463:,} bytes" in make(tmp_path / "a", tmp_path / "b").texts


@pytest.mark.parametrize(
    ("damage", "note"),
    [
        (None, "no final_model.bin here: no bytes by family"),
        (lambda blob: b"PK" + blob[2:], "is not an artifact of this script"),
        (lambda blob: blob[:20] + b"\x09" + blob[21:], "format version 9"),
        (lambda blob: blob[:-1], "is truncated or damaged"),
        (lambda blob: blob, "but the run reported 965,568"),
    ],
)
def test_a_missing_or_damaged_artifact_is_named_and_the_rest_is_drawn(
    tmp_path: Path, make: Callable[..., Page], damage: Callable[[bytes], bytes] | None, note: str
) -> None:
    write_run(tmp_path / "a")
    write_artifact(tmp_path / "a")
    file = tmp_path / "a" / "final_model.bin"
    file.unlink() if damage is None else file.write_bytes(damage(file.read_bytes()))
    page = make(tmp_path / "a")
    assert note in page.text and page.tags["figure"] == (6 if "reported" in note else 5)


def test_an_artifact_of_another_checksum_than_reported_is_named(tmp_path: Path) -> None:
    events = write_run(tmp_path / "a")
    write_artifact(tmp_path / "a")
    size = (tmp_path / "a" / "final_model.bin").stat().st_size
    write_events(tmp_path / "a", [*events[:-1], events[-1] | {"bytes_model": size, "artifact_sha256": "0" * 64}])
    assert "another SHA-256" in read_runs([str(tmp_path / "a")])[0].notes[0]


def test_the_seconds_are_those_that_the_run_clocked(tmp_path: Path, make: Callable[..., Page]) -> None:
    events = write_run(tmp_path / "a")
    clocked = {
        "train": events[-1]["train_seconds"],
        "validation": 4.5,
        "export": 1.25,
        "other scores": 3.0,
        "score": 18.84,
    }
    assert read_runs([str(tmp_path / "a")])[0].seconds() == clocked
    assert set(clocked.values()) <= make(tmp_path / "a").values
    figures = {"preflight_seconds": 5.5, "load_seconds": 0.5, "eval_seconds_strict": 24.875}
    write_events(tmp_path / "a", [*events[:-1], events[-1] | figures])
    assert read_runs([str(tmp_path / "a")])[0].seconds() == clocked | {"preflight": 5.5, "load": 0.5}
    assert set(figures.values()) <= make(tmp_path / "a").values
    write_events(tmp_path / "a", [event for event in events[:-1] if event.get("stage") != "ttt"])
    unfinished = {"train": 19.5, "validation": 4.5, "other scores": 3.0}  # up to the last line of the training
    assert read_runs([str(tmp_path / "a")])[0].seconds() == unfinished


# ---------------------------------------------------------------------------------------------------- rules


def test_broken_rules_are_named(tmp_path: Path, make: Callable[..., Page]) -> None:
    events = write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    write_events(tmp_path / "a", [*events[:-1], events[-1] | {"rule_breaks": {"data": "few bytes", "size": "too big"}}])
    assert "<b>no</b><small>few bytes; too big</small>" in make(tmp_path / "a").text
    assert ">no<small>few bytes</small><small>too big</small><" in make(tmp_path / "a", tmp_path / "b").text


@pytest.mark.parametrize("compliant", [True, False])
@pytest.mark.parametrize("audit", [None, True, False])
def test_a_run_keeps_the_rules_only_if_its_audit_did_not_fail(
    tmp_path: Path, compliant: bool, audit: bool | None
) -> None:
    events = write_run(tmp_path / "a")
    events[-1] |= {"compliant": compliant, "rule_breaks": {} if compliant else {"size": "too big"}}
    events[-1] |= {"artifact_sha256": "5b4b"}
    write_events(tmp_path / "a", events)
    proofs = {"future_flip": {"passed": audit}, "network": {"passed": True}}
    if audit is not None:
        content = {"passed": audit, "proofs": proofs, "artifact_sha256": "5b4b"}
        (tmp_path / "a/compliance.json").write_text(json.dumps(content))
    kept, says = read_runs([str(tmp_path / "a")])[0].verdict()
    assert kept == ("yes" if compliant and audit is not False else "no")
    told = {None: [], True: ["audit passed"], False: ["audit failed: future_flip"]}[audit]
    assert says == ([] if compliant else ["too big"]) + told


def test_an_audit_of_another_artifact_says_nothing_and_a_broken_one_is_an_error(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    (tmp_path / "a/compliance.json").write_text('{"passed": true, "proofs": {}, "artifact_sha256": "another"}')
    (run,) = read_runs([str(tmp_path / "a")])
    assert run.audit == {} and "compliance.json is of another artifact" in run.notes[-1]
    for text in ("{", "[]", '{"passed": true}', '{"passed": true, "proofs": {"x": 5}}', "[" * 100_000):
        (tmp_path / "a/compliance.json").write_text(text)
        with pytest.raises(RunError, match="compliance.json is no audit"):
            read_runs([str(tmp_path / "a")])


# ---------------------------------------------------------------------------------------------------- what is missing


def test_a_run_that_never_finished_is_shown_as_far_as_it_came(tmp_path: Path, make: Callable[..., Page]) -> None:
    events = write_run(tmp_path / "a")
    stop = next(i for i, event in enumerate(events) if event.get("step") == 10)
    write_events(tmp_path / "a", events[: stop + 1], end='{"event": "train", "st')
    page = make(tmp_path / "a")
    assert "unfinished: the log ends after step 10, without a final score" in page.text
    assert f"line {stop + 2} of metrics.jsonl is cut off" in page.text
    assert page.tags["figure"] == 4 and events[stop]["train_loss"] in page.values  # curves, and the phases that ended
    write_run(tmp_path / "b")
    assert '<td class="short">unfinished</td>' in make(tmp_path / "b", tmp_path / "a").text


def test_an_empty_log_makes_a_page_that_says_so(tmp_path: Path, make: Callable[..., Page]) -> None:
    write_events(tmp_path / "a", [])
    page = make(tmp_path / "a")
    assert "unfinished: the log ends, without a final score" in page.text and page.tags["figure"] == 0


def test_a_run_without_training_has_no_curves_and_leaves_none_of_an_earlier_page(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    out = tmp_path / "out"
    assert report.main([str(tmp_path / "a"), "--out", str(out)]) == 0
    names = {"index.html", "loss_steps.png", "loss_tokens.png", "loss_seconds.png", "ladder.png", "seconds.png"}
    assert {path.name for path in out.iterdir()} == names
    (out / "mine.png").write_bytes(b"kept")
    write_run(tmp_path / "b", trained=False)
    assert report.main([str(tmp_path / "b"), "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"index.html", "ladder.png", "seconds.png", "mine.png"}
    page = Page((out / "index.html").read_text())
    assert "Loss against" not in page.text and "it scored logs/demo/final_model.bin" in page.text


def test_the_page_lies_in_the_first_run_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "to_png", lambda picture: b"")
    write_run(tmp_path / "a")
    assert report.main([str(tmp_path / "a")]) == 0
    assert (tmp_path / "a" / "report" / "index.html").is_file()


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"event": "train", "step": 1,', "metrics.jsonl:3 is not JSON"),
        ("\udcff", "metrics.jsonl:3 is not JSON"),
        ("[" * 100_000, "metrics.jsonl:3 is not JSON"),
        ("[1]", 'metrics.jsonl:3 is no object with a text "event"'),
        ('{"event": 5}', 'metrics.jsonl:3 is no object with a text "event"'),
        ('{"event": "train", "step": 1, "seconds": 1}', "metrics.jsonl:3: train_loss of event train is None"),
        ('{"event": "train", "step": true, "train_loss": 1, "seconds": 1}', "step of event train is True"),
        ('{"event": "train", "step": 1, "train_loss": NaN, "seconds": 1}', "train_loss of event train is nan"),
        ('{"event": "config", "seed": 1, "train_batch_tokens": 8, "machine": "m"}', "has two config events"),
    ],
)
def test_a_broken_log_is_an_error_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    events = write_run(tmp_path / "a")
    lines = [json.dumps(event) for event in events]
    text = "\n".join([*lines[:2], line, *lines[2:], ""])
    (tmp_path / "a" / "metrics.jsonl").write_text(text, errors="surrogateescape")
    assert message in fail(capsys, tmp_path / "a")


@pytest.mark.parametrize("value", ["7", True, 10**400, None])
def test_a_figure_of_the_training_that_is_no_number_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: object
) -> None:
    events = write_run(tmp_path / "a")
    write_events(tmp_path / "a", [*events[:-1], events[-1] | {"train_seconds": value}])
    assert "train_seconds of event final is" in fail(capsys, tmp_path / "a")


def test_what_is_no_run_is_an_error_that_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = write_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    assert "empty has no metrics.jsonl: give the folder of a run" in fail(capsys, tmp_path / "empty")
    assert "gone has no metrics.jsonl" in fail(capsys, tmp_path / "gone")
    assert "is given twice" in fail(capsys, tmp_path / "a", tmp_path / "empty" / ".." / "a")
    assert "25 runs are more than the 24" in fail(capsys, *[tmp_path / "a"] * 25)
    write_events(tmp_path / "a", events[1:])
    assert "has no config event" in fail(capsys, tmp_path / "a")
    write_events(tmp_path / "a", [event for event in events if event["event"] != "train"])
    assert "has no train event" in fail(capsys, tmp_path / "a")


def test_a_crash_while_writing_leaves_the_page_before_it(
    tmp_path: Path, make: Callable[..., Page], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a", bpb=1.5)
    before = make(tmp_path / "a").text
    write_run(tmp_path / "a", bpb=1.6)
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(target).name == "index.html":  # the last one, after the PNGs
            raise OSError("No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    assert report.main([str(tmp_path / "a"), "--out", str(tmp_path / "out")]) == 2
    assert "No space left" in capsys.readouterr().err and (tmp_path / "out" / "index.html").read_text() == before


# ---------------------------------------------------------------------------------------------------- the page itself


def hostile_runs(folder: Path) -> list[Path]:
    """Runs whose every text is hostile: names, settings, reasons, kind."""
    folders = [folder / HOSTILE.replace("/", "\N{DIVISION SLASH}"), folder / "_a", folder / "line\nfeed \udcff"]
    for path in folders:
        events = write_run(path, data_path=HOSTILE, surprise=HOSTILE)
        events[0] |= {"machine": HOSTILE}
        events[-1] |= {"rule_breaks": {HOSTILE: HOSTILE, "n": 5}, "kind": HOSTILE}
        write_events(path, [*events, {"event": "of a newer script"}])
    return folders


@pytest.mark.parametrize("count", [1, 3])
def test_hostile_text_stays_text(tmp_path: Path, make: Callable[..., Page], count: int) -> None:
    page = make(*hostile_runs(tmp_path / "x")[:count])
    assert page.tags["script"] == 0 and page.tags["title"] == 1
    assert HOSTILE in page.texts  # as it is: neither swallowed, nor read as markup, mathematics or a colour
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_a_dollar_in_a_name_begins_no_mathematics(tmp_path: Path, make: Callable[..., Page]) -> None:
    for name in ("$x_1$", "b"):
        write_run(tmp_path / name)
    page = make(tmp_path / "$x_1$", tmp_path / "b")
    assert re.search(r"<text [^>]*>\$x_1\$</text>", page.text)


def test_a_hostile_artifact_is_named_or_drawn_and_never_a_crash(tmp_path: Path, make: Callable[..., Page]) -> None:
    write_run(tmp_path / "a")
    h, weights = write_artifact(tmp_path / "a")
    values = torch.zeros(4, 3, dtype=torch.int8)
    for entry, drawn in (
        (("<b>", 8, values, torch.zeros(4, 1).half()), True),
        (("x", "6", values, torch.zeros(4, 1).half()), True),
        (("x", 24, values.half(), None), True),
        (("x", 6, values[0, 0], None), False),
    ):
        name, bits, codes, scales = entry
        blob = encode_as(name, bits, codes, scales)
        (tmp_path / "a" / "final_model.bin").write_bytes(blob)
        page = make(tmp_path / "a")
        assert ("no bytes by family" in page.text) != drawn and page.tags["figure"] == 5 + drawn, entry
        assert page.tags["script"] == 0 and "other" in page.text or not drawn


def test_a_name_like_a_private_one_is_in_the_legend_of_the_png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = draw(*hostile_runs(tmp_path / "x"))
    picture = pictures["loss_steps"]
    with matplotlib.rc_context(LOOK):
        report.to_png(picture)
    texts = [text.get_text() for text in picture.figure.legends[0].get_texts()]
    assert len(texts) == 3 and texts[1] == "_a"


def test_a_page_needs_nothing_but_itself(tmp_path: Path, make: Callable[..., Page]) -> None:
    for name in "ab":
        write_run(tmp_path / name)
        write_artifact(tmp_path / name)
    page = make(tmp_path / "a", tmp_path / "b")
    ids = [value for name, value in page.attributes if name == "id"]
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href") and value != "data:,"]
    targets = links + re.findall(r"url\(([^)]*)\)", page.text)
    assert len(ids) == len(set(ids)) and len(targets) > 50 and {target[1:] for target in targets} <= set(ids)
    assert all(target.startswith("#") for target in targets)
    assert page.tags["script"] == page.tags["iframe"] == page.tags["img"] == 0 and page.tags["style"] == 1
    assert (
        "@import" not in page.text
        and "default-src 'none'" in page.text
        and "http" not in page.text.replace("http-equiv", "")
    )
    assert page.tags["figure"] == 6 and sum(value == "img" for name, value in page.attributes if name == "role") == 6
    labels = dict.fromkeys(value for name, value in page.attributes if name == "aria-label")
    assert "Train loss against steps, in nats a token: a from" in " ".join(map(str, labels))


def test_all_colours_of_the_figures_are_the_pages(tmp_path: Path, make: Callable[..., Page]) -> None:
    write_run(tmp_path / "a")
    write_artifact(tmp_path / "a")
    body = make(tmp_path / "a").text.partition("</style>")[2]
    assert not re.findall(r"#[0-9a-fA-F]{3,8}\b", re.sub(r'="(url\()?#[^"]*"', "", body))
    assert {name for name in re.findall(r"var\(--(\w+)\)", body)} >= {"text", "muted", "rule", "card", "c0"}


def test_the_same_files_give_the_same_bytes_whatever_the_users_settings(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_artifact(tmp_path / "a")
    for number, settings in enumerate(({}, {"axes.facecolor": "red", "font.size": 30.0, "svg.fonttype": "path"})):
        with matplotlib.rc_context(settings):
            assert report.main([str(tmp_path / "a"), "--out", str(tmp_path / str(number))]) == 0
            assert all(matplotlib.rcParams[name] == value for name, value in settings.items())
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in "01")
    assert first == second and len(first) == 7
    image = matplotlib.image.imread(tmp_path / "0" / "ladder.png")
    assert image.shape[1] > 1000 and (image[0, 0, :3] == 1).all() and image[..., :3].min() < 0.2  # dark on white


def linear(colour: str) -> np.ndarray:
    """A colour in linear light (IEC 61966-2-1)."""
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(first: str, second: str) -> float:
    """The contrast of two colours (WCAG 2.1)."""
    a, b = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (first, second))
    return (b + 0.05) / (a + 0.05)


def oklab(light: np.ndarray) -> np.ndarray:
    """A colour in OKLab (Ottosson 2020)."""
    lms = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566]]
    lab = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099]]
    lms, lab = [*lms, [0.0883024619, 0.2817188376, 0.6299787005]], [*lab, [0.0259040371, 0.7827717662, -0.8086757660]]
    return np.array(lab) @ np.cbrt(np.array(lms) @ light)


# Linear light as seen with protanopia, deuteranopia, tritanopia (Machado, Oliveira, Fernandes 2009), and as it is.
SEEN = (
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    np.eye(3),
)


@pytest.mark.parametrize("mode", [0, 1])
def test_colours_can_be_read_and_told_apart_also_by_the_colour_blind(mode: int) -> None:
    paint = {name: pair[mode] for name, pair in COLOURS.items()}
    for ground in ("card", "ground"):
        assert min(contrast(paint[name], paint[ground]) for name in ("text", "muted")) >= 4.5
    assert min(contrast(paint[f"c{i}"], paint["card"]) for i in range(8)) >= 3
    for matrix in SEEN:
        seen = [oklab(np.clip(np.array(matrix) @ linear(paint[f"c{i}"]), 0, 1)) for i in range(6)]
        assert min(np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]) > 0.09 - 1e-3
    assert len({(key.colour, key.dash) for key in (report.key_of(Run("", i, False)) for i in range(MOST_RUNS))}) == 24


# ---------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; selenium gets both paths, so that it downloads nothing."""
    paths = [
        next(filter(None, map(shutil.which, n)), "") for n in (("chromium", "chromium-browser"), ("chromedriver",))
    ]
    if not all(paths):
        pytest.skip("a page is shown by Chromium: install the packages chromium and chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(paths[1]))
    yield driver
    driver.quit()


MEASURE = """
const style = getComputedStyle(document.body), shown = e => e.checkVisibility && e.checkVisibility();
const texts = [...document.querySelectorAll('svg text')];
return {
  overflow: document.documentElement.scrollWidth - innerWidth,
  figures: [...document.querySelectorAll('figure, figure > svg')].map(e => e.getBoundingClientRect().toJSON()),
  fonts: texts.map(e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a),
  cut: texts.filter(e => { const a = e.getBoundingClientRect(), b = e.closest('svg').getBoundingClientRect();
                           return a.left < b.left - 1 || a.right > b.right + 1; }).map(e => e.textContent),
  columns: new Set([...document.querySelectorAll('.grid > *')].map(e => e.getBoundingClientRect().left)).size,
  colours: [style.backgroundColor, style.color, getComputedStyle(document.querySelector('.card')).backgroundColor,
            getComputedStyle(document.querySelector('figure svg text')).fill],
  loose: [...document.querySelectorAll('table')].filter(e => !e.closest('.scroll')).length,
}
"""


def show(browser: Any, url: str, width: int, height: int, mode: str) -> None:
    """Opens a page at a size and in a mode."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": mode}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(url)


def look(browser: Any, page: Path, width: int, height: int, mode: str) -> dict[str, Any]:
    """Opens a page at a size and in a mode, and returns what is measured there."""
    show(browser, page.as_uri(), width, height, mode)
    return browser.execute_script(MEASURE)


@pytest.mark.parametrize("count", [1, 20])
def test_a_browser_shows_the_page_on_a_phone_and_a_desktop_in_light_and_dark(
    browser: Any, tmp_path: Path, make: Callable[..., Page], count: int
) -> None:
    folders = [tmp_path / f"a-rather-long-name-of-a-run-number-{i}" for i in range(count)]
    for i, folder in enumerate(folders):
        write_run(folder, bpb=1.1 + 0.001 * i, seed=i, steps=5000)
        write_artifact(folder)
    make(*folders)
    for width, height, columns in ((360, 800, 1), (1280, 900, 2)):
        for mode in ("light", "dark"):
            browser.get_log("performance")
            seen = look(browser, tmp_path / "out" / "index.html", width, height, mode)
            assert seen["overflow"] <= 0 and seen["columns"] == columns and seen["loose"] == 0, (width, mode, seen)
            assert len(seen["figures"]) == 12
            assert all(box["width"] >= 0.4 * width / columns and box["height"] > 100 for box in seen["figures"])
            assert len(seen["fonts"]) > 30 and min(seen["fonts"]) >= 10 and seen["cut"] == []
            colours = ["#" + "".join(f"{int(n):02x}" for n in re.findall(r"\d+", c)[:3]) for c in seen["colours"]]
            assert contrast(*colours[:2]) >= 4.5 and contrast(*colours[2:]) >= 4.5
            assert (linear(colours[0]).mean() < 0.1) == (mode == "dark")
            events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
            asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
            assert asked and all(
                url.startswith(("file:", "data:")) and url.endswith(("index.html", ",")) for url in asked
            )
    assert browser.get_log("browser") == []


def test_steps_that_a_resumed_run_took_twice_count_once(tmp_path: Path) -> None:
    """Killed at step 20 and resumed from the checkpoint after step 12: in its log, the steps after 12 come again."""
    events = write_run(tmp_path / "a")
    config, steps = events[0], [event for event in events if event["event"] == "train"]
    lost = [event | {"train_loss": 9.0} for event in steps if 12 < event["step"] <= 20]
    again = [event for event in events[1:] if event not in steps or event["step"] > 12]
    breaks = [
        {"event": "segment", "number": 2, "stage": "train"},
        config,
        {"event": "resumed", "step": 12, "seconds": 8.0},
    ]
    log = [config, *(event for event in steps if event["step"] <= 12), *lost, *breaks, *again]
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in log))
    run = read_run(tmp_path / "a", "a", 0, True)
    assert lost and run.train == steps
    assert any("2 segments" in note for note in run.notes)
    # With no checkpoint yet, the training begins again.
    log = [config, *lost, *breaks[:2], *events[1:]]
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in log))
    assert read_run(tmp_path / "a", "a", 0, True).train == steps
