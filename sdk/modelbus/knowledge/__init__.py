"""Knowledge bases: a folder of documents becomes a store, questions get answers with sources."""
