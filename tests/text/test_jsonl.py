import csv
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from torsh_text._jsonl import GOES_ON, Texts, partial_of, read_texts, why_no_text, write_records


def _write(source, out, work=None, *, window=3, overwrite=False, **settings):
    def lengths(texts):
        return [{"length": len(text)} for text in texts]

    return write_records(
        source, work or lengths, out, settings=settings, window=window, overwrite=overwrite,
        progress=False,
    )  # fmt: skip


def _texts(count=10):
    return Texts([f"{'é' * i}" for i in range(count)], [2 * i + 1 for i in range(count)])


def test_reads_lines_and_fields(tmp_path):
    plain = tmp_path / "a.txt"
    plain.write_bytes("one\r\n\n  two \n\u2028three\x0b\nfour".encode())
    assert read_texts(plain, "text") == Texts(
        ["one", "  two ", "\u2028three\x0b", "four"], [1, 3, 4, 5]
    )
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "x\\ny", "n": 1}\n\n{"text": ""}\n', encoding="utf-8")
    assert read_texts(lines, "text") == Texts(["x\ny", ""], [1, 3])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_reads_over_a_byte_order_mark(tmp_path, name):
    line = '{"text": "é\ufeff"}' if name == "a.jsonl" else "é\ufeff"
    (tmp_path / name).write_text(f"\ufeff{line}\n", encoding="utf-8")
    assert read_texts(tmp_path / name, "text") == Texts(["é\ufeff"], [1])


def test_says_which_text_is_no_unicode(tmp_path):
    (tmp_path / "a.txt").write_bytes("é\n".encode() + "é\n".encode("latin-1"))
    good, bad = read_texts(tmp_path / "a.txt", "text").texts
    assert why_no_text(good) is None
    assert why_no_text(f"ab{bad}") == "character 2 is a lone surrogate or no UTF-8"


def test_reads_the_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n\nb\n"))
    assert read_texts(Path("-"), "text") == Texts(["a", "b"], [1, 3])


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"text": "b}', "the line is no JSON: Unterminated string starting at at column 10"),
        ("{}]", "the line is no JSON: Extra data at column 3"),
        ("9" * 5000, "the line is no JSON: Exceeds the limit .*"),
        ("[1]", "the line is no JSON object with a field 'text'"),
        ("3", "the line is no JSON object with a field 'text'"),
        ('{"body": "x", "n": 1}', "the line has no field 'text' but 'body', 'n'"),
        ("{}", "the line has no field 'text' but none at all"),
        ('{"text": null}', "the field 'text' holds null, no string"),
        ('{"text": [3]}', r"the field 'text' holds \[3\], no string"),
        ('{"text": "\\ud800"}', "character 0 is a lone surrogate or no UTF-8"),
    ],
)
def test_a_bad_line_hides_no_other(tmp_path, line, why):
    file, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    file.write_text(f'{{"text": "x"}}\n\n{line}\n{{"text": "yy"}}\n')
    found = read_texts(file, "text")
    assert found.lines == [1, 3, 4]
    assert list(found.faults) == [3]
    assert re.fullmatch(why, found.faults[3])
    assert _write(found, out) == (0, 1)
    first, bad, last = [json.loads(row) for row in out.read_text().splitlines()]
    assert bad == {"line": 3, "error": found.faults[3]}
    assert (first, last) == ({"line": 1, "length": 1}, {"line": 4, "length": 2})


def test_a_field_that_no_line_has_is_refused(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('\n{"body": "x"}\n{"body": "y"}\n')
    with pytest.raises(
        ValueError, match=r"a\.jsonl:2: the line has no field 'text' but 'body'; name the one .*--f"
    ):
        read_texts(file, "text")
    file.write_text("{\n}\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the line is no JSON: .* at column 2$"):
        read_texts(file, "text")


def test_what_a_file_is_told_to_be_converted_by_works(tmp_path):
    rows = [{"text": 'one, "two"\nthree', "n": "1"}, {"text": "b", "n": "2"}]
    for suffix, separator in ((".csv", ","), (".TSV", "\t")):
        file = tmp_path / f"my table{suffix}"
        with file.open("w", newline="") as target:
            writer = csv.DictWriter(target, ["text", "n"], delimiter=separator)
            writer.writeheader()
            writer.writerows(rows)
        _converts(file, "is a table, not one text a line; make JSON lines of it")
    for text in (json.dumps(rows), json.dumps(rows, indent=2)):
        (tmp_path / "a.json").write_text(text)
        _converts(tmp_path / "a.json", "is JSON, not one text a line; write an object a line")
    (tmp_path / "a.json").write_text("plain\n")
    assert read_texts(tmp_path / "a.json", "text").texts == ["plain"]


def _converts(file, why):
    with pytest.raises(ValueError, match=why) as told:
        read_texts(file, "text")
    command = str(told.value)[str(told.value).index("python -c") :]
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    made = read_texts(file.with_suffix(".jsonl"), "text")
    assert made.texts == ['one, "two"\nthree', "b"]


def test_ndjson_is_another_name_for_jsonl(tmp_path):
    (tmp_path / "a.NDJSON").write_text('{"body": "x"}\n')
    assert read_texts(tmp_path / "a.NDJSON", "body").texts == ["x"]


def test_says_what_is_wrong_with_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^no file '.*nope\.txt'$"):
        read_texts(tmp_path / "nope.txt", "text")
    with pytest.raises(IsADirectoryError, match=r"is a folder; name a file of texts"):
        read_texts(tmp_path, "text")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(OSError, match=r"^cannot read .*: Not a directory$"):
        read_texts(tmp_path / "a.txt" / "b.txt", "text")
    with pytest.raises(ValueError, match=r"field='body' is for .jsonl files"):
        read_texts(tmp_path / "a.txt", "body")


def test_refuses_an_empty_file(tmp_path):
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no text"):
        read_texts(tmp_path / "a.txt", "text")


def test_writes_one_record_a_text(tmp_path):
    out = tmp_path / "out.jsonl"
    assert _write(_texts(), out) == (0, 0)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert found == [{"line": 2 * i + 1, "length": i} for i in range(10)]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    with pytest.raises(FileExistsError, match="exists; name another or add --overwrite"):
        _write(_texts(), out)
    assert _write(_texts(3), out, overwrite=True) == (0, 0)
    assert len(out.read_text().splitlines()) == 3


def test_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "out.jsonl"
    seen = []

    def fails(texts):
        seen.extend(texts)
        if len(seen) > 6:
            raise RuntimeError("stop")
        return [{"length": len(text)} for text in texts]

    with pytest.raises(RuntimeError, match="stop"):
        _write(_texts(), out, fails)
    assert not out.exists()
    with partial_of(out).open("ab") as file:
        file.write(b'{"line": 13, "len')  # a torn line
    for change in ({"texts": _texts(9)}, {"model": "other"}):
        source = change.pop("texts", _texts())
        with pytest.raises(ValueError, match=r"other texts \(changed: (texts|model)\)"):
            _write(source, out, **change)
    again = []

    def counts(texts):
        again.extend(texts)
        return [{"length": len(text)} for text in texts]

    assert _write(_texts(), out, counts) == (6, 0)
    assert again == _texts().texts[6:]
    assert [json.loads(line)["length"] for line in out.read_text().splitlines()] == list(range(10))
    assert not partial_of(out).exists()


def _stops_after(count, kind=RuntimeError):
    seen = []

    def work(texts):
        seen.extend(texts)
        if len(seen) > count:
            raise kind("stop")
        return [{"length": len(text)} for text in texts]

    return work


def test_overwrite_goes_on_with_its_own_and_forgets_others(tmp_path):
    out = tmp_path / "out.jsonl"
    assert _write(_texts(4), out) == (0, 0)
    with pytest.raises(RuntimeError, match="stop"):
        _write(_texts(), out, _stops_after(6), overwrite=True)
    assert len(out.read_text().splitlines()) == 4  # until the new one is whole
    assert _write(_texts(), out, overwrite=True) == (6, 0)
    assert len(out.read_text().splitlines()) == 10
    with pytest.raises(RuntimeError, match="stop"):
        _write(_texts(), out, _stops_after(3), overwrite=True, model="other")
    assert _write(_texts(), out, overwrite=True) == (0, 0)
    assert [json.loads(line)["length"] for line in out.read_text().splitlines()] == list(range(10))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_of_someone_else_is_not_taken_for_a_partial(tmp_path, overwrite):
    out = tmp_path / "out.jsonl"
    partial_of(out).write_text("mine\n")
    if overwrite:
        assert _write(_texts(), out, overwrite=True) == (0, 0)
        return
    with pytest.raises(ValueError, match="left by another command"):
        _write(_texts(), out)
    assert partial_of(out).read_text() == "mine\n"


@pytest.mark.parametrize("kept", [0, 20, -20, None])
def test_a_partial_without_records_is_none(tmp_path, kept):
    out = tmp_path / "out.jsonl"
    header = b""

    def looks(texts):
        nonlocal header
        header = header or partial_of(out).read_bytes()
        return [{"length": len(text)} for text in texts]

    assert _write(_texts(), out, looks, model="other") == (0, 0)
    assert header.count(b"\n") == 1  # it is on the disk before the model loads
    out.unlink()
    torn = b'{"line": 1, "le' if kept is None else b""
    partial_of(out).write_bytes(header[:kept] + torn)
    assert _write(_texts(), out) == (0, 0)
    assert len(out.read_text().splitlines()) == 10


def test_a_failure_before_the_first_record_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="stop"):
        _write(_texts(), tmp_path / "out.jsonl", _stops_after(0))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("count", "said"), [(0, ("stop",)), (3, (GOES_ON,))])
def test_says_that_it_goes_on_where_it_does(tmp_path, count, said):
    with pytest.raises(KeyboardInterrupt) as stop:
        _write(_texts(), tmp_path / "out.jsonl", _stops_after(count, KeyboardInterrupt))
    assert stop.value.args == said


def test_only_one_process_writes(tmp_path):
    out = tmp_path / "out.jsonl"
    runs, goes_on = threading.Event(), threading.Event()

    def waits(texts):
        runs.set()
        assert goes_on.wait(30)
        return [{"length": len(text)} for text in texts]

    first = threading.Thread(target=_write, args=(_texts(), out, waits))
    first.start()
    try:
        assert runs.wait(30)
        for overwrite in (False, True):
            with pytest.raises(RuntimeError, match=r"another process is writing .*out.jsonl.part"):
                _write(_texts(), out, overwrite=overwrite)
    finally:
        goes_on.set()
        first.join()
    assert [json.loads(line)["length"] for line in out.read_text().splitlines()] == list(range(10))
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("damage", [b'{"line": 3, "length": 1}\n', b"\0\0\0\n", b"3\n"])
def test_publishes_only_one_record_a_text(tmp_path, damage):
    out = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError, match="stop"):
        _write(_texts(), out, _stops_after(3))
    with partial_of(out).open("ab") as file:
        file.write(damage)
    with pytest.raises(RuntimeError, match="does not hold one record for each text; remove it"):
        _write(_texts(), out)
    assert not out.exists()


def test_counts_refused_texts_of_all_runs(tmp_path):
    out = tmp_path / "out.jsonl"
    stops = _stops_after(6)

    def refuses(texts):
        return [{"error": "no"} if r["length"] == 1 else r for r in stops(texts)]

    with pytest.raises(RuntimeError, match="stop"):
        _write(_texts(), out, refuses)
    assert _write(_texts(), out) == (6, 1)
    assert json.loads(out.read_text().splitlines()[1]) == {"line": 3, "error": "no"}


def test_moved_lines_are_other_texts(tmp_path):
    moved = Texts(_texts().texts, [line + 1 for line in _texts().lines])
    assert moved.digest != _texts().digest == _texts().digest


def test_survives_being_killed(tmp_path):
    program = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from torsh_text._jsonl import Texts, write_records
        def work(texts):
            time.sleep(0.002)
            return [{"length": len(text)} for text in texts]
        source = Texts(["x" * i for i in range(300)], list(range(1, 301)))
        print("ready", flush=True)
        write_records(source, work, Path(sys.argv[1]), settings={}, window=2, overwrite=False,
                      progress=False)
    """)
    out = tmp_path / "out.jsonl"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    choose = random.Random(0)
    kills = 0
    while not out.exists():
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(out)], env=env, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        if kills < 4:
            time.sleep(choose.uniform(0.0, 0.25))
            child.send_signal(signal.SIGKILL)
            kills += 1
        child.wait()
        child.stdout.close()
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"line": i + 1, "length": i} for i in range(300)
    ]


def test_the_bar_shows_life_within_a_window(tmp_path, capsys):
    def slow(texts):
        time.sleep(2.3)
        return [{"length": len(text)} for text in texts]

    write_records(
        _texts(), slow, tmp_path / "out.jsonl", settings={}, window=100, overwrite=False,
        progress=True,
    )  # fmt: skip
    shown = capsys.readouterr().err
    assert "[00:01" in shown
    assert "[00:02" in shown
