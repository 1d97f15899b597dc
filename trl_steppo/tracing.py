"""
OpenTelemetry spans of rollouts and updates (the extra `tracing`), off unless [`recording`] turns them on.

```
update
├── rollout            with `max_staleness` it begins during an earlier update
│   └── episode        one for each attempt
│       └── step
│           ├── chat policy         sampling
│           └── execute_tool NAME   a tool call
evaluation
└── episode ...
```

Names and attributes are those of OpenTelemetry's semantic conventions for generative AI (`gen_ai.*`) where these have
one, and `steppo.*` else. Off, a span costs one function call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol, TypeVar

from .errors import ConfigurationError
from .extras import install_command

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Tracer

T = TypeVar("T")
Value = str | bool | int | float | list[str] | None
"""The value of an attribute. `None`: the span does not get it."""

_tracer: Tracer | None = None  # while spans are recorded
_shared: dict[str, Context] = {}  # contexts of what another thread goes on with, by a name


class Span(Protocol):
    """A span, recorded or not."""

    def set(self, **attributes: Value) -> None:
        """Set attributes; `gen_ai__tool__name` is written `gen_ai.tool.name`."""
        ...

    def fail(self, description: str) -> None:
        """Mark the span as failed where no exception passes through it."""
        ...


class _NoSpan:
    """Stands for a span that is not recorded."""

    def set(self, **attributes: Value) -> None: ...

    def fail(self, description: str) -> None: ...


_NO_SPAN = _NoSpan()
_OFF: AbstractContextManager[Span] = nullcontext(_NO_SPAN)


def check_available() -> None:
    """
    Raise a `ConfigurationError` if spans would go nowhere: the extra is not installed, or no tracer provider is set.
    """
    try:
        from opentelemetry import trace
    except ImportError as error:
        raise ConfigurationError(
            f"`tracing` is set, and OpenTelemetry is not installed: {install_command('tracing')} ({error})"
        ) from error
    provider = trace.get_tracer_provider()
    if type(provider).__name__ in ("ProxyTracerProvider", "NoOpTracerProvider"):
        raise ConfigurationError(
            "`tracing` is set, and OpenTelemetry has no tracer provider, so that spans would go nowhere; call "
            "`opentelemetry.trace.set_tracer_provider(...)` before the trainer is made, start the program with "
            "`opentelemetry-instrument`, or set `tracing` to False"
        )


@contextmanager
def recording(is_on: bool) -> Iterator[None]:
    """
    Context in which spans are recorded by OpenTelemetry's tracer provider, in all threads.

    Args:
        is_on (`bool`):
            `False`: nothing is recorded, unless a context around this one is on.
    """
    global _tracer
    before = _tracer
    if is_on:
        from opentelemetry import trace

        _tracer = trace.get_tracer("trl_steppo")
    try:
        yield
    finally:
        _tracer = before


def span(name: str, *, within: str | None = None, **attributes: Value) -> AbstractContextManager[Span]:
    """
    Context of a span. It is the parent of spans that begin within it in the same task or thread. An exception is
    recorded, and marks it as failed.

    Args:
        name (`str`):
            The span's name.
        within (`str`, *optional*):
            The name under which [`shared`] has kept the parent, which another thread began. `None`: the current span.
        attributes:
            As in [`Span.set`].
    """
    return _OFF if _tracer is None else _recorded(_tracer, name, within, attributes)


@contextmanager
def _recorded(tracer: Tracer, name: str, within: str | None, attributes: Mapping[str, Value]) -> Iterator[Span]:
    context = None if within is None else _shared.get(within)
    with tracer.start_as_current_span(name, context=context) as started:
        recorded = _Recorded(started)
        recorded.set(**attributes)
        yield recorded


class _Recorded:
    """
    A span that is recorded.

    Args:
        started (`opentelemetry.trace.Span`):
            The span.
    """

    def __init__(self, started: object) -> None:
        from opentelemetry.trace import Span as Started

        assert isinstance(started, Started)
        self._started = started

    def set(self, **attributes: Value) -> None:
        for name, value in attributes.items():
            if value is not None:
                self._started.set_attribute(name.replace("__", "."), value)

    def fail(self, description: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        self.set(error__type=description.partition(":")[0])
        self._started.set_status(Status(StatusCode.ERROR, description))


@contextmanager
def shared(name: str) -> Iterator[None]:
    """Keep the current span under a name, for [`span`] in another thread, for as long as the block."""
    if _tracer is None:
        yield
        return
    from opentelemetry.context import get_current

    _shared[name] = get_current()
    try:
        yield
    finally:
        _shared.pop(name, None)


def carried(function: Callable[[], T]) -> Callable[[], T]:
    """The same function, which takes the current span along into the thread that calls it."""
    if _tracer is None:
        return function
    from opentelemetry.context import attach, detach, get_current

    context = get_current()

    def call() -> T:
        token = attach(context)
        try:
            return function()
        finally:
            detach(token)

    return call


def environment() -> dict[str, str]:
    """Environment variables by which a process goes on with the current span (`TRACEPARENT`)."""
    if _tracer is None:
        return {}
    from opentelemetry.propagate import inject

    carrier: dict[str, str] = {}
    inject(carrier)
    return {name.upper(): value for name, value in carrier.items()}
