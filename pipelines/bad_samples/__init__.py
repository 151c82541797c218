"""Samples that cannot be used: how they are detected, left out and recorded."""
