"""What checkpoints hold besides tensors."""
