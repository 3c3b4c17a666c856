"""What a search decides: one option name per decision."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torsh_nas._document import dump_document, parse_document, write_atomically

if TYPE_CHECKING:
    from torsh_nas._space import Space

_KIND = "torsh_nas.architecture"
_VERSION = 1


class Architecture(Mapping[str, str]):
    """An immutable mapping from the label of each decision to the chosen option.

    Hashable and comparable, so it can be a dictionary key or a member of a set. Made by
    :meth:`Space.architecture`, :meth:`Space.sample` and the strategies, all of which check it
    against the space; ``space_id`` is the fingerprint of that space.

    Args:
        choices: Option by label.
        space_id: Fingerprint of the space the labels and options belong to.

    Example:
        >>> from torsh_nas import Architecture
        >>> arch = Architecture({"stem": "conv3", "block": "skip"}, space_id="0123456789abcdef")
        >>> arch["block"]
        'skip'
        >>> arch == Architecture.from_json(arch.to_json())
        True
    """

    __slots__ = ("_choices", "_space_id")

    def __init__(self, choices: Mapping[str, str], *, space_id: str) -> None:
        for label, option in choices.items():
            if not isinstance(label, str) or not isinstance(option, str):
                raise TypeError(f"labels and options are strings, got {label!r}: {option!r}")
        self._choices = dict(choices)
        self._space_id = space_id

    @property
    def space_id(self) -> str:
        """Fingerprint of the space, 16 hexadecimal digits."""
        return self._space_id

    def __getitem__(self, label: str) -> str:
        return self._choices[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Architecture):
            return NotImplemented
        return self._space_id == other._space_id and self._choices == other._choices

    def __hash__(self) -> int:
        return hash((self._space_id, frozenset(self._choices.items())))

    def __repr__(self) -> str:
        return f"Architecture({self._choices!r}, space_id={self._space_id!r})"

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the architecture as JSON and, with ``path``, write it there as well."""
        content = {"space_id": self._space_id, "choices": self._choices}
        text = dump_document(_KIND, _VERSION, content)
        if path is not None:
            write_atomically(path, text.encode())
        return text

    @classmethod
    def from_json(
        cls, source: str | os.PathLike[str], *, space: "Space | None" = None
    ) -> "Architecture":
        """Read what :meth:`to_json` wrote.

        Args:
            source: Path of a file, or the JSON text itself (which starts with ``{``).
            space: If given, the architecture must belong to it.

        Raises:
            ValueError: Another format or version, a wrong checksum, or an architecture of
                another space; the message names the first label or option that differs.
        """
        if isinstance(source, str) and source.lstrip().startswith("{"):
            text = source
        else:
            text = Path(source).read_text(encoding="utf-8")
        content = parse_document(text, _KIND, _VERSION)
        choices, space_id = content.get("choices"), content.get("space_id")
        if not isinstance(choices, dict) or not isinstance(space_id, str):
            raise ValueError(f"this {_KIND} file lacks 'choices' or 'space_id'")
        architecture = cls(choices, space_id=space_id)
        if space is not None:
            space.check(architecture)
        return architecture
