"""What TinyLoRA is compared with, or driven by: LoRA, full finetuning, worked solutions, search."""
