"""MiniMind's three generations written anew from their formulas, in float64, so that the tests hold what the package must compute.

One module per generation, all with the same four names:
    DEFAULTS                      the settings that a file of the generation does not carry
    shapes(experts, shared)       key of a checkpoint -> shape
    compute(state, ids, settings) logits, and what the routers said
    balance_loss(scores, top)     the load-balancing loss of what the routers said
`formulas` holds what they share, `checkpoints` draws small files, `conversations` has tokenizers, templates and loss masks.
tests/test_originals.py compares all of them with what MiniMind's own code computed, where that is at hand.
"""
