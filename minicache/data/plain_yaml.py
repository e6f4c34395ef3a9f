"""YAML from somebody else: plain values only, and no more of them than the file has room for."""

from collections import Counter
from typing import Any

from minicache.text import one_line

MOST_VALUES = 100_000
# Most characters of an integer: Python writes none of more than 4,300 digits, whichever base it was read in.
MOST_INTEGER = 1000
INTEGER, MERGE = "tag:yaml.org,2002:int", "tag:yaml.org,2002:merge"


def read_yaml(text: str) -> Any:
    """The values in a YAML text: texts, numbers, dates, lists and objects, never objects of Python.

    An alias stands for what it names each time: a few lines of aliases of aliases are more values than a memory holds.

    Raises:
        ValueError: it is not YAML, is nested too deeply, has a name twice, or has more or larger values than the bounds above.
    """
    # a package that transformers needs
    import yaml

    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if root is not None and _values(root, {}) > MOST_VALUES:
            raise ValueError(f"expected {MOST_VALUES:,} values or fewer, aliases counted as what they stand for")
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(one_line(error, 300)) from error
    # what a value raises that is not what its tag says, as `!!bool x` and `!!int ""`
    except (LookupError, AttributeError, OverflowError) as error:
        raise ValueError(f"a value is not of the type that its tag names: {one_line(error, 200)}") from error


def _values(node: Any, known: dict[int, int]) -> int:
    """The number of values in a node. known: by the id of each node that was counted; 0 while it is being counted."""
    if (found := known.get(id(node))) is not None:
        if not found:
            raise ValueError("a value holds itself")
        return found
    known[id(node)] = 0
    count = 1
    if node.tag == INTEGER and len(node.value) > MOST_INTEGER:
        raise ValueError(f"an integer of {len(node.value):,} characters; expected {MOST_INTEGER:,} or fewer")
    if node.id == "mapping":
        names = Counter(_name(key) for key, _ in node.value if key.id == "scalar")
        if twins := [name for name, times in names.items() if times > 1]:
            raise ValueError(f"{str(twins[0])[:80]} stands in it twice")
    if isinstance(node.value, list):
        for each in node.value:
            count += sum(_values(part, known) for part in (each if isinstance(each, tuple) else (each,)))
    known[id(node)] = count
    return count


def _name(key: Any) -> Any:
    """A name as the object will have it: `true` and `True`, or 1 and 0x1, are one."""
    import yaml

    return key.value if key.tag == MERGE else yaml.SafeLoader("").construct_object(key)
