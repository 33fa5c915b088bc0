"""What runs on hosts: the node, the worker loop and the engines."""
