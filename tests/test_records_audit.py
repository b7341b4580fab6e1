"""The audit finds nothing in a legal run, and finds every kind of illegal one: each rule is broken once, on purpose."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import AUDITED, ROOT, replay, shell
from torch import Tensor

import train_gpt as t

sys.path.insert(0, str(ROOT / "records"))
import audit  # noqa: E402

TEXT = {"num_targets": 330, "ttt_lr": 0.5, "ttt_chunk_tokens": 96, "eval_stride": 8}


def prove(run: t.Run) -> dict[str, dict[str, Any]]:
    """Returns the proofs on a run, as `Auditor.prove` makes them of its artifact."""
    weights = {name: w.clone() for name, w in run.model.state_dict().items()}
    probe = audit.Probe(t, audit.Auditor.excerpt(SimpleNamespace(script=t), run), weights)
    return {name: function(probe) for name, function in audit.PROBES.items()}


def failed(proofs: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, proof in proofs.items() if not proof["passed"]}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ttt_optimizer": "adamw", "ttt_lr": 0.01, "ttt_epochs": 2},
        {"ttt_enabled": False},
        {"ttt_enabled": False, "eval_stride": 0},
        {"gated_attention": True, "value_residual": True, "trigram_shared": True, "eval_stride": 5},
        {"eval_seq_len": 48, "eval_stride": 7, "ttt_chunk_tokens": 1000},
        {"eval_stride": 0, "ttt_chunk_tokens": 16},  # chunks shorter than a window
        {"eval_stride": 0, "num_targets": 97},
        {"eval_seq_len": 64, "eval_attn_window": 32, "eval_stride": 32},
        {"num_targets": 331, "ttt_batch_seqs": 1, "eval_batch_seqs": 1, "micro_batch_tokens": 1},
        {"ttt_cosine": False, "ttt_freeze_blocks": 2, "ttt_momentum": 0.0, "ttt_grad_clip": 0.0},
    ],
)
def test_a_legal_run_passes_every_proof_and_the_figures_are_those_of_its_text(
    make_run: Callable, settings: dict
) -> None:
    run = make_run(**{**TEXT, **settings})
    proofs = prove(run)
    assert failed(proofs) == set(), proofs
    flips, once = proofs["future_flip"]["flips"], proofs["once_only"]
    assert len(flips) == 4 and all(flip["bit_identical"] == flip["scores_before"] > 0 for flip in flips)
    assert [flip["scores_before"] for flip in flips] == [flip["changed_from_token"] - 1 for flip in flips]
    assert once["scored_once"] == once["targets"] and once["repeated_contexts"] == 0
    # With adaptation the whole text but its last chunk was trained on, and the weights moved: the proofs had an object.
    adapts = settings.get("ttt_enabled", True)
    assert proofs["last_chunk"]["adaptation_changed_weights"] is adapts
    assert (once["targets_trained_on"] > 0) is adapts and once["targets_trained_on"] < once["targets"]


def test_account_is_kept_of_what_runs_and_the_flips_are_scored_as_the_run_does_from_graphs(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, noted, replaying = make_run(**TEXT), [], []
    replays, record_graph, token_nll = replay(run), run.rt.record_graph, audit.Ledger.token_nll

    def note_record(work: Callable) -> Callable:
        graph = record_graph(work)
        return lambda: (replaying.append(1), graph(), replaying.pop())

    def note_token_nll(self: audit.Ledger, *args: Tensor) -> Tensor:
        noted.append(len(replaying))
        return token_nll(self, *args)

    run.rt.record_graph = note_record
    monkeypatch.setattr(audit.Ledger, "token_nll", note_token_nll)
    assert failed(prove(run)) == set()
    assert noted and not any(noted), "a graph on a GPU would not have called the ledger"
    assert replays and run.rt.records_graphs


# ---- each rule, broken ----


def learn(run: t.Run, batches: list[t.Batch], method: t.TTT) -> None:
    """Takes a step on each of the batches."""
    for batch in batches:
        method.adapt(batch, lr_scale=1.0)


def adapt_then_score(run: t.Run) -> t.Score:
    """What several rejected entries did: train on a chunk, then score it."""
    scorer, adapter = t.Scorer(run, run.val, run.h.stride), t.TTT(run)
    for chunk in chunks_of(run, scorer):
        learn(run, adapter.batches(scorer.tokens, int(chunk[0, 1]), int(chunk[-1, 2])), adapter)
        scorer.score(chunk)
    return scorer.result()


def chunks_of(run: t.Run, scorer: t.Scorer) -> list:
    size = run.h.ttt_chunk_tokens
    of_chunk = [scorer.windows[scorer.windows[:, 1] // size == i] for i in range(-(-run.val.num_targets // size))]
    return [windows for windows in of_chunk if len(windows)]


def score_twice(run: t.Run) -> t.Score:
    """Two passes, of which the second is reported: the model has been trained on what it is scored on."""
    t.eval_val_ttt(run)
    return t.eval_val_ttt(run)


def train_on_the_last_chunk_too(run: t.Run) -> t.Score:
    scorer, adapter = t.Scorer(run, run.val, run.h.stride), t.TTT(run)
    for chunk in chunks_of(run, scorer):
        scorer.score(chunk)
        learn(run, adapter.batches(scorer.tokens, int(chunk[0, 1]), int(chunk[-1, 2])), adapter)
    return scorer.result()


def score_only_what_is_easy(run: t.Run) -> t.Score:
    """Leaves a window out, and says of its targets that they were scored."""
    scorer = t.Scorer(run, run.val, run.h.stride)
    scorer.score(scorer.windows[:-1])
    left_out = slice(int(scorer.windows[-1, 1]), int(scorer.windows[-1, 2]))
    scorer.nll[left_out], scorer.times_scored[left_out] = 0.1, 1
    return scorer.result()


def score_other_targets(run: t.Run) -> t.Score:
    """Scores a text that it prefers to the one it was given."""
    easy = run.val._replace(tokens=torch.full_like(run.val.tokens, 7))
    return t.eval_val_sliding(run._replace(val=easy))


def adapt_first_from_the_second_chunk_on(run: t.Run) -> t.Score:
    """Adapts before it scores, but not the first chunk, and by another way into the model than that of scores."""
    scorer, adapter = t.Scorer(run, run.val, run.h.stride), t.TTT(run._replace(token_nll=run.model.token_nll))
    for index, chunk in enumerate(chunks_of(run, scorer)):
        learn(run, adapter.batches(scorer.tokens, int(chunk[0, 1]), int(chunk[-1, 2])) * (index > 0), adapter)
        scorer.score(chunk)
    return scorer.result()


def mix_in_a_cache(run: t.Run) -> t.Score:
    """A hashed bigram cache of scored text that knows only its target's probability: the most often rejected entry."""
    scorer, tokens, seen = t.Scorer(run, run.val, run.h.stride), run.val.tokens.tolist(), set()
    for chunk in chunks_of(run, scorer):
        scorer.score(chunk)
        targets = range(int(chunk[0, 1]), int(chunk[-1, 2]))
        for i in targets:
            if tokens[i] * tokens[i + 1] % 50 in seen:
                scorer.nll[i] = -torch.log(0.5 * torch.exp(-scorer.nll[i]) + 0.25)
        seen |= {tokens[i] * tokens[i + 1] % 50 for i in targets}
    return scorer.result()


def scale_the_scores(run: t.Run) -> t.Score:
    scorer = t.Scorer(run, run.val, run.h.stride)
    scorer.score(scorer.windows)
    scorer.nll.mul_(0.99)
    return scorer.result()


def keep_the_better_of_two_passes(run: t.Run) -> t.Score:
    scorer, plain = (t.Scorer(run, run.val, stride) for stride in (run.h.stride, run.h.window))
    scorer.score(scorer.windows)
    first, plain.run = scorer.nll.clone(), run._replace(token_nll=run.model.token_nll)
    plain.score(plain.windows)
    scorer.nll = torch.minimum(first, plain.nll)
    return scorer.result()


@pytest.mark.parametrize(
    ("final_score", "broken"),
    [
        (adapt_first_from_the_second_chunk_on, {"future_flip", "last_chunk"}),
        (mix_in_a_cache, {"once_only"}),
        (scale_the_scores, {"once_only"}),
        (keep_the_better_of_two_passes, {"once_only"}),
        (adapt_then_score, {"future_flip", "once_only", "last_chunk"}),
        (score_twice, {"future_flip", "once_only"}),
        (train_on_the_last_chunk_too, {"last_chunk"}),
        (score_only_what_is_easy, {"once_only"}),
        (score_other_targets, {"future_flip", "once_only"}),
    ],
)
def test_a_score_in_the_wrong_order_or_of_something_else_is_caught(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch, final_score: Callable, broken: set[str]
) -> None:
    monkeypatch.setattr(t, "final_score", final_score)
    proofs = prove(make_run(**TEXT))
    assert failed(proofs) == broken, proofs


def test_training_before_scoring_fails_as_it_must(make_run: Callable) -> None:
    proofs = prove(make_run(**TEXT, ttt_mode="pre"))
    assert failed(proofs) == {"future_flip", "once_only", "last_chunk"}
    assert proofs["once_only"]["trained_early"] > 0


class LooksAhead(t.SmearGate):
    """Mixes in a token after instead of the one before: the next is the target."""

    def __init__(self, dim: int, distance: int = 1):
        super().__init__(dim)
        self.distance = distance

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate).to(x.dtype)
        return (1 - g) * x + g * x.roll(-self.distance, 1)


def test_a_model_that_sees_its_target_is_caught(make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t, "SmearGate", LooksAhead)
    assert failed(prove(make_run(**TEXT))) == {"sum_of_probabilities"}


def test_a_model_that_sees_further_is_caught(make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t, "SmearGate", functools.partial(LooksAhead, distance=2))
    proofs = prove(make_run(**TEXT))
    assert "future_flip" in failed(proofs)
    assert any(flip["bit_identical"] < flip["scores_before"] for flip in proofs["future_flip"]["flips"])


@pytest.mark.parametrize("parity", [0, 1])
def test_a_model_that_sees_further_at_every_other_place_is_caught(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch, parity: int
) -> None:
    class Sometimes(LooksAhead):
        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            ahead = torch.arange(x.size(1)) % 2 == parity
            return torch.where(ahead.view(1, -1, 1), super().forward(x, ids), x)

    monkeypatch.setattr(t, "SmearGate", functools.partial(Sometimes, distance=2))
    assert "future_flip" in failed(prove(make_run(**TEXT)))


def test_a_score_that_leaks_by_one_bit_is_caught(make_run: Callable) -> None:
    """The last token of a row, which no target in it but the last may know, moves all scores of the row a little."""
    run = make_run(**TEXT)

    def leaking(x: Tensor, y: Tensor) -> Tensor:
        nll = run.token_nll(x, y)
        return nll * (1 + 1e-6 * (x[:, -1:] % 2))

    assert "future_flip" in failed(prove(run._replace(token_nll=leaking)))


@pytest.mark.parametrize(
    "cheat",
    [
        pytest.param(lambda nll, y: torch.minimum(nll, 0.5 * nll + 1.0), id="the better of two models"),
        pytest.param(lambda nll, y: nll - 0.01 * (y % 3 == 0), id="a bonus that knows its target"),
        pytest.param(lambda nll, y: 0.99 * nll, id="a scaled loss"),
    ],
)
def test_scores_that_are_no_distribution_over_the_vocabulary_are_caught(make_run: Callable, cheat: Callable) -> None:
    run = make_run(**TEXT)
    cheating = run._replace(token_nll=lambda x, y: cheat(run.token_nll(x, y), y))
    proofs = prove(cheating)
    assert failed(proofs) == {"sum_of_probabilities"}, proofs
    assert proofs["sum_of_probabilities"]["largest_error"] > 1e-3


def test_scores_that_move_by_chance_prove_nothing_and_the_audit_says_so(make_run: Callable) -> None:
    run, noise = make_run(**TEXT), torch.Generator().manual_seed(1)
    trembling = run._replace(token_nll=lambda x, y: run.token_nll(x, y) + 1e-5 * torch.randn(y.shape, generator=noise))
    proofs = prove(trembling)
    assert "future_flip" in failed(proofs) and "INCONCLUSIVE" in proofs["future_flip"]["says"]


def test_a_text_too_short_for_the_proofs_is_refused(make_run: Callable) -> None:
    with pytest.raises(t.UserError, match="AUDIT=1 needs a text of 3 windows of 32, not 64 targets"):
        prove(make_run(num_targets=64))


def test_a_graph_that_is_compiled_after_the_preflight_fails_the_audit(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    auditor = audit.Auditor.__new__(audit.Auditor)  # without its hooks, which nobody could take away again
    auditor.script, auditor.watch = t, SimpleNamespace(phase="")
    run = make_run(**TEXT)
    for name, result in (("decoded", {}), ("prove_artifact", {"passed": True, "says": ""}), ("watched", {})):
        monkeypatch.setattr(audit.Auditor, name, lambda *_, result=result: result)
    monkeypatch.setattr(audit.Auditor, "excerpt", lambda self, run: run)
    monkeypatch.setattr(audit.Auditor, "note_skipped_stages", lambda self, h: None)
    monkeypatch.setattr(audit, "Probe", lambda *_: None)
    monkeypatch.setattr(audit, "PROBES", {})
    monkeypatch.setattr(t, "write_atomically", lambda *_: None)
    auditor.prove(run, "", "")
    run.rt.compiler.num_late = 1
    with pytest.raises(t.UserError, match=r"the audit failed \(graphs\)"):
        auditor.prove(run, "", "")


# ---- real processes ----


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_real_run_is_watched_from_its_start_and_proven_at_its_end(
    run_script: Callable, audited: Path, tmp_path: Path, num_processes: int
) -> None:
    folder, out = audited, (audited.parent / "stdout.txt").read_text()
    if num_processes > 1:
        done = run_script(num_processes, **AUDITED, RUN_ID="a")
        assert done.returncode == 0, done.stdout + done.stderr
        folder, out = tmp_path / "logs/a", done.stdout
    compliance = json.loads((folder / "compliance.json").read_text())
    result = json.loads((folder / "submission.json").read_text())
    assert compliance["passed"] is True and all(proof["passed"] for proof in compliance["proofs"].values())
    assert {*compliance["proofs"]} == {*audit.PROBES, "graphs", "artifact", "files", "network"}
    for key in ("artifact_sha256", "code_sha256", "seed", "run_id"):
        assert compliance[key] == result[key]
    paths = {name: value for name, value in result["settings"].items() if name.endswith("_path")}
    assert compliance["settings"] | paths == result["settings"] and len(paths) == 2
    files = compliance["proofs"]["files"]
    assert files["phases_watched"] == list(t.STAGES)
    assert files["shards_opened"].keys() == {"setup", "train"} and len(files["shards_opened"]["setup"]) >= 2
    assert out.count("audit: ") == 1 + len(compliance["proofs"])


ILLEGAL = """
import os, socket, subprocess, sys
from pathlib import Path
import numpy as np
sys.path[:0] = [{root!r}, {root!r} + "/records"]
import train_gpt as t, audit
shards = sorted(Path(os.environ["DATA_PATH"]).glob("*.bin"))
train, val = (next(path for path in shards if part in path.name) for part in ("_train_", "_val_"))
kept = []
def before(name, deed):
    original = getattr(t, name)
    setattr(t, name, lambda *arguments: (deed(), original(*arguments))[1])
def wrap(name, deed):
    original = getattr(t, name)
    setattr(t, name, lambda run: (deed(run), original(run))[1])
reload, report = t.reload, t.report
def connect():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
deeds = dict(
    train=lambda: before("Trainer", lambda: val.read_bytes()),
    calibrate=lambda: before("fit_artifact", lambda: np.fromfile(train, dtype="<u2", count=10)),
    paid_prefix=lambda: before("final_score", lambda: train.read_bytes()),
    side_file=lambda: before("final_score", lambda: Path({root!r}, "README.md").read_bytes()),
    mapped=lambda: before("Trainer", lambda: kept.append(np.memmap(train, dtype="<u2", mode="r"))),
    network=lambda: before("final_score", connect),
    calibrate_on_val=lambda: wrap("export", lambda run: run.val.tokens.sum()),
    unquantized=lambda: setattr(t, "reload", lambda run, path: reload(run._replace(model=t.GPT(run.h)), path)),
    better=lambda: setattr(t, "report", lambda run, score, figures: report(run, score._replace(val_bpb=0.9), figures)),
    program=lambda: before("final_score", lambda: subprocess.run([sys.executable, "-c", ""], check=True)),
)
for deed in sys.argv[1:]:
    deeds[deed]()
t.main()
"""


@pytest.fixture
def illegal_run(corpus: SimpleNamespace, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the script with deeds that break rules, under AUDIT=1."""

    def run(*deeds: str) -> subprocess.CompletedProcess[str]:
        environment = shell(corpus, **AUDITED, RUN_ID="a")
        command = [sys.executable, "-c", ILLEGAL.format(root=str(ROOT)), *deeds]
        return subprocess.run(command, env=environment, cwd=tmp_path, text=True, capture_output=True, check=False)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deeds", "proof", "evidence"),
    [
        (
            ["train", "calibrate", "paid_prefix", "side_file", "mapped"],
            "files",
            [
                "_val_.*phase train",
                "_train_.*phase export",
                "_train_.*phase score",
                "README.md.*needs no file",
                "mapped into",
            ],
        ),
        (["calibrate_on_val"], "files", [r"in memory \(.tokens\) was used in the phase export"]),
        (["network", "program"], "network", ["socket.bind while scoring", "subprocess.Popen while scoring"]),
    ],
)
def test_files_sockets_and_programs_in_the_wrong_phase_are_caught(
    illegal_run: Callable, tmp_path: Path, deeds: list[str], proof: str, evidence: list[str]
) -> None:
    done = illegal_run(*deeds)
    assert done.returncode != 0 and f"the audit failed ({proof})" in done.stderr, done.stdout + done.stderr
    compliance = json.loads((tmp_path / "logs/a/compliance.json").read_text())
    violations = compliance["proofs"][proof]["own_violations"]
    assert compliance["passed"] is False and compliance["proofs"][proof]["passed"] is False
    assert len(violations) >= len(evidence)
    for pattern in evidence:
        assert any(re.search(pattern, text) for text in violations), (pattern, violations)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deed", "says"),
    [("unquantized", r"[1-9]\d* of \d+ tensors that were scored are not"), ("better", "ANOTHER score")],
)
def test_a_score_of_other_weights_and_a_report_of_another_score_are_caught(
    illegal_run: Callable, tmp_path: Path, deed: str, says: str
) -> None:
    done = illegal_run(deed)
    assert done.returncode != 0 and "the audit failed (artifact)" in done.stderr, done.stdout + done.stderr
    proof = json.loads((tmp_path / "logs/a/compliance.json").read_text())["proofs"]["artifact"]
    assert proof["passed"] is False and re.search(says, proof["says"]), proof


def test_a_text_too_short_for_the_proofs_is_refused_before_the_training(run_script: Callable, tmp_path: Path) -> None:
    done = run_script(**{**AUDITED, "MAX_VAL_TOKENS": 70}, RUN_ID="a")
    assert done.returncode != 0 and "AUDIT=1 needs a text of 3 windows of 32" in done.stderr
    assert not (tmp_path / "logs").exists()


@pytest.mark.slow
def test_a_finished_run_is_audited_on_its_artifact(
    run_script: Callable, tmp_path: Path, corpus: SimpleNamespace
) -> None:
    done = run_script(**{**AUDITED, "AUDIT": 0}, RUN_ID="a")
    assert done.returncode == 0 and not (tmp_path / "logs/a/compliance.json").exists()
    command = [sys.executable, str(ROOT / "records/audit.py"), "logs/a"]
    environment = os.environ | {"AUDIT": "1"}  # somebody's shell may still have it
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    compliance = json.loads((tmp_path / "logs/a/compliance.json").read_text())
    result = json.loads((tmp_path / "logs/a/submission.json").read_text())
    assert compliance["passed"] and compliance["artifact_sha256"] == result["artifact_sha256"]
    assert "training was not watched" in compliance["proofs"]["files"]["says"]
    place, proofs = tmp_path / "logs/a/compliance.json", compliance["proofs"]
    for watched, kept in (("train", True), ("score", False)):  # what has seen the training is not overwritten
        proofs["files"]["phases_watched"] = [watched]
        place.write_text(json.dumps(compliance))
        done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=False)
        assert done.returncode == 0 and ("is kept" in done.stdout) is kept
        assert (json.loads(place.read_text())["proofs"]["files"]["phases_watched"] == [watched]) is kept
    (tmp_path / "logs/a/final_model.bin").write_bytes(b"broken")
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=False)
    assert done.returncode == 1 and "is not an artifact" in done.stderr and "did not get to its end" in done.stderr
    done = subprocess.run([*command[:2], "logs/b"], cwd=tmp_path, text=True, capture_output=True, check=False)
    assert done.returncode == 1 and "logs/b is no finished run" in done.stderr
