"""Evaluation."""

for node in nodes("eval"):

    checkpoint:
        """Score models on held-out tasks, the same items for all."""
        name:
            f"eval/{node}"
        input:
            before("eval", node),
        output:
            report(
                manifest("eval", node),
                caption="../rules/captions/eval.rst",
                category="Results",
            ),
        log:
            f"logs/eval/{node}.log",
        localrule: place("eval", node, "controller")
        conda:
            "../envs/transformers.yaml"
        threads: place("eval", node, "cpus")
        resources:
            **resources_of("eval", node),
        params:
            node=node,
        shell:
            "python -m scripts.lib.run eval {params.node}"


rule eval:
    """Build every `eval:` node."""
    input:
        every("eval"),
