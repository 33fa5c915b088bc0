"""The page on typed answers is right: its examples run as they stand there."""

from __future__ import annotations

import msgspec
from modelbus.structure import Ladder

from tests.helpers.doc_blocks import DOCS, run_page


def test_the_page_on_typed_answers_is_right() -> None:
    run_page(DOCS / "structured-output.md")


def test_every_field_of_the_ladder_is_on_the_page() -> None:
    page = (DOCS / "structured-output.md").read_text()
    assert [name for name in msgspec.structs.asdict(Ladder()) if f"`{name}`" not in page] == []
