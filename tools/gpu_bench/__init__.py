"""What bench_training and fp8_gradients are made of: models built from flags, one after another in one process."""
