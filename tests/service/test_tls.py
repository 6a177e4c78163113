"""TLS on real sockets: everything that works without it works with it, and who does not speak it harms nobody."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import shutil
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
import uvloop
from onnx import TensorProto, helper

from service import connection, handshake, http_server, unread
from service.app import create_app
from service.asgi import Application
from service.errors import WrongCall
from service.large_body import LARGE_BODY_BYTES
from service.repository import Repository
from service.settings import Settings
from service.tls import Tls, tls_of
from tests.asking import binary_message, loaded, save
from tests.certificates import Certificate, write_certificate
from tests.serving import LIMIT_S, At, served

Loop = Callable[[], asyncio.AbstractEventLoop]

INFER = "/v2/models/wide/infer"
LARGE = 3 * LARGE_BODY_BYTES // 4 * 4
LARGEST = 2_000_000
"""Of which the system takes a part."""


def wide_model() -> onnx.ModelProto:
    """y = 2 x, of any width."""
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "width"]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "wide", [edges[0]], [edges[1]])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    models = tmp_path_factory.mktemp("models")
    save(models, "wide", wide_model())
    return loaded(models)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return write_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def app(repository: Repository) -> Application:
    return create_app(repository, Settings())


@pytest.fixture
def at(app: Application, certificate: Certificate) -> Iterator[At]:
    with served(app, tls=Tls(certificate.certificate, certificate.key)) as at:
        yield at


def encrypted(at: At, certificate: Certificate) -> ssl.SSLSocket:
    return certificate.trusting().wrap_socket(at.connect(), server_hostname=at.host)


def request_of(count: int, *headers: str) -> tuple[bytes, bytes]:
    """So many numbers in binary, and the bytes of the answer's tensor."""
    x = np.arange(count, dtype=np.float32).reshape(1, count)
    said = {
        "inputs": [
            {"name": "x", "shape": [1, count], "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
        ],
        "parameters": {"binary_data_output": True},
    }
    body, its_headers = binary_message(said, x.tobytes())
    lines = [f"POST {INFER} HTTP/1.1", "host: x", f"content-length: {len(body)}", *headers]
    lines += [f"{name}: {value}" for name, value in its_headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body, (x * 2).tobytes()


def received(connection: socket.socket, *wanted: bytes) -> None:
    """The answers to requests, one after another and each whole."""
    buffer = b""
    for content in wanted:
        while b"\r\n\r\n" not in buffer:
            buffer += connection.recv(1 << 16)
        head, _, buffer = buffer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head + buffer
        (length,) = [int(line[16:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length: ")]
        while len(buffer) < length:
            buffer += connection.recv(1 << 16)
        body, buffer = buffer[:length], buffer[length:]
        assert body.endswith(content)
    assert buffer == b""


@pytest.mark.parametrize("count", [3, LARGE_BODY_BYTES // 4, LARGE, LARGEST])
def test_bodies_of_every_size(at: At, certificate: Certificate, count: int) -> None:
    """Small ones and those that are read into their place, in turns on one connection."""
    with encrypted(at, certificate) as connection:
        for size in (count, 5, count + 1, 7):
            request, wanted = request_of(size)
            connection.sendall(request)
            received(connection, wanted)


@pytest.mark.parametrize("pause_after", [1, 100, LARGE_BODY_BYTES, LARGE * 2])
def test_a_large_body_in_pieces(at: At, certificate: Certificate, pause_after: int) -> None:
    """However the records fall: what belongs to the next request is not taken for the body, nor lost."""
    one, wanted = request_of(LARGE)
    other, other_wanted = request_of(4)
    content = one + other
    with encrypted(at, certificate) as connection:
        connection.sendall(content[:pause_after])
        connection.sendall(content[pause_after:])
        received(connection, wanted, other_wanted)


def test_pipelining(at: At, certificate: Certificate) -> None:
    """Answered in order, small and large."""
    sent = [request_of(size) for size in (3, LARGE, 4, 5, LARGE + 1, 6)]
    with encrypted(at, certificate) as connection:
        connection.settimeout(LIMIT_S)
        connection.sendall(b"".join(request for request, _ in sent[:1] + sent[2:4]))
        received(connection, *(wanted for _, wanted in sent[:1] + sent[2:4]))
        for request, wanted in sent:
            connection.sendall(request)
            received(connection, wanted)


def test_the_application_knows_that_it_is_https(at: At, app: Application, certificate: Certificate) -> None:
    """A redirect and the scope say so."""
    seen: list[str] = []
    rest = app._rest

    async def noting(scope: object, receive: object, send: object) -> None:
        seen.append(scope["scheme"])  # type: ignore[index]
        await rest(scope, receive, send)  # type: ignore[arg-type]

    app._rest = noting
    url = f"https://{at.host}:{at.port}"
    with httpx.Client(verify=certificate.trusting(), trust_env=False) as client:
        assert client.get(f"{url}/v2/health/ready").json() == {"ready": True}
        assert client.get(url, follow_redirects=True).url == f"{url}/docs"
    assert set(seen) == {"https"}


def test_old_protocols_are_refused(at: At, certificate: Certificate) -> None:
    context = certificate.trusting()
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with at.connect() as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname=at.host)


def answers(at: At, certificate: Certificate) -> bool:
    with encrypted(at, certificate) as connection:
        request, wanted = request_of(3)
        connection.sendall(request)
        received(connection, wanted)
    return True


def test_plain_http_and_noise_harm_nobody(at: At, certificate: Certificate, caplog: pytest.LogCaptureFixture) -> None:
    """They are let go of, without a line in the log that anyone could fill a disk with."""
    for noise in (b"GET /v2 HTTP/1.1\r\nhost: x\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"x" * 500, b""):
        with at.connect() as connection:
            connection.sendall(noise)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    with pytest.raises(ssl.SSLError):  # it does not trust the certificate
        ssl.create_default_context().wrap_socket(at.connect(), server_hostname=at.host)
    assert answers(at, certificate)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_handshake_that_stalls_is_let_go_of(
    app: Application, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others are served meanwhile, and the end of the service does not wait for it."""
    monkeypatch.setattr(handshake, "HANDSHAKE_LIMIT_S", 0.3)
    with served(app, tls=Tls(certificate.certificate, certificate.key)) as at:
        stalled = [at.connect() for _ in range(20)]
        for connection in stalled[:10]:
            connection.sendall(b"\x16\x03\x01")
        assert answers(at, certificate)
        for connection in stalled:
            assert connection.recv(1) == b""
            connection.close()
    monkeypatch.setattr(handshake, "HANDSHAKE_LIMIT_S", 60)
    with served(app, tls=Tls(certificate.certificate, certificate.key)) as at, at.connect() as stalled_to_the_end:
        assert answers(at, certificate)
        stalled_to_the_end.sendall(b"\x16")


def test_a_renewed_certificate_is_served_without_a_restart(
    app: Application, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also if it comes before its key: until both are there the old one is served."""
    monkeypatch.setattr(http_server, "TICK_S", 0.02)
    old, new = write_certificate(tmp_path), write_certificate(tmp_path, "new")
    with served(app, tls=Tls(old.certificate, old.key)) as at:
        trusting_the_old = old.trusting()
        shutil.copyfile(new.certificate, old.certificate)
        while "is not the key of the certificate" not in caplog.text:
            pass
        trusting_the_old.wrap_socket(at.connect(), server_hostname=at.host).close()
        with caplog.at_level(logging.INFO):
            shutil.copyfile(new.key, old.key)
            while "was read again" not in caplog.text:
                pass
        assert answers(at, new)


def test_a_certificate_that_could_not_be_read_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Files were short when it was renewed, at either of the two reads; that is said once."""
    old, new = write_certificate(tmp_path), write_certificate(tmp_path, "new")
    tls = Tls(old.certificate, old.key)
    for reader, name in ((Path, "read_bytes"), (ssl.SSLContext, "load_cert_chain")):
        before = tls.context
        shutil.copyfile(new.certificate, old.certificate)
        shutil.copyfile(new.key, old.key)
        with monkeypatch.context() as short:
            short.setattr(reader, name, _too_many_open_files)
            for _ in range(3):
                tls.look_again()
        assert tls.context is before
        tls.look_again()
        assert tls.context is not before
    assert caplog.text.count("cannot be read: Too many open files") == 2


def _too_many_open_files(*_: object, **__: object) -> bytes:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_a_file_that_goes_while_it_is_read_leaves_what_was_there(
    certificate: Certificate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    files = [Path(shutil.copy(path, tmp_path)) for path in (certificate.certificate, certificate.key)]
    tls = Tls(*files)
    before = tls.context
    read_bytes = Path.read_bytes

    def read_and_gone(path: Path) -> bytes:
        content = read_bytes(path)
        path.unlink()
        return content

    monkeypatch.setattr(Path, "read_bytes", read_and_gone)
    monkeypatch.setattr(tls._watched, "changed", lambda: True, raising=False)
    tls.look_again()
    assert tls.context is before
    assert "stays in use" in caplog.text


def test_what_cannot_be_used_is_a_wrong_call(tmp_path: Path, certificate: Certificate) -> None:
    other = write_certificate(tmp_path, "other")
    locked = write_certificate(tmp_path, "locked", passphrase=b"secret")
    (tmp_path / "empty").write_bytes(b"")
    cases: list[tuple[Path | None, Path | None, str]] = [
        (certificate.certificate, None, "belong together"),
        (None, certificate.key, "belong together"),
        (tmp_path / "none", certificate.key, "--tls-certificate '.*none' cannot be read: No such file"),
        (certificate.certificate, tmp_path, "--tls-key '.*' cannot be read: Is a directory"),
        (certificate.certificate, other.key, "is not the key of the certificate"),
        (locked.certificate, locked.key, "is encrypted; give one without a passphrase"),
        (tmp_path / "empty", certificate.key, "are not a certificate and its key in PEM"),
        (certificate.certificate, tmp_path / "empty", "are not a certificate and its key in PEM"),
    ]
    for its, key, sentence in cases:
        with pytest.raises(WrongCall, match=sentence):
            tls_of(Settings(tls_certificate=its, tls_key=key))
    assert tls_of(Settings()) is None


def test_json_too(at: At, certificate: Certificate) -> None:
    with httpx.Client(verify=certificate.trusting(), trust_env=False) as client:
        body = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}
        for _ in range(3):
            answer = client.post(f"https://{at.host}:{at.port}{INFER}", content=json.dumps(body))
            assert answer.json()["outputs"][0]["data"] == [2, 4]


@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
@pytest.mark.parametrize("leaves", ["before it speaks", "in its first words", "after them", "when both agree"])
def test_who_leaves_early_leaves_nothing_behind(
    app: Application, certificate: Certificate, caplog: pytest.LogCaptureFixture, leaves: str, loop: Loop
) -> None:
    """No connection, no room and no word in the log; by FIN and by RST."""
    hello = hello_of(certificate)
    with served(app, tls=Tls(certificate.certificate, certificate.key), loop_factory=loop) as at:
        for number in range(60):
            left = at.connect()
            if number % 2:
                left.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if leaves == "when both agree":
                left = certificate.trusting().wrap_socket(left, server_hostname=at.host)
            elif leaves != "before it speaks":
                left.sendall(hello if leaves == "after them" else hello[: len(hello) // 2])
            left.close()
        assert answers(at, certificate)
        until(lambda: not at.connections)
    assert app.answers.held_bytes == 0
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def hello_of(certificate: Certificate) -> bytes:
    """What a client says first."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        certificate.trusting().wrap_bio(incoming, outgoing, server_hostname="127.0.0.1").do_handshake()
    return outgoing.read()


def test_what_is_not_read_is_known_over_tls_too(app: Application, certificate: Certificate) -> None:
    """TLS itself says that nothing waits; what waits takes room, and leaves it."""
    content, tensor = request_of(LARGEST)

    def held(answers: int) -> bool:
        return abs(app.answers.held_bytes - answers * len(tensor)) < 0.1 * len(tensor)

    with served(app, tls=Tls(certificate.certificate, certificate.key)) as at, ExitStack() as open_clients:
        clients = []
        for count in range(1, 5):
            client = open_clients.enter_context(reads_little(at, certificate))
            client.sendall(content)
            assert client.recv(12) == b"HTTP/1.1 200"
            until(lambda count=count: held(count))  # type: ignore[misc]
            clients.append(client)
        for client in clients:
            client.recv(100_000)
        time.sleep(1.5)  # until it has been looked at
        assert held(4)
        clients[0].close()
        until(lambda: held(3))
        read_to_the_end(clients[1], tensor)
        until(lambda: held(2))
    until(lambda: held(0))


@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
@pytest.mark.parametrize(
    ("ends", "slow_s"),
    [("it asked for it", 6), ("it asked for it by another way", 1), ("the service ends", 1)],
)
def test_the_last_answer_is_sent_for_as_long_as_it_is_read(
    app: Application,
    certificate: Certificate,
    monkeypatch: pytest.MonkeyPatch,
    ends: str,
    slow_s: float,
    loop: Loop,
) -> None:
    """However long it takes; only then is the goodbye waited for."""
    monkeypatch.setattr(connection, "GOODBYE_S", 0.2)
    monkeypatch.setattr(http_server, "TICK_S", 0.02)
    headers = {"it asked for it": ["connection: close"], "the service ends": []}
    content, tensor = request_of(LARGEST, *headers.get(ends, ["connection: close", "expect: 100-continue"]))
    with (
        served(app, tls=Tls(certificate.certificate, certificate.key), loop_factory=loop) as at,
        reads_little(at, certificate) as slow,
    ):
        slow.sendall(content)
        read = slow.recv(1)
        if ends == "the service ends":
            at.end()
        until_s = time.monotonic() + slow_s
        while time.monotonic() < until_s:
            read += slow.recv(2**12)
            time.sleep(0.02)
        assert len(read) < len(tensor) / 4, "it was slow"
        assert len(at.connections) == 1
        while chunk := slow.recv(2**20):
            read += chunk
        assert read.endswith(tensor)
        until(lambda: not at.connections)


def test_who_does_not_say_goodbye_is_not_waited_for(
    app: Application, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is who does not read; and neither before its time."""
    monkeypatch.setattr(http_server, "TICK_S", 0.02)
    monkeypatch.setattr(connection, "GOODBYE_S", 0.5)
    monkeypatch.setattr(unread, "UNREAD_S", 1.0)
    with served(app, tls=Tls(certificate.certificate, certificate.key)) as at:
        for count, least_s in ((3, 0.5), (LARGEST, 1.0)):
            with reads_little(at, certificate) as silent:
                asked_s = time.monotonic()
                silent.sendall(request_of(count, "connection: close")[0])
                assert silent.recv(12) == b"HTTP/1.1 200"
                until(lambda: not at.connections)
                assert time.monotonic() - asked_s > least_s


def test_what_was_read_takes_no_room_while_the_goodbye_is_waited_for(
    app: Application, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "GOODBYE_S", 60)
    content, tensor = request_of(LARGEST, "connection: close")
    with served(app, tls=Tls(certificate.certificate, certificate.key)) as at, encrypted(at, certificate) as silent:
        silent.sendall(content)
        read_to_the_end(silent, tensor)
        until(lambda: app.answers.held_bytes == 0)
        assert len(at.connections) == 1
        next(iter(at.connections)).cut()


def test_silence_keeps_nobody_out(app: Application, certificate: Certificate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that do not say goodbye either, when all places are taken."""
    monkeypatch.setattr(connection, "GOODBYE_S", 60)
    tls = Tls(certificate.certificate, certificate.key)
    with served(app, tls=tls, max_connections=4) as at, ExitStack() as open_clients:
        silent = [open_clients.enter_context(encrypted(at, certificate)) for _ in range(4)]
        until(lambda: len(at.connections) == 4)
        assert answers(at, certificate)
        assert sum(not one.transport.is_closing() for one in [*at.connections]) >= len(silent) - 2, "few have to go"


def test_one_that_fails_keeps_no_other(
    app: Application, certificate: Certificate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each is looked after, and one in a state that nobody foresaw is cut."""
    monkeypatch.setattr(http_server, "TICK_S", 0.02)
    monkeypatch.setattr(connection, "GOODBYE_S", 0.1)
    with served(app, tls=Tls(certificate.certificate, certificate.key)) as at, ExitStack() as open_clients:
        silent = [open_clients.enter_context(encrypted(at, certificate)) for _ in range(5)]
        until(lambda: len(at.connections) == 5)
        for one in [*at.connections][:2]:
            monkeypatch.setattr(one, "_unread", None)
        until(lambda: len(at.connections) == 3)
        for client in silent:
            client.sendall(request_of(3, "connection: close")[0])
        until(lambda: not at.connections)
    assert caplog.text.count("what is looked after once a second failed") == 1


def test_one_that_fails_keeps_the_process_neither_full_nor_busy(
    app: Application, certificate: Certificate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When all places are taken, who has one is looked at ten times a second until somebody goes."""
    tls = Tls(certificate.certificate, certificate.key)
    with served(app, tls=tls, max_connections=1) as at, encrypted(at, certificate):
        until(lambda: len(at.connections) == 1)
        monkeypatch.setattr(next(iter(at.connections)), "_unread", None)
        assert answers(at, certificate)
    assert 0 < caplog.text.count("Exception in callback") < 20


def test_who_comes_to_agree_only_at_the_end_is_told_of_it(
    app: Application, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps the process no longer than anybody else who is silent."""
    monkeypatch.setattr(http_server, "CONNECTING_LIMIT_S", 0.05)
    monkeypatch.setattr(connection, "LAST_REQUEST_S", 0.1)
    monkeypatch.setattr(connection, "GOODBYE_S", 0.1)
    with (
        served(app, tls=Tls(certificate.certificate, certificate.key)) as at,
        at.connect() as late,
        reads_little(at, certificate) as keeps_it,
    ):
        content, tensor = request_of(LARGEST)
        keeps_it.sendall(content)
        keeps_it.recv(1)
        (first,) = at.connections
        at.end()
        until(lambda: first._hurries)
        with certificate.trusting().wrap_socket(late, server_hostname=at.host):
            until(lambda: len(at.connections) == 2)
            until(lambda: [*at.connections] == [first])
        read_to_the_end(keeps_it, tensor)


def reads_little(at: At, certificate: Certificate) -> ssl.SSLSocket:
    """At a time."""
    slow = socket.create_connection((at.host, at.port), timeout=LIMIT_S)
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
    return certificate.trusting().wrap_socket(slow, server_hostname=at.host)


def read_to_the_end(client: ssl.SSLSocket, tensor: bytes) -> None:
    """Of the answer that has this tensor."""
    read = b""
    while not read.endswith(tensor[-64:]):
        read = read[-64:] + client.recv(2**20)


def until(true: Callable[[], bool]) -> None:
    until_s = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < until_s
        time.sleep(0.01)
