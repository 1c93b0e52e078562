"""The commands of this floor: demo, simulate and network. Torch and Flower are imported only when one of them runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from enum import StrEnum
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..common import verifier
from ..common.audit_cli import print_verdict
from ..common.charter import in_words
from ..common.cli import Format, FormatOption, clean, plain, show_json
from ..common.config import Federation, load_config, located
from ..common.errors import ConfigError, OutputError, Refusal, RunFailed

if TYPE_CHECKING:
    from .federation import Simulation
    from .network import LocalNetwork

_console = Console(highlight=False, soft_wrap=True, emoji=False)


class Engine(StrEnum):
    """Who runs a simulation's partners; see `federation.Simulation`."""

    NODES = "nodes"
    COHORT = "cohort"
    RAY = "ray"


def commands(app: typer.Typer) -> None:
    """Register this floor's commands."""
    app.command("demo")(demo)
    app.command("simulate")(simulate)
    app.command("network")(network)


def demo(
    folder: Annotated[Path, typer.Option("--out", help="where to write the bundle")] = Path("out/demo"),
    form: FormatOption = Format.TEXT,
) -> int:
    """The main job: four hospitals sign a charter, train one model privately, and the bill verifies.

    An earlier demo in the same folder is replaced.

    Example: hansa demo --out out/demo
    """
    console = _console if form is Format.TEXT else Console(stderr=True, quiet=True)
    _doing("preparing", console)
    from .federation import Simulation

    began = time.perf_counter()
    with as_file(files("hansa.configs") / "heart.yaml") as path:
        config = load_config(path)
    console.rule("1. Identities and charter", align="left")
    display = _display(console)
    console.print("making keys for four hospitals and a coordinator; drafting the charter; all five sign it")
    simulation = Simulation(config, Path(), folder, notify=display.notify, kind="demo")
    try:
        console.print(plain(in_words(simulation.signed), lines=True))
        console.rule("2. Training", align="left")
        outcome, timings = _train(simulation, display)
        console.rule("3. A second run that the remaining budget cannot pay", align="left")
        asked = simulation.roster[0]
        second = simulation.run(simulation.another_run(), only=[asked])
        _must_be_refused(second.refusals, asked)
        console.print(f"{plain(asked)} read no data for it; the refusal is in its ledger.")
        console.rule("4. Baselines (only a simulation can have them)", align="left")
        result = _finish(simulation, outcome, [*outcome.refusals, *second.refusals], timings, True, console)
    finally:
        simulation.close()
    console.rule("5. Audit, from bytes and public keys alone", align="left")
    verdict = verifier.verify_bundle(folder)
    if form is Format.TEXT:
        print_verdict(verdict)
    from .report import write_report

    result["timings"]["total_s"] = time.perf_counter() - began
    _save(folder, result)
    write_report(folder / "report.html", result, verdict, in_words(simulation.signed))
    if form is Format.JSON:
        show_json({"result": result, "verdict": verdict})
    console.rule("6. Written", align="left")
    console.print(plain(f"{folder}/report.html   a page for people; {folder}/ is the bundle that an auditor gets"))
    console.print(plain(f"{simulation.private}/   private keys and node state; never part of the bundle"))
    console.print(plain(f"Check it again: hansa audit {folder}") + f"     {time.perf_counter() - began:.1f} s")
    return 0 if verdict["verified"] else 1


def simulate(
    config: Annotated[Path, typer.Argument(help="the federation's YAML file")],
    folder: Annotated[Path | None, typer.Option("--out", help="where to write; default out/CONFIG")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run that was stopped or killed")] = False,
    with_baselines: Annotated[
        bool, typer.Option("--baselines", help="also pooled, each alone, and without privacy")
    ] = False,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=1000, help="repeat with this many seeds")] = 1,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            metavar="KEY=VALUE,VALUE,...",
            help="run at each of these values of a key of the file, by its dotted path; given several times: at every combination",
        ),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="say where a round's time went")] = False,
    engine: Annotated[
        Engine | None,
        typer.Option(
            "--engine",
            help="nodes: keys, gate and ledger for each partner (up to 100; default there). cohort: one ledger, and many clients of a "
            "population computed at once (default above). ray: the same on Flower's simulation runtime, on this machine or a Ray cluster",
        ),
    ] = None,
    execution: Annotated[
        Path | None,
        typer.Option(
            "--execution", help="a plan for cohort, as result.json has one: without noise its model repeats bit by bit"
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", min=0, max=1024, help="processes beside this one for cohort; default: what is fastest"
        ),
    ] = None,
    form: FormatOption = Format.TEXT,
) -> int:
    """Run a federation on this machine, with real keys, charter, gates and ledgers, and audit it.

    A sweep, or several seeds, is a run each in a folder of its own, and a table of all of them: sweep.csv, sweep.json, sweep.png.

    Example: hansa simulate configs/heart.yaml --baselines --seeds 10 --out out/heart

    Example: hansa simulate configs/fashion-clients.yaml --engine cohort --workers 2 --profile

    Example: hansa simulate configs/heart.yaml --sweep privacy.epsilon=0.5,1,2,8 --sweep algorithm.rounds=5,10 --seeds 5
    """
    target = folder or Path("out") / config.stem
    console = _console if form is Format.TEXT else Console(stderr=True, quiet=True)
    how: dict[str, Any] = {"engine": engine.value if engine is not None else "", "workers": workers}
    if execution is not None:
        from .execution import load_execution

        how["execution"] = load_execution(execution)
    if seeds > 1 or sweep:
        return _sweep(config, target, sweep or [], seeds, resume, with_baselines, profile, console, form, how)
    federation = load_config(config)
    try:
        result, verdict = _one(
            federation, config.parent, target, resume, with_baselines, console, profile=profile, how=how
        )
    except ConfigError as err:
        raise located(config, err) from err
    if form is Format.JSON:
        show_json({"result": result, "verdict": verdict})
    else:
        print_verdict(verdict)
        console.print(plain(f"written to {target}; a page for people: {target}/report.html"))
    if not result["rounds"]:
        raise _refused(config, target)
    return 0 if verdict["verified"] else 1


def network(
    config: Annotated[
        Path | None, typer.Argument(help="the federation's YAML file; default: four hospitals, heart disease")
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="where everyone works; an earlier network is replaced")] = Path(
        "out/network"
    ),
    form: FormatOption = Format.TEXT,
) -> int:
    """A coordinator and a node a partner as processes of their own, over mutual TLS on loopback: from keys to audit.

    Every command that an organisation would really use is shown before it runs.

    Example: hansa network configs/heart.yaml --out out/network
    """
    from .network import COORDINATOR, LocalNetwork

    console = _console if form is Format.TEXT else Console(stderr=True, quiet=True)
    began = time.perf_counter()
    seconds = {}
    with as_file(files("hansa.configs") / "heart.yaml") as packaged:
        net = LocalNetwork(config or packaged, folder, say=lambda text: console.print(plain(text, lines=True)))
        with net:
            console.rule("1. Identities, charter, data", align="left")
            net.set_up()
            console.rule("2. Training", align="left")
            net.start_server()
            net.ready(120)
            console.print(plain(net.commands((n, "node", "check", "node.yaml") for n in net.partners)[0], lines=True))
            seconds["set up"] = time.perf_counter() - began
            for name in net.partners:
                net.start_node(name)
            seconds |= _follow(net, console)
            if code := net.wait(60):
                raise RunFailed(
                    f"the server ended with exit code {code}\n{net.log(COORDINATOR)[-2000:]}",
                    f"What every process said is in {folder}/logs.",
                )
            net.stop()
            console.rule("3. The model at every partner", align="left")
            models = net.models()
            for name, told in models.items():
                console.print(plain(f"{name}: sha-256 {told['sha256']}, signed for by everyone: {told['verified']}"))
            console.rule("4. Audit, from bytes and public keys alone", align="left")
            bundle = net.bundle()
    console.print(plain(f"$ hansa audit {bundle}"))
    verdict = verifier.verify_bundle(bundle)
    seconds["all"] = time.perf_counter() - began
    if form is Format.JSON:
        show_json({"verdict": verdict, "models": models, "seconds": seconds})
    else:
        print_verdict(verdict)
        console.print(plain(", ".join(f"{what} {value:.1f} s" for what, value in seconds.items())))
        console.print(
            plain(f"everyone's folder and {folder}/logs stay; docs/partner-nodes.md walks through these commands")
        )
    same = len({told["sha256"] for told in models.values()}) == 1 and all(told["verified"] for told in models.values())
    return 0 if verdict["verified"] and same else 1


def _follow(net: LocalNetwork, console: Console) -> dict[str, float]:
    """Show what the server says until it ends; seconds until all were connected, and from then on."""
    from .network import COORDINATOR

    began = time.perf_counter()
    connected: float | None = None
    shown, living = 0, True
    while living:
        living = net.runs(COORDINATOR)
        lines = net.log(COORDINATOR).splitlines(keepends=True)
        for line in lines[shown:] if not lines or lines[-1].endswith("\n") else lines[shown:-1]:
            console.print(plain(line.rstrip("\n")))
            shown += 1
        status = net.status()
        if connected is None and status is not None and status["phase"] not in ("starting", "waiting for partners"):
            connected = time.perf_counter()
        time.sleep(0.05)
    return {
        "start-up": (connected or began) - began,
        "training and closing": time.perf_counter() - (connected or began),
    }


def _must_be_refused(refusals: list[Any], partner: str) -> None:
    """Raise RunFailed unless this partner refused for its budget: fewer answers than a quorum alone prove nothing."""
    if not any((r.partner, r.reason) == (partner, Refusal.BUDGET.value) for r in refusals):
        raise RunFailed(f"{partner} did not refuse a run that its budget cannot pay", "This is a fault in Hansa.")


def _refused(config: Path, folder: Path) -> RunFailed:
    return RunFailed(
        f"{folder}: nothing was trained: too few partners accepted the run; their reasons are in result.json",
        f"When the budget is too small: fewer rounds or more noise. What fits: hansa plan {config}",
    )


def _one(
    config: Federation,
    base: Path,
    folder: Path,
    resume: bool,
    with_baselines: bool,
    console: Console,
    private: Path | None = None,
    profile: bool = False,
    quietly: Callable[[int, int], None] | None = None,
    how: Mapping[str, Any] = {},
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One run to its end: the content of its `result.json`, and the audit's verdict.

    Args:
        how: engine, execution and workers, as `Simulation` has them.
        quietly: one of many, which tells this its rounds and shows nothing itself.
    """
    measured: Any = None
    _doing("preparing", console)
    from .federation import Simulation
    from .report import write_report

    if profile:
        from .profile import Profile

        measured = Profile()
    display = _display(console, quietly)
    notify = display.notify if measured is None else measured.notify(display.notify)
    simulation = Simulation(config, base, folder, resume=resume, notify=notify, private_root=private, **how)
    try:
        if resume and simulation.fresh and quietly is None:
            _nothing_to_resume(folder)
        with measured.measuring(simulation) if measured is not None else nullcontext():
            outcome, timings = _train(simulation, display)
        if measured is not None:
            timings["profile"] = measured.fields()
        result = _finish(simulation, outcome, outcome.refusals, timings, with_baselines, console)
    finally:
        simulation.close()
    _doing("auditing", console)
    verdict = verifier.verify_bundle(folder)
    write_report(folder / "report.html", result, verdict, in_words(simulation.signed))
    return result, verdict


def _doing(what: str, console: Console) -> None:
    """Say what takes a while. A line, no moving status: that is a thread, and workers are forked meanwhile."""
    console.print(f"{what} ...", style="dim")


def _sweep(
    source: Path,
    folder: Path,
    sweeps: list[str],
    seeds: int,
    resume: bool,
    with_baselines: bool,
    profile: bool,
    console: Console,
    form: Format,
    how: Mapping[str, Any],
) -> int:
    from .sweep import Sweep, planned, print_sweep

    plan = planned(source, sweeps, seeds)  # before torch is imported, and before anything is written
    _doing("preparing", console)
    from ..common.tasks import check_model, load_task
    from .federation import _lock, holds_anything, holds_sweep, private_folder

    for task in {run.config.task for run in plan.runs}:  # or every run would fail by it
        check_model(load_task(task))
    private = private_folder(folder)
    taken = holds_anything(folder) or holds_anything(private)
    if (private / "run.json").exists():
        raise OutputError(
            f"{folder}: holds a single run, not a sweep",
            "Give another --out. (That run goes on without --sweep and --seeds.)",
        )
    if taken and not resume and holds_sweep(folder, private):
        raise OutputError(f"{folder}: holds another sweep", "Give another --out, or go on with it: --resume.")
    if taken and not resume:
        raise OutputError(f"{folder}: not empty, and not a sweep of ours", "Give another --out, or empty this one.")
    if resume and not taken:
        _nothing_to_resume(folder)

    def one(config: Federation, own: Path, own_private: Path, told: Callable[[int, int], None]) -> Any:
        result, verdict = _one(
            config, source.parent, own, resume, with_baselines, Console(quiet=True), own_private, profile, told, how
        )
        return result, bool(verdict["verified"])

    with _lock(private):
        sweep = Sweep(plan, folder, private, one, with_baselines, how["engine"], console)
        report = sweep.run()
    if form is Format.JSON:
        show_json(report)
    else:
        print_sweep(report, console, folder)
    return sweep.exit_code()


def _nothing_to_resume(folder: Path) -> None:
    typer.echo(clean(f"nothing to resume in {folder}: starting a new run"), err=True)


def _train(simulation: Simulation, display: Any) -> tuple[Any, dict[str, Any]]:
    began = time.perf_counter()
    with display:
        display.show(simulation)
        outcome = simulation.run()
    if outcome.model is not None:
        simulation.save_model(outcome.model)
    return outcome, {"training_s": time.perf_counter() - began}


def _finish(
    simulation: Simulation,
    outcome: Any,
    refusals: list[Any],
    timings: dict[str, Any],
    with_baselines: bool,
    console: Console,
) -> dict[str, Any]:
    from .baselines import baselines
    from .realism import in_words as in_words_of_clock
    from .result import make_result, rows_title, score_rows

    result = make_result(simulation, outcome, refusals, timings)
    if with_baselines:
        began = time.perf_counter()
        _doing("training the baselines", console)
        result["baselines"] = baselines(simulation.config, simulation.base, simulation.task)
        timings["baselines_s"] = result["timings"]["baselines_s"] = time.perf_counter() - began
    _save(simulation.out, result)
    if "system" in result:
        console.print(plain(in_words_of_clock(result["system"])))
    rows = score_rows(result)
    if rows:
        table = Table(box=None, pad_edge=False, title=rows_title(result), title_justify="left")
        keys = list(next(iter(rows.values())))
        for title in ("", *keys):
            table.add_column(plain(title), justify="right" if title else "left")
        for name, metrics in rows.items():
            table.add_row(plain(name), *(f"{metrics[k]:.4f}" if k in metrics else "-" for k in keys))
        console.print(table)
    if "profile" in timings:
        from .profile import profile_table

        console.print(profile_table(timings["profile"]))
    return result


def _save(folder: Path, result: dict[str, Any]) -> None:
    from .result import save_result

    save_result(folder, result)


def _display(console: Console, quietly: Callable[[int, int], None] | None = None) -> Any:
    from .display import Display

    if quietly is not None:
        return Display(console, quiet=True, told=quietly)
    return Display(console, quiet=console.quiet)
