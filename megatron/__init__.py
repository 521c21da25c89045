"""3D-parallel training and finetuning of language models."""
