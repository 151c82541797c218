"""Measurements for developers, each a script: `python -m tools.bench.convert|scale|remote|step|plan`."""
