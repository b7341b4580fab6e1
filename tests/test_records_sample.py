"""Samples: cached decoding is the model's own function, draws follow the settings, text is bytes, pages add up."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, shell, wake
from test_records_report import browser, show  # noqa: F401 - a fixture

import train_gpt as t

sys.path.insert(0, str(ROOT / "records"))
import sample  # noqa: E402
import text_page  # noqa: E402

# fp32 sums in another order; the logits of these models are about 1.
BOUND = 2e-5
HOSTILE = b"</p><script>alert(1)</script>\x1b[31m\x07\x00"


def awake_model(h: t.Hyperparameters) -> t.GPT:
    torch.manual_seed(1)
    model = t.GPT(h)
    wake(model)
    return model


@pytest.fixture
def audited_run(audited: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a real run, whose windows are shorter than the default stride."""
    monkeypatch.setenv("EVAL_STRIDE", "32")
    return audited


@pytest.fixture
def vocabulary(corpus: SimpleNamespace) -> sample.Vocabulary:
    return sample.Vocabulary(t.Hyperparameters(tokenizer_path=str(corpus.tokenizer_path)))


# ---------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trigram_shared": True},
        {"value_residual": True, "gated_attention": True},
        {"bigram_vocab_size": 0, "ve_enabled": False, "xsa_last_n": 0},
        {"num_kv_heads": 4, "num_layers": 4},
        {"num_kv_heads": 1, "ln_scale": False, "rope_dims": 0},
    ],
)
@torch.no_grad()
def test_cached_decoding_gives_the_logits_of_the_whole_prefix(
    tiny: Callable[..., t.Hyperparameters], changes: dict[str, Any]
) -> None:
    h = tiny(**changes)
    ids = torch.randint(h.vocab_size, (h.train_seq_len,))
    ids[[0, 9, 20]] = t.BOS
    whole = awake_model(h).forward_logits(ids.unsqueeze(0))[0]
    for pieces in ([1] * len(ids), [5, 1, 1, 9, 2, *[1] * 14], [len(ids)], [31, 1]):
        decoder = sample.Decoder(h, awake_model(h))
        logits = torch.cat([decoder.read(part.tolist()) for part in ids.split(pieces)])
        assert (logits - whole).abs().max() < BOUND, pieces


@torch.no_grad()
def test_a_block_that_runs_twice_remembers_two_texts(tiny: Callable[..., t.Hyperparameters]) -> None:
    h = tiny()
    models = [awake_model(h) for _ in range(2)]
    for model in models:
        model.block_order = [0, 1, 1, 2, 1]
    ids = torch.randint(h.vocab_size, (20,))
    decoder = sample.Decoder(h, models[0])
    logits = torch.cat([decoder.read([i]) for i in ids.tolist()])
    assert (logits - models[1].forward_logits(ids.unsqueeze(0))[0]).abs().max() < BOUND


@torch.no_grad()
def test_a_long_text_is_read_in_windows_of_the_trained_length(tiny: Callable[..., t.Hyperparameters]) -> None:
    """Position 32 is the first that a window of 32 has no room for: the next begins with its second half."""
    h = tiny()
    model = awake_model(h)
    ids = torch.randint(h.vocab_size, (70,))
    decoder = sample.Decoder(h, awake_model(h))
    logits = torch.cat([decoder.read(part.tolist()) for part in ids.split([3, 40, *[1] * 27])])
    for begin, first, end in ((0, 0, 32), (16, 32, 48), (32, 48, 64), (48, 64, 70)):
        window = model.forward_logits(ids[begin:end].unsqueeze(0))[0]
        assert (logits[first:end] - window[first - begin :]).abs().max() < BOUND, begin


@torch.no_grad()
def test_matrices_cast_ahead_change_nothing(tiny: Callable[..., t.Hyperparameters]) -> None:
    h = tiny()
    ids = torch.randint(h.vocab_size, (12,)).tolist()
    plain = sample.Decoder(h, awake_model(h)).read(ids)
    model = awake_model(h)
    with t.CastMatrices(model).used():
        assert torch.equal(sample.Decoder(h, model).read(ids), plain)


@torch.no_grad()
def test_bfloat16_decoding_agrees_with_bfloat16_on_the_whole_prefix(tiny: Callable[..., t.Hyperparameters]) -> None:
    h = tiny()
    models = [awake_model(h) for _ in range(2)]
    for model in models:
        model.compute_dtype = torch.bfloat16
    ids = torch.randint(h.vocab_size, (32,))
    decoder = sample.Decoder(h, models[0])
    logits = torch.cat([decoder.read([i]) for i in ids.tolist()])
    whole = models[1].forward_logits(ids.unsqueeze(0))[0]
    exact = awake_model(h).forward_logits(ids.unsqueeze(0))[0]
    # No further from each other than twice what rounding to 8 bits moves the whole pass.
    assert (logits - whole).abs().max() < 2 * (whole - exact).abs().max()


# ---------------------------------------------------------------------------------------------------- drawing


def frequencies(logits: list[float], count: int = 4000, **settings: float) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    settings = {"temperature": 1.0, "top_p": 1.0, **settings}
    drawn = [sample.draw(torch.tensor(logits), **settings, generator=generator) for _ in range(count)]
    return np.bincount(drawn, minlength=len(logits)) / count


def test_draws_have_the_probabilities_of_the_logits_and_the_temperature() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    for temperature in (0.5, 1.0, 2.0):
        expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        deviation = np.sqrt(expected * (1 - expected) / 4000)
        seen = frequencies(logits.tolist(), temperature=temperature)
        assert (np.abs(seen - expected) < 5 * deviation).all(), temperature


def test_top_p_keeps_the_least_set_of_likeliest_tokens() -> None:
    logits = np.log([0.05, 0.5, 0.15, 0.3]).tolist()
    for top_p, kept in (
        (0.0, {1}),
        (0.49, {1}),
        (0.51, {1, 3}),
        (0.79, {1, 3}),
        (0.81, {1, 2, 3}),
        (1.0, {0, 1, 2, 3}),
    ):
        assert set(np.flatnonzero(frequencies(logits, 400, top_p=top_p))) == kept, top_p
    seen = frequencies(logits, top_p=0.6)
    assert abs(seen[1] - 0.5 / 0.8) < 5 * math.sqrt(0.625 * 0.375 / 4000)


def test_temperature_0_takes_the_likeliest() -> None:
    assert frequencies([0.0, 1.0, 0.999], 20, temperature=0.0)[1] == 1


def test_the_same_seed_gives_the_same_text_and_another_one_another(
    audited_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def text(*words: str) -> str:
        assert sample.main([str(audited_run), "--tokens", "40", *words]) == 0
        return capsys.readouterr().out.rpartition("\n[")[0]

    first = text("--seed", "3")
    assert text("--seed", "3") == first != text("--seed", "4")
    assert text("--temperature", "0", "--seed", "3") == text("--temperature", "0", "--seed", "4")
    both = text("--prompt", "The list", "--prompt", "A module")
    assert both.startswith("The list") and "\nA module" in both


# ---------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    "text", ["The list is  a module.", "naïve 東京 – ½\nnew line\ttab", "x", " leading", "10,000.5"]
)
def test_the_bytes_of_the_tokens_are_the_text(vocabulary: sample.Vocabulary, text: str) -> None:
    ids = vocabulary.encode(text)
    pieces = [vocabulary.text_of(i, before) for before, i in zip(ids, ids[1:])]
    assert b"".join(pieces).decode() == vocabulary.sp.decode(ids[1:])
    base, space, boundary = t.build_sentencepiece_luts(vocabulary.sp, 1024)
    before, after = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
    assert [len(piece) for piece in pieces] == (base[after] + (space[after] & ~boundary[before])).tolist()


def test_bits_are_those_of_the_models_probabilities(vocabulary: sample.Vocabulary) -> None:
    logits = torch.randn(3, 1024)
    tokens = sample.judge(logits, [5, 900, 30], t.BOS, vocabulary, num_expected=2)
    for row, token in enumerate(tokens):
        assert token.bits == pytest.approx(-math.log2(logits[row].softmax(0)[token.id]), rel=1e-5)
        assert token.expected[0][0] == int(logits[row].argmax())
    assert [token.id for token in tokens] == [5, 900, 30]


def test_a_model_that_draws_the_start_of_a_document_has_ended(
    audited_run: Path, vocabulary: sample.Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    h, model = sample.read_model(audited_run)
    drawn = iter([300, 301, t.BOS])
    monkeypatch.setattr(sample, "draw", lambda *_: next(drawn))
    given = SimpleNamespace(tokens=50, temperature=1.0, top_p=1.0)
    written = sample.write(sample.Decoder(h, model), vocabulary, "", given, torch.Generator(), lambda *_, **__: None)
    assert [token.id for token in written.written] == [300, 301]


def test_ids_that_are_in_no_text_are_never_drawn(
    audited_run: Path, vocabulary: sample.Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    h, model = sample.read_model(audited_run)
    seen = []
    monkeypatch.setattr(sample, "draw", lambda logits, *_: seen.append(logits) or 300)
    given = SimpleNamespace(tokens=1, temperature=1.0, top_p=1.0)
    sample.write(sample.Decoder(h, model), vocabulary, "", given, torch.Generator(), lambda *_, **__: None)
    impossible = {i for i, logit in enumerate(seen[0].tolist()) if logit == -math.inf}
    sp = vocabulary.sp
    assert impossible == {i for i in range(1024) if sp.is_control(i) or sp.is_unknown(i)} - {t.BOS} != set()


def test_several_samples_of_a_prompt_differ(audited_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample.main([str(audited_run), "--samples", "3", "--tokens", "20"]) == 0
    texts = [line for line in capsys.readouterr().out.split("\n[") if line]
    assert len({text.partition("]\n")[2] or text for text in texts[:3]}) == 3


def test_a_temperature_near_0_is_as_good_as_0() -> None:
    assert frequencies([0.0, 1.0, 30.0], 20, temperature=1e-308)[2] == 1


def test_control_characters_of_a_text_do_not_reach_the_terminal() -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True
    screen = sample.Screen(stream)
    screen.show([sample.Token(i, bytes([byte]), 9.0) for i, byte in enumerate(HOSTILE)])
    screen.finish()
    shown = stream.getvalue()
    for colour in filter(None, sample.TERMINAL_COLOURS):
        shown = shown.replace(f"\033[{colour}m", "")
    shown = shown.replace("\033[0m", "")
    assert "\x1b" not in shown and "\x07" not in shown and "alert" in shown


def test_bytes_of_one_character_are_shown_when_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    screen = sample.Screen(stream)
    for byte in "東".encode():
        before = stream.getvalue()
        screen.show([sample.Token(3, bytes([byte]), 1.0)])
    assert before == "" and stream.getvalue() == "東"
    screen.show([sample.Token(3, b"\xe6", 1.0)])
    screen.finish()
    assert stream.getvalue() == "東\N{REPLACEMENT CHARACTER}\n"


@pytest.mark.parametrize(("bits", "number"), [(0.0, 0), (0.5, 0), (0.51, 1), (4.0, 3), (8.0, 4), (99.0, 5)])
def test_a_level_begins_above_its_bound(bits: float, number: int) -> None:
    assert sample.level(bits) == number
    assert len(sample.TERMINAL_COLOURS) == len(sample.LEVELS) + 1


# ---------------------------------------------------------------------------------------------------- validation


@pytest.fixture
def scored(audited_run: Path) -> list[text_page.Scored]:
    h, model = sample.read_model(audited_run)
    return text_page.score_validation(h, model, sample.Vocabulary(h), 1024)


def test_validation_text_has_the_score_that_the_run_logged(audited_run: Path, scored: list[text_page.Scored]) -> None:
    events = [json.loads(line) for line in (audited_run / "metrics.jsonl").read_text().splitlines()]
    quantized = next(event for event in events if event.get("stage") == "quantized")
    assert len(scored) == quantized["num_targets"] == 1024
    tokens = [entry.token for entry in scored]
    assert sum(len(token.text) for token in tokens) == quantized["num_bytes"]
    assert sample.mean_bits(tokens) == pytest.approx(quantized["val_bpb"], rel=1e-6)


def test_kinds_and_places_are_partitions(scored: list[text_page.Scored], vocabulary: sample.Vocabulary) -> None:
    bits = sum(entry.token.bits for entry in scored)
    for key in (
        lambda entry: text_page.kind_of(entry.token, vocabulary),
        lambda entry: text_page.position_of(entry.position),
    ):
        parts = text_page.shares(scored, key)
        assert sum(part.num_tokens for part in parts.values()) == len(scored)
        assert sum(part.bits for part in parts.values()) == pytest.approx(bits)
    assert text_page.position_of(0) == "0" and text_page.position_of(3) == "1 to 3"
    assert text_page.position_of(9999) == "4,096 and more"


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("The 10 cats.\n", {"beginning of a word", "digits", "punctuation, symbols"}),
        ("東", {"single byte"}),
    ],
)
def test_kinds_of_tokens(vocabulary: sample.Vocabulary, text: str, kinds: set[str]) -> None:
    tokens = [sample.Token(i, b"", 0.0) for i in vocabulary.encode(text)]
    found = Counter(text_page.kind_of(token, vocabulary) for token in tokens)
    assert found["start of document"] == 1 and kinds <= found.keys()


def test_passages_are_ordered_by_their_cost(scored: list[text_page.Scored]) -> None:
    ranked = text_page.passages(scored)
    costs = [sample.mean_bits(tokens) for _, tokens in ranked]
    assert costs == sorted(costs) and len(ranked) == 1024 // text_page.PASSAGE_TOKENS
    begin, tokens = ranked[0]
    assert [entry.token for entry in scored[begin : begin + len(tokens)]] == tokens


# ---------------------------------------------------------------------------------------------------- pages


def test_text_of_a_page_is_text(vocabulary: sample.Vocabulary) -> None:
    tokens = [sample.Token(5, bytes([byte]), 3.0, [(5, 0.5)]) for byte in HOSTILE + "東".encode()]
    shown = text_page.spans(tokens, vocabulary)
    assert "<script" not in shown and "&lt;" in shown and "東" in shown and "\x1b" not in shown
    assert shown.count("<span") == len(HOSTILE) + 1  # the three bytes of one character are one piece
    assert 'title="9.00 bits, 3.00 a byte' in shown


def test_names_and_guesses_on_a_page_are_text(vocabulary: sample.Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "show", lambda i: HOSTILE.decode() + '"')
    token = sample.Token(5, HOSTILE, 9.0, [(5, 0.5)])
    shown = text_page.spans([token], vocabulary)
    shown += text_page.surprises_html([text_page.Scored(token, i) for i in range(3)], vocabulary)
    assert "<script" not in shown and shown.count("&quot;") >= 4 and "\x1b" not in shown


def test_a_page_without_validation_text_says_so(
    audited_run: Path,
    corpus: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    out = tmp_path / "page.html"
    folder = tmp_path / "<b>&"
    folder.mkdir()
    (folder / "model.bin").write_bytes((audited_run / "final_model.bin").read_bytes())
    monkeypatch.setenv("TOKENIZER_PATH", str(corpus.tokenizer_path))
    assert sample.main([str(folder / "model.bin"), "--tokens", "5", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "no validation text on the page: DATA_PATH=" in printed.err and f"wrote {out}" in printed.out
    page = out.read_text()
    assert "Samples" in page and "Where it is bad" not in page and "<b>&" not in page and "&lt;b&gt;&amp;" in page


def test_a_browser_shows_text_in_colours_on_a_phone_and_a_desktop(
    browser: Any,  # noqa: F811
    audited_run: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "text.html"
    words = ["--prompt", "The list", "--tokens", "60", "--targets", "1024", "--out", str(out)]
    assert sample.main([str(audited_run), *words]) == 0
    for width, height in ((360, 800), (1280, 900)):
        for mode in ("light", "dark"):
            show(browser, out.as_uri(), width, height, mode)
            assert browser.execute_script("return document.documentElement.scrollWidth - innerWidth") <= 0
            colours = browser.execute_script(
                "return [...document.querySelectorAll('.scale span')].map(e => getComputedStyle(e).backgroundColor)"
            )
            assert len(set(colours)) == len(sample.LEVELS) + 1, colours
            shown = browser.execute_script("return document.querySelector('.text').innerText")
            assert shown.startswith("The list")
    assert browser.get_log("browser") == []


# ---------------------------------------------------------------------------------------------------- as a user


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere"),
        (["{folder}"], "has no final_model.bin: give the folder of a finished run"),
        (["{folder}/metrics.jsonl"], "metrics.jsonl"),
        (["nowhere", "--out", "{folder}"], "is a folder: give the name of a file"),
        (["nowhere", "--out", "/proc/nowhere/a.html"], "takes no files"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert sample.main([word.format(folder=tmp_path) for word in words]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--prompt", "\udcff"],
        ["--temperature", "-1"],
        ["--top-p", "1.5"],
        ["--tokens", "0"],
        ["--seed", "x"],
        ["--temperature", "nan"],
    ],
)
def test_a_number_out_of_range_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sample.main(["logs/a", *words])
    assert words[0] in capsys.readouterr().err


def test_an_artifact_alone_takes_the_tokenizer_from_the_environment(
    audited: Path, corpus: SimpleNamespace, tmp_path: Path
) -> None:
    (tmp_path / "model.bin").write_bytes((audited / "final_model.bin").read_bytes())
    environment = shell(corpus, EVAL_STRIDE=32)
    command = [sys.executable, str(ROOT / "records" / "sample.py"), "model.bin", "--tokens", "30"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, text=True, capture_output=True, check=False)
    assert done.returncode == 0 and "tokens a second" in done.stdout and "\033" not in done.stdout
    for end in ("head -c 5", "true"):  # the program behind it closes the pipe early
        shell_line = f"{' '.join(command)} | {end}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(
            ["bash", "-c", shell_line], env=environment, cwd=tmp_path, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0 and done.stderr == "", end
    environment.pop("TOKENIZER_PATH")
    done = subprocess.run(command, env=environment, cwd=tmp_path, text=True, capture_output=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("sample.py: error: TOKENIZER_PATH=")
