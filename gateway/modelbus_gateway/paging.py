"""What the lists of the OpenAI API have in common: ``limit``, ``order``, ``after``, ``before``, the page, what was deleted. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Generic, Protocol, TypeVar

import msgspec
from modelbus_broker.errors import InvalidRequest

from .checks import integer, not_one_of

T = TypeVar("T")


class Identified(Protocol):
    """Has an id."""

    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=Identified)


class ListPage(msgspec.Struct, Generic[Item], frozen=True, kw_only=True):
    """A page as clients get it; :func:`list_page` makes it."""

    object: str = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(msgspec.Struct, frozen=True, kw_only=True):
    """What a client gets of something that it has deleted."""

    id: str
    object: str
    deleted: bool = True


class Paging(msgspec.Struct, frozen=True, kw_only=True):
    """Which part is wanted."""

    limit: int
    ascending: bool = False
    after: str = ""
    before: str = ""

    def of(self, items: Iterable[T], created: Callable[[T], tuple[int, str]]) -> tuple[list[T], bool]:
        """The part of the items, and whether more follow in its direction.

        Args:
            created: when an item was made, and its id: the order of the list.

        Raises:
            InvalidRequest: the item that the part begins after is not there.
        """
        ordered = sorted(items, key=created, reverse=not self.ascending)
        ids = [created(item)[1] for item in ordered]
        first = self._place(ids, "after", self.after) + 1 if self.after else 0
        last = self._place(ids, "before", self.before) if self.before else len(ordered)
        if self.before and not self.after:  # the page just before it
            return ordered[max(0, last - self.limit) : last], last > self.limit
        return ordered[first:last][: self.limit], last - first > self.limit

    def _place(self, ids: list[str], param: str, wanted: str) -> int:
        try:
            return ids.index(wanted)
        except ValueError:
            raise InvalidRequest(f"Invalid '{param}': the list has no {wanted!r}.", param=param) from None


def list_page(data: list[Item], more: bool) -> ListPage[Item]:
    """The page with these objects; ``more``: others follow."""
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return ListPage(data=data, first_id=first, last_id=last, has_more=more)


def paging(query: Mapping[str, str], *, default: int = 20, most: int = 100) -> Paging:
    """Reads it off a request's query.

    Raises:
        InvalidRequest: a value is not one; ``param`` names it.
    """
    given = query.get("limit", str(default))
    if not given.isascii() or not given.removeprefix("-").isdigit():
        raise InvalidRequest(f"Invalid type for 'limit': expected an integer, but got {given!r}.", param="limit")
    integer("limit", int(given), 1, most)
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise not_one_of("order", order, ("asc", "desc"))
    return Paging(
        limit=int(given), ascending=order == "asc", after=query.get("after", ""), before=query.get("before", "")
    )
