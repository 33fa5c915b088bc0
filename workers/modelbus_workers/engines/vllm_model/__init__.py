"""What the engine ``vllm`` is made of; nothing here is imported before the engine starts."""
