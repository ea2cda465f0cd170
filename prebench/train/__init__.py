"""The shared training core: loop, objective, cached features, regularizers."""
