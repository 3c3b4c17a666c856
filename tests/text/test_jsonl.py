import io
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from torsh_text._jsonl import Texts, partial_of, read_texts, write_records


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


def test_reads_the_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n\nb\n"))
    assert read_texts(Path("-"), "text") == Texts(["a", "b"], [1, 3])


@pytest.mark.parametrize("line", ["{", '{"body": "x"}', '{"text": 3}', "[1]", "3"])
def test_names_a_bad_line(tmp_path, line):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "x"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"a.jsonl:2 is no JSON object with a field 'text'"):
        read_texts(file, "text")


def test_refuses_an_empty_file(tmp_path):
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no text"):
        read_texts(tmp_path / "a.txt", "text")


def test_writes_one_record_a_text(tmp_path):
    out = tmp_path / "out.jsonl"
    assert _write(_texts(), out) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert found == [{"line": 2 * i + 1, "length": i} for i in range(10)]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    with pytest.raises(FileExistsError, match="exists; name another or add --overwrite"):
        _write(_texts(), out)
    assert _write(_texts(3), out, overwrite=True) == 0
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
        with pytest.raises(ValueError, match="left by another command or other texts"):
            _write(source, out, **change)
    again = []

    def counts(texts):
        again.extend(texts)
        return [{"length": len(text)} for text in texts]

    assert _write(_texts(), out, counts) == 6
    assert again == _texts().texts[6:]
    assert [json.loads(line)["length"] for line in out.read_text().splitlines()] == list(range(10))
    assert not partial_of(out).exists()


def test_overwrite_forgets_what_is_unfinished(tmp_path):
    out = tmp_path / "out.jsonl"
    partial_of(out).write_text("something else\n")
    assert _write(_texts(), out, overwrite=True) == 0
    assert len(out.read_text().splitlines()) == 10


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
