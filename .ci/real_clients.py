"""hitl.py with the programs of others, as they are on PyPI and npm: offline,
with scripted models, against a real desk.

    pip install pytest mcp langchain-core pydantic-ai-slim openai-agents \\
        standardwebhooks aiosmtpd
    npm install --prefix clients @modelcontextprotocol/sdk \\
        @modelcontextprotocol/server-filesystem
    HITL_CLIENTS=clients python3 -m pytest -p test_hitl .ci/real_clients.py

`-p test_hitl` brings the fixtures of the tests. Nothing is skipped: what is
not installed fails.
"""
from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import sys
from pathlib import Path

import pytest

import hitl
from test_hitl import (
    CALL, FILE, RULES, SHELL, Receiver, Served, command, four, in_background,
    until)

pytestmark = pytest.mark.filterwarnings("default")    # of theirs
NODE = Path(os.environ.get("HITL_CLIENTS", "clients")).absolute(
    ) / "node_modules"
REJECTED = "rejected by ana: no"


def guarded_tool(gate, ran):
    @gate.guard
    def delete_records(table: str, condition: str) -> str:
        """Delete records.

        Args:
            table: where
            condition: which
        """
        ran.append((table, condition))
        return "deleted 3"
    return delete_records


def reviewed(desk, decision, run):
    """Run an agent while a reviewer decides what it asks for, once."""
    result = in_background(run)
    request, = desk.waiting() or [result()]
    assert request["arguments"] == CALL
    desk.decide(request["request_id"], decision, reason="no")
    return result()


def test_pydantic_ai(desk, make_gate):
    """pydantic-ai: approved runs, rejected propagates, one line added."""
    from pydantic_ai import Agent
    from pydantic_ai.messages import (ModelResponse, TextPart, ToolCallPart,
                                      ToolReturnPart)
    from pydantic_ai.models.function import FunctionModel

    def model(messages, info):
        told = [p.content for p in messages[-1].parts
                if isinstance(p, ToolReturnPart)]
        return ModelResponse(parts=[TextPart(f"saw {told}")] if told else [
            ToolCallPart("delete_records", CALL)])
    gate, ran = make_gate(desk), []
    agent = Agent(FunctionModel(model))
    agent.tool_plain(guarded_tool(gate, ran))

    def run():
        return agent.run_sync("go").output
    assert reviewed(desk, "approved", run) == "saw ['deleted 3']"
    assert ran == [("users", "id = 3")]
    with pytest.raises(hitl.CollaborationError, match="rejected by ana: no"):
        reviewed(desk, "rejected", run)
    assert len(ran) == 1


def test_langchain(desk, make_gate):
    """LangChain: a tool keeps its schema, approved runs, rejected raises."""
    from langchain_core import tools
    gate, ran = make_gate(desk), []
    guarded = guarded_tool(gate, ran)
    tool = tools.tool(guarded)
    plain = tools.tool(guarded.__wrapped__)
    assert tool.args_schema.model_json_schema() == (
        plain.args_schema.model_json_schema())
    assert reviewed(desk, "approved", lambda: tool.invoke(CALL)) == "deleted 3"
    with pytest.raises(hitl.CollaborationError):
        reviewed(desk, "rejected", lambda: tool.invoke(CALL))
    assert len(ran) == 1


def test_openai_agents(desk, make_gate):
    """OpenAI Agents: with on_reject="return" the model is told who and why."""
    import agents
    from openai.types.responses import (
        ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText)
    agents.set_tracing_disabled(True)

    class Scripted(agents.Model):
        async def get_response(self, system_instructions, input,
                               *args, **more):
            told = [] if isinstance(input, str) else [
                i["output"] for i in input
                if i.get("type") == "function_call_output"]
            out = ResponseOutputMessage(
                id="m", type="message", role="assistant", status="completed",
                content=[ResponseOutputText(
                    type="output_text", text=f"saw {told}", annotations=[])]
            ) if told else ResponseFunctionToolCall(
                type="function_call", call_id="c", name="delete_records",
                arguments=json.dumps(CALL))
            return agents.ModelResponse(output=[out], usage=agents.Usage(),
                                        response_id="r")

        def stream_response(self, *args, **more):
            raise NotImplementedError
    gate, ran = make_gate(desk, on_reject="return"), []
    agent = agents.Agent(name="a", model=Scripted(), tools=[
        agents.function_tool(guarded_tool(gate, ran))])

    def run():
        return asyncio.run(agents.Runner.run(agent, "go")).final_output
    assert reviewed(desk, "approved", run) == "saw ['deleted 3']"
    assert "rejected by ana: no. The call did not run" in reviewed(
        desk, "rejected", run)
    assert len(ran) == 1


# ---- MCP: client, proxy and server are programs of their own ----

def proxy_words(folder: Path, *server: str) -> list[str]:
    (folder / "rules.toml").write_text(SHELL.replace("delete_*",
                                                     "delete_*|write_"))
    return [str(FILE), "mcp", "--config", "rules.toml", "--", *server]


def decide_by_path(desk) -> None:
    """Of the two calls that wait, the one about `a` is approved."""
    for request in desk.waiting(2):
        yes = request["arguments"]["path"].endswith("a")
        desk.decide(request["request_id"], reason="no",
                    decision="approved" if yes else "rejected")


PYTHON = """
try:
    from mcp.server.fastmcp import FastMCP as Server        # 1.x
except ImportError:
    from mcp.server.mcpserver import MCPServer as Server
server = Server("files")

@server.tool()
def delete_file(path: str) -> str:
    return f"deleted {path}"

@server.tool()
def read_file(path: str) -> str:
    return f"read {path}"

server.run()
"""


def test_mcp_python_sdk(desk, tmp_path):
    """The MCP Python SDK, client and server, through the proxy."""
    from mcp import ClientSession, StdioServerParameters
    from mcp.client.stdio import stdio_client
    (tmp_path / "files.py").write_text(PYTHON)
    parameters = StdioServerParameters(
        command=sys.executable, cwd=str(tmp_path),
        args=proxy_words(tmp_path, sys.executable, "files.py"),
        env=os.environ | {"HITL_SERVER_URL": desk.url})

    async def session():
        async with (stdio_client(parameters) as streams,
                    ClientSession(*streams) as client):
            await client.initialize()
            names = {tool.name for tool in (await client.list_tools()).tools}
            assert names == {"delete_file", "read_file"}
            return [result.content[0].text for result in await asyncio.gather(*(
                client.call_tool(name, {"path": path}) for name, path in (
                    ("delete_file", "a"), ("delete_file", "b"),
                    ("read_file", "c"))))]
    result = in_background(asyncio.run, session())
    decide_by_path(desk)
    deleted, refused, read = result()
    assert (deleted, read) == ("deleted a", "read c")
    assert refused.startswith(REJECTED)


TYPESCRIPT = """
import {Client} from "SDK/client/index.js";
import {StdioClientTransport} from "SDK/client/stdio.js";
const [command, ...args] = process.argv.slice(2);
const client = new Client({name: "typescript", version: "1"});
await client.connect(new StdioClientTransport({command, args,
  env: process.env, stderr: "inherit"}));
const told = [];
const answers = await Promise.all(["a", "b"].map(name => client.callTool(
  {name: "write_file", arguments: {path: `${process.cwd()}/${name}`,
   content: name}}, undefined, {onprogress: p => told.push(p.message)})));
console.log(JSON.stringify({told, answers: answers.map(
  r => [Boolean(r.isError), r.content[0].text])}));
await client.close();
"""


def test_mcp_typescript_sdk(desk, tmp_path):
    """The MCP TypeScript SDK before the reference server for files: a file is
    written when a person said so, and not otherwise; the client is told that a
    person is waited for, and a refusal is a tool's result."""
    sdk = NODE / "@modelcontextprotocol/sdk/dist/esm"
    (tmp_path / "client.mjs").write_text(TYPESCRIPT.replace("SDK", str(sdk)))
    server = NODE / "@modelcontextprotocol/server-filesystem/dist/index.js"
    words = proxy_words(tmp_path, "node", str(server), str(tmp_path))
    result = in_background(lambda: command(
        "client.mjs", sys.executable, *words, argv=["node"], folder=tmp_path,
        HITL_SERVER_URL=desk.url))
    decide_by_path(desk)
    done = result()
    assert done.returncode == 0, done
    said = json.loads(done.stdout)
    (failed, wrote), (is_error, refused) = said["answers"]
    assert not failed and "wrote" in wrote
    assert is_error and refused.startswith(REJECTED)
    assert (tmp_path / "a").read_text() == "a"
    assert not (tmp_path / "b").exists()
    assert "waiting for a person's approval" in said["told"]


# ---- notices: what takes them is not ours ----

def test_standardwebhooks(tmp_path):
    """The event that serve sends is verified by the library of Standard
    Webhooks, and one with another key or body is not."""
    from standardwebhooks import Webhook, WebhookVerificationError
    secret = "whsec_" + base64.b64encode(b"k" * 24).decode()
    with Receiver() as receiver:
        (tmp_path / "checkpoints.toml").write_text(RULES + f"""
[[notify]]
name = "siem"
url = "{receiver.url}"
sign = "${{HOOK}}"
""")
        with Served(tmp_path, HOOK=secret) as served:
            served.agent().exchange("POST", "/pending", four(), seconds=10)
            assert until(lambda: receiver.got), served.text
            (_, headers, body), = receiver.got
    event = Webhook(secret).verify(body, dict(headers.items()))
    assert event["type"] == "request.waiting"
    assert event["data"]["request_id"] == "r-1"
    other = "whsec_" + base64.b64encode(b"o" * 24).decode()
    for key, data in ((other, body), (secret, body.replace(b"r-1", b"r-2"))):
        with pytest.raises(WebhookVerificationError):
            Webhook(key).verify(data, dict(headers.items()))


def test_aiosmtpd(tmp_path):
    """An e-mail that serve sends arrives at aiosmtpd as one whole message to
    those who are named."""
    from email import message_from_bytes, policy

    from aiosmtpd.controller import Controller

    class Box:
        def __init__(self) -> None:
            self.got = []

        async def handle_DATA(self, server, session, envelope):
            self.got.append(envelope)
            return "250 OK"
    box = Box()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    controller = Controller(box, hostname="127.0.0.1", port=port)
    controller.start()
    try:
        (tmp_path / "checkpoints.toml").write_text(RULES + f"""
[[notify]]
name = "mail"
smtp = "plain://127.0.0.1:{port}"
from = "hitl@example.org"
to = ["ana@example.org", "bo@example.org"]
""")
        with Served(tmp_path) as served:
            served.agent().exchange("POST", "/pending", four(), seconds=10)
            assert until(lambda: box.got), served.text
    finally:
        controller.stop()
    envelope, = box.got
    assert envelope.rcpt_tos == ["ana@example.org", "bo@example.org"]
    message = message_from_bytes(envelope.content, policy=policy.default)
    assert message["From"] == "hitl@example.org" and message["Subject"]
    assert "/review/r-1" in message.get_content()
