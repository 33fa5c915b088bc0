"""A worker of the vllm engine with vLLM's own server on the same engine core: what differs is the way to it.

    python -m tests.bench.vllm_server PORT      (in .venv-vllm; a WorkerJob on standard input, as a worker has it)

Two engine cores of the same settings do not do for a comparison in per cents: the same matrix product took up to 2.5
times the CPU time in one process of it than in another on the machine where this was looked at, by the pages that each
had got. Here the requests of both sides are steps of one core, and the front end (``AsyncLLM``) that both have is one.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from typing import Any
from unittest.mock import patch

from modelbus_workers import worker
from modelbus_workers.engines.vllm import VllmEngine


class ServedEngine(VllmEngine):
    """The engine of the worker, which vLLM's server answers from too."""

    port = 0

    async def start(self) -> None:
        import uvicorn
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.api_server.entry import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        await super().start()
        core = self._running.engine
        tasks = await core.get_supported_tasks()
        command = ["--model", self.config.model_path, "--served-model-name", self.config.model]
        arguments: Any = make_arg_parser(FlexibleArgumentParser()).parse_args(command)
        app = build_app(arguments, tasks, core.model_config)
        await init_app_state(core, app.state, arguments, tasks)
        # As `vllm serve` starts it; the access log is off there too.
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
        setattr(server, "capture_signals", contextlib.nullcontext)  # noqa: B010  # they are the worker's
        listening = socket.create_server(("127.0.0.1", self.port))
        self._served = asyncio.create_task(server.serve(sockets=[listening]))


def main() -> int:
    """As a worker's; the engine is the one above."""
    ServedEngine.port = int(sys.argv[1])
    with patch.object(worker, "engine_class", lambda name: ServedEngine):
        return worker.main()


if __name__ == "__main__":
    sys.exit(main())
