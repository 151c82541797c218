"""Logs a run to Weights & Biases and to MLflow, from a thread for each."""
