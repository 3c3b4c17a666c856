import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from torsh_text._key_table import KeyTable


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=60)))
def test_key_table_against_dict(batches):
    table, expected, value = KeyTable(), {}, 0
    everything = np.array([(a, b) for a in range(4) for b in range(41)], np.uint64)
    for number, batch in enumerate(batches):
        values = np.arange(value, value + len(batch))
        value += len(batch)
        table.assign(np.array(batch, np.uint64).reshape(-1, 2), values)
        expected.update(zip(batch, values.tolist(), strict=True))
        if number % 3 == 2:
            table.forget(0, value // 2)
            expected = {key: v for key, v in expected.items() if v >= value // 2}
        found = table.find(everything).tolist()
        assert found == [expected.get((int(a), int(b)), -1) for a, b in everything]


def test_key_table_grows():
    table = KeyTable()
    keys = np.random.default_rng(0).integers(0, 2**63, (20_000, 2), np.uint64)
    keys[:, 0] %= 50  # far from hashes
    for start in range(0, 20_000, 1700):
        part = keys[start : start + 1700]
        table.assign(np.concatenate([part, part[:3]]), np.arange(start, start + len(part) + 3))
        table.assign(part[:3], np.arange(start, start + 3))
    assert np.array_equal(table.find(keys), np.arange(20_000))
    assert (table.find(keys + np.uint64(1)) == -1).all()
