"""The training job's parts: settings, state, step, scores, what a run leaves."""
