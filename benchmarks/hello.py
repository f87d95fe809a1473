"""The bare WSGI app that the server's own overhead is measured against."""

BODY = b'{"hello": "world"}'


def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(BODY)))])
    return [BODY]
