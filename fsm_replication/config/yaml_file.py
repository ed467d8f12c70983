"""Reading a configuration's file: plain values only, and no key twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from fsm_replication.config.model import key_text
from fsm_replication.errors import ConfigError

__all__ = ("read_yaml",)

FILE_BYTES_MAX: Final = 16 * 1024**2


def read_yaml(path: Path) -> tuple[Any, list[str]]:
    """Return the data of a file and what is wrong about its text that does not hide the data.

    :raises ConfigError: if there is no data.
    """
    return _parse_yaml(_read(path))


def _read(path: Path) -> str:
    """:raises ConfigError: if it is no readable file of UTF-8."""
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES_MAX + 1)
        if len(raw) > FILE_BYTES_MAX:
            raise ConfigError([f"file: it is larger than {FILE_BYTES_MAX} bytes"])
        return raw.decode("utf-8")
    except OSError as error:
        why = error.strerror or type(error).__name__
    except UnicodeDecodeError as error:
        why = f"it is not UTF-8, at byte {error.start}"
    except ValueError:
        why = "its name holds a null character"
    raise ConfigError([f"file: {why}"])


def _parse_yaml(text: str) -> tuple[Any, list[str]]:
    """Return the data and what is wrong about the text that does not hide the data.

    :raises ConfigError: if there is no data.
    """
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        data = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        why = f"{_at(mark) if mark else 'file'}: {error.problem or error.context}"
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        why = f"line {line}: it holds a character that YAML does not allow"
    except RecursionError:
        why = "file: it is nested too deeply"
    else:
        if data is not None:
            return data, loader.problems
        why = "file: it is empty"
    finally:
        if loader is not None:
            loader.dispose()
    raise ConfigError([why])


def _at(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


class _Loader(yaml.SafeLoader):
    """Makes plain values only, and notes keys that stand twice, of which YAML keeps the last."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.problems: list[str] = []

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Look at the keys as they are written, before merge keys mix them."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                where = _at(key.start_mark)
                self.problems.append(f"{where}: the key {key_text(key.value)} stands twice")
            seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Build a value; one like 2024-13-45 looks like a date and is none."""
        try:
            return super().construct_object(node, deep=deep)
        except ValueError:
            why = f"this is no {node.tag.rpartition(':')[2]}; put text in quotes"
        raise yaml.MarkedYAMLError(problem=why, problem_mark=node.start_mark)
