"""server.yaml: defaults, paths, and refusals that name their line."""

from __future__ import annotations

from pathlib import Path

import pytest

from hansa.common.errors import ConfigError
from hansa.server.settings import ServerSettings, load_settings


def written(folder: Path, text: str) -> Path:
    path = folder / "server.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_paths_start_at_the_files_folder_and_not_where_the_command_runs(tmp_path, monkeypatch):
    home = tmp_path / "coordinator"
    home.mkdir()
    written(home, "charter: agreed/charter.json\nrevoked: ca/revoked.crl\nstate: /var/lib/hansa\n")
    monkeypatch.chdir(tmp_path)
    settings = load_settings(Path("coordinator/server.yaml"))
    assert settings.home == home
    assert settings.charter == home / "agreed" / "charter.json"
    assert settings.revoked == home / "ca" / "revoked.crl"
    assert settings.ledger == Path("/var/lib/hansa/coordinator/ledger.jsonl")
    assert settings.model("r1") == Path("/var/lib/hansa/models/r1/model.safetensors")


def test_an_empty_mapping_is_a_whole_configuration(tmp_path):
    settings = load_settings(written(tmp_path, "{}\n"))
    assert (settings.listen, settings.wait_for_nodes_s, settings.uploads, settings.log) == (
        "0.0.0.0:8440",
        300.0,
        4,
        "text",
    )
    assert settings.revoked is None


@pytest.mark.parametrize("listen", ["0.0.0.0:8440", "127.0.0.1:0", "[::]:8440", "[::1]:1", "hansa.example.org:65535"])
def test_addresses(listen):
    assert ServerSettings(listen=listen).listen == listen


@pytest.mark.parametrize(
    "listen",
    ["8440", ":8440", "host", "host:", "host:port", "host:65536", "::1:8440", "[host]:1", "a b:1", "h:-1", "h:²"],
)
def test_addresses_that_are_none(tmp_path, listen):
    with pytest.raises(ConfigError, match=r"server\.yaml:2: listen: "):
        load_settings(written(tmp_path, f"log: json\nlisten: '{listen}'\n"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("state: s\nlisten_on: x\n", r"server\.yaml:2: listen_on: unknown key"),
        ("uploads: 0\n", r"server\.yaml:1: uploads: .*found 0"),
        ("wait_for_nodes_s: -1\n", r"server\.yaml:1: wait_for_nodes_s"),
        ("wait_for_nodes_s: .nan\n", r"server\.yaml:1: wait_for_nodes_s"),
        ("log: xml\n", r"server\.yaml:1: log"),
        ("home: a\nhome: b\n", "given twice"),
    ],
)
def test_what_is_wrong_is_refused_with_its_line(tmp_path, text, said):
    with pytest.raises(ConfigError, match=said):
        load_settings(written(tmp_path, text))


def test_no_file_says_what_is_enough_and_it_is(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_settings(tmp_path / "server.yaml")
    _, _, enough = caught.value.hint.partition("this is enough: ")
    assert load_settings(written(tmp_path, enough)).listen == "0.0.0.0:8440"
