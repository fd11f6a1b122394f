"""What is uploaded."""

for node in nodes("release"):

    checkpoint:
        """Add model card, scores and lineage to an export: a folder to upload."""
        name:
            f"release/{node}"
        input:
            before("release", node),
        output:
            report(
                manifest("release", node),
                caption="../rules/captions/release.rst",
                category="Results",
            ),
        log:
            f"logs/release/{node}.log",
        localrule: place("release", node, "controller")
        conda:
            "../envs/transformers.yaml"
        threads: place("release", node, "cpus")
        resources:
            **resources_of("release", node),
        params:
            node=node,
        shell:
            "python -m scripts.lib.run release {params.node}"


rule release:
    """Build every `release:` node."""
    input:
        every("release"),
