"""One pytest session that tries mutants in forks (warm.py); started by __main__.py in a copy of the tree."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from mutation.warm import Warm, save

files, tests, work, out, longest, seconds = sys.argv[1:]
# The same examples every time, and none is looked for once one is found.
settings.register_profile(
    "mutants", derandomize=True, database=None, deadline=None, phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
settings.load_profile("mutants")
modules = {"hansa." + file.removesuffix(".py").replace("/", "."): Path(file) for file in json.loads(files)}
for name in modules:
    importlib.import_module(name)
results: list[dict[str, Any]] = []
began = time.monotonic()


def told(result: dict[str, Any]) -> None:
    """Keep and show it."""
    results.append(result)
    save(Path(out), results)
    if len(results) % 25 == 0:
        alive = sum(one["result"] not in ("killed", "timeout") for one in results)
        print(f"{len(results)} tried in {time.monotonic() - began:.0f} s, {alive} not noticed", flush=True)


plugin = Warm(modules, json.loads(Path(work).read_text()), float(longest), told, began + float(seconds))
save(Path(out), results)
pytest.main(
    [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-m",
        "not slow and not soak and not bench",
        "-o",
        "tmp_path_retention_policy=none",
        f"--basetemp={Path(work).parent / 'tmp'}",  # no other session's clearing up may fail these tests
        *json.loads(tests),
    ],
    plugins=[plugin],
)
