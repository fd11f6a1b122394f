"""Post-training: supervised fine-tuning, then reinforcement learning."""

for node in nodes("sft"):

    checkpoint:
        """Fine-tune one `sft:` node on packed chat, from its parent's weights."""
        name:
            f"sft/{node}"
        input:
            before("sft", node),
        output:
            manifest("sft", node),
        log:
            f"logs/sft/{node}.log",
        localrule: place("sft", node, "controller")
        conda:
            "../envs/transformers.yaml"
        threads: place("sft", node, "cpus")
        resources:
            **resources_of("sft", node),
        params:
            node=node,
        shell:
            "python -m scripts.lib.run sft {params.node}"


rule sft:
    """Build every `sft:` node."""
    input:
        every("sft"),


for node in nodes("grpo"):

    checkpoint:
        """Optimize a policy on prompts whose answers are checked."""
        name:
            f"grpo/{node}"
        input:
            before("grpo", node),
        output:
            manifest("grpo", node),
        log:
            f"logs/grpo/{node}.log",
        localrule: place("grpo", node, "controller")
        conda:
            "../envs/transformers.yaml"
        threads: place("grpo", node, "cpus")
        resources:
            **resources_of("grpo", node),
        params:
            node=node,
        shell:
            "python -m scripts.lib.run grpo {params.node}"


rule grpo:
    """Build every `grpo:` node."""
    input:
        every("grpo"),
