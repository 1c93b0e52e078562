"""A pytest plugin: the tests are collected once, and every mutant is tried in a fork of that process, by the tests that reach its line.

In the fork the mutated functions get their new code in place, so whoever imported them has it; what a module does when it is imported
is tried by a new process instead (`cold` in __main__.py).
"""

from __future__ import annotations

import ast
import functools
import gc
import json
import os
import resource
import select
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

MEMORY = 6 * 1024**3


class Warm:
    """See above.

    Args:
        files: module name -> its file.
        mutants: from enumerate_mutants.py, those of functions.
        longest_s: tests that take longer are not used.
        told: called with every result.
        deadline: when to stop, by the monotonic clock.
    """

    def __init__(
        self,
        files: dict[str, Path],
        mutants: list[dict[str, Any]],
        longest_s: float,
        told: Callable[[dict[str, Any]], None],
        deadline: float,
    ) -> None:
        self.files, self.mutants, self.longest_s, self.told, self.deadline = files, mutants, longest_s, told, deadline
        self.lines: dict[str, set[tuple[str, int]]] = {}  # test -> (file, first line of a function that it calls)
        self._spans = {str(path): _outermost(path) for path in files.values()}
        self.took: dict[str, float] = {}
        self.left_out: list[str] = []
        self.kills: dict[str, int] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Instead of running the tests: once with a tracer, then for every mutant."""
        items = list(session.items)
        self._trace(items)
        chosen = [item for item in items if item.nodeid in self.lines]
        print(
            f"{len(chosen)} tests in {sum(self.took[i.nodeid] for i in chosen):.0f} s, {len(self.left_out)} left out",
            flush=True,
        )
        # Once more as mutants are tried, but with nothing changed: what fails then would notice everything.
        while by := self._unfounded(chosen):
            print(f"fails in a fork without any mutant, so it is left out: {by}", flush=True)
            chosen = [item for item in chosen if item.nodeid != by]
        for mutant in self.mutants:
            if time.monotonic() > self.deadline:
                break
            reach = [item for item in chosen if self._reaches(item.nodeid, mutant)]
            reach.sort(
                key=lambda item: (
                    -self.kills.get(item.nodeid, 0) / (self.took[item.nodeid] + 0.05),
                    self.took[item.nodeid],
                )
            )
            self.told(self._try(mutant, reach))
        if by := self._unfounded(chosen):
            raise SystemExit(f"{by} fails by now without any mutant: what it noticed it may not have noticed")
        return True

    def _unfounded(self, chosen: list[pytest.Item]) -> str:
        """The first test that fails in a fork though nothing is changed, if there is one."""
        nothing = {"file": next(iter(self._spans)), "at": 0, "to": 0, "text": ""}
        by = str(self._try(nothing, chosen).get("by", ""))  # none where no test is left
        if by != "survived" and by not in self.lines:
            raise SystemExit(f"the tests cannot be run in a fork: {by or 'too slow'}")
        return "" if by == "survived" else by

    def _reaches(self, test: str, mutant: dict[str, Any]) -> bool:
        """Whether it calls the outermost function around the mutant, or one inside of it."""
        first, last = self._spans[mutant["file"]].get(mutant["line"], (0, 0))
        return any(file == mutant["file"] and first <= line <= last for file, line in self.lines[test])

    def _trace(self, items: list[pytest.Item]) -> None:
        named = {str(path.resolve()): str(path) for path in self.files.values()}
        named |= {getattr(sys.modules.get(m), "__file__", "") or "": str(p) for m, p in self.files.items()}
        for number, item in enumerate(items):
            hit: set[tuple[str, int]] = set()

            # Calls only: to follow every line of a property test takes minutes.
            def call(frame: types.FrameType, event: str, _: Any, hit: set[tuple[str, int]] = hit) -> None:
                if frame.f_code.co_filename in named:
                    hit.add((named[frame.f_code.co_filename], frame.f_code.co_firstlineno))

            _clear()
            began = time.monotonic()
            sys.settrace(call)
            try:
                reports = runtestprotocol(
                    item, log=False, nextitem=items[number + 1] if number + 1 < len(items) else None
                )
            finally:
                sys.settrace(None)
            took = time.monotonic() - began
            if number % 50 == 49:
                print(f"{number + 1} of {len(items)} tests traced", flush=True)
            if any(report.failed for report in reports):
                print(f"fails without any mutant, so it is left out: {item.nodeid}", flush=True)
                self.left_out.append(item.nodeid)
            elif took > self.longest_s:
                self.left_out.append(item.nodeid)
            else:
                self.lines[item.nodeid], self.took[item.nodeid] = hit, took

    def _try(self, mutant: dict[str, Any], reach: list[pytest.Item]) -> dict[str, Any]:
        began = time.monotonic()
        if not reach:
            return {**mutant, "result": "no test reaches it", "seconds": 0.0, "tests": 0}
        limit = 5 + 4 * sum(self.took[item.nodeid] for item in reach)
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receive)
            os.setpgid(0, 0)
            os._exit(self._child(mutant, reach, send))
        os.close(send)
        ready, _, _ = select.select([receive], [], [], limit)
        said = b""
        if ready:
            while part := os.read(receive, 4096):
                said += part
        else:
            os.killpg(child, signal.SIGKILL)
        os.close(receive)
        _, status = os.waitpid(child, 0)
        late = not ready or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM)
        by = said.decode(errors="replace").strip()
        result = "timeout" if late else "survived" if by == "survived" else "killed"
        if result == "killed" and by:
            self.kills[by] = self.kills.get(by, 0) + 1
        return {
            **mutant,
            "result": result,
            "by": by,
            "seconds": round(time.monotonic() - began, 2),
            "tests": len(reach),
        }

    def _child(self, mutant: dict[str, Any], reach: list[pytest.Item], send: int) -> int:
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        said = b"(could not be imported)"
        try:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            replace(self.files, mutant)
            said = b"survived"
            for number, item in enumerate(reach):
                signal.alarm(int(4 + 10 * self.took[item.nodeid]))  # nothing handles it: the process ends
                following = reach[number + 1] if number + 1 < len(reach) else None
                if any(report.failed for report in runtestprotocol(item, log=False, nextitem=following)):
                    said = item.nodeid.encode()
                    break
        except BaseException as err:
            said = f"({type(err).__name__})".encode() if said == b"survived" else said
        os.write(send, said)
        return 0


def _outermost(path: Path) -> dict[int, tuple[int, int]]:
    """Line -> first and last line of the outermost function around it."""
    found: dict[int, tuple[int, int]] = {}

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            last = node.end_lineno or node.lineno
            found.update(dict.fromkeys(range(first, last + 1), (first, last)))
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def mutated(mutant: dict[str, Any], path: Path) -> str:
    """The whole file with the mutant in it."""
    source = path.read_text()
    return source[: mutant["at"]] + mutant["text"] + source[mutant["to"] :]


def replace(files: dict[str, Path], mutant: dict[str, Any]) -> None:
    """Give every function of the module its code from the mutated source."""
    name = next(module for module, path in files.items() if str(path) == mutant["file"])
    module = sys.modules[name]
    made = types.ModuleType(name)
    made.__dict__.update({k: module.__dict__[k] for k in ("__file__", "__spec__", "__package__", "__loader__")})
    exec(compile(mutated(mutant, files[name]), module.__file__ or name, "exec"), made.__dict__)
    old, new = dict(_functions(module, name)), dict(_functions(made, name))
    for place, function in old.items():
        if place in new:
            function.__code__ = new[place].__code__
            function.__defaults__, function.__kwdefaults__ = new[place].__defaults__, new[place].__kwdefaults__
    _clear()


def _clear() -> None:
    for cached in _caches():
        cached.cache_clear()


def _functions(holder: Any, name: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every function of a module and of its classes, unwrapped, by its place."""
    for key, value in list(vars(holder).items()):
        place = f"{prefix}{key}"
        if isinstance(value, type):
            if value.__module__ == name and not prefix.startswith(f"{key}."):
                yield from _functions(value, name, f"{place}.")
            continue
        parts = [value.fget, value.fset] if isinstance(value, property) else [value]
        for number, part in enumerate(parts):
            part = getattr(part, "__func__", part)
            if isinstance(part, functools.cached_property):
                part = part.func
            while hasattr(part, "__wrapped__"):
                part = part.__wrapped__
            if isinstance(part, types.FunctionType) and part.__module__ == name:
                yield f"{place}/{number}", part


@functools.cache
def _caches() -> list[Any]:
    return [one for one in gc.get_objects() if isinstance(one, functools._lru_cache_wrapper) and _ours(one)]


def _ours(one: Any) -> bool:
    return str(getattr(one, "__module__", "")).startswith("hansa.")


def save(path: Path, results: list[dict[str, Any]]) -> None:
    """All results so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1))
