"""Measures what a node can do, on the node, before it trains: processors, memory, storage, GPUs and links."""
