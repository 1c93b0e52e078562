"""server.yaml: where a coordinator's identity, charter and state are, and how partners reach it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ..common.config import Section, load_yaml


def _address(value: str) -> str:
    host, colon, port = value.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    bracketed = host != bare
    good = bool(colon and bare) and bracketed == (":" in bare) and (host == f"[{bare}]" or not bracketed)
    if not good or any(c.isspace() or c in "/[]" for c in bare) or not (port.isdecimal() and port.isascii()):
        raise ValueError("HOST:PORT is allowed, for instance 0.0.0.0:8440 or [::]:8440")
    if int(port) > 65535:
        raise ValueError(f"port {port} is above 65535")
    return value


Address = Annotated[str, AfterValidator(_address)]


class ServerSettings(Section):
    """What server.yaml says. Relative paths start at its folder; `load_settings` makes them absolute.

    Attributes:
        home: the identity's folder, as `hansa identity new` made it.
        charter: the charter that everyone signed.
        listen: HOST:PORT that nodes dial; port 0 takes a free one.
        state: what the coordinator keeps: ledger, checkpoints, closing checkpoints, models, status.json.
        revoked: the connection CA's revocation list, read again when it changes.
        wait_for_nodes_s: how long a run waits for all partners before it goes on with a quorum of them.
        uploads: how many replies are received at the same time.
        log: text for people, json for one line an event.
    """

    home: Path = Path()
    charter: Path = Path("charter.json")
    listen: Address = "0.0.0.0:8440"
    state: Path = Path("state")
    revoked: Path | None = None
    wait_for_nodes_s: Annotated[float, Field(ge=0, le=604_800, allow_inf_nan=False)] = 300.0
    uploads: Annotated[int, Field(ge=1, le=1000)] = 4
    log: Literal["text", "json"] = "text"

    @property
    def ledger(self) -> Path:
        """The coordinator's own ledger."""
        return self.state / "coordinator" / "ledger.jsonl"

    def heads(self, charter_sha256: str) -> Path:
        """Heads of all ledgers that were countersigned under one charter."""
        return self.state / "heads" / f"{charter_sha256}.jsonl"

    @property
    def closing(self) -> Path:
        """The folder of closing checkpoints."""
        return self.state / "closing"

    @property
    def checkpoints(self) -> Path:
        """The folder of runs that are under way."""
        return self.state / "runs"

    @property
    def status(self) -> Path:
        """What the process that runs now, or ran last, does."""
        return self.state / "status.json"

    def model(self, run_id: str) -> Path:
        """The final model of a run."""
        return self.state / "models" / run_id / "model.safetensors"


def load_settings(path: Path) -> ServerSettings:
    """Read and check server.yaml.

    Raises:
        ConfigError: naming file, line, key, the value found and what is allowed.
    """
    found = load_yaml(
        path, ServerSettings, "Write one; this is enough: {charter: charter.json, listen: '0.0.0.0:8440'}"
    )
    base = path.absolute().parent
    paths = {name: base / getattr(found, name) for name in ("home", "charter", "state")}
    return found.model_copy(update=paths | {"revoked": found.revoked and base / found.revoked})
