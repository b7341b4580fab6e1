"""Writes a page of runs, index.html, and its figures as PNGs: loss, the ladder of scores, bytes, seconds, comparison.

    python records/report.py logs/demo                        # into logs/demo/report/
    python records/report.py logs/a logs/b logs/c --out page  # up to 24 runs on one page, into page/
    python records/report.py logs/a --watch                   # while it runs: http://localhost:8765, always the latest

The page is one file that opens from disk: no script, no request, readable on a phone and in dark mode. It shows what
metrics.jsonl and final_model.bin of each run say, both only parsed; what is missing is named on the page. The same
files give the same bytes. Needs records/requirements.txt. Ends with status 2 where a run cannot be read."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import available_packages  # noqa: F401
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from page import (
    DASHES,
    PAINT,
    ROUND,
    WIDTH,
    Key,
    Picture,
    card,
    compact,
    difference,
    esc,
    figure_html,
    line_style,
    new_axes,
    num,
    page_look,
    shorten,
    swatch,
    table,
    to_png,
    whole_page,
)
from runs import FAMILIES, PHASES, STAGES, ZSTD_LEVEL, Run, RunError, printable, read_runs, t

FAMILY_COLOURS = {family: f"c{i}" for i, family in enumerate(FAMILIES[:-2])} | {"header": "c6", "code": "c7"}
PHASE_COLOURS = dict(zip(PHASES, ("c1", "c2", "c6", "c0", "c3", "c7", "c5", "c4")))
PICTURES = ("loss_steps", "loss_tokens", "loss_seconds", "ladder", "bytes", "seconds")
KINDS = {
    "ttt_score_first": "adapting at test time, score first",
    "ttt_pre": "adapted before scoring, against the rules",
    "sliding": "sliding windows, no adaptation",
    "plain": "windows that do not overlap, no adaptation",
}


def key_of(run: Run) -> Key:
    """Returns the colour and the dash of a run, which no two runs of a page have in common."""
    return Key(run.name, f"c{run.index % 6}", DASHES[run.index // 6])


def legend_of(runs: list[Run]) -> list[Key]:
    """Returns the legend of runs: none where the page has one alone."""
    return [key_of(run) for run in runs if not run.alone]


def named(run: Run) -> str:
    """Returns the run's name, with the sample of its line where the page has several."""
    return "".join(map(swatch, legend_of([run]))) + f'<span title="{esc(run.name)}">{esc(shorten(run.name))}</span>'


# =================================================== comparing =======================================================
def changed_settings(run: Run) -> dict[str, Any]:
    """Returns the settings that are no defaults of this project's script."""
    knobs = t.Hyperparameters.knobs()
    return {n: v for n, v in run.settings.items() if n not in knobs or v != knobs[n].default}


def shared_settings(runs: list[Run]) -> dict[str, Any]:
    """Returns the settings that are no defaults and have one value in all these runs."""
    changed = [changed_settings(run) for run in runs if run.config] or [{}]
    return {n: v for n, v in changed[0].items() if all(n in other and other[n] == v for other in changed)}


def seed_groups(runs: list[Run]) -> list[list[Run]]:
    """Returns the finished runs, grouped by equality of all settings but the seed, of script, kind and scored text."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.final:
            same = [run.final[name] for name in ("code_sha256", "kind", "num_targets", "num_bytes")]
            groups.setdefault(json.dumps([run.settings, same], sort_keys=True), []).append(run)
    return list(groups.values())


# =================================================== figures =========================================================
def draw_loss(runs: list[Run], unit: str) -> Picture:
    """Returns train loss, as lines, and validation loss, as dots, against steps, tokens or seconds."""
    height, everything, framed, told = 286, [], [], []
    figure, axes = new_axes(height, 34, 16, 44, 26)
    for run in runs:
        factor = run.config["train_batch_tokens"] if unit == "tokens" else 1
        rows, dots = [(e["step"], e["seconds"], e["train_loss"]) for e in run.train], run.validations()
        x, dots_x = ([p[1] if unit == "seconds" else p[0] * factor for p in points] for points in (rows, dots))
        axes.plot(x, [p[2] for p in rows], **line_style(key_of(run)), marker="." if len(rows) == 1 else None)
        dot = {"s": 50, "color": PAINT[key_of(run).colour], "edgecolor": PAINT["card"], "linewidth": 1.2, "zorder": 3}
        axes.scatter(dots_x, [p[2] for p in dots], **dot)
        # Of a long run the first steps would take all of the height: the frame begins after a twentieth.
        least = 0.05 * rows[-1][0] if rows[-1][0] >= 1000 else 0
        everything += [p[2] for p in rows + dots]
        framed += [p[2] for p in rows + dots if p[0] >= least]
        told.append(f"{run.name} from {rows[0][2]:.4f} to {rows[-1][2]:.4f}")
    low, high, most = min(everything), max(framed), max(everything)
    pad = 0.05 * (high - low) or 0.1
    axes.set(xlim=(0, None), ylim=(low - pad, high + pad))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(compact))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=ROUND))
    label = "seconds of training, validations not counted" if unit == "seconds" else unit
    figure.text(0.5, 7 / height, label, ha="center", color=PAINT["muted"])
    figure.text(4 / WIDTH, 1 - 14 / height, "nats a token", color=PAINT["muted"])
    caption = f"The first steps, up to {most:.2f}, lie above the frame." if most > high else ""
    words = f"Train loss against {unit}, in nats a token: {'; '.join(told)}"
    return Picture(f"loss_{unit}", f"Loss against {unit}", figure, legend_of(runs), words, caption)


def draw_ladder(runs: list[Run]) -> Picture:
    """Returns the scores of the stages, from above to below, in bits per byte; of one run with the differences."""
    stages, alone = [stage for stage in STAGES if any(stage in run.scores for run in runs)], runs[0].alone
    height, right, told = 62 + 42 * len(stages), 146 if alone else 18, []
    figure, axes = new_axes(height, 78, right, 42, 8)
    for run in runs:
        ladder = [(score, stages.index(stage)) for stage, score in run.ladder().items()]
        axes.plot(*zip(*ladder), **line_style(key_of(run)), marker="o", markersize=7, markeredgecolor=PAINT["card"])
        for (score, y), before in zip(ladder, [None, *ladder]) if alone else ():
            side = {"y": y, "ha": "right", "va": "center_baseline", "transform": axes.get_yaxis_transform()}
            axes.text(x=1 + 70 / (WIDTH - 78 - right), s=f"{score:.5f}", color=PAINT["text"], **side)
            text = difference(score - before[0]) if before else ""
            axes.text(x=1 + 142 / (WIDTH - 78 - right), s=text, color=PAINT["muted"], **side)
        told.append(f"{run.name}: " + ", ".join(f"{stage} {score:.5f}" for stage, score in run.ladder().items()))
    axes.set_ylim(len(stages) - 0.5, -0.5)
    axes.set_yticks(range(len(stages)), stages, color=PAINT["text"])
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(3 if alone else 5, steps=ROUND))
    figure.text(4 / WIDTH, 7 / height, "bits per byte, less is better", color=PAINT["muted"])
    title, words = "From the trained weights to the score", f"Bits per byte. {'; '.join(told)}"
    return Picture("ladder", title, figure, legend_of(runs), words)


def draw_shares(name: str, title: str, shares: list[tuple[Run, dict[Key, float], float]], form: str) -> Picture:
    """Returns what parts make of a whole, as lying bars under their labels: of one run a bar for each part, of several
    a bar for each run, cut into the parts and with the whole beside it."""
    bars, legend = [(run.name, parts, whole) for run, parts, whole in shares], {k for _, p, _ in shares for k in p}
    if shares[0][0].alone:
        bars, legend = [(key.label, {key: value}, value) for key, value in shares[0][1].items()], set()
    row, told, figure = 40, [], Figure(figsize=(WIDTH / 72, 40 * len(bars) / 72))
    axes = figure.add_axes((4 / WIDTH, 0, 1 - 8 / WIDTH, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, max(sum(parts.values()) for _, parts, _ in bars) or 1), ylim=(len(bars), 0))
    for i, (label, parts, whole) in enumerate(bars):
        edge = {"edgecolor": PAINT["card"], "linewidth": 0.8} if len(parts) > 1 else {}
        for left, (key, value) in zip(np.cumsum([0, *parts.values()]), parts.items()):
            axes.barh(i + 25 / row, value, 12 / row, left, color=PAINT[key.colour], **edge)
        side = {"y": i + 14 / row, "color": PAINT["text"], "transform": axes.get_yaxis_transform()}
        axes.text(x=0, s=shorten(label), **side)
        axes.text(x=1, s=form.format(whole), ha="right", **side)
        told.append(f"{label} {form.format(whole)}")
    order = [*FAMILY_COLOURS, *PHASE_COLOURS]
    keys = sorted(legend, key=lambda key: (order.index(key.label) if key.label in order else len(order), key.label))
    return Picture(name, title, figure, keys, f"{title}: {'; '.join(told)}")


def byte_shares(run: Run) -> dict[Key, float]:
    """Returns the bytes of the artifact's parts and of the code; of several runs a family's bits are one part."""
    shares: dict[Key, float] = {}
    for part in run.parts:
        key = Key(part.label if run.alone else part.family, FAMILY_COLOURS.get(part.family, "c7"))
        shares[key] = shares.get(key, 0) + part.alone
    return shares | ({Key("code", FAMILY_COLOURS["code"]): run.final["bytes_code"]} if run.final else {})


def draw_all(runs: list[Run]) -> dict[str, Picture]:
    """Returns name -> picture of all figures for which some run has data."""
    trained, scored = [run for run in runs if run.train], [run for run in runs if run.ladder()]
    sizes = [(r, byte_shares(r), r.bytes_artifact + r.final.get("bytes_code", 0)) for r in runs if r.parts]
    phases = [(r, {Key(n, PHASE_COLOURS[n]): v for n, v in r.seconds().items()}) for r in runs]
    spans = [(run, parts, sum(parts.values())) for run, parts in phases if parts]
    pictures = [draw_loss(trained, unit) for unit in ("steps", "tokens", "seconds") if trained]
    pictures += [draw_ladder(scored)] if scored else []
    pictures += [draw_shares("bytes", "Where the bytes went", sizes, "{:,.0f} bytes")] if sizes else []
    pictures += [draw_shares("seconds", "Where the seconds went", spans, "{:,.1f} s")] if spans else []
    return {picture.name: picture for picture in pictures}


# =================================================== page ============================================================
def tiles_html(run: Run) -> str:
    """Returns the figures of one run: score, size, seconds, rules, seed."""
    tiles, final = [], run.final
    if final:
        loss = f"{num(final['val_loss'], '.5f')} nats a token, {esc(KINDS.get(final['kind'], final['kind']))}"
        size = f"{final['bytes_total'] / t.SIZE_LIMIT_BYTES:.1%} of {t.SIZE_LIMIT_BYTES:,}: "
        size += f"model {num(final['bytes_model'])}, code {num(final['bytes_code'])}"
        tiles += [("bits per byte", num(final["val_bpb"], ".5f"), loss), ("bytes", num(final["bytes_total"]), size)]
    if run.train:
        tiles.append(("seconds of training", num(run.train_seconds, ",.1f"), f"{num(run.steps)} steps"))
    if final:
        text = f"{num(final['num_targets'])} targets of {num(final['num_bytes'])} bytes"
        if "eval_seconds_strict" in final:
            text += f"; {num(final['eval_seconds_strict'], ',.1f')} with loading and preflight"
        kept, says = run.verdict()
        tiles.append(("seconds of scoring", num(final["eval_seconds"], ",.1f"), text))
        tiles.append(("rules kept", kept, esc("; ".join(says))))
    if run.config:
        tiles.append(("seed", num(run.config["seed"], ""), ""))
    cells = "".join(card(f"<dt>{name}</dt><dd><b>{big}</b><small>{rest}</small></dd>") for name, big, rest in tiles)
    return f'<dl class="tiles">{cells}</dl>'


def comparison_html(runs: list[Run]) -> str:
    """Returns the table of several runs, and the means over seeds of equal settings."""
    shared, rows = shared_settings(runs), []
    for run in runs:
        final, own = run.final, {n: v for n, v in changed_settings(run).items() if n not in shared}
        row = [named(run), num(run.config.get("seed"), ""), num(final.get("val_bpb"), ".5f")]
        row += [num(final.get("bytes_total")), num(run.steps), num(run.train_seconds, ",.1f")]
        kept, says = run.verdict()
        verdict = kept + "".join(f"<small>{esc(text)}</small>" for text in says)
        different = esc(", ".join(f"{n.upper()}={v}" for n, v in own.items()) or "none")
        if len(own) > 2:  # they would make the row a page high on a phone
            different = f"<details><summary>{len(own)} settings</summary>{different}</details>"
        rows.append([*row, num(final.get("eval_seconds"), ",.1f"), verdict, different])
    head = ["run", "seed", "bits per byte", "bytes", "steps", "training, s", "scoring, s", "rules kept"]
    means = means_html([group for group in seed_groups(runs) if len(group) > 1])
    return table("Runs", [*head, "settings that differ"], rows) + means


def means_html(groups: list[list[Run]]) -> str:
    """Returns means and sample standard deviations over runs that differ in their seed alone; none is left out."""
    rows = []
    for group in groups:
        seeds, figures = sorted(run.config["seed"] for run in group), []
        for name in ("val_bpb", "val_loss"):
            values = [run.final[name] for run in group]
            figures += [num(statistics.mean(values), ".5f"), num(statistics.stdev(values), ".5f")]
        twice = ": one is there more than once" if len(set(seeds)) < len(seeds) else ""
        names = "<br>".join(named(run) for run in group)
        rows.append([names, num(len(group)), *figures, esc(", ".join(map(str, seeds)) + twice)])
    head = ["runs of equal settings", "n", "bits per byte", "sample std", "nats a token", "sample std", "seeds"]
    none = "<p>No two finished runs here differ in their seed alone, so there is no mean over seeds.</p>"
    return f"<h3>Mean over seeds</h3>{table('Mean over seeds', head, rows)}" if rows else none


def losses_html(runs: list[Run]) -> str:
    """Returns what the curves begin and end with."""
    rows = []
    for run in runs:
        last = run.validations()[-1:] or [(0, 0, None)]
        losses = (run.train[0]["train_loss"], run.train[-1]["train_loss"], last[0][2])
        tokens = run.steps * run.config["train_batch_tokens"]
        rows.append([named(run), num(run.steps), num(tokens), *(num(loss, ".4f") for loss in losses)])
    text = """<p>Lines: train loss as logged, of a batch. Dots: validation loss of the raw weights, the last one after
    the last step. Both in nats a token.</p>"""
    head = ["run", "steps", "tokens", "first train", "last train", "validation"]
    return text + table("Losses", head, rows)


def ladder_html(runs: list[Run]) -> str:
    """Returns the scores on the way, with the differences from the stage before."""
    stages, rows = [stage for stage in STAGES if any(stage in run.scores for run in runs)], []
    for run in runs:
        ladder, before = run.ladder(), dict(zip(list(run.ladder())[1:], run.ladder().values()))
        steps = {stage: f"<small>{difference(ladder[stage] - before[stage])}</small>" for stage in before}
        rows.append([named(run), *(num(ladder.get(stage), ".5f") + steps.get(stage, "") for stage in stages)])
    text = """<p>Bits per byte, and the difference from the stage before. <b>raw</b>: the weights after the last step;
    <b>averaged</b>: their moving average; <b>quantized</b>: that, stored in few bits and read back from the file;
    <b>sliding</b>: the same in overlapping windows; <b>ttt</b>: the same, training on what it has scored.</p>"""
    return text + table("Scores on the way", ["run", *stages], rows)


def bytes_html(runs: list[Run]) -> str:
    """Returns what each part of each artifact takes."""
    whole = "" if runs[0].alone else " The number beside a bar is the real size of the run's file and code."
    text = f"""<p>The file is compressed as a whole, so no part has a size of its own in it: shown is each part
    compressed alone, codes and scales, by zstd level {ZSTD_LEVEL}, or codes by the tables of rans where that is the
    file's coder. Code is counted as it is.{whole} From the run's log: <b>clip</b>, the mean over rows of the largest
    value that can be stored; <b>error</b>, of what is stored, as a part of the weights, both root mean squares.</p>"""
    for run in runs:
        together, rows = sum(part.alone for part in run.parts), []
        for part in run.parts:
            each = 8 * part.alone / part.values if part.values else None
            grid = run.grids.get(part.family, {}) if part.bits and part.bits < 16 else {}
            clip, error = num(grid.get("clip"), ".4f"), num(grid.get("error"), ".2%")
            rows.append([esc(part.label), *map(num, part[2:]), num(each, ".2f"), clip, error])
        head = ["part", "values", "bytes stored", "bytes alone", "bits a value", "clip", "error"]
        sums = f"<p>Together {num(together)} bytes; final_model.bin has {num(run.bytes_artifact)}.</p>"
        inner = sums + table(f"Parts of {run.name}", head, rows)
        text += inner if run.alone else f"<details><summary>{named(run)}</summary>{inner}</details>"
    return text


def seconds_html(runs: list[Run]) -> str:
    """Returns the seconds of each phase of each run."""
    spans = [run.seconds() for run in runs]
    names = [name for name in PHASE_COLOURS if any(name in span for span in spans)]
    rows = [[named(run), *(num(span.get(name), ",.1f") for name in names)] for run, span in zip(runs, spans)]
    text = """<p>Wall-clock seconds. <b>train</b> and <b>score</b> are what the challenge limits to 600 s each;
    <b>validation</b> is of raw and averaged weights, <b>other scores</b> only inform. Set-up, and what comes after the
    score, are not clocked.</p>"""
    return text + table("Seconds of the phases", ["run", *names], rows)


def settings_html(runs: list[Run]) -> str:
    """Returns the settings that are no defaults and the same in all runs, and the machines."""
    knobs, rows = t.Hyperparameters.knobs(), []
    for name, value in shared_settings(runs).items():
        default = esc(knobs[name].default) if name in knobs else "no setting of this script"
        rows.append([esc(name.upper()), esc(value), default])
    settings = table("Settings", ["setting", "value", "default"], rows) if rows else "<p>None.</p>"
    machines = "".join(f"<li>{esc(m)}</li>" for m in dict.fromkeys(run.config["machine"] for run in runs if run.config))
    return card(settings) + card(f"<h3>Machine</h3><ul>{machines or '<li>not in the log</li>'}</ul>")


def notes_html(runs: list[Run]) -> str:
    """Returns what is missing or does not fit, each with the runs of which it is true."""
    notes: dict[str, list[str]] = {}
    for run in runs:
        for note in run.notes:
            notes.setdefault(note, []).append(esc(shorten(run.name)))
    who = {note: "all runs" if len(names) == len(runs) else ", ".join(names) for note, names in notes.items()}
    items = (f"<li>{'' if runs[0].alone else f'<b>{who[note]}</b>: '}{esc(note)}</li>" for note in notes)
    return f'<div class="card notes" role="note"><ul>{"".join(items)}</ul></div>' if notes else ""


def page_html(runs: list[Run], pictures: dict[str, Picture], now: str = "", style: str = "", script: str = "") -> str:
    """Returns the whole page; while runs are watched, with their state of now at its top, its style, and a script."""
    alone = runs[0].alone
    told = ("loss_tokens", "loss_seconds")  # their legend is that of loss_steps, before them
    figures = {name: figure_html(picture, has_legend=name not in told) for name, picture in pictures.items()}
    sections = {} if alone else {"Comparison": card(comparison_html(runs))}
    trained, stored = [run for run in runs if run.train], [run for run in runs if run.parts]
    scored, timed = [run for run in runs if run.ladder()], [run for run in runs if run.seconds()]
    if trained:
        curves = "".join(figures[f"loss_{unit}"] for unit in ("steps", "tokens", "seconds"))
        sections["Loss"] = curves + card(losses_html(trained))
    for title, name, of, rest in (
        ("Score", "ladder", scored, ladder_html),
        ("Bytes", "bytes", stored, bytes_html),
        ("Seconds", "seconds", timed, seconds_html),
    ):
        if of:
            sections[title] = figures[name] + card(rest(of))
    sections[f"Settings that are not defaults{'' if alone else ', the same in all runs'}"] = settings_html(runs)
    title = esc(runs[0].name) if alone else f"{len(runs)} runs"
    head = now + notes_html(runs) + (tiles_html(runs[0]) if alone else "")
    made = """Made by records/report.py from metrics.jsonl and final_model.bin of each run. Where a number is rounded,
its element in the page's source has the exact value. The figures lie beside this page as PNGs."""
    return whole_page(f"report of {'a run' if alone else 'runs'}", title, head, sections, made, style, script)


def write_report(runs: list[Run], out: Path) -> list[Path]:
    """Writes the page and the PNGs, each whole or not at all, and returns their paths. PNGs of an earlier report whose
    figure these runs do not have are removed."""
    out.mkdir(parents=True, exist_ok=True)
    with page_look():
        pictures = draw_all(runs)
        page = page_html(runs, pictures).encode()  # first: PNGs add titles and legends to the figures
        images = {name: to_png(picture) for name, picture in pictures.items()}
    for name in PICTURES:
        path = out / f"{name}.png"
        if name in images:
            t.write_atomically(path, images[name])
        else:
            path.unlink(missing_ok=True)
    t.write_atomically(out / "index.html", page)
    return [out / "index.html", *(out / f"{name}.png" for name in images)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a page, and PNGs, of the figures of runs.")
    parser.add_argument("runs", nargs="+", metavar="logs/RUN", help="folder of a run, with its metrics.jsonl")
    parser.add_argument("--out", type=Path, help="folder of the page; default: report/ in the first run's folder")
    parser.add_argument("--watch", action="store_true", help="serve the page to this machine while the runs go on")
    parser.add_argument("--port", type=int, help="of --watch; 0 takes a free one (8765)")
    given = parser.parse_args(arguments)
    if given.watch and given.out:
        parser.error("--watch writes no page, so --out has no effect: leave one of them out")
    if given.port is not None and not given.watch:
        parser.error("--port is of --watch: leave it out, or add that")
    if given.watch:
        import watch

        return watch.main(given.runs, 8765 if given.port is None else given.port)
    try:
        runs = read_runs(given.runs)
        paths = write_report(runs, given.out or Path(given.runs[0]) / "report")
    except (RunError, OSError, t.UserError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {printable(note)}")
    print(f"wrote {paths[0]} and {len(paths) - 1} PNGs beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
