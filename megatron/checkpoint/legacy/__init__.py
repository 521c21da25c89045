"""Checkpoint trees of Megatron-LM and Megatron-LLM: one pickled file for each tensor and pipeline rank.

``<root>/{iter_0000100,release}/mp_rank_TT[_PPP]/model_optim_rng.pt`` beside ``latest_checkpointed_iteration.txt``.
`tree` finds the files, `keys` knows their spellings, `conventions` and `arguments` what the recorded command line
means, `bert` which BERT of theirs is the one here, `tensors` which rows of which stored tensor a logical one is made
of. `source` reads by these; `target` plans a tree and `writer` writes it.
"""

from megatron.checkpoint.legacy.source import LegacySource
from megatron.checkpoint.legacy.target import LegacyTreePlan, plan_legacy_tree
from megatron.checkpoint.legacy.tree import is_legacy_tree
from megatron.checkpoint.legacy.writer import write_legacy_tree

__all__ = ["LegacySource", "LegacyTreePlan", "is_legacy_tree", "plan_legacy_tree", "write_legacy_tree"]
