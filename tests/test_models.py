"""Models as users have them: compiled, adapted, quantised, half precise, on several devices; and what is no decoder."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    LlamaForCausalLM,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import kvfx
from decoding import GREEDY, fresh_llama, tokens

CONTEXT = tokens(1, 20)
HALF = "knorm:0.5"


def kvfx_compile(model: nn.Module, policy: str = HALF) -> LlamaForCausalLM:
    return kvfx.compile(model, policy, backend="eager")


@functools.cache
def llama() -> LlamaForCausalLM:
    """One layer, since many tests here compile their own."""
    return fresh_llama(num_hidden_layers=1)


@functools.cache
def compiled(policy: str) -> LlamaForCausalLM:
    return kvfx_compile(llama(), policy)


def logits(model: nn.Module) -> Tensor:
    """Of a token after a compressed context."""
    return model(torch.tensor([[5]]), past_key_values=model.compress(CONTEXT)).logits


def forward_compiled() -> nn.Module:
    model = copy.deepcopy(llama())
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_in_place() -> nn.Module:
    model = copy.deepcopy(llama())
    model.compile(backend="eager")
    return model


COMPILED = {
    "torch.compile(model)": lambda: torch.compile(llama(), backend="eager"),
    "model.forward = torch.compile(...)": forward_compiled,
    "model.compile()": compiled_in_place,
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("how", COMPILED)
def test_a_model_already_compiled_is_unwrapped(how):
    torch.testing.assert_close(logits(kvfx_compile(COMPILED[how]())), logits(compiled(HALF)))


def test_a_compressed_model_takes_another_policy():
    other = kvfx_compile(compiled("knorm:0.2"))
    assert torch.equal(logits(other), logits(compiled(HALF)))
    assert other._kvfx.engine is compiled(HALF)._kvfx.engine
    assert compiled("knorm:0.2").compress(CONTEXT).layers[0].slots == 4


def test_parameters_are_shared_and_the_argument_is_not_modified():
    base = fresh_llama(tie_word_embeddings=True, num_hidden_layers=1)
    before = (type(base), set(base.__dict__), type(base).forward, len(base._forward_hooks))
    model = kvfx_compile(base)
    logits(model)
    assert (type(base), set(base.__dict__), type(base).forward, len(base._forward_hooks)) == before
    assert all(a is b for a, b in zip(model.parameters(), base.parameters(), strict=True))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert base(CONTEXT).past_key_values.__class__.__name__ == "DynamicCache"
    with torch.no_grad():
        base.model.embed_tokens.weight.mul_(2)
    assert torch.equal(model(CONTEXT, use_cache=False).logits, base(CONTEXT, use_cache=False).logits)


def test_a_compressed_model_is_of_its_class_and_saved_as_the_original(tmp_path):
    model = compiled(HALF)
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.state_dict().keys() == llama().state_dict().keys()
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config.architectures == ["LlamaForCausalLM"]
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in llama().state_dict().items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft, of transformers
def test_adapters_change_the_result_and_whose_cache_it_is(tmp_path):
    import peft

    torch.manual_seed(3)
    base = copy.deepcopy(llama())
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, config).eval()
    model = kvfx_compile(adapted)
    cache = model.compress(CONTEXT)
    merged = kvfx_compile(copy.deepcopy(adapted).merge_and_unload())
    torch.testing.assert_close(logits(model), logits(merged), atol=1e-4, rtol=1e-4)
    cache.save(tmp_path / "a.kvfx")
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(model), logits(compiled(HALF)))
        with pytest.raises(kvfx.CacheMismatch, match=r"(?s)active adapters: \[\] here, \['default'\] in the cache"):
            model(torch.tensor([[5]]), past_key_values=kvfx.load_cache(tmp_path / "a.kvfx"))
        unsaved = cache.copy()
        unsaved.fingerprint = None
        with pytest.raises(kvfx.CacheMismatch, match="or with other adapters active"):
            model(torch.tensor([[5]]), past_key_values=unsaved)
        with pytest.raises(kvfx.CacheMismatch, match=r"made with adapters \['default'\], active now are \[\]; activate the former"):
            unsaved.save(tmp_path / "b.kvfx")
    loaded = kvfx.load_cache(tmp_path / "a.kvfx")
    assert torch.equal(model(torch.tensor([[5]]), past_key_values=loaded).logits, logits(model))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_learned_prompts_are_refused():
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(fresh_llama(), config).eval()
    with pytest.raises(kvfx.UnsupportedModel, match=r"PeftModelForCausalLM learns prompts .*PROMPT_TUNING.*LoRA"):
        kvfx_compile(model)


class Int8Linear(nn.Module):
    """Weights of eight bits with a scale per row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.detach())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def test_a_quantised_model_gives_what_its_weights_say(tmp_path):
    quantised = copy.deepcopy(llama())
    plain = copy.deepcopy(llama())
    with torch.no_grad():
        for layer, same in zip(quantised.model.layers, plain.model.layers, strict=True):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                small = Int8Linear(getattr(layer.self_attn, name))
                setattr(layer.self_attn, name, small)
                getattr(same.self_attn, name).weight.copy_(small.weight * small.scale)
    model = kvfx_compile(quantised)
    torch.testing.assert_close(logits(model), logits(kvfx_compile(plain)))
    model.compress(CONTEXT).save(tmp_path / "a.kvfx")
    with pytest.raises(kvfx.CacheMismatch, match="weights of the first key projection differ"):
        kvfx_compile(plain)(torch.tensor([[5]]), past_key_values=kvfx.load_cache(tmp_path / "a.kvfx"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_kept_in_the_cache(dtype):
    base = copy.deepcopy(llama()).to(dtype)
    model = kvfx_compile(base, "knorm:1.0")
    cache = model.compress(CONTEXT)
    assert {layer.keys.dtype for layer in cache.layers} == {dtype}
    expected = base(torch.cat([CONTEXT, torch.tensor([[5]])], 1)).logits[:, -1]
    actual = model(torch.tensor([[5]]), past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(actual, expected, atol=0.1, rtol=0.05)


def test_nothing_is_recorded_for_gradients():
    model = compiled(HALF)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.enable_grad():
        out = model(CONTEXT)
        then = model(inputs_embeds=model.get_input_embeddings()(CONTEXT[:, :1]), past_key_values=out.past_key_values)
        plain = model(CONTEXT, use_cache=False)
    assert not any(output.logits.requires_grad for output in (out, then, plain))
    assert not any(tensor.requires_grad for tensor in out.past_key_values.tensors().values())


def test_several_devices_and_offloading_are_refused():
    model = fresh_llama()
    model.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(kvfx.UnsupportedModel, match=r"is spread over devices \['cpu', 'disk'\], which is not tested.*device_map="):
        kvfx_compile(model)
    model.hf_device_map = {"": "cpu"}
    assert isinstance(kvfx_compile(model), LlamaForCausalLM)
    del model.hf_device_map
    model.model.layers[0]._hf_hook = object()
    with pytest.raises(kvfx.UnsupportedModel, match=r"offloading hooks \(at `model\.layers\.0`\).*Load it without"):
        kvfx_compile(model)


NO_DECODERS = {
    "encoder-decoder": (
        lambda: T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval(),
        r"T5ForConditionalGeneration is no causal decoder: it is an encoder-decoder",
    ),
    "no language head": (lambda: LlamaModel(llama().config).eval(), r"LlamaModel is no causal decoder: it cannot generate"),
    "wrapped in a module": (
        lambda: nn.Sequential(llama()),
        r"Sequential holds a transformers model; give kvfx.compile that LlamaForCausalLM itself",
    ),
    "no module": (lambda: "llama", r"str is no model\. Expected a causal decoder"),
}  # fmt: skip


@pytest.mark.parametrize("what", NO_DECODERS)
def test_what_is_no_decoder_is_refused(what):
    make, message = NO_DECODERS[what]
    with pytest.raises(kvfx.UnsupportedModel, match=message):
        kvfx_compile(make())


def test_a_model_in_eager_attention_keeps_and_says_the_same():
    eager = fresh_llama(attention="eager", num_hidden_layers=1)
    eager.load_state_dict(llama().state_dict())
    model = kvfx_compile(eager)
    assert torch.equal(model.compress(CONTEXT).layers[0].positions, compiled(HALF).compress(CONTEXT).layers[0].positions)
    assert torch.equal(model.generate(CONTEXT, **GREEDY), compiled(HALF).generate(CONTEXT, **GREEDY))


def test_eval_and_train_false_return_the_model():
    assert compiled(HALF).eval() is compiled(HALF)
    assert compiled(HALF).train(False) is compiled(HALF)


def test_a_latent_cache_is_left_whole_and_decodes_as_the_model_does():
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32,
        kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, first_k_dense_replace=1,
        initializer_range=0.2,
    )  # fmt: skip
    base, plain = DeepseekV3ForCausalLM(config).eval(), DynamicCache(config=config)
    model = kvfx_compile(base)
    with pytest.warns(UserWarning, match=r"(?s)0 of 1 cache layers .* are compressed.*`new_empty` .* not what a cache stores"):
        cache = model.compress(CONTEXT)
    with torch.no_grad():
        base(CONTEXT, past_key_values=plain)
        for new in (CONTEXT[:, :1], CONTEXT[:, 3:6]):
            torch.testing.assert_close(model(new, past_key_values=cache).logits, base(new, past_key_values=plain).logits)


def test_a_recurrent_cache_is_refused():
    with pytest.raises(kvfx.UnsupportedModel, match="layer 0 of MambaForCausalLM keeps a LinearAttentionLayer"):
        kvfx_compile(MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)).eval())
