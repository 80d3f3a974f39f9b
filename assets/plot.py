"""Draws the loss curves of runs as an SVG, and fits a power law to them.

    python cram.py plot OUT [OUT ...] --to curves.svg

An OUT is a run's folder, its log.csv, or a folder of logs. Each has a colour: a line for the
training loss, dots for the validation loss. Several logs in a folder are points of one curve, so
only their dots are drawn. The dashed lines are the unigram model and the power law.
"""

import html
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where cram.py is

from cram import fail, load_checkpoint, parse_flags, say, write_whole


@dataclass
class Plot:
    """What the picture shows."""

    to: str = "curves.svg"  # the file to write
    x: Literal["exaflops", "tokens", "seconds"] = "exaflops"  # what was spent: the x axis
    log: bool = True  # logarithmic x axis; the power law is drawn only there
    unigram: float = 0.0  # nats of the unigram line; 0: from the checkpoint.pt beside a log


AXES = {"exaflops": ("exaFLOP", 1), "tokens": ("million tokens", 1e-6), "seconds": ("seconds", 1)}
COLOURS = ("#3b8eea", "#e0791f", "#2fa35b", "#e5484d", "#a06cd5", "#1aa6a6", "#d65f9e")
GREY = "#888888"  # of the lines that are no run's

# ------------------------------------------------------------------------------------------------
# Logs, and the law in them


def read_log(path):
    """The rows of a log.csv, each {column: text}; none if the file is something else."""
    text = Path(path).read_text(errors="replace")
    whole, _, _ = text.rpartition("\n")  # a power cut may have left half a line at the end
    names, *lines = [line.split(",") for line in whole.splitlines()] or [[]]
    if not {"train_loss", "val_loss", *AXES} <= set(names):
        return []
    return [dict(zip(names, line)) for line in lines if len(line) == len(names)]


def find_logs(out):
    """The logs that OUT stands for. A run's folder is that run alone, whatever lies inside it."""
    out = Path(out)
    if out.is_file():
        return [out]
    if (out / "log.csv").exists():
        return [out / "log.csv"]
    return sorted(out.rglob("*.csv"))


def losses(rows, column, ask):
    """[(spent, nats), ...] of a column of a log: what is no number was not measured."""
    _, unit = AXES[ask.x]  # of the axis, in units of the log
    points = []
    for row in rows:
        try:
            spent = float(row[ask.x]) * unit
            loss = float(row[column] or "nan")  # not every row has a validation loss
        except ValueError:  # edited by hand
            continue
        drawable = spent > 0 or (spent == 0 and not ask.log)  # the first step's 0 has no logarithm
        if drawable and math.isfinite(spent + loss):
            points.append((spent, loss))
    return points


def unigram_level(folder):
    """The unigram line of the run in `folder`, or None if there is no checkpoint to tell it."""
    if not (folder / "checkpoint.pt").exists():
        return None
    try:
        return load_checkpoint(folder)["meta"]["unigram_nats"]
    except SystemExit as error:  # of another version, or damaged: the log can be drawn without it
        say(f"no unigram line, give it with --unigram ({error})")
        return None


def lower_envelope(points):
    """The points (C, L) that no cheaper point beats: the best loss that so much compute has had."""
    best = math.inf  # so far, from left to right
    envelope = []
    for spent, loss in sorted(points):
        if spent > 0 and loss < best:
            envelope.append((spent, loss))
            best = loss
    return envelope


def power_law(envelope):
    """(L0, a, b) of L = L0 + a C^-b with L0 >= 0, by least squares; None below 4 points."""
    if len(envelope) < 4:
        return None
    spent, loss = np.array(envelope).T
    fits = []
    for b in np.geomspace(0.01, 3, 600):
        # For a given b the rest is linear: a floor, and a times the falling power.
        power = (spent / spent[-1]) ** -b  # 1 at the last point, so that no number gets too large
        matrix = np.stack((np.ones_like(spent), power), axis=1)
        floor, a = np.linalg.lstsq(matrix, loss)[0]
        if floor < 0:  # no loss is below 0, however much is spent
            floor = 0.0
            a = power @ loss / (power @ power)
        error = ((floor + a * power - loss) ** 2).sum()
        fits.append((error, floor, a * spent[-1] ** b, b))
    return min(fits)[1:]


# ------------------------------------------------------------------------------------------------
# Drawing: a picture of 900 x 410 pixels, the box of the curves from (50, 12) to (630, 360)

LEFT, RIGHT, TOP, BOTTOM = 50, 630, 12, 360
KEY = 652  # where the key begins, to the right of the box
TENS = [10.0**power for power in range(-30, 31)]
ROUND = [digit * ten for ten in TENS for digit in (1, 2, 5)]
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 {height}">
<style>
text {{font: 13px sans-serif; fill: #333}} rect {{fill: #fff}}
@media (prefers-color-scheme: dark) {{text {{fill: #ddd}} rect {{fill: #161b22}}}}
path {{fill: none; stroke-linecap: round; stroke-width: 1.5}}
.dash {{stroke-dasharray: 6 4}} .line {{opacity: .7}} .dots {{stroke-width: 7}}
.mid {{text-anchor: middle}} .end {{text-anchor: end}}
</style>
<rect width="900" height="{height}"/>"""


def grid(low, high):
    """Three to eight round numbers from low to high, at equal distances."""
    step = min(step for step in ROUND if 8 * step >= high - low)
    return np.arange(math.ceil(low / step), high / step) * step


def log_grid(low, high):
    """Round numbers from low to high; the two ends if there are none, never an axis without."""
    found = [x for x in ROUND if low <= x <= high]
    if len(found) > 13:  # labels would touch: one a decade
        found = [x for x in TENS if low <= x <= high]
    return found or [low, high]


def draw(path, series, x_label, log, y_label="nats"):
    """Writes the picture of `series` to `path`: a list of (label in the key or "", colour, style:
    line, dots or dash, points [(x, y), ...]); log: of the x axis."""
    if not str(path).lower().endswith(".svg"):
        fail(f"--to {path}: the picture is an SVG, expected a name that ends in .svg")
    xs = [x for *_, points in series for x, _ in points]
    ys = [y for *_, points in series for _, y in points]
    left = min(xs) if log else 0
    right = max(xs) * 1.000001 or 1  # never equal to left
    low, high = min(ys) - 0.05, max(ys) + 0.05  # room for half a dot

    def across(x):
        """Pixels from the left."""
        share = math.log(x / left) / math.log(right / left) if log else x / right
        return round(LEFT + (RIGHT - LEFT) * share, 1)

    def down(y):
        """Pixels from the top: SVG counts downwards, so a fall of the loss goes down."""
        return round(BOTTOM - (BOTTOM - TOP) * (y - low) / (high - low), 1)

    def write(x, y, text, kind=""):
        out.append(f'<text class="{kind}" x="{x}" y="{y}" dy=".3em">{html.escape(text)}</text>')

    def line(d, kind, colour):
        out.append(f'<path class="{kind}" stroke="{colour}" d="{d}"/>')

    # The grid and its numbers; text stands behind, before or across its point.
    out = []  # lines of the file
    write((LEFT + RIGHT) / 2, 396, x_label, "mid")
    write(10, TOP, y_label)
    for y in grid(low, high):
        line(f"M{LEFT} {down(y)}H{RIGHT}", "grid", "#8883")
        write(LEFT - 8, down(y), f"{y:.4g}", "end")
    for x in log_grid(left, right) if log else grid(0, right):
        line(f"M{across(x)} {TOP}V{BOTTOM}", "grid", "#8883")
        write(across(x), 374, f"{x:.3g}", "mid")

    # The curves, and in the key a sample and a name of each. A dot is a line of no length.
    key = 10  # how far down the key has got
    for label, colour, style, points in series:
        pixels = [f"{across(x)} {down(y)}" for x, y in points]
        between = " h0 M" if style == "dots" else " L"
        if pixels:  # there may be no evaluation yet
            line(f"M{between.join(pixels)} h0", style, colour)
        if label:
            key += 20
            line(f"M{KEY} {key}h20", style, colour)
            write(KEY + 30, key, label)
    picture = [HEAD.format(height=max(410, key + 20)), *out, "</svg>\n"]
    data = "\n".join(picture).encode(errors="replace")  # a folder's name may be no text
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(data))


# ------------------------------------------------------------------------------------------------
# The command


def plot(outs, ask):
    """Draws the runs `outs` as `ask` says; returns a sentence about what is in the picture."""
    series = []  # of the picture
    validations = []  # of all runs together: the law goes through their lower envelope
    levels = {ask.unigram} - {0.0}  # of the unigram lines: one for each text among the runs
    for number, out in enumerate(outs):
        colour = COLOURS[number % len(COLOURS)]
        logs = {path: read_log(path) for path in find_logs(out)}
        paths = [path for path in logs if logs[path]]  # the others are no logs
        rows = [row for path in paths for row in logs[path]]
        training = losses(rows, "train_loss", ask)
        validation = losses(rows, "val_loss", ask)
        if not training + validation:
            fail(f"{out} has no loss to draw yet: expected a run's folder, a log, a folder of logs")
        if len(paths) == 1:  # else the way of each run would hide the others
            series.append(("", colour, "line", training))
        name = "/".join(Path(out).absolute().parts[-2:])[-30:]  # what the key has room for
        series.append((name, colour, "dots", validation))
        validations += validation
        if not ask.unigram:
            levels |= {unigram_level(path.parent) for path in paths} - {None}

    # The lines that are no run's.
    x_label, _ = AXES[ask.x]
    spent = [x for *_, points in series for x, _ in points]
    for level in sorted(levels):
        ends = [(min(spent), level), (max(spent), level)]
        series.append((f"unigram model {level:.3f}", GREY, "dash", ends))
    envelope = lower_envelope(validations)
    law = power_law(envelope)
    found = "no power law: it needs four"
    if law:
        floor, a, b = law
        found = f"L = {floor:.3g} + {a:.3g} C^-{b:.3g}"
        curve = [(c, floor + a * c**-b) for c in np.geomspace(envelope[0][0], envelope[-1][0], 50)]
        if ask.log:
            series.append((found, GREY, "dash", curve))
        found += f", C in {x_label}"
    draw(ask.to, series, x_label, ask.log)
    counts = f"{len(validations)} validation losses, {len(envelope)} on the lower envelope"
    return f"{ask.to}: {counts}: {found}"


def main(argv):
    """The words before the first flag are the runs."""
    runs = [word.startswith("-") for word in [*argv, "-"]].index(True)  # how many they are
    outs, flags = argv[:runs], argv[runs:]
    try:
        ask = Plot(**parse_flags(Plot, flags, __doc__, {}))
        if not outs:
            fail("no run is named: expected python cram.py plot OUT [OUT ...] --to curves.svg")
        say(plot(outs, ask))
    except OSError as error:
        fail(f"{error}: no picture was written")
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main(sys.argv[1:])
