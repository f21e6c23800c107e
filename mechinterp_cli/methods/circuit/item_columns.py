"""What heads and single neurons are, as columns of the tables that list edges elsewhere."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from mechinterp_cli.engine.circuit_items import Items
from mechinterp_cli.methods.beside import Row
from mechinterp_cli.methods.circuit.choose import Bools, Integers
from mechinterp_cli.methods.circuit.tables import EdgeColumns

ALL_READERS = "all"
"""What an item leads into, in tables: all that reads it sees the same."""


class ItemColumns(EdgeColumns):
    """What items are, as columns.

    Args:
        items: The model's.
    """

    def __init__(self, items: Items) -> None:
        super().__init__(items.graph)
        self.items = items

    @property
    def count(self) -> int:
        """How many rows there can be."""
        return len(self.items)

    @cached_property
    def unlisted(self) -> Bools:
        """[items] those that are in every circuit, and not listed among its members."""
        return np.asarray(self.items.source == 0)

    @cached_property
    def _names(self) -> pa.Array:
        return pa.array([self.items.source_name(item) for item in range(self.items.per_span)])

    def of(self, edges: Integers) -> dict[str, Any]:
        """The columns of some items."""
        items, sources = self.items, self.graph.sources
        at, heads = items.source[edges], np.array([source.kind == "head" for source in sources])
        layers, numbers = (np.array([getattr(s, name) for s in sources], dtype=np.int32) for name in ("layer", "head"))
        columns: dict[str, Any] = {
            "edge": pa.array(edges.astype(np.int32)),
            "source": self._names.take(pa.array(edges % items.per_span)),
            "source_layer": pa.array(layers[at], mask=at == 0),
            "source_head": pa.array(numbers[at], mask=~heads[at]),
            "target": pa.repeat(pa.scalar(ALL_READERS), len(edges)),
        }
        if len(self.graph.spans) > 1:
            columns["span"] = pa.array(self.graph.spans).take(pa.array(items.span[edges]))
        return columns

    def row(self, edge: int) -> Row:
        """The columns of one item."""
        columns: Mapping[str, Any] = self.of(np.array([edge], dtype=np.int64))
        return {name: values[0].as_py() for name, values in columns.items()}
