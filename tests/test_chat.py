"""Chat templates: what they render, and that a hostile one is an error and not a hang."""

from __future__ import annotations

import json
import threading
import time
import tracemalloc

import pytest

from coreinfer.chat import ChatTemplate, ChatTemplateError
from coreinfer.tokenizer import Tokenizer
from gguf_metadata import read_metadata

HELLO = [{"role": "user", "content": "Hello"}]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def render(source, messages=HELLO, **extra):
    return ChatTemplate(source).render(messages, **extra)


def test_renders_messages_and_opens_the_reply():
    template = ChatTemplate(CHATML)
    expected = "<|im_start|>user\nHello<|im_end|>\n"
    assert template.render(HELLO, add_generation_prompt=False) == expected
    assert template.render(HELLO) == expected + "<|im_start|>assistant\n"


def test_smollm2_template_adds_its_system_message(smollm2_path):
    metadata = read_metadata(smollm2_path)
    tokenizer = Tokenizer.from_metadata(metadata)
    template = ChatTemplate.from_metadata(metadata, tokenizer)
    prompt = template.render(HELLO)
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.tokenize(prompt, special=True)
    assert ids.count(tokenizer.bos_id) == 3  # <|im_start|> is this model's BOS


def test_qwen_template_writes_tools_as_json(qwen_path):
    metadata = read_metadata(qwen_path)
    template = ChatTemplate.from_metadata(metadata, Tokenizer.from_metadata(metadata))
    tool = {"type": "function", "function": {"name": "find", "description": "sucht für <b>"}}
    assert json.dumps(tool, ensure_ascii=False) in template.render(HELLO, tools=[tool])
    assert "<tools>" not in template.render(HELLO)


class FakeTokenizer:
    bos_id, eos_id, unknown_id = 0, 1, None

    def token_bytes(self, id, special=False):
        return (b"<s>", b"</s>")[id] if special else b""


def test_special_tokens_come_from_the_vocabulary():
    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ unk_token }}"
    template = ChatTemplate.from_metadata({"tokenizer.chat_template": source}, FakeTokenizer())
    assert template.render(HELLO) == "<s>Hello</s>"


def test_a_model_without_template_has_none():
    assert ChatTemplate.from_metadata({}, FakeTokenizer()) is None
    assert ChatTemplate.from_metadata({"tokenizer.chat_template": ""}, FakeTokenizer()) is None
    with pytest.raises(ChatTemplateError, match="must be a string, found int"):
        ChatTemplate.from_metadata({"tokenizer.chat_template": 7}, FakeTokenizer())


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for i in [1] %}\n  {% if i %}\nx\n  {% endif %}\n{% endfor %}", "x\n"),  # trimmed
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        (
            "{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
            "02",
        ),
        ("{{ {'b': 'é<', 'a': [1, none, true]} | tojson }}", '{"b": "é<", "a": [1, null, true]}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "Hello!"),
        ("{% set ns = namespace(a=[]) %}{% set ns.a = ns.a + [1] %}{{ ns.a }}", "[1]"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(1) ~ f('b') }}", "<1><b>"),
        (
            "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}{% call f() %}x{% endcall %}",
            "xx",
        ),
        ("{{ ' a,b '.strip().split(',') | join('+') }}", "a+b"),
        ("{{ '-'.join(['a', 'b']) }}{{ 'aXa'.replace('a', 'bb', 1) }}", "a-bbbXa"),
        ("{{ ['a', 'b'] | map('upper') | list | last }}{{ 'x' * 3 }}", "Bxxx"),
        ("{{ '%s=%03d' % ('a', 7) }}{{ '{:>3}'.format('b') }}", "a=007  b"),
        (
            "{{ 'a\nb' | indent(2) }}|{{ '7' | int + 1 }}|{{ '<' | e }}|{{ '<' | safe }}",
            "a\n  b|8|&lt;|<",
        ),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x | trim | length }}", "2"),
        ("{% if 'ell' in messages[0].content and nosuch is not defined %}y{% endif %}", "y"),
        ("{{ messages[::-1][0].role }}{{ loop is defined }}{{ none }}", "userFalseNone"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{{ loop.last }}{% endfor %}", "a1True"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)
def test_templates_may_use_what_chat_templates_use(source, expected):
    assert render(source) == expected


def test_extra_names_reach_the_template_and_go_before_its_own():
    assert render("{{ x }}{{ tools }}", x=5, tools=[1]) == "5[1]"
    assert (
        render("{{ strftime_now('%d') }}", strftime_now=lambda format: "now " + format) == "now %d"
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            "refuses the messages: roles must alternate",
        ),
        ("line\n{% if %}", "malformed at line 2"),
        ("{{ nosuch.name }}", "misses a value: 'nosuch' is undefined"),
        ("{{ 1 | nosuch }}", "No filter named 'nosuch'"),
        ("{{ 1 / 0 }}", "failed: ZeroDivisionError"),
        ("{{ messages.append(1) }}", "not allowed"),
        ("{{ ''.__class__.__mro__ }}", "not allowed: access to attribute '__class__'"),
        ("{{ cycler.__init__.__globals__ }}", "not allowed"),
        ("{% include 'x' %}", "'include' is not for chat templates"),
        ("{% extends 'x' %}", "'extends' is not for chat templates"),
        ("{% block x %}{% endblock %}", "'block' is not for chat templates"),
        ("{% import 'x' as x %}", "'import' is not for chat templates"),
        ("{% autoescape true %}{% endautoescape %}", "'autoescape' is not for chat templates"),
        ("{{ 'a'.center(9) }}", "'center' of a str is not for templates"),
        ("x" * 300_000, "300000 characters, above 262144"),
    ],
)
def test_errors_say_what_was_wrong(source, message):
    with pytest.raises(ChatTemplateError, match=message):
        render(source)


def test_messages_must_be_mappings():
    with pytest.raises(ChatTemplateError, match="message 1 must be a mapping, found str"):
        render(CHATML, [HELLO[0], "Hello"])


GROWING = (
    "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}"
)
LONG = "{% set x = 'a' * 1000000 %}"
LIST = "{% set x = range(99999) | list %}"

BOMBS = {
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "loops that skip all": "{% for i in range(9999) %}{% for j in range(99999) if false %}"
    "{% endfor %}{% endfor %}",
    "many loops that skip all": LIST + "{% for j in x if false %}{% endfor %}" * 999,
    "text times number": "{{ 'a' * 10**9 }}",
    "number times text": "{{ 10**9 * 'a' }}",
    "list times number": "{{ ([0] * 10**9) | length }}",
    "powers": "{% set x = 9**1000 %}{{ x**1000 }}",
    "doubling by ~": GROWING % ("'aaaa'", "ns.x ~ ns.x") + "{{ ns.x | length }}",
    "doubling by +": GROWING % ("'aaaa'", "ns.x + ns.x") + "{{ ns.x | length }}",
    "lists in lists": GROWING % ("[1]", "[ns.x, ns.x]") + "{{ ns.x }}",
    "tuples in tuples": GROWING % ("(1,)", "(ns.x, ns.x)") + "{{ {ns.x: 1} }}",
    "dicts in dicts": GROWING % ("{}", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x | tojson }}",
    "namespaces in lists": "{% set a = namespace() %}{% set b = [a, a] %}",
    "namespaces in namespaces": "{% set a = namespace() %}{% set a.x = a %}",
    "arguments in arguments": "{% macro f(n) %}{% if n %}{{ f(n - 1, varargs, varargs) }}"
    "{% else %}{{ {varargs: 1} }}{% endif %}{% endmacro %}{{ f(60, 1) }}",
    "endless recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "branching recursion": "{% macro f(n) %}{% if n < 60 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}"
    "{% endmacro %}{{ f(0) }}",
    "output in a loop": LONG + "{% for i in range(99999) %}{{ x }}{% endfor %}",
    "constant output in a loop": "{% for i in range(99999) %}" + "y" * 99_999 + "{% endfor %}",
    "output in a set block": "{% set z %}{% for i in range(99999) %}" + "y" * 99_999
    + "{% endfor %}{% endset %}",
    "replace": LONG + "{{ x.replace('a', x) | length }}",
    "replace nothing": LONG + "{{ x.replace('', x) | length }}",
    "replace as filter": LONG + "{{ x | replace('a', x) | length }}",
    "replace as mapped filter": LONG + "{{ [x] | map('replace', 'a', x) | list | length }}",
    "join": LONG + "{{ x.join(range(99999)) | length }}",
    "join as filter": LONG + "{{ range(99999) | join(x) | length }}",
    "join of one text": LONG + "{{ ([x] * 99999) | join | length }}",
    "text of a list": LONG + "{{ ([x] * 99999) | upper | length }}",
    "keys for sorting": LONG + "{{ ([x] * 99999) | sort | length }}",
    "keys of a mapped list": LONG + "{{ ([{'a': x}] * 99999) | map(attribute='a') | sort }}",
    "key in an error": LONG + "{{ {}[(x,) * 99999].a }}",
    "value in an error": LONG + "{{ [1].index([x] * 99999) }}",
    "list in a refusal": LONG + "{{ raise_exception([x] * 99999) }}",
    "test of a list": LONG + "{{ ([x] * 99999) is lower }}",
    "format width": "{{ '{:999999999}'.format(1) }}",
    "format width by argument": "{{ '{:{}}'.format(1, 999999999) }}",
    "format method by name": "{% set f = '{:999999999}'['format'] %}{{ f(1) }}",
    "percent width": "{{ '%999999999d' % 1 }}",
    "percent width by argument": "{{ '%*d' % (999999999, 1) }}",
    "percent precision": "{{ '%.999999999f' % 1 }}",
    "percent as filter": "{{ '%999999999d' | format(1) }}",
    "date width": "{{ strftime_now('%999999999d') }}",
    "indent width": "{{ 'a\nb' | indent(10**9) }}",
    "json indent": "{{ [1] | tojson(indent=10**9) }}",
    "bytes of a number": "{{ (1).to_bytes(10**9, 'big') }}",
    "number of a long text": "{{ ('9' * 4000000) | int }}",
    "copies of a list": LIST + "{% set y = x[1:] %}" * 100,
    "comparisons": LIST + "{% set y = range(99999) | list %}" + "{% if x == y %}{% endif %}" * 999,
    "searches": LIST + "{{ 'a' in x }}" * 2000,
    "deep brackets": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "deep loops": "{% for i in [1] %}" * 60 + "{% endfor %}" * 60,
    "deep conditions": "{% if 1 %}" * 200 + "{% endif %}" * 200,
}  # fmt: skip


CAUGHT = "exceeds its limits|not allowed|too deep|too many|Range too big|No test named"


@pytest.mark.parametrize("name", BOMBS)
def test_hostile_templates_are_errors_within_the_time_limit(name):
    """Half a second is allowed; loading has the same limit, and a busy machine some slack.

    The limits must catch it, not the end of memory.
    """
    start = time.monotonic()
    with pytest.raises(ChatTemplateError, match=CAUGHT):
        ChatTemplate(BOMBS[name], time_limit=0.5).render(HELLO)
    assert time.monotonic() - start < 6


@pytest.mark.parametrize(
    "source",
    [
        LONG + "{{ x.replace('aaaa', x[:999]) | length }}",
        LONG + "{{ range(500) | join(x) | length }}",
        LONG + "{{ ([x] * 300) | sort | length }}",
        "{{ nested | tojson(indent=64) }}",
    ],
)
def test_limits_hold_before_memory_is_taken(source):
    """Each would make 57 to 500 MB; the budget allows 8 million characters."""
    nested = list(range(3000))
    for _ in range(300):
        nested = [nested]
    tracemalloc.start()
    try:
        with pytest.raises(ChatTemplateError, match="exceeds its limits"):
            render(source, nested=nested)
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


def test_time_is_limited_where_work_is_small():
    source = BOMBS["loops that skip all"]
    with pytest.raises(ChatTemplateError, match="it takes too long"):
        ChatTemplate(source, time_limit=0.2).render(HELLO)


def test_long_conversations_fit_the_limits():
    """Work may grow with the messages: 10 MB of them and 2000 turns are no attack."""
    messages = [{"role": "user", "content": "Hello " * 900}] * 2000
    source = "{% set ns = namespace(n=0) %}{% for m in messages %}{{ m.role + m.content.strip() | "
    source += "trim ~ '\n' }}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    assert render(source, messages).endswith("2000")


def test_threads_share_a_template():
    template = ChatTemplate("{% for i in range(300) %}{{ messages[0].content }}{% endfor %}")
    wrong = []

    def run(letter):
        for _ in range(20):
            if template.render([{"role": "user", "content": letter}]) != letter * 300:
                wrong.append(letter)

    threads = [threading.Thread(target=run, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
