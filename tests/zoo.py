"""Tiny random decoders of every family that kvfx is tested on, and what is true of each. The table knows nothing of kvfx."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 97
WINDOW = 16  # shorter than the prompts of the tests; below 15 graphs would differ for very short ones

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
TWO = {"num_hidden_layers": 2}
WINDOWED = {**TWO, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Families with names of their own for sizes.
OLD = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.3}
GPT = {**OLD, "n_embd": 64, "n_layer": 1, "n_head": 4}
ALIBI = {**SIZES, "multi_query": True, "alibi": True, "new_decoder_architecture": False}
LLAMA4 = {**SIZES, "head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 48}


@dataclass(frozen=True)
class Row:
    """One family.

    Attributes:
        family: what `transformers` calls its configuration, without `Config`; its model is FAMILYForCausalLM.
        settings: of the configuration.
        layers: what each layer's attention sees: full, window or chunked.
        kv_heads: heads of keys as the cache holds them; all query heads where the model repeats them before it stores them.
        query_heads: heads of queries.
        roped: whether each layer has RoPE.
        attention: the attention implementation, which is what a user gets unless the name of the row says otherwise.
        head: class of the model, where it is not FAMILYForCausalLM.
        query_scale: what the model multiplies queries by before it calls attention. Scores read queries without it.
        slow: whether another row stands for what this one shows.
    """

    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    layers: tuple[str, ...] = ("full",)
    kv_heads: int = 2
    query_heads: int = 4
    roped: tuple[bool, ...] = (True,)
    attention: str = "sdpa"
    head: str = ""
    query_scale: float = 1.0
    slow: bool = False

    @property
    def routed(self) -> bool:
        """Whether tokens go to experts."""
        return any("experts" in name for name in self.settings)

    @property
    def full(self) -> list[int]:
        """Layers that see everything."""
        return [index for index, kind in enumerate(self.layers) if kind == "full"]


PLAIN, ALTERNATING = (True, True), ("window", "full")

ROWS = {
    "llama": Row("Llama", {**SIZES, **TWO}, ("full", "full"), roped=PLAIN),
    "llama, eager": Row("Llama", {**SIZES, **TWO}, ("full", "full"), roped=PLAIN, attention="eager"),
    "mistral": Row("Mistral", {**SIZES, "sliding_window": None}, slow=True),
    "mistral, window": Row("Mistral", {**SIZES, "sliding_window": WINDOW}, ("window",), slow=True),
    "mixtral": Row("Mixtral", {**SIZES, "sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2}, slow=True),
    "qwen2": Row("Qwen2", SIZES, slow=True),
    "qwen3": Row("Qwen3", {**SIZES, "head_dim": 16}),
    "qwen3, eager": Row("Qwen3", {**SIZES, "head_dim": 16}, attention="eager", slow=True),
    "qwen3-moe": Row("Qwen3Moe", {**SIZES, "head_dim": 16, **EXPERTS}, slow=True),
    "olmo2": Row("Olmo2", SIZES, slow=True),
    "olmo3": Row("Olmo3", {**SIZES, **WINDOWED}, ALTERNATING, roped=PLAIN, slow=True),
    "olmoe": Row("Olmoe", {**SIZES, "num_experts": 4, "num_experts_per_tok": 2}, slow=True),
    "gemma2": Row(
        "Gemma2", {**SIZES, **WINDOWED, "head_dim": 16, "query_pre_attn_scalar": 24}, ALTERNATING, roped=PLAIN, attention="eager"
    ),
    "gemma3": Row("Gemma3Text", {**SIZES, **WINDOWED, "head_dim": 16}, ALTERNATING, roped=PLAIN, head="Gemma3ForCausalLM"),
    "phi3": Row("Phi3", {**SIZES, "partial_rotary_factor": 0.5}, slow=True),
    "cohere": Row("Cohere", {**SIZES, "use_qk_norm": True}),
    "cohere2": Row("Cohere2", {**SIZES, **WINDOWED}, ALTERNATING, roped=(True, False), slow=True),
    "glm4": Row("Glm4", {**SIZES, "head_dim": 16, "partial_rotary_factor": 0.5}, slow=True),
    "granite": Row(
        "Granite", {**SIZES, "attention_multiplier": 0.2, "residual_multiplier": 0.7, "embedding_multiplier": 3.0}, slow=True
    ),
    "smollm3": Row("SmolLM3", {**SIZES, **TWO, "no_rope_layers": [1, 0]}, ("full", "full"), roped=(True, False), slow=True),
    "starcoder2": Row("Starcoder2", {**SIZES, "sliding_window": None}, slow=True),
    "stablelm": Row("StableLm", {**SIZES, "partial_rotary_factor": 0.25, "qk_layernorm": True}, slow=True),
    "nemotron": Row("Nemotron", {**SIZES, "partial_rotary_factor": 0.5}, slow=True),
    "exaone4": Row("Exaone4", {**SIZES, **WINDOWED}, ALTERNATING, roped=(True, False), slow=True),
    "ernie4.5": Row("Ernie4_5", {**SIZES, "head_dim": 16, "use_bias": True}, slow=True),
    "hunyuan": Row("HunYuanDenseV1", {**SIZES, "head_dim": 16}),
    "seed-oss": Row("SeedOss", {**SIZES, "head_dim": 16}, slow=True),
    "gpt2": Row("GPT2", {**GPT, "n_layer": 2}, ("full", "full"), 4, roped=(False, False), head="GPT2LMHeadModel"),
    "gpt2, eager": Row("GPT2", GPT, kv_heads=4, roped=(False,), attention="eager", head="GPT2LMHeadModel", slow=True),
    "gpt-neox": Row("GPTNeoX", {**SIZES, "rotary_pct": 0.5}, kv_heads=4),
    "gpt-j": Row("GPTJ", {**GPT, "rotary_dim": 8}, kv_heads=4, attention="eager"),
    "opt": Row("OPT", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 64}, kv_heads=4, roped=(False,), query_scale=0.25),
    "bloom": Row("Bloom", {**OLD, "hidden_size": 64, "n_layer": 1, "n_head": 4}, kv_heads=4, roped=(False,), attention="eager"),
    "mpt": Row(
        "Mpt", {**OLD, "d_model": 64, "n_layers": 1, "n_heads": 4, "max_seq_len": 512}, kv_heads=4, roped=(False,),
        attention="eager", slow=True,
    ),
    "falcon": Row("Falcon", {**SIZES, "num_kv_heads": 2, "new_decoder_architecture": True}, kv_heads=4, slow=True),
    "falcon, alibi": Row("Falcon", ALIBI, kv_heads=1, roped=(False,)),
    "falcon, alibi, eager": Row("Falcon", ALIBI, kv_heads=1, roped=(False,), attention="eager", slow=True),
    "gpt-oss": Row(
        "GptOss",
        {
            **SIZES, **WINDOWED, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
            "max_position_embeddings": 32 * 4096,  # what its RoPE is made for
        },
        ALTERNATING, roped=PLAIN, attention="eager",
    ),
    "llama4": Row(
        "Llama4Text", {**LLAMA4, **TWO, "no_rope_layers": [1, 0], "attention_chunk_size": WINDOW}, ("chunked", "full"),
        roped=(True, False), head="Llama4ForCausalLM",
    ),
    "llama4, full": Row(
        "Llama4Text", {**LLAMA4, "no_rope_layers": [1], "layer_types": ["full_attention"]}, head="Llama4ForCausalLM", slow=True
    ),
}  # fmt: skip


def make(row: Row) -> PreTrainedModel:
    """The model of `row`: large random weights, and norms and biases that are not trivial, so that a wrong tap shows."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{row.family}Config")(**row.settings, attn_implementation=row.attention)
    model = getattr(transformers, row.head or f"{row.family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "norm" in name or "ln_" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("sinks"):
                parameter.normal_()
    return model


def prompt(length: int, seed: int = 1) -> torch.Tensor:
    """Random ids, `[1, length]`, none twice: the first layer's keys of equal tokens would have equal norms."""
    order = torch.randperm(VOCABULARY - 3, generator=torch.Generator().manual_seed(seed))
    return order[None, :length] + 3
