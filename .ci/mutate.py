"""Would the tests notice? Change one line of the path of a call at a time.

    python3 .ci/mutate.py --count 60 --seed 1 --minutes 5

In the rooms Matching, Store, Rights and routes, and Gate, comparisons are
turned round, a `not` is dropped, `and` becomes `or`, one status word becomes
another; then the fast tests of that room run against the copy. Prints the
changes that nothing noticed, and how many were caught. Some of those change
nothing that can be observed: read them.
"""
from __future__ import annotations

import argparse
import ast
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

HERE = Path(__file__).absolute().parent.parent
BANNER = re.compile("# =+ (.+?) =+")
# a room, and the sections of test_hitl.py whose name has one of these words
ROOMS = {
    "Matching": "Matching Checkpoints",
    "Store": "Store Database Promise",
    "Rights and routes": "Rights Server Promise Hostile",
    "Gate": "Gate Guard",
}
OPPOSITE = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.GtE, ast.GtE: ast.Lt,
    ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And}
WORDS = {
    "waiting": "approved", "approved": "rejected", "rejected": "approved",
    "expired": "waiting", "withdrawn": "waiting", "running": "executed",
    "executed": "failed", "failed": "executed", "lapsed": "running",
    "review": "allow", "deny": "allow", "allow": "review"}
SLOW_SECONDS = 1.5              # a test that takes longer is left out


class Mutant(NamedTuple):
    room: str
    line: int
    start: int                  # in the bytes of the file
    end: int
    before: str
    after: str

    def applied(self, source: str) -> str:
        """The whole file with this change."""
        data = source.encode()
        return (data[:self.start] + f"({self.after})".encode()
                + data[self.end:]).decode()


# ---- what could be changed ----

def rooms_of(source: str) -> Iterator[tuple[int, str]]:
    """Each line's number, and the room it belongs to."""
    room = ""
    for number, line in enumerate(source.splitlines(), 1):
        if found := BANNER.fullmatch(line):
            room = found[1]
        yield number, room


def expressions(tree: ast.AST) -> Iterator[ast.expr]:
    """The expressions of a tree, without docstrings, annotations and the
    insides of f-strings, whose places Python 3.11 does not know."""
    for name, child in ast.iter_fields(tree):
        if name in ("annotation", "returns"):
            continue
        for node in child if isinstance(child, list) else [child]:
            said = isinstance(node, ast.Expr) and isinstance(
                node.value, ast.Constant)
            if isinstance(node, ast.JoinedStr) or said:
                continue
            if isinstance(node, ast.expr):
                yield node
            if isinstance(node, ast.AST):
                yield from expressions(node)


def changes_of(node: ast.expr) -> Iterator[str]:
    """What could stand in place of an expression."""
    if isinstance(node, ast.Compare):
        for n, operator in enumerate(node.ops):
            turned = [*node.ops]
            turned[n] = OPPOSITE[type(operator)]()
            yield ast.unparse(ast.Compare(node.left, turned,
                                          node.comparators))
    elif isinstance(node, ast.BoolOp):
        yield ast.unparse(ast.BoolOp(OPPOSITE[type(node.op)](), node.values))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield ast.unparse(node.operand)
    elif isinstance(node, ast.Attribute) and ast.unparse(
            node.value) == "Status" and node.attr.lower() in WORDS:
        yield f"Status.{WORDS[node.attr.lower()].upper()}"
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        if node.value in WORDS:
            yield repr(WORDS[node.value])
        for word in re.findall("'([a-z]+)'", node.value):       # of SQL
            if word in WORDS:
                yield repr(node.value.replace(f"'{word}'",
                                              f"'{WORDS[word]}'", 1))


def mutants(source: str) -> Iterator[Mutant]:
    rooms, data = dict(rooms_of(source)), source.encode()
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in expressions(ast.parse(source)):
        if rooms[node.lineno] not in ROOMS or node.end_lineno is None:
            continue
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + (node.end_col_offset or 0)
        for after in changes_of(node):
            yield Mutant(rooms[node.lineno], node.lineno, start, end,
                         data[start:end].decode(), after)


# ---- what the tests say of it ----

def tests_of(room: str) -> list[str]:
    """The names of the tests in a room's sections."""
    source = (HERE / "test_hitl.py").read_text("utf-8")
    sections, words = dict(rooms_of(source)), ROOMS[room].split()
    return [node.name for node in ast.parse(source).body
            if isinstance(node, ast.FunctionDef)
            and node.name.startswith("test_")
            and any(word in sections[node.lineno] for word in words)]


def run(source: str, tests: list[str], seconds: float, *options: str) -> int:
    """The exit status of pytest on a copy with this source; 1 if it hangs."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("test_hitl.py", "checkpoints.toml", "README.md"):
            shutil.copy(HERE / name, folder)
        Path(folder, "hitl.py").write_text(source, "utf-8")
        with subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "-p",
                 "no:cacheprovider", *options, *tests], cwd=folder,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                stdin=subprocess.DEVNULL, start_new_session=True) as process:
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                return 1
            finally:            # it, and every server that it started
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def fast_tests(source: str, room: str) -> list[str]:
    """The cases of a room's tests that pass quickly on the file as it is."""
    names = tests_of(room)
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        run(source, [f"test_hitl.py::{name}" for name in names], 600,
            f"--junitxml={report.name}")
        cases = ElementTree.parse(report.name).getroot().iter("testcase")
        good: dict[str, float] = {}
        bad = set()
        for case in cases:
            name = case.get("name", "").partition("[")[0]
            good[name] = good.get(name, 0) + float(case.get("time", 0))
            if len(case):                       # failed or skipped
                bad.add(name)
    fast = [name for name in names if name not in bad
            and good.get(name, SLOW_SECONDS) < SLOW_SECONDS]
    print(f"{room}: {len(fast)} fast tests of {len(names)}", flush=True)
    return [f"test_hitl.py::{name}" for name in fast]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=60,
                        help="how many changes, drawn at random; 0: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=5,
                        help="no change is tried later than this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--least", type=float, default=0,
                        help="exit status 1 if fewer per cent are caught")
    parser.add_argument("--room", action="append", choices=list(ROOMS),
                        help="only this room")
    given = parser.parse_args()
    source = (HERE / "hitl.py").read_text("utf-8")
    wanted = given.room or list(ROOMS)
    every = [m for m in mutants(source) if m.room in wanted]
    chosen = [*every]
    random.Random(given.seed).shuffle(chosen)
    chosen = chosen[:given.count or None]
    print(f"{len(every)} changes are possible; {len(chosen)} drawn", flush=True)
    rooms = sorted({m.room for m in chosen})

    def survives(mutant: Mutant) -> bool | None:
        if time.monotonic() > end:
            return None
        return run(mutant.applied(source), tests[mutant.room], 90, "-x") == 0
    with ThreadPoolExecutor(given.jobs) as pool:
        tests = dict(zip(rooms, pool.map(
            lambda room: fast_tests(source, room), rooms), strict=True))
        end = time.monotonic() + 60 * given.minutes
        results = list(pool.map(survives, chosen))
    tried = [result for result in results if result is not None]
    for mutant, result in zip(chosen, results, strict=True):
        if result:
            print(f"NOT CAUGHT {mutant.room}, line {mutant.line}: "
                  f"{mutant.before}\n        -> {mutant.after}")
    caught = tried.count(False)
    print(f"caught {caught} of {len(tried)} changes")
    return 0 if tried and 100 * caught >= given.least * len(tried) else 1


if __name__ == "__main__":
    sys.exit(main())
