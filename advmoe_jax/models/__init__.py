"""Networks: what maps images to logits."""
