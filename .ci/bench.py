"""The figures of README.md, measured: python3 .ci/bench.py

    --reference PYTHON  one that has fastapi and uvicorn: the guide's service
                        as most would write it is measured beside ours, the
                        two alternating, and the ratio printed
    --rounds 3          how often each is measured; the best round counts
    --scale 1.0         how many requests: 0.1 is a trial
"""
from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import resource
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

FILE = Path(__file__).absolute().parent.parent / "hitl.py"
sys.path.insert(0, str(FILE.parent))

import hitl                                                     # noqa: E402

TOKEN = "reviewer-token-of-the-bench"
CONNECTIONS = 64
RULES = """
[gate]
timeout_seconds = 20

[[checkpoint]]
checkpoint_id = "delete-records"
action_pattern = "delete_*"
description_template = "Delete {table}"
""" + "".join(f"""
[[checkpoint]]
checkpoint_id = "other-{n}"
action_pattern = "other_{n}"
description_template = "other"
""" for n in range(9))
REFERENCE = '''
import json, sqlite3, threading
from typing import Any
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

local = threading.local()

def db():
    if not hasattr(local, "db"):
        local.db = sqlite3.connect("ref.db", isolation_level=None, timeout=30)
        local.db.execute("PRAGMA journal_mode=WAL")
        local.db.execute("PRAGMA synchronous=FULL")
    return local.db

db().execute("""CREATE TABLE pending_reviews (id INTEGER PRIMARY KEY,
    request_id TEXT UNIQUE, action_description TEXT, agent_context TEXT,
    timestamp TEXT, status TEXT)""")
app = FastAPI()

class Pending(BaseModel):
    request_id: str
    action_description: str
    agent_context: dict[str, Any]
    timestamp: str

@app.post("/pending", status_code=201)
def pending(p: Pending):
    try:
        db().execute("INSERT INTO pending_reviews (request_id, "
            "action_description, agent_context, timestamp, status) VALUES "
            "(?, ?, ?, ?, 'waiting')", (p.request_id, p.action_description,
            json.dumps(p.agent_context), p.timestamp))
    except sqlite3.IntegrityError:
        raise HTTPException(409, "duplicate")
    return {"request_id": p.request_id, "status": "waiting"}

@app.get("/pending/{request_id}")
def status(request_id: str):
    row = db().execute("SELECT status FROM pending_reviews WHERE request_id "
                       "= ?", (request_id,)).fetchone()
    return {"request_id": request_id, "status": row[0]}
'''


# ---- servers ----

@contextlib.contextmanager
def running(folder: Path, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("HITL_")}
    process = subprocess.Popen(argv, cwd=folder, stdout=subprocess.DEVNULL,
                               env=env | {"HITL_REVIEWER_TOKEN": TOKEN})
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def until(test: Callable[[], object], seconds: float = 20.0) -> object:
    end = time.monotonic() + seconds
    while not (value := test()):
        if time.monotonic() > end:
            raise TimeoutError("the server does not answer")
        time.sleep(0.002)
    return value


def listens(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port)).close()
        return True
    return False


@contextlib.contextmanager
def ours(folder: Path) -> Iterator[tuple[int, int]]:
    """A desk as a process -> its port and its process id."""
    port = free_port()
    with running(folder, sys.executable, str(FILE), "serve", "--port",
                 str(port), "--database", "hitl.db") as process:
        until(lambda: listens(port))
        yield port, process.pid


@contextlib.contextmanager
def theirs(folder: Path, python: str) -> Iterator[tuple[int, int]]:
    (folder / "reference.py").write_text(REFERENCE)
    port = free_port()
    with running(folder, python, "-m", "uvicorn", "reference:app", "--port",
                 str(port), "--no-access-log", "--log-level", "warning"
                 ) as process:
        until(lambda: listens(port))
        yield port, process.pid


def reviewer(port: int) -> hitl.Client:
    return hitl.Client(f"http://127.0.0.1:{port}", hitl.basic("ana", TOKEN))


# ---- load ----

def plain_http(method: str, path: str, body: bytes = b"") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    if body:
        head += ("Content-Type: application/json\r\n"
                 f"Content-Length: {len(body)}\r\n")
    return head.encode() + b"\r\n" + body


def posts(count: int) -> list[bytes]:
    return [plain_http("POST", "/pending", json.dumps({
        "request_id": f"r-{n}", "agent_context": {"task": "clean up"},
        "action_description": "Delete users where id = 3",
        "timestamp": "2026-11-22T18:00:00Z", "agent": f"agent {n % 16}"}
        ).encode()) for n in range(count)]


def load(port: int, requests: list[bytes], good: bytes) -> float:
    """Send all requests over some connections -> answers a second."""
    picker, left, done = selectors.DefaultSelector(), iter(requests), 0
    buffers: dict[int, bytes] = {}
    began = time.perf_counter()
    for _ in range(min(CONNECTIONS, len(requests))):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(next(left))
        picker.register(sock, selectors.EVENT_READ)
    while done < len(requests):
        for key, _ in picker.select(10):
            sock = key.fileobj          # type: ignore[assignment]
            answer = buffers.pop(key.fd, b"") + sock.recv(65536)
            head, end, body = answer.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            if not end or not length or len(body) < int(length[1]):
                buffers[key.fd] = answer
                continue
            if not answer.startswith(good):
                raise SystemExit(f"unexpected answer: {answer[:300]!r}")
            done += 1
            following = next(left, None)
            if following is not None:
                sock.sendall(following)
    took = time.perf_counter() - began
    for key in list(picker.get_map().values()):
        key.fileobj.close()             # type: ignore[union-attr]
    return len(requests) / took


def rates(port: int, writes: int, reads: int) -> tuple[float, float]:
    return (load(port, posts(writes), b"HTTP/1.1 201"),
            load(port, [plain_http("GET", "/pending/r-1")] * reads,
                 b"HTTP/1.1 200"))


# ---- the figures ----

def bench_server(reference: str | None, rounds: int, scale: float) -> None:
    """Durable writes and reads; beside the reference, if there is one."""
    mine, other = [], []
    for _ in range(rounds):
        with scratch() as folder, ours(folder) as (port, _pid):
            mine.append(rates(port, int(9000 * scale), int(20000 * scale)))
        if reference:
            with scratch() as folder, theirs(folder, reference) as (port, _):
                other.append(rates(port, int(4000 * scale),
                                   int(6000 * scale)))
    best = [max(column) for column in zip(*mine, strict=True)]
    print(f"durable POST /pending, {CONNECTIONS} connections: {best[0]:,.0f}/s")
    print(f"status reads, {CONNECTIONS} connections: {best[1]:,.0f}/s")
    if other:
        their = [max(column) for column in zip(*other, strict=True)]
        print(f"FastAPI + uvicorn + sqlite3: {their[0]:,.0f}/s and "
              f"{their[1]:,.0f}/s: ratios {best[0] / their[0]:.1f} and "
              f"{best[1] / their[1]:.1f}")


def bench_gate(folder: Path, port: int) -> None:
    """Decision to running tool; the cost of what matches nothing."""
    rules = folder / "checkpoints.toml"
    rules.write_text(RULES)
    logging.disable()
    gate = hitl.Gate(rules, server_url=f"http://127.0.0.1:{port}")
    me, delays = reviewer(port), []
    for n in range(50):
        ran: list[float] = []
        thread = threading.Thread(target=gate.call, kwargs={
            "tool": "delete_records", "arguments": {"table": "users"},
            "execute": lambda table, ran=ran: ran.append(time.time()),
            "request_id": f"d-{n}"})
        thread.start()
        until(lambda: me.exchange("GET", "/pending", seconds=5
                                  ).body["waiting"])
        time.sleep(0.02)
        clicked = time.time()
        me.exchange("POST", f"/approve/d-{n}", {"decision": "approved"},
                    seconds=5)
        thread.join()
        delays.append(ran[0] - clicked)
    delays.sort()
    print(f"decision to running tool: median {delays[25] * 1000:.1f} ms, "
          f"nine in ten {delays[45] * 1000:.1f} ms")
    count = 100_000
    began = time.perf_counter()
    for _ in range(count):
        gate.call("read_records", {}, int)
    print("a call that matches nothing, 10 checkpoints: "
          f"{(time.perf_counter() - began) / count * 1e6:.2f} us")


def cpu_of(*argv: str, stdin: bytes = b"", times: int = 9) -> float:
    """The least CPU time of a process, in milliseconds."""
    used = []
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(argv, input=stdin, stdout=subprocess.DEVNULL,
                       check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime
                    - before.ru_utime - before.ru_stime)
    return min(used) * 1000


def bench_start(folder: Path) -> None:
    """What an import and a hook cost, beside bare Python."""
    rules = folder / "checkpoints.toml"
    rules.write_text(RULES)
    call = {"session_id": "s", "transcript_path": "t", "tool_name": "Read",
            "hook_event_name": "PreToolUse", "tool_input": {"path": "x"}}
    path = f"import sys; sys.path.insert(0, {str(FILE.parent)!r}); import hitl"
    kept = ["-I", "-X", f"pycache_prefix={folder / 'bytecode'}"]
    settings = json.loads(subprocess.run(
        [sys.executable, FILE, "hook", "--snippet", "claude", "--config", rules],
        capture_output=True, check=True).stdout)
    line = settings["hooks"]["PreToolUse"][0]["hooks"][0]["command"]
    bare = cpu_of(sys.executable, "-I", "-c", "1")
    print(f"bare Python: {bare:.0f} ms CPU; beyond it, with bytecode:")
    for what, argv, stdin in (
            ("import hitl", [sys.executable, *kept, "-c", path], b""),
            ("a hook call that matches nothing, by the printed line",
             shlex.split(line.partition(" || ")[0]), json.dumps(call).encode())):
        print(f"  {what}: {cpu_of(*argv, stdin=stdin) - bare:.0f} ms CPU")


def bench_waiting(folder: Path, count: int) -> None:
    """Memory of a desk with many agents on long polls."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with ours(folder) as (port, pid):
        load(port, posts(count), b"HTTP/1.1 201")
        socks = []
        for n in range(count):
            sock = socket.create_connection(("127.0.0.1", port))
            sock.sendall(plain_http("GET", f"/pending/r-{n}?wait=60"))
            socks.append(sock)
        time.sleep(1)
        began = time.perf_counter()
        reviewer(port).fetch("GET", "/", seconds=30)
        took = (time.perf_counter() - began) * 1000
        status = Path(f"/proc/{pid}/status").read_text()
        used = re.search(r"VmRSS:\s+(\d+)", status)
        print(f"{count} waiting agents: {int(used[1]) / 1024:.0f} MB, "
              f"the page in {took:.0f} ms" if used else "no VmRSS here")
        for sock in socks:
            sock.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--reference", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0)
    given = parser.parse_args()
    bench_server(given.reference, given.rounds, given.scale)
    with scratch() as folder, ours(folder) as (port, _):
        bench_gate(folder, port)
    with scratch() as folder:
        bench_start(folder)
    with scratch() as folder:
        bench_waiting(folder, int(5000 * given.scale))


if __name__ == "__main__":
    main()
