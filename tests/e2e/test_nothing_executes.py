"""Nothing that is read as data runs as code: settings, files, names; and no module of ours could do it."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from attack_support import (
    OPENERS,
    PAYLOADS,
    TASK,
)
from hansa.clients import app as app_module
from hansa.clients.models import load_kept
from hansa.clients.settings import load_settings as load_node
from hansa.common import tasks as tasks_module
from hansa.common.charter import SignedCharter
from hansa.common.config import load_config
from hansa.common.errors import HansaError, TaskError
from hansa.common.frames import Spooled
from hansa.common.identity import Identity, canonical, sha256
from hansa.common.ledger import read_ledger
from hansa.common.messages import from_bytes
from hansa.common.tasks import load_task, task_names
from hansa.common.tasks.schema import load_schema
from hansa.server.checkpoint import Checkpoint
from hansa.server.settings import load_settings as load_server
from hansa.server.status import read_status
from support import identity


@pytest.mark.parametrize("how", PAYLOADS)
def test_the_payloads_work(tmp_path: Path, how: str) -> None:
    """Whoever opens them the careless way is hit: so the tests below would see it."""
    OPENERS[how](PAYLOADS[how](tmp_path / how))
    assert (tmp_path / how).exists()


YAML = (
    "!!python/object/apply:os.system ['touch {marker}']",
    "!!python/object/new:os.system ['touch {marker}']",
    "!!python/object/apply:subprocess.Popen [['touch', '{marker}']]",
    "!!python/module:hansa_evil ''",
    "!!python/name:hansa_evil.task ''",
    "!!python/object:hansa_evil.Task {{}}",
)
READERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "federation.yaml": (load_config, "name: {}\n"),
    "node.yaml": (load_node, "federations:\n  - charter: {}\n    server: localhost:1\n"),
    "server.yaml": (load_server, "home: {}\n"),
    "schema.yaml": (load_schema, "features: {}\n"),
}


@pytest.mark.parametrize("file", READERS)
def test_settings_do_not_execute(tmp_path: Path, marker: Path, evil: str, file: str) -> None:
    reader, inside = READERS[file]
    for tag in YAML:
        text = tag.format(marker=marker)
        for whole in (text, inside.format(text), f"? {text}\n: 1\n", f"&a {text}", f"- {text}"):
            (tmp_path / file).write_text(whole)
            with pytest.raises(HansaError, match=file):
                reader(tmp_path / file)


def test_unsafe_yaml_would(tmp_path: Path) -> None:
    yaml.unsafe_load(YAML[0].format(marker=tmp_path / "made"))
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("how", PAYLOADS)
def test_files_do_not_execute(tmp_path: Path, marker: Path, how: str) -> None:
    """Whatever of ours is read from a disk, read as what it is."""
    payload = PAYLOADS[how](marker)
    path = tmp_path / "model.safetensors"
    path.write_bytes(payload)
    path.chmod(0o600)
    (tmp_path / "ledger.jsonl").write_bytes(payload + b"\n")
    (tmp_path / "model.pt").write_bytes(payload)
    readers: list[Callable[[Path], Any]] = [
        lambda p: load_kept(p, TASK),
        lambda p: load_kept(p.with_suffix(".pt"), TASK),
        SignedCharter.load,
        lambda p: read_ledger(p.with_name("ledger.jsonl")),
        read_status,
        Spooled.load,
        Checkpoint.load,
        lambda p: from_bytes(p.read_bytes()),
        lambda p: Identity.load("ada", p),
        load_config,
        load_node,
        load_server,
        load_schema,
    ]
    for read in readers:
        with pytest.raises(HansaError):
            read(path)
    # Where a hash stands before it, the hash is right.
    path.write_bytes(sha256(payload).encode() + b"\n" + payload)
    with pytest.raises(HansaError):
        Checkpoint.load(path)
    closing = {"v": 2, "run_id": "r", "charter_sha256": "c" * 64, "model_sha256": sha256(payload), "ledgers": []}
    about = {key: closing[key] for key in ("run_id", "charter_sha256", "model_sha256")}
    about |= {"task": TASK, "privacy": {}, "metrics": {}}
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "model.safetensors").write_bytes(payload)
    (kept / "closing.json").write_bytes(identity("x").seal("application/vnd.hansa.closing+json", canonical(closing)))
    (kept / "model.json").write_bytes(canonical(about))
    with pytest.raises(HansaError, match="not a file of tensors"):
        load_kept(kept)


def test_a_tasks_name_finds_only_what_is_installed(evil: str, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = tasks_module.importlib.import_module
    monkeypatch.setattr(tasks_module.importlib, "import_module", lambda name: asked.append(name) or real(name))
    tasks_module._load.cache_clear()
    for name in (evil, f"{evil}:task", "os", "hansa.common.cli", "../hansa_evil", "", "heart_disease", f"{TASK}\0"):
        with pytest.raises(TaskError, match="no task"):
            load_task(name)
    assert asked == []
    for name in task_names():
        load_task(name)
    assert set(asked) <= {f"hansa.common.tasks.{name.replace('-', '_')}" for name in task_names()}


HOUSE = Path(app_module.__file__).resolve().parent.parent
FLOORS = ("server", "clients", "common", "simulations")
MODULES = sorted(path for floor in FLOORS for path in (HOUSE / floor).rglob("*.py"))
RUNS_CODE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle", "runpy",
             "code", "codeop", "imp", "ctypes", "pkgutil"}  # fmt: skip
BUILT_IN = {"eval", "exec", "compile", "__import__"}
CALLS = {"torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "os.system", "os.popen",
         "np.memmap.load", "numpy.memmap.load", "builtins.eval", "builtins.exec"}  # fmt: skip
READS_YAML = {"load", "load_all", "compose", "compose_all", "parse", "scan"}
BY_NAME = {
    "common/tasks/__init__.py": {"importlib.import_module"},
    "common/tasks/scaffold.py": {"importlib.util.find_spec"},  # of the name that the user gives a new package
}
FINDS = {"common/tasks/__init__.py", "common/cli.py", "common/frontier_cli.py", "common/plan_cli.py"}
"""Who may look for entry points: in the groups hansa.tasks, hansa.commands and hansa.simulators, of installed packages."""


C_LIBRARY = {"simulations/libc.py"}
"""Who may call the C library: three functions, by names and numbers that are written there."""


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def faults(tree: ast.Module, where: str) -> list[str]:
    """What in a module could run what came with data."""
    found = []
    safe = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any("Loader" in dotted(base) for base in node.bases):
            found += [f"{node.name} is no SafeLoader" for base in node.bases if dotted(base) not in safe]
            safe.add(node.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            of = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            names = [a.name for a in node.names]
            risky = RUNS_CODE - {"ctypes"} if where in C_LIBRARY else RUNS_CODE
            found += [f"imports {name}" for name in of if name.split(".")[0] in risky]
            found += [f"imports {name} by its own name" for name in of if isinstance(node, ast.ImportFrom)
                      and name in ("yaml", "torch.serialization", "importlib", "importlib.util", "importlib.machinery",
                                   "builtins")]  # fmt: skip
            if "entry_points" in names and where not in FINDS:
                found.append("looks for entry points")
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        given = {k.arg: k.value for k in node.keywords}
        if (isinstance(node.func, ast.Name) and name in BUILT_IN) or name in CALLS:
            found.append(f"calls {name}")
        if name.startswith("importlib.") and name not in BY_NAME.get(where, ()):
            found.append(f"calls {name}")
        if name in ("np.load", "numpy.load", "np.lib.format.read_array") or name.endswith(".loadtxt"):
            pickled = given.get("allow_pickle")
            if pickled is not None and not (isinstance(pickled, ast.Constant) and pickled.value is False):
                found.append(f"calls {name} with pickles")
        head, _, last = name.rpartition(".")
        if head == "yaml" and last in READS_YAML and dotted(given.get("Loader", node)) not in safe:
            found.append(f"calls {name} with another loader than a safe one")
        if head == "yaml" and last.startswith(("unsafe_", "full_", "Loader", "UnsafeLoader", "FullLoader")):
            found.append(f"calls {name}")
    return found


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import ctypes",
        "from marshal import loads",
        "eval('1')",
        "exec(text)",
        "torch.load(path)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "from yaml import load",
        "class A(yaml.UnsafeLoader): pass\nyaml.load(text, Loader=A)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=maybe)",
        "importlib.import_module(name)",
        "from importlib import import_module",
        "from importlib.metadata import entry_points",
        "__import__(name)",
        "os.system(text)",
    ],
)
def test_the_static_check_sees_it(text: str) -> None:
    assert faults(ast.parse(text), "clients/node.py")


def test_no_module_runs_what_came_with_data() -> None:
    assert len(MODULES) > 60
    found = {}
    for path in MODULES:
        where = path.relative_to(HOUSE).as_posix()
        if bad := faults(ast.parse(path.read_text(encoding="utf-8")), where):
            found[where] = bad
    assert found == {}
    (registry,) = [path for path in MODULES if path.relative_to(HOUSE).as_posix() == "common/tasks/__init__.py"]
    calls = [n for n in ast.walk(ast.parse(registry.read_text())) if isinstance(n, ast.Call)]
    groups = [ast.literal_eval(k.value) for c in calls if dotted(c.func) == "entry_points" for k in c.keywords
              if k.arg == "group"]  # fmt: skip
    assert groups == ["hansa.tasks"] * 2
    assert [dotted(c.func) for c in calls].count("importlib.import_module") == 1
