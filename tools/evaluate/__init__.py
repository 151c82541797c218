"""The `evaluate` command: what a checkpoint scores on the validation split."""
