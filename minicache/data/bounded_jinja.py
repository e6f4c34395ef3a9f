"""The sandbox in which a chat template runs: what it repeats and what it writes is bounded, as well as what it can reach.

jinja2's sandbox alone lets a template loop for ever and double a text until the memory is full. Here every repetition, call,
filter and text that a template makes is counted; one that goes beyond any use is refused like one that refuses a row.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

# Of one rendering. The longest row has 2**25 characters, and a template that writes it needs about as many.
MOST_STEPS = 2_000_000  # repetitions, calls, filters
MOST_MADE = 2**28  # characters of all texts and entries of all lists that it makes
MOST_SECONDS = 20.0  # of the processor
MOST_POWER = 2**16  # bits of a whole number
# What can make a long text of two short ones, or of a number.
METHODS = {"center", "expandtabs", "format", "format_map", "join", "ljust", "replace", "rjust", "translate", "zfill"}
FILTERS = {"batch", "center", "format", "indent", "join", "replace", "slice", "tojson", "urlize", "wordwrap", "xmlattr"}
MOST_INDENT = 100  # characters, of each line of JSON
WIDTH = re.compile(r"\d{7}")
# A width that is itself an argument: "%*d", "{:{}}".
GIVEN_WIDTH = re.compile(r"%[-+ #0\d]*\.?\*|\{[^{}]*\{")


class TooMuchError(jinja2.TemplateError):
    """A template repeats or writes more than any chat template has use for."""


class _Spent:
    """What a rendering has used so far."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.steps = self.made = 0
        self.started = time.thread_time()

    def step(self, made: int = 0) -> None:
        """Count a repetition, and the characters that it makes. Raises TooMuchError."""
        self.steps += 1
        self.made += made
        if self.steps > MOST_STEPS:
            raise TooMuchError(f"it repeats more than {MOST_STEPS:,} times")
        if self.made > MOST_MADE:
            raise TooMuchError(f"it makes texts of more than {MOST_MADE:,} characters")
        if self.steps % 64 == 0 and time.thread_time() - self.started > MOST_SECONDS:
            raise TooMuchError(f"it takes more than {MOST_SECONDS:g} seconds")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox, set up as transformers does, with bounds. filters: others than jinja2's own, by name."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, filters: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], finalize=self._written)
        self.spent = _Spent()
        own = {"_repeated": self._repeated, "_joined": self._joined, "_copied": self._copied}
        self.filters = {name: self._bounded(name, each) for name, each in {**self.filters, **filters}.items()} | own
        # random text, a million paragraphs if it is asked for them
        del self.globals["lipsum"]

    def bounded_template(self, text: str) -> jinja2.Template:
        """The template, its repetitions and texts counted. Raises TemplateError, RecursionError and others: it is none."""
        counted = _Counting().visit(self.parse(text))
        counted.set_environment(self)
        return self.from_string(counted)

    # --- what a template does ---

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        of, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if name in ("format", "format_map"):
            # the sandbox's function around that of the text
            of = getattr(getattr(__obj, "__wrapped__", None), "__self__", of)
        if isinstance(of, str | bytes) and name in METHODS:
            if name == "join" and args and isinstance(args[0], Iterator):
                args = (list(args[0]), *args[1:])
            __self._require_short(name, of, [*args, *kwargs.values()])
        found = super().call(__context, __obj, *args, **kwargs)
        __self.spent.step(_weight(found))
        return found

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        are_numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "%":
            if isinstance(left, str):
                self._require_short("format", left, list(right) if isinstance(right, tuple) else [right])
        elif are_numbers and operator in ("*", "**"):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MOST_POWER:
                raise TooMuchError(f"it computes a number of {bits:,} bits")
        elif operator == "*" and (isinstance(left, int) or isinstance(right, int)):
            text, times = (right, left) if isinstance(left, int) else (left, right)
            self.spent.step(_weight(text) * max(0, times) if isinstance(text, str | bytes | list | tuple) else 0)
        elif operator == "+" and isinstance(left, str | bytes | list | tuple):
            self.spent.step(_weight(left) + _weight(right))
        return super().call_binop(context, operator, left, right)

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose result is counted. jinja2 finds its marks, such as that of `pass_environment`, on the wrapper too."""
        passed = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            given = list(args)
            if name == "join" and len(given) > passed and isinstance(given[passed], Iterator):
                given[passed] = list(given[passed])
            if name in FILTERS and len(given) > passed:
                self._require_short(name, given[passed], [*given[passed + 1 :], *kwargs.values()])
            found = function(*given, **kwargs)
            self.spent.step(_weight(found))
            return found

        return bounded

    def _require_short(self, name: str, value: Any, given: list[Any]) -> None:
        """Count what a method or filter of a text may make, before it does. Raises TooMuchError."""
        numbers = [abs(each) for each in given if isinstance(each, int)]
        texts = [
            _all_texts(each) if isinstance(each, list | dict) else _weight(each)
            for each in given
            if not isinstance(each, int)
        ]
        most = max([*numbers, *texts], default=0)
        if name in ("format", "format_map") and isinstance(value, str):
            if WIDTH.search(value):
                raise TooMuchError("it formats to a width of millions")
            # other numbers are written in their digits
            widest = max([*texts, *(numbers if GIVEN_WIDTH.search(value) else ())], default=0)
            self.spent.step(len(value) + (value.count("%") + value.count("{")) * widest)
        elif name == "replace" and isinstance(value, str) and all(isinstance(each, str) for each in given[:2]):
            self.spent.step(
                len(value) + value.count(str(given[0])) * len(str(given[-1] if len(given) < 2 else given[1]))
            )
        elif name == "join":
            parts, mark = (given[0], len(value)) if isinstance(value, str) and given else (value, most)
            if isinstance(parts, Sized) and isinstance(parts, Iterable):
                self.spent.step(_all_texts(parts) + len(parts) * mark)
        elif name == "tojson":
            if most > MOST_INDENT:
                raise TooMuchError(f"it writes JSON with an indent of more than {MOST_INDENT}")
        else:
            self.spent.step((_weight(value) + 1) * (most + 1))

    # --- what the counted template calls ---

    def _repeated(self, values: Iterable[Any], body: int) -> Iterator[Any]:
        """The values of a loop. body: characters that the template itself writes in it."""
        for value in values:
            self.spent.step(body)
            yield value

    def _joined(self, parts: list[Any]) -> str:
        """`a ~ b`."""
        texts = [str(part) for part in parts]
        self.spent.step(sum(map(len, texts)))
        return "".join(texts)

    def _copied(self, value: Any) -> Any:
        """A part of a text or list."""
        self.spent.step(_weight(value))
        return value

    def _written(self, value: Any) -> Any:
        """A value as it is put into the text."""
        self.spent.step(_weight(value))
        return value


class _Counting(NodeTransformer):
    """Puts the counting filters into a template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_repeated", nodes.Const(written, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_joined")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_copied") if isinstance(node.arg, nodes.Slice) else node


def _filtered(value: nodes.Node, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(arguments), [], None, None, lineno=value.lineno)


def _weight(value: Any) -> int:
    """What a value takes: the characters of a text, eight for each entry of a list or dict."""
    if isinstance(value, str | bytes):
        return len(value)
    return 8 * len(value) if isinstance(value, list | tuple | dict) else 1


def _all_texts(values: Any) -> int:
    """The characters of the texts in a list or dict."""
    each_of = values.values() if isinstance(values, dict) else values
    return sum(len(each) if isinstance(each, str) else 1 for each in each_of)
