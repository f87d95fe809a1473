import time
from urllib.parse import quote

import pytest

from tests.api.conftest import ALIAS, MODEL
from tests.fakes import FakeLoader

URL = f"/v1/models/{quote(MODEL, safe='')}"


def test_every_name_is_listed_with_its_model(served):
    listed = served.client.get("/v1/models").json
    assert listed["object"] == "list"
    assert [(model["id"], model["root"]) for model in listed["data"]] == [(MODEL, MODEL), (ALIAS, MODEL)]
    for model in listed["data"]:
        assert (model["object"], model["owned_by"], model["parent"]) == ("model", "llmserve", None)
        assert abs(model["created"] - time.time()) < 100


@pytest.mark.parametrize("url", [URL, f"/v1/models/{MODEL}", f"/v1/models/{ALIAS}"])
def test_a_model_is_found_by_every_name_slashes_encoded_or_not(served, url):
    model = served.client.get(url).json
    assert model["id"] == (ALIAS if ALIAS in url else MODEL)
    assert (model["root"], model["aliases"]) == (MODEL, [ALIAS])


def test_a_loaded_model_tells_what_it_is_doing(served):
    usage = served.chat(max_tokens=4).json["usage"]
    served.wait_until_idle()
    model = served.client.get(URL).json
    assert (model["state"], model["reason"]) == ("ready", None)
    assert (model["engine"], model["context_length"], model["slots"]) == ("fake", 256, 1)
    assert (model["running"], model["waiting"]) == (0, 0)
    assert model["statistics"]["requests"] == model["statistics"]["loads"] == 1
    assert model["statistics"]["prompt_tokens"] == usage["prompt_tokens"]
    assert model["statistics"]["output_tokens"] == usage["completion_tokens"]
    assert abs(model["statistics"]["last_used"] - time.time()) < 100
    assert model["memory"].keys() == {"weights", "kv_cache"}


def test_a_model_is_unloaded_and_loaded_and_a_request_loads_it_too(served):
    unloaded = served.client.post(f"{URL}?action=unload").json
    assert (unloaded["state"], unloaded["engine"], unloaded["memory"]) == ("unloaded", None, None)
    assert served.client.post(f"{URL}?action=load").json["state"] == "ready"
    served.client.post(f"{URL}?action=unload")
    assert served.chat(max_tokens=1).status_code == 200
    assert served.client.get(URL).json["state"] == "ready"


def test_a_reload_is_a_new_load(served):
    served.registry.load(MODEL)
    assert served.client.post(f"/v1/models/{ALIAS}?action=reload").json["statistics"]["loads"] == 2


def test_a_load_that_fails_says_why_and_that_trying_again_does_not_help(served, monkeypatch):
    served.client.post(f"{URL}?action=unload")

    def prepare(self, spec):
        raise OSError("no such file")

    monkeypatch.setattr(FakeLoader, "prepare", prepare)
    response = served.client.post(f"{URL}?action=load")
    error = response.json["error"]
    assert (response.status_code, error["code"], response.headers["x-should-retry"]) == (503, "model_load_failed", "false")
    assert "no such file" in error["message"]
    model = served.client.get(URL).json
    assert model["state"] == "failed"
    assert "no such file" in model["reason"]
    assert served.client.get("/health").json["status"] == "degraded"
    assert served.chat().json["error"]["code"] == "model_load_failed"
