"""Draws records/architecture.svg, the picture in the README, from the defaults of train_gpt.py.

    python records/architecture.py            # or: make architecture

Shapes come from `Hyperparameters`. Parameters are counted by name in a `GPT` on the meta device, which takes no memory.
Settings in the environment are ignored: the picture shows the defaults."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from train_gpt import GPT, Hyperparameters  # noqa: E402

PICTURE = Path(__file__).resolve().with_suffix(".svg")
# Every parameter of the model belongs to exactly one part of the picture.
PARTS = {
    "embedding": r"tok_emb\..*",
    "bigram": r"bigram\..*",
    "smear": r"smear\..*",
    "values": r"ve_(shared|layer_scales)\..*",
    "skips": r"skip_weights",
    "attention": r"blocks\.\d+\.attn\..*",
    "mlp": r"blocks\.\d+\.mlp\..*",
    "gains": r"blocks\.\d+\.(attn_scale|mlp_scale|resid_mix)",
}
STYLE = """
text{font:12px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;text-anchor:middle;fill:#1f2328}
.b{font-weight:600}.l{text-anchor:start}.e{text-anchor:end}.s{font-size:11px;fill:#59636e}
.bg{fill:#fff}.panel{fill:#f6f8fa;stroke:#d1d9e0}
.box{fill:#fff;stroke:#59636e}.blk{fill:#ddf4ff;stroke:#0969da}.att{fill:#fff8c5;stroke:#9a6700}
.mlp{fill:#dafbe1;stroke:#1a7f37}.ve{fill:#fbefff;stroke:#8250df}
path{fill:none;stroke:#59636e;stroke-width:1.3}.skip{stroke:#0969da;stroke-dasharray:4 3}.vep{stroke:#8250df}
.add{fill:#fff;stroke:#59636e}#a path{fill:#59636e;stroke:none}
@media (prefers-color-scheme:dark){
text{fill:#e6edf3}.s{fill:#9198a1}.bg{fill:#0d1117}.panel{fill:#151b23;stroke:#3d444d}
.box{fill:#0d1117;stroke:#9198a1}.blk{fill:#0c2d6b;stroke:#4493f8}.att{fill:#3b2e00;stroke:#d29922}
.mlp{fill:#033a16;stroke:#3fb950}.ve{fill:#2d1950;stroke:#ab7df8}
path{stroke:#9198a1}.skip{stroke:#4493f8}.vep{stroke:#ab7df8}.add{fill:#0d1117;stroke:#9198a1}#a path{fill:#9198a1}
}"""


def default_model() -> tuple[Hyperparameters, dict[str, int]]:
    """Default settings, and the number of parameters of each part of the default model."""
    with mock.patch.dict(os.environ, clear=True):
        h = Hyperparameters()
        with torch.device("meta"):
            model = GPT(h)
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        found = [part for part, pattern in PARTS.items() if re.fullmatch(pattern, name)]
        assert len(found) == 1, f"{name} is in {len(found)} parts of the picture: {found}"
        counts[found[0]] += parameter.numel()
    return h, counts


class Canvas:
    """SVG elements, in the order in which they are painted."""

    def __init__(self) -> None:
        self.elements: list[str] = []

    def text(self, x: float, y: float, content: str, style: str = "") -> None:
        attribute = f' class="{style}"' if style else ""
        self.elements.append(f'<text x="{x:g}" y="{y:g}"{attribute}>{content}</text>')

    def box(self, x: float, y: float, width: float, height: float, style: str, *lines: str) -> None:
        """A rectangle with centred lines of text; lines after the first are small."""
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" class="{style}"/>'
        )
        top = y + height / 2 + 4 - 7.5 * (len(lines) - 1)
        for i, line in enumerate(lines):
            self.text(x + width / 2, top + 15 * i, line, "s" if i else "")

    def line(self, *points: tuple[float, float], style: str = "", arrow: bool = True) -> None:
        steps = " ".join(f"{x:g} {y:g}" for x, y in points)
        attribute = f' class="{style}"' if style else ""
        head = ' marker-end="url(#h)"' if arrow else ""
        self.elements.append(f'<path d="M{steps}"{attribute}{head}/>')

    def add(self, x: float, y: float) -> None:
        """A circled plus."""
        self.elements.append(f'<circle cx="{x:g}" cy="{y:g}" r="8" class="add"/>')
        self.line((x - 4, y), (x + 4, y), arrow=False)
        self.line((x, y - 4), (x, y + 4), arrow=False)


def draw_stack(c: Canvas, h: Hyperparameters, counts: dict[str, int]) -> float:
    """The left half: from tokens up the encoder, over the skips, down the decoder to the logits. Returns its end."""
    layers, encoders = h.num_layers, h.num_layers // 2
    value_blocks = [int(i) % layers for i in h.ve_layers.split(",")]
    left, right, width, height, pitch, first = 58, 248, 116, 30, 46, 92

    def row(block: int) -> float:
        return first + pitch * (encoders - 1 - block if block < encoders else block - encoders)

    c.text((left + right + width) / 2, first - 12, f"{counts['skips']:,} skip weights", "s")
    for block in range(layers):
        x, y = (left if block < encoders else right), row(block)
        c.box(x, y, width, height, "blk", f"block {block}")
        if block < encoders:
            c.line((left + width, y + 10), (right, y + 10), style="skip")  # to the block in the same row
        if block == encoders:
            c.line((left + width, y + 22), (right, y + 22))  # the stream itself turns round here
        elif block < encoders and block:
            c.line((x + width / 2, row(block - 1)), (x + width / 2, y + height))
        elif block > encoders:
            c.line((x + width / 2, row(block - 1) + height), (x + width / 2, y))

    # Below the encoder: what makes x0.
    y, middle = row(0) + height + 46, left + width / 2
    c.line((middle, y), (middle, row(0) + height))
    c.text(middle + 8, y - 16, "x0, to every block", "s l")
    c.box(left, y, width, 38, "box", "SmearGate", f"{counts['smear']:,}")
    c.line((middle, y + 54), (middle, y + 38))
    c.box(left, y + 54, width, 26, "box", "RMSNorm")
    c.line((middle, y + 104), (middle, y + 80))
    for x, name, shape, part in (
        (10, "embedding", f"{h.vocab_size:,} × {h.model_dim}", "embedding"),
        (124, "BigramHash", f"{h.bigram_vocab_size:,} × {h.bigram_dim}", "bigram"),
    ):
        c.box(x, y + 138, 108, 56, "box", name, shape, f"{counts[part]:,}")
        c.line((x + 54, y + 138), (x + 54, y + 112), ((middle - 8) if x < middle - 60 else middle + 8, y + 112))
        c.line((middle, y + 222), (middle, y + 210), (x + 54, y + 210), (x + 54, y + 194))
    c.add(middle, y + 112)
    c.text(middle, y + 236, "token ids")
    end = y + 242

    # Below the decoder: the head. Beside it: the value embedding.
    y, middle = row(layers - 1) + height, right + width / 2
    for label, small, tall in (
        ("RMSNorm", "", 26),
        ("tied head", "token embedding", 42),
        (f"soft cap {h.logit_softcap:g}", "", 26),
    ):
        c.line((middle, y), (middle, y + 18))
        c.box(right, y + 18, width, tall, "box", *filter(None, (label, small)))
        y += 18 + tall
    c.line((middle, y), (middle, y + 18))
    c.text(middle, y + 32, f"logits, {h.vocab_size:,}")
    top = row(layers - 1) + height + 34
    c.box(378, top, 96, 58, "ve", "value embed.", f"{h.vocab_size:,} × {h.ve_dim}", f"{counts['values']:,}")
    c.line((426, top), (426, row(min(value_blocks)) + 15), style="vep", arrow=False)
    for block in value_blocks:
        c.line((426, row(block) + 15), (right + width, row(block) + 15), style="vep")
    return end


def draw_block(c: Canvas, h: Hyperparameters, counts: dict[str, int], bottom: float) -> None:
    """The right half: the inside of one block, from top to bottom."""
    left, right = 488, 790
    c.box(left, 44, right - left, bottom - 44, "panel")
    c.text((left + right) / 2, 64, f"inside block l = 0 … {h.num_layers - 1}", "b")
    each = (counts["attention"] + counts["mlp"] + counts["gains"]) // h.num_layers
    c.text((left + right) / 2, 80, f"{each:,} parameters in each", "s")
    x, width, stream = 528, 252, 508
    c.box(stream - 10, 92, right - stream, 28, "box", "u = m₀ x + m₁ x0")
    norm = "RMSNorm × 1/√(l + 1)" if h.ln_scale else "RMSNorm"
    kv, d = h.num_kv_heads, h.head_dim
    c.line((stream, 120), (stream, 378))
    c.line((stream, 136), (x + width / 2, 136), (x + width / 2, 146))
    c.box(x, 146, width, 26, "box", norm)
    for i, label in enumerate((f"q {h.num_heads} × {d}", f"k {kv} × {d}", f"v {kv} × {d}")):
        c.box(x + 86 * i, 184, 80, 26, "att", label)
        c.line((x + 86 * i + 40, 172), (x + 86 * i + 40, 184))
    c.line((x + 212, 210), (x + 212, 268))
    for i in (0, 1):
        c.line((x + 86 * i + 40, 210), (x + 86 * i + 40, 220))
    c.box(x, 220, 166, 38, "att", "QK norm and gain", f"RoPE on {h.rope_dims or d} of {d}")
    c.line((x + 83, 258), (x + 83, 268))
    c.box(x, 268, width, 26, "att", f"causal attention, {h.num_heads} heads on {kv}")
    xsa = "XSA: remove the part along own v" if h.xsa_last_n >= h.num_layers else f"XSA in the last {h.xsa_last_n}"
    c.line((x + width / 2, 294), (x + width / 2, 304))
    c.box(x, 304, width, 26, "att", xsa)
    c.line((x + width / 2, 330), (x + width / 2, 340))
    c.box(x, 340, width, 26, "att", f"output {h.num_heads * d} → {h.model_dim}")
    c.line((x + width / 2, 366), (x + width / 2, 386), (stream + 8, 386))
    c.text(stream + 16, 381, "× attn_scale", "s l")
    c.add(stream, 386)
    c.text(right - 10, 390, f"attention {counts['attention'] // h.num_layers:,}", "s e")
    c.line((stream, 394), (stream, 586))
    hidden = int(h.mlp_mult * h.model_dim)
    activation = f"LeakyReLU({h.leaky_slope:g})²" if h.leaky_slope else "ReLU²"
    c.line((stream, 410), (x + width / 2, 410), (x + width / 2, 422))
    for i, (style, label) in enumerate(
        (
            ("box", norm),
            ("mlp", f"{h.model_dim} → {hidden:,}"),
            ("mlp", activation),
            ("mlp", f"{hidden:,} → {h.model_dim}"),
        )
    ):
        c.box(x, 422 + 36 * i, width, 26, style, label)
        c.line((x + width / 2, 448 + 36 * i), (x + width / 2, 458 + 36 * i), arrow=i < 3)
    c.line((x + width / 2, 566), (x + width / 2, 594), (stream + 8, 594))
    c.text(stream + 16, 589, "× mlp_scale", "s l")
    c.add(stream, 594)
    c.text(right - 10, 598, f"MLP {counts['mlp'] // h.num_layers:,}", "s e")
    c.line((stream, 602), (stream, 622))
    c.text(right - 10, 614, f"gains {counts['gains'] // h.num_layers:,}", "s e")


def draw() -> str:
    """The text of the picture."""
    h, counts = default_model()
    c = Canvas()
    title = f"{h.num_layers} blocks of width {h.model_dim}, {sum(counts.values()):,} parameters"
    c.text(400, 26, title, "b")
    height = max(draw_stack(c, h, counts), 640) + 8
    draw_block(c, h, counts, height - 10)
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {height:g}" role="img">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style>",
            '<defs><marker id="h" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<g id="a"><path d="M0 0 8 4 0 8z"/></g></marker></defs>',
            f'<rect width="800" height="{height:g}" class="bg"/>',
            *c.elements,
            "</svg>\n",
        )
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(f"wrote {PICTURE}: {PICTURE.stat().st_size:,} bytes")
