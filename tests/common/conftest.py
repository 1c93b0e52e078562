"""A CA for the tests of certificates."""

from __future__ import annotations

from pathlib import Path

import pytest

from hansa.common.connection_ca import ConnectionCA


@pytest.fixture
def ca(tmp_path: Path) -> ConnectionCA:
    return ConnectionCA.create(tmp_path / "ca")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> ConnectionCA:
    """For what changes nothing in it."""
    return ConnectionCA.create(tmp_path_factory.mktemp("ca") / "ca")
