"""Presets of train.py: options by name, FAMILY-SYSTEM, as in --preset=facts-ultramem.

The systems of a family have the same data, the same steps, and FLOPs a token within 3% of those of its memory
preset (dense2x: twice as many). moe, pkm, peer and ultramem have its parameters, too, within 5%.

A run of gpt2 reads OpenWebText once, 18,000 steps of 491,520 tokens; one of gpt2-small reads 1.05e9 tokens.
"""

FAMILIES = {
    "facts": dict(dataset="facts", n_layer=2, n_head=4, n_embd=64, block_size=128, eval_interval=500,
        max_iters=3500, mem_count=1, mem_keys=128, mem_topk=16, learning_rate=2.5e-3, mem_learning_rate=2e-2),
    "shakespeare": dict(dataset="shakespeare", n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=16,
        mem_count=1, mem_keys=128, mem_topk=16, learning_rate=2e-3, mem_learning_rate=3e-3),
    "gpt2": dict(dataset="openwebtext", n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=32,
        gradient_accumulation_steps=15, max_iters=18000, warmup_iters=700, eval_interval=1000, eval_iters=50,
        mem_count=3, mem_keys=1024, mem_dtype="bfloat16", beta2=0.95, min_lr=6e-5, mem_learning_rate=1e-3),
    "gpt2-small": dict(dataset="openwebtext", n_layer=8, n_head=8, n_embd=512, block_size=512, batch_size=32,
        gradient_accumulation_steps=8, max_iters=8000, warmup_iters=400, eval_interval=500, eval_iters=50,
        mem_count=2, mem_keys=512, mem_dtype="bfloat16", beta2=0.95, learning_rate=1e-3, min_lr=1e-4,
        mem_learning_rate=1e-3),
}  # fmt: skip
SYSTEMS = {  # what makes each of them
    "memory": {}, "dense": dict(mem_count=0), "dense2x": dict(mem_count=0), "moe": dict(system="moe"),
    "pkm": dict(mem_count=1, mem_gate=False, mem_qk_norm=False), "peer": dict(system="peer", mem_gate=False),
    "ultramem": dict(system="ultramem", mem_gate=False, mem_softmax=False, mem_rank=2, mem_cores=2,
        mem_expand=4, mem_skip=1, mem_decay=4.0),
}  # fmt: skip
SIZES = {  # and what makes them equal
    "facts": dict(dense2x=dict(n_ffn=784), moe=dict(moe_experts=32), pkm=dict(n_ffn=208),
        peer=dict(mem_keys=90, n_ffn=216, mem_learning_rate=5e-3),
        ultramem=dict(mem_keys=180, mem_value_dim=32, n_ffn=96, mem_heads=2, mem_topk=32, mem_skip=0,
            mem_learning_rate=2e-3)),  # two blocks have no room for UltraMem's skip
    "shakespeare": dict(dense2x=dict(n_ffn=888), pkm=dict(n_ffn=360),
        moe=dict(moe_experts=17, n_ffn=336), peer=dict(mem_keys=90, n_ffn=360),
        ultramem=dict(mem_keys=180, mem_value_dim=64, n_ffn=216, mem_learning_rate=2e-3)),
    "gpt2": dict(dense2x=dict(n_ffn=6712), moe=dict(moe_experts=58),
        peer=dict(mem_keys=724, n_ffn=2176),
        ultramem=dict(mem_keys=1448, mem_value_dim=384, n_ffn=1224, mem_learning_rate=6e-4)),
    "gpt2-small": dict(dense2x=dict(n_ffn=5536), moe=dict(moe_experts=33),
        peer=dict(mem_keys=362), ultramem=dict(mem_keys=724, mem_value_dim=256, n_ffn=864)),
}  # fmt: skip
PRESETS = {f"{family}-{system}": FAMILIES[family] | SYSTEMS[system] | SIZES[family].get(system, {})
    for family in FAMILIES for system in SYSTEMS}  # fmt: skip
