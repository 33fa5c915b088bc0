"""query: one question, one answer."""

from __future__ import annotations

import base64
import struct
from pathlib import Path

import click
import msgspec
from modelbus_broker.adapters import resolve
from modelbus_broker.errors import ModelBusError, ModelNotFound, StreamCut
from modelbus_broker.messages import Chat, ChatMessage, Completion, Delta, Embedding, Task

from ..answers import AnswerBuilder
from .main import SeedCommand, bus_options
from .session import Session, run, session

_AUDIO = (".mp3", ".wav")


@click.command(cls=SeedCommand)
@click.option("--model", required=True)
@click.option("--query", required=True, help="What to ask; for an embedding model the text to embed.")
@click.option("--output-file", type=click.Path(dir_okay=False, path_type=Path), help="Write the answer there.")
@click.option("--template", type=click.Choice(["auto"]), default="auto",
              help="The model's own chat template is used; the flag is kept for old scripts.")  # fmt: skip
@bus_options
def query(model: str, query: str, output_file: Path | None, template: str, address: str, creds: str) -> None:
    """Ask a model; the answer is printed as it comes."""
    run(_query(address, creds, model, query, output_file))


async def _query(address: str, creds: str, model: str, text: str, output_file: Path | None) -> None:
    if output_file is not None and not output_file.parent.is_dir():
        raise click.UsageError(f"--output_file: the folder {output_file.parent} is not there")
    async with session(address, creds) as now:
        task = _task(now, model, text)
        answer = AnswerBuilder()
        call = await now.publisher.submit(model, task)
        shown = False
        try:
            async with call:
                async for batch in call.batches():
                    for frame in batch:
                        answer.add(frame)
                        if isinstance(frame, Delta) and output_file is None and frame.text:
                            click.echo(frame.text, nl=False)
                            shown = True
        except ModelBusError:
            if shown:
                click.echo()  # what came stays readable, the error follows on its own line
            raise
        if answer.done is None:
            raise StreamCut()
    _finish(answer, output_file)


def _task(now: Session, name: str, text: str) -> Task:
    model = resolve(now.registry, name).model
    if model not in now.registry.models():
        known = ", ".join(now.registry.models()) or "none"
        raise ModelNotFound(f"the model {model!r} is not deployed (deployed: {known})")
    tasks = {task for worker in now.registry.workers_of(model) for task in worker.capabilities.tasks}
    if tasks and "chat" not in tasks:
        if "embedding" in tasks:
            return Embedding(input=[text])
        return Completion(prompt=[text])
    return Chat(messages=[ChatMessage(role="user", content=text)])


def _finish(answer: AnswerBuilder, output_file: Path | None) -> None:
    if answer.vectors:
        rows = [list(struct.unpack(f"<{len(vector) // 4}f", vector)) for vector in answer.vectors]
        text = msgspec.json.encode(rows[0]).decode()
    else:
        choices = answer.choices
        text = choices[0].text if choices else ""
    if output_file is None:
        click.echo(text if answer.vectors else "")
        return
    # A speech model answers with base64, as the seed's did.
    data = base64.b64decode(text) if output_file.suffix in _AUDIO else text.encode()
    output_file.write_bytes(data)
    click.echo(f"wrote {len(data)} bytes to {output_file}", err=True)
