"""Fusing models that exist: follow each module's own forward, match, check, and run the matches as fused ops.

trace    a module's forward as a graph of calls to its children, with everything the graph rests on as guards
match    conv + BN (+ add) (+ ReLU) chains in such a graph, and the hazards that forbid to fuse one
units    what runs in a chain's place, and when it must run unfused
scope    the class that a module with units gets, and gives back
report   what was fused, what was not, and why
"""
