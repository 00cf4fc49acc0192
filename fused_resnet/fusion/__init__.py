"""Fusing models that exist: follow each module's own forward, match, check, and run the matches as fused ops.

watch    one symbolic trace: notes what its graph rests on, stops at what a graph cannot stand for
guards   what was noted, checked again at every call; `inputs` is what the call must look like
trace    a module's forward as a graph of calls to its children
match    conv + BN (+ add) (+ ReLU) chains in such a graph, and the hazards that forbid to fuse one
norms    the batch norms that are known
units    what runs in a chain's place, and when its own steps run instead
blocks   units that make up a residual block, and when they run as one op
scope    the class that a module with units gets, and gives back
plan     all of this for a model, changing nothing; `report` is what was fused, what was not, and why
"""
