"""Bodies of requests to fields and files."""

import json
from collections.abc import Mapping
from typing import Any

from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.requests import Request

from opensora.serving.request import FILES, MOST_SEVERAL, SEVERAL, BadField, numbered
from opensora.utils.errors import UserError

FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
MOST_FILES, MOST_FIELDS = len(FILES) + MOST_SEVERAL + 1, 64


class WrongType(UserError):
    """A body that is neither a form nor JSON."""


class Broken(UserError):
    """A body that is not what it says it is."""


async def read_body(request: Request, most: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Fields and files of a request.

    Args:
        request: its body has at most ``most`` bytes.
        most: bytes of a field that is no file; a data URL is one.

    Raises:
        WrongType, Broken, BadField: see there.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in FORMS:
        return await _read_form(request, most)
    if kind == "application/json":
        return read_json(await request.body()), {}
    raise WrongType(f"content type {kind[:80]!r}: send multipart/form-data or application/json")


def read_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
        Broken: it holds none.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Broken(f"not JSON: {str(error)[:200]}") from None
    if not isinstance(content, dict):
        raise Broken("expected a JSON object")
    return content


async def _read_form(request: Request, most: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    fields: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    try:
        await request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS, max_part_size=most)
    except (FormParserError, UnicodeDecodeError, KeyError, ValueError) as error:
        raise Broken(f"not a form: {str(error)[:200]}") from None
    async with request.form() as form:
        for name, value in form.multi_items():
            if name.removesuffix("[]") == SEVERAL:
                await _add(fields, files, value)
            elif name in fields or name in files:
                raise BadField(name[:80], f"{name[:80]} is given twice")
            elif not isinstance(value, UploadFile):
                _put(fields, name, value)
            elif name in FILES:
                files[name] = await value.read()
            else:
                raise BadField(name[:80], f"{name[:80]} takes no file; {', '.join(FILES)} and {SEVERAL} do")
    return fields, files


async def _add(fields: dict[str, Any], files: dict[str, bytes], value: UploadFile | str) -> None:
    """One of several references: a file, or an address among ``fields``."""
    texts = fields.setdefault(SEVERAL, [])
    if not isinstance(texts, list):
        raise BadField(SEVERAL, f"{SEVERAL} is given twice")
    if isinstance(value, UploadFile):
        files[numbered(len(texts))] = await value.read()
        texts.append(None)  # its place in their order
    else:
        texts.append(value)


def _put(fields: dict[str, Any], name: str, value: str) -> None:
    """A field of a form; ``a[b]`` is b of the object a."""
    outer, bracket, inner = name.partition("[")
    if not bracket or not inner.endswith("]"):
        fields[name] = value
        return
    known = fields.setdefault(outer, {})
    if not isinstance(known, Mapping) or inner[:-1] in known:
        raise BadField(outer[:80], f"{outer[:80]} is given twice")
    fields[outer] = {**known, inner[:-1]: value}
