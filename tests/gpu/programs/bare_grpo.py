"""NeMo-RL's GRPO by the build's YAML and rewards, and nothing else of the build."""

from __future__ import annotations

from scripts.nvidia import grpo, rl

rl.Watch.install = lambda watch: None  # type: ignore[method-assign]

if __name__ == "__main__":
    rl.leave(grpo.main)
