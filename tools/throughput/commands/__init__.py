"""The commands of `throughput`: one module each, with its options, what is asked of them, and what it calls."""
