"""The graph of a run in the server's state: learned from what the clients' training added."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedmira.graphs import Graph
from fedmira.methods.context import MethodContext
from fedmira.methods.parts.kept_products import KeptProducts, Take
from fedmira.methods.parts.travelled import TRAVELLED, Travelled

__all__ = ["GRAPH", "Learning"]

GRAPH = "graph"


@dataclass(frozen=True, slots=True)
class Learning:
    """What a method keeps of a learned graph; a fixed graph needs nothing.

    Numbers of the state: "graph" (float64 [E, 3], the edges that are remembered), and where sums of
    local training are compared, "travelled_sketch".

    Attributes:
        context: the federation.
    """

    context: MethodContext

    @property
    def follows(self) -> bool:
        """Whether the graph is learned from what local training has added."""
        return self.context.graph.learned and self.context.graph.space == "travelled"

    @property
    def compared(self) -> str | None:
        """The space of adapters that the graph is learned in, None where it is none."""
        if not self.context.graph.learned or self.follows:
            return None
        return self.context.graph.space if self.context.low_rank else "factor"

    @property
    def _travelled(self) -> Travelled:
        return Travelled(self.context.graph.sketch, self.context.low_rank)

    def initial(self) -> dict[str, Tensor]:
        """The numbers before anybody has trained."""
        graph, clients = self.context.graph, self.context.clients
        numbers = {GRAPH: graph.initial(clients)} if graph.learned else {}
        return numbers | (self._travelled.initial(len(clients)) if self.follows else {})

    def learn(
        self,
        numbers: dict[str, Tensor],
        cohort: list[int],
        trained: Tensor,
        took: Take,
        sent: Take,
        kept: KeptProducts,
    ) -> Mapping[str, float]:
        """Write what a round taught into the numbers.

        Args:
            numbers: of the next state, changed in place.
            cohort: positions of the round's clients.
            trained: who has trained so far, bool [K].
            took: reads adapters as local training left them.
            sent: reads adapters as the server sent them.
            kept: inner products of adapters, refreshed for this round.

        Returns:
            Figures for the log.
        """
        if not self.context.graph.learned:
            return {}
        if self.compared is None:
            travelled = self._travelled
            numbers[TRAVELLED] = travelled.added(
                numbers[TRAVELLED], cohort, took(cohort), sent(cohort)
            )
            products = travelled.products(numbers[TRAVELLED])
        else:
            products = kept.of(numbers, self.compared)
        learned = self.context.graph.update(numbers[GRAPH], products, trained)
        numbers[GRAPH] = learned.memory
        return learned.figures

    def graph(self, numbers: Mapping[str, Tensor], round_number: int) -> tuple[Graph, bool]:
        """The graph as it is remembered, without edges while it warms up, and whether it acts.

        Args:
            numbers: of the state.
            round_number: of the round that ends.
        """
        source, clients = self.context.graph, self.context.clients
        memory = numbers[GRAPH] if source.learned else source.initial(clients)
        graph, acts = source.graph(memory, clients), source.acts(round_number)
        return (graph if acts else graph.without_edges()), acts
