"""Templates by people who mean harm end by themselves, in bounded time and memory; honest ones give what they gave before."""

import subprocess
import sys
from pathlib import Path

import pytest
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minicache.data import bounded_jinja
from minicache.data.records import Turn
from minicache.data.template import Template
from minicache.errors import ConfigError, RowRefused

TURNS = (Turn("user", "hello world"), Turn("assistant", "ok"))
LONG = "{% set a = 'a' * 10**6 %}"
GREEDY = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "doubled": "{% set n = namespace(s='x') %}{% for a in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "added": "{% set n = namespace(s='x') %}{% for a in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "list": "{% set n = namespace(s=[1]) %}{% for a in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "times": "{{ ('a' * 10**10) | length }}",
    "times list": "{{ 10**10 * [1] }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "squares": "{% set n = namespace(s=9) %}{% for a in range(60) %}{% set n.s = n.s * n.s %}{% endfor %}",
    "center": "{{ 'a'.center(10**10) }}",
    "width by name": "{{ 'a'.ljust(width=10**10) }}",
    "center filter": "{{ 'a' | center(10**10) }}",
    "mapped": "{{ ['a'] | map('center', 10**10) | list }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (10**10, 1) }}",
    "format": "{{ '{:9999999999}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 10**10) }}",
    "format map": "{{ '{a}{a}{a}'.format_map({'a': 'a' * 10**8}) }}",
    "format filter": "{{ '%9999999999s' | format('a') }}",
    "indented JSON": "{{ messages | tojson(indent=10**10) }}",
    "replace": LONG + "{{ a.replace('a', a) }}",
    "replace nothing": LONG + "{{ a.replace('', a) }}",
    "replace filter": LONG + "{{ a | replace('a', a) }}",
    "join": LONG + "{{ a.join(range(9999) | map('string')) }}",
    "join filter": LONG + "{{ range(9999) | join(a) }}",
    "written": LONG + "{% for i in range(10000) %}{{ a }}{% endfor %}",
    "macro": LONG + "{% macro m() %}{% for i in range(1000) %}{{ a }}{% endfor %}{% endmacro %}{{ m() | length }}",
    "recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "many parts": "{% set a = 'a' * 10**7 %}{{ (" + "~".join(["a"] * 200) + ") | length }}",
    "slices": "{% set a = 'a' * 10**7 %}" + "".join(f"{{% set b{i} = a[1:] %}}" for i in range(200)),
    "indent": "{{ ('a\n' * 10**5) | indent(10**6) }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "own text": "{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}",
}
DEEP = {
    "brackets": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "lists": "{{ " + "[" * 20_000 + "]" * 20_000 + " }}",
    "blocks": "{% if 1 %}" * 20_000 + "{% endif %}" * 20_000,
    "loops": "{% for i in [1] %}" * 60 + "{% endfor %}" * 60,
    "sum": "{{ " + "+".join(["1"] * 20_000) + " }}",
    "attributes": "{{ a" + ".b" * 20_000 + " }}",
    "negations": "{{ " + "not " * 20_000 + "1 }}",
}
RENDER = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
from tests.data.test_bounded_jinja import GREEDY, TURNS
from minicache.data.template import Template
from minicache.errors import RowRefused
for name, source in GREEDY.items():
    try:
        print(name, "rendered", Template(source, {}).render(TURNS)[:40])
    except RowRefused as refusal:
        print(name, refusal.reason, refusal)
"""


def test_templates_that_want_everything_are_refused_in_the_memory_of_one_text() -> None:
    """Each of them would take hours, or terabytes. The limit is not far above what a text of the most characters takes."""
    command = [sys.executable, "-c", RENDER, str(4 * 2**30)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if " template the chat template refuses it: it " not in line] == []
    assert len(lines) == len(GREEDY)


@pytest.mark.parametrize("name", DEEP)
def test_templates_nested_too_deeply_are_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match="the chat template cannot be compiled") as error:
        Template(DEEP[name], {}).render(TURNS)
    assert "\n" not in str(error.value)


def test_one_that_takes_long_in_few_steps_is_stopped_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_jinja, "MOST_SECONDS", 0.2)
    slow = "{% set a = 'a' * 10**7 %}{% for i in range(99999) %}{{ 'b' in a }}{% endfor %}"
    with pytest.raises(RowRefused, match=r"it takes more than 0\.2 seconds"):
        Template(slow, {}).render(TURNS)


def test_each_rendering_has_its_own_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_jinja, "MOST_MADE", 500)
    template = Template("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    assert {template.render(TURNS) for _ in range(100)} == {"hello worldok"}
    with pytest.raises(RowRefused, match="it makes texts of more than 500 characters"):
        template.render((Turn("user", "x" * 501),))


HONEST = """
{%- macro part(x, n=2) -%}<{{ x | upper }}{{ '.' * n }}>{%- endmacro -%}
{%- set ns = namespace(text='', seen=[]) -%}
{%- for m in messages -%}
{%- if loop.first %}[{{ loop.length }}]{% endif -%}
{%- set ns.text = ns.text ~ m.role ~ ':' + m['content'] -%}
{%- set ns.seen = ns.seen + [loop.index0, loop.last, loop.previtem is defined, loop.nextitem is defined] -%}
{{ part(m.content[1:4], n=loop.index) }}{{ m.content.split(' ')[-1].strip() | trim }}{{ loop.cycle('a', 'b') }}
{%- if loop.index0 > 5 %}{% break %}{% endif -%}
{%- else -%}nothing{%- endfor -%}
{%- for key, value in messages[0].items() if value %}{{ key }}={{ value | tojson(indent=2) }}{% endfor -%}
{%- for x in [1, [2, [3]]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor -%}
{{ ns.text | length }}{{ ns.seen | join(',') }}{{ '%s-%05d' % ('a', 1700000000) }}{{ '{} {}'.format(1700000000, 'b') }}
{{ '%s' | format(2 ** 40) }}{{ messages | map(attribute='role') | join('/') }}{{ [3, 1, 2] | sort | first }}{{ (1, 2) + (3,) }}
{{ 'a,b'.replace(',', ';') }}{{ undefined_name }}{{ 7 % 4 }}{{ 'x'.center(5) }}{{ {'a': 1} | dictsort }}{{ range(3) | list }}
{%- filter upper %}kept{% endfilter %}{% set block %}<{{ bos }}>{% endset %}{{ block }}{{ messages[::-1][0].role }}
"""


def test_honest_templates_give_what_jinja_gives_without_bounds() -> None:
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    ours = Template(HONEST, {"bos": "<s>"})
    plain.filters["tojson"] = ours._environment.filters["tojson"]
    values = {"messages": [turn.message for turn in TURNS], "bos": "<s>", "tools": None, "documents": None}
    assert ours.render(TURNS) == plain.from_string(HONEST).render(**values, add_generation_prompt=False)
    assert "[2]" in ours.render(TURNS)
