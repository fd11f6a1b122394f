"""Sweeps: a target for each, and the best of several nodes."""

for sweep in sweeps():

    rule:
        """Build every node of a sweep."""
        name:
            sweep
        input:
            of_sweep(sweep),


for node in nodes("best"):

    checkpoint:
        """Take the best of several nodes, by their scores."""
        name:
            f"best/{node}"
        input:
            before("best", node),
        output:
            manifest("best", node),
        log:
            f"logs/best/{node}.log",
        localrule: place("best", node, "controller")
        conda:
            "../envs/transformers.yaml"
        threads: place("best", node, "cpus")
        resources:
            **resources_of("best", node),
        params:
            node=node,
        shell:
            "python -m scripts.lib.run best {params.node}"


rule best:
    """Build every `best:` node."""
    input:
        every("best"),
