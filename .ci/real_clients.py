"""hitl.py with the programs of others, as they are on PyPI and npm: offline,
with scripted models, against a real desk.

    pip install pytest mcp langchain-core pydantic-ai-slim openai-agents
    npm install --prefix "$PWD/clients" @modelcontextprotocol/server-filesystem
    HITL_CLIENTS=$PWD/clients python3 -m pytest .ci/real_clients.py

Nothing is skipped: what is not installed fails.
"""
from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).absolute().parent.parent))
CLIENTS = Path(os.environ.get("HITL_CLIENTS", "clients")).absolute()

import hitl                                                     # noqa: E402
from test_hitl import (                                  # noqa: E402, F401
    CALL, FILE, SHELL, WHY, clean_environment, desk, in_background,
    make_gate)


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
    there, = desk.waiting() or [result()]
    assert there["arguments"] == CALL
    desk.decide(there["request_id"], decision, reason="no")
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
    agents =
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


def test_mcp(desk, tmp_path):
    """The MCP Python SDK, client and server, through the proxy."""
    try:
        from mcp.server.fastmcp import FastMCP      # noqa: F401  (1.x)
        server = "from mcp.server.fastmcp import FastMCP as Server\n"
    except ImportError:
        server = "from mcp.server.mcpserver import MCPServer as Server\n"
    from mcp import ClientSession, StdioServerParameters
    from mcp.client.stdio import stdio_client
    (tmp_path / "rules.toml").write_text(SHELL)
    (tmp_path / "files.py").write_text(server + """
server = Server("files")

@server.tool()
def delete_file(path: str) -> str:
    return f"deleted {path}"

@server.tool()
def read_file(path: str) -> str:
    return f"read {path}"

server.run()
""")
    parameters = StdioServerParameters(
        command=sys.executable, cwd=str(tmp_path), args=[
            str(FILE), "mcp", "--config", "rules.toml", "--name", "fs", "--",
            sys.executable, "files.py"],
        env=os.environ | {"HITL_SERVER_URL": desk.url})

    async def session():
        async with stdio_client(parameters) as streams:
            async with ClientSession(*streams) as client:
                await client.initialize()
                names = [t.name for t in (await client.list_tools()).tools]
                assert names == ["delete_file", "read_file"]
                calls = [client.call_tool("delete_file", {"path": p})
                         for p in "ab"]
                calls.append(client.call_tool("read_file", {"path": "c"}))
                return [r.content[0].text for r in
                        await asyncio.gather(*calls)]
    result = in_background(lambda: asyncio.run(session()))
    for there in desk.waiting(2):
        path = there["arguments"]["path"]
        desk.decide(there["request_id"], reason="no", decision="approved"
                    if path == "a" else "rejected")
    assert result() == ["deleted a", WHY, "read c"]

def test_filesystem(desk, tmp_path):
    """The MCP reference server for files, of npm, behind the proxy: a file is
    written when a person said so, and not otherwise."""
    from mcp import ClientSession, StdioServerParameters
    from mcp.client.stdio import stdio_client
    server = Path(os.environ.get("HITL_CLIENTS", "."), "node_modules",
                  "@modelcontextprotocol", "server-filesystem", "dist",
                  "index.js")
    if not server.exists():
        pytest.skip("no @modelcontextprotocol/server-filesystem installed")
    (tmp_path / "rules.toml").write_text(SHELL.replace("delete_*", "write_"))
    (tmp_path / "there.txt").write_text("it was there")
    parameters = StdioServerParameters(
        command=sys.executable, cwd=str(tmp_path), args=[
            str(FILE), "mcp", "--config", str(tmp_path / "rules.toml"), "--",
            "node", str(server), str(tmp_path)],
        env=os.environ | {"HITL_SERVER_URL": desk.url})

    async def session():
        async with stdio_client(parameters) as streams:
            async with ClientSession(*streams) as client:
                await client.initialize()
                return [r.content[0].text for r in await asyncio.gather(*(
                    client.call_tool("write_file", {
                        "path": str(tmp_path / name), "content": name})
                    for name in "ab"), client.call_tool("read_text_file", {
                        "path": str(tmp_path / "there.txt")}))]
    result = in_background(lambda: asyncio.run(session()))
    for there in desk.waiting(2):
        yes = there["arguments"]["content"] == "a"
        desk.decide(there["request_id"], reason="no",
                    decision="approved" if yes else "rejected")
    wrote, refused, read = result()
    assert (tmp_path / "a").read_text() == "a" and "wrote" in wrote
    assert not (tmp_path / "b").exists() and refused == WHY
    assert read == "it was there"
