"""The search service: stores of chunks behind one port, ranked by our own tokens and fusion. Nothing heavy is imported here."""
