"""Shards in an object store, and their local copies."""
