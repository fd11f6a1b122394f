"""Accessors for the rules: one call each into scripts.lib.workflow."""

import sys

sys.path.insert(0, workflow.basedir)

from scripts.lib.workflow import Workflow

PIPELINE = Workflow.at_start(workflow)

nodes = PIPELINE.nodes
shards = PIPELINE.shards
sweeps = PIPELINE.sweeps
of_sweep = PIPELINE.of_sweep
every = PIPELINE.every
before = PIPELINE.before
manifest = PIPELINE.manifest
place = PIPELINE.place
resources_of = PIPELINE.resources
start = PIPELINE.start
finish = PIPELINE.finish
fail = PIPELINE.fail
