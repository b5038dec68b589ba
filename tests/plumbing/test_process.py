"""The process by itself: what is in its log, and what it does not start without."""

import asyncio
import io
import logging
import os
import re
import sys
from typing import Any

import pytest

import messenger
from plumbing import process
from support.people import HEAR_SECONDS
from support.servers import ROOT


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
    assert messenger.PARENT == "MESSENGER_PARENT"
    with pytest.raises(SystemExit):
        process.die_with(os.getpid())  # nobody is their own parent
