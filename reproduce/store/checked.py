"""What comes from a file is checked before it is believed: its types, its numbers, its sizes. One line says what is wrong, and where.

A `Part` is an object of a JSON file: strict about types (no text for a number, no 1.0 for an integer), without NaN or infinity, and with
bounds that no measurement reaches. Fields that it does not name are kept, since a newer program may have written them.
"""

import json
import os
import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MOST = 10**15  # of whatever is counted: tokens, parameters, bytes
LARGEST = 3.4028234663852886e38  # of whatever is measured: what float32 holds
HALF = re.compile(r"\\u[dD][89a-fA-F]", re.ASCII)  # how JSON writes the halves of a character beyond 16 bits
SHOWN = 40  # characters of a value in a message

Count = Annotated[int, Field(ge=0, le=MOST)]
Size = Annotated[int, Field(ge=1, le=MOST)]
Real = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Amount = Annotated[float, Field(ge=0, le=LARGEST)]  # seconds, megabytes, errors, losses
Above = Annotated[float, Field(ge=1e-12, le=LARGEST)]  # an amount that others are divided by
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Line = Annotated[str, Field(min_length=1)]


class Part(BaseModel):
    """An object of a JSON file."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


def check(part: type[BaseModel], value: object, where: str, within: str = "") -> Any:
    """The value as an object of this kind.

    Args:
        part: the kind.
        value: as JSON has it.
        where: what the message begins with: the file, and the object in it.
        within: where in that object the value is, as "metrics.rows[3]".

    Raises:
        ValueError: in one line, with the first field that is wrong and what is allowed there, or all that are missing.
    """
    try:
        return part.model_validate(value)
    except ValidationError as error:
        raise ValueError(f"{where} {said(error, within)}") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None


ALLOWED = {  # in our words; what is not here is said in pydantic's
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "string_unicode": "a string of Unicode characters",
    "string_too_short": "a string of {min_length} character or more",
    "list_type": "a list",
    "dict_type": "a dict",
    "model_type": "a dict",
    "none_required": "null",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le:,g}",
    "less_than": "less than {lt:,g}",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of at most {max_length}",
    "literal_error": "{expected}",
    "union_tag_not_found": "a dict that has {discriminator}",
    "union_tag_invalid": "a dict whose {discriminator} is one of {expected_tags}",
    "value_error": "{error}",
}


def said(error: ValidationError, within: str = "") -> str:
    """What is wrong, as the end of a sentence about the file: "lacks x", or "has x 3; it must be at least 4".

    Args:
        error: with at least one fault.
        within: as in `check`.
    """
    faults = error.errors(include_url=False)
    if missing := [_place(fault["loc"], within) for fault in faults if fault["type"] == "missing"]:
        return f"lacks {', '.join(missing)}"
    fault = faults[0]
    place = _place(fault["loc"], within)
    if fault["type"] == "extra_forbidden":
        return f"has {place}, which is not known here"
    template = ALLOWED.get(fault["type"])  # pydantic's own words may hold braces: they are no template
    allowed = template.format(**fault.get("ctx", {})) if template else fault["msg"]
    return f"{f'has {place}' if place else 'is'} {_shown(fault['input'])}; it must be {allowed}"


def _place(steps: tuple[int | str, ...], within: str) -> str:
    """("curve", 3, "loss") as "curve[3].loss"."""
    return (within + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)).removeprefix(".")


def _shown(value: object) -> str:
    """The value as JSON has it, cut where it is long."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def read_json(text: str, where: str) -> Any:
    """What a JSON text holds.

    Args:
        text: JSON, without NaN and infinity, which it does not know, without integers that 64 bits do not hold, and without a key
            that an object has twice, of which one value would be lost.
        where: what the message begins with.

    Raises:
        ValueError: in one line, for what is no JSON, and for what is nested too deeply to be read.
    """

    def refused(word: str):
        raise ValueError(f"it holds {word}, which is no number")

    def integer(digits: str) -> int:
        if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
            raise ValueError(f"it holds an integer of {len(digits)} digits; 64 bits do not hold it")
        return int(digits)

    def once(pairs: list[tuple[str, Any]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for n, (key, _) in enumerate(pairs) if key in dict(pairs[:n]))
            raise ValueError(f"it holds {_shown(twice)} twice in one object")
        return found

    try:
        value = json.loads(text, parse_constant=refused, parse_int=integer, object_pairs_hook=once)
        if HALF.search(text):  # two of them make a character, one alone is none
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise ValueError(f"{where}: it holds half of a character, which no page can show") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    except RecursionError:
        raise ValueError(f"{where}: it is nested too deeply") from None


def machine_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(needed: int, what: str) -> None:
    """Refuse what this machine cannot hold, before any of it is asked for.

    Args:
        needed: bytes.
        what: takes them, as the beginning of a sentence.

    Raises:
        ValueError: if they are more than the machine has.
    """
    if needed > (there := machine_memory()):
        raise ValueError(f"{what} takes {in_words(needed)} of memory; this machine has {in_words(there)}")


def in_words(count: int) -> str:
    """Bytes with the largest unit of which there is at least one: "4.2 GB".

    Args:
        count: of bytes.
    """
    unit = max(0, min(4, (len(str(count)) - 1) // 3))
    return f"{count / 1000**unit:,.1f} {('bytes', 'kB', 'MB', 'GB', 'TB')[unit]}" if unit else f"{count} bytes"
