"""Flower carries messages: the grid's nodes, and the exchange and evaluation over them."""
