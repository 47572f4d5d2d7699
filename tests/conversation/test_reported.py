"""Cases reported against other servers: DSML that models misspell, cut, or nest."""

from __future__ import annotations

from typing import Any

import pytest

from farthing.conversation.base import NoCalls
from farthing.conversation.formats.dsml import DsmlCalls
from farthing.conversation.types import Tool
from tests.conversation.test_parse import TOOLS, dsml, read


def test_a_call_without_the_opening_tag_of_its_section() -> None:
    """vllm 48931: at long context the model omits it but writes the closing tag."""
    for section in ("tool_calls", "function_calls"):
        call = dsml(section)([("get_weather", {"city": "Rome", "days": 2})])
        text = "Let me look." + call.replace(f"<｜DSML｜{section}>\n", "", 1)
        assert text.count(section) == 1
        for chunks in ([text], list(text)):
            assert read(DsmlCalls(TOOLS), chunks) == (
                "Let me look.",
                [("get_weather", {"city": "Rome", "days": 2})],
            )
    quoted = 'The tag <｜DSML｜invoke name="f"> begins a call.'
    assert read(NoCalls(), list(quoted)) == (quoted, [])  # without tools nothing is parsed as a call


def test_parameter_at_the_end_is_text() -> None:
    text = 'Write <｜DSML｜parameter name="x" string="true">and a value.'
    for chunks in ([text], list(text)):
        assert read(DsmlCalls(TOOLS), chunks) == ("Write and a value.", [])


PARAMETER = '<｜DSML｜parameter name="x" string="false">[1]</｜DSML｜parameter>\n'
CALL_F = f'<｜DSML｜invoke name="f">\n{PARAMETER}</｜DSML｜invoke>\n'
NO_NAME = f"<｜DSML｜invoke>\n{PARAMETER}</｜DSML｜invoke>\n"


@pytest.mark.parametrize("section", ["tool_calls", "function_calls", ""])
@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize(
    ("body", "calls"),
    [
        (CALL_F, 1),
        (CALL_F + NO_NAME, 1),  # a malformed sibling does not affect others
        (NO_NAME + CALL_F, 1),
        (CALL_F.replace("</｜DSML｜invoke>\n", "") + CALL_F, 2),
        (CALL_F + '<｜DSML｜invoke name="f"/>\n' + CALL_F, 3),
    ],
)
def test_bare_unterminated_and_malformed_sections(section: str, closed: bool, body: str, calls: int) -> None:
    """sglang 40236: the markup was returned as content and the calls were lost."""
    text = f"Now:\n\n<｜DSML｜{section}>\n{body}" if section else f"Now:\n\n{body}"
    text += f"</｜DSML｜{section}>" if section and closed else ""
    for chunks in ([text], list(text)):
        shown, found = read(DsmlCalls(TOOLS), chunks)
        assert shown == "Now:" and len(found) == calls
        assert [call for call in found if call[1]] == [("f", {"x": [1]})] * body.count(CALL_F[:30])


def test_unterminated_name_is_not_a_call() -> None:
    """vllm 54686: the model quotes a broken call, whose name swallowed the rest of the answer."""
    text = (
        'See:\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="record_item {\n'
        "category: Dexes\n\nWait, this is wrong."
    )
    for chunks in ([text], list(text)):
        shown, calls = read(DsmlCalls(TOOLS), chunks)
        assert calls == [] and "DSML" not in shown
        assert shown.startswith("See:") and shown.endswith("category: Dexes\n\nWait, this is wrong.")


def test_value_ending_in_an_angle_bracket() -> None:
    """vllm 53227, 45877: the closing tag leaks into a shell command."""
    command = "make >log 2>&1 </dev/null"
    text = (
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="bash">\n<｜DSML｜parameter name="command" string="true">'
        f"{command}</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )
    for cut in range(len(text)):
        assert read(DsmlCalls(()), [text[:cut], text[cut:]]) == ("", [("bash", {"command": command})])


@pytest.mark.parametrize(
    ("declared", "schema", "text", "value"),
    [
        ("false", {"type": "integer"}, "5", 5),
        ("false", {"type": "integer"}, "5.0", 5),
        ("false", {"type": "string"}, "5", "5"),  # the schema decides
        ("false", {"type": "string"}, "plain", "plain"),
        ("false", {"type": "boolean"}, "True", True),
        ("false", {}, "None", None),
        ("false", {}, "not json", "not json"),
        ("false", {"type": "number"}, "NaN", "NaN"),
        ("true", {"type": "integer"}, "5", 5),
        ("true", {"type": "object"}, '{"a": [1]}', {"a": [1]}),
        ("true", {"type": ["string", "null"]}, "null", "null"),
        ("true", {}, "5", "5"),
        ("true", {"$ref": "#/$defs/n"}, "7", 7),
        ("false", {"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
        ("false", {"enum": ["1", "2"]}, "1", "1"),
        (None, {"type": "array"}, "[1]", [1]),
        (None, {"type": "string"}, "[1]", "[1]"),
    ],
)
def test_dsml_values_are_typed_by_the_schema(
    declared: str | None, schema: dict[str, Any], text: str, value: Any
) -> None:
    tool = Tool("g", None, {"properties": {"x": schema}, "$defs": {"n": {"type": "integer"}}})
    attribute = "" if declared is None else f' string="{declared}"'
    parameter = f'<｜DSML｜parameter name="x"{attribute}>{text}</｜DSML｜parameter>'
    call = f'<｜DSML｜invoke name="g">{parameter}</｜DSML｜invoke>'
    for chunks in ([call], list(call)):
        assert read(DsmlCalls((tool,)), chunks) == ("", [("g", {"x": value})])


@pytest.mark.parametrize(
    "text",
    [
        '<｜DSML｜invoke name="f">\n{"x": [1]}\n</｜DSML｜invoke>',
        '<｜DSML｜invoke name="f"><｜DSML｜parameter name="arguments" string="false">{"x": [1]}'
        "</｜DSML｜parameter></｜DSML｜invoke>",
        '<｜DSML｜toolcalls><｜DSML｜invoke name="f"><｜DSML｜parameter name="x" string="false">[1]'
        "</｜DSML｜tool_calls>",
        '<｜｜DSML｜｜tool_calls><｜｜DSML｜｜invoke name="f"><｜｜DSML｜｜parameter name="x" string="false">'
        "[1]</｜｜DSML｜｜parameter></｜｜DSML｜｜invoke>",
    ],
)
def test_misspelled_dsml(text: str) -> None:
    for chunks in ([text], list(text)):
        assert read(DsmlCalls(TOOLS), chunks) == ("", [("f", {"x": [1]})])
