"""The process by itself: what is in its log, and what it does not start without."""

import asyncio
import contextlib
import io
import logging
import os
import re
import socket
import sys
from typing import Any

import pytest

from plumbing import process
from plumbing.process import StartError
from support.people import HEAR_SECONDS
from support.servers import ROOT


def test_kernel_takes_little_that_a_client_does_not_read() -> None:
    """What a connection may leave unread is bounded where the server counts it: the kernel takes
    no megabytes more."""
    with process.listen_on("127.0.0.1", 0) as listener, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(listener.getsockname())
        connection, _ = listener.accept()
        connection.setblocking(False)
        taken = 0
        with connection, contextlib.suppress(BlockingIOError):
            while True:
                taken += connection.send(bytes(16_384))
    assert 0 < taken < 4 * process.UNSENT_BYTES_MAX


def test_log_tells_where_an_exception_was_raised_and_not_what_it_says() -> None:
    """The log says where an exception was raised, and neither its text nor the text of its
    cause."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(process.NamelessFormatter("%(levelname)s %(message)s"))
    log = logging.getLogger("messenger.of this test")
    log.propagate = False
    log.addHandler(handler)
    try:
        try:
            raise KeyError("what alice wrote")
        except KeyError as error:
            raise ValueError("what bob wrote") from error
    except ValueError:
        log.exception("failed")
    written = stream.getvalue()
    assert written.startswith("ERROR failed\n")
    assert "test_process.py" in written
    assert written.endswith("ValueError\n")
    assert "wrote" not in re.sub(r"raise .*", "", written)


@pytest.mark.parametrize(
    ("host", "named", "reached"),
    [
        ("127.0.0.1", "localhost", ["127.0.0.1"]),
        ("127.0.0.2", "127.0.0.2", ["127.0.0.2"]),
        ("0.0.0.0", "localhost", ["127.0.0.1", "127.0.0.2"]),
        ("0", "localhost", ["127.0.0.1"]),
        ("::", "localhost", ["::1", "127.0.0.1", "127.0.0.2"]),
        ("::0", "localhost", ["::1", "127.0.0.1"]),
        ("::1", "[::1]", ["::1"]),
    ],
)
def test_listener_is_reached_where_its_url_says(
    host: str, named: str, reached: list[str]
) -> None:
    """The URL of a listener is one that a browser opens; `::` means IPv4 too, for workers as well.
    """
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with process.listen_on(host, 0) as alone, process.hold_port(host, 0) as held:
        port = held.getsockname()[1]
        with process.listen_on(host, port, shared=True) as worker:
            for listener in (alone, worker):
                url = process.url_of(listener)
                assert url == f"http://{named}:{listener.getsockname()[1]}"
                for address in (*reached, named.strip("[]")):
                    here = (address, listener.getsockname()[1])
                    socket.create_connection(here, HEAR_SECONDS).close()


@pytest.mark.parametrize("host", ["256.1.1.1", "a" * 64, "..", "", "192.0.2.1"])
def test_host_that_cannot_be_listened_on_is_one_line(host: str) -> None:
    """Whatever is wrong with a host, the start ends with a line that names its setting."""
    with pytest.raises(StartError, match=r"^cannot listen on HOST .*, PORT 0: .+$"):
        process.listen_on(host, 0)


def test_taken_port_is_told_by_the_name_of_its_setting() -> None:
    """Of two ports, the one that is taken is named."""
    with process.listen_on("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        with pytest.raises(StartError, match=f"METRICS_HOST 127.0.0.1, METRICS_PORT {port}: "):
            process.listen_on("127.0.0.1", port, names=("METRICS_HOST", "METRICS_PORT"))


async def test_parser_in_c_is_required(tmp_path: Any) -> None:
    """Without aiohttp's parser in C the start ends with one line, before any data are made."""
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "messenger.py"), cwd=tmp_path,
        env=env | {"AIOHTTP_NO_EXTENSIONS": "1", "DATA_DIR": str(tmp_path / "data"), "PORT": "0"},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(HEAR_SECONDS):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    assert (process.returncode, out) == (1, b"")
    assert re.fullmatch(r"messenger: .*parser in C.*\n", err.decode())
    assert not (tmp_path / "data").exists()


def test_a_worker_whose_parent_is_gone_does_not_start() -> None:
    """A worker whose parent ended meanwhile does not start."""
    assert process.PARENT == "MESSENGER_PARENT"
    with pytest.raises(SystemExit):
        process.die_with(os.getpid())  # nobody is their own parent


async def test_who_may_not_come_in_is_hung_up_on() -> None:
    """Whom `admit` does not let in is hung up on at once; once a connection has ended, by either
    side, its `guest` was told, and the next is let in."""
    here: list[Any] = []

    class Leaving(process.Guest):
        def leave(self) -> None:
            here.pop()

    def admit(peer: str) -> Any:
        assert peer == "127.0.0.1"
        if len(here) == 2:
            return None
        here.append(peer)
        return Leaving()

    class Silent(asyncio.Protocol):
        guest: Any

        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            self.guest.leave()

    async def until(count: int) -> None:
        async with asyncio.timeout(HEAR_SECONDS):
            while len(here) != count:
                await asyncio.sleep(0.01)

    with process.listen_on("127.0.0.1", 0) as listener:
        address = listener.getsockname()
        acceptor = process.Acceptor(listener, Silent, admit)
        for by_us in (True, False, True):
            (_, first), (reader, second) = [
                await asyncio.open_connection(*address) for _ in range(2)]
            await until(2)
            other, third = await asyncio.open_connection(*address)
            assert await other.read() == b""
            third.close()
            first.close()
            if not by_us:
                second.write(b"x")
                assert await reader.read() == b""
            second.close()
            await until(0)
        acceptor.stop()
