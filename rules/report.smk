"""The report."""

for node in nodes("report"):

    checkpoint:
        """Write the report: curves, scores, samples, lineage."""
        name:
            f"report/{node}"
        input:
            before("report", node),
        output:
            report(
                manifest("report", node),
                caption="../rules/captions/report.rst",
                category="Results",
            ),
        log:
            f"logs/report/{node}.log",
        conda:
            "../envs/transformers.yaml"
        threads: place("report", node, "cpus")
        resources:
            mem_mb=int(1000 * place("report", node, "memory_gb")),
            runtime=place("report", node, "minutes"),
            gpu=place("report", node, "gpus"),
        params:
            node=node,
        shell:
            "python -m scripts.lib.run report {params.node}"


rule report:
    """Build every `report:` node."""
    input:
        every("report"),
