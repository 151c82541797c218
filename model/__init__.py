"""Everything that owns parameters: the network, its average, the loss, the optimizer, what is saved of them."""
