#!/usr/bin/env python3
"""hitl.py 1.0.0 (2026-11-22): a person decides before an AI agent acts.

One file, standard library only, Python 3.11 or newer. It makes an agent wait
for a human being before it deletes, deploys, sends or pays.

    agent -- tool call --> Gate -- POST /pending --> server --> page --> you
      ^                     |  <--- long poll ------ SQLite <-- /approve --+
      +---- result, CollaborationError or TimeoutError

Do this
-------
    python3 hitl.py demo      # see it happen: a sample agent asks, you decide
    python3 hitl.py init      # write checkpoints.toml: what needs a person
    python3 hitl.py serve     # the desk: prints the link where you review

and in the agent, where TOOLS[name](**arguments) stood:

    import hitl
    gate = hitl.Gate("checkpoints.toml")
    result = gate.call(name, arguments, TOOLS[name], context=state)

Five words
----------
tool call       one action the agent proposes: a tool's name and its arguments
checkpoint      a rule in checkpoints.toml that says which calls need review
                (LangGraph calls a saved state that; here it is a rule)
review request  a held tool call, waiting for a decision or bearing one
reviewer        the person, at the desk: the server with its page
decision        what the reviewer said: approved or rejected, with a reason

The promises (the code cites them by number; test_hitl.py tests each)
---------------------------------------------------------------------
1. A tool call that matches a checkpoint never runs without a recorded
   approval. Every failure refuses: server gone, bad reply, bad
   configuration, crash.
2. What runs is exactly what the reviewer was shown: the arguments executed
   are parsed from the bytes that were stored, displayed and digested.
3. One approval runs one call, once, whatever is retried, raced or replayed.
4. Silence is not consent, and it is not a refusal either: a request nobody
   answers by its deadline is `expired`, and says so.
5. An agent cannot decide: the credential that creates requests can never
   approve or reject them.
6. Once the server has answered, nothing is lost: a request or a decision that
   was acknowledged survives kill -9 and power loss on an honest disk.
7. The page cannot mislead: nothing is cut or hidden where the buttons are,
   and nothing an agent wrote can act as markup.
8. The audit log shows tampering.

Not promised
------------
It guards against the model and whatever steers it, not against code that runs
as the same operating-system user as the server: such code can edit the
database, the checkpoints and the gate. Where the agent has a shell, run
`serve` as another user or on another host. A regular expression is a
tripwire, not a boundary: `unmatched = "review"` turns the list around. A
false server that sees a request can say yes to it: server_url must be one you
trust. A tool that is approved can still do more than its name says.

How to audit this file
----------------------
The path of a call is what decides whether a call runs: the rooms marked *
below, in reading order. Each room uses only rooms above it, and each effect
has one address. The reviewer's half (Store to Server) and the agent's half
(Client, Gate) meet only over HTTP, so each can be read alone: they share the
first three rooms. Tools are run in Gate.call and acall, and by what `require`
hands an approval to: the MCP server, the coding agent.
`grep -n '^# ====' hitl.py` prints this map with line numbers.

  * Errors        the ways it can go wrong, each with its hint
  * Vocabulary    statuses, canonical JSON, the digest, visible text
  * Checkpoints   reads checkpoints.toml, matches a call
  * Store         the only SQL: requests, decisions, the audit log
    Pages         the only HTML; pure functions
  * Server        the only listening socket; the table of rights
  * Client        the only outgoing requests
  * Gate          match, ask, wait, claim, run, report: runs a tool
    Adapters      coding-agent hooks, MCP proxy, command prefix
    Evidence      `verify` and `demo`: the whole path, for real
    Command line  argv, stdout

Files: checkpoints.toml (rules); hitl.db, -wal, -shm (requests and audit log);
hitl.db.lock (one server a database). Environment: HITL_SERVER_URL,
HITL_CONFIG, HITL_DATABASE, HITL_AGENT_TOKEN, HITL_AGENT, HITL_REVIEWER,
HITL_REVIEWER_TOKEN. A flag wins over the environment, that over the file.

Is this copy whole and current? `python3 hitl.py --version` prints its version
and its own SHA-256, to compare with the one you trust.

Changes: 1.0.0 the first: checkpoints, store, server, page, gate, adapters.
"""
# /// script
# requires-python = ">=3.11"
# ///
from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import logging
import math
import os
import re
import selectors
import sys
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import (
    Awaitable, Callable, Coroutine, Generator, Iterable, Iterator, Mapping)
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import (Any, NamedTuple, NoReturn, ParamSpec, TypedDict, TypeVar,
                    Unpack, overload)

__version__ = "1.0.0"
__all__ = [
    "Gate", "HitlError", "ConfigError", "CollaborationError", "DeniedError",
    "UnreachableError", "ChangedError", "AlreadyClaimedError",
    "ReviewTimeoutError",
]
log = logging.getLogger("hitl")
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# ================================= Errors ==================================
# The ways it can go wrong. Every error carries a message, a `reason` (one
# stable word, the same in the log, the JSON, the page and the exception) and,
# where there is one, a `hint`: what to do about it. The base is a
# RuntimeError on purpose: LangGraph's default retry repeats a plain Exception,
# and a person would be asked the same thing again.


class HitlError(RuntimeError):
    """Anything that stops a call; `str()` is the message and the hint."""

    reason = "error"

    def __init__(self, message: str, hint: str = "", *,
                 reason: str = "", request_id: str = "") -> None:
        super().__init__(message)
        self.message, self.hint, self.request_id = message, hint, request_id
        self.decided_at = ""            # of a rejection
        self.reason = reason or type(self).reason

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(HitlError):
    """checkpoints.toml, a flag or the environment is wrong; says where."""

    reason = "bad-configuration"


class CollaborationError(HitlError):
    """A person said no (this class itself), or a child says what else."""

    reason = "rejected"


class DeniedError(CollaborationError):
    """A checkpoint with `effect = "deny"` matched: nobody was asked."""

    reason = "denied"


class UnreachableError(CollaborationError):
    """The server could not be reached, or what answered made no sense."""

    reason = "server-unreachable"


class ChangedError(CollaborationError):
    """An id, a digest or a reply is not the one that belongs to the call."""

    reason = "arguments-changed"


class AlreadyClaimedError(CollaborationError):
    """The approval was used already: one approval runs one call."""

    reason = "already-claimed"


class ReviewTimeoutError(HitlError, TimeoutError):
    """Nobody decided in time; nothing ran. A TimeoutError to who asks."""

    reason = "expired"


class Refusal(HitlError):
    """The server's side of a refusal; REFUSALS gives each its HTTP status.

    `about` is the request as it stands, where there is one; `fields` are
    header lines for the answer.
    """

    def __init__(self, reason: str, message: str, hint: str = "", *,
                 about: ReviewRequest | None = None,
                 fields: str = "") -> None:
        super().__init__(message, hint, reason=reason)
        self.about, self.fields = about, fields


# =============================== Vocabulary ================================
# The nouns and the few pure functions everything else is built from: what a
# request can become, how JSON is read and written so that two different calls
# never look the same, and how text is shown so that it cannot lie.

MAX_ARGUMENTS = 64 * 1024       # bytes: more is a document, not an action
MAX_DESCRIPTION = 64 * 1024     # bytes: a sentence with arguments filled in
MAX_CONTEXT = 512 * 1024        # bytes: beyond it a gate sends both ends
MAX_DEPTH = 32                  # levels of JSON: nobody reads deeper
MAX_NAME = 256                  # bytes of a tool's or an agent's name
MAX_WHY = 4096                  # bytes of a reason or an explanation
MAX_YEARS = 100                 # of a deadline: beyond it, leave it out
REQUEST_ID = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._:-]{1,128}")

# Status is the person's word, and final. Outcome is the call's fate.
#
#   status      means                        outcome    means
#   waiting     nobody has decided yet       (none)     not claimed so far
#     approved  a reviewer said yes   ---->    running  a gate claimed it
#     rejected  a reviewer said no               executed   it returned
#     expired   nobody decided in time           failed     it raised
#     withdrawn nobody waits any more          lapsed   nobody claimed it
#
# Each arrow (an indent) is one guarded UPDATE in the Store, and a trigger in
# the database refuses every other move. A new status would be added here, in
# SCHEMA and database_faults, as a move of Store, in REFUSALS, in the page's
# STYLE, SCRIPT and reviewed_row, and where Gate._wait and _claim look at it.
# The deadline is watched in four places: Desk.sweep and Store.decide (the
# server's clock), Gate._wait and _give_up (the gate's own).


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


class Summary(NamedTuple):
    """What every reply about a request says (the server adds its `url`)."""

    request_id: str
    status: str
    outcome: str | None
    digest: str
    deadline: str | None
    decided_by: str | None = None
    decided_at: str | None = None
    reason: str | None = None


class ReviewRequest(NamedTuple):
    """A row of pending_reviews: what was asked, said and done; the
    Summary comes first. Instants are ISO 8601 UTC text, `arguments` is
    canonical JSON, `agent_context` JSON."""

    request_id: str
    status: str
    outcome: str | None
    digest: str
    deadline: str | None
    decided_by: str | None
    decided_at: str | None
    reason: str | None
    signed_in: str | None
    lapses_at: str | None
    claim: str | None
    outcome_at: str | None
    outcome_text: str | None
    received_at: str
    timestamp: str
    asked_by: str
    agent: str | None
    tool: str | None
    checkpoint_id: str | None
    category: str | None
    why: str | None
    config_digest: str | None
    action_description: str
    arguments: str | None
    agent_context: str
    id: int
    size: int                   # bytes of what the agent sent

    @property
    def summary(self) -> Summary:
        return Summary._make(self[:len(Summary._fields)])

    @property
    def intact(self) -> bool:
        """Whether what is stored still has the digest it was stored with."""
        return self.digest == digest_of(
            self.action_description, self.arguments, self.tool)


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's members; ValueError where a name comes twice."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name appears twice in one JSON object")
    return members


def no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is no finite number")
    return value


STRICT = json.JSONDecoder(object_pairs_hook=unique_pairs, parse_float=finite,
                          parse_constant=no_constant)
# canonical JSON: sorted keys, no spaces, ASCII, no NaN or infinity
canonical = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), allow_nan=False).encode
json_text = json.encoder.encode_basestring_ascii    # one text, as JSON
READABLE = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def parse_json(data: bytes | str) -> Any:
    """The value of strict JSON; ValueError says what is wrong with it.

    Python's json takes the last of two equal names, NaN, 1e400 and lone
    surrogates, and recurses; each of them could make two readers of one
    request see two different things.
    """
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    text = text.strip(" \t\r\n")
    try:
        value, end = STRICT.raw_decode(text)
        if end != len(text):
            raise ValueError("something stands behind the JSON")
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        check_depth(value)
    if "\\ud" in text or "\\uD" in text or not text.isascii():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a lone surrogate is not text") from None
    return value


def check_depth(value: Any) -> None:
    """ValueError where lists and objects nest deeper than MAX_DEPTH."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [v for v in level if isinstance(v, (dict, list))]
        if not level:
            return
        level = [inner for outer in level for inner in (
            outer.values() if isinstance(outer, dict) else outer)]
    raise ValueError(f"nested deeper than {MAX_DEPTH}")


def digest_of(description: str, arguments: str | None,
              tool: str | None) -> str:
    """SHA-256 over canonical `{"action_description","arguments","tool"}`.

    `arguments` is canonical JSON already, or None: a digest over
    `str(object)` would let two different calls look the same.
    """
    text = (f'{{"action_description":{json_text(description)},'
            f'"arguments":{"null" if arguments is None else arguments},'
            f'"tool":{"null" if tool is None else json_text(tool)}}}')
    return hashlib.sha256(text.encode()).hexdigest()


def instant(seconds: float) -> str:
    """Unix seconds as ISO 8601 UTC with milliseconds; such texts sort."""
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return moment.isoformat(timespec="milliseconds")[:-6] + "Z"


def parse_timestamp(value: Any) -> str:
    """ISO 8601 (no offset means UTC) or Unix seconds, as instant() writes."""
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value)
            if moment.tzinfo is None:
                moment = moment.replace(tzinfo=timezone.utc)
            return instant(moment.timestamp())
        if type(value) in (int, float):
            return instant(value)
    except (ValueError, OverflowError, OSError):
        pass
    raise ValueError('"timestamp" must be ISO 8601 or Unix seconds')


# Text is shown so that what cannot be seen can be: a character that is
# invisible, changes direction, controls a terminal or imitates ASCII becomes
# U+XXXX between two brackets that themselves never pass unescaped, so no two
# texts are shown alike. (CVE-2024-27936 in Deno's prompt; "Trojan Source",
# Boucher and Anderson 2021.) Accented Latin and words of other scripts stay
# readable; a word that also has ASCII letters, or consists of look-alikes
# only, does not.
BRACKETS = "\u27e6\u27e7"


def spans(*pairs: str) -> frozenset[str]:
    """The characters from the first to the last of each pair."""
    return frozenset(chr(n) for pair in pairs
                     for n in range(ord(pair[0]), ord(pair[1]) + 1))


UNSEEN = spans(                 # no width, or laid over another
    "\u0300\u036f", "\u0483\u0489", "\u115f\u1160", "\u17b4\u17b5",
    "\u180b\u180f", "\u1ab0\u1aff", "\u1dc0\u1dff", "\u20d0\u20ff",
    "\u2800\u2800", "\u3164\u3164", "\ufe00\ufe0f", "\ufe20\ufe2f",
    "\uffa0\uffa0", "\U0001d159\U0001d159", "\U000e0100\U000e01ef",
    "\u13a0\u13ff", "\u2c80\u2cff", "\ua4d0\ua4ff", "\uab70\uabbf",
    ) | frozenset(              # Cherokee, Coptic, Lisu; ; | - . / \ : " _ I l
    "\u037e\u05c0\u2010\u2011\u2012\u2024\u2044\u2212\u2215\u2216\u2236\u2571"
    "\u29f5\u29f8\ua789\ufe68\uff02\uff0e\uff0f\uff3c\uff3f\u0131\u017f\u0196"
    "\u01c0\u01c3" + BRACKETS)
LOOKALIKES = frozenset(
    "\u0410\u0412\u0415\u0405\u0406\u0408\u041a\u041c\u041d\u041e\u0420\u0421"
    "\u0422\u0423\u0425\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0455\u0456"
    "\u0458\u0474\u0475\u04ba\u04bb\u04c0\u04cf\u0501\u050c\u051a\u051b\u051c"
    "\u051d\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1"
    "\u03a4\u03a5\u03a7\u03b1\u03b9\u03bd\u03bf\u03c1\u03c5\u03f2\u03f3\u054d"
    "\u054f\u0555\u0570\u0578\u057d\u0581\u0585\u0251\u0261\u0269\u029f")
WORD = re.compile(r"(\w+)")
MARKED = re.compile(r"(?<=[\x00-\x7f])[^\x00-\x7f]")
RUN_OF_SPACES = re.compile(" {9,}")


def shown(character: str) -> str:
    return f"{BRACKETS[0]}U+{ord(character):04X}{BRACKETS[1]}"


def unseen(character: str) -> bool:
    """Whether a character is always shown as an escape."""
    return (not character.isprintable()
            or character in UNSEEN
            or not character.isascii() and character.isalnum()
            and unicodedata.normalize("NFKC", character).isascii())


def east_asian(character: str) -> bool:
    """Whether no letter of its script is mistaken for one of ASCII's."""
    return ("\u2e80" <= character <= "\u9fff" or "\uac00" <= character <=
            "\ud7ff" or "\uf900" <= character <= "\ufaff"
            or character >= "\U00020000")


def misleading(word: str) -> bool:
    """Whether a word with letters beyond Latin could pass for ASCII."""
    return not word.isascii() and (
        any(c.isascii() and c.isalpha() for c in word)
        or all(c in LOOKALIKES or not c.isalpha() for c in word))


def visible(text: str) -> str:
    """The text with everything unseen or misleading as visible escapes:
    printable, on one line, and different for every different text."""
    if not (text.isascii() and text.isprintable()):
        always = {ord(c): shown(c) for c in set(text) if unseen(c)} | {
            ord(c): shown(c) for c in set(MARKED.findall(text))
            if unicodedata.category(c)[0] == "M"}   # a mark upon ASCII
        shaped = {ord(c): shown(c) for c in set(text) if c > "\u024f" and
                  c.isalnum() and not east_asian(c)} | always
        text = "".join(
            word.translate(shaped if misleading(word) else always)
            for word in WORD.split(text))
    if " " * 9 in text:          # padding pushes words out of sight
        text = RUN_OF_SPACES.sub(lambda run: (
            f"{BRACKETS[0]}space x{len(run[0])}{BRACKETS[1]}"), text)
    return text


def readable_seconds(seconds: float) -> str:
    """A duration as people say it: `12 s`, `4 min`, `3 h`, `2 days`."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


# =============================== Checkpoints ===============================
# Which tool calls need a person. checkpoints.toml is read once, checked to
# the last key, and never half understood: whatever is wrong is a ConfigError
# that names file, place and cure, because a rule that is silently not there
# is a door left open. Matching is pure: a call in, a Match out.

CATEGORIES = ("high-impact", "data-risk", "destructive")
EFFECTS = ("review", "allow", "deny")
MAX_MATCHED = 4096              # characters a pattern looks at: re cannot be
                                # interrupted, and a longer text waits
TEMPLATE_NAME = re.compile(r"\{([A-Za-z_]\w*(?:\.\w+)*)\}")
INVISIBLE = {c: None for c in map(ord, "\u115f\u1160\u2800\u3164\uffa0")}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One rule: which calls, what to tell the reviewer, what to do."""

    checkpoint_id: str
    action_pattern: str
    description_template: str
    category: str = ""
    effect: str = "review"
    kind: str = "tool"
    arguments: Mapping[str, str] = field(default_factory=dict)
    timeout_seconds: float | None = None
    lifetime_seconds: float | None = None

    def find(self, pattern: str, text: str) -> re.Match[str] | None:
        """Where a pattern of this checkpoint finds a text. `allow` opens a
        door, so it needs the whole text to the letter; the others only ever
        stop more, so they find it anywhere, in any case."""
        if self.effect == "allow":
            return re.fullmatch(pattern, text)
        return re.search(pattern, text, re.IGNORECASE | re.DOTALL)

    def kind_matches(self, arguments: Mapping[str, Any]) -> bool:
        """Whether action_pattern finds the text of a shell command or an
        edit; of a command, `allow` needs every part to the letter."""
        if self.kind == "tool":
            return True
        texts, unseen = texts_of(self.kind, arguments)
        text, parts = "\n".join(texts), list(texts)
        odd = unseen or len(text) > MAX_MATCHED
        if self.kind == "shell":
            taken = [commands_in(one) for one in texts]
            odd = odd or not texts or None in taken
            parts = [part for one in taken for part in one or ()]
        if self is ODD_COMMAND:
            return odd
        if self.effect == "allow":      # a redirection could write anywhere
            return bool(parts) and not odd and not set("<>") & set(text) and (
                all(self.find(self.action_pattern, part) for part in parts))
        return not text or unseen or len(text) > MAX_MATCHED or any(
            self.find(self.action_pattern, part) for part in (text, *parts))

    def arguments_match(self, arguments: Mapping[str, Any]) -> bool:
        """Whether every argument pattern matches. Where an argument is
        missing, not a text or very long, review and deny match and allow
        does not."""
        for name, pattern in self.arguments.items():
            value = argument(arguments, name)
            texts = [value]
            if self.effect != "allow" and isinstance(value, str) and (
                    len(value) <= MAX_MATCHED):
                texts = [text for _, text in views(value)]
            if not all(isinstance(text, str) and len(text) <= MAX_MATCHED
                       for text in texts):
                if self.effect == "allow":
                    return False
            elif not any(self.find(pattern, text) for text in texts):
                return False
        return True


@dataclass(frozen=True, slots=True)
class Match:
    """Which checkpoint decides about a call, and why."""

    checkpoint: Checkpoint
    why: str

    @property
    def effect(self) -> str:
        return self.checkpoint.effect


@dataclass(frozen=True, slots=True)
class Configuration:
    """checkpoints.toml, checked. `digest` is the SHA-256 of its bytes."""

    path: Path | None
    digest: str
    gate: Mapping[str, Any]
    server: Mapping[str, Any]
    checkpoints: tuple[Checkpoint, ...]
    reviewers: Mapping[str, str]            # name -> SHA-256 of the token
    warnings: tuple[str, ...]

    def candidates(self, tool: str) -> tuple[Match, ...]:
        """Every checkpoint whose action_pattern finds this name, in file
        order, up to the first that asks nothing of the arguments."""
        found = []
        odd = odd_name(tool)
        tool = tool[:MAX_MATCHED // 18]     # NFKC can make 18 of one
        for checkpoint in self.checkpoints:
            why = name_match(checkpoint, tool)
            if why and not (odd and checkpoint.effect == "allow"):
                found.append(Match(checkpoint, why))
                if not checkpoint.arguments and checkpoint.kind == "tool":
                    return tuple(found)
        if any(m.checkpoint.kind == "shell" for m in found):
            found.append(Match(ODD_COMMAND, "the command cannot be taken "
                               "apart, so no pattern can vouch for it"))
        last = Match(UNMATCHED[self.gate["unmatched"]],
                     "no checkpoint matches")
        return (*found, Match(ODD_NAME, odd) if odd else last)

    def first_match(self, tool: str, arguments: Mapping[str, Any]) -> Match:
        """The checkpoint that decides about this call."""
        return next(m for m in self.candidates(tool)
                    if m.checkpoint.kind_matches(arguments)
                    and m.checkpoint.arguments_match(arguments))

    def named(self, checkpoint_id: str) -> Checkpoint:
        """The checkpoint of this id, ConfigError if there is none;
        "unmatched" is the one that holds what no other names."""
        ids = {c.checkpoint_id: c for c in self.checkpoints}
        if checkpoint_id in ids or checkpoint_id == "unmatched":
            return ids.get(checkpoint_id, UNMATCHED["review"])
        raise ConfigError(
            f'no checkpoint "{checkpoint_id}" in {self.path}',
            f'there are: {", ".join(ids)}{did_you_mean(checkpoint_id, ids)}')


ODD_NAME = Checkpoint("odd-name", "", "")
ODD_COMMAND = Checkpoint("odd-command", "", "Run {command}", kind="shell")
UNMATCHED = {
    "review": Checkpoint("unmatched", "", ""),
    "allow": Checkpoint("unmatched", "", "", effect="allow"),
}

# Coding agents call the same thing by different names. `kind` selects it in
# all of them, and action_pattern then looks at what it does: the text of a
# shell command, or the files an edit touches.
# kind: (tools, casefolded last part; arguments that hold the text)
KINDS = {
    "shell": (frozenset((
        "bash", "shell", "sh", "local_shell", "powershell", "terminal",
        "run_shell_command", "run_commands", "run_command", "run_in_terminal",
        "run_terminal_cmd", "execute_command", "exec_command", "execute_bash",
        "shell_command", "exec", "run", "monitor")),
        ("command", "commands", "cmd", "script", "argv")),
    "edit": (frozenset((
        "write", "edit", "multiedit", "notebookedit", "apply_patch", "patch",
        "write_file", "replace", "edit_file", "create", "create_file",
        "write_to_file", "write_new_file", "replace_in_file", "apply_diff",
        "replace_string_in_file", "multi_replace_string_in_file", "editor",
        "insert_content", "insert_edit_into_file", "search_and_replace",
        "delete_file", "move_file", "str_replace_editor",
        "str_replace_based_edit_tool")),
        ("file_path", "path", "filepath", "filePath", "target_file",
         "notebook_path", "absolute_path", "patch", "patchText", "diff",
         "edits", "input", "command")),
}
SHELLS = frozenset(("sh", "bash", "zsh", "dash", "ksh", "fish", "ash"))
SHELL_PATH = re.compile(rf"(/(usr/)?bin/)?({'|'.join(sorted(SHELLS))})")
BEFORE = frozenset((            # words that may stand before a command
    "then", "do", "else", "elif", "if", "while", "until", "!", "{", "time",
    "coproc", "env", "sudo", "nohup", "command", "builtin", "nice", "xargs"))
COMMENT = re.compile(r"""('[^']*'|"(?:\\.|[^"\\])*"|\\.#?)"""
                     r"""|(?<![^\s;&|()])#[^\n]*""", re.DOTALL)


def texts_of(kind: str, arguments: Mapping[str, Any]
             ) -> tuple[list[str], bool]:
    """The texts that say what a call of this kind does, each by itself, and
    whether there is one that cannot be read."""
    texts, unseen = [], False
    for name in KINDS[kind][1]:
        value = arguments.get(name)
        if isinstance(value, str) and value.lstrip()[:1] == "[":
            with contextlib.suppress(ValueError):
                value = parse_json(value)       # Cline's list is a text
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            if name == "commands":              # each in a shell of its own
                texts += value
                continue
            value = value[2] if len(value) == 3 and value[1] in (
                "-c", "-lc") and SHELL_PATH.fullmatch(value[0]) else (
                " ".join(value))
        if isinstance(value, str):
            texts.append(value)
        unseen = unseen or not isinstance(value, (str, type(None)))
    return [text for text in texts if text.strip()], unseen


def commands_in(text: str) -> list[str] | None:
    """The simple commands of a shell text, unquoted, with and without what
    stands before them (`sudo`, `A=1`), and those inside `sh -c`; None where
    it cannot be taken apart cheaply: substitutions, here-documents, `eval`,
    a command's name in a variable or a glob, quotes that do not close, a
    shell that reads its orders elsewhere."""
    import shlex
    if re.search(r"`|\$\(|[<>]\(|<<|\$'|\\\n", text):
        return None
    words = shlex.shlex(COMMENT.sub(lambda found: found[1] or "", text),
                        posix=True, punctuation_chars=";&|()<>\n")
    words.whitespace, words.commenters = " \t\r", ""
    words.whitespace_split = True
    commands: list[list[str]] = [[]]
    try:
        for word in words:
            if not word.strip(";&|()\n"):
                commands.append([])
            else:
                commands[-1].append(word)
    except ValueError:
        return None
    parts: list[str] = []
    for command in filter(None, commands):
        bare = command
        while bare and (bare[0] in BEFORE or re.match(r"\w+=|-", bare[0])):
            bare = bare[1:]
        parts += dict.fromkeys((" ".join(command), " ".join(bare)))
        first = bare[0].rpartition("/")[2] if bare else ""
        if first in ("eval", "exec", "source", ".") or (
                re.search(r"[$*?\[{]", first) and first not in ("[", "[[")):
            return None
        if first in SHELLS:
            inner = next((v for o, v in zip(bare[1:], bare[2:])
                          if re.fullmatch("-[a-z]*c", o)), None)
            file = any(word[:1] not in "-<>" for word in bare[1:])
            more = (commands_in(inner) if inner else [] if file and
                    inner is None else None)
            if more is None:
                return None
            parts += more
    return [part for part in parts if part]


def views(text: str) -> tuple[tuple[str, str], ...]:
    """The ways a pattern looks at a text: (what, text), raw first. Each one
    defeats a disguise: width and style of letters, zero-width characters,
    another case, a prefix that hides the name from `^` or `\\b`."""
    plain = unicodedata.normalize("NFKC", text)
    clean = "".join(c for c in plain if c.isprintable() and (
        c not in UNSEEN)).translate(INVISIBLE)
    last = next(filter(None, re.split(r"__|[./:]", clean)[::-1]), clean)
    ways = {"raw name": text, "NFKC form": plain,
            "name without invisible characters": clean,
            "casefolded name": clean.casefold(), "last part": last,
            "casefolded last part": last.casefold()}
    return tuple({t: (w, t) for w, t in reversed(ways.items())}.values())[::-1]


def odd_name(tool: str) -> str:
    """Why a tool's name always waits, or "": it is not plain ASCII."""
    if tool and tool.isascii() and tool.isprintable() and len(tool) < 257:
        return ""
    return ("the name is empty" if not tool else "the name is very long"
            if len(tool) > 256 else f'the name "{visible(tool)}" has '
            "characters that are not plain ASCII")


def name_match(checkpoint: Checkpoint, tool: str) -> str:
    """Why a checkpoint's pattern finds this name, or ""."""
    ways = views(tool)[:1] if checkpoint.effect == "allow" else views(tool)
    if checkpoint.kind != "tool":
        known = ways[-1][1].casefold() in KINDS[checkpoint.kind][0]
        return f'kind = "{checkpoint.kind}" and its action_pattern' * known
    for way, text in ways:
        hit = checkpoint.find(checkpoint.action_pattern, text)
        if hit:
            return (f"action_pattern {checkpoint.action_pattern!r} finds "
                    f'"{visible(hit[0])}" at {hit.start()} to {hit.end()} of '
                    f'the {way} "{visible(text)}"')
    return ""


MISSING = object()


def argument(arguments: Mapping[str, Any], name: str) -> Any:
    """The argument of this name, or inside one by a dotted name. MISSING if
    there is none, or both and they differ: one would hide the other."""
    value: Any = arguments
    for part in name.split("."):
        value = value.get(part, MISSING) if isinstance(
            value, Mapping) else MISSING
    plain = arguments.get(name, value)
    return plain if value is MISSING or plain == value else MISSING


def describe(checkpoint: Checkpoint, tool: str,
             arguments: Mapping[str, Any]) -> str:
    """The description_template filled in. It takes names only: no attribute,
    no index, no format, and what is not there shows as not given; where
    nothing is there, the call itself is told."""
    if checkpoint.kind == "shell":
        arguments = {**arguments, "command": "\n".join(
            texts_of("shell", arguments)[0])}
    if checkpoint.kind == "edit":
        arguments = {"file_path": "\n".join(texts_of("edit", arguments)[0]),
                     **arguments}

    def fill_in(found: re.Match[str]) -> str:
        if found[1] == "tool":
            return tool
        value = argument(arguments, found[1])
        if value is MISSING:
            return "(not given)"
        return value if isinstance(value, str) else canonical(value)
    pieces = list(template_parts(checkpoint.description_template))
    names = [n[1] for n in map(TEMPLATE_NAME.fullmatch, pieces) if n]
    if all(n != "tool" and argument(arguments, n) is MISSING for n in names
           ) and (names or not checkpoint.action_pattern):
        return f"{tool} {canonical(dict(arguments))}"
    return "".join(TEMPLATE_NAME.sub(fill_in, piece)
                   for piece in pieces).strip() or tool


def template_parts(template: str) -> Iterator[str]:
    """A template's pieces: plain text, or one `{name}`; ValueError where a
    brace is neither that nor doubled."""
    for text in re.split(r"(\{\{|\}\}|\{[^{}]*\})", template):
        if text in ("{{", "}}"):
            yield text[0]
        elif ("{" in text or "}" in text) and not (
                TEMPLATE_NAME.fullmatch(text)):
            raise ValueError(
                f'"{text}" is no argument\'s name: write {{tool}} or '
                '{argument} or {argument.inner}, and {{ for a brace')
        else:
            yield text


# ---- reading the file ----
# A table of what each TOML table may hold: key -> (check, default). A check
# takes the value and returns it, or raises ValueError with the cure.

@contextlib.contextmanager
def config_error(what: str) -> Iterator[None]:
    """A check's ValueError, as the ConfigError about this."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{what} {error}") from None


def must(words: str, test: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A check that gives back what passes the test."""
    def check(value: Any) -> Any:
        if not test(value):
            raise ValueError(f"must be {words}")
        return value
    return check


def url_value(value: Any) -> str:
    found = re.fullmatch(
        r"(https?://(?:[\w.-]+|\[[0-9A-Fa-f:]+\])(?::([0-9]{1,5}))?)/?",
        value if isinstance(value, str) else "", re.ASCII)
    if not found or int(found[2] or 0) > 65535:
        raise ValueError('must be like "http://127.0.0.1:8765", no path')
    return found[1]


def public_url_value(value: Any) -> str:
    return "" if value == "" else url_value(value)


text_value = must("a text in quotes, and not empty",
                  lambda v: isinstance(v, str) and v.strip())
seconds_value = must(
    "a number of seconds above 0, or inf", lambda v: type(v) in (int, float)
    and (0 < v < 1e12 or v == math.inf))
poll_value = must("a number of seconds, 60 at most: a server holds no poll "
                  "longer", lambda v: type(v) in (int, float) and 0 < v <= 60)
port_value = must("a port, 0 to 65535 (0: any free one)",
                  lambda v: type(v) is int and 0 <= v <= 65535)
sha256_value = must(
    "a SHA-256 in hex: `hitl.py token NAME` prints one",
    lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v))
name_value = must(
    "a printable name without a colon, 64 characters at most", lambda v:
    isinstance(v, str) and re.fullmatch(r"[^:]{1,64}", v)
    and v.isprintable() and v.strip())


def one_of(*words: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in words:
            raise ValueError(f"must be one of {', '.join(words)}"
                             f"{did_you_mean(value, words)}")
        return str(value)
    return check


def id_value(value: Any) -> str:
    if not REQUEST_ID.fullmatch(text_value(value)):
        raise ValueError("may hold letters, digits and . _ : - only")
    if value in ("unmatched", "odd-name", "odd-command"):
        raise ValueError(f'"{value}" is an id of our own: choose another')
    return str(value)


def pattern_value(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be a regular expression in quotes")
    if value[0] in "*?":        # a glob: say what it is as a regex
        body = "".join({"*": ".*", "?": "."}.get(c, re.escape(c))
                       for c in value.strip("*"))
        regex = body + "$" * (value[-1] != "*") if body else "."
        raise ValueError(f"{value!r} is a glob; as a regular expression "
                         f"write {json.dumps(regex)}")
    import warnings
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            re.compile(value)
            endless = explosive(value)
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise ValueError(f"is not a regular expression: {error}") from None
    if endless:
        raise ValueError(
            f"{value!r} repeats a repeat, as (a+)+ does: on some names it "
            "would not end, and Python's re cannot be interrupted; write it "
            "without the inner or the outer repeat")
    return str(value)


def patterns_value(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not value:
        raise ValueError('must be like { table = "users|orders" }')
    for name, pattern in value.items():
        if isinstance(pattern, dict):
            raise ValueError(f'of a dotted name needs quotes: "{name}.'
                             f'{next(iter(pattern), "...")}" = "..."')
        try:
            pattern_value(pattern)
        except ValueError as error:
            raise ValueError(f"of {name}: {error}") from None
    return dict(value)


def template_value(value: Any) -> str:
    return "".join(template_parts(text_value(value))) and str(value)


REQUIRED = object()
KEYS: dict[str, dict[str, tuple[Callable[[Any], Any], Any]]] = {
    "gate": {
        "server_url": (url_value, "http://127.0.0.1:8765"),
        "timeout_seconds": (seconds_value, 30),
        "poll_seconds": (poll_value, 5),
        "lifetime_seconds": (seconds_value, None),
        "unmatched": (one_of("allow", "review"), "allow"),
    },
    "server": {
        "host": (text_value, "127.0.0.1"),
        "port": (port_value, 8765),
        "database": (text_value, "hitl.db"),
        "public_url": (public_url_value, ""),
    },
    "checkpoint": {
        "checkpoint_id": (id_value, REQUIRED),
        "action_pattern": (pattern_value, REQUIRED),
        "description_template": (template_value, REQUIRED),
        "kind": (one_of("tool", *KINDS), "tool"),
        "category": (one_of(*CATEGORIES), ""),
        "effect": (one_of(*EFFECTS), "review"),
        "arguments": (patterns_value, {}),
        "timeout_seconds": (seconds_value, None),
        "lifetime_seconds": (seconds_value, None),
    },
    "reviewer": {
        "name": (name_value, REQUIRED),
        "token_sha256": (sha256_value, REQUIRED),
    },
}


def explosive(pattern: str) -> bool:
    """Whether a pattern could take exponential time: an open repeat around
    another repeat or around alternatives that can begin alike (ReDoS)."""
    from re import _constants as op, _parser  # type: ignore[attr-defined]
    repeats = (op.MAX_REPEAT, op.MIN_REPEAT)

    def parts(item: Any) -> Iterator[Any]:
        """The (operation, argument) pairs anywhere inside."""
        for value in item if isinstance(item, (list, tuple)) else (
                getattr(item, "data", ())):
            if isinstance(value, tuple) and len(value) == 2 and (
                    type(value[0]) is type(op.LITERAL)):
                yield value
            yield from parts(value)

    def ambiguous(branches: list[Any]) -> bool:
        """Alternatives that do not each begin with a letter of their own."""
        first = [chr(b[0][1]).casefold() if len(b) and b[0][0] is op.LITERAL
                 else "" for b in branches]
        return "" in first or len(set(first)) < len(first)

    def flat(items: Any) -> Iterator[Any]:
        """The same without the groups around parts of it."""
        for kind, value in items:
            if kind is op.SUBPATTERN:
                yield from flat(value[-1])
            else:
                yield kind, value

    tree = _parser.parse(pattern)
    row = 0                             # open repeats side by side
    for kind, value in flat(tree):
        row = row + 1 if kind in repeats and value[1] > 8 else 0
        if row > 2:
            return True
    for kind, value in parts(tree):
        if kind in repeats and value[1] > 8:
            for inner, detail in parts(value[2]):
                if inner in repeats and detail[0] != detail[1]:
                    return True
                if inner is op.BRANCH and ambiguous(detail[1]):
                    return True
    return False


def did_you_mean(word: Any, known: Any) -> str:
    import difflib
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def find_configuration(path: str | os.PathLike[str] | None = None,
                       local: bool = True) -> Path:
    """The file in force: the one given, HITL_CONFIG, ./checkpoints.toml (not
    for a hook: an agent may write there), the one beside hitl.py."""
    chosen = path or os.environ.get("HITL_CONFIG")
    if chosen:
        return Path(chosen).absolute()
    beside = Path(__file__).absolute().with_name("checkpoints.toml")
    here = Path("checkpoints.toml").absolute() if local else beside
    for candidate in (here, beside):
        if os.path.lexists(candidate):
            return candidate
    raise ConfigError(
        f"no checkpoints.toml in {here.parent}" + (
            f" or {beside.parent}" if beside != here else ""),
        "`python3 hitl.py init` writes one, or set HITL_CONFIG")


def load_configuration(path: Path) -> Configuration:
    """checkpoints.toml, read once and checked; ConfigError says what is
    wrong, where, and how to mend it."""
    import tomllib
    try:
        data = path.read_bytes()
        tables = tomllib.loads(data.decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file",
                          "`python3 hitl.py init` writes one") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    check_tables(path, tables)
    checkpoints = tuple(
        Checkpoint(**checked(path, f"checkpoint {n}", "checkpoint", table))
        for n, table in enumerate(tables.get("checkpoint", ()), 1))
    if not checkpoints:
        raise ConfigError(f"{path}: no [[checkpoint]] in it",
                          "`python3 hitl.py init` writes an example; to let "
                          'everything wait, set unmatched = "review" and '
                          "keep one")
    reviewers = [checked(path, f"reviewer {n}", "reviewer", table)
                 for n, table in enumerate(tables.get("reviewer", ()), 1)]
    refuse_twins(path, "checkpoint_id",
                 [c.checkpoint_id for c in checkpoints])
    refuse_twins(path, "reviewer name", [r["name"] for r in reviewers])
    return Configuration(
        path, hashlib.sha256(data).hexdigest(),
        checked(path, "[gate]", "gate", tables.get("gate", {})),
        checked(path, "[server]", "server", tables.get("server", {})),
        checkpoints, {r["name"]: r["token_sha256"] for r in reviewers},
        tuple(covered(checkpoints)))


def check_tables(path: Path, tables: dict[str, Any]) -> None:
    """ConfigError for a table or a top-level key that does not belong."""
    marks = {name: f"[[{name}]]" if REQUIRED in (d for _, d in keys.values())
             else f"[{name}]" for name, keys in KEYS.items()}
    for name, value in tables.items():
        mark = marks.get(name, "")
        rows = value if isinstance(value, list) else [value]
        if mark and (mark.startswith("[[") != isinstance(value, list)
                     or not all(isinstance(row, dict) for row in rows)):
            raise ConfigError(f'{path}: "{name}" is not written {mark}',
                              f"did you mean {mark}?")
        if mark:
            continue
        homes = [marks[table] for table in KEYS if name in KEYS[table]]
        if homes:
            raise ConfigError(f'{path}: "{name}" stands outside any table',
                              f"put {name} under {homes[0]}")
        near = did_you_mean(f"[[{name}]]", marks.values())
        raise ConfigError(f'{path}: unknown table or key "{name}"',
                          near.removeprefix("; ")
                          or f"known: {', '.join(marks.values())}")


def checked(path: Path, place: str, kind: str,
            table: dict[str, Any]) -> dict[str, Any]:
    """A table with its defaults filled in; ConfigError for any other key."""
    known = KEYS[kind]
    named = table.get("checkpoint_id") or table.get("name")
    place += f' "{named}"' if isinstance(named, str) else ""
    for key in table:
        if key not in known:
            home = next((t for t in KEYS if key in KEYS[t]), "")
            raise ConfigError(
                f'{path}: {place}: unknown key "{key}"',
                f"put {key} under [{home}]" if home in ("gate", "server")
                else f"known: {', '.join(known)}{did_you_mean(key, known)}")
    values = {}
    for key, (check, default) in known.items():
        if default is REQUIRED and key not in table:
            raise ConfigError(f'{path}: {place}: "{key}" is missing',
                              f'add {key} = "..."')
        with config_error(f"{path}: {place}: {key}"):
            values[key] = check(table[key]) if key in table else default
    return values


def refuse_twins(path: Path, what: str, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f'{path}: {what} "{name}" appears twice',
                              "give each its own")


def covered(checkpoints: tuple[Checkpoint, ...]) -> Iterator[str]:
    """A warning for each checkpoint an earlier one plainly hides."""
    for n, later in enumerate(checkpoints):
        for earlier in checkpoints[:n]:
            plain = re.sub(r".\*$", "", later.action_pattern.strip("^$"))
            same = earlier.action_pattern == later.action_pattern
            simple = re.fullmatch(r"[\w*|-]+", earlier.action_pattern)
            if (not earlier.arguments and earlier.effect != "allow"
                    and earlier.kind == later.kind) and (
                    same or simple and re.fullmatch(r"[\w-]+", plain) and
                    earlier.find(earlier.action_pattern, plain)):
                yield (f'checkpoint "{later.checkpoint_id}" is never '
                       f'reached: "{earlier.checkpoint_id}" above it matches '
                       "the same calls; put the narrower one first")
                break


# ================================== Store ==================================
# The memory, and the only SQL. One connection writes, in transactions that the
# server opens and commits once a turn. The database restates the promises as
# constraints and triggers, so that a mistake above cannot break them. Every
# change of state writes its audit row in the same transaction, and each audit
# row carries the hash of the one before (promise 8).
#
# SQLite 3.26 is enough (RHEL 8): no RETURNING, no STRICT.

APPLICATION_ID = 0x4849544C     # "HITL", in the database file's header
SCHEMA_VERSION = 1
MAX_WAITING_PER_AGENT = 10_000  # one agent cannot fill the desk ...
MAX_WAITING = 20_000            # ... and all together not the page's query
CLAIM_SECONDS = 60              # a late approval can still be claimed for
BUSY_SECONDS = 0.1              # another writer costs a 503, not a stop

SCHEMA = """
CREATE TABLE pending_reviews (
  id                 INTEGER PRIMARY KEY,           -- order of arrival
  request_id         TEXT NOT NULL UNIQUE           -- no duplicates, ever
                     CHECK (length(request_id) BETWEEN 1 AND 128),
  -- the person's word, and when the request stopped waiting
  status             TEXT NOT NULL DEFAULT 'waiting' CHECK (
                     status = 'waiting' OR status IN  -- an IN alone costs 2 us
                     ('approved', 'rejected', 'expired', 'withdrawn')),
  decided_at         TEXT,
  decided_by         TEXT,                          -- 'reviewer:ana'
  signed_in          TEXT,                          -- how
  reason             TEXT,
  -- the call's fate
  outcome            TEXT CHECK (outcome IS NULL OR outcome IN
                     ('running', 'executed', 'failed', 'lapsed')),
  lapses_at          TEXT,                          -- unclaimed until then
  claim              TEXT,                          -- who may run it: a nonce
  outcome_at         TEXT,
  outcome_text       TEXT,
  -- what was asked: never changes
  digest             TEXT NOT NULL CHECK (length(digest) = 64),
  received_at        TEXT NOT NULL,                 -- this server's clock
  deadline           TEXT,
  timestamp          TEXT NOT NULL,                 -- the agent's claim
  asked_by           TEXT NOT NULL,                 -- 'agent:...'
  agent              TEXT,
  tool               TEXT,
  checkpoint_id      TEXT,
  category           TEXT,
  why                TEXT,
  config_digest      TEXT,
  action_description TEXT NOT NULL,
  arguments          TEXT,                          -- canonical JSON
  agent_context      TEXT NOT NULL,                 -- JSON
  CHECK ((status = 'waiting') = (decided_at IS NULL)),
  -- promises 1 and 4: an approval or a rejection has a person
  CHECK ((status IN ('approved', 'rejected')) = (decided_by IS NOT NULL)),
  CHECK (decided_by IS NULL OR decided_by LIKE 'reviewer:_%'),   -- promise 5
  CHECK (outcome IS NULL OR status = 'approved'),
  CHECK (coalesce(outcome <> 'lapsed', 0) = (claim IS NOT NULL))
);
CREATE INDEX waiting  ON pending_reviews (agent, id) WHERE status = 'waiting';
CREATE INDEX due      ON pending_reviews (deadline)
  WHERE status = 'waiting' AND deadline IS NOT NULL;
CREATE INDEX reviewed ON pending_reviews (decided_at, id)
  WHERE status <> 'waiting';
CREATE INDEX unclaimed ON pending_reviews (lapses_at)
  WHERE status = 'approved' AND outcome IS NULL;

CREATE TRIGGER asked_as_waiting BEFORE INSERT ON pending_reviews
WHEN NEW.status <> 'waiting' OR NEW.outcome IS NOT NULL
BEGIN SELECT RAISE(ABORT, 'a request begins as waiting'); END;

CREATE TRIGGER never_replaced BEFORE INSERT ON pending_reviews
WHEN EXISTS (SELECT 1 FROM pending_reviews WHERE request_id = NEW.request_id)
  OR EXISTS (SELECT 1 FROM pending_reviews WHERE id = NEW.id)
BEGIN SELECT RAISE(IGNORE); END;        -- not by INSERT OR REPLACE either

CREATE TRIGGER stays_in_order BEFORE UPDATE ON pending_reviews
WHEN NEW.id IS NOT OLD.id
BEGIN SELECT RAISE(ABORT, 'what was asked cannot change'); END;

CREATE TRIGGER asked_once BEFORE UPDATE OF id, request_id, digest,
  received_at, deadline, timestamp, asked_by, agent, tool, checkpoint_id,
  category, why, config_digest, action_description, arguments, agent_context
ON pending_reviews                                               -- promise 2
BEGIN SELECT RAISE(ABORT, 'what was asked cannot change'); END;

CREATE TRIGGER decided_once BEFORE UPDATE OF status, decided_at, decided_by,
  signed_in, reason, lapses_at ON pending_reviews
WHEN OLD.status <> 'waiting' OR NEW.status = 'waiting'
BEGIN SELECT RAISE(ABORT, 'a decision is final'); END;

CREATE TRIGGER claimed_once BEFORE UPDATE OF outcome, claim, outcome_at,
  outcome_text ON pending_reviews                                -- promise 3
WHEN NOT coalesce(OLD.status = 'approved' AND (
    (OLD.outcome IS NULL AND NEW.outcome IN ('running', 'lapsed')) OR
    (OLD.outcome = 'running' AND NEW.outcome IN ('executed', 'failed')
     AND NEW.claim = OLD.claim)), 0)
BEGIN SELECT RAISE(ABORT, 'one approval runs one call, once'); END;

CREATE TRIGGER nothing_is_forgotten BEFORE DELETE ON pending_reviews
BEGIN SELECT RAISE(ABORT, 'a request is never deleted'); END;

CREATE TABLE audit_log (
  sequence   INTEGER PRIMARY KEY,
  at         TEXT NOT NULL,
  event      TEXT NOT NULL,       -- submitted, approved, ... executed, failed
  request_id TEXT NOT NULL,
  actor      TEXT NOT NULL,       -- 'agent:...', 'reviewer:...', 'server'
  detail     TEXT NOT NULL,       -- JSON
  hash       TEXT NOT NULL        -- SHA-256 of the hash before and this row
);
CREATE INDEX audit_of ON audit_log (request_id);

CREATE TRIGGER audit_goes_on BEFORE INSERT ON audit_log
WHEN NEW.sequence <= (SELECT max(sequence) FROM audit_log)
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
CREATE TRIGGER audit_is_kept BEFORE UPDATE ON audit_log
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
CREATE TRIGGER audit_stays BEFORE DELETE ON audit_log
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
"""
LARGE_BYTES = 8 * 1024          # a larger request is not listed in full
SIZE = " + ".join(f"length(CAST(coalesce({name}, '') AS BLOB))" for name in (
    "action_description", "arguments", "agent_context", "why"))
COLUMNS = ", ".join(ReviewRequest._fields[:-1]) + f", {SIZE} AS size"
BRIEF = COLUMNS     # a desk full of large requests must fit into memory
for _name in ("arguments", "agent_context", "action_description"):
    _cut = ("substr(action_description, 1, 200) || ' ...'" if _name ==
            "action_description" else "'null'")
    BRIEF = BRIEF.replace(
        f" {_name},", f" CASE WHEN {SIZE} > {LARGE_BYTES} AND length({_name}) "
        f"> 200 THEN {_cut} ELSE {_name} END AS {_name},", 1)
SUMMARY = ", ".join(Summary._fields)
GENESIS = "0" * 64              # the hash before the first audit row


class Asked(NamedTuple):
    """What a request asks, as the server stores it, in SQL's order."""

    request_id: str
    digest: str
    received_at: str
    deadline: str | None
    timestamp: str
    asked_by: str
    agent: str | None
    tool: str | None
    checkpoint_id: str | None
    category: str | None
    why: str | None
    config_digest: str | None
    action_description: str
    arguments: str | None
    agent_context: str


ASKED = ", ".join(Asked._fields)
SUBMIT = (f"INSERT INTO pending_reviews ({ASKED}) VALUES "
          f"({', '.join('?' * len(Asked._fields))})")


class Head(NamedTuple):
    """The newest audit row. Noted elsewhere, it shows a cut tail."""

    sequence: int
    hash: str


def row_hash(previous: str, row: tuple[Any, ...]) -> str:
    """The hash of an audit row: over the hash before it and its columns;
    that of a submitted request covers all that was asked, too."""
    return hashlib.sha256((previous + json.dumps(row)).encode()).hexdigest()


class Change(NamedTuple):
    """One change of state, for whoever is told after the commit."""

    event: str
    request_id: str
    actor: str


class Store:
    """The requests and the audit log in one SQLite file.

    A turn is one transaction: begin() happens by itself at the first change,
    commit() ends it. `changes` lists what the turn did so far. Raises Refusal
    where a change may not happen, sqlite3.Error where the disk fails.
    """

    def __init__(self, path: Path,
                 clock: Callable[[], float] = time.time) -> None:
        import sqlite3
        self.path, self.clock = path, clock
        self.changes: list[Change] = []
        self.spoilt = False
        self.lock = lock_database(path)
        try:
            self.db = open_database(path)
            self.head = last_head(self.db)
            self.recount()
        except (sqlite3.Error, ValueError, TypeError) as error:
            self.close()
            raise bad_database(path, f"is damaged: {error}",
                               "restore a backup") from None
        except BaseException:
            self.lock.close()
            raise
        self.tick()

    def close(self) -> None:
        self.db.close()
        self.lock.close()

    # ---- a turn ----

    def tick(self) -> None:
        """Read the clock: all requests of one turn share one instant."""
        self.time = self.clock()
        self.now = instant(self.time)

    def recount(self) -> None:
        """How many requests wait, per agent, from the table itself."""
        self.waiting_per_agent: Counter[str | None] = Counter(dict(
            self.db.execute("SELECT agent, count(*) FROM pending_reviews "
                            "WHERE status = 'waiting' GROUP BY agent")))
        self.waiting_count = sum(self.waiting_per_agent.values())

    def attempt(self, change: Callable[..., T], *args: Any) -> T:
        """change(*args) inside a savepoint, so that all of one request's
        changes are kept or none: a neighbour's COMMIT must not keep half of
        one that failed. (A Refusal is no failure: it comes before a change,
        or after one that stands; the server answers it inside.)

        Where the disk is full or fails, or the turn could not begin, the
        turn is spoilt: SQLite may have rolled all of it back by itself, so
        nothing begins anew in it, and commit() keeps none of it. Raises
        sqlite3.Error."""
        import sqlite3
        if self.spoilt:
            raise sqlite3.OperationalError("this turn was rolled back")
        mark, head = len(self.changes), self.head
        try:
            if not self.db.in_transaction:
                self.db.execute("BEGIN IMMEDIATE")
            self.db.execute("SAVEPOINT request")
            result = change(*args)
            self.db.execute("RELEASE request")
            return result
        except BaseException as error:
            self.spoilt = not self.db.in_transaction or isinstance(
                error, sqlite3.OperationalError)
            if not self.spoilt:
                self.db.execute("ROLLBACK TO request")
                self.db.execute("RELEASE request")
                if self.head != head:
                    del self.changes[mark:]
                    self.head = head
                    self.recount()
            raise

    def commit(self) -> tuple[bool, list[Change]]:
        """End the turn -> whether all of it is on disk, and its changes.
        Nobody is answered before (promise 6)."""
        import sqlite3
        changes, self.changes = self.changes, []
        try:
            if self.db.in_transaction and not self.spoilt:
                self.db.execute("COMMIT")
        except sqlite3.Error:
            self.spoilt = True
        if not self.spoilt:
            return True, changes
        with contextlib.suppress(sqlite3.Error):    # else: in a later turn
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            self.head = last_head(self.db)
            self.recount()
            self.spoilt = False
        return False, []

    def audit(self, event: str, request_id: str, actor: str, detail: str,
              asked: tuple[Any, ...] = ()) -> None:
        """The audit row of a change, chained, in the change's transaction."""
        row = (self.head.sequence + 1, self.now, event, request_id, actor,
               detail)
        self.head = Head(row[0], row_hash(self.head.hash, row + asked))
        self.db.execute("INSERT INTO audit_log VALUES (?, ?, ?, ?, ?, ?, ?)",
                        (*row, self.head.hash))
        self.changes.append(Change(event, request_id, actor))

    # ---- the changes of state ----

    def submit(self, asked: Asked) -> tuple[Summary, bool]:
        """Store a request as waiting -> its summary, and whether it is new.
        The same id with the same digest is the same request, whatever else
        differs: an agent that crashed asks again and meets it."""
        waiting = self.waiting_per_agent.get(asked.agent, 0)
        room = (waiting < MAX_WAITING_PER_AGENT
                and self.waiting_count < MAX_WAITING)
        if room and self.db.execute(SUBMIT, asked).rowcount:
            self.audit("submitted", asked.request_id, asked.asked_by,
                       f'{{"digest": "{asked.digest}"}}', asked)
            self.waiting_per_agent[asked.agent] = waiting + 1
            self.waiting_count += 1
            return Summary(asked.request_id, Status.WAITING, None,
                           asked.digest, asked.deadline), True
        there = self.find(asked.request_id)
        if there is None:
            raise Refusal("too-many-waiting", f"{self.waiting_count} requests "
                          f"wait already, {waiting} of this agent",
                          "let a reviewer decide some, or withdraw some")
        if there.digest != asked.digest:
            raise Refusal("id-taken", f'request_id "{asked.request_id}" '
                          "belongs to another action",
                          "choose a fresh request_id for another action",
                          about=there)
        return there.summary, False

    def leave(self, there: ReviewRequest, status: Status, actor: str,
              **detail: Any) -> bool:
        """One guarded move out of waiting: a row changed, it happened; none
        did, someone was faster."""
        by_person = status in (Status.APPROVED, Status.REJECTED)
        lapses_at = None
        if status is Status.APPROVED and there.deadline:
            lapses_at = max(there.deadline,
                            instant(self.time + CLAIM_SECONDS))
        moved: bool = self.db.execute(
            "UPDATE pending_reviews SET status = ?, decided_at = ?, "
            "decided_by = ?, signed_in = ?, reason = ?, lapses_at = ? "
            "WHERE request_id = ? AND status = 'waiting'",
            (status, self.now, actor if by_person else None,
             detail.get("signed_in"), detail.get("reason"), lapses_at,
             there.request_id)).rowcount == 1
        if moved:
            self.audit(status, there.request_id, actor,
                       READABLE.encode(detail))
            self.waiting_count -= 1
            self.waiting_per_agent[there.agent] -= 1
            if self.waiting_per_agent[there.agent] < 1:
                del self.waiting_per_agent[there.agent]
        return moved

    def proceed(self, there: ReviewRequest, outcome: Outcome, actor: str,
                claim: str | None = None,
                text: str | None = None) -> ReviewRequest:
        """One guarded move of an approved call's outcome, or Refusal."""
        if not self.db.execute(
                "UPDATE pending_reviews SET outcome = ?, claim = ?, "
                "outcome_at = ?, outcome_text = ? WHERE request_id = ? AND "
                "status = 'approved' AND outcome IS ?",
                (outcome, claim, self.now, text, there.request_id,
                 there.outcome)).rowcount:
            raise damaged(there)
        self.audit("claimed" if outcome is Outcome.RUNNING else outcome,
                   there.request_id, actor, "{}" if text is None else
                   READABLE.encode({"text": text}))
        return self.request(there.request_id)

    def decide(self, request_id: str, decision: Status, by: str,
               **detail: Any) -> ReviewRequest:
        """A reviewer's decision, once; Refusal if there is one, or if the
        deadline has passed."""
        there = self.request(request_id)
        if not there.intact:
            raise damaged(there)
        if there.deadline and there.deadline <= self.now:
            self.leave(there, Status.EXPIRED, "server")     # promise 4
        elif self.leave(there, decision, by, **detail):
            return self.request(request_id)
        there = self.request(request_id)
        who = (there.decided_by or "").partition(":")[2]
        raise Refusal(
            "already-decided" if who else there.status,
            f"this request is {there.status}" + (f" by {who}" if who else "")
            + f" since {there.decided_at}",
            "a decision is final; nothing was changed" if who else
            "nobody waits for a decision any more; nothing will run",
            about=there)

    def withdraw(self, request_id: str, why: str, by: str) -> ReviewRequest:
        """Nobody waits any more -> the request as it is now, which tells
        whether a reviewer was faster."""
        there = self.request(request_id)
        self.leave(there, Status.EXPIRED if why == "timeout" else
                   Status.WITHDRAWN, by, why=why)
        return self.request(request_id)

    def claim(self, request_id: str, digest: str, claim: str,
              by: str) -> ReviewRequest:
        """Take an approved request for running: succeeds once, and again
        for the same claim, whose reply may have been lost (promise 3)."""
        there = self.request(request_id)
        if there.digest != digest:
            raise Refusal("arguments-changed", "the digest is not that of "
                          "the approved request", about=there)
        if not there.intact:
            raise damaged(there)
        if there.status == Status.APPROVED and there.outcome is None and (
                there.lapses_at is None or there.lapses_at > self.now):
            return self.proceed(there, Outcome.RUNNING, by, claim)
        if there.outcome == Outcome.RUNNING and there.claim == claim:
            return there
        if there.status != Status.APPROVED:
            raise Refusal("not-approved", f"this request is {there.status}",
                          "only an approved request can be claimed",
                          about=there)
        lapsed = there.claim is None
        raise Refusal("lapsed" if lapsed else "already-claimed",
                      "nobody claimed this approval in time" if lapsed else
                      "this approval was claimed already",
                      "ask anew with another request_id", about=there)

    def finish(self, request_id: str, claim: str, outcome: Outcome,
               text: str, by: str) -> ReviewRequest:
        """Record what became of a claimed call; the same again is the same."""
        there = self.request(request_id)
        if there.claim is None or there.claim != claim:
            raise Refusal("not-claimed", "this claim does not hold this "
                          "request", about=there)
        if there.outcome == Outcome.RUNNING:
            return self.proceed(there, outcome, by, claim, text)
        if there.outcome != outcome:
            raise Refusal("already-finished", f"this call is {there.outcome} "
                          "already", about=there)
        return there

    def overdue(self) -> list[ReviewRequest]:
        """Requests past their deadline, and approvals nobody claimed."""
        return self.select(
            "WHERE status = 'waiting' AND deadline IS NOT NULL "
            "AND deadline <= ? LIMIT 500", self.now, columns=BRIEF
            ) + self.select("WHERE status = 'approved' AND outcome IS NULL "
                            "AND lapses_at <= ? LIMIT 500", self.now,
                            columns=BRIEF)

    def expire(self, there: ReviewRequest) -> None:
        """Close one overdue request: `expired`, or `lapsed` if approved."""
        if there.status == Status.WAITING:
            self.leave(there, Status.EXPIRED, "server")
        else:
            self.proceed(there, Outcome.LAPSED, "server")

    # ---- reading ----

    def select(self, where: str, *values: Any,
               columns: str = COLUMNS) -> list[ReviewRequest]:
        return list(map(ReviewRequest._make, self.db.execute(
            f"SELECT {columns} FROM pending_reviews {where}", values)))

    def find(self, request_id: str) -> ReviewRequest | None:
        rows = self.select("WHERE request_id = ?", request_id)
        return rows[0] if rows else None

    def request(self, request_id: str) -> ReviewRequest:
        """The whole row; Refusal "unknown" if there is none."""
        there = self.find(request_id)
        if there is None:
            raise unknown(request_id)
        return there

    def summary(self, request_id: str) -> Summary:
        """The few columns that a poll needs; Refusal "unknown"."""
        row = self.db.execute(
            f"SELECT {SUMMARY} FROM pending_reviews WHERE request_id = ?",
            (request_id,)).fetchone()
        if row is None:
            raise unknown(request_id)
        return Summary._make(row)

    def waiting(self, limit: int) -> list[ReviewRequest]:
        """What waits, oldest first, the agents taking turns: an agent that
        floods the desk pushes nobody else's request off the page."""
        return self.select(
            "JOIN (SELECT id AS n, row_number() OVER (PARTITION BY agent "
            "ORDER BY id) AS turn FROM pending_reviews WHERE status = "
            "'waiting') ON n = id ORDER BY turn, id LIMIT ?", limit,
            columns=BRIEF)

    def reviewed(self, limit: int,
                 before: tuple[str, int] = ("~", 0)) -> list[ReviewRequest]:
        """What no longer waits, the latest decision first; `before` is the
        decided_at and id of one to go on behind."""
        return self.select(
            "WHERE status <> 'waiting' AND (decided_at, id) < (?, ?) ORDER BY "
            "decided_at DESC, id DESC LIMIT ?", *before, limit, columns=BRIEF)


def unknown(request_id: str) -> Refusal:
    return Refusal("unknown", f'there is no request "{request_id}"',
                   "check the id: `hitl.py list --all` prints them")


def damaged(there: ReviewRequest) -> Refusal:
    return Refusal("damaged", f'what is stored of "{there.request_id}" is '
                   "not what was asked: the database was damaged or edited",
                   "`hitl.py log --verify`; restore a backup", about=there)


# ---- opening the file, and what can be told from it ----

def bad_database(path: Path, what: str, cure: str) -> ConfigError:
    return ConfigError(f"{path}: {what}", cure, reason="bad-database")


def lock_database(path: Path) -> Any:
    """A lock beside the database, held while this server lives: SQLite's own
    locking of a file works on every system, and other processes can still
    read the database itself."""
    import sqlite3
    beside = path.with_name(path.name + ".lock")
    lock = None
    try:
        with contextlib.suppress(FileExistsError):
            # never open it again: closing it would drop our own lock (POSIX)
            os.close(os.open(beside, os.O_CREAT | os.O_EXCL, 0o600))
        lock = sqlite3.connect(beside, timeout=0, isolation_level=None,
                               check_same_thread=False)
        lock.execute("BEGIN EXCLUSIVE")
        return lock
    except (sqlite3.Error, OSError) as error:
        if lock is not None:
            lock.close()
        if "locked" in str(error):
            raise bad_database(path, "another server runs on this database",
                               "stop it, or use --database") from None
        raise bad_database(path, f"its lock file cannot be used: {error}",
                           "use --database with a folder of your own"
                           ) from None


def open_database(path: Path) -> Any:
    """The connection, to a database that is ours, whole and durable;
    ConfigError for any other file, which is left as it is."""
    import sqlite3
    if path.is_dir():
        raise bad_database(path, "is a folder", "name a file")
    if not path.exists():
        create_database(path)
    try:
        with open(path, "rb") as file:
            header = file.read(100)
    except OSError as error:
        raise bad_database(path, f"cannot be read: {error.strerror}",
                           "see to its owner and mode") from None
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        raise bad_database(path, "is empty" if not header else
                           "is not an SQLite database",
                           "move it away, or restore a backup")
    if int.from_bytes(header[68:72], "big") != APPLICATION_ID:
        raise bad_database(path, "belongs to another program",
                           "use --database with another file")
    page_size = int.from_bytes(header[16:18], "big")
    pages = int.from_bytes(header[28:32], "big")
    wal = path.with_name(path.name + "-wal")
    whole = path.stat().st_size >= pages * (
        65536 if page_size == 1 else page_size)
    if not whole and not (wal.exists() and wal.stat().st_size):
        raise bad_database(path, "was cut short", "restore a backup")
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None,
                         check_same_thread=False, cached_statements=256)
    try:
        version, = db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise bad_database(path, f"was written by a newer hitl.py (schema "
                               f"{version})", "use that one")
        settings(db, path)
        faults = list(database_faults(db, path.stat().st_size))
    except ConfigError:
        db.close()
        raise
    except (sqlite3.Error, ValueError, TypeError, LookupError) as error:
        # SQLITE_BUSY, LOCKED, READONLY, IOERR, FULL, CANTOPEN: not damage
        if getattr(error, "sqlite_errorcode", 0) & 255 in (5, 6, 8, 10, 13,
                                                           14):
            db.close()
            raise bad_database(path, f"cannot be used now: {error}",
                               "stop what holds it, see to its mode and disk, "
                               "or use --database") from None
        faults = [str(error)]
    if faults:
        db.close()
        raise bad_database(path, f"is damaged or was edited: {faults[0]}",
                           "restore a backup, or move it away to begin anew; "
                           "`hitl.py log --verify` tells more")
    return db


def settings(db: Any, path: Path) -> None:
    """A commit is on disk when it returns, and readers never wait."""
    mode, = db.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode not in ("wal", "memory"):
        raise bad_database(path, "this file system cannot hold it (no WAL)",
                           "put the database on a local disk")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")


def create_database(path: Path) -> None:
    """A new database, whole from the first instant it has its name."""
    import sqlite3
    if path.with_name(path.name + "-wal").exists():
        raise bad_database(path, "is gone, but its -wal file is there",
                           "restore it, or move the -wal file away")
    fresh = path.with_name(path.name + ".new")
    try:
        fresh.unlink(missing_ok=True)       # of a start that did not end
        os.close(os.open(fresh, os.O_CREAT | os.O_EXCL, 0o600))
        with contextlib.closing(sqlite3.connect(
                fresh, isolation_level=None)) as db:
            settings(db, path)
            db.executescript(
                f"BEGIN; PRAGMA application_id = {APPLICATION_ID}; "
                f"PRAGMA user_version = {SCHEMA_VERSION}; {SCHEMA} COMMIT;")
        os.replace(fresh, path)
        if os.name == "posix":      # the new name itself must be on disk
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, sqlite3.Error) as error:
        raise bad_database(path, f"cannot be made: {error}",
                           "use --database with a folder of your own"
                           ) from None


def schema_of(db: Any) -> list[Any]:
    # names with sqlite_ are SQLite's own, and refused to anybody else
    return list(db.execute(
        "SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite$_%' "
        "ESCAPE '$' ORDER BY name"))


def database_faults(db: Any, size: int) -> Iterator[str]:
    """What is wrong with a database, as far as a start should look: the
    schema with its triggers, the pages of a small file, and every request
    that is still open, against its audit rows."""
    import sqlite3
    with contextlib.closing(sqlite3.connect(":memory:")) as ours:
        ours.executescript(SCHEMA)
        expected = schema_of(ours)
    if schema_of(db) != expected:
        yield "its tables or triggers are not those of this version"
        return
    if size <= 32 << 20:
        result, = db.execute("PRAGMA quick_check(1)").fetchone()
        if result != "ok":
            yield result
            return
    for row in db.execute(
            f"SELECT {COLUMNS} FROM pending_reviews WHERE status NOT IN "
            "('rejected', 'expired', 'withdrawn') AND (status <> 'approved' "
            "OR outcome IS NULL OR outcome NOT IN ('executed', 'failed', "
            "'lapsed'))"):
        yield from row_faults(db, ReviewRequest._make(row))


def row_faults(db: Any, there: ReviewRequest) -> Iterator[str]:
    """Where a request disagrees with its audit rows, or with its digest."""
    name = f'request "{visible(str(there.request_id))}"'
    rows = db.execute("SELECT * FROM audit_log WHERE request_id = ? ORDER BY "
                      "sequence", (there.request_id,)).fetchall()
    events = [row[2] for row in rows]
    if events[:1] != ["submitted"] or "submitted" in events[1:]:
        yield f"{name} has no audit row, or more than one begins it"
        return
    before = db.execute("SELECT hash FROM audit_log WHERE sequence = ?",
                        (rows[0][0] - 1,)).fetchone() or (GENESIS,)
    if audit_hash(db, before[0], rows[0]) != rows[0][6] or not there.intact:
        yield f"{name} is not what was asked"
    said = next((row for row in rows if row[2] in set(Status)), None)
    detail = json.loads(said[5]) if said else {}
    if (said[2] if said else Status.WAITING) != there.status or (
            said and there.decided_by not in (None, said[4])) or (
            (there.reason, there.signed_in, there.decided_at) !=
            (detail.get("reason"), detail.get("signed_in"),
             said and said[1])):
        yield f"{name} is {there.status}, the audit log says otherwise"
    last = {"claimed": Outcome.RUNNING}.get(events[-1], events[-1])
    if there.outcome != (last if last in set(Outcome) else None) or (
            there.outcome_text != json.loads(rows[-1][5]).get("text")):
        yield f"{name} has outcome {there.outcome}, the audit log otherwise"


def audit_hash(db: Any, previous: str, row: tuple[Any, ...]) -> str:
    """The hash an audit row should have, behind this one."""
    asked = (db.execute(
        f"SELECT {ASKED} FROM pending_reviews WHERE request_id = ?",
        (row[3],)).fetchone() or ()) if row[2] == "submitted" else ()
    return row_hash(previous, row[:6] + asked)


def last_head(db: Any) -> Head:
    row = db.execute("SELECT sequence, hash FROM audit_log ORDER BY sequence "
                     "DESC LIMIT 1").fetchone()
    return Head(*(row or (0, GENESIS)))


def open_for_reading(path: Path) -> Any:
    """A read-only connection, beside a running server or without one."""
    import sqlite3
    if not path.exists():
        raise bad_database(path, "no such database", "name it by --database")
    # without a -wal nobody writes, and none of ours need be left behind
    alone = not path.with_name(path.name + "-wal").exists()
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro"
                           f"{'&immutable=1' * alone}", uri=True)


def audit_rows(db: Any) -> Iterator[tuple[Any, ...]]:
    """The whole audit log, from its beginning."""
    yield from db.execute("SELECT * FROM audit_log ORDER BY sequence")


def waiting_ids(db: Any) -> list[str]:
    """What waits, as any other process can see it."""
    return [name for name, in db.execute(
        "SELECT request_id FROM pending_reviews WHERE status = 'waiting'")]


def audit_faults(db: Any, noted: str = "") -> Iterator[str]:
    """What is wrong with the whole audit log: every row against the chain,
    every request against its rows, and a noted head against the log."""
    head, seen = Head(0, GENESIS), noted in ("", GENESIS)
    for row in audit_rows(db):
        if row[0] != head.sequence + 1:
            yield f"audit row {head.sequence + 1} is missing"
        elif audit_hash(db, head.hash, row) != row[-1]:
            yield f"audit row {row[0]} was changed, or one before it"
        head = Head(row[0], row[-1])
        seen = seen or row[-1] == noted
    if not seen:
        yield f"the noted head {noted} is not in the log: its end was cut"
    for row in db.execute(f"SELECT {COLUMNS} FROM pending_reviews"):
        yield from row_faults(db, ReviewRequest._make(row))
    for name, in db.execute(
            "SELECT DISTINCT request_id FROM audit_log WHERE request_id NOT "
            "IN (SELECT request_id FROM pending_reviews)"):
        yield f'request "{visible(name)}" is in the log, but gone'


# ================================== Pages ==================================
# What the reviewer sees, and the only HTML. Pure functions from rows to text.
# Templates are HTML a designer could read; fill() escapes every value that is
# not Html already, after visible() has shown what cannot be seen (promise 7).
# What will run stands apart from what the agent says about it. No part is cut
# where there are buttons; the page works without its script.

HISTORY_ROWS = 200              # on one page of the history

STYLE = """
:root { color-scheme: light dark; --paper: #f6f5f2; --card: #fff;
  --ink: #1c1b19; --soft: #5d5a54; --line: #dedbd3; --sunk: #f3f1ec;
  --amber: #8a4a00; --amber-bg: #ffe9b0; --amber-edge: #f2a100;
  --green: #1a7340;
  --green-bg: #e0f4e6; --red: #b3261e; --red-bg: #fde7e4;
  --grey: #66625b; --grey-bg: #eceae5; --on: #fff; }
@media (prefers-color-scheme: dark) { :root { --paper: #161513;
  --card: #21201d; --ink: #eeebe4; --soft: #a8a297; --line: #3a3732;
  --sunk: #191815; --amber: #ffb84d; --amber-bg: #3d2c0c; --green: #6fd195;
  --green-bg: #12331f; --red: #ff8a7d; --red-bg: #431814; --grey: #b5afa4;
  --grey-bg: #33312c; --on: #161513; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 0 16px 64px; max-width: 860px;
  background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
body > header { display: flex; gap: 4px 20px; align-items: baseline;
  flex-wrap: wrap; padding: 20px 0 8px; }
h1 { font-size: 22px; margin: 0; flex: 1; white-space: nowrap; }
h2 { font-size: 17px; margin: 28px 0 10px; }
h3 { font-size: 18px; line-height: 1.35; margin: 10px 0; }
h4 { font-size: 12px; letter-spacing: .05em; text-transform: uppercase;
  color: var(--soft); margin: 0 0 4px; }
a { color: inherit; }
h1 a { text-decoration: none; }
h3, pre, dd, code, li { overflow-wrap: anywhere; white-space: break-spaces; }
li { white-space: normal; }
.card, .empty { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: 16px 18px; margin: 0 0 16px; }
.card { border-left: 6px solid var(--edge, var(--tone)); }
.card > header { display: flex; flex-wrap: wrap; gap: 6px 12px;
  align-items: center; color: var(--soft); font-size: 14px; }
.waiting { --tone: var(--amber); --tint: var(--amber-bg);
  --edge: var(--amber-edge); }
.approved { --tone: var(--green); --tint: var(--green-bg); }
.rejected { --tone: var(--red); --tint: var(--red-bg); }
.expired, .withdrawn { --tone: var(--grey); --tint: var(--grey-bg); }
.status { color: var(--tone); background: var(--tint); font-weight: 600;
  border-radius: 99px; padding: 1px 11px; font-size: 14px; }
.tag { border: 1px solid var(--line); border-radius: 12px; padding: 0 9px;
  overflow-wrap: anywhere; min-width: 0; }
.tool { font: 600 15px ui-monospace, Consolas, monospace; margin: 0;
  overflow-wrap: anywhere; }
.part { border-top: 1px solid var(--line); padding: 10px 0 0; margin: 12px 0; }
.exact { background: var(--sunk); border: 1px solid var(--line);
  border-radius: 8px; padding: 10px 12px; }
pre, code { font: 14px/1.45 ui-monospace, Consolas, monospace; }
pre { margin: 4px 0 0; }
dl { display: grid; grid-template-columns: 6.5em 1fr;
  gap: 2px 14px; margin: 0; font-size: 14px; }
dt { color: var(--soft); }
dd { margin: 0; }
summary { cursor: pointer; font-size: 14px; padding: 6px 0; }
mark { background: var(--red-bg); color: var(--red); border-radius: 3px;
  font-size: .85em; padding: 0 2px; }
form { border-top: 1px solid var(--line); padding-top: 12px; display: flex;
  flex-wrap: wrap; gap: 10px; align-items: center; }
textarea { flex: 1 1 220px; min-height: 44px; height: 44px; padding: 10px;
  font: inherit; font-size: 16px; line-height: 1.3; color: inherit;
  background: var(--sunk); border: 1px solid var(--line); border-radius: 8px; }
::placeholder { color: var(--soft); opacity: 1; }
button { font: inherit; font-weight: 600; min-height: 44px; cursor: pointer;
  padding: 8px 22px; border-radius: 8px; border: 1px solid transparent; }
.approve { background: var(--green); color: var(--on); }
.reject { background: transparent; color: var(--red);
  border-color: var(--red); }
:focus-visible { outline: 3px solid var(--amber); outline-offset: 2px; }
ol { list-style: none; padding: 0; margin: 0; }
li { background: var(--card); border: 1px solid var(--line);
  border-left: 6px solid var(--tone); border-radius: 8px;
  padding: 8px 14px; margin: 0 0 8px; font-size: 15px; }
li p { margin: 2px 0; }
.soft { color: var(--soft); font-size: 14px; }
.over form { visibility: hidden; }
#lost { position: fixed; bottom: 0; left: 16px; right: 16px;
  border-color: var(--red); }
.long { font-size: 15px; font-weight: 400; }
.card > header + h3 { margin-top: 8px; }
main > .card { margin-top: 12px; }
@media (max-width: 520px) { button { flex: 1; }
  textarea { flex-basis: 100%; } }
"""

# Fetches the page while its tab is visible: new cards are added below, what
# is no longer waiting loses its buttons, and nothing moves under a finger.
# Addresses start from location.origin: a page opened with credentials in its
# link cannot fetch relative ones.
SCRIPT = """
const local = root => { for (const t of root.querySelectorAll("time"))
  t.textContent = new Date(t.dateTime).toLocaleString(); };
const list = document.getElementById("waiting");
async function refresh() {
  const reply = await fetch(location.origin + "/",
    {headers: {Accept: "text/html"}, cache: "no-store"});
  if (!reply.ok) throw new Error(reply.status);
  const page = new DOMParser().parseFromString(await reply.text(),
                                               "text/html");
  local(page);
  const all = !page.querySelector("#more .empty");
  for (const card of list.querySelectorAll(".card:not(.over)")) {
    const fresh = page.getElementById(card.id);
    const live = card.querySelector(".live");
    if (fresh) live.textContent = fresh.querySelector(".live").textContent;
    else if (all) {
      card.className = "card withdrawn over";
      card.querySelector(".status").textContent = "no longer waiting";
      live.textContent = "";
    }
  }
  for (const card of page.querySelectorAll("#waiting .card"))
    if (!document.getElementById(card.id)) list.append(card);
  for (const id of ["count", "reviewed", "more"]) {
    const old = document.getElementById(id), now = page.getElementById(id);
    if (old.innerHTML !== now.innerHTML) old.replaceWith(now);
  }
  document.title = page.title;
}
async function keepFresh() {
  const lost = document.getElementById("lost");
  try { if (!document.hidden) {
    await (list ? refresh() : refreshOne()); lost.hidden = true; } }
  catch { lost.hidden = false; }
  if (list || document.querySelector(".waiting form"))
    setTimeout(keepFresh, 2000);
}
async function refreshOne() {
  const reply = await fetch(location.origin + location.pathname,
    {headers: {Accept: "text/html"}, cache: "no-store"});
  if (!reply.ok) throw new Error(reply.status);
  const page = new DOMParser().parseFromString(await reply.text(),
                                               "text/html");
  local(page);
  const card = document.querySelector(".card"), now = page.getElementById(
    card.id);
  if (now.classList.contains("waiting")) card.querySelector(".live")
    .textContent = now.querySelector(".live").textContent;
  else card.replaceWith(now);
  document.title = page.title;
}
local(document);
if (list || document.querySelector(".waiting form"))
  setTimeout(keepFresh, 2000);
"""


def content_hash(text: str) -> str:
    """A hash source of a Content-Security-Policy (W3C CSP3)."""
    import binascii
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{binascii.b2a_base64(digest, newline=False).decode()}'"


CONTENT_POLICY = (
    f"default-src 'none'; style-src {content_hash(STYLE)}; "
    f"script-src {content_hash(SCRIPT)}; connect-src 'self'; img-src data:; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'")


class Html(str):
    """Text that is markup already, and so is not escaped again."""


def marked(text: str) -> Html:
    """Visible text as inert markup, each visible escape marked as one."""
    for sign, name in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"),
                       ('"', "&quot;"), ("'", "&#x27;")):
        text = text.replace(sign, name)
    return Html(re.sub(f"{BRACKETS[0]}([^{BRACKETS[1]}]*){BRACKETS[1]}",
                       r"<mark>\1</mark>", text))


def fill(template: str, **values: Any) -> Html:
    """A template with its {names} filled in, escaped unless Html."""
    return Html(re.sub(r"\{([a-z_]+)\}", lambda name: (
        value if isinstance(value := values[name[1]], Html)
        else marked(visible(str(value)))), template))


def joined(parts: Iterable[Html]) -> Html:
    return Html("".join(parts))


def pretty(value: Any, indent: str = "\n") -> str:
    """JSON to read, as visible text: indented, and broken after a line break
    in a text, but not after each of many: blank lines push nothing away."""
    inner = indent + "  "
    if isinstance(value, dict) and value:
        rows = [f"{inner}{quoted(k, inner)}: {pretty(v, inner)}"
                for k, v in value.items()]
        return "{" + ",".join(rows) + indent + "}"
    if isinstance(value, list) and value:
        return "[" + ",".join(inner + pretty(v, inner)
                              for v in value) + indent + "]"
    return quoted(value, inner)


def quoted(value: Any, indent: str) -> str:
    text = visible(json.dumps(value, ensure_ascii=False))
    if "\\n" not in text:
        return text
    return re.sub(r'\\(.)(?!\\n|"$)', lambda escape: escape[0] + (
        indent if escape[1] == "n" else ""), text)


def stored_json(text: str | None) -> Any:
    """The value of stored JSON; of a damaged row, the text as it is."""
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return f"DAMAGED: {text}"


def pretty_json(text: str) -> Html:
    return marked(pretty(stored_json(text)))


# ---- the templates ----

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header>
  <h1><a href="/">Review desk</a></h1>
  <a href="/history">History</a>
  <span class="soft">{who}</span>
</header>
<main>
<p id="lost" class="empty" role="status" hidden>The server does not answer;
this page may be old. Reload to sign in again.</p>
{main}
</main>
<script>{script}</script>
</body>
</html>
"""

DESK = """<h2 aria-live="polite">Waiting <span id="count">{count}</span></h2>
<div id="waiting">
{waiting}
</div>
<div id="more">{more}</div>
<h2>Reviewed</h2>
<ol id="reviewed">
{reviewed}
</ol>
"""

CARD = """<article class="card {status}" id="request-{request_id}">
  <header>
    <span class="status">{status}</span>
    {category}
    <span class="live">{times}</span>
  </header>
  <h3 class="{length}">{description}</h3>
  {body}
</article>
"""

BODY = """<section class="exact">
    {exact}
  </section>
  <section class="part">
    <h4>The agent says</h4>
    <dl>
      {claims}
    </dl>
    <details{open}>
      <summary>Context, {context_size}</summary>
      <pre>{context}</pre>
    </details>
  </section>
  <section class="part">
    <h4>This server knows</h4>
    <dl>
      {facts}
    </dl>
  </section>
  {form}"""

FORM_TEMPLATE = """<form method="post" action="/approve/{request_id}">
    <input type="hidden" name="shown_at" value="{shown_at}">
    <textarea name="reason" rows="1" maxlength="1000"
      aria-label="Reason (optional)" placeholder="Reason (optional)"
      ></textarea>
    <button class="approve" name="decision" value="approved">Approve</button>
    <button class="reject" name="decision" value="rejected">Reject</button>
  </form>"""

LARGE = """<p>This request is large, {size}. <a
  href="/review/{request_id}">Read all of it and decide</a>.</p>"""

ROW = """<li class="{status}">
  <p><span class="status">{status}</span> {times}</p>
  <p><a href="/review/{request_id}">{description}</a></p>
  {endings}
</li>
"""


# ---- the pages ----

class View(NamedTuple):
    """What a page needs to know beside the rows themselves."""

    who: str                            # the reviewer signed in
    at: float                           # now, in Unix seconds
    attended: Callable[[str], bool]     # does an agent wait for this?


def page(title: str, main: Html, who: str) -> Html:
    return fill(PAGE, title=title, main=main, style=Html(STYLE),
                script=Html(SCRIPT), who=f"signed in as {who}" if who else "")


def desk_page(view: View, waiting: list[ReviewRequest], count: int,
              reviewed: list[ReviewRequest]) -> Html:
    """What waits, with its buttons, and what was reviewed last."""
    empty = Html('<p class="soft">Nothing waits. A new request appears here '
                 "by itself<noscript> when you reload</noscript>.</p>")
    more = Html("") if count <= len(waiting) else fill(
        '<p class="empty">{n} more wait; they appear as these are decided.'
        "</p>", n=count - len(waiting))
    return page(f"({count}) Review desk" if count else "Review desk", fill(
        DESK, count=count, more=more if count else empty,
        waiting=joined(safe_card(view, there) for there in waiting),
        reviewed=joined(map(reviewed_row, reviewed))), view.who)


def review_page(view: View, there: ReviewRequest) -> Html:
    """One request with everything about it, the buttons after it all."""
    return page(f"{there.status}: {there.request_id}",
                safe_card(view, there, whole=True), view.who)


def history_page(view: View, rows: list[ReviewRequest]) -> Html:
    older = Html("") if len(rows) < HISTORY_ROWS else fill(
        '<p><a href="/history?before={at}_{id}">Older</a></p>', id=rows[-1].id,
        at=rows[-1].decided_at)
    return page("History", fill(
        '<h2>History</h2><ol>{rows}</ol>{older}',
        rows=joined(map(reviewed_row, rows)), older=older), view.who)


def problem_page(status: int, refusal: Refusal) -> Html:
    return page(f"{status} {refusal.reason}", fill(
        '<div class="card rejected"><h3>{message}</h3><p>{hint}</p>'
        '<p class="soft">{status} {reason}</p><p><a href="/">Back to the '
        "desk</a></p></div>", message=refusal.message, hint=refusal.hint,
        status=status, reason=refusal.reason), "")


def safe_card(view: View, there: ReviewRequest, whole: bool = False) -> Html:
    """A card, whatever is in its row: one bad row never hides the others."""
    try:
        return card(view, there, whole)
    except Exception:
        log.exception("a card cannot be shown")
        return fill('<article class="card rejected" id="request-{id}"><p>This '
                    'request cannot be shown here: <span class="live"></span>'
                    "{id}</p></article>", id=there.request_id)


def card(view: View, there: ReviewRequest, whole: bool = False) -> Html:
    """A request: what will run, what the agent says, what we know."""
    large = there.size > LARGE_BYTES and not whole
    category = fill('<span class="tag">{word}</span>', word=there.category
                    ) if there.category in CATEGORIES else Html("")
    body = fill(LARGE, size=readable_size(there.size),
                request_id=there.request_id) if large else fill(
        BODY, exact=exact_call(there), claims=definitions(claims(there)),
        open=Html(" open" * whole), context=pretty_json(there.agent_context),
        context_size=readable_size(len(there.agent_context.encode())),
        facts=definitions(facts(there, whole)), form=Html("") if
        there.status != Status.WAITING or not there.intact else fill(
            FORM_TEMPLATE, request_id=there.request_id,
            shown_at=instant(view.at)))
    return fill(CARD, status=there.status, request_id=there.request_id,
                category=category, times=times(view, there),
                description=there.action_description, body=body,
                length="long" if len(there.action_description) > 200 else "")


def exact_call(there: ReviewRequest) -> Html:
    if there.tool is None and there.arguments is None:
        return Html("Only this description was sent: no tool, no arguments.")
    return fill("<h4>{title}</h4>\n    {tool}\n    {arguments}",
                title="Runs exactly this" if there.status == Status.WAITING
                else "Exactly this",
                tool=fill('<p class="tool">{name}</p>', name=there.tool)
                if there.tool else "without a tool's name",
                arguments=fill("<pre>{json}</pre>", json=pretty_json(
                    there.arguments)) if there.arguments
                else "without arguments")


def definitions(pairs: Iterable[tuple[str, Any]]) -> Html:
    return joined(fill("<dt>{name}</dt><dd>{value}</dd>\n      ", name=name,
                       value=value) for name, value in pairs if value)


def claims(there: ReviewRequest) -> Iterator[tuple[str, Any]]:
    """What the agent's side says of itself, for what that is worth."""
    yield "agent", there.agent
    yield "checkpoint", there.checkpoint_id
    yield "category", there.category
    yield "because", there.why
    yield "asked at", clock_time(there.timestamp)


def facts(there: ReviewRequest, whole: bool) -> Iterator[tuple[str, Any]]:
    """What this server saw or computed itself; the digests when whole."""
    yield "sent by", ("unauthenticated agent: any program on this machine"
                      if there.asked_by == "agent:unauthenticated"
                      else there.asked_by)
    yield "received", clock_time(there.received_at)
    yield "deadline", clock_time(there.deadline)
    yield there.status, clock_time(there.decided_at)
    yield "decided by", decider(there)
    yield "reason", there.reason
    yield "outcome", outcome_words(there)
    yield "request_id", there.request_id
    yield "digest", whole and there.digest
    yield "its rules", whole and there.config_digest
    yield "DAMAGED", "what is stored is not what was asked" * (
        not there.intact)


def clock_time(text: str | None) -> Html | None:
    if text is None:
        return None
    moment = datetime.fromisoformat(text)
    return fill('<time datetime="{text}">{words}</time>', text=text,
                words=moment.strftime("%d %b %Y, %H:%M:%S UTC"))


def times(view: View, there: ReviewRequest) -> Html:
    """How long ago, how long still, and whether anybody waits."""
    def until(text: str) -> float:
        return datetime.fromisoformat(text).timestamp() - view.at
    words = f"{readable_seconds(max(0, -until(there.received_at)))} ago"
    if there.status != Status.WAITING:
        return Html(words)
    if there.deadline:
        words += f", {readable_seconds(max(0, until(there.deadline)))} left"
    return Html(words + (
        ", an agent waits for it" if view.attended(there.request_id) else
        ", nobody waits for it now: an approval runs nothing by itself"))


def decider(there: ReviewRequest) -> str:
    name = (there.decided_by or "").partition(":")[2]
    return f"{name} ({there.signed_in})" if there.signed_in else name


def outcome_words(there: ReviewRequest) -> str:
    return ": ".join(filter(None, (there.outcome, there.outcome_text)))


def reviewed_row(there: ReviewRequest) -> Html:
    """One line of what was reviewed, with who, why and what came of it."""
    try:
        description = there.action_description
        if len(description) > 300:
            description = description[:300] + " ..."
        endings = [
            f"by {decider(there)}" if there.decided_by else
            "nobody decided in time" if there.status == Status.EXPIRED
            else "nobody waited any more",
            there.reason and f"reason: {there.reason}",
            there.outcome and f"outcome: {outcome_words(there)}"]
        return fill(ROW, status=there.status, request_id=there.request_id,
                    description=description,
                    times=clock_time(there.decided_at) or Html(""),
                    endings=joined(fill('<p class="soft">{text}</p>',
                                        text=text)
                                   for text in endings if text))
    except Exception:
        log.exception("a row cannot be shown")
        return fill('<li class="expired">{id} cannot be shown</li>',
                    id=there.request_id)


def readable_size(size: int) -> str:
    return f"{size} bytes" if size < 2048 else f"{size / 1024:.0f} KiB"


# ================================== Server =================================
# The desk: one thread, one selector over every socket, one transaction a
# turn. All requests that became readable in a turn run inside one SQLite
# transaction, and nobody is answered before its COMMIT: a group commit without
# a second thread, no locks, no races. A waiting agent is a parked connection.
# http.server's own parser is lenient (two Content-Lengths, Transfer-Encoding
# ignored, a bare CR ends a line: cpython#150499), so heads are parsed here.

MAX_HEAD = 16 * 1024            # bytes: browsers stay below 8 KiB
MAX_FIELDS = 64                 # header fields: browsers send about 20
MAX_BODY = 1 << 20              # bytes: context, arguments and their escapes
REQUEST_SECONDS = 15            # from a request's first byte to its last
ANSWER_SECONDS = 60             # for a client to take its answer
IDLE_SECONDS = 75               # a connection kept for the next request
LINGER_SECONDS = 2              # to let a refused client read the refusal
MAX_POLL_SECONDS = 60           # one long poll; proxies cut longer ones
SLOW_SECONDS = 1                # before wrong credentials are answered
RECENT_SECONDS = 10             # a poll this recent: somebody waits
MAX_CONNECTIONS = 8000 if os.name == "posix" else 480   # select() on Windows
SWEEP_SECONDS = 0.25            # how often deadlines are looked at
PAGE_CARDS = 100                # waiting requests on the page at once
REVIEWED_CARDS = 20             # reviewed ones below them

# What is answered when something is refused: one stable word each.
REFUSALS = {
    "bad-request": 400, "bad-json": 400, "missing-field": 400,
    "bad-field": 400, "bad-digest": 400, "bad-decision": 400,
    "not-signed-in": 401, "wrong-credentials": 401, "not-your-route": 403,
    "cross-site": 403, "no-such-route": 404, "unknown": 404,
    "wrong-method": 405, "already-decided": 409, "expired": 409,
    "withdrawn": 409, "id-taken": 409, "not-approved": 409,
    "already-claimed": 409, "lapsed": 409, "arguments-changed": 409,
    "not-claimed": 409, "already-finished": 409, "length-required": 411,
    "too-large": 413, "wrong-type": 415, "wrong-host": 421,
    "too-many-waiting": 429, "head-too-large": 431, "internal": 500,
    "damaged": 503, "storage-failed": 503,
}


class Route(NamedTuple):
    method: str
    path: str
    who: str
    answer: str


# The table of rights: what it does not list is refused (promise 5).
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
    Route("GET",  "/healthz",              "anyone",   "get_healthz"),
)
BY_PATH: dict[tuple[str, bool], dict[str, Route]] = {}
for _route in ROUTES:
    _stem, _, _id = _route.path.partition("/{")
    BY_PATH.setdefault((_stem, bool(_id)), {})[_route.method] = _route


class Principal(NamedTuple):
    """Who asks: `agent:...` or `reviewer:...`, and how that is known."""

    kind: str
    name: str
    signed_in: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"


NO_ROUTE, NOBODY = Route("", "", "", ""), Principal("nobody", "")


class Fields(NamedTuple):
    """The header fields this server reads, and no others."""

    host: str | None
    length: int | None
    content_type: str
    authorization: str | None
    origin: str | None
    site: str | None
    destination: str | None
    accept: str
    close: bool
    expect: bool


class Request(NamedTuple):
    """A request's head, and once it is admitted, who may ask what."""

    method: str
    path: str
    query: str
    fields: Fields
    close: bool
    route: Route = NO_ROUTE
    request_id: str = ""
    who: Principal = NOBODY


REQUEST_LINE = re.compile(rb"([A-Z]{1,20}) (/[!-~]*) HTTP/1\.([01])")
FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):"
                   rb"[ \t]*+([!-~\x80-\xff][ \t!-~\x80-\xff]*+)?")
NOT_HTTP = re.compile(rb"\A[^A-Z]|\r(?!\n)(?!\Z)|(?<!\r)\n")
LOCAL_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?",
                        re.IGNORECASE)
READ_ONCE = frozenset((
    b"host", b"content-length", b"content-type", b"authorization", b"origin",
    b"sec-fetch-site", b"sec-fetch-dest", b"transfer-encoding", b"expect"))


def bad_head(what: str) -> Refusal:
    return Refusal("bad-request", what, "send plain HTTP/1.1, as curl does")


def parse_head(head: bytes) -> Request:
    """A request's head, strictly (RFC 9112): what is ambiguous is refused,
    never repaired, because two parsers that repair differently see two
    different requests (request smuggling)."""
    line, _, block = head.partition(b"\r\n")
    start = REQUEST_LINE.fullmatch(line)
    if start is None:
        raise bad_head("the request line is not one")
    fields = parse_fields(block)
    if start[3] == b"0":
        fields = fields._replace(expect=False, close=True)
    elif fields.host is None:
        raise bad_head("there is no Host")
    path, _, query = start[2].decode("ascii").partition("?")
    return Request(start[1].decode("ascii"), path, query, fields,
                   fields.close)


def parse_fields(block: bytes) -> Fields:
    lines = block.split(b"\r\n") if block else []
    if len(lines) > MAX_FIELDS:
        raise Refusal("head-too-large", f"more than {MAX_FIELDS} fields")
    found: dict[bytes, bytes] = {}
    for line in lines:
        parts = FIELD.fullmatch(line)
        if parts is None:
            raise bad_head("a header line is not one")
        name, value = parts[1].lower(), (parts[2] or b"").rstrip(b" \t")
        if name in found and name in READ_ONCE:
            raise bad_head(f"{name.decode()} comes twice")
        found[name] = found[name] + b", " + value if name in found else value
    if b"transfer-encoding" in found:
        raise Refusal("bad-request", "Transfer-Encoding is not accepted",
                      "send the body with a Content-Length")
    length = found.get(b"content-length")
    if length is not None and not re.fullmatch(rb"[0-9]{1,12}", length):
        raise bad_head("Content-Length is not a number")

    def text(name: bytes) -> str | None:
        return found[name].decode("latin-1") if name in found else None
    return Fields(
        text(b"host"), None if length is None else int(length),
        (text(b"content-type") or "").partition(";")[0].strip().lower(),
        text(b"authorization"), text(b"origin"), text(b"sec-fetch-site"),
        text(b"sec-fetch-dest"), text(b"accept") or "",
        "close" in (text(b"connection") or "").lower(),
        (text(b"expect") or "").lower() == "100-continue")


class Tokens(NamedTuple):
    """Who may sign in, as SHA-256 in hex: tokens themselves are not kept."""

    agent: str | None               # None: agent routes are open (loopback)
    shared: str | None              # any reviewer's name
    named: Mapping[str, str]        # or each reviewer's own


def token_hash(token: str | bytes) -> str:
    data = token.encode("utf-8", "surrogatepass") if isinstance(
        token, str) else token
    return hashlib.sha256(data).hexdigest()


def fresh_token() -> str:
    import secrets
    return secrets.token_urlsafe(32)        # 256 bits


def identify(authorization: str, tokens: Tokens) -> Principal | None:
    """Whose credentials these are; None for nobody's. Digests are compared,
    in constant time and as ASCII (compare_digest refuses other text)."""
    import base64
    from hmac import compare_digest
    scheme, _, value = authorization.partition(" ")
    reviewer, token = "", value.strip().encode("latin-1")
    basic = scheme.lower() == "basic"
    if basic:
        try:
            name, _, token = base64.b64decode(
                token, validate=True).partition(b":")
            reviewer = name.decode("utf-8") or "reviewer"
        except ValueError:
            return None
    elif scheme.lower() != "bearer":
        return None
    known = token_hash(token)
    if tokens.agent and compare_digest(known, tokens.agent):
        return Principal("agent", "token")
    expected = tokens.named.get(reviewer, tokens.shared)
    if (basic and expected and compare_digest(known, expected)
            and reviewer.isprintable() and len(reviewer) <= 64):
        return Principal("reviewer", reviewer, "own token" if
                         reviewer in tokens.named else "shared token")
    return None


def check_origin(fields: Fields, own: tuple[str, ...]) -> None:
    """Refusal where another site's page sent this (CSRF). A browser says so
    in Sec-Fetch-Site or Origin; who sends neither is no browser."""
    if fields.origin == "null" or (
            fields.site != "same-origin" if fields.site is not None
            else fields.origin not in (None, *own)):
        raise Refusal("cross-site", "another site's page sent this",
                      "decide on the page itself, opened at its own address")


@functools.lru_cache(maxsize=256)
def parse_query(query: str) -> Mapping[str, str]:
    from urllib.parse import parse_qsl
    try:
        return unique_pairs(parse_qsl(query, max_num_fields=16))
    except ValueError:
        raise bad_head("the query cannot be read") from None


def parse_form(body: bytes) -> dict[str, str]:
    from urllib.parse import parse_qsl
    if body.lstrip()[:1] == b"{":
        raise Refusal("wrong-type", "this is JSON, sent as a form",
                      "add -H 'Content-Type: application/json'")
    try:
        return unique_pairs(parse_qsl(
            body.decode("ascii"), keep_blank_values=True, strict_parsing=True,
            errors="strict", max_num_fields=16))
    except ValueError:
        raise Refusal("bad-request", "the form cannot be read",
                      "send decision=approved or decision=rejected") from None


def parse_object(body: bytes) -> dict[str, Any]:
    try:
        value = parse_json(body)
    except ValueError as error:
        raise Refusal("bad-json", f"the body is not strict JSON: {error}",
                      "send one JSON object, UTF-8") from None
    if not isinstance(value, dict):
        raise Refusal("bad-json", "the body is not a JSON object",
                      'send {"name": value, ...}')
    return value


def text_field(body: Mapping[str, Any], name: str, limit: int,
               required: bool = False) -> str | None:
    """A field that is a text, or None where it may be left out."""
    value = body.get(name)
    blank = value is None or isinstance(value, str) and not value.strip()
    if blank and not required:
        return None
    if blank or not isinstance(value, str):
        raise Refusal("bad-field", f'"{name}" must be a text',
                      f'send "{name}": "..."')
    if len(value) > limit // 4 and len(value.encode()) > limit:
        raise Refusal("too-large", f'"{name}" is over {limit} bytes',
                      "send less of it")
    return value


REQUIRED_FIELDS = ("request_id", "action_description", "agent_context",
                   "timestamp")
OPTIONAL_FIELDS = {"tool": MAX_NAME, "agent": MAX_NAME,
                   "checkpoint_id": MAX_NAME, "category": MAX_NAME,
                   "why": MAX_WHY, "config_digest": MAX_NAME}
PENDING_FIELDS = frozenset((*REQUIRED_FIELDS, *OPTIONAL_FIELDS, "arguments",
                            "timeout_seconds", "digest"))


def asked_from(body: dict[str, Any], by: Principal, at: float,
               now: str) -> Asked:
    """What POST /pending asks, checked field by field; Refusal with cure."""
    missing = [name for name in REQUIRED_FIELDS if name not in body]
    if missing:
        raise Refusal("missing-field", f'"{missing[0]}" is missing',
                      f"required are {', '.join(REQUIRED_FIELDS)}")
    if not PENDING_FIELDS.issuperset(body):
        extra = min(set(body) - PENDING_FIELDS)
        raise Refusal("bad-field", f'unknown field "{visible(extra[:80])}"',
                      f"known are {', '.join(sorted(PENDING_FIELDS))}")
    request_id = body["request_id"]
    if not isinstance(request_id, str) or not REQUEST_ID.fullmatch(request_id):
        raise Refusal("bad-field", '"request_id" must be 1 to 128 of '
                      "A-Z a-z 0-9 . _ : -, and not . or ..",
                      "a UUID is fine")
    description = text_field(body, "action_description", MAX_DESCRIPTION, True)
    texts = {name: text_field(body, name, limit)
             for name, limit in OPTIONAL_FIELDS.items()}
    arguments = body.get("arguments")
    if not (arguments is None or isinstance(arguments, dict)):
        raise Refusal("bad-field", '"arguments" must be an object',
                      'send "arguments": {"name": value, ...}')
    try:
        timestamp = parse_timestamp(body["timestamp"])
        arguments = None if arguments is None else canonical(arguments)
        context = READABLE.encode(body["agent_context"])
    except ValueError as error:
        raise Refusal("bad-field", str(error),
                      "numbers must be finite; a time is like "
                      f'"{now}"') from None
    if arguments is not None and len(arguments) > MAX_ARGUMENTS:
        raise Refusal("too-large", f"arguments over {MAX_ARGUMENTS} bytes",
                      "pass a reference, such as a file's name and SHA-256")
    digest = digest_of(description or "", arguments, texts["tool"])
    if body.get("digest") not in (None, digest):
        raise Refusal("bad-digest", "the digest sent is not that of the "
                      "action_description, arguments and tool sent",
                      f"it would be {digest}")
    return Asked(
        request_id, digest, now,
        deadline_from(body.get("timeout_seconds"), at), timestamp, str(by),
        **texts, action_description=description or "", arguments=arguments,
        agent_context=context)


def deadline_from(timeout: Any, at: float) -> str | None:
    """When a request expires. Without a time-out it does not: nobody
    promised to stop waiting."""
    if timeout is None:
        return None
    if type(timeout) not in (int, float) or (
            not 0 < timeout < MAX_YEARS * 31_557_600):
        raise Refusal("bad-field", '"timeout_seconds" must be a number above '
                      f"0 and below {MAX_YEARS} years",
                      "leave it out for no deadline")
    return instant(at + timeout)


# Security headers, on every answer alike. No CORS, no cookie, ever.
SECURITY = (
    # only the page's own style and script, by hash; nothing from elsewhere
    f"Content-Security-Policy: {CONTENT_POLICY}\r\n"
    "X-Content-Type-Options: nosniff\r\n"       # JSON is never read as HTML
    "X-Frame-Options: DENY\r\n"                 # for what ignores the policy
    # not no-referrer: that makes a form's Origin "null" (seen in Chromium)
    "Referrer-Policy: same-origin\r\n"
    "Cross-Origin-Opener-Policy: same-origin\r\n"
    "Cross-Origin-Resource-Policy: same-origin\r\n"
    "Cache-Control: no-store\r\n")
JSON, PROBLEM, HTML = ("application/json", "application/problem+json",
                       "text/html; charset=utf-8")
FORM = "application/x-www-form-urlencoded"
BASIC = 'WWW-Authenticate: Basic realm="hitl.py", charset="UTF-8"\r\n'
SILENT = 'WWW-Authenticate: Script realm="hitl.py"\r\n'     # no dialog
BEARER = 'WWW-Authenticate: Bearer realm="hitl.py"\r\n'


CURES = {
    "agent": "send -H 'Authorization: Bearer TOKEN', the HITL_AGENT_TOKEN "
             "that serve has; where it has none, send no credentials",
    "reviewer": "sign in as a reviewer: curl -u reviewer:TOKEN ...; serve "
                "printed the token"}
STORAGE_FAILED = Refusal(
    "storage-failed", "the database could not store this; none of it is kept",
    "see to the disk and to other programs that write it, then send it again")


@functools.lru_cache(maxsize=64)
def status_line(status: int) -> str:
    from http import HTTPStatus
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"


class Connection:
    """One client's socket: bytes in, whole requests to the desk, bytes out.
    Never blocks; handles one request a turn, so answers keep their order."""

    def __init__(self, connection: Any, client_address: Any,
                 server: Desk) -> None:
        self.connection, self.client_address = connection, client_address
        self.server = server
        self.inbox = bytearray()
        self.outbox: memoryview | bytes = b""
        self.request: Request | None = None     # its head is here
        self.waits_for: str | None = None       # parked on this request_id
        self.held: bytes | None = None          # an answer sent later
        self.answering = False          # an answer is not sent out so far
        self.refused = False            # what still comes in is discarded
        self.close_connection = self.stalled = False
        self.until = server.instant + REQUEST_SECONDS

    def readable(self) -> None:
        if self.answering and self.waits_for is None and self.held is None:
            return              # its answer leaves in this turn: read later
        try:
            data = self.connection.recv(1 << 14)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self.drop(gone=True)
        elif self.answering and not self.refused:
            self.inbox += data
            if len(self.inbox) > MAX_HEAD:      # sends on and does not wait
                self.drop()
        elif not self.refused:
            if not self.inbox and self.request is None:
                self.until = self.server.instant + REQUEST_SECONDS
            self.inbox += data
            self.advance()

    def advance(self) -> None:
        """Handle the next request, if all of it is here and the one before
        is answered."""
        if self.answering:
            return
        head = b""
        try:
            if self.request is None:
                head = self.next_head()
                if not head:
                    return
                self.request = self.server.admit(head)
                if self.request.fields.expect:
                    self.connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            length = self.request.fields.length or 0
            if len(self.inbox) >= length:
                request, self.request = self.request, None
                self.answering = True
                body = bytes(self.inbox[:length])
                del self.inbox[:length]
                self.server.dispatch(self, request, body)
        except Refusal as refusal:
            self.refused = self.answering = self.close_connection = True
            self.server.refuse(self, head, refusal)
        except OSError:
            self.drop()

    def next_head(self) -> bytes:
        """The head that is here whole; b"" if none is."""
        end = self.inbox.find(b"\r\n\r\n", 0, MAX_HEAD + 4)
        if end == 0:
            raise bad_head("there is no request line")
        if end < 0:
            if len(self.inbox) > MAX_HEAD:
                raise Refusal("head-too-large", f"the head is over {MAX_HEAD} "
                              "bytes", "send fewer or shorter headers")
            if NOT_HTTP.search(self.inbox):
                raise bad_head("this is not HTTP, or its lines do not end in "
                               "CR LF (https is for a proxy in front)")
            return b""
        head = bytes(self.inbox[:end])
        del self.inbox[:end + 4]
        return head

    def send(self, data: bytes) -> None:
        self.outbox = memoryview(data)
        self.until = self.server.instant + ANSWER_SECONDS
        self.writable()

    def writable(self) -> None:
        """Send what the socket takes now, and the rest when it can."""
        try:
            self.outbox = self.outbox[self.connection.send(self.outbox):]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            return self.drop()
        if self.stalled != bool(self.outbox):
            self.stalled = not self.stalled
            self.server.watch(self, writing=self.stalled)
        if not self.outbox:
            self.sent_all()

    def sent_all(self) -> None:
        self.outbox, self.answering = b"", False
        self.until = self.server.instant + IDLE_SECONDS
        if not self.close_connection:
            self.server.renew(self)
        elif self.refused:      # more may be on its way: a close now would
            self.inbox.clear()  # reset the connection, and the answer away
            self.until = self.server.instant + LINGER_SECONDS
            with contextlib.suppress(OSError):
                self.connection.shutdown(1)     # SHUT_WR
        else:
            self.drop()

    def drop(self, gone: bool = False) -> None:
        """Close; `gone` says the client did, so it waits no more."""
        self.server.forget(self, gone)
        self.connection.close()


class Desk:
    """The loop over all connections, and the routes. open_desk() makes it
    the class of http.server that owns the listening socket."""

    address_family: int
    socket: Any
    request_queue_size = 1024       # a burst of agents is not refused

    def __init__(self, address: tuple[str, int], handler: type, store: Store,
                 tokens: Tokens, public_url: str,
                 say: Callable[[str], None] | None) -> None:
        import socket
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.allow_reuse_address = os.name == "posix"
        self.store, self.tokens, self.say = store, tokens, say
        super().__init__(address, handler)  # type: ignore[call-arg]
        self.socket.setblocking(False)
        port = self.socket.getsockname()[1]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(
            address[0], address[0])
        host = f"[{host}]" if ":" in host else host
        self.url = public_url or f"http://{host}:{port}"
        self.public_host = public_url.partition("://")[2].lower()
        self.admit = functools.lru_cache(maxsize=512)(self.judge)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.socket, selectors.EVENT_READ, None)
        self.half_open: dict[Connection, None] = {}     # oldest first
        self.parked: dict[Connection, None] = {}
        self.waiters: dict[str, dict[Connection, None]] = {}
        self.polled: dict[str, float] = {}      # request_id -> last poll
        self.again: dict[Connection, None] = {}  # more of them is here
        self.answers: list[tuple[Connection, Request | None, bytes]] = []
        self.instant = time.monotonic()
        self.swept, self.soonest = 0.0, math.inf    # a sweep; a poll's end
        self.stopping, self.failing, self.dated = False, False, (0, "")

    def server_bind(self) -> None:
        """Bind, without http.server's getfqdn: with dead DNS that takes half
        a minute, and air-gapped is where this runs."""
        import socketserver
        socketserver.TCPServer.server_bind(self)  # type: ignore[arg-type]
        self.server_name, self.server_port = self.socket.getsockname()[:2]

    # ---- the loop ----

    def serve_forever(self, poll_interval: float = SWEEP_SECONDS) -> None:
        """Turn until stop() is called, from a signal or another thread."""
        while not self.stopping:
            self.turn(0 if self.again else poll_interval)
        for connection in list(self.parked):
            self.release(connection)
        for connection in list(self.half_open):
            connection.drop()
        self.selector.close()
        self.server_close()  # type: ignore[attr-defined]

    def stop(self) -> None:
        self.stopping = True

    def turn(self, patience: float) -> None:
        """1 take what is readable, 2 look once more: more may have come
        meanwhile, and a commit costs the same, 3 commit, 4 answer, 5 look at
        the clock, 6 let new connections in."""
        ready = self.selector.select(max(0, min(
            patience, self.due - time.monotonic())))
        self.instant = time.monotonic()
        self.store.tick()
        again, self.again = self.again, {}
        for connection in again:
            connection.advance()
        knocking = self.take(ready)
        if self.answers:
            self.take(self.selector.select(0))
            self.commit()
        if self.instant >= self.due:
            self.sweep()
        if knocking:
            self.accept()

    @property
    def due(self) -> float:
        """When to sweep: now and then, and soon when a poll's time is up."""
        return min(self.swept + SWEEP_SECONDS,
                   max(self.soonest, self.swept + 0.02))

    def take(self, ready: list[tuple[Any, int]]) -> bool:
        """Read and write where that can be done now -> whether somebody
        knocks at the listening socket."""
        knocking = False
        for key, events in ready:
            if key.data is None:
                knocking = True
            elif events & selectors.EVENT_WRITE:
                key.data.writable()
            else:
                key.data.readable()
        return knocking

    def commit(self) -> None:
        """End the turn's transaction, then answer; if it is not on disk,
        every answer of the turn becomes a 503 (promise 6)."""
        stored, changes = self.store.commit()
        answers, self.answers = self.answers, []
        for connection, request, answer in answers:
            if not stored:
                answer = self.problem(request, STORAGE_FAILED,
                                      connection.close_connection)
            connection.send(answer)
        self.tell(changes)

    def tell(self, changes: list[Change]) -> None:
        """Wake who waits for a request that changed, and print a line."""
        for change in changes:
            for connection in self.waiters.pop(change.request_id, ()):
                self.release(connection)
            if change.event != "submitted":
                self.polled.pop(change.request_id, None)
        if self.say and changes:
            try:
                self.say("\n".join(
                    f"{self.store.now[11:19]} {change.event:9} "
                    f"{change.request_id} by {visible(change.actor)}"
                    for change in changes))
            except (OSError, ValueError):   # nobody reads our lines any more
                self.say = None

    def sweep(self) -> None:
        """What is past its time: connections, polls, requests."""
        self.swept = self.instant
        for late in [c for c in (*self.half_open, *self.parked)
                     if c.until <= self.instant]:
            if late in self.parked:
                self.release(late)
            elif late.held is None:
                late.drop()
            else:
                answer, late.held = late.held, None
                late.send(answer)
        self.soonest = min((c.until for c in self.parked), default=math.inf)
        for request_id in [r for r, at in self.polled.items()
                           if at + RECENT_SECONDS < self.instant]:
            del self.polled[request_id]
        import sqlite3
        try:
            for there in self.store.overdue():
                self.store.attempt(self.store.expire, there)
            self.failing = False
        except (sqlite3.Error, ValueError, TypeError) as error:
            if not self.failing:            # once, not four times a second
                log.error("the database fails: %s", error)
            self.failing = True
        self.tell(self.store.commit()[1])

    def accept(self) -> None:
        """Let new connections in; at the limit the oldest half-open one
        goes, else the oldest parked poll is answered early."""
        import errno
        import socket
        for _ in range(256):
            try:
                connection, address = self.socket.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self.make_room()
                return
            connection.setblocking(False)
            with contextlib.suppress(OSError):      # gone again, on macOS
                # an answer is one small packet: do not wait for more (Nagle)
                connection.setsockopt(socket.IPPROTO_TCP,
                                      socket.TCP_NODELAY, 1)
            if len(self.half_open) + len(self.parked) >= MAX_CONNECTIONS:
                self.make_room()
            client = self.RequestHandlerClass(  # type: ignore[attr-defined]
                connection, address, self)
            self.half_open[client] = None
            self.selector.register(connection, selectors.EVENT_READ, client)

    def make_room(self) -> None:
        for connection in self.half_open:
            return connection.drop()
        for connection in self.parked:
            connection.close_connection = True
            return self.release(connection)

    def watch(self, connection: Connection, writing: bool) -> None:
        self.selector.modify(
            connection.connection, selectors.EVENT_WRITE if writing
            else selectors.EVENT_READ, connection)

    def renew(self, connection: Connection) -> None:
        """An answer is out: the connection is the youngest again."""
        self.half_open.pop(connection, None)
        self.half_open[connection] = None
        if connection.inbox:
            self.again[connection] = None

    def forget(self, connection: Connection, gone: bool) -> None:
        if connection in self.half_open or connection in self.parked:
            self.selector.unregister(connection.connection)
        self.half_open.pop(connection, None)
        self.again.pop(connection, None)
        request_id = self.unpark(connection)
        if gone and request_id not in self.waiters:
            self.polled.pop(request_id, None)

    def unpark(self, connection: Connection) -> str:
        """Out of the tables of polls -> the request_id it waited for."""
        request_id, connection.waits_for = connection.waits_for or "", None
        self.parked.pop(connection, None)
        others = self.waiters.get(request_id, {})
        others.pop(connection, None)
        if not others:
            self.waiters.pop(request_id, None)
        return request_id

    def park(self, connection: Connection, request: Request,
             seconds: float) -> None:
        """Hold a poll until the request changes or its time is up."""
        request_id = connection.waits_for = request.request_id
        connection.until = self.instant + seconds
        self.soonest = min(self.soonest, connection.until)
        self.half_open.pop(connection, None)
        self.parked[connection] = None
        self.waiters.setdefault(request_id, {})[connection] = None

    def release(self, connection: Connection) -> None:
        """Answer a parked poll with what its request is now."""
        request_id = self.unpark(connection)
        self.half_open[connection] = None
        self.polled[request_id] = self.instant
        import sqlite3
        try:
            summary = self.store.summary(request_id)
            answer = self.message(200, JSON, self.shape_json(summary).encode(),
                                  connection.close_connection)
        except (Refusal, sqlite3.Error):
            connection.close_connection = True
            answer = self.problem(None, STORAGE_FAILED)
        connection.send(answer)

    def attended(self, request_id: str) -> bool:
        """Whether somebody waits for this: a parked poll or a recent one."""
        return request_id in self.waiters or request_id in self.polled

    # ---- who may do what ----

    def judge(self, data: bytes) -> Request:
        """A head as a request, with its route and principal; Refusal unless
        it may be answered. All of it is decided before a byte of the body is
        read, and depends on nothing but these bytes: a client sends the same
        head again and again, and admit() remembers the judgement."""
        head = parse_head(data)
        fields = head.fields
        route, request_id = self.route(head)
        if route.who != "anyone":
            self.check_host(fields.host or "")
        if head.method == "POST":
            check_origin(fields, (f"http://{fields.host}", self.url))
        who = self.check_rights(route, fields)
        if head.method == "POST":
            wanted = (JSON, FORM) if route.who == "reviewer" else (JSON,)
            if fields.content_type not in wanted:
                raise Refusal("wrong-type", f"this is not {JSON}",
                              f"add -H 'Content-Type: {JSON}'")
            if fields.length is None:
                raise Refusal("length-required", "there is no Content-Length",
                              "send one")
        elif fields.length:
            raise bad_head("a GET has no body")
        if (fields.length or 0) > MAX_BODY:
            raise Refusal("too-large", f"the body is over {MAX_BODY} bytes",
                          "send less context")
        return head._replace(route=route, request_id=request_id, who=who)

    def route(self, request: Request) -> tuple[Route, str]:
        """The row of ROUTES for a path and method, and the request_id."""
        stem, _, name = request.path[1:].partition("/")
        methods = BY_PATH.get(("/" + stem if name else request.path,
                               bool(name)))
        if methods is None:
            raise Refusal("no-such-route", "there is no such route",
                          "see the README: POST /pending, "
                          "POST /approve/{request_id}, GET /")
        if request.method not in methods:
            raise Refusal("wrong-method", f"{request.method} is not for this "
                          "path", f"use {' or '.join(methods)}",
                          fields=f"Allow: {', '.join(methods)}\r\n")
        if "%" in name:
            from urllib.parse import unquote
            name = unquote(name)
        if name and not REQUEST_ID.fullmatch(name):
            raise Refusal("unknown", "this is no request_id",
                          "1 to 128 of A-Z a-z 0-9 . _ : -")
        return methods[request.method], name

    def check_host(self, host: str) -> None:
        """Refusal for a name that is not ours: DNS rebinding needs one
        (CVE-2025-49596)."""
        if not LOCAL_HOST.fullmatch(host) and (
                not self.public_host or host.lower() != self.public_host):
            raise Refusal(
                "wrong-host", f'this server is not "{visible(host[:200])}"',
                "if reviewers reach it by that name, put under [server] in "
                "checkpoints.toml: public_url = "
                f'"http://{visible(host[:80])}"')

    def check_rights(self, route: Route, fields: Fields) -> Principal:
        """Who asks, if the route belongs to that kind (promise 5)."""
        if route.who == "anyone":
            return NOBODY
        challenge = BEARER if route.who == "agent" else BASIC
        if fields.authorization is None:
            if route.who == "agent" and self.tokens.agent is None:
                return Principal("agent", "unauthenticated")
            raise Refusal("not-signed-in", f"this is for the {route.who}",
                          CURES[route.who], fields=challenge)
        who = identify(fields.authorization, self.tokens)
        if who is None:
            raise Refusal("wrong-credentials", "these credentials are not "
                          "known here", CURES[route.who], fields=SILENT if
                          fields.destination == "empty" else challenge)
        if who.kind != route.who:
            raise Refusal("not-your-route", f"this is for the {route.who}, "
                          f"and these are the {who.kind}'s credentials",
                          CURES[route.who])
        return who

    # ---- answers ----

    def dispatch(self, connection: Connection, request: Request,
                 body: bytes) -> None:
        """Run a route, inside a savepoint if it can change something; its
        answer waits for the commit."""
        import sqlite3
        connection.close_connection = request.close
        answer = getattr(self, request.route.answer)
        try:
            if request.method == "POST":
                data = self.store.attempt(self.answered, answer, request, body)
            else:
                data = self.answered(answer, request, connection)
        except sqlite3.Error as error:
            log.error("the database fails: %s", visible(str(error)))
            data = self.problem(request, STORAGE_FAILED)
        except Exception:
            log.exception("a fault of ours in %s", request.route.answer)
            data = self.problem(request, Refusal(
                "internal", "a fault of ours; nothing was changed",
                "the server's log has it"))
        if data is not None:
            self.answers.append((connection, request, data))

    def answered(self, answer: Callable[..., bytes | None], request: Request,
                 *more: Any) -> bytes | None:
        """A route's answer, a refusal being one; None: it is parked."""
        try:
            return answer(request, *more)
        except Refusal as refusal:
            return self.problem(request, refusal)

    def refuse(self, connection: Connection, head: bytes,
               refusal: Refusal) -> None:
        """Answer a request that is not admitted; wrong credentials slowly,
        but nobody is locked out: an agent could lock the reviewer out."""
        request = None
        with contextlib.suppress(Refusal):
            request = parse_head(head)
        data = self.problem(request, refusal, close=True)
        if head.startswith(b"HEAD "):
            data = data[:data.index(b"\r\n\r\n") + 4]
        if refusal.reason == "wrong-credentials":
            connection.held = data
            connection.until = self.instant + SLOW_SECONDS
        else:
            self.answers.append((connection, request, data))

    def problem(self, request: Request | None, refusal: Refusal,
                close: bool = False) -> bytes:
        """A refusal as problem+json (RFC 9457), or as a page for a person."""
        status = REFUSALS[refusal.reason]
        fields = refusal.fields
        if status in (429, 503):
            fields += "Retry-After: 5\r\n"
        close = close or request is None or request.close
        if request and "text/html" in request.fields.accept:
            page = problem_page(status, refusal)
            return self.message(status, HTML, page.encode(), close, fields)
        body: dict[str, Any] = {
            "type": "about:blank", "title": refusal.message, "status": status,
            "reason": refusal.reason,
            "detail": refusal.hint or refusal.message}
        if refusal.about:
            body["request"] = self.shape(refusal.about.summary)
        return self.message(status, PROBLEM, json.dumps(body).encode(), close,
                            fields)

    def message(self, status: int, content_type: str, body: bytes,
                close: bool, fields: str = "") -> bytes:
        """The one place that writes an answer's head."""
        second = int(self.store.time)
        if self.dated[0] != second:
            from email.utils import formatdate
            self.dated = (second, formatdate(second, usegmt=True))
        return (f"{status_line(status)}Date: {self.dated[1]}\r\n"
                f"Content-Type: {content_type}\r\n"
                f"Content-Length: {len(body)}\r\n{SECURITY}{fields}"
                f"{'Connection: close' if close else 'Connection: keep-alive'}"
                "\r\n\r\n").encode("latin-1", "replace") + body

    def shape(self, summary: Summary) -> dict[str, Any]:
        """The one shape of every reply about a request."""
        return summary._asdict() | {
            "url": f"{self.url}/review/{summary.request_id}"}

    def about(self, request: Request, summary: Summary, status: int = 200,
              fields: str = "") -> bytes:
        return self.message(status, JSON, self.shape_json(summary).encode(),
                            request.close, fields)

    def shape_json(self, summary: Summary) -> str:
        """shape() as JSON; written out, since every poll takes this way."""
        return "{%s, \"url\": %s}" % (", ".join(
            f'"{name}": {"null" if value is None else json_text(value)}'
            for name, value in zip(Summary._fields, summary)),
            json_text(f"{self.url}/review/{summary.request_id}"))

    def json(self, request: Request, value: Any) -> bytes:
        return self.message(200, JSON, json.dumps(value).encode(),
                            request.close)

    def html(self, request: Request, text: str) -> bytes:
        return self.message(200, HTML, text.encode(), request.close)

    # ---- the routes: an agent's ----

    def post_pending(self, request: Request, body: bytes) -> bytes:
        asked = asked_from(parse_object(body), request.who, self.store.time,
                           self.store.now)
        summary, new = self.store.submit(asked)
        if not new:
            return self.about(request, summary)
        return self.about(request, summary, 201,
                          f"Location: /review/{asked.request_id}\r\n")

    def get_pending(self, request: Request,
                    connection: Connection) -> bytes | None:
        summary = self.store.summary(request.request_id)
        text = parse_query(request.query).get("wait", "0")
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
            raise Refusal("bad-field", '"wait" is not a number of seconds',
                          "ask for ?wait=5")
        if summary.status == Status.WAITING:
            self.polled[request.request_id] = self.instant
            if wait := min(float(text), MAX_POLL_SECONDS):
                self.park(connection, request, wait)
                return None
        return self.about(request, summary)

    def post_claim(self, request: Request, body: bytes) -> bytes:
        asks = parse_object(body)
        return self.about(request, self.store.claim(
            request.request_id, text_field(asks, "digest", 64, True) or "",
            text_field(asks, "claim", MAX_NAME, True) or "",
            str(request.who)).summary)

    def post_outcome(self, request: Request, body: bytes) -> bytes:
        asks = parse_object(body)
        if asks.get("outcome") not in ("executed", "failed"):
            raise Refusal("bad-field", '"outcome" must be executed or failed',
                          'send {"claim": "...", "outcome": "executed"}')
        return self.about(request, self.store.finish(
            request.request_id, text_field(asks, "claim", MAX_NAME, True) or
            "", Outcome(asks["outcome"]),
            text_field(asks, "text", MAX_WHY) or "",
            str(request.who)).summary)

    def post_withdraw(self, request: Request, body: bytes) -> bytes:
        why = text_field(parse_object(body), "why", MAX_WHY) or ""
        return self.about(request, self.store.withdraw(
            request.request_id, why, str(request.who)).summary)

    # ---- the routes: a reviewer's ----

    def post_approve(self, request: Request, body: bytes) -> bytes:
        """A decision, as JSON or from a page's form, which leads home."""
        form = request.fields.content_type == FORM
        asks = parse_form(body) if form else parse_object(body)
        if asks.get("decision") not in ("approved", "rejected"):
            raise Refusal("bad-decision", '"decision" must be "approved" or '
                          '"rejected"', 'send {"decision": "approved"} or '
                          '{"decision": "rejected", "reason": "..."}')
        reason = text_field(asks, "reason", MAX_WHY)
        there = self.store.decide(
            request.request_id, Status(asks["decision"]), str(request.who),
            reason=(reason or "").strip() or None,
            signed_in=request.who.signed_in,
            shown_at=text_field(asks, "shown_at", 40))
        if form and "text/html" in request.fields.accept:
            return self.message(303, HTML, b"", request.close,
                                "Location: /\r\n")
        return self.about(request, there.summary)

    def get_waiting(self, request: Request, _: Connection) -> bytes:
        """Everything that waits, in the order of the page."""
        return self.json(request, {"waiting": [
            self.listed(there) for there in self.store.waiting(MAX_WAITING)]})

    def listed(self, there: ReviewRequest) -> dict[str, Any]:
        return self.shape(there.summary) | {
            "action_description": there.action_description,
            "tool": there.tool, "arguments": stored_json(there.arguments),
            "agent": there.agent, "checkpoint_id": there.checkpoint_id,
            "large": there.size > LARGE_BYTES}      # then its url has it all

    def get_desk(self, request: Request, _: Connection) -> bytes:
        return self.html(request, desk_page(
            self.view(request), self.store.waiting(PAGE_CARDS),
            self.store.waiting_count, self.store.reviewed(REVIEWED_CARDS)))

    def get_review(self, request: Request, _: Connection) -> bytes:
        there = self.store.request(request.request_id)
        if "application/json" not in request.fields.accept:
            return self.html(request, review_page(self.view(request), there))
        return self.json(request, there._asdict() | self.listed(there) | {
            "agent_context": stored_json(there.agent_context), "claim": None,
            "attended": self.attended(there.request_id)})

    def get_history(self, request: Request, _: Connection) -> bytes:
        behind = re.fullmatch("([0-9TZ:.-]{24})_([0-9]{1,18})", parse_query(
            request.query).get("before", ""))
        rows = self.store.reviewed(HISTORY_ROWS, *(
            [(behind[1], int(behind[2]))] if behind else []))
        if "application/json" not in request.fields.accept:
            return self.html(request, history_page(self.view(request), rows))
        return self.json(request, {"reviewed": list(map(self.listed, rows))})

    def view(self, request: Request) -> View:
        return View(request.who.name, self.store.time, self.attended)

    def get_healthz(self, request: Request, _: Connection) -> bytes:
        self.store.reviewed(0)          # the database answers, or 503
        return self.json(request, {"status": "ok"})


def open_desk(host: str, port: int, store: Store, tokens: Tokens,
              public_url: str = "",
              say: Callable[[str], None] | None = None) -> Desk:
    """A desk that listens; OSError if the port is taken. http.server is
    imported here, because a gate does not need it: HTTPServer owns the
    socket, BaseHTTPRequestHandler's class is the handler of a connection."""
    from http.server import BaseHTTPRequestHandler, HTTPServer
    handler = type("Handler", (Connection, BaseHTTPRequestHandler), {})
    server: Any = type("Server", (Desk, HTTPServer), {})
    desk: Desk = server((host, port), handler, store, tokens, public_url, say)
    return desk


# ================================== Client =================================
# How another process talks to the server, and the only outgoing requests to
# it. urllib.request, without proxies (the environment could route approvals
# through a stranger), without redirects, with a bounded answer in a bounded
# time: whatever answers instead of the server is an UnreachableError.

MAX_REPLY = 64 << 20            # bytes: `list` of a full desk is the largest


class Reply(NamedTuple):
    status: int
    body: dict[str, Any]

    @property
    def reason(self) -> str:
        return str(self.body.get("reason") or f"http-{self.status}")


class Client:
    """One server, and the credentials to use there."""

    def __init__(self, server_url: str, authorization: str = "") -> None:
        self.server_url, self.authorization = server_url, authorization

    def fetch(self, method: str, path: str, data: bytes | None = None, *,
              seconds: float, **headers: str) -> tuple[int, Any, bytes]:
        """One request -> status, headers and body; UnreachableError if
        nothing whole comes back. `seconds` bounds connecting, sending and
        all of the answer each. A header's name is written with _ for -."""
        import http.client
        import urllib.request
        fields = {"User-Agent": f"hitl.py/{__version__}", **{
            name.replace("_", "-"): value for name, value in headers.items()}}
        if self.authorization:
            fields["Authorization"] = self.authorization
        try:
            with opener().open(urllib.request.Request(
                    self.server_url + path, data, fields, method=method),
                    timeout=seconds) as reply:
                text = reply.read(MAX_REPLY + 1)
                if len(text) <= MAX_REPLY and (reply.length or (
                        not reply.chunked and reply.length is None)):
                    raise http.client.IncompleteRead(b"")
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = getattr(error, "reason", error)
            if isinstance(error, ValueError):   # it could quote the token
                why = "the request could not be written"
            elif isinstance(error, http.client.HTTPException):
                why = f"the answer is cut short ({type(error).__name__})"
            raise UnreachableError(
                f"no answer from {self.server_url}: {visible(str(why))}",
                "is it running? `python3 hitl.py serve` starts it; "
                "server_url or HITL_SERVER_URL says where it is") from None
        if len(text) > MAX_REPLY:
            raise self.nonsense("without end")
        return reply.status, reply.headers, text

    def exchange(self, method: str, path: str, body: Any = None, *,
                 seconds: float) -> Reply:
        """One request and its JSON answer; UnreachableError for anything
        else that comes back."""
        data = None if body is None else READABLE.encode(body).encode()
        status, headers, text = self.fetch(
            method, path, data, seconds=seconds, Accept="application/json",
            Content_Type="application/json")
        kind = headers.get_content_type()
        if status // 100 == 3:
            raise self.nonsense(f"a redirect ({status})")
        if kind not in ("application/json", "application/problem+json"):
            if status >= 500:           # a proxy, whose server is away
                raise UnreachableError(
                    f"no answer from {self.server_url}: {status} from what "
                    "stands between", "is hitl.py's server running?")
            raise self.nonsense(f"{status} with {visible(kind)}, not JSON")
        try:
            value = parse_json(text)
        except ValueError:
            raise self.nonsense("JSON that is not valid") from None
        if not isinstance(value, dict):
            raise self.nonsense("JSON that is not an object")
        return Reply(status, value)

    def nonsense(self, what: str) -> UnreachableError:
        return UnreachableError(
            f"{self.server_url} answers {what}",
            "this is not hitl.py's server, or something stands between: "
            "check server_url", reason="bad-reply")


@functools.cache
def opener() -> Any:
    """urllib's opener, as above. A socket's own time-out is for each read,
    and a server that sends a byte a second would hold a call for ever; so
    every read gets only what is left of the whole."""
    import http.client
    import io
    import urllib.request

    class Bounded(io.RawIOBase):
        def __init__(self, sock: Any, file: Any) -> None:
            self.sock, self.file = sock, file
            self.end = time.monotonic() + (sock.gettimeout() or 60)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            left = self.end - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            self.sock.settimeout(left)
            return int(self.sock.recv_into(buffer))

        def close(self) -> None:
            super().close()
            self.file.close()           # which holds the socket open

    class Response(http.client.HTTPResponse):
        def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(sock, *args, **kwargs)
            self.fp = io.BufferedReader(Bounded(sock, self.fp), 1 << 16)

    class Handler(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
        def do_open(self, http_class: Any, req: Any, **more: Any) -> Any:
            kind: Any = type("Connection", (http_class,), {
                "response_class": Response})
            return super().do_open(kind, req, **more)

    made = urllib.request.OpenerDirector()      # no proxies, no redirects,
    made.add_handler(Handler())                 # no file:, and an error's
    return made                                 # answer is an answer


# =================================== Gate ==================================
# The agent's side: it holds a tool call until a person has decided. Gate.call
# is the story; everything below serves one of its six steps. The only normal
# return from the first four is a claim whose id and digest match (promise 1);
# there is no option that lets a call through when something fails.

UNREACHABLE_SECONDS = 10        # a server that is down when first asked
CLAIM_RETRY_SECONDS = 30        # for a claim whose reply was lost
GRACE_SECONDS = 5               # of the network, beyond a poll's own wait
PROGRESS_SECONDS = 15           # between lines that say what is waited for
CUT_BYTES = 160 * 1024          # of each end of a context that is too large
CONTEXT_DEPTH = 24              # levels of a context; deeper is left out
CONTEXT_NODES = 200_000         # values of a context; more are left out



@dataclass(slots=True)
class Held:
    """A tool call on its way through the gate."""

    tool: str
    arguments: str              # canonical JSON: what is asked, and what runs
    checkpoint: Checkpoint
    description: str
    request_id: str
    timeout_seconds: float
    lifetime_seconds: float
    body: dict[str, Any]
    deadline: float             # on the monotonic clock
    digest: str
    claim: str                  # a nonce: the same claim may be retried
    cancelled: bool = False
    tick: Callable[[], None] = lambda: None     # called while it waits

    def approved(self) -> dict[str, Any]:
        """The arguments, parsed from the bytes that were digested, stored
        and shown: what runs is what was approved (promise 2)."""
        arguments: dict[str, Any] = parse_json(self.arguments)
        return arguments


class How(TypedDict, total=False):
    """What one call may say for itself, over the configuration."""

    context: Any
    request_id: str | None
    timeout_seconds: float | None
    checkpoint: str | None      # one that holds it, whatever the name


class Gate:
    """Makes tool calls that match a checkpoint wait for a person.

    config: path of checkpoints.toml (default: HITL_CONFIG, then
    ./checkpoints.toml, then the one beside this file). context: the agent's
    state for the reviewer, or a callable that gives it. on_reject: "raise",
    or "return" to hand a rejection, a denial or an expiry to the model as
    text. agent: the name on the card. Raises ConfigError.
    """

    def __init__(self, config: str | os.PathLike[str] | None = None, *,
                 context: Any = None, on_reject: str = "raise",
                 agent: str | None = None, server_url: str | None = None,
                 token: str | None = None) -> None:
        if on_reject not in ("raise", "return"):
            raise ConfigError(f'on_reject is "{on_reject}"',
                              'it can be "raise" or "return"')
        self.configuration = load_configuration(find_configuration(config))
        self.context, self.on_reject, self.agent = context, on_reject, agent
        with config_error("server_url"):
            self.server_url = url_value(
                server_url or os.environ.get("HITL_SERVER_URL")
                or self.configuration.gate["server_url"])
        self.token = (token or os.environ.get("HITL_AGENT_TOKEN", "")).strip()
        if not re.fullmatch(r"[!-~]*", self.token):
            raise ConfigError("the agent's token is not plain ASCII")
        self.client = Client(self.server_url, self.token and
                             f"Bearer {self.token}")
        self._free: set[str] = set()    # names no checkpoint can stop

    # ---- the story ----

    def call(self, tool: str, arguments: Mapping[str, Any],
             execute: Callable[..., T], **how: Unpack[How]) -> T:
        """execute(**arguments), after a person approved where a checkpoint
        matches. Raises CollaborationError, ReviewTimeoutError or another
        HitlError, and then nothing ran; what execute raises passes through.
        """
        if tool in self._free and how.get("checkpoint") is None:
            return execute(**arguments)
        if is_async(execute):
            raise TypeError(f"{visible(str(tool))} is async: await "
                            "gate.acall(...), or nothing would run in here")
        try:
            held = self._match(tool, arguments, **how)              # 1 match
            if held is not None:
                with self._withdrawing(held):
                    state = self._ask(held)                         # 2 ask
                    state = self._wait(held, state)                 # 3 wait
                    self._claim(held, state)                        # 4 claim
        except HitlError as error:
            return self._end(error)  # type: ignore[no-any-return]
        if held is None:
            return execute(**arguments)
        try:
            result = execute(**held.approved())                     # 5 run
        except BaseException as error:
            self._report(held, error)
            raise
        self._report(held, None)                                    # 6 report
        return result

    @overload
    async def acall(self, tool: str, arguments: Mapping[str, Any],
                    execute: Callable[..., Coroutine[Any, Any, T]],
                    **how: Unpack[How]) -> T: ...

    @overload
    async def acall(self, tool: str, arguments: Mapping[str, Any],
                    execute: Callable[..., T], **how: Unpack[How]) -> T: ...

    async def acall(self, tool: str, arguments: Mapping[str, Any],
                    execute: Callable[..., Any], **how: Unpack[How]) -> Any:
        """The same for asyncio: waits on a thread of its own, so the event
        loop goes on; a cancelled wait withdraws its request."""
        if tool in self._free and how.get("checkpoint") is None:
            return await awaited(execute(**arguments))
        try:
            held = self._match(tool, arguments, **how)
            if held is not None:
                await self._aobtain(held)
        except HitlError as error:
            return self._end(error)
        if held is None:
            return await awaited(execute(**arguments))
        try:
            result = await awaited(execute(**held.approved()))
        except BaseException as error:
            await in_thread(self._report, held, error)
            raise
        await in_thread(self._report, held, None)
        return result

    def require(self, tool: str, arguments: Mapping[str, Any],
                **how: Unpack[How]) -> dict[str, Any]:
        """The approved arguments, claimed, for middleware that runs the tool
        itself. Raises as call() does, whatever on_reject says: there is no
        result that could carry a refusal. The outcome stays `running`."""
        try:
            held = self._match(tool, arguments, **how)
            if held is None:
                return dict(arguments)
            self._obtain(held)
        except HitlError as error:
            raise logged(error)
        return held.approved()

    async def arequire(self, tool: str, arguments: Mapping[str, Any],
                       **how: Unpack[How]) -> dict[str, Any]:
        """require() for asyncio."""
        try:
            held = self._match(tool, arguments, **how)
            if held is None:
                return dict(arguments)
            await self._aobtain(held)
        except HitlError as error:
            raise logged(error)
        return held.approved()

    def _obtain(self, held: Held) -> str:
        """Steps 2 to 4 -> who approved; returns only with the approval
        claimed."""
        with self._withdrawing(held):
            return self._claim(held, self._wait(held, self._ask(held)))

    async def _aobtain(self, held: Held) -> None:
        import asyncio
        try:
            with sigterm_as_exit():     # this thread may be the main one
                await in_thread(self._obtain, held)
        except asyncio.CancelledError:
            held.cancelled = True
            await in_thread(self._withdraw, held, "cancelled")
            raise

    def _end(self, error: HitlError) -> Any:
        """How a refusal reaches the caller: raised, so that it propagates,
        or as text for a model whose framework swallows exceptions."""
        logged(error)
        told = type(error) in (CollaborationError, DeniedError,
                               ReviewTimeoutError)
        if self.on_reject == "return" and told:
            return (f"{error.message}. The call did not run. Do not retry it "
                    "or rephrase it; tell the user, or do something else.")
        raise error

    # ---- 1 match ----

    def _match(self, tool: str, arguments: Mapping[str, Any], *,
               context: Any = None, request_id: str | None = None,
               timeout_seconds: float | None = None,
               checkpoint: str | None = None) -> Held | None:
        """The call held by a checkpoint, or None: it may run."""
        rules = self.configuration
        check_call(tool, arguments, request_id)
        if checkpoint is not None:
            match = Match(rules.named(checkpoint), "the code names it")
        else:
            candidates = rules.candidates(tool)
            if len(candidates) == 1 and candidates[0].effect == "allow":
                if len(self._free) < 10_000:    # names can be made up
                    self._free.add(tool)
                return None
            match = rules.first_match(tool, arguments)
            if match.effect == "allow":
                return None
        rule = match.checkpoint
        if rule.effect == "deny":
            raise DeniedError(
                f'denied by checkpoint "{rule.checkpoint_id}"; nobody was '
                "asked and nothing ran", f"{match.why}, in {rules.path}")
        text = argument_text(tool, arguments)
        with config_error("timeout_seconds"):
            timeout = seconds_value(first_of(
                timeout_seconds, rule.timeout_seconds,
                rules.gate["timeout_seconds"]))
        lifetime = first_of(rule.lifetime_seconds,
                            rules.gate["lifetime_seconds"], timeout)
        description = describe(rule, tool, parse_json(text))
        if len(description.encode()) > MAX_DESCRIPTION:
            raise HitlError("the description of this call is over "
                            f"{MAX_DESCRIPTION} bytes",
                            "name fewer arguments in description_template",
                            reason="too-large")
        import secrets
        given = self.context if context is None else context
        digest = digest_of(description, text, tool)
        body = {
            "action_description": description, "tool": tool,
            "arguments": parse_json(text), "digest": digest,
            "agent_context": self._snapshot(
                given() if callable(given) else given),
            "timestamp": instant(time.time()),
            "checkpoint_id": rule.checkpoint_id, "category": rule.category,
            "why": match.why[:MAX_WHY // 4],
            "agent": cut(self.agent or agent_name(), MAX_NAME),
            "config_digest": rules.digest}
        return Held(tool, text, rule, description,
                    request_id or secrets.token_hex(16), timeout, lifetime,
                    body, time.monotonic() + timeout, digest,
                    secrets.token_hex(16))

    def _snapshot(self, context: Any) -> Any:
        """The context as JSON with secrets masked; both ends, with size and
        SHA-256, if it is too large to send."""
        plain = masked(context, self.token)
        data = READABLE.encode(plain).encode()
        if len(data) <= MAX_CONTEXT:
            return plain
        return {
            "note": f"This context is {len(data)} bytes, more than is sent. "
                    "Its beginning and its end stand here.",
            "sha256": hashlib.sha256(data).hexdigest(),
            "beginning": data[:CUT_BYTES].decode(errors="ignore"),
            "end": data[-CUT_BYTES:].decode(errors="ignore")}

    # ---- 2 ask ----

    def _ask(self, held: Held) -> Summary:
        """Post the request -> its state: waiting, or what was decided when
        the same request_id was asked before."""
        give_up = time.monotonic() + min(UNREACHABLE_SECONDS,
                                         held.timeout_seconds)
        lifetime = None if held.lifetime_seconds == math.inf else (
            held.lifetime_seconds)
        reply = self._insist("POST", "/pending", held, {
            **held.body, "request_id": held.request_id,
            "timeout_seconds": lifetime}, give_up)
        if reply.status not in (200, 201):
            raise self._refused(held, reply)
        state = self._state(held, reply)
        if state.status == Status.WAITING:
            log.warning(
                '%s waits for a person: "%s"; review it at %s (%s)',
                visible(held.tool), visible(held.description),
                visible(str(reply.body.get("url"))), "for ever" if
                held.timeout_seconds == math.inf else
                f"{held.timeout_seconds:g} s")
        return state

    def _insist(self, method: str, path: str, held: Held, body: Any,
                give_up: float) -> Reply:
        """An exchange, repeated until it is answered or time is up."""
        pause = 0.05
        while True:
            left = max(0.1, give_up - time.monotonic())
            try:
                reply = self.client.exchange(
                    method, path, body, seconds=min(left, UNREACHABLE_SECONDS))
                if reply.status < 500:
                    return reply
                error = self._refused(held, reply)
            except UnreachableError as unreachable:
                error = unreachable
            if (error.reason == "bad-reply" or held.cancelled
                    or time.monotonic() + pause >= give_up):
                raise error
            if pause == 0.8:            # about a second has passed
                log.warning("%s; trying again", error.message)
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def _state(self, held: Held, reply: Reply) -> Summary:
        """What a reply says of this very request, else ChangedError."""
        body = reply.body
        if (body.get("request_id") != held.request_id
                or body.get("digest") != held.digest):
            raise ChangedError("the server's reply is about another call; "
                               "nothing ran", "is server_url the right one?",
                               request_id=held.request_id)
        state = Summary._make(body.get(name) for name in Summary._fields)
        if not all(value is None or isinstance(value, str)
                   for value in state) or state.status not in set(
                Status) or state.outcome not in (None, *Outcome):
            raise self.client.nonsense("with fields that make no sense")
        return state

    def _refused(self, held: Held, reply: Reply) -> HitlError:
        """The error for an answer that is no success."""
        kind: type[HitlError] = {
            "already-claimed": AlreadyClaimedError,
            "lapsed": ReviewTimeoutError, "expired": ReviewTimeoutError,
            "id-taken": ChangedError, "bad-digest": ChangedError,
            "arguments-changed": ChangedError,
        }.get(reply.reason, UnreachableError if reply.status in
              (401, 403, 404, 421) or reply.status >= 500 else HitlError)
        return kind(f"the server refused: "
                    f"{visible(str(reply.body.get('title', reply.status)))}",
                    visible(str(reply.body.get("detail") or "is server_url "
                                "that of hitl.py's server?")),
                    reason=reply.reason, request_id=held.request_id)

    # ---- 3 wait ----

    def _wait(self, held: Held, state: Summary) -> Summary:
        """The state once it is no longer waiting: by long polls that the
        server answers the moment a person decides. A server that goes away
        is ridden out until the deadline."""
        said, away = time.monotonic(), 0.0
        while state.status == Status.WAITING:
            began = time.monotonic()
            left = held.deadline - began
            if left <= 0 or held.cancelled:
                return self._give_up(held)
            held.tick()
            wait = min(self.configuration.gate["poll_seconds"], left)
            try:
                reply = self.client.exchange(
                    "GET", f"/pending/{held.request_id}?wait={wait:.3f}",
                    seconds=wait + GRACE_SECONDS)
            except UnreachableError as error:
                reply = Reply(503, {"title": error.message})
            if reply.status == 200:
                state = self._state(held, reply)
                if state.status == Status.EXPIRED:
                    raise self._nobody(held)
            elif reply.status < 500:
                raise self._refused(held, reply)
            elif away < time.monotonic():
                away = time.monotonic() + PROGRESS_SECONDS
                log.warning("%s; still waiting",
                            visible(str(reply.body.get("title"))))
            if state.status == Status.WAITING and (
                    time.monotonic() - began < wait / 2):   # answered early
                time.sleep(max(0, min(0.5, left)))
            if time.monotonic() - said >= PROGRESS_SECONDS:
                said = time.monotonic()
                log.warning(
                    "waiting for review of %s at %s, %s left",
                    visible(held.tool),
                    f"{self.server_url}/review/{held.request_id}",
                    "any time" if left == math.inf else f"{left:.0f} s")
        return state

    def _nobody(self, held: Held, more: str = "") -> ReviewTimeoutError:
        seconds = min(held.timeout_seconds, held.lifetime_seconds)
        return ReviewTimeoutError(
            f'nobody decided "{visible(held.description)}" within '
            f"{seconds:g} s; nothing ran{more}", "raise timeout_seconds in "
            f"{self.configuration.path}: people usually need 300 or more",
            reason="still-waiting" if more else "",
            request_id=held.request_id)

    def _give_up(self, held: Held) -> Summary:
        """The end of a wait. Unless the request is to outlive it, it is
        withdrawn, and the answer decides: a reviewer may have been faster."""
        if held.lifetime_seconds > held.timeout_seconds and not held.cancelled:
            raise self._nobody(held, "; the request still waits, and the same "
                               "call with request_id "
                               f'"{held.request_id}" picks up its decision')
        state = self._withdraw(held, "cancelled" if held.cancelled
                               else "timeout")
        if state is None or state.status in (Status.WAITING, Status.EXPIRED):
            raise self._nobody(held)
        return state

    def _withdraw(self, held: Held, why: str) -> Summary | None:
        """Tell the server that nobody waits -> the state, None if it did
        not answer (then its own clock ends the request)."""
        try:
            return self._state(held, self._insist(
                "POST", f"/withdraw/{held.request_id}", held, {"why": why},
                time.monotonic() + 2))
        except HitlError:
            return None

    @contextlib.contextmanager
    def _withdrawing(self, held: Held) -> Iterator[None]:
        """Withdraw when the wait is broken off: Ctrl-C, SIGTERM, exit."""
        try:
            with sigterm_as_exit():
                yield
        except BaseException as error:
            if not isinstance(error, Exception):
                self._withdraw(held, "interrupted")
            raise

    # ---- 4 claim ----

    def _claim(self, held: Held, state: Summary) -> str:
        """Who approved, if this call, and no other, may run now (promise 3).
        """
        who = (state.decided_by or "").partition(":")[2]
        if state.status == Status.REJECTED:
            error = CollaborationError(
                f"rejected by {visible(who)}" + (
                    f": {visible(state.reason)}" if state.reason else ""),
                request_id=held.request_id)
            error.decided_at = state.decided_at or ""
            raise error
        if state.status != Status.APPROVED or state.outcome == Outcome.LAPSED:
            ended = state.outcome or state.status
            raise ReviewTimeoutError(
                f'"{visible(held.description)}" is {visible(ended)}; nothing '
                "ran", "ask anew with another request_id", reason=ended,
                request_id=held.request_id)
        if state.outcome is not None:
            raise AlreadyClaimedError(
                f"this approval was used already: the call is {state.outcome}",
                "ask anew with another request_id",
                request_id=held.request_id)
        reply = self._insist(
            "POST", f"/claim/{held.request_id}", held,
            {"digest": held.digest, "claim": held.claim},
            time.monotonic() + CLAIM_RETRY_SECONDS)
        if reply.status != 200:
            raise self._refused(held, reply)
        state = self._state(held, reply)
        if (state.status, state.outcome) != (Status.APPROVED,
                                             Outcome.RUNNING):
            raise ChangedError("the server's reply to the claim is no "
                               "approval; nothing ran",
                               "is server_url the right one?",
                               request_id=held.request_id)
        if held.cancelled:
            self._report(held, RuntimeError("cancelled before it ran"))
            raise CollaborationError("cancelled before it ran",
                                     reason="cancelled",
                                     request_id=held.request_id)
        log.warning("%s approved by %s: runs now", visible(held.tool),
                    visible(who))
        return visible(who)

    # ---- 6 report ----

    def _report(self, held: Held, error: BaseException | None) -> None:
        """Record what became of the call; a failure here changes nothing of
        the call, and is logged."""
        text = "" if error is None else type(error).__name__
        with contextlib.suppress(Exception):    # an error may have no words
            text += f": {error}" if error else ""
        text = cut(masked(text, self.token), 500)
        try:
            reply = self._insist(
                "POST", f"/outcome/{held.request_id}", held, {
                    "claim": held.claim, "text": text,
                    "outcome": "executed" if error is None else "failed"},
                time.monotonic() + 2)
            if reply.status != 200:
                raise self._refused(held, reply)
        except HitlError as fault:
            log.warning("the outcome of %s was not recorded: %s",
                        held.request_id, fault.message)

    # ---- the decorator ----

    @overload
    def guard(self, function: Callable[P, R]) -> Callable[P, R]: ...

    @overload
    def guard(self, *, checkpoint: str | None = None, name: str | None = None,
              hide: Iterable[str] = (), context: Any = None
              ) -> Callable[[Callable[P, R]], Callable[P, R]]: ...

    def guard(self, function: Any = None, *,
              checkpoint: str | None = None, name: str | None = None,
              hide: Iterable[str] = (), context: Any = None) -> Any:
        """A function whose calls go through the gate: def, async def,
        methods, callables; name, signature and types stay.

        checkpoint: the id of one that always holds it, whatever the name.
        hide: parameters that are not part of the action (a framework's ctx):
        passed on as they are and not shown; self and cls are hidden anyway.
        Raises TypeError for what cannot be guarded, ConfigError for a
        checkpoint that is not there.
        """
        if function is None:
            return functools.partial(self.guard, checkpoint=checkpoint,
                                     name=name, hide=hide, context=context)
        tool = name or tool_name(function)
        binder = Binder(function, hide)
        if checkpoint is not None:
            if self.configuration.named(checkpoint).effect == "allow":
                raise ConfigError(f'checkpoint "{checkpoint}" allows; guard '
                                  "needs one that reviews or denies")
        elif all(m.effect == "allow" for m in
                 self.configuration.candidates(tool)):
            log.warning("%s runs without review: no checkpoint matches",
                        visible(tool))

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if tool in self._free and checkpoint is None:
                return function(*args, **kwargs)
            arguments, run = binder.bind(args, kwargs)
            call: Any = self.acall if is_async(function) else self.call
            return call(tool, arguments, run, context=context,
                        checkpoint=checkpoint)

        async def async_wrapper(*args: Any, **kwargs: Any) -> Any:
            return await wrapper(*args, **kwargs)
        made: Any = async_wrapper if is_async(function) else wrapper
        functools.update_wrapper(made, function)
        made.__name__ = getattr(function, "__name__", tool)
        made.__signature__ = binder.signature
        kinds = {name: p.annotation for name, p in
                 binder.signature.parameters.items()}
        kinds["return"] = binder.signature.return_annotation
        made.__annotations__ = {name: kind for name, kind in kinds.items()
                                if kind is not inspect.Signature.empty}
        return made


class Binder:
    """A function's parameters, as the named arguments of a tool call.

    Every parameter goes by its name, defaults filled in; *args is a list
    under its own name, and what **kwargs takes stands beside the rest.
    """

    def __init__(self, function: Callable[..., Any],
                 hide: Iterable[str]) -> None:
        call = getattr(function, "__call__", function)
        made = hasattr(function, "name") and not hasattr(function, "__name__")
        if made or not callable(function) or isinstance(
                function, (type, staticmethod, classmethod)) or any(
                test(f) for f in (function, call) for test in (
                    inspect.isgeneratorfunction, inspect.isasyncgenfunction)):
            raise TypeError(
                f"guard cannot hold {function!r}: it takes a function, a "
                "method or a callable that is not a generator (a generator "
                "runs piece by piece, after the gate); put @gate.guard "
                "directly above def, below every other decorator")
        self.function = function
        self.signature = signature_of(function)
        parameters = list(self.signature.parameters.values())
        self.hidden = {hide} if isinstance(hide, str) else set(hide)
        unknown = self.hidden - {p.name for p in parameters}
        if unknown:
            raise TypeError(f"hide names no parameter of {function!r}: "
                            f"{', '.join(sorted(unknown))}")
        scope = getattr(function, "__qualname__", "").rpartition("<locals>.")
        if parameters and parameters[0].name in ("self", "cls") and (
                "." in scope[2]):               # a method, not a function
            self.hidden.add(parameters[0].name)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]
             ) -> tuple[dict[str, Any], Callable[..., Any]]:
        """The arguments to show, and a callable that runs the function with
        the approved ones. TypeError as the function itself would raise."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        named: dict[str, Any] = {}
        rest = ""                       # the name of **kwargs, if there is
        for name, value in bound.arguments.items():
            kind = self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                rest = name
            elif name not in self.hidden:
                named[name] = (list(value) if kind is
                               inspect.Parameter.VAR_POSITIONAL else value)
        extra = ({} if rest in self.hidden
                 else bound.arguments.get(rest, {}))
        if named.keys() & extra.keys():
            raise TypeError("an argument stands twice: "
                            f"{', '.join(named.keys() & extra.keys())}")

        enums = {name: type(value) for name, value in named.items()
                 if isinstance(value, enum.Enum)}   # shown by their values
        named |= {name: named[name].value for name in enums}

        def run(**approved: Any) -> Any:
            for name in named:
                value = approved[name]
                bound.arguments[name] = (
                    enums[name](value) if name in enums else tuple(value)
                    if self.signature.parameters[name].kind is
                    inspect.Parameter.VAR_POSITIONAL else value)
            if extra:
                bound.arguments[rest] = {k: approved[k] for k in extra}
            return self.function(*bound.args, **bound.kwargs)
        return named | extra, run


def tool_name(function: Any) -> str:
    """The name a checkpoint sees: a function's own, a partial's function's,
    a callable object's class."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def signature_of(function: Any) -> inspect.Signature:
    """The signature, its annotations evaluated where they can be: frameworks
    that ask for that do not look behind a __signature__."""
    for evaluate in (True, False):
        try:
            return inspect.signature(function, eval_str=evaluate)
        except (NameError, TypeError, AttributeError, SyntaxError):
            continue
        except ValueError as error:
            raise TypeError(f"guard cannot hold {function!r}: {error}"
                            ) from None
    raise TypeError(f"guard cannot hold {function!r}: it has no signature")


def is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or (
        inspect.iscoroutinefunction(getattr(function, "__call__", None)))


async def awaited(result: Awaitable[T] | T) -> T:
    return await result if inspect.isawaitable(result) else result


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """function(*args) on a daemon thread of its own: asyncio.to_thread's pool
    has cpu + 4 threads, and forty waits would queue (7 s against 1)."""
    import asyncio
    import contextvars
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    context = contextvars.copy_context()

    def settle(put: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            put(value)

    def run() -> None:
        put: Callable[[Any], None]
        value: Any
        try:
            put, value = future.set_result, context.run(function, *args)
        except BaseException as error:
            put, value = future.set_exception, error
        with contextlib.suppress(RuntimeError):     # the loop is closed
            loop.call_soon_threadsafe(settle, put, value)
    threading.Thread(target=run, name="hitl", daemon=True).start()
    return await future


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """While a call waits, SIGTERM ends the process through SystemExit, so
    that the request is withdrawn; only where nobody else handles it."""
    import signal
    global holding
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if not holding and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, exit_by_signal)
    holding += 1
    try:
        yield
    finally:
        holding -= 1
        ours = signal.getsignal(signal.SIGTERM) is exit_by_signal
        if ours and not holding:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


holding = 0         # calls that wait in the main thread


def exit_by_signal(number: int, frame: Any) -> NoReturn:
    sys.exit(128 + number)


def logged(error: HitlError) -> HitlError:
    """The error, once it stands in the log by its name and whole message."""
    log.error("%s: %s", type(error).__name__, error)
    return error


def cut(text: str, size: int) -> str:
    """The text, or its beginning, in so many bytes of UTF-8."""
    return text.encode("utf-8", "replace")[:size].decode(errors="ignore")


def check_call(tool: Any, arguments: Any, request_id: Any) -> None:
    """HitlError for a call that cannot even be named."""
    wrong = ("tool is no text" if not isinstance(tool, str) else
             "arguments are no mapping" if not isinstance(arguments, Mapping)
             else "request_id is not 1 to 128 of A-Za-z0-9._:-" if not (
                 request_id is None or isinstance(request_id, str)
                 and REQUEST_ID.fullmatch(request_id))
             else "tool has a lone surrogate in its name"
             if re.search("[\ud800-\udfff]", tool) else "")
    if wrong:
        raise HitlError(f"this call's {wrong}; nothing ran",
                        "call(tool, arguments, execute, request_id=str(...))",
                        reason="bad-arguments")


def first_of(*values: float | None) -> float:
    return next(v for v in values if v is not None)


def argument_text(tool: str, arguments: Mapping[str, Any]) -> str:
    """The arguments as canonical JSON, if reading that gives back an equal
    value of the same types; a tuple, an integer key or an enum would not."""
    wrong = {str(name): why for name, value in arguments.items()
             if (why := "its name is no text" if type(name) is not str
                 else not_json(name) or not_json(value))}
    if wrong:
        raise HitlError(
            f"{visible(tool)}: the arguments are not plain JSON: " + "; ".join(
                visible(f"{name}: {why}") for name, why in wrong.items()),
            "pass text, finite numbers, true, false, None, lists and objects "
            "(a model as its .model_dump(mode='json')); what is not part of "
            "the action can be left out by @gate.guard(hide=[...])",
            reason="bad-arguments")
    text = canonical(dict(arguments))
    if len(text) > MAX_ARGUMENTS:
        raise HitlError(
            f"{visible(tool)}: the arguments are {len(text)} bytes, over "
            f"{MAX_ARGUMENTS}", "pass a reference, such as a file's name and "
            "SHA-256: nobody can review so much", reason="too-large")
    return text


def not_json(value: Any) -> str:
    """Why a value does not survive the way through JSON, or ""."""
    try:        # two levels deeper, as it stands in the request
        back = parse_json(canonical([[value]]))[0][0]
    except (TypeError, ValueError, RecursionError) as error:
        return str(error)
    return "" if alike(value, back) else (
        f"a {type(value).__name__} changes on the way through JSON")


def alike(one: Any, two: Any) -> bool:
    """Equal, and of the very same types all through."""
    if type(one) is not type(two):
        return False
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(
            type(k) is str and alike(v, two[k]) for k, v in one.items())
    if isinstance(one, list):
        return len(one) == len(two) and all(map(alike, one, two))
    return bool(one == two)


def agent_name() -> str:
    """HITL_AGENT, or user@host:folder."""
    import getpass
    import platform
    name = os.environ.get("HITL_AGENT")
    if not name:
        user = folder = "?"
        with contextlib.suppress(OSError, KeyError, ImportError):
            user = getpass.getuser()
        with contextlib.suppress(OSError):
            folder = os.getcwd()
        name = f"{user}@{platform.node()}:{folder}"
    return name


# What looks like a secret leaves the process as its length only: a digest,
# or a few characters of it, would give a short code away in a second.
SECRET_WORDS = (r"passw|passphrase|pwd|secret|token|api[_-]?key|access[_-]?key"
                r"|private[_-]?key|authorization|credential|cookie|jwt|"
                r"session[_-]?id|bearer")
# (texts, not compiled: import hitl stays cheap, and re keeps what it compiled)
SECRET_NAME = rf"(?i){SECRET_WORDS}|^(pin|otp)$"
SECRET_SHAPE = (r"(?s)"
    r"\b(?:sk|pk|rk)[-_][\w-]{16,}|\bgh[pousr]_\w{20,}|\bgithub_pat_\w{20,}|"
    r"\bglpat-[\w-]{16,}|\bxox[a-z]-[\w-]{10,}|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|"
    r"\bAIza[\w-]{30,}|\bhf_\w{20,}|\bnpm_\w{20,}|\bpypi-[\w-]{20,}|"
    r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*|\bwhsec_[\w+/=]{16,}|"
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*KEY-----|\Z)|"
    r"(?<=://)[^\s/:@]*:[^\s/@]+(?=@)|"
    r"(?i:\b(?:bearer|basic)) +[\w.~+/-]{12,}=*")
# name = value in a text: a repr(), JSON inside a string, a shell line
SECRET_ASSIGNED = (
    rf"(?i)((?:{SECRET_WORDS})\w{{0,20}}[\\\"']*\s*[:=]\s*[\\\"']*)"
    r"((?<=\")[^\"]{3,}|(?<=')[^']{3,}|[^\s\\\"',;)}\]]{3,})")


def mask(text: str) -> str:
    return f"[masked, {len(text)} characters]"


def masked_text(text: str, own: str) -> str:
    """A text without what looks like a secret, or is this gate's token."""
    text = text.encode("utf-8", "backslashreplace").decode()
    if own and own in text:
        text = text.replace(own, mask(own))
    text = re.sub(SECRET_SHAPE, lambda found: mask(found[0]), text)
    return re.sub(SECRET_ASSIGNED, lambda found: found[0] if found[
        2].startswith("[masked") else found[1] + mask(found[2]), text)


def masked(value: Any, own: str = "", path: tuple[int, ...] = (),
           left: list[int] | None = None) -> Any:
    """A value as plain JSON, what looks like a secret masked. A dataclass
    becomes its fields, another object its repr(); what contains itself, or
    lies very deep or far, becomes words."""
    left = [CONTEXT_NODES] if left is None else left
    left[0] -= 1
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and type(value) in (int, float):
        return value if abs(value) < 1e300 else (
            repr(value) if isinstance(value, float) else "[a large int]")
    if isinstance(value, str):
        return masked_text(value, own)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name, None)
                 for f in dataclasses.fields(value)}
    elif not isinstance(value, (Mapping, list, tuple, set, frozenset)):
        try:
            return masked_text(repr(value), own)
        except Exception:
            return f"[a {type(value).__name__}]"
    if id(value) in path or len(path) > CONTEXT_DEPTH or left[0] < 0:
        return "[contains itself]" if id(value) in path else "[more]"
    path += (id(value),)
    if not isinstance(value, Mapping):
        return [masked(v, own, path, left) for v in value]
    return {masked_text(str(k), own): mask(str(v)) if v and v is not True and
            (found := re.search(SECRET_NAME, str(k))) and not (
                isinstance(v, int) and not found[1]) else
            masked(v, own, path, left) for k, v in value.items()}


# ================================= Adapters ================================
# Thin faces over the Gate for agents that cannot be changed: a hook that a
# coding agent runs before each tool, a proxy before an MCP server, a prefix
# before a command. Each fails closed in its agent's own way. What the agents
# send and accept was measured with the real clients, November 2026.

WHY = "{why}"                   # where an answer holds the explanation
HOOK_LIFETIME = 86_400          # a request outlives the hook that asked
REJECTED_SECONDS = 600          # a no stands so long; then it is asked anew


class Dialect(NamedTuple):
    """How one coding agent speaks to its hooks. A path is dotted."""

    tool: str                           # where the tool's name stands
    arguments: str
    session: str
    approved: dict[str, Any]            # what to answer, exactly
    rejected: dict[str, Any]
    seconds: float                      # it gives up after a bit more
    refuses: bool = False               # print `rejected` on an error, too
    status: int = 2                     # exit status on an error


def claude(**answer: Any) -> dict[str, Any]:
    return {"hookSpecificOutput": answer}


PRE, ASK = "PreToolUse", "PermissionRequest"
DENIED = claude(hookEventName=PRE, permissionDecision="deny",
                permissionDecisionReason=WHY)
FLAT = ("tool_name", "tool_input", "session_id")
DIALECTS = {
    "claude": Dialect(*FLAT, claude(
        hookEventName=PRE, permissionDecision="allow",
        permissionDecisionReason=WHY), DENIED, 590),
    # a plain allow is invalid in Codex: {} lets the call go on
    "codex": Dialect(*FLAT, {}, DENIED, 590),
    "permission": Dialect(
        *FLAT, claude(hookEventName=ASK, decision={"behavior": "allow"}),
        claude(hookEventName=ASK, decision={"behavior": "deny",
                                            "message": WHY}), 590),
    "gemini": Dialect(*FLAT, {"decision": "allow"},
                      {"decision": "deny", "reason": WHY}, 55),
    "copilot": Dialect(
        "toolName", "toolArgs", "sessionId", {"permissionDecision": "allow"},
        {"permissionDecision": "deny", "permissionDecisionReason": WHY}, 25,
        True),
    "copilot-pascal": Dialect(*FLAT, claude(    # Claude's names, 30 s
        hookEventName=PRE, permissionDecision="allow",
        permissionDecisionReason=WHY), DENIED, 25, True),
    "copilot-permission": Dialect(
        "toolName", "toolArgs", "sessionId", {"behavior": "allow"},
        {"behavior": "deny", "message": WHY, "interrupt": False}, 25, True),
    "cline": Dialect(                   # exit codes are ignored there
        "tool_call.name", "tool_call.input", "taskId", {"cancel": False},
        {"cancel": True, "errorMessage": WHY}, 55, True, 0),
    "cursor": Dialect(
        "tool_name", "tool_input", "conversation_id",
        {"permission": "allow"}, {"permission": "deny", "user_message": WHY,
                                  "agent_message": WHY}, 55, True),
}


def dialect_of(data: Mapping[str, Any]) -> str:
    """Which dialect a hook's input is; HitlError if it is none."""
    event = data.get("hook_event_name", "")
    if "clineVersion" in data or "tool_call" in data or "preToolUse" in data:
        return "cline"
    if "cursor_version" in data or event in ("beforeShellExecution",
                                             "beforeMCPExecution"):
        return "cursor"
    if data.get("hookName") == "permissionRequest":
        return "copilot-permission"
    if event == PRE:
        return ("codex" if "turn_id" in data else "claude"
                if "transcript_path" in data else "copilot-pascal")
    if event == ASK:
        return ("permission" if "transcript_path" in data
                else "copilot-permission")
    if event == "BeforeTool":
        return "gemini"
    if "toolName" in data:
        return "copilot"
    raise HitlError("this is no coding agent's call that I know",
                    "`hitl.py hook --snippet AGENT` says how to install it",
                    reason="bad-hook")


def inside(data: Any, path: str) -> Any:
    """The value at a dotted path, or None."""
    for part in path.split("."):
        data = data.get(part) if isinstance(data, Mapping) else None
    return data


def proposed(name: str, data: Mapping[str, Any]
             ) -> tuple[str, dict[str, Any]]:
    """The tool call a hook's input proposes; HitlError without a name."""
    dialect = DIALECTS[name]
    tool, arguments = (inside(data, path) for path in dialect[:2])
    if name == "cline" and tool is None:
        tool = inside(data, "preToolUse.toolName")
        arguments = inside(data, "preToolUse.parameters")
    if name == "copilot-permission" and tool is None:
        tool, arguments = data.get("tool_name"), data.get("tool_input")
    if name == "cursor" and tool is None and "command" in data:
        tool, arguments = "shell", {"command": data["command"]}
    if isinstance(arguments, str):      # JSON inside JSON, or plain text
        with contextlib.suppress(ValueError):
            arguments = parse_json(arguments)
    if not isinstance(tool, str) or not tool:
        raise HitlError("the call names no tool", reason="bad-hook")
    return tool, arguments if isinstance(arguments, dict) else (
        {} if arguments is None else {"input": arguments})


def with_why(answer: Any, why: str) -> Any:
    """An answer of DIALECTS with the explanation filled in."""
    if isinstance(answer, dict):
        return {k: with_why(v, why) for k, v in answer.items()}
    return why if answer == WHY else answer


def hook(data: bytes, config: Path | None, seconds: float | None
         ) -> tuple[dict[str, Any] | None, int, str]:
    """One hook call -> what to print (None: nothing), the exit status, and
    words for stderr. Whatever goes wrong is that dialect's refusal."""
    dialect = None
    try:
        try:
            call = parse_json(data)
        except ValueError:
            call = None
        if not isinstance(call, dict):
            raise HitlError("the input is not a JSON object",
                            "a coding agent runs this; `hitl.py hook "
                            "--snippet AGENT` says how to install it")
        name = dialect_of(call)
        dialect = DIALECTS[name]
        tool, arguments = proposed(name, call)
        gate = Gate(find_configuration(config, local=False), context=call,
                    agent=hook_agent(name, call))
        why = decide_hook(gate, tool, arguments,
                          str(inside(call, dialect.session) or [
                              call.get("cwd"), call.get("transcript_path")]),
                          seconds or dialect.seconds)
        if why is None:
            return {}, 0, ""            # no opinion: its own flow goes on
        return with_why(dialect.approved, why), 0, ""
    except (CollaborationError, ReviewTimeoutError) as error:
        told = isinstance(error, (DeniedError, ReviewTimeoutError)) or (
            type(error) is CollaborationError)
        why = f"{error.message}. Do not retry or rephrase it; tell the user."
        if error.reason == "still-waiting":
            why = (f"{error.message.partition('; the request')[0]}; the "
                   "request still waits. Repeat this very call later to pick "
                   "up the decision.")
        if told and dialect:
            return with_why(dialect.rejected, why), 0, ""
        fault: BaseException = error
    except BaseException as error:      # a signal, or a fault of ours
        fault = error
    words = visible(f"hitl: refused: {type(fault).__name__}: {fault}")
    if dialect and dialect.refuses:
        return with_why(dialect.rejected, words), dialect.status, words
    return None, 2, words


def decide_hook(gate: Gate, tool: str, arguments: dict[str, Any],
                session: str, seconds: float) -> str | None:
    """Who approved this call, None if nothing matches; raises as the gate
    does. The request_id is a digest of session and call with a number: the
    first that is free or alive counts, so a repeat attaches to what waits,
    claims what is approved, and is told at once what was just rejected; one
    that is spent or expired makes room for a new asking."""
    held = gate._match(tool, arguments, timeout_seconds=seconds)
    if held is None:
        return None
    limit = min(seconds, held.checkpoint.timeout_seconds or math.inf)
    held.timeout_seconds = limit
    held.lifetime_seconds = max(first_of(
        held.checkpoint.lifetime_seconds,
        gate.configuration.gate["lifetime_seconds"], HOOK_LIFETIME), limit + 1)
    key = hashlib.sha256(f"{session}\n{held.digest}".encode()).hexdigest()[:32]
    began = time.monotonic()
    for number in range(1, 1000):
        held.request_id = f"{key}-{number}"
        held.deadline = began + limit
        try:
            return f"approved by {gate._obtain(held)}"
        except AlreadyClaimedError:
            continue
        except CollaborationError as error:
            if not "" < error.decided_at < instant(
                    time.time() - REJECTED_SECONDS):
                raise
        except ReviewTimeoutError as error:
            if error.reason not in (*Status, *Outcome):
                raise
            if time.monotonic() - began > limit - 1:
                raise
    raise AlreadyClaimedError("this call was approved a thousand times in "
                              "this session")


def hook_agent(name: str, call: Mapping[str, Any]) -> str:
    """The name on the card: agent, folder, session, sub-agent."""
    session = inside(call, DIALECTS[name].session)
    parts = [os.environ.get("HITL_AGENT") or name.partition("-")[0],
             call.get("cwd"), session and f"session {str(session)[:8]}"]
    parts += [f"{key} {call[key]}" for key in ("agent_type", "agent_id")
              if call.get(key)]
    return " ".join(str(part) for part in parts if part)[:MAX_NAME]


# What to install, and where. CMD is this Python and this file, for a shell.
SNIPPETS = {
    "claude": (".claude/settings.json", '{"hooks": {"PreToolUse": '
               '[{"matcher": "*", "hooks": [{"type": "command", "command": '
               'CMD, "timeout": 86400, "onFailure": "block", '
               '"statusMessage": "waiting for human approval"}]}]}}'),
    "codex": (".codex/hooks.json (then trust it once with /hooks: untrusted "
              "hooks are silently skipped)",
              '{"hooks": {"PreToolUse": [{"matcher": "*", "hooks": [{"type": '
              '"command", "command": CMD, "timeout": 86400}]}]}}'),
    "gemini": ("~/.gemini/settings.json (timeout is in milliseconds)",
               '{"hooks": {"BeforeTool": [{"matcher": ".*", "hooks": '
               '[{"name": "hitl", "type": "command", "command": CMD, '
               '"timeout": 86400000}]}]}}'),
    "copilot": (".github/hooks/hitl.json", '{"version": 1, "hooks": '
                '{"PreToolUse": [{"type": "command", "bash": CMD, '
                '"timeoutSec": 86400}]}}'),
    "cursor": (".cursor/hooks.json", '{"version": 1, "hooks": '
               '{"beforeShellExecution": [{"command": CMD, "timeout": 86400, '
               '"failClosed": true}], "beforeMCPExecution": [{"command": CMD, '
               '"timeout": 86400, "failClosed": true}]}}'),
    "cline": (".clinerules/hooks/PreToolUse (make it executable)",
              "#!/bin/sh\nCMD\n"),
    "opencode": (".opencode/plugin/hitl.js", """\
export const Hitl = async () => ({
  "tool.execute.before": async (input, output) => {
    const call = {hook_event_name: "PreToolUse", session_id: input.sessionID,
                  transcript_path: "", tool_name: input.tool,
                  tool_input: output.args}
    const run = Bun.spawn(["/bin/sh", "-c", CMD],
      {stdin: new Blob([JSON.stringify(call)]), stdout: "pipe"})
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
"""),
}


def hook_command(agent: str) -> str:
    """The line an agent is to run; an agent that ignores exit codes gets a
    refusal to print."""
    import shlex
    line = shlex.join([sys.executable, str(Path(__file__).absolute()), "hook",
                       "--deadline", "86000"])
    if agent == "cline":
        return line + (""" || echo '{"cancel":true,"errorMessage":"hitl """
                       """unavailable"}'""")
    return f"{line} || exit 2"


def snippet(agent: str) -> tuple[str, str]:
    """Where to install, and the text to put there."""
    where, text = SNIPPETS[agent]
    command = hook_command(agent)
    if agent == "cline":
        return where, text.replace("CMD", command)
    text = text.replace("CMD", json.dumps(command))
    if agent == "opencode":
        return where, text
    return where, json.dumps(json.loads(text), indent=2)


def installed_lines(agent: str) -> Iterator[tuple[Path, str, str]]:
    """The lines that run this in an agent's settings, here or at home, each
    with what is wrong in the settings around it."""
    name = SNIPPETS[agent][0].partition(" (")[0].removeprefix("~/")
    if agent == "opencode":
        return                          # JavaScript: not ours to run
    for path in (folder / name for folder in (Path.cwd(), Path.home())):
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        if agent == "cline":
            yield path, text, ""
            continue
        try:
            root = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{path}: not plain JSON: {error}") from None
        off = "hooks are switched off" * bool(inside(root, "disableAllHooks"))
        for settings, matcher in objects_in(root):
            for line in settings.values():
                if isinstance(line, str) and "hitl" in line and (
                        " hook" in line):
                    yield path, line, off or misfit(agent, settings, matcher)


def objects_in(value: Any, matcher: Any = "*"
               ) -> Iterator[tuple[dict[str, Any], Any]]:
    """Every JSON object inside, with the `matcher` it stands under."""
    if isinstance(value, dict):
        matcher = value.get("matcher", matcher)
        yield value, matcher
        value = list(value.values())
    for inner in value if isinstance(value, list) else ():
        yield from objects_in(inner, matcher)


# after how many seconds an agent gives up on a hook, if its settings say none
GIVES_UP = {"claude": 600, "codex": 600, "gemini": 60, "copilot": 30,
            "cursor": 60}


def misfit(agent: str, settings: dict[str, Any], matcher: Any) -> str:
    """Why these settings let calls pass although the line blocks, or ""."""
    given = settings.get("timeoutSec" if agent == "copilot" else "timeout")
    seconds = GIVES_UP[agent] if not isinstance(given, (int, float)) else (
        given / 1000 if agent == "gemini" else given)
    line = next(v for v in settings.values()
                if isinstance(v, str) and " hook" in v)
    deadline = re.search(r"--deadline[ =]([0-9.]+)", line)
    wanted = float(deadline[1]) if deadline else DIALECTS[
        agent if agent != "copilot" else "copilot-pascal"].seconds
    if seconds <= wanted:
        return (f"the agent gives up after {seconds:g} s, before the hook's "
                f"deadline of {wanted:g} s, and lets the call run")
    if matcher not in ("", "*", ".*"):
        return f"it is run for {matcher!r} only"
    return ""


SAMPLES: dict[str, dict[str, Any]] = {
    "claude": {"hook_event_name": PRE, "transcript_path": "t"},
    "codex": {"hook_event_name": PRE, "turn_id": "1"},
    "gemini": {"hook_event_name": "BeforeTool"},
    "copilot": {"hook_event_name": PRE},
    "cursor": {"cursor_version": "1"},
    "cline": {"clineVersion": "", "tool_call": {
        "name": "h\u00eftl_check", "input": {}}},
}


def blocks(agent: str, line: str) -> str:
    """Run an installed line on a sample call that always waits, with no
    server to ask -> "" if it blocks as its agent understands, or what it did.
    """
    import subprocess
    call = {"tool_name": "h\u00eftl_check", "tool_input": {},
            "session_id": "check", "cwd": str(Path.cwd()), **SAMPLES[agent]}
    dead = {**os.environ, "HITL_SERVER_URL": "http://127.0.0.1:9",
            "CLAUDE_PROJECT_DIR": str(Path.cwd())}
    done = subprocess.run(
        ["/bin/sh", "-c", line], input=json.dumps(call), text=True,
        capture_output=True, env=dead, timeout=60)
    if done.returncode == 2 and (not done.stdout or agent != "gemini"):
        return ""
    if agent == "cline" and '"cancel": true' in done.stdout.replace(
            '":true', '": true'):
        return ""
    return f"it exits {done.returncode} and prints {visible(done.stdout)!r}"


# ---- MCP: a proxy between a client and a server on stdio ----

MODERN = "io.modelcontextprotocol/protocolVersion"
RUNNERS = frozenset((
    "npx", "bunx", "uvx", "uv", "run", "node", "bun", "deno", "pnpm", "dlx",
    "exec", "env", "sh", "bash", "python", "python3", "tool", "npm", "yarn"))


def server_name(command: list[str]) -> str:
    """What an MCP server's command is called, for `mcp__NAME__tool`."""
    words = [Path(word).stem for word in command
             if not word.startswith("-") and "=" not in word]
    word = next((w for w in words if w not in RUNNERS), "server")
    return re.sub(r"[^A-Za-z0-9_-]", "_", word)


def lines_from(file: int) -> Iterator[bytes]:
    """The lines of a file descriptor; unbuffered, since a thread that waits
    inside a buffered stdin makes Python abort at exit."""
    rest = b""
    while data := os.read(file, 1 << 16):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line + b"\n"
    if rest:
        yield rest


class Proxy:
    """Bytes pass both ways as they are, but for tools/call: that waits on a
    thread of its own while everything else goes on."""

    def __init__(self, gate: Gate, command: list[str], name: str) -> None:
        import subprocess
        self.gate, self.name, self.command = gate, name, command
        self.child: Any = subprocess.Popen(command, stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE)
        self.to_client, self.to_server = threading.Lock(), threading.Lock()
        self.lock = threading.Lock()            # over the tables below
        self.held: dict[str, Held] = {}         # by the JSON-RPC id
        self.sent: dict[str, tuple[str, str]] = {}  # id -> method, call
        self.resumes: dict[tuple[str, str], int] = {}   # state, call
        self.seen: dict[str, Any] = {}          # what the server said of tools

    def run(self, source: int, sink: Any) -> int:
        """Serve until the client or the server ends -> the server's exit
        status."""
        self.sink = sink
        back = threading.Thread(target=self.pump_back)
        back.start()
        threading.Thread(target=self.pump_in, args=(source,),
                         daemon=True).start()
        try:
            back.join()
        except BaseException:               # a signal: leave no orphan
            self.child.terminate()
        status = self.end_child()
        with contextlib.suppress(OSError):
            self.child.stdin.close()
        for call in list(self.held.values()):   # nobody is there to run them
            call.cancelled = True
            self.gate._withdraw(call, "the MCP server ended")
        return 128 - status if status < 0 else status

    def pump_in(self, source: int) -> None:
        """Client to server, line by line."""
        for line in lines_from(source):
            try:
                self.from_client(line)
            except (BrokenPipeError, ValueError):   # the server is gone
                return
        for call in list(self.held.values()):
            self.cancel(call)
        with contextlib.suppress(OSError):
            self.child.stdin.close()
        self.end_child()

    def end_child(self) -> int:
        """Wait for the server; one that does not end by itself is ended ->
        its exit status."""
        import subprocess
        for stop in (self.child.terminate, self.child.kill):
            try:
                return int(self.child.wait(3))
            except subprocess.TimeoutExpired:
                stop()
        return int(self.child.wait())

    def pump_back(self) -> None:
        """Server to client; when it ends, open calls are answered."""
        for line in self.child.stdout:
            self.from_server(line)
            self.answer(line)
        with self.lock:
            open_ids = [*self.sent, *self.held]
            self.sent.clear()
        for key in open_ids:
            self.fault(-32000, "the MCP server ended", json.loads(key))

    def fault(self, code: int, words: str, key: Any = None) -> None:
        self.answer({"jsonrpc": "2.0", "id": key, "error": {
            "code": code, "message": words}})

    def answer(self, message: Any) -> None:
        line = message if isinstance(message, bytes) else (
            json.dumps(message) + "\n").encode()
        with self.to_client, contextlib.suppress(OSError, ValueError):
            self.sink.write(line)
            self.sink.flush()

    def forward(self, line: bytes) -> None:
        with self.to_server:
            self.child.stdin.write(line)
            self.child.stdin.flush()

    def from_client(self, line: bytes) -> None:
        try:
            message = parse_json(line)
            if b"\r" in line.rstrip(b"\r\n"):      # one line, or several?
                raise ValueError
        except ValueError:
            # what we cannot read strictly, a server might read as a call
            if b"call" in line or b"\\u" in line or b"\r" in line[:-2]:
                self.fault(-32700, "hitl: not strict JSON")
            else:
                self.forward(line)
            return
        if isinstance(message, list) and any(
                inside(m, "method") == "tools/call" for m in message):
            self.fault(-32600, "hitl: send calls one by one")
        elif inside(message, "method") == "tools/call":
            self.gated(message, line)
        elif inside(message, "method") == "notifications/cancelled":
            key = canonical(inside(message, "params.requestId"))
            call = self.held.get(key)
            if call is None:
                self.forward(line)
            else:
                self.cancel(call)
        else:
            self.passes(message, line)

    def passes(self, message: Any, line: bytes, call: str = "") -> None:
        if isinstance(message, dict) and "id" in message and (
                "method" in message):
            with self.lock:
                self.sent[canonical(message["id"])] = (message["method"], call)
            if message["method"] == "initialize":
                self.seen["client"] = inside(message, "params.clientInfo")
        self.forward(line)

    def gated(self, message: dict[str, Any], line: bytes) -> None:
        """A tools/call: passes, is refused, or waits on its own thread."""
        params = message.get("params")
        params = params if isinstance(params, dict) else {}
        tool, arguments = params.get("name"), params.get("arguments") or {}
        call = canonical([tool, arguments])
        with self.lock:
            resumed = (str(params.get("requestState")), call)
            passes = self.resumes.get(resumed, 0) > 0
            if passes:                  # the rest of a call approved before
                self.resumes[resumed] -= 1
        if passes:
            return self.passes(message, line, call)
        key = canonical(message.get("id"))
        try:
            if not isinstance(tool, str) or not isinstance(arguments, dict):
                raise HitlError("this tools/call names no tool")
            held = self.gate._match(
                f"mcp__{self.name}__{tool}", arguments, context={
                    "MCP server": self.command,
                    "client": self.seen.get("client"),
                    "the server says of this tool (untrusted)":
                        self.seen.get(tool, "nothing")})
        except HitlError as error:
            return self.refuse(message, logged(error))
        if held is None:
            return self.passes(message, line)
        if "id" not in message:
            log.error("a tools/call without an id was dropped")
            return
        held.tick = self.progress(params)
        with self.lock:
            if key in self.held:        # cancel could not tell them apart
                return self.refuse(message, HitlError("this id waits already"))
            self.held[key] = held
        threading.Thread(target=self.wait, daemon=True,
                         args=(message, held, key, call)).start()

    def wait(self, message: dict[str, Any], held: Held, key: str,
             call: str) -> None:
        """Hold one call until a person decides, then send it or refuse."""
        try:
            self.gate._obtain(held)
        except HitlError as error:      # a cancelled call is never answered
            return None if held.cancelled else (
                self.refuse(message, logged(error)))
        finally:
            self.held.pop(key, None)
        if held.cancelled:
            return
        message["params"]["arguments"] = held.approved()    # promise 2
        try:
            self.passes(message, (json.dumps(message) + "\n").encode(), call)
        except (OSError, ValueError) as gone:
            self.gate._report(held, gone)
            return self.refuse(message, HitlError("the MCP server is gone"))
        self.gate._report(held, None)

    def cancel(self, held: Held) -> None:
        held.cancelled = True
        threading.Thread(target=self.gate._withdraw, args=(held, "cancelled"),
                         daemon=True).start()

    def refuse(self, message: dict[str, Any], error: HitlError) -> None:
        """A refusal as a tool's result: agents drop the reason of a JSON-RPC
        error."""
        text = f"{error.message}. Do not retry or rephrase it; tell the user."
        result: dict[str, Any] = {"content": [{"type": "text", "text": text}],
                                  "isError": True}
        meta = inside(message, "params._meta")
        if isinstance(meta, dict) and MODERN in meta:
            result["resultType"] = "complete"
        if "id" in message:
            self.answer({"jsonrpc": "2.0", "id": message["id"],
                         "result": result})

    def progress(self, params: dict[str, Any]) -> Callable[[], None]:
        """What tells the client, at each look at the status, that a person
        is being waited for; nothing if it did not ask to be told."""
        token = inside(params, "_meta.progressToken")
        count = iter(range(1, 1 << 62))

        def tick() -> None:
            self.answer({
                "jsonrpc": "2.0", "method": "notifications/progress",
                "params": {"progressToken": token, "progress": next(count),
                           "message": "waiting for a person's approval"}})
        return tick if isinstance(token, (str, int)) else lambda: None

    def from_server(self, line: bytes) -> None:
        """Note what passes by: answers, and what tools say of themselves."""
        try:
            message = parse_json(line)
        except ValueError:
            return
        if not isinstance(message, dict) or "id" not in message or (
                "method" in message):
            return
        with self.lock:
            method, call = self.sent.pop(canonical(message["id"]), ("", ""))
            state = inside(message, "result.requestState")
            if call and state is not None and inside(
                    message, "result.resultType") == "input_required":
                known = (str(state), call)
                self.resumes[known] = self.resumes.get(known, 0) + 1
        tools = inside(message, "result.tools")
        if method == "tools/list" and isinstance(tools, list):
            for tool in tools:
                self.seen[str(inside(tool, "name"))] = inside(
                    tool, "annotations")


# ---- a command behind a prefix ----

def run_command(gate: Gate, tool: str, argv: list[str],
                timeout: float | None) -> int:
    """Ask, then run exactly the approved argv, never through a shell -> its
    exit status, 128 + the signal that ended it. HitlError if it may not, or
    cannot, run."""
    import shutil
    path = shutil.which(argv[0])
    if path is None:
        raise HitlError(f"no such command: {visible(argv[0])}",
                        reason="no-such-command")
    call = {"argv": argv, "cwd": os.getcwd(),
            "executable": os.path.abspath(path)}
    match = gate.configuration.first_match(tool, call)
    unlisted = match.checkpoint.checkpoint_id == "unmatched"
    return gate.call(tool, call, execute, timeout_seconds=timeout,
                     checkpoint="unmatched" if unlisted else None)


def execute(argv: list[str], cwd: str, executable: str) -> int:
    """The command, with this process's streams, and its signals passed on."""
    import signal
    import subprocess
    child = subprocess.Popen(argv, executable=executable, cwd=cwd)
    passed = [getattr(signal, name) for name in (
        "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT", "SIGINT")
        if hasattr(signal, name)]
    before = {}
    try:
        for number in passed:
            before[number] = signal.signal(number, lambda n, _: None if (
                n in (signal.SIGINT, getattr(signal, "SIGQUIT", 0))
                and sys.stdin.isatty()) else child.send_signal(n))
        status = child.wait()           # Ctrl-C reaches it by itself
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - status if status < 0 else status


# ================================= Evidence ================================
# The whole path, for real: a desk on a free port, a database, the page, a
# gate, and a small agent whose tools work on a table of records in a scratch
# SQLite file (SQL, but not on the desk's file). `demo` lets a person decide;
# `verify` decides as the page's buttons would, compares what it sees with the
# guide's expectations and writes the evidence down.

SAMPLE_RULES = """\
[gate]
timeout_seconds = {timeout}

[[checkpoint]]
checkpoint_id = "delete-records"
action_pattern = "delete_*"
description_template = "Delete {{table}} where {{condition}}"
category = "destructive"
"""


class Workshop:
    """A desk in a thread, and an agent's tools on a table of records, all in
    a folder that is gone afterwards."""

    def __init__(self, timeout: float, port: int = 0,
                 say: Callable[[str], None] | None = None) -> None:
        import tempfile
        self.scratch = tempfile.TemporaryDirectory(prefix="hitl-")
        folder = Path(self.scratch.name)
        self.rules = folder / "checkpoints.toml"
        self.rules.write_text(SAMPLE_RULES.format(timeout=timeout))
        self.records, self.database = folder / "records.db", folder / "hitl.db"
        self.token = fresh_token()
        self.store = Store(self.database)
        tokens = Tokens(None, token_hash(self.token), {})
        try:
            self.desk = open_desk("127.0.0.1", port, self.store, tokens,
                                  say=say)
        except OSError:
            self.desk = open_desk("127.0.0.1", 0, self.store, tokens, say=say)
        self.thread = threading.Thread(target=self.desk.serve_forever)
        self.thread.start()
        self.waiting_id = ""            # of the request looked at last
        self.reset()

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *_: object) -> None:
        self.desk.stop()
        self.thread.join()
        self.store.close()
        self.scratch.cleanup()

    @property
    def link(self) -> str:
        return link_with(self.desk.url, self.token)

    def gate(self, agent: str, context: Any) -> Gate:
        return Gate(self.rules, server_url=self.desk.url, agent=agent,
                    context=context)

    def reviewer(self, name: str) -> Client:
        return Client(self.desk.url, basic(name, self.token))

    # ---- the agent's tools ----

    def reset(self) -> None:
        self.sql("DROP TABLE IF EXISTS users")
        self.sql("CREATE TABLE users (name TEXT, last_login TEXT)")
        self.sql("INSERT INTO users VALUES ('ana', '2026-05-01'), "
                 "('ben', '2019-05-01'), ('cleo', '2018-05-01')")

    def sql(self, text: str) -> Any:
        import sqlite3
        with contextlib.closing(sqlite3.connect(self.records)) as db, db:
            cursor = db.execute(text)
            return cursor.fetchall() if cursor.description else cursor.rowcount

    def read_records(self, table: str) -> Any:
        return self.sql(f"SELECT name, last_login FROM {table}")

    def delete_records(self, table: str, condition: str) -> Any:
        """What the sample agent wants; a real tool, which really deletes."""
        return self.sql(f"DELETE FROM {table} WHERE {condition}")


def basic(name: str, token: str) -> str:
    """An Authorization field for HTTP Basic (RFC 7617)."""
    import base64
    pair = f"{name}:{token}".encode()
    return f"Basic {base64.b64encode(pair).decode()}"


def link_with(url: str, token: str) -> str:
    return url.replace("://", f"://reviewer:{token}@", 1) + "/"


DELETE = {"table": "users", "condition": "last_login < '2020-01-01'"}


def demo(timeout: float, keys: Iterator[str],
         say: Callable[[str], None]) -> None:
    """A sample agent that wants to delete, a desk, and a person: you."""
    with Workshop(timeout, 8765) as shop:
        gate = shop.gate("demo agent", {
            "task": "remove users who have not logged in since 2020",
            "records": shop.read_records("users")})
        say(f"hitl.py {__version__} demo: an agent wants to delete records, "
            "and waits for you.\n\nReview it in a browser:\n"
            f"{shop.link}\n(if it asks: name reviewer, token {shop.token})\n"
            "Or press a to approve, r to reject, here.\n")
        say(f"agent: read_records(users) -> {shop.read_records('users')}")
        say(f"agent: delete_records({DELETE['table']}, "
            f"{DELETE['condition']!r}) ...")
        threading.Thread(target=decide_by_keys, daemon=True,
                         args=(shop, keys, say)).start()
        try:
            gone = gate.call("delete_records", DELETE, shop.delete_records)
            say(f"agent: approved, {gone} records deleted")
        except (CollaborationError, ReviewTimeoutError) as error:
            say(f"agent: stopped by {type(error).__name__}: {error}")
        say(f"records now: {shop.read_records('users')}")
        if sys.stdin.isatty():
            say("The desk stays open so that you can look at it: press Ctrl-C "
                "to end.")
            while True:
                time.sleep(1)


def decide_by_keys(shop: Workshop, keys: Iterator[str],
                   say: Callable[[str], None]) -> None:
    """Decide what waits when `a` or `r` is pressed."""
    me = shop.reviewer("terminal")
    for key in keys:
        if key not in ("a", "r"):
            say("press a to approve, r to reject")
            continue
        decision = "approved" if key == "a" else "rejected"
        end = time.monotonic() + 10     # the request may be on its way
        while time.monotonic() < end:
            for waiting in me.exchange("GET", "/pending",
                                       seconds=5).body["waiting"]:
                me.exchange("POST", f"/approve/{waiting['request_id']}",
                            {"decision": decision}, seconds=5)
                return
            time.sleep(0.05)


class Finding(NamedTuple):
    """One line of the verification."""

    step: str
    expected: str
    observed: str
    holds: bool


def starting_state(model: str) -> dict[str, str]:
    """What the run depends on, so that it can be repeated."""
    import platform
    import shlex
    import sqlite3
    return {
        "command": shlex.join([sys.executable, *sys.argv]),
        "python": sys.version.split()[0], "executable": sys.executable,
        "system": platform.platform(), "sqlite": sqlite3.sqlite_version,
        "hitl.py": __version__, "hitl.py sha256": file_sha256(Path(__file__)),
        "model": model or "none"}


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def verification(shop: Workshop, lines: list[str]) -> Iterator[Finding]:
    """The guide's verification, step by step: trigger, approve; trigger,
    reject; trigger, and nobody decides. `lines` is the log as it grows."""
    gate = shop.gate("verification", {"plan": ["read", "delete"], "step": 2})
    me = shop.reviewer("verifier")

    def trigger() -> Generator[Finding, None, tuple[
            threading.Thread, dict[str, Any]]]:
        result: dict[str, Any] = {}

        def run() -> None:
            try:
                result["returned"] = gate.call("delete_records", DELETE,
                                               shop.delete_records)
            except HitlError as error:
                result["raised"] = error
            result["at"] = time.monotonic()
        thread = threading.Thread(target=run)
        began = time.monotonic()
        thread.start()
        with contextlib.closing(open_for_reading(shop.database)) as db:
            ids: list[str] = []
            while not ids and time.monotonic() < began + 5:
                ids = waiting_ids(db)
        took = time.monotonic() - began
        yield Finding(
            "trigger delete_records", "1 row with status waiting within 1 s",
            f"{len(ids)} row after {took:.3f} s", len(ids) == 1 and took < 1)
        shop.waiting_id = ids[0] if ids else ""
        return thread, result

    def records() -> int:
        return len(shop.read_records("users"))

    # 1 approve
    thread, result = yield from trigger()
    status, _, data = me.fetch("GET", "/", seconds=5, Accept="text/html")
    description = f"Delete users where {DELETE['condition']}"
    form = card_on(data, shop.waiting_id)
    yield Finding("open the page", f"200, and it shows: {description}",
                  f"{status}, and it shows: {form.description}",
                  status == 200 and form.description == description)
    yield Finding("look at the row", "amber: class waiting, and its buttons",
                  f"class {form.style}, buttons "
                  f"{', '.join(form.buttons) or 'none'}",
                  "waiting" in form.style.split() and
                  set(form.buttons) == {"approved", "rejected"})
    clicked = time.monotonic()
    status = form.click(me, "approved")
    thread.join(10)
    took = result.get("at", math.inf) - clicked
    yield Finding("click Approve", "303 back to the page; the agent resumes "
                  "within 5 s", f"{status}, resumed after {took:.3f} s",
                  status == 303 and took < 5)
    yield Finding("look at the records", "the tool ran: 2 of 3 deleted",
                  f"it returned {result.get('returned')}, {records()} left",
                  result.get("returned") == 2 and records() == 1)

    # 2 reject
    shop.reset()
    thread, result = yield from trigger()
    card_on(me.fetch("GET", "/", seconds=5)[2], shop.waiting_id).click(
        me, "rejected")
    thread.join(10)
    yield Finding("click Reject", "CollaborationError reaches the caller",
                  f"{type(result.get('raised')).__name__}: "
                  f"{result.get('raised')}",
                  type(result.get("raised")) is CollaborationError)
    line = next((line for line in reversed(lines)
                 if "CollaborationError: rejected" in line), "")
    yield Finding("read the log", "a line with CollaborationError: rejected",
                  line or "none", bool(line))
    yield Finding("look at the records", "nothing ran: 3 left",
                  f"{records()} left", records() == 3)

    # 3 nobody decides
    thread, result = yield from trigger()
    limit = gate.configuration.gate["timeout_seconds"]
    thread.join(limit + 10)
    late = isinstance(result.get("raised"), TimeoutError)
    yield Finding(f"wait (time-out set to {limit} s here)", "TimeoutError",
                  f"{type(result['raised']).__name__}, a TimeoutError"
                  if late else repr(result), late)
    reply = me.exchange("POST", f"/approve/{shop.waiting_id}",
                        {"decision": "approved"}, seconds=5)
    yield Finding("click too late", "409, the row is expired, nothing runs",
                  f"{reply.status}, {reply.reason}, {records()} records",
                  (reply.status, reply.reason, records()) ==
                  (409, "expired", 3))
    with contextlib.closing(open_for_reading(shop.database)) as db:
        faults = list(audit_faults(db))
    yield Finding("check the audit log", "whole", "; ".join(faults) or "whole",
                  not faults)


class Card(NamedTuple):
    """One request's card, as a browser sees it on the page."""

    style: str
    description: str
    action: str
    fields: dict[str, str]
    buttons: list[str]

    def click(self, client: Client, decision: str) -> int:
        """Post the form as a browser does -> the status."""
        from urllib.parse import urlencode
        form = {**self.fields, "reason": "", "decision": decision}
        return client.fetch(
            "POST", self.action, urlencode(form).encode(), seconds=5,
            Content_Type=FORM, Accept="text/html", Origin=client.server_url,
            Sec_Fetch_Site="same-origin")[0]


def card_on(page: bytes, request_id: str) -> Card:
    """The card of a request on the page; an empty one if it is not there."""
    from html import unescape
    text = re.search(rf'<article class="([^"]*)" id="request-{request_id}">'
                     r"(.*?)</article>", page.decode(), re.DOTALL) or [""] * 3
    found = functools.partial(re.findall, string=text[2], flags=re.DOTALL)
    return Card(text[1], unescape("".join(found("<h3[^>]*>(.*?)</h3>"))),
                "".join(found('<form [^>]*action="([^"]*)"')),
                dict(found('<input [^>]*name="([^"]*)" value="([^"]*)"')),
                found('<button [^>]*value="([^"]*)"'))


def verify(model: str, timeout: float, say: Callable[[str], None]
           ) -> dict[str, Any]:
    """Run the verification -> the evidence: state, configuration, findings.
    Nothing of it is left on the disk."""
    lines: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: lines.append(  # type: ignore[method-assign]
        f"{record.levelname} {record.getMessage()}")
    log.addHandler(listener)
    propagate, log.propagate = log.propagate, False
    try:
        with Workshop(timeout) as shop:
            rules = shop.rules.read_text()
            evidence: dict[str, Any] = {
                "started_at": instant(time.time()), **starting_state(model),
                "configuration": rules, "configuration sha256":
                hashlib.sha256(rules.encode()).hexdigest(),
                "database": str(shop.database), "server": shop.desk.url}
            for name in evidence:
                if name != "configuration":
                    say(f"{name:20} {evidence[name]}")
            findings = []
            for finding in verification(shop, lines):
                findings.append(finding._asdict())
                say(f"\n{'ok  ' if finding.holds else 'FAIL'} "
                    f"{finding.step}\n     expected {finding.expected}\n"
                    f"     observed {visible(finding.observed)}")
            evidence["findings"] = findings
    finally:
        log.propagate = propagate
        log.removeHandler(listener)
    evidence["log"] = lines
    evidence["verified"] = all(f["holds"] for f in findings)
    return evidence


# =============================== Command line ==============================
# argv, the environment and stdout. Each command is a cmd_* function that takes
# the parsed arguments and returns the exit status: 0 fine, 1 refused or
# failed, 2 usage or configuration, 3 no decision in time, 4 unreachable.

EXAMPLE = '''\
# checkpoints.toml: which tool calls of an AI agent wait for a person.
# https://toml.io; `python3 hitl.py check` reads this file and says what it
# thinks of it, `python3 hitl.py check delete_users` says who decides a call.

[gate]                          # the agent's side
server_url = "http://127.0.0.1:8765"
timeout_seconds = 30            # how long a call waits for a decision. Thirty
                                # seconds suit a trial; people need 300 or more
# poll_seconds = 5              # longest gap between two looks at the status
# lifetime_seconds = 30         # how long a request can be decided (default:
                                # as long as its call waits)
# unmatched = "review"          # turn the list around: what no checkpoint
                                # names waits too (default: "allow")

[server]                        # the reviewer's side: `python3 hitl.py serve`
# host = "127.0.0.1"
# port = 8765
# database = "hitl.db"          # relative to this file
# public_url = ""               # where reviewers reach it, if elsewhere

# A checkpoint: if action_pattern is found in the tool's name, the call waits.
# The pattern is a Python regular expression, found anywhere in the name, in
# any case. Checkpoints are tried from the top, and the first match decides.
# description_template tells the reviewer what would happen: {tool} and the
# names of arguments are filled in.

[[checkpoint]]                  # high impact: a model goes live
checkpoint_id = "deploy-model"
action_pattern = "deploy_*"     # deploy_model, redeploy, mcp__ci__deploy ...
description_template = "Deploy model {model} to {environment}"
category = "high-impact"
arguments = { environment = "prod" }    # only where this argument says so,
                                        # or where it is missing

[[checkpoint]]                  # data risk: something leaves the house
checkpoint_id = "external-request"
action_pattern = "send|http|api.?request|publish|upload"
description_template = "Send to {url}"
category = "data-risk"

[[checkpoint]]                  # destructive: cannot be undone
checkpoint_id = "delete-records"
action_pattern = "delete_*"     # as a regex: "delete", then any number of _
description_template = "Delete from {table} where {condition}"
category = "destructive"
# timeout_seconds = 300         # over [gate]'s, for this one
# effect = "deny"               # "review" (default), "allow": runs at once if
                                # the whole name matches to the letter, "deny"

# For coding agents (`python3 hitl.py hook --help`) and `hitl.py run`: `kind`
# holds shell commands and file edits whatever an agent calls them, and
# action_pattern then looks at the command, or at the files an edit touches.
# A command that cannot be taken apart ($(...), eval ...) waits. Take away the
# number signs of those you want.

# [[checkpoint]]
# checkpoint_id = "shell-delete"
# kind = "shell"
# action_pattern = '\\b(rm|rmdir|shred|truncate|dd)\\b|\\bgit (reset|clean)\\b'
# description_template = "Delete: {command}"
# category = "destructive"

# [[checkpoint]]
# checkpoint_id = "shell-push"
# kind = "shell"
# action_pattern = '\\bgit push\\b|\\bgh (pr merge|release)\\b'
# description_template = "Push: {command}"
# category = "high-impact"

# [[checkpoint]]
# checkpoint_id = "shell-deploy"
# kind = "shell"
# action_pattern = '\\bterraform (apply|destroy)\\b|\\b(kubectl|helm)\\b'
# description_template = "Deploy: {command}"
# category = "high-impact"

# [[checkpoint]]
# checkpoint_id = "shell-publish"
# kind = "shell"
# action_pattern = '\\b(npm|cargo) publish\\b|\\b(twine upload|docker push)\\b'
# description_template = "Publish: {command}"
# category = "high-impact"

# [[checkpoint]]
# checkpoint_id = "shell-send"
# kind = "shell"
# action_pattern = '\\b(curl|wget|scp|rsync|ssh|nc|mail|sendmail)\\b'
# description_template = "Send: {command}"
# category = "data-risk"

# [[checkpoint]]                # the agent's own leash
# checkpoint_id = "own-rules"
# kind = "edit"
# action_pattern = '(checkpoints\\.toml|hitl\\.py|(hooks?|settings)\\.json)\\b'
# description_template = "Edit the rules of this agent: {file_path}"
# effect = "deny"
'''


@contextlib.contextmanager
def key_presses() -> Iterator[Iterator[str]]:
    """Key presses as they come: single keys from a terminal, else the first
    letter of each line. Read unbuffered, as lines_from() says."""
    file = sys.stdin.fileno()
    if not sys.stdin.isatty() or os.name != "posix":
        yield (line.decode(errors="replace").strip()[:1].lower()
               for line in lines_from(file))
        return
    import termios
    import tty
    saved = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield iter(lambda: os.read(file, 1).decode("latin-1").lower(), "")
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, saved)


def say(text: str = "") -> None:
    """A line on stdout, at once: whoever reads a pipe waits for it."""
    print(text, flush=True)


def read_token(name: str) -> str | None:
    """A token from the environment; ConfigError if it is a poor one."""
    token = os.environ.get(name)
    if token and not re.fullmatch(r"[!-~]{16,}", token):
        raise ConfigError(
            f"{name} is shorter than 16 characters, or not plain ASCII",
            f"a good one: {fresh_token()}")
    return token or None


def configuration_for(args: Any, needed: bool = True) -> Configuration:
    """The configuration in force; where there is none and none is needed,
    the defaults: no checkpoints, so no Gate can be made of it."""
    try:
        path = find_configuration(args.config)
    except ConfigError:
        if needed:
            raise
        gate, server = (checked(Path(), "", kind, {}) for kind in
                        ("gate", "server"))
        return Configuration(None, "", gate, server, (), {}, ())
    return load_configuration(path)


def database_for(args: Any, rules: Configuration) -> Path:
    """Flag, environment, file, default; the file's is relative to itself."""
    given = args.database or os.environ.get("HITL_DATABASE")
    if given:
        return Path(given).absolute()
    folder = rules.path.parent if rules.path else Path.cwd()
    return folder / str(rules.server["database"])


def reviewer_client(args: Any) -> Client:
    """The server, as the reviewer who types."""
    import getpass
    rules = configuration_for(args, needed=False)
    name = os.environ.get("HITL_REVIEWER")
    if not name:
        with contextlib.suppress(OSError, KeyError, ImportError):
            name = getpass.getuser()
    token = os.environ.get("HITL_REVIEWER_TOKEN")
    if not token and sys.stdin.isatty():
        token = getpass.getpass("reviewer's token (serve printed it): ")
    if not token:
        raise ConfigError("no reviewer's token",
                          "set HITL_REVIEWER_TOKEN; serve printed it")
    with config_error("HITL_REVIEWER"):
        name = name_value(name or "reviewer")
    with config_error("server_url"):
        url = url_value(args.server_url or os.environ.get("HITL_SERVER_URL")
                        or rules.gate["server_url"])
    return Client(url, basic(name, token))


def asked(client: Client, method: str, path: str, body: Any = None
          ) -> dict[str, Any]:
    """The server's answer; HitlError, with its words, if it refuses."""
    reply = client.exchange(method, path, body, seconds=15)
    if reply.reason == "wrong-credentials":
        raise HitlError("the server does not know this name and token",
                        "HITL_REVIEWER_TOKEN is what serve printed or was "
                        "given; of a [[reviewer]], set HITL_REVIEWER to the "
                        "name as well", reason=reply.reason)
    if reply.status >= 400:
        raise HitlError(visible(str(reply.body.get("title"))),
                        visible(str(reply.body.get("detail"))),
                        reason=reply.reason)
    return reply.body


def whole_id(client: Client, start: str) -> str:
    """The request_id that begins so, if only one does."""
    if not REQUEST_ID.fullmatch(start):
        raise ConfigError(f'"{visible(start)}" is no request_id',
                          "`hitl.py list --all` prints them")
    listed = (asked(client, "GET", "/pending")["waiting"]
              + asked(client, "GET", "/history")["reviewed"])
    ids = [there["request_id"] for there in listed
           if there["request_id"].startswith(start)]
    if start in ids or not ids:
        return start
    if len(ids) > 1:
        raise ConfigError(f'"{start}" begins {len(ids)} request_ids',
                          f"say more of it: {', '.join(ids[:5])}")
    return str(ids[0])


def print_request(there: dict[str, Any]) -> None:
    """One request in full, as the page has it."""
    say(f"{there['status']:10} {visible(there['action_description'])}")
    for name in ("tool", "agent", "checkpoint_id", "why", "asked_by",
                 "received_at", "deadline", "decided_by", "decided_at",
                 "reason", "outcome", "outcome_text", "request_id", "digest"):
        if there.get(name):
            say(f"  {name:14} {visible(str(there[name]))}")
    for name in ("arguments", "agent_context"):
        say(f"  {name:14} {pretty(there[name], chr(10) + ' ' * 4)}")
    if there["status"] == Status.WAITING:
        say("  " + ("an agent waits for it" if there["attended"] else
                    "nobody waits for it now"))


# ---- the commands ----

def cmd_serve(args: Any) -> int:
    """the desk: server, page and database, until Ctrl-C"""
    import signal
    rules = configuration_for(args, needed=False)
    warnings = list(rules.warnings) + file_warnings(rules)
    host = args.host or rules.server["host"]
    with config_error("--port"):
        port = port_value(first_of(args.port, rules.server["port"]))
    with config_error("--public-url"):
        public_url = public_url_value(args.public_url
                                      or rules.server["public_url"])
    tokens, token = serving_tokens(rules)
    check_exposure(host, public_url, tokens, args.allow_clear_text)
    database = database_for(args, rules)
    warnings += ignored_warning(database)
    store = Store(database)
    raise_file_limit()
    bell = "\a" if sys.stdout.isatty() else ""
    try:
        desk = open_desk(host, port, store, tokens, public_url, lambda text:
                         say(text + (bell if "submitted" in text else "")))
    except OSError as error:
        store.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}",
                          "another server may have it: try --port 0, which "
                          "takes a free one") from None
    say(f"hitl.py {__version__}: review what waits at")
    say(link_with(desk.url, token) if token else f"{desk.url}/")
    say(f"name reviewer, token {token}" if token else
        "sign in with " + ("your name and your own token" if tokens.named
                           else "any name and HITL_REVIEWER_TOKEN"))
    if token:
        say("to keep this token: HITL_REVIEWER_TOKEN=TOKEN python3 hitl.py "
            "serve")
    say(f"configuration {rules.path or 'none found: defaults of [server]'}")
    say(f"database {store.path.absolute()}")
    say(f"audit log: {store.head.sequence} rows, head {store.head.hash}")
    if os.environ.get("SSH_CONNECTION"):
        import getpass
        there = os.environ["SSH_CONNECTION"].split()[2]
        bound = desk.url.rpartition(":")[2]
        say(f"from your own machine: ssh -L {bound}:127.0.0.1:{bound} "
            f"{getpass.getuser()}@{there}")
    if tokens.agent is None:
        say("any program on this machine can ask; HITL_AGENT_TOKEN changes "
            "that")
    for warning in warnings:
        say(f"warning: {warning}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: desk.stop())
    desk.serve_forever()
    say(f"stopped; audit log: {store.head.sequence} rows, head "
        f"{store.head.hash}")
    store.close()
    return 0


def serving_tokens(rules: Configuration) -> tuple[Tokens, str | None]:
    """Who may sign in, and the reviewer's token if it was made here."""
    agent = read_token("HITL_AGENT_TOKEN")
    shared, made = None, None
    if rules.reviewers and os.environ.get("HITL_REVIEWER_TOKEN"):
        say("warning: HITL_REVIEWER_TOKEN is not used: each [[reviewer]] has "
            "a token")
    if not rules.reviewers:
        shared = read_token("HITL_REVIEWER_TOKEN")
        if shared is None:
            shared = made = fresh_token()
    if agent and (agent == shared
                  or token_hash(agent) in rules.reviewers.values()):
        raise ConfigError("agent and reviewer have the same token",
                          f"an agent could approve; a good one for the agent: "
                          f"{fresh_token()}")
    return Tokens(agent and token_hash(agent), shared and token_hash(shared),
                  rules.reviewers), made


def check_exposure(host: str, public_url: str, tokens: Tokens,
                   allow_clear_text: bool) -> None:
    """ConfigError for an address others can reach, without what that needs."""
    import ipaddress
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if local:
        return
    if tokens.agent is None:
        raise ConfigError(f"{host} can be reached from other machines, and "
                          "agents have no token",
                          f"set HITL_AGENT_TOKEN; a good one: {fresh_token()}")
    if not (public_url.startswith("https://") or allow_clear_text):
        raise ConfigError(
            f"{host} can be reached from other machines, and tokens would "
            "cross the network in clear text",
            "stay on 127.0.0.1 and use `ssh -L`, or set an https public_url "
            "(a proxy holds the certificate), or say --allow-clear-text")


def file_warnings(rules: Configuration) -> list[str]:
    """ConfigError for rules that anybody can edit; words for a group."""
    if rules.path is None or os.name != "posix":
        return []
    mode = rules.path.stat().st_mode
    if mode & 0o002:
        raise ConfigError(f"{rules.path} can be written by everybody",
                          f"chmod go-w {rules.path}")
    return [f"{rules.path} can be written by its group"] * bool(mode & 0o020)


def ignored_warning(database: Path) -> list[str]:
    """Words if the database, full of agents' state, could be committed."""
    import subprocess
    if not any((folder / ".git").exists() for folder in database.parents):
        return []
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        if subprocess.run(
                ["git", "-C", str(database.parent), "check-ignore", "-q",
                 str(database)], stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, timeout=5).returncode == 1:
            return [f"{database} lies in a git work tree and is not ignored: "
                    f"add {database.name}* to .gitignore"]
    return []


def raise_file_limit() -> None:
    """As many connections as the system lets us have."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        want = MAX_CONNECTIONS + 64
        if soft != resource.RLIM_INFINITY and soft < want:
            resource.setrlimit(resource.RLIMIT_NOFILE, (
                want if hard == resource.RLIM_INFINITY else min(want, hard),
                hard))


def cmd_check(args: Any) -> int:
    """which checkpoint decides about a call; alone: is all well?"""
    rules = load_configuration(find_configuration(args.config))
    if args.tool is None:
        if args.json:
            say(json.dumps({"path": str(rules.path), "checkpoints": [
                {name: str(v) if v == math.inf else v
                 for name, v in dataclasses.asdict(c).items()}
                for c in rules.checkpoints]}))
            return 0
        warnings = [*rules.warnings, *file_warnings(rules),
                    *ignored_warning(database_for(args, rules))]
        say(f"{rules.path}: {len(rules.checkpoints)} checkpoints, fine")
        for c in rules.checkpoints:
            say(f"  {c.checkpoint_id:20} {c.effect:7} {c.action_pattern}")
        say(f"  {'(what none matches)':20} {rules.gate['unmatched']}")
        for warning in warnings:
            say(f"warning: {warning}")
        url = os.environ.get("HITL_SERVER_URL") or rules.gate["server_url"]
        try:
            asked(Client(url), "GET", "/healthz")
            say(f"server {url}: answers")
        except HitlError as error:
            say(f"server {url}: {error.message}")
        return 0
    with config_error("JSON of the arguments:"):
        arguments = parse_json(args.arguments)
        if not isinstance(arguments, dict):
            raise ValueError('it must be like {"table": "users"}')
    match = rules.first_match(args.tool, arguments)
    rule = match.checkpoint
    answer = {"tool": args.tool, "effect": match.effect,
              "checkpoint_id": rule.checkpoint_id, "why": match.why}
    if args.json:
        say(json.dumps(answer))
        return 0
    words = {"review": "waits for a person", "allow": "runs without review",
             "deny": "is denied"}[match.effect]
    named = rule in rules.checkpoints
    say(f"{visible(args.tool)} {words}: " + (
        f'checkpoint "{rule.checkpoint_id}" in ' if named else "by ")
        + f"{rules.path}")
    say(f"  because  {match.why}" + ("" if rule.checkpoint_id != "unmatched"
        else f', and unmatched = "{rules.gate["unmatched"]}"'))
    if args.tool == "run" and not named:
        say("  but      `hitl.py run` always waits")
    if match.effect == "review":
        say("  shown as " + visible(describe(rule, args.tool, arguments)))
        seconds = first_of(rule.timeout_seconds, rules.gate["timeout_seconds"])
        say(f"  waits    {seconds:g} s")
    return 0


def cmd_init(args: Any) -> int:
    """write a commented checkpoints.toml here, if there is none"""
    path = Path(args.config or os.environ.get("HITL_CONFIG")
                or "checkpoints.toml").absolute()
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(EXAMPLE)
    except FileExistsError:
        raise ConfigError(f"{path} is there already", "it was not changed; "
                          "next: python3 hitl.py serve") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    say(f"wrote {path}; next: python3 hitl.py serve")
    return 0


def cmd_list(args: Any) -> int:
    """what waits, or with --all what was reviewed too"""
    client = reviewer_client(args)
    rows = asked(client, "GET", "/pending")["waiting"]
    if args.all:
        rows += asked(client, "GET", "/history")["reviewed"]
    if args.json:
        say(json.dumps(rows, indent=2))
        return 0
    for there in rows:
        say(f"{there['status']:10} {there['request_id']:32} "
            f"{visible(there['action_description'])}")
    if not rows:
        say("nothing waits")
    return 0


def cmd_show(args: Any) -> int:
    """one request in full"""
    client = reviewer_client(args)
    there = asked(client, "GET", f"/review/{whole_id(client, args.id)}")
    if args.json:
        say(json.dumps(there, indent=2))
    else:
        print_request(there)
    return 0


def cmd_approve(args: Any) -> int:
    """say yes; on a terminal it shows the request and asks first"""
    return decide_as(args, "approved")


def cmd_reject(args: Any) -> int:
    """say no, with a reason the agent is told"""
    return decide_as(args, "rejected")


def decide_as(args: Any, decision: str) -> int:
    client = reviewer_client(args)
    name = whole_id(client, args.id)
    if decision == "approved" and sys.stdin.isatty() and not args.yes:
        print_request(asked(client, "GET", f"/review/{name}"))
        if input("approve it? y/N ").strip().lower() not in ("y", "yes"):
            say("nothing was decided")
            return 1
    there = asked(client, "POST", f"/approve/{name}",
                  {"decision": decision, "reason": args.reason or ""})
    say(json.dumps(there) if args.json else
        f"{there['status']} {there['request_id']}")
    return 0


def cmd_log(args: Any) -> int:
    """the audit log; with --verify: is it whole?"""
    import sqlite3
    path = database_for(args, configuration_for(args, needed=False))
    if not re.fullmatch("([0-9a-f]{64})?", args.head):
        raise ConfigError("--head is no SHA-256 in hex",
                          "serve prints the head at start and stop")
    db = open_for_reading(path)
    try:
        if args.verify:
            head, faults = last_head(db), list(audit_faults(db, args.head))
            if args.json:
                say(json.dumps({"rows": head.sequence, "head": head.hash,
                                "faults": faults}))
                return 1 if faults else 0
            for fault in faults:
                say(f"FAULT {fault}")
            say(f"{path}: {head.sequence} rows, head {head.hash}: "
                + ("damaged or edited" if faults else "whole"))
            if not args.head:
                say("a cut-off end shows only against a head noted before: "
                    "serve prints it, log --verify --head HASH checks it")
            return 1 if faults else 0
        for row in audit_rows(db):
            if args.json:
                say(json.dumps(dict(zip(("sequence", "at", "event",
                    "request_id", "actor", "detail", "hash"), row))))
            else:
                say(" ".join(visible(str(part)) for part in row[:6]))
    except (sqlite3.DatabaseError, ValueError, LookupError,
            TypeError) as error:
        say(f"FAULT {path}: {visible(str(error))}")
        return 1
    finally:
        db.close()
    return 0


def cmd_token(args: Any) -> int:
    """a token for one reviewer, and the lines that make it known"""
    with config_error("the name"):
        name_value(args.name)
    token = fresh_token()
    say(f"for {args.name}, shown once: {token}\n\nin checkpoints.toml:\n\n"
        f'[[reviewer]]\nname = {json.dumps(args.name, ensure_ascii=False)}\n'
        f'token_sha256 = "{token_hash(token)}"')
    return 0


def cmd_hook(args: Any) -> int:
    """a coding agent's hook: its JSON on stdin, its answer on stdout"""
    import signal
    if args.snippet:
        where, text = snippet(args.snippet)
        say(f"{where}:\n\n{text}")
        return 0
    if args.check:
        return check_hooks(args.config)
    signal.signal(signal.SIGTERM, exit_by_signal)
    try:
        answer, status, words = hook(sys.stdin.buffer.read(16 << 20),
                                     args.config and Path(args.config),
                                     args.deadline)
        if words:
            print(words, file=sys.stderr)
        if answer is not None:
            say(json.dumps(answer))
    except BaseException:       # a closed stdin or stdout: nothing was allowed
        os._exit(2)
    return status


def uncovered(rules: Configuration) -> list[str]:
    """Words where a coding agent's own tools would run unasked."""
    missing = {"shell", "edit"} - {c.kind for c in rules.checkpoints}
    if not missing or rules.gate["unmatched"] == "review":
        return []
    what = {"shell": "shell commands", "edit": "file edits"}
    return [f"{rules.path} has no checkpoint of kind "
            f"{' or '.join(sorted(missing))}, and unmatched is allow: "
            f"{' and '.join(what[k] for k in sorted(missing))} of coding "
            "agents run without review"]


def check_hooks(config: str | None) -> int:
    """Run every installed line on a sample call: would it really block? And
    do the rules hold what a coding agent does?"""
    warnings = uncovered(load_configuration(
        find_configuration(config, local=False)))
    found, bad = 0, len(warnings)
    for warning in warnings:
        say(f"warning: {warning}")
    for agent in SNIPPETS:
        for path, line, fault in installed_lines(agent):
            found += 1
            fault = fault or blocks(agent, line)
            bad += bool(fault)
            say(f"{agent}: {path}: " + (f"DOES NOT BLOCK: {fault}" if fault
                                        else "blocks when nobody answers"))
    if not found:
        raise ConfigError(f"no hook is installed in {Path.cwd()} or at home",
                          "`hitl.py hook --snippet AGENT` prints one")
    return 1 if bad else 0


def cmd_mcp(args: Any) -> int:
    """a proxy before an MCP server on stdio: -- SERVER CMD..."""
    import signal
    command = command_behind(args)
    gate = Gate(find_configuration(args.config, local=False))
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), exit_by_signal)
    try:
        proxy = Proxy(gate, command, args.name or server_name(command))
    except OSError as error:
        raise ConfigError(f"{command[0]}: {error.strerror}") from None
    return proxy.run(sys.stdin.fileno(), sys.stdout.buffer)


def cmd_run(args: Any) -> int:
    """ask, then run exactly this command: -- CMD..."""
    try:
        return run_command(Gate(args.config), args.tool_name,
                           command_behind(args), args.timeout)
    except (HitlError, OSError) as error:
        print_error(error)
        return 125                      # the command's own are its own


def command_behind(args: Any) -> list[str]:
    command = args.command_words[args.command_words[:1] == ["--"]:]
    if not command:
        raise ConfigError("no command", "put it behind --")
    return list(command)


def cmd_demo(args: Any) -> int:
    """see it happen: a sample agent asks, you decide"""
    with key_presses() as keys:
        demo(first_of(args.timeout, 300.0), keys, say)
    return 0


def cmd_verify(args: Any) -> int:
    """the guide's verification, for real; writes the evidence"""
    output = Path(args.output).absolute()
    try:
        output.write_text("")           # before the work, not after it
    except OSError as error:
        raise ConfigError(f"{output}: {error.strerror}",
                          "name another file by --output") from None
    evidence = verify(args.model, first_of(args.timeout, 2.0), say)
    output.write_text(json.dumps(evidence, indent=2) + "\n")
    say(f"\n{'verified' if evidence['verified'] else 'NOT VERIFIED'}; the "
        f"evidence is in {output}")
    return 0 if evidence["verified"] else 1


# ---- what may be typed ----

OPTIONS: dict[str, dict[str, Any]] = {
    "--config": {"metavar": "FILE", "help": "checkpoints.toml"},
    "--database": {"metavar": "FILE", "help": "hitl.db"},
    "--server-url": {"metavar": "URL", "help": "where the server is"},
    "--json": {"action": "store_true", "help": "for a program to read"},
    "--host": {"help": "address to listen on (127.0.0.1)"},
    "--port": {"type": int, "help": "port (8765; 0: any free one)"},
    "--public-url": {"metavar": "URL", "help": "where reviewers reach it"},
    "--allow-clear-text": {"action": "store_true",
                           "help": "off loopback without https"},
    "--all": {"action": "store_true", "help": "reviewed ones too"},
    "--reason": {"metavar": "TEXT", "help": "told to the agent"},
    "--yes": {"action": "store_true", "help": "do not ask y/N"},
    "--verify": {"action": "store_true", "help": "check the whole chain"},
    "--head": {"metavar": "HASH", "default": "",
               "help": "a head noted before, to show a cut-off end"},
    "--model": {"metavar": "NAME", "default": "", "help": "of the agent"},
    "--output": {"metavar": "FILE", "default": "hitl-evidence.json",
                 "help": "the evidence (hitl-evidence.json)"},
    "--timeout": {"metavar": "SECONDS", "type": float,
                  "help": "how long a call waits"},
    "--deadline": {"metavar": "SECONDS", "type": float,
                   "help": "answer before this (a default per agent)"},
    "--snippet": {"metavar": "AGENT", "choices": list(SNIPPETS),
                  "help": f"print what to install: {', '.join(SNIPPETS)}"},
    "--check": {"action": "store_true", "help": "does what is installed "
                "really block?"},
    "--name": {"help": "the server's, in mcp__NAME__tool"},
    "--tool": {"metavar": "NAME", "default": "run", "dest": "tool_name",
               "help": "the name checkpoints see (run)"},
    "command_words": {"nargs": "...", "metavar": "-- CMD",
                      "help": "the command"},
    "tool": {"nargs": "?", "help": "a tool's name"},
    "arguments": {"nargs": "?", "default": "{}", "help": "its JSON"},
    "id": {"help": "a request_id, or its beginning"},
    "name": {"help": "the reviewer"},
}
COMMANDS: dict[Callable[[Any], int], tuple[str, str]] = {
    cmd_serve: ("--config --database --host --port --public-url "
                "--allow-clear-text", "serve --port 8765"),
    cmd_check: ("tool arguments --config --database --json",
                """check delete_users '{"table": "users"}'"""),
    cmd_init: ("--config", "init"),
    cmd_list: ("--all --json --config --server-url", "list --all"),
    cmd_show: ("id --json --config --server-url", "show 1f0c"),
    cmd_approve: ("id --yes --reason --json --config --server-url",
                  "approve 1f0c --yes"),
    cmd_reject: ("id --reason --json --config --server-url",
                 'reject 1f0c --reason "use the staging table"'),
    cmd_log: ("--verify --head --json --config --database", "log --verify"),
    cmd_token: ("name", "token ana"),
    cmd_run: ("--tool --timeout --config command_words",
              "run -- terraform apply"),
    cmd_hook: ("--deadline --snippet --check --config",
               "hook --snippet claude"),
    cmd_mcp: ("--name --config command_words",
              "mcp --name fs -- npx -y "
              "@modelcontextprotocol/server-filesystem ."),
    cmd_demo: ("--timeout", "demo"),
    cmd_verify: ("--model --output --timeout",
                 "verify --output evidence.json"),
}


def command_line(only: str = "") -> Any:
    """The parser, from COMMANDS and OPTIONS; `only` one command's, if it is
    one: a coding agent pays for this at each of its tool calls."""
    import argparse
    plain = argparse.RawDescriptionHelpFormatter

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            print_error(ConfigError(message, f"{self.prog} --help"))
            sys.exit(2)
    parser = Parser(
        prog="hitl", formatter_class=plain,
        description="A person decides before an AI agent acts.",
        epilog="first: python3 hitl.py demo\n`COMMAND --help` has an example.")
    parser.add_argument("--version", action="store_true",
                        help="print version and SHA-256 of this file")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    names = {f.__name__.removeprefix("cmd_"): f for f in COMMANDS}
    for name, function in names.items():
        if only in names and name != only:
            continue
        options, example = COMMANDS[function]
        command = commands.add_parser(
            name, help=function.__doc__, description=function.__doc__,
            epilog=f"example: python3 hitl.py {example}",
            formatter_class=plain)
        for option in options.split():
            command.add_argument(option, **OPTIONS[option])
        command.set_defaults(function=function)
    return parser


EXIT_STATUS = ((ConfigError, 2), (ReviewTimeoutError, 3),
               (UnreachableError, 4))


def print_error(error: Exception) -> None:
    print(f"hitl: error: {getattr(error, 'message', error)}", file=sys.stderr)
    if getattr(error, "hint", ""):
        print(f"hitl: hint: {error.hint}",  # type: ignore[attr-defined]
              file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run one command -> the exit status. Errors go to stderr, with their
    hint; a traceback would be a fault of ours."""
    for stream in (sys.stdout, sys.stderr):     # a name that a terminal
        with contextlib.suppress(AttributeError):   # cannot show stops nothing
            stream.reconfigure(errors="backslashreplace")  # type: ignore
    words = sys.argv[1:] if argv is None else argv
    parser = command_line(words[0] if words else "")
    args = parser.parse_args(words)
    if args.version:
        say(f"hitl.py {__version__} sha256 {file_sha256(Path(__file__))}")
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    try:
        return int(args.function(args))
    except HitlError as error:
        print_error(error)
        return next((status for kind, status in EXIT_STATUS
                     if isinstance(error, kind)), 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:             # `hitl.py log | head`
        sys.stderr.close()
        return 1


if __name__ == "__main__":
    sys.exit(main())
