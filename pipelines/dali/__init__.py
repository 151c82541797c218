"""The DALI graph, and the loader that feeds it."""
