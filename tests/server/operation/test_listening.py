"""How the server is reached: CORS, a root path, unix sockets, TLS. Over real sockets."""

from __future__ import annotations

import asyncio
import datetime
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from server.operation import listening
from server.operation.access_log import AccessLog, with_ids
from server.operation.auth import Auth
from server.operation.gate import Gate
from server.operation.head_limits import bounded
from server.operation.listening import address, bind, outermost, tls_options
from server.operation.rate_limits import RateLimits
from server.operation.state import ServerState
from server.settings.config import Config
from server.settings.file import parse

PAGE = "http://localhost:3000"
ASKED = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


async def inner(scope: Scope, receive: Receive, send: Send) -> None:
    """Says where it was found."""
    found = {"path": scope["path"], "root_path": scope["root_path"]}
    await JSONResponse(found)(scope, receive, send)


def configured(folder: Path = Path("/nowhere"), **sections: Any) -> Config:
    return parse({"model": "m", **sections}, folder, {})


@asynccontextmanager
async def served(config: Config) -> AsyncIterator[uvicorn.Server]:
    """Everything in front of the routes, on a socket of its own."""
    gate = Gate(ServerState(), Auth(config), config.server, config.limits, RateLimits.of(config))
    gate.inner, gate.state.phase = inner, "ready"
    sock = bind(config.server)
    server = uvicorn.Server(uvicorn.Config(
        outermost(with_ids(AccessLog(gate)), config.server), lifespan="off", log_config=None,
        http=bounded(config.server), **tls_options(config.server.tls),
    ))  # fmt: skip
    task = asyncio.create_task(server.serve([sock]))
    while not server.started and not task.done():  # noqa: ASYNC110 - it has no event for it
        await asyncio.sleep(0.01)
    try:
        yield server
    finally:
        server.should_exit = True
        await task


@asynccontextmanager
async def client(config: Config, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with served(config) as server:
        port = server.servers[0].sockets[0].getsockname()[1]
        where = address(config.server, port)
        async with httpx.AsyncClient(base_url=where, **options) as found:
            yield found


# ---- CORS ----------------------------------------------------------------------------------


@pytest.mark.parametrize("origins", [[PAGE], ["*"]])
async def test_preflights_are_answered_before_keys_are_asked_for(origins: list[str]) -> None:
    server = {"port": 0, "cors": {"origins": origins}}
    async with client(configured(server=server, auth={"api_keys": ["k"]})) as http:
        asked = await http.options("/v1/chat/completions", headers=ASKED)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] in (PAGE, "*")
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert "authorization" in asked.headers["access-control-allow-headers"].lower()
        # A page must be able to read why it was refused, and the id to ask about.
        refused = await http.get("/v1/models", headers={"Origin": PAGE})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] in (PAGE, "*")
        assert "x-request-id" in refused.headers["access-control-expose-headers"].lower()
        good = await http.get("/v1/models", headers={"Origin": PAGE, "Authorization": "Bearer k"})
        assert good.status_code == 200
        assert good.headers["access-control-allow-origin"] in (PAGE, "*")


async def test_other_origins_get_nothing_and_none_do_by_default() -> None:
    server: dict[str, Any] = {"port": 0, "cors": {"origins": [PAGE], "methods": ["POST"]}}
    other = {**ASKED, "Origin": "http://evil.example"}
    async with client(configured(server=server)) as http:
        asked = await http.options("/v1/chat/completions", headers=other)
        assert asked.status_code == 400
        assert "access-control-allow-origin" not in asked.headers
        wrong = {**ASKED, "Access-Control-Request-Method": "DELETE"}
        assert (await http.options("/v1/models", headers=wrong)).status_code == 400
    async with client(configured(server={"port": 0})) as http:
        asked = await http.options("/v1/chat/completions", headers=ASKED)
        assert not any(name.startswith("access-control-allow") for name in asked.headers)


# ---- root path -----------------------------------------------------------------------------


async def test_paths_under_the_root_path_are_those_without_it() -> None:
    config = configured(server={"port": 0, "root_path": "/llm"}, auth={"api_keys": ["k"]})
    async with client(config) as http:
        for path in ("/v1/models", "/llm/v1/models", "/llm/llm/v1/models"):
            assert (await http.get(path)).status_code == 401, path
            found = await http.get(path, headers={"Authorization": "Bearer k"})
            assert found.json() == {"path": "/v1/models", "root_path": "/llm"}, path
        assert (await http.get("/llm")).json()["path"] == "/"
        assert (await http.get("/llmx/v1")).json()["path"] == "/llmx/v1"
        assert (await http.get("/llm/health")).json()["status"] == "ready"


# ---- unix sockets --------------------------------------------------------------------------


async def test_a_unix_socket_serves_but_not_the_admin_api_without_a_key(tmp_path: Path) -> None:
    config = configured(tmp_path, server={"uds": "s"})
    assert config.server.uds == str(tmp_path / "s")
    assert address(config.server) == f"unix:{tmp_path / 's'}"
    async with served(config):
        transport = httpx.AsyncHTTPTransport(uds=config.server.uds)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            assert (await http.get("/v1/models")).status_code == 200
            # A proxy in front of it would make everybody local.
            assert (await http.get("/admin/status")).status_code == 403
        with pytest.raises(OSError, match=r"server\.uds: somebody listens"):
            bind(config.server)
    bind(config.server).close()  # one that was left is replaced
    listening.cleared(config.server)
    assert not (tmp_path / "s").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"server\.uds: cannot bind .*file: Address already in use"):
        bind(configured(tmp_path, server={"uds": "file"}).server)
    assert (tmp_path / "file").exists()


# ---- TLS -----------------------------------------------------------------------------------


def certificate(folder: Path, name: str, *, password: bytes | None = None) -> str:
    """Makes a self-signed certificate: `NAME.pem`, `NAME.key`; returns its serial number."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now, serial = datetime.datetime.now(datetime.UTC), x509.random_serial_number()
    made = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject)
        .public_key(key.public_key()).serial_number(serial)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    cipher = (
        serialization.NoEncryption()
        if password is None
        else serialization.BestAvailableEncryption(password)
    )
    (folder / f"{name}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / f"{name}.key").write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, cipher
    ))  # fmt: skip
    return f"{serial:X}"


def trusting(folder: Path, server: str, own: str | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(folder / f"{server}.pem"))
    if own is not None:
        context.load_cert_chain(folder / f"{own}.pem", folder / f"{own}.key")
    return context


def tls(folder: Path, **more: Any) -> Config:
    section = {"certificate": "a.pem", "key": "a.key", **more}
    return configured(folder, server={"host": "localhost", "port": 0, "tls": section})


async def test_https_is_served_and_only_that(tmp_path: Path) -> None:
    certificate(tmp_path, "a")
    async with client(tls(tmp_path), verify=trusting(tmp_path, "a")) as http:
        assert str(http.base_url).startswith("https://")
        assert (await http.get("/v1/models")).status_code == 200
        plain = str(http.base_url).replace("https", "http")
        async with httpx.AsyncClient() as other:
            with pytest.raises(httpx.TransportError):
                await other.get(f"{plain}/health")


async def test_clients_show_certificates_where_they_must(tmp_path: Path) -> None:
    certificate(tmp_path, "a")
    certificate(tmp_path, "b")
    config = tls(tmp_path, client_ca="b.pem", clients="required")
    async with client(config, verify=trusting(tmp_path, "a", own="b")) as http:
        assert (await http.get("/v1/models")).status_code == 200
        where = str(http.base_url)
        async with httpx.AsyncClient(verify=trusting(tmp_path, "a"), base_url=where) as stranger:
            with pytest.raises(httpx.TransportError):
                await stranger.get("/v1/models")


async def test_changed_files_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "REFRESH_S", 0.02)
    first = certificate(tmp_path, "a")
    config = tls(tmp_path, refresh=True)
    section = config.server.tls
    assert section is not None

    async def serial(port: int) -> str:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        _, writer = await asyncio.open_connection("localhost", port, ssl=context)
        raw = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        return f"{x509.load_der_x509_certificate(raw).serial_number:X}"

    async with served(config) as server:
        port = server.servers[0].sockets[0].getsockname()[1]
        task = asyncio.create_task(listening.refresh(server.config, section))
        assert await serial(port) == first
        (tmp_path / "a.key").write_text("half a key")  # a writer's half: the old ones stay
        await asyncio.sleep(0.1)
        assert await serial(port) == first
        second = certificate(tmp_path, "a")
        os.utime(tmp_path / "a.pem", ns=(1, 1))
        for _ in range(100):
            if await serial(port) == second:
                break
            await asyncio.sleep(0.02)
        assert await serial(port) == second
        task.cancel()


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"certificate": "gone.pem"}, r"server\.tls\.certificate: .*gone\.pem: No such file"),
        ({"key": "gone.key"}, r"server\.tls\.key: .*No such file"),
        ({"client_ca": "gone.pem", "clients": "optional"}, r"server\.tls\.client_ca: .*No such"),
        ({"key": "b.key"}, r"server\.tls: .*"),
        ({"certificate": "a.key"}, r"server\.tls: .*"),
        ({"key": "locked.key", "certificate": "locked.pem"}, r"server\.tls: the key has a passw"),
        ({"ciphers": "NONE-SUCH"}, r"server\.tls: .*"),
    ],
)
def test_what_tls_cannot_use_is_named_before_anything_is_loaded(
    tmp_path: Path, section: dict[str, Any], words: str
) -> None:
    certificate(tmp_path, "a")
    certificate(tmp_path, "b")
    certificate(tmp_path, "locked", password=b"x")
    with pytest.raises(OSError, match=words):
        tls_options(tls(tmp_path, **section).server.tls)
