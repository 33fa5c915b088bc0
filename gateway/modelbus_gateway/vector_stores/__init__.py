"""Vector stores: ``/v1/vector_stores``, on the stores of a search service."""
