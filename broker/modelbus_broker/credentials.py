"""Who may do what on a bus that listens beyond this host.

| role | held by | may |
|---|---|---|
| admin | who deploys; the head's own node and gateway | everything |
| client | gateways and SDK processes elsewhere | publish requests, read their answers and the registry |
| worker | nodes on other hosts and their workers | pull requests, send frames, write claims and their own records |

A role is one nkey: the server knows its public half, a credential file holds the seed. Each role has inboxes under a
prefix of its own, so that no role can listen to the replies of another. All holders of one role's file trust each other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from . import names
from .errors import ConfigurationError
from .sealing import make_seal_key, public_seal_key
from .server import ServerUser

Role = Literal["admin", "client", "worker"]
ROLES: tuple[Role, ...] = get_args(Role)

_BEGIN, _END = "-----BEGIN MODELBUS CREDENTIAL-----", "-----END MODELBUS CREDENTIAL-----"
_QUEUES = (names.STREAM_RE, names.STREAM_HI, names.STREAM_LO, names.STREAM_JOBS)
_REGISTRY = (
    names.BUCKET_DEPLOYMENTS,
    names.BUCKET_CLAIMS,
    names.BUCKET_FAILURES,
    names.BUCKET_WORKERS,
    names.BUCKET_NODES,
    names.BUCKET_RUNS,
    names.BUCKET_ANSWERS,
    names.BUCKET_ADAPTERS,
)
#: What only clients read: a worker has no business with API keys.
_CLIENT_BUCKETS = (
    names.BUCKET_ALIASES,
    names.BUCKET_KEYS,
    names.BUCKET_IDEMPOTENCY,
    names.BUCKET_JOBS,
    names.BUCKET_FILES,
    names.BUCKET_VECTOR_STORES,
)


class Credential(msgspec.Struct, frozen=True, kw_only=True):
    """What a credential file says. Its repr shows no secret."""

    role: Role | Literal[""] = ""  #: "": a file that modelbus did not make; the server knows what it may
    seed: str = ""  #: nkey seed
    user_credentials: str = ""  #: path of a NATS .creds file, which holds a JWT and a seed
    seal_key: str = ""  #: the cluster's private node key (hex); "" for clients

    @property
    def may_administer(self) -> bool:
        """Whether it is worth trying to declare streams and consumers."""
        return self.role in ("admin", "")

    def __repr__(self) -> str:
        return f"Credential(role={self.role!r})"


def make_credentials(folder: Path) -> dict[Role, Path]:
    """The credential files of a cluster, one per role; made if they are not there, readable by their owner only.

    The cluster's node key is in ``node.key`` beside ``folder`` and in the files of those who may unseal secrets.

    Raises:
        ConfigurationError: a file that is there is damaged.
    """
    import nkeys  # imported here: clients that only read a file do not need it

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    seal_key = make_seal_key(folder.parent / "node.key")
    paths: dict[Role, Path] = {role: folder / f"{role}.cred" for role in ROLES}
    for role, path in paths.items():
        if path.exists():
            if load_credential(path).role != role:
                raise ConfigurationError(f"{path} is not the {role} credential: remove it")
            continue
        seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER).decode()
        lines = [_BEGIN, f"role: {role}", f"nkey-seed: {seed}"]
        if role != "client":
            lines.append(f"seal-key: {seal_key}")
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write("\n".join([*lines, _END, ""]))
        draft.replace(path)
    return paths


def server_users(folder: Path) -> list[ServerUser]:
    """The users for the server's configuration, made from the credential files in ``folder``."""
    import nkeys

    users = []
    for role, path in make_credentials(folder).items():
        seed = load_credential(path).seed
        public = nkeys.from_seed(bytearray(seed.encode())).public_key.decode()
        publish, subscribe = _permissions(role)
        users.append(ServerUser(nkey=public, publish=publish, subscribe=subscribe))
    return users


def load_credential(path: Path) -> Credential:
    """Reads a modelbus credential, a NATS .creds file or a file with a bare nkey seed.

    Raises:
        ConfigurationError: it cannot be read or is none of these. The message never shows what is in it.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigurationError(f"the credential file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path} is not a credential file") from None
    if "-----BEGIN NATS USER JWT-----" in text:
        return Credential(user_credentials=str(path))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if _BEGIN in lines and _END in lines:
        return _parse(path, lines[lines.index(_BEGIN) + 1 : lines.index(_END)])
    if len(lines) == 1 and _is_seed(lines[0]):
        return Credential(seed=lines[0])
    raise ConfigurationError(
        f"{path} is not a credential file: `modelbus start --head --listen ADDR` makes them on the head's host"
    )


def credential_options(path: str) -> dict[str, Any]:
    """The keyword arguments of ``nats.connect`` for this credential file; none for "".

    Raises:
        ConfigurationError: see ``load_credential``.
    """
    if not path:
        return {}
    credential = load_credential(Path(path).expanduser())
    if credential.user_credentials:
        return {"user_credentials": credential.user_credentials}
    options: dict[str, Any] = {"nkeys_seed_str": credential.seed}
    if credential.role:
        options["inbox_prefix"] = inbox_prefix(credential.role).encode()
    return options


def inbox_prefix(role: Role) -> str:
    return f"_INBOX_{role}"


def _parse(path: Path, lines: Sequence[str]) -> Credential:
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    role = fields.get("role")
    for known in ROLES:
        if role == known and _is_seed(fields.get("nkey-seed", "")):
            seal_key = fields.get("seal-key", "")
            if seal_key:
                public_seal_key(seal_key, where=f"the seal-key in {path}")
            return Credential(role=known, seed=fields["nkey-seed"], seal_key=seal_key)
    raise ConfigurationError(f"the credential file {path} is damaged: copy it again from the head's host")


def _is_seed(text: str) -> bool:
    return text.startswith("SU") and len(text) == 58 and text.isalnum()


def _permissions(role: Role) -> tuple[list[str], list[str]]:
    """(publish, subscribe): everything else is refused."""
    match role:
        case "admin":
            return [">"], [">"]
        case "worker":
            publish = [
                *(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.>" for stream in _QUEUES),
                *_acks(),
                "$JS.API.INFO",
                "$JS.API.STREAM.INFO.*",  # its clock is corrected by the server's
                *_reads(_REGISTRY),
                *_reads_blobs(),
                *(
                    f"$KV.{bucket}.>"
                    for bucket in (
                        names.BUCKET_CLAIMS,
                        names.BUCKET_FAILURES,
                        names.BUCKET_WORKERS,
                        names.BUCKET_NODES,
                        names.BUCKET_RUNS,
                        names.BUCKET_ANSWERS,
                    )
                ),
                f"$O.{names.BLOBS}.C.answer.*",  # answers to be kept that are too large for their bucket
                "mb.rsp.*.*",
                "mb.gw.*",
                names.USAGE,
                "mb.dead.>",
                names.FIND,  # whether another worker runs a job that was delivered twice
                # Answers to probes, to mb.find and mb.logs. The random inbox is the capability; none can be listened to.
                *_inboxes("admin", "client", "worker"),
            ]
            return publish, [
                f"{inbox_prefix(role)}.>",
                "mb.ctl.*",
                names.FIND,
                "mb.logs",
                *(f"$KV.{bucket}.>" for bucket in _REGISTRY),
            ]
        case "client":
            publish = [
                "mb.req.*.*.*",
                "mb.re.*.*",
                "mb.ctl.*",
                names.FIND,
                "mb.logs",
                *_acks(),  # a lost run's message is terminated by its publisher
                *(f"$JS.API.STREAM.MSG.DELETE.{stream}" for stream in _QUEUES),  # cancelling
                *(f"$JS.API.DIRECT.GET.{stream}" for stream in _QUEUES),  # looking for what to cancel
                "$JS.API.INFO",
                "$JS.API.STREAM.INFO.*",
                *(
                    f"$JS.API.CONSUMER.INFO.{stream}.*" for stream in _QUEUES
                ),  # how full a queue is, and whether it moves
                *(f"$JS.API.CONSUMER.LIST.{stream}" for stream in _QUEUES),
                # Where half an answer goes on, when nobody has made the consumer; to read and delete there is allowed anyway.
                f"$JS.API.CONSUMER.CREATE.{names.STREAM_RE}.*.mb.re.*.*",
                *_reads((*_REGISTRY, *_CLIENT_BUCKETS)),
                *_reads_blobs(),
                *_reads_blobs(names.FILES),
                f"$O.{names.FILES}.>",
                f"$JS.API.STREAM.PURGE.{names.object_stream(names.FILES)}",  # deleting a file
                f"$KV.{names.BUCKET_FILES}.>",
                f"$KV.{names.BUCKET_VECTOR_STORES}.>",
                names.INDEXING,
                f"$JS.API.CONSUMER.MSG.NEXT.{names.STREAM_INDEXING}.{names.INDEXERS}",
                *_acks(names.STREAM_INDEXING),
                f"$JS.API.DIRECT.GET.{names.STREAM_OUT}",
                f"$JS.API.DIRECT.GET.{names.STREAM_OUT}.>",
                f"$O.{names.BLOBS}.>",
                f"$KV.{names.BUCKET_RUNS}.>",
                f"$KV.{names.BUCKET_IDEMPOTENCY}.>",
                f"$KV.{names.BUCKET_JOBS}.>",
                f"$KV.{names.BUCKET_ANSWERS}.>",  # where a cancelled job is said to be that
                # Answers to alive messages, to publishers that take a request over, and to whoever cancels one.
                *_inboxes("admin", "client", "worker"),
            ]
            return publish, [
                f"{inbox_prefix(role)}.>",
                "mb.rsp.*.*",
                "mb.gw.*",
                "mb.ctl.*",
                *(f"$KV.{bucket}.>" for bucket in (*_REGISTRY, *_CLIENT_BUCKETS)),
            ]


def _acks(*streams: str) -> list[str]:
    """Both forms of the ack subject: servers may put domain and account before the stream."""
    return [form for stream in streams or _QUEUES for form in (f"$JS.ACK.{stream}.>", f"$JS.ACK.*.*.{stream}.>")]


def _reads(buckets: Sequence[str]) -> list[str]:
    streams = [names.bucket_stream(bucket) for bucket in buckets]
    return [
        form
        for stream in streams
        for form in (
            f"$JS.API.DIRECT.GET.{stream}",
            f"$JS.API.DIRECT.GET.{stream}.>",
            f"$JS.API.STREAM.MSG.GET.{stream}",
        )
    ]


def _reads_blobs(bucket: str = names.BLOBS) -> list[str]:
    stream = names.object_stream(bucket)
    return [f"$JS.API.DIRECT.GET.{stream}", f"$JS.API.DIRECT.GET.{stream}.>"]


def _inboxes(*roles: Role) -> list[str]:
    return [f"{inbox_prefix(role)}.>" for role in roles]
