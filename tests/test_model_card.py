"""The model card offers only commands that serve the model as it was evaluated."""

import pytest

from pi_jax.config import RopeConfig, extend
from pi_jax.convert import model_card
from pi_jax.tiny import tiny_model_config


@pytest.mark.parametrize("kind", ["linear", "yarn", "ntk"])
def test_servers_are_offered_at_the_full_window(kind):
    card = model_card.text(extend(tiny_model_config(), RopeConfig(kind, 4.0)), "float32", model_card.Facts())
    assert "vllm serve MODEL --max-model-len 256" in card and "llama-server --model MODEL.gguf --ctx-size 256" in card
    assert "sglang.launch_server --model-path MODEL --context-length 256" in card and "from_pretrained" in card


def test_dynamic_scaling_is_offered_in_transformers_only():
    card = model_card.text(extend(tiny_model_config(), RopeConfig("dynamic", 4.0)), "float32", model_card.Facts())
    assert 'transformers.AutoModelForCausalLM.from_pretrained("MODEL")' in card
    for command in ("vllm serve", "sglang.launch_server", "llama-server", "convert_hf_to_gguf"):
        assert command not in card
    assert "llama.cpp ignores this scaling, vLLM has rotations for the first 64 positions only" in card
    assert "| window | 256 tokens (originally 64) |" in card
