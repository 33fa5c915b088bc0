"""The node: the agent on a host that claims replicas of deployments, starts their workers and watches them.

| module | holds |
|---|---|
| ``settings`` | what a node is told, from the command line |
| ``resources`` | what the host has: CPUs, memory, GPUs, engines |
| ``room`` | whether a deployment fits (pure) |
| ``claiming`` | when to claim, what a refusal means, how a rollout goes on (pure) |
| ``processes`` | one worker process: start, logs, end |
| ``keeper`` | a small process that ends the workers' process groups when the node was killed |
| ``secrets`` | an engine's parameters with their secrets |
| ``replica`` | one claimed replica and its workers |
| ``agent`` | the loops that tie these together |
"""
