"""Who is related: fixed and learned graphs, their bounds, and graph.json."""

from fedmira.graphs.blocks import Blocks, in_blocks
from fedmira.graphs.bounds import GraphBounds, graph_bounds
from fedmira.graphs.builders import (
    MOST_EDGES,
    all_pairs,
    category_graph,
    random_graph,
    shuffled,
    uniform_graph,
)
from fedmira.graphs.collaboration import collaboration_weights, project_on_simplex
from fedmira.graphs.files import file_graph, graph_of, graph_text, write_graph
from fedmira.graphs.graph import Graph
from fedmira.graphs.products import ExactProducts, InnerProducts, SketchedProducts
from fedmira.graphs.similarity import Likeness, likeness
from fedmira.graphs.sources import (
    BlocksGraph,
    CollaborationGraph,
    FixedGraph,
    GraphSource,
    LearnedGraph,
    graph_source,
)

__all__ = [
    "Blocks",
    "BlocksGraph",
    "CollaborationGraph",
    "ExactProducts",
    "FixedGraph",
    "Graph",
    "GraphBounds",
    "GraphSource",
    "InnerProducts",
    "LearnedGraph",
    "Likeness",
    "MOST_EDGES",
    "SketchedProducts",
    "all_pairs",
    "category_graph",
    "collaboration_weights",
    "file_graph",
    "graph_bounds",
    "graph_of",
    "graph_source",
    "graph_text",
    "in_blocks",
    "likeness",
    "project_on_simplex",
    "random_graph",
    "shuffled",
    "uniform_graph",
    "write_graph",
]
