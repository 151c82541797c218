"""`python -m tools.predict`: what a trained network makes of images. Its command line is `cli.py`."""
