"""Everything that travels on the bus: one module per receiver.

| module | who receives it |
|---|---|
| ``worker`` | workers: requests, control messages |
| ``publisher`` | gateways and SDK processes: frames, alive messages |
| ``registry`` | readers of the buckets: deployments, claims, workers, nodes |
| ``ledger``, ``usage`` | the usage and dead-letter streams |
| ``answers`` | those who ask again: kept answers, idempotency keys, jobs |
| ``chat`` | the tasks inside a request |
| ``files`` | gateways: files, vector stores, and what is to be indexed (imported from there) |
| ``search`` | search services, and those who ask them: operations and replies (imported from there, they are many) |
"""

from .answers import (
    JobRecord,
    KeptAnswer,
    KeyRecord,
    decode_job_record,
    decode_kept_answer,
    decode_key_record,
)
from .base import Message, Row, encode, encode_list, to_json
from .chat import (
    AudioData,
    AudioPart,
    Chat,
    ChatMessage,
    Classification,
    Completion,
    Decision,
    Embedding,
    FileData,
    FilePart,
    FunctionCall,
    ImagePart,
    ImageURL,
    Ladder,
    Part,
    RefusalPart,
    Role,
    Rung,
    Sampling,
    Score,
    Storage,
    Task,
    TextPart,
    ToolCall,
)
from .ledger import DeadLetter, UsageEvent, decode_dead_letter, decode_usage_events
from .publisher import (
    TERMINAL,
    Accepted,
    AdapterChecked,
    Alive,
    AliveReply,
    Cancel,
    Cancelled,
    Context,
    Delta,
    Document,
    Done,
    Failed,
    FindRun,
    FinishReason,
    FoundRun,
    Frame,
    Grounding,
    Held,
    RunState,
    Started,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
    Vectors,
    decode_adapter_checked,
    decode_alive,
    decode_alive_reply,
    decode_cancelled,
    decode_find,
    decode_found,
    decode_frames,
    decode_held,
    decode_publisher_control,
)
from .registry import (
    GPU,
    AdapterRecord,
    Capabilities,
    Claim,
    Deployment,
    NodeRecord,
    StartFailure,
    WorkerRecord,
    decode_adapter,
    decode_claim,
    decode_deployment,
    decode_node,
    decode_start_failure,
    decode_worker,
)
from .usage import Usage
from .worker import (
    Adapter,
    Adopt,
    Answered,
    BlobRef,
    CheckAdapter,
    Control,
    Go,
    Lane,
    LetGo,
    Measure,
    Probe,
    Request,
    Resend,
    Stop,
    decode_control,
    decode_request,
    decode_task,
)

__all__ = [
    "Accepted", "Adapter", "AdapterChecked", "AdapterRecord", "Adopt", "Alive", "AliveReply", "Answered", "AudioData", "AudioPart", "BlobRef", "Cancel", "Cancelled",
    "Capabilities", "Chat", "ChatMessage", "CheckAdapter", "Claim", "Classification", "Completion", "Context", "Control", "DeadLetter", "Decision", "Delta", "Deployment",
    "Document", "Done", "Embedding", "Failed", "FileData", "FilePart", "FindRun", "FinishReason", "FoundRun", "Frame",
    "FunctionCall", "GPU", "Go", "Grounding", "Held", "ImagePart", "ImageURL", "JobRecord", "KeptAnswer", "KeyRecord", "Ladder", "Lane", "LetGo",
    "Measure", "Message", "NodeRecord", "Part", "Probe", "RefusalPart", "Request", "Resend", "Role", "Row", "RunState", "Rung",
    "Sampling", "Score", "StartFailure", "Started", "Stop", "Storage", "TERMINAL", "Task", "TextPart", "TokenLogprob", "ToolCall",
    "ToolCallDelta", "TopLogprob", "Usage", "UsageEvent", "Vectors", "WorkerRecord", "decode_adapter", "decode_adapter_checked", "decode_alive",
    "decode_alive_reply", "decode_cancelled", "decode_claim", "decode_control", "decode_dead_letter",
    "decode_deployment", "decode_find", "decode_found", "decode_frames", "decode_held", "decode_job_record", "decode_kept_answer",
    "decode_key_record", "decode_node", "decode_publisher_control", "decode_request", "decode_start_failure", "decode_task",
    "decode_usage_events", "decode_worker", "encode", "encode_list", "to_json",
]  # fmt: skip
