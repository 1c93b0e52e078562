"""Every bad value names file, line, key, the value found and what is allowed; nothing but ConfigError comes out."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hansa.common.config import SIGNED_PARTNERS_MAX, Federation, check_delta, load_config, located, threshold_of
from hansa.common.errors import ConfigError

GOOD = """\
name: test
task: heart-disease
partners:
  ada: {data: a.csv, declared_records: 240}
  ben: {data: b.csv, declared_records: 100}
algorithm:
  rounds: 10
  participation: 1.0
  strategy: {name: fedavg}
  local:
    steps: 6
    sampling_rate: 1.0
    optimizer: {name: sgd, lr: 0.2}
privacy:
  epsilon: 1.0
  delta: 1.0e-4
  clip_norm: 1.0
evaluation: {kind: public}
quorum: 2
"""


def load(folder: Path, text: str | bytes) -> Federation:
    path = folder / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path)


def test_a_good_one(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    assert config.privacy.delta == 1e-4
    assert config.partners is not None
    assert list(config.partners) == ["ada", "ben"]


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_the_shipped_ones(path: Path) -> None:
    assert load_config(path).name


# (what stands in GOOD, what is put there, the line, the key, what else the message says)
BAD: list[tuple[str, str, int, str, tuple[str, ...]]] = [
    ("quorum: 2", "quorum: 2\nqourum: 3", 20, "qourum", ("unknown key", "3")),
    ("  rounds: 10", "  rounds: 10\n  epochs: 4", 8, "algorithm.epochs", ("unknown key", "4")),
    ("  rounds: 10", "  rounds: 0", 7, "algorithm.rounds", ("0", "greater than or equal to 1")),
    ("  rounds: 10", "  rounds: ten", 7, "algorithm.rounds", ("'ten'", "integer")),
    ("  rounds: 10", "  rounds: 2.5", 7, "algorithm.rounds", ("2.5", "integer")),
    ("  rounds: 10", "  rounds: [1]", 7, "algorithm.rounds", ("[1]", "integer")),
    ("  rounds: 10\n", "", 7, "algorithm.rounds", ("missing",)),
    ("    steps: 6", "    steps: 0", 11, "algorithm.local.steps", ("0", "greater than or equal to 1")),
    ("sampling_rate: 1.0", "sampling_rate: 0", 12, "algorithm.local.sampling_rate", ("0", "greater than 0")),
    (
        "sampling_rate: 1.0",
        "sampling_rate: 1.5",
        12,
        "algorithm.local.sampling_rate",
        ("1.5", "less than or equal to 1"),
    ),
    ("sampling_rate: 1.0", "sampling_rate: .nan", 12, "algorithm.local.sampling_rate", ("nan",)),
    ("lr: 0.2", "lr: 0", 13, "algorithm.local.optimizer.lr", ("0", "greater than 0")),
    ("lr: 0.2", "lr: .inf", 13, "algorithm.local.optimizer.lr", ("inf", "finite")),
    ("name: sgd, ", "name: rmsprop, ", 13, "algorithm.local.optimizer.name", ("'rmsprop'", "'sgd' or 'adam'")),
    (
        "name: sgd, ",
        "name: adam, momentum: 0.9, ",
        13,
        "algorithm.local.optimizer.momentum",
        ("momentum goes with sgd",),
    ),
    ("epsilon: 1.0", "epsilon: 0", 15, "privacy.epsilon", ("0", "greater than 0")),
    ("epsilon: 1.0", "epsilon: -1", 15, "privacy.epsilon", ("-1", "greater than 0")),
    ("epsilon: 1.0", "epsilon: .nan", 15, "privacy.epsilon", ("nan",)),
    ("epsilon: 1.0", "epsilon: .inf", 15, "privacy.epsilon", ("inf",)),
    ("delta: 1.0e-4", "delta: 0", 16, "privacy.delta", ("0", "greater than 0")),
    ("delta: 1.0e-4", "delta: 1", 16, "privacy.delta", ("1", "less than 1")),
    ("delta: 1.0e-4", "delta: 0.0042", 16, "privacy.delta", ("0.0042", "not below 1/n", "0.0042 for 240 records")),
    ("clip_norm: 1.0", "clip_norm: 0", 17, "privacy.clip_norm", ("0", "greater than 0")),
    ("  clip_norm: 1.0\n", "", 14, "privacy", ("needs clip_norm",)),
    ("clip_norm: 1.0", "clip_norm: 1.0\n  noise_multiplier: 0.29", 18, "privacy.noise_multiplier", ("0.29", "0.3")),
    ("clip_norm: 1.0", "clip_norm: 1.0\n  kind: none", 14, "privacy", ("kind none takes no epsilon",)),
    ("clip_norm: 1.0", "clip_norm: 1.0\n  unit: client", 18, "privacy.unit", ("unit client goes with kind central",)),
    ("kind: public", "kind: secret", 18, "evaluation.kind", ("'secret'", "'none', 'public' or 'private'")),
    ("kind: public", "kind: private", 18, "evaluation", ("noise_multiplier goes with",)),
    ("kind: public", "kind: private, noise_multiplier: 0.1", 18, "evaluation.noise_multiplier", ("0.1", "0.3")),
    ("kind: public", "kind: public, test_fraction: 1", 18, "evaluation.test_fraction", ("1", "less than 1")),
    ("kind: public", "kind: public, bins: 7", 18, "evaluation.bins", ("7", "multiple of 2")),
    ("quorum: 2", "quorum: 3", 19, "quorum", ("quorum 3 is more than the 2 partners",)),
    ("quorum: 2", "quorum: 0", 19, "quorum", ("quorum must be 1 or more",)),
    ("quorum: 2", "quorum: -1", 19, "quorum", ("-1", "greater than or equal to 0")),
    ("participation: 1.0", "participation: 0.5", 19, "quorum", ("quorum 2 is more than the 1 partner",)),
    ("name: fedavg", "name: fedavg, eta: 0.1", 9, "algorithm.strategy", ("fedavg does not take eta", "no parameters")),
    ("name: fedavg", "name: fedprox", 9, "algorithm.strategy", ("needs proximal_mu above 0",)),
    ("name: fedavg", "name: fedadam, server_momentum: 0.9", 9, "algorithm.strategy", ("beta_1, beta_2, eta, tau",)),
    ("name: fedavg", "name: fedavgm, tau: 0.1", 9, "algorithm.strategy", ("does not take tau", "server_momentum")),
    ("name: fedavg", "name: fedadagrad, beta_1: 0.1", 9, "algorithm.strategy", ("does not take beta_1", "eta, tau")),
    ("name: fedavg", "name: fedsgd", 9, "algorithm.strategy.name", ("'fedsgd'", "'fedavg', 'fedprox'")),
    ("name: test", "name: Test Run", 1, "name", ("'Test Run'", "pattern")),
    ("name: test", 'name: test\npurpose: "a\\nPRIVACY none"', 2, "purpose", ("pattern",)),
    ("name: test", 'name: test\nbenefit: "a\\e[2Jb"', 2, "benefit", ("pattern",)),
    ("name: test", 'name: test\nbenefit: "a\\u202eb"', 2, "benefit", ("pattern",)),
    ("declared_records: 240", "declared_records: 0", 4, "partners.ada.declared_records", ("0", "or equal to 1")),
    ("data: a.csv, ", "", 4, "partners.ada.data", ("missing",)),
    ("  ada:", "  coordinator:", 3, "partners", ("name coordinator is taken",)),
    ("  ada:", "  Ada_1:", 4, "partners.Ada_1", ("pattern",)),
    ("  ben: {data: b.csv, declared_records: 100}\n", "", 3, "partners", ("1 given, 2 to 100 allowed",)),
    ("quorum: 2", "quorum: 2\npopulation: {dataset: digits, clients: 3}", 1, "(whole file)", ("give either partners",)),
    ("quorum: 2", "quorum: 2\nseed: -1", 20, "seed", ("-1", "greater than or equal to 0")),
    ("quorum: 2", "quorum: 2\ndeclared_tolerance: 0.6", 20, "declared_tolerance", ("0.6", "less than or equal to 0.5")),
    ("quorum: 2", "quorum: 2\nround_deadline_s: 0", 20, "round_deadline_s", ("0", "greater than 0")),
    ("quorum: 2", "quorum: 2\nexpires_days: 0", 20, "expires_days", ("0", "greater than or equal to 1")),
]


@pytest.mark.parametrize(("old", "new", "line", "key", "words"), BAD, ids=[b[1].replace("\n", "|")[-40:] for b in BAD])
def test_a_bad_value(tmp_path: Path, old: str, new: str, line: int, key: str, words: tuple[str, ...]) -> None:
    assert GOOD.count(old) == 1
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD.replace(old, new))
    message = caught.value.message
    assert f"{tmp_path}/c.yaml:{line}: {key}: " in message, message
    for word in words:
        assert word in message, message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("partition", "words"),
    [
        ("{kind: dirichlet}", "population.partition: alpha is missing"),
        ("{kind: quantity}", "population.partition: alpha is missing"),
        ("{kind: drawn}", "population.partition: records is missing"),
        ("{kind: iid, alpha: 1}", "population.partition.alpha: alpha goes with"),
        ("{kind: iid, records: 1}", "population.partition.records: records goes with"),
        ("{kind: iid}\nprivacy: {kind: central, epsilon: 1, delta: 1e-4, clip_norm: 1}", "privacy: unit is missing"),
    ],
)
def test_what_is_missing_is_not_called_unwanted(tmp_path: Path, partition: str, words: str) -> None:
    text = GOOD[: GOOD.index("partners:")] + GOOD[GOOD.index("algorithm:") :]
    text += f"population:\n  dataset: digits\n  clients: 9\n  partition: {partition}\n"
    if "privacy" in partition:
        text = text[: text.index("privacy:")] + text[text.index("evaluation:") :]
    with pytest.raises(ConfigError, match=words):
        load(tmp_path, text)


def test_what_data_show_is_told_with_its_place(tmp_path: Path) -> None:
    load(tmp_path, GOOD)
    found = located(tmp_path / "c.yaml", ConfigError("privacy.delta 0.5 is too large", "hint"))
    assert (found.message, found.hint) == (f"{tmp_path}/c.yaml:16: privacy.delta 0.5 is too large", "hint")
    for other in ("no data set 'x'", "a: b", "privacy.nothing is there"):
        assert located(tmp_path / "c.yaml", ConfigError(other)).message == other


SHARED = (
    GOOD.replace("declared_records: 100}\n", "declared_records: 100}\n  cy: {data: c.csv, declared_records: 60}\n")
    .replace("steps: 6", "steps: 1")
    .replace("  epsilon: 1.0", "  noise: shared\n  epsilon: 1.0")
    .replace("quorum: 2", "quorum: 3\nsecure_aggregation: {colluding: 1, retries: 2}")
)


@pytest.mark.parametrize("kind", ["noise: shared", "kind: shared", "kind: local", "noise: none"])
def test_secure_aggregation_goes_with_every_kind(tmp_path: Path, kind: str) -> None:
    text = SHARED.replace("noise: shared", kind)
    if "none" in kind:
        text = text.replace("  epsilon: 1.0\n  delta: 1.0e-4\n  clip_norm: 1.0\n", "")
    config = load(tmp_path, text)
    assert config.privacy.kind == kind.split()[1]
    assert config.secure_aggregation is not None
    assert (config.secure_aggregation.colluding, config.secure_aggregation.retries) == (1, 2)


# (what stands in SHARED, what is put there, the key, what else the message says)
BAD_SHARED: list[tuple[str, str, str, tuple[str, ...]]] = [
    ("noise: shared", "noise: shared\n  kind: shared", "privacy.noise", ("another name of kind: give one",)),
    ("noise: shared", "noise: elsewhere", "privacy", ("'local', 'shared', 'central' or 'none'",)),
    ("  clip_norm: 1.0\n", "", "privacy", ("kind shared needs clip_norm",)),
    ("secure_aggregation: {colluding: 1, retries: 2}", "", "(whole file)", ("secure_aggregation is missing", "colluding")),
    ("colluding: 1, ", "", "secure_aggregation.colluding", ("missing",)),
    ("colluding: 1", "colluding: -1", "secure_aggregation.colluding", ("greater than or equal to 0",)),
    ("retries: 2", "retries: -1", "secure_aggregation.retries", ("greater than or equal to 0",)),
    ("retries: 2", "retries: 2, threshold: 2", "secure_aggregation.threshold", ("unknown key",)),
    ("retries: 2", "retries: 2, dimension: 0", "secure_aggregation.dimension", ("greater than or equal to 1",)),
    ("  cy: {data: c.csv, declared_records: 60}\n", "", "quorum", ("quorum 3 is more than the 2",)),
    ("colluding: 1", "colluding: 2", "secure_aggregation.colluding", ("2 is too many of 3 partners", "At most 1")),
    ("quorum: 3", "quorum: 2", "quorum", ("quorum 2", "colluding 1", "of 3 partners at least 3")),
    ("steps: 1", "steps: 2", "algorithm.local.steps", ("must be 1", "one gradient step")),
    ("name: sgd", "name: adam", "algorithm.local.optimizer", ("sgd without momentum", "server_momentum")),
    ("lr: 0.2", "lr: 0.2, momentum: 0.5", "algorithm.local.optimizer", ("sgd without momentum",)),
    ("name: fedavg", "name: fedprox, proximal_mu: 0.1", "algorithm.strategy", ("must not be fedprox", "fedavg does the same")),
    ("rounds: 10", "rounds: 10\n  weighting: uniform", "algorithm.weighting", ("must be declared",)),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "key", "words"), BAD_SHARED, ids=[b[2] for b in BAD_SHARED])
def test_what_secure_aggregation_cannot_keep(
    tmp_path: Path, old: str, new: str, key: str, words: tuple[str, ...]
) -> None:
    assert SHARED.count(old) == 1
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, SHARED.replace(old, new))
    assert f": {key}" in caught.value.message
    for word in words:
        assert word in caught.value.message


CENTRAL = (
    GOOD[: GOOD.index("partners:")]
    + "population: {dataset: digits, clients: 500}\n"
    + GOOD[GOOD.index("algorithm:") :]
    .replace("participation: 1.0", "participation: 0.1\n  weighting: uniform")
    .replace("  epsilon: 1.0", "  kind: central\n  unit: client\n  epsilon: 1.0")
    .replace("quorum: 2", "quorum: 0")
)


def test_central_noise_is_read(tmp_path: Path) -> None:
    config = load(tmp_path, CENTRAL)
    assert (config.privacy.kind, config.privacy.unit, config.quorum) == ("central", "client", 0)


# (what stands in CENTRAL, what is put there, the key at whose line it is said, what else the message says)
BAD_CENTRAL: list[tuple[str, str, str, tuple[str, ...]]] = [
    ("  unit: client\n", "", "privacy", ("unit is missing: central noise",)),
    ("kind: central", "kind: local", "privacy.unit", ("unit client goes with kind central",)),
    ("unit: client", "unit: user", "privacy.unit", ("'record' or 'client'",)),
    ("population: {dataset: digits, clients: 500}", "partners: {ada: {data: a, declared_records: 9}, ben: {data: b, declared_records: 9}}",
     "privacy.kind", ("simulated populations only", "trusted")),
    ("quorum: 0", "quorum: 1", "quorum", ("must be 0", "secret")),
    ("weighting: uniform", "weighting: declared", "algorithm.weighting", ("must be uniform",)),
    ("kind: public", "kind: private, noise_multiplier: 5", "evaluation.kind", ("private charges records",)),
    ("quorum: 0", "quorum: 0\nsecure_aggregation: {colluding: 0}", "secure_aggregation", ()),
    ("quorum: 0", "quorum: 0\nsystem: {dropout: 0.1}", "system", ("how many were asked",)),
    ("delta: 1.0e-4", "delta: 0.002", "privacy.delta", ("not below 1/n", "0.002 for 500 clients")),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "key", "words"), BAD_CENTRAL, ids=[b[1][-40:] for b in BAD_CENTRAL])
def test_what_central_noise_cannot_keep(tmp_path: Path, old: str, new: str, key: str, words: tuple[str, ...]) -> None:
    assert CENTRAL.count(old) == 1
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text := CENTRAL.replace(old, new))
    first = key.split(".")[0]
    line = next(n for n, one in enumerate(text.splitlines(), 1) if one.startswith(f"{first}:"))
    places = [int(part.split(":")[1]) for part in caught.value.message.splitlines() if f": {key}: " in part]
    assert places, caught.value.message
    assert line <= places[0] <= line + 8
    for word in words:
        assert word in caught.value.message, caught.value.message


def test_secure_aggregation_needs_three_partners_with_keys(tmp_path: Path) -> None:
    two = SHARED.replace("  cy: {data: c.csv, declared_records: 60}\n", "").replace("quorum: 3", "quorum: 2")
    with pytest.raises(ConfigError, match="3 to 100 partners with keys"):
        load(tmp_path, two)
    start, rest = SHARED.split("partners:\n")
    many = start + "population: {dataset: digits, clients: 101}\n" + rest[rest.index("algorithm:") :]
    with pytest.raises(ConfigError, match="3 to 100 partners with keys"):
        load(tmp_path, many)


@pytest.mark.parametrize(("change", "fine"), [({"steps: 1": "steps: 6"}, True), ({"quorum: 3": "quorum: 2"}, False)])
def test_of_local_noise_only_the_quorum_matters(tmp_path: Path, change: dict[str, str], fine: bool) -> None:
    text = SHARED.replace("noise: shared", "noise: local")
    for old, new in change.items():
        text = text.replace(old, new)
    with contextlib.nullcontext() if fine else pytest.raises(ConfigError, match="at least 3"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("partners", "colluding", "threshold"), [(3, 0, 2), (3, 1, 3), (4, 0, 3), (4, 1, 3), (10, 2, 7), (100, 98, 100)]
)
def test_the_threshold_is_the_least_that_will_do(partners: int, colluding: int, threshold: int) -> None:
    assert threshold_of(partners, colluding) == threshold
    assert 2 * threshold - partners > colluding >= 2 * (threshold - 1) - partners


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD.replace("rounds: 10", "rounds: 0").replace("epsilon: 1.0", "epsilon: 0"))
    assert "c.yaml:7: algorithm.rounds" in caught.value.message
    assert "c.yaml:15: privacy.epsilon" in caught.value.message


def test_too_many_partners(tmp_path: Path) -> None:
    entries = "".join(f"  p{i}: {{data: a.csv, declared_records: 10}}\n" for i in range(SIGNED_PARTNERS_MAX + 1))
    with pytest.raises(ConfigError, match="103 given, 2 to 100 allowed"):
        load(tmp_path, GOOD.replace("partners:\n", "partners:\n" + entries))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [a", "c.yaml:1:9: not valid YAML"),
        ("name: a\n\tb: c", "c.yaml:2:1: not valid YAML"),
        ("name: a\nname: b", "c.yaml:2:1: not valid YAML: key 'name' given twice"),
        (
            GOOD.replace("  epsilon: 1.0", "  epsilon: 1.0\n  epsilon: 9.0"),
            "c.yaml:16:3: not valid YAML: key 'epsilon'",
        ),
        ("1: a", "key 1 is not text"),
        ("? [a, b]\n: c", "is not text"),
        ("a: 2001-99-99", "not valid YAML"),
        ("a: !!int x", "not valid YAML"),
        ("a: !!bool maybe", "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: 0x" + "f" * 5000, "unknown key (found a very long number)"),
        ("a: !!python/object:os.system x", "not valid YAML"),
        ("a: &a [*a]", "a: unknown key"),
        ("--- a\n--- b", "not valid YAML"),
        ("[" * 5000, "nested too deeply"),
        ("a: \x00", "not valid YAML"),
        (b"a: \xff\xfe", "not UTF-8"),
        ("", "c.yaml: the file is empty"),
        ("# to do", "c.yaml: the file is empty"),
        ("just words", "c.yaml:1: (whole file)"),
        ("- a\n- b", "c.yaml:1: (whole file): must be keys with values"),
    ],
)
def test_what_is_no_configuration(tmp_path: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert words in caught.value.message
    assert caught.value.hint


def test_aliases_that_stand_for_gigabytes(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"] + [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "\n".join(lines))
    assert len(caught.value.message) < 1_000_000


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)no such file.*configs/"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)


@given(st.binary(max_size=120))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ConfigError):
        load(tmp_path, data)


_scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=4)
)
_values = st.recursive(
    _scalars, lambda i: st.lists(i, max_size=3) | st.dictionaries(st.text(max_size=5), i, max_size=3)
)


def _spoil(value: Any, path: list[int], new: Any) -> Any:
    """`value` with `new` somewhere inside."""
    if not path or not isinstance(value, dict) or not value:
        return new
    key = list(value)[path[0] % len(value)]
    return {**value, key: _spoil(value[key], path[1:], new)}


@given(st.lists(st.integers(0, 20), min_size=1, max_size=4), _values)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_any_value_anywhere(tmp_path: Path, place: list[int], new: Any) -> None:
    spoilt = yaml.safe_dump(_spoil(yaml.safe_load(GOOD), place, new))
    with contextlib.suppress(ConfigError):  # some of them are allowed
        assert 0 < (load(tmp_path, spoilt).privacy.epsilon or 1) < 101


@given(st.text(st.sampled_from("ab:-[]{}&*!?|>'\"%@`, \n\t#0.e~=<"), max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_any_yaml_punctuation(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load(tmp_path, GOOD + text.replace("\x00", "") + "\nzz: {}")


def test_delta_must_be_below_one_over_n() -> None:
    check_delta(0.00999, 100)
    check_delta(None, 100)
    for delta in (0.01, 0.5):
        with pytest.raises(ValueError, match="not below 1/n"):
            check_delta(delta, 100)
