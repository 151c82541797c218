"""Shards in an object store, and the copies of them on this machine."""
