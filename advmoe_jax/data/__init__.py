"""What images exist (sources), how they reach the device (pipeline), and augmentation."""
