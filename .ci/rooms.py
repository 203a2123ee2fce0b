"""The figures of hitl.py, room by room: python3 .ci/rooms.py [coverage.json]
`--write` puts the lines of each room into the map at the head of the file.

Lines beside the budget, functions, the longest one, conditional expressions
that are hard to read; with the JSON report of coverage also what no test
reached in the path of a call (*), but for lines that say `# not reached: why`.
Exit status 1 if a conditional expression is inside another.
"""
from __future__ import annotations

import ast
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

from mutate import rooms_of

FILE = Path(__file__).absolute().parent.parent / "hitl.py"
BUDGETS = {                     # in lines; * is the path of a call
    "Front door": 125, "* Errors": 85, "* Vocabulary": 155, "Text": 65,
    "* Matching": 230, "Configuration": 270, "* Store": 500,
    "Database file": 215, "Notices": 170, "Pages": 560,
    "* Rights and routes": 650, "Loop": 290, "* Client": 120, "* Gate": 460,
    "Guard": 130, "Context": 100, "Adapters": 450, "Evidence": 280,
    "Command line": 680}
PATH = {name[2:] for name in BUDGETS if name.startswith("* ")}


def nested(tree: ast.AST) -> list[int]:
    """The lines of conditional expressions that hold another one."""
    return [node.lineno for node in ast.walk(tree)
            if isinstance(node, ast.IfExp) and any(
                isinstance(inner, ast.IfExp) and inner is not node
                for inner in ast.walk(node))]


def missing(report: str) -> dict[int, str]:
    """The lines that no test reached, and the branches not taken."""
    (found,) = json.loads(Path(report).read_text("utf-8"))["files"].values()
    lines = {line: "not reached" for line in found["missing_lines"]}
    for line, goal in found.get("missing_branches", []):
        lines.setdefault(line, f"never goes on to {goal}")
    return lines


def write_map(source: str, sizes: Counter[str]) -> None:
    """Put each room's lines, without its banner, into the map."""
    for name, size in sizes.items():
        row = re.compile(rf"(?m)^(  [* ] ){re.escape(name)} +\d+(?=  )")
        source = row.sub(rf"\g<1>{name:17} {size - 1:4}", source, count=1)
    FILE.write_text(source, "utf-8")


def main() -> int:
    source = FILE.read_text("utf-8")
    rooms = {line: room or "Front door" for line, room in rooms_of(source)}
    if sys.argv[1:] == ["--write"]:
        write_map(source, Counter(rooms.values()))
        return 0
    tree, texts = ast.parse(source), source.splitlines()
    functions: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or 0) - node.lineno + 1
            functions[rooms[node.lineno]].append((size, node.name))
    gaps = missing(sys.argv[1]) if sys.argv[1:] else {}
    sizes, open_lines = Counter(rooms.values()), Counter(
        rooms[line] for line in gaps)
    budgets = {name.removeprefix("* "): size for name, size in BUDGETS.items()}
    print(f"{'room':20} {'lines':>6} {'budget':>6} {'functions':>9} "
          f"{'open':>5}  longest")
    for name in dict.fromkeys(rooms.values()):
        longest = max(functions[name], default=(0, "-"))
        mark = "* " if name in PATH else "  "
        print(f"{mark}{name:18} {sizes[name]:6} {budgets.get(name, 0):6} "
              f"{len(functions[name]):9} {open_lines[name]:5}  "
              f"{longest[1]} ({longest[0]})")
    path = sum(sizes[name] for name in PATH)
    every = sorted(size for room in functions.values() for size, _ in room)
    print(f"{sum(sizes.values())} lines, the path of a call {path}; nine "
          f"functions in ten have at most {every[len(every) * 9 // 10]} lines")
    broken = [node.lineno for node in ast.walk(tree)
              if isinstance(node, ast.IfExp)
              and node.lineno != node.end_lineno]
    print(f"{len(broken)} conditional expressions go over a line break: "
          f"{', '.join(map(str, sorted(broken)))}")
    for line in nested(tree):
        print(f"hitl.py:{line}: a conditional expression inside another")
    unreached = [line for line in sorted(gaps) if rooms[line] in PATH]
    for line in unreached:
        if gaps.get(line - 1) != gaps[line]:        # the first of its lines
            print(f"hitl.py:{line}: {gaps[line]}: {texts[line - 1].strip()}")
    if gaps:
        print(f"{len(unreached)} lines of the path of a call are open")
    return 1 if nested(tree) else 0


if __name__ == "__main__":
    sys.exit(main())
