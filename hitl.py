#!/usr/bin/env python3
"""hitl.py 2.0.0 (2026-11-25): a person decides before an AI agent acts.

One file, standard library only, Python 3.11 or newer. It makes an agent wait
for a human being before it deletes, deploys, sends or pays.

    agent -- tool call --> Gate -- POST /pending --> server --> page --> you
      ^                     |  <--- long poll ------ SQLite <-- /approve --+
      +---- result, CollaborationError or TimeoutError

    python3 hitl.py demo      # see it happen: a sample agent asks, you decide
    python3 hitl.py init      # write checkpoints.toml: what needs a person
    python3 hitl.py serve     # the desk: prints the link where you review

and in the agent, in place of TOOLS[name](**arguments):

    import hitl
    gate = hitl.Gate("checkpoints.toml")
    result = gate.call(name, arguments, TOOLS[name], context=state)

Five words
----------
tool call       one action the agent proposes: a tool's name and its arguments
checkpoint      a rule in checkpoints.toml that says which calls need review
                (in LangGraph the word means saved state)
review request  a held tool call, waiting for a decision or decided
reviewer        the person at the desk, which is the server with its page
decision        what the reviewer said: approved or rejected, with a reason

The promises (the code cites them by number; test_hitl.py tests each)
---------------------------------------------------------------------
1. A tool call that matches a checkpoint never runs without a recorded
   approval. Every failure refuses: server gone, bad reply, bad
   configuration, crash.
2. What runs is exactly what the reviewer approved: parsed from the bytes that
   were stored, displayed and digested (or those the reviewer changed them to).
3. One approval runs one call, once, whatever is retried, raced or replayed.
4. Silence is not consent, and it is not a refusal either: a request nobody
   answers by its deadline is `expired`, and says so.
5. An agent cannot decide: the credential that creates requests can never
   approve or reject them.
6. Once the server has answered, nothing is lost: an acknowledged request or
   decision survives kill -9 and power loss on an honest disk.
7. The page cannot mislead: nothing of what will run is cut or hidden where the
   buttons are, and nothing an agent wrote can act as markup.
8. The audit log shows tampering.
9. A reviewer is told: each configured notice is sent for every request, or the
   card and the log say that it was not.

Not promised: protection from code that runs as the server's own user, and so
can edit the database, the checkpoints and the gate; hitl.py guards against the
model and whatever steers it. If the agent has a shell, run `serve` as another
user or on another host. A regular expression is a tripwire, not a boundary;
with `unmatched = "review"`, what no checkpoint matches waits too. server_url
must name a server you trust. An approved tool can do more than its name says.

How to audit this file
----------------------
The rooms marked * decide whether a call runs; read them in order. The others
are interfaces, or mechanisms whose failure refuses the call. Each room uses
only rooms above it, and each effect has one place. The reviewer's half (Store
to Loop) and the agent's half (Client to Adapters) meet only over HTTP, so each
can be read alone, after the rooms above both. Tools are run by Gate.call and
acall, and by whatever holds an approval: an MCP server, a coding agent, `run`.
`grep -n '^# ====' hitl.py` prints this map with line numbers.

  * Errors             102  the ways it can go wrong, each with its hint
  * Vocabulary         316  statuses, canonical JSON, the digest
    Text               170  text shown so that a person can trust it
  * Matching           673  does a checkpoint match this call?
    Configuration      463  reads and checks checkpoints.toml
  * Store             1009  the SQL of requests, decisions and the audit log
    Database file      239  opens, locks and verifies it
    Notices            462  tells a reviewer; the only outgoing messages
    Pages              988  the only HTML; pure functions
  * Rights and routes  873  who may do what, and the replies
    Loop               480  the only listening socket; one transaction a turn
  * Client             158  the only outgoing requests to the server
    Context            290  what the card says about the agent, secrets masked
    Guard              155  the decorator
  * Gate               718  match, ask, wait, claim, run, report: runs a tool
    Adapters           653  coding-agent hooks, MCP proxy, command prefix
    Evidence           248  `verify` and `demo`: the whole path, for real
    Command line      1238  argv, environment, stdout

It reads checkpoints.toml (the rules), and leaves no files but: hitl.db, -wal,
-shm (requests and audit log), hitl.db.lock (one server per database), by
`serve`; ~/.cache/hitl (this file's bytecode); checkpoints.toml, by `init`;
hitl-evidence.json, by `verify`.
Environment: HITL_SERVER_URL, HITL_CONFIG, HITL_DATABASE, HITL_AGENT_TOKEN,
HITL_AGENT, HITL_REVIEWER, HITL_REVIEWER_TOKEN. A flag wins over the
environment, and the environment over the file.

Is this copy current and unmodified? `python3 hitl.py --version` prints its
version and SHA-256, to compare with the one you trust. 2.0.0 added notices,
named reviewers and agents, standing decisions, arguments that a reviewer may
change, kind = "shell" and "edit", and TLS.
"""
# SPDX-License-Identifier: MIT-0
# Copyright 2026 the authors of hitl.py
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this
# software and associated documentation files (the "Software"), to deal in the Software
# without restriction, including without limitation the rights to use, copy, modify,
# merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
# permit persons to whom the Software is furnished to do so.
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED,
# INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A
# PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT
# HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF
# CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE
# OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
#
# /// script
# requires-python = ">=3.11"
# ///
# ruff: noqa: E402 (what may be imported is settled first)
from __future__ import annotations

import os
import sys

if sys.version_info < (3, 11):  # in a syntax that Python 3.8 can still parse
    OLD = ("hitl.py needs Python 3.11 or newer, but this is Python "
           + sys.version.split()[0])
    if __name__ != "__main__":
        raise ImportError(OLD)
    sys.stderr.write("hitl: error: " + OLD + "\nhitl: hint: use python3.11, or "
                     "`uv run hitl.py`, which fetches one\n")
    sys.exit(2)                         # a coding agent takes this as a refusal

# The code for `python -I -c`, on one line. It runs this file, and imports
# nothing from beside it or from PYTHONPATH; bytecode comes only from the
# folder that it is given.
LOADER = """
import gc, sys
gc.disable()
from importlib.machinery import SourceFileLoader
_, sys.pycache_prefix, file, *words = sys.argv
sys.argv = [file, *words]
hitl = sys.modules['hitl'] = type(sys)('hitl')
hitl.__file__ = file
code = SourceFileLoader('hitl', file).get_code('hitl')
sys.pycache_prefix = None
exec(code, hitl.__dict__)
gc.enable()
sys.exit(hitl.main())
""".strip().replace("\n", "; ")


def bytecode_folder() -> str:
    """The folder of this file's bytecode; OSError unless it belongs to this
    user alone, because whatever is in it would run as hitl.py."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(os.path.abspath(base), "hitl")
    os.makedirs(folder, 0o700, exist_ok=True)
    found = os.lstat(folder)
    if os.name == "posix" and (found.st_uid != os.getuid() or found.st_mode & 0o077):
        raise PermissionError(0, "is not this user's alone", folder)
    return folder


if __name__ == "__main__" and not sys.flags.isolated:
    # Nothing else is imported yet. A json.py beside this file, or one on
    # PYTHONPATH, would run in place of Python's own and could answer
    # "approved" (promise 1): start again where only Python's folders count.
    if os.name == "posix":
        try:
            cache = bytecode_folder()
        except OSError:
            cache = os.devnull          # keeps no bytecode
        try:
            os.execv(sys.executable, [
                sys.executable, "-I", *(f"-W{w}" for w in sys.warnoptions), "-c",
                LOADER, cache, os.path.abspath(__file__), *sys.argv[1:]])
        except (OSError, ValueError, TypeError):
            os._exit(2)                 # a coding agent takes this as a refusal
    # elsewhere, whoever started us would not wait for what exec starts
    sys.path[:] = [folder for folder in sys.path[1:] if folder.startswith(
        (sys.prefix, sys.base_prefix))]

import contextlib
import enum
import functools
import hashlib
import itertools
import json
import math
import operator
import re
import threading
import time
import unicodedata
from collections import Counter, deque
from collections.abc import (
    Awaitable, Callable, Container, Iterable, Iterator, Mapping)
from datetime import datetime, timezone
from pathlib import Path
from re import _compiler, _constants as op, _parser  # type: ignore[attr-defined]
from typing import (TYPE_CHECKING, Any, AnyStr, NamedTuple, NoReturn,
                    ParamSpec, TypedDict, TypeVar, Unpack, overload)


class Later:
    """A stand-in for an object that is made at its first use: a hook starts
    for every call, and most calls need little."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.make(), name)
        setattr(self, name, value)
        return value


if TYPE_CHECKING:
    import asyncio
    import html
    import inspect
    import logging
    import sqlite3
else:                           # importing these now would add half to the start
    html = Later(lambda: __import__("html"))
    inspect = Later(lambda: __import__("inspect"))
    logging = Later(lambda: __import__("logging"))
    sqlite3 = Later(lambda: __import__("sqlite3"))
log: Any = Later(lambda: logging.getLogger("hitl"))
__version__ = "2.0.0"
__all__ = [
    "Gate", "Held", "HitlError", "ConfigError", "CollaborationError", "DeniedError",
    "UnreachableError", "ChangedError", "AlreadyClaimedError", "ReviewTimeoutError"]
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# ================================= Errors ==================================
# The ways it can go wrong. Every error carries a message, a `reason` (one
# stable word, the same in the JSON, the page and the exception) and, if
# something can be done about it, a `hint`. The base is a RuntimeError:
# LangGraph's default retry repeats a plain Exception, so a person would be
# asked the same thing again.


class HitlError(RuntimeError):
    """Anything that stops a call; `str()` gives the message and the hint."""

    reason = "error"

    def __init__(self, message: str, hint: str = "", *,
                 reason: str = "", request_id: str = "") -> None:
        super().__init__(message)
        self.message, self.hint, self.request_id = message, hint, request_id
        self.reason = reason or self.reason

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    @property
    def told(self) -> str:
        """What a model is told: never the hint, which is for people."""
        return (f"{self.message}. The call did not run. Do not retry it or "
                "rephrase it; tell the user, or do something else.")


class ConfigError(HitlError):
    """checkpoints.toml, a flag or the environment is wrong; says where."""

    reason = "bad-configuration"


class CollaborationError(HitlError):
    """A person said no; each subclass is something else that stops a call."""

    reason = "rejected"


class DeniedError(CollaborationError):
    """A checkpoint with `effect = "deny"` matched: nobody was asked."""

    reason = "denied"


class UnreachableError(CollaborationError):
    """The server could not be reached, or its reply made no sense."""

    reason = "server-unreachable"


class ChangedError(CollaborationError):
    """An id, a digest or a reply does not belong to the call."""

    reason = "arguments-changed"


class AlreadyClaimedError(CollaborationError):
    """The approval was already used: one approval runs one call."""

    reason = "already-claimed"


class ReviewTimeoutError(HitlError, TimeoutError):
    """Nobody decided in time; nothing ran. A TimeoutError too."""

    reason = "expired"


# These are answers to a call; any other HitlError means something is wrong.
ANSWERS = (CollaborationError, DeniedError, ReviewTimeoutError)
# The words with which the server refuses, each with its HTTP status.
REFUSALS = {word: status for status, words in {
    400: "bad-request bad-json missing-field bad-field bad-digest bad-decision",
    401: "not-signed-in wrong-credentials",
    403: "not-your-route not-your-request cross-site",
    404: "no-such-route unknown", 405: "wrong-method",
    409: "already-decided expired withdrawn lapsed id-taken not-approved stopped "
         "already-claimed arguments-changed not-claimed already-finished too-fast "
         "not-editable not-remembered",
    411: "length-required", 413: "too-large", 415: "wrong-type", 421: "wrong-host",
    429: "too-many-waiting", 431: "head-too-large", 500: "internal",
    503: "damaged storage-failed"}.items() for word in words.split()}
# The errors that a gate raises for some of these words.
REFUSED_AS: dict[str, type[HitlError]] = {
    "already-claimed": AlreadyClaimedError, "stopped": CollaborationError,
    "lapsed": ReviewTimeoutError, "expired": ReviewTimeoutError,
    "id-taken": ChangedError, "bad-digest": ChangedError,
    "arguments-changed": ChangedError}


class Refusal(HitlError):
    """A refusal by the server: `about` is the request as it is now, if there
    is one; `headers` are header lines for the answer."""

    def __init__(self, reason: str, message: str, hint: str = "", *,
                 about: ReviewRequest | None = None, headers: str = "") -> None:
        super().__init__(message, hint, reason=reason)
        self.about, self.headers = about, headers


# =============================== Vocabulary ================================
# The nouns and the few pure functions everything else is built from: what a
# request can become, and how JSON is read and written so that two different
# calls never look the same.

MAX_ARGUMENTS = 64 * 1024       # bytes: more is a document, not an action
MAX_EDITED = 256 * 1024         # the same for an edit, which holds a file
MAX_DESCRIPTION = 64 * 1024     # bytes: a sentence with arguments filled in
MAX_CONTEXT = 512 * 1024        # bytes: of a longer one a gate sends both ends
MAX_DEPTH = 32                  # levels of JSON: nobody reads deeper
MAX_PARTS = 100_000             # lists and objects: more would take too long
MAX_NAME = 256                  # bytes of a tool's or an agent's name
MAX_SESSION = 128               # bytes of a session's name
MAX_WHY = 4096                  # bytes of a reason or an explanation
MAX_YEARS = 100                 # until a deadline: to wait longer, leave it out
YEAR_SECONDS = 31_557_600       # of 365.25 days
TOO_DEEP = f"nested deeper than {MAX_DEPTH}"
TOO_MANY = f"more than {MAX_PARTS} lists and objects"


def regex(text: AnyStr, flags: int = 0) -> re.Pattern[AnyStr]:
    """re.compile(), put off to the first use: compiling them all at the start
    would take a fifth of what a hook's call may cost."""
    made: Any = Later(lambda: re.compile(text, flags))
    return made  # type: ignore[no-any-return]


# `standing:7` is what the audit log calls a standing decision
REQUEST_ID = regex(
    r"(?!\.{1,2}\Z|standing:)[A-Za-z0-9._:-]{1,128}")
ID_RULE = ("must be 1 to 128 of A-Z a-z 0-9 . _ : -, other than . and .., and not "
           "begin with standing:")

# A status other than `waiting` is final. Outcome is what became of the call.
#
#   status      means                        outcome    means
#   waiting     nobody has decided yet       (none)     not claimed so far
#     approved  a reviewer said yes   ---->    running  a gate claimed it
#     rejected  a reviewer said no               executed   it returned
#     expired   nobody decided in time           failed     it raised
#     withdrawn the agent gave up              lapsed   nobody claimed it
#
# Each move (an arrow or an indent) is one guarded UPDATE in the Store, and a
# trigger in the database refuses every other. A new status would be added
# here, in SCHEMA and database_fault, as a method of Store, in SAID_OF and
# REFUSALS, in the page's STYLE and endings, and in Held.wait and
# check_approved, which read it.
# The deadline (promise 4) is watched in four places: Loop.sweep and
# Store.expire (the server's clock), Held.wait and give_up (the gate's own).


class Status(enum.StrEnum):
    WAITING = "waiting"
    APPROVED = "approved"
    REJECTED = "rejected"
    EXPIRED = "expired"
    WITHDRAWN = "withdrawn"


class Outcome(enum.StrEnum):
    RUNNING = "running"
    EXECUTED = "executed"
    FAILED = "failed"
    LAPSED = "lapsed"


class ReviewRequest(NamedTuple):
    """A row of pending_reviews: what was asked, decided and done. Instants are
    ISO 8601 UTC text, `arguments` and `agent_context` JSON. SCHEMA explains
    each column; a reply is made of the first ten, SUMMARY."""

    request_id: str
    status: str
    outcome: str | None
    digest: str
    deadline: str | None
    decided_by: str | None = None
    decided_at: str | None = None
    reason: str | None = None
    said_at: str | None = None          # when the standing decision was made
    approved_digest: str | None = None  # if the reviewer changed the call
    asked_by: str = ""
    signed_in: str | None = None
    lapses_at: str | None = None
    standing: int | None = None
    claim: str | None = None
    handed_over: int | None = None
    outcome_at: str | None = None
    outcome_text: str | None = None
    approved_arguments: str | None = None
    id: int = 0
    asked_sha256: str = ""
    received_at: str = ""       # from here on: what was asked, never changed
    timestamp: str = ""
    agent: str | None = None
    tool: str | None = None
    checkpoint_id: str | None = None
    checkpoint_digest: str | None = None
    session: str | None = None
    category: str | None = None
    why: str | None = None
    config_digest: str | None = None
    edits: int | None = None
    size: int = 0               # bytes of what the agent sent
    action_description: str = ""
    arguments: str | None = None
    agent_context: str = "null"

    @property
    def subject(self) -> str:
        """What the audit log calls it."""
        return self.request_id

    @property
    def runs(self) -> str | None:
        """The arguments that the call runs with, once approved."""
        return self.approved_arguments or self.arguments

    @property
    def intact(self) -> bool:
        """Whether the stored call still matches its stored digests."""
        try:
            return self.digest == self.digest_with(self.arguments) and (
                self.approved_digest is None or self.approved_digest ==
                self.digest_with(self.approved_arguments))
        except ValueError:
            return False

    def digest_with(self, arguments: str | None) -> str:
        """The digest of this call with these arguments, in whatever order."""
        if arguments is not None:
            arguments = canonical(json.loads(arguments))
        return digest_of(self.action_description, arguments, self.tool)


SUMMARY = ReviewRequest._fields[:10]    # the fields of a reply, besides its url


class Standing(NamedTuple):
    """A row of standing_decisions: a decision that answers the same call
    again or, if `stopped`, every call. SCHEMA explains each column."""

    number: int
    decision: str
    made_by: str
    made_at: str
    until: str | None = None
    uses: int | None = None
    request_id: str | None = None
    reason: str | None = None
    signed_in: str | None = None
    digest: str | None = None
    checkpoint_id: str | None = None
    checkpoint_digest: str | None = None
    desk_digest: str | None = None
    session: str | None = None
    principal: str | None = None
    lifted_at: str | None = None
    lifted_by: str | None = None

    @property
    def subject(self) -> str:
        """What the audit log calls it."""
        return f"standing:{self.number}"


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's members; ValueError if a name comes twice."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name appears twice in one JSON object")
    return members


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


STRICT = json.JSONDecoder(object_pairs_hook=unique_pairs, parse_float=finite,
                          parse_constant=finite)
# canonical JSON: sorted keys, no spaces, ASCII, no NaN or infinity
canonical = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), allow_nan=False).encode
as_sent = json.JSONEncoder(      # the same, in the order in which it was sent
    separators=(",", ":"), allow_nan=False).encode
json_text = json.encoder.encode_basestring_ascii    # one text, as JSON
READABLE = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def parse_json(data: bytes | str) -> Any:
    """The value of strict JSON; ValueError says what is wrong with it.

    Python's json keeps the last of two equal names, accepts NaN, 1e400 and
    lone surrogates, and recurses; each could make two readers of one request
    see two different things.
    """
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    parts = text.count("[") + text.count("{")
    if parts > MAX_PARTS:
        raise ValueError(TOO_MANY)
    try:
        value = STRICT.decode(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if parts > MAX_DEPTH:
        for _ in objects_in(value):     # raises if it is nested too deeply
            pass
    if "\\ud" in text.lower() or not text.isascii():
        try:
            READABLE.encode(value).encode()
        except UnicodeEncodeError:
            raise ValueError("a lone surrogate is not text") from None
    return value


def both_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. If a name comes twice, it has the first value and, under
    one that counts as equal, the last: readers differ in which they take."""
    members: dict[str, Any] = {}
    for name, value in pairs:
        members[name + "\0" if name in members else name] = value
    return members


LENIENT = json.JSONDecoder(object_pairs_hook=both_members, strict=False)


def read_json(text: str) -> Any:
    """What a text says if some reader could take it for JSON, or for JSON
    inside JSON; other text as it is; ValueError if it is nested too deeply."""
    value: Any = text
    try:
        while isinstance(value, str):
            value = LENIENT.decode(value)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except ValueError:
        pass                            # plain text
    return value


PLAIN_TYPES = frozenset((str, int, float, bool, type(None)))
JSON_STARTS = ("{", "[", '"', " ", "\t", "\r", "\n")


def objects_in(value: Any, quoted: bool = False, depth: int = 0,
               left: Iterator[int] | None = None) -> Iterator[Mapping[str, Any]]:
    """Every object in a JSON value: inside objects and lists and, if `quoted`,
    inside texts that are JSON. ValueError if they are nested too deeply, or
    if there are too many to look through: `left` counts them down."""
    left = left or iter(range(MAX_PARTS))
    if depth == MAX_DEPTH:
        raise ValueError(TOO_DEEP)
    if next(left, None) is None:
        raise ValueError(TOO_MANY)
    if quoted and isinstance(value, str):
        value = read_json(value)
    if isinstance(value, (dict, Mapping)):
        yield value
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return
    for part in value:
        is_json = quoted and type(part) is str and part.startswith(JSON_STARTS)
        if is_json or type(part) not in PLAIN_TYPES:
            yield from objects_in(part, quoted, depth + 1, left)


def digest_of(description: str, arguments: str | None,
              tool: str | None) -> str:
    """SHA-256 over canonical `{"action_description","arguments","tool"}`.

    `arguments` must be canonical JSON, or None: a digest over
    `str(object)` would let two different calls look the same.
    """
    text = (f'{{"action_description":{json_text(description)},'
            f'"arguments":{"null" if arguments is None else arguments},'
            f'"tool":{"null" if tool is None else json_text(tool)}}}')
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def instant(seconds: float) -> str:
    """Unix seconds as ISO 8601 UTC with milliseconds, a text that sorts by
    time."""
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return moment.isoformat(timespec="milliseconds")[:-6] + "Z"


def unix_time(text: str) -> float:
    """An instant as Unix seconds."""
    return datetime.fromisoformat(text).timestamp()


def parse_timestamp(value: Any) -> str:
    """ISO 8601 (no offset means UTC) or Unix seconds, as instant() writes
    it."""
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value)
            if moment.tzinfo is None:
                moment = moment.replace(tzinfo=timezone.utc)
            value = moment.timestamp()
        if type(value) in (int, float):
            return instant(value)
    except (ValueError, OverflowError, OSError):
        pass
    raise ValueError('"timestamp" must be ISO 8601 or Unix seconds')


# ================================== Text ===================================
# How text is shown so that it cannot mislead (CVE-2024-27936 in Deno's prompt;
# "Trojan Source", Boucher and Anderson 2021), and how durations, sizes and calls
# are put into words. One rule decides for every character:
# - ASCII and accented Latin letters are themselves;
# - letters, digits and symbols of other scripts, with their marks, are put in
#   brackets, a word at a time;
# - everything else is a code in brackets, like U+202E: what is not drawn, what
#   only looks like another character (NFKC maps it to that), punctuation of
#   other scripts, padding, and the brackets themselves.
# So no two texts are shown alike. There is no list of look-alikes here: such a
# list is never complete.

BRACKETS = "\u27e6\u27e7"
NOT_PLAIN = regex("[^ -~]+| {9,}")
IN_LINES = regex("[^ -~\n]+|\n{9,}| {9,}")
SHAPELESS = regex(         # printable to Python, but not drawn
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f"
    "\uffa0\U00016fe4\U0001bc9d\U0001bc9e\U0001d159\U000e0100-\U000e01ef]")
PARTS = regex(                  # of a run, each character given by its kind
    r"(?P<breaks>\n{9,})|(?P<spaces> {9,})|(?P<plain>a+)|(?P<word>(?:bm{0,4})+)"
    r"|[cm]+|\n")


@functools.lru_cache(maxsize=4096)
def kind_of(c: str) -> str:
    """A character's kind: `a` shows as it is, `b` in brackets, `c` as a code;
    `m` is a mark that may follow `b`; a space or line break is its own."""
    category = unicodedata.category(c)
    if c in " \n":
        return c
    if SHAPELESS.match(c) or unicodedata.normalize("NFKC", c) != c:
        return "c"
    if "\xc0" <= c <= "\u017e" and category[0] == "L" and c not in "\u0131\u0138":
        return "a"
    apart = unicodedata.normalize("NFD", c)
    if " " < c <= "~" or len(apart) > 1 and apart[0].isascii() and apart[0].isalpha():
        return "a"
    wide = unicodedata.east_asian_width(c) == "W"
    if category in ("Lu", "Ll", "Lt", "Lo", "Nd", "Nl", "No", "Sc", "So") or (
            wide and category in ("Lm", "Po", "Ps", "Pe")):
        return "b"
    upon = category in ("Mn", "Mc") and unicodedata.combining(c) != 1
    return "m" if upon else "c"         # combining class 1 strikes a letter out


def shown(text: str) -> str:
    """A run of characters that are not plain, as visible() shows it."""
    result = ""
    for part in PARTS.finditer("".join(map(kind_of, text))):
        own = text[part.start():part.end()]
        if part["plain"]:
            result += own
        elif part["word"]:
            result += f"\u27e6{own}\u27e7"
        elif part["breaks"]:
            result += f"\u27e6line break x{len(own)}\u27e7"
        elif part["spaces"]:
            result += f"\u27e6space x{len(own)}\u27e7"
        else:
            result += "".join(f"\u27e6U+{ord(c):04X}\u27e7" for c in own)
    return result


shown_word = functools.lru_cache(maxsize=256)(shown)     # words recur


def visible(text: str, unclear: re.Pattern[str] = NOT_PLAIN) -> str:
    """The text in a form that can be trusted: printable, on one line, and
    different for every different text."""
    def show(run: re.Match[str]) -> str:
        return shown_word(run[0]) if len(run[0]) <= 40 else shown(run[0])
    return unclear.sub(show, text)


def visible_lines(text: str) -> str:
    """visible(), but with real line breaks, up to eight in a row."""
    return visible(text, IN_LINES)


def editable_text(text: str) -> bool:
    """Whether every character of a text can be seen, so that a person who
    edits it changes nothing unseen."""
    return "c" not in map(kind_of, text)


def readable_seconds(seconds: float) -> str:
    """A duration as people say it: `12 s`, `4 min`, `3 h`, `2 days`."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def readable_size(size: int) -> str:
    """A size as people say it: `512 bytes`, `1.2 KB`, `64 KB`."""
    if size < 1000:
        return f"{size} bytes"
    return f"{size / 1000:.1f} KB" if size < 9950 else f"{size / 1000:.0f} KB"


def call_in_words(tool: str, arguments: Mapping[str, Any]) -> str:
    """A call on one line, its short values first: `send_email to a@b.org,
    subject "Refund", body (1.2 KB)`; a command as a shell would quote it. The
    line may leave things out."""
    argv = arguments.get("argv")
    if isinstance(argv, list) and all(isinstance(word, str) for word in argv):
        import shlex
        return f"{tool} {shlex.join(argv)}"
    words = [(name, value_in_words(value)) for name, value in arguments.items()]
    words.sort(key=lambda pair: pair[1].startswith("("))
    return f"{tool} {', '.join(map(' '.join, words))}".strip()


def person(principal: str | None) -> str:
    """The name in `reviewer:ana` or `agent:billing`."""
    return (principal or "").partition(":")[2]


def changes_in_words(who: str, asked: str | None, approved: str | None) -> str:
    """What a reviewer changed: `changed by ana: {table: "users" -> "pets"}`;
    "" if there are no arguments, or nothing was changed."""
    if asked is None or approved is None:
        return ""
    changes = changed_parts(json.loads(asked), json.loads(approved))
    return f"changed by {who}: {{{', '.join(changes)}}}"


def changed_parts(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Each part that differs, by its path: `to.0`."""
    keys: Iterable[Any] = ()
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        keys = new
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        keys = range(len(new))
    elif canonical(old) != canonical(new):
        yield f"{name}: {value_in_words(old)} -> {value_in_words(new)}"
    for key in keys:
        path = f"{name}.{key}" if name else str(key)
        yield from changed_parts(old[key], new[key], path)


def value_in_words(value: Any) -> str:
    """A short value, an address, path or number without quotes; of a long one,
    or one with several lines or parts, its size: `(1.2 KB)`."""
    is_text = isinstance(value, str)
    text = value if is_text else READABLE.encode(value)
    if len(text) > 80 or "\n" in text or (value and isinstance(value, (dict, list))):
        return f"({readable_size(len(text.encode('utf-8', 'replace')))})"
    bare = re.fullmatch(r"[\w/.:@+=-]*[/.:@][\w/.:@+=-]*", text, re.ASCII)
    return f'"{text}"' if is_text and not bare else text


def one_line(text: str, limit: int = 120) -> str:
    """The visible text on one line of at most `limit` characters, with an arrow
    for line breaks and cut with an ellipsis, which visible() never shows."""
    lines = [" ".join(part.split()) for part in text.splitlines()]
    line = " \u21b5 ".join(visible(part) for part in lines if part)
    if len(line) > limit:
        whole = re.sub("\u27e6[^\u27e7]*$", "", line[:limit - 1])
        line = whole.rstrip() + "\u2026"
    return line


def did_you_mean(word: Any, known: Any) -> str:
    """`; did you mean review?`, or "" if nothing known is close."""
    import difflib
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


# ================================ Matching =================================
# Does a checkpoint match this call? A call in, a Match out. Nothing is changed
# here, and only links are read from disk, to see where an edit really lands.
# Every further way of looking at a call can only hold more; what opens a door
# (effect = "allow") needs the call exactly as written, with nothing in doubt.
# The decision itself is at the end: Checkpoint.matches and Rules.first_match.

CATEGORIES = ("high-impact", "data-risk", "destructive")
EFFECTS = ("allow", "review", "deny")    # the strictest last
SEARCH = re.IGNORECASE | re.DOTALL      # flags of a pattern that holds or denies
MAX_TOOL_NAME = 200             # characters: a longer name always waits
MAX_MATCHED = 64 * 1024         # characters that any pattern looks at
MAX_STEPS = 10_000_000          # of `re` for one pattern: a third of a second
ENDLESS = MAX_STEPS ** 2        # the ways of a pattern that is refused
MAX_PATH = 4096                 # characters of a path that is looked up
MAX_FILES = 1000                # in one edit; an edit of more is in doubt
MAX_INNER = 100                 # calls inside one call; with more it waits


# ---- names: of the tool, of arguments ----

def printed(text: str) -> str:
    """The NFKC form of a text, without characters that are not drawn."""
    return "".join(c for c in unicodedata.normalize("NFKC", text)
                   if c.isprintable() and not SHAPELESS.match(c))


def views(text: str) -> Iterator[str]:
    """The forms of a name that a pattern looks at, the raw one first. Each
    defeats a disguise: width and style of letters, zero-width characters,
    another case, a prefix that hides the name from `^` or `\\b`."""
    yield text
    clean = "".join(c for c in printed(text) if unicodedata.category(c)[0] != "M")
    last = next(filter(None, reversed(re.split(r"__|[./:]", clean))), clean)
    plain = unicodedata.normalize("NFKC", text)
    for view in dict.fromkeys((
            plain, clean, clean.casefold(), last, last.casefold())):
        if view != text:
            yield view


def odd_name(tool: str) -> str:
    """Why a tool with this name always waits, or ""."""
    if len(tool) > MAX_TOOL_NAME:
        return f"the name has more than {MAX_TOOL_NAME} characters"
    if tool and tool.isascii() and tool.isprintable():
        return ""
    return (f'the name "{visible(tool)}" is empty, or has characters that are '
            "not plain ASCII")


def folded(name: str) -> str:
    """A form in which names are equal if a reader of JSON may take them for
    one (CVE-2026-27896: Go's JSON takes the last of `name` and `Name`)."""
    if name.isascii() and name.isprintable():
        return name.lower()
    return unicodedata.normalize("NFKC", printed(printed(name).casefold()))


def bare_name(name: str) -> str:
    """An argument's name, the same for toolName, tool_name and tool-name."""
    return re.sub(r"[\W_]+", "", folded(str(name)))


# ---- how long a pattern may take ----
# `re` blocks every thread and heeds only signals, so what a pattern sees is
# bounded: about 4,400 characters for one open repeat (`.*`), 390 for two.
# The parser of `re` is private to Python but unchanged since 3.11; it returns
# a list of (operation, argument).

@functools.cache
def reach(pattern: str) -> int:
    """How many characters a pattern may look at and be done in MAX_STEPS: from
    every start it tries every end of every open repeat."""
    loops, ways = cost(_parser.parse(pattern, SEARCH), False)
    if loops > 2:
        return 0
    steps = MAX_STEPS * math.factorial(loops + 1) // ways
    return min(MAX_MATCHED, int(steps ** (1 / (loops + 1))))


def cost(tree: Any, repeated: bool) -> tuple[int, int]:
    """How many open repeats of a parsed pattern can meet, and the product of
    its bounded choices, ENDLESS if it repeats a repeat. A repeat of single
    characters ends at a letter that it does not match, and so meets no repeat
    after that."""
    most = loops = 0            # open repeats: the most, and those not ended
    ways, last = 1, None        # last: matches a character of the newest repeat
    for kind, value in tree:
        low, high = 1, 1
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT):
            low, high, value = value
        inside, choices = 0, 1          # the worst of its parts
        for part in parts_of(value):
            part_loops, part_ways = cost(part, repeated or high > 1)
            inside, choices = max(inside, part_loops), max(choices, part_ways)
        if kind is op.BRANCH and repeated and not are_apart(value[1]):
            return 0, ENDLESS
        if high > 64 and (inside or choices > 1):
            return 0, ENDLESS
        if kind is op.LITERAL and last and not last.match(chr(value)):
            most, loops, last = max(most, loops), loops - 1, None
        loops += inside * high + (kind is op.GROUPREF)
        if inside:
            last = None
        if high < op.MAXREPEAT:
            ways = min(ways * (high - low + 1) * choices ** high, ENDLESS)
        else:
            loops, last = loops + 1, None
            if value.getwidth() == (1, 1):      # [a-z]+/[a-z]+ ends at the /
                last = _compiler.compile(value, re.IGNORECASE)
    return max(most, loops), ways


def parts_of(value: Any) -> Iterator[Any]:
    """The patterns inside an item of a parsed pattern."""
    if isinstance(value, _parser.SubPattern):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from parts_of(part)


def are_apart(branches: list[Any]) -> bool:
    """Whether alternatives can be told apart by their first letter."""
    firsts = {chr(branch[0][1]).casefold() for branch in branches
              if len(branch) and branch[0][0] is op.LITERAL}
    return len(firsts) == len(branches)


# ---- what is in a call's arguments ----

MISSING = object()


def argument(arguments: Mapping[str, Any], name: str) -> Any:
    """The argument with this name or, for a dotted name, the value inside one.
    MISSING if neither exists, or if they differ: one would hide the other."""
    value: Any = arguments
    for part in name.split("."):
        value = value.get(part, MISSING) if isinstance(value, Mapping) else MISSING
    plain = arguments.get(name, value)
    return plain if value is MISSING or plain == value else MISSING


def values_of(arguments: Any, names: Container[str]) -> Iterator[Any]:
    """The values of the arguments with these names, at any depth."""
    for members in objects_in(arguments):
        for name, value in members.items():
            if bare_name(name) in names:
                yield value


def texts_of(arguments: Any, names: Container[str]) -> Iterator[str]:
    """The texts among these values, each item of a list by itself."""
    for value in values_of(arguments, names):
        items = value if isinstance(value, (list, tuple)) else [value]
        yield from (item for item in items if isinstance(item, str))


def command_of(value: Any) -> str | None:
    """A command as one text: a list of words (an argv or several commands)
    is joined, even if it comes as JSON; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = read_json(value)
    if isinstance(value, (list, tuple)) and all(
            isinstance(item, str) for item in value):
        return " ".join(value)
    return value if isinstance(value, str) else None


# Where a dispatcher names the tool that it calls: alone, or beside arguments.
INNER_ALONE = frozenset(("toolname", "toolslug", "recipientname"))
INNER_TOOLS = INNER_ALONE | set(
    "name tool toolid function functionname action method".split())
INNER_ARGUMENTS = frozenset(
    "arguments parameters input args params kwargs toolinput toolargs "
    "toolarguments toolparameters actioninput functionarguments".split())


def has_plain_values(arguments: Mapping[str, Any]) -> bool:
    """Whether no value can hold another call: all are numbers, or texts that
    are not JSON."""
    for value in arguments.values():        # all() would take three times as long
        if type(value) not in PLAIN_TYPES:
            return False
        if type(value) is str and (
                "{" in value or "[" in value or '"' in value):
            return False
    return True


# ---- shell commands and file edits ----
# Agents have many names for them, so the shape of a call shows its kind: an
# argument that holds the text, and a word for it somewhere in the tool's name.
# If in doubt, the call is of that kind.

WORDS = {
    "shell": regex(
        "bash|shell|pwsh|zsh|ksh|fish|terminal|console|command|cmd|exec|process|"
        "stdin|script|ssh|tty|run|eval|invoke|spawn|launch|system|monitor|sandbox|"
        "container|remote|tmux|python|xonsh|interpreter|popen|xterm|iterm|busybox|"
        "check.?output|send.?text|docker|podman|kubectl|gradle|"
        "(?<![a-z])(?:sh|start|job|task|batch|cli|repl|host|wsl|sudo|keys|perl|ruby|"
        "node|deno|dash|ash|csh|tcsh|nu|make|just|npm|pnpm|yarn|cargo|adb|computer)"
        "(?![a-z])", re.IGNORECASE),
    "edit": regex(
        "write|edit|patch|replace|create|update|insert|append|delete|remove|"
        "rename|modify|notebook|refactor|restore|revert|truncate|upload|download|"
        "upsert|mkfile|codemod|transform|extract|unzip|untar|trash|checkout|generate|"
        "produce|populate|scaffold|prepend|erase|wipe|destroy|overwrit|amend|splice|"
        "inject|rollback|reapply|persist|convert|translate|archive|compress|mirror|"
        "clone|transfer|hardlink|propose|"
        "(?<![a-z])(?:save|move|copy|put|apply|add|set|mv|cp|rm|touch|link|"
        "unlink|diff|change|make|new|fix|format|store|dump|undo|symlink|mkdir|chmod|"
        "ln|sed|emit|export|output|import|push|commit|clear|empty|drop|fill|place|"
        "merge|alter|swap|concat|sync)(?![a-z])",
        re.IGNORECASE)}
COMMANDS = frozenset(
    "command commands cmd cmds script argv commandline cmdline shellcommand "
    "bashcommand commandtext fullcommand code program input stdin chars keys "
    "keystrokes text shell bash exec run line lines commandstring cmdstring "
    "shellscript executable args expression snippet rawcommand commandtorun "
    "commandlist cmdargs cmdlist scripttext scriptcontent scriptcode codestring sh "
    "powershell".split())
PATHS = frozenset(
    "path paths filepath filepaths file files filename targetfile targetpath "
    "notebookpath absolutepath uri relativepath relativeworkspacepath source "
    "sourcepath target destination destinationpath dest oldpath newpath src dst "
    "pathinproject filepathinproject abspath relpath relativefilepath localpath "
    "remotepath fullpath inputpath inputfile outputpath outputfile outpath outfile "
    "fileuri fileurl newfile saveas saveto filetoedit pathtofile directory "
    "directorypath dir dirpath folder folderpath".split())
PATCHES = frozenset("patch patchtext diff input command changes edits".split())
# where a word begins in runCommand
HUMP = regex("(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
PATCH_PATH = regex(
    r"^[ \t]*(?:\*\*\* (?:\w+ File|Move to): |--- |\+\+\+ |"
    r"(?:rename|copy) to )(?:[ab]/)?([^\t\r\n]+)", re.MULTILINE)
PATCH_CONTENT = regex(
    r"^[-+ ](?![ \t]*(?:\*\*\*|--|\+\+)).*$", re.MULTILINE)
# An allow list opens only for what every shell reads alike, token by token:
# quotes without escapes, and nothing that expands. (`"!!"` interactively,
# `'a\''` in fish, curly quotes in PowerShell, `&` in cmd: none is read as in
# POSIX.) Beside the command only these are allowed, and the agent's folder.
BESIDE: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("description", "explanation"), str),
    **dict.fromkeys("timeout timeoutms timeoutseconds timeoutsec yieldtimems"
                    .split(), (int, float)),
    **dict.fromkeys("runinbackground background isbackground".split(), bool)}
FOLDERS = frozenset("cwd workdir workingdirectory workingdir directory dir "
                    "dirpath folder".split())
OWN_TOOL = regex("(?!(?i:mcp))[A-Za-z0-9]+(?:[_-][A-Za-z0-9]+)*")
PLAIN_WORD = regex("[A-Za-z0-9_./:=@%+,-]+")
TOKEN = regex(r"""
    (?P<redirection> (?: 2>&1 | 2?>/dev/null ) (?= [ ;|&\n] | \Z ) )
  | (?P<word> (?: [A-Za-z0-9_./:=@%+,-] | '[^'\\!\n]*' | "[^"$`\\!\n]*" )+ )
  | (?P<separator> && | \|\| | [|;\n] )
  | (?P<blank> [ ]+ )""", re.VERBOSE)


@functools.lru_cache(64)
def has_word(kind: str, tool: str) -> bool:
    """Whether a tool's name has a word for a kind: runCommand, run_command;
    in bAsH the capitals begin no words."""
    name = printed(tool)
    return any(WORDS[kind].search(way) for way in (name, HUMP.sub("_", name)))


def simple_commands(text: Any) -> list[str]:
    """The simple commands of a shell text, to the letter except for blanks and
    redirections; none unless it is plain from end to end. An argv is one
    command, and is never read as shell text."""
    if isinstance(text, list):
        plain = all(isinstance(word, str) and PLAIN_WORD.fullmatch(word)
                    for word in text)
        return [" ".join(text)] if plain and text else []
    if not isinstance(text, str) or re.search(r"[^\n -~]|--%", text):
        return []
    commands: list[list[str]] = [[]]
    at, last = 0, ""
    while at < len(text):
        token = TOKEN.match(text, at)
        if not token or {last, token.lastgroup} <= {"word", "redirection"}:
            return []                   # a word ends at a blank or separator
        at, last = token.end(), str(token.lastgroup)
        if last == "word":
            commands[-1].append(token[0])
        elif last == "separator":
            commands.append([])
    return [" ".join(words) for words in commands] if all(commands) else []


class Call:
    """A tool call as the rules look at it, each part worked out once."""

    def __init__(self, tool: str, arguments: Mapping[str, Any],
                 cwd: str | None = None) -> None:
        self.tool, self.arguments, self.cwd = tool, arguments, cwd
        self.found: dict[str, list[str | None]] = {}    # what texts() found

    @functools.cached_property
    def ambiguous(self) -> bool:
        """Whether an object in it has two names that count as one."""
        try:
            for members in objects_in(self.arguments):
                if len({folded(str(name)) for name in members}) < len(members):
                    return True
        except ValueError:              # too much to look through
            return True
        return False

    def inner(self) -> Iterator[Call]:
        """The calls that a dispatcher's arguments name (Cline's use_mcp_tool):
        a tool beside its arguments, or alone under a name that means nothing
        else; ValueError if there are too many to look at."""
        count = 0
        for members in objects_in(self.arguments, quoted=True):
            keyed = [(bare_name(name), value) for name, value in members.items()]
            given = [value for key, value in keyed if key in INNER_ARGUMENTS]
            known = INNER_TOOLS if given else INNER_ALONE
            tools = [value for key, value in keyed
                     if key in known and isinstance(value, str) and value]
            for tool, value in itertools.product(tools, given or [members]):
                if isinstance(value, str):
                    value = read_json(value)
                if not isinstance(value, Mapping):
                    value = {"input": value}
                yield Call(tool, value, self.cwd)
                count += 1
                if count > MAX_INNER:
                    raise ValueError(f"they hold more than {MAX_INNER} calls")

    # what a pattern for commands or edits looks at

    def texts(self, kind: str) -> list[str | None]:
        """What a call of this kind would do, as texts that a pattern looks at,
        None for one that cannot be read; empty for a call of another kind."""
        if kind not in self.found:
            find = {"shell": self.commands, "edit": self.edits}[kind]
            try:
                self.found[kind] = list(find())
            except ValueError:
                self.found[kind] = [None]
        return self.found[kind]

    def commands(self) -> Iterator[str | None]:
        """The commands in three views: as they are; without quotes,
        backslashes and line continuations; and also with $IFS as a blank."""
        if has_word("shell", self.tool):
            for text in map(command_of, values_of(self.arguments, COMMANDS)):
                bare = re.sub(r"\\\r?\n|[\\'\"`^]", "", text or "")
                blank = re.sub(r"\$\{?IFS[^}\s]{0,9}\}?", " ", bare)
                yield from dict.fromkeys((text, bare, blank))

    def edits(self) -> Iterator[str | None]:
        """What an edit, or a patch in a shell text, would touch: the patch
        without its content; each path as written and without disguise, and
        where both lead; ValueError if there are too many to look up."""
        paths: list[str] = []
        patches = [text for text in self.texts("shell")
                   if text and ("apply_patch" in text or PATCH_PATH.search(text))]
        if has_word("edit", self.tool):
            paths += texts_of(self.arguments, PATHS)
            patches += texts_of(self.arguments, PATCHES)
        for text in patches:
            named = PATCH_PATH.findall(text)
            yield PATCH_CONTENT.sub("", text) if named else text
            paths += map(str.strip, named)
        if len(paths) > MAX_FILES:
            raise ValueError(f"more than {MAX_FILES} files")
        for path in paths:
            plain = re.sub("%([0-9A-Fa-f]{2})", lambda c: chr(int(c[1], 16)),
                           printed(path))
            plain = re.sub("^file:(//(localhost)?)?", "", plain.replace("\\", "/"))
            for way in dict.fromkeys((path, plain)):
                yield from (way, self.resolved(way))

    def resolved(self, path: str) -> str | None:
        """Where a path leads from the call's working directory, links
        followed; None if that cannot be found out."""
        if len(path) > MAX_PATH:
            return None
        try:
            return os.path.realpath(os.path.join(
                self.cwd or os.getcwd(), os.path.expanduser(path)))
        except (OSError, ValueError):
            return None

    # what an allow rule for commands or edits has to open

    def plain(self, kind: str) -> list[str]:
        """Every simple command, or every path, of a call that does nothing
        else. Empty, so that no rule opens it, if anything is in doubt or the
        tool may not be the agent's own, and always on Windows."""
        texts = self.texts(kind)
        if not texts or None in texts:
            return []
        if os.name == "nt" or not OWN_TOOL.fullmatch(self.tool):
            return []
        return self.plain_commands() if kind == "shell" else self.plain_paths()

    def plain_commands(self) -> list[str]:
        """The simple commands, if no other argument changes what they do."""
        keyed = [(bare_name(name), value) for name, value in self.arguments.items()]
        beside = all(self.is_beside(key, value) for key, value in keyed
                     if key not in COMMANDS)
        given = [(key, value) for key, value in keyed if key in COMMANDS]
        if len(given) != 1 or not beside:
            return []
        key, value = given[0]
        texts = value if key == "commands" else [value]
        if not isinstance(texts, list):
            return []
        read = [simple_commands(text) for text in texts]
        return list(itertools.chain(*read)) if all(read) else []

    def is_beside(self, key: str, value: Any) -> bool:
        """Whether an argument beside the command cannot change its effect."""
        if key in BESIDE:
            return value is None or isinstance(value, BESIDE[key])
        if key in FOLDERS and isinstance(value, str):
            here = self.resolved(".")
            return here is not None and here == self.resolved(value)
        return False

    def plain_paths(self) -> list[str]:
        """The paths of an edit, if each leads where it says, without `..`."""
        base = self.resolved(".")
        patched = any(values_of(self.arguments, PATCHES))
        if base is None or patched or self.texts("shell"):
            return []
        paths = [*texts_of(self.arguments, PATHS)]
        for path in paths:
            if not (path.isascii() and path.isprintable()):
                return []
            plain = os.path.normpath(os.path.join(base, path))
            if ".." in path.split("/") or plain != self.resolved(path):
                return []
        return paths


def arguments_limit(tool: str | None, arguments: Mapping[str, Any]) -> int:
    """How many bytes of arguments a call may have: more for an edit, which
    holds a file's new text. Told from names alone: the desk asks this too, and
    looks up no path that an agent names."""
    with contextlib.suppress(ValueError):       # too much to look through
        if has_word("edit", tool or "") and any(
                texts_of(arguments, PATHS | PATCHES)):
            return MAX_EDITED
        if any("apply_patch" in text for text in texts_of(arguments, COMMANDS)):
            return MAX_EDITED
    return MAX_ARGUMENTS


# ---- the decision ----

class Checkpoint(NamedTuple):
    """One rule: which calls, what to tell the reviewer, what to do."""

    checkpoint_id: str
    action_pattern: str                 # "" in our own, which match every call
    description_template: str
    category: str = ""
    effect: str = "review"
    kind: str = "tool"
    arguments: Mapping[str, str] = {}
    timeout_seconds: float | None = None
    lifetime_seconds: float | None = None
    reviewers: tuple[str, ...] = ()     # who may decide; empty: any reviewer
    remember: bool = True               # a decision may stand for the same call
    editable: bool = False              # a reviewer may change the arguments
    digest: str = ""                    # of its table, by checkpoint_digest

    def finds(self, pattern: str, text: str) -> bool:
        """Whether a pattern of this checkpoint finds a text. `allow` opens a
        door, so it needs the whole text to the letter; the others only ever
        stop more: they look anywhere, in any case, and find overlong texts."""
        short = len(text) <= reach(pattern)
        if self.effect == "allow":
            return short and re.fullmatch(pattern, text) is not None
        return not short or re.search(pattern, text, SEARCH) is not None

    def view(self, pattern: str, text: str) -> str | None:
        """The first view of a text that a pattern finds, or None."""
        seen = (text,) if self.effect == "allow" else views(text)
        return next((view for view in seen if self.finds(pattern, view)), None)

    def fits(self, tool: str) -> str:
        """Why this checkpoint may match a tool with this name, or ""."""
        pattern = self.action_pattern
        if self.kind != "tool":
            # a shell command can hold an edit: Codex sends `apply_patch <<EOF`
            if has_word("shell", tool) or has_word(self.kind, tool):
                return f'kind = "{self.kind}" and action_pattern {pattern!r}'
            return ""
        view = self.view(pattern, tool)
        if view is None:
            return ""
        hit = re.search(pattern, view, SEARCH)
        found = visible(hit[0] if hit else view)
        return f'action_pattern {pattern!r} finds "{found}" in "{visible(view)}"'

    def matches(self, call: Call) -> bool:
        """Whether a call matches, given that its tool's name fits. If in doubt
        (two names that count as one, an argument that is missing or not
        text) review and deny match, and allow does not. How much of a command
        or an edit an allow rule opens is left to Rules.decision."""
        if not self.action_pattern:
            return True                 # one of our own
        opens = self.effect == "allow"
        texts = [] if self.kind == "tool" else call.texts(self.kind)
        if self.kind != "tool" and not texts:
            return False                # a call of another kind
        if call.ambiguous:
            return not opens
        for name, pattern in self.arguments.items():
            value = argument(call.arguments, name)
            if not isinstance(value, str):
                if opens:
                    return False
            elif self.view(pattern, value) is None:
                return False
        if self.kind == "tool" or opens:
            return True
        return any(text is None or self.finds(self.action_pattern, text)
                   for text in texts)


class Match(NamedTuple):
    """The checkpoint that decides about a call, and why."""

    checkpoint: Checkpoint
    why: str

    @property
    def effect(self) -> str:
        return self.checkpoint.effect


ODD_NAME = Checkpoint("odd-name", "", "")
NAMED_IN_CODE = "the code names it"     # why a checkpoint that a caller names decides


class Rules(NamedTuple):
    """The checkpoints of one file, in its order, and what they make of a call.
    `digest` is the SHA-256 of the file's bytes."""

    checkpoints: tuple[Checkpoint, ...]
    unmatched: str = "allow"
    path: Path | None = None
    digest: str = ""

    def first_match(self, tool: str, arguments: Mapping[str, Any],
                    cwd: str | None = None) -> Match:
        """The checkpoint that decides about this call. A dispatcher is looked
        through: the strictest effect, for the call or one inside it, counts.
        Paths are relative to `cwd`, by default the working directory."""
        call = Call(tool, arguments, cwd)
        found = [self.decision(call)]
        try:
            for inner in call.inner():
                checkpoint, why = self.decision(inner)
                why = f'the call "{visible(inner.tool)}" inside it: {why}'
                found.append(Match(checkpoint, why))
        except ValueError as error:
            found.append(Match(
                ODD_NAME, f"the arguments cannot be looked through: {error}"))
        return max(found, key=lambda match: EFFECTS.index(match.effect))

    def decision(self, call: Call) -> Match:
        """The first checkpoint that matches this call, whatever is inside it.
        The allow rules for commands make one list, those for edits another:
        the rule that opens the last text still shut decides."""
        shut: dict[str, list[str]] = {}     # kind -> texts that no rule has opened
        for match in self.candidates(call.tool):
            rule = match.checkpoint
            if not rule.matches(call):
                continue
            if rule.effect != "allow" or rule.kind == "tool":
                break
            texts = shut.get(rule.kind) or call.plain(rule.kind)
            shut[rule.kind] = [text for text in texts
                               if not rule.finds(rule.action_pattern, text)]
            if texts and not shut[rule.kind]:
                break
        return match                    # the last candidate matches every call

    def candidates(self, tool: str) -> Iterator[Match]:
        """The checkpoints that a tool's name fits, and then our own for a call
        that none of them matches."""
        odd = odd_name(tool)
        if len(tool) <= MAX_TOOL_NAME:          # no pattern sees a longer one
            for checkpoint in self.checkpoints:
                why = checkpoint.fits(tool)
                if why and not (odd and checkpoint.effect == "allow"):
                    yield Match(checkpoint, why)
        if odd:
            yield Match(ODD_NAME, odd)
        yield Match(Checkpoint("unmatched", "", "", effect=self.unmatched),
                    "no checkpoint matches")

    def all_holding(self, tool: str, arguments: Mapping[str, Any]
                    ) -> list[Checkpoint]:
        """Every checkpoint that holds or denies a call, or a call inside it;
        all checkpoints, if that cannot be found out."""
        call = Call(tool, arguments)
        try:
            calls = [call, *call.inner()]
        except ValueError:
            return list(self.checkpoints)
        return [checkpoint for call in calls for checkpoint in self.checkpoints
                if checkpoint.effect != "allow"
                and checkpoint.fits(call.tool) and checkpoint.matches(call)]

    def is_free(self, tool: str, names: Iterable[str] = ()) -> bool:
        """Whether every call of this tool with arguments of these names runs
        unasked, as long as has_plain_values() is true of their values."""
        decides = next(
            rule for rule, _ in self.candidates(tool) if rule.effect != "allow"
            or rule.kind == "tool" and not rule.arguments)   # opens for any call
        keys = [bare_name(name) for name in names]
        return (decides.effect == "allow" and len(set(keys)) == len(keys)
                and INNER_TOOLS.isdisjoint(keys))

    def named(self, checkpoint_id: str) -> Checkpoint:
        """The checkpoint with this id; ConfigError if there is none.
        "unmatched" is the one for a call that no other matches."""
        ids = {c.checkpoint_id: c for c in self.checkpoints}
        ids.setdefault("unmatched", Checkpoint("unmatched", "", ""))
        if checkpoint_id not in ids:
            raise ConfigError(
                f'no checkpoint "{checkpoint_id}" in {self.path}',
                f'known: {", ".join(ids)}{did_you_mean(checkpoint_id, ids)}')
        return ids[checkpoint_id]


# ---- what the reviewer is told ----

TEMPLATE_PART = regex(r"\{\{|\}\}|\{([A-Za-z_]\w*(?:\.\w+)*)\}")


def describe(checkpoint: Checkpoint, tool: str,
             arguments: Mapping[str, Any]) -> str:
    """The description_template filled in. It takes names only: no attributes,
    indexes or formats. A missing argument shows as "(not given)"; if all are
    missing, the call itself is shown. {command} is a shell command's text,
    {file_path} the files of an edit, whatever the arguments are called."""
    known, template = {**arguments}, checkpoint.description_template
    by_kind = {"shell": ("command", map(command_of, values_of(arguments, COMMANDS))),
            "edit": ("file_path", texts_of(arguments, PATHS))}
    if checkpoint.kind in by_kind:
        name, texts = by_kind[checkpoint.kind]
        with contextlib.suppress(ValueError):           # nested too deeply
            if text := "\n".join(filter(None, texts)):
                known[name] = text
    values = {name: argument(known, name)
              for name in TEMPLATE_PART.findall(template) if name}
    if "tool" in values:
        values["tool"] = tool
    all_missing = values and all(value is MISSING for value in values.values())
    if all_missing or not checkpoint.action_pattern:
        return call_in_words(tool, arguments)

    def fill_in(part: re.Match[str]) -> str:
        if not part[1]:
            return part[0][0]                   # {{ or }}
        value = values[part[1]]
        if value is MISSING:
            return "(not given)"
        return value if isinstance(value, str) else canonical(value)
    return TEMPLATE_PART.sub(fill_in, template).strip() or tool


# ============================== Configuration ==============================
# checkpoints.toml is read once, checked to the last key, and never half
# understood: whatever is wrong is a ConfigError that names file, place and
# cure, because a rule that is silently missing is a door left open.
#
# KEYS says what each TOML table may hold: key -> (check, default). A check
# takes the value and returns it, or raises ValueError with the cure.

Check = Callable[[Any], Any]


class Configuration(NamedTuple):
    """checkpoints.toml, checked."""

    rules: Rules
    gate: Mapping[str, Any]
    server: Mapping[str, Any]
    reviewers: Mapping[str, str]            # name -> SHA-256 of the token
    agents: Mapping[str, str]               # the same
    notify: tuple[Mapping[str, Any], ...] = ()

    @property
    def path(self) -> Path | None:
        return self.rules.path


@contextlib.contextmanager
def config_error(what: str) -> Iterator[None]:
    """A ValueError inside becomes a ConfigError that says what it is about."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{what} {error}") from None


def check_that(words: str, test: Check, *types: type) -> Check:
    """A check of a value that has one of these types and passes the test."""
    def check(value: Any) -> Any:
        if type(value) not in types or not test(value):
            raise ValueError(f"must be {words}")
        return value
    return check


def list_of(words: str, test: Check) -> Check:
    """A check of a list of one or more texts that each pass the test."""
    def all_pass(items: list[Any]) -> bool:
        return bool(items) and all(type(item) is str and test(item) for item in items)
    return check_that(words, all_pass, list)


def one_of(*words: str) -> Check:
    def check(value: Any) -> Any:
        if value not in words:
            raise ValueError(f"must be one of {', '.join(words)}"
                             f"{did_you_mean(value, words)}")
        return value
    return check


text_value = check_that("a string in quotes, not empty", str.strip, str)
boolean_value = check_that("true or false", lambda v: True, bool)
seconds_value = check_that("a number of seconds above 0, or inf",
                           lambda v: 0 < v < 1e12 or v == math.inf, int, float)
name_value = check_that(
    "a printable name without a colon, 64 characters at most",
    lambda v: v.strip() and v.isprintable() and ":" not in v and len(v) <= 64, str)
OURS = ("unmatched", "odd-name")        # checkpoint_ids of our own, in no file
id_value = check_that(
    f"letters, digits and . _ : - only; {' and '.join(OURS)} are reserved",
    lambda v: REQUEST_ID.fullmatch(v) and v not in OURS, str)


def pattern_value(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be a regular expression in quotes")
    if not value.isprintable():
        raise ValueError(f"{value!r} has a control character (in TOML's "
                         '"double quotes" \\b is a backspace): write the '
                         "pattern in 'single quotes'")
    if value[0] in "*?":
        raise ValueError(f"{value!r} is a glob; as a regular expression "
                         f"write {json.dumps(regex_of_glob(value))}")
    import warnings
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if "(?<" in value:          # reach() overlooks a faulty lookbehind
                re.compile(value, SEARCH)
            endless = reach(value) < MAX_TOOL_NAME
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise ValueError(f"is not a regular expression: {error}; a bracket that "
                         "is meant as itself is written \\( or \\[") from None
    if endless:
        raise ValueError(
            f"{value!r} repeats a repeat, as (a+)+ does, or has too many repeats "
            "that can meet, as .*a.*b.* does: on some texts it would take minutes, "
            "and Python's re cannot be interrupted; use two open repeats at most, "
            "and none inside another")
    return value


def regex_of_glob(glob: str) -> str:
    """The regular expression that finds what a glob matches."""
    signs = {"*": ".*", "?": "."}
    found = "".join(signs.get(c) or re.escape(c) for c in glob.strip("*"))
    if not found:
        return "."
    return found if glob.endswith("*") else f"{found}$"


def patterns_value(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not value:
        raise ValueError('must be like { table = "users|orders" }')
    for name, pattern in value.items():
        try:
            pattern_value(pattern)
        except ValueError as error:
            raise ValueError(f"of {name}: {error}") from None
    return value


def template_value(value: Any) -> str:
    wrong = re.search(r"\{[^{}]*\}?|\}", TEMPLATE_PART.sub("", text_value(value)))
    if wrong:
        raise ValueError(
            f'"{wrong[0]}" is not the name of an argument: write {{tool}} or '
            "{argument} or {argument.inner}, and {{ for a brace")
    return str(value)


# ---- addresses ----

HOST = r"([\w.-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?"
IN_CLEAR = {"http": "https://", "plain": "starttls:// or tls://"}


def address(value: Any, schemes: str, like: str, rest: str = "/?") -> re.Match[str]:
    """An address as a match of its scheme, host and port."""
    found = re.fullmatch(f"({schemes})://{HOST}{rest}", text_value(value), re.ASCII)
    if not found or int(found[3] or 0) > 65535:
        raise ValueError(f"must be like {like}")
    return found


def url_value(value: Any) -> str:
    found = address(value, "https?", '"http://127.0.0.1:8765", without a path')
    return found[0].removesuffix("/")


def receiver(schemes: str, like: str, rest: str = "/?") -> Check:
    """A check of an address that notices go to, in clear text only on this
    machine. Its host is never a {placeholder}, or an agent could choose who is
    told. Only `serve` can check an address that has a ${NAME} in it."""
    def check(value: Any) -> Any:
        if "${" in text_value(value):
            return value
        found = address(value, schemes, like, rest)
        safe = IN_CLEAR.get(found[1])
        if safe and not is_loopback(found[2]):
            raise ValueError(f"would leave this machine in clear text: write {safe}")
        return value
    return check


def is_loopback(host: str) -> bool:
    import ipaddress
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


# ---- [[notify]]: its shape; only serve reads what ${NAME} holds ----

NOTICE_FIELDS = ("title", "text", "url", "request_id", "status", "tool",
                 "checkpoint", "category", "agent", "deadline", "waiting")
PLACEHOLDER = regex(r"\$\{([A-Za-z_]\w*)\}|\{([A-Za-z_]\w*)\}", re.ASCII)
MAIL_ADDRESS = r"[^\s@<>,;\"{}]+@[^\s@<>,;\"{}]+"
SIGNING_KEY = "whsec_(?=.)([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}(==|[A-Za-z0-9+/]=))?"
NEEDS = {                               # key -> keys that it is useless without
    "headers": ["url"], "body": ["url"], "sign": ["url"],
    "smtp": ["from", "to"], "from": ["smtp"], "to": ["smtp"],
    "login": ["smtp", "password"], "password": ["smtp", "login"]}
notice_url_value = receiver(
    "https?", '"https://ntfy.sh/": https, a plain host, a path', "(?:[/?#][!-~]*)?")
smtp_value = receiver(
    "starttls|tls|plain",
    '"starttls://mail.example.org:587" or "tls://mail.example.org:465"')
sign_value = check_that('"whsec_" and base64, as `openssl rand -base64 32` prints',
                        lambda v: re.fullmatch(SIGNING_KEY, v), str)


def body_value(value: Any) -> Any:
    """A table, or the same as JSON text: TOML wants an inline table on one
    line."""
    try:
        body = parse_json(value) if isinstance(value, str) else value
        if not isinstance(body, (dict, list)):
            raise ValueError("an object or a list is needed")
        canonical(body)
    except (TypeError, ValueError) as error:
        raise ValueError("is not JSON: write a table, or JSON in '''...''' "
                         f"({error})") from None
    return body


def command_value(value: Any) -> list[str]:
    """A program and its arguments. They are never passed through a shell; if
    they name one, no placeholder may be in the code that it is given."""
    words: list[str] = list_of('like ["notify-send", "--", "{title}"]', bool)(value)
    code = [words[0]]
    if re.search(r"(?i)(^|[/\\])(\w*sh|cmd)(\.exe)?$", words[0]):
        code += [word for flag, word in itertools.pairwise(words)
                 if re.match(r"(?i)-\w*c|/c", flag)]
    for word in code:
        if any(found[2] for found in PLACEHOLDER.finditer(word)):
            raise ValueError(f'would run what is filled into "{word}": pass it '
                             'as an argument of its own, as "$1" of the script')
    return words


def check_notify(entry: Mapping[str, Any]) -> None:
    """ValueError if the keys of a [[notify]] do not go together, or if a
    placeholder names nothing."""
    kinds = [kind for kind in ("url", "smtp", "command") if entry[kind]]
    if len(kinds) != 1:
        raise ValueError(f"has {' and '.join(kinds) or 'no target'}: it needs "
                         "exactly one of url, smtp, command")
    for key, others in NEEDS.items():
        for other in others:
            if entry[key] is not None and entry[other] is None:
                raise ValueError(f"{key}: needs {other} in the same entry")
    text = json.dumps(entry)
    if "${" in PLACEHOLDER.sub("", text):
        raise ValueError("${ is not closed: write ${NAME}, a variable of "
                         "serve's environment")
    for _, word in PLACEHOLDER.findall(text):
        if word == "details" and not entry["details"]:
            raise ValueError("{details} is what the agent wrote: to send it, "
                             "set details = true")
        if word and word not in (*NOTICE_FIELDS, "details"):
            raise ValueError(f"unknown placeholder {{{word}}}; known: "
                             f"{', '.join(NOTICE_FIELDS)}, details"
                             f"{did_you_mean(word, NOTICE_FIELDS)}")


REQUIRED = object()
KEYS: dict[str, dict[str, tuple[Check, Any]]] = {
    "gate": {
        "server_url": (url_value, "http://127.0.0.1:8765"),
        "timeout_seconds": (seconds_value, 30),
        "poll_seconds": (check_that(
            "a number of seconds, 60 at most: no server holds a poll longer",
            lambda v: 0 < v <= 60, int, float), 5),
        "lifetime_seconds": (seconds_value, None),
        "unmatched": (one_of("allow", "review"), "allow"),
        "tls_ca": (text_value, ""),
    },
    "server": {
        "host": (text_value, "127.0.0.1"),
        "port": (check_that("a port, 0 to 65535 (0: any free one)",
                            lambda v: 0 <= v <= 65535, int), 8765),
        "database": (text_value, "hitl.db"),
        "public_url": (lambda v: v if v == "" else url_value(v), ""),
        "tls_certificate": (text_value, ""),
        "tls_key": (text_value, ""),
    },
    "checkpoint": {
        "checkpoint_id": (id_value, REQUIRED),
        "action_pattern": (pattern_value, REQUIRED),
        "description_template": (template_value, REQUIRED),
        "category": (one_of(*CATEGORIES), ""),
        "effect": (one_of(*EFFECTS), "review"),
        "kind": (one_of("tool", *WORDS), "tool"),
        "arguments": (patterns_value, {}),
        "timeout_seconds": (seconds_value, None),
        "lifetime_seconds": (seconds_value, None),
        "reviewers": (list_of('like ["ana", "ben"]', name_value), ()),
        "remember": (boolean_value, True),
        "editable": (boolean_value, False),
    },
    **dict.fromkeys(("reviewer", "agent"), {
        "name": (name_value, REQUIRED),
        "token_sha256": (check_that(
            "a SHA-256 in hex: `python3 hitl.py token NAME` prints one",
            lambda v: re.fullmatch("[0-9a-f]{64}", v), str), REQUIRED),
    }),
    "notify": {
        "name": (name_value, REQUIRED),
        "url": (notice_url_value, None),
        "headers": (check_that(
            'like { Authorization = "Bearer ${TOKEN}" }',
            lambda v: all(re.fullmatch("[A-Za-z0-9_-]+", name) and type(text) is str
                          for name, text in v.items()), dict), None),
        "body": (body_value, None),
        "sign": (text_value, None),
        "smtp": (smtp_value, None),
        "login": (text_value, None),
        "password": (text_value, None),
        "from": (check_that("an address, like hitl@example.org",
                            lambda v: re.fullmatch(MAIL_ADDRESS, v), str), None),
        "to": (list_of('like ["oncall@example.org"]',
                       lambda v: re.fullmatch(MAIL_ADDRESS, v)), None),
        "command": (command_value, None),
        "after_seconds": (check_that("a number of seconds, 0 to 604800 (a week)",
                                     lambda v: 0 <= v <= 604800, int, float), 0),
        "category": (list_of(f"a list of {', '.join(CATEGORIES)}",
                             lambda v: v in CATEGORIES), ()),
        "checkpoint": (list_of("a list of checkpoint_ids",
                               REQUEST_ID.fullmatch), ()),
        "details": (boolean_value, False),
    },
}
MARKS = {name: f"[{name}]" if name in ("gate", "server") else f"[[{name}]]"
         for name in KEYS}


def find_configuration(path: str | os.PathLike[str] | None = None,
                       local: bool = True) -> Path:
    """The first of: the file given, HITL_CONFIG, ./checkpoints.toml (not for
    hook, mcp and run: an agent may write there), the one beside hitl.py."""
    chosen = path or os.environ.get("HITL_CONFIG")
    if chosen:
        return absolute(chosen)
    candidates = [beside_this_file()]
    if local:
        candidates.insert(0, absolute("checkpoints.toml"))
    for candidate in candidates:
        if os.path.lexists(candidate):
            return candidate
    folders = dict.fromkeys(str(candidate.parent) for candidate in candidates)
    raise ConfigError(f"no checkpoints.toml in {' or '.join(folders)}",
                      "`python3 hitl.py init` writes one, or set HITL_CONFIG")


def absolute(path: str | os.PathLike[str]) -> Path:
    """A path from the working directory; ConfigError where that is gone."""
    try:
        return Path(path).absolute()
    except OSError:
        raise ConfigError(
            "the working directory does not exist any more",
            "start from a folder that does, or set HITL_CONFIG to an absolute "
            "path") from None


def beside_this_file() -> Path:
    return absolute(__file__).with_name("checkpoints.toml")


def load_configuration(path: Path) -> Configuration:
    """checkpoints.toml, read once and checked; ConfigError says what is
    wrong, where, and how to mend it."""
    data, tables = read_toml(path)
    for name in sorted(tables.keys() - KEYS.keys()):
        raise unknown_key(str(path), name, MARKS.values())
    rows = {kind: rows_of(path, kind, tables) for kind in KEYS}
    (gate,), (server,) = rows["gate"], rows["server"]
    checkpoints = tuple(
        Checkpoint(**row, digest=checkpoint_digest(table)) for row, table in zip(
            rows["checkpoint"], tables.get("checkpoint", ()), strict=True))
    if not checkpoints:
        raise ConfigError(f"{path}: no [[checkpoint]] in it",
                          "`python3 hitl.py init` writes an example; to make "
                          'everything wait, set unmatched = "review" and '
                          "have one checkpoint")
    people = {row["name"]: row["token_sha256"] for row in rows["reviewer"]}
    agents = {row["name"]: row["token_sha256"] for row in rows["agent"]}
    for checkpoint in checkpoints:
        for name in checkpoint.reviewers:       # else nobody could decide it
            if name not in people:
                raise ConfigError(
                    f'{path}: checkpoint "{checkpoint.checkpoint_id}": '
                    f'reviewers: "{name}" is not a [[reviewer]]'
                    f"{did_you_mean(name, people)}",
                    f"`python3 hitl.py token {name}` prints the lines to add")
    digest = hashlib.sha256(data).hexdigest()
    return Configuration(Rules(checkpoints, gate["unmatched"], path, digest),
                         gate, server, people, agents, tuple(rows["notify"]))


def read_toml(path: Path) -> tuple[bytes, dict[str, Any]]:
    """A file's bytes and, as TOML, its tables."""
    import tomllib
    try:
        data = path.read_bytes()
        return data, tomllib.loads(data.decode("utf-8-sig"))
    except FileNotFoundError:
        beside = beside_this_file()     # an empty new one would gate nothing
        cure = "`python3 hitl.py init` writes one"
        if beside != path and os.path.lexists(beside):
            cure = f"there is one beside hitl.py: {beside}; name that one"
        raise ConfigError(f"{path}: no such file", cure) from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        cure = "mend that line; a text with a backslash goes into 'single quotes'"
        raise ConfigError(f"{path}: not valid TOML: {error}", cure) from None


def checkpoint_digest(table: dict[str, Any]) -> str:
    """SHA-256 of a checkpoint's table as canonical JSON: a decision stands
    only while the rule that it was made under is unchanged."""
    plain = {name: str(value) if value == math.inf else value
             for name, value in table.items()}
    return sha256_of(plain)


def unknown_key(where: str, key: str, known: Iterable[str]) -> ConfigError:
    """An error that says where else a key belongs, or what was meant."""
    homes = [MARKS[kind] for kind in ("gate", "server", "checkpoint")
             if key in KEYS[kind]]
    cure = f"known: {', '.join(known)}{did_you_mean(key, known)}"
    if homes:
        cure = f"put {key} under {homes[0]}"
    return ConfigError(f'{where}: unknown key "{key}"', cure)


def rows_of(path: Path, kind: str, tables: dict[str, Any]
            ) -> list[dict[str, Any]]:
    """The tables of a kind, each checked; no two have the same name."""
    mark = MARKS[kind]
    many = mark.startswith("[[")
    value = tables.get(kind, [] if many else {})
    rows = value if isinstance(value, list) else [value]
    if many != isinstance(value, list) or not all(
            isinstance(row, dict) for row in rows):
        raise ConfigError(f'{path}: "{kind}" is not a {mark} table',
                          f"did you mean {mark}?")
    rows = [checked(path, f"{kind} {n}" if many else mark, kind, row)
            for n, row in enumerate(rows, 1)]
    key = next(iter(KEYS[kind]))
    what = f"{kind} name" if key == "name" else key
    names = [row[key] for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f'{path}: {what} "{name}" appears twice',
                              "give each its own")
    return rows


def checked(path: Path, place: str, kind: str,
            table: dict[str, Any]) -> dict[str, Any]:
    """A table with its defaults filled in; ConfigError says what is wrong."""
    known = KEYS[kind]
    named = table.get("checkpoint_id") or table.get("name")
    where = f"{path}: {place}"
    if isinstance(named, str):
        where += f' "{named}"'
    for key in sorted(table.keys() - known.keys()):
        raise unknown_key(where, key, known)
    values = {}
    for key, (check, default) in known.items():
        if default is REQUIRED and key not in table:
            raise ConfigError(f'{where}: "{key}" is missing', f'add {key} = "..."')
        with config_error(f"{where}: {key}"):
            values[key] = check(table[key]) if key in table else default
    if kind == "notify":
        with config_error(f"{where}:"):
            check_notify(values)
    return values


# ================================== Store ==================================
# The SQL of requests, decisions and the audit log; the next room has what
# opens and verifies the file. One connection writes, in transactions that the
# server commits once a turn. The database restates the promises as
# constraints and triggers, so that a mistake in the code cannot break them.
# Every change of state is one `move` and one audit row, which holds the seal
# of the request as it then was and the hash of the row before. So the log
# proves itself, and each request is proved by its last row (promise 8).
# SQLite 3.26 (RHEL 8) is new enough.

APPLICATION_ID = 0x4849544C     # "HITL", in the database file's header
SCHEMA_VERSION = 2
MAX_WAITING_PER_AGENT = 1_000   # one name cannot fill its credential's share,
MAX_WAITING_PER_CREDENTIAL = 10_000     # nor one credential the desk;
MAX_WAITING = 20_000            # in all: what waits must stay quick to list
CLAIM_SECONDS = 60              # even a late approval can be claimed this long
BUSY_SECONDS = 0.1              # another writer costs a 503, not a standstill
SEARCH_SECONDS = 0.03           # for one search of the history: the loop waits
MAX_STANDING_SECONDS = 8 * 3600     # an approval stands for a working day ...
MAX_STANDING_USES = 50              # ... and for as many calls as one can recall
CLOSED_A_TURN = 200             # by the clock or by a stop: about 15 ms
MAX_POLLED = 2_000              # requests kept for polls: about 2 MB
LARGE_BYTES = 8 * 1024          # a larger request is not listed in full

# what was asked: asked_sha256 covers these columns, a seal covers the others
ASKED = sorted(["request_id", "digest", "deadline", "asked_by",
                *ReviewRequest._fields[ReviewRequest._fields.index("received_at"):]])
SEALED = sorted({*ReviewRequest._fields} - {*ASKED} | {"request_id"})
SEALED_STANDING = sorted(Standing._fields)


def columns_of(names: Iterable[str], row: str = "") -> str:
    """Columns as SQL lists them, of a `row` such as `OLD.`"""
    return ", ".join(row + name for name in names)


SCHEMA = f"""
CREATE TABLE pending_reviews (
  id                 INTEGER PRIMARY KEY,           -- order of arrival
  request_id         TEXT NOT NULL UNIQUE           -- no duplicates, ever
                     CHECK (length(request_id) BETWEEN 1 AND 128),
  -- the person's word, or how else the request stopped waiting
  status             TEXT NOT NULL DEFAULT 'waiting' CHECK (
                     status = 'waiting' OR status IN  -- an IN alone costs 2 us
                     ('approved', 'rejected', 'expired', 'withdrawn')),
  decided_at         TEXT,
  decided_by         TEXT,                          -- 'reviewer:ana'
  signed_in          TEXT,                          -- how that is known
  reason             TEXT,
  standing           INTEGER,                       -- the decision that stood
  said_at            TEXT,                          -- when it was made
  approved_arguments TEXT,                          -- if they were changed
  approved_digest    TEXT,                          -- of those
  -- the call's fate
  outcome            TEXT CHECK (outcome IS NULL OR outcome IN
                     ('running', 'executed', 'failed', 'lapsed')),
  lapses_at          TEXT,                          -- unless claimed by then
  claim              TEXT,                          -- a nonce: who runs it
  handed_over        INTEGER,                       -- 1: its end is not seen
  outcome_at         TEXT,
  outcome_text       TEXT,
  -- what was asked: never changes
  digest             TEXT NOT NULL CHECK (length(digest) = 64),
  asked_sha256       TEXT NOT NULL,                 -- of all below, for seals
  received_at        TEXT NOT NULL,                 -- this server's clock
  deadline           TEXT,
  timestamp          TEXT NOT NULL,                 -- the agent's claim
  asked_by           TEXT NOT NULL,                 -- 'agent:...'
  agent              TEXT,
  tool               TEXT,
  checkpoint_id      TEXT,
  checkpoint_digest  TEXT,                          -- of the gate's table
  session            TEXT,
  category           TEXT,
  why                TEXT,
  config_digest      TEXT,
  edits              INTEGER,                       -- 1: may be changed
  size               INTEGER NOT NULL,              -- bytes of what was sent
  action_description TEXT NOT NULL,
  arguments          TEXT,                          -- JSON, as it was sent
  agent_context      TEXT NOT NULL,                 -- JSON
  CHECK ((status = 'waiting') = (decided_at IS NULL)),
  -- promises 1 and 4: an approval or a rejection has a person
  CHECK ((status IN ('approved', 'rejected')) = (decided_by IS NOT NULL)),
  CHECK (decided_by IS NULL OR decided_by LIKE 'reviewer:_%'),   -- promise 5
  CHECK ((standing IS NULL) = (said_at IS NULL)),
  CHECK ((approved_digest IS NULL) = (approved_arguments IS NULL)),
  CHECK (approved_digest IS NULL OR coalesce(edits = 1 AND standing IS NULL
         AND status = 'approved' AND length(approved_digest) = 64
         AND approved_digest <> digest, 0)),
  CHECK (outcome IS NULL OR status = 'approved'),
  CHECK (coalesce(outcome <> 'lapsed', 0) = (claim IS NOT NULL)),
  CHECK (handed_over IS NULL OR (handed_over = 1 AND claim IS NOT NULL))
);
CREATE INDEX waiting  ON pending_reviews (deadline, id, request_id, asked_by,
  agent) WHERE status = 'waiting';
CREATE INDEX reviewed ON pending_reviews (decided_at, id)
  WHERE status <> 'waiting';
CREATE INDEX answered ON pending_reviews (digest, decided_at)
  WHERE decided_by IS NOT NULL;
CREATE INDEX open ON pending_reviews (digest)
  WHERE status IN ('waiting', 'approved') AND outcome IS NULL;
CREATE INDEX unclaimed ON pending_reviews (lapses_at)
  WHERE status = 'approved' AND outcome IS NULL;
CREATE INDEX used ON pending_reviews (standing) WHERE standing IS NOT NULL;

CREATE TRIGGER asked_as_waiting BEFORE INSERT ON pending_reviews
WHEN NEW.status <> 'waiting' OR NEW.outcome IS NOT NULL
BEGIN SELECT RAISE(ABORT, 'a request begins as waiting'); END;

-- INSERT OR REPLACE replaces nothing either
CREATE TRIGGER never_replaced BEFORE INSERT ON pending_reviews
WHEN EXISTS (SELECT 1 FROM pending_reviews
             WHERE request_id = NEW.request_id OR id = NEW.id)
BEGIN SELECT RAISE(IGNORE); END;

-- promise 2
CREATE TRIGGER asked_once BEFORE UPDATE OF asked_sha256, {columns_of(ASKED)}
ON pending_reviews
BEGIN SELECT RAISE(ABORT, 'what was asked cannot change'); END;
CREATE TRIGGER stays_in_order BEFORE UPDATE ON pending_reviews
WHEN NEW.id IS NOT OLD.id
BEGIN SELECT RAISE(ABORT, 'what was asked cannot change'); END;

CREATE TRIGGER decided_once BEFORE UPDATE OF status, decided_at, decided_by,
  signed_in, reason, standing, said_at, approved_arguments, approved_digest,
  lapses_at ON pending_reviews
WHEN OLD.status <> 'waiting' OR NEW.status = 'waiting'
BEGIN SELECT RAISE(ABORT, 'a decision is final'); END;

-- promise 3
CREATE TRIGGER claimed_once BEFORE UPDATE OF outcome, claim, handed_over,
  outcome_at, outcome_text ON pending_reviews
WHEN NOT coalesce(OLD.status = 'approved' AND (
    (OLD.outcome IS NULL AND NEW.outcome IN ('running', 'lapsed')) OR
    (OLD.outcome = 'running' AND NEW.outcome IN ('executed', 'failed')
     AND NEW.claim = OLD.claim AND NEW.handed_over IS OLD.handed_over)), 0)
BEGIN SELECT RAISE(ABORT, 'one approval runs one call, once'); END;

CREATE TRIGGER nothing_is_forgotten BEFORE DELETE ON pending_reviews
BEGIN SELECT RAISE(ABORT, 'a request is never deleted'); END;

CREATE TABLE standing_decisions (
  number            INTEGER PRIMARY KEY,
  decision          TEXT NOT NULL CHECK (decision IN
                    ('approved', 'rejected', 'stopped')),
  made_by           TEXT NOT NULL CHECK (made_by LIKE 'reviewer:_%'),
  made_at           TEXT NOT NULL,
  until             TEXT,
  uses              INTEGER,      -- at most; how many there were is counted
  request_id        TEXT,         -- the one that was decided
  reason            TEXT,
  signed_in         TEXT,
  -- what it answers: the same call, of the same agent
  digest            TEXT,
  checkpoint_id     TEXT,
  checkpoint_digest TEXT,         -- void once the gate's table differs,
  desk_digest       TEXT,         -- or what the desk's own file says of it
  session           TEXT,
  principal         TEXT,
  lifted_at         TEXT,
  lifted_by         TEXT CHECK (lifted_by LIKE 'reviewer:_%'),
  CHECK ((lifted_at IS NULL) = (lifted_by IS NULL)),
  CHECK (decision = 'stopped' OR (until IS NOT NULL AND session IS NOT NULL)),
  CHECK (decision <> 'approved' OR coalesce(uses BETWEEN 1 AND
         {MAX_STANDING_USES} AND julianday(until) - julianday(made_at) <
         ({MAX_STANDING_SECONDS} + 0.5) / 86400, 0))
);
CREATE INDEX in_force ON standing_decisions (digest) WHERE lifted_at IS NULL;

CREATE TRIGGER standing_is_said BEFORE INSERT ON standing_decisions
WHEN NEW.lifted_at IS NOT NULL
  OR NEW.number <= (SELECT max(number) FROM standing_decisions)
  OR (NEW.decision <> 'stopped' AND NOT EXISTS (
    SELECT 1 FROM pending_reviews WHERE request_id = NEW.request_id
    AND (status, decided_by, standing, approved_digest, digest, checkpoint_id,
         checkpoint_digest, session, asked_by) IS
        (NEW.decision, NEW.made_by, NULL, NULL, NEW.digest, NEW.checkpoint_id,
         NEW.checkpoint_digest, NEW.session, NEW.principal)))
BEGIN SELECT RAISE(ABORT, 'a person decides what stands'); END;

CREATE TRIGGER only_lifted BEFORE UPDATE ON standing_decisions
WHEN OLD.lifted_at IS NOT NULL OR NEW.lifted_at IS NULL
  OR ({columns_of(Standing._fields[:-2], "NEW.")}) IS NOT
     ({columns_of(Standing._fields[:-2], "OLD.")})
BEGIN SELECT RAISE(ABORT, 'a standing decision is only ever lifted'); END;
CREATE TRIGGER standing_is_kept BEFORE DELETE ON standing_decisions
BEGIN SELECT RAISE(ABORT, 'a standing decision is only ever lifted'); END;

CREATE TRIGGER answered_by_standing BEFORE UPDATE OF standing ON pending_reviews
WHEN NEW.standing IS NOT NULL AND NOT EXISTS (
  SELECT 1 FROM standing_decisions AS s
  WHERE s.number = NEW.standing AND s.lifted_at IS NULL
  AND s.made_by = NEW.decided_by AND s.made_at = NEW.said_at
  AND ((s.decision = 'stopped' AND NEW.status = 'rejected') OR
    (s.until > NEW.decided_at
     AND (s.decision, s.digest, s.checkpoint_id, s.checkpoint_digest, s.session,
          s.principal) IS
         (NEW.status, NEW.digest, NEW.checkpoint_id, NEW.checkpoint_digest,
          NEW.session, NEW.asked_by)
     AND (s.uses IS NULL OR s.uses > (SELECT count(*) FROM pending_reviews
                                      WHERE standing = s.number)))))
BEGIN SELECT RAISE(ABORT, 'no standing decision answers this'); END;

CREATE TABLE votes (              -- for later: several reviewers for one
  request_id TEXT NOT NULL REFERENCES pending_reviews (request_id),
  reviewer   TEXT NOT NULL CHECK (reviewer LIKE 'reviewer:_%'),
  vote       TEXT NOT NULL CHECK (vote IN ('approved', 'rejected')),
  voted_at   TEXT NOT NULL,
  signed_in  TEXT,
  reason     TEXT,
  PRIMARY KEY (request_id, reviewer)
);

CREATE TABLE audit_log (
  sequence   INTEGER PRIMARY KEY,
  at         TEXT NOT NULL,
  event      TEXT NOT NULL,       -- submitted, approved, ... executed, failed
  subject    TEXT NOT NULL,       -- a request_id, or 'standing:7'
  actor      TEXT NOT NULL,       -- 'agent:...', 'reviewer:...', 'server'
  detail     TEXT NOT NULL,       -- JSON
  seal       TEXT NOT NULL,       -- SHA-256 of the subject as it then was
  hash       TEXT NOT NULL        -- SHA-256 of the hash before and this row
);
CREATE INDEX audit_of ON audit_log (subject);

CREATE TRIGGER audit_goes_on BEFORE INSERT ON audit_log
WHEN NEW.sequence <= (SELECT max(sequence) FROM audit_log)
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
CREATE TRIGGER audit_is_kept BEFORE UPDATE ON audit_log
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
CREATE TRIGGER audit_stays BEFORE DELETE ON audit_log
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
"""
WHOLE = columns_of(ReviewRequest._fields)
WITHOUT_CONTEXT = WHOLE.replace("agent_context", "'null'")
POLLED = columns_of((*SUMMARY, "asked_by"))      # the rest keep their defaults
# a list cuts large requests: a desk full of them must fit into memory
CUT = {name: f"CASE WHEN size > {LARGE_BYTES} {then} ELSE {name} END"
       for name, then in {
    "agent_context": "THEN 'null'",     # even measuring it takes a millisecond
    "arguments": "AND length(arguments) > 200 THEN NULL",
    "approved_arguments": "AND length(approved_arguments) > 200 THEN NULL",
    "action_description": "AND length(action_description) > 200 THEN "
                          "substr(action_description, 1, 200) || ' ...'"}.items()}
BRIEF = columns_of(CUT.get(name, name) for name in ReviewRequest._fields)
STANDING = columns_of(Standing._fields)
SUBMIT = (f"INSERT INTO pending_reviews (asked_sha256, {columns_of(ASKED)}) "
          f"VALUES ({', '.join('?' * (len(ASKED) + 1))})")
asked_values = operator.attrgetter(*ASKED)
# which standing decisions are in force now
IN_FORCE = ("lifted_at IS NULL AND (decision = 'stopped' OR until > ?) AND "
            "(uses IS NULL OR uses > (SELECT count(*) FROM pending_reviews "
            "WHERE standing = number))")


class AuditRow(NamedTuple):
    """A row of audit_log; AuditRow() stands for the row before the first. The
    newest is the log's head: whoever has noted its hash elsewhere can tell
    later if the log was cut short."""

    sequence: int = 0
    at: str = ""
    event: str = ""
    subject: str = ""
    actor: str = ""
    detail: str = ""
    seal: str = ""
    hash: str = "0" * 64


class Change(NamedTuple):
    """What an audit row says, for whoever is told after the commit."""

    event: str
    subject: str                # a request_id, or `standing:7`
    actor: str
    description: str            # of a request


class Bounds(NamedTuple):
    """How long a decision stands, and for how many calls: an approval has
    both bounds, a rejection only a time."""

    seconds: float
    uses: int | None = None


REJECTION_STANDS = Bounds(600)      # by default: models ask up to six times


def bounds_from(value: Any, decision: Status) -> Bounds:
    """What `remember` asks for: `{"seconds": N, "uses": N}`, without uses for
    a rejection; Refusal if it is malformed or over the limits."""
    members: dict[str, Any] = value if isinstance(value, dict) else {}
    seconds, uses = members.get("seconds", 0), members.get("uses", None)
    longest, uses_fit = MAX_YEARS * YEAR_SECONDS, uses is None
    if decision == Status.APPROVED:
        longest = MAX_STANDING_SECONDS
        uses_fit = type(uses) is int and 1 <= uses <= MAX_STANDING_USES
    if (uses_fit and members.keys() <= {"seconds", "uses"}
            and type(seconds) in (int, float) and 0 < seconds <= longest):
        return Bounds(seconds, uses)
    raise Refusal(
        "bad-field", '"remember" must be {"seconds": N, "uses": N}, for a '
        'rejection {"seconds": N}', "an approval stands for at most "
        f"{MAX_STANDING_SECONDS} seconds and {MAX_STANDING_USES} uses")


class Found(NamedTuple):
    """A part of the history, and how far back the search has reached, which is
    where the `next` one begins; None at the end."""

    rows: list[ReviewRequest]
    next: tuple[str, int] | None


def columns_hash(row: ReviewRequest | Standing, names: Iterable[str]) -> str:
    """SHA-256 of the canonical JSON of those columns that are not NULL, so a
    column added later breaks no old seal. The names come sorted. Written out
    for speed: every change of state passes through here."""
    members = []
    for name in names:
        value = getattr(row, name)
        if isinstance(value, str):
            members.append(f'"{name}":{json_text(value)}')
        elif value is not None:
            members.append(f'"{name}":{value}')
    return hashlib.sha256(f"{{{','.join(members)}}}".encode()).hexdigest()


def seal_of(subject: ReviewRequest | Standing) -> str:
    """The seal of a request or a standing decision as it now is. What was
    asked enters as `asked_sha256`, so a large request costs no more to seal
    than a small one."""
    if isinstance(subject, Standing):
        return columns_hash(subject, SEALED_STANDING)
    return columns_hash(subject, SEALED)


def chain_hash(before: str, row: tuple[Any, ...]) -> str:
    """The hash of an audit row, its last column: over the hash of the row
    before and this row's other columns."""
    return sha256_of([before, *row])


def audit_rows(db: sqlite3.Connection, where: str = "ORDER BY sequence",
               *values: Any) -> Iterator[AuditRow]:
    """The audit log from its beginning, or some of its rows."""
    return map(AuditRow._make, db.execute(
        f"SELECT * FROM audit_log {where}", values))


def last_head(db: sqlite3.Connection) -> AuditRow:
    """The newest audit row; AuditRow() if the log is empty."""
    return next(audit_rows(db, "ORDER BY sequence DESC LIMIT 1"), AuditRow())


def standing_rows(db: sqlite3.Connection, where: str,
                  *values: Any) -> Iterator[Standing]:
    return map(Standing._make, db.execute(
        f"SELECT {STANDING} FROM standing_decisions {where}", values))


class Store:
    """The requests, the standing decisions and the audit log in one SQLite
    file; open_store() makes one. A turn is one transaction: the first change
    begins it, commit() ends it. Methods raise Refusal if a change is not
    allowed, and sqlite3.Error if the disk fails."""

    def __init__(self, db: sqlite3.Connection, lock: sqlite3.Connection, path: Path,
                 clock: Callable[[], float]) -> None:
        self.db, self.lock, self.path, self.clock = db, lock, path, clock
        self.spoilt = False             # SQLite rolled this turn back
        self.news: list[Change] = []    # of this turn, for commit()
        self.files = self.identities()
        # the digest of what the desk's own file says about a call
        self.desk_digest: Callable[[ReviewRequest], str | None] = lambda _: None
        self.tick()
        self.reread()

    def close(self) -> None:
        self.db.close()
        self.lock.close()

    def identities(self) -> list[tuple[int, int]]:
        """(device, inode) of the database and its -wal, as they are now."""
        found = os.stat(self.path), os.stat(f"{self.path}-wal")
        return [(file.st_dev, file.st_ino) for file in found]

    def still_there(self) -> bool:
        """Whether those are still the files that were opened: what is written
        to a file that was deleted or replaced is lost."""
        with contextlib.suppress(OSError):
            return self.identities() == self.files and self.path.stat().st_size > 0
        return False

    # ---- a turn ----

    def tick(self) -> None:
        """Read the clock: all requests of one turn share one instant."""
        self.time = self.clock()
        self.now = instant(self.time)

    def reread(self) -> None:
        """Read again what memory holds: head, counts, standing decisions."""
        self.head = last_head(self.db)
        self.polled: dict[str, ReviewRequest] = {}
        self.counts: Counter[tuple[str | None, ...]] = Counter()
        for asked_by, agent, count in self.db.execute(
                "SELECT asked_by, agent, count(*) FROM pending_reviews WHERE "
                "status = 'waiting' GROUP BY asked_by, agent"):
            self.count_waiting(asked_by, agent, count)
        self.reread_standing()

    def reread_standing(self) -> None:
        """Read which stop is in force, and when the last decision ends."""
        rows = list(standing_rows(self.db, f"WHERE {IN_FORCE}", self.now))
        self.stop_in_force = next(
            (row for row in rows if row.decision == "stopped"), None)
        self.stands_until = max((row.until or "" for row in rows), default="")

    @property
    def waiting_count(self) -> int:
        return self.counts[()]

    def count_waiting(self, asked_by: str, agent: str | None, more: int) -> None:
        """Count `more` waiting: for the agent, its credential, and in all."""
        for owner in ((), (asked_by,), (asked_by, agent)):
            self.counts[owner] += more
            if not self.counts[owner]:
                del self.counts[owner]      # agents make up ever new names

    def attempt(self, change: Callable[..., T], *args: Any) -> T:
        """change(*args) inside a savepoint: all of one request's changes are
        kept or none, whatever else happens in the turn. Desk.answered turns a
        Refusal into an answer inside it, so what was changed is kept.

        When the disk is full or fails, SQLite may roll back the whole turn by
        itself. Then the turn is spoilt: nothing more begins in it, and
        commit() keeps none of it. Raises sqlite3.Error."""
        if self.spoilt:
            raise sqlite3.OperationalError("this turn was rolled back")
        before = len(self.news)
        try:
            if not self.db.in_transaction:
                self.db.execute("BEGIN IMMEDIATE")
            self.db.execute("SAVEPOINT request")
            result = change(*args)
            self.db.execute("RELEASE request")
            return result
        except BaseException as error:
            self.spoilt = True          # unless its changes can be undone
            if self.db.in_transaction and not isinstance(
                    error, sqlite3.OperationalError):
                self.db.execute("ROLLBACK TO request")
                self.db.execute("RELEASE request")
                del self.news[before:]
                self.reread()
                self.spoilt = False
            raise

    def commit(self) -> list[Change] | None:
        """End the turn -> its changes, as the audit log has them, or None if
        they are not on disk. Nobody is answered before that (promise 6)."""
        news, self.news = self.news, []
        with contextlib.suppress(sqlite3.Error):
            if not self.spoilt:
                if news or self.db.in_transaction:
                    self.db.execute("COMMIT")
                return news
        self.spoilt = True
        with contextlib.suppress(sqlite3.Error):    # or a later turn does it
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            self.reread()
            self.spoilt = False
        return None

    def note(self, about: ReviewRequest | Standing, event: str, actor: str,
             detail: Mapping[str, Any]) -> None:
        """Write an audit row in the same transaction as the change: chained to
        the row before, with the seal of its subject as it is now."""
        row = (self.head.sequence + 1, self.now, event, about.subject, actor,
               READABLE.encode(detail) if detail else "{}", seal_of(about))
        self.head = AuditRow(*row, chain_hash(self.head.hash, row))
        self.polled.pop(about.subject, None)
        self.db.execute("INSERT INTO audit_log VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                        self.head)
        self.news.append(Change(event, about.subject, actor,
                                getattr(about, "action_description", "")))

    # ---- the changes of state ----

    def submit(self, asked: ReviewRequest,
               attach: bool = False) -> tuple[ReviewRequest, bool]:
        """Submit a call for review -> its request, and whether that is new.
        The same id for the same call by the same agent is the same request,
        whatever else differs: an agent that crashed asks again and finds it.
        With `attach` the same call is enough, while a request for it is open.

        Who answers, in this order: a stop, a standing rejection, the request
        to attach to, a standing approval, a person."""
        self.check_not_stopped()
        standing = self.standing_for(asked)
        rejected = standing and standing.decision == Status.REJECTED
        if attach and not rejected and (open_one := self.open_like(asked)):
            return open_one, False
        request = self.insert(asked)
        if request is None:
            return self.asked_again(asked), False
        if standing:
            request = self.answer(request, standing)
        return request, True

    def insert(self, asked: ReviewRequest) -> ReviewRequest | None:
        """The request, stored as waiting; None if its id is taken, or if no
        more may wait: from this agent, from this credential, or in all."""
        credential, agent = (asked.asked_by,), (asked.asked_by, asked.agent)
        if (self.counts[()] >= MAX_WAITING
                or self.counts[credential] >= MAX_WAITING_PER_CREDENTIAL
                or self.counts[agent] >= MAX_WAITING_PER_AGENT):
            return None
        sha256 = columns_hash(asked, ASKED)
        inserted = self.db.execute(SUBMIT, (sha256, *asked_values(asked)))
        if not inserted.rowcount:
            return None
        asked = asked._replace(id=inserted.lastrowid or 0, asked_sha256=sha256)
        self.note(asked, "submitted", asked.asked_by, {})
        self.count_waiting(asked.asked_by, asked.agent, +1)
        return asked

    def asked_again(self, asked: ReviewRequest) -> ReviewRequest:
        """The stored request with this id, if it is for this call; Refusal if
        it is not, or if there is none because too many wait."""
        request = self.first("WHERE request_id = ?", asked.request_id)
        if request is None:
            raise Refusal(
                "too-many-waiting", f"{self.waiting_count} requests are waiting "
                f"already, {self.counts[asked.asked_by, asked.agent]} of them from "
                "this agent", "let a reviewer decide some, or withdraw some")
        own = request.asked_by == asked.asked_by
        if own and (request.digest, request.checkpoint_id, request.session) == (
                asked.digest, asked.checkpoint_id, asked.session):
            return request
        raise Refusal(
            "id-taken", f'request_id "{asked.request_id}" belongs to another '
            "action", "choose a fresh request_id for another action, "
            "checkpoint or session", about=request if own else None)

    def open_like(self, asked: ReviewRequest) -> ReviewRequest | None:
        """The newest request for this call, by this agent in this session,
        that waits, or that a person approved and nobody has claimed."""
        return self.first(
            "WHERE digest = ? AND status IN ('waiting', 'approved') AND "
            "outcome IS NULL AND standing IS NULL AND checkpoint_id IS ? AND "
            "session IS ? AND asked_by = ? AND edits IS ? AND "
            "coalesce(lapses_at, deadline, '~') > ? ORDER BY id DESC LIMIT 1",
            asked.digest, asked.checkpoint_id, asked.session, asked.asked_by,
            asked.edits, self.now)

    def move(self, request: ReviewRequest, event: str, actor: str,
             detail: Mapping[str, Any], **columns: Any) -> ReviewRequest:
        """The one way a request changes: a guarded UPDATE from the state it
        was read in, and its audit row -> the request as it is now."""
        done = self.db.execute(
            f"UPDATE pending_reviews SET {' = ?, '.join(columns)} = ? "
            "WHERE request_id = ? AND status = ? AND outcome IS ?",
            (*columns.values(), request.request_id, request.status,
             request.outcome)).rowcount
        if not done:
            raise refused("damaged", request)
        if request.status == Status.WAITING:
            self.count_waiting(request.asked_by, request.agent, -1)
        request = request._replace(**columns)
        self.note(request, event, actor, detail)
        return request

    def decide(self, request_id: str, decision: Status, by: str, *,
               reason: str | None = None, signed_in: str | None = None,
               shown_at: str | None = None, digest: str | None = None,
               arguments: dict[str, Any] | None = None,
               remember: Bounds | None = None) -> ReviewRequest:
        """Record a reviewer's decision; Refusal if there is one already, or if
        the deadline has passed. `digest` is that of the call the reviewer
        read, `arguments` are the ones to run instead, and with `remember` the
        decision stands for later requests of the same call."""
        request = self.undecided(request_id, digest)
        changed: dict[str, Any] = {}
        lapses_at = None
        if decision == Status.APPROVED:
            self.check_not_stopped()
            changed = changed_call(request, arguments)
            lapses_at = self.lapse_of(request)
        if remember and (changed or request.session is None):
            raise refused("not-remembered", request)
        detail = {"reason": reason, "signed_in": signed_in, "shown_at": shown_at}
        if changed:
            detail["changed"] = changes_in_words(
                person(by), request.arguments, changed["approved_arguments"])
        request = self.move(
            request, decision, by, detail, status=decision,
            decided_at=self.now, decided_by=by, signed_in=signed_in,
            reason=reason, lapses_at=lapses_at, **changed)
        if remember:
            self.let_stand(request, remember)
        return request

    def undecided(self, request_id: str, digest: str | None) -> ReviewRequest:
        """A request that can still be decided, by somebody who read the call
        with this digest; else Refusal."""
        request = self.request(request_id)
        if not request.intact:
            raise refused("damaged", request)
        request = self.expire(request)                              # promise 4
        if request.status != Status.WAITING:
            by_a_person = request.decided_by is not None
            raise refused("already-decided" if by_a_person else request.status,
                          request)
        if digest not in (None, request.digest):
            raise refused("arguments-changed", request)
        return request

    def lapse_of(self, request: ReviewRequest) -> str | None:
        """When an approval given now lapses unless it is claimed, if ever."""
        return request.deadline and max(
            request.deadline, instant(self.time + CLAIM_SECONDS))

    def withdraw(self, request_id: str, why: str, by: str) -> ReviewRequest:
        """Close a request that nobody waits for any more -> the request as it
        is now, which shows whether a reviewer was faster."""
        request = self.request(request_id, by)
        if request.status != Status.WAITING:
            return request
        status = Status.EXPIRED if why == "timeout" else Status.WITHDRAWN
        return self.move(request, status, by, {"why": why}, status=status,
                         decided_at=self.now)

    def claim(self, request_id: str, digest: str, claim: str, by: str,
              handed_over: bool = False) -> ReviewRequest:
        """Take an approved request for running: succeeds once, and again for
        the same claim, whose reply may have been lost (promise 3). `digest` is
        that of the call that will run; `handed_over` means that nobody will
        report how it ended."""
        request = self.expire(self.request(request_id, by))
        self.check_not_stopped()
        if (request.approved_digest or request.digest) != digest:
            raise refused("arguments-changed", request)
        if not request.intact:
            raise refused("damaged", request)
        if request.status != Status.APPROVED:
            raise refused("not-approved", request)
        if request.outcome is None:
            return self.move(request, "claimed", by, {}, claim=claim,
                             outcome=Outcome.RUNNING, outcome_at=self.now,
                             handed_over=1 if handed_over else None)
        if (request.outcome, request.claim) == (Outcome.RUNNING, claim):
            return request
        if request.outcome == Outcome.LAPSED:
            raise refused("lapsed", request)
        raise refused("already-claimed", request)

    def finish(self, request_id: str, claim: str, outcome: Outcome,
               text: str, by: str) -> ReviewRequest:
        """Record what became of a claimed call; this may be repeated."""
        request = self.request(request_id, by)
        if request.claim is None or request.claim != claim:
            raise refused("not-claimed", request)
        if request.outcome == Outcome.RUNNING:
            return self.move(request, outcome, by, {"text": text},
                             outcome=outcome, outcome_at=self.now,
                             outcome_text=text)
        if request.outcome != outcome:
            raise refused("already-finished", request)
        return request

    def overdue(self) -> list[ReviewRequest]:
        """What close_overdue() should close: requests past their deadline (all
        that wait, during a stop), and approvals not claimed in time."""
        waiting = ["WHERE status = 'waiting' AND deadline <= ? LIMIT ?", self.now]
        if self.stop_in_force:
            waiting = ["WHERE status = 'waiting' LIMIT ?"]
        return [*self.select(*waiting, CLOSED_A_TURN), *self.select(
            "WHERE status = 'approved' AND outcome IS NULL AND lapses_at <= ? "
            "LIMIT ?", self.now, CLOSED_A_TURN)]

    def close_overdue(self, request: ReviewRequest) -> ReviewRequest:
        """The request, closed if it is overdue or a stop is in force."""
        request = self.expire(request)
        if request.status == Status.WAITING and self.stop_in_force:
            return self.answer(request, self.stop_in_force)
        return request

    def expire(self, request: ReviewRequest) -> ReviewRequest:
        """The request, closed if it is overdue: `expired` if nobody decided
        it, `lapsed` if it was approved and nobody claimed it."""
        if request.status == Status.WAITING and (
                request.deadline and request.deadline <= self.now):
            return self.move(request, Status.EXPIRED, "server", {},
                             status=Status.EXPIRED, decided_at=self.now)
        if request.status == Status.APPROVED and request.outcome is None and (
                request.lapses_at and request.lapses_at <= self.now):
            return self.move(request, Outcome.LAPSED, "server", {},
                             outcome=Outcome.LAPSED, outcome_at=self.now)
        return request

    # ---- standing decisions ----

    def standing_for(self, asked: ReviewRequest) -> Standing | None:
        """The standing decision that answers a call, if any, a rejection
        before an approval: made for the same call, credential and session,
        under a checkpoint that neither side has edited since."""
        if self.stands_until <= self.now:       # the usual case costs nothing
            return None
        rows = standing_rows(
            self.db, f"WHERE {IN_FORCE} AND digest = ? AND checkpoint_id IS ? "
            "AND checkpoint_digest IS ? AND session = ? AND principal = ? "
            "ORDER BY decision = 'approved', number", self.now, asked.digest,
            asked.checkpoint_id, asked.checkpoint_digest, asked.session,
            asked.asked_by)
        return next((row for row in rows        # the digest costs: last
                     if row.desk_digest == self.desk_digest(asked)), None)

    def used(self, standing: Standing) -> int:
        """How many requests a standing decision has answered."""
        return int(self.db.execute(
            "SELECT count(*) FROM pending_reviews WHERE standing = ?",
            (standing.number,)).fetchone()[0])

    def answer(self, request: ReviewRequest,
               standing: Standing) -> ReviewRequest:
        """A waiting request, decided as a standing decision says."""
        approved = standing.decision == Status.APPROVED
        status = Status.APPROVED if approved else Status.REJECTED
        return self.move(
            request, status, standing.made_by, {"standing": standing.number},
            status=status, decided_at=self.now, decided_by=standing.made_by,
            signed_in=standing.signed_in, reason=standing.reason,
            standing=standing.number, said_at=standing.made_at,
            lapses_at=self.lapse_of(request) if approved else None)

    def let_stand(self, request: ReviewRequest, bounds: Bounds) -> Standing:
        """Let a decision just made stand for later requests of its call."""
        return self.keep("stands", Standing(
            0, request.status, request.decided_by or "", self.now,
            until=instant(self.time + bounds.seconds), uses=bounds.uses,
            request_id=request.request_id, reason=request.reason,
            signed_in=request.signed_in, digest=request.digest,
            checkpoint_id=request.checkpoint_id,
            checkpoint_digest=request.checkpoint_digest,
            desk_digest=self.desk_digest(request), session=request.session,
            principal=request.asked_by))

    def stop(self, by: str, reason: str | None,
             signed_in: str | None = None) -> Standing:
        """Refuse everything until this is lifted; only one stop at a time."""
        return self.stop_in_force or self.keep("stopped", Standing(
            0, "stopped", by, self.now, reason=reason, signed_in=signed_in))

    def keep(self, event: str, standing: Standing) -> Standing:
        """Store a standing decision, with the next number."""
        number, = self.db.execute("SELECT 1 + coalesce(max(number), 0) FROM "
                                  "standing_decisions").fetchone()
        standing = standing._replace(number=number)
        self.db.execute(f"INSERT INTO standing_decisions ({STANDING}) VALUES "
                        f"({', '.join('?' * len(standing))})", standing)
        return self.log_standing(standing, event, standing.made_by)

    def lift(self, number: int, by: str) -> Standing:
        """End a standing decision; one already lifted stays as it is."""
        standing = next(standing_rows(self.db, "WHERE number = ?", number), None)
        if standing is None:
            raise Refusal("unknown", f"there is no standing decision {number}",
                          "`python3 hitl.py standing` lists them")
        if standing.lifted_at:
            return standing
        self.db.execute("UPDATE standing_decisions SET lifted_at = ?, lifted_by "
                        "= ? WHERE number = ?", (self.now, by, number))
        lifted = standing._replace(lifted_at=self.now, lifted_by=by)
        return self.log_standing(lifted, "lifted", by)

    def log_standing(self, standing: Standing, event: str, actor: str) -> Standing:
        """Log that a standing decision was made or lifted."""
        names = ("decision", "until", "uses", "request_id", "reason")
        self.note(standing, event, actor, {
            name: value for name, value in standing._asdict().items()
            if name in names and value is not None})
        self.reread_standing()
        return standing

    def standing(self) -> list[tuple[Standing, int]]:
        """What is in force, the newest first, and how often each was used."""
        return [(row, self.used(row)) for row in standing_rows(
            self.db, f"WHERE {IN_FORCE} ORDER BY number DESC LIMIT 500", self.now)]

    def check_not_stopped(self) -> None:
        """Refusal while a reviewer's stop is in force."""
        stop = self.stop_in_force
        if stop is None:
            return
        why = f": {stop.reason}" if stop.reason else ""
        raise Refusal(
            "stopped", f"{person(stop.made_by)} stopped everything "
            f"at {stop.made_at}{why}", "nothing is asked, approved or run "
            f"until a reviewer lifts it: python3 hitl.py lift {stop.number}")

    # ---- reading ----

    def select(self, where: str, *values: Any, columns: str = WITHOUT_CONTEXT
               ) -> Iterator[ReviewRequest]:
        """Requests, without their contexts unless `columns` has them: contexts
        are large, and no decision needs them."""
        return itertools.starmap(ReviewRequest, self.db.execute(
            f"SELECT {columns} FROM pending_reviews {where}", values))

    def first(self, where: str, *values: Any, columns: str = WITHOUT_CONTEXT
              ) -> ReviewRequest | None:
        """The first such request, if there is one."""
        return next(self.select(where, *values, columns=columns), None)

    def request(self, request_id: str, by: str | None = None,
                columns: str = WITHOUT_CONTEXT) -> ReviewRequest:
        """A request; Refusal if it is unknown, or if it was asked by another
        agent than `by`."""
        request = self.first("WHERE request_id = ?", request_id, columns=columns)
        if request is None:
            raise Refusal("unknown", f'there is no request "{request_id}"',
                          "check the id: `python3 hitl.py list --all` has the latest")
        if by not in (None, request.asked_by):
            raise Refusal("not-your-request", "this is another agent's request",
                          "use the credentials that it was made with")
        return request

    def summary(self, request_id: str, by: str) -> ReviewRequest:
        """A request as a poll needs it: agents ask again and again, so it is
        kept until its next audit row."""
        request = self.polled.get(request_id)
        if request is None or request.asked_by != by:
            request = self.request(request_id, by, columns=POLLED)
            if len(self.polled) >= MAX_POLLED:
                self.polled.clear()
            self.polled[request_id] = request
        return request

    def waiting(self, limit: int, skip: int = 0,
                attended: Container[str] = ()) -> list[ReviewRequest]:
        """A page of what waits: first what somebody waits for, then by turns
        among credentials and among the agents of each, soonest deadline first.
        Whoever floods the desk pushes nobody else's request off the page."""
        rows = self.db.execute(
            "SELECT coalesce(deadline, '~'), id, request_id, asked_by, agent FROM "
            "pending_reviews WHERE status = 'waiting'")
        turn: Counter[Any] = Counter()
        by_agent, by_credential = [], []
        # 1. a request's turn among those of its agent, soonest deadline first
        for due, number, request_id, asked_by, agent in sorted(rows):
            alone = request_id not in attended
            turn[alone, asked_by, agent] += 1
            by_agent.append((turn[alone, asked_by, agent], due, number, alone,
                             asked_by))
        # 2. its turn among those of its credential, whose agents take turns
        for _, due, number, alone, asked_by in sorted(by_agent):
            turn[alone, asked_by] += 1
            by_credential.append((alone, turn[alone, asked_by], due, number))
        # 3. credentials take turns; what somebody waits for comes first
        by_credential.sort()
        return self.by_number([number for *_, number in
                               by_credential[skip:skip + limit]])

    def by_number(self, numbers: list[int]) -> list[ReviewRequest]:
        """The requests with these ids, in this order, as a list shows them."""
        found = {request.id: request for request in self.select(
            f"WHERE id IN ({', '.join(map(str, numbers))})", columns=BRIEF)}
        return [found[number] for number in numbers]

    def reviewed(self, limit: int, before: tuple[str, int] | None = None,
                 words: str = "", status: str = "") -> Found:
        """What no longer waits, the latest decision first, back from a
        position: with all of the `words`, in upper or lower case, and the
        `status`. Stops after SEARCH_SECONDS with what it has found by then."""
        wanted = words.casefold().split()
        last = time.monotonic() + SEARCH_SECONDS
        numbers: list[int] = []
        position = None
        for decided_at, number, became, *texts in self.db.execute(
                "SELECT decided_at, id, status, request_id, tool, agent, "
                "checkpoint_id, decided_by, action_description FROM "
                "pending_reviews WHERE status <> 'waiting' AND (decided_at, "
                "id) < (?, ?) ORDER BY decided_at DESC, id DESC",
                before or ("~", 0)):
            if len(numbers) == limit or position and time.monotonic() > last:
                return Found(self.by_number(numbers), position)
            position = (decided_at, number)
            text = "\n".join(filter(None, texts)).casefold()
            if status in ("", became) and all(word in text for word in wanted):
                numbers.append(number)
        return Found(self.by_number(numbers), None)

    def beginning_with(self, start: str) -> list[str]:
        """The first few longer request_ids that begin with this."""
        return [row[0] for row in self.db.execute(
            "SELECT request_id FROM pending_reviews WHERE request_id > ? AND "
            "request_id < ? ORDER BY request_id LIMIT 6", (start, start + "~"))]

    def asked_before(self, request: ReviewRequest) -> ReviewRequest | None:
        """The earlier request for the same call that was decided last."""
        return self.first(
            "WHERE digest = ? AND decided_by IS NOT NULL AND id < ? "
            "ORDER BY decided_at DESC, id DESC LIMIT 1", request.digest,
            request.id)

    def notices_of(self, request_id: str) -> list[tuple[str, str, str]]:
        """What became of the notices of a request: (event, name, status or
        why), in the order of the log."""
        found = [(event, json.loads(detail)) for event, detail in self.db.execute(
            "SELECT event, detail FROM audit_log WHERE subject = ? AND event IN "
            "('notified', 'not-notified') ORDER BY sequence", (request_id,))]
        return [(event, str(detail["name"]), str(
            detail.get("status") or detail.get("why"))) for event, detail in found]

    def owed(self) -> list[tuple[ReviewRequest, list[str]]]:
        """What waits, in order of arrival, each with the [[notify]] entries
        whose notice is in the log: the others still owe one."""
        return [(request, [name for _, name, _ in self.notices_of(
            request.request_id)]) for request in self.select(
                "WHERE status = 'waiting' ORDER BY id", columns=BRIEF)]


# Why a request cannot be decided, claimed or finished, and the cure.
OVER = ("this request has been {status} since {decided_at}",
        "nobody waits for a decision any more; nothing will run")
SAID_OF = {
    "expired": OVER, "withdrawn": OVER,
    "already-decided": ("this request was {status} by {person} at {decided_at}",
                        "a decision is final; nothing was changed"),
    "too-fast": ("this was decided before it could be read",
                 "look at it first, then decide"),
    "not-your-request": ("this is for other reviewers",
                         "its checkpoint names who may decide it"),
    "not-remembered": (
        "this decision cannot stand for other calls",
        "it can only for an unchanged call in a known session, if its "
        "checkpoint allows it; decide this one alone"),
    "not-editable": (
        "the arguments of this request cannot be changed",
        "approve it as it is, or reject it and say what should change"),
    "arguments-changed": ("the digest is not that of this request",
                          "look at the request again"),
    "not-approved": ("this request is {status}",
                     "only an approved request can be claimed"),
    "lapsed": ("nobody claimed this approval in time",
               "ask again with another request_id"),
    "already-claimed": ("this approval was already claimed",
                        "ask again with another request_id"),
    "not-claimed": ("this is not the claim that took this request", ""),
    "already-finished": ("this call has already ended: {outcome}", ""),
    "damaged": (
        'what is stored of "{request_id}" is not what was asked: the database '
        "was damaged or edited", "run `python3 hitl.py log --verify`; restore "
        "a backup"),
}


def refused(reason: str, request: ReviewRequest) -> Refusal:
    """The Refusal that SAID_OF words for a reason, about this request."""
    message, cure = SAID_OF[reason]
    message = message.format(person=person(request.decided_by), **request._asdict())
    return Refusal(reason, message, cure, about=request)


def changed_call(request: ReviewRequest,
                 arguments: dict[str, Any] | None) -> dict[str, Any]:
    """The columns for a reviewer's changed arguments; none if none changed."""
    if arguments is None:
        return {}
    if not request.edits or request.arguments is None:
        raise refused("not-editable", request)
    text = as_sent(changed_value(parse_json(request.arguments), arguments,
                                 "arguments"))
    if text == request.arguments:
        return {}
    if len(text) > MAX_EDITED:
        raise Refusal("too-large", f"arguments over {MAX_EDITED} bytes",
                      "send less", about=request)
    return {"approved_arguments": text,
            "approved_digest": request.digest_with(text)}


def changed_value(old: Any, new: Any, name: str) -> Any:
    """The new value, if it may take the place of the old one: only texts,
    numbers and booleans can change, and they keep their types."""
    if type(old) is float and type(new) is int and abs(new) <= 2 ** 53:
        new = float(new)
    same = type(old) is type(new)
    if same and isinstance(old, dict) and old.keys() == new.keys():
        return {key: changed_value(old[key], new[key], f"{name}.{key}")
                for key in old}
    if same and isinstance(old, list) and len(old) == len(new):
        return [changed_value(*values, f"{name}.{n}")
                for n, values in enumerate(zip(old, new, strict=True))]
    if not same or isinstance(old, (dict, list)):
        raise Refusal("bad-field", f'"{visible(name[:200])}" has a different '
                      "type or different parts", "only the values of texts, numbers "
                      "and booleans can change")
    if isinstance(old, str) and old != new and not editable_text(old):
        raise Refusal("not-editable", f'"{visible(name[:200])}" has characters '
                      "that cannot be seen", "approve it as it is, or reject it")
    return new


# ============================== Database file ==============================
# Opens, locks and verifies the file. A start checks the schema and what is
# still open, so that a long history does not slow it down; `log --verify`
# checks everything. Nothing is ever repaired: a file that was damaged or
# edited is refused, and the message says what gave it away.

# SQLITE_BUSY, LOCKED, READONLY, IOERR, FULL, CANTOPEN
NOT_DAMAGE = (5, 6, 8, 10, 13, 14)
CHECKED_PAGES = 8192            # 32 MB: a start checks no larger file's pages


def bad_database(path: Path, what: str, cure: str) -> ConfigError:
    return ConfigError(f"{path}: {what}", cure, reason="bad-database")


def cannot_open(path: Path, error: Exception) -> ConfigError:
    """The error for a file that cannot be used now, or that is damaged."""
    code = getattr(error, "sqlite_errorcode", 0) & 255
    if code in NOT_DAMAGE or isinstance(error, OSError):
        return bad_database(path, f"cannot be used now: {error}",
                            "stop what holds it, check its mode and its disk, or "
                            "use --database with a file in a folder of your own")
    return bad_database(path, f"is damaged, or not a hitl.py database: {error}",
                        "restore a backup, or move it away")


def open_store(path: Path, clock: Callable[[], float] = time.time) -> Store:
    """The Store of a database that is ours, undamaged and durable, and that no
    other server uses; ConfigError for any other file, which stays as it is."""
    with contextlib.ExitStack() as opened:
        try:
            path = Path(os.path.realpath(path))     # one lock, by whatever name
            if path.is_dir():
                raise bad_database(path, "is a folder", "name a file")
            lock = lock_database(path)
            opened.callback(lock.close)
            if not os.path.lexists(path):
                create_database(path)
            db = sqlite3.connect(
                f"{path.as_uri()}?mode=rw", uri=True, timeout=BUSY_SECONDS,
                isolation_level=None, check_same_thread=False,
                cached_statements=256)
            opened.callback(db.close)
            check_ours(db, path)
            apply_settings(db, path)
            if fault := database_fault(db):
                raise bad_database(
                    path, f"is damaged or was edited: {fault}",
                    "restore a backup, or move it away to begin again; "
                    "`python3 hitl.py log --verify` shows more")
            store = Store(db, lock, path, clock)
        except (OSError, sqlite3.Error, ValueError, TypeError) as error:
            raise cannot_open(path, error) from None
        opened.pop_all()            # from here on the Store closes both
        return store


def lock_database(path: Path) -> sqlite3.Connection:
    """A lock file beside the database, held while this server runs: SQLite's
    own file locking works on every system, and other processes can still read
    the database itself."""
    beside = path.with_name(path.name + ".lock")
    with contextlib.suppress(FileExistsError):
        # never open it again: closing it would drop our own lock (POSIX)
        os.close(os.open(beside, os.O_CREAT | os.O_EXCL, 0o600))
    lock = sqlite3.connect(beside, timeout=0, isolation_level=None,
                           check_same_thread=False)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        lock.close()
        if "locked" in str(error):
            raise bad_database(path, "another server uses this database",
                               "stop it, or name another with --database") from None
        raise cannot_open(beside, error) from None
    return lock


def check_ours(db: sqlite3.Connection, path: Path, reading: bool = False) -> None:
    """ConfigError unless hitl.py wrote the database, with this schema, and it
    is not plainly cut short: SQLite would take an empty file for a new one.
    For `reading`, what is left of one cut short will do."""
    ours, = db.execute("PRAGMA application_id").fetchone()
    version, = db.execute("PRAGMA user_version").fetchone()
    size = path.stat().st_size
    if not size or size % 512 and not reading:
        raise bad_database(path, "is empty or was cut short",
                           "move it away, or restore a backup")
    if ours != APPLICATION_ID:
        raise bad_database(path, "belongs to another program",
                           "use --database with another file")
    if version == 1:
        raise bad_database(path, "was written by hitl.py 1.0 (schema 1)",
                           "keep that hitl.py to read it, and move the file "
                           "away to begin again")
    if version > SCHEMA_VERSION:
        raise bad_database(path, f"was written by a newer hitl.py (schema "
                           f"{version})", "use that version")


def apply_settings(db: sqlite3.Connection, path: Path) -> None:
    """Each commit is on disk when it returns, and readers never wait."""
    if db.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
        raise bad_database(path, "this file system cannot hold it (no WAL)",
                           "put the database on a local disk")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")
    # ids come in no order: a busy desk would write the same pages every turn
    db.execute("PRAGMA wal_autocheckpoint = 4000")      # 16 MB
    db.execute("PRAGMA cache_size = -8000")             # 8 MB


def create_database(path: Path) -> None:
    """Create a database, complete from the first instant it has its name."""
    if path.with_name(path.name + "-wal").exists():
        raise bad_database(path, "is gone, but its -wal file is still there",
                           "restore it, or move the -wal file away")
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)       # left by a start that was cut off
    os.close(os.open(fresh, os.O_CREAT | os.O_EXCL, 0o600))
    with contextlib.closing(sqlite3.connect(fresh, isolation_level=None)) as db:
        apply_settings(db, path)
        db.executescript(
            f"BEGIN; PRAGMA application_id = {APPLICATION_ID}; "
            f"PRAGMA user_version = {SCHEMA_VERSION}; {SCHEMA} COMMIT;")
    os.replace(fresh, path)
    if os.name == "posix":      # put the name on disk, too; Windows does so itself
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def database_fault(db: sqlite3.Connection) -> str:
    """What is wrong with a database, if anything, as far as a start checks:
    the schema with its triggers, the pages of a small file, and whatever is
    still open."""
    # names that begin with sqlite_ are SQLite's own: nobody else can use them
    schema = ("SELECT name, sql FROM sqlite_master WHERE name NOT LIKE "
              "'sqlite$_%' ESCAPE '$' ORDER BY name")
    with contextlib.closing(sqlite3.connect(":memory:")) as fresh:
        fresh.executescript(SCHEMA)
        expected = fresh.execute(schema).fetchall()
    if db.execute(schema).fetchall() != expected:
        return "its tables or triggers are not those of this version"
    pages, = db.execute("PRAGMA page_count").fetchone()
    if pages <= CHECKED_PAGES:
        result, = db.execute("PRAGMA quick_check(1)").fetchone()
        if result != "ok":
            return str(result)
    return next(seal_faults(
        db, "WHERE status IN ('waiting', 'approved') AND outcome IS NULL",
        "WHERE lifted_at IS NULL"), "")


def seal_faults(db: sqlite3.Connection, requests: str = "",
                standing: str = "") -> Iterator[str]:
    """Requests and standing decisions that are not as the audit log has them;
    and votes, which nobody can cast yet."""
    subjects: Iterable[ReviewRequest | Standing] = itertools.chain(
        map(ReviewRequest._make, db.execute(
            f"SELECT {WHOLE} FROM pending_reviews {requests}")),
        standing_rows(db, standing))
    for subject in subjects:
        if fault := seal_fault(db, subject):
            yield f'"{visible(str(subject.subject))}" {fault}'
    for request_id, in db.execute("SELECT request_id FROM votes"):
        yield (f'"{visible(str(request_id))}" has a vote, and this version '
               "accepts none")


def seal_fault(db: sqlite3.Connection, subject: ReviewRequest | Standing) -> str:
    """What is wrong with a request or a standing decision, if anything: its
    last audit row must hold its seal, and that row's hash must be right."""
    if isinstance(subject, ReviewRequest) and (
            subject.asked_sha256 != columns_hash(subject, ASKED)):
        return "is not what was asked: its row was edited"
    last = next(audit_rows(db, "WHERE subject = ? ORDER BY sequence DESC LIMIT 1",
                           subject.subject), None)
    if last is None:
        return "has no audit row"
    if last.seal != seal_of(subject):
        return "is not as the audit log has it: its row was edited"
    before = next(audit_rows(db, "WHERE sequence = ?", last.sequence - 1),
                  AuditRow())
    if last.hash != chain_hash(before.hash, last[:-1]):
        return f"has an audit row that was edited: {last.sequence}"
    return ""


@contextlib.contextmanager
def open_for_reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A read-only connection, beside a running server or without one."""
    if not path.is_file():
        raise bad_database(path, "no such database", "name it with --database")
    uri = f"{path.absolute().as_uri()}?mode=ro"
    if not path.with_name(path.name + "-wal").exists():
        uri += "&immutable=1"       # nobody writes, and no file is left behind
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
        check_ours(db, path, reading=True)
        yield db


def stored_requests(db: sqlite3.Connection) -> Iterator[ReviewRequest]:
    """Every request that was ever asked, in order, without its context."""
    return map(ReviewRequest._make, db.execute(
        f"SELECT {WITHOUT_CONTEXT} FROM pending_reviews ORDER BY id"))


def verified(path: Path, noted: str = "") -> tuple[AuditRow, list[str]]:
    """The head of a database's audit log, and what audit_faults() finds, both
    as of one instant, whatever a server writes meanwhile."""
    with open_for_reading(path) as db:
        db.execute("BEGIN")
        return last_head(db), list(audit_faults(db, noted))


def audit_faults(db: sqlite3.Connection, noted: str = "") -> Iterator[str]:
    """What is wrong with the audit log: each row is checked against the chain,
    each request against its last row, and a noted head against the log."""
    before = AuditRow()
    seen = noted in ("", before.hash)
    for row in audit_rows(db):
        if row.sequence != before.sequence + 1:
            yield f"audit row {before.sequence + 1} is missing"
        elif row.hash != chain_hash(before.hash, row[:-1]):
            yield (f'audit row {row.sequence}, about "{visible(str(row.subject))}", '
                   "was changed, or one before it was")
        before = row
        seen = seen or row.hash == noted
    if not seen:
        yield (f"the noted head {noted} is not in the log: its end was cut off, "
               "or the head is of another log")
    yield from seal_faults(db)
    for subject, in db.execute(
            "SELECT DISTINCT subject FROM audit_log WHERE subject NOT IN "
            "(SELECT request_id FROM pending_reviews) AND subject NOT IN "
            "(SELECT 'standing:' || number FROM standing_decisions)"):
        yield f'"{visible(str(subject))}" is in the log, but its row is gone'


# ================================= Notices =================================
# Telling a reviewer that something waits (promise 9): the only outgoing
# messages. An entry's url, mail or command is filled in with fields made here.
# Of what an agent wrote, only names are sent out and, with details = true, the
# description. Each entry has its own thread, so that one that hangs holds up
# neither a POST nor another entry. The loop writes what became of each notice
# into the audit log, so after a restart it is known which are still owed.

MAX_ANSWER = 200                # bytes of an answer that are kept
MAX_DETAILS = 900               # characters: every receiver accepts this many
MAX_HANGING = 5                 # tries of one entry that may hang at a time
MAX_RETRY_AFTER = 600           # seconds: no receiver silences us for longer


class Pace(NamedTuple):
    """When a notice is tried, in seconds; tests use shorter times."""

    pauses: tuple[float, ...] = (5, 25, 90, 480)    # tries at 0, 5, 30, 120, 600
    window: float = 10          # after a message, until the next
    patience: float = 10        # for the whole of one try


class Answer(NamedTuple):
    """What became of one try."""

    told: bool
    status: str                 # "204", "exit 1", "ConnectionRefusedError"
    text: str = ""
    again: bool = False         # another try may help

    def row(self, name: str) -> tuple[str, dict[str, str]]:
        """The event and the detail for the audit log."""
        if self.told:
            return "notified", {"name": name, "status": self.status}
        detail = {"name": name, "why": self.status, "answer": self.text}
        return "not-notified", {key: text for key, text in detail.items() if text}


class Job(NamedTuple):
    """A notice that an entry owes."""

    request: ReviewRequest
    due: float                  # on the monotonic clock
    tries: int = 0


def notice_fields(requests: list[ReviewRequest], desk_url: str, waiting: int
                  ) -> dict[str, Any]:
    """All that a message can say about these requests; the newest is last."""
    names = {}
    for column in ("tool", "agent", "checkpoint_id", "category"):
        values = {getattr(request, column) or "" for request in requests}
        name = values.pop() if len(values) == 1 else "several"
        # a category is one of ours; agents choose the other names:
        # `https://evil`, `@/etc/passwd` or `-x`
        if column != "category":
            name = re.sub("[^A-Za-z0-9]", "_", name[:64])
        names[column.removesuffix("_id")] = name
    text = [f"{name}: {value or 'none'}" for name, value in names.items()]
    deadline = min((request.deadline for request in requests if request.deadline),
                   default=None)
    if deadline:
        left = unix_time(deadline) - time.time()
        text.append(f"expires in {readable_seconds(max(0, left))}, at "
                    f"{deadline[11:19]} UTC")
    else:
        text.append("no deadline")
    title, url = f"{len(requests)} requests wait", f"{desk_url}/"
    if len(requests) == 1:
        title = f"{names['tool'] or 'A request'} waits for a decision"
        url += f"review/{requests[0].request_id}"
    last = requests[-9:]
    details = "\n".join(one_line(request.action_description,
                                 MAX_DETAILS // len(last) - 1) for request in last)
    return names | {
        "title": title, "text": "\n".join(text), "url": url,
        "request_id": requests[-1].request_id, "status": str(Status.WAITING),
        "deadline": deadline, "waiting": waiting, "details": details}


def notice_mark(outcomes: list[tuple[str, str, str]]) -> str:
    """The mark on a card, from (event, name, status) of its notices: "phone:
    403, nobody was told"; empty if none has failed."""
    told = [name for event, name, _ in outcomes if event == "notified"]
    failed = [f"{name}: {status}" for event, name, status in outcomes
              if event != "notified"]
    if failed:
        verb = "were" if len(told) > 1 else "was"
        failed.append(f"{' and '.join(told) or 'nobody'} {verb} told")
    return ", ".join(failed)


def failure(error: BaseException) -> Answer:
    """An exception as an answer: its class, never its message, which could
    quote a secret. A failure of the network is worth another try."""
    import http.client
    reason = getattr(error, "reason", None)         # urllib's wrapper
    if isinstance(reason, BaseException):
        error = reason
    refused = getattr(error, "recipients", {})      # smtplib's, if all were
    code = max((code for code, _ in refused.values()),
               default=getattr(error, "smtp_code", 0))
    name = type(error).__name__
    if code > 0:
        return Answer(False, f"{code} {name}", again=code < 500)
    return Answer(False, name, again=isinstance(
        error, (OSError, http.client.HTTPException)))


def retry_after(text: str) -> float:
    """A Retry-After, seconds or a date, in seconds from now; 0 if it is junk."""
    from email.utils import parsedate_to_datetime
    seconds = 0.0
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if re.fullmatch("[0-9]{1,9}", text):
            seconds = float(text)
        else:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)


def percent_encoded(text: str) -> str:
    from urllib.parse import quote
    return quote(text, safe="")


class Channel:
    """One [[notify]] entry: fills in its messages and sends them. Only its own
    thread touches `jobs`, the notices that it still owes."""

    def __init__(self, path: Path | None, entry: Mapping[str, Any],
                 environ: Mapping[str, str], pace: Pace | None = None) -> None:
        import queue
        self.entry, self.name, self.pace = entry, str(entry["name"]), pace or Pace()
        self.read_secrets(f'{path}: notify "{self.name}":', environ)
        ways = {"url": self.post, "smtp": self.mail, "command": self.run}
        self.send = next(way for kind, way in ways.items() if entry[kind])
        # a url without a body is for machines: one event for each request
        self.bundles = not entry["url"] or entry["body"] is not None
        self.hanging: list[threading.Thread] = []
        self.inbox: queue.SimpleQueue[Job | str] = queue.SimpleQueue()
        self.jobs: dict[str, Job] = {}              # by request_id
        self.quiet_until = 0.0

    def read_secrets(self, where: str, environ: Mapping[str, str]) -> None:
        """Read the values of the entry's ${NAME}s, which are only ever sent to
        its own receiver; ConfigError if one is missing or unfit."""
        names = PLACEHOLDER.findall(json.dumps(self.entry))
        self.secrets = {name: environ.get(name, "") for name, _ in names if name}
        for name, value in self.secrets.items():
            wrong = ""
            if name in ("HITL_REVIEWER_TOKEN", "HITL_AGENT_TOKEN"):
                wrong, cure = "is a credential of this desk", "send a different one"
            elif not value:
                wrong, cure = "is not set", f"set {name} where `serve` is started"
            elif not value.isprintable():
                wrong = "holds a line break or another invisible character"
                cure = f"set {name} without it"
            if wrong:
                raise ConfigError(f"{where} ${{{name}}} {wrong}", cure)
        self.blotted = {*self.secrets.values()}     # and those of other entries
        for key, check in (("url", notice_url_value), ("smtp", smtp_value),
                           ("sign", sign_value)):
            if self.entry[key]:
                with config_error(f"{where} {key}"):
                    check(self.text(self.entry[key], {}))

    # ---- filling in ----

    def text(self, template: str, fields: Mapping[str, Any]) -> str:
        """A text with its placeholders filled in, in one pass: what is filled
        in is never read as a placeholder itself."""
        def value(found: re.Match[str]) -> str:
            if found[1]:
                return self.secrets[found[1]]
            field = fields.get(found[2], found[0])
            return "" if field is None else str(field)
        return PLACEHOLDER.sub(value, template)

    def filled(self, template: Any, fields: Mapping[str, Any]) -> Any:
        """A body with the strings in it filled in; a string that is nothing
        but a placeholder becomes the field itself, of whatever type."""
        if isinstance(template, dict):
            return {key: self.filled(item, fields)
                    for key, item in template.items()}
        if isinstance(template, list):
            return [self.filled(item, fields) for item in template]
        if not isinstance(template, str):
            return template
        whole = PLACEHOLDER.fullmatch(template)
        if whole and whole[2]:
            return fields[whole[2]]
        return self.text(template, fields)

    def shown(self, answer: bytes) -> str:
        """The beginning of an answer, without any value of a ${NAME}."""
        text = answer.decode("utf-8", "replace").strip()
        for secret in sorted(self.blotted, key=len, reverse=True):
            for form in (secret, percent_encoded(secret), json.dumps(secret)[1:-1]):
                text = text.replace(form, "***")
        return visible(text).encode()[:MAX_ANSWER].decode(errors="ignore")

    # ---- one try ----

    def tell(self, requests: list[ReviewRequest], desk_url: str, waiting: int,
             sample: dict[str, Any] | None = None) -> Answer:
        """Send one message about these requests; `sample` replaces fields. It
        takes `patience` seconds at most, whatever hangs (a dead name server
        included): the thread is left behind, and its answer so far counts."""
        answers = [Answer(False, "TimeoutError", again=True)]
        thread = threading.Thread(target=self.attempt, daemon=True, args=(
            answers, requests, desk_url, waiting, sample))
        self.hanging = [each for each in self.hanging if each.is_alive()]
        if len(self.hanging) < MAX_HANGING:
            self.hanging.append(thread)
            with contextlib.suppress(RuntimeError):     # no more threads
                thread.start()
                thread.join(self.pace.patience)
        answer = answers[-1]        # a program is never started again
        return answer._replace(again=answer.again and not self.entry["command"])

    def attempt(self, answers: list[Answer], requests: list[ReviewRequest],
                desk_url: str, waiting: int, sample: dict[str, Any] | None) -> None:
        """Append what comes of one try to the answers. The message has the
        same id in every try, also after a restart."""
        names = json.dumps([self.name, *(each.request_id for each in requests)])
        message_id = "msg_" + hashlib.sha256(names.encode()).hexdigest()[:32]
        try:
            fields = notice_fields(requests, desk_url, waiting) | (sample or {})
            if not self.entry["details"]:
                del fields["details"]
            event = {"type": "request.waiting", "data": fields,
                     "timestamp": requests[-1].received_at}
            for answer in self.send(event, message_id):
                answers.append(answer)
                if answer.told and not sample:
                    break               # the rest of its answer may never end
        except Exception as error:
            if len(answers) == 1:
                answers.append(failure(error))

    def sample(self, desk_url: str) -> Answer:
        """Send a text that is hard to send, once."""
        now, hard = instant(time.time()), '"quotes", a \\, an emoji \U0001f514'
        request = ReviewRequest(
            f"test-{now}", "waiting", None, "", None, received_at=now, tool="test",
            agent="test", action_description=hard)
        return self.tell([request], desk_url, 1, {
            "title": f"A test of hitl.py: {hard}", "url": f"{desk_url}/",
            "text": f"{hard},\na line break, {{title}}"})

    def post(self, event: dict[str, Any], message_id: str) -> Iterator[Answer]:
        """An HTTP POST, through the environment's proxies. It follows no
        redirects: it goes where the file says."""
        import urllib.request
        fields, body = event["data"], self.entry["body"]
        data = json.dumps(event if body is None else self.filled(body, fields)
                          ).encode()
        headers = {"Content-Type": "application/json",
                   "User-Agent": f"hitl.py/{__version__}"}
        if self.entry["sign"] or body is None:
            headers |= self.signature(message_id, data)
        for name, template in (self.entry["headers"] or {}).items():
            text = " ".join(self.text(template, fields).split())
            headers[name] = text.encode("latin-1", "replace").decode("latin-1")
        url = self.text(self.entry["url"], {
            name: percent_encoded(str(value or "")) for name, value in fields.items()})
        opener = urllib.request.OpenerDirector()
        for handler in (urllib.request.ProxyHandler, urllib.request.HTTPHandler,
                        urllib.request.HTTPSHandler):
            opener.add_handler(handler())
        with opener.open(urllib.request.Request(url, data, headers),
                         timeout=self.pace.patience) as reply:
            status = reply.status
            answer = Answer(200 <= status < 300, str(status),
                            again=status in (408, 425, 429) or status >= 500)
            if answer.again:
                self.quiet_until = time.monotonic() + retry_after(
                    reply.headers["Retry-After"] or "")
            yield answer
            yield answer._replace(text=self.shown(reply.read(4096)))

    def signature(self, message_id: str, data: bytes) -> dict[str, str]:
        """The headers of Standard Webhooks 1.0.0."""
        import base64
        import hmac
        at = str(int(time.time()))
        headers = {"webhook-id": message_id, "webhook-timestamp": at}
        if self.entry["sign"]:
            key = self.text(self.entry["sign"], {}).removeprefix("whsec_")
            signed = hmac.digest(base64.b64decode(key), f"{message_id}.{at}.".encode()
                                 + data, "sha256")
            headers["webhook-signature"] = f"v1,{base64.b64encode(signed).decode()}"
        return headers

    def mail(self, event: dict[str, Any], message_id: str) -> Iterator[Answer]:
        """An e-mail. The server's certificate is checked."""
        import smtplib
        import ssl
        from email.message import EmailMessage
        from urllib.parse import urlsplit
        entry, fields, letter = self.entry, event["data"], EmailMessage()
        letter["Subject"] = fields["title"]
        letter["From"], letter["To"] = entry["from"], ", ".join(entry["to"])
        letter["Date"] = datetime.now(timezone.utc)
        letter["Message-ID"] = f"<{message_id}@hitl.invalid>"
        letter["Auto-Submitted"] = "auto-generated"
        letter.set_content("\n\n".join(filter(None, (
            fields["text"], fields.get("details"), fields["url"]))) + "\n")
        context = ssl.create_default_context()
        where = urlsplit(self.text(entry["smtp"], {}))
        tls: Any = functools.partial(smtplib.SMTP_SSL, context=context)
        connect, port = {"tls": (tls, 465), "starttls": (smtplib.SMTP, 587),
                         "plain": (smtplib.SMTP, 25)}[where.scheme]
        # as localhost: looking up this machine's own name can take minutes
        with connect(str(where.hostname), where.port or port, "localhost",
                     timeout=self.pace.patience) as server:
            if where.scheme == "starttls":
                server.starttls(context=context)
            if entry["login"] is not None:
                server.login(self.text(entry["login"], fields),
                             self.text(entry["password"], fields))
            status, refused = "250", server.send_message(letter)
            if refused:
                status += f", but {len(refused)} refused"
            yield Answer(True, status)

    def run(self, event: dict[str, Any], message_id: str) -> Iterator[Answer]:
        """A program run with its arguments, never through a shell, the event
        on stdin. It gets none of this desk's tokens; a failure is final."""
        import subprocess
        import tempfile
        words = []
        for template in self.entry["command"]:
            word = self.text(template, event["data"])
            if word.startswith("-") and not template.startswith("-"):
                word = f" {word}"       # an agent must not choose options
            words.append(word)
        environ = {name: value for name, value in os.environ.items()
                   if not re.fullmatch("HITL_.*TOKEN", name)}
        # not a pipe, which a program left behind would keep open
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(
                words, input=json.dumps(event).encode(), stdout=output,
                stderr=output, env=environ, timeout=self.pace.patience)
            output.seek(0)
            yield Answer(done.returncode == 0, f"exit {done.returncode}",
                         self.shown(output.read(4096)))

    # ---- what is owed, and when ----

    def wants(self, request: ReviewRequest) -> bool:
        """Whether the entry's filters let a request through."""
        categories, checkpoints = self.entry["category"], self.entry["checkpoint"]
        return ((not categories or request.category in categories)
                and (not checkpoints or request.checkpoint_id in checkpoints))

    def seconds_left(self) -> float:
        """Seconds until the next try."""
        due = min((job.due for job in self.jobs.values()), default=math.inf)
        return max(due, self.quiet_until) - time.monotonic()

    def work(self, notices: Notices) -> None:
        """The entry's thread: listens to the loop, and makes one try after
        another, each when it is due."""
        import queue
        while True:
            with contextlib.suppress(queue.Empty):
                seconds = min(max(0, self.seconds_left()), 3600)
                self.hear(self.inbox.get(timeout=seconds), notices)
            while not self.inbox.empty():
                self.hear(self.inbox.get(), notices)
            if self.seconds_left() <= 0:
                self.try_due(notices)

    def hear(self, news: Job | str, notices: Notices) -> None:
        """Take in a job, or the id of a request that no longer waits: it gets
        no further try and, if its notice was due, a row in the log."""
        if isinstance(news, Job):
            self.jobs[news.request.request_id] = news
            return
        job = self.jobs.pop(news, None)
        if job and (job.tries or job.due <= time.monotonic()):
            notices.report(self.name, [news], Answer(False, "it stopped waiting first"))

    def try_due(self, notices: Notices) -> None:
        """One try: all that is due in one message, or the first event that is
        due. After it, each is either owed again or done with."""
        now, pauses = time.monotonic(), self.pace.pauses
        due = [job for job in self.jobs.values() if job.due <= now]
        if not self.bundles:
            del due[1:]
        answer = self.tell([job.request for job in due], notices.desk_url,
                           len(notices.waiting))
        done = []
        for job in due:
            request_id = job.request.request_id
            if answer.again and job.tries < len(pauses):
                self.jobs[request_id] = Job(
                    job.request, now + pauses[job.tries], job.tries + 1)
            else:
                del self.jobs[request_id]
                done.append(request_id)
        if self.bundles:                # a burst makes one message
            pause = pauses[0] if answer.again else self.pace.window
            self.quiet_until = max(self.quiet_until, now + pause)
        if done:
            notices.report(self.name, done, answer)


def channels_of(path: Path | None, entries: Iterable[Mapping[str, Any]],
                environ: Mapping[str, str]) -> list[Channel]:
    """The entries, ready to send. An answer to one may quote what another has
    from the environment, which a command inherits: no value is ever shown."""
    channels = [Channel(path, entry, environ) for entry in entries]
    values = {value for channel in channels for value in channel.blotted}
    for channel in channels:
        channel.blotted = values
    return channels


class Notices:
    """All the entries. `report`, called from any thread, takes (name,
    request_ids, answer) to the loop, which records them."""

    def __init__(self, channels: list[Channel], rules: Rules, desk_url: str,
                 report: Callable[[str, list[str], Answer], None]) -> None:
        self.channels, self.desk_url, self.report = channels, desk_url, report
        self.known = {c.checkpoint_id: c.category for c in rules.checkpoints}
        self.waiting: set[str] = set()
        for channel in channels:
            threading.Thread(target=channel.work, args=(self,), daemon=True).start()

    def owe(self, request: ReviewRequest, told: Iterable[str] = ()) -> None:
        """A request waits: each entry that wants it and is not in `told` owes
        a notice. Its category is that of the checkpoint in serve's own file,
        if it is there, and not what the agent says."""
        self.waiting.add(request.request_id)
        category = self.known.get(request.checkpoint_id or "", request.category)
        request = request._replace(     # without what is large and never sent
            category=category if category in CATEGORIES else "", arguments=None,
            action_description=request.action_description[:MAX_DETAILS])
        waited = time.time() - unix_time(request.received_at)
        for channel in self.channels:
            if channel.wants(request) and channel.name not in told:
                delay = max(0, channel.entry["after_seconds"] - waited)
                channel.inbox.put(Job(request, time.monotonic() + delay))

    def follow(self, store: Store, changes: list[Change]) -> None:
        """Begin notices for what has begun to wait (not for what was decided
        as it was submitted), and end them for what no longer waits."""
        for change in changes:
            if change.event == "submitted":
                with contextlib.suppress(Refusal, sqlite3.Error):   # still owed
                    request = store.request(change.subject)
                    if request.status == Status.WAITING:
                        self.owe(request)
                continue
            self.waiting.discard(change.subject)
            for channel in self.channels:
                channel.inbox.put(change.subject)


# ================================== Pages ==================================
# What the reviewer sees: the only HTML, made by pure functions from rows.
# Templates are HTML that a designer could read. fill() escapes every value that
# is not Html yet, after visible() has shown what cannot be seen (promise 7). A
# request is one line that opens to everything about it: what will run, who
# asks, what the agent says about it, and the buttons. Where there are buttons,
# nothing of what will run is cut. The page works without its script.

HISTORY_ROWS = 100              # on one page of the history
PAGE_CARDS = 100                # waiting requests on the page at once
PAGE_BYTES = 256 * 1024         # of them together: more is slow to make and load
REVIEWED_CARDS = 20             # reviewed ones below them
WIDE = 76                       # characters of JSON that stay on one line
CONTEXT_SHOWN = 32 * 1024       # characters; of a longer context, both ends
DOT = " \u00b7 "                 # between the parts of a line
FACTS = ("why", "category", "timestamp", "received_at", "asked_by", "session",
         "request_id", "digest", "approved_digest", "checkpoint_digest",
         "config_digest")                       # behind "More"

STYLE = """
:root { color-scheme: light dark; --paper: light-dark(#f6f5f2, #161513);
  --card: light-dark(#fff, #21201d); --ink: light-dark(#1c1b19, #eeebe4);
  --soft: light-dark(#5d5a54, #a8a297); --line: light-dark(#dedbd3, #3a3732);
  --tone: var(--soft); }
.waiting { --tone: light-dark(#8a4a00, #ffb84d); --edge: #f2a100; }
.approved, .approve { --tone: light-dark(#1a7340, #6fd195); }
.rejected, .reject, .stopped, mark { --tone: light-dark(#b3261e, #ff8a7d); }
bdi { --tone: light-dark(#2f5fa8, #9cc0ff); }
.status, .warn, mark, bdi, #lost, #stopped .note { color: var(--tone);
  background: color-mix(in srgb, var(--tone) 12%, var(--card)); }
.waiting .status { background: light-dark(#ffe9b0, #3d2c0c); }

* { box-sizing: border-box; overflow-wrap: anywhere; margin: 0; padding: 0; }
body { margin: auto; padding: 0 16px 48px; max-width: 1080px; color: var(--ink);
  background: var(--paper); font: 15px/1.45 system-ui, sans-serif; }
header, form, .card > summary, li { display: flex; flex-wrap: wrap; gap: 0 12px;
  align-items: center; }
header, form, p, ol, h2 { margin: 6px 0; row-gap: 6px; }
h1 { font-size: 19px; margin-right: auto; }
h2, h3 { font-size: 15px; }
a { color: inherit; }
h1 a { text-decoration: none; }
.soft, .who, .body summary, label, h4, dt, .end { color: var(--soft); }
.soft, .who, .body summary, label, dl, h4, pre, code { font-size: 13.5px; }
:focus-visible { outline: 3px solid #4a86d8; outline-offset: -1px; }

/* a request: one line, opened to everything about it */
.card, .note, li { background: var(--card); border: 1px solid var(--line);
  border-left: 5px solid var(--edge, var(--tone)); font-size: 14px; }
.card + .card, li + li { border-top: 0; }
.card > summary { flex-wrap: nowrap; padding: 5px 10px; }
li { padding: 3px 10px; }
#waiting.many > .card > summary { padding-block: 0; font-size: 13px;
  line-height: 17px; }
.status, .tag { font-size: 12px; font-weight: 600; border-radius: 99px;
  padding: 0 8px; line-height: 16px; min-width: 86px; text-align: center; }
.tag { color: var(--soft); box-shadow: inset 0 0 0 1px var(--line); }
.headline { flex: 1 1 0; min-width: 0; }
summary .headline, .said { font-weight: 600; }
.tool, .agent { max-width: 12em; color: var(--soft); }
summary .tool { font-size: 12px; }
.status, .tag, .left, .card:not([open]) > summary > * { white-space: nowrap;
  overflow: hidden; text-overflow: ellipsis; flex-shrink: 0; }
.card[style][open] { height: var(--tall); overflow: auto; }
.body { padding: 0 10px 4px; }
.body > details:not([open]) { display: inline-block; margin-right: 18px; }
.exact, pre { background: var(--paper); border: 1px solid var(--line);
  border-radius: 6px; padding: 5px 10px; }
.exact pre { background: var(--card); border-left: 3px solid var(--soft); }
pre, code, .exact dl { font-family: ui-monospace, monospace; }
pre, dd, h4 code, .full, .said { color: var(--ink); white-space: break-spaces;
  unicode-bidi: isolate; }
dl { display: grid; grid-template-columns: fit-content(38%) minmax(0, 1fr);
  gap: 1px 12px; }
.block, li .soft, label { grid-column: 1 / -1; flex: 1 1 100%; }
summary :empty, p:empty { display: none; }
.warn, .note { padding: 3px 10px; border-radius: 5px; }
mark, bdi { border-radius: 3px; padding: 0 1px; margin: 0 1px; }
mark { font-size: .85em; }
bdi { text-decoration: underline 1px; text-underline-offset: 3px; }

/* deciding: buttons that have just appeared are dead */
textarea, button, input { font: inherit; color: inherit; padding: 7px 10px;
  border: 1px solid var(--soft); border-radius: 6px; background: var(--paper); }
textarea { flex: 1 1 220px; height: 40px; min-width: 0; }
label textarea { display: block; width: 100%; height: auto; color: var(--ink); }
header input, header button { padding: 3px 10px; max-width: 180px; }
::placeholder { color: var(--soft); opacity: 1; }
button, summary { cursor: pointer; }
main button { font-weight: 600; min-height: 40px; padding: 6px 22px; }
.approve, .reject { color: var(--tone); border-color: var(--tone); }
.body > form > .approve { color: var(--card); background: var(--tone); }
@keyframes appear { 0%, 99% { opacity: .45; pointer-events: none; } }
.card[open] form button { animation: appear .6s; }
#lost { position: fixed; bottom: 0; left: 16px; right: 16px; }
@media (max-width: 640px) {
  body { padding: 0 8px 32px; }
  .card[class] > summary { flex-wrap: wrap; padding-block: 7px; line-height: 1.4; }
  summary .headline, li .headline, li .soft { order: 1; flex: 1 0 100%; }
  .card:not([open]) > summary .headline { white-space: normal; }
  .tool, .agent { order: 2; }
  .left, .when { margin-left: auto; }
  .body form button { flex: 1 1 40%; min-height: 46px; }
  textarea { flex-basis: 100%; font-size: 16px; }
}
"""

# The script sends decisions by fetch, keeps the page live and handles keys. It
# makes no cards, but takes the server's: it replaces one that was decided, and
# adds new ones below the others. Nothing moves under a finger.
SCRIPT = r"""
const first = (css, root = document) => root.querySelector(css);
const every = (css, root = document) => [...root.querySelectorAll(css)];
const lost = first("#lost"), bell = first("#bell"), sent = document.body.dataset;
const skew = sent.at * 1000 - Date.now();         // deadlines are the server's
let change = sent.change, DEAD = 600, REST = 5000;

// A link may hold credentials, and then fetch refuses relative addresses.
const ask = (path, more) => fetch(location.origin + path,
                                  {cache: "no-store", ...more});
async function read(path) {
  const reply = await ask(path);
  if (!reply.ok) throw new Error(reply.status);
  const page = new DOMParser().parseFromString(await reply.text(), "text/html");
  tellTimes("time", page);
  return page;
}
const UNITS = [[86400, "days"], [3600, "h"], [60, "min"], [1, "s"]];
function tellTimes(css, page = document) {
  const now = Date.now() + skew, today = new Date().toDateString();
  for (const time of every(css, page)) {
    const at = new Date(time.dateTime), kind = time.className;
    const seconds = Math.max(0, (kind === "ago" ? now - at : at - now) / 1000);
    const [size, unit] = UNITS.find(([size]) => seconds >= 2 * size || size === 1);
    let words = at.toDateString() === today ? at.toLocaleTimeString()
                                            : at.toLocaleString();
    if (kind) words = `${Math.round(seconds / size)} ${unit} ${kind}`;
    if (time.textContent !== words) time.textContent = words;
  }
}

// ---- deciding ----

const alone = card => read("/review/" + card.id.slice(8));    // on its own page
const reason = card => first("[name=reason]", card)?.value || "";
const tell = (card, text) => first(".said", card).append(text);

const mark = warning => warning.textContent.replace(/\d+ \S+ ago/, "");
// Brings a card up to date from a page just read: one that still waits gets its
// "who" line and new warnings; one that was decided stays as tall and as open as
// it was.
function renew(card, page, decided) {
  const fresh = page.getElementById(card.id), typed = reason(card).trim();
  if (!card.isConnected) return document.getElementById(card.id);
  if (fresh.className === card.className) {
    first(".who", card)?.replaceWith(first(".who", fresh));
    const known = every(".warn", card).map(mark), place =   // where nothing moves
      card.open ? first("main > .card .said") : first(".full", card);
    for (const warning of every(".warn", fresh))
      if (!known.includes(mark(warning))) place?.before(warning);
  }
  if (fresh.className === card.className || fresh.matches(".waiting")) return card;
  const focused = card.contains(document.activeElement);
  fresh.open = card.open;
  fresh.style.setProperty("--tall", card.getBoundingClientRect().height + "px");
  if (typed && !decided && !first(".said", fresh).textContent.includes(typed))
    tell(fresh, `\nYou had typed: ${typed}`);
  card.replaceWith(fresh);
  if (focused) first("summary", fresh).focus({preventScroll: true});
  return fresh;
}
document.addEventListener("submit", async event => {
  const form = event.target, card = form.closest(".card");
  if (!card) return;
  event.preventDefault();
  if (performance.now() - (card.since || 0) < DEAD) return;
  card.since = Infinity;                            // one decision at a time
  first(".said", card).textContent = "";
  const fields = every("[name^='argument:']", card);
  if (event.submitter?.value === "approved" && !fields.some(f => f.form === form)
      && fields.some(f => f.value !== f.defaultValue)) {
    card.since = 0;
    tell(card, "Not decided: you changed arguments. Press \u201cApprove as " +
               "changed\u201d, or undo your changes.");
    return;
  }
  const body = new URLSearchParams(new FormData(form, event.submitter));
  body.set("reason", reason(card));
  try {
    const reply = await ask(new URL(form.action).pathname,
      {method: "POST", body, headers: {Accept: "application/json"}});
    const {title, detail = ""} = await reply.json();
    const fresh = renew(card, await alone(card), reply.ok);
    if (!reply.ok) tell(fresh, `\nNot decided: ${title}. ${detail}`);
  } catch {
    tell(card, "The server does not answer. Your reason is kept: " +
               "decide again when it is back.");
  }
  card.since = 0;
});
document.addEventListener("toggle", event => {
  const card = event.target;
  card.since = performance.now();
  if (card.matches(".waiting[open]:has(:focus-visible)"))     // opened by a key
    card.scrollIntoView({block: "nearest"});
}, true);
document.addEventListener("input", event => {
  const card = event.target.closest(".card");
  if (card) sessionStorage[card.id] = reason(card);
});

// ---- live: the page is read again when something changed, or after a while ----

async function refresh() {
  const page = await read(location.pathname + location.search);
  const news = every("#waiting .card", page).filter(
    card => !document.getElementById(card.id));
  for (const card of news) {
    card.open = !first("#waiting .waiting");
    first("#waiting").append(card);
  }
  for (const css of ["#count", "#reviewed", "#more", "#stopped"]) {
    const part = first(css), now = first(css, page);
    if (part && part.innerHTML !== now.innerHTML)
      part.replaceChildren(...now.childNodes);
  }
  document.title = page.title;
  first("link[rel=icon]").href = first("link[rel=icon]", page).href;
  if (news.length && document.hidden && self.Notification?.permission === "granted")
    new Notification(page.title, {tag: "hitl"});
  for (const card of every(".card")) {
    if (page.getElementById(card.id)) renew(card, page);
    else if (card.matches(".waiting")) renew(card, await alone(card));
  }
}
let poll = new AbortController(), wake = () => {};
const pause = time => new Promise(done => { wake = done; setTimeout(done, time); });
async function live() {
  for (;;) {
    const hidden = document.hidden, wait = hidden || !lost.hidden ? 0 : 25;
    poll = new AbortController();
    try {
      const reply = await ask(`/changes?after=${change}&wait=${wait}`,
                              {signal: poll.signal});
      const now = (await reply.json()).change;
      if (now != change || !hidden) await refresh();
      change = now;
      lost.hidden = true;
      if (hidden) await pause(REST);
    } catch (error) {
      if (error.name === "AbortError") continue;
      lost.hidden = false;
      await pause(REST);
    }
  }
}
document.addEventListener("visibilitychange", () => { poll.abort(); wake(); });

// ---- the keyboard ----

const current = () => document.activeElement.closest(".card");
function go(step) {
  const cards = every("details.card"), next = cards.indexOf(current()) + step;
  const card = cards[Math.max(0, Math.min(cards.length - 1, next))];
  if (card) first("summary", card).focus();
}
function reach(css) {
  const card = current() || first(".card.waiting"), target = card && first(css, card);
  if (!target) return;
  card.open = target.reached = true;                // then Enter rejects
  target.focus();
}
const KEYS = {
  j: () => go(1), k: () => go(-1),
  a: () => reach(".approve"), r: () => reach("[name=reason]"),
  "/": () => first("#q").focus(),
  "?": () => { first("#keys").open = true; first("#keys").scrollIntoView(); },
};
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing) return;
  const field = event.target, key = event.key;
  if (!field.matches("textarea, input")) {
    if (!KEYS[key]) return;
    KEYS[key]();
  } else if (key === "Escape") {
    field.blur();
  } else if (key === "Enter" && field.reached && !event.shiftKey) {
    field.form.requestSubmit(first(".reject", field.form));
  } else {
    return;
  }
  event.preventDefault();
});

// ---- the start ----

bell.hidden = self.Notification?.permission !== "default";
bell.onclick = async () => {
  await Notification.requestPermission();
  bell.hidden = true;
};
tellTimes("time");
setInterval(tellTimes, 1000, "time.left, time.ago");
for (const field of every(".card [name=reason]"))       // after a reload
  field.value ||= sessionStorage[field.closest(".card").id] || "";
if (first("#waiting, main > .card")) live();
"""


def content_hash(text: str) -> str:
    """A hash source of a Content-Security-Policy (W3C CSP3)."""
    import base64
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


CONTENT_POLICY = (
    f"default-src 'none'; style-src {content_hash(STYLE)}; "
    f"script-src {content_hash(SCRIPT)}; connect-src 'self'; img-src data:; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'")


class Html(str):
    """Text that is markup already, and so is not escaped again."""


PLACE = regex(r"\{([a-z_]+)\}")
MARK = regex(f"{BRACKETS[0]}(?:([ -~]+)|([^{BRACKETS[1]}]*)){BRACKETS[1]}")


def fill(template: str, row: object = None, /, **values: Any) -> Html:
    """A template with its {names} filled in; what is not Html is escaped
    (promise 7)."""
    def value_of(found: re.Match[str]) -> Html:
        name = found[1]
        return as_html(values[name] if name in values else getattr(row, name))
    return Html(PLACE.sub(value_of, template))


def as_html(value: Any, between: str = "") -> Html:
    """A value as inert markup: Html is unchanged, a list becomes its parts
    that are not empty, None and False become "", all else visible text."""
    if isinstance(value, Html):
        return value
    if isinstance(value, list):
        return Html(between.join(as_html(part) for part in value if part))
    if value is None or value is False:
        return Html()
    return marked(visible(str(value)))


def escaped(text: str) -> Html:
    """Text as inert markup, each of its characters as it is."""
    return Html(html.escape(text))


def marked(text: str) -> Html:
    """Visible text as inert markup: codes are marked; words of other scripts
    are isolated and, next to letters or digits, keep their brackets."""
    text = escaped(text)
    return Html(MARK.sub(mark, text) if BRACKETS[0] in text else text)


def mark(found: re.Match[str]) -> str:
    if found[1]:
        return f"<mark>{found[1]}</mark>"
    text, start, end = found.string, found.start(), found.end()
    touches = text[max(0, start - 1):start].isalnum() or text[end:end + 1].isalnum()
    return f"<bdi>{found[0] if touches else found[2]}</bdi>"


# ---- arguments and contexts: blocks of text and of JSON ----

def layout(value: Any, depth: int = 0) -> str:
    """JSON laid out for reading: what fits stays on one line, and a longer
    text is broken after its line breaks, which are still shown as escapes."""
    text = READABLE.encode(value)
    if len(text) <= WIDE and "\\n" not in text:
        return text
    outer = "\n" + "  " * min(depth, 4)
    inner = "\n" + "  " * min(depth + 1, 4)
    if isinstance(value, str):
        lines = re.findall(r"[^\n]+\n*|\n+", value)
        return f'"{inner.join(READABLE.encode(line)[1:-1] for line in lines)}"'
    if isinstance(value, dict):
        rows = [f"{READABLE.encode(name)}: {layout(part, depth + 1)}"
                for name, part in value.items()]
    elif isinstance(value, list) and any(
            isinstance(part, (str, dict, list)) for part in value):
        rows = [layout(part, depth + 1) for part in value]
    else:
        return text                     # a list of numbers
    return text[0] + ",".join(inner + row for row in rows) + outer + text[-1]


def stored_json(text: str | None) -> Any:
    """The value of stored JSON; for a damaged row, its text after DAMAGED."""
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return f"DAMAGED: {text}"


def argument_rows(arguments: Any) -> Iterator[tuple[str, str, str]]:
    """Arguments in the order they were sent, as (name, size, visible text);
    the size is a block's, and "" for what fits beside its name. A text is in
    quotes or in a block, so `3` and `"3"` differ."""
    if not isinstance(arguments, dict):
        arguments = {"arguments": str(arguments)}
    for name, value in arguments.items():
        if not isinstance(value, str):
            text = visible_lines(layout(value))
            yield name, f"{len(value)} parts" if "\n" in text else "", text
        elif "\n" in value:
            size = readable_size(len(value.encode("utf-8", "replace")))
            lines = value.count("\n") + 1
            yield name, f"text, {size}, {lines} lines", visible_lines(value)
        else:
            yield name, "", f'"{visible(value)}"'


# ---- the templates ----

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'
  viewBox='0 0 16 16'%3E%3Ccircle cx='8' cy='8' r='7' fill='%23{colour}'/%3E%3C/svg%3E">
<style>{style}</style>
</head>
<body data-change="{change}" data-at="{at}">
<header>
  <h1><a href="/">Review desk</a>
    <span id="count" class="soft" aria-live="polite">{count}</span></h1>
  <button id="bell" type="button" hidden>Notify me</button>
  <a href="/history">History</a>
  <form action="/history" role="search">
    <input id="q" type="search" name="q" value="{q}" placeholder="Search"
      aria-label="Search the history for all of these words">
  </form>
  <span class="soft">{who}</span>
</header>
<main>
<p id="lost" class="note rejected" role="status" hidden>The server does not answer;
this page may be out of date. If this goes on, reload it to sign in again.</p>
<section id="stopped">{stop}</section>
{main}
</main>
<footer class="soft">
<p><a href="/standing">Standing decisions</a></p>
<details><summary>Stop everything</summary>
<form method="post" action="/stop">
  <input name="reason" required maxlength="1000" placeholder="Why"
    aria-label="Why everything is stopped">
  <button class="reject">Stop: reject what waits, refuse all that follows</button>
</form>
</details>
<details id="keys"><summary>Keys</summary>
<p><kbd>j</kbd> <kbd>k</kbd> move, <kbd>Enter</kbd> opens, <kbd>a</kbd> then
<kbd>Enter</kbd> approves, <kbd>r</kbd> goes to the reason and
<kbd>Enter</kbd> rejects, <kbd>Esc</kbd> leaves a field, <kbd>/</kbd> searches,
<kbd>?</kbd> shows this.</p>
</details>
</footer>
<script>{script}</script>
</body>
</html>
"""

STOPPED = """<div class="note rejected"><h3>{who} stopped everything: {reason}</h3>
<p>Since {since}. What waited was rejected; nothing can be asked, approved or
run. Calls already running, and those that no checkpoint names, go on.</p>
{lift}</div>
"""

PROBLEM_NOTE = """<div class="note rejected"><h3>{message}</h3>
<p>{hint}</p>
<p class="soft">{status} {reason} <a href="/">Back to the desk</a></p></div>
"""

LIFT = """<form method="post" action="/lift/{number}"><button
    aria-label="Lift decision {number}">Lift</button></form>"""

DESK = """<section id="waiting" class="{many}">
{waiting}</section>
<div id="more">{more}</div>
<section id="reviewed">{reviewed}</section>
"""

LIST = """<h2>{title}</h2>
<p class="soft">{above}</p>
<ol>
{rows}</ol>
<p>{below}</p>
"""

ROW = """<li class="{status}">
  <span class="status">{status}</span>
  <span class="headline">{headline}</span>
  <span class="when">{when}</span>
  {form}
  <span class="soft">{how}</span>
</li>
"""

CARD = """<details class="card {state}" id="request-{request_id}"{open}>
  <summary>
    <span class="status">{status}</span>
    <span class="tag">{category}</span>
    <span class="headline" id="headline-{request_id}">{headline}</span>
    <code class="tool">{tool}</code>
    <span class="agent">{agent}</span>
    {left}
  </summary>
  <div class="body">
  {warnings}
  <p class="full">{full}</p>
  {exact}
  <p class="who">{who}</p>
  {folds}
  {forms}
  <p class="said" role="status">{said}</p>
  </div>
</details>
"""

WARNING = """<p class="warn {kind}">{text}</p>
  """

LARGE = """<p>This request is large: {size}. <a href="/review/{request_id}">Read
all of it and decide</a>.</p>"""

UNSHOWN = """<p class="card rejected" id="request-{request_id}">This request
cannot be shown: {request_id}</p>
"""

EXACT = """<section class="exact"><h4>{title} <code>{tool}</code></h4>
    <dl>{rows}</dl>
  </section>"""

ARGUMENT = "<dt>{name}</dt><dd>{text}</dd>\n    "

BLOCK = """<div class="block"><dt>{name}: {size}</dt>
    <dd><pre>
{text}</pre><span class="end">end of {name}</span></dd></div>
    """

CONTEXT = """<details><summary>Context, {size}: {first}</summary>
    <pre>
{context}</pre>
    <p class="soft">{left_out}</p>
  </details>
  """

MORE = """<details><summary>More</summary>
    <dl>{facts}</dl>
    {rule}
  </details>"""

ALLOW = """<p>To let this call run unasked, whatever other arguments it has, put
    this above the other checkpoints:</p>
    <pre>[[checkpoint]]
checkpoint_id = "allow-{short}"
action_pattern = '{tool}'
effect = "allow"
description_template = "allowed by hand"
arguments = { {patterns} }</pre>"""

DECISION_FORM = """<form id="{kind}-{request_id}" method="post"
    action="/approve/{request_id}">
    <input type="hidden" name="shown_at" value="{shown_at}">
    <input type="hidden" name="digest" value="{digest}">
    {fields}
    <button class="approve" name="decision" value="approved"
      aria-describedby="headline-{request_id}">{label}</button>
    {reject}
  </form>
  """

REASON = """<textarea name="reason" rows="1" maxlength="1000"
      placeholder="Reason" aria-label="Reason (optional)"
      aria-describedby="headline-{request_id}">
{typed}</textarea>"""

REJECT = """<button class="reject" name="decision" value="rejected"
      aria-describedby="headline-{request_id}">Reject</button>"""

# `remember_seconds` 0: this decision does not stand for other calls.
ASK_AGAIN = """<label><input form="decide-{request_id}" type="checkbox"
    name="remember_seconds" value="0"> If I reject this call, ask me again
    next time; otherwise the rejection answers it for ten minutes</label>
  """

REMEMBER = Html("""<input type="hidden" name="remember_seconds" value="3600">
    <input type="hidden" name="remember_uses" value="10">""")

EDIT_HINT = Html("""<p class="soft">Change what is to run, then approve it here: the
      other buttons are for the call as it was asked.</p>
    """)

# `argument:NAME` holds a text as it is, any other argument as JSON. Arguments
# without a field stay as they are. Browsers send line breaks as CR LF.
EDIT_FIELD = """<label>{name}
      <textarea name="argument:{field}" rows="{rows}">
{value}</textarea></label>
    """


# ---- the pages ----

class Offers(NamedTuple):
    """What a card may offer, by the strictest of the rules that apply."""

    decidable: bool = True              # by this reviewer
    remember: bool = False              # the decision can stand for the same call
    files: bool = False                 # ... but files it uses may differ by then
    editable: bool = False              # the arguments can be changed


class View(NamedTuple):
    """What a page needs to know besides the rows themselves."""

    who: str = ""                       # the reviewer who is signed in
    at: float = 0.0                     # now, in Unix seconds
    attended: Container[str] = ()       # request_ids that somebody waits for
    failed_notices: Callable[[str], str] = lambda request_id: ""    # as a mark
    decided: Callable[[ReviewRequest], ReviewRequest | None] = (
        lambda request: None)           # the same call, when last decided
    rules: Rules = Rules(())            # the desk's own
    change: int = 0                     # what GET /changes counts
    waiting: int = 0                    # how many requests wait
    offers: Callable[[ReviewRequest], Offers] = lambda request: Offers()
    stop: Standing | None = None        # the stop in force


def page(view: View, title: str, main: Html, q: str = "") -> Html:
    waits = view.waiting
    stop = view.stop and fill(
        STOPPED, view.stop, who=person(view.stop.made_by), lift=fill(LIFT, view.stop),
        since=moment(view.stop.made_at), reason=view.stop.reason or "no reason given")
    return fill(
        PAGE, view, title=title, main=main, style=Html(STYLE), script=Html(SCRIPT),
        colour="f2a100" if waits else "888", q=escaped(q), stop=stop,
        count=f"{waits} waiting" if waits else "",
        who=view.who and f"signed in as {view.who}")


def desk_page(view: View, waiting: list[ReviewRequest],
              reviewed: list[ReviewRequest], start: int = 0) -> Html:
    """What waits, with its buttons, and what was reviewed last."""
    waiting, count = fitting(waiting), view.waiting
    more, end = Html(""), start + len(waiting)
    if not count:
        more = Html('<p class="soft">Nothing waits. New requests appear here'
                    "<noscript> when you reload</noscript>.</p>")
    elif end < count:
        more = fill('<a class="note waiting" href="/?from={end}">{left} more '
                    "wait</a>", end=end, left=count - end)
    cards = [safely(card, request, view, opened=not n, whole=False)
             for n, request in enumerate(waiting)]
    title = f"({count}) Review desk" if count else "Review desk"
    below = reviewed and fill(LIST, title="Reviewed", above=None, below=None,
                              rows=[safely(reviewed_row, row) for row in reviewed])
    many = "many" if len(waiting) > 12 else ""      # makes the lines less tall
    return page(view, title, fill(DESK, many=many, more=more, waiting=cards,
                                  reviewed=below))


def fitting(waiting: list[ReviewRequest]) -> list[ReviewRequest]:
    """The first ones, up to PAGE_BYTES; large ones (links) do not count."""
    room, fit = PAGE_BYTES, []
    for request in waiting:
        if request.size <= LARGE_BYTES:
            room -= request.size
        if room < 0:
            break
        fit.append(request)
    return fit


def review_page(view: View, request: ReviewRequest) -> Html:
    """One request with everything about it, and then the buttons."""
    return page(view, f"{request.status}: {request.request_id}",
                safely(card, request, view))


def problem_page(status: int, refusal: Refusal,
                 view: View | None = None, typed: str = "") -> Html:
    """Why something was refused and, if it was a decision, the request's card
    again, with the reason that was typed."""
    view, request = view or View(), refusal.about
    return page(view, f"{status} {refusal.reason}", as_html([
        fill(PROBLEM_NOTE, refusal, status=status),
        request and safely(card, request, view, typed=typed)]))


def history_page(view: View, found: Found, asks: Mapping[str, str]) -> Html:
    """What was reviewed, latest first, and how far back the search went."""
    from urllib.parse import urlencode
    q, status = asks.get("q", ""), asks.get("status", "")

    def link(words: str, **changed: str) -> Html:
        query = urlencode({"q": q, "status": status} | changed)
        return fill('<a href="/history?{query}">{words}</a>', words=words,
                    query=escaped(query))
    above = [link(word or "any status", status=word)
             for word in ("", *Status) if word != Status.WAITING]
    older, back = Html(""), Html("Searched everything that was reviewed.")
    if found.next:
        at, number = found.next
        back = fill("Searched back to {at}.", at=moment(at))
        older = link("Older", before=f"{at}_{number}")
    return page(view, "History", fill(
        LIST, title=f"History {status}", above=as_html([*above, back], DOT),
        rows=[safely(reviewed_row, row) for row in found.rows], below=older), q=q)


def reviewed_row(request: ReviewRequest) -> Html:
    """A line with who decided, why and what came of it."""
    return fill(ROW, request, headline=headline_link(request), form=None,
                when=moment(request.decided_at), how=endings(request))


def headline_link(request: ReviewRequest) -> Html:
    return fill('<a href="/review/{request_id}">{headline}</a>', request,
                headline=marked(one_line(request.action_description)))


def standing_page(view: View, standing: list[tuple[Standing, int]],
                  calls: Mapping[str, ReviewRequest]) -> Html:
    """The decisions that answer later calls too, each with how often it did;
    `calls` are the requests that they were made on, by id."""
    rows = []
    for row, used in standing:
        what, until = Html("every call"), Html("until it is lifted")
        if row.request_id:
            what = safely(headline_link, calls[row.request_id])
        if row.until:
            until = fill("until {at}", at=moment(row.until))
        times = f"used {used} of {row.uses} times" if row.uses else f"used {used} times"
        how = as_html([f"number {row.number}", f"by {person(row.made_by)}",
                       fill("since {at}", at=moment(row.made_at)), times,
                       row.reason and f"reason: {row.reason}"], DOT)
        rows.append(fill(ROW, status=row.decision, headline=what, when=until,
                         form=fill(LIFT, row), how=how))
    return page(view, "Standing decisions", fill(
        LIST, title="Standing decisions", rows=rows, below=None,
        above="Each answers later calls by itself." if rows else "There are none."))


def safely(show: Callable[..., Html], request: ReviewRequest, *more: Any,
           **how: Any) -> Html:
    """show(request), or that it failed: one bad row never hides the others."""
    try:
        return show(request, *more, **how)
    except Exception:
        log.exception("a request cannot be shown")
        return fill(UNSHOWN, request)


# ---- a request ----

def card(request: ReviewRequest, view: View, opened: bool = True,
         whole: bool = True, typed: str = "") -> Html:
    """A request: its line, what will run, who asks and why, the buttons. A
    large one has buttons only on its own page, which shows the `whole` of it
    (promise 7). Without buttons, a reason that was `typed` is shown as plain
    text."""
    headline, full = one_line(request.action_description), Html()
    if headline != visible(request.action_description):
        full = marked(full_description(request))
    tool, category = request.tool or "", ""
    if headline.startswith(tool):
        tool = ""
    if request.category in CATEGORIES:
        category = request.category
    waits, folds, forms = request.status == Status.WAITING, None, None
    cut = request.size > LARGE_BYTES and not whole
    if cut:
        exact = fill(LARGE, request, size=readable_size(request.size))
    else:
        asked = what_was_asked if whole else what_was_asked_cached
        exact, folds = asked(request)
        if waits and request.intact and view.offers(request).decidable:
            forms = decision_forms(view, request, typed)
    said = [not waits and endings(request),
            typed and not forms and f"You had typed: {typed}"]
    return fill(
        CARD, request, state=f"{request.status} {request.outcome or ''}".strip(),
        open=Html(" open" if opened else ""), category=category, tool=tool,
        headline=marked(headline), full=full,
        left=waits and moment(request.deadline, "left", view.at),
        warnings=[fill(WARNING, kind=kind, text=text)
                  for kind, text in warnings(view, request, cut) if text],
        exact=exact, who=who_line(view, request), folds=folds, forms=forms,
        said=as_html(said, DOT))


def warnings(view: View, request: ReviewRequest,
             cut: bool) -> Iterator[tuple[str, str]]:
    """What a reviewer must not miss, each with the status that colours it."""
    bad = Status.REJECTED           # a cut request has no arguments to check
    if not cut and not request.intact:
        yield bad, "DAMAGED: what is stored is not what was asked"
    if request.status in (Status.WAITING, Status.EXPIRED):
        yield bad, view.failed_notices(request.request_id)
    if request.status != Status.WAITING:
        return
    if before := view.decided(request):
        how = str(before.status)
        if before.approved_digest:
            how += ", with changed arguments,"
        yield before.status, fill(
            "the same call was {how} {ago}{why}",
            how=f"{how} by {decider(before)}",
            ago=moment(before.decided_at, "ago", view.at),
            why=before.reason and f": {before.reason}")
    if not cut and not view.offers(request).decidable:
        yield bad, "only the reviewers that its checkpoint names can decide this"
    name = request.checkpoint_id
    if view.rules.path and name not in (None, *OURS):
        own = {c.checkpoint_id: c.digest for c in view.rules.checkpoints}
        if name not in own:
            yield bad, f'this desk does not know the checkpoint "{name}"'
        elif request.checkpoint_digest not in (None, own[name]):
            yield bad, "the agent's rules and this desk's differ"


def who_line(view: View, request: ReviewRequest) -> Html:
    """Who asks, under which checkpoint, since when, until when."""
    waits, attended = request.status == Status.WAITING, "an agent waits for it"
    if request.request_id not in view.attended:
        attended = "nobody waits for it now: an approval runs nothing by itself"
    asked_by = person(request.asked_by)
    if asked_by == "unauthenticated":
        asked_by = "unauthenticated agent"
    return as_html([
        f"{request.agent or 'an agent'} ({asked_by})",
        request.checkpoint_id and f"under {request.checkpoint_id}",
        fill("asked {ago}, {at}", at=moment(request.received_at),
             ago=moment(request.received_at, "ago", view.at)),
        waits and request.deadline and fill("until {at}", at=moment(request.deadline)),
        waits and attended], DOT)


def full_description(request: ReviewRequest) -> str:
    """The description, without the arguments that are blocks below it."""
    text, arguments = request.action_description, stored_json(request.arguments)
    if isinstance(arguments, dict):
        for name, value in arguments.items():
            if isinstance(value, str) and "\n" in value.strip():
                text = text.replace(value.strip(), f"({name}: see below)")
    return visible_lines(text)


def what_was_asked(request: ReviewRequest) -> tuple[Html, Html]:
    """What does not change on a card that waits: the exact call, and what is
    folded away (the context, if the agent sent one, and other facts)."""
    title = "Exactly this:"
    if request.status == Status.WAITING:
        title = "Runs exactly this:"
    rows: Any = Html("<em>no arguments</em>")
    if request.runs is not None:
        rows = [fill(BLOCK if size else ARGUMENT, name=name, size=size,
                     text=marked(text))
                for name, size, text in argument_rows(stored_json(request.runs))]
    exact = fill(EXACT, title=title, rows=rows or "no arguments: {}",
                 tool=request.tool or Html("<em>no tool</em>"))
    facts = [fill(ARGUMENT, name=name, text=getattr(request, name))
             for name in FACTS if getattr(request, name)]
    return exact, as_html([
        request.agent_context != "null" and folded_context(request),
        fill(MORE, facts=facts, rule=allow_rule(request))])


def folded_context(request: ReviewRequest) -> Html:
    """The agent's context, folded away; of a large one, both ends."""
    context, left_out = request.agent_context, ""
    size = readable_size(len(context.encode()))
    if len(context) > CONTEXT_SHOWN:
        half = CONTEXT_SHOWN // 2
        context = f"{context[:half]}\n... left out ...\n{context[-half:]}"
        left_out = f"All of it: python3 hitl.py show {request.request_id} --json"
    else:
        context = layout(stored_json(context))
    first = re.sub(r"^[\[{]\n *", "", context).partition("\n")[0][:WIDE]
    return fill(CONTEXT, size=size, first=first, left_out=left_out,
                context=marked(visible_lines(context)))


# An open page is made again at each change, and this is most of the work.
what_was_asked_cached = functools.lru_cache(maxsize=2 * PAGE_CARDS)(what_was_asked)


def decision_forms(view: View, request: ReviewRequest, typed: str) -> Html:
    """The buttons and, folded below them, the other ways to decide."""
    offers, ways = view.offers(request), []

    def form(kind: str, label: str, fields: Any, reject: Any = None) -> Html:
        return fill(DECISION_FORM, request, kind=kind, label=label, fields=fields,
                    reject=reject, shown_at=instant(view.at))
    # a form sends its own fields; the script sends the reason with each of them
    unscripted = fill("<noscript>{reason}</noscript>", reason=fill(
        REASON, request, typed=""))
    if offers.remember:
        files = ", whatever its files contain by then" if offers.files else ""
        label = "Approve, and the same call for 1 hour, at most 10 times" + files
        ways = [fill(ASK_AGAIN, request), form("remember", label, [
            REMEMBER, unscripted])]
    if offers.editable and request.arguments is not None:
        ways.append(form("edit", "Approve as changed", [
            EDIT_HINT, *edit_fields(stored_json(request.arguments)), unscripted]))
    return as_html([
        form("decide", "Approve", fill(REASON, request, typed=escaped(typed)),
             fill(REJECT, request)),
        ways and fill("<details><summary>Other ways to decide</summary>{ways}"
                      "</details>", ways=ways)])


def edit_fields(arguments: dict[str, Any]) -> Iterator[Html]:
    """A field for each argument in which every character can be seen: a text
    as it is, any other value as JSON."""
    for name, value in arguments.items():
        text = value if isinstance(value, str) else READABLE.encode(value)
        if editable_text(name) and editable_text(text):
            rows = min(12, text.count("\n") + 1 + len(text) // 80)
            yield fill(EDIT_FIELD, name=name, field=escaped(name), rows=rows,
                       value=escaped(text))


def allow_rule(request: ReviewRequest) -> Html | None:
    """The rule that would let this call run unasked, to paste into the file: a
    lasting yes is written by a person."""
    arguments = stored_json(request.arguments)
    if not request.tool or not arguments or not isinstance(arguments, dict):
        return None
    if not all(isinstance(value, str) and re.fullmatch("[A-Za-z_][0-9A-Za-z_]*", name)
               for name, value in arguments.items()):
        return None
    patterns = ", ".join(f"{name} = '{exact_pattern(value)}'"
                         for name, value in arguments.items())
    return fill(ALLOW, short=request.digest[:12], patterns=patterns,
                tool=exact_pattern(request.tool))


def exact_pattern(text: str) -> str:
    """A pattern for this text alone, in ASCII, for TOML's 'single quotes'."""
    text = re.sub(r"[.^$*+?{}\[\]\\|()]", r"\\\g<0>", text)
    return re.sub("[^ -~]|'", lambda found: f"\\U{ord(found[0]):08x}", text)


def moment(text: str | None, kind: str = "", now: float = 0.0) -> Html:
    """An instant in UTC, or how much time is `left` until it, or how long
    `ago` it was. The script updates these two and makes instants local."""
    if text is None:
        return Html('<span class="left">no deadline</span>' if kind else "")
    words = datetime.fromisoformat(text).strftime("%d %b %Y, %H:%M:%S UTC")
    if kind:
        seconds = unix_time(text) - now
        seconds = max(0, seconds if kind == "left" else -seconds)
        words = f"{readable_seconds(seconds)} {kind}"
    return fill('<time class="{kind}" datetime="{text}">{words}</time>', kind=kind,
                text=text, words=words)


def decider(request: ReviewRequest) -> str:
    how = f" ({request.signed_in})" if request.signed_in else ""
    return person(request.decided_by) + how


def endings(request: ReviewRequest) -> Html:
    """Who decided, why, and what came of it."""
    said = {Status.EXPIRED: "nobody decided in time",
            Status.WITHDRAWN: "nobody waited any more"}
    came = [request.outcome, request.outcome_text]
    if request.handed_over and request.outcome == Outcome.RUNNING:
        came = ["handed over"]
    return as_html([
        said.get(Status(request.status), f"{request.status} by {decider(request)}"),
        request.standing and f"standing decision {request.standing}",
        request.reason and f"reason: {request.reason}",
        changes_in_words(person(request.decided_by), request.arguments,
                         request.approved_arguments),
        request.outcome and "outcome: " + ": ".join(filter(None, came))], DOT)


# ============================ Rights and routes ============================
# The desk's answers, without a socket: what a request's head may contain, who
# sent it, whether they may ask that, and what the Store and the Pages answer.
# http.server's own parser is lenient (two Content-Lengths, Transfer-Encoding
# ignored, a bare CR ends a line: cpython#150499), so heads are parsed here.
# ROUTES is the table of rights: what it does not list is refused (promise 5).

MAX_HEAD = 16 * 1024            # bytes: browsers stay below 8 KiB
MAX_FIELDS = 64                 # header fields: browsers send about 20
MAX_BODY = 1 << 20              # bytes: context, arguments and their escapes
MAX_LINE = 120                  # characters of a description in a printed line
MAX_POLL_SECONDS = 60           # one long poll; proxies cut longer ones
RECENT_SECONDS = 10             # after a poll this recent somebody still waits
LISTED = 500                    # waiting requests in one JSON answer
SEEN_SECONDS = 0.6              # a card must be seen: a double click is faster
MAX_RULINGS = 1_000             # calls whose checkpoints are remembered
MAX_FORM_FIELDS = 256           # the arguments of a call, and a few more
SELDOM = ("said_at", "approved_digest")     # left out of a reply if empty


class Route(NamedTuple):
    method: str
    path: str
    who: str
    answer: str


ROUTES = (
    #     method  path                     who         answered by
    Route("POST", "/pending",              "agent",    "post_pending"),
    Route("GET",  "/pending/{request_id}", "agent",    "get_pending"),
    Route("POST", "/claim/{request_id}",   "agent",    "post_claim"),
    Route("POST", "/outcome/{request_id}", "agent",    "post_outcome"),
    Route("POST", "/withdraw/{request_id}", "agent",   "post_withdraw"),
    Route("POST", "/approve/{request_id}", "reviewer", "post_approve"),
    Route("GET",  "/pending",              "reviewer", "get_waiting"),
    Route("GET",  "/",                     "reviewer", "get_desk"),
    Route("GET",  "/review/{request_id}",  "reviewer", "get_review"),
    Route("GET",  "/history",              "reviewer", "get_history"),
    Route("GET",  "/changes",              "reviewer", "get_changes"),
    Route("GET",  "/standing",             "reviewer", "get_standing"),
    Route("POST", "/lift/{number}",        "reviewer", "post_lift"),
    Route("POST", "/stop",                 "reviewer", "post_stop"),
    Route("GET",  "/healthz",              "anyone",   "get_healthz"),
)
BY_PATH: dict[str, dict[str, Route]] = {}       # "/claim/" -> method -> Route
for _route in ROUTES:
    BY_PATH.setdefault(_route.path.partition("{")[0], {})[_route.method] = _route


class Principal(NamedTuple):
    """Who asks: `agent:...` or `reviewer:...`, and how that is known."""

    kind: str
    name: str
    signed_in: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"


class Missing(dict[str, str]):
    """A dict in which what was not sent reads as ""."""

    def __missing__(self, name: str) -> str:
        return ""


class HttpRequest(NamedTuple):
    """A request's head and, once it is admitted, its route and who sent it.
    The names of headers are in lower case."""

    method: str = ""
    path: str = ""
    query: Missing = Missing()
    headers: Missing = Missing()
    content_type: str = ""
    length: int = 0
    close: bool = True
    route: Route = Route("", "", "", "")
    request_id: str = ""
    who: Principal = Principal("nobody", "")

    def wants(self, content_type: str) -> bool:
        return content_type in self.headers["accept"]

    @property
    def by_button(self) -> bool:
        """Whether a page's form sent this, and so expects a page in answer."""
        return self.content_type == FORM and self.wants("text/html")


# ---- the head of a request ----

REQUEST_LINE = regex(rb"([A-Z]{1,20}) (/[!-~]*) HTTP/1\.([01])")
FIELD = regex(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):"
                   rb"[ \t]*+([!-~\x80-\xff][ \t!-~\x80-\xff]*+)?")
NOT_HTTP = regex(rb"\A[^A-Z]|\r(?!\n)(?!\Z)|(?<!\r)\n")
READ_ONCE = frozenset((
    "host", "content-length", "content-type", "authorization", "origin",
    "sec-fetch-site", "sec-fetch-dest", "transfer-encoding", "expect"))


def bad_head(what: str) -> Refusal:
    return Refusal("bad-request", what, "send plain HTTP/1.1, as curl does")


def parse_head(head: bytes) -> HttpRequest:
    """A request's head, strictly (RFC 9112): what is ambiguous is refused,
    never repaired, because two parsers that repair differently see two
    different requests (request smuggling)."""
    line, *lines = head.split(b"\r\n")
    start = REQUEST_LINE.fullmatch(line)
    if start is None:
        raise bad_head("malformed request line")
    if len(lines) > MAX_FIELDS:
        raise Refusal("head-too-large", f"more than {MAX_FIELDS} header lines")
    headers = Missing()
    for line in lines:
        parts = FIELD.fullmatch(line)
        if parts is None:
            raise bad_head("malformed header line")
        name = parts[1].decode("ascii").lower()
        if name in headers and name in READ_ONCE:
            raise bad_head(f"{name} appears twice")
        value = (parts[2] or b"").rstrip(b" \t").decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    old = start[3] == b"0"              # HTTP/1.0
    if old:
        headers["expect"] = ""
    elif "host" not in headers:
        raise bad_head("there is no Host header")
    if "transfer-encoding" in headers:
        raise Refusal("bad-request", "Transfer-Encoding is not accepted",
                      "send the body with a Content-Length")
    length = headers.get("content-length", "0")
    if not re.fullmatch("[0-9]{1,12}", length, re.ASCII):
        raise bad_head("Content-Length is not a number")
    path, _, query = start[2].partition(b"?")
    return HttpRequest(
        start[1].decode("ascii"), path.decode("ascii"), pairs_in(query), headers,
        headers["content-type"].partition(";")[0].strip().lower(), int(length),
        old or "close" in headers["connection"].lower())


def pairs_in(data: bytes) -> Missing:
    """The names and values of a query or a form."""
    if not data:
        return Missing()
    from urllib.parse import parse_qsl
    try:
        return Missing(unique_pairs(parse_qsl(
            data.decode("ascii"), keep_blank_values=True, errors="strict",
            max_num_fields=MAX_FORM_FIELDS)))
    except ValueError:
        raise Refusal("bad-request", "the query or form cannot be read",
                      "send name=value&name=value, each name once") from None


def route_of(http: HttpRequest) -> tuple[Route, str]:
    """The row of ROUTES for a path and method, and the request_id."""
    stem, slash, name = http.path[1:].partition("/")
    methods = BY_PATH.get(f"/{stem}{slash}")
    if methods is None:
        raise Refusal("no-such-route", "there is no such route", "see the README: "
                      "POST /pending, POST /approve/{request_id}, GET /")
    if http.method not in methods:
        raise Refusal("wrong-method", f"this path does not take {http.method}",
                      f"use {' or '.join(methods)}",
                      headers=f"Allow: {', '.join(methods)}\r\n")
    if "%" in name:                     # some clients send : as %3A
        from urllib.parse import unquote
        name = unquote(name)
    if slash and not REQUEST_ID.fullmatch(name):
        raise Refusal("unknown", "this is not a request_id",
                      "1 to 128 of A-Z a-z 0-9 . _ : -")
    return methods[http.method], name


# ---- who asks, and from where ----

class Tokens(NamedTuple):
    """Who may sign in, as SHA-256 in hex: tokens themselves are not kept."""

    agents: Mapping[str, str]       # by name; if empty, agents need no token
    named: Mapping[str, str]        # each reviewer's own
    shared: str | None              # or one that fits any reviewer's name


def token_hash(token: str | bytes) -> str:
    if isinstance(token, str):
        token = token.encode("utf-8", "surrogatepass")
    return hashlib.sha256(token).hexdigest()


def fresh_token() -> str:
    import secrets
    return secrets.token_urlsafe(32)        # 256 bits


def identify(authorization: str, tokens: Tokens) -> Principal | None:
    """Whose credentials these are; None if nobody's. Digests are compared, in
    constant time and as ASCII (compare_digest refuses other text)."""
    import base64
    from hmac import compare_digest
    scheme, _, value = authorization.partition(" ")
    reviewer, token = "", value.strip().encode("latin-1")
    if scheme.lower() == "basic":
        try:
            name, _, token = base64.b64decode(token, validate=True).partition(b":")
            reviewer = name.decode() or "reviewer"
        except ValueError:
            return None
    elif scheme.lower() != "bearer":
        return None
    known = token_hash(token)
    for agent, own in tokens.agents.items():
        if compare_digest(known, own):
            return Principal("agent", agent)
    expected, how = tokens.shared, "shared token"
    if reviewer in tokens.named:
        expected, how = tokens.named[reviewer], "own token"
    fits = reviewer.isprintable() and 0 < len(reviewer) <= 64
    if fits and expected and compare_digest(known, expected):
        return Principal("reviewer", reviewer, how)
    return None


def authority(text: str, scheme: str = "") -> tuple[str, str]:
    """Host and port of a Host header, or of an Origin after its scheme, which
    leaves out its default port; ("", "") for anything else."""
    found = re.fullmatch(HOST, text, re.ASCII)
    if found is None:
        return "", ""
    ports = {"http": "80", "https": "443"}
    return found[1].lower(), found[2] or ports.get(scheme, "")


def check_origin(headers: Missing, url: str) -> None:
    """Refusal if another site's page sent this (CSRF). Browsers say so in
    Sec-Fetch-Site, older ones in Origin; a request with neither is not from a
    browser. Behind a proxy the scheme that we see is not the page's."""
    ours, origin = True, headers["origin"]
    if "sec-fetch-site" in headers:
        ours = headers["sec-fetch-site"] == "same-origin" and origin != "null"
    elif "origin" in headers:
        scheme, _, place = origin.partition("://")
        its = authority(place, scheme)
        ours = its[0] != "" and its in (
            authority(headers["host"], scheme),
            authority(url.partition("://")[2], scheme))
    if not ours:
        raise Refusal("cross-site", "another site's page sent this",
                      "decide on the page itself, opened at its own address; "
                      "if you did, put that address under [server] in "
                      'checkpoints.toml: public_url = "https://desk.example.org"')


def check_host(host: str, url: str) -> None:
    """Refusal for a host name that is not ours, where no credentials are
    needed: DNS rebinding needs a foreign name (CVE-2025-49596)."""
    import ipaddress
    name, _ = authority(host)
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name.strip("[]"))
        return
    if name != "localhost" and host.lower() != url.partition("://")[2].lower():
        raise Refusal(
            "wrong-host", f'this server is not "{visible(host[:200])}"',
            "sign in with a token or, if that is a name of this server, put under "
            "[server] in checkpoints.toml: public_url = "
            f'"http://{visible(host[:80])}"')


# ---- what a body says ----

REQUIRED_FIELDS = ("request_id", "action_description", "agent_context", "timestamp")
OPTIONAL_FIELDS = {
    "tool": MAX_NAME, "agent": MAX_NAME, "checkpoint_id": MAX_NAME,
    "category": MAX_NAME, "why": MAX_WHY, "config_digest": MAX_NAME,
    "session": MAX_SESSION, "checkpoint_digest": 64}
PENDING_FIELDS = frozenset((
    *REQUIRED_FIELDS, *OPTIONAL_FIELDS, "arguments", "timeout_seconds", "digest",
    "attach", "edits"))
TEXTS = OPTIONAL_FIELDS | {     # in any body: the most bytes of each
    "action_description": MAX_DESCRIPTION, "reason": MAX_WHY, "text": MAX_WHY,
    "digest": 64, "claim": MAX_NAME, "shown_at": 40}
OTHERS = {                      # fields that are not texts: type, name, example
    "arguments": (dict, "an object", '{"name": value, ...}'),
    **dict.fromkeys(("attach", "edits", "handed_over"),
                    (bool, "true or false", "true"))}


def bad_field(name: str, must: str, cure: str = "") -> Refusal:
    return Refusal("bad-field", f'"{visible(name[:80])}" must be {must}',
                   cure or f'send "{name}": ...')


def field(body: Mapping[str, Any], name: str, needed: bool = False) -> Any:
    """A field of a body, checked for its type and limit; None if it is blank
    or left out, unless it is needed."""
    value = body.get(name)
    kind, must, example = OTHERS.get(name, (str, "a string", '"..."'))
    blank = kind is str and isinstance(value, str) and not value.strip()
    if (value is None or blank) and not needed:
        return None
    if blank or type(value) is not kind:
        raise bad_field(name, must, f'send "{name}": {example}')
    if isinstance(value, str) and len(value.encode()) > TEXTS[name]:
        raise Refusal("too-large", f'"{name}" is over {TEXTS[name]} bytes',
                      "send less")
    return value


def reason_in(asks: Mapping[str, Any]) -> str | None:
    return (field(asks, "reason") or "").strip() or None


def number_in(query: Missing, name: str, pattern: str = "[0-9]{1,15}") -> float:
    """A number in a query, a whole one unless `pattern` allows more; 0 if it
    is left out."""
    if name not in query:
        return 0.0
    text = query[name]
    if not re.fullmatch(pattern, text, re.ASCII):
        raise bad_field(name, "a number", f"ask for ?{name}=5")
    return float(text)


def wait_in(query: Missing) -> float:
    """For how many seconds a poll may be held."""
    seconds = number_in(query, "wait", r"[0-9]{1,9}(\.[0-9]{1,9})?")
    return min(seconds, MAX_POLL_SECONDS)


def parse_body(http: HttpRequest, body: bytes) -> dict[str, Any]:
    """The fields of a JSON object, or of a form."""
    if http.content_type == FORM:
        if body.lstrip()[:1] == b"{":
            raise Refusal("wrong-type", "this is JSON, sent as a form",
                          "add -H 'Content-Type: application/json'")
        return pairs_in(body)
    try:
        value = parse_json(body)
    except ValueError as error:
        raise Refusal("bad-json", f"the body is not strict JSON: {error}",
                      "send one JSON object, in UTF-8") from None
    if not isinstance(value, dict):
        raise Refusal("bad-json", "the body is not a JSON object",
                      'send {"name": value, ...}')
    return value


def asked_from(body: dict[str, Any], by: Principal, at: float,
               now: str) -> ReviewRequest:
    """What POST /pending asks for, each field checked; Refusal with a cure."""
    # 1. everything that is required, and nothing unknown
    for name in REQUIRED_FIELDS:
        if name not in body:
            raise Refusal("missing-field", f'"{name}" is missing',
                          f"required fields: {', '.join(REQUIRED_FIELDS)}")
    if extra := body.keys() - PENDING_FIELDS:
        raise Refusal("bad-field", f'unknown field "{visible(min(extra)[:80])}"',
                      f"known fields: {', '.join(sorted(PENDING_FIELDS))}")
    # 2. each field
    request_id, timeout = body["request_id"], body.get("timeout_seconds")
    if not isinstance(request_id, str) or not REQUEST_ID.fullmatch(request_id):
        raise Refusal("bad-field", f'"request_id" {ID_RULE}', "a UUID is fine")
    texts: dict[str, Any] = {
        name: field(body, name) for name in OPTIONAL_FIELDS if name in body}
    tool = texts.get("tool")
    description = field(body, "action_description", True)
    arguments = field(body, "arguments")
    context = READABLE.encode(body["agent_context"])
    try:
        timestamp = parse_timestamp(body["timestamp"])
    except ValueError as error:
        raise Refusal("bad-field", str(error), f'write it as "{now}"') from None
    if timeout is not None and (type(timeout) not in (int, float)
                                or not 0 < timeout < MAX_YEARS * YEAR_SECONDS):
        raise bad_field(
            "timeout_seconds", f"a number above 0 and below {MAX_YEARS} years",
            "leave it out for no deadline")
    # 3. the call: its size, and the digest that names it
    text = arguments if arguments is None else canonical(arguments)
    if text and len(text) > MAX_ARGUMENTS:
        limit = arguments_limit(tool, arguments)
        if len(text) > limit:
            raise Refusal("too-large", f"arguments over {limit} bytes",
                          "pass a reference, such as a file's name and SHA-256")
    digest = digest_of(description, text, tool)
    if body.get("digest") not in (None, digest):
        raise Refusal("bad-digest", "the digest sent is not that of the "
                      "action_description, arguments and tool sent",
                      f"it would be {digest}")
    return ReviewRequest(
        request_id, Status.WAITING, None, digest,
        timeout and instant(at + timeout), received_at=now, timestamp=timestamp,
        asked_by=str(by), **texts, action_description=description,
        arguments=text and as_sent(arguments), agent_context=context,
        edits=1 if field(body, "edits") else None,
        size=sum(len((part or "").encode()) for part in (
            description, text, context, texts.get("why"))))


def as_json_says(form: Mapping[str, str], arguments: str | None) -> dict[str, Any]:
    """A page's form as the JSON that says the same. `remember` comes in two
    fields (null if the seconds are 0 or blank), each argument in one: a text
    as it is (with CR LF for a line break), any other value as JSON."""
    asks: dict[str, Any] = dict(form)
    changed, name = json.loads(arguments or "{}"), "remember"
    try:
        if "remember_seconds" in form:
            bounds = {key: parse_json(form[f"remember_{key}"])
                      for key in ("seconds", "uses") if form.get(f"remember_{key}")}
            asks["remember"] = bounds if bounds.get("seconds") else None
        for key, text in form.items():
            if key.startswith("argument:"):
                name = key.removeprefix("argument:")
                if isinstance(changed.get(name), str):
                    changed[name] = text.replace("\r\n", "\n")
                else:
                    changed[name] = parse_json(text)
                asks["arguments"] = changed
    except ValueError as error:
        raise bad_field(name, f"JSON: {error}", "change only its values") from None
    return asks


# ---- the answers ----

# Security headers, the same on every answer. No CORS, no cookie, ever.
SECURITY = (
    # only the page's own style and script, by hash; nothing from elsewhere
    f"Content-Security-Policy: {CONTENT_POLICY}\r\n"
    "X-Content-Type-Options: nosniff\r\n"       # JSON is never read as HTML
    "X-Frame-Options: DENY\r\n"         # for browsers that ignore the policy
    # not no-referrer: that makes a form's Origin "null" (seen in Chromium)
    "Referrer-Policy: same-origin\r\n"
    "Cross-Origin-Opener-Policy: same-origin\r\n"
    "Cross-Origin-Resource-Policy: same-origin\r\n"
    "Cache-Control: no-store\r\n")
JSON, HTML = "application/json", "text/html; charset=utf-8"
PROBLEM = "application/problem+json"
FORM = "application/x-www-form-urlencoded"
SIGN_IN = {         # the challenge for each kind, and the cure in words
    "agent": ('WWW-Authenticate: Bearer realm="hitl.py"\r\n',
              "send -H 'Authorization: Bearer TOKEN' with the HITL_AGENT_TOKEN "
              "of serve; if it has none, send no credentials"),
    "reviewer": ('WWW-Authenticate: Basic realm="hitl.py", charset="UTF-8"\r\n',
                 "sign in as a reviewer: curl -u reviewer:TOKEN ...; serve "
                 "printed the token")}
STORAGE_FAILED = Refusal(
    "storage-failed", "the database could not store this; none of it is kept",
    "check the disk, and other programs that write to it, then send this again")


@functools.lru_cache(maxsize=64)
def head_of(status: int, content_type: str, close: bool, second: int) -> bytes:
    """The head of an answer, except for its own headers and its length."""
    from email.utils import formatdate
    from http import HTTPStatus
    return (f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
            f"Date: {formatdate(second, usegmt=True)}\r\n"
            f"Content-Type: {content_type}\r\n{SECURITY}"
            f"Connection: {'close' if close else 'keep-alive'}\r\n").encode()


class Poll(NamedTuple):
    """An answer that waits until something changes."""

    http: HttpRequest           # run again then; without a request_id: any change
    seconds: float              # at most


class Desk:
    """Who may do what, and the answers. It knows no socket: a request's head
    and body come in, an answer goes out as bytes, or as a Poll."""

    def __init__(self, store: Store, tokens: Tokens, url: str,
                 rules: Rules) -> None:
        self.store, self.tokens, self.url = store, tokens, url
        self.rules, self.rules_seen = rules, rules.digest       # serve's own
        self.admit = functools.lru_cache(maxsize=512)(self.judge)
        self.ruling = functools.lru_cache(maxsize=MAX_RULINGS)(self.find_ruling)
        self.has_limits = any(c.reviewers or c.editable or not c.remember
                              for c in rules.checkpoints)
        self.parked: Iterable[str] = ()       # request_ids that polls wait for
        self.polled_until: dict[str, float] = {}    # request_id -> monotonic
        store.desk_digest = self.ruling_digest

    @property
    def attended(self) -> set[str]:
        """What somebody waits for, in a poll that is parked or was recent."""
        return {*self.parked, *self.polled_until}

    def rules_edited(self) -> bool:
        """Whether the file has just changed, and is not what is in use now."""
        before = self.rules_seen
        if self.rules.path:
            with contextlib.suppress(OSError):
                self.rules_seen = hashlib.sha256(
                    self.rules.path.read_bytes()).hexdigest()
        return self.rules_seen not in (before, self.rules.digest)

    def close_overdue(self) -> bool:
        """Close requests past their deadline, approvals nobody claimed, and
        what a stop rejects -> whether there may be more. Raises what a failing
        database raises."""
        now, until = time.monotonic(), self.polled_until
        self.polled_until = {r: end for r, end in until.items() if end > now}
        overdue = self.store.overdue()
        for request in overdue:
            self.store.attempt(self.store.close_overdue, request)
        return len(overdue) >= CLOSED_A_TURN

    # ---- who may do what ----

    def judge(self, data: bytes) -> HttpRequest:
        """A head as a request, with its route and principal; Refusal unless it
        may be answered. All of this is decided before a byte of the body is
        read, and depends on nothing but the head's bytes: a client sends the
        same head again and again, and admit() remembers the verdict."""
        http = parse_head(data)
        route, request_id = route_of(http)
        posts = http.method == "POST"
        if posts:
            check_origin(http.headers, self.url)
        who = self.principal(route.who, http.headers)
        kinds = (JSON, FORM) if route.who == "reviewer" else (JSON,)
        if posts and http.content_type not in kinds:
            raise Refusal("wrong-type", f"this is not {JSON}",
                          f"add -H 'Content-Type: {JSON}'")
        if posts and "content-length" not in http.headers:
            raise Refusal("length-required", "there is no Content-Length", "send one")
        if http.length and not posts:
            raise bad_head("a GET has no body")
        if http.length > MAX_BODY:
            raise Refusal("too-large", f"the body is over {MAX_BODY} bytes",
                          "send less context")
        return http._replace(route=route, request_id=request_id, who=who)

    def principal(self, kind: str, headers: Missing) -> Principal:
        """Who asks, if of the kind that the route is for (promise 5)."""
        if kind == "anyone":
            return Principal("nobody", "")
        challenge, cure = SIGN_IN[kind]
        if "authorization" not in headers:
            if kind == "agent" and not self.tokens.agents:
                check_host(headers["host"], self.url)
                return Principal("agent", "unauthenticated")
            raise Refusal("not-signed-in", f"this is for the {kind}", cure,
                          headers=challenge)
        who = identify(headers["authorization"], self.tokens)
        if who is None:
            if headers["sec-fetch-dest"] == "empty":
                challenge = 'WWW-Authenticate: Script realm="hitl.py"\r\n'
            raise Refusal("wrong-credentials", "these credentials are not known "
                          "here", cure, headers=challenge)
        if who.kind != kind:
            raise Refusal("not-your-route", f"this is for the {kind}, "
                          f"and these are the {who.kind}'s credentials", cure)
        return who

    def find_ruling(self, named: str | None, tool: str | None, text: str | None
                    ) -> tuple[list[Checkpoint], bool]:
        """The desk's own checkpoints for a call (the one that the agent names
        and, if any of them limits decisions, all that match), and whether the
        call is a shell command. The strictest counts: an agent does not choose
        its rules by naming them."""
        call = tool or "", stored_json(text) or {}
        found = [each for each in self.rules.checkpoints
                 if each.checkpoint_id == named]
        # only then: matching takes time, and an agent writes what is matched
        if self.has_limits:
            found += self.rules.all_holding(*call)
        return found, bool(Call(*call).texts("shell"))

    def ruling_digest(self, request: ReviewRequest) -> str | None:
        """The digest of the desk's own checkpoints for a call: a standing
        decision ends when it changes."""
        ruling, _ = self.ruling(request.checkpoint_id, request.tool, request.arguments)
        digests = sorted({checkpoint.digest for checkpoint in ruling})
        return sha256_of(digests) if digests else None

    def offers(self, request: ReviewRequest, name: str) -> Offers:
        """What this reviewer may decide about a request."""
        ruling, shell = self.ruling(
            request.checkpoint_id, request.tool, request.arguments)
        return Offers(
            decidable=all(not c.reviewers or name in c.reviewers for c in ruling),
            remember=bool(request.session) and all(c.remember for c in ruling),
            files=shell,
            editable=bool(request.edits and ruling) and all(
                c.editable for c in ruling))

    # ---- answers ----

    def answer(self, http: HttpRequest, body: bytes) -> bytes | Poll:
        """Run a route, inside a savepoint if it can change something. The
        client is answered only after the commit."""
        try:
            if http.method == "POST":
                return self.store.attempt(self.answered, http, body)
            return self.answered(http, body)
        except sqlite3.Error as error:
            log.error("the database fails: %s", visible(str(error)))
            return self.problem(http, STORAGE_FAILED)
        except Exception:
            log.exception("a fault of ours in %s", http.route.answer)
            return self.problem(http, Refusal(
                "internal", "a fault in the server; nothing was changed",
                "see the server's log"))

    def answered(self, http: HttpRequest, body: bytes) -> bytes | Poll:
        """A route's answer; a refusal is one, too, and undoes no change."""
        route: Callable[..., bytes | Poll] = getattr(self, http.route.answer)
        try:
            if http.method == "POST":
                return route(http, parse_body(http, body))
            return route(http, http.query)
        except Refusal as refusal:
            return self.problem(http, refusal)

    def problem(self, http: HttpRequest, refusal: Refusal, **more: Any) -> bytes:
        """A refusal as problem+json (RFC 9457), or as a page for a person."""
        status = REFUSALS[refusal.reason]
        headers = refusal.headers
        if status in (429, 503):
            headers += "Retry-After: 5\r\n"
        if http.wants("text/html"):
            return self.reply(http, problem_page(status, refusal), status, headers)
        if refusal.about:
            more["request"] = self.shape(refusal.about)
        return self.reply(http, {
            "type": "about:blank", "title": refusal.message, "status": status,
            "reason": refusal.reason,
            "detail": refusal.hint or refusal.message, **more}, status, headers)

    def reply(self, http: HttpRequest, value: Any, status: int = 200,
              headers: str = "") -> bytes:
        """A whole answer: a page, the summary of a request, or any JSON."""
        kind = PROBLEM if status >= 400 else JSON
        if isinstance(value, Html):
            kind, text = HTML, str(value)
        elif isinstance(value, ReviewRequest):
            text = self.shape_json(value)
        else:
            text = json.dumps(value)
        body = text.encode()
        return b"%b%bContent-Length: %d\r\n\r\n%b" % (
            head_of(status, kind, http.close, int(self.store.time)),
            headers.encode("latin-1", "replace"), len(body), body)

    def settled(self, http: HttpRequest, path: str, value: Any) -> bytes:
        """What a reviewer's POST did; a page's form goes on to `path`."""
        if http.by_button:
            return self.reply(http, Html(), 303, f"Location: {path}\r\n")
        return self.reply(http, value)

    def shape(self, request: ReviewRequest) -> dict[str, Any]:
        """The one shape of every reply about a request."""
        said: dict[str, Any] = json.loads(self.shape_json(request))
        return said

    def shape_json(self, request: ReviewRequest) -> str:
        """shape() as JSON; written out for speed: every poll needs it."""
        members = [f'"{name}": {"null" if value is None else json_text(str(value))}'
                   for name, value in zip(SUMMARY, request, strict=False)
                   if value is not None or name not in SELDOM]
        url = json_text(f"{self.url}/review/{request.request_id}")
        return f'{{{", ".join(members)}, "url": {url}}}'

    # ---- the routes: an agent's ----

    def post_pending(self, http: HttpRequest, asks: dict[str, Any]) -> bytes:
        asked = asked_from(asks, http.who, self.store.time, self.store.now)
        summary, new = self.store.submit(asked, bool(field(asks, "attach")))
        if not new:
            return self.reply(http, summary)
        if self.has_limits and asked.size <= LARGE_BYTES:
            # matched now, at the agent's cost: a page may list a hundred
            self.ruling(asked.checkpoint_id, asked.tool, asked.arguments)
        return self.reply(http, summary, 201,
                          f"Location: /review/{asked.request_id}\r\n")

    def get_pending(self, http: HttpRequest, asks: Missing) -> bytes | Poll:
        summary = self.store.summary(http.request_id, str(http.who))
        wait = wait_in(asks)
        if summary.status == Status.WAITING:
            if wait:
                return Poll(http._replace(query=Missing()), wait)
            self.polled_until[http.request_id] = time.monotonic() + RECENT_SECONDS
        return self.reply(http, summary)

    def post_claim(self, http: HttpRequest, asks: dict[str, Any]) -> bytes:
        request = self.store.claim(
            http.request_id, field(asks, "digest", True), field(asks, "claim", True),
            str(http.who), bool(field(asks, "handed_over")))
        if request.approved_arguments is None:
            return self.reply(http, request)
        return self.reply(http, self.shape(request) | {
            "arguments": stored_json(request.approved_arguments)})

    def post_outcome(self, http: HttpRequest, asks: dict[str, Any]) -> bytes:
        if asks.get("outcome") not in ("executed", "failed"):
            raise bad_field("outcome", "executed or failed",
                            'send {"claim": "...", "outcome": "executed"}')
        return self.reply(http, self.store.finish(
            http.request_id, field(asks, "claim", True), Outcome(asks["outcome"]),
            field(asks, "text") or "", str(http.who)))

    def post_withdraw(self, http: HttpRequest, asks: dict[str, Any]) -> bytes:
        return self.reply(http, self.store.withdraw(
            http.request_id, field(asks, "why") or "", str(http.who)))

    # ---- the routes: what a reviewer decides ----

    def post_approve(self, http: HttpRequest, asks: dict[str, Any]) -> bytes:
        """A decision, as JSON or by a page's form, which leads to the desk."""
        if asks.get("decision") not in ("approved", "rejected"):
            raise Refusal("bad-decision", '"decision" must be "approved" or '
                          '"rejected"', 'send {"decision": "approved"} or '
                          '{"decision": "rejected", "reason": "..."}')
        try:
            return self.settled(http, "/", self.decided(http, asks))
        except Refusal as refusal:
            if not http.by_button or refusal.reason == "unknown":
                raise
            refusal.about = self.store.request(http.request_id, columns=WHOLE)
            status = REFUSALS[refusal.reason]
            return self.reply(http, problem_page(
                status, refusal, self.view(http), asks.get("reason", "")), status)

    def decided(self, http: HttpRequest, asks: dict[str, Any]) -> ReviewRequest:
        """The request, decided. A form says when its card was shown: nobody
        can decide on a card before they can have read it."""
        request = self.store.request(http.request_id)
        shown_at = field(asks, "shown_at")
        if http.content_type == FORM:
            try:
                seen = parse_timestamp(shown_at) <= instant(
                    self.store.time - SEEN_SECONDS)
            except ValueError:
                seen = False
            if not seen:
                raise refused("too-fast", request)
            asks = as_json_says(asks, request.arguments)
        # 1. may this reviewer decide it, and in this way?
        decision = Status(asks["decision"])
        offers = self.offers(request, http.who.name)
        if not offers.decidable:
            raise refused("not-your-request", request)
        arguments = field(asks, "arguments")
        rejects = decision == Status.REJECTED
        if arguments is not None and (rejects or not offers.editable):
            raise refused("not-editable", request)
        # 2. does the decision stand? A rejection does by default
        bounds = None
        if asks.get("remember") is not None:
            bounds = bounds_from(asks["remember"], decision)
            if not offers.remember:
                raise refused("not-remembered", request)
        elif rejects and offers.remember and "remember" not in asks:
            bounds = REJECTION_STANDS
        # 3. decide it
        return self.store.decide(
            http.request_id, decision, str(http.who), reason=reason_in(asks),
            signed_in=http.who.signed_in, shown_at=shown_at,
            digest=field(asks, "digest", offers.editable),
            arguments=arguments, remember=bounds)

    def post_stop(self, http: HttpRequest, asks: dict[str, Any]) -> bytes:
        row = self.store.stop(str(http.who), reason_in(asks), http.who.signed_in)
        return self.settled(http, "/", self.standing_shape(row, self.store.used(row)))

    def post_lift(self, http: HttpRequest, asks: dict[str, Any]) -> bytes:
        if not re.fullmatch("[0-9]{1,15}", http.request_id, re.ASCII):
            raise Refusal("unknown", "this is not a number",
                          "`python3 hitl.py standing` lists them")
        row = self.store.lift(int(http.request_id), str(http.who))
        return self.settled(http, "/standing", self.standing_shape(
            row, self.store.used(row)))

    # ---- the routes: what a reviewer reads ----

    def get_waiting(self, http: HttpRequest, asks: Missing) -> bytes:
        """What waits, in the order of the page; `next` is where to go on."""
        start = int(number_in(asks, "from"))
        rows = self.store.waiting(LISTED + 1, start, self.attended)
        return self.reply(http, {
            "waiting": list(map(self.listed, rows[:LISTED])),
            "next": start + LISTED if len(rows) > LISTED else None})

    def get_changes(self, http: HttpRequest, asks: Missing) -> bytes | Poll:
        """A page's poll: answered as soon as anything has changed."""
        wait = wait_in(asks)
        if number_in(asks, "after") == self.store.head.sequence and wait:
            return Poll(http._replace(query=Missing()), wait)
        return self.reply(http, {"change": self.store.head.sequence})

    def get_standing(self, http: HttpRequest, asks: Missing) -> bytes:
        rows = self.store.standing()
        if not http.wants(JSON):
            calls = {row.request_id: self.store.request(row.request_id, columns=BRIEF)
                     for row, _ in rows if row.request_id}
            return self.reply(http, standing_page(self.view(http), rows, calls))
        return self.reply(http, {
            "standing": [self.standing_shape(*row) for row in rows]})

    def standing_shape(self, row: Standing, used: int) -> dict[str, Any]:
        return {name: getattr(row, name) for name in (
            "number", "decision", "made_by", "made_at", "until", "uses",
            "request_id", "reason", "lifted_at")} | {"used": used}

    def listed(self, request: ReviewRequest) -> dict[str, Any]:
        return self.shape(request) | {
            "action_description": request.action_description,
            "tool": request.tool, "arguments": stored_json(request.arguments),
            "agent": request.agent, "checkpoint_id": request.checkpoint_id,
            "received_at": request.received_at,
            "large": request.size > LARGE_BYTES}      # then its url has it all

    def get_desk(self, http: HttpRequest, asks: Missing) -> bytes:
        start = int(number_in(asks, "from"))
        return self.reply(http, desk_page(
            self.view(http), self.store.waiting(PAGE_CARDS, start, self.attended),
            self.store.reviewed(REVIEWED_CARDS).rows, start))

    def get_review(self, http: HttpRequest, asks: Missing) -> bytes:
        """All about a request, as a page, or as JSON with the longer ids that
        begin with its own."""
        longer = self.store.beginning_with(http.request_id)
        try:
            request = self.store.request(http.request_id, columns=WHOLE)
        except Refusal as refusal:
            return self.problem(http, refusal, longer_ids=longer)
        if not http.wants(JSON):
            return self.reply(http, review_page(self.view(http), request))
        return self.reply(http, request._asdict() | self.listed(request) | {
            "longer_ids": longer,
            "agent_context": stored_json(request.agent_context), "claim": None,
            "attended": request.request_id in self.attended,
            "notices": self.failed_notices(request.request_id)})

    def get_history(self, http: HttpRequest, asks: Missing) -> bytes:
        """What was reviewed, with all words of `q` and with this `status`."""
        behind = re.fullmatch("([0-9TZ:.-]{24})_([0-9]{1,18})", asks["before"])
        before = (behind[1], int(behind[2])) if behind else None
        found = self.store.reviewed(HISTORY_ROWS, before, asks["q"], asks["status"])
        if not http.wants(JSON):
            return self.reply(http, history_page(self.view(http), found, asks))
        return self.reply(http, {
            "reviewed": list(map(self.listed, found.rows)),
            "next": found.next and "_".join(map(str, found.next))})

    def view(self, http: HttpRequest) -> View:
        return View(http.who.name, self.store.time, self.attended,
                    failed_notices=self.failed_notices,
                    decided=self.store.asked_before,
                    rules=self.rules, change=self.store.head.sequence,
                    waiting=self.store.waiting_count,
                    offers=lambda request: self.offers(request, http.who.name),
                    stop=self.store.stop_in_force)

    def failed_notices(self, request_id: str) -> str:
        """The mark on a request whose notices failed, else ""."""
        return notice_mark(self.store.notices_of(request_id))

    def get_healthz(self, http: HttpRequest, asks: Missing) -> bytes:
        self.store.reviewed(0)          # the database answers, or 503
        return self.reply(http, {"status": "ok"})


# ================================== Loop ===================================
# The listening socket: http.server's HTTPServer binds it, asyncio serves it.
# Whole requests queue up. A turn takes them, reviewers' first, runs them in
# one SQLite transaction, and answers only after its COMMIT: a group commit
# without a second thread, locks or races. A waiting agent is a parked
# connection, not a thread. A client that is slow, silent or greedy is dropped
# when its time or its share is used up.


class Limits(NamedTuple):
    """What clients may cost each other, in seconds, connections and bytes."""

    request_seconds: float = 15     # from a request's first byte to its last
    idle_seconds: float = 75        # to take an answer, or send the next request
    linger_seconds: float = 2       # to let a refused client read the refusal
    slow_seconds: float = 1         # before wrong credentials are answered
    handshake_seconds: float = 5    # for TLS
    drain_seconds: float = 5        # for the last answers when stopping
    sweep_seconds: float = 0.25     # how often deadlines are checked
    connections: int = 8000         # each a file descriptor and a page of memory
    unread_bytes: int = 64 << 20    # of all unanswered requests together


LIMITS = Limits()
TURN_SECONDS = 0.03             # then commit and answer: 50 ms with its last request
BREAK_SECONDS = 0.001           # between turns: a reviewer's request may come in
ACCEPTED = 64                   # connections accepted in one round of asyncio
BACKLOG = 1024                  # connections not accepted yet: a burst of agents


class Connection:
    """One client, as asyncio's Protocol: bytes come in, whole requests go to
    the queue. One request at a time, so answers keep their order.
    """

    __slots__ = ("loop", "transport", "inbox", "searched", "http", "poll", "timer",
                 "reading", "answering", "close_connection", "trusted", "expires_at")

    def __init__(self, loop: Loop) -> None:
        self.loop, self.inbox = loop, bytearray()
        self.searched = 0               # no head ends before this byte
        self.http: HttpRequest | None = None    # once its head is here
        self.poll: Poll | None = None   # while it is parked
        self.timer: Any = None          # of the poll
        self.reading = True             # if not, what still comes in is discarded
        self.answering = False          # it waits for an answer, or for TLS
        self.close_connection = False   # after the next answer
        self.trusted = False            # a reviewer signed in here
        self.expires_in(loop.limits.request_seconds)

    def expires_in(self, seconds: float) -> None:
        """After this time sweep() drops it, unless something comes first."""
        self.expires_at = self.loop.clock() + seconds

    # ---- what asyncio calls ----

    def connection_made(self, transport: Any) -> None:
        loop, self.transport = self.loop, transport
        loop.connections[self] = None
        loop.make_room()
        if loop.tls:
            self.answering = True
            transport.pause_reading()
            loop.asyncio_loop.create_task(self.shake_hands())

    def data_received(self, data: bytes) -> None:
        if not self.reading:
            return
        if not (self.inbox or self.http):
            self.expires_in(self.loop.limits.request_seconds)
        self.inbox += data
        self.advance()
        self.loop.count_unread(len(data))
        if self.answering and len(self.inbox) > MAX_HEAD + 2 * MAX_BODY:
            self.drop()                 # it sends on without waiting for answers

    def eof_received(self) -> bool:
        self.close_connection = True    # an answer on its way is still given
        return self.answering and not (self.poll or self.loop.tls)

    def connection_lost(self, error: Exception | None) -> None:
        """The client is gone, and nothing is kept of it."""
        self.loop.connections.pop(self, None)
        self.http, self.reading = None, False
        self.inbox.clear()
        self.unpark()

    def pause_writing(self) -> None:
        """Answers are written whole; sweep() drops whoever takes none."""

    resume_writing = pause_writing

    async def shake_hands(self) -> None:
        """Put TLS between the socket and this connection."""
        loop: Any = self.loop
        try:
            transport = await loop.asyncio_loop.start_tls(
                self.transport, self, loop.tls, server_side=True,
                ssl_handshake_timeout=loop.limits.handshake_seconds,
                ssl_shutdown_timeout=loop.limits.linger_seconds)
        except OSError:                 # ssl.SSLError is one
            transport = None
        if transport is None:
            self.drop()
            return
        self.transport, self.answering = transport, False
        self.advance()

    # ---- a request comes in ----

    def advance(self) -> None:
        """Queue the next request, if all of it is here and the one before is
        answered."""
        if self.answering:
            return
        if self.http is None:
            self.read_head()
        if self.http and len(self.inbox) >= self.http.length:
            self.answering = True
            self.close_connection = self.close_connection or self.http.close
            self.expires_in(self.loop.limits.idle_seconds)
            self.loop.queues[0 if self.trusted else 1].append(self)
            self.loop.turn_soon()

    def read_head(self) -> None:
        """Take the next head out of the inbox, if all of it is here; a request
        that is not admitted is refused."""
        head = b""
        try:
            head = self.next_head()
            if not head:
                return
            self.http = http = self.loop.desk.admit(head)
        except Refusal as refusal:
            self.refuse(head, refusal)
            return
        self.trusted = self.trusted or http.who.kind == "reviewer"
        if http.headers["expect"].lower() == "100-continue":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def next_head(self) -> bytes:
        """The next head, if all of it is here, else b"". Only new bytes are
        searched: a head may come byte by byte."""
        start = max(0, self.searched - 3)
        end = self.inbox.find(b"\r\n\r\n", start, MAX_HEAD + 4)
        if end == 0:
            raise bad_head("there is no request line")
        if end > 0:
            head = bytes(self.inbox[:end])
            del self.inbox[:end + 4]
            self.searched = 0
            return head
        if len(self.inbox) > MAX_HEAD:
            raise Refusal("head-too-large", f"the head is over {MAX_HEAD} "
                          "bytes", "send fewer or shorter headers")
        if NOT_HTTP.search(self.inbox, start):
            raise bad_head("this is not HTTP, or its lines do not end in "
                           "CR LF (https needs tls_certificate, or a proxy)")
        self.searched = len(self.inbox)
        return b""

    def refuse(self, head: bytes, refusal: Refusal) -> None:
        """Answer a request that is not admitted, slowly if its credentials are
        wrong. Nobody is locked out: an agent could lock out the reviewer."""
        self.reading, self.answering, self.close_connection = False, True, True
        self.inbox.clear()
        http, seconds = HttpRequest(), 0.0
        with contextlib.suppress(Refusal):
            http = parse_head(head)._replace(close=True)
        if refusal.reason == "wrong-credentials":
            seconds = self.loop.limits.slow_seconds
        self.loop.asyncio_loop.call_later(
            seconds, self.send, self.loop.desk.problem(http, refusal))

    def take(self) -> tuple[HttpRequest, bytes] | None:
        """The queued request and its body; None if the client is gone."""
        http, self.http = self.http, None
        if http is None:
            return None
        body = bytes(self.inbox[:http.length])
        del self.inbox[:http.length]
        return http, body

    # ---- an answer goes out ----

    def give(self, answer: bytes | Poll) -> None:
        """Send an answer, or hold a poll until its request changes or its time
        is up."""
        if isinstance(answer, bytes):
            self.send(answer)
            return
        self.poll = answer
        self.timer = self.loop.asyncio_loop.call_later(answer.seconds, self.release)
        self.loop.waiters.setdefault(answer.http.request_id, {})[self] = None

    def unpark(self) -> Poll | None:
        """Take it out of the table of polls -> its poll, if it had one."""
        poll, self.poll = self.poll, None
        if poll:
            self.timer.cancel()
            about = poll.http.request_id
            del self.loop.waiters[about][self]
            if not self.loop.waiters[about]:
                del self.loop.waiters[about]
        return poll

    def release(self) -> None:
        """Answer a parked poll with its request as it is now."""
        if poll := self.unpark():
            self.give(self.loop.desk.answer(poll.http, b""))

    def send(self, answer: bytes) -> None:
        """Write the answer; then comes the next request, or the end."""
        connections, limits = self.loop.connections, self.loop.limits
        self.transport.write(answer)
        self.answering = False
        self.expires_in(limits.idle_seconds)
        if not self.close_connection:
            if self in connections:         # it is the youngest again
                connections[self] = connections.pop(self)
            if self.inbox:
                self.loop.asyncio_loop.call_soon(self.advance)
        elif not self.reading and self.transport.can_write_eof():
            # more may be on its way: closing now would reset the connection,
            # and the answer would be lost
            self.expires_in(limits.linger_seconds)
            with contextlib.suppress(OSError):      # the client has gone already
                self.transport.write_eof()
        else:
            self.transport.close()

    def drop(self) -> None:
        """Close it at once; only a parked poll is answered first."""
        if self.poll:
            self.close_connection = True
            self.release()
        else:
            self.connection_lost(None)
            self.transport.abort()


class Loop:
    """The connections, and the turns that answer them; the answers are the
    Desk's. open_desk() makes one."""

    def __init__(self, socket: Any, desk: Desk, limits: Limits,
                 say: Callable[[str], None] | None, tls: Any) -> None:
        import asyncio
        self.socket, self.server_port = socket, socket.getsockname()[1]
        self.desk, self.url = desk, desk.url
        self.limits, self.say = limits, say
        self.tls = tls                  # an ssl.SSLContext, or None
        self.notices: Notices | None = None
        self.reports: deque[tuple[str, str, Answer]] = deque()  # of sent notices
        self.asyncio_loop = asyncio.new_event_loop()
        self.asyncio_loop.set_exception_handler(self.unexpected)
        self.clock = self.asyncio_loop.time
        self.stopped = asyncio.Event()
        self.fault: BaseException | None = None
        self.connections: dict[Connection, None] = {}   # the oldest first
        self.waiters: dict[str, dict[Connection, None]] = {}
        desk.parked = self.waiters
        self.queues: tuple[deque[Connection], deque[Connection]] = (
            deque(), deque())           # whole requests: reviewers', agents'
        self.unread_bytes = 0           # an upper bound, see count_unread()
        self.turn_is_due = self.failing = False

    def serve_forever(self) -> None:
        """Serve until stop() is called, from a signal or another thread."""
        loop = self.asyncio_loop
        protocol: Any = functools.partial(Connection, self)
        listening = loop.run_until_complete(loop.create_server(
            protocol, sock=self.socket, backlog=ACCEPTED))
        self.socket.listen(BACKLOG)
        loop.call_soon(self.sweep)
        loop.run_until_complete(self.stopped.wait())
        listening.close()
        loop.run_until_complete(self.drain())
        loop.close()
        if self.fault:
            raise self.fault

    def stop(self) -> None:
        self.asyncio_loop.call_soon_threadsafe(self.stopped.set)

    async def drain(self) -> None:
        """Give the last answers, in a bounded time, and close everything."""
        import asyncio
        end = self.clock() + self.limits.drain_seconds
        while any(self.queues) and not self.fault and self.clock() < end:
            self.turn()
        for connection in list(self.connections):
            connection.release()
            connection.transport.close()
        while self.connections and self.clock() < end:
            await asyncio.sleep(0.001)
        for connection in list(self.connections):
            connection.transport.abort()
        handshakes = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*handshakes, return_exceptions=True)   # they end, too

    def unexpected(self, loop: Any, context: dict[str, Any]) -> None:
        """An unexpected exception in a callback ends serve, because it is not
        known what was left undone. A socket's OSError is expected."""
        error = context.get("exception")
        if error is None or isinstance(error, OSError):
            log.warning("%s: %s", context["message"], error)
        else:
            self.fault = self.fault or error
            self.stopped.set()

    # ---- a turn ----

    def turn_soon(self) -> None:
        """Take a turn once all that is readable now has been read: two rounds
        of asyncio, one to accept and one to read."""
        if not self.turn_is_due:
            self.turn_is_due = True
            self.asyncio_loop.call_soon(self.asyncio_loop.call_soon, self.turn)

    def turn(self) -> None:
        """Answer the whole requests, in one transaction (promise 6)."""
        self.turn_is_due = False
        end = self.clock() + TURN_SECONDS
        self.desk.store.tick()
        answers: list[tuple[Connection, HttpRequest, bytes | Poll]] = []
        # 1. run them, reviewers' first; no more once the turn is 30 ms old
        while any(self.queues) and self.clock() < end:
            connection = (self.queues[0] or self.queues[1]).popleft()
            if taken := connection.take():
                answers.append((connection, taken[0], self.desk.answer(*taken)))
        self.record_notices()
        # 2. commit; if that fails, every answer becomes a 503
        changes = self.desk.store.commit()
        # 3. answer
        for connection, http, answer in answers:
            if changes is None:
                answer = self.desk.problem(http, STORAGE_FAILED)
            connection.give(answer)
        # 4. wake whoever waits for what changed; the rest is for another turn
        self.tell(changes)
        if any(self.queues) or self.reports:
            self.turn_is_due = True
            self.asyncio_loop.call_later(BREAK_SECONDS, self.turn)

    def tell(self, changes: list[Change] | None) -> None:
        """Wake whoever waits for what changed, print lines, send notices."""
        if not changes:
            return
        changes = [change for change in changes if change.event not in (
            "notified", "not-notified")]            # those change no request
        for about in ("", *(change.subject for change in changes)):
            for connection in list(self.waiters.get(about, ())):
                connection.release()
        self.print_lines(
            f"{change.event:9} {visible(change.description[:MAX_LINE])} "
            f"[{change.subject}] by {visible(change.actor)}" for change in changes)
        if self.notices:
            self.notices.follow(self.desk.store, changes)

    def print_lines(self, lines: Iterable[str]) -> None:
        text = "\n".join(f"{self.desk.store.now[11:19]} {line}" for line in lines)
        if self.say and text:
            self.say(text)

    def sweep(self) -> None:
        """Four times a second: end what is past its time."""
        now, more = self.clock(), False
        for connection in list(self.connections):
            if connection.expires_at <= now and not connection.poll:
                connection.drop()
        if self.desk.rules_edited():
            self.print_lines(["the configuration was edited since this desk "
                              "started: restart the desk to use it"])
        if not self.desk.store.still_there():
            self.fault = HitlError(
                f"{self.desk.store.path} was deleted or replaced",
                "what is written to it would be lost: put it back, or start "
                "again with a new database")
            self.stop()
        self.desk.store.tick()
        try:
            more = self.desk.close_overdue()
            self.failing = False
        except (sqlite3.Error, Refusal, ValueError, TypeError) as error:
            if not self.failing:            # once, not four times a second
                log.error("the database fails: %s", error)
            self.failing = True
        self.tell(self.desk.store.commit())
        self.asyncio_loop.call_later(
            0.01 if more else self.limits.sweep_seconds, self.sweep)

    # ---- notices ----

    def start_notices(self, channels: list[Channel], rules: Rules) -> None:
        """Send notices of what waits and, from now on, of what begins to
        wait."""
        if not channels:
            return
        self.notices = Notices(channels, rules, self.url, self.report)
        for request, told in self.desk.store.owed():
            self.notices.owe(request, told)

    def report(self, name: str, request_ids: list[str], answer: Answer) -> None:
        """What became of a notice, from any thread: a turn records it."""
        self.reports.extend((name, each, answer) for each in request_ids)
        with contextlib.suppress(RuntimeError):     # the loop has ended: still owed
            self.asyncio_loop.call_soon_threadsafe(self.turn_soon)

    def record_notices(self) -> None:
        """Log what became of notices, for at most a fifth of a turn's time."""
        store, end = self.desk.store, self.clock() + TURN_SECONDS / 5
        while self.reports and self.clock() < end:
            name, request_id, answer = self.reports.popleft()
            event, detail = answer.row(name)
            try:
                store.attempt(store.note, store.request(request_id), event, "server",
                              detail)
                if not answer.told:
                    failed = self.desk.failed_notices(request_id)
                    self.print_lines([f"{request_id}: {failed}"])
            except (Refusal, sqlite3.Error) as error:   # told again after a restart
                log.error("a notice cannot be recorded: %s", error)

    # ---- when there is too much ----

    def make_room(self) -> None:
        """If there are too many connections, drop the oldest of the larger
        group, the parked or the others; never a signed-in reviewer's."""
        most = self.limits.connections
        if len(self.connections) <= most:
            return
        others = [each for each in self.connections if not each.trusted]
        parked = [each for each in others if each.poll]
        idle = [each for each in others if not each.poll]
        for oldest in max(idle, parked, key=len)[:1 + most // 100]:
            oldest.drop()

    def count_unread(self, size: int) -> None:
        """Count what came in. All unanswered requests share one limit: above
        it the oldest are dropped until half is left, never a reviewer's."""
        self.unread_bytes += size
        if self.unread_bytes <= self.limits.unread_bytes:
            return
        total = sum(len(each.inbox) for each in self.connections)
        if total > self.limits.unread_bytes:
            for oldest in list(self.connections):
                over = total > self.limits.unread_bytes // 2
                if over and oldest.inbox and not oldest.trusted:
                    total -= len(oldest.inbox)
                    oldest.drop()
        self.unread_bytes = total


def open_desk(host: str, port: int, store: Store, tokens: Tokens,
              public_url: str = "", say: Callable[[str], None] | None = None,
              *, rules: Rules | None = None, tls: Any = None,
              limits: Limits = LIMITS) -> Loop:
    """A desk that listens; OSError if the port is taken. http.server is
    imported here, because a gate does not need it: HTTPServer makes the
    socket; the handler is a formality, as asyncio serves the connections."""
    import socket
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from socketserver import TCPServer
    server: Any = type("Server", (HTTPServer,), {
        "address_family": socket.AF_INET6 if ":" in host else socket.AF_INET,
        "allow_reuse_address": os.name == "posix",
        # HTTPServer's own asks DNS for our name: half a minute if DNS is dead,
        # as on the air-gapped hosts that this runs on
        "server_bind": TCPServer.server_bind})
    own = server((host, port), BaseHTTPRequestHandler).socket
    own.setblocking(False)
    if not public_url:
        name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        name = f"[{name}]" if ":" in name else name
        scheme = "https" if tls else "http"
        public_url = f"{scheme}://{name}:{own.getsockname()[1]}"
    return Loop(own, Desk(store, tokens, public_url, rules or Rules(())),
                limits, say, tls)


# ================================== Client =================================
# How another process talks to the server: urllib.request, without proxies
# (the environment could route approvals through a stranger) or redirects, and
# the whole reply is bounded in size and time. Anything else that answers in
# the server's place raises UnreachableError.

MAX_REPLY = 64 << 20            # bytes; the largest is the `list` of a full desk
FINAL = ("bad-reply", "bad-certificate")    # asking again would not help


class Reply(NamedTuple):
    status: int
    body: dict[str, Any]

    @property
    def reason(self) -> str:
        return str(self.body.get("reason") or f"http-{self.status}")


class Client:
    """One server, and the credentials to use there. `tls_ca` is a file of
    authorities to trust in place of SSL_CERT_FILE's or the system's."""

    def __init__(self, server_url: str, authorization: str = "",
                 tls_ca: str = "") -> None:
        self.server_url, self.authorization = server_url, authorization
        self.tls_ca = tls_ca

    @classmethod
    def of(cls, configuration: Configuration, server_url: str,
           authorization: str = "") -> Client:
        """A client that trusts what the configuration names; ConfigError if
        server_url is not one."""
        tls_ca = configuration.gate["tls_ca"]
        if tls_ca and configuration.path:       # relative to the file
            tls_ca = str(configuration.path.parent / tls_ca)
        with config_error("server_url"):
            return cls(url_value(server_url), authorization, tls_ca)

    @functools.cached_property
    def opener(self) -> Any:
        """urllib's opener without proxies, redirects or file: addresses, for
        which an error status is a reply like any other. ConfigError if
        `tls_ca` is not a file of certificates."""
        import http.client
        import urllib.request
        kind: Any = http.client.HTTPConnection
        if self.server_url.startswith("https:"):
            import ssl
            try:
                trust = ssl.create_default_context(cafile=self.tls_ca or None)
            except (OSError, ValueError) as error:
                raise ConfigError(f"[gate] tls_ca: {self.tls_ca}: {error}",
                                  "name a PEM file of certificates") from None
            kind = functools.partial(http.client.HTTPSConnection, context=trust)

        def connection(host: str, **how: Any) -> Any:
            made = kind(host, **how)
            end = time.monotonic() + how["timeout"]
            made.response_class = functools.partial(answer_until, end)
            return made

        class Handler(urllib.request.HTTPHandler):
            https_request = urllib.request.HTTPHandler.http_request

            def http_open(self, request: Any) -> Any:
                return self.do_open(connection, request)
            https_open = http_open
        made = urllib.request.OpenerDirector()
        made.add_handler(Handler())
        return made

    def fetch(self, method: str, path: str, data: bytes | None = None, *,
              seconds: float, **headers: str) -> tuple[int, Any, bytes]:
        """The status, headers and body of the reply; UnreachableError if it
        is not complete within `seconds`. Write _ for - in a header's name."""
        import http.client
        import urllib.request
        headers = {"User-Agent": f"hitl.py/{__version__}", **{
            name.replace("_", "-"): value for name, value in headers.items()}}
        if self.authorization:
            headers["Authorization"] = self.authorization
        try:
            request = urllib.request.Request(self.server_url + path, data,
                                             headers, method=method)
            with self.opener.open(request, timeout=seconds) as reply:
                text = reply.read(MAX_REPLY + 1)
                if len(text) > MAX_REPLY:
                    raise self.bad_reply(f"over {MAX_REPLY >> 20} MiB")
                if reply.length != 0 and not reply.chunked:     # cut short
                    raise http.client.IncompleteRead(b"")
                return reply.status, reply.headers, text
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self.no_answer(error) from None

    def no_answer(self, error: Exception) -> UnreachableError:
        """The error for an exchange that failed; it quotes nothing that was
        sent."""
        why = getattr(error, "reason", error)
        if distrust := getattr(why, "verify_message", ""):
            return UnreachableError(
                f"the certificate of {self.server_url} is not trusted: "
                f"{visible(str(distrust))}", "name the authority that signed "
                'it: [gate] tls_ca = "ca.pem", or SSL_CERT_FILE',
                reason="bad-certificate")
        if not isinstance(error, OSError):      # it could quote the token
            why = f"the exchange failed ({type(error).__name__})"
        return UnreachableError(
            f"no answer from {self.server_url}: {visible(str(why))}",
            "is it running? `python3 hitl.py serve` starts it; "
            "if it is elsewhere, set server_url or HITL_SERVER_URL")

    def exchange(self, method: str, path: str, body: Any = None, *,
                 seconds: float) -> Reply:
        """The server's reply, a JSON object; UnreachableError for any other
        answer."""
        data = None
        if body is not None:    # a lone surrogate goes as an escape, and is refused
            data = READABLE.encode(body).encode(errors="backslashreplace")
        status, headers, text = self.fetch(
            method, path, data, seconds=seconds, Accept="application/json",
            Content_Type="application/json")
        kind = headers.get_content_type()
        if kind not in ("application/json", "application/problem+json"):
            if status >= 500:           # a proxy whose server is down
                raise self.no_answer(OSError(f"{status} from a proxy"))
            raise self.bad_reply(f"{status} and {visible(kind)}, not JSON")
        with contextlib.suppress(ValueError):
            value = parse_json(text)
            if isinstance(value, dict):
                return Reply(status, value)
        raise self.bad_reply("something that is not a JSON object")

    def bad_reply(self, what: str) -> UnreachableError:
        return UnreachableError(
            f"{self.server_url} answers with {what}",
            "this is not hitl.py's server, or something is in between: "
            "check server_url", reason="bad-reply")


def answer_until(end: float, sock: Any, **how: Any) -> Any:
    """An HTTPResponse whose every read gets only the time left until `end`. A
    socket's own time-out starts again with each read, so a server that sends
    a byte a second would hold a call for ever."""
    import http.client
    import socket
    answer: Any = http.client.HTTPResponse(sock, **how)
    raw = answer.fp.raw

    def readinto(buffer: Any) -> int | None:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        sock.settimeout(left)
        return socket.SocketIO.readinto(raw, buffer)
    raw.readinto = readinto
    return answer


# ================================= Context =================================
# What goes with a request so that the reviewer can judge it: the agent's state
# and its name. Of what looks like a secret only the length leaves the process,
# since a digest, or a few characters, would give a short code away. Every
# pattern below takes linear time: its one unbounded repeat comes last and
# cannot fail, and everything before it is bounded.

CONTEXT_NODES = 200_000         # values in a context; the rest are left out
KEPT = 64 * 1024                # characters sent of each end, if it is too large
EDGE = 4096                     # characters beyond, so that no secret is cut in two
END_BYTES = 160 * 1024          # of each end, once it is masked
BETWEEN = "\n\x1f"              # joins the texts of a list, to mask them as one


def cut(text: str, size: int) -> str:
    """The beginning of a text, in at most `size` bytes of UTF-8."""
    return text.encode("utf-8", "replace")[:size].decode(errors="ignore")


def agent_name() -> str:
    """HITL_AGENT, or user@host:folder."""
    import getpass
    import platform
    user = folder = "?"
    with contextlib.suppress(OSError, KeyError, ImportError):
        user = getpass.getuser()
    with contextlib.suppress(OSError):
        folder = os.getcwd()
    return os.environ.get("HITL_AGENT") or f"{user}@{platform.node()}:{folder}"


def snapshot(value: Any, own: str) -> Any:
    """A context of plain JSON with its secrets masked; if it is too large to
    send, its beginning and end, its size and SHA-256. `own` is the gate's
    token."""
    text = READABLE.encode(value)
    data = text.encode("utf-8", "backslashreplace")
    if len(data) <= MAX_CONTEXT:
        return masked_json(value, own)
    end = masked_text(text[-KEPT - EDGE:], own)[EDGE:].encode("utf-8", "replace")
    return {
        "note": f"This context is {len(data)} bytes, too many to send. Its "
                "beginning and its end follow; the rest is left out.",
        "sha256": hashlib.sha256(data).hexdigest(),
        "beginning": cut(masked_text(text[:KEPT + EDGE], own)[:-EDGE], END_BYTES),
        "end": end[-END_BYTES:].decode(errors="ignore")}


# The name of a secret, however its words are joined (DB_PASS, dbPass,
# X-Api-Key); `tokens` before a number is a count.
SHORT_NAME = (r"(?:(?<![a-z])|(?-i:(?<=[a-z])(?=[A-Z])))"
              r"(?:pass|pwd|pw|auth|pin|otp|psk|creds?|sid|connect\.sid|cvv|cvc"
              r"|(?-i:PAT))(?![a-z])")
NAME = (
    r"(?:passw|pass[ _-]?phrase|passcode|(?:key|store)pass|secret(?!ar)"
    r"|credential|cookie|jwt|(?:root|bind|db|user)pw"
    r"|kennwort|wachtwoord|contrase[n\u00f1]a|mot[ _]?de[ _]?passe|(?<![a-z])senha"
    r"|\u043f\u0430\u0440\u043e\u043b\u044c|\u5bc6\u7801"
    r"""|token(?!_?type|\w{0,20}[\\"']{0,2}[^\w"'\x1f]{1,4}\d{1,9}(?![\w.-]))"""
    r"|mnemonic"
    r"|(?:seed|recovery|backup)[ _-]?phrase"
    r"|authorization|bearer|sess(?:ion)?[_-]?id|totp|(?:gh|github|gitlab|azure)_pat"
    r"|(?:verification|security|access|recovery|backup|login|mfa|2fa|two[ _-]?factor"
    r"|one[ _-]?time|device)[ _-]?code|(?:code|oauth)[ _-]?verifier"
    r"|client[ _-]?assertion|(?:nt|ntlm|pw)_?hash"
    r"|(?:api|access|priv(?:ate)?|sign|signing|encrypt|encryption|master|account|aes"
    r"|ssh|auth|client|deploy|storage|service|license|hmac|webhook|admin|root|app|gpg"
    r"|shared|cipher|unseal|recovery|consumer|openai|anthropic|google|stripe|sendgrid"
    rf"|session|secret|fernet|subscription|functions)[ _-]?key|{SHORT_NAME})")
SECRET_NAME = rf"(?i){NAME}|(?i:pwd$|pass$(?<!bypass)(?<!compass))"
PIECES = {      # names for parts of the shapes below
    "{NAMED}": NAME + r"""[\w.-]{0,20}+(?: (?:for|of) [\w.@-]{1,40}"""
               r"""| \([^()"'\n]{1,40}\))?+[\\"'\]*`]{0,4}+""",
    "{LEAD}": r"[\w.-]{0,40}?", "{GAP}": r"\s{0,8}",
    "{START}": r"""^[ \t>|*+\x1f-]{0,40}+(?:(?:export|set|const|let|var) )?["']?""",
    "{QUOTED}": r"""(?:\\"(?:[^"\\]|\\[^"])*+|"(?![)\],;]{0,9}$)(?:[^"\\]|\\.)*+"""
                r"""|'(?![)\],;]{0,9}$)(?:[^'\\]|\\.|'')*+)"""}
# What a secret and its surroundings look like: group 1 stays, the rest of the
# match is masked.
SHAPES = r"""
()-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?s:(?!-----END).)*+
    (?:-----END [A-Z0-9 ]{0,40}-----)?
()^[\w+/=]{4,80}$(?=\n-----END [A-Z ]{0,40}PRIVATE KEY)

# a header; the rest of a line, or a block below it; the next text of a list
((?:proxy-)?authorization: (?:digest|oauth|hawk|mac|signature) )[^\n]++
((?:authorization|cookie|x-[a-z-]{0,20}(?:key|token)): {0,4})[^\s"'\\][^\n"'\\]*+
({START}{LEAD}{NAMED}(?:[:\t][ \t]{0,40}+(?:\r?\n(?!\x1f))?|[ \t]{1,40}+[=|])
    [ \t]{0,40}+)(?:[|>][+-]?\r?\n(?:[ \t]+[^\n]*\n?)++|(?!["'\\{\[\x1f])[^\r\n]++)
(^\x1f?(?:--?{LEAD}(?:{NAMED}|\w{0,40}?(?:pwd|pass)(?=\n))
    |{LEAD}(?:{NAMED}|\w{0,40}?(?:pwd|pass)(?=:?\n)):?
    (?=\n\x1f(?:[^\n]|\n(?!\x1f)){0,400}(?:\d|\Z)))\n\x1f)
    (?!--?(?:{LEAD}{NAMED}|[a-z]|(?:proxy-)?user)\n\x1f)(?:[^\n]|\n(?!\x1f))++
(^\|[^|\n]{0,60}?{NAMED}[^|\n]{0,20}\|[ ]{0,40})[^|\n]++

# a call, a pair; an assignment, JSON, a repr(), a query
((?:auth\s{0,4}\({GAP}["'][^"'\n]{0,80}["'],|(?:set_?|[\[(]{GAP}["']{LEAD}){NAMED}[(,])
    {GAP}){QUOTED}
({NAMED}{GAP}(?:=>|={2,3}(?=[^\n]{0,40}\d)|[:?]?=(?!=)|::?){GAP}
    (?:(?:\w{1,12}\(|[bruf]{1,2})(?=["']))?(?:"{2}(?="))?
    (?:[\[(](?!masked,){GAP}(?:["'][^"'\n]{0,80}["']|[\w.@-]{1,80}),{GAP})?)
    (?:{QUOTED}|[^\s"'\\,;&(){}\[\]<>][^\s"'\\,;&)}\]<>]*+)
((?<![\w"'])(?:setx?|set -\w{1,3}|env|arg|#define|configure set|secret set)[ ]
    {LEAD}{NAMED}\s{1,8}(?:(?:--body|-b) )?)(?:(?=["']){QUOTED}|(?=\S{0,60}\d)\S{8}\S*+)

# an item that is named beside its value, in JSON or YAML
(["']?\b(?:name|key|header|label|id|field|variable)["']?{GAP}[:=]{GAP}["']?{LEAD}{NAMED}
    {GAP},?{GAP}["']?(?:value|val)["']?{GAP}[:=]{GAP})(?:{QUOTED}|[^\s"',;}\]]++)
(["']?\b(?:value|val)["']?{GAP}[:=]{GAP}["'])[^"'\n]{1,400}(?=["']{GAP},?{GAP}["']?
    (?:name|key|header|label|id|field|variable)["']?{GAP}[:=]{GAP}["']?{LEAD}{NAMED})

# an option, XML, a sentence
((?<!\S)--?[\w-]{0,30}?{NAMED}\s{1,8})(?:{QUOTED}|[^\s-]\S*+)
(<[\w:.-]{0,40}?{NAMED}[^<>]{0,200}+>(?:<!\[CDATA\[)?
    |<key>[^<]{0,40}?{NAMED}</key>\s{0,40}<string>
    |(?:name|key)=["'][\w:.-]{0,40}?{NAMED}(?:>|\s{1,40}value=["']))[^<"]++
((?:passw\w{0,6}|passphrase|passcode|secret|token|pin|pwd|pw|(?:api|access) key
    |(?:verification|security) code)(?: (?:for|of) \S{1,60})?[ ]
    (?:(?:is|was|to|now|be|as|set|called|changed|reset|->) ){1,3})
    (?:{QUOTED}|(?=\S{0,60}?(?:\d|(?-i:[a-z][A-Z])|\w[!#$%&*+/@^~]\w))\S++)
((?:passw\w{0,6}|passphrase|pwd?|identified by) (?=\S{0,40}\d)(?=\S{0,40}[a-z])(?=\S{8})
    |\blogin \S{1,80}\s{1,8}password\s{1,8})\S++
((?:verification|security|one-time|login|2fa|mfa) code:? (?:is )?|\botp:? )\d{4,8}\b

# what a command is given; lines of .pgpass and of a file of passwords
(\b(?:echo|printf) (?:-\w )?["']?)(?![$"'-])[^\s|"']+(?=["']?\s?\|[^|\n]{0,80}?
    (?:sudo -S|[ ]--(?:password-)?stdin|chpasswd|--with-token))
((?<!\S)(?:-[ab]|-[sSkLfvgi]{0,5}u|--(?:proxy-)?user|--auth|--cookie)[\s=]{0,2}["']?
    (?!\d{1,9}:\d)[^\s:="'/]{1,80}[:=])[^\s"']++(?:;[^"'\n]*+)?
((?:mysql|mariadb|sshpass|mongo|redis-cli|psql|ldap|zip|7z| login )
    (?:[^\n|;&]|\n(?=\x1f)){0,160}?\s(?-i:-[pPaw])\s{0,2})[^\s-]\S*+
(^[\w.*-]{1,80}:(?:\d{1,5}|\*):[^:\s]{1,60}:[^:\s]{1,60}:)\S++
()\$(?:apr1|2[abxy]|[156y]|argon2\w{1,2})\$[^\s:]{8}[^\s:]*+

# addresses
(://[^\s:/@"']{0,100}:)(?!\d{1,5}(?:[/?#]|$))[^\s"'<>]{1,120}(?=@)
(://)[^\s:/@"'<>]{8,120}(?=@)
([?&#;][\w.-]{0,30}(?:key|sig|signature|code|auth|hash|ticket)=(?=[^\s&"'#]{6})
    |hooks\.slack\.com/\w{1,20}/|/webhooks/\d{1,30}/|/hooks/catch/\d{1,30}/
    |/incomingwebhook/)[^\s&"'#<>]++

# tokens: a vendor's own form, or a prefix (ghp_, sk_live_, xoxb-) before a
# mixture of letters and digits
(\b(?:bearer|basic|token) {1,4})(?=\S{0,20}\d)[\w.~+/-]{12}[\w.~+/=-]*+
()(?-i:(?<![A-Za-z0-9])(?:
    A(?:KI|SI|BI|CC|GP|ID|RO)A[0-9A-Z]{12}|(?:dapi|dose|ATTA)[0-9a-f]{24}
    |[0-9a-f]{32}(?:-us\d|-[0-9a-f]{8}-[0-9a-f]{8}|\.[A-Za-z0-9]{16})|[0-9a-f]{36}NRAL
    |(?:1000\.[0-9a-f]{32}\.|[12]/(?:\d{13,20}[/:]){1,2}|v1\.0-[0-9a-f]{24}-)
    [0-9a-f]{32}
    |(?:access-(?:production|development|sandbox)-|pat-[a-z]{2}\d-|ovsxp_|sdk-|mob-)
    [0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|access_token\$\w{4,20}\$\w{8,40}\$
    |A3-(?:[A-Z0-9]{5,6}-){4,5}[A-Z0-9]{5}|oy2[a-z0-9]{43}|nsec1[a-z0-9]{50}
    |WPL_AP\d\.\w{8}|(?:hf_|tvly-(?:\w{2,4}-)?)[A-Za-z0-9]{30}|rzp_(?:live|test)_\w{8}
    |(?:dckr_[a-z]{2,4}_|sb_secret_|pscale_[a-z]{2,5}_|tskey-[a-z]{3,9}-|figd_|nvapi-
    |HRKU-|AQVN|fo1_|lin_api_|duffel_[a-z]{4}_|dbt[cu]_|tk-us-|y[0-3]_|api_org_|sgp_)
    [\w-]{16}
    |M(?:I[\w+/]{4}IBA[AD]|HcCAQEEI|IGHAgEAM)|(?:AIza|LTAI|AKID|AT[AC]TT3|ATBB)[\w-]{12}
    |eyJ[\w-]{8}
    |SK[0-9a-f]{32}|1//0[\w-]{20}|(?:bot)?\d{8,10}:[\w-]{30}
    |[MNO][\w-]{23}\.[\w-]{6}\.[\w-]{20}
    |(?:ya29|SG|hv[bsr]|s|sl|dt0c01|dp\.[a-z]{2,5}|pat\w{14})\.[\w-]{16}
    |(?:sk|pk|rk|gh[a-z]|gl[a-z]{2,5}|xox[a-z]|xapp|pypi)[-_][\w-]{8}
    |(?!sha\d{3}-)[A-Za-z][A-Za-z0-9]{1,9}(?:[-_][A-Za-z0-9]{1,8}){0,2}[-_]
    (?=[A-Za-z0-9]{16})(?:(?:\d+[A-Za-z]+){2}|(?:[A-Za-z]+\d+){2}))[\w.+/=-]*+)
"""
SECRETS = tuple(        # an indented line continues the one before
    functools.reduce(lambda shape, part: shape.replace(*part), PIECES.items(), line)
    for line in SHAPES.replace("\n    ", "").splitlines()
    if line and line[0] != "#")


# What stands in the place of a secret and is none: nothing, a type, a variable,
# where a program gets it from, and the word after `if not token:`.
NO_SECRET = regex(r"""["'\s]{0,9}(?:null|none|nil|undefined|true|false|yes|no
    |str(?:ing)?|~|\*++|\$\{\w++\}|\$(?-i:[A-Z_]++)|\$?\{\{[^}]{0,200}\}*
    |enabled|disabled|required|optional|missing|unset|empty|expired|invalid|accepted
    |def|return|raise|pass|if|for|from|import|class|self
    |(?:await|new)(?:[ ][\w.]++(?:\([\w., ]*+\)?)?)?
    |[a-z_]{3,80}+(?:(?:\.|::)[a-z_]++){0,9}+\([a-z_., ]*+\)?
    |(?:os|process|env|self|this|config|settings|request|args|getpass)\.[\w.]++
    (?:[(\[][^\n]*+)?)?["',;:\s]{0,9}""", re.IGNORECASE | re.VERBOSE)
# Of an object like {"name": "DB_PASSWORD", "value": ...}, what names and what
# is named.
NAMING = regex("(?i)(?:name|key|(?:^|_)(?:header|label|id|field|variable))$")
NAMED_VALUE = regex("(?i)(?:value|(?:^|_)(?:val|default))$")


def mask(text: str) -> str:
    return f"[masked, {len(text)} characters]"


def masked_match(found: re.Match[str]) -> str:
    """What a pattern found, masked after group 1 and an opening quote."""
    kept, secret = found[1], found[0][len(found[1]):]
    if secret.strip("\"'\\ ").startswith("[masked") or NO_SECRET.fullmatch(secret):
        return found[0]
    body = re.sub(r"^\\?[\"']", "", secret)
    return kept + secret[:len(secret) - len(body)] + mask(body)


def unless_plain(word: re.Match[str]) -> str:
    """A long word, masked if its letters and digits are mixed as in base64,
    unlike those of a digest, a UUID, a path or a name in source code."""
    text = word[0]
    if re.match("sha(256|384|512)-", text):         # of a package
        return text
    mixed = all(re.search(kind, text) for kind in ("[a-z]", "[A-Z]", "[0-9]"))
    turns = len(re.findall(
        "[a-z](?=[A-Z0-9])|[A-Z](?=[a-z0-9])|[0-9](?=[A-Za-z])", text))
    return mask(text) if mixed and turns > 0.4 * len(text) else text


def masked_text(text: str, own: str) -> str:
    """A text with what looks like a secret, or is `own`, masked."""
    import binascii
    text = text.encode("utf-8", "backslashreplace").decode()
    for form in (own, binascii.b2a_base64(own.encode()).decode().rstrip("=\n")):
        text = text.replace(form, mask(form)) if form else text
    for pattern in SECRETS:
        text = re.sub(pattern, masked_match, text, flags=re.I | re.M)
    return re.sub(r"[\w+/-]{24,}+={0,2}", unless_plain, text)


def masked_json(value: Any, own: str) -> Any:
    """Plain JSON with its secrets masked, even if only a name gives them
    away."""
    if isinstance(value, str):
        return masked_text(value, own)
    made: Any = []
    if isinstance(value, list):
        for texts, items in itertools.groupby(
                value, lambda item: isinstance(item, str)):
            if texts:       # one may name the secret that comes after it
                made += masked_text(BETWEEN.join(items), own).split(BETWEEN)
            else:
                made += [masked_json(item, own) for item in items]
        return made
    if not isinstance(value, dict):
        return value
    names = [item for key, item in value.items() if NAMING.search(key)]
    made = {}
    for key, item in value.items():
        secret = is_secret(key, item) or NAMED_VALUE.search(key) and any(
            is_secret(name, item) for name in names)
        shown = mask(str(item)) if secret else masked_json(item, own)
        made[masked_text(key, own)] = shown
    return made


def is_secret(name: Any, value: Any = "?") -> bool:
    """Whether a value with this name (dbPass, DB_PASS) is to be masked; a
    number rarely is."""
    if not isinstance(name, str) or len(name) > 80 or not value or value is True:
        return False
    if isinstance(value, (int, float)):
        return bool(re.search(r"(?i)passw|pwd|passcode|secret|pin$|otp$", name))
    ways = name, re.sub("(?<=[a-z])(?=[A-Z])", "_", printed(name))
    return any(re.search(SECRET_NAME, way) for way in ways)


def plain_json(value: Any, path: tuple[int, ...] = (),
               left: list[int] | None = None) -> Any:
    """A value as plain JSON: a dataclass as its fields, any other object as
    its repr(), "[more]" in place of what is too deep or too much. `path` holds
    the ids of what the value is in."""
    left = left or [CONTEXT_NODES]
    left[0] -= 1
    if value is None or type(value) in (bool, str):
        return value
    if type(value) in (int, float) and abs(value) < 1e300:
        return value
    if isinstance(value, (bytes, bytearray)):
        return value.decode("utf-8", "backslashreplace")
    if id(value) in path:
        return "[contains itself]"
    path = (*path, id(value))
    if hasattr(type(value), "__dataclass_fields__"):
        value = {name: getattr(value, name, None)
                 for name in type(value).__dataclass_fields__}
    if not isinstance(value, (Mapping, list, tuple, set, frozenset)):
        try:
            return repr(value)
        except Exception:
            return f"[a {type(value).__name__}]"
    if len(path) > MAX_DEPTH - 3 or left[0] < 0:
        return "[more]"
    if isinstance(value, Mapping):
        return {str(k): plain_json(v, path, left) for k, v in value.items()}
    return [plain_json(v, path, left) for v in value]


# ================================== Guard ==================================
# The decorator. A call of a guarded function becomes a tool call: the tool is
# the function's name, the arguments are its parameters by name, however they
# were passed. What the reviewer approved is put back into the call, and the
# function runs with it.


def guarded(gate: Gate, function: Any, *, checkpoint: str | None = None,
            name: str | None = None, hide: Iterable[str] = (),
            context: Any = None, optional: bool = False) -> Any:
    """The function, with its calls going through the gate: see Gate.guard."""
    binder = Binder(function, hide)
    own_name = getattr(binder.function, "__name__", type(binder.function).__name__)
    tool = name or str(own_name)
    check_held(gate.rules, tool, checkpoint, optional)
    how: How = {"checkpoint": checkpoint, "context": context}
    # two calls that look alike may differ in what is hidden, so that no
    # decision may stand for the next one
    if binder.hidden:
        how["session"] = ""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        arguments, run = binder.bind(args, kwargs)
        return gate.call(tool, arguments, run, **how)

    async def async_wrapper(*args: Any, **kwargs: Any) -> Any:
        arguments, run = binder.bind(args, kwargs)
        return await gate.acall(tool, arguments, run, **how)
    made: Any = async_wrapper if is_async(function) else wrapper
    functools.update_wrapper(made, function)
    made.__name__ = getattr(function, "__name__", tool)
    face = made.__signature__ = signature_of(function)
    kinds = {name: p.annotation for name, p in face.parameters.items()}
    kinds["return"] = face.return_annotation
    made.__annotations__ = {name: kind for name, kind in kinds.items()
                            if kind is not face.empty}
    return made


def check_held(rules: Rules, tool: str, checkpoint: str | None,
               optional: bool) -> None:
    """ConfigError if a guard would hold nothing."""
    if checkpoint is not None and rules.named(checkpoint).effect == "allow":
        raise ConfigError(f'checkpoint "{checkpoint}" has effect "allow"; guard '
                          "needs one that reviews or denies")
    if checkpoint is None and not optional and rules.is_free(tool):
        raise ConfigError(
            f'@gate.guard on "{visible(tool)}" would hold nothing: no '
            f"checkpoint in {rules.path} matches that name",
            "add a checkpoint whose action_pattern does, or name one: "
            '@gate.guard(checkpoint="..."), or let the file decide: '
            "@gate.guard(optional=True)")


class Binder:
    """Turns a function's parameters into the named arguments of a tool call.

    Defaults and a partial's fixed arguments are filled in; *args becomes a
    list under its own name, and what **kwargs takes joins the rest by name.
    Raises TypeError for what cannot be guarded.
    """

    def __init__(self, function: Any, hide: Iterable[str]) -> None:
        self.function, self.args = function, ()
        self.kwargs: dict[str, Any] = {}
        while isinstance(self.function, functools.partial):     # or nested ones
            part = self.function
            self.function, self.args = part.func, (*part.args, *self.args)
            self.kwargs = {**part.keywords, **self.kwargs}
        check_guardable(self.function)
        self.signature = signature_of(self.function)
        names = list(self.signature.parameters)
        self.hidden = {hide} if isinstance(hide, str) else set(hide)
        if unknown := self.hidden - set(names):
            raise TypeError(f"hide: {function!r} has no parameter "
                            f"{', '.join(sorted(unknown))}")
        scope = getattr(function, "__qualname__", "").rpartition("<locals>.")
        if names[:1] in (["self"], ["cls"]) and "." in scope[2]:
            self.hidden.add(names[0])           # a method, not a function

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]
             ) -> tuple[dict[str, Any], Callable[..., Any]]:
        """The arguments to show, and a callable that runs the function with
        the approved ones; TypeError if the function itself would raise one."""
        bound = self.signature.bind(*self.args, *args, **self.kwargs | kwargs)
        bound.apply_defaults()
        given = {name: value for name, value in bound.arguments.items()
                 if name not in self.hidden}
        extra: dict[str, Any] = {}      # what **kwargs takes
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD and name in given:
                extra = given.pop(name)
        if twice := given.keys() & extra.keys():
            raise TypeError(f"an argument is given twice: {', '.join(twice)}")
        shown = {name: as_shown(value)
                 for name, value in (given | extra).items()}

        def run(**approved: Any) -> Any:
            for name, value in approved.items():
                values = extra if name in extra else bound.arguments
                values[name] = rebuilt(values[name], shown[name], value)
            return self.function(*bound.args, **bound.kwargs)
        return shown, run


def as_shown(value: Any) -> Any:
    """An enum as its value, a tuple as a list; anything else as it is."""
    if isinstance(value, enum.Enum):
        return value.value
    return list(value) if type(value) is tuple else value


def rebuilt(given: Any, shown: Any, approved: Any) -> Any:
    """An approved value as the enum or tuple that the caller gave; the
    caller's own object if the call was not held."""
    if approved is shown:
        return given
    if isinstance(given, enum.Enum) or type(given) is tuple:
        return type(given)(approved)
    return approved


def check_guardable(function: Any) -> None:
    """A TypeError for what guard cannot hold, with the cure."""
    if isinstance(function, str):
        raise TypeError(f'guard("{function}") is not given a function: did you '
                        f'mean @gate.guard(checkpoint="{function}")?')
    called = function.__call__ if callable(function) else function
    if (not callable(function)
            or isinstance(function, (type, staticmethod, classmethod))
            or hasattr(function, "name") and not hasattr(function, "__name__")
            or any(map(inspect.isgeneratorfunction, (function, called)))
            or any(map(inspect.isasyncgenfunction, (function, called)))):
        raise TypeError(
            f"guard cannot hold {function!r}: it takes a function, a "
            "method or a callable that is not a generator (a generator "
            "runs piece by piece, after the gate); put @gate.guard "
            "directly above def, below every other decorator")


def signature_of(function: Any) -> inspect.Signature:
    """The signature, its annotations evaluated if all can be: frameworks that
    evaluate annotations take a __signature__ as it is."""
    for evaluated in (True, False):
        with contextlib.suppress(Exception):
            return inspect.signature(function, eval_str=evaluated)
    raise TypeError(f"guard cannot hold {function!r}: its signature is not known")


def is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    called = function.__call__ if callable(function) else function
    return any(map(inspect.iscoroutinefunction, (function, called)))


# =================================== Gate ==================================
# The agent's side: a tool call that a checkpoint matches waits until a person
# has decided. Gate.call is the story, in six steps; a Held is one call on its
# way through them. The first four steps end with a claim whose id and digest
# match, or raise (promise 1); no option lets a call run when something fails.

UNREACHABLE_SECONDS = 10        # how long to try a server that does not answer;
CLAIM_RETRY_SECONDS = 30        # with a claim, whose reply may have been lost;
LAST_WORD_SECONDS = 2           # with a withdrawal or an outcome
CANCEL_SECONDS = 0.5            # for the thread of an acall that was cancelled
PROGRESS_SECONDS = 15           # between two lines that say what is waiting
MAX_FREE = 10_000               # calls remembered to match nothing
OTHER_SERVER = "does server_url point to hitl.py's server?"


class How(TypedDict, total=False):
    """What one call may set, in place of the gate's or the file's value.

    request_id: the same id with the same call is the same request.
    checkpoint: the id of one that holds the call, whatever the tool's name.
    session: whom a decision may stand for, if one gate serves several people;
    "" for nobody.
    attach: pick up the same call of the same session, if it still waits.
    edits: the reviewer may change the arguments, and the model will be told.
    tick: called before each look at the status.
    cwd: what paths are relative to.
    """

    context: Any
    request_id: str | None
    timeout_seconds: float | None
    lifetime_seconds: float | None
    checkpoint: str | None
    session: str | None
    attach: bool
    edits: bool
    tick: Callable[[], object] | None
    cwd: str | None


def first_of(*values: Any) -> Any:
    """The first value that is not None, or None."""
    return next((value for value in values if value is not None), None)


def reviewable(tool: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as they come back from JSON; HitlError if one comes back
    as another value or type (a tuple, an integer key, an enum), or if they
    are too large."""
    plain: dict[str, Any] = {}
    for name, value in dict(arguments).items():
        try:        # two levels deeper, as it will be in the request
            back = parse_json(as_sent([{name: value}]))[0]
            if repr(back) != repr({name: value}):
                raise ValueError(f"a {type(value).__name__} changes on the way "
                                 "through JSON")
        except (TypeError, ValueError, RecursionError) as error:
            raise HitlError(
                visible(f"{tool}: the arguments are not plain JSON: {name}: "
                        f"{error}"),
                "pass text, finite numbers, true, false, None, lists and objects "
                "(a model as its .model_dump(mode='json')); what is not part of "
                "the action can be left out with @gate.guard(hide=[...])",
                reason="bad-arguments") from None
        plain |= back
    size, limit = len(canonical(plain)), arguments_limit(tool, plain)
    if size > limit:
        raise HitlError(
            f"{visible(tool)}: the arguments are {size} bytes, and a person "
            f"reviews at most {limit}: do it in smaller steps, or pass a "
            "reference, such as a file name, in place of the content",
            "nobody can review so much at once", reason="too-large")
    return plain


# ---- one call on its way ----

class Held:
    """A tool call that a checkpoint holds. obtain() asks, waits and claims;
    then the caller runs it with `arguments`, once, and reports how it
    ended."""

    review_url = ""             # for people, as the server says
    approved_by = ""
    changed = ""                # what the reviewer changed, for the model
    claiming = False            # the claim may have reached the server
    cancelled = False           # by the caller, for obtain() to see

    def __init__(self, gate: Gate, tool: str, arguments: Mapping[str, Any],
                 match: Match, how: Mapping[str, Any]) -> None:
        self.gate, self.tool, self.how = gate, tool, how
        self.rule = rule = match.checkpoint
        self.tick = how.get("tick") or (lambda: None)
        self.arguments = reviewable(tool, arguments)            # promise 2
        self.request_id = how.get("request_id") or os.urandom(16).hex()
        self.claim_key = os.urandom(16).hex()       # the claim may be retried
        self.timeout_seconds = self.seconds("timeout_seconds")
        self.lifetime_seconds = self.seconds("lifetime_seconds",
                                             self.timeout_seconds)
        self.deadline = time.monotonic() + self.timeout_seconds
        self.description = describe(rule, tool, self.arguments)
        self.digest = digest_of(self.description, canonical(self.arguments), tool)
        # a process that starts again and asks for its earlier request has a
        # new session, in which that request would not be found
        own = "" if how.get("request_id") else gate.own_session
        context = first_of(how.get("context"), gate.context)
        if callable(context):
            context = context()
        lifetime = self.lifetime_seconds
        self.body = {
            "request_id": self.request_id, "tool": tool,
            "action_description": self.description,
            "arguments": self.arguments, "digest": self.digest,
            "timestamp": instant(time.time()),
            "agent": cut(gate.agent or agent_name(), MAX_NAME),
            "agent_context": plain_json(context),       # ask() masks it
            "timeout_seconds": None if lifetime == math.inf else lifetime,
            "checkpoint_id": rule.checkpoint_id, "category": rule.category,
            "checkpoint_digest": rule.digest, "why": match.why[:MAX_WHY // 4],
            "config_digest": gate.rules.digest,
            "session": first_of(how.get("session"), gate.session, own) or None,
            "attach": bool(how.get("attach")),
            "edits": bool(how.get("edits") and rule.editable)}

    def seconds(self, name: str, default: float | None = None) -> float:
        """A duration: the call's, else the checkpoint's, else [gate]'s."""
        with config_error(name):
            value: float = seconds_value(first_of(
                self.how.get(name), getattr(self.rule, name),
                self.gate.configuration.gate[name], default))
        return value

    def obtain(self, handed_over: bool = False) -> None:
        """Take the right to run this call; HitlError if there is none."""
        try:
            self.ask()
            self.wait()
            self.claim(handed_over)
        except Exception:
            raise
        except BaseException:           # Ctrl-C, exit
            self.break_off("interrupted")
            raise

    async def aobtain(self, handed_over: bool = False) -> None:
        """obtain() for asyncio, on a thread; cancelling the task withdraws
        its request, also one that is on its way and that only the thread can
        withdraw: the process might end before it does."""
        import asyncio
        work = in_thread(self.obtain, handed_over)
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            self.cancelled = True
            await undisturbed(self.break_off, "cancelled")
            with contextlib.suppress(asyncio.CancelledError):   # once more
                await asyncio.wait([work], timeout=CANCEL_SECONDS)
            if not work.cancel():
                work.exception()        # nobody will ask what became of it
            raise

    # ---- 2 ask ----

    def ask(self) -> None:
        """Post the request: it now waits, unless it was decided before."""
        token = self.gate.token
        self.body["agent_context"] = snapshot(self.body["agent_context"], token)
        reply = self.insist("/pending", self.body,
                            min(UNREACHABLE_SECONDS, self.timeout_seconds))
        known = str(reply.body.get("request_id"))
        if self.how.get("attach") and REQUEST_ID.fullmatch(known):
            self.request_id = known         # asked before
        self.learn(reply)                   # raises if that is another call
        self.review_url = visible(str(reply.body.get("url")))
        if self.state.status == Status.WAITING:
            log.warning('%s waits for a person: "%s"; review it at %s (%s)',
                        visible(self.tool),
                        visible(masked_text(self.description, token)),
                        self.review_url, limited(self.timeout_seconds))

    def insist(self, path: str, body: dict[str, Any] | None, seconds: float,
               poll: float = 0) -> Reply:
        """The reply to a POST or, without a body, to a GET that the server may
        hold for `poll` seconds; tries again until it succeeds, or raises when
        it is refused or out of time (promise 1)."""
        end, pause = time.monotonic() + seconds, 0.05
        success = (200, 201) if path == "/pending" else (200,)
        error: HitlError
        while True:
            left = max(0.1, end - time.monotonic())
            try:
                reply = self.gate.client.exchange(
                    "GET" if body is None else "POST", path, body,
                    seconds=min(left, poll + UNREACHABLE_SECONDS))
                if reply.status in success:
                    return reply
                error, final = self.refused(reply), reply.status < 500
            except UnreachableError as unreachable:
                error, final = unreachable, unreachable.reason in FINAL
            unwanted = self.cancelled and path.startswith("/pending")
            if final or unwanted or time.monotonic() + pause >= end:
                raise error
            if pause == 0.4:            # longer than a restart takes
                log.warning("%s; trying again", error.message)
            if body is None:
                self.tick()             # is anybody still there?
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def learn(self, reply: Reply) -> None:
        """Keep what a reply says about this very request; raise if it is
        about another, or makes no sense."""
        body = reply.body
        if (body.get("request_id") != self.request_id
                or body.get("digest") != self.digest):
            raise self.error(ChangedError, "the server's reply is about "
                             "another call; nothing ran", OTHER_SERVER)
        said: dict[str, Any] = {name: body.get(name) for name in SUMMARY}
        state = ReviewRequest(**said)
        texts = all(isinstance(value, (str, type(None))) for value in said.values())
        if not (texts and state.status in set(Status)
                and state.outcome in (None, *Outcome)):
            raise self.gate.client.bad_reply("fields that make no sense")
        self.state = state

    def error(self, kind: type[HitlError], message: str, hint: str = "",
              reason: str = "") -> HitlError:
        return kind(visible(message), hint, reason=reason,
                    request_id=self.request_id)

    def refused(self, reply: Reply) -> HitlError:
        """The error for a reply that is not a success."""
        if reply.status in (401, 403):
            return self.error(
                UnreachableError, "the server refused this agent's credential",
                "set HITL_AGENT_TOKEN, or Gate(token=), to an agent token "
                "that serve knows", reply.reason)
        kind = REFUSED_AS.get(reply.reason)
        if kind is None:
            lost = reply.status in (404, 421) or reply.status >= 500
            kind = UnreachableError if lost else HitlError
        title = reply.body.get("title", reply.status)
        hint = visible(str(reply.body.get("detail") or OTHER_SERVER))
        return self.error(kind, f"the server refused: {title}", hint,
                          reply.reason)

    # ---- 3 wait ----

    def wait(self) -> None:
        """Long-poll until the request no longer waits; the server answers the
        moment a person decides. While it is away, keep trying until the
        deadline."""
        if self.state.status != Status.WAITING:
            return
        logged_at = time.monotonic()
        while self.state.status == Status.WAITING:
            began = time.monotonic()
            left = self.deadline - began
            if left <= 0 or self.cancelled:
                self.give_up()
                break
            if began - logged_at >= PROGRESS_SECONDS:
                logged_at = began
                log.warning("waiting for review of %s at %s, %s left",
                            visible(self.tool), self.review_url, limited(left))
            self.tick()
            self.poll(left)
            early = time.monotonic() - began < 0.1
            if self.state.status == Status.WAITING and early:
                time.sleep(min(0.5, left))
        if self.state.status in (Status.WAITING, Status.EXPIRED):
            raise self.nobody()

    def poll(self, left: float) -> None:
        """Ask for the status once; the server may hold its reply."""
        held = max(0.0, min(self.gate.configuration.gate["poll_seconds"],
                            left - 0.2))
        try:
            self.learn(self.insist(
                f"/pending/{self.request_id}?wait={held:.3f}", None, left, held))
        except UnreachableError as error:
            if error.reason in FINAL or time.monotonic() < self.deadline - 1:
                raise                   # final: nothing else ends so early

    def nobody(self, hint: str = "", reason: str = "") -> HitlError:
        """The error if no decision came in time."""
        name, seconds = "timeout_seconds", self.timeout_seconds
        if self.lifetime_seconds < seconds:
            name, seconds = "lifetime_seconds", self.lifetime_seconds
        where = f"in {self.gate.configuration.path}"
        if self.how.get(name) is not None:
            where = "for this call"
        return self.error(
            ReviewTimeoutError, f'nobody decided "{self.description}" within '
            f"{seconds:g} s; nothing ran", hint or f"raise {name} {where}: people "
            "usually need 300 or more", reason)

    def give_up(self) -> None:
        """Withdraw a request that is not to outlive its wait. The server's
        answer counts: a reviewer may have been faster."""
        if self.cancelled:
            self.break_off("cancelled")
        elif self.lifetime_seconds <= self.timeout_seconds:
            self.break_off("timeout")
        else:
            raise self.nobody(
                "the request still waits: the same call with "
                f'request_id "{self.request_id}" picks up its decision',
                "still-waiting")

    def break_off(self, why: str) -> None:
        """Tell the server that nobody waits; if it does not answer, its own
        clock ends the request. A call that may have been claimed is recorded
        as failed, not as running."""
        if self.claiming:
            self.report("cancelled")
            return
        with contextlib.suppress(HitlError):
            self.learn(self.insist(f"/withdraw/{self.request_id}",
                                   {"why": why}, LAST_WORD_SECONDS))

    # ---- 4 claim ----

    def claim(self, handed_over: bool) -> None:
        """Take the approval for this call, once (promise 3)."""
        self.check_approved()
        self.tick()                     # is anybody still there?
        runs = first_of(self.state.approved_digest, self.digest)
        if runs != self.digest and not self.body["edits"]:
            raise self.error(ChangedError, "the arguments were changed, which "
                             "this call did not allow; nothing ran")
        # set before `cancelled` is read: one of two threads sees the other's
        self.claiming = True
        if self.cancelled:
            raise self.nobody()
        self.check_claimed(runs, self.insist(
            f"/claim/{self.request_id}", {
                "digest": runs, "claim": self.claim_key,
                "handed_over": handed_over},
            CLAIM_RETRY_SECONDS))
        if self.cancelled:
            self.report("cancelled")
            raise self.nobody()
        log.warning("%s approved by %s: runs now%s", visible(self.tool),
                    self.approved_by,
                    self.changed and f"; {visible(self.changed)}")

    def check_approved(self) -> None:
        """Raise unless the request is approved. Whether it was claimed before
        is for the server to say, at the claim."""
        state = self.state
        name = person(state.decided_by)
        self.approved_by = visible(name)
        if state.status == Status.REJECTED:
            reason = f": {state.reason}" if state.reason else ""
            raise self.error(CollaborationError,
                             f"rejected by {name}{ago(state)}{reason}")
        if state.status != Status.APPROVED or state.outcome == Outcome.LAPSED:
            ended = state.outcome or state.status
            raise self.error(
                ReviewTimeoutError,
                f'"{self.description}" is {ended}; nothing ran',
                "ask again with another request_id", ended)

    def check_claimed(self, runs: str, reply: Reply) -> None:
        """Raise unless the reply claims this very approval. If the reviewer
        changed the arguments, the changed ones run: they must have the digest
        that was approved, and match the same checkpoint (promise 2)."""
        approval = self.state
        self.learn(reply)
        if self.state != approval._replace(outcome=Outcome.RUNNING):
            raise self.error(ChangedError, "the server's reply to the claim does "
                             "not match this approval; nothing ran", OTHER_SERVER)
        if runs == self.digest:
            return
        approved: Any = reply.body.get("arguments")
        asked, fault = self.arguments, ""
        if (type(approved) is not dict or approved.keys() != asked.keys()
                or runs != digest_of(self.description, canonical(approved),
                                     self.tool)):
            fault = "arguments-changed"
        elif self.met_by(approved) != self.met_by(asked):
            fault = "checkpoint-changed"
        if fault:
            self.report(fault)
            raise self.error(ChangedError, "the changed arguments are not what "
                             "was approved, or match another checkpoint; "
                             "nothing ran", reason=fault)
        self.arguments = approved
        self.changed = changes_in_words(self.approved_by, as_sent(asked),
                                        as_sent(approved))

    def met_by(self, arguments: Mapping[str, Any]) -> Checkpoint:
        """The checkpoint that decides about this call with these arguments."""
        return self.gate.rules.first_match(self.tool, arguments,
                                           self.how.get("cwd")).checkpoint

    # ---- 6 report ----

    def report(self, error: BaseException | str | None = None) -> None:
        """Record that the call was executed, or how it failed. Never raises:
        if the server does not take the report, that is only logged."""
        text = "" if error is None else error_text(error)
        outcome = Outcome.EXECUTED if error is None else Outcome.FAILED
        try:
            self.insist(f"/outcome/{self.request_id}", {
                "claim": self.claim_key, "outcome": outcome, "text": cut(
                    masked_text(text[:EDGE], self.gate.token), 500)},
                LAST_WORD_SECONDS)
        except HitlError as fault:
            log.warning("the outcome of %s was not recorded: %s",
                        self.request_id, fault.message)


def limited(seconds: float) -> str:
    """How long a wait may last, in words."""
    return "unlimited time" if seconds == math.inf else readable_seconds(seconds)


def ago(state: ReviewRequest) -> str:
    """How long before this request a standing decision was made, by the
    server's clock alone; "" for a decision about this request."""
    if not state.said_at or not state.decided_at:
        return ""
    seconds = unix_time(state.decided_at) - unix_time(state.said_at)
    return f" {readable_seconds(max(0.0, seconds))} ago"


def error_text(error: BaseException | str) -> str:
    """An error as a log shows it, even if its text is empty or cannot be
    made."""
    if isinstance(error, str):
        return error
    words = ""
    with contextlib.suppress(Exception):
        words = str(error)
    return type(error).__name__ + (words and f": {words}")


# ---- asyncio ----

async def awaited(result: Awaitable[T] | T) -> T:
    return await result if inspect.isawaitable(result) else result


def in_thread(function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
    """What function(*args) returns, from a daemon thread of its own. The pool
    of asyncio.to_thread has cpu + 4 threads: forty waits would queue (7 s
    instead of 1)."""
    import asyncio
    import contextvars
    from concurrent.futures import Future
    result: Future[T] = Future()
    result.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result.set_result(function(*args))
        except BaseException as error:
            result.set_exception(error)
    threading.Thread(target=contextvars.copy_context().run, args=(run,),
                     name="hitl", daemon=True).start()
    return asyncio.wrap_future(result)


async def undisturbed(function: Callable[..., T], *args: Any) -> T:
    """What function(*args) returns, from a thread. A task that is cancelled
    meanwhile still waits for it, so that what was done is recorded and its
    result is not lost."""
    import asyncio
    work = in_thread(function, *args)
    while not work.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(work)
    return work.result()


# ---- the gate itself ----

class Gate:
    """Makes tool calls that match a checkpoint wait for a person.

    config: the path of checkpoints.toml; default: HITL_CONFIG, then
    ./checkpoints.toml, then the one beside this file.
    context: the agent's state for the reviewer, or a callable that returns it.
    on_reject: "raise"; or "return" to give a rejection, a denial or an expiry
    to the model as text; or a callable that is given this text: its result is
    returned, or raised if it is an exception.
    agent: the name on the card; default: HITL_AGENT, or user@host:folder.
    server_url: default: HITL_SERVER_URL, then the file's.
    token: the agent's own; default: HITL_AGENT_TOKEN.
    session: whom a decision may stand for; default: this object.
    Raises ConfigError.
    """

    def __init__(self, config: str | os.PathLike[str] | None = None, *,
                 context: Any = None,
                 on_reject: str | Callable[[str], Any] = "raise",
                 agent: str | None = None, server_url: str | None = None,
                 token: str | None = None, session: str | None = None) -> None:
        self.on_reject = checked_on_reject(on_reject)
        path = find_configuration(config)
        self.configuration = load_configuration(path)
        self.rules = self.configuration.rules
        self.context, self.agent = context, agent
        self.session, self.own_session = session, os.urandom(16).hex()
        self.token = (token or os.environ.get("HITL_AGENT_TOKEN", "")).strip()
        if not re.fullmatch(r"[!-~]*", self.token):
            raise ConfigError("the agent's token is not plain ASCII")
        if os.environ.get("HITL_REVIEWER_TOKEN"):       # promise 5
            log.warning("HITL_REVIEWER_TOKEN is in the environment of an "
                        "agent, which could decide with it: remove it")
        self.client = Client.of(
            self.configuration, server_url or os.environ.get("HITL_SERVER_URL")
            or self.configuration.gate["server_url"],
            self.token and f"Bearer {self.token}")
        self.server_url = self.client.server_url
        if self.client.tls_ca:
            _ = self.client.opener      # reads the file, or raises ConfigError
        self._free: set[tuple[str, ...]] = set()

    def call(self, tool: str, arguments: Mapping[str, Any],
             execute: Callable[..., T], **how: Unpack[How]) -> T:
        """The result of execute(**arguments), which runs once a person has
        approved it, or at once if no checkpoint matches. Raises a
        CollaborationError, a ReviewTimeoutError or another HitlError, and then
        nothing ran; what execute raises passes through."""
        if self._is_free(tool, arguments, how):
            return execute(**arguments)
        if is_async(execute):
            raise TypeError(f"{visible(str(tool))} is async: await "
                            "gate.acall(...), or it would never run")
        how.setdefault("edits", self.on_reject == "return")
        try:
            held = self._match(tool, arguments, how)                # 1 match
            if held:
                held.obtain()               # 2 ask, 3 wait, 4 claim
        except HitlError as error:
            return self._refusal(error)  # type: ignore[no-any-return]
        if not held:
            return execute(**arguments)
        try:
            result = execute(**held.arguments)                      # 5 run
        except BaseException as error:
            held.report(error)                                      # 6 report
            raise
        held.report()
        return told_of_changes(held, result)

    async def acall(self, tool: str, arguments: Mapping[str, Any],
                    execute: Callable[..., Any], **how: Unpack[How]) -> Any:
        """call() for asyncio: it waits on a thread of its own, so the event
        loop goes on, and withdraws its request if it is cancelled. Once the
        tool has returned, its result is returned, cancelled or not."""
        if self._is_free(tool, arguments, how):
            return await awaited(execute(**arguments))
        how.setdefault("edits", self.on_reject == "return")
        try:
            held = self._match(tool, arguments, how)
            if held:
                await held.aobtain()
        except HitlError as error:
            return self._refusal(error)
        if not held:
            return await awaited(execute(**arguments))
        try:
            result = await awaited(execute(**held.arguments))
        except BaseException as error:
            await undisturbed(held.report, error)
            raise
        await undisturbed(held.report)
        return told_of_changes(held, result)

    # ---- for callers that run the tool themselves ----

    def hold(self, tool: str, arguments: Mapping[str, Any],
             **how: Unpack[How]) -> Held | None:
        """The call, approved and claimed, for a caller that runs it and then
        reports; None if no checkpoint matches. Raises as call() does, whatever
        on_reject is. Until it is reported, the call is recorded as handed
        over."""
        try:
            held = self._match(tool, arguments, how)
            if held:
                held.obtain(handed_over=True)
            return held
        except HitlError as error:
            raise logged(error) from None

    async def ahold(self, tool: str, arguments: Mapping[str, Any],
                    **how: Unpack[How]) -> Held | None:
        """hold() for asyncio."""
        try:
            held = self._match(tool, arguments, how)
            if held:
                await held.aobtain(handed_over=True)
            return held
        except HitlError as error:
            raise logged(error) from None

    def require(self, tool: str, arguments: Mapping[str, Any],
                **how: Unpack[How]) -> dict[str, Any]:
        """The approved arguments, claimed, for middleware that runs the tool
        and reports nothing."""
        held = self.hold(tool, arguments, **how)
        return held.arguments if held else dict(arguments)

    async def arequire(self, tool: str, arguments: Mapping[str, Any],
                       **how: Unpack[How]) -> dict[str, Any]:
        """require() for asyncio."""
        held = await self.ahold(tool, arguments, **how)
        return held.arguments if held else dict(arguments)

    # ---- 1 match ----

    def _is_free(self, tool: str, arguments: Mapping[str, Any],
                 how: How) -> bool:
        """Whether a call of this tool with these argument names is known to
        match nothing, and no value can hide another call. Most calls cost no
        more than this: a microsecond."""
        return (how.get("checkpoint") is None and type(arguments) is dict
                and (tool, *arguments) in self._free
                and has_plain_values(arguments))

    def _match(self, tool: str, arguments: Mapping[str, Any],
               how: How) -> Held | None:
        """The call to ask a person about, or None if it may run at once."""
        if unknown := how.keys() - How.__annotations__.keys():
            raise TypeError(f"unexpected keyword {', '.join(sorted(unknown))}")
        if (not isinstance(tool, str) or re.search("[\ud800-\udfff]", tool)
                or not isinstance(arguments, Mapping)):
            raise HitlError("the tool of a call must be a string, its arguments "
                            "a mapping of names to values; nothing ran",
                            "call(tool, arguments, execute)",
                            reason="bad-arguments")
        own_id = how.get("request_id")
        if own_id is not None and not (
                isinstance(own_id, str) and REQUEST_ID.fullmatch(own_id)):
            raise HitlError(f"request_id {ID_RULE}; nothing ran",
                            reason="bad-arguments")
        named = how.get("checkpoint")
        if named is None:
            match = self.rules.first_match(tool, arguments, how.get("cwd"))
        else:
            match = Match(self.rules.named(named), NAMED_IN_CODE)
        if named is None and match.effect == "allow":
            if len(self._free) < MAX_FREE and self.rules.is_free(tool, arguments):
                self._free.add((tool, *arguments))
            return None
        if match.checkpoint.effect == "deny":
            raise DeniedError(
                f'denied by checkpoint "{match.checkpoint.checkpoint_id}"; '
                "nobody was asked and nothing ran",
                f"{match.why}, in {self.rules.path}")
        return Held(self, tool, arguments, match, how)

    def _refusal(self, error: HitlError) -> Any:
        """What a refused call returns, or raises, as on_reject says."""
        logged(error)
        if self.on_reject == "raise" or type(error) not in ANSWERS:
            raise error
        if not callable(self.on_reject):
            return error.told
        answer = self.on_reject(error.told)
        if isinstance(answer, Exception):
            raise answer from None      # the cause would show the hint too
        return answer

    @overload
    def guard(self, function: Callable[P, R]) -> Callable[P, R]: ...

    @overload
    def guard(self, *, checkpoint: str | None = None, name: str | None = None,
              hide: Iterable[str] = (), context: Any = None,
              optional: bool = False
              ) -> Callable[[Callable[P, R]], Callable[P, R]]: ...

    def guard(self, function: Any = None, **options: Any) -> Any:
        """A function whose calls go through the gate: def, async def,
        methods, callables; name, signature and types are kept.

        checkpoint: the id of one that always holds it, whatever its name.
        name: the tool's, if it is not to be the function's.
        hide: parameters that are not part of the action (a framework's ctx):
        passed on but not shown; self and cls are hidden anyway.
        context: for the reviewer, in place of the gate's.
        optional: no error if no checkpoint can match the name.
        Raises TypeError for what cannot be guarded, ConfigError for a guard
        that would hold nothing and for a checkpoint that does not exist.
        """
        if function is None:
            return functools.partial(guarded, self, **options)
        return guarded(self, function, **options)


def logged(error: HitlError) -> HitlError:
    """The error, after logging its name and whole message."""
    log.error("%s: %s", type(error).__name__, masked_text(str(error), ""))
    return error


def told_of_changes(held: Held, result: T) -> T:
    """A tool's result; if it is a text, what the reviewer changed comes first,
    so that a model does not ask for the original again."""
    if held.changed and isinstance(result, str):
        return f"{held.changed}\n{result}"  # type: ignore[return-value]
    return result


def checked_on_reject(value: Any) -> Any:
    """What to do with a refusal; ConfigError if it makes no sense."""
    fatal = isinstance(value, type) and issubclass(
        value, BaseException) and not issubclass(value, Exception)
    if fatal or not (value in ("raise", "return") or callable(value)):
        raise ConfigError(f'on_reject is "{value}"', 'it can be "raise", '
                          '"return", a callable or an exception class')
    return value


# ================================= Adapters ================================
# Thin faces over Gate.hold for agents that cannot be changed: a hook that a
# coding agent runs before each tool call, a proxy in front of an MCP server, a
# prefix in front of a command. Each refuses in a way its agent understands.
# What the agents send and accept was measured on the real ones in November
# 2026.

Json = dict[str, Any]


def at_path(data: Any, path: str) -> Any:
    """The value at a dotted path, or None."""
    for part in path.split("."):
        data = data.get(part) if isinstance(data, Mapping) else None
    return data


def read_loosely(data: bytes | str) -> Any:
    """The JSON value, or None if it is not JSON. Nothing is run from it."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(data)
    return None


def write_whole(file: int, data: bytes) -> None:
    """Write all of it: os.write may write only a part."""
    while data:
        data = data[os.write(file, data):]


def on_signals(names: str, handler: Callable[[int, Any], None]) -> None:
    """Set the handler for each of these signals that this system has. One that
    is ignored stays so, as in a shell: `nohup` ignores SIGHUP."""
    import signal
    for name in names.split():
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


# ---- the hook: what each coding agent says and accepts ----

DAY = 86_400                    # a request outlives the hook that asked
PRE, ASK, WHY = "PreToolUse", "PermissionRequest", "{why}"


class Dialect(NamedTuple):
    """How one coding agent speaks to its hooks."""

    name: str
    signs: tuple[str, ...]      # all words of one of these are there
    approved: Json              # what to answer, exactly
    rejected: Json
    seconds: float              # the deadline without --deadline
    shows_errors: bool = False  # errors are printed as `rejected`; else exit with 2
    longest: float = DAY - 5    # how long its agent waits at most


def claude(event: str, **answer: Any) -> Json:
    return {"hookSpecificOutput": {"hookEventName": event, **answer}}


ALLOWED = claude(PRE, permissionDecision="allow", permissionDecisionReason=WHY)
DENIED = claude(PRE, permissionDecision="deny", permissionDecisionReason=WHY)
DIALECTS = (                    # the first one whose sign is found counts
    # Cline ignores exit statuses, and after 120 s always runs the tool
    Dialect("cline", ("clineVersion", "tool_call", "preToolUse"),
            {"cancel": False}, {"cancel": True, "errorMessage": WHY}, 115, True, 115),
    Dialect("cursor", ("cursor_version", "beforeShellExecution:",
                       "beforeMCPExecution:"), {"permission": "allow"},
            {"permission": "deny", "user_message": WHY, "agent_message": WHY}, 55),
    Dialect("opencode", ("PreToolUse: hook_source",), ALLOWED, DENIED, 595, True),
    # a plain allow is invalid in Codex: {} lets the call go on
    Dialect("codex", ("PreToolUse: turn_id",), {}, DENIED, 595),
    Dialect("claude", ("PreToolUse: transcript_path",), ALLOWED, DENIED, 595),
    Dialect("claude-permission", ("PermissionRequest: transcript_path",),
            claude(ASK, decision={"behavior": "allow"}),
            claude(ASK, decision={"behavior": "deny", "message": WHY}), 595),
    Dialect("gemini", ("BeforeTool:",), {"decision": "allow"},
            {"decision": "deny", "reason": WHY}, 55),
    # Copilot shows the reason only with exit status 0
    Dialect("copilot-pascal", ("PreToolUse:",), ALLOWED, DENIED, 25, True),
    Dialect("copilot-permission", ("PermissionRequest:", "permissionRequest:"),
            {"behavior": "allow"},
            {"behavior": "deny", "message": WHY, "interrupt": False}, 25, True),
    Dialect("copilot", ("toolName",), {"permissionDecision": "allow"},
            {"permissionDecision": "deny", "permissionDecisionReason": WHY}, 25, True),
)
UNKNOWN = Dialect("", (), {}, {}, 25, False, 25)
CALLS = (       # where the tool's name and its arguments are; the first found counts
    ("tool_call.name", "tool_call.input"),
    ("preToolUse.toolName", "preToolUse.parameters"),
    ("tool_name", "tool_input"), ("toolName", "toolArgs"))
SESSIONS = ("session_id", "sessionId", "taskId", "conversation_id", "transcript_path")


def dialect_of(call: Any) -> Dialect:
    """The dialect of a hook's input, by its event and members, or UNKNOWN."""
    if isinstance(call, dict):
        event = call.get("hook_event_name") or call.get("hookName")
        words = {*call, f"{event}:"}
        for dialect in DIALECTS:
            if any(words.issuperset(sign.split()) for sign in dialect.signs):
                return dialect
    return UNKNOWN


def proposed(call: Json) -> tuple[str, Json]:
    """The tool and arguments in a hook's input; HitlError without a tool, or
    with two: another reader may take the other one."""
    found = [(at_path(call, name), at_path(call, given)) for name, given in CALLS]
    found = [(tool, arguments) for tool, arguments in found if tool is not None]
    shell = call.get("hook_event_name") == "beforeShellExecution"
    if "command" in call and (shell or not found):      # Cursor's shell
        found.append(("shell", {"command": call["command"]}))
    tool, arguments = found[0] if found else (None, None)
    if any(other != tool for other, _ in found):
        raise HitlError("the call names more than one tool")
    if not isinstance(tool, str) or not tool:
        raise HitlError("the call names no tool")
    if isinstance(arguments, str) and read_loosely(arguments) is not None:
        arguments = parse_json(arguments)       # JSON inside JSON
    if arguments is None or isinstance(arguments, dict):
        return tool, arguments or {}
    return tool, {"input": arguments}


def filled(shape: Json, **words: str) -> str:
    """The shape as JSON, with a value in place of each "{word}"."""
    text = json.dumps(shape, indent=2)
    for word, value in words.items():
        text = text.replace(f'"{{{word}}}"', json.dumps(value))
    return text


class Hook:
    """One tool call of a coding agent: read, held, and answered once.

    Most agents run the tool if the answer is late, so an alarm interrupts
    whatever takes too long (a desk that hangs, or a pattern that runs away:
    `re` checks for signals as it goes) and refuses; a timer in C backs it up.
    """

    def __init__(self, config: str | None, deadline: float | None) -> None:
        self.config, self.deadline = config, deadline
        self.began, self.parent = time.monotonic(), os.getppid()
        self.dialect, self.ended = UNKNOWN, False
        self.notes: list[str] = []      # warnings, for a person only

    @property
    def seconds(self) -> float:
        """How long the answer may take."""
        return min(self.deadline or self.dialect.seconds, self.dialect.longest)

    def run(self) -> NoReturn:
        """Answer what is on stdin, and exit."""
        if sys.stdout is None:          # closed: a file opened later could be 1
            os._exit(2)
        log.warning = lambda words, *rest: self.notes.append(words % rest)
        log.error = lambda *_: None     # its hint is not for a model
        self.end(*self.reply(lambda: sys.stdin.buffer.read()))

    def reply(self, read: Callable[[], bytes]) -> tuple[Json | None, int, str]:
        """What to print as JSON, the exit status, and what to say on stderr."""
        try:
            self.alarm()
            return self.answer(read()), 0, ""
        except BaseException as fault:  # a signal, or a fault of ours
            return self.refusal(fault)

    def answer(self, data: bytes) -> Json:
        """What to print if the call may go on; raises if it may not."""
        self.dialect = dialect_of(read_loosely(data))               # 1 read
        self.alarm()                    # again, with this dialect's deadline
        with config_error("the hook's input is not strict JSON:"):
            call = parse_json(data)
        if self.dialect is UNKNOWN:
            raise HitlError("this call is not from a coding agent that hitl.py knows")
        tool, arguments = proposed(call)
        cwd = str(call.get("cwd") or os.getcwd())           # Cline gives none
        own = os.environ.get("HITL_AGENT") or self.dialect.name.partition("-")[0]
        session = next((call[name] for name in SESSIONS if call.get(name)), None)
        key = sha256_of([session, cwd])
        gate = Gate(find_configuration(self.config, local=False), context=call,
                    session=key, agent=f"{own} {cwd} session {key[:8]}")
        text = canonical(arguments).replace("\\", "")       # JSON inside JSON
        if re.search('"echo(","| )hitl-selftest"', text):
            works = "the hook works: this call was refused as a test"
            if unlisted_runs(gate.rules):
                works += UNLISTED
            raise CollaborationError(works)
        held = self.hold(gate, tool, arguments, cwd)                # 2 hold
        if held is None:
            return {}                   # no opinion: its own flow goes on
        why = held.changed or f"approved by {held.approved_by}"     # 3 answer
        answer: Json = json.loads(filled(self.dialect.approved, why=why))
        if held.changed:
            answer["hookSpecificOutput"]["updatedInput"] = held.arguments
        return answer

    def hold(self, gate: Gate, tool: str, arguments: Json, cwd: str) -> Held | None:
        """As Gate.hold, within the deadline. The same call in the same session
        attaches to the request that still waits, or picks up its decision."""
        rule = gate.rules.first_match(tool, arguments, cwd).checkpoint
        left = self.began + self.seconds - time.monotonic()
        wait = min(left - min(1, left / 10), first_of(rule.timeout_seconds, math.inf))
        lifetime = first_of(rule.lifetime_seconds,
                            gate.configuration.gate["lifetime_seconds"], DAY)
        try:
            return gate.hold(
                tool, arguments, cwd=cwd, attach=True, tick=self.check_parent,
                edits=self.dialect.name == "claude",    # the others take no edits
                timeout_seconds=max(0.1, round(wait, 1)),
                lifetime_seconds=lifetime)
        except AlreadyClaimedError:     # by the same call in another hook
            return self.hold(gate, tool, arguments, cwd)

    def check_parent(self) -> None:
        """If nobody is left to read the answer, exit, which withdraws the
        request."""
        import select
        gone = os.getppid() != self.parent
        if hasattr(select, "poll"):
            reader = select.poll()
            reader.register(1, 0)
            gone = gone or bool(reader.poll(0))
        if gone:
            sys.exit("the coding agent is gone")

    def refusal(self, fault: BaseException) -> tuple[Json | None, int, str]:
        """The dialect's refusal, as reply() returns it."""
        if isinstance(fault, SystemExit):               # ours, and says why
            fault = HitlError(str(fault))
        elif not isinstance(fault, HitlError):
            fault = HitlError(visible(error_text(fault)))
        decided = type(fault) in ANSWERS
        why = fault.told if decided else f"hitl: refused: {fault.told}"
        if fault.reason == "still-waiting":
            why = (f"{fault.message}, but the request still waits. Repeat exactly "
                   "this call later to pick up the decision.")
        if self.dialect is UNKNOWN or not (decided or self.dialect.shows_errors):
            return None, 2, why
        answer: Json = json.loads(filled(self.dialect.rejected, why=why))
        return answer, 0, "" if decided else why

    def alarm(self) -> None:
        """Answer in time, whatever happens."""
        import faulthandler
        import signal
        seconds = max(0.001, self.began + self.seconds - time.monotonic())
        if hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, self.too_late)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            seconds += 1
        on_signals("SIGTERM", lambda *_: sys.exit("the hook was ended by SIGTERM"))
        faulthandler.dump_traceback_later(
            seconds, exit=True, file=os.open(os.devnull, os.O_WRONLY))

    def too_late(self, *_: Any) -> None:
        if not self.ended:
            self.end(*self.refusal(ReviewTimeoutError(
                f"no answer within {self.seconds:g} s; nothing ran",
                reason="still-waiting")))

    def end(self, answer: Json | None, status: int, words: str) -> NoReturn:
        """Print the one answer, whole, and exit; with 2 if that fails."""
        self.ended = True               # from here on the alarm does nothing
        notes = [] if status else self.notes    # with 2 a model reads stderr
        text = "".join(f"{line}\n" for line in [*notes, words] if line)
        try:
            if answer is not None:
                write_whole(1, json.dumps(answer).encode() + b"\n")
            if sys.stderr:
                write_whole(2, text.encode(errors="backslashreplace"))
        except OSError:
            status = 2
        os._exit(status)


UNLISTED = "; but a command that no checkpoint names runs unasked"


def unlisted_runs(rules: Rules) -> bool:
    return rules.first_match("Bash", {"command": "unlisted"}).effect == "allow"


# ---- the hook: what to install, and where ----

RUN = {"type": "command", "command": "{command}"}
SNIPPETS: dict[str, tuple[str, Json]] = {       # agent -> its file, what goes into it
    "claude": (".claude/settings.json", {"hooks": {PRE: [{
        "matcher": "*", "hooks": [RUN | {
            "timeout": DAY, "onFailure": "block", "statusMessage": "{waiting}"}]}]}}),
    "codex": (".codex/hooks.json (trust it once with /hooks, or it is skipped)", {
        "hooks": {PRE: [{"matcher": "*", "hooks": [RUN | {
            "timeout": DAY, "statusMessage": "{waiting}"}]}]}}),
    "gemini": ("~/.gemini/settings.json", {"hooks": {"BeforeTool": [{
        "matcher": ".*", "hooks": [RUN | {
            "timeout": DAY * 1000, "name": "{waiting}"}]}]}}),
    "copilot": (".github/hooks/hitl.json", {"version": 1, "hooks": {PRE: [
        {"type": "command", "bash": "{command}", "timeoutSec": DAY}]}}),
    "cursor": (".cursor/hooks.json", {"version": 1, "hooks": {
        event: [{"command": "{command}", "timeout": DAY, "failClosed": True}]
        for event in ("beforeShellExecution", "beforeMCPExecution")}}),
    "cline": (".clinerules/hooks/PreToolUse (make it executable)", {}),  # a script
    "opencode": (".opencode/plugin/hitl.js", {}),       # a plugin
}
OPENCODE = """\
export const Hitl = async () => ({
  "tool.execute.before": async (input, output) => {
    const call = {hook_event_name: "PreToolUse", hook_source: "opencode-plugin",
                  session_id: input.sessionID, cwd: process.cwd(),
                  tool_name: input.tool, tool_input: output.args}
    const run = Bun.spawn(["/bin/sh", "-c", COMMAND],
      {stdin: new Blob([JSON.stringify(call)]), stdout: "pipe", stderr: "pipe"})
    const text = await new Response(run.stdout).text()
    if ((await run.exited) !== 0) throw new Error("hitl: refused")
    const answer = JSON.parse(text)
    if (Object.prototype.toString.call(answer) !== "[object Object]")
      throw new Error("hitl: refused")
    const said = answer.hookSpecificOutput
    if (said && said.permissionDecision !== "allow")
      throw new Error(said.permissionDecisionReason)
  },
})
"""


def snippet(agent: str, config: str | None) -> str:
    """The text to install. Cline ignores exit statuses, so its script prints
    a refusal."""
    import shlex
    try:
        cache = bytecode_folder()
    except OSError as error:
        raise ConfigError(f"{error.filename} {error.strerror}", "chmod 700 it, or "
                          "set XDG_CACHE_HOME to another folder") from None
    # not a venv's Python, and no site-packages: an agent can write into a project's
    python = getattr(sys, "_base_executable", sys.executable)
    line = shlex.join([python, "-I", "-S", "-c", LOADER, cache,
                       str(Path(__file__).absolute()), "hook"])
    if config:
        line += f" --config {shlex.quote(str(Path(config).absolute()))}"
    if agent == "cline":
        refusal = '{"cancel":true,"errorMessage":"hitl unavailable"}'
        return f"#!/bin/sh\n{line} || echo {shlex.quote(refusal)}\n"
    waiting = "hitl: waiting for a person"
    with contextlib.suppress(ConfigError):      # there may be no rules yet
        gate = Gate(find_configuration(config, local=False))
        waiting = f"hitl: review at {gate.server_url}"
    line += " --deadline 86000 || exit 2"
    if agent == "opencode":
        return OPENCODE.replace("COMMAND", json.dumps(line))
    return filled(SNIPPETS[agent][1], waiting=waiting, command=line) + "\n"


# ---- MCP: a proxy between a client and a server on stdio ----

MODERN = "io.modelcontextprotocol/protocolVersion"
CALL = "tools/call"
MESSAGE = ("jsonrpc", "id", "method", "params", "result", "error")
PARAMS = ("name", "arguments", "_meta", "task", "requestState", "inputResponses")


def read_message(line: bytes) -> Json:
    """The message on a line; ValueError if a server could read it as another
    one (CVE-2026-27896: Go takes the last of `name` and `Name`)."""
    message = parse_json(line)
    if b"\r" in line.rstrip(b"\r\n"):
        raise ValueError("a line break inside a message")
    if not isinstance(message, dict):
        raise ValueError("send messages one by one")
    check_names(message, MESSAGE)
    method, params = message.get("method"), message.get("params")
    if folded(str(method)) != CALL:
        return message
    if not (method == CALL and type(message.get("id")) in (str, int)
            and isinstance(params, dict) and isinstance(params.get("name"), str)
            and isinstance(params.get("arguments"), (dict, type(None)))):
        raise ValueError(f"{CALL} needs an id, a name and an object of arguments")
    check_names(params, PARAMS)
    if Call("", {"": params.get("arguments")}).ambiguous:
        raise ValueError("two arguments with names that can be read as one")
    return message


def ids_in(line: bytes) -> list[str | int | None]:
    """The ids to answer under when a line is refused."""
    found = read_loosely(line)
    ids = [at_path(message, "id") for message in
           (found if isinstance(found, list) else [found])]
    return [key for key in ids if type(key) in (str, int)] or [None]


def check_names(members: Json, known: tuple[str, ...]) -> None:
    for name in members:
        if name not in known and folded(name) in known:
            raise ValueError(f"a member that can be read as {folded(name)}")


class Proxy:
    """Passes bytes on as they are, both ways, except tools/call: each call has
    a task of its own, which may wait for a person while everything else goes
    on; what was approved is rebuilt from the members that were read."""

    def __init__(self, gate: Gate, command: list[str], name: str) -> None:
        self.gate, self.command, self.name = gate, command, name
        # by JSON-RPC id: calls that are not sent yet, and the replies to come,
        # with a future for those to calls that a person approved
        self.waits: dict[str, asyncio.Task[None]] = {}
        self.replies: dict[str, asyncio.Future[bytes] | None] = {}
        # approved calls that were answered input_required, by call and state
        self.resumes: dict[tuple[str, str], Held] = {}
        self.tools: Json = {}           # name -> the server's annotations

    # ---- the two processes ----

    async def run(self) -> int:
        """Serve the client on stdin and stdout until it or the server ends ->
        the server's exit status."""
        import asyncio
        self.loop = asyncio.get_running_loop()
        self.child: Any = await asyncio.create_subprocess_exec(
            *self.command, stdin=-1, stdout=-1, limit=1 << 26,
            start_new_session=True)
        inward = self.loop.create_task(self.pump_in())
        outward = self.loop.create_task(self.pump_out())
        ended = self.loop.create_task(self.exited(math.inf))
        try:
            done, _ = await asyncio.wait([inward, outward, ended],
                                         return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()           # a fault of ours ends everything
        finally:
            inward.cancel()
            for task in self.waits.values():
                task.cancel()           # withdraws what is held
            await self.end_server()
            await asyncio.wait([outward], timeout=3)    # its last words
        return shell_status(self.child.returncode or 0)

    async def end_server(self) -> None:
        """End the server and everything that it started."""
        import signal
        self.child.stdin.close()        # it should then end by itself
        for name in ("SIGTERM", "SIGKILL"):
            await self.exited(3)
            with contextlib.suppress(OSError):      # nobody is left
                if os.name == "posix":
                    os.killpg(self.child.pid, getattr(signal, name))
                else:
                    self.child.kill()
        await self.exited(3)

    async def exited(self, seconds: float) -> None:
        """Wait at most this long for the server itself to end; what it started
        may keep its pipes open."""
        import asyncio
        end = time.monotonic() + seconds
        while self.child.returncode is None and time.monotonic() < end:
            await asyncio.sleep(0.05)

    async def pump_in(self) -> None:
        lines = open(0, "rb", closefd=False)
        with contextlib.suppress(ConnectionError):      # the server is gone
            while line := await in_thread(lines.readline):
                self.from_client(line)
                await self.child.stdin.drain()

    async def pump_out(self) -> None:
        async for line in self.child.stdout:
            self.from_server(line)

    def to_client(self, line: bytes) -> None:
        with contextlib.suppress(OSError):              # the client is gone
            write_whole(1, line)

    def answer(self, **message: Any) -> None:
        self.to_client(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")

    # ---- what passes ----

    def from_client(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            message = read_message(line)
        except ValueError as error:     # a server might read it as a call
            why = visible(f"hitl: refused: {error}")
            for key in ids_in(line):
                self.answer(id=key, error={"code": -32600, "message": why})
            return
        number, method = message.get("id"), message.get("method")
        if "method" in message and type(number) in (str, int):
            key = json.dumps(number)
            if key in self.waits or key in self.replies:
                self.answer(id=number, error={      # whose would the reply be?
                    "code": -32600, "message": "hitl: refused: this id is in use"})
                return
            if method == CALL:
                self.waits[key] = self.loop.create_task(self.call(message, line))
                return
            self.replies[key] = None
        if method == "notifications/cancelled":
            wait = self.waits.get(json.dumps(at_path(message, "params.requestId")))
            if wait:                    # it is withdrawn, never sent or answered
                wait.cancel()
                return
        self.child.stdin.write(line)

    def from_server(self, line: bytes) -> None:
        message = read_loosely(line)
        if isinstance(message, dict) and "method" not in message:
            self.learn_tools(at_path(message, "result.tools"))
            reply = self.replies.pop(json.dumps(message.get("id")), None)
            if reply:
                reply.set_result(line)  # run_held() goes on with it
                return
        self.to_client(line)

    def learn_tools(self, tools: Any) -> None:
        """Keep what the server says about its tools; print once on stderr
        which of them wait for a person."""
        said: dict[str, list[str]] = {}
        for tool in tools if isinstance(tools, list) else []:
            name = str(at_path(tool, "name"))
            if name not in self.tools:
                said.setdefault(self.fate_of(name), []).append(name)
            self.tools[name] = at_path(tool, "annotations")
        for words, names in said.items():
            log.warning("hitl: %s: %s: %s", self.name, words,
                        visible(", ".join(names)))

    def fate_of(self, name: str) -> str:
        """What becomes of the calls of a tool."""
        rules, tool = self.gate.rules, f"mcp__{self.name}__{name}"
        match = rules.first_match(tool, {})
        if rules.is_free(tool):
            return "run unasked"
        if match.effect == "deny" and not match.checkpoint.arguments:
            return "are denied"
        return "wait for a person"

    # ---- one call ----

    async def call(self, message: Json, line: bytes) -> None:
        """Send a tools/call: at once if no checkpoint holds it, otherwise when
        it is approved."""
        params = message["params"]
        tool, arguments = params["name"], params.get("arguments") or {}
        call = canonical([tool, arguments])
        resumed = self.resumes.pop((call, json.dumps(params.get("requestState"))),
                                   None)
        try:
            held = resumed or await self.gate.ahold(
                f"mcp__{self.name}__{tool}", arguments, edits=True,
                tick=self.progress(at_path(params, "_meta.progressToken")),
                context={"MCP server": self.command,
                         "what the server says about this tool (untrusted)":
                             self.tools.get(tool) or "nothing: it may destroy"})
        except HitlError as error:      # a result: agents drop an error's reason
            result: Json = {"isError": True, "content": [
                {"type": "text", "text": error.told}]}
            if MODERN in json.dumps(params.get("_meta")):
                result["resultType"] = "complete"
            self.answer(id=message["id"], result=result)
            return
        finally:
            self.waits.pop(json.dumps(message["id"]), None)
        if held:
            await self.run_held(message, held, call)
        else:
            self.replies[json.dumps(message["id"])] = None
            self.child.stdin.write(line)

    async def run_held(self, message: Json, held: Held, call: str) -> None:
        """1 send what was approved (promise 2), 2 pass the answer on, with what
        a reviewer changed as its first content, 3 report how it ended."""
        reply = self.replies[json.dumps(message["id"])] = self.loop.create_future()
        params = {name: value for name, value in message["params"].items()
                  if name in PARAMS} | {"arguments": held.arguments}
        self.child.stdin.write(json.dumps({
            "jsonrpc": "2.0", "id": message["id"], "method": CALL,
            "params": params}).encode() + b"\n")
        line = await reply
        answer = json.loads(line)
        content, failure = at_path(answer, "result.content"), None
        if "error" in answer:
            failure = json.dumps(answer["error"])
        elif at_path(answer, "result.isError"):
            failure = json.dumps(content)
        if held.changed and isinstance(content, list):
            content.insert(0, {"type": "text", "text": held.changed})
        elif held.changed and isinstance(at_path(answer, "error.message"), str):
            answer["error"]["message"] = f"{held.changed}: {answer['error']['message']}"
        if held.changed:
            line = json.dumps(answer).encode() + b"\n"
        self.to_client(line)
        if at_path(answer, "result.resultType") == "input_required":
            state = json.dumps(at_path(answer, "result.requestState"))
            self.resumes[call, state] = held
        else:
            await undisturbed(held.report, failure)

    def progress(self, token: Any) -> Callable[[], None] | None:
        """A function that reports to a client, if it asked for progress, that
        the call waits for a person; its numbers stay below any that the server
        reports later."""
        steps = itertools.count(1)

        def tick() -> None:
            self.loop.call_soon_threadsafe(functools.partial(
                self.answer, method="notifications/progress", params={
                    "progressToken": token, "progress": next(steps) / 1000,
                    "message": "waiting for a person's approval"}))
        return tick if type(token) in (str, int) else None


# ---- a command behind a prefix ----

def run_command(gate: Gate, argv: list[str], timeout: float | None) -> int:
    """Ask, then run exactly the approved argv, without a shell -> its exit
    status; HitlError if it may not run, or cannot."""
    import shutil
    path, cwd = shutil.which(argv[0]), os.getcwd()
    if path is None:
        raise HitlError(f"no such command: {visible(argv[0])}",
                        reason="no-such-command")
    call = {"argv": argv, "cwd": cwd, "executable": os.path.abspath(path)}
    rule = gate.rules.first_match("run", call).checkpoint
    unmatched = rule.checkpoint_id == "unmatched"       # waits anyway
    return gate.call("run", call, execute, timeout_seconds=timeout,
                     checkpoint="unmatched" if unmatched else None)


def execute(argv: list[str], cwd: str, executable: str) -> int:
    """Run the command on this process's streams, and pass signals on to it."""
    import subprocess
    child = subprocess.Popen(argv, executable=executable, cwd=cwd)
    terminal = sys.stdin and sys.stdin.isatty()

    def pass_on(number: int, frame: Any) -> None:
        # a terminal's own SIGINT and SIGQUIT reach the child without us
        if not (terminal and number in (2, 3)):
            child.send_signal(number)
    on_signals("SIGTERM SIGHUP SIGUSR1 SIGUSR2 SIGINT SIGQUIT", pass_on)
    return shell_status(child.wait())


def shell_status(status: int) -> int:
    """An exit status as a shell reports it: 128 + the signal that ended it."""
    return 128 - status if status < 0 else status


# ================================= Evidence ================================
# The whole path, for real: a desk on a free port, a database, the page, a
# gate, and a small agent whose tools work on a table of records of its own.
# `demo` lets a person decide; `verify` presses the page's buttons itself and
# records what was expected (by the guide that README.md names), what was
# observed, and whether they agree.

SAMPLE_RULES = """\
[[checkpoint]]
checkpoint_id = "delete-records"
action_pattern = "delete_*"
description_template = "Delete {table} where {condition}"
category = "destructive"
"""
RECORDS = """
DROP TABLE IF EXISTS users;
CREATE TABLE users (name TEXT, last_login TEXT);
INSERT INTO users VALUES
    ('ana', '2026-05-01'), ('ben', '2019-05-01'), ('cleo', '2018-05-01');
"""
DELETE = {"table": "users", "condition": "last_login < '2020-01-01'"}


class Workshop:
    """A desk with one reviewer, in a thread, and an agent's tools on a table
    of records; its folder is removed at the end."""

    def __init__(self, reviewer: str) -> None:
        import tempfile
        self.scratch = tempfile.TemporaryDirectory(prefix="hitl-")
        self.database = Path(self.scratch.name, "hitl.db")
        self.rules = self.database.with_name("checkpoints.toml")
        self.rules.write_text(SAMPLE_RULES)
        self.records = sqlite3.connect(":memory:", check_same_thread=False)
        self.records.executescript(RECORDS)
        self.token, self.store = fresh_token(), open_store(self.database)
        self.agent_token = fresh_token()
        self.desk = open_desk("127.0.0.1", 0, self.store, Tokens(
            {"sample": token_hash(self.agent_token)}, {}, token_hash(self.token)))
        self.me = Client(self.desk.url, basic(reviewer, self.token))
        self.thread = threading.Thread(target=self.desk.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.desk.stop()
        self.thread.join()
        self.store.close()
        self.records.close()
        self.scratch.cleanup()

    def read_records(self, table: str) -> list[Any]:
        return self.records.execute(f"SELECT * FROM {table}").fetchall()

    def delete_records(self, table: str, condition: str) -> int:
        """What the sample agent wants to run: a real tool, which really
        deletes."""
        return self.records.execute(
            f"DELETE FROM {table} WHERE {condition}").rowcount

    def left(self) -> str:
        return f"{len(self.read_records('users'))} of 3 records left"

    def call(self, agent: str, context: Any, timeout: float | None) -> Any:
        """The agent's call, by a gate of its own: in the session of a shared
        gate, a rejection would answer the next call too."""
        gate = Gate(self.rules, server_url=self.desk.url, agent=agent,
                    token=self.agent_token)
        return gate.call("delete_records", DELETE, self.delete_records,
                         context=context, timeout_seconds=timeout)

    def waiting(self) -> list[str]:
        """The ids of what waits, as soon as the database has any; none after
        five seconds."""
        end, ids = time.monotonic() + 5, list[str]()
        with open_for_reading(self.database) as db:
            while not ids and time.monotonic() < end:
                time.sleep(0.005)
                ids = [request.request_id for request in stored_requests(db)
                       if request.status == Status.WAITING]
        return ids


def basic(name: str, token: str) -> str:
    """An Authorization header for HTTP Basic (RFC 7617)."""
    import base64
    pair = f"{name}:{token}".encode()
    return f"Basic {base64.b64encode(pair).decode()}"


def link_with(url: str, token: str) -> str:
    return url.replace("://", f"://reviewer:{token}@", 1) + "/"


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def say(text: str) -> None:
    """Print a line at once: a reader at the end of a pipe may wait for it."""
    print(text, flush=True)


# ---- demo ----

def demo(timeout: float) -> None:
    """A sample agent that wants to delete, a desk, and a person: you."""
    with contextlib.closing(Workshop("terminal")) as shop:
        records = shop.read_records("users")
        say(f"hitl.py {__version__} demo: an agent wants to delete records, "
            "and waits for you.\n")
        say(f"Review it in a browser:\n{link_with(shop.desk.url, shop.token)}\n"
            f"(if it asks: name reviewer, token {shop.token})\n"
            "Or type a here to approve, r to reject, and press Enter.\n")
        say(f"agent: read_records(users) -> {records}\n"
            f"agent: delete_records({DELETE}) ...")
        threading.Thread(target=decide_by_keys, args=(shop,), daemon=True).start()
        try:
            gone = shop.call("demo agent", {
                "task": "remove users who have not logged in since 2020",
                "records": records}, timeout)
            say(f"agent: approved, {gone} records deleted")
        except (CollaborationError, ReviewTimeoutError) as error:
            say(f"agent: stopped by {type(error).__name__}: {error}")
        say(f"records now: {shop.read_records('users')}")
        if sys.stdin.isatty():
            say("The desk stays open so that you can look at it: press Ctrl-C "
                "to end.")
            while True:
                time.sleep(1)


def decide_by_keys(shop: Workshop) -> None:
    """Decide what waits when `a` or `r` is typed."""
    for line in open(sys.stdin.fileno(), "rb", closefd=False):
        decision = {b"a": "approved", b"r": "rejected"}.get(line.strip()[:1])
        if decision is None:
            say("type a to approve, r to reject")
            continue
        for request_id in shop.waiting():
            shop.me.exchange("POST", f"/approve/{request_id}",
                             {"decision": decision}, seconds=5)
            return


# ---- verify ----

def verify(model: str, timeout: float) -> dict[str, Any]:
    """Run the whole path -> the evidence: what the run depends on, so that it
    can be repeated, and what was expected and observed. Nothing is left on the
    disk."""
    import io
    import platform
    import shlex
    logged, findings = io.StringIO(), []
    log.addHandler(logging.StreamHandler(logged))
    with contextlib.closing(Workshop("verifier")) as shop:
        state = {
            "started_at": instant(time.time()),
            "command": shlex.join([sys.executable, *sys.argv]),
            "python": sys.version.split()[0], "executable": sys.executable,
            "system": platform.platform(), "sqlite": sqlite3.sqlite_version,
            "hitl.py": __version__,
            "hitl.py sha256": file_sha256(Path(__file__)),
            "model": model or "none",
            "configuration sha256": file_sha256(shop.rules),
            "database": str(shop.database), "server": shop.desk.url}
        for name, value in state.items():
            say(f"{name:20} {value}")
        for step, expected, observed in verification(shop, logged, timeout):
            holds = observed == expected
            findings.append({"step": step, "expected": expected,
                             "observed": observed, "holds": holds})
            say(f"\n{'ok  ' if holds else 'FAIL'} {step}\n     expected "
                f"{expected}\n     observed {visible(observed)}")
    return {**state, "configuration": SAMPLE_RULES, "findings": findings,
            "log": logged.getvalue().splitlines(),
            "verified": all(finding["holds"] for finding in findings)}


def verification(shop: Workshop, logged: Any, timeout: float
                 ) -> Iterator[tuple[str, str, str]]:
    """The steps: what is done, what is expected, what was observed."""
    # 1. a call waits, and its card is on the page
    began = time.monotonic()
    call, request_id = triggered(shop)
    took = time.monotonic() - began
    waits = "1 row" if request_id else "no row"
    yield (f"trigger delete_records ({took:.3f} s)", "waiting within 1 s: 1 row",
           f"waiting within {math.ceil(took)} s: {waits}")
    card = card_of(shop, request_id)
    parts = ['class="card waiting"', f'action="/approve/{request_id}"',
             f"Delete users where {DELETE['condition']}</span>",
             'value="approved"', 'value="rejected"']
    yield ("look at the page", ", ".join(parts),
           ", ".join(part for part in parts if part in card))
    # 2. a click on Approve lets it run
    status = click(shop, request_id, "approved")
    clicked = time.monotonic()
    end = call.exception(10) or call.result()
    took = time.monotonic() - clicked
    yield (f"click Approve ({took:.3f} s)", "303, the agent resumes within 5 s",
           f"{status}, the agent resumes within {max(5, math.ceil(took))} s")
    yield ("look at the records", "the tool returned 2, 1 of 3 records left",
           f"the tool returned {end}, {shop.left()}")
    # 3. a click on Reject reaches the caller and the log, and nothing runs
    call, request_id = triggered(shop)
    click(shop, request_id, "rejected")
    end, rejected = call.exception(10), "CollaborationError: rejected by verifier"
    yield "click Reject", rejected, f"{type(end).__name__}: {end}"
    yield "read the log", rejected, logged.getvalue().splitlines()[-1]
    yield "look at the records", "3 of 3 records left", shop.left()
    # 4. nobody decides: TimeoutError
    call, request_id = triggered(shop, timeout)
    late = isinstance(call.exception(timeout + 10), TimeoutError)
    yield (f"wait (time-out set to {timeout} s here)",
           "a TimeoutError, 3 of 3 records left",
           f"{'a' if late else 'no'} TimeoutError, {shop.left()}")


def triggered(shop: Workshop, timeout: float | None = None) -> tuple[Any, str]:
    """The tool, called in a thread -> its future, and the request_id."""
    from concurrent.futures import ThreadPoolExecutor
    shop.records.executescript(RECORDS)
    call = ThreadPoolExecutor().submit(
        shop.call, "verification", {"plan": ["read", "delete"], "step": 2}, timeout)
    return call, first_of(*shop.waiting(), "")


def card_of(shop: Workshop, request_id: str) -> str:
    """The request's card on the page, to the end of its form."""
    page = shop.me.fetch("GET", "/", seconds=5, Accept="text/html")[2].decode()
    card = re.search(f'<details [^>]*"request-{request_id}".*?</form>', page,
                     re.DOTALL)
    return html.unescape(card[0]) if card else ""


def click(shop: Workshop, request_id: str, decision: str) -> int:
    """Press a button of the card as a browser does -> status."""
    from urllib.parse import urlencode
    form = dict(re.findall('<input type="hidden" name="([^"]*)" value="([^"]*)"',
                           card_of(shop, request_id)))
    time.sleep(SEEN_SECONDS)
    return shop.me.fetch(
        "POST", f"/approve/{request_id}",
        urlencode(form | {"reason": "", "decision": decision}).encode(),
        seconds=5, Content_Type=FORM, Accept="text/html",
        Origin=shop.desk.url, Sec_Fetch_Site="same-origin")[0]


# =============================== Command line ==============================
# argv, the environment and stdout. Each command is a cmd_* function that takes
# the parsed arguments and returns the exit status: 0 fine, 1 refused or
# failed, 2 usage or configuration, 3 no decision in time, 4 unreachable.

FILE_HEAD = '''\
# checkpoints.toml: which tool calls of an AI agent wait for a person.
# `python3 hitl.py check` shows what is wrong or doubtful in this file, and
# `python3 hitl.py check delete_users` which checkpoint decides that call.

[gate]                          # the agent's side
server_url = "http://127.0.0.1:8765"
timeout_seconds = 300           # how long a call waits for a decision (default: 30)
# poll_seconds = 5              # the longest time between two looks at the status
# lifetime_seconds = 300        # how long you can decide (default: while it waits)
# unmatched = "review"          # what no checkpoint matches waits (default: "allow")

[server]                        # the reviewer's side: `python3 hitl.py serve`
# host = "127.0.0.1"
# port = 8765
# database = "hitl.db"          # relative to this file
# public_url = ""               # where reviewers reach it, if elsewhere
'''
THREE_RULES = r'''
# A checkpoint: if action_pattern is found in the tool's name, the call waits.
# The pattern is a Python regular expression, found anywhere in the name, in
# any case. Checkpoints are tried from the top, and the first match decides.
# description_template tells the reviewer what would happen: {tool} and the
# arguments named in braces are filled in.

[[checkpoint]]                  # high impact: a model goes live
checkpoint_id = "deploy-model"
action_pattern = "deploy_*"     # deploy_model, redeploy, mcp__ci__deploy ...
description_template = "Deploy model {model} to {environment}"
category = "high-impact"
# arguments = { environment = "prod" }  # only if it matches this, or is missing

[[checkpoint]]                  # data risk: data leaves your systems
checkpoint_id = "external-request"
action_pattern = "send|http|api.?request|publish|upload"
description_template = "Send to {url}"
category = "data-risk"

[[checkpoint]]                  # destructive: cannot be undone
checkpoint_id = "delete-records"
# delete_* is "delete" and any number of _: delete_records, deleteUser ...
action_pattern = "delete_*|drop|remove|purge|truncate|wipe"
description_template = "Delete from {table} where {condition}"
category = "destructive"
# timeout_seconds = 900         # for this one, in place of [gate]'s
# effect = "deny"               # or "allow": then the whole name must match exactly
# remember = false              # no standing decisions about its calls
# editable = true               # the reviewer may change its arguments
'''
PAY_RULE = '''
[[checkpoint]]                  # high impact: money moves
checkpoint_id = "pay"
action_pattern = "pay(?!load)|charge|refund|transfer|purchase"
description_template = "Pay {amount} to {recipient}"
category = "high-impact"
'''
TRIPWIRES_HEAD = """
# If your agent has a shell, uncomment what you want: kind = "shell" looks at
# commands, kind = "edit" at the files an edit touches, whatever the tool is
# called. These are tripwires: what nobody can list (a script, an alias)
# passes. `python3 hitl.py init --coding-agent` turns this around: it writes a
# list of the commands that may run, and every other one waits.
"""
# A category, an id and a pattern on each line.
TRIPWIRES = r"""
destructive shell-delete  (?<![-\w])(rm|rmdir|unlink|shred|truncate|rimraf|trash|ri)\b
destructive shell-wipe    -delete\b|--delete|\bpurge |Remove-Item|\bFLUSH|::Delete
destructive shell-sql     \b(DROP|TRUNCATE) (TABLE|DATABASE)|\bDELETE FROM\b|\bdropdb\b
destructive shell-disk    \bdd\b[^;&|]{0,60} of=|\bmkfs|\b(del|erase|rd) /|Clear-Content
destructive shell-undo    \bgit\b(?!.commit)[^;&|]{0,60}( -D|\b(clean|reset|remove))\b
high-impact shell-push    \bgit\b(?!.commit)[^;&|]{0,60}\bpush\b|\bhub push\b
high-impact shell-send    \bgit (send-pack|svn dcommit)|\b(hg|sl|gem|docker) push\b
high-impact shell-publish \b(gh (pr merge|release|repo)|(p?npm|cargo) publish|twine)\b
high-impact shell-deploy  \b(tf|tofu|terra\w{4,5}|pulumi) [^;&|]{0,60}\b(apply|destroy)
high-impact shell-cluster \b(kubectl|helm)\b[^;&|]{0,60}\b(apply|delete|install|upgrade)
destructive shell-pipe    \|[^;&|]{0,60}(?<![.\w])(?<!grep )([bdmptz]?[ackw]?sh|iex)\b
destructive shell-stdin   \| ?(python3?|perl|ruby|node|php)( -)? ?(\Z|[\n;&|)])
destructive shell-text    (?<![.\w])(sh|(ba|z)sh|pwsh|powershell) (-\w?c|<)|\beval\s
destructive shell-hidden  \$'[^']{0,30}\\(x(?!1b)|u|(?!033)\d{3})|(\bsource|\B\.) <\(
destructive shell-windows \bcmd(.exe)? /c|\b(pwsh|powershell) [^;&|]{0,60}-enc
destructive shell-code    \b(perl|ruby|node|php|deno) (-[er]|eval)\b|\bsystem\(|\biex\s
destructive shell-file    \bbase64 (-d|--decode)|\bsource \./|(cp|install) /dev/null
"""

# What a coding agent may run unasked: commands that only read, as listed here.
# The patterns contain quotes because they match the text as it is written.
READ_ONLY = (
    r"pwd|whoami|date|nproc|uname( -[a-z])?|true|false|man [a-z][\w-]*",
    r"(ls|cat|head|tail|wc|stat|du|df|realpath|which|cut)( [\w ./:=@%+,-]*)?",
    r"echo( .*)?|sort( -[bdfghnruV]+)?|uniq( -[cdu]+)?",
    r"grep(?!.*([ '\"]/|\.\.)) [ -~]*",           # -r from / reads everything
    r"test -[defrsx] [\w./-]+|sed -n '[0-9,$]{1,9}p'( [\w./][\w./-]*)?",
    r"awk '\{print \$[0-9]+\}'( [\w./][\w./-]*)?",
    r"find(?!.*(''|\w'\w|'-|-'| -(exec|ok|del|fpr|fls)))( [\w ./*'-]*)?",
    r"git (status|diff|log|show|rev-parse|ls-files|blame|shortlog)"
    r"(?!.* --(ou|ext|no-in))( [\w ./:=@%+,-]*)?",
    r"git (branch( -[av]+| --show-current)?|remote( -v)?|stash list)",
)
BUILDS = (
    r"(pytest|python3? -m pytest|make|ruff|mypy|npx tsc)( [\w ./:=@%+,-]*)?",
    r"(go|cargo) (build|test|vet|check|clippy)( [\w ./:=@%+,-]*)?",
    r"npm (test|run (build|lint|test))",
)
OWN_PROGRAM = r"\bhitl\.py\b|-m hitl\b|import hitl\b|(?<!\w)/(proc|dev/fd)\b"
MCP_TOOLS = "^mcp[_.:/-].*(delete|drop|purge|deploy|send|publish|pay|refund|transfer)"
BUILDS_HEAD = """
# Builds and tests run what the agent wrote. With them, this is not a boundary.
"""
CODING_HEAD = """
# A coding agent's shell: the commands listed here run unasked, and every other
# one waits. An allow rule looks at each simple command as it is written, and
# applies only if the whole text is plain: words, quotes without escapes,
# && || | ; and line ends. Files can be read without review, and edited in the
# project and in /tmp. Edits of other files wait, and edits of the files that
# restrain the agent (its leash) are denied.
# Written for the project {project}.
"""


def answer(args: Any, value: Any, lines: Iterable[str]) -> int:
    """Print what a command found, as JSON or as lines -> its exit status."""
    say(json.dumps(value, indent=2) if args.json else "\n".join(lines))
    return 0


def read_token(name: str) -> str | None:
    """A token from the environment; ConfigError if it is a weak one."""
    token = os.environ.get(name)
    if token and not re.fullmatch(r"[!-~]{16,}", token):
        raise ConfigError(
            f"{name} is shorter than 16 characters, or not plain ASCII",
            f"a good one: {fresh_token()}")
    return token or None


def configuration_for(args: Any) -> Configuration:
    """The configuration in force; if there is no file, the defaults, without
    checkpoints, so no Gate can be made from it."""
    try:
        path = find_configuration(args.config)
    except ConfigError:
        gate, server = (checked(Path(), "", kind, {}) for kind in
                        ("gate", "server"))
        return Configuration(Rules(()), gate, server, {}, {})
    return load_configuration(path)


def server_settings(args: Any, configuration: Configuration) -> dict[str, Any]:
    """[server] as it is in force: flag, then environment, file, default. Paths
    in a file are relative to it."""
    folder = configuration.path.parent if configuration.path else Path()
    given = {name: getattr(args, name, None) for name in KEYS["server"]}
    given["database"] = given["database"] or os.environ.get("HITL_DATABASE")
    settings = dict(configuration.server)
    for name, (check, _) in KEYS["server"].items():
        if given[name] not in (None, ""):
            with config_error("--" + name.replace("_", "-")):
                settings[name] = check(given[name])
        elif name in ("database", "tls_certificate", "tls_key") and settings[name]:
            settings[name] = folder / settings[name]
    settings["database"] = Path(settings["database"]).absolute()
    return settings


def reviewer_client(args: Any) -> Client:
    """A client of the server, for the reviewer at the keyboard."""
    import getpass
    configuration, name = configuration_for(args), "reviewer"
    for variable in ("USERNAME", "USER", "LOGNAME", "HITL_REVIEWER"):
        name = os.environ.get(variable) or name
    token = os.environ.get("HITL_REVIEWER_TOKEN")
    if not token and sys.stdin.isatty():
        token = getpass.getpass("reviewer's token (serve printed it): ")
    if not token:
        raise ConfigError("no reviewer token",
                          "set HITL_REVIEWER_TOKEN; serve printed it")
    with config_error("HITL_REVIEWER"):
        name = name_value(name)
    return Client.of(configuration, args.server_url or asked_at(configuration),
                     basic(name, token))


def asked_at(configuration: Configuration) -> str:
    """Where agents ask, and reviewers who type."""
    return str(os.environ.get("HITL_SERVER_URL") or configuration.gate["server_url"])


def reply_of(client: Client, method: str, path: str, body: Any = None
             ) -> dict[str, Any]:
    """The body of the server's answer; for an unknown request_id, the longer
    ones that begin with it. HitlError, in the server's words, if it refuses."""
    reply = client.exchange(method, path, body, seconds=15)
    if reply.status < 400 or reply.body.get("longer_ids"):
        return reply.body
    title, detail = reply.body.get("title"), reply.body.get("detail")
    if reply.reason == "wrong-credentials":
        title = "the server does not know this name and token"
        detail = ("HITL_REVIEWER_TOKEN is what serve printed or was given; a "
                  "[[reviewer]] sets HITL_REVIEWER to the name as well")
    raise HitlError(visible(str(title)), visible(str(detail)),
                    reason=reply.reason)


def request_named(client: Client, start: str, alone: bool = False) -> dict[str, Any]:
    """The request with this id, or else the only one whose id begins with it.
    `alone` also refuses a whole id that begins another one: an agent once
    chose the id `1f0c`, and was approved in another's place."""
    if not REQUEST_ID.fullmatch(start):
        raise ConfigError(f'"{visible(start)}" is not a request_id',
                          "`python3 hitl.py list --all` has the latest")
    request = reply_of(client, "GET", f"/review/{start}")
    ids = request.get("longer_ids") or []
    exact = "digest" in request
    if exact and not (alone and ids):
        return request
    if not exact and len(ids) == 1:
        return reply_of(client, "GET", f"/review/{ids[0]}")
    hint = f"write more of it: {', '.join(ids)}"
    if exact:
        hint += f'; "{start}" itself can be decided on the page'
    raise ConfigError(f'"{start}" is the beginning of several request_ids', hint)


def fitted(text: str, indent: int = 0) -> list[str]:
    """Visible text in pieces that fit the terminal after an indent."""
    import shutil
    room = max(shutil.get_terminal_size((120, 24)).columns, 20) - indent - 1
    pieces, used = [""], 0
    for letter in text:
        wide = unicodedata.east_asian_width(letter) in "WF"
        if used + 1 + wide > room:
            pieces.append("")
            used = 0
        pieces[-1] += letter
        used += 1 + wide
    return pieces


def labelled(name: str, text: str, size: str = "") -> str:
    """A text after its name or, with a size, as lines that begin with a bar. A
    line that is too long for the terminal continues after a plus, so that
    nothing can look like another line."""
    lines = [f"    {name:12} {text}"]
    if size:
        block = [f"    | {line}" for line in text.split("\n")]
        lines = [f"    {name}: {size}", *block, f"    end of {name}"]
    return "\n".join("\n    + ".join(fitted(line, 6)) for line in lines)


def request_lines(request: dict[str, Any]) -> Iterator[str]:
    """One request in full, as the page shows it."""
    headline = one_line(request["action_description"])
    yield f"{request['status']:9} {headline}"
    if headline != visible(request["action_description"]):
        text, size = visible_lines(request["action_description"]), ""
        if "\n" in text:
            size = readable_size(len(text.encode()))
        yield labelled("in full", text, size)
    what = "exactly this"
    if request["status"] == Status.WAITING:
        what = "runs exactly this"
    yield f"  {what}: {visible(request['tool'] or 'no tool')}"
    asked, approved = request["arguments"] or {}, request["approved_arguments"]
    arguments = parse_json(approved) if approved else asked
    for name, size, text in argument_rows(arguments):
        label = visible(name)
        if not re.fullmatch("[A-Za-z0-9_.-]+", name):
            label = f'"{label}"'        # or it could look like a bar or an end
        yield labelled(label, text, size)
    if approved:
        changes = changes_in_words(person(request["decided_by"]),
                                   canonical(asked), approved)
        yield labelled("(edited)", visible(changes))
    if request["handed_over"] and request["outcome"] == Outcome.RUNNING:
        request = request | {"outcome": "handed over"}
    yield "  who asks, and what is known:"
    for name in ("agent", "asked_by", "checkpoint_id", "category", "why",
                 "received_at", "deadline", "decided_by", "signed_in", "standing",
                 "decided_at", "reason", "outcome", "outcome_text", "notices",
                 "request_id", "digest"):
        if request.get(name):
            yield labelled(name, visible(str(request[name])))
    if request["agent_context"] is not None:
        context = visible_lines(layout(request["agent_context"]))
        yield labelled("context", context, readable_size(len(context.encode())))
    if request["status"] == Status.WAITING:
        who = "an agent" if request["attended"] else "nobody"
        yield f"  {who} waits for it now"


# ---- the commands ----

def cmd_serve(args: Any) -> int:
    """run the desk: server, page and database, until Ctrl-C"""
    import gc
    import signal
    # 1. what was asked for, unless it is unsafe
    configuration = configuration_for(args)
    server = server_settings(args, configuration)
    host, port = server["host"], server["port"]
    warnings = warnings_of(configuration, server["public_url"], serves=True)
    channels = channels_of(configuration.path, configuration.notify, os.environ)
    terminal = sys.stdout is not None and sys.stdout.isatty()
    tokens, made = serving_tokens(configuration, terminal)
    tls = tls_context(server["tls_certificate"], server["tls_key"])
    if not is_loopback(host):
        check_exposure(host, tokens, args.allow_clear_text or bool(tls)
                       or server["public_url"].startswith("https://"))
    # 2. the database and the socket
    store = open_store(server["database"])
    try:
        loop = open_desk(host, port, store, tokens, server["public_url"],
                         tls=tls, rules=configuration.rules,
                         limits=limits_here())
    except OSError as error:
        store.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}",
                          "another server may be using it: try --port 0, which "
                          "takes a free one") from None
    # 3. where it is, and everything worth knowing at the start
    printer = Printer(bell="\a" if terminal else "")
    for line in (*greeting(loop, configuration, made), *warnings):
        printer.write(visible(line))
    # 4. serve until a signal
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.stop())
    gc.set_threshold(50_000)        # large requests are made of many parts
    loop.say = printer.write
    loop.start_notices(channels, configuration.rules)
    try:
        loop.serve_forever()
    finally:
        head = store.head
        printer.write(f"stopped; audit log: {head.sequence} rows, head {head.hash}")
        printer.close()
        store.close()
    return 0


def greeting(loop: Loop, configuration: Configuration,
             made: str | None) -> Iterator[str]:
    """What serve prints when it starts; `made` is a token made just now."""
    store, tokens = loop.desk.store, loop.desk.tokens
    yield f"hitl.py {__version__}: review what waits at"
    if made:
        yield link_with(loop.url, made)
        yield f"name reviewer, token {made}"
        yield "to keep this token: HITL_REVIEWER_TOKEN=TOKEN python3 hitl.py serve"
    else:
        yield f"{loop.url}/"
        whose = "your name and your own token"
        if not tokens.named:
            whose = "any name and HITL_REVIEWER_TOKEN"
        yield f"sign in with {whose}"
    yield f"configuration {configuration.path or 'none found: defaults of [server]'}"
    yield f"database {store.path}"
    yield f"audit log: {store.head.sequence} rows, head {store.head.hash}"
    connection = os.environ.get("SSH_CONNECTION", "").split()
    if len(connection) == 4:
        import getpass
        port = loop.server_port
        yield (f"from your own machine: ssh -L {port}:127.0.0.1:{port} "
               f"{getpass.getuser()}@{connection[2]}")
    asked = asked_at(configuration)
    yield f"agents that read this configuration ask at {asked} (server_url)"
    own = f"{'https' if loop.tls else 'http'}://127.0.0.1:{loop.server_port}"
    if "://127.0.0.1:" in asked and asked != own:
        yield f"warning: this desk listens at {own}: is that server_url right?"
    if not tokens.agents:
        yield "any program on this machine can ask; HITL_AGENT_TOKEN changes that"


MAX_UNREAD_LINES = 1000         # of serve's output; any more are lost


class Printer:
    """Prints lines on stdout, and serve never waits for it: if nobody reads
    them they are lost, and counted. What is logged is printed too."""

    def __init__(self, bell: str) -> None:
        self.lines: deque[str] = deque()
        self.lost, self.ended, self.bell = 0, False, bell
        self.wake = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        logging.basicConfig(stream=self, format="%(message)s")

    def write(self, text: str) -> None:
        if re.search("^[0-9:]{8} submitted", text, re.MULTILINE):
            text += self.bell
        for line in text.removesuffix("\n").split("\n"):
            if len(self.lines) < MAX_UNREAD_LINES:
                self.lines.append(f"{line}\n")
            else:
                self.lost += 1
        self.wake.set()

    def run(self) -> None:
        # if stdout is closed, its number may be a socket's by now
        read, reported = sys.stdout is not None, 0
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        while not self.ended or self.lines or self.lost > reported:
            self.wake.wait()
            self.wake.clear()
            lines = [self.lines.popleft() for _ in range(len(self.lines))]
            lost = self.lost
            if lost > reported:
                lines.append(f"{lost - reported} lines were lost here\n")
                reported = lost
            data = "".join(lines).encode(encoding, "backslashreplace")
            while data and read:
                try:
                    data = data[os.write(1, data):]
                except OSError:             # nobody reads any more
                    read = False

    def close(self) -> None:
        """Wait for the last lines, but not for long."""
        self.ended = True
        self.wake.set()
        self.thread.join(1)


def serving_tokens(configuration: Configuration, terminal: bool
                   ) -> tuple[Tokens, str | None]:
    """Who may sign in, and the reviewer's token if it was made here, which may
    be shown only on a terminal."""
    agent, shared = read_token("HITL_AGENT_TOKEN"), None
    made = None
    if not configuration.reviewers:
        shared = read_token("HITL_REVIEWER_TOKEN")
        if not shared and not terminal:
            raise ConfigError(
                "no reviewer could sign in: stdout is not a terminal, so "
                "whoever started this could read a fresh token from it",
                "set HITL_REVIEWER_TOKEN to one of 16 characters or more, or "
                "give each reviewer one: python3 hitl.py token NAME")
        if not shared:
            shared = made = fresh_token()
    agents = dict(configuration.agents)
    if agents.keys() & {"token", "unauthenticated"}:
        raise ConfigError('no [[agent]] can be called "token" or "unauthenticated"',
                          "the log uses these names for agents without a name")
    if agent:
        agents["token"] = token_hash(agent)
    tokens = Tokens(agents, configuration.reviewers, shared and token_hash(shared))
    if {*agents.values()} & {tokens.shared, *tokens.named.values()}:
        raise ConfigError("agent and reviewer have the same token",
                          "an agent could approve; a good one for the agent: "
                          f"{fresh_token()}")
    return tokens, made


def tls_context(certificate: str, key: str) -> Any:
    """An ssl.SSLContext of a certificate and its key, or None without them."""
    if not certificate and not key:
        return None
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:        # "" makes an encrypted key fail instead of asking on the terminal
        context.load_cert_chain(certificate, key or None, password="")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f'cannot use tls_certificate "{certificate}", tls_key "{key}": {error}',
            "tls_certificate and tls_key are PEM files that belong together; "
            "the key must not have a password") from None
    return context


def check_exposure(host: str, tokens: Tokens, safe: bool) -> None:
    """For an address that other machines can reach: ConfigError if agents have
    no token, or if it is not `safe`, so that tokens would cross the network in
    clear text."""
    if not tokens.agents:
        raise ConfigError(f"{host} can be reached from other machines, and "
                          "agents have no token",
                          f"set HITL_AGENT_TOKEN; a good one: {fresh_token()}")
    if not safe:
        raise ConfigError(
            f"{host} can be reached from other machines, and tokens would "
            "cross the network in clear text",
            "stay on 127.0.0.1 and use `ssh -L`, or give --tls-certificate and "
            "--tls-key, or an https public_url (a proxy holds the "
            "certificate), or use --allow-clear-text")


def warnings_of(configuration: Configuration, public_url: str,
                serves: bool = False) -> list[str]:
    """What is doubtful about a configuration; ConfigError if it is unsafe."""
    return [f"warning: {doubt}" for doubt in (
        *file_doubts(configuration, serves), *rule_doubts(configuration.rules),
        *notice_doubts(configuration, public_url))]


def file_doubts(configuration: Configuration, serves: bool) -> list[str]:
    """A doubt if a group can write the file; ConfigError if everybody can. If
    this process `serves`, ConfigError too if another user could change who
    decides, who asks or who is told, or if a group could change a command,
    which runs as this user."""
    path, notify = configuration.path, configuration.notify
    if path is None or os.name != "posix":
        return []
    status, cure = path.stat(), f"chmod go-w {path}"
    if status.st_mode & 0o002:
        raise ConfigError(f"{path} can be written by everybody", cure)
    people = notify or configuration.reviewers or configuration.agents
    if serves and people and status.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            f"{path} belongs to another user, who could change its [[reviewer]], "
            "[[agent]] and [[notify]]",
            "serve with a file of your own (--config), or as root: chown "
            f"{os.geteuid()} {path}")
    if not status.st_mode & 0o020:
        return []
    by_group = f"{path} can be written by its group"
    if serves and any(entry["command"] for entry in notify):
        raise ConfigError(f"{by_group}, and a [[notify]] runs a command from it",
                          cure)
    return [by_group]


def notice_doubts(configuration: Configuration, public_url: str) -> Iterator[str]:
    """What is doubtful about the [[notify]] entries."""
    known = [rule.checkpoint_id for rule in configuration.rules.checkpoints]
    linked = [f'"{entry["name"]}"' for entry in configuration.notify
              if not entry["command"]]
    if linked and not public_url:
        yield (f"notify {', '.join(linked)}: public_url is empty, and a link to "
               "this machine is no use on a phone: set public_url under [server]")
    for entry in configuration.notify:
        name = f'notify "{entry["name"]}"'
        if writes_secret(entry):
            yield (f"{name}: a secret is written out, and agents can read this "
                   "file: write ${NAME}, which serve takes from its environment")
        for checkpoint_id in entry["checkpoint"]:
            if checkpoint_id not in (*known, *OURS):
                yield (f'{name}: no checkpoint "{checkpoint_id}" in this file'
                       f"{did_you_mean(checkpoint_id, known)}")


def writes_secret(value: Any, name: str = "") -> bool:
    """Whether some text in a [[notify]] table looks like a secret, by its name
    or its shape."""
    if isinstance(value, dict):
        return any(writes_secret(item, key) for key, item in value.items())
    if isinstance(value, list):
        return any(writes_secret(item, name) for item in value)
    if not isinstance(value, str) or "${" in value:
        return False
    text = PLACEHOLDER.sub("", value)
    line = f"{name}: {text}"
    if text.strip() and re.search("^sign$|(?i:key)$", name):
        return True
    strewn = r"(?=[\w-]*[0-9])(?=[\w-]*[A-Za-z])[\w-]{20,}"
    return masked_text(line, "") != line or bool(re.search(strewn, line))


def rule_doubts(rules: Rules) -> Iterator[str]:
    """What is doubtful about the checkpoints."""
    for number, rule in enumerate(rules.checkpoints):
        name, pattern = f'checkpoint "{rule.checkpoint_id}"', rule.action_pattern
        if rule.kind == "tool" and re.search(r" |(?:^|[|^])[A-Z]\w*\\?\(", pattern):
            yield (f"{name}: {pattern!r} is looked for in the names of tools, and "
                   'no name contains that; did you mean kind = "shell"?')
        for above in rules.checkpoints[:number]:
            if covers(above, rule):
                yield (f'{name} never decides: "{above.checkpoint_id}" above it '
                       "matches the same calls; put the narrower one first")
                break
    effects = {rule.effect for rule in rules.checkpoints if rule.kind == "shell"}
    if effects and "allow" not in effects and unlisted_runs(rules):
        yield ('kind = "shell" is used without an allow list (effect = "allow"): '
               "a command that no pattern matches runs (hitl.py 1.0 held what it "
               "could not take apart); `python3 hitl.py init --coding-agent` "
               "writes a list")


def covers(above: Checkpoint, rule: Checkpoint) -> bool:
    """Whether one checkpoint plainly matches all that another does: it matches
    everything, or has the same pattern, or a simple one that finds the other's
    name (`delete` of `delete_*`)."""
    if above.arguments or above.kind != rule.kind:
        return False
    wide, narrow = above.action_pattern, rule.action_pattern
    if wide in (".*", ".+"):
        return above.effect != "allow" or rule.kind == "tool"
    if above.effect == "allow":
        return False
    simple = re.fullmatch(r"[\w*|-]+", wide)
    name = re.fullmatch(r"(\w+?)(?:\w\*)?", narrow)
    return wide == narrow or bool(simple and name and above.finds(wide, name[1]))


SPARE_FILES = 64                # descriptors that are not connections


def limits_here() -> Limits:
    """The limits, with as many connections as the system lets us have: if
    accept() has no file descriptor left, reviewers have to wait too."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        want = LIMITS.connections + SPARE_FILES
        if hard != resource.RLIM_INFINITY:
            want = min(want, hard)
        if soft != resource.RLIM_INFINITY and soft < want:
            resource.setrlimit(resource.RLIMIT_NOFILE, (want, hard))
        return LIMITS._replace(connections=want - SPARE_FILES)
    return LIMITS


def cmd_check(args: Any) -> int:
    """show which checkpoint decides a call; without a call, check the file"""
    configuration = load_configuration(find_configuration(args.config))
    if args.replay:
        return replay(args, configuration)
    rules = configuration.rules
    if args.tool is None:
        return lint(args, configuration)
    with config_error("JSON of the arguments, like '{\"table\": \"users\"}':"):
        arguments = parse_json(args.arguments)
        if not isinstance(arguments, dict):
            raise ValueError("this is not an object")
    match = rules.first_match(args.tool, arguments)
    return answer(args, {
        "tool": args.tool, "effect": match.effect, "why": match.why,
        "checkpoint_id": match.checkpoint.checkpoint_id},
        explained(configuration, match, args.tool, arguments))


def replay(args: Any, configuration: Configuration) -> int:
    """Try today's rules on the stored requests, to see which would end
    differently. Paths in them are relative to the working directory."""
    path = server_settings(args, configuration)["database"]
    changed, counts = [], Counter(dict.fromkeys(
        ("as before", "would no longer wait", "denied", "by another checkpoint"), 0))
    try:
        with open_for_reading(path) as db:
            for request in stored_requests(db):
                if sys.stderr.isatty() and counts.total() % 1000 == 0:
                    print(f"{counts.total()} calls", end="\r", file=sys.stderr)
                became, now = replayed(configuration.rules, request)
                counts[became] += 1
                if became != "as before":
                    changed.append({
                        "request_id": request.request_id, "tool": request.tool,
                        "was": request.checkpoint_id, "now": now,
                        "became": became})
    except (sqlite3.DatabaseError, ValueError) as error:
        raise HitlError(f"{path}: {error}", "`python3 hitl.py log --verify` shows more"
                        ) from None
    summary = ", ".join(f"{count} {became}" for became, count in counts.items())
    lines = [f"{counts.total()} calls: {summary}"]
    for row in changed:
        lines.append(visible(f"  {row['became']}: {row['request_id']} {row['tool']}, "
                             f"{row['was']} -> {row['now']}"))
    return answer(args, {"calls": counts.total(), **counts, "changed": changed}, lines)


def replayed(rules: Rules, request: ReviewRequest) -> tuple[str, str]:
    """What would become of a stored request, and by which checkpoint. One
    without a tool was asked without rules; a checkpoint that the code names
    holds the call as long as it exists."""
    was = request.checkpoint_id or ""
    if request.tool is None:
        return "as before", was
    if request.why == NAMED_IN_CODE and was in (
            "unmatched", *(rule.checkpoint_id for rule in rules.checkpoints)):
        return "as before", was
    match = rules.first_match(request.tool, parse_json(request.arguments or "{}"))
    now = match.checkpoint.checkpoint_id
    if match.effect == "allow":
        return "would no longer wait", now
    if match.effect == "deny":
        return "denied", now
    return "as before" if was in (now, "") else "by another checkpoint", now


def lint(args: Any, configuration: Configuration) -> int:
    """What the file holds, what is doubtful in it, and whether the server
    answers."""
    rules, url = configuration.rules, asked_at(configuration)
    warnings = warnings_of(configuration, configuration.server["public_url"])
    client, server = Client.of(configuration, url), "answers"
    try:
        reply_of(client, "GET", "/healthz")
    except HitlError as error:
        server = error.message
    lines = [f"{rules.path}: {len(rules.checkpoints)} checkpoints, fine"]
    for rule in rules.checkpoints:
        kind = "" if rule.kind == "tool" else f"{rule.kind}: "
        lines.append(f"  {rule.checkpoint_id:20} {rule.effect:7} "
                     f"{kind}{rule.action_pattern}")
    lines += [f"  {'(everything else)':20} {rules.unmatched}", *warnings,
              f"server {url}: {server}"]
    return answer(args, {
        "path": str(rules.path), "warnings": warnings, "server": server,
        "checkpoints": [rule.checkpoint_id for rule in rules.checkpoints]}, lines)


def explained(configuration: Configuration, match: Match, tool: str,
              arguments: dict[str, Any]) -> Iterator[str]:
    """What becomes of a call, and why."""
    rules, rule = configuration.rules, match.checkpoint
    words = {"review": "waits for a person", "allow": "runs without review",
             "deny": "is denied"}[match.effect]
    named, more = rule in rules.checkpoints, ""
    if " " in tool:
        import shlex
        command = shlex.quote(json.dumps({"command": tool}))
        yield visible("no tool's name has a blank in it; to ask about a command: "
                      f"check Bash {command}")
    source = f'checkpoint "{rule.checkpoint_id}" in' if named else "by"
    yield f"{visible(tool)} {words}: {source} {rules.path}"
    if rule.checkpoint_id == "unmatched":
        more = f', and unmatched = "{rules.unmatched}"'
    yield f"  because  {match.why}{more}"
    if tool == "run" and not named:
        yield "  but      `python3 hitl.py run` always waits"
    if match.effect == "review":
        yield "  shown as " + visible(describe(rule, tool, arguments))
        seconds = rule.timeout_seconds or configuration.gate["timeout_seconds"]
        yield f"  waits    {limited(seconds)}"


def cmd_init(args: Any) -> int:
    """write a commented checkpoints.toml beside hitl.py, unless it exists"""
    path = absolute(args.config or os.environ.get("HITL_CONFIG")
                    or beside_this_file())
    text = first_rules()
    if args.coding_agent:
        text = coding_rules(path, absolute("."))
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} already exists", "it was not changed; "
                          "move it away to get a new one, or go on with "
                          "python3 hitl.py serve") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    say(f"wrote {path}; next: python3 hitl.py serve")
    return 0


def rule_text(checkpoint_id: str, pattern: str, template: str = "Run {command}",
              kind: str = "shell", **more: str) -> str:
    """A [[checkpoint]] as TOML, after an empty line."""
    quoted = f"'{pattern}'"
    if "'" in pattern:
        quoted = json.dumps(pattern, ensure_ascii=False)
    lines = ["", "[[checkpoint]]", f'checkpoint_id = "{checkpoint_id}"',
             f'kind = "{kind}"', f"action_pattern = {quoted}",
             f'description_template = "{template}"',
             *(f'{name} = "{value}"' for name, value in more.items())]
    return "\n".join(lines) + "\n"


def numbered(name: str, patterns: Iterable[str], *how: str, **more: str) -> str:
    """A [[checkpoint]] for each pattern: name-1, name-2 ..."""
    return "".join(rule_text(f"{name}-{n}", pattern, *how, **more)
                   for n, pattern in enumerate(patterns, 1))


def commented(rules: str) -> str:
    return re.sub("(?m)^(?=.)", "# ", rules)


def first_rules() -> str:
    """The checkpoints.toml of an agent without a shell; tripwires for one with
    a shell are commented out."""
    text = FILE_HEAD + THREE_RULES + PAY_RULE + TRIPWIRES_HEAD
    for line in TRIPWIRES.strip().splitlines():
        category, name, pattern = line.split(maxsplit=2)
        text += commented(rule_text(name, pattern, category=category))
    return text + commented(rule_text(
        "own-rules", r"checkpoints\.toml|hitl\.(py|db)|(hooks?|settings)\.json",
        "Edit the rules of this agent: {file_path}", "edit", effect="deny"))


def coding_rules(path: Path, project: Path) -> str:
    """The checkpoints.toml of a coding agent that works in `project`."""
    return "".join([
        FILE_HEAD, CODING_HEAD.replace("{project}", visible(str(project))),
        rule_text("leash-shell", OWN_PROGRAM,
                  "Touch the reviewer's program: {command}", effect="deny"),
        numbered("leash", leash(path, project),
                 "Edit what restrains this agent: {file_path}", "edit", effect="deny"),
        rule_text("edit-elsewhere", outside(project),
                  "Edit outside the project: {file_path}", "edit",
                  category="high-impact"),
        numbered("read", READ_ONLY, effect="allow"),
        BUILDS_HEAD, commented(numbered("build", BUILDS, effect="allow")),
        rule_text("shell", ".*", category="high-impact"),
        rule_text("mcp-tools", MCP_TOOLS, "{tool}", "tool", category="high-impact")])


def leash(path: Path, project: Path) -> list[str]:
    """Patterns for the files that decide what the agent may do: agents' own
    settings and their .local variants, the rules, hitl.py with its database
    and the rest of its folder, and what the listed commands obey."""
    own, path = absolute(__file__), path.absolute()
    files = {re.escape(file) for file in (
        ".codex/config.toml", ".clinerules/hooks/", ".github/hooks/",
        ".opencode/plugin", "opencode.json", ".mcp.json", ".claude.json",
        ".cursor/mcp.json", ".claude/hooks/", ".vscode/tasks.json", ".envrc",
        *(where.partition(" (")[0].removeprefix("~/")
          for where, _ in SNIPPETS.values()))}
    folders = {file.partition("/")[0] for file in files if "/" in file}
    settings = any_of(files).replace(r"settings\.json", r"settings(\.local)?\.json")
    names = {"checkpoints.toml", "hitl.py", "hitl.db", path.name, own.name}
    whole = {path, own, path.with_name("hitl.db")}
    if not project.resolve().is_relative_to(own.parent.resolve()):
        whole.add(own.parent)
    patterns = [
        f"(^|/){settings}|(^|/){any_of(folders - {re.escape('.github')})}/?$",
        f"(^|/){any_of(map(re.escape, names))}",
        f"^{any_of(re.escape(os.path.realpath(file)) for file in whole)}(/|$|-)",
        r"(^|/)\.git(/|$)|(^|/)HEAD$|(^|/)\.gitconfig$|/\.config/git/",
        r"(^|/)\.(bash_?(rc|profile|login|aliases)|profile|zsh(rc|env)|zprofile)$"]
    return [on_this_system(pattern) for pattern in patterns]


def outside(project: Path) -> str:
    """A pattern for where a path leads, if not into the project or /tmp: a new
    ~/.local/bin/ls would run as a listed command."""
    inside = any_of({re.escape(str(project)), re.escape(str(project.resolve())),
                     "/tmp", "/private/tmp"})
    return on_this_system(f"^(?!(?-i:{inside})(/|$))([A-Za-z]:)?/")


def on_this_system(pattern: str) -> str:
    return pattern.replace("/", "[/\\\\]") if os.name == "nt" else pattern


def any_of(patterns: Iterable[str]) -> str:
    return f"({'|'.join(sorted(patterns))})"


def cmd_list(args: Any) -> int:
    """list what waits; with --all, what was reviewed too"""
    client, start = reviewer_client(args), 0
    rows: dict[str, dict[str, Any]] = {}
    while start is not None:
        page = reply_of(client, "GET", f"/pending?from={start}")
        rows |= {row["request_id"]: row for row in page["waiting"]}
        start = page["next"]
    if args.all:
        reviewed = reply_of(client, "GET", "/history")["reviewed"]
        rows |= {row["request_id"]: row for row in reviewed}
    size = 8            # characters of each id, or as many as tell them apart
    while len({name[:size] for name in rows}) < len(rows):
        size += 1
    lines = []
    for name, row in rows.items():
        age = readable_seconds(max(0, time.time() - unix_time(row["received_at"])))
        line, *rest = fitted(
            f"{row['status']:9} {name[:size]:{size}} {age:>8} "
            f"{one_line(row['agent'] or '-', 20):20} "
            f"{one_line(row['action_description'])}")
        if rest:
            line = line[:-1] + "\u2026"
        lines.append(line)
    return answer(args, list(rows.values()), lines or ["nothing waits"])


def cmd_show(args: Any) -> int:
    """show one request in full"""
    request = request_named(reviewer_client(args), args.id)
    return answer(args, request, request_lines(request))


def cmd_approve(args: Any) -> int:
    """approve a request; on a terminal it is shown and you are asked first"""
    return decide_as(args, "approved")


def cmd_reject(args: Any) -> int:
    """reject a request, with a reason that the agent is told"""
    return decide_as(args, "rejected")


def decide_as(args: Any, decision: str) -> int:
    client = reviewer_client(args)
    request = request_named(client, args.id, alone=True)
    if decision == "approved" and sys.stdin.isatty() and not args.yes:
        say("\n".join(request_lines(request)))
        if input("approve it? y/N ").strip().lower() not in ("y", "yes"):
            say("nothing was decided")
            return 1
    request = reply_of(
        client, "POST", f"/approve/{request['request_id']}",
        {"decision": decision, "reason": args.reason,
         "digest": request["digest"]})
    return answer(args, request, [f"{request['status']} {request['request_id']}"])


def cmd_stop(args: Any) -> int:
    """reject what waits and refuse new calls, until this is lifted"""
    stop = reply_of(reviewer_client(args), "POST", "/stop",
                    {"reason": args.reason})
    return answer(args, stop, [
        standing_line(stop), "running calls go on; to end this: "
        f"python3 hitl.py lift {stop['number']}"])


def cmd_standing(args: Any) -> int:
    """list the standing decisions, which answer later calls too"""
    rows = reply_of(reviewer_client(args), "GET", "/standing")["standing"]
    return answer(args, rows, [standing_line(row) for row in rows]
                  or ["no standing decisions"])


def cmd_lift(args: Any) -> int:
    """end a standing decision or a stop"""
    row = reply_of(reviewer_client(args), "POST", f"/lift/{args.number}", {})
    return answer(args, row, [f"lifted: {standing_line(row)}"])


def standing_line(row: dict[str, Any]) -> str:
    what = f"the same call as {row['request_id']}"
    if row["request_id"] is None:
        what = "everything"
    words = (f"{row['number']} {row['decision']}: {what}, by "
             f"{person(row['made_by'])} since {row['made_at']}")
    if row["until"]:
        words += f" until {row['until']}"
    if row["uses"]:
        words += f", {row['used']} of {row['uses']} uses"
    if row["reason"]:
        words += f": {row['reason']}"
    return visible(words)


def cmd_notify(args: Any) -> int:
    """send a sample notice through each [[notify]], or one of them"""
    configuration = load_configuration(find_configuration(args.config))
    file_doubts(configuration, serves=True)     # which may refuse
    path, server = configuration.path, configuration.server
    entries = {entry["name"]: entry for entry in configuration.notify}
    if not entries:
        raise ConfigError(f"{path}: no [[notify]] in it",
                          "README.md has an example for each service")
    if args.test not in ("", *entries):
        raise ConfigError(
            f'{path}: no [[notify]] "{args.test}"{did_you_mean(args.test, entries)}',
            f"there are: {', '.join(entries)}")
    url = server["public_url"] or f"http://{server['host']}:{server['port']}"
    status = 0
    chosen = [entries[args.test]] if args.test else entries.values()
    for channel in channels_of(path, chosen, os.environ):
        sent = channel.sample(url)
        say(": ".join(filter(None, (channel.name, sent.status, sent.text))))
        if not sent.told:
            status = 1
    return status


def cmd_log(args: Any) -> int:
    """print the audit log; with --verify, check it"""
    path = server_settings(args, configuration_for(args))["database"]
    if not re.fullmatch("([0-9a-f]{64})?", args.head):
        raise ConfigError("--head must be a SHA-256 in hex",
                          "serve prints the head at start and stop")
    try:
        if args.verify:
            return print_verified(args, path)
        with open_for_reading(path) as db:
            for row in audit_rows(db):
                line = " ".join(visible(str(part)) for part in row[:6])
                if args.json:
                    line = json.dumps(row._asdict())
                say(line)
    except (sqlite3.DatabaseError, ValueError, LookupError, TypeError) as error:
        fault = f"{path}: {visible(str(error))}"
        answer(args, {"faults": [fault]}, [f"FAULT {fault}"])
        return 1
    return 0


def print_verified(args: Any, path: Path) -> int:
    """Print what `log --verify` finds -> its exit status."""
    head, faults = verified(path, args.head)
    result = "damaged or edited" if faults else "whole"
    lines = [*(f"FAULT {fault}" for fault in faults),
             f"{path}: {head.sequence} rows, head {head.hash}: {result}"]
    if not args.head:
        lines.append("to see whether the end was cut off, compare with a head "
                     "noted before (serve prints it): log --verify --head HASH")
    answer(args, {"rows": head.sequence, "head": head.hash, "faults": faults},
           lines)
    return 1 if faults else 0


def cmd_token(args: Any) -> int:
    """make a token, and the lines that add it to checkpoints.toml"""
    with config_error("the name"):
        name_value(args.name)
    token, kind = fresh_token(), "agent" if args.agent else "reviewer"
    print(f"the token of {kind} {args.name}, shown once: {token}\n"
          "add the lines on stdout to checkpoints.toml, then restart serve",
          file=sys.stderr, flush=True)
    say(f"\n[[{kind}]]\nname = {json.dumps(args.name, ensure_ascii=False)}\n"
        f'token_sha256 = "{token_hash(token)}"')
    return 0


def cmd_hook(args: Any) -> int:
    """answer a coding agent's hook: its JSON on stdin, ours on stdout"""
    if not args.snippet:
        Hook(args.config, args.deadline).run()
    note = f"put this into {SNIPPETS[args.snippet][0]}"
    try:
        rules = load_configuration(find_configuration(args.config, local=False)).rules
        if unlisted_runs(rules):
            note += (f"{UNLISTED}: `python3 hitl.py init --coding-agent` writes a "
                     "list of those that may")
    except ConfigError as error:
        note += f"; until this is mended, the hook refuses every call: {error}"
    print(note, file=sys.stderr)
    sys.stdout.write(snippet(args.snippet, args.config))
    return 0


def run_hook_at_once(words: list[str]) -> None:
    """Run `hook`, if it has no options but --config and --deadline, without
    argparse, which would be a quarter of what a call costs."""
    options = dict(zip(words[1::2], words[2::2], strict=False))
    if words[:1] == ["hook"] and len(words) == 1 + 2 * len(options) and (
            options.keys() <= {"--config", "--deadline"}):
        with contextlib.suppress(ValueError):
            Hook(options.get("--config"),
                 float(options.get("--deadline", 0))).run()


def cmd_mcp(args: Any) -> int:
    """start an MCP server (stdio) and hold calls to its tools"""
    import asyncio
    gate, command = gate_and_command(args)
    try:
        return asyncio.run(Proxy(gate, command, args.name).run())
    except OSError as error:
        raise ConfigError(f"{command[0]}: {error.strerror}") from None


def cmd_run(args: Any) -> int:
    """ask, then run exactly this command"""
    log.error = lambda *_: None         # main() prints it
    gate, command = gate_and_command(args)
    try:
        return run_command(gate, command, args.timeout)
    except HitlError:                   # a ReviewTimeoutError is an OSError, too
        raise
    except OSError as error:
        raise HitlError(f"{visible(command[0])}: {error.strerror}") from None


def gate_and_command(args: Any) -> tuple[Gate, list[str]]:
    """The gate of `run` and `mcp`, and the command they start, which does not
    inherit a token that could approve (promise 5). SIGTERM and SIGHUP
    withdraw what waits."""
    on_signals("SIGTERM SIGHUP", lambda number, _: sys.exit(128 + number))
    command = list(args.command_words)
    if command[:1] == ["--"]:
        del command[0]
    if not command:
        raise ConfigError("no command", "put it after --")
    gate = Gate(find_configuration(args.config, local=False))
    os.environ.pop("HITL_REVIEWER_TOKEN", None)
    return gate, command


def cmd_demo(args: Any) -> int:
    """see it happen: a sample agent asks, you decide"""
    demo(300.0)
    return 0


def cmd_verify(args: Any) -> int:
    """run the whole path for real, check it and write the evidence"""
    output = Path(args.output).absolute()
    try:
        output.write_text("")           # before the work, not after it
    except OSError as error:
        raise ConfigError(f"{output}: {error.strerror}",
                          "choose another file with --output") from None
    evidence = verify(args.model, 1.0)
    output.write_text(json.dumps(evidence, indent=2) + "\n")
    say(f"\n{'verified' if evidence['verified'] else 'NOT VERIFIED'}; the "
        f"evidence is in {output}")
    return 0 if evidence["verified"] else 1


# ---- what may be typed ----

def command_line() -> Any:
    """The parser: a block for each command, with an example."""
    import argparse
    plain = argparse.RawDescriptionHelpFormatter

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(message, f"{self.prog} --help")
    parser = Parser(
        prog="python3 hitl.py", formatter_class=plain,
        description="A person decides before an AI agent acts.",
        epilog="start with: python3 hitl.py demo\n`COMMAND --help` has an example.")
    parser.add_argument("--version", help="print version and SHA-256 of this file",
                        action="store_true")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for run, example, options in COMMAND_LINES:
        command = commands.add_parser(
            run.__name__[4:], help=run.__doc__, description=run.__doc__,
            epilog=f"example: python3 hitl.py {example}",
            formatter_class=plain)
        command.set_defaults(function=run)
        for option in options.split():
            command.add_argument(option, **OPTIONS[option])
    return parser


ASKING = " --json --config --server-url"
COMMAND_LINES: tuple[tuple[Callable[[Any], int], str, str], ...] = (
    (cmd_serve, "serve --port 8765",
     "--config --database --host --port --public-url --tls-certificate --tls-key "
     "--allow-clear-text"),
    (cmd_check, """check delete_users '{"table": "users"}'""",
     "tool arguments --replay --config --database --json"),
    (cmd_init, "init --coding-agent", "--config --coding-agent"),
    (cmd_list, "list --all", "--all" + ASKING),
    (cmd_show, "show 1f0c", "id" + ASKING),
    (cmd_approve, "approve 1f0c --yes", "id --yes --reason" + ASKING),
    (cmd_reject, 'reject 1f0c --reason "use the staging table"',
     "id --reason" + ASKING),
    (cmd_notify, "notify --test phone", "--test --config"),
    (cmd_stop, 'stop --reason "it deletes the wrong rows"', "--reason" + ASKING),
    (cmd_standing, "standing", ASKING),
    (cmd_lift, "lift 7", "number" + ASKING),
    (cmd_log, "log --verify", "--verify --head --json --config --database"),
    (cmd_token, "token ana >> checkpoints.toml", "name --agent"),
    (cmd_run, "run -- terraform apply", "--timeout --config command_words"),
    (cmd_hook, "hook --snippet claude", "--snippet --deadline --config"),
    (cmd_mcp,
     "mcp --name fs -- npx -y @modelcontextprotocol/server-filesystem .",
     "--name --config command_words"),
    (cmd_demo, "demo", ""),
    (cmd_verify, "verify --output evidence.json", "--model --output"),
)


def flag(text: str) -> dict[str, Any]:
    return {"action": "store_true", "help": text}


def word(name: str, text: str, **more: Any) -> dict[str, Any]:
    if more.get("default"):
        text += f" (default: {more['default']})"
    return {"metavar": name, "help": text, **more}


OPTIONS: dict[str, dict[str, Any]] = {
    "--agent": flag("for an agent, not a reviewer"),
    "--all": flag("also what was reviewed"),
    "--allow-clear-text": flag("let other machines reach it without https"),
    "--coding-agent": flag("shell commands wait unless listed"),
    "--config": word("FILE", "the checkpoints.toml to use"),
    "--database": word("FILE", "the database (default: hitl.db)"),
    "--deadline": word("SECONDS", "how long the answer may take", type=float),
    "--head": word("HASH", "a head noted before: it must be in the log", default=""),
    "--host": word("ADDRESS", "where to listen (default: 127.0.0.1)"),
    "--json": flag("print JSON, for a program"),
    "--model": word("NAME", "the model of the agent", default=""),
    "--name": word("NAME", "the server's, as in mcp__NAME__tool", default="server"),
    "--output": word("FILE", "the file to write", default="hitl-evidence.json"),
    "--port": word("PORT", "the port (default: 8765; 0: any free one)", type=int),
    "--public-url": word("URL", "where reviewers reach it, if elsewhere"),
    "--reason": word("TEXT", "what the agent is told", default=""),
    "--replay": flag("try these rules on the stored requests"),
    "--server-url": word("URL", "where the server is"),
    "--snippet": word("AGENT", f"print what to install: {', '.join(SNIPPETS)}",
                      choices=list(SNIPPETS)),
    "--test": word("NAME", "the entry to try (all, without NAME)",
                   nargs="?", const="", required=True),
    "--timeout": word("SECONDS", "how long to wait for a decision", type=float),
    "--tls-certificate": word("FILE", "serve https with this PEM file"),
    "--tls-key": word("FILE", "its key, if in another file"),
    "--verify": flag("check every row and request"),
    "--yes": flag("do not ask y/N"),
    "arguments": word("arguments", "its arguments, as JSON", nargs="?", default="{}"),
    "command_words": word("-- CMD", "the command and its arguments", nargs="..."),
    "id": word("id", "a request_id, or its beginning"),
    "name": word("name", "the name of the reviewer or agent"),
    "number": word("number", "the number that `standing` lists", type=int),
    "tool": word("tool", "the name of a tool", nargs="?"),
}
EXIT_STATUS = {ConfigError: 2, ReviewTimeoutError: 3, UnreachableError: 4}


def main(argv: list[str] | None = None) -> int:
    """Run one command -> the exit status. Errors go to stderr, with their
    hint; a traceback means a bug in this file."""
    # a name that the terminal cannot show must not stop a command
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore
    words = sys.argv[1:] if argv is None else argv
    run_hook_at_once(words)
    try:
        parser = command_line()
        args = parser.parse_args(words)
        if args.version:
            say(f"hitl.py {__version__} sha256 {file_sha256(Path(__file__))}")
            return 0
        if args.command is None:
            parser.print_help()
            return 2
        return int(args.function(args))
    except HitlError as error:
        print(f"hitl: error: {error.message}", file=sys.stderr)
        model_reads = words[:1] in (["run"], ["hook"]) and not sys.stderr.isatty()
        if error.hint and not model_reads:
            print(f"hitl: hint: {error.hint}", file=sys.stderr)
        if words[:1] == ["run"]:        # any other status comes from its command
            return 125
        return EXIT_STATUS.get(type(error), 1)
    except (KeyboardInterrupt, EOFError):       # Ctrl-C, or Ctrl-D at a question
        return 130
    except BrokenPipeError:             # `python3 hitl.py log | head`
        sys.stderr.close()
        return 1


if __name__ == "__main__":
    sys.exit(main())
