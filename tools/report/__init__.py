"""The `report` command: charts and tables of training runs, as an HTML page or a PNG. Its command line is `cli.py`."""
