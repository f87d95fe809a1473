import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmserve.models import files


def test_a_workspace_is_gone_however_its_block_ends(tmp_path):
    with files.workspace(tmp_path / "new" / "folder") as work:
        (work / "file").touch()
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [".lock"]
    with pytest.raises(KeyboardInterrupt), files.workspace(tmp_path / "new" / "folder") as work:
        (work / "file").touch()
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [".lock"]


def test_workspaces_of_one_folder_take_turns(tmp_path):
    inside = []

    def visit(_):
        with files.workspace(tmp_path) as work:
            inside.append(work)
            most = len(inside)
            list(tmp_path.iterdir())  # lets others run
            inside.remove(work)
        return most

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(visit, range(40))) == {1}


def test_a_published_file_replaces_the_one_before(tmp_path):
    target = tmp_path / "target"
    target.write_text("old")
    with files.workspace(tmp_path) as work:
        (work / "file").write_text("new")
        files.publish(work / "file", target)
    assert target.read_text() == "new"


def test_identity_follows_the_path_the_size_and_the_time(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"1")
    first = files.identity(path)
    assert files.identity(path) == first
    (tmp_path / "link").symlink_to(path)
    assert files.identity(tmp_path / "link") == first
    modified = path.stat().st_mtime_ns
    os.utime(path, ns=(modified, modified + 1))
    assert files.identity(path) != first
    path.write_bytes(b"22")
    os.utime(path, ns=(modified, modified))
    assert files.identity(path) != first
