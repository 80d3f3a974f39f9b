"""Draws what finetune_glue.py prints: scores against the tokens of pretraining, as an SVG.

    python assets/plot_scores.py FOLDER "STS-B pearson" --to scores.svg

FOLDER holds printed outputs as NAME-TOKENSM.log, such as pair-13.7M.log. A name has a colour: a dot
for each seed, a line through the medians, and a dashed line at random weights, which have 0M.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where cram.py is

from assets.plot import COLOURS, GREY, draw
from cram import fail, parse_flags, prepare_output, say


@dataclass
class Plot:
    """What the picture shows."""

    to: str = "scores.svg"  # the file to write


def read_scores(folder, column):
    """{name: {million tokens: [score of each seed]}} of the logs in `folder`."""
    found = {}
    for path in sorted(Path(folder).glob("*.log")):
        named = re.fullmatch(r"(.+)-(\d+(?:\.\d+)?)M", path.stem)
        seeds = re.findall(rf"seed \d+:.* {column} (\d+\.\d)", path.read_text())
        if named and seeds:
            found.setdefault(named[1], {})[float(named[2])] = [float(seed) for seed in seeds]
    return found


def main(argv):
    prepare_output()
    if len(argv) < 2 or argv[0].startswith("-"):
        fail('expected python assets/plot_scores.py FOLDER "STS-B pearson" --to scores.svg')
    folder, column, *flags = argv
    ask = Plot(**parse_flags(Plot, flags, __doc__, {}))
    scores = read_scores(folder, column)
    spent = [tokens for budgets in scores.values() for tokens in budgets if tokens > 0]
    if not spent:
        fail(f"{folder} has no NAME-TOKENSM.log with a seed's {column} after some tokens")

    series = []
    for (name, budgets), colour in zip(scores.items(), COLOURS):
        budgets = dict(sorted(budgets.items()))
        random = budgets.pop(0.0, [])
        series.append(("", colour, "line", [(x, median(ys)) for x, ys in budgets.items()]))
        series.append(
            (f"{name}, {column}", colour, "dots", [(x, y) for x, ys in budgets.items() for y in ys])
        )
        if random:
            ends = [(x, median(random)) for x in (min(spent), max(spent))]
            series.append((f"{name}, random weights", GREY, "dash", ends))
    draw(ask.to, series, "million tokens of pretraining", True, "%")
    say(f"{ask.to}: {sum(len(budgets) for budgets in scores.values())} outputs")


if __name__ == "__main__":
    main(sys.argv[1:])
