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
        conda:
            "../envs/transformers.yaml"
        threads: place("eval", node, "cpus")
        resources:
            mem_mb=int(1000 * place("eval", node, "memory_gb")),
            runtime=place("eval", node, "minutes"),
            gpu=place("eval", node, "gpus"),
        params:
            node=node,
        shell:
            "python -m scripts.lib.run eval {params.node}"


rule eval:
    """Build every `eval:` node."""
    input:
        every("eval"),
