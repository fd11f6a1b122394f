# syntax=docker/dockerfile:1
# NeMo-RL's stages (dpo, rm, grpo) and eval on vLLM, on NVIDIA's NeMo-RL container.
#
#     docker build -f envs/nemo-rl.Dockerfile -t pipeline-nemo-rl .
#
# Its workers have Pythons of their own there; what is added is for the scripts of this
# project, which run in NeMo-RL's main one. No test here has built it.
ARG BASE=nvcr.io/nvidia/nemo-rl:v0.7.0
FROM ${BASE}

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# The project's code is mounted, not copied: its digest is part of a node's identity.
COPY envs/nvidia.lock envs/nemo-rl.lock /tmp/
RUN grep -hE '^(pydantic|pydantic-core|ruamel-yaml|lm-eval)==' /tmp/nvidia.lock \
      /tmp/nemo-rl.lock > /tmp/added.txt \
 && python -m pip install -r /tmp/added.txt \
 && python -c 'import nemo_rl, pydantic, ruamel.yaml, lm_eval' \
 && rm /tmp/nvidia.lock /tmp/nemo-rl.lock /tmp/added.txt
