"""Prove on a trained model that its score is legal, and write the proofs to compliance.json.

    AUDIT=1 torchrun --standalone --nproc_per_node=8 train_gpt.py    # watch a run from its start, prove at its end
    python records/audit.py logs/<run>                               # prove on the artifact that a run has left

The proofs are experiments on the function that gives the reported score, `final_score`, with the run's own artifact,
settings and adaptation, on the first two and a half chunks of its validation text. They look at it from outside: at
what the model is given and what is scored, not at what the script says of itself.

    artifact              the weights that were scored are those of the file, the score in submission.json is theirs
    future_flip           all tokens from some place on are replaced: every score before it is the same, bit by bit
    sum_of_probabilities  every piece of the vocabulary is scored in a target's place: the probabilities sum to 1
    once_only             what reached the model, found again in the text by its content: every target was scored once,
                          never trained on before, and its score is what the model answered
    last_chunk            nothing was trained on in the last chunk; another last chunk leaves the same weights
    files                 which files were opened in which phase: no validation text before scoring, from disk or from
                          memory; training shards while training and calibrating only; nothing in an unknown stage
    network               no socket and no other program while scoring

What they do not see: chunks after the third, code that a library runs in C, and what a model was given on purpose that
looks like weights. `files` and `network` rest on Python's audit hooks (PEP 578): of training they know only where
AUDIT=1 was set for the run itself. Nothing in compliance.json is typed by hand."""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHARD = re.compile(r"_(train|val)_[^/]*\.bin$")  # as the script's own globs
# Phases are those of the script's own STAGES, "start" before the first and "audit" after the last. What is not allowed
# here is forbidden, so a stage that is new to this file may open no shard and must not look at the validation text.
ALLOWED_SHARDS = {
    "start": {"train", "val"},
    "setup": {"train", "val"},
    "train": {"train"},
    "calibrate": {"train"},
    "report": {"train", "val"},
    "audit": {"train", "val"},
}
WITH_TEXT = ("setup", "score", "report")  # phases that may look at the validation text
STAGES = ("setup", "preflight", "train", "calibrate", "export", "load", "score", "report")  # that a script must declare
NETWORK = ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "urllib.Request")
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty")
SUM_TOLERANCE = 1e-4  # of the sum of probabilities: fp32 over up to 65,536 pieces stays below a tenth of it
USED = ("Scorer", "UserError", "eval_val", "final_score", "find_path", "load_artifact", "write_atomically")
MAX_SEQUENCES = 4096  # that the sums of probabilities cost: 4 places at 1,024 pieces, but one place at least


class Watch:
    """Notes, from its making on, which files this process opens in which phase, its sockets and its programs. Python
    lets nobody take an audit hook away again."""

    def __init__(self) -> None:
        self.phase, self.phases, self.files, self.violations = "start", [], defaultdict(set), []
        # Code that is loaded late, and what compilers keep, is none of the run's data.
        kept = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or os.path.join(tempfile.gettempdir(), "torchinductor_")
        self.own = (sys.prefix + os.sep, sys.base_prefix + os.sep, kept, "/proc/", "/sys/", "/dev/")
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple) -> None:
        """Takes one audit event; a file that is opened by its number was opened by its name before."""
        if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            self.opened(os.path.abspath(os.fsdecode(arguments[0])))
        elif self.phase == "score" and event in (*NETWORK, *PROGRAMS):
            kind = "network" if event in NETWORK else "program"
            self.violations.append((kind, f"{event} while scoring: {str(arguments[:2])[:200]}"))

    def opened(self, path: str) -> None:
        """Notes a file of the run's data, and whether this phase may open it."""
        name = os.path.join(*Path(path).parts[-2:])
        if shard := SHARD.search(path):
            self.files[self.phase].add(name)
            if shard[1] not in ALLOWED_SHARDS.get(self.phase, ()):
                self.violations.append(("files", f"{name} was opened in the phase {self.phase}"))
        elif self.phase == "score" and not path.endswith((".py", ".pyc", ".so")) and not path.startswith(self.own):
            self.violations.append(("files", f"{name} was opened while scoring, which needs no file"))

    def look_at_maps(self) -> None:
        """Notes training shards that are still mapped into memory, where Linux tells: no `open` would be seen."""
        gc.collect()
        with contextlib.suppress(OSError), open("/proc/self/maps") as maps:
            for name in sorted({Path(line.split(maxsplit=5)[-1].strip()).name for line in maps if "_train_" in line}):
                self.violations.append(("files", f"{name} is mapped into memory while scoring"))


class WatchedText:
    """Stands for the validation text in `run.val` while training and quantizing: who looks at it there is noted."""

    def __init__(self, val: Any, watch: Watch):
        self.__dict__.update(val=val, watch=watch)

    def __getattr__(self, name: str) -> Any:
        text = f"the validation text in memory (.{name}) was used in the phase {self.watch.phase}, not by eval_val"
        self.watch.violations.append(("files", text))
        return getattr(self.val, name)

    def __iter__(self) -> Iterator[Any]:
        return iter([getattr(self, name) for name in self.val._fields])


class Ledger:
    """Stands before the model's `token_nll` and keeps account of which targets of the text pass, in which order. They
    are recognised by content: a row of inputs is looked up in the text, so the script's own numbers are not asked."""

    def __init__(self, run: Any):
        self.run, self.tokens = run, run.val.tokens.numpy()
        self.num_targets, self.length = run.val.num_targets, min(run.h.window, run.val.num_targets)
        self.places: dict[bytes, list[int]] = defaultdict(list)  # some texts repeat themselves
        num_rows = 0
        for length in {self.length, min(run.h.reach, self.num_targets)}:  # of scoring and of adaptation
            rows = np.lib.stride_tricks.sliding_window_view(self.tokens[: self.num_targets], length)
            num_rows += len(rows)
            for start, row in enumerate(rows):
                self.places[digest(row)].append(start)
        self.num_repeats = num_rows - len(self.places)
        self.times_scored, self.times_trained = (np.zeros(self.num_targets, dtype=np.int64) for _ in range(2))
        self.nll = torch.zeros(self.num_targets)  # what the model answered
        self.num_unknown = self.num_early = 0  # targets that are not the text's; trained on before they were scored

    def token_nll(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the model's answer, having noted the question: with gradients it is training, without it scoring."""
        training, answers = torch.is_grad_enabled(), self.run.token_nll(inputs, targets)
        times = self.times_trained if training else self.times_scored
        early = self.shared(self.times_scored) == 0 if training else None
        rows = (inputs.cpu().numpy().astype(self.tokens.dtype), targets.cpu().numpy(), answers.detach().float().cpu())
        for x, y, answer in zip(*rows):
            own = np.flatnonzero(y != -100)
            places = [start + len(x) - len(y) + own for start in self.places.get(digest(x), ())]
            if not len(own) or not places:
                self.num_unknown += len(own)
                continue
            found = min(places, key=lambda place: times[place].sum())
            self.num_unknown += int((self.tokens[found + 1] != y[own]).sum())
            times[found] += 1
            if early is not None:
                self.num_early += int(early[found].sum())
            else:
                self.nll[found] = answer[own]
        return answers

    def shared(self, counts: np.ndarray) -> np.ndarray:
        """Returns the sum of counts over the processes."""
        return self.run.rt.all_reduce(torch.from_numpy(counts.copy())).numpy()


class Auditor:
    """Watches the stages of the script's `main`, and after its report proves the rules on an excerpt of the text.

    It replaces the functions that the script's STAGES declare. A script without one of the names that are needed here
    is refused before anything runs, and one that reports without having begun each stage fails the audit.
    """

    def __init__(self, script: ModuleType):
        self.require_names(script)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # must be set before CUDA is touched
        self.script, self.watch, self.text = script, Watch(), None
        self.scored, self.returned = [], None  # weights when scoring began; what it returned
        self.num_segments = 1  # of the run, of which this process is the last
        for phase, function in script.STAGES.items():
            name = function.__name__
            setattr(script, name, self.staged(phase, getattr(script, name)))
        eval_val = script.eval_val
        script.eval_val = lambda run, *rest: eval_val(self.with_text(run), *rest)

    def require_names(self, script: ModuleType) -> None:
        """Raise UserError unless the script has what is watched and used here, under the names that it declares."""
        missing = [name for name in ("STAGES", *USED) if not hasattr(script, name)]
        if hasattr(script, "STAGES"):
            missing += [f"the stage {phase}" for phase in STAGES if phase not in script.STAGES]
            for phase, function in script.STAGES.items():
                if not hasattr(script, function.__name__):
                    missing.append(f"{function.__name__}, which STAGES has as the stage {phase}")
        if missing:
            error = getattr(script, "UserError", ValueError)
            what = f"{script.__file__} cannot be audited, it lacks {', '.join(missing)}"
            raise error(f"{what}: declare it, or use the records/audit.py that belongs to that script")

    def staged(self, phase: str, function: Callable) -> Callable:
        """Return a stage of `main` that also tells the watch of its beginning; the proofs follow the report."""

        def stage(run: Any, *rest: Any) -> Any:
            self.watch.phase = phase
            self.watch.phases.append(phase)
            if phase not in WITH_TEXT:
                self.text = run.val
                run = run._replace(val=WatchedText(run.val, self.watch))
            if phase == "score":
                self.watch.look_at_maps()
                self.scored = [p.detach().clone() for p in run.model.parameters()]
            result = function(run, *rest)
            if phase == "setup":
                self.excerpt(result)  # a text that is too short is refused now, not after the training
            elif phase == "score":
                self.returned = result
            elif phase == "report":
                self.num_segments = len(rest[1].get("segments", [0]))
                self.prove(run, rest[1]["artifact_sha256"], rest[1].get("artifact", "final_model.bin"))
            return result

        return stage

    def with_text(self, run: Any) -> Any:
        """Returns the run with the validation text itself: `eval_val` may look at it at any time."""
        return run._replace(val=self.text) if isinstance(run.val, WatchedText) else run

    def prove(self, run: Any, artifact_sha256: str, artifact: str) -> None:
        """Writes compliance.json beside the run's report; UserError if a proof failed."""
        self.watch.phase, rt = "audit", run.rt
        weights = {name: w.clone() for name, w in self.decoded(run, artifact_sha256, artifact).items()}
        excerpt = self.excerpt(run)
        rt.log(f"audit: proofs on {excerpt.val.num_targets:,} targets in chunks of {excerpt.h.ttt_chunk_tokens:,}")
        num_late = int(rt.all_reduce(torch.tensor(rt.compiler.num_late)))  # before the proofs below compile theirs
        says = f"{num_late} graphs were compiled after the preflight, in time that counts"
        proofs = {"graphs": {"passed": num_late == 0, "says": says}, "artifact": self.prove_artifact(run, weights)}
        try:
            with deterministic(rt):
                probe = Probe(self.script, excerpt, weights)
                proofs |= {name: function(probe) for name, function in PROBES.items()}
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            raise self.script.UserError(
                f"the audit needs deterministic gradients: set ATTN_BACKEND=sdpa ({error})"
            ) from None
        self.note_skipped_stages(run.h)
        proofs |= self.watched(rt)
        passed = all(proof["passed"] for proof in proofs.values())
        for name, proof in proofs.items():
            rt.log(f"audit: {name}: {'passed' if proof['passed'] else 'FAILED'}: {proof['says']}")
        result = {"run_id": rt.run_dir.name, "seed": run.h.seed, "passed": passed, "proofs": proofs}
        result |= {"excerpt_targets": excerpt.val.num_targets, "chunk_tokens": excerpt.h.ttt_chunk_tokens}
        result |= {"artifact_sha256": artifact_sha256, "code_sha256": hashlib.sha256(run.code).hexdigest()}
        settings = {name: value for name, value in run.h.values().items() if not name.endswith("_path")}
        result |= {"audit_sha256": sha256(Path(__file__)), "machine": rt.describe(), "settings": settings}
        rt.record("audit", passed=passed, **{name: proof["passed"] for name, proof in proofs.items()})
        if rt.rank == 0:
            rt.save("compliance.json", (json.dumps(result, indent=2) + "\n").encode())
        if not passed:
            failed = ", ".join(name for name, proof in proofs.items() if not proof["passed"])
            raise self.script.UserError(
                f"the audit failed ({failed}): {rt.saved.get('compliance.json', 'compliance.json')} says what broke"
            )

    def prove_artifact(self, run: Any, weights: dict[str, Tensor]) -> dict[str, Any]:
        """Returns whether the weights that were scored are the file's, and the score that was written is theirs."""
        named = zip((name for name, _ in run.model.named_parameters()), self.scored)
        others = [name for name, w in named if not torch.equal(w.cpu(), weights[name].cpu())]
        num_others, same = int(run.rt.all_reduce(torch.tensor(len(others)))), True
        if run.rt.rank == 0:
            written = json.loads(run.rt.saved["submission.json"].read_text())
            score = self.returned[0]._asdict() | {"eval_seconds": self.returned[1]}
            same = {name: written.get(name) for name in score} == score
        says = f"{num_others} of {len(weights)} tensors that were scored are not the file's; "
        says += "submission.json has the score that came out" if same else "submission.json has ANOTHER score"
        return {
            "passed": not num_others and bool(run.rt.broadcast_from_rank0(same)),
            "says": says,
            "other_tensors": others,
        }

    def decoded(self, run: Any, artifact_sha256: str, artifact: str) -> dict[str, Tensor]:
        """Returns the artifact's weights, read again from the disk: scoring has adapted those in the model."""
        own = run.rt.run_dir / artifact  # elsewhere, where that folder had no room
        path = self.script.find_path(run.h.eval_only, "EVAL_ONLY") if run.h.eval_only else own
        blob = run.rt.on_rank0(path.read_bytes)  # which other hosts may not have
        if hashlib.sha256(blob).hexdigest() != artifact_sha256:
            raise self.script.UserError(f"{path} is not the file that was scored: it changed during the run")
        return self.script.load_artifact(path, blob)[1].state_dict()

    def excerpt(self, run: Any) -> Any:
        """Returns the run on the first two and a half chunks of its text; on a short text the chunks are shorter."""
        text, window = run.val, min(run.h.window, run.val.num_targets)
        if text.num_targets < 3 * window:
            raise self.script.UserError(
                f"AUDIT=1 needs a text of 3 windows of {window}, not {text.num_targets} targets"
            )
        h = copy.copy(run.h)
        h.ttt_chunk_tokens = max(window, min(h.ttt_chunk_tokens, 16 * window, text.num_targets * 2 // 5))
        num_targets = min(text.num_targets, h.ttt_chunk_tokens * 5 // 2)
        return run._replace(h=h, val=text.head(num_targets))

    def note_skipped_stages(self, h: Any) -> None:
        """Note the stages that this run should have begun in their order and did not: what they did was not watched as
        theirs. A stage that is new to this file may be left out."""
        optional = {phase for phase in self.script.STAGES if phase not in STAGES}
        if not h.trains:
            optional |= {"train", "calibrate"}
        if h.first_stage == "score":
            optional.add("export")
        begun = self.watch.phases
        expected = [phase for phase in self.script.STAGES if phase not in optional or phase in begun]
        if begun != expected:
            text = f"the stages {begun} were begun, not {expected}: main must call each of STAGES by its name"
            self.watch.violations.append(("files", text))

    def watched(self, rt: Any) -> dict[str, dict[str, Any]]:
        """Returns the proofs of the watch: this process's files and violations, and how many the others have."""
        files = {phase: sorted(paths) for phase, paths in self.watch.files.items()}
        phases = list(self.watch.phases)
        seen = "the whole run" if "train" in phases else "loading and scoring, training was not watched"
        if self.num_segments > 1:  # this process has not seen all of the training
            phases = [phase for phase in phases if phase not in ("train", "calibrate")]
            seen = f"the last of the run's {self.num_segments} segments"
        proofs = {}
        for name, kinds in (("files", ("files",)), ("network", ("network", "program"))):
            own = sorted({text for kind, text in self.watch.violations if kind in kinds})
            total = int(rt.all_reduce(torch.tensor(len(own))))
            says = f"{total} violations in {seen}" + "".join(f"; {text}" for text in own[:3])
            proofs[name] = {"passed": total == 0, "says": says, "violations": total, "own_violations": own}
        proofs["files"] |= {"phases_watched": phases, "shards_opened": files}
        return proofs


class Probe:
    """Scores texts as the run does, from the artifact's weights, and keeps what each token was given."""

    def __init__(self, script: ModuleType, run: Any, weights: dict[str, Tensor]):
        self.script, self.run, self.weights = script, run, weights
        self.generator = torch.Generator().manual_seed(0)
        self.ledger = Ledger(run)
        run.model.load_state_dict(weights)
        self.initial = [p.detach().clone() for p in run.model.parameters()]
        self.base, self.base_weights = self.score(run.val.tokens, self.ledger.token_nll)
        self.control, _ = self.score(run.val.tokens)
        # A window belongs to the chunk of its first target; all but the first window begin `stride` targets apart.
        starts = np.append(0, np.arange(self.ledger.length, run.val.num_targets, run.h.stride))
        chunk = starts // run.h.ttt_chunk_tokens
        self.last_chunk = int(starts[chunk == chunk[-1]][0])
        self.flips = [self.flip(place) for place in self.places()]

    def places(self) -> list[int]:
        """Returns the tokens from which the text is changed: in each of the chunks and between two."""
        chunk = self.run.h.ttt_chunk_tokens
        return sorted({chunk // 2 + 3, chunk + 1, chunk + chunk // 2 + 4, self.last_chunk + 1})

    def score(self, tokens: Tensor, token_nll: Callable | None = None) -> tuple[Tensor, list[Tensor]]:
        """Returns the scores (N,) of a text, the same on all ranks, and the weights at the end."""
        script, run = self.script, self.run._replace(val=self.run.val._replace(tokens=tokens))
        run = run._replace(token_nll=token_nll or run.token_nll)
        run.model.load_state_dict(self.weights)
        scorers, original = [], script.Scorer

        class Recorder(original):
            def result(self) -> Any:
                scorers.append(self)
                return super().result()

        script.Scorer, records_graphs = Recorder, run.rt.records_graphs
        if token_nll is not None:
            run.rt.records_graphs = False  # a replayed graph calls nothing that could keep account
        try:
            score = script.final_score(run)
        finally:
            script.Scorer, run.rt.records_graphs = original, records_graphs
        nll = run.rt.all_reduce(scorers[-1].nll[:-1].nan_to_num(0.0)).cpu()
        mean = float(nll.double().mean())
        assert abs(mean - score.val_loss) < 1e-6 * max(1.0, mean), f"scores of mean {mean}, reported {score.val_loss}"
        return nll, [p.detach().clone() for p in run.model.parameters()]

    def flip(self, place: int) -> dict[str, Any]:
        """Returns what became of the scores when every token from `place` on is another one."""
        tokens, vocab_size = self.run.val.tokens.clone(), self.run.h.vocab_size
        shift = torch.randint(1, vocab_size, (len(tokens) - place,), generator=self.generator, dtype=tokens.dtype)
        tokens[place:] = (tokens[place:] + shift) % vocab_size
        nll, weights = self.score(tokens)
        same = nll == self.base
        before, after = same[: place - 1], same[place - 1 :]  # target i is token i + 1
        same_weights = all(torch.equal(a, b) for a, b in zip(weights, self.base_weights))
        worst = float((nll - self.base)[: place - 1].abs().max())
        return {
            "changed_from_token": place,
            "scores_before": before.numel(),
            "bit_identical": int(before.sum()),
            "largest_difference": worst,
            "scores_after_that_changed": int((~after).sum()),
            "final_weights_bit_identical": same_weights,
        }


def prove_future_flip(probe: Probe) -> dict[str, Any]:
    """Returns whether no score depends on a later token, adaptation included. An unchanged text must give the same bits
    twice, or the comparison would say nothing; a changed one must change what follows, or it would not reach it."""
    same = bool(torch.equal(probe.base, probe.control))
    identical = sum(flip["bit_identical"] for flip in probe.flips)
    total = sum(flip["scores_before"] for flip in probe.flips)
    moved = all(flip["scores_after_that_changed"] for flip in probe.flips)
    says = f"{identical:,} of {total:,} scores before {len(probe.flips)} changes of the text are bit-identical"
    if not same:
        says += "; INCONCLUSIVE: the same text scored twice differs, set ATTN_BACKEND=sdpa for deterministic gradients"
        says += ", or CUDA_GRAPHS=0"
    passed = same and moved and identical == total
    return {"passed": passed, "says": says, "repeat_bit_identical": same, "flips": probe.flips}


def prove_sum_of_probabilities(probe: Probe) -> dict[str, Any]:
    """Returns whether the scores are those of a distribution over the vocabulary: the function that fixes scores is
    given every piece in the place of a target, and exp(-score) must sum to 1. A score that looks at its target before
    the distribution is fixed (a model that sees it among its inputs, the better of two models, a cache keyed with the
    target) does not. As in the run, the target is also an input of the targets after it in its window."""
    run, vocab_size = probe.run, probe.run.h.vocab_size
    length = min(run.h.window, run.val.num_targets)
    tail = min(run.h.stride, length)
    run.model.load_state_dict(probe.weights)
    with torch.no_grad():
        torch._foreach_copy_(list(run.model.parameters()), probe.base_weights)  # the adapted model
    errors, places = [], []
    for _ in range(max(1, min(8, MAX_SEQUENCES // vocab_size))):
        end = int(torch.randint(length, run.val.num_targets + 1, (), generator=probe.generator))
        places.append(end - 1 - int(torch.randint(tail, (), generator=probe.generator)))
        errors.append(abs(sum_of_probabilities(probe, places[-1], end, length, tail) - 1))
    says = f"{len(places)} places x {vocab_size:,} pieces: the sum is 1 within {max(errors):.1e}"
    return {"passed": max(errors) < SUM_TOLERANCE, "says": says, "largest_error": max(errors), "targets": places}


def sum_of_probabilities(probe: Probe, target: int, end: int, length: int, tail: int) -> float:
    """Returns the sum over all pieces of the probability that the scorer gives them as `target`, in the window that
    ends with the targets [end - tail, end)."""
    run, total = probe.run, 0.0
    window = run.val.tokens[end - length : end + 1]
    for low in range(0, run.h.vocab_size, 1024):
        pieces = torch.arange(low, min(low + 1024, run.h.vocab_size), dtype=window.dtype)
        rows = window.repeat(len(pieces), 1)
        rows[:, target + 1 - (end - length)] = pieces
        text = torch.cat((rows.flatten(), rows[0, :1]))
        val = run.val._replace(tokens=text, target_bytes=torch.ones(len(text) - 1, dtype=torch.int16))
        scorer = probe.script.Scorer(run._replace(val=val), val, run.h.stride, "audit")
        ends = np.arange(1, len(pieces) + 1) * (length + 1) - 1
        scorer.score(np.stack((ends - length, ends - tail, ends), axis=1))
        nll = run.rt.all_reduce(scorer.nll[:-1].nan_to_num(0.0)).cpu().double()
        total += float(torch.exp(-nll[ends - (end - target)]).sum())
    return total


def prove_once_only(probe: Probe) -> dict[str, Any]:
    """Returns whether every target of the text reached the model once to be scored, before any update that saw it, and
    was given the score that the model answered."""
    ledger, n = probe.ledger, probe.run.val.num_targets
    scored, trained = ledger.shared(ledger.times_scored), ledger.shared(ledger.times_trained)
    counts = torch.tensor([ledger.num_early, ledger.num_unknown])
    early, unknown = probe.run.rt.all_reduce(counts).tolist()
    once, other = int((scored == 1).sum()), int((probe.run.rt.all_reduce(ledger.nll.clone()) != probe.base).sum())
    says = f"{once:,} of {n:,} targets scored once; {early:,} trained on before; {unknown:,} not of this text; "
    says += f"{other:,} scores are not what the model answered"
    figures = {"targets": n, "scored_once": once, "most_times_scored": int(scored.max()), "trained_early": early}
    figures |= {"unknown_targets": unknown, "other_scores": other, "targets_trained_on": int((trained > 0).sum())}
    figures |= {"repeated_contexts": ledger.num_repeats}
    return {"passed": once == n and not early and not unknown and not other, "says": says, **figures}


def prove_last_chunk(probe: Probe) -> dict[str, Any]:
    """Returns whether nothing is learnt from the last chunk, after which no score could use it."""
    trained = probe.ledger.shared(probe.ledger.times_trained)
    begin, same = probe.last_chunk, probe.flips[-1]["final_weights_bit_identical"]
    count = int((trained[begin:] > 0).sum())
    changed = any(not torch.equal(a, b) for a, b in zip(probe.initial, probe.base_weights))
    says = (
        f"{count} of its targets trained on, weights {'the same' if same else 'NOT the same'} with another last chunk"
    )
    figures = {"last_chunk_from": begin, "targets_trained_on": count, "adaptation_changed_weights": changed}
    return {"passed": count == 0 and same, "says": says, **figures}


PROBES: dict[str, Callable[[Probe], dict[str, Any]]] = {
    "future_flip": prove_future_flip,
    "sum_of_probabilities": prove_sum_of_probabilities,
    "once_only": prove_once_only,
    "last_chunk": prove_last_chunk,
}


@contextlib.contextmanager
def deterministic(rt: Any) -> Iterator[None]:
    """Inside, GPUs and compiled graphs add gradients in a fixed order, where torch can: a bit that moves by chance
    proves nothing (compiled for the CPU, 171 of 3,650 did). That compiles anew, more often than torch would allow."""
    if rt.device.type == "cuda" or rt.compiled:
        limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
        setattr(torch._dynamo.config, limit, 64)
        torch.use_deterministic_algorithms(True)  # with warn_only, attention's gradients would stay as they are
    yield
    torch.use_deterministic_algorithms(False)


def digest(row: np.ndarray) -> bytes:
    """Returns what stands for a row of tokens in a table of all rows of a text."""
    return hashlib.blake2b(row.tobytes(), digest_size=16).digest()


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def audit_run(folder: Path) -> bool:
    """Returns whether a finished run passes: an excerpt is scored with the run's own script, settings and artifact, and
    compliance.json put into the run's folder. SystemExit if that cannot be done."""
    try:
        settings = json.loads((folder / "submission.json").read_text())["settings"]
        window = int(settings["eval_seq_len"] or settings["train_seq_len"])
        most = 3 * max(window, min(int(settings["ttt_chunk_tokens"]), 16 * window))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f"{folder} is no finished run ({error!r}): give a folder of logs/ with submission.json"
        ) from None
    # The run's machine is not this one's; its script checks all other values again.
    settings = {name: value for name, value in settings.items() if name not in ("device", "attn_backend")}
    settings |= {
        "audit": False,
        "eval_only": folder / "final_model.bin",
        "export_only": "",
        "resume": "",
        "run_id": f"{folder.name}-audit",
    }
    settings |= {"max_val_tokens": min(int(settings["max_val_tokens"]) or most, most)}
    result = Path("logs", settings["run_id"])
    shutil.rmtree(result, ignore_errors=True)  # of an audit before
    given, environment = dict(os.environ), {name.upper(): value for name, value in settings.items()}
    os.environ.update({name: str(int(v) if isinstance(v, bool) else v) for name, v in environment.items()})
    spec = importlib.util.spec_from_file_location("audited", folder / "train_gpt.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    try:
        Auditor(script)
        script.main()
    except script.UserError as error:
        print(f"{folder}: {error}", file=sys.stderr)
    finally:
        os.environ.clear()
        os.environ.update(given)
    if not (result / "compliance.json").exists():
        raise SystemExit(f"{folder}: the audit did not get to its end, see above")
    new, place = json.loads((result / "compliance.json").read_text()), folder / "compliance.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no audit before, or none that can be read
        old = json.loads(place.read_text())
        same = all(old[key] == new[key] for key in ("passed", "artifact_sha256", "code_sha256"))
        if same and "train" in old["proofs"]["files"]["phases_watched"]:
            print(f"{place} is kept: it has watched the training, too; the new one is {result / place.name}")
            return new["passed"]
    script.write_atomically(place, (result / place.name).read_bytes())
    return new["passed"]


def main(arguments: list[str] | None = None) -> None:
    """Audits finished runs; exits with status 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+", help="folder of a finished run, for example logs/demo")
    passed = [audit_run(folder) for folder in parser.parse_args(arguments).run]
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
