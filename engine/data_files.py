"""Local data files as lists of rows: exact numbers, texts that stay texts, and errors that name the line. Nothing is cached."""

import csv
import io
import json
import re
from itertools import product, zip_longest

import numpy

from .errors import BadArgument


class GivenTwice(ValueError):
    """A name has two values, of which JSON, YAML and parquet would take the last one unasked."""


def once(pairs):
    """A dict of pairs. Raises GivenTwice."""
    record = {}
    for name, value in pairs:
        if str(name) in record:
            raise GivenTwice(f"{name} is given more than once")
        record[str(name)] = value
    return record


class Number(float):
    """A float of a JSON file whose digits say more than the float: `written` is its text."""

    __slots__ = ("written",)


def read_number(text):
    """A JSON number with a point or an exponent -> a float, with its text where the float is written in another way."""
    value = float(text)
    if repr(value) == text:
        return value
    value = Number(value)
    value.written = text
    return value


def parse_json(text, where, first=1):
    """One JSON value. Raises BadArgument with the line of a fault, counted from `first`."""
    try:
        value = json.loads(text, parse_float=read_number, object_pairs_hook=once)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        raise BadArgument(f"{where}, line {first + error.lineno - 1}: expected JSON: {error.msg}, column {error.colno}") from error
    except UnicodeEncodeError as error:
        raise BadArgument(f"{where}, line {first}: expected text, found half a surrogate pair") from error
    except RecursionError:
        raise BadArgument(f"{where}, line {first}: expected an object, found lists or objects nested too deep") from None
    except GivenTwice as error:
        raise BadArgument(f"{where}, line {first}: {error}") from error
    except ValueError as error:  # digits beyond Python's limit
        raise BadArgument(f"{where}, line {first}: expected a number, found one of thousands of digits") from error


def read_json(content, where):
    """A list of objects, or an object per line."""
    text = decode(content, where)
    if text.lstrip().startswith("["):
        places = [(f"{where}, item {number}", value) for number, value in enumerate(parse_json(text, where), 1)]
    else:
        places = [(f"{where}, line {number}", parse_json(line, where, number)) for number, line in enumerate(text.split("\n"), 1)
                  if line.strip()]
    for place, value in places:
        if not isinstance(value, dict):
            raise BadArgument(f'{place}: expected an object such as {{"prompt": "..."}}, found {type(value).__name__}')
    columns = dict.fromkeys(name for _, record in places for name in record)
    return [columns | record for _, record in places]


def read_csv(content, where):
    """A header and rows of texts; a row may end early."""
    text, header, records, line = decode(content, where), None, [], 1
    if "\0" in text:
        raise BadArgument(f"{where}, line {text[: text.index(chr(0))].count(chr(10)) + 1}: expected text, found a NUL byte")
    csv.field_size_limit(2**31 - 1)  # solutions can be longer than the default
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in lines:
            if header is None and len(set(cells)) < len(cells):
                raise BadArgument(f"{where}, line {line}: expected a name once, found {max(cells, key=cells.count)} twice")
            if header is not None and len(cells) > len(header):
                raise BadArgument(f"{where}, line {line}: expected {len(header)} fields, found {len(cells)}")
            if header is not None and cells:
                records.append(dict(zip_longest(header, cells)))
            header, line = header or cells or None, lines.line_num + 1
    except csv.Error as error:
        raise BadArgument(f"{where}, line {line}: expected fields with closed quotes: {error}") from error
    return records


def read_parquet(content, where):
    """The rows of a parquet file, with its types; a float of 16 or 32 bits is its shortest decimal."""
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content)).read()
        once(zip(table.column_names, table.column_names))
        records = table.to_pylist()
    except Exception as error:  # a torn file raises anything
        raise BadArgument(f"{where}: expected a parquet file: {(str(error).splitlines() or [''])[0]}") from error
    return shorten_floats(table.schema, records)


def shorten_floats(schema, records):
    """Rows of Arrow with each float of 16 or 32 bits as its shortest decimal, 0.1 and not 0.10000000149011612, also inside lists."""
    import pyarrow.types

    def short(value, kind):
        if value is None:
            return None
        if pyarrow.types.is_float32(kind) or pyarrow.types.is_float16(kind):
            return float(str(numpy.float32(value)))
        if pyarrow.types.is_struct(kind):
            return {field.name: short(value[field.name], field.type) for field in kind}
        if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
            return [short(each, kind.value_type) for each in value]
        return value

    fields = [field for field in schema if re.search(r"\b(half)?float\b", str(field.type))]
    for record, field in product(records, fields):
        record[field.name] = short(record[field.name], field.type)
    return records


READERS = {".jsonl": read_json, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}


def read_file(path, where):
    """A local file as a list of dicts with the same columns. Raises BadArgument with file, line and what was expected."""
    if path.suffix not in READERS:
        raise BadArgument(f"{where}: expected a file ending in {', '.join(READERS)}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadArgument(f"{where}: {error.strerror}") from error
    return READERS[path.suffix](content, where) if content.strip() else []


def decode(content, where):
    """The text of a file, which is UTF-8, with or without a byte order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadArgument(f"{where}, line {error.object[: error.start].count(10) + 1}: expected UTF-8") from error
