"""What TinyLoRA is compared with, or driven by: LoRA, full finetuning, worked solutions, search.

One more way to train: its name in train.py's RECIPE and LR, its branch in adapt and save there, the
flags it takes in support/checks.py (TAKES).
"""
