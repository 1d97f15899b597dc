"""Plays the environments that users write: classes with tools, classes with `step(response)`, and plain functions.

What the model gets wrong never raises: it becomes an observation that the model can read, and a counter. What the
environment gets wrong raises, and costs its own episode only. Sync code runs in daemon threads, because a call that
hangs must occupy no pool, hold up no other episode and not keep the interpreter from exiting.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import numbers
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

from ..calls import CallTimeoutError, DaemonThread, call
from ..errors import ConfigurationError
from .base import RESERVED_NAMES, Message, Outcome, Playable, Response
from .slots import Slots

Tool = Callable[..., Any]
JsonSchema = dict[str, Any]

MISTAKES = (
    *("malformed_tool_calls", "unknown_tools", "wrong_arguments", "tool_errors", "tool_timeouts"),
    "refused_tool_calls",
)
"""Counters of what went wrong in an episode, beside `tool_calls`, which counts every call that could be read."""


def make_playable(
    environment: Any = None,
    tools: Sequence[Tool] = (),
    *,
    tool_timeout_s: float | None = 60.0,
    environment_timeout_s: float | None = None,
    max_tool_calls: int | None = None,
    slots: Slots | None = None,
) -> Playable:
    """
    Make what a user wrote playable.

    Args:
        environment (`Any`, *optional*):
            One instance, for one episode. With `step(response)` it takes the whole response; without, its public
            methods are tools. `None`: only `tools`, and without those an episode is a single step.
        tools (`Sequence[Callable]`, *optional*):
            Functions beside the environment, sync or async, shared by all episodes.
        tool_timeout_s (`float`, *optional*, defaults to `60.0`):
            Time limit of one tool call; `None`: none.
        environment_timeout_s (`float`, *optional*):
            Time limit of each of the environment's other calls (`reset`, `step`, `get_reward`, ...); `None`:
            `tool_timeout_s`.
        max_tool_calls (`int`, *optional*):
            Most tool calls of one response that are run; those beyond are answered with an error. `None`: all.
        slots ([`Slots`], *optional*):
            Bounds how many calls of one tool run at a time; shared by the episodes. Waiting for one's turn does not
            count as the call's time.

    Raises:
        ConfigurationError: the environment has no `reset`; a tool has no docstring or no type hints; two tools share a
            name; or there are tools beside a `step(response)`, which takes the whole response.
    """
    limit_s = tool_timeout_s if environment_timeout_s is None else environment_timeout_s
    if environment is not None and not callable(getattr(environment, "reset", None)):
        raise ConfigurationError(f"{_class_name(environment)} has no method `reset(**row)`, which every episode calls")
    if environment is not None and callable(getattr(environment, "step", None)):
        _refuse_tools_beside_step(environment, tools)
        return ResponsePlayable(environment, environment_timeout_s=limit_s)
    return ToolPlayable(
        environment,
        tools,
        tool_timeout_s=tool_timeout_s,
        environment_timeout_s=limit_s,
        max_tool_calls=max_tool_calls,
        slots=slots,
    )


def _refuse_tools_beside_step(environment: Any, tools: Sequence[Tool]) -> None:
    extra = [*_public_methods(environment), *(_tool_name(tool) for tool in tools)]
    if extra:
        raise ConfigurationError(
            f"{_class_name(environment)} defines `step(response)`, which takes the whole response, and the tools "
            f"{', '.join(f'`{name}`' for name in extra)}, which would never be called; remove `step`, or begin the "
            "others' names with an underscore"
        )


class _EnvironmentCalls:
    """What both forms have in common: an environment's methods under a time limit, in a thread of its own."""

    def __init__(self, environment: Any, timeout_s: float | None) -> None:
        self._environment = environment
        self._timeout_s = timeout_s
        self._thread = DaemonThread(_class_name(environment))
        self._scores: dict[str, float] = {}

    async def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call the environment's method `name`."""
        method = getattr(self._environment, name)
        return await call(method, args, kwargs, thread=self._thread, timeout_s=self._timeout_s, what=f"{name}()")

    def _defines(self, name: str) -> bool:
        return callable(getattr(self._environment, name, None))

    async def reset(self, row: Mapping[str, Any]) -> str | None:
        """Start an episode. Raises what the environment raises."""
        if self._environment is None:
            return None
        extra = await self._call("reset", **row)
        if extra is not None and not isinstance(extra, str):
            raise TypeError(f"reset() returned {type(extra).__name__}; it returns text for the prompt, or None")
        return extra

    async def state_prompt(self, observation: str | list[Message]) -> str | list[Message] | None:
        """The state's whole prompt; `None` without a `state_prompt`. A `TypeError` for one of another form."""
        if not self._defines("state_prompt"):
            return None
        prompt = await self._call("state_prompt", observation)
        if prompt is not None and not isinstance(prompt, str | list):
            raise TypeError(f"state_prompt() returned {type(prompt).__name__}; it returns text, messages or None")
        return prompt

    async def get_reward(self) -> float:
        """The reward at the end; 0.0 without a `get_reward`. Reads the environment's scores, too."""
        reward = _finite(await self._call("get_reward"), "get_reward()") if self._defines("get_reward") else 0.0
        if self._defines("metrics"):
            scores = await self._call("metrics")
            self._scores = {name: _finite(score, f"metrics()[{name!r}]") for name, score in scores.items()}
        return reward

    def metrics(self) -> Mapping[str, float]:
        """The environment's own scores, as it gave them after `get_reward`."""
        return self._scores

    async def close(self) -> None:
        """Close the environment and end its thread."""
        try:
            if self._defines("close"):
                await self._call("close")
        finally:
            self._thread.end()

    async def _state_key(self) -> Any:
        # A copy: the step that follows may change a key that is a list of all moves, say.
        return copy.deepcopy(await self._call("state_key")) if self._defines("state_key") else None


class ResponsePlayable(_EnvironmentCalls):
    """
    An environment that takes the whole response as its action.

    Args:
        environment ([`Environment`]):
            One instance, for one episode.
        environment_timeout_s (`float`, *optional*):
            Time limit of each of its calls; `None`: none.
    """

    tools: Sequence[Any] = ()

    def __init__(self, environment: Any, *, environment_timeout_s: float | None = None) -> None:
        super().__init__(environment, environment_timeout_s)

    async def step(self, response: Response) -> Outcome:
        """Let the environment answer. Raises what it raises, and a `TypeError` for an answer of another form."""
        state_key = await self._state_key()
        answer = await self._call("step", response.text)
        if not isinstance(answer, tuple) or len(answer) != 3:
            raise TypeError(f"step() returned {answer!r:.100}; it returns (observation, reward, done)")
        observation, reward, done = answer
        if not isinstance(observation, str | list):
            raise TypeError(f"step() returned an observation of type {type(observation).__name__}; text or messages")
        return Outcome(observation, _finite(reward, "step()'s reward"), bool(done), state_key)


class ToolPlayable(_EnvironmentCalls):
    """
    An environment whose public methods are tools, plain functions as tools, or both.

    An episode ends with the first response that calls no tool, or when the environment's `done` becomes true. Without
    any tool that is the first response.

    Args:
        environment ([`ToolEnvironment`], *optional*):
            One instance, for one episode.
        tools (`Sequence[Callable]`, *optional*):
            Functions beside it, shared by all episodes: calls of them may overlap.
        tool_timeout_s (`float`, *optional*):
            Time limit of one tool call; `None`: none.
        environment_timeout_s (`float`, *optional*):
            Time limit of each of the environment's other calls; `None`: none.
        max_tool_calls (`int`, *optional*):
            Most tool calls of one response that are run; `None`: all.
        slots ([`Slots`], *optional*):
            Bounds how many calls of one tool run at a time.

    Raises:
        ConfigurationError: a tool has no docstring or no type hints, or two tools share a name.
    """

    def __init__(
        self,
        environment: Any = None,
        tools: Sequence[Tool] = (),
        *,
        tool_timeout_s: float | None = None,
        environment_timeout_s: float | None = None,
        max_tool_calls: int | None = None,
        slots: Slots | None = None,
    ) -> None:
        super().__init__(environment, environment_timeout_s)
        self._slots = slots
        self._tool_timeout_s = tool_timeout_s
        self._max_tool_calls = max_tool_calls
        self._methods = {} if environment is None else _public_methods(environment)
        self._functions = _by_name(tools, taken=self._methods)
        self._schemas = {name: _schema(name, tool) for name, tool in {**self._methods, **self._functions}.items()}
        self.tools: Sequence[Any] = list(self._schemas.values())

    async def step(self, response: Response) -> Outcome:
        """Call the tools that the response asks for. Raises only what `done`, `step_reward` or `state_key` raise."""
        state_key = await self._state_key()
        calls = [_identified(tool_call) for tool_call in response.message.get("tool_calls") or ()]
        counts = Counter(dict.fromkeys(("tool_calls", *MISTAKES), 0))
        counts.update(tool_calls=len(calls), malformed_tool_calls=len(response.malformed))
        calls, malformed = (calls, response.malformed) if self.tools else ([], ())
        calls, refused = calls[: self._max_tool_calls], calls[len(calls[: self._max_tool_calls]) :]
        counts.update(refused_tool_calls=len(refused))
        answers = await asyncio.gather(*(self._answer(one["name"], one["arguments"], counts) for one in calls))
        observation = [_message(one["name"], answer, one["id"]) for one, answer in zip(calls, answers, strict=True)]
        too_many = f"Error: not run: a response may make {self._max_tool_calls} tool calls"
        observation += [_message(one["name"], too_many, one["id"]) for one in refused]
        observation += [_message("error", f"Error: malformed tool call: {reason}") for reason in malformed]
        is_done, asks_nothing = await self._is_done(), not observation
        return Outcome(
            observation,
            await self._step_reward(),
            is_done or asks_nothing,
            state_key,
            dict(counts),
            ended_by_response=asks_nothing and not is_done,
        )

    async def _answer(self, name: str, arguments: Mapping[str, Any], counts: Counter[str]) -> str:
        """The tool's result, or what the model did wrong."""
        tool = self._methods.get(name) or self._functions.get(name)
        if tool is None:
            counts["unknown_tools"] += 1
            return f"Error: unknown tool {name!r}; available: {', '.join(self._schemas)}"
        problem = _wrong_arguments(tool, self._schemas[name], arguments)
        if problem is not None:
            counts["wrong_arguments"] += 1
            return f"Error: wrong arguments for {name}: {problem}; expected {_usage(self._schemas[name])}"
        try:
            return str(await self._run(name, tool, arguments))
        except CallTimeoutError:
            counts["tool_timeouts"] += 1
            return f"Error: {name} took longer than {self._tool_timeout_s:g} s and was given up"
        except Exception as error:
            counts["tool_errors"] += 1
            return f"Error: {name} failed: {type(error).__name__}: {error}"

    async def _run(self, name: str, tool: Tool, arguments: Mapping[str, Any]) -> Any:
        # Functions share no state with the environment: each call of one has a thread to itself.
        thread = self._thread if name in self._methods else DaemonThread(name)
        try:
            async with self._slots.of(name) if self._slots is not None else nullcontext():
                return await call(tool, (), arguments, thread=thread, timeout_s=self._tool_timeout_s, what=name)
        finally:
            if thread is not self._thread:
                thread.end()

    async def _is_done(self) -> bool:
        if self._environment is None:
            return False
        return bool(await self._call("done") if self._defines("done") else getattr(self._environment, "done", False))

    async def _step_reward(self) -> float:
        return _finite(await self._call("step_reward"), "step_reward()") if self._defines("step_reward") else 0.0


def _message(name: str, content: str, call_id: str | None = None) -> Message:
    message: Message = {"role": "tool", "name": name, "content": content}
    return message if call_id is None else {**message, "tool_call_id": call_id}


def _identified(tool_call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Name and arguments, and the id that the model gave the call, where its format has ids."""
    return {**tool_call["function"], "id": tool_call.get("id")}


def _finite(value: Any, what: str) -> float:
    """A reward as a float; a `ValueError` for anything that is not a finite number."""
    if not isinstance(value, numbers.Number) and not hasattr(value, "item"):  # NumPy and torch scalars have `item`
        raise ValueError(f"{what} is {value!r:.100}; it must be a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{what} is {number}; it must be finite")
    return number


# -- finding the tools and checking calls of them ---------------------------------------------------------------------


def _class_name(environment: Any) -> str:
    return type(environment).__name__


def _tool_name(tool: Tool) -> str:
    name = getattr(tool, "__name__", None)
    if name is None:
        raise ConfigurationError(f"the tool {tool!r} has no `__name__` to be called by; wrap it in a function")
    return name


_COMPUTED = (property, cached_property)


def _public_methods(environment: Any) -> dict[str, Tool]:
    """An environment's tools by name: its bound methods, as in TRL. Properties are not evaluated."""
    names = [name for name in dir(environment) if not name.startswith("_") and name not in RESERVED_NAMES]
    plain = [name for name in names if not isinstance(inspect.getattr_static(environment, name), _COMPUTED)]
    members = {name: getattr(environment, name) for name in plain}
    return {name: member for name, member in members.items() if inspect.ismethod(member)}


def _by_name(tools: Sequence[Tool], *, taken: Mapping[str, Tool]) -> dict[str, Tool]:
    functions: dict[str, Tool] = {}
    for tool in tools:
        name = _tool_name(tool)
        if name in functions or name in taken:
            raise ConfigurationError(f"two tools are named `{name}`; the model could not tell them apart")
        functions[name] = tool
    return functions


_schemas: weakref.WeakKeyDictionary[Any, JsonSchema] = weakref.WeakKeyDictionary()
"""Schemas by function: an environment is made for every episode, its docstrings are read once."""


def _schema(name: str, tool: Tool) -> JsonSchema:
    from transformers.utils import get_json_schema

    function = getattr(tool, "__func__", tool)
    try:
        if function not in _schemas:
            _schemas[function] = get_json_schema(tool)
        return _schemas[function]
    except Exception as error:
        raise ConfigurationError(
            f"the tool `{getattr(function, '__qualname__', name)}` needs type hints and a docstring that describes "
            f"every argument: {error} (not meant for the model? begin its name with an underscore)"
        ) from error


_signatures: weakref.WeakKeyDictionary[Any, inspect.Signature] = weakref.WeakKeyDictionary()
"""Signatures by function, or by a method's; reading one takes longer than most calls."""


def _signature(tool: Tool) -> inspect.Signature:
    function = getattr(tool, "__func__", tool)
    if function not in _signatures:
        _signatures[function] = inspect.signature(tool)
    return _signatures[function]


def _wrong_arguments(tool: Tool, schema: JsonSchema, arguments: Mapping[str, Any]) -> str | None:
    signature = _signature(tool)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        return str(error)
    properties = schema["function"]["parameters"]["properties"]
    for name, value in arguments.items():
        expected = properties.get(name, {})
        left_out = value is None and name in signature.parameters and signature.parameters[name].default is None
        if not left_out and not _fits(value, expected):
            return f"{name!r} must be {_describe(expected)}, not {_JSON_NAMES.get(type(value), type(value).__name__)}"
    return None


_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list, tuple),
    "object": (dict,),
    "null": (type(None),),
}
_JSON_NAMES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    dict: "object",
    type(None): "null",
}


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a JSON value fits the schema, as far as types and choices go."""
    if value is None and schema.get("nullable"):
        return True
    if "anyOf" in schema:
        return any(_fits(value, option) for option in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    names = schema.get("type", ())
    names = (names,) if isinstance(names, str) else names
    if names and not any(_is_a(value, name) for name in names):
        return False
    items = schema.get("items")
    return not (isinstance(value, list) and isinstance(items, Mapping)) or all(_fits(item, items) for item in value)


def _is_a(value: Any, name: str) -> bool:
    # In Python a bool is an int; in JSON `true` is no number.
    return isinstance(value, _JSON_TYPES.get(name, (object,))) and (name == "boolean" or not isinstance(value, bool))


def _describe(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return f"one of {schema['enum']}"
    if "anyOf" in schema:
        return " or ".join(_describe(option) for option in schema["anyOf"])
    names = schema.get("type", "any")
    text = names if isinstance(names, str) else " or ".join(names)
    return f"{text} of {_describe(schema['items'])}" if text == "array" and schema.get("items") else text


def _usage(schema: JsonSchema) -> str:
    """How a tool is called: `search(query: string, k?: integer)`."""
    function = schema["function"]
    required = function["parameters"].get("required", ())
    arguments = [
        f"{name}{'' if name in required else '?'}: {_describe(argument)}"
        for name, argument in function["parameters"]["properties"].items()
    ]
    return f"{function['name']}({', '.join(arguments)})"
