"""Pretraining."""

for node in nodes("pretrain"):

    checkpoint:
        """Train a model from its definition on a blend of tokens."""
        name:
            f"pretrain/{node}"
        input:
            before("pretrain", node),
        output:
            manifest("pretrain", node),
        log:
            f"logs/pretrain/{node}.log",
        localrule: place("pretrain", node, "controller")
        conda:
            "../envs/transformers.yaml"
        threads: place("pretrain", node, "cpus")
        resources:
            **resources_of("pretrain", node),
        params:
            node=node,
        shell:
            "python -m scripts.lib.run pretrain {params.node}"


rule pretrain:
    """Build every `pretrain:` node."""
    input:
        every("pretrain"),
