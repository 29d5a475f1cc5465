"""What bench_training and fp8_acceptance are made of: models built from flags, one after another in one process."""
