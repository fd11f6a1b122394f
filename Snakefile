"""From raw text to an evaluated model: every stage a file, every artifact in DVC."""

from snakemake.utils import min_version

min_version("9.27")


include: "rules/common.smk"
include: "rules/data.smk"
include: "rules/pretrain.smk"
include: "rules/posttrain.smk"
include: "rules/sweep.smk"
include: "rules/export.smk"
include: "rules/eval.smk"
include: "rules/report.smk"
include: "rules/release.smk"


onstart:
    start()


onsuccess:
    finish()


onerror:
    fail()


rule all:
    """Build every node of the config."""
    default_target: True
    input:
        every(),
