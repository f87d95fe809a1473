"""Real processes with the real libraries on tiny models."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from llmserve.config import ModelSpec, ServerConfig
from llmserve.engine.generation import Delta, Failed, GenerationEnd, GenerationParams, SamplingParams
from llmserve.engine.statistics import StatisticsCounter
from llmserve.errors import EngineDied, ModelCrashed, ModelFileError, TemplateError
from llmserve.models import isolation
from llmserve.models.loading import Loader, has_llamacpp
from tests import tiny_models

TIMEOUT = 60.0
LLAMACPP = pytest.mark.skipif(not has_llamacpp(), reason="the extra `llamacpp` is not installed")
ENGINES = ["ctransformers", pytest.param("llamacpp", marks=LLAMACPP)]
PLAIN = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


@pytest.fixture
def open_engine(tmp_path):
    """All engines are closed after the test."""
    loader = Loader(ServerConfig(cache_dir=str(tmp_path / "cache"), cores=2))
    with ExitStack() as opened:

        def open_engine(path, **options):
            spec = ModelSpec(**{"id": "tiny", "source": str(path), "slots": 2, "isolation": "process"} | options)
            return opened.enter_context(closing(loader.prepare(spec).open(StatisticsCounter())))

        yield open_engine


def submit(engine, content, max_tokens=12):
    prompt_ids = engine.tokenizer.encode(engine.chat_template.render([{"role": "user", "content": content}]))
    return engine.submit(prompt_ids, GenerationParams(max_tokens, sampling=SamplingParams(temperature=0)))


def last_event(generation):
    return list(generation.events(TIMEOUT))[-1]


def text_of(generation):
    return "".join(event.text for event in generation.events(TIMEOUT) if isinstance(event, Delta))


def pid_of(engine):
    return engine._process._process.pid


def is_gone(pid):
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("write", [tiny_models.write_llama_spm, tiny_models.write_llama_bpe])
def test_answers_and_prompts_are_the_same_either_way(open_engine, tmp_path, write, engine):
    path = write(tmp_path / "model.gguf")
    here, there = [open_engine(path, engine=engine, isolation=isolation) for isolation in ("thread", "process")]
    for content in ("hello river", "  two  spaces\n\n", "é 日本 </s> <|im_end|> <s>", "a" * 50, "the sea " * 20):
        segments = here.chat_template.render([{"role": "user", "content": content}])
        assert there.chat_template.render([{"role": "user", "content": content}]) == segments
        assert there.tokenizer.encode(segments) == here.tokenizer.encode(segments)
        assert text_of(submit(there, content)) == text_of(submit(here, content)) != ""
    assert there.info == here.info


@pytest.mark.parametrize(
    ("write", "engine"),
    [(write, engine) for write in (tiny_models.write_llama_spm, tiny_models.write_llama_bpe) for engine in ENGINES]
    + [pytest.param(tiny_models.write_bert, "llamacpp", marks=LLAMACPP)],
)
def test_vectors_are_the_same_either_way(open_engine, tmp_path, write, engine):
    path = write(tmp_path / "model.gguf")
    here, there = [open_engine(path, engine=engine, task="embed", isolation=isolation) for isolation in ("thread", "process")]
    texts = ["hello river", "  two  spaces\n\n", "é 日本 </s> <|im_end|> <s> \ud800", "a" * 50, "the sea " * 20]
    encoded = here.vectors.encode(texts)
    assert there.vectors.encode(texts) == encoded
    assert all(encoded)
    assert there.tokenizer.encode_text("hello river") == here.tokenizer.encode_text("hello river")
    first, second = [list(engine.embed(encoded).events(TIMEOUT))[:-1] for engine in (here, there)]
    assert first == second
    assert [event.choice for event in first] == list(range(len(texts)))
    assert (there.info, there.vectors.dimensions) == (here.info, here.vectors.dimensions)
    with pytest.raises(TemplateError):
        there.chat_template.render([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_process_that_dies_while_it_makes_vectors_ends_them_with_an_error(open_engine, tmp_path, engine):
    engine = open_engine(tiny_models.write_llama_spm(tmp_path / "model.gguf"), engine=engine, task="embed")
    generation, other = [engine.embed([[5] * 100] * 2000) for _ in range(2)]
    assert generation.read(0, TIMEOUT)
    os.kill(pid_of(engine), signal.SIGKILL)
    for event in (last_event(generation), last_event(other)):
        assert isinstance(event.error, EngineDied)
        assert "SIGKILL" in event.error.message


def test_a_ggml_file_answers_from_a_process(open_engine, tmp_path):
    source = tiny_models.write_ggml_gpt2(tmp_path / "gpt2.bin")
    assert text_of(submit(open_engine(source, model_type="gpt2", chat_template=PLAIN), "hello world"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
def test_a_process_that_dies_or_hangs_ends_its_answers_and_says_how(open_engine, tmp_path, number, caplog):
    engine = open_engine(tiny_models.write_llama_spm(tmp_path / "model.gguf"), engine="ctransformers")
    deaths = []
    engine.on_death(deaths.append)
    assert isinstance(last_event(submit(engine, "hello")), GenerationEnd)
    generation = submit(engine, "hello", max_tokens=200)
    assert generation.read(0, TIMEOUT)
    pid, begun = pid_of(engine), time.monotonic()
    os.kill(pid, number)
    event = last_event(generation)
    print(f"noticed after {time.monotonic() - begun:.2f} s")
    assert isinstance(event, Failed)
    assert isinstance(event.error, EngineDied)
    expected = {signal.SIGSTOP: "its process was stopped", signal.SIGKILL: "its process was killed with SIGKILL"}
    assert expected.get(number, "the library crashed with SIGSEGV") in event.error.message
    with pytest.raises(EngineDied):
        submit(engine, "hello")
    engine.close()
    assert is_gone(pid)
    assert len(deaths) == 1


def test_close_is_the_end_of_the_process(open_engine, tmp_path):
    engine = open_engine(tiny_models.write_llama_spm(tmp_path / "model.gguf"), engine="ctransformers")
    descriptors, pid = set(os.listdir("/proc/self/fd")), pid_of(engine)
    engine.close()
    assert is_gone(pid)
    assert len(set(os.listdir("/proc/self/fd"))) == len(descriptors) - 2  # its socket, and what it writes to


def test_a_file_that_kills_the_library_is_refused_with_the_signal(open_engine, tmp_path):
    path = tiny_models.write_ggml(tmp_path / "model.bin", "gpt2", context=8192, heads=64, layers=24)
    expected = r"^model.bin cannot be loaded: the library crashed with SIGSEGV \(ggml_new_object: not enough space"
    with pytest.raises(ModelCrashed, match=expected):
        open_engine(path, model_type="gpt2", context_length=8192, chat_template=PLAIN)


@LLAMACPP
def test_what_the_library_refuses_is_told_in_its_words(open_engine, tmp_path):
    path = tiny_models.write_llama_bpe(tmp_path / "model.gguf", tensors={"output_norm.weight": None})
    with pytest.raises(ModelFileError, match="output_norm"):
        open_engine(path)


def test_the_log_of_the_process_is_the_servers(open_engine, tmp_path, caplog):
    engine = open_engine(tiny_models.write_llama_spm(tmp_path / "model.gguf"), engine="ctransformers")
    with caplog.at_level(logging.ERROR):
        engine._process.send("no message")  # which ends the child's main thread with a traceback
        deaths = []
        engine.on_death(deaths.append)
        os.kill(pid_of(engine), signal.SIGABRT)
        deadline = time.monotonic() + TIMEOUT
        while not deaths:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert any("SIGABRT" in record.getMessage() for record in caplog.records)


SERVER = """
import sys, time
from llmserve.config import ModelSpec, ServerConfig
from llmserve.engine.statistics import StatisticsCounter
from llmserve.models.loading import Loader
spec = ModelSpec(id="tiny", source=sys.argv[1], engine="ctransformers", isolation="process")
engine = Loader(ServerConfig(cache_dir=sys.argv[2], cores=2)).prepare(spec).open(StatisticsCounter())
print(engine._process._process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("stopped", [False, True], ids=["alive", "hanging"])
def test_the_end_of_the_server_is_the_end_of_its_engines(tmp_path, stopped):
    path = tiny_models.write_llama_spm(tmp_path / "model.gguf")
    command = [sys.executable, "-c", SERVER, str(path), str(tmp_path / "cache")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        pid = int(server.stdout.readline())
        if stopped:
            server.send_signal(signal.SIGSTOP)  # so that it is not the server who ends it
            os.kill(pid, signal.SIGSTOP)
        server.kill()
    deadline = time.monotonic() + TIMEOUT
    while not is_gone(pid) and "Z (zombie)" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class TestSurviving:
    class Fragile:
        def __init__(self, note):
            self.note = note

        def fallback(self, cache_dir):
            return "sturdy", self.note

    def attempt(self, model):
        if model == "sturdy":
            return "opened"
        raise ModelCrashed("The library died of it.")

    def test_another_way_is_tried_and_remembered(self, tmp_path):
        note = tmp_path / "notes" / "note"
        assert isolation._survive(self.Fragile(note), tmp_path, self.attempt) == "opened"
        assert note.exists()

    def test_nothing_is_remembered_when_the_other_way_fails_too(self, tmp_path):
        def attempt(model):
            raise ModelCrashed("The library died of it.")

        with pytest.raises(ModelCrashed):
            isolation._survive(self.Fragile(tmp_path / "note"), tmp_path, attempt)
        assert not (tmp_path / "note").exists()

    def test_a_refusal_is_none(self, tmp_path):
        def attempt(model):
            raise ModelFileError("It is text.")

        with pytest.raises(ModelFileError, match="text"):
            isolation._survive(self.Fragile(tmp_path / "note"), tmp_path, attempt)
