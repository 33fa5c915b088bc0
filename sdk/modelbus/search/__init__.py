"""Stores of texts and vectors, searched over the bus."""
