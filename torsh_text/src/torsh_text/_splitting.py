"""Splitting a long text into pieces that fit a model."""

from ._generate import Generator
from ._sentences import split_sentences


def split_to_fit(text: str, model: Generator, room: int) -> list[str]:
    """Split a text between sentences into the fewest pieces of ``room`` tokens, evenly.

    A sentence that is longer alone is split between words, or characters if it must be. The
    pieces hold everything but the white space between them.
    """
    if model.count_tokens([text])[0] <= room:
        return [text]
    if room < 1:
        raise ValueError(
            f"the model has no room for text (room={room}); use a smaller max_new_tokens, a"
            " shorter instruction or a model with a longer context"
        )
    sentences = split_sentences(text)
    spans = [(sentence.start, sentence.end) for sentence in sentences]
    # one more for each: a tokenizer may give a token to the space between two
    sizes = [n + 1 for n in model.count_tokens([sentence.text for sentence in sentences])]
    pieces: list[str] = []
    for start, end in _even_runs(sizes, room):
        first, last = spans[start][0], spans[end - 1][1]
        piece = text[first:last]
        if model.count_tokens([piece])[0] <= room:
            pieces.append(piece)
        elif end - start > 1:
            middle = spans[(start + end) // 2][0]
            pieces += split_to_fit(text[first:middle].strip(), model, room)
            pieces += split_to_fit(text[middle:last], model, room)
        else:
            pieces += _halves(piece, model, room)
    return pieces


def _even_runs(sizes: list[int], room: int) -> list[tuple[int, int]]:
    """Consecutive runs, as few as fit the room, with the largest as small as that allows."""

    def fill(limit: int) -> list[tuple[int, int]]:
        runs, start, total = list[tuple[int, int]](), 0, 0
        for i, size in enumerate(sizes):
            if i > start and total + size > limit:
                runs.append((start, i))
                start, total = i, 0
            total += size
        return [*runs, (start, len(sizes))]

    fewest = len(fill(room))
    low, high = 1, room
    while low < high:
        middle = (low + high) // 2
        if len(fill(middle)) <= fewest:
            high = middle
        else:
            low = middle + 1
    return fill(high)


def _halves(sentence: str, model: Generator, room: int) -> list[str]:
    """Split one long sentence near its middle, again and again, until the parts fit."""
    if model.count_tokens([sentence])[0] <= room or len(sentence) < 2:
        return [sentence]
    middle = len(sentence) // 2
    space = sentence.rfind(" ", 1, middle + 1)
    cut = space if space > middle // 2 else middle
    parts = [sentence[:cut].strip(), sentence[cut:].strip()]
    return [piece for part in parts if part for piece in _halves(part, model, room)]
