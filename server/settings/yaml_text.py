"""Reads YAML 1.2: what `ruamel.yaml` makes of it, with problems as lines that quote nothing."""

from __future__ import annotations

from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError


class _Constructor(SafeConstructor):
    """Mappings with `<<` are refused: merges of merges double with each line of the file."""

    def flatten_mapping(self, node: Any) -> Any:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                raise ValueError(f"line {line}: `<<` is YAML 1.1; write the keys out")
        return super().flatten_mapping(node)


def read_yaml(text: str) -> object:
    """Reads a YAML document.

    Raises:
        ValueError: it is none, has a key twice, or is too deep; says in which line.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        return yaml.load(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except MarkedYAMLError as error:
        # The values beside a problem may be keys of `auth`: only the parser's own words are shown.
        message = str(error.problem or error.context).splitlines()[0]
        if isinstance(error, DuplicateKeyError):
            message = message.split(" with value")[0]
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark is not None else ""
        raise ValueError(f"not YAML: {where}{message[:300]}") from error
    except (YAMLError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        # All but the first: what slips through for `!!bool x` and the like.
        raise ValueError(f"not YAML: {' '.join(str(error).split())[:300]}") from error
