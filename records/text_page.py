"""The page of a model's text: samples, and where the model is good and bad on validation text. For sample.py.

Every piece of text has the colour of its bits per byte, and says, under the mouse, what the model expected."""

from __future__ import annotations

import argparse
import codecs
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from page import card, esc, num, table, whole_page
from sample import LEVELS, Sample, Token, Vocabulary, judge, level, mean_bits, read_model, t

ROWS = 4  # windows of a pass
PASSAGE_TOKENS = 96
NUM_PASSAGES = 4  # best and worst ones
NUM_SURPRISES = 12
STRETCH_TOKENS = 768  # of the beginning, as it comes
POSITIONS = (0, 1, 4, 16, 64, 256, 1024, 4096)  # first positions of the rows of a table
STYLE = """
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7; margin: 0 0 .6rem; }
.b1 { background: color-mix(in srgb, var(--c5) 22%, transparent); }
.b2 { background: color-mix(in srgb, var(--c5) 48%, transparent); }
.b3 { background: color-mix(in srgb, var(--c1) 38%, transparent); }
.b4 { background: color-mix(in srgb, var(--c1) 62%, transparent); }
.b5 { background: color-mix(in srgb, var(--c3) 62%, transparent); }
th:has(mark) { white-space: normal; }
.scale span { padding: .1rem .5rem; display: inline-block; }
"""


class Scored(NamedTuple):
    """A token of validation text, with its position in the window in which it was guessed."""

    token: Token
    position: int


# =================================================== scoring =========================================================
def score_validation(h: t.Hyperparameters, model: t.GPT, vocabulary: Vocabulary, num_targets: int) -> list[Scored]:
    """Return the first targets of the validation text, scored in windows that do not overlap, as the log's `quantized`
    score is. Raise UserError where there are no shards."""
    h.max_val_tokens = num_targets
    val = t.load_validation_tokens(h)
    length = min(h.window, val.num_targets)
    windows = torch.from_numpy(t.plan_windows(0, val.num_targets, length, length))
    scored = []
    last_line = time.perf_counter()
    with t.CastMatrices(model).used(), torch.inference_mode():
        for batch in windows.split(ROWS):
            inputs, targets, _ = t.gather_windows(val.tokens, batch, length)
            for row_inputs, row_targets, logits in zip(inputs, targets, model.forward_logits(inputs)):
                own = (row_targets >= 0).nonzero().squeeze(1)
                first = int(row_inputs[own[0]])
                tokens = judge(logits[own], row_targets[own].tolist(), first, vocabulary, num_expected=3)
                scored += [Scored(token, position) for token, position in zip(tokens, own.tolist())]
            if time.perf_counter() - last_line > 5:
                last_line = time.perf_counter()
                print(f"scored {len(scored):,} of {val.num_targets:,} validation targets", file=sys.stderr)
    return scored


def kind_of(token: Token, vocabulary: Vocabulary) -> str:
    """Return what kind of token it is."""
    if vocabulary.is_boundary[token.id]:
        return "start of document"
    if vocabulary.sp.is_byte(token.id):
        return "single byte"
    text = vocabulary.pieces[token.id].decode()
    core = text.strip()
    if not core:
        return "white space"
    if core[0].isdigit():
        return "digits"
    if not core[0].isalpha():
        return "punctuation, symbols"
    return "beginning of a word" if text.startswith(" ") else "inside of a word"


def position_of(position: int) -> str:
    """Return the row of a position."""
    begin = max(low for low in POSITIONS if low <= position)
    ends = [low for low in POSITIONS if low > position]
    if not ends:
        return f"{begin:,} and more"
    return f"{begin:,}" if ends[0] == begin + 1 else f"{begin:,} to {ends[0] - 1:,}"


class Share(NamedTuple):
    """What some of the tokens cost."""

    num_tokens: int
    num_bytes: int
    bits: float


def shares(scored: Iterable[Scored], key: Callable[[Scored], str]) -> dict[str, Share]:
    """Return key -> what its tokens cost, in the order in which keys come."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0])
    for entry in scored:
        row = sums[key(entry)]
        row[0] += 1
        row[1] += len(entry.token.text)
        row[2] += entry.token.bits
    return {name: Share(int(count), int(size), bits) for name, (count, size, bits) in sums.items()}


def passages(scored: list[Scored]) -> list[tuple[int, list[Token]]]:
    """Return the passages of PASSAGE_TOKENS tokens with the numbers of their first targets, the cheapest first."""
    parts = []
    for begin in range(0, len(scored) - PASSAGE_TOKENS + 1, PASSAGE_TOKENS):
        tokens = [entry.token for entry in scored[begin : begin + PASSAGE_TOKENS]]
        if any(token.text for token in tokens):
            parts.append((begin, tokens))
    return sorted(parts, key=lambda part: mean_bits(part[1]))


# ==================================================== page ===========================================================
def spans(tokens: Iterable[Token], vocabulary: Vocabulary, tag: str = "span") -> str:
    """Return text in colours. Tokens that are parts of one character are one piece."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = []
    pending: list[Token] = []
    text = ""
    for token in tokens:
        text += decoder.decode(token.text)
        pending.append(token)
        if decoder.getstate()[0]:
            continue
        pieces.append(piece_html(text, pending, vocabulary, tag))
        pending, text = [], ""
    if pending:
        pieces.append(piece_html(text + decoder.decode(b"", final=True), pending, vocabulary, tag))
    return "".join(pieces)


def piece_html(text: str, tokens: list[Token], vocabulary: Vocabulary, tag: str) -> str:
    """Return a piece of text with its colour, and what the model expected."""
    bits = sum(token.bits for token in tokens)
    per_byte = bits / max(1, sum(len(token.text) for token in tokens))
    says = f"{bits:.2f} bits, {per_byte:.2f} a byte"
    if tokens[0].expected:
        says += f"; expected {expected(tokens[0], vocabulary)}"
    if not text:
        text = "\N{PILCROW SIGN}" if tokens[0].id == t.BOS else ""
    shown = "".join(c if c == "\n" else esc(c) for c in text)
    return f'<{tag} class="b{level(per_byte)}" title="{esc(says)}">{shown}</{tag}>'


def expected(token: Token, vocabulary: Vocabulary) -> str:
    """Return the likeliest tokens with their probabilities."""
    return ", ".join(f"{vocabulary.show(i)} {probability:.0%}" for i, probability in token.expected)


def text_html(tokens: Iterable[Token], vocabulary: Vocabulary) -> str:
    return f'<p class="text">{spans(tokens, vocabulary)}</p>'


def scale_html() -> str:
    """Returns the legend of the colours."""
    ends = [f"up to {end:g}" for end in LEVELS] + ["more"]
    parts = "".join(f'<span class="b{i}">{end}</span>' for i, end in enumerate(ends))
    return f'<p class="scale">Bits per byte: {parts}</p>'


def samples_html(samples: list[Sample], vocabulary: Vocabulary, how: str) -> str:
    """Returns the samples, each on a card."""
    cards = []
    for sample in samples:
        prompt = f"<b>{spans(sample.prompt, vocabulary)}</b>" if sample.prompt else ""
        says = f"{num(len(sample.written))} tokens"
        if sample.written:
            says += f", {num(mean_bits(sample.written), '.3f')} bits per byte"
        if sample.prompt:
            says += f"; the prompt has {num(mean_bits(sample.prompt), '.3f')}"
        text = f'<p class="text">{prompt}{spans(sample.written, vocabulary)}</p>'
        cards.append(card(text, f'<p class="muted">{says}; {esc(how)}</p>'))
    return "".join(cards)


def shares_html(label: str, rows: dict[str, Share], all_bits: float) -> str:
    """Returns a table of what kinds of tokens cost, with their shares of all bits."""
    cells = []
    for name, share in rows.items():
        per_byte = share.bits / share.num_bytes if share.num_bytes else None
        cells.append([esc(name), num(share.num_tokens), num(share.num_bytes), num(per_byte, ".3f")])
        cells[-1] += [num(share.bits / share.num_tokens, ".2f"), num(share.bits / all_bits, ".1%")]
    head = [label, "tokens", "bytes", "bits per byte", "bits a token", "of all bits"]
    return table(label, head, cells)


def surprises_html(scored: list[Scored], vocabulary: Vocabulary) -> str:
    """Returns a table of the tokens that surprised the model most, each behind the text before it."""
    order = sorted(range(len(scored)), key=lambda i: -scored[i].token.bits)
    rows = []
    for i in order[:NUM_SURPRISES]:
        token = scored[i].token
        before = b"".join(entry.token.text for entry in scored[max(0, i - 16) : i])
        shown = f'…{esc(before.decode("utf-8", "replace"))}<mark class="b5">{esc(vocabulary.show(token.id))}</mark>'
        rows.append([shown, num(token.bits, ".2f"), esc(expected(token, vocabulary))])
    return table("Largest surprises", ["text", "bits", "expected"], rows)


def validation_html(scored: list[Scored], vocabulary: Vocabulary) -> dict[str, str]:
    """Returns title -> content of the sections on validation text."""
    all_bits = sum(entry.token.bits for entry in scored)
    by_kind = shares(scored, lambda entry: kind_of(entry.token, vocabulary))
    by_kind = dict(sorted(by_kind.items(), key=lambda item: -item[1].bits))
    by_position = shares(scored, lambda entry: position_of(entry.position))
    by_token = shares(scored, lambda entry: vocabulary.show(entry.token.id))
    dearest = dict(sorted(by_token.items(), key=lambda item: -item[1].bits)[:NUM_SURPRISES])
    ranked = passages(scored)
    place = '<p class="muted">From target {}: {} bits per byte</p>'
    shown = {}
    for title, some in (("Where it is bad", ranked[::-1]), ("Where it is good", ranked)):
        cards = ""
        for begin, tokens in some[:NUM_PASSAGES]:
            cards += card(place.format(num(begin), num(mean_bits(tokens), ".3f")), text_html(tokens, vocabulary))
        if cards:
            shown[title] = cards
    sections = {"Where the bits go": card(shares_html("kind of token", by_kind, all_bits))}
    sections["Where the bits go"] += card(shares_html("position in the window", by_position, all_bits))
    rest = "<p>The tokens that take most bits together.</p>"
    sections["Where the bits go"] += card(rest, shares_html("token", dearest, all_bits))
    sections["Where the bits go"] += card("<p>The largest surprises.</p>", surprises_html(scored, vocabulary))
    beginning = [entry.token for entry in scored[:STRETCH_TOKENS]]
    return sections | shown | {"Validation text from its beginning": card(text_html(beginning, vocabulary))}


def write(given: argparse.Namespace, samples: list[Sample], path: Path) -> None:
    """Write the page of the samples, with validation text where that can be found."""
    h, model = read_model(given.model)
    vocabulary = Vocabulary(h)
    folder = given.model if given.model.is_dir() else given.model.parent
    how = f"temperature {given.temperature:g}, top-p {given.top_p:g}, seed {given.seed}"
    sections = {"Samples": samples_html(samples, vocabulary, how)}
    head = scale_html()
    if given.targets:
        try:
            scored = score_validation(h, model, vocabulary, given.targets)
        except t.UserError as error:
            print(f"no validation text on the page: {error}", file=sys.stderr)
        else:
            tokens = [entry.token for entry in scored]
            sections |= validation_html(scored, vocabulary)
            score = f"{num(mean_bits(tokens), '.5f')} bits per byte on the first {num(len(tokens))} validation targets"
            head = f"<p>{score}, in windows that do not overlap.</p>" + head
    made = "Made by records/sample.py from the artifact. The model's guesses for a piece stand under the mouse."
    page = whole_page("text of a model", esc(folder.resolve().name), head, sections, made, STYLE)
    t.write_atomically(path, page.encode())
