"""Every mutant of some files, as JSON on stdout. Runs in the virtual environment of cosmic-ray, whose operators make them.

    .mutants/bin/python tests/mutation/enumerate_mutants.py FILE ...

What is left out, by rule (docs/mutation-testing.md): annotations, f-strings (they are messages), and of the operators that can replace
one another only those of NEAR.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import parso
import parso.python.tree  # noqa: F401
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.commands.init import _operators
from cosmic_ray.mutating import mutate_code

NEAR = {
    "ReplaceBinaryOperator": {
        "Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_Mul", "Pow_Mul", "RShift_LShift", "LShift_RShift",
        "BitOr_BitAnd", "BitAnd_BitOr", "BitXor_BitAnd",
    },
    "ReplaceComparisonOperator": {
        "Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt", "Eq_NotEq", "NotEq_Eq", "Is_IsNot",
        "IsNot_Is",
    },
}  # fmt: skip


def wanted(operator: str) -> bool:
    """Of operators that replace one by another, the nearest only."""
    family, _, which = operator.rpartition("/")[2].partition("_")
    return family not in NEAR or which in NEAR[family]


def spans(tree: ast.AST, source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """What is not mutated: annotations and f-strings."""
    found: list[ast.AST] = []
    for node in ast.walk(tree):
        match node:
            case ast.AnnAssign():
                found.append(node.annotation)
            case ast.arg() if node.annotation is not None:
                found.append(node.annotation)
            case ast.FunctionDef() if node.returns is not None:
                found.append(node.returns)
            case ast.JoinedStr():
                found.append(node)
            case ast.Assign() if _is_type(node):
                found.append(node.value)
    lines = source.splitlines()

    def chars(line: int, column: int) -> tuple[int, int]:
        return line, len(lines[line - 1].encode()[:column].decode())

    return [
        (chars(n.lineno, n.col_offset), chars(n.end_lineno or 0, n.end_col_offset or 0))  # type: ignore[attr-defined]
        for n in found
    ]


def _is_type(node: ast.Assign) -> bool:
    """An alias of a type, such as `Event = tuple[float, float, int] | None`."""
    (target, *_) = node.targets
    return (
        isinstance(target, ast.Name)
        and bool(re.fullmatch(r"[A-Z][A-Za-z]+", target.id))
        and isinstance(node.value, ast.Subscript | ast.BinOp)
    )


def cold(tree: ast.AST, line: int) -> bool:
    """Whether a line is executed when the module is imported: outside of function bodies."""
    return not any(
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body[0].lineno <= line <= (node.end_lineno or 0)
        for node in ast.walk(tree)
    )


def where(tree: ast.AST, line: int) -> str:
    """The innermost function or class of a line."""
    around = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    return ".".join(node.name for node in sorted(around, key=lambda node: node.lineno)) or "(module)"


def mutants(path: Path) -> list[dict[str, Any]]:
    """Each as the part of the file that changes and what stands there then."""
    source = path.read_text()
    tree = ast.parse(source)
    left_out = spans(tree, source)
    lines = source.splitlines(keepends=True)
    made: list[dict[str, Any]] = []
    for first, last, around, after in _statements(tree):  # one at a time: the whole file for every mutant takes minutes
        part = around + "".join(lines[first - 1 : last]) + after
        offset = sum(map(len, lines[: first - 1])) - len(around)
        for operator, head, tail, text in _of_part(part, first - around.count("\n"), left_out):
            at, to = offset + head, offset + tail
            line = source.count("\n", 0, at) + 1
            changed = source[:at] + text + source[to:]
            begin = source.rfind("\n", 0, at) + 1
            made.append(
                {
                    "file": str(path), "operator": operator, "line": line, "where": where(tree, line),
                    "cold": cold(tree, line), "at": at, "to": to, "text": text,
                    "before": lines[line - 1].strip(), "after": changed[begin : changed.find("\n", at + len(text))].strip(),
                }
            )  # fmt: skip
    made.sort(key=lambda m: (m["line"], m["at"], m["operator"], m["text"]))
    for number, mutant in enumerate(made, start=1):
        mutant["id"] = f"{path.stem}-{number}"
    return made


def _statements(tree: ast.Module) -> Iterator[tuple[int, int, str, str]]:
    """First and last line of every statement of the module and of its classes, and what makes a program of those lines."""
    for top in tree.body:
        decorators = [d.lineno for d in getattr(top, "decorator_list", [])]
        first = min([top.lineno, *decorators])
        if not isinstance(top, ast.ClassDef):
            yield first, top.end_lineno or 0, "", ""
            continue
        yield first, top.lineno, "", "    pass\n"
        for inner in top.body:
            begin = min([inner.lineno, *(d.lineno for d in getattr(inner, "decorator_list", []))])
            yield begin, inner.end_lineno or 0, "class _:\n", ""


def _of_part(
    source: str, first: int, left_out: list[tuple[tuple[int, int], tuple[int, int]]]
) -> Iterator[tuple[str, int, int, str]]:
    """(operator, from, to, instead) of every mutant of one statement; `first`: the line where it begins."""
    seen: set[str] = set()
    parsed = get_ast(source)
    nodes = list(ast_nodes(parsed))
    for name, _, operator in _operators({}):
        if not wanted(name):
            continue
        places = [span for node in nodes for span in operator.mutation_positions(node)]
        for occurrence, ((line, column), _) in enumerate(places):
            if any(low <= (line + first - 1, column) < high for low, high in left_out):
                continue
            code = mutate_code(source, operator, occurrence)
            if code is None or code == source or code in seen:
                continue
            try:
                compile(code, "mutant", "exec")
            except SyntaxError:
                continue
            seen.add(code)
            head = next(i for i, (a, b) in enumerate(zip(source + "\0", code + "\1", strict=False)) if a != b)
            tail = 0
            while tail < min(len(source), len(code)) - head and source[-1 - tail] == code[-1 - tail]:
                tail += 1
            yield name.rpartition("/")[2], head, len(source) - tail, code[head : len(code) - tail]


if __name__ == "__main__":
    json.dump([one for name in sys.argv[1:] for one in mutants(Path(name))], sys.stdout)
