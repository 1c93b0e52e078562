"""Who takes part in a run: partners by name, and the node by which a Grid knows each.

A simulated population is one too, of a million clients and no list of them (simulations/population.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import overload


class Roster(Sequence[str]):
    """Names in the order in which updates are asked for.

    Args:
        nodes: name -> the Grid's node id.
    """

    asked = True
    """Whether each of them is asked for a run, and may refuse it; else all of them stand ready for every one."""

    def __init__(self, nodes: Mapping[str, int]) -> None:
        self._nodes = dict(nodes)
        self._list = list(self._nodes)
        self._names = {node: name for name, node in self._nodes.items()}

    def node(self, name: str) -> int:
        """The Grid's node id of a name.

        Raises:
            KeyError: nobody here is called so.
        """
        return self._nodes[name]

    def name(self, node: int) -> str | None:
        """Who answers from a node; None: nobody here."""
        return self._names.get(node)

    @property
    def measuring(self) -> Sequence[str]:
        """Who may hold rows to measure a model on, in order."""
        return self._list

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self._list[index]

    def __len__(self) -> int:
        return len(self._list)

    def __iter__(self) -> Iterator[str]:
        return iter(self._list)

    def __contains__(self, name: object) -> bool:
        return name in self._nodes
