import multiprocessing
import pickle
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from torsh_data import ShardedDataset, write_shards
from torsh_data import _dataset as module

ROWS = 400


def sample(n):
    return {
        "image": torch.full((1, 3, 5), n % 251, dtype=torch.uint8),
        "label": n,
        "weight": n / 2,
        "even": n % 2 == 0,
        "text": f"nümber {n}" * (n % 3),
        "jpeg": bytes([n % 256]) * (n % 7),
        "half": torch.tensor([n, -n], dtype=torch.bfloat16),
    }


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(map(sample, range(ROWS)), folder, shard_bytes="12kB", block_bytes="1kB")
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


def assert_same(a, b):
    assert list(a) == list(b)
    for name in a:
        assert type(a[name]) is type(b[name])
        if isinstance(a[name], torch.Tensor):
            assert a[name].dtype == b[name].dtype
            assert torch.equal(a[name], b[name])
        else:
            assert a[name] == b[name]


def test_samples_come_back_by_number_by_slices_of_numbers_and_from_the_end(original):
    data = ShardedDataset(original)
    assert len(data) == ROWS
    assert len(data.files) > 2
    assert_same(data[123], sample(123))
    assert_same(data[-1], sample(ROWS - 1))
    ids = [399, 0, 57, 57, 200]
    for got, n in zip(data.__getitems__(ids), ids, strict=True):
        assert_same(got, sample(n))


def test_a_batch_by_columns_is_the_collated_batch_of_samples(original):
    data = ShardedDataset(original)
    ids = np.random.default_rng(0).permutation(ROWS)[:64]
    assert_same(data.read_batch(ids), default_collate([sample(n) for n in ids.tolist()]))


def test_columns_are_chosen_and_named_when_unknown(original):
    data = ShardedDataset(original, columns=["text", "label"])
    assert data[4] == {"text": sample(4)["text"], "label": 4}
    assert data.schema.names == ["text", "label"]
    with pytest.raises(ValueError, match=r"no column 'lable'; there are \['image', 'label'"):
        ShardedDataset(original, columns=["lable"])


@pytest.mark.parametrize("number", [ROWS, -ROWS - 1])
def test_a_sample_that_does_not_exist_is_an_index_error(original, number):
    with pytest.raises(IndexError, match=f"sample {number} of a data set of {ROWS}"):
        ShardedDataset(original)[number]


def test_iteration_ends(original):
    assert sum(1 for _ in ShardedDataset(original)) == ROWS


@pytest.mark.parametrize("verify", ["first_read", "always", "never"])
def test_all_ways_to_verify_read_the_same(original, verify):
    assert_same(ShardedDataset(original, verify=verify)[77], sample(77))


def test_transforms_take_the_sample_and_perhaps_a_generator(original):
    plain = ShardedDataset(original, transform=lambda s: s["label"] + 1)
    assert plain[3] == 4
    random = ShardedDataset(original, transform=lambda s, rng: (s["label"], rng.random()))
    first, again = random[3], random[3]
    assert first == again
    assert first[0] == 3
    assert random.__getitems__([9, 3])[1] == first
    optional = ShardedDataset(original, transform=lambda s, scale=2: s["label"] * scale)
    assert optional[3] == 6
    builtin = ShardedDataset(original, transform=dict)
    assert builtin[3]["label"] == 3


@pytest.mark.parametrize(
    ("transform", "match"),
    [
        (lambda image, label, rng: image, r"has the parameters \(image, label, rng\), but is call"),
        (lambda: 0, r"has the parameters \(\), but is called with \(sample\) or"),
        (lambda sample, *, size: sample, r"\(sample, \*, size\), .* with functools.partial"),
        ("decode", "transform is a str; give a function or None"),
    ],
)
def test_transforms_that_cannot_be_called_are_refused_at_once(original, transform, match):
    with pytest.raises(TypeError, match=match):
        ShardedDataset(original, transform=transform)


def test_its_repr_says_where_and_what(original, tmp_path):
    rows = len(ShardedDataset(original))
    shown = repr(ShardedDataset(original, columns=["label"]))
    assert re.fullmatch(
        rf"ShardedDataset\({original}: \d+ files; {rows:,} samples of label\)", shown
    )
    write_shards([{"a": 1, "b": 2}], tmp_path)
    shown = repr(ShardedDataset(tmp_path))
    assert shown == f"ShardedDataset({tmp_path}/shard-00000.arrow; 1 samples of a, b)"


def label_and_draw(sample, rng):
    return sample["label"], rng.random()


@pytest.mark.parametrize(
    "method",
    [
        "fork",
        pytest.param("spawn", marks=pytest.mark.slow),
        pytest.param("forkserver", marks=pytest.mark.slow),
    ],
)
def test_the_data_set_travels_into_workers(original, method):
    data = ShardedDataset(original, transform=label_and_draw)
    here = [data[n] for n in range(40)]  # opens files before the workers start
    context = multiprocessing.get_context(method)
    loader = DataLoader(data, 10, num_workers=1, multiprocessing_context=context, collate_fn=list)
    there = [pair for batch in loader for pair in batch][:40]
    assert there == here


def test_pickling_keeps_the_contents_and_leaves_open_files_behind(original):
    data = ShardedDataset(original)
    fresh = len(pickle.dumps(data))
    data.__getitems__(range(ROWS))
    assert len(pickle.dumps(data)) == fresh
    copy = pickle.loads(pickle.dumps(data))
    assert copy.fingerprint == data.fingerprint
    assert_same(copy[200], sample(200))


def test_a_flipped_byte_anywhere_is_found(folder):
    random = np.random.default_rng(1)
    paths = sorted(folder.glob("*.arrow"))
    for _ in range(60):
        path = paths[random.integers(len(paths))]
        original = path.read_bytes()
        changed = bytearray(original)
        changed[random.integers(len(changed))] ^= 1 << random.integers(8)
        path.write_bytes(changed)
        data = ShardedDataset(folder) if path != paths[0] else None
        with pytest.raises(RuntimeError, match=r"is damaged: expected xxh3 \w{16}, found \w{16}"):
            (data or ShardedDataset(folder)).__getitems__(range(ROWS))
        path.write_bytes(original)
    ShardedDataset(folder).__getitems__(range(ROWS))


def test_the_error_names_shard_block_and_checksums(folder):
    path = folder / "shard-00001.arrow"
    content = bytearray(path.read_bytes())
    content[2500] ^= 255
    path.write_bytes(content)
    data = ShardedDataset(folder)
    assert_same(data[0], sample(0))  # what is intact stays readable
    with pytest.raises(RuntimeError, match=r"shard-00001.arrow: block \d+ of \d+ is damaged"):
        data.__getitems__(range(ROWS))
    found = [damage for _, damage in data.check() if damage]
    assert [damage.shard for damage in found] == [str(path)]


def test_always_notices_what_changes_while_it_reads(folder):
    data = {verify: ShardedDataset(folder, verify=verify) for verify in ("first_read", "always")}
    for each in data.values():
        each.__getitems__(range(ROWS))
    path = folder / "shard-00000.arrow"
    with path.open("r+b") as file:
        file.seek(3000)
        byte = file.read(1)[0]
        file.seek(3000)
        file.write(bytes([byte ^ 1]))
    data["first_read"].__getitems__(range(ROWS))
    with pytest.raises(RuntimeError, match="is damaged"):
        data["always"].__getitems__(range(ROWS))


def test_a_missing_shard_is_noticed_at_once(folder):
    (folder / "shard-00001.arrow").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001.arrow is missing: index.json"):
        ShardedDataset(folder)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_shard_of_another_length_is_noticed_at_once(folder, change):
    path = folder / "shard-00001.arrow"
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + b"x")
    with pytest.raises(RuntimeError, match=r"has \d+ bytes, index.json says \d+"):
        ShardedDataset(folder)


def test_the_fingerprint_knows_contents_and_order_of_shards(original, tmp_path):
    assert ShardedDataset(original).fingerprint == ShardedDataset(original).fingerprint
    changed = ({**sample(n), "label": n + (n == 399)} for n in range(ROWS))
    write_shards(changed, tmp_path, shard_bytes="12kB", block_bytes="1kB")
    assert ShardedDataset(tmp_path).fingerprint != ShardedDataset(original).fingerprint
    part = ShardedDataset([original / "shard-00000.arrow"])
    assert part.fingerprint != ShardedDataset(original).fingerprint
    assert len(part) < ROWS


def test_plain_arrow_and_parquet_files_are_read(tmp_path):
    table = pa.table({"n": list(range(100)), "t": [f"{n}" for n in range(100)]})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=9)
    data = ShardedDataset(tmp_path)
    assert len(data) == 200
    assert [data[n] for n in (0, 99, 100, 199)] == [{"n": n, "t": str(n)} for n in (0, 99, 0, 99)]
    assert data.read_batch([5, 105])["n"].tolist() == [5, 5]
    assert list(pickle.loads(pickle.dumps(data)).files.values()) == [100, 100]


def test_decoded_blocks_are_given_back(tmp_path, monkeypatch):
    table = pa.table({"n": np.arange(10_000)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    monkeypatch.setattr(module, "_DECODED_BYTES", 4000)
    data = ShardedDataset(tmp_path)
    for n in range(0, 10_000, 50):
        assert data[n] == {"n": n}
    assert 1 < len(data._open_blocks) < 10
    assert data._decoded_bytes <= 4000


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_decompressed_blocks_of_foreign_files_are_given_back(tmp_path, compression, monkeypatch):
    table = pa.table({"n": np.zeros(200_000), "m": np.zeros(200_000)})
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=2000)
    data = ShardedDataset(tmp_path, columns=["n"])
    monkeypatch.setattr(module, "_DECODED_BYTES", 50_000)
    before = pa.total_allocated_bytes()
    for n in range(0, 200_000, 1000):
        assert data[n] == {"n": 0.0}
    assert 1 < len(data._open_blocks) <= 4
    assert 0 < data._decoded_bytes <= 50_000
    assert pa.total_allocated_bytes() - before < 100_000


def test_blocks_used_where_they_lie_do_not_count_as_memory(original, tmp_path):
    table = pa.table({"n": np.arange(10_000), "s": ["a"] * 10_000})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    for source in (original, tmp_path):
        data = ShardedDataset(source)
        data.__getitems__(range(len(data)))
        assert data._decoded_bytes == 0
        assert len(data._open_blocks) > 4


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1.5, 2.5, None]),
        pa.array([1, 2, None]),
        pa.array([True, False, None]),
        pa.array([[1, 2], [3, 4], None], pa.list_(pa.int16(), 2)),
        pa.ExtensionArray.from_storage(
            pa.fixed_shape_tensor(pa.int16(), [2]),
            pa.array([[1, 2], [3, 4], None], pa.list_(pa.int16(), 2)),
        ),
    ],
    ids=lambda column: str(column.type),
)
@pytest.mark.parametrize("block_rows", [1, 3])
def test_a_null_among_numbers_or_tensors_is_refused_in_batches_alone(tmp_path, column, block_rows):
    table = pa.table({"x": column})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=block_rows)
    data = ShardedDataset(tmp_path)
    batch = data.read_batch([1, 0])["x"]  # a tensor, whether or not their block has a null
    for row, n in zip(batch, (1, 0), strict=True):
        assert row.tolist() == column[n].as_py()
    assert data[2] == {"x": None}
    assert torch.as_tensor(data[1]["x"]).tolist() == column[1].as_py()
    for ids in ([0, 2], [-1, 0]):
        with pytest.raises(ValueError, match="column 'x' has a null in sample 2, and a tensor"):
            data.read_batch(ids)


def test_columns_that_come_as_lists_keep_their_nulls(tmp_path):
    columns = {"t": ["a", None], "l": [["u"], None], "b": [None, b"x"]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert ShardedDataset(tmp_path).read_batch([0, 1]) == columns


def test_numbers_beyond_int64_and_nulls_inside_rows_name_the_column(tmp_path):
    pq.write_table(pa.table({"u": pa.array([1, 2**63], pa.uint64())}), tmp_path / "a.parquet")
    data = ShardedDataset(tmp_path)
    assert data.read_batch([0])["u"].dtype == torch.int64
    with pytest.raises(ValueError, match="column 'u' holds 9223372036854775808 in sample 1, bey"):
        data.read_batch([0, 1])
    rows = pa.array([[1, None]], pa.list_(pa.int16(), 2))
    pq.write_table(pa.table({"v": rows}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="column 'v' has nulls inside its rows"):
        ShardedDataset(tmp_path)[0]


def test_empty_record_batches_of_foreign_files_are_passed_over(tmp_path):
    schema = pa.schema([("n", pa.int64())])
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), schema) as writer:
        for values in ([], [1, 2], [], [3]):
            writer.write_batch(pa.record_batch([pa.array(values, pa.int64())], schema=schema))
    data = ShardedDataset(tmp_path)
    assert [data[n]["n"] for n in range(3)] == [1, 2, 3]


def test_what_is_no_data_set_is_refused(tmp_path, original):
    with pytest.raises(FileNotFoundError, match=r"no .arrow, .parquet, .tar or .jsonl files"):
        ShardedDataset(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing.arrow is missing"):
        ShardedDataset([tmp_path / "nothing.arrow"])
    with pytest.raises(ValueError, match="verify='yes'; use 'first_read', 'always' or 'never'"):
        ShardedDataset(original, verify="yes")
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(ValueError, match=r"a.csv: reads .arrow"):
        ShardedDataset(tmp_path / "a.csv")
    (tmp_path / "a.arrow").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"a.arrow is empty, not an Arrow IPC file"):
        ShardedDataset(tmp_path)
    (tmp_path / "a.arrow").write_bytes(b"hello" * 20)
    with pytest.raises(RuntimeError, match=r"a.arrow is not a readable Arrow IPC file"):
        ShardedDataset(tmp_path)
    schema = pa.schema([("n", pa.int64())])
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), schema):
        pass
    with pytest.raises(ValueError, match="has files, but no rows"):
        ShardedDataset(tmp_path)


def test_files_with_other_columns_are_refused(tmp_path):
    for name, column in (("a", "x"), ("b", "y")):
        pq.write_table(pa.table({column: [1]}), tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"b.parquet has the columns y: int64, but .*x: int64"):
        ShardedDataset(tmp_path)


@pytest.mark.parametrize(
    ("columns", "error", "text"),
    [
        ([], ValueError, r"columns=\[\] leaves nothing; choose from \['n', 'm'\]"),
        ("n", TypeError, r"columns='n' must be a list of names, such as \['n'\]"),
        (["n", "m", "n"], ValueError, r"columns=\['n', 'm', 'n'\] has 'n' twice"),
    ],
)
def test_columns_that_choose_nothing_or_twice_are_refused(tmp_path, columns, error, text):
    pq.write_table(pa.table({"n": [1], "m": [2]}), tmp_path / "a.parquet")
    with pytest.raises(error, match=text):
        ShardedDataset(tmp_path, columns=columns)


def test_a_list_may_have_folders_and_patterns(tmp_path):
    from torsh_data import write_shards

    write_shards([{"n": 1}], tmp_path / "d")
    write_shards([{"n": 2}, {"n": 3}], tmp_path / "e")
    data = ShardedDataset([tmp_path / "d", str(tmp_path / "e" / "*.arrow")])
    assert [sample["n"] for sample in data] == [1, 2, 3]
    with pytest.raises(FileNotFoundError, match=r"nothing.arrow is missing"):
        ShardedDataset([tmp_path / "d", tmp_path / "nothing.arrow"])
