"""Write text with a finished model, from its artifact alone, and show how surprised the model is by every token.

    python records/sample.py logs/demo                                          # a new document
    python records/sample.py logs/demo --prompt "The list" --prompt "A module"  # go on with these
    python records/sample.py logs/demo --temperature 0.6 --top-p 0.9 --seed 7 --tokens 400
    python records/sample.py logs/demo --samples 3 --html                       # three, and a page: logs/demo/text.html
    TOKENIZER_PATH=my.model python records/sample.py final_model.bin            # an artifact without its run

The text appears as it is drawn, in the colours of its bits per byte. The page has the samples, and shows where the
model is good and bad on validation text: passages in the same colours, kinds of tokens, places in the window. Tokenizer
and validation shards are those of the run, or what TOKENIZER_PATH and DATA_PATH say. Runs on the CPU, in float32:
DTYPE=bfloat16 made a full model 1.5 times as fast on a CPU that has instructions for it."""

from __future__ import annotations

import argparse
import codecs
import itertools
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from launch import LaunchError, read_events, t
except ImportError as missing:
    sys.exit(f"sample.py: error: the package {missing.name} is missing: pip install -r records/requirements.txt")

# Earlier tokens on which a position's embedding depends: SmearGate looks back one position, whose trigram two more.
CONTEXT_FOR_EMBEDDING = 3
# Upper ends of the colours, in bits per byte; the last colour has no end.
LEVELS = (0.5, 1.0, 2.0, 4.0, 8.0)
# Colours of the levels in a terminal (xterm's 256), legible on light and on dark grounds; none for the first.
TERMINAL_COLOURS = ("", "38;5;37", "38;5;33", "38;5;133", "38;5;166", "38;5;160")


# ================================================== decoding =========================================================
class KeysAndValues:
    """The keys and values (1, K, length, d) that one run of a block's attention has seen, and attention to them. It
    takes the place of `CausalSelfAttention.attend`."""

    def __init__(self, length: int, kv_heads: int, head_dim: int, dtype: torch.dtype):
        self.keys = torch.empty(1, kv_heads, length, head_dim, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.num_seen = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Add keys and values (1, T, K, d) of new positions. Return causal attention (1, t, H, d) of queries at the
        last t of them to all that were seen."""
        end = self.num_seen + k.size(1)
        self.keys[:, :, self.num_seen : end] = k.transpose(1, 2)
        self.values[:, :, self.num_seen : end] = v.transpose(1, 2)
        self.num_seen = end
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        if q.size(1) > 1:
            return t.sdpa(q, keys.transpose(1, 2), values.transpose(1, 2))
        # The query heads of a group as positions of one head: nothing is masked, and no key is copied for each head.
        grouped = q.squeeze(1).unflatten(1, (keys.size(1), -1))  # (1, K, G, d)
        return F.scaled_dot_product_attention(grouped, keys, values).flatten(1, 2).unsqueeze(1)


class ShiftedRotary(nn.Module):
    """`Rotary` at the positions that follow those that were read."""

    def __init__(self, rotary: nn.Module, num_read: Callable[[], int]):
        super().__init__()
        self.rotary = rotary
        self.num_read = num_read

    def forward(self, x: Tensor, end: int) -> Tensor:
        """Return x (B, t, heads, d) turned to positions that end `end` after the last one that was read."""
        return self.rotary(x, self.num_read() + end)


class Decoder:
    """Reads a text piece by piece, and says what may follow. Keys and values of what was read are kept.

    A pass is `GPT.hidden` itself, given the new tokens alone: this takes over the three places at which a position
    depends on earlier ones, which are attention, rotation and embedding. The model belongs to the decoder from then on.

    A text longer than TRAIN_SEQ_LEN is read in windows: where one is full, the next begins with its second half.
    """

    def __init__(self, h: t.Hyperparameters, model: t.GPT):
        self.model = model
        self.length = h.train_seq_len
        self.text: list[int] = []  # all tokens that were read
        self.begin = 0  # of the window in it
        self.num_read = 0  # tokens of the window that have passed through the model
        self.caches: list[KeysAndValues] = []
        self._embed_whole = model.embed
        model.embed = self._embed
        for i, block in enumerate(model.blocks):
            attention = block.attn
            num_runs = model.block_order.count(i)
            own = [KeysAndValues(self.length, h.num_kv_heads, h.head_dim, model.compute_dtype) for _ in range(num_runs)]
            self.caches += own
            attention.attend = _in_turns([cache.attend for cache in own])
            attention.rotary = ShiftedRotary(attention.rotary, lambda: self.num_read)

    def _embed(self, ids: Tensor) -> Tensor:
        """Return the embedding (1, T, D) of new tokens (1, T), which depends on those before them."""
        begin = max(self.begin, self.begin + self.num_read - CONTEXT_FOR_EMBEDDING)
        before = self.text[begin : self.begin + self.num_read]
        return self._embed_whole(torch.cat((torch.tensor([before], dtype=ids.dtype), ids), dim=1))[:, len(before) :]

    def restart(self, begin: int) -> None:
        """Begin a window at a place of the text."""
        self.begin = begin
        self.num_read = 0
        for cache in self.caches:
            cache.num_seen = 0

    def read(self, ids: list[int]) -> Tensor:
        """Read tokens. Return the logits (len(ids), V) of what follows each of them."""
        rows = []
        while ids:
            if self.num_read == self.length:
                self.restart(len(self.text) - self.length // 2)
                self._pass(self.text[self.begin :])
            room = self.length - self.num_read
            self.text += ids[:room]
            rows.append(self._pass(ids[:room]))
            ids = ids[room:]
        return torch.cat(rows)

    @torch.inference_mode()
    def _pass(self, ids: list[int]) -> Tensor:
        logits = self.model.forward_logits(torch.tensor([ids]))[0]
        self.num_read += len(ids)
        return logits


def _in_turns(functions: list[Callable]) -> Callable:
    """Return a function that calls the given ones in turns: a block that runs twice in a pass sees two texts."""
    turn = itertools.cycle(functions)
    return lambda *args: next(turn)(*args)


# ================================================== sampling =========================================================
class Token(NamedTuple):
    """A token of a text, and what the model thought of it before it came."""

    id: int
    text: bytes  # what it adds to the text
    bits: float  # -log2 of its probability, at temperature 1
    expected: list[tuple[int, float]] = []  # the likeliest tokens with their probabilities

    @property
    def bits_per_byte(self) -> float:
        """Bits for each byte that it adds; those of a token without text, as the start of a document, for one byte."""
        return self.bits / max(1, len(self.text))


class Vocabulary:
    """The bytes of each token, and those that may be drawn."""

    def __init__(self, h: t.Hyperparameters):
        self.sp = t.load_tokenizer(h.tokenizer_path, h.vocab_size)
        self.pieces = [self._bytes_of(i) for i in range(h.vocab_size)]
        _, self.has_space, self.is_boundary = (
            table.tolist() for table in t.build_sentencepiece_luts(self.sp, h.vocab_size)
        )
        # Ids that are never in a text have no trained logit. The start of a document ends the one before it.
        self.never_drawn = [i for i in range(h.vocab_size) if self.is_boundary[i] and i != t.BOS]

    def _bytes_of(self, i: int) -> bytes:
        """Return the bytes of a token that follows another one."""
        if self.sp.is_control(i) or self.sp.is_unused(i):
            return b""
        piece = self.sp.id_to_piece(i)
        if self.sp.is_unknown(i):
            return "\N{REPLACEMENT CHARACTER}".encode()
        if self.sp.is_byte(i):
            return bytes([int(piece[3:5], 16)])  # <0x0A>
        return piece.replace("\u2581", " ").encode()

    def text_of(self, i: int, before: int) -> bytes:
        """Return the bytes that a token adds behind another one: none for a space at the start of a document."""
        return self.pieces[i][1:] if self.has_space[i] and self.is_boundary[before] else self.pieces[i]

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a document's beginning."""
        return [t.BOS, *self.sp.encode(text)]

    def show(self, i: int) -> str:
        """Return the name of a token, in which a space can be seen."""
        if i == t.BOS:
            return "start of document"
        return self.sp.id_to_piece(i).replace("\u2581", "\N{OPEN BOX}")


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Return a token drawn from logits (V,) / temperature, of the likeliest ones that together have the probability
    top_p (nucleus sampling, Holtzman et al. 2019). At temperature 0 it is the likeliest."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = ((logits.double() - logits.max()) / temperature).softmax(0)  # near 0, a quotient may be infinite
    ordered, ids = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    kept = ordered * (before < top_p)
    kept[0] = ordered[0]  # always, also where top_p is 0
    return int(ids[torch.multinomial(kept, 1, generator=generator)])


def judge(logits: Tensor, ids: list[int], before: int, vocabulary: Vocabulary, num_expected: int = 0) -> list[Token]:
    """Return tokens of a text, given the logits (n, V) from which each was to be guessed, and the token before them."""
    log_probabilities = logits.double().log_softmax(1)
    bits = -log_probabilities.gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1) / math.log(2)
    likeliest = log_probabilities.topk(num_expected, dim=1)
    tokens = []
    for row, i in enumerate(ids):
        expected = list(zip(likeliest.indices[row].tolist(), likeliest.values[row].exp().tolist()))
        tokens.append(Token(i, vocabulary.text_of(i, before), bits[row].item(), expected))
        before = i
    return tokens


class Sample(NamedTuple):
    """A prompt, what the model wrote behind it, and the seconds it took to write."""

    prompt: list[Token]
    written: list[Token]
    seconds: float


def write(
    decoder: Decoder,
    vocabulary: Vocabulary,
    prompt: str,
    given: argparse.Namespace,
    generator: torch.Generator,
    show: Callable,
) -> Sample:
    """Return a sample. `show` is called with each list of tokens as soon as it is there.

    The text ends after `given.tokens` tokens, or where the model begins a new document."""
    ids = vocabulary.encode(prompt)
    decoder.text = []
    decoder.restart(0)
    logits = decoder.read(ids)
    read = judge(logits[:-1], ids[1:], ids[0], vocabulary, num_expected=3)
    show(read, is_prompt=True)
    written: list[Token] = []
    started = time.perf_counter()
    while len(written) < given.tokens:
        last = logits[-1]
        allowed = last.index_fill(0, torch.tensor(vocabulary.never_drawn, dtype=torch.long), -math.inf)
        drawn = draw(allowed, given.temperature, given.top_p, generator)
        if drawn == t.BOS:
            break
        written += judge(last.unsqueeze(0), [drawn], decoder.text[-1], vocabulary, num_expected=3)
        show(written[-1:])
        logits = decoder.read([drawn])
    return Sample(read, written, time.perf_counter() - started)


# ================================================== showing ==========================================================
def level(bits_per_byte: float) -> int:
    """Return the number of the colour, from 0."""
    return sum(bits_per_byte > end for end in LEVELS)


def printable(text: str) -> str:
    """Return the text with a mark for each character that would do something else to a terminal than be shown."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


class Screen:
    """Shows tokens as they come, in colours where the screen is a terminal. Bytes of a character wait for its last."""

    def __init__(self, stream: Any):
        self.stream = stream
        self.has_colours = stream.isatty() and not os.environ.get("NO_COLOR")
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def show(self, tokens: list[Token], is_prompt: bool = False) -> None:
        """Show tokens; those of a prompt in bold."""
        for token in tokens:
            text = printable(self.decoder.decode(token.text))
            style = ";".join(filter(None, ("1" * is_prompt, TERMINAL_COLOURS[level(token.bits_per_byte)])))
            if self.has_colours and text and style:
                text = f"\033[{style}m{text}\033[0m"
            print(text, end="", file=self.stream, flush=True)

    def finish(self) -> None:
        """End the text with a line break."""
        print(printable(self.decoder.decode(b"", final=True)), file=self.stream, flush=True)
        self.decoder.reset()

    def legend(self) -> str:
        """Return a line on the colours."""
        ends = [f"up to {end:g}" for end in LEVELS] + ["more"]
        shown = (f"\033[{colour}m{end}\033[0m" if colour else end for end, colour in zip(ends, TERMINAL_COLOURS))
        return f"bits per byte: {', '.join(shown)}"


def mean_bits(tokens: list[Token]) -> float:
    """Return bits per byte over tokens; nan where they have no bytes."""
    num_bytes = sum(len(token.text) for token in tokens)
    return sum(token.bits for token in tokens) / num_bytes if num_bytes else math.nan


def summary(sample: Sample, length: int) -> str:
    """Return a line on a sample."""
    parts = []
    if sample.prompt:
        parts.append(f"the prompt has {mean_bits(sample.prompt):.2f} bits per byte")
    if sample.written:
        rate = len(sample.written) / sample.seconds
        num_bytes = sum(len(token.text) for token in sample.written)
        parts.append(f"{len(sample.written)} tokens, {num_bytes} bytes, {mean_bits(sample.written):.2f} bits per byte")
        parts.append(f"{rate:.0f} tokens a second")
    else:
        parts.append("the model ends the document here")
    if 1 + len(sample.prompt) + len(sample.written) > length:
        parts.append(f"the model saw at most {length} tokens at once, as in training")
    return f"[{'; '.join(parts)}]"


# ==================================================== main ===========================================================
def read_model(path: Path) -> tuple[t.Hyperparameters, t.GPT]:
    """Return settings and model of a run's folder or an artifact. What a run was trained with says where its tokenizer
    and data are, if the environment does not."""
    if path.is_dir():
        folder, path = path, path / "final_model.bin"
        if not path.is_file():
            raise LaunchError(f"{folder} has no final_model.bin: give the folder of a finished run, or an artifact")
    h, model = t.load_artifact(path)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(t.available_cores())  # a container may have fewer cores than the machine
    if h.dtype == "bfloat16":
        model.compute_dtype = torch.bfloat16
    for config in read_events(path.parent, "config")[-1:]:
        for name in ("data_path", "tokenizer_path"):
            if name not in h.given and isinstance(config.get(name), str):
                setattr(h, name, config[name])
                h.chosen.add(name)
    return h, model


def number(low: float, high: float, kind: type = float) -> Callable[[str], Any]:
    """Return a function that reads a number of a range, for argparse."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    parse.__name__ = kind.__name__  # argparse puts it into its message
    return parse


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command line's choices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="RUN|ARTIFACT", help="folder of a finished run, or its artifact")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="go on with this; more than once for several")
    parser.add_argument("--tokens", type=number(1, 1e6, int), default=200, help="most tokens to write (%(default)s)")
    parser.add_argument("--temperature", type=number(0, 100), default=0.8, help="0: the likeliest (%(default)s)")
    parser.add_argument(
        "--top-p",
        type=number(0, 1),
        default=0.95,
        help="draw of the likeliest ones that together have this probability (%(default)s)",
    )
    parser.add_argument("--seed", type=number(0, 2**63 - 1, int), default=1, help="same seed, same text (%(default)s)")
    parser.add_argument("--samples", type=number(1, 10_000, int), default=1, help="texts for a prompt (%(default)s)")
    parser.add_argument("--html", action="store_true", help="write a page as well")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page; by default text.html beside the artifact")
    parser.add_argument(
        "--targets",
        type=number(0, 1e9, int),
        default=32_768,
        help="validation targets that the page looks at; 0: none (%(default)s)",
    )
    given = parser.parse_args(arguments)
    given.html = given.html or given.out is not None
    for prompt in given.prompt or []:
        if any("\ud800" <= c <= "\udfff" for c in prompt):  # what Python makes of other bytes
            parser.error(f"--prompt {printable(prompt)}: it is no UTF-8 text")
    return given


def page_path(given: argparse.Namespace) -> Path:
    """Return the path of the page. Raise LaunchError where it cannot be written, before time is spent on it."""
    folder = given.model if given.model.is_dir() else given.model.parent
    path = given.out or folder / "text.html"
    if path.is_dir():
        raise LaunchError(f"--out {path} is a folder: give the name of a file")
    t.check_writable(path.parent, "give another --out")
    return path


def write_samples(given: argparse.Namespace) -> list[Sample]:
    """Write the samples to the screen, and return them."""
    h, model = read_model(given.model)
    vocabulary = Vocabulary(h)
    screen = Screen(sys.stdout)
    if screen.has_colours:
        print(screen.legend())
    samples = []
    with t.CastMatrices(model).used():  # the rows' scales are multiplied in once, not for each token
        decoder = Decoder(h, model)
        generator = torch.Generator().manual_seed(given.seed)  # of all samples, so that no two are alike
        for prompt in given.prompt or [""]:
            for _ in range(given.samples):
                samples.append(write(decoder, vocabulary, prompt, given, generator, screen.show))
                screen.finish()
                print(summary(samples[-1], decoder.length), flush=True)
    return samples


def main(arguments: list[str] | None = None) -> int:
    given = parse_arguments(arguments)
    try:
        path = page_path(given) if given.html else None
        samples = write_samples(given)
        if path is not None:
            import text_page  # it needs matplotlib

            text_page.write(given, samples, path)
            print(f"wrote {path}")
    except BrokenPipeError:  # `| head` has read enough
        return 0
    except (LaunchError, t.UserError) as error:
        print(f"sample.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"sample.py: error: {t.os_error_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    t.prepare_streams()
    status = main()
    t.leave("", status)  # without Python's own flush of a pipe that is closed
