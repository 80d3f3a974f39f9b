"""Draws what finetune_glue.py prints: scores against the tokens of pretraining, as an SVG.

    python assets/plot_scores.py --folder outputs --column "STS-B pearson" --to scores.svg

The folder holds its printed outputs as NAME-TOKENSM.log, such as pair-13.7M.log. Each name has a
colour: a dot for each seed, a line through medians, a dashed line at random weights, which have 0M.
"""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where cram.py is

from assets.plot import COLOURS, draw
from cram import fail, parse_flags, say


@dataclass
class Plot:
    """What the picture shows."""

    folder: str = "assets/glue-hour"  # with NAME-TOKENSM.log: printed outputs of finetune_glue.py
    column: str = "STS-B pearson"  # the score: a task and its metric, as printed
    to: str = "scores.svg"  # the file to write


def read_scores(ask):
    """{name: {million tokens: [score of each seed]}} of the logs in the folder."""
    found = {}
    for path in sorted(Path(ask.folder).glob("*.log")):
        named = re.fullmatch(r"(.+)-(\d+(?:\.\d+)?)M", path.stem)
        pattern = rf"seed \d+:.* {re.escape(ask.column)} (-?\d+\.\d|nan)"
        seeds = [float(score) for score in re.findall(pattern, path.read_text())]
        if not named or not seeds:
            continue
        if any(math.isnan(score) for score in seeds):
            fail(f"{path} has a seed without a score: expected numbers")
        found.setdefault(named[1], {})[float(named[2])] = seeds
    return found


def plot(ask):
    """Draws the scores; returns a sentence about what is in the picture."""
    scores = read_scores(ask)
    spent = [tokens for budgets in scores.values() for tokens in budgets if tokens > 0]
    if not spent:
        fail(f"{ask.folder} has no NAME-TOKENSM.log with a seed's {ask.column} after some tokens")
    series = []
    for number, (name, budgets) in enumerate(scores.items()):
        colour = COLOURS[number % len(COLOURS)]
        random = budgets.pop(0.0, [])
        budgets = sorted(budgets.items())
        series.append(("", colour, "line", [(x, median(ys)) for x, ys in budgets]))
        dots = [(x, y) for x, ys in budgets for y in ys]
        series.append((f"{name}, {ask.column}", colour, "dots", dots))
        if random:
            ends = [(x, median(random)) for x in (min(spent), max(spent))]
            series.append((f"{name}, random weights", colour, "dash", ends))
    draw(ask.to, series, "million tokens of pretraining", True, "%")
    return f"{ask.to}: outputs of {len(spent)} budgets"


def main(argv):
    ask = Plot(**parse_flags(Plot, argv, __doc__, {}))
    try:
        say(plot(ask))
    except OSError as error:
        fail(f"{error}: no picture was written")


if __name__ == "__main__":
    main(sys.argv[1:])
