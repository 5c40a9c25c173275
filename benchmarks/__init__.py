"""Speed and memory: every figure a ratio against something measured in the same process."""
