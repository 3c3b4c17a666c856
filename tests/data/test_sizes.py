import pytest

from torsh_data._sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("1B", 1), ("64kB", 64_000), ("1.5 MB", 1_500_000), ("2GiB", 2**31), ("1TB", 10**12), (7, 7)],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_bytes(text, "shard_bytes") == size


@pytest.mark.parametrize("text", ["", "12", "4 kilos", "-3MB", "0B", 0, None, True])
def test_anything_else_is_refused_by_name(text):
    with pytest.raises(ValueError, match="shard_bytes="):
        parse_bytes(text, "shard_bytes")


def test_sizes_are_shown_in_three_digits():
    assert [format_bytes(n) for n in (0, 999, 1000, 46_821_368)] == [
        "0 B",
        "999 B",
        "1 kB",
        "46.8 MB",
    ]
