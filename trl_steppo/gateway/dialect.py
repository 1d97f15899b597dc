"""What an API of language models is for the gateway: a path, a body, and the ways to write what is answered."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from ..types import JsonObject
from .bodies import Body
from .conversation import Answer, ModelRequest, RequestError
from .limits import BodyLimits

M = TypeVar("M", bound="ModelBody")


class ModelBody(Body):
    """A body that asks the model for a response."""

    if TYPE_CHECKING:  # each API's own field, which keeps its place in the schema
        stream: bool | None

    @abstractmethod
    def request(self, limits: BodyLimits) -> ModelRequest:
        """Translate the body into our own form. The arguments of tool calls are read within the same limits."""


@dataclass(frozen=True)
class Dialect(Generic[M]):
    """
    An API of language models that the gateway speaks. To add one, write a file that translates it, with an instance of
    this class in it, and add that instance to `app.DIALECTS`.

    Args:
        path (`str`):
            What is posted to.
        summary (`str`):
            What `/openapi.json` calls it.
        body (`type[ModelBody]`):
            What is posted.
        whole (`Callable[[Answer, ModelBody], dict]`):
            Writes a response as one JSON object.
        stream (`Callable[[Answer, ModelBody], Iterator[bytes]]`):
            Writes the same response as server-sent events.
        error (`Callable[[RequestError], dict]`):
            Writes a refusal.
        error_event (`Callable[[RequestError], bytes]`):
            Writes a failure within a stream that has begun.
    """

    path: str
    summary: str
    body: type[M]
    whole: Callable[[Answer, M], JsonObject]
    stream: Callable[[Answer, M], Iterator[bytes]]
    error: Callable[[RequestError], JsonObject]
    error_event: Callable[[RequestError], bytes]
