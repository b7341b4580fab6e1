"""The look of all pages: colours, figures that follow the page into dark mode, tables, and the page around them.

For report.py, watch.py, text_page.py and study_table.py. A page is one file that opens from disk: no request, no script
but that of a page that a server keeps up to date. Figures are drawn inside `with page_look()`."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import re
import xml.etree.ElementTree as ElementTree
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from runs import printable

CSS = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
# Name -> (light, dark). Figures are drawn in the light colours, which PNGs keep; on the page each becomes var(--name).
# c0 to c5: at least 3 to 1 on the card, and OKLab distances of 0.09 or more between any two, also as seen with each
# kind of dichromacy (Machado et al. 2009); the well-known palette of Okabe and Ito has 0.076 by the same measure.
COLOURS = {
    "ground": ("#f3f5f7", "#0d0f12"),
    "card": ("#ffffff", "#171a1f"),
    "text": ("#1b2027", "#e7eaef"),
    "muted": ("#57606b", "#a3adb9"),
    "rule": ("#d8dde3", "#353c46"),
    "c0": ("#2f6fd0", "#598ae2"),
    "c1": ("#c4594c", "#e17c44"),
    "c2": ("#0d5e0f", "#17bd8d"),
    "c3": ("#824396", "#ff93cd"),
    "c4": ("#009cdd", "#00cdfc"),
    "c5": ("#c08a00", "#d6d660"),
    "c6": ("#8a939f", "#7f8894"),
    "c7": ("#454d58", "#c5ccd6"),
}
PAINT = {name: light for name, (light, _) in COLOURS.items()}
DASHES = ((), (6, 2.5), (1.8, 1.8), (7, 2, 1.8, 2))
ROUND = (1, 2, 2.5, 5, 10)  # ticks are multiples of these
WIDTH, FONT = 384, 12.5  # units of a figure: on a phone of 360 pixels a unit is 0.81, so its text has 10.2
LOOK = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "parameter-golf",
    "font.size": FONT,
    "text.parse_math": False,  # a $ in a run's name is a $
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": PAINT["muted"],
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": PAINT["rule"],
    "xtick.labelcolor": PAINT["muted"],
    "ytick.labelcolor": PAINT["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 5,
    "ytick.major.pad": 5,
}


def page_look() -> AbstractContextManager[None]:
    """Returns a context in which figures are drawn as pages need them: the user's own settings would change them."""
    return matplotlib.style.context(LOOK, after_reset=True)


def shorten(text: str, most: int = 36) -> str:
    """Returns the text, its middle left out where it is longer."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[len(text) + 1 - most + most // 2 :]}"


# =================================================== figures =========================================================
class Key(NamedTuple):
    """An entry of a legend: a line with its dash, or an area."""

    label: str
    colour: str
    dash: tuple[float, ...] | None = None


class Picture(NamedTuple):
    """A drawn figure: name of its PNG, title, legend, its content in words, what to know about it."""

    name: str
    title: str
    figure: Figure
    legend: list[Key]
    words: str
    caption: str = ""


def new_axes(height: float, left: float, right: float, bottom: float, top: float) -> tuple[Figure, Axes]:
    """Returns a figure of the page's width, and axes in it with these margins; all in units of the page."""
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    sides = (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (bottom + top) / height)
    axes = figure.add_axes(sides)
    return figure, axes


def line_style(key: Key) -> dict[str, Any]:
    """Returns how matplotlib draws the line of a legend's entry."""
    return {"color": PAINT[key.colour], "linewidth": 1.7, "linestyle": (0, key.dash) if key.dash else "-"}


def compact(value: float, _position: object = None) -> str:
    """Returns the number of an axis: 1.5B, 20k, 0.25."""
    scales = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (0, ""))
    size, letter = next((pair for pair in scales if value >= pair[0]), (1, ""))
    return f"{value / (size or 1):.4g}{letter}"


def difference(value: float) -> str:
    """Returns a signed number with a true minus."""
    return f"{value:+.5f}".replace("-", "\N{MINUS SIGN}")


def to_svg(picture: Picture) -> str:
    """Returns the figure as an element of the page: its colours are the page's variables, its text is text."""
    buffer = io.BytesIO()
    picture.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root, variables = ElementTree.fromstring(buffer.getvalue()), {PAINT[name]: f"var(--{name})" for name in PAINT}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):  # that style would be the whole page's
                parent.remove(child)
    attributes = [(element, key, value) for element in root.iter() for key, value in element.attrib.items()]
    used = set(re.findall(r"#([\w-]+)", " ".join(v for _, k, v in attributes if k.endswith(("href", "clip-path")))))
    for element, key, value in attributes:
        del element.attrib[key]
        if key == "style":
            value = re.sub(r"#[0-9a-f]{6}\b", lambda found: variables[found[0]], value)
            value = re.sub(r"font-family:[^;]*; ?", "", re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", value))
        elif key == "id" or key.endswith(("href", "clip-path")):  # the page has several figures: names must differ
            value = re.sub(r"^(url\(#|#|)", rf"\1{picture.name}-", value) if key != "id" or value in used else ""
        if value:
            element.set(key.rpartition("}")[2], value)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": picture.words}
    return re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode"))


def to_png(picture: Picture) -> bytes:
    """Returns the figure on a light ground, with title and legend, which the page has as text."""
    figure, keys, height, buffer = picture.figure, picture.legend, picture.figure.get_figheight() * 72, io.BytesIO()
    figure.text(4 / WIDTH, 1 + 12 / height, picture.title, weight="bold", color=PAINT["text"])
    if keys:
        handles = [Patch(color=PAINT[k.colour]) if k.dash is None else Line2D([], [], **line_style(k)) for k in keys]
        place = {"loc": "upper left", "bbox_to_anchor": (0, -4 / height), "frameon": False}
        columns = 2 if max(len(key.label) for key in keys) < 20 else 1
        legend = figure.legend(handles, ["name"] * len(keys), ncols=columns, labelcolor=PAINT["text"], **place)
        for text, key in zip(legend.get_texts(), keys):  # set later: before 3.10 a label like _a is left out
            text.set_text(shorten(key.label))
    look = {"dpi": 200, "bbox_inches": "tight", "pad_inches": 0.15, "facecolor": PAINT["card"]}
    figure.savefig(buffer, format="png", metadata={"Software": None}, **look)
    return buffer.getvalue()


# =================================================== page ============================================================
def esc(text: Any) -> str:
    """Returns the text for HTML, in and out of attributes."""
    return html.escape(printable(text))


def num(value: float | None, form: str = ",.0f") -> str:
    """Returns a number as shown, with the exact one of the file beside it; a dash where there is none."""
    return "–" if value is None else f'<data value="{value!r}">{value:{form}}</data>'


def swatch(key: Key) -> str:
    """Returns a small sample of a line or an area."""
    look = f'stroke-width="{10 if key.dash is None else 2.6}" stroke-dasharray="{" ".join(map(str, key.dash or ()))}"'
    line = f'<line x2="28" y1="5" y2="5" style="stroke:var(--{key.colour})" {look}/>'
    return f'<svg class="swatch" viewBox="0 0 28 10" aria-hidden="true">{line}</svg>'


def table(label: str, head: list[str], rows: list[list[str]]) -> str:
    """Returns a table in a box of its own that scrolls; cells are HTML, those of numbers stand to the right."""
    heads, body = "", ""
    for column, text in enumerate(head):
        numeric = any(row[column].startswith("<data") for row in rows)
        heads += f'<th scope="col"{" class=n" * numeric}>{esc(text)}</th>'
    for row in rows:
        kinds = ["n" if cell.startswith(("<data", "–")) else "long" if len(cell) > 24 else "short" for cell in row]
        cells = "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(kinds[1:], row[1:]))
        body += f'<tr><th scope="row">{row[0]}</th>{cells}</tr>'
    box = f'<div class="scroll" role="region" aria-label="{esc(label)}" tabindex="0">'
    return f"{box}<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"


def card(*parts: str) -> str:
    """Returns a box of HTML."""
    return f'<div class="card">{"".join(parts)}</div>'


def figure_html(picture: Picture, has_legend: bool = True) -> str:
    """Returns the figure with its title, legend and caption."""
    keys = picture.legend if has_legend else []
    legend = "".join(f"<li>{swatch(key)}{esc(shorten(key.label))}</li>" for key in keys)
    rest = f'<ul class="legend">{legend}</ul>' * bool(legend) + f"<figcaption>{picture.caption}</figcaption>"
    return f'<figure id="{picture.name}"><h3>{picture.title}</h3>{to_svg(picture)}{rest}</figure>'


def whole_page(
    of: str, title: str, head: str, sections: dict[str, str], made: str, style: str = "", script: str = ""
) -> str:
    """Returns a page: what it is of, its title, what stands below that, title -> content of each section, how it was
    made, styles of its own, and a script that may ask the page's server; all as HTML. A section named Comparison takes
    the whole width, the others have two columns."""
    main = "".join(
        f'<section><h2>{name}</h2><div class="{"" if name == "Comparison" else "grid"}">{inner}</div></section>'
        for name, inner in sections.items()
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'; connect-src 'self'"
        script = f"<script>{script}</script>\n"
    light, dark = (" ".join(f"--{name}: {pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title} · Parameter Golf</title>
<style>
:root {{ color-scheme: light dark; {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}
{CSS}{style}</style>
</head>
<body>
<header><p class="muted">Parameter Golf, {of}</p><h1>{title}</h1>
{head}</header>
<main>{main}</main>
<footer>{made}</footer>
{script}</body>
</html>
"""
