"""The `hansa` command and the commands of this floor: charter, ledger, plan, task.

Each floor registers its own through the entry points `hansa.commands`. Exit codes: 0 fine, 1 the answer is no, 2 bad usage
or input, 130 stopped by Ctrl-C. Only members of the error tree are shown; anything else is a fault of ours and says so.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import unicodedata
from collections import Counter
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .accounting import Budget, PrivacyEvent, odometer
from .charter import SignedCharter, draft, in_words
from .config import Federation, load_config
from .errors import CharterError, ConfigError, HansaError, IdentityError, LedgerError, RunFailed
from .home import Home
from .identity import (
    PASSPHRASE,
    Identity,
    canonical,
    fingerprint,
    is_encrypted,
    key_from_pem,
    output_error,
    strict_json,
)
from .ledger import Entry, owner_line, read_ledger
from .plan import budget_of, calibrated, event_from, events_of, plan_of


class Format(StrEnum):
    """How a command reports."""

    TEXT = "text"
    JSON = "json"


FormatOption = Annotated[Format, typer.Option("--format", help="text for people, json for programs")]

out = Console(highlight=False, soft_wrap=True, emoji=False)


def main() -> None:
    """Entry point of the `hansa` script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; the exit code."""
    app = typer.Typer(
        name="hansa",
        help="Train one model together without pooling data, and prove what privacy it cost.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )
    for entry in sorted(entry_points(group="hansa.commands"), key=lambda e: e.name):
        entry.load()(app)
    try:
        code = app(arguments, standalone_mode=False, prog_name="hansa")
        if code == _CTRL_C:  # Typer makes an exit code of it
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as err:
        err.show()
        return 2
    except click.ClickException as err:
        err.show()
        return 2
    except click.Abort:
        return say("stopped", "", 1)
    except HansaError as err:
        return say(err.message, err.hint, err.exit_code)
    except KeyboardInterrupt:
        return say("stopped; a run goes on with --resume", "", _CTRL_C)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as err:
        if err.name is not None and err.name.split(".")[0] in _TRAINING_PACKAGES:
            return say(f"{err.name} is not installed", "This command trains: pip install 'hansa[train]'", 2)
        return _fault()
    except OSError as err:
        wrapped = output_error(Path(str(err.filename or "output")), err)
        return say(wrapped.message, wrapped.hint, wrapped.exit_code)
    except Exception:
        return _fault()


_CTRL_C = 130
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
    app.command("plan")(plan)


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
    from .tasks import code_sha256

    federation = load_config(config)
    if federation.partners is None:
        raise ConfigError(
            f"{config}: a population has no keys", "Only `hansa simulate` makes its charter; or name your partners."
        )
    found = {}
    for name in [*federation.partners, "coordinator"]:
        found[name] = public_key(keys / f"{name}.pem", f"Put the public key of {name} there, in PEM form.")
    coordinator = found.pop("coordinator")
    drafted = draft(
        federation,
        task_sha256=code_sha256(federation.task),
        coordinator_key=coordinator,
        partner_keys=found,
        noise_multiplier=calibrated(federation.algorithm, federation.privacy, federation.evaluation),
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
    """Check that everyone signed exactly this, and that it has not expired. Exit 1 when not.

    Example: hansa charter verify out/demo/charter.json
    """
    signed = SignedCharter.load(file)
    problem = None
    try:
        signed.verify(now=datetime.now(UTC))
    except CharterError as err:
        problem = err
    if form is Format.JSON:
        show_json({"sha256": signed.sha256, "valid": problem is None, "problem": problem.message if problem else None})
    elif problem is not None:
        say(f"{file}: {problem.message}", problem.hint, 1)
    else:
        out.print(plain(f"{file}: signed by {', '.join(signed.charter.keys())}; sha-256 {signed.sha256}"))
    return 0 if problem is None else 1


# -- plan ----------------------------------------------------------------------------------------------------------------


def plan(
    config: Annotated[Path, typer.Argument(help="the federation's YAML file")],
    ledger: Annotated[Path | None, typer.Option(help="a partner's ledger: count what is already spent")] = None,
    form: FormatOption = Format.TEXT,
) -> int:
    """Before any training: epsilon by rounds and noise, what the charter would allow, what would be left.

    Exit 1 when the plan does not fit the budget.

    Example: hansa plan federation.yaml
    """
    federation = load_config(config)
    report = planned(federation, ledger)
    if form is Format.JSON:
        show_json(report)
    else:
        _print_plan(federation, report)
    return 0 if report["fits"] else 1


def planned(federation: Federation, ledger: Path | None = None) -> dict[str, Any]:
    """The numbers of `hansa plan`: everything per partner, record level, add-or-remove-one, local noise.

    Raises:
        Refused: no noise is enough.
    """
    a, p = federation.algorithm, federation.privacy
    if p.kind == "none":
        return {"privacy": "none", "fits": True}
    assert p.delta is not None
    budget, spent, held = _taken_before(ledger, budget_of(p))
    before = [*spent, *held]
    sigma = calibrated(a, p, federation.evaluation, before)
    assert sigma is not None
    agreed = p.model_copy(update={"noise_multiplier": sigma})
    cost = events_of(plan_of(a, agreed, federation.evaluation))
    other = events_of(i for i in plan_of(a, agreed, federation.evaluation) if i.purpose != "train")
    steps, q = a.local.steps, a.local.sampling_rate

    def after(rounds: int, noise: float) -> dict[str, Any]:
        history = [*before, *other, PrivacyEvent(q, noise, steps * rounds)]
        return {
            "rounds": rounds,
            "noise_multiplier": noise,
            "epsilon_filter": budget.spent(history),
            "epsilon": odometer(history, budget.delta),
            "fits": budget.admits(history),
        }

    by_rounds = [
        after(r, sigma) for r in sorted({1, max(1, a.rounds // 4), max(1, a.rounds // 2), a.rounds, 2 * a.rounds})
    ]
    by_noise = [after(a.rounds, round(sigma * f, 4)) for f in (0.5, 0.75, 1.0, 1.5, 2.0) if sigma * f >= 0.3]
    whole = [*before, *cost]
    needed: list[dict[str, float | None]] = []
    for epsilon in (0.5, 1.0, 2.0, 4.0, 8.0):
        try:
            needed.append(
                {"epsilon": epsilon, "noise_multiplier": Budget.create(epsilon, p.delta).calibrate(q, steps * a.rounds)}
            )
        except HansaError:
            needed.append({"epsilon": epsilon, "noise_multiplier": None})
    return {
        "privacy": "local", "unit": "record", "adjacency": "add-or-remove-one", "noise": "local",
        "epsilon_cap": budget.epsilon, "delta": budget.delta, "noise_multiplier": sigma, "clip_norm": p.clip_norm,
        "sampling_rate": q, "steps_per_round": steps, "rounds": a.rounds,
        "epsilon_spent_before": budget.spent(spent), "epsilon_held_before": budget.spent(held),
        "epsilon_filter": budget.spent(whole), "epsilon": odometer(whole, budget.delta),
        "fits": budget.admits(whole),
        "rounds_that_fit": budget.most_steps(q, sigma, [*before, *other]) // steps,
        "rounds_left_after": max(0, budget.most_steps(q, sigma, whole) // steps) if budget.admits(whole) else 0,
        "by_rounds": by_rounds, "by_noise": by_noise, "noise_for_other_caps": needed,
    }  # fmt: skip


def _taken_before(ledger: Path | None, fresh: Budget) -> tuple[Budget, list[PrivacyEvent], list[PrivacyEvent]]:
    """The budget that will enforce the plan, what its dataset spent already, and what its open runs may still spend."""
    if ledger is None:
        return fresh, [], []
    entries, torn = read_ledger(ledger)
    if torn or not entries:
        what = f"torn last line ({len(torn)} bytes)" if torn else "empty"
        raise LedgerError(f"{ledger}: {what}", "Its node repairs it when it next starts; or give a whole copy.")
    if entries[0].body.get("role") != "partner":
        raise LedgerError(f"{ledger}: not a partner's ledger: {owner_line(entries[0])}", "Give a partner's ledger.")
    try:
        return _taken(ledger, entries, fresh)
    except (KeyError, TypeError, AttributeError, ValueError) as err:
        raise LedgerError(
            f"{ledger}: its entries are not what a node of Hansa writes", "Give a node's ledger."
        ) from err


def _taken(ledger: Path, entries: list[Entry], budget: Budget) -> tuple[Budget, list[PrivacyEvent], list[PrivacyEvent]]:
    spent: list[PrivacyEvent] = []
    left: dict[str, Counter[tuple[str, bytes]]] = {}  # run -> (purpose, event) -> how many, as in the node's gate
    for entry in entries:
        body = entry.body
        match entry.type:
            case "budget":
                budget = Budget.from_fields(body["budget"])
            case "hold":
                left[body["run_id"]] = Counter()
                for item in body["plan"]:
                    left[body["run_id"]][item["purpose"], canonical(item["event"])] += item["count"]
            case "debit":
                event = event_from(body["event"])
                if event is None:
                    raise RunFailed(
                        f"{ledger}: an unprotected run made this budget unbounded", "No finite epsilon holds for it."
                    )
                spent.append(event)
                if body["run_id"] in left:
                    left[body["run_id"]][body["purpose"], canonical(body["event"])] -= 1
            case "release":
                left.pop(body["run_id"], None)
            case _:
                pass
    kinds = [(event_from(strict_json(fields)), n) for run in left.values() for (_, fields), n in run.items()]
    held = [PrivacyEvent(e.sampling_rate, e.noise_multiplier, e.steps * n) for e, n in kinds if e is not None and n > 0]
    return budget, spent, held


def _print_plan(federation: Federation, report: dict[str, Any]) -> None:
    if report["privacy"] == "none":
        out.print(
            "privacy: none. Updates leave unprotected; epsilon is unbounded, for every partner, from the first round on."
        )
        return
    out.print(
        f"Each partner, record level, add-or-remove-one, local noise, delta {report['delta']:g}:\n"
        f"  {report['rounds']} rounds x {report['steps_per_round']} steps, sampling rate {report['sampling_rate']:g}, "
        f"noise multiplier {report['noise_multiplier']:g}, clipping norm {report['clip_norm']:g}\n"
        f"  epsilon {report['epsilon_filter']:.4f} by the filter that enforces the cap, {report['epsilon']:.4f} by the odometer (tight); "
        f"cap {report['epsilon_cap']:g}"
    )
    if report["epsilon_spent_before"]:
        out.print(f"  of which {report['epsilon_spent_before']:.4f} was spent before this run")
    if report["epsilon_held_before"]:
        out.print(f"  of which open runs still hold {report['epsilon_held_before']:.4f} (counted by itself)")
    if report["fits"]:
        out.print(f"  [green]fits[/]; {report['rounds_left_after']} more such round(s) would fit afterwards")
    else:
        out.print(
            f"  [red]does not fit[/]: {report['rounds_that_fit']} such round(s) fit. Fewer rounds, more noise, or a larger cap."
        )
    for title, rows in (("epsilon by rounds", report["by_rounds"]), ("epsilon by noise", report["by_noise"])):
        table = Table("rounds", "noise multiplier", "epsilon (filter)", "epsilon (odometer)", "", title=title, box=None,
                      title_justify="left", pad_edge=False)  # fmt: skip
        for row in rows:
            fits = "fits" if row["fits"] else "[red]refused[/]"
            table.add_row(
                str(row["rounds"]),
                f"{row['noise_multiplier']:g}",
                f"{row['epsilon_filter']:.4f}",
                f"{row['epsilon']:.4f}",
                fits,
            )
        out.print(table)
    table = Table("cap", "noise multiplier needed", title="the same rounds under other caps", box=None, title_justify="left",
                  pad_edge=False)  # fmt: skip
    for row in report["noise_for_other_caps"]:
        table.add_row(
            f"{row['epsilon']:g}",
            "no noise is enough" if row["noise_multiplier"] is None else f"{row['noise_multiplier']:g}",
        )
    out.print(table)


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
