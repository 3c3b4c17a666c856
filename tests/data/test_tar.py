import io
import json
import struct
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torsh_data import ShardedDataset, StreamLoader, convert
from torsh_data._braces import expand
from torsh_data._tar import read_members

KINDS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def make_tar(path, members, kind=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


names = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/."), min_size=1, max_size=90
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.lists(names, min_size=1, max_size=3), st.binary(max_size=2000))),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
@example([(["ü" * 200, "ж" * 80], b"x")], tarfile.GNU_FORMAT)
@example([(["a" * 150, "b" * 90], b"x" * 511)], tarfile.USTAR_FORMAT)
def test_members_are_those_of_tarfile(members, kind):
    file = io.BytesIO()
    make_tar_into(file, [("/".join(parts), content) for parts, content in members], kind)
    data = memoryview(file.getvalue())
    found = list(read_members(data, "a.tar"))
    file.seek(0)
    with tarfile.open(fileobj=file) as tar:
        expected = [member for member in tar if member.isreg()]
    assert [(m.name, m.start, m.size) for m in found] == [
        (m.name, m.offset_data, m.size) for m in expected
    ]
    assert [m.header for m in found] == [m.offset for m in expected]


def make_tar_into(file, members, kind):
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_sizes_beyond_octal_and_pax_sizes_are_understood(tmp_path):
    path = make_tar(tmp_path / "a.tar", [("a.bin", b"x" * 700)])
    content = bytearray(path.read_bytes())
    content[124:136] = b"\x80" + (700).to_bytes(11, "big")
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    assert [m.size for m in read_members(memoryview(content), "a")] == [700]
    info = tarfile.TarInfo("b.bin")
    info.size, info.pax_headers = 5, {"size": "5", "comment": "=\n"}
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"12345"))
    assert [m[2:] for m in read_members(memoryview(file.getvalue()), "b")] == [(1536, 5)]


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_members_of_one_name(tmp_path, kind):
    pixels = torch.randint(0, 255, (3, 7, 5), dtype=torch.uint8)
    from torchvision.io import encode_png

    png = encode_png(pixels).numpy().tobytes()
    members = []
    for n in range(20):
        key = f"dir/größe-{n}"
        members += [
            (f"{key}.cls", str(n).encode()),
            (f"{key}.txt", f"nümber {n}".encode()),
            (f"{key}.json", json.dumps({"n": [n, None]}).encode()),
            (f"{key}.NPY", npy(np.full((2, 2), n, np.float32))),
            (f"{key}.seg.png", png),
            (f"{key}.raw", bytes([n])),
        ]
        if n % 3 == 0:
            members.append((f"{key}.extra.txt", b"e"))
    make_tar(tmp_path / "a.tar", members, kind)
    data = ShardedDataset(tmp_path / "a.tar")
    assert len(data) == 20
    assert data.columns == [
        "__key__", "cls", "txt", "json", "npy", "seg.png", "raw", "extra.txt",
    ]  # fmt: skip
    for n in (0, 7, 19, -1):
        got, k = data[n], n % 20
        assert torch.equal(got.pop("npy"), torch.full((2, 2), float(k)))
        assert torch.equal(got.pop("seg.png"), pixels)
        assert got == {
            "__key__": f"dir/größe-{k}",
            "cls": k,
            "txt": f"nümber {k}",
            "json": {"n": [k, None]},
            "raw": bytes([k]),
            "extra.txt": "e" if k % 3 == 0 else None,
        }
    batch = data.read_batch([3, 1])
    assert batch["cls"].tolist() == [3, 1]
    assert batch["npy"].shape == (2, 2, 2)
    assert batch["raw"] == [b"\3", b"\1"]
    raw = ShardedDataset(tmp_path / "a.tar", decode="bytes", columns=["seg.png", "cls"])
    assert raw[4] == {"seg.png": png, "cls": b"4"}


def test_many_shards_with_other_columns_through_the_loader(tmp_path):
    written = {}
    for shard in range(3):
        members = []
        for n in range(40 * shard):
            key = f"{shard}-{n}"
            written[key] = n
            members.append((f"{key}.cls", str(n).encode()))
            if shard == 2:
                members.append((f"{key}.txt", b"t"))
        make_tar(tmp_path / f"{shard}.tar", members)
    data = ShardedDataset(tmp_path)
    assert data[0] == {"__key__": "1-0", "cls": 0, "txt": None}
    for workers in (0, 1):
        loader = StreamLoader(data, 7, num_workers=workers, drop_last=False)
        got = {
            key: n
            for batch in loader
            for key, n in zip(batch["__key__"], batch["cls"].tolist(), strict=True)
        }
        assert got == written


def test_contents_are_those_of_webdataset_when_it_is_there(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for n in range(10):
            writer.write({"__key__": f"s{n:03}", "cls": n, "json": {"n": n}, "txt": f"t{n}"})
    peer = webdataset.WebDataset(str(path), shardshuffle=False).decode()
    ours = ShardedDataset(path)
    assert [dict(s) for s in ours] == [{k: s[k] for k in ours.columns} for s in peer]


@pytest.mark.parametrize("suffix", ["pkl", "pyd", "pth", "pt", "pickle", "x.pyd"])
def test_pickles_are_refused_by_name(tmp_path, suffix):
    make_tar(tmp_path / "a.tar", [("a.cls", b"1"), (f"a.{suffix}", b"cos\nsystem\n.")])
    with pytest.raises(ValueError, match=f"column '{suffix}' is a pickle, .*leave it out with co"):
        ShardedDataset(tmp_path)
    assert ShardedDataset(tmp_path, columns=["cls"])[0] == {"cls": 1}
    assert ShardedDataset(tmp_path, decode="bytes")[0][suffix] == b"cos\nsystem\n."


def test_arrays_of_objects_and_arrays_that_lie_about_their_size_are_refused(tmp_path):
    good = npy(np.zeros((2, 3), np.int16))
    lying = good.replace(b"(2, 3)", b"(2, 9)")
    make_tar(
        tmp_path / "a.tar",
        [
            ("a.npy", npy(np.array([{}], object))),
            ("b.npy", lying),
            ("c.npy", b"x"),
            ("d.npy", good),
        ],
    )
    data = ShardedDataset(tmp_path)
    for n, text in ((0, "object"), (1, "is not in"), (2, "magic|EOF|read")):
        with pytest.raises(ValueError, match=rf"a.tar: [abc].npy cannot be decoded: .*({text})"):
            data[n]
    assert data[3]["npy"].shape == (2, 3)


def test_images_are_bounded_and_broken_ones_named(tmp_path):
    from torchvision.io import encode_jpeg, encode_png

    picture = torch.zeros(3, 9, 4, dtype=torch.uint8)
    jpeg = encode_jpeg(picture).numpy().tobytes()
    png = bytearray(encode_png(picture).numpy().tobytes())
    png[16:24] = struct.pack(">II", 60_000, 60_000)
    huge = bytearray(jpeg)
    place = huge.index(b"\xff\xc0")
    huge[place + 5 : place + 9] = b"\xff\xff\xff\xff"
    make_tar(
        tmp_path / "a.tar",
        [("a.jpg", jpeg), ("b.jpg", bytes(huge)), ("c.jpg", jpeg[:40]), ("d.jpg", b"GIF89a")],
    )
    data = ShardedDataset(tmp_path, columns=["jpg"])
    assert data[0]["jpg"].shape == (3, 9, 4)
    for n, text in ((1, "too large"), (2, "c.jpg"), (3, "not a JPEG or PNG")):
        with pytest.raises(ValueError, match=text):
            data[n]
    make_tar(tmp_path / "b.tar", [("a.png", bytes(png))])
    with pytest.raises(ValueError, match="an image of 60000 x 60000 pixels is too large"):
        ShardedDataset(tmp_path / "b.tar")[0]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_members_that_are_no_regular_files_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("evil.txt")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(ValueError, match=r"a.tar: 'evil.txt' is a \w+.*; samples are made of reg"):
        ShardedDataset(tmp_path)


def test_folders_and_names_without_suffix_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("folder.d")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
        for name in ("folder.d/a.cls", "folder.d/.hidden", "README"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"7"))
    with pytest.warns(UserWarning, match=r"2 members are no part of a sample, such as 'folder.d/."):
        data = ShardedDataset(tmp_path)
    assert list(data) == [{"__key__": "folder.d/a", "cls": 7}]


def test_two_members_of_one_name_are_refused(tmp_path):
    make_tar(tmp_path / "a.tar", [("a.txt", b"1"), ("a.TXT", b"2")])
    with pytest.raises(ValueError, match="sample 'a' has two members 'txt'"):
        ShardedDataset(tmp_path)


def test_members_of_a_sample_that_are_apart_are_refused(tmp_path):
    make_tar(tmp_path / "a.tar", [("a.txt", b"1"), ("b.txt", b"2"), ("a.cls", b"3")])
    with pytest.raises(ValueError, match=r"'a.cls' is not beside the other members of its sample"):
        ShardedDataset(tmp_path)


def test_files_stay_bytes_beside_decoded_labels(tmp_path):
    array = npy(np.zeros(3))
    members = [("a.jpg", b"j"), ("a.cls", b"9"), ("a.txt", b"t"), ("a.json", b"[1]")]
    make_tar(tmp_path / "a.tar", [*members, ("a.npy", array), ("a.pth", b"p")])
    expected = {"jpg": b"j", "cls": 9, "txt": "t", "json": [1], "npy": array, "pth": b"p"}
    data = ShardedDataset(tmp_path / "a.tar", decode="files")
    assert data[0] == {"__key__": "a", **expected}
    assert data.read_batch([0])["cls"].tolist() == [9]
    convert(tmp_path / "a.tar", tmp_path / "out")
    assert ShardedDataset(tmp_path / "out")[0] == {"__key__": "a", **expected}
    with pytest.raises(ValueError, match="decode='text'; use 'torch', 'files' or 'bytes'"):
        ShardedDataset(tmp_path / "a.tar", decode="text")


def test_braces_name_many_files(tmp_path):
    for n in (9, 10, 11):
        make_tar(tmp_path / f"a-{n:03}.tar", [(f"{n}.cls", str(n).encode())])
    make_tar(tmp_path / "b.tar", [("b.cls", b"0")])
    data = ShardedDataset(str(tmp_path / "a-{009..011}.tar"))
    assert [s["cls"] for s in data] == [9, 10, 11]
    assert len(ShardedDataset(str(tmp_path / "{a-010,b}.tar"))) == 2
    with pytest.raises(FileNotFoundError, match=r"a-012.tar' does not exist"):
        ShardedDataset(str(tmp_path / "a-{009..012}.tar"))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{08..10}", ["08", "09", "10"]),
        ("x{a,b}-{0..1}y", ["xa-0y", "xa-1y", "xb-0y", "xb-1y"]),
        ("{a}{}", ["{a}{}"]),
        ("s3://b/{0..1}", ["s3://b/0", "s3://b/1"]),
    ],
)
def test_braces_are_those_of_shells(pattern, names):
    assert expand(pattern) == names


def test_truncation_anywhere_is_noticed(tmp_path):
    path = make_tar(tmp_path / "a.tar", [(f"{n}.txt", b"x" * 700) for n in range(5)])
    content = path.read_bytes()
    end = 5 * (512 + 1024)
    for size in range(0, end + 1, 256):
        path.write_bytes(content[:size])
        with pytest.raises(RuntimeError, match=r"a.tar (has|is) .*(cut short|no end mark)"):
            ShardedDataset(path)


def test_damaged_headers_are_noticed_and_never_crash(tmp_path):
    path = make_tar(tmp_path / "a.tar", [("ü" * 120 + f"{n}.txt", b"x" * 9) for n in range(4)])
    content = path.read_bytes()
    expected = list(read_members(memoryview(content), "a"))
    random = np.random.default_rng(0)
    noticed = 0
    for _ in range(400):
        changed = bytearray(content)
        for _ in range(random.integers(1, 4)):
            changed[random.integers(6000)] ^= 1 << random.integers(8)
        try:
            found = list(read_members(memoryview(changed), "a"))
        except (RuntimeError, ValueError):
            noticed += 1
            continue
        assert all(m.start + m.size <= len(changed) for m in found)
        assert [m[1:] for m in found] == [m[1:] for m in expected]  # a flip in contents or padding
    assert noticed > 100


def test_pickling_and_blocks_of_large_shards(tmp_path):
    import pickle

    make_tar(tmp_path / "a.tar", [(f"{n}.bin", bytes([n]) * 500_000) for n in range(30)])
    data = ShardedDataset(tmp_path)
    assert len(data._starts) - 1 == 4  # blocks of about 4 MB
    copy = pickle.loads(pickle.dumps(data))
    assert [s["bin"][:1] for s in copy.__getitems__([29, 0, 8])] == [b"\x1d", b"\0", b"\x08"]
