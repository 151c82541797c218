"""`python -m tools.export`: a trained network as a file that needs none of this project. Its command line is `cli.py`."""
