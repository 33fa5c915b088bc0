"""The one place where jobs of the SDK get into their queues: with the hooks around them, and a span."""

from __future__ import annotations

from modelbus_broker.jobs import Jobs
from modelbus_broker.messages import Chat, JobRecord, Usage

from ..hooks import JobCall, around
from ..tracing import Asking


async def submit_job(jobs: Jobs, call: JobCall) -> JobRecord:
    """Returns when the job is in its queue. Raises as ``Jobs.submit``, and what hooks raise."""

    async def submitted(asked: JobCall) -> JobRecord:
        sampling = asked.task.sampling if isinstance(asked.task, Chat) else None
        with Asking("submit", asked.model, asked.options, sampling) as asking:
            record = await jobs.submit(
                asked.model,
                asked.task,
                asking.options,
                kept_s=asked.kept_s,
                name=asked.name,
                batch=asked.batch,
                index=asked.index,
                labels=asked.labels,
            )
            asking.answered(Usage(), id=record.id)
        return record

    return await around(call, submitted, JobRecord)
