"""Post-training: fine-tuning, preferences, reinforcement learning, and rollouts."""

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


for node in nodes("dpo"):

    checkpoint:
        """Prefer chosen answers to rejected ones."""
        name:
            f"dpo/{node}"
        input:
            before("dpo", node),
        output:
            manifest("dpo", node),
        log:
            f"logs/dpo/{node}.log",
        localrule: place("dpo", node, "controller")
        conda:
            "../envs/transformers.yaml"
        threads: place("dpo", node, "cpus")
        resources:
            **resources_of("dpo", node),
        params:
            node=node,
        shell:
            "python -m scripts.lib.run dpo {params.node}"


rule dpo:
    """Build every `dpo:` node."""
    input:
        every("dpo"),


for node in nodes("rm"):

    checkpoint:
        """Train a reward model on pairs of answers."""
        name:
            f"rm/{node}"
        input:
            before("rm", node),
        output:
            manifest("rm", node),
        log:
            f"logs/rm/{node}.log",
        localrule: place("rm", node, "controller")
        conda:
            "../envs/transformers.yaml"
        threads: place("rm", node, "cpus")
        resources:
            **resources_of("rm", node),
        params:
            node=node,
        shell:
            "python -m scripts.lib.run rm {params.node}"


rule rm:
    """Build every `rm:` node."""
    input:
        every("rm"),


for node in nodes("grpo"):

    checkpoint:
        """Optimize a policy on the rewards of its environments."""
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


for node in nodes("rollouts"):

    checkpoint:
        """Sample a model's answers, keep what environments reward."""
        name:
            f"rollouts/{node}"
        input:
            before("rollouts", node),
        output:
            manifest("rollouts", node),
        log:
            f"logs/rollouts/{node}.log",
        localrule: place("rollouts", node, "controller")
        conda:
            "../envs/transformers.yaml"
        threads: place("rollouts", node, "cpus")
        resources:
            **resources_of("rollouts", node),
        params:
            node=node,
        shell:
            "python -m scripts.lib.run rollouts {params.node}"


rule rollouts:
    """Build every `rollouts:` node."""
    input:
        every("rollouts"),
