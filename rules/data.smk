"""Data: from raw rows to tokens, packed chats and prompts."""

for node in nodes("generate"):

    checkpoint:
        """Make rows of text, chats, prompts or held-out items."""
        name:
            f"generate/{node}"
        input:
            before("generate", node),
        output:
            manifest("generate", node),
        log:
            f"logs/generate/{node}.log",
        conda:
            "../envs/transformers.yaml"
        threads: place("generate", node, "cpus")
        resources:
            mem_mb=int(1000 * place("generate", node, "memory_gb")),
            runtime=place("generate", node, "minutes"),
            gpu=place("generate", node, "gpus"),
        params:
            node=node,
        shell:
            "python -m scripts.lib.run generate {params.node}"


rule generate:
    """Build every `generate:` node."""
    input:
        every("generate"),


for node in nodes("tokenizer"):

    checkpoint:
        """Train a tokenizer on data, or take a ready one."""
        name:
            f"tokenizer/{node}"
        input:
            before("tokenizer", node),
        output:
            manifest("tokenizer", node),
        log:
            f"logs/tokenizer/{node}.log",
        conda:
            "../envs/transformers.yaml"
        threads: place("tokenizer", node, "cpus")
        resources:
            mem_mb=int(1000 * place("tokenizer", node, "memory_gb")),
            runtime=place("tokenizer", node, "minutes"),
            gpu=place("tokenizer", node, "gpus"),
        params:
            node=node,
        shell:
            "python -m scripts.lib.run tokenizer {params.node}"


rule tokenizer:
    """Build every `tokenizer:` node."""
    input:
        every("tokenizer"),


for node in nodes("tokenize"):

    checkpoint:
        """Turn documents into Megatron bin/idx shards and a blend."""
        name:
            f"tokenize/{node}"
        input:
            before("tokenize", node),
        output:
            manifest("tokenize", node),
        log:
            f"logs/tokenize/{node}.log",
        conda:
            "../envs/transformers.yaml"
        threads: place("tokenize", node, "cpus")
        resources:
            mem_mb=int(1000 * place("tokenize", node, "memory_gb")),
            runtime=place("tokenize", node, "minutes"),
            gpu=place("tokenize", node, "gpus"),
        params:
            node=node,
        shell:
            "python -m scripts.lib.run tokenize {params.node}"


rule tokenize:
    """Build every `tokenize:` node."""
    input:
        every("tokenize"),


for node in nodes("pack"):

    checkpoint:
        """Pack chats into rows of one length, with their loss masks."""
        name:
            f"pack/{node}"
        input:
            before("pack", node),
        output:
            manifest("pack", node),
        log:
            f"logs/pack/{node}.log",
        conda:
            "../envs/transformers.yaml"
        threads: place("pack", node, "cpus")
        resources:
            mem_mb=int(1000 * place("pack", node, "memory_gb")),
            runtime=place("pack", node, "minutes"),
            gpu=place("pack", node, "gpus"),
        params:
            node=node,
        shell:
            "python -m scripts.lib.run pack {params.node}"


rule pack:
    """Build every `pack:` node."""
    input:
        every("pack"),


for node in nodes("prompts"):

    checkpoint:
        """Split RL prompts with answers into train and validation."""
        name:
            f"prompts/{node}"
        input:
            before("prompts", node),
        output:
            manifest("prompts", node),
        log:
            f"logs/prompts/{node}.log",
        conda:
            "../envs/transformers.yaml"
        threads: place("prompts", node, "cpus")
        resources:
            mem_mb=int(1000 * place("prompts", node, "memory_gb")),
            runtime=place("prompts", node, "minutes"),
            gpu=place("prompts", node, "gpus"),
        params:
            node=node,
        shell:
            "python -m scripts.lib.run prompts {params.node}"


rule prompts:
    """Build every `prompts:` node."""
    input:
        every("prompts"),
