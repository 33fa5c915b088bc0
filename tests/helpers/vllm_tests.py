"""Which tests run in the environment that has vLLM, and nowhere else."""

#: Below ``tests``, in the order in which they run there.
VLLM_TESTS = tuple(
    f"workers/engines/test_vllm{part}.py" for part in ("_parallel", "_pooling", "_reading", "_images", "_command", "")
)
