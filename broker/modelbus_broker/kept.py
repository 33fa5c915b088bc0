"""Reading whole answers that workers have kept: in the bucket ``answers``, what is large in the blob store."""

from __future__ import annotations

from . import names
from .blobs import get_blob
from .buckets import Bucket
from .connection import Bus
from .messages import Frame, KeptAnswer, decode_frames, decode_kept_answer


async def read_kept(bus: Bus, request_id: str) -> KeptAnswer | None:
    """What is kept of a request; None: nothing is. Raises BusUnavailable."""
    entry = await Bucket(bus, names.BUCKET_ANSWERS).get(request_id)
    return None if entry is None or entry.deleted else decode_kept_answer(entry.value)


async def frames_of(bus: Bus, kept: KeptAnswer) -> list[Frame]:
    """The frames of a kept answer, those of the runs before first; none of one that is lost or has failed.

    Raises:
        ModelBusError: they lie in the blob store and cannot be read there.
    """
    frames = await get_blob(bus, kept.blob) if kept.blob is not None else kept.frames
    return decode_frames(frames) if frames else []
