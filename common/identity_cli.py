"""The commands `hansa identity`: keys that never leave their owner, certificates that admit a connection."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from .certificates import (
    PeerCertificate,
    RevocationList,
    check_chain,
    check_peer,
    read_certificate,
    read_endorsement,
    read_request,
    split_chain,
)
from .charter import SignedCharter
from .cli import Format, FormatOption, out, passphrase_for, plain, show_json
from .connection_ca import ConnectionCA
from .errors import CharterError, IdentityError, counted
from .home import Home
from .identity import PASSPHRASE, fingerprint, grouped, is_encrypted, key_from_pem, read_file, sha256, write_whole

HomeOption = Annotated[Path, typer.Option("--home", envvar="HANSA_HOME", help="the folder of your identity")]
CaOption = Annotated[Path, typer.Option("--ca", help="the coordinator's CA folder")]
YesOption = Annotated[bool, typer.Option("--yes", help="do not ask")]
PassphraseOption = Annotated[
    bool, typer.Option("--passphrase", help=f"ask for a passphrase to encrypt the keys (programs set {PASSPHRASE})")
]
LifetimeOption = Annotated[
    int, typer.Option("--days", min=1, max=3650, help="how long your identity key endorses the TLS key")
]


def commands(app: typer.Typer) -> None:
    """Register the group `identity`."""
    identity = typer.Typer(help="Your keys and certificates; private keys never leave you.", no_args_is_help=True)
    for command in (new, issue, install, show, verify, revoke, renew):
        identity.command(command.__name__)(command)
    app.add_typer(identity, name="identity")


def new(
    name: Annotated[str, typer.Option(help="your organisation as the charter will name it, or coordinator")],
    home: Annotated[
        Path | None, typer.Option(envvar="HANSA_HOME", help="the folder to make; ./NAME when not given")
    ] = None,
    days: LifetimeOption = 365,
    passphrase: PassphraseOption = False,
) -> None:
    """Make your identity key, your TLS key and a certificate request.

    Example: hansa identity new --name cleveland
    """
    secret = _new_passphrase(passphrase)
    made = Home.create(home or Path(name), name, days, secret)
    out.print(plain(f"{made.path}: the identity of {name}. Its private keys stay here; keep a backup of identity.key."))
    if not secret:
        out.print("  The keys are not encrypted, only closed to other users; --passphrase encrypts them.")
    out.print(f"  identity key {fingerprint(made.key())}")
    out.print(plain(f"Next: send {made.path / f'{name}.csr'} and {made.path / f'{name}.pem'} to the coordinator,"))
    out.print("and compare the fingerprint above by phone.")


def issue(
    request: Annotated[Path, typer.Argument(help="the NAME.csr of an organisation")],
    ca: CaOption = Path("ca"),
    to: Annotated[Path | None, typer.Option("--out", help="the file to write; ./NAME.crt when not given")] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="lifetime; never beyond the endorsement's")] = 90,
    passphrase: PassphraseOption = False,
    yes: YesOption = False,
) -> None:
    """Coordinator: sign a request, so that its owner's connections are admitted. Makes the CA on first use.

    Example: hansa identity issue cleveland.csr --ca ca
    """
    pem = read_file(request, "Give the NAME.csr that an organisation sent.")
    asked = read_request(pem)
    to = to or Path(f"{asked.name}.crt")
    if to.exists() and b"-----BEGIN CERTIFICATE-----" not in read_file(to, "Give another --out."):
        raise IdentityError(f"{to}: exists, and is not a certificate", "Give another --out.")
    authority = ConnectionCA.load(ca, passphrase_for(ca / "ca.key")) if ConnectionCA.exists(ca) else None
    _print(_of_request(pem))
    if authority is not None and _other_key(authority, asked.name, asked.endorsement.key):
        out.print(f"[bold yellow]Another identity key than before in the name {plain(asked.name)}.[/]")
    out.print(plain(f"Compare the identity key with {asked.name} by phone: it must be the one of its charter, too."))
    if not yes:
        typer.confirm("Issue a certificate?", abort=True)
    if authority is None:
        authority = ConnectionCA.create(ca, _new_passphrase(passphrase))
        out.print(plain(f"Made a new CA in {ca}: it admits connections, and nobody trusts it with more."))
    made = authority.issue(pem, days)
    write_whole(to, made)
    until = read_certificate(made).not_after
    out.print(plain(f"Written to {to}, valid until {until:%Y-%m-%d %H:%M} UTC. Send it to {asked.name}, who runs:"))
    out.print(plain(f"  hansa identity install {to.name}"))


def _other_key(authority: ConnectionCA, name: str, key: str) -> bool:
    return any(c.name == name and read_endorsement(c.endorsement).key != key for c in authority.issued())


def install(
    certificate: Annotated[Path, typer.Argument(help="the NAME.crt that the coordinator sent")],
    home: HomeOption = Path(),
) -> None:
    """Check a certificate against your keys and put it to use. Ends a renewal, too.

    Example: hansa identity install cleveland.crt --home cleveland
    """
    place = Home(home)
    pem = read_file(certificate, "Give the NAME.crt that the coordinator sent.")
    before = place.path / "ca.crt"
    old = read_file(before, "") if before.exists() else None
    # Both TLS keys have the passphrase of the identity key.
    found = place.install(pem, passphrase_for(place.tls_key if place.tls_key.exists() else place.pending_key))
    out.print(plain(f"{place.path}: installed the certificate of {found.name}, issued by {found.issuer}"))
    out.print(f"  valid until {found.not_after:%Y-%m-%d %H:%M} UTC; restart what runs with the old one")
    if old not in (None, place.ca_certificate()):
        out.print("  [bold yellow]issued by another CA than before:[/] peers of the old one will not admit it")


def show(
    path: Annotated[Path | None, typer.Argument(help=".csr, .crt, .pem or a home; your home when not given")] = None,
    home: HomeOption = Path(),
    form: FormatOption = Format.TEXT,
) -> None:
    """Show what an identity, a request or a certificate is: names, fingerprints, expiry.

    Example: hansa identity show cleveland.csr
    """
    path = path or home
    if path.is_dir():
        found = _of_home(Home(path))
    else:
        data = read_file(path, "Give a .csr, .crt or .pem file, or the folder of an identity.")
        try:
            found = _of_file(data)
        except IdentityError as err:
            raise IdentityError(f"{path}: {err.message}", err.hint) from err
    if form is Format.JSON:
        show_json(found)
    else:
        _print(found)


def verify(
    certificate: Annotated[Path, typer.Argument(help="the certificate of a peer")],
    charter: Annotated[Path, typer.Option(help="a charter file")],
    crl: Annotated[Path | None, typer.Option(help="the CA's revoked.crl")] = None,
    ca: Annotated[Path | None, typer.Option(help="the CA's certificate; the one in the file when not given")] = None,
    form: FormatOption = Format.TEXT,
) -> int:
    """Would this peer be admitted under this charter? Exit 1, with the reason, when not.

    Example: hansa identity verify hungary.crt --charter charter.json --crl ca/revoked.crl
    """
    signed = SignedCharter.load(charter)
    pem = read_file(certificate, "Give the NAME.crt of a peer.")
    found, now, problem = read_certificate(pem), datetime.now(UTC), None
    listed = read_file(crl, "Give the CA's revoked.crl, or leave --crl out.") if crl is not None else None
    ca_pem = read_file(ca, "Give the CA's ca.crt.") if ca is not None else None
    try:
        agreed = signed.verify(now)
        ca_pem = ca_pem or split_chain(pem)[1]
        check_chain(pem, ca_pem, now)
        check_peer(found, agreed.keys(), now, RevocationList.parse(listed, ca_pem) if listed is not None else None)
    except (IdentityError, CharterError) as err:
        problem = err
    if form is Format.JSON:
        why = problem.message if problem else None
        show_json({"admitted": problem is None, "name": found.name, "problem": why, "crl_checked": crl is not None})
        return 0 if problem is None else 1
    if problem is not None:
        out.print(f"[bold red]REFUSED[/] {plain(str(certificate))}: {plain(problem.message)}")
        if problem.hint:
            out.print(f"  {plain(problem.hint)}")
        return 1
    out.print(plain(f"{certificate}: admitted as {found.name}; its TLS key is endorsed by {found.name}'s identity key"))
    if crl is None:
        out.print("  not checked: whether it is revoked (give --crl)")
    if ca is None:
        out.print("  the CA is the one that the file brings; give --ca to check that it is yours")
    return 0


def revoke(
    which: Annotated[str, typer.Argument(metavar="NAME|SERIAL", help="whose certificates, or the serial of one")],
    ca: CaOption = Path("ca"),
    yes: YesOption = False,
) -> None:
    """Coordinator: no longer admit an organisation's certificates, or one of them.

    Example: hansa identity revoke cleveland --ca ca
    """
    authority = ConnectionCA.load(ca, passphrase_for(ca / "ca.key"))
    for found in authority.matching(which):
        out.print(plain(f"{found.name}, valid until {found.not_after:%Y-%m-%d}, serial {found.serial:x}"))
    if not yes:
        typer.confirm("Revoke?", abort=True)
    done = authority.revoke(which)
    out.print(
        plain(
            f"Revoked {counted(len(done), 'certificate')}: {ca / 'revoked.crl'}. Running servers that were given this"
        )
    )
    out.print("file notice when it changes; copy it to those on other machines.")


def renew(home: HomeOption = Path(), days: LifetimeOption = 365) -> None:
    """Make a new TLS key, endorsed by the same identity key, and a request for its certificate.

    Example: hansa identity renew --home cleveland
    """
    place = Home(home)
    again = place.pending_key.exists()
    place.renew(days, passphrase_for(place.identity_key))
    request = place.path / f"{place.name()}.csr"
    out.print(plain(f"Made a new TLS key. Send {request} to the coordinator and install what comes back."))
    if again:
        out.print("  It replaces a renewal that was not installed: a certificate for that one no longer fits.")
    out.print("Until then the old key and certificate stay in use. No new charter is needed.")


# -- what things are -------------------------------------------------------------------------------------------------


def _of_file(data: bytes) -> dict[str, Any]:
    if b"PRIVATE KEY-----" in data:
        raise IdentityError("a private key: there is nothing in it to show", "Never send it to anybody.")
    if b"-----BEGIN CERTIFICATE REQUEST-----" in data:
        return _of_request(data)
    if b"-----BEGIN CERTIFICATE-----" in data:
        return _of_certificate(read_certificate(data))
    key = key_from_pem(data)
    return {"kind": "public identity key", "identity_key": key, "identity_fingerprint": fingerprint(key)}


def _of_request(pem: bytes) -> dict[str, Any]:
    request = read_request(pem)
    said = request.endorsement
    return {
        "kind": "certificate request",
        "name": request.name,
        "identity_key": said.key,
        "identity_fingerprint": fingerprint(said.key),
        "tls_fingerprint": grouped(said.spki_sha256),
        "endorsed_until": f"{said.not_after:%Y-%m-%d %H:%M} UTC",
    }


def _of_certificate(found: PeerCertificate) -> dict[str, Any]:
    """`problem` is what the certificate says against itself; only a charter knows whether its identity key is right."""
    shown: dict[str, Any] = {
        "kind": "certificate",
        "name": found.name,
        "tls_fingerprint": grouped(found.spki_sha256),
        "serial": f"{found.serial:x}",
        "issuer": found.issuer,
        "valid_from": f"{found.not_before:%Y-%m-%d %H:%M} UTC",
        "valid_until": f"{found.not_after:%Y-%m-%d %H:%M} UTC",
        "certificate_sha256": found.fingerprint,
        "problem": None,
    }
    try:
        said = read_endorsement(found.endorsement) if found.endorsement else None
        if said is not None:
            shown["identity_key"] = said.key
            shown["identity_fingerprint"] = fingerprint(said.key)
            shown["endorsed_until"] = f"{said.not_after:%Y-%m-%d %H:%M} UTC"
        check_peer(found, {found.name: said.key if said else ""}, datetime.now(UTC), None)
    except IdentityError as err:
        shown["problem"] = err.message
    return shown


def _of_home(home: Home) -> dict[str, Any]:
    name, key = home.name(), home.key()
    installed = home.path / "tls.crt"
    shown: dict[str, Any] = {
        "kind": "identity",
        "name": name,
        "identity_key": key,
        "identity_fingerprint": fingerprint(key),
        "encrypted": is_encrypted(home.identity_key),
        "renewal_pending": home.pending_key.exists(),
        "certificate": _of_certificate(read_certificate(read_file(installed, ""))) if installed.exists() else None,
    }
    if installed.exists():
        shown["ca_certificate_sha256"] = sha256(home.ca_certificate())
    return shown


def _print(shown: dict[str, Any], indent: str = "") -> None:
    out.print(plain(f"{indent}{shown['kind']}{' of ' + shown['name'] if 'name' in shown else ''}"))
    for label, value in shown.items():
        if isinstance(value, dict):
            _print(value, indent + "  ")
        elif label not in ("kind", "name", "identity_key") and value is not None:
            word = {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value
            out.print(plain(f"{indent}  {label.replace('_', ' '):<22} {word}"))


def _new_passphrase(asked: bool) -> str | None:
    if given := os.environ.get(PASSPHRASE):
        return given
    if asked:
        return str(typer.prompt("New passphrase", hide_input=True, confirmation_prompt=True))
    return None
