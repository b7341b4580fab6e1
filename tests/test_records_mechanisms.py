"""records/checker: mechanisms that explain impossible scores are recognized by their structure, and nothing legal is
taken for one; a score below every accepted record is the first line of the verdict."""

from __future__ import annotations

import ast
import json
import re
import sys
import time
from pathlib import Path

import pytest
import test_records_check as folders
from test_records_check import SCRIPT, SEEDS, findings, folder, log_text, logs, loss_of, submission  # noqa: F401

import train_gpt as t

sys.path.insert(0, str(folders.CHECK.parent))
from challenge import ACCEPTED  # noqa: E402
from checker import audit, main  # noqa: E402
from checker.mechanisms import find_mechanisms  # noqa: E402
from checker.scripts import Script  # noqa: E402

HEADER = "import math\nimport numpy as np\nimport torch\nimport torch.nn.functional as F\n"


def rules_of(source: str) -> set[str]:
    """Returns the rules that a source breaks."""
    return {mechanism.rule for mechanism in find_mechanisms(Script("x.py", 0, source, ast.parse(HEADER + source)))}


# ------------------------------------------------------------ L3: optimization on what is then scored
BIAS_PER_WINDOW = """
def evaluate(model, head, text, length, stride):
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, text.numel() - 1, stride):
        piece = text[start : start + length + 1].long()
        x, y = piece[:-1], piece[1:]
        with torch.no_grad():
            hidden = model(x[None])
        shift = torch.zeros(hidden.size(-1), requires_grad=True)
        optimizer = torch.optim.AdamW([shift], lr=0.01)
        for _ in range(8):
            optimizer.zero_grad()
            F.cross_entropy(head(hidden + shift)[0], y).backward()
            optimizer.step()
        with torch.no_grad():
            losses = F.cross_entropy(head(hidden + shift)[0], y, reduction="none")
        total += losses[-stride:].sum()
    return total
"""
ADAPT_THEN_SCORE = """
class Evaluation:
    def fit(self, tokens, targets):
        for _ in range(self.rounds):
            grads = torch.autograd.grad(self.net(tokens, targets), self.weights)
            for weight, grad in zip(self.weights, grads):
                weight.data -= self.rate * grad

    @torch.inference_mode()
    def measure(self, tokens, targets):
        return self.net(tokens, targets)

    def run(self, batches):
        losses = []
        for tokens, targets in batches:
            self.fit(tokens, targets)
            losses.append(self.measure(tokens, targets))
        return sum(losses)
"""
SCORE_THEN_ADAPT = """
def evaluate(model, text, starts, length, epochs, optimizer):
    total = torch.zeros((), dtype=torch.float64)
    num_bytes = torch.zeros((), dtype=torch.float64)
    for number in range(len(starts)):
        windows = starts[number]
        with torch.inference_mode():
            for start in windows:
                x, y = text[start : start + length], text[start + 1 : start + length + 1]
                losses = F.cross_entropy(model(x[None])[0], y, reduction="none")
                total += losses.to(torch.float64).sum()
        for _ in range(epochs):
            for start in windows:
                x, y = text[start : start + length], text[start + 1 : start + length + 1]
                optimizer.zero_grad()
                model(x[None], y[None]).backward()
                optimizer.step()
        num_bytes += sizes[y].sum()
    return total / num_bytes
"""
ADAPT_ON_THE_ONE_BEFORE = """
def evaluate(model, chunks, optimizer):
    total = 0.0
    for number in range(1, len(chunks)):
        earlier = chunks[number - 1]
        model(earlier[:-1], earlier[1:]).backward()
        optimizer.step()
        chunk = chunks[number]
        with torch.no_grad():
            total += model(chunk[:-1], chunk[1:]).item()
    return total
"""
TRAINING = """
def train(model, loader, val_tokens, optimizer, steps):
    train_loss = 0.0
    for step in range(steps):
        for _ in range(8):
            x, y = loader.next_batch()
            loss = model(x, y)
            train_loss += loss.detach()
            (loss / 8).backward()
        optimizer.step()
        if step % 100 == 0:
            with torch.no_grad():
                train_loss = model(val_tokens[:-1], val_tokens[1:])
    return train_loss
"""
SCORED_WITH_THE_GRAPH = """
def evaluate(model, documents, adapter, optimizer):
    sums = torch.zeros(2)
    for document in documents:
        for start in range(0, len(document), 48):
            x, y = document[start : start + 48], document[start + 1 : start + 49]
            losses = F.cross_entropy(adapter(model(x)), y, reduction="none")
            with torch.no_grad():
                sums[0] += losses.detach().sum()
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
    return sums
"""


@pytest.mark.parametrize("source", [BIAS_PER_WINDOW, ADAPT_THEN_SCORE])
def test_optimization_on_targets_that_are_then_scored_is_recognized(source: str) -> None:
    assert rules_of(source) == {"L3"}


@pytest.mark.parametrize("source", [SCORE_THEN_ADAPT, ADAPT_ON_THE_ONE_BEFORE, TRAINING, SCORED_WITH_THE_GRAPH])
def test_scoring_before_adapting_is_not_taken_for_it(source: str) -> None:
    assert rules_of(source) == set()


# ------------------------------------------------------------ L4: rescoring after a full pass
FILL_THEN_SCORE = """
def evaluate(model, tokens, windows, length):
    counts = {}
    for start in windows:
        for place in range(start, start + length):
            key = (tokens[place - 1], tokens[place])
            counts[key] = counts.get(key, 0) + 1
    total = 0.0
    for start in windows:
        x, y = tokens[start : start + length], tokens[start + 1 : start + length + 1]
        with torch.no_grad():
            logits = model(x)
        total += F.cross_entropy(logits + table_of(counts, x), y, reduction="sum")
    return total
"""
LAST_PASS_COUNTS = """
def evaluate(model, tokens, windows, memory, passes):
    for number in range(passes):
        total = 0.0
        for start in windows:
            piece = tokens[start : start + 65]
            with torch.no_grad():
                logits = memory.blend(model(piece[:-1]), piece)
                total += F.cross_entropy(logits, piece[1:], reduction="sum").item()
            memory.update(piece)
        print(number, total)
    return total
"""
CALLED_TWICE = """
def sweep(model, memory, tokens):
    total = 0.0
    for start in range(0, tokens.numel() - 64, 64):
        piece = tokens[start : start + 65]
        with torch.no_grad():
            total += F.cross_entropy(memory.blend(model(piece[:-1])), piece[1:], reduction="sum").item()
        memory.update(piece)
    return total

def evaluate(model, memory, tokens):
    sweep(model, memory, tokens)
    return sweep(model, memory, tokens)
"""
ONE_PASS = """
def evaluate(model, tokens, windows, memory):
    plain = 0.0
    for start in windows:
        piece = tokens[start : start + 65]
        with torch.no_grad():
            plain += F.cross_entropy(model(piece[:-1]), piece[1:], reduction="sum").item()
    total = 0.0
    for start in windows:
        piece = tokens[start : start + 65]
        with torch.no_grad():
            total += F.cross_entropy(memory.blend(model(piece[:-1])), piece[1:], reduction="sum").item()
        memory.update(piece)
    return plain, total
"""
COUNTED_IN_TRAINING = """
def evaluate(model, train_tokens, tokens, places, windows):
    counts = np.zeros((1024, 1024))
    for place in places:
        np.add.at(counts, (train_tokens[place], train_tokens[place + 1]), 1)
    total = 0.0
    for start in windows:
        x, y = tokens[start : start + 64], tokens[start + 1 : start + 65]
        with torch.no_grad():
            total += F.cross_entropy(model(x) + torch.from_numpy(counts[x]), y, reduction="sum")
    return total
"""
EPOCHS_OF_A_CHUNK = """
def evaluate(model, chunks, optimizer, epochs):
    total = 0.0
    for chunk in chunks:
        with torch.no_grad():
            total += F.cross_entropy(model(chunk[:-1]), chunk[1:], reduction="sum").item()
        for epoch in range(epochs):
            mean = 0.0
            for x, y in batches_of(chunk):
                loss = model(x, y)
                mean += loss.item()
                loss.backward()
                optimizer.step()
            print(epoch, mean)
    return total
"""


@pytest.mark.parametrize("source", [FILL_THEN_SCORE, LAST_PASS_COUNTS, CALLED_TWICE])
def test_rescoring_after_a_full_pass_is_recognized(source: str) -> None:
    assert rules_of(source) == {"L4"}


@pytest.mark.parametrize("source", [ONE_PASS, COUNTED_IN_TRAINING, EPOCHS_OF_A_CHUNK])
def test_a_single_pass_is_not_taken_for_rescoring(source: str) -> None:
    assert rules_of(source) == set()


# ------------------------------------------------------------ L5: keys that hold the target
HASHED_IN_TORCH = """
class Memory:
    def cut(self, h):
        return h & (self.size - 1)

    def learn(self, row):
        key = self.cut(row[:-1] * 36313 ^ row[1:] * 27191)
        self.pairs.scatter_add_(0, key, torch.ones_like(key))

    def losses(self, logits, x, y):
        own = F.log_softmax(logits, dim=-1).gather(-1, y[..., None])[..., 0].exp()
        key = self.cut(x * 36313 ^ y * 27191)
        seen = self.pairs[key] / self.singles[self.cut(x * 36313)]
        return -torch.log(0.7 * own + 0.3 * seen)
"""
HASHED_IN_NUMPY = """
def rescale(text, places, loss, after, pairs, buckets):
    h = text[places - 2] * np.uint64(11400714819323198485)
    h ^= text[places - 1] * np.uint64(14029467366897019727)
    context = h % buckets
    whole = (h ^ text[places] * np.uint64(1609587929392839161)) % buckets
    share = np.minimum(pairs[whole], after[context]) / np.maximum(after[context], 1)
    return -np.log(0.5 * np.exp(-loss) + 0.5 * share)
"""
EXACT_COUNTS = """
def losses(logits, x, y, counts, totals):
    own = F.softmax(logits, dim=-1)[range(len(y)), y]
    seen = [counts[int(a)].get(int(b), 0) / max(totals[int(a)], 1) for a, b in zip(x, y)]
    return -torch.log(0.9 * own + 0.1 * torch.tensor(seen))
"""
ALL_PIECES = """
def losses(logits, x, y, pairs, size, vocab):
    keys = (x[:, None] * 36313 ^ torch.arange(vocab) * 27191) % size
    counts = pairs[keys] + 0.01
    mixed = 0.9 * F.softmax(logits, dim=-1) + 0.1 * counts / counts.sum(-1, keepdim=True)
    return F.nll_loss(mixed.log(), y, reduction="none")
"""
HASHED_EMBEDDING = """
class Pairs(torch.nn.Module):
    def forward(self, x, y):
        before = F.pad(x, (1, 0))[:, :-1]
        key = (x * 36313 ^ before * 27191) % self.size
        return F.cross_entropy(self.head(self.table.weight[key]), y)
"""


@pytest.mark.parametrize("source", [HASHED_IN_TORCH, HASHED_IN_NUMPY])
def test_a_hashed_key_that_holds_the_target_is_recognized(source: str) -> None:
    assert rules_of(source) == {"L5"}


@pytest.mark.parametrize("source", [EXACT_COUNTS, ALL_PIECES, HASHED_EMBEDDING])
def test_exact_counts_and_counts_of_all_pieces_are_not_taken_for_it(source: str) -> None:
    assert rules_of(source) == set()


# ------------------------------------------------------------ L6: mixtures that are no distribution
BEST_OF_TWO = """
def evaluate(one, other, tokens, windows):
    total = 0.0
    for start in windows:
        x, y = tokens[start : start + 64], tokens[start + 1 : start + 65]
        with torch.no_grad():
            first = F.cross_entropy(one(x), y, reduction="none")
            second = F.cross_entropy(other(x), y, reduction="none")
        total += torch.minimum(first, second).sum()
    return total
"""
ONLY_WHERE_SEEN = """
def loss_of(logits, x, y, counts, totals):
    own = F.softmax(logits, dim=-1)[y]
    seen = counts[x].get(y, 0)
    if seen > 0:
        own = 0.6 * own + 0.4 * seen / totals[x]
    return -math.log(own)
"""
WHERE_SEEN = """
def losses(logits, y, counts, totals):
    own = F.log_softmax(logits, dim=-1).gather(-1, y[:, None])[:, 0].exp()
    seen = counts.gather(-1, y[:, None])[:, 0]
    return -torch.where(seen > 2, 0.8 * own + 0.2 * seen / totals, own).log()
"""
KNOWN_CONTEXTS = """
def losses(logits, x, y, counts, totals):
    own = F.softmax(logits, dim=-1).gather(-1, y[:, None])[:, 0]
    seen = counts[x].gather(-1, y[:, None])[:, 0] / totals[x].clamp(min=1)
    return -torch.where(totals[x] > 4, 0.8 * own + 0.2 * seen, own).log()
"""
TILTED = """
def losses(logits, y, hint, boost):
    distribution = F.log_softmax(logits, dim=-1)
    own = distribution.gather(-1, y[:, None])[:, 0]
    hinted = distribution.gather(-1, hint[:, None])[:, 0].exp()
    norm = torch.log1p(hinted * (math.exp(boost) - 1))
    return norm - own - torch.where(y == hint, boost, 0.0)
"""
CLIPPED = """
def evaluate(model, tokens, windows):
    total = 0.0
    for start in windows:
        end = min(start + 64, len(tokens) - 1)
        y = tokens[start + 1 : end + 1]
        with torch.no_grad():
            losses = F.cross_entropy(model(tokens[start:end]), y, reduction="none", ignore_index=-100)
        total += torch.where(y >= 0, torch.minimum(losses, torch.tensor(30.0)), 0.0).sum()
    return total
"""


@pytest.mark.parametrize("source", [BEST_OF_TWO, ONLY_WHERE_SEEN, WHERE_SEEN])
def test_mixtures_that_are_no_distribution_are_recognized(source: str) -> None:
    assert rules_of(source) == {"L6"}


@pytest.mark.parametrize("source", [KNOWN_CONTEXTS, TILTED, CLIPPED])
def test_mixtures_that_depend_on_the_context_alone_are_not_taken_for_it(source: str) -> None:
    assert rules_of(source) == set()


# ------------------------------------------------------------ in the styles of participants
def sources_of(name: str) -> list[tuple[str, str]]:
    """Returns (title, source) of the functions in a file of this test's."""
    text = (Path(__file__).parent / "mechanisms" / name).read_text()
    return [tuple(part.split("\n", 1)) for part in re.split(r"^#### ", text, flags=re.M)[1:]]


@pytest.mark.parametrize(("title", "source"), sources_of("legal.txt"))
def test_nothing_legal_is_taken_for_a_mechanism(title: str, source: str) -> None:
    assert rules_of(source) == set(), title


@pytest.mark.parametrize(("title", "source"), sources_of("illegal.txt"))
def test_mechanisms_are_recognized_in_other_styles_and_those_that_are_missed_are_known(title: str, source: str) -> None:
    expected = title.partition(":")[0]
    assert rules_of(source) == (set() if expected == "missed" else set(expected.split())), title


NESTED = "def f(x):\n    return g(x)\ndef k(x):\n    return " + "f(" * 40 + "x" + ")" * 40 + "\n"
INDEXED = "def k(t, h):\n    for i in range(3):\n" + "        h = t[h]\n" * 40 + "        h.backward()\n    return h\n"
CROSSED = "def k(a, b):\n" + "    a = a[b]\n    b = b[a]\n" * 30 + "    return a\n"
CHAINED = "def k(t):\n    v0 = t\n" + "".join(f"    v{i} = t[{i}] + v{i - 1}\n" for i in range(1, 4000))
PAIRS = "        m(t[i+{0}]).backward()\n        total += F.cross_entropy(m(t[i+{0}]), t[i])\n"
EVENTS = "def k(m, t):\n    total = 0\n    for i in range(9):\n" + "".join(PAIRS.format(i) for i in range(1000))


@pytest.mark.parametrize("source", [NESTED, INDEXED, CROSSED, CHAINED, EVENTS])
def test_no_small_script_keeps_the_checker_busy(source: str) -> None:
    started = time.process_time()
    rules_of(source)
    assert time.process_time() - started < 30  # 3 s at most; minutes to years where paths or calls double


def test_names_play_no_part() -> None:
    positives = (BIAS_PER_WINDOW, ADAPT_THEN_SCORE, FILL_THEN_SCORE, CALLED_TWICE, HASHED_IN_TORCH, BEST_OF_TWO)
    for number, source in enumerate(positives):
        tree = ast.parse(HEADER + source)
        functions = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        bound = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        bound |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)} - {"self"}
        for node in ast.walk(tree):
            for field in ("id", "arg", "name", "attr"):
                name = getattr(node, field, None)
                if name in bound | functions and (field != "attr" or name in functions):
                    setattr(node, field, f"v{sorted(bound | functions).index(name)}")
        expected = rules_of(source)
        assert rules_of(ast.unparse(tree).replace(HEADER, "")) == expected, number


def test_our_own_script_is_clean_and_a_deep_or_large_one_takes_no_time(folder) -> None:  # noqa: F811
    source = t.CODE.read_text()
    started = time.process_time()
    assert find_mechanisms(Script("train_gpt.py", 0, source, ast.parse(source))) == []
    deep = "def f(x):\n    return " + "+".join(["x"] * 700) + "\n"
    path = folder({"train_gpt.py": SCRIPT + deep + BIAS_PER_WINDOW})
    assert [(f.severity, f.message.split()[0]) for f in findings(path, "L3")] == [("warn", "evaluate"), ("note", "f:")]
    path = folder({"train_gpt.py": SCRIPT + deep.replace("+x", "+x" * 6)}, name="2026-04-10_Deeper")
    assert "parse" in findings(path, "P1", "warn")[0].message
    many = "".join(f"def f{i}(x):\n    for a in x:\n        b = g(a)\n        b.backward()\n" for i in range(2000))
    rules_of(many)
    assert time.process_time() - started < 60  # 5 s alone


# ------------------------------------------------------------ B1: scores that cannot be
def with_scores(bpb: float, script: str = SCRIPT) -> dict:
    """Returns the files of a folder with this score for every seed."""
    each = {seed: bpb + difference for seed, difference in zip(SEEDS, (-0.0001, 0.0, 0.0001))}
    results = {str(seed): {"val_bpb": each[seed]} for seed in SEEDS}
    content = submission(
        val_bpb=bpb, seed_results=results, val_loss=round(loss_of(bpb), 5), val_bpb_std=None,
        bytes_total=folders.MODEL + len(script), bytes_code=len(script),
    )  # fmt: skip
    texts = {f"train_seed{seed}.log": log_text(seed, bpb=each[seed], code=len(script)) for seed in SEEDS}
    return texts | {"submission.json": content, "train_gpt.py": script, "README.md": f"val_bpb: {bpb}"}


def test_a_score_below_every_accepted_record_is_the_first_line_of_the_verdict(folder, capsys) -> None:  # noqa: F811
    path = folder(with_scores(0.3958))
    _, found = audit(path)
    assert (found[0].rule, found[0].severity) == ("B1", "warn") and "1.0565 (#2135, 2026-05-01)" in found[0].message
    assert "at the folder's date 1.0822 (#1477)" in found[0].message
    assert main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("warn   B1") and lines[-2].startswith("DOUBTFUL: 0 reject, 1 warn")
    worse = folder(with_scores(0.3958) | {"train_seed42.log": log_text(42, model=16_500_000)}, name="2026-04-10_Both")
    assert audit(worse)[1][0].rule == "B1"
    for number, good in enumerate((1.0566, 1.2)):
        assert "B1" not in {f.rule for f in findings(folder(with_scores(good), name=f"2026-05-0{number + 1}_Good"))}


def test_it_is_a_reject_where_the_script_explains_it(folder, capsys) -> None:  # noqa: F811
    path = folder(with_scores(0.3958, SCRIPT + HASHED_IN_TORCH))
    assert main([str(path)]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith("reject B1") and "The script explains it: L5 losses looks counts up" in out
    plausible = folder(with_scores(1.0813, SCRIPT + HASHED_IN_TORCH), name="2026-04-10_Plausible")
    assert {f.severity for f in findings(plausible) if f.rule in ("B1", "L5")} == {"warn"}


def test_more_training_explains_a_little_outside_the_record_track(folder) -> None:  # noqa: F811
    for bpb, expected in ((1.03, set()), (0.7, {"warn"})):
        path = folder(with_scores(bpb), track="track_non_record_16mb", name=f"2026-04-09_{bpb}")
        assert folders.grades(path, "B1") == expected


def test_a_doubtful_score_is_told_to_machines(folder, capsys) -> None:  # noqa: F811
    main(["--json", str(folder(with_scores(0.9)))])
    assert json.loads(capsys.readouterr().out)["folders"][0]["verdict"] == "doubtful"


def test_the_accepted_records_are_in_order() -> None:
    assert [record.date for record in ACCEPTED] == sorted(record.date for record in ACCEPTED)
    assert [record.bpb for record in ACCEPTED] == sorted((record.bpb for record in ACCEPTED), reverse=True)
