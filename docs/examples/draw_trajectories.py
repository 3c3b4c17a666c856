"""Draw the paths of some optimizers: the picture of the tutorial. Takes the file to write."""

import sys
from pathlib import Path

import matplotlib as mpl

from torsh_optim import SGD, AdamW, Lion, Lookahead, trajectories

# Text stays text, and the same numbers give the same file
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "torsh"}
PICTURE = Path(__file__).parents[1] / "tutorials" / "optimizer-trajectories.svg"


def main() -> None:
    found = trajectories(
        {
            "SGD": lambda params: SGD(params, lr=2e-3, momentum=0.9),
            "AdamW": lambda params: AdamW(params, lr=0.2),
            "Lion": lambda params: Lion(params, lr=0.1),
            "Lookahead(SGD)": lambda params: Lookahead(SGD(params, lr=2e-3, momentum=0.9), k=5),
        },
        "beale",
        steps=150,
    )
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE
    with mpl.rc_context(STYLE):
        found.plot().figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
