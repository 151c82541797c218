"""The `predict` command: classifies images with a trained network. Its command line is `cli.py`."""
