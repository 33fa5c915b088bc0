"""The embedded engine: SQLite holds the truth, a tantivy index and a matrix in memory are made from it."""
