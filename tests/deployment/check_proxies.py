"""deploy/nginx.conf and deploy/Caddyfile, each in its real program and over TLS."""

import asyncio
import contextlib
import os
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from support.people import PASSWORD, SOON_SECONDS, Line, Person, follows, refusal
from support.servers import ROOT, SECRET_KEY, Server

CLIENT = "127.0.0.2"  # whom the server must see, not the proxy's 127.0.0.1
FORGED = {"X-Forwarded-For": "192.0.2.9", "Forwarded": "for=192.0.2.9"}
SILENT_SECONDS = 95  # longer than nginx waits by either deadline of the file
NGINX = """
pid {folder}/nginx.pid;
error_log {folder}/error.log;
worker_processes 1;
events {{}}
http {{
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}
"""
pytestmark = pytest.mark.timeout(300)


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def changed(name: str, *changes: tuple[str, str]) -> str:
    """Read a file of deploy/ with other names and ports; what they replace must be in it."""
    text = (ROOT / "deploy" / name).read_text()
    for pattern, becomes in changes:
        text, count = re.subn(pattern, becomes, text)
        assert count, f"{pattern} is not in {name}"
    return text


@dataclass
class Proxy:
    """A proxy that runs before a server."""

    server: Server
    url: str
    plain_url: str
    trust: ssl.SSLContext

    @contextlib.asynccontextmanager
    async def visitor(self) -> AsyncIterator[aiohttp.ClientSession]:
        """Come from an address of one's own, as a browser with the proxy's page would."""
        connector = aiohttp.TCPConnector(
            ssl=self.trust, local_addr=(CLIENT, 0), family=socket.AF_INET)
        headers = FORGED | {"Origin": self.url}
        async with aiohttp.ClientSession(self.url, connector=connector, headers=headers) as session:
            yield session


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a certificate that signed itself, and its key."""
    folder = tmp_path_factory.mktemp("certificate")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
         "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True, capture_output=True, timeout=60)
    return folder


def nginx(folder: Path, certificate: Path, port: int, tls: int, plain: int) -> list[str]:
    """Write nginx's files; answer the command that starts it."""
    (folder / "site.conf").write_text(changed(
        "nginx.conf", (r"127\.0\.0\.1:8080", f"127.0.0.1:{port}"),
        (r"listen (.*)443 ssl", rf"listen \g<1>{tls} ssl"),
        (r"listen (.*)\b80;", rf"listen \g<1>{plain};"),
        (r"(server_name) +\S+;", r"\1 localhost;"),
        (r"(ssl_certificate) .*;", rf"\1 {certificate}/cert.pem;"),
        (r"(ssl_certificate_key) .*;", rf"\1 {certificate}/key.pem;"),
        (r"/var/log/nginx/", f"{folder}/")))
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder))
    os.chmod(folder, 0o755)
    options = ["-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    subprocess.run(["nginx", "-t", *options], check=True, capture_output=True, timeout=60)
    return ["nginx", *options, "-g", "daemon off;"]


def caddy(folder: Path, certificate: Path, port: int, tls: int, plain: int) -> list[str]:
    """Write Caddy's file; answer the command that starts it."""
    program = os.environ.get("CADDY", "caddy")
    if shutil.which(program) is None:
        pytest.skip("no caddy: ./run deploy-test installs it")
    site = f"https://localhost:{tls} {{\n\ttls {certificate}/cert.pem {certificate}/key.pem"
    (folder / "Caddyfile").write_text(
        f"{{\n\tadmin off\n\thttp_port {plain}\n\thttps_port {tls}\n}}\n" + changed(
            "Caddyfile", (r"(?m)^chat\.example\.com \{", site),
            (r"127\.0\.0\.1:8080", f"127.0.0.1:{port}")))
    return [program, "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]


@pytest.fixture(params=[nginx, caddy])
async def proxy(
    request: pytest.FixtureRequest, tmp_path: Path, certificate: Path
) -> AsyncIterator[Proxy]:
    """A server and a proxy before it, as they run on one machine."""
    (tmp_path / "server").mkdir()
    (tmp_path / "proxy").mkdir()
    server = await Server(
        tmp_path / "server", SECRET_KEY=SECRET_KEY, TRUSTED_PROXIES="127.0.0.1,::1",
        ACCESS_LOG="on").starts()
    tls, plain = free_port(), free_port()
    command = request.param(tmp_path / "proxy", certificate, server.port, tls, plain)
    environment = os.environ | {"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
    with (tmp_path / "proxy/output").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        async with asyncio.timeout(SOON_SECONDS):
            while not await is_heard(tls):
                assert process.poll() is None, (tmp_path / "proxy/output").read_text()
        trust = ssl.create_default_context(cafile=certificate / "cert.pem")
        yield Proxy(server, f"https://localhost:{tls}", f"http://localhost:{plain}", trust)
    finally:
        process.terminate()
        process.wait(SOON_SECONDS)
        await server.stops()


async def is_heard(port: int) -> bool:
    """Tell whether somebody listens on a port."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        await asyncio.sleep(0.05)
        return False
    writer.close()
    return True


async def test_proxy_hands_on_calls_sockets_and_the_clients_address(proxy: Proxy) -> None:
    """The page, REST and both sockets work as without it; http leads to https; a page of another
    site stays shut out; the server sees the client's own address, whatever headers it made up."""
    async with proxy.visitor() as session:
        async with session.get("/") as page:
            assert page.status == 200
            assert "<html" in await page.text()
        ann, ben = Person(session, "ann"), Person(session, "ben")  # type: ignore[arg-type]
        for person in (ann, ben):
            await person.register()
            await person.logs_in()
        chat = await ann.opens(ben)
        one, every = await ben.listens_live(chat), await follows(ben)
        await every.hears("chats")
        for n, say in enumerate((lambda text: ann.says(chat, text), one.says)):
            await say(f"number {n}")
            for line in (one, every):
                await line.hears_text(f"number {n}")
        assert await ann.history(chat) == ["number 0", "number 1"]
        foreign = ben.headers | {"Origin": "https://elsewhere.example"}
        assert await refusal(ben, "/ws", headers=foreign) == 403
        for line in (one, every):
            await line.close()
        wrong = {"email": ann.email, "password": PASSWORD + "!"}
        async with session.post("/api/v1/users/login", json=wrong) as answer:
            assert answer.status == 401
        redirect = await session.get(f"{proxy.plain_url}/docs", allow_redirects=False)
        assert redirect.status in (301, 308)
        assert redirect.headers["Location"].startswith("https://localhost")
    log = (proxy.server.folder / "stderr").read_text()
    assert "/users/login" in log
    lines = [line for line in log.splitlines() if "/api/v1/" in line]
    assert all(CLIENT in line for line in lines), lines


async def test_body_of_a_connect_is_no_request(proxy: Proxy) -> None:
    """What a CONNECT carries is never answered as a request of its own: through connections that
    the proxy shares, the answer would go to somebody else."""
    hidden = "GET /api/v1/health/liveness HTTP/1.1\r\nHost: a\r\nX-Request-Id: smuggled\r\n\r\n"
    port = int(proxy.url.rsplit(":", 1)[1])
    for path in ("/x", "localhost:443"):
        reader, writer = await asyncio.open_connection("localhost", port, ssl=proxy.trust)
        head = f"CONNECT {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(hidden)}\r\n"
        writer.write(f"{head}\r\n{hidden}".encode())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                await reader.read(65_536)
        writer.close()
        async with proxy.visitor() as session:
            for _ in range(5):
                own = {"X-Request-Id": "own"}
                async with session.get("/api/v1/health/liveness", headers=own) as answer:
                    assert answer.headers["X-Request-Id"] == "own"
    assert "smuggled" not in (proxy.server.folder / "stderr").read_text()


async def test_silent_socket_outlives_the_proxys_deadlines(proxy: Proxy) -> None:
    """A socket on which nobody says a word stays open for longer than the proxy waits."""
    async with proxy.visitor() as session:
        ann, ben = Person(session, "ann"), Person(session, "ben")  # type: ignore[arg-type]
        for person in (ann, ben):
            await person.register()
            await person.logs_in()
        chat = await ann.opens(ben)
        lines = [await ben.listens_live(chat), await follows(ben)]
        await lines[1].hears("chats")
        waiting = [asyncio.create_task(hears_at_last(line)) for line in lines]
        await asyncio.sleep(SILENT_SECONDS)
        await ann.says(chat, "still there?")
        assert await asyncio.gather(*waiting) == ["still there?"] * 2
        for line in lines:
            await line.close()


async def hears_at_last(line: Line) -> str:
    """Wait for a message, however long; its text. The client answers pings meanwhile."""
    async with asyncio.timeout(SILENT_SECONDS + SOON_SECONDS):
        while (frame := await line.ws.receive_json())["type"] != "message":
            pass
    return str(frame["data"]["text"])
