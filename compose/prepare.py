"""Makes the secrets of a modelbus in containers: one credential per role, and what the bus must know of them.

    .venv/bin/python compose/prepare.py [FOLDER]        (default: secrets/ beside this file)

What is there already is kept, so that it can be run again.
"""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path

from modelbus_broker.credentials import make_credentials, server_users

SERVERS = ("nats", "nats-2", "nats-3")


def prepare(folder: Path) -> None:
    """Writes the files that docker-compose.yml and cluster.yml name.

    Raises:
        ConfigurationError: a credential that is there is damaged.
    """
    # Containers run as users of their own and see the files with the host's modes, so the files are readable and the
    # folder around them keeps other users of this host out.
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    credentials = folder / "credentials"
    for role, path in make_credentials(credentials).items():
        _write(folder / f"{role}.cred", path.read_text())
    users = [
        {"nkey": user.nkey, "permissions": {"publish": list(user.publish), "subscribe": list(user.subscribe)}}
        for user in server_users(credentials)
    ]
    _write(folder / "users.conf", f"authorization {json.dumps({'users': users}, indent=2)}\n")
    routes = folder / "routes.conf"
    if not routes.exists():
        password = secrets.token_hex(24)
        urls = [f"nats://route:{password}@{server}:6222" for server in SERVERS]
        authorization = f'authorization {{ user: route, password: "{password}" }}'
        _write(routes, f"{authorization}\nroutes: {json.dumps(urls)}\n")


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o644)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "secrets"
    prepare(folder)
    print(f"The credentials are in {folder}: keep the folder to yourself.")


if __name__ == "__main__":
    main()
