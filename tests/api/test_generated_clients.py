"""What generators and parsers make of the two documents: clients that work, without a warning.

They come from npm and PyPI, and only `./run documents --tools` fetches them, into `.tools`.
"""

import asyncio
import json
import os
from pathlib import Path

import pytest
from aiohttp.test_utils import TestServer

from support.people import PASSWORD
from support.servers import ROOT

TOOLS = Path(os.environ.get("CLIENT_TOOLS", ""))
WEB = ROOT / "web"
TOOL_SECONDS = 100
pytestmark = pytest.mark.skipif(
    "CLIENT_TOOLS" not in os.environ, reason="./run documents --tools brings the generators")

# Registers, posts, and reads two refusals, which the generated code knows by their types.
PYTHON_CLIENT = """\
import sys
from uuid import UUID
from client import AuthenticatedClient, Client
from client.api.chats import create_chat, get_chat
from client.api.messages import list_messages, send_message
from client.api.users import create_user, login
from client.models import (
    Chat, ChatNotFound, Login, Message, NewChat, NewMessage, NewUser, Tokens, User, UsernameTaken)

url, password = sys.argv[1:]
anyone = Client(base_url=url)
ben = create_user.sync(client=anyone, body=NewUser("ben@example.com", "ben", password))
ann = create_user.sync(client=anyone, body=NewUser("ann@example.com", "ann", password))
assert isinstance(ann, User) and isinstance(ben, User)
refused = create_user.sync(client=anyone, body=NewUser("other@example.com", "ann", password))
assert isinstance(refused, UsernameTaken), refused
assert (refused.type_.value, refused.status.value) == ("username-taken", 409)

tokens = login.sync(client=anyone, body=Login("ann@example.com", password))
assert isinstance(tokens, Tokens)
client = AuthenticatedClient(base_url=url, token=tokens.access_token)
chat = create_chat.sync(client=client, body=NewChat(False, [ben.id]))
assert isinstance(chat, Chat)
own = UUID("01a204e6-62a3-7c4a-8d5e-1f2a3b4c5d6e")
for _ in range(2):
    posted = send_message.sync(chat.id, client=client, body=NewMessage("Hello, Ben!", own))
    assert isinstance(posted, Message) and posted.id == own
assert [each.text for each in list_messages.sync(chat.id, client=client)] == ["Hello, Ben!"]
missing = get_chat.sync(chat.id + 1, client=client)
assert isinstance(missing, ChatNotFound), missing
print(missing.type_.value)
"""

# Compiles only where the types tell apart what a call answers and which problem it is.
TYPESCRIPT_CLIENT = """\
import type { components, operations } from "./api";

type Refused = operations["create_user"]["responses"][409]["content"]["application/problem+json"];
export function explain(problem: Refused): "the email" | "the username" {
  switch (problem.type) {
    case "email-taken": return "the email";
    case "username-taken": return "the username";
  }
}
export const body: components["schemas"]["NewMessage"] = { text: "Hello, Ben!" };
type Message = components["schemas"]["Message"];
export const sender = (message: Message): number | null => message.sender_id;
// @ts-expect-error: a message has a text
export const empty: components["schemas"]["NewMessage"] = {};
"""

ASYNCAPI_PARSER = """\
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
const { Parser } = createRequire(process.argv[2] + "/")("@asyncapi/parser");
const { document, diagnostics } = await new Parser().parse(readFileSync(process.argv[3], "utf8"));
const warnings = diagnostics.filter((one) => one.severity < 2);  // the others are hints
console.log(JSON.stringify({ warnings, messages: document?.allMessages().all().length ?? 0 }));
"""


async def tool(folder: Path, *command: str | Path) -> str:
    """Run a program in a folder; answer what it says once it has succeeded."""
    paths = os.pathsep.join([str(TOOLS / "venv/bin"), os.environ["PATH"]])
    process = await asyncio.create_subprocess_exec(
        *map(str, command), cwd=folder, env=os.environ | {"PATH": paths},
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT)
    async with asyncio.timeout(TOOL_SECONDS):
        said = (await process.communicate())[0].decode()
    assert process.returncode == 0, said
    return said


async def test_python_client_knows_every_refusal(server: TestServer, tmp_path: Path) -> None:
    """openapi-python-client makes a client without a warning; with it somebody registers, posts,
    and is refused by problems that have types."""
    said = await tool(
        tmp_path, "openapi-python-client", "generate", "--path", WEB / "openapi.json",
        "--output-path", "client", "--meta", "none")
    assert said.split() == ["Generating", "client"]
    (tmp_path / "use.py").write_text(PYTHON_CLIENT)
    url = str(server.make_url("")).rstrip("/")
    used = await tool(tmp_path, TOOLS / "venv/bin/python", "use.py", url, PASSWORD)
    assert used == "chat-not-found\n"


async def test_typescript_tells_problems_apart(tmp_path: Path) -> None:
    """openapi-typescript makes types without a warning, and they tell which problem it is."""
    made = await tool(
        tmp_path, TOOLS / "node_modules/.bin/openapi-typescript", WEB / "openapi.json",
        "-o", "api.ts")
    assert "warn" not in made.lower()
    (tmp_path / "use.ts").write_text(TYPESCRIPT_CLIENT)
    compiler = TOOLS / "node_modules/.bin/tsc"
    assert await tool(tmp_path, compiler, "--strict", "--noEmit", "api.ts", "use.ts") == ""


async def test_asyncapi_parser_has_nothing_to_say(tmp_path: Path) -> None:
    """@asyncapi/parser reads the document of the sockets without an error or a warning."""
    (tmp_path / "parse.mjs").write_text(ASYNCAPI_PARSER)
    said = json.loads(
        await tool(tmp_path, "node", "parse.mjs", TOOLS.resolve(), WEB / "asyncapi.json"))
    content = json.loads((WEB / "asyncapi.json").read_text())
    assert said == {"warnings": [], "messages": len(content["components"]["messages"])}
