"""Durable work: what is asked here is answered whoever dies meanwhile, and is there for whoever knows its id.

| for | use |
|---|---|
| one question | ``job = await client.submit("chat", "Hello")``, then ``await job``, or ``await client.job(job.id)`` elsewhere |
| many, now | ``batch = await client.batch("chat", rows, name="monday")``, then ``await batch.results()`` |
| many, at a pace | ``await client.map("chat", rows, concurrency=64, name="monday")`` |
| without asyncio | ``modelbus.job(id).result()``, ``LLM("chat").submit(...)``, ``LLM("chat").map(...)`` |
"""

from modelbus_broker.jobs import JobStatus

from .batch import Batch, Progress, Row
from .job import Job

__all__ = ["Batch", "Job", "JobStatus", "Progress", "Row"]
