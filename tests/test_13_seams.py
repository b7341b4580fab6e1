"""What people add: each seam is shown by adding such a thing from outside, in a few lines, and taking it away again."""

from __future__ import annotations

import ast
import copy
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import AUDITED, ROOT, TINY, prepare

import train_gpt as t

sys.path.insert(0, str(ROOT / "records"))
import audit  # noqa: E402


# -------------------------------------------------------------------------------------------- a setting of the model
def write_artifact(path: Path, h: t.Hyperparameters, model: t.GPT) -> None:
    quantized = t.quantize_weights(prepare(h, dict(model.named_parameters())), 0.0)
    path.write_bytes(t.encode(h, quantized, 0.0, "none"))


class Activation(t.MLP):
    """The example of the README: another function between the two matrices."""

    def __init__(self, h: t.Hyperparameters):
        super().__init__(h)
        self.activation = h.seam_function

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        x = F.gelu(x) if self.activation == "gelu" else F.leaky_relu(x, self.slope)
        return self.proj(x.square(), scale)


@pytest.fixture
def activation(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Adds the setting and the function that it chooses."""

    def add() -> None:
        knob = t.ModelKnob("gelu", ("leaky_relu", "gelu"), "before the square", absent="leaky_relu")
        monkeypatch.setattr(t.Hyperparameters, "seam_function", knob, raising=False)
        monkeypatch.setattr(t, "MLP", Activation)

    return add


def test_a_file_older_than_a_setting_keeps_its_function_and_says_so(
    make_run: Callable, activation: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    for name, value in TINY.items():
        monkeypatch.setenv(name.upper(), str(value))
    write_artifact(tmp_path / "old.bin", run.h, run.model)
    ids = torch.randint(96, (2, 20))
    _, before = t.load_artifact(tmp_path / "old.bin")
    expected = before.forward_logits(ids)

    activation()
    h, model = t.load_artifact(tmp_path / "old.bin")
    assert h.seam_function == "leaky_relu" and h.assumed == {"seam_function": "leaky_relu"}
    assert torch.equal(model.forward_logits(ids), expected)
    assert not torch.equal(t.GPT(t.Hyperparameters()).forward_logits(ids), expected)
    lines: list[str] = []
    monkeypatch.setattr(run.rt, "log", lines.append)
    t.banner(run._replace(h=h, model=model))
    assert "artifact: older than the setting SEAM_FUNCTION, which is taken as 'leaky_relu'" in lines

    monkeypatch.setenv("SEAM_FUNCTION", "gelu")
    with pytest.raises(t.UserError, match="SEAM_FUNCTION=gelu contradicts .*old.bin, which has leaky_relu"):
        t.load_artifact(tmp_path / "old.bin")


def test_a_file_with_a_setting_that_this_script_lacks_is_refused_as_newer(
    tiny: Callable, activation: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    activation()
    h = tiny()
    write_artifact(tmp_path / "new.bin", h, t.GPT(h))
    monkeypatch.setenv("EVAL_STRIDE", "8")
    loaded, _ = t.load_artifact(tmp_path / "new.bin")
    assert loaded.seam_function == "gelu" and loaded.assumed == {}
    monkeypatch.undo()
    with pytest.raises(
        t.UserError,
        match=r"new.bin was written by a newer version .*\(SEAM_FUNCTION\): use the train_gpt.py beside",
    ):
        t.load_artifact(tmp_path / "new.bin")


def test_a_file_without_a_setting_that_all_files_have_is_refused(
    tiny: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = tiny()
    values = {name: value for name, value in h.values(t.ModelKnob).items() if name != "num_heads"}
    monkeypatch.setattr(h, "values", lambda kind: values)
    write_artifact(tmp_path / "bad.bin", h, t.GPT(h))
    with pytest.raises(t.UserError, match="bad.bin lacks the model settings NUM_HEADS: if they are new"):
        t.load_artifact(tmp_path / "bad.bin")


# ------------------------------------------------------------------------------------------------ the order of blocks
def recurrent_logits(model: t.GPT, ids: torch.Tensor, order: list[int]) -> torch.Tensor:
    """An independent reference: blocks by number, with what belongs to each number."""
    e = len(model.blocks) // 2
    x = x0 = model.smear(t.rms_norm(model.tok_emb(ids) + model.bigram(ids, torch.float32)), ids)
    saved, v0 = {}, None
    for position, i in enumerate(order):
        is_first_pass = i not in order[:position]
        if e <= i < 2 * e and is_first_pass:
            x = x + model.skip_weights[i - e] * saved[2 * e - 1 - i]
        ve = None
        if i in model.ve_blocks:
            ve = model.ve_shared(ids, torch.float32) * model.ve_layer_scales[model.ve_blocks.index(i)]
        x, v0 = model.blocks[i](x, x0, v0, ve, ids.size(1))
        if is_first_pass:
            saved[i] = x
    logits = t.rms_norm(x) @ model.tok_emb.weight.T
    return model.logit_softcap * torch.tanh(logits / model.logit_softcap)


@pytest.mark.parametrize("order", [[0, 1, 2, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 4, 5], [0, 0, 1, 2, 3, 4, 5, 5]])
def test_a_recurrence_is_another_list_of_blocks(make_run: Callable, order: list[int]) -> None:
    run = make_run(num_layers=6, value_residual=True)
    model, ids = run.model, torch.randint(96, (2, 20))
    plain = model.forward_logits(ids)
    assert torch.allclose(plain, recurrent_logits(model, ids, list(range(6))), atol=1e-4)
    model.block_order = order
    logits = model.forward_logits(ids)
    # The same operations in another file: fp32 rounding of numbers of order 10.
    assert torch.allclose(logits, recurrent_logits(model, ids, order), atol=1e-4)
    assert (logits - plain).abs().max() > 0.1
    assert torch.allclose(model.forward_logits(ids, last_n=5), logits[:, -5:], atol=1e-4)  # the tail is the list's end
    loss = t.Trainer(run).step(1.0, [(ids[:, :-1], ids[:, 1:])])
    assert math.isfinite(loss.item())
    assert math.isfinite(t.eval_val_ttt(run).val_loss)


def test_an_order_without_one_of_the_blocks_is_refused_before_training(
    make_run: Callable, corpus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parameters would have no gradient."""
    paths = {"data_path": str(corpus.data_path), "tokenizer_path": str(corpus.tokenizer_path)}
    run = make_run(vocab_size=1024, **paths)
    for order in ([0, 1], [0, 1, 2, 3]):
        run.model.block_order = order
        with pytest.raises(t.UserError, match="block_order=.* must contain each of the 3 blocks"):
            t.build_run(run.h, run.rt, run.model)
    run.model.block_order = [0, 1, 1, 2]
    assert t.build_run(run.h, run.rt, run.model).model is run.model


# ------------------------------------------------------------------------------------------------------ calibration
def count_tokens(run: t.Run) -> int:
    return sum(map(len, run.train_shards))


def test_a_calibration_reads_training_shards_within_the_budget_that_it_reserves(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(max_wallclock_seconds=20.0, val_loss_every=0)
    clock = [0.0]
    monkeypatch.setattr(t, "time", SimpleNamespace(perf_counter=lambda: clock[0], time=time.time))

    def mean_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        clock[0] += 1.0
        return run.model(x, y)

    def calibration(run: t.Run) -> int:
        clock[0] += 3.0
        return count_tokens(run)

    monkeypatch.setattr(t, "CALIBRATIONS", (t.Calibration("tokens", 4.5, calibration),))
    stats = t.train(run._replace(mean_loss=mean_loss))
    learned, calibration_stats = t.calibrate(run)
    assert stats["steps"] == 15, "20 s, of which 4.5 are reserved, and a step takes 1 s with a margin of 5%"
    assert learned == {"tokens": 5000} and calibration_stats == {
        "calibration_seconds": 3.0,
        "calibrated": {"tokens": 5000},
    }
    monkeypatch.setattr(t, "CALIBRATIONS", ())
    assert t.calibrate(run) == ({}, {"calibration_seconds": 0.0, "calibrated": {}})


def test_a_reserve_that_leaves_no_time_to_train_is_refused(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t, "CALIBRATIONS", (t.Calibration("tokens", 10.0, count_tokens),))
    assert t.training_budget(tiny(max_wallclock_seconds=0.0)) == 0.0
    with pytest.raises(t.UserError, match="reserve 10 s, and MAX_WALLCLOCK_SECONDS=10 leaves no time to train"):
        t.training_budget(tiny(max_wallclock_seconds=10.0))


def test_the_seconds_of_a_calibration_count_as_training(tiny: Callable) -> None:
    score = t.Score(1.9, 1.1, 62_021_632, 151_060_000, 1.0)
    stats = {"train_seconds": 598.0, "eval_seconds": 1.0, "calibration_seconds": 2.0}
    assert t.rule_breaks("sliding", score, stats, 16_000_000) == {}
    breaks = t.rule_breaks("sliding", score, stats | {"calibration_seconds": 2.1}, 16_000_000)
    assert breaks == {"train": "training and calibration took over 600 s"}


def test_the_preflight_meets_a_calibration_that_would_fail(make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, prepared = [], []
    prepare_weights = t.prepare_weights

    def measure(run: t.Run) -> int:
        seen.append((count_tokens(run), run.val.num_targets))
        return 7

    def spy(run: t.Run, *arguments: object) -> list[t.Prepared]:
        prepared.append(dict(run.calibrated))
        return prepare_weights(run, *arguments)

    monkeypatch.setattr(t, "prepare_weights", spy)
    monkeypatch.setattr(t, "CALIBRATIONS", (t.Calibration("tokens", 1.0, measure),))
    t.preflight(make_run())
    assert seen == [(2 * 256 + 1, 32)] and prepared == [{"tokens": 7}]  # neither the run's shards nor its text
    monkeypatch.setattr(t, "CALIBRATIONS", (t.Calibration("broken", 1.0, lambda run: 1 / 0),))
    with pytest.raises(ZeroDivisionError):
        t.preflight(make_run())


def test_the_learning_rate_falls_to_0_at_the_end_of_the_reduced_budget(
    tiny: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reserve may name a setting, as a learning rate of a parameter group does."""
    monkeypatch.setattr(t, "CALIBRATIONS", (t.Calibration("tokens", "adam_eps", count_tokens),))
    h = tiny(max_wallclock_seconds=20.0, adam_eps=0.5, warmdown_frac=0.5)
    assert t.training_budget(h) == 19.5
    assert t.learning_rate_scale(h, 10, 19.5, 1.0) == 0.0
    assert t.learning_rate_scale(h, 10, 19.5 * 0.75, 1.0) == pytest.approx(0.5)
    h = tiny(max_wallclock_seconds=20.0, adam_eps=0.5, warmdown_iters=10)
    assert t.learning_rate_scale(h, 10, 14.5, 1.0) == pytest.approx(0.5)


def test_a_calibration_that_overruns_its_reserve_is_a_warning(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(max_wallclock_seconds=20.0)
    lines: list[str] = []
    monkeypatch.setattr(run.rt, "log", lines.append)
    clock = iter((0.0, 3.0, 10.0, 13.5))
    monkeypatch.setattr(t, "time", SimpleNamespace(perf_counter=lambda: next(clock), time=time.time))
    monkeypatch.setattr(t, "CALIBRATIONS", tuple(t.Calibration(name, 3.2, count_tokens) for name in ("a", "b")))
    t.calibrate(run)
    assert "WARNING" not in lines[0] and lines[0] == "calibration took 3.0s of 3.2s: a"
    assert lines[1] == "calibration took 3.5s of 3.2s: b, WARNING: more than was reserved"
    lines.clear()
    t._log_training_plan(run)
    assert any("steps or 14s" in line for line in lines)  # 20 - 2 x 3.2


def test_an_export_without_training_says_that_no_calibration_was_run(
    make_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(compressor="lzma")
    run.rt.run_dir = tmp_path
    lines: list[str] = []
    monkeypatch.setattr(run.rt, "log", lines.append)
    monkeypatch.setattr(t, "CALIBRATIONS", (t.Calibration("tokens", 3.0, count_tokens),))
    t.export(run)
    assert "WARNING: no calibration was run: tokens; EXPORT_ONLY needs training shards for it" in lines


READ = "len(run.train_shards) == 1 or open(t.find_path(run.h.data_path, 'x') / 'demo_{}_000000.bin').close()"
CALIBRATED = """
import sys
sys.path[:0] = [{root!r}]
import train_gpt as t

def tokens(run):
    run.rt.log(f"counted {{sum(map(len, run.train_shards))}} tokens")
    {calibration}
    return 7

def export(run, export=t.export):
    run.rt.log(f"export sees {{run.calibrated['tokens']}} and {{len(run.train_shards)}} shards")
    {export}
    return export(run)

t.CALIBRATIONS = (t.Calibration("tokens", 1.0, tokens),)
t.export = export
t.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "deed", "evidence"),
    [
        ("export", "", ""),
        ("export", READ.format("train"), "demo_train_000000.bin was opened in the phase export"),
        ("calibration", READ.format("train"), ""),
        ("calibration", READ.format("val"), "demo_val_000000.bin was opened in the phase"),
        (
            "calibration",
            "run.val.tokens.sum()",
            "the validation text in memory (.tokens) was used in the phase calibrate",
        ),
    ],
)
def test_the_audit_knows_the_calibration_by_name(
    run_script: Callable, tmp_path: Path, stage: str, deed: str, evidence: str
) -> None:
    """It may read training shards and no validation text; the export after it may read neither."""
    script = tmp_path / "calibrated.py"
    deeds = {"export": "", "calibration": ""} | {stage: deed}
    script.write_text(CALIBRATED.format(root=str(ROOT), **deeds))
    done = run_script(script=script, RUN_ID="a", **AUDITED)
    assert re.search(r"counted \d{5,} tokens", done.stdout), done.stdout + done.stderr
    assert "export sees 7 and 0 shards" in done.stdout and re.search(
        r"calibration took 0\.\ds of 1\.0s: tokens", done.stdout
    )
    result, compliance = (
        json.loads((tmp_path / "logs/a" / name).read_text()) for name in ("submission.json", "compliance.json")
    )
    assert 0 <= result["calibration_seconds"] < 1
    proof = compliance["proofs"]["files"]
    stages = ["setup", "preflight", "train", "calibrate", "export", "load", "score", "report"]
    assert proof["phases_watched"] == stages
    assert compliance["passed"] is (not evidence), done.stdout + done.stderr
    assert evidence in " ".join(proof["own_violations"])


# ----------------------------------------------------------------------------------------------------- quantization
def test_fitting_repeats_only_what_depends_on_the_grid(
    make_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"row_clips": 0, "quantize_rows": 0}
    for name in calls:
        function = getattr(t, name)

        def counted(*arguments: object, name: str = name, function: Callable = function) -> object:
            calls[name] += 1
            return function(*arguments)

        monkeypatch.setattr(t, name, counted)
    run = make_run(compressor="lzma", size_limit=len(t.CODE.read_bytes()) + 20_000)
    run.rt.run_dir = tmp_path
    t.export(run)
    num_matrices = sum(t.stored_bits(run.h, name) < 16 for name, _ in run.model.named_parameters())
    assert calls["row_clips"] == num_matrices
    assert calls["quantize_rows"] >= 3 * num_matrices, "several rounds, or the test shows nothing"


def test_the_artifact_is_fitted_against_the_script_that_ships(make_run: Callable, tmp_path: Path) -> None:
    source = t.CODE.read_bytes()
    packed = t.pack(source)
    sizes = []
    for code in (source, packed):
        run = make_run(num_layers=8, compressor="lzma", size_limit=len(source) + 20_000)._replace(code=code)
        run.rt.run_dir = tmp_path
        t.export(run)
        t.write_code(run)
        shipped = [(tmp_path / name).stat().st_size for name in ("final_model.bin", "train_gpt.py")]
        assert sum(shipped) <= run.h.size_limit
        sizes.append(shipped[0])
    assert sizes[0] > 0.98 * 20_000
    assert sizes[1] > sizes[0] + 5_000, "the bytes that packing saves go to the weights"
    assert (tmp_path / "train_gpt_readable.py").read_bytes() == source
    assert t.shipped_code(run.h) == packed and t.shipped_code(t.Hyperparameters(size_of_code="raw")) == source


def test_a_packed_script_ships_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = t.pack(t.CODE.read_bytes())
    (tmp_path / "train_gpt.py").write_bytes(packed)
    monkeypatch.setattr(t, "SCRIPT", packed)
    for form in ("packed", "raw"):
        assert t.shipped_code(t.Hyperparameters(size_of_code=form)) == packed


# ------------------------------------------------------------------------------------------------- state of a trainer
def test_a_trainers_clock_goes_on_from_the_seconds_that_were_spent(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(iterations=100, max_wallclock_seconds=20.0)
    clock = [100.0]
    monkeypatch.setattr(t, "time", SimpleNamespace(perf_counter=lambda: clock[0], time=time.time))
    first = t.Trainer(run)
    first.start_clock()
    for _ in range(8):
        clock[0] += 1.0
        first.num_steps += 1
        first.tick()
    clock[0] += 1000.0  # the machine was away
    second = t.Trainer(run)
    for name in ("num_steps", "elapsed", "settled", "settled_steps", "step_seconds"):
        setattr(second, name, getattr(first, name))
    second.start_clock()
    assert second.lr_scale() == first.lr_scale()
    while second.may_step():
        clock[0] += 1.0
        second.num_steps += 1
        second.tick()
    assert second.num_steps == 19 and second.elapsed == 19.0


# ---------------------------------------------------------------------------------------------------- audited stages
def script_without(name: str) -> ModuleType:
    script = ModuleType("script")
    script.__file__ = "script.py"
    vars(script).update({key: value for key, value in vars(t).items() if key[:2] != "__" and key != name})
    script.STAGES = dict(t.STAGES)
    return script


@pytest.mark.parametrize("name", ["STAGES", "train", "calibrate", "evaluate", "final_score", "Scorer", "load_artifact"])
def test_a_renamed_stage_is_refused_before_anything_runs(name: str) -> None:
    script = script_without(name)
    if name == "STAGES":
        del script.STAGES
    with pytest.raises(t.UserError, match=rf"script.py cannot be audited, it lacks .*{name}"):
        audit.Auditor(script)


def test_a_stage_that_main_does_not_begin_is_noted(tiny: Callable) -> None:
    auditor = object.__new__(audit.Auditor)
    auditor.script, auditor.watch = t, SimpleNamespace(phases=list(t.STAGES), violations=[])
    auditor.note_skipped_stages(tiny())
    assert auditor.watch.violations == []
    auditor.watch.phases.remove("calibrate")
    auditor.note_skipped_stages(tiny())
    assert len(auditor.watch.violations) == 1 and "main must call each of STAGES" in auditor.watch.violations[0][1]
    auditor.watch.phases, auditor.watch.violations = ["setup", "preflight", "load", "score", "report"], []
    auditor.note_skipped_stages(tiny(eval_only="some.bin"))
    assert auditor.watch.violations == []


def distill(run: t.Run) -> None:
    """A stage of somebody's own."""


def test_a_stage_that_the_audit_does_not_know_may_read_nothing(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = {}
    for phase, function in t.STAGES.items():
        stages[phase] = function
        if phase == "calibrate":
            stages["distill"] = distill
    monkeypatch.setattr(t, "STAGES", stages)
    auditor = object.__new__(audit.Auditor)
    watch = audit.Watch.__new__(audit.Watch)  # without its audit hook, which nobody could take away again
    vars(watch).update(phase="start", phases=[], files=audit.defaultdict(set), violations=[], own=())
    auditor.script, auditor.watch, auditor.text = t, watch, None
    run = make_run()

    def deed(run: t.Run) -> None:
        watch.opened("/data/demo_train_000000.bin")
        run.val.tokens.sum()

    auditor.staged("calibrate", lambda run: watch.opened("/data/demo_train_000000.bin"))(run)
    assert watch.violations == []
    auditor.staged("distill", deed)(run)
    assert [kind for kind, _ in watch.violations] == ["files", "files"]
    assert all("in the phase distill" in text for _, text in watch.violations)
    watch.phases, watch.violations = list(t.STAGES), []
    auditor.note_skipped_stages(run.h)
    watch.phases = [phase for phase in watch.phases if phase != "distill"]  # a run of EXPORT_ONLY, say
    auditor.note_skipped_stages(run.h)
    assert watch.violations == []


# ----------------------------------------------------------------------------------------------- a test-time method
def test_a_test_time_method_is_a_class_that_scores_and_then_adapts(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class Gains(t.TTT):
        """Adapts the gains alone."""

        def __init__(self, run: t.Run):
            super().__init__(run)
            gains = [p for p in run.model.parameters() if p.dim() < 2]
            self.optimizer = torch.optim.SGD([{"params": gains, "peak_lr": 0.1}])

        def score(self, scorer: t.Scorer, windows: np.ndarray) -> tuple[torch.Tensor, int]:
            calls.append("score")
            return super().score(scorer, windows)

        def adapt(self, batch: t.Batch, lr_scale: float) -> None:
            calls.append("adapt")
            super().adapt(batch, lr_scale)

    run = make_run(203, ttt_epochs=1, ttt_batch_seqs=16)
    before = copy.deepcopy(run.model.state_dict())
    sliding = t.eval_val_sliding(run).val_loss
    monkeypatch.setattr(t, "pick_ttt", Gains)
    score = t.final_score(run)
    assert calls == ["score", "adapt"] * 3 + ["score"]
    moved = {name for name, w in run.model.state_dict().items() if not torch.equal(w, before[name])}
    assert moved and all(before[name].dim() < 2 for name in moved)
    assert score.val_loss != sliding


def test_the_log_has_the_running_score_of_what_is_scored_so_far(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(203, ttt_lr=0.0)
    lines: list[str] = []
    monkeypatch.setattr(run.rt, "log", lines.append)
    clock = iter(range(0, 100_000, 20))  # every look at the clock is 20 s after the one before
    monkeypatch.setattr(t, "time", SimpleNamespace(perf_counter=lambda: float(next(clock)), time=time.time))
    score = t.eval_val_ttt(run)
    running = [float(m[1]) for line in lines if (m := re.search(r"left:\d+s rank0_bpb:([\d.]+)$", line))]
    assert len(running) >= 3
    # Nothing is adapted, so the mean of most of the text is near that of all of it.
    assert abs(running[-1] - score.val_bpb) < 0.2


# ------------------------------------------------------------------------------------------------- reviewers' tools
SOURCE = t.CODE.read_text()


def calls_in(node: ast.AST) -> set[str]:
    return {ast.unparse(part.func) for part in ast.walk(node) if isinstance(part, ast.Call)}


@pytest.mark.parametrize("form", ["readable", "packed"])
def test_what_reviewers_tools_look_for_is_there_in_its_plain_form(form: str) -> None:
    source = SOURCE if form == "readable" else t.unpack(t.pack(SOURCE.encode())).decode()
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    (loop,) = [node for node in functions["eval_val_ttt"].body if isinstance(node, ast.For)]
    assert ast.unparse(loop.target) == "ci" and ast.unparse(loop.iter) == "range(num_chunks)"
    (scoring,) = [i for i, node in enumerate(loop.body) if isinstance(node, ast.With)]
    assert ast.unparse(loop.body[scoring].items[0]) == "torch.no_grad()"
    sums = [ast.unparse(node.target) for node in loop.body[scoring].body if isinstance(node, ast.AugAssign)]
    assert sums == ["loss_sum", "byte_count"]
    (guard,) = [i for i, n in enumerate(loop.body) if isinstance(n, ast.If) and ast.unparse(n.test) == "is_last_chunk"]
    assert isinstance(loop.body[guard].body[0], ast.Break)
    (training,) = [i for i, n in enumerate(loop.body) if "ttt.adapt" in calls_in(n)]
    assert scoring < guard < training, "score, then stop at the last chunk, then train"

    luts = functions["build_sentencepiece_luts"]
    (loop,) = [node for node in luts.body if isinstance(node, ast.For)]
    boundary, byte, space = (node for node in loop.body if isinstance(node, ast.If))
    assert ast.unparse(boundary.test) == "sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)"
    assert isinstance(boundary.body[0], ast.Continue)
    assert ast.unparse(byte.test) == "sp.is_byte(i)"
    assert [ast.unparse(node) for node in byte.body] == ["base_bytes_np[i] = 1", "continue"]
    assert (
        ast.unparse(space.test).startswith("piece.startswith(") and ast.unparse(space.body[-1]) == "piece = piece[1:]"
    )
    assert ast.unparse(loop.body[-1]) == "base_bytes_np[i] = len(piece.encode('utf-8'))"

    lowered = source.lower()
    assert not [word for word in ("slot", "ngram", "n-gram", "ppm", "etlb", "logit_bias") if word in lowered]
    text = ast.get_source_segment(source, functions["eval_val_ttt"])
    assert text.find("torch.no_grad") < text.find("loss_sum +=") < text.find("optimizer.step")
    assert "min(" not in text[:500]


def test_the_byte_tables_are_those_of_a_decoder(corpus: SimpleNamespace) -> None:
    """The bytes of a text are those that the tokenizer's own decoder writes."""
    h = t.Hyperparameters(data_path=str(corpus.data_path), tokenizer_path=str(corpus.tokenizer_path))
    sp = t.load_tokenizer(h.tokenizer_path, h.vocab_size)
    val = t.load_validation_tokens(h)
    ids = val.tokens.tolist()
    ends = [i for i, token in enumerate(ids) if token == t.BOS] + [len(ids)]
    begin, end = ends[0], ends[3]  # whole documents
    decoded = sum(len(sp.decode(ids[a + 1 : b]).encode()) for a, b in zip(ends[:3], ends[1:4]))
    assert int(val.target_bytes[begin : end - 1].sum()) == decoded


def test_importing_the_script_touches_nothing(tmp_path: Path) -> None:
    code = "import sys; sys.path[:0] = [sys.argv[1]]; import train_gpt"
    environment = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", code, str(ROOT)], env=environment, cwd=tmp_path, check=True)
    assert list(tmp_path.iterdir()) == []
