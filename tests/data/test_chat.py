"""Chat templates: rendered as transformers renders them, and one sentence for whatever a hostile one does."""

import json

import pytest

from pi_jax import limits, tiny
from pi_jax.data import chat
from pi_jax.data.tokenizer import load_tokenizer
from pi_jax.errors import InputError


@pytest.fixture
def folder(tmp_path):
    tiny.tiny_tokenizer(tmp_path)
    return tmp_path


def said(folder, template, texts=("Hi",)):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    return chat.render(load_tokenizer(str(folder)), texts)


def refused(folder, template, message):
    with pytest.raises(InputError) as caught:
        said(folder, template)
    assert "chat template" in str(caught.value) and message in str(caught.value) and "\n" not in str(caught.value)


def test_chats_are_those_of_transformers(folder):
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}\n{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    texts = ["Hé\u2028 <s>", " two "]
    rendered = said(folder, template, texts)
    tokenizer = load_tokenizer(str(folder))
    chats = [[{"role": "user", "content": text}] for text in texts]
    wanted = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    assert rendered == wanted
    named = [{"name": "default", "template": template}, {"name": "other", "template": "x"}]
    assert said(folder, named, texts) == wanted


TEMPLATES = {
    "its own error": ("{{ raise_exception('only one turn') }}", "cannot be applied: TemplateError, only one turn"),
    "syntax": ("{% for %}", "cannot be applied: TemplateSyntaxError, "),
    "nothing there": ("{{ messages[5].x.y }}", "cannot be applied: UndefinedError, "),
    "division": ("{{ 1 / 0 }}", "cannot be applied: ZeroDivisionError, "),
    "python": ("{{ ''.__class__.__mro__ }}", "cannot be applied: SecurityError, "),
    "recursion": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "cannot be applied: RecursionError"),
    "no text": ("\ud800", "cannot be applied: UnicodeEncodeError, "),
    "number": (5, "is 5: it must be a string"),
    "no default": ([{"name": "a", "template": "x"}], "has several chat templates (a): one must be named default"),
    "length": ("{{ 'x' * 70000000 }}", "has 70,000,000 bytes, more than the 33,554,432 allowed: if that is meant, "),
}


@pytest.mark.parametrize("case", TEMPLATES.values(), ids=TEMPLATES)
def test_chat_templates_that_fail(case, folder):
    template, message = case
    refused(folder, template, message)


def test_a_chat_template_that_needs_memory(folder, monkeypatch):
    monkeypatch.setattr(limits, "CHAT_MEMORY", 10**8)
    refused(
        folder, "{{ 'x' * 300000000 }}", "needs more than 100,000,000 bytes of memory: if that is meant, set PI_JAX_L"
    )


def test_a_chat_template_without_end(folder, monkeypatch):
    monkeypatch.setattr(limits, "CHAT_SECONDS", 1)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    refused(folder, loops, "takes more than 1 seconds: if that is meant, set PI_JAX_LIMITS=2 in the env")
