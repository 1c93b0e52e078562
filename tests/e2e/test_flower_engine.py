"""Flower's own engine: the same apps under a stock SuperLink with TLS and supernode authentication, through `flwr run`."""

from __future__ import annotations

import contextlib
import fcntl
import re
import statistics
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from e2e_support import federation, of_type, write
from grid_contract import CONTRACT, Check
from hansa.clients.engine import LOCK_S, Wordless, _until_free
from hansa.clients.engine import app as client_app
from hansa.common.errors import ConfigError
from hansa.common.flower import (
    CLIENT_APP_FAILED,
    NODE_UNAVAILABLE,
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Grid,
    Message,
    RecordDict,
    Run,
    empty_run,
)
from hansa.common.identity import Identity, canonical
from hansa.common.messages import Manifest, SignedWire
from hansa.common.verifier import verify_bundle
from hansa.server.engine import HELLO_TYPE, StockGrid
from hansa.simulations.grid import InProcessGrid
from hansa.simulations.network import COORDINATOR
from link_support import Keys, plain_app
from network_support import Network, Zygote

sys.path.insert(0, str(Path(__file__).parent))
from flower_engine import REPO, EngineError, FlowerEngine, flwr_command, forge

BUNDLE = REPO / "configs" / "flower"
PATIENCE_S = 900.0
"""A run has some ten exchanges; each starts a process with torch at every node, on machines that others use too."""
TWO = {
    "cleveland": ("package:heart-disease/cleveland.csv", 303),
    "hungary": ("package:heart-disease/hungary.csv", 294),
}


# -- the whole -------------------------------------------------------------------------------------------------------


def test_the_bundle_carries_no_code(tmp_path):
    subprocess.run(
        [flwr_command(), "build", "--app", BUNDLE],
        cwd=tmp_path,
        env=FlowerEngine(tmp_path).environment("cli"),
        check=True,
        capture_output=True,
    )
    (fab,) = tmp_path.glob("*.fab")
    with zipfile.ZipFile(fab) as archive:
        assert sorted(archive.namelist()) == [".info/CONTENT", "README.md", "pyproject.toml"]


@dataclass
class Forgery:
    """A run of two partners in which hungary answers in cleveland's name."""

    net: Network
    engine: FlowerEngine

    def first(self) -> Run:
        """At its own SuperNode's credentials and with its own identity key."""
        sha = sha256_of_charter(self.net.folder(COORDINATOR) / "charter.json")
        request = Manifest("train", "coordinator", "cleveland", sha, "first", 1, "first.1.train.cleveland", "", {})
        liar = Identity.load("hungary", self.net.folder("hungary") / "identity.key")
        lie, _ = SignedWire(liar, {}, sha).encode(request.reply("update", sha), SignedWire(liar, {}, sha).pack({}))
        with forging(self.engine, "train", victim="cleveland", by="hungary", content=solid(lie)) as forged:
            run = self.engine.run(BUNDLE, {"hansa-run": "first"}, PATIENCE_S)
        assert forged == ["taken by the SuperLink"]
        (train,) = [a for a in of_type(self.own, "answers") if a["purpose"] == "train"]
        assert train["replies"]["cleveland"]["outcome"] == "invalid"
        assert train["replies"]["hungary"]["outcome"] == "ok"
        return run

    @property
    def own(self) -> Path:
        """The coordinator's ledger."""
        return self.net.folder(COORDINATOR) / "state" / "coordinator" / "ledger.jsonl"

    def ends_well(self, warnings: list[tuple[str, str]]) -> None:
        """When all processes are gone: a verified audit, one debit each, one model, and no code but the package's."""
        bundle = self.net.bundle()
        models = self.net.models()
        assert (self.net.status() or {})["phase"] == "completed"
        verdict = verify_bundle(bundle)
        assert verdict["violations"] == []
        assert [(w["code"], w["file"]) for w in verdict["warnings"]] == warnings
        for name in self.net.partners:
            assert len(of_type(bundle / "partners" / name / "ledger.jsonl", "debit")) == 1, name
        assert len({model["sha256"] for model in models.values()}) == 1
        assert all(model["verified"] is True for model in models.values())
        # Hansa came from the package: the nodes keep of the bundle what has no code in it.
        kept = [p for p in (self.engine.folder / "homes").rglob("apps/*/*") if p.is_file()]
        assert kept
        assert {p.name for p in kept} == {"README.md", "pyproject.toml"}
        logs = {name: self.engine.log(name) for name in [*self.net.partners, "superlink", "superexec"]}
        assert not any("Traceback" in log for name, log in logs.items() if name in self.net.partners), logs


@contextlib.contextmanager
def forgery(zygote: Zygote, folder: Path, quorum: int) -> Iterator[Forgery]:
    text = federation(rounds=1, data=TWO, evaluation="{kind: none}").replace("quorum: 2", f"quorum: {quorum}")
    with Network(zygote, write(folder / "c.yaml", text), folder / "net") as net:
        net.set_up()
        server = {"HANSA_SERVER": str(net.folder(COORDINATOR) / "server.yaml"), "OMP_NUM_THREADS": "1"}
        with FlowerEngine(folder / "engine", env=server, superexec_secret=True) as engine:
            for name in net.partners:
                engine.register(name)
                engine.start_node(name, {"hansa-node": str(net.folder(name) / "node.yaml")})
            made = Forgery(net, engine)
            yield made
        # What cleveland itself committed is in no round where the forged reply took its place.
        made.ends_well([("unanswered", "partners/cleveland/ledger.jsonl")] if quorum == 1 else [])


@pytest.mark.slow
def test_a_forged_reply_is_refused_and_the_run_ends_with_a_verified_audit(tmp_path, zygote: Zygote):
    with forgery(zygote, tmp_path, quorum=1) as made:
        # Who is not registered does not get in, whatever CA file they have.
        made.engine.make_key("stranger")
        with pytest.raises(EngineError, match="Failed to activate SuperNode"):
            made.engine.start_node("stranger")
        run = made.first()
        assert run.status == "finished:completed", run.log
        assert [sorted(r["partners"]) for r in of_type(made.own, "round")] == [["hungary"]]


@pytest.mark.soak
def test_a_run_that_a_forged_reply_stopped_is_resumed(tmp_path, zygote: Zygote):
    with forgery(zygote, tmp_path, quorum=2) as made:
        run = made.first()
        assert run.status == "finished:failed", run.log
        assert "1 of 2 partners answered, the quorum is 2" in run.details, run.details
        assert of_type(made.own, "round") == []
        # Its own answer was committed at its node before, and comes from its outbox now.
        run = made.engine.run(BUNDLE, {"hansa-run": "first", "hansa-resume": True}, PATIENCE_S)
        assert run.status == "finished:completed", run.log


@pytest.mark.soak
def test_the_contract_of_every_grid_holds_under_a_stock_superlink(tmp_path):
    write(
        tmp_path / "lib" / "contract_apps.py",
        """
import traceback
import grid_contract
from grid_contract import CONTRACT, PACE
from hansa.clients.engine import Wordless
from hansa.common.flower import ServerApp
from hansa.server.engine import StockGrid
from link_support import plain_app

client = Wordless(plain_app())
server = ServerApp()
pull = grid_contract._pull
grid_contract._pull = lambda grid, wanted, timeout=60: pull(grid, wanted, timeout * PACE)

@server.main()
def _main(grid, context):
    where = {f"n{i}": node for i, node in enumerate(grid.get_node_ids())}
    stock = StockGrid(grid, {}, {name: i for i, name in enumerate(where, start=1)}, 4, where)
    for check in CONTRACT:
        try:
            check(stock, list(stock.get_node_ids()))
            print("CONTRACT", check.__name__, "ok", flush=True)
        except Exception:
            print("CONTRACT", check.__name__, traceback.format_exc(), flush=True)
""",
    )
    path = (REPO / ".dev", REPO / "tests", tmp_path / "lib")
    with FlowerEngine(tmp_path / "engine", path=path, env={"HANSA_TEST_PACE": "12"}) as engine:
        for name in ("ada", "ben", "cy"):
            engine.register(name)
            engine.start_node(name, {"name": name})
        run = engine.run(thin(tmp_path / "contract", "contract_apps:server", "contract_apps:client"), {}, PATIENCE_S)
    assert run.status == "finished:completed", run.log
    assert re.findall(r"CONTRACT (\w+) ok", run.log) == [check.__name__ for check in CONTRACT], run.log


@pytest.mark.bench
def test_how_long_a_round_takes_and_when_a_dead_node_is_noticed(tmp_path):
    write(
        tmp_path / "lib" / "timed.py",
        """
import time
from hansa.common.flower import ClientApp, ConfigRecord, Message, RecordDict, ServerApp

client = ClientApp()
server = ServerApp()

@client.train()
def _train(message, context):
    time.sleep(context.run_config["nap"])
    return Message(message.content, reply_to=message)

def exchange(grid, nodes):
    began = time.monotonic()
    hello = RecordDict({"hello": ConfigRecord({"a": 1})})
    pending = set(grid.push_messages([Message(hello, n, "train", ttl=300.0, group_id="1") for n in nodes]))
    while pending:
        for reply in grid.pull_messages(list(pending)):
            pending.discard(reply.metadata.reply_to_message_id)
            if reply.has_error():
                print("ERROR", reply.error.code, f"{time.monotonic() - began:.1f}", flush=True)
        time.sleep(0.25)
    return time.monotonic() - began

@server.main()
def _main(grid, context):
    nodes = list(grid.get_node_ids())
    for _ in range(context.run_config["rounds"]):
        print(f"ROUND {exchange(grid, nodes):.2f}", flush=True)
""",
    )
    path = (REPO / ".dev", tmp_path / "lib")
    app = thin(tmp_path / "app", "timed:server", "timed:client", "rounds = 11\nnap = 0\n")
    with FlowerEngine(tmp_path / "engine", path=path) as engine:
        for name in ("ada", "ben"):
            engine.register(name)
            engine.start_node(name)
        run = engine.run(app, {}, PATIENCE_S)
        rounds = [float(s) for s in re.findall(r"ROUND ([\d.]+)", run.log)]
        assert len(rounds) == 11, run.log
        print(f"\na round of two nodes: median {statistics.median(rounds):.1f} s, {min(rounds)} to {max(rounds)} s")
        seen = len(engine.log("ada"))
        told: list[str] = []

        def kill_and_restart() -> None:
            while "Start `flwr-clientapp`" not in engine.log("ada")[seen:]:
                time.sleep(0.05)
            engine.kill("ada")
            began, refused = time.monotonic(), 0
            while True:
                with contextlib.suppress(EngineError):
                    engine.start_node("ada")
                    break
                refused += 1
            told.append(f"refused {refused} times, let in again after {time.monotonic() - began:.0f} s")

        thread = threading.Thread(target=kill_and_restart)
        thread.start()
        run = engine.run(app, {"rounds": 1, "nap": 20}, PATIENCE_S)
        thread.join()
        print(f"a node killed at work: an error reply (code, seconds): {re.findall(r'ERROR (.+)', run.log)}")
        print(f"the killed node, started again at once: {told}")


# -- what it is made of ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted() -> StockGrid:
    def context(node: int) -> Context:
        return Context(run_id=1, node_id=node, node_config={"name": f"n{node}"}, state=RecordDict(), run_config={})

    roster = {"ada": 7, "ben": 8, "cy": 9}
    where = {"ada": 1, "ben": 2, "cy": 3}
    return StockGrid(InProcessGrid(Wordless(plain_app()), 3, context), {}, roster, 2, where)


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_the_contract_of_every_grid(adapted: StockGrid, check: Check) -> None:
    check(adapted, list(adapted.get_node_ids()))


class Superlink(Grid):
    """What is special about Flower's own Grid: lists only, plain Arrays only, errors from node 1, parsers that raise."""

    def __init__(self, nodes: Iterable[int], answer: Callable[[Message], Message | Exception | None]) -> None:
        self.nodes = list(nodes)
        self.answer = answer
        self.sent: dict[str, Message] = {}

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        return empty_run()

    def create_message(self, *_: object) -> Message:
        raise AssertionError("deprecated")

    def get_node_ids(self) -> Iterable[int]:
        return self.nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        assert isinstance(messages, list)
        pushed = []
        for message in messages:
            arrays = [a for r in message.content.array_records.values() for a in r.values()]
            assert all(type(a) is Array for a in arrays)
            known = message.metadata.dst_node_id in self.nodes
            pushed.append(f"theirs-{len(self.sent)}" if known else "")
            self.sent[pushed[-1]] = message
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (name,) = message_ids
        answer = self.answer(self.sent[name])
        if isinstance(answer, Exception):
            raise answer
        return [] if answer is None else [answer]

    def send_and_receive(self, *_: object, **__: object) -> Iterable[Message]:
        raise AssertionError("not used")


def ask(grid: StockGrid, *nodes: int, timeout: float = 5.0) -> dict[int, Message]:
    messages = (grid.create_message(RecordDict(), "query", node, "1", 60.0) for node in nodes)
    return {m.metadata.src_node_id: m for m in grid.send_and_receive(messages, timeout=timeout)}


def test_what_goes_wrong_at_one_partner_is_an_error_of_that_partner():
    held = threading.Event()

    def answer(message: Message) -> Message | Exception | None:
        match message.metadata.dst_node_id:
            case 101:
                return Message(RecordDict(), reply_to=message)
            case 102:
                return ValueError("Object of type Evil is not supported")
            case 103:  # as SuperLink tells that a node is gone: from node 1
                from flwr.app.message import make_message

                meta = message.metadata
                meta.__dict__["_src_node_id"] = meta.__dict__["_dst_node_id"] = 1
                return make_message(metadata=meta, error=Error(NODE_UNAVAILABLE, "gone"))
            case _:  # it comes by drops
                held.wait(30)
                return None

    where = {"ok": 101, "evil": 102, "gone": 103, "slow": 104}
    grid = StockGrid(Superlink(where.values(), answer), {}, {n: i for i, n in enumerate(where, 1)}, 2, where)
    began = time.monotonic()
    found = ask(grid, 4, 3, 2, 1, timeout=2.0)
    held.set()
    assert time.monotonic() - began < 5
    assert sorted(found) == [1, 2, 3]
    assert found[1].has_content()
    assert found[2].error.code == CLIENT_APP_FAILED
    assert "Evil" not in str(found[2].error.reason)
    assert found[3].error.code == NODE_UNAVAILABLE
    assert grid.missing() == ["gone"]  # it is looked for again, and may be another node then


def test_who_is_looked_for_holds_up_no_other():
    """Ada's node is gone, and one that is no partner's keeps silent when it is asked who it is."""

    def answer(message: Message) -> Message | None:
        return Message(RecordDict(), reply_to=message) if message.metadata.dst_node_id == 12 else None

    grid = StockGrid(Superlink([12, 13], answer), {}, {"ada": 1, "ben": 2}, 2, {"ben": 12})
    began = time.monotonic()
    messages = [grid.create_message(RecordDict(), "train", node, "1", 8.0) for node in (1, 2)]
    ada, ben = grid.push_messages(messages)
    assert 1.5 < time.monotonic() - began < 4  # a part of the request's time, not all that a hello may take
    found: dict[str, Message] = {}
    deadline = time.monotonic() + 3
    while len(found) < 2 and time.monotonic() < deadline:
        found |= {m.metadata.reply_to_message_id: m for m in grid.pull_messages([ada, ben])}
        time.sleep(0.05)
    assert found[ada].error.code == NODE_UNAVAILABLE
    assert found[ben].has_content()


def test_a_node_that_comes_back_when_it_is_given_up_is_in_the_next_round(tmp_path):
    """A SuperLink lets a node that was started anew in at the moment at which it tells that the old one is gone."""
    ada = Keys(tmp_path).home("ada").identity(None)

    def answer(message: Message) -> Message:
        node = message.metadata.dst_node_id
        if message.metadata.message_type == "query.hello":
            said = {"v": 1, "name": "ada", "node": str(node), "nonce": message.content["hello"]["nonce"]}
            sealed = ada.seal(HELLO_TYPE, canonical(said))
            return Message(RecordDict({"hello": ConfigRecord({"sealed": sealed})}), reply_to=message)
        return Message(Error(NODE_UNAVAILABLE, "gone") if node == 11 else RecordDict(), reply_to=message)

    link = Superlink([11], answer)
    grid = StockGrid(link, {"ada": ada.key}, {"ada": 1}, 2, {"ada": 11})
    assert ask(grid, 1)[1].error.code == NODE_UNAVAILABLE
    link.nodes = []
    threading.Timer(1.0, lambda: link.nodes.append(12)).start()
    assert ask(grid, 1)[1].has_content()


def test_partners_are_found_by_what_they_sign_for_their_own_node(tmp_path):
    keys = Keys(tmp_path)
    people = {name: keys.home(name).identity(None) for name in ("ada", "ben", "eve")}

    def hello(message: Message, signer: str, **changes: str) -> Message:
        nonce, node = str(message.content["hello"]["nonce"]), str(message.metadata.dst_node_id)
        said = {"v": 1, "name": signer, "node": node, "nonce": nonce, **changes}
        sealed = people[signer].seal(HELLO_TYPE, canonical(said))
        return Message(RecordDict({"hello": ConfigRecord({"sealed": sealed})}), reply_to=message)

    def answer(message: Message) -> Message | None:
        match message.metadata.dst_node_id:
            case 11:  # ben's node, which would like to be ada's
                return hello(message, "ben", name="ada")
            case 12:  # ... with what ada once signed for hers
                return hello(message, "ada", node="15")
            case 13:
                return hello(message, "ada", nonce="0" * 64)
            case 14:  # registered here, and no partner
                return hello(message, "eve")
            case 15:
                return hello(message, "ada")
            case 16:  # another app's node
                return Message(Error(CLIENT_APP_FAILED, "No query function"), reply_to=message)
            case _:
                return Message(RecordDict({"hello": ConfigRecord({"sealed": b"{"})}), reply_to=message)

    link = Superlink(range(11, 18), answer)
    charter = {name: people[name].key for name in ("ada", "ben")}
    grid = StockGrid(link, charter, {"ada": 1, "ben": 2}, 4)
    grid.meet(3.0)
    assert grid.missing() == ["ben"]
    assert grid.connected()["ada"]["address"] == "SuperLink node 15"
    assert list(grid.get_node_ids()) == [1]


def test_arrays_of_ours_travel_as_flowers_own(tmp_path):
    identity = Keys(tmp_path).home("ada").identity(None)
    wire = SignedWire(identity, {"ada": identity.key}, "0" * 64)
    manifest = Manifest("train", "ada", "ada", "0" * 64, "r", 1, "r.1", "", {})
    records, _ = wire.encode(manifest, wire.pack({"w": np.arange(5, dtype=np.float32)}))
    link = Superlink([101], lambda message: Message(message.content, reply_to=message))
    grid = StockGrid(link, {}, {"ada": 1}, 1, {"ada": 101})
    (reply,) = grid.send_and_receive([grid.create_message(records, "train", 1, "1", 60.0)], timeout=5)
    assert wire.decode(reply.content, "ada")[1]["w"].tolist() == [0, 1, 2, 3, 4]


def request(kind: str = "query.open", content: RecordDict | None = None) -> Message:
    grid = StockGrid(Superlink([], lambda _: None), {}, {}, 1)
    return grid.create_message(content or RecordDict(), kind, 1, "1", 60.0)


def context(**config: str) -> Context:
    return Context(run_id=1, node_id=15, node_config=dict(config), state=RecordDict(), run_config={})


def test_nothing_that_a_node_says_of_its_own_failure_leaves_it(tmp_path, capsys):
    reply = client_app(request(), context())
    assert (reply.error.code, reply.error.reason) == (CLIENT_APP_FAILED, "the node failed; see its own log")
    assert "does not say which node it is" in capsys.readouterr().out
    seen: list[Exception] = []
    failing = Wordless(lambda *_: (_ for _ in ()).throw(ValueError("cell 4711")), seen.append)
    assert "4711" not in str(failing(request(), context()).error)
    assert str(seen[0]) == "cell 4711"
    # What came with the run is not asked where the node's settings are.
    run = Context(run_id=1, node_id=15, node_config={}, state=RecordDict(), run_config={"hansa-node": "/etc/passwd"})
    client_app(request(), run)
    assert "does not say which node it is" in capsys.readouterr().out


def test_a_hello_is_signed_for_this_node_and_this_question(tmp_path, capsys):
    home = Keys(tmp_path).home("ada")
    # A hello needs no ledger, no data and no charter.
    node = write(
        tmp_path / "node.yaml",
        f"home: {home.path}\nfederations: [{{charter: charter.json, server: 'localhost:1'}}]\n",
    )
    nonce = "ab" * 32
    asked = request("query.hello", RecordDict({"hello": ConfigRecord({"nonce": nonce})}))
    reply = client_app(asked, context(**{"hansa-node": str(node)}))
    assert reply.has_content(), capsys.readouterr().out
    grid = StockGrid(Superlink([], lambda _: None), {"ada": home.key()}, {"ada": 1}, 1)
    assert grid._introduced(reply, 15, nonce) == "ada"
    assert grid._introduced(reply, 16, nonce) is None
    assert grid._introduced(reply, 15, "cd" * 32) is None
    for bad in ("", "ab", "AB" * 32, "x" * 64):  # it signs nothing but a hello
        asked = request("query.hello", RecordDict({"hello": ConfigRecord({"nonce": bad})}))
        assert client_app(asked, context(**{"hansa-node": str(node)})).has_error()


def test_a_message_waits_for_the_ledger(tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    _until_free(ledger)  # none yet
    ledger.touch()
    with ledger.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        timer = threading.Timer(0.5, held.close)
        timer.start()
        began = time.monotonic()
        _until_free(ledger)
        assert 0.4 < time.monotonic() - began < LOCK_S / 2
        timer.join()


def test_a_run_that_names_no_coordinator_says_what_to_do(monkeypatch):
    from hansa.server.engine import app

    monkeypatch.delenv("HANSA_SERVER", raising=False)
    with pytest.raises(ConfigError, match="does not say which coordinator"):
        app(Superlink([], lambda _: None), context())


# -- helpers ---------------------------------------------------------------------------------------------------------


def thin(folder: Path, server: str, client: str, config: str = "") -> Path:
    """A bundle of a test's own that carries no code either."""
    write(folder / "README.md", "thin\n")
    write(
        folder / "pyproject.toml",
        f'[project]\nname = "thin"\nversion = "0.1.0"\n\n[tool.flwr.app]\npublisher = "test"\nfab-include = ["README.md"]\n'
        f'\n[tool.flwr.app.components]\nserverapp = "{server}"\nclientapp = "{client}"\n\n[tool.flwr.app.config]\n{config}',
    )
    return folder


def solid(records: RecordDict) -> RecordDict:
    """Without arrays of ours, which Flower does not know."""
    return RecordDict({name: ArrayRecord() if isinstance(r, ArrayRecord) else r for name, r in records.items()})


def sha256_of_charter(path: Path) -> str:
    from hansa.common.charter import SignedCharter

    return SignedCharter.load(path).sha256


@contextlib.contextmanager
def forging(engine: FlowerEngine, kind: str, *, victim: str, by: str, content: RecordDict) -> Iterator[list[str]]:
    """As soon as the victim's SuperNode has a request of that kind, another one answers it in the victim's name."""
    told: list[str] = []
    over = threading.Event()
    begun = len(engine.log(victim))

    def work() -> None:
        while not over.is_set():
            found = re.search(
                rf"\[RUN (\d+), ROUND (\d+)\]\n[^\n]*Receiving: {kind} message \(ID: (\w+)\)",
                engine.log(victim)[begun:],
            )
            if found is not None:
                told.append(forge(engine, victim, by, int(found[1]), found[3], kind, found[2], content))
                return
            time.sleep(0.02)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield told
    finally:
        over.set()
        thread.join(30)
