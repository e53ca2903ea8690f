"""The named runs of train.py, --preset=FAMILY-SYSTEM. Each lists what differs from the defaults.

All systems of a family use the same data and number of steps. Their FLOPs per token are within
3% of the memory preset's (dense2x: twice the FLOPs). moe, pkm, peer, ultramem and engram also have
its number of parameters, within 5%. tests/test_systems.py checks this.
"""

PRESETS = {}

# made-up facts to remember; three minutes on two CPU cores
PRESETS["facts-memory"] = dict(
    dataset="facts", batch_size=16, max_iters=3000, eval_interval=500,
    learning_rate=4e-3, mem_learning_rate=2e-2,
    n_layer=4, n_head=8, n_embd=64, block_size=64, n_ffn=160,
    mem_layers=(1, 2, 3), mem_keys=128, mem_topk=16,
)  # fmt: skip
PRESETS["facts-dense"] = dict(
    dataset="facts", batch_size=16, max_iters=3000, eval_interval=500,
    learning_rate=4e-3,
    n_layer=4, n_head=8, n_embd=64, block_size=64, n_ffn=184,
)  # fmt: skip
PRESETS["facts-dense2x"] = dict(
    dataset="facts", batch_size=16, max_iters=3000, eval_interval=500,
    learning_rate=4e-3,
    n_layer=4, n_head=8, n_embd=64, block_size=64, n_ffn=616,
)  # fmt: skip
PRESETS["facts-moe"] = dict(
    dataset="facts", batch_size=16, max_iters=3000, eval_interval=500,
    learning_rate=4e-3,
    n_layer=4, n_head=8, n_embd=64, block_size=64, n_ffn=184,
    system="moe", moe_experts=11, mem_layers=(1, 2, 3),
)  # fmt: skip
PRESETS["facts-pkm"] = dict(
    dataset="facts", batch_size=16, max_iters=3000, eval_interval=500,
    learning_rate=4e-3, mem_learning_rate=2e-2,
    n_layer=4, n_head=8, n_embd=64, block_size=64, n_ffn=192,
    mem_count=1, mem_keys=128, mem_topk=16,
    mem_gate=False, mem_qk_norm=False,
)  # fmt: skip
PRESETS["facts-peer"] = dict(
    dataset="facts", batch_size=16, max_iters=3000, eval_interval=500,
    learning_rate=4e-3, mem_learning_rate=5e-3,
    n_layer=4, n_head=8, n_embd=64, block_size=64, n_ffn=296,
    system="peer", mem_layers=(1, 2, 3), mem_keys=91, mem_topk=16,
    mem_gate=False,
)  # fmt: skip
PRESETS["facts-ultramem"] = dict(  # four blocks have no room for its skip
    dataset="facts", batch_size=16, max_iters=3000, eval_interval=500,
    learning_rate=4e-3, mem_learning_rate=5e-3,
    n_layer=4, n_head=8, n_embd=64, block_size=64, n_ffn=160,
    system="ultramem", mem_layers=(2,), mem_keys=180, mem_heads=2, mem_topk=32, mem_value_dim=32,
    mem_gate=False, mem_softmax=False, mem_rank=2, mem_cores=2, mem_expand=4,
)  # fmt: skip
PRESETS["facts-engram"] = dict(
    dataset="facts", batch_size=16, max_iters=3000, eval_interval=500,
    learning_rate=4e-3, mem_learning_rate=2e-2,
    n_layer=4, n_head=8, n_embd=64, block_size=64, n_ffn=168,
    ngram_layers=(0, 1), ngram_rows=8192,
)  # fmt: skip

# bytes of tinyshakespeare, or of any text
PRESETS["shakespeare-memory"] = dict(
    dataset="shakespeare", batch_size=16,
    learning_rate=2e-3, mem_learning_rate=3e-3,
    n_layer=4, n_head=4, n_embd=128, block_size=128,
    mem_count=1, mem_keys=128, mem_topk=16,
)  # fmt: skip
PRESETS["shakespeare-dense"] = dict(
    dataset="shakespeare", batch_size=16,
    learning_rate=2e-3,
    n_layer=4, n_head=4, n_embd=128, block_size=128,
)  # fmt: skip
PRESETS["shakespeare-dense2x"] = dict(
    dataset="shakespeare", batch_size=16,
    learning_rate=2e-3,
    n_layer=4, n_head=4, n_embd=128, block_size=128, n_ffn=888,
)  # fmt: skip
PRESETS["shakespeare-moe"] = dict(
    dataset="shakespeare", batch_size=16,
    learning_rate=2e-3,
    n_layer=4, n_head=4, n_embd=128, block_size=128, n_ffn=336,
    system="moe", moe_experts=17, mem_count=1,
)  # fmt: skip
PRESETS["shakespeare-pkm"] = dict(
    dataset="shakespeare", batch_size=16,
    learning_rate=2e-3, mem_learning_rate=3e-3,
    n_layer=4, n_head=4, n_embd=128, block_size=128, n_ffn=360,
    mem_count=1, mem_keys=128, mem_topk=16,
    mem_gate=False, mem_qk_norm=False,
)  # fmt: skip
PRESETS["shakespeare-peer"] = dict(
    dataset="shakespeare", batch_size=16,
    learning_rate=2e-3, mem_learning_rate=3e-3,
    n_layer=4, n_head=4, n_embd=128, block_size=128, n_ffn=360,
    system="peer", mem_count=1, mem_keys=90, mem_topk=16,
    mem_gate=False,
)  # fmt: skip
PRESETS["shakespeare-ultramem"] = dict(
    dataset="shakespeare", batch_size=16,
    learning_rate=2e-3, mem_learning_rate=2e-3, mem_decay=4.0,
    n_layer=4, n_head=4, n_embd=128, block_size=128, n_ffn=216,
    system="ultramem", mem_count=1, mem_keys=180, mem_topk=16, mem_value_dim=64,
    mem_gate=False, mem_softmax=False, mem_rank=2, mem_cores=2, mem_expand=4, mem_skip=1,
)  # fmt: skip
PRESETS["shakespeare-engram"] = dict(
    dataset="shakespeare", batch_size=16,
    learning_rate=2e-3, mem_learning_rate=3e-3,
    n_layer=4, n_head=4, n_embd=128, block_size=128, n_ffn=320,
    ngram_layers=(1,),
)  # fmt: skip

# GPT-2's size on OpenWebText, read once: 18,000 steps of 491,520 tokens, on one large GPU
PRESETS["gpt2-memory"] = dict(
    dataset="openwebtext", batch_size=32, gradient_accumulation_steps=15,
    max_iters=18000, warmup_iters=700, eval_interval=1000, eval_iters=50,
    min_lr=6e-5, beta2=0.95, mem_learning_rate=1e-3,
    n_layer=12, n_head=12, n_embd=768, block_size=1024,
    mem_count=3, mem_keys=1024, mem_dtype="bfloat16",
)  # fmt: skip
PRESETS["gpt2-dense"] = dict(
    dataset="openwebtext", batch_size=32, gradient_accumulation_steps=15,
    max_iters=18000, warmup_iters=700, eval_interval=1000, eval_iters=50,
    min_lr=6e-5, beta2=0.95,
    n_layer=12, n_head=12, n_embd=768, block_size=1024,
)  # fmt: skip
PRESETS["gpt2-dense2x"] = dict(
    dataset="openwebtext", batch_size=32, gradient_accumulation_steps=15,
    max_iters=18000, warmup_iters=700, eval_interval=1000, eval_iters=50,
    min_lr=6e-5, beta2=0.95,
    n_layer=12, n_head=12, n_embd=768, block_size=1024, n_ffn=6712,
)  # fmt: skip
PRESETS["gpt2-moe"] = dict(
    dataset="openwebtext", batch_size=32, gradient_accumulation_steps=15,
    max_iters=18000, warmup_iters=700, eval_interval=1000, eval_iters=50,
    min_lr=6e-5, beta2=0.95,
    n_layer=12, n_head=12, n_embd=768, block_size=1024,
    system="moe", moe_experts=58, mem_count=3,
)  # fmt: skip
PRESETS["gpt2-pkm"] = dict(
    dataset="openwebtext", batch_size=32, gradient_accumulation_steps=15,
    max_iters=18000, warmup_iters=700, eval_interval=1000, eval_iters=50,
    min_lr=6e-5, beta2=0.95, mem_learning_rate=1e-3,
    n_layer=12, n_head=12, n_embd=768, block_size=1024,
    mem_count=1, mem_keys=1024, mem_dtype="bfloat16",
    mem_gate=False, mem_qk_norm=False,
)  # fmt: skip
PRESETS["gpt2-peer"] = dict(
    dataset="openwebtext", batch_size=32, gradient_accumulation_steps=15,
    max_iters=18000, warmup_iters=700, eval_interval=1000, eval_iters=50,
    min_lr=6e-5, beta2=0.95, mem_learning_rate=1e-3,
    n_layer=12, n_head=12, n_embd=768, block_size=1024, n_ffn=2176,
    system="peer", mem_count=3, mem_keys=724, mem_dtype="bfloat16",
    mem_gate=False,
)  # fmt: skip
PRESETS["gpt2-ultramem"] = dict(
    dataset="openwebtext", batch_size=32, gradient_accumulation_steps=15,
    max_iters=18000, warmup_iters=700, eval_interval=1000, eval_iters=50,
    min_lr=6e-5, beta2=0.95, mem_learning_rate=6e-4, mem_decay=4.0,
    n_layer=12, n_head=12, n_embd=768, block_size=1024, n_ffn=1224,
    system="ultramem", mem_count=3, mem_keys=1448, mem_value_dim=384, mem_dtype="bfloat16",
    mem_gate=False, mem_softmax=False, mem_rank=2, mem_cores=2, mem_expand=4, mem_skip=1,
)  # fmt: skip
PRESETS["gpt2-engram"] = dict(
    dataset="openwebtext", batch_size=32, gradient_accumulation_steps=15,
    max_iters=18000, warmup_iters=700, eval_interval=1000, eval_iters=50,
    min_lr=6e-5, beta2=0.95, mem_learning_rate=3e-3,
    n_layer=12, n_head=12, n_embd=768, block_size=1024, n_ffn=1968,
    ngram_layers=(1, 6), ngram_rows=524288, mem_dtype="bfloat16",
)  # fmt: skip

# OpenWebText for a card of 24 GB: 1.05e9 tokens
PRESETS["gpt2-small-memory"] = dict(
    dataset="openwebtext", batch_size=32, gradient_accumulation_steps=8,
    max_iters=8000, warmup_iters=400, eval_interval=500, eval_iters=50,
    learning_rate=1e-3, min_lr=1e-4, beta2=0.95, mem_learning_rate=1e-3,
    n_layer=8, n_head=8, n_embd=512, block_size=512,
    mem_count=2, mem_keys=512, mem_dtype="bfloat16",
)  # fmt: skip
PRESETS["gpt2-small-dense"] = dict(
    dataset="openwebtext", batch_size=32, gradient_accumulation_steps=8,
    max_iters=8000, warmup_iters=400, eval_interval=500, eval_iters=50,
    learning_rate=1e-3, min_lr=1e-4, beta2=0.95,
    n_layer=8, n_head=8, n_embd=512, block_size=512,
)  # fmt: skip
PRESETS["gpt2-small-dense2x"] = dict(
    dataset="openwebtext", batch_size=32, gradient_accumulation_steps=8,
    max_iters=8000, warmup_iters=400, eval_interval=500, eval_iters=50,
    learning_rate=1e-3, min_lr=1e-4, beta2=0.95,
    n_layer=8, n_head=8, n_embd=512, block_size=512, n_ffn=5536,
)  # fmt: skip
PRESETS["gpt2-small-moe"] = dict(
    dataset="openwebtext", batch_size=32, gradient_accumulation_steps=8,
    max_iters=8000, warmup_iters=400, eval_interval=500, eval_iters=50,
    learning_rate=1e-3, min_lr=1e-4, beta2=0.95,
    n_layer=8, n_head=8, n_embd=512, block_size=512,
    system="moe", moe_experts=33, mem_count=2,
)  # fmt: skip
PRESETS["gpt2-small-pkm"] = dict(
    dataset="openwebtext", batch_size=32, gradient_accumulation_steps=8,
    max_iters=8000, warmup_iters=400, eval_interval=500, eval_iters=50,
    learning_rate=1e-3, min_lr=1e-4, beta2=0.95, mem_learning_rate=1e-3,
    n_layer=8, n_head=8, n_embd=512, block_size=512,
    mem_count=1, mem_keys=512, mem_dtype="bfloat16",
    mem_gate=False, mem_qk_norm=False,
)  # fmt: skip
PRESETS["gpt2-small-peer"] = dict(
    dataset="openwebtext", batch_size=32, gradient_accumulation_steps=8,
    max_iters=8000, warmup_iters=400, eval_interval=500, eval_iters=50,
    learning_rate=1e-3, min_lr=1e-4, beta2=0.95, mem_learning_rate=1e-3,
    n_layer=8, n_head=8, n_embd=512, block_size=512,
    system="peer", mem_count=2, mem_keys=362, mem_dtype="bfloat16",
    mem_gate=False,
)  # fmt: skip
PRESETS["gpt2-small-ultramem"] = dict(
    dataset="openwebtext", batch_size=32, gradient_accumulation_steps=8,
    max_iters=8000, warmup_iters=400, eval_interval=500, eval_iters=50,
    learning_rate=1e-3, min_lr=1e-4, beta2=0.95, mem_learning_rate=1e-3, mem_decay=4.0,
    n_layer=8, n_head=8, n_embd=512, block_size=512, n_ffn=864,
    system="ultramem", mem_count=2, mem_keys=724, mem_value_dim=256, mem_dtype="bfloat16",
    mem_gate=False, mem_softmax=False, mem_rank=2, mem_cores=2, mem_expand=4, mem_skip=1,
)  # fmt: skip
PRESETS["gpt2-small-engram"] = dict(
    dataset="openwebtext", batch_size=32, gradient_accumulation_steps=8,
    max_iters=8000, warmup_iters=400, eval_interval=500, eval_iters=50,
    learning_rate=1e-3, min_lr=1e-4, beta2=0.95, mem_learning_rate=5e-3,
    n_layer=8, n_head=8, n_embd=512, block_size=512, n_ffn=1304,
    ngram_layers=(1, 4), ngram_rows=131072, mem_dtype="bfloat16",
)  # fmt: skip
