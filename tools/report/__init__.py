"""`python -m tools.report`: what runs have left behind, as one page or one picture. Its command line is `cli.py`."""
