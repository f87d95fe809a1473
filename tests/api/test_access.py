import pytest
from werkzeug.test import EnvironBuilder

from llmserve.api.access import Access
from llmserve.api.context import Request
from llmserve.config import ServerConfig
from llmserve.errors import ForbiddenHost, ForbiddenOrigin, InvalidAPIKey


def request(method="POST", path="/v1/chat/completions", **headers):
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return Request(EnvironBuilder(path, method=method, headers={"Host": "localhost:8080"} | headers).get_environ())


def check(request, **server):
    Access(ServerConfig(**server)).check(request)


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "localhost.:80", "127.0.0.1:8080", "127.9.9.9", "[::1]", "[::1]:8080"]
)
def test_loopback_is_always_a_known_host(host):
    check(request(Host=host))


@pytest.mark.parametrize(
    "host",
    [
        "example.com",
        "localhost.example.com",
        "10.0.0.1:8080",
        "[::2]:80",
        "1.127.0.0.1",
        ":8080",
        "a@localhost",
    ],
)
def test_another_host_is_refused_on_loopback(host):
    with pytest.raises(ForbiddenHost, match="allowed_hosts"):
        check(request(Host=host))


def test_a_host_may_be_allowed_by_name_at_any_port():
    for host in ("llm.example", "LLM.example:9"):
        check(request(Host=host), allowed_hosts=("LLM.example",))
    with pytest.raises(ForbiddenHost):
        check(request(Host="other.example"), allowed_hosts=("llm.example",))


@pytest.mark.parametrize(
    "server", [{"allowed_hosts": ("*",)}, {"bind": "0.0.0.0:80"}, {"bind": "[::]:80"}, {"bind": "unix:/run/llm.sock"}]
)
def test_any_host_is_known_where_any_may_be_meant(server):
    check(request(Host="llm.example"), **server)


def test_named_hosts_are_all_that_is_allowed_also_beyond_loopback():
    with pytest.raises(ForbiddenHost):
        check(request(Host="other.example"), bind="0.0.0.0:80", allowed_hosts=("llm.example",))


@pytest.mark.parametrize(
    ("binds", "refused"), [(["127.0.0.1:1"], True), (["[::1]:1", "0.0.0.0:1"], False), (["unix:/x"], False)]
)
def test_where_the_server_really_listens_counts(binds, refused):
    access = Access(ServerConfig(bind="0.0.0.0:8080" if refused else "127.0.0.1:8080"), binds)
    if refused:
        with pytest.raises(ForbiddenHost):
            access.check(request(Host="evil.example"))
    else:
        access.check(request(Host="evil.example"))


def test_a_request_without_a_host_comes_from_no_browser():
    plain = request()
    del plain.environ["HTTP_HOST"]
    check(plain)


@pytest.mark.parametrize("origin", ["http://localhost", "https://localhost:3000", "http://127.0.0.1:5173", "http://[::1]:80"])
def test_pages_of_this_machine_may_call(origin):
    check(request(Origin=origin))


@pytest.mark.parametrize(
    "origin", ["https://example.com", "null", "http://localhost.example.com", "http://localhost:80@evil.example", "file://", ""]
)
def test_foreign_pages_may_not_change_anything(origin):
    with pytest.raises(ForbiddenOrigin, match="cors_origins"):
        check(request(Origin=origin))
    check(request("GET", Origin=origin))
    check(request("OPTIONS", Origin=origin))


@pytest.mark.parametrize("origins", [("https://Example.com/",), ("*",)])
def test_foreign_pages_may_be_allowed(origins):
    check(request(Origin="https://example.com"), cors_origins=origins)


def test_a_page_of_the_server_itself_may_call():
    check(request(Host="llm.example", Origin="https://llm.example"), allowed_hosts=("llm.example",))


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer key-2"},
        {"Authorization": "bearer  key-2 "},
        {"X_API_Key": "key-2"},
        {"Authorization": "Basic eDp5", "X_API_Key": "key-1"},
    ],
)
def test_each_key_opens(headers):
    check(request(**headers), api_keys=("key-1", "key-2"))


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({}, "You didn't provide an API key."),
        ({"Authorization": "Bearer"}, "You didn't provide an API key."),
        ({"Authorization": "key-1"}, "You didn't provide an API key."),
        ({"Authorization": "Bearer key-10"}, "Incorrect API key provided."),
        ({"Authorization": "Bearer kéy"}, "Incorrect API key provided."),
        ({"X_API_Key": "KEY-1"}, "Incorrect API key provided."),
    ],
)
def test_nothing_else_opens(headers, words):
    with pytest.raises(InvalidAPIKey, match=words) as caught:
        check(request(**headers), api_keys=("key-1", "key-2"))
    assert "key-1" not in caught.value.message


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/health"), ("GET", "/livez"), ("GET", "/readyz"), ("OPTIONS", "/v1/models")]
)
def test_probes_and_preflights_carry_no_key(method, path):
    check(request(method, path), api_keys=("key",))


def test_answers_differ_by_origin_and_say_so():
    access = Access(ServerConfig())
    assert access.headers(request()) == [("Vary", "Origin")]
    assert access.headers(request(Origin="https://example.com")) == [("Vary", "Origin")]
    own = dict(access.headers(request(Origin="http://localhost:3000")))
    assert own["Access-Control-Allow-Origin"] == "http://localhost:3000"
    assert "X-Request-Id" in own["Access-Control-Expose-Headers"]


def test_a_preflight_is_told_what_it_asked_for():
    asked = request(
        "OPTIONS", Access_Control_Request_Method="POST", Access_Control_Request_Headers="authorization, x-stainless-os"
    )
    response = Access(ServerConfig()).options(asked, "POST, OPTIONS")
    assert response.status == 204
    assert dict(response.headers) == {
        "Allow": "POST, OPTIONS",
        "Access-Control-Allow-Methods": "POST, OPTIONS",
        "Access-Control-Allow-Headers": "authorization, x-stainless-os",
        "Access-Control-Max-Age": "7200",
    }


def test_a_preflight_cannot_write_headers_of_its_own():
    asked = request("OPTIONS", Access_Control_Request_Method="POST", Access_Control_Request_Headers="x\x00y")
    assert "Access-Control-Allow-Headers" not in dict(Access(ServerConfig()).options(asked, "POST").headers)
