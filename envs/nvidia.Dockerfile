# syntax=docker/dockerfile:1
# The engine nvidia as a container, on NVIDIA's NeMo Framework container.
#
#     docker build -f envs/nvidia.Dockerfile -t pipeline-nvidia .
#
# By the accounts of its users, 26.08.01 has Megatron-Bridge 0.6.1, Megatron-Core 0.19.1,
# Transformer Engine 2.16 and NVIDIA's PyTorch 2.13. So is the digest; compare it:
#
#     docker buildx imagetools inspect nvcr.io/nvidia/nemo:26.08.01
#
# Then pin what is inside as the engine's versions (a node that ran elsewhere reruns):
#
#     docker run --rm -v "$PWD:/work" -w /work pipeline-nvidia \
#       python -m scripts.nvidia.versions envs/nvidia.lock --write
#
# No test here has built it.
ARG BASE=nvcr.io/nvidia/nemo:26.08.01@sha256:fdd6e9c7929b76c8624ddfea939dda345beaf67695d9c3994994c18f9e79b9bf
FROM ${BASE}

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# The project's code is mounted, not copied: its digest is part of a node's identity.
COPY envs/nvidia.lock /tmp/nvidia.lock
RUN grep -E '^(megatron-bridge|megatron-core|pydantic|pydantic-core|ruamel-yaml)==' \
      /tmp/nvidia.lock > /tmp/added.txt \
 && python -m pip install --no-deps -r /tmp/added.txt \
 && python -c 'import pydantic, ruamel.yaml' \
 && rm /tmp/nvidia.lock /tmp/added.txt
