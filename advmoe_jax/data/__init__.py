"""What images exist (sources), how they reach the device, and what a step is fed (batch)."""
