"""Hand-made verdicts, in the shape of `verifier.verify_bundle`."""

from __future__ import annotations

from typing import Any

CHARTER = "9f3ac1" + "5e" * 29
HOSPITALS = {"cleveland": 0.9900, "hungary": 0.9813, "switzerland": 0.9712, "va-long-beach": 0.7551}


def trajectory(spent: float, rounds: int = 10, before: int = 0, day: str = "2026-11-22") -> list[dict[str, Any]]:
    """`before` charges under another charter, then one a round; ε grows like a root."""
    total = before + rounds
    return [
        {
            "entry": 4 + 3 * i,
            "time": None if i < before else f"{day}T01:{50 + i - before:02d}:0{i % 10}Z",
            "run": None if i < before else "run-7f3a2c",
            "round": None if i < before else i - before + 1,
            "charter": "other" if i < before else "this",
            "epsilon_filter": spent * ((i + 1) / total) ** 0.5,
            "epsilon": 0.93 * spent * ((i + 1) / total) ** 0.5,
        }
        for i in range(total)
    ]


def partner(spent: float, *, before: int = 0, refusals: int = 0) -> dict[str, Any]:
    """One partner's figures."""
    events = [
        {"mechanism": "poisson-gaussian/1", "q": 1.0, "sigma": 30.125, "steps": 6, "count": 10, "charter": "this"},
        {"mechanism": "poisson-gaussian/1", "q": 0.1, "sigma": 1.5, "steps": 4, "count": before, "charter": "other"},
    ]
    return {
        "epsilon": 0.93 * spent,
        "epsilon_filter": spent,
        "epsilon_cap": 1.0,
        "delta": 1e-4,
        "charter_epsilon": {"epsilon": 0.7 * spent, "epsilon_filter": 0.8 * spent, "cap": 1.0},
        "unbounded": False,
        "debits": 10 + before,
        "uncommitted_debits": int(before > 0),
        "rounds": 10,
        "refusals": refusals,
        "refusals_by_reason": {"budget": refusals} if refusals else {},
        "entries": 34 + 3 * before,
        "undisclosed": 3 * before,
        "lineages": {
            "0a1b2c3d" * 4: {
                "epsilon": 0.93 * spent,
                "epsilon_filter": spent,
                "epsilon_cap": 1.0,
                "delta": 1e-4,
                "unbounded": False,
                "datasets": [
                    {"dataset": "77" * 16, "declared": {"kind": "first", "of": None, "cutoff": None}},
                    {"dataset": "88" * 16, "declared": {"kind": "version", "of": "77" * 16, "cutoff": None}},
                ],
            }
        },
        "events": events[: 2 if before else 1],
        "trajectory": trajectory(spent, before=before),
        "budget": {
            "epsilon": "1",
            "delta": "0.0001",
            "orders": [[12, "0.0000125"], [20, "0.0000125"], [32, "0.0000125"]],
            "gaussian_delta": "0.0000625",
        },
        "witnessed": {"length": 33, "by": ["hungary", "switzerland", "coordinator"], "closing": "run-7f3a2c"},
        "tail": 1,
    }


def verdict() -> dict[str, Any]:
    """Four hospitals, one of them with a history under another charter."""
    names = [*HOSPITALS, "coordinator"]
    return {
        "verified": True,
        "bundle": "out/demo",
        "charter_sha256": CHARTER,
        "simulated": False,
        "claim": "Everything that left a partner's node is (epsilon, delta)-differentially private for one record of that "
        "partner under add-or-remove-one adjacency, with the partner's epsilon and delta below.",
        "checked": {"ledgers": 5, "entries": 1123, "signatures": 1340, "heads": 205, "proofs": 215},
        "partners": {
            name: partner(spent, before=8 if name == "hungary" else 0, refusals=int(name == "cleveland"))
            for name, spent in HOSPITALS.items()
        },
        "coordinator": {
            "entries": 44,
            "undisclosed": 0,
            "witnessed": {"length": 44, "by": ["cleveland", "hungary"], "closing": "run-7f3a2c"},
            "tail": 0,
        },
        "heads": [
            {"owner": owner, "holder": holder, "length": 5 + 3 * r, "signers": [owner, holder, "coordinator"]}
            for owner in names
            for holder in names
            for r in range(10)
            if owner != holder
        ],
        "closings": [
            {
                "run_id": "run-7f3a2c",
                "ledgers": [{"owner": n, "length": 33 if n != "coordinator" else 44} for n in names],
            }
        ],
        "open_runs": [],
        "violations": [],
        "warnings": [
            {
                "code": "tail",
                "file": f"partners/{name}/ledger.jsonl",
                "line": 34,
                "what": "1 entry after the newest witnessed head",
                "means": "Nobody but the owner has signed for these entries yet.",
            }
            for name in HOSPITALS
        ],
        "limits": [
            "It cannot prove that noise was really drawn, nor that no other copy of the data was used outside these nodes.",
            "Metrics (AUC and the like) are the coordinator's word.",
        ],
    }


def failing() -> dict[str, Any]:
    """The same with violations of three kinds, a partner over its cap and one without any bound."""
    made = verdict()
    made["verified"] = False
    made["violations"] = [
        {
            "code": "entry-signature",
            "file": "partners/hungary/ledger.jsonl",
            "line": line,
            "what": "bad signature by the key 4f1c9a02b7d3e811...",
            "means": "The bytes of this entry are not those that its owner signed: they were changed afterwards.",
        }
        for line in range(7, 40)
    ] + [
        {
            "code": "over-cap",
            "file": "partners/cleveland/ledger.jsonl",
            "line": 31,
            "what": "spent epsilon 1.2312, more than the cap 1",
            "means": "More privacy was spent than the budget allows; the node's filter was not in force.",
        },
        {"code": "head-differs", "file": "heads/switzerland.jsonl", "line": 3, "what": "another root at length 12"},
    ]
    spent = made["partners"]["cleveland"]
    spent |= {"epsilon_filter": 1.2312, "epsilon": 1.1450, "trajectory": trajectory(1.2312)}
    made["partners"]["switzerland"] |= {"unbounded": True, "epsilon": None, "epsilon_filter": None}
    for point in made["partners"]["switzerland"]["trajectory"][6:]:
        point |= {"epsilon": None, "epsilon_filter": None}
    return made


def population(clients: int = 1000, different: int = 40) -> dict[str, Any]:
    """Clients that share histories, and keys that a population's verdict may lack."""
    made = verdict()
    figures = []
    for i in range(different):
        one = partner(0.2 + 0.75 * i / different) | {"trajectory": [], "refusals": 0, "undisclosed": 0}
        for key in ("witnessed", "tail", "lineages", "events"):
            del one[key]
        figures.append(one)
    made["partners"] = {f"client-{i:04d}": figures[(i * i) % different] for i in range(clients)}
    made |= {"simulated": True, "warnings": []}
    del made["heads"]
    return made
