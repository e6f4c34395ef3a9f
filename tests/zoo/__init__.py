"""Every causal-LM family that the installed transformers has, as a tiny random model, through both stages: `make zoo`.

families.py makes the configurations, weights.py the models, pairs.py the data; check.py takes one family through the public
stages and compares with plain.py; run.py does that for all of them, each in a process of its own; table.py writes docs/models.md.
"""
