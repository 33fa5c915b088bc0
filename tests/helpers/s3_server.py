"""An S3 service that we did not write: the server of moto, a process with buckets in memory that speaks the protocol of S3.

It is what AWS's own client is tested with in many projects; it is not MinIO, and keeps less to the letter than S3 itself does.
"""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.helpers.command_line import free_port

BUCKET = "uploads"
#: What a client is told, and what is to appear nowhere.
SECRETS = {"AWS_SECRET_ACCESS_KEY": "SECRET-not-to-be-shown", "AWS_SESSION_TOKEN": "TOKEN-not-to-be-shown"}


class S3Server:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.environment = {
            "AWS_ACCESS_KEY_ID": "modelbus", "AWS_ENDPOINT_URL": self.url, "AWS_EC2_METADATA_DISABLED": "true", **SECRETS
        }  # fmt: skip

    def wait(self) -> None:
        """Until it answers."""
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(self.url, timeout=10).close()
                return
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def client(self) -> Any:
        """The owner's own client, beside the one that is tested. To be closed."""
        boto3 = pytest.importorskip("boto3")
        return boto3.session.Session().client(
            "s3", endpoint_url=self.url, aws_access_key_id="owner", aws_secret_access_key="any", region_name="us-east-1"
        )

    def ask_for_keys(self, asked: bool) -> None:
        """Whether it refuses who has no key that it knows: nobody has."""
        after = b"0" if asked else b"inf"
        asked_for = urllib.request.Request(f"{self.url}/moto-api/reset-auth", after, {"Content-Type": "text/plain"})
        urllib.request.urlopen(asked_for, timeout=10).close()


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """With an empty bucket. Skips the test where moto is not installed."""
    for package in ("moto", "flask", "flask_cors"):
        pytest.importorskip(package, reason="there is no S3 server: make setup")
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        server = S3Server(port)
        server.wait()
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield server
    finally:
        process.kill()
        process.wait()
