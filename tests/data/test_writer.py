import errno
import fcntl
import hashlib
import json
import logging
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torsh_data import ShardedDataset, write_shards
from torsh_data._index import read_index


def numbers(count):
    return [
        {"image": torch.full((1, 4, 4), n % 256, dtype=torch.uint8), "label": n}
        for n in range(count)
    ]


def digest(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_shards(iter(numbers(300)), tmp_path / name, shard_bytes="3kB", block_bytes="500B")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert len(digest(tmp_path / "a")) > 2


def test_shards_and_blocks_keep_to_their_sizes(tmp_path):
    write_shards(numbers(2000), tmp_path, shard_bytes="20kB", block_bytes="1kB")
    index = read_index(tmp_path / "index.json")
    assert index.rows == 2000 == sum(sum(shard.block_rows) for shard in index.shards)
    assert all(shard.bytes < 25_000 for shard in index.shards)
    assert {rows for s in index.shards for rows in s.block_rows[:-1]} == {42}  # 24 bytes a row


def test_shards_are_plain_arrow_files(tmp_path):
    write_shards(numbers(10), tmp_path)
    table = pa.ipc.open_file(str(tmp_path / "shard-00000.arrow")).read_all()
    assert table.column("label").to_pylist() == list(range(10))
    assert table.schema.field("image").type.shape == [1, 4, 4]


def test_the_index_says_what_there_is(tmp_path):
    write_shards(numbers(10), tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    assert (index["format"], index["version"], index["rows"]) == ("torsh-shards", 2, 10)
    assert index["bytes"] == (tmp_path / "shard-00000.arrow").stat().st_size
    assert index["schema"]["label"] == "int64"


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_blocks_are_smaller_and_read_the_same(tmp_path, compression):
    write_shards(numbers(500), tmp_path / "plain")
    write_shards(numbers(500), tmp_path / "small", compression=compression)
    plain, small = ShardedDataset(tmp_path / "plain"), ShardedDataset(tmp_path / "small")
    assert small.nbytes < plain.nbytes / 2
    assert torch.equal(small[321]["image"], plain[321]["image"])


def test_a_schema_narrows_the_types(tmp_path):
    schema = pa.schema([("label", pa.int8())])
    write_shards([{"label": 7}, {"label": -7}], tmp_path, schema=schema)
    data = ShardedDataset(tmp_path)
    assert data.schema.field("label").type == pa.int8()
    assert [data[0], data[1]] == [{"label": 7}, {"label": -7}]


def test_shuffling_writes_each_sample_once_in_another_order(tmp_path):
    write_shards(numbers(200), tmp_path, shuffle_seed=1)
    labels = [sample["label"] for sample in ShardedDataset(tmp_path).__getitems__(range(200))]
    assert sorted(labels) == list(range(200)) != labels


def leave_unfinished(folder, pid="4194304"):
    """What a killed writer leaves: two shards, half of a third, and its lock file."""
    write_shards(numbers(300), folder, shard_bytes="3kB", block_bytes="500B")
    (folder / "index.json").unlink()
    (folder / ".shard-00008.arrow.tmp").write_bytes(b"half")
    (folder / ".write_shards.lock").write_text(f"process {pid} on here")


def test_leftovers_of_a_killed_writer_are_replaced_and_other_files_kept(tmp_path, caplog):
    leave_unfinished(tmp_path)
    (tmp_path / "notes.txt").write_bytes(b"mine")
    with caplog.at_level(logging.INFO):
        write_shards(numbers(3), tmp_path)
    assert set(digest(tmp_path)) == {"shard-00000.arrow", "index.json", "notes.txt"}
    assert "left by a writer that did not finish" in caplog.text


@pytest.mark.parametrize("unfinished", [False, True])
def test_files_of_others_are_not_removed(tmp_path, unfinished):
    if unfinished:
        leave_unfinished(tmp_path)
    schema = pa.schema([("b", pa.binary())])
    with pa.ipc.new_file(str(tmp_path / "shard-00007.arrow"), schema) as writer:
        writer.write_batch(pa.record_batch([pa.array([b"precious"])], schema=schema))
    before = digest(tmp_path)
    with pytest.raises(FileExistsError, match=r"shard-00007.arrow was not written by write_shards"):
        write_shards(numbers(3), tmp_path)
    assert before.keys() == digest(tmp_path).keys()
    (tmp_path / "shard-00007.arrow").write_bytes(b"not even Arrow")
    with pytest.raises(FileExistsError, match="move it or write elsewhere"):
        write_shards(numbers(3), tmp_path)
    (tmp_path / "shard-00007.arrow").unlink()
    write_shards(numbers(3), tmp_path)
    assert set(digest(tmp_path)) == {"shard-00000.arrow", "index.json"}


def test_a_data_set_that_lost_its_index_is_not_removed(tmp_path):
    write_shards(numbers(300), tmp_path, shard_bytes="3kB", block_bytes="500B")
    (tmp_path / "index.json").rename(tmp_path / "index.bak")
    before = digest(tmp_path)
    with pytest.raises(FileExistsError, match=r"index.json is missing; copy the index back, or"):
        write_shards(numbers(3), tmp_path)
    assert digest(tmp_path) == before


def spoilt(count, value="x"):
    return [*numbers(count), {"image": numbers(1)[0]["image"], "label": value}]


def test_a_writer_that_fails_before_a_shard_is_finished_takes_back_what_it_wrote(tmp_path):
    (tmp_path / "notes.txt").write_bytes(b"mine")
    with pytest.raises(TypeError, match="sample 30: column 'label' holds str"):
        write_shards(spoilt(30), tmp_path, shard_bytes="3kB", block_bytes="500B")
    assert set(digest(tmp_path)) == {"notes.txt"}


SMALL = {"shard_bytes": "3kB", "block_bytes": "500B"}


def test_a_writer_that_fails_keeps_what_is_finished_and_the_next_goes_on(tmp_path):
    with pytest.raises(TypeError, match="sample 300: column 'label' holds str") as caught:
        write_shards(spoilt(300), tmp_path / "a", **SMALL)
    assert "finished shard(s) stay in" in caught.value.__notes__[0]
    first = (tmp_path / "a" / "shard-00000.arrow").stat()
    write_shards(iter(spoilt(300, 300)), tmp_path / "a", **SMALL)
    write_shards(spoilt(300, 300), tmp_path / "b", **SMALL)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert (tmp_path / "a" / "shard-00000.arrow").stat().st_ino == first.st_ino


@pytest.mark.parametrize(
    ("samples", "options", "error", "message"),
    [
        (numbers(300), {"shard_bytes": "4kB"}, ValueError, "shard_bytes=4000, but the unfinished"),
        (numbers(300), {"compression": "lz4"}, ValueError, "compression='lz4', but the unfin"),
        (numbers(300), {"num_workers": 2}, ValueError, "num_workers=2, but the unfinished"),
        (numbers(300), {"shuffle_seed": 1}, ValueError, "shuffle_seed=1, but the unfinished"),
        ([{"label": 1}], {}, ValueError, r"columns='label: int64.*' but the unfinished|columns="),
        (numbers(300)[1:], {}, ValueError, r"samples: the \d+ from number 0 on are not those"),
        (iter(numbers(300)[1:]), {}, ValueError, r"samples: the \d+ from number 0 on are not"),
        (
            [*numbers(150), *numbers(300)[149::-1]],
            {},
            ValueError,
            r"samples: the \d+ from number 2\d\d on are not",
        ),
        (iter(numbers(100)), {}, ValueError, "samples has 100 samples, but 2.. were written"),
        (numbers(100), {}, ValueError, "samples has 100 samples, but 2.. were written"),
    ],
)
def test_a_writer_that_would_write_something_else_is_refused(
    tmp_path, samples, options, error, message
):
    with pytest.raises(TypeError):
        write_shards(spoilt(300), tmp_path, **SMALL)
    before = digest(tmp_path)
    with pytest.raises(error, match=message) as caught:
        write_shards(samples, tmp_path, **{**SMALL, **options})
    assert "resume=False" in str(caught.value)
    after = digest(tmp_path)
    assert {n for n in before if n[0] != "."} == {n for n in after if n[0] != "."}
    write_shards(numbers(5), tmp_path, resume=False)
    assert len(ShardedDataset(tmp_path)) == 5
    assert set(digest(tmp_path)) == {"shard-00000.arrow", "index.json"}


@pytest.mark.parametrize("damage", ["missing", "short", "changed"])
def test_a_finished_shard_that_changed_is_not_built_upon(tmp_path, damage):
    with pytest.raises(TypeError):
        write_shards(spoilt(300), tmp_path, **SMALL)
    path = tmp_path / "shard-00001.arrow"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        flipped = content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]
        path.write_bytes(content[:-1] if damage == "short" else flipped)
    found = {"missing": "is missing", "short": "has .* bytes, not", "changed": "is damaged"}[damage]
    with pytest.raises(RuntimeError, match=rf"shard-00001.arrow, finished .* {found}"):
        write_shards(numbers(301), tmp_path, **SMALL)


def test_a_function_is_asked_for_the_samples_that_are_not_written_yet(tmp_path):
    starts = []

    def make(start, last="x"):
        starts.append(start)
        return iter(spoilt(300, last)[start:])

    with pytest.raises(TypeError):
        write_shards(make, tmp_path, **SMALL)
    starts.clear()
    write_shards(lambda start: make(start, 300), tmp_path, **SMALL)
    assert starts[:2] == [0, 0]  # the columns, and the first block
    assert 200 < starts[2] < starts[3] < 300  # the last finished block, and what follows
    assert len(starts) == 4
    assert [s["label"] for s in ShardedDataset(tmp_path)] == list(range(301))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("shuffle_seed", [None, 3])
def test_workers_write_what_one_process_would_in_files_of_their_own(tmp_path, shuffle_seed):
    write_shards(numbers(300), tmp_path / "one", shuffle_seed=shuffle_seed, **SMALL)
    write_shards(
        numbers(300), tmp_path / "three", shuffle_seed=shuffle_seed, num_workers=3, **SMALL
    )
    one, three = ShardedDataset(tmp_path / "one"), ShardedDataset(tmp_path / "three")
    assert [s["label"] for s in three] == [s["label"] for s in one]
    names = [Path(name).name for name in three.files]
    assert names == sorted(names)
    assert names[0] == "shard-00000-00000.arrow"
    assert names[-1].startswith("shard-00002-")
    assert all(damage is None for _, damage in three.check())
    assert not list((tmp_path / "three").glob(".*"))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_an_error_in_a_worker_is_that_of_the_call(tmp_path):
    with pytest.raises(TypeError, match="sample 300: column 'label' holds str") as caught:
        write_shards(spoilt(300), tmp_path, num_workers=2, **SMALL)
    assert any("In worker 1:" in note for note in caught.value.__notes__)
    write_shards(spoilt(300, 300), tmp_path, num_workers=2, **SMALL)
    assert [s["label"] for s in ShardedDataset(tmp_path)] == list(range(301))


def test_metadata_is_kept_as_it_will_be_read(tmp_path):
    given = {"classes": ("cat", "dog"), "mean": [0.5], "about": {"made": "today"}}
    write_shards(numbers(3), tmp_path, metadata=given)
    assert read_index(tmp_path / "index.json").metadata == {**given, "classes": ["cat", "dog"]}


def test_a_bar_is_shown_when_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torsh_data._progress._PATIENCE", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("TERM", "xterm")
    write_shards(numbers(300), tmp_path / "shown", progress=True, **SMALL)
    assert "Writing" in capsys.readouterr().out
    write_shards(numbers(300), tmp_path / "not", **SMALL)
    monkeypatch.delenv("FORCE_COLOR")
    write_shards(numbers(300), tmp_path / "piped", progress=True, **SMALL)
    assert capsys.readouterr().out == ""


def test_a_second_writer_in_the_same_folder_is_refused(tmp_path):
    def interrupted():
        for n, sample in enumerate(numbers(300)):
            if n == 200:
                with pytest.raises(RuntimeError, match=rf"process {os.getpid()} on .* is writing"):
                    write_shards(numbers(3), tmp_path)
            yield sample

    write_shards(interrupted(), tmp_path, shard_bytes="3kB", block_bytes="500B")
    assert len(ShardedDataset(tmp_path)) == 300
    assert not (tmp_path / ".write_shards.lock").exists()


def test_without_locks_in_the_file_system_writing_goes_on_with_a_warning(tmp_path, monkeypatch):
    def unsupported(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="this file system has no locks") as caught:
        write_shards(numbers(3), tmp_path)
    assert caught[0].filename == __file__
    assert len(ShardedDataset(tmp_path)) == 3


@pytest.mark.parametrize(
    ("samples", "options", "error", "message"),
    [
        ([], {}, ValueError, "samples is empty"),
        ([3], {}, TypeError, "sample 0 is a int; a sample is a mapping"),
        (
            [{"a": 1}, {"b": 1}],
            {},
            ValueError,
            r"sample 1 has the columns \['b'\], expected \['a'\]",
        ),
        (
            [{"a": 1}],
            {"block_bytes": "1GB"},
            ValueError,
            "block_bytes='1GB' is larger than shard_bytes",
        ),
        ([{"a": 1}], {"compression": "gzip"}, ValueError, "compression='gzip'; use None"),
        ([{"a": 1}], {"shard_bytes": "big"}, ValueError, "shard_bytes='big' is not a size"),
        (
            iter([{"a": 1}]),
            {"shuffle_seed": 0},
            TypeError,
            "shuffle_seed=0 needs samples with a length",
        ),
        ([{"a": 1}], {"num_workers": -1}, ValueError, "num_workers=-1 must be a number of proc"),
        (iter([{"a": 1}]), {"num_workers": 2}, TypeError, "num_workers=2 needs samples with a l"),
        (
            [{"a": 1}],
            {"metadata": {"a": {1}}},
            ValueError,
            "metadata is kept as JSON, which cannot",
        ),
        ([{"a": 1}], {"metadata": [1]}, TypeError, r"metadata=\[1\] must be a mapping"),
        ({"a": 1}, {}, TypeError, "sample 0 is a str; a sample is a mapping"),
        (
            [{"a": 1}],
            {"schema": pa.schema([("b", pa.int8())])},
            ValueError,
            "sample 0 has the columns",
        ),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, samples, options, error, message):
    with pytest.raises(error, match=message):
        write_shards(samples, tmp_path / "out", **options)
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_finished_data_set_is_not_written_over(tmp_path):
    write_shards(numbers(3), tmp_path)
    before = digest(tmp_path)
    with pytest.raises(ValueError, match="holds a finished data set; remove it or write elsewhere"):
        write_shards(numbers(4), tmp_path)
    assert digest(tmp_path) == before


DTYPES = [torch.uint8, torch.bool, torch.bfloat16, torch.float32, torch.int64]
COLUMNS = st.one_of(
    st.just(st.booleans()),
    st.just(st.integers(-(2**63), 2**63 - 1)),
    st.just(st.floats(allow_nan=False)),
    st.just(st.text(max_size=20)),
    st.just(st.binary(max_size=20)),
    st.builds(
        lambda dtype, shape: st.integers(0, 2**16).map(
            lambda n: (torch.arange(n, n + int(np.prod(shape))) % 251).to(dtype).view(shape)
        ),
        st.sampled_from(DTYPES),
        st.lists(st.integers(1, 4), min_size=1, max_size=3),
    ),
)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_samples_come_back(tmp_path_factory, data):
    columns = data.draw(
        st.dictionaries(st.text(min_size=1, max_size=5), COLUMNS, min_size=1, max_size=4)
    )
    samples = data.draw(st.lists(st.fixed_dictionaries(columns), min_size=1, max_size=30))
    folder = tmp_path_factory.mktemp("any")
    write_shards(
        samples,
        folder,
        shard_bytes=data.draw(st.integers(300, 3000)),
        block_bytes=data.draw(st.integers(1, 300)),
        compression=data.draw(st.sampled_from([None, "lz4"])),
    )
    back = ShardedDataset(folder).__getitems__(range(len(samples)))
    for was, now in zip(samples, back, strict=True):
        assert list(now) == list(samples[0])
        for name, value in was.items():
            if isinstance(value, torch.Tensor):
                assert now[name].dtype == value.dtype
                assert torch.equal(now[name], value)
            else:
                assert now[name] == value


def test_an_unfinished_folder_is_not_opened_file_by_file(tmp_path):
    write_shards(numbers(300), tmp_path, shard_bytes="3kB", block_bytes="500B")
    (tmp_path / "index.json").unlink()
    for source in (tmp_path, str(tmp_path / "*.arrow"), tmp_path / "shard-00000.arrow"):
        with pytest.raises(
            RuntimeError, match=r"no index.json beside it lists: the writer did not finish"
        ):
            ShardedDataset(source)


def test_names_sort_in_order(tmp_path):
    write_shards(numbers(300), tmp_path, shard_bytes="1kB", block_bytes="200B")
    names = [Path(name).name for name in ShardedDataset(str(tmp_path / "*.arrow")).files]
    assert names == sorted(names)
    assert len(names) > 10


@pytest.mark.parametrize("make", [list, iter])
def test_rows_of_tokens_of_any_length_come_back(tmp_path, make):
    rows = [{"ids": [], "names": []}, *({"ids": [n] * n, "names": ["a"] * n} for n in range(90))]
    write_shards(make(rows), tmp_path, block_bytes="500B")
    data = ShardedDataset(tmp_path)
    assert [sample["ids"].tolist() for sample in data] == [row["ids"] for row in rows]
    assert data[3]["names"] == ["a", "a"]
    assert len(data._starts) > 10  # the size of lists counts
    batch = data.read_batch([5, 2])
    assert [row.tolist() for row in batch["ids"]] == [[4] * 4, [1]]
