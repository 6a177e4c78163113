"""Who may do what: every route with every key, and that nothing is read, told or logged before that is known."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import BaseRoute, Mount, Route

from service import access, http_server
from service.access import right_of
from service.app import create_app
from service.asgi import Application
from service.errors import WrongCall
from service.keys import KeysFile, Right, made_key, read_keys
from service.repository import Repository
from service.settings import Settings
from tests import graphs
from tests.asking import ask, loaded, save
from tests.serving import served

BODY = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}
LOAD = "/v2/repository/models/nobody/load"

OPEN = ["/", "/docs", "/docs/assets/swagger-ui.css", "/docs/page/page.js", "/v2/health/live", "/v2/health/ready"]
DRAWN = {
    Right.PREDICT: [
        "/openapi.json",
        "/predict",
        "/models/{model}/predict",
        "/v2",
        "/v2/models/stats",
        "/v2/models/{model}",
        "/v2/models/{model}/config",
        "/v2/models/{model}/infer",
        "/v2/models/{model}/ready",
        "/v2/models/{model}/stats",
        "/v2/models/{model}/versions/{version}",
        "/v2/models/{model}/versions/{version}/config",
        "/v2/models/{model}/versions/{version}/infer",
        "/v2/models/{model}/versions/{version}/ready",
        "/v2/models/{model}/versions/{version}/stats",
        "/v2/repository/index",
        "/v2/repository/models/{model}/aliases",
    ],
    Right.MANAGE: [
        "/v2/repository/models/{model}/load",
        "/v2/repository/models/{model}/unload",
        "/v2/repository/models/{model}/aliases/{alias}",
    ],
    Right.METRICS: ["/metrics"],
}
"""What this service promises; written apart from the code, and compared with the application's own routes."""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    models = tmp_path_factory.mktemp("models")
    save(models, "norm", graphs.batchnorm_model())
    return loaded(models)


class Keys:
    """A keys file, and the keys that are in it."""

    def __init__(self, path: Path, *holders: str) -> None:
        self.path = path
        self.secrets: dict[str, str] = {}
        for holder in holders or (*Right, "all"):
            self.add(holder, [*Right] if holder == "all" else [holder])

    def add(self, name: str, rights: list[str]) -> None:
        self.secrets[name], key = made_key(name, rights)
        with self.path.open("a") as file:
            file.write(key.line + "  # a comment\n")

    def bearer(self, name: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.secrets[name]}"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys") / "keys.txt")


@pytest.fixture(scope="module")
def locked(keys: Keys) -> Settings:
    return Settings(keys_file=keys.path)


def refused(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["code"]


def routes(of: Any) -> list[str]:
    """Every path that the application knows by itself, as it is written there."""

    def path(route: BaseRoute) -> str:
        assert isinstance(route, Route | Mount), route
        return route.path

    return [path(route) for route in of.routes]


def test_no_route_is_forgotten(repository: Repository) -> None:
    """The application's own routes are those that are drawn here: who adds one says who may use it."""
    own = set(routes(create_app(repository, Settings())._rest))
    mounted = {path for path in own if path in ("/docs/assets", "/docs/page")}
    predictions = {path for path in DRAWN[Right.PREDICT] if path.endswith(("/infer", "predict"))}
    drawn = {path for paths in (OPEN, *DRAWN.values()) for path in paths if not path.startswith("/docs/")}
    assert own - mounted == drawn - predictions - ({"/metrics"} - own)
    assert len(mounted) == 2


@pytest.mark.parametrize("path", OPEN)
def test_what_is_open_needs_no_key(repository: Repository, keys: Keys, locked: Settings, path: str) -> None:
    """Nor does a key harm."""
    for headers in ({}, {"x-api-key": "wrong"}, keys.bearer("metrics")):
        assert ask(repository, "GET", path, headers=headers, settings=locked).status_code in (200, 307)


@pytest.mark.parametrize("right", Right)
def test_every_route_takes_its_right(repository: Repository, keys: Keys, locked: Settings, right: Right) -> None:
    """Without a key or with a wrong one it is 401, with a key of other rights 403, and else whatever the route says."""
    for template in DRAWN[right]:
        path = template.format(model="nobody", version="7", alias="stable")
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
            for headers in ({}, {"x-api-key": "wrong"}, {"authorization": "Bearer em_wrong"}):
                response = ask(repository, method, path, b"not JSON", headers, settings=locked)
                assert refused(response) == (401, "unauthorized"), path
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.headers["x-content-type-options"] == "nosniff"
                assert response.headers["x-request-id"]
            for other in Right:
                response = ask(repository, method, path, headers=keys.bearer(other), settings=locked)
                if other is right:
                    assert response.status_code not in (401, 403), path
                else:
                    assert refused(response) == (403, "forbidden"), path
                    assert f"'{right}'" in response.json()["error"]
            response = ask(repository, method, path, headers=keys.bearer("all"), settings=locked)
            assert response.status_code not in (401, 403), path


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/v2/", "/v2x", "/predict/", "/v2//models", "/DOCS", "/docs/", "/metrics/x", "/v2/health/other"],
)
def test_a_path_that_is_not_drawn_is_nowhere(repository: Repository, keys: Keys, locked: Settings, path: str) -> None:
    """To who has a key; without one nothing is told."""
    assert refused(ask(repository, "GET", path, settings=locked)) == (401, "unauthorized")
    assert refused(ask(repository, "GET", path, headers=keys.bearer("metrics"), settings=locked)) == (404, "not_found")


@pytest.mark.parametrize(
    "path", ["/v2/repository/", "/v2/repository/models/a%0ab/load", "/v2/repository/models/%2f/load"]
)
def test_what_lies_beside_management_takes_its_right(
    repository: Repository, keys: Keys, locked: Settings, path: str
) -> None:
    """However a name is spelled."""
    assert refused(ask(repository, "POST", path, headers=keys.bearer("predict"), settings=locked)) == (403, "forbidden")
    assert refused(ask(repository, "POST", path, settings=Settings(host="0.0.0.0"))) == (403, "forbidden")


@pytest.mark.parametrize(
    ("form", "status"),
    [
        ({"authorization": "Bearer {}"}, 200),
        ({"authorization": "bEARER   {}"}, 200),
        ({"x-api-key": "{}"}, 200),
        ({"x-api-key": "{}", "authorization": "Basic dTpw"}, 200),
        ({"x-api-key": "{}", "authorization": "Bearer of-a-gateway"}, 200),
        ({"x-api-key": "wrong", "authorization": "Bearer {}"}, 401),
        ({"authorization": "{}"}, 401),
        ({"authorization": "Basic {}"}, 401),
        ({"authorization": "Bearer"}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": "Bearer {}x"}, 401),
        ({"authorization": "Bearer {}, Bearer {}"}, 401),
        ({"cookie": "key={}"}, 401),
        ({"x-api-key": ""}, 401),
    ],
)
def test_where_a_key_is_looked_for(
    repository: Repository, keys: Keys, locked: Settings, form: dict[str, str], status: int
) -> None:
    headers = {name: value.replace("{}", keys.secrets["predict"]) for name, value in form.items()}
    for method, path, body in (("GET", "/v2", b""), ("POST", "/v2/models/norm/infer", BODY)):
        assert ask(repository, method, path, body, headers, settings=locked).status_code == status
    assert create_app(repository, locked).access.lets_predict(
        {name.encode(): value.encode() for name, value in headers.items()}
    ) == (status == 200)


def test_a_key_in_the_url_is_none(repository: Repository, keys: Keys, locked: Settings) -> None:
    for name in ("key", "api_key", "access_token", "x-api-key", "authorization"):
        path = f"/v2?{name}={keys.secrets['all']}"
        assert refused(ask(repository, "GET", path, settings=locked)) == (401, "unauthorized")


def test_without_a_keys_file_all_but_management_is_open(repository: Repository) -> None:
    for path in ("/v2", "/v2/models/norm", "/v2/models/stats", "/openapi.json", "/docs"):
        assert ask(repository, "GET", path, settings=Settings(host="0.0.0.0")).status_code == 200
    assert ask(repository, "POST", "/v2/models/norm/infer", BODY).status_code == 200


def test_with_keys_management_needs_one_on_loopback_too(repository: Repository, keys: Keys) -> None:
    """And with one it works wherever the service listens."""
    for host in ("127.0.0.1", "0.0.0.0"):
        settings = Settings(host=host, keys_file=keys.path)
        assert refused(ask(repository, "POST", LOAD, settings=settings)) == (401, "unauthorized")
        response = ask(repository, "POST", LOAD, headers=keys.bearer("manage"), settings=settings)
        assert refused(response) == (404, "unknown_model")


@pytest.mark.parametrize(
    ("headers", "sentence"),
    [
        ({"origin": "https://example.org"}, "not by a page of 'https://example.org'"),
        ({"origin": "null"}, "not by a page of 'null'"),
        ({"origin": "http://localhost:3000"}, "not by a page of 'http://localhost:3000'"),
        ({"sec-fetch-site": "cross-site"}, "not by a page of another site"),
        ({"sec-fetch-site": "same-site"}, "not by a page of another site"),
        ({"host": "example.org", "origin": "http://example.org"}, "not as 'example.org'"),
        ({"host": "127.0.0.1.example.org"}, "not as '127.0.0.1.example.org'"),
        ({"host": "user@[::1"}, "not as 'user@[::1'"),
        ({"x-forwarded-for": "192.0.2.1"}, "came through a proxy"),
    ],
)
def test_a_page_in_the_operators_browser_manages_nothing(
    repository: Repository, headers: dict[str, str], sentence: str
) -> None:
    """Nor does a name that was made to point to this machine, or a proxy that stands on it."""
    for method, verb in (("POST", "load"), ("POST", "unload"), ("PUT", "aliases/a"), ("DELETE", "aliases/a")):
        response = ask(repository, method, f"/v2/repository/models/norm/{verb}", headers=headers)
        assert refused(response) == (403, "forbidden")
        assert sentence in response.json()["error"]
    assert repository.live("norm").version == "1"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": "127.0.0.1:8000"},
        {"host": "[::1]:8000"},
        {"host": "localhost:8000", "origin": "http://localhost:8000", "sec-fetch-site": "same-origin"},
        {"host": "localhost", "origin": "https://localhost"},
    ],
)
def test_a_program_and_the_own_page_manage(repository: Repository, headers: dict[str, str]) -> None:
    assert refused(ask(repository, "POST", LOAD, headers=headers)) == (404, "unknown_model")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_a_form_can_send_is_no_management(
    repository: Repository, keys: Keys, locked: Settings, content_type: str
) -> None:
    for headers, settings in (({}, Settings()), (keys.bearer("manage"), locked)):
        response = ask(repository, "POST", LOAD, {}, {**headers, "content-type": content_type}, settings=settings)
        assert refused(response) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    "content_type", ["application/json", "application/json; charset=utf-8", "application/octet-stream"]
)
def test_what_programs_send_is(repository: Repository, content_type: str) -> None:
    """Triton's asyncio client lets aiohttp say what bytes are."""
    response = ask(repository, "POST", LOAD, {}, {"content-type": content_type})
    assert refused(response) == (404, "unknown_model")


def test_the_log_says_whose_key_changed_what(
    repository: Repository, keys: Keys, locked: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "service.management"):
        for method, verb, body in (
            ("PUT", "aliases/a", {"version": "1"}),
            ("DELETE", "aliases/a", b""),
            ("POST", "unload", b""),
            ("POST", "load", b""),
        ):
            path = f"/v2/repository/models/norm/{verb}"
            assert ask(repository, method, path, body, keys.bearer("manage"), settings=locked).status_code == 200
    assert [record.getMessage().rpartition(", as ")[2] for record in caplog.records] == ["the key 'manage' asked"] * 4
    assert keys.secrets["manage"] not in caplog.text


def test_what_another_server_calls_the_root_opens_nothing(repository: Repository) -> None:
    """What is checked is what is routed."""
    answers: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        answers.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/root/v2/repository/models/norm/unload",
        "root_path": "/root",
        "query_string": b"",
        "headers": [(b"origin", b"https://example.org")],
    }
    asyncio.run(create_app(repository, Settings())(scope, receive, send))
    assert answers[0]["status"] == 404
    assert repository.live("norm").version == "1"


# Before anything is read


def test_of_a_caller_without_a_key_nothing_is_read(repository: Repository, locked: Settings) -> None:
    """Its answer is there before its body is."""

    async def receive() -> Any:
        raise AssertionError("the body was asked for")

    async def answered(path: str) -> int:
        started: list[Any] = []

        async def send(message: Any) -> None:
            started.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
        await create_app(repository, locked)(scope, receive, send)
        status: int = started[0]["status"]
        return status

    for path in ("/predict", "/v2/models/norm/infer", "/v2/repository/index", LOAD):
        assert asyncio.run(answered(path)) == 401


def test_on_the_short_way_too(repository: Repository, keys: Keys, locked: Settings) -> None:
    """On a real connection: 401 follows the head; the same connection then answers who has a key."""
    body = json.dumps(BODY).encode()
    head = b"POST /v2/models/norm/infer HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n" % len(body)
    key = f"x-api-key: {keys.secrets['predict']}\r\n".encode()
    with served(create_app(repository, locked)) as at, at.connect() as connection:
        for wrong in (b"", b"x-api-key: wrong\r\n"):
            connection.sendall(head + wrong + b"\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")
            connection.sendall(body)  # it is thrown away
        connection.sendall(head + key + b"\r\n" + body)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.sendall((head + key + b"\r\n" + body) + (head + b"\r\n" + body))
        answers = b""
        while answers.count(b"HTTP/1.1 ") < 2 or not answers.endswith(b"}"):
            answers += connection.recv(65536)
        assert answers.startswith(b"HTTP/1.1 200 ")
        assert b"HTTP/1.1 401 " in answers


# Keys


def test_every_key_is_compared_whichever_it_is(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By compare_digest, on hashes: how long it takes tells neither which key it is nor how much of one is right."""
    many = Keys(tmp_path / "keys.txt", "predict")
    for i in range(4):
        many.add(f"more-{i}", ["predict"])
    compared: list[tuple[bytes, bytes]] = []

    def noted(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(access, "compare_digest", noted)
    app = create_app(repository, Settings(keys_file=many.path))
    digests = [key.digest for key in read_keys(many.path)]
    for secret, known in ((many.secrets["predict"], True), (many.secrets["more-3"], True), ("em_wrong", False)):
        compared.clear()
        assert app.access.lets_predict({b"x-api-key": secret.encode()}) is known
        assert [other for _, other in compared] == digests
        assert len({one for one, _ in compared}) == 1
        assert all(len(one) == 32 and secret.encode() not in one for one, _ in compared)


def app_of(repository: Repository, keys: Keys) -> tuple[Application, Callable[[str], bool]]:
    app = create_app(repository, Settings(keys_file=keys.path))
    return app, lambda name: app.access.lets_predict({b"x-api-key": keys.secrets[name].encode()})


def test_keys_change_while_the_service_runs(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new one opens and a deleted one does not, without a restart and without a request that asks for it."""
    monkeypatch.setattr(http_server, "TICK_S", 0.02)
    keys = Keys(tmp_path / "keys.txt", "predict")
    app, opens = app_of(repository, keys)
    with served(app):
        assert opens("predict")
        keys.add("second", ["predict"])
        while not opens("second"):
            pass
        assert opens("predict")
        second = keys.path.read_text().splitlines()[1]
        keys.path.write_text(second + "\n")
        while opens("predict"):
            pass
        assert opens("second")


@pytest.mark.parametrize("change", ["malformed", "binary", "gone"])
def test_a_file_that_became_wrong_leaves_the_keys_as_they_were(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    """It is logged once, without its content; and when it is right again, it counts."""
    keys = Keys(tmp_path / "keys.txt", "predict")
    file = KeysFile(keys.path)
    before, content = file.keys, keys.path.read_bytes()
    match change:
        case "malformed":
            keys.path.write_text(f"{keys.secrets['predict']}\n")
        case "binary":
            keys.path.write_bytes(b"\xff\xfe")
        case _:
            keys.path.unlink()
    for _ in range(3):
        file.look_again()
    assert file.keys == before
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "the keys that were read before stay in use" in caplog.text
    assert keys.secrets["predict"] not in caplog.text
    keys.path.write_bytes(content)
    keys.add("second", ["metrics"])
    file.look_again()
    assert len(file.keys) == 2


def test_a_file_without_keys_lets_nobody_in(repository: Repository, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.txt", "predict")
    app, opens = app_of(repository, keys)
    keys.path.write_text("# nobody\n")
    app.access.look_again()
    assert not opens("predict")


def test_a_file_that_is_wrong_at_the_start_is_a_wrong_call(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("# mine\nem_secret\n")
    with pytest.raises(WrongCall, match=r"line 2 of the keys file '.*keys.txt' has 1 words") as wrong:
        create_app(repository, Settings(keys_file=tmp_path / "keys.txt"))
    assert "em_secret" not in str(wrong.value)


# Nothing tells a key


def test_no_key_reaches_a_log_or_an_answer(
    repository: Repository,
    keys: Keys,
    locked: Settings,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With every logger at its lowest level, through good calls, refusals, failures and what is not HTTP."""
    secret = keys.secrets["all"]
    unknown = secret[:-4] + "abcd"
    app = create_app(repository, locked)
    answers = b""
    with served(app) as at, caplog.at_level(1):
        for name in [*logging.Logger.manager.loggerDict]:
            monkeypatch.setattr(logging.getLogger(name), "level", 1)
        logging.Logger.manager._clear_cache()  # type: ignore[attr-defined]  # what is enabled is remembered
        logging.getLogger("uvicorn.error").debug("this test sees it")
        for key in (secret, unknown):
            heads = [
                f"GET /v2?key={key} HTTP/1.1\r\nx-api-key: {key}",
                f"GET /v2/models/nobody HTTP/1.1\r\nauthorization: Bearer {key}",
                f"GET /openapi.json HTTP/1.1\r\nauthorization: Bearer {key}",
                f"POST /predict HTTP/1.1\r\nauthorization: Bearer {key}\r\ncontent-length: 0",
                f"POST {LOAD} HTTP/1.1\r\nx-api-key: {key}\r\ncontent-length: 0",
                f"GET /nothing HTTP/1.1\r\nx-api-key: {key}\r\nupgrade: websocket\r\nconnection: upgrade",
                f"GET /v2 HTTP/1.1\r\nx-api-key: {key}\r\n {key}\x00",
                f"{key} / HTTP/1.1\r\nx-api-key: {key}",
            ]
            for head in heads:
                answers += at.exchange(f"{head}\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        monkeypatch.setattr(app.predictions, "_repository", None)  # a failure of ours, with its traceback
        failing = f"POST /predict HTTP/1.1\r\nhost: x\r\nx-api-key: {secret}\r\nconnection: close\r\n"
        failing += "content-length: 0\r\n\r\n"
        answers += at.exchange(failing.encode())
    said = caplog.text + "".join(capfd.readouterr())
    assert "this test sees it" in said
    assert "Traceback" in said
    assert {answers.count(status) > 0 for status in (b" 200 ", b" 400 ", b" 401 ", b" 404 ", b" 500 ")} == {True}
    for shown in (secret, unknown, secret[3:20]):
        assert shown not in said
        assert shown.encode() not in answers


def test_the_document_says_how_to_come_in(repository: Repository, keys: Keys, locked: Settings) -> None:
    """Only where keys are needed."""
    document = ask(repository, "GET", "/openapi.json", headers=keys.bearer("predict"), settings=locked).json()
    schemes = document["components"]["securitySchemes"]
    assert {scheme["type"] for scheme in schemes.values()} == {"http", "apiKey"}
    assert document["security"] == [{name: []} for name in schemes]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            open_to_all = right_of(path) is None
            assert operation.get("security") == ([] if open_to_all else None)
            assert ({"401", "403"} <= operation["responses"].keys()) is not open_to_all
    plain = ask(repository, "GET", "/openapi.json").json()
    assert "security" not in plain
    assert "securitySchemes" not in plain["components"]


# What a browser is told


def test_a_page_may_do_little(repository: Repository, keys: Keys, locked: Settings) -> None:
    """Scripts are files of this service, nobody frames it, nothing is taken for what it is not, and what a key opened
    is kept by no cache."""
    for settings in (Settings(), locked):
        page = ask(repository, "GET", "/docs", settings=settings)
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert page.headers["x-frame-options"] == "DENY"
        assert page.headers["referrer-policy"] == "no-referrer"
        assert "<script>" not in page.text
        for path in ("/docs", "/docs/page/page.js", "/v2", "/nothing", "/v2/models/nobody", "/openapi.json", LOAD):
            response = ask(repository, "GET", path, headers=keys.bearer("all"), settings=settings)
            assert response.headers["x-content-type-options"] == "nosniff", path
            kept = settings is not locked or path.startswith(("/docs", "/nothing"))
            assert response.headers.get("cache-control") == (None if kept else "no-store"), path
        script = ask(repository, "GET", "/docs/page/page.js", settings=settings)
        assert script.headers["content-type"].startswith("text/javascript")
