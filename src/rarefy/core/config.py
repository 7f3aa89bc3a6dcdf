"""Strict configuration objects: unknown keys are refused, values are frozen, errors name the key."""

from __future__ import annotations

import difflib
import json
from typing import Any, TypeVar

import pydantic

from rarefy.core.errors import RarefyError

T = TypeVar("T", bound="StrictModel")


class StrictModel(pydantic.BaseModel):
    """A frozen pydantic model that refuses unknown keys, so that a misspelled option is never ignored."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def parse(schema: type[T], data: Any, what: str, error: type[RarefyError], *, stored: bool = False) -> T:
    """Validate ``data`` against ``schema``; on failure raise ``error`` with a sentence that names the first bad key.

    ``stored`` data comes from a file of our own: "4" or 4.0 is then no whole number.
    """
    try:
        if stored:  # through JSON, since only there does strict checking take a list for a tuple
            return schema.model_validate_json(json.dumps(data), strict=True)
        return schema.model_validate(data)
    except pydantic.ValidationError as failure:
        sentence = f"{what}: {explain(failure, schema)}"
        raise error(sentence if sentence.endswith("?") else sentence + ".") from None


def explain(failure: pydantic.ValidationError, schema: type[StrictModel] | None = None) -> str:
    """The first complaint of a pydantic failure as ``'key': message (got value)``.

    With ``schema``, an unknown key at the top level is answered by the nearest known one, or by all of them.
    """
    first = failure.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "value"
    if schema is not None and first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        near = difflib.get_close_matches(where, schema.model_fields, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(schema.model_fields)) or 'none'}"
        return f"'{where}' is not an option; {hint}"
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    got = repr(first.get("input"))
    shown = got if len(got) <= 80 else got[:77] + "..."
    return f"'{where}': {message} (got {shown})"
