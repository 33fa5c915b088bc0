"""The Elasticsearch engine, for stores that outgrow one process: servers 8.x and 9.x, features of the free licence only."""
