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
        localrule: place("report", node, "controller")
        conda:
            "../envs/transformers.yaml"
        threads: place("report", node, "cpus")
        resources:
            **resources_of("report", node),
        params:
            node=node,
        shell:
            "python -m scripts.lib.run report {params.node}"


rule report:
    """Build every `report:` node."""
    input:
        every("report"),
