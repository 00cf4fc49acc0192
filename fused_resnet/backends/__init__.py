"""The implementations: plain modules with `reference`'s function names and signatures. Chosen by `dispatch`."""
