import threading

import pytest

from torsh_text._writing import replacing, staged_folder, write_bytes


def test_replaces_with_the_usual_rights_or_not_at_all(tmp_path):
    target = tmp_path / "file"
    write_bytes(target, b"one")
    (tmp_path / "plain").touch()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(TypeError), replacing(target) as file:
        file.write("two")
    assert target.read_bytes() == b"one"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "plain"}


def test_threads_do_not_share_a_temporary_file(tmp_path):
    target = tmp_path / "file"
    both = threading.Barrier(2)
    errors = []

    def write(content):
        try:
            with replacing(target) as file:
                both.wait()  # both files are open
                file.write(content)
                both.wait()
        except BaseException as error:
            errors.append(error)

    contents = (b"a" * 100_000, b"b" * 200_000)
    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert target.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [target]


def test_says_which_folder_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*/x/y'; make it first"):
        write_bytes(tmp_path / "x" / "y" / "file", b"one")
    (tmp_path / "file").touch()
    staged = staged_folder(tmp_path / "file")
    with pytest.raises(FileExistsError, match=r"'.*/file' is a file; pass a folder"), staged:
        pass
