"""The shards of a split: where its samples and labels lie, their order, and the threads that read them."""
