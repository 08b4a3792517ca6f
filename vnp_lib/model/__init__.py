"""The ESM-2 model: weights, tokens, layers, attention, heads and pooling."""
