"""Tools that Anthropic declares by type and the client runs; the model sees functions with these schemas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Known:
    """The description and schema of such a tool for the model."""

    description: str
    schema: dict[str, Any]


def _schema(required: tuple[str, ...], **properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "description": description}


_LINES = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}
_RANGE = {
    **_LINES,
    "description": "For view: the first and last line, counted from 1; -1 is the end of the file.",
}
_LINE = {"type": "integer", "description": "For insert: the line after which to insert; 0 is the beginning."}
_PATH = _text("Path of the file or directory.")
_OLD = _text("For str_replace: the exact text to replace, which must occur once.")
_NEW = _text("For str_replace: the new text. For insert: the text to insert.")
_FILE = _text("For create: the content of the file.")

_BASH = Known(
    "Run a command in a persistent bash session.",
    _schema(
        (),
        command=_text("The command to run. Required unless the session is restarted."),
        restart={"type": "boolean", "description": "Restart the session."},
    ),
)


def _editor(*commands: str) -> Known:
    command = {"type": "string", "enum": list(commands)}
    return Known(
        "View, create and edit text files.",
        _schema(
            ("command", "path"),
            command=command,
            path=_PATH,
            file_text=_FILE,
            old_str=_OLD,
            new_str=_NEW,
            insert_line=_LINE,
            view_range=_RANGE,
        ),
    )


_MEMORY = Known(
    "Keep notes in files under /memories that last beyond this conversation.",
    _schema(
        ("command",),
        command={"type": "string", "enum": ["view", "create", "str_replace", "insert", "delete", "rename"]},
        path=_PATH,
        file_text=_FILE,
        old_str=_OLD,
        new_str=_text("For str_replace: the new text."),
        insert_line=_LINE,
        insert_text=_text("For insert: the text to insert."),
        old_path=_text("For rename: the current path."),
        new_path=_text("For rename: the new path."),
        view_range=_RANGE,
    ),
)
_EDITOR = _editor("view", "create", "str_replace", "insert")

CLIENT_TOOLS = {
    "bash_20241022": _BASH,
    "bash_20250124": _BASH,
    "text_editor_20241022": _editor("view", "create", "str_replace", "insert", "undo_edit"),
    "text_editor_20250124": _editor("view", "create", "str_replace", "insert", "undo_edit"),
    "text_editor_20250429": _EDITOR,
    "text_editor_20250728": _EDITOR,
    "memory_20250818": _MEMORY,
}
