"""The `throughput` command: speed of the loader, the model, and training, and of other loaders. Its command line is cli.py."""
