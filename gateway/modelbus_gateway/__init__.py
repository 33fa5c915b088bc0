"""The OpenAI face of the bus: an HTTP server that keeps nothing that must not be lost.

| module | what it holds |
|---|---|
| ``app`` | `create_app`: the route table, and what the routes share |
| ``handlers`` | one function per route |
| ``openai_types`` | what clients send, as structs |
| ``fields`` | the table: what the gateway does with every field |
| ``translate`` | from a client's request to a task on the bus; pure |
| ``answers`` | from a collected answer to the body of a plain response; pure |
| ``events`` | from frames to server-sent events; pure |
| ``delivery`` | writing to clients that may be slow |
| ``edge`` | the one middleware: key, CORS, errors, metrics |
| ``metrics`` | what Prometheus reads |
| ``settings`` | arguments and environment |
| ``server`` | one process: listen, serve, stop |
| ``processes`` | several processes on one port |
"""
