"""Stores under the names that other frameworks give them; each module needs its extra."""
