"""Samples that cannot be used: how they are found, left out and written down."""
