"""Entities marked in their texts, as one HTML page."""

import colorsys
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import cast

from ._entities import Entity
from ._writing import write_bytes

_GOLDEN = 0.618034  # hues this far apart stay apart, however many there are

_STYLE = """
:root { color-scheme: light; }
body { background: #fff; color: #111; font: 1rem/1.8 system-ui, sans-serif; margin: 2rem auto;
  max-width: 50rem; padding: 0 1rem; }
.text { border-top: 1px solid #ddd; overflow-wrap: anywhere; padding: 0.8rem 0;
  white-space: pre-wrap; }
.legend { list-style: none; margin: 0 0 1rem; padding: 0; }
.legend li { display: inline-block; margin: 0 1rem 0 0; }
mark { border-radius: 0.25em; color: #111; padding: 0.1em 0.25em; }
mark small { font-size: 0.7em; font-weight: 600; margin-left: 0.4em; user-select: none; }
"""


def label_colours(labels: Sequence[str]) -> dict[str, str]:
    """Give each label a light background of its own, such as ``"#ffd6d6"``, by its place."""
    found = {}
    for index, label in enumerate(labels):
        parts = colorsys.hls_to_rgb(index * _GOLDEN % 1, 0.85, 0.9)
        found[label] = "#" + "".join(f"{round(part * 255):02x}" for part in parts)
    return found


def _checked(text: str, entities: Sequence[Entity]) -> list[Entity]:
    ordered = sorted(entities, key=lambda entity: entity.start)
    end = 0
    for entity in ordered:
        if text[entity.start : entity.end] != entity.text or not 0 <= entity.start < entity.end:
            raise ValueError(f"{entity} is not in its text; pass each text with its own entities")
        if entity.start < end:
            raise ValueError(f"{entity} overlaps the one before; leave one of them out")
        end = entity.end
    return ordered


def _of_each(
    text: str | Sequence[str], entities: Sequence[Entity] | Sequence[Sequence[Entity]]
) -> tuple[list[str], list[Sequence[Entity]]]:
    """Return texts and the entities of each, refusing what is nested otherwise."""
    one = isinstance(text, str)
    texts = [text] if isinstance(text, str) else list(text)
    found = [cast("Sequence[Entity]", entities)] if one else list(entities)
    for index, some in enumerate(found):
        kinds = {type(entity) for entity in some} if isinstance(some, Sequence) else {type(some)}
        if not isinstance(some, Sequence) or not kinds <= {Entity}:
            name = "entities" if one else f"entities[{index}]"
            wanted = "a list of Entity, as text is one string" if one else "a list of Entity"
            raise TypeError(
                f"{name} holds {', '.join(sorted(kind.__name__ for kind in kinds))}, where it"
                f" should be {wanted}; for several texts pass a list of texts and a list of"
                " entities for each"
            )
    if len(texts) != len(found):
        raise ValueError(f"{len(texts)} texts and entities of {len(found)}; pass those of each")
    return texts, cast("list[Sequence[Entity]]", found)


def _marked(text: str, entities: Sequence[Entity], numbers: dict[str, int]) -> str:
    parts = []
    end = 0
    for entity in _checked(text, entities):
        label = escape(entity.label)
        parts.append(escape(text[end : entity.start]))
        parts.append(
            f'<mark class="l{numbers[entity.label]}" title="{label} {entity.score:.2f}">'
            f"{escape(entity.text)}<small>{label}</small></mark>"
        )
        end = entity.end
    parts.append(escape(text[end:]))
    return "".join(parts)


def highlight(
    text: str | Sequence[str],
    entities: Sequence[Entity] | Sequence[Sequence[Entity]],
    *,
    title: str | None = None,
) -> str:
    """Mark entities in their text: one HTML page with a legend, without scripts or links.

    Texts, labels and the title are escaped, and the page forbids itself to run or load anything.

    Args:
        text: A text, or several.
        entities: Its entities, or those of each text, as :meth:`torsh_text.Tagger.predict`
            returns them.
        title: Heading of the page; None for none.

    Returns:
        The page.

    Raises:
        TypeError: If ``entities`` is not nested as ``text`` is.
        ValueError: If an entity is not in its text or overlaps another.

    Example:
        >>> page = highlight("Ada & Bob", [Entity("Ada", "PER", 0, 3, 0.99)])
        >>> page[page.index("<mark class") :].splitlines()[0]
        '<mark class="l0">PER</mark> 1</li></ul>'
        >>> page[page.rindex("<mark class") :].splitlines()[0]
        '<mark class="l0" title="PER 0.99">Ada<small>PER</small></mark> &amp; Bob</div>'
    """
    texts, found = _of_each(text, entities)
    counts: dict[str, int] = {}
    for entity in (entity for some in found for entity in some):
        counts[entity.label] = counts.get(entity.label, 0) + 1
    labels = sorted(counts)
    numbers = {label: number for number, label in enumerate(labels)}
    colours = "".join(
        f".l{numbers[label]} {{ background: {colour}; }}\n"
        for label, colour in label_colours(labels).items()
    )
    legend = "".join(
        f'<li><mark class="l{numbers[label]}">{escape(label)}</mark> {counts[label]}</li>'
        for label in labels
    )
    bodies = "\n".join(
        f'<div class="text">{_marked(one, some, numbers)}</div>'
        for one, some in zip(texts, found, strict=True)
    )
    heading = f"<h1>{escape(title)}</h1>\n" if title is not None else ""
    return f"""<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title or "Entities")}</title>
<style>{_STYLE}{colours}</style>
</head>
<body>
{heading}<ul class="legend">{legend}</ul>
{bodies}
</body>
</html>
"""


def write_highlight(
    path: str | os.PathLike[str],
    text: str | Sequence[str],
    entities: Sequence[Entity] | Sequence[Sequence[Entity]],
    *,
    title: str | None = None,
) -> None:
    """Write the page of :func:`highlight` to a file, which is never half there.

    Args:
        path: The file, replaced if it is there.
        text: As for :func:`highlight`.
        entities: As for :func:`highlight`.
        title: As for :func:`highlight`.
    """
    page = highlight(text, entities, title=title)
    # a lone surrogate has no UTF-8; as a reference the browser shows its replacement
    write_bytes(Path(path), page.encode("utf-8", "xmlcharrefreplace"))
