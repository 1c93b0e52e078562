"""node.yaml: refused with its line when it asks for what does not exist, contradicts itself, or would loosen a charter."""

from __future__ import annotations

from datetime import time
from pathlib import Path

import pytest

from hansa.clients.settings import TEMPLATE, NodeSettings, SiteSettings, load_settings, window
from hansa.common.errors import ConfigError

ONE = 'federations:\n  - {charter: charter.json, server: "hub.example:8440"}\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "node.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_paths_start_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "n").mkdir()
    written(tmp_path / "n", ONE + "state: /var/lib/hansa\n")
    monkeypatch.chdir(tmp_path)
    found = load_settings(Path("n/node.yaml"))
    assert found.home == tmp_path / "n"
    assert found.federations[0].charter == tmp_path / "n" / "charter.json"
    assert found.ledger == Path("/var/lib/hansa/ledger.jsonl")


def test_what_stands_nowhere_is_the_strict_choice(tmp_path: Path) -> None:
    found = load_settings(written(tmp_path, ONE))
    assert (found.simulated, found.log, found.federations[0].proxy) == (False, "text", None)
    assert found.site == SiteSettings()
    assert (found.site.allow_unprotected, found.site.threads, found.site.minimum_cohort) == (False, 1, 1)


def test_the_template_is_a_good_file(tmp_path: Path) -> None:
    plain = TEMPLATE.format(charter="'c.json'", server="'hub:8440'")
    assert load_settings(written(tmp_path, plain)).federations[0].server == "hub:8440"
    every = "\n".join(line.replace("# ", "", 1) if line.startswith("  # ") else line for line in plain.splitlines())
    found = NodeSettings.model_fields.keys() | SiteSettings.model_fields.keys()
    assert all(f"{key}:" in every for key in found - {"simulated"}), "every setting is explained"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("federations: []\n", r"node\.yaml:1: federations: "),
        (ONE + "site: {hour: x}\n", r"node\.yaml:3: site\.hour: unknown key"),
        (ONE + "site: {}\nquorum: 1\n", r"node\.yaml:4: quorum: unknown key"),
        ("federations:\n- {charter: c, server: hub}\n", r"node\.yaml:2: federations\.0\.server: HOST:PORT"),
        ('federations:\n- {charter: c, server: "hub:0"}\n', r"federations\.0\.server: port 0"),
        ('federations:\n- {charter: c, server: "::1:8440"}\n', r"federations\.0\.server: HOST:PORT"),
        ('federations:\n- {charter: c, server: "h:1", proxy: "https://p"}\n', r"federations\.0\.proxy: http://"),
        (ONE + "  - {charter: charter.json, server: 'b:1'}\n", "a charter stands in it twice"),
        (ONE + "site: {hours: 20-06}\n", r"site\.hours: HH:MM-HH:MM"),
        (ONE + "site: {hours: '24:00-06:00'}\n", r"site\.hours: HH:MM-HH:MM"),
        (ONE + "site: {hours: '06:00-06:00'}\n", r"site\.hours: a window that is never"),
        (ONE + "site: {hours: 20:00}\n", r"site\.hours: Input should be a valid string"),
        (ONE + "site: {epsilon_cap: 0}\n", r"site\.epsilon_cap: "),
        (ONE + "site: {epsilon_cap: .inf}\n", r"site\.epsilon_cap: "),
        (ONE + "site: {epsilon_cap: 1.0, allow_unprotected: true}\n", "contradict each other"),
        (ONE + "site: {minimum_cohort: 0}\n", r"site\.minimum_cohort: "),
        (ONE + "site: {memory_mb: 100}\n", r"site\.memory_mb: "),
        (ONE + "site: {coordinators: []}\n", r"site\.coordinators: "),
        (ONE + "site: {coordinators: [hub]}\n", r"site\.coordinators\.0: an identity key"),
        (ONE + "site: {tasks: []}\n", r"site\.tasks: "),
        (ONE + "log: yaml\n", r"node\.yaml:3: log: "),
    ],
)
def test_refused_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_settings(written(tmp_path, text))


def test_no_file_says_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file") as caught:
        load_settings(tmp_path / "node.yaml")
    assert "hansa node init" in caught.value.hint


def test_a_coordinator_by_key_or_as_its_fingerprint_is_shown() -> None:
    shown = "6C66 4d08 d782 dd38 140f 51b1 6351 70d4 e47b 3e13"
    assert SiteSettings(coordinators=(shown,)).coordinators == (shown.replace(" ", "").lower(),)
    assert SiteSettings(coordinators=("ab" * 32,)).coordinators == ("ab" * 32,)


def test_hours() -> None:
    assert window("20:00-06:30") == (time(20), time(6, 30))
    for bad in ("8:00-09:00", "08:00", "08:00-9", "08:00-09:00-10:00", "08:60-09:00", "aa:bb-cc:dd"):
        with pytest.raises(ValueError, match="HH:MM"):
            window(bad)


@pytest.mark.parametrize("proxy", ['"https://u:hush@p"', '["http://u:hush@p"]', '[["http://u:hush@p"]]'])
def test_a_proxys_password_is_not_shown(proxy: str, tmp_path: Path) -> None:
    text = ONE.replace('"}', f'", proxy: {proxy}}}')
    with pytest.raises(ConfigError, match="proxy") as told:
        load_settings(written(tmp_path, text))
    assert "hush" not in f"{told.value} {told.value.hint}"
