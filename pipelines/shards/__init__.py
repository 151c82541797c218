"""Where samples lie and in which order they come: shards, indices, labels, the threads that read."""
