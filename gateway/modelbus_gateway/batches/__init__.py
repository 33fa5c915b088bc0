"""``/v1/batches``: the requests of a file are answered in another one, in the background, whichever gateway dies."""
