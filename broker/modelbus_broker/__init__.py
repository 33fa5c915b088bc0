"""The bus: names, messages, streams, pulling, replies, registry, blobs, embedded server, credentials."""
