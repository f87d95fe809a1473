from pathlib import Path

import pytest

from llmserve import config
from llmserve.config import Config, ModelSpec, ServerConfig
from llmserve.errors import ConfigError


def load(tmp_path, text, **environ):
    path = tmp_path / "llmserve.toml"
    path.write_text(text)
    return config.load(path, environ)


def test_without_a_file_the_default_model_is_served():
    settings = config.load(environ={})
    assert [spec.id for spec in settings.models] == ["smollm2-135m-instruct"]
    assert settings.models[0].aliases == ("gpt-3.5-turbo", "gpt-4")
    assert settings.server.bind == "127.0.0.1:8080"


def test_a_file_overrides_what_it_names_and_nothing_else(tmp_path):
    settings = load(
        tmp_path,
        '[server]\nthreads = 100\nmemory_budget = "1.5GiB"\n[cache]\nmax_age = 60\n'
        '[[models]]\nid = "a/b"\nsource = "m.gguf"\nslots = 2\nload = "on_demand"\n',
    )
    assert settings.server.threads == 100
    assert settings.server.memory_budget == 3 * 2**29
    assert settings.server.request_timeout == Config().server.request_timeout
    assert settings.cache.max_age == 60.0
    assert settings.models == (ModelSpec(id="a/b", source=str(tmp_path / "m.gguf"), slots=2, load="on_demand"),)


def test_the_environment_names_the_file_the_keys_and_the_cache_folder(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[server]\nthreads = 33\n")
    settings = config.load(
        environ={"LLMSERVE_CONFIG": str(path), "LLMSERVE_API_KEYS": "a, b,", "LLMSERVE_CACHE_DIR": str(tmp_path)}
    )
    assert (settings.server.threads, settings.server.api_keys) == (33, ("a", "b"))
    assert settings.server.cache_dir == str(tmp_path)


def test_a_chat_template_is_read_from_its_file(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    settings = load(tmp_path, '[[models]]\nid = "m"\nsource = "pypi:x==1#m.gguf"\nchat_template = "t.jinja"\n')
    assert settings.models[0].chat_template == "{{ messages }}"
    assert settings.models[0].source == "pypi:x==1#m.gguf"


BAD = {
    "unknown table": ("[sever]\n", "sever"),
    "unknown key": ("[server]\nport = 1\n", "server.port"),
    "wrong type": ('[server]\nthreads = "many"\n', "server.threads"),
    "boolean for a number": ("[server]\nthreads = true\n", "server.threads"),
    "out of range": ("[server]\nthreads = 3\n", "server.threads"),
    "negative time": ("[server]\nrequest_timeout = -1\n", "server.request_timeout"),
    "infinite time": ("[server]\nrequest_timeout = inf\n", "server.request_timeout"),
    "bad size": ('[server]\nmemory_budget = "lots"\n', "server.memory_budget"),
    "bad list": ("[server]\napi_keys = [1]\n", "server.api_keys"),
    "no table": ("server = 1\n", "server"),
    "no models": ("models = []\n", "models"),
    "no id": ('[[models]]\nsource = "x"\n', "models[0].id"),
    "no source": ('[[models]]\nid = "x"\n', "models[0].source"),
    "empty id": ('[[models]]\nid = ""\nsource = "x"\n', "models[0].id"),
    "unknown choice": ('[[models]]\nid = "x"\nsource = "x"\nload = "never"\n', "models[0].load"),
    "a name twice": ('[[models]]\nid = "x"\nsource = "x"\naliases = ["y", "x"]\n', "'x'"),
    "no template file": ('[[models]]\nid = "x"\nsource = "x"\nchat_template = "none.jinja"\n', "none.jinja"),
    "not TOML": ("[server\n", "not valid TOML"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_sentence_that_names_the_key(tmp_path, case):
    text, name = BAD[case]
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert name in message
    assert "\n" not in message.strip() or case == "not TOML"
    assert message.endswith(".")


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path / "none.toml", {})


@pytest.mark.parametrize("bind", ["127.0.0.1:80", "localhost:80", "[::1]:80", "127.9.9.9:1"])
def test_loopback_needs_no_key(bind):
    config.check_public(Config(), bind)


@pytest.mark.parametrize("bind", ["0.0.0.0:80", "[::]:80", "192.168.1.2:80", "example.org:80"])
def test_beyond_loopback_a_key_or_a_clear_word_is_needed(tmp_path, bind):
    with pytest.raises(ConfigError, match="api_keys"):
        config.check_public(Config(), bind)
    config.check_public(load(tmp_path, '[server]\napi_keys = ["k"]\n'), bind)
    config.check_public(load(tmp_path, "[server]\nallow_public_without_keys = true\n"), bind)


@pytest.mark.parametrize("bind", ["8080", "localhost", "localhost:http", "localhost:70000", ":80"])
def test_a_bad_address_is_refused(bind):
    with pytest.raises(ConfigError, match=r"HOST:PORT"):
        config.split_bind(bind)


def test_files_go_into_the_users_cache_folder_unless_another_one_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ServerConfig().cache_folder == tmp_path / "llmserve"
    assert ServerConfig(cache_dir="elsewhere").cache_folder == Path("elsewhere")
