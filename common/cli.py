"""The `hansa` command, what all commands share, and two groups of this floor: charter and task.

Each floor registers its own through the entry points `hansa.commands`. Exit codes: 0 fine, 1 the answer is no, 2 bad usage
or input, 130 stopped by Ctrl-C, 143 by SIGTERM, 141 the reader of the output went away. Only members of the error tree are shown; anything else is a fault of ours and says so.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from .charter import SignedCharter, draft, in_words
from .claims import CODES, Finding, Severity, lint_file, refused
from .config import load_config, without_system
from .errors import CTRL_C, STOPPED, TERMINATED, CharterError, ConfigError, HansaError, IdentityError
from .home import Home
from .identity import (
    PASSPHRASE,
    Identity,
    fingerprint,
    is_encrypted,
    key_from_pem,
    output_error,
)
from .plan import SOFTWARE, calibrated


class Format(StrEnum):
    """How a command reports."""

    TEXT = "text"
    JSON = "json"


FormatOption = Annotated[Format, typer.Option("--format", help="text for people, json for programs")]

out = Console(highlight=False, soft_wrap=True, emoji=False)


def application() -> typer.Typer:
    """The commands of every floor that is installed."""
    app = typer.Typer(
        name="hansa",
        help="Train one model together without pooling data, and prove what privacy it cost.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )
    app.callback()(_whole)
    for entry in sorted(entry_points(group="hansa.commands"), key=lambda e: e.name):
        entry.load()(app)
    return app


def run(arguments: list[str], app: typer.Typer | None = None) -> int:
    """Run one command line; the exit code."""
    app = app or application()
    try:
        code = app(arguments, standalone_mode=False, prog_name="hansa")
        if code == CTRL_C:  # Typer makes an exit code of it
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as err:
        err.show()
        return 2
    except click.ClickException as err:
        if "Did you mean" in err.message:  # Typer says it, and Click from 8.4 on, too
            vars(err)["possibilities"] = None
        err.show()
        return 2
    except click.Abort:
        return say("stopped", "", 1)
    except HansaError as err:
        return say(err.message, err.hint, err.exit_code)
    except KeyboardInterrupt:
        return say(STOPPED, "", CTRL_C)
    except SystemExit as err:
        if err.code == TERMINATED:
            return say(STOPPED, "", TERMINATED)
        if not isinstance(err.__context__, BrokenPipeError):
            raise
        return _READER_GONE  # rich makes a 1 of it, which would be taken for an answer
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _READER_GONE
    except ModuleNotFoundError as err:
        if err.name is not None and err.name.split(".")[0] in _TRAINING_PACKAGES:
            return say(f"{err.name} is not installed", "This command trains: pip install 'hansa[train]'", 2)
        return _fault()
    except OSError as err:
        wrapped = output_error(Path(str(err.filename or "output")), err)
        return say(wrapped.message, wrapped.hint, wrapped.exit_code)
    except Exception:
        return _fault()


def _version(asked: bool) -> None:
    if asked:
        out.print(SOFTWARE)
        raise typer.Exit


def _whole(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="which version this is")
    ] = False,
) -> None:
    pass


_READER_GONE = 141  # what a shell says of a process that SIGPIPE ended: no answer
_TRAINING_PACKAGES = {"torch", "flwr", "opacus", "numpy", "safetensors", "sklearn", "matplotlib"}


def say(message: str, hint: str, code: int) -> int:
    """A no or an error on standard error; returns the exit code."""
    err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
    err.print(f"[bold red]hansa:[/] {plain(message, lines=True)}")
    if hint:
        err.print(f"  {plain(hint, lines=True)}")
    return code


def _fault() -> int:
    """A bug: say so, and where the details are, without a wall of text that may hold record values."""
    path = Path.cwd() / "hansa-fault.log"
    try:
        path.unlink(missing_ok=True)  # an older one may be open to others
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(traceback.format_exc())
        where = f"The traceback is in {path} (it may hold data: look before you share it)."
    except OSError:
        where = "The traceback could not be written."
    return say("this is a fault in Hansa, not in what you did", where, 2)


def clean(text: str, lines: bool = False) -> str:
    """Text from a file or a peer without what could disguise it: control, bidirectional and invisible characters.

    Args:
        lines: it may have several lines.
    """
    return "".join(
        c if (lines and c in "\n\t") or (unicodedata.category(c)[0] != "C" and c not in "\u2028\u2029") else "\ufffd"
        for c in text
    )


def plain(text: str, lines: bool = False) -> str:
    """`clean` text that rich prints as it is."""
    return escape(clean(text, lines))


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show on the error stream, where that is a terminal, that something takes a while: `told(done, total, what)` moves the bar."""
    console = Console(stderr=True, highlight=False, emoji=False)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as shown:
        bar = shown.add_task(plain(what), total=None)

        def told(done: int, total: int, what: str) -> None:
            shown.update(bar, completed=done, total=total, description=plain(what))

        yield told


def show_json(value: Any) -> None:
    """Print a value for programs."""
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")


def passphrase_for(key: Path) -> str | None:
    """The passphrase of a key file: from the environment (HANSA_PASSPHRASE), or asked for where the file needs one.

    None where there is nobody to ask; reading the key then says what to do.
    """
    if given := os.environ.get(PASSPHRASE):
        return given
    if is_encrypted(key) and sys.stdin.isatty():
        return str(typer.prompt(f"Passphrase of {clean(str(key))}", hide_input=True))
    return None


def commands(app: typer.Typer) -> None:
    """Register this floor's commands."""
    charter = typer.Typer(help="Draft, read, sign and check the agreement.", no_args_is_help=True)
    charter.command("new")(charter_new)
    charter.command("show")(charter_show)
    charter.command("sign")(charter_sign)
    charter.command("verify")(charter_verify)
    task = typer.Typer(help="Your own data and model.", no_args_is_help=True)
    task.command("new")(task_new)
    task.command("check")(task_check)
    task.command("list")(task_list)
    app.add_typer(charter, name="charter")
    app.add_typer(task, name="task")


# -- charter -------------------------------------------------------------------------------------------------------------


def charter_new(
    config: Annotated[Path, typer.Argument(help="the federation's YAML file")],
    keys: Annotated[
        Path, typer.Option(help="folder with NAME.pem, the public key of each partner, and coordinator.pem")
    ],
    to: Annotated[Path, typer.Option("--out", help="the file to write")] = Path("charter.json"),
    simulated: Annotated[
        bool, typer.Option("--simulated", help="for demos and tests: all keys are on one machine")
    ] = False,
) -> None:
    """Draft a charter from a configuration and everyone's public keys.

    Each partner makes its keys with `hansa identity new --name NAME` and sends NAME.pem; you make those of the
    coordinator with `hansa identity new --name coordinator`.

    Example: hansa charter new federation.yaml --keys keys/ --out charter.json
    """
    from .tasks import code_sha256, sized

    federation = load_config(config)
    if federation.partners is None:
        raise ConfigError(
            f"{config}: a population has no keys", "Only `hansa simulate` makes its charter; or name your partners."
        )
    without_system(federation, config)
    federation = sized(federation)
    found = {}
    for name in [*(federation.partners or {}), "coordinator"]:
        found[name] = public_key(keys / f"{name}.pem", f"Put the public key of {name} there, in PEM form.")
    coordinator = found.pop("coordinator")
    drafted = draft(
        federation,
        task_sha256=code_sha256(federation.task),
        coordinator_key=coordinator,
        partner_keys=found,
        noise_multiplier=calibrated(federation),
        simulated=simulated,
    )
    signed = SignedCharter.unsigned(drafted)
    if to.exists():
        raise ConfigError(f"{to}: exists", "Give another --out; a charter is never overwritten.")
    signed.save(to)
    out.print(plain(in_words(signed), lines=True))
    out.print(plain(f"\nWritten to {to}. Everyone signs it: hansa charter sign {to} --home HOME", lines=True))


def public_key(path: Path, hint: str) -> str:
    """The key in a PEM file, or an error with this hint."""
    try:
        return key_from_pem(path.read_bytes())
    except OSError as err:
        raise IdentityError(f"{path}: {err.strerror}", hint) from err
    except IdentityError as err:
        raise IdentityError(f"{path}: {err.message}", err.hint or hint) from err


def charter_show(
    file: Annotated[Path, typer.Argument(help="a charter file")], form: FormatOption = Format.TEXT
) -> None:
    """Show in words what a charter agrees to.

    Example: hansa charter show out/demo/charter.json
    """
    signed = SignedCharter.load(file)
    if form is Format.JSON:
        missing = signed.missing()
        done = sorted(set(signed.charter.keys()) - set(missing))
        show_json({"sha256": signed.sha256, "charter": json.loads(signed.payload), "signed": done, "missing": missing})
        return
    out.print(plain(in_words(signed), lines=True))


def charter_sign(
    file: Annotated[Path, typer.Argument(help="a charter file; your signature is added to it")],
    key: Annotated[Path | None, typer.Option(help="your private identity key (PEM, mode 0600)")] = None,
    home: Annotated[
        Path | None, typer.Option(help="instead of --key: the folder of your identity; else $HANSA_HOME")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Read a charter in words, compare fingerprints, and sign it.

    Example: hansa charter sign charter.json --home cleveland
    """
    signed = SignedCharter.load(file)
    identity = _signer(signed, key, home)
    out.print(plain(in_words(signed), lines=True))
    out.print("\nCompare every fingerprint above with its owner by phone before you sign.")
    out.print(f"You sign with {fingerprint(identity.key)}")
    made = signed.sign(identity)
    if not yes:
        typer.confirm("Sign?", abort=True)
    made.save(file)
    missing = made.missing()
    out.print("Signed. " + (plain(f"Still to sign: {', '.join(missing)}") if missing else "Signed by everyone now."))


def _signer(signed: SignedCharter, key: Path | None, home: Path | None) -> Identity:
    if key is not None and home is not None:
        raise IdentityError("--key and --home are both given", "Give one of them.")
    if key is not None:
        return Identity.load(key.stem, key, passphrase_for(key))
    where = home or (Path(os.environ["HANSA_HOME"]) if os.environ.get("HANSA_HOME") else None)
    if where is None:
        raise IdentityError("nobody to sign as", "Give --home HOME (the folder of `hansa identity new`) or --key KEY.")
    identity = Home(where).identity(passphrase_for(Home(where).identity_key))
    called = {key: name for name, key in signed.charter.keys().items()}.get(identity.key)
    if called not in (None, identity.name):  # its certificates are in its own name: no peer would admit them
        raise CharterError(
            f"this charter calls your key {called}; your identity is {identity.name}",
            f"Ask for a charter that calls you {identity.name}.",
        )
    return identity


def charter_verify(
    file: Annotated[Path, typer.Argument(help="a charter file")], form: FormatOption = Format.TEXT
) -> int:
    """Check that everyone signed exactly this, that it has not expired, and that what it claims is differential privacy.

    Exit 1 when not. What a finding means is in docs/claims.md.

    Example: hansa charter verify out/demo/charter.json
    """
    findings = lint_file(file)
    wrong = refused(findings)
    signed, problem = None, None
    try:
        signed = SignedCharter.load(file)
        signed.verify(now=datetime.now(UTC))
    except CharterError as err:
        if signed is None and not wrong:
            raise
        problem = err  # of a file of another tool, or an edited one: what is wrong with its claims is shown as well
    valid = problem is None and not wrong
    if form is Format.JSON:
        show_json(
            {
                "sha256": signed.sha256 if signed else None,
                "valid": valid,
                "problem": problem.message if problem else None,
                "findings": [f.to_fields() for f in findings],
            }
        )
        return 0 if valid else 1
    print_findings(file, findings)
    if problem is not None:
        say(
            f"{file}: {problem.message}" if signed else problem.message, problem.hint, 1
        )  # loading names the file itself
    elif signed is not None and not wrong:
        out.print(plain(f"{file}: signed by {', '.join(signed.charter.keys())}; sha-256 {signed.sha256}"))
    return 0 if valid else 1


def print_findings(file: Path, findings: Sequence[Finding]) -> None:
    """What is wrong or doubtful in a file's claims: refusals on the error stream, flags on the screen."""
    screen = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False) if refused(findings) else out
    for f in findings:
        code = CODES[f.code]
        where = str(file) + (f":{f.line}" if f.line is not None else "") + (f": {f.path}" if f.path else "")
        verdict = "[bold red]refused[/]" if f.severity is Severity.REFUSE else "[yellow]flag[/]"
        screen.print(f"{verdict} {f.code}  {plain(where)}: {plain(f.what)}")
        screen.print(plain(f"  why     {code.why}\n  source  {code.source}\n  do      {code.do}", lines=True))
    if findings:
        screen.print("Each code is explained in docs/claims.md.")


# -- task ----------------------------------------------------------------------------------------------------------------


def task_new(
    name: Annotated[str, typer.Argument(help="lowercase letters, digits, hyphens")],
    folder: Annotated[Path, typer.Option("--out", help="where to put the package")] = Path(),
) -> None:
    """Write a small package for your own data and model.

    Example: hansa task new stroke-risk
    """
    from .tasks.scaffold import scaffold

    made = scaffold(name, folder)
    out.print(plain(f"Written to {made}. Next: edit its schema.yaml and model, then: pip install -e {made}"))
    out.print("The steps are in docs/your-own-task.md.")


def task_check(
    name: Annotated[str, typer.Argument(help="an installed task")],
    file: Annotated[Path, typer.Argument(help="a CSV file")],
    form: FormatOption = Format.TEXT,
) -> None:
    """Check a data file against a task's schema and its model, on your own screen.

    Example: hansa task check heart-disease cleveland.csv
    """
    from .tasks import check_model, code_sha256, load_task
    from .tasks.schema import TableSchema, parse_table

    task = load_task(name)
    if not isinstance(task.schema, TableSchema):
        raise ConfigError(f"task {name} takes arrays, not a table", "Only tasks with a table schema read CSV files.")
    check_model(task)
    table = parse_table(file, task.schema)
    classes = {label: int((table.y == index).sum()) for index, label in enumerate(task.classes)}
    found = {
        "task": name,
        "code_sha256": code_sha256(name),
        "rows": len(table.y),
        "features": int(table.x.shape[1]),
        "classes": classes,
        "missing": table.missing,
        "ignored_columns": list(table.ignored),
    }
    if form is Format.JSON:
        show_json(found)
        return
    out.print(plain(f"{file}: {found['rows']} rows fit the schema of {name}; {found['features']} features"))
    out.print(plain("  classes: " + ", ".join(f"{label} {count}" for label, count in classes.items())))
    if missing := {column: count for column, count in table.missing.items() if count}:
        out.print(plain("  missing cells: " + ", ".join(f"{column} {count}" for column, count in missing.items())))
    if table.ignored:
        out.print(f"  [yellow]columns that the schema does not name, not used:[/] {plain(', '.join(table.ignored))}")
    out.print(f"  task code {found['code_sha256']}")


def task_list(form: FormatOption = Format.TEXT) -> None:
    """List installed tasks.

    Example: hansa task list
    """
    from .tasks import code_sha256, load_task, task_names

    rows = [(name, load_task(name).title, code_sha256(name)) for name in task_names()]
    if form is Format.JSON:
        show_json([{"name": n, "title": t, "code_sha256": c} for n, t, c in rows])
        return
    for name, title, code in rows:
        out.print(f"{plain(f'{name:<20} {title}')}  [dim]{code[:16]}[/]")
