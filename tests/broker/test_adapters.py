"""Adapters: who may add them."""

from __future__ import annotations

from pathlib import Path

import pytest
from modelbus_broker.adapters import add_adapter, remove_adapter
from modelbus_broker.connection import Bus
from modelbus_broker.credentials import make_credentials, server_users
from modelbus_broker.errors import AuthenticationFailed, ModelNotFound
from modelbus_broker.registry import Registry
from modelbus_broker.server import EmbeddedServer, ServerSettings
from modelbus_broker.settings import BusSettings
from modelbus_broker.topology import declare_bus


async def test_clients_read_what_only_the_admin_adds(tmp_path: Path) -> None:
    folder = tmp_path / "credentials"
    creds = make_credentials(folder)
    async with EmbeddedServer(ServerSettings(store=tmp_path / "store", users=server_users(folder))) as server:
        for role, error in {
            "admin": ModelNotFound,
            "client": AuthenticationFailed,
            "worker": AuthenticationFailed,
        }.items():
            settings = BusSettings(url=server.url, creds=str(creds[role]))  # type: ignore[index]
            async with await Bus.connect(settings, name=role) as bus:
                if role == "admin":
                    await declare_bus(bus)
                registry = Registry(bus)
                await registry.start()
                with pytest.raises(error):
                    await add_adapter(bus, registry, "chat", "pirate", "/adapters/pirate")
                with pytest.raises(error):
                    await remove_adapter(bus, registry, "chat", "pirate")
                await registry.close()
