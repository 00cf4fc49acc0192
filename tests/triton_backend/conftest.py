"""In a process with TRITON_INTERPRET=1 the interpreter is patched before any kernel is imported."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import harness

    harness.patch_interpreter()
