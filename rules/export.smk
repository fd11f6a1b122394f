"""Export to Hugging Face, and the target that builds it all."""

for node in nodes("export"):

    checkpoint:
        """Publish a checkpoint as a Hugging Face folder, checked for parity."""
        name:
            f"export/{node}"
        input:
            before("export", node),
        output:
            report(
                manifest("export", node),
                caption="../rules/captions/export.rst",
                category="Results",
            ),
        log:
            f"logs/export/{node}.log",
        localrule: place("export", node, "controller")
        conda:
            "../envs/transformers.yaml"
        threads: place("export", node, "cpus")
        resources:
            **resources_of("export", node),
        params:
            node=node,
        shell:
            "python -m scripts.lib.run export {params.node}"


rule export:
    """Build every export, its scores, the report, and what is uploaded."""
    input:
        every("export", "eval", "report", "release"),
