"""A small federation of real nodes, each put together from its own node.yaml; requests are handed over in process."""

from __future__ import annotations

import io
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from hansa.clients.node import Site, assemble
from hansa.clients.registrations import DataFiles
from hansa.clients.registry import Registry, Rules
from hansa.clients.settings import NodeSettings, load_settings
from hansa.common.charter import SignedCharter, draft
from hansa.common.config import Federation
from hansa.common.events import EventLog
from hansa.common.flower import Context, Message, RecordDict
from hansa.common.ledger import Ledger
from hansa.common.messages import SignedWire
from hansa.common.plan import SOFTWARE, calibrated
from hansa.common.tasks import code_sha256, initial_model, load_task
from hansa.server.records import LedgerRecords
from hansa.server.rounds import Coordinator, Outcome
from hansa.simulations.grid import InProcessGrid
from hansa.simulations.sources import packaged
from link_support import Keys

TASK = "heart-disease"
NAMES = ("ada", "ben")
ROWS = 60


def context(node: int = 1) -> Context:
    return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})


@dataclass
class Realm:
    """Homes, data, charters and nodes under one folder; `log` is what all nodes logged."""

    root: Path
    log: io.StringIO = field(default_factory=io.StringIO)
    sites: dict[str, Site] = field(default_factory=dict)
    rules: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    ledgers: dict[str, Ledger] = field(default_factory=dict)

    @cached_property
    def keys(self) -> Keys:
        return Keys(self.root)

    @cached_property
    def signed(self) -> SignedCharter:
        return self.charter("first")

    def charter(self, name: str, coordinator: str = "coordinator", **changes: Any) -> SignedCharter:
        """A charter of everyone, signed by everyone."""
        terms: dict[str, Any] = {
            "name": name,
            "task": TASK,
            "partners": {n: {"data": "x", "declared_records": ROWS} for n in NAMES},
            "algorithm": {"rounds": 2, "local": {"steps": 1, "optimizer": {"lr": 0.2}}},
            "privacy": {"epsilon": 2.0, "delta": 1e-3, "clip_norm": 1.0, "noise_multiplier": 10.0},
            "evaluation": {"kind": "public"},
            "quorum": 1,
        }
        config = Federation.model_validate({**terms, **changes})
        signed = SignedCharter.unsigned(
            draft(
                config,
                task_sha256=code_sha256(TASK),
                coordinator_key=self.keys.home("coordinator", coordinator).key(),
                partner_keys={n: self.keys.home(n).key() for n in NAMES},
                noise_multiplier=calibrated(config),
                simulated=True,
            )
        )
        for home in ("coordinator", *NAMES):
            signed = signed.sign(self.keys.home(home, coordinator if home == "coordinator" else None).identity())
        return signed

    def settings(self, name: str, *charters: SignedCharter, **changes: Any) -> NodeSettings:
        """Write node.yaml and read it; without charters the first one."""
        folder = self.keys.home(name).path
        entries = []
        for signed in charters or (self.signed,):
            signed.save(folder / f"{signed.charter.name}.json")
            entries.append({"charter": f"{signed.charter.name}.json", "server": "127.0.0.1:1"})
        said = {"simulated": True, "federations": entries, "site": dict(self.rules.get(name, {})), "log": "json"}
        (folder / "node.yaml").write_text(yaml.safe_dump({**said, **changes}))
        return load_settings(folder / "node.yaml")

    def data(self, name: str, number: int | None = None) -> Path:
        """Rows of one hospital, other ones for each partner."""
        lines = packaged("package:heart-disease/cleveland.csv").read_text().splitlines()
        start = 1 + (NAMES.index(name) if number is None else number) * ROWS
        path = self.keys.home(name).path / f"rows-{start}.csv"
        path.write_text("\n".join([lines[0], *lines[start : start + ROWS]]) + "\n")
        return path

    def register(self, name: str, held_out: Path | None = None) -> None:
        """As `hansa node dataset add` does; the held-out rows are public."""
        files = DataFiles(TASK, self.data(name), held_out)
        Registry(self.settings(name).state).add(files, Rules(public=held_out is not None))

    def start(self, name: str, *charters: SignedCharter) -> Site:
        """(Re)start a node; it is registered first where it is not."""
        self.stop(name)
        settings = self.settings(name, *charters)
        if not Registry(settings.state).all():
            self.register(name, self.data(name, 3 + NAMES.index(name)))
        self.sites[name] = assemble(settings, None, EventLog("json", self.log))
        return self.sites[name]

    def stop(self, name: str) -> None:
        if name in self.sites:
            self.sites.pop(name).close()

    def close(self) -> None:
        for name in list(self.sites):
            self.stop(name)
        for ledger in self.ledgers.values():
            ledger.close()

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    def run(self, run_id: str, signed: SignedCharter | None = None, coordinator: str = "coordinator") -> Outcome:
        """A whole run with all nodes that are started, closed and countersigned; its checkpoint is in root/closing."""
        agreed = signed or self.signed
        task = load_task(TASK)
        me = self.keys.home("coordinator", coordinator).identity()
        folder = self.root / agreed.sha256[:8]
        if agreed.sha256 not in self.ledgers:
            genesis = {"owner": "coordinator", "role": "coordinator", "ledger_id": secrets.token_hex(16)}
            about = {"simulated": True, "software": SOFTWARE}
            ledger = self.ledgers[agreed.sha256] = Ledger(folder / "ledger.jsonl", me, {**genesis, **about})
            expires = agreed.charter.expires.isoformat()
            ledger.append("charter", {"name": agreed.charter.name, "expires": expires}, charter=agreed.sha256)
        names = list(NAMES)

        def app(message: Message, where: Context) -> Message:
            site = self.sites[names[int(where.node_id) - 1]]
            (joined,) = (one for one in site.joined if one.signed.sha256 == agreed.sha256)
            return joined.app(message, where)

        def initial() -> dict[str, Any]:
            model = initial_model(task, 0)
            return {n: p.detach().numpy() for n, p in model.named_parameters() if p.requires_grad}

        made = Coordinator(
            agreed,
            me,
            task,
            SignedWire(me, {n: self.keys.home(n).key() for n in NAMES}, agreed.sha256),
            {name: number for number, name in enumerate(names, start=1)},
            LedgerRecords(self.ledgers[agreed.sha256], agreed.sha256),
            initial,
            folder / "runs",
            self.closing,
        )
        return made.run(InProcessGrid(app, len(names), context), run_id)  # type: ignore[arg-type]

    @property
    def closing(self) -> Path:
        return self.root / "closing"

    def reasons(self, outcome: Outcome, name: str) -> set[str]:
        return {refusal.reason for refusal in outcome.refusals if refusal.partner == name}
