"""The training job, and what it leaves: checkpoints."""
