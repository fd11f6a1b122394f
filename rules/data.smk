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
        localrule: place("generate", node, "controller")
        conda:
            "../envs/transformers.yaml"
        threads: place("generate", node, "cpus")
        resources:
            **resources_of("generate", node),
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
        localrule: place("tokenizer", node, "controller")
        conda:
            "../envs/transformers.yaml"
        threads: place("tokenizer", node, "cpus")
        resources:
            **resources_of("tokenizer", node),
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
        localrule: place("tokenize", node, "controller")
        conda:
            "../envs/transformers.yaml"
        threads: place("tokenize", node, "cpus")
        resources:
            **resources_of("tokenize", node),
        params:
            node=node,
        shell:
            "python -m scripts.lib.run tokenize {params.node}"


for shard in shards("tokenize"):

    rule:
        """Tokenize a share of a node's files, which the node's own job takes over."""
        name:
            f"tokenize/{shard}"
        input:
            before("tokenize", shard),
        output:
            manifest("tokenize", shard),
        log:
            f"logs/tokenize/{shard}.log",
        localrule: place("tokenize", shard, "controller")
        conda:
            "../envs/transformers.yaml"
        threads: place("tokenize", shard, "cpus")
        resources:
            **resources_of("tokenize", shard),
        params:
            shard=shard,
        shell:
            "python -m scripts.lib.run tokenize {params.shard}"


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
        localrule: place("pack", node, "controller")
        conda:
            "../envs/transformers.yaml"
        threads: place("pack", node, "cpus")
        resources:
            **resources_of("pack", node),
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
        localrule: place("prompts", node, "controller")
        conda:
            "../envs/transformers.yaml"
        threads: place("prompts", node, "cpus")
        resources:
            **resources_of("prompts", node),
        params:
            node=node,
        shell:
            "python -m scripts.lib.run prompts {params.node}"


rule prompts:
    """Build every `prompts:` node."""
    input:
        every("prompts"),


for node in nodes("preferences"):

    checkpoint:
        """Split pairs of answers, one preferred, into train and validation."""
        name:
            f"preferences/{node}"
        input:
            before("preferences", node),
        output:
            manifest("preferences", node),
        log:
            f"logs/preferences/{node}.log",
        localrule: place("preferences", node, "controller")
        conda:
            "../envs/transformers.yaml"
        threads: place("preferences", node, "cpus")
        resources:
            **resources_of("preferences", node),
        params:
            node=node,
        shell:
            "python -m scripts.lib.run preferences {params.node}"


rule preferences:
    """Build every `preferences:` node."""
    input:
        every("preferences"),
