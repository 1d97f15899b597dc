import inspect
import math
from typing import Any, Literal

import pytest
from transformers.utils import get_json_schema

from trl_steppo.environments.arguments import UNFIT, WrongArgumentsError, converted, read_arguments


def declares(hint: Any, choices: str = "") -> dict[str, Any]:
    """The JSON schema of an argument with this type hint."""

    def tool(x):
        pass

    tool.__annotations__ = {"x": hint}
    tool.__doc__ = f"""
    A tool.

    Args:
        x: It{choices}
    """
    return get_json_schema(tool)["function"]["parameters"]["properties"]["x"]


NONE = type(None)
TABLE = [  # type hint, what the model wrote, what the tool gets
    *[(int, 3, 3), (int, 3.0, 3), (int, "3", 3), (int, " -3 ", -3), (int, "3.0", 3), (int, 1e22, UNFIT)],
    *[(int, value, UNFIT) for value in (3.5, "3.5", "three", "03", "+3", "", True, None, [3], "1e999", math.inf)],
    *[(float, 1.5, 1.5), (float, 1, 1), (float, "1.5", 1.5), (float, "1e3", 1000.0), (float, "2", 2)],
    *[(float, value, UNFIT) for value in ("1,5", "NaN", "Infinity", "1e999", "", True, None)],
    *[(bool, True, True), (bool, "true", True), (bool, "False", False)],
    *[(bool, value, UNFIT) for value in ("yes", "1", 1, 0, 0.0, None, [], {})],
    *[(str, "3", "3"), (str, "null", "null"), (str, 3, UNFIT), (str, True, UNFIT), (str, None, UNFIT)],
    *[(list, [1, "a"], [1, "a"]), (list, '[1, "a"]', [1, "a"]), (list, "a", UNFIT), (list, "{}", UNFIT)],
    *[(list[int], ["1", 2.0], [1, 2]), (list[int], '["1"]', [1]), (list[int], ["a"], UNFIT), (list[int], "1", UNFIT)],
    *[(list[list[int]], [["1"], []], [[1], []]), (list, "[" * 9999, UNFIT)],
    *[(tuple[int, str], ["1", "a"], [1, "a"]), (tuple[int, str], ["1"], UNFIT), (tuple[int, str], "[1, 2]", UNFIT)],
    *[(dict, {"a": 1}, {"a": 1}), (dict, '{"a": 1}', {"a": 1}), (dict, "[1]", UNFIT), (dict, "a", UNFIT)],
    *[(dict[str, int], {"a": "1"}, {"a": 1}), (dict[str, int], {"a": "b"}, UNFIT)],
    *[(int | None, None, None), (int | None, "null", None), (int | None, "3", 3), (int | None, "x", UNFIT)],
    *[(str | None, None, None), (str | None, "null", "null")],
    *[(int | str, "3", "3"), (int | str, 3, 3), (int | float, "3", 3), (bool | int, 1, 1), (bool | int, True, True)],
    *[(list[int] | None, '["3"]', [3]), (list[int] | str, '["3"]', '["3"]'), (list[int] | int, ["3"], [3])],
    *[(Literal["a", "b"], "a", "a"), (Literal["a", "b"], "c", UNFIT), (Literal[1, 2], "2", 2), (Literal[1], 1.0, 1)],
    *[(Literal[1, 2], True, UNFIT), (Literal[1, 2], "3", UNFIT), (Literal[1, 2], 10**400, UNFIT)],
    *[(int, "9007199254740993.0", 2**53 + 1), (int, "1" * 99 + ".0", int("1" * 99)), (int, "0.1e1", 1)],
    *[(int, text, UNFIT) for text in ("9007199254740991.4", "3.00000000000000001", "1e-999", "1" * 10**6)],
    *[(int, 2.0**53 - 1, 2**53 - 1), (int, 2.0**53, UNFIT), (int, 10**400, 10**400), (str, 10**400, UNFIT)],
    *[(float, 10**400, 10**400), (float, "1" * 10**6, UNFIT), (list[float], "[1e999]", [math.inf])],
    *[(bool, 10**400, UNFIT), (NONE, 10**400, UNFIT), (list, 10**400, UNFIT), (list[int], ["1" * 10**6], UNFIT)],
    *[(Any, value, value) for value in (3, "3", None, [1], {"a": None}, True)],
]


@pytest.mark.parametrize(
    ("hint", "written", "expected"), TABLE, ids=lambda value: "unfit" if value is UNFIT else repr(value)[:30]
)
def test_arguments_are_converted_without_loss_or_refused(hint, written, expected):
    schema = declares(hint)
    if hint in (list, list[int] | int) and "array" not in (schema.get("type"), *_types(schema)):
        pytest.skip("this version of transformers does not declare such lists")
    found = converted(written, schema)
    assert found == expected
    assert type(found) is type(expected)


def _types(schema: dict[str, Any]) -> list[Any]:
    return [one.get("type") for one in schema.get("anyOf", ())]


def test_choices_of_the_docstring_are_checked():
    try:
        schema = declares(int, " (choices: [1, 2])")
    except AttributeError:
        pytest.skip("this version of transformers reads choices of text alone")
    assert [converted(value, schema) for value in (1, "2", 2.0)] == [1, 2, 2]
    assert converted(3, schema) is UNFIT


def test_refusals_name_the_argument_its_type_and_the_value():
    def tool(n: int, way: str, of: list[int] | None = None) -> str:
        """
        A tool.

        Args:
            n: Number
            way: Way (choices: ["up", "down"])
            of: Numbers
        """
        return ""

    for arguments, message in [
        ({"n": "three", "way": "up"}, "'n' must be integer, not 'three'"),
        ({"n": True, "way": "up"}, "'n' must be integer, not boolean"),
        ({"n": 1, "way": "left"}, r"'way' must be one of \['up', 'down'\], not 'left'"),
        ({"n": 1, "way": "up", "of": [0.5]}, "'of' must be array of integer, not array"),
        ({"n": 1}, "missing a required argument: 'way'"),
    ]:
        with pytest.raises(WrongArgumentsError, match=message):
            read_arguments(tool, inspect.signature(tool), get_json_schema(tool), arguments)


def test_huge_floats_and_deeply_nested_arguments_are_refused_with_a_message():
    def tool(n: Literal[1, 2] = 1, of: list[Any] | None = None) -> str:
        """
        A tool.

        Args:
            n: Number
            of: Anything
        """
        return ""

    deep: Any = math.inf
    for _ in range(5000):
        deep = [deep]
    for arguments, message in [
        ({"n": 10**310}, r"'n' must be one of \[1, 2\], not 1000"),
        ({"n": 10**5000}, r"'n' must be one of \[1, 2\], not a value of type int"),
        ({"of": deep}, "'of' has inf, which JSON does not know"),
    ]:
        with pytest.raises(WrongArgumentsError, match=message):
            read_arguments(tool, inspect.signature(tool), get_json_schema(tool), arguments)
