"""`python -m fused_resnet` is the command `fused-resnet`."""

from fused_resnet.cli import main

raise SystemExit(main())
