import pytest
from werkzeug.test import Client

from llmserve import create_app
from llmserve.config import Config, ModelSpec
from llmserve.registry import ModelRegistry
from tests.api.conftest import wait_until
from tests.fakes import FakeLoader


@pytest.fixture
def starting():
    """A client of an app whose model is still loading, and what lets it go on."""
    loader = FakeLoader()
    loader.hold("slow")
    config = Config(models=(ModelSpec("slow", "none"), ModelSpec("other", "none", load="on_demand")))
    app = create_app(config, registry=ModelRegistry(config.models, lambda: loader))
    yield Client(app), lambda: loader.let_go("slow")
    loader.let_go("slow")
    wait_until(lambda: not app._context.registry.starting)
    app.close()


def test_health_has_these_keys_and_no_others(served):
    health = served.client.get("/health").json
    assert list(health) == ["status", "service", "uptime", "models"]
    assert (health["status"], health["service"], health["models"]) == ("healthy", "LLM Inference Server", 1)
    assert 0 <= health["uptime"] < 100
    assert health["uptime"] == round(health["uptime"], 2)


def test_while_a_startup_model_loads_the_server_answers_but_is_not_ready(starting):
    client, let_go = starting
    assert client.get("/livez").status_code == 200
    assert client.get("/health").json["status"] == "starting"
    assert client.get("/health").json["models"] == 2
    not_ready = client.get("/readyz")
    assert (not_ready.status_code, not_ready.json, not_ready.headers["Retry-After"]) == (503, {"status": "starting"}, "1")
    let_go()
    wait_until(lambda: client.get("/readyz").status_code == 200)
    assert client.get("/readyz").json == {"status": "ready"}
    assert client.get("/health").json["status"] == "healthy"
