"""The `throughput` command: speed against that of peers, competitors taking turns. Its command line is `cli.py`."""
