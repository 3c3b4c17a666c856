"""Names of many files in one, `train-{000..146}.tar`, as shells and WebDataset write them."""

import itertools
import re

_GROUP = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


def expand(pattern: str) -> list[str]:
    """All names that a pattern stands for; itself if it has no braces.

    `{007..010}` counts with the digits of its first number, `{train,val}` is one word of several.
    """
    words: list[list[str]] = []
    place = 0
    for group in _GROUP.finditer(pattern):
        begin, end, listed = group.groups()
        words.append([pattern[place : group.start()]])
        if listed is not None:
            words.append(listed.split(","))
        else:
            words.append([f"{n:0{len(begin)}d}" for n in range(int(begin), int(end) + 1)])
        place = group.end()
    words.append([pattern[place:]])
    return ["".join(parts) for parts in itertools.product(*words)]
