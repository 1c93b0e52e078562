"""`hansa identity` and `hansa charter sign --home` as people use them: between a coordinator and its partners."""

from __future__ import annotations

import contextlib
import getpass
import io
import json
import sys
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from cryptography.hazmat.primitives.asymmetric import ec

from hansa.common import cli, identity_cli
from hansa.common.certificates import make_request, read_certificate, read_request
from hansa.common.charter import Charter, SignedCharter
from hansa.common.connection_ca import ConnectionCA
from hansa.common.home import Home
from hansa.common.identity import Identity, fingerprint

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    def expect(self, code: int) -> Result:
        assert self.code == code, f"exit code {self.code}, wanted {code}\n{self.out}{self.err}"
        assert "a fault in Hansa" not in self.err
        return self

    def says(self, *words: str) -> Result:
        flat = " ".join((self.out + self.err).split())
        for word in words:
            assert word in flat, f"{word!r} is not in:\n{self.out}{self.err}"
        return self

    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True)
class Entry:
    """The commands of this source tree, whatever is installed."""

    name: str
    module: Any

    def load(self) -> Any:
        return self.module.commands


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "entry_points", lambda group: [Entry("common", cli), Entry("identity", identity_cli)])
    for name in ("HANSA_HOME", "HANSA_PASSPHRASE"):
        monkeypatch.delenv(name, raising=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def call(*arguments: object, stdin: io.StringIO | None = None) -> Result:
    out, err, keyboard = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = stdin or io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.run([str(a) for a in arguments])
    finally:
        sys.stdin = keyboard
    return Result(code, out.getvalue(), err.getvalue())


def identity(*arguments: object, stdin: io.StringIO | None = None) -> Result:
    return call("identity", *arguments, stdin=stdin)


def typed(monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    """What somebody types without an echo; what is left of it."""
    left = list(words)
    monkeypatch.setattr(getpass, "getpass", lambda *_, **__: left.pop(0))
    return left


def charter(*names: str, **changes: Any) -> Path:
    """charter.json between the homes in this folder, signed by all."""
    homes = {name: Home(Path(name)) for name in names}
    now = datetime.now(UTC).replace(microsecond=0)
    made: dict[str, Any] = {
        "name": "test",
        "purpose": "",
        "task": {"name": "tiny", "code_sha256": "c" * 64},
        "coordinator": {"name": "coordinator", "key": homes["coordinator"].key()},
        "partners": [
            {"name": n, "key": h.key(), "declared_records": 40} for n, h in homes.items() if n != "coordinator"
        ],
        "algorithm": {"rounds": 3, "local": {"steps": 1, "optimizer": {"lr": 0.5}}},
        "privacy": {"kind": "none"},
        "evaluation": {"kind": "none"},
        "quorum": 1,
        "round_deadline_s": 60.0,
        "declared_tolerance": 0.1,
        "benefit": "Every partner receives the model.",
        "model_seed": 0,
        "created": now,
        "expires": now + timedelta(days=30),
        "simulated": True,
    }
    SignedCharter.unsigned(Charter.model_validate({**made, **changes})).save(Path("charter.json"))
    return Path("charter.json")


def onboard(*names: str) -> None:
    for name in names:
        identity("new", "--name", name).expect(0)
        identity("issue", f"{name}/{name}.csr", "--yes").expect(0)
        identity("install", f"{name}.crt", "--home", name).expect(0)


# -- help ------------------------------------------------------------------------------------------------------------


def test_every_command_shows_an_example() -> None:
    app = typer.Typer()
    identity_cli.commands(app)
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    commands = group.commands["identity"]
    assert isinstance(commands, click.Group)
    assert list(commands.commands) == ["new", "issue", "install", "show", "verify", "revoke", "renew"]
    for name in commands.commands:
        identity(name, "--help").expect(0).says(f"Example: hansa identity {name}")
    call("charter", "sign", "--help").expect(0).says("--home", "Example: hansa charter sign")
    call("charter", "new", "--help").expect(0).says("hansa identity new", "all keys are on one machine")


def test_the_entry_point_is_declared() -> None:
    declared = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]["hansa.commands"]
    assert declared["identity"] == f"{identity_cli.__name__}:commands"


# -- onboarding ------------------------------------------------------------------------------------------------------


def test_onboarding_and_the_end(tmp_path: Path) -> None:
    made = identity("new", "--name", "ada").expect(0)
    mine = fingerprint(Home(Path("ada")).key())
    made.says(mine, "send ada/ada.csr and ada/ada.pem to the coordinator", "by phone", "not encrypted")
    identity("new", "--name", "ada").expect(2).says("holds an identity", "never overwritten")
    identity("new", "--name", "coordinator", "--home", "hq", "--days", "20").expect(0)
    asked = identity("issue", "ada/ada.csr", stdin=io.StringIO("n\n")).expect(1)
    asked.says("certificate request of ada", mine, "tls fingerprint", "by phone", "stopped")
    assert not Path("ca").exists()
    assert not Path("ada.crt").exists()
    identity("issue", "ada/ada.csr", stdin=io.StringIO("y\n")).expect(0).says("Made a new CA in ca", "ada.crt")
    assert "Made a new CA" not in identity("issue", "hq/coordinator.csr", "--days", "900", "--yes").expect(0).out
    lasts = read_certificate(Path("coordinator.crt").read_bytes()).not_after - datetime.now(UTC)
    assert timedelta(days=19) < lasts < timedelta(days=20)

    identity("install", "coordinator.crt", "--home", "ada").expect(2).says(
        "a certificate of coordinator", "home of ada"
    )
    identity("install", "ada.crt", "--home", "ada").expect(0).says("installed the certificate of ada")
    identity("install", "coordinator.crt", "--home", "hq").expect(0)
    Path("hq").rename("coordinator")
    agreed = charter("ada", "coordinator")
    verify = ["verify", "ada.crt", "--charter", agreed]
    identity(*verify).expect(1).says("REFUSED", "not signed by ada, coordinator")
    call("charter", "sign", agreed, "--home", "ada", stdin=io.StringIO("y\n")).expect(0).says(f"You sign with {mine}")
    call("charter", "sign", agreed, "--home", "coordinator", "--yes").expect(0).says("Signed by everyone")
    identity(*verify).expect(0).says("admitted as ada", "give --crl", "give --ca")
    everything = [*verify, "--crl", "ca/revoked.crl", "--ca", "ca/ca.crt"]
    assert "give --" not in identity(*everything).expect(0).out
    assert identity(*everything, "--format", "json").expect(0).json() == {
        "admitted": True, "name": "ada", "problem": None, "crl_checked": True
    }  # fmt: skip

    asked = identity("revoke", "ada", stdin=io.StringIO("n\n")).expect(1).says("stopped")
    identity(*everything).expect(0)
    identity("revoke", "ada", "--yes").expect(0).says(
        "Revoked 1 certificate", "ca/revoked.crl", "notice when it changes"
    )
    identity(*everything).expect(1).says("REFUSED", "is revoked", "hansa identity renew")
    told = identity(*everything, "--format", "json").expect(1).json()
    assert (told["admitted"], "is revoked" in told["problem"]) == (False, True)
    identity("revoke", "ada", "--yes").expect(2).says("revoked already")
    identity("revoke", "ada", "--ca", "nowhere").expect(2).says("no CA here")


def test_a_renewal_needs_no_new_charter() -> None:
    onboard("ada", "coordinator")
    agreed = charter("ada", "coordinator")
    for home in ("ada", "coordinator"):
        call("charter", "sign", agreed, "--home", home, "--yes").expect(0)
    old = Home(Path("ada")).tls_key_pem()
    identity("renew", "--home", "ada").expect(0).says("ada/ada.csr", "stay in use", "No new charter")
    identity("renew", "--home", "ada", "--days", "9").expect(0).says("replaces a renewal that was not installed")
    assert identity("show", "ada", "--format", "json").expect(0).json()["renewal_pending"] is True
    assert Home(Path("ada")).tls_key_pem() == old
    identity("revoke", "ada", "--yes").expect(0)  # the old one was lost, say
    identity("issue", "ada/ada.csr", "--yes").expect(0)
    identity("install", "ada.crt", "--home", "ada").expect(0)
    assert Home(Path("ada")).tls_key_pem() != old
    identity("verify", "ada.crt", "--charter", agreed, "--crl", "ca/revoked.crl").expect(0)
    assert identity("show", "ada", "--format", "json").json()["renewal_pending"] is False


def test_the_home_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    identity("show").expect(2).says("no identity here", "hansa identity new")
    monkeypatch.setenv("HANSA_HOME", "place")
    identity("new", "--name", "ada").expect(0).says("place/ada.csr")
    identity("issue", "place/ada.csr", "--yes").expect(0)
    identity("install", "ada.crt").expect(0)
    assert identity("show", "--format", "json").expect(0).json()["certificate"]["problem"] is None
    monkeypatch.delenv("HANSA_HOME")
    monkeypatch.chdir("place")
    identity("renew").expect(0)


def test_a_change_of_identity_key_or_ca_is_said() -> None:
    onboard("ada")
    identity("new", "--name", "ada", "--home", "again").expect(0)
    identity("issue", "again/ada.csr", stdin=io.StringIO("n\n")).expect(1).says("Another identity key than before")
    assert "Another identity" not in identity("issue", "ada/ada.csr", "--yes").expect(0).out
    identity("issue", "ada/ada.csr", "--yes", "--ca", "other").expect(0)
    identity("install", "ada.crt", "--home", "ada").expect(0).says("another CA than before")


# -- refusals --------------------------------------------------------------------------------------------------------


def test_what_issue_refuses() -> None:
    onboard("ada", "ben")
    identity("issue", "nowhere.csr").expect(2).says("nowhere.csr: No such file")
    identity("issue", "ada.crt").expect(2).says("certificate request")
    identity("issue", "ada/ada.csr", "--yes", "--out", "ada/identity.key").expect(2).says("is not a certificate")
    identity("issue", "ada/ada.csr", "--days", "0").expect(2)
    # The coordinator's own key in ada's name: it can be issued, and is refused by everybody who has the charter.
    eve = Identity("ada", Identity.generate("eve")._private)
    Path("fake.csr").write_bytes(make_request(eve, ec.generate_private_key(ec.SECP256R1()), 9))
    identity("issue", "fake.csr", "--yes", "--out", "fake.crt").expect(0).says("Another identity key than before")
    identity("install", "fake.crt", "--home", "ada").expect(2).says("not endorsed by ada's identity key")
    onboard("coordinator")
    agreed = charter("ada", "ben", "coordinator")
    for home in ("ada", "ben", "coordinator"):
        call("charter", "sign", agreed, "--home", home, "--yes").expect(0)
    identity("verify", "fake.crt", "--charter", agreed).expect(1).says("not endorsed by ada's identity key")
    ConnectionCA.create(Path("other"))
    identity("verify", "ada.crt", "--charter", agreed, "--ca", "other/ca.crt").expect(1).says("was not issued by")
    identity("verify", "ada.crt", "--charter", agreed, "--crl", "other/revoked.crl").expect(1).says("did not sign")
    identity("verify", "ada.crt", "--charter", agreed, "--crl", "nowhere").expect(2).says("nowhere: No such file")
    identity("verify", "ada/ada.pem", "--charter", agreed).expect(2).says("not a certificate")
    identity("verify", "ada.crt", "--charter", "ada.crt").expect(2).says("not a charter")


def test_show_of_every_kind_of_file() -> None:
    onboard("ada")
    key = fingerprint(Home(Path("ada")).key())
    for path, kind in (
        ("ada/ada.csr", "certificate request of ada"),
        ("ada.crt", "certificate of ada"),
        ("ada/ada.pem", "public identity key"),
        ("ada", "identity of ada"),
    ):
        identity("show", path).expect(0).says(kind, f"identity fingerprint {key}")
        assert identity("show", path, "--format", "json").expect(0).json()["identity_fingerprint"] == key
    for path, words in (
        ("ada/identity.key", "a private key"),
        ("ada/identity.json", "ada/identity.json: not a public key"),
        ("ca/ca.crt", "ca/ca.crt: not a certificate of Hansa"),
        ("nowhere", "nowhere: No such file"),
        ("ca", "no identity here"),
    ):
        identity("show", path).expect(2).says(words)
    shown = identity("show", "ada.crt", "--format", "json").json()
    assert shown["serial"] == f"{read_certificate(Path('ada.crt').read_bytes()).serial:x}"


def test_names() -> None:
    for name in ("Ada", "../x", "a b"):
        identity("new", "--name", name).expect(2).says("not a name of an organisation")
    assert list(Path().iterdir()) == []


# -- passphrases -----------------------------------------------------------------------------------------------------


def test_a_passphrase_is_asked_for_and_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    left = typed(monkeypatch, "sesame", "sesam", "sesame", "sesame")  # a slip of the finger is asked again
    identity("new", "--name", "ada", "--passphrase", stdin=Terminal()).expect(0)
    assert left == []
    identity("renew", "--home", "ada").expect(2).says("encrypted", "HANSA_PASSPHRASE")  # nobody to ask
    typed(monkeypatch, "wrong")
    identity("renew", "--home", "ada", stdin=Terminal()).expect(2).says("this passphrase does not open it")
    assert not Home(Path("ada")).pending_key.exists()
    typed(monkeypatch, "sesame")
    identity("renew", "--home", "ada", stdin=Terminal()).expect(0)
    identity("issue", "ada/ada.csr", "--yes").expect(0)
    typed(monkeypatch, "sesame")
    identity("install", "ada.crt", "--home", "ada", stdin=Terminal()).expect(0)
    assert identity("show", "ada", "--format", "json").expect(0).json()["encrypted"] is True
    assert "sesame" not in identity("show", "ada").out


def test_programs_give_it_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANSA_PASSPHRASE", "sesame")
    onboard("ada", "coordinator")
    for path in ("ada/identity.key", "ada/tls.key", "ca/ca.key"):
        assert b"ENCRYPTED" in Path(path).read_bytes()
    agreed = charter("ada", "coordinator")
    sign = ["charter", "sign", agreed, "--yes"]
    call(*sign, "--home", "ada").expect(0)
    monkeypatch.setenv("HANSA_PASSPHRASE", "wrong")
    call(*sign, "--home", "coordinator").expect(2).says("this passphrase does not open it")
    identity("revoke", "ada", "--yes").expect(2).says("this passphrase does not open it")
    monkeypatch.delenv("HANSA_PASSPHRASE")
    call(*sign, "--home", "coordinator").expect(2).says("HANSA_PASSPHRASE")
    typed(monkeypatch, "sesame")
    call(*sign, "--key", "coordinator/identity.key", stdin=Terminal()).expect(0).says("Signed by everyone")


# -- charter sign ----------------------------------------------------------------------------------------------------


def test_who_signs_a_charter(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ada", "ben", "coordinator"):
        identity("new", "--name", name).expect(0)
    agreed = charter("ada", "coordinator")
    before = agreed.read_bytes()
    call("charter", "sign", agreed, "--yes").expect(2).says("nobody to sign as", "--home")
    call("charter", "sign", agreed, "--home", "ada", "--key", "ada/identity.key").expect(2).says("both given")
    call("charter", "sign", agreed, "--home", "ben", "--yes").expect(2).says("does not stand in this charter")
    call("charter", "sign", agreed, "--home", "nowhere").expect(2).says("no identity here", "hansa identity new")
    call("charter", "sign", agreed, "--home", "ada", stdin=io.StringIO("n\n")).expect(1).says(
        "CHARTER test", "by phone"
    )
    monkeypatch.setenv("HANSA_HOME", "ben")
    call("charter", "sign", agreed, "--yes").expect(2).says("ben's key")
    assert agreed.read_bytes() == before
    call("charter", "sign", agreed, "--key", "ada/identity.key", "--yes").expect(0)  # not the environment's
    monkeypatch.setenv("HANSA_HOME", "coordinator")
    call("charter", "sign", agreed, "--yes").expect(0).says("Signed by everyone")


def test_a_charter_that_calls_my_key_by_another_name() -> None:
    for name in ("ada", "coordinator"):
        identity("new", "--name", name).expect(0)
    other = [{"name": "ada-clinic", "key": Home(Path("ada")).key(), "declared_records": 40}]
    agreed = charter("ada", "coordinator", partners=other)
    call("charter", "sign", agreed, "--home", "ada", "--yes").expect(2).says(
        "calls your key ada-clinic", "that calls you ada"
    )


@pytest.mark.parametrize("simulated", [True, False])
def test_a_draft_with_the_public_keys_of_new_identities(simulated: bool) -> None:
    pytest.importorskip("torch", reason="the task's code is pinned: needs the extra 'train'")
    Path("keys").mkdir()
    for name in ("ada", "ben", "coordinator"):
        identity("new", "--name", name).expect(0)
        Path(name, f"{name}.pem").rename(Path("keys", f"{name}.pem"))
    Path("f.yaml").write_text(
        "name: small\ntask: heart-disease\npartners:\n"
        '  ada: {data: "package:heart-disease/cleveland.csv", declared_records: 240}\n'
        '  ben: {data: "package:heart-disease/hungary.csv", declared_records: 235}\n'
        "algorithm: {rounds: 1, local: {steps: 1, optimizer: {lr: 0.2}}}\n"
        "privacy: {kind: none}\nevaluation: {kind: none}\nquorum: 1\n"
    )
    new = ["charter", "new", "f.yaml", "--keys", "keys", *(["--simulated"] if simulated else [])]
    call(*new).expect(0).says("hansa charter sign charter.json --home HOME")
    drafted = SignedCharter.load(Path("charter.json")).charter
    assert drafted.simulated is simulated
    assert drafted.keys()["ben"] == read_request(Path("ben/ben.csr").read_bytes()).endorsement.key
