"""Every error that Hansa raises on purpose, in one tree. Nothing but its members crosses the CLI.

HansaError                 exit 2: bad usage or input
├── ConfigError            a configuration file that is malformed or asks for what is not allowed
├── DataError              a data file that is missing, unreadable or breaks its schema
│   └── SchemaViolation    … with the table of rows and columns that break it
├── TaskError              a task that is unknown, malformed or whose code is not what was agreed
├── CharterError           a charter that is malformed, edited, unsigned, expired
├── IdentityError          a key file that is missing, malformed or too open
├── LedgerError            a ledger that is locked, torn or does not chain
├── OutputError            an output folder that holds another run, or a disk that is full
├── MessageError           a message that is malformed, forged, replayed or bound to another run
├── LinkError              a connection that cannot be made or is not admitted: address, certificate, version
├── RunFailed              exit 1: the run cannot go on (no quorum, all partners failed)
└── Refused                exit 1: the answer is no; `reason` is one of `Refusal`

Every message says what to do next. Exit codes: 0 fine, 1 the answer is no, 2 bad usage or input. Being stopped is no error of the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

CTRL_C, TERMINATED = 130, 143
"""Exit codes of who was stopped."""
STOPPED = "stopped; a run goes on with --resume"


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number of things in words: "1 row", "2 rows".

    Args:
        many: the plural, where it is not `one` with an s.
    """
    return f"{number} {one if number == 1 else many or one + 's'}"


class HansaError(Exception):
    """Root of the tree.

    Args:
        message: what is wrong, with the place and the offending value.
        hint: what to do next; shown on a line of its own.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class ConfigError(HansaError):
    """A configuration that is malformed or asks for what is not allowed."""


class DataError(HansaError):
    """A data file that is missing, unreadable or unusable."""


class SchemaViolation(DataError):
    """Data that breaks its schema.

    Args:
        source: the file.
        rows: one (row number as an editor shows it, column, value as text, what is allowed) a violation.

    The table is for the screen of the data's owner: it holds record values and must not leave the node.
    """

    def __init__(self, source: str, rows: Sequence[tuple[int, str, str, str]]) -> None:
        shown = list(rows[:20])
        widths = [max(len(str(row[i])) for row in [*shown, ("line", "column", "value", "")]) for i in range(3)]
        lines = [f"{'line':>{widths[0]}}  {'column':{widths[1]}}  {'value':{widths[2]}}  allowed"]
        for line, column, value, allowed in shown:
            lines.append(f"{line:>{widths[0]}}  {column:{widths[1]}}  {value:{widths[2]}}  {allowed}")
        if len(rows) > len(shown):
            lines.append(f"... and {len(rows) - len(shown)} more")
        table = "\n  ".join(lines)
        super().__init__(
            f"{source}: {counted(len(rows), 'value')} outside the schema; nothing was loaded\n  {table}",
            "Correct the file, or widen the schema in the task (which every partner must then agree to).",
        )
        self.source = source
        self.rows = list(rows)


class TaskError(HansaError):
    """A task that is unknown, malformed, or whose code is not the code that was agreed."""


class CharterError(HansaError):
    """A charter that is malformed, edited after signing, not fully signed, or expired."""


class IdentityError(HansaError):
    """A key that is missing, malformed, or readable by others."""


class LedgerError(HansaError):
    """A ledger that another process holds, or that does not parse, chain or verify."""


class OutputError(HansaError):
    """An output folder that holds another run, or that cannot be written."""


class MessageError(HansaError):
    """A round message that is malformed, forged, replayed, or bound to another charter, run or round."""


class LinkError(HansaError):
    """A connection that cannot be made, or that the other side does not admit."""


class RunFailed(HansaError):
    """The run cannot go on; what was spent stays on the ledgers and `--resume` goes on from there."""

    exit_code = 1


class Refusal(StrEnum):
    """Why a node says no. The value is what the coordinator sees; it never depends on record values."""

    BUDGET = "budget"
    NOT_HELD = "not in the accepted plan"
    CHARTER_EXPIRED = "charter expired"
    CHARTER_UNKNOWN = "unknown charter"
    NOT_A_PARTNER = "not a partner of this charter"
    TASK_CODE = "task code differs from the charter"
    UNPROTECTED = "unprotected training not allowed here"
    NOISE = "noise multiplier below 0.3"
    DATA = "dataset not usable under this charter"
    REPLAY = "request id reused with another content"
    ROUND = "round or run out of order"
    SIMULATED = "simulated charter on a real dataset"
    NUMERIC = "model is not finite or has another shape"
    TASK = "task not allowed here"
    COORDINATOR = "coordinator not allowed here"
    HOURS = "outside this site's hours"
    NOT_APPROVED = "not approved"
    PAUSED = "paused"
    WITHDRAWN = "withdrawn"
    COHORT = "cohort below this site's minimum"
    RESTORED = "restored from a backup, spending not proved"
    ROLLED_BACK = "ledger is older than a head that this node signed"
    SECAGG_KEY = "secure aggregation key is not its partner's for this run"
    SECAGG_ROSTER = "roster is not this charter's"
    SECAGG_TERMS = "threshold, quorum or ring is not what was agreed"
    SECAGG_SURVIVORS = "survivors are not those of one attempt"
    SECAGG_SHARE = "share of a mask does not fit"


class Refused(HansaError):
    """A node (or the charter) says no before any data is read.

    Args:
        reason: the typed reason, safe to send.
        detail: words for the screen; must not depend on record values.
    """

    exit_code = 1

    def __init__(self, reason: Refusal, detail: str, hint: str = "") -> None:
        super().__init__(f"refused: {reason.value}: {detail}", hint)
        self.reason = reason
        self.detail = detail
