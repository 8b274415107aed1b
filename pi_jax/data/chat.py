"""Renders prompts with the chat template of a model, in a process of its own.

A chat template is a program of the model's folder. transformers runs it in a sandbox that keeps it from files and
modules, but not from loops without end or strings of any length.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from pi_jax import limits
from pi_jax.errors import InputError

_PROGRAM = """
import json, os, resource, sys
from transformers.utils.chat_template_utils import render_jinja_template

chats, template, tokens, seconds, memory = json.load(sys.stdin)
used = resource.getrusage(resource.RUSAGE_SELF)
seconds += int(used.ru_utime + used.ru_stime) + 1
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
if os.path.exists("/proc/self/statm"):
    memory += int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
try:
    answer = render_jinja_template(chats, chat_template=template, add_generation_prompt=True, **tokens)[0]
    "".join(answer).encode()
    print(json.dumps(answer))
except BaseException as error:
    print(json.dumps({"kind": type(error).__name__, "message": str(error)[:1000]}))
"""
"""Runs in the other process: the rendered chats, or an error, as JSON."""


def render(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """Returns each text as a message of the user, in the chat template of a tokenizer, up to where the answer begins.

    Raises:
      InputError: if there is no chat template, it raises an error, it takes more time or memory than `pi_jax.limits`
        allows, or a result is longer than a document may be.
    """
    folder = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise InputError(f"--chat is set, but {folder} has no chat template")
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise InputError(
            f"{folder} has several chat templates ({', '.join(tokenizer.chat_template)}): one must be named default"
        ) from None
    if not isinstance(template, str):
        raise InputError(f"the chat template of {folder} is {template!r:.40}: it must be a string")
    chats = [[{"role": "user", "content": text}] for text in texts]
    bounds = limits.raised(limits.CHAT_SECONDS), limits.raised(limits.CHAT_MEMORY)
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        input=json.dumps([chats, template, tokenizer.special_tokens_map, *bounds]),
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # each thread reserves memory
        capture_output=True,
        text=True,
    )
    where = f"the chat template of {folder}"
    if done.returncode == -signal.SIGXCPU:
        raise limits.exceeded(f"{where} takes", limits.CHAT_SECONDS, "seconds")
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = {"kind": f"exit status {done.returncode}", "message": (done.stderr.splitlines() or [""])[-1]}
    if isinstance(answer, list):
        for text in answer:
            limits.require(f"a text made by {where} has", len(text.encode()), limits.DOCUMENT)
        return answer
    if answer["kind"] == "MemoryError":
        raise limits.exceeded(f"{where} needs", limits.CHAT_MEMORY, "bytes of memory")
    reason = textwrap.shorten(answer["message"], 300)
    raise InputError(f"{where} cannot be applied: {answer['kind']}" + (f", {reason}" if reason else ""))
