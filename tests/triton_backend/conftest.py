"""In a process with TRITON_INTERPRET=1 the interpreter is patched before any kernel is imported."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import harness

    from fused_resnet.backends.triton import configs

    harness.patch_interpreter()
    configs.TARGETS["tiny"] = configs.Target("tiny", 99 << 10, 1)  # few programs, so that each loops over its tiles
    configs.assume("tiny")
