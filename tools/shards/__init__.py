"""The `shards` command: image collections in, WebDataset shards out. Its command line is `cli.py`."""
