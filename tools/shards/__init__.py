"""The `shards` command: converts image collections to WebDataset shards, and checks, indexes and displays shards.

`cli.py` defines the options, and each verb has a module: `convert`, `verify`, `index`, `info`, `preview`, `demo`. A conversion
lists the images (`sources/`), assigns them to shards (`plan`), continues an earlier run (`resume`), builds each shard (`build`,
with `check`, `encode`, `write`) on several processes (`parallel`), and adds the split to the data set (`manifest`, `storage`).
"""
